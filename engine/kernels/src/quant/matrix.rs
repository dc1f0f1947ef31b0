//! Quantised weights as the kernels read them, and how they get there.
//!
//! Blocks of 16 rows, a block as one record for each group of inputs, in ascending order:
//!
//! ```text
//! scales    16 x f16
//! minima    16 x f16                                     where the format has them
//! low       4 or 8 bits of each weight
//! high      1 or 2 bits of each weight                   5- and 6-bit formats
//! ```
//! A plane of `b` bits holds 16-bit lanes in vectors of 16: lane `2 (row mod 8) + (k mod 2)` of the
//! vectors of rows 0 to 7, then of rows 8 to 15; bits `b i ..` of a lane belong to the i-th pair of
//! inputs of its vector. Masking and shifting a vector gives what `vpmaddwd` takes.
//!
//! Where tiles multiply, weights are expanded row by row instead, and a record is of 32 inputs, with two
//! pairs of scales and minima where groups are of 16. Lane k of a vector of 32 lanes then belongs to input
//! k of the record: bits `b i ..` to the i-th row of those that the vector has, which are 16 / b one after
//! the other; a plane of 8 bits has the rows one after the other.
//!
//! Rows past the last are zero.

use half::f16;

use super::X_GROUP;
use crate::gemm::buffer::{Buffer, Line, WORDS};
use crate::gemm::convert::{low, round_bf16};

/// 16-bit lanes of a line.
const LANES: usize = 2 * WORDS;
/// Lanes of a vector: eight rows by two inputs.
const VECTOR: usize = 16;

/// The instance of a function of `<BITS, GROUP>` that a format needs.
macro_rules! of_format {
    ($format:expr, $function:ident) => {
        match ($format.bits(), $format.group()) {
            (4, 32) => $function::<4, 32>,
            (4, 16) => $function::<4, 16>,
            (5, 32) => $function::<5, 32>,
            (6, 32) => $function::<6, 32>,
            (6, 16) => $function::<6, 16>,
            (8, 32) => $function::<8, 32>,
            (8, 16) => $function::<8, 16>,
            (bits, group) => unreachable!("no format has {bits} bits in groups of {group}"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use of_format;

/// How quantised weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantFormat {
    bits: u32,
    group: usize,
    minimum: bool,
    zero: u8,
    exponent: i32,
}

impl QuantFormat {
    /// Weights of up to `bits` bits (at most 8) in groups of 16 or 32, `zero` of which stands for 0.
    ///
    /// `minimum` says whether groups have one, `exponent` by which power of two scales and minima are
    /// multiplied before they are rounded to f16: ggml's own f16 scales need 0.
    ///
    /// # Panics
    /// When `bits` or `group` is something else.
    pub fn new(bits: u32, group: usize, minimum: bool, zero: u8, exponent: i32) -> Self {
        assert!(bits <= 8, "{bits} bits, limit is 8");
        assert!(matches!(group, 16 | 32), "groups of {group}, limit is 16 or 32");
        let bits = match (bits, group) {
            (..=4, _) => 4,
            (5, 32) => 5,
            (5 | 6, _) => 6,
            _ => 8,
        };
        Self { bits, group, minimum, zero, exponent }
    }

    /// A format that holds the weights of both without a loss.
    pub fn join(self, other: Self) -> Self {
        let zero = self.zero.max(other.zero);
        let highest = |f: Self| u32::from(zero - f.zero) + (1 << f.bits) - 1;
        let bits = u32::BITS - highest(self).max(highest(other)).leading_zeros();
        Self::new(
            bits,
            self.group.min(other.group),
            self.minimum || other.minimum,
            zero,
            self.exponent.max(other.exponent),
        )
    }

    /// Bits of a weight.
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// Inputs that share a scale.
    pub fn group(self) -> usize {
        self.group
    }

    /// Whether groups have a minimum.
    pub fn minimum(self) -> bool {
        self.minimum
    }

    /// The integer that stands for 0.
    pub fn zero(self) -> u8 {
        self.zero
    }

    /// What scales and minima were multiplied by, undone.
    pub(crate) fn unit(self) -> f32 {
        (-self.exponent as f32).exp2()
    }

    /// Bits in the low plane and in the high one.
    fn planes(self) -> (u32, u32) {
        if self.bits == 8 { (8, 0) } else { (4, self.bits - 4) }
    }

    /// Lanes that the scales, and the minima too if there are any, take.
    pub(crate) fn head_lanes(self) -> usize {
        WORDS * (1 + usize::from(self.minimum))
    }

    /// Lanes of the low plane.
    pub(crate) fn low_lanes(self) -> usize {
        WORDS * self.group * self.planes().0 as usize / 16
    }

    /// Lanes of a record: a multiple of 16, 32 bytes.
    pub(crate) fn record_lanes(self) -> usize {
        let bits = self.planes().0 + self.planes().1;
        self.head_lanes() + WORDS * self.group * bits as usize / 16
    }

    /// Bytes of weights `[rows, cols]`.
    pub fn bytes(self, rows: usize, cols: usize) -> u64 {
        let records = (rows.div_ceil(WORDS) * (cols / self.group)) as u64;
        2 * records * self.record_lanes() as u64
    }
}

/// One row of quantised weights, of any format that [`QuantFormat::join`] made this matrix's of.
#[derive(Clone, Copy, Debug)]
pub struct QuantRow<'a> {
    /// What the numbers mean.
    pub format: QuantFormat,
    /// `[cols]`: the integers.
    pub q: &'a [u8],
    /// `[cols / group]`.
    pub scales: &'a [f32],
    /// `[cols / group]`, or none.
    pub minima: &'a [f32],
}

/// Which of the two ways the planes of a matrix are laid out in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Pairs of inputs of all rows, for products of integers.
    Pairs,
    /// Rows, to be expanded.
    Rows,
}

/// Quantised weights `[rows, cols]` of a product `y = x W^T`.
///
/// ```
/// use kernels::{QuantFormat, QuantMatrix, QuantRow};
/// let format = QuantFormat::new(4, 32, false, 8, 0);
/// let mut w = QuantMatrix::zeros(format, 3, 32);
/// let q: Vec<u8> = (0..32).map(|k| k / 2).collect();
/// w.set_row(1, QuantRow { format, q: &q, scales: &[0.5], minima: &[] }).expect("in range");
/// let mut row = [0.0; 32];
/// w.get_row(1, &mut row);
/// assert_eq!((row[0], row[31]), (-4.0, 3.5));
/// ```
pub struct QuantMatrix {
    format: QuantFormat,
    order: Order,
    rows: usize,
    cols: usize,
    buffer: Buffer,
}

impl QuantMatrix {
    /// All weights zero, for products of integers: see [`crate::Kernels::quant_matrix`].
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32.
    pub fn zeros(format: QuantFormat, rows: usize, cols: usize) -> Self {
        Self::in_order(Order::Pairs, format, rows, cols)
    }

    /// All weights zero.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32.
    pub(crate) fn in_order(order: Order, format: QuantFormat, rows: usize, cols: usize) -> Self {
        assert!(cols.is_multiple_of(X_GROUP), "{cols} columns, limit is a multiple of 32");
        let lanes = format.bytes(rows, cols).div_ceil(2) as usize;
        Self { format, order, rows, cols, buffer: Buffer::shared_zeros(lanes.div_ceil(LANES)) }
    }

    /// How the planes are laid out.
    pub(crate) fn order(&self) -> Order {
        self.order
    }

    /// How the weights are stored.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Memory held, padding included.
    pub fn bytes(&self) -> usize {
        std::mem::size_of_val::<[Line]>(&self.buffer)
    }

    /// Stores row `row`; its integers move to this matrix's zero, its groups may split.
    ///
    /// Scales and minima are rounded to f16, which changes none of those that ggml stores as f16.
    ///
    /// # Errors
    /// A scale or minimum is not finite or beyond what f16 holds: `value` and group.
    ///
    /// # Panics
    /// When there is no such row, lengths do not agree, the format does not fit in, or an integer is none of it.
    pub fn set_row(&mut self, row: usize, from: QuantRow<'_>) -> Result<(), ScaleOutOfRange> {
        let (format, source) = (self.format, from.format);
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
        assert_eq!(from.q.len(), self.cols, "integers against the matrix's columns");
        let largest = from.q.iter().copied().max().unwrap_or(0);
        assert!(
            u32::from(largest) >> source.bits == 0,
            "integer {largest} of {} bits",
            source.bits
        );
        assert_eq!(format.join(source), format, "format of the row against the matrix's");
        assert_eq!(from.scales.len(), self.cols / source.group, "scales against groups");
        let minima = if source.minimum { from.scales.len() } else { 0 };
        assert_eq!(from.minima.len(), minima, "minima against groups");
        let (shift, power) = (format.zero - source.zero, (format.exponent as f32).exp2());
        for group in 0..self.cols / format.group {
            let wide = group * format.group / source.group;
            let at = self.head(row, group) + row % WORDS;
            self.set_half(at, from.scales[wide], (power, group))?;
            if source.minimum {
                self.set_half(at + WORDS, from.minima[wide], (power, group))?;
            }
            let q = &from.q[group * format.group..][..format.group];
            match self.order {
                Order::Pairs => {
                    self.set_group(row, self.record(row, group) + format.head_lanes(), q, shift);
                }
                Order::Rows => self.set_inputs(row, group * format.group, q, shift),
            }
        }
        Ok(())
    }

    /// The integers of a row from input `first` on, `shift` added, into planes of rows.
    fn set_inputs(&mut self, row: usize, first: usize, q: &[u8], shift: u8) {
        let (low, high) = self.format.planes();
        for (bits, skip, plane) in [(low, 0, 0), (high, low, 1)].into_iter().filter(|p| p.0 > 0) {
            let mask = ((1u32 << bits) - 1) as u8;
            // A word has two inputs of a row, or, with 8 bits, four.
            let (lane, at) = self.place(row, first, plane);
            let per_word = if bits == 8 { 4 } else { 2 };
            let field = 32 / per_word as u32;
            let keep = (0..per_word as u32).fold(0, |all, i| all | u32::from(mask) << (i * field));
            for (i, q) in q.chunks_exact(per_word).enumerate() {
                let new = q
                    .iter()
                    .rev()
                    .fold(0, |word, q| word << field | u32::from((q + shift) >> skip & mask));
                let word = lane / 2 + i;
                let word = &mut self.buffer[word / WORDS].0[word % WORDS];
                *word = *word & !(keep << at) | new << at;
            }
        }
    }

    /// The lane and the first bit of an integer in the low (0) or the high plane (1), in rows.
    fn place(&self, row: usize, k: usize, plane: usize) -> (usize, u32) {
        let (format, groups) = (self.format, X_GROUP / self.format.group);
        let (low, high) = format.planes();
        let start = self.record(row, k / format.group);
        let start = start + groups * format.head_lanes();
        let (bits, start) = match plane {
            0 => (low as usize, start),
            _ => (high as usize, start + groups * format.low_lanes()),
        };
        let (row, k) = (row % WORDS, k % X_GROUP);
        if bits == 8 {
            return (start + (row * X_GROUP + k) / 2, k as u32 % 2 * 8);
        }
        let rows = 16 / bits;
        (start + row / rows * X_GROUP + k, (row % rows * bits) as u32)
    }

    /// The integers of one group of a row, `shift` added, into the planes from lane `at` on.
    fn set_group(&mut self, row: usize, at: usize, q: &[u8], shift: u8) {
        let (low, high) = self.format.planes();
        let planes = [(low, 0, at), (high, low, at + self.format.low_lanes())];
        for (bits, skip, start) in planes.into_iter().filter(|plane| plane.0 > 0) {
            let mask = (1u16 << bits) - 1;
            let pairs = (16 / bits) as usize;
            for (vector, q) in q.chunks(2 * pairs).enumerate() {
                for parity in 0..2 {
                    let lane =
                        q.iter().skip(parity).step_by(2).enumerate().fold(0, |lane, (i, q)| {
                            let q = u16::from(q + shift) >> skip & mask;
                            lane | q << (i as u32 * bits)
                        });
                    let index = start + (vector * 2 + row % WORDS / 8) * VECTOR;
                    let index = index + row % 8 * 2 + parity;
                    self.put(index, lane);
                }
            }
        }
    }

    /// Writes `value` times `power` as f16.
    fn set_half(
        &mut self,
        lane: usize,
        value: f32,
        (power, group): (f32, usize),
    ) -> Result<(), ScaleOutOfRange> {
        let half = f16::from_f32(value * power);
        if !half.is_finite() {
            return Err(ScaleOutOfRange { value, group });
        }
        self.put(lane, half.to_bits());
        Ok(())
    }

    /// Writes row `row` as f32 into `out`: rounded to bf16 where products expand the weights to that.
    ///
    /// # Panics
    /// When there is no such row or `out` is not `cols` long.
    pub fn get_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "output length against the matrix's columns");
        let (unit, zero) = (self.format.unit(), i32::from(self.format.zero));
        let mut integers = [0; X_GROUP];
        for (group, out) in out.chunks_exact_mut(self.format.group).enumerate() {
            let (scale, minimum) = self.scale(row, group);
            let integers = &mut integers[..out.len()];
            self.integers(row, group * out.len(), integers);
            for (out, q) in out.iter_mut().zip(integers) {
                let value = ((*q - zero) as f32).mul_add(scale * unit, minimum * unit);
                *out = match self.order {
                    Order::Pairs => value,
                    Order::Rows => low(round_bf16(value)),
                };
            }
        }
    }

    /// The integers of a row's inputs from `first` on, at most those of a group.
    fn integers(&self, row: usize, first: usize, out: &mut [i32]) {
        if self.order == Order::Pairs {
            return out.iter_mut().zip(first..).for_each(|(q, k)| *q = self.integer(row, k));
        }
        let (low, high) = self.format.planes();
        out.fill(0);
        for (plane, bits, up) in [(0, low, 0), (1, high, low)].into_iter().filter(|p| p.1 > 0) {
            let (lane, at) = self.place(row, first, plane);
            for (i, q) in out.iter_mut().enumerate() {
                let (lane, at) = match bits {
                    8 => (lane + i / 2, i as u32 % 2 * 8),
                    _ => (lane + i, at),
                };
                *q |= i32::from(self.lane(lane) >> at & ((1 << bits) - 1)) << up;
            }
        }
    }

    /// Scale and minimum of a group, still multiplied by the format's power of two.
    pub(crate) fn scale(&self, row: usize, group: usize) -> (f32, f32) {
        let at = self.head(row, group) + row % WORDS;
        let half = |at| f16::from_bits(self.lane(at)).to_f32();
        (half(at), if self.format.minimum { half(at + WORDS) } else { 0.0 })
    }

    /// The integer of row `row` and input `k`, of those in pairs.
    pub(crate) fn integer(&self, row: usize, k: usize) -> i32 {
        let (low, high) = self.format.planes();
        let (record, k) = (self.record(row, k / self.format.group), k % self.format.group);
        let plane = |bits: u32, start: usize| {
            let (pair, pairs) = (k / 2, (16 / bits) as usize);
            let index = start + (pair / pairs * 2 + row % WORDS / 8) * VECTOR;
            let lane = self.lane(index + row % 8 * 2 + k % 2);
            i32::from(lane >> ((pair % pairs) as u32 * bits) & ((1u16 << bits) - 1))
        };
        let start = record + self.format.head_lanes();
        let q = plane(low, start);
        if high == 0 { q } else { q | plane(high, start + self.format.low_lanes()) << low }
    }

    /// First lane of a group's record, or of the one that it shares with others.
    pub(crate) fn record(&self, row: usize, group: usize) -> usize {
        let shared = match self.order {
            Order::Pairs => 1,
            Order::Rows => X_GROUP / self.format.group,
        };
        let group = group / shared * shared;
        (row / WORDS * (self.cols / self.format.group) + group) * self.format.record_lanes()
    }

    /// First lane of a group's scales.
    fn head(&self, row: usize, group: usize) -> usize {
        let of_record = match self.order {
            Order::Pairs => 0,
            Order::Rows => group % (X_GROUP / self.format.group),
        };
        self.record(row, group) + of_record * self.format.head_lanes()
    }

    /// All lines.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.buffer
    }

    fn lane(&self, at: usize) -> u16 {
        (self.buffer[at / LANES].0[at % LANES / 2] >> (at % 2 * 16)) as u16
    }

    fn put(&mut self, at: usize, lane: u16) {
        let word = &mut self.buffer[at / LANES].0[at % LANES / 2];
        *word = *word & !(0xffff << (at % 2 * 16)) | u32::from(lane) << (at % 2 * 16);
    }
}

/// A scale or minimum that f16 cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleOutOfRange {
    /// What it was.
    pub value: f32,
    /// Whose it was.
    pub group: usize,
}

impl std::fmt::Display for ScaleOutOfRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "scale of group {} is {}, limit is what f16 holds", self.group, self.value)
    }
}

impl std::error::Error for ScaleOutOfRange {}
