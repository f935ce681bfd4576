//! PTX through NVIDIA's own assembler, if `PEFTC_PTXAS` names it: it takes every kernel, for every chip. `make ptxas`
//! fetches it; no GPU is needed.

use std::path::Path;
use std::process::Command;

use peft_passes::codegen;
use peft_passes::cuda::Chip;
use peft_passes::dialect::Dialect;
use peft_passes::machine::Machine;
use peft_passes::pipeline::{self, Entry, Options};

/// What a kernel takes of a chip.
#[derive(Default)]
struct Usage {
    kernel: String,
    registers: u64,
    shared: u64,
    spilled: u64,
}

/// Of every kernel, from what `ptxas -v` says.
fn usages(said: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = vec![];
    let number = |text: &str, before: &str| {
        let (text, _) = text.split_once(before)?;
        text.rsplit(' ').next()?.parse::<u64>().ok()
    };
    for line in said.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or(rest).to_string();
            usages.push(Usage { kernel, ..Usage::default() });
        }
        let Some(last) = usages.last_mut() else { continue };
        last.spilled += number(line, " bytes spill stores").unwrap_or(0);
        last.registers = last.registers.max(number(line, " registers").unwrap_or(0));
        last.shared = last.shared.max(number(line, " bytes smem").unwrap_or(0));
    }
    usages
}

#[test]
fn every_kernel_is_assembled() {
    let Some(ptxas) = std::env::var_os("PEFTC_PTXAS").filter(|path| !path.is_empty()) else {
        println!("skipped: PEFTC_PTXAS is not set");
        return;
    };
    let folder = tempfile::tempdir().expect("a directory");
    let (text, code) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
    let dialect = Dialect::new().expect("a dialect");
    let specs = [("models/paper/nlg/inducer_lora.peft", "bf16"), ("models/demo/sentiment.peft", "f32")];
    for (spec, precision) in specs {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(spec);
        let set = [("train.precision".to_string(), precision.to_string())];
        let model = peftc::spec::load(&path, &set, false).unwrap_or_else(|e| panic!("{e}"));
        for (chip, name) in Chip::ALL {
            let machine = Machine::Cuda(chip);
            let options = Options { machine, ..Options::default() };
            let compiled = pipeline::run(&dialect, &model, &[Entry::Forward, Entry::Train], &options);
            let lowered = compiled.unwrap_or_else(|e| panic!("{e}")).lowered.expect("the whole way");
            let ptx = codegen::ptx(&dialect, &lowered.kernels, machine).unwrap_or_else(|e| panic!("{e}"));
            std::fs::write(&text, ptx).expect("written");
            let mut command = Command::new(&ptxas);
            command.args(["-v", &format!("-arch={name}"), "-o"]).args([&code, &text]);
            let run = command.output().expect("it starts");
            let said = String::from_utf8_lossy(&run.stderr);
            assert!(run.status.success(), "{spec} for {name}: {said}");
            let mut usages = usages(&said);
            assert_eq!(usages.len(), lowered.kernels.len(), "{said}");
            usages.sort_by_key(|usage| std::cmp::Reverse(usage.registers));
            println!(
                "{spec} for {name}: registers, bytes of shared memory and of spills; the largest of {}",
                usages.len()
            );
            for Usage { kernel, registers, shared, spilled } in &usages[..12] {
                println!("  {registers:>3} {shared:>6} {spilled:>4}  {kernel}");
            }
            // Some words on the way into a loop cost little.
            for Usage { kernel, spilled, .. } in usages {
                assert!(spilled <= 128, "`{kernel}` spills {spilled} bytes on {name}");
            }
        }
    }
}
