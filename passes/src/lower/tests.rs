//! Tests that hold every compiled operation against the interpreter. Launches run one unit at a time over buffers
//! filled with NaN, so that a kernel fails if its units depend on each other or if it reads uninitialised memory.

pub(crate) mod cuda;

use std::borrow::Borrow;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};

use peft_grammar::graph::{Arg, DType, Dim, Graph, Location, Op, Role, Type, Value};
use peft_grammar::model::Precision;
use peft_runtime::artifact::{Buffer, Element, Launch, Manifest, Sizes, Storage, Tensor};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::{Lowered, Options, link, lower};
use crate::codegen;
use crate::fuse::{Thresholds, fuse};
use crate::gradient::differentiate;
use crate::interpret::{self, Batch, Data};
use crate::multi_output::merge_siblings;
use crate::target::Machine;
use crate::target::cpu::{Cpu, Level};
use crate::target::cuda::Chip;
use crate::tests::samples::{arguments, cases, language_head, single};

#[repr(C)]
struct Memory {
    allocated: *mut u32,
    aligned: *mut u32,
    offset: i64,
    size: i64,
    stride: i64,
}

/// Guard words before and after each buffer, which no kernel may write.
const GUARD: usize = 64;
const UNTOUCHED: u32 = 0x7fa5_5aa5;

/// Calls a kernel with buffers, each with its length, followed by its sizes and its range of units.
pub(crate) fn call(library: &libloading::Library, name: &str, buffers: &[(*mut u32, usize)], numbers: &[i64]) {
    let symbol = format!("_mlir__mlir_ciface_{name}");
    // SAFETY: the symbol has the one signature every kernel has.
    let kernel = unsafe { library.get::<unsafe extern "C" fn(*mut *mut c_void)>(symbol.as_bytes()) };
    let kernel = kernel.expect("a kernel");
    let memory = |&(at, size): &(*mut u32, usize)| Memory {
        allocated: at,
        aligned: at,
        offset: 0,
        size: size as i64,
        stride: 1,
    };
    let mut memory: Vec<Memory> = buffers.iter().map(memory).collect();
    let mut pointers: Vec<*mut Memory> = memory.iter_mut().map(|m| m as *mut Memory).collect();
    let mut numbers = numbers.to_vec();
    let pointers = pointers.iter_mut().map(|p| p as *mut *mut Memory as *mut c_void);
    let mut args: Vec<*mut c_void> = pointers.chain(numbers.iter_mut().map(|n| n as *mut i64 as *mut c_void)).collect();
    // SAFETY: the arguments have the kernel's types, and they outlive the call.
    unsafe { kernel(args.as_mut_ptr()) };
}

/// Every processor level whose features this machine has.
pub(crate) fn levels() -> Vec<Cpu> {
    let here = Cpu::Native.features();
    let missing = |cpu: &Cpu| cpu.features().into_iter().find(|f| !here.contains(f));
    let levels = Level::ALL.map(|(level, _)| Cpu::Level(level));
    levels
        .into_iter()
        .filter(|cpu| missing(cpu).inspect(|f| eprintln!("skipped: {cpu}, since this machine lacks {f}")).is_none())
        .collect()
}

struct Run<'a> {
    manifest: &'a Manifest,
    library: &'a libloading::Library,
    sizes: &'a Sizes,
    /// Every buffer with its guards.
    memory: Vec<Vec<u32>>,
}

impl Run<'_> {
    fn launch(&mut self, launch: &Launch) {
        let name = &self.manifest.kernels[launch.kernel];
        for unit in 0..launch.units.eval(self.sizes) as i64 {
            let places = launch.buffers.iter().map(|&b| {
                let memory = &mut self.memory[b];
                let size = memory.len() - 2 * GUARD;
                (memory[GUARD..].as_mut_ptr(), size)
            });
            let places: Vec<(*mut u32, usize)> = places.collect();
            let sizes = launch.extents.iter().map(|e| e.eval(self.sizes) as i64);
            call(self.library, name, &places, &sizes.chain([unit, unit + 1]).collect::<Vec<_>>());
            for &buffer in &launch.buffers {
                let memory = &self.memory[buffer];
                let mut guards = memory[..GUARD].iter().chain(&memory[memory.len() - GUARD..]);
                assert!(guards.all(|&word| word == UNTOUCHED), "`{name}` writes beyond a buffer: {launch:?}");
            }
        }
    }
}

fn sizes_of(batch: &Batch, lengths: &[usize]) -> Sizes {
    Sizes {
        tokens: lengths.iter().sum::<usize>() as u64,
        sequences: lengths.len() as u64,
        targets: batch.targets as u64,
        pairs: lengths.iter().map(|n| (n * n) as u64).sum(),
        values: 0,
    }
}

/// The tolerance for sums of a few dozen terms in f32, relative to the largest result.
const CLOSE: f64 = 2e-6;
/// The tolerance for sums of thousands of terms.
const LONG: f64 = 1e-5;

/// The rows of the vocabulary in one chunk of logits.
fn vocab_chunk() -> u64 {
    Thresholds::default().vocab_chunk
}

/// The weights of a graph, as the manifest lists them.
fn tensors(graph: &Graph) -> Vec<Tensor> {
    let weights = graph.args.iter().filter(|a| a.role != Role::Input).map(|a| (a, graph.ty(a.value)));
    let tensor = |(arg, ty): (&Arg, &Type)| Tensor {
        name: arg.name.clone(),
        shape: ty.shape.iter().map(|d| d.constant().unwrap_or(0)).collect(),
        trainable: None,
        decay: false,
        lr_factor: None,
    };
    weights.map(tensor).collect()
}

/// The labels of a graph's launches, without the packing of operands.
pub(crate) fn launches(graph: &Graph, epilogues: bool) -> String {
    launches_on(Machine::default(), graph, epilogues)
}

fn launches_on(machine: Machine, graph: &Graph, epilogues: bool) -> String {
    let options = Options { machine, epilogues, ..Options::default() };
    let manifest = lower(&[("grad", graph)], &tensors(graph), options).expect("lowered").manifest;
    let launches = manifest.entries["grad"].launches.iter().map(|l| l.op.clone());
    launches.filter(|op| op != "pack").collect::<Vec<_>>().join(" ")
}

/// Graphs compiled into one library.
struct Compiled<'g> {
    graphs: &'g [(Graph, Vec<usize>)],
    manifests: Vec<Manifest>,
    library: libloading::Library,
}

/// The graphs' kernels, deduplicated, and their manifests.
fn lowered(graphs: &[(Graph, Vec<usize>)], options: Options) -> (Vec<String>, Vec<Manifest>) {
    let mut programs: Vec<Lowered> = graphs.iter().map(|(graph, _)| program(graph, options)).collect();
    let texts = link(&mut programs);
    (texts, programs.into_iter().map(|program| program.manifest).collect())
}

fn program(graph: &Graph, options: Options) -> Lowered {
    let lowered = lower(&[("grad", graph)], &tensors(graph), options);
    lowered.unwrap_or_else(|e| panic!("{}: {e}", graph.name))
}

/// Inputs for a graph, and the interpreter's results for them.
struct Case {
    batch: Batch,
    sizes: Sizes,
    args: HashMap<String, Data>,
    want: Vec<(String, Data)>,
}

impl Case {
    fn new(graph: &Graph, lengths: &[usize], limit: i32) -> Self {
        Case::of(graph, lengths, |graph, batch| arguments(graph, batch, 11, limit))
    }

    fn of(graph: &Graph, lengths: &[usize], arguments: impl Fn(&Graph, &Batch) -> HashMap<String, Data>) -> Self {
        let batch = Batch::new(lengths, 3);
        // The compiled graph computes in f32, so both start from numbers rounded to f32.
        let round = |data: Data| match data {
            Data::F64(x) => Data::F64(x.into_iter().map(|x| f64::from(x as f32)).collect()),
            ints => ints,
        };
        let args = arguments(graph, &batch);
        let args: HashMap<String, Data> = args.into_iter().map(|(k, v)| (k, round(v))).collect();
        let want = interpret::run(graph, &batch, &args).expect("interpreted");
        Case { sizes: sizes_of(&batch, lengths), batch, args, want }
    }
}

impl<'g> Compiled<'g> {
    fn new(graphs: &'g [(Graph, Vec<usize>)], cpu: Cpu, precision: Precision) -> Self {
        let machine = Machine::Cpu(cpu);
        let (texts, manifests) = lowered(graphs, Options { machine, precision, ..Options::default() });
        Compiled::of(graphs, &texts, manifests, cpu, None)
    }

    fn of(
        graphs: &'g [(Graph, Vec<usize>)],
        texts: &[String],
        manifests: Vec<Manifest>,
        cpu: Cpu,
        kept: Option<&Path>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let library = folder.path().join("kernels.so");
        codegen::compile(texts, Machine::Cpu(cpu), kept, &library).unwrap_or_else(|e| panic!("{e}"));
        // SAFETY: our own library, without constructors.
        let library = unsafe { libloading::Library::new(&library) }.expect("a library");
        Compiled { graphs, manifests, library }
    }

    /// Runs every graph and passes each output, with the interpreter's, to `judge`.
    fn run(&self, limit: i32, judge: impl FnMut(Outcome<'_>)) {
        self.run_on(|graph, batch| arguments(graph, batch, 11, limit), judge);
    }

    fn run_on(&self, arguments: impl Fn(&Graph, &Batch) -> HashMap<String, Data>, judge: impl FnMut(Outcome<'_>)) {
        let cases = self.graphs.iter().map(|(graph, lengths)| Case::of(graph, lengths, &arguments));
        self.run_cases(cases, judge);
    }

    /// Runs one case for each graph.
    fn run_cases<C: Borrow<Case>>(&self, cases: impl IntoIterator<Item = C>, mut judge: impl FnMut(Outcome<'_>)) {
        for (((graph, lengths), manifest), case) in self.graphs.iter().zip(&self.manifests).zip(cases) {
            let Case { batch, sizes, args, want } = case.borrow();
            let guarded = |words: Vec<u32>| [&[UNTOUCHED; GUARD], &words[..], &[UNTOUCHED; GUARD]].concat();
            let poison = |b: &Buffer| vec![f32::NAN.to_bits(); b.elements(sizes) as usize];
            let words = |b| content(b, manifest, lengths, args).unwrap_or_else(|| poison(b));
            let memory = manifest.buffers.iter().map(|b| guarded(words(b))).collect();
            let mut machine = Run { manifest, library: &self.library, sizes, memory };
            let entry = &manifest.entries["grad"];
            for launch in manifest.prepare.iter().chain(&entry.launches) {
                machine.launch(launch);
            }
            for (output, (name, want)) in entry.outputs.iter().zip(want) {
                assert_eq!(output.name, *name);
                assert_eq!(manifest.buffers[output.buffer].element, Element::F32);
                let words = &machine.memory[output.buffer];
                let words = &words[GUARD..words.len() - GUARD];
                let found: Vec<f32> = words.iter().map(|&x| f32::from_bits(x)).collect();
                let want = want.floats();
                assert_eq!(found.len(), want.len(), "{name} of {}", graph.nodes[0].op.name());
                judge(Outcome { graph, batch, args, name, found: &found, want });
            }
        }
    }
}

/// One output of one graph.
struct Outcome<'a> {
    graph: &'a Graph,
    batch: &'a Batch,
    args: &'a HashMap<String, Data>,
    name: &'a str,
    found: &'a [f32],
    want: &'a [f64],
}

impl Outcome<'_> {
    /// Holds each element of a product to a share of the sum of its terms' magnitudes. Returns whether any element was
    /// rounded to fewer bits than f32 has.
    fn product(self, share: f64, machine: Machine) -> bool {
        let Outcome { graph, batch, args, found, want, .. } = self;
        let absolute =
            |(name, data): (&String, &Data)| (name.clone(), Data::F64(data.floats().iter().map(|x| x.abs()).collect()));
        let sizes = interpret::run(graph, batch, &args.iter().map(absolute).collect()).expect("interpreted");
        let mut rounded = false;
        for ((found, want), size) in found.iter().zip(want).zip(sizes[0].1.floats()) {
            let error = (f64::from(*found) - want).abs();
            assert!(error <= (share + 1e-4) * size, "{found}, not {want}, on {machine}");
            rounded |= error > 1e-4 * size;
        }
        rounded
    }

    /// The same bound carried over to chunked logits, where all numbers and their means are below 1.5.
    fn chunked_logits(self, machine: Machine) {
        let Outcome { name, found, want, .. } = self;
        let share = 1.0 / 128.0 + 1e-4;
        let score = share * 3.0 * 1.5 * 1.5;
        let bound = if name == "linear_lse" { score } else { 1.5 * (2.0 * score + share) };
        for (found, want) in found.iter().zip(want) {
            assert!((f64::from(*found) - want).abs() <= bound, "{name}: {found}, not {want}, on {machine}");
        }
    }

    fn close(self, machine: Machine, tolerance: f64) {
        // The loss sums thousands of terms of either sign, so that rounding dominates it.
        if self.name != "loss" {
            self.all_close(machine, tolerance);
        }
    }

    fn all_close(&self, machine: Machine, tolerance: f64) {
        let Outcome { graph, batch, name, found, want, .. } = self;
        let scale = want.iter().filter(|x| x.is_finite()).fold(1e-3, |m: f64, x| m.max(x.abs()));
        for (i, (found, want)) in found.iter().zip(*want).enumerate() {
            let close = (f64::from(*found) - want).abs() <= tolerance * scale || f64::from(*found) == *want;
            let (op, tokens) = (&graph.nodes[0].op, batch.tokens());
            assert!(close, "{name}[{i}] of {op:?} with {tokens} tokens on {machine}: {found}, not {want}");
        }
    }
}

/// The initial content of an input's or a tensor's buffer.
fn content(buffer: &Buffer, manifest: &Manifest, lengths: &[usize], args: &HashMap<String, Data>) -> Option<Vec<u32>> {
    let derived = |name: &str| -> Option<Vec<i32>> {
        let mut offsets = vec![0];
        let (mut segments, mut pairs) = (vec![], vec![0]);
        for (s, &n) in lengths.iter().enumerate() {
            offsets.push(offsets[s] + n as i32);
            segments.extend(vec![s as i32; n]);
            (0..n).for_each(|_| pairs.push(pairs.last().expect("one") + n as i32));
        }
        match name {
            "offsets" => Some(offsets),
            "segments" => Some(segments),
            "pairs" => Some(pairs),
            _ => None,
        }
    };
    let data = match &buffer.storage {
        Storage::Input(name) => match derived(name) {
            Some(x) => Data::I32(x),
            None => args[name].clone(),
        },
        Storage::Tensor { index, .. } => args[&manifest.tensors[*index].name].clone(),
        _ => return None,
    };
    Some(match data {
        Data::F64(x) => x.iter().map(|&x| (x as f32).to_bits()).collect(),
        Data::I32(x) => x.iter().map(|&x| x as u32).collect(),
    })
}

/// Compares every output of the compiled graphs with the interpreter's.
pub(crate) fn compare(graphs: &[(Graph, Vec<usize>)], cpu: Cpu, limit: i32, tolerance: f64) {
    Compiled::new(graphs, cpu, Precision::F32).run(limit, |outcome| outcome.close(Machine::Cpu(cpu), tolerance));
}

/// A cached kernel is not compiled again, unless its file was damaged or others may have written it.
#[test]
fn machine_code_is_cached() {
    let mut graph = Graph::new("sum");
    let [x, y] = ["x", "y"].map(|name| graph.arg(name, Role::Input, None, Type::f32([Dim::Const(5)])));
    let sum = graph.push(Op::Add, &[x, y], &Location::default()).expect("fits");
    graph.outputs.push(("z".into(), sum));
    let graphs = [(graph, vec![1])];
    let (texts, manifests) = lowered(&graphs, Options::default());
    let launched = manifests[0].entries["grad"].launches[0].kernel;
    let sum = &texts[launched..=launched];
    let difference = [sum[0].replace("arith.addf", "arith.subf")];
    let folder = tempfile::tempdir().expect("a directory");
    let adds = |texts: &[String]| {
        let mut adds = false;
        let compiled = Compiled::of(&graphs, texts, manifests.clone(), Cpu::Native, Some(folder.path()));
        compiled.run(2, |outcome| {
            adds = outcome.found.iter().zip(outcome.want).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-6);
        });
        adds
    };
    let files = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder.path()).expect("a folder");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    };
    assert!(adds(sum));
    let [of_sum] = &files()[..] else { panic!("{:?}", files()) };
    assert!(!adds(&difference));
    let of_difference = files().into_iter().find(|path| path != of_sum).expect("another file");
    let code = |path: &Path| std::fs::read(path).expect("there");
    let (kept, other) = (code(of_sum), code(&of_difference));
    // The cached code runs as it is if only we can write the file.
    std::fs::write(of_sum, other).expect("written");
    assert!(!adds(sum));
    #[cfg(unix)]
    {
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(of_sum, open).expect("it is ours");
        assert!(adds(sum));
        assert!(code(of_sum) == kept);
    }
    for damaged in [&kept[..kept.len() / 2], &[&kept[..], &[0]].concat(), &kept[..10], &[]] {
        std::fs::write(of_sum, damaged).expect("written");
        assert!(adds(sum));
        assert!(code(of_sum) == kept);
    }
}

type Cases = Vec<(Graph, Vec<usize>)>;

fn operations(sizes: &[(u64, u64, u64)]) -> Cases {
    let mut graphs = vec![];
    for &(h, p, r) in sizes {
        for (op, types) in cases(h, p, r) {
            let graph = differentiate(&single(op, &types)).expect("differentiable");
            for lengths in [vec![1], vec![2, 5, 1], vec![37, 3]] {
                graphs.push((graph.clone(), lengths));
            }
        }
    }
    graphs
}

#[test]
fn every_operation_and_its_derivative_match_the_interpreter() {
    compare(&operations(&[(2, 3, 2), (3, 40, 17)]), Cpu::Native, 2, CLOSE);
}

/// The same on every processor level, with the gemms, attention and chunked logits whose kernels differ between levels.
#[test]
fn every_processor_level_matches_the_interpreter() {
    // Attention's kernels differ between levels in how columns are divided into registers.
    let parameters = [attention_parameters()[..2].to_vec(), attention_parameters()[6..10].to_vec()].concat();
    let attention = attention(&[(2, 3, 5), (1, 40, 40)], &parameters, &[vec![2, 17, 1], vec![62]]);
    let graphs = [operations(&[(3, 40, 17)]), products(), attention, chunked_logits()].concat();
    let cases: Vec<Case> = graphs.iter().map(|(graph, lengths)| Case::new(graph, lengths, 2)).collect();
    for cpu in levels() {
        let compiled = Compiled::new(&graphs, cpu, Precision::F32);
        compiled.run_cases(&cases, |outcome| outcome.close(Machine::Cpu(cpu), CLOSE));
    }
}

/// Operations without a derivative, and those that take only positive numbers.
fn forward() -> Cases {
    let mut graphs = vec![];
    let heads = Type::f32([Dim::Const(3), Dim::Tokens, Dim::Const(21)]);
    let ragged = Type::f32([Dim::Const(3), Dim::Tokens, Dim::Keys(0)]);
    for op in [Op::Attend { causal: true }, Op::AttendTransposed { causal: true }] {
        graphs.push(single(op, &[ragged.clone(), heads.clone()]));
    }
    let mut graph = Graph::new("forward");
    let at = Location::default();
    let q = graph.arg("q", Role::Frozen, None, heads.clone());
    let k = graph.arg("k", Role::Frozen, None, heads);
    let w = graph.arg("w", Role::Frozen, None, Type::f32([Dim::Const(21), Dim::Const(50)]));
    let u = graph.arg("u", Role::Frozen, None, Type::f32([Dim::Const(50)]));
    let mut push = |op: Op, operands: &[_]| graph.push(op, operands, &at).expect("fits");
    let scores = push(Op::Scores { causal: true }, &[q, k]);
    let softmax = push(Op::Softmax, &[scores]);
    let powers = push(Op::Exp, &[q]);
    let logs = push(Op::Log, &[powers]);
    let roots = push(Op::Sqrt, &[powers]);
    let inverse = push(Op::Rsqrt, &[powers]);
    let least = push(Op::Min, &[roots, inverse]);
    let quotient = push(Op::Div, &[q, powers]);
    // These depend on frozen values alone, so they are prepared once.
    let scaled = push(Op::Add, &[w, u]);
    let flipped = push(Op::Permute { axes: vec![1, 0] }, &[scaled]);
    let product = push(Op::Matmul { transpose_x: false, transpose_y: true }, &[least, flipped]);
    for (name, value) in [("scores", scores), ("softmax", softmax), ("logs", logs), ("least", least)] {
        graph.outputs.push((name.into(), value));
    }
    for (name, value) in [("quotient", quotient), ("product", product), ("flipped", flipped)] {
        graph.outputs.push((name.into(), value));
    }
    graphs.push(graph);
    let lengths = [vec![1], vec![2, 5, 1], vec![37, 3]];
    let all = graphs.iter().flat_map(|g| lengths.iter().map(|l| (g.clone(), l.clone())));
    all.collect()
}

#[test]
fn operations_without_derivatives_match_the_interpreter() {
    compare(&forward(), Cpu::Native, 2, CLOSE);
}

/// Products of sizes just below, at and above the tiles, the rows of a unit and the blocks along k, with operands in
/// either order, frozen and not, and with several batches.
fn products() -> Cases {
    let mut graphs = vec![];
    let sizes = [(1, 1, 1), (1, 520, 130), (4, 3, 65), (7, 384, 5), (15, 1, 17), (29, 5, 16), (28, 385, 1)];
    for (m, k, n) in sizes.into_iter().chain([(113, 9, 33), (225, 6, 12), (14, 300, 32), (2, 771, 7)]) {
        for (transpose_x, transpose_y) in [(false, false), (false, true), (true, false), (true, true)] {
            let op = Op::Matmul { transpose_x, transpose_y };
            let turned = |a, b, turned| if turned { [b, a] } else { [a, b] };
            let (x, y) = (turned(m, k, transpose_x), turned(k, n, transpose_y));
            for heads in [None, Some(2)] {
                let ty =
                    |shape: [u64; 2]| Type::f32(heads.into_iter().chain(shape).map(Dim::Const).collect::<Vec<_>>());
                graphs.push((differentiate(&single(op.clone(), &[ty(x), ty(y)])).expect("differentiable"), vec![1]));
            }
            let mut graph = Graph::new("frozen");
            let ty = |shape: [u64; 2]| Type::f32(shape.map(Dim::Const));
            let (x, y) = (graph.arg("x", Role::Input, None, ty(x)), graph.arg("y", Role::Frozen, None, ty(y)));
            let z = graph.push(op, &[x, y], &Location::default()).expect("fits");
            graph.outputs.push(("z".into(), z));
            graphs.push((graph, vec![1]));
        }
    }
    graphs
}

#[test]
fn products_of_sizes_around_the_tiles_match_the_interpreter() {
    compare(&products(), Cpu::Native, 2, CLOSE);
}

type Push<'a> = dyn FnMut(Op, &[Value]) -> Value + 'a;

/// Products with elementwise readers, each with the expected labels of its launches.
fn followed(d: u64, n: u64) -> Vec<(Graph, &'static str)> {
    let mut all = vec![];
    let mut graph = |name: &str, launches: &'static str, write: &dyn Fn(&mut Push, [Value; 7])| {
        let mut graph = Graph::new(name);
        let rows = |width| Type::f32([Dim::Tokens, Dim::Const(width)]);
        let x = graph.arg("x", Role::Input, None, rows(d));
        let w = graph.arg("w", Role::Frozen, None, Type::f32([d, n].map(Dim::Const)));
        let v = graph.arg("v", Role::Input, None, Type::f32([n, d].map(Dim::Const)));
        let b = graph.arg("b", Role::Input, None, Type::f32([Dim::Const(n)]));
        let r = graph.arg("r", Role::Input, None, rows(n));
        let one = graph.arg("one", Role::Input, None, rows(1));
        let rng = graph.arg("rng", Role::Input, None, Type::i32([Dim::Const(2)]));
        write(&mut |op, x| graph.push(op, x, &Location::default()).expect("fits"), [x, w, v, b, r, one, rng]);
        let last = graph.nodes.last().expect("some").result();
        graph.outputs.push(("z".into(), last));
        all.push((graph, launches));
    };
    let plain = |transpose_y| Op::Matmul { transpose_x: false, transpose_y };
    let drop = Op::Dropout { p: 0.3, stream: 2, column: 0 };
    // The group overwrites the product.
    graph("bias", "matmul+add", &|push, [x, w, _, b, ..]| {
        let m = push(plain(false), &[x, w]);
        push(Op::Add, &[m, b]);
    });
    // Two groups, the second on the first; the first is read again later.
    graph("chain", "matmul+add+gelu reduce mul", &|push, [x, w, _, b, ..]| {
        let m = push(plain(false), &[x, w]);
        let u = push(Op::Add, &[m, b]);
        let a = push(Op::Gelu, &[u]);
        let s = push(Op::Reduce { axes: vec![0], keep: true, mean: false }, &[a]);
        push(Op::Mul, &[u, s]);
    });
    // The first product is read again, and must be computed before the second, to which it is added.
    graph("two", "matmul matmul+add+dropout+add", &|push, [x, w, v, _, r, _, rng]| {
        let m = push(plain(false), &[x, w]);
        let n = push(plain(true), &[x, v]);
        let sum = push(Op::Add, &[n, m]);
        let kept = push(drop.clone(), &[sum, rng]);
        push(Op::Add, &[kept, r]);
    });
    // The result is part of a concatenation, and one leaf has one number for each row.
    graph("part", "matmul+mul concat", &|push, [x, w, _, _, r, one, _]| {
        let m = push(plain(false), &[x, w]);
        let z = push(Op::Mul, &[m, one]);
        push(Op::Concat { axis: 1 }, &[r, z]);
    });
    // A group that reads a later reduction does not join the epilogue.
    graph("late", "matmul reduce add", &|push, [x, w, ..]| {
        let m = push(plain(false), &[x, w]);
        let s = push(Op::Reduce { axes: vec![0], keep: true, mean: true }, &[m]);
        push(Op::Add, &[m, s]);
    });
    all
}

/// Products with row sums and their readers, each with the expected labels of a GPU's launches if a tile holds whole
/// rows.
fn summed(d: u64, n: u64) -> Vec<(Graph, &'static str)> {
    let mut all = vec![];
    let mut graph =
        |name: &str, heads: &[u64], launches: &'static str, write: &dyn Fn(&mut Push, [Value; 6]) -> Vec<Value>| {
            let mut graph = Graph::new(name);
            let lead = || heads.iter().copied().map(Dim::Const);
            let of = |rows: Dim, width| Type::f32(lead().chain([rows, Dim::Const(width)]).collect::<Vec<_>>());
            let mut arg = |name: &str, role, ty| graph.arg(name, role, None, ty);
            let x = arg("x", Role::Input, of(Dim::Tokens, d));
            let w = arg("w", Role::Frozen, of(Dim::Const(d), n));
            let b = arg("b", Role::Input, Type::f32([Dim::Const(n)]));
            let r = arg("r", Role::Input, of(Dim::Tokens, n));
            let one = arg("one", Role::Input, of(Dim::Tokens, 1));
            let rng = arg("rng", Role::Input, Type::i32([Dim::Const(2)]));
            let mut push = |op: Op, x: &[Value]| graph.push(op, x, &Location::default()).expect("fits");
            let m = push(Op::Matmul { transpose_x: false, transpose_y: false }, &[x, w]);
            for (i, value) in write(&mut push, [m, b, r, one, rng, x]).into_iter().enumerate() {
                graph.outputs.push((format!("z{i}"), value));
            }
            all.push((graph, launches));
        };
    let drop = Op::Dropout { p: 0.3, stream: 2, column: 0 };
    for heads in [&[][..], &[3]] {
        let sum = |mean| Op::Reduce { axes: vec![heads.len() + 1], keep: true, mean };
        // Only the sum is an output.
        graph("alone", heads, "matmul+reduce", &|push, [m, ..]| vec![push(sum(false), &[m])]);
        // The pattern of inducer-tuning (Chen et al., 2022): one factor of the summed products is read again.
        graph("weight", heads, "matmul+add+mul+reduce+sub+sigmoid", &|push, [m, b, r, one, ..]| {
            let p = push(Op::Add, &[m, b]);
            let products = push(Op::Mul, &[p, r]);
            let s = push(sum(false), &[products]);
            let s = push(Op::Sub, &[s, one]);
            vec![p, push(Op::Sigmoid, &[s])]
        });
        // The product and its mean are also outputs, with dropout before and after the mean.
        graph("drops", heads, "matmul+dropout+add+reduce+dropout+mul", &|push, [m, _, r, one, rng, _]| {
            let kept = push(drop.clone(), &[m, rng]);
            let kept = push(Op::Add, &[kept, r]);
            let s = push(sum(true), &[kept]);
            let t = push(drop.clone(), &[s, rng]);
            vec![m, kept, s, push(Op::Mul, &[t, one])]
        });
        // Companions: one does not depend on the sum, and one is wider than the summed rows.
        graph("companions", heads, "matmul+mul+reduce+sub+mul+mul+dropout+scale", &|push, [m, _, r, one, rng, x]| {
            let products = push(Op::Mul, &[m, r]);
            let s = push(sum(false), &[products]);
            let t = push(Op::Sub, &[s, one]);
            let st = push(Op::Mul, &[s, one]);
            let wide = push(Op::Mul, &[st, x]);
            let kept = push(drop.clone(), &[r, rng]);
            vec![m, t, wide, push(Op::Scale { by: 0.5 }, &[kept])]
        });
        // The second of two sums has a launch of its own, with a group as wide as a row.
        graph("two", heads, "matmul+mul+reduce reduce+sub", &|push, [m, _, r, ..]| {
            let s = push(sum(false), &[m]);
            let products = push(Op::Mul, &[m, r]);
            let t = push(sum(false), &[products]);
            vec![push(Op::Sub, &[m, s]), t]
        });
    }
    all
}

#[test]
fn products_with_row_sums_match_the_interpreter() {
    let graphs = [(1, 5, 1), (29, 3, 70)]
        .into_iter()
        .flat_map(|(tokens, d, n)| summed(d, n).into_iter().map(move |(graph, _)| (graph, vec![tokens])));
    compare(&graphs.collect::<Vec<_>>(), Cpu::Native, 2, LONG);
}

#[test]
fn products_with_epilogues_fuse_and_match_the_interpreter() {
    let mut graphs = vec![];
    for (tokens, d, n) in [(1, 5, 1), (113, 400, 33), (29, 3, 400), (6, 8, 784), (230, 16, 64)] {
        for (graph, called) in followed(d, n) {
            // A result of a single column is not stored inside a concatenation.
            if (&graph.name[..], n) != ("part", 1) {
                assert_eq!(launches(&graph, true), called, "{}", graph.name);
            }
            assert!(!launches(&graph, false).contains("matmul+"));
            graphs.push((graph, vec![tokens]));
        }
    }
    compare(&graphs, Cpu::Native, 2, LONG);
}

fn frozen_products() -> Cases {
    products().into_iter().filter(|(graph, _)| graph.name == "frozen").collect()
}

/// Products in bf16 stay within the bound that `Precision::Bf16` documents, with the processor's bf16 instruction and
/// without.
#[test]
fn products_in_bf16_stay_within_their_bound() {
    let frozen = frozen_products();
    let portable = Cpu::Level(Level::V1);
    for cpu in [Cpu::Native, portable] {
        let mut rounded = false;
        Compiled::new(&frozen, cpu, Precision::Bf16).run(2, |outcome| {
            rounded |= outcome.product(1.0 / 128.0, Machine::Cpu(cpu));
        });
        assert!(rounded, "nothing was rounded to bf16 on {cpu}");
    }
}

/// Parameters of attention: whether it is causal, and dropout with the number of columns before the keys, which does
/// not fill whole calls of the random generator.
fn attention_parameters() -> Vec<(bool, (f64, u64))> {
    let drops = [(0.0, 0), (0.3, 0), (0.3, 1), (0.3, 3), (0.3, 30), (0.3, 108)];
    drops.into_iter().flat_map(|drop| [(false, drop), (true, drop)]).collect()
}

/// Attention and its vjps for each number of heads, width of queries and width of values, over batches of these
/// lengths.
fn attention(sizes: &[(u64, u64, u64)], parameters: &[(bool, (f64, u64))], lengths: &[Vec<usize>]) -> Cases {
    let mut graphs = vec![];
    for &(h, width, wide) in sizes {
        let heads = |n| Type::f32([Dim::Const(h), Dim::Tokens, Dim::Const(n)]);
        let row = heads(1);
        for &(causal, (p, column)) in parameters {
            let (scale, stream) = (0.2, 7);
            let rng = (p > 0.0).then(|| Type::i32([Dim::Const(2)]));
            let plain = [heads(width), heads(width), heads(wide)];
            let with = |types: &[Type]| types.iter().cloned().chain(rng.clone()).collect::<Vec<_>>();
            graphs.push(single(Op::Attention { causal, scale, p, stream, column }, &with(&plain)));
            graphs.push(single(Op::AttentionLse { causal, scale }, &plain[..2]));
            let all = [&plain[..], &[row.clone(), heads(wide), row.clone()]].concat();
            for of in 0..3 {
                graphs.push(single(Op::AttentionVjp { of, causal, scale, p, stream, column }, &with(&all)));
            }
            // The values' adjoint does not read operands 2 and 5, so they may differ from the other adjoints'.
            for adjoints in [&[2, 1][..], &[2, 0, 1]] {
                let mut together = Graph::new("together");
                let types = with(&all).into_iter().chain([heads(wide), row.clone()]);
                let arg = |(i, ty)| together.arg(format!("x{i}"), Role::Input, None, ty);
                let args: Vec<Value> = types.enumerate().map(arg).collect();
                let (mut args, others) =
                    (args[..args.len() - 2].to_vec(), [args[args.len() - 2], args[args.len() - 1]]);
                for &of in adjoints {
                    let op = Op::AttentionVjp { of, causal, scale, p, stream, column };
                    let z = together.push(op, &args, &Location::default()).expect("fits");
                    together.outputs.push((format!("z{of}"), z));
                    [args[2], args[5]] = others;
                }
                let together = merge_siblings(&together).expect("rebuilt");
                assert_eq!(launches(&together, false), "attention_vjp");
                assert_eq!(launches_on(Machine::Cuda(Chip::Sm70), &together, false), "attention_vjp");
                graphs.push(together);
            }
        }
    }
    let all = graphs.iter().flat_map(|g| lengths.iter().map(|l| (g.clone(), l.clone())));
    all.collect()
}

/// Sequence lengths that do not fill whole blocks of rows or whole vectors.
fn short_attention() -> Cases {
    attention(
        &[(2, 3, 5), (1, 40, 40), (2, 1, 1)],
        &attention_parameters(),
        &[vec![1], vec![2, 17, 1], vec![33, 3], vec![4, 65], vec![62]],
    )
}

#[test]
fn fused_attention_matches_the_interpreter() {
    compare(&short_attention(), Cpu::Native, 2, CLOSE);
}

/// One compiled kernel serves every batch of random sequence lengths.
#[test]
fn attention_over_random_lengths_matches_the_interpreter() {
    let mut runner = TestRunner::deterministic();
    let lengths = proptest::collection::vec(prop_oneof![Just(1), 1usize..90], 1..6);
    let mut batch = || lengths.new_tree(&mut runner).expect("a batch").current();
    let lengths: Vec<Vec<usize>> = (0..8).map(|_| batch()).collect();
    compare(&attention(&[(3, 17, 9), (1, 31, 33)], &attention_parameters()[..6], &lengths), Cpu::Native, 2, CLOSE);
}

#[test]
fn attention_over_a_long_sequence_matches_the_interpreter() {
    compare(&attention(&[(1, 1, 1)], &[(true, (0.0, 0))], &[vec![5000]]), Cpu::Native, 2, LONG);
}

/// Slices of a fused projection are split into heads and merged again, forward and backward, without copies.
fn heads() -> Cases {
    let mut graphs = vec![];
    for (heads, width, front) in [(2, 3, 0), (3, 16, 5), (1, 20, 1)] {
        let mut graph = Graph::new("heads");
        let at = Location::default();
        let d = heads * width;
        let constants = |shape: &[u64]| Type::f32(shape.iter().map(|&n| Dim::Const(n)).collect::<Vec<_>>());
        let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Tokens, Dim::Const(7)]));
        let w = graph.arg("w", Role::Trainable, None, constants(&[7, front + 3 * d]));
        let up = graph.arg("up", Role::Trainable, None, constants(&[d, 5]));
        let rng = graph.arg("rng", Role::Input, None, Type::i32([Dim::Const(2)]));
        let mut push = |op: Op, operands: &[_]| graph.push(op, operands, &at).expect("fits");
        let plain = Op::Matmul { transpose_x: false, transpose_y: false };
        let qkv = push(plain.clone(), &[x, w]);
        let split = [Dim::Tokens, Dim::Const(heads), Dim::Const(width)];
        let [q, k, v] = [0, 1, 2].map(|i| {
            let start = front + i * d;
            let part = push(Op::Slice { axis: 1, start, end: Some(start + d) }, &[qkv]);
            let part = push(Op::Reshape { shape: split.to_vec() }, &[part]);
            push(Op::Permute { axes: vec![1, 0, 2] }, &[part])
        });
        let scores = push(Op::Scores { causal: true }, &[q, k]);
        let scores = push(Op::Scale { by: 0.3 }, &[scores]);
        let weights = push(Op::Softmax, &[scores]);
        let weights = push(Op::Dropout { p: 0.2, stream: 5, column: 0 }, &[weights, rng]);
        let f = push(Op::Attend { causal: false }, &[weights, v]);
        let f = push(Op::Permute { axes: vec![1, 0, 2] }, &[f]);
        let f = push(Op::Reshape { shape: vec![Dim::Tokens, Dim::Const(d)] }, &[f]);
        let y = push(plain, &[f, up]);
        let y = push(Op::Mul, &[y, y]);
        let loss = push(Op::Reduce { axes: vec![0, 1], keep: false, mean: true }, &[y]);
        graph.outputs.push(("loss".into(), loss));
        let graph =
            fuse(&differentiate(&graph).expect("differentiable"), |_| true, &Thresholds::default()).expect("fused");
        let graph = merge_siblings(&graph).expect("rebuilt");
        let launches = launches(&graph, true);
        let moved = ["copy", "slice", "permute", "concat"].iter().any(|op| launches.split(' ').any(|l| l == *op));
        assert!(!moved, "{launches}");
        graphs.extend([vec![1], vec![2, 17, 1], vec![65]].map(|lengths| (graph.clone(), lengths)));
    }
    graphs
}

#[test]
fn splitting_and_merging_heads_copies_nothing() {
    // Several sums over tokens follow each other.
    compare(&heads(), Cpu::Native, 2, 10.0 * CLOSE);
}

/// Chains of operations that move elements, followed by every kind of kernel that reads strided views.
fn views() -> Cases {
    let mut graphs = vec![];
    let at = Location::default();
    for (h, p) in [(2, 6), (3, 20)] {
        let mut graph = Graph::new("views");
        let x = graph.arg("x", Role::Trainable, None, Type::f32([Dim::Tokens, Dim::Const(2 * h * p + 3)]));
        let y = graph.arg("y", Role::Trainable, None, Type::f32([Dim::Const(h), Dim::Const(p), Dim::Const(4)]));
        let z = graph.arg("z", Role::Trainable, None, Type::f32([Dim::Const(h), Dim::Tokens, Dim::Const(p)]));
        let mut push = |op: Op, operands: &[_]| graph.push(op, operands, &at).expect("fits");
        let part = push(Op::Slice { axis: 1, start: 2, end: Some(2 + 2 * h * p) }, &[x]);
        let part =
            push(Op::Reshape { shape: [Dim::Tokens].into_iter().chain([2, h, p].map(Dim::Const)).collect() }, &[part]);
        let part = push(Op::Slice { axis: 1, start: 1, end: None }, &[part]);
        let part = push(Op::Reshape { shape: vec![Dim::Tokens, Dim::Const(h), Dim::Const(p)] }, &[part]);
        let heads = push(Op::Permute { axes: vec![1, 0, 2] }, &[part]);
        let turned = push(Op::Permute { axes: vec![0, 2, 1] }, &[heads]);
        let sum = push(Op::Add, &[heads, z]);
        let normal = push(Op::Normalize { eps: 0.1 }, &[heads]);
        let product = push(Op::Matmul { transpose_x: false, transpose_y: false }, &[heads, y]);
        let back = push(Op::Matmul { transpose_x: false, transpose_y: false }, &[turned, sum]);
        let square = push(Op::Matmul { transpose_x: false, transpose_y: true }, &[turned, turned]);
        let tail = push(Op::Slice { axis: 2, start: 1, end: None }, &[sum]);
        let merged = [normal, sum, product, tail].map(|value| push(Op::Permute { axes: vec![1, 0, 2] }, &[value]));
        let wide = push(Op::Concat { axis: 2 }, &merged);
        let columns = [square, y].map(|value| push(Op::Permute { axes: vec![2, 0, 1] }, &[value]));
        let long = push(Op::Concat { axis: 0 }, &columns);
        for (name, value) in [("wide", wide), ("long", long), ("back", back), ("turned", turned), ("tail", tail)] {
            graph.outputs.push((name.into(), value));
        }
        graphs.extend([vec![1], vec![3, 18]].map(|lengths| (graph.clone(), lengths)));
    }
    graphs
}

#[test]
fn kernels_read_views_of_views() {
    compare(&views(), Cpu::Native, 2, CLOSE);
}

/// Both results of one pass over chunked logits.
fn both_results(rows: u64, width: u64, role: Role) -> Graph {
    let mut graph = Graph::new("chunked_logits");
    let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Tokens, Dim::Const(width)]));
    let w = graph.arg("w", role, None, Type::f32([Dim::Const(rows), Dim::Const(width)]));
    for op in [Op::LinearMean, Op::LinearLse] {
        let value = graph.push(op.clone(), &[x, w], &Location::default()).expect("fits");
        graph.outputs.push((op.name().into(), value));
    }
    merge_siblings(&graph).expect("rebuilt")
}

/// Chunked logits of one chunk and of several, the last of them partial: each result alone and both of one pass, over
/// no rows, one row and many, with frozen weights and others.
fn chunked_logits() -> Cases {
    let mut graphs = vec![];
    for (rows, width) in [(1, 3), (40, 17), (vocab_chunk(), 40), (2 * vocab_chunk() + 37, 3)] {
        let types = [Type::f32([Dim::Tokens, Dim::Const(width)]), Type::f32([Dim::Const(rows), Dim::Const(width)])];
        let alone = [Op::LinearLse, Op::LinearMean].map(|op| single(op, &types));
        let both = [Role::Frozen, Role::Trainable].map(|role| both_results(rows, width, role));
        for graph in alone.into_iter().chain(both) {
            graphs.extend([vec![], vec![1], vec![37, 3]].map(|lengths| (graph.clone(), lengths)));
        }
    }
    graphs
}

#[test]
fn chunked_logits_match_the_interpreter() {
    compare(&chunked_logits(), Cpu::Native, 2, CLOSE);
}

fn frozen_chunked_logits() -> Cases {
    let sizes = [(vocab_chunk(), 3), (2 * vocab_chunk() + 37, 3)];
    sizes.map(|(rows, width)| (both_results(rows, width, Role::Frozen), vec![37, 3])).into()
}

#[test]
fn chunked_logits_in_bf16_stay_within_their_bound() {
    let graphs = frozen_chunked_logits();
    for cpu in [Cpu::Native, Cpu::Level(Level::V1)] {
        Compiled::new(&graphs, cpu, Precision::Bf16).run(2, |outcome| outcome.chunked_logits(Machine::Cpu(cpu)));
    }
}

/// `gather` from tables that a product also reads, with ids beyond the table, and from one that an addition reads as
/// well.
fn tables() -> Cases {
    let mut graphs = vec![];
    for (rows, width, other) in [(7, 3, false), (40, 16, false), (vocab_chunk(), 41, false), (5, 20, true)] {
        let mut graph = Graph::new("table");
        let table = Type::f32([Dim::Const(rows), Dim::Const(width)]);
        let w = graph.arg("w", Role::Frozen, None, table.clone());
        let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Tokens, Dim::Const(rows)]));
        let ids = graph.arg("ids", Role::Input, None, Type { dtype: DType::I32, shape: vec![Dim::Tokens] });
        let product = Op::Matmul { transpose_x: false, transpose_y: false };
        let mut push = |name: &str, op: Op, operands: &[_]| {
            let value = graph.push(op, operands, &Location::default()).expect("fits");
            graph.outputs.push((name.into(), value));
        };
        push("rows", Op::Gather { start: 0 }, &[w, ids]);
        push("later", Op::Gather { start: 2 }, &[w, ids]);
        push("product", product, &[x, w]);
        if other {
            let y = graph.arg("y", Role::Input, None, table);
            let sum = graph.push(Op::Add, &[w, y], &Location::default()).expect("fits");
            graph.outputs.push(("sum".into(), sum));
        }
        graphs.push((graph, vec![37, 3]));
    }
    graphs
}

/// A frozen table is kept once: in panels, unless a kernel reads it as it was given.
#[test]
fn gather_reads_rows_from_packed_panels() {
    let graphs = tables();
    levels().into_iter().for_each(|cpu| compare(&graphs, cpu, 9, CLOSE));
    for (precision, panels) in [(Precision::F32, [true, true, true, false]), (Precision::Bf16, [false; 4])] {
        let (_, manifests) = lowered(&graphs, Options { precision, ..Options::default() });
        for (manifest, panels) in manifests.iter().zip(panels) {
            let given = |b: &usize| matches!(manifest.buffers[*b].storage, Storage::Tensor { .. });
            let kept = manifest.entries["grad"].launches.iter().any(|launch| launch.buffers.iter().any(given));
            assert_eq!(kept, !panels, "{:?}", manifest.kernels);
        }
    }
}

/// With logits beyond ±80 the running maximum grows from chunk to chunk, and most exponentials underflow.
#[test]
fn chunked_logits_are_stable_for_large_logits() {
    let parts = [(2 * vocab_chunk() + 37, Role::Frozen), (3, Role::Trainable)];
    let graphs = [0.0, 0.1].map(|smoothing| {
        let graph = differentiate(&language_head(&parts, 3, smoothing, 32.0)).expect("differentiable");
        let fused = fuse(&graph, |rule| rule == "chunked_logits", &Thresholds::default()).expect("fused");
        (merge_siblings(&fused).expect("rebuilt"), vec![1])
    });
    assert!(graphs.iter().all(|(g, _)| g.nodes.iter().any(|n| n.op == Op::LinearLseAndMean)));
    // Logits of about 100 have an absolute error of 10⁻⁵ in f32, which is the relative error of their exponentials.
    compare(&graphs, Cpu::Native, 2 * vocab_chunk() as i32 + 40, 5e-5);
}

/// A label beyond the classes has an all-zero one-hot row and causes no access out of bounds, for whole logits and for
/// a head of which a part has chunked logits.
#[test]
fn labels_beyond_the_classes_are_ignored() {
    let mut graphs = vec![];
    for smoothing in [0.0, 0.1] {
        let head = language_head(&[(40, Role::Frozen), (3, Role::Trainable)], 3, smoothing, 1.0);
        let whole = differentiate(&head).expect("differentiable");
        let thresholds = Thresholds { min_chunked_vocab: 40, ..Thresholds::default() };
        let chunked = merge_siblings(&fuse(&whole, |rule| rule == "chunked_logits", &thresholds).expect("fused"))
            .expect("rebuilt");
        assert!(chunked.nodes.iter().any(|n| n.op == Op::LinearLseAndMean));
        graphs.extend([whole, chunked].map(|graph| (graph, vec![1])));
    }
    let compiled = Compiled::new(&graphs, Cpu::Native, Precision::F32);
    for labels in [[-1, 43, 44], [39, -40, 42], [i32::MIN, 83, i32::MAX]] {
        let arguments = |graph: &Graph, batch: &Batch| {
            let mut args = arguments(graph, batch, 5, 2);
            args.insert("labels".into(), Data::I32(labels.to_vec()));
            args
        };
        compiled.run_on(arguments, |outcome| outcome.all_close(Machine::default(), CLOSE));
    }
}
