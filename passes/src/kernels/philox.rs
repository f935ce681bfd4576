//! Random numbers in kernels: a function of key, place and stream, as [`peft_runtime::philox`] has it.

use peft_runtime::philox::{MULTIPLIERS, WEYL, dropout_threshold};

use crate::builder::{Buf, Index, Kernel, Order, Val};

/// Columns that a lane decides over in one call of the generator.
pub const EACH: u64 = 4;

/// And all lanes together.
pub fn drawn(k: &Kernel) -> u64 {
    EACH * k.lane_count()
}

/// The generator's key, `rng`, in every lane.
pub fn key(k: &mut Kernel, rng: Buf) -> [Val; 2] {
    [0, 1].map(|at| {
        let word = k.load_input(rng, at);
        k.splat(word)
    })
}

/// An index in every lane.
pub fn lanes_of(k: &mut Kernel, x: impl Into<Index>) -> Val {
    let x = k.to_i32(x);
    k.splat(x)
}

/// The words for columns from j on, [`drawn`] many, of a row, a vector each, j a multiple of four; `place` is the row,
/// what leads it and the stream.
pub fn draw(k: &mut Kernel, key: [Val; 2], j: Val, place: [Val; 3]) -> [Val; 4] {
    let first = lanes_of(k, j / EACH);
    let lanes = k.lane_numbers();
    let block = k.add(first, lanes);
    let [row, lead, stream] = place;
    let words = philox(k, [block, row, lead, stream], key);
    k.in_order(words)
}

/// The same from any column j on: every lane draws for itself.
pub fn draw_anywhere(k: &mut Kernel, key: [Val; 2], j: Val, place: [Val; 3]) -> [Val; 4] {
    let [row, lead, stream] = place;
    let lanes = k.lane_numbers();
    [0, 1, 2, 3].map(|part| {
        let first = lanes_of(k, j + part * k.lane_count());
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

/// The words for a processor's vector of columns from j on, j a multiple of four, of each of four rows from `row` on.
pub fn draw_rows(k: &mut Kernel, key: [Val; 2], j: Val, [row, lead, stream]: [Val; 3]) -> [Val; 4] {
    let first = lanes_of(k, j / EACH);
    // A block has four neighbouring lanes, one of each row: there a row's words come together.
    let lanes = k.lane_numbers();
    let [two, three] = [2, 3].map(|n| k.int(n, lanes.ty));
    let (beside, below) = (k.shift_right(lanes, two), k.and(lanes, three));
    let (block, row) = (k.add(first, beside), k.add(row, below));
    let words = philox(k, [block, row, lead, stream], key);
    k.turned(words.into()).try_into().expect("four rows")
}

/// The words for one column, of a row each.
pub fn draw_column(k: &mut Kernel, key: [Val; 2], column: u64, place: [Val; 3]) -> Val {
    let [rows, lead, stream] = place;
    let block = k.int((column / 4) as i64, rows.ty);
    philox(k, [block, rows, lead, stream], key)[(column % 4) as usize]
}

/// x / (1 − p) where the word keeps it, else 0.
pub fn dropped(k: &mut Kernel, x: Val, word: Val, p: f64) -> Val {
    let threshold = k.int(i64::from(dropout_threshold(p) as i32), word.ty);
    let kept = k.at_least_unsigned(word, threshold);
    let grown = k.floats(1.0 / (1.0 - p));
    let grown = k.mul(x, grown);
    let zero = k.floats(0.0);
    k.select(kept, grown, zero)
}

/// Philox4x32-10 on a vector of counters, as [`peft_runtime::philox`] has it.
pub fn philox(k: &mut Kernel, mut counter: [Val; 4], mut key: [Val; 2]) -> [Val; 4] {
    let ty = counter[0].ty;
    for _ in 0..10 {
        let [(high0, low0), (high1, low1)] = [0, 1].map(|i| k.wide_product(counter[2 * i], MULTIPLIERS[i]));
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
