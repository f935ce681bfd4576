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
        let (from, _, keys) = bounds(k, pairs, i);
        Span { base: k.eval(lead * lead_size + from + extra * i), length: k.eval(keys + extra) }
    }
}

/// Where part `i` of a ragged axis begins, where it ends, and how long it is.
pub fn bounds(k: &mut Kernel, offsets: Buf, i: Val) -> (Val, Val, Val) {
    let next = k.eval(i + 1);
    let (from, to) = (k.load_index(offsets, i), k.load_index(offsets, next));
    (from, to, k.sub(to, from))
}
