//! The definition of selections in `f64`: all scores, sorted.

use std::ops::Range;

use ndarray::{Array1, Array4, ArrayView1, ArrayView2, Axis, concatenate, s};

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::error::Result;
use crate::input::{Dims, Lengths, Sequence};
use crate::keys::{Layout, Per, TokenLists};
use crate::select::{Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored};

/// What picks choose of rows of scores, `[batch, heads, rows, keys]`: `pick` gives the row
/// of a query, and what is chosen of it.
pub(crate) fn lists_of_rows(
    layout: Layout,
    scores: &Array4<f64>,
    pick: impl Fn(usize) -> (usize, Pick),
) -> Result<(TokenLists, Margins)> {
    layout.lists()?;
    let (mut offsets, mut keys, mut margins) = (vec![0], Vec::new(), Margins::default());
    for (b, h) in (0..layout.sequences).flat_map(|b| (0..layout.heads()).map(move |h| (b, h))) {
        for (row, pick) in (0..layout.queries).map(&pick) {
            let (ids, doubtful) = chosen(&pick, &scores.slice(s![b, h, row, ..]).to_vec());
            margins.doubtful.push(doubtful.into_iter().map(|j| j..j + 1).collect());
            keys.extend(ids.into_iter().map(|j| j as u32));
            offsets.push(keys.len());
        }
    }
    Ok((TokenLists::from_keys(layout, &offsets, &keys)?, margins))
}

/// What is chosen of a row of scores, ascending, and what is in doubt.
///
/// All that is not forced and is a number is sorted, by falling score and, among
/// equal ones, rising index. Where there are fewer than `k`, that is all.
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
            let known = ids.iter().map(|&i| scores[i]).filter(|x| !x.is_nan());
            let mut sum: f64 = if pick.forced.inside { known.sum() } else { 0.0 };
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
    ids.sort_unstable();
    let near = |&i: &usize| ends.iter().any(|end| (scores[i] - end).abs() <= tolerance);
    let mut doubtful: Vec<usize> = sorted.iter().copied().filter(near).collect();
    doubtful.sort_unstable();
    (ids, doubtful)
}

/// The keys of the lists of a selection by definition, and what is in doubt.
/// `score(sequence, query head, query, keys of the candidate)` is that of the
/// mechanism, with rows counted along the arrays; that of a rectified score is
/// rectified and weighted.
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
                // Of whatever is scored the scores of the rows that see it, and
                // the keys that the last row sees.
                let mut seen: Vec<Vec<f64>> = Vec::new();
                let votes = scheme.reduce == Reduce::Votes;
                let mut visible = 0;
                for head in heads.clone() {
                    let scored =
                        if votes { rows.end.max(rows.start + 1) - 1..rows.end } else { rows.clone() };
                    for row in scored {
                        // Products with the mean query are means of products.
                        let asked = if votes { rows.clone() } else { row..row + 1 };
                        visible = if scheme.causal { (row + keys + 1).saturating_sub(queries) } else { keys };
                        visible = visible.min(keys);
                        let of = |of: Range<usize>| {
                            let of = sequence.keys.start + of.start..sequence.keys.start + of.end.min(keys);
                            let of_row = |row: usize| {
                                score(sequence.batch, head, sequence.queries.start + row, of.clone())
                            };
                            asked.clone().map(of_row).sum::<f64>() / asked.len() as f64
                        };
                        let of_pools = |width: usize, stride: usize| -> Vec<f64> {
                            let ends = (0..).map(|w| w * stride + width).take_while(|&end| end <= visible);
                            ends.map(|end| of(end - width..end)).collect()
                        };
                        let s = scheme.unit;
                        let mut scores: Vec<f64> = match scheme.scored {
                            Scored::Begun => {
                                (0..visible.div_ceil(s)).map(|c| of(c * s..(c + 1) * s)).collect()
                            }
                            Scored::Whole => of_pools(s, s),
                            Scored::Pools(pools) => of_pools(pools.width, pools.stride),
                        };
                        if let Some(scale) = scheme.shares.map(f64::from) {
                            match scheme.scored {
                                Scored::Pools(Pools { coarse: Some([width, stride]), .. }) => {
                                    let coarse = of_pools(width, stride);
                                    let most = coarse.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                                    let sum: f64 = coarse.iter().map(|x| (scale * (x - most)).exp()).sum();
                                    let against = |x: &mut f64| *x = (scale * (*x - most)).exp() / sum;
                                    scores.iter_mut().for_each(against);
                                    if coarse.is_empty() {
                                        scores.fill(0.0);
                                    }
                                }
                                _ => {
                                    let among = scheme.sharing(scores.len());
                                    softmax(&mut scores[among], scale);
                                }
                            }
                        }
                        seen.resize(seen.len().max(scores.len()), Vec::new());
                        seen.iter_mut().zip(scores).for_each(|(seen, score)| seen.push(score));
                    }
                }
                let most = |x: f64, y: f64| if y > x || y.is_nan() { y } else { x };
                let mut scores: Vec<f64> = seen
                    .iter()
                    .map(|x| match scheme.reduce {
                        Reduce::Max => x.iter().copied().fold(f64::NEG_INFINITY, most),
                        Reduce::Sum | Reduce::Votes | Reduce::Rectified | Reduce::RectifiedCodes => {
                            x.iter().sum()
                        }
                        Reduce::Mean => x.iter().sum::<f64>() / (heads.len() * rows.len()) as f64,
                    })
                    .collect();
                if let Scored::Pools(Pools { width, stride, fold, .. }) = scheme.scored {
                    let candidate = |c: usize| {
                        let own = c * scheme.unit..(c + 1) * scheme.unit;
                        let shared = |w: usize| {
                            let keys = (w * stride..w * stride + width).filter(|j| own.contains(j));
                            keys.count() / stride
                        };
                        let pools = scores.iter().enumerate().filter(|(w, _)| shared(*w) > 0);
                        match fold {
                            Fold::Max => pools.map(|(_, &x)| x).reduce(most).unwrap_or(0.0),
                            Fold::Sum => pools.map(|(w, &x)| shared(w) as f64 * x).sum(),
                        }
                    };
                    scores = (0..visible.div_ceil(scheme.unit)).map(candidate).collect();
                }
                let (mut ids, mut doubtful) = chosen(&scheme.pick, &scores);
                if matches!(scheme.scored, Scored::Pools(pools) if visible < pools.dense) {
                    (ids, doubtful) = ((0..scores.len()).collect(), Vec::new());
                }
                if scheme.scored == Scored::Whole && visible % scheme.unit > 0 {
                    ids.push(visible / scheme.unit);
                }
                let keys_of = |c: &usize| c * scheme.unit..((c + 1) * scheme.unit).min(keys);
                lists.push(ids);
                margins.doubtful.push(doubtful.iter().map(keys_of).collect());
            }
        }
    }
    (lists, margins)
}

/// [`select`] where a row stands for what is scored: `score` is told its number, counted in
/// the sequence as candidates are, and the entry, head and row of the query.
pub(crate) fn select_numbered(
    scheme: &Scheme,
    dims: &Dims,
    lengths: &Lengths<'_>,
    layout: &Layout,
    score: impl Fn(&Sequence, [usize; 3], usize) -> f64,
) -> (Vec<Vec<usize>>, Margins) {
    // Keys of packed sequences count one after the other.
    let places: Vec<Sequence> = (0..dims.batch).map(|i| lengths.sequence(dims, i)).collect();
    select(scheme, dims, lengths, layout, |b, h, i, keys| {
        let of = |s: &&Sequence| s.batch == b && s.queries.contains(&i);
        let Some(of) = places.iter().find(of) else { return f64::NAN };
        score(of, [b, h, i], (keys.start - of.keys.start) / scheme.cell())
    })
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

/// The softmax of scores.
pub(crate) fn weights(mut scores: Vec<f64>) -> Vec<f64> {
    softmax(&mut scores, 1.0);
    scores
}

/// The means of blocks of `size` rows.
pub(crate) fn means(x: ArrayView2<'_, f64>, size: usize) -> Vec<Array1<f64>> {
    x.axis_chunks_iter(Axis(0), size).map(|x| x.sum_axis(Axis(0)) / x.nrows() as f64).collect()
}

/// How many of the highest shares sum to at most `mass`.
pub(crate) fn within(shares: &[f64], mass: f64) -> usize {
    let mut sorted: Vec<f64> = shares.iter().copied().filter(|x| *x >= 0.0).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let sums = sorted.iter().scan(0.0, |sum, x| {
        *sum += x;
        Some(*sum)
    });
    sums.take_while(|&sum| sum <= mass).count()
}

/// The highest `count(0)` scores, and which are in doubt, where the count may be
/// any of those for an error of so much.
pub(crate) fn highest(scores: &[f64], forced: Forced, count: impl Fn(f64) -> usize) -> [Vec<bool>; 2] {
    let pick = |margin| Pick { rule: Rule::TopK(count(margin)), forced };
    let bits = |ids: &[usize]| {
        let mut bits = vec![false; scores.len()];
        ids.iter().for_each(|&i| bits[i] = true);
        bits
    };
    let (ids, doubt) = chosen(&pick(0.0), scores);
    let (ids, mut doubt) = (bits(&ids), bits(&doubt));
    for margin in [-SELECTION_MARGIN, SELECTION_MARGIN] {
        let (others, more) = chosen(&pick(margin), scores);
        let (others, more) = (bits(&others), bits(&more));
        for (i, doubt) in doubt.iter_mut().enumerate() {
            *doubt |= more[i] || ids[i] != others[i];
        }
    }
    [ids, doubt]
}

/// The maxima and the minima of the channels of blocks of `size` rows; NaN where
/// there is one.
fn extremes(x: ArrayView2<'_, f64>, size: usize) -> Vec<[Array1<f64>; 2]> {
    let fold = |x: ArrayView1<'_, f64>, further: fn(f64, f64) -> bool| {
        let first = x.iter().copied();
        first.reduce(|a, b| if further(b, a) || b.is_nan() { b } else { a }).unwrap_or(f64::NAN)
    };
    let rows = x.axis_chunks_iter(Axis(0), size);
    rows.map(|x| [|b, a| b > a, |b, a| b < a].map(|further| x.map_axis(Axis(0), |x| fold(x, further))))
        .collect()
}

/// A row whose channels `c` and `c + dim / 2` are rotated by `position *
/// theta^(-2 c / dim)`.
pub(crate) fn rotated(mut x: Array1<f64>, position: usize, theta: f64) -> Array1<f64> {
    let half = x.len() / 2;
    for c in 0..half {
        let angle = position as f64 * theta.powf(-2.0 * c as f64 / x.len() as f64);
        let (a, b) = (x[c], x[c + half]);
        x[c] = a * angle.cos() - b * angle.sin();
        x[c + half] = b * angle.cos() + a * angle.sin();
    }
    x
}

/// For each block of `size` keys the maxima, minima and means of its channels,
/// times weights.
pub(crate) fn pooled(
    keys: ArrayView2<'_, f64>,
    size: usize,
    weights: ArrayView2<'_, f32>,
) -> Vec<Array1<f64>> {
    let weights = weights.t().mapv(f64::from);
    let pooled = extremes(keys, size).into_iter().zip(means(keys, size));
    pooled.map(|([most, least], mean)| weights.dot(&concatenate![Axis(0), most, least, mean])).collect()
}
