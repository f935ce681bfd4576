//! GGUF files: values, logits and token ids against the package `gguf` and transformers
//! (`tests/interop/gguf_fixtures.py`), and files that are refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peft_runtime::adapter::{self, Data, TensorFile};
use peft_runtime::gguf::GgufFile;
use peft_runtime::safefile::SafeFile;
use peft_runtime::source::TensorSource;
use peft_runtime::weights;
use peftc::hub::{checkpoint, tokenizer};
use serde_json::Value;

use crate::cli::Bench;
use crate::env_or_skip;
use crate::reports::spec;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/gguf")
}

fn floats<'f>(file: &'f TensorFile, name: &str) -> &'f [f32] {
    match &file.tensors[name].data {
        Data::F32(x) => x,
        _ => panic!("`{name}` is f32"),
    }
}

/// Requires both files to have the same bits in every tensor of `found`. Returns the number of tensors.
fn same_bits(found: &GgufFile, wanted: &SafeFile) -> usize {
    for name in found.names() {
        let count = found.shape(name).expect("it is there").iter().product::<u64>() as usize;
        assert_eq!(found.shape(name), TensorSource::shape(wanted, name), "{name}");
        let (mut x, mut y) = (vec![0.0; count], vec![0.0; count]);
        found.floats(name, &mut x).unwrap_or_else(|e| panic!("{e}"));
        wanted.floats(name, &mut y).unwrap_or_else(|e| panic!("{e}"));
        let differs = x.iter().zip(&y).position(|(x, y)| x.to_bits() != y.to_bits());
        assert_eq!(differs.map(|i| (i, x[i], y[i])), None, "{name}");
    }
    found.names().len()
}

#[test]
fn each_type_decodes_to_the_reference_bits() {
    let found = GgufFile::open(&folder().join("types.gguf")).expect("sound");
    let wanted = SafeFile::open(&folder().join("types.safetensors")).expect("sound");
    assert_eq!(same_bits(&found, &wanted), 13);
}

/// The spec of the llama in `untied.gguf` or `tied.gguf`, with some arguments replaced.
fn llama(tied: bool, replaced: &[(&str, &str)]) -> String {
    let theta = if tied { "500000.0" } else { "10000.0" };
    let tied = tied.to_string();
    let mut arguments = vec![
        ("layers", "2"),
        ("hidden", "32"),
        ("heads", "4"),
        ("kv_heads", "2"),
        ("ffn", "64"),
        ("vocab", "320"),
        ("context", "64"),
        ("eps", "1e-5"),
        ("rope_theta", theta),
        ("tied", &tied),
    ];
    for (name, value) in replaced {
        match arguments.iter_mut().find(|(known, _)| known == name) {
            Some(argument) => argument.1 = value,
            None => arguments.push((name, value)),
        }
    }
    let arguments: Vec<String> = arguments.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    format!("model = llama({})\n", arguments.join(", "))
}

/// The largest difference between the logits of `peftc run` and those of transformers, relative to the largest logit.
fn gap(bench: &Bench, spec: &Path, weights: &Path, case: &Path) -> f32 {
    let out = bench.path("out.safetensors");
    let head = ["run".as_ref(), spec.as_os_str(), "--entry".as_ref(), "forward".as_ref(), "--overwrite".as_ref()];
    let paths = ["--weights".as_ref(), weights.as_os_str(), "--inputs".as_ref(), case.as_os_str(), "-o".as_ref()];
    let ran = bench.peftc(head.into_iter().chain(paths).chain([out.as_os_str()]));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let (found, wanted) = (adapter::load(&out).expect("sound"), adapter::load(case).expect("sound"));
    let (found, wanted) = (floats(&found, "logits"), floats(&wanted, "expect.logits"));
    assert_eq!(found.len(), wanted.len());
    let largest = wanted.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    found.iter().zip(wanted).map(|(f, w)| (f - w).abs()).fold(0.0, f32::max) / largest
}

#[test]
fn gguf_logits_match_transformers() {
    let bench = Bench::new();
    for (name, tied) in [("untied", false), ("tied", true)] {
        let (file, case) = (folder().join(format!("{name}.gguf")), folder().join(format!("{name}.safetensors")));
        let (path, model) = spec(&bench, &format!("{name}.peft"), &llama(tied, &[]));
        let loaded = weights::load(&file, &model.backbone, &model.params, 0, 1).unwrap_or_else(|e| panic!("{e}"));
        let wanted = adapter::load(&case).expect("sound");
        let mut compared = 0;
        for (param, numbers) in model.params.iter().zip(&loaded.tensors) {
            let name = format!("expect.{}", param.name);
            if wanted.tensors.contains_key(&name) {
                assert_eq!(&numbers[..], floats(&wanted, &name), "{name}");
                compared += 1;
            }
        }
        assert_eq!((compared, loaded.drawn.len(), loaded.unread.len()), (2, 0, 0));
        let gap = gap(&bench, &path, &file, &case);
        assert!(gap <= 1e-5, "{name}: {gap}");
    }
}

#[test]
fn pre_tokenizers_match_transformers() {
    let expected: Value = serde_json::from_slice(&fs::read(folder().join("pre.json")).expect("a file")).expect("JSON");
    let texts: Vec<&str> = expected["lines"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let opened = tokenizer::open(&folder().join(format!("pre-{pre}.gguf"))).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(opened.templates.as_ref().and_then(|t| t.get("default")), Some("{{ messages[0]['content'] }}"));
        for (text, wanted) in texts.iter().zip(expected[pre].as_array().expect("a list")) {
            let ids = |marks| opened.library.encode_fast(*text, marks).expect("ids").get_ids().to_vec();
            let wanted: Vec<u32> = serde_json::from_value(wanted.clone()).expect("ids");
            assert_eq!(ids(false), wanted, "{pre}: {text:?}");
            let begins = if pre == "llama-bpe" { vec![1] } else { vec![] };
            assert_eq!(ids(true), [begins, wanted].concat(), "{pre}: {text:?}");
        }
    }
}

/// A copy of a file in which every `from` is replaced by `to`, which has the same length.
fn changed(bench: &Bench, file: &str, from: &[u8], to: &[u8]) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(folder().join(file)).expect("a file");
    let places: Vec<usize> = (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|&at| bytes[at..at + to.len()].copy_from_slice(to));
    let path = bench.path("changed.gguf");
    fs::write(&path, bytes).expect("written");
    path
}

#[track_caller]
fn contains(message: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(message.contains(part), "`{part}` is not in: {message}"));
}

#[test]
fn mismatched_metadata_are_refused() {
    let bench = Bench::new();
    let refusal = |text: &str, file: &Path| {
        let (_, model) = spec(&bench, "spec.peft", text);
        checkpoint::weights(file, &model).err().expect("it is refused").to_string()
    };
    let untied = folder().join("untied.gguf");
    let with = |name, value| refusal(&llama(false, &[(name, value)]), &untied);
    contains(
        &with("layers", "3"),
        &["untied.gguf", "`llama.block_count` is 2 in the metadata, the spec wants 3", "`--set model.layers=2`"],
    );
    contains(&with("rope_theta", "20000.0"), &["`llama.rope.freq_base` is 10000.0", "the spec wants 20000.0"]);
    contains(&with("eps", "1e-6"), &["`llama.attention.layer_norm_rms_epsilon` is 0.00001", "`--set model.eps="]);
    contains(&with("vocab", "321"), &["`llama.vocab_size` is 320"]);
    contains(&with("tied", "true"), &["`output.weight`", "`token_embd.weight`", "`--set model.tied=false`"]);
    let tied = folder().join("tied.gguf");
    contains(
        &refusal(&llama(false, &[("rope_theta", "500000.0")]), &tied),
        &["`output.weight` is missing", "`--set model.tied=true`"],
    );

    let plain = llama(false, &[]);
    let other = changed(&bench, "untied.gguf", b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen9");
    contains(&refusal(&plain, &other), &["`general.architecture` is `qwen9`", "`llama` reads llama", "no backbone"]);
    let gpt2 = "model = gpt2(layers: 1, hidden: 8, heads: 2, ffn: 8, vocab: 8, context: 8)\n";
    contains(&refusal(gpt2, &untied), &["`gpt2` does not say how GGUF files write"]);
    let adapter = changed(&bench, "untied.gguf", b"\x05\0\0\0\0\0\0\0model", b"\x05\0\0\0\0\0\0\0vocab");
    contains(&refusal(&plain, &adapter), &["`general.type` is `vocab`", "a tokenizer"]);
    let unknown = changed(&bench, "untied.gguf", b"llama.feed_forward_length", b"llama.feed_forward_lengtt");
    contains(&refusal(&plain, &unknown), &["`llama.feed_forward_lengtt` is 64", "`llama` does not know it"]);
    let stranger = changed(&bench, "untied.gguf", b"blk.1.ffn_norm.weight", b"blk.1.ffn_worm.weight");
    contains(
        &refusal(&plain, &stranger),
        &["`blk.1.ffn_norm.weight` is missing; the file has `blk.1.ffn_worm.weight`"],
    );
    let ones = [1f32; 4].map(f32::to_le_bytes).concat();
    let scaled = changed(&bench, "tied.gguf", &ones, &[1f32, 1.0, 2.0, 8.0].map(f32::to_le_bytes).concat());
    contains(
        &refusal(&llama(true, &[]), &scaled),
        &["`rope_freqs.weight` is 2 at [2], 1 in", "rotary positions are not scaled"],
    );
    let more = changed(&bench, "untied.gguf", b"\x0d\0\0\0\0\0\0\0output.weight", b"\x0d\0\0\0\0\0\0\0outpot.weight");
    contains(&refusal(&llama(true, &[("rope_theta", "10000.0")]), &more), &["not read by `llama`: outpot.weight"]);
}

#[test]
fn unsupported_tokenizers_are_refused_by_name() {
    let bench = Bench::new();
    let refusal = |file: &Path| tokenizer::open(file).err().expect("it is refused").to_string();
    let file = |from: &[u8], to: &[u8]| refusal(&changed(&bench, "pre-smollm.gguf", from, to));
    contains(&file(b"gpt2", b"bert"), &["changed.gguf", "`bert` (WordPiece)", "`--tokenizer`"]);
    contains(&file(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0what"), &["`tokenizer.ggml.model` is `what`"]);
    contains(&file(b"smollm", b"tekken"), &["`tokenizer.ggml.pre` is `tekken`", "gpt-2, smollm", "`--tokenizer`"]);
    contains(&file(b"ggml.pre", b"ggml.per"), &["does not say how its tokenizer splits text"]);
    contains(&file(b"ggml.tokens", b"ggml.tokenz"), &["no list of texts `tokenizer.ggml.tokens`"]);
    contains(&file(b"ggml.merges", b"ggml.mergez"), &["no list of texts `tokenizer.ggml.merges`"]);
    contains(&file("\u{120} t".as_bytes(), "\u{120}_t".as_bytes()), &["merge", "is not two tokens and a space"]);
    contains(&file(b"<|im_start|>", b"<|im_start|\xff"), &["`tokenizer.ggml.tokens`", "UTF-8"]);
    contains(&refusal(&folder().join("types.gguf")), &["it holds no tokenizer"]);
}

#[test]
fn a_folder_with_a_gguf_file_is_refused_naming_the_file() {
    let bench = Bench::new();
    let file = bench.path("weights/tied.gguf");
    fs::create_dir_all(bench.path("weights")).expect("a folder");
    fs::copy(folder().join("tied.gguf"), &file).expect("copied");
    let refused = checkpoint::resolve(&bench.path("weights")).expect_err("it is refused").to_string();
    contains(&refused, &["it holds `tied.gguf`", "GGUF", "names the file itself"]);
    assert_eq!(checkpoint::resolve(&file).expect("a file"), file);
    let missing = checkpoint::resolve(&bench.path("none.gguf")).expect_err("it is refused").to_string();
    contains(&missing, &["none.gguf"]);
}

#[test]
fn merging_a_gguf_base_requires_a_tokenizer() {
    let bench = Bench::new();
    let (path, _) = spec(&bench, "spec.peft", &llama(true, &[]));
    let (file, out) = (folder().join("tied.gguf"), bench.path("merged"));
    let arguments = ["merge".as_ref(), path.as_os_str(), "--weights".as_ref(), file.as_os_str(), "--adapter".as_ref()];
    let ran = bench.peftc(arguments.into_iter().chain(["none".as_ref(), "-o".as_ref(), out.as_os_str()]));
    assert_eq!(ran.code, 2, "{}", ran.err);
    contains(&ran.err, &["tied.gguf", "`--tokenizer`"]);
}

/// Every tensor, the logits, and the ids of a thousand sentences of SmolLM2-135M-Instruct (Q4_1 and Q8_0, fetched by
/// `make smollm2`), against the package `gguf` and transformers.
#[test]
fn smollm2_matches_transformers() {
    let (Some(_), Some(file), Some(data)) =
        (env_or_skip("PEFTC_FULL"), env_or_skip("PEFTC_SMOLLM2"), env_or_skip("PEFTC_DATA"))
    else {
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/interop-venv/bin/python");
    if !python.is_file() {
        println!("skipped: no virtual environment with transformers and gguf; `make interop` makes one");
        return;
    }
    let file = PathBuf::from(file);
    let bench = Bench::new();
    let work = bench.path("work");
    fs::create_dir_all(&work).expect("a folder");
    let asked = Command::new(python)
        .arg(root.join("tests/interop/gguf_check.py"))
        .args([&file, &PathBuf::from(data).join("data/webnlg/train.json"), &work])
        .output()
        .expect("it starts");
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));

    let found = GgufFile::open(&file).unwrap_or_else(|e| panic!("{e}"));
    let wanted = SafeFile::open(&work.join("values.safetensors")).expect("sound");
    println!("{} tensors to the bit", same_bits(&found, &wanted));
    drop((found, wanted));

    let text = "model = llama(layers: 30, hidden: 576, heads: 9, kv_heads: 3, ffn: 1536, vocab: 49152, context: 8192, \
                eps: 1e-5, rope_theta: 100000.0, tied: true)\n";
    let (path, _) = spec(&bench, "smollm2.peft", text);
    let gap = gap(&bench, &path, &file, &work.join("case.safetensors"));
    println!("logits within {gap:e} of the largest");
    assert!(gap <= 1e-5, "{gap}");

    let opened = tokenizer::open(&file).unwrap_or_else(|e| panic!("{e}"));
    let ids: Value = serde_json::from_slice(&fs::read(work.join("ids.json")).expect("a file")).expect("JSON");
    let ids = ids.as_array().expect("a list");
    assert_eq!(ids.len(), 1000);
    for entry in ids {
        let text = entry["text"].as_str().expect("a text");
        let wanted: Vec<u32> = serde_json::from_value(entry["ids"].clone()).expect("ids");
        assert_eq!(opened.library.encode_fast(text, true).expect("ids").get_ids(), wanted, "{text:?}");
    }
    let templates = opened.templates.expect("SmolLM2 has a template of conversations");
    assert!(templates.get("default").is_some_and(|template| template.contains("<|im_start|>")), "{templates:?}");
}
