//! The definition of selections in `f64`: all scores, sorted.

use std::ops::Range;

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::input::{Dims, Lengths};
use crate::keys::{Layout, Per};
use crate::select::{Pick, Reduce, Rule, Scheme};

/// What is chosen of a row of scores, ascending, and what is in doubt.
///
/// All that is not forced and is a number is sorted, by falling score and, among
/// equal ones, rising index. Where there are fewer than `k`, NaN fills up.
pub(crate) fn chosen(pick: &Pick, scores: &[f64]) -> (Vec<usize>, Vec<usize>) {
    let between = pick.forced.between(scores.len());
    let mut ids: Vec<usize> = (0..scores.len()).filter(|i| !between.contains(i)).collect();
    let forced = ids.len();
    let left = |k: usize| if pick.forced.inside { k.saturating_sub(forced) } else { k };

    let mut sorted: Vec<usize> = between.filter(|&i| !scores[i].is_nan()).collect();
    sorted.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(a.cmp(&b)));
    let finite = sorted.iter().map(|&i| scores[i].abs()).filter(|x| x.is_finite());
    let tolerance = SELECTION_MARGIN * finite.fold(0.0, f64::max);
    // A score at which the choice ends, or may end.
    let mut ends = Vec::new();
    let count = match pick.rule {
        Rule::TopK(k) => {
            let k = left(k).min(sorted.len());
            if 0 < k && k < sorted.len() {
                ends.push(scores[sorted[k - 1]]);
            }
            k
        }
        Rule::TopP { mass, least, most } => {
            let (least, most) = (left(least), left(most).min(sorted.len()));
            let mut sum: f64 = if pick.forced.inside { ids.iter().map(|&i| scores[i]).sum() } else { 0.0 };
            let mut count = 0;
            while count < most && (count < least || sum < mass) {
                let next = scores[sorted[count]];
                // With an error in the sum the choice ends before, or after.
                if (sum - mass).abs() <= SELECTION_MARGIN || (sum + next - mass).abs() <= SELECTION_MARGIN {
                    ends.push(next);
                    ends.extend(sorted.get(count + 1).map(|&i| scores[i]));
                }
                sum += next;
                count += 1;
            }
            if 0 < count && count < sorted.len() {
                ends.push(scores[sorted[count - 1]]);
                if (sum - mass).abs() <= SELECTION_MARGIN {
                    ends.push(scores[sorted[count]]);
                }
            }
            count
        }
        Rule::Threshold(least) => {
            ends.push(f64::from(least));
            sorted.partition_point(|&i| scores[i] > f64::from(least))
        }
    };
    ids.extend(&sorted[..count]);
    if let Rule::TopK(k) = pick.rule {
        let nan = pick.forced.between(scores.len()).filter(|&i| scores[i].is_nan());
        ids.extend(nan.take(left(k) - count));
    }
    ids.sort_unstable();
    let near = |&i: &usize| ends.iter().any(|end| (scores[i] - end).abs() <= tolerance);
    let mut doubtful: Vec<usize> = sorted.iter().copied().filter(near).collect();
    doubtful.sort_unstable();
    (ids, doubtful)
}

/// The keys of the lists of a selection by definition, and what is in doubt.
/// `score(sequence, query head, query, keys of the candidate)` is that of the
/// mechanism, with rows counted along the arrays.
pub(crate) fn select(
    scheme: &Scheme,
    dims: &Dims,
    lengths: &Lengths<'_>,
    layout: &Layout,
    score: impl Fn(usize, usize, usize, Range<usize>) -> f64,
) -> (Vec<Vec<usize>>, Margins) {
    let mut lists = Vec::new();
    let mut margins = Margins::default();
    let group = layout.q_heads / layout.kv_heads.max(1);
    for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
        let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
        for list_head in 0..layout.heads() {
            let heads = match layout.per {
                Per::Head => list_head..list_head + 1,
                Per::Group => list_head * group..(list_head + 1) * group,
                Per::Sequence => 0..layout.q_heads,
            };
            for block in 0..layout.blocks() {
                let rows = (block * layout.q_block).min(queries)..((block + 1) * layout.q_block).min(queries);
                // Of each candidate the scores of the rows that see it.
                let mut seen: Vec<Vec<f64>> = Vec::new();
                let votes = scheme.reduce == Reduce::Votes;
                for head in heads.clone() {
                    let scored =
                        if votes { rows.end.max(rows.start + 1) - 1..rows.end } else { rows.clone() };
                    for row in scored {
                        let candidates = scheme.candidates(row, queries, keys);
                        // Products with the mean query are means of products.
                        let asked = if votes { rows.clone() } else { row..row + 1 };
                        let mut scores: Vec<f64> = (0..candidates)
                            .map(|c| {
                                let of = c * scheme.unit..((c + 1) * scheme.unit).min(keys);
                                let of = sequence.keys.start + of.start..sequence.keys.start + of.end;
                                let n = asked.len() as f64;
                                let of_row = |row: usize| {
                                    score(sequence.batch, head, sequence.queries.start + row, of.clone())
                                };
                                asked.clone().map(of_row).sum::<f64>() / n
                            })
                            .collect();
                        if let Some(scale) = scheme.shares {
                            softmax(&mut scores[scheme.sharing(candidates)], f64::from(scale));
                        }
                        seen.resize(seen.len().max(candidates), Vec::new());
                        seen.iter_mut().zip(scores).for_each(|(seen, score)| seen.push(score));
                    }
                }
                let most = |x: f64, y: f64| if y > x || y.is_nan() { y } else { x };
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|x| match scheme.reduce {
                        Reduce::Max => x.iter().copied().fold(f64::NEG_INFINITY, most),
                        Reduce::Sum | Reduce::Votes => x.iter().sum(),
                        Reduce::Mean => x.iter().sum::<f64>() / (heads.len() * rows.len()) as f64,
                    })
                    .collect();
                let (ids, doubtful) = chosen(&scheme.pick, &scores);
                let keys_of = |c: &usize| c * scheme.unit..((c + 1) * scheme.unit).min(keys);
                lists.push(ids);
                margins.doubtful.push(doubtful.iter().map(keys_of).collect());
            }
        }
    }
    (lists, margins)
}

/// `exp(scale x_i) / sum_j exp(scale x_j)`
fn softmax(x: &mut [f64], scale: f64) {
    let max = x
        .iter()
        .copied()
        .fold(f64::NEG_INFINITY, |a, b| if a.is_nan() || a > scale * b { a } else { scale * b });
    x.iter_mut().for_each(|x| *x = (scale * *x - max).exp());
    let sum: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}
