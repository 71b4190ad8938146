//! Softmax attention over keys and values of a reference and those after them, which
//! are read where they lie: nothing is joined.

use std::ops::Range;

use ndarray::{Array2, ArrayView3, ArrayView4, ArrayViewMut4, Axis, s};

use crate::element::Element;
use crate::engine;
use crate::engine::call::{Arrays, Norm};
use crate::error::Result;
use crate::input::{Dims, Lengths, Site};
use crate::keys::arrays::Laid;
use crate::keys::joined::Joined;
use crate::mask::interval::bits_of;
use crate::mask::{Coverage, Mask, pack};
use crate::score::{Score, define_shift, shift};
use crate::simd::Simd;
use crate::stages::attend::{Config, price};
use crate::stages::pass::Pass;

/// Writes what queries `[batch, q_heads, q_len, head_dim]` see.
pub(crate) fn attend<M: Mask, F: Score, Q: Element, O: Element>(
    config: &Config<M, F>,
    pass: &mut Pass<'_>,
    q: ArrayView4<'_, Q>,
    parts: [Laid<'_>; 2],
    out: Option<ArrayViewMut4<'_, O>>,
) -> Result<()> {
    let ((batch, q_heads, q_len, head_dim), (_, kv_heads, own, _)) = (q.dim(), parts[1].k.dim());
    let (split, value_dim) = (parts[0].k.dim().2, parts[0].v.dim().3);
    let kv_len = split.saturating_add(own);
    let dims = Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false };
    let dims = config.checked(dims.checked()?)?;
    let joined = &Joined { parts: [&parts[0], &parts[1]], split, dims: [head_dim, value_dim] };
    let call = config.over(Arrays::sourced(q, joined), dims, Norm::Softmax { sinks: None }, None);
    let flops = || price(call.mask, &dims, |i| Lengths::Full.sequence(&dims, i), 0, 0).flops;
    pass.stage(flops, engine::workspace_bytes(&call), |arena| {
        if let Some(out) = out {
            engine::run_in(&call, out, None, arena);
        }
    });
    Ok(())
}

/// Both parts of the definition as one.
pub(crate) fn join<R: Clone>([first, second]: [Array2<R>; 2]) -> Array2<R> {
    ndarray::concatenate![Axis(0), first, second]
}

/// Which keys a query sees: of the reference, `split` of them, what an array `[batch |
/// 1, q_len, split]` says, and the first ones after it, as many as there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside<'a> {
    pub(crate) split: usize,
    pub(crate) visible: Option<ArrayView3<'a, bool>>,
    pub(crate) lengths: Lengths<'a>,
}

impl Beside<'_> {
    /// Where the keys of a sequence end.
    #[inline(always)]
    fn end(&self, site: &Site) -> usize {
        match self.lengths {
            Lengths::Keys(lengths) | Lengths::Tokens(lengths) => self.split + lengths[site.batch],
            _ => site.kv_len,
        }
    }

    #[inline(always)]
    fn open(&self, site: &Site, query: usize, key: usize) -> bool {
        self.visible.is_none_or(|x| x[[if x.dim().0 == 1 { 0 } else { site.batch }, query, key]])
    }
}

impl Mask for Beside<'_> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        if key < self.split { self.open(site, query, key) } else { key < self.end(site) }
    }
    #[inline(always)]
    fn hull(&self, site: &Site, _: Range<usize>) -> Range<usize> {
        0..self.end(site)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, _: Range<usize>, keys: Range<usize>) -> Coverage {
        let end = self.end(site);
        if keys.start >= end {
            Coverage::Empty
        } else if keys.end <= end && (self.visible.is_none() || keys.start >= self.split) {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let end = self.end(site);
        if self.visible.is_none() {
            return bits_of(&(0..end), first);
        }
        let known = self.split.saturating_sub(first).min(64);
        bits_of(&(self.split..end), first) | pack(known, |t| self.open(site, query, first + t))
    }
}

/// What is added to scores of a reference, `[batch | 1, q_heads | 1, q_len, split]`,
/// less a number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Correction<'a> {
    pub(crate) tile: Option<ArrayView4<'a, f32>>,
    pub(crate) less: f32,
}

impl Correction<'_> {
    /// The corrections of a query from a key on.
    #[inline(always)]
    fn from(&self, site: &Site, query: usize, key: usize) -> impl Iterator<Item = f32> {
        let row = self.tile.as_ref().map(|tile| {
            let at = |len: usize, i: usize| if len == 1 { 0 } else { i };
            let (b, h) = (at(tile.dim().0, site.batch), at(tile.dim().1, site.head));
            tile.slice(s![b, h, query, key.min(tile.dim().3)..])
        });
        row.into_iter().flatten().map(|x| x - self.less)
    }
}

impl Score for Correction<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.from(site, query, key).next().map_or(score, |by| define_shift(score, f64::from(by)))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        for (score, by) in scores.iter_mut().zip(self.from(site, query, first)) {
            *score = shift(*score, by);
        }
    }
}

/// The largest number of some; 0 where it is not finite.
pub(crate) fn largest(x: &ArrayView4<'_, f32>) -> f32 {
    const LANES: usize = 16;
    let mut most = [f32::NEG_INFINITY; LANES];
    let larger = |most: &mut f32, x: f32| *most = if x > *most { x } else { *most };
    for row in x.rows() {
        let Some(row) = row.to_slice() else {
            row.iter().for_each(|&x| larger(&mut most[0], x));
            continue;
        };
        for part in row.chunks(LANES) {
            most.iter_mut().zip(part).for_each(|(most, &x)| larger(most, x));
        }
    }
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if most.is_finite() { most } else { 0.0 }
}
