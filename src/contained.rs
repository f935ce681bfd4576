//! Turns a panic of a third-party library on malformed input into an error.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

// `catch_unwind` catches nothing when the program is built with `panic = "abort"`.
const _: () = assert!(cfg!(panic = "unwind"), "peftc contains panics of libraries: build it with `panic = \"unwind\"`");

thread_local! {
    /// Whether this thread runs inside [`contained`], so that the panic hook prints nothing.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Installs the panic hook once a process.
static HOOK: Once = Once::new();

/// Runs `work`, which calls the crate `library`, on this thread and catches its panic, without printing it.
///
/// `work` must not start work on other threads that may panic, since only this thread's panics are caught. After an
/// error the caller must not use data that `work` was changing.
///
/// # Errors
///
/// The error is the message of the panic, with the name of the crate.
pub fn contained<T>(library: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    HOOK.call_once(|| {
        let outer = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CONTAINED.get() {
                outer(info);
            }
        }));
    });
    let outer = CONTAINED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(outer);
    result.map_err(|payload| message(library, payload))
}

/// The text of an error for a panic of the crate `library`.
fn message(library: &str, payload: Box<dyn Any + Send>) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
    format!("crate `{library}` panics on it: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        let said = |text: &str| Err(format!("crate `tokenizers` panics on it: {text}"));
        assert_eq!(contained("tokenizers", || 3), Ok(3));
        assert_eq!(contained("tokenizers", || -> i32 { panic!("plain") }), said("plain"));
        assert_eq!(contained("tokenizers", || -> i32 { panic!("{} and {}", 1, 2) }), said("1 and 2"));
        // Calls nest, and afterwards panics are printed again.
        assert_eq!(contained("parquet", || contained("tokenizers", || -> i32 { panic!("inner") })), Ok(said("inner")));
        assert!(!CONTAINED.get());
    }
}
