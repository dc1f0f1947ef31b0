//! The identities that cross the crate's door, and the hasher for maps keyed by integers.

use std::hash::{BuildHasherDefault, Hasher};

/// Names one sequence for the life of its scheduler. Ids count up in the order of
/// [`add`](crate::Scheduler::add) and are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Counts the updates of the weights. Keys and values computed under one version are never read
/// under another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WeightsVersion(pub u64);

/// Builds the hasher of the crate's maps. No map is ever iterated, so their order shows nowhere.
pub(crate) type BuildMixer = BuildHasherDefault<Mixer>;

/// Hashes one `u64` by one [`mix`].
#[derive(Default)]
pub(crate) struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0, value);
    }
}

/// One step of a 64-bit hash: takes `value` into `state`. The finaliser is that of SplitMix64
/// (Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*, 2014).
pub(crate) fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixing_depends_on_both_arguments_and_on_their_order() {
        // SplitMix64 seeded with 0 begins with this published value.
        assert_eq!(mix(0, 0), 0xe220_a839_7b1d_cdaf);
        assert_ne!(mix(mix(0, 1), 2), mix(mix(0, 2), 1));
    }
}
