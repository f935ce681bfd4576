//! Artifacts are code, so they are loaded only from files that only the user and root can write. Also: many processes
//! with one cache.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cli::{Bench, Ran, text, tiny_bert};

/// The id of a user who is neither root nor the user who runs the tests.
const STRANGER: u32 = 65534;

fn root() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
    if !root {
        println!("skipped: only root can give files to other users");
    }
    root
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("its mode");
}

fn permissions(path: &Path) -> u32 {
    fs::metadata(path).expect("there").permissions().mode() & 0o7777
}

/// Runs the last command that a message names in backquotes, and returns it.
fn mended(ran: &Ran, home: &Path) -> String {
    let command = ran.err.rsplit('`').nth(1).expect("a command").to_string();
    let status = Command::new("sh").args(["-c", &command]).env("HOME", home).status().expect("a shell");
    assert!(status.success(), "{command}");
    command
}

/// A tiny model, its artifact, and the arguments of its evaluation.
struct Tiny {
    bench: Bench,
    spec: PathBuf,
    artifact: PathBuf,
    given: Vec<String>,
}

impl Tiny {
    fn new(target: &str) -> Self {
        let bench = Bench::with_own_cache();
        let (spec, weights) = tiny_bert(&bench, |_| {});
        let data = bench.write("data.tsv", "good film\t1\nbad film\t0\n");
        let artifact = bench.path("folder/tiny.peftc");
        let ran = bench.peftc(["compile", text(&spec), "--target", target, "-o", text(&artifact)]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let given = ["--weights", text(&weights), "--data", text(&data), "--threads", "1"].map(String::from).to_vec();
        Tiny { bench, spec, artifact, given }
    }

    fn eval(&self, source: &Path) -> Ran {
        self.bench.peftc(["eval", text(source)].map(String::from).iter().chain(&self.given))
    }

    fn evaluates(&self, source: &Path) {
        let ran = self.eval(source);
        assert_eq!(ran.code, 0, "{}: {}", source.display(), ran.err);
    }

    /// Requires the artifact to be refused because of `place` for the reason `why`, and the command in the message to
    /// fix it.
    fn refused(&self, source: &Path, place: &Path, why: &str) -> String {
        let ran = self.eval(source);
        assert_eq!(ran.code, 3, "{}: {}{}", place.display(), ran.out, ran.err);
        let place = place.canonicalize().expect("there");
        for word in [&format!("`{}` {why}", place.display())[..], "is code, which runs with your rights"] {
            assert!(ran.err.contains(word), "it should say `{word}`:\n{}", ran.err);
        }
        let command = mended(&ran, &self.bench.path("home"));
        self.evaluates(source);
        command
    }
}

#[test]
fn files_writable_by_others_are_not_loaded() {
    let tiny = Tiny::new("cpu");
    tiny.evaluates(&tiny.artifact);
    let [folder, artifact] = [tiny.bench.path("folder"), tiny.artifact.clone()];
    for part in ["", "manifest.json", "kernels.so"] {
        let place = artifact.join(part);
        let place = if part.is_empty() { artifact.clone() } else { place };
        let open = if part.is_empty() { 0o777 } else { 0o666 };
        mode(&place, open);
        let command = tiny.refused(&artifact, &place, "may be written by everyone");
        assert_eq!(command, format!("chmod -R go-w {}", artifact.canonicalize().expect("there").display()));
    }
    // Others could replace the artifact in its folder, unless the folder is sticky.
    mode(&folder, 0o777);
    tiny.refused(&artifact, &folder, "may be written by everyone");
    mode(&folder, 0o1777);
    tiny.evaluates(&artifact);
    // The target of a link is checked, not the link.
    let link = tiny.bench.path("link.peftc");
    std::os::unix::fs::symlink(&artifact, &link).expect("linked");
    tiny.evaluates(&link);
    mode(&artifact.join("kernels.so"), 0o666);
    tiny.refused(&link, &artifact.join("kernels.so"), "may be written by everyone");
    // The command quotes a path with spaces.
    let spaced = tiny.bench.path("it's a folder/tiny.peftc");
    fs::create_dir(spaced.parent().expect("a parent")).expect("made");
    fs::rename(&artifact, &spaced).expect("moved");
    mode(&spaced, 0o777);
    tiny.refused(&spaced, &spaced, "may be written by everyone");
}

#[test]
fn files_of_other_users_are_not_loaded() {
    if !root() {
        return;
    }
    let tiny = Tiny::new("cpu");
    let artifact = &tiny.artifact;
    let owner = "belongs to user 65534";
    for place in [&artifact.join("kernels.so"), &artifact.join("manifest.json"), artifact, &tiny.bench.path("folder")] {
        chown(place, Some(STRANGER), None).expect("given away");
        tiny.refused(artifact, place, owner);
    }
    // A group of another user is not trusted by root.
    let file = artifact.join("kernels.so");
    chown(&file, None, Some(STRANGER)).expect("given away");
    mode(&file, 0o664);
    tiny.refused(artifact, &file, "may be written by the group 65534");
    // Root's own group is trusted if it has no other member.
    chown(&file, None, Some(0)).expect("given back");
    mode(&file, 0o664);
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    if group.lines().any(|line| line.starts_with("root:") && line.ends_with(':')) {
        tiny.evaluates(artifact);
    }
}

/// PTX is checked like a library.
#[test]
fn ptx_is_checked_like_a_library() {
    let tiny = Tiny::new("cuda:sm_80");
    let file = tiny.artifact.join("kernels.ptx");
    mode(&file, 0o666);
    let ran = tiny.eval(&tiny.artifact);
    assert_eq!(ran.code, 3, "{}", ran.err);
    assert!(ran.err.contains("kernels.ptx` may be written by everyone"), "{}", ran.err);
    mended(&ran, &tiny.bench.path("home"));
    assert!(!tiny.eval(&tiny.artifact).err.contains("may be written"));
}

#[test]
fn the_cache_is_private_to_its_user() {
    let tiny = Tiny::new("cpu");
    let cache = tiny.bench.path("cache");
    assert_eq!(permissions(&cache), 0o700);
    let entries = || -> BTreeSet<PathBuf> {
        let all = fs::read_dir(&cache).expect("there").map(|entry| entry.expect("an entry").path());
        let (kernels, models): (BTreeSet<PathBuf>, _) =
            all.partition(|path| path.extension().is_some_and(|e| e == "kernels"));
        assert_eq!(kernels.iter().map(|path| permissions(path)).collect::<Vec<_>>(), [0o700]);
        models
    };
    // One entry for the artifact with all its functions, and one for the evaluation.
    let compiled = entries();
    tiny.evaluates(&tiny.spec);
    let before = entries();
    assert_eq!((compiled.len(), before.len()), (1, 2), "{before:?}");
    let evaluated = before.difference(&compiled).next().expect("a new one").join("kernels.so");
    mode(&cache, 0o777);
    let command = tiny.refused(&tiny.spec, &cache, "may be written by everyone");
    assert!(command.starts_with("chmod -R go-w "), "{command}");
    // For the cache, a sticky bit does not help, because other users could add entries.
    mode(&cache, 0o1777);
    tiny.refused(&tiny.spec, &cache, "may be written by everyone");
    mode(&evaluated, 0o646);
    tiny.refused(&tiny.spec, &evaluated, "may be written by everyone");
    // Permissions to read are kept.
    mode(&cache, 0o755);
    tiny.evaluates(&tiny.spec);
    assert_eq!((permissions(&cache), entries()), (0o755, before));
    if root() {
        chown(&cache, Some(STRANGER), None).expect("given away");
        let command = tiny.refused(&tiny.spec, &cache, "belongs to user 65534");
        assert!(command.starts_with("rm -r "), "{command}");
        assert_eq!(permissions(&cache), 0o700);
    }
}

/// Runs the program as another user: files of a third user are refused, files of root are accepted.
#[test]
fn files_of_a_third_user_are_refused_to_another_user() {
    if !root() {
        return;
    }
    let tiny = Tiny::new("cpu");
    mode(tiny.bench.path("").as_path(), 0o755);
    let home = tiny.bench.path("home");
    fs::create_dir(&home).expect("made");
    chown(&home, Some(STRANGER), Some(STRANGER)).expect("given away");
    // The program is copied, because other users may not be able to read its folder.
    let program = tiny.bench.path("peftc");
    fs::copy(env!("CARGO_BIN_EXE_peftc"), &program).expect("copied");
    mode(&program, 0o755);
    let run = |source: &Path| {
        let mut command = Command::new(&program);
        command.args(["eval", text(source)]).args(&tiny.given).uid(STRANGER).gid(STRANGER);
        command.current_dir(&home).env("HOME", &home).env_remove("XDG_CACHE_HOME").env_remove("PEFTC_CACHE");
        let ran = command.env("NO_COLOR", "1").output().expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { code: ran.status.code().expect("no signal"), out: text(&ran.stdout), err: text(&ran.stderr) }
    };
    let fine = |source: &Path| {
        let ran = run(source);
        assert_eq!(ran.code, 0, "{}: {}", source.display(), ran.err);
    };
    fine(&tiny.artifact);
    fine(&tiny.spec);
    assert_eq!(permissions(&home.join(".cache/peftc")), 0o700);
    // The suggested command copies a file of a third user, and the copy is accepted.
    let other = 65533;
    for place in [tiny.artifact.clone(), tiny.artifact.join("kernels.so")] {
        chown(&place, Some(other), None).expect("given away");
        let ran = run(&tiny.artifact);
        assert_eq!(ran.code, 3, "{}", ran.err);
        assert!(ran.err.contains("belongs to user 65533"), "{}", ran.err);
        let command = ran.err.rsplit('`').nth(1).expect("a command");
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).env("HOME", &home).uid(STRANGER).gid(STRANGER);
        assert!(shell.status().expect("a shell").success(), "{command}");
        fine(&home.join("tiny.peftc"));
        fs::remove_dir_all(home.join("tiny.peftc")).expect("removed");
    }
    // A cache of a third user.
    let cache = home.join(".cache/peftc");
    chown(&cache, Some(other), None).expect("given away");
    mode(&cache, 0o755);
    let ran = run(&tiny.spec);
    assert_eq!(ran.code, 3, "{}", ran.err);
    assert!(ran.err.contains("belongs to user 65533") && ran.err.contains("PEFTC_CACHE"), "{}", ran.err);
}

/// With a permissive umask, written files are still writable by the user only, and no temporary files remain.
#[test]
fn written_files_are_writable_only_by_their_user() {
    let bench = Bench::with_own_cache();
    let (spec, _) = tiny_bert(&bench, |_| {});
    let [artifact, cache, temporary] = ["made/tiny.peftc", "made/cache", "made/tmp"].map(|name| bench.path(name));
    fs::create_dir_all(&temporary).expect("made");
    for cache in ["", text(&cache)] {
        let program = env!("CARGO_BIN_EXE_peftc");
        let script = format!("umask 000; exec {program} compile {} --overwrite -o {}", text(&spec), text(&artifact));
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).env("PEFTC_CACHE", cache).env("TMPDIR", &temporary);
        let ran = shell.output().expect("it starts");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        assert_eq!(fs::read_dir(&temporary).expect("there").count(), 0);
    }
    assert_eq!((permissions(&artifact), permissions(&cache)), (0o755, 0o700));
    for file in ["manifest.json", "kernels.so"] {
        assert_eq!(permissions(&artifact.join(file)), 0o644);
    }
}

/// Eight processes start with an empty cache: one compiles, all train to the same values, and the cache holds no other
/// files.
#[test]
fn eight_processes_compile_once_on_an_empty_cache() {
    let bench = Bench::with_own_cache();
    let cache = bench.path("cache");
    let start = |at: usize| {
        let out = bench.path(&format!("run{at}"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_peftc"));
        let arguments = ["train", "models/demo/triples.peft", "--weights", "random", "--tokenizer", "data/triples"];
        let data = ["--data", "data/triples/train.json", "--set", "train.steps=2", "--set", "train.batch=2"];
        command.args(arguments).args(data).args(["--threads", "1", "--out", text(&out)]);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("PEFTC_CACHE", &cache).env("NO_COLOR", "1");
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        (child, out)
    };
    let started: Vec<_> = (0..8).map(start).collect();
    let mut adapters = vec![];
    for (child, out) in started {
        let ran = child.wait_with_output().expect("it ends");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        adapters.push(fs::read(out.join("adapter.safetensors")).expect("written"));
    }
    assert!(adapters.iter().all(|adapter| *adapter == adapters[0]));
    let left = fs::read_dir(&cache).expect("there").map(|entry| entry.expect("an entry").path());
    let mut kinds: Vec<_> = left.map(|path| path.extension().expect("a kind").to_owned()).collect();
    kinds.sort();
    assert_eq!(kinds, ["kernels", "peftc"]);
}

/// A spec may come from an untrusted source: it can only read regular files, of limited size, and allocations that fail
/// are reported.
#[test]
fn a_hostile_spec_reads_only_limited_regular_files() {
    let bench = Bench::with_own_cache();
    let model = "backbone b() for generation {\n  weight w \"w\": [9, 4] ~ zeros\n  x = w[ids]\n  \
                 logits = x[targets] @ transpose(w)\n  output logits\n  \
                 output loss = mean(cross_entropy(logits, labels, smoothing))\n}\nmodel = b()\n";
    let fifo = bench.path("fifo.peft");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    for import in ["/dev/zero", "fifo.peft", "."] {
        let spec = bench.write("spec.peft", format!("import \"{import}\"\n{model}"));
        bench.refuses(&["check", text(&spec)], 1, &["cannot be read: it is not a plain file", "spec.peft:1"]);
    }
    bench.write("long.peft", " ".repeat(5 << 20));
    let spec = bench.write("spec.peft", format!("import \"long.peft\"\n{model}"));
    bench.refuses(&["check", text(&spec)], 1, &["longer than 4194304 bytes"]);
    bench.refuses(&["check", text(&bench.path("long.peft"))], 3, &["longer than 4194304 bytes"]);
    // Larger than the address space: 40 matrices of 4 TiB each.
    let weights: String = (0..40).map(|i| format!("weight a{i} \"a{i}\": [1048576, 1048576] ~ zeros\n")).collect();
    let huge = bench.write("huge.peft", model.replacen("weight w", &format!("{weights}weight w"), 1));
    let run = ["run", text(&huge), "--weights", "random", "--entry", "forward", "--inputs", "no", "-o", "none"];
    bench.refuses(&run, 4, &["GiB of memory cannot be had", "the model's weights alone take that much"]);
}
