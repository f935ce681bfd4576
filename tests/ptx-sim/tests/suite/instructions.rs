//! Tests of instructions and forms that the other cases do not contain, one at a time.

use half::{bf16, f16};
use ptx_sim::{Arg, Gpu, Kind, Options};

use crate::parse;

/// The value of `%rd9` in lane 0 after these instructions, in a module for sm_90.
fn value(body: &str) -> u64 {
    lanes(body)[0]
}

fn lanes(body: &str) -> Vec<u64> {
    let text = format!(
        ".version 8.1\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n\
         .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %rd<12>;\n\
         ld.param.b64 %rd10, [p];\nmov.u32 %r8, %tid.x;\nmul.wide.u32 %rd11, %r8, 8;\nadd.s64 %rd10, %rd10, %rd11;\n\
         {body}\nst.global.b64 [%rd10], %rd9;\nret;\n}}\n"
    );
    let mut gpu = Gpu::with(Options { perturb: false, ..Options::default() });
    let out = gpu.alloc_unwritten(256);
    gpu.launch(&parse(&text), "k", 1, 32, 0, &[Arg::Ptr(out)]).unwrap_or_else(|error| panic!("{error}"));
    gpu.read_u64(out)
}

/// The result of an instruction on 32-bit registers, such as `op.ty`, with these operands.
fn of32(op: &str, operands: &[u32]) -> u32 {
    let moves: String = operands.iter().enumerate().map(|(n, x)| format!("mov.b32 %r{}, {x:#x};\n", n + 1)).collect();
    let names: String = (1..=operands.len()).map(|n| format!(", %r{n}")).collect();
    value(&format!("{moves}{op} %r0{names};\ncvt.u64.u32 %rd9, %r0;")) as u32
}

fn of16(op: &str, operands: &[u16]) -> u16 {
    let moves: String = operands.iter().enumerate().map(|(n, x)| format!("mov.b16 %h{}, {x:#x};\n", n + 1)).collect();
    let names: String = (1..=operands.len()).map(|n| format!(", %h{n}")).collect();
    value(&format!("{moves}{op} %h0{names};\ncvt.u64.u16 %rd9, %h0;")) as u16
}

fn of64(op: &str, operands: &[u64]) -> u64 {
    let moves: String = operands.iter().enumerate().map(|(n, x)| format!("mov.b64 %rd{}, {x:#x};\n", n + 1)).collect();
    let names: String = (1..=operands.len()).map(|n| format!(", %rd{n}")).collect();
    value(&format!("{moves}{op} %rd9{names};"))
}

fn float(op: &str, operands: &[f32]) -> f32 {
    f32::from_bits(of32(op, &operands.iter().map(|x| x.to_bits()).collect::<Vec<_>>()))
}

#[test]
fn shifts_beyond_the_width() {
    assert_eq!(of32("shl.b32", &[1, 31]), 1 << 31);
    assert_eq!(of32("shl.b32", &[1, 32]), 0);
    assert_eq!(of32("shr.u32", &[!0, 40]), 0);
    assert_eq!(of32("shr.s32", &[1 << 31, 40]), !0);
    assert_eq!(of32("shf.l.wrap.b32", &[0x8000_0000, 1, 1]), 3);
    assert_eq!(of32("shf.r.wrap.b32", &[0x8000_0000, 1, 4]), 0x1800_0000);
    assert_eq!(of32("shf.l.clamp.b32", &[5, 1, 40]), 5);
}

#[test]
fn integer_products_and_sums() {
    assert_eq!(of32("mul.hi.s32", &[-3i32 as u32, 5]), !0);
    assert_eq!(of32("mul.hi.u32", &[!0, !0]), !1);
    assert_eq!(of32("mad.lo.s32", &[7, 6, -2i32 as u32]), 40);
    assert_eq!(of32("mad.hi.u32", &[1 << 31, 4, 1]), 3);
    assert_eq!(of64("mul.hi.u64", &[!0, 3]), 2);
    assert_eq!(value("mov.b32 %r1, -3;\nmov.b64 %rd1, 1;\nmad.wide.s32 %rd9, %r1, 5, %rd1;"), -14i64 as u64);
    assert_eq!(value("mov.b32 %r1, -3;\nmul.wide.u32 %rd9, %r1, 5;"), 5 * 0xFFFF_FFFD);
    assert_eq!(value("mov.b16 %h1, -3;\nmul.wide.s16 %r1, %h1, 5;\ncvt.u64.u32 %rd9, %r1;"), 0xFFFF_FFF1);
    assert_eq!(of16("mul.hi.u16", &[0xFFFF, 0xFFFF]), 0xFFFE);
    assert_eq!(of32("add.sat.s32", &[i32::MAX as u32, 1]), i32::MAX as u32);
    assert_eq!(of32("sub.sat.s32", &[i32::MIN as u32, 1]), i32::MIN as u32);
    assert_eq!(of32("div.s32", &[-7i32 as u32, 2]), -3i32 as u32);
    assert_eq!(of32("rem.s32", &[-7i32 as u32, 2]), -1i32 as u32);
    assert_eq!(of32("div.s32", &[i32::MIN as u32, -1i32 as u32]), i32::MIN as u32);
    assert_eq!(of32("min.u32", &[!0, 1]), 1);
    assert_eq!(of32("min.s32", &[!0, 1]), !0);
}

#[test]
fn fields_of_bits() {
    assert_eq!(of32("bfe.u32", &[0xABCD_1234, 8, 12]), 0xD12);
    assert_eq!(of32("bfe.s32", &[0xABCD_1234, 28, 4]), 0xFFFF_FFFA);
    assert_eq!(of32("bfe.s32", &[0x8000_0000, 30, 8]), 0xFFFF_FFFE);
    assert_eq!(of32("bfe.u32", &[!0, 4, 0]), 0);
    assert_eq!(
        value("mov.b32 %r1, 0xF5;\nmov.b32 %r2, -1;\nbfi.b32 %r0, %r1, %r2, 8, 4;\ncvt.u64.u32 %rd9, %r0;"),
        0xFFFF_F5FF
    );
    assert_eq!(of32("prmt.b32", &[0x4433_2211, 0x8877_6655, 0x7130]), 0x8822_4411);
    assert_eq!(of32("prmt.b32", &[0x0000_8070, 0, 0x98]) & 0xFFFF, 0xFF00);
    assert_eq!(of32("popc.b32", &[0xF0F0]), 8);
    assert_eq!(of32("clz.b32", &[0]), 32);
    assert_eq!(of64("brev.b64", &[1]), 1 << 63);
    assert_eq!(of32("bfind.u32", &[0x100]), 8);
    assert_eq!(of32("bfind.s32", &[!0x100]), 8);
    assert_eq!(of32("bfind.shiftamt.u32", &[0x100]), 23);
    assert_eq!(of32("bfind.u32", &[0]), !0);
    let lop3 = "mov.b32 %r1, 0xF0F0;\nmov.b32 %r2, 0xCCCC;\nmov.b32 %r3, 0xAAAA;\n\
                lop3.b32 %r0, %r1, %r2, %r3, 0xE8;\ncvt.u64.u32 %rd9, %r0;";
    assert_eq!(value(lop3), (0xF0F0 & 0xCCCC) | (0xF0F0 & 0xAAAA) | (0xCCCC & 0xAAAA));
}

#[test]
fn packing() {
    assert_eq!(
        value("mov.b32 %r1, 0x22221111;\nmov.b32 {%h1, %h2}, %r1;\nmov.b64 %rd9, {%h2, %h1, %h1, %h2};"),
        0x2222_1111_1111_2222
    );
    assert_eq!(
        value("mov.b64 %rd1, 0x2222222211111111;\nmov.b64 {_, %r1}, %rd1;\ncvt.u64.u32 %rd9, %r1;"),
        0x2222_2222
    );
}

#[test]
fn comparisons() {
    let nan = f32::NAN.to_bits();
    let holds = |op: &str, ty: &str, a: u32, b: u32| {
        value(&format!(
            "mov.b32 %r1, {a:#x};\nmov.b32 %r2, {b:#x};\nsetp.{op}.{ty} %p1, %r1, %r2;\nselp.b64 %rd9, 1, 0, %p1;"
        )) == 1
    };
    let one = 1f32.to_bits();
    for (op, with_nan, equal) in [
        ("eq", false, true),
        ("ne", false, false),
        ("lt", false, false),
        ("ge", false, true),
        ("equ", true, true),
        ("neu", true, false),
        ("ltu", true, false),
        ("geu", true, true),
        ("num", false, true),
        ("nan", true, false),
    ] {
        assert_eq!((holds(op, "f32", one, nan), holds(op, "f32", one, one)), (with_nan, equal), "{op}");
    }
    assert!(holds("lt", "s32", !0, 0) && !holds("lt", "u32", !0, 0) && holds("hi", "u32", !0, 0));
    // Subnormal numbers are equal if they are flushed.
    assert!(holds("eq.ftz", "f32", 1, 2) && !holds("eq", "f32", 1, 2));

    let combined = "mov.b32 %r1, 3;\nsetp.eq.b32 %p1, %r1, 3;\nsetp.lt.and.s32 %p2|%p3, %r1, 9, !%p1;\n\
                    setp.lt.xor.s32 %p4, %r1, 9, %p1;\nselp.b32 %r2, 1, 0, %p2;\nselp.b32 %r3, 2, 0, %p3;\n\
                    selp.b32 %r4, 4, 0, %p4;\nadd.s32 %r2, %r2, %r3;\nadd.s32 %r2, %r2, %r4;\ncvt.u64.u32 %rd9, %r2;";
    assert_eq!(value(combined), 0);
    assert_eq!(of32("set.lt.u32.f32", &[one, 2f32.to_bits()]), !0);
    assert_eq!(float("set.lt.f32.f32", &[1.0, 2.0]), 1.0);
    let test = |op: &str, x: f32| {
        value(&format!("mov.b32 %r1, {:#x};\ntestp.{op}.f32 %p1, %r1;\nselp.b64 %rd9, 1, 0, %p1;", x.to_bits())) == 1
    };
    assert!(test("subnormal", 1e-40) && test("normal", 1.0) && test("infinite", f32::INFINITY));
    assert!(test("notanumber", f32::NAN) && !test("finite", f32::NAN) && test("number", 0.0));
}

#[test]
fn subnormal_numbers_are_flushed_where_asked() {
    let tiny = 1e-39f32;
    assert_eq!(float("add.f32", &[tiny, tiny]), 2e-39);
    assert_eq!(float("add.ftz.f32", &[tiny, 1e-37]), 1e-37);
    assert_eq!(float("mul.ftz.f32", &[-1e-20, 1e-20]).to_bits(), 1 << 31);
    assert_eq!(float("fma.rn.ftz.f32", &[1e-20, 1e-20, tiny]), 0.0);
    assert_eq!(float("ex2.approx.ftz.f32", &[-130.0]), 0.0);
    assert!(float("ex2.approx.f32", &[-130.0]) > 0.0);
    assert_eq!(float("max.ftz.f32", &[tiny, -1.0]), 0.0);
}

#[test]
fn operations_on_nans() {
    let nan = f32::NAN;
    assert_eq!((float("min.f32", &[nan, 2.0]), float("max.f32", &[2.0, nan])), (2.0, 2.0));
    assert_eq!(of32("max.f32", &[!0, !0]), 0x7FFF_FFFF);
    assert!(float("min.NaN.f32", &[nan, 2.0]).is_nan());
    assert_eq!(of32("min.f32", &[0, 1 << 31]), 1 << 31);
    assert_eq!(of32("add.f32", &[f32::INFINITY.to_bits(), f32::NEG_INFINITY.to_bits()]), 0x7FFF_FFFF);
    assert_eq!(float("add.sat.f32", &[nan, 1.0]), 0.0);
    assert_eq!(float("fma.rn.sat.f32", &[2.0, 3.0, 4.0]), 1.0);
    assert_eq!(of16("max.f16", &[0x7E00, 0x3C00]), 0x3C00);
    assert_eq!(of16("fma.rn.relu.f16", &[0x3C00, 0xBC00, 0]), 0);
}

#[test]
fn conversions() {
    assert_eq!(of32("cvt.rzi.s32.f32", &[3e9f32.to_bits()]), i32::MAX as u32);
    assert_eq!(of32("cvt.rzi.u32.f32", &[(-1f32).to_bits()]), 0);
    assert_eq!(of32("cvt.rzi.s32.f32", &[f32::NAN.to_bits()]), 0);
    assert_eq!(of32("cvt.rni.s32.f32", &[2.5f32.to_bits()]), 2);
    assert_eq!(of32("cvt.rpi.s32.f32", &[2.1f32.to_bits()]), 3);
    assert_eq!(of32("cvt.rmi.s32.f32", &[(-2.1f32).to_bits()]), -3i32 as u32);
    assert_eq!(float("cvt.rn.f32.s32", &[0.0]), 0.0);
    assert_eq!(of32("cvt.rn.f32.u32", &[0x0100_0001]), 0x4B80_0000);
    assert_eq!(of32("cvt.rp.f32.u32", &[0x0100_0001]), 0x4B80_0001);
    assert_eq!(of32("cvt.rz.f32.s32", &[-0x0100_0003i32 as u32]), 0xCB80_0001);
    assert_eq!(of32("cvt.sat.u8.s32", &[-5i32 as u32]), 0);
    assert_eq!(of32("cvt.sat.s8.s32", &[1000]), 127);
    assert_eq!(of32("cvt.s32.s8", &[0x80]), 0xFFFF_FF80);
    assert_eq!(of32("cvt.u32.u8", &[0x180]), 0x80);
    assert_eq!(float("cvt.rni.f32.f32", &[-2.5]), -2.0);
    assert_eq!(float("cvt.sat.f32.f32", &[-2.5]), 0.0);
    let narrow = |op: &str, x: f32| {
        value(&format!("mov.b32 %r1, {:#x};\n{op} %h1, %r1;\ncvt.u64.u16 %rd9, %h1;", x.to_bits())) as u16
    };
    assert_eq!(narrow("cvt.rn.f16.f32", 65520.0), 0x7C00);
    assert_eq!(narrow("cvt.rz.f16.f32", 65520.0), 0x7BFF);
    assert_eq!(narrow("cvt.rn.satfinite.f16.f32", 1e9), 0x7BFF);
    assert_eq!(narrow("cvt.rn.relu.bf16.f32", -1.0), 0);
    assert_eq!(narrow("cvt.rn.bf16.f32", 1.0 + 1.0 / 256.0), 0x3F80);
    assert_eq!(narrow("cvt.rz.bf16.f32", 1.999), bf16::from_f32(1.9921875).to_bits());
    // The first operand becomes the upper half.
    assert_eq!(of32("cvt.rn.f16x2.f32", &[1f32.to_bits(), 2f32.to_bits()]), 0x3C00_4000);
    assert_eq!(of32("cvt.rn.bf16x2.f32", &[1f32.to_bits(), 2f32.to_bits()]), 0x3F80_4000);
    assert_eq!(value("mov.b64 %rd1, 0xFFFFFFFFFFFFFFFF;\ncvt.rn.f64.s64 %rd9, %rd1;"), (-1f64).to_bits());
}

#[test]
fn f16_arithmetic_rounds_once() {
    let (h, b) = (|x: f32| f16::from_f32(x).to_bits(), |x: f32| bf16::from_f32(x).to_bits());
    // 2048 · 1.0009766 + 0.00006 is just above a tie, which rounding twice would treat as a tie.
    let (x, y, z) = (f16::from_f32(2047.0), f16::from_bits(0x3C01), f16::from_bits(0x0001));
    let exact = x.to_f64() * y.to_f64() + z.to_f64();
    assert_eq!(of16("fma.rn.f16", &[x.to_bits(), y.to_bits(), z.to_bits()]), f16::from_f64(exact).to_bits());
    assert_eq!(of16("add.rn.f16", &[h(1.0), h(2048.0)]), h(2048.0));
    assert_eq!(of16("mul.bf16", &[b(3.0), b(1.5)]), b(4.5));
    assert_eq!(of16("neg.bf16", &[b(3.0)]), b(-3.0));
    assert_eq!(of16("abs.f16", &[h(-3.0)]), h(3.0));
    let pair = |x: u16, y: u16| u32::from(y) << 16 | u32::from(x);
    let sum = of32("add.f16x2", &[pair(h(1.0), h(2.0)), pair(h(0.5), h(-4.0))]);
    assert_eq!(sum, pair(h(1.5), h(-2.0)));
    let product = of32("fma.rn.bf16x2", &[pair(b(2.0), b(3.0)), pair(b(4.0), b(5.0)), pair(b(1.0), b(1.0))]);
    assert_eq!(product, pair(b(9.0), b(16.0)));
    assert_eq!(of32("min.f16x2", &[pair(h(1.0), h(-2.0)), pair(h(0.5), h(4.0))]), pair(h(0.5), h(-2.0)));
    assert_eq!(of32("abs.bf16x2", &[pair(b(-1.0), b(-2.0))]), pair(b(1.0), b(2.0)));
}

#[test]
fn approximations() {
    let close = |ours: f32, theirs: f64| (f64::from(ours) - theirs).abs() <= theirs.abs() * 1e-7;
    assert!(close(float("tanh.approx.f32", &[0.5]), 0.5f32.tanh().into()));
    assert!(close(float("cos.approx.f32", &[1.0]), 1f64.cos()));
    assert!(close(float("sqrt.approx.f32", &[2.0]), 2f64.sqrt()));
    assert!(close(float("rcp.approx.ftz.f32", &[3.0]), 1.0 / 3.0));
    assert!(close(float("div.approx.f32", &[2.0, 3.0]), 2.0 / 3.0));
    assert!(close(float("div.full.f32", &[2.0, 3.0]), 2.0 / 3.0));
    assert_eq!(float("rcp.rn.f32", &[3.0]), 1.0 / 3.0);
    let h = |x: f32| u32::from(f16::from_f32(x).to_bits());
    assert_eq!(of32("ex2.approx.f16x2", &[h(3.0) << 16 | h(-1.0)]), h(8.0) << 16 | h(0.5));
    assert_eq!(u32::from(of16("tanh.approx.f16", &[0])), 0);
}

#[test]
fn special_registers() {
    let of = |name: &str| lanes(&format!("mov.u32 %r1, {name};\ncvt.u64.u32 %rd9, %r1;"));
    assert_eq!(of("%laneid"), (0..32).collect::<Vec<u64>>());
    assert_eq!(of("%lanemask_lt")[5], 0x1F);
    assert_eq!(of("%lanemask_ge")[30], 0xC000_0000);
    assert_eq!(of("%lanemask_le")[31], 0xFFFF_FFFF);
    assert_eq!((of("%ntid.x")[0], of("%nctaid.x")[0], of("%warpid")[0], of("%tid.y")[3]), (32, 1, 0, 0));
    let body = "mov.u32 %r1, %clock;\nmov.u32 %r2, %clock;\nsub.s32 %r1, %r2, %r1;\ncvt.u64.u32 %rd9, %r1;";
    assert!(value(body) > 0);
    assert_eq!(value("mov.u64 %rd9, %clock64;") >> 32, 0);
}

#[test]
fn threads_in_three_dimensions() {
    let text = ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry k(.param .u64 p)\n{\n\
                .reg .b32 %r<9>; .reg .b64 %rd<4>;\nld.param.b64 %rd1, [p];\nmov.u32 %r1, %tid.x;\n\
                mov.u32 %r2, %tid.y;\nmov.u32 %r3, %tid.z;\nmov.u32 %r4, %ctaid.z;\nmad.lo.u32 %r5, %r3, 7, %r2;\n\
                mad.lo.u32 %r5, %r5, 5, %r1;\nmad.lo.u32 %r5, %r4, 70, %r5;\nmul.wide.u32 %rd2, %r5, 4;\n\
                add.s64 %rd1, %rd1, %rd2;\nst.global.b32 [%rd1], %r5;\nret;\n}";
    let mut gpu = Gpu::new();
    let out = gpu.alloc_unwritten(4 * 140);
    gpu.launch(&parse(text), "k", [1, 1, 2], [5, 7, 2], 0, &[Arg::Ptr(out)]).unwrap();
    assert_eq!(gpu.read_u32(out), (0..140).collect::<Vec<u32>>());
}

#[test]
fn generic_addresses() {
    let shared = "{ .shared .align 8 .b8 s[256];\nmov.b64 %rd1, s;\nadd.s64 %rd1, %rd1, %rd11;\n\
                  cvta.shared.u64 %rd2, %rd1;\nst.b64 [%rd2], %rd11;\n\
                  cvta.to.shared.u64 %rd3, %rd2;\nld.shared.b64 %rd9, [%rd3]; }";
    assert_eq!(lanes(shared), (0..32).map(|t| 8 * t).collect::<Vec<u64>>());
    let local = "{ .local .align 8 .b8 l[16];\nmov.b64 %rd1, l;\ncvta.local.u64 %rd2, %rd1;\nst.b64 [%rd2+8], %rd11;\n\
                 ld.local.b64 %rd9, [l+8]; }";
    assert_eq!(lanes(local), (0..32).map(|t| 8 * t).collect::<Vec<u64>>());
    let space = "{ .shared .align 8 .b8 s[8];\nmov.b64 %rd1, s;\ncvta.shared.u64 %rd2, %rd1;\n\
                 isspacep.shared %p1, %rd2;\nisspacep.global %p2, %rd10;\nand.pred %p1, %p1, %p2;\n\
                 selp.b64 %rd9, 1, 0, %p1; }";
    assert_eq!(value(space), 1);
}

#[test]
fn narrow_loads_and_stores() {
    let body = "{ .shared .align 8 .b8 s[256];\nmov.b64 %rd1, s;\nadd.s64 %rd1, %rd1, %rd11;\nmov.b32 %r1, 0x8081;\n\
                st.shared.b8 [%rd1], %r1;\nst.shared.b16 [%rd1+2], %r1;\nld.shared.s8 %r2, [%rd1];\n\
                ld.shared.u16 %r3, [%rd1+2];\nmov.b64 %rd9, {%r2, %r3}; }";
    assert_eq!(value(body), 0x0000_8081_FFFF_FF81);
}

#[test]
fn reductions_of_a_warp() {
    assert_eq!(value("redux.sync.add.u32 %r1, %r8, -1;\ncvt.u64.u32 %rd9, %r1;"), 496);
    assert_eq!(value("redux.sync.max.s32 %r1, %r8, -1;\ncvt.u64.u32 %rd9, %r1;"), 31);
    assert_eq!(value("shfl.sync.up.b32 %r1|%p1, %r8, 1, 0, -1;\nselp.b64 %rd9, 1, 0, %p1;"), 0);
    assert_eq!(lanes("shfl.sync.up.b32 %r1|%p1, %r8, 1, 0, -1;\nselp.b64 %rd9, 1, 0, %p1;")[1], 1);
}

#[test]
fn nested_divergence() {
    // Each lane takes its own path through two loops and an early return from the inner one.
    let body = "mov.b64 %rd9, 0;\nmov.b32 %r1, 0;\n$outer:\nsetp.ge.u32 %p1, %r1, %r8;\n@%p1 bra $done;\n\
                mov.b32 %r2, 0;\n$inner:\nsetp.ge.u32 %p2, %r2, %r1;\n@%p2 bra $next;\n\
                add.s64 %rd9, %rd9, 1;\nadd.s32 %r2, %r2, 1;\n\
                setp.eq.u32 %p3, %r2, 20;\n@%p3 bra $done;\nbra $inner;\n\
                $next:\nadd.s32 %r1, %r1, 1;\nbra.uni $outer;\n\
                $done:\nactivemask.b32 %r3;\ncvt.u64.u32 %rd1, %r3;\nshl.b64 %rd1, %rd1, 32;\n\
                or.b64 %rd9, %rd9, %rd1;";
    let count = |lane: u64| {
        let mut count = 0;
        for outer in 0..lane {
            count += outer.min(20);
            if outer >= 20 {
                break;
            }
        }
        count
    };
    // All lanes have reconverged after the loops.
    assert_eq!(lanes(body), (0..32).map(|lane| 0xFFFF_FFFF << 32 | count(lane)).collect::<Vec<u64>>());
}

/// A kernel with random control flow: each lane hashes as it goes, and the hash decides where it jumps. Each lane has a
/// budget of steps.
fn maze(seed: u64) -> String {
    let mut state = seed;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let blocks = 4 + draw(8);
    let mut text = ".version 7.0\n.target sm_70\n.address_size 64\n\
        .visible .entry k(.param .u64 p, .param .u32 first)\n{\n.reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;\n\
        ld.param.b64 %rd1, [p];\nld.param.b32 %r1, [first];\nmov.u32 %r2, %tid.x;\nadd.u32 %r1, %r1, %r2;\n\
        mul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd1, %rd1, %rd2;\nmov.b32 %r3, %r1;\nand.b32 %r4, %r1, 7;\n\
        mad.lo.u32 %r4, %r4, 5, 20;\n"
        .to_string();
    for block in 0..blocks {
        let bit = draw(3);
        text += &format!(
            "$B{block}:\nmad.lo.u32 %r3, %r3, 1664525, {};\nshr.u32 %r5, %r3, 13;\nxor.b32 %r3, %r3, %r5;\n\
             sub.u32 %r4, %r4, 1;\nsetp.eq.u32 %p1, %r4, 0;\n@%p1 bra $END;\nand.b32 %r6, %r3, {};\n\
             setp.eq.u32 %p2, %r6, 0;\n",
            draw(1 << 30),
            1 << bit
        );
        match draw(4) {
            0 => {
                let targets: Vec<String> = (0..2).map(|_| format!("$B{}", draw(blocks))).collect();
                text += &format!("shr.u32 %r6, %r6, {bit};\n$T{block}: .branchtargets {};\n", targets.join(", "));
                text += &format!("@!%p1 brx.idx %r6, $T{block};\n");
            }
            1 => text += &format!("@%p2 bra $B{};\nbra $B{};\n", draw(blocks), draw(blocks)),
            2 => text += &format!("@!%p2 bra $B{};\n", draw(blocks)),
            _ => text += &format!("@%p2 add.u32 %r3, %r3, {};\n", draw(100)),
        }
    }
    text + "$END:\nst.global.b32 [%rd1], %r3;\nret;\n}\n"
}

#[test]
fn divergent_lanes_compute_what_they_compute_alone() {
    for seed in 0..200 {
        let module = parse(&maze(seed));
        let mut gpu = Gpu::new();
        let [together, alone] = [(); 2].map(|()| gpu.alloc_unwritten(128));
        gpu.launch(&module, "k", 1, 32, 0, &[Arg::Ptr(together), Arg::U32(0)]).unwrap();
        for lane in 0..32 {
            gpu.launch(&module, "k", 1, 1, 0, &[Arg::Ptr(alone), Arg::U32(lane)]).unwrap();
        }
        assert_eq!(gpu.read_u32(together), gpu.read_u32(alone), "seed {seed}\n{}", maze(seed));
    }
}

#[test]
fn async_copies_fill_with_zeros() {
    // Half of the 16 bytes is read, then none; the rest is zero. The source address of an empty copy may be anything.
    let body = "{ .shared .align 16 .b8 s[32];\nsetp.ne.u32 %p1, %r8, 0;\n@%p1 bra $OUT;\n\
                mov.b64 %rd1, -1;\nst.global.b64 [%rd10], %rd1;\n\
                mov.b64 %rd2, s;\nmov.b32 %r1, 8;\ncp.async.cg.shared.global [%rd2], [%rd10], 16, %r1;\n\
                mov.b64 %rd3, 0;\ncp.async.ca.shared.global [%rd2+16], [%rd3], 8, 0;\n\
                cp.async.ca.shared.global [%rd2+24], [%rd10], 4;\ncp.async.wait_all;\n\
                ld.shared.b64 %rd4, [s];\nld.shared.b64 %rd5, [s+8];\nld.shared.b64 %rd6, [s+16];\n\
                ld.shared.b32 %r2, [s+24];\nor.b64 %rd5, %rd5, %rd6;\nsub.s64 %rd9, %rd4, %rd5;\n\
                cvt.u64.u32 %rd6, %r2;\nadd.s64 %rd9, %rd9, %rd6; }\n$OUT:";
    assert_eq!(value(body), 0xFFFF_FFFE);
}

#[test]
fn recursion_and_results_of_diverged_lanes() {
    let text = ".version 7.0\n.target sm_70\n.address_size 64\n\
        .func (.param .b32 r) fib(.param .b32 n)\n{\n.reg .pred %p; .reg .b32 %r<6>;\nld.param.b32 %r1, [n];\n\
        setp.lt.u32 %p, %r1, 2;\n@%p st.param.b32 [r], %r1;\n@%p ret;\nsub.s32 %r2, %r1, 1;\nsub.s32 %r3, %r1, 2;\n\
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %r2; call.uni (b), fib, (a); ld.param.b32 %r4, [b]; }\n\
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %r3; call.uni (b), fib, (a); ld.param.b32 %r5, [b]; }\n\
        add.s32 %r4, %r4, %r5;\nst.param.b32 [r], %r4;\nret;\n}\n\
        .visible .entry k(.param .u64 p)\n{\n.reg .b32 %r<3>; .reg .b64 %rd<3>;\nld.param.b64 %rd1, [p];\n\
        mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd1, %rd1, %rd2;\n\
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), fib, (a); ld.param.b32 %r2, [b]; }\n\
        st.global.b32 [%rd1], %r2;\nret;\n}";
    let mut gpu = Gpu::new();
    let out = gpu.alloc_unwritten(48);
    let report = gpu.launch(&parse(text), "k", 1, 12, 0, &[Arg::Ptr(out)]).unwrap();
    assert_eq!(gpu.read_u32(out), [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]);
    assert!(report.count(Kind::Branch).lanes > 0);
}
