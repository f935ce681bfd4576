//! The front end never panics, whatever the text. Specs are mutated by deleting, doubling, swapping, replacing and
//! truncating tokens.

use peft_grammar::{check, format, no_imports};
use proptest::prelude::*;

const SPECS: &[&str] = &[
    include_str!("../../tests/specs/good/own_backbone.peft"),
    include_str!("../../tests/specs/good/mam_inducer.peft"),
    include_str!("../../tests/specs/parts/ia3.peft"),
    include_str!("../../models/methods/inducer.peft"),
    include_str!("../../models/demo/sentiment.peft"),
];

/// Words, numbers and characters, each with the white space after it.
fn pieces(text: &str) -> Vec<String> {
    let mut pieces: Vec<String> = Vec::new();
    let mut word = false;
    for c in text.chars() {
        let in_word = c.is_alphanumeric() || c == '_' || c == '.';
        match pieces.last_mut() {
            Some(last) if (in_word && word) || c.is_whitespace() => last.push(c),
            _ => pieces.push(c.to_string()),
        }
        word = in_word;
    }
    pieces
}

#[derive(Clone, Debug)]
enum Edit {
    Delete(usize),
    Double(usize),
    Swap(usize, usize),
    Replace(usize, &'static str),
    Cut(usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    const ODD: &[&str] =
        &["0", "-1", "9223372036854775807", "1e308", "{", ")", "\"", "@", "tokens", "x", "é", "..", ":", "for"];
    prop_oneof![
        any::<usize>().prop_map(Edit::Delete),
        any::<usize>().prop_map(Edit::Double),
        any::<(usize, usize)>().prop_map(|(a, b)| Edit::Swap(a, b)),
        (any::<usize>(), prop::sample::select(ODD)).prop_map(|(at, with)| Edit::Replace(at, with)),
        any::<usize>().prop_map(Edit::Cut),
    ]
}

fn apply(pieces: &mut Vec<String>, edit: &Edit) {
    if pieces.is_empty() {
        return;
    }
    let n = pieces.len();
    match *edit {
        Edit::Delete(at) => _ = pieces.remove(at % n),
        Edit::Double(at) => pieces.insert(at % n, pieces[at % n].clone()),
        Edit::Swap(a, b) => pieces.swap(a % n, b % n),
        Edit::Replace(at, with) => pieces[at % n] = format!("{with} "),
        // Truncations are near the end of the text, so that most checks still run.
        Edit::Cut(at) => pieces.truncate(n - at % n.min(40)),
    }
}

/// The title of the first error for a backbone that calls `fn again(x: tensor) { BODY }`.
fn title_of(body: &str) -> String {
    let spec = format!(
        "fn again(x: tensor) {{ {body} }}\nbackbone tiny() for generation {{ weight w \"w\": [3, 3] ~ zeros\n \
         x = again(w) }}\nmodel = tiny()\n"
    );
    check("spec.peft", &spec, &no_imports).expect_err("it is beyond reason").list[0].title.clone()
}

#[test]
fn deep_nesting_is_rejected() {
    let deep = "calls and expressions are nested too deep";
    let call = "`again` calls itself without end";
    let brackets = |n: usize| format!("return {}again(x){}", "x + (".repeat(n), ")".repeat(n));
    let branches = format!("{}x = again(x){} return x", "if true { ".repeat(60), " }".repeat(60));
    assert_eq!(title_of(&brackets(60)), deep);
    assert_eq!(title_of(&brackets(100)), "brackets are nested more than 64 deep");
    assert_eq!(title_of(&branches), call);
    assert_eq!(title_of(&format!("return again(x{})", " + x".repeat(95))), call);
    assert_eq!(title_of(&format!("return again(x){}", " + x".repeat(95))), deep);
    assert_eq!(title_of(&format!("return x{}", " + x".repeat(50_000))), "this expression has too many operators");
    assert_eq!(title_of(&format!("return {}x", "-".repeat(50_000))), "too many signs in a row");
    assert_eq!(title_of(&format!("return x{}", "[0:1]".repeat(50_000))), "too many indices in a row");
}

/// The title of the first error for a backbone with these statements.
fn title_in(statements: &str) -> String {
    let spec = format!("backbone tiny() for generation {{ {statements} }}\nmodel = tiny()\n");
    check("spec.peft", &spec, &no_imports).expect_err("it is beyond reason").list[0].title.clone()
}

/// Values that double with each statement are rejected before they exhaust memory.
#[test]
fn exponential_growth_is_rejected() {
    let text = "this string exceeds 4096 bytes after interpolation";
    assert_eq!(title_in(&format!("s = \"ab\" {}", "s = \"{s}{s}\" ".repeat(60))), text);
    assert_eq!(title_in("s = \"ab\" for i in 0..60 { s = \"{s}{s}\" }"), text);
    let list = "a list cannot contain lists, found ";
    assert!(title_in(&format!("l = [1, 2] {}", "l = [l, l] ".repeat(60))).starts_with(list));
}

#[test]
fn endless_imports_are_rejected() {
    let count = std::cell::Cell::new(0);
    let endless = |_: &str| {
        count.set(count.get() + 1);
        Ok(format!("import \"{}.peft\"", count.get()))
    };
    let errors = check("spec.peft", "import \"0.peft\"", &endless).expect_err("they never end");
    assert_eq!(errors.list[0].title, "more than 256 files are imported");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_specs_do_not_panic(spec in 0..SPECS.len(), edits in prop::collection::vec(edit(), 1..4)) {
        let mut pieces = pieces(SPECS[spec]);
        edits.iter().for_each(|e| apply(&mut pieces, e));
        let text = pieces.concat();
        if let Err(errors) = check("spec.peft", &text, &no_imports) {
            prop_assert!(!errors.list.is_empty());
            prop_assert!(!errors.render(true).is_empty());
        }
        if let Ok(formatted) = format("spec.peft", &text) {
            prop_assert_eq!(format("spec.peft", &formatted).expect("it still parses"), formatted);
        }
    }

    #[test]
    fn random_text_does_not_panic(text in "(model|tune|\\{|\\}|\\(|\\)|\\[|[a-z0-9 \\n\"./:=,<>é-]){0,60}") {
        let _ = check("spec.peft", &text, &no_imports);
        let _ = format("spec.peft", &text);
    }
}
