//! The random stream of sampling: a pure function of a key, with no state to lose.
//!
//! Keyed by (seed, sample, position), so a token's draw does not depend on its neighbours in the
//! batch, on preemption or on restarts. The mixing function is the finaliser of SplitMix64 (Steele,
//! Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), applied per key word.

/// A uniform number in [0, 1) with 53 random bits, from the key `words`.
pub fn uniform(words: &[u64]) -> f64 {
    (hash(words) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// A 64-bit key made of `words`, in order.
pub fn hash(words: &[u64]) -> u64 {
    words.iter().fold(0x243f_6a88_85a3_08d3, |state, word| mix(state ^ mix(*word)))
}

/// The mixing function.
pub fn mix(word: u64) -> u64 {
    let z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_is_uniform_and_keys_are_apart() {
        let mut bins = [0u32; 16];
        let mut sum = 0.0;
        for i in 0..16_000u64 {
            let u = uniform(&[7, i % 8, i / 8]);
            bins[(u * 16.0) as usize] += 1;
            sum += u;
        }
        assert!((sum / 16_000.0 - 0.5).abs() < 0.01, "mean {}", sum / 16_000.0);
        assert!(bins.iter().all(|b| (850..1150).contains(b)), "{bins:?}");
        assert_ne!(hash(&[1, 2]), hash(&[2, 1]));
        assert_eq!(uniform(&[3, 1, 4]).to_bits(), uniform(&[3, 1, 4]).to_bits());
    }
}
