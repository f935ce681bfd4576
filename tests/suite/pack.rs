//! Packed conversations have the loss and the gradients of one example per turn.

use std::collections::HashMap;

use peft_grammar::names::{Input, Output};
use peft_passes::dialect::Dialect;
use peft_passes::interpret::{self, Data};
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peftc::data::{Batch, Dataset, Tokenizer};
use peftc::exchange::inputs;

use crate::fixtures::{self, Fixture};
use crate::parity::{arguments, fused, session};

/// A gradient in f32 is a sum over the batch's tokens, and packing changes the number and the order of the terms. A sum
/// of n terms has an error of up to n · 2⁻²⁴ relative to the terms, which is this value for the roughly 170 terms here.
const TOLERANCE: f64 = 1e-5;

const WORDS: [&str; 9] = ["[UNK]", "a", "b", "c", "d", "e", "f", "g", "h"];

/// Two conversations with stories. The first one contains the same answer twice.
const ROWS: &str = r#"
{"story": "a b c d e f g h b d f", "turns": [{"q": "a c", "a": "e"}, {"q": "b", "a": "g h"}, {"q": "b h a", "a": "g h"}]}
{"story": "h g f e d", "turns": [{"q": "d", "a": "c b"}, {"q": "a", "a": "a"}, {"q": "f f", "a": "e c a"}, {"q": "h", "a": "d"}]}
"#;

const TURNS: &str = "<p> {story} (before: <q> {turns.q} <a> {turns.a})* <q> {turns.q} <a> {turns.a} <e>";

/// Without a history in the template, several examples of a row have targets at the same position.
const ALIKE: &str = "<p> {story} <q> <a> <e> {turns.q}";

/// One batch of the rows, with one example per turn or packed.
fn batch(pack: bool, template: &str) -> Batch {
    let target = if template == ALIKE { "<e>" } else { "<a>" };
    let spec = format!(
        "model = gpt2(layers: 1, vocab: 97, context: 64)\n\
         task t {{ special: [\"<p>\", \"<q>\", \"<a>\", \"<e>\"]  each: \"turns\"  pack: {pack}\n\
         template: \"{template}\"  target: \"{target}\" }}"
    );
    let task = peft_grammar::check("t.peft", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}")).task;
    let folder = tempfile::tempdir().expect("a directory");
    let vocabulary: serde_json::Map<_, _> =
        WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    });
    let write = |name: &str, content: &str| std::fs::write(folder.path().join(name), content).expect("written");
    write("tokenizer.json", &tokenizer.to_string());
    write("rows.jsonl", ROWS.trim_start());
    let tokenizer = Tokenizer::load(folder.path(), &task, 97).unwrap_or_else(|e| panic!("{e}"));
    let data = Dataset::load(&folder.path().join("rows.jsonl"), &task, &tokenizer).unwrap_or_else(|e| panic!("{e}"));
    Batch::pack(data.examples.iter())
}

/// The loss, and the gradient of each trainable tensor, by name.
type Results = HashMap<String, Vec<f64>>;

fn close(found: &Results, want: &Results, tolerance: f64, what: &str) {
    assert_eq!(found.len(), want.len(), "{what}");
    for (name, want) in want {
        let largest = want.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        assert!(largest > 0.0, "{what}: `{name}` is zero");
        let gap = found[name].iter().zip(want).map(|(found, want)| (found - want).abs()).fold(0.0, f64::max);
        assert!(gap <= tolerance * largest, "{what}: `{name}` differs by {gap:.3e}, its largest is {largest:.3e}");
    }
}

/// Fixtures with an adapter and with full fine-tuning, with random trained values and without dropout.
fn fixtures() -> [Fixture; 2] {
    ["gpt2_inducer_lora_strong", "gpt2_finetune"].map(fixtures::one)
}

#[test]
fn packed_turns_have_the_gradients_of_separate_turns() {
    let batches = [TURNS, ALIKE].map(|template| [false, true].map(|pack| batch(pack, template)));
    let [[separate, packed], [_, alike]] = &batches;
    assert_eq!((separate.sequences(), packed.sequences()), (7, 2));
    assert!(2 * packed.tokens() < separate.tokens(), "{} and {}", packed.tokens(), separate.tokens());
    let mut places = alike.targets.clone();
    places.sort_unstable();
    assert!(places.windows(2).any(|pair| pair[0] == pair[1]), "{places:?}");
    for fixture in fixtures() {
        let model = fixture.model();
        let mut session = session(&fixture, &model, &fused(true));
        for [separate, packed] in &batches {
            assert_eq!(separate.labels.len(), packed.labels.len());
            let [separate, packed] = [separate, packed].map(|batch| -> Results {
                session.run(Entry::Grad.name(), &inputs(batch, [0, 0])).expect("a run");
                let names = session.outputs().into_iter().filter(|name| wanted(name));
                let floats =
                    |name: &str| session.output(name).expect("an output").1.iter().map(|&x| f64::from(x)).collect();
                names.map(|name| (name.clone(), floats(&name))).collect()
            });
            close(&packed, &separate, TOLERANCE, &fixture.name);
        }
    }
}

/// Whether an output is the loss or a gradient.
fn wanted(name: &str) -> bool {
    matches!(Output::from_name(name), Output::Loss | Output::Gradient(_))
}

/// The same in the reference interpreter in f64, where the two differ only by rounding.
#[test]
fn packed_turns_match_in_the_interpreter() {
    for fixture in fixtures() {
        let model = fixture.model();
        let options = Options { until: Stage::Grad, ..Options::default() };
        let dialect = Dialect::new().expect("a dialect");
        let compiled = pipeline::run(&dialect, &model, &[Entry::Grad], &options);
        let graph = compiled.unwrap_or_else(|e| panic!("{}: {e}", fixture.name)).graphs.remove(0);
        let [separate, packed] = [false, true].map(|pack| -> Results {
            let inputs = inputs(&batch(pack, TURNS), [0, 0]);
            let lengths: Vec<usize> = inputs.lengths.iter().map(|&n| n as usize).collect();
            let sizes = interpret::Batch::new(&lengths, inputs.ints[Input::Targets.name()].len());
            let args: HashMap<String, Data> = arguments(&graph, &fixture, &model, &inputs);
            let results = interpret::run(&graph, &sizes, &args).expect("interpreted");
            results
                .into_iter()
                .filter(|(name, _)| wanted(name))
                .map(|(name, data)| (name, data.floats().to_vec()))
                .collect()
        });
        close(&packed, &separate, 1e-12, &fixture.name);
    }
}
