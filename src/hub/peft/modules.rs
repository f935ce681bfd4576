//! Matrices of the backbone as PEFT's modules, and what methods have at them.
//!
//! A fused matrix serves several projections (GPT-2's `c_attn` those of q, k and v), PEFT has one adapter for all of
//! it. What belongs to its outputs lies at their rows; along an axis that a parameter gives, methods lie side by side:
//!
//! ```text
//! ours    q += s_q B_q A_q x        v += s_v B_v A_v x
//! PEFT's  c_attn += s B A x,        A = [A_q ; A_v],  B = [B_q 0 ; 0 0 ; 0 s_v/s B_v]
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use peft_grammar::counterpart::{Axis, Counterpart, Tensor};
use peft_grammar::model::{Applied, ConfigValue, Model, Projection};

/// A matrix of the backbone with the projections that read it.
pub struct Module<'a> {
    /// The tensor's name without `.weight`: a module's name in PyTorch.
    pub name: &'a str,
    /// Stored [in,out].
    pub conv: bool,
    pub inputs: usize,
    pub outputs: usize,
    pub projections: Vec<&'a Projection>,
    /// What methods have at it, in the order of its outputs.
    pub pieces: Vec<Piece<'a>>,
}

/// A method at one projection of a module.
pub struct Piece<'a> {
    pub projection: &'a Projection,
    pub applied: &'a Applied,
    pub counterpart: &'a Counterpart,
    /// Those of the counterpart's tensors that are for this projection.
    pub tensors: Vec<&'a Tensor>,
    /// The outputs that are the projection's.
    pub rows: Range<usize>,
}

/// Where a piece lies in a tensor of its module: two axes, the first of length 1 if there is one alone.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub first: [usize; 2],
    pub length: [usize; 2],
    pub whole: [usize; 2],
}

impl Block {
    /// For each of the piece's rows, where its numbers begin in the module's tensor.
    pub fn rows(&self) -> impl Iterator<Item = usize> {
        let Block { first, length, whole } = *self;
        (0..length[0]).map(move |row| (first[0] + row) * whole[1] + first[1])
    }
}

/// The modules that methods work at, in the order of the model. The error is a place at which PEFT has room for one
/// tensor and the spec has two.
pub fn modules(model: &Model) -> Result<Vec<Module<'_>>, String> {
    let mut modules: Vec<Module> = vec![];
    for projection in &model.projections {
        let name = projection.weight.strip_suffix(".weight").unwrap_or(&projection.weight);
        if !modules.iter().any(|m| m.name == name) {
            let Some(param) = model.params.iter().find(|p| p.name == projection.weight) else { continue };
            let [rows, columns] = [param.shape[0] as usize, param.shape[1] as usize];
            let (inputs, outputs) = if projection.transposed { (columns, rows) } else { (rows, columns) };
            let (projections, pieces) = (vec![], vec![]);
            modules.push(Module { name, conv: !projection.transposed, inputs, outputs, projections, pieces });
        }
        let Some(module) = modules.iter_mut().find(|m| m.name == name) else { continue };
        module.projections.push(projection);
        let first = module.pieces.len();
        module.pieces.extend(pieces(model, projection, module.outputs));
        for (at, piece) in module.pieces.iter().enumerate().skip(first) {
            let twice = |t: &&Tensor| module.pieces[first..at].iter().any(|p| p.has(&t.name).is_some());
            if let Some(tensor) = piece.tensors.iter().copied().find(twice) {
                return Err(format!(
                    "the spec applies `{}` twice at `{}`, as a projection and with its site: PEFT has one `{}` there",
                    piece.applied.method, projection.path, tensor.name
                ));
            }
        }
    }
    modules.retain(|m| !m.pieces.is_empty());
    for module in &mut modules {
        module.pieces.sort_by_key(|p| p.rows.start);
    }
    Ok(modules)
}

/// What methods have at a projection: those of projections, and those of its site.
fn pieces<'a>(model: &'a Model, projection: &'a Projection, outputs: usize) -> Vec<Piece<'a>> {
    let (site, variable) = projection.path.rsplit_once('.').unwrap_or_default();
    let (start, end) = projection.columns.unwrap_or((0, outputs as u64));
    let piece = |applied: &'a Applied| {
        let counterpart = of(model, applied)?;
        let here = |t: &&Tensor| match &t.projection {
            Some(name) => applied.site == site && name == variable,
            None => applied.site == projection.path,
        };
        let tensors: Vec<&Tensor> = counterpart.tensors.iter().filter(here).collect();
        let rows = start as usize..end as usize;
        (!tensors.is_empty()).then_some(Piece { projection, applied, counterpart, tensors, rows })
    };
    model.applied.iter().filter_map(piece).collect()
}

/// What a method at work is in PEFT.
pub fn of<'a>(model: &'a Model, applied: &Applied) -> Option<&'a Counterpart> {
    model.counterparts.iter().find(|c| c.method == applied.method && c.kind == applied.kind)
}

impl<'a> Piece<'a> {
    pub fn has(&self, tensor: &str) -> Option<&'a Tensor> {
        self.tensors.iter().copied().find(|t| t.name == tensor)
    }

    /// The canonical name of the weight that is this tensor.
    pub fn weight(&self, tensor: &Tensor) -> String {
        format!("{}.{}", self.applied.path(), tensor.weight)
    }

    /// The parameter is not a `bool` that is false.
    pub fn holds(&self, condition: &Option<String>) -> bool {
        condition.as_ref().is_none_or(|c| self.applied.args.get(c) != Some(&ConfigValue::Bool(false)))
    }

    /// Everything here that is a number, by name.
    pub fn numbers(&self) -> BTreeMap<String, f64> {
        let all = self.applied.known.iter().chain(&self.applied.args);
        all.filter_map(|(name, value)| Some((name.clone(), number(value)?))).collect()
    }

    pub fn length(&self, parameter: &str) -> usize {
        self.applied.args.get(parameter).and_then(number).unwrap_or(0.0) as usize
    }
}

impl<'a> Module<'a> {
    pub fn fused(&self) -> bool {
        self.projections.iter().any(|p| p.columns.is_some())
    }

    /// The names of its tensors, in the order of the declarations.
    pub fn tensors(&self) -> Vec<&'a Tensor> {
        let mut all: Vec<&Tensor> = vec![];
        for tensor in self.pieces.iter().flat_map(|p| &p.tensors) {
            if !all.iter().any(|t| t.name == tensor.name) {
                all.push(tensor);
            }
        }
        all
    }

    /// How long an axis that a parameter gives is for all pieces together.
    pub fn total(&self, parameter: &str) -> usize {
        self.pieces.iter().map(|p| p.length(parameter)).sum()
    }

    /// Whether pieces lie side by side in the tensor, or stand in for each other.
    pub fn apart(tensor: &Tensor) -> bool {
        tensor.axes.iter().any(|a| matches!(a, Axis::Outputs | Axis::Param(_)))
    }

    /// The tensor has a number, or a row, for each output.
    pub fn spans(tensor: &Tensor) -> bool {
        tensor.axes.contains(&Axis::Outputs)
    }

    /// The shape of a tensor, where parameters have the length `of`.
    pub fn shape(&self, tensor: &Tensor, of: impl Fn(&str) -> usize) -> Vec<u64> {
        let length = |axis: &Axis| match axis {
            Axis::Inputs => self.inputs,
            Axis::Outputs => self.outputs,
            Axis::Param(name) => of(name),
            Axis::One => 1,
        };
        tensor.axes.iter().map(|a| length(a) as u64).collect()
    }

    /// Where piece `at` lies in a tensor. `shared`: all pieces have all of what a parameter gives.
    pub fn block(&self, tensor: &Tensor, at: usize, shared: bool) -> Block {
        let piece = &self.pieces[at];
        let place = |axis: &Axis| match axis {
            Axis::Inputs => Some((0, self.inputs, self.inputs)),
            Axis::Outputs => Some((piece.rows.start, piece.rows.len(), self.outputs)),
            Axis::Param(name) if shared => Some((0, piece.length(name), piece.length(name))),
            Axis::Param(name) => {
                let first = self.pieces[..at].iter().map(|p| p.length(name)).sum();
                Some((first, piece.length(name), self.total(name)))
            }
            Axis::One => None,
        };
        let mut places: Vec<(usize, usize, usize)> = tensor.axes.iter().filter_map(place).collect();
        while places.len() < 2 {
            places.insert(0, (0, 1, 1));
        }
        let [rows, columns] = [places[0], places[1]];
        Block { first: [rows.0, columns.0], length: [rows.1, columns.1], whole: [rows.2, columns.2] }
    }

    /// Projections that no piece with this tensor is for, with their outputs.
    pub fn untouched(&self, tensor: &str) -> Vec<(&'a Projection, Range<usize>)> {
        let touched =
            |p: &Projection| self.pieces.iter().any(|o| o.projection.path == p.path && o.has(tensor).is_some());
        let rows = |p: &&'a Projection| {
            let (start, end) = p.columns.unwrap_or((0, self.outputs as u64));
            (*p, start as usize..end as usize)
        };
        self.projections.iter().filter(|p| !touched(p)).map(rows).collect()
    }

    /// `attention.q` for people: `q`.
    pub fn short(projection: &Projection) -> &str {
        projection.path.rsplit('.').next().unwrap_or(&projection.path)
    }
}

pub fn number(value: &ConfigValue) -> Option<f64> {
    match value {
        ConfigValue::Int(n) => Some(*n as f64),
        ConfigValue::Float(x) => Some(*x),
        _ => None,
    }
}
