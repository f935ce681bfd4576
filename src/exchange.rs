//! Exchanges batches with other frameworks: reads padded batches from a file, packs them, runs a model, and pads the
//! results.
//!
//! A file holds the weights as `weights.NAME`, and a batch of B sequences padded to n tokens:
//!
//! | tensor | shape | values |
//! | --- | --- | --- |
//! | `inputs.ids` | `[B,n]` | token ids |
//! | `inputs.types` | `[B,n]` | token types, optional |
//! | `inputs.mask` | `[B,n]` | 1 for a token, 0 for padding, optional |
//! | `inputs.lengths` | `[B]` | tokens of each row, in place of the mask |
//! | `inputs.labels` | `[B,n]` | for generation and token classification; −100 for a token without a label |
//! | `inputs.labels` | `[B]` | for sequence classification |
//! | `inputs.labels` | `[B]` or `[B,1]` | for regression, floats |
//!
//! Masked tokens are not computed, wherever they are in a row. The position of a token is its column, masked columns
//! included, as in transformers without explicit positions; in a model whose positions skip an id, it is the number of
//! earlier tokens with other ids. Two cases that would need the result of a masked token are refused: a model that
//! reads the first token of a row whose first column is masked, and a label that a masked token would have to predict.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Model, TaskKind};
use peft_grammar::names::{Entry, Input, LOGITS, LOSS, Output};
use peft_runtime::adapter::{Data, Stored, TensorFile};
use peft_runtime::artifact::{Manifest, Storage};
use peft_runtime::{Inputs, Numbers, OutOfRange, RuntimeError, Session};

use crate::data::Batch;

/// The names of a batch's tensors.
const INPUTS: [&str; 5] = ["ids", "types", "mask", "lengths", "labels"];

/// Names that other programs use for a batch's tensors.
const ALIASES: [(&str, &str); 4] =
    [("input_ids", "ids"), ("token_type_ids", "types"), ("attention_mask", "mask"), ("label", "labels")];

/// The name in [`INPUTS`] that `name` or its alias stands for.
fn input(name: &str) -> Option<&'static str> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, known)| *known);
    INPUTS.into_iter().find(|known| *known == name).or(alias)
}

/// The label of a token or a sequence that is ignored by the loss, as in PyTorch.
const IGNORED_LABEL: i32 = -100;

/// A batch that was read from a padded file: its packed content, and the layout of the padding.
#[derive(Clone, Debug)]
pub struct Padded {
    /// The number of rows B.
    pub sequences: usize,
    /// The number of columns n, padding included.
    pub width: usize,
    /// The packed batch, without masked tokens.
    pub batch: Batch,
    asks: Asks,
    /// The column of each packed token in the file.
    columns: Vec<usize>,
    labels: Labels,
    /// The file that the batch was read from, for messages.
    path: PathBuf,
    /// The prefix of the batch's tensors, such as `inputs.`.
    prefix: String,
}

/// What the task predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// The next token of each token.
    Next,
    /// The class of each token.
    Tags,
    /// The class of each sequence.
    Class,
    /// A number for each sequence.
    Number,
}

impl Asks {
    fn of(kind: &TaskKind) -> Self {
        match kind {
            TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. } => Asks::Next,
            TaskKind::TokenClassification { .. } => Asks::Tags,
            TaskKind::Classification { .. } => Asks::Class,
            TaskKind::Regression { .. } => Asks::Number,
        }
    }

    /// Whether there are logits for each token, and not for each sequence.
    fn of_tokens(self) -> bool {
        matches!(self, Asks::Next | Asks::Tags)
    }
}

/// Which labels a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Labels {
    /// There is no tensor of labels.
    None,
    /// All labels are [`IGNORED_LABEL`].
    OfNothing,
    /// The only labels that are not ignored are in the first column, where no earlier token can predict them.
    OfFirst,
    /// There are labels to compute a loss of.
    Some,
}

/// A tensor's shape and its integers.
type Shaped = (Vec<u64>, Vec<i32>);

/// Reads the tensors of a batch, whose names begin with `prefix`.
struct Reader<'a> {
    file: &'a TensorFile,
    prefix: &'a str,
    path: &'a Path,
}

impl Reader<'_> {
    /// An error about the tensor `name`.
    fn wrong(&self, name: &str, message: impl std::fmt::Display) -> RuntimeError {
        RuntimeError::file(self.path, format!("`{}{name}` {message}", self.prefix))
    }

    /// The shape and the integers of the tensor `name`; `None` if there is no such tensor.
    fn ints(&self, name: &str) -> Result<Option<Shaped>, RuntimeError> {
        let Some(stored) = self.file.tensors.get(&format!("{}{name}", self.prefix)) else { return Ok(None) };
        let Data::I64(x) = &stored.data else { return Err(self.wrong(name, "should hold integers")) };
        let large = |x: &i64| self.wrong(name, format!("holds {x}: too large"));
        let ints = x.iter().map(|x| i32::try_from(*x).map_err(|_| large(x)));
        Ok(Some((stored.shape.clone(), ints.collect::<Result<_, _>>()?)))
    }

    /// The integers of the tensor `name`, which must have this shape; `None` if there is no such tensor.
    fn shaped(&self, name: &str, shape: &[u64]) -> Result<Option<Vec<i32>>, RuntimeError> {
        match self.ints(name)? {
            Some((found, _)) if found != shape => {
                Err(self.wrong(name, format!("is {found:?}, and for these ids it should be {shape:?}")))
            }
            found => Ok(found.map(|(_, x)| x)),
        }
    }

    /// Refuses tensors that are probably part of the batch and would be ignored.
    fn refuse_unknown(&self) -> Result<(), RuntimeError> {
        let prefix = self.prefix;
        // The name of a batch's tensor without the prefix, or with a prefix in another spelling.
        let meant = |name: &String| {
            let lower = name.to_lowercase();
            let bare = ["inputs.", "input."].iter().find_map(|start| lower.strip_prefix(start)).unwrap_or(&lower);
            (!name.starts_with(prefix)).then(|| input(bare).map(|known| (name.clone(), known)))?
        };
        if let Some((name, known)) = self.file.tensors.keys().find_map(meant) {
            let message = format!("`{name}` would be ignored; call it `{prefix}{known}`");
            return Err(RuntimeError::file(self.path, message));
        }
        let names = self.file.tensors.keys().filter_map(|name| name.strip_prefix(self.prefix));
        // A file may hold other tensors and other batches, so only names directly under the prefix are checked.
        let unknown = names.filter(|name| !self.prefix.is_empty() && !INPUTS.contains(name) && !name.contains('.'));
        match unknown.min() {
            None => Ok(()),
            Some(name) => {
                let known = INPUTS.map(|name| format!("`{prefix}{name}`")).join(", ");
                let alias = input(name).map(|name| format!("; call it `{prefix}{name}`")).unwrap_or_default();
                Err(self.wrong(name, format!("is not a tensor of a batch{alias}: {known} are read")))
            }
        }
    }

    /// The floats of the tensor `name`, one for each row; `None` if there is no such tensor.
    fn floats(&self, name: &str, rows: usize) -> Result<Option<Vec<f32>>, RuntimeError> {
        let Some(stored) = self.file.tensors.get(&format!("{}{name}", self.prefix)) else { return Ok(None) };
        let found = match &stored.data {
            Data::F32(x) => x.clone(),
            Data::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Data::I64(x) => x.iter().map(|&x| x as f32).collect(),
        };
        if ![&[rows as u64][..], &[rows as u64, 1]].contains(&&stored.shape[..]) {
            return Err(self.wrong(name, format!("is {:?}, and for these ids it should be [{rows}]", stored.shape)));
        }
        match found.iter().position(|x| !x.is_finite()) {
            Some(row) => Err(self.wrong(name, format!("is {} in row {row}", found[row]))),
            None => Ok(Some(found)),
        }
    }

    /// The columns of each row that are not masked.
    fn kept(&self, sequences: usize, width: usize) -> Result<Vec<Vec<usize>>, RuntimeError> {
        let shape = [sequences as u64, width as u64];
        let mask = self.shaped("mask", &shape)?;
        let lengths = self.shaped("lengths", &shape[..1])?;
        if let Some((at, odd)) = mask.iter().flatten().enumerate().find(|(_, m)| !matches!(m, 0 | 1)) {
            let (row, column) = (at / width, at % width);
            return Err(
                self.wrong("mask", format!("is {odd} in row {row}, column {column}; it is 1 for a token, else 0"))
            );
        }
        if let Some((row, n)) = lengths.iter().flatten().enumerate().find(|(_, n)| !(1..=width as i32).contains(*n)) {
            return Err(self.wrong("lengths", format!("is {n} in row {row}; it should be a number from 1 to {width}")));
        }
        let mut rows = vec![];
        for row in 0..sequences {
            let masked = |column: &usize| mask.as_ref().is_none_or(|mask| mask[row * width + column] == 1);
            let kept: Vec<usize> = (0..width).filter(masked).collect();
            let Some(lengths) = &lengths else {
                if kept.is_empty() {
                    return Err(self.wrong("mask", format!("leaves no token of row {row}; leave the row out")));
                }
                rows.push(kept);
                continue;
            };
            let counted: Vec<usize> = (0..lengths[row] as usize).collect();
            if mask.is_some() && kept != counted {
                let message = format!("and `{}lengths` do not agree on row {row}; give one of them", self.prefix);
                return Err(self.wrong("mask", message));
            }
            rows.push(counted);
        }
        Ok(rows)
    }
}

/// Reads the batch whose tensors begin with `prefix`, such as `inputs.`. `path` is the file's, for messages.
///
/// # Errors
///
/// A tensor is missing, has the wrong shape or type, or holds a value that cannot be used.
pub fn batch(file: &TensorFile, prefix: &str, path: &Path, model: &Model) -> Result<Padded, RuntimeError> {
    let reader = Reader { file, prefix, path };
    let wrong = |name: &str, message: &str| reader.wrong(name, message);
    reader.refuse_unknown()?;
    let (shape, ids) = reader.ints("ids")?.ok_or_else(|| wrong("ids", "is missing"))?;
    let [sequences, width] = shape[..] else { return Err(wrong("ids", "should have two axes, sequences and tokens")) };
    if sequences == 0 || width == 0 {
        return Err(wrong("ids", &format!("is {shape:?}: there is no token in it")));
    }
    let (sequences, width) = (sequences as usize, width as usize);
    let types = reader.shaped("types", &shape)?;
    let rows = reader.kept(sequences, width)?;
    let asks = Asks::of(&model.task.kind);
    let (mut labels, mut numbers) = (None, None);
    match asks {
        Asks::Number => numbers = reader.floats("labels", sequences)?,
        Asks::Class => labels = reader.shaped("labels", &shape[..1])?,
        Asks::Next | Asks::Tags => labels = reader.shaped("labels", &shape)?,
    }
    if let Some((at, odd)) = labels.iter().flatten().enumerate().find(|&(_, &x)| x < 0 && x != IGNORED_LABEL) {
        let place =
            if asks.of_tokens() { format!("row {}, column {}", at / width, at % width) } else { format!("row {at}") };
        return Err(wrong("labels", &format!("is {odd} in {place}; an ignored label is {IGNORED_LABEL}")));
    }
    let (mut batch, mut columns) = (Batch::default(), vec![]);
    let labelled = match &labels {
        None if numbers.is_some() => Labels::Some,
        None => Labels::None,
        Some(all) if all.iter().all(|&label| label == IGNORED_LABEL) => Labels::OfNothing,
        Some(all) if asks == Asks::Next && (0..all.len()).all(|at| at % width == 0 || all[at] == IGNORED_LABEL) => {
            Labels::OfFirst
        }
        Some(_) => Labels::Some,
    };
    for (row, kept) in rows.iter().enumerate() {
        let at = |column: usize| row * width + column;
        let skips =
            |column: usize| model.backbone.position_skip_id.is_some_and(|id| i64::from(ids[at(column)]) == id as i64);
        let start = batch.ids.len() as i32;
        batch.starts.push(start);
        batch.lengths.push(kept.len() as i32);
        columns.extend(kept);
        batch.ids.extend(kept.iter().map(|&column| ids[at(column)]));
        batch.types.extend(kept.iter().map(|&column| types.as_ref().map_or(0, |types| types[at(column)])));
        let counted = (0..width).scan(0, |next, column| {
            let position = *next;
            *next += i32::from(!skips(column));
            Some(position)
        });
        let counted: Vec<i32> = counted.collect();
        batch.positions.extend(kept.iter().map(|&column| counted[column]));
        let Some(labels) = labels.as_ref().filter(|_| asks.of_tokens()) else { continue };
        if asks == Asks::Tags {
            for column in (0..width).filter(|&column| labels[at(column)] != IGNORED_LABEL) {
                let Ok(token) = kept.binary_search(&column) else {
                    let message = format!(
                        "is {} in row {row}, column {column}, which is masked; set it to {IGNORED_LABEL}",
                        labels[at(column)]
                    );
                    return Err(wrong("labels", &message));
                };
                batch.targets.push(start + token as i32);
                batch.labels.push(labels[at(column)]);
            }
            continue;
        }
        // The token in the column before a label predicts it. The first column has no token before it.
        for column in (1..width).filter(|&column| labels[at(column)] != IGNORED_LABEL) {
            let Ok(before) = kept.binary_search(&(column - 1)) else {
                let message = format!(
                    "is {} in row {row}, column {column}, which the masked token before it would have to predict; \
                     set it to {IGNORED_LABEL}",
                    labels[at(column)]
                );
                return Err(wrong("labels", &message));
            };
            batch.targets.push(start + before as i32);
            batch.labels.push(labels[at(column)]);
        }
    }
    batch.numbers = numbers.unwrap_or_default();
    if let Some(labels) = labels.filter(|_| !asks.of_tokens())
        && labels.iter().any(|&label| label != IGNORED_LABEL)
    {
        if let Some(row) = labels.iter().position(|&label| label == IGNORED_LABEL) {
            return Err(wrong("labels", &format!("is {IGNORED_LABEL} in row {row}: give every row a class, or none")));
        }
        batch.labels = labels;
    }
    let (path, prefix) = (path.to_path_buf(), prefix.to_string());
    Ok(Padded { sequences, width, batch, asks, columns, labels: labelled, path, prefix })
}

/// The weights that a file holds as `weights.NAME`, in the order of the model's parameters.
///
/// # Errors
///
/// A tensor is missing or has another shape or type.
pub fn weights(file: &TensorFile, model: &Model, path: &Path) -> Result<Vec<Numbers>, RuntimeError> {
    let one = |p: &peft_grammar::model::Param| match file.tensors.get(&format!("weights.{}", p.name)) {
        Some(Stored { shape, data: Data::F32(x) }) if *shape == p.shape => Ok(Numbers::from(&x[..])),
        Some(stored) => {
            let message =
                format!("`weights.{}` is {:?}, and should be f32 {:?} for this spec", p.name, stored.shape, p.shape);
            Err(RuntimeError::weights(path, message))
        }
        None => {
            let none = !file.tensors.keys().any(|name| name.starts_with("weights."));
            let mend =
                if none { ", and so is every other; `--weights DIR` takes those of a model's folder" } else { "" };
            Err(RuntimeError::weights(path, format!("`weights.{}` is missing{mend}", p.name)))
        }
    };
    model.params.iter().map(one).collect()
}

impl Padded {
    /// Whether there are labels to compute a loss of.
    fn asks(&self) -> bool {
        self.labels == Labels::Some
    }

    /// The reason why there is no loss; `None` if there is one.
    pub fn without_loss(&self) -> Option<String> {
        let labels = format!("`{}labels`", self.prefix);
        match self.labels {
            Labels::Some => None,
            Labels::OfNothing => Some(format!("every one of {labels} is {IGNORED_LABEL}: there is no target")),
            Labels::OfFirst => {
                Some(format!("{labels} has labels in column 0 alone, and no token precedes it to predict them"))
            }
            Labels::None => Some(format!("there are no {labels}")),
        }
    }

    /// The batch as inputs of a session. `rng`: the seed and the step.
    pub fn inputs(&self, rng: [i32; 2]) -> Inputs {
        inputs(&self.batch, rng)
    }

    /// The same sequences with a target at every token or sequence, so that all logits are computed.
    pub fn inputs_with_all_targets(&self, rng: [i32; 2]) -> Inputs {
        let (tokens, sequences) = (self.batch.tokens(), self.sequences);
        let (targets, labels, numbers) = match self.asks {
            Asks::Next | Asks::Tags => (tokens, tokens, 0),
            Asks::Class => (0, sequences, 0),
            Asks::Number => (0, 0, sequences),
        };
        let (targets, labels, numbers) = ((0..targets as i32).collect(), vec![0; labels], vec![0.0; numbers]);
        inputs(&Batch { targets, labels, numbers, ..self.batch.clone() }, rng)
    }

    /// Checks that the model computes the batch as its source framework does: it must not read a masked first token,
    /// and it must read the token types if there are any.
    fn check_model_reads(&self, manifest: &Manifest) -> Result<(), RuntimeError> {
        let reads = |input: Input| {
            manifest.buffers.iter().any(|b| matches!(&b.storage, Storage::Input(i) if i == input.name()))
        };
        let wrong = |name: &str, message: String| {
            Err(RuntimeError::file(&self.path, format!("`{}{name}` {message}", self.prefix)))
        };
        let masked = self.batch.starts.iter().position(|&start| self.columns[start as usize] > 0);
        if let (true, Some(row)) = (reads(Input::Starts), masked) {
            let message = "is 0 in the first column of row";
            return wrong("mask", format!("{message} {row}, whose token this model reads; pad on the right"));
        }
        let typed = self.batch.types.iter().position(|&x| x != 0);
        if let (false, Some(at)) = (reads(Input::Types), typed) {
            let place = self.place(at);
            return wrong(
                "types",
                format!("is {} in {place}, and this model has no token types", self.batch.types[at]),
            );
        }
        Ok(())
    }

    /// The row and column of a packed token in the file, as text.
    fn place(&self, token: usize) -> String {
        let row = self.batch.starts.partition_point(|&start| start as usize <= token) - 1;
        format!("row {row}, column {}", self.columns[token])
    }

    /// Translates an error about an input out of range to the place in the file.
    fn with_file_location(&self, error: RuntimeError) -> RuntimeError {
        let RuntimeError::OutOfRange(beyond) = error else { return error };
        let OutOfRange { value, position, limit, .. } = &*beyond;
        let why = beyond.why();
        let (prefix, input) = (&self.prefix, &limit.input);
        let token = position.token.map(|token| self.batch.starts[position.sequence] as usize + token);
        let message = match (Input::from_name(input), token) {
            (Some(Input::Positions), Some(token)) => {
                format!("`{prefix}ids` has a token of position {value} in {}: {why}", self.place(token))
            }
            (Some(Input::Labels), Some(token)) => {
                let behind = usize::from(self.asks == Asks::Next);
                let (row, column) = (position.sequence, self.columns[token] + behind);
                format!("`{prefix}labels` is {value} in row {row}, column {column}: {why}")
            }
            (_, Some(token)) => format!("`{prefix}{input}` is {value} in {}: {why}", self.place(token)),
            (_, None) => format!("`{prefix}{input}` is {value} in row {}: {why}", position.sequence),
        };
        RuntimeError::file(&self.path, message)
    }

    /// Pads `[tokens, d]` to `[B, n, d]` with zeros.
    pub fn pad_tokens(&self, x: &[f32], d: usize) -> Stored {
        let mut out = vec![0.0; self.sequences * self.width * d];
        self.each_token(|t, s, i| out[(s * self.width + i) * d..][..d].copy_from_slice(&x[t * d..][..d]));
        Stored::f32(vec![self.sequences as u64, self.width as u64, d as u64], out)
    }

    /// Pads `[H, tokens]` to `[B, H, n]` with zeros.
    pub fn pad_heads(&self, x: &[f32]) -> Stored {
        let tokens = self.batch.tokens();
        let heads = x.len() / tokens;
        let mut out = vec![0.0; self.sequences * heads * self.width];
        for h in 0..heads {
            self.each_token(|t, s, i| out[(s * heads + h) * self.width + i] = x[h * tokens + t]);
        }
        Stored::f32(vec![self.sequences as u64, heads as u64, self.width as u64], out)
    }

    /// Calls `visit` for each packed token with its index, row and column.
    fn each_token(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let rows = self.batch.lengths.iter().enumerate();
        let rows = rows.flat_map(|(row, &length)| std::iter::repeat_n(row, length as usize));
        for (token, (row, &column)) in rows.zip(&self.columns).enumerate() {
            visit(token, row, column);
        }
    }
}

/// A packed batch as inputs of a session. `rng`: the seed and the step.
pub fn inputs(batch: &Batch, rng: [i32; 2]) -> Inputs {
    let ints = [
        (Input::Ids, batch.ids.clone()),
        (Input::Types, batch.types.clone()),
        (Input::Positions, batch.positions.clone()),
        (Input::Starts, batch.starts.clone()),
        (Input::Ends, batch.ends()),
        (Input::Targets, batch.targets.clone()),
        (Input::Rng, rng.to_vec()),
    ];
    let mut ints: BTreeMap<String, Vec<i32>> = ints.map(|(input, x)| (input.name().to_string(), x)).into();
    let mut floats = BTreeMap::new();
    let labels = Input::Labels.name().to_string();
    match batch.numbers.is_empty() {
        true => drop(ints.insert(labels, batch.labels.clone())),
        false => drop(floats.insert(labels, batch.numbers.clone())),
    }
    Inputs { lengths: batch.lengths.clone(), ints, floats }
}

/// Runs the entry `forward` or `grad`, and pads the results to the layout of the file's batch.
///
/// # Errors
///
/// The batch does not fit the model, `grad` has no loss, or the session fails.
pub fn run(
    session: &mut Session,
    model: &Model,
    entry: Entry,
    padded: &Padded,
    rng: [i32; 2],
) -> Result<TensorFile, RuntimeError> {
    padded.check_model_reads(session.manifest())?;
    if let (Entry::Grad, Some(why)) = (entry, padded.without_loss()) {
        let message = format!("{why}, and gradients are those of a loss; `--entry forward` needs none");
        return Err(RuntimeError::file(&padded.path, message));
    }
    let mut results = TensorFile::default();
    let mut put = |name: &str, stored: Stored| drop(results.tensors.insert(name.into(), stored));
    let of_tokens = padded.asks.of_tokens();
    if of_tokens || !padded.asks() {
        // The graph computes logits only at targets; this run makes every token a target.
        session.run(entry.name(), &padded.inputs_with_all_targets(rng)).map_err(|e| padded.with_file_location(e))?;
    }
    if of_tokens {
        let (shape, logits) = session.output(LOGITS).ok_or_else(|| RuntimeError::input(LOGITS, "is not an output"))?;
        put(LOGITS, padded.pad_tokens(&logits, shape[1] as usize));
    }
    if padded.asks() {
        session.run(entry.name(), &padded.inputs(rng)).map_err(|e| padded.with_file_location(e))?;
    }
    let names = session.outputs();
    for name in &names {
        let Some((shape, x)) = session.output(name) else { continue };
        match Output::from_name(name) {
            Output::Loss if !padded.asks() => {}
            Output::Loss => put(LOSS, Stored::f32(vec![1], x.to_vec())),
            Output::Logits if of_tokens => {}
            Output::Gradient(_) => {}
            Output::Lambda(_) => put(name, padded.pad_heads(&x)),
            _ => put(name, Stored::f32(shape, x.to_vec())),
        }
    }
    if entry == Entry::Grad {
        for (index, param) in model.params.iter().enumerate() {
            let tensor = &session.manifest().tensors[index];
            let Some((start, _)) = tensor.trainable else { continue };
            let of_param =
                |label: &str| label.strip_prefix(&param.name).is_some_and(|r| r.is_empty() || r.starts_with('['));
            let label = names.iter().find(|n| Output::from_name(n).gradient().is_some_and(of_param));
            let Some((_, x)) = label.and_then(|l| session.output(l)) else { continue };
            // The rows of a table that are frozen have a gradient of 0.
            let mut full = vec![0.0; param.elements() as usize];
            let from = (start * tensor.row()) as usize;
            full[from..from + x.len()].copy_from_slice(&x);
            put(&Output::Gradient(&param.name).to_string(), Stored::f32(param.shape.clone(), full));
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests;
