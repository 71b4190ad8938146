//! Structured diffusion guidance: cross-attention averaged over several sets of keys and
//! values, encodings of a prompt and of its noun phrases.

use ndarray::{Array2, ArrayView4, ArrayView5, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Input, Lengths, Qkv};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::{gate, sum};

views! {
    /// Queries, and sets of keys and of values.
    Sets<'a, T> {
        /// Queries, `[batch, q_heads, q_len, head_dim]`.
        q: array ArrayView4<'a, T>,
        /// `[p, batch, kv_heads, kv_len, head_dim]`
        keys: array ArrayView5<'a, T>,
        /// `[r, batch, kv_heads, kv_len, value_dim]`: as many sets as of keys, unless there
        /// is one of either.
        values: array ArrayView5<'a, T>,
    }
    lengths(_) Lengths::Full;
    dims(x) {
        let (p, r) = (x.keys.dim().0, x.values.dim().0);
        if p == 0 {
            let expected = "[sets, batch, kv_heads, kv_len, head_dim] of one set at least";
            return Err(Error::shape("keys", expected, x.keys.shape()));
        }
        if r == 0 || (p != r && p > 1 && r > 1) {
            let sets = if p == 1 { "one set at least".to_owned() } else { format!("{p} sets, as of keys, or one") };
            let expected = format!("[sets, batch, kv_heads, kv_len, value_dim] of {sets}");
            return Err(Error::shape("values", expected, x.values.shape()));
        }
        Qkv::dims(&x.pair(0, 0))
    }
}

impl<T> Sets<'_, T> {
    fn pair(&self, keys: usize, values: usize) -> Qkv<'_, T> {
        let [k, v] = [(&self.keys, keys), (&self.values, values)].map(|(x, t)| x.index_axis(Axis(0), t));
        Qkv::new(self.q.reborrow(), k, v)
    }
}

/// Structured diffusion guidance: cross-attention averaged over several sets of keys and
/// values, encodings of a prompt and of its noun phrases.
///
/// ```text
/// O = 1 / p sum_t softmax(scale Q K_t^T) V_t                   p sets of keys and of values
///   = 1 / (p r) sum_st softmax(scale Q K_s^T) V_t              p or r is 1
/// ```
///
/// "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis"
/// (arXiv 2212.05032). Each set of keys has a softmax of its own: it is not attention over
/// all keys side by side. The half of a batch that has no prompt calls with one
/// pair of sets.
///
/// Cost: attention for each set of keys, whose outputs are added up as they come, in one
/// more array of the output's size than attention has. Sets of values under one set of keys
/// are averaged first, and cost one attention. With one pair it is [`Dense`](super::Dense).
///
/// The mean of attentions.
///
/// ```
/// use attention_kernels::Attention;
/// use attention_kernels::dense::{Guidance, Sets};
/// use ndarray::{Array4, Array5};
///
/// // A prompt and two of its phrases.
/// let q = Array4::<f32>::ones((1, 8, 64, 16));
/// let keys = Array5::from_shape_fn((3, 1, 8, 77, 16), |(t, _, h, j, c)| ((t + h + j * (c + 3)) as f32).sin());
/// let guidance = Guidance::builder().build()?;
/// let out = guidance.forward(Sets { q: q.view(), keys: keys.view(), values: keys.view() })?;
/// assert_eq!(out.dim(), (1, 8, 64, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Guidance {
    attend: Config<Unmasked, Plain>,
}

impl Guidance {
    /// Everything visible.
    pub fn builder() -> GuidanceBuilder {
        GuidanceBuilder::with()
    }
}

options! {
    /// Builds a [`Guidance`].
    GuidanceBuilder of Guidance, isa;
    build(this, config) {
        let _ = this;
        let options = Options { mask: Unmasked, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(Guidance { attend: options.build()? })
    }
}

impl GuidanceBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl<T: Element> Pipeline<Sets<'_, T>> for Guidance {
    type State = ();

    fn flow(
        &self,
        x: Sets<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        mut out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.attend.checked(x.dims()?)?;
        if dims.batch.min(dims.q_heads).min(dims.q_len) == 0 {
            return Ok(());
        }
        let (isa, p, r) = (self.attend.isa(), x.keys.dim().0, x.values.dim().0);
        let pair = |t: usize| x.pair(t.min(p - 1), t.min(r - 1));
        if p == 1 && r == 1 {
            return self.attend.attend(pass, pair(0), out);
        }
        if p == 1 {
            let (dim, share) = (pair(0).v.dim(), 1.0 / r as f32);
            let (mut mean, mut part) = (pass.rows(dim)?, pass.rows(dim)?);
            gate::run(pass, isa, pair(0).v, &[], |_| share, mean.view_mut());
            for t in 1..r {
                gate::run(pass, isa, pair(t).v, &[], |_| share, part.view_mut());
                sum::add::<f32>(pass, isa, &mut mean, &part, 1.0, None);
            }
            return self.attend.attend_to(pass, pair(0), mean.view(), out);
        }
        let dim = x.out_dim()?;
        let (mut total, mut part) = (pass.rows(dim)?, pass.rows(dim)?);
        self.attend.attend(pass, pair(0).widened(), total.view_mut())?;
        for t in 1..p {
            self.attend.attend(pass, pair(t).widened(), part.view_mut())?;
            let to = if t + 1 == p { out.take() } else { None };
            sum::add(pass, isa, &mut total, &part, 1.0 / p as f32, to);
        }
        Ok(())
    }

    fn define<R: Real>(&self, x: Sets<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.attend.checked(x.dims()?)?;
        let (scale, p, r) = (self.attend.scale(&dims), x.keys.dim().0, x.values.dim().0);
        let all = if dims.batch.min(dims.q_heads).min(dims.q_len) == 0 { 0 } else { p };
        let pairs = (0..all).flat_map(|s| (0..r).map(move |t| (s, t)));
        let pairs: Vec<_> = pairs.filter(|(s, t)| s == t || p == 1 || r == 1).collect();
        let share = R::rounded(1.0 / pairs.len() as f64, 1.0);
        let out = of_heads(&dims, &Lengths::Full, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let mut out = Array2::from_elem((q.dim().0, dims.value_dim), R::of(0.0));
            for &(s, t) in &pairs {
                let Qkv { k, v, .. } = x.pair(s, t);
                let [k, v] = [k, v].map(|x| head.rows::<R, T>(&x, &head.keys));
                let part = attend([&q, &k, &v], scale, |_, _| true, |_, _, score| score);
                out.zip_mut_with(&part, |out, &part| *out = *out + part);
            }
            out.mapv_inplace(|x| x * share);
            out
        });
        Ok((out, ()))
    }
}

composite!(Guidance, Sets);

exhibit! {
    GuidanceExhibit of Guidance, "dense", "structured diffusion guidance", "arXiv 2212.05032";
    "the mean of attentions over sets of keys, each with values of its own";
    not "where a prompt has one encoding: dense attention";
    tokens false;
    build(_, _) { Guidance::builder() }
    extras(x, _) {
        // Two sets of keys, of which one has its channels in reverse, and the same values.
        let twice = |dim: (usize, usize, usize, usize)| (2 * dim.0, dim.1, dim.2, dim.3);
        let ((batch, _, _, dim), own) = (x.k.dim(), x.v.dim().0);
        let key = |(b, h, j, c)| if b < batch { x.k[[b, h, j, c]] } else { x.k[[b - batch, h, j, dim - 1 - c]] };
        let value = |(b, h, j, c): (usize, usize, usize, usize)| x.v[[b % own.max(1), h, j, c]];
        let keys = ndarray::Array4::from_shape_fn(twice(x.k.dim()), key);
        Extras { keys, values: ndarray::Array4::from_shape_fn(twice(x.v.dim()), value), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Sets<'a, T> {
        let [keys, values] = [&extras.keys, &extras.values].map(|x| {
            let (batch, heads, len, dim) = x.dim();
            let two = x.view().into_shape_with_order((2, batch / 2, heads, len, dim));
            two.expect("twice as many as there are")
        });
        Sets { q: x.q, keys, values }
    }
}
carded!(Guidance, GuidanceExhibit);

#[cfg(test)]
mod tests;
