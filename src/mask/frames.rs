//! Masks of videos: which tokens of two frames see each other hangs on the distance
//! of the frames.

use std::ops::Range;
use std::sync::Arc;

use super::{Coverage, Mask};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};

/// Whether the pattern is that of tokens, or of whole blocks of queries and
/// keys.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
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

/// Tokens of two frames see each other if they are as near as the distance of the
/// frames says. Text comes after the video, and sees and is seen by all.
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
    /// Of `frames` of `frame` tokens, and `text`; the first is seen by all with `sink`.
    /// `reach` gives how far apart tokens of frames at a distance see each other, if
    /// they do.
    pub(crate) fn new(
        [frames, frame, text]: [usize; 3],
        sink: bool,
        reach: impl FnMut(usize) -> Option<usize>,
    ) -> Self {
        Self {
            frame,
            video: frames * frame,
            text,
            sink,
            reach: (0..frames).map(reach).collect(),
            blocks: None,
        }
    }

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
    pub(crate) fn seen(&self, i: usize, a: &Range<usize>, j: usize) -> Range<usize> {
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
    pub(crate) fn in_blocks(self, block: usize, rule: Blocks) -> Self {
        if rule == Blocks::Exact {
            return self;
        }
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

    /// Calls `visit` with ranges that hold all keys that some of these queries see.
    pub(crate) fn visit(&self, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        let total = self.video + self.text;
        if queries.end > self.video {
            return visit(0..total);
        }
        visit(self.video..total);
        let Some((block, ..)) = &self.blocks else {
            for (i, a) in self.frames(queries) {
                (0..self.reach.len()).for_each(|j| visit(self.seen(i, &a, j)));
            }
            return;
        };
        for x in queries.start / block..queries.end.div_ceil(*block) {
            for first in (0..self.video).step_by(*block) {
                if self.is_kept(x * block, first) == Some(true) {
                    visit(first..(first + block).min(self.video));
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_ranges_is_what_is_said_of_pairs() {
        let reach = |d: usize| (d < 2 || d.is_multiple_of(2)).then(|| 5usize.saturating_sub(d));
        for (frames, frame, text, sink) in
            [(6, 7, 3, false), (3, 70, 0, true), (0, 5, 9, false), (9, 1, 0, true), (2, 12, 3, false)]
        {
            // Blocks of 6 of which just 60 % of the keys are dense are among them.
            for (block, rule) in [
                (4, Blocks::Exact),
                (4, Blocks::Touched),
                (9, Blocks::Share(0.4)),
                (5, Blocks::Released),
                (6, Blocks::Released),
            ] {
                let exact = Frames::new([frames, frame, text], sink, reach);
                let pair = |i: usize, j: usize| {
                    let (x, y) = (i / frame, j / frame);
                    let far = (i % frame).abs_diff(j % frame);
                    sink && j < frame || reach(x.abs_diff(y)).is_some_and(|reach| far <= reach)
                };
                let (video, size) = (frames * frame, if rule == Blocks::Exact { 1 } else { block });
                // Shares and densities of a block, over the pairs of two frames or over all.
                let kept = |x: usize, y: usize| {
                    let of = |x: usize| x * size..((x + 1) * size).min(video);
                    let count = |b: usize| of(x).filter(|&a| pair(a, b)).count();
                    let pairs = || of(x).flat_map(|a| of(y).map(move |b| (a / frame, b / frame)));
                    match rule {
                        Blocks::Exact | Blocks::Touched => of(y).any(|b| count(b) > 0),
                        Blocks::Share(share) => {
                            let seen = of(y).map(count).sum::<usize>();
                            seen > 0 && seen as f64 >= share * (of(x).len() * of(y).len()) as f64
                        }
                        Blocks::Released => pairs().any(|(i, j)| {
                            let rows = |b: usize| of(x).filter(|&a| a / frame == i && pair(a, b)).count();
                            let keys = || of(y).filter(|b| b / frame == j).map(rows);
                            let dense = keys().filter(|&n| n as f64 / size as f64 > 1.0 / 3.0).count();
                            dense as f64 / (keys().filter(|&n| n > 0).count() as f64 + 1e-9) > 0.6
                        }),
                    }
                };
                let mask = exact.in_blocks(block, rule);
                let n = frames * frame + text;
                let site = Site { batch: 0, head: 0, q_len: n, kv_len: n };
                for i in 0..n {
                    let mut visited = vec![false; n];
                    mask.visit(i..i + 1, &mut |keys| visited[keys].fill(true));
                    for j in 0..n {
                        let sees = mask.visible(&site, i, j);
                        assert_eq!(sees, i.max(j) >= video || kept(i / size, j / size), "{rule:?}: {i} {j}");
                        let bit = mask.bits(&site, i, j / 5 * 5) >> (j % 5) & 1 == 1;
                        assert_eq!(bit, sees, "{frames} {frame} {rule:?}: {i} {j}");
                        assert!(!sees || visited[j]);
                    }
                }
                for (i, j) in (0..n).step_by(3).flat_map(|i| (0..n).step_by(7).map(move |j| (i, j))) {
                    let (rows, cols) = (i..(i + 5).min(n), j..(j + 9).min(n));
                    let seen = rows.clone().flat_map(|i| cols.clone().map(move |j| (i, j)));
                    let count = seen.filter(|&(i, j)| mask.visible(&site, i, j)).count();
                    match mask.coverage(&site, rows.clone(), cols.clone()) {
                        Coverage::Empty => assert_eq!(count, 0),
                        Coverage::Full => assert_eq!(count, rows.len() * cols.len()),
                        Coverage::Partial => {}
                    }
                }
            }
        }
    }
}
