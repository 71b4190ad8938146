//! Attentive pools: queries read all tokens of a sequence, elements of all heads of a
//! token side by side.

use ndarray::{Array2, Array4, ArrayView4, Axis, s};

use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::reading::Pooling;
use crate::input::{Input, Lengths, Qkv, countable};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::attend::Config;
use crate::stages::pass::{Out, Pass};
use crate::stages::{side, sum};

/// Refuses tokens of another width than `dim`, if that is known, and queries of another
/// than `width`.
pub(crate) fn check<T: Element>(x: &Pooling<'_, T>, dim: Option<usize>, width: usize) -> Result<()> {
    let (dims, (batch, heads, len, part)) = (x.dims()?, x.tokens.dim());
    let own = heads.checked_mul(part);
    if own.is_none() || dim.is_some_and(|dim| own != Some(dim)) {
        let expected = format!("heads and dim of {} elements together", dim.unwrap_or(usize::MAX));
        return Err(Error::shape("tokens", expected, x.tokens.shape()));
    }
    if let Some(queries) = x.queries.as_ref().filter(|queries| queries.dim().2 != width) {
        return Err(Error::shape("queries", format!("[batch, n, {width}]"), queries.shape()));
    }
    let wide = own.unwrap_or(0).saturating_add(width);
    if countable(&[batch, len.saturating_add(dims.q_len), wide, 1 << 10]) {
        return Ok(());
    }
    Err(Error::too_large("tokens", format_args!("{:?}", x.tokens.shape())))
}

/// Queries pool values `[batch, 1, len, dim]`, whose keys have scores.
pub(crate) fn pool<Q: Element, T: Element>(
    attend: &Config<Unmasked, Plain>,
    pass: &mut Pass<'_>,
    x: &Pooling<'_, T>,
    [k, v]: [ArrayView4<'_, f32>; 2],
    q: ArrayView4<'_, Q>,
    out: Out<'_, T>,
) -> Result<()> {
    let (_, heads, _, part) = x.tokens.dim();
    let mut read = pass.rows((v.dim().0, 1, q.dim().2, v.dim().3))?;
    let lengths = x.lengths.map_or(Lengths::Full, Lengths::Keys);
    let call = Qkv { lengths, ..Qkv::<Q, f32>::new(q, k, v) };
    attend.attend(pass, call.widened(), read.view_mut())?;
    sum::of(pass, attend.isa(), &[read.of_heads(heads, part)], out);
    Ok(())
}

/// The definition of one sequence at a time: what `define` makes of its tokens and queries.
pub(crate) fn define<R: Real, T: Element>(
    x: &Pooling<'_, T>,
    define: impl Fn(&Array2<R>, Option<Array2<R>>) -> Array2<R>,
) -> Result<Array4<R>> {
    let mut out = Array4::from_elem(x.out_dim()?, R::of(0.0));
    for (b, mut out) in out.outer_iter_mut().enumerate() {
        let len = x.lengths.map_or(x.tokens.dim().2, |lengths| lengths[b]);
        let queries = x.queries.as_ref().map(|q| q.index_axis(Axis(0), b).map(|x| R::of(x.to_f64())));
        side::spread(&define(&side::define(x.tokens.slice(s![b, .., ..len, ..])), queries), &mut out);
    }
    Ok(out)
}

/// What pools are shown on.
pub(crate) mod showing {
    use ndarray::{Array1, Array2, Array3};

    use crate::card::{Extras, Field};
    use crate::element::Element;
    use crate::input::Qkv;
    use crate::stages::reading::Linear;

    /// A layer of an exhibit.
    pub(crate) fn layer(field: &Field, which: u64, [out, of]: [usize; 2]) -> Linear {
        let root = 1.0 / (of.max(1) as f32).sqrt();
        let weights = Array2::from_shape_fn((out, of), |(a, b)| root * field.at(which, a, b, 0));
        (weights, Some(Array1::from_shape_fn(out, |c| 0.3 * field.at(which, c, 0, 1))))
    }

    /// Values of all heads as tokens, with queries of so many elements.
    pub(crate) fn arrays<T: Element>(x: &Qkv<'_, T>, field: &Field, width: usize) -> Extras<T> {
        let (batch, _, rows, _) = x.q.dim();
        // Counted from the last, so that the last queries alone are what they were.
        let at = |(_, i, c): (usize, usize, usize)| T::from_f32(2.0 * field.at(3, 0, rows - i, c));
        let latents = Array3::from_shape_fn((batch, rows, width), at);
        Extras { values: Extras::pixels(x), latents, ..Extras::default() }
    }
}
