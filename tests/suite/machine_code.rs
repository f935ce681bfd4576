//! The machine code of compiled gemms: in the inner loop over k of a gemm with frozen weights, more than half of the
//! instructions multiply, and accumulators stay in registers. Timings would be too noisy for a test.

use std::collections::HashMap;
use std::process::Command;

use peft_grammar::model::Precision;
use peft_passes::codegen;
use peft_passes::fuse::Thresholds;
use peft_passes::kernels::{Function, Schedule};
use peft_passes::target::Machine;
use peft_passes::target::cpu::{Cpu, Level};

use crate::cli::kernel_cache;
use crate::paper;

const OBJDUMP: &str = "/usr/lib/llvm-22/bin/llvm-objdump";

/// An innermost loop.
struct Loop<'a> {
    kernel: &'a str,
    instructions: Vec<&'a str>,
}

impl Loop<'_> {
    fn count(&self, matches: impl Fn(&str) -> bool) -> usize {
        self.instructions.iter().filter(|text| matches(text)).count()
    }
}

/// The innermost loops in the output of a disassembler.
fn loops(text: &str) -> Vec<Loop<'_>> {
    let (mut kernel, mut found) = ("", vec![]);
    let mut code: Vec<&str> = vec![];
    let mut places: HashMap<u64, usize> = HashMap::new();
    let number = |hex: &str| u64::from_str_radix(hex.trim().trim_start_matches("0x"), 16).ok();
    for line in text.lines() {
        if let Some((_, name)) = line.strip_suffix(">:").and_then(|line| line.split_once(" <")) {
            (kernel, code, places) = (name, vec![], HashMap::new());
        }
        let Some((address, instruction)) = line.split_once(':') else { continue };
        let Some(address) = number(address) else { continue };
        places.insert(address, code.len());
        code.push(instruction.trim());
        let mut words = instruction.split_whitespace();
        if words.next().is_some_and(|name| name.starts_with('j'))
            && let Some(&start) = words.next().and_then(number).and_then(|target| places.get(&target))
        {
            let body = &code[start..];
            let nested = body[..body.len() - 1].iter().any(|text| text.starts_with('j'));
            if !nested {
                found.push(Loop { kernel, instructions: body.to_vec() });
            }
        }
    }
    found
}

#[test]
fn gemm_accumulators_stay_in_registers() {
    if !std::path::Path::new(OBJDUMP).exists() {
        println!("skipped: there is no {OBJDUMP}");
        return;
    }
    let spec =
        paper::specs().into_iter().find(|spec| spec.name == "webnlg/inducer_lora.peft").expect("a spec").shallow();
    for level in [Level::V3, Level::V4, Level::V4Bf16] {
        let machine = Machine::Cpu(Cpu::Level(level));
        for precision in [Precision::F32, Precision::Bf16] {
            let lowered = spec.lowered(machine, precision, Thresholds::default());
            let of_panels = |function: &Function| match &function.schedule {
                Schedule::Gemm(product) => !product.shape.a_column_major && product.shape.packed,
                _ => false,
            };
            let products = lowered.functions.iter().zip(lowered.kernels()).filter(|(function, _)| of_panels(function));
            let products: Vec<String> = products.map(|(_, text)| text).collect();
            let folder = tempfile::tempdir().expect("a directory");
            let library = folder.path().join("kernels.so");
            codegen::compile(&products, machine, kernel_cache().as_deref(), &library).unwrap_or_else(|e| panic!("{e}"));
            let ran = Command::new(OBJDUMP).args(["-d", "--no-show-raw-insn"]).arg(&library).output();
            let text = String::from_utf8(ran.expect("it runs").stdout).expect("a text");
            let multiplies = |text: &str| text.starts_with("vfmadd") || text.starts_with("vdpbf16ps");
            let mut seen = 0;
            for body in loops(&text) {
                let (all, sums) = (body.instructions.len(), body.count(multiplies));
                // Only loops unrolled over several k steps are counted.
                if sums < 90 || all > 300 {
                    continue;
                }
                seen += 1;
                let stack = body.count(|text| text.contains("(%rsp)") || text.contains("(%rbp)"));
                let name = body.kernel;
                assert!(2 * sums > all && stack <= 2, "{machine}, {name}: {sums} of {all}, {stack} on the stack");
            }
            assert!(seen >= 5, "{machine} in {precision:?}: {seen} of {} products", products.len());
        }
    }
}
