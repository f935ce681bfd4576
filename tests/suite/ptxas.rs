//! PTX through NVIDIA's own assembler, if `PEFTC_PTXAS` names it. It accepts every kernel for every chip, and no kernel
//! spills registers. `make ptxas` fetches it; no GPU is needed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use peft_grammar::model::Precision;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::fuse::Thresholds;
use peft_passes::kernels::Schedule;
use peft_passes::lower::{Lowered, link};
use peft_passes::pipeline::{self, Entry, Options};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Chip;

use crate::{env_or_skip, paper};

/// The resources that a kernel uses.
#[derive(Default)]
struct Usage {
    kernel: String,
    registers: u64,
    shared: u64,
    spilled: u64,
}

/// Parses the resources of every kernel from the output of `ptxas -v`.
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

/// Assembles kernels and returns their resources. No kernel may spill registers.
fn assembled(ptxas: &OsStr, kernels: &[String], (chip, name): (Chip, &str)) -> Vec<Usage> {
    let folder = tempfile::tempdir().expect("a directory");
    let (text, code) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
    let ptx = codegen::ptx(&Dialect::new().expect("a dialect"), kernels, Machine::Cuda(chip));
    let ptx = ptx.unwrap_or_else(|e| panic!("{e}"));
    // A 64-bit division would be a call, and shows that an index has 64 bits where 32 suffice.
    let wide = ptx.lines().find(|line| ["div.u64", "div.s64", "rem.u64", "rem.s64"].iter().any(|op| line.contains(op)));
    assert_eq!(wide, None, "for {name}");
    std::fs::write(&text, ptx).expect("written");
    let mut command = Command::new(ptxas);
    command.args(["-v", &format!("-arch={name}"), "-o"]).args([&code, &text]);
    let run = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "for {name}: {said}");
    let usages = usages(&said);
    assert_eq!(usages.len(), kernels.len(), "{said}");
    for Usage { kernel, spilled, .. } in &usages {
        assert_eq!(*spilled, 0, "`{kernel}` spills {spilled} bytes on {name}");
    }
    usages
}

#[test]
fn every_kernel_is_assembled() {
    let Some(ptxas) = env_or_skip("PEFTC_PTXAS") else { return };
    let dialect = Dialect::new().expect("a dialect");
    let mut shown = String::new();
    let specs = [("models/paper/webnlg/inducer_lora.peft", "bf16"), ("models/demo/sentiment.peft", "f32")];
    for (spec, precision) in specs {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(spec);
        let set = [("train.precision".to_string(), precision.to_string())];
        let model = peftc::spec::load(&path, &set, false).unwrap_or_else(|e| panic!("{e}"));
        for (chip, name) in Chip::ALL {
            let options = Options { machine: Machine::Cuda(chip), ..Options::default() };
            let compiled = pipeline::run(&dialect, &model, &[Entry::Forward, Entry::Train], &options);
            let lowered = compiled.unwrap_or_else(|e| panic!("{e}")).lowered.expect("the whole way");
            let usages = assembled(&ptxas, &lowered.kernels(), (chip, name));
            let held = kinds(&lowered, &usages, chip);
            let held: Vec<String> = held.iter().map(|kind| format!("  {kind}")).collect();
            shown += &format!("{spec}, {name}\n{}\n", held.join("\n"));
        }
    }
    insta::assert_snapshot!(shown);
}

/// Assembles the kernels of all specs, in f32 and in half precision.
fn every_kernel_of_the_paper(chip: Chip) {
    let Some(ptxas) = env_or_skip("PEFTC_PTXAS") else { return };
    let lowered = |precision| {
        let specs = paper::specs().into_iter().map(|spec| spec.shallow());
        specs.map(move |spec| spec.lowered(Machine::Cuda(chip), precision, Thresholds::default()))
    };
    let mut all: Vec<Lowered> = [Precision::F32, Precision::Bf16].into_iter().flat_map(lowered).collect();
    let kernels = link(&mut all);
    assert!(kernels.len() > 200);
    assembled(&ptxas, &kernels, (chip, chip.name()));
}

#[test]
fn paper_kernels_assemble_without_spills_on_sm_70() {
    every_kernel_of_the_paper(Chip::Sm70);
}

#[test]
fn paper_kernels_assemble_without_spills_on_sm_80() {
    every_kernel_of_the_paper(Chip::Sm80);
}

#[test]
fn paper_kernels_assemble_without_spills_on_sm_90() {
    every_kernel_of_the_paper(Chip::Sm90);
}

/// One line for each kind of kernel, without its epilogue: the number of kernels, and the resources of the one with the
/// lowest occupancy.
fn kinds(lowered: &Lowered, usages: &[Usage], chip: Chip) -> Vec<String> {
    let stem = |usage: &Usage| {
        let at = lowered.manifest.kernels.iter().position(|kernel| *kernel == usage.kernel).expect("one of them");
        let function = &lowered.functions[at];
        if let Schedule::Elementwise(_) = function.schedule { "elementwise".into() } else { function.name_stem() }
    };
    let mut kinds: BTreeMap<String, Vec<&Usage>> = BTreeMap::new();
    usages.iter().for_each(|usage| kinds.entry(stem(usage)).or_default().push(usage));
    let show = |(stem, usages): (String, Vec<&Usage>)| {
        let worst = usages.iter().min_by_key(|u| (chip.resident_warps(u.registers, u.shared), u64::MAX - u.registers));
        let Usage { registers, shared, .. } = worst.expect("at least one");
        let held = chip.resident_warps(*registers, *shared);
        format!("{:>3} {stem:<28} {registers:>3} registers {shared:>6} bytes shared {held:>2} warps", usages.len())
    };
    kinds.into_iter().map(show).collect()
}
