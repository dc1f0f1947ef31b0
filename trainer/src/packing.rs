//! Cuts a mini-batch into micro-batches of a bounded number of tokens, without padding.
//!
//! Deterministic; the gradient does not depend on the cut (see [`crate::agg`]). The samples of a
//! prompt stay together as long as the whole group fits into the budget.

/// In which order units are put into micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As given: each micro-batch is a run of neighbours.
    Given,
    /// First fit, longest first: usually fewer micro-batches.
    LongestFirst,
}

/// The sequences (indices into `lengths`, ascending) of each micro-batch.
///
/// `lengths` are in tokens; `groups[i]` names the group of sequence `i`; neighbours of one group are
/// kept together if they fit. A sequence longer than `budget` gets a micro-batch of its own.
///
/// # Panics
/// If the slices differ in length.
///
/// ```
/// use trainer::packing::{Order, pack};
/// assert_eq!(pack(&[3, 3, 4], &[0, 0, 1], 6, Order::Given), [vec![0, 1], vec![2]]);
/// ```
pub fn pack(lengths: &[usize], groups: &[usize], budget: usize, order: Order) -> Vec<Vec<usize>> {
    assert_eq!(lengths.len(), groups.len(), "each sequence needs a group");
    let mut units = units(lengths, groups, budget);
    if order == Order::LongestFirst {
        units.sort_by_key(|unit| std::cmp::Reverse(unit.tokens));
    }
    let mut bins: Vec<Unit> = Vec::new();
    for unit in units {
        let candidates = match order {
            Order::Given => bins.len().saturating_sub(1)..bins.len(),
            Order::LongestFirst => 0..bins.len(),
        };
        match bins[candidates].iter_mut().find(|bin| bin.tokens + unit.tokens <= budget) {
            Some(bin) => {
                bin.tokens += unit.tokens;
                bin.members.extend(unit.members);
            }
            None => bins.push(unit),
        }
    }
    bins.iter_mut().for_each(|bin| bin.members.sort_unstable());
    bins.into_iter().map(|bin| bin.members).collect()
}

struct Unit {
    tokens: usize,
    members: Vec<usize>,
}

/// Groups that fit as one unit each, the sequences of the others one by one.
fn units(lengths: &[usize], groups: &[usize], budget: usize) -> Vec<Unit> {
    let all: Vec<usize> = (0..lengths.len()).collect();
    let mut out = Vec::new();
    for group in all.chunk_by(|a, b| groups[*a] == groups[*b]) {
        let tokens = group.iter().map(|i| lengths[*i]).sum();
        if tokens <= budget {
            out.push(Unit { tokens, members: group.to_vec() });
        } else {
            out.extend(group.iter().map(|i| Unit { tokens: lengths[*i], members: vec![*i] }));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn too_long_sequences_stand_alone_and_groups_are_split_only_then() {
        let lengths = [5, 5, 20, 2, 2, 2];
        let groups = [0, 0, 1, 2, 2, 2];
        assert_eq!(pack(&lengths, &groups, 10, Order::Given), [vec![0, 1], vec![2], vec![3, 4, 5]]);
        let split = pack(&[6, 6, 6, 3], &[0, 0, 0, 1], 12, Order::LongestFirst);
        assert_eq!(split, [vec![0, 1], vec![2, 3]]);
        assert_eq!(pack(&[], &[], 10, Order::Given), Vec::<Vec<usize>>::new());
    }

    proptest! {
        #[test]
        fn every_sequence_is_packed_once_within_the_budget(
            lengths in prop::collection::vec(0usize..40, 0..60),
            size in 1usize..5,
            budget in 1usize..90,
            longest in any::<bool>(),
        ) {
            let groups: Vec<usize> = (0..lengths.len()).map(|i| i / size).collect();
            let order = if longest { Order::LongestFirst } else { Order::Given };
            let bins = pack(&lengths, &groups, budget, order);
            let mut seen: Vec<usize> = bins.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for bin in &bins {
                let tokens: usize = bin.iter().map(|i| lengths[*i]).sum();
                prop_assert!(tokens <= budget || bin.len() == 1);
                prop_assert!(bin.is_sorted());
            }
            if order == Order::Given {
                prop_assert!(bins.concat().is_sorted());
            }
        }
    }
}
