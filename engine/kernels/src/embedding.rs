//! Token embedding: a row of the weights for each id, and the gradient of the weights.
//!
//! The weights `[vocabulary, cols]` are the ones of the output head where a model ties the two.
//! Repeated ids add to their row of the gradient in ascending order of the tokens.

use crate::{Kernels, Linear, add::AddInto, cpu::Isa, disjoint::Disjoint, split::whole_rows};

impl Kernels {
    /// `out[m] = w[ids[m]]`, as f32.
    ///
    /// # Panics
    /// When an id has no row or `out` is not one row for each id.
    pub fn embed(&self, w: &Linear, ids: &[u32], out: &mut [f32]) {
        check_ids(ids, w.rows());
        let cols = w.cols();
        assert_eq!(out.len(), ids.len() * cols, "output length against {} rows", ids.len());
        let out = Disjoint::new(out);
        let copy = |rows: std::ops::Range<usize>| {
            for row in rows {
                // SAFETY: every row belongs to one task.
                let out = unsafe { out.part(row * cols, (row + 1) * cols) };
                w.get_row(ids[row] as usize, out);
            }
        };
        match self.isa {
            Isa::Reference => copy(0..ids.len()),
            _ => self.split_rows(ids.len(), cols, &copy),
        }
    }

    /// `dw[ids[m]] += dy[m]`, in ascending order of m; `dw` is `[vocabulary, cols]`, row-major.
    ///
    /// # Panics
    /// When an id has no row or the lengths do not agree.
    pub fn embed_backward(&self, dy: &[f32], ids: &[u32], dw: &mut [f32]) {
        if ids.is_empty() {
            assert_eq!(dy.len(), 0, "gradient length without tokens");
            return;
        }
        let cols = dy.len() / ids.len();
        assert_eq!(dy.len(), ids.len() * cols, "gradient length against {} rows", ids.len());
        check_ids(ids, if cols == 0 { usize::MAX } else { whole_rows(dw.len(), cols) });
        if let Isa::Reference = self.isa {
            for (i, dy) in dy.iter().enumerate() {
                dw[ids[i / cols] as usize * cols + i % cols] += dy;
            }
            return;
        }
        let dw = Disjoint::new(dw);
        self.split_columns(cols, ids.len(), &|columns| {
            for (row, &id) in ids.iter().enumerate() {
                let at = id as usize * cols;
                // SAFETY: every column belongs to one task.
                let x = unsafe { dw.part(at + columns.start, at + columns.end) };
                let y = &dy[row * cols + columns.start..row * cols + columns.end];
                self.isa.vectorize(AddInto { x, y });
            }
        });
    }
}

fn check_ids(ids: &[u32], vocabulary: usize) {
    let highest = ids.iter().copied().max().unwrap_or(0) as usize;
    assert!(
        ids.is_empty() || highest < vocabulary,
        "token id {highest}, vocabulary has {vocabulary}"
    );
}

#[cfg(test)]
mod tests {
    use crate::{
        Dtype, Linear, Matrix,
        testing::{Random, bits, every_level, reference},
    };

    #[test]
    fn rows_are_copied_exactly() {
        let mut random = Random::new(41);
        for (rows, cols, tokens) in [(1, 1, 1), (7, 5, 0), (9, 33, 20), (40, 64, 700)] {
            let values = random.vec(rows * cols, 1.0);
            let ids: Vec<u32> = (0..tokens).map(|_| random.below(rows) as u32).collect();
            let mut w = Matrix::zeros(Dtype::F32, rows, cols);
            w.set_rows(0, &values);
            let w = Linear::Full(w);
            let expected: Vec<f32> =
                ids.iter().flat_map(|&id| values[id as usize * cols..][..cols].to_vec()).collect();
            for kernels in every_level(2) {
                let mut out = vec![f32::NAN; tokens * cols];
                kernels.embed(&w, &ids, &mut out);
                assert_eq!(bits(&out), bits(&expected));
            }
        }
    }

    #[test]
    fn repeated_ids_add_in_the_order_of_the_tokens() {
        let mut random = Random::new(42);
        for (vocabulary, cols, tokens) in [(1, 1, 3), (3, 17, 50), (100, 600, 333)] {
            let ids: Vec<u32> = (0..tokens).map(|_| random.below(vocabulary) as u32).collect();
            let dy = random.vec(tokens * cols, 1.0);
            let start = random.vec(vocabulary * cols, 1.0);
            let mut expected = start.clone();
            for (m, &id) in ids.iter().enumerate() {
                for c in 0..cols {
                    expected[id as usize * cols + c] += dy[m * cols + c];
                }
            }
            for kernels in every_level(1).chain(every_level(3)) {
                let mut dw = start.clone();
                kernels.embed_backward(&dy, &ids, &mut dw);
                assert_eq!(bits(&dw), bits(&expected));
            }
        }
    }

    #[test]
    #[should_panic(expected = "token id 4, vocabulary has 4")]
    fn an_unknown_id_is_refused() {
        let w = Linear::Full(Matrix::zeros(Dtype::Bf16, 4, 2));
        reference().embed(&w, &[1, 4], &mut [0.0; 4]);
    }
}
