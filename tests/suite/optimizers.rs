//! Twenty steps of every optimizer in the interpreter, on the CPU and in PTX, against PyTorch.
//!
//! `tests/interop/optimizer_fixtures.py` wrote the expected values.

use std::collections::BTreeSet;

use peft_grammar::model::{DecayScope, Optimizer, Recipe};
use peft_grammar::names::OptimizerEntry::{self, Accumulate, Accumulated};
use peft_grammar::names::{GRAD_NORM, Input, Vector};
use peft_passes::interpret::optimizer::{TrainedValue, accumulate, step, update_average};
use peft_passes::lower::{self, lower};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Chip;
use peft_runtime::artifact::Tensor;
use peft_runtime::{Inputs, Numbers, Session};
use serde_json::Value;

use crate::parity::programs;
use crate::ptx::{InterpretedGpu, module};

const TOLERANCE: f64 = 1e-6;

struct Case {
    name: String,
    recipe: Recipe,
    /// Each tensor's learning rate, relative to the step's.
    factors: [Option<f64>; 2],
    want: Vec<f64>,
    averages: Option<Vec<f64>>,
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn narrow(numbers: &[f64]) -> Vec<f32> {
    numbers.iter().map(|&x| x as f32).collect()
}

fn case(case: &Value) -> Case {
    let settings = case["train"].as_object().expect("settings");
    let written: Vec<String> = settings.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    let spec = format!("model = gpt2(layers: 1)\ntrain {{ {} }}\n", written.join("  "));
    let model = peft_grammar::check("spec", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}"));
    let factors = [0, 1].map(|tensor| case["factors"][tensor].as_f64());
    let name = format!("{}, factors {factors:?}", written.join(", "));
    let averages = case.get("averages").map(numbers);
    Case { name, recipe: model.train, factors, want: numbers(&case["values"]), averages }
}

/// A matrix, and a vector that has weight decay only if all tensors have.
fn tensors(decays: DecayScope, factors: [Option<f64>; 2]) -> Vec<Tensor> {
    let tensor = |name: &str, shape: &[u64], lr_factor| Tensor {
        name: name.into(),
        shape: shape.to_vec(),
        trainable: Some((0, shape[0])),
        decay: decays == DecayScope::All || shape.len() > 1,
        lr_factor,
    };
    vec![tensor("a", &[5, 7], factors[0]), tensor("b", &[9], factors[1])]
}

fn session(optimizer: Optimizer, machine: Machine, tensors: &[Tensor], weights: Vec<Numbers>) -> Session {
    let options = lower::Options { machine, optimizer, ..lower::Options::default() };
    let lowered = lower(&[], tensors, options).expect("lowered");
    let mut session = match machine {
        Machine::Cpu(_) => Session::new(programs(vec![lowered]).remove(0), weights, 1),
        Machine::Cuda(_) => {
            let simulated = InterpretedGpu::new(module(&lowered.kernels(), machine), &lowered.manifest);
            Session::with_backend(Box::new(simulated), lowered.manifest, weights)
        }
    }
    .expect("a session");
    session.poison = true;
    session
}

fn close(found: &[f64], want: &[f64], case: &Case, tolerance: f64, what: &str) {
    for (i, (found, want)) in found.iter().zip(want).enumerate() {
        let gap = (found - want).abs() / want.abs().max(0.1);
        assert!(gap <= tolerance, "{what}, {}: value {i} is {found}, not {want}", case.name);
    }
}

#[test]
fn twenty_steps_match_pytorch() {
    let fixture: Value = serde_json::from_str(include_str!("../interop/optimizers.json")).expect("JSON");
    let (rates, values) = (numbers(&fixture["rates"]), numbers(&fixture["values"]));
    let gradients: Vec<Vec<f64>> = fixture["gradients"].as_array().expect("steps").iter().map(numbers).collect();
    let mut words = BTreeSet::new();
    for case in fixture["cases"].as_array().expect("cases").iter().map(case) {
        let recipe = &case.recipe;
        words.insert(recipe.optimizer.keyword());
        let mut trained: Vec<TrainedValue> =
            values.iter().map(|&value| TrainedValue { value, ..TrainedValue::default() }).collect();
        let tensors = tensors(recipe.decays, case.factors);
        for (part, tensor) in [0..35, 35..44].into_iter().zip(&tensors) {
            let factor = tensor.lr_factor.unwrap_or(1.0);
            trained[part].iter_mut().for_each(|t| (t.decays, t.lr_factor) = (tensor.decay, factor));
        }
        let mut averages = vec![0.0; 44];
        let norms: Vec<f64> = (0..)
            .zip(&rates)
            .zip(&gradients)
            .map(|((at, &lr), gradients)| {
                let norm = step(recipe, lr, at, &mut trained, gradients);
                update_average(recipe, at, &mut averages, &trained);
                norm
            })
            .collect();
        assert!(norms.iter().any(|norm| *norm < 1.0) && norms.iter().any(|norm| *norm > 1.0), "{norms:?}");
        close(&trained.iter().map(|t| t.value).collect::<Vec<_>>(), &case.want, &case, 1e-12, "the interpreter");
        if let Some(want) = &case.averages {
            close(&averages, want, &case, 1e-12, "averages of the interpreter");
        }

        for machine in [Machine::default(), Machine::Cuda(Chip::Sm70)] {
            let weights = [&values[..35], &values[35..]].map(|part| Numbers::from(&narrow(part)[..]));
            let mut session = session(recipe.optimizer, machine, &tensors, weights.into());
            let moments = recipe.optimizer.moments();
            assert_eq!(session.updated_vectors(), [&[Vector::Values], moments, &[Vector::Averages]].concat());
            for (at, gradients) in gradients.iter().enumerate() {
                session.set_flat(Vector::Gradients, &narrow(gradients)).expect("written");
                let floats = [(Input::Hyper.name().to_string(), recipe.hyper(rates[at], at as u64))].into();
                session.run(OptimizerEntry::Update.name(), &Inputs { floats, ..Inputs::default() }).expect("a run");
                let norm = f64::from(session.output(GRAD_NORM).expect("an output").1[0]);
                assert!((norm - norms[at]).abs() <= TOLERANCE * norms[at], "step {at}: {norm}, not {}", norms[at]);
                if let Some(shares) = recipe.average_weights(at as u64) {
                    let floats = [(Input::AverageShares.name().to_string(), narrow(&shares))].into();
                    let inputs = Inputs { floats, ..Inputs::default() };
                    session.run(OptimizerEntry::Average.name(), &inputs).expect("a run");
                }
            }
            let found: Vec<f64> = session.flat(Vector::Values).expect("read").iter().map(|&x| f64::from(x)).collect();
            close(&found, &case.want, &case, TOLERANCE, &machine.to_string());
            if let Some(want) = &case.averages {
                let found = session.flat(Vector::Averages).expect("read");
                let found: Vec<f64> = found.iter().map(|&x| f64::from(x)).collect();
                close(&found, want, &case, TOLERANCE, &format!("averages on {machine}"));
            }
            for (moment, of) in recipe.optimizer.moments().iter().zip([|t: &TrainedValue| t.m, |t: &TrainedValue| t.v])
            {
                let found = session.flat(*moment).expect("read");
                for (found, want) in found.iter().zip(trained.iter().map(of)) {
                    let gap = (f64::from(*found) - want).abs();
                    assert!(
                        gap <= 2e-6 * want.abs().max(0.1),
                        "{machine}, {}: {moment} {found}, not {want}",
                        case.name
                    );
                }
            }
        }
    }
    assert_eq!(words.len(), Optimizer::ALL.len(), "an optimizer has no case");
}

/// Gradients of three batches are summed with their shares of the targets as weights.
#[test]
fn accumulation_weights_gradients_by_targets() {
    let fixture: Value = serde_json::from_str(include_str!("../interop/optimizers.json")).expect("JSON");
    let gradients = fixture["gradients"].as_array().expect("steps").iter().map(numbers).take(3);
    let parts: Vec<(usize, Vec<f64>)> = [1, 5, 94].into_iter().zip(gradients).collect();
    let want = accumulate(&parts);
    let zeros = || [35, 9].map(|length| Numbers::from(&vec![0.0; length][..])).into();
    for machine in [Machine::default(), Machine::Cuda(Chip::Sm70)] {
        let mut session = session(Optimizer::AdamW, machine, &tensors(DecayScope::Matrices, [None; 2]), zeros());
        // The sums of an earlier step are overwritten.
        session.set_flat(Vector::Sums, &[1e9; 44]).expect("written");
        let shares = [(Accumulate, [0.0, 0.01]), (Accumulate, [1.0, 0.05]), (Accumulated, [0.94, 1.0])];
        for ((entry, shares), (_, gradients)) in shares.into_iter().zip(&parts) {
            session.set_flat(Vector::Gradients, &narrow(gradients)).expect("written");
            let floats = [(Input::Shares.name().to_string(), shares.to_vec())].into();
            session.run(entry.name(), &Inputs { floats, ..Inputs::default() }).expect("a run");
        }
        for (found, want) in session.flat(Vector::Gradients).expect("read").iter().zip(&want) {
            assert!((f64::from(*found) - want).abs() <= 1e-6 * want.abs().max(0.1), "{machine}: {found}, not {want}");
        }
    }
}
