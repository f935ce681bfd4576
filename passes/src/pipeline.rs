//! The pipeline: the passes that take a model from its equations to kernels, in order.

use std::time::{Duration, Instant};

use peft_grammar::bounds::InputBound;
use peft_grammar::graph::Graph;
use peft_grammar::model::{Backbone, Init, Model, Param, Trainable};
pub use peft_grammar::names::Entry;
use peft_grammar::names::{Input, LOGITS, LOSS};
use peft_runtime::artifact::{Extent, Limit, Tensor};

use crate::dialect::Dialect;
use crate::fold::fold;
use crate::fuse::{RULES, Thresholds, fuse};
use crate::gradient::{differentiate, drop_detach};
use crate::inference::inference;
use crate::lower::{self, Lowered, lower};
use crate::multi_output::merge_siblings;
use crate::partition::partition;
use crate::remat::{RematSavings, remat};
use crate::rewrite::live;
use crate::target::Machine;
use crate::{Error, codegen};

/// The forms of a model between its text and its kernels, as `--emit` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Syntax with spans, nothing resolved.
    Ast,
    /// Names resolved, methods expanded at their sites, shapes known, the trainable set decided.
    Model,
    /// The equations as written, in the `peft` dialect.
    Peft,
    /// The same with derivatives.
    Grad,
    /// After the fusion rules.
    Fused,
    /// The launches, each with the operations that its kernel computes.
    Kernels,
    /// Kernels in `scf`, `vector` and `memref`.
    Loops,
    /// Kernels in the `llvm` dialect.
    Llvm,
    /// The text that a GPU's driver compiles.
    Ptx,
}

impl Stage {
    /// Every stage in order, with its name.
    pub const ALL: [(Stage, &str); 9] = [
        (Stage::Ast, "ast"),
        (Stage::Model, "model"),
        (Stage::Peft, "peft"),
        (Stage::Grad, "grad"),
        (Stage::Fused, "fused"),
        (Stage::Kernels, "kernels"),
        (Stage::Loops, "loops"),
        (Stage::Llvm, "llvm"),
        (Stage::Ptx, "ptx"),
    ];
}

/// The entries that the model's artifact has.
pub fn artifact_entries(model: &Model) -> Vec<Entry> {
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

/// The options of the pipeline.
#[derive(Clone, Debug)]
pub struct Options {
    /// The names of fusion rules to leave out; `all` leaves out every one.
    pub without: Vec<String>,
    /// The sizes from which on rules apply.
    pub thresholds: Thresholds,
    /// The last stage.
    pub until: Stage,
    /// The machine that kernels are compiled for.
    pub machine: Machine,
}

impl Default for Options {
    fn default() -> Self {
        Options { without: vec![], thresholds: Thresholds::default(), until: Stage::Llvm, machine: Machine::default() }
    }
}

/// The names that [`Options::without`] takes, besides `all`.
pub fn rules() -> Vec<&'static str> {
    RULES.iter().map(|(name, ..)| *name).chain(["remat", "epilogue"]).collect()
}

/// A pass from one graph of the dialect to the next.
pub struct Pass {
    /// As `peftc opt --passes` and `--timings` name it.
    pub name: &'static str,
    /// What the graph is once this pass and those before it have run.
    pub stage: Stage,
    /// One sentence for people.
    pub description: &'static str,
    entries: Entries,
    run: fn(&Graph, &mut Context) -> Result<Graph, String>,
}

/// The entries that a pass runs on.
#[derive(Clone, Copy)]
enum Entries {
    All,
    /// Those of training, if anything trains: gradients are computed.
    Differentiated,
    /// Those in which no gradient is computed.
    NotDifferentiated,
    /// Those that are not for training, whether anything trains or not: they have no dropout.
    Evaluated,
}

/// What passes know besides the graph.
pub struct Context {
    /// Names of fusion rules to leave out, as [`Options::without`].
    pub without: Vec<String>,
    /// The sizes from which on rules apply.
    pub thresholds: Thresholds,
    /// By graph, what rematerialisation saved.
    pub savings: Vec<RematSavings>,
}

impl Context {
    fn enabled(&self, rule: &str) -> bool {
        !self.without.iter().any(|w| w == rule || w == "all")
    }
}

/// Every pass between the equations and the kernels, in order. The verifier runs after each one that changes a graph.
#[rustfmt::skip]
pub const PASSES: [Pass; 7] = [
    Pass { name: "inference", stage: Stage::Grad, entries: Entries::Evaluated, run: |g, _| inference(g),
        description: "removes dropout and label smoothing" },
    Pass { name: "partition", stage: Stage::Grad, entries: Entries::All, run: |g, _| partition(g),
        description: "splits tensors of which some rows train into frozen and trainable rows" },
    Pass { name: "grad", stage: Stage::Grad, entries: Entries::Differentiated, run: |g, _| differentiate(g),
        description: "appends the gradient of `loss` by every trainable tensor" },
    Pass { name: "drop_detach", stage: Stage::Grad, entries: Entries::NotDifferentiated, run: |g, _| drop_detach(g),
        description: "removes `detach`, which only differentiation reads" },
    Pass { name: "fuse", stage: Stage::Fused, entries: Entries::All, run: fuse_all,
        description: "applies the fusion rules to a fixed point" },
    Pass { name: "remat", stage: Stage::Fused, entries: Entries::All, run: rematerialise,
        description: "recomputes cheap values in the backward pass instead of keeping them" },
    Pass { name: "multi_output", stage: Stage::Fused, entries: Entries::All, run: |g, _| merge_siblings(g),
        description: "merges operations that one kernel computes together" },
];

fn fuse_all(graph: &Graph, context: &mut Context) -> Result<Graph, String> {
    fuse(graph, |rule| context.enabled(rule), &context.thresholds)
}

fn rematerialise(graph: &Graph, context: &mut Context) -> Result<Graph, String> {
    let skipped = || (graph.clone(), RematSavings::default());
    let (graph, saved) = if context.enabled("remat") { remat(graph, &context.thresholds)? } else { skipped() };
    context.savings.push(saved);
    Ok(graph)
}

/// The name and the description of rewriting without a rule, which every fusion rule includes.
const CANONICALIZE: (&str, &str) = ("canonicalize", "merges common subexpressions and removes dead operations");

/// What `peftc opt --passes` takes, with a description: every pass, and every fusion rule by itself.
pub fn pass_names() -> Vec<(&'static str, &'static str)> {
    let passes = PASSES.iter().map(|pass| (pass.name, pass.description));
    let rules = RULES.iter().map(|(name, description, _)| (*name, *description));
    [CANONICALIZE].into_iter().chain(passes).chain(rules).collect()
}

/// Runs a pass or a fusion rule, by its name, on one graph.
///
/// # Errors
/// A name that [`pass_names`] lacks, and what the pass refuses.
pub fn apply(name: &str, graph: &Graph, context: &mut Context) -> Result<Graph, String> {
    if let Some(pass) = PASSES.iter().find(|pass| pass.name == name) {
        return (pass.run)(graph, context);
    }
    if name != CANONICALIZE.0 && RULES.iter().all(|(rule, ..)| *rule != name) {
        return Err(format!("no pass is called `{name}`"));
    }
    fuse(graph, |rule| rule == name, &context.thresholds)
}

/// How long each stage took.
pub type Timings = Vec<(&'static str, Duration)>;

/// The result of [`run`]: the graphs at the stage asked for, and kernels if it is a later one.
pub struct Compiled {
    /// By entry.
    pub graphs: Vec<Graph>,
    /// Kernels and launches, from [`Stage::Kernels`] on.
    pub lowered: Option<Lowered>,
    /// By graph, from [`Stage::Fused`] on.
    pub savings: Vec<RematSavings>,
    /// By pass, in order.
    pub timings: Timings,
}

/// Takes the model's entries through every pass up to the stage asked for.
///
/// # Errors
/// An entry that the model cannot have, and faults of the compiler.
pub fn run(dialect: &Dialect, model: &Model, entries: &[Entry], options: &Options) -> Result<Compiled, Error> {
    let mut manager = PassManager::new(dialect, model, entries, options)?;
    for pass in &PASSES {
        if pass.stage <= options.until {
            manager.run(pass)?;
        }
    }
    manager.lower(model, options)
}

/// Takes the graphs of all entries through passes, with the verifier after each one.
struct PassManager<'d> {
    dialect: &'d Dialect,
    graphs: Vec<(Entry, Graph)>,
    /// Anything trains.
    trains: bool,
    context: Context,
    timings: Timings,
}

impl<'d> PassManager<'d> {
    /// Begins with the equations as they are written.
    fn new(dialect: &'d Dialect, model: &Model, entries: &[Entry], options: &Options) -> Result<Self, Error> {
        let begun = Instant::now();
        let graph = |&e: &Entry| match equations(e, model) {
            Ok(graph) => Ok((e, graph)),
            Err(message) => Err(Error::Refused { entry: e.name(), message }),
        };
        let graphs = entries.iter().map(graph).collect::<Result<Vec<_>, _>>()?;
        dialect.verify("peft", &graphs.iter().map(|(_, graph)| graph).collect::<Vec<_>>())?;
        let trains = model.params.iter().any(|p| p.trainable != Trainable::No);
        let (without, thresholds) = (options.without.clone(), options.thresholds);
        let context = Context { without, thresholds, savings: vec![] };
        Ok(PassManager { dialect, graphs, trains, context, timings: vec![("peft", begun.elapsed())] })
    }

    fn run(&mut self, pass: &Pass) -> Result<(), Error> {
        let begun = Instant::now();
        let blame = |message| Error::Invalid { stage: pass.name.into(), message };
        let mut changed = vec![];
        for (entry, graph) in &mut self.graphs {
            let differentiated = differentiates(*entry) && self.trains;
            let applies = match pass.entries {
                Entries::All => true,
                Entries::Differentiated => differentiated,
                Entries::NotDifferentiated => !differentiated,
                Entries::Evaluated => !differentiates(*entry),
            };
            if applies {
                let next = (pass.run)(graph, &mut self.context).map_err(blame)?;
                if next != *graph {
                    *graph = next;
                    changed.push(&*graph);
                }
            }
        }
        self.dialect.verify(pass.name, &changed)?;
        self.timings.push((pass.name, begun.elapsed()));
        Ok(())
    }

    fn lower(mut self, model: &Model, options: &Options) -> Result<Compiled, Error> {
        let mut lowered = None;
        if options.until >= Stage::Kernels {
            let begun = Instant::now();
            let Options { machine, thresholds, .. } = *options;
            let (precision, optimizer) = (model.train.precision, model.train.optimizer);
            let epilogues = self.context.enabled("epilogue");
            let options = lower::Options { machine, precision, optimizer, epilogues, thresholds };
            let named: Vec<(&str, &Graph)> = self.graphs.iter().map(|(_, g)| (g.name.as_str(), g)).collect();
            // The checker accepts nothing that a machine's lowering refuses: an error here is the compiler's.
            let blame = |message| Error::Invalid { stage: "loops".into(), message };
            let mut made = lower(&named, &tensors(model), options).map_err(blame)?;
            made.manifest.limits = limits(model);
            lowered = Some(made);
            self.timings.push(("loops", begun.elapsed()));
        }
        let graphs = self.graphs.into_iter().map(|(_, graph)| graph).collect();
        Ok(Compiled { graphs, lowered, savings: self.context.savings, timings: self.timings })
    }
}

/// Prints what `options.until` asked for. Graphs are printed in a form that reads back; with a `site`, only those of its
/// operations.
///
/// # Errors
/// Faults of the compiler that the verifier finds.
pub fn emit(
    dialect: &Dialect,
    compiled: &Compiled,
    stage: Stage,
    site: Option<&str>,
    locations: bool,
) -> Result<String, Error> {
    let parts: Vec<Graph> = site.iter().flat_map(|site| compiled.graphs.iter().map(|g| g.at_site(site))).collect();
    let graphs: Vec<&Graph> = if site.is_some() { &parts } else { &compiled.graphs }.iter().collect();
    match (stage, &compiled.lowered) {
        (Stage::Kernels, Some(lowered)) => Ok(lowered.listing(site)),
        (Stage::Loops, Some(lowered)) => codegen::loops(dialect, &lowered.kernels(), lowered.machine),
        (Stage::Llvm, Some(lowered)) => codegen::llvm(dialect, &lowered.kernels(), lowered.machine),
        (Stage::Ptx, Some(lowered)) => codegen::ptx(dialect, &lowered.kernels(), lowered.machine),
        _ if locations => dialect.print_with_locations(&graphs),
        _ => dialect.print(&graphs),
    }
}

/// The range of each integer input of a batch: its indices lie within the tables that they index, and no position lies
/// beyond the longest sequence.
pub fn limits(model: &Model) -> Vec<Limit> {
    let Backbone { max_sequence_tokens, position_skip_id, .. } = &model.backbone;
    let mut limits: Vec<Limit> = vec![];
    for InputBound { input, rows, table } in model.graph.bounds() {
        let except = position_skip_id.filter(|_| input == Input::Ids.name());
        limits.push(Limit { input, below: lower::dim_extent(rows), of: table, except });
    }
    limits.extend(max_sequence_tokens.map(|most| Limit {
        input: Input::Positions.name().into(),
        below: Extent::Const(most),
        of: "positions of this model's longest sequence".into(),
        except: None,
    }));
    limits
}

/// The model's tensors, as the artifact lists them.
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

    /// The graph reads a tensor that is no parameter. On every machine that is a fault of the compiler.
    #[test]
    fn missing_tensor_is_a_fault_of_the_compiler() {
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
