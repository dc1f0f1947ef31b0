//! The backward of a bias: column sums over rows, in ascending order of rows.

use crate::disjoint::Disjoint;
use crate::split::whole_rows;

impl crate::Kernels {
    /// `db[c] += sum over rows r of dy[r, c]`, rows ascending; `dy` is `[M, db.len()]`.
    ///
    /// # Panics
    /// When `dy` is not whole rows.
    pub fn bias_backward(&self, dy: &[f32], db: &mut [f32]) {
        let cols = db.len();
        let rows = whole_rows(dy.len(), cols);
        let db = Disjoint::new(db);
        self.split_columns(cols, rows, &|columns| {
            // SAFETY: tasks own disjoint column ranges.
            let sums = unsafe { db.part(columns.start, columns.end) };
            for row in dy.chunks_exact(cols) {
                sums.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, d)| *sum += d);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::{Kernels, Level};

    #[test]
    fn sums_columns_whatever_the_threads() {
        let (rows, cols) = (7, 133);
        let dy: Vec<f32> = (0..rows * cols).map(|i| ((i * 37) % 101) as f32 * 0.25 - 9.0).collect();
        let mut want = vec![1.0f32; cols];
        for row in dy.chunks_exact(cols) {
            want.iter_mut().zip(row).for_each(|(w, d)| *w += d);
        }
        for threads in [1, 2, 3] {
            let mut sums = vec![1.0; cols];
            let kernels = Kernels::new(Level::Portable, threads).expect("portable runs everywhere");
            kernels.bias_backward(&dy, &mut sums);
            assert_eq!(sums, want);
        }
    }
}
