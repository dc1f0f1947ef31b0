//! Words of the two formats: rounding to bf16 and back, packing rows.
//!
//! Rounding is to nearest even with denormals kept and NaN made quiet, in integers, so that every
//! level rounds to the same bits.

use super::buffer::{Line, WORDS};
use crate::Dtype;

/// The bf16 nearest to `x` (ties to even), as its 16 bits in the lower half.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

/// The even-indexed (lower) bf16 of a word.
#[inline(always)]
pub(crate) fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

/// The odd-indexed (upper) bf16 of a word.
#[inline(always)]
pub(crate) fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}

/// Elements of `dtype` in one word.
pub(crate) const fn per_word(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 1,
        Dtype::Bf16 => 2,
    }
}

/// Two values as one bf16 word.
#[inline(always)]
pub(crate) fn pair(even: f32, odd: f32) -> u32 {
    round_bf16(even) | round_bf16(odd) << 16
}

/// Element `index` of a row of words.
pub(crate) fn element(dtype: Dtype, words: impl Fn(usize) -> u32, index: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_bits(words(index)),
        Dtype::Bf16 if index.is_multiple_of(2) => low(words(index / 2)),
        Dtype::Bf16 => high(words(index / 2)),
    }
}

/// Rounds up to 16 words of values into a line; what is missing becomes zero.
#[inline(always)]
pub(crate) fn pack_line(dtype: Dtype, values: &[f32], line: &mut Line) {
    match dtype {
        Dtype::F32 => {
            if let Some(values) = values.first_chunk::<WORDS>() {
                line.0 = values.map(f32::to_bits);
                return;
            }
            *line = Line::ZERO;
            line.0.iter_mut().zip(values).for_each(|(word, &x)| *word = x.to_bits());
        }
        Dtype::Bf16 => {
            let mut pack = |whole: &[f32; 2 * WORDS]| {
                for (word, x) in line.0.iter_mut().zip(whole.as_chunks::<2>().0) {
                    *word = pair(x[0], x[1]);
                }
            };
            if let Some(whole) = values.first_chunk() {
                return pack(whole);
            }
            let mut whole = [0.0; 2 * WORDS];
            whole[..values.len()].copy_from_slice(values);
            pack(&whole);
        }
    }
}

/// Rounds a row into lines, filling up with zeros to the end of `lines`.
#[inline(always)]
pub(crate) fn pack_row(dtype: Dtype, values: &[f32], lines: &mut [Line]) {
    let per_line = WORDS * per_word(dtype);
    for (i, line) in lines.iter_mut().enumerate() {
        let rest = values.get(i * per_line..).unwrap_or_default();
        pack_line(dtype, &rest[..rest.len().min(per_line)], line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_agrees_with_the_half_crate() {
        let mut bits = 0x9e37_79b9_u32;
        for i in 0..200_000_u32 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let special = [0x7f80_0000, 0x7f80_0001, 0xffc0_0000, 0x0000_8000, 0x3f80_8000];
            let x = f32::from_bits(special.get(i as usize).copied().unwrap_or(bits));
            assert_eq!(round_bf16(x), u32::from(half::bf16::from_f32(x).to_bits()), "{x:e}");
        }
    }

    #[test]
    fn rows_are_packed_and_padded() {
        let values: Vec<f32> = (1..=35).map(|x| x as f32).collect();
        let mut lines = [Line([9; WORDS]); 3];
        pack_row(Dtype::Bf16, &values, &mut lines);
        let at = |i| element(Dtype::Bf16, |w| lines[w / WORDS].0[w % WORDS], i);
        assert!((0..96).all(|i| at(i) == if i < 35 { (i + 1) as f32 } else { 0.0 }));
        pack_row(Dtype::F32, &values, &mut lines);
        let at = |i| element(Dtype::F32, |w| lines[w / WORDS].0[w % WORDS], i);
        assert!((0..48).all(|i| at(i) == if i < 35 { (i + 1) as f32 } else { 0.0 }));
    }
}
