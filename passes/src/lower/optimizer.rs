//! The optimizer's step over flat vectors of all trainable values: the norm of the gradient, then
//! clipping and the optimizer's equations in one sweep. They stand in [`crate::interpret::optimizer`].

use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Output, Storage};

use super::module::Module;
use crate::kernels::optimizer::{
    AddBuffers, AddWeighted, FlatSizes, RootOfSum, SumBuffers, SumOfSquares, Sweep, ToldBuffers,
};

/// Partial sums that a GPU's warp reads at once.
const AHEAD: u64 = 8;

/// One step; gives `grad_norm`, the norm before clipping. With `own_rates` each value's rate is its factor times that of
/// the step.
pub fn update(module: &mut Module, own_rates: bool) -> Entry {
    let optimizer = module.optimizer;
    let mut flat = |name: &str| {
        module.bind(&format!("flat {name}"), Element::F32, vec![Extent::Values], Storage::Flat(name.into()))
    };
    let names = ["values", "gradients"].iter().chain(optimizer.moments()).chain(&["decay"]);
    let names = names.chain(own_rates.then_some(&"lr_factors"));
    let mut swept: Vec<BufferId> = names.map(|name| flat(name)).collect();
    let gradients = swept[1];
    let count = Extent::Const(optimizer.hyper().len() as u64);
    let hyper = module.bind("hyper", Element::F32, vec![count], Storage::Input("hyper".into()));
    let blocks = Extent::CeilDiv(Box::new(Extent::Values), module.machine.stretch());
    let partial = module.buffer(Element::F32, vec![blocks.clone()], Storage::Temporary);
    let norm = module.buffer(Element::F32, vec![], Storage::Temporary);
    swept.extend(ToldBuffers { hyper, norm }.list());
    let count = FlatSizes { count: Extent::Values }.list();
    // Partial sums that a member of the team reads at once.
    let ahead = if module.machine.team() > 1 { AHEAD } else { 1 };
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
    Entry { launches, outputs: vec![Output { name: "grad_norm".into(), buffer: norm, shape: vec![] }] }
}

/// Gradients of batches that are one step. Every batch but the last is followed by `accumulate`, and the last one by
/// `accumulated`; `shares` says what each vector counts.
///
/// ```text
/// accumulate    sums      ← shares[0] sums + shares[1] gradients
/// accumulated   gradients ← shares[0] gradients + shares[1] sums
/// ```
pub fn accumulation(module: &mut Module) -> [(&'static str, Entry); 2] {
    [("accumulate", ["sums", "gradients"]), ("accumulated", ["gradients", "sums"])]
        .map(|(name, vectors)| (name, weighted(module, vectors, "shares", "accumulate")))
}

/// The average of the values, which follows `update`; `average_shares` says what each vector counts.
///
/// ```text
/// average    averages ← average_shares[0] averages + average_shares[1] values
/// ```
pub fn average(module: &mut Module) -> Entry {
    weighted(module, ["averages", "values"], "average_shares", "average")
}

/// Two flat vectors x and y: x becomes what the two numbers of the input `shares` make of both.
fn weighted(module: &mut Module, [x, y]: [&str; 2], shares: &str, op: &str) -> Entry {
    let mut flat = |name: &str| {
        module.bind(&format!("flat {name}"), Element::F32, vec![Extent::Values], Storage::Flat(name.into()))
    };
    let [x, y] = [x, y].map(&mut flat);
    let shares = module.bind(shares, Element::F32, vec![Extent::Const(2)], Storage::Input(shares.into()));
    let units = Extent::CeilDiv(Box::new(Extent::Values), module.machine.stretch());
    let (buffers, sizes) = (AddBuffers { x, y, shares }.list(), FlatSizes { count: Extent::Values }.list());
    Entry { launches: vec![module.launch(AddWeighted, buffers, sizes, units, op)], outputs: vec![] }
}
