//! Retention: linear attention whose heads forget at fixed rates, from short
//! memories to long ones.

use crate::card::{carded, exhibit};
use crate::definition::recurrence::Token;
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate, Keys, Made, Normaliser, Place, Source, Spec};
use crate::error::Result;
use crate::input::Qkv;
use crate::input::tokens::Tokens;
use crate::stages::differentiate::{QkvGradients, differentiable};
use crate::stages::options::{Range, options};
use crate::stages::recur::{Config, Recurrence, check_heads, recurrent};

/// Retention: linear attention whose heads forget at fixed rates, from short
/// memories to long ones.
///
/// ```text
/// gamma_h = 1 - 2^(-5 - h)
/// S_t = gamma_h S_{t-1} + k_t v_t^T
/// o_t = scale * q_t^T S_t = scale * sum_{j <= t} gamma_h^(t - j) (q_t . k_j) v_j
/// ```
///
/// "Retentive Network" (arXiv 2307.08621). Rotations of queries and keys
/// (xPos), the norm of each head's output and the gate after it are the
/// caller's.
///
/// The paper's parallel form also divides each row of scores by the root of the
/// sum of its decays, and then by the magnitude of its sum where that is above 1.
/// Both are factors of a row, so that a norm of each head's output undoes them;
/// [`paper_norm`](RetNetBuilder::paper_norm) has them in every form:
///
/// ```text
/// s_t = gamma_h s_{t-1} + 1      z_t = gamma_h z_{t-1} + k_t
/// o_t = scale * q_t^T S_t / max(|scale * q_t . z_t|, sqrt(s_t))
/// ```
///
/// The authors' code normalises each of its forms in another way, which agree
/// after the norm alone.
///
/// Cost: `32 (head_dim + value_dim) + 4 head_dim value_dim` flops a token and
/// head. Rates do not depend on the tokens: where they should,
/// [`SimpleGla`](super::SimpleGla) costs the same.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::RetNet};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let retention = RetNet::builder(4).build()?;
/// let out = retention.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RetNet {
    config: Config,
    gammas: Vec<f64>,
    /// Their logarithms.
    decays: Vec<f32>,
    paper_norm: bool,
}

impl RetNet {
    /// The paper's rates for that many heads: head `h` keeps `1 - 2^(-5 - h)`
    /// of its state.
    pub fn builder(heads: usize) -> RetNetBuilder {
        let gammas: Vec<f64> = (0..heads).map(|head| 1.0 - (-5.0 - head as f64).exp2()).collect();
        Self::from_gammas(&gammas)
    }

    /// Rates of your own, one a head: how much of its state it keeps from one
    /// token to the next, from 0 to 1. 1 is linear attention without decay.
    pub fn from_gammas(gammas: &[f64]) -> RetNetBuilder {
        RetNetBuilder::with(gammas.to_vec())
    }
}

const GAMMAS: Range = Range::new(["numbers from 0 to 1"; 2], |x| (0.0..=1.0).contains(&x));

options! {
    /// Builds a [`RetNet`].
    RetNetBuilder of RetNet, form scale "1 / sqrt(head_dim)";
    given { gammas: Vec<f64>, in GAMMAS; }
    flags {
        /// Divides outputs as the paper's parallel form does. For what follows
        /// without a norm of each head's output, or with one that adds an epsilon to
        /// small numbers; where a norm follows, the division costs time and changes
        /// nothing. The state has a row and a column more, and there are no
        /// gradients.
        ///
        /// ```
        /// use attention_kernels::{Attention, Qkv, linear::RetNet};
        /// use ndarray::Array4;
        ///
        /// // Scores of 4 each, 100 of them: their sum divides.
        /// let (x, v) = (Array4::<f32>::ones((1, 1, 100, 16)), Array4::<f32>::ones((1, 1, 100, 2)));
        /// let retention = RetNet::builder(1).paper_norm().build()?;
        /// let out = retention.forward(Qkv::new(x.view(), x.view(), v.view()))?;
        /// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-5));
        /// # Ok::<(), attention_kernels::Error>(())
        /// ```
        paper_norm;
    }
    build(this, config) {
        let decays = this.gammas.iter().map(|gamma| (gamma - 1.0).ln_1p() as f32).collect();
        Ok(RetNet { config, gammas: this.gammas, decays, paper_norm: this.paper_norm })
    }
}

impl Recurrence for RetNet {
    type Operands<'a, T: Element> = Qkv<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Arrays<'a> {
        let keep = if self.paper_norm { &*self.gammas } else { &[] };
        Arrays { decay: Gate::Constant(&self.decays), keep, ..Arrays::new(&x.reborrow(), self.decays.len()) }
    }

    fn spec<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Result<Spec<'a>> {
        let dims = x.token_dims()?;
        check_heads("gammas", self.gammas.len(), &dims)?;
        Ok(Spec {
            state_dim: dims.head_dim + usize::from(self.paper_norm),
            normaliser: self.paper_norm.then_some(Normaliser::Bounded),
            ..self.config.spec(dims, x.lengths, &self.arrays(x))
        })
    }

    fn with_source<T: Element, R>(&self, x: &Qkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let arrays = self.arrays(x);
        if !self.paper_norm {
            return run(&arrays);
        }
        // One more element, by which keys are counted.
        let dim = x.q.dim().3;
        let set = |rows: &mut [f32], stride: usize, at: &Place, to: f32| {
            rows.chunks_exact_mut(stride).take(at.tokens.len()).for_each(|row| row[dim] = to);
        };
        let queries = |_, at: &Place, rows: &mut [f32], stride| set(rows, stride, at, 0.0);
        run(&Made { arrays, queries, keys: |_, at: &Place, to: Keys<'_>| set(to.k, to.stride, at, 1.0) })
    }

    fn token<T: Element>(&self, x: &Qkv<'_, T>, at: &Place) -> Token {
        let mut token = Token::of(&self.arrays(x), at);
        if self.paper_norm {
            token.q.push(0.0);
            token.k.push(1.0);
        }
        Token { decay: vec![self.gammas[at.head]; token.q.len()], ..token }
    }
}
recurrent!(RetNet, Qkv);
differentiable!(RetNet, Qkv, QkvGradients);

exhibit! {
    RetNetExhibit of RetNet, "linear", "RetNet", "arXiv 2307.08621";
    "every head forgets at a fixed rate, slower the later the head";
    not "where what is forgotten must depend on the token: use gated linear attention";
    tokens true, forms form, variants 3;
    build(x, field) {
        let heads = x.q.dim().1;
        // Rates that forget at once, too.
        let gammas: Vec<f64> = (0..heads).map(|h| [0.9, 1.0, 0.0, 0.5][h % 4]).collect();
        match field.variant {
            0 => RetNet::builder(heads),
            1 => RetNet::builder(heads).paper_norm(),
            _ => RetNet::from_gammas(&gammas).paper_norm(),
        }
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(RetNet, RetNetExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::workspace::Workspace;
    use crate::linear::Carried;
    use crate::linear::Lightning;
    use crate::testing::{agree, array, pairs};
    use crate::{Attention, Backward};
    use ndarray::{Array2, Array4, s};

    const GAMMAS: [f64; 4] = [0.0, 0.9, 31.0 / 32.0, 1.0];

    #[test]
    fn is_its_parallel_form() {
        let (q, k, v) = (array([1, 4, 70, 8], 1), array([1, 4, 70, 8], 2), array([1, 4, 70, 5], 3));
        let retnet = RetNet::from_gammas(&GAMMAS).build().unwrap();
        let got = retnet.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
        let scale = 1.0 / 8f64.sqrt();
        let want = pairs(&v, |b, h, i, j| {
            let dot: f64 = (0..8).map(|c| f64::from(q[[b, h, i, c]]) * f64::from(k[[b, h, j, c]])).sum();
            scale * dot * GAMMAS[h].powi((i - j) as i32)
        });
        agree(&got, &want);
    }

    /// The paper's three normalisations of whole matrices, one after the other.
    #[test]
    fn paper_norm_is_that_of_the_parallel_form() {
        let (q, k, v) = (array([1, 4, 70, 8], 1), array([1, 4, 70, 8], 2), array([1, 4, 70, 5], 3));
        let (scale, builder) = (2.0, RetNet::from_gammas(&GAMMAS).scale(2.0));
        let retnet = builder.paper_norm().build().unwrap();
        let got = retnet.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
        let mut bounded = [0, 0];
        for h in 0..4 {
            let head = |x: &Array4<f32>| -> Array2<f64> { x.slice(s![0, h, .., ..]).mapv(f64::from) };
            let mut scores = head(&q).dot(&head(&k).t()) * scale;
            for (i, mut row) in scores.outer_iter_mut().enumerate() {
                let decay = |j: usize| if j <= i { GAMMAS[h].powi((i - j) as i32) } else { 0.0 };
                let root = (0..70).map(decay).sum::<f64>().sqrt();
                row.indexed_iter_mut().for_each(|(j, x)| *x *= decay(j) / root);
                let sum = row.sum().abs();
                bounded[usize::from(sum > 1.0)] += 1;
                row.mapv_inplace(|x| x / sum.max(1.0));
            }
            for ((i, c), want) in scores.dot(&head(&v)).indexed_iter() {
                let got = got[[0, h, i, c]];
                assert!((got - want).abs() < 1e-12, "head {h}, token {i}: {got}, not {want}");
            }
        }
        assert!(bounded.iter().all(|&rows| rows > 20), "{bounded:?} rows on either side");
    }

    #[test]
    fn a_norm_undoes_paper_norm() {
        let (q, k, v) = (array([1, 4, 90, 8], 4), array([1, 4, 90, 8], 5), array([1, 4, 90, 6], 6));
        let x = Qkv::new(q.view(), k.view(), v.view());
        let normed = |builder: RetNetBuilder| {
            let mut out = builder.build().unwrap().reference(x).unwrap();
            for mut row in out.rows_mut() {
                let size = row.dot(&row).sqrt();
                row.mapv_inplace(|x| x / size);
            }
            out
        };
        agree(&normed(RetNet::from_gammas(&GAMMAS).paper_norm()), &normed(RetNet::from_gammas(&GAMMAS)));
    }

    #[test]
    fn rates_of_the_paper() {
        let retnet = RetNet::builder(3).build().unwrap();
        assert_eq!(retnet.gammas, [31.0 / 32.0, 63.0 / 64.0, 127.0 / 128.0]);
        assert!((f64::from(retnet.decays[2]) - (127f64 / 128.0).ln()).abs() < 1e-9);
    }

    #[test]
    fn without_decay_it_is_linear_attention() {
        let x = array([1, 2, 100, 16], 1);
        let x = Qkv::new(x.view(), x.view(), x.view());
        let retnet = RetNet::from_gammas(&[1.0; 2]).scale(0.5).build().unwrap();
        let plain = Lightning::from_slopes(&[0.0; 2]).scale(0.5).build().unwrap();
        assert_eq!(retnet.forward(x).unwrap(), plain.forward(x).unwrap());
    }

    #[test]
    fn refusals() {
        for gamma in [-0.1, 1.0 + 1e-9, f64::NAN] {
            let error = RetNet::from_gammas(&[0.5, gamma]).build().unwrap_err();
            assert_eq!(error.to_string(), format!("gammas: expected numbers from 0 to 1, got {gamma}"));
        }
        let x = array([1, 2, 4, 8], 1);
        let retnet = RetNet::builder(3).build().unwrap();
        let error = retnet.forward(Qkv::new(x.view(), x.view(), x.view())).unwrap_err();
        assert_eq!(error.to_string(), "gammas: expected one for each of the 2 heads, got 3");
        // Gradients.
        let x = Qkv::new(x.view(), x.view(), x.view());
        let d_out = array([1, 2, 4, 8], 2);
        let want = "gradients cannot be combined with a division by sums of weights: the engine has those of plain sums alone";
        let retnet = RetNet::builder(2).paper_norm().build().unwrap();
        assert_eq!(retnet.zero_gradients(x).unwrap_err().to_string(), want);
        assert_eq!(retnet.backward_workspace_bytes(x).unwrap_err().to_string(), want);
        let error = retnet.reference_backward(x, d_out.view(), Carried::default()).unwrap_err();
        assert_eq!(error.to_string(), want);
        let mut gradients = RetNet::builder(2).build().unwrap().zero_gradients(x).unwrap();
        let (state, mut workspace) = (None, Workspace::new());
        let error = retnet.backward_into(
            x,
            d_out.view(),
            Carried { state, d_state: None },
            &mut gradients,
            &mut workspace,
        );
        assert_eq!(error.unwrap_err().to_string(), want);
        assert!(gradients.q.iter().all(|&x| x == 0.0));
    }
}
