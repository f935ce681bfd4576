//! The optimizer's step over flat vectors of all trainable values: the norm of the gradient, then
//! clipping and AdamW in one sweep.

use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Launch, Output, Storage};

use super::Target;
use super::kernel::{Code, F32, Val, define, first};
use crate::machine::Machine;

/// Partial sums that a GPU's warp reads at once.
const AHEAD: u64 = 8;

/// What the input `hyper` holds, in this order.
pub const HYPER: [&str; 10] =
    ["lr", "beta1", "beta2", "eps", "weight_decay", "clip", "1-beta1", "1-beta2", "1-beta1^t", "1-beta2^t"];

/// One step; gives `grad_norm`, the norm before clipping.
pub fn update(target: &mut Target) -> Entry {
    let mut flat = |name: &str| {
        target.bind(&format!("flat {name}"), Element::F32, vec![Extent::Values], Storage::Flat(name.into()))
    };
    let [values, gradients, m, v, decay] = ["values", "gradients", "m", "v", "decay"].map(&mut flat);
    let count = Extent::Const(HYPER.len() as u64);
    let hyper = target.bind("hyper", Element::F32, vec![count], Storage::Input("hyper".into()));
    let blocks = Extent::CeilDiv(Box::new(Extent::Values), target.machine.stretch());
    let partial = target.buffer(Element::F32, vec![blocks.clone()], Storage::Temporary);
    let norm = target.buffer(Element::F32, vec![], Storage::Temporary);
    let launch = |kernel, buffers: Vec<BufferId>, extents, units, op: &str| Launch {
        kernel,
        buffers,
        extents,
        units,
        op: op.into(),
    };
    let squares = target.kernel("sum_of_squares", sum_of_squares);
    let root = target.kernel("root_of_sum", root_of_sum);
    let adamw = target.kernel("adamw", adamw);
    let launches = vec![
        launch(squares, vec![gradients, partial], vec![Extent::Values], blocks.clone(), "norm"),
        launch(root, vec![partial, norm], vec![blocks.clone()], Extent::Const(target.machine.team()), "norm"),
        launch(adamw, vec![values, gradients, m, v, decay, hyper, norm], vec![Extent::Values], blocks, "adamw"),
    ];
    Entry { launches, outputs: vec![Output { name: "grad_norm".into(), buffer: norm, shape: vec![] }] }
}

fn sum_of_squares(machine: Machine) -> Code {
    define(machine, &[Element::F32; 2], 1, |k, buffers, sizes| {
        let ([x, out], [count]) = (first(buffers), first(sizes));
        k.units(|k, unit| {
            let block = k.index(k.machine.stretch());
            let start = k.mul(unit, block);
            let end = k.add(start, block);
            let end = k.min(end, count);
            let zero = k.floats(0.0);
            let sums = k.fold(start, end, k.lane_count(), &[zero], |k, at, sums| {
                let left = k.sub(end, at);
                let mask = k.mask(left);
                let x = k.load_lanes(x, at, mask);
                vec![k.fma(x, x, sums[0])]
            });
            let sum = k.sum_lanes(sums[0]);
            k.store(sum, out, unit);
        });
    })
}

fn root_of_sum(machine: Machine) -> Code {
    define(machine, &[Element::F32; 2], 1, |k, buffers, sizes| {
        let ([x, out], [count]) = (first(buffers), first(sizes));
        let room = (k.team() > 1).then(|| k.shared(k.team() * k.lane_count()));
        let ahead = if k.team() > 1 { AHEAD } else { 1 };
        k.team_units(|k, unit| {
            let (zero, lanes) = (k.index(0), k.lane_count());
            let nothing = k.floats(0.0);
            let sums = k.dealt_fold(zero, count, lanes * ahead, &vec![nothing; ahead as usize], |k, at, sums| {
                let next = (0..).zip(sums).map(|(n, &sum)| {
                    let offset = k.index(n * lanes);
                    let at = k.add(at, offset);
                    let left = k.sub(count, at);
                    let mask = k.mask(left);
                    let x = k.load_lanes(x, at, mask);
                    k.add(sum, x)
                });
                next.collect()
            });
            let sum = sums[1..].iter().fold(sums[0], |sum, &other| k.add(sum, other));
            let sum = k.sum_team(sum, room);
            let sum = k.sum_lanes(sum);
            let root = k.sqrt(sum);
            k.first_of_team(|k| k.store(root, out, unit));
        });
    })
}

/// p ← p (1 − lr wd);  m, v as usual;  p ← p − lr (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + eps)  (Loshchilov & Hutter, 2019)
fn adamw(machine: Machine) -> Code {
    let elements = [Element::F32; 7];
    define(machine, &elements, 1, |k, buffers, sizes| {
        let ([p, g, m, v, decay, hyper, norm], [count]) = (first(buffers), first(sizes));
        let hyper: Vec<Val> = (0..HYPER.len() as u64)
            .map(|i| {
                let i = k.index(i);
                k.load(hyper, i)
            })
            .collect();
        let zero = k.index(0);
        let norm = k.load(norm, zero);
        // min(1, clip / (norm + 1e-6)); no clipping at 0.
        let (small, one, none) = (k.float(1e-6, F32), k.float(1.0, F32), k.float(0.0, F32));
        let norm = k.add(norm, small);
        let factor = k.div(hyper[5], norm);
        let factor = k.min(factor, one);
        let clips = k.compare(hyper[5], super::kernel::Order::Gt, none);
        let factor = k.select(clips, factor, one);
        let factor = k.splat(factor);
        let hyper: Vec<Val> = hyper.into_iter().map(|x| k.splat(x)).collect();
        let [lr, beta1, beta2, eps, weight_decay, _, rest1, rest2, bias1, bias2] = first(&hyper);
        let one = k.floats(1.0);
        k.units(|k, unit| {
            let block = k.index(k.machine.stretch());
            let start = k.mul(unit, block);
            let end = k.add(start, block);
            let end = k.min(end, count);
            k.each(start, end, k.lane_count(), |k, at| {
                let left = k.sub(end, at);
                let mask = k.mask(left);
                let x = k.load_lanes(g, at, mask);
                let x = k.mul(x, factor);
                let old = k.load_lanes(m, at, mask);
                let old = k.mul(old, beta1);
                let first = k.fma(rest1, x, old);
                k.store_lanes(first, m, at, mask);
                let old = k.load_lanes(v, at, mask);
                let old = k.mul(old, beta2);
                let square = k.mul(x, x);
                let second = k.fma(rest2, square, old);
                k.store_lanes(second, v, at, mask);

                let value = k.load_lanes(p, at, mask);
                let decays = k.load_lanes(decay, at, mask);
                let shrink = k.mul(lr, weight_decay);
                let shrink = k.mul(shrink, decays);
                let shrink = k.sub(one, shrink);
                let value = k.mul(value, shrink);
                let first = k.div(first, bias1);
                let second = k.div(second, bias2);
                let root = k.sqrt(second);
                let root = k.add(root, eps);
                let step = k.div(first, root);
                let step = k.mul(lr, step);
                let value = k.sub(value, step);
                k.store_lanes(value, p, at, mask);
            });
        });
    })
}
