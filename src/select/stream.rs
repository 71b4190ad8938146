//! Streams: the best of all that came so far, while more comes.

use super::pick::order;

/// Of equal scores, which are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ties {
    /// Those of the lower index.
    Oldest,
    /// Those of the higher index.
    Newest,
}

/// For each score the number of scores after which it is no longer among the
/// `most` highest of those that have come: its own index where it never is, as NaN,
/// `u32::MAX` where it still is in the end. `heap` holds `most` elements, or as many
/// as there are scores.
///
/// Between two steps the highest change by one that comes and one that goes, and
/// what is gone does not come back: `log most` comparisons each.
pub(crate) fn until(scores: &[f32], most: usize, ties: Ties, heap: &mut [u64], until: &mut [u32]) {
    until.fill(u32::MAX);
    let index = |key: u64| if ties == Ties::Oldest { !(key as u32) } else { key as u32 };
    let mut held = 0;
    for (i, &score) in scores.iter().enumerate() {
        let low = if ties == Ties::Oldest { !(i as u32) } else { i as u32 };
        let key = u64::from(order(score)) << 32 | u64::from(low);
        if score.is_nan() {
            until[i] = i as u32;
        } else if held < most {
            heap[held] = key;
            let mut at = held;
            held += 1;
            while at > 0 && heap[at] < heap[(at - 1) / 2] {
                heap.swap(at, (at - 1) / 2);
                at = (at - 1) / 2;
            }
        } else if most == 0 || key < heap[0] {
            until[i] = i as u32;
        } else {
            until[index(heap[0]) as usize] = i as u32;
            heap[0] = key;
            let mut at = 0;
            loop {
                let children = 2 * at + 1..(2 * at + 3).min(most);
                let Some(least) = children.min_by_key(|&child| heap[child]) else { break };
                if heap[at] < heap[least] {
                    break;
                }
                heap.swap(at, least);
                at = least;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::select::chosen;
    use crate::select::{Forced, Pick, Rule};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn each_prefix_keeps_what_a_full_sort_chooses(
            scores in proptest::collection::vec(-4i8..5, 0..60), most in 0usize..70, newest in any::<bool>(),
        ) {
            let scores: Vec<f32> = scores.iter().map(|&x| if x == 4 { f32::NAN } else { f32::from(x) }).collect();
            let (n, ties) = (scores.len(), if newest { Ties::Newest } else { Ties::Oldest });
            let mut ends = vec![0; n];
            until(&scores, most, ties, &mut vec![0; most.min(n)], &mut ends);
            for end in 1..=n {
                let mut prefix: Vec<f64> = scores[..end].iter().map(|&x| f64::from(x)).collect();
                if newest {
                    prefix.reverse();
                }
                let pick = Pick { rule: Rule::TopK(most), forced: Forced::default() };
                let mut want = chosen(&pick, &prefix).0;
                if newest {
                    want = want.iter().rev().map(|i| end - 1 - i).collect();
                }
                let got: Vec<usize> = (0..end).filter(|&j| ends[j] as usize >= end).collect();
                prop_assert_eq!(got, want);
            }
        }
    }
}
