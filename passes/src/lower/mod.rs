//! Lowering to a processor or a GPU: every operation becomes a launch of a kernel over flat buffers.
//!
//! ```text
//! graph ─► launches + kernels in scf / vector / memref (this module) ─► LLVM ─► object (crate::codegen)
//! ```
//!
//! A kernel is named by what it does, never by where it stands: twelve layers share one softmax, and
//! sizes that differ only in number are arguments. Work on frozen weights alone (their packing for the
//! matmul above all) goes into [`Manifest::prepare`] and is done once.

mod attention;
mod beside;
mod copy;
pub mod cost;
mod dispatch;
mod epilogue;
mod flash;
mod gemm;
mod groups;
mod halves;
mod head;
mod map;
mod narrow;
mod optimizer;
mod problem;
mod reduce;
mod rows;
mod schedule;
mod span;
mod tables;
mod tiles;
mod view;

use dispatch::{Dispatch, Facts, Work, dispatch, put_off};
use groups::maps;
use tables::Panels;
use view::View;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::{Deref, DerefMut};

use peft_grammar::graph::{DType, Dim, Graph, Node, Op, Role, Type, Value};
use peft_grammar::model::{Optimizer, Precision};
use peft_runtime::artifact::{Buffer, BufferId, Element, Entry, Extent, Launch, Manifest, Output, Storage, Tensor};

use crate::builder::Code;
use crate::fuse::Limits;
use crate::kernels::rowwise::Kind;
use crate::kernels::{Function, Schedule, names};
use crate::target::Machine;
use crate::target::cpu::Cpu;

/// Kernels, and how the entries run them.
pub struct Lowered {
    /// In the manifest's order.
    pub functions: Vec<Function>,
    codes: HashMap<Schedule, Code>,
    /// What they are written for.
    pub machine: Machine,
    pub manifest: Manifest,
}

/// What kernels are made for, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub machine: Machine,
    /// Of products with frozen weights.
    pub precision: Precision,
    pub optimizer: Optimizer,
    /// Products take along what follows them element by element.
    pub epilogues: bool,
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            machine: Machine::default(),
            precision: Precision::F32,
            optimizer: Optimizer::default(),
            epilogues: true,
            limits: Limits::default(),
        }
    }
}

/// Lowers `entries` together, so that they share kernels and prepared weights; the optimizer's step
/// joins them as `update` if anything trains, sums of gradients as `accumulate` and `accumulated`, and the average of the
/// values as `average`. `tensors` are the model's, by name.
pub fn lower(entries: &[(&str, &Graph)], tensors: &[Tensor], options: Options) -> Result<Lowered, String> {
    let Options { machine, precision, optimizer, limits, .. } = options;
    let mut target = Target {
        tensors,
        machine,
        precision,
        optimizer,
        limits,
        kernels: vec![],
        codes: HashMap::new(),
        buffers: vec![],
        bound: HashMap::new(),
        panels: BTreeMap::new(),
        prepare: vec![],
    };
    let mut lowered: BTreeMap<String, Entry> = BTreeMap::new();
    for (name, graph) in entries {
        let put_off = machine.fusion().puts_off.then(|| put_off(graph));
        let facts = Facts::of(put_off.as_ref().unwrap_or(graph), tensors, options);
        lowered.insert(name.to_string(), Lowering::new(&mut target, &facts).run(&dispatch(&facts))?);
    }
    if tensors.iter().any(|t| t.trainable.is_some()) {
        let own_rates = tensors.iter().any(|t| t.lr_factor.is_some());
        lowered.insert("update".into(), optimizer::update(&mut target, own_rates));
        let sums = optimizer::accumulation(&mut target);
        lowered.extend(sums.map(|(name, entry)| (name.to_string(), entry)));
        lowered.insert("average".into(), optimizer::average(&mut target));
    }
    target.gather_from_panels(&mut lowered);
    let entries = lowered.values_mut().flat_map(|entry| &mut entry.launches);
    let mut launches: Vec<&mut Launch> = entries.chain(&mut target.prepare).collect();
    // What is only launched side by side is written for that alone.
    let launched: BTreeSet<usize> = launches.iter().map(|launch| launch.kernel).collect();
    launches.iter_mut().for_each(|launch| launch.kernel = launched.range(..launch.kernel).count());
    let functions: Vec<Function> = launched.iter().map(|&kernel| target.kernels[kernel].clone()).collect();
    let manifest = Manifest {
        arch: machine.arch().into(),
        features: machine.features().iter().map(|f| f.to_string()).collect(),
        kernels: names(&functions),
        tensors: tensors.to_vec(),
        buffers: target.buffers,
        prepare: target.prepare,
        entries: lowered,
        ..Manifest::default()
    };
    Ok(Lowered { functions, codes: target.codes, machine, manifest })
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

/// What all entries share.
struct Target<'a> {
    tensors: &'a [Tensor],
    machine: Machine,
    precision: Precision,
    optimizer: Optimizer,
    limits: Limits,
    kernels: Vec<Function>,
    codes: HashMap<Schedule, Code>,
    buffers: Vec<Buffer>,
    /// Buffers that exist once whoever asks: inputs, tensors, what is prepared from them.
    bound: HashMap<String, BufferId>,
    /// By the frozen table that is there in panels as well.
    panels: BTreeMap<BufferId, Panels>,
    prepare: Vec<Launch>,
}

impl Target<'_> {
    /// Of products, which are written anew for every other machine.
    fn cpu(&self) -> Cpu {
        match self.machine {
            Machine::Cpu(cpu) => cpu,
            Machine::Cuda(_) => unreachable!("asked of kernels for processors alone"),
        }
    }

    /// The one kernel that is this.
    fn function(&mut self, function: Function) -> usize {
        let known = self.kernels.iter().position(|known| *known == function);
        known.unwrap_or_else(|| {
            let machine = self.machine;
            self.codes.entry(function.schedule.clone()).or_insert_with_key(|schedule| schedule.emit(machine));
            self.kernels.push(function);
            self.kernels.len() - 1
        })
    }

    /// What a launch's kernel does.
    fn schedule(&self, launch: &Launch) -> &Schedule {
        &self.kernels[launch.kernel].schedule
    }

    /// That which does the work of so many launches of `kernel`.
    fn side_by_side(&mut self, kernel: usize, launches: usize) -> usize {
        self.function(Function { launches, ..self.kernels[kernel].clone() })
    }

    /// A launch of the kernel that is `schedule`.
    fn launch(
        &mut self,
        schedule: impl Into<Schedule>,
        buffers: Vec<BufferId>,
        extents: Vec<Extent>,
        units: Extent,
        op: &str,
    ) -> Launch {
        Launch { kernel: self.function(Function::of(schedule)), buffers, extents, units, op: op.into() }
    }

    fn buffer(&mut self, element: Element, shape: Vec<Extent>, storage: Storage) -> BufferId {
        self.buffers.push(Buffer { element, shape, storage });
        self.buffers.len() - 1
    }

    /// The one buffer known as `key`.
    fn bind(&mut self, key: &str, element: Element, shape: Vec<Extent>, storage: Storage) -> BufferId {
        if let Some(&buffer) = self.bound.get(key) {
            return buffer;
        }
        let buffer = self.buffer(element, shape, storage);
        self.bound.insert(key.to_string(), buffer);
        buffer
    }

    /// One of the index vectors the runtime derives from the sequence lengths.
    fn derived(&mut self, name: &str) -> BufferId {
        let length = match name {
            "offsets" => Extent::Sequences + Extent::Const(1),
            "pairs" => Extent::Tokens + Extent::Const(1),
            _ => Extent::Tokens,
        };
        self.bind(name, Element::I32, vec![length], Storage::Input(name.into()))
    }
}

/// One entry on its way.
struct Lowering<'t, 'a, 'g> {
    target: &'t mut Target<'a>,
    facts: &'g Facts<'g>,
    graph: &'g Graph,
    launches: Vec<Launch>,
    /// Where each value lies. Members of a group have no place.
    places: Vec<Option<Place>>,
    /// Buffers of values that are written part by part, or in another order of axes, before their turn comes.
    wholes: HashMap<Value, BufferId>,
    /// Operands packed for the matmul in this entry, by buffer and layout.
    packs: HashMap<String, BufferId>,
    /// Values in half precision, for products with frozen weights, and from row to row there.
    rounded: HashMap<Value, (BufferId, Extent)>,
}

/// A dispatch on its way: what its launches are called in profiles, and by what expression it is known if it works on
/// frozen weights alone and is done once.
struct Turn<'l, 't, 'a, 'g> {
    lowering: &'l mut Lowering<'t, 'a, 'g>,
    label: String,
    frozen: Option<String>,
}

impl<'t, 'a, 'g> Deref for Turn<'_, 't, 'a, 'g> {
    type Target = Lowering<'t, 'a, 'g>;
    fn deref(&self) -> &Self::Target {
        self.lowering
    }
}

impl DerefMut for Turn<'_, '_, '_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.lowering
    }
}

#[derive(Clone, Debug)]
struct Place {
    buffer: BufferId,
    /// Made of frozen weights alone: by what expression.
    frozen: Option<String>,
    /// How it lies there, where that is not row-major from the first element on. Of nothing frozen.
    view: Option<View>,
}

/// The storage output `name` has if it is the gradient of a tensor.
fn gradient_of(graph: &Graph, tensors: &[Tensor], name: &str) -> Option<Storage> {
    let label = name.strip_prefix("grad.")?;
    let arg = graph.args.iter().find(|a| a.role == Role::Trainable && a.label() == label)?;
    let index = tensors.iter().position(|t| t.name == arg.name)?;
    Some(Storage::Gradient { index })
}

impl<'t, 'a, 'g> Lowering<'t, 'a, 'g> {
    fn new(target: &'t mut Target<'a>, facts: &'g Facts<'g>) -> Self {
        let graph = facts.graph;
        Lowering {
            target,
            facts,
            graph,
            launches: vec![],
            places: vec![None; graph.values()],
            wholes: HashMap::new(),
            packs: HashMap::new(),
            rounded: HashMap::new(),
        }
    }

    fn run(mut self, dispatches: &[Dispatch]) -> Result<Entry, String> {
        for arg in &self.graph.args {
            let ty = self.graph.ty(arg.value).clone();
            let (storage, frozen) = match arg.role {
                Role::Input => (Storage::Input(arg.name.clone()), None),
                role => {
                    let index = self.target.tensors.iter().position(|t| t.name == arg.name);
                    let index = index.ok_or_else(|| format!("the manifest lacks `{}`", arg.name))?;
                    let frozen = (role == Role::Frozen).then(|| arg.label());
                    (Storage::Tensor { index, rows: arg.rows }, frozen)
                }
            };
            let buffer = self.target.bind(&arg.label(), element(&ty), extents(&ty), storage);
            self.places[arg.value.0 as usize] = Some(Place { buffer, frozen, view: None });
        }
        for dispatch in dispatches {
            let op = &self.graph.nodes[dispatch.root].op;
            self.turn(dispatch.root)
                .work(dispatch.root, &dispatch.work)
                .map_err(|e| format!("`peft.{}`: {e}", op.name()))?;
        }
        let mut outputs = vec![];
        for (name, value) in &self.graph.outputs {
            let ty = self.graph.ty(*value).clone();
            let wanted = gradient_of(self.graph, self.target.tensors, name);
            let mut turn = Turn { lowering: &mut self, label: "copy".into(), frozen: None };
            if wanted.is_none() {
                turn.dense(*value);
            }
            let Place { mut buffer, view, .. } = turn.place(*value).clone();
            let storage = &turn.target.buffers[buffer].storage;
            let own = match &wanted {
                Some(gradient) => storage == gradient && view.is_none(),
                None => *storage == Storage::Temporary || *storage == Storage::Prepared,
            };
            if !own {
                // A gradient two tensors share, or an output that is an argument.
                let copy = turn.target.buffer(Element::F32, extents(&ty), wanted.unwrap_or(Storage::Temporary));
                let dense = View::dense(&ty.shape);
                turn.copy_view((buffer, view.as_ref().unwrap_or(&dense)), (copy, &dense));
                buffer = copy;
            }
            outputs.push(Output { name: name.clone(), buffer, shape: extents(&ty) });
        }
        let launches = match self.facts.fusion.side_by_side {
            false => self.launches,
            true => beside::gather(self.target, self.launches, &outputs),
        };
        Ok(Entry { launches, outputs })
    }

    fn place(&self, value: Value) -> &Place {
        self.places[value.0 as usize].as_ref().expect("computed before it is read")
    }

    fn ty(&self, value: Value) -> &'g Type {
        self.graph.ty(value)
    }

    /// The turn of node `at`.
    fn turn(&mut self, at: usize) -> Turn<'_, 't, 'a, 'g> {
        let node = &self.graph.nodes[at];
        let leaves = self.facts.leaves(at).into_iter();
        let parts = leaves.map(|v| self.places[v.0 as usize].as_ref()?.frozen.clone()).collect::<Option<Vec<_>>>();
        // What stays another's view is not made anew.
        let made = self.facts.frozen(node.result) && !matches!(node.op, Op::Reshape { .. });
        let frozen = parts.filter(|_| made);
        let frozen = frozen.map(|parts| format!("{:?}({})", self.facts.groups.expression(at), parts.join(", ")));
        debug_assert_eq!(frozen.is_some(), made, "of what is frozen there is an expression");
        Turn { lowering: self, label: node.op.name().into(), frozen }
    }
}

impl<'t, 'a, 'g> Turn<'_, 't, 'a, 'g> {
    /// The same under another label.
    fn labelled(&mut self, label: &str) -> Turn<'_, 't, 'a, 'g> {
        Turn { lowering: &mut *self.lowering, label: label.into(), frozen: self.frozen.clone() }
    }

    /// The packing of an operand: once, if it is frozen and known as `key`.
    fn packing(&mut self, key: Option<&str>) -> Turn<'_, 't, 'a, 'g> {
        Turn { lowering: &mut *self.lowering, label: "pack".into(), frozen: key.map(String::from) }
    }

    /// A buffer for a node's result.
    fn result(&mut self, value: Value) -> BufferId {
        let ty = self.graph.ty(value);
        let frozen = self.frozen.clone();
        let buffer = match (self.facts.claimed.get(&value), &frozen) {
            (Some(storage), _) => self.target.buffer(Element::F32, extents(ty), storage.clone()),
            (None, Some(key)) => self.target.bind(key, Element::F32, extents(ty), Storage::Prepared),
            (None, None) => self.target.buffer(Element::F32, extents(ty), Storage::Temporary),
        };
        self.places[value.0 as usize] = Some(Place { buffer, frozen, view: None });
        buffer
    }

    /// A buffer that only this operation's launches share.
    fn scratch(&mut self, shape: Vec<Extent>) -> BufferId {
        let storage = if self.frozen.is_some() { Storage::Prepared } else { Storage::Temporary };
        self.target.buffer(Element::F32, shape, storage)
    }

    fn launch(&mut self, schedule: impl Into<Schedule>, buffers: Vec<BufferId>, extents: Vec<Extent>, units: Extent) {
        let label = self.label.clone();
        let launch = self.target.launch(schedule, buffers, extents, units, &label);
        match self.frozen {
            Some(_) => self.target.prepare.push(launch),
            None => self.launches.push(launch),
        }
    }

    /// Does what the dispatch of node `at` says.
    fn work(mut self, at: usize, work: &Work) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let operands = &node.operands;
        if let Some(key) = &self.frozen
            && let Some(&buffer) = self.target.bound.get(key)
        {
            // Another entry has prepared it.
            let frozen = self.frozen.clone();
            self.places[node.result.0 as usize] = Some(Place { buffer, frozen, view: None });
            return Ok(());
        }
        match (&node.op, work) {
            (Op::Reshape { .. }, _) => self.reshape(operands[0], node.result),
            (op, Work::Node) if maps(op) => self.map(at)?,
            (Op::Permute { axes }, _) => self.permute(operands[0], axes, node.result),
            (Op::Slice { axis, start, .. }, _) => self.slice(operands[0], *axis, *start, node.result),
            (Op::Concat { axis }, _) => self.concat(operands, *axis, node.result),
            (Op::Matmul { .. }, Work::Led(taken)) => match self.facts.fusion.held_columns {
                None => self.matmul(taken)?,
                Some(_) => self.tiled(taken)?,
            },
            (Op::Normalize { eps } | Op::NormalizeVjp { eps }, Work::Led(taken)) => self.normalization(taken, *eps)?,
            (Op::Reduce { mean, .. }, Work::RowSums { of, taken }) => self.row_sums(*of, taken, *mean)?,
            (Op::Reduce { .. }, Work::Node) if self.sums_columns(at) => self.column_sums(at),
            (op, Work::Attention { part, results }) => self.flash((*part, results), operands, op),
            (_, Work::Sweep { lse, mean }) => self.sweep(node, *lse, *mean),
            _ => {
                let buffers: Vec<BufferId> = operands.iter().map(|&v| self.dense(v)).collect();
                self.row_major(node, &buffers)?;
            }
        }
        Ok(())
    }

    /// Operations that read their operands row-major.
    fn row_major(&mut self, node: &Node, buffers: &[BufferId]) -> Result<(), String> {
        let ty = self.ty(node.operands[0]);
        let (x, y) = (buffers[0], *buffers.get(1).unwrap_or(&buffers[0]));
        match &node.op {
            Op::Pad { axis, start, .. } => self.pad(x, ty, *axis, *start, node.result),
            Op::Reduce { axes, mean, .. } => self.reduce(x, ty, axes, *mean, node.result)?,
            Op::Scores { causal } => self.scores(x, y, ty, *causal, node.result),
            Op::Attend { causal } => self.attend(x, y, *causal, false, node.result),
            Op::AttendTransposed { causal } => self.attend(x, y, *causal, true, node.result),
            Op::Softmax => self.row_kernel(Kind::Softmax, &[x], ty, node.result),
            Op::LogSumExp => self.row_kernel(Kind::LogSumExp, &[x], ty, node.result),
            Op::SoftmaxVjp => self.row_kernel(Kind::SoftmaxVjp, &[x, y], ty, node.result),
            Op::Gather { start } => self.gather(x, ty, y, *start, node.result),
            Op::Scatter { start, .. } => self.scatter(x, ty, y, *start, node.result),
            Op::SegmentMean => self.segment_mean(x, node.result),
            Op::SegmentMeanVjp => self.segment_mean_vjp(x, node.result),
            Op::CrossEntropy { smoothing } => self.cross_entropy(x, ty, y, None, *smoothing, node.result),
            Op::CrossEntropyVjp { smoothing } => {
                self.cross_entropy(x, ty, y, Some(buffers[2]), *smoothing, node.result)
            }
            _ => unreachable!("the others map elements"),
        }
        Ok(())
    }
}

fn element(ty: &Type) -> Element {
    match ty.dtype {
        DType::F32 => Element::F32,
        DType::I32 => Element::I32,
    }
}

// Shapes as extents.

pub(crate) fn dim_extent(dim: Dim) -> Extent {
    match dim {
        Dim::Const(n) => Extent::Const(n),
        Dim::Tokens => Extent::Tokens,
        Dim::Sequences => Extent::Sequences,
        Dim::Targets => Extent::Targets,
        Dim::Values => Extent::Values,
        // With the tokens before it.
        Dim::Keys(extra) => lead_size(extra),
    }
}

fn product(dims: &[Dim]) -> Extent {
    dims.iter().fold(Extent::Const(1), |product, &d| product * dim_extent(d))
}

/// All elements of a type.
fn extent(ty: &Type) -> Extent {
    extents(ty).into_iter().fold(Extent::Const(1), |product, e| product * e)
}

/// Axis by axis; a ragged tail `tokens,keys+c` counts as one axis.
fn extents(ty: &Type) -> Vec<Extent> {
    match ty.shape.last() {
        Some(Dim::Keys(extra)) => {
            let lead = &ty.shape[..ty.shape.len() - 2];
            lead.iter().map(|&d| dim_extent(d)).chain([lead_size(*extra)]).collect()
        }
        _ => ty.shape.iter().map(|&d| dim_extent(d)).collect(),
    }
}

/// Elements of one `[tokens, keys+extra]`.
fn lead_size(extra: u64) -> Extent {
    match extra {
        0 => Extent::Pairs,
        _ => Extent::Pairs + Extent::Const(extra) * Extent::Tokens,
    }
}

#[cfg(test)]
pub(crate) mod tests;
