//! Metrics of a run, written after each step to `metrics.jsonl` (one object per line) and to a TensorBoard event file.

mod events;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use events::Events;

/// An error in writing a metrics file, or in reading it for a resumed run.
#[derive(Debug, thiserror::Error)]
#[error("cannot write metrics to `{path}`: {source}")]
pub struct MetricsError {
    /// The metrics file.
    pub path: PathBuf,
    /// The error of the operating system.
    pub source: io::Error,
}

/// The open metrics files of a run.
pub struct Metrics {
    lines: Sink,
    events: Sink,
}

struct Sink {
    path: PathBuf,
    file: File,
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> Result<(), MetricsError> {
        self.file.write_all(bytes).map_err(failed(&self.path))
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> MetricsError + '_ {
    |source| MetricsError { path: path.to_owned(), source }
}

/// The name of the metrics file, which has one JSON object per line.
pub const LINES: &str = "metrics.jsonl";
const FRESH_LINES: &str = "metrics.jsonl.new";
const EVENTS: &str = "events.out.tfevents.";

/// Whether a file in a run's folder is a metrics file.
pub fn is_file(name: &str) -> bool {
    [LINES, FRESH_LINES].contains(&name) || (name.starts_with(EVENTS) && name.contains(".peftc."))
}

impl Metrics {
    /// Creates empty metrics files in the directory `dir`, which must exist.
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub fn create(dir: &Path) -> Result<Self, MetricsError> {
        Self::open(dir, String::new(), None)
    }

    /// Continues after `step`. Lines of later steps are removed.
    ///
    /// # Errors
    ///
    /// A file cannot be read or written.
    pub fn resume(dir: &Path, step: u64) -> Result<Self, MetricsError> {
        let path = dir.join(LINES);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(failed(&path))?,
        };
        let kept = text.split_inclusive('\n').filter(|line| step_of(line).is_some_and(|s| s <= step)).collect();
        Self::open(dir, kept, Some(step))
    }

    fn open(dir: &Path, kept: String, resumed: Option<u64>) -> Result<Self, MetricsError> {
        // The file is written under another name and renamed, so that a crash loses no lines of an earlier run.
        let (path, fresh) = (dir.join(LINES), dir.join(FRESH_LINES));
        let mut file = File::create(&fresh).map_err(failed(&fresh))?;
        file.write_all(kept.as_bytes()).map_err(failed(&fresh))?;
        fs::rename(&fresh, &path).map_err(failed(&path))?;
        let lines = Sink { path, file };

        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("{EVENTS}{}.peftc.{}", now.as_secs(), std::process::id());
        let path = dir.join(name);
        let file = File::create(&path).map_err(failed(&path))?;
        let mut events = Sink { path, file };
        events.write(&Events::at(now.as_secs_f64()).start(resumed))?;
        Ok(Metrics { lines, events })
    }

    /// Writes the metrics of one step without buffering, so that a run that is killed keeps all of them. TensorBoard
    /// groups names such as `dev/loss` by their prefix.
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub fn record(&mut self, step: u64, figures: &[(&str, f64)]) -> Result<(), MetricsError> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        for &(name, value) in figures {
            // JSON has no NaN and no infinity, so both become null.
            line.insert(name.into(), Value::from(value));
        }
        self.lines.write(format!("{}\n", Value::from(line)).as_bytes())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.events.write(&Events::at(now.as_secs_f64()).scalars(step, figures))
    }
}

/// The step of a complete line, or `None` for a truncated one.
fn step_of(line: &str) -> Option<u64> {
    serde_json::from_str::<Value>(line.strip_suffix('\n')?).ok()?.get("step")?.as_u64()
}

/// A weighted mean, such as a loss over batches with different numbers of targets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    /// Adds a value with a weight.
    pub fn add(&mut self, value: f64, weight: f64) {
        self.sum += value * weight;
        self.weight += weight;
    }

    /// The mean, or NaN if nothing was added.
    pub fn value(&self) -> f64 {
        self.sum / self.weight
    }

    /// e to the power of the mean, for a cross entropy in nats.
    pub fn perplexity(&self) -> f64 {
        self.value().exp()
    }
}

/// The number of rows of `logits` (row-major, one row per label) whose largest logit is at the label. The first of
/// equal logits counts, and a row of NaN is wrong.
pub fn correct(logits: &[f32], labels: &[i32]) -> usize {
    if labels.is_empty() {
        return 0;
    }
    let classes = logits.len() / labels.len();
    let right = |(row, label): (&[f32], &i32)| {
        let best = (0..classes).reduce(|best, c| if row[c] > row[best] { c } else { best });
        best == Some(*label as usize) && !row[*label as usize].is_nan()
    };
    logits.chunks_exact(classes.max(1)).zip(labels).filter(|&pair| right(pair)).count()
}

/// Pearson's correlation of two samples of equal length. NaN if one is constant.
pub fn pearson(x: &[f32], y: &[f32]) -> f64 {
    let [x, y] = [x, y].map(|numbers| numbers.iter().map(|&n| f64::from(n)).collect::<Vec<f64>>());
    correlation(&x, &y)
}

/// Spearman's correlation: Pearson's correlation of the ranks, where equal numbers have their mean rank.
pub fn spearman(x: &[f32], y: &[f32]) -> f64 {
    correlation(&ranks(x), &ranks(y))
}

fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (mean_x, mean_y) = (mean(x), mean(y));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let (x, y) = (x - mean_x, y - mean_y);
        (xx, yy, xy) = (xx + x * x, yy + y * y, xy + x * y);
    }
    xy / (xx.sqrt() * yy.sqrt())
}

fn ranks(numbers: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|&i, &j| numbers[i].total_cmp(&numbers[j]));
    let (mut ranks, mut before) = (vec![0.0; numbers.len()], 0);
    for equal in order.chunk_by(|&i, &j| numbers[i] == numbers[j]) {
        let rank = before as f64 + (equal.len() as f64 + 1.0) / 2.0;
        equal.iter().for_each(|&i| ranks[i] = rank);
        before += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_later_steps_are_removed_on_resume() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        for step in 1..=4 {
            metrics.record(step, &[("loss", 1.0 / step as f64), ("lr", f64::NAN)]).unwrap();
        }
        metrics.lines.write(b"{\"step\": 1, \"lo").unwrap();
        drop(metrics);

        let mut metrics = Metrics::resume(dir.path(), 2).unwrap();
        metrics.record(3, &[("dev/accuracy", 0.75)]).unwrap();
        insta::assert_snapshot!(fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap(), @r#"
        {"step":1,"loss":1.0,"lr":null}
        {"step":2,"loss":0.5,"lr":null}
        {"step":3,"dev/accuracy":0.75}
        "#);

        Metrics::create(dir.path()).unwrap();
        assert_eq!(fs::read(dir.path().join("metrics.jsonl")).unwrap(), b"");
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = Metrics::create(&dir.path().join("none")).err().unwrap().to_string();
        assert!(error.starts_with("cannot write metrics to `") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn weighted_means_and_perplexity() {
        let mut mean = Mean::default();
        assert!(mean.value().is_nan());
        mean.add(1.0, 3.0);
        mean.add(5.0, 1.0);
        assert_eq!(mean.value(), 2.0);
        assert_eq!(mean.perplexity(), 2f64.exp());
    }

    /// Reference values are from NumPy: `corrcoef` of these numbers, and of their ranks 1, 2, 3, 4, 5.5, 5.5 and 2, 1,
    /// 4, 3, 6, 5.
    #[test]
    fn correlations_match_numpy() {
        let (x, y) = ([1.0, 2.0, 3.0, 4.0, 5.0, 5.0], [2.0, 1.0, 4.0, 3.0, 7.0, 6.0]);
        assert!((pearson(&x, &y) - 0.863_511_536_641_545_6).abs() < 1e-12, "{}", pearson(&x, &y));
        assert!((spearman(&x, &y) - 0.869_656_553_478_672_7).abs() < 1e-12, "{}", spearman(&x, &y));
        assert!(pearson(&[1.0, 1.0], &[2.0, 3.0]).is_nan() && spearman(&[], &[]).is_nan());
    }

    #[test]
    fn accuracy_counts_the_first_largest_logit() {
        assert_eq!(correct(&[0.1, 0.9, 2.0, -1.0, 0.5, 0.5], &[1, 1, 0]), 2);
        assert_eq!(correct(&[f32::NAN, f32::NAN, 1.0, f32::NAN], &[0, 0]), 1);
        assert_eq!(correct(&[], &[]), 0);
    }
}
