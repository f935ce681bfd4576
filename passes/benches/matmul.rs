//! GFLOP/s of the matrix products of a training step, packing included, next to the measured peak of this machine; then
//! of those with frozen weights in bf16.
//!
//! ```text
//! cargo bench -p peft-passes --bench matmul [-- [--peaks] [--threads N]]
//! ```

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type};
use peft_grammar::model::Precision;
use peft_passes::target::Machine;
use peft_passes::target::cpu::Cpu;
use peft_passes::{codegen, lower};
use peft_runtime::artifact::{Buffer, Element, Entry, Extent, Launch, Manifest, Storage, Tensor, Workgroup};
use peft_runtime::{Inputs, Numbers, Profile, Program, Session};

/// Rounds over all products; the shortest time of each counts.
const ROUNDS: usize = 12;
/// Rounds of the peak kernel with `--peaks`; their mean counts, as the clock is sustained for as long as a training
/// step takes.
const PEAK_ROUNDS: usize = 1000;

/// One product. Operands with a token axis are computed beforehand; the others are weights.
struct Product {
    name: &'static str,
    tokens: u64,
    x: Type,
    y: Type,
    transpose: (bool, bool),
    frozen: bool,
    /// Multiplications for each token.
    size: u64,
}

fn products() -> Vec<Product> {
    use Dim::{Const, Tokens};
    let product = |name, tokens, x: &[Dim], y: &[Dim], transpose, frozen, size| {
        let (x, y) = (Type::f32(x.to_vec()), Type::f32(y.to_vec()));
        Product { name, tokens, x, y, transpose, frozen, size }
    };
    let forward = |name, tokens, k, n| {
        product(name, tokens, &[Tokens, Const(k)], &[Const(k), Const(n)], (false, false), true, k * n)
    };
    let back = |name, tokens, k, n| {
        product(name, tokens, &[Tokens, Const(k)], &[Const(n), Const(k)], (false, true), true, k * n)
    };
    let trained = |name, tokens, k, n| {
        product(name, tokens, &[Tokens, Const(k)], &[Const(k), Const(n)], (false, false), false, k * n)
    };
    let gradient = |name, tokens, m, n| {
        product(name, tokens, &[Tokens, Const(m)], &[Tokens, Const(n)], (true, false), false, m * n)
    };
    let heads = |name, tokens, k, n| {
        let (x, y) = ([Const(12), Tokens, Const(k)], [Const(12), Const(k), Const(n)]);
        product(name, tokens, &x, &y, (false, false), false, 12 * k * n)
    };
    let heads_gradient = |name, tokens, m, n| {
        let (x, y) = ([Const(12), Tokens, Const(m)], [Const(12), Tokens, Const(n)]);
        product(name, tokens, &x, &y, (true, false), false, 12 * m * n)
    };
    vec![
        forward("1300 × 768 × 768", 1300, 768, 768),
        forward("1300 × 768 × 2304", 1300, 768, 2304),
        forward("1300 × 768 × 3072", 1300, 768, 3072),
        forward("1300 × 3072 × 768", 1300, 3072, 768),
        back("1300 × 3072 × 768, Wᵀ", 1300, 3072, 768),
        back("500 × 768 × 50257, Wᵀ", 500, 768, 50257),
        forward("500 × 50257 × 768", 500, 50257, 768),
        forward("64 × 768 × 768", 64, 768, 768),
        trained("1300 × 768 × 24", 1300, 768, 24),
        trained("1300 × 768 × 4", 1300, 768, 4),
        trained("1300 × 24 × 768", 1300, 24, 768),
        trained("1300 × 4 × 768", 1300, 4, 768),
        gradient("768 × 1300 × 24, xᵀ", 1300, 768, 24),
        gradient("24 × 1300 × 768, xᵀ", 1300, 24, 768),
        gradient("4 × 1300 × 768, xᵀ", 1300, 4, 768),
        heads("12 × 1300 × 64 × 12", 1300, 64, 12),
        heads("12 × 1300 × 12 × 64", 1300, 12, 64),
        heads_gradient("12 × 64 × 1300 × 12, xᵀ", 1300, 64, 12),
    ]
}

impl Product {
    fn graph(&self, index: usize) -> Graph {
        let mut graph = Graph::new(self.name);
        let at = Location::default();
        let mut operand = |side: &str, ty: &Type| {
            let tokens = ty.shape.contains(&Dim::Tokens);
            let role = match self.frozen {
                _ if tokens => Role::Input,
                true => Role::Frozen,
                false => Role::Trainable,
            };
            let arg = graph.arg(format!("{side}{index}"), role, None, ty.clone());
            // The scaling copies the input into the session's own memory.
            if tokens { graph.push(Op::Scale { by: 0.5 }, &[arg], &at).expect("fits") } else { arg }
        };
        let (x, y) = (operand("x", &self.x), operand("y", &self.y));
        let (transpose_x, transpose_y) = self.transpose;
        let z = graph.push(Op::Matmul { transpose_x, transpose_y }, &[x, y], &at).expect("fits");
        graph.outputs.push(("z".into(), z));
        graph
    }
}

/// Loop iterations of the peak kernel, which only multiplies and adds in registers; three of four registers are
/// accumulators.
const PEAK_STEPS: u64 = 2_000_000;
const PEAK_UNITS: u64 = 64;

fn peak_sums() -> u64 {
    Cpu::Native.registers().count / 4 * 3
}

fn peak_kernel(precision: Precision) -> String {
    let (sums, floats) = (peak_sums(), Cpu::Native.registers().floats);
    let list = |text: &dyn Fn(u64) -> String| (0..sums).map(text).collect::<Vec<_>>().join(", ");
    let ty = format!("vector<{floats}xf32>");
    let types = list(&|_| ty.clone());
    let pairs = format!("vector<{}xbf16>", 2 * floats);
    let step = |i: u64| match precision {
        Precision::F32 => format!("      %n{i} = math.fma %x, %x, %s{i} : {ty}\n"),
        Precision::Bf16 => format!(
            "      %n{i} = llvm.call_intrinsic \"llvm.x86.avx512bf16.dpbf16ps.512\"(%s{i}, %b, %b) : \
             ({ty}, {pairs}, {pairs}) -> {ty}\n"
        ),
    };
    let steps: String = (0..sums).map(step).collect();
    let adds: String = (1..sums)
        .map(|i| {
            let before = if i == 1 { "%r#0".into() } else { format!("%t{}", i - 1) };
            format!("      %t{i} = arith.addf {before}, %r#{i} : {ty}\n")
        })
        .collect();
    format!(
        r#"  func.func @peak(%out: memref<?xf32>, %steps: index, %begin: index, %end: index)
      attributes {{llvm.emit_c_interface, passthrough = #cpu}} {{
    %zero = arith.constant 0 : index
    %one = arith.constant 1 : index
    %lanes = arith.constant {floats} : index
    scf.for %unit = %begin to %end step %one {{
      %place = arith.muli %unit, %lanes : index
      %x = vector.load %out[%place] : memref<?xf32>, {ty}
      %b = vector.bitcast %x : {ty} to {pairs}
      %r:{sums} = scf.for %i = %zero to %steps step %one iter_args({}) -> ({types}) {{
{steps}        scf.yield {} : {types}
      }}
{adds}      vector.store %t{}, %out[%place] : memref<?xf32>, {ty}
    }}
    return
  }}
"#,
        list(&|i| format!("%s{i} = %x")),
        list(&|i| format!("%n{i}")),
        sums - 1,
    )
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let products = || if arguments.iter().any(|a| a == "--peaks") { vec![] } else { products() };
    let number = arguments.iter().skip_while(|a| *a != "--threads").nth(1);
    let threads = number.map_or(0, |n| n.parse().expect("--threads needs a number"));
    measure(Precision::F32, &products(), threads, "FMA in registers");
    if Cpu::Native.has_bf16_dot() {
        let frozen: Vec<Product> = products().into_iter().filter(|p| p.frozen).collect();
        measure(Precision::Bf16, &frozen, threads, "bf16 in registers");
    }
}

fn measure(precision: Precision, products: &[Product], threads: usize, peak: &str) {
    let graphs: Vec<Graph> = products.iter().enumerate().map(|(i, p)| p.graph(i)).collect();
    let mut tensors = vec![];
    for graph in &graphs {
        for arg in graph.args.iter().filter(|a| a.role != Role::Input) {
            let shape: Vec<u64> = graph.ty(arg.value).shape.iter().filter_map(|d| d.constant()).collect();
            let trainable = (arg.role == Role::Trainable).then(|| (0, shape[0]));
            tensors.push(Tensor { name: arg.name.clone(), shape, trainable, decay: false, lr_factor: None });
        }
    }
    let entries: Vec<(&str, &Graph)> = products.iter().map(|p| p.name).zip(&graphs).collect();
    let mut lowered =
        lower::lower(&entries, &tensors, lower::Options { precision, ..Default::default() }).expect("lowered");
    let kernels = [lowered.kernels(), vec![peak_kernel(precision)]].concat();
    add_peak(&mut lowered.manifest);

    let folder = tempfile::tempdir().expect("a directory");
    let library = folder.path().join("kernels.so");
    codegen::compile(&kernels, Machine::default(), None, &library).unwrap_or_else(|e| panic!("{e}"));
    let numbers = |n: usize| (0..n).map(|i| ((i * 7919 % 1001) as f32 - 500.0) / 1000.0);
    let weights = tensors.iter().map(|t| {
        let count = t.shape.iter().product::<u64>() as usize;
        let mut data = Numbers::zeros(count);
        data.iter_mut().zip(numbers(count)).for_each(|(to, x)| *to = x);
        data
    });
    let weights = weights.collect();
    let program = Program::new(lowered.manifest, &library).expect("loads");
    let mut session = Session::new(program, weights, threads).expect("a session");

    let mut times: HashMap<&str, Vec<Duration>> = HashMap::new();
    for _ in 0..if products.is_empty() { PEAK_ROUNDS } else { ROUNDS } {
        let inputs = Inputs { lengths: vec![1], ..Inputs::default() };
        times.entry("peak").or_default().push(timed(&mut session, "peak", &inputs));
        for (i, product) in products.iter().enumerate() {
            let mut floats = BTreeMap::new();
            for (side, ty) in [("x", &product.x), ("y", &product.y)] {
                if ty.shape.contains(&Dim::Tokens) {
                    let count = ty.shape.iter().map(|d| d.constant().unwrap_or(product.tokens)).product::<u64>();
                    floats.insert(format!("{side}{i}"), numbers(count as usize).collect());
                }
            }
            let inputs = Inputs { lengths: vec![product.tokens as i32], floats, ..Inputs::default() };
            times.entry(product.name).or_default().push(timed(&mut session, product.name, &inputs));
        }
    }
    let time = |name: &str| {
        let times = &times[name];
        match products {
            [] => times.iter().sum::<Duration>() / times.len() as u32,
            _ => *times.iter().min().expect("a round"),
        }
    };
    let speed = |name: &str, flops: u64| flops as f64 / time(name).as_secs_f64() / 1e9;
    let width = if precision == Precision::Bf16 { 2 } else { 1 };
    let limit =
        speed("peak", 2 * Cpu::Native.registers().floats * width * peak_sums() * PEAK_STEPS / PEAK_UNITS * PEAK_UNITS);
    println!("{peak:<28}{limit:>9.1} GFLOP/s");
    for product in products {
        let speed = speed(product.name, 2 * product.tokens * product.size);
        println!("{:<28}{speed:>9.1} GFLOP/s {:>6.1}%", product.name, 100.0 * speed / limit);
    }
}

/// Adds the peak kernel as one more entry.
fn add_peak(manifest: &mut Manifest) {
    manifest.kernels.push("peak".into());
    // The buffer is large enough that the runtime distributes the launch over threads.
    let shape = vec![Extent::Const(16 * PEAK_UNITS * 8)];
    manifest.buffers.push(Buffer { element: Element::F32, shape, storage: Storage::Temporary });
    let launch = Launch {
        kernel: manifest.kernels.len() - 1,
        buffers: vec![manifest.buffers.len() - 1],
        extents: vec![Extent::Const(PEAK_STEPS / PEAK_UNITS)],
        units: Extent::Const(PEAK_UNITS),
        group: Workgroup::ONE,
        op: "matmul".into(),
    };
    manifest.entries.insert("peak".into(), Entry { launches: vec![launch], outputs: vec![] });
}

/// Runs `entry` once and returns the time of the product and its packing.
fn timed(session: &mut Session, entry: &str, inputs: &Inputs) -> Duration {
    session.profile = Some(Profile::new());
    session.run(entry, inputs).unwrap_or_else(|e| panic!("{entry}: {e}"));
    let profile = session.profile.take().unwrap_or_default();
    profile.iter().filter(|(op, _)| ["matmul", "pack"].contains(&op.as_str())).map(|(_, t)| t.0).sum()
}
