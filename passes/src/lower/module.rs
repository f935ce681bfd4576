//! What all entries of a program share: kernels, each once, buffers, and what is prepared of frozen weights.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use peft_grammar::model::{Optimizer, Precision};
use peft_grammar::names::Input;
use peft_runtime::artifact::{Buffer, BufferId, Element, Entry, Extent, Launch, Manifest, Storage, Tensor};

use super::Options;
use crate::builder::Code;
use crate::fuse::Limits;
use crate::kernels::embedding::{Gather, GatherBuffers, GatherSizes};
use crate::kernels::{Function, Schedule, names};
use crate::target::Machine;

/// What all entries share.
pub struct Module<'a> {
    pub tensors: &'a [Tensor],
    pub machine: Machine,
    pub precision: Precision,
    pub optimizer: Optimizer,
    pub limits: Limits,
    pub kernels: Vec<Function>,
    /// Where each of them stands.
    known: HashMap<Function, usize>,
    pub codes: HashMap<Schedule, Code>,
    pub buffers: Vec<Buffer>,
    /// Buffers that exist once whoever asks: inputs, tensors, what is prepared from them.
    pub bound: HashMap<String, BufferId>,
    /// By the frozen table that is there in panels as well.
    pub panels: BTreeMap<BufferId, Panels>,
    pub prepare: Vec<Launch>,
}

impl<'a> Module<'a> {
    pub fn new(tensors: &'a [Tensor], options: Options) -> Module<'a> {
        let Options { machine, precision, optimizer, limits, .. } = options;
        Module {
            tensors,
            machine,
            precision,
            optimizer,
            limits,
            kernels: vec![],
            known: HashMap::new(),
            codes: HashMap::new(),
            buffers: vec![],
            bound: HashMap::new(),
            panels: BTreeMap::new(),
            prepare: vec![],
        }
    }

    /// The program of these entries.
    pub fn finish(mut self, mut entries: BTreeMap<String, Entry>) -> Lowered {
        self.gather_from_panels(&mut entries);
        let all = entries.values_mut().flat_map(|entry| &mut entry.launches);
        let mut launches: Vec<&mut Launch> = all.chain(&mut self.prepare).collect();
        // What is only launched side by side is written for that alone.
        let launched: BTreeSet<usize> = launches.iter().map(|launch| launch.kernel).collect();
        launches.iter_mut().for_each(|launch| launch.kernel = launched.range(..launch.kernel).count());
        let functions: Vec<Function> = launched.iter().map(|&kernel| self.kernels[kernel].clone()).collect();
        let machine = self.machine;
        let manifest = Manifest {
            arch: machine.arch().into(),
            features: machine.features().iter().map(|f| f.to_string()).collect(),
            kernels: names(&functions),
            tensors: self.tensors.to_vec(),
            buffers: self.buffers,
            prepare: self.prepare,
            entries,
            ..Manifest::default()
        };
        Lowered { functions, codes: self.codes, machine, manifest }
    }

    /// Rows of a table that nothing else reads as it was given come from its panels. Known when all entries are lowered.
    fn gather_from_panels(&mut self, entries: &mut BTreeMap<String, Entry>) {
        for (table, Panels { buffer, across, shape }) in std::mem::take(&mut self.panels) {
            let gathers = |launch: &Launch| {
                let GatherSizes { rows, width, .. } = GatherSizes::of(&launch.extents);
                [rows, width] == shape
            };
            let all = entries.values_mut().flat_map(|entry| &mut entry.launches);
            let mut reads: Vec<&mut Launch> = all.filter(|launch| launch.buffers.contains(&table)).collect();
            let whole = Schedule::from(Gather { panels: None });
            let own = |launch: &Launch| *self.schedule(launch) == whole && gathers(launch);
            if reads.iter().all(|launch| own(launch)) && !reads.is_empty() {
                let kernel = self.function(Function::of(Gather { panels: Some(across) }));
                for launch in &mut reads {
                    let buffers = GatherBuffers { table: buffer, ..GatherBuffers::of(&launch.buffers) };
                    (launch.kernel, launch.buffers) = (kernel, buffers.list());
                }
            }
        }
    }

    /// The one kernel that is this.
    pub fn function(&mut self, function: Function) -> usize {
        if let Some(&at) = self.known.get(&function) {
            return at;
        }
        let machine = self.machine;
        self.codes.entry(function.schedule.clone()).or_insert_with_key(|schedule| schedule.emit(machine));
        self.known.insert(function.clone(), self.kernels.len());
        self.kernels.push(function);
        self.kernels.len() - 1
    }

    /// What a launch's kernel does.
    pub fn schedule(&self, launch: &Launch) -> &Schedule {
        &self.kernels[launch.kernel].schedule
    }

    /// That which does the work of so many launches of `kernel`.
    pub fn side_by_side(&mut self, kernel: usize, launches: usize) -> usize {
        self.function(Function { launches, ..self.kernels[kernel].clone() })
    }

    /// A launch of the kernel that is `schedule`.
    pub fn launch(
        &mut self,
        schedule: impl Into<Schedule>,
        buffers: Vec<BufferId>,
        extents: Vec<Extent>,
        units: Extent,
        op: &str,
    ) -> Launch {
        let group = self.machine.workgroup();
        Launch { kernel: self.function(Function::of(schedule)), buffers, extents, units, group, op: op.into() }
    }

    pub fn buffer(&mut self, element: Element, shape: Vec<Extent>, storage: Storage) -> BufferId {
        self.buffers.push(Buffer { element, shape, storage });
        self.buffers.len() - 1
    }

    /// The one buffer known as `key`.
    pub fn bind(&mut self, key: &str, element: Element, shape: Vec<Extent>, storage: Storage) -> BufferId {
        if let Some(&buffer) = self.bound.get(key) {
            return buffer;
        }
        let buffer = self.buffer(element, shape, storage);
        self.bound.insert(key.to_string(), buffer);
        buffer
    }

    /// One of the index vectors the runtime derives from the sequence lengths.
    pub fn derived(&mut self, input: Input) -> BufferId {
        let length = match input {
            Input::Offsets => Extent::Sequences + Extent::Const(1),
            Input::Pairs => Extent::Tokens + Extent::Const(1),
            _ => Extent::Tokens,
        };
        self.bind(input.name(), Element::I32, vec![length], Storage::Input(input.name().into()))
    }
}

/// A table's numbers once more, in panels.
pub struct Panels {
    pub buffer: BufferId,
    /// Columns of a panel.
    pub across: u64,
    /// The table's rows and columns.
    pub shape: [Extent; 2],
}

/// Kernels, and how the entries run them.
pub struct Lowered {
    /// In the manifest's order.
    pub functions: Vec<Function>,
    codes: HashMap<Schedule, Code>,
    /// What they are written for.
    pub machine: Machine,
    pub manifest: Manifest,
}

impl Lowered {
    /// The kernels as the texts of MLIR functions, in the manifest's order.
    pub fn kernels(&self) -> Vec<String> {
        let named = self.functions.iter().zip(&self.manifest.kernels);
        named.map(|(function, name)| self.codes[&function.schedule].function(name, function.launches)).collect()
    }
}

/// The kernels of several programs, each once: the programs call what they share by the same names then.
pub fn together<'a>(programs: impl IntoIterator<Item = &'a mut Lowered>) -> Vec<String> {
    let mut programs: Vec<&mut Lowered> = programs.into_iter().collect();
    assert!(programs.windows(2).all(|two| two[0].machine == two[1].machine), "programs of one machine");
    let mut functions: Vec<Function> = vec![];
    let mut known = HashSet::new();
    for function in programs.iter().flat_map(|program| &program.functions) {
        if known.insert(function) {
            functions.push(function.clone());
        }
    }
    let named: HashMap<&Function, String> = functions.iter().zip(names(&functions)).collect();
    let mut texts: HashMap<Function, String> = HashMap::new();
    for program in &mut programs {
        program.manifest.kernels = program.functions.iter().map(|function| named[function].clone()).collect();
        texts.extend(program.functions.iter().cloned().zip(program.kernels()));
    }
    functions.iter().filter_map(|function| texts.remove(function)).collect()
}
