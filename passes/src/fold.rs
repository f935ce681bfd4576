//! Folds methods into the matrices of the backbone. A method on a projection folds if the projection's output is still
//! an affine function of its input.
//!
//! ```text
//! y = x W + b            the projection of the backbone
//! y = x M + c            the projection with its methods, M and c functions of weights alone; they replace W and b
//! ```
//!
//! The decision depends on the graph, not on the method's name: LoRA, DoRA, VeRA and IA³ fold because of the equations
//! they have. If any method remains, such as an inducer or an adapter, nothing is folded.

use std::collections::{BTreeMap, HashMap, HashSet};

use peft_grammar::graph::{Dim, Graph, Location, Node, Op, Role, Value};
use peft_grammar::model::{AppliedMethod, Model, Origin, Projection};
use peft_grammar::names::{Entry, Input, LOGITS, LOSS};

/// Returns the graph that computes the folded matrices and biases: outputs `PATH.weight` `[in,out]` and `PATH.bias`
/// `[out]` for every projection that methods change. It reads weights alone and no batch.
///
/// # Errors
/// A method is not affine in the input of its projection, or adds a bias to a projection without one; the message names
/// the methods.
pub fn fold(model: &Model) -> Result<Graph, String> {
    let mut folder = Folder::new(model);
    let mut folded = HashMap::new();
    for projection in &model.projections {
        let Some(affine) = folder.affine(projection)? else { continue };
        folded.insert(projection.output, projection.input);
        if affine.changed {
            folder.push_outputs(projection, &affine)?;
        }
    }
    match unfolded(model, &folded) {
        None => Ok(folder.graph),
        Some(why) => Err(why),
    }
}

/// An affine function x M + c of each row x of a projection's input.
#[derive(Clone, Copy)]
struct Affine {
    linear: Linear,
    /// c [n]; `None` for 0.
    constant: Option<Value>,
    /// The function depends on a method's weights.
    changed: bool,
}

/// The matrix M of an affine function.
#[derive(Clone, Copy)]
enum Linear {
    Identity,
    /// diag(d) with d [n].
    Diagonal(Value),
    /// [in,out]
    Matrix(Value),
}

/// The state of the fold: the old graph and the graph of folded matrices under construction.
struct Folder<'a> {
    model: &'a Model,
    old: &'a Graph,
    graph: Graph,
    /// Values of the old graph that depend on the batch.
    batch_dependent: HashSet<Value>,
    /// Values of the old graph that depend on a method's weights.
    method_dependent: HashSet<Value>,
    /// For values of the old graph that depend on weights alone, their values in the new graph.
    known: HashMap<Value, Value>,
}

impl<'a> Folder<'a> {
    fn new(model: &'a Model) -> Self {
        let old = &model.graph;
        let mut graph = Graph::new(Entry::Merge.name());
        // Only dropout reads `rng`, and folding removes dropout.
        let inputs = old.args.iter().filter(|a| a.role == Role::Input && a.name != Input::Rng.name());
        let batch_dependent = old.dependents_of(inputs.map(|a| a.value));
        let methods = method_weights(model);
        let method_dependent =
            old.dependents_of(old.args.iter().filter(|a| methods.contains(&*a.name)).map(|a| a.value));
        let weights = old.args.iter().filter(|a| a.role != Role::Input);
        let known =
            weights.map(|a| (a.value, graph.arg(a.name.clone(), a.role, a.rows, old.ty(a.value).clone()))).collect();
        Folder { model, old, graph, batch_dependent, method_dependent, known }
    }

    fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, String> {
        self.graph.push(op, operands, &Location::default())
    }

    /// Rebuilds a value that depends on weights alone in the new graph, without dropout and `detach`.
    fn weights(&mut self, old: Value) -> Result<Value, String> {
        if let Some(&value) = self.known.get(&old) {
            return Ok(value);
        }
        let node = self.old.def(old).expect("all arguments are known");
        let value = if let Op::Dropout { .. } | Op::Detach = node.op {
            self.weights(node.operands[0])?
        } else {
            let operands = node.operands.iter().map(|&v| self.weights(v)).collect::<Result<Vec<_>, _>>()?;
            self.op(node.op.clone(), &operands)?
        };
        self.known.insert(old, value);
        Ok(value)
    }

    /// The projection's output as an affine function of its input; `None` if it is not affine.
    fn affine(&mut self, projection: &Projection) -> Result<Option<Affine>, String> {
        let mut found =
            HashMap::from([(projection.input, Affine { linear: Linear::Identity, constant: None, changed: false })]);
        let old = self.old;
        let between = |n: &&Node| n.result() > projection.input && n.result() <= projection.output;
        for node in old.nodes.iter().filter(between) {
            if let Some(affine) = self.propagate(node, &found)? {
                found.insert(node.result(), affine);
            }
        }
        Ok(found.get(&projection.output).filter(|a| matches!(a.linear, Linear::Matrix(_))).copied())
    }

    /// The result of `node` as an affine function of the projection's input, given those of its operands in `found`;
    /// `None` if it does not depend on the input or is not affine in it.
    fn propagate(&mut self, node: &Node, found: &HashMap<Value, Affine>) -> Result<Option<Affine>, String> {
        let at = |i: usize| node.operands.get(i).and_then(|v| found.get(v)).copied();
        match (&node.op, at(0), at(1)) {
            (Op::Dropout { .. } | Op::Detach, Some(x), _) => Ok(Some(x)),
            (Op::Scale { .. }, Some(x), _) => {
                let linear = match x.linear {
                    Linear::Identity => return Ok(None),
                    Linear::Diagonal(d) => Linear::Diagonal(self.op(node.op.clone(), &[d])?),
                    Linear::Matrix(m) => Linear::Matrix(self.op(node.op.clone(), &[m])?),
                };
                let constant = x.constant.map(|c| self.op(node.op.clone(), &[c])).transpose()?;
                Ok(Some(Affine { linear, constant, ..x }))
            }
            (Op::Slice { axis: 1, start, end }, Some(Affine { linear: Linear::Matrix(m), constant, changed }), _) => {
                let cut = |axis| Op::Slice { axis, start: *start, end: *end };
                let linear = Linear::Matrix(self.op(cut(1), &[m])?);
                let constant = constant.map(|c| self.op(cut(0), &[c])).transpose()?;
                Ok(Some(Affine { linear, constant, changed }))
            }
            (Op::Matmul { transpose_x: false, transpose_y }, Some(x), None) => {
                self.times_matrix(x, node.operands[1], *transpose_y)
            }
            (Op::Add | Op::Sub, Some(x), Some(y)) => {
                let (Linear::Matrix(a), Linear::Matrix(b)) = (x.linear, y.linear) else { return Ok(None) };
                let linear = Linear::Matrix(self.op(node.op.clone(), &[a, b])?);
                let constant = match (x.constant, y.constant) {
                    (Some(c), Some(d)) => Some(self.op(node.op.clone(), &[c, d])?),
                    (None, Some(d)) if node.op == Op::Sub => Some(self.op(Op::Scale { by: -1.0 }, &[d])?),
                    (c, d) => c.or(d),
                };
                Ok(Some(Affine { linear, constant, changed: x.changed || y.changed }))
            }
            (Op::Add, Some(x), None) => self.plus_row(x, node.operands[1], &Op::Add),
            (Op::Add, None, Some(x)) => self.plus_row(x, node.operands[0], &Op::Add),
            (Op::Sub, Some(x), None) => self.plus_row(x, node.operands[1], &Op::Sub),
            (Op::Mul | Op::Div, Some(x), None) => self.times_row(x, node.operands[1], &node.op),
            (Op::Mul, None, Some(x)) => self.times_row(x, node.operands[0], &Op::Mul),
            // These operands do not depend on x, or the result is not an affine function of each row of x.
            (Op::Dropout { .. } | Op::Detach | Op::Scale { .. } | Op::Slice { .. } | Op::Matmul { .. }, ..) => Ok(None),
            (Op::Add | Op::Sub | Op::Mul | Op::Div | Op::Min | Op::Shift { .. } | Op::Float, ..) => Ok(None),
            (Op::Exp | Op::Log | Op::Sqrt | Op::Rsqrt | Op::Sin | Op::Cos | Op::Tanh | Op::Sigmoid, ..) => Ok(None),
            (Op::Relu | Op::Step | Op::Gelu | Op::GeluGrad | Op::GeluTanh | Op::GeluTanhGrad, ..) => Ok(None),
            (Op::Constant { .. } | Op::Iota { .. } | Op::Reshape { .. } | Op::Permute { .. }, ..) => Ok(None),
            (Op::Pad { .. } | Op::Concat { .. } | Op::Broadcast { .. } | Op::Reduce { .. }, ..) => Ok(None),
            (Op::Scores { .. } | Op::Attend { .. } | Op::AttendTransposed { .. }, ..) => Ok(None),
            (Op::Attention { .. } | Op::AttentionLse { .. } | Op::AttentionVjp { .. }, ..) => Ok(None),
            // Only multi-output fusion makes these operations, and folding precedes it.
            (Op::AttentionAndLse { .. } | Op::AttentionVjpSides { .. } | Op::AttentionVjpAll { .. }, ..) => Ok(None),
            (Op::LinearLseAndMean, ..) => Ok(None),
            (Op::LinearLse | Op::LinearMean | Op::Softmax | Op::LogSumExp | Op::SoftmaxVjp, ..) => Ok(None),
            (Op::Normalize { .. } | Op::NormalizeVjp { .. }, ..) => Ok(None),
            (Op::Gather { .. } | Op::Scatter { .. } | Op::SegmentMean | Op::SegmentMeanVjp, ..) => Ok(None),
            (Op::CrossEntropy { .. } | Op::CrossEntropyVjp { .. }, ..) => Ok(None),
        }
    }

    /// x @ w, or x @ wᵀ if `transposed`.
    fn times_matrix(&mut self, x: Affine, w: Value, transposed: bool) -> Result<Option<Affine>, String> {
        if self.batch_dependent.contains(&w) || self.old.ty(w).rank() != 2 {
            return Ok(None);
        }
        let changed = x.changed || self.method_dependent.contains(&w);
        let mut w = self.weights(w)?;
        if transposed {
            w = self.op(Op::Permute { axes: vec![1, 0] }, &[w])?;
        }
        let product = Op::Matmul { transpose_x: false, transpose_y: false };
        let linear = match x.linear {
            Linear::Identity => w,
            Linear::Diagonal(d) => {
                let column = self.op(Op::Reshape { shape: vec![self.graph.ty(d).shape[0], Dim::Const(1)] }, &[d])?;
                self.op(Op::Mul, &[column, w])?
            }
            Linear::Matrix(m) => self.op(product.clone(), &[m, w])?,
        };
        let constant = match x.constant {
            None => None,
            Some(c) => {
                let row = self.op(Op::Reshape { shape: vec![Dim::Const(1), self.graph.ty(c).shape[0]] }, &[c])?;
                let row = self.op(product, &[row, w])?;
                Some(self.op(Op::Reshape { shape: vec![self.graph.ty(row).shape[1]] }, &[row])?)
            }
        };
        Ok(Some(Affine { linear: Linear::Matrix(linear), constant, changed }))
    }

    /// `k` as a row [n] in the new graph; `None` if it depends on the batch or is not a single row.
    fn row(&mut self, k: Value, n: Dim) -> Result<Option<Value>, String> {
        let shape = &self.old.ty(k).shape;
        let flat = shape.iter().rev().skip(1).all(|d| *d == Dim::Const(1));
        if self.batch_dependent.contains(&k) || !flat {
            return Ok(None);
        }
        let last = shape.last().copied().unwrap_or(Dim::Const(1));
        let k = self.weights(k)?;
        let row = self.op(Op::Reshape { shape: vec![last] }, &[k])?;
        match last == n {
            true => Ok(Some(row)),
            false => self.op(Op::Broadcast { shape: vec![n], mean: false }, &[row]).map(Some),
        }
    }

    /// The number n of columns of x M + c; `None` for the identity without a constant.
    fn width(&self, x: &Affine) -> Option<Dim> {
        match (x.linear, x.constant) {
            (Linear::Diagonal(v), _) | (Linear::Matrix(v), _) | (_, Some(v)) => self.graph.ty(v).last(),
            _ => None,
        }
    }

    /// x + k or x − k for a row k.
    fn plus_row(&mut self, x: Affine, k: Value, op: &Op) -> Result<Option<Affine>, String> {
        let Some(n) = self.width(&x) else { return Ok(None) };
        let Some(row) = self.row(k, n)? else { return Ok(None) };
        let constant = match x.constant {
            Some(c) => self.op(op.clone(), &[c, row])?,
            None if *op == Op::Sub => self.op(Op::Scale { by: -1.0 }, &[row])?,
            None => row,
        };
        Ok(Some(Affine { constant: Some(constant), changed: x.changed || self.method_dependent.contains(&k), ..x }))
    }

    /// x ⊙ k or x / k for a row k.
    fn times_row(&mut self, x: Affine, k: Value, op: &Op) -> Result<Option<Affine>, String> {
        let n = match self.width(&x) {
            Some(n) => n,
            // The identity takes its width from the row that it is multiplied by.
            None => match self.old.ty(k).last() {
                Some(n) if n != Dim::Const(1) && *op == Op::Mul => n,
                _ => return Ok(None),
            },
        };
        let Some(row) = self.row(k, n)? else { return Ok(None) };
        let linear = match x.linear {
            Linear::Identity => Linear::Diagonal(row),
            Linear::Diagonal(d) => Linear::Diagonal(self.op(op.clone(), &[d, row])?),
            Linear::Matrix(m) => Linear::Matrix(self.op(op.clone(), &[m, row])?),
        };
        let constant = x.constant.map(|c| self.op(op.clone(), &[c, row])).transpose()?;
        Ok(Some(Affine { linear, constant, changed: x.changed || self.method_dependent.contains(&k) }))
    }

    /// Appends the outputs `PATH.weight` and `PATH.bias` of a changed projection.
    fn push_outputs(&mut self, projection: &Projection, affine: &Affine) -> Result<(), String> {
        let Linear::Matrix(matrix) = affine.linear else { unreachable!("`affine` returns matrices only") };
        self.graph.outputs.push((format!("{}.weight", projection.path), matrix));
        match (affine.constant, &projection.bias) {
            (Some(constant), Some(_)) => self.graph.outputs.push((format!("{}.bias", projection.path), constant)),
            (Some(constant), None) if !self.is_zero(constant) => {
                let owner = self.model.applied.iter().find(|a| a.site == projection.path).map(|a| a.method.as_str());
                let owner = owner.unwrap_or("a method");
                let weight = &projection.weight;
                return Err(format!(
                    "`{owner}` adds a bias to `{}`, but the backbone has no bias beside `{weight}` to fold it into",
                    projection.path
                ));
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether `value` is 0 for all weights, as the bias of a projection without one is.
    fn is_zero(&self, value: Value) -> bool {
        let Some(node) = self.graph.def(value) else { return false };
        let zero = |i: usize| self.is_zero(node.operands[i]);
        match &node.op {
            Op::Constant { value, .. } => *value == 0.0,
            Op::Scale { .. } | Op::Reshape { .. } | Op::Slice { .. } | Op::Div | Op::Broadcast { .. } => zero(0),
            Op::Mul => zero(0) || zero(1),
            Op::Add | Op::Sub => zero(0) && zero(1),
            _ => false,
        }
    }
}

/// The names of all weights that methods add.
fn method_weights(model: &Model) -> HashSet<&str> {
    let from_method = |p: &&peft_grammar::model::Param| matches!(p.origin, Origin::Method(_));
    model.params.iter().filter(from_method).map(|p| p.name.as_str()).collect()
}

/// The methods on which loss and logits still depend when every folded projection is x W + b, as an error message;
/// `None` if there are none.
fn unfolded(model: &Model, folded: &HashMap<Value, Value>) -> Option<String> {
    let graph = &model.graph;
    let mut needed = HashSet::new();
    for name in [LOSS, LOGITS] {
        needed.extend(graph.output(name));
    }
    for node in graph.nodes.iter().rev() {
        if !needed.contains(&node.result()) {
            continue;
        }
        match folded.get(&node.result()) {
            Some(&input) => drop(needed.insert(input)),
            None => needed.extend(node.operands.iter().copied()),
        }
    }
    let methods = method_weights(model);
    let mut left: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for arg in graph.args.iter().filter(|a| needed.contains(&a.value) && methods.contains(a.name.as_str())) {
        let param = model.params.iter().find(|p| p.name == arg.name)?;
        let Origin::Method(method) = &param.origin else { continue };
        let sites = left.entry(method).or_default();
        // A weight that all applications of a method share belongs to every site of the method.
        let of = |a: &&AppliedMethod| a.method == *method;
        let applied: Vec<&AppliedMethod> =
            model.applied_to(&arg.name).map_or_else(|| model.applied.iter().filter(of).collect(), |a| vec![a]);
        for site in applied.iter().map(|a| if a.site.is_empty() { "the model" } else { &a.site }) {
            if !sites.contains(&site) {
                sites.push(site);
            }
        }
    }
    let describe = |(method, sites): (&&str, &Vec<&str>)| {
        let more = if sites.len() > 1 { format!(" and {} more", sites.len() - 1) } else { String::new() };
        format!(
            "`{method}` at {}{more} does not fold into a matrix and a bias: its output is not affine in its input",
            sites[0]
        )
    };
    (!left.is_empty()).then(|| left.iter().map(describe).collect::<Vec<_>>().join("\n"))
}
