//! RWKV-7: a delta rule that removes under one key and writes under another.

use ndarray::{Array2, Array4};

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::{Token, Update, row};
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::{
    Arrays, Back, Gate, Keys, Made, Place, Remove, RemoveBack, Source, Undone, as_loaded, copy_rows,
};
use crate::error::Result;
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::all_heads;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::differentiate::{Differentiable, Rwkv7Gradients, backward_pass};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};

input! {
    /// What [`Rwkv7`] takes; queries are the receptances `r`, keys the
    /// replacement keys `k`.
    Rwkv7Input(rkv) {
        /// `w`: natural logarithms of what a token leaves of each channel of
        /// the state, at most 0.
        log_decay: f32 [batch, heads/, len, head_dim],
        /// Removal keys, of unit length or zero.
        kappa: T [batch, heads/, len, head_dim],
        /// `a`: in-context learning rates, from 0 to 1.
        rate: f32 [batch, heads/, len, head_dim],
    }
}

/// RWKV-7: a delta rule that removes under one key and writes under another.
///
/// ```text
/// S_t = diag(exp w_t) S_{t-1} - (kappa_t * a_t) (kappa_t^T S_{t-1}) + k_t v_t^T
/// o_t = scale * r_t^T S_t
/// ```
///
/// "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (arXiv
/// 2503.14456). `r` is the receptance (the query), `w` the log decay of each
/// channel, `kappa` the removal key, of unit length, `a` the in-context
/// learning rate of each channel, from 0 to 1, and `k` the replacement key.
/// Some sources give `w` as the logarithm of minus the log decay: here it is
/// the log decay. What the paper's layer computes before and after is in
/// [`math::delta_gates`](crate::math::delta_gates): `rwkv7_log_decay`,
/// `rwkv7_removal_key`, `rwkv7_key` and `rwkv7_bonus`.
///
/// What is removed is looked up in the state before its decay; the delta rule
/// of [`Kda`](crate::linear::Kda) looks it up after.
///
/// Cost: `32 (5 head_dim + 4 value_dim) + 8 head_dim value_dim` flops a token
/// and head. [`Kda`](crate::linear::Kda) is cheaper where one key serves for
/// both. The decays of the paper's layer stay on the fast path of the kernel; where
/// 16 tokens leave less than 1e-18 of a channel the kernel takes a slower path.
///
/// ```
/// use attention_kernels::math::delta_gates::{rwkv7_key, rwkv7_log_decay, rwkv7_removal_key};
/// use attention_kernels::{Attention, Qkv, linear::{Rwkv7, Rwkv7Input}};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let log_decay = x.mapv(rwkv7_log_decay);
/// let rate = Array4::from_elem(x.dim(), 0.5f32);
/// let k = x.mapv(|k| rwkv7_key(k, 0.5, 1.0));
/// let mut kappa = x.clone();
/// for mut row in kappa.rows_mut() {
///     rwkv7_removal_key(row.as_slice_mut().unwrap(), &[1.0; 16]);
/// }
///
/// let rkv = Qkv::new(x.view(), k.view(), x.view());
/// let x = Rwkv7Input { rkv, log_decay: log_decay.view(), kappa: kappa.view(), rate: rate.view() };
/// let out = Rwkv7::builder().build()?.forward(x)?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rwkv7 {
    config: Config,
}

impl Rwkv7 {
    /// As the paper has it.
    pub fn builder() -> Rwkv7Builder {
        Rwkv7Builder::with()
    }
}

options! {
    /// Builds an [`Rwkv7`].
    Rwkv7Builder of Rwkv7, form growth scale "1";
    build(this, config) {
        Ok(Rwkv7 { config })
    }
}

impl Recurrence for Rwkv7 {
    type Operands<'a, T: Element> = Rwkv7Input<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a Rwkv7Input<'_, T>) -> Arrays<'a> {
        let rkv = x.rkv.reborrow();
        let kappa = T::any(Heads::new(x.kappa.reborrow()));
        let rate = AnyArray::F32(Heads::new(x.rate.reborrow()));
        Arrays {
            decay: Gate::Channel(x.log_decay.reborrow()),
            low_rank: Some((kappa, rate)),
            ..Arrays::new(&rkv, all_heads(x))
        }
    }

    fn check<T: Element>(&self, x: &Rwkv7Input<'_, T>, _: &Dims) -> Result<()> {
        self.config.check_decays("log_decay", x.log_decay)
    }

    fn with_source<T: Element, R>(&self, x: &Rwkv7Input<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let keys = |isa: Isa, at: &Place, to: Keys<'_>| {
            let used = at.tokens.len() * to.stride;
            isa.dispatch(Remove { kappa: &mut to.a[..used], rate: &mut to.b[..used] });
        };
        let (arrays, rate) = (self.arrays(x), AnyArray::F32(Heads::new(x.rate.reborrow())));
        let back = |isa: Isa, at: &Place, of: Back<'_>| {
            let used = at.tokens.len() * of.stride;
            copy_rows(isa, arrays.rows(rate, at), of.scratch, of.stride);
            let (a, rate) = (&of.a[..used], &of.scratch[..used]);
            isa.dispatch(RemoveBack { a, rate, d_a: &mut of.d_a[..used], d_b: &mut of.d_b[..used] });
        };
        run(&Undone { made: Made { arrays, queries: as_loaded, keys }, back })
    }

    fn token<T: Element>(&self, x: &Rwkv7Input<'_, T>, at: &Place) -> Token {
        let mut token = Token::of(&self.arrays(x), at);
        if let Update::LowRank { a: kappa, b: rate } = &mut token.update {
            // a = -kappa, b = kappa * a
            for (kappa, rate) in kappa.iter_mut().zip(rate) {
                (*kappa, *rate) = (-*kappa, *kappa * *rate);
            }
        }
        token
    }
}
recurrent!(Rwkv7, Rwkv7Input);

impl Differentiable for Rwkv7 {
    type Gradients<A> = Rwkv7Gradients<A>;

    fn token_back<T: Element>(&self, x: &Rwkv7Input<'_, T>, at: &Place, found: &mut Found) {
        let heads = all_heads(x);
        let (kappa, rate) = (row(&x.kappa, at, heads), row(&x.rate, at, heads));
        for (c, (d_a, d_b)) in found.a.iter_mut().zip(&mut found.b).enumerate() {
            (*d_a, *d_b) = (*d_b * rate[c] - *d_a, *d_b * kappa[c]);
        }
    }
}
backward_pass!(Rwkv7, Rwkv7Input, Rwkv7Gradients);

exhibit! {
    Rwkv7Exhibit of Rwkv7, "linear", "RWKV-7", "arXiv 2503.14456";
    "channels forget, and what is under a removal key is replaced";
    not "where a removal key of its own is not needed: the delta rules are faster";
    tokens true, forms form;
    build(_, _) {
        Rwkv7::builder()
    }
    extras(x, field) {
        let (_, heads, len, dim) = x.q.dim();
        let norm = Array2::from_shape_fn((heads, len), |(h, t)| {
            (0..dim).map(|c| field.at(3, h, t, c).powi(2)).sum::<f32>().sqrt().max(1e-3)
        });
        let kappa = |(_, h, t, c): (usize, usize, usize, usize)| {
            T::from_f32((field.round)(field.at(3, h, t, c) / norm[[h, t]]))
        };
        Extras {
            channels: field.channel_decays(x),
            rates: field.channels(2, x, share),
            keys: Array4::from_shape_fn(x.q.dim(), kappa),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> Rwkv7Input<'a, T> {
        Rwkv7Input {
            rkv: x,
            log_decay: extras.channels.view(),
            kappa: extras.keys.view(),
            rate: extras.rates.view(),
        }
    }
}
carded!(Rwkv7, Rwkv7Exhibit);
