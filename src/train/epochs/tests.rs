use peft_grammar::model::{BatchSize, Recipe};

use super::Epochs;
use crate::data::{Dataset, Example, Goal};

/// Examples with these numbers of tokens.
fn data(lengths: &[usize]) -> Dataset {
    let example =
        |&length: &usize| Example { ids: vec![length as i32; length], types: vec![0; length], goal: Goal::Class(0) };
    let mut data = Dataset::default();
    data.examples = lengths.iter().map(example).collect();
    data
}

fn recipe(settings: &str) -> Recipe {
    let spec = format!("model = gpt2(layers: 1)\ntrain {{ {settings} }}\n");
    peft_grammar::check("spec", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}")).train
}

#[test]
fn sequence_batches_give_equal_epochs() {
    let data = data(&[3; 10]);
    let mut epochs = Epochs::of(&recipe("batch: 2  accumulate: 2"), &data);
    assert_eq!([0, 2, 3].map(|step| epochs.around(step)), [(0, 0..3), (0, 0..3), (1, 3..6)]);
    for (epochs, total) in [("2", 6), ("0.5", 2), ("1.1", 4)] {
        let recipe = recipe(&format!("batch: 2  accumulate: 2  epochs: {epochs}"));
        assert_eq!(Epochs::of(&recipe, &data).total(&recipe), total, "{epochs} epochs");
    }
}

/// Each epoch ends with its own batches, and the total counts the steps of all epochs.
#[test]
fn token_batches_give_counted_epochs() {
    let data = data(&[5, 1, 4, 2, 3, 5, 1, 2, 4, 3, 1]);
    for accumulate in [1, 3] {
        let recipe = recipe(&format!("batch: 6 tokens  accumulate: {accumulate}  epochs: 20"));
        assert_eq!(recipe.batch, BatchSize::Tokens { tokens: 6 });
        let mut epochs = Epochs::of(&recipe, &data);
        let (mut step, mut lengths) = (0, std::collections::BTreeSet::new());
        for epoch in 0..20 {
            let batches: Vec<_> = epochs.batches(epoch).collect();
            assert!(batches.iter().all(|batch| batch.tokens() <= 6));
            let mut ids: Vec<i32> = batches.iter().flat_map(|batch| batch.lengths.clone()).collect();
            ids.sort_unstable();
            assert_eq!(ids, [1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
            let steps = (batches.len() as u64).div_ceil(accumulate);
            lengths.insert(steps);
            for at in [step, step + steps - 1] {
                assert_eq!(epochs.around(at), (epoch, step..step + steps));
            }
            step += steps;
        }
        assert_eq!(Epochs::of(&recipe, &data).total(&recipe), step);
        assert!(lengths.len() > 1, "{lengths:?}");
        let half = Recipe { epochs: 0.5, ..recipe.clone() };
        let (_, first) = epochs.around(0);
        assert_eq!(epochs.total(&half), first.end.div_ceil(2));
    }
}
