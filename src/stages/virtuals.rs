//! Virtual keys of each query head: blocks of keys merged by attention, and
//! softmax attention on them and on keys together.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array2, ArrayView3, ArrayView4, Axis, ShapeBuilder, Slice};

use crate::cache::{Cache, Cached};
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::{Sight, Virtual};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence, Site};
use crate::keys::Keys;
use crate::keys::joined::Shared;
use crate::keys::placed::Placed;
use crate::keys::source::KvSource;
use crate::mask::interval::bits_of;
use crate::mask::{Coverage, Mask};
use crate::score::Plain;
use crate::simd::Isa;
use crate::simd::any::{AnyArray, IntoAny};
use crate::simd::mem::Heads;
use crate::stages::attend::{self, Config, Options};
use crate::stages::pass::{Out, Pass, Scratch};
use crate::stages::{scale, states};

/// Query `m` sees block `m` of keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnBlock {
    unit: usize,
}

impl OwnBlock {
    fn keys(&self, site: &Site, queries: &Range<usize>) -> Range<usize> {
        let at = |m: usize| m.saturating_mul(self.unit).min(site.kv_len);
        at(queries.start)..at(queries.end)
    }
}

impl Mask for OwnBlock {
    #[inline(always)]
    fn visible(&self, _: &Site, query: usize, key: usize) -> bool {
        key / self.unit == query
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        self.keys(site, &queries)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let seen = self.keys(site, &queries);
        if seen.start.max(keys.start) < seen.end.min(keys.end) { Coverage::Partial } else { Coverage::Empty }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        bits_of(&self.keys(site, &(query..query + 1)), first)
    }
    fn is_shared(&self) -> bool {
        true
    }
}

/// Merges blocks of keys: attention of one query a block on its keys.
#[derive(Clone, Debug)]
pub(crate) struct Merging(Config<OwnBlock, Plain>);

impl Merging {
    /// Blocks of `unit`, at least 1.
    pub(crate) fn new(unit: usize, scale: Option<f32>, isa: Isa) -> Result<Self> {
        Ok(Self(Options { mask: OwnBlock { unit }, score: Plain, scale, isa: Some(isa) }.build()?))
    }

    /// What the queries, one a block, see of some rows of the keys: `[batch,
    /// q_heads, blocks, dim]`.
    pub(crate) fn run<'p, Q: Element, K: Element>(
        &self,
        pass: &mut Pass<'p>,
        q: ArrayView4<'_, Q>,
        k: ArrayView4<'_, K>,
        rows: ArrayView4<'_, K>,
    ) -> Result<Scratch<'p>> {
        let (batch, heads, blocks, _) = q.dim();
        let mut merged = pass.rows((batch, heads, blocks, rows.dim().3))?;
        let x = Qkv { q, k, v: rows, lengths: Lengths::Full, out: PhantomData::<f32> };
        self.0.attend(pass, x, merged.view_mut())?;
        Ok(merged)
    }

    /// The same of a sequence of a source, from key `first` on: of its keys and of its values.
    pub(crate) fn run_of<'p, Q: Element>(
        &self,
        pass: &mut Pass<'p>,
        q: ArrayView4<'_, Q>,
        (source, sequence): (&dyn KvSource, &Sequence),
        first: usize,
        dims: &Dims,
    ) -> Result<[Scratch<'p>; 2]> {
        let (_, heads, blocks, head_dim) = q.dim();
        let group = heads / dims.kv_heads.max(1);
        let mut rows = |dim| pass.rows((1, heads, blocks, dim));
        let mut merged = [rows(head_dim)?, rows(dims.value_dim)?];
        let keys = Shared(source);
        let sides: [(&dyn KvSource, usize); 2] = [(&keys, head_dim), (source, dims.value_dim)];
        for ((source, value_dim), merged) in sides.into_iter().zip(&mut merged) {
            for kv_head in 0..dims.kv_heads {
                let of = Slice::from(kv_head * group..(kv_head + 1) * group);
                let placed = Placed { source, sequence, kv_head, first, turns: None, chunk: 1, head_dim };
                let kv_len = blocks * self.0.mask().unit;
                let size =
                    Dims { batch: 1, q_heads: group, kv_heads: 1, q_len: blocks, kv_len, value_dim, ..*dims };
                pass.within(|pass| {
                    let mut states = states::rows(pass, (1, group, blocks, value_dim))?;
                    let q = q.slice_axis(Axis(1), of);
                    let size = Dims { packed: false, ..size };
                    self.0.attend_source(pass, (q, &placed), size, Keys::Mask, &mut states)?;
                    let out = merged.view_mut().map(|out| out.slice_axis_move(Axis(1), of));
                    scale::run(pass, self.0.isa(), &states, |_| 1.0, out);
                    Ok(())
                })?;
            }
        }
        Ok(merged)
    }

    /// The definition, of one head.
    pub(crate) fn define<R: Real>(&self, [q, k, rows]: [&Array2<R>; 3]) -> Array2<R> {
        let unit = self.0.mask().unit;
        attend::define([q, k, rows], self.0.scale_of(q.dim().1), |m, j| (j / unit == m).then_some(0.0))
    }
}

/// Some heads of an array.
fn of(x: ArrayView4<'_, f32>, heads: Slice) -> AnyArray<'_> {
    f32::any(Heads::new(x.slice_axis_move(Axis(1), heads)))
}

/// Query heads that share no key/value head, one group after the other, and the virtual keys
/// of these, `[batch, heads, n, dim]`: engines share virtual keys as they do keys, but here
/// each query head may have its own.
fn members<'a>(
    dims: &Dims,
    [k, v]: [ArrayView4<'a, f32>; 2],
    seen: Sight<'a>,
) -> Result<impl Iterator<Item = (Slice, Virtual<'a>)> + use<'a>> {
    let logs = ArrayView3::from_shape((k.dim().0, dims.kv_heads, k.dim().2).strides((0, 0, 0)), &[0.0]);
    let log_weights = logs.map_err(|_| Error::too_large("k", format_args!("{:?}", k.dim())))?;
    let (q_heads, group) = (dims.q_heads, dims.q_heads / dims.kv_heads.max(1));
    Ok((0..group).map(move |member| {
        let of_heads = |heads: usize| match heads == q_heads {
            true => Slice::new(member as isize, None, group as isize),
            false => Slice::from(..),
        };
        let (k, v) = (of(k, of_heads(k.dim().1)), of(v, of_heads(v.dim().1)));
        (of_heads(q_heads), Virtual { k, v, log_weights, seen, q_start: None })
    }))
}

/// Softmax attention on keys, as a mask leaves them, and on virtual ones
/// `[batch, heads, n, dim]`, of as many heads as the queries or the keys.
pub(crate) fn attend<M: Mask, T: Element>(
    config: &Config<M, Plain>,
    pass: &mut Pass<'_>,
    x: Qkv<'_, T>,
    virtuals: [ArrayView4<'_, f32>; 2],
    seen: Sight<'_>,
    mut out: Out<'_, T>,
) -> Result<()> {
    for (heads, extra) in members(&x.dims()?, virtuals, seen)? {
        let q = x.q.slice_axis(Axis(1), heads);
        let out = out.as_mut().map(|out| out.slice_axis_mut(Axis(1), heads));
        config.attend_with(pass, Qkv { q, ..x.reborrow() }, Some(extra), out)?;
    }
    Ok(())
}

/// The same over a cache, with virtual keys of each sequence of it.
pub(crate) fn attend_cached<M: Mask, Q: Element, C: Cache + ?Sized, O: Element>(
    config: &Config<M, Plain>,
    pass: &mut Pass<'_>,
    x: Cached<'_, Q, C, O>,
    virtuals: [ArrayView4<'_, f32>; 2],
    seen: Sight<'_>,
    mut out: Out<'_, O>,
) -> Result<()> {
    for (heads, extra) in members(&x.dims()?, virtuals, seen)? {
        let q = x.q.slice_axis(Axis(1), heads);
        let out = out.as_mut().map(|out| out.slice_axis_mut(Axis(1), heads));
        config.attend_cached_with(pass, x.reborrow().over(q, x.cache), extra, out)?;
    }
    Ok(())
}

/// The definition, of one head: `sees(query, virtual key)`.
pub(crate) fn define<M: Mask, R: Real>(
    config: &Config<M, Plain>,
    [q, k, v]: [&Array2<R>; 3],
    [more_k, more_v]: [&Array2<R>; 2],
    sees: impl Fn(usize, usize) -> bool,
) -> Array2<R> {
    let (n, [q_len, kv_len]) = (more_k.dim().0, [q, k].map(|x| x.dim().0));
    let join = |a: &Array2<R>, b: &Array2<R>| {
        Array2::from_shape_fn((n + kv_len, a.dim().1), |(j, c)| if j < n { a[[j, c]] } else { b[[j - n, c]] })
    };
    let (k, v) = (join(more_k, k), join(more_v, v));
    let site = Site { batch: 0, head: 0, q_len, kv_len };
    let scale = config.scale_of(q.dim().1);
    attend::define([q, &k, &v], scale, |i, j| {
        let seen = if j < n { sees(i, j) } else { config.mask().visible(&site, i, j - n) };
        seen.then_some(0.0)
    })
}
