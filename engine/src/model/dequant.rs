//! Number formats of stored weights, their integers, and their expansion to f32.
//!
//! Plain formats are little-endian. Block formats are those of ggml (`ggml-common.h`, `ggml-quants.c`):
//! blocks of 32 numbers with an f16 scale `d` (and minimum `m`), and "K" blocks of 256 with quantised
//! scales per 16 or 32 numbers. All of them are integers with a scale, and some with a minimum, for each
//! group of 16 or 32: `scale (q - zero) + minimum`. Only whole blocks are expanded; rows of a weight are
//! whole blocks. Leaves out quantising, the `IQ` and `TQ` formats, and rounding to the compute dtype.

use half::{bf16, f16};
use kernels::QuantFormat;

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the formats are known in this spelling")]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Upper half of an f32.
    BF16,
    /// `d * (q4 - 8)`, 32 numbers.
    Q4_0,
    /// `d * q4 + m`, 32 numbers.
    Q4_1,
    /// `d * (q5 - 16)`, 32 numbers.
    Q5_0,
    /// `d * q5 + m`, 32 numbers.
    Q5_1,
    /// `d * i8`, 32 numbers.
    Q8_0,
    /// `d * s4 * q2 - dmin * m4`, scales per 16 of 256 numbers.
    Q2_K,
    /// `d * s6 * (q3 - 4)`, scales per 16 of 256 numbers.
    Q3_K,
    /// `d * s6 * q4 - dmin * m6`, scales per 32 of 256 numbers.
    Q4_K,
    /// `d * s6 * q5 - dmin * m6`, scales per 32 of 256 numbers.
    Q5_K,
    /// `d * s8 * (q6 - 32)`, scales per 16 of 256 numbers.
    Q6_K,
}

impl Format {
    /// All formats, with the type number of each in GGUF files.
    pub(crate) const GGML: [(u32, Self); 13] = [
        (0, Self::F32),
        (1, Self::F16),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (6, Self::Q5_0),
        (7, Self::Q5_1),
        (8, Self::Q8_0),
        (10, Self::Q2_K),
        (11, Self::Q3_K),
        (12, Self::Q4_K),
        (13, Self::Q5_K),
        (14, Self::Q6_K),
        (30, Self::BF16),
    ];

    /// The format of a GGUF type number.
    pub fn from_ggml(number: u32) -> Option<Self> {
        Self::GGML.iter().find(|(n, _)| *n == number).map(|(_, format)| *format)
    }

    /// Numbers in a block; 1 for plain formats.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of `elements` numbers; `None` when they are not whole blocks or overflow.
    pub fn bytes(self, elements: u64) -> Option<u64> {
        let block = self.block_elements() as u64;
        if !elements.is_multiple_of(block) {
            return None;
        }
        (elements / block).checked_mul(self.block_bytes() as u64)
    }
}

/// Expands whole blocks.
///
/// ```
/// # use engine::model::dequant::{Format, dequantize};
/// let mut out = [0.0; 2];
/// dequantize(Format::BF16, &[0x80, 0x3f, 0x00, 0xc0], &mut out);
/// assert_eq!(out, [1.0, -2.0]);
/// ```
///
/// # Panics
/// When `bytes` and `out` are not the same number of whole blocks.
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) {
    let (n, size) = (format.block_elements(), format.block_bytes());
    assert!(
        out.len().is_multiple_of(n) && bytes.len() == out.len() / n * size,
        "{} bytes are not {} numbers of {format:?}",
        bytes.len(),
        out.len()
    );
    let (words, _) = bytes.as_chunks::<4>();
    let (halves, _) = bytes.as_chunks::<2>();
    let Some((quant, unpack)) = format.quantised() else {
        match format {
            Format::F16 => out.iter_mut().zip(halves).for_each(|(y, b)| *y = half(b)),
            Format::BF16 => {
                out.iter_mut().zip(halves).for_each(|(y, b)| *y = bf16::from_le_bytes(*b).to_f32());
            }
            _ => out.iter_mut().zip(words).for_each(|(y, b)| *y = f32::from_le_bytes(*b)),
        }
        return;
    };
    let (mut q, mut scales, mut minima) = ([0; 256], [0.0; 16], [0.0; 16]);
    let (group, zero) = (format.group_elements(), f32::from(quant.zero()));
    for (bytes, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(n)) {
        let (scales, minima) = (&mut scales[..n / group], &mut minima[..n / group]);
        unpack(bytes, Block { q: &mut q[..n], scales, minima });
        for (i, (out, q)) in out.chunks_exact_mut(group).zip(q.chunks_exact(group)).enumerate() {
            let (scale, minimum) = (scales[i], minima[i]);
            out.iter_mut().zip(q).for_each(|(y, q)| *y = scale * (f32::from(*q) - zero) + minimum);
        }
    }
}

/// Where the integers of whole blocks go.
pub(crate) struct Unpacked<'a> {
    /// One for each number.
    pub(crate) q: &'a mut [u8],
    /// One for each group.
    pub(crate) scales: &'a mut [f32],
    /// One for each group, zero where the format has none.
    pub(crate) minima: &'a mut [f32],
}

/// Takes whole blocks of a quantised format apart.
///
/// # Panics
/// When the format is a plain one, or lengths are not those of the same number of whole blocks.
pub(crate) fn unpack(format: Format, bytes: &[u8], to: Unpacked<'_>) {
    let (_, unpack) = format.quantised().expect("a quantised format");
    let (n, size, group) = (format.block_elements(), format.block_bytes(), format.group_elements());
    let blocks = bytes.len() / size;
    let lengths = [bytes.len(), to.q.len(), to.scales.len(), to.minima.len()];
    let groups = blocks * n / group;
    assert_eq!(lengths, [blocks * size, blocks * n, groups, groups], "lengths of {format:?}");
    let groups = to.scales.chunks_exact_mut(n / group).zip(to.minima.chunks_exact_mut(n / group));
    let targets = to.q.chunks_exact_mut(n).zip(groups);
    for (bytes, (q, (scales, minima))) in bytes.chunks_exact(size).zip(targets) {
        unpack(bytes, Block { q, scales, minima });
    }
}

/// One block's integers, and its groups' scales and minima.
struct Block<'a> {
    q: &'a mut [u8],
    scales: &'a mut [f32],
    minima: &'a mut [f32],
}

type Unpack = fn(&[u8], Block<'_>);

impl Format {
    /// What the integers of a quantised format mean; `None` for plain formats.
    pub fn quant_format(self) -> Option<QuantFormat> {
        self.quantised().map(|(format, _)| format)
    }

    /// Numbers that share a scale; those of the whole block for plain formats.
    pub(crate) fn group_elements(self) -> usize {
        match self {
            Self::Q2_K | Self::Q3_K | Self::Q6_K => 16,
            Self::Q4_K | Self::Q5_K => 32,
            other => other.block_elements(),
        }
    }

    fn quantised(self) -> Option<(QuantFormat, Unpack)> {
        // Scales of K blocks are products, of more bits than an f16 has; small ones must not underflow.
        const SCALED: i32 = 8;
        let (bits, minimum, zero, exponent, unpack): (_, _, _, _, Unpack) = match self {
            Self::F32 | Self::F16 | Self::BF16 => return None,
            Self::Q4_0 => (4, false, 8, 0, q4_0),
            Self::Q4_1 => (4, true, 0, 0, q4_1),
            Self::Q5_0 => (5, false, 16, 0, q5_0),
            Self::Q5_1 => (5, true, 0, 0, q5_1),
            Self::Q8_0 => (8, false, 128, 0, q8_0),
            Self::Q2_K => (2, true, 0, SCALED, q2_k),
            Self::Q3_K => (3, false, 4, SCALED, q3_k),
            Self::Q4_K => (4, true, 0, SCALED, q4_k),
            Self::Q5_K => (5, true, 0, SCALED, q5_k),
            Self::Q6_K => (6, false, 32, SCALED, q6_k),
        };
        let group = self.group_elements();
        Some((QuantFormat::new(bits, group, minimum, zero, exponent), unpack))
    }
}

fn half(b: &[u8]) -> f32 {
    f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// Number `j` sits in the low half of byte `j`, number `j + 16` in the high half.
fn nibbles(qs: &[u8], y: &mut [u8]) {
    for (j, q) in qs.iter().enumerate() {
        y[j] = q & 15;
        y[j + 16] = q >> 4;
    }
}

fn q4_0(b: &[u8], to: Block<'_>) {
    to.scales[0] = half(b);
    nibbles(&b[2..], to.q);
}

fn q4_1(b: &[u8], to: Block<'_>) {
    (to.scales[0], to.minima[0]) = (half(b), half(&b[2..]));
    nibbles(&b[4..], to.q);
}

/// The fifth bit of number `j` is bit `j` of a little-endian word.
fn fifths(b: &[u8], y: &mut [u8]) {
    y.iter_mut().enumerate().for_each(|(j, y)| *y |= (b[j / 8] >> (j % 8) & 1) << 4);
}

fn q5_0(b: &[u8], to: Block<'_>) {
    to.scales[0] = half(b);
    nibbles(&b[6..], to.q);
    fifths(&b[2..], to.q);
}

fn q5_1(b: &[u8], to: Block<'_>) {
    (to.scales[0], to.minima[0]) = (half(b), half(&b[2..]));
    nibbles(&b[8..], to.q);
    fifths(&b[4..], to.q);
}

/// Signed bytes, moved up by 128.
fn q8_0(b: &[u8], to: Block<'_>) {
    to.scales[0] = half(b);
    to.q.iter_mut().zip(&b[2..]).for_each(|(y, q)| *y = q ^ 0x80);
}

/// Two halves of 128 numbers over 32 bytes each; bits 2s, 2s+1 of a byte belong to run s of the half.
fn q2_k(b: &[u8], to: Block<'_>) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half(&b[80..]), half(&b[82..]));
    for (group, y) in to.q.chunks_exact_mut(16).enumerate() {
        let scale = scales[group];
        to.scales[group] = d * f32::from(scale & 15);
        to.minima[group] = -(dmin * f32::from(scale >> 4));
        let (start, shift) = run_of(group);
        y.iter_mut().zip(&qs[start..]).for_each(|(y, q)| *y = q >> shift & 3);
    }
}

/// First byte and bit of a group of 16 two-bit numbers.
fn run_of(group: usize) -> (usize, usize) {
    (group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2)
}

/// Low two bits as in `q2_k`; the third bit of run r (of 8, 32 numbers each) is bit r of 32 mask bytes.
fn q3_k(b: &[u8], to: Block<'_>) {
    let (mask, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(&b[108..]);
    for (group, y) in to.q.chunks_exact_mut(16).enumerate() {
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        to.scales[group] = d * f32::from((low | high << 4).cast_signed() - 32);
        let (start, shift) = run_of(group);
        let mask = &mask[group % 2 * 16..];
        for ((y, q), m) in y.iter_mut().zip(&qs[start..]).zip(mask) {
            *y = q >> shift & 3 | (m >> (group / 2) & 1) << 2;
        }
    }
}

/// Six-bit scale and minimum of run `j` of 8, packed in 12 bytes: four of each in the low six bits of
/// bytes 0..8, the rest in the halves of bytes 8..12 and the spare bits of bytes 0..8.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(b: &[u8], to: Block<'_>) {
    let (d, dmin, scales, qs) = (half(b), half(&b[2..]), &b[4..16], &b[16..]);
    for (run, y) in to.q.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(scales, run);
        (to.scales[run], to.minima[run]) = (d * s, -(dmin * m));
        y.iter_mut().zip(&qs[run / 2 * 32..]).for_each(|(y, q)| *y = q >> (run % 2 * 4) & 15);
    }
}

/// As `q4_k`; the fifth bit of run r is bit r of 32 bytes.
fn q5_k(b: &[u8], to: Block<'_>) {
    let (d, dmin, scales, qh, qs) = (half(b), half(&b[2..]), &b[4..16], &b[16..48], &b[48..]);
    for (run, y) in to.q.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(scales, run);
        (to.scales[run], to.minima[run]) = (d * s, -(dmin * m));
        for ((y, q), h) in y.iter_mut().zip(&qs[run / 2 * 32..]).zip(qh) {
            *y = q >> (run % 2 * 4) & 15 | (h >> run & 1) << 4;
        }
    }
}

/// Two halves of 128 numbers: four runs of 32 over 64 low bytes (runs 0, 1 low halves, 2, 3 high
/// halves) and 32 high bytes (two bits a run).
fn q6_k(b: &[u8], to: Block<'_>) {
    let (ql, qh, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(&b[208..]));
    for (scale, s) in to.scales.iter_mut().zip(scales) {
        *scale = d * f32::from(s.cast_signed());
    }
    for (run, y) in to.q.chunks_exact_mut(32).enumerate() {
        let (part, r) = (run / 4, run % 4);
        let low = &ql[part * 64 + r % 2 * 32..];
        let high = &qh[part * 32..];
        for (y, (lo, hi)) in y.iter_mut().zip(low.iter().zip(high)) {
            *y = lo >> (r / 2 * 4) & 15 | (hi >> (2 * r) & 3) << 4;
        }
    }
}

#[cfg(test)]
mod tests;
