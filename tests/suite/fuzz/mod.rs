//! Fuzzing of files from outside: `config.json`, tokenizers, PEFT's configurations, safetensors headers, GGUF, and rows
//! of data are damaged at random.
//!
//! Each file is read as a command would read it. The result must be a value or an error: no panic, no abort, at most 1
//! GB of memory, and at most [`MAX_TIME`] of time. A child process does the reading, so that an abort is noticed and
//! its memory can be measured. A failure prints its seed and keeps its folder. `PEFTC_FUZZ_SEED=N` repeats one seed,
//! and `PEFTC_FUZZ_SECONDS=N` sets the duration.

mod mutate;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mutate::Random;
use peft_grammar::model::{Model, Origin, TaskKind};
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use peft_runtime::weights;
use peftc::data::Dataset;
use peftc::hub::peft::{self, Tensors};
use peftc::hub::{checkpoint, tokenizer};
use peftc::{adapters, exchange};

use crate::cli::Bench;
use crate::reports;

const MAX_BYTES: u64 = 1_000_000_000;
const MAX_TIME: Duration = Duration::from_secs(20);

/// The variable that makes the test act as the child. Its value is the folder of the inputs.
const CHILD: &str = "PEFTC_FUZZ_CHILD";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn damaged_files_are_refused_without_a_crash() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    let seconds =
        number("PEFTC_FUZZ_SECONDS").unwrap_or(if std::env::var_os("PEFTC_FULL").is_some() { 120 } else { 5 });
    let bench = Bench::new();
    let program = std::env::current_exe().expect("its path");
    let (said, complained) = (bench.path("said"), bench.path("complained"));
    // The limit counts reserved memory too, so an allocation of a size that a damaged file claims fails here.
    let run = Command::new("prlimit")
        .arg(format!("--data={MAX_BYTES}"))
        .arg(program)
        .args(["fuzz::damaged_files_are_refused_without_a_crash", "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, bench.path("world"))
        .env("PEFTC_FUZZ_SECONDS", seconds.to_string())
        .env("NO_COLOR", "1")
        .stdout(fs::File::create(&said).expect("a file"))
        .stderr(fs::File::create(&complained).expect("a file"))
        .status()
        .expect("`prlimit` of util-linux starts");
    let last = last_lines(&said, 6);
    if !run.success() {
        let kept = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        let _ = fs::remove_dir_all(&kept);
        let _ = Command::new("cp").arg("-r").arg(bench.path("world")).arg(&kept).status();
        panic!("{run}; its files are in {}\n{last}\n{}", kept.display(), last_lines(&complained, 30));
    }
    println!("{last}");
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// A spec with all files that its commands read.
struct FuzzCase {
    name: &'static str,
    model: Model,
    /// The undamaged files: paths below the folder, and contents.
    files: Vec<(PathBuf, Vec<u8>)>,
    data: &'static str,
    /// The folder or file that `--weights` names.
    weights: &'static str,
}

const CLASSIFIER: &str = r#"
model = bert(layers: 1, hidden: 8, heads: 2, ffn: 8, vocab: 41, context: 32)
tune { every attention { lora(rank: 2, alpha: 4) on q, v } }
task sentiment { kind: classification  max_tokens: 16  labels: ["bad", "good"] }
"#;

const GENERATOR: &str = r#"
model = gpt2(layers: 1, hidden: 8, heads: 2, ffn: 8, vocab: 1542, context: 64, token_types: true)
tune { every attention { lora(rank: 2, alpha: 4) on q, v } }
task triples {
  kind: generation
  max_tokens: 48
  special: ["<bos>", "<eos>", "<subject>", "<property>", "<object>", "<target>"]
  template: "<bos> (<subject> {subject} <property> {property} <object> {object})* <target> {text} <eos>"
  target: "<target>"
}
"#;

/// The model of `tests/interop/gguf/untied.gguf`, extended by new tokens.
const GGUF: &str = r#"
model = llama(layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 322, context: 64, eps: 1e-5)
tune { every attention { lora(rank: 2, alpha: 4) on q, v } }
task triples {
  kind: generation
  max_tokens: 64
  special: ["<s>", "<target>", "<|endoftext|>"]
  template: "<s> ({subject} {property} {object})* <target> {text} <|endoftext|>"
  target: "<target>"
}
"#;

const TRIPLES: &str = r#"{"entries": [
  {"1": {"category": "A", "lexicalisations": [{"comment": "good", "lang": "", "lex": "the cat sat"}],
         "modifiedtripleset": [{"object": "cat", "property": "is", "subject": "it"}]}},
  {"2": {"category": "A", "lexicalisations": [{"comment": "good", "lang": "", "lex": "12 rats ran"}],
         "modifiedtripleset": [{"object": "rat", "property": "are", "subject": "12"}]}}
]}"#;

const WORDS: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nfilm\nis\ngood\nbad\n##ly\n##s\na\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk\n\
    l\nm\nn\no\np\nq\nr\ns\nt\nu\nv\nw\nx\ny\nz\n.\n,";

fn cases(bench: &Bench) -> [FuzzCase; 3] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rows = "the film is good\tgood\nbadly made , films\tbad\ngood\t1\n";
    let classifier = case(
        bench,
        "bert",
        CLASSIFIER,
        "data.tsv",
        rows.as_bytes(),
        &[
            ("weights/vocab.txt", WORDS.as_bytes().to_vec()),
            (
                "weights/tokenizer_config.json",
                br#"{"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": 32}"#.to_vec(),
            ),
            (
                "weights/special_tokens_map.json",
                br#"{"cls_token": "[CLS]", "sep_token": {"content": "[SEP]", "lstrip": false}}"#.to_vec(),
            ),
            ("weights/added_tokens.json", br#"{"[NEW]": 40}"#.to_vec()),
        ],
    );
    let entries = fs::read(root.join("data/triples/dev.json")).expect("it ships with the project");
    let mut first: serde_json::Value = serde_json::from_slice(&entries).expect("JSON");
    first["entries"].as_array_mut().expect("a list").truncate(4);
    let tokenizer = fs::read(root.join("data/triples/tokenizer.json")).expect("it ships with the project");
    let generator = case(
        bench,
        "gpt2",
        GENERATOR,
        "data.json",
        first.to_string().as_bytes(),
        &[
            ("weights/tokenizer.json", tokenizer),
            (
                "weights/tokenizer_config.json",
                br#"{"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": false}"#.to_vec(),
            ),
        ],
    );
    let file = fs::read(root.join("tests/interop/gguf/untied.gguf")).expect("it is part of the repository");
    let mut gguf = case(bench, "llama", GGUF, "data.json", TRIPLES.as_bytes(), &[("weights.gguf", file)]);
    gguf.files.retain(|(path, _)| !path.starts_with("weights"));
    gguf.weights = "weights.gguf";
    [classifier, generator, gguf]
}

fn case(
    bench: &Bench,
    name: &'static str,
    text: &str,
    data: &'static str,
    rows: &[u8],
    beside: &[(&str, Vec<u8>)],
) -> FuzzCase {
    let (_, model) = reports::spec(bench, &format!("{name}.peft"), text);
    let folder = bench.path(&format!("sound-{name}"));
    let checkpoint = reports::checkpoint(bench, &format!("sound-{name}/weights"), &model);
    assert!(checkpoint.starts_with(&folder));
    // Trained values in our own format and in PEFT's.
    let drawn = model.params.iter().zip(weights::random(&model.params, 3));
    let trained = drawn.filter_map(|(p, x)| Some((p.name.clone(), Stored::f32(p.trained_shape()?, x.to_vec()))));
    let values: Tensors = trained.collect();
    let own = TensorFile { tensors: values.clone(), ..TensorFile::default() };
    adapter::save(
        &folder.join("own/adapter.safetensors"),
        &adapters::annotated(own, &model, &adapters::Base::default()),
    )
    .expect("written");
    let head = model.params.iter().zip(weights::random(&model.params, 3)).filter(|(p, _)| p.origin == Origin::Head);
    let drawn_head = head.map(|(p, x)| (p.name.clone(), Stored::f32(p.shape.clone(), x.to_vec()))).collect();
    let foreign = peft::export(&model, &values, &drawn_head).unwrap_or_else(|e| panic!("{e}"));
    foreign.save(&folder.join("peft")).expect("written");
    let mut batch = TensorFile::default();
    for (name, shape, data) in [
        ("ids", vec![2, 3], vec![1, 2, 3, 4, 5, 0]),
        ("mask", vec![2, 3], vec![1, 1, 1, 1, 1, 0]),
        match model.task.kind {
            TaskKind::Classification { .. } => ("labels", vec![2], vec![0, 1]),
            _ => ("labels", vec![2, 3], vec![-100, 2, 3, -100, 5, -100]),
        },
    ] {
        batch.tensors.insert(format!("inputs.{name}"), Stored { shape, data: Data::I64(data) });
    }
    adapter::save(&folder.join("batch.safetensors"), &batch).expect("written");
    fs::write(folder.join(data), rows).expect("written");
    for (path, content) in beside {
        fs::write(folder.join(path), content).expect("written");
    }
    let mut files = vec![];
    collect(&folder, &folder, &mut files);
    files.sort();
    FuzzCase { name, model, files, data, weights: "weights" }
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            let seen = path.strip_prefix(root).expect("below it").to_path_buf();
            files.push((seen, fs::read(&path).expect("readable")));
        }
    }
}

fn child() {
    let folder = PathBuf::from(std::env::var_os(CHILD).expect("the parent names it"));
    let bench = Bench::new();
    let cases = cases(&bench);
    for case in &cases {
        let answers = read(case, &write_files(case, &folder, &case.files));
        let refused: Vec<&String> = answers.iter().filter_map(|(_, a)| a.as_ref().err()).collect();
        assert!(refused.is_empty(), "{}: sound files are refused: {refused:?}", case.name);
    }
    let until = Instant::now() + Duration::from_secs(number("PEFTC_FUZZ_SECONDS").unwrap_or(5));
    let first = number("PEFTC_FUZZ_SEED");
    let (mut seed, mut accepted, mut refused) = (first.unwrap_or_else(start), 0u64, 0u64);
    loop {
        println!("seed {seed}");
        let mut random = Random(seed);
        let case = random.of(&cases);
        let mut files = case.files.clone();
        for _ in 0..1 + random.below(2) {
            let at = random.below(files.len());
            damage(&mut random, &files[at].0.clone(), &mut files[at].1);
        }
        let folder = write_files(case, &folder, &files);
        let begun = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| read(case, &folder))) {
            Ok(answers) => {
                let count = answers.iter().filter(|(_, a)| a.is_err()).count() as u64;
                (accepted, refused) = (accepted + answers.len() as u64 - count, refused + count);
            }
            Err(payload) => {
                let message = payload.downcast_ref::<String>().map(String::as_str);
                let message = message.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                println!("seed {seed} panicked: {message}");
                std::process::exit(1);
            }
        }
        let took = begun.elapsed();
        if took > MAX_TIME || peak() > MAX_BYTES {
            println!("seed {seed} took {took:?}; the most memory so far is {} bytes", peak());
            std::process::exit(1);
        }
        if first.is_some() || Instant::now() > until {
            break;
        }
        seed = seed.wrapping_add(1);
    }
    println!("{accepted} readings accepted, {refused} refused, at most {} MB", peak() / 1_000_000);
    assert!(first.is_some() || (accepted > 0 && refused > 0), "the damage is of no kind");
}

/// A first seed that differs from run to run. A failure prints its seed.
fn start() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |d| d.as_nanos() as u64)
}

fn damage(random: &mut Random, path: &Path, data: &mut Vec<u8>) {
    match path.extension().and_then(|e| e.to_str()) {
        _ if random.below(6) == 0 => mutate::bytes(random, data),
        Some("json") => mutate::json(random, data),
        Some("safetensors") => mutate::safetensors(random, data),
        Some("gguf") => mutate::gguf(random, data),
        _ => mutate::rows(random, data),
    }
}

/// Writes the case's files into a folder of its name, which is emptied first.
fn write_files(case: &FuzzCase, folder: &Path, files: &[(PathBuf, Vec<u8>)]) -> PathBuf {
    let folder = folder.join(case.name);
    let _ = fs::remove_dir_all(&folder);
    for (path, content) in files {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, content).expect("written");
    }
    folder
}

type Answers = Vec<(&'static str, Result<(), String>)>;

/// Reads everything that commands read from these files. An error does not stop the other readers.
fn read(case: &FuzzCase, folder: &Path) -> Answers {
    let FuzzCase { model, .. } = case;
    let (weights, data) = (folder.join(case.weights), folder.join(case.data));
    let text = |e: peftc::failure::Failure| e.to_string();
    let tokens = || -> Result<(), String> {
        let tokenizer = tokenizer::find(None, &weights, &data, model).map_err(text)?;
        let data = Dataset::load(&data, &model.task, &tokenizer).map_err(|e| e.to_string())?;
        for batch in peftc::data::Batches::new(&data, 2, peftc::data::Order::AsStored) {
            exchange::inputs(&batch, [0, 0]).sizes(0).map_err(|e| e.to_string())?;
        }
        Ok(())
    };
    let batch = || -> Result<(), String> {
        let path = folder.join("batch.safetensors");
        let file = adapter::load(&path).map_err(|e| e.to_string())?;
        exchange::batch(&file, "inputs.", &path, model).map(drop).map_err(|e| e.to_string())
    };
    vec![
        ("checkpoint", checkpoint::weights(&weights, model).map(drop).map_err(text)),
        ("data", tokens()),
        ("own adapter", adapters::load(model, &folder.join("own")).map(drop).map_err(text)),
        ("PEFT's adapter", adapters::load(model, &folder.join("peft")).map(drop).map_err(text)),
        ("batch", batch()),
    ]
}

/// The peak memory of this process in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}
