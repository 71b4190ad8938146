//! Scores that fade with what lies between key and query: log forget gates.

use std::ops::Range;
use std::sync::Arc;

use ndarray::ArrayView3;

use super::{Score, define_shift, shift};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};
use crate::mask::{Coverage, Mask, cut, range_bits};
use crate::simd::Simd;

/// Adds the log forget gates of the tokens after the key, up to the query's own
/// (forgetting attention, FoX; arXiv 2503.02130): `s + C_i - C_j` where `C_i =
/// sum_(t <= i) ln f_t`, after the scale, for keys at the query's position and
/// before. Later keys are hidden; with a causal mask they are skipped.
///
/// Gates belong to the tokens of the keys: `[batch, q_heads, kv_len]`, one set
/// for each query head. The last query sits at the last key, unless
/// [`at`](Self::at) says otherwise; past the last token nothing more is
/// forgotten. A gate of 0 (`ln f = -inf`) hides all tokens before its own.
///
/// Sums are kept in `f64` and rounded where they are differences, so that the
/// bias of near keys is right after however many tokens. While decoding,
/// [`extend`](Self::extend) appends the gates of new tokens; nothing that is
/// there changes.
///
/// [`Backward`](crate::Backward) gives the gradient of the log gates, too: `dln f_t =
/// sum_(j < t <= p(i)) ds_ij`.
///
/// Memory: 20 bytes a token and head.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Dense, score::Forget};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let gates = Array3::from_elem((1, 2, 300), 0.99f32.ln());
/// let forget = Forget::new(gates.view())?;
/// let out = Dense::builder().causal().score(forget).build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// A call is refused whose batch, query heads or keys are not those of the
/// gates, and a packed batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Forget {
    batch: usize,
    heads: usize,
    /// One for each sequence and head.
    tracks: Vec<Track>,
    q_start: Option<isize>,
}

/// The tokens of one sequence and head.
#[derive(Clone, Debug, Default, PartialEq)]
struct Track {
    /// Sums of log gates up to and with each token, those of -inf left out.
    sums: Vec<f64>,
    /// The same as two numbers of `f32`.
    high: Vec<f32>,
    low: Vec<f32>,
    /// The first key that each token sees.
    starts: Vec<u32>,
}

impl Track {
    fn push(&mut self, log_gate: f32) {
        let sum = self.sums.last().copied().unwrap_or(0.0);
        let start = self.starts.last().copied().unwrap_or(0);
        let (sum, start) = match log_gate {
            f32::NEG_INFINITY => (sum, self.sums.len() as u32),
            log_gate => (sum + f64::from(log_gate), start),
        };
        let high = sum as f32;
        self.sums.push(sum);
        self.high.push(high);
        self.low.push((sum - f64::from(high)) as f32);
        self.starts.push(start);
    }
}

impl Forget {
    /// Log gates `[batch, q_heads, kv_len]`.
    ///
    /// # Errors
    /// [`Error::Value`] for a log gate above 0, NaN, or below -1e28 and not
    /// -inf.
    pub fn new(log_gates: ArrayView3<'_, f32>) -> Result<Self> {
        let (batch, heads, _) = log_gates.dim();
        let tracks = vec![Track::default(); batch * heads];
        let mut forget = Self { batch, heads, tracks, q_start: None };
        forget.extend(log_gates)?;
        Ok(forget)
    }

    /// Appends log gates `[batch, q_heads, tokens]`: as if they had been there
    /// from the start.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Shape`] for another batch or number
    /// of heads; nothing is appended then.
    pub fn extend(&mut self, log_gates: ArrayView3<'_, f32>) -> Result<()> {
        let (batch, heads, tokens) = log_gates.dim();
        if (batch, heads) != (self.batch, self.heads) {
            let expected = format!("[batch, q_heads, tokens] = [{}, {}, any]", self.batch, self.heads);
            return Err(Error::shape("log gates", expected, log_gates.shape()));
        }
        let known = |x: f32| x == f32::NEG_INFINITY || (-1e28..=0.0).contains(&x);
        if let Some(x) = log_gates.iter().find(|&&x| !known(x)) {
            return Err(Error::value("log gates", "0 at most, and -1e28 at least or -inf", x));
        }
        let len = self.tracks.first().map_or(0, |track| track.sums.len());
        if len.saturating_add(tokens) > u32::MAX as usize {
            return Err(Error::too_large("log gates", format_args!("{tokens} tokens after {len}")));
        }
        for (track, gates) in self.tracks.iter_mut().zip(log_gates.rows()) {
            gates.iter().for_each(|&gate| track.push(gate));
        }
        Ok(())
    }

    /// Query 0 sits at position `q_start`, which may be negative: the first
    /// queries then see nothing.
    #[must_use]
    pub fn at(self, q_start: isize) -> Self {
        Self { q_start: Some(q_start), ..self }
    }

    /// A mask of the keys that are not forgotten, which engines skip the others
    /// by: `tolerance` is the share of a row's weights that may be lost, if no
    /// score without the gates is above `score_bound` in magnitude (as `scale
    /// max|q| max|k|`). It is causal.
    ///
    /// Keys whose bias is below `ln tolerance - 2 score_bound - ln kv_len` are
    /// hidden: next to the query's own key, whose bias is 0, all of them
    /// together weigh `tolerance` at most.
    ///
    /// # Errors
    /// [`Error::Value`] for a bound that is negative or not finite, and a
    /// tolerance outside `0..1`.
    pub fn remembered(&self, score_bound: f32, tolerance: f32) -> Result<Remembered> {
        if !(0.0..f32::INFINITY).contains(&score_bound) {
            return Err(Error::value("score_bound", "a finite number, 0 at least", score_bound));
        }
        if !(tolerance > 0.0 && tolerance < 1.0) {
            return Err(Error::value("tolerance", "a share above 0 and below 1", tolerance));
        }
        let starts = |track: &Track| {
            let len = track.sums.len();
            let lowest = f64::from(tolerance).ln() - 2.0 * f64::from(score_bound) - (len as f64).ln();
            let mut start = 0;
            let of_token = |(at, (&sum, &least)): (usize, (&f64, &u32))| {
                start = start.max(least as usize);
                while start < at && sum - track.sums[start] < lowest {
                    start += 1;
                }
                start as u32
            };
            track.sums.iter().zip(&track.starts).enumerate().map(of_token).collect()
        };
        Ok(Remembered {
            batch: self.batch,
            heads: self.heads,
            starts: self.tracks.iter().map(starts).collect(),
            q_start: self.q_start,
        })
    }

    /// The token at which a query sits: the last for those past it.
    pub(super) fn token(&self, site: &Site, query: usize) -> Option<usize> {
        self.find(site, query).map(|(_, at)| at)
    }

    /// Whether nothing before a token is seen by queries at it and later.
    pub(super) fn is_first(&self, site: &Site, token: usize) -> bool {
        let track = self.tracks.get(site.batch * self.heads + site.head);
        track.is_none_or(|track| track.starts.get(token).is_none_or(|&start| start as usize == token))
    }

    /// The gates of a site, and the token at which a query sits.
    #[inline(always)]
    fn find(&self, site: &Site, query: usize) -> Option<(&Track, usize)> {
        let track = self.tracks.get(site.batch * self.heads + site.head)?;
        let at = usize::try_from(site.position(self.q_start, query)).ok()?;
        Some((track, at.min(track.sums.len().checked_sub(1)?)))
    }
}

/// Whether gates are those of a call.
fn fits(batch: usize, heads: usize, len: Option<usize>, dims: &Dims) -> Result<()> {
    if dims.packed {
        return Err(Error::packed("forget gates"));
    }
    // Without a head there are no tokens to count.
    let len = len.unwrap_or(dims.kv_len);
    if (batch, heads, len) == (dims.batch, dims.q_heads, dims.kv_len) {
        return Ok(());
    }
    let expected = format!("[batch, q_heads, kv_len] = [{}, {}, {}]", dims.batch, dims.q_heads, dims.kv_len);
    Err(Error::shape("log gates", expected, &[batch, heads, len]))
}

impl Score for Forget {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        match self.find(site, query) {
            Some((track, at)) if key <= at && key >= track.starts[at] as usize => {
                define_shift(score, track.sums[at] - track.sums[key])
            }
            _ => f64::NEG_INFINITY,
        }
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let Some((track, at)) = self.find(site, query) else {
            return scores.fill(f32::NEG_INFINITY);
        };
        let end = (at + 1).saturating_sub(first).min(scores.len());
        let start = (track.starts[at] as usize).saturating_sub(first).min(end);
        scores[..start].fill(f32::NEG_INFINITY);
        scores[end..].fill(f32::NEG_INFINITY);
        let (high, low) = (track.high[at], track.low[at]);
        let [highs, lows] = [&track.high, &track.low].map(|x| x.get(first + start..).unwrap_or(&[]));
        for ((score, key_high), key_low) in scores[start..end].iter_mut().zip(highs).zip(lows) {
            *score = shift(*score, (high - key_high) + (low - key_low));
        }
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        fits(self.batch, self.heads, self.tracks.first().map(|track| track.sums.len()), dims)
    }
}

/// The keys that gates have not made forget; see [`Forget::remembered`].
#[derive(Clone, Debug, PartialEq)]
pub struct Remembered {
    batch: usize,
    heads: usize,
    /// For each sequence and head, the first key that each token sees. They
    /// never go back.
    starts: Arc<[Vec<u32>]>,
    q_start: Option<isize>,
}

impl Remembered {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        let Some(starts) = self.starts.get(site.batch * self.heads + site.head) else {
            return 0..0;
        };
        let at = site.position(self.q_start, query);
        let token = at.clamp(0, starts.len() as isize - 1) as usize;
        starts.get(token).map_or(0, |&start| start as isize)..at.saturating_add(1)
    }
}

impl Mask for Remembered {
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.range(site, query).contains(&(key as isize))
    }

    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let last = queries.end.saturating_sub(1);
        cut(self.range(site, queries.start).start..self.range(site, last).end, site.kv_len)
    }

    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let [first, last] =
            [queries.start, queries.end.saturating_sub(1)].map(|query| self.range(site, query));
        let (start, end) = (keys.start as isize, keys.end as isize);
        if start >= last.end || end <= first.start {
            Coverage::Empty
        } else if start >= last.start && end <= first.end {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        range_bits(self.range(site, query), first)
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        fits(self.batch, self.heads, self.starts.first().map(Vec::len), dims)
    }
}
