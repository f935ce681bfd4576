//! Where lanes that went different ways come together again: at the immediate post-dominator of the branch.

/// Stands for the end of the function.
pub const END: u32 = u32::MAX;

/// How an instruction goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// To the following one.
    On,
    /// To one of these, and if `or_on` perhaps to the following one.
    To { targets: Vec<u32>, or_on: bool },
    /// Out of the function, and if `or_on` perhaps to the following one.
    Out { or_on: bool },
}

/// For each instruction that branches the instruction at which all its ways meet, for others [`END`].
///
/// A way that never leaves the function (an endless loop) meets no other; the branch then has [`END`].
pub fn meeting_points(next: &[Next]) -> Vec<u32> {
    let blocks = Blocks::new(next);
    let dominator = blocks.post_dominators();
    let mut out = vec![END; next.len()];
    for (b, &(_, end)) in blocks.spans.iter().enumerate() {
        let last = end as usize - 1;
        if matches!(next[last], Next::To { .. })
            && let Some(meeting) = dominator[b].filter(|&d| d != blocks.exit())
        {
            out[last] = blocks.spans[meeting].0;
        }
    }
    out
}

/// Straight pieces of code; one more number stands for the exit.
struct Blocks {
    /// First instruction, and one past the last.
    spans: Vec<(u32, u32)>,
    successors: Vec<Vec<usize>>,
}

impl Blocks {
    fn new(next: &[Next]) -> Blocks {
        let count = next.len();
        let mut leads = vec![false; count + 1];
        leads[0] = true;
        leads[count] = true;
        for (at, next) in next.iter().enumerate() {
            if *next != Next::On {
                leads[at + 1] = true;
            }
            if let Next::To { targets, .. } = next {
                targets.iter().for_each(|&target| leads[target as usize] = true);
            }
        }
        let starts: Vec<usize> = (0..=count).filter(|&at| leads[at]).collect();
        let mut block_of = vec![0; count + 1];
        for (b, pair) in starts.windows(2).enumerate() {
            block_of[pair[0]..pair[1]].fill(b);
        }
        let exit = starts.len() - 1;
        block_of[count] = exit;
        let spans: Vec<(u32, u32)> = starts.windows(2).map(|pair| (pair[0] as u32, pair[1] as u32)).collect();
        let successors = spans
            .iter()
            .map(|&(_, end)| {
                let end = end as usize;
                match &next[end - 1] {
                    Next::On => vec![block_of[end]],
                    Next::To { targets, or_on } => targets
                        .iter()
                        .map(|&target| block_of[target as usize])
                        .chain(or_on.then_some(block_of[end]))
                        .collect(),
                    Next::Out { or_on } => std::iter::once(exit).chain(or_on.then_some(block_of[end])).collect(),
                }
            })
            .collect();
        Blocks { spans, successors }
    }

    fn exit(&self) -> usize {
        self.spans.len()
    }

    /// Dominators of the reversed graph (Cooper, Harvey and Kennedy, 2001); `None`: the exit is never reached.
    fn post_dominators(&self) -> Vec<Option<usize>> {
        let exit = self.exit();
        let mut predecessors = vec![vec![]; exit + 1];
        for (b, successors) in self.successors.iter().enumerate() {
            successors.iter().for_each(|&s| predecessors[s].push(b));
        }
        // Depth first from the exit against the edges; a block's order is its number in post-order.
        let mut order = vec![None; exit + 1];
        let mut post = vec![];
        let mut seen = vec![false; exit + 1];
        let mut stack = vec![(exit, 0)];
        seen[exit] = true;
        while let Some((b, child)) = stack.pop() {
            match predecessors[b].get(child) {
                Some(&p) => {
                    stack.push((b, child + 1));
                    if !std::mem::replace(&mut seen[p], true) {
                        stack.push((p, 0));
                    }
                }
                None => {
                    order[b] = Some(post.len());
                    post.push(b);
                }
            }
        }
        let mut dominator = vec![None; exit + 1];
        dominator[exit] = Some(exit);
        let mut changed = true;
        while changed {
            changed = false;
            for &b in post.iter().rev().filter(|&&b| b != exit) {
                let known = self.successors[b].iter().copied().filter(|&s| dominator[s].is_some());
                let meet = known.reduce(|mut a, mut b| {
                    while a != b {
                        while order[a] < order[b] {
                            a = dominator[a].expect("known");
                        }
                        while order[b] < order[a] {
                            b = dominator[b].expect("known");
                        }
                    }
                    a
                });
                if meet != dominator[b] {
                    dominator[b] = meet;
                    changed = true;
                }
            }
        }
        dominator
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(targets: &[u32], or_on: bool) -> Next {
        Next::To { targets: targets.to_vec(), or_on }
    }

    #[test]
    fn an_if_meets_behind_it() {
        // 0: if → 3; 1: then; 2: → 4; 3: else; 4: out
        let next = [to(&[3], true), Next::On, to(&[4], false), Next::On, Next::Out { or_on: false }];
        assert_eq!(meeting_points(&next), [4, END, 4, END, END]);
    }

    #[test]
    fn a_loop_meets_at_its_exit() {
        // 0; 1: if → 4 (break); 2; 3: if → 1; 4: out
        let next = [Next::On, to(&[4], true), Next::On, to(&[1], true), Next::Out { or_on: false }];
        assert_eq!(meeting_points(&next), [END, 4, END, 4, END]);
    }

    #[test]
    fn returns_in_one_arm_meet_at_the_end() {
        let next = [to(&[2], true), Next::Out { or_on: false }, Next::On, Next::Out { or_on: false }];
        assert_eq!(meeting_points(&next), [END, END, END, END]);
    }

    #[test]
    fn an_endless_loop_meets_nothing() {
        let next = [to(&[2], true), to(&[1], false), Next::Out { or_on: false }];
        assert_eq!(meeting_points(&next), [2, END, END]);
        let next = [to(&[0], false)];
        assert_eq!(meeting_points(&next), [END]);
    }

    #[test]
    fn nested_ifs() {
        // 0: if → 5; 1: if → 3; 2; 3; 4: → 6; 5; 6: out
        let next =
            [to(&[5], true), to(&[3], true), Next::On, Next::On, to(&[6], false), Next::On, Next::Out { or_on: false }];
        assert_eq!(meeting_points(&next), [6, 3, END, END, 6, END, END]);
    }
}
