//! The checker's files use one another in one direction.

#![allow(clippy::disallowed_methods)] // the files are read

use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn no_circle_of_files_in_the_checker() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/check");
    let mut uses: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
        let text = std::fs::read_to_string(&path).expect("readable");
        let used = text.split("\nuse super::").skip(1).filter_map(|rest| rest.split(';').next());
        let words = used.flat_map(|path| path.split(|c: char| !c.is_alphanumeric() && c != '_'));
        uses.insert(name, words.map(str::to_owned).collect());
    }
    // All of them hang on `mod.rs`, and it on them.
    assert!(uses.remove("mod").is_some() && uses["site"].contains(&"frame".to_owned()));
    while !uses.is_empty() {
        let lowest = uses.iter().find(|(_, used)| !used.iter().any(|name| uses.contains_key(name)));
        let lowest = lowest.map(|(name, _)| name.clone());
        uses.remove(&lowest.unwrap_or_else(|| panic!("in a circle, or above one: {:?}", uses.keys())));
    }
}
