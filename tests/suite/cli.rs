//! The command-line program: its output, its error messages and its exit codes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peft_runtime::adapter::{self, Stored, TensorFile};
use peft_runtime::artifact::FORMAT;
use peft_runtime::trust::{TrustSubject, trusted};

/// The result of a run of the program.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// A temporary folder in which tests write files and run the program.
pub struct Bench {
    folder: tempfile::TempDir,
    pub cache: PathBuf,
}

/// The cache of compiled models that all tests of one build share. Each test is a process, and many compile the same
/// specs.
fn shared_cache() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_peftc"));
    let built = fs::metadata(program).and_then(|m| Ok((m.len(), m.modified()?))).expect("it is built");
    let name = format!("cache-{}", &blake3::hash(format!("{built:?}").as_bytes()).to_hex()[..16]);
    let all = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // Caches of older builds are removed.
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let old = entry.file_name();
        if old != *name && old.to_string_lossy().starts_with("cache-") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    all.join(name)
}

/// The shared cache, or `None` if other users can write to the checkout, because code is not loaded from such a folder.
fn trusted_cache() -> Option<PathBuf> {
    trusted(Path::new(env!("CARGO_TARGET_TMPDIR")), TrustSubject::Cache).ok().map(|_| shared_cache())
}

/// The folder in which tests that call the compiler directly share the machine code of kernels.
pub fn kernel_cache() -> Option<PathBuf> {
    let folder = trusted_cache()?.join("kernels");
    fs::create_dir_all(&folder).expect("a folder");
    Some(folder)
}

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let cache = trusted_cache().unwrap_or_else(|| folder.path().join("cache"));
        Bench { folder, cache }
    }

    /// A bench whose cache is empty and not shared.
    pub fn with_own_cache() -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let cache = folder.path().join("cache");
        Bench { folder, cache }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(&path, text).expect("written");
        path
    }

    pub fn peftc<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        self.with(&[], args)
    }

    /// Runs the program with these environment variables.
    pub fn with<S: AsRef<std::ffi::OsStr>>(
        &self,
        environment: &[(&str, &str)],
        args: impl IntoIterator<Item = S>,
    ) -> Ran {
        let run = Command::new(env!("CARGO_BIN_EXE_peftc"))
            .args(args)
            .envs(environment.iter().copied())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PEFTC_CACHE", &self.cache)
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG")
            .output()
            .expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ran = Ran {
            code: run.status.code().expect("no signal ended it"),
            out: text(&run.stdout),
            err: text(&run.stderr),
        };
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }

    /// Runs a command that must fail with this exit code and with these words in its message.
    pub fn refuses(&self, args: &[&str], code: i32, words: &[&str]) {
        let ran = self.peftc(args);
        assert_eq!(ran.code, code, "{args:?}: {}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{args:?} should say `{word}`:\n{}", ran.err);
        }
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

const IR: &str = "tests/ir/inducer.peft";

#[test]
fn check_and_fmt_report_errors_by_exit_code() {
    let bench = Bench::new();
    let ran = bench.peftc(["check", "models/paper/webnlg/inducer_lora.peft", "models/demo/sentiment.peft"]);
    assert_eq!((ran.code, ran.out.lines().count()), (0, 2), "{}", ran.err);
    let twice = bench.write("bad.peft", "model = gpt2(layrs: 2)\ntune { full() }\ntrain { lrr: 1e-3 }\n");
    bench.refuses(&["check", text(&twice)], 1, &["did you mean `layers`", "did you mean `lr`"]);
    bench.refuses(&["check", "no/such.peft"], 3, &["no/such.peft"]);
    bench.refuses(&["check"], 2, &["SPEC"]);
    bench.refuses(&["frobnicate"], 2, &["frobnicate"]);
    bench.refuses(&["check", IR, "--set", "train.lr"], 2, &["key=value"]);
    bench.refuses(&["check", IR, "--set", "train.lrr=1"], 1, &["lrr", "did you mean `lr`"]);
    let crowded = bench.write("crowded.peft", fs::read_to_string(IR).expect("readable").replace(": ", ":   "));
    bench.refuses(&["fmt", "--check", text(&crowded)], 1, &["not formatted"]);
    assert_eq!(bench.peftc(["fmt", text(&crowded)]).code, 0);
    assert_eq!(bench.peftc(["fmt", "--check", text(&crowded)]).code, 0);
}

/// Rows of the paper's tables: the spec, the numbers of trainable and of stored parameters, and both in percent of the
/// backbone. The paper's RoBERTa includes RobertaModel's pooler, 590,592 values that the classifier does not read, so
/// its percentage for LoRA is 0.47.
const ROWS: &[(&str, u64, u64, f64, f64)] = &[
    ("webnlg/finetune", 124_439_808, 124_439_808, 100.0, 100.0),
    ("webnlg/adapter", 2_019_600, 2_019_600, 1.62, 1.62),
    ("webnlg/lora", 2_009_088, 2_009_088, 1.61, 1.61),
    ("webnlg/prefix", 9_932_288, 1_990_656, 7.98, 1.60),
    ("webnlg/mam_adapter", 2_001_096, 2_001_096, 1.61, 1.61),
    ("webnlg/adaptive", 2_015_424, 2_015_424, 1.62, 1.62),
    ("webnlg/extension", 1_928_448, 1_928_448, 1.55, 1.55),
    ("webnlg/gating", 2_003_472, 2_003_472, 1.61, 1.61),
    ("webnlg/inducer", 2_003_472, 2_003_472, 1.61, 1.61),
    ("webnlg/inducer_lora", 2_002_320, 2_002_320, 1.61, 1.61),
    ("webnlg/mam_inducer", 2_001_816, 2_001_816, 1.61, 1.61),
    ("sst2/finetune", 124_055_040, 124_055_040, 100.0, 100.0),
    ("sst2/inducer", 609_696, 609_696, 0.49, 0.49),
    ("sst2/inducer_lora", 609_120, 609_120, 0.49, 0.49),
    ("sst2/mam_inducer", 599_760, 599_760, 0.48, 0.48),
    ("sst2/lora", 589_824, 589_824, 0.48, 0.48),
    ("sst2/mam_adapter", 599_232, 599_232, 0.48, 0.48),
    ("sst2/bitfit", 102_144, 102_144, 0.08, 0.08),
    ("sst2/adapter", 599_424, 599_424, 0.48, 0.48),
    ("sst2/prefix", 589_824, 589_824, 0.48, 0.48),
];

#[test]
fn inspect_counts_match_the_paper() {
    let bench = Bench::new();
    for &(row, trainable, stored, trainable_percent, stored_percent) in ROWS {
        let ran = bench.peftc(["inspect", &format!("models/paper/{row}.peft"), "--json"]);
        let json: serde_json::Value =
            serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{row}: {e}{}", ran.err));
        assert_eq!(
            (&json["trainable_parameters"], &json["stored_parameters"]),
            (&trainable.into(), &stored.into()),
            "{row}"
        );
        let percent = |key: &str| (json[key].as_f64().expect("a number") * 100.0).round() / 100.0;
        assert_eq!(
            (percent("trainable_percent"), percent("stored_percent")),
            (trainable_percent, stored_percent),
            "{row}"
        );
        let (special, backbone) = if row.starts_with("webnlg") { (16 * 768, 124_439_808) } else { (0, 124_055_040) };
        assert_eq!(
            (&json["special_parameters"], &json["backbone_parameters"]),
            (&special.into(), &backbone.into()),
            "{row}"
        );
        let sum = |key: &str| -> u64 {
            let modules = json["modules"].as_array().expect("a list");
            modules.iter().map(|m| m[key].as_u64().expect("a count")).sum()
        };
        assert_eq!((sum("trainable"), sum("stored")), (trainable + special, stored + special), "{row}");
        assert_eq!(json["optimizer_bytes"], 8 * (trainable + special), "{row}");
        // Frozen weights have no gradient, so the backward pass costs about as much as the forward pass.
        let flops = |pass: &str| json[pass]["per_token"].as_f64().expect("a number");
        let ratio = flops("backward_flops") / flops("forward_flops");
        let expected = if row.ends_with("finetune") { 1.9..2.1 } else { 0.9..1.1 };
        assert!(expected.contains(&ratio), "{row}: backward is {ratio} of forward");
        assert!(json["backward_flops"]["per_target"].as_f64().is_some_and(|flops| flops >= 0.0), "{row}");
        assert!(json["activation_bytes_per_token"].as_f64().expect("a number") > 1e5, "{row}");
        assert!(json.get("roofline").is_none(), "{row}");
    }
    // Nearly all of a step's arithmetic is in gemms with frozen weights.
    let set = ["--set", "train.precision=bf16"];
    let arguments = ["inspect", "models/paper/webnlg/inducer_lora.peft", "--json", "--target", "cuda:sm_70"];
    let json: serde_json::Value = serde_json::from_str(&bench.peftc(arguments.iter().chain(&set)).out).expect("JSON");
    let roofline = |key: &str| json["roofline"][key].as_f64().expect("a number");
    assert!((0.6e12..1.0e12).contains(&roofline("half_flops")) && roofline("flops") < 0.1 * roofline("half_flops"));
    assert!(roofline("memory_seconds") > 1e-3 && roofline("product_seconds") > roofline("half_flops") / 125e12);
    // Every spec of these folders is in the table. CoQA's and MNLI's specs are the same.
    let there = ["webnlg", "sst2"].map(|f| fs::read_dir(format!("models/paper/{f}")).expect("a folder").count());
    assert_eq!(there.iter().sum::<usize>(), ROWS.len());
}

#[test]
fn methods_and_backbones_are_documented() {
    let bench = Bench::new();
    let methods = bench.peftc(["methods"]).out;
    for name in
        ["inducer(", "lora(", "adapter(", "prefix(", "bitfit(", "full(", "ia3(", "dora(", "vera(", "mam_inducer("]
    {
        assert!(methods.contains(&format!("\n{name}")) || methods.starts_with(name), "{methods}");
    }
    let backbones = bench.peftc(["backbones", "--json"]).out;
    let backbones: serde_json::Value = serde_json::from_str(&backbones).expect("JSON");
    for backbone in backbones.as_array().expect("a list") {
        assert!(!backbone["doc"].as_str().expect("a text").is_empty(), "{backbone}");
    }
    let one = bench.peftc(["methods", "dora"]).out;
    assert!(one.contains("Liu et al., 2024") && one.contains("weight magnitude"), "{one}");
    bench.refuses(&["methods", "lroa"], 2, &["did you mean `lora`"]);
}

#[test]
fn compile_emits_each_stage_and_refuses_bad_options() {
    let bench = Bench::with_own_cache();
    for stage in ["ast", "model", "peft", "grad", "fused", "loops", "llvm"] {
        let ran = bench.peftc(["compile", IR, "--emit", stage]);
        assert_eq!((ran.code, ran.out.is_empty()), (0, false), "{stage}: {}", ran.err);
    }
    bench.refuses(&["compile", IR, "--emit", "asm"], 2, &["the stages are ast, model"]);
    bench.refuses(&["compile", IR, "--emit", "fusd"], 2, &["did you mean `fused`?"]);
    bench.refuses(&["compile", IR, "--emit", "peft", "--entry", "tran"], 2, &["merge (did you mean `train`?)"]);
    bench.refuses(&["compile", IR, "--emit", "ptx"], 2, &["`--target cuda`"]);
    bench.refuses(
        &["run", IR, "--target", "cuda", "--entry", "grad", "--inputs", "a", "-o", "b"],
        2,
        &["`cuda` cannot run here"],
    );
    bench.refuses(&["compile", IR, "--target", "cuda:sm_61", "--emit", "loops"], 2, &["sm_70, sm_80, sm_90"]);
    bench.refuses(&["compile", IR, "--target", "gpu"], 2, &["(did you mean `cuda`?); there are cpu, ", "cuda:sm_90"]);
    #[cfg(target_arch = "x86_64")]
    bench.refuses(&["compile", IR, "--target", "cpu:x86-64-v9"], 2, &["native, x86-64, x86-64-v3, x86-64-v4"]);
    bench.refuses(
        &["compile", IR, "--no-fuse=concat_gradient"],
        2,
        &["the rules are", "(did you mean `concat_gradients`?)"],
    );
    let out = bench.path("a.peftc");
    let ran = bench.peftc(["compile", IR, "-o", text(&out), "--timings"]);
    assert!(ran.code == 0 && ran.err.contains("llvm") && !ran.out.contains("cache"), "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("recomputed values: "), "{}", ran.err);
    assert!(bench.peftc(["compile", IR, "-o", text(&out), "--overwrite"]).out.contains("from the cache"));
}

/// An artifact gives the results of its spec, and a damaged artifact is refused.
#[test]
fn artifacts_run_and_damaged_ones_are_refused() {
    let bench = Bench::new();
    let fixture = crate::fixtures::all("gpt2_inducer_lora_strong").remove(0);
    let spec = bench.write("f.peft", fixture.spec());
    let artifact = bench.path("f.peftc");
    assert_eq!(bench.peftc(["compile", text(&spec), "-o", text(&artifact)]).code, 0);
    let inputs = text(&fixture.path);
    let results = ["one", "two"].map(|name| bench.path(&format!("{name}.safetensors")));
    for (from, to) in [&spec, &artifact].into_iter().zip(&results) {
        let ran = bench.peftc(["run", text(from), "--entry", "grad", "--inputs", inputs, "-o", text(to)]);
        assert_eq!(ran.code, 0, "{}", ran.err);
    }
    assert_eq!(fs::read(&results[0]).expect("written"), fs::read(&results[1]).expect("written"));
    // The baseline x86-64 target requires no CPU feature. An artifact for another CPU can be written as well.
    #[cfg(target_arch = "x86_64")]
    for (target, features) in
        [("cpu:x86-64", 0), ("cpu:x86-64-v3", 13), ("cpu:x86-64-v4", 18), ("cpu:x86-64-v4+bf16", 19)]
    {
        let artifact = bench.path("level.peftc");
        let ran = bench.peftc(["compile", IR, "--target", target, "-o", text(&artifact), "--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let manifest = peft_runtime::store::open(&artifact).expect("sound").0;
        assert_eq!(manifest.features.len(), features);
    }
    let found = adapter::load(&results[0]).expect("sound").tensors;
    let grads = fixture.file.tensors.keys().filter(|n| n.starts_with("expect.grad.")).count();
    assert_eq!(found.keys().filter(|n| n.starts_with("grad.")).count(), grads);

    let run = |damage: &dyn Fn(&Path), words: &[&str]| {
        assert_eq!(bench.peftc(["compile", text(&spec), "-o", text(&artifact), "--overwrite"]).code, 0);
        damage(&artifact);
        let to = bench.path("never.safetensors");
        bench.refuses(&["run", text(&artifact), "--inputs", inputs, "-o", text(&to)], 3, words);
        assert!(!to.exists());
    };
    let manifest = |change: fn(&str) -> String| {
        move |path: &Path| {
            let file = path.join("manifest.json");
            let text = fs::read_to_string(&file).expect("readable");
            fs::write(file, change(&text)).expect("written");
        }
    };
    let mend = "peftc compile";
    run(&|path| fs::write(path.join("kernels.so"), b"\x7fELF").expect("written"), &["kernels.so", mend]);
    run(&|path| fs::remove_file(path.join("kernels.so")).expect("removed"), &["kernels.so"]);
    run(&manifest(|text| text[..text.len() / 2].into()), &["manifest.json", mend]);
    run(&manifest(|text| text.replace("\"x86_64\"", "\"sparc\"")), &["manifest.json", mend]);
    run(&manifest(|text| text.replace(&format!("\"format\":{FORMAT}"), "\"format\":99")), &["99", mend]);
}

/// A small model in the layout of MiniLM: one layer and a vocabulary of six tokens. `spoil` may change its checkpoint.
pub fn tiny_bert(bench: &Bench, spoil: impl FnOnce(&mut TensorFile)) -> (PathBuf, PathBuf) {
    let spec = bench.write(
        "tiny.peft",
        "model = bert(layers: 1, hidden: 8, heads: 2, ffn: 12, vocab: 6, context: 16, pooling: \"mean\")\n\
         tune { every attention { lora(rank: 2) on q } }\n\
         task t { kind: classification\n max_tokens: 16\n labels: [\"0\", \"1\"] }\n\
         train { lr: 1e-2\n batch: 2\n epochs: 1 }\n",
    );
    let model = peftc::spec::load(&spec, &[], false).unwrap_or_else(|e| panic!("{e}"));
    let mut file = TensorFile::default();
    for param in model.params.iter().filter(|p| p.origin == peft_grammar::model::Origin::Backbone) {
        let numbers = (0..param.elements()).map(|i| (i as f32 * 0.37).sin() * 0.2).collect();
        file.tensors.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers));
    }
    spoil(&mut file);
    let weights = bench.path("weights");
    adapter::save(&weights.join("model.safetensors"), &file).expect("saved");
    bench.write(
        "weights/config.json",
        r#"{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 12, "vocab_size": 6, "max_position_embeddings": 16}"#,
    );
    bench.write(
        "weights/tokenizer.json",
        r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Whitespace"},
            "post_processor":{"type":"BertProcessing","sep":["[SEP]",2],"cls":["[CLS]",1]},"decoder":null,
            "model":{"type":"WordLevel","vocab":{"[UNK]":0,"[CLS]":1,"[SEP]":2,"good":3,"bad":4,"film":5},"unk_token":"[UNK]"}}"#,
    );
    (spec, weights)
}

/// An adapter that PEFT's format cannot hold is exported under canonical names, with the spec and its imports.
#[test]
fn export_in_our_own_format_round_trips() {
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    bench.write(
        "mine.peft",
        "method mine() on projection(y) {\n  weight l \"l\": [width(y)] ~ ones\n  after y { y = y * l }\n}\n",
    );
    let source = fs::read_to_string(&spec).expect("readable");
    fs::write(&spec, format!("import \"mine.peft\"\n{}", source.replace("lora(rank: 2) on q", "mine() on k")))
        .expect("written");
    let data = bench.write("data.tsv", "good film\t1\nbad film\t0\n");
    let run = bench.path("run");
    let set = ["--set", "train.lr=1e-2"];
    let train = ["train", text(&spec), "--weights", text(&weights), "--data", text(&data), "--out", text(&run)];
    let ran = bench.peftc(train.iter().chain(&set));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let out = bench.path("out");
    let export = ["export", text(&spec), "--adapter", text(&run), "-o", text(&out)];
    bench.refuses(
        &[&export[..], &["--format", "peft"]].concat(),
        2,
        &["PEFT has no method that computes what `mine` computes", "--format own"],
    );
    assert!(!out.exists());
    let ran = bench.peftc(export.iter().chain(&set));
    assert!(
        ran.code == 0
            && ran.err.contains("PEFT has no method that computes what `mine` computes")
            && ran.out.contains("in peftc's own format"),
        "{}{}",
        ran.out,
        ran.err
    );
    // The exported files evaluate without the original spec and give the run's results.
    let eval = |spec: &Path, adapter: &Path| {
        let all = ["eval", text(spec), "--weights", text(&weights), "--data", text(&data), "--adapter"];
        let ran = bench.peftc(all.iter().copied().chain([text(adapter)]));
        assert_eq!(ran.code, 0, "{}", ran.err);
        ran.out
    };
    assert_eq!(eval(&out.join("spec.peft"), &out), eval(&spec, &run));
    let merged = bench.path("merged");
    let merge = ["merge", text(&spec), "--weights", text(&weights), "--adapter", text(&out), "-o", text(&merged)];
    let ran = bench.peftc(merge);
    // A scale on a projection's outputs can be merged into its weight, whichever method it comes from.
    assert!(
        ran.code == 0 && ran.out.contains("1 projections") && ran.err.contains("pooling"),
        "{}{}",
        ran.out,
        ran.err
    );
    assert!(merged.join("tokenizer.json").is_file() && merged.join("config.json").is_file());
    // Adapters that do not fit the spec.
    let foreign = "tests/interop/cases/roberta_lora_qv/adapter";
    bench.refuses(&["import", text(&spec), foreign, "-o", text(&bench.path("x"))], 3, &["`mine`", "lora"]);
    let lora = "tests/interop/cases/roberta_lora_qv/spec.peft";
    let import = ["import", lora, foreign, "-o"];
    let never = bench.path("never.safetensors");
    bench.refuses(&[&import[..], &[text(&never), "--set", "lora.rank=3"]].concat(), 3, &["rank", "`rank: 4`"]);
    bench.refuses(&["import", lora, "tests/interop/cases/gpt2_prefix/adapter", "-o", text(&never)], 3, &["`lora`"]);
    assert!(!never.exists());
}

/// A spec and its artifact store the same tensors, and both refuse stored tensors that depend on frozen weights.
#[test]
fn stored_tensors_depend_only_on_trained_values() {
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let tiny = fs::read_to_string(&spec).expect("readable").replace("lora(rank: 2) on q", "mine() on k");
    fs::write(&spec, format!("import \"mine.peft\"\n{tiny}")).expect("written");
    let data = bench.write("data.tsv", "good film\t1\nbad film\t0\n");
    let [artifact, run, out] = ["tiny.peftc", "run", "out"].map(|name| bench.path(name));
    for (made, fine) in [("l * l", true), ("l * sqrt(mean(W * W, axis: 0))", false)] {
        let method = format!(
            "method mine() on projection(y, W) {{\n  weight l \"l\": [width(y)] ~ ones\n  \
             after y {{\n    scale = {made}\n    y = y * scale\n    store scale as \"scale\"\n  }}\n}}\n"
        );
        bench.write("mine.peft", method);
        let ran = bench.peftc(["compile", text(&spec), "-o", text(&artifact), "--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let mut kept = vec![];
        for source in [&spec, &artifact] {
            let train =
                ["train", text(source), "--weights", text(&weights), "--data", text(&data), "--out", text(&run)];
            let ran = bench.peftc(train.iter().chain(&["--overwrite"]));
            assert_eq!(ran.code, 0, "{}", ran.err);
            let export = ["export", text(source), "--adapter", text(&run), "--format", "own", "-o", text(&out)];
            let export = [&export[..], &["--overwrite"]].concat();
            if !fine {
                bench.refuses(&export, 2, &["depend on weights that do not train"]);
                continue;
            }
            let ran = bench.peftc(export);
            assert_eq!(ran.code, 0, "{}", ran.err);
            kept.push(adapter::load(&out.join("adapter.safetensors")).expect("sound").tensors);
        }
        if let [of_spec, artifact_entries] = &kept[..] {
            assert!(of_spec == artifact_entries, "{of_spec:?} and {artifact_entries:?}");
            let there = |tensor: &str| of_spec.contains_key(&format!("layers.0.attention.k.mine.{tensor}"));
            assert_eq!((there("scale"), there("l")), (true, false));
        }
    }
}

/// VeRA's projections and a frozen head are in no file, and another seed would give other values, so the seed is
/// required.
#[test]
fn frozen_random_tensors_require_the_seed() {
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let source = fs::read_to_string(&spec).expect("readable");
    fs::write(&spec, source.replace("lora(rank: 2) on q", "vera(rank: 2) on q")).expect("written");
    let data = bench.write("data.tsv", "good film\t1\nbad film\t0\n");
    let (run, out) = (bench.path("run"), bench.path("out"));
    let given = ["--weights", text(&weights), "--data", text(&data)];
    let train = ["train", text(&spec), "--seed", "5", "--out", text(&run)];
    let ran = bench.peftc(train.iter().chain(&given));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let eval = ["eval", text(&spec), "--adapter", text(&run)];
    let eval = [&eval[..], &given].concat();
    bench.refuses(&eval, 3, &["`vera.8_8.a`", "--set train.seed=5"]);
    let seed = ["--set", "train.seed=5"];
    let ran = bench.peftc(eval.iter().chain(&seed));
    assert_eq!(ran.code, 0, "{}", ran.err);
    // After merging, the random values are part of the weights.
    let merge = ["merge", text(&spec), "--weights", text(&weights), "--adapter", text(&run), "-o", text(&out)];
    let merged = bench.peftc(merge.iter().chain(&seed));
    assert_eq!(merged.code, 0, "{}", merged.err);
    let plain = bench.write("plain.peft", source.replace("tune { every attention { lora(rank: 2) on q } }\n", ""));
    let same = bench.peftc(["eval", text(&plain), "--weights", text(&out), "--data", text(&data)]);
    assert_eq!((same.code, same.out), (0, ran.out), "{}", same.err);
}

/// Merging replaces backbone tensors that train, and folds the methods into the other weights.
#[test]
fn merge_includes_trained_backbone_tensors() {
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let source = fs::read_to_string(&spec).expect("readable");
    let data = bench.write("data.tsv", "good film\t1\nbad film\t0\n");
    let plain = bench.write("plain.peft", source.replace("tune { every attention { lora(rank: 2) on q } }\n", ""));
    let (run, out) = (bench.path("run"), bench.path("out"));
    for (tune, folded) in
        [("bitfit()", "0 projections"), ("bitfit() every ffn { ia3() }", "1 projections"), ("full()", "")]
    {
        fs::write(&spec, source.replace("every attention { lora(rank: 2) on q }", tune)).expect("written");
        let given = ["--weights", text(&weights), "--data", text(&data)];
        let train = ["train", text(&spec), "--set", "train.lr=0.05", "--out", text(&run), "--overwrite"];
        let ran = bench.peftc(train.iter().chain(&given));
        assert_eq!(ran.code, 0, "{tune}: {}", ran.err);
        let merge = ["merge", text(&spec), "--weights", text(&weights), "--adapter", text(&run), "-o", text(&out)];
        let ran = bench.peftc(merge.iter().chain(&["--overwrite"]));
        assert_eq!(ran.code, 0, "{tune}: {}", ran.err);
        assert!(ran.out.contains("trained tensors"), "{tune}: {}", ran.out);
        assert_eq!(ran.out.contains(folded), !folded.starts_with('0'), "{tune}: {}", ran.out);
        let eval = |spec: &Path, more: &[&str]| {
            let all = ["eval", text(spec), "--data", text(&data)];
            let ran = bench.peftc(all.iter().chain(more));
            assert_eq!(ran.code, 0, "{tune}: {}", ran.err);
            ran.out
        };
        let trained = eval(&spec, &["--weights", text(&weights), "--adapter", text(&run)]);
        assert_eq!(eval(&plain, &["--weights", text(&out)]), trained, "{tune}");
    }
}

#[test]
fn train_and_eval_refuse_bad_input() {
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let data = bench.write("data.tsv", "good film\t1\nbad film\t0\ngood good\t1\nbad\t0\n");
    let out = bench.path("run");
    let args = |spec: &Path, weights: &Path, data: &Path, more: &[&str]| -> Vec<String> {
        let plain = ["train", text(spec), "--weights", text(weights), "--data", text(data), "--out", text(&out)];
        plain.iter().chain(more).map(|s| s.to_string()).collect()
    };
    let refuses = |args: Vec<String>, code: i32, words: &[&str]| {
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        if !args.contains(&"--resume") {
            args.push("--overwrite");
        }
        bench.refuses(&args, code, words);
    };
    let ran = bench.peftc(args(&spec, &weights, &data, &["--dev", text(&data), "--profile"]));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let words = ["× matmul", "× reading and packing batches", "× sending batches", "% of their time in kernels"];
    assert!(words.iter().all(|word| ran.err.contains(word)), "{}", ran.err);
    let figures = fs::read_to_string(out.join("metrics.jsonl")).expect("there");
    let steps: Vec<serde_json::Value> = figures.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let shares: Vec<f64> = steps.iter().filter_map(|s| s["kernel_share"].as_f64()).collect();
    assert!(shares.len() == 2 && shares.iter().all(|s| (0.0..=1.0).contains(s)), "{figures}");
    assert!(ran.out.contains("adapter.safetensors") && ran.err.contains("classifier.weight"), "{}{}", ran.out, ran.err);
    let adapter = out.join("adapter.safetensors");
    let eval = ["eval", text(&spec), "--weights", text(&weights), "--data", text(&data), "--adapter"];
    let ran = bench.peftc(eval.iter().copied().chain([text(&adapter)]));
    assert!(ran.code == 0 && ran.out.contains("accuracy"), "{}{}", ran.out, ran.err);
    let saved = fs::read(&adapter).expect("there");

    // Invalid data.
    refuses(args(&spec, &weights, &bench.write("empty.tsv", ""), &[]), 3, &["empty.tsv", "no example"]);
    refuses(
        args(&spec, &weights, &bench.write("odd.tsv", "good film\t1\nbad film 0\n"), &[]),
        3,
        &["odd.tsv", "line 2"],
    );
    refuses(args(&spec, &weights, &bench.write("label.tsv", "good film\t7\n"), &[]), 3, &["`7`"]);
    refuses(args(&spec, &weights, &bench.path("none.tsv"), &[]), 3, &["none.tsv"]);
    // Invalid tokenizers.
    refuses(args(&spec, &weights, &data, &["--tokenizer", "data/triples"]), 3, &["1536", "6"]);
    refuses(args(&spec, Path::new("random"), &data, &[]), 2, &["--tokenizer"]);
    let broken = bench.write("broken/tokenizer.json", "{");
    refuses(args(&spec, &weights, &data, &["--tokenizer", text(&broken)]), 3, &["broken/tokenizer.json"]);
    // Invalid weights.
    let file = weights.join("model.safetensors");
    let good = fs::read(&file).expect("there");
    fs::write(&file, &good[..good.len() / 2]).expect("written");
    refuses(args(&spec, &weights, &data, &[]), 3, &["model.safetensors", "again"]);
    fs::write(&file, [&u64::MAX.to_le_bytes()[..], &good[8..]].concat()).expect("written");
    refuses(args(&spec, &weights, &data, &[]), 3, &["model.safetensors", "header"]);
    fs::write(&file, &good).expect("written");
    refuses(args(&spec, &weights, &data, &["--set", "model.layers=2"]), 3, &["num_hidden_layers"]);
    refuses(args(&spec, &bench.path("nowhere"), &data, &["--tokenizer", text(&weights)]), 3, &["nowhere"]);
    let word = "bert.embeddings.word_embeddings.weight";
    let spoilt = [
        (word, Some(Stored::f32(vec![6, 8], vec![f32::NAN; 48])), "NaN"),
        (word, Some(Stored::f32(vec![6, 7], vec![0.0; 42])), "[6, 7]"),
        (word, None, "is missing"),
    ];
    for (name, change, says) in spoilt {
        tiny_bert(&bench, |file| match change {
            Some(stored) => drop(file.tensors.insert(name.into(), stored)),
            None => drop(file.tensors.remove(name)),
        });
        refuses(args(&spec, &weights, &data, &[]), 3, &[name, says]);
    }
    // Weights that make the loss diverge.
    tiny_bert(&bench, |file| {
        file.tensors.insert(word.into(), Stored::f32(vec![6, 8], (0..48).map(|i| i as f32 * 1e36).collect()));
    });
    let away = bench.path("away");
    let away = ["train", text(&spec), "--weights", text(&weights), "--data", text(&data), "--out", text(&away)];
    bench.refuses(&away, 4, &["step 1", "train.lr"]);
    tiny_bert(&bench, |_| {});
    // An output folder that cannot be created.
    let file = bench.write("file", "");
    refuses(args(&spec, &weights, &data, &["--out", text(&file.join("x"))]), 2, &["--out"]);
    let blocked = ["train", text(&spec), "--weights", text(&weights), "--data", text(&data), "--out"];
    let ran = bench.peftc(blocked.iter().copied().chain([text(&file.join("x"))]));
    assert_eq!(ran.code, 3, "{}", ran.err);
    // An adapter and a state of another spec.
    let ran = bench.peftc(eval.iter().copied().chain([text(&adapter), "--set", "lora.rank=3"]));
    assert!(ran.code == 3 && ran.err.contains("lora.a"), "{}", ran.err);
    refuses(args(&spec, &weights, &data, &["--resume", "--set", "lora.rank=3"]), 3, &["another spec"]);
    // None of these failures changed the trained values.
    assert_eq!(fs::read(&adapter).expect("there"), saved);
    assert!(!fs::read_dir(&out).expect("there").any(|e| text(&e.expect("an entry").path()).contains(".peftc-")));
}

/// The help of `merge` names the methods that fold, and what its options take.
#[test]
fn help_of_merge_names_what_folds() {
    let ran = Bench::new().peftc(["merge", "--help"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    for word in ["LoRA", "DoRA", "VeRA", "IA³", "adapter.safetensors", "model.safetensors", "config.json"] {
        assert!(ran.out.contains(word), "`peftc merge --help` should name {word}:\n{}", ran.out);
    }
}
