//! Gated linear attention: a decay for each token and each channel of the
//! keys.

use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate};
use crate::error::Result;
use crate::input::Dims;
use crate::input::gated::ChannelGated;
use crate::input::tokens::all_heads;
use crate::stages::differentiate::{ChannelGatedGradients, differentiable};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};

/// Gated linear attention: a decay for each token and each channel of the
/// keys.
///
/// ```text
/// S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
/// o_t = scale * q_t^T S_t
///     = scale * sum_{j <= t} sum_c q_tc k_jc exp(g_{j+1,c} + .. + g_tc) v_j
/// ```
///
/// "Gated Linear Attention Transformers with Hardware-Efficient Training"
/// (arXiv 2312.06635). Its log decays are `log_sigmoid(x) / 16` of a
/// projection `x` of low rank, which
/// [`log_sigmoid_decays`](crate::math::gates::log_sigmoid_decays) computes. The
/// norm of each head's output and the gate after it are the caller's.
///
/// Cost: `32 (head_dim + value_dim) + 4 head_dim value_dim` flops a token and
/// head, and an exponential and a division a channel. Channels of which 16 tokens
/// leave less than `1e-18` take nearly three times as long. Where the channels of
/// a head decay alike, [`SimpleGla`](super::SimpleGla) is faster.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{ChannelGated, Gla}};
/// use attention_kernels::math::gates::log_sigmoid_decays;
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let log_decay = log_sigmoid_decays(x.view(), 16.0)?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = Gla::builder().build()?.forward(ChannelGated { qkv, log_decay: log_decay.view() })?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Gla {
    config: Config,
}

impl Gla {
    /// Nothing to choose but what every linear mechanism has.
    pub fn builder() -> GlaBuilder {
        GlaBuilder::with()
    }
}

options! {
    /// Builds a [`Gla`].
    GlaBuilder of Gla, form growth scale "1 / sqrt(head_dim)";
    build(this, config) {
        Ok(Gla { config })
    }
}

impl Recurrence for Gla {
    type Operands<'a, T: Element> = ChannelGated<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a ChannelGated<'_, T>) -> Arrays<'a> {
        let qkv = x.qkv.reborrow();
        Arrays { decay: Gate::Channel(x.log_decay.reborrow()), ..Arrays::new(&qkv, all_heads(x)) }
    }

    fn check<T: Element>(&self, x: &ChannelGated<'_, T>, _: &Dims) -> Result<()> {
        self.config.check_decays("log_decay", x.log_decay)
    }
}
recurrent!(Gla, ChannelGated);
differentiable!(Gla, ChannelGated, ChannelGatedGradients);

exhibit! {
    GlaExhibit of Gla, "linear", "GLA", "arXiv 2312.06635";
    "every token says how much of each channel is forgotten";
    not "where one rate a token will do, which is faster, or keys must be overwritten";
    tokens true, forms form;
    build(_, _) {
        Gla::builder()
    }
    extras(x, field) {
        Extras { channels: field.channel_decays(x), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> ChannelGated<'a, T> {
        ChannelGated { qkv: x, log_decay: extras.channels.view() }
    }
}
carded!(Gla, GlaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{Form, Lightning, SimpleGla, TokenGated};
    use crate::testing::{GATES, Gates, agree, array, keeps, pairs, within};
    use crate::{Attention, Bounded};
    use ndarray::{Array4, s};

    #[test]
    fn is_its_form_with_all_pairs() {
        for gates in GATES {
            let (q, k, v) = (array([1, 2, 70, 8], 1), array([1, 2, 70, 8], 2), array([1, 2, 70, 5], 3));
            let g = gates.channels([1, 2, 70, 8], 4);
            let x = ChannelGated { qkv: Qkv::new(q.view(), k.view(), v.view()), log_decay: g.view() };
            let got = Gla::builder().scale(0.5).build().unwrap().reference(x).unwrap();
            let want = pairs(&v, |b, h, i, j| {
                let channel = |c: usize| {
                    let sum: f64 = (j + 1..=i).map(|t| f64::from(g[[b, h, t, c]])).sum();
                    f64::from(q[[b, h, i, c]]) * f64::from(k[[b, h, j, c]]) * sum.exp()
                };
                0.5 * (0..8).map(channel).sum::<f64>()
            });
            agree(&got, &want);
        }
    }

    #[test]
    fn channels_that_decay_alike() {
        let (q, k, v) = (array([1, 2, 150, 16], 1), array([1, 2, 150, 16], 2), array([1, 2, 150, 24], 3));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        for gates in GATES {
            let tokens = gates.tokens([1, 2, 150], 4);
            let channels = Array4::from_shape_fn((1, 2, 150, 16), |(b, h, t, _)| tokens[[b, h, t]]);
            let gla = Gla::builder().build().unwrap();
            let out = gla.forward(ChannelGated { qkv: qkv.reborrow(), log_decay: channels.view() }).unwrap();
            let simple = SimpleGla::builder().build().unwrap();
            let x = TokenGated { qkv: qkv.reborrow(), log_decay: tokens.view() };
            within("simple", &out, &simple.reference(x).unwrap(), &simple.error_bound(x).unwrap());
        }
        // And not at all.
        let zero = Array4::zeros((1, 1, 150, 16));
        let out = Gla::builder()
            .build()
            .unwrap()
            .forward(ChannelGated { qkv: qkv.reborrow(), log_decay: zero.view() })
            .unwrap();
        let plain = Lightning::from_slopes(&[0.0; 2]).scale(0.25).build().unwrap();
        within("plain", &out, &plain.reference(qkv).unwrap(), &plain.error_bound(qkv).unwrap());
    }

    #[test]
    fn a_decay_to_nothing_starts_anew() {
        let (x, v) = (array([1, 2, 200, 16], 1), array([1, 2, 200, 24], 2));
        let gla = Gla::builder().form(Form::Chunked).build().unwrap();
        for nothing in [f32::NEG_INFINITY, -1e4] {
            let mut g = Gates::Mild.channels([1, 2, 200, 16], 3);
            // Where a chunk starts, so that both cut up the rest alike.
            g.slice_mut(s![.., .., 128, ..]).fill(nothing);
            let part = |from: usize| {
                let tokens = s![.., .., from.., ..];
                let qkv = Qkv::new(x.slice(tokens), x.slice(tokens), v.slice(tokens));
                gla.forward(ChannelGated { qkv, log_decay: g.slice(tokens) }).unwrap()
            };
            assert_eq!(part(0).slice(s![.., .., 128.., ..]), part(128));
        }
    }

    #[test]
    fn refusals() {
        let x = array([1, 4, 6, 8], 1);
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let gla = Gla::builder().build().unwrap();
        let error = |g: Array4<f32>| {
            gla.forward(ChannelGated { qkv: qkv.reborrow(), log_decay: g.view() }).unwrap_err().to_string()
        };
        for dim in [(2, 4, 6, 8), (1, 3, 6, 8), (1, 4, 5, 8), (1, 4, 6, 7)] {
            let got = [dim.0, dim.1, dim.2, dim.3];
            let want = format!(
                "log_decay: expected shape [batch, heads, len, head_dim] = [1, 4 or a divisor, 6, 8], got {got:?}"
            );
            assert_eq!(error(Array4::zeros(dim)), want);
        }
        assert_eq!(
            error(Array4::from_elem((1, 1, 6, 8), 0.5)),
            "log_decay: expected log decays of at most 0; allow_growth() permits others, got 0.5"
        );
        let growing = Gla::builder().allow_growth().build().unwrap();
        let g = Array4::from_elem((1, 1, 6, 8), 0.5);
        keeps("growth", &growing, ChannelGated { qkv: qkv.reborrow(), log_decay: g.view() });
        assert!(Gla::builder().scale(f32::INFINITY).build().is_err());
    }
}
