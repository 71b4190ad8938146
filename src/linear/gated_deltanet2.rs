//! Gated DeltaNet-2: a delta rule with gates of their own for what is erased
//! and for what is written.

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::{Token, Update, row};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate, Keys, Made, Place, Source};
use crate::error::Result;
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::all_heads;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::delta_rule::DeltaRule;
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};
use crate::stages::removal;

input! {
    /// Queries, keys and values with log decays and erase gates of channels of
    /// the keys, and write gates of channels of the values: what
    /// [`GatedDeltaNet2`] takes.
    GatedDelta2Qkv(qkv) {
        /// Natural logarithms of what a token leaves of each channel of the
        /// state: at most 0, `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len, head_dim],
        /// How much of what is stored under each channel of its key a token
        /// erases: from 0 to 1, or to 2.
        erase: f32 [batch, heads/, len, head_dim],
        /// How much of each channel of its value it writes: from 0 to 1.
        write: f32 [batch, heads/, len, value_dim],
    }
}

/// Gated DeltaNet-2: a delta rule with gates of their own for what is erased
/// and for what is written.
///
/// ```text
/// S'_t = diag(exp g_t) S_{t-1}
/// S_t  = S'_t - k_t ((b_t * k_t)^T S'_t) + k_t (w_t * v_t)^T
/// o_t  = scale * q_t^T S_t
/// ```
///
/// "Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention" (arXiv
/// 2605.22791). `g_t` is one log decay a token and channel of the keys, of at
/// most 0, computed as that of [`Kda`](crate::linear::Kda); `b_t` is the erase
/// gate of each channel of the keys, from 0 to 1, or to 2 where models let it
/// turn around what is stored; `w_t` is the write gate of each channel of the
/// values, from 0 to 1. Where both are the same number for all channels it is
/// [`Kda`](crate::linear::Kda), which is faster. Heads of queries, keys and
/// gates may be fewer than those of values.
///
/// Cost: as [`Rwkv7`](crate::linear::Rwkv7), with which it shares the rule.
///
/// ```
/// use attention_kernels::math::{delta_gates::log_decay, gates::sigmoid};
/// use attention_kernels::{Attention, Qkv, linear::{GatedDelta2Qkv, GatedDeltaNet2}};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let (decay, gate) = (x.mapv(|raw| log_decay(raw, -3.0, 0.0)), x.mapv(sigmoid));
///
/// let gated = GatedDeltaNet2::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = gated.forward(GatedDelta2Qkv::new(qkv.reborrow(), decay.view(), gate.view(), gate.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GatedDeltaNet2 {
    rule: DeltaRule,
}

impl GatedDeltaNet2 {
    /// Queries and keys as they are.
    pub fn builder() -> GatedDeltaNet2Builder {
        GatedDeltaNet2Builder::with()
    }
}

options! {
    /// Builds a [`GatedDeltaNet2`].
    GatedDeltaNet2Builder of GatedDeltaNet2, form growth scale "1 / sqrt(head_dim)";
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        Ok(GatedDeltaNet2 { rule: DeltaRule { config, normalize: this.normalize_qk } })
    }
}

impl Recurrence for GatedDeltaNet2 {
    type Operands<'a, T: Element> = GatedDelta2Qkv<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a GatedDelta2Qkv<'_, T>) -> Arrays<'a> {
        let arrays = Arrays::new(&x.qkv.reborrow(), all_heads(x));
        // Erase gates come in the place of what they make of the keys.
        let erase = AnyArray::F32(Heads::new(x.erase.reborrow()));
        let low_rank = Some((erase, arrays.k.without_columns()));
        Arrays { decay: Gate::Channel(x.log_decay.reborrow()), low_rank, ..arrays }
    }

    fn check<T: Element>(&self, x: &GatedDelta2Qkv<'_, T>, _: &Dims) -> Result<()> {
        self.rule.config.check_decays("log_decay", x.log_decay)
    }

    fn with_source<T: Element, R>(&self, x: &GatedDelta2Qkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let (arrays, dim) = (self.arrays(x), x.qkv.q.dim().3);
        let write = AnyArray::F32(Heads::new(x.write.reborrow()));
        let queries = |isa: Isa, at: &Place, to: &mut [f32], stride| {
            self.rule.loaded(isa, to, at.tokens.len(), dim, stride);
        };
        let keys = |isa: Isa, at: &Place, to: Keys<'_>| {
            self.rule.loaded(isa, to.k, at.tokens.len(), dim, to.stride);
            removal::erase(isa, to, at.tokens.len(), arrays.rows(write, at));
        };
        run(&Made { arrays, queries, keys })
    }

    fn token<T: Element>(&self, x: &GatedDelta2Qkv<'_, T>, at: &Place) -> Token {
        let arrays = self.arrays(x);
        let mut token = self.rule.token(&arrays, at);
        let erase = row(&x.erase, at, arrays.heads).into_iter().zip(token.k.iter().zip(&token.decay));
        let a = erase.map(|(erase, (k, decay))| -erase * k * decay).collect();
        token.v.iter_mut().zip(row(&x.write, at, arrays.heads)).for_each(|(v, write)| *v *= write);
        Token { update: Update::LowRank { a, b: token.k.clone() }, ..token }
    }
}
recurrent!(GatedDeltaNet2, GatedDelta2Qkv);

exhibit! {
    GatedDeltaNet2Exhibit of GatedDeltaNet2, "linear", "Gated DeltaNet-2", "arXiv 2605.22791";
    "channels of keys are erased, and channels of values written, at rates of their own";
    not "where one weight serves for both: KDA is faster";
    tokens true, forms form, variants 2;
    build(_, field) {
        let builder = GatedDeltaNet2::builder().normalize_qk();
        // Keys of other lengths could let the state grow.
        if field.variant == 0 { builder } else { builder.scale(0.3) }
    }
    extras(x, field) {
        let write = |(_, h, t, c)| share(field.at(3, h, t, c));
        let (batch, heads, len, _) = x.q.dim();
        Extras {
            channels: field.channel_decays(x),
            rates: field.channels(2, x, share),
            writes: ndarray::Array4::from_shape_fn((batch, heads, len, x.v.dim().3), write),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> GatedDelta2Qkv<'a, T> {
        GatedDelta2Qkv::new(x, extras.channels.view(), extras.rates.view(), extras.writes.view())
    }
}
carded!(GatedDeltaNet2, GatedDeltaNet2Exhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{ChannelGated, Form, Gla, Kda, KdaQkv};
    use crate::testing::{GATES, Gates, array, unit, within};
    use crate::{Attention, Bounded};
    use ndarray::Array4;

    fn gated(form: Form) -> GatedDeltaNet2 {
        GatedDeltaNet2::builder().form(form).build().unwrap()
    }

    #[test]
    fn equal_gates_are_kda() {
        let (q, k, v) = (array([1, 2, 90, 16], 1), unit(array([1, 2, 90, 16], 2)), array([1, 4, 90, 24], 3));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let beta = array([1, 1, 2, 90], 4).mapv(share).into_shape_with_order((1, 2, 90)).unwrap();
        let of = |dim| Array4::from_shape_fn((1, 2, 90, dim), |(b, h, t, _)| beta[[b, h, t]]);
        for (gates, form) in
            GATES.into_iter().flat_map(|gates| [(gates, Form::Chunked), (gates, Form::Recurrent)])
        {
            let g = gates.channels([1, 2, 90, 16], 5);
            let (erase, write) = (of(16), of(24));
            let out = gated(form).forward(GatedDelta2Qkv::new(
                qkv.reborrow(),
                g.view(),
                erase.view(),
                write.view(),
            ));
            let (kda, x) =
                (Kda::builder().build().unwrap(), KdaQkv::new(qkv.reborrow(), g.view(), beta.view()));
            let bound = 2.0 * kda.error_bound(x).unwrap();
            within("kda", &out.unwrap(), &kda.reference(x).unwrap(), &bound);
        }
    }

    #[test]
    fn what_erases_nothing_and_writes_everything_is_gated_linear_attention() {
        let (q, k, v) = (array([1, 2, 90, 16], 1), array([1, 2, 90, 16], 2), array([1, 2, 90, 24], 3));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let (g, none, all) = (
            Gates::Mild.channels([1, 2, 90, 16], 5),
            Array4::zeros((1, 1, 90, 16)),
            Array4::ones((1, 1, 90, 24)),
        );
        let x = ChannelGated { qkv: qkv.reborrow(), log_decay: g.view() };
        let gla = Gla::builder().build().unwrap();
        for form in [Form::Chunked, Form::Recurrent] {
            let out = gated(form)
                .forward(GatedDelta2Qkv::new(qkv.reborrow(), g.view(), none.view(), all.view()))
                .unwrap();
            within("gla", &out, &gla.reference(x).unwrap(), &gla.error_bound(x).unwrap());
        }
        // What is not written is not there.
        let nothing = Array4::zeros((1, 1, 90, 24));
        let out = gated(Form::Auto).forward(GatedDelta2Qkv::new(
            qkv.reborrow(),
            g.view(),
            all.view().slice_move(ndarray::s![.., .., .., ..16]),
            nothing.view(),
        ));
        assert!(out.unwrap().iter().all(|&x| x == 0.0));
    }

    #[test]
    fn refusals() {
        let x = array([1, 2, 6, 8], 1);
        let (qkv, zero) = (Qkv::new(x.view(), x.view(), x.view()), Array4::zeros((1, 2, 6, 8)));
        let (narrow, growth) = (Array4::zeros((1, 2, 6, 7)), Array4::from_elem((1, 1, 6, 8), 0.5));
        let error = |x| gated(Form::Auto).forward(x).unwrap_err().to_string();
        for (x, want) in [
            (
                GatedDelta2Qkv::new(qkv.reborrow(), zero.view(), narrow.view(), zero.view()),
                "erase: expected shape [batch, heads, len, head_dim] = [1, 2 or a divisor, 6, 8], got [1, 2, 6, 7]",
            ),
            (
                GatedDelta2Qkv::new(qkv.reborrow(), zero.view(), zero.view(), narrow.view()),
                "write: expected shape [batch, heads, len, value_dim] = [1, 2 or a divisor, 6, 8], got [1, 2, 6, 7]",
            ),
            (
                GatedDelta2Qkv::new(qkv.reborrow(), growth.view(), zero.view(), zero.view()),
                "log_decay: expected log decays of at most 0; allow_growth() permits others, got 0.5",
            ),
        ] {
            assert_eq!(error(x), want);
        }
        // Gates of more heads than values count.
        let (g, many) = (Array4::zeros((1, 1, 6, 8)), Array4::zeros((1, 4, 6, 8)));
        let out = gated(Form::Auto)
            .forward(GatedDelta2Qkv::new(qkv.reborrow(), g.view(), g.view(), many.view()))
            .unwrap();
        assert_eq!(out.dim(), (1, 4, 6, 8));
    }
}
