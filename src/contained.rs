//! A library's panic on a foreign file, as an error.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

// With `panic = "abort"` nothing could be caught.
const _: () = assert!(cfg!(panic = "unwind"), "peftc contains panics of libraries: build it with `panic = \"unwind\"`");

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

static HOOK: Once = Once::new();

/// Runs `work` of a library on this thread. A panic in it prints nothing and is returned as its message. `work` must not hand
/// anything that may panic to other threads, and what it was about to change must not be used after an error.
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
        // Nested, and afterwards panics are reported as before.
        assert_eq!(contained("parquet", || contained("tokenizers", || -> i32 { panic!("inner") })), Ok(said("inner")));
        assert!(!CONTAINED.get());
    }
}
