//! `peftc data`: shows examples as the model sees them, the counts of classes, and the distribution of lengths.

use std::io::IsTerminal;
use std::ops::Range;
use std::path::PathBuf;

use peft_grammar::model::Model;

use super::data_args::DataArgs;
use super::model_args::ModelArgs;
use crate::data::{Dataset, Example, Goal, NO_TAG, Tokenizer};
use crate::failure::Failure;
use crate::hub::{checkpoint, tokenizer};
use crate::spec;

/// The command line of `peftc data`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A `.peft` spec, or an artifact that `peftc compile` wrote
    #[arg(value_name = "SPEC|ARTIFACT")]
    spec: PathBuf,
    /// The data to show: files of json, jsonl, csv, tsv, parquet or text, plain or compressed with gzip or zstd. Repeat
    /// `--data` for several files, or give a pattern in quotes such as `'train/*.jsonl'`
    #[arg(long, required = true, value_name = "FILE")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: DataArgs,
    /// The checkpoint whose tokenizer is used: a Hugging Face model directory or a GGUF file
    #[arg(long)]
    weights: Option<PathBuf>,
    /// A directory or a GGUF file with the tokenizer [default: the tokenizer of `--weights`]
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// The number of examples to show
    #[arg(long, default_value_t = 3, value_name = "N")]
    show: usize,
    /// Set a value of the spec, such as `task.max_tokens=64`
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::assignment)]
    set: Vec<(String, String)>,
}

/// Reads the data and prints examples and statistics.
///
/// # Errors
///
/// The spec, the tokenizer or the data cannot be used.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { spec, data, rows, weights, tokenizer, show, set } = arguments;
    let weights = weights.map(|weights| checkpoint::resolve(&weights)).transpose()?;
    let model = ModelArgs::new(spec, set).model()?;
    let weights = weights.unwrap_or_else(|| "random".into());
    let tokenizer = tokenizer::find(tokenizer.as_deref(), &weights, &data[0], &model)?;
    let data = rows.read(&data, &model, &tokenizer)?;
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    for (index, example) in data.examples.iter().take(show).enumerate() {
        let place = data.place(index).unwrap_or_default();
        super::print(&example_text(place, &example, &model, &tokenizer, color));
    }
    if data.sources.len() > 1 {
        for source in &data.sources {
            super::print(&format!("{:>9} examples  {}", source.examples, source.path.display()));
        }
    }
    if let Some(labels) = model.task.kind.labels() {
        super::print(&class_counts(&data, labels));
    }
    super::print(&histogram(data.lengths(), model.task.max_tokens as usize));
    Ok(())
}

/// The text for an example, with a line for each run of tokens of the same type. Tokens that carry the loss are green,
/// or enclosed in `»` and `«` without colour.
fn example_text(place: &str, example: &Example, model: &Model, tokenizer: &Tokenizer, color: bool) -> String {
    let count = example.ids.len();
    let label =
        |class: i32| model.task.kind.labels().and_then(|all| all.get(class as usize)).map_or("", String::as_str);
    let goal = match &example.goal {
        Goal::Class(class) => format!("class {class}, `{}`", label(*class)),
        Goal::Number(number) => number.to_string(),
        Goal::Tokens(_) | Goal::Turns(..) | Goal::Tags(_) => format!("the loss is on {}", example.goal.target_count()),
    };
    let special = model.task.special_tokens().iter().filter_map(|token| Some((tokenizer.special(token)?, token)));
    let special: Vec<(i32, &String)> = special.collect();
    let named = |kind: i32| match special.iter().find(|(id, _)| *id == kind) {
        Some((_, token)) => token.to_string(),
        None => kind.to_string(),
    };
    let (begin, end) = emphasis(color);
    let mut lines = vec![format!("{place}: {count} tokens, {goal}")];
    let mut start = 0;
    if let Goal::Tags(tags) = &example.goal {
        let token = |at: usize| match tags[at] {
            NO_TAG => token_text(example.ids[at], tokenizer),
            tag => format!("{begin}{}{end}/{}", token_text(example.ids[at], tokenizer), label(tag)),
        };
        lines.push(format!("  {}", (0..count).map(token).collect::<Vec<_>>().join("|")));
        return lines.join("\n") + "\n";
    }
    for run in example.types.chunk_by(|a, b| a == b) {
        let tokens = tokens_of_run(example, start..start + run.len(), tokenizer, color);
        lines.push(format!("  type {:<10} {tokens}", named(run[0])));
        start += run.len();
    }
    lines.join("\n") + "\n"
}

/// The texts before and after tokens that carry the loss.
fn emphasis(color: bool) -> (&'static str, &'static str) {
    if color { ("\x1b[32m", "\x1b[0m") } else { ("»", "«") }
}

/// The text of a token for the terminal.
fn token_text(id: i32, tokenizer: &Tokenizer) -> String {
    tokenizer.show(id).chars().map(escape_control).collect()
}

/// The tokens of `range`, separated by bars. A label other than the next token follows its token in brackets.
fn tokens_of_run(example: &Example, range: Range<usize>, tokenizer: &Tokenizer, color: bool) -> String {
    let (begin, end) = emphasis(color);
    let mut tokens: Vec<(bool, String)> = vec![];
    for at in range {
        let learned = example.goal.ranges().iter().any(|range| range.contains(&at));
        tokens.push((learned, token_text(example.ids[at], tokenizer)));
        let extra_targets = example.goal.extra_targets().iter().filter(|extra| extra.at as usize == at + 1);
        tokens.extend(extra_targets.map(|extra| (true, format!("[{}]", token_text(extra.label, tokenizer)))));
    }
    let parts = tokens.chunk_by(|a, b| a.0 == b.0).map(|part| {
        let text = part.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("|");
        if part[0].0 { format!("{begin}{text}{end}") } else { text }
    });
    parts.collect::<Vec<_>>().join("|")
}

/// A character for the terminal. Control characters, which could move the cursor or change colours, are escaped.
fn escape_control(c: char) -> String {
    if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
}

/// The number of examples, or of tagged tokens, of each class.
fn class_counts(data: &Dataset, labels: &[String]) -> String {
    let mut counts = vec![0usize; labels.len()];
    for example in data.examples.iter() {
        let classes = match example.goal {
            Goal::Class(class) => vec![class],
            Goal::Tags(tags) => tags,
            Goal::Tokens(_) | Goal::Turns(..) | Goal::Number(_) => vec![],
        };
        for class in classes {
            if let Some(count) = usize::try_from(class).ok().and_then(|class| counts.get_mut(class)) {
                *count += 1;
            }
        }
    }
    let all: Vec<String> = labels.iter().zip(&counts).map(|(label, count)| format!("{label} {count}")).collect();
    format!("classes: {}", all.join(", "))
}

/// The distribution of the examples' lengths in tokens, before they are truncated to `limit`.
fn histogram(lengths: &[u32], limit: usize) -> String {
    // The largest number of bins, and the length of the longest bar in characters.
    const ROWS: usize = 12;
    const WIDTH: usize = 40;
    let mut sorted: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
    sorted.sort_unstable();
    let (Some(&first), Some(&last)) = (sorted.first(), sorted.last()) else { return "no example".into() };
    let at = |share: usize| sorted[(sorted.len() - 1) * share / 100];
    let over = sorted.len() - sorted.partition_point(|&length| length <= limit);
    let mut lines = vec![format!(
        "lengths: {first} to {last} tokens, half at most {}, 95% at most {}; `task.max_tokens` is {limit}, and {over} \
         are longer",
        at(50),
        at(95)
    )];
    // The width of a bin is 1, 2 or 5 times a power of ten.
    let wanted = (last - first + 1).div_ceil(ROWS);
    let power = 10usize.pow(wanted.ilog10());
    let step = [1, 2, 5, 10].into_iter().map(|n| n * power).find(|&step| step >= wanted).unwrap_or(wanted);
    let bins: Vec<(usize, usize)> = (first / step..=last / step)
        .map(|bin| {
            let below = |length: usize| sorted.partition_point(|&l| l < length);
            (bin * step, below((bin + 1) * step) - below(bin * step))
        })
        .collect();
    let most = bins.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (from, count) in bins {
        let to = from + step - 1;
        let mark = if (from..=to).contains(&limit) { "  ← task.max_tokens" } else { "" };
        let bar = "█".repeat((count * WIDTH).div_ceil(most));
        let line = format!("  {from:>6} to {to:<6} {count:>8} {bar}{mark}");
        lines.push(line.trim_end().to_owned());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ExtraTarget;

    #[test]
    fn the_histogram_shows_lengths_and_the_limit() {
        let lengths: Vec<u32> = (0..100).map(|i| 3 + i % 7 + if i % 10 == 0 { 30 } else { 0 }).collect();
        insta::assert_snapshot!(histogram(&lengths, 32), @r"
        lengths: 3 to 39 tokens, half at most 6, 95% at most 36; `task.max_tokens` is 32, and 10 are longer
               0 to 4            27 ██████████████████
               5 to 9            63 ████████████████████████████████████████
              10 to 14            0
              15 to 19            0
              20 to 24            0
              25 to 29            0
              30 to 34            3 ██  ← task.max_tokens
              35 to 39            7 █████
        ");
        insta::assert_snapshot!(histogram(&[4, 4, 4], 64), @r"
        lengths: 4 to 4 tokens, half at most 4, 95% at most 4; `task.max_tokens` is 64, and 0 are longer
               4 to 4             3 ████████████████████████████████████████
        ");
        assert_eq!(histogram(&[], 64), "no example");
        // The number of bins is bounded for any lengths.
        assert!(histogram(&[1, u32::MAX], 64).lines().count() < 20);
    }

    /// Behind the first answer, the label is the end token and not the next token, which begins the second question.
    #[test]
    fn labels_of_packed_turns_are_shown_in_brackets() {
        let spec = "model = gpt2(vocab: 1539)\ntask t { special: [\"<q>\", \"<a>\", \"<e>\"]  target: \"<a>\"
                    each: \"turns\"  pack: true  template: \"(before: <q> {turns.q})* <q> {turns.q} <a> {turns.a} \
                    <e>\" }";
        let model = peft_grammar::check("t.peft", spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}"));
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/triples");
        let tokenizer = Tokenizer::load(&folder, &model.task, 1539).unwrap_or_else(|e| panic!("{e}"));
        let [q, a, e] = ["<q>", "<a>", "<e>"].map(|token| tokenizer.special(token).unwrap());
        let words = tokenizer.encode(vec!["no", "one", "in", "on"], false).unwrap().concat();
        let [first, second, third, fourth] = words[..] else { panic!("a token each") };
        let example = Example {
            ids: vec![q, first, a, second, q, third, a, fourth, e],
            types: vec![q, q, a, a, q, q, a, a, a],
            goal: Goal::Turns(vec![3..4, 7..9], vec![ExtraTarget { at: 4, label: e }]),
        };
        insta::assert_snapshot!(example_text("line 1, items 1 to 2", &example, &model, &tokenizer, false), @r"
        line 1, items 1 to 2: 9 tokens, the loss is on 4
          type <q>        <q>|no
          type <a>        <a>|»one|[<e>]«
          type <q>        <q>|in
          type <a>        <a>|»on|<e>«
        ");
    }

    #[test]
    fn control_characters_are_escaped() {
        let text: String = "a\x1b[2Jb\n".chars().map(escape_control).collect();
        assert_eq!(text, "a\\u{1b}[2Jb\\n");
    }
}
