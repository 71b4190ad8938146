//! VideoBooth's attention over frames: an exemplar speaks to the first frame, and that
//! to all.

use ndarray::{Array2, Array4, ArrayView4, Slice, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv};
use crate::keys::arrays::Laid;
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::joined;
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

views! {
    /// Queries, keys and values of frames, one after the other, and keys and values of an
    /// exemplar. Not for packed batches.
    WithExemplar<'a, T> {
        /// Of `frames * tokens` each.
        qkv: array Qkv<'a, T>,
        /// `[batch, kv_heads, exemplar_len, head_dim]`
        exemplar_k: array ArrayView4<'a, T>,
        /// `[batch, kv_heads, exemplar_len, value_dim]`
        exemplar_v: array ArrayView4<'a, T>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let dims = x.qkv.dims()?;
        if dims.packed {
            return Err(Error::packed("frames"));
        }
        if !matches!(x.qkv.lengths, Lengths::Full) {
            let reason = "every token of a frame has a key";
            return Err(Error::Conflict { option: "key lengths", with: "frames", reason });
        }
        if dims.kv_len != dims.q_len {
            return Err(Error::value("k", format!("one key for each of {} queries", dims.q_len), dims.kv_len));
        }
        let (Dims { batch, kv_heads, head_dim, value_dim, .. }, len) = (dims, x.exemplar_k.dim().2);
        let arrays = [("exemplar_k", &x.exemplar_k, head_dim), ("exemplar_v", &x.exemplar_v, value_dim)];
        for (argument, array, dim) in arrays {
            if array.dim() != (batch, kv_heads, len, dim) {
                let expected = format!("[batch, kv_heads, exemplar_len, dim] = [{batch}, {kv_heads}, {len}, {dim}]");
                return Err(Error::shape(argument, expected, array.shape()));
            }
        }
        Dims { kv_len: dims.kv_len.saturating_add(len), ..dims }.checked()?;
        Ok(dims)
    }
}

/// VideoBooth's attention over frames: an exemplar speaks to the first frame, and that
/// to all.
///
/// ```text
/// o'  = attention(q_0, [k_exemplar, k_0], [v_exemplar, v_0])        of the first frame
/// o_f = attention(q_f, [k_0, k_p], [o', v_p])      p = max(f - 1, 0), where v_0 is o'
/// ```
///
/// "VideoBooth: Diffusion-based Video Generation with Image Prompts" (arXiv 2312.00777),
/// and its code. `o'` has the heads of the queries: where these share keys, each has its
/// own values of the first frame.
///
/// Cost: each frame is attention over the keys of two; nothing is joined. The first
/// frame's outputs are kept.
///
/// Attention over frames, of which the first has an exemplar.
///
/// ```
/// use attention_kernels::dense::{VideoBooth, WithExemplar};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// // 4 frames of 64 tokens.
/// let x = Array4::from_shape_fn((1, 2, 4 * 64, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let exemplar = Array4::<f32>::ones((1, 2, 49, 16));
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let x = WithExemplar { qkv, exemplar_k: exemplar.view(), exemplar_v: exemplar.view() };
/// let out = VideoBooth::builder(4).build()?.forward(x)?;
/// assert_eq!(out.dim(), (1, 2, 256, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VideoBooth {
    attend: Config<Unmasked, Plain>,
    frames: usize,
}

impl VideoBooth {
    /// So many frames.
    pub fn builder(frames: usize) -> VideoBoothBuilder {
        VideoBoothBuilder::with(frames)
    }

    /// Frames of `n` tokens that there is something to do for.
    fn counted(&self, n: usize) -> usize {
        if n == 0 { 0 } else { self.frames }
    }

    /// Checks an input; returns its sizes and the tokens of a frame.
    fn checked<T: Element>(&self, x: &WithExemplar<'_, T>) -> Result<(Dims, usize)> {
        let dims = x.dims()?;
        if !dims.q_len.is_multiple_of(self.frames) {
            return Err(Error::value("q", format!("tokens of {} frames", self.frames), dims.q_len));
        }
        Ok((dims, dims.q_len / self.frames))
    }
}

options! {
    /// Builds a [`VideoBooth`].
    VideoBoothBuilder of VideoBooth, isa;
    given { frames: usize; }
    build(this, config) {
        if this.frames == 0 {
            return Err(Error::value("frames", "at least 1", 0));
        }
        let options = Options { mask: Unmasked, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(VideoBooth { attend: options.build()?, frames: this.frames })
    }
}

impl VideoBoothBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

/// The rows of a frame of `n` tokens.
fn tokens<'a, T>(x: ArrayView4<'a, T>, n: usize, frame: usize) -> ArrayView4<'a, T> {
    x.slice_move(s![.., .., frame * n..(frame + 1) * n, ..])
}

impl<T: Element> Pipeline<WithExemplar<'_, T>> for VideoBooth {
    type State = ();

    fn flow(
        &self,
        x: WithExemplar<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        mut out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, n) = self.checked(&x)?;
        let x = x.reborrow();
        let group = dims.q_heads / dims.kv_heads.max(1);
        let any = |x| T::any(Heads::new(x));
        let mut first = pass.rows((dims.batch, dims.q_heads, n, dims.value_dim))?;
        let laid = |[k, v]: [_; 2]| Laid { k: any(k), v: any(v) };
        let both = [[x.exemplar_k, x.exemplar_v], [tokens(x.qkv.k, n, 0), tokens(x.qkv.v, n, 0)]].map(laid);
        joined::attend(&self.attend, pass, tokens(x.qkv.q, n, 0), both, first.view_mut())?;
        let first = first.view();
        // Query heads that share keys have values of their own: one of each group at a time.
        for (frame, member) in (0..self.counted(n)).flat_map(|frame| (0..group).map(move |m| (frame, m))) {
            let heads = Slice::new(member as isize, None, group as isize);
            let before = frame.saturating_sub(1);
            let anchor = f32::any(Heads::new(first.slice(s![.., heads, .., ..])));
            let values = if before == 0 { anchor } else { any(tokens(x.qkv.v, n, before)) };
            let [first, own] = [tokens(x.qkv.k, n, 0), tokens(x.qkv.k, n, before)].map(any);
            let both = [Laid { k: first, v: anchor }, Laid { k: own, v: values }];
            let to = out.as_mut().map(|out| out.slice_mut(s![.., heads, frame * n..(frame + 1) * n, ..]));
            let q = tokens(x.qkv.q, n, frame).slice_move(s![.., heads, .., ..]);
            joined::attend(&self.attend, pass, q, both, to)?;
        }
        Ok(())
    }

    fn define<R: Real>(&self, x: WithExemplar<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, n) = self.checked(&x)?;
        let scale = self.attend.scale(&dims);
        let out = of_heads(&dims, &Lengths::Full, |head| {
            let of =
                |x: &ArrayView4<'_, T>, frame: usize| head.rows::<R, T>(x, &(frame * n..(frame + 1) * n));
            let sees = |q: &Array2<R>, k: [Array2<R>; 2], v: [Array2<R>; 2]| {
                attend([q, &joined::join(k), &joined::join(v)], scale, |_, _| true, |_, _, score| score)
            };
            let [k, v] = [&x.exemplar_k, &x.exemplar_v].map(|x| head.rows::<R, T>(x, &(0..x.dim().2)));
            let first = sees(&of(&x.qkv.q, 0), [k, of(&x.qkv.k, 0)], [v, of(&x.qkv.v, 0)]);
            let first = first.mapv(R::stored);
            let mut out = Array2::from_elem((dims.q_len, dims.value_dim), R::of(0.0));
            for frame in 0..self.counted(n) {
                let before = frame.saturating_sub(1);
                let values = if before == 0 { first.clone() } else { of(&x.qkv.v, before) };
                let k = [of(&x.qkv.k, 0), of(&x.qkv.k, before)];
                let read = sees(&of(&x.qkv.q, frame), k, [first.clone(), values]);
                out.slice_mut(s![frame * n..(frame + 1) * n, ..]).assign(&read);
            }
            out
        });
        Ok((out, ()))
    }
}

composite!(VideoBooth, WithExemplar);

exhibit! {
    VideoBoothExhibit of VideoBooth, "dense", "VideoBooth", "arXiv 2312.00777";
    "frames see the first one, which an exemplar has spoken to, and the one before them";
    not "where a token should see all frames: dense attention";
    tokens true;
    build(x, _) { VideoBooth::builder([3, 2, 1].into_iter().find(|&n| x.q.dim().2.is_multiple_of(n)).unwrap_or(1)) }
    extras(x, field) {
        let ((batch, heads, len, dim), value_dim) = (x.k.dim(), x.v.dim().3);
        let exemplar = |which, dim| {
            let at = |(_, h, j, c): (usize, usize, usize, usize)| T::from_f32(field.at(which, h, j, c));
            Array4::from_shape_fn((batch, heads, len.min(20), dim), at)
        };
        Extras { keys: exemplar(1, dim), values: exemplar(2, value_dim), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithExemplar<'a, T> {
        WithExemplar { qkv: x, exemplar_k: extras.keys.view(), exemplar_v: extras.values.view() }
    }
}
carded!(VideoBooth, VideoBoothExhibit);

#[cfg(test)]
mod tests;
