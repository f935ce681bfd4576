//! `peftc methods`, `backbones`, `tasks` and `recipes`: show the library.

use peft_grammar::diagnostic::nearest;
use peft_grammar::library::LibraryEntry;

use crate::failure::Failure;

/// The command line of the commands that show the library.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The entry to show in full. Without it all are listed with their summaries
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the entries `all` of the library, or the one that is named. `what` is their kind in the singular, such as
/// `method`.
///
/// # Errors
///
/// The library has no entry of that name.
pub fn run(arguments: Arguments, what: &str, all: Vec<LibraryEntry>) -> Result<(), Failure> {
    let chosen: Vec<&LibraryEntry> = match &arguments.name {
        None => all.iter().collect(),
        Some(name) => all.iter().filter(|d| d.name == *name).collect(),
    };
    if let (Some(name), true) = (&arguments.name, chosen.is_empty()) {
        let names: Vec<&str> = all.iter().map(|d| d.name.as_str()).collect();
        let mend = match nearest(name, names.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("`peftc {what}s` lists them"),
        };
        return Err(Failure::Usage(format!("the library has no {what} `{name}`; {mend}")));
    }
    if arguments.json {
        super::print(&serde_json::to_string_pretty(&chosen).expect("plain data"));
        return Ok(());
    }
    let indented =
        |text: &str| text.lines().map(|l| format!("    {l}").trim_end().to_owned()).collect::<Vec<_>>().join("\n");
    let text: Vec<String> = match arguments.name {
        None => chosen.iter().map(|d| format!("{}\n{}\n", d.signature, indented(&summary(&d.doc)))).collect(),
        Some(_) => {
            let each = chosen.iter().map(|d| format!("{}\n{}\n", d.signature, indented(&d.doc)));
            each.chain([format!("models/{}:\n\n{}", chosen[0].file, chosen[0].source)]).collect()
        }
    };
    super::print(text.join("\n").trim_end());
    Ok(())
}

/// The first paragraph of a doc comment.
fn summary(doc: &str) -> String {
    doc.lines().take_while(|l| !l.is_empty()).collect::<Vec<_>>().join("\n")
}
