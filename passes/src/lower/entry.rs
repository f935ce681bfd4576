//! One entry on its way from dispatches to launches: where its values lie, and each dispatch in its turn.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};

use peft_grammar::graph::{Graph, Node, Op, Role, Type, Value};
use peft_grammar::model::Precision;
use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Launch, Output, Storage};

use super::dispatch::{Dispatch, Facts, Work, gradient_of};
use super::groups::maps;
use super::merge;
use super::module::Module;
use super::sizes::{element, extents};
use super::view::View;
use crate::kernels::Schedule;
use crate::kernels::rowwise::Kind;

/// One entry on its way.
pub struct Lowering<'t, 'a, 'g> {
    pub module: &'t mut Module<'a>,
    pub facts: &'g Facts<'g>,
    pub graph: &'g Graph,
    pub launches: Vec<Launch>,
    /// Where each value lies. Members of a group have no place.
    pub places: Vec<Option<Place>>,
    /// Buffers of values that are written part by part, or in another order of axes, before their turn comes.
    pub wholes: HashMap<Value, BufferId>,
    /// Operands packed for the matmul in this entry, by buffer and layout.
    pub packs: HashMap<String, BufferId>,
    /// Values in half precision, for products with frozen weights, and from row to row there.
    pub rounded: HashMap<Value, (BufferId, Extent)>,
}

/// A dispatch on its way: what its launches are called in profiles, and by what expression it is known if it works on
/// frozen weights alone and is done once.
pub struct Turn<'l, 't, 'a, 'g> {
    pub lowering: &'l mut Lowering<'t, 'a, 'g>,
    pub label: String,
    pub frozen: Option<String>,
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
pub struct Place {
    pub buffer: BufferId,
    /// Made of frozen weights alone: by what expression.
    pub frozen: Option<String>,
    /// How it lies there, where that is not row-major from the first element on. Of nothing frozen.
    pub view: Option<View>,
}

impl<'t, 'a, 'g> Lowering<'t, 'a, 'g> {
    /// With the arguments in their places.
    pub fn new(module: &'t mut Module<'a>, facts: &'g Facts<'g>) -> Result<Self, String> {
        let graph = facts.graph;
        let mut places = vec![None; graph.values()];
        for arg in &graph.args {
            let ty = graph.ty(arg.value);
            let (storage, frozen) = match arg.role {
                Role::Input => (Storage::Input(arg.name.clone()), None),
                role => {
                    let index = module.tensors.iter().position(|t| t.name == arg.name);
                    let index = index.ok_or_else(|| format!("the manifest lacks `{}`", arg.name))?;
                    let frozen = (role == Role::Frozen).then(|| arg.label());
                    (Storage::Tensor { index, rows: arg.rows }, frozen)
                }
            };
            let buffer = module.bind(&arg.label(), element(ty), extents(ty), storage);
            places[arg.value.0 as usize] = Some(Place { buffer, frozen, view: None });
        }
        let (launches, wholes, packs, rounded) = (vec![], HashMap::new(), HashMap::new(), HashMap::new());
        Ok(Lowering { module, facts, graph, launches, places, wholes, packs, rounded })
    }

    pub fn dispatch(&mut self, Dispatch { root, work }: &Dispatch) -> Result<(), String> {
        let op = &self.graph.nodes[*root].op;
        self.turn(*root).work(*root, work).map_err(|e| format!("`peft.{}`: {e}", op.name()))
    }

    /// The entry, with its outputs where they are asked for.
    pub fn finish(mut self) -> Entry {
        let mut outputs = vec![];
        for (name, value) in &self.graph.outputs {
            let ty = self.graph.ty(*value).clone();
            let wanted = gradient_of(self.graph, self.module.tensors, name);
            let mut turn = Turn { lowering: &mut self, label: "copy".into(), frozen: None };
            if wanted.is_none() {
                turn.dense(*value);
            }
            let Place { mut buffer, view, .. } = turn.place(*value).clone();
            let storage = &turn.module.buffers[buffer].storage;
            let own = match &wanted {
                Some(gradient) => storage == gradient && view.is_none(),
                None => *storage == Storage::Temporary || *storage == Storage::Prepared,
            };
            if !own {
                // A gradient two tensors share, or an output that is an argument.
                let copy = turn.module.buffer(Element::F32, extents(&ty), wanted.unwrap_or(Storage::Temporary));
                let dense = View::dense(&ty.shape);
                turn.copy_view((buffer, view.as_ref().unwrap_or(&dense)), (copy, &dense));
                buffer = copy;
            }
            outputs.push(Output { name: name.clone(), buffer, shape: extents(&ty) });
        }
        let launches = match self.facts.fusion.side_by_side {
            false => self.launches,
            true => merge::gather(self.module, self.launches, &outputs),
        };
        Entry { launches, outputs }
    }

    pub fn place(&self, value: Value) -> &Place {
        self.places[value.0 as usize].as_ref().expect("computed before it is read")
    }

    pub fn ty(&self, value: Value) -> &'g Type {
        self.graph.ty(value)
    }

    /// The turn of node `at`.
    pub fn turn(&mut self, at: usize) -> Turn<'_, 't, 'a, 'g> {
        let node = &self.graph.nodes[at];
        let leaves = self.facts.leaves(at).into_iter();
        let parts = leaves.map(|v| self.places[v.0 as usize].as_ref()?.frozen.clone()).collect::<Option<Vec<_>>>();
        // What stays another's view is not made anew.
        let made = self.facts.frozen(node.results[0]) && !matches!(node.op, Op::Reshape { .. });
        let frozen = parts.filter(|_| made);
        let frozen = frozen.map(|parts| format!("{:?}({})", self.facts.groups.expression(at), parts.join(", ")));
        debug_assert_eq!(frozen.is_some(), made, "of what is frozen there is an expression");
        // What is joined goes by the first of its parts.
        Turn { lowering: self, label: node.op.joins()[0].name().into(), frozen }
    }
}

impl<'t, 'a, 'g> Turn<'_, 't, 'a, 'g> {
    /// The same under another label.
    pub fn labelled(&mut self, label: &str) -> Turn<'_, 't, 'a, 'g> {
        Turn { lowering: &mut *self.lowering, label: label.into(), frozen: self.frozen.clone() }
    }

    /// The packing of an operand: once, if it is frozen and known as `key`.
    pub fn packing(&mut self, key: Option<&str>) -> Turn<'_, 't, 'a, 'g> {
        Turn { lowering: &mut *self.lowering, label: "pack".into(), frozen: key.map(String::from) }
    }

    /// In what a product is computed: as the recipe asks of those with frozen weights, if rows of A lie along k.
    pub fn precision(&self, place_b: &Place, columns_a: bool) -> Precision {
        let asked = self.frozen.is_none() && place_b.frozen.is_some() && !columns_a;
        if asked { self.module.precision } else { Precision::F32 }
    }

    /// A buffer for a node's result.
    pub fn result(&mut self, value: Value) -> BufferId {
        let ty = self.graph.ty(value);
        let frozen = self.frozen.clone();
        let buffer = match (self.facts.claimed.get(&value), &frozen) {
            (Some(storage), _) => self.module.buffer(Element::F32, extents(ty), storage.clone()),
            (None, Some(key)) => self.module.bind(key, Element::F32, extents(ty), Storage::Prepared),
            (None, None) => self.module.buffer(Element::F32, extents(ty), Storage::Temporary),
        };
        self.places[value.0 as usize] = Some(Place { buffer, frozen, view: None });
        buffer
    }

    /// A buffer that only this operation's launches share.
    pub fn scratch(&mut self, shape: Vec<Extent>) -> BufferId {
        let storage = if self.frozen.is_some() { Storage::Prepared } else { Storage::Temporary };
        self.module.buffer(Element::F32, shape, storage)
    }

    pub fn launch(
        &mut self,
        schedule: impl Into<Schedule>,
        buffers: Vec<BufferId>,
        extents: Vec<Extent>,
        units: Extent,
    ) {
        let label = self.label.clone();
        let launch = self.module.launch(schedule, buffers, extents, units, &label);
        match self.frozen {
            Some(_) => self.module.prepare.push(launch),
            None => self.launches.push(launch),
        }
    }

    /// Does what the dispatch of node `at` says.
    pub fn work(mut self, at: usize, work: &Work) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let operands = &node.operands;
        if let Some(key) = &self.frozen
            && let Some(&buffer) = self.module.bound.get(key)
        {
            // Another entry has prepared it.
            let frozen = self.frozen.clone();
            self.places[node.result().0 as usize] = Some(Place { buffer, frozen, view: None });
            return Ok(());
        }
        match (&node.op, work) {
            (Op::Reshape { .. }, _) => self.reshape(operands[0], node.result()),
            (op, Work::Node) if maps(op) => self.map(at)?,
            (Op::Permute { axes }, _) => self.permute(operands[0], axes, node.result()),
            (Op::Slice { axis, start, .. }, _) => self.slice(operands[0], *axis, *start, node.result()),
            (Op::Concat { axis }, _) => self.concat(operands, *axis, node.result()),
            (Op::Matmul { .. }, Work::Led(taken)) => match self.facts.fusion.held_columns {
                None => self.product_on_cpu(taken)?,
                Some(_) => self.product_on_gpu(taken)?,
            },
            (Op::Normalize { eps } | Op::NormalizeVjp { eps }, Work::Led(taken)) => self.normalization(taken, *eps)?,
            (Op::Reduce { mean, .. }, Work::RowSums { of, taken }) => self.row_sums(*of, taken, *mean)?,
            (Op::Reduce { .. }, Work::Node) if self.sums_columns(at) => self.column_sums(at),
            (Op::Attention { .. } | Op::AttentionLse { .. } | Op::AttentionAndLse { .. }, _) => self.flash(node),
            (Op::AttentionVjp { .. } | Op::AttentionVjpSides { .. } | Op::AttentionVjpAll { .. }, _) => {
                self.flash(node)
            }
            (Op::LinearLse | Op::LinearMean | Op::LinearLseAndMean, _) => self.sweep(node),
            _ => {
                let buffers: Vec<BufferId> = operands.iter().map(|&v| self.dense(v)).collect();
                self.row_major(node, &buffers)?;
            }
        }
        Ok(())
    }

    /// Operations that read their operands row-major.
    pub fn row_major(&mut self, node: &Node, buffers: &[BufferId]) -> Result<(), String> {
        let ty = self.ty(node.operands[0]);
        let (x, y) = (buffers[0], *buffers.get(1).unwrap_or(&buffers[0]));
        match &node.op {
            Op::Pad { axis, start, .. } => self.pad(x, ty, *axis, *start, node.result()),
            Op::Reduce { axes, mean, .. } => self.reduce(x, ty, axes, *mean, node.result())?,
            Op::Scores { causal } => self.scores(x, y, ty, *causal, node.result()),
            Op::Attend { causal } => self.attend(x, y, *causal, false, node.result()),
            Op::AttendTransposed { causal } => self.attend(x, y, *causal, true, node.result()),
            Op::Softmax => self.row_kernel(Kind::Softmax, &[x], ty, node.result()),
            Op::LogSumExp => self.row_kernel(Kind::LogSumExp, &[x], ty, node.result()),
            Op::SoftmaxVjp => self.row_kernel(Kind::SoftmaxVjp, &[x, y], ty, node.result()),
            Op::Gather { start } => self.gather(x, ty, y, *start, node.result()),
            Op::Scatter { start, .. } => self.scatter(x, ty, y, *start, node.result()),
            Op::SegmentMean => self.segment_mean(x, node.result()),
            Op::SegmentMeanVjp => self.segment_mean_vjp(x, node.result()),
            Op::CrossEntropy { smoothing } => self.cross_entropy(x, ty, y, None, *smoothing, node.result()),
            Op::CrossEntropyVjp { smoothing } => {
                self.cross_entropy(x, ty, y, Some(buffers[2]), *smoothing, node.result())
            }
            // In other forms than row-major, or in a group.
            Op::Reshape { .. }
            | Op::Permute { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Matmul { .. }
            | Op::Attention { .. }
            | Op::AttentionLse { .. }
            | Op::AttentionVjp { .. }
            | Op::AttentionAndLse { .. }
            | Op::AttentionVjpSides { .. }
            | Op::AttentionVjpAll { .. }
            | Op::LinearLse
            | Op::LinearMean
            | Op::LinearLseAndMean
            | Op::Normalize { .. }
            | Op::NormalizeVjp { .. }
            | Op::Constant { .. }
            | Op::Iota { .. }
            | Op::Add
            | Op::Sub
            | Op::Mul
            | Op::Div
            | Op::Min
            | Op::Scale { .. }
            | Op::Shift { .. }
            | Op::Float
            | Op::Exp
            | Op::Log
            | Op::Sqrt
            | Op::Rsqrt
            | Op::Sin
            | Op::Cos
            | Op::Tanh
            | Op::Sigmoid
            | Op::Relu
            | Op::Step
            | Op::Gelu
            | Op::GeluGrad
            | Op::GeluTanh
            | Op::GeluTanhGrad
            | Op::Broadcast { .. }
            | Op::Dropout { .. }
            // Settled with the gradients.
            | Op::Detach => return Err("nothing computes it row by row".into()),
        }
        Ok(())
    }
}
