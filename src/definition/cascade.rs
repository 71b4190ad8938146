//! Softmax attention of one query as cascades of Einsums over its keys: in three passes,
//! two and one, after "FuseMax: Leveraging Extended Einsums to Optimize Attention
//! Accelerator Design" (arXiv 2406.10491).
//!
//! ```text
//! three   GM = max_m s_m   |  SN_m = e^(s_m - GM), SD = sum_m SN_m   |  o = sum_m SN_m / SD v_m
//! two     LM_t = max s_m, SN_m = e^(s_m - LM_t), SLD_t = sum SN_m      of each tile t
//!         | GM = max_t LM_t, P_t = e^(LM_t - GM), SD = sum_t SLD_t P_t,  o = sum_m SN_m P_t / SD v_m
//! one     RM' = max(RM, LM_t), P = e^(RM - RM'), RD' = RD P + sum e^(s_m - RM'),
//!         RNV' = RNV P + sum e^(s_m - RM') v_m,                          o = RNV / RD in the end
//! ```
//!
//! The last is what the engines run. A score of -inf hides its key; without keys `o` is 0.

use ndarray::{ArrayView1, ArrayView2, Axis};

/// What a cascade gives, and what it took.
#[derive(Debug)]
pub(crate) struct Cascade {
    pub(crate) out: Vec<f64>,
    /// How often each key had to be read, or what was made of it.
    pub(crate) passes: usize,
    /// Numbers that live from one pass, or one tile, to the next.
    pub(crate) live: usize,
    pub(crate) divisions: usize,
}

fn most(scores: ArrayView1<'_, f64>) -> f64 {
    scores.fold(f64::NEG_INFINITY, |most, &x| most.max(x))
}

/// `e^(x - most)`; of tiles in which all is hidden too.
fn exponential(x: f64, most: f64) -> f64 {
    if x == f64::NEG_INFINITY { 0.0 } else { (x - most).exp() }
}

fn weighed(weights: &[f64], v: ArrayView2<'_, f64>) -> Vec<f64> {
    let terms = |c: usize| weights.iter().zip(v.column(c)).map(|(w, v)| w * v).sum();
    (0..v.dim().1).map(terms).collect()
}

fn share(x: f64, total: f64) -> f64 {
    if total == 0.0 { 0.0 } else { x / total }
}

pub(crate) fn three_passes(scores: ArrayView1<'_, f64>, v: ArrayView2<'_, f64>) -> Cascade {
    let most = most(scores);
    let numerators: Vec<f64> = scores.iter().map(|&x| exponential(x, most)).collect();
    let total: f64 = numerators.iter().sum();
    let weights: Vec<f64> = numerators.iter().map(|&x| share(x, total)).collect();
    Cascade { out: weighed(&weights, v), passes: 3, live: scores.len(), divisions: scores.len() }
}

pub(crate) fn two_passes(scores: ArrayView1<'_, f64>, v: ArrayView2<'_, f64>, tile: usize) -> Cascade {
    let (mut numerators, mut tiles) = (Vec::new(), Vec::new());
    for scores in scores.axis_chunks_iter(Axis(0), tile) {
        let most = most(scores);
        numerators.extend(scores.iter().map(|&x| exponential(x, most)));
        tiles.push((most, numerators[numerators.len() - scores.len()..].iter().sum::<f64>()));
    }
    let all = tiles.iter().fold(f64::NEG_INFINITY, |all: f64, tile| all.max(tile.0));
    let factors: Vec<f64> = tiles.iter().map(|tile| exponential(tile.0, all)).collect();
    let total: f64 = tiles.iter().zip(&factors).map(|(tile, factor)| tile.1 * factor).sum();
    let weight = |(m, &x): (usize, &f64)| share(x * factors[m / tile], total);
    let weights: Vec<f64> = numerators.iter().enumerate().map(weight).collect();
    let live = numerators.len() + 2 * tiles.len();
    Cascade { out: weighed(&weights, v), passes: 2, live, divisions: scores.len() }
}

pub(crate) fn one_pass(scores: ArrayView1<'_, f64>, v: ArrayView2<'_, f64>, tile: usize) -> Cascade {
    let (mut running, mut total, mut out) = (f64::NEG_INFINITY, 0.0, vec![0.0; v.dim().1]);
    for (scores, v) in scores.axis_chunks_iter(Axis(0), tile).zip(v.axis_chunks_iter(Axis(0), tile)) {
        let next = running.max(most(scores));
        let numerators: Vec<f64> = scores.iter().map(|&x| exponential(x, next)).collect();
        let kept = exponential(running, next);
        total = total * kept + numerators.iter().sum::<f64>();
        out.iter_mut().zip(weighed(&numerators, v)).for_each(|(out, sum)| *out = *out * kept + sum);
        running = next;
    }
    let (live, divisions) = (tile.min(scores.len()) + out.len() + 2, out.len());
    out.iter_mut().for_each(|x| *x = share(*x, total));
    Cascade { out, passes: 1, live, divisions }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array4, s};

    /// What they are told apart by.
    #[test]
    fn what_a_cascade_takes() {
        let x = Array4::<f64>::ones((1, 1, 1000, 8));
        let (scores, v) = (x.slice(s![0, 0, .., 0]), x.slice(s![0, 0, .., ..]));
        let of = |x: Cascade| (x.passes, x.live, x.divisions);
        assert_eq!(of(three_passes(scores, v)), (3, 1000, 1000));
        assert_eq!(of(two_passes(scores, v, 100)), (2, 1020, 1000));
        assert_eq!(of(one_pass(scores, v, 100)), (1, 110, 8));
    }

    #[test]
    fn what_is_hidden_is_nothing() {
        let (hidden, v) = (Array4::from_elem((1, 1, 6, 1), f64::NEG_INFINITY), Array4::ones((1, 1, 6, 3)));
        let (mut scores, v) = (hidden.slice(s![0, 0, .., 0]).to_owned(), v.slice(s![0, 0, .., ..]));
        for (want, some) in [(0.0, None), (1.0, Some(4))] {
            some.iter().for_each(|&j: &usize| scores[j] = -1e9);
            let scores = scores.view();
            for cascade in [three_passes(scores, v), two_passes(scores, v, 2), one_pass(scores, v, 2)] {
                assert_eq!(cascade.out, [want; 3], "{} passes", cascade.passes);
            }
        }
    }
}
