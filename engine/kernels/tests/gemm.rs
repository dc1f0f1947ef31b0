//! Matrix products at every level this processor has (`ENGINE_CPU` restricts them to one): against
//! f64 sums of the rounded operands, against the reference, and bit against bit where rows, ranges
//! and threads must not matter.

use kernels::{Dtype, Kernels, Level, Matrix, Operand, Scratch, Write};

const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

/// A small counter-based generator; a failing case is reproduced by its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// 0, 1, tails of 16 and 32, and anything up to `end`.
    fn size(&mut self, end: usize) -> usize {
        let special = [0, 1, 2, 15, 16, 17, 31, 32, 33, 48];
        if self.below(2) == 0 { special[self.below(special.len())] } else { self.below(end) }
    }
}

fn levels() -> Vec<Level> {
    let only = std::env::var("ENGINE_CPU").ok().and_then(|name| Level::parse(&name));
    let wanted = |level: &Level| only.is_none_or(|only| only == *level);
    Level::ALL.into_iter().filter(|level| level.available()).filter(wanted).collect()
}

fn kernels(level: Level, threads: usize) -> Kernels {
    Kernels::new(level, threads).expect("an available level")
}

fn operand(kernels: &Kernels, dtype: Dtype, x: &[f32], cols: usize) -> Operand {
    let mut out = Operand::new(dtype);
    kernels.operand(x, cols, &mut out);
    out
}

fn matrix(kernels: &Kernels, dtype: Dtype, w: &[f32], rows: usize, cols: usize) -> Matrix {
    let mut out = Matrix::zeros(dtype, rows, cols);
    kernels.load_matrix(w, &mut out);
    out
}

fn rounded(dtype: Dtype, x: f32) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(x),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f64(),
    }
}

/// `out[i, j] (+)= sum_k a(i, k) b(k, j) (+ bias[j])` in f64, with the sum of magnitudes.
struct Expected {
    values: Vec<(f64, f64)>,
}

impl Expected {
    fn new(
        (rows, depth, cols): (usize, usize, usize),
        a: impl Fn(usize, usize) -> f64,
        b: impl Fn(usize, usize) -> f64,
    ) -> Self {
        let value = |i: usize, j: usize| {
            (0..depth)
                .map(|k| a(i, k) * b(k, j))
                .fold((0.0, 0.0), |(sum, size), x: f64| (sum + x, size + x.abs()))
        };
        Self { values: (0..rows * cols).map(|i| value(i / cols, i % cols)).collect() }
    }

    fn plus(mut self, other: impl Fn(usize) -> f32) -> Self {
        for (i, (sum, size)) in self.values.iter_mut().enumerate() {
            *sum += f64::from(other(i));
            *size += f64::from(other(i)).abs();
        }
        self
    }

    fn check(&self, got: &[f32], what: &str) {
        assert_eq!(self.values.len(), got.len(), "{what}: length");
        for (i, (&(sum, size), &got)) in self.values.iter().zip(got).enumerate() {
            let error = (f64::from(got) - sum).abs();
            assert!(error <= 1e-5 * size + 1e-30, "{what}: output {i} is {got}, expected {sum}");
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn forward_agrees_with_f64_sums() {
    for level in levels() {
        for seed in 0..60 {
            let mut random = Random(seed);
            let dtype = DTYPES[random.below(2)];
            let (m, n, k) = (random.size(70), random.size(200), random.size(300).max(1));
            let kernels = kernels(level, 1 + random.below(3));
            let (x, w) = (random.values(m * k), random.values(n * k));
            let start = random.below(n / 16 + 1) * 16;
            let end = start + random.below(n - start + 1);
            let (bias, before) = (random.values(end - start), random.values(m * (end - start)));
            let what = format!("{level} {dtype:?} seed {seed}: {m} x {start}..{end} x {k}");
            let (xo, wm) = (operand(&kernels, dtype, &x, k), matrix(&kernels, dtype, &w, n, k));
            let mut out = before.clone();
            let range = start..end;
            let expected = Expected::new(
                (m, k, range.len()),
                |i, k0| rounded(dtype, x[i * k + k0]),
                |k0, j| rounded(dtype, w[(start + j) * k + k0]),
            );
            if random.below(2) == 0 {
                kernels.matmul(&xo, &wm, range, None, Write::Set, &mut out);
                expected.check(&out, &what);
            } else {
                let len = range.len();
                kernels.matmul(&xo, &wm, range, Some(&bias), Write::Add, &mut out);
                expected.plus(|i| bias[i % len]).plus(|i| before[i]).check(&out, &what);
            }
        }
    }
}

#[test]
fn backward_agrees_with_f64_sums() {
    for level in levels() {
        let mut scratch = Scratch::new();
        for seed in 0..60 {
            let mut random = Random(1000 + seed);
            let dtype = DTYPES[random.below(2)];
            let (m, n, k) = (random.size(70), random.size(120), random.size(150).max(1));
            let kernels = kernels(level, 1 + random.below(3));
            let (x, w) = (random.values(m * k), random.values(n * k));
            let start = random.below(n / 16 + 1) * 16;
            let len = random.below(n - start + 1);
            let dy = random.values(m * len);
            let write = [Write::Set, Write::Add][random.below(2)];
            let add = |before: f32| if write == Write::Add { before } else { 0.0 };
            let what = format!("{level} {dtype:?} seed {seed}: {m} x {start}+{len} x {k}");

            if len == 0 {
                continue;
            }
            let wm = matrix(&kernels, dtype, &w, n, k);
            let dyo = operand(&kernels, dtype, &dy, len);
            let before = random.values(m * k);
            let mut dx = before.clone();
            kernels.matmul_dx(&dyo, &wm, start..start + len, write, &mut dx, &mut scratch);
            let dy_at = |i: usize, j: usize| rounded(dtype, dy[i * len + j]);
            Expected::new((m, len, k), dy_at, |j, c| rounded(dtype, w[(start + j) * k + c]))
                .plus(|i| add(before[i]))
                .check(&dx, &format!("dx {what}"));
            let xo = operand(&kernels, dtype, &x, k);
            let before = random.values(len * k);
            let mut dw = before.clone();
            kernels.matmul_dw(&dyo, &xo, write, &mut dw, &mut scratch);
            let dy = |j: usize, i: usize| rounded(dtype, dy[i * len + j]);
            Expected::new((len, m, k), dy, |i, c| rounded(dtype, x[i * k + c]))
                .plus(|i| add(before[i]))
                .check(&dw, &format!("dw {what}"));
        }
    }
}

/// The gradient of `sum(c * (x W^T))` against central differences, which are exact up to rounding
/// because the product is linear in each operand.
#[test]
fn backward_agrees_with_finite_differences() {
    let (m, n, k) = (3, 17, 5);
    for level in levels() {
        let kernels = kernels(level, 2);
        let mut random = Random(5);
        let (x, w) = (random.values(m * k), random.values(n * k));
        let weight = random.values(m * n);
        let loss = |x: &[f32], w: &[f32]| {
            let (x, w) =
                (operand(&kernels, Dtype::F32, x, k), matrix(&kernels, Dtype::F32, w, n, k));
            let mut y = vec![0.0; m * n];
            kernels.matmul(&x, &w, 0..n, None, Write::Set, &mut y);
            y.iter().zip(&weight).map(|(&y, &c)| f64::from(y) * f64::from(c)).sum::<f64>()
        };
        let slope = |at: usize, values: &[f32], f: &dyn Fn(&[f32]) -> f64| {
            let (mut up, mut down) = (values.to_vec(), values.to_vec());
            (up[at], down[at]) = (values[at] + 0.5, values[at] - 0.5);
            f(&up) - f(&down)
        };
        let (xo, wm) =
            (operand(&kernels, Dtype::F32, &x, k), matrix(&kernels, Dtype::F32, &w, n, k));
        let (mut dx, mut dw) = (vec![0.0; m * k], vec![0.0; n * k]);
        let (mut scratch, dyo) = (Scratch::new(), operand(&kernels, Dtype::F32, &weight, n));
        kernels.matmul_dx(&dyo, &wm, 0..n, Write::Set, &mut dx, &mut scratch);
        kernels.matmul_dw(&dyo, &xo, Write::Set, &mut dw, &mut scratch);
        for (i, &d) in dx.iter().enumerate() {
            let expected = slope(i, &x, &|x| loss(x, &w));
            assert!((f64::from(d) - expected).abs() < 1e-5, "{level} dx[{i}] {d} {expected}");
        }
        for (i, &d) in dw.iter().enumerate() {
            let expected = slope(i, &w, &|w| loss(&x, w));
            assert!((f64::from(d) - expected).abs() < 1e-5, "{level} dw[{i}] {d} {expected}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let (most, n, k) = (70, 131, 77);
    for (level, dtype) in levels().into_iter().flat_map(|l| DTYPES.map(|d| (l, d))) {
        let mut random = Random(7);
        let kernels = kernels(level, 2);
        let (x, w) = (random.values(most * k), random.values(n * k));
        let (bias, w) = (random.values(n), matrix(&kernels, dtype, &w, n, k));
        let product = |rows: &[f32]| {
            let mut out = vec![0.0; rows.len() / k * n];
            let rows = operand(&kernels, dtype, rows, k);
            kernels.matmul(&rows, &w, 0..n, Some(&bias), Write::Set, &mut out);
            out
        };
        let alone: Vec<f32> = x.chunks(k).flat_map(product).collect();
        for m in 1..=most {
            let first = random.below(most - m + 1);
            let batch = product(&x[first * k..(first + m) * k]);
            let expected = &alone[first * n..(first + m) * n];
            assert_eq!(bits(&batch), bits(expected), "{level} {dtype:?} rows {first}+{m}");
        }
    }
}

#[test]
fn threads_and_ranges_do_not_change_bits() {
    for (level, dtype) in levels().into_iter().flat_map(|l| DTYPES.map(|d| (l, d))) {
        if level == Level::Reference {
            continue;
        }
        for (m, n, k) in [(1, 700, 96), (5, 333, 129), (40, 400, 65), (700, 150, 33)] {
            let mut random = Random(m as u64);
            let (x, w, dy) = (random.values(m * k), random.values(n * k), random.values(m * n));
            let all = |threads: usize| {
                let kernels = kernels(level, threads);
                let (xo, wm) = (operand(&kernels, dtype, &x, k), matrix(&kernels, dtype, &w, n, k));
                let mut out = [vec![0.0; m * n], vec![0.0; m * k], vec![0.0; n * k]];
                let (mut scratch, dyo) = (Scratch::new(), operand(&kernels, dtype, &dy, n));
                kernels.matmul(&xo, &wm, 0..n, None, Write::Set, &mut out[0]);
                kernels.matmul_dx(&dyo, &wm, 0..n, Write::Set, &mut out[1], &mut scratch);
                kernels.matmul_dw(&dyo, &xo, Write::Set, &mut out[2], &mut scratch);
                for cut in [16, 64, n / 32 * 16] {
                    for range in [0..cut, cut..n] {
                        let mut part = vec![0.0; m * range.len()];
                        kernels.matmul(&xo, &wm, range.clone(), None, Write::Set, &mut part);
                        let whole: Vec<f32> =
                            out[0].chunks(n).flat_map(|row| row[range.clone()].to_vec()).collect();
                        assert_eq!(bits(&part), bits(&whole), "{level} {dtype:?} {m} {range:?}");
                    }
                }
                out.map(|out| bits(&out))
            };
            let one = all(1);
            assert!(all(2) == one && all(3) == one, "{level} {dtype:?} {m} x {n} x {k}");
        }
    }
}

#[test]
fn portable_sums_are_the_references() {
    let mut random = Random(11);
    for (dtype, (m, n, k)) in
        DTYPES.into_iter().flat_map(|d| [(5, 37, 43), (2, 16, 1)].map(|s| (d, s)))
    {
        let (x, w) = (random.values(m * k), random.values(n * k));
        let product = |level| {
            let kernels = kernels(level, 2);
            let mut out = vec![0.0; m * n];
            let (x, w) = (operand(&kernels, dtype, &x, k), matrix(&kernels, dtype, &w, n, k));
            kernels.matmul(&x, &w, 0..n, None, Write::Set, &mut out);
            bits(&out)
        };
        assert_eq!(product(Level::Portable), product(Level::Reference), "{dtype:?}");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_column() {
    let (m, n, k) = (19, 41, 35);
    for (level, dtype) in levels().into_iter().flat_map(|l| DTYPES.map(|d| (l, d))) {
        let kernels = kernels(level, 2);
        let mut random = Random(3);
        let (mut x, mut w) = (random.values(m * k), random.values(n * k));
        x[4 * k + 34] = f32::NAN;
        x[9 * k] = f32::INFINITY;
        w[40 * k + 3] = f32::NAN;
        let (xo, wm) = (operand(&kernels, dtype, &x, k), matrix(&kernels, dtype, &w, n, k));
        let mut out = vec![0.0; m * n];
        kernels.matmul(&xo, &wm, 0..n, None, Write::Set, &mut out);
        for (i, y) in out.iter().enumerate() {
            let touched = [4, 9].contains(&(i / n)) || i % n == 40;
            assert_eq!(y.is_finite(), !touched, "{level} {dtype:?} row {} column {}", i / n, i % n);
        }
        // The rows of `w` after a range belong to nobody in it.
        let dyo = operand(&kernels, dtype, &vec![1.0; m * 40], 40);
        let mut dx = vec![0.0; m * k];
        kernels.matmul_dx(&dyo, &wm, 0..40, Write::Set, &mut dx, &mut Scratch::new());
        assert!(dx.iter().all(|d| d.is_finite()), "{level} {dtype:?}");
    }
}

#[test]
fn rows_are_set_and_read_back_rounded() {
    for dtype in DTYPES {
        let mut random = Random(21);
        let (n, k) = (53, 39);
        let values = random.values(n * k);
        let kernels = kernels(Level::detect(), 2);
        let loaded = matrix(&kernels, dtype, &values, n, k);
        let mut set = Matrix::zeros(dtype, n, k);
        set.set_rows(0, &values[..7 * k]);
        set.set_row(7, &values[7 * k..8 * k]);
        set.set_rows(8, &values[8 * k..]);
        let xo = operand(&kernels, dtype, &values, k);
        for row in 0..n {
            let expected: Vec<f32> =
                values[row * k..][..k].iter().map(|&x| rounded(dtype, x) as f32).collect();
            let mut got = vec![0.0; k];
            loaded.get_row(row, &mut got);
            assert_eq!(got, expected, "{dtype:?} loaded row {row}");
            set.get_row(row, &mut got);
            assert_eq!(got, expected, "{dtype:?} set row {row}");
            xo.row_to_f32(row, &mut got);
            assert_eq!(got, expected, "{dtype:?} operand row {row}");
        }
    }
}

#[test]
#[should_panic(expected = "range start 8 is not a multiple of 16")]
fn a_range_inside_a_block_is_refused() {
    let kernels = kernels(Level::Portable, 1);
    let x = operand(&kernels, Dtype::F32, &[1.0; 4], 4);
    let w = Matrix::zeros(Dtype::F32, 32, 4);
    kernels.matmul(&x, &w, 8..32, None, Write::Set, &mut [0.0; 24]);
}

#[test]
#[should_panic(expected = "columns of the left operand")]
fn shapes_that_do_not_agree_are_refused() {
    let kernels = kernels(Level::Portable, 1);
    let x = operand(&kernels, Dtype::F32, &[1.0; 4], 4);
    let w = Matrix::zeros(Dtype::F32, 32, 5);
    kernels.matmul(&x, &w, 0..32, None, Write::Set, &mut [0.0; 32]);
}

/// A pass of no rows has no gradient: sums that are set become zero, others stay.
#[test]
fn a_weight_gradient_over_no_rows_is_zero() {
    let (n, k) = (300, 40);
    for (level, dtype) in levels().into_iter().flat_map(|l| DTYPES.map(|d| (l, d))) {
        let kernels = kernels(level, 2);
        let (dy, x) = (operand(&kernels, dtype, &[], n), operand(&kernels, dtype, &[], k));
        for (write, expected) in [(Write::Add, 1.5), (Write::Set, 0.0)] {
            let mut dw = vec![1.5; n * k];
            kernels.matmul_dw(&dy, &x, write, &mut dw, &mut Scratch::new());
            assert!(dw.iter().all(|&sum| sum == expected), "{level} {dtype:?} {write:?}");
        }
    }
}
