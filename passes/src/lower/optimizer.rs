//! The optimizer's step over flat vectors of all trainable values: the norm of the gradient, then
//! clipping and the optimizer's equations in one sweep. They stand in [`crate::interpret::optimizer`].

use peft_grammar::model::{Hyper, Optimizer};
use peft_grammar::names::{GRAD_NORM, Input, OptimizerEntry, Vector};
use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Launch, Output, Storage};

use super::Target;
use super::kernel::{Buf, Code, F32, Kernel, Order, Val, define, first};
use crate::machine::Machine;

/// Partial sums that a GPU's warp reads at once.
const AHEAD: u64 = 8;

/// What a sweep is made for.
#[derive(Clone, Copy)]
struct Sweep {
    optimizer: Optimizer,
    /// Some values have learning rates of their own.
    own_rates: bool,
}

/// What the name of a sweep with [`Sweep::own_rates`] ends with.
const OWN_RATES: &str = "_own_rates";

impl Sweep {
    fn name(self) -> String {
        let name = match self.optimizer {
            Optimizer::Sgd { .. } if !self.optimizer.moments().is_empty() => "sgd_momentum",
            optimizer => optimizer.word(),
        };
        format!("{name}{}", if self.own_rates { OWN_RATES } else { "" })
    }
}

/// What the kernel of [`weighted`] is called.
const ADD_WEIGHTED: &str = "add_weighted";

/// By a sweep's name, the buffers that it reads and writes anew: the values and what the optimizer keeps of them.
pub fn anew(name: &str) -> Option<&'static [usize]> {
    if name == ADD_WEIGHTED {
        return Some(&[0]);
    }
    let with_momentum = Optimizer::Sgd { momentum: 0.9 };
    let sweeps = Optimizer::ALL.into_iter().chain([with_momentum]);
    let mut sweeps = sweeps.map(|optimizer| Sweep { optimizer, own_rates: name.ends_with(OWN_RATES) });
    let sweep = sweeps.find(|sweep| sweep.name() == name)?;
    Some(match sweep.optimizer.moments().len() {
        0 => &[0],
        1 => &[0, 2],
        _ => &[0, 2, 3],
    })
}

/// One step; gives `grad_norm`, the norm before clipping. With `own_rates` each value's rate is its factor times that of
/// the step.
pub fn update(target: &mut Target, own_rates: bool) -> Entry {
    let optimizer = target.optimizer;
    let sweep = Sweep { optimizer, own_rates };
    let vectors = [Vector::Values, Vector::Gradients].iter().chain(optimizer.moments()).chain(&[Vector::Decay]);
    let vectors = vectors.chain(own_rates.then_some(&Vector::LrFactors));
    let mut swept: Vec<BufferId> = vectors.map(|vector| flat(target, *vector)).collect();
    let gradients = swept[1];
    let count = Extent::Const(optimizer.hyper().len() as u64);
    let hyper = given(target, Input::Hyper, count);
    let blocks = Extent::CeilDiv(Box::new(Extent::Values), target.machine.stretch());
    let partial = target.buffer(Element::F32, vec![blocks.clone()], Storage::Temporary);
    let norm = target.buffer(Element::F32, vec![], Storage::Temporary);
    swept.extend([hyper, norm]);
    let launch = |kernel, buffers: Vec<BufferId>, extents, units, op: &str| Launch {
        kernel,
        buffers,
        extents,
        units,
        op: op.into(),
    };
    let squares = target.kernel("sum_of_squares", sum_of_squares);
    let root = target.kernel("root_of_sum", root_of_sum);
    let kernel = target.kernel(&sweep.name(), |machine| sweep.code(machine));
    let launches = vec![
        launch(squares, vec![gradients, partial], vec![Extent::Values], blocks.clone(), "norm"),
        launch(root, vec![partial, norm], vec![blocks.clone()], Extent::Const(target.machine.team()), "norm"),
        launch(kernel, swept, vec![Extent::Values], blocks, optimizer.word()),
    ];
    Entry { launches, outputs: vec![Output { name: GRAD_NORM.into(), buffer: norm, shape: vec![] }] }
}

/// Gradients of batches that are one step. Every batch but the last is followed by `accumulate`, and the last one by
/// `accumulated`; `shares` says what each vector counts.
///
/// ```text
/// accumulate    sums      ← shares[0] sums + shares[1] gradients
/// accumulated   gradients ← shares[0] gradients + shares[1] sums
/// ```
pub fn accumulation(target: &mut Target) -> [(&'static str, Entry); 2] {
    let (accumulate, accumulated) = (OptimizerEntry::Accumulate.name(), OptimizerEntry::Accumulated.name());
    [(accumulate, [Vector::Sums, Vector::Gradients]), (accumulated, [Vector::Gradients, Vector::Sums])]
        .map(|(name, vectors)| (name, weighted(target, vectors, Input::Shares, accumulate)))
}

/// The average of the values, which follows `update`; `average_shares` says what each vector counts.
///
/// ```text
/// average    averages ← average_shares[0] averages + average_shares[1] values
/// ```
pub fn average(target: &mut Target) -> Entry {
    weighted(target, [Vector::Averages, Vector::Values], Input::AverageShares, OptimizerEntry::Average.name())
}

/// Two flat vectors x and y: x becomes what the two numbers of the input `shares` make of both.
fn weighted(target: &mut Target, [x, y]: [Vector; 2], shares: Input, op: &str) -> Entry {
    let [x, y] = [x, y].map(|vector| flat(target, vector));
    let shares = given(target, shares, Extent::Const(2));
    let units = Extent::CeilDiv(Box::new(Extent::Values), target.machine.stretch());
    let kernel = target.kernel(ADD_WEIGHTED, add_weighted);
    let (buffers, extents) = (vec![x, y, shares], vec![Extent::Values]);
    Entry { launches: vec![Launch { kernel, buffers, extents, units, op: op.into() }], outputs: vec![] }
}

fn flat(target: &mut Target, vector: Vector) -> BufferId {
    target.bind(&format!("flat {vector}"), Element::F32, vec![Extent::Values], Storage::Flat(vector))
}

/// So many numbers that the step is told.
fn given(target: &mut Target, input: Input, count: Extent) -> BufferId {
    target.bind(input.name(), Element::F32, vec![count], Storage::Input(input.name().into()))
}

/// x ← shares[0] x + shares[1] y
fn add_weighted(machine: Machine) -> Code {
    define(machine, &[Element::F32; 3], 1, |k, buffers, sizes| {
        let ([x, y, shares], [count]) = (first(buffers), first(sizes));
        let [of_x, of_y] = [0, 1].map(|i| {
            let i = k.index(i);
            let share = k.load(shares, i);
            k.splat(share)
        });
        k.units(|k, unit| {
            k.each_of_stretch(unit, count, |k, at, mask| {
                let old = k.load_lanes(x, at, mask);
                let old = k.mul(old, of_x);
                let y = k.load_lanes(y, at, mask);
                let new = k.fma(of_y, y, old);
                k.store_lanes(new, x, at, mask);
            });
        });
    })
}

fn sum_of_squares(machine: Machine) -> Code {
    define(machine, &[Element::F32; 2], 1, |k, buffers, sizes| {
        let ([x, out], [count]) = (first(buffers), first(sizes));
        k.units(|k, unit| {
            let (start, end) = k.stretch(unit, count);
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

impl Sweep {
    fn code(self, machine: Machine) -> Code {
        let Sweep { optimizer, own_rates } = self;
        let moments = optimizer.moments().len();
        let elements = vec![Element::F32; 5 + moments + usize::from(own_rates)];
        define(machine, &elements, 1, |k, buffers, sizes| {
            let ([p, g], [count]) = (first(buffers), first(sizes));
            let decay = buffers[2 + moments];
            let lr_factors = own_rates.then(|| buffers[3 + moments]);
            let [hyper, norm] = first(&buffers[buffers.len() - 2..]);
            let moments = &buffers[2..2 + moments];
            let told: Vec<Val> = (0..optimizer.hyper().len() as u64)
                .map(|i| {
                    let i = k.index(i);
                    k.load(hyper, i)
                })
                .collect();
            let clip = Told { optimizer, told: told.clone() }.get(Hyper::Clip);
            let zero = k.index(0);
            let norm = k.load(norm, zero);
            // min(1, clip / (norm + 1e-6)); no clipping at 0.
            let (small, one, none) = (k.float(1e-6, F32), k.float(1.0, F32), k.float(0.0, F32));
            let norm = k.add(norm, small);
            let factor = k.div(clip, norm);
            let factor = k.min(factor, one);
            let clips = k.compare(clip, Order::Gt, none);
            let factor = k.select(clips, factor, one);
            let factor = k.splat(factor);
            let told = Told { optimizer, told: told.into_iter().map(|x| k.splat(x)).collect() };
            k.units(|k, unit| {
                k.each_of_stretch(unit, count, |k, at, mask| {
                    let x = k.load_lanes(g, at, mask);
                    let x = k.mul(x, factor);
                    let lr = told.get(Hyper::Lr);
                    let lr = match lr_factors {
                        Some(factors) => {
                            let factors = k.load_lanes(factors, at, mask);
                            k.mul(lr, factors)
                        }
                        None => lr,
                    };
                    let lanes = Lanes { told: &told, lr, moments, p, decay, at, mask };
                    let value = match optimizer {
                        Optimizer::AdamW => {
                            let step = lanes.adam(k, x);
                            let value = lanes.shrunk(k);
                            lanes.descend(k, value, step)
                        }
                        Optimizer::Adam => {
                            let (value, x) = lanes.regularised(k, x);
                            let step = lanes.adam(k, x);
                            lanes.descend(k, value, step)
                        }
                        Optimizer::Sgd { .. } => {
                            let (value, x) = lanes.regularised(k, x);
                            let step = lanes.momentum(k, x);
                            lanes.descend(k, value, step)
                        }
                        Optimizer::Lion => {
                            let step = lanes.lion(k, x);
                            let value = lanes.shrunk(k);
                            lanes.descend(k, value, step)
                        }
                    };
                    k.store_lanes(value, p, at, mask);
                });
            });
        })
    }
}

/// What the input `hyper` holds.
struct Told {
    optimizer: Optimizer,
    told: Vec<Val>,
}

impl Told {
    fn get(&self, hyper: Hyper) -> Val {
        let at = self.optimizer.hyper().iter().position(|known| *known == hyper);
        self.told[at.expect("the optimizer is told what its equations read")]
    }
}

/// Neighbouring values of the flat vectors.
struct Lanes<'a> {
    told: &'a Told,
    /// η
    lr: Val,
    moments: &'a [Buf],
    p: Buf,
    decay: Buf,
    at: Val,
    mask: Val,
}

impl Lanes<'_> {
    /// `beta m + rest x`, kept as moment `which`.
    fn average(&self, k: &mut Kernel, which: usize, (beta, rest): (Hyper, Hyper), x: Val) -> Val {
        let old = k.load_lanes(self.moments[which], self.at, self.mask);
        let old = k.mul(old, self.told.get(beta));
        let new = k.fma(self.told.get(rest), x, old);
        k.store_lanes(new, self.moments[which], self.at, self.mask);
        new
    }

    /// p, and λ of it.
    fn value(&self, k: &mut Kernel) -> (Val, Val) {
        let value = k.load_lanes(self.p, self.at, self.mask);
        let decays = k.load_lanes(self.decay, self.at, self.mask);
        (value, k.mul(self.told.get(Hyper::WeightDecay), decays))
    }

    /// p, and g + λ p
    fn regularised(&self, k: &mut Kernel, x: Val) -> (Val, Val) {
        let (value, decay) = self.value(k);
        (value, k.fma(decay, value, x))
    }

    /// p (1 − η λ)
    fn shrunk(&self, k: &mut Kernel) -> Val {
        let (value, decay) = self.value(k);
        let one = k.floats(1.0);
        let shrink = k.mul(self.lr, decay);
        let shrink = k.sub(one, shrink);
        k.mul(value, shrink)
    }

    /// p − η step
    fn descend(&self, k: &mut Kernel, value: Val, step: Val) -> Val {
        let step = k.mul(self.lr, step);
        k.sub(value, step)
    }

    fn adam(&self, k: &mut Kernel, x: Val) -> Val {
        let first = self.average(k, 0, (Hyper::Beta1, Hyper::Rest1), x);
        let square = k.mul(x, x);
        let second = self.average(k, 1, (Hyper::Beta2, Hyper::Rest2), square);
        let first = k.div(first, self.told.get(Hyper::Bias1));
        let second = k.div(second, self.told.get(Hyper::Bias2));
        let root = k.sqrt(second);
        let root = k.add(root, self.told.get(Hyper::Eps));
        k.div(first, root)
    }

    fn momentum(&self, k: &mut Kernel, x: Val) -> Val {
        let [m] = self.moments else { return x };
        let old = k.load_lanes(*m, self.at, self.mask);
        let new = k.fma(self.told.get(Hyper::Momentum), old, x);
        k.store_lanes(new, *m, self.at, self.mask);
        new
    }

    /// The sign of the average with β₁, 0 of 0; kept is that with β₂.
    fn lion(&self, k: &mut Kernel, x: Val) -> Val {
        let m = k.load_lanes(self.moments[0], self.at, self.mask);
        let old = k.mul(m, self.told.get(Hyper::Beta1));
        let between = k.fma(self.told.get(Hyper::Rest1), x, old);
        self.average(k, 0, (Hyper::Beta2, Hyper::Rest2), x);
        let [none, up, down] = [0.0, 1.0, -1.0].map(|x| k.floats(x));
        let above = k.compare(between, Order::Gt, none);
        let below = k.compare(between, Order::Lt, none);
        let sign = k.select(below, down, none);
        k.select(above, up, sign)
    }
}
