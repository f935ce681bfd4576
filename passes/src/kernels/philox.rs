//! Random numbers in kernels: Philox4x32-10 (Salmon et al. 2011), a counter-based generator, so that a random word is a
//! function of the key, the position and the stream. [`peft_runtime::philox`] computes the same numbers.

use peft_runtime::philox::{MULTIPLIERS, WEYL, dropout_threshold};

use crate::builder::{Buf, Index, Kernel, Order, Val};

/// Columns that one lane decides over in one call of the generator.
pub const COLUMNS_PER_CALL: u64 = 4;

/// Columns that all lanes together decide over in one call.
pub fn columns_per_call(k: &Kernel) -> u64 {
    COLUMNS_PER_CALL * k.lane_count()
}

/// Loads the generator's key `rng`, in every lane.
pub fn key(k: &mut Kernel, rng: Buf) -> [Val; 2] {
    [0, 1].map(|at| {
        let word = k.load_input(rng, at);
        k.splat(word)
    })
}

/// An index as an i32 in every lane.
pub fn splat_index(k: &mut Kernel, x: impl Into<Index>) -> Val {
    let x = k.to_i32(x);
    k.splat(x)
}

/// The random words for the [`columns_per_call`] columns from `j` on, a multiple of four, as vectors in the order of
/// the columns. `place` is the row, the index of what leads it, and the stream.
pub fn draw(k: &mut Kernel, key: [Val; 2], j: Val, place: [Val; 3]) -> [Val; 4] {
    let first = splat_index(k, j / COLUMNS_PER_CALL);
    let lanes = k.lane_numbers();
    let block = k.add(first, lanes);
    let [row, lead, stream] = place;
    let words = philox(k, [block, row, lead, stream], key);
    k.interleave_words(words)
}

/// The same from any column `j` on; each lane computes the words of its own columns.
pub fn draw_unaligned(k: &mut Kernel, key: [Val; 2], j: Val, place: [Val; 3]) -> [Val; 4] {
    let [row, lead, stream] = place;
    let lanes = k.lane_numbers();
    [0, 1, 2, 3].map(|part| {
        let first = splat_index(k, j + part * k.lane_count());
        let column = k.add(first, lanes);
        let [two, three] = [2, 3].map(|n| k.int(n, column.ty));
        let block = k.shift_right(column, two);
        let at = k.and(column, three);
        let words = philox(k, [block, row, lead, stream], key);
        (1..4).fold(words[0], |word, other| {
            let number = k.int(other, at.ty);
            let here = k.compare(at, Order::Eq, number);
            k.select(here, words[other as usize], word)
        })
    })
}

/// The random words for a vector of columns on a CPU, from `j` on, a multiple of four, for each of four rows from `row`
/// on.
pub fn draw_rows(k: &mut Kernel, key: [Val; 2], j: Val, [row, lead, stream]: [Val; 3]) -> [Val; 4] {
    let first = splat_index(k, j / COLUMNS_PER_CALL);
    // A group of four neighbouring lanes has one lane for each row, and draws the words of four columns: their
    // transpose gives each row its words.
    let lanes = k.lane_numbers();
    let [two, three] = [2, 3].map(|n| k.int(n, lanes.ty));
    let (block_offset, row_offset) = (k.shift_right(lanes, two), k.and(lanes, three));
    let (block, row) = (k.add(first, block_offset), k.add(row, row_offset));
    let words = philox(k, [block, row, lead, stream], key);
    k.transpose(words.into()).try_into().expect("four rows")
}

/// The random words for one column, for a vector of rows.
pub fn draw_column(k: &mut Kernel, key: [Val; 2], column: u64, place: [Val; 3]) -> Val {
    let [rows, lead, stream] = place;
    let block = k.int((column / 4) as i64, rows.ty);
    philox(k, [block, rows, lead, stream], key)[(column % 4) as usize]
}

/// Applies dropout: x / (1 − p) if the random word keeps it, else 0.
pub fn dropout(k: &mut Kernel, x: Val, word: Val, p: f64) -> Val {
    let threshold = k.int(i64::from(dropout_threshold(p) as i32), word.ty);
    let kept = k.at_least_unsigned(word, threshold);
    let grown = k.floats(1.0 / (1.0 - p));
    let grown = k.mul(x, grown);
    let zero = k.floats(0.0);
    k.select(kept, grown, zero)
}

/// Philox4x32-10 on vectors of counters.
pub fn philox(k: &mut Kernel, mut counter: [Val; 4], mut key: [Val; 2]) -> [Val; 4] {
    let ty = counter[0].ty;
    for _ in 0..10 {
        let [(high0, low0), (high1, low1)] = [0, 1].map(|i| k.mul_wide(counter[2 * i], MULTIPLIERS[i]));
        let first = k.xor(high1, counter[1]);
        let first = k.xor(first, key[0]);
        let third = k.xor(high0, counter[3]);
        let third = k.xor(third, key[1]);
        counter = [first, low1, third, low0];
        key = [0, 1].map(|i| {
            let step = k.int(i64::from(WEYL[i] as i32), ty);
            k.add(key[i], step)
        });
    }
    counter
}
