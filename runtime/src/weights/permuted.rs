//! Tensors whose rows have another order in the file than in the model.

use peft_grammar::model::RowPermutation;

/// Permutes the rows of a tensor from the file's order to the model's. The error is a message that follows the tensor's
/// name.
pub(super) fn restore(order: &RowPermutation, shape: &[u64], numbers: &mut [f32]) -> Result<(), String> {
    let rows = shape.first().copied().unwrap_or(1);
    let declared = order.rows.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    if declared != Some(rows) {
        return Err(format!("has {rows} rows, and those that are permuted are {:?}", order.rows));
    }
    if numbers.is_empty() {
        return Ok(());
    }
    let width = numbers.len() / rows as usize;
    // Strides of the axes of the file's rows, in rows.
    let mut strides = vec![1; order.rows.len()];
    for axis in (1..strides.len()).rev() {
        strides[axis - 1] = strides[axis] * order.rows[axis] as usize;
    }
    let read = numbers.to_vec();
    for (row, to) in numbers.chunks_exact_mut(width).enumerate() {
        // Index of the row along each axis of the model's order, the innermost first.
        let (mut rest, mut from) = (row, 0);
        for &axis in order.axes.iter().rev() {
            let size = order.rows[axis] as usize;
            from += rest % size * strides[axis];
            rest /= size;
        }
        to.copy_from_slice(&read[from * width..][..width]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_pairs_become_two_halves() {
        let order = |rows: [u64; 3]| RowPermutation { pattern: "*".into(), rows: rows.to_vec(), axes: vec![0, 2, 1] };
        // Two heads of width 6 with one number per row: the file interleaves the pairs (0,3), (1,4), (2,5) of each
        // head.
        let mut numbers = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11].map(|x| x as f32);
        restore(&order([2, 3, 2]), &[12], &mut numbers).unwrap();
        assert_eq!(numbers, std::array::from_fn(|i| i as f32));
        let mut wide = [0, 1, 4, 5, 2, 3, 6, 7].map(|x| x as f32);
        restore(&order([1, 2, 2]), &[4, 2], &mut wide).unwrap();
        assert_eq!(wide, std::array::from_fn(|i| i as f32));
        let why = restore(&order([2, 3, 2]), &[4, 2], &mut wide).unwrap_err();
        assert!(why.contains("has 4 rows") && why.contains("[2, 3, 2]"), "{why}");
    }
}
