//! Number formats of stored weights, and their expansion to f32.
//!
//! Plain formats are little-endian. Block formats are those of ggml (`ggml-common.h`, `ggml-quants.c`):
//! blocks of 32 numbers with an f16 scale `d` (and minimum `m`), and "K" blocks of 256 with quantised
//! scales per 16 or 32 numbers. Only whole blocks are expanded; rows of a weight are whole blocks.
//! Leaves out quantising, the `IQ` and `TQ` formats, and rounding to the compute dtype.

use half::{bf16, f16};

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
    let each = |out: &mut [f32], block: fn(&[u8], &mut [f32])| {
        bytes.chunks_exact(size).zip(out.chunks_exact_mut(n)).for_each(|(b, y)| block(b, y));
    };
    match format {
        Format::F32 => out.iter_mut().zip(words).for_each(|(y, b)| *y = f32::from_le_bytes(*b)),
        Format::F16 => out.iter_mut().zip(halves).for_each(|(y, b)| *y = half(b)),
        Format::BF16 => {
            out.iter_mut().zip(halves).for_each(|(y, b)| *y = bf16::from_le_bytes(*b).to_f32());
        }
        Format::Q4_0 => each(out, q4_0),
        Format::Q4_1 => each(out, q4_1),
        Format::Q5_0 => each(out, q5_0),
        Format::Q5_1 => each(out, q5_1),
        Format::Q8_0 => each(out, q8_0),
        Format::Q2_K => each(out, q2_k),
        Format::Q3_K => each(out, q3_k),
        Format::Q4_K => each(out, q4_k),
        Format::Q5_K => each(out, q5_k),
        Format::Q6_K => each(out, q6_k),
    }
}

fn half(b: &[u8]) -> f32 {
    f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// Number `j` sits in the low half of byte `j`, number `j + 16` in the high half.
fn nibbles(qs: &[u8], y: &mut [f32], number: impl Fn(usize, u8) -> f32) {
    for (j, q) in qs.iter().enumerate() {
        y[j] = number(j, q & 15);
        y[j + 16] = number(j + 16, q >> 4);
    }
}

fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half(b);
    nibbles(&b[2..], y, |_, q| f32::from(q.cast_signed() - 8) * d);
}

fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half(b), half(&b[2..]));
    nibbles(&b[4..], y, |_, q| f32::from(q) * d + m);
}

/// The fifth bit of number `j` is bit `j` of a little-endian word.
fn fifth(b: &[u8], j: usize) -> u8 {
    (b[j / 8] >> (j % 8) & 1) << 4
}

fn q5_0(b: &[u8], y: &mut [f32]) {
    let d = half(b);
    nibbles(&b[6..], y, |j, q| f32::from((q | fifth(&b[2..], j)).cast_signed() - 16) * d);
}

fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half(b), half(&b[2..]));
    nibbles(&b[8..], y, |j, q| f32::from(q | fifth(&b[4..], j)) * d + m);
}

fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half(b);
    for (y, q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(q.cast_signed()) * d;
    }
}

/// Two halves of 128 numbers over 32 bytes each; bits 2s, 2s+1 of a byte belong to run s of the half.
fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half(&b[80..]), half(&b[82..]));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = scales[group];
        let (d, m) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        let (start, shift) = run_of(group);
        for (y, q) in y.iter_mut().zip(&qs[start..]) {
            *y = d * f32::from(q >> shift & 3) - m;
        }
    }
}

/// First byte and bit of a group of 16 two-bit numbers.
fn run_of(group: usize) -> (usize, usize) {
    (group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2)
}

/// Low two bits as in `q2_k`; the third bit of run r (of 8, 32 numbers each) is bit r of 32 mask bytes.
fn q3_k(b: &[u8], y: &mut [f32]) {
    let (mask, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(&b[108..]);
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        let d = d * f32::from((low | high << 4).cast_signed() - 32);
        let (start, shift) = run_of(group);
        let mask = &mask[group % 2 * 16..];
        for ((y, q), m) in y.iter_mut().zip(&qs[start..]).zip(mask) {
            let third = (m >> (group / 2) & 1) << 2;
            *y = d * f32::from((q >> shift & 3 | third).cast_signed() - 4);
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

fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin, scales, qs) = (half(b), half(&b[2..]), &b[4..16], &b[16..]);
    for (run, y) in y.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(scales, run);
        let (d, m) = (d * s, dmin * m);
        for (y, q) in y.iter_mut().zip(&qs[run / 2 * 32..]) {
            *y = d * f32::from(q >> (run % 2 * 4) & 15) - m;
        }
    }
}

/// As `q4_k`; the fifth bit of run r is bit r of 32 bytes.
fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin, scales, qh, qs) = (half(b), half(&b[2..]), &b[4..16], &b[16..48], &b[48..]);
    for (run, y) in y.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(scales, run);
        let (d, m) = (d * s, dmin * m);
        for ((y, q), h) in y.iter_mut().zip(&qs[run / 2 * 32..]).zip(qh) {
            let q = q >> (run % 2 * 4) & 15 | (h >> run & 1) << 4;
            *y = d * f32::from(q) - m;
        }
    }
}

/// Two halves of 128 numbers: four runs of 32 over 64 low bytes (runs 0, 1 low halves, 2, 3 high
/// halves) and 32 high bytes (two bits a run).
fn q6_k(b: &[u8], y: &mut [f32]) {
    let (ql, qh, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(&b[208..]));
    for (run, y) in y.chunks_exact_mut(32).enumerate() {
        let (part, r) = (run / 4, run % 4);
        let low = &ql[part * 64 + r % 2 * 32..];
        let high = &qh[part * 32..];
        for (l, (y, (lo, hi))) in y.iter_mut().zip(low.iter().zip(high)).enumerate() {
            let q = lo >> (r / 2 * 4) & 15 | (hi >> (2 * r) & 3) << 4;
            let scale = f32::from(scales[run * 2 + l / 16].cast_signed());
            *y = d * scale * f32::from(q.cast_signed() - 32);
        }
    }
}

#[cfg(test)]
mod tests;
