//! Generates the list of library modules: the `.peft` files of `models/` that specs can refer to.

#![allow(clippy::disallowed_methods)] // only the build script reads files, not the front end

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let mut files = vec![PathBuf::from("functions.peft")];
    for folder in ["backbones", "methods", "recipes", "tasks"] {
        println!("cargo::rerun-if-changed=../models/{folder}");
        for entry in fs::read_dir(models.join(folder)).expect("a folder of the repository") {
            let path = Path::new(folder).join(entry.expect("an entry").file_name());
            if path.extension().is_some_and(|e| e == "peft") {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut text = String::from("&[\n");
    for file in files {
        let full = models.join(&file);
        writeln!(text, "    ({:?}, include_str!({:?})),", file.display().to_string(), full.display().to_string())
            .expect("writing to memory");
    }
    text.push(']');
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("modules.rs");
    fs::write(out, text).expect("cargo's own folder");
}
