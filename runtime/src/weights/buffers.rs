//! Buffers of a checkpoint: constant tensors that the model's equations imply. A file with other values belongs to
//! another model.

use peft_grammar::model::Buffer;

use crate::error::RuntimeError;
use crate::source::TensorSource;

/// How a buffer's values differ from those that the backbone computes, as a message; `None` if they agree.
pub(super) fn difference(buffer: &Buffer, name: &str, file: &dyn TensorSource) -> Result<Option<String>, RuntimeError> {
    let shape = file.shape(name).unwrap_or_default().to_vec();
    let last = shape.last().copied().unwrap_or(1);
    let elements: u64 = shape.iter().product();
    let fits = match buffer {
        Buffer::CausalMask => last.checked_mul(last) == Some(elements) && shape.len() >= 2,
        Buffer::Positions => last == elements,
        Buffer::Frequencies { width, .. } => 2 * elements == *width,
        Buffer::Numbers(_) => true,
    };
    if !fits {
        return Ok(Some(format!("`{name}` is {shape:?}, not {}", what(buffer))));
    }
    // Frequencies are powers that were computed in f32, with a few more roundings than the one to the element type.
    let rounding = match buffer {
        Buffer::Frequencies { .. } => file.rounding(name).max(f64::powi(2.0, -18)),
        _ => file.rounding(name),
    };
    let numbers = file.numbers(name)?;
    // The smallest step of f16 is 2⁻²⁴.
    let near = |x: f64, wanted: f64| (x - wanted).abs() <= 2.0 * rounding * wanted.abs() + f64::powi(2.0, -24);
    for (i, &x) in numbers.iter().enumerate() {
        let (row, column) = (i as u64 / last, i as u64 % last);
        let wanted = match buffer {
            Buffer::CausalMask => f64::from(column <= row),
            Buffer::Positions => i as f64,
            Buffer::Frequencies { theta, width } => theta.powf(-2.0 * i as f64 / *width as f64),
            Buffer::Numbers(all) => match all.iter().find(|wanted| near(x, **wanted)).or(all.first()) {
                Some(wanted) => *wanted,
                None => continue,
            },
        };
        if !near(x, wanted) {
            let at = if shape.len() >= 2 { format!("[{row}, {column}]") } else { format!("[{i}]") };
            return Ok(Some(format!("`{name}` is {x} at {at}, {wanted} in {}", what(buffer))));
        }
    }
    Ok(None)
}

fn what(buffer: &Buffer) -> String {
    match buffer {
        Buffer::CausalMask => "a causal mask".into(),
        Buffer::Positions => "a row of positions".into(),
        Buffer::Frequencies { theta, width } => {
            format!("a list of {} frequencies of rotary positions, base {theta}", width / 2)
        }
        Buffer::Numbers(_) => "what the backbone computes".into(),
    }
}
