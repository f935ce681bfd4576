//! The lowering of one entry: turns its dispatches into launches, in order, and tracks where each value is stored.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use peft_grammar::graph::{Graph, Node, Op, Role, Type, Value};
use peft_grammar::model::Precision;
use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Output, Storage};

use super::computed::{Computed, Emitted};
use super::dispatch::{Analysis, Dispatch, Work, gradient_of};
use super::horizontal_fusion;
use super::module::Module;
use super::sizes::{element, extents};
use super::view::View;
use crate::kernels::Schedule;
use crate::kernels::rowwise::RowOp;

/// The lowering state of one entry.
pub struct Lowering<'t, 'a, 'g> {
    /// The module that all entries share.
    pub module: &'t mut Module<'a>,
    pub analysis: &'g Analysis<'g>,
    pub graph: &'g Graph,
    pub launches: Vec<Emitted>,
    /// The operations of the dispatch at hand.
    computed: Rc<[Computed]>,
    /// By value: where it is stored. Values inside a group are not stored.
    pub buffer_views: Vec<Option<BufferView>>,
    /// Buffers that were allocated before the node of their value, because earlier kernels write parts of it, or write
    /// it with permuted axes.
    pub preallocated: HashMap<Value, BufferId>,
    /// Operands that this entry has packed for a gemm, by a key of buffer and layout.
    pub packed_operands: HashMap<String, BufferId>,
    /// Half-precision copies of values, for gemms with frozen weights: the buffer, and its row stride in words.
    pub half_precision_copies: HashMap<Value, (BufferId, Extent)>,
}

/// The lowering of one dispatch: the label of its launches in profiles, and, if it depends on frozen weights alone and
/// is computed once, the expression that is its key.
pub struct DispatchLowering<'l, 't, 'a, 'g> {
    pub lowering: &'l mut Lowering<'t, 'a, 'g>,
    pub label: String,
    /// The label, if the launches do not compute the dispatch's operations, but copy, pack, round or sum for them.
    helper: Option<&'static str>,
    pub frozen: Option<String>,
}

impl<'t, 'a, 'g> Deref for DispatchLowering<'_, 't, 'a, 'g> {
    type Target = Lowering<'t, 'a, 'g>;
    fn deref(&self) -> &Self::Target {
        self.lowering
    }
}

impl DerefMut for DispatchLowering<'_, '_, '_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.lowering
    }
}

/// Where a value is stored.
#[derive(Clone, Debug)]
pub struct BufferView {
    pub buffer: BufferId,
    /// The expression that is the value's key, if it depends on frozen weights alone.
    pub frozen: Option<String>,
    /// The value's strides and offset in the buffer; `None` if it is row-major from the first element on, as every
    /// frozen value is.
    pub view: Option<View>,
}

impl<'t, 'a, 'g> Lowering<'t, 'a, 'g> {
    /// The state before the first dispatch: the arguments are stored, and nothing else.
    pub fn new(module: &'t mut Module<'a>, analysis: &'g Analysis<'g>) -> Result<Self, String> {
        let graph = analysis.graph;
        let mut buffer_views = vec![None; graph.value_count()];
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
            buffer_views[arg.value.0 as usize] = Some(BufferView { buffer, frozen, view: None });
        }
        let (launches, computed) = (vec![], Rc::default());
        let (preallocated, packed_operands) = (HashMap::new(), HashMap::new());
        let half_precision_copies = HashMap::new();
        Ok(Lowering {
            module,
            analysis,
            graph,
            launches,
            computed,
            buffer_views,
            preallocated,
            packed_operands,
            half_precision_copies,
        })
    }

    /// Emits the launches of one dispatch.
    pub fn lower_dispatch(&mut self, dispatch: &Dispatch) -> Result<(), String> {
        let Dispatch { root, work } = dispatch;
        let nodes = dispatch.nodes(&self.analysis.groups).into_iter().map(|at| &self.graph.nodes[at]);
        self.computed = nodes.map(|n| Computed { op: n.op.name(), location: n.location.clone() }).collect();
        let op = &self.graph.nodes[*root].op;
        self.start(*root).lower(*root, work).map_err(|e| format!("`peft.{}`: {e}", op.name()))
    }

    /// Finishes the entry: copies outputs that need it into buffers of their own, and merges launches. Returns with it,
    /// by launch, the operations that it computes.
    pub fn finish(mut self) -> (Entry, Vec<Vec<Rc<[Computed]>>>) {
        self.computed = Rc::default();
        let mut outputs = vec![];
        for (name, value) in &self.graph.outputs {
            let ty = self.graph.ty(*value).clone();
            let gradient = gradient_of(self.graph, self.module.tensors, name);
            let mut dispatch = self.helper_launches("copy", None);
            if gradient.is_none() {
                dispatch.materialize(*value);
            }
            let BufferView { mut buffer, view, .. } = dispatch.buffer_view(*value).clone();
            let storage = &dispatch.module.buffers[buffer].storage;
            let in_place = match &gradient {
                Some(gradient) => storage == gradient && view.is_none(),
                None => *storage == Storage::Temporary || *storage == Storage::Prepared,
            };
            if !in_place {
                // Two tensors share this gradient, or the output is an argument.
                let copy = dispatch.module.buffer(Element::F32, extents(&ty), gradient.unwrap_or(Storage::Temporary));
                let dense = View::dense(&ty.shape);
                dispatch.copy_view((buffer, view.as_ref().unwrap_or(&dense)), (copy, &dense));
                buffer = copy;
            }
            outputs.push(Output { name: name.clone(), buffer, shape: extents(&ty) });
        }
        let launches = match self.analysis.fusion.horizontal {
            false => self.launches,
            true => horizontal_fusion::merge_launches(self.module, self.launches, &outputs),
        };
        let (launches, computed) = launches.into_iter().map(|emitted| (emitted.launch, emitted.computed)).unzip();
        (Entry { launches, outputs }, computed)
    }

    /// Where `value` is stored.
    pub fn buffer_view(&self, value: Value) -> &BufferView {
        self.buffer_views[value.0 as usize].as_ref().expect("computed before it is read")
    }

    /// The type of `value`.
    pub fn ty(&self, value: Value) -> &'g Type {
        self.graph.ty(value)
    }

    /// Launches with this label that do not compute the operations of the dispatch at hand, but serve it.
    fn helper_launches(&mut self, label: &'static str, frozen: Option<String>) -> DispatchLowering<'_, 't, 'a, 'g> {
        DispatchLowering { lowering: self, label: label.into(), helper: Some(label), frozen }
    }

    /// Starts the dispatch whose root is node `at`.
    pub fn start(&mut self, at: usize) -> DispatchLowering<'_, 't, 'a, 'g> {
        let node = &self.graph.nodes[at];
        let leaves = self.analysis.leaves(at).into_iter();
        let parts =
            leaves.map(|v| self.buffer_views[v.0 as usize].as_ref()?.frozen.clone()).collect::<Option<Vec<_>>>();
        // A reshape stays a view of its operand and computes nothing.
        let computed = self.analysis.frozen(node.results[0]) && !matches!(node.op, Op::Reshape { .. });
        let frozen = parts.filter(|_| computed);
        let frozen = frozen.map(|parts| format!("{:?}({})", self.analysis.groups.signature(at), parts.join(", ")));
        debug_assert_eq!(frozen.is_some(), computed, "every frozen value has a key");
        // A node of several results is labelled by its first component.
        DispatchLowering { lowering: self, label: node.op.components()[0].name().into(), helper: None, frozen }
    }
}

impl<'t, 'a, 'g> DispatchLowering<'_, 't, 'a, 'g> {
    /// A helper launch of the same dispatch, such as a copy, with a label of its own.
    pub fn helper(&mut self, label: &'static str) -> DispatchLowering<'_, 't, 'a, 'g> {
        let frozen = self.frozen.clone();
        self.lowering.helper_launches(label, frozen)
    }

    /// The packing of an operand as part of this dispatch. With a `key` the operand is frozen, and is packed once.
    pub fn for_packing(&mut self, key: Option<&str>) -> DispatchLowering<'_, 't, 'a, 'g> {
        self.lowering.helper_launches("pack", key.map(String::from))
    }

    /// The precision of a gemm: that of the recipe if B is frozen and A is read along k (`a_column_major` is false),
    /// else f32.
    pub fn gemm_precision(&self, place_b: &BufferView, a_column_major: bool) -> Precision {
        let reduced = self.frozen.is_none() && place_b.frozen.is_some() && !a_column_major;
        if reduced { self.module.precision } else { Precision::F32 }
    }

    /// Allocates a row-major buffer for `value`, or returns the fixed storage that it has.
    pub fn allocate_result(&mut self, value: Value) -> BufferId {
        let ty = self.graph.ty(value);
        let frozen = self.frozen.clone();
        let buffer = match (self.analysis.fixed_storage.get(&value), &frozen) {
            (Some(storage), _) => self.module.buffer(Element::F32, extents(ty), storage.clone()),
            (None, Some(key)) => self.module.bind(key, Element::F32, extents(ty), Storage::Prepared),
            (None, None) => self.module.buffer(Element::F32, extents(ty), Storage::Temporary),
        };
        self.buffer_views[value.0 as usize] = Some(BufferView { buffer, frozen, view: None });
        buffer
    }

    /// A scratch buffer that only the launches of this dispatch use.
    pub fn scratch(&mut self, shape: Vec<Extent>) -> BufferId {
        let storage = if self.frozen.is_some() { Storage::Prepared } else { Storage::Temporary };
        self.module.buffer(Element::F32, shape, storage)
    }

    /// Adds a launch, to the preparation if this dispatch depends on frozen weights alone, else to the entry.
    pub fn launch(
        &mut self,
        schedule: impl Into<Schedule>,
        buffers: Vec<BufferId>,
        extents: Vec<Extent>,
        units: Extent,
    ) {
        let label = self.label.clone();
        let mut computed = self.computed.clone();
        if let Some(op) = self.helper {
            let location = computed.first().map(|first| first.location.unnamed()).unwrap_or_default();
            computed = Rc::from([Computed { op, location }]);
        }
        let launch = self.module.launch(schedule, buffers, extents, units, &label);
        match self.frozen {
            Some(_) => {
                self.module.prepare.push(launch);
                self.module.prepare_computed.push(vec![computed]);
            }
            None => self.launches.push(Emitted { launch, computed: vec![computed] }),
        }
    }

    /// Emits the launches of the dispatch whose root is node `at`.
    pub fn lower(mut self, at: usize, work: &Work) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let operands = &node.operands;
        if let Some(key) = &self.frozen
            && let Some(&buffer) = self.module.bound.get(key)
        {
            // Another entry already prepares this value.
            let frozen = self.frozen.clone();
            self.buffer_views[node.result().0 as usize] = Some(BufferView { buffer, frozen, view: None });
            return Ok(());
        }
        match (&node.op, work) {
            (Op::Reshape { .. }, _) => self.reshape(operands[0], node.result()),
            (op, Work::Node) if op.is_elementwise() => self.elementwise(at)?,
            (Op::Permute { axes }, _) => self.permute(operands[0], axes, node.result()),
            (Op::Slice { axis, start, .. }, _) => self.slice(operands[0], *axis, *start, node.result()),
            (Op::Concat { axis }, _) => self.concat(operands, *axis, node.result()),
            (Op::Matmul { .. }, Work::WithEpilogue(fused)) => match self.analysis.fusion.register_epilogue_columns {
                None => self.cpu_gemm(fused)?,
                Some(_) => self.gpu_gemm(fused)?,
            },
            (Op::Normalize { eps } | Op::NormalizeVjp { eps }, Work::WithEpilogue(fused)) => {
                self.normalization(fused, *eps)?
            }
            (Op::Reduce { mean, .. }, Work::RowSums { prologue, fused }) => self.row_sums(*prologue, fused, *mean)?,
            (Op::Reduce { .. }, Work::Node) if self.is_strided_column_sum(at) => self.column_sums(at),
            (Op::Attention { .. } | Op::AttentionLse { .. } | Op::AttentionAndLse { .. }, _) => {
                self.fused_attention(node)
            }
            (Op::AttentionVjp { .. } | Op::AttentionVjpSides { .. } | Op::AttentionVjpAll { .. }, _) => {
                self.fused_attention(node)
            }
            (Op::LinearLse | Op::LinearMean | Op::LinearLseAndMean, _) => self.chunked_logits(node),
            _ => {
                let buffers: Vec<BufferId> = operands.iter().map(|&v| self.materialize(v)).collect();
                self.lower_row_major(node, &buffers)?;
            }
        }
        Ok(())
    }

    /// Emits an operation whose kernel reads its operands from the row-major `buffers`.
    pub fn lower_row_major(&mut self, node: &Node, buffers: &[BufferId]) -> Result<(), String> {
        let ty = self.ty(node.operands[0]);
        let (x, y) = (buffers[0], *buffers.get(1).unwrap_or(&buffers[0]));
        match &node.op {
            Op::Pad { axis, start, .. } => self.pad(x, ty, *axis, *start, node.result()),
            Op::Reduce { axes, mean, .. } => self.reduce(x, ty, axes, *mean, node.result())?,
            Op::Scores { causal } => self.scores(x, y, ty, *causal, node.result()),
            Op::Attend { causal } => self.attend(x, y, *causal, false, node.result()),
            Op::AttendTransposed { causal } => self.attend(x, y, *causal, true, node.result()),
            Op::Softmax => self.row_kernel(RowOp::Softmax, &[x], ty, node.result()),
            Op::LogSumExp => self.row_kernel(RowOp::LogSumExp, &[x], ty, node.result()),
            Op::SoftmaxVjp => self.row_kernel(RowOp::SoftmaxVjp, &[x, y], ty, node.result()),
            Op::Gather { start } => self.gather(x, ty, y, *start, node.result()),
            Op::Scatter { start, .. } => self.scatter(x, ty, y, *start, node.result()),
            Op::SegmentMean => self.segment_mean(x, node.result()),
            Op::SegmentMeanVjp => self.segment_mean_vjp(x, node.result()),
            Op::CrossEntropy { smoothing } => self.cross_entropy(x, ty, y, None, *smoothing, node.result()),
            Op::CrossEntropyVjp { smoothing } => {
                self.cross_entropy(x, ty, y, Some(buffers[2]), *smoothing, node.result())
            }
            // `lower` handles these before, as they read strided operands or belong to a group.
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
            // Differentiation has removed `detach`.
            | Op::Detach => return Err("the lowering has no row-major kernel for it".into()),
        }
        Ok(())
    }
}
