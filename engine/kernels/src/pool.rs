//! The compute threads: a fixed team that shares out the tasks of one operation at a time.
//!
//! No stealing, no nesting, no futures. Which thread takes which task is left to chance, so a task's
//! result may depend on its index only; every kernel here is written so.
//!
//! An operation ends when its tasks are done. A worker that has not joined by then, since the system runs
//! something else on its processor, is not waited for: it finds the gate closed and waits for the next one.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// How often a waiting thread looks again before it goes to sleep (about 20 microseconds).
const SPINS: u32 = 4_000;
/// Of the gate: nobody may join.
const CLOSED: usize = 1 << (usize::BITS - 1);

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// A team of `threads` workers, the calling thread being one of them.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held for the length of a `run`: one operation at a time.
    running: Mutex<()>,
}

struct Shared {
    /// The task closure of the running operation, as a raw pointer; changed only between operations.
    job: Mutex<Option<Job>>,
    /// Counts operations; a change of it wakes the workers.
    epoch: AtomicU64,
    next: AtomicUsize,
    tasks: AtomicUsize,
    /// Workers that have joined the operation and not yet left it, and [`CLOSED`].
    gate: AtomicUsize,
    stop: AtomicBool,
    panicked: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Job(*const Task<'static>);

// SAFETY: the closure behind the pointer is Sync, and `run` keeps it alive while workers use it.
unsafe impl Send for Job {}

impl ThreadPool {
    /// Starts `threads - 1` threads; 0 counts as 1.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            epoch: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            gate: AtomicUsize::new(CLOSED),
            stop: AtomicBool::new(false),
            panicked: Mutex::new(None),
        });
        let workers = (1..threads.max(1))
            .map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("compute-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system starts a thread")
            })
            .collect();
        Self { shared, workers, running: Mutex::new(()) }
    }

    /// Threads in the team, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for every `i` in `0..tasks`, on all threads, and returns when all are done.
    ///
    /// # Panics
    /// When a task panics, with the first such panic: after all others have ended where there are several
    /// threads, at once where the caller is alone.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let guard = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: only the lifetime changes; the pointer is used by those within the gate, awaited below.
        let job =
            Job(unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) });
        *self.shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.shared.next.store(0, Ordering::Relaxed);
        self.shared.tasks.store(tasks, Ordering::Relaxed);
        self.shared.gate.store(0, Ordering::Release);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.workers.iter().for_each(|w| w.thread().unpark());
        self.shared.take_tasks(job);
        self.shared.gate.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.shared.gate.load(Ordering::Acquire) != CLOSED {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = self.shared.panicked.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(guard);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ended = worker.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen {
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { std::thread::park() }
            }
            // An operation that begins between this and the join is joined a second time, to no harm.
            seen = self.epoch.load(Ordering::Acquire);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            if self.join() {
                let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
                self.take_tasks(job.expect("an operation has a job"));
                self.gate.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Enters the gate, unless it is closed.
    fn join(&self) -> bool {
        let enter = |gate| (gate & CLOSED == 0).then_some(gate + 1);
        self.gate.fetch_update(Ordering::AcqRel, Ordering::Relaxed, enter).is_ok()
    }

    /// Runs tasks until none is left; keeps the first panic for the caller of `run`.
    fn take_tasks(&self, job: Job) {
        let tasks = self.tasks.load(Ordering::Relaxed);
        // SAFETY: `run` does not return before everybody within the gate is through with the operation.
        let task = unsafe { &*job.0 };
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(i))) {
                let mut first = self.panicked.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(panic);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3] {
            let pool = ThreadPool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn operations_in_a_row_do_not_mix_whoever_comes_late() {
        let pool = ThreadPool::new(4);
        for run in 0..20_000 {
            // On the stack: a worker that came after the end would write into another run's.
            let tasks = 1 + run % 5;
            let counts: [AtomicUsize; 5] = std::array::from_fn(|_| AtomicUsize::new(run));
            pool.run(tasks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            for (i, count) in counts.iter().enumerate() {
                assert_eq!(count.load(Ordering::Relaxed), run + usize::from(i < tasks));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(2);
        let result =
            catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != 5, "task five"))));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }
}
