//! Ctrl-C and SIGTERM while a run trains.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// From now on the first of these signals sets the flag, and the second ends the process at once, with the exit code
/// 128 and the signal's number that shells give.
pub fn flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal does not find the flag that it sets.
        flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())?;
        flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}

/// The command line of this process, to be typed once more with `--resume`.
pub fn command_that_goes_on() -> String {
    let mut words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    words.retain(|word| word != "--overwrite");
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".into());
    }
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_of_a_shell() {
        let words = ["train.lr=1e-3", "a b", "it's", "", "$HOME", "ü"].map(quoted);
        assert_eq!(words, ["train.lr=1e-3", "'a b'", r"'it'\''s'", "''", "'$HOME'", "'ü'"]);
    }
}
