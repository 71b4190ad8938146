//! Augmented self-attention: the keys and values of a reference beside a token's own,
//! in one softmax.

use ndarray::{ArrayView3, ArrayView4};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::{attend, shifted};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Qkv};
use crate::keys::arrays::Laid;
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::joined::{self, Beside, Correction};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

views! {
    /// Queries, keys and values, and keys and values of a reference. Not for packed
    /// batches.
    WithReference<'a, T> {
        /// A token's own.
        qkv: array Qkv<'a, T>,
        /// `[batch, kv_heads, ref_len, head_dim]`
        ref_k: array ArrayView4<'a, T>,
        /// `[batch, kv_heads, ref_len, value_dim]`
        ref_v: array ArrayView4<'a, T>,
        /// `M`, `[batch | 1, q_heads | 1, q_len, ref_len]`; -inf hides a key.
        correction: maybe Option<ArrayView4<'a, f32>>,
        /// What of the reference a query sees, `[batch | 1, q_len, ref_len]`.
        visible: maybe Option<ArrayView3<'a, bool>>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let dims = x.qkv.dims()?;
        if dims.packed {
            return Err(Error::packed("a reference"));
        }
        let Dims { batch, q_heads, kv_heads, q_len, head_dim, value_dim, .. } = dims;
        let len = x.ref_k.dim().2;
        for (argument, array, dim) in [("ref_k", &x.ref_k, head_dim), ("ref_v", &x.ref_v, value_dim)] {
            if array.dim() != (batch, kv_heads, len, dim) {
                let expected = format!("[batch, kv_heads, ref_len, dim] = [{batch}, {kv_heads}, {len}, {dim}]");
                return Err(Error::shape(argument, expected, array.shape()));
            }
        }
        if let Some(tile) = &x.correction {
            let (b, h, rows, cols) = tile.dim();
            if ![1, batch].contains(&b) || ![1, q_heads].contains(&h) || (rows, cols) != (q_len, len) {
                let expected = format!(
                    "[batch | 1, q_heads | 1, q_len, ref_len] = [{batch} | 1, {q_heads} | 1, {q_len}, {len}]"
                );
                return Err(Error::shape("correction", expected, tile.shape()));
            }
        }
        if let Some(visible) = &x.visible {
            let (b, rows, cols) = visible.dim();
            if ![1, batch].contains(&b) || (rows, cols) != (q_len, len) {
                let expected = format!("[batch | 1, q_len, ref_len] = [{batch} | 1, {q_len}, {len}]");
                return Err(Error::shape("visible", expected, visible.shape()));
            }
        }
        Dims { kv_len: dims.kv_len.saturating_add(len), ..dims }.checked()?;
        Ok(dims)
    }
}

impl<'a, T> WithReference<'a, T> {
    /// All of the reference, its scores as they are.
    pub fn new(qkv: Qkv<'a, T>, ref_k: ArrayView4<'a, T>, ref_v: ArrayView4<'a, T>) -> Self {
        Self { qkv, ref_k, ref_v, correction: None, visible: None }
    }

    /// With [`correction`](Self::correction).
    pub fn corrected(self, correction: ArrayView4<'a, f32>) -> Self {
        Self { correction: Some(correction), ..self }
    }

    /// With [`visible`](Self::visible).
    pub fn visible(self, visible: ArrayView3<'a, bool>) -> Self {
        Self { visible: Some(visible), ..self }
    }
}

/// Augmented self-attention: the keys and values of a reference beside a token's own,
/// in one softmax.
///
/// ```text
/// o_i = sum_j w_ij v_j          over own keys j and those of the reference
/// w   = softmax of  scale q_i . k_j                         own
///                   scale q_i . k_j + M_ij - max(M) / 4     of the reference
/// ```
///
/// "AM-Adapter" (arXiv 2412.03150), whose corrections `M` a convolution over the scores
/// of the reference and a correspondence of both images gives, which is the caller's,
/// and whose other form hides what does not correspond; the largest of `M` is that of the
/// whole batch. Entries without a condition have no `M`, and nothing is taken off: they are
/// a call of their own. Without `M` it is what editing of images shares between a source
/// and what is drawn, as in DiffUHaul (arXiv 2406.01594); keys that are interpolated on the
/// way from one to the other are sums of arrays. [`VideoBooth`](super::VideoBooth) does it
/// frame by frame.
///
/// A reference without keys is self-attention, and so is one of a token's own keys and
/// values; results of both parts merged by their LSE are the same.
///
/// Cost: as attention over as many keys; arrays are read where they lie. Corrections are
/// read once, and once more for their largest.
///
/// Attention with a reference.
///
/// ```
/// use attention_kernels::dense::{Augmented, WithReference};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((2, 4, 64, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let (reference, tile) = (Array4::<f32>::ones((2, 4, 64, 16)), Array4::zeros((1, 1, 64, 64)));
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let x = WithReference::new(qkv, reference.view(), reference.view()).corrected(tile.view());
/// let out = Augmented::builder().build()?.forward(x)?;
/// assert_eq!(out.dim(), (2, 4, 64, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Augmented {
    attend: Config<Unmasked, Plain>,
    level: Option<f32>,
}

impl Augmented {
    /// Every query sees all of its own keys.
    pub fn builder() -> AugmentedBuilder {
        AugmentedBuilder::with()
    }

    /// What is taken off corrections.
    fn level<T>(&self, x: &WithReference<'_, T>) -> f32 {
        let most = || x.correction.as_ref().map_or(0.0, joined::largest) / 4.0;
        self.level.unwrap_or_else(most)
    }
}

options! {
    /// Builds an [`Augmented`].
    AugmentedBuilder of Augmented, isa;
    maybe {
        /// What is taken off corrections. Default: a quarter of the largest, 0 where that is
        /// not finite.
        level: f32, in FINITE;
    }
    build(this, config) {
        let options = Options { mask: Unmasked, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(Augmented { attend: options.build()?, level: this.level })
    }
}

impl AugmentedBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl<T: Element> Pipeline<WithReference<'_, T>> for Augmented {
    type State = ();

    fn flow(
        &self,
        x: WithReference<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        crate::input::Input::dims(&x)?;
        let x = x.reborrow();
        let split = x.ref_k.dim().2;
        let less = if out.is_some() { self.level(&x) } else { 0.0 };
        let [first, second] = [[x.ref_k, x.ref_v], [x.qkv.k, x.qkv.v]].map(|x| {
            let [k, v] = x.map(|x| T::any(Heads::new(x)));
            Laid { k, v }
        });
        let mask = Beside { split, visible: x.visible, lengths: x.qkv.lengths };
        let config = self.attend.with_score(Correction { tile: x.correction, less }).masked(mask);
        joined::attend(&config, pass, x.qkv.q, [first, second], out)
    }

    fn define<R: Real>(&self, x: WithReference<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, n) = (crate::input::Input::dims(&x)?, x.ref_k.dim().2);
        let of = |len: usize, i: usize| if len == 1 { 0 } else { i };
        let largest = |tile: &ArrayView4<'_, f32>| tile.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let most = x.correction.as_ref().map_or(0.0, largest);
        let quarter = if most.is_finite() { most / 4.0 } else { 0.0 };
        let less = R::of(f64::from(self.level.unwrap_or(quarter)));
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let q = head.rows::<R, T>(&x.qkv.q, &head.queries);
            let [k, v] = [[&x.ref_k, &x.qkv.k], [&x.ref_v, &x.qkv.v]]
                .map(|[a, b]| joined::join([head.rows::<R, T>(a, &(0..n)), head.rows(b, &head.keys)]));
            let sees = |i: usize, j: usize| {
                j >= n || x.visible.as_ref().is_none_or(|x| x[[of(x.dim().0, head.batch), i, j]])
            };
            let score = |i: usize, j: usize, score: R| match &x.correction {
                Some(tile) if j < n => {
                    let (b, h) = (of(tile.dim().0, head.batch), of(tile.dim().1, head.head));
                    shifted(score, R::of(f64::from(tile[[b, h, i, j]])) - less)
                }
                _ => score,
            };
            attend([&q, &k, &v], self.attend.scale(&dims), sees, score)
        });
        Ok((out, ()))
    }
}

composite!(Augmented, WithReference);

exhibit! {
    AugmentedExhibit of Augmented, "dense", "AM-Adapter", "arXiv 2412.03150";
    "own keys and those of a reference in one softmax, scores of the latter corrected";
    not "where the reference is the same for all of a batch: a prefix of a cache, and dense attention";
    tokens false;
    build(_, _) { Augmented::builder() }
    extras(x, field) {
        let ((batch, heads, len, dim), value_dim) = (x.k.dim(), x.v.dim().3);
        let reference = |which, dim| {
            let at = |(_, h, j, c): (usize, usize, usize, usize)| T::from_f32(field.at(which, h, j, c));
            ndarray::Array4::from_shape_fn((batch, heads, len / 2, dim), at)
        };
        let (_, heads, q_len, _) = x.q.dim();
        let correction = |(_, h, i, j): (usize, usize, usize, usize)| 2.0 * field.at(3, h, i, j);
        let channels = ndarray::Array4::from_shape_fn((1, heads, q_len, len / 2), correction);
        Extras { keys: reference(1, dim), values: reference(2, value_dim), channels, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithReference<'a, T> {
        WithReference::new(x, extras.keys.view(), extras.values.view()).corrected(extras.channels.view())
    }
}
carded!(Augmented, AugmentedExhibit);

#[cfg(test)]
mod tests;
