//! Ten steps of AdamW against PyTorch: losses, gradient norms, and the final values.

use peftc::{exchange, train};

use crate::fixtures;
use crate::parity::{fused, session};

const TOLERANCE: f64 = 1e-4;

#[test]
fn ten_adamw_steps_match_pytorch() {
    for fixture in fixtures::all("trace_") {
        let model = fixture.model();
        let mut session = session(&fixture, &model, &fused(true));
        let optimizer = &fixture.json["optimizer"];
        let rates: Vec<f64> =
            optimizer["lr"].as_array().expect("rates").iter().map(|x| x.as_f64().expect("a rate")).collect();
        let order = fixture.json["order"].as_array().expect("an order");
        let (losses, norms) = (fixture.floats("expect.losses"), fixture.floats("expect.grad_norms"));
        let total = rates.len() as u64;
        for (s, lr) in rates.iter().enumerate() {
            assert!((train::rate(&model.train, s as u64, total) - lr).abs() < 1e-12, "{}: rate {s}", fixture.name);
            let prefix = format!("inputs.{}.", order[s].as_u64().expect("a batch"));
            let padded = exchange::batch(&fixture.file, &prefix, &fixture.path, &model).expect("a batch");
            let (loss, norm) = train::step(&mut session, &model.train, &padded.batch, s as u64, total).expect("a step");
            let close = |found: f64, want: f32| (found - f64::from(want)).abs() <= TOLERANCE * f64::from(want.abs());
            assert!(close(loss, losses[s]), "{}: loss {s} is {loss}, not {}", fixture.name, losses[s]);
            assert!(close(norm, norms[s]), "{}: norm {s} is {norm}, not {}", fixture.name, norms[s]);
        }
        for (index, param) in model.params.iter().enumerate() {
            let Some((start, _)) = session.manifest().tensors[index].trainable else { continue };
            let want = fixture.floats(&format!("final.{}", param.name));
            let found = session.values(index).expect("read");
            let from = start as usize * session.manifest().tensors[index].row() as usize;
            let want = &want[from..from + found.len()];
            let largest = want.iter().fold(0.0_f64, |m, x| m.max(f64::from(x.abs())));
            for (f, w) in found.iter().zip(want) {
                let gap = f64::from((f - w).abs());
                assert!(gap <= TOLERANCE * largest.max(0.1), "{}: `{}` ends {f}, not {w}", fixture.name, param.name);
            }
        }
    }
}
