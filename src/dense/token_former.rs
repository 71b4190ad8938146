//! TokenFormer's Pattention: tokens attend to parameters, whose weights do not
//! compete as those of a softmax do.

use ndarray::Array2;

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Qkv, Site};
use crate::simd::Simd;
use crate::simd::exp;
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole::{self, RowFn};

/// What [`TokenFormer`] makes of the scores of a query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenWeights {
    /// GELU of the scores divided by their norm.
    #[default]
    L2Gelu,
    /// GELU of the scores, divided by its norm.
    GeluL2,
    /// Softmax.
    Softmax,
}

/// TokenFormer's Pattention: tokens attend to parameters, whose weights do not
/// compete as those of a softmax do.
///
/// ```text
/// s_ij = scale * q_i . k_j
/// A_ij = gelu(s_ij sqrt(n) / |s_i|)         as the paper has it, n keys, |s_i| over them
///      = gelu(s_ij) sqrt(n) / |gelu(s_i)|   or
///      = n softmax_j(s_ij)                  or
/// o_i  = sum_j A_ij v_j
/// ```
///
/// "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters"
/// (arXiv 2410.23168) has it in place of each linear layer: keys and values are
/// parameters, and more of them make a larger model. With
/// [`tokens`](TokenFormerBuilder::tokens) `n` stays what it was: keys of zeros
/// then change nothing. Where all scores are 0, which leaves released code
/// without a norm, weights are 0.
///
/// Cost: as dense attention; a thread holds the scores of 48 queries with all
/// keys.
///
/// TokenFormer's attention to parameters.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::TokenFormer};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 1, 50, 32), |(_, _, i, c)| ((i * (c + 3)) as f32).sin());
/// let keys = Array4::from_shape_fn((1, 1, 80, 32), |(_, _, j, c)| ((j + c) as f32).cos());
/// let values = Array4::<f32>::ones((1, 1, 80, 16));
/// let out = TokenFormer::builder().build()?.forward(Qkv::new(x.view(), keys.view(), values.view()))?;
/// assert_eq!(out.dim(), (1, 1, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenFormer {
    config: Config,
    weights: TokenWeights,
    tokens: Option<usize>,
}

impl TokenFormer {
    /// As the paper has it.
    pub fn builder() -> TokenFormerBuilder {
        TokenFormerBuilder::with()
    }
}

options! {
    /// Builds a [`TokenFormer`].
    TokenFormerBuilder of TokenFormer, isa;
    own {
        weights: TokenWeights = TokenWeights::L2Gelu;
        tokens: Option<usize> = None;
    }
    build(this, config) {
        if this.tokens == Some(0) {
            return Err(Error::value("tokens", "at least 1", 0));
        }
        Ok(TokenFormer { config, weights: this.weights, tokens: this.tokens })
    }
}

impl TokenFormerBuilder {
    /// What becomes of scores. Default: [`TokenWeights::L2Gelu`].
    pub fn weights(self, weights: TokenWeights) -> Self {
        Self { weights, ..self }
    }

    /// `n`. Default: how many keys there are.
    pub fn tokens(self, tokens: usize) -> Self {
        Self { tokens: Some(tokens), ..self }
    }

    /// The factor of scores. Default: 1.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl TokenFormer {
    fn count(&self, keys: usize) -> f64 {
        self.tokens.unwrap_or(keys) as f64
    }
}

impl RowFn for TokenFormer {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, _: &Site, _: usize, row: &mut [f32], _: &mut [f32]) {
        let count = self.count(row.len());
        let gelu = |row: &mut [f32]| {
            for x in row.chunks_mut(S::LANES) {
                let score = s.load_tail(x);
                s.store_tail(x, exp::gelu(s, score));
            }
        };
        match self.weights {
            TokenWeights::L2Gelu => {
                divide(s, row, count.sqrt() as f32);
                gelu(row);
            }
            TokenWeights::GeluL2 => {
                gelu(row);
                divide(s, row, count.sqrt() as f32);
            }
            TokenWeights::Softmax => {
                whole::softmax(s, row);
                whole::scale(s, row, count as f32);
            }
        }
    }
}

/// Makes a row one of this norm; zeros stay.
#[inline(always)]
fn divide<S: Simd>(s: S, row: &mut [f32], norm: f32) {
    let mut most = s.splat(0.0);
    for x in row.chunks(S::LANES) {
        // In this order a NaN is left out.
        most = s.max(s.abs(s.load_tail(x)), most);
    }
    // Squares of what is relative to the largest neither overflow nor vanish.
    let most = s.splat(match s.reduce_max(most) {
        0.0 => 1.0,
        most => most,
    });
    let squares = whole::sum(s, row, 0.0, |x| {
        let x = s.div(x, most);
        s.mul(x, x)
    });
    let factor = s.splat(if squares == 0.0 { 0.0 } else { norm / squares.sqrt() });
    for x in row.chunks_mut(S::LANES) {
        let divided = s.mul(s.div(s.load_tail(x), most), factor);
        s.store_tail(x, divided);
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for TokenFormer {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = whole::checked(x.dims()?)?;
        whole::run(pass, self.config.isa, (x, &dims), self.config.scale(&dims) as f32, self, None, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = whole::checked(x.dims()?)?;
        let scale = R::rounded(self.config.scale(&dims), 1.0);
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let count = self.count(k.dim().0);
            let normed = |row: Vec<R>| -> Vec<R> {
                let norm = R::sum(row.iter().map(|&x| x * x)).sqrt();
                let factor = R::rounded(count.sqrt(), 1.0) / norm;
                let zero = norm.value() == 0.0;
                row.into_iter().map(|x| if zero { R::of(0.0) } else { x * factor }).collect()
            };
            let gelu = |row: Vec<R>| -> Vec<R> { row.into_iter().map(|x| x.gelu()).collect() };
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()) {
                let dot =
                    |k: ndarray::ArrayView1<'_, R>| R::dot(q.iter().copied().zip(k.iter().copied())) * scale;
                let scores: Vec<R> = k.outer_iter().map(dot).collect();
                let weights = match self.weights {
                    TokenWeights::L2Gelu => gelu(normed(scores)),
                    TokenWeights::GeluL2 => normed(gelu(scores)),
                    TokenWeights::Softmax => softmax(&scores).into_iter().map(|x| x * R::of(count)).collect(),
                };
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().copied().zip(v.column(c).iter().copied()));
                }
            }
            out
        });
        Ok((out, ()))
    }
}

composite!(TokenFormer, Qkv);

exhibit! {
    TokenFormerExhibit of TokenFormer, "dense", "TokenFormer", "arXiv 2410.23168";
    "GELU of scores that are divided by their norm, over parameters as keys and values";
    not "between tokens: weights depend on all keys, and masks leave no zeros";
    tokens false;
    build(_, _) { TokenFormer::builder() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(TokenFormer, TokenFormerExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, error, held};
    use ndarray::{Array4, Axis, concatenate};

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len, dim) in [(1, 1, 5), (50, 130, 20), (3, 0, 4), (2, 70, 0)] {
            let x = Qkvs::new([2, 2, 1, q_len, kv_len, dim, 17], 1);
            for weights in [TokenWeights::L2Gelu, TokenWeights::GeluL2, TokenWeights::Softmax] {
                let builder = TokenFormer::builder().weights(weights);
                worst = worst.max(held(&builder.clone().build().unwrap(), x.qkv()));
                worst = worst.max(held(&builder.scale(0.2).tokens(7).build().unwrap(), x.qkv()));
            }
        }
        println!("TokenFormer: {worst:.3} of the bound");
    }

    #[test]
    fn keys_of_zeros_change_nothing_if_their_number_is_what_it_was() {
        let x = Qkvs::new([1, 1, 1, 9, 20, 8, 6], 2);
        let more = |x: &Array4<f32>, y: Array4<f32>| concatenate(Axis(2), &[x.view(), y.view()]).unwrap();
        let grown = Qkvs {
            q: x.q.clone(),
            k: more(&x.k, Array4::zeros((1, 1, 12, 8))),
            v: more(&x.v, Array4::ones((1, 1, 12, 6))),
        };
        let was = TokenFormer::builder().build().unwrap().reference(x.qkv()).unwrap();
        let same = TokenFormer::builder().tokens(20).build().unwrap().reference(grown.qkv()).unwrap();
        close(&same, &was, 1e-12);
        let other = TokenFormer::builder().build().unwrap().reference(grown.qkv()).unwrap();
        assert!(other.iter().zip(&was).any(|(a, b)| (a - b).abs() > 0.1));
    }

    #[test]
    fn softmax_is_dense_attention_times_its_keys() {
        let x = Qkvs::new([1, 2, 1, 9, 20, 8, 6], 3);
        let softmax = TokenFormer::builder().weights(TokenWeights::Softmax).build().unwrap();
        let dense = Dense::builder().scale(1.0).build().unwrap().reference(x.qkv()).unwrap();
        close(&softmax.reference(x.qkv()).unwrap(), &(dense * 20.0), 1e-12);
        // Scores of 0 alone have no norm.
        let zeros = Qkvs { q: Array4::zeros(x.q.dim()), ..x };
        assert!(
            TokenFormer::builder().build().unwrap().forward(zeros.qkv()).unwrap().iter().all(|&x| x == 0.0)
        );
        assert_eq!(error(TokenFormer::builder().tokens(0).build()), "tokens: expected at least 1, got 0");
    }
}
