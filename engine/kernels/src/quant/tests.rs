//! Every format and level against the definition: bits where they must agree, errors where not.

use super::matrix::Order;
use super::{QuantFormat, QuantMatrix, QuantOperand, QuantRow, expand};
use crate::cpu::Isa;
use crate::gemm::convert::{low, round_bf16};
use crate::testing::{Random, bits, every_level, reference};
use crate::{
    Dtype, GatedBuffers, HeadScratch, Input, Kernels, Linear, Matrix, Operand, Part, TokenStats,
    Write,
};

/// The formats of ggml, as bits, group, minimum, zero, exponent.
fn formats() -> Vec<QuantFormat> {
    [
        (4, 32, false, 8, 0),
        (4, 32, true, 0, 0),
        (5, 32, false, 16, 0),
        (5, 32, true, 0, 0),
        (8, 32, false, 128, 0),
        (2, 16, true, 0, 8),
        (3, 16, false, 4, 8),
        (4, 32, true, 0, 8),
        (5, 32, true, 0, 8),
        (6, 16, false, 32, 8),
    ]
    .map(|(bits, group, minimum, zero, exponent)| {
        QuantFormat::new(bits, group, minimum, zero, exponent)
    })
    .to_vec()
}

/// A row's integers, scales and minima.
struct Numbers {
    format: QuantFormat,
    q: Vec<u8>,
    scales: Vec<f32>,
    minima: Vec<f32>,
}

impl Numbers {
    fn random(random: &mut Random, format: QuantFormat, cols: usize) -> Self {
        let groups = cols / format.group();
        let top = 1 << format.bits();
        let half = |x: &f32| half::f16::from_f32(*x).to_f32();
        Self {
            format,
            q: (0..cols).map(|_| random.below(top) as u8).collect(),
            scales: random.vec(groups, 0.02).iter().map(half).collect(),
            minima: random
                .vec(if format.minimum() { groups } else { 0 }, 0.05)
                .iter()
                .map(half)
                .collect(),
        }
    }

    fn row(&self) -> QuantRow<'_> {
        let Self { format, q, scales, minima } = self;
        QuantRow { format: *format, q, scales, minima }
    }

    fn value(&self, k: usize) -> f64 {
        let group = k / self.format.group();
        let q = f64::from(i32::from(self.q[k]) - i32::from(self.format.zero()));
        f64::from(self.scales[group]) * q + f64::from(*self.minima.get(group).unwrap_or(&0.0))
    }
}

fn matrix(format: QuantFormat, rows: &[Numbers], cols: usize) -> QuantMatrix {
    in_order(Order::Pairs, format, rows, cols)
}

fn in_order(order: Order, format: QuantFormat, rows: &[Numbers], cols: usize) -> QuantMatrix {
    let mut w = QuantMatrix::in_order(order, format, rows.len(), cols);
    for (i, row) in rows.iter().enumerate() {
        w.set_row(i, row.row()).expect("scales are small");
    }
    w
}

fn product(kernels: &Kernels, x: &[f32], w: &QuantMatrix) -> Vec<f32> {
    let mut operand = QuantOperand::new();
    kernels.quant_operand(x, w.cols(), &mut operand);
    let mut out = vec![f32::NAN; operand.rows() * w.rows()];
    kernels.quant_matmul(&operand, w, 0..w.rows(), None, Write::Set, &mut out);
    out
}

#[test]
fn rows_come_back_as_they_were_set_in_joined_formats_too() {
    let mut random = Random::new(91);
    let all = formats();
    for first in &all {
        for second in &all {
            let format = first.join(*second);
            let rows: Vec<Numbers> = (0..21)
                .map(|i| {
                    Numbers::random(&mut random, if i % 3 == 0 { *first } else { *second }, 96)
                })
                .collect();
            for order in [Order::Pairs, Order::Rows] {
                let mut w = in_order(order, format, &rows, 96);
                // A row that is set again leaves nothing of what it was.
                w.set_row(20, rows[4].row()).expect("scales are small");
                w.set_row(20, rows[20].row()).expect("scales are small");
                let mut out = [0.0; 96];
                for (i, row) in rows.iter().enumerate() {
                    w.get_row(i, &mut out);
                    for (k, &x) in out.iter().enumerate() {
                        let expected = match order {
                            Order::Pairs => row.value(k) as f32,
                            Order::Rows => low(round_bf16(row.value(k) as f32)),
                        };
                        assert_eq!(x, expected, "{first:?} in {format:?}, row {i}, {k}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_level_gives_the_bits_of_the_definition() {
    let mut random = Random::new(92);
    for format in formats() {
        for (m, n, k) in [(1, 1, 32), (1, 40, 96), (2, 33, 64), (7, 16, 160), (67, 50, 576)] {
            let rows: Vec<_> = (0..n).map(|_| Numbers::random(&mut random, format, k)).collect();
            let w = matrix(format, &rows, k);
            let x = random.vec(m * k, 3.0);
            let expected = product(&reference(), &x, &w);
            for kernels in every_level(1).chain(every_level(3)) {
                let got = product(&kernels, &x, &w);
                assert_eq!(bits(&got), bits(&expected), "{format:?} {m} x {n} x {k}");
            }
        }
    }
}

#[test]
fn the_product_is_close_to_that_of_the_numbers_meant() {
    let mut random = Random::new(93);
    for format in formats() {
        let (m, n, k) = (5, 37, 640);
        let rows: Vec<_> = (0..n).map(|_| Numbers::random(&mut random, format, k)).collect();
        let w = matrix(format, &rows, k);
        let mut x = random.vec(m * k, 1.0);
        // One activation far larger than the rest coarsens its own group only.
        x[3] = 200.0;
        let got = product(&reference(), &x, &w);
        for (i, got) in got.iter().enumerate() {
            let (x, row) = (&x[i / n * k..][..k], &rows[i % n]);
            let (mut sum, mut size, mut rounding) = (0.0, 0.0, 0.0);
            for (group, x) in x.chunks(32).enumerate() {
                let largest = x.iter().fold(0.0, |m, x| f64::from(x.abs()).max(m));
                for (i, &x) in x.iter().enumerate() {
                    let w = row.value(group * 32 + i);
                    sum += f64::from(x) * w;
                    size += (f64::from(x) * w).abs();
                    // Half a unit of the group's integers.
                    rounding += 0.5 * largest / 32_767.0 * w.abs();
                }
            }
            let error = (f64::from(*got) - sum).abs();
            assert!(error <= rounding + 1e-6 * size, "{format:?}: {got}, {sum}");
        }
    }
}

#[test]
fn neither_neighbours_nor_ranges_change_a_bit() {
    let mut random = Random::new(94);
    for format in formats() {
        let (m, n, k) = (70, 52, 64);
        let rows: Vec<_> = (0..n).map(|_| Numbers::random(&mut random, format, k)).collect();
        let w = matrix(format, &rows, k);
        let x = random.vec(m * k, 1.0);
        let bias = random.vec(n, 1.0);
        for kernels in every_level(2) {
            let mut operand = QuantOperand::new();
            kernels.quant_operand(&x, k, &mut operand);
            let mut all = vec![1.0; m * n];
            kernels.quant_matmul(&operand, &w, 0..n, Some(&bias), Write::Add, &mut all);
            for row in [0, 3, 69] {
                kernels.quant_operand(&x[row * k..(row + 1) * k], k, &mut operand);
                let mut one = vec![1.0; 30];
                let range = 16..46;
                let bias = &bias[range.clone()];
                kernels.quant_matmul(&operand, &w, range, Some(bias), Write::Add, &mut one);
                assert_eq!(bits(&one), bits(&all[row * n + 16..row * n + 46]));
            }
        }
    }
}

/// The same weights in full.
fn expanded(kernels: &Kernels, w: &QuantMatrix) -> Matrix {
    let (n, k) = (w.rows(), w.cols());
    let mut values = vec![0.0; n * k];
    values.chunks_exact_mut(k).enumerate().for_each(|(row, out)| w.get_row(row, out));
    let mut full = Matrix::zeros(Dtype::Bf16, n, k);
    kernels.load_matrix(&values, &mut full);
    full
}

/// All formats and some that hold two.
fn joined_formats() -> Vec<QuantFormat> {
    let all = formats();
    let joined = [(0, 1), (1, 4), (0, 9), (3, 4), (6, 9)].map(|(a, b)| all[a].join(all[b]));
    all.into_iter().chain(joined).collect()
}

/// Needs no tiles, only the processor's rounding to bf16.
#[test]
fn expanded_blocks_are_those_of_the_weights_in_full() {
    let mut random = Random::new(97);
    let tokens = every_level(1).filter_map(|kernels| kernels.isa.avx512()?.bf16());
    let Some(token) = tokens.last() else { return };
    for format in joined_formats() {
        let (n, k) = (40, 160);
        let rows: Vec<_> = (0..n).map(|_| Numbers::random(&mut random, format, k)).collect();
        let w = in_order(Order::Rows, format, &rows, k);
        let full = expanded(&reference(), &w);
        let lines = full.lines();
        expand::with_blocks(token, &w, [2, 0, 1].into_iter(), |got| {
            let [first, second, third] = [0, 1, 2].map(|i| &lines[i * k / 2..(i + 1) * k / 2]);
            assert!(got == [third, first, second].concat(), "{format:?}");
        });
    }
}

#[test]
fn where_weights_are_expanded_products_have_the_bits_of_weights_in_full() {
    let mut random = Random::new(98);
    for kernels in every_level(2).filter(|kernels| kernels.expands(Dtype::Bf16)) {
        assert!(matches!(kernels.isa, Isa::Amx(_)), "only tiles expand");
        for (i, format) in joined_formats().into_iter().enumerate() {
            for (m, n, k) in [(1, 40, 96), (2, 33, 64), (17, 16, 160), (33, 70, 64), (140, 52, 96)]
            {
                let rows: Vec<_> =
                    (0..n).map(|_| Numbers::random(&mut random, format, k)).collect();
                let w = in_order(Order::Rows, format, &rows, k);
                let full = Linear::Full(expanded(&kernels, &w));
                let w = Linear::Quantised(w);
                let (x, bias) = (random.vec(m * k, 2.0), random.vec(n - 16, 1.0));
                let mut input = Input::new(Dtype::Bf16);
                kernels.input(&x, &w, &mut input);
                let what = format!("{format:?}, {m} x {n} x {k}");
                let product = |w: &Linear, bias: Option<&[f32]>, write| {
                    let mut out = vec![0.75; m * (n - 16)];
                    kernels.linear(&input, w, 16..n, bias, write, &mut out);
                    bits(&out)
                };
                for write in [Write::Set, Write::Add] {
                    for bias in [None, Some(&bias[..])] {
                        assert_eq!(product(&w, bias, write), product(&full, bias, write), "{what}");
                    }
                }
                let parts = |w: &Linear| {
                    let mut out = [vec![0.0; m * 16], vec![0.0; m * (n - 16)]];
                    let [first, second] = out.each_mut();
                    let parts = [
                        Part { rows: 16..n, bias: None, out: second },
                        Part { rows: 0..16, bias: None, out: first },
                    ];
                    kernels.linear_parts(&input, w, parts);
                    out.map(|out| bits(&out))
                };
                assert_eq!(parts(&w), parts(&full), "{what}, parts");
                let targets: Vec<u32> = (0..m).map(|_| random.below(n) as u32).collect();
                let stats = |w: &Linear| {
                    let mut out = vec![TokenStats::default(); m];
                    let mut scratch = HeadScratch::new();
                    kernels.head_stats(&input, w, &targets, 0.7, &mut out, &mut scratch);
                    out.iter()
                        .map(|s| [s.log_prob.to_bits(), s.entropy.to_bits()])
                        .collect::<Vec<_>>()
                };
                assert_eq!(stats(&w), stats(&full), "{what}, head {i}");
            }
        }
    }
}

#[test]
fn where_weights_are_expanded_gates_have_the_bits_of_weights_in_full() {
    let mut random = Random::new(99);
    let format = formats()[1];
    for kernels in every_level(2).filter(|kernels| kernels.expands(Dtype::Bf16)) {
        for (m, inter, k) in [(1, 64, 96), (5, 96, 64), (40, 32, 64), (150, 160, 96), (3, 48, 32)] {
            let n = 2 * inter;
            let rows: Vec<_> = (0..n).map(|_| Numbers::random(&mut random, format, k)).collect();
            let w = in_order(Order::Rows, format, &rows, k);
            let full = Linear::Full(expanded(&kernels, &w));
            let w = Linear::Quantised(w);
            let next = Linear::Full(Matrix::zeros(Dtype::Bf16, k, inter));
            let mut input = Input::new(Dtype::Bf16);
            kernels.input(&random.vec(m * k, 2.0), &w, &mut input);
            let gated = |w: &Linear| {
                let (mut out, mut kept) = (Input::new(Dtype::Bf16), Operand::new(Dtype::Bf16));
                let mut buffers = GatedBuffers::default();
                kernels.gated((&input, w), &next, &mut buffers, Some(&mut kept), &mut out);
                let rows = |x: &Operand| {
                    let at = |i: usize| x.get(i / x.cols(), i % x.cols());
                    bits(&(0..m * x.cols()).map(at).collect::<Vec<_>>())
                };
                [rows(out.full()), rows(&kept)]
            };
            assert_eq!(gated(&w), gated(&full), "{m} x {inter} x {k}");
        }
    }
}

/// Many rows by so many blocks of so many inputs that they are expanded in several turns.
#[test]
fn weights_that_are_expanded_in_turns_have_the_bits_of_weights_in_full() {
    let mut random = Random::new(100);
    let format = formats()[0];
    let (m, inter, k) = (140, 576, 4864);
    for kernels in every_level(1).filter(|kernels| kernels.expands(Dtype::Bf16)) {
        let rows: Vec<_> =
            (0..2 * inter).map(|_| Numbers::random(&mut random, format, k)).collect();
        let w = in_order(Order::Rows, format, &rows, k);
        let full = Linear::Full(expanded(&kernels, &w));
        let w = Linear::Quantised(w);
        let next = Linear::Full(Matrix::zeros(Dtype::Bf16, 16, inter));
        let mut input = Input::new(Dtype::Bf16);
        kernels.input(&random.vec(m * k, 1.0), &w, &mut input);
        let results = |w: &Linear| {
            let mut out = vec![0.0; m * 2 * inter];
            kernels.linear(&input, w, 0..2 * inter, None, Write::Set, &mut out);
            let (mut gated, mut buffers) = (Input::new(Dtype::Bf16), GatedBuffers::default());
            kernels.gated((&input, w), &next, &mut buffers, None, &mut gated);
            let at = |i: usize| gated.full().get(i / inter, i % inter);
            (bits(&out), bits(&(0..m * inter).map(at).collect::<Vec<_>>()))
        };
        assert!(results(&w) == results(&full), "{m} x {} x {k}", 2 * inter);
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_own_row_only() {
    let mut random = Random::new(95);
    let format = formats()[1];
    let rows: Vec<_> = (0..16).map(|_| Numbers::random(&mut random, format, 64)).collect();
    let w = matrix(format, &rows, 64);
    let clean = random.vec(3 * 64, 1.0);
    for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = clean.clone();
        x[64 + 40] = fault;
        for kernels in every_level(1) {
            let (expected, got) = (product(&kernels, &clean, &w), product(&kernels, &x, &w));
            assert!(got[16..32].iter().all(|y| y.is_nan()), "{fault}");
            assert_eq!(bits(&got[..16]), bits(&expected[..16]));
            assert_eq!(bits(&got[32..]), bits(&expected[32..]));
        }
    }
}

#[test]
fn zeros_and_denormal_activations_give_zeros() {
    let mut random = Random::new(96);
    let format = formats()[4];
    let rows = [Numbers::random(&mut random, format, 32)];
    let w = matrix(format, &rows, 32);
    for kernels in every_level(1) {
        assert_eq!(product(&kernels, &[0.0; 32], &w), [0.0]);
        assert_eq!(product(&kernels, &[1e-40; 32], &w), [0.0]);
    }
}

#[test]
fn a_scale_beyond_f16_is_an_error_that_names_it() {
    let format = QuantFormat::new(4, 32, true, 0, 8);
    let mut w = QuantMatrix::zeros(format, 1, 32);
    let row = QuantRow { format, q: &[0; 32], scales: &[1.0], minima: &[300.0] };
    let error = w.set_row(0, row).expect_err("300 times 256 is too much");
    assert_eq!(error.to_string(), "scale of group 0 is 300, limit is what f16 holds");
}
