//! Flows between the features of queries and of keys, head by head: sums of one
//! side that the other reads, twice, and a softmax over tokens, all over a whole
//! sequence or over what there was so far. The formulas are those of
//! [`Flowformer`](crate::linear::Flowformer).

use std::ops::Range;

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4, s};

use crate::definition::number::{Real, tokens};
use crate::engine::parallel;
use crate::engine::recur::{Place, Source as _};
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::{Dims, Lengths, Sequence, filled};
use crate::simd::exp::{exp, sigmoid};
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::mapped::MappedArrays;
use crate::stages::pass::Pass;

/// Sums that go along: what a head keeps from token to token.
pub(crate) const SUMS: usize = 4;
/// Tokens that are summed by themselves first.
const CHUNK: usize = 64;

/// What causal [`Flowformer`](crate::linear::Flowformer) carries from token to
/// token.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowformerState {
    pub(crate) state: State,
    pub(crate) sums: Array4<f32>,
    pub(crate) tallies: Array3<f64>,
}

/// The sums and the tallies of a state.
type Kept<'a> = (&'a mut [f32], &'a mut [f64]);

impl FlowformerState {
    /// A state of these parts, for instance one that was saved.
    ///
    /// # Errors
    /// [`Error::Shape`] for parts of different sizes, [`Error::Value`] for
    /// numbers that are not finite.
    pub fn new(state: State, sums: Array4<f32>, tallies: Array3<f64>) -> Result<Self> {
        let (sequences, heads, dim, _) = state.view().dim();
        if sums.dim() != (sequences, heads, SUMS, dim) {
            let expected = format!("[sequences, heads, 4, head_dim] = [{sequences}, {heads}, {SUMS}, {dim}]");
            return Err(Error::shape("sums", expected, sums.shape()));
        }
        if tallies.dim() != (sequences, heads, 2) {
            let expected = format!("[sequences, heads, 2] = [{sequences}, {heads}, 2]");
            return Err(Error::shape("tallies", expected, tallies.shape()));
        }
        let odd = sums.iter().map(|&x| f64::from(x)).chain(tallies.iter().copied()).find(|x| !x.is_finite());
        odd.map_or(Ok(()), |x| Err(Error::value("state", "finite numbers", x)))?;
        let sums = sums.as_standard_layout().into_owned();
        Ok(Self { state, sums, tallies: tallies.as_standard_layout().into_owned() })
    }

    /// Before the first token.
    pub(crate) fn empty(dims: &Dims, epsilon: f32) -> Result<Self> {
        let &Dims { batch, q_heads, head_dim, value_dim, .. } = dims;
        Ok(Self {
            state: State::zeros((batch, q_heads, head_dim, value_dim))?,
            sums: filled("sums", (batch, q_heads, SUMS, head_dim), epsilon)?,
            tallies: Array3::zeros((batch, q_heads, 2)),
        })
    }

    /// `sum phi(k_j) c_j v_j^T`, `[sequences, heads, head_dim, value_dim]`.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sums over the tokens so far, each with epsilon added, `[sequences,
    /// heads, 4, head_dim]`: of `phi(k)`, of `phi(q)`, of `phi(k) n / O`, of
    /// `phi(q) n / I`.
    pub fn sums(&self) -> ArrayView4<'_, f32> {
        self.sums.view()
    }

    /// `sum exp O'` and the number of tokens, `[sequences, heads, 2]`.
    pub fn tallies(&self) -> ArrayView3<'_, f64> {
        self.tallies.view()
    }

    /// The parts to go on from, where there is a state.
    pub(crate) fn parts(state: Option<&mut Self>) -> (Option<&mut [f32]>, Option<Kept<'_>>) {
        let Some(Self { state, sums, tallies }) = state else { return (None, None) };
        (Some(state.as_mut_slice()), sums.as_slice_mut().zip(tallies.as_slice_mut()))
    }
}

/// How flows are summed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flow {
    pub(crate) isa: Isa,
    /// Added to every element of the sums and of what reads them.
    pub(crate) epsilon: f32,
    /// Whether sums go up to a token alone.
    pub(crate) causal: bool,
}

/// What one thread works in: features of a chunk, sums, and numbers of tokens.
struct Room<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    sums: [&'a mut [f32]; SUMS],
    spare: [&'a mut [f32]; 3],
}

impl<'a> Room<'a> {
    fn bytes(stride: usize) -> usize {
        2 * bytes_for::<f32>(CHUNK * stride) + SUMS * bytes_for::<f32>(stride) + 3 * bytes_for::<f32>(CHUNK)
    }

    fn take(mut arena: Arena<'a>, stride: usize) -> Self {
        let mut zeros = |n| {
            let x = arena.take::<f32>(n);
            x.fill(0.0);
            x
        };
        let (q, k) = (zeros(CHUNK * stride), zeros(CHUNK * stride));
        let sums = [(); SUMS].map(|()| zeros(stride));
        Self { q, k, sums, spare: [(); 3].map(|()| zeros(CHUNK)) }
    }
}

/// The factors of features of queries and of values, `[batch, heads, len]`,
/// worked out head by head with sums from and to `kept` (`[sequences, heads,
/// SUMS, dim]` and `[sequences, heads, 2]`) or from epsilon.
pub(crate) fn run<'a>(
    pass: &mut Pass<'a>,
    flow: Flow,
    (dims, lengths): (Dims, Lengths<'_>),
    source: &MappedArrays<'_, '_>,
    kept: Option<Kept<'_>>,
) -> Result<[&'a mut [f32]; 2]> {
    let Dims { batch, q_heads: heads, q_len, kv_len, head_dim: dim, packed, .. } = dims;
    let (rows, units) = (if packed { 1 } else { batch } * heads, batch * heads);
    let query = pass.take(rows.saturating_mul(q_len))?;
    let value = pass.take(rows.saturating_mul(kv_len))?;
    let (workers, words) = (parallel::threads(), [rows, rows, units, units].map(claim_words));
    let stride = dim.next_multiple_of(MAX_LANES);
    let room = Room::bytes(stride);
    let bytes = words.iter().map(|&n| bytes_for::<u64>(n)).sum::<usize>() + bytes_for_shares(workers, room);
    // Four sums, and as many dot products.
    let flops = || (4 * rows * (q_len + kv_len) * 2 * dim) as u64;
    pass.stage(flops, bytes, |mut arena| {
        let [a, b, c, d] = words.map(|n| arena.take::<u64>(n));
        let (query, value) = (Parts::new(&mut *query, q_len, a), Parts::new(&mut *value, kv_len, b));
        let kept = kept.map(|(sums, tallies)| (Parts::new(sums, SUMS * dim, c), Parts::new(tallies, 2, d)));
        let shares = arena.shares(workers, room);
        let start = |worker| Room::take(shares.take(worker), stride);
        parallel::for_each(workers, rows, start, |room, row| {
            let (query, value) = (query.take(row), value.take(row));
            let own = if packed { 0..batch } else { row / heads..row / heads + 1 };
            for sequence in own.map(|i| lengths.sequence(&dims, i)) {
                let unit = sequence.index * heads + row % heads;
                let mut kept = kept.as_ref().map(|(sums, tallies)| (sums.take(unit), tallies.take(unit)));
                for (i, sum) in room.sums.iter_mut().enumerate() {
                    // NaN times what fills rows up stayed there.
                    sum[dim..].fill(0.0);
                    match &kept {
                        Some((kept, _)) => sum[..dim].copy_from_slice(&kept[i * dim..][..dim]),
                        None => sum[..dim].fill(flow.epsilon),
                    }
                }
                let of = OfHead { flow, source, sequence: &sequence, head: row % heads, stride };
                if flow.causal {
                    let mut fresh = [0.0; 2];
                    let tally = kept.as_mut().map_or(&mut fresh[..], |(_, tally)| tally);
                    of.running(room, query, value, tally);
                } else {
                    of.total(room, query, value);
                }
                for (kept, sum) in
                    kept.iter_mut().flat_map(|(kept, _)| kept.chunks_mut(dim.max(1))).zip(&room.sums)
                {
                    kept.copy_from_slice(&sum[..dim]);
                }
            }
        });
    });
    Ok([query, value])
}

/// A head of a sequence.
struct OfHead<'a, 'b, 'm> {
    flow: Flow,
    source: &'a MappedArrays<'b, 'm>,
    sequence: &'a Sequence,
    head: usize,
    stride: usize,
}

fn chunks(tokens: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = tokens.end;
    tokens.clone().step_by(CHUNK).map(move |first| first..(first + CHUNK).min(end))
}

impl OfHead<'_, '_, '_> {
    fn queries(&self, tokens: &Range<usize>, to: &mut [f32]) {
        let at = Place::new(self.sequence, self.head, tokens.clone());
        self.source.queries(self.flow.isa, &at, to, self.stride);
    }

    fn keys(&self, tokens: &Range<usize>, to: &mut [f32]) {
        let at = Place::new(self.sequence, self.head, tokens.clone());
        self.source.key_features(self.flow.isa, &at, to, self.stride);
    }

    /// `sums += sum_t by_t of_t`
    fn add(&self, of: &[f32], by: &[f32], sums: &mut [f32]) {
        self.flow.isa.dispatch(Collect { of, by, sums });
    }

    /// `out_t = (read_t + epsilon) . sums`
    fn dots(&self, read: &[f32], sums: &mut [f32], out: &mut [f32]) {
        self.column(None, sums, read, out);
    }

    /// The same with the sums up to `t`, to which `by_t of_t` is added.
    fn column(&self, of: Option<(&[f32], &[f32])>, sums: &mut [f32], read: &[f32], out: &mut [f32]) {
        self.flow.isa.dispatch(Column { of, sums, read, epsilon: self.flow.epsilon, out });
    }

    /// The logistic function of each.
    fn sigmoid(&self, x: &mut [f32]) {
        self.flow.isa.dispatch(Each::<true>(x));
    }

    /// The exponential of each, kept within -1 and 1.
    fn exponential(&self, x: &mut [f32]) {
        self.flow.isa.dispatch(Each::<false>(x));
    }

    /// All tokens, of which none reads before all are in the sums.
    fn total(&self, room: &mut Room<'_>, query: &mut [f32], value: &mut [f32]) {
        let Room { q, k, sums: [keys, queries, from, to], spare: [by, ..] } = room;
        let (of_queries, of_keys) = (&self.sequence.queries, &self.sequence.keys);
        by.fill(1.0);
        for tokens in chunks(of_keys) {
            self.keys(&tokens, k);
            self.add(k, &by[..tokens.len()], keys);
        }
        for tokens in chunks(of_queries) {
            self.queries(&tokens, q);
            self.add(q, &by[..tokens.len()], queries);
        }
        for tokens in chunks(of_keys) {
            let by = &mut by[..tokens.len()];
            self.keys(&tokens, k);
            self.dots(k, queries, by);
            by.iter_mut().for_each(|x| *x = 1.0 / *x);
            self.add(k, by, from);
        }
        let ratio = of_queries.len() as f32 / of_keys.len().max(1) as f32;
        for tokens in chunks(of_queries) {
            let (into, kept) = (&mut query[tokens.clone()], &mut by[..tokens.len()]);
            self.queries(&tokens, q);
            self.dots(q, keys, into);
            into.iter_mut().for_each(|x| *x = 1.0 / *x);
            self.add(q, into, to);
            self.dots(q, from, kept);
            kept.iter_mut().for_each(|x| *x *= ratio);
            self.sigmoid(kept);
            into.iter_mut().zip(kept).for_each(|(into, kept)| *into *= *kept);
        }
        let mut sum = 0f64;
        for tokens in chunks(of_keys) {
            let rival = &mut value[tokens.clone()];
            self.keys(&tokens, k);
            self.dots(k, to, rival);
            self.exponential(rival);
            sum += rival.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
        let share = (of_keys.len() as f64 / sum) as f32;
        value[of_keys.clone()].iter_mut().for_each(|x| *x *= share);
    }

    /// Tokens one after the other.
    fn running(&self, room: &mut Room<'_>, query: &mut [f32], value: &mut [f32], tally: &mut [f64]) {
        let Room { q, k, sums: [keys, queries, from, to], spare } = room;
        for tokens in chunks(&self.sequence.queries) {
            let [out, shares, kept] = spare.each_mut().map(|x| &mut x[..tokens.len()]);
            let (into, rival) = (&mut query[tokens.clone()], &mut value[tokens.clone()]);
            let before = tally[1] as f32;
            let n = |t: usize| before + (t + 1) as f32;
            self.queries(&tokens, q);
            self.keys(&tokens, k);
            out.fill(1.0);
            self.column(Some((k, out)), keys, q, into);
            shares.fill(1.0);
            self.column(Some((q, shares)), queries, k, out);
            out.iter_mut().enumerate().for_each(|(t, x)| *x = n(t) / *x);
            shares.iter_mut().zip(&*into).enumerate().for_each(|(t, (share, into))| *share = n(t) / into);
            self.column(Some((k, out)), from, q, kept);
            self.column(Some((q, shares)), to, k, rival);
            kept.iter_mut().enumerate().for_each(|(t, x)| *x /= n(t));
            rival.iter_mut().enumerate().for_each(|(t, x)| *x /= n(t));
            self.sigmoid(kept);
            into.iter_mut().zip(kept).for_each(|(into, kept)| *into = *kept / *into);
            self.exponential(rival);
            for x in rival {
                tally[0] += f64::from(*x);
                tally[1] += 1.0;
                *x = (f64::from(*x) * tally[1] / tally[0]) as f32;
            }
        }
    }
}

/// Adds rows to sums.
struct Collect<'a> {
    of: &'a [f32],
    by: &'a [f32],
    sums: &'a mut [f32],
}

impl Kernel for Collect<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = self.sums.len();
        for (v, to) in self.sums.chunks_exact_mut(S::LANES).enumerate() {
            let mut sum = s.splat(0.0);
            for (t, &by) in self.by.iter().enumerate() {
                sum = s.mul_add(s.splat(by), s.load(&self.of[t * stride + v * S::LANES..]), sum);
            }
            s.store(to, s.add(s.load(to), sum));
        }
    }
}

/// Dot products of rows with sums, to which each row's token is added first if
/// there are any.
struct Column<'a> {
    of: Option<(&'a [f32], &'a [f32])>,
    sums: &'a mut [f32],
    read: &'a [f32],
    epsilon: f32,
    out: &'a mut [f32],
}

impl Kernel for Column<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, sums, read, epsilon, out } = self;
        let (stride, epsilon) = (sums.len(), s.splat(epsilon));
        // What the tokens of this chunk have added so far, vector by vector.
        let mut added = [s.splat(0.0); 4];
        let width = added.len() * S::LANES;
        let mut dots = [0f32; CHUNK];
        for first in (0..stride).step_by(width) {
            let vectors = ((stride - first) / S::LANES).min(added.len());
            added = [s.splat(0.0); 4];
            for (t, dots) in
                dots[..out.len().next_multiple_of(S::LANES).min(CHUNK)].chunks_mut(S::LANES).enumerate()
            {
                let mut block = [s.splat(0.0); MAX_LANES];
                let rows = S::LANES.min(out.len() - t * S::LANES);
                for (i, sum) in block[..rows].iter_mut().enumerate() {
                    let t = t * S::LANES + i;
                    let row = t * stride + first;
                    for (v, added) in added[..vectors].iter_mut().enumerate() {
                        let at = row + v * S::LANES;
                        let mut total = s.load(&sums[first + v * S::LANES..]);
                        if let Some((of, by)) = of {
                            *added = s.mul_add(s.splat(by[t]), s.load(&of[at..]), *added);
                            total = s.add(total, *added);
                        }
                        *sum = s.mul_add(s.add(s.load(&read[at..]), epsilon), total, *sum);
                    }
                }
                s.store(dots, s.add(s.load(dots), s.reduce_add_each(&block)));
            }
            for (sum, added) in sums[first..].chunks_exact_mut(S::LANES).zip(&added[..vectors]) {
                s.store(sum, s.add(s.load(sum), *added));
            }
        }
        out.copy_from_slice(&dots[..out.len()]);
    }
}

/// The logistic function of each, or the exponential of what it is within -1
/// and 1.
struct Each<'a, const SIGMOID: bool>(&'a mut [f32]);

impl<const SIGMOID: bool> Kernel for Each<'_, SIGMOID> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.0.chunks_mut(S::LANES) {
            let old = s.load_tail(x);
            // In this order a NaN stays.
            let kept = s.max(s.splat(-1.0), s.min(s.splat(1.0), old));
            s.store_tail(x, if SIGMOID { sigmoid(s, old) } else { exp(s, kept) });
        }
    }
}

/// The definition: the factors of the queries and of the values of a head
/// whose features these are; its sums go on in the state.
pub(crate) fn define<R: Real>(
    [q, k]: [&Array2<R>; 2],
    state: &mut FlowformerState,
    [i, h]: [usize; 2],
    epsilon: f32,
    causal: bool,
) -> [Vec<R>; 2] {
    let epsilon = R::of(f64::from(epsilon));
    // `(read_i + epsilon) . (sums + sum_j by_j of_j)`
    let mut column = |which: usize, of: &Array2<R>, by: &dyn Fn(usize) -> R, read: &Array2<R>| {
        let mut kept = state.sums.slice_mut(s![i, h, which, ..]);
        let mut sums = kept.map(|&x| R::of(f64::from(x)));
        // Without tokens the sums are what they were.
        let mut total = sums.clone();
        let mut add = |t: usize| {
            sums.iter_mut().zip(of.row(t)).for_each(|(sum, &x)| *sum = sum.term(x, by(t)));
            sums.map(|sum| sum.summed(tokens(t + 1)))
        };
        if !causal {
            total = (0..of.dim().0).fold(total, |_, t| add(t));
        }
        let each = read.outer_iter().enumerate().map(|(t, read)| {
            if causal {
                total = add(t);
            }
            R::dot(read.iter().zip(&total).map(|(&x, &sum)| (x + epsilon, sum)))
        });
        let each: Vec<R> = each.collect();
        kept.assign(&sums.map(|x| x.value() as f32));
        each
    };
    let one = R::of(1.0);
    let before = state.tallies[[i, h, 1]];
    let n = |t: usize| if causal { R::of(before + (t + 1) as f64) } else { one };
    let (into, out) = (column(0, k, &|_| one, q), column(1, q, &|_| one, k));
    let kept = column(2, k, &|t| n(t) / out[t], q);
    let rival = column(3, q, &|t| n(t) / into[t], k);

    let ratio = R::of(if causal { 1.0 } else { q.dim().0 as f64 / k.dim().0.max(1) as f64 });
    let query = (0..into.len()).map(|t| (kept[t] * ratio / n(t)).sigmoid() / into[t]).collect();
    let within = |(t, &x): (usize, &R)| (x / n(t)).min(one).max(-one).exp();
    let weights: Vec<R> = rival.iter().enumerate().map(within).collect();
    let mut tally = [0, 1].map(|which| R::of(state.tallies[[i, h, which]]));
    let add = |tally: &mut [R; 2], x: R| *tally = [tally[0].term(x, one), tally[1] + one];
    if !causal {
        weights.iter().for_each(|&x| add(&mut tally, x));
    }
    let share = |&x: &R| {
        if causal {
            add(&mut tally, x);
        }
        tally[1] * x / tally[0]
    };
    let value = weights.iter().map(share).collect();
    (0..2).for_each(|which| state.tallies[[i, h, which]] = tally[which].value());
    [query, value]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::heads::of_heads;
    use crate::definition::number::Running;
    use crate::math::features::Sigmoid;
    use crate::stages::mapped::Mapped;
    use crate::stages::pass::alone;
    use crate::stages::recur::Options;
    use crate::testing::qkv::Qkvs;

    /// Two heads of nothing.
    fn dims(head_dim: usize) -> Dims {
        let (q_len, kv_len, value_dim) = (0, 0, 0);
        Dims { batch: 1, q_heads: 2, kv_heads: 2, q_len, kv_len, head_dim, value_dim, packed: false }
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len, dim, causal) in [
            (1, 1, 5, true),
            (64, 64, 16, true),
            (201, 201, 70, true),
            (70, 201, 33, false),
            (201, 70, 16, false),
            (5, 0, 8, false),
        ] {
            let x = Qkvs::new([2, 4, 2, q_len, kv_len, dim, 3], 1);
            let dims = Dims { batch: 2, q_heads: 4, kv_heads: 2, q_len, kv_len, ..dims(dim) };
            for isa in Isa::available() {
                let config = Options { isa: Some(isa), ..Options::default() }.build().unwrap();
                let config = &config;
                let mapped = Mapped { config, query: &Sigmoid, key: &Sigmoid, causal, normaliser: None };
                let source = mapped.source(&x.qkv());
                let flow = Flow { isa, epsilon: 0.01, causal };
                let [query, value] = alone(|pass| {
                    let numbers = run(pass, flow, (dims, Lengths::Full), &source, None)?;
                    Ok(numbers.map(|x| x.to_vec()))
                });
                let mut state = FlowformerState::empty(&dims, 0.01).unwrap();
                of_heads::<Running>(&dims, &Lengths::Full, |head| {
                    let q = head.features::<Running, f32>(&Sigmoid, &x.q.view(), &head.queries);
                    let k = head.features::<Running, f32>(&Sigmoid, &x.k.view(), &head.keys);
                    let want = define([&q, &k], &mut state, [head.batch, head.head], 0.01, causal);
                    for ((got, want), len) in [&query, &value].into_iter().zip(want).zip([q_len, kv_len]) {
                        let first = (head.batch * 4 + head.head) * len;
                        for (&got, want) in got[first..first + len].iter().zip(&want) {
                            let off = (f64::from(got) - want.value()).abs();
                            assert!(off <= want.off(), "{isa} {q_len} {kv_len}: {got}, not {want:?}");
                            worst = worst.max(off / want.off());
                        }
                    }
                    Array2::from_elem((q_len, 0), Running::of(0.0))
                });
            }
        }
        println!("flow: {worst:.3} of the bound");
    }

    #[test]
    fn states_are_put_together() {
        let dims = dims(8);
        let empty = FlowformerState::empty(&dims, 0.5).unwrap();
        let parts = |sums, tallies| FlowformerState::new(empty.state().clone(), sums, tallies);
        let (sums, tallies) = (empty.sums().to_owned(), empty.tallies().to_owned());
        assert_eq!(parts(sums.clone(), tallies.clone()).unwrap(), empty);
        for (sums, tallies, want) in [
            (
                Array4::zeros((1, 2, 3, 8)),
                tallies.clone(),
                "sums: expected shape [sequences, heads, 4, head_dim] = [1, 2, 4, 8], got [1, 2, 3, 8]",
            ),
            (
                sums.clone(),
                Array3::zeros((1, 1, 2)),
                "tallies: expected shape [sequences, heads, 2] = [1, 2, 2], got [1, 1, 2]",
            ),
            (&sums * f32::NAN, tallies.clone(), "state: expected finite numbers, got NaN"),
            (sums, tallies + f64::INFINITY, "state: expected finite numbers, got inf"),
        ] {
            assert_eq!(parts(sums, tallies).unwrap_err().to_string(), want);
        }
    }
}
