//! How row-wise and element-wise work is shared out among the threads.
//!
//! A task is a range of outputs, so the number of threads never shows in a result.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Kernels, disjoint::Disjoint, simd::LANES};

/// Elements that one task handles at least; twice as many make two tasks.
const GRAIN: usize = 1 << 14;

/// Tasks for each thread at most, so that a thread that is held up elsewhere does not hold up all.
const TASKS_PER_THREAD: usize = 8;

/// Number of rows of `cols` elements in `len`.
///
/// # Panics
/// When `len` is not a whole number of rows.
pub(crate) fn whole_rows(len: usize, cols: usize) -> usize {
    let rows = len.checked_div(cols).unwrap_or(0);
    assert_eq!(len, rows * cols, "values against whole rows of {cols}");
    rows
}

/// `0..count` cut into as few parts of at most `most` as there can be, of nearly the same size.
#[cfg(target_arch = "x86_64")]
pub(crate) fn even_parts(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let parts = count.div_ceil(most);
    (0..parts).map(move |part| count * part / parts..count * (part + 1) / parts)
}

impl Kernels {
    /// Calls `task` with ranges that cover `0..rows`, a row being about `cost` elements of work.
    pub(crate) fn split_rows(
        &self,
        rows: usize,
        cost: usize,
        task: &(dyn Fn(Range<usize>) + Sync),
    ) {
        let per_task = rows.div_ceil(self.tasks(rows * cost)).max(1);
        self.pool.run(rows.div_ceil(per_task), &|i| {
            task(i * per_task..rows.min((i + 1) * per_task));
        });
    }

    /// Sets every `out[i]` to `value(i)`, one value being about `cost` elements of work.
    pub(crate) fn fill<T: Send>(
        &self,
        out: &mut [T],
        cost: usize,
        value: &(dyn Fn(usize) -> T + Sync),
    ) {
        let rows = out.len();
        let out = Disjoint::new(out);
        self.split_rows(rows, cost, &|range| {
            // SAFETY: the ranges of the tasks are disjoint.
            let part = unsafe { out.part(range.start, range.end) };
            part.iter_mut().zip(range).for_each(|(out, i)| *out = value(i));
        });
    }

    /// Calls `task` with ranges that cover `0..len`; all but the last hold whole vectors.
    pub(crate) fn split_elements(&self, len: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
        let per_task = len.div_ceil(self.tasks(len)).next_multiple_of(LANES).max(LANES);
        self.pool.run(len.div_ceil(per_task), &|i| {
            task(i * per_task..len.min((i + 1) * per_task));
        });
    }

    /// Calls `task` with ranges that cover `0..cols`, wide ones: about one for each thread.
    ///
    /// For sums over `rows` rows, which go in ascending order within each column.
    pub(crate) fn split_columns(
        &self,
        cols: usize,
        rows: usize,
        task: &(dyn Fn(Range<usize>) + Sync),
    ) {
        let strips = if rows * cols < GRAIN { 1 } else { self.pool.threads() };
        let width = cols.div_ceil(strips).next_multiple_of(LANES);
        self.pool.run(cols.div_ceil(width.max(1)), &|i| {
            task(i * width..cols.min((i + 1) * width));
        });
    }

    /// Calls `task` for each of `0..tasks` with one of `lanes`, which is its thread's for all tasks that this
    /// thread takes. As many threads take part as there are lanes, at most.
    pub(crate) fn run_in_lanes<L: Send>(
        &self,
        tasks: usize,
        lanes: &mut [L],
        task: &(dyn Fn(usize, &mut L) + Sync),
    ) {
        let threads = self.pool.threads().min(tasks).min(lanes.len());
        let (lanes, next) = (Disjoint::new(lanes), AtomicUsize::new(0));
        self.pool.run(threads, &|thread| {
            // SAFETY: each thread number has its own lane.
            let lane = &mut unsafe { lanes.part(thread, thread + 1) }[0];
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    return;
                }
                task(i, lane);
            }
        });
    }

    /// How many tasks `elements` of work are worth.
    fn tasks(&self, elements: usize) -> usize {
        (elements / GRAIN).clamp(1, self.pool.threads() * TASKS_PER_THREAD)
    }
}
