//! Dependencies between modules: `use` statements form no cycle, and only few modules depend on the machine. Only `use`
//! statements at the left margin are seen, with paths that begin with `crate`, `self` or `super`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The source files of a crate by module path such as `lower::dispatch`, without test files.
struct Crate {
    files: BTreeMap<String, String>,
    /// Modules with submodules. Submodules may use their parent module.
    hubs: BTreeSet<String>,
}

impl Crate {
    fn of(folder: &str) -> Crate {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join("src");
        let mut found = Crate { files: BTreeMap::new(), hubs: BTreeSet::new() };
        found.read(&root, &root);
        assert!(found.files.len() > 10, "{folder} has files");
        found
    }

    fn read(&mut self, root: &Path, folder: &Path) {
        let entries = std::fs::read_dir(folder).expect("a folder");
        let paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        for path in paths {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
            if stem == "tests" || stem == "snapshots" {
                continue;
            }
            let parts = path.strip_prefix(root).expect("below it").with_extension("");
            let mut parts: Vec<&str> = parts.iter().filter_map(|part| part.to_str()).collect();
            if path.is_dir() {
                self.hubs.insert(parts.join("::"));
                self.read(root, &path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                if matches!(stem.as_str(), "mod" | "lib" | "main") {
                    parts.pop();
                }
                self.files.insert(parts.join("::"), std::fs::read_to_string(&path).expect("readable"));
            }
        }
    }

    /// The modules of the crate that `module` uses.
    fn uses(&self, module: &str) -> BTreeSet<String> {
        let text = &self.files[module];
        let statements = text.split("\nuse ").skip(1).chain(text.split("\npub use ").skip(1));
        let trees = statements.filter_map(|rest| rest.split(';').next());
        let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
        let inside = |path: &str| match path.split_once("::") {
            Some(("crate", rest)) => Some(rest.to_owned()),
            Some(("self", rest)) => Some(format!("{module}::{rest}")),
            Some(("super", rest)) if !rest.starts_with("super::") => Some(format!("{parent}::{rest}")),
            Some((first, _)) if self.files.contains_key(&format!("{module}::{first}")) => {
                Some(format!("{module}::{path}"))
            }
            _ => None,
        };
        let mut used = BTreeSet::new();
        for path in trees.flat_map(paths).filter_map(|path| inside(&path)) {
            // The longest prefix of the path that is a module.
            let mut path = path.trim_start_matches("::");
            while !path.is_empty() && !self.files.contains_key(path) {
                path = path.rsplit_once("::").map_or("", |(before, _)| before);
            }
            if !path.is_empty() && path != module {
                used.insert(path.to_owned());
            }
        }
        used
    }

    /// Modules that are part of a cycle or depend on one. Modules with submodules are ignored, because these may use
    /// them.
    fn circles(&self) -> Vec<String> {
        let mut left: BTreeMap<&String, BTreeSet<String>> = self.files.keys().map(|m| (m, self.uses(m))).collect();
        left.retain(|module, _| !module.is_empty() && !self.hubs.contains(*module));
        loop {
            let lowest = left.iter().find(|(_, used)| !used.iter().any(|m| left.contains_key(m)));
            let Some(lowest) = lowest.map(|(module, _)| *module) else {
                return left.into_keys().cloned().collect();
            };
            left.remove(lowest);
        }
    }
}

/// Expands `a::{b, c::{d, e}}` to `a::b`, `a::c::d`, `a::c::e`.
fn paths(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, inner)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap_or(tree).into()];
    };
    let inner = inner.trim_end().strip_suffix('}').expect("as many ends");
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in inner.chars() {
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                parts.last_mut().expect("at least one").push(c);
            }
        }
    }
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| paths(part)).map(|path| format!("{prefix}{path}")).collect()
}

#[test]
fn modules_have_no_import_cycles() {
    for folder in ["grammar", "passes", "runtime"] {
        let circles = Crate::of(folder).circles();
        assert!(circles.is_empty(), "in {folder}, in a circle or above one: {circles:?}");
    }
    // The check detects a cycle.
    let file = |used: &str| format!("\nuse super::{{{used}::{{x, y}}, z}};");
    let files = [("a::b", file("c")), ("a::c", file("b")), ("a::z", String::new())];
    let files = files.into_iter().map(|(module, text)| (module.to_owned(), text)).collect();
    assert_eq!(Crate { files, hubs: BTreeSet::new() }.circles(), ["a::b", "a::c"]);
}

/// Kernels depend only on the builder and the target, not on the lowering that launches them.
#[test]
fn kernels_do_not_import_the_lowering() {
    let passes = Crate::of("passes");
    let below = |module: &str, folder: &str| module == folder || module.starts_with(&format!("{folder}::"));
    for (folder, allowed) in [
        ("kernels", &["kernels", "builder", "abi", "target", "cost"][..]),
        ("builder", &["builder", "target"]),
        ("target", &["target", "builder::mma"]),
        ("codegen", &["codegen", "dialect", "target"]),
    ] {
        for module in passes.files.keys().filter(|module| below(module, folder)) {
            let used = passes.uses(module);
            let other: Vec<&String> = used.iter().filter(|used| !allowed.iter().any(|a| below(used, a))).collect();
            assert!(other.is_empty(), "{module} uses {other:?}");
        }
    }
}

/// Only these modules match on the machine.
#[test]
fn only_allowed_modules_match_on_the_machine() {
    let passes = Crate::of("passes");
    let known = ["target", "codegen", "builder", "lower::schedule"];
    for (module, text) in &passes.files {
        let below = |folder: &str| module == folder || module.starts_with(&format!("{folder}::"));
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
        let asks = text.contains("Machine::Cpu(") || text.contains("Machine::Cuda(");
        assert!(!asks || known.iter().any(|folder| below(folder)), "{module} asks which machine it is");
    }
}
