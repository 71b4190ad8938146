//! Radial attention over video: what a token sees of a frame shrinks with the
//! frame's distance.
//!
//! ```text
//! token a of frame i sees token b of frame j, d = |i - j|, with
//!     d <= 1, or
//!     |a - b| <= max(decay l, block)  and  (l >= block or d mod floor(block / l) = 0)
//! where l = 2^bits(tokens of a frame) / 2^bits(d)
//! ```
//!
//! `bits` is the length of a number in bits: each band of distances is twice as
//! wide as the one before and its windows are half as wide, so that bands cost
//! the same until a window would be narrower than a block, and from there on
//! whole frames are left out instead. From "Radial Attention: O(n log n) Sparse
//! Attention with Energy Decay for Long Video Generation" (arXiv 2506.19852).
//! Its code also has models in which the first frame is seen by all
//! ([`sink`](RadialBuilder::sink)), lets text after the video see and be seen
//! by all, and rounds the pattern to whole [`Blocks`].
//!
//! Cost: `2 (head_dim + value_dim)` flops a visible pair, `O(n log n)` of them.

use std::ops::Range;
use std::sync::Arc;

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::keys::Per;
use crate::mask::{Coverage, Mask};
use crate::score::Plain;
use crate::simd::Isa;
use crate::stages::attend::{Config, Options};
use crate::stages::patterned::{Pattern, patterned};

/// Whether the pattern is that of tokens, or of whole blocks of queries and
/// keys.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Blocks {
    /// Pairs of tokens, as the formula has them.
    #[default]
    Exact,
    /// All of a block of which a pair is visible.
    Touched,
    /// All of a block of which at least this share of pairs is visible.
    Share(f64),
    /// The rule of the released code, for each pair of frames by itself: all
    /// of a block if of those of its keys that are seen more than 60 % are seen
    /// by more than a third of its queries.
    Released,
}

/// The pattern as a mask.
#[derive(Clone, Debug)]
pub(crate) struct Frames {
    /// Tokens of a frame, of the video, and of the text after it.
    frame: usize,
    video: usize,
    text: usize,
    sink: bool,
    /// How far apart tokens of frames at each distance see each other; `None`
    /// if they do not.
    reach: Arc<[Option<usize>]>,
    /// Tokens of a block, and a bit for each block of keys, for each of
    /// queries, where blocks are whole: words of a row.
    blocks: Option<(usize, usize, Arc<[u64]>)>,
}

impl Frames {
    /// How far tokens of frame `i` see in frame `j`.
    fn width(&self, i: usize, j: usize) -> Option<usize> {
        if self.sink && j == 0 { Some(self.frame) } else { self.reach[i.abs_diff(j)] }
    }

    /// The frames that some tokens lie in, and which of each.
    fn frames(&self, tokens: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let frame = self.frame;
        (tokens.start / frame..tokens.end.div_ceil(frame)).map(move |i| {
            let within = |t: usize| t.clamp(i * frame, (i + 1) * frame) - i * frame;
            (i, within(tokens.start)..within(tokens.end))
        })
    }

    /// The keys of frame `j` that some of these tokens of frame `i` see.
    fn seen(&self, i: usize, a: &Range<usize>, j: usize) -> Range<usize> {
        let Some(width) = self.width(i, j) else { return 0..0 };
        let first = j * self.frame;
        first + a.start.saturating_sub(width)..first + (a.end + width).min(self.frame)
    }

    fn is_kept(&self, query: usize, key: usize) -> Option<bool> {
        let (block, words, bits) = self.blocks.as_ref()?;
        let (x, y) = (query / block, key / block);
        Some(bits[x * words + y / 64] >> (y % 64) & 1 == 1)
    }

    /// Keeps whole blocks.
    fn in_blocks(self, block: usize, rule: Blocks) -> Self {
        let n = self.video.div_ceil(block);
        let words = n.div_ceil(64);
        let (mut bits, mut pairs) = (vec![0u64; n * words], vec![0usize; n * n]);
        let mut keep = |x: usize, y: usize| bits[x * words + y / 64] |= 1 << (y % 64);
        let block_of = |x: usize| x * block..((x + 1) * block).min(self.video);
        for x in 0..n {
            for ((i, a), j) in
                self.frames(block_of(x)).flat_map(|i| (0..self.reach.len()).map(move |j| (i.clone(), j)))
            {
                let Some(width) = self.width(i, j) else { continue };
                let seen = self.seen(i, &a, j);
                for y in seen.start / block..seen.end.div_ceil(block) {
                    // Keys that are seen, those that many see, and pairs.
                    let (mut some, mut many, mut all) = (0, 0, 0);
                    for key in seen.start.max(block_of(y).start)..seen.end.min(block_of(y).end) {
                        let b = key - j * self.frame;
                        let by = b.saturating_sub(width).max(a.start)..(b + width + 1).min(a.end);
                        some += 1;
                        many += usize::from(3 * by.len() > block);
                        all += by.len();
                    }
                    pairs[x * n + y] += all;
                    if rule == Blocks::Touched && all > 0 || rule == Blocks::Released && 5 * many > 3 * some {
                        keep(x, y);
                    }
                }
            }
        }
        if let Blocks::Share(share) = rule {
            for (x, y) in (0..n).flat_map(|x| (0..n).map(move |y| (x, y))) {
                let (seen, area) = (pairs[x * n + y], block_of(x).len() * block_of(y).len());
                if seen > 0 && seen as f64 >= share * area as f64 {
                    keep(x, y);
                }
            }
        }
        Self { blocks: Some((block, words, bits.into())), ..self }
    }
}

impl Mask for Frames {
    #[inline(always)]
    fn visible(&self, _: &Site, query: usize, key: usize) -> bool {
        if query.max(key) >= self.video {
            return true;
        }
        self.is_kept(query, key).unwrap_or_else(|| {
            let (a, b) = (query % self.frame, key % self.frame);
            self.width(query / self.frame, key / self.frame).is_some_and(|width| a.abs_diff(b) <= width)
        })
    }
    fn coverage(&self, _: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let text = queries.end > self.video || keys.end > self.video;
        if text && (queries.start >= self.video || keys.start >= self.video) {
            return Coverage::Full;
        }
        if text {
            return Coverage::Partial;
        }
        let (mut some, mut all) = (false, true);
        let mut take = |any: bool, every: bool| (some, all) = (some | any, all & every);
        if let Some((block, ..)) = &self.blocks {
            for query in (queries.start / block..queries.end.div_ceil(*block)).map(|x| x * block) {
                for key in (keys.start / block..keys.end.div_ceil(*block)).map(|y| y * block) {
                    let kept = self.is_kept(query, key) == Some(true);
                    take(kept, kept);
                }
            }
        } else {
            for (i, a) in self.frames(queries) {
                for (j, b) in self.frames(keys.clone()) {
                    // The nearest and the furthest pair.
                    let near = b.start.saturating_sub(a.end - 1).max(a.start.saturating_sub(b.end - 1));
                    let far = (b.end - 1).abs_diff(a.start).max((a.end - 1).abs_diff(b.start));
                    let width = self.width(i, j);
                    take(width.is_some_and(|width| near <= width), width.is_some_and(|width| far <= width));
                }
            }
        }
        match (some, all) {
            (false, _) => Coverage::Empty,
            (true, true) => Coverage::Full,
            (true, false) => Coverage::Partial,
        }
    }
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let (mut bits, mut at, end) = (0, first, first + 64);
        let mut set = |keys: Range<usize>| {
            if keys.start < keys.end {
                bits |= (u64::MAX >> (64 - keys.len())) << (keys.start - first);
            }
        };
        if query >= self.video {
            return u64::MAX;
        }
        // Block by block, or frame by frame; what follows the video is seen.
        while at < end {
            let piece = self.blocks.as_ref().map_or(self.frame, |(block, ..)| *block);
            let stop = ((at / piece + 1) * piece).min(self.video).min(end);
            if at >= self.video {
                set(at..end);
                break;
            }
            if self.blocks.is_some() {
                set(at..if self.visible(site, query, at) { stop } else { at });
            } else {
                let a = query % self.frame;
                let seen = self.seen(query / self.frame, &(a..a + 1), at / self.frame);
                set(seen.start.max(at)..seen.end.min(stop));
            }
            at = stop;
        }
        bits
    }
    fn is_shared(&self) -> bool {
        true
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if dims.packed {
            return Err(Error::packed("video"));
        }
        let total = self.video + self.text;
        if (dims.q_len, dims.kv_len) != (total, total) {
            let expected =
                format!("{} tokens of a video and {} of text, as queries and as keys", self.video, self.text);
            return Err(Error::value("q", expected, format_args!("{} and {}", dims.q_len, dims.kv_len)));
        }
        Ok(())
    }
}

impl Pattern for Frames {
    fn per(&self) -> Per {
        Per::Sequence
    }

    fn ranges(&self, site: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        if queries.end > self.video {
            return visit(0..site.kv_len);
        }
        visit(self.video..site.kv_len);
        if let Some((block, ..)) = &self.blocks {
            for x in queries.start / block..queries.end.div_ceil(*block) {
                for first in (0..self.video).step_by(*block) {
                    if self.is_kept(x * block, first) == Some(true) {
                        visit(first..(first + block).min(self.video));
                    }
                }
            }
            return;
        }
        for (i, a) in self.frames(queries) {
            (0..self.reach.len()).for_each(|j| visit(self.seen(i, &a, j)));
        }
    }
}

/// Radial attention; see the [module](crate::sparse) for its kin.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::Radial};
/// use ndarray::Array4;
///
/// // 16 frames of 40 tokens, one frame after the other.
/// let x = Array4::from_shape_fn((1, 2, 640, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let radial = Radial::builder(16, 40).block(16).build()?;
/// let out = radial.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Radial {
    config: Config<Frames, Plain>,
}

/// Builds a [`Radial`].
#[derive(Clone, Debug)]
pub struct RadialBuilder {
    frames: usize,
    frame: usize,
    text: usize,
    sink: bool,
    decay: f64,
    block: usize,
    blocks: Blocks,
    scale: Option<f32>,
    isa: Option<Isa>,
}

impl Radial {
    /// Videos of so many frames of so many tokens, one frame after the other.
    pub fn builder(frames: usize, tokens: usize) -> RadialBuilder {
        RadialBuilder {
            frames,
            frame: tokens,
            text: 0,
            sink: false,
            decay: 1.0,
            block: 128,
            blocks: Blocks::Exact,
            scale: None,
            isa: None,
        }
    }
}

impl RadialBuilder {
    /// Tokens of text after the video. Default: none.
    pub fn text(self, text: usize) -> Self {
        Self { text, ..self }
    }

    /// All tokens see the whole first frame.
    pub fn sink(self) -> Self {
        Self { sink: true, ..self }
    }

    /// The factor of the windows of distant frames; the larger the denser.
    /// Default: 1.
    pub fn decay(self, decay: f64) -> Self {
        Self { decay, ..self }
    }

    /// The narrowest window on each side, and tokens of a block. Default: 128.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// Whole blocks instead of single pairs. Default: [`Blocks::Exact`].
    pub fn blocks(self, blocks: Blocks) -> Self {
        Self { blocks, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for frames or blocks of 0 tokens, more of them than can
    /// be kept count of, a decay that is not a finite number above 0, a share outside 0 to 1
    /// or a scale that is not finite, [`Error::Isa`] for an instruction set that
    /// the CPU lacks.
    pub fn build(self) -> Result<Radial> {
        let Self { frames, frame, text, sink, decay, block, blocks, scale, isa } = self;
        for (name, tokens) in [("tokens", frame), ("block", block)] {
            if tokens == 0 || u32::try_from(tokens).is_err() {
                return Err(Error::value(name, "from 1 to 2^32 - 1 tokens", tokens));
            }
        }
        let video = frames.checked_mul(frame).filter(|&n| n.checked_add(text).is_some_and(|n| n < 1 << 32));
        let Some(video) = video.filter(|_| frames < 1 << 20) else {
            let expected = "fewer than 2^20 frames and 2^32 tokens";
            return Err(Error::value("frames", expected, format_args!("{frames} x {frame}")));
        };
        // A map of them is kept.
        if blocks != Blocks::Exact && video.div_ceil(block) > 1 << 14 {
            let expected = "blocks of which the video has at most 2^14";
            return Err(Error::value("block", expected, format_args!("{block} tokens of {video}")));
        }
        if !(decay.is_finite() && decay > 0.0) {
            return Err(Error::value("decay", "a finite number above 0", decay));
        }
        if let Blocks::Share(share) = blocks
            && !(0.0..=1.0).contains(&share)
        {
            return Err(Error::value("blocks", "a share from 0 to 1", share));
        }
        let bits = |n: usize| (usize::BITS - n.leading_zeros()) as i32;
        let reach = |d: usize| {
            if d <= 1 {
                return Some(frame);
            }
            let length = 2f64.powi(bits(frame) - bits(d));
            let every = (block as f64 / length).floor() as usize;
            if length < block as f64 && !d.is_multiple_of(every) {
                return None;
            }
            Some((length * decay).max(block as f64) as usize).map(|width| width.min(frame))
        };
        let reach = (0..frames).map(reach).collect();
        let mask = Frames { frame, video, text, sink, reach, blocks: None };
        let mask = if blocks == Blocks::Exact { mask } else { mask.in_blocks(block, blocks) };
        Ok(Radial { config: Options { mask, score: Plain, scale, isa }.build()? })
    }
}

patterned!(Radial);

exhibit! {
    RadialExhibit of Radial, "sparse", "radial", "arXiv 2506.19852";
    "of frames of 20 tokens of a video neighbours, and of distant ones a band that is the narrower the further";
    not "where what is far in time matters as much as what is near";
    tokens true;
    build(x, _) { Radial::builder(x.q.dim().2 / 20, 20).block(4).text(x.q.dim().2 % 20).sink() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Radial, RadialExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects, Weights};
    use crate::dense::Dense;
    use crate::mask::mask_fn;
    use crate::sparse::testing::{self, Arrays};

    /// The pattern as the released code makes it, pair by pair.
    fn visible(frame: usize, decay: f64, block: usize, i: usize, j: usize) -> bool {
        let (d, a, b) = ((i / frame).abs_diff(j / frame), i % frame, j % frame);
        if d <= 1 {
            return true;
        }
        let bits = |n: usize| (n as f64).log2().floor() as i32 + 1;
        let length = 2f64.powi(bits(frame)) / 2f64.powi(bits(d));
        let band = a.abs_diff(b) as f64 <= (length * decay).max(block as f64);
        band && (length >= block as f64 || d % (block as f64 / length) as usize == 0)
    }

    const SHAPES: [(usize, usize, usize, usize, f64, bool); 5] = [
        (12, 20, 0, 4, 1.0, false),
        (9, 33, 7, 8, 0.5, true),
        (2, 150, 3, 16, 1.0, false),
        (40, 7, 0, 3, 3.0, true),
        (0, 5, 70, 4, 1.0, false),
    ];

    #[test]
    fn patterns_are_masks() {
        for (frames, frame, text, block, decay, sink) in SHAPES {
            let (video, total) = (frames * frame, frames * frame + text);
            let x = Arrays::normal([1, 4, 2, total, total, 16, 8], 1);
            let exact = move |i: usize, j: usize| {
                i.max(j) >= video || visible(frame, decay, block, i, j) || sink && j < frame
            };
            for blocks in [Blocks::Exact, Blocks::Touched, Blocks::Share(0.3), Blocks::Released] {
                let builder = Radial::builder(frames, frame).text(text).block(block).decay(decay);
                let builder = if sink { builder.sink() } else { builder };
                let radial = builder.blocks(blocks).build().unwrap();
                // Shares and densities of a block, over the pairs of two frames or over all.
                let size = if blocks == Blocks::Exact { 1 } else { block };
                let kept = |x: usize, y: usize| {
                    let of = |x: usize| x * size..((x + 1) * size).min(video);
                    let count = |b: usize| of(x).filter(|&a| exact(a, b)).count();
                    let pairs = || of(x).flat_map(|a| of(y).map(move |b| (a / frame, b / frame)));
                    match blocks {
                        Blocks::Exact | Blocks::Touched => of(y).any(|b| count(b) > 0),
                        Blocks::Share(share) => {
                            let seen = of(y).map(count).sum::<usize>();
                            seen > 0 && seen as f64 >= share * (of(x).len() * of(y).len()) as f64
                        }
                        Blocks::Released => pairs().any(|(i, j)| {
                            let rows = |b: usize| of(x).filter(|&a| a / frame == i && exact(a, b)).count();
                            let keys = || of(y).filter(|b| b / frame == j).map(rows);
                            let dense = keys().filter(|&n| n as f64 / size as f64 > 1.0 / 3.0).count();
                            dense as f64 / (keys().filter(|&n| n > 0).count() as f64 + 1e-9) > 0.6
                        }),
                    }
                };
                let n = video.div_ceil(size);
                let grid: Vec<bool> = (0..n * n).map(|at| kept(at / n, at % n)).collect();
                let map: Vec<bool> = (0..total * total)
                    .map(|at| (at / total, at % total))
                    .map(|(i, j)| i.max(j) >= video || grid[i / size * n + j / size])
                    .collect();
                let mask = mask_fn(move |_, i, j| map[i * total + j]);
                let want = Dense::builder().mask(mask).build().unwrap().forward(x.qkv()).unwrap();
                let what = format!("{frames} x {frame}, {blocks:?}");
                testing::near(&what, &radial.forward(x.qkv()).unwrap(), &want);
                let (plan, _) = radial.reference_select(x.qkv()).unwrap();
                assert_eq!(radial.select(x.qkv()).unwrap(), plan, "{what}");
            }
        }
    }

    #[test]
    fn the_larger_the_decay_the_more_is_seen_both_ways_and_one_distance_is_dense() {
        let x = Arrays::normal([1, 1, 1, 24 * 30, 24 * 30, 8, 4], 1);
        let seen = |decay| {
            let radial = Radial::builder(24, 30).block(2).decay(decay).build().unwrap();
            radial.weights(x.qkv()).unwrap().mapv(|weight| weight > 0.0)
        };
        let [less, more] = [0.4, 2.0].map(seen);
        assert!(less.iter().zip(&more).all(|(a, b)| a <= b) && less != more);
        assert!(less.indexed_iter().all(|((_, _, i, j), seen)| less[[0, 0, j, i]] == *seen));
        let near = Radial::builder(2, 360).build().unwrap().forward(x.qkv()).unwrap();
        testing::near("two frames", &near, &Dense::builder().build().unwrap().forward(x.qkv()).unwrap());
    }

    /// The shares of pairs that the card of the family counts.
    #[test]
    fn density_falls_with_the_length() {
        for (frames, share) in [(8usize, 0.685), (21, 0.410), (42, 0.263)] {
            let radial = Radial::builder(frames, 1560).sink().build().unwrap();
            let mask = radial.config.mask();
            let site = Site { batch: 0, head: 0, q_len: frames * 1560, kv_len: frames * 1560 };
            let of = |i: usize| -> usize {
                let a = i % 1560;
                (0..frames).map(|j| mask.seen(i / 1560, &(a..a + 1), j).len()).sum()
            };
            let rows = (0..site.q_len).step_by(13);
            let count = rows.len();
            let seen = rows.map(of).sum::<usize>() as f64 / (count * site.kv_len) as f64;
            assert!((seen - share).abs() < 2e-3, "{frames} frames: {seen}");
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: RadialBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(Radial::builder(3, 0)).starts_with("tokens: "));
        assert!(refusal(Radial::builder(3, 5).block(0)).starts_with("block: "));
        assert!(refusal(Radial::builder(1 << 40, 1 << 30)).starts_with("frames: "));
        assert!(refusal(Radial::builder(1 << 20, 1)).starts_with("frames: "));
        let many = Radial::builder(1 << 10, 1 << 10).block(1).blocks(Blocks::Touched);
        assert!(refusal(many).starts_with("block: "));
        assert!(refusal(Radial::builder(3, 5).decay(0.0)).starts_with("decay: "));
        assert!(refusal(Radial::builder(3, 5).blocks(Blocks::Share(1.5))).starts_with("blocks: "));
        let x = Arrays::normal([1, 1, 1, 10, 10, 4, 4], 1);
        let radial = Radial::builder(3, 5).build().unwrap();
        assert!(radial.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    }
}
