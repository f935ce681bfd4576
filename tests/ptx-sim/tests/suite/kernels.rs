use ptx_sim::{Arg, Gpu, Kind, Options};

use crate::{assert_close, case, from_bf16, from_f16, text, to_bf16, to_f16, uniform};
use half::{bf16, f16};

fn exact() -> Gpu {
    Gpu::with(Options { perturb: false, ..Options::default() })
}

#[test]
fn vector_add() {
    let module = case("vector_add_70");
    for n in [1, 31, 64, 100] {
        let (x, y) = (uniform(n, 1), uniform(n, 2));
        let mut gpu = Gpu::new();
        let (a, b) = (gpu.alloc_f32(&x), gpu.alloc_f32(&y));
        let c = gpu.alloc_unwritten(4 * n);
        let blocks = n.div_ceil(64) as u32;
        let args = [Arg::Ptr(a), Arg::Ptr(b), Arg::Ptr(c), Arg::U32(n as u32)];
        let report = gpu.launch(&module, "vector_add", blocks, 64, 0, &args).unwrap();
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_eq!(gpu.read_f32(c), sums);
        let n = n as u64;
        assert_eq!((report.read.bytes, report.read.unique), (8 * n, 8 * n));
        assert_eq!((report.written.bytes, report.written.sectors), (4 * n, n.div_ceil(8)));
        assert_eq!(report.count(Kind::Float).lanes, n);
        assert_eq!(report.blocks, blocks.into());
    }
}

#[test]
fn block_sum_through_shared_memory() {
    let module = case("block_sum_70");
    let x = uniform(1000, 3);
    let mut gpu = Gpu::new();
    let (input, out) = (gpu.alloc_f32(&x), gpu.alloc_unwritten(12));
    let args = [Arg::Ptr(input), Arg::Ptr(out), Arg::I32(1000)];
    let report = gpu.launch(&module, "block_sum", 3, 64, 0, &args).unwrap();
    let sums: Vec<f32> = (0..3)
        .map(|block| {
            let mut part: Vec<f32> =
                (0..64).map(|t| (block * 64 + t..1000).step_by(192).fold(0.0, |sum, i| sum + x[i])).collect();
            for width in [32, 16, 8, 4, 2, 1] {
                (0..width).for_each(|t| part[t] += part[t + width]);
            }
            part[0]
        })
        .collect();
    assert_eq!(gpu.read_f32(out), sums);
    assert_eq!(report.shared_bytes, 256);
    assert_eq!(report.worst_conflict(), 1);
    // Two warps, seven barriers, three blocks.
    assert_eq!(report.count(Kind::Barrier).warps, 2 * 7 * 3);
}

#[test]
fn warp_sum_by_shuffles() {
    let module = case("warp_sum_70");
    let x = uniform(96, 4);
    let mut gpu = Gpu::new();
    let (input, out) = (gpu.alloc_f32(&x), gpu.alloc_unwritten(12));
    gpu.launch(&module, "warp_sum", 3, 32, 0, &[Arg::Ptr(input), Arg::Ptr(out)]).unwrap();
    let sums: Vec<f32> = x
        .chunks(32)
        .map(|x| {
            let mut x = x.to_vec();
            for o in [16, 8, 4, 2, 1] {
                x = (0..32).map(|lane| x[lane] + x[lane ^ o]).collect();
            }
            x[0]
        })
        .collect();
    assert_eq!(gpu.read_f32(out), sums);
}

#[test]
fn loops_that_lanes_leave_at_different_times() {
    let module = case("collatz_70");
    let x: Vec<u32> = (1..=75).collect();
    let mut gpu = Gpu::new();
    let input = gpu.alloc_u32(&x);
    let (steps, evens) = (gpu.alloc_unwritten(300), gpu.alloc_unwritten(300));
    let args = [Arg::Ptr(input), Arg::Ptr(steps), Arg::Ptr(evens), Arg::I32(75)];
    gpu.launch(&module, "collatz", 2, 48, 0, &args).unwrap();
    let walk = |mut v: u32| {
        let (mut count, mut even) = (0, 0);
        while v != 1 {
            if v % 2 == 1 {
                v = 3 * v + 1;
                even += (0..v % 4).sum::<u32>();
            } else {
                v /= 2;
                even += 1;
            }
            count += 1;
        }
        (count, even)
    };
    let (a, b): (Vec<u32>, Vec<u32>) = x.into_iter().map(walk).unzip();
    assert_eq!((gpu.read_u32(steps), gpu.read_u32(evens)), (a, b));
}

#[test]
fn softmax_of_rows() {
    let module = case("softmax_70");
    let n = 77;
    let x: Vec<f32> = uniform(5 * n, 5).iter().map(|x| x * 8.0).collect();
    let rows: Vec<f32> = x
        .chunks(n)
        .flat_map(|row| {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let e: Vec<f64> = row.iter().map(|x| f64::from(x - most).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(move |e| (e / sum) as f32)
        })
        .collect();
    let run = |options: Options| {
        let mut gpu = Gpu::with(options);
        let (input, out) = (gpu.alloc_f32(&x), gpu.alloc_unwritten(4 * 5 * n));
        let args = [Arg::Ptr(input), Arg::Ptr(out), Arg::I32(n as i32)];
        let report = gpu.launch(&module, "softmax", 5, 32, 0, &args).unwrap();
        assert_eq!(report.count(Kind::Approximate).lanes, (5 * n + 5 * 32) as u64);
        gpu.read_f32(out)
    };
    let (plain, one, two) = (
        run(Options { perturb: false, ..Options::default() }),
        run(Options { seed: 1, ..Options::default() }),
        run(Options { seed: 2, ..Options::default() }),
    );
    for out in [&plain, &one, &two] {
        assert_close(out, &rows, 1e-6);
    }
    assert_ne!(one, two, "approximations depend on the seed");
    assert_eq!(one, run(Options { seed: 1, ..Options::default() }), "and on nothing else");
}

#[test]
fn matmul_on_tensor_cores() {
    let module = case("matmul_70");
    let (a, b) = (to_f16(&uniform(1024, 6)), to_f16(&uniform(1024, 7)));
    let (x, y) = (from_f16(&a), from_f16(&b));
    let product: Vec<f32> = (0..1024)
        .map(|at| (0..32).map(|k| f64::from(x[at / 32 * 32 + k]) * f64::from(y[k * 32 + at % 32])).sum::<f64>() as f32)
        .collect();
    for seed in 0..3 {
        let mut gpu = Gpu::with(Options { seed, ..Options::default() });
        let (pa, pb, pc) = (gpu.alloc_u16(&a), gpu.alloc_u16(&b), gpu.alloc_unwritten(4096));
        let args = [Arg::Ptr(pa), Arg::Ptr(pb), Arg::Ptr(pc)];
        let report = gpu.launch(&module, "matmul", [2, 2], 32, 0, &args).unwrap();
        assert_close(&gpu.read_f32(pc), &product, 1e-5);
        assert_eq!(report.matrix_flops, 2 * 32 * 32 * 32);
        assert_eq!(report.count(Kind::Matrix).warps, 8);
        // Two blocks read each tile of a and b.
        assert_eq!((report.read.bytes, report.read.unique), (2 * 4096, 4096));
        assert_eq!((report.written.bytes, report.written.unique), (4096, 4096));
        // Rows are 48 bytes apart: loads of eight rows do not conflict, stores of four whole rows do.
        assert_eq!(report.worst_conflict(), 2);
        let text = text("matmul_70");
        let lines: Vec<&str> = text.lines().collect();
        assert!(report.conflicts.keys().all(|line| lines[line - 1].contains("st.shared")));
    }
}

#[test]
fn packed_f16_arithmetic() {
    let module = case("half_70");
    let (a, b, x) = (to_f16(&uniform(64, 8)), to_f16(&uniform(64, 9)), uniform(64, 10));
    let mut gpu = Gpu::new();
    let (pa, pb, px) = (gpu.alloc_u16(&a), gpu.alloc_u16(&b), gpu.alloc_f32(&x));
    let (out, wide) = (gpu.alloc_unwritten(512), gpu.alloc_unwritten(256));
    let args = [pa, pb, px, out, wide].map(Arg::Ptr);
    let report = gpu.launch(&module, "half", 1, 32, 0, &args).unwrap();
    let out = gpu.read_u16(out);
    let half = |bits: u16| f16::from_bits(bits).to_f64();
    for n in 0..64 {
        let (p, q) = (half(a[n]), half(b[n]));
        // The product is exact in f64, so it is rounded once.
        assert_eq!(out[n], f16::from_f64(p * q + 0.5).to_bits());
        assert_eq!(half(out[64 + n]), -f16::from_f64(p - q).to_f64());
        assert_eq!(half(out[128 + n]), p.max(q));
        assert_eq!(out[192 + n], f16::from_f32(x[n] * 3.0).to_bits());
        assert_eq!(f64::from(gpu.read_f32(wide)[n]), half(out[n]));
    }
    assert_eq!(report.count(Kind::HalfFma).lanes, 32);

    let module = case("half_80");
    let args = [pa, pb, px, gpu.alloc_unwritten(384)].map(Arg::Ptr);
    gpu.launch(&module, "half", 1, 32, 0, &args).unwrap();
    let Arg::Ptr(out) = args[3] else { unreachable!() };
    let out = gpu.read_u16(out);
    for n in 0..64 {
        let (p, q) = (half(a[n]), half(b[n]));
        assert_eq!(out[n], f16::from_f32(x[n]).to_bits());
        assert_eq!(out[64 + n], f16::from_f64(p + q).to_bits());
        assert_eq!(half(out[128 + n]), p.max(q));
    }
}

#[test]
fn bfloat() {
    let module = case("bfloat_80");
    let (a, b, x) = (to_bf16(&uniform(64, 11)), to_bf16(&uniform(64, 12)), uniform(64, 13));
    let mut gpu = Gpu::new();
    let (pa, pb, px) = (gpu.alloc_u16(&a), gpu.alloc_u16(&b), gpu.alloc_f32(&x));
    let (out, wide) = (gpu.alloc_unwritten(256), gpu.alloc_unwritten(128));
    gpu.launch(&module, "bfloat", 1, 32, 0, &[pa, pb, px, out, wide].map(Arg::Ptr)).unwrap();
    let (out, wide) = (gpu.read_u16(out), gpu.read_f32(wide));
    let (a, b) = (from_bf16(&a), from_bf16(&b));
    for n in 0..64 {
        let narrow = bf16::from_f32(x[n]);
        assert_eq!(out[n], narrow.to_bits());
        let sum = f64::from(a[n]) * f64::from(b[n]) + narrow.to_f64();
        assert_eq!(out[64 + n], bf16::from_f64(sum).to_bits());
    }
    for t in 0..32 {
        let product = bf16::from_f32(a[2 * t] * b[2 * t + 1]).to_f32();
        assert_eq!(wide[t], product + a[2 * t + 1]);
    }
}

#[test]
fn double_buffered_copies() {
    let module = case("stream_80");
    for tiles in [1, 2, 5] {
        let x = uniform(128 * tiles, 14);
        let mut gpu = Gpu::new();
        let (input, out) = (gpu.alloc_f32(&x), gpu.alloc_unwritten(128));
        let args = [Arg::Ptr(input), Arg::Ptr(out), Arg::I32(tiles as i32)];
        let report = gpu.launch(&module, "stream", 1, 32, 1024, &args).unwrap();
        let sums: Vec<f32> = (0..32)
            .map(|t| {
                let terms = x.chunks(128).flat_map(|tile| (0..4).map(move |i| (tile[31 - t + 32 * i], (i + 1) as f32)));
                terms.fold(0.0f32, |sum, (x, factor)| x.mul_add(factor, sum))
            })
            .collect();
        assert_close(&gpu.read_f32(out), &sums, 1e-5);
        assert_eq!(report.read.bytes, 512 * tiles as u64);
        assert_eq!(report.shared_bytes, 1024);
    }
}

#[test]
fn floats() {
    let module = case("scalars_70");
    let mut x = uniform(64, 15);
    x.iter_mut().for_each(|x| *x *= 10.0);
    // Negative and special values are included; the first operand of lg2, sqrt and rsqrt is positive otherwise.
    x[..28].iter_mut().for_each(|x| *x = x.abs());
    x[28..32].copy_from_slice(&[f32::NAN, f32::INFINITY, 0.0, 2.5]);
    x[60] = f32::NAN;
    let d: Vec<f64> = uniform(64, 16).iter().map(|&x| f64::from(x) * 1.000_000_01).collect();
    let mut gpu = exact();
    let (px, pd, out) = (gpu.alloc_f32(&x), gpu.alloc_f64(&d), gpu.alloc_unwritten(4 * 640));
    gpu.launch(&module, "floats", 1, 32, 0, &[px, pd, out].map(Arg::Ptr)).unwrap();
    let out = gpu.read_f32(out);
    for t in 0..32 {
        let (a, b) = (x[t], x[t + 32]);
        let wide = f64::from(a);
        let directed = |exact: f64, up: bool| {
            let near = exact as f32;
            match f64::from(near).partial_cmp(&exact) {
                Some(std::cmp::Ordering::Less) if up => near.next_up(),
                Some(std::cmp::Ordering::Greater) if !up => near.next_down(),
                _ => near,
            }
        };
        let least = if a.is_nan() {
            b
        } else if b.is_nan() {
            a
        } else {
            a.min(b)
        };
        let results = [
            a.sqrt(),
            a / b,
            (1.0 / wide.sqrt()) as f32,
            a.floor(),
            b.abs(),
            a.round_ties_even(),
            a.mul_add(b, a),
            wide.log2() as f32,
            wide.sin() as f32,
            if a < b { 1.0 } else { 2.0 },
            if a.is_nan() || b.is_nan() { 3.0 } else { 4.0 },
            d[t] as f32,
            a.copysign(b),
            b.ceil(),
            b.trunc(),
            least,
            directed(wide + f64::from(b), false),
            directed(wide * f64::from(b), true),
            d[t].mul_add(d[t], d[t + 32]) as f32,
            if b.is_nan() { 0.0 } else { b.clamp(0.0, 1.0) },
        ];
        for (i, result) in results.into_iter().enumerate() {
            let ours = out[32 * i + t];
            assert!(ours == result || ours.is_nan() && result.is_nan(), "{i} of {a}, {b}: {ours} and {result}");
        }
    }
}

#[test]
fn integers() {
    let module = case("scalars_70");
    let mut x: Vec<u32> = (0..64u32).map(|n| n.wrapping_mul(0x9E37_79B9) >> (n % 20) | 1).collect();
    x[3] = u32::MAX;
    x[4] = 1 << 31;
    let f: Vec<f32> = uniform(32, 17).iter().map(|x| x * 5e9).collect();
    let mut gpu = Gpu::new();
    let (px, pf, out) = (gpu.alloc_u32(&x), gpu.alloc_f32(&f), gpu.alloc_unwritten(4 * 26 * 32));
    gpu.launch(&module, "integers", 1, 32, 0, &[px, pf, out].map(Arg::Ptr)).unwrap();
    let out = gpu.read_u32(out);
    for t in 0..32 {
        let (a, b, f) = (x[t], x[t + 32], f[t]);
        let (sa, sb) = (a as i32, b as i32);
        let results = [
            a.reverse_bits(),
            (a | 1).leading_zeros(),
            a.rotate_left(b),
            a.swap_bytes(),
            a >> 5 & 31,
            a.count_ones(),
            ((u64::from(a) * u64::from(b)) >> 32) as u32,
            a.max(b),
            sa.min(sb) as u32,
            f as u32,
            f as i32 as u32,
            a & !b,
            (a | 1 << 20).trailing_zeros(),
            a % b,
            a / b,
            (sa.wrapping_div(sb)) as u32,
            (sa.wrapping_rem(sb)) as u32,
            sa.unsigned_abs(),
            (i32::from(a as i16) * i32::from(b as i16)) as u32,
            a as i8 as u32,
            (sa >> (b & 31)) as u32,
            (a & 0xFF) << 8 | b & 0xFFFF_00FF,
            a.wrapping_sub(b),
            a.wrapping_mul(b).wrapping_add(a),
            a % 7,
            (sa / 10) as u32,
        ];
        for (i, result) in results.into_iter().enumerate() {
            assert_eq!(out[32 * i + t], result, "{i} of {a:#x}, {b:#x}, {f}");
        }
    }
}

#[test]
fn longs() {
    let module = case("scalars_70");
    let x: Vec<i64> = (1..65i64).map(|n| n.wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64) >> (n % 60) | 1).collect();
    let mut gpu = Gpu::new();
    let (px, out) = (gpu.alloc_i64(&x), gpu.alloc_unwritten(8 * 16 * 32));
    gpu.launch(&module, "longs", 1, 32, 0, &[px, out].map(Arg::Ptr)).unwrap();
    let out = gpu.read_i64(out);
    for t in 0..32 {
        let (a, b) = (x[t], x[t + 32]);
        let results = [
            a / b,
            a % b,
            a.wrapping_mul(b),
            a << (b & 63),
            a >> (b & 63),
            (a as u64 >> (b & 63)) as i64,
            a.count_ones().into(),
            (a | 1).leading_zeros().into(),
            (a < b).into(),
            (a as i32).into(),
            ((i128::from(a) * i128::from(b)) >> 64) as i64,
            a as f64 as i64,
            b as f32 as i64,
            (u64::from(a as u32) * u64::from(b as u32)) as i64,
            a.abs(),
            (a as u64 / b as u64) as i64,
        ];
        for (i, result) in results.into_iter().enumerate() {
            assert_eq!(out[32 * i + t], result, "{i} of {a:#x}, {b:#x}");
        }
    }
}

#[test]
fn calls_and_local_memory() {
    let module = case("control_70");
    let x = uniform(32, 18);
    let mut gpu = Gpu::new();
    let (input, out) = (gpu.alloc_f32(&x), gpu.alloc_unwritten(128));
    gpu.launch(&module, "powers", 1, 32, 0, &[input, out].map(Arg::Ptr)).unwrap();
    let power = |x: f32, n: usize| (0..n).fold(1.0, |product, _| product * x);
    let all: Vec<f32> = (0..32)
        .map(|t| {
            let picked = power(x[t], t & 3);
            if t & 4 != 0 { picked + power(picked, t & 3) } else { picked }
        })
        .collect();
    assert_eq!(gpu.read_f32(out), all);
}

#[test]
fn constants_and_module_variables() {
    let module = case("control_70");
    let mut gpu = Gpu::new();
    let (out, before) = (gpu.alloc_unwritten(128), gpu.alloc_unwritten(4));
    for launch in 0..3 {
        gpu.launch(&module, "variables", 1, 32, 0, &[out, before].map(Arg::Ptr)).unwrap();
        assert_eq!(gpu.read_u32(before), [7 + 5 * launch], "the variable keeps what launches leave in it");
    }
    let (table, small) = ([1.5, -2.0, 3.25, 0.0, 1e-3f32], [1.0, 2.0, 3.0, 250.0]);
    let all: Vec<f32> = (0..32).map(|t| table[t % 5] * small[t % 4]).collect();
    assert_eq!(gpu.read_f32(out), all);
}

#[test]
fn branch_tables() {
    let module = case("control_70");
    let x: Vec<i32> = (0..32).map(|t| t * 5 % 8 - 1).collect();
    let z = [10, 100, 1003, 7, 12, 6];
    let mut gpu = Gpu::new();
    let (px, pz, out) = (gpu.alloc_i32(&x), gpu.alloc_i32(&z), gpu.alloc_unwritten(128));
    gpu.launch(&module, "choose", 1, 32, 0, &[px, pz, out].map(Arg::Ptr)).unwrap();
    let choose = |x: &i32| match x {
        0 => z[0],
        1 => z[1] / 7,
        2 => z[2] % 5,
        3 => z[3] << 4,
        4 => z[4] ^ 77,
        5 => z[5] - 1,
        _ => -1,
    };
    assert_eq!(gpu.read_i32(out), x.iter().map(choose).collect::<Vec<_>>());
}

#[test]
fn votes_and_shuffles() {
    let module = case("cooperation_70");
    let x: Vec<i32> = (0..32).map(|t| t * 7 % 9).collect();
    let mut gpu = Gpu::new();
    let (input, out) = (gpu.alloc_i32(&x), gpu.alloc_unwritten(1024));
    gpu.launch(&module, "votes", 1, 32, 0, &[input, out].map(Arg::Ptr)).unwrap();
    let out = gpu.read_i32(out);
    let ballot = x.iter().enumerate().filter(|(_, v)| **v > 3).fold(0, |mask, (t, _)| mask | 1 << t);
    for t in 0..32 {
        let at = |lane: usize| x[lane];
        let results = [
            ballot,
            1,
            0,
            if x[t] > 3 { ballot } else { 0 },
            at(if t + 3 < 32 { t + 3 } else { t }),
            at(if t >= 3 { t - 3 } else { t }),
            at(5),
            // The shuffle works in segments of eight lanes.
            at(if t % 8 + 3 < 8 { t + 3 } else { t }),
        ];
        for (i, result) in results.into_iter().enumerate() {
            assert_eq!(out[32 * i + t], result, "{i} in lane {t}");
        }
    }
}

#[test]
fn atomics() {
    let module = case("cooperation_70");
    let mut gpu = Gpu::new();
    let (a, wide, seen) = (gpu.alloc_i32(&[0; 5]), gpu.alloc_u64(&[9]), gpu.alloc_unwritten(512));
    let report = gpu.launch(&module, "counts", 1, 64, 0, &[a, wide, seen].map(Arg::Ptr)).unwrap();
    // The wrapping counter runs from 0 to 10; each bit is flipped twice.
    assert_eq!(gpu.read_i32(a), [64, 63, 5, 64 % 11, 0]);
    assert_eq!(gpu.read_u64(wide), [9 + (64 << 33)]);
    let seen = gpu.read_i32(seen);
    assert_eq!(seen[..64], [128; 64]);
    assert_eq!(seen[64..], (0..64).map(|t| 2 * t).collect::<Vec<_>>());
    assert_eq!(report.count(Kind::Atomic).lanes, 7 * 64);
}

#[test]
fn vectors_of_four() {
    let module = case("vectors_70");
    let (x, z) = (uniform(128, 19), uniform(32, 20));
    let mut gpu = Gpu::new();
    let (px, out, pz) = (gpu.alloc_f32(&x), gpu.alloc_unwritten(512), gpu.alloc_f32(&z));
    let report = gpu.launch(&module, "vectors", 1, 32, 0, &[px, out, pz].map(Arg::Ptr)).unwrap();
    let all: Vec<f32> = (0..128).map(|n| x[n].mul_add(z[n / 4], x[n / 4 * 4 + 3 - n % 4])).collect();
    assert_eq!(gpu.read_f32(out), all);
    assert_eq!(report.read.sectors, (512 + 128) / 32);
}

/// a·b + c for row-major a (m×k) and b (k×n).
fn product([m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &[f32]) -> Vec<f32> {
    let element = |i: usize, j: usize| {
        (0..k).fold(f64::from(c[i * n + j]), |sum, l| sum + f64::from(a[i * k + l]) * f64::from(b[l * n + j])) as f32
    };
    (0..m * n).map(|at| element(at / n, at % n)).collect()
}

fn transposed<T: Copy>(x: &[T], rows: usize) -> Vec<T> {
    let columns = x.len() / rows;
    (0..x.len()).map(|at| x[at % rows * columns + at / rows]).collect()
}

#[test]
fn fragments_of_all_shapes() {
    let module = case("fragments_70");
    for seed in 0..3 {
        let mut gpu = Gpu::with(Options { seed, ..Options::default() });
        let (a, b, c) = (to_f16(&uniform(512, 21)), to_f16(&uniform(512, 22)), uniform(256, 23));
        let (x, y) = (from_f16(&a), from_f16(&b));
        let (pa, pc) = (gpu.alloc_u16(&a), gpu.alloc_f32(&c));
        let d = gpu.alloc_unwritten(1024);

        // 32×8, with b column-major.
        let by_columns = gpu.alloc_u16(&transposed(&b[..128], 16));
        gpu.launch(&module, "wide", 1, 32, 0, &[pa, by_columns, pc, d].map(Arg::Ptr)).unwrap();
        let halved: Vec<f32> = product([32, 8, 16], &x, &y[..128], &c).iter().map(|x| x * 0.5).collect();
        assert_close(&gpu.read_f32(d), &halved, 1e-5);

        // 8×32, with a and d column-major, each with and without a gap between columns.
        let mut spaced = vec![0; 256];
        for (column, values) in transposed(&a[..128], 8).chunks(8).enumerate() {
            spaced[16 * column..16 * column + 8].copy_from_slice(values);
        }
        let (pa, pb) = (gpu.alloc_u16(&spaced), gpu.alloc_u16(&b));
        gpu.launch(&module, "tall", 1, 32, 0, &[pa, pb, d].map(Arg::Ptr)).unwrap();
        let tall = product([8, 32, 16], &x[..128], &y, &[0.0; 256]);
        assert_close(&gpu.read_f32(d), &transposed(&tall, 8), 1e-5);

        // 16×16 with accumulators in f16.
        let sums = to_f16(&c);
        let args = [gpu.alloc_u16(&a[..256]), gpu.alloc_u16(&b[..256]), gpu.alloc_u16(&sums), gpu.alloc_unwritten(512)];
        gpu.launch(&module, "narrow", 1, 32, 0, &args.map(Arg::Ptr)).unwrap();
        let narrow = product([16, 16, 16], &x, &y, &from_f16(&sums));
        assert_close(&from_f16(&gpu.read_u16(args[3])), &narrow, 4e-3);
    }
}

#[test]
fn fragments_of_bfloat_and_documented_ones() {
    let module = case("fragments_80");
    let mut gpu = Gpu::new();
    let (a, b) = (to_bf16(&uniform(256, 24)), to_bf16(&uniform(256, 25)));
    let (pa, pb, d) = (gpu.alloc_u16(&a), gpu.alloc_u16(&transposed(&b, 16)), gpu.alloc_unwritten(1024));
    gpu.launch(&module, "brain", 1, 32, 0, &[pa, pb, d].map(Arg::Ptr)).unwrap();
    let theirs = product([16, 16, 16], &from_bf16(&a), &from_bf16(&b), &[0.0; 256]);
    assert_close(&gpu.read_f32(d), &theirs, 1e-5);

    let (a, b) = (to_f16(&uniform(256, 26)), to_f16(&uniform(128, 27)));
    let (pa, pb, d) = (gpu.alloc_u16(&a), gpu.alloc_u16(&b), gpu.alloc_unwritten(512));
    gpu.launch(&module, "documented", 1, 32, 0, &[pa, pb, d].map(Arg::Ptr)).unwrap();
    let theirs = product([16, 8, 16], &from_f16(&a), &from_f16(&b), &[0.0; 128]);
    assert_close(&gpu.read_f32(d), &theirs, 1e-5);
}

#[test]
fn reports_add_up() {
    let module = case("warp_sum_70");
    let mut gpu = Gpu::new();
    let (input, out) = (gpu.alloc_f32(&uniform(64, 28)), gpu.alloc_unwritten(8));
    let one = gpu.launch(&module, "warp_sum", 2, 32, 0, &[input, out].map(Arg::Ptr)).unwrap();
    let mut sum = one.clone();
    sum += &one;
    assert_eq!((sum.blocks, sum.read.bytes, sum.steps()), (4, 512, 2 * one.steps()));
}
