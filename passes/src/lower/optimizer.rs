//! The optimizer's entries, over flat vectors of all trainable values: the norm of the gradient, then clipping and the
//! optimizer's equations in one pass. [`crate::interpret::optimizer`] has the equations.

use peft_grammar::names::{GRAD_NORM, Input, OptimizerEntry, Vector};
use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Output, Storage};

use super::module::Module;
use super::schedule;
use crate::kernels::optimizer::{
    AddBuffers, AddWeighted, FlatSizes, HyperBuffers, OptimizerStep, ParameterBuffers, RootOfSum, SumBuffers,
    SumOfSquares,
};

/// The entries that update the optimizer's vectors.
pub fn entries(module: &mut Module, own_rates: bool) -> [(OptimizerEntry, Entry); 4] {
    let update = (OptimizerEntry::Update, update(module, own_rates));
    let [one, last] = accumulation(module);
    [update, one, last, (OptimizerEntry::Average, average(module))]
}

/// One step, whose output is `grad_norm`, the norm before clipping. With `own_rates` each value's learning rate is its
/// own factor times the step's.
fn update(module: &mut Module, own_rates: bool) -> Entry {
    let optimizer = module.optimizer;
    let [values, gradients] = [Vector::Values, Vector::Gradients].map(|vector| flat_vector(module, vector));
    let mut buffers_of_step = ParameterBuffers { values, gradients }.list();
    let others = optimizer.moments().iter().chain(&[Vector::Decay]).chain(own_rates.then_some(&Vector::LrFactors));
    buffers_of_step.extend(others.map(|vector| flat_vector(module, *vector)));
    let hyper = input_vector(module, Input::Hyper, Extent::Const(optimizer.hyper().len() as u64));
    let blocks = Extent::CeilDiv(Box::new(Extent::Values), module.machine.flat_unit_elements());
    let partial = module.buffer(Element::F32, vec![blocks.clone()], Storage::Temporary);
    let norm = module.buffer(Element::F32, vec![], Storage::Temporary);
    buffers_of_step.extend(HyperBuffers { hyper, norm }.list());
    let count = FlatSizes { count: Extent::Values }.list();
    let ahead = schedule::partial_sum_vectors(module.machine);
    let of_partial = FlatSizes { count: blocks.clone() }.list();
    let launches = vec![
        module.launch(
            SumOfSquares,
            SumBuffers { x: gradients, out: partial }.list(),
            count.clone(),
            blocks.clone(),
            "norm",
        ),
        module.launch(
            RootOfSum { ahead },
            SumBuffers { x: partial, out: norm }.list(),
            of_partial,
            Extent::Const(module.machine.team_size()),
            "norm",
        ),
        module.launch(OptimizerStep { optimizer, own_rates }, buffers_of_step, count, blocks, optimizer.keyword()),
    ];
    Entry { launches, outputs: vec![Output { name: GRAD_NORM.into(), buffer: norm, shape: vec![] }] }
}

/// Gradient accumulation over the batches of one step. `accumulate` runs after every batch but the last, and
/// `accumulated` after the last; the input `shares` has the weight of each vector.
///
/// ```text
/// accumulate    sums      ← shares[0] sums + shares[1] gradients
/// accumulated   gradients ← shares[0] gradients + shares[1] sums
/// ```
fn accumulation(module: &mut Module) -> [(OptimizerEntry, Entry); 2] {
    use OptimizerEntry::{Accumulate, Accumulated};
    [(Accumulate, [Vector::Sums, Vector::Gradients]), (Accumulated, [Vector::Gradients, Vector::Sums])]
        .map(|(which, vectors)| (which, weighted_sum(module, vectors, Input::Shares, Accumulate.name())))
}

/// The running average of the values, after `update`; the input `average_shares` has the weight of each vector.
///
/// ```text
/// average    averages ← average_shares[0] averages + average_shares[1] values
/// ```
fn average(module: &mut Module) -> Entry {
    weighted_sum(module, [Vector::Averages, Vector::Values], Input::AverageShares, OptimizerEntry::Average.name())
}

/// x ← shares[0] x + shares[1] y, for two flat vectors.
fn weighted_sum(module: &mut Module, [x, y]: [Vector; 2], shares: Input, op: &str) -> Entry {
    let [x, y] = [x, y].map(|vector| flat_vector(module, vector));
    let shares = input_vector(module, shares, Extent::Const(2));
    let units = Extent::CeilDiv(Box::new(Extent::Values), module.machine.flat_unit_elements());
    let (buffers, sizes) = (AddBuffers { x, y, shares }.list(), FlatSizes { count: Extent::Values }.list());
    Entry { launches: vec![module.launch(AddWeighted, buffers, sizes, units, op)], outputs: vec![] }
}

/// The buffer of one of the flat vectors of all trainable values.
fn flat_vector(module: &mut Module, vector: Vector) -> BufferId {
    module.bind(&format!("flat {vector}"), Element::F32, vec![Extent::Values], Storage::Flat(vector))
}

/// The buffer of an input of `count` numbers.
fn input_vector(module: &mut Module, input: Input, count: Extent) -> BufferId {
    module.bind(input.name(), Element::F32, vec![count], Storage::Input(input.name().into()))
}
