//! Tests of each check on a kernel that is broken on purpose, mostly a test case with one line changed.

use ptx_sim::{Arg, ConflictingAccess, Error, Fault, FaultKind, Gpu, Module, Options, Ptr, Report, Result, Space};

use crate::{case, parse, text, to_f16, uniform};

/// A test case with one piece of its text replaced; the piece must occur exactly once.
fn broken(name: &str, piece: &str, by: &str) -> Module {
    let text = text(name);
    assert_eq!(text.matches(piece).count(), 1, "{piece:?} in {name}");
    parse(&text.replace(piece, by))
}

#[track_caller]
fn fault(result: Result<Report>) -> Fault {
    match result {
        Err(Error::Fault(fault)) => *fault,
        other => panic!("{other:?}"),
    }
}

/// PTX of a kernel `k` with one pointer parameter, these declarations and instructions.
fn kernel(target: u32, body: &str) -> String {
    format!(
        ".version 8.1\n.target sm_{target}\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n\
         .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;\n\
         ld.param.b64 %rd1, [p];\ncvta.to.global.u64 %rd1, %rd1;\nmov.u32 %r1, %tid.x;\n\
         mul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd3, %rd1, %rd2;\n{body}\nret;\n}}\n"
    )
}

fn run(body: &str) -> Result<Report> {
    run_with(Options::default(), 32, body)
}

/// Runs such a kernel in one block, on a buffer of 64 words that have been written.
fn run_with(options: Options, threads: u32, body: &str) -> Result<Report> {
    let mut gpu = Gpu::with(options);
    let buffer = gpu.alloc_u32(&(0..64).collect::<Vec<_>>());
    let module = Module::parse(&kernel(80, body))?;
    gpu.launch(&module, "k", 1, threads, 0, &[Arg::Ptr(buffer)])
}

fn sum_args(gpu: &mut Gpu) -> [Arg; 3] {
    [Arg::Ptr(gpu.alloc_f32(&uniform(1000, 1))), Arg::Ptr(gpu.alloc_unwritten(12)), Arg::I32(1000)]
}

#[test]
fn a_missing_barrier_is_a_race() {
    let text = text("block_sum_70");
    let count = text.matches("bar.sync").count();
    for nth in 0..count {
        let place = text.match_indices("bar.sync").nth(nth).unwrap().0;
        let module = parse(&format!("{}//{}", &text[..place], &text[place..]));
        let mut gpu = Gpu::new();
        let args = sum_args(&mut gpu);
        let fault = fault(gpu.launch(&module, "block_sum", 1, 64, 0, &args));
        assert!(fault.text.contains("shared"), "{fault}");
        if nth == 0 {
            // The first warp reaches memory that the second has not written yet.
            assert!(matches!(fault.kind, FaultKind::Uninitialised { space: Space::Shared, .. }), "{fault}");
            continue;
        }
        // Within a warp it is a race as well, since nothing orders its lanes.
        let FaultKind::Race { space: Space::Shared, line, other, .. } = fault.kind else { panic!("{fault}") };
        assert!(text.lines().nth(line - 1).unwrap().contains("shared"), "{fault}");
        assert!(matches!(other, ConflictingAccess::ReadInBlock | ConflictingAccess::WriteInBlock));
    }
}

#[test]
fn lanes_of_a_warp_race_unless_ordered() {
    let body = |order: &str| {
        format!(
            ".shared .align 4 .b8 s[128];\nmov.b64 %rd4, s;\nadd.s64 %rd5, %rd4, %rd2;\nst.shared.b32 [%rd5], %r1;\n\
             {order}\nxor.b32 %r2, %r1, 1;\nmul.wide.u32 %rd6, %r2, 4;\nadd.s64 %rd6, %rd4, %rd6;\n\
             ld.shared.b32 %r3, [%rd6];\nst.global.b32 [%rd3], %r3;"
        )
    };
    let shuffle = "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;";
    run(&body("bar.warp.sync -1;")).unwrap();
    run(&body("bar.sync 0;")).unwrap();
    run(&body(shuffle)).unwrap();
    let strict = Options { shuffles_order: false, ..Options::default() };
    for result in [run(&body("")), run_with(strict, 32, &body(shuffle))] {
        let fault = fault(result);
        assert_eq!((fault.thread, fault.text.as_str()), ([0, 0, 0], "ld.shared.b32 %r3, [%rd6];"));
        assert!(
            matches!(fault.kind, FaultKind::Race { other: ConflictingAccess::WriteInBlock, line: 15, .. }),
            "{fault}"
        );
    }
    run_with(Options { races: false, ..Options::default() }, 32, &body("")).unwrap();
}

#[test]
fn blocks_race_in_global_memory() {
    let module = parse(&kernel(70, "mov.u32 %r2, %ctaid.x;\nst.global.b32 [%rd1], %r2;"));
    for (across, blocks, races) in [(true, 1, false), (true, 2, true), (false, 2, false)] {
        let mut gpu = Gpu::with(Options { races_across_blocks: across, ..Options::default() });
        let buffer = Arg::Ptr(gpu.alloc_unwritten(4));
        let result = gpu.launch(&module, "k", blocks, 1, 0, std::slice::from_ref(&buffer));
        if races {
            let fault = fault(result);
            assert_eq!((fault.block, fault.line), ([1, 0, 0], 13));
            assert!(matches!(
                fault.kind,
                FaultKind::Race { other: ConflictingAccess::WriteInAnotherBlock, line: 13, .. }
            ));
        } else {
            result.unwrap();
        }
        // The next launch is ordered after this one.
        gpu.launch(&module, "k", 1, 1, 0, &[buffer]).unwrap();
    }
}

#[test]
fn out_of_bounds_accesses_are_faults() {
    // One thread more than the buffer has elements: `i < n` becomes `i <= n`.
    let module = broken("vector_add_70", "setp.ge.s32", "setp.gt.s32");
    let mut gpu = Gpu::new();
    let x = uniform(100, 1);
    let args = [Arg::Ptr(gpu.alloc_f32(&x)), Arg::Ptr(gpu.alloc_f32(&x)), Arg::Ptr(gpu.alloc_f32(&x)), Arg::I32(100)];
    let fault = fault(gpu.launch(&module, "vector_add", 2, 64, 0, &args));
    assert_eq!((fault.block, fault.thread), ([1, 0, 0], [36, 0, 0]));
    assert!(matches!(fault.kind, FaultKind::OutOfBounds { space: Space::Global, bytes: 4, .. }), "{fault}");
    assert_eq!(fault.text, "ld.global.b32 	%r6, [%rd3];");
    assert_eq!(text("vector_add_70").lines().nth(fault.line - 1).unwrap().trim(), fault.text);
}

#[test]
fn out_of_bounds_of_one_shared_array_is_a_fault() {
    let body = ".shared .align 4 .b8 a[128];\n.shared .align 4 .b8 b[128];\nmov.b64 %rd4, a;\n\
                add.s64 %rd4, %rd4, %rd2;\nst.shared.b32 [%rd4+4], %r1;\nst.shared.b32 [b], %r1;";
    let fault = fault(run(body));
    assert_eq!(fault.thread, [31, 0, 0]);
    assert!(matches!(fault.kind, FaultKind::OutOfBounds { space: Space::Shared, .. }), "{fault}");
}

#[test]
fn out_of_bounds_in_other_spaces_is_a_fault() {
    for (body, space) in [
        (".local .align 4 .b8 l[8];\nst.local.b32 [l+8], %r1;", Space::Local),
        ("ld.param.b32 %r2, [p+8];", Space::Param),
        ("ld.b32 %r2, [%rd2];", Space::Global),
        ("mov.b64 %rd4, 0;\nld.global.b32 %r2, [%rd4];", Space::Global),
    ] {
        let fault = fault(run(body));
        assert!(matches!(fault.kind, FaultKind::OutOfBounds { space: s, .. } if s == space), "{fault}");
    }
}

#[test]
fn freed_memory_is_out_of_bounds() {
    let module = parse(&kernel(70, "ld.global.b32 %r2, [%rd3];"));
    let mut gpu = Gpu::new();
    let buffer = gpu.alloc_u32(&[0; 32]);
    gpu.launch(&module, "k", 1, 32, 0, &[Arg::Ptr(buffer)]).unwrap();
    gpu.free(buffer);
    let fault = fault(gpu.launch(&module, "k", 1, 32, 0, &[Arg::Ptr(buffer)]));
    assert!(matches!(fault.kind, FaultKind::OutOfBounds { .. }));
}

#[test]
fn misaligned_accesses_are_faults() {
    let fault_of = |body: &str| fault(run(body));
    let fault = fault_of("ld.global.v2.b32 {%r2, %r3}, [%rd3];");
    assert_eq!(fault.thread, [1, 0, 0]);
    assert!(matches!(fault.kind, FaultKind::Misaligned { space: Space::Global, align: 8, .. }), "{fault}");
    // The address would be aligned on most chips, but the declaration does not guarantee it.
    let fault = fault_of(".shared .align 8 .b8 s[16];\nst.shared.v4.b32 [s], {%r1, %r1, %r1, %r1};");
    assert!(matches!(fault.kind, FaultKind::Misaligned { space: Space::Shared, align: 16, .. }), "{fault}");
}

#[test]
fn matrices_must_be_aligned() {
    let text = text("matmul_70").replace(".shared .align 32", ".shared .align 16");
    let fault = fault(run_matmul(&parse(&text), 0));
    assert!(matches!(fault.kind, FaultKind::Misaligned { space: Space::Shared, align: 32, .. }), "{fault}");
    assert!(fault.text.starts_with("wmma.load.a"), "{fault}");

    // Rows 48 bytes apart are not a multiple of the fragment's 32 bytes.
    let module = case("matmul_70");
    let options = Options { matrix_row_alignment: 32, ..Options::default() };
    let fault = self::fault(run_matmul_with(&module, options));
    assert!(matches!(fault.kind, FaultKind::Misaligned { align: 32, .. }), "{fault}");
}

fn run_matmul(module: &Module, seed: u64) -> Result<Report> {
    run_matmul_with(module, Options { seed, ..Options::default() })
}

fn run_matmul_with(module: &Module, options: Options) -> Result<Report> {
    let mut gpu = Gpu::with(options);
    let x = to_f16(&uniform(1024, 1));
    let args = [gpu.alloc_u16(&x), gpu.alloc_u16(&x), gpu.alloc_unwritten(4096)].map(Arg::Ptr);
    gpu.launch(module, "matmul", [2, 2], 32, 0, &args)
}

#[test]
fn overwriting_a_tile_in_use_is_a_race() {
    let text = text("matmul_70");
    // The barrier between the product of one step and the copy of the next.
    let place = text.match_indices("bar.sync").nth(1).unwrap().0;
    let module = parse(&format!("{}//{}", &text[..place], &text[place..]));
    let fault = fault(run_matmul(&module, 0));
    assert!(matches!(fault.kind, FaultKind::Race { other: ConflictingAccess::ReadInBlock, .. }), "{fault}");
    assert!(fault.text.starts_with("st.shared.v4.b32"), "{fault}");
}

#[test]
fn reads_of_unwritten_memory_are_faults() {
    let body = ".shared .align 4 .b8 s[128];\nmov.b64 %rd4, s;\nadd.s64 %rd4, %rd4, %rd2;\nsetp.ne.b32 %p1, %r1, 9;\n\
                @%p1 st.shared.b32 [%rd4], %r1;\nbar.sync 0;\nld.shared.b32 %r2, [%rd4];";
    let fault = fault(run(body));
    assert_eq!((fault.thread, fault.text.as_str()), ([9, 0, 0], "ld.shared.b32 %r2, [%rd4];"));
    assert!(matches!(fault.kind, FaultKind::Uninitialised { space: Space::Shared, .. }));
    run_with(Options { uninitialised: false, ..Options::default() }, 32, body).unwrap();

    // A block does not see what the block before left in shared memory.
    let body = ".shared .align 4 .b8 s[4];\nmov.u32 %r2, %ctaid.x;\nsetp.eq.b32 %p1, %r2, 0;\n\
                @%p1 st.shared.b32 [s], %r1;\nld.shared.b32 %r3, [s];";
    let module = parse(&kernel(70, body));
    let mut gpu = Gpu::new();
    let buffer = Arg::Ptr(gpu.alloc_u32(&[0]));
    let fault = self::fault(gpu.launch(&module, "k", 2, 1, 0, &[buffer]));
    assert_eq!(fault.block, [1, 0, 0]);

    let module = parse(&kernel(70, "ld.global.b32 %r2, [%rd3];"));
    let buffer = Arg::Ptr(gpu.alloc_unwritten(128));
    let fault = self::fault(gpu.launch(&module, "k", 1, 32, 0, &[buffer]));
    assert!(matches!(fault.kind, FaultKind::Uninitialised { space: Space::Global, .. }));

    let fault = self::fault(run(".local .align 4 .b8 l[8];\nld.local.b32 %r2, [l];"));
    assert!(matches!(fault.kind, FaultKind::Uninitialised { space: Space::Local, .. }));
}

#[test]
fn unwritten_registers_hold_garbage() {
    let mut gpu = Gpu::new();
    let module = parse(&kernel(70, "st.global.b32 [%rd3], %r7;"));
    let buffer = gpu.alloc_unwritten(128);
    gpu.launch(&module, "k", 1, 32, 0, &[Arg::Ptr(buffer)]).unwrap();
    assert!(gpu.read_u32(buffer).iter().filter(|&&x| x == 0).count() < 2);
}

#[test]
fn a_barrier_in_one_arm_of_a_branch_is_a_fault() {
    let body = "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nbar.sync 0;";
    let fault = fault(run(body));
    assert_eq!((fault.line, fault.thread), (14, [7, 0, 0]));
    assert_eq!(fault.kind, FaultKind::Divergent { missing: 0x7F });
    // Lanes that have exited are not waited for.
    run("setp.lt.u32 %p1, %r1, 7;\n@%p1 exit;\nbar.sync 0;").unwrap();
}

#[test]
fn warps_at_different_barriers_deadlock() {
    let body = "mov.u32 %r2, %warpid;\nsetp.eq.b32 %p1, %r2, 0;\n@%p1 bra $L;\nbar.sync 1;\nret;\n$L:\nbar.sync 0;";
    let fault = fault(run_with(Options::default(), 64, body));
    assert_eq!((fault.thread, fault.kind), ([32, 0, 0], FaultKind::Deadlock));
}

#[test]
fn aligned_instructions_need_the_whole_warp() {
    let text = text("fragments_70");
    let place = text.find("wmma.load.c.sync.aligned.row.m16n16k16.f32").unwrap();
    let guarded = format!("{}mov.u32 %r1, %laneid;\nsetp.ne.b32 %p, %r1, 5;\n@%p {}", &text[..place], &text[place..]);
    let entry = guarded.rfind(".reg .b32").unwrap();
    let module = parse(&format!("{}.reg .pred %p;\n{}", &guarded[..entry], &guarded[entry..]));
    let mut gpu = Gpu::new();
    let args = [gpu.alloc_f32(&[0.0; 256]), gpu.alloc_unwritten(1024)].map(Arg::Ptr);
    let fault = fault(gpu.launch(&module, "knows_layout", 1, 32, 0, &args));
    assert_eq!(fault.kind, FaultKind::Divergent { missing: 1 << 5 });
}

#[test]
fn the_mask_of_a_shuffle_must_fit_its_lanes() {
    let half = "setp.lt.u32 %p1, %r1, 16;\n@!%p1 bra $L;\nSHUFFLE\n$L:";
    let with = |shuffle: &str| run(&half.replace("SHUFFLE", shuffle));
    with("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xFFFF;").unwrap();
    let fault = fault(with("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"));
    assert_eq!(fault.kind, FaultKind::Membership { mask: !0, active: 0xFFFF });
    let fault = self::fault(with("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xFF;"));
    assert_eq!(fault.thread, [8, 0, 0]);
    let fault = self::fault(with("shfl.sync.bfly.b32 %r2, %r1, 16, 31, 0xFFFF;"));
    assert_eq!(fault.kind, FaultKind::AbsentLane { lane: 16 });
}

#[test]
fn uniform_branches_must_not_diverge() {
    let fault = fault(run("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra.uni $L;\n$L:"));
    assert_eq!((fault.line, fault.kind), (13, FaultKind::NotUniform));
}

fn stream(module: &Module) -> Result<Report> {
    let mut gpu = Gpu::new();
    let args = [Arg::Ptr(gpu.alloc_f32(&uniform(640, 1))), Arg::Ptr(gpu.alloc_unwritten(128)), Arg::I32(5)];
    gpu.launch(module, "stream", 1, 32, 1024, &args)
}

#[test]
fn access_to_a_pending_copy_is_a_fault() {
    stream(&case("stream_80")).unwrap();
    // Two groups may be pending where one may.
    let fault = fault(stream(&broken("stream_80", "cp.async.wait_group \t1;", "cp.async.wait_group 2;")));
    assert!(matches!(fault.kind, FaultKind::PendingCopy { .. }), "{fault}");
    assert!(fault.text.starts_with("ld.shared"), "{fault}");
}

#[test]
fn waiting_for_a_copy_concerns_only_the_own_thread() {
    let text = text("stream_80");
    for (nth, racy) in [(0, "ld.shared"), (1, "cp.async.cg")] {
        let place = text.match_indices("bar.sync").nth(nth).unwrap().0;
        let fault = fault(stream(&parse(&format!("{}//{}", &text[..place], &text[place..]))));
        assert!(matches!(fault.kind, FaultKind::Race { space: Space::Shared, .. }), "{fault}");
        assert!(fault.text.contains(racy), "{fault}");
    }
}

#[test]
fn constant_loads_of_written_memory_are_faults() {
    let fault_of = |body: &str| fault(run(body)).kind;
    assert!(matches!(
        fault_of("st.global.b32 [%rd3], %r1;\nld.global.nc.b32 %r2, [%rd3];"),
        FaultKind::NotConstant { .. }
    ));
    assert!(matches!(
        fault_of("ld.global.nc.b32 %r2, [%rd3];\nst.global.b32 [%rd3], %r1;"),
        FaultKind::NotConstant { .. }
    ));
}

#[test]
fn float_atomics_are_refused() {
    let module = case("cooperation_70");
    let launch = |gpu: &mut Gpu| {
        let sum: Ptr = gpu.alloc_f32(&[0.5]);
        gpu.launch(&module, "float_sum", 1, 32, 0, &[Arg::Ptr(sum)]).map(|_| gpu.read_f32(sum))
    };
    match launch(&mut Gpu::new()) {
        Err(Error::Fault(fault)) => assert_eq!(fault.kind, FaultKind::FloatAtomic),
        other => panic!("{other:?}"),
    }
    let mut gpu = Gpu::with(Options { float_atomics: true, ..Options::default() });
    assert_eq!(launch(&mut gpu).unwrap(), [32.5]);
}

#[test]
fn fragment_layouts_cannot_be_relied_on() {
    let module = case("fragments_70");
    let c = uniform(256, 1);
    let run = |seed| {
        let mut gpu = Gpu::with(Options { seed, ..Options::default() });
        let (pc, d) = (gpu.alloc_f32(&c), gpu.alloc_unwritten(1024));
        gpu.launch(&module, "knows_layout", 1, 32, 0, &[pc, d].map(Arg::Ptr)).unwrap();
        gpu.read_f32(d)
    };
    let (one, two) = (run(1), run(2));
    assert!(one != c && two != c && one != two);
    // All elements are present nevertheless.
    let sorted = |mut x: Vec<f32>| {
        x.sort_by(f32::total_cmp);
        x
    };
    assert_eq!(sorted(one), sorted(c.clone()));
}

#[test]
fn using_a_fragment_as_another_kind_is_a_fault() {
    // a is loaded column-major and used as if it were row-major.
    let module =
        broken("fragments_70", "wmma.load.a.sync.aligned.col.m8n32k16", "wmma.load.a.sync.aligned.row.m8n32k16");
    let mut gpu = Gpu::new();
    let x = to_f16(&uniform(512, 1));
    let args = [gpu.alloc_u16(&x), gpu.alloc_u16(&x), gpu.alloc_unwritten(1024)].map(Arg::Ptr);
    let fault = fault(gpu.launch(&module, "tall", 1, 32, 0, &args));
    assert_eq!(fault.kind, FaultKind::Fragment);
    assert!(fault.text.starts_with("wmma.mma"), "{fault}");
}

#[test]
fn endless_loops_run_into_the_step_limit() {
    let options = Options { steps: 10_000, ..Options::default() };
    let fault = fault(run_with(options, 32, "$L:\nadd.s32 %r1, %r1, 1;\nbra $L;"));
    assert_eq!(fault.kind, FaultKind::Steps { limit: 10_000 });
    assert!(matches!(fault.line, 13 | 14));
}

#[test]
fn traps_are_faults() {
    let fault = fault(run("setp.eq.b32 %p1, %r1, 3;\n@%p1 trap;"));
    assert_eq!((fault.thread, fault.line, fault.kind), ([3, 0, 0], 13, FaultKind::Trap));
}

#[test]
fn unknown_instructions_are_named() {
    for (instruction, name) in [
        ("frobnicate.b32 %r1, %r2;", "frobnicate"),
        ("add.rn.funny.f32 %r1, %r2, %r3;", "funny"),
        ("tex.1d.v4.f32.s32 {%r1, %r2, %r3, %r4}, [%rd1, {%r5}];", "tex"),
        ("mul.lo.f32 %r1, %r2, %r3;", "mul"),
        ("div.rz.f32.extra %r1, %r2, %r3;", "extra"),
    ] {
        match run(instruction) {
            Err(Error::Unknown { line: 12, text, message }) => {
                assert_eq!(text, instruction);
                assert!(message.contains(name), "{message}");
            }
            // The operands have a form that no known instruction has.
            Err(Error::Parse { line: 12, text, .. }) if name == "tex" => assert_eq!(text, instruction),
            other => panic!("{instruction}: {other:?}"),
        }
    }
}

#[test]
fn instructions_that_the_target_lacks_are_refused() {
    for (target, needs, instruction) in [
        (70, 80, "cp.async.commit_group;"),
        (70, 75, "tanh.approx.f32 %r2, %r1;"),
        (75, 80, "fma.rn.bf16 %rs1, %rs2, %rs3, %rs4;"),
        (80, 90, "add.rn.bf16 %rs1, %rs2, %rs3;"),
        (70, 80, "cvt.rn.f16x2.f32 %r2, %r1, %r1;"),
    ] {
        match Module::parse(&kernel(target, instruction)) {
            Err(Error::Target { line: 12, needs: sm, .. }) => assert_eq!(sm, needs),
            other => panic!("{instruction}: {:?}", other.map(|_| ())),
        }
        parse(&kernel(needs, instruction));
    }
}

#[test]
fn modules_that_ptxas_would_refuse_are_refused() {
    for body in [
        "add.s32 %r1, %r2, %rd1;",
        "add.s32 %r1, %r2, %nothing;",
        "bra $nowhere;",
        "mov.b32 {%rs1, %rs2}, %rd1;",
        "st.shared.v2.b32 [%rd1], {%r1, %r2, %r3};",
        "add.s32 %r1, %r2;",
        "cp.async.cg.shared.global [%rd1], [%rd2], 8;",
        "setp.eq.s32 %r1, %r2, %r3;",
        "$L:\n$L:",
    ] {
        match run(body) {
            Err(Error::Parse { line, .. }) => assert!(line >= 12, "{body}"),
            other => panic!("{body}: {other:?}"),
        }
    }
}

#[test]
fn texts_that_are_not_ptx_are_refused() {
    for text in ["", ".version 7.0", ".target sm_70\n.visible .entry k(", "\"", "\u{e9}", ".target sm_70 } {", "/*"] {
        assert!(matches!(Module::parse(text), Err(Error::Parse { .. })), "{text:?}");
    }
    // No prefix of a valid text that ends within a kernel is accepted, and none makes the parser panic.
    let whole = text("scalars_70");
    for end in (0..whole.len()).step_by(97) {
        let _ = Module::parse(&whole[..end]);
    }
}

#[test]
fn impossible_launches_are_refused() {
    let bounded = ".version 7.0\n.target sm_70\n.address_size 64\n.extern .shared .align 16 .b8 s[];\n\
                   .visible .entry k(.param .u64 p, .param .u32 n)\n.maxntid 64\n{\n\
                   .reg .b64 %rd;\nmov.b64 %rd, s;\nret;\n}\n\
                   .visible .entry fixed()\n.reqntid 8, 4\n{\nret;\n}";
    let module = parse(bounded);
    let mut gpu = Gpu::new();
    let p = Arg::Ptr(gpu.alloc_u32(&[0]));
    let good = [p.clone(), Arg::U32(1)];
    gpu.launch(&module, "k", 1, 64, 96 << 10, &good).unwrap();
    gpu.launch(&module, "fixed", 1, [8, 4], 0, &[]).unwrap();
    let mut refused = |kernel: &str, grid: u32, block: u32, shared: usize, args: &[Arg]| match gpu
        .launch(&module, kernel, grid, block, shared, args)
    {
        Err(Error::Launch { kernel: named, .. }) => assert_eq!(named, kernel),
        other => panic!("{other:?}"),
    };
    refused("nothing", 1, 1, 0, &[]);
    refused("k", 0, 1, 0, &good);
    refused("k", 1, 65, 0, &good);
    refused("k", 1, 64, (96 << 10) + 4, &good);
    refused("k", 1, 1, 0, &good[..1]);
    refused("k", 1, 1, 0, &[p, Arg::U64(1)]);
    refused("fixed", 1, 32, 0, &[]);
}
