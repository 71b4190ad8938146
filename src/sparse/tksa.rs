//! DRSformer's top-k sparse attention (TKSA) between channels.
//!
//! ```text
//! S_ij = temperature_h  q_i . k_j / (|q_i| |k_j|)     for channels i, j; norms over the pixels, at least 1e-12
//! T_r  = the floor(r C) channels with the largest S_ij, the lower one of equals, at least one
//! o_i  = sum_r a_r sum_{j in T_r} softmax_{T_r}(S_i)_j v_j    for the ratios r = 1/2, 2/3, 3/4, 4/5
//! ```
//!
//! Channels attend to channels, so that the cost is linear in the pixels; the
//! four choices are prefixes of one order, and one matrix of weights is applied.
//! From "Learning A Sparse Transformer Network for Effective Image Deraining"
//! (arXiv 2303.11950), with mixing weights `a_r` that are learned.
//!
//! Rows are channels and columns pixels: `[batch, heads, channels, pixels]`.
//!
//! Cost: `4 pixels` flops a pair of channels.

use ndarray::{Array2, Array3, Array4, ArrayView4, ArrayViewMut4, Axis, s};

use crate::attention::{Attention, Cost, Margins, Selects, TopWeights, Weights};
use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::{Real, Running, softmax};
use crate::definition::select::chosen;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::tokens::Tokens;
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::{Layout, Per, Run, TokenLists};
use crate::select::lists::{join_ones, lists_of_queries};
use crate::select::{Forced, Pick, Rule, Unpack, pick};
use crate::simd::any::IntoAny;
use crate::simd::exp::exp;
use crate::simd::mem::{Heads, bytes_for, bytes_for_shares};
use crate::simd::{Kernel, Simd};
use crate::stages::attend::check_out;
use crate::stages::channels::{Channels, RowOf, Similarities};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Out, Pass, counted, once, run_in};
use crate::stages::{mix, selecting};

/// Top-k sparse attention between channels; see the [module](crate::sparse) for
/// its kin.
///
/// An index has a list for each ratio and channel: query `r * channels + i`.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::Tksa};
/// use ndarray::Array4;
///
/// // 48 channels in 3 heads, of 20 x 30 pixels.
/// let x = Array4::from_shape_fn((1, 3, 16, 600), |(_, h, i, p)| ((h + i * (p + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let tksa = Tksa::builder(vec![1.0; 3]).mix(vec![(0.5, 0.6), (0.75, 0.4)]).build()?;
/// let index = tksa.select(x)?;
/// assert_eq!([index.keys(0, 0, 0), index.keys(0, 0, 16)], [8, 12]);
/// let out = tksa.forward_on(x, &index)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tksa {
    temperatures: Vec<f32>,
    mix: Vec<(f64, f32)>,
    channels: Channels,
}

/// The most ratios.
const MOST: usize = 16;

impl Tksa {
    /// With a temperature for each head, or one for all.
    pub fn builder(temperatures: Vec<f32>) -> TksaBuilder {
        TksaBuilder::with(temperatures)
    }

    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.lengths != Lengths::Full {
            let reason = "rows are channels, and all images have as many";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "channels", reason });
        }
        let count = self.temperatures.len();
        if count != 1 && count != dims.q_heads {
            return Err(Error::value("q", format!("{count} heads, as many as temperatures"), dims.q_heads));
        }
        Ok(dims)
    }

    fn temperature(&self, head: usize) -> f32 {
        self.temperatures[if self.temperatures.len() == 1 { 0 } else { head }]
    }

    /// How many of `n` channels a ratio keeps.
    fn kept(&self, ratio: f64, n: usize) -> usize {
        ((n as f64 * ratio).floor() as usize).max(1).min(n)
    }

    fn layout(&self, dims: &Dims) -> Layout {
        Layout { queries: self.mix.len() * dims.q_len, ..Layout::new(Per::Head, 1, dims) }
    }

    /// The lists of the channels that `is_chosen(head of a sequence, channel, count)`
    /// says.
    fn lists<F: Fn(u32) -> bool>(
        &self,
        dims: &Dims,
        mut is_chosen: impl FnMut(usize, usize, usize) -> F,
    ) -> Result<TokenLists> {
        let layout = self.layout(dims);
        layout.lists()?;
        let (mut offsets, mut keys) = (vec![0], Vec::new());
        for head in 0..dims.batch * dims.q_heads {
            for (&(ratio, _), i) in self.mix.iter().flat_map(|r| (0..dims.q_len).map(move |i| (r, i))) {
                let is_chosen = is_chosen(head, i, self.kept(ratio, dims.kv_len));
                keys.extend((0..dims.kv_len as u32).filter(|&j| is_chosen(j)));
                offsets.push(keys.len());
            }
        }
        TokenLists::from_keys(layout, &offsets, &keys)
    }

    fn similarities<'a, T: Element>(&self, pass: &mut Pass<'a>, x: &Qkv<'_, T>) -> Result<Similarities<'a>> {
        // Channels are columns there, and pixels are summed over.
        let [q, k] = [x.q.reborrow(), x.k.reborrow()].map(|x| x.permuted_axes([0, 1, 3, 2]));
        self.channels.similarities(pass, [q, k], x.q.dim().1, |head| self.temperature(head))
    }

    /// The same of a head, by definition.
    fn define_similarities<R: Real>(&self, [q, k]: [&Array2<R>; 2], head: usize) -> Array2<R> {
        let [q, k] = [q, k].map(|x| x.t().to_owned());
        self.channels.define_similarities([&q, &k], f64::from(self.temperature(head)))
    }

    /// The choice, from similarities.
    fn choose(&self, dims: &Dims, rows: ArrayView4<'_, f32>) -> Result<TokenLists> {
        let (n, m, isa, workers) = (dims.kv_len, dims.q_len, self.channels.isa, parallel::threads());
        let share = bytes_for::<f32>(n) + bytes_for::<u64>(n.div_ceil(64)) + pick::Room::bytes(n);
        let mut workspace = Workspace::new();
        let shares = workspace.arena(bytes_for_shares(workers, share))?.shares(workers, share);
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            (arena.take::<f32>(n), arena.take::<u64>(n.div_ceil(64)), pick::Room::take(&mut arena, n))
        };
        let rows = f32::any(Heads::new(rows));
        lists_of_queries(self.layout(dims), start, |(row, bits, room), b, query, runs| {
            let (ratio, i) = (query / m, query % m);
            let rule = Rule::TopK(self.kept(self.mix[ratio].0, n));
            for (h, runs) in runs.iter_mut().enumerate() {
                isa.dispatch(Unpack { from: rows.rows(b, h, &(i..i + 1)), to: row });
                pick::choose(isa, &Pick { rule, forced: Forced::default() }, row, room, bits);
                join_ones(runs, bits);
            }
        })
    }

    /// The channels that a list names.
    fn named<'a>(&self, index: &'a TokenLists, [b, h, i]: [usize; 3], ratio: usize) -> &'a [Run] {
        let m = index.layout().queries / self.mix.len();
        index.runs(b, h, ratio * m + i)
    }

    fn flow<T: Element>(
        &self,
        x: Qkv<'_, T>,
        index: Option<&TokenLists>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.check(&x)?;
        if let Some(index) = index.filter(|index| *index.layout() != self.layout(&dims)) {
            let expected = format!("{:?}", self.layout(&dims));
            return Err(Error::value("keys", expected, format_args!("{:?}", index.layout())));
        }
        let scores = self.similarities(pass, &x)?;
        let mut weights = pass.rows((dims.batch, dims.q_heads, dims.q_len, dims.kv_len))?;
        // A run that counts makes no choice.
        let own =
            if index.is_none() && out.is_some() { Some(self.choose(&dims, scores.view())?) } else { None };
        let index = index.or(own.as_ref());
        scores.map(pass, &mut weights, |row, scores, weights| {
            let at = [row / dims.q_len / dims.q_heads, row / dims.q_len % dims.q_heads, row % dims.q_len];
            let Some(index) = index else { return };
            let set = |ratio| self.named(index, at, ratio);
            self.channels.isa.dispatch(Mix { scores, weights, set, mix: &self.mix });
        });
        mix::run(pass, self.channels.isa, weights.view(), x.v, out);
        Ok(())
    }

    /// All similarities by definition.
    fn define_scores<T: Element>(&self, x: &Qkv<'_, T>, dims: &Dims) -> Array4<f64> {
        of_heads(&Dims { value_dim: dims.kv_len, ..*dims }, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            self.define_similarities([&q, &k], head.head)
        })
    }

    /// Scores that no list has become -inf.
    fn hide<R: Copy>(&self, scores: &mut Array4<R>, index: &TokenLists, hidden: R) {
        let (batch, heads, rows, _) = scores.dim();
        let places = ndarray::indices((batch, heads, rows)).into_iter();
        for ((b, h, i), mut row) in places.zip(scores.rows_mut()) {
            let mut seen = vec![false; row.len()];
            (0..self.mix.len())
                .flat_map(|r| self.named(index, [b, h, i], r))
                .for_each(|run| seen[run.range()].fill(true));
            row.iter_mut().zip(seen).filter(|(_, seen)| !seen).for_each(|(x, _)| *x = hidden);
        }
    }

    /// The definition on an index: weights of all channels, or outputs.
    fn define<R: Real, T: Element>(
        &self,
        x: &Qkv<'_, T>,
        index: &TokenLists,
        weights: bool,
    ) -> Result<Array4<R>> {
        let dims = self.check(x)?;
        let dims = if weights { Dims { value_dim: dims.kv_len, ..dims } } else { dims };
        Ok(of_heads(&dims, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            let v: Array2<R> = head.rows(&x.v, &head.keys);
            let scores: Array2<R> = self.define_similarities([&q, &k], head.head);
            let mut out = Array2::from_elem((dims.q_len, dims.value_dim), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                for (r, &(_, share)) in self.mix.iter().enumerate() {
                    let named = self.named(index, [head.batch, head.head, i], r);
                    let ids: Vec<usize> = named.iter().flat_map(|run| run.range()).collect();
                    let of = softmax(&ids.iter().map(|&j| scores[[i, j]]).collect::<Vec<R>>());
                    for (&j, weight) in ids.iter().zip(of) {
                        let weight = R::of(f64::from(share)) * weight;
                        if weights {
                            out[j] = out[j] + weight;
                        } else {
                            for (c, out) in out.iter_mut().enumerate() {
                                *out = *out + weight * v[[j, c]];
                            }
                        }
                    }
                }
            }
            out
        }))
    }
}

options! {
    /// Builds a [`Tksa`].
    TksaBuilder of Tksa, isa;
    given { temperatures: Vec<f32>, in FINITE; }
    own { mix: Vec<(f64, f32)> = vec![(1.0 / 2.0, 0.2), (2.0 / 3.0, 0.2), (3.0 / 4.0, 0.2), (4.0 / 5.0, 0.2)]; }
    build(this, config) {
        if this.temperatures.is_empty() {
            return Err(Error::value("temperatures", "one for all heads or one for each", "none"));
        }
        let holds = |&&(ratio, share): &&(f64, f32)| !(ratio > 0.0 && ratio <= 1.0 && share.is_finite());
        if let Some((ratio, share)) = this.mix.iter().find(holds) {
            let expected = "ratios above 0 up to 1, and finite weights";
            return Err(Error::value("mix", expected, format_args!("({ratio}, {share})")));
        }
        if this.mix.is_empty() {
            return Err(Error::value("mix", "at least one ratio", "none"));
        }
        if this.mix.len() > MOST {
            return Err(Error::value("mix", format!("at most {MOST} ratios"), this.mix.len()));
        }
        let channels = Channels { isa: config.isa, row: RowOf::Softmax, unit: true };
        Ok(Tksa { temperatures: this.temperatures, mix: this.mix, channels })
    }
}

impl TksaBuilder {
    /// Ratios of channels that are kept, each with the weight of its result.
    pub fn mix(self, mix: Vec<(f64, f32)>) -> Self {
        Self { mix, ..self }
    }
}

/// A row of similarities becomes one of weights.
struct Mix<'a, F> {
    scores: &'a mut [f32],
    weights: &'a mut [f32],
    /// The channels of a ratio.
    set: F,
    mix: &'a [(f64, f32)],
}

/// Columns whose bits are held at once.
const HELD: usize = 1024;

/// Sets the bits of the columns `first..` that runs name.
#[inline(always)]
fn mark(runs: &[Run], first: usize, words: &mut [u64]) {
    let end = first + 64 * words.len();
    let from = runs.partition_point(|run| run.range().end <= first);
    for run in runs[from..].iter().take_while(|run| (run.start as usize) < end) {
        let (start, end) = ((run.start as usize).max(first) - first, run.range().end.min(end) - first);
        let (head, last) = (start / 64, (end - 1) / 64);
        let (low, high) = (u64::MAX << (start % 64), u64::MAX >> (63 - (end - 1) % 64));
        if head == last {
            words[head] |= low & high;
        } else {
            words[head] |= low;
            words[head + 1..last].fill(u64::MAX);
            words[last] |= high;
        }
    }
}

impl<'b, F: Fn(usize) -> &'b [Run]> Kernel for Mix<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, weights, set, mix } = self;
        let (n, mut words) = (scores.len(), [0u64; HELD / 64]);
        let (none, zero) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
        let valid = |words: &[u64], at: usize| s.mask(words[at / 64] >> (at % 64));
        // What no set has must not matter.
        let mut most = none;
        for first in (0..n).step_by(HELD) {
            words.fill(0);
            (0..mix.len()).for_each(|ratio| mark(set(ratio), first, &mut words));
            let end = n.min(first + HELD);
            for (v, x) in scores[first..end].chunks_mut(S::LANES).enumerate() {
                let x_ = s.select(valid(&words, v * S::LANES), s.load_tail(x), none);
                // NaN is not the larger: it comes through in the sum.
                most = s.max(x_, most);
                s.store_tail(x, x_);
            }
        }
        let base = s.splat(s.reduce_max(most));
        for x in scores.chunks_mut(S::LANES) {
            let weight = exp(s, s.sub(s.load_tail(x), base));
            s.store_tail(x, weight);
        }
        weights.fill(0.0);
        for (ratio, &(_, share)) in mix.iter().enumerate() {
            let mut sum = zero;
            for first in (0..n).step_by(HELD) {
                words.fill(0);
                mark(set(ratio), first, &mut words);
                let end = n.min(first + HELD);
                for (v, x) in scores[first..end].chunks(S::LANES).enumerate() {
                    sum = s.add(sum, s.select(valid(&words, v * S::LANES), s.load_tail(x), zero));
                }
            }
            let factor = s.splat(share / s.reduce_add(sum));
            for first in (0..n).step_by(HELD) {
                if n > HELD {
                    words.fill(0);
                    mark(set(ratio), first, &mut words);
                }
                let end = n.min(first + HELD);
                let rows = weights[first..end].chunks_mut(S::LANES).zip(scores[first..end].chunks(S::LANES));
                for (v, (to, x)) in rows.enumerate() {
                    let before = s.load_tail(to);
                    let x = s.mul_add(factor, s.load_tail(x), before);
                    s.store_tail(to, s.select(valid(&words, v * S::LANES), x, before));
                }
            }
        }
    }
}

impl<T: Element> Attention<Qkv<'_, T>> for Tksa {
    fn workspace_bytes(&self, x: Qkv<'_, T>) -> Result<usize> {
        counted(|pass| self.flow(x, None, pass, None))
    }

    fn forward_into(
        &self,
        x: Qkv<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let bytes = counted(|pass| self.flow(x, None, pass, None))?;
        check_out(&x, &out)?;
        run_in(workspace, bytes, |pass| self.flow(x, None, pass, Some(out)))
    }

    fn reference(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        let (index, _) = self.reference_select(x)?;
        self.reference_on(x, &index)
    }

    fn cost(&self, x: Qkv<'_, T>) -> Result<Cost> {
        let Dims { batch, q_heads, q_len, kv_len, head_dim, value_dim, .. } = self.check(&x)?;
        let pairs = (batch * q_heads * q_len * kv_len) as u64;
        let out = batch * q_heads * q_len * value_dim * size_of::<T>();
        Ok(Cost { flops: 2 * pairs * (head_dim + value_dim) as u64, bytes: (x.bytes() + out) as u64 })
    }
}

impl<T: Element> Selects<Qkv<'_, T>> for Tksa {
    type Index = TokenLists;

    fn select(&self, x: Qkv<'_, T>) -> Result<TokenLists> {
        let dims = self.check(&x)?;
        let scores = once(|pass| Ok(self.similarities(pass, &x)?.view().to_owned()))?;
        self.choose(&dims, scores.view())
    }

    fn workspace_bytes_on(&self, x: Qkv<'_, T>, index: &TokenLists) -> Result<usize> {
        counted(|pass| self.flow(x, Some(index), pass, None))
    }

    fn forward_on_into(
        &self,
        x: Qkv<'_, T>,
        index: &TokenLists,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let bytes = self.workspace_bytes_on(x, index)?;
        check_out(&x, &out)?;
        run_in(workspace, bytes, |pass| self.flow(x, Some(index), pass, Some(out)))
    }

    fn reference_select(&self, x: Qkv<'_, T>) -> Result<(TokenLists, Margins)> {
        let dims = self.check(&x)?;
        let scores = self.define_scores(&x, &dims);
        let mut margins = Margins::default();
        let index = self.lists(&dims, |head, i, count| {
            let row = scores.slice(s![head / dims.q_heads, head % dims.q_heads, i, ..]).to_vec();
            let pick = Pick { rule: Rule::TopK(count), forced: Forced::default() };
            let (ids, doubtful) = chosen(&pick, &row);
            margins.doubtful.push(doubtful.into_iter().map(|j| j..j + 1).collect());
            let mut is_chosen = vec![false; row.len()];
            ids.into_iter().for_each(|j| is_chosen[j] = true);
            move |j| is_chosen[j as usize]
        })?;
        Ok((index, margins))
    }

    fn reference_on(&self, x: Qkv<'_, T>, index: &TokenLists) -> Result<Array4<f64>> {
        self.define(&x, index, false)
    }

    fn bound_on(&self, x: Qkv<'_, T>, index: &TokenLists) -> Result<Array3<f64>> {
        let out = self.define::<Running, T>(&x, index, false)?;
        let most = |most: f64, x: &Running| if x.off() > most || x.off().is_nan() { x.off() } else { most };
        Ok(out.map_axis(Axis(3), |row| row.iter().fold(0.0, most)))
    }

    fn difference(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
        selecting::difference(a, b, margins)
    }
}

impl<T: Element> Weights<Qkv<'_, T>> for Tksa {
    fn scores(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        let index = self.select(x)?;
        let mut scores = once(|pass| Ok(self.similarities(pass, &x)?.view().to_owned()))?;
        self.hide(&mut scores, &index, f32::NEG_INFINITY);
        Ok(scores)
    }

    fn weights(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        let (batch, heads, n, _) = x.v.dim();
        let one = |(_, _, j, c): (usize, usize, usize, usize)| f32::from(j == c);
        let v = Array4::from_shape_fn((batch, heads, n, n), one);
        let (q, k) = (x.q.mapv(Element::to_f32), x.k.mapv(Element::to_f32));
        self.forward(Qkv::new(q.view(), k.view(), v.view()))
    }

    fn key_weights(&self, x: Qkv<'_, T>) -> Result<Array3<f32>> {
        Ok(self.weights(x)?.sum_axis(Axis(2)))
    }

    fn top_weights(&self, x: Qkv<'_, T>, count: usize) -> Result<TopWeights> {
        crate::engine::weights::top_of(&self.weights(x)?, count)
    }

    fn reference_scores(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        let (index, _) = self.reference_select(x)?;
        let mut scores = self.define_scores(&x, &self.check(&x)?);
        self.hide(&mut scores, &index, f64::NEG_INFINITY);
        Ok(scores)
    }

    fn reference_weights(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        let (index, _) = self.reference_select(x)?;
        self.define(&x, &index, true)
    }
}

exhibit! {
    TksaExhibit of Tksa, "sparse", "TKSA", "arXiv 2303.11950";
    "rows are channels, and each is a mixture of its most similar half, two thirds, three and four fifths";
    not "where pixels must attend to pixels";
    tokens false;
    build(_, _) { Tksa::builder(vec![3.0]) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Tksa, TksaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::testing::{Arrays, near};

    fn tksa(mix: &[(f64, f32)]) -> Tksa {
        Tksa::builder(vec![2.0, 0.5, -1.0, 9.0]).mix(mix.to_vec()).build().unwrap()
    }

    /// Four masked softmaxes and four products, one after the other, and by size
    /// of the ratios in any order.
    #[test]
    fn one_matrix_is_four_softmaxes() {
        for (m, n, pixels) in [(12, 12, 300), (48, 48, 4500), (5, 1, 9), (3, 33, 64)] {
            let x = Arrays::normal([2, 4, 2, m, n, pixels, 40], n as u64);
            let four = [(0.5, 0.2), (2.0 / 3.0, 0.3), (0.75, -0.1), (0.8, 0.4)];
            let all = tksa(&four).forward(x.qkv()).unwrap();
            let mut sum = Array4::zeros(all.dim());
            for one in four.into_iter().rev() {
                sum += &tksa(&[one]).forward(x.qkv()).unwrap();
            }
            near(&format!("{m} {n}"), &all, &sum);
            let index = tksa(&four).select(x.qkv()).unwrap();
            let (want, margins) = tksa(&four).reference_select(x.qkv()).unwrap();
            assert_eq!(<Tksa as Selects<Qkv<'_, f32>>>::difference(&index, &want, &margins), None);
            let (got, want) = (tksa(&four).forward_on(x.qkv(), &index).unwrap(), all);
            assert_eq!(got, want);
            let bound = tksa(&four).bound_on(x.qkv(), &index).unwrap();
            crate::testing::within("tksa", &got, &tksa(&four).reference_on(x.qkv(), &index).unwrap(), &bound);
        }
    }

    #[test]
    fn all_channels_are_a_softmax_and_sizes_do_not_count() {
        let mut x = Arrays::normal([1, 2, 2, 9, 9, 50, 20], 3);
        let tksa = Tksa::builder(vec![4.0]).mix(vec![(1.0, 0.5), (1.0, 0.25)]).build().unwrap();
        let weights = tksa.weights(x.qkv()).unwrap();
        let unit = |x: &Array4<f32>| crate::testing::unit(x.clone());
        let (q, k) = (unit(&x.q), unit(&x.k));
        for ((b, h, i, j), &got) in weights.indexed_iter() {
            let exp =
                |j: usize| (4.0 * (0..50).map(|c| q[[b, h, i, c]] * k[[b, h, j, c]]).sum::<f32>()).exp();
            let want = 0.75 * exp(j) / (0..9).map(exp).sum::<f32>();
            assert!((got - want).abs() < 1e-5, "{got}, {want}");
        }
        let before = tksa.forward(x.qkv()).unwrap();
        x.q.index_axis_mut(Axis(2), 4).mapv_inplace(|x| 7.5 * x);
        x.k.index_axis_mut(Axis(2), 2).mapv_inplace(|x| 0.3 * x);
        near("sizes", &tksa.forward(x.qkv()).unwrap(), &before);
        let top = tksa.top_weights(x.qkv(), 2).unwrap();
        assert!(top.weights.rows().into_iter().all(|row| row[0] >= row[1] && row[1] > 0.0));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: TksaBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(Tksa::builder(vec![])).starts_with("temperatures: "));
        for mix in [vec![], vec![(0.0, 1.0)], vec![(1.5, 1.0)], vec![(0.5, f32::NAN)]] {
            assert!(refusal(Tksa::builder(vec![1.0]).mix(mix)).starts_with("mix: "));
        }
        let x = Arrays::normal([1, 4, 1, 4, 4, 5, 5], 1);
        let other = tksa(&[(0.5, 1.0), (0.8, 1.0)]).select(x.qkv()).unwrap();
        let refusal = tksa(&[(0.5, 1.0)]).forward_on(x.qkv(), &other).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
    }
}
