//! Interoperability with Hugging Face PEFT and transformers, in both directions.
//!
//! A case in `tests/interop/cases` holds a base model, an adapter, and the logits that PEFT computes with both, written
//! by `tests/interop/make.py`; its `spec.peft` describes the same model. The last test runs Python itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peft_runtime::adapter::{self, Data, TensorFile};

use crate::cli::Bench;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop")
}

/// Every case whose name starts with `prefix`.
fn cases(prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("cases")).expect("the cases are part of the repository");
    let mut cases: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    cases.retain(|case| name(case).starts_with(prefix));
    cases.sort();
    assert!(!cases.is_empty(), "no case starts with `{prefix}`");
    cases
}

fn name(case: &Path) -> String {
    case.file_name().expect("a name").to_string_lossy().into_owned()
}

/// Whether the adapter can be merged. A prefix is not a matrix, so it cannot.
fn merges(case: &Path) -> bool {
    !name(case).contains("prefix")
}

fn done(bench: &Bench, args: &[&str], paths: &[&Path]) {
    let paths = paths.iter().map(|p| p.as_os_str());
    let all = args.iter().map(std::ffi::OsStr::new).chain(paths);
    let ran = bench.peftc(all);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.err);
}

/// Compares the logits in `out` with those of PEFT, at tokens that are not padding.
fn compare(case: &Path, out: &Path, what: &str) {
    let logits = |file: &TensorFile, name: &str| match &file.tensors[name].data {
        Data::F32(x) => x.clone(),
        _ => panic!("logits are f32"),
    };
    let want = logits(&adapter::load(&case.join("case.safetensors")).expect("sound"), "expect.logits");
    let found = logits(&adapter::load(out).expect("sound"), "logits");
    assert_eq!(found.len(), want.len(), "{}: {what}", name(case));
    let gap = found.iter().zip(&want).map(|(f, w)| (f - w).abs()).fold(0.0, f32::max);
    assert!(gap <= 1e-5, "{}: {what} is off by {gap}", name(case));
}

/// Whether the adapter's initialisation depends on the base model, which `import` does not read.
fn residual(case: &Path) -> bool {
    name(case).contains("residual")
}

/// Imports PEFT's adapter, exports it and merges it, all below the folder `to`.
fn write(bench: &Bench, case: &Path, to: &Path) {
    let (spec, base, foreign) = (case.join("spec.peft"), case.join("base"), case.join("adapter"));
    let own = to.join("adapter.safetensors");
    done(bench, &["import"], &[&spec, &foreign, Path::new("-o"), &own]);
    let exported = to.join("exported");
    done(bench, &["export", "--format", "peft"], &[&spec, Path::new("--adapter"), &own, Path::new("-o"), &exported]);
    if merges(case) {
        let args = [spec.as_path(), Path::new("--weights"), &base, Path::new("--adapter"), &own, Path::new("-o")];
        done(bench, &["merge"], &[&args[..], &[&to.join("merged")]].concat());
    }
}

fn round_trip(prefix: &str) {
    let bench = Bench::new();
    for case in cases(prefix).into_iter().filter(|case| !residual(case)) {
        let to = bench.path(&name(&case));
        let (spec, base, inputs) = (case.join("spec.peft"), case.join("base"), case.join("case.safetensors"));
        write(&bench, &case, &to);
        let out = to.join("out.safetensors");
        let run = |spec: &Path, weights: &Path, adapter: Option<&Path>| {
            let mut paths = vec![spec, Path::new("--inputs"), &inputs, Path::new("--weights"), weights];
            paths.extend(adapter.map(|a| [Path::new("--adapter"), a]).into_iter().flatten());
            paths.extend([Path::new("-o"), &out]);
            done(&bench, &["run", "--entry", "forward", "--overwrite"], &paths);
        };
        run(&spec, &base, Some(&case.join("adapter")));
        compare(&case, &out, "PEFT's adapter");
        run(&spec, &base, Some(&to.join("exported")));
        compare(&case, &out, "the exported adapter");
        if merges(&case) {
            let text = fs::read_to_string(&spec).expect("readable");
            let (start, task) = (text.find("tune").expect("a tune block"), text.find("task").unwrap_or(text.len()));
            let plain = bench.write("plain.peft", format!("{}{}", &text[..start], &text[task..]));
            run(&plain, &to.join("merged"), None);
            compare(&case, &out, "the merged model");
        } else {
            let args =
                ["--adapter", &to.join("adapter.safetensors").to_string_lossy(), "-o", "/dev/null/x", "--weights"]
                    .map(str::to_string);
            let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
            let (spec, base) = (spec.to_string_lossy(), base.to_string_lossy());
            args.extend([&*base, &spec]);
            args.insert(0, "merge");
            bench.refuses(&args, 1, &["`prefix` at layers.0.attention", "not affine"]);
        }
        if !name(&case).starts_with("gpt2") && !name(&case).ends_with("tied") {
            // Without fused matrices and tied tables the exported file is bit-identical to PEFT's.
            let read = |dir: &Path| adapter::load(&dir.join("adapter_model.safetensors")).expect("sound").tensors;
            // PEFT writes tensors that both `modules_to_save` and `bias` name three times.
            let mut given = read(&case.join("adapter"));
            given.retain(|name, _| !name.contains(".modules_to_save.") && !name.contains(".original_module."));
            assert!(read(&to.join("exported")) == given, "{}: other bits", name(&case));
        }
    }
}

/// The residual base models of PiSSA and OLoRA are those that PEFT computes.
#[test]
fn residual_base_models_match_peft() {
    let bench = Bench::new();
    for case in cases("").into_iter().filter(|case| residual(case)) {
        let (spec, base, adapter) = (case.join("spec.peft"), case.join("base"), case.join("adapter"));
        let (inputs, out) = (case.join("case.safetensors"), bench.path("out.safetensors"));
        let run = ["run", "--entry", "forward", "--overwrite"];
        let given = [&spec, Path::new("--inputs"), &inputs, Path::new("-o"), &out, Path::new("--weights")];
        done(&bench, &run, &[&given[..], &[&base, Path::new("--adapter"), &adapter]].concat());
        compare(&case, &out, "PEFT's adapter");
        let merged = bench.path(&name(&case));
        let paths = [&spec, Path::new("--weights"), &base, Path::new("--adapter"), &adapter, Path::new("-o"), &merged];
        done(&bench, &["merge"], &paths);
        let text = fs::read_to_string(&spec).expect("readable");
        let plain = bench.write("plain.peft", &text[..text.find("tune").expect("a tune block")]);
        let given = [&plain, Path::new("--inputs"), &inputs, Path::new("-o"), &out, Path::new("--weights")];
        done(&bench, &run, &[&given[..], &[&merged]].concat());
        compare(&case, &out, "the merged model");
        let (spec, adapter, own) = (spec.to_string_lossy(), adapter.to_string_lossy(), bench.path("own"));
        let words = ["initial values are subtracted from", "`eval`", "path_initial_model_for_weight_conversion"];
        bench.refuses(&["import", &spec, &adapter, "-o", &own.to_string_lossy()], 3, &words);
    }
}

#[test]
fn gpt2_adapters_round_trip() {
    round_trip("gpt2_");
}

#[test]
fn roberta_adapters_round_trip() {
    round_trip("roberta_");
}

#[test]
fn bert_adapters_round_trip() {
    round_trip("bert_");
}

#[test]
fn llama_adapters_round_trip() {
    round_trip("llama_");
}

/// PEFT and transformers load the exported and the merged files and compute the same logits.
#[test]
fn written_files_load_in_peft_and_transformers() {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/interop-venv");
    if !venv.join("ready").is_file() {
        println!("skipped: no virtual environment with PEFT; `make interop` makes one");
        return;
    }
    let bench = Bench::new();
    let work = bench.path("work");
    for case in cases("").into_iter().filter(|case| !residual(case)) {
        write(&bench, &case, &work.join(name(&case)));
        fs::remove_file(work.join(name(&case)).join("adapter.safetensors")).expect("it was written");
    }
    let check = Command::new(venv.join("bin/python"))
        .arg(root().join("check.py"))
        .arg(&work)
        .args(["--expect", "exported", "--expect", "merged"])
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&check.stdout);
    println!("{said}");
    assert!(check.status.success(), "{said}{}", String::from_utf8_lossy(&check.stderr));
}
