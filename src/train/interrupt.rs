//! Handles Ctrl-C and SIGTERM during training.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Installs signal handlers. The first signal sets the returned flag. The second ends the process at once, with the
/// conventional exit code of 128 plus the signal's number.
///
/// # Errors
///
/// A handler cannot be installed.
pub fn flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The order matters: the shutdown handler runs first, so it does not see the flag that the same signal sets.
        flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())?;
        flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}

/// This process's command line with `--resume` added, for the user to repeat.
pub fn resume_command() -> String {
    let mut words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    words.retain(|word| word != "--overwrite");
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".into());
    }
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// A word quoted for a POSIX shell.
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
    fn words_are_quoted_for_a_shell() {
        let words = ["train.lr=1e-3", "a b", "it's", "", "$HOME", "ü"].map(quoted);
        assert_eq!(words, ["train.lr=1e-3", "'a b'", r"'it'\''s'", "''", "'$HOME'", "'ü'"]);
    }
}
