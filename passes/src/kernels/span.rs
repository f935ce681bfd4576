//! Rows along the last axis of a tensor, dense or ragged: the index of a row's first element, and the row's length.

use crate::abi::arguments;
use crate::builder::{Buf, Kernel, Val};

arguments! {
    /// The layout of a tensor's rows.
    RowSizes {
        /// The length of a dense row; for ragged rows, the number of tokens, each of which has a row.
        length,
        /// The number of columns in front of the keys of a ragged row.
        extra,
        /// The number of elements of all ragged rows of one head.
        lead,
    }
}

/// One row.
#[derive(Clone, Copy)]
pub struct Span {
    /// The index of its first element.
    pub base: Val,
    /// The number of its elements.
    pub length: Val,
}

impl Span {
    /// The span of a row. `pairs` holds the offsets of the rows if they are ragged.
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

/// The start, the end and the length of part `i` of a ragged axis.
pub fn bounds(k: &mut Kernel, offsets: Buf, i: Val) -> (Val, Val, Val) {
    let next = k.eval(i + 1);
    let (from, to) = (k.load_index(offsets, i), k.load_index(offsets, next));
    (from, to, k.sub(to, from))
}
