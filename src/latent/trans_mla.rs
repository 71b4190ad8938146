//! TransMLA: grouped layers as MLA layers.
//!
//! **Exactly** ([`exact`]): the latent is all keys and values of a token, `c =
//! [k; v]`, and the matrices of a head cut out those of its group. Keys are
//! rotated before they are kept.
//!
//! **Smaller** ([`TransMla`]), from keys and values of calibration tokens:
//!
//! 1. *RoRoPE.* All heads' pairs of one frequency turn by the same angle, so an
//!    orthogonal matrix across heads leaves every score as it is. For each
//!    frequency (or fold of `F` neighbouring ones, taken as equal: *FreqFold*)
//!    the principal components of its pairs come first.
//! 2. Of each fold the first components go on turning: together one rotary key
//!    for all heads, `d_R` elements. The others, `g d - d_R`, turn no more.
//! 3. *Balance.* Those are divided by `alpha`, so that keys have `ratio` times
//!    the mean norm of values.
//! 4. The principal components of `[keys / alpha; values]` are the latent.
//!
//! "TransMLA: Migrating GQA Models to MLA" (arXiv 2502.07864), as in its code.
//! Scores of the new layer have the scale `(d + d_R)^-1/2`, and its queries are
//! `((d + d_R) / d)^1/2` times the old ones. What does not turn any more is an
//! approximation; all else is exact where the latent is as wide as keys and
//! values together.
//!
//! Cost: eigenvalue problems of `g F` rows for each of `d / 2F` folds, and one of
//! `2 g d - d_R` rows.

use ndarray::{Array2, Array3, ArrayView2, Axis, concatenate, s};

use crate::error::{Error, Result};
use crate::latent::grouped::GroupedWeights;
use crate::math::algebra::eigen;

/// What an MLA layer has after conversion.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Converted {
    /// Queries, `[heads (d_N + d_R), C]`, the rotary part last.
    pub w_q: Array2<f64>,
    /// Latent and rotary key, `[r + d_R, C]`.
    pub w_kva: Array2<f64>,
    /// `[heads, d_N, r]`
    pub w_uk: Array3<f64>,
    /// `[heads, d_V, r]`
    pub w_uv: Array3<f64>,
    /// Radians a position of each pair of the rotary part, neighbours being a
    /// pair: for [`Rope::of`](crate::math::rope::Rope::of).
    pub frequencies: Vec<f64>,
}

/// The exact conversion: latents of `2 kv_heads dim` elements, keys first, and
/// no rotary part.
pub fn exact(weights: &GroupedWeights<'_>) -> Converted {
    let &GroupedWeights { w_q, w_k, w_v, heads, kv_heads, dim } = weights;
    let (wide, group) = (kv_heads * dim, heads / kv_heads.max(1));
    let cut = |first: usize| {
        Array3::from_shape_fn((heads, dim, 2 * wide), |(h, c, l)| {
            f64::from(u8::from(l == first + h / group.max(1) * dim + c))
        })
    };
    let w_kva = concatenate(Axis(0), &[w_k, w_v]).unwrap_or_default();
    Converted { w_q: w_q.to_owned(), w_kva, w_uk: cut(0), w_uv: cut(wide), frequencies: Vec::new() }
}

/// How a layer is made smaller.
///
/// ```
/// use attention_kernels::latent::{GroupedWeights, TransMla};
/// use ndarray::Array2;
///
/// let w = |rows| Array2::from_shape_fn((rows, 48), |(i, j)| ((i * 48 + j) as f64).sin());
/// let (w_q, w_k, w_v) = (w(64), w(32), w(32));
/// let weights = GroupedWeights::new(w_q.view(), w_k.view(), w_v.view(), 4, 2)?; // heads of 16
/// let frequencies: Vec<f64> = (0..8).map(|i| 1e4f64.powf(-2.0 * i as f64 / 16.0)).collect();
/// let tokens = Array2::from_shape_fn((100, 48), |(i, j)| ((i + 7 * j) as f64).cos());
/// let mla = TransMla { rank: 24, collapse: 2, fold: 2, ratio: 1.0 };
/// let converted = mla.convert(&weights, &frequencies, tokens.view())?;
/// assert_eq!((converted.w_kva.dim(), converted.frequencies.len()), ((24 + 8, 48), 4));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TransMla {
    /// Elements of a latent, `r`.
    pub rank: usize,
    /// The rotary key has `d / collapse` elements.
    pub collapse: usize,
    /// Neighbouring frequencies that are taken as equal; a multiple of
    /// `collapse`.
    pub fold: usize,
    /// The mean norm of keys in that of values, after balancing; 1 in the paper.
    pub ratio: f64,
}

/// Principal components: columns, of rows with these squares.
fn components(mut squares: Array2<f64>) -> Array2<f64> {
    let n = squares.nrows();
    let damping = 0.01 * squares.diag().sum() / n.max(1) as f64;
    squares.diag_mut().map_inplace(|x| *x += damping);
    eigen(squares.view()).1
}

impl TransMla {
    /// Converts a layer whose heads of `d` elements turn by halves (pairs are
    /// elements `i` and `i + d / 2`), each at one of `d / 2` frequencies, by what
    /// its keys and values of `tokens`, `[n, C]`, are.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of frequencies, a fold that does not
    /// divide it or is no multiple of `collapse`, a rank beyond what keys and
    /// values have, a ratio that is not finite and above 0, and
    /// [`Error::Shape`] for tokens of other elements.
    pub fn convert(
        &self,
        weights: &GroupedWeights<'_>,
        frequencies: &[f64],
        tokens: ArrayView2<'_, f64>,
    ) -> Result<Converted> {
        let &GroupedWeights { w_q, w_k, w_v, heads, kv_heads: g, dim } = weights;
        let &Self { rank, collapse, fold, ratio } = self;
        if !dim.is_multiple_of(2) || frequencies.len() != dim / 2 {
            let expected = format!("one for each pair of the {dim} elements of a head");
            return Err(Error::value("frequencies", expected, frequencies.len()));
        }
        if fold == 0 || !(dim / 2).is_multiple_of(fold) {
            return Err(Error::value("fold", format!("a divisor of {} frequencies", dim / 2), fold));
        }
        if collapse == 0 || !fold.is_multiple_of(collapse) {
            return Err(Error::value("collapse", format!("a divisor of the fold, {fold}"), collapse));
        }
        if !(ratio.is_finite() && ratio > 0.0) {
            return Err(Error::value("ratio", "a finite number above 0", ratio));
        }
        let (wide, rope) = (g * dim, dim / collapse);
        if rank > 2 * wide - rope {
            let expected = format!("at most the {} elements of keys and values", 2 * wide - rope);
            return Err(Error::value("rank", expected, rank));
        }
        if tokens.ncols() != w_k.ncols() {
            let expected = format!("[tokens, C] = [_, {}] as w_k has it", w_k.ncols());
            return Err(Error::shape("tokens", expected, tokens.shape()));
        }
        // Rows of an orthogonal matrix that keys are turned with: real and
        // imaginary parts of the components of each fold.
        let keys = tokens.dot(&w_k.t());
        let (kept, mut turn) = (fold / collapse, Vec::new());
        let (mut rotary, mut rest, mut kept_frequencies) = (Vec::new(), Vec::new(), Vec::new());
        for first in (0..dim / 2).step_by(fold) {
            // Elements of the pairs of the fold: those of all heads.
            let places: Vec<usize> =
                (0..g).flat_map(|c| (first..first + fold).map(move |j| c * dim + j)).collect();
            let [re, im] = [0, dim / 2].map(|shift| {
                keys.select(Axis(1), &places.iter().map(|place| place + shift).collect::<Vec<_>>())
            });
            let vectors = components(re.t().dot(&re) + im.t().dot(&im));
            for (e, vector) in vectors.axis_iter(Axis(1)).enumerate() {
                let rows = [0, dim / 2].map(|shift| {
                    let mut row = vec![0.0; wide];
                    places.iter().zip(vector).for_each(|(place, x)| row[place + shift] = *x);
                    row
                });
                if e < kept {
                    rotary.extend([turn.len(), turn.len() + 1]);
                    kept_frequencies.push(frequencies[first + e * collapse]);
                } else {
                    rest.extend([turn.len(), turn.len() + 1]);
                }
                turn.extend(rows);
            }
        }
        let turn = Array2::from_shape_fn((wide, wide), |(i, j)| turn[i][j]);
        let (rotary, rest) = (turn.select(Axis(0), &rotary), turn.select(Axis(0), &rest));
        // Keys that turn no more and values have norms of their own.
        let norms = |x: Array2<f64>| {
            let norms = x.axis_iter(Axis(1)).map(|channel| channel.dot(&channel).sqrt());
            norms.sum::<f64>() / x.ncols().max(1) as f64
        };
        let (still, values) = (keys.dot(&rest.t()), tokens.dot(&w_v.t()));
        let alpha = norms(still.clone()) / (ratio * norms(values.clone()));
        let alpha = if alpha.is_finite() && alpha > 0.0 { alpha } else { 1.0 };
        let both = concatenate(Axis(1), &[(&still / alpha).view(), values.view()]).unwrap_or_default();
        let vectors = components(both.t().dot(&both)).slice_move(s![.., ..rank]);
        let w_still = rest.dot(&w_k) / alpha;
        let latent = vectors.t().dot(&concatenate(Axis(0), &[w_still.view(), w_v]).unwrap_or_default());
        let w_kva = concatenate(Axis(0), &[latent.view(), rotary.dot(&w_k).view()]).unwrap_or_default();

        // What a head has of its group: the columns of its elements.
        let of_head = |h: usize| h / (heads / g) * dim..(h / (heads / g) + 1) * dim;
        let (of_keys, of_values) = vectors.view().split_at(Axis(0), wide - rope);
        let (mut w_uk, mut w_uv) = (Array3::zeros((heads, dim, rank)), Array3::zeros((heads, dim, rank)));
        let mut queries = Array2::zeros((heads * (dim + rope), w_q.ncols()));
        let size = ((dim + rope) as f64 / dim as f64).sqrt();
        for h in 0..heads {
            let cut = rest.slice(s![.., of_head(h)]);
            w_uk.index_axis_mut(Axis(0), h).assign(&(cut.t().dot(&of_keys) * alpha));
            w_uv.index_axis_mut(Axis(0), h).assign(&of_values.slice(s![of_head(h), ..]));
            let q = &w_q.slice(s![h * dim..(h + 1) * dim, ..]) * size;
            let first = h * (dim + rope);
            queries.slice_mut(s![first..first + dim, ..]).assign(&q);
            let turned = rotary.slice(s![.., of_head(h)]).dot(&q);
            queries.slice_mut(s![first + dim..first + dim + rope, ..]).assign(&turned);
        }
        Ok(Converted { w_q: queries, w_kva, w_uk, w_uv, frequencies: kept_frequencies })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latent::grouped::tests::{Layer, attend, near};

    /// Outputs of a converted layer, expanded (or absorbed).
    fn converted(layer: &Layer, mla: &Converted, heads: usize, absorbed: bool) -> Array2<f64> {
        let (nope, latent, rope) = (mla.w_uk.dim().1, mla.w_uk.dim().2, 2 * mla.frequencies.len());
        // Pairs of neighbours as halves, which is how the layer turns.
        let halves = |w: &Array2<f64>| {
            let order: Vec<usize> =
                (0..rope).map(|i| if i < rope / 2 { 2 * i } else { 2 * i + 1 - rope }).collect();
            w.select(Axis(0), &order)
        };
        let rotary =
            layer.head(&halves(&mla.w_kva.slice(s![latent.., ..]).to_owned()), 1, 0, &mla.frequencies);
        let c = layer.x.dot(&mla.w_kva.slice(s![..latent, ..]).t());
        let scale = 1.0 / ((nope + rope) as f64).sqrt();
        let of_head = |h: usize| {
            let w_q = mla.w_q.slice(s![h * (nope + rope)..(h + 1) * (nope + rope), ..]);
            let q_n = layer.x.dot(&w_q.slice(s![..nope, ..]).t());
            let q_r = layer.head(&halves(&w_q.slice(s![nope.., ..]).to_owned()), 1, 0, &mla.frequencies);
            let (uk, uv) = (mla.w_uk.index_axis(Axis(0), h), mla.w_uv.index_axis(Axis(0), h));
            let join =
                |a: &Array2<f64>, b: &Array2<f64>| concatenate(Axis(1), &[a.view(), b.view()]).unwrap();
            if absorbed {
                attend(join(&q_n.dot(&uk), &q_r) * scale, join(&c, &rotary), c.clone()).dot(&uv.t())
            } else {
                attend(join(&q_n, &q_r) * scale, join(&c.dot(&uk.t()), &rotary), c.dot(&uv.t()))
            }
        };
        let parts: Vec<_> = (0..heads).map(of_head).collect();
        concatenate(Axis(1), &parts.iter().map(|x| x.view()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn exact_is_grouped_attention() {
        let layer = Layer::new([6, 2, 8, 20], 1);
        let mla = exact(&layer.weights());
        for absorbed in [false, true] {
            near(&converted(&layer, &mla, 6, absorbed), &layer.attend(), 1e-12);
        }
    }

    /// One head in a group: all of its pairs go on turning, and nothing is an
    /// approximation.
    #[test]
    fn full_rank_is_the_layer() {
        let layer = Layer::new([3, 1, 8, 20], 2);
        let turn = [1.0, 0.3, 0.1, 0.01];
        let mla = TransMla { rank: 8, collapse: 1, fold: 1, ratio: 1.0 };
        let mla = mla.convert(&layer.weights(), &turn, layer.x.view()).unwrap();
        assert_eq!(mla.frequencies, turn);
        for absorbed in [false, true] {
            near(&converted(&layer, &mla, 3, absorbed), &layer.attend_rotated(&turn), 1e-11);
        }
    }

    /// With equal frequencies of 0 nothing turns, and whatever is folded, the
    /// layer stays: rotations across heads and balancing cancel.
    #[test]
    fn orthogonal_matrices_and_balance_cancel() {
        let layer = Layer::new([4, 2, 8, 40], 3);
        for (collapse, fold, ratio) in [(1, 1, 1.0), (2, 2, 5.0), (1, 4, 0.1), (4, 4, 1.0)] {
            let mla = TransMla { rank: 32 - 8 / collapse, collapse, fold, ratio };
            let mla = mla.convert(&layer.weights(), &[0.0; 4], layer.x.view()).unwrap();
            for absorbed in [false, true] {
                near(&converted(&layer, &mla, 4, absorbed), &layer.attend(), 1e-11);
            }
        }
    }

    /// Dropping what has little energy changes little, and less where frequency
    /// folding gathers more of it. The rotary part holds most of it.
    #[test]
    fn a_latent_of_fewer_elements_is_near() {
        let mut layer = Layer::new([4, 2, 8, 40], 4);
        // Both heads' keys are much the same, and so are values of rank 4.
        let (first, second) = layer.w_k.view().split_at(Axis(0), 8);
        let alike = concatenate(Axis(0), &[first, (&first + &second * 0.02).view()]).unwrap();
        layer.w_k = alike;
        let turn = [1.0, 0.5, 0.25, 0.125];
        let mla = TransMla { rank: 24, collapse: 1, fold: 1, ratio: 1.0 };
        let got = mla.convert(&layer.weights(), &turn, layer.x.view()).unwrap();
        let (got, want) = (converted(&layer, &got, 4, false), layer.attend_rotated(&turn));
        let off = (&got - &want).mapv(|x| x * x).sum() / want.mapv(|x| x * x).sum();
        assert!(off > 1e-9 && off < 1e-3, "{off}");
    }

    #[test]
    fn refusals() {
        let layer = Layer::new([4, 2, 8, 20], 5);
        let mla = TransMla { rank: 16, collapse: 2, fold: 2, ratio: 1.0 };
        let refusal = |mla: TransMla, turn: &[f64]| {
            mla.convert(&layer.weights(), turn, layer.x.view()).unwrap_err().to_string()
        };
        assert!(refusal(mla, &[1.0; 3]).starts_with("frequencies: expected one for each pair"));
        assert!(refusal(TransMla { fold: 3, ..mla }, &[1.0; 4]).starts_with("fold: expected a divisor of 4"));
        assert!(refusal(TransMla { collapse: 4, ..mla }, &[1.0; 4]).starts_with("collapse: "));
        assert!(
            refusal(TransMla { rank: 29, ..mla }, &[1.0; 4]).starts_with("rank: expected at most the 28")
        );
        assert!(refusal(TransMla { ratio: -1.0, ..mla }, &[1.0; 4]).starts_with("ratio: "));
        let narrow = layer.x.slice(s![.., ..19]);
        assert!(
            mla.convert(&layer.weights(), &[1.0; 4], narrow).unwrap_err().to_string().starts_with("tokens: ")
        );
    }
}
