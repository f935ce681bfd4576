//! Rows along the last axis, dense or ragged: where row `r` begins and how long it is.

use crate::abi::arguments;
use crate::builder::{Buf, Kernel, Val};

arguments! {
    /// How the rows of a tensor lie.
    RowSizes {
        /// Of ragged rows: how many tokens there are.
        length,
        /// Columns in front of a ragged row's keys.
        extra,
        /// Elements of all of a head's ragged rows.
        lead,
    }
}

/// One row: its first element, and how many there are.
#[derive(Clone, Copy)]
pub struct Span {
    pub base: Val,
    pub length: Val,
}

impl Span {
    /// `pairs` are the places of rows that are ragged.
    pub fn of(k: &mut Kernel, row: Val, sizes: &[Val], pairs: Option<Buf>) -> Span {
        let RowSizes { length, extra, lead: lead_size } = RowSizes::of(sizes);
        let Some(pairs) = pairs else {
            return Span { base: k.mul(row, length), length };
        };
        let tokens = length;
        let (lead, i) = (k.div(row, tokens), k.rem(row, tokens));
        let one = k.index(1);
        let next = k.add(i, one);
        let (from, to) = (k.load_index(pairs, i), k.load_index(pairs, next));
        let lead = k.mul(lead, lead_size);
        let extras = k.mul(extra, i);
        let base = k.add(lead, from);
        let base = k.add(base, extras);
        let keys = k.sub(to, from);
        Span { base, length: k.add(keys, extra) }
    }
}
