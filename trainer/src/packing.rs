//! Cuts a mini-batch into micro-batches of a bounded number of rows, without padding.
//!
//! Deterministic; the gradient does not depend on the cut (see [`crate::agg`]). Neighbours that begin
//! with the same prompt, the samples of a group, share its rows, and stay together as long as the whole
//! group fits into the budget. A larger group is cut into runs that each carry the prompt once.

use std::ops::Range;

use crate::learner::{Packed, families, family_rows};

/// The sequences of each micro-batch: runs of neighbours, in their order.
///
/// The budget is in rows of a pass: a prompt's tokens once for all of its sequences in a micro-batch,
/// and the tokens behind it, but for the last one, which is not run. A sequence that is longer gets a
/// micro-batch of its own.
///
/// ```
/// use trainer::Packed;
/// use trainer::packing::pack;
/// let sequence = |tokens| Packed { tokens, prompt_len: 2 };
/// // 2 shared and 1 + 2 own rows; 4 rows.
/// let sequences = [sequence(&[7, 8, 1, 2][..]), sequence(&[7, 8, 3, 4, 5]), sequence(&[9; 5])];
/// assert_eq!(pack(&sequences, 5), [0..2, 2..3]);
/// assert_eq!(pack(&sequences, 9), [0..3]);
/// assert_eq!(pack(&sequences, 4), [0..1, 1..2, 2..3]);
/// ```
pub fn pack(sequences: &[Packed<'_>], budget: usize) -> Vec<Range<usize>> {
    let (mut passes, mut rows): (Vec<Range<usize>>, usize) = (Vec::new(), 0);
    for unit in units(sequences, budget) {
        match passes.last_mut() {
            Some(pass) if rows + unit.rows <= budget => {
                pass.end = unit.members.end;
                rows += unit.rows;
            }
            _ => {
                passes.push(unit.members);
                rows = unit.rows;
            }
        }
    }
    passes
}

/// Neighbours that stay together.
struct Unit {
    rows: usize,
    members: Range<usize>,
}

/// Groups that fit as one unit each, the others as runs that fit.
fn units(sequences: &[Packed<'_>], budget: usize) -> Vec<Unit> {
    let (mut out, mut first) = (Vec::new(), 0);
    for mut rest in families(sequences) {
        while !rest.is_empty() {
            let fits = |len: &usize| family_rows(&rest[..*len]) <= budget;
            let len = 1 + (2..=rest.len()).take_while(fits).count();
            let (run, later) = rest.split_at(len);
            out.push(Unit { rows: family_rows(run), members: first..first + len });
            (first, rest) = (first + len, later);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sequences of (group, length of the prompt, length of the response).
    fn tokens(lens: &[(u32, usize, usize)]) -> Vec<(Vec<u32>, usize)> {
        let one = |(group, prompt, response): &(u32, usize, usize)| {
            ([vec![*group; *prompt], vec![1000; *response]].concat(), *prompt)
        };
        lens.iter().map(one).collect()
    }

    fn packed(tokens: &[(Vec<u32>, usize)]) -> Vec<Packed<'_>> {
        tokens.iter().map(|(tokens, len)| Packed { tokens, prompt_len: *len }).collect()
    }

    fn cut(lens: &[(u32, usize, usize)], budget: usize) -> Vec<Range<usize>> {
        pack(&packed(&tokens(lens)), budget)
    }

    #[test]
    fn too_long_sequences_stand_alone_and_groups_are_split_only_then() {
        let lens = [(0, 2, 3), (0, 2, 3), (1, 9, 12), (2, 1, 2), (2, 1, 2), (2, 1, 2)];
        assert_eq!(cut(&lens, 6), [0..2, 2..3, 3..6]);
        let lens = [(0, 3, 4), (0, 3, 4), (0, 3, 4), (1, 2, 2)];
        assert_eq!(cut(&lens, 9), [0..2, 2..4]);
        assert!(cut(&[], 10).is_empty());
    }

    #[test]
    fn a_group_too_large_is_cut_into_runs_with_the_prompt_once_each() {
        // 100 rows of prompt, 9 of each response.
        let lens = [(0, 100, 10); 8];
        assert_eq!(cut(&lens, 130), [0..3, 3..6, 6..8]);
        assert_eq!(cut(&lens, 172).len(), 1);
        // Nothing fits, nor does the prompt alone.
        assert_eq!(cut(&lens[..2], 50), [0..1, 1..2]);
    }

    #[test]
    fn empty_and_short_responses_are_counted_as_they_pass() {
        let rows = |lens: &[(u32, usize, usize)]| family_rows(&packed(&tokens(lens)));
        assert_eq!([rows(&[(0, 5, 0)]), rows(&[(0, 5, 1)]), rows(&[(0, 5, 3)])], [4, 5, 7]);
        assert_eq!(rows(&[(0, 5, 0), (0, 5, 0)]), 5);
        assert_eq!(rows(&[(0, 5, 1), (0, 5, 0), (0, 5, 3)]), 7);
    }

    proptest! {
        #[test]
        fn every_sequence_is_packed_once_within_the_budget(
            lens in prop::collection::vec(0usize..40, 0..60),
            prompts in prop::collection::vec(1usize..30, 60),
            size in 1usize..7,
            budget in 1usize..90,
        ) {
            let groups = lens.iter().enumerate().map(|(i, len)| (i / size, *len));
            let lens: Vec<_> = groups.map(|(g, len)| (g as u32, prompts[g], len)).collect();
            let tokens = tokens(&lens);
            let sequences = packed(&tokens);
            let passes = pack(&sequences, budget);
            let mut end = 0;
            for pass in &passes {
                prop_assert_eq!(pass.start, end);
                end = pass.end;
                let rows: usize = families(&sequences[pass.clone()]).map(family_rows).sum();
                prop_assert!(rows <= budget || pass.len() == 1);
            }
            prop_assert_eq!(end, lens.len());
            for group in lens.chunk_by(|a, b| a.0 == b.0) {
                let first = group[0].0 as usize * size;
                let members = first..first + group.len();
                let holders =
                    passes.iter().filter(|p| p.start < members.end && members.start < p.end);
                let whole = family_rows(&sequences[members.clone()]) <= budget;
                prop_assert!(!whole || holders.count() == 1);
            }
        }
    }
}
