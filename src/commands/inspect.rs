//! `peftc inspect`: the parameter counts of a spec and the cost of a training step.

use std::path::PathBuf;

use serde::Serialize;

use crate::budget::Budget;
use crate::failure::Failure;
use crate::spec;

/// The command line of `peftc inspect`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The spec to inspect
    #[arg(value_name = "SPEC")]
    spec: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Set a value of the spec, such as `model.layers=2`
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::assignment)]
    set: Vec<(String, String)>,
    /// The target to compile for. For a GPU such as `cuda:sm_70` the roofline of a step and its kernels are shown, too
    #[cfg(feature = "compiler")]
    #[arg(long, default_value = "cpu")]
    target: String,
    /// The length in tokens of each sequence of the batch that memory and time are computed for [default: 128]
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "N")]
    tokens: Option<u64>,
}

/// The report that `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    budget: Budget,
    #[cfg(feature = "compiler")]
    #[serde(flatten)]
    costs: crate::costs::Costs,
}

/// Prints the report.
///
/// # Errors
///
/// The spec does not check, the target does not exist, or the compiler fails.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let model = spec::load(&arguments.spec, &arguments.set, super::color())?;
    let report = Report {
        budget: Budget::of(&model, model.task.special_tokens().len() as u64),
        #[cfg(feature = "compiler")]
        costs: crate::costs::costs(&model, &options(&arguments)?, arguments.tokens)?,
    };
    if arguments.json {
        super::print(&serde_json::to_string_pretty(&report).expect("plain data"));
        return Ok(());
    }
    super::print(&report.budget.table());
    let mb = |bytes: f64| bytes / 1e6;
    let kept = model.train.optimizer.state_description();
    let averages = if model.train.average.is_some() { " and averages" } else { "" };
    super::print(&format!(
        "optimizer: {:.1} MB ({kept}{averages}), gradients {:.1} MB",
        mb(report.budget.optimizer_bytes as f64),
        mb(report.budget.gradient_bytes as f64)
    ));
    #[cfg(feature = "compiler")]
    super::print(&costs(&report.costs));
    Ok(())
}

/// The compiler's options for `--target`.
#[cfg(feature = "compiler")]
fn options(arguments: &Arguments) -> Result<peft_passes::pipeline::Options, Failure> {
    let machine = arguments.target.parse().map_err(Failure::Usage)?;
    Ok(peft_passes::pipeline::Options { machine, ..Default::default() })
}

/// The costs as text for the terminal.
#[cfg(feature = "compiler")]
fn costs(costs: &crate::costs::Costs) -> String {
    let line = |what: &str, flops: &crate::costs::Flops| {
        let mut line = format!("{what}: {:.1} MFLOP a token", flops.per_token / 1e6);
        for (count, of) in [(flops.per_target, "target"), (flops.per_sequence, "sequence"), (flops.fixed, "step")] {
            if count > 0.0 {
                line += &format!(" + {:.1} a {of}", count / 1e6);
            }
        }
        line + &format!(" + {:.1} kFLOP a query and key", flops.per_pair / 1e3)
    };
    let batch = costs.batch;
    let mut lines = vec![
        line("forward ", &costs.forward_flops),
        line("backward", &costs.backward_flops),
        format!(
            "activations: {:.1} kB a token ({} sequences of {} tokens: {:.2} GB)",
            costs.activation_bytes_per_token / 1e3,
            batch.sequences,
            batch.tokens_each,
            costs.activation_bytes_per_token * (batch.sequences * batch.tokens_each) as f64 / 1e9
        ),
    ];
    if let Some(roofline) = &costs.roofline {
        let crate::costs::Roofline { card, launches, bytes, half_flops, flops, .. } = roofline;
        lines.push(format!(
            "{card}: {launches} launches a step; {:.2} GB in {:.2} ms; {:.2} TFLOP in half precision and {:.2} in f32 \
             in \
             {:.2} ms; at best {:.0} tokens/s",
            bytes / 1e9,
            1e3 * roofline.memory_seconds,
            half_flops / 1e12,
            flops / 1e12,
            1e3 * roofline.product_seconds,
            (batch.sequences * batch.tokens_each) as f64 / roofline.seconds(),
        ));
        lines.extend(kernels(roofline));
    }
    lines.join("\n")
}

/// A table of the groups of launches that take over 1% of a step, with the sums of the others and of all.
#[cfg(feature = "compiler")]
fn kernels(roofline: &crate::costs::Roofline) -> Vec<String> {
    let row = |launches: usize, flops: f64, bytes: f64, best: f64, modelled: f64, what: &str| {
        let (flops, bytes, best, modelled) = (flops / 1e9, bytes / 1e6, 1e3 * best, 1e3 * modelled);
        format!("{launches:>8} {flops:>7.1} {bytes:>8.0} {best:>7.2} {modelled:>8.2}  {what}")
    };
    let mut lines = vec!["launches  GFLOP       MB best ms model ms  bound by".to_string()];
    let all = &roofline.kernels;
    let shown = all.iter().take_while(|kind| kind.modelled_seconds > 0.01 * roofline.modelled_seconds).count();
    for kind in &all[..shown] {
        let what = format!("{:<8}  {}", kind.bound, kind.op);
        lines.push(row(kind.launches, kind.flops, kind.bytes, kind.best_seconds, kind.modelled_seconds, &what));
    }
    for (kinds, what) in [(&all[shown..], "          others"), (&all[..], "          all")] {
        let sum = |of: fn(&crate::costs::LaunchGroup) -> f64| kinds.iter().map(of).sum::<f64>();
        let launches = kinds.iter().map(|kind| kind.launches).sum();
        let [flops, bytes] = [sum(|k| k.flops), sum(|k| k.bytes)];
        lines.push(row(launches, flops, bytes, sum(|k| k.best_seconds), sum(|k| k.modelled_seconds), what));
    }
    lines.push(format!(
        "modelled: {:.2} ms a step; the roofline's {:.2} ms are {:.0}% of it",
        1e3 * roofline.modelled_seconds,
        1e3 * roofline.seconds(),
        100.0 * roofline.seconds() / roofline.modelled_seconds
    ));
    lines
}
