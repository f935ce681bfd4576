//! Threads that go through tasks together: each takes units of a task as long as there are some, and none begins the
//! next task before all units of this one are done.
//!
//! Until then it spins. A step has hundreds of tasks, many of them no longer than it takes to wake a thread that sleeps.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::RuntimeError;

/// Turns of waiting before the processor is offered to others at each turn: some 50 µs.
const TURNS: u32 = 2000;

pub struct Pool(rayon::ThreadPool);

/// Units of work that may be done at once and in any order.
pub struct Task<'a> {
    pub units: u64,
    /// The fewest that are worth a thread's while.
    pub least: u64,
    pub work: Box<dyn Fn(Range<u64>) + Sync + 'a>,
}

/// How far a task is. On a line of the cache of its own: all threads look at it.
#[derive(Default)]
#[repr(align(64))]
struct Progress {
    taken: AtomicU64,
    done: AtomicU64,
}

/// Counts units as done, be it that their work panicked: others wait for them.
struct Done<'a>(&'a Progress, u64);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.done.fetch_add(self.1, Ordering::AcqRel);
    }
}

impl Pool {
    /// `threads` 0: as many as there are cores.
    pub fn new(threads: usize) -> Result<Self, RuntimeError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kernels {i}"));
        Ok(Pool(pool.build().map_err(|e| RuntimeError::Device(format!("no threads to run on: {e}")))?))
    }

    /// Does the tasks in their order. How long each took.
    pub fn run(&self, tasks: &[Task]) -> Vec<Duration> {
        let progress: Vec<Progress> = tasks.iter().map(|_| Progress::default()).collect();
        let threads = self.0.current_num_threads() as u64;
        let mut begun = Instant::now();
        let ends: Vec<Vec<Instant>> = self.0.broadcast(|_| {
            let through = |(task, progress): (&Task, &Progress)| {
                while let Some(units) = progress.take(task, threads) {
                    let _done = Done(progress, units.end - units.start);
                    (task.work)(units);
                }
                progress.wait(task.units);
                Instant::now()
            };
            tasks.iter().zip(&progress).map(through).collect()
        });
        // Whoever saw it first saw it when it was so: a thread may have come late, or been held up.
        let end = |task: usize| ends.iter().map(|seen| seen[task]).min().expect("a thread");
        let time = |task| end(task) - std::mem::replace(&mut begun, end(task));
        (0..tasks.len()).map(time).collect()
    }
}

impl Progress {
    /// Some of the units that are left: fewer as there are fewer, so that all threads end at about the same time.
    fn take(&self, task: &Task, threads: u64) -> Option<Range<u64>> {
        let end = |taken: u64| {
            let left = task.units - taken;
            taken + left.div_ceil(2 * threads).max(task.least).min(left)
        };
        let next = |taken| (taken < task.units).then(|| end(taken));
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        Some(taken..end(taken))
    }

    fn wait(&self, units: u64) {
        let mut turns = 0;
        while self.done.load(Ordering::Acquire) < units {
            if turns < TURNS {
                turns += 1;
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn task<'a>(units: u64, least: u64, work: impl Fn(Range<u64>) + Sync + 'a) -> Task<'a> {
        Task { units, least, work: Box::new(work) }
    }

    #[test]
    fn each_unit_once_and_each_task_after_the_one_before() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            let seen = Mutex::new(vec![]);
            let units = [1, 2, 7, 0, 1000, 3];
            let tasks: Vec<Task> = (units.iter().zip(0..))
                .map(|(&n, i)| {
                    let seen = &seen;
                    task(n, 1, move |units| seen.lock().unwrap().extend(units.map(|unit| (i, unit))))
                })
                .collect();
            assert_eq!(pool.run(&tasks).len(), units.len());
            drop(tasks);
            let mut seen = seen.into_inner().unwrap();
            assert!(seen.is_sorted_by_key(|&(task, _)| task));
            seen.sort();
            let all: Vec<(i32, u64)> =
                units.iter().zip(0..).flat_map(|(&n, i)| (0..n).map(move |unit| (i, unit))).collect();
            assert_eq!(seen, all);
        }
    }

    #[test]
    fn no_fewer_than_are_worth_it() {
        let pool = Pool::new(2).unwrap();
        let taken = Mutex::new(vec![]);
        pool.run(&[task(100, 64, |units| taken.lock().unwrap().push(units))]);
        // Two threads took them, each at its own time.
        let mut taken = taken.into_inner().unwrap();
        taken.sort_by_key(|units| units.start);
        assert_eq!(taken, [0..64, 64..100]);
        let pool = Pool::new(3).unwrap();
        let run = || pool.run(&[task(9, 1, |units| assert!(!units.contains(&4)))]);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        assert!(panicked.is_err(), "and no thread waits for ever");
    }
}
