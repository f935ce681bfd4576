//! Matrices of the backbone as PEFT's modules, and the methods that are applied to them.
//!
//! A fused matrix serves several projections, as GPT-2's `c_attn` does for q, k and v, and PEFT has one adapter for all
//! of it. A tensor with an output axis holds each projection's values at the rows of its outputs. Along an axis whose
//! length is a parameter, such as the rank, the applications of methods are concatenated:
//!
//! ```text
//! ours    q += s_q B_q A_q x        v += s_v B_v A_v x
//! PEFT's  c_attn += s B A x,        A = [A_q ; A_v],  B = [B_q 0 ; 0 0 ; 0 s_v/s B_v]
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use peft_grammar::counterpart::{Axis, Counterpart, Tensor};
use peft_grammar::model::{AppliedMethod, ConfigValue, Model, Projection};

/// A matrix of the backbone with the projections that read it.
pub struct Module<'a> {
    /// The tensor's name without `.weight`: a module's name in PyTorch.
    pub name: &'a str,
    /// Whether the matrix is stored as `[in,out]`, as in GPT-2's `Conv1D`.
    pub stored_in_out: bool,
    /// The number of input features.
    pub inputs: usize,
    /// The number of output features, of all projections together.
    pub outputs: usize,
    /// The projections that read the matrix.
    pub projections: Vec<&'a Projection>,
    /// The methods that are applied to its projections, in the order of the outputs.
    pub applications: Vec<Application<'a>>,
}

/// The application of a method to one projection of a module.
pub struct Application<'a> {
    /// The projection.
    pub projection: &'a Projection,
    /// The method with its arguments.
    pub applied: &'a AppliedMethod,
    /// The corresponding method of PEFT.
    pub counterpart: &'a Counterpart,
    /// The counterpart's tensors for this projection.
    pub tensors: Vec<&'a Tensor>,
    /// The range of the module's outputs that the projection computes.
    pub rows: Range<usize>,
}

/// The block of a module's tensor that belongs to an application. Each field has two axes; the first has length 1 if
/// the tensor has only one.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// The first row and column of the block.
    pub first: [usize; 2],
    /// The rows and columns of the block.
    pub length: [usize; 2],
    /// The rows and columns of the whole tensor.
    pub whole: [usize; 2],
}

impl Block {
    /// The offset in the module's tensor at which each row of the block begins.
    pub fn rows(&self) -> impl Iterator<Item = usize> {
        let Block { first, length, whole } = *self;
        (0..length[0]).map(move |row| (first[0] + row) * whole[1] + first[1])
    }
}

/// The modules that methods are applied to, in the order of the model.
///
/// # Errors
///
/// The spec applies a method twice where PEFT has one tensor.
pub fn modules(model: &Model) -> Result<Vec<Module<'_>>, String> {
    let mut modules: Vec<Module> = vec![];
    for projection in &model.projections {
        let name = projection.weight.strip_suffix(".weight").unwrap_or(&projection.weight);
        if !modules.iter().any(|m| m.name == name) {
            let Some(param) = model.params.iter().find(|p| p.name == projection.weight) else { continue };
            let [rows, columns] = [param.shape[0] as usize, param.shape[1] as usize];
            let (inputs, outputs) = if projection.transposed { (columns, rows) } else { (rows, columns) };
            let (projections, applications) = (vec![], vec![]);
            modules.push(Module {
                name,
                stored_in_out: !projection.transposed,
                inputs,
                outputs,
                projections,
                applications,
            });
        }
        let Some(module) = modules.iter_mut().find(|m| m.name == name) else { continue };
        module.projections.push(projection);
        let first = module.applications.len();
        module.applications.extend(applications(model, projection, module.outputs));
        for (at, application) in module.applications.iter().enumerate().skip(first) {
            let twice = |t: &&Tensor| module.applications[first..at].iter().any(|p| p.has(&t.name).is_some());
            if let Some(tensor) = application.tensors.iter().copied().find(twice) {
                return Err(format!(
                    "the spec applies `{}` twice at `{}`, as a projection and with its site: PEFT has one `{}` there",
                    application.applied.method, projection.path, tensor.name
                ));
            }
        }
    }
    modules.retain(|m| !m.applications.is_empty());
    for module in &mut modules {
        module.applications.sort_by_key(|p| p.rows.start);
    }
    Ok(modules)
}

/// The applications of methods to a projection: methods of projections, and methods of its site with tensors for the
/// projection.
fn applications<'a>(model: &'a Model, projection: &'a Projection, outputs: usize) -> Vec<Application<'a>> {
    let (site, variable) = projection.path.rsplit_once('.').unwrap_or_default();
    let (start, end) = projection.columns.unwrap_or((0, outputs as u64));
    let application = |applied: &'a AppliedMethod| {
        let counterpart = counterpart_of(model, applied)?;
        let here = |t: &&Tensor| match &t.projection {
            Some(name) => applied.site == site && name == variable,
            None => applied.site == projection.path,
        };
        let tensors: Vec<&Tensor> = counterpart.tensors.iter().filter(here).collect();
        let rows = start as usize..end as usize;
        (!tensors.is_empty()).then_some(Application { projection, applied, counterpart, tensors, rows })
    };
    model.applied.iter().filter_map(application).collect()
}

/// The counterpart in PEFT of an applied method.
pub fn counterpart_of<'a>(model: &'a Model, applied: &AppliedMethod) -> Option<&'a Counterpart> {
    model.counterparts.iter().find(|c| c.method == applied.method && c.kind == applied.kind)
}

impl<'a> Application<'a> {
    /// The counterpart's tensor of this name, if it is for this projection.
    pub fn has(&self, tensor: &str) -> Option<&'a Tensor> {
        self.tensors.iter().copied().find(|t| t.name == tensor)
    }

    /// The canonical name of the weight that corresponds to a tensor of PEFT.
    pub fn weight(&self, tensor: &Tensor) -> String {
        format!("{}.{}", self.applied.path(), tensor.weight)
    }

    /// Whether a tensor's condition holds: the parameter that it names is not `false`.
    pub fn holds(&self, condition: &Option<String>) -> bool {
        condition.as_ref().is_none_or(|c| self.applied.args.get(c) != Some(&ConfigValue::Bool(false)))
    }

    /// All numeric parameters of the method and its site, by name.
    pub fn numbers(&self) -> BTreeMap<String, f64> {
        let all = self.applied.model_values.iter().chain(&self.applied.args);
        all.filter_map(|(name, value)| Some((name.clone(), number(value)?))).collect()
    }

    /// The value of a parameter that is the length of an axis.
    pub fn length(&self, parameter: &str) -> usize {
        self.applied.args.get(parameter).and_then(number).unwrap_or(0.0) as usize
    }
}

impl<'a> Module<'a> {
    /// Whether the matrix serves several projections.
    pub fn fused(&self) -> bool {
        self.projections.iter().any(|p| p.columns.is_some())
    }

    /// The module's tensors, in the order of their declarations.
    pub fn tensors(&self) -> Vec<&'a Tensor> {
        let mut all: Vec<&Tensor> = vec![];
        for tensor in self.applications.iter().flat_map(|p| &p.tensors) {
            if !all.iter().any(|t| t.name == tensor.name) {
                all.push(tensor);
            }
        }
        all
    }

    /// The sum of a parameter over all applications: the length of the axis that concatenates them.
    pub fn total(&self, parameter: &str) -> usize {
        self.applications.iter().map(|p| p.length(parameter)).sum()
    }

    /// Whether each application has its own part of the tensor. If not, all share the whole tensor.
    pub fn is_partitioned(tensor: &Tensor) -> bool {
        tensor.axes.iter().any(|a| matches!(a, Axis::Outputs | Axis::Param(_)))
    }

    /// Whether the tensor has a number or a row for each output.
    pub fn has_output_axis(tensor: &Tensor) -> bool {
        tensor.axes.contains(&Axis::Outputs)
    }

    /// The shape of a tensor, where `of` returns the length for a parameter.
    pub fn shape(&self, tensor: &Tensor, of: impl Fn(&str) -> usize) -> Vec<u64> {
        let length = |axis: &Axis| match axis {
            Axis::Inputs => self.inputs,
            Axis::Outputs => self.outputs,
            Axis::Param(name) => of(name),
            Axis::One => 1,
        };
        tensor.axes.iter().map(|a| length(a) as u64).collect()
    }

    /// The block of application `at` in a tensor. `shared`: all applications use the whole axis of a parameter, instead
    /// of parts of it.
    pub fn block(&self, tensor: &Tensor, at: usize, shared: bool) -> Block {
        let application = &self.applications[at];
        let place = |axis: &Axis| match axis {
            Axis::Inputs => Some((0, self.inputs, self.inputs)),
            Axis::Outputs => Some((application.rows.start, application.rows.len(), self.outputs)),
            Axis::Param(name) if shared => Some((0, application.length(name), application.length(name))),
            Axis::Param(name) => {
                let first = self.applications[..at].iter().map(|p| p.length(name)).sum();
                Some((first, application.length(name), self.total(name)))
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

    /// The projections without an application that has this tensor, with the ranges of their outputs.
    pub fn unadapted(&self, tensor: &str) -> Vec<(&'a Projection, Range<usize>)> {
        let touched =
            |p: &Projection| self.applications.iter().any(|o| o.projection.path == p.path && o.has(tensor).is_some());
        let rows = |p: &&'a Projection| {
            let (start, end) = p.columns.unwrap_or((0, self.outputs as u64));
            (*p, start as usize..end as usize)
        };
        self.projections.iter().filter(|p| !touched(p)).map(rows).collect()
    }

    /// The last part of a projection's path, `q` of `attention.q`, for messages.
    pub fn short(projection: &Projection) -> &str {
        projection.path.rsplit('.').next().unwrap_or(&projection.path)
    }
}

/// The number in an argument; `None` for text and flags.
pub fn number(value: &ConfigValue) -> Option<f64> {
    match value {
        ConfigValue::Int(n) => Some(*n as f64),
        ConfigValue::Float(x) => Some(*x),
        _ => None,
    }
}
