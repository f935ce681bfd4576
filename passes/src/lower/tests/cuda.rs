//! The same tests for GPU kernels: their PTX is executed by an interpreter that faults on races between lanes, on
//! accesses out of bounds and on reads of uninitialised memory.

use std::collections::HashSet;

use ptx_sim::{Arg, FaultKind, Gpu, Module, Ptr, Report};

use super::*;
use crate::dialect::Dialect;
use crate::kernels::Schedule;
use crate::kernels::attention::shape::AttentionResult;
use crate::target::cuda::{WARP, WARPS};

/// The most blocks of a launch: so few that each warp computes several units.
const BLOCKS: u64 = 3;

/// Compares every output of the graphs, executed in PTX, with the interpreter's.
pub(crate) fn compare(graphs: &[(Graph, Vec<usize>)], chip: Chip, limit: i32, tolerance: f64) {
    each(graphs, chip, Precision::F32, limit, |outcome| outcome.close(Machine::Cuda(chip), tolerance));
}

fn each(
    graphs: &[(Graph, Vec<usize>)],
    chip: Chip,
    precision: Precision,
    limit: i32,
    mut judge: impl FnMut(Outcome<'_>),
) {
    let machine = Machine::Cuda(chip);
    let (texts, manifests) = lowered(graphs, Options { machine, precision, ..Options::default() });
    let module = assembled(&texts, machine);
    for ((graph, lengths), manifest) in graphs.iter().zip(&manifests) {
        let case = Case::new(graph, lengths, limit);
        let (gpu, buffers, _) = run(&module, manifest, lengths, &case).unwrap_or_else(|e| panic!("{e}"));
        for (output, (name, want)) in manifest.entries["grad"].outputs.iter().zip(&case.want) {
            let (found, want) = (gpu.read_f32(buffers[output.buffer]), want.floats());
            assert_eq!(found.len(), want.len(), "{name} of {}", graph.nodes[0].op.name());
            judge(Outcome { graph, batch: &case.batch, args: &case.args, name, found: &found, want });
        }
    }
}

fn assembled(kernels: &[String], machine: Machine) -> Module {
    let dialect = Dialect::new().expect("a dialect");
    let text = codegen::ptx(&dialect, kernels, machine).unwrap_or_else(|e| panic!("{e}"));
    Module::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// Runs all launches of a manifest in order. Returns the memory, each buffer's address in it, and the launches'
/// reports.
fn run(
    module: &Module,
    manifest: &Manifest,
    lengths: &[usize],
    case: &Case,
) -> Result<(Gpu, Vec<Ptr>, Vec<Report>), ptx_sim::Error> {
    let sizes = &case.sizes;
    let mut gpu = Gpu::new();
    let place = |b: &Buffer| match content(b, manifest, lengths, &case.args) {
        Some(words) => gpu.alloc_u32(&words),
        None => gpu.alloc_unwritten(4 * b.elements(sizes) as usize),
    };
    let buffers: Vec<Ptr> = manifest.buffers.iter().map(place).collect();
    let mut reports = vec![];
    for launch in manifest.prepare.iter().chain(&manifest.entries["grad"].launches) {
        let units = launch.units.eval(sizes);
        if units > 0 {
            let number = |n: u64| Arg::U32(n.try_into().expect("32 bits"));
            let extents = launch.extents.iter().map(|e| number(e.eval(sizes)));
            let pointers = launch.buffers.iter().map(|&b| Arg::Ptr(buffers[b]));
            let args: Vec<Arg> = pointers.chain(extents).chain([number(units)]).collect();
            let blocks = units.div_ceil(WARPS).min(BLOCKS) as u32;
            let (kernel, threads) = (&manifest.kernels[launch.kernel], (WARP * WARPS) as u32);
            reports.push(gpu.launch(module, kernel, blocks, threads, 0, &args)?);
        }
    }
    Ok((gpu, buffers, reports))
}

#[test]
fn every_operation_and_its_derivative_match_the_interpreter() {
    compare(&operations(&[(2, 3, 2), (3, 40, 17)]), Chip::Sm70, 2, CLOSE);
}

#[test]
fn operations_without_derivatives_match_the_interpreter() {
    compare(&forward(), Chip::Sm70, 2, CLOSE);
}

#[test]
fn kernels_read_strided_views() {
    compare(&views(), Chip::Sm70, 2, CLOSE);
    compare(&heads(), Chip::Sm70, 2, 10.0 * CLOSE);
}

#[test]
fn fused_attention_matches_the_interpreter() {
    let lengths = [vec![2, 17, 1], vec![33, 3], vec![70]];
    compare(&attention(&[(2, 3, 5), (1, 40, 40)], &attention_parameters(), &lengths), Chip::Sm70, 2, CLOSE);
    // Heads are wider than the columns of a result that one block computes.
    for chip in [Chip::Sm70, Chip::Sm80] {
        compare(&attention(&[(1, 66, 130)], &attention_parameters()[4..6], &[vec![3, 66]]), chip, 2, CLOSE);
    }
}

/// Heads as wide as in the real models and as narrow as in tiny ones, over one token, over lengths that do not fill
/// whole tiles, and behind a prefix that shifts the random generator's columns.
#[test]
fn attention_of_real_head_widths_matches_the_interpreter() {
    for chip in [Chip::Sm70, Chip::Sm80] {
        compare(
            &attention(&[(2, 8, 8), (1, 64, 64)], &attention_parameters()[7..8], &[vec![1], vec![3, 1, 65]]),
            chip,
            2,
            CLOSE,
        );
    }
}

/// The bytes that attention touches, each counted once for reading and once for writing, are those of its operands and
/// results. They grow linearly with the tokens, so the score matrix is not materialised.
#[test]
fn attention_touches_memory_linear_in_the_tokens() {
    let machine = Machine::Cuda(Chip::Sm80);
    let touched = |length: usize| -> Vec<f64> {
        let graphs = attention(&[(1, 64, 64)], &[(true, (0.1, 0))], &[vec![length]]);
        let (texts, manifests) = lowered(&graphs, Options { machine, ..Options::default() });
        let module = assembled(&texts, machine);
        let share = |((graph, lengths), manifest): (&(Graph, Vec<usize>), &Manifest)| {
            let case = Case::new(graph, lengths, 2);
            let (.., reports) = run(&module, manifest, lengths, &case).unwrap_or_else(|e| panic!("{e}"));
            let attends = |op: &str| op.starts_with("attention");
            let launches = manifest.entries["grad"].launches.iter().zip(reports);
            let touched = launches.filter(|(launch, _)| attends(&launch.op));
            let touched: u64 = touched.map(|(_, report)| report.read.unique + report.written.unique).sum();
            let nodes = graph.nodes.iter().filter(|node| attends(node.op.name()));
            let given: HashSet<Value> = nodes.flat_map(|node| [&node.operands[..], &node.results].concat()).collect();
            let given: u64 =
                given.iter().map(|&v| 4 * super::super::sizes::element_count(graph.ty(v)).eval(&case.sizes)).sum();
            touched as f64 / given as f64
        };
        graphs.iter().zip(&manifests).map(share).collect()
    };
    let (short, long) = (touched(81), touched(243));
    assert!(short.iter().all(|&share| share < 1.1), "{short:?}");
    let alike = |(long, short): (&f64, &f64)| (long / short - 1.0).abs() < 0.01;
    assert!(long.iter().zip(&short).all(alike), "{short:?} {long:?}");
}

#[test]
fn chunked_logits_match_the_interpreter() {
    let mut cases = chunked_logits();
    cases.retain(|(_, lengths)| lengths.len() != 1);
    compare(&cases, Chip::Sm70, 2, CLOSE);
}

#[test]
fn products_of_sizes_around_the_tiles_match_the_interpreter() {
    compare(&products(), Chip::Sm70, 2, CLOSE);
}

/// Tensor cores multiply in f16 before sm_80, and in bf16 from sm_80 on.
#[test]
fn tensor_core_products_stay_within_their_bound() {
    let mut graphs = frozen_products();
    // Rows as small as adjoints, and zero rows.
    for by in [1e-9, 0.0] {
        let mut graph = Graph::new("small");
        let ty = |shape: [u64; 2]| Type::f32(shape.map(Dim::Const));
        let (x, y) =
            (graph.arg("x", Role::Input, None, ty([35, 40])), graph.arg("y", Role::Frozen, None, ty([40, 70])));
        let at = Location::default();
        let x = graph.push(Op::Scale { by }, &[x], &at).expect("fits");
        let z = graph.push(Op::Matmul { transpose_x: false, transpose_y: false }, &[x, y], &at).expect("fits");
        graph.outputs.push(("z".into(), z));
        graphs.push((graph, vec![1]));
    }
    for ((chip, most), share) in HALF_PRECISION.into_iter().zip([1.0 / 1024.0, 1.0 / 128.0]) {
        let mut rounded = false;
        each(&graphs, chip, Precision::Bf16, 2, |outcome| {
            outcome.all_close(Machine::Cuda(chip), most);
            rounded |= outcome.product(share, Machine::Cuda(chip));
        });
        assert!(rounded, "no product was rounded by tensor cores on {chip}");
        each(&frozen_chunked_logits(), chip, Precision::Bf16, 2, |outcome| outcome.chunked_logits(Machine::Cuda(chip)));
    }
}

/// Tolerances of half precision relative to the largest result: f16 has a significand of 11 bits, bf16 of 8.
const HALF_PRECISION: [(Chip, f64); 2] = [(Chip::Sm70, 2e-3), (Chip::Sm80, 8.0 * 2e-3)];

/// Epilogues of gemms in f32 and in half precision.
#[test]
fn products_with_epilogues_match_the_interpreter() {
    let mut graphs = vec![];
    for (tokens, d, n) in [(1, 64, 64), (35, 520, 24), (71, 8, 70)] {
        // A sum over tokens adds an error that is not the product's.
        let own = |(graph, _): &(Graph, _)| graph.name != "chain" && graph.name != "late";
        graphs.extend(followed(d, n).into_iter().filter(own).map(|(graph, _)| (graph, vec![tokens])));
    }
    compare(&graphs, Chip::Sm70, 2, LONG);
    for (chip, most) in HALF_PRECISION {
        each(&graphs, chip, Precision::Bf16, 2, |outcome| outcome.all_close(Machine::Cuda(chip), most));
    }
}

/// Partial tiles, one row, rows of one column, of exactly a tile's columns and of more, and split-K.
#[test]
fn products_with_row_sums_fuse_and_match_the_interpreter() {
    let mut graphs = vec![];
    for (tokens, d, n) in [(1, 5, 64), (71, 8, 33), (35, 3, 1), (9, 520, 24), (9, 5, 70)] {
        for (graph, called) in summed(d, n) {
            let machine = Machine::Cuda(Chip::Sm70);
            if n <= 64 && d < 512 {
                assert_eq!(launches_on(machine, &graph, true), called, "{} of {n}", graph.name);
            }
            assert!(!launches_on(machine, &graph, false).contains("matmul+"));
            graphs.push((graph, vec![tokens]));
        }
    }
    compare(&graphs, Chip::Sm70, 2, LONG);
    for (chip, most) in HALF_PRECISION {
        // The rounding errors of a row's elements add up.
        each(&graphs, chip, Precision::Bf16, 2, |outcome| outcome.all_close(Machine::Cuda(chip), 4.0 * most));
    }
}

/// Fewer elements than a warp has lanes, exactly as many, and more than one unit computes.
#[test]
fn elementwise_kernels_of_sizes_around_a_warp_match_the_interpreter() {
    let mut graphs = vec![];
    for n in [1, 31, 32, 33, 1000, 8200] {
        let mut graph = Graph::new("elements");
        let at = Location::default();
        let ty = Type::f32([Dim::Const(n)]);
        let [x, y] = ["x", "y"].map(|name| graph.arg(name, Role::Input, None, ty.clone()));
        let sum = graph.push(Op::Add, &[x, y], &at).expect("fits");
        let root = graph.push(Op::Gelu, &[sum], &at).expect("fits");
        graph.outputs.push(("z".into(), root));
        graphs.push((graph, vec![1]));
    }
    for (chip, _) in Chip::ALL {
        compare(&graphs, chip, 2, CLOSE);
    }
}

/// The interpreter detects errors: each of these kernels is broken in one place and must fault.
#[test]
fn broken_kernels_fault() {
    let width = Dim::Const(40);
    let rows = Type::f32([Dim::Tokens, width]);
    let loss = [rows.clone(), Type::i32([Dim::Tokens]), Type::f32([Dim::Tokens])];
    type Expected = fn(&FaultKind) -> bool;
    let cases: [(Op, &[Type], &str, &str, Expected); 4] = [
        // Lane 0 reads what another lane stored, without a barrier.
        (Op::CrossEntropyVjp { smoothing: 0.0 }, &loss, "nvvm.bar.warp.sync", "//", |kind| {
            matches!(kind, FaultKind::Race { .. })
        }),
        // One lane accesses an element beyond the end.
        (Op::Softmax, std::slice::from_ref(&rows), "arith.cmpi slt", "arith.cmpi sle", |kind| {
            matches!(kind, FaultKind::OutOfBounds { .. })
        }),
        // The exponentials that softmax divides are not stored.
        (Op::Softmax, std::slice::from_ref(&rows), "llvm.store", "//", |kind| {
            matches!(kind, FaultKind::Uninitialised { .. })
        }),
        // All lanes but the first store the result, instead of the first alone.
        (Op::LogSumExp, std::slice::from_ref(&rows), "arith.cmpi eq", "arith.cmpi ne", |kind| {
            matches!(kind, FaultKind::Race { .. })
        }),
    ];
    for (op, types, sound, broken, expected) in cases {
        let graphs = [(single(op, types), vec![1])];
        let machine = Machine::Cuda(Chip::Sm70);
        let (texts, manifests) = lowered(&graphs, Options { machine, ..Options::default() });
        let texts: Vec<String> = texts.iter().map(|text| text.replace(sound, broken)).collect();
        let ran = run(&assembled(&texts, machine), &manifests[0], &graphs[0].1, &Case::new(&graphs[0].0, &[1], 2));
        match ran.map(|_| ()) {
            Err(ptx_sim::Error::Fault(fault)) if expected(&fault.kind) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Snapshots of the PTX of one small kernel of each kind.
#[test]
fn ptx_of_small_kernels() {
    let rows = Type::f32([Dim::Tokens, Dim::Const(40)]);
    let table = Type::f32([Dim::Const(9), Dim::Const(40)]);
    let ids = Type::i32([Dim::Tokens]);
    let rng = Type::i32([Dim::Const(2)]);
    let kinds: [(&str, Op, &[Type]); 7] = [
        ("elements", Op::Relu, std::slice::from_ref(&rows)),
        ("draws", Op::Dropout { p: 0.1, stream: 1, column: 0 }, &[rows.clone(), rng]),
        ("rows", Op::Softmax, std::slice::from_ref(&rows)),
        ("sum", Op::Reduce { axes: vec![1], keep: false, mean: false }, std::slice::from_ref(&rows)),
        ("columns", Op::Reduce { axes: vec![0], keep: false, mean: true }, std::slice::from_ref(&rows)),
        ("reads", Op::Gather { start: 0 }, &[table.clone(), ids]),
        ("product", Op::Matmul { transpose_x: false, transpose_y: true }, &[rows.clone(), table]),
    ];
    for (name, op, types) in kinds {
        let mut graph = Graph::new(name);
        let args = types.iter().enumerate();
        let args = args.map(|(i, ty)| graph.arg(format!("x{i}"), Role::Input, None, ty.clone())).collect::<Vec<_>>();
        let value = graph.push(op, &args, &Location::default()).expect("fits");
        graph.outputs.push(("z".into(), value));
        let machine = Machine::Cuda(Chip::Sm70);
        let texts = with_numbered_names(&mut program(&graph, Options { machine, ..Options::default() }));
        let dialect = Dialect::new().expect("a dialect");
        insta::assert_snapshot!(name, codegen::ptx(&dialect, &texts, machine).unwrap_or_else(|e| panic!("{e}")));
    }
}

/// The kernels' texts with the names k0, k1 and so on, so that snapshots do not depend on hashes.
fn with_numbered_names(program: &mut Lowered) -> Vec<String> {
    program.manifest.kernels = (0..program.functions.len()).map(|i| format!("k{i}")).collect();
    program.kernels()
}

/// An outline of a large kernel: its memory accesses, barriers, tensor-core instructions and branches; runs of
/// arithmetic are counted.
fn outline(ptx: &str) -> String {
    let told = ["ld", "st", "cp", "bar", "barrier", "bra", "wmma", "shfl", "atom", "ret"];
    let mut steps: Vec<(String, usize)> = vec![];
    let body = ptx.lines().skip_while(|line| *line != "{").map(str::trim);
    for line in body.filter(|line| !line.is_empty() && !line.starts_with(['.', '{', '}', ')', '/'])) {
        let (guard, rest) = match line.strip_prefix('@') {
            Some(guarded) => guarded.split_once(' ').map_or((true, line), |(_, rest)| (true, rest.trim())),
            None => (false, line),
        };
        let mut words = rest.split_whitespace();
        let opcode = words.next().unwrap_or_default().trim_end_matches(';');
        let step = match opcode.split('.').next().unwrap_or_default() {
            "bra" => format!("{}{rest}", if guard { "if … " } else { "" }),
            family if told.contains(&family) => opcode.to_string(),
            _ if opcode.ends_with(':') => opcode.to_string(),
            _ => "arithmetic".to_string(),
        };
        match steps.last_mut() {
            Some((last, count)) if *last == step => *count += 1,
            _ => steps.push((step, 1)),
        }
    }
    let show = |(step, count): (String, usize)| match count {
        1 => step,
        _ => format!("{count} × {step}"),
    };
    steps.into_iter().map(show).collect::<Vec<_>>().join("\n")
}

/// Snapshots of the outlines of kernels that are too large to review as PTX.
#[test]
fn ptx_outlines_of_large_kernels() {
    let frozen = || {
        let mut graph = Graph::new("frozen");
        let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Tokens, Dim::Const(64)]));
        let y = graph.arg("y", Role::Frozen, None, Type::f32([Dim::Const(64), Dim::Const(64)]));
        // The result of a kernel is aligned for 16-byte loads, unlike an input.
        let x = graph.push(Op::Relu, &[x], &Location::default()).expect("fits");
        let z = graph.push(Op::Matmul { transpose_x: false, transpose_y: false }, &[x, y], &Location::default());
        graph.outputs.push(("z".into(), z.expect("fits")));
        graph
    };
    let narrow = || {
        let mut graph = Graph::new("narrow");
        let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Tokens, Dim::Const(768)]));
        let y = graph.arg("y", Role::Trainable, None, Type::f32([Dim::Const(768), Dim::Const(8)]));
        let z = graph.push(Op::Matmul { transpose_x: false, transpose_y: false }, &[x, y], &Location::default());
        graph.outputs.push(("z".into(), z.expect("fits")));
        graph
    };
    let attends = |nth| attention(&[(1, 64, 64)], &[(true, (0.1, 0))], &[vec![9]]).remove(nth).0;
    type Selects = fn(&Schedule) -> bool;
    let tensor_cores: Selects = |schedule| matches!(schedule, Schedule::Mma(_));
    let cases: [(&str, Chip, Graph, Selects); 5] = [
        ("narrow", Chip::Sm70, narrow(), |schedule| matches!(schedule, Schedule::Skinny(_))),
        ("tensor_cores_sm_70", Chip::Sm70, frozen(), tensor_cores),
        ("tensor_cores_sm_80", Chip::Sm80, frozen(), tensor_cores),
        ("attention", Chip::Sm70, attends(0), |schedule| matches!(schedule, Schedule::GpuAttention(_))),
        ("attention_backward", Chip::Sm70, attends(6), |schedule| {
            let Schedule::GpuAttention(attention) = schedule else { return false };
            attention.computes == AttentionResult::AllAdjoints
        }),
    ];
    for (name, chip, graph, selects) in cases {
        let machine = Machine::Cuda(chip);
        let options = Options { machine, precision: Precision::Bf16, ..Options::default() };
        let mut program = program(&graph, options);
        let at = program.functions.iter().position(|function| selects(&function.schedule));
        let at = at.unwrap_or_else(|| panic!("no {name} in {:?}", program.functions));
        let texts = with_numbered_names(&mut program);
        let ptx = codegen::ptx(&Dialect::new().expect("a dialect"), &texts[at..=at], machine);
        insta::assert_snapshot!(name, outline(&ptx.unwrap_or_else(|e| panic!("{e}"))));
    }
}
