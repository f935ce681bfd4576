//! Kernels' arguments by name: buffers, then sizes. A kernel declares them once; who launches it fills them in, its code
//! takes them apart, and the cost model reads their values, all by the same names.

/// Declares a list of arguments, of whatever they are to whom: buffers' numbers or expressions of sizes to who launches,
/// values to the kernel, numbers to the cost model.
macro_rules! arguments {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name<T> { $($(#[$field_doc])* pub $field: T),+ }

        #[allow(dead_code)] // A kernel without an epilogue has no rest, one that is never counted no names.
        impl<T> $name<T> {
            pub const NAMES: &[&str] = &[$(stringify!($field)),+];
            pub const COUNT: usize = Self::NAMES.len();

            /// In the kernel's order.
            pub fn list(self) -> Vec<T> {
                vec![$(self.$field),+]
            }

            /// The same of something else.
            pub fn map<U>(self, mut each: impl FnMut(T) -> U) -> $name<U> {
                $name { $($field: each(self.$field)),+ }
            }

            /// The first ones of all, and the rest.
            pub fn split(all: &[T]) -> (Self, &[T])
            where
                T: Clone,
            {
                let (own, rest) = all.split_at(Self::COUNT);
                let mut own = own.iter().cloned();
                ($name { $($field: own.next().expect("as many as there are names")),+ }, rest)
            }

            /// What stands before the last ones of all, and these.
            pub fn split_last(all: &[T]) -> (&[T], Self)
            where
                T: Clone,
            {
                let (before, own) = all.split_at(all.len() - Self::COUNT);
                (before, Self::of(own))
            }

            /// The first ones of all.
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
