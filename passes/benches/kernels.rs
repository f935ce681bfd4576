//! Compares the kernels and launches of all of the paper's specs before and after a change of the lowering.
//!
//! ```text
//! cargo bench --profile dev -p peft-passes --bench kernels -- write BEFORE [PART OF A SPEC'S PATH]…
//! cargo bench --profile dev -p peft-passes --bench kernels -- compare BEFORE AFTER
//! ```
//!
//! `write` lowers every spec of `models/paper`, or those whose path contains one of the parts, in f32 and bf16, for
//! every machine below. It writes the text of each kernel once, into a file named by the text's hash, and the launches
//! of each spec, precision and machine into a plan file. Neither contains kernel names. `compare` compares two such
//! folders: where the text of a kernel has changed, it compiles both, and their PTX or object code must be the same. It
//! lists the kernels that differ, with their number of instructions before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use peft_grammar::model::Precision;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::lower::Lowered;
use peft_passes::pipeline::{self, Options, Stage};
use peft_passes::target::Machine;
use peft_runtime::artifact::Launch;

const MACHINES: [&str; 5] = ["cuda:sm_70", "cuda:sm_80", "cuda:sm_90", "cpu:x86-64-v3", "cpu:x86-64-v4"];
const PRECISIONS: [(Precision, &str); 2] = [(Precision::F32, "f32"), (Precision::Bf16, "bf16")];

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let done = match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", folder, parts @ ..] => write(Path::new(folder), parts).map(|()| true),
        ["compare", before, after] => compare(Path::new(before), Path::new(after)),
        _ => Err("usage: kernels write FOLDER [PART]… | kernels compare BEFORE AFTER".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// The files below a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut found = vec![];
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    found.sort();
    Ok(found)
}

/// Runs `body` on each item, in parallel on all processors.
fn each<T: Send>(work: Vec<T>, body: impl Fn(T) -> Result<(), Failure> + Sync) -> Result<(), Failure> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let left = Mutex::new(work);
    let next = || left.lock().expect("no thread panics with it").pop();
    let worker = || std::iter::from_fn(next).try_for_each(&body);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|w| w.join().expect("no thread panics"))
    })
}

fn write(folder: &Path, parts: &[&str]) -> Result<(), Failure> {
    let specs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/paper");
    for machine in MACHINES {
        fs::create_dir_all(folder.join("kernels").join(machine))?;
    }
    fs::create_dir_all(folder.join("plans"))?;
    let selected = |path: &PathBuf| parts.is_empty() || parts.iter().any(|part| path.to_string_lossy().contains(part));
    each(files(&specs)?.into_iter().filter(selected).collect(), |path| {
        let name = path.strip_prefix(&specs)?.display().to_string();
        let mut model = peft_grammar::check(&name, &fs::read_to_string(&path)?, &peft_grammar::no_imports)
            .map_err(|e| e.to_string())?;
        for (precision, word) in PRECISIONS {
            model.train.precision = precision;
            for machine in MACHINES {
                let options = Options { machine: machine.parse()?, until: Stage::Loops, ..Options::default() };
                let compiled = pipeline::run(&Dialect::new()?, &model, &pipeline::artifact_entries(&model), &options)?;
                let plan = plan(
                    &compiled.lowered.expect("the pipeline ran to the loops stage"),
                    &folder.join("kernels").join(machine),
                )?;
                fs::write(folder.join("plans").join(format!("{}.{word}.{machine}", name.replace('/', "."))), plan)?;
            }
        }
        println!("{name}");
        Ok(())
    })
}

/// The plan of a program: its buffers, the launches of all entries with the hashes of their kernels, and the outputs.
fn plan(lowered: &Lowered, kernels: &Path) -> Result<String, Failure> {
    let manifest = &lowered.manifest;
    let mut hashes = vec![];
    for (name, text) in manifest.kernels.iter().zip(lowered.kernels()) {
        let text = text.replace(&format!("@{name}"), "@kernel");
        let hash = blake3::hash(text.as_bytes()).to_hex()[..16].to_string();
        fs::write(kernels.join(&hash), text)?;
        hashes.push(hash);
    }
    let mut plan = String::new();
    for buffer in &manifest.buffers {
        writeln!(plan, "buffer {}", serde_json::to_string(buffer)?)?;
    }
    let mut launches = |entry: &str, launches: &[Launch]| {
        launches.iter().try_for_each(|launch| {
            // The kernel's hash stands for its index.
            let rest = serde_json::to_string(&Launch { kernel: 0, ..launch.clone() })?;
            writeln!(plan, "{entry} {} {rest}", hashes[launch.kernel])?;
            Ok::<(), Failure>(())
        })
    };
    launches("prepare", &manifest.prepare)?;
    for (name, entry) in &manifest.entries {
        launches(name, &entry.launches)?;
    }
    for (name, entry) in &manifest.entries {
        writeln!(plan, "{name} gives {}", serde_json::to_string(&entry.outputs)?)?;
    }
    Ok(plan)
}

fn compare(before: &Path, after: &Path) -> Result<bool, Failure> {
    let names = |folder: &Path| -> Result<BTreeSet<String>, Failure> {
        let names = files(&folder.join("plans"))?.into_iter();
        Ok(names.filter_map(|path| Some(path.file_name()?.to_str()?.to_string())).collect())
    };
    let (old, new) = (names(before)?, names(after)?);
    let mut same = true;
    for name in old.symmetric_difference(&new) {
        println!("{name}: exists in only one of the folders");
        same = false;
    }
    // By machine, old hash and new hash: the first launch whose kernel's text has changed.
    let mut changed: BTreeMap<(String, String, String), String> = BTreeMap::new();
    for name in old.intersection(&new) {
        let machine = MACHINES.into_iter().find(|machine| name.ends_with(machine)).unwrap_or_default();
        let [was, is] = [before, after].map(|folder| fs::read_to_string(folder.join("plans").join(name)));
        let (was, is) = (was?, is?);
        if was.lines().count() != is.lines().count() {
            println!("{name}: {} lines before, {} after", was.lines().count(), is.lines().count());
            same = false;
            continue;
        }
        for (was, is) in was.lines().zip(is.lines()).filter(|(was, is)| was != is) {
            let [was_parts, is_parts] = [was, is].map(|line| line.splitn(3, ' ').collect::<Vec<_>>());
            match (&was_parts[..], &is_parts[..]) {
                ([entry, x, rest], [entry_is, y, rest_is]) if entry == entry_is && rest == rest_is && x != y => {
                    let key = (machine.to_string(), x.to_string(), y.to_string());
                    changed.entry(key).or_insert(format!("{name}: {entry} {rest}"));
                }
                _ => {
                    println!("{name}:\n  - {was}\n  + {is}");
                    same = false;
                }
            }
        }
    }
    let (all, differing) = (changed.len(), Mutex::new(0));
    each(changed.into_iter().collect(), |((machine, was, is), place)| {
        let code = |folder: &Path, hash: &str| {
            code(&fs::read_to_string(folder.join("kernels").join(&machine).join(hash))?, &machine)
        };
        let (was, is) = (code(before, &was)?, code(after, &is)?);
        if was != is {
            println!("{place}\n  {} instructions before, {} after", instructions(&was), instructions(&is));
            *differing.lock().expect("no thread panics with it") += 1;
        }
        Ok(())
    })?;
    let differing = differing.into_inner().expect("no thread panics with it");
    println!("{} plans; of {all} kernels whose text has changed, {differing} have other code", old.len());
    Ok(same && differing == 0)
}

/// The PTX of a kernel, or the disassembly of its object code.
fn code(text: &str, machine: &str) -> Result<String, Failure> {
    let machine: Machine = machine.parse()?;
    let kernels = [text.to_string()];
    if let Machine::Cuda(_) = machine {
        return Ok(codegen::ptx(&Dialect::new()?, &kernels, machine)?);
    }
    let library = tempfile::NamedTempFile::new()?;
    codegen::compile(&kernels, machine, None, library.path())?;
    let disassembly = std::process::Command::new("objdump")
        .args(["-d", "-s", "-j.text", "-j.rodata"])
        .arg(library.path())
        .output()?;
    let disassembly = String::from_utf8_lossy(&disassembly.stdout).into_owned();
    // The first lines contain the file's name.
    Ok(disassembly.lines().skip(3).fold(String::new(), |code, line| code + line + "\n"))
}

fn instructions(code: &str) -> usize {
    code.lines().filter(|line| line.contains('\t')).count()
}
