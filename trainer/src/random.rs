//! Random choices of the trainer, as pure functions of a key.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a block
//! of 128 random bits is a function of a 64-bit key and a 128-bit counter, so a stream has no state
//! that a checkpoint would have to hold: the same (seed, purpose, step, update) gives the same
//! numbers, in whatever order streams are used. Sampling of tokens has its own streams.

use engine::random::mix;

/// What a stream is for; streams of different purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The order of a data set within an epoch.
    Shuffle = 1,
    /// Which of its candidates Clip-Cov takes.
    ClipCov = 2,
    /// Generated tasks.
    Tasks = 3,
    /// Initial weights of a new model.
    Init = 4,
}

/// An endless sequence of random numbers that is a function of its key alone.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    nonce: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of `purpose` for `words` (step, update, index ...) under `seed`.
    ///
    /// ```
    /// use trainer::random::{Purpose, Stream};
    /// let draw = || Stream::keyed(7, Purpose::Shuffle, &[3]).below(100);
    /// assert_eq!(draw(), draw());
    /// ```
    pub fn keyed(seed: u64, purpose: Purpose, words: &[u64]) -> Self {
        let state = [seed, purpose as u64, words.len() as u64]
            .iter()
            .chain(words)
            .fold(0x243f_6a88_85a3_08d3, |state, word| mix(state ^ mix(*word)));
        let key = mix(state);
        Self {
            key: [key as u32, (key >> 32) as u32],
            nonce: mix(state ^ 0x1319_8a2e_0370_7344),
            block: 0,
            words: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let (low, high) = (self.block, self.nonce);
            let counter = [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32];
            self.words = philox(counter, self.key);
            self.block = self.block.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// A uniform number in [0, 1) with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A standard normal number (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A uniform integer below `n`, without bias (Lemire, "Fast random integer generation in an
    /// interval", 2019).
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "cannot choose among 0 values");
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= n.wrapping_neg() % n {
                return (product >> 64) as u64;
            }
        }
    }

    /// Puts `items` into a uniformly random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// Moves a uniformly random subset of `count` items (all, if there are fewer) to the front,
    /// and returns how many that are.
    pub fn choose<T>(&mut self, items: &mut [T], count: usize) -> usize {
        let count = count.min(items.len());
        for i in 0..count {
            let rest = (items.len() - i) as u64;
            items.swap(i, i + self.below(rest) as usize);
        }
        count
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the authors' Random123 library.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn keys_are_apart_and_numbers_uniform() {
        let draw = |seed, purpose, words: &[u64]| Stream::keyed(seed, purpose, words).next_u64();
        let all = [
            draw(1, Purpose::Shuffle, &[2, 3]),
            draw(1, Purpose::Shuffle, &[3, 2]),
            draw(1, Purpose::ClipCov, &[2, 3]),
            draw(2, Purpose::Shuffle, &[2, 3]),
            draw(1, Purpose::Shuffle, &[2, 3, 0]),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
        let mut stream = Stream::keyed(5, Purpose::Tasks, &[]);
        let mut bins = [0u32; 7];
        for _ in 0..14_000 {
            bins[stream.below(7) as usize] += 1;
        }
        assert!(bins.iter().all(|b| (1_850..2_150).contains(b)), "seed 5: {bins:?}");
        let n = 20_000;
        let normal: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let mean = normal.iter().sum::<f64>() / f64::from(n);
        let var = normal.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.05, "seed 5: {mean} {var}");
    }

    #[test]
    fn shuffle_permutes_and_choose_takes_each_equally_often() {
        let mut items: Vec<u32> = (0..50).collect();
        Stream::keyed(9, Purpose::Shuffle, &[0]).shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
        let mut counts = [0u32; 5];
        for round in 0..5_000 {
            let mut items = [0usize, 1, 2, 3, 4];
            let taken = Stream::keyed(9, Purpose::ClipCov, &[round]).choose(&mut items, 2);
            assert_eq!(taken, 2);
            items[..2].iter().for_each(|i| counts[*i] += 1);
        }
        assert!(counts.iter().all(|c| (1_850..2_150).contains(c)), "seed 9: {counts:?}");
        assert_eq!(Stream::keyed(0, Purpose::ClipCov, &[]).choose(&mut [1, 2], 9), 2);
    }
}
