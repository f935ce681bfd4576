//! Consistency checks of a manifest, which execution relies on.

use crate::artifact::{Buffer, Element, Extent, Launch, Manifest, Sizes, Storage, Tensor, Workgroup};

/// Checks that every index is in bounds and every buffer has the size of the tensor or vector that it refers to.
///
/// # Errors
///
/// The first inconsistency, as the end of a message.
pub fn validate(manifest: &Manifest) -> Result<(), String> {
    let mut values = 0u64;
    for tensor in &manifest.tensors {
        check_tensor(tensor).map_err(|why| format!("tensor `{}` {why}", tensor.name))?;
        values = values
            .checked_add(tensor.trainable_elements())
            .ok_or("it has more trainable values than 64 bits can count")?;
    }
    for (id, buffer) in manifest.buffers.iter().enumerate() {
        check_buffer(manifest, buffer, values).map_err(|why| format!("buffer {id} {why}"))?;
    }
    for launch in &manifest.prepare {
        check_launch(manifest, launch).map_err(|why| format!("a preparation launch of `{}` {why}", launch.op))?;
        let waits = launch.extents.iter().chain([&launch.units]).any(of_batch);
        let inputs = launch.buffers.iter().any(|&b| {
            let buffer = &manifest.buffers[b];
            matches!(buffer.storage, Storage::Input(_)) || buffer.shape.iter().any(of_batch)
        });
        if waits || inputs {
            return Err(format!("a preparation launch of `{}` depends on a batch", launch.op));
        }
    }
    for (name, entry) in &manifest.entries {
        for launch in &entry.launches {
            check_launch(manifest, launch).map_err(|why| format!("a launch of `{}` in `{name}` {why}", launch.op))?;
        }
        for output in &entry.outputs {
            let at = |why: &str| format!("output `{}` of `{name}` {why}", output.name);
            let buffer = manifest.buffers.get(output.buffer).ok_or_else(|| at("names a buffer that is not there"))?;
            if buffer.element != Element::F32 || matches!(buffer.storage, Storage::Input(_)) {
                return Err(at("is no result in f32"));
            }
        }
    }
    Ok(())
}

fn check_tensor(tensor: &Tensor) -> Result<(), String> {
    let elements = tensor.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    if elements.is_none_or(|n| n > u64::MAX / 8) {
        return Err("has a shape with more elements than 64 bits can count".into());
    }
    let rows = tensor.shape.first().copied().unwrap_or(1);
    match tensor.trainable {
        Some((start, end)) if start > end || end > rows => {
            Err(format!("has {rows} rows, but rows {start}..{end} are to train"))
        }
        _ => Ok(()),
    }
}

fn check_buffer(manifest: &Manifest, buffer: &Buffer, values: u64) -> Result<(), String> {
    let tensor = |index: usize| manifest.tensors.get(index).ok_or(format!("names tensor {index}, which is not there"));
    let sizes = Sizes { values, ..Sizes::default() };
    let found = buffer.elements(&sizes);
    let expected = match &buffer.storage {
        Storage::Tensor { index, rows } => {
            let tensor = tensor(*index)?;
            let all = tensor.shape.first().copied().unwrap_or(1);
            let (start, end) = rows.unwrap_or((0, all));
            if start > end || end > all {
                return Err(format!("names rows {start}..{end} of `{}`, which has {all}", tensor.name));
            }
            if let Some((first, last)) = tensor.trainable
                && !(first <= start && end <= last || end <= first || last <= start)
            {
                return Err(format!("names rows of `{}` of which some train and some do not", tensor.name));
            }
            (end - start) * tensor.shape.iter().skip(1).product::<u64>()
        }
        Storage::Gradient { index } => match tensor(*index)? {
            tensor if tensor.trainable.is_some() => tensor.trainable_elements(),
            tensor => return Err(format!("is the gradient of `{}`, which is frozen", tensor.name)),
        },
        Storage::Flat(_) => values,
        Storage::Prepared | Storage::Temporary | Storage::Input(_) => return Ok(()),
    };
    if buffer.shape.iter().any(of_batch) || found != expected {
        return Err(format!("has {found} values, but what it names has {expected}"));
    }
    if buffer.element != Element::F32 {
        return Err("is not f32 although what it names is".into());
    }
    Ok(())
}

fn check_launch(manifest: &Manifest, launch: &Launch) -> Result<(), String> {
    if launch.kernel >= manifest.kernels.len() {
        return Err(format!("names kernel {} of {}", launch.kernel, manifest.kernels.len()));
    }
    let Workgroup { units, threads } = launch.group;
    let alone = launch.group == Workgroup::ONE;
    if units == 0 || !(1..=1024).contains(&threads) || manifest.gpu().is_some() == alone {
        return Err(format!("has workgroups of {threads} threads that take {units} units"));
    }
    match launch.buffers.iter().find(|b| **b >= manifest.buffers.len()) {
        Some(buffer) => Err(format!("names buffer {buffer} of {}", manifest.buffers.len())),
        None => Ok(()),
    }
}

/// True if the extent depends on the batch.
fn of_batch(extent: &Extent) -> bool {
    mentions(extent, &|e| matches!(e, Extent::Tokens | Extent::Sequences | Extent::Targets | Extent::Pairs))
}

/// True if `found` holds for the extent or a part of it.
pub(crate) fn mentions(extent: &Extent, found: &dyn Fn(&Extent) -> bool) -> bool {
    found(extent)
        || match extent {
            Extent::Add(a, b) | Extent::Mul(a, b) => mentions(a, found) || mentions(b, found),
            Extent::CeilDiv(a, _) => mentions(a, found),
            _ => false,
        }
}
