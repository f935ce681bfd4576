//! The operations that each launch computes, recorded for people: nothing that runs depends on them.

use std::collections::BTreeMap;
use std::rc::Rc;

use peft_grammar::graph::Location;
use peft_runtime::artifact::Launch;

/// An operation that a launch computes.
#[derive(Clone, Debug)]
pub struct Computed {
    /// Its name in the dialect, without `peft.`, or the label of a launch that copies, packs, rounds or sums for it.
    pub op: &'static str,
    /// Where it comes from.
    pub location: Location,
}

/// A launch, with the operations of the dispatches that it computes. A launch that horizontal fusion has merged belongs
/// to several dispatches.
pub struct Emitted {
    /// The launch, as the artifact stores it.
    pub launch: Launch,
    /// The operations, by dispatch.
    pub computed: Vec<Rc<[Computed]>>,
}

/// By entry, and `prepare` for what is computed once of frozen weights: for each launch the operations of its
/// dispatches.
pub type Listing = BTreeMap<String, Vec<Vec<Rc<[Computed]>>>>;
