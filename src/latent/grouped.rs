//! The weights of a grouped attention layer: what conversions start from.

use ndarray::{Array3, ArrayView2};

use crate::error::{Error, Result};

/// Projections of a layer with grouped heads. `C` are the elements of a token.
#[derive(Clone, Copy, Debug)]
pub struct GroupedWeights<'a> {
    pub(super) w_q: ArrayView2<'a, f64>,
    pub(super) w_k: ArrayView2<'a, f64>,
    pub(super) w_v: ArrayView2<'a, f64>,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
}

impl<'a> GroupedWeights<'a> {
    /// Of `W_q`, `[heads dim, C]`, `W_k` and `W_v`, `[kv_heads dim, C]`.
    ///
    /// # Errors
    /// [`Error::Heads`] for heads that groups do not divide, [`Error::Shape`] for
    /// matrices that do not fit.
    pub fn new(
        w_q: ArrayView2<'a, f64>,
        w_k: ArrayView2<'a, f64>,
        w_v: ArrayView2<'a, f64>,
        heads: usize,
        kv_heads: usize,
    ) -> Result<Self> {
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::Heads { q_heads: heads, kv_heads });
        }
        let (rows, cols) = w_q.dim();
        if !rows.is_multiple_of(heads) {
            let expected = format!("[heads dim, C] with {heads} heads");
            return Err(Error::shape("w_q", expected, w_q.shape()));
        }
        let dim = rows / heads;
        for (argument, w) in [("w_k", &w_k), ("w_v", &w_v)] {
            if w.dim() != (kv_heads * dim, cols) {
                let expected = format!("[kv_heads dim, C] = [{}, {cols}] as w_q has it", kv_heads * dim);
                return Err(Error::shape(argument, expected, w.shape()));
            }
        }
        Ok(Self { w_q, w_k, w_v, heads, kv_heads, dim })
    }
}

/// `[heads dim, n]` as `[heads, dim, n]`.
pub(super) fn by_head(w: ArrayView2<'_, f64>, heads: usize) -> Array3<f64> {
    let dim = w.nrows() / heads.max(1);
    Array3::from_shape_fn((heads, dim, w.ncols()), |(h, c, j)| w[[h * dim + c, j]])
}

#[cfg(test)]
pub(super) mod tests {
    use ndarray::{Array1, Array2, Array3, Axis, s};

    use super::*;
    use crate::math::random::Normal;

    pub(in crate::latent) fn near(a: &Array2<f64>, b: &Array2<f64>, within: f64) {
        assert_eq!(a.dim(), b.dim());
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= within, "{a} for {b}");
        }
    }

    /// Random weights and tokens.
    pub(in crate::latent) struct Layer {
        pub(in crate::latent) w_q: Array2<f64>,
        pub(in crate::latent) w_k: Array2<f64>,
        pub(in crate::latent) w_v: Array2<f64>,
        /// `[tokens, C]`
        pub(in crate::latent) x: Array2<f64>,
        heads: usize,
        kv_heads: usize,
    }

    /// `softmax(q k^T) v`
    pub(in crate::latent) fn attend(q: Array2<f64>, k: Array2<f64>, v: Array2<f64>) -> Array2<f64> {
        let mut weights = q.dot(&k.t());
        for mut row in weights.rows_mut() {
            let max = row.fold(f64::NEG_INFINITY, |max, x| max.max(*x));
            row.mapv_inplace(|x| (x - max).exp());
            let sum = row.sum();
            row /= sum;
        }
        weights.dot(&v)
    }

    impl Layer {
        /// Sizes are heads, kv_heads, dim, C.
        pub(in crate::latent) fn new([heads, kv_heads, dim, c]: [usize; 4], seed: u64) -> Self {
            let mut normal = Normal::new(seed);
            let mut random = |m: usize| Array2::from_shape_simple_fn((m, c), || normal.next().unwrap() / 3.0);
            let (w_q, w_k, w_v) = (random(heads * dim), random(kv_heads * dim), random(kv_heads * dim));
            Self { w_q, w_k, w_v, x: random(15), heads, kv_heads }
        }

        pub(in crate::latent) fn weights(&self) -> GroupedWeights<'_> {
            let (q, k, v) = (self.w_q.view(), self.w_k.view(), self.w_v.view());
            GroupedWeights::new(q, k, v, self.heads, self.kv_heads).unwrap()
        }

        /// Rows of a head, `[tokens, dim]`, rotated if there are frequencies.
        pub(in crate::latent) fn head(
            &self,
            w: &Array2<f64>,
            of: usize,
            h: usize,
            turn: &[f64],
        ) -> Array2<f64> {
            let dim = w.nrows() / of;
            let mut rows = self.x.dot(&w.slice(s![h * dim..(h + 1) * dim, ..]).t());
            for (t, mut row) in rows.axis_iter_mut(Axis(0)).enumerate() {
                for (i, f) in turn.iter().enumerate() {
                    let (sin, cos) = (t as f64 * f).sin_cos();
                    let (a, b) = (row[i], row[i + turn.len()]);
                    (row[i], row[i + turn.len()]) = (a * cos - b * sin, a * sin + b * cos);
                }
            }
            rows
        }

        /// Outputs of all heads, `[tokens, heads dim]`, rotated by halves.
        pub(in crate::latent) fn attend_rotated(&self, turn: &[f64]) -> Array2<f64> {
            let dim = self.w_q.nrows() / self.heads;
            let mut out = Array2::zeros((self.x.nrows(), self.heads * dim));
            for h in 0..self.heads {
                let g = h / (self.heads / self.kv_heads);
                let q = self.head(&self.w_q, self.heads, h, turn) / (dim as f64).sqrt();
                let (k, v) = (
                    self.head(&self.w_k, self.kv_heads, g, turn),
                    self.head(&self.w_v, self.kv_heads, g, &[]),
                );
                out.slice_mut(s![.., h * dim..(h + 1) * dim]).assign(&attend(q, k, v));
            }
            out
        }

        pub(in crate::latent) fn attend(&self) -> Array2<f64> {
            self.attend_rotated(&[])
        }

        /// The same of an MLA layer without a rotary part.
        pub(in crate::latent) fn attend_latent(
            &self,
            w_q: &Array2<f64>,
            w_kv: &Array2<f64>,
            w_uk: &Array3<f64>,
            w_uv: &Array3<f64>,
            dim: usize,
        ) -> Array2<f64> {
            let c = self.x.dot(&w_kv.t());
            let parts: Vec<Array2<f64>> = (0..self.heads)
                .map(|h| {
                    let q = self.x.dot(&w_q.slice(s![h * dim..(h + 1) * dim, ..]).t()) / (dim as f64).sqrt();
                    let absorbed = q.dot(&w_uk.index_axis(Axis(0), h));
                    attend(absorbed, c.clone(), c.clone()).dot(&w_uv.index_axis(Axis(0), h).t())
                })
                .collect();
            ndarray::concatenate(Axis(1), &parts.iter().map(|x| x.view()).collect::<Vec<_>>()).unwrap()
        }
    }

    #[test]
    fn refusals() {
        let (q, k) = (Array2::zeros((12, 5)), Array2::zeros((6, 5)));
        let refusal = |h, g| GroupedWeights::new(q.view(), k.view(), k.view(), h, g).unwrap_err().to_string();
        assert!(
            refusal(4, 3).contains('4') && refusal(5, 1).starts_with("w_q: expected shape [heads dim, C]")
        );
        assert!(refusal(4, 1).starts_with("w_k: expected shape [kv_heads dim, C] = [3, 5]"));
        let none = Array1::<f64>::zeros(0);
        assert_eq!(by_head(none.view().insert_axis(Axis(1)), 3).dim(), (3, 0, 1));
    }
}
