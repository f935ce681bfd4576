//! Kernels' arguments by name: first the buffers, then the sizes. Each kernel declares its argument list once. The
//! lowering fills it in, the kernel's code reads it, and the cost model evaluates it, all by the same field names.

/// Declares an argument list as a struct that is generic over what an argument is: a buffer's number or a size's
/// expression in the lowering, an SSA value in the kernel's code, a number in the cost model.
macro_rules! arguments {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs)] // A field needs a comment only where its name does not already say what the argument is.
        pub struct $name<T> { $($(#[$field_doc])* pub $field: T),+ }

        // A kernel without an epilogue does not call `split`, and one that nothing indexes does not read `NAMES`.
        #[allow(dead_code)]
        impl<T> $name<T> {
            /// The arguments' names, in the kernel's order.
            pub const NAMES: &[&str] = &[$(stringify!($field)),+];
            /// The number of arguments.
            pub const COUNT: usize = Self::NAMES.len();

            /// The arguments in the kernel's order.
            pub fn list(self) -> Vec<T> {
                vec![$(self.$field),+]
            }

            /// Applies `each` to every argument.
            pub fn map<U>(self, mut each: impl FnMut(T) -> U) -> $name<U> {
                $name { $($field: each(self.$field)),+ }
            }

            /// Splits this list off the front of `all`; the second result is what remains.
            pub fn split(all: &[T]) -> (Self, &[T])
            where
                T: Clone,
            {
                let (own, rest) = all.split_at(Self::COUNT);
                let mut own = own.iter().cloned();
                ($name { $($field: own.next().expect("as many as there are names")),+ }, rest)
            }

            /// Splits this list off the end of `all`; the first result is what precedes it.
            pub fn split_last(all: &[T]) -> (&[T], Self)
            where
                T: Clone,
            {
                let (before, own) = all.split_at(all.len() - Self::COUNT);
                (before, Self::of(own))
            }

            /// Reads this list from the front of `all` and ignores what follows.
            pub fn of(all: &[T]) -> Self
            where
                T: Clone,
            {
                Self::split(all).0
            }
        }
    };
}

pub(crate) use arguments;
