//! The documents are checked against the repository: paths, links, commands and specs that they show.
//!
//! Checked are `README.md`, `CONTRIBUTING.md`, `CHANGELOG.md`, `models/README.md` and every page of `docs/`. A fenced block
//! names its language, and what is checked follows from the language:
//!
//! | language | check |
//! | --- | --- |
//! | `peft` | the compiler accepts it as a spec, after `model = …` is added if it has none, and applies every method it defines |
//! | `peft-fragment` | it parses inside one of [`WRAPPERS`] |
//! | `pest` | every line is a line of the grammar |
//! | `mlir` | every `"peft.NAME"` is an operation of the dialect |
//! | `sh` | every `peftc COMMAND` with its options, and every `make TARGET`, exists |
//! | `json` | it parses |
//! | `text` | none |

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::ast::Item;
use peft_grammar::graph::OPERATIONS;
use peft_grammar::no_imports;

use crate::cli::Bench;

/// What is wrong with the documents, each with its place.
type Faults = Vec<String>;

struct Document {
    /// Relative to the root of the repository.
    path: String,
    blocks: Vec<Block>,
    /// The lines outside of blocks, with their numbers from 1.
    prose: Vec<(usize, String)>,
}

/// A fenced block.
struct Block {
    line: usize,
    language: String,
    /// Without the indentation of the fence.
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<Document> {
    let mut paths: Vec<String> =
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/README.md"].map(str::to_string).into();
    let pages = fs::read_dir(root().join("docs")).expect("a folder");
    let pages = pages.map(|page| page.expect("an entry").file_name().into_string().expect("UTF-8"));
    paths.extend(pages.map(|page| format!("docs/{page}")));
    paths.sort();
    let documents: Vec<Document> = paths.iter().map(|path| read(path)).collect();
    assert!(documents.len() > 8, "the documents are found");
    documents
}

fn read(path: &str) -> Document {
    let text = fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    parse(path, &text)
}

fn parse(path: &str, text: &str) -> Document {
    let mut document = Document { path: path.to_string(), blocks: vec![], prose: vec![] };
    let mut open: Option<(usize, Block)> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let inner = line.trim_start();
        let indentation = line.len() - inner.len();
        match (inner.strip_prefix("```"), open.take()) {
            (Some(language), None) => {
                let block = Block { line: number, language: language.trim().to_string(), text: String::new() };
                open = Some((indentation, block));
            }
            (Some(_), Some((_, block))) => document.blocks.push(block),
            (None, Some((indentation, mut block))) => {
                block.text += line.get(indentation..).unwrap_or(inner);
                block.text.push('\n');
                open = Some((indentation, block));
            }
            (None, None) => document.prose.push((number, line.to_string())),
        }
    }
    assert!(open.is_none(), "{path}: a block is not closed");
    document
}

/// The code spans of a line of prose, and the line with blanks in their place.
fn spans(line: &str) -> (Vec<String>, String) {
    let (mut spans, mut rest) = (vec![], String::new());
    for (i, part) in line.split('`').enumerate() {
        match i % 2 {
            0 => rest += part,
            _ => {
                spans.push(part.to_string());
                rest += " ";
            }
        }
    }
    (spans, rest)
}

fn report(faults: Faults) {
    assert!(faults.is_empty(), "{} faults in the documents:\n{}", faults.len(), faults.join("\n"));
}

// Paths.

/// Folders in the root whose paths are checked. `target/` is not among them: it holds what a build writes.
const FOLDERS: [&str; 12] = [
    ".cargo",
    ".ci",
    "benches",
    "data",
    "docs",
    "grammar",
    "models",
    "passes",
    "runtime",
    "src",
    "tests",
    "proptest-regressions",
];

/// A code span is a path of the repository if it has no blank and
///
/// - begins with one of [`FOLDERS`] and a slash. A part of it in capitals without an ending (`NAME`), and the part after
///   it, are the reader's: the folder before it exists. A part with `*` matches files;
/// - or is a bare name that ends in `.rs` or `.pest`: some file of the repository has this name.
fn misses_path(span: &str, names: &BTreeSet<String>) -> bool {
    if span.contains(char::is_whitespace) {
        return false;
    }
    let Some((folder, _)) = span.split_once('/') else {
        return (span.ends_with(".rs") || span.ends_with(".pest")) && !names.contains(span);
    };
    if !FOLDERS.contains(&folder) {
        return false;
    }
    let placeholder = |part: &&str| {
        let stem = part.split('.').next().unwrap_or(part);
        stem.len() > 1 && stem.chars().all(|c| c.is_ascii_uppercase()) && *part != "README.md"
    };
    let fixed: Vec<&str> = span.split('/').take_while(|part| !placeholder(part)).collect();
    let path = root().join(fixed.join("/"));
    match span.contains('*') {
        true => glob::glob(path.to_str().expect("UTF-8")).expect("a pattern").next().is_none(),
        false => !path.exists(),
    }
}

/// The names of all source files below the root.
fn file_names() -> BTreeSet<String> {
    fn collect(folder: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            match entry.path().is_dir() {
                true => collect(&entry.path(), names),
                false => {
                    names.insert(name);
                }
            }
        }
    }
    let mut names = BTreeSet::new();
    FOLDERS.iter().for_each(|folder| collect(&root().join(folder), &mut names));
    names
}

#[test]
fn every_path_in_backticks_exists() {
    let names = file_names();
    let mut faults = Faults::new();
    let mut found = 0;
    for document in documents() {
        for (line, text) in &document.prose {
            if text.matches('`').count() % 2 == 1 {
                faults.push(format!("{}:{line}: a code span goes on in the next line", document.path));
            }
            for span in spans(text).0 {
                found += usize::from(span.contains('/'));
                if misses_path(&span, &names) {
                    faults.push(format!("{}:{line}: there is no `{span}`", document.path));
                }
            }
        }
    }
    assert!(found > 100, "paths are found");
    report(faults);
}

#[test]
fn which_code_spans_are_paths() {
    let names = file_names();
    let present = [
        "passes/src/fuse/mod.rs",
        "models/methods/",
        "passes/src/fuse/NAME.rs",
        "models/backbones/*.peft",
        "peft.pest",
        // No paths of the repository.
        "target/release/peftc",
        "grad.NAME",
        "cargo test -p peftc",
    ];
    let missing = ["passes/src/fuse/nothing.rs", "models/nothing/", "models/nothing/NAME.peft", "models/*.rs", "no.rs"];
    assert_eq!(present.map(|span| misses_path(span, &names)), [false; 8]);
    assert_eq!(missing.map(|span| misses_path(span, &names)), [true; 5]);
}

/// Constants, environment variables and test names: code spans of capitals with an underscore, and of lower-case letters
/// with three underscores or more.
fn is_name(span: &str) -> bool {
    let letters = |span: &str| span.chars().filter(|c| *c != '_' && !c.is_ascii_digit()).collect::<String>();
    let underscores = span.matches('_').count();
    let all = |kind: fn(&char) -> bool| !letters(span).is_empty() && letters(span).chars().all(|c| kind(&c));
    underscores >= 1 && all(char::is_ascii_uppercase) || underscores >= 3 && all(char::is_ascii_lowercase)
}

#[test]
fn every_name_in_backticks_is_in_the_sources() {
    fn collect(folder: &Path, all: &mut String) {
        for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
            let source = path.extension().is_some_and(|ending| ["rs", "py", "peft"].iter().any(|own| ending == *own));
            match path.is_dir() {
                true => collect(&path, all),
                false if source => *all += &fs::read_to_string(&path).unwrap_or_default(),
                false => {}
            }
        }
    }
    let mut sources = fs::read_to_string(root().join("Makefile")).expect("readable");
    let folders = FOLDERS.iter().filter(|folder| **folder != "docs");
    folders.for_each(|folder| collect(&root().join(folder), &mut sources));
    let mut faults = Faults::new();
    for document in documents().iter().filter(|document| document.path != "CHANGELOG.md") {
        for (line, text) in &document.prose {
            let names = spans(text).0.into_iter().filter(|span| is_name(span) && !sources.contains(&**span));
            faults.extend(names.map(|name| format!("{}:{line}: no source has `{name}`", document.path)));
        }
    }
    report(faults);
}

// Links.

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The anchors of a document's headings; of equal ones, the second has `-1` at its end.
fn anchors(document: &Document) -> BTreeSet<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let headings = document.prose.iter().filter(|(_, line)| line.starts_with('#'));
    let anchors = headings.map(|(_, line)| {
        let anchor = anchor(line.trim_start_matches('#'));
        let count = counts.entry(anchor.clone()).or_default();
        *count += 1;
        if *count == 1 { anchor } else { format!("{anchor}-{}", *count - 1) }
    });
    anchors.collect()
}

/// The targets of a document's inline links, with their lines.
fn links(document: &Document) -> Vec<(usize, String)> {
    let links = document.prose.iter().flat_map(|(line, text)| {
        let targets: Vec<String> = spans(text).1.split("](").skip(1).map(|rest| rest.to_string()).collect();
        targets.into_iter().map(|rest| (*line, rest.split(')').next().unwrap_or_default().to_string()))
    });
    links.collect()
}

#[test]
fn every_link_and_its_anchor_resolve() {
    let mut faults = Faults::new();
    let mut found = 0;
    for document in documents() {
        let folder = Path::new(&document.path).parent().expect("a folder");
        for (line, target) in links(&document) {
            if target.starts_with("https://") {
                continue;
            }
            found += 1;
            let (path, anchor) = target.split_once('#').map_or((&*target, None), |(path, anchor)| (path, Some(anchor)));
            let path = if path.is_empty() { PathBuf::from(&document.path) } else { folder.join(path) };
            let path = path.to_str().expect("UTF-8");
            if !root().join(path).exists() {
                faults.push(format!("{}:{line}: the link to `{target}` leads nowhere", document.path));
            } else if let Some(anchor) = anchor
                && !anchors(&read(path)).contains(anchor)
            {
                faults.push(format!("{}:{line}: {path} has no heading for `#{anchor}`", document.path));
            }
        }
    }
    assert!(found > 50, "links are found");
    report(faults);
}

#[test]
fn headings_have_the_anchors_of_github() {
    assert_eq!(anchor(" Bird's-eye view"), "birds-eye-view");
    assert_eq!(anchor(" methods, backbones, tasks, recipes"), "methods-backbones-tasks-recipes");
    assert_eq!(anchor(" The `after` block"), "the-after-block");
    let document = parse("page.md", "# A\n## B\n```text\n# C\n```\n## B\n");
    assert_eq!(anchors(&document), ["a", "b", "b-1"].map(str::to_string).into());
}

// Blocks.

/// A block's text in the place of `@`: what a fragment may be a part of.
const WRAPPERS: [&str; 9] = [
    "@",
    "tune { @ }",
    "task t { @ }",
    "train { @ }",
    "backbone b() for generation { @ }",
    "backbone b() for generation { checkpoint { @ } }",
    "method m() on projection(x, y) { @ }",
    "method m() on projection(x, y) { counterpart \"LORA\" { @ } }",
    "fn f() { return @ }",
];

/// The models that are added to a block without one: the first of which its task has the kind.
const MODELS: [&str; 2] = ["model = gpt2()", "model = roberta()"];

/// Why the compiler does not accept a block of `peft`, if it does not.
fn misses_spec(text: &str) -> Option<String> {
    let ast = match peft_grammar::parse("block.peft", text) {
        Ok(ast) => ast,
        Err(errors) => return Some(errors.to_string()),
    };
    let whole = ast.items.iter().any(|item| matches!(item, Item::Model(_)));
    let specs: Vec<String> = match whole {
        true => vec![text.to_string()],
        false => MODELS.iter().map(|model| format!("{text}\n{model}\n")).collect(),
    };
    let checked: Vec<_> = specs.iter().map(|spec| peft_grammar::check("block.peft", spec, &no_imports)).collect();
    let Some(model) = checked.iter().find_map(|checked| checked.as_ref().ok()) else {
        return checked.into_iter().find_map(|checked| checked.err()).map(|errors| errors.to_string());
    };
    // The checker looks into a method's body where the method is applied.
    let unused = ast.items.iter().find_map(|item| match item {
        Item::Method(method) if method.kind.text != "model" => {
            let name = &method.name.text;
            model.applied.iter().all(|applied| applied.method != *name).then(|| name.clone())
        }
        _ => None,
    });
    unused.map(|name| format!("the block defines the method `{name}` and does not apply it"))
}

/// The lines of the grammar, with single blanks.
fn grammar_lines() -> BTreeSet<String> {
    let files = ["grammar/src/peft.pest", "grammar/src/counterpart.pest"];
    let texts = files.map(|file| fs::read_to_string(root().join(file)).expect("readable"));
    texts.iter().flat_map(|text| text.lines()).map(single_blanks).collect()
}

fn single_blanks(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What is wrong with a block, if anything is.
fn misses_block(block: &Block, interface: &Interface) -> Vec<String> {
    match &*block.language {
        "peft" => misses_spec(&block.text).into_iter().collect(),
        "peft-fragment" => {
            let inside = |wrapper: &str| wrapper.replace('@', &format!("\n{}\n", block.text));
            match WRAPPERS.iter().any(|wrapper| peft_grammar::parse("block.peft", &inside(wrapper)).is_ok()) {
                true => vec![],
                false => vec!["it parses inside none of the wrappers".to_string()],
            }
        }
        "pest" => {
            let known = grammar_lines();
            let lines = block.text.lines().map(single_blanks).filter(|line| !line.is_empty());
            let unknown = lines.filter(|line| !known.contains(line));
            unknown.map(|line| format!("the grammar has no line `{line}`")).collect()
        }
        "mlir" => {
            // An operation's name is quoted; attributes of the dialect, such as `peft.rule`, are not.
            let names = block.text.split("\"peft.").skip(1);
            let names = names.map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or(""));
            let unknown = names.filter(|name| OPERATIONS.iter().all(|operation| operation.name != *name));
            unknown.map(|name| format!("the dialect has no operation `{name}`")).collect()
        }
        "sh" => commands(&block.text).iter().flat_map(|command| interface.misses(command)).collect(),
        "json" => {
            let parsed = serde_json::from_str::<serde_json::Value>(&block.text);
            parsed.err().map(|error| error.to_string()).into_iter().collect()
        }
        "text" => vec![],
        "" => vec!["it has no language".to_string()],
        other => vec![format!("its language is `{other}`, which nothing checks; what nothing can check is `text`")],
    }
}

#[test]
fn every_block_is_what_its_language_says() {
    let interface = Interface::of_program();
    let mut faults = Faults::new();
    for document in documents() {
        for block in &document.blocks {
            let found = misses_block(block, &interface);
            faults.extend(found.into_iter().map(|fault| format!("{}:{}: {fault}", document.path, block.line)));
        }
    }
    report(faults);
}

#[test]
fn faults_of_blocks_are_seen() {
    let interface = Interface::of_program();
    let cases = [
        ("", "a", "no language"),
        ("rust", "fn main() {}", "nothing checks"),
        ("peft", "model = gpt3()", "gpt3"),
        ("peft", "method m() on projection(y) { after y { y = 2 * y } }", "does not apply it"),
        ("peft-fragment", "every attention", "none of the wrappers"),
        ("pest", "file = { item }", "no line"),
        ("mlir", "%1 = \"peft.matmull\"(%2, %3)", "no operation `matmull`"),
        ("sh", "./peftc trane SPEC", "no command `trane`"),
        ("sh", "cd a && peftc train SPEC --wights DIR \\\n  --data FILE", "no option `--wights`"),
        ("sh", "make all", "no target `all`"),
        ("json", "{", "EOF"),
    ];
    for (language, text, words) in cases {
        let block = Block { line: 1, language: language.into(), text: text.into() };
        let found = misses_block(&block, &interface);
        assert!(found.len() == 1 && found[0].contains(words), "`{text}` should be told `{words}`: {found:?}");
    }
}

// Commands.

/// What the program and the Makefile take.
struct Interface {
    /// The options of each command of `peftc`, by the program's own help.
    commands: BTreeMap<String, BTreeSet<String>>,
    targets: BTreeSet<String>,
}

impl Interface {
    fn of_program() -> Self {
        let bench = Bench::new();
        let help = bench.peftc(["--help"]).out;
        let list = help.split("Commands:\n").nth(1).expect("commands").split("\n\n").next().expect("a list");
        let names = list.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
        let options = |name: &str| (name.to_string(), options(&bench.peftc([name, "--help"]).out).collect());
        let makefile = fs::read_to_string(root().join("Makefile")).expect("readable");
        let rules = makefile.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
        let targets = rules.filter_map(|line| line.split_once(':')).map(|(target, _)| target.to_string());
        Interface { commands: names.map(options).collect(), targets: targets.collect() }
    }

    /// What a command line names that there is not.
    fn misses(&self, command: &str) -> Vec<String> {
        let mut words = command.split_whitespace();
        let program = words.next().unwrap_or_default();
        let arguments: Vec<&str> = words.collect();
        let first = arguments.first().copied().unwrap_or_default();
        match program.rsplit('/').next() {
            Some("make") => {
                let targets = arguments.iter().filter(|word| !word.starts_with('-') && !word.contains('='));
                let unknown = targets.filter(|target| !self.targets.contains(**target));
                unknown.map(|target| format!("the Makefile has no target `{target}`")).collect()
            }
            // A bare `peftc`, or `peftc COMMAND` for any of them.
            Some("peftc") if first.is_empty() || first.chars().all(|c| c.is_ascii_uppercase()) => vec![],
            Some("peftc") => match self.commands.get(first) {
                None => vec![format!("peftc has no command `{first}`")],
                Some(known) => {
                    let unknown = options(command).filter(|option| !known.contains(option));
                    unknown.map(|option| format!("`peftc {first}` has no option `{option}`")).collect()
                }
            },
            _ => vec![],
        }
    }
}

/// The options, long and short, that a text names.
fn options(text: &str) -> impl Iterator<Item = String> + '_ {
    let starts = |at: usize| text[..at].chars().next_back().is_none_or(|c| c.is_whitespace() || "[|(".contains(c));
    text.match_indices('-').filter(move |(at, _)| starts(*at)).filter_map(|(at, _)| {
        let rest = &text[at..];
        let name = rest.trim_start_matches('-');
        let dashes = rest.len() - name.len();
        let end = name.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(name.len());
        (dashes <= 2 && end > 0 && (dashes == 2 || end == 1)).then(|| rest[..dashes + end].to_string())
    })
}

/// The commands of a shell block, without comments. A line that begins with blanks, or follows a backslash, goes on from
/// the line before.
fn commands(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default();
        match lines.last_mut() {
            Some(last) if last.ends_with('\\') || line.starts_with(' ') => {
                *last = format!("{} {}", last.trim_end_matches('\\'), line.trim());
            }
            _ => lines.push(line.trim_end().to_string()),
        }
    }
    let commands = lines.iter().flat_map(|line| line.split("&&")).map(str::trim);
    commands.filter(|command| !command.is_empty()).map(str::to_string).collect()
}

#[test]
fn every_command_in_backticks_exists() {
    let interface = Interface::of_program();
    let mut faults = Faults::new();
    for document in documents() {
        for (line, text) in &document.prose {
            let found = spans(text).0.into_iter().flat_map(|span| interface.misses(&span));
            faults.extend(found.map(|fault| format!("{}:{line}: {fault}", document.path)));
        }
    }
    report(faults);
}

/// `docs/commands.md` has every command, with every option of its own or among those of all commands that compile.
#[test]
fn every_command_and_option_is_documented() {
    let page = fs::read_to_string(root().join("docs/commands.md")).expect("readable");
    let known: BTreeSet<String> = options(&page.replace('`', " ")).collect();
    let mut faults = Faults::new();
    for (command, options) in &Interface::of_program().commands {
        if !page.contains(&format!("\npeftc {command} ")) {
            faults.push(format!("docs/commands.md shows no `peftc {command}`"));
        }
        let undocumented = options.iter().filter(|option| !matches!(&***option, "-h" | "--help" | "--output"));
        let undocumented = undocumented.filter(|option| !known.contains(*option));
        faults.extend(undocumented.map(|option| format!("docs/commands.md has no `{option}` of `peftc {command}`")));
    }
    report(faults);
}

// The reference of the language.

/// The strings of a list in the source of a table, from the line that begins it to the one that ends it.
fn strings_of(file: &str, begins: &str) -> Vec<String> {
    let source = fs::read_to_string(root().join(file)).expect("readable");
    let table = source.split(begins).nth(1).unwrap_or_else(|| panic!("{file} has no `{begins}`"));
    let table = table.split("];\n").next().expect("an end");
    table.split('"').skip(1).step_by(2).map(str::to_string).collect()
}

/// `docs/language.md` has every operation that equations can name, and every setting of tasks and recipes.
#[test]
fn every_operation_and_setting_is_documented() {
    let page = fs::read_to_string(root().join("docs/language.md")).expect("readable");
    let operations = fs::read_to_string(root().join("grammar/src/check/builtins.rs")).expect("readable");
    let operations: Vec<&str> = operations
        .lines()
        .filter_map(|line| line.trim().strip_prefix("(\"")?.split_once("\", &["))
        .map(|(name, _)| name)
        .collect();
    assert!(operations.contains(&"softmax") && operations.len() > 25, "operations are found: {operations:?}");
    let mut faults = Faults::new();
    let missing = operations.iter().filter(|name| !page.contains(&format!("`{name}(")));
    faults.extend(missing.map(|name| format!("docs/language.md has no operation `{name}(…)`")));
    let settings = "grammar/src/check/settings.rs";
    let lists = ["GENERATION", "CHAT", "TEXT", "CLASSIFICATION", "REGRESSION", "TOKEN_CLASSIFICATION", "RECIPE"];
    let lists = lists.map(|list| strings_of(settings, &format!("const {list}: &[&str] = &[")));
    let settings: BTreeSet<String> = lists.into_iter().flatten().collect();
    assert!(settings.contains("lr") && settings.contains("pack"), "settings are found: {settings:?}");
    let missing = settings.iter().filter(|name| !page.contains(&format!("`{name}`")));
    faults.extend(missing.map(|name| format!("docs/language.md has no setting `{name}`")));
    report(faults);
}

/// `docs/language.md` quotes every rule of the grammar, except for keywords and for what has no meaning of its own.
#[test]
fn every_rule_of_the_grammar_is_quoted() {
    let page = read("docs/language.md");
    let rule = |line: &String| line.split_once(" = ").map(|(name, _)| name.to_string());
    let blocks = page.blocks.iter().filter(|block| block.language == "pest");
    let quoted = blocks.flat_map(|block| block.text.lines().map(single_blanks).filter_map(|line| rule(&line)));
    let quoted: BTreeSet<String> = quoted.collect();
    let all: BTreeSet<String> = grammar_lines().iter().filter_map(rule).collect();
    let own = |name: &&String| !name.starts_with("kw_") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let missing = all.iter().filter(own).filter(|name| !["boundary", "value"].contains(&name.as_str()));
    let missing = missing.filter(|name| !quoted.contains(*name));
    report(missing.map(|name| format!("docs/language.md does not quote the rule `{name}`")).collect());
}

/// Lines of prose have at most 120 characters; a row of a table and a heading is one line.
#[test]
fn lines_are_short() {
    let mut faults = Faults::new();
    for document in documents() {
        let long = document.prose.iter().filter(|(_, line)| line.chars().count() > 120);
        let long = long.filter(|(_, line)| !line.trim_start().starts_with(['|', '#']));
        faults.extend(long.map(|(line, _)| format!("{}:{line}: more than 120 characters", document.path)));
    }
    report(faults);
}
