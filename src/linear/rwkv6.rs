//! RWKV-6, "Finch": a decay for each token and channel, and queries that
//! weigh their own token for themselves.

use ndarray::{Array2, ArrayView2};

use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate};
use crate::error::Result;
use crate::input::Dims;
use crate::input::gated::ChannelGated;
use crate::input::tokens::{Tokens, all_heads};
use crate::stages::differentiate::{Rwkv6Gradients, differentiable};
use crate::stages::options::{FINITE, options};
use crate::stages::recur::{Config, Recurrence, check_channels, recurrent};

/// RWKV-6, "Finch": a decay for each token and channel, and queries that
/// weigh their own token for themselves.
///
/// ```text
/// o_t = scale * q_t^T (S_{t-1} + diag(bonus) k_t v_t^T)
/// S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
/// ```
///
/// "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence"
/// (arXiv 2404.05892), where queries are called receptances `r`, log decays are
/// `g = -exp(w)` of a projection `w`, and the bonus is `u`. A token decays what
/// was before it only after its query has read. Eagle, RWKV-5, is the same with
/// decays that do not depend on the token: a view with a stride of 0 along the
/// length. Shifts between tokens, the norm of each head's output and the gate
/// after it are the caller's.
///
/// Cost: as [`Gla`](super::Gla). Below some hundred tokens softmax attention is
/// as fast, and it recalls what a state of fixed size has no room for.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{ChannelGated, Rwkv6}};
/// use ndarray::{Array2, Array4};
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let log_decay = x.mapv(|w| -w.exp());
/// let bonus = Array2::from_elem((4, 32), 0.5); // heads, head_dim
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let rwkv = Rwkv6::builder(bonus.view()).build()?;
/// let out = rwkv.forward(ChannelGated { qkv, log_decay: log_decay.view() })?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rwkv6 {
    config: Config,
    /// `[heads, head_dim]`, in that order in memory.
    bonus: Array2<f32>,
}

impl Rwkv6 {
    /// What queries weigh the channels of their own token's key with,
    /// `[heads, head_dim]`.
    pub fn builder(bonus: ArrayView2<'_, f32>) -> Rwkv6Builder {
        Rwkv6Builder::with(bonus.as_standard_layout().into_owned())
    }
}

options! {
    /// Builds a [`Rwkv6`].
    Rwkv6Builder of Rwkv6, form growth scale "1";
    given { bonus: Array2<f32>, in FINITE; }
    build(this, config) {
        Ok(Rwkv6 { config, bonus: this.bonus })
    }
}

impl Recurrence for Rwkv6 {
    type Operands<'a, T: Element> = ChannelGated<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a ChannelGated<'_, T>) -> Arrays<'a> {
        let qkv = x.qkv.reborrow();
        let bonus = Some(self.bonus.as_slice().unwrap_or_default());
        Arrays { decay: Gate::Channel(x.log_decay.reborrow()), bonus, ..Arrays::new(&qkv, all_heads(x)) }
    }

    fn check<T: Element>(&self, x: &ChannelGated<'_, T>, dims: &Dims) -> Result<()> {
        check_channels("bonus", self.bonus.dim(), dims)?;
        self.config.check_decays("log_decay", x.log_decay)
    }

    fn bytes<T: Element>(&self, x: &ChannelGated<'_, T>) -> usize {
        x.bytes() + size_of::<f32>() * self.bonus.len()
    }
}
recurrent!(Rwkv6, ChannelGated);
differentiable!(Rwkv6, ChannelGated, Rwkv6Gradients);

exhibit! {
    Rwkv6Exhibit of Rwkv6, "linear", "RWKV-6", "arXiv 2404.05892";
    "channels forget, and a token sees itself through a bonus";
    not "where keys must be overwritten: use RWKV-7";
    tokens true, forms form, variants 2;
    build(x, field) {
        let builder = Rwkv6::builder(field.heads(2, x).view());
        if field.variant == 0 { builder } else { builder.scale(0.5) }
    }
    extras(x, field) {
        Extras { channels: field.channel_decays(x), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> ChannelGated<'a, T> {
        ChannelGated { qkv: x, log_decay: extras.channels.view() }
    }
}
carded!(Rwkv6, Rwkv6Exhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{Carried, Form, Lightning};
    use crate::testing::{GATES, Gates, agree, array, pairs, within};
    use crate::{Attention, Backward, Bounded};
    use ndarray::{Array4, s};

    fn bonus(heads: usize, dim: usize) -> Array2<f32> {
        array([1, 1, heads, dim], 9).into_shape_with_order((heads, dim)).unwrap()
    }

    #[test]
    fn is_its_form_with_all_pairs() {
        for gates in GATES {
            let (q, k, v) = (array([1, 2, 70, 8], 1), array([1, 2, 70, 8], 2), array([1, 2, 70, 5], 3));
            let (g, u) = (gates.channels([1, 2, 70, 8], 4), bonus(2, 8));
            let x = ChannelGated { qkv: Qkv::new(q.view(), k.view(), v.view()), log_decay: g.view() };
            let got = Rwkv6::builder(u.view()).scale(0.5).build().unwrap().reference(x).unwrap();
            let want = pairs(&v, |b, h, i, j| {
                // The decay of the query's own token comes after it.
                let channel = |c: usize| {
                    let sum: f64 = (j + 1..i).map(|t| f64::from(g[[b, h, t, c]])).sum();
                    let weight = if i == j { f64::from(u[[h, c]]) } else { sum.exp() };
                    f64::from(q[[b, h, i, c]]) * f64::from(k[[b, h, j, c]]) * weight
                };
                0.5 * (0..8).map(channel).sum::<f64>()
            });
            agree(&got, &want);
        }
    }

    #[test]
    fn a_bonus_of_one_without_decay_is_linear_attention() {
        let (q, k, v) = (array([1, 2, 150, 16], 1), array([1, 2, 150, 16], 2), array([1, 2, 150, 24], 3));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let (zero, one) = (Array4::zeros((1, 1, 150, 16)), Array2::ones((2, 16)));
        let rwkv = Rwkv6::builder(one.view()).build().unwrap();
        let out = rwkv.forward(ChannelGated { qkv, log_decay: zero.view() }).unwrap();
        let plain = Lightning::from_slopes(&[0.0; 2]).build().unwrap();
        within("plain", &out, &plain.reference(qkv).unwrap(), &plain.error_bound(qkv).unwrap());
    }

    #[test]
    fn without_a_bonus_tokens_do_not_see_themselves() {
        for (form, len) in [(Form::Chunked, 70), (Form::Recurrent, 70), (Form::Auto, 3)] {
            let (q, v) = (array([1, 1, len, 16], 1), array([1, 1, len, 24], 3));
            let g = Gates::Mild.channels([1, 1, len, 16], 2);
            let rwkv = Rwkv6::builder(Array2::zeros((1, 16)).view()).form(form).build().unwrap();
            let out = |v: &Array4<f32>| {
                let qkv = Qkv::new(q.view(), q.view(), v.view());
                rwkv.forward(ChannelGated { qkv, log_decay: g.view() }).unwrap()
            };
            let with = out(&v);
            assert!(with.slice(s![.., .., 0, ..]).iter().all(|&x| x == 0.0));
            let mut other = v.clone();
            other.slice_mut(s![.., .., len - 1, ..]).fill(100.0);
            assert_eq!(with, out(&other));
        }
    }

    /// The bonus is shared by sequences; outputs are linear in it.
    #[test]
    fn gradients_of_the_bonus() {
        let (x, u) = (array([2, 2, 70, 8], 1), bonus(2, 8));
        let g = Gates::Mild.channels([2, 2, 70, 8], 2);
        let x = ChannelGated { qkv: Qkv::new(x.view(), x.view(), x.view()), log_decay: g.view() };
        let d_out = array([2, 2, 70, 8], 3);
        let rwkv = |u: &Array2<f32>| Rwkv6::builder(u.view()).scale(0.5).build().unwrap();
        let loss = |u: &Array2<f32>| {
            let out = rwkv(u).reference(x).unwrap();
            out.iter().zip(&d_out).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
        };
        let found = rwkv(&u).backward(x, d_out.view(), Carried::default()).unwrap().bonus;
        let exact = rwkv(&u).reference_backward(x, d_out.view(), Carried::default()).unwrap().bonus;
        for (at, got) in found.indexed_iter() {
            let (mut more, mut less) = (u.clone(), u.clone());
            (more[at], less[at]) = (1.0, -1.0);
            let want = (loss(&more) - loss(&less)) / 2.0;
            assert!((f64::from(*got) - want).abs() < 1e-4 && (exact[at] - want).abs() < 1e-9, "{at:?}");
        }
    }

    #[test]
    fn a_bonus_of_any_strides() {
        let x = array([1, 2, 20, 16], 1);
        let g = Gates::Mild.channels([1, 2, 20, 16], 2);
        let x = ChannelGated { qkv: Qkv::new(x.view(), x.view(), x.view()), log_decay: g.view() };
        let rows = bonus(2, 16);
        let columns = rows.t().as_standard_layout().into_owned();
        let out = |bonus: ArrayView2<'_, f32>| Rwkv6::builder(bonus).build().unwrap().forward(x).unwrap();
        assert_eq!(out(rows.view()), out(columns.t()));
    }

    #[test]
    fn refusals() {
        let x = array([1, 2, 6, 8], 1);
        let g = Gates::Mild.channels([1, 2, 6, 8], 2);
        let x = ChannelGated { qkv: Qkv::new(x.view(), x.view(), x.view()), log_decay: g.view() };
        let rwkv = Rwkv6::builder(bonus(2, 7).view()).build().unwrap();
        assert_eq!(
            rwkv.forward(x).unwrap_err().to_string(),
            "bonus: expected shape [heads, head_dim] = [2, 8], got [2, 7]"
        );
        let error = Rwkv6::builder(Array2::from_elem((2, 8), f32::NAN).view()).build().unwrap_err();
        assert_eq!(error.to_string(), "bonus: expected finite numbers, got NaN");
        let g = Array4::from_elem((1, 1, 6, 8), 0.5);
        let x = ChannelGated { log_decay: g.view(), ..x };
        let error = Rwkv6::builder(bonus(2, 8).view()).build().unwrap().forward(x).unwrap_err();
        assert_eq!(
            error.to_string(),
            "log_decay: expected log decays of at most 0; allow_growth() permits others, got 0.5"
        );
    }
}
