//! The optimizer's step over flat vectors of all trainable values: the norm of the gradient, then
//! clipping and the optimizer's equations in one sweep. They stand in [`crate::interpret::optimizer`].

use peft_grammar::names::{GRAD_NORM, Input, OptimizerEntry, Vector};
use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Output, Storage};

use super::module::Module;
use super::schedule;
use crate::kernels::optimizer::{
    AddBuffers, AddWeighted, FlatSizes, RootOfSum, SumBuffers, SumOfSquares, Sweep, SweptBuffers, ToldBuffers,
};

/// All that is computed of the optimizer's vectors.
pub fn entries(module: &mut Module, own_rates: bool) -> [(OptimizerEntry, Entry); 4] {
    let update = (OptimizerEntry::Update, update(module, own_rates));
    let [one, last] = accumulation(module);
    [update, one, last, (OptimizerEntry::Average, average(module))]
}

/// One step; gives `grad_norm`, the norm before clipping. With `own_rates` each value's rate is its factor times that of
/// the step.
fn update(module: &mut Module, own_rates: bool) -> Entry {
    let optimizer = module.optimizer;
    let [values, gradients] = [Vector::Values, Vector::Gradients].map(|vector| flat(module, vector));
    let mut swept = SweptBuffers { values, gradients }.list();
    let others = optimizer.moments().iter().chain(&[Vector::Decay]).chain(own_rates.then_some(&Vector::LrFactors));
    swept.extend(others.map(|vector| flat(module, *vector)));
    let hyper = given(module, Input::Hyper, Extent::Const(optimizer.hyper().len() as u64));
    let blocks = Extent::CeilDiv(Box::new(Extent::Values), module.machine.stretch());
    let partial = module.buffer(Element::F32, vec![blocks.clone()], Storage::Temporary);
    let norm = module.buffer(Element::F32, vec![], Storage::Temporary);
    swept.extend(ToldBuffers { hyper, norm }.list());
    let count = FlatSizes { count: Extent::Values }.list();
    let ahead = schedule::partial_sums(module.machine);
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
            Extent::Const(module.machine.team()),
            "norm",
        ),
        module.launch(Sweep { optimizer, own_rates }, swept, count, blocks, optimizer.word()),
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
fn accumulation(module: &mut Module) -> [(OptimizerEntry, Entry); 2] {
    use OptimizerEntry::{Accumulate, Accumulated};
    [(Accumulate, [Vector::Sums, Vector::Gradients]), (Accumulated, [Vector::Gradients, Vector::Sums])]
        .map(|(which, vectors)| (which, weighted(module, vectors, Input::Shares, Accumulate.name())))
}

/// The average of the values, which follows `update`; `average_shares` says what each vector counts.
///
/// ```text
/// average    averages ← average_shares[0] averages + average_shares[1] values
/// ```
fn average(module: &mut Module) -> Entry {
    weighted(module, [Vector::Averages, Vector::Values], Input::AverageShares, OptimizerEntry::Average.name())
}

/// Two flat vectors x and y: x becomes what the two numbers of the input `shares` make of both.
fn weighted(module: &mut Module, [x, y]: [Vector; 2], shares: Input, op: &str) -> Entry {
    let [x, y] = [x, y].map(|vector| flat(module, vector));
    let shares = given(module, shares, Extent::Const(2));
    let units = Extent::CeilDiv(Box::new(Extent::Values), module.machine.stretch());
    let (buffers, sizes) = (AddBuffers { x, y, shares }.list(), FlatSizes { count: Extent::Values }.list());
    Entry { launches: vec![module.launch(AddWeighted, buffers, sizes, units, op)], outputs: vec![] }
}

fn flat(module: &mut Module, vector: Vector) -> BufferId {
    module.bind(&format!("flat {vector}"), Element::F32, vec![Extent::Values], Storage::Flat(vector))
}

/// So many numbers that the step is told.
fn given(module: &mut Module, input: Input, count: Extent) -> BufferId {
    module.bind(input.name(), Element::F32, vec![count], Storage::Input(input.name().into()))
}
