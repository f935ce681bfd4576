use std::path::{Path, PathBuf};
use std::time::Instant;

use peft_grammar::diagnostic::did_you_mean;
use peft_grammar::graph::Graph;
use peft_passes::dialect::Dialect;
use peft_passes::fuse::Thresholds;
use peft_passes::pipeline::{self, Context, pass_names};

use super::overwrite::Overwrite;
use crate::failure::Failure;

/// Runs passes on text of the `peft` dialect, as `mlir-opt` does on MLIR's own dialects. The verifier runs on what is read
/// and after every pass.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A file in the dialect's text, as `peftc compile --emit peft`, `grad` and `fused` print it; `-` is standard input
    #[arg(required_unless_present = "list")]
    file: Option<PathBuf>,
    /// Passes and fusion rules in the order in which they run, such as `fuse,remat` (see `--list`)
    #[arg(long, value_name = "PASS,…", value_delimiter = ',', value_parser = pass)]
    passes: Vec<String>,
    /// Set a threshold of the fusion rules, such as `min_chunked_vocab=8`
    #[arg(long, value_name = "NAME=NUMBER", value_parser = threshold)]
    threshold: Vec<(String, String)>,
    /// Verify only: print nothing, and exit with 3 if the text breaks the dialect's rules
    #[arg(long)]
    verify: bool,
    /// List the passes and the fusion rules with what each does
    #[arg(long)]
    list: bool,
    /// Print how long each pass took
    #[arg(long)]
    timings: bool,
    /// Print the place in the `.peft` file behind every operation
    #[arg(long)]
    locations: bool,
    /// The file that gets the result; standard output if not given
    #[arg(short, long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    overwrite: Overwrite,
}

fn pass(text: &str) -> Result<String, String> {
    let known: Vec<&str> = pass_names().into_iter().map(|(name, _)| name).collect();
    match known.contains(&text) {
        true => Ok(text.into()),
        false => Err(format!("the passes are {}{}", known.join(", "), did_you_mean(text, &known))),
    }
}

fn threshold(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a threshold is set as NAME=NUMBER")?;
    Thresholds::default().set(name, value)?;
    Ok((name.into(), value.into()))
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if arguments.list {
        let names = pass_names();
        let width = names.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let lines: Vec<String> = names.iter().map(|(name, what)| format!("{name:width$}  {what}")).collect();
        super::print(&lines.join("\n"));
        return Ok(());
    }
    let path = arguments.file.as_ref().expect("clap requires it without `--list`");
    if let Some(output) = &arguments.output {
        arguments.overwrite.file(output, &[path.as_path()])?;
    }
    let name = path.display().to_string();
    let source = read(path)?;
    let dialect = Dialect::new()?;
    let refused = |e: peft_passes::Error| {
        // MLIR calls a text without a file `-`.
        let message = e.to_string().replace("loc(\"-\":", &format!("loc(\"{name}\":"));
        Failure::Dialect(format!("{name}: {message}"))
    };
    let mut graphs = dialect.read(&source).map_err(refused)?;
    let mut thresholds = Thresholds::default();
    for (name, value) in &arguments.threshold {
        thresholds.set(name, value).map_err(Failure::Usage)?;
    }
    let mut context = Context { without: vec![], thresholds, savings: vec![] };
    for pass in &arguments.passes {
        let begun = Instant::now();
        let apply = |graph: &Graph| pipeline::apply(pass, graph, &mut context);
        let next: Result<Vec<Graph>, String> = graphs.iter().map(apply).collect();
        graphs = next.map_err(|e| Failure::Dialect(format!("{name}: pass `{pass}`: {e}")))?;
        dialect.verify(pass, &graphs.iter().collect::<Vec<_>>())?;
        if arguments.timings {
            super::say(&format!("{pass:<18} {:>9.3} ms", begun.elapsed().as_secs_f64() * 1e3));
        }
    }
    if arguments.verify {
        return Ok(());
    }
    let graphs: Vec<&Graph> = graphs.iter().collect();
    let text = if arguments.locations { dialect.print_with_locations(&graphs)? } else { dialect.print(&graphs)? };
    super::write_or_print(arguments.output.as_deref(), &text)
}

fn read(path: &Path) -> Result<String, Failure> {
    let read =
        if path.as_os_str() == "-" { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(path) };
    read.map_err(Failure::file(path))
}
