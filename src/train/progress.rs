//! Reports progress: a bar on a terminal, otherwise (log, pipe, CI) a line at intervals.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The interval between two lines if the output is not a terminal.
const INTERVAL: Duration = Duration::from_secs(5);

/// The metrics of one step.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The loss before the step.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// The number of tokens. Batches have no padding.
    pub tokens: u64,
    /// The duration of the step.
    pub time: Duration,
}

/// The progress report of a run.
pub struct Progress {
    total: u64,
    done: u64,
    figures: Figures,
    display: Display,
}

enum Display {
    Bar(ProgressBar),
    Lines { out: Box<dyn Write + Send>, since: Duration },
}

impl Progress {
    /// Reports on standard error about `total` steps, of which `done` are complete already.
    pub fn new(total: u64, done: u64) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let display = if io::stderr().is_terminal() && !dumb {
            let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            Display::Bar(bar(total, done, !plain))
        } else {
            Display::Lines { out: Box::new(io::stderr()), since: Duration::ZERO }
        };
        Progress { total, done, figures: Figures::default(), display }
    }

    /// Reports a step.
    pub fn step(&mut self, step: Step) {
        self.done += 1;
        self.figures.add(step);
        let left = self.total.saturating_sub(self.done);
        let (done, total) = (self.done, self.total);
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_message(self.figures.describe(step.lr, left));
                bar.set_position(done);
            }
            Display::Lines { out, since } => {
                *since += step.time;
                // The first step shows that the run works, and the last one how it ended.
                if *since >= INTERVAL || self.figures.steps == 1 || left == 0 {
                    *since = Duration::ZERO;
                    say(out, &format!("step {done}/{total}  {}", self.figures.describe(step.lr, left)));
                }
            }
        }
    }

    /// Prints a line, such as the result of an evaluation or the path of a saved file.
    pub fn line(&mut self, text: &str) {
        match &mut self.display {
            Display::Bar(bar) => bar.suspend(|| say(&mut io::stderr(), text)),
            Display::Lines { out, .. } => say(out, text),
        }
    }

    /// Leaves the bar on the terminal as it is.
    pub fn finish(self) {
        if let Display::Bar(bar) = self.display {
            bar.abandon();
        }
    }
}

/// Writes a line and ignores errors, because a closed pipe should not stop the training.
fn say(out: &mut dyn Write, text: &str) {
    let _ = writeln!(out, "{text}");
}

fn bar(total: u64, done: u64, color: bool) -> ProgressBar {
    let bar = if color { "{bar:30.green}" } else { "{bar:30}" };
    let style = ProgressStyle::with_template(&format!("{bar} {{pos}}/{{len}}  {{msg}}"))
        .expect("the template is well-formed")
        .progress_chars("━╸ ");
    let target = ProgressDrawTarget::stderr_with_hz(10);
    ProgressBar::with_draw_target(Some(total), target).with_style(style).with_position(done)
}

/// Exponential moving averages over about the last fifty steps.
#[derive(Default)]
struct Figures {
    steps: u64,
    /// One minus the total weight of the averages, which corrects their bias toward zero.
    missing: f64,
    loss: f64,
    tokens: f64,
    seconds: f64,
}

impl Figures {
    const KEEP: f64 = 0.98;

    fn add(&mut self, step: Step) {
        if self.steps == 0 {
            self.missing = 1.0;
        }
        self.steps += 1;
        self.missing *= Self::KEEP;
        let mix = |old: f64, new: f64| Self::KEEP * old + (1.0 - Self::KEEP) * new;
        self.loss = mix(self.loss, step.loss);
        self.tokens = mix(self.tokens, step.tokens as f64);
        self.seconds = mix(self.seconds, step.time.as_secs_f64());
    }

    fn describe(&self, lr: f64, left: u64) -> String {
        let weight = 1.0 - self.missing;
        let loss = self.loss / weight;
        let speed = if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 };
        let eta = match left {
            0 => String::new(),
            _ => format!("  {} left", duration(self.seconds / weight * left as f64)),
        };
        format!("loss {loss:.4}  lr {lr:.2e}  {speed:.0} tokens/s{eta}")
    }
}

/// A duration as text: `42s`, `3m05s`, `2h07m`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn progress_lines_without_a_terminal() {
        let log = Log::default();
        let display = Display::Lines { out: Box::new(log.clone()), since: Duration::ZERO };
        let mut progress = Progress { total: 10, done: 0, figures: Figures::default(), display };
        for i in 0..10 {
            let time = Duration::from_secs(2);
            progress.step(Step { loss: 2.0 - 0.1 * f64::from(i), lr: 1.25e-3, tokens: 300, time });
        }
        progress.line("dev accuracy 0.91");
        progress.finish();
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        insta::assert_snapshot!(text, @r"
        step 1/10  loss 2.0000  lr 1.25e-3  150 tokens/s  18s left
        step 4/10  loss 1.8475  lr 1.25e-3  150 tokens/s  12s left
        step 7/10  loss 1.6919  lr 1.25e-3  150 tokens/s  6s left
        step 10/10  loss 1.5333  lr 1.25e-3  150 tokens/s
        dev accuracy 0.91
        ");
    }

    #[test]
    fn durations_are_short_texts() {
        assert_eq!([0.4, 59.4, 59.6, 185.0, 7620.0].map(duration), ["0s", "59s", "1m00s", "3m05s", "2h07m"]);
    }
}
