//! SEA: an estimate of the attention, narrower than the keys, says which are read.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array2, Array4, ArrayView1, ArrayView4, s};

use crate::attention::Margins;
use crate::card::{Extras, Field, carded, exhibit};
use crate::definition::heads::{Head, of_heads};
use crate::definition::number::Real;
use crate::definition::select::{chosen, weights};
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Call, Norm};
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv};
use crate::keys::{Keys, Layout, Per, TokenLists};
use crate::select::finding::ones;
use crate::select::lists::{join, lists_of_queries};
use crate::select::reduce::Shares;
use crate::select::{Forced, Pick, Rule, Unpack, pick};
use crate::simd::any::IntoAny;
use crate::simd::mem::{Heads, bytes_for, bytes_for_shares};
use crate::stages::attend;
use crate::stages::blend::{blend, pixel_means, running_means};
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::pass::{Out, Pass};
use crate::stages::planned::{check_count, sparse};
use crate::stages::selecting::difference;

views! {
    /// What goes into a [`Sea`].
    SeaInput<'a, T> {
        /// Queries, keys and values, as many of each in every entry of the batch.
        qkv: array Qkv<'a, T>,
        /// Logits of the estimated attention, `[batch, q_heads, q_len, pixels]`.
        estimate: array ArrayView4<'a, f32>,
        /// Logits of gates, `[batch, q_heads, q_len, 2]`: of attention, and of attention
        /// against the mean.
        gates: array ArrayView4<'a, f32>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let dims = x.qkv.dims()?;
        x.qkv.lengths.check_full("an estimate", "there is an estimate for every query of the arrays")?;
        for (name, array, last) in [("estimate", &x.estimate, x.estimate.dim().3), ("gates", &x.gates, 2)] {
            let want = (dims.batch, dims.q_heads, dims.q_len, last);
            if array.dim() != want {
                let expected = format!("[batch, q_heads, q_len, _] = {want:?}");
                return Err(Error::shape(name, expected, array.shape()));
            }
        }
        Ok(dims)
    }
}

impl<'a, T> SeaInput<'a, T> {
    /// Of these arrays.
    pub fn new(qkv: Qkv<'a, T>, estimate: ArrayView4<'a, f32>, gates: ArrayView4<'a, f32>) -> Self {
        Self { qkv, estimate, gates }
    }
}

sparse! {
    /// SEA: an estimate of the attention, narrower than the keys, says which are read.
    ///
    /// ```text
    /// A_h    = softmax(estimate_h[t])                          over T pixels, for each head
    /// P_t    = the max(1, round(H k T / n)) largest of A_h[m] over heads and pixels
    /// m(j)   = floor((j + 0.5) T / n - 1e-4), at most T - 1     the pixel of key j < n
    /// C_t    = softmax attention of q_t on the keys whose pixel is in P_t
    /// o_t    = g1 g0 C_t + (1 - g1) avg                         g = logistic functions of gates
    /// causal   n = t + 1,       avg = mean of v_j, j <= t
    /// else     n = all keys,    avg = sum_j a_m(j) v_j          a = mean of A over queries
    /// ```
    ///
    /// From "SEA: Sparse Linear Attention with Estimated Attention Mask" (arXiv
    /// 2310.01777), with a budget for each query, which its heads share. All keys of a pixel
    /// have its share in the sum of values, as in released code: shares then do not sum to 1.
    /// The estimate comes from a predictor of linear cost, which is not part of this.
    ///
    /// The estimate is of whole prompts: it runs over arrays.
    ///
    /// Cost: `2 (head_dim + value_dim)` flops a selected pair, `k` a query and head on
    /// average, and a sort of `H T` numbers a query.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::{Sea, SeaInput}};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::from_shape_fn((1, 2, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let (estimate, gates) = (Array4::zeros((1, 2, 300, 32)), Array4::zeros((1, 2, 300, 2)));
    /// let x = SeaInput::new(Qkv::new(x.view(), x.view(), x.view()), estimate.view(), gates.view());
    /// let out = Sea::builder(64).causal().build()?.forward(x)?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Sea;
    /// Builds a [`Sea`].
    SeaBuilder, perhaps causal;
    given {
        k: usize;
    }
    own {}
    check(this) { check_count("k", this.k) }
}

/// The keys of a pixel, of `n` keys and `t` pixels.
fn keys_of(pixel: usize, n: usize, t: usize) -> Range<usize> {
    start_of(pixel, n, t)..if pixel + 1 == t { n } else { start_of(pixel + 1, n, t) }
}

/// The first key of a pixel, of `n` keys and `t` pixels.
fn start_of(pixel: usize, n: usize, t: usize) -> usize {
    let pixel_of = |j: usize| ((j as f64 + 0.5) / n as f64 * t as f64 - 1e-4).max(0.0) as usize;
    let (mut low, mut high) = (0, if pixel == 0 { 0 } else { n });
    while low < high {
        let middle = low + (high - low) / 2;
        if pixel_of(middle) < pixel { low = middle + 1 } else { high = middle }
    }
    low
}

impl Sea {
    /// About `k` keys a query and head: where heads want more, others get fewer.
    pub fn builder(k: usize) -> SeaBuilder {
        SeaBuilder::with(k)
    }

    /// Keys that a query sees, and pixels that its heads choose.
    fn budget(&self, dims: &Dims, query: usize, pixels: usize) -> [usize; 2] {
        let seen = (query + dims.kv_len + 1).saturating_sub(dims.q_len).min(dims.kv_len);
        let n = if self.is_causal() { seen } else { dims.kv_len };
        let all = dims.q_heads * pixels;
        let wanted = (all as f64 * self.k as f64 / n.max(1) as f64).round_ties_even();
        [n, (wanted as usize).clamp(1, all.max(1))]
    }

    fn is_causal(&self) -> bool {
        self.config.mask().causal
    }

    fn layout(dims: &Dims) -> Layout {
        Layout::new(Per::Head, 1, dims)
    }
}

/// By definition, the pixel of a key, of `n` keys and `t` pixels.
fn pixel_of(j: usize, n: usize, t: usize) -> usize {
    ((j as f64 + 0.5) / n as f64 * t as f64 - 1e-4).floor().clamp(0.0, (t - 1) as f64) as usize
}

/// By definition, how much of the sum of values each of `n` keys has.
fn shares<R: Real>(estimate: &ArrayView4<'_, f32>, head: &Head, n: usize) -> Vec<R> {
    let rows = estimate.slice(s![head.batch, head.head, .., ..]);
    let (queries, pixels) = rows.dim();
    let softmax = |row: ArrayView1<'_, f32>| -> Vec<R> {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let grown: Vec<R> = row.iter().map(|&x| (R::of(x.into()) - R::of(most.into())).exp()).collect();
        let sum = R::total(grown.iter().map(|&x| (R::of(1.0), x)));
        grown.into_iter().map(|x| x / sum).collect()
    };
    let each: Vec<Vec<R>> = rows.outer_iter().map(softmax).collect();
    let received =
        |pixel: usize| R::total(each.iter().map(|row| (R::of(1.0), row[pixel]))) / R::of(queries as f64);
    let received: Vec<R> = (0..pixels).map(received).collect();
    // Without pixels no key has a share.
    let keys = if pixels == 0 { 0..0 } else { 0..n };
    keys.map(|j| received[pixel_of(j, n, pixels)]).collect()
}

impl<T: Element> Choosing<SeaInput<'_, T>> for Sea {
    type Index = TokenLists;

    fn choose(&self, x: SeaInput<'_, T>, _: &mut Workspace) -> Result<TokenLists> {
        let (dims, isa, pixels) = (x.dims()?, self.config.isa(), x.estimate.dim().3);
        let all = dims.q_heads.saturating_mul(pixels);
        let (words, workers) = (all.div_ceil(64), parallel::threads());
        let share = bytes_for::<f32>(all) + bytes_for::<u64>(words) + pick::Room::bytes(all);
        let mut workspace = Workspace::new();
        let shares = workspace.arena(bytes_for_shares(workers, share))?.shares(workers, share);
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            (arena.take::<f32>(all), arena.take::<u64>(words), pick::Room::take(&mut arena, all))
        };
        let estimate = f32::any(Heads::new(x.estimate));
        lists_of_queries(Self::layout(&dims), start, |(scores, bits, room), b, query, runs| {
            let [n, count] = self.budget(&dims, query, pixels);
            for (h, row) in scores.chunks_exact_mut(pixels.max(1)).enumerate() {
                isa.dispatch(Unpack { from: estimate.rows(b, h, &(query..query + 1)), to: &mut *row });
                isa.dispatch(Shares { row, scale: 1.0 });
            }
            let pick = Pick { rule: Rule::TopK(count), forced: Forced::default() };
            pick::choose(isa, &pick, scores, room, bits);
            for at in ones(bits) {
                let (h, pixel) = (at / pixels, at % pixels);
                join(&mut runs[h], keys_of(pixel, n, pixels));
            }
        })
    }

    fn define_choice(&self, x: SeaInput<'_, T>) -> Result<(TokenLists, Margins)> {
        let (dims, pixels) = (x.dims()?, x.estimate.dim().3);
        let Dims { batch, q_heads, q_len, .. } = dims;
        let mut margins = Margins { doubtful: vec![Vec::new(); Self::layout(&dims).lists()?] };
        let mut lists = vec![Vec::new(); margins.doubtful.len()];
        for (b, query) in (0..batch).flat_map(|b| (0..q_len).map(move |i| (b, i))) {
            let [n, count] = self.budget(&dims, query, pixels);
            let of_head = |h: usize| {
                weights(x.estimate.slice(s![b, h, query, ..]).iter().map(|&x| f64::from(x)).collect())
            };
            let scores: Vec<f64> = (0..q_heads).flat_map(of_head).collect();
            let (ids, doubt) = chosen(&Pick { rule: Rule::TopK(count), forced: Forced::default() }, &scores);
            for (h, j) in (0..q_heads).flat_map(|h| (0..n).map(move |j| (h, j))).filter(|_| pixels > 0) {
                let (at, list) = (h * pixels + pixel_of(j, n, pixels), (b * q_heads + h) * q_len + query);
                lists[list].extend(ids.contains(&at).then_some(j as u32));
                margins.doubtful[list].extend(doubt.contains(&at).then_some(j..j + 1));
            }
        }
        let mut offsets = vec![0];
        lists.iter().for_each(|list| offsets.push(offsets[offsets.len() - 1] + list.len()));
        let index = TokenLists::from_keys(Self::layout(&dims), &offsets, &lists.concat())?;
        Ok((index, margins))
    }

    fn choice_flops(&self, x: SeaInput<'_, T>) -> Result<u64> {
        Ok(2 * x.estimate.len() as u64)
    }

    fn differ(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
        difference(a, b, margins)
    }

    fn flow_on(
        &self,
        x: SeaInput<'_, T>,
        index: &TokenLists,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, isa, keys) = (x.dims()?, self.config.isa(), Keys::Tokens(index));
        keys.check(&dims, &x.qkv.lengths)?;
        let mut context = pass.rows((dims.batch, dims.q_heads, dims.q_len, dims.value_dim))?;
        let qkv = Qkv { q: x.qkv.q, k: x.qkv.k, v: x.qkv.v, lengths: Lengths::Full, out: PhantomData::<f32> };
        let call = Call { keys, ..self.config.call(qkv.reborrow(), Norm::Softmax { sinks: None }, None)? };
        let flops = || self.config.listed(keys).cost(&qkv).map_or(0, |cost| cost.flops);
        pass.stage(flops, engine::workspace_bytes(&call), |arena| {
            if let Some(out) = context.view_mut() {
                engine::run_in(&call, out, None, arena);
            }
        });
        let means = if self.is_causal() {
            running_means(pass, isa, x.qkv.v, dims.q_len)?
        } else {
            let pixels = x.estimate.dim().3;
            pixel_means(pass, isa, x.qkv.v, x.estimate, |pixel| keys_of(pixel, dims.kv_len, pixels))?
        };
        blend(pass, isa, [&context, &means], x.gates, out);
        Ok(())
    }

    fn define_on<R: Real>(&self, x: SeaInput<'_, T>, index: &TokenLists) -> Result<Array4<R>> {
        let (dims, lengths) = (x.dims()?, Lengths::Full);
        Keys::Tokens(index).check(&dims, &lengths)?;
        Ok(of_heads(&dims, &lengths, |head| {
            let [q, k, v] = [(&x.qkv.q, &head.queries), (&x.qkv.k, &head.keys), (&x.qkv.v, &head.keys)]
                .map(|(x, rows)| head.rows::<R, T>(x, rows));
            let site = lengths.sequence(&dims, head.sequence).site(head.head);
            let sees = |i: usize, j: usize| index.visible(&site, i, j).then_some(0.0);
            let mut out: Array2<R> = attend::define([&q, &k, &v], self.config.scale(&dims), sees);
            let shares: Option<Vec<R>> = (!self.is_causal()).then(|| shares(&x.estimate, head, v.dim().0));
            for ((i, c), x_) in out.indexed_iter_mut() {
                let mean = match &shares {
                    Some(shares) => R::total(shares.iter().enumerate().map(|(j, &share)| (share, v[[j, c]]))),
                    None => {
                        let n = self.budget(&dims, i, 1)[0];
                        let sum = R::total((0..n).map(|j| (R::of(1.0), v[[j, c]])));
                        if n == 0 { R::of(0.0) } else { sum / R::of(n as f64) }
                    }
                };
                let [a, b] =
                    [0, 1].map(|p| R::of(f64::from(x.gates[[head.batch, head.head, i, p]])).sigmoid());
                *x_ = a * b * *x_ + (R::of(1.0) - b) * mean;
            }
            out
        }))
    }
}
choosing!(Sea, TokenLists, SeaInput);

exhibit! {
    SeaExhibit of Sea, "sparse", "SEA", "arXiv 2310.01777";
    "the keys under the pixels that an estimate 16 wide gives most, about 24 a head, and all by it";
    not "without a trained predictor: what it does not point at is seen as a sum alone";
    tokens false;
    build(_, _) { Sea::builder(24) }
    extras(x, field) { extras(x, field) }
    input<'a, T>(x, extras) -> SeaInput<'a, T> { SeaInput::new(x, extras.channels.view(), extras.rates.view()) }
}
carded!(Sea, SeaExhibit);

exhibit! {
    CausalSeaExhibit of Sea, "sparse", "causal SEA", "arXiv 2310.01777";
    "the same over the keys so far, and their mean";
    not "as SEA";
    tokens false;
    build(_, _) { Sea::builder(24).causal() }
    extras(x, field) { extras(x, field) }
    input<'a, T>(x, extras) -> SeaInput<'a, T> { SeaInput::new(x, extras.channels.view(), extras.rates.view()) }
}

fn extras<T: Element>(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
    let (batch, heads, len, _) = x.q.dim();
    let array = |which, last| {
        Array4::from_shape_fn((batch, heads, len, last), |(_, h, i, c)| 2.0 * field.at(which, h, i, c))
    };
    Extras { channels: array(4, 16), rates: array(5, 2), ..Extras::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    fn arrays(x: &Arrays, pixels: usize, gate: f32) -> [Array4<f32>; 2] {
        let (batch, heads, len, _) = x.q.dim();
        let estimate =
            |(b, h, i, m): (usize, usize, usize, usize)| ((b + h * 3 + i * (m + 5)) % 13) as f32 / 4.0;
        [
            Array4::from_shape_fn((batch, heads, len, pixels), estimate),
            Array4::from_elem((batch, heads, len, 2), gate),
        ]
    }

    /// All pixels and open gates are dense; gates closed to attention are the mean.
    #[test]
    fn all_pixels_are_dense() {
        for (sizes, pixels) in
            [([2, 4, 2, 90, 90, 16, 8], 16), ([1, 2, 1, 3, 70, 16, 8], 200), ([1, 2, 2, 40, 20, 16, 8], 5)]
        {
            let x = Arrays::normal(sizes, 1);
            let [estimate, open] = arrays(&x, pixels, 80.0);
            let sea = Sea::builder(1000).causal().build().unwrap();
            let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
            let got = sea.forward(SeaInput::new(x.qkv(), estimate.view(), open.view())).unwrap();
            testing::near("all", &got, &want);
            let zero = Arrays { q: &x.q * 0.0, k: x.k.clone(), v: x.v.clone() };
            let want = Dense::builder().causal().build().unwrap().forward(zero.qkv()).unwrap();
            let closed = &open * -1.0;
            let got = sea.forward(SeaInput::new(x.qkv(), estimate.view(), closed.view())).unwrap();
            testing::near("mean", &got, &want);
        }
    }

    /// Without an order all keys are seen, and closed gates leave the sum of values by
    /// what their pixels are given.
    #[test]
    fn not_causal() {
        for (sizes, pixels) in [([2, 4, 2, 90, 150, 16, 8], 16), ([1, 2, 1, 3, 70, 16, 8], 200)] {
            let x = Arrays::normal(sizes, 1);
            let [estimate, open] = arrays(&x, pixels, 80.0);
            let sea = Sea::builder(1000).build().unwrap();
            let want = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
            let got = sea.forward(SeaInput::new(x.qkv(), estimate.view(), open.view())).unwrap();
            testing::near("all", &got, &want);
            let [_, _, kv_heads, q_len, n, _, dim] = sizes;
            let share = |b: usize, h: usize, j: usize| {
                let pixel = (((j as f64 + 0.5) / n as f64 * pixels as f64 - 1e-4) as usize).min(pixels - 1);
                let of = |i: usize| {
                    let exp = |m: usize| f64::from(estimate[[b, h, i, m]]).exp();
                    exp(pixel) / (0..pixels).map(exp).sum::<f64>()
                };
                (0..q_len).map(of).sum::<f64>() / q_len as f64
            };
            let group = sizes[1] / kv_heads;
            let want = Array4::from_shape_fn((sizes[0], sizes[1], q_len, dim), |(b, h, _, c)| {
                (0..n).map(|j| share(b, h, j) * f64::from(x.v[[b, h / group, j, c]])).sum::<f64>() as f32
            });
            let closed = &open * -1.0;
            let got = sea.forward(SeaInput::new(x.qkv(), estimate.view(), closed.view())).unwrap();
            testing::near("sum", &got, &want);
        }
    }

    /// A key has one pixel, and a query no more keys than its pixels have room for.
    #[test]
    fn pixels_cover_keys_once_and_budgets_hold() {
        for (n, t) in [(1, 16), (7, 16), (16, 16), (100, 16), (33, 5)] {
            let starts: Vec<usize> = (0..=t).map(|m| if m == t { n } else { start_of(m, n, t) }).collect();
            assert!(starts.is_sorted() && starts[0] == 0, "{n} {t}: {starts:?}");
        }
        let x = Arrays::normal([1, 4, 2, 100, 100, 16, 8], 2);
        let [estimate, gates] = arrays(&x, 16, 0.0);
        let sea = Sea::builder(10).causal().build().unwrap();
        let input = SeaInput::new(x.qkv(), estimate.view(), gates.view());
        let index = sea.select(input).unwrap();
        assert_eq!(
            <Sea as Selects<SeaInput<'_, f32>>>::difference(
                &index,
                &sea.reference_select(input).unwrap().0,
                &sea.reference_select(input).unwrap().1
            ),
            None
        );
        let keys: usize = (0..4).map(|h| index.keys(0, h, 99)).sum();
        assert!(keys > 0 && keys <= 6 * 7, "{keys}");
        let one = Sea::builder(1).causal().build().unwrap().select(input).unwrap();
        assert_eq!((0..4).map(|h| one.keys(0, h, 0)).sum::<usize>(), 4);
    }

    #[test]
    fn refusals() {
        assert_eq!(Sea::builder(0).build().unwrap_err().to_string(), "k: expected at least 1, got 0");
        let (x, sea) = (Arrays::normal([1, 2, 1, 5, 9, 8, 4], 1), Sea::builder(3).build().unwrap());
        let ([estimate, gates], other) = (arrays(&x, 4, 0.0), Array4::zeros((1, 2, 5, 3)));
        let refusal = |x| sea.forward(x).unwrap_err().to_string();
        assert!(refusal(SeaInput::new(x.qkv(), estimate.view(), other.view())).starts_with("gates: "));
        let short = estimate.slice(s![.., .., ..4, ..]);
        assert!(refusal(SeaInput::new(x.qkv(), short, gates.view())).starts_with("estimate: "));
    }
}
