//! Radial attention over video: what a token sees of a frame shrinks with the
//! frame's distance.

use std::ops::Range;

use crate::card::{carded, exhibit};
use crate::error::Error;
use crate::input::{Qkv, Site};
use crate::keys::Per;
use crate::mask::frames::{Blocks, Frames};
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::options::{POSITIVE, options};
use crate::stages::patterned::{Pattern, patterned};

/// Radial attention over video: what a token sees of a frame shrinks with the
/// frame's distance.
///
/// ```text
/// token a of frame i sees token b of frame j, d = |i - j|, with
///     d <= 1, or
///     |a - b| <= max(decay l, block)  and  (l >= block or d mod floor(block / l) = 0)
/// where l = 2^bits(tokens of a frame) / 2^bits(d)
/// ```
///
/// `bits` is the length of a number in bits: each band of distances is twice as
/// wide as the one before and its windows are half as wide, so that bands cost
/// the same until a window would be narrower than a block, and from there on
/// whole frames are left out instead. From "Radial Attention: O(n log n) Sparse
/// Attention with Energy Decay for Long Video Generation" (arXiv 2506.19852).
/// Its code also has models in which the first frame is seen by all
/// ([`sink`](RadialBuilder::sink)), lets text after the video see and be seen
/// by all, and rounds the pattern to whole [`Blocks`].
///
/// All frames are there at once, with nothing to be cached: it runs over arrays.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, `O(n log n)` of them.
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

impl Radial {
    /// Videos of so many frames of so many tokens, one frame after the other.
    pub fn builder(frames: usize, tokens: usize) -> RadialBuilder {
        RadialBuilder::with(frames, tokens)
    }
}

options! {
    /// Builds a [`Radial`].
    RadialBuilder of Radial, scale "1 / sqrt(head_dim)" isa;
    given { frames: usize; tokens: usize; }
    set {
        /// Tokens of text after the video. Default: none.
        text: usize = 0;
        /// The narrowest window on each side, and tokens of a block. Default: 128.
        block: usize = 128;
        /// Whole blocks instead of single pairs. Default: [`Blocks::Exact`].
        blocks: Blocks = Blocks::Exact;
    }
    flags {
        /// All tokens see the whole first frame.
        sink;
    }
    numbers {
        /// The factor of the windows of distant frames; the larger the denser.
        /// Default: 1.
        decay: f64 = 1.0, in POSITIVE;
    }
    build(this, config) {
        let RadialBuilder { frames, tokens: frame, text, sink, decay, block, blocks, .. } = this;
        for (name, tokens) in [("tokens", frame), ("block", block)] {
            if tokens == 0 || u32::try_from(tokens).is_err() {
                return Err(Error::value(name, "from 1 to 2^32 - 1 tokens", tokens));
            }
        }
        let counts = |n: usize| n.checked_add(text).is_some_and(|n| u32::try_from(n).is_ok());
        let video = frames.checked_mul(frame).filter(|&n| counts(n));
        let Some(video) = video.filter(|_| frames < 1 << 20) else {
            let expected = "fewer than 2^20 frames and 2^32 tokens";
            return Err(Error::value("frames", expected, format_args!("{frames} x {frame}")));
        };
        if video > 0 && block > video {
            return Err(Error::value("block", format!("at most the {video} tokens of the video"), block));
        }
        // A map of them is kept.
        if blocks != Blocks::Exact && video.div_ceil(block) > 1 << 14 {
            let expected = "blocks of which the video has at most 2^14";
            return Err(Error::value("block", expected, format_args!("{block} tokens of {video}")));
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
        let mask = Frames::new([frames, frame, text], sink, reach).in_blocks(block, blocks);
        let options = Options { mask, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(Radial { config: options.build()? })
    }
}

impl Pattern for Frames {
    fn per(&self) -> Per {
        Per::Sequence
    }

    fn ranges(&self, _: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        self.visit(queries, visit);
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
    use crate::mask::Mask;
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
                let mask = radial.config.mask().clone();
                let site = Site { batch: 0, head: 0, q_len: total, kv_len: total };
                let mut all = (0..total * total).map(|at| (at / total, at % total));
                let follows = all.all(|(i, j)| mask.visible(&site, i, j) == exact(i, j));
                assert!(follows || blocks != Blocks::Exact);
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
        let many = Radial::builder(1 << 10, 1 << 10).block(1).blocks(Blocks::Touched);
        for (builder, argument) in [
            (Radial::builder(3, 0), "tokens: "),
            (Radial::builder(3, 5).block(0), "block: "),
            (Radial::builder(1 << 40, 1 << 30), "frames: "),
            (Radial::builder(1 << 20, 1), "frames: "),
            (many, "block: "),
            (Radial::builder(3, 5).block(4).decay(0.0), "decay: "),
            (Radial::builder(3, 5).block(4).blocks(Blocks::Share(1.5)), "blocks: "),
        ] {
            assert!(refusal(builder).starts_with(argument));
        }
        let x = Arrays::normal([1, 1, 1, 10, 10, 4, 4], 1);
        let radial = Radial::builder(3, 5).block(4).build().unwrap();
        assert!(radial.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    }
}
