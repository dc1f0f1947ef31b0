//! Every format against a second decoder that finds one number by its index in a block, written from the
//! layout alone, and against blocks worked out by hand.

use super::*;

/// A small generator for test bytes (splitmix64).
fn random_bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (z >> 56) as u8
        })
        .collect()
}

/// Bits `at..at + n` of a little-endian bit string.
fn bits(bytes: &[u8], at: usize, n: usize) -> i32 {
    (0..n).map(|i| i32::from(bytes[(at + i) / 8] >> ((at + i) % 8) & 1) << i).sum()
}

fn f16_at(b: &[u8], at: usize) -> f64 {
    f16::from_bits(u16::from(b[at]) | u16::from(b[at + 1]) << 8).to_f64()
}

/// Number `i` of a block, in f64.
fn element(format: Format, b: &[u8], i: usize) -> f64 {
    let four = |at: usize| f64::from(bits(&b[at..], 8 * (i % 16) + 4 * (i / 16), 4));
    let bit = |at: usize| f64::from(bits(&b[at..], i, 1));
    match format {
        Format::F32 => f64::from(f32::from_bits(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Format::F16 => f16_at(b, 0),
        Format::BF16 => f64::from(f32::from_bits(u32::from_le_bytes([0, 0, b[0], b[1]]))),
        Format::Q4_0 => f16_at(b, 0) * (four(2) - 8.0),
        Format::Q4_1 => f16_at(b, 0) * four(4) + f16_at(b, 2),
        Format::Q5_0 => f16_at(b, 0) * (four(6) + 16.0 * bit(2) - 16.0),
        Format::Q5_1 => f16_at(b, 0) * (four(8) + 16.0 * bit(4)) + f16_at(b, 2),
        Format::Q8_0 => f16_at(b, 0) * f64::from(b[2 + i] as i8),
        _ => k_element(format, b, i),
    }
}

fn k_element(format: Format, b: &[u8], i: usize) -> f64 {
    // Position inside a half of 128, run of 32 inside the half, place inside the run.
    let (part, run, place) = (i / 128, i % 128 / 32, i % 32);
    let two = |at: usize| bits(&b[at..], 8 * (part * 32 + place) + 2 * run, 2);
    let eight_runs = |at: usize| bits(&b[at..], 8 * place + i / 32, 1);
    let four = |at: usize| bits(&b[at..], 8 * (i / 64 * 32 + place) + 4 * (i / 32 % 2), 4);
    match format {
        Format::Q2_K => {
            let s = i32::from(b[i / 16]);
            f16_at(b, 80) * f64::from(s % 16 * two(16)) - f16_at(b, 82) * f64::from(s / 16)
        }
        Format::Q3_K => {
            let g = i / 16;
            let low = bits(&b[96..], 8 * (g % 8) + 4 * (g / 8), 4);
            let high = bits(&b[104..], 8 * (g % 4) + 2 * (g / 4), 2);
            let q = two(32) + 4 * eight_runs(0) - 4;
            f16_at(b, 108) * f64::from((low + 16 * high - 32) * q)
        }
        Format::Q4_K | Format::Q5_K => {
            let j = i / 32;
            let s = &b[4..16];
            let (scale, min) = match j {
                0..4 => (bits(s, 8 * j, 6), bits(s, 32 + 8 * j, 6)),
                _ => (
                    bits(s, 32 + 8 * j, 4) + 16 * bits(s, 8 * (j - 4) + 6, 2),
                    bits(s, 32 + 8 * j + 4, 4) + 16 * bits(s, 8 * j + 6, 2),
                ),
            };
            let q = match format {
                Format::Q4_K => four(16),
                _ => four(48) + 16 * eight_runs(16),
            };
            f16_at(b, 0) * f64::from(scale * q) - f16_at(b, 2) * f64::from(min)
        }
        Format::Q6_K => {
            let low = bits(b, 8 * (part * 64 + run % 2 * 32 + place) + 4 * (run / 2), 4);
            let q = low + 16 * two(128) - 32;
            f16_at(b, 208) * f64::from(i32::from(b[192 + i / 16] as i8) * q)
        }
        _ => unreachable!("not a K format"),
    }
}

/// Where the f16 scales of a block lie, to keep them finite and moderate in random blocks.
fn scales_at(format: Format) -> &'static [usize] {
    match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
        Format::F32 | Format::F16 | Format::BF16 => &[],
    }
}

#[test]
fn every_format_agrees_with_the_layout() {
    for (number, format) in Format::GGML {
        let (n, size) = (format.block_elements(), format.block_bytes());
        for seed in 0..20 {
            let mut bytes = random_bytes(seed * 100 + u64::from(number), 3 * size);
            for block in bytes.chunks_exact_mut(size) {
                for at in scales_at(format) {
                    block[at + 1] = block[at + 1] & 0x83 | 0x2c;
                }
            }
            let mut out = vec![0.0; 3 * n];
            dequantize(format, &bytes, &mut out);
            for (i, y) in out.iter().enumerate() {
                let expected = element(format, &bytes[i / n * size..][..size], i % n);
                let close = (f64::from(*y) - expected).abs() <= 2e-6 * (expected.abs() + 8.0);
                let same = expected.is_nan() && y.is_nan() || f64::from(*y) == expected;
                assert!(close || same, "{format:?} seed {seed} number {i}: {y} {expected}");
            }
        }
    }
}

#[test]
fn blocks_worked_out_by_hand() {
    // d = 0.5 (0x3800), first byte 0x2f: 15 - 8 = 7 and 2 - 8 = -6.
    let mut q4 = [0x88; 18];
    (q4[0], q4[1], q4[2]) = (0x00, 0x38, 0x2f);
    let mut y = [1.0; 32];
    dequantize(Format::Q4_0, &q4, &mut y);
    let mut expected = [0.0; 32];
    (expected[0], expected[16]) = (3.5, -3.0);
    assert_eq!(y, expected);
    // d = 2, fifth bits of numbers 1 and 31 set: 2 * (0 + 16 - 16) = 0, others 2 * -16.
    let mut q5 = [0; 22];
    (q5[1], q5[2], q5[5]) = (0x40, 0x02, 0x80);
    dequantize(Format::Q5_0, &q5, &mut y);
    expected = [-32.0; 32];
    (expected[1], expected[31]) = (0.0, 0.0);
    assert_eq!(y, expected);
    // Q4_K: d = 1, dmin = 0.5; scale 3 and minimum 2 for run 0, scale 33 (1 + 2 * 16) for run 4.
    let mut q4k = [0; 144];
    (q4k[1], q4k[3]) = (0x3c, 0x38);
    (q4k[4], q4k[8], q4k[12]) = (0x83, 0x02, 0x01);
    (q4k[16], q4k[16 + 64]) = (0x07, 0x05);
    let mut y = [9.0; 256];
    dequantize(Format::Q4_K, &q4k, &mut y);
    assert_eq!((y[0], y[1], y[31], y[32]), (20.0, -1.0, -1.0, 0.0));
    assert_eq!((y[128], y[129]), (165.0, 0.0));
    // Q6_K: d = 0.25, scale -4 for numbers 16..32: -(63 - 32) for all bits set, 32 for none.
    let mut q6k = [0; 210];
    (q6k[209], q6k[193], q6k[16], q6k[128 + 16]) = (0x34, 0xfc, 0x0f, 0x03);
    dequantize(Format::Q6_K, &q6k, &mut y);
    assert_eq!((y[15], y[16], y[17], y[32]), (0.0, -31.0, 32.0, 0.0));
}

#[test]
fn sizes_refuse_broken_blocks_and_overflow() {
    assert_eq!(Format::Q4_0.bytes(64), Some(36));
    assert_eq!(Format::Q4_0.bytes(65), None);
    assert_eq!(Format::Q6_K.bytes(256 * 3), Some(630));
    assert_eq!(Format::F32.bytes(u64::MAX), None);
    assert_eq!(Format::from_ggml(14), Some(Format::Q6_K));
    assert_eq!(Format::from_ggml(4), None);
}
