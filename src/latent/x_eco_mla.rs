//! X-EcoMLA: an MLA layer from the weights of a grouped one, by singular values.
//!
//! ```text
//! W_q = U S V^T            W_qa = S V^T,  W_qb = U, of each head the rows [first d_N; last d_R]
//! [W_k; W_v] = U S V^T     (key/value heads repeated for each query head)
//!                          W_kva = [S V^T; the last d_R rows of the mean of W_k over its heads]
//!                          W_uk = first d_N rows of U_k of each head, W_uv = U_v
//! ```
//!
//! cut off after `rank` singular values. "X-EcoMLA: Upcycling Pre-Trained
//! Attention into MLA for Efficient and Extreme KV Compression" (arXiv
//! 2503.11132), as in its code: `S` stays with the first factor, and the shared
//! rotary key is that of the average head. The result is where training starts;
//! with all ranks, `d_N = d` and `d_R = 0` it is the layer that it came from.
//!
//! Cost: two eigenvalue problems, of `heads d` and `2 heads d` rows.

use ndarray::{Array2, Array3, ArrayView2, Axis, concatenate, s};

use crate::error::{Error, Result};
use crate::latent::grouped::{GroupedWeights, by_head};
use crate::math::algebra::low_rank;

/// How many singular values are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Rank {
    /// So many, or as many as there are.
    Fixed(usize),
    /// The most whose squares sum to at most this share of all, at least one,
    /// rounded up to a multiple of 8.
    Energy(f64),
}

impl Rank {
    fn of(self, singular: &[f64]) -> usize {
        match self {
            Self::Fixed(rank) => rank,
            Self::Energy(share) => {
                let total: f64 = singular.iter().map(|x| x * x).sum();
                let mut sum = 0.0;
                let least = 1e-7 * singular.first().copied().unwrap_or_default();
                let within = |x: &&f64| {
                    sum += **x * **x;
                    // All of them are all whatever the order of the sum, but for
                    // those that are there by rounding alone.
                    sum <= share * total * (1.0 + 1e-12) && **x > least
                };
                singular.iter().take_while(within).count().max(1).next_multiple_of(8)
            }
        }
    }

    fn check(self, argument: &'static str) -> Result<()> {
        match self {
            Self::Energy(share) if !(share > 0.0 && share <= 1.0) => {
                Err(Error::value(argument, "a share above 0, at most 1", share))
            }
            Self::Fixed(0) => Err(Error::value(argument, "at least one singular value", 0)),
            _ => Ok(()),
        }
    }
}

/// The matrices of an MLA layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MlaWeights {
    /// `[r_q, C]`
    pub w_qa: Array2<f64>,
    /// `[heads (d_N + d_R), r_q]`
    pub w_qb: Array2<f64>,
    /// Latent and rotary key, `[r + d_R, C]`.
    pub w_kva: Array2<f64>,
    /// `[heads, d_N, r]`
    pub w_uk: Array3<f64>,
    /// `[heads, d, r]`
    pub w_uv: Array3<f64>,
}

/// Weights of an MLA layer with heads of `nope + rope` elements, from those of a
/// grouped one whose heads have at least as many.
///
/// ```
/// use attention_kernels::latent::{GroupedWeights, Rank, x_eco_mla};
/// use ndarray::Array2;
///
/// let (w_q, w_k) = (Array2::<f64>::ones((64, 48)), Array2::<f64>::ones((32, 48)));
/// let weights = GroupedWeights::new(w_q.view(), w_k.view(), w_k.view(), 4, 2)?; // heads of 16
/// let mla = x_eco_mla(&weights, 8, 8, [Rank::Fixed(32), Rank::Energy(0.95)])?;
/// assert_eq!((mla.w_qb.dim(), mla.w_kva.dim()), ((4 * 16, 32), (8 + 8, 48)));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::Value`] for parts that are together more than a head or ranks that
/// keep nothing.
pub fn x_eco_mla(
    weights: &GroupedWeights<'_>,
    nope: usize,
    rope: usize,
    ranks: [Rank; 2],
) -> Result<MlaWeights> {
    let &GroupedWeights { w_q, w_k, w_v, heads, kv_heads, dim } = weights;
    if nope.checked_add(rope).is_none_or(|parts| parts > dim) {
        let expected = format!("parts that are together at most the {dim} elements of a head");
        return Err(Error::value("nope", expected, format_args!("{nope} and {rope}")));
    }
    ranks[0].check("ranks[0]")?;
    ranks[1].check("ranks[1]")?;
    let (up, w_qa) = low_rank(w_q, |singular| ranks[0].of(singular));
    let up = by_head(up.view(), heads);
    let parts = [up.slice(s![.., ..nope, ..]), up.slice(s![.., dim - rope.., ..])];
    let rows = concatenate(Axis(1), &parts).unwrap_or_default();
    let w_qb = Array2::from_shape_fn((heads * (nope + rope), w_qa.nrows()), |(i, j)| {
        rows[[i / (nope + rope), i % (nope + rope), j]]
    });
    let group = heads / kv_heads.max(1);
    let repeated = |w: ArrayView2<'_, f64>| {
        Array2::from_shape_fn((heads * dim, w.ncols()), |(i, j)| w[[i / dim / group * dim + i % dim, j]])
    };
    let both = concatenate(Axis(0), &[repeated(w_k).view(), repeated(w_v).view()]).unwrap_or_default();
    let (up, down) = low_rank(both.view(), |singular| ranks[1].of(singular));
    let (keys, values) = up.view().split_at(Axis(0), heads * dim);
    let mean = by_head(w_k, kv_heads).mean_axis(Axis(0)).unwrap_or_else(|| Array2::zeros((dim, w_k.ncols())));
    let w_kva = concatenate(Axis(0), &[down.view(), mean.slice(s![dim - rope.., ..])]).unwrap_or_default();
    let w_uk = by_head(keys, heads).slice_move(s![.., ..nope, ..]);
    Ok(MlaWeights { w_qa, w_qb, w_kva, w_uk, w_uv: by_head(values, heads) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latent::grouped::tests::{Layer, near};

    /// With all ranks and no rotary part, projections are reproduced; repeated
    /// heads add no rank.
    #[test]
    fn all_ranks_are_the_layer() {
        let layer = Layer::new([4, 2, 6, 20], 1);
        let mla = x_eco_mla(&layer.weights(), 6, 0, [Rank::Fixed(99), Rank::Fixed(24)]).unwrap();
        near(&mla.w_qb.dot(&mla.w_qa), &layer.w_q, 1e-12);
        for h in 0..4 {
            let of = |w: &Array2<f64>| w.slice(s![h / 2 * 6..h / 2 * 6 + 6, ..]).to_owned();
            near(&mla.w_uk.index_axis(Axis(0), h).dot(&mla.w_kva), &of(&layer.w_k), 1e-12);
            near(&mla.w_uv.index_axis(Axis(0), h).dot(&mla.w_kva), &of(&layer.w_v), 1e-12);
        }
        // Outputs, expanded and absorbed, are those of the grouped layer.
        let want = layer.attend();
        near(
            &layer.attend_latent(&mla.w_qb.dot(&mla.w_qa), &mla.w_kva, &mla.w_uk, &mla.w_uv, 6),
            &want,
            1e-10,
        );
    }

    #[test]
    fn parts_of_heads_and_ranks() {
        let layer = Layer::new([4, 2, 6, 20], 2);
        let mla = x_eco_mla(&layer.weights(), 2, 3, [Rank::Fixed(24), Rank::Energy(1.0)]).unwrap();
        // Twelve heads' rows of keys and as many of values, which are of rank 20.
        assert_eq!((mla.w_kva.dim(), mla.w_uk.dim(), mla.w_uv.dim()), ((24 + 3, 20), (4, 2, 24), (4, 6, 24)));
        let q = mla.w_qb.dot(&mla.w_qa);
        let kept: Vec<usize> = (0..4).flat_map(|h| [0, 1, 3, 4, 5].map(|c| 6 * h + c)).collect();
        near(&q, &layer.w_q.select(Axis(0), &kept), 1e-12);
        let mean = (&layer.w_k.slice(s![3..6, ..]) + &layer.w_k.slice(s![9..12, ..])) / 2.0;
        near(&mla.w_kva.slice(s![24.., ..]).to_owned(), &mean, 1e-12);
        let rank = |share| Rank::Energy(share).of(&[4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!([rank(0.5), rank(0.8), rank(1.0)], [8, 8, 16]);
        let refusal = |nope, ranks| x_eco_mla(&layer.weights(), nope, 3, ranks).unwrap_err().to_string();
        assert!(refusal(4, [Rank::Fixed(3); 2]).starts_with("nope: expected parts"));
        assert!(refusal(2, [Rank::Fixed(3), Rank::Energy(0.0)]).starts_with("ranks[1]: expected a share"));
    }
}
