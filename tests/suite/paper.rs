//! Every kernel of the paper's specs, in PTX against the CPU. Models with the same methods but smaller sizes run; the
//! tests check that they use all kernels of the full models.

use std::collections::HashSet;
use std::hash::Hash;
use std::path::{Path, PathBuf};

use peft_grammar::graph::Op;
use peft_grammar::model::{Model, Param, Precision};
use peft_grammar::names::{LOSS, Vector};
use peft_passes::dialect::Dialect;
use peft_passes::fuse::Thresholds;
use peft_passes::kernels::attention::shape::AttentionParams;
use peft_passes::kernels::elementwise::{self, Expression};
use peft_passes::kernels::epilogue::Epilogue;
use peft_passes::kernels::rowwise::RowStorage;
use peft_passes::kernels::{FloatBits, Function, Schedule};
use peft_passes::lower::{Lowered, link};
use peft_passes::pipeline::{self, Entry, Options};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Chip;
use peft_runtime::artifact::Tensor;
use peft_runtime::{Inputs, Numbers, Session};
use peftc::data::{Batch, Example, Goal};
use peftc::exchange;

use crate::ptx::{self, InterpretedGpu};
use crate::{env_or_skip, method_pairs, parity};

/// The entries of training and evaluation.
const ENTRIES: [Entry; 2] = [Entry::Eval, Entry::Train];

/// A spec of the paper, possibly with parts of its text replaced.
pub struct Spec {
    pub name: String,
    source: String,
}

/// Specs whose kernels are all used by the MAM adapter, which combines the two methods.
const LIKE_OTHERS: [&str; 2] = ["sst2/adapter.peft", "sst2/prefix.peft"];

/// The paper's specs. CoQA's specs are those of WebNLG with other data, and MNLI's are those of SST-2.
pub fn specs() -> Vec<Spec> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/paper");
    let list = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).expect("a folder");
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths
    };
    let spec = |path: PathBuf| Spec {
        name: path.strip_prefix(&folder).expect("below it").display().to_string(),
        source: std::fs::read_to_string(&path).expect("readable"),
    };
    let parts = ["sst2", "webnlg"].map(|part| folder.join(part));
    let paths = parts.iter().flat_map(|part| list(part));
    let same = |path: &PathBuf| LIKE_OTHERS.iter().any(|like| path.ends_with(like));
    paths.filter(|path| env_or_skip("PEFTC_FULL").is_some() || !same(path)).map(spec).collect()
}

impl Spec {
    fn with(&self, old: &str, new: &str) -> Spec {
        assert!(self.source.contains(old), "{} without `{old}`", self.name);
        Spec { name: self.name.clone(), source: self.source.replace(old, new) }
    }

    /// The spec with three of its twelve layers. Inner layers are alike, so three have every kernel.
    pub fn shallow(&self) -> Spec {
        self.with("layers: 12", "layers: 3")
    }

    /// The spec with small sizes: head sizes of 64 for generation and 8 for classification, and with an inducer also
    /// 36. Widths are not multiples of a tile, but large enough for the tiles of a large model.
    pub fn small(&self) -> Vec<Spec> {
        const WIDTHS: &str = "layers: 12, hidden: 768, heads: 12, ffn: 3072";
        if self.source.contains("= gpt2(") {
            let spec =
                self.with(WIDTHS, "layers: 2, hidden: 192, heads: 3, ffn: 168").with("vocab: 50273", "vocab: 181");
            return vec![match spec.source.contains("rows 50257") {
                true => spec.with("rows 50257..50273", "rows 165..181"),
                false => spec,
            }];
        }
        let eight = Some("layers: 2, hidden: 168, heads: 21, ffn: 176");
        let wider = self.source.contains("inducer(").then_some("layers: 2, hidden: 180, heads: 5, ffn: 172");
        let widths = [eight, wider].into_iter().flatten();
        widths.map(|widths| self.with(WIDTHS, widths).with("vocab: 50265", "vocab: 165")).collect()
    }

    pub fn model(&self) -> Model {
        let checked = peft_grammar::check(&self.name, &self.source, &peft_grammar::no_imports);
        checked.unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn lowered(&self, machine: Machine, precision: Precision, thresholds: Thresholds) -> Lowered {
        let mut model = self.model();
        model.train.precision = precision;
        let options = Options { machine, thresholds, ..Options::default() };
        let compiled = pipeline::run(&Dialect::new().expect("a dialect"), &model, &ENTRIES, &options);
        compiled.unwrap_or_else(|e| panic!("{}: {e}", self.name)).lowered.expect("the whole way")
    }
}

/// Thresholds at which small models are lowered like large ones.
pub fn thresholds() -> Thresholds {
    Thresholds {
        min_chunked_vocab: 64,
        vocab_chunk: 64,
        min_split_k_depth: 136,
        min_large_tile_columns: 65,
        ..Thresholds::default()
    }
}

/// A kernel's schedule without the constants it is specialised for.
fn kind(function: &Function) -> Schedule {
    let mut schedule = function.schedule.clone();
    match &mut schedule {
        Schedule::Elementwise(expression) => plain(expression),
        Schedule::Normalize(normalize) => {
            normalize.eps = 0.0.into();
            if let RowStorage::InRegisters(vectors) = &mut normalize.storage {
                *vectors = 0;
            }
            plain_epilogue(&mut normalize.epilogue);
        }
        Schedule::FusedRowSums(sums) => {
            sums.of.as_mut().map(plain);
            plain_epilogue(&mut sums.epilogue);
        }
        Schedule::Gemm(product) => plain_epilogue(&mut product.epilogue),
        Schedule::Simt(product) => plain_epilogue(&mut product.epilogue),
        Schedule::Skinny(product) => plain_epilogue(&mut product.epilogue),
        Schedule::Mma(product) => {
            if product.tile.async_copies() {
                product.tile.rows = 64;
            }
            plain_epilogue(&mut product.epilogue);
        }
        Schedule::LogitsChunk(chunk) => chunk.scores_per_thread = chunk.scores_per_thread.map(|_| 0),
        Schedule::CrossEntropy(loss) => loss.smoothing = number(loss.smoothing),
        Schedule::CpuAttention(attention) => attention.params = plain_params(attention.params),
        Schedule::GpuAttention(attention) => attention.params = plain_params(attention.params),
        _ => {}
    }
    schedule
}

/// Reduces a constant to whether it is 0.
fn number(x: FloatBits) -> FloatBits {
    if x.get() == 0.0 { x } else { 1.0.into() }
}

fn plain_params(params: AttentionParams) -> AttentionParams {
    AttentionParams { scale: number(params.scale), p: number(params.p), ..params }
}

fn plain_epilogue(epilogue: &mut Epilogue) {
    epilogue.groups.iter_mut().chain(&mut epilogue.companions).for_each(|group| plain(&mut group.expression));
    if let Some(sum) = &mut epilogue.sum {
        plain_epilogue(&mut sum.epilogue);
    }
}

/// Reduces an expression to its first operations. Each operation is tested separately elsewhere.
fn plain(expression: &mut Expression) {
    let Expression { leaves, steps, axes, sizes, out, .. } = expression;
    leaves.clear();
    (out.view, out.runs) = (None, vec![]);
    (*axes, *sizes) = (0, 0);
    steps.retain(|step| !matches!(step, elementwise::Step::Leaf(_) | elementwise::Step::Mean(..)));
    steps.truncate(4);
    for step in steps {
        let told = match &*step {
            elementwise::Step::Op(op, _) => {
                let op = match op {
                    Op::Constant { .. } => Op::Constant { value: 0.0, shape: vec![] },
                    Op::Scale { .. } => Op::Scale { by: 1.0 },
                    Op::Shift { .. } => Op::Shift { by: 1.0 },
                    other => other.clone(),
                };
                elementwise::Step::Op(op, vec![])
            }
            elementwise::Step::Dropout { p, single_column, .. } => {
                let (p, single_column) = (number(*p), *single_column);
                elementwise::Step::Dropout { x: 0, p, column: 0, stream: 0, single_column, rows: None }
            }
            other => other.clone(),
        };
        *step = told;
    }
}

fn kinds<'a>(lowered: impl IntoIterator<Item = &'a Lowered>) -> HashSet<Schedule> {
    lowered.into_iter().flat_map(|lowered| &lowered.functions).map(kind).collect()
}

/// A batch whose sequences fill no tile. One sequence is a single token.
pub fn batch(model: &Model) -> Batch {
    let generates = model.task.kind.generates();
    let sequence = |(s, length, class): (i32, i32, i32)| Example {
        ids: (0..length).map(|i| (37 * s + 11 * i + 5) % 165).collect(),
        // Token types and labels include special tokens, whose rows train.
        types: (0..length).map(|i| if generates { 160 + (3 * s + i) % 20 } else { 0 }).collect(),
        goal: Goal::Class(class),
    };
    let batch = Batch::pack([(0, 9, 1), (1, 1, 0), (2, 13, 1)].map(sequence));
    if !generates {
        return batch;
    }
    Batch { targets: vec![4, 6, 9, 11, 12, 21], labels: vec![7, 180, 0, 164, 165, 33], ..batch }
}

/// Random values from N(0, 0.2²) for all tensors, also those that are initialised to zero. The input of a relu is
/// shifted by 3 or −3, because otherwise a rounding could change its sign.
pub fn weights(model: &Model) -> Vec<Numbers> {
    let tensor = |(tensor, param): (usize, &Param)| {
        let gate = |i: usize| match (param.name.ends_with(".adapter.down.bias"), i % 2) {
            (false, _) => 0.0,
            (true, 0) => 3.0,
            (true, _) => -3.0,
        };
        let numbers = method_pairs::normal(0.2, 7, tensor, param.elements() as usize).into_iter().enumerate();
        Numbers::from(&numbers.map(|(i, x)| (x + gate(i)) as f32).collect::<Vec<f32>>()[..])
    };
    model.params.iter().enumerate().map(tensor).collect()
}

/// Runs an evaluation and a training step.
pub fn run(session: &mut Session, inputs: &Inputs) {
    for entry in ENTRIES.map(Entry::name) {
        session.run(entry, inputs).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// The largest absolute value, or NaN if there is one. `f32::max` would ignore NaN.
pub fn largest(numbers: impl IntoIterator<Item = f32>) -> f32 {
    numbers.into_iter().fold(0.0, |m: f32, x| if x.abs() > m || x.is_nan() { x.abs() } else { m })
}

/// The name of a tensor and its gradient.
type Gradient = (String, Vec<f32>);

/// The results of a step with dropout.
struct Step {
    loss: f32,
    gradients: Vec<Gradient>,
}

impl Step {
    fn of(mut session: Session, inputs: &Inputs) -> Step {
        session.poison = true;
        run(&mut session, inputs);
        let loss = session.output(LOSS).expect("an output").1[0];
        let all = session.flat(Vector::Gradients).expect("read");
        let mut rest = &all[..];
        let trained = session.manifest().tensors.iter().filter_map(|t| Some((t, t.trainable?)));
        let gradient = |(tensor, (start, end)): (&Tensor, (u64, u64))| {
            let own = rest.split_off(..((end - start) * tensor.row()) as usize).expect("as long");
            (tensor.name.clone(), own.to_vec())
        };
        Step { loss, gradients: trained.map(gradient).collect() }
    }

    /// The differences to `other`: the loss relatively, and each gradient relative to its largest value plus a
    /// hundredth of the largest of all gradients, which matters for gradients that are only rounding errors.
    fn gaps<'a>(&'a self, other: &'a Step) -> impl Iterator<Item = (&'a str, f32)> {
        let all = largest(other.gradients.iter().flat_map(|(_, x)| x).copied());
        assert!(all > 0.0);
        let gap = move |((name, x), (_, y)): (&'a Gradient, &'a Gradient)| {
            let apart = largest(x.iter().zip(y).map(|(x, y)| x - y));
            (name.as_str(), apart / (largest(y.iter().copied()) + 0.01 * all))
        };
        let loss = (self.loss - other.loss).abs() / other.loss;
        std::iter::once((LOSS, loss)).chain(self.gradients.iter().zip(&other.gradients).map(gap))
    }
}

/// Bounds for the relative differences of a step.
#[derive(Clone, Copy)]
struct Bounds {
    loss: f32,
    gradient: f32,
}

const SINGLE: Bounds = Bounds { loss: 1e-5, gradient: 1e-5 };

impl Bounds {
    fn of(&self, name: &str) -> f32 {
        if name == LOSS { self.loss } else { self.gradient }
    }
}

/// Compares steps on the simulated GPU with the CPU's. In half precision the bounds are for whole steps;
/// `half_precision.rs` bounds single gemms. In the full tests every spec runs, otherwise as few as have every kernel
/// together.
fn every_kernel_runs(chip: Chip, precision: Precision, bounds: Bounds) {
    let machine = Machine::Cuda(chip);
    let small: Vec<Spec> = specs().iter().flat_map(Spec::small).collect();
    let lowered: Vec<Lowered> = small.iter().map(|spec| spec.lowered(machine, precision, thresholds())).collect();
    let large = specs().into_iter().map(|spec| spec.shallow().lowered(machine, precision, Thresholds::default()));
    let (ran, wanted) = (kinds(&lowered), kinds(&large.collect::<Vec<_>>()));
    let left: Vec<&Schedule> = wanted.difference(&ran).collect();
    assert!(left.is_empty() && wanted.len() > 150, "in {precision:?} no small model has {left:?}");

    let mut pairs: Vec<(Spec, Lowered)> = small.into_iter().zip(lowered).collect();
    if env_or_skip("PEFTC_FULL").is_none() {
        pairs = covering(pairs, |(_, lowered)| kinds(std::slice::from_ref(lowered)));
    }
    // The module holds the kernels of all specs, because most are shared.
    let module = ptx::module(&link(pairs.iter_mut().map(|(_, lowered)| lowered)), machine);
    let processor = |(spec, _): &(Spec, _)| spec.lowered(Machine::default(), Precision::F32, thresholds());
    let processor = parity::programs(pairs.iter().map(processor).collect());
    let mut wrong = vec![];
    for ((spec, lowered), program) in pairs.into_iter().zip(processor) {
        let model = spec.model();
        let inputs = exchange::inputs(&batch(&model), [3, 5]);
        let want = Step::of(Session::new(program, weights(&model), 2).expect("a session"), &inputs);
        let backend = InterpretedGpu::new(module.clone(), &lowered.manifest);
        let session = Session::with_backend(Box::new(backend), lowered.manifest, weights(&model)).expect("a session");
        let step = Step::of(session, &inputs);
        let beyond = |&(name, gap): &(&str, f32)| gap.is_nan() || gap > bounds.of(name);
        let all: Vec<(&str, f32)> = step.gaps(&want).collect();
        println!("{}: {:.1e} at most", spec.name, all.iter().fold(0.0, |m: f32, (_, gap)| m.max(*gap)));
        let found = all.into_iter().filter(beyond);
        wrong.extend(found.map(|(name, gap)| format!("{}: `{name}` is off by {gap:.1e}", spec.name)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A greedy set cover: repeatedly takes the item that adds most, until the items have everything that all have
/// together.
pub fn covering<T, K: Eq + Hash>(all: Vec<T>, has: impl Fn(&T) -> HashSet<K>) -> Vec<T> {
    let mut left: Vec<(T, HashSet<K>)> = all
        .into_iter()
        .map(|one| {
            let kinds = has(&one);
            (one, kinds)
        })
        .collect();
    let mut chosen = vec![];
    loop {
        // Among equals the first is taken.
        let most = (0..left.len()).rev().max_by_key(|&i| left[i].1.len());
        match most {
            Some(most) if !left[most].1.is_empty() => {
                let (one, has) = left.remove(most);
                left.iter_mut().for_each(|(_, lacking)| lacking.retain(|kind| !has.contains(kind)));
                chosen.push(one);
            }
            _ => return chosen,
        }
    }
}

#[test]
fn every_kernel_on_sm_70_matches_the_cpu() {
    every_kernel_runs(Chip::Sm70, Precision::F32, SINGLE);
}

#[test]
fn every_kernel_on_sm_70_in_f16_is_close_to_the_cpu() {
    every_kernel_runs(Chip::Sm70, Precision::Bf16, Bounds { loss: 1e-3, gradient: 5e-3 });
}

/// On sm_80 half precision is bf16, with eight bits of mantissa.
#[test]
fn every_kernel_on_sm_80_matches_the_cpu() {
    if env_or_skip("PEFTC_FULL").is_none() {
        return;
    }
    every_kernel_runs(Chip::Sm80, Precision::F32, SINGLE);
    every_kernel_runs(Chip::Sm80, Precision::Bf16, Bounds { loss: 8e-3, gradient: 3e-2 });
}
