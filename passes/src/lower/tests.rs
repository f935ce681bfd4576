//! Every operation compiled, against the interpreter. Launches run one unit at a time over poisoned
//! buffers, so that a kernel whose units lean on each other, or which reads what nothing wrote, shows.

use std::collections::HashMap;
use std::ffi::c_void;

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type};
use peft_runtime::artifact::{Element, Launch, Manifest, Sizes, Storage, Tensor};

use super::{head, lower};
use crate::codegen;
use crate::fuse::fuse;
use crate::gradient::differentiate;
use crate::interpret::{self, Batch, Data};
use crate::tests::samples::{arguments, cases, language_head, single};

#[repr(C)]
struct Memory {
    allocated: *mut u32,
    aligned: *mut u32,
    offset: i64,
    size: i64,
    stride: i64,
}

struct Machine<'a> {
    manifest: &'a Manifest,
    library: &'a libloading::Library,
    sizes: Sizes,
    memory: Vec<Vec<u32>>,
}

impl Machine<'_> {
    fn launch(&mut self, launch: &Launch) {
        let name = format!("_mlir__mlir_ciface_{}", self.manifest.kernels[launch.kernel]);
        // SAFETY: the symbol has the one signature every kernel has.
        let kernel = unsafe { self.library.get::<unsafe extern "C" fn(*mut *mut c_void)>(name.as_bytes()) };
        let kernel = kernel.expect("a kernel");
        for unit in 0..launch.units.eval(&self.sizes) as i64 {
            let mut buffers: Vec<Memory> = launch
                .buffers
                .iter()
                .map(|&b| {
                    let memory = &mut self.memory[b];
                    let at = memory.as_mut_ptr();
                    Memory { allocated: at, aligned: at, offset: 0, size: memory.len() as i64, stride: 1 }
                })
                .collect();
            let mut pointers: Vec<*mut Memory> = buffers.iter_mut().map(|m| m as *mut Memory).collect();
            let mut numbers: Vec<i64> = launch.extents.iter().map(|e| e.eval(&self.sizes) as i64).collect();
            numbers.extend([unit, unit + 1]);
            let pointers = pointers.iter_mut().map(|p| p as *mut *mut Memory as *mut c_void);
            let mut args: Vec<*mut c_void> =
                pointers.chain(numbers.iter_mut().map(|n| n as *mut i64 as *mut c_void)).collect();
            // SAFETY: arguments as the manifest lists them, all alive.
            unsafe { kernel(args.as_mut_ptr()) };
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

/// What rounding may do to sums of a few dozen terms.
const CLOSE: f64 = 2e-6;

/// Compiles all graphs into one library and holds every output against the interpreter's.
fn compare(graphs: &[(Graph, Vec<usize>)], limit: i32, tolerance: f64) {
    let mut texts: Vec<String> = vec![];
    let mut lowered = vec![];
    for (graph, _) in graphs {
        let tensor = |(arg, ty): (&peft_grammar::graph::Arg, &Type)| Tensor {
            name: arg.name.clone(),
            shape: ty.shape.iter().map(|d| d.constant().unwrap_or(0)).collect(),
            trainable: None,
            decay: false,
        };
        let weights = graph.args.iter().filter(|a| a.role != Role::Input);
        let tensors: Vec<Tensor> = weights.map(|a| tensor((a, graph.ty(a.value)))).collect();
        let result = lower(&[("grad", graph)], &tensors).unwrap_or_else(|e| panic!("{}: {e}", graph.name));
        for text in &result.kernels {
            if !texts.contains(text) {
                texts.push(text.clone());
            }
        }
        lowered.push(result.manifest);
    }
    let folder = tempfile::tempdir().expect("a directory");
    let library = folder.path().join("kernels.so");
    codegen::compile(&texts, &library).unwrap_or_else(|e| panic!("{e}"));
    // SAFETY: our own library, without constructors.
    let library = unsafe { libloading::Library::new(&library) }.expect("a library");
    for ((graph, lengths), manifest) in graphs.iter().zip(&lowered) {
        let batch = Batch::new(lengths, 3);
        let args = arguments(graph, &batch, 11, limit);
        // The compiled graph computes on f32: let both start from the same numbers.
        let round = |data: Data| match data {
            Data::F64(x) => Data::F64(x.into_iter().map(|x| f64::from(x as f32)).collect()),
            ints => ints,
        };
        let args: HashMap<String, Data> = args.into_iter().map(|(k, v)| (k, round(v))).collect();
        let want = interpret::run(graph, &batch, &args).expect("interpreted");
        let sizes = sizes_of(&batch, lengths);
        let bind = |buffer: &peft_runtime::artifact::Buffer| -> Vec<u32> {
            let count = buffer.elements(&sizes) as usize;
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
                _ => return vec![f32::NAN.to_bits(); count],
            };
            match data {
                Data::F64(x) => x.iter().map(|&x| (x as f32).to_bits()).collect(),
                Data::I32(x) => x.iter().map(|&x| x as u32).collect(),
            }
        };
        let memory = manifest.buffers.iter().map(bind).collect();
        let mut machine = Machine { manifest, library: &library, sizes, memory };
        let entry = &manifest.entries["grad"];
        for launch in manifest.prepare.iter().chain(&entry.launches) {
            machine.launch(launch);
        }
        for (output, (name, want)) in entry.outputs.iter().zip(&want) {
            assert_eq!(output.name, *name);
            if name == "loss" {
                // Thousands of either sign added up: rounding is all one would see.
                continue;
            }
            assert_eq!(manifest.buffers[output.buffer].element, Element::F32);
            let found: Vec<f32> = machine.memory[output.buffer].iter().map(|&x| f32::from_bits(x)).collect();
            let want = want.floats();
            assert_eq!(found.len(), want.len(), "{name} of {}", graph.nodes[0].op.name());
            let scale = want.iter().filter(|x| x.is_finite()).fold(1e-3, |m: f64, x| m.max(x.abs()));
            for (i, (found, want)) in found.iter().zip(want).enumerate() {
                let close = (f64::from(*found) - want).abs() <= tolerance * scale || f64::from(*found) == *want;
                assert!(close, "{name}[{i}] of {:?} with {lengths:?}: {found}, not {want}", graph.nodes[0].op);
            }
        }
    }
}

#[test]
fn every_operation_and_its_derivative() {
    let mut graphs = vec![];
    for (h, p, r) in [(2, 3, 2), (3, 40, 17)] {
        for (op, types) in cases(h, p, r) {
            let graph = differentiate(&single(op, &types)).expect("differentiable");
            for lengths in [vec![1], vec![2, 5, 1], vec![37, 3]] {
                graphs.push((graph.clone(), lengths));
            }
        }
    }
    compare(&graphs, 2, CLOSE);
}

/// What has no derivative of its own, or takes only some numbers.
#[test]
fn forward_only() {
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
    // Frozen through and through: prepared.
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
    compare(&all.collect::<Vec<_>>(), 2, CLOSE);
}

/// Sizes around the tiles, the rows of a unit and the blocks along k; operands lying either way, weights
/// packed beforehand and not, one result and several.
#[test]
fn products_of_awkward_sizes() {
    let mut graphs = vec![];
    let sizes = [(1, 1, 1), (1, 520, 130), (4, 3, 65), (7, 256, 5), (15, 1, 17), (29, 5, 16), (28, 257, 1)];
    for (m, k, n) in sizes.into_iter().chain([(113, 9, 33), (225, 6, 12), (14, 300, 32)]) {
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
    compare(&graphs, 2, CLOSE);
}

/// With and without dropout, whole and causal, over lengths that fill no block of rows and no step of lanes.
#[test]
fn attention_without_its_square() {
    let mut graphs = vec![];
    for (h, width, wide) in [(2, 3, 5), (1, 40, 40), (2, 1, 1)] {
        let heads = |n| Type::f32([Dim::Const(h), Dim::Tokens, Dim::Const(n)]);
        let row = heads(1);
        for (causal, p) in [(false, 0.0), (true, 0.0), (false, 0.3), (true, 0.3)] {
            let (scale, stream) = (0.2, 7);
            let rng = (p > 0.0).then(|| Type::i32([Dim::Const(2)]));
            let plain = [heads(width), heads(width), heads(wide)];
            let with = |types: &[Type]| types.iter().cloned().chain(rng.clone()).collect::<Vec<_>>();
            graphs.push(single(Op::Attention { causal, scale, p, stream }, &with(&plain)));
            graphs.push(single(Op::AttentionLse { causal, scale }, &plain[..2]));
            let all = [&plain[..], &[row.clone(), heads(wide), row.clone()]].concat();
            for of in 0..3 {
                graphs.push(single(Op::AttentionVjp { of, causal, scale, p, stream }, &with(&all)));
            }
        }
    }
    let lengths = [vec![1], vec![2, 5, 1], vec![33, 3], vec![4, 70]];
    let all = graphs.iter().flat_map(|g| lengths.iter().map(|l| (g.clone(), l.clone())));
    compare(&all.collect::<Vec<_>>(), 2, CLOSE);
}

/// One block and several, the last of them not full; each result alone and both of one sweep, over none, one and many
/// rows; frozen weights and others.
#[test]
fn sweeps_over_blocks() {
    let mut graphs = vec![];
    let lengths = [vec![], vec![1], vec![37, 3]];
    for (rows, width) in [(1, 3), (40, 17), (head::BLOCK, 40), (2 * head::BLOCK + 37, 3)] {
        let types = [Type::f32([Dim::Tokens, Dim::Const(width)]), Type::f32([Dim::Const(rows), Dim::Const(width)])];
        let both = |role| {
            let mut graph = Graph::new("both");
            let (x, w) = (("x", Role::Input), ("w", role));
            let [x, w] = [(x, 0), (w, 1)].map(|((name, role), i)| graph.arg(name, role, None, types[i].clone()));
            for op in [Op::LinearMean, Op::LinearLse] {
                let value = graph.push(op.clone(), &[x, w], &Location::default()).expect("fits");
                graph.outputs.push((op.name().into(), value));
            }
            graph
        };
        let alone = [Op::LinearLse, Op::LinearMean].map(|op| single(op, &types));
        for graph in alone.into_iter().chain([Role::Frozen, Role::Trainable].map(both)) {
            graphs.extend(lengths.iter().map(|l| (graph.clone(), l.clone())));
        }
    }
    compare(&graphs, 2, CLOSE);
}

/// Logits beyond ±80: the largest so far grows from block to block, and e to most of them is nothing.
#[test]
fn sweeps_over_large_logits() {
    let parts = [(2 * head::BLOCK + 37, Role::Frozen), (3, Role::Trainable)];
    let graphs = [0.0, 0.1].map(|smoothing| {
        let graph = differentiate(&language_head(&parts, 3, smoothing, 32.0)).expect("differentiable");
        (fuse(&graph, |rule| rule == "head").expect("fused"), vec![1])
    });
    assert!(graphs.iter().all(|(g, _)| g.nodes.iter().any(|n| n.op == Op::LinearMean)));
    // Logits of a hundred are known to 10⁻⁵, and so is e to them, relatively.
    compare(&graphs, 2 * head::BLOCK as i32 + 40, 5e-5);
}

/// The bound `math.rs` names for angles up to 10⁵. Powers of two keep both sides at the same angles.
#[test]
fn sines_of_large_angles() {
    let mut graph = Graph::new("angles");
    let at = Location::default();
    let x = graph.arg("x", Role::Frozen, None, Type::f32([Dim::Const(20_000)]));
    for power in [0, 4, 10, 16] {
        let angle = graph.push(Op::Scale { by: f64::from(1 << power) }, &[x], &at).expect("fits");
        for op in [Op::Sin, Op::Cos] {
            let name = format!("{}.{power}", op.name());
            let value = graph.push(op, &[angle], &at).expect("fits");
            graph.outputs.push((name, value));
        }
    }
    compare(&[(graph, vec![1])], 1, 1e-7);
}
