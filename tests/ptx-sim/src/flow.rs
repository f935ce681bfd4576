//! Reconvergence points: lanes that diverge at a branch reconverge at its immediate post-dominator.

/// Stands for the end of the function.
pub const END: u32 = u32::MAX;

/// Control flow out of an instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Flow {
    /// To the next instruction.
    Fallthrough,
    /// To one of the targets, and if `or_fallthrough` possibly to the next instruction.
    Branch { targets: Vec<u32>, or_fallthrough: bool },
    /// Out of the function, and if `or_fallthrough` possibly to the next instruction.
    Exit { or_fallthrough: bool },
}

/// For each branch the instruction at which its lanes reconverge, for other instructions [`END`].
///
/// A path that never leaves the function (an endless loop) has no post-dominator; the branch then has [`END`].
pub fn reconvergence_points(next: &[Flow]) -> Vec<u32> {
    let blocks = Blocks::new(next);
    let dominator = blocks.post_dominators();
    let mut out = vec![END; next.len()];
    for (b, &(_, end)) in blocks.spans.iter().enumerate() {
        let last = end as usize - 1;
        if matches!(next[last], Flow::Branch { .. })
            && let Some(reconvergence) = dominator[b].filter(|&d| d != blocks.exit())
        {
            out[last] = blocks.spans[reconvergence].0;
        }
    }
    out
}

/// Basic blocks; the number after the last block stands for the exit.
struct Blocks {
    /// First instruction and one past the last, for each block.
    spans: Vec<(u32, u32)>,
    successors: Vec<Vec<usize>>,
}

impl Blocks {
    fn new(next: &[Flow]) -> Blocks {
        let count = next.len();
        let mut leaders = vec![false; count + 1];
        leaders[0] = true;
        leaders[count] = true;
        for (at, next) in next.iter().enumerate() {
            if *next != Flow::Fallthrough {
                leaders[at + 1] = true;
            }
            if let Flow::Branch { targets, .. } = next {
                targets.iter().for_each(|&target| leaders[target as usize] = true);
            }
        }
        let starts: Vec<usize> = (0..=count).filter(|&at| leaders[at]).collect();
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
                    Flow::Fallthrough => vec![block_of[end]],
                    Flow::Branch { targets, or_fallthrough } => targets
                        .iter()
                        .map(|&target| block_of[target as usize])
                        .chain(or_fallthrough.then_some(block_of[end]))
                        .collect(),
                    Flow::Exit { or_fallthrough } => {
                        std::iter::once(exit).chain(or_fallthrough.then_some(block_of[end])).collect()
                    }
                }
            })
            .collect();
        Blocks { spans, successors }
    }

    fn exit(&self) -> usize {
        self.spans.len()
    }

    /// Dominators of the reversed graph by the algorithm of Cooper, Harvey and Kennedy (2001); `None` if the exit is
    /// unreachable.
    fn post_dominators(&self) -> Vec<Option<usize>> {
        let exit = self.exit();
        let mut predecessors = vec![vec![]; exit + 1];
        for (b, successors) in self.successors.iter().enumerate() {
            successors.iter().for_each(|&s| predecessors[s].push(b));
        }
        // A depth-first search from the exit along reversed edges; `order` is the post-order number of each block.
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

    fn to(targets: &[u32], or_fallthrough: bool) -> Flow {
        Flow::Branch { targets: targets.to_vec(), or_fallthrough }
    }

    #[test]
    fn an_if_reconverges_behind_it() {
        // 0: if → 3; 1: then; 2: → 4; 3: else; 4: exit
        let next = [
            to(&[3], true),
            Flow::Fallthrough,
            to(&[4], false),
            Flow::Fallthrough,
            Flow::Exit { or_fallthrough: false },
        ];
        assert_eq!(reconvergence_points(&next), [4, END, 4, END, END]);
    }

    #[test]
    fn a_loop_reconverges_at_its_exit() {
        // 0; 1: if → 4 (break); 2; 3: if → 1; 4: exit
        let next = [
            Flow::Fallthrough,
            to(&[4], true),
            Flow::Fallthrough,
            to(&[1], true),
            Flow::Exit { or_fallthrough: false },
        ];
        assert_eq!(reconvergence_points(&next), [END, 4, END, 4, END]);
    }

    #[test]
    fn a_return_in_one_arm_reconverges_at_the_end() {
        let next = [
            to(&[2], true),
            Flow::Exit { or_fallthrough: false },
            Flow::Fallthrough,
            Flow::Exit { or_fallthrough: false },
        ];
        assert_eq!(reconvergence_points(&next), [END, END, END, END]);
    }

    #[test]
    fn an_endless_loop_has_no_reconvergence_point() {
        let next = [to(&[2], true), to(&[1], false), Flow::Exit { or_fallthrough: false }];
        assert_eq!(reconvergence_points(&next), [2, END, END]);
        let next = [to(&[0], false)];
        assert_eq!(reconvergence_points(&next), [END]);
    }

    #[test]
    fn nested_ifs_reconverge_innermost_first() {
        // 0: if → 5; 1: if → 3; 2; 3; 4: → 6; 5; 6: exit
        let next = [
            to(&[5], true),
            to(&[3], true),
            Flow::Fallthrough,
            Flow::Fallthrough,
            to(&[6], false),
            Flow::Fallthrough,
            Flow::Exit { or_fallthrough: false },
        ];
        assert_eq!(reconvergence_points(&next), [6, 3, END, END, 6, END, END]);
    }
}
