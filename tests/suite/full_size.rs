//! A test at full size: GPT-2 small on WebNLG. It takes minutes, so it runs only with `PEFTC_FULL`.

use std::path::PathBuf;
use std::process::Command;

use crate::env_or_skip;

/// The data folder below `PEFTC_DATA` if the slow tests are enabled. Otherwise prints why they are skipped.
pub fn data() -> Option<PathBuf> {
    env_or_skip("PEFTC_FULL")?;
    env_or_skip("PEFTC_DATA").map(|root| PathBuf::from(root).join("data"))
}

#[test]
fn gpt2_small_learns_webnlg_in_three_gigabytes() {
    let Some(data) = data() else { return };
    let out = tempfile::tempdir().expect("a directory");
    let run = Command::new(env!("CARGO_BIN_EXE_peftc"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["train", "models/paper/webnlg/inducer_lora.peft", "--weights", "random", "--set", "train.steps=20"])
        .arg("--data")
        .arg(data.join("webnlg/train.json"))
        .arg("--out")
        .arg(out.path())
        .output()
        .expect("it starts");
    let (said, printed) = (String::from_utf8_lossy(&run.stderr), String::from_utf8_lossy(&run.stdout));
    assert!(run.status.success(), "{said}");
    assert!(said.contains("18025 examples") && said.contains("the longest 271"), "{said}");
    assert!(said.contains("trainable: 2,002,320") && said.contains("12,288 special tokens"), "{said}");
    let metrics = std::fs::read_to_string(out.path().join("metrics.jsonl")).expect("metrics");
    let losses: Vec<f64> = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["loss"].as_f64().expect("a loss"))
        .collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert_eq!(losses.len(), 20);
    assert!(mean(&losses[15..]) < mean(&losses[..5]) - 0.02, "{losses:?}");
    let peak = printed.split("peak ").nth(1).and_then(|t| t.split(' ').next()?.parse::<f64>().ok());
    assert!(peak.is_some_and(|gb| gb < 3.0), "{printed}");
}
