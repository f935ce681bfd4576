//! The way of a model from its equations to kernels, on one screen.

use std::time::{Duration, Instant};

use peft_grammar::bounds::Bound;
use peft_grammar::graph::Graph;
use peft_grammar::model::{Backbone, Init, Model, Param, Trainable};
pub use peft_grammar::names::Entry;
use peft_grammar::names::{Input, LOGITS, LOSS};
use peft_runtime::artifact::{Extent, Limit, Tensor};

use crate::dialect::Dialect;
use crate::fold::fold;
use crate::fuse::{Limits, RULES, fuse};
use crate::gradient::{differentiate, settle};
use crate::inference::inference;
use crate::lower::{self, Lowered, lower};
use crate::partition::partition;
use crate::remat::{Remade, remat};
use crate::rewrite::live;
use crate::siblings::join;
use crate::target::Machine;
use crate::{Error, codegen};

/// What `--emit` takes: every form a model has on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Syntax with places, nothing resolved.
    Ast,
    /// Names resolved, methods expanded at their sites, shapes known, trainable set decided.
    Model,
    /// The equations as written, in the `peft` dialect.
    Peft,
    /// The same with derivatives.
    Grad,
    /// After the fusion rules.
    Fused,
    /// Kernels in `scf`, `vector` and `memref`.
    Loops,
    /// Kernels in the `llvm` dialect.
    Llvm,
    /// What a GPU's driver gets.
    Ptx,
}

impl Stage {
    pub const ALL: [(Stage, &str); 8] = [
        (Stage::Ast, "ast"),
        (Stage::Model, "model"),
        (Stage::Peft, "peft"),
        (Stage::Grad, "grad"),
        (Stage::Fused, "fused"),
        (Stage::Loops, "loops"),
        (Stage::Llvm, "llvm"),
        (Stage::Ptx, "ptx"),
    ];
}

/// The entries of the model's artifact.
pub fn of_artifact(model: &Model) -> Vec<Entry> {
    let mut entries = vec![Entry::Forward, Entry::Eval, Entry::Grad, Entry::Train];
    entries.extend(model.params.iter().any(|p| matches!(p.init, Init::Value(_))).then_some(Entry::Init));
    entries.extend((!model.stored.is_empty()).then_some(Entry::Store));
    entries
}

fn differentiates(entry: Entry) -> bool {
    matches!(entry, Entry::Grad | Entry::Train)
}

/// The model's graph with the entry's outputs.
fn equations(entry: Entry, model: &Model) -> Result<Graph, String> {
    let mut graph = model.graph.clone();
    match entry {
        Entry::Forward | Entry::Grad => {}
        Entry::Eval => {
            let judged = !model.task.kind.generates();
            graph.outputs.retain(|(name, _)| name == LOSS || judged && name == LOGITS);
        }
        Entry::Train => graph.outputs.retain(|(name, _)| name == LOSS),
        Entry::Init => {
            let value = |p: &Param| if let Init::Value(v) = p.init { Some((p.name.clone(), v)) } else { None };
            graph.outputs = model.params.iter().filter_map(value).collect();
        }
        Entry::Store => graph.outputs = model.stored.clone(),
        Entry::Merge => graph = fold(model)?,
    }
    graph.name = entry.name().to_string();
    Ok(live(&graph))
}

#[derive(Clone, Debug)]
pub struct Options {
    /// Names of fusion rules to leave out; `all` for every one.
    pub without: Vec<String>,
    /// From where on rules apply.
    pub limits: Limits,
    /// Where the way ends.
    pub until: Stage,
    /// What kernels are compiled for.
    pub machine: Machine,
}

impl Default for Options {
    fn default() -> Self {
        Options { without: vec![], limits: Limits::default(), until: Stage::Llvm, machine: Machine::default() }
    }
}

/// What [`Options::without`] takes, beside `all`.
pub fn rules() -> Vec<&'static str> {
    RULES.iter().map(|(name, ..)| *name).chain(["remat", "epilogue"]).collect()
}

/// How long each stage took.
pub type Timings = Vec<(&'static str, Duration)>;

/// What came out: the graphs at the stage asked for, and kernels if the way went so far.
pub struct Compiled {
    pub graphs: Vec<Graph>,
    pub lowered: Option<Lowered>,
    /// By graph, if the way went so far.
    pub remade: Vec<Remade>,
    pub timings: Timings,
}

/// Every stage in order; the verifier runs after each one.
pub fn run(dialect: &Dialect, model: &Model, entries: &[Entry], options: &Options) -> Result<Compiled, Error> {
    let rule = |name: &str| !options.without.iter().any(|w| w == name || w == "all");
    let trains = |e: Entry| differentiates(e) && model.params.iter().any(|p| p.trainable != Trainable::No);

    let mut way = Way::new(dialect, model, entries, options.until)?;
    way.pass(Stage::Peft, "peft", |_, equations| Ok(equations))?;
    way.pass(Stage::Grad, "inference", |entry, g| if differentiates(entry) { Ok(g) } else { inference(&g) })?;
    way.pass(Stage::Grad, "partition", |_, g| partition(&g))?;
    way.pass(Stage::Grad, "grad", |entry, g| if trains(entry) { differentiate(&g) } else { settle(&g) })?;
    way.pass(Stage::Fused, "fused", |_, g| fuse(&g, rule, &options.limits))?;
    let mut remade = vec![];
    way.pass(Stage::Fused, "remat", |_, g| {
        let (graph, saved) = if rule("remat") { remat(&g, &options.limits)? } else { (g, Remade::default()) };
        remade.push(saved);
        Ok(graph)
    })?;
    way.pass(Stage::Fused, "siblings", |_, g| join(&g))?;
    let Options { machine, limits, .. } = *options;
    let (precision, optimizer, epilogues) = (model.train.precision, model.train.optimizer, rule("epilogue"));
    way.lower(model, remade, lower::Options { machine, precision, optimizer, epilogues, limits })
}

/// Entries on their way.
struct Way<'d> {
    dialect: &'d Dialect,
    entries: Vec<Entry>,
    graphs: Vec<Graph>,
    until: Stage,
    timings: Timings,
}

impl<'d> Way<'d> {
    fn new(dialect: &'d Dialect, model: &Model, entries: &[Entry], until: Stage) -> Result<Self, Error> {
        let graph = |e: &Entry| equations(*e, model).map_err(|message| Error::Refused { entry: e.name(), message });
        let graphs = entries.iter().map(graph).collect::<Result<_, _>>()?;
        Ok(Way { dialect, entries: entries.to_vec(), graphs, until, timings: vec![] })
    }

    /// Takes every entry through a pass that belongs to `stage`, unless the way ends before it.
    fn pass(
        &mut self,
        stage: Stage,
        name: &'static str,
        mut pass: impl FnMut(Entry, Graph) -> Result<Graph, String>,
    ) -> Result<(), Error> {
        if self.until < stage {
            return Ok(());
        }
        let begun = Instant::now();
        let blame = |message| Error::Invalid { stage: name.into(), message };
        let graphs = std::mem::take(&mut self.graphs).into_iter().zip(&self.entries);
        self.graphs = graphs.map(|(graph, &entry)| pass(entry, graph)).collect::<Result<_, _>>().map_err(blame)?;
        self.dialect.verify(name, &self.graphs.iter().collect::<Vec<_>>())?;
        self.timings.push((name, begun.elapsed()));
        Ok(())
    }

    fn lower(mut self, model: &Model, remade: Vec<Remade>, options: lower::Options) -> Result<Compiled, Error> {
        let mut lowered = None;
        if self.until >= Stage::Loops {
            let begun = Instant::now();
            let named: Vec<(&str, &Graph)> = self.graphs.iter().map(|g| (g.name.as_str(), g)).collect();
            // Whatever the checker takes is lowered for every machine.
            let blame = |message| Error::Invalid { stage: "loops".into(), message };
            let mut made = lower(&named, &tensors(model), options).map_err(blame)?;
            made.manifest.limits = limits(model);
            lowered = Some(made);
            self.timings.push(("loops", begun.elapsed()));
        }
        Ok(Compiled { graphs: self.graphs, lowered, remade, timings: self.timings })
    }
}

/// Prints what `options.until` asked for, in a form that reads back.
pub fn emit(dialect: &Dialect, compiled: &Compiled, stage: Stage, locations: bool) -> Result<String, Error> {
    let graphs: Vec<&Graph> = compiled.graphs.iter().collect();
    match (stage, &compiled.lowered) {
        (Stage::Loops, Some(lowered)) => codegen::loops(dialect, &lowered.kernels(), lowered.machine),
        (Stage::Llvm, Some(lowered)) => codegen::llvm(dialect, &lowered.kernels(), lowered.machine),
        (Stage::Ptx, Some(lowered)) => codegen::ptx(dialect, &lowered.kernels(), lowered.machine),
        _ if locations => dialect.print_with_locations(&graphs),
        _ => dialect.print(&graphs),
    }
}

/// What a batch's integers must be: within the tables that they index, and no position beyond the longest sequence.
pub fn limits(model: &Model) -> Vec<Limit> {
    let Backbone { longest, skipped, .. } = &model.backbone;
    let mut limits: Vec<Limit> = vec![];
    for Bound { input, rows, table } in model.graph.bounds() {
        let except = skipped.filter(|_| input == Input::Ids.name());
        limits.push(Limit { input, below: lower::dim_extent(rows), of: table, except });
    }
    limits.extend(longest.map(|most| Limit {
        input: Input::Positions.name().into(),
        below: Extent::Const(most),
        of: "positions of this model's longest sequence".into(),
        except: None,
    }));
    limits
}

/// The model's tensors as the artifact wants them.
pub fn tensors(model: &Model) -> Vec<Tensor> {
    let tensor = |p: &peft_grammar::model::Param| Tensor {
        name: p.name.clone(),
        shape: p.shape.clone(),
        trainable: p.trained_rows(),
        decay: p.decay,
        lr_factor: p.lr_factor(&model.train),
    };
    model.params.iter().map(tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::cpu::Cpu;
    use crate::target::cuda::Chip;

    /// A tensor that the graph reads and no parameter is: for no machine the user's fault.
    #[test]
    fn faults_of_lowering() {
        let (dialect, entries) = (Dialect::new().unwrap(), [Entry::Train]);
        let mut model = peft_grammar::check("spec", "model = gpt2(layers: 1)\n", &peft_grammar::no_imports).unwrap();
        let lacking = model.params.pop().unwrap().name;
        for machine in [Machine::Cpu(Cpu::Native), Machine::Cuda(Chip::Sm70)] {
            let options = Options { machine, until: Stage::Loops, ..Options::default() };
            match run(&dialect, &model, &entries, &options) {
                Err(Error::Invalid { stage, message }) => {
                    assert_eq!(
                        (&stage[..], message),
                        ("loops", format!("the manifest lacks `{lacking}`")),
                        "{machine}"
                    );
                }
                Err(error) => panic!("{machine}: {error}"),
                Ok(_) => panic!("{machine}: `{lacking}` is not missed"),
            }
        }
    }
}
