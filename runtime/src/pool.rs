//! A thread pool for kernels. All threads execute a list of tasks in order: each thread takes units of the current task
//! while there are any, and no thread begins the next task before all units of this one are done.
//!
//! Threads wait for each other by spinning. A step has hundreds of tasks, many of them no longer than it takes to wake
//! a sleeping thread.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::RuntimeError;

/// Spins, some 50 µs in all, after which a waiting thread yields the processor at each further one.
const SPINS_BEFORE_YIELD: u32 = 2000;

/// A fixed number of threads.
pub struct Pool(rayon::ThreadPool);

/// Independent units of work, which may run in parallel and in any order.
pub struct Task<'a> {
    /// Number of units.
    pub units: u64,
    /// Units that a thread takes at least: fewer are not worth the synchronisation.
    pub min_units: u64,
    /// Computes a range of units.
    pub work: Box<dyn Fn(Range<u64>) + Sync + 'a>,
}

/// The progress of a task, on a cache line of its own, since all threads poll it.
#[derive(Default)]
#[repr(align(64))]
struct Progress {
    taken: AtomicU64,
    done: AtomicU64,
}

/// Counts units as done when it is dropped, also when their work panics, because other threads wait for them.
struct MarkDone<'a>(&'a Progress, u64);

impl Drop for MarkDone<'_> {
    fn drop(&mut self) {
        self.0.done.fetch_add(self.1, Ordering::AcqRel);
    }
}

impl Pool {
    /// A pool of `threads` threads, 0 for one per core.
    ///
    /// # Errors
    ///
    /// If the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, RuntimeError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kernels {i}"));
        Ok(Pool(pool.build().map_err(|e| RuntimeError::Device(format!("no threads to run on: {e}")))?))
    }

    /// Executes the tasks in order and returns the time that each took.
    pub fn run(&self, tasks: &[Task]) -> Vec<Duration> {
        let progress: Vec<Progress> = tasks.iter().map(|_| Progress::default()).collect();
        let threads = self.0.current_num_threads() as u64;
        let mut begun = Instant::now();
        let ends: Vec<Vec<Instant>> = self.0.broadcast(|_| {
            let through = |(task, progress): (&Task, &Progress)| {
                while let Some(units) = progress.take(task, threads) {
                    let _done = MarkDone(progress, units.end - units.start);
                    (task.work)(units);
                }
                progress.wait(task.units);
                Instant::now()
            };
            tasks.iter().zip(&progress).map(through).collect()
        });
        // The first thread to see that a task is done gives its end; others may have been descheduled.
        let end = |task: usize| ends.iter().map(|seen| seen[task]).min().expect("a thread");
        let time = |task| end(task) - std::mem::replace(&mut begun, end(task));
        (0..tasks.len()).map(time).collect()
    }
}

impl Progress {
    /// Takes some of the units that are left. The fewer are left, the fewer it takes, so that all threads finish at
    /// about the same time (guided self-scheduling).
    fn take(&self, task: &Task, threads: u64) -> Option<Range<u64>> {
        let end = |taken: u64| {
            let left = task.units - taken;
            taken + left.div_ceil(2 * threads).max(task.min_units).min(left)
        };
        let next = |taken| (taken < task.units).then(|| end(taken));
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        Some(taken..end(taken))
    }

    fn wait(&self, units: u64) {
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < units {
            if spins < SPINS_BEFORE_YIELD {
                spins += 1;
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

    fn task<'a>(units: u64, min_units: u64, work: impl Fn(Range<u64>) + Sync + 'a) -> Task<'a> {
        Task { units, min_units, work: Box::new(work) }
    }

    #[test]
    fn each_unit_runs_once_and_tasks_run_in_order() {
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
    fn a_thread_takes_at_least_min_units_and_a_panic_does_not_hang() {
        let pool = Pool::new(2).unwrap();
        let taken = Mutex::new(vec![]);
        pool.run(&[task(100, 64, |units| taken.lock().unwrap().push(units))]);
        // Two threads took the units, in an order that varies.
        let mut taken = taken.into_inner().unwrap();
        taken.sort_by_key(|units| units.start);
        assert_eq!(taken, [0..64, 64..100]);
        let pool = Pool::new(3).unwrap();
        let run = || pool.run(&[task(9, 1, |units| assert!(!units.contains(&4)))]);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        assert!(panicked.is_err(), "and no thread waits for ever");
    }
}
