//! Forward and backward over packed sequences: from tokens to log-probabilities, and from their
//! derivatives to gradients.
//!
//! Sequences lie one after the other without padding. Neighbours that begin with the same prompt form
//! a family, whose prompt is run once: first its rows, then each sequence's own.
//!
//! ```text
//! sequences   [p p p a b c] [p p p d e] [q q r]     p and q: prompts; the last token is not run
//! rows         p p p a b d q q
//! targets      from rows p a b, p d, q: the last row of a prompt once for each of its sequences
//! ```
//!
//! Keys and values go through the same paged kernels as in a rollout, over one layer's worth of blocks
//! in plain order, so a log-probability here has the bits of the rollout's. A sequence reads the
//! blocks that its prompt fills where the prompt put them; the beginning of the next block it has as a
//! copy in front of its own positions.

use std::ops::Range;

use engine::decoder::{
    Batch, Decoder, Gradients, HeadGradient, HeadInput, Keep, KvLayers, PackedPass, Tape,
};
use kernels::{AttnFamily, AttnSeq, Dtype, HeadScratch, Kernels, KvCache, TokenStats};

use crate::packing::pack;

/// Tokens of a block of the packed pass's KV memory.
const BLOCK_SIZE: usize = 16;

/// One sequence to learn from: its tokens, of which those from `prompt_len` on are targets.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Prompt, then response; at least `prompt_len` tokens.
    pub tokens: &'a [u32],
    /// Tokens that are given; at least 1.
    pub prompt_len: usize,
}

impl Packed<'_> {
    /// Tokens whose log-probability is asked for.
    pub fn targets(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Rows it takes in a forward pass of its own: nothing follows the last token, so it is not run.
    pub fn rows(&self) -> usize {
        self.tokens.len() - 1
    }

    fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }
}

/// The families of a pass: runs of neighbours with one prompt.
pub(crate) fn families<'s, 'a>(
    sequences: &'s [Packed<'a>],
) -> impl Iterator<Item = &'s [Packed<'a>]> {
    sequences.chunk_by(|a, b| a.prompt() == b.prompt())
}

/// Rows of a family that all its sequences share: the prompt's, or all rows of a single sequence.
fn shared_rows(family: &[Packed<'_>]) -> usize {
    match family {
        [alone] => alone.rows(),
        _ => family[0].prompt_len,
    }
}

/// Rows that a family takes in a forward pass.
pub(crate) fn family_rows(family: &[Packed<'_>]) -> usize {
    let shared = shared_rows(family);
    shared + family.iter().map(|sequence| sequence.rows().saturating_sub(shared)).sum::<usize>()
}

/// Buffers of packed passes, for one model.
pub struct Learner {
    dtype: Dtype,
    tape: Tape,
    kv: Option<(KvCache, usize)>,
    head: HeadInput,
    scratch: HeadScratch,
    layout: Layout,
}

/// Where everything lies in a packed pass of `M` rows with `R` targets.
#[derive(Default)]
struct Layout {
    /// `[M]`.
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    /// Slots that are copied to another after they are written.
    copies: Vec<(u32, u32)>,
    /// Rows that follow each other in position: each family's shared ones, then those of its branches.
    pieces: Vec<Range<usize>>,
    /// The position of the first row of each piece.
    starts: Vec<usize>,
    /// The blocks of each piece's positions from 0 on, as ranges of `blocks`.
    tables: Vec<Range<usize>>,
    blocks: Vec<u32>,
    /// How many blocks there are.
    num_blocks: usize,
    /// The pieces of each family.
    families: Vec<Range<usize>>,
    /// `[R]` rows whose next token is a target, and those tokens.
    rows: Vec<usize>,
    targets: Vec<u32>,
}

impl Layout {
    fn fill(&mut self, sequences: &[Packed<'_>]) {
        *self = Self::default();
        for family in families(sequences) {
            self.add_family(family);
        }
    }

    fn add_family(&mut self, family: &[Packed<'_>]) {
        let (first_piece, first_row) = (self.pieces.len(), self.tokens.len());
        let shared = shared_rows(family);
        self.add_piece(&family[0].tokens[..shared], 0, 0..0);
        let table = self.tables[first_piece].clone();
        for sequence in family {
            let end = shared.min(sequence.rows());
            self.rows.extend(first_row + sequence.prompt_len - 1..first_row + end);
            if sequence.rows() > shared {
                let own_row = self.tokens.len();
                let own = &sequence.tokens[shared..sequence.rows()];
                self.add_piece(own, shared, table.clone());
                self.rows.extend(own_row..self.tokens.len());
            }
            self.targets.extend_from_slice(&sequence.tokens[sequence.prompt_len..]);
        }
        self.families.push(first_piece..self.pieces.len());
    }

    /// Appends rows for `tokens` from position `start` on; the positions before are in the blocks that
    /// the range `before` of `blocks` names.
    fn add_piece(&mut self, tokens: &[u32], start: usize, before: Range<usize>) {
        let (first_row, end) = (self.tokens.len(), start + tokens.len());
        let (whole, part) = (start / BLOCK_SIZE, start % BLOCK_SIZE);
        let first_entry = self.blocks.len();
        let partial = before.start + whole;
        self.blocks.extend_from_within(before.start..partial);
        let first_block = self.num_blocks;
        self.num_blocks += end.div_ceil(BLOCK_SIZE) - whole;
        self.blocks.extend((first_block..self.num_blocks).map(|block| block as u32));
        self.tables.push(first_entry..self.blocks.len());
        let first_slot = first_block * BLOCK_SIZE;
        let copy = |i: usize| {
            (self.blocks[partial] * BLOCK_SIZE as u32 + i as u32, (first_slot + i) as u32)
        };
        self.copies.extend((0..part).map(copy));
        self.slots.extend((first_slot + part..).take(tokens.len()).map(|slot| slot as u32));
        self.positions.extend((start..end).map(|position| position as u32));
        self.tokens.extend_from_slice(tokens);
        self.pieces.push(first_row..self.tokens.len());
        self.starts.push(start);
    }

    /// The rows of the pass, whose sequences are `seqs`.
    fn batch<'a>(&'a self, seqs: &'a [AttnSeq<'a>]) -> Batch<'a> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            slots: &self.slots,
            copies: &self.copies,
            seqs,
        }
    }

    /// What attention sees in a forward pass.
    fn seqs(&self) -> Vec<AttnSeq<'_>> {
        let places = self.starts.iter().zip(&self.tables);
        self.pieces
            .iter()
            .zip(places)
            .map(|(rows, (start, table))| AttnSeq {
                first_row: rows.start,
                rows: rows.len(),
                start: *start,
                blocks: &self.blocks[table.clone()],
            })
            .collect()
    }

    /// What attention sees in a backward pass.
    fn families(&self) -> Vec<AttnFamily<'_>> {
        let family = |pieces: &Range<usize>| AttnFamily {
            prompt: self.pieces[pieces.start].clone(),
            branches: &self.pieces[pieces.start + 1..pieces.end],
        };
        self.families.iter().map(family).collect()
    }
}

impl Learner {
    /// A learner that can run backward (`Keep::AllLayers`, or with less memory `Keep::Inputs`) or forward
    /// only.
    pub fn new(decoder: &Decoder, keep: Keep) -> Self {
        let dtype = decoder.weights.dtype();
        Self {
            dtype,
            tape: Tape::new(&decoder.config, dtype, keep),
            kv: None,
            head: HeadInput::new(dtype),
            scratch: HeadScratch::default(),
            layout: Layout::default(),
        }
    }

    /// Log-probability, entropy and log-sum-exp of every target of `sequences`, in their order, with
    /// logits divided by the temperature.
    ///
    /// # Panics
    /// When a sequence has no prompt token.
    pub fn forward(
        &mut self,
        decoder: &Decoder,
        kernels: &Kernels,
        sequences: &[Packed<'_>],
        inv_temperature: f32,
    ) -> Vec<TokenStats> {
        self.layout.fill(sequences);
        self.run_layers(decoder, kernels);
        let layout = &self.layout;
        decoder.head_input(kernels, &self.tape, &layout.rows, &mut self.head);
        let mut stats = vec![TokenStats::default(); layout.targets.len()];
        let (input, head) = (&self.head.input, decoder.weights.head());
        let scratch = &mut self.scratch;
        kernels.head_stats(input, head, &layout.targets, inv_temperature, &mut stats, scratch);
        stats
    }

    /// The same in passes of at most `budget` rows, a sequence that is longer alone.
    ///
    /// # Panics
    /// When a sequence has no prompt token.
    pub fn forward_all(
        &mut self,
        (decoder, kernels): (&Decoder, &Kernels),
        sequences: &[Packed<'_>],
        (budget, inv_temperature): (usize, f32),
    ) -> Vec<TokenStats> {
        pack(sequences, budget)
            .into_iter()
            .flat_map(|pass| self.forward(decoder, kernels, &sequences[pass], inv_temperature))
            .collect()
    }

    fn run_layers(&mut self, decoder: &Decoder, kernels: &Kernels) {
        let layout = &self.layout;
        let blocks = layout.num_blocks.max(1);
        if self.kv.as_ref().is_none_or(|(_, have)| *have < blocks) {
            let (kv_heads, head_dim) = (decoder.config.kv_heads, decoder.config.head_dim);
            let cache = KvCache::new(self.dtype, 1, blocks, BLOCK_SIZE, kv_heads, head_dim);
            self.kv = Some((cache, blocks));
        }
        let (kv, _) = self.kv.as_mut().expect("made above");
        let seqs = layout.seqs();
        decoder.forward(kernels, &layout.batch(&seqs), (kv, KvLayers::Shared), &mut self.tape);
    }

    /// Adds to `grads` the gradient of a loss whose derivatives by the targets' log-probabilities (and
    /// entropies) of the last [`Learner::forward`] are `dlogp` (and `dentropy`).
    ///
    /// # Panics
    /// When the last forward pass kept no layers, or lengths differ from its targets.
    pub fn backward(
        &mut self,
        decoder: &Decoder,
        kernels: &Kernels,
        loss: &LossGradient<'_>,
        grads: &mut Gradients,
    ) {
        let layout = &self.layout;
        let head = HeadGradient {
            rows: &layout.rows,
            input: &self.head,
            targets: &layout.targets,
            inv_temperature: loss.inv_temperature,
            stats: loss.stats,
            dlogp: loss.dlogp,
            dentropy: loss.dentropy,
        };
        let (kv, _) = self.kv.as_mut().expect("made by the forward pass");
        let (seqs, families) = (layout.seqs(), layout.families());
        let pass = PackedPass { batch: &layout.batch(&seqs), families: &families, kv };
        decoder.backward(kernels, pass, &head, &mut self.tape, grads);
    }
}

/// What a loss wants of the targets of a forward pass; all of the length of its targets.
pub struct LossGradient<'a> {
    /// What [`Learner::forward`] returned.
    pub stats: &'a [TokenStats],
    /// The temperature that was used there, inverted.
    pub inv_temperature: f32,
    /// Derivative of the loss by each log-probability.
    pub dlogp: &'a [f32],
    /// Derivative of the loss by each entropy, if it depends on them.
    pub dentropy: Option<&'a [f32]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(tokens: &[u32], prompt_len: usize) -> Packed<'_> {
        Packed { tokens, prompt_len }
    }

    #[test]
    fn a_prompt_lies_once_before_the_rows_of_its_sequences() {
        let mut layout = Layout::default();
        layout.fill(&[
            packed(&[5, 6, 7, 1, 2, 3], 3),
            packed(&[5, 6, 7, 4], 3),
            packed(&[5, 6, 7, 8, 9], 3),
            packed(&[5, 6, 4], 2),
        ]);
        assert_eq!(layout.tokens, [5, 6, 7, 1, 2, 8, 5, 6]);
        assert_eq!(layout.positions, [0, 1, 2, 3, 4, 3, 0, 1]);
        assert_eq!(layout.slots, [0, 1, 2, 19, 20, 35, 48, 49]);
        let copies = [(0, 16), (1, 17), (2, 18), (0, 32), (1, 33), (2, 34)];
        assert_eq!((layout.copies, layout.num_blocks), (copies.to_vec(), 4));
        assert_eq!(layout.rows, [2, 3, 4, 2, 2, 5, 7]);
        assert_eq!(layout.targets, [1, 2, 3, 4, 8, 9, 4]);
        assert_eq!(layout.pieces, [0..3, 3..5, 5..6, 6..8]);
        assert_eq!(layout.families, [0..3, 3..4]);
    }

    #[test]
    fn whole_blocks_of_a_prompt_are_read_where_they_lie() {
        let [a, b] = [17, 18].map(|len| [vec![1; 33], vec![3; len]].concat());
        let mut layout = Layout::default();
        layout.fill(&[packed(&a, 33), packed(&b, 33)]);
        let tables: Vec<&[u32]> = layout.seqs().iter().map(|seq| seq.blocks).collect();
        assert_eq!(tables, [&[0, 1, 2][..], &[0, 1, 3, 4], &[0, 1, 5, 6]]);
        assert_eq!(layout.copies, [(32, 48), (32, 80)]);
        assert_eq!((layout.slots[33], layout.slots[33 + 16]), (49, 81));
    }

    #[test]
    fn sequences_without_own_rows_have_no_branch() {
        let mut layout = Layout::default();
        layout.fill(&[packed(&[5, 6], 2), packed(&[5, 6], 2), packed(&[5, 6, 7], 2)]);
        assert_eq!((&layout.tokens[..], &layout.rows[..]), (&[5, 6][..], &[1][..]));
        assert_eq!((layout.targets.len(), layout.families()[0].branches.len()), (1, 0));
        layout.fill(&[packed(&[5, 6], 2), packed(&[5], 1)]);
        assert_eq!((&layout.tokens[..], layout.rows.len()), (&[5][..], 0));
    }
}
