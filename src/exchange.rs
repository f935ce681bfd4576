//! Tensors of other frameworks: padded batches in, packed ones here, and back.
//!
//! A file holds `weights.NAME`, and `inputs.ids [B,n]` with `inputs.types`, `inputs.mask [B,n]` or
//! `inputs.lengths [B]`, `inputs.labels` (`[B,n]` aligned with the ids and −100 where nothing is asked, or
//! `[B]` classes). Results go out padded the same way.

use std::path::Path;

use peft_grammar::model::{Model, TaskKind};
use peft_runtime::adapter::{Data, Stored, TensorFile};
use peft_runtime::{Inputs, Numbers, RuntimeError, Session};

use crate::data::Batch;

/// A padded batch's form, and its packed content.
#[derive(Clone, Debug)]
pub struct Padded {
    pub sequences: usize,
    /// Tokens of a row, padding included.
    pub width: usize,
    pub batch: Batch,
}

/// Reads the batch under `prefix`, such as `inputs.`.
pub fn batch(file: &TensorFile, prefix: &str, path: &Path) -> Result<Padded, RuntimeError> {
    let wrong = |name: &str, message: &str| RuntimeError::file(path, format!("`{prefix}{name}` {message}"));
    let get = |name: &str| file.tensors.get(&format!("{prefix}{name}"));
    let ints = |name: &str| match get(name) {
        None => Ok(None),
        Some(Stored { shape, data: Data::I64(x) }) => {
            let fits = x.iter().map(|&x| i32::try_from(x).map_err(|_| wrong(name, &format!("holds {x}: too large"))));
            Ok(Some((shape.clone(), fits.collect::<Result<Vec<i32>, _>>()?)))
        }
        Some(_) => Err(wrong(name, "should hold integers")),
    };
    let (shape, ids) = ints("ids")?.ok_or_else(|| wrong("ids", "is missing"))?;
    let [sequences, width] = shape[..] else { return Err(wrong("ids", "should have two axes, sequences and tokens")) };
    let (sequences, width) = (sequences as usize, width as usize);
    let fits = |name: &str, found: Option<(Vec<u64>, Vec<i32>)>| match found {
        Some((own, _)) if own != shape => Err(wrong(name, &format!("is {own:?}, the ids are {shape:?}"))),
        found => Ok(found.map(|(_, x)| x)),
    };
    let types = fits("types", ints("types")?)?;
    let mask = fits("mask", ints("mask")?)?;
    let lengths: Vec<usize> = match (ints("lengths")?, mask) {
        (Some((_, lengths)), _) => lengths.iter().map(|&n| n.max(0) as usize).collect(),
        (None, Some(mask)) => mask.chunks(width.max(1)).map(|row| row.iter().filter(|&&m| m != 0).count()).collect(),
        (None, None) => vec![width; sequences],
    };
    if lengths.len() != sequences || lengths.iter().any(|&n| n == 0 || n > width) {
        return Err(wrong("lengths", &format!("should be {sequences} numbers from 1 to {width}")));
    }
    let labels = ints("labels")?.ok_or_else(|| wrong("labels", "is missing"))?;
    if labels.0 != shape && labels.0 != shape[..1] {
        return Err(wrong("labels", &format!("is {:?}, should be {shape:?} or {:?}", labels.0, &shape[..1])));
    }
    let mut batch = Batch::default();
    for (s, &length) in lengths.iter().enumerate() {
        let start = batch.ids.len() as i32;
        batch.starts.push(start);
        batch.lengths.push(length as i32);
        for i in 0..length {
            batch.ids.push(ids[s * width + i]);
            batch.types.push(types.as_ref().map_or(0, |t| t[s * width + i]));
            batch.positions.push(i as i32);
            // Position i predicts the label of i + 1.
            if labels.0.len() == 2 && i + 1 < length {
                let label = labels.1[s * width + i + 1];
                if label >= 0 {
                    batch.targets.push(start + i as i32);
                    batch.labels.push(label);
                }
            }
        }
        if labels.0.len() == 1 {
            batch.labels.push(labels.1[s]);
        }
    }
    Ok(Padded { sequences, width, batch })
}

/// The weights a file holds under `weights.`, in the order of the model's parameters.
pub fn weights(file: &TensorFile, model: &Model, path: &Path) -> Result<Vec<Numbers>, RuntimeError> {
    let one = |p: &peft_grammar::model::Param| match file.tensors.get(&format!("weights.{}", p.name)) {
        Some(Stored { shape, data: Data::F32(x) }) if *shape == p.shape => Ok(Numbers::from(&x[..])),
        Some(stored) => {
            let message = format!("`weights.{}` is {:?}, the spec wants f32 {:?}", p.name, stored.shape, p.shape);
            Err(RuntimeError::weights(path, message))
        }
        None => Err(RuntimeError::weights(path, format!("`weights.{}` is missing", p.name))),
    };
    model.params.iter().map(one).collect()
}

impl Padded {
    pub fn inputs(&self, rng: [i32; 2]) -> Inputs {
        inputs(&self.batch, rng)
    }

    /// The same sequences with every token a target, so that all logits are computed.
    pub fn everywhere(&self, rng: [i32; 2]) -> Inputs {
        let targets = (0..self.batch.tokens() as i32).collect();
        let labels = vec![0; self.batch.tokens()];
        inputs(&Batch { targets, labels, ..self.batch.clone() }, rng)
    }

    /// `[tokens, d]` to `[B, n, d]`, zeros where there is padding.
    pub fn pad_tokens(&self, x: &[f32], d: usize) -> Stored {
        let mut out = vec![0.0; self.sequences * self.width * d];
        self.each_token(|t, s, i| out[(s * self.width + i) * d..][..d].copy_from_slice(&x[t * d..][..d]));
        Stored::f32(vec![self.sequences as u64, self.width as u64, d as u64], out)
    }

    /// `[H, tokens]` to `[B, H, n]`.
    pub fn pad_heads(&self, x: &[f32]) -> Stored {
        let tokens = self.batch.tokens();
        let heads = x.len() / tokens;
        let mut out = vec![0.0; self.sequences * heads * self.width];
        for h in 0..heads {
            self.each_token(|t, s, i| out[(s * heads + h) * self.width + i] = x[h * tokens + t]);
        }
        Stored::f32(vec![self.sequences as u64, heads as u64, self.width as u64], out)
    }

    fn each_token(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let mut token = 0;
        for (s, &length) in self.batch.lengths.iter().enumerate() {
            for i in 0..length as usize {
                visit(token, s, i);
                token += 1;
            }
        }
    }
}

/// A batch as a session takes it. `rng`: the seed and the step.
pub fn inputs(batch: &Batch, rng: [i32; 2]) -> Inputs {
    let ints = [
        ("ids", batch.ids.clone()),
        ("types", batch.types.clone()),
        ("positions", batch.positions.clone()),
        ("starts", batch.starts.clone()),
        ("targets", batch.targets.clone()),
        ("labels", batch.labels.clone()),
        ("rng", rng.to_vec()),
    ];
    let ints = ints.map(|(name, x)| (name.to_string(), x)).into_iter().collect();
    Inputs { lengths: batch.lengths.clone(), ints, ..Inputs::default() }
}

/// Runs `forward` or `grad` and lays the results out as the file's batch was.
pub fn run(
    session: &mut Session,
    model: &Model,
    entry: &str,
    padded: &Padded,
    rng: [i32; 2],
) -> Result<TensorFile, RuntimeError> {
    let mut results = TensorFile::default();
    let mut put = |name: &str, stored: Stored| drop(results.tensors.insert(name.into(), stored));
    let generates = matches!(model.task.kind, TaskKind::Generation { .. });
    if generates {
        // Training computes logits only where there is a label; here all are wanted.
        session.run(entry, &padded.everywhere(rng))?;
        let (shape, logits) = session.output("logits").ok_or_else(|| RuntimeError::input("logits", "is no output"))?;
        put("logits", padded.pad_tokens(&logits, shape[1] as usize));
    }
    session.run(entry, &padded.inputs(rng))?;
    let names = session.outputs();
    for name in &names {
        let Some((shape, x)) = session.output(name) else { continue };
        match name.as_str() {
            "loss" => put("loss", Stored::f32(vec![1], x.to_vec())),
            "logits" if generates => {}
            _ if name.starts_with("grad.") => {}
            _ if name.starts_with("lambda.") => put(name, padded.pad_heads(&x)),
            _ => put(name, Stored::f32(shape, x.to_vec())),
        }
    }
    if entry == "grad" {
        for (index, param) in model.params.iter().enumerate() {
            let tensor = &session.manifest().tensors[index];
            let Some((start, _)) = tensor.trainable else { continue };
            let label = names.iter().find(|n| {
                n.strip_prefix("grad.")
                    .is_some_and(|n| n == param.name || n.strip_prefix(&param.name).is_some_and(|r| r.starts_with('[')))
            });
            let Some((_, x)) = label.and_then(|l| session.output(l)) else { continue };
            // Frozen rows of a table have a gradient of 0.
            let mut full = vec![0.0; param.elements() as usize];
            let from = (start * tensor.row()) as usize;
            full[from..from + x.len()].copy_from_slice(&x);
            put(&format!("grad.{}", param.name), Stored::f32(param.shape.clone(), full));
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_do_not_fit() {
        let ints = |shape: &[u64], x: &[i64]| Stored { shape: shape.to_vec(), data: Data::I64(x.to_vec()) };
        let read = |labels: Stored| {
            let mut file = TensorFile::default();
            file.tensors.extend([("ids".into(), ints(&[2, 1], &[7, 8])), ("labels".into(), labels)]);
            batch(&file, "", Path::new("file")).map(|padded| padded.batch.labels).map_err(|e| e.to_string())
        };
        assert_eq!(read(ints(&[2, 1], &[-100, -100])), Ok(vec![]));
        assert_eq!(read(ints(&[2], &[1, 0])), Ok(vec![1, 0]));
        for (labels, words) in [
            (ints(&[2], &[0, 1 << 32]), "`labels` holds 4294967296: too large"),
            (ints(&[1], &[0]), "`labels` is [1], should be [2, 1] or [2]"),
        ] {
            let message = read(labels).expect_err("refused");
            assert!(message.contains("file") && message.contains(words), "{message}");
        }
    }
}
