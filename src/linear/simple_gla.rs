//! Simple gated linear attention: a decay for each token and head.

use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate};
use crate::error::Result;
use crate::input::Dims;
use crate::input::gated::TokenGated;
use crate::input::tokens::all_heads;
use crate::stages::differentiate::{TokenGatedGradients, differentiable};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};

/// Simple gated linear attention: a decay for each token and head.
///
/// ```text
/// S_t = exp(g_t) S_{t-1} + k_t v_t^T
/// o_t = scale * q_t^T S_t = scale * sum_{j <= t} exp(g_{j+1} + .. + g_t) (q_t . k_j) v_j
/// ```
///
/// The form of Mamba-2's "Transformers are SSMs" (arXiv 2405.21060) with
/// decays as they are, and of "Gated Linear Attention" (arXiv 2312.06635) with
/// one decay for all channels. [`Mamba2`](super::Mamba2) makes decays and keys
/// of a step; [`Gla`](super::Gla) has a decay for each channel.
///
/// Cost: `32 (head_dim + value_dim) + 4 head_dim value_dim` flops a token and
/// head. Where decays do not depend on tokens, [`RetNet`](super::RetNet) needs
/// no array of them.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{SimpleGla, TokenGated}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let log_decay = Array3::from_elem((1, 4, 100), -0.1);
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let gla = SimpleGla::builder().build()?;
/// let out = gla.forward(TokenGated { qkv, log_decay: log_decay.view() })?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SimpleGla {
    config: Config,
}

impl SimpleGla {
    /// Nothing to choose but what every linear mechanism has.
    pub fn builder() -> SimpleGlaBuilder {
        SimpleGlaBuilder::with()
    }
}

options! {
    /// Builds a [`SimpleGla`].
    SimpleGlaBuilder of SimpleGla, form growth scale "1 / sqrt(head_dim)";
    build(this, config) {
        Ok(SimpleGla { config })
    }
}

impl Recurrence for SimpleGla {
    type Operands<'a, T: Element> = TokenGated<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a TokenGated<'_, T>) -> Arrays<'a> {
        let qkv = x.qkv.reborrow();
        Arrays { decay: Gate::Token(x.log_decay.reborrow()), ..Arrays::new(&qkv, all_heads(x)) }
    }

    fn check<T: Element>(&self, x: &TokenGated<'_, T>, _: &Dims) -> Result<()> {
        self.config.check_decays("log_decay", x.log_decay)
    }
}
recurrent!(SimpleGla, TokenGated);
differentiable!(SimpleGla, TokenGated, TokenGatedGradients);

exhibit! {
    SimpleGlaExhibit of SimpleGla, "linear", "simple GLA", "arXiv 2312.06635";
    "every token says how much is forgotten";
    not "where channels must forget at rates of their own, or keys must be overwritten";
    tokens true, forms form;
    build(_, _) {
        SimpleGla::builder()
    }
    extras(x, field) {
        Extras { decays: field.token_decays(x), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> TokenGated<'a, T> {
        TokenGated { qkv: x, log_decay: extras.decays.view() }
    }
}
carded!(SimpleGla, SimpleGlaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::input::Qkv;
    use crate::linear::{Form, RetNet};
    use crate::testing::{GATES, Gates, agree, array, keeps, pairs};
    use ndarray::{Array3, s};

    #[test]
    fn is_its_form_with_all_pairs() {
        for gates in GATES {
            let (q, k, v) = (array([1, 2, 70, 8], 1), array([1, 2, 70, 8], 2), array([1, 2, 70, 5], 3));
            let g = gates.tokens([1, 2, 70], 4);
            let x = TokenGated { qkv: Qkv::new(q.view(), k.view(), v.view()), log_decay: g.view() };
            let got = SimpleGla::builder().scale(0.5).build().unwrap().reference(x).unwrap();
            let want = pairs(&v, |b, h, i, j| {
                let dot: f64 = (0..8).map(|c| f64::from(q[[b, h, i, c]]) * f64::from(k[[b, h, j, c]])).sum();
                let sum: f64 = (j + 1..=i).map(|t| f64::from(g[[b, h, t]])).sum();
                0.5 * dot * sum.exp()
            });
            agree(&got, &want);
        }
    }

    #[test]
    fn constant_decays_are_retention() {
        let x = array([1, 2, 150, 16], 1);
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let retnet = RetNet::builder(2).build().unwrap();
        let gammas = [31f64 / 32.0, 63.0 / 64.0];
        let g = Array3::from_shape_fn((1, 2, 150), |(_, h, _)| gammas[h].ln() as f32);
        let gla = SimpleGla::builder().build().unwrap();
        let out = gla.forward(TokenGated { qkv: qkv.reborrow(), log_decay: g.view() }).unwrap();
        assert_eq!(out, retnet.forward(qkv).unwrap());
    }

    #[test]
    fn a_decay_to_nothing_starts_anew() {
        let (x, v) = (array([1, 2, 200, 16], 1), array([1, 2, 200, 24], 2));
        let gla = SimpleGla::builder().form(Form::Chunked).build().unwrap();
        for nothing in [f32::NEG_INFINITY, -1e4] {
            let mut g = Gates::Mild.tokens([1, 2, 200], 3);
            // Where a chunk starts, so that both cut up the rest alike.
            g.slice_mut(s![.., .., 128]).fill(nothing);
            let part = |from: usize| {
                let tokens = s![.., .., from.., ..];
                let qkv = Qkv::new(x.slice(tokens), x.slice(tokens), v.slice(tokens));
                gla.forward(TokenGated { qkv, log_decay: g.slice(s![.., .., from..]) }).unwrap()
            };
            assert_eq!(part(0).slice(s![.., .., 128.., ..]), part(128));
        }
    }

    #[test]
    fn refusals() {
        let x = array([1, 4, 6, 8], 1);
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let gla = SimpleGla::builder().build().unwrap();
        let error = |g: Array3<f32>| {
            gla.forward(TokenGated { qkv: qkv.reborrow(), log_decay: g.view() }).unwrap_err().to_string()
        };
        for dim in [(2, 4, 6), (1, 3, 6), (1, 0, 6), (1, 4, 5)] {
            let got = [dim.0, dim.1, dim.2];
            let want = format!(
                "log_decay: expected shape [batch, heads, len] = [1, 4 or a divisor, 6], got {got:?}"
            );
            assert_eq!(error(Array3::zeros(dim)), want);
        }
        assert_eq!(
            error(Array3::from_elem((1, 1, 6), 0.5)),
            "log_decay: expected log decays of at most 0; allow_growth() permits others, got 0.5"
        );
        let growing = SimpleGla::builder().allow_growth().build().unwrap();
        let g = Array3::from_elem((1, 1, 6), 0.5);
        keeps("growth", &growing, TokenGated { qkv: qkv.reborrow(), log_decay: g.view() });
        assert!(SimpleGla::builder().scale(f32::NAN).build().is_err());
    }
}
