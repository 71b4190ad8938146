//! What may happen to a score between the dot product and the weights.
//!
//! A score arrives as `scale * q.k`, in natural units, and leaves as what
//! the exponential sees, an `f32`. A finite one is visible, however low; what
//! adds up to less than `f32::MIN` stays there. A score of -inf makes its key invisible to the
//! query, exactly as a mask does, and what is invisible stays so: the changes
//! of this module leave a score of -inf as it is, whatever comes later.
//!
//! | change | score `s` of query `i` and key `j` |
//! |---|---|
//! | [`Plain`] | `s` |
//! | [`Softcap`] | `c tanh(s / c)` |
//! | [`Alibi`] | `s - slope_h abs(p(i) - j)` |
//! | [`RelativeTable`] | `s + table[h, clamp(j - p(i), -w, w) + w]` |
//! | [`Forget`] | `s + sum_(j < t <= p(i)) ln f_t` |
//! | [`Bias`] | `s + bias[b, h, i, j]` |
//! | [`score_fn`] | what a closure says |
//! | [`Chosen`] | what a change says that is chosen at run time |
//!
//! Several are a tuple, applied from left to right; [`Score::then`] makes
//! one. Where models use several they cap first, then add what depends on
//! distances, then a bias:
//!
//! ```
//! use attention_kernels::score::{Alibi, Score, Softcap};
//!
//! let score = Softcap::new(50.0)?.then(Alibi::new(8));
//! # Ok::<(), attention_kernels::error::Error>(())
//! ```

use std::ops::Range;

use ndarray::{Array2, ArrayView4};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, PairRow, Pairs, Site};
use crate::simd::{Isa, Kernel, Simd, exp};

mod chosen;
mod forget;
pub(crate) mod grid;
mod images;
pub(crate) mod lived;
pub(crate) mod smooth;

pub use chosen::Chosen;
pub use forget::{Forget, Remembered};
pub use smooth::Smooth;

#[cfg(test)]
mod tests;

/// A change of scores. Tuples apply their parts in order.
pub trait Score: Send + Sync {
    /// Whether scores stay as they are, so that engines can leave it out.
    const IDENTITY: bool = false;

    /// Whether [`apply`](Self::apply) may be asked about hidden pairs too,
    /// whose scores count for nothing: it then looks nothing up in tables that
    /// might not have them. Saves engines to single them out.
    const ANY_PAIR: bool = false;

    /// The definition: what becomes of the score of one visible pair.
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64;

    /// The same for the scores of one query with the keys from `first` on.
    /// Implementations carry `#[inline(always)]`.
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]);

    /// The same for the scores that are `seen`, and no others.
    #[doc(hidden)]
    #[inline(always)]
    fn apply_seen<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Seen<'_>,
    ) {
        let mut at = 0;
        while at < scores.len() {
            let run = seen.run(at, scores.len());
            at = run.end;
            self.apply(s, site, query, first + run.start, &mut scores[run]);
        }
    }

    /// Whether it fits a call of these sizes.
    ///
    /// # Errors
    /// An error that names the array or parameter that does not.
    fn check(&self, dims: &Dims) -> Result<()> {
        let _ = dims;
        Ok(())
    }

    /// This change, and `next` on what it leaves.
    fn then<F: Score>(self, next: F) -> (Self, F)
    where
        Self: Sized,
    {
        (self, next)
    }
}

/// Scores as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plain;

impl Score for Plain {
    const IDENTITY: bool = true;
    const ANY_PAIR: bool = true;

    fn define(&self, _: &Site, _: usize, _: usize, score: f64) -> f64 {
        score
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, _: &Site, _: usize, _: usize, _: &mut [f32]) {}
}

/// A change of scores from a closure; see [`score_fn`].
#[derive(Clone, Copy, Debug)]
pub struct ScoreFn<F>(F);

/// A change of scores from a closure of `(score, site, query, key)`. It is
/// asked about pairs that the mask lets see each other, and no others, and is
/// inlined into the kernel, where the compiler vectorises what it can.
///
/// ```
/// use attention_kernels::score::score_fn;
///
/// let slope = 0.125;
/// let alibi = score_fn(|s, _, query, key| s - slope * (key as f32 - query as f32).abs());
/// ```
pub fn score_fn<F: Fn(f32, &Site, usize, usize) -> f32 + Send + Sync>(f: F) -> ScoreFn<F> {
    ScoreFn(f)
}

impl<F: Fn(f32, &Site, usize, usize) -> f32 + Send + Sync> Score for ScoreFn<F> {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        f64::from((self.0)(score as f32, site, query, key))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        // Positions that visibly fit 32 bits let the compiler work on twice
        // as many lanes, and results that go to an array of the stack first
        // let it keep what the closure borrows in registers.
        const BLOCK: usize = 64;
        let mut first = first;
        let fits = (query | first | scores.len()) >> 31 == 0;
        let (blocks, rest) = scores.split_at_mut(if fits { scores.len() / BLOCK * BLOCK } else { 0 });
        for block in blocks.as_chunks_mut::<BLOCK>().0 {
            let mut changed = [0.0; BLOCK];
            let (query, mut key) = (query as u32 as usize, first as u32);
            for (changed, &score) in changed.iter_mut().zip(&*block) {
                *changed = (self.0)(score, site, query, key as usize);
                key = key.wrapping_add(1);
            }
            *block = changed;
            first += BLOCK;
        }
        for (t, score) in rest.iter_mut().enumerate() {
            *score = (self.0)(*score, site, query, first + t);
        }
    }
    #[inline(always)]
    fn apply_seen<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Seen<'_>,
    ) {
        // Of many short runs the scores are put next to each other, so that what
        // the compiler vectorises is long.
        const BLOCK: usize = 64;
        const LANES: usize = 16;
        const FEW: u32 = 4;
        for (i, block) in scores.chunks_mut(BLOCK).enumerate() {
            let (at, first) = (i * BLOCK, first + i * BLOCK);
            let bits = seen.word(at) & (u64::MAX >> (BLOCK - block.len()));
            if (bits & !(bits << 1)).count_ones() <= FEW {
                let (seen, mut at) = (Seen { words: &[bits], first: 0 }, 0);
                while at < block.len() {
                    let run = seen.run(at, block.len());
                    at = run.end;
                    self.apply(s, site, query, first + run.start, &mut block[run]);
                }
                continue;
            }
            let (mut places, mut dense) = ([0u32; BLOCK], [0f32; BLOCK]);
            let (mut count, mut left) = (0, bits);
            while left != 0 {
                let place = left.trailing_zeros();
                (places[count], dense[count]) = (place, block[place as usize]);
                count += 1;
                left &= left - 1;
            }
            // Whole vectors: what fills the last one up is seen too.
            let (last, whole) = (count - 1, count.next_multiple_of(LANES));
            let (place, score) = (places[last], dense[last]);
            places[count..whole].fill(place);
            dense[count..whole].fill(score);
            let vectors = dense[..whole].as_chunks_mut::<LANES>().0.iter_mut();
            for (scores, places) in vectors.zip(places.as_chunks::<LANES>().0) {
                let mut changed = [0.0; LANES];
                for ((changed, &score), &place) in changed.iter_mut().zip(&*scores).zip(places) {
                    *changed = (self.0)(score, site, query, first + place as usize);
                }
                *scores = changed;
            }
            for (&place, &score) in places[..count].iter().zip(&dense) {
                block[place as usize] = score;
            }
        }
    }
}

impl<A: Score, B: Score> Score for (A, B) {
    const IDENTITY: bool = A::IDENTITY && B::IDENTITY;
    const ANY_PAIR: bool = A::ANY_PAIR && B::ANY_PAIR;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.1.define(site, query, key, self.0.define(site, query, key, score))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        self.0.apply(s, site, query, first, scores);
        self.1.apply(s, site, query, first, scores);
    }
    #[inline(always)]
    fn apply_seen<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Seen<'_>,
    ) {
        self.0.apply_seen(s, site, query, first, scores, seen);
        self.1.apply_seen(s, site, query, first, scores, seen);
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check(dims)?;
        self.1.check(dims)
    }
}

impl<F: Score> Score for &F {
    const IDENTITY: bool = F::IDENTITY;
    const ANY_PAIR: bool = F::ANY_PAIR;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        (**self).define(site, query, key, score)
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        (**self).apply(s, site, query, first, scores);
    }
    #[inline(always)]
    fn apply_seen<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Seen<'_>,
    ) {
        (**self).apply_seen(s, site, query, first, scores, seen);
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        (**self).check(dims)
    }
}

/// `score + by`, but -inf where either is, even if the other is NaN. Two finite
/// numbers, as two biases that pad, hide no key: their sum is `f32::MIN` at
/// least.
#[inline(always)]
pub(crate) fn shift(score: f32, by: f32) -> f32 {
    let sum = score + by;
    // The order keeps NaN.
    let sum = if sum < f32::MIN { f32::MIN } else { sum };
    if score == f32::NEG_INFINITY || by == f32::NEG_INFINITY { f32::NEG_INFINITY } else { sum }
}

/// The same by definition.
pub(crate) fn define_shift(score: f64, by: f64) -> f64 {
    const LEAST: f64 = f32::MIN as f64;
    let sum = if score + by < LEAST { LEAST } else { score + by };
    if score == f64::NEG_INFINITY || by == f64::NEG_INFINITY { f64::NEG_INFINITY } else { sum }
}

/// Adds the same to all scores.
#[inline(always)]
fn shift_all(scores: &mut [f32], by: f32) {
    for score in scores {
        *score = shift(*score, by);
    }
}

/// Adds to each score its own; both are as long as the shorter.
#[inline(always)]
fn shift_each(scores: &mut [f32], by: &[f32]) {
    for (score, &by) in scores.iter_mut().zip(by) {
        *score = shift(*score, by);
    }
}

/// Adds to each score its own, of any storage type: [`shift`], lane by lane. Both are
/// as long as the shorter.
#[inline(always)]
fn shift_row<S: Simd, T: Element>(s: S, scores: &mut [f32], by: &[T]) {
    let (least, none) = (s.splat(f32::MIN), s.splat(f32::NEG_INFINITY));
    let shifted = |score: S::F, by: S::F| {
        let sum = s.add(score, by);
        let sum = s.select(s.lt(sum, least), least, sum);
        // What is less than the least finite number is -inf.
        let sum = s.select(s.lt(score, least), none, sum);
        s.select(s.lt(by, least), none, sum)
    };
    let len = scores.len().min(by.len());
    let (mut scores, mut by) = (scores[..len].chunks_exact_mut(S::LANES), by[..len].chunks_exact(S::LANES));
    for (scores, by) in (&mut scores).zip(&mut by) {
        s.store(scores, shifted(s.load(scores), T::load(s, by)));
    }
    let (scores, by) = (scores.into_remainder(), by.remainder());
    s.store_tail(scores, shifted(s.load_tail(scores), T::load_tail(s, by)));
}

/// How many of `len` keys, of which the first is at `column`, come before column
/// 0 and before the end of a row.
#[inline(always)]
pub(crate) fn ends_of(column: isize, columns: usize, len: usize) -> [usize; 2] {
    let clamp = |n: isize| n.clamp(0, len as isize) as usize;
    let start = clamp(column.saturating_neg());
    [start, clamp((columns as isize).saturating_sub(column)).max(start)]
}

/// Adds to each score `factor` times the entry of its distance: the first takes
/// that of `column`, were the row long enough; those beyond take the entry at the end.
#[inline(always)]
pub(crate) fn shift_by_distance(scores: &mut [f32], row: &[f32], column: isize, factor: f32) {
    let (&[before, ..], &[.., after]) = (row, row) else { return };
    let [start, end] = ends_of(column, row.len(), scores.len());
    let (head, rest) = scores.split_at_mut(start);
    let (middle, tail) = rest.split_at_mut(end - start);
    shift_all(head, factor * before);
    for (score, &by) in middle.iter_mut().zip(row.get(column.max(0) as usize..).unwrap_or(&[])) {
        *score = shift(*score, factor * by);
    }
    shift_all(tail, factor * after);
}

/// Adds a number for each key: `s + shifts[b, h, j]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyShift<'a> {
    /// `[batch, heads, kv_len]`
    pub(crate) shifts: &'a [f32],
    pub(crate) heads: usize,
}

impl KeyShift<'_> {
    #[inline(always)]
    fn from(&self, site: &Site, key: usize) -> &[f32] {
        let row = (site.batch * self.heads + site.head) * site.kv_len;
        &self.shifts[row + key..row + site.kv_len]
    }
}

impl Score for KeyShift<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, _: usize, key: usize, score: f64) -> f64 {
        define_shift(score, f64::from(self.from(site, key)[0]))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, _: usize, first: usize, scores: &mut [f32]) {
        shift_each(scores, self.from(site, first));
    }
}

/// Adds an array of any storage type to the scores: `s + bias[b, h, i, j]`.
///
/// The view is `[batch, q_heads, q_len, kv_len]` of any strides, and each
/// axis may be 1 instead, which stands for all of them; see
/// [`Boolean`](crate::mask::Boolean) for how a smaller array comes in. Where
/// key lengths are given, the last axis has still the `kv_len` of the arrays.
///
/// ```
/// use attention_kernels::{dense::Dense, score::Bias};
/// use half::bf16;
/// use ndarray::Array4;
///
/// // Additive masks come in the type of the model.
/// let bias = Array4::from_elem((1, 1, 5, 9), bf16::ZERO);
/// let dense = Dense::builder().score(Bias::new(bias.view())).build()?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// An entry of -inf makes its key invisible even if the score is NaN, so a
/// bias of 0 and -inf is a mask (but nothing is skipped because of it). NaN
/// and +inf show in the output of the query.
///
/// # Errors
/// A call is refused whose sizes the view does not have. In a packed batch
/// the first axis counts sequences and the two last must be 1.
#[derive(Clone, Debug)]
pub struct Bias<'a, T = f32>(Pairs<'a, T>);

impl<'a, T: Element> Bias<'a, T> {
    /// Adds a view `[batch | 1, q_heads | 1, q_len | 1, kv_len | 1]`.
    pub fn new(bias: ArrayView4<'a, T>) -> Self {
        Self(Pairs::new(bias))
    }

    /// [`Score::check`], by the name that the bias and its axes have where it
    /// is an argument.
    pub(crate) fn check_as(&self, argument: &'static str, axes: &str, dims: Dims) -> Result<()> {
        match self.check(&dims) {
            Err(Error::Shape { got, .. }) => {
                let sizes = [dims.batch, dims.q_heads, dims.q_len, dims.kv_len];
                let expected = format!("[batch, heads, {axes}] = {sizes:?} or 1 in place of any of them");
                Err(Error::shape(argument, expected, &got))
            }
            other => other,
        }
    }
}

impl<T: Element> Score for Bias<'_, T> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let bias = self.0.row(site, query).and_then(|row| row.get(key)).map_or(0.0, Element::to_f64);
        define_shift(score, bias)
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        match self.0.row(site, query) {
            None => {}
            Some(PairRow::Same(bias)) => shift_all(scores, bias.to_f32()),
            Some(PairRow::Slice(row)) => shift_row(s, scores, row.get(first..).unwrap_or(&[])),
            Some(PairRow::Strided(matrix, query)) => {
                for (score, key) in scores.iter_mut().zip(first..matrix.cols()) {
                    *score = shift(*score, matrix.at(query, key).to_f32());
                }
            }
        }
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check("bias", "a bias with a length axis", dims)
    }
}

/// Attention with linear biases: `s - slope_h |p(i) - j|` (ALiBi, arXiv
/// 2108.12409).
///
/// Query `i` sits at position `p(i) = i + q_start`, by default with the last
/// query at the last key. With a causal mask this is the published `slope_h
/// (j - p(i))`; without one it is the symmetric form. Distances up to 2^24
/// are exact, and up to 2^30 right to rounding.
///
/// # Errors
/// A call is refused whose `q_heads` is not the number of slopes.
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi {
    slopes: Vec<f32>,
    q_start: Option<isize>,
}

impl Alibi {
    /// The published slopes for any number of heads.
    ///
    /// For `n` a power of two they are `2^(-8 (h + 1) / n)`. Otherwise they
    /// are those of the power of two below `n`, followed by every other one
    /// (the first, the third, ...) of those of the power of two above.
    ///
    /// ```
    /// use attention_kernels::score::Alibi;
    ///
    /// assert_eq!(Alibi::new(4).slopes(), [0.25, 0.0625, 0.015625, 0.00390625]);
    /// assert_eq!(Alibi::new(3).slopes(), [0.0625, 0.00390625, 0.25]);
    /// ```
    pub fn new(heads: usize) -> Self {
        let ladder = |n: usize| (1..=n).map(move |h| (-8.0 * h as f64 / n as f64).exp2() as f32);
        // The greatest power of two that is not above `heads`.
        let below = heads.checked_ilog2().map_or(0, |log| 1 << log);
        let between =
            (0..heads - below).map(|i| (-8.0 * (2 * i + 1) as f64 / (2 * below) as f64).exp2() as f32);
        Self { slopes: ladder(below).chain(between).collect(), q_start: None }
    }

    /// One slope a query head; a positive one lowers scores with distance.
    ///
    /// # Errors
    /// A slope that is not finite, or beyond 1e28, whose product with a
    /// distance might not be.
    pub fn from_slopes(slopes: &[f32]) -> Result<Self> {
        if let Some((head, slope)) =
            slopes.iter().enumerate().find(|(_, slope)| slope.is_nan() || slope.abs() > 1e28)
        {
            return Err(Error::value(
                "slopes",
                "finite slopes, 1e28 at most",
                format_args!("{slope} for head {head}"),
            ));
        }
        Ok(Self { slopes: slopes.to_vec(), q_start: None })
    }

    /// Query 0 sits at position `q_start`, which may be negative.
    #[must_use]
    pub fn at(self, q_start: isize) -> Self {
        Self { q_start: Some(q_start), ..self }
    }

    /// The slopes, one a head.
    pub fn slopes(&self) -> &[f32] {
        &self.slopes
    }

    #[inline(always)]
    fn slope(&self, site: &Site) -> f32 {
        self.slopes.get(site.head).copied().unwrap_or(0.0)
    }
}

impl Score for Alibi {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let distance = site.position(self.q_start, query).abs_diff(key as isize);
        define_shift(score, -f64::from(self.slope(site)) * distance as f64)
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        const LIMIT: isize = 1 << 30;
        let slope = self.slope(site);
        let ahead =
            site.position(self.q_start, query).saturating_sub(first as isize).clamp(-LIMIT, LIMIT) as i32;
        for (t, score) in scores.iter_mut().enumerate() {
            let distance = ahead.wrapping_sub(t as i32).wrapping_abs();
            *score = shift(*score, -slope * distance as f32);
        }
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if self.slopes.len() == dims.q_heads {
            return Ok(());
        }
        let expected = format!("one slope for each query head, q_heads = {}", dims.q_heads);
        Err(Error::value("slopes", expected, format_args!("{} slopes", self.slopes.len())))
    }
}

/// Keeps scores inside `(-c, c)`: `c tanh(s / c)` (Gemma 2, arXiv
/// 2408.00118).
///
/// NaN stays NaN and -inf stays -inf, so that a key that a bias before it
/// made invisible stays invisible. Models cap before they add anything:
/// `(softcap, alibi, bias)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Softcap {
    cap: f32,
}

impl Softcap {
    /// Caps at `cap`.
    ///
    /// # Errors
    /// A cap that is not positive and finite.
    pub fn new(cap: f32) -> Result<Self> {
        if cap > 0.0 && cap.is_finite() {
            Ok(Self { cap })
        } else {
            Err(Error::value("softcap", "a cap above 0 and finite", cap))
        }
    }

    #[inline(always)]
    fn capped<S: Simd>(&self, s: S, x: S::F) -> S::F {
        let cap = s.splat(self.cap);
        let y = s.mul(cap, exp::tanh(s, s.div(x, cap)));
        s.select(s.lt(x, s.splat(f32::MIN)), x, y)
    }
}

impl Score for Softcap {
    const ANY_PAIR: bool = true;

    fn define(&self, _: &Site, _: usize, _: usize, score: f64) -> f64 {
        let cap = f64::from(self.cap);
        if score == f64::NEG_INFINITY { score } else { cap * (score / cap).tanh() }
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, _: &Site, _: usize, _: usize, scores: &mut [f32]) {
        let mut blocks = scores.chunks_exact_mut(S::LANES);
        for block in &mut blocks {
            s.store(block, self.capped(s, s.load(block)));
        }
        let rest = blocks.into_remainder();
        s.store_tail(rest, self.capped(s, s.load_tail(rest)));
    }
}

/// Adds what a table has for the distance: `s + table[h, clamp(j - p(i), -w,
/// w) + w]`, a learned bias for each relative position as T5 has it (arXiv
/// 1910.10683, one bucket a distance), clipped at `w` as by Shaw et al.
/// (arXiv 1803.02155).
///
/// Query `i` sits at position `p(i) = i + q_start`, by default with the last
/// query at the last key. Column `w` is distance 0, columns before it are
/// keys before the query. Distances beyond `w` take the entry at the end.
///
/// Entries of -inf make keys invisible even if their score is NaN; NaN and
/// +inf show in the output.
///
/// # Errors
/// A call is refused unless the table has one row or `q_heads`.
#[derive(Clone, Debug, PartialEq)]
pub struct RelativeTable {
    /// Rows of `2 * max_distance + 1` entries.
    table: Vec<f32>,
    heads: usize,
    max_distance: usize,
    q_start: Option<isize>,
}

impl RelativeTable {
    /// A table `[heads | 1, 2 * max_distance + 1]`.
    ///
    /// # Errors
    /// A table without rows, or with an even number of columns.
    pub fn new(table: Array2<f32>) -> Result<Self> {
        let (heads, columns) = table.dim();
        if heads == 0 || columns % 2 == 0 {
            return Err(Error::shape("table", "[heads | 1, 2 * max_distance + 1]", table.shape()));
        }
        let table = table.iter().copied().collect();
        Ok(Self { table, heads, max_distance: columns / 2, q_start: None })
    }

    /// Query 0 sits at position `q_start`, which may be negative.
    #[must_use]
    pub fn at(self, q_start: isize) -> Self {
        Self { q_start: Some(q_start), ..self }
    }

    /// The largest distance that has an entry of its own.
    pub fn max_distance(&self) -> usize {
        self.max_distance
    }

    /// The column of key `first`, were the table long enough.
    #[inline(always)]
    fn column(&self, site: &Site, query: usize, first: usize) -> isize {
        let distance = (first as isize).saturating_sub(site.position(self.q_start, query));
        distance.saturating_add(self.max_distance as isize)
    }

    /// The row of a head.
    #[inline(always)]
    fn row(&self, site: &Site) -> &[f32] {
        let columns = 2 * self.max_distance + 1;
        let head = if self.heads == 1 { 0 } else { site.head };
        self.table.get(head * columns..(head + 1) * columns).unwrap_or(&[])
    }
}

impl Score for RelativeTable {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let w = self.max_distance as isize;
        let distance = (key as isize).saturating_sub(site.position(self.q_start, query)).clamp(-w, w);
        let by = self.row(site).get((distance + w) as usize).copied().unwrap_or(0.0);
        define_shift(score, f64::from(by))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        shift_by_distance(scores, self.row(site), self.column(site, query, first), 1.0);
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if self.heads == 1 || self.heads == dims.q_heads {
            return Ok(());
        }
        let expected = format!("[q_heads | 1, 2 * max_distance + 1] with q_heads = {}", dims.q_heads);
        Err(Error::shape("table", expected, &[self.heads, 2 * self.max_distance + 1]))
    }
}

/// [`Score`] for engines that know no score by type.
pub(crate) trait AnyScore: Send + Sync {
    /// [`Score::IDENTITY`]
    fn is_identity(&self) -> bool;

    /// [`Score::apply`], of the pairs that are `seen` at least.
    fn apply_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Option<Seen<'_>>,
    );
}

/// Which scores of a row belong to visible pairs: bit `first + t` of the words
/// says it of score `t`.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub(crate) words: &'a [u64],
    pub(crate) first: usize,
}

impl Seen<'_> {
    /// Whether the 64 scores from one on are seen.
    #[inline(always)]
    fn word(&self, from: usize) -> u64 {
        let (i, shift) = ((self.first + from) / 64, (self.first + from) % 64);
        let word = |i: usize| self.words.get(i).copied().unwrap_or(0);
        // Shifting in two steps stays below 64 where `shift` is 0.
        word(i) >> shift | word(i + 1) << 1 << (63 - shift)
    }

    /// The next neighbours among scores `from..len` that are seen.
    #[inline(always)]
    fn run(&self, from: usize, len: usize) -> Range<usize> {
        // The first bit from one on that has this value.
        let find = |mut at: usize, value: bool| {
            while at < self.first + len {
                let word = self.words.get(at / 64).copied().unwrap_or(0);
                let left = (if value { word } else { !word }) >> (at % 64);
                if left != 0 {
                    return (at + left.trailing_zeros() as usize - self.first).min(len);
                }
                at = (at / 64 + 1) * 64;
            }
            len
        };
        let start = find(self.first + from, true);
        start..find(self.first + start, false)
    }
}

impl<F: Score> AnyScore for F {
    fn is_identity(&self) -> bool {
        F::IDENTITY
    }

    fn apply_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Option<Seen<'_>>,
    ) {
        let seen = seen.filter(|_| !F::ANY_PAIR);
        isa.dispatch(Apply { score: self, site, query, first, scores, seen });
    }
}

struct Apply<'a, F> {
    score: &'a F,
    site: &'a Site,
    query: usize,
    first: usize,
    scores: &'a mut [f32],
    seen: Option<Seen<'a>>,
}

impl<F: Score> Kernel for Apply<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { score, site, query, first, scores, seen } = self;
        match seen {
            None => score.apply(s, site, query, first, scores),
            Some(seen) => score.apply_seen(s, site, query, first, scores, seen),
        }
    }
}
