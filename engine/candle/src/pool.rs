//! Paged keys and values as candle tensors: per layer two pools of `num_blocks * block_size` slots.
//!
//! New rows are written in place, run of slots by run of slots; a sequence reads its rows back with one
//! gather over its block table. Which blocks belong to whom is the scheduler's business.

use candle_core::{DType, Device, Result, Tensor};
use engine::ModelConfig;

/// The memory: `[slots, kv_heads, d]` for keys and for values of each layer.
pub(crate) struct KvPool {
    layers: Vec<[Tensor; 2]>,
    block_size: usize,
}

/// Where a pass finds the keys and values of its sequence.
pub(crate) enum Kv<'a> {
    /// All positions are in this very pass.
    Whole,
    /// In the pool.
    Paged(Pages<'a>),
}

/// The slots of one pass over one sequence.
pub(crate) struct Pages<'a> {
    pool: &'a KvPool,
    /// Slots of the new rows.
    new: Vec<u32>,
    /// `[t]`: slots of all positions up to the last new one.
    all: Tensor,
}

impl KvPool {
    pub(crate) fn new(
        config: &ModelConfig,
        (dtype, device): (DType, &Device),
        (num_blocks, block_size): (usize, usize),
    ) -> Result<Self> {
        let shape = (num_blocks * block_size, config.kv_heads, config.head_dim);
        let pool = || Tensor::zeros(shape, dtype, device);
        let layers = (0..config.layers).map(|_| Ok([pool()?, pool()?])).collect::<Result<_>>()?;
        Ok(Self { layers, block_size })
    }

    /// Bytes of a block in all layers.
    pub(crate) fn block_bytes(config: &ModelConfig, dtype: DType, block_size: usize) -> u64 {
        let numbers = 2 * config.layers * block_size * config.kv_heads * config.head_dim;
        (numbers * dtype.size_in_bytes()) as u64
    }

    /// The pages of positions `start..end` of the sequence that holds `blocks`.
    pub(crate) fn pages(
        &self,
        blocks: &[u32],
        (start, end): (usize, usize),
        device: &Device,
    ) -> Result<Kv<'_>> {
        let slot =
            |p: usize| blocks[p / self.block_size] as usize * self.block_size + p % self.block_size;
        let all: Vec<u32> = (0..end).map(|p| slot(p) as u32).collect();
        let new = all[start..].to_vec();
        Ok(Kv::Paged(Pages { pool: self, new, all: Tensor::from_vec(all, end, device)? }))
    }
}

impl Kv<'_> {
    /// Takes in the keys and values of the new rows, `[n, kv_heads, d]`, and returns those of all
    /// positions, `[t, kv_heads, d]`.
    pub(crate) fn exchange(
        &self,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Whole => Ok((k.clone(), v.clone())),
            Self::Paged(pages) => {
                let [keys, values] = &pages.pool.layers[layer];
                Ok((pages.exchange(keys, k)?, pages.exchange(values, v)?))
            }
        }
    }
}

impl Pages<'_> {
    fn exchange(&self, pool: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let rows = rows.contiguous()?;
        for (first, len) in runs(&self.new) {
            pool.slice_set(&rows.narrow(0, first, len)?, 0, self.new[first] as usize)?;
        }
        pool.index_select(&self.all, 0)
    }
}

/// Cuts `slots` into runs of successive ones, as (index of the first, length).
fn runs(slots: &[u32]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (i, slot) in slots.iter().enumerate() {
        match runs.last_mut() {
            Some((first, len)) if *slot == slots[*first] + *len as u32 => *len += 1,
            _ => runs.push((i, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_are_maximal_and_cover_everything() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[5]), [(0, 1)]);
        assert_eq!(runs(&[14, 15, 48, 49, 50, 16, 17]), [(0, 2), (2, 3), (5, 2)]);
        assert_eq!(runs(&[3, 2, 1]), [(0, 1), (1, 1), (2, 1)]);
    }
}
