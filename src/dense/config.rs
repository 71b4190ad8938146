//! What the dense mechanisms have in common: mask, score, scale, instruction
//! set, and the checks of a call.

use ndarray::{ArrayViewMut3, ArrayViewMut4};

use crate::attention::Cost;
use crate::dense::reference::{Definition, Normalisation};
use crate::element::Element;
use crate::engine::call::{Call, Gains, Norm};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::Keys;
use crate::mask::{Mask, Unmasked};
use crate::score::{Plain, Score};
use crate::simd::Isa;

/// Options that every dense mechanism has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options<M = Unmasked, F = Plain> {
    pub(crate) mask: M,
    pub(crate) score: F,
    pub(crate) scale: Option<f32>,
    pub(crate) isa: Option<Isa>,
}

impl<M: Mask, F: Score> Options<M, F> {
    pub(crate) fn mask<N: Mask>(self, mask: N) -> Options<N, F> {
        Options { mask, score: self.score, scale: self.scale, isa: self.isa }
    }

    pub(crate) fn score<G: Score>(self, score: G) -> Options<M, G> {
        Options { mask: self.mask, score, scale: self.scale, isa: self.isa }
    }

    pub(crate) fn build(self) -> Result<Config<M, F>> {
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::value("scale", "a finite number", scale));
        }
        Ok(Config { mask: self.mask, score: self.score, scale: self.scale, isa: Isa::choose(self.isa)? })
    }
}

/// [`Options`] that have been checked.
#[derive(Clone, Debug)]
pub(crate) struct Config<M, F> {
    mask: M,
    score: F,
    scale: Option<f32>,
    isa: Isa,
}

impl<M: Mask + Clone> Config<M, Plain> {
    /// The same with a change of scores.
    pub(crate) fn with_score<F: Score>(&self, score: F) -> Config<M, F> {
        Config { mask: self.mask.clone(), score, scale: self.scale, isa: self.isa }
    }
}

impl<M: Mask, F: Score> Config<M, F> {
    fn dims<T>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        self.mask.check(&dims)?;
        self.score.check(&dims)?;
        Ok(dims)
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn scale(&self, dims: &Dims) -> f64 {
        self.scale.map_or(1.0 / (dims.head_dim.max(1) as f64).sqrt(), f64::from)
    }

    /// The call of an engine, its arrays checked.
    pub(crate) fn call<'a, T: Element>(
        &'a self,
        x: Qkv<'a, T>,
        norm: Norm<'a>,
        gains: Option<Gains<'a>>,
    ) -> Result<Call<'a>> {
        let dims = self.dims(&x)?;
        let scale = self.scale(&dims) as f32;
        Ok(Call {
            x: x.into(),
            dims,
            mask: &self.mask,
            keys: Keys::Mask,
            score: &self.score,
            norm,
            scale,
            gains,
            isa: self.isa,
        })
    }

    /// The definition of the same.
    pub(crate) fn definition<'a, T: Element>(
        &'a self,
        x: Qkv<'a, T>,
        normalisation: Normalisation<'a>,
        gains: Option<Gains<'a>>,
    ) -> Result<Definition<'a, T, M, F>> {
        let dims = self.dims(&x)?;
        let gains = gains.map(|gains| (gains.query, gains.value));
        let scale = self.scale(&dims);
        Ok(Definition { x, dims, mask: &self.mask, score: &self.score, scale, normalisation, gains })
    }

    /// Multiply-adds of the visible pairs, and every array once.
    pub(crate) fn cost<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Cost> {
        let dims = self.dims(x)?;
        let mut pairs = 0;
        for sequence in (0..dims.batch).map(|i| x.lengths.sequence(&dims, i)) {
            let heads = if self.mask.is_shared() { dims.q_heads.min(1) } else { dims.q_heads };
            let repeats = dims.q_heads.checked_div(heads).unwrap_or(0) as u64;
            for head in 0..heads {
                let site = sequence.site(head);
                for query in 0..site.q_len {
                    let hull = self.mask.hull(&site, query..query + 1);
                    for first in (hull.start / 64 * 64..hull.end).step_by(64) {
                        let valid = u64::MAX >> (64 - (site.kv_len - first).min(64));
                        let bits = self.mask.bits(&site, query, first) & valid;
                        pairs += repeats * u64::from(bits.count_ones());
                    }
                }
            }
        }
        let elements =
            x.q.len() + x.k.len() + x.v.len() + x.q.dim().0 * dims.q_heads * dims.q_len * dims.value_dim;
        Ok(Cost {
            flops: 2 * pairs * (dims.head_dim + dims.value_dim) as u64,
            bytes: (elements * size_of::<T>()) as u64,
        })
    }
}

/// Refuses an output that does not fit.
pub(crate) fn check_out<T, U>(x: &Qkv<'_, U>, out: &ArrayViewMut4<'_, T>) -> Result<()> {
    let (batch, q_heads, q_len, _) = x.q.dim();
    let value_dim = x.v.dim().3;
    if out.dim() == (batch, q_heads, q_len, value_dim) {
        return Ok(());
    }
    let expected = format!("[batch, q_heads, q_len, value_dim] = [{batch}, {q_heads}, {q_len}, {value_dim}]");
    Err(Error::shape("out", expected, out.shape()))
}

/// Refuses an LSE output that does not fit.
pub(crate) fn check_lse<U>(x: &Qkv<'_, U>, lse: &ArrayViewMut3<'_, f32>) -> Result<()> {
    let (batch, q_heads, q_len, _) = x.q.dim();
    if lse.dim() == (batch, q_heads, q_len) {
        return Ok(());
    }
    let expected = format!("[batch, q_heads, q_len] = [{batch}, {q_heads}, {q_len}]");
    Err(Error::shape("lse", expected, lse.shape()))
}

/// The builder methods that every dense mechanism has. Mask and score can be
/// set once: a second one would silently replace the first, so there is no
/// such method.
macro_rules! common_options {
    ($builder:ident { $($own:ident),* }) => {
        impl<F: crate::score::Score> $builder<crate::mask::Unmasked, F> {
            /// Which keys a query may see. Combine masks with
            /// [`Mask::and`](crate::mask::Mask::and), `or` and `not`.
            pub fn mask<M: crate::mask::Mask>(self, mask: M) -> $builder<M, F> {
                $builder { options: self.options.mask(mask), $($own: self.$own),* }
            }

            /// `mask(Causal::new())`: keys at the query's position and before,
            /// the last query at the last key.
            pub fn causal(self) -> $builder<crate::mask::Causal, F> {
                self.mask(crate::mask::Causal::new())
            }
        }

        impl<M: crate::mask::Mask> $builder<M, crate::score::Plain> {
            /// What happens to scores before they become weights. Combine
            /// changes with [`Score::then`](crate::score::Score::then).
            pub fn score<F: crate::score::Score>(self, score: F) -> $builder<M, F> {
                $builder { options: self.options.score(score), $($own: self.$own),* }
            }
        }

        impl<M: crate::mask::Mask, F: crate::score::Score> $builder<M, F> {
            /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::simd::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }
        }
    };
}
pub(crate) use common_options;
