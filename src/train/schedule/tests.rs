use peft_grammar::model::{Phase, Recipe, Schedule};
use serde_json::Value;

use super::{decay_start, rate};

fn recipe(settings: &str) -> Recipe {
    let spec = format!("model = gpt2(layers: 1)\ntrain {{ {settings} }}\n");
    peft_grammar::check("spec", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}")).train
}

/// The rates of every schedule over a whole run match transformers' (`tests/interop/schedule_fixtures.py`).
#[test]
fn rates_match_transformers() {
    let cases: Value = serde_json::from_str(include_str!("../../../tests/interop/schedules.json")).expect("JSON");
    let mut words = std::collections::BTreeSet::new();
    for case in cases.as_array().expect("cases") {
        let settings = case["train"].as_str().expect("settings");
        let recipe = recipe(settings);
        words.insert(recipe.schedule.keyword());
        let rates = case["rates"].as_array().expect("rates");
        for (step, want) in rates.iter().enumerate() {
            let (want, found) = (want.as_f64().expect("a rate"), rate(&recipe, step as u64, rates.len() as u64));
            assert!((found - want).abs() <= 1e-6 * want.max(1e-9), "{settings}: step {step}: {found}, not {want}");
        }
    }
    assert_eq!(words.len(), Schedule::KEYWORDS.len(), "a schedule has no case");
}

/// If phases overlap or exceed the run, rates stay between 0 and `lr`.
#[test]
fn rates_stay_in_range_for_overlong_phases() {
    for settings in
        ["warmup: 9", "warmup: 1.0", "warmup: 4  lr_decay: 9", "lr_decay: 9", "lr_decay: 0", "warmup: 5  lr_decay: 0.5"]
    {
        for word in Schedule::KEYWORDS.into_iter().filter(|word| *word == "wsd" || !settings.contains("lr_decay")) {
            let recipe = recipe(&format!("lr: 0.5  schedule: {word}  {settings}"));
            for total in 1..8 {
                let rates: Vec<f64> = (0..=total).map(|step| rate(&recipe, step, total)).collect();
                assert!(rates.iter().all(|rate| (0.0..=0.5).contains(rate)), "{word}, {settings}: {rates:?}");
                assert!(decay_start(&recipe, total) <= total);
            }
        }
    }
}

#[test]
fn schedule_defaults() {
    assert_eq!(recipe("schedule: polynomial").schedule, Schedule::Polynomial { power: 1.0 });
    assert_eq!(recipe("schedule: wsd").schedule, Schedule::Wsd { decay: Phase::Share(0.1) });
}
