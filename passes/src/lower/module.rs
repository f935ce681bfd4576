//! The module under construction, which all entries of a program share: deduplicated kernels, buffers, and the launches
//! that prepare frozen weights.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use peft_grammar::model::{Optimizer, Precision};
use peft_grammar::names::Input;
use peft_runtime::artifact::{Buffer, BufferId, Element, Entry, Extent, Launch, Manifest, Storage, Tensor};

use super::Options;
use super::computed::{Computed, Listing};
use crate::builder::Code;
use crate::fuse::Thresholds;
use crate::kernels::embedding::{Gather, GatherBuffers, GatherSizes};
use crate::kernels::{Function, Schedule, names};
use crate::target::Machine;

/// The module under construction. Entries share its kernels, its named buffers and its prepared weights.
pub struct Module<'a> {
    pub tensors: &'a [Tensor],
    pub machine: Machine,
    pub precision: Precision,
    pub optimizer: Optimizer,
    pub thresholds: Thresholds,
    pub kernels: Vec<Function>,
    /// The index of each function in `kernels`.
    kernel_ids: HashMap<Function, usize>,
    pub codes: HashMap<Schedule, Code>,
    pub buffers: Vec<Buffer>,
    /// Buffers by key that exist once for all entries: inputs, tensors, and what is prepared from frozen tensors.
    pub bound: HashMap<String, BufferId>,
    /// By the buffer of a frozen table: the copy of it that is packed into panels.
    pub panel_copies: BTreeMap<BufferId, PanelCopy>,
    pub prepare: Vec<Launch>,
    /// By launch of `prepare`: the operations that it computes.
    pub prepare_computed: Vec<Vec<Rc<[Computed]>>>,
}

impl<'a> Module<'a> {
    pub fn new(tensors: &'a [Tensor], options: Options) -> Module<'a> {
        let Options { machine, precision, optimizer, thresholds, .. } = options;
        Module {
            tensors,
            machine,
            precision,
            optimizer,
            thresholds,
            kernels: vec![],
            kernel_ids: HashMap::new(),
            codes: HashMap::new(),
            buffers: vec![],
            bound: HashMap::new(),
            panel_copies: BTreeMap::new(),
            prepare: vec![],
            prepare_computed: vec![],
        }
    }

    /// Builds the program of these entries.
    pub fn finish(mut self, mut entries: BTreeMap<String, Entry>, mut listing: Listing) -> Lowered {
        listing.insert("prepare".into(), std::mem::take(&mut self.prepare_computed));
        self.gather_from_panels(&mut entries);
        let all = entries.values_mut().flat_map(|entry| &mut entry.launches);
        let mut launches: Vec<&mut Launch> = all.chain(&mut self.prepare).collect();
        // Kernels that are only launched in their merged form are dropped.
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
        Lowered { functions, codes: self.codes, machine, manifest, listing }
    }

    /// Lets `gather` read a table's rows from its packed panels, if no launch reads the table as it was given; the
    /// given table then needs no device memory. This is known only when all entries are lowered.
    fn gather_from_panels(&mut self, entries: &mut BTreeMap<String, Entry>) {
        for (table, PanelCopy { buffer, width, shape }) in std::mem::take(&mut self.panel_copies) {
            let gathers = |launch: &Launch| {
                let GatherSizes { rows, width, .. } = GatherSizes::of(&launch.extents);
                [rows, width] == shape
            };
            let all = entries.values_mut().flat_map(|entry| &mut entry.launches);
            let mut reads: Vec<&mut Launch> = all.filter(|launch| launch.buffers.contains(&table)).collect();
            let whole = Schedule::from(Gather { panel_width: None });
            let own = |launch: &Launch| *self.schedule(launch) == whole && gathers(launch);
            if reads.iter().all(|launch| own(launch)) && !reads.is_empty() {
                let kernel = self.function(Function::of(Gather { panel_width: Some(width) }));
                for launch in &mut reads {
                    let buffers = GatherBuffers { table: buffer, ..GatherBuffers::of(&launch.buffers) };
                    (launch.kernel, launch.buffers) = (kernel, buffers.list());
                }
            }
        }
    }

    /// The index of the kernel that is this function; its code is emitted when it is first asked for.
    pub fn function(&mut self, function: Function) -> usize {
        if let Some(&at) = self.kernel_ids.get(&function) {
            return at;
        }
        let machine = self.machine;
        self.codes.entry(function.schedule.clone()).or_insert_with_key(|schedule| schedule.emit(machine));
        self.kernel_ids.insert(function.clone(), self.kernels.len());
        self.kernels.push(function);
        self.kernels.len() - 1
    }

    /// The schedule of a launch's kernel.
    pub fn schedule(&self, launch: &Launch) -> &Schedule {
        &self.kernels[launch.kernel].schedule
    }

    /// The kernel that does the work of `launches` merged launches of `kernel`.
    pub fn merged_kernel(&mut self, kernel: usize, launches: usize) -> usize {
        self.function(Function { launches, ..self.kernels[kernel].clone() })
    }

    /// A launch of the kernel with this schedule; `op` is its label in profiles.
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

    /// Adds a buffer.
    pub fn buffer(&mut self, element: Element, shape: Vec<Extent>, storage: Storage) -> BufferId {
        self.buffers.push(Buffer { element, shape, storage });
        self.buffers.len() - 1
    }

    /// The buffer with this key, which is added if no entry has asked for it before.
    pub fn bind(&mut self, key: &str, element: Element, shape: Vec<Extent>, storage: Storage) -> BufferId {
        if let Some(&buffer) = self.bound.get(key) {
            return buffer;
        }
        let buffer = self.buffer(element, shape, storage);
        self.bound.insert(key.to_string(), buffer);
        buffer
    }

    /// An index vector that the runtime derives from the batch's sequence lengths.
    pub fn derived_input(&mut self, input: Input) -> BufferId {
        let length = match input {
            Input::Offsets => Extent::Sequences + Extent::Const(1),
            Input::Pairs => Extent::Tokens + Extent::Const(1),
            _ => Extent::Tokens,
        };
        self.bind(input.name(), Element::I32, vec![length], Storage::Input(input.name().into()))
    }
}

/// The copy of a table that is packed into column panels.
pub struct PanelCopy {
    /// The buffer of the panels.
    pub buffer: BufferId,
    /// Columns of one panel.
    pub width: u64,
    /// The numbers of the table's rows and columns.
    pub shape: [Extent; 2],
}

/// A lowered program: its kernels, and the manifest by which the runtime launches them.
pub struct Lowered {
    /// The kernels, in the order of the manifest.
    pub functions: Vec<Function>,
    codes: HashMap<Schedule, Code>,
    /// The machine that the kernels are written for.
    pub machine: Machine,
    /// Buffers, launches, entries and kernel names, as the artifact stores them.
    pub manifest: Manifest,
    /// The operations that each launch computes, for [`Lowered::listing`].
    pub(super) listing: Listing,
}

impl Lowered {
    /// The kernels as the text of MLIR functions, in the order of the manifest.
    pub fn kernels(&self) -> Vec<String> {
        let named = self.functions.iter().zip(&self.manifest.kernels);
        named.map(|(function, name)| self.codes[&function.schedule].function(name, function.launches)).collect()
    }
}

/// Deduplicates the kernels of several programs for one machine. It renames them in the manifests, so that programs
/// call a shared kernel by the same name, and returns the text of each kernel once.
pub fn link<'a>(programs: impl IntoIterator<Item = &'a mut Lowered>) -> Vec<String> {
    let mut programs: Vec<&mut Lowered> = programs.into_iter().collect();
    assert!(programs.windows(2).all(|two| two[0].machine == two[1].machine), "programs of one machine");
    let mut functions: Vec<Function> = vec![];
    let mut seen = HashSet::new();
    for function in programs.iter().flat_map(|program| &program.functions) {
        if seen.insert(function) {
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
