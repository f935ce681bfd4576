//! One step of an optimizer over flat vectors of all trainable values: the norm of the gradient, then clipping and the
//! optimizer's equations in one pass over memory. The equations of AdamW (Loshchilov & Hutter 2019), Adam, SGD and Lion
//! are stated in [`crate::interpret::optimizer`].

use std::fmt;
use std::hash::{Hash, Hasher};

use peft_grammar::model::{Hyper, Optimizer};
use peft_runtime::artifact::Element;

use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Kernel, Order, Val, define};
use crate::cost::{BATCHED_WARP_BYTES_IN_FLIGHT, LaunchCost, LaunchSizes};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::Card;

arguments! {
    /// Two flat vectors, and their two weights.
    AddBuffers { x, y, shares }
}
arguments! {
    /// The length of a flat vector.
    FlatSizes { count }
}

/// `x ← shares[0] x + shares[1] y`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddWeighted;

impl Scheduled for AddWeighted {
    fn name_stem(&self) -> String {
        "add_weighted".into()
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &[Element::F32; 3], FlatSizes::<Val>::COUNT, |k, buffers, sizes| {
            let AddBuffers { x, y, shares } = AddBuffers::of(buffers);
            let FlatSizes { count } = FlatSizes::of(sizes);
            let [of_x, of_y] = [0, 1].map(|i| {
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

    fn read_write(&self) -> Vec<usize> {
        vec![0]
    }
}

arguments! {
    /// The operand, and the result.
    SumBuffers { x, out }
}

/// Σ x² of each stretch of a flat vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SumOfSquares;

impl Scheduled for SumOfSquares {
    fn name_stem(&self) -> String {
        "sum_of_squares".into()
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &[Element::F32; 2], FlatSizes::<Val>::COUNT, |k, buffers, sizes| {
            let SumBuffers { x, out } = SumBuffers::of(buffers);
            let FlatSizes { count } = FlatSizes::of(sizes);
            k.units(|k, unit| {
                let (start, end) = k.stretch(unit, count);
                let zero = k.floats(0.0);
                let sums = k.fold(start, end, k.lane_count(), &[zero], |k, at, sums| {
                    let mask = k.mask(end - at);
                    let x = k.load_lanes(x, at, mask);
                    vec![k.fma(x, x, sums[0])]
                });
                let sum = k.sum_lanes(sums[0]);
                k.store(sum, out, unit);
            });
        })
    }
}

/// √Σ x, computed by one team.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RootOfSum {
    /// Vectors that each member of the team loads at once.
    pub ahead: u64,
}

impl Scheduled for RootOfSum {
    fn name_stem(&self) -> String {
        "root_of_sum".into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let ahead = self.ahead;
        define(machine, &[Element::F32; 2], FlatSizes::<Val>::COUNT, |k, buffers, sizes| {
            let SumBuffers { x, out } = SumBuffers::of(buffers);
            let FlatSizes { count } = FlatSizes::of(sizes);
            let shared = (k.team() > 1).then(|| k.shared(k.team() * k.lane_count()));
            k.team_units(|k, unit| {
                let (zero, lanes) = (k.index(0), k.lane_count());
                let zero_f32 = k.floats(0.0);
                let sums = k.team_fold(zero, count, lanes * ahead, &vec![zero_f32; ahead as usize], |k, at, sums| {
                    let next = (0..).zip(sums).map(|(n, &sum)| {
                        let at = k.eval(at + n * lanes);
                        let mask = k.mask(count - at);
                        let x = k.load_lanes(x, at, mask);
                        k.add(sum, x)
                    });
                    next.collect()
                });
                let sum = sums[1..].iter().fold(sums[0], |sum, &other| k.add(sum, other));
                let sum = k.sum_team(sum, shared);
                let sum = k.sum_lanes(sum);
                let root = k.sqrt(sum);
                k.first_of_team(|k| k.store(root, out, unit));
            });
        })
    }

    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        launched.streaming(BATCHED_WARP_BYTES_IN_FLIGHT)
    }
}

arguments! {
    /// The trainable values, and their gradients.
    ParameterBuffers { values, gradients }
}
arguments! {
    /// The optimizer's scalar inputs.
    HyperBuffers {
        /// The hyperparameters of [`Optimizer::hyper`], in its order.
        hyper,
        /// The norm of the gradient before clipping.
        norm,
    }
}

/// One step of an optimizer. Its buffers are [`ParameterBuffers`], the moments, the weight-decay mask, the factors of
/// the learning rate if there are any, and [`HyperBuffers`].
#[derive(Clone, Copy)]
pub struct OptimizerStep {
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Whether some values have learning rates of their own, given as factors of the step's learning rate.
    pub own_rates: bool,
}

impl OptimizerStep {
    /// All that the code depends on. The numbers among the optimizer's settings are no part of it, because the kernel
    /// reads them from [`HyperBuffers`].
    fn identity(&self) -> (&'static str, &'static [Hyper], usize, bool) {
        (self.optimizer.keyword(), self.optimizer.hyper(), self.optimizer.moments().len(), self.own_rates)
    }
}

impl Scheduled for OptimizerStep {
    fn name_stem(&self) -> String {
        let momentum = matches!(self.optimizer, Optimizer::Sgd { .. }) && !self.optimizer.moments().is_empty();
        let own_rates = if self.own_rates { "_own_rates" } else { "" };
        format!("{}{}{own_rates}", self.optimizer.keyword(), if momentum { "_momentum" } else { "" })
    }

    fn emit(&self, machine: Machine) -> Code {
        let OptimizerStep { optimizer, own_rates } = *self;
        let moments = optimizer.moments().len();
        let others = moments + 1 + usize::from(own_rates);
        let count = ParameterBuffers::<Val>::COUNT + others + HyperBuffers::<Val>::COUNT;
        define(machine, &vec![Element::F32; count], FlatSizes::<Val>::COUNT, |k, buffers, sizes| {
            let (ParameterBuffers { values: p, gradients: g }, rest) = ParameterBuffers::split(buffers);
            let FlatSizes { count } = FlatSizes::of(sizes);
            let (moments, rest) = rest.split_at(moments);
            let (decay, rest) = (rest[0], &rest[1..]);
            let (lr_factors, rest) = rest.split_at(usize::from(own_rates));
            let lr_factors = lr_factors.first().copied();
            let HyperBuffers { hyper, norm } = HyperBuffers::of(rest);
            let hyper_values: Vec<Val> = (0..optimizer.hyper().len() as u64).map(|i| k.load(hyper, i)).collect();
            let clip = HyperValues { optimizer, hyper_values: hyper_values.clone() }.get(Hyper::Clip);
            let norm = k.load(norm, 0);
            // min(1, clip / (norm + 1e-6)); there is no clipping if `clip` is 0.
            let (small, one, none) = (k.float(1e-6, F32), k.float(1.0, F32), k.float(0.0, F32));
            let norm = k.add(norm, small);
            let factor = k.div(clip, norm);
            let factor = k.min(factor, one);
            let clips = k.compare(clip, Order::Gt, none);
            let factor = k.select(clips, factor, one);
            let factor = k.splat(factor);
            let hyper_values =
                HyperValues { optimizer, hyper_values: hyper_values.into_iter().map(|x| k.splat(x)).collect() };
            k.units(|k, unit| {
                k.each_of_stretch(unit, count, |k, at, mask| {
                    let x = k.load_lanes(g, at, mask);
                    let x = k.mul(x, factor);
                    let lr = hyper_values.get(Hyper::Lr);
                    let lr = match lr_factors {
                        Some(factors) => {
                            let factors = k.load_lanes(factors, at, mask);
                            k.mul(lr, factors)
                        }
                        None => lr,
                    };
                    let lanes = Lanes { hyper_values: &hyper_values, lr, moments, p, decay, at, mask };
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

    /// The values and the moments.
    fn read_write(&self) -> Vec<usize> {
        let first = ParameterBuffers::<usize>::COUNT;
        [0].into_iter().chain(first..first + self.optimizer.moments().len()).collect()
    }
}

impl PartialEq for OptimizerStep {
    fn eq(&self, other: &OptimizerStep) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for OptimizerStep {}

impl Hash for OptimizerStep {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

impl fmt::Debug for OptimizerStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OptimizerStep").field(&self.identity()).finish()
    }
}

/// The values of the hyperparameters.
struct HyperValues {
    optimizer: Optimizer,
    hyper_values: Vec<Val>,
}

impl HyperValues {
    fn get(&self, hyper: Hyper) -> Val {
        let at = self.optimizer.hyper().iter().position(|known| *known == hyper);
        self.hyper_values[at.expect("the equations read the optimizer's own hyperparameters only")]
    }
}

/// One vector of the flat vectors.
struct Lanes<'a> {
    hyper_values: &'a HyperValues,
    /// The learning rate η.
    lr: Val,
    moments: &'a [Buf],
    p: Buf,
    decay: Buf,
    at: Val,
    mask: Val,
}

impl Lanes<'_> {
    /// Updates a moment to `beta m + rest x`, stores it, and returns it.
    fn average(&self, k: &mut Kernel, which: usize, (beta, rest): (Hyper, Hyper), x: Val) -> Val {
        let old = k.load_lanes(self.moments[which], self.at, self.mask);
        let old = k.mul(old, self.hyper_values.get(beta));
        let new = k.fma(self.hyper_values.get(rest), x, old);
        k.store_lanes(new, self.moments[which], self.at, self.mask);
        new
    }

    /// p, and its weight decay λ.
    fn value(&self, k: &mut Kernel) -> (Val, Val) {
        let value = k.load_lanes(self.p, self.at, self.mask);
        let decays = k.load_lanes(self.decay, self.at, self.mask);
        (value, k.mul(self.hyper_values.get(Hyper::WeightDecay), decays))
    }

    /// p, and g + λ p (L2 regularisation)
    fn regularised(&self, k: &mut Kernel, x: Val) -> (Val, Val) {
        let (value, decay) = self.value(k);
        (value, k.fma(decay, value, x))
    }

    /// p (1 − η λ) (decoupled weight decay)
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
        let first = self.average(k, 0, (Hyper::Beta1, Hyper::OneMinusBeta1), x);
        let square = k.mul(x, x);
        let second = self.average(k, 1, (Hyper::Beta2, Hyper::OneMinusBeta2), square);
        let first = k.div(first, self.hyper_values.get(Hyper::BiasCorrection1));
        let second = k.div(second, self.hyper_values.get(Hyper::BiasCorrection2));
        let root = k.sqrt(second);
        let root = k.add(root, self.hyper_values.get(Hyper::Eps));
        k.div(first, root)
    }

    fn momentum(&self, k: &mut Kernel, x: Val) -> Val {
        let [m] = self.moments else { return x };
        let old = k.load_lanes(*m, self.at, self.mask);
        let new = k.fma(self.hyper_values.get(Hyper::Momentum), old, x);
        k.store_lanes(new, *m, self.at, self.mask);
        new
    }

    /// The sign of the moment averaged with β₁, where the sign of 0 is 0. The moment that is stored is averaged with
    /// β₂.
    fn lion(&self, k: &mut Kernel, x: Val) -> Val {
        let m = k.load_lanes(self.moments[0], self.at, self.mask);
        let old = k.mul(m, self.hyper_values.get(Hyper::Beta1));
        let between = k.fma(self.hyper_values.get(Hyper::OneMinusBeta1), x, old);
        self.average(k, 0, (Hyper::Beta2, Hyper::OneMinusBeta2), x);
        let [none, up, down] = [0.0, 1.0, -1.0].map(|x| k.floats(x));
        let above = k.compare(between, Order::Gt, none);
        let below = k.compare(between, Order::Lt, none);
        let sign = k.select(below, down, none);
        k.select(above, up, sign)
    }
}
