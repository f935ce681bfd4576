//! Every function is compared with f64, over floats of every magnitude, at every CPU level that this machine supports.

use std::f64::consts::PI;

use peft_runtime::artifact::Element;

use super::*;
use crate::builder::{define, first};
use crate::codegen;
use crate::interpret::{normal_cdf, normal_density};
use crate::lower::tests::{call, levels};
use crate::target::Machine;
use crate::target::cpu::Cpu;

const LEAST: f64 = f32::MIN_POSITIVE as f64;

/// The error bound of a function, as its documentation names it.
#[derive(Clone, Copy)]
enum Bound {
    /// Units in the last place. A result below the normal numbers may be 0, or the smallest normal number.
    Units(f64),
    Absolute(f64),
    /// Relative to the argument, or absolute if the argument is below 1.
    Relative(f64),
}

struct Function {
    name: &'static str,
    write: fn(&mut Kernel, Val) -> Val,
    exact: fn(f64) -> f64,
    bound: Bound,
    /// The largest argument that is tested.
    largest: f64,
}

const fn function(
    name: &'static str,
    write: fn(&mut Kernel, Val) -> Val,
    exact: fn(f64) -> f64,
    bound: Bound,
) -> Function {
    Function { name, write, exact, bound, largest: f64::INFINITY }
}

impl Function {
    const fn up_to(self, largest: f64) -> Function {
        Function { largest, ..self }
    }
}

const MOST: f64 = f32::MAX as f64;

const FUNCTIONS: [Function; 10] = [
    function("exp", exp, f64::exp, Bound::Units(1.0)),
    function("log", log, |x| if (0.0..LEAST).contains(&x) { f64::NEG_INFINITY } else { x.ln() }, Bound::Units(1.0)),
    function("sin", sin, f64::sin, Bound::Absolute(1e-7)).up_to(1e5),
    function("cos", cos, f64::cos, Bound::Absolute(1e-7)).up_to(1e5),
    function("tanh", tanh, f64::tanh, Bound::Units(1.5)),
    function("sigmoid", sigmoid, |x| 1.0 / (1.0 + (-x).exp()), Bound::Units(2.5)),
    function("gelu", gelu, |x| x * normal_cdf(x), Bound::Relative(1.7e-7)).up_to(MOST),
    function("gelu_grad", gelu_grad, |x| normal_cdf(x) + x * normal_density(x), Bound::Absolute(2e-7)).up_to(MOST),
    function("gelu_tanh", gelu_tanh, |x| x * by_tanh(x)[0], Bound::Relative(1.5e-7)).up_to(MOST),
    function("gelu_tanh_grad", gelu_tanh_grad, |x| by_tanh(x)[1], Bound::Absolute(2.5e-7)).up_to(MOST),
];

/// σ = ½ (1 + tanh u), and the derivative of x σ.
fn by_tanh(x: f64) -> [f64; 2] {
    let root = (2.0 / PI).sqrt();
    let (u, slope) = (root * (x + 0.044_715 * x * x * x), root * (1.0 + 3.0 * 0.044_715 * x * x));
    let [sigma, rest] = [u, -u].map(|u| 1.0 / (1.0 + (-2.0 * u).exp()));
    [sigma, sigma + 2.0 * x * sigma * rest * slope]
}

/// Floats of both signs: many from 2⁻²⁰ to 2¹⁷, where the functions bend, some of every magnitude, all of those around
/// the points where a function changes its formula, infinity and NaN.
fn floats() -> Vec<f32> {
    let bits = |x: f32| x.to_bits();
    let middle = (bits(2f32.powi(-20))..bits(2f32.powi(17))).step_by(199);
    let edges = [87.336_54, 88.722_84, 44.361_42, 0.625, 10.0, 13.0];
    let edges = edges.into_iter().flat_map(|edge| bits(edge) - 64..bits(edge) + 64);
    let all = (0..bits(f32::INFINITY)).step_by(65_521).chain(middle).chain(edges);
    let all = all.chain([f32::INFINITY, f32::NAN].map(bits));
    all.flat_map(|bits| [bits, bits | 1 << 31]).map(f32::from_bits).collect()
}

/// The error, in the unit of the bound.
fn error(x: f32, found: f32, want: f64, bound: Bound) -> f64 {
    // An overflow counts as the float after the largest one.
    let value = if found == f32::INFINITY { 2f64.powi(128) } else { f64::from(found) };
    let gap = (value - want).abs();
    match bound {
        _ if found == want as f32 || found.is_nan() && want.is_nan() => 0.0,
        Bound::Absolute(_) => gap,
        Bound::Relative(_) => gap / f64::from(x.abs()).max(1.0),
        Bound::Units(most) if want.abs() < LEAST => most * gap / LEAST,
        Bound::Units(_) => gap / 2f64.powi(want.abs().log2().floor() as i32 - 23),
    }
}

#[test]
fn every_function_keeps_its_error_bound() {
    // LLVM would take a function named like one of C's library for that function.
    let symbol = |function: &Function| format!("all_{}", function.name);
    let kernels = FUNCTIONS.map(|function| {
        let code = define(Machine::default(), &[Element::F32, Element::F32], 1, |k, buffers, sizes| {
            let ([x, out], [length]) = (first(buffers), first(sizes));
            k.units(|k, _| {
                k.lanes(length, |k, j, mask| {
                    let x = k.load_lanes(x, j, mask);
                    let y = (function.write)(k, x);
                    k.store_lanes(y, out, j, mask);
                });
            });
        });
        code.function(&symbol(&function), 1)
    });
    let folder = tempfile::tempdir().expect("a directory");
    let library = |cpu: Cpu| {
        let path = folder.path().join(format!("{cpu}.so"));
        codegen::compile(&kernels, Machine::Cpu(cpu), None, &path).unwrap_or_else(|e| panic!("{e}"));
        // SAFETY: the library is compiled by this test, and has no constructors.
        (cpu, unsafe { libloading::Library::new(&path) }.expect("a library"))
    };
    let libraries: Vec<_> = levels().into_iter().map(library).collect();
    for function in FUNCTIONS {
        let Function { name, exact, bound, largest, .. } = function;
        let within = |x: &f32| x.is_nan() || f64::from(x.abs()) <= largest;
        let x: Vec<f32> = floats().into_iter().filter(within).collect();
        let want: Vec<f64> = x.iter().map(|&x| exact(x.into())).collect();
        for (cpu, library) in &libraries {
            let mut memory = [x.iter().map(|x| x.to_bits()).collect(), vec![0; x.len()]];
            let places = memory.each_mut().map(|words| (words.as_mut_ptr(), words.len()));
            call(library, &symbol(&function), &places, &[x.len() as i64, 0, 1]);
            let found = memory[1].iter().map(|&word| f32::from_bits(word));
            let errors = x.iter().zip(found).zip(&want).map(|((&x, found), &want)| error(x, found, want, bound));
            let worst = x.iter().zip(errors).max_by(|(_, a), (_, b)| a.total_cmp(b)).expect("a float");
            let (Bound::Units(most) | Bound::Absolute(most) | Bound::Relative(most)) = bound;
            eprintln!("{name} on {cpu}: {:.3e} at {:?}", worst.1, worst.0);
            assert!(worst.1 <= most, "{name} of {:?} on {cpu} is off by {:.3e}, not {most}", worst.0, worst.1);
        }
    }
}
