//! Diagnostics for errors in a method of a separate file (`tests/specs/methods`). Each shows the place in that file and
//! the place in the spec that applies the method.

#![allow(clippy::disallowed_methods)] // test cases are files

use peft_grammar::check;

/// The spec that applies a case: with the rule in the case's first line, or at every attention.
fn spec(method: &str) -> String {
    let first = method.lines().next().and_then(|line| line.strip_prefix("// "));
    let apply = first.unwrap_or("every attention { mine(width: 4) }");
    format!(
        "import \"mine.peft\"\n\nmodel = bert(layers: 2, hidden: 32, heads: 4, ffn: 48, vocab: 97)\n\n\
         tune {{\n  {apply}\n}}\n"
    )
}

#[test]
fn errors_in_methods_show_definition_and_use() {
    insta::glob!("../../tests/specs/methods", "*.peft", |path| {
        let method = std::fs::read_to_string(path).expect("readable");
        let spec = spec(&method);
        let import = |path: &str| if path == "mine.peft" { Ok(method.clone()) } else { Err("no such file".into()) };
        let Err(errors) = check("spec.peft", &spec, &import) else { panic!("{} is fine", path.display()) };
        let text = errors.to_string();
        for error in &errors.list {
            let places: Vec<&str> = std::iter::once(error.span)
                .chain(error.related.iter().map(|(span, _)| *span))
                .map(|span| &*errors.sources.get(span.file).name)
                .collect();
            let both = ["mine.peft", "spec.peft"].iter().all(|file| places.contains(file));
            assert!(both, "{} is seen in {places:?} alone:\n{text}", path.display());
        }
        insta::assert_snapshot!(format!("{method}\n{spec}\n----\n{text}"));
    });
}
