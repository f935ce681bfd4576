//! Threads that share a launch's units.

use rayon::prelude::*;

/// Chunks a thread gets: some more than one, so that an uneven launch still ends together.
const CHUNKS: u64 = 4;

/// Launches on fewer elements than this run where they are: waking a thread costs more.
const SMALL: u64 = 1 << 13;

#[derive(Debug)]
pub struct Pool {
    /// `None` for a single thread.
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Pool {
    /// A pool of `threads`, or of as many as there are cores for 0.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads };
        let build = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|i| format!("kernel {i}"))
                .stack_size(8 << 20)
                .build()
        };
        let pool = if threads == 1 { None } else { Some(build()?) };
        Ok(Pool { pool, threads })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` inside the pool, so that its launches need not enter it one by one.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    /// Calls `run(begin, end)` for contiguous ranges that cover `0..units`. `elements` says how much
    /// there is to do in all. To be called from within [`Pool::enter`].
    pub fn split(&self, units: u64, elements: u64, run: impl Fn(u64, u64) + Sync) {
        let chunks = units.min(self.threads as u64 * CHUNKS) as usize;
        if self.threads == 1 || chunks <= 1 || elements < SMALL {
            if units > 0 {
                run(0, units);
            }
            return;
        }
        // Chunk c ends where c + 1 begins, and they differ by one unit at most.
        let border = |chunk: usize| (chunk as u128 * u128::from(units) / chunks as u128) as u64;
        (0..chunks).into_par_iter().with_max_len(1).for_each(|chunk| run(border(chunk), border(chunk + 1)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_unit_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            for units in [0, 1, 2, 11, 12, 13, 1000] {
                let seen = Mutex::new(vec![0; units as usize]);
                pool.enter(|| {
                    pool.split(units, u64::MAX, |begin, end| {
                        assert!(begin < end);
                        seen.lock().unwrap()[begin as usize..end as usize].iter_mut().for_each(|n| *n += 1);
                    })
                });
                assert!(seen.into_inner().unwrap().iter().all(|&n| n == 1));
            }
        }
    }
}
