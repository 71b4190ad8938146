//! Flows between rows of features, head by head: linear attention with a
//! single value column, and a softmax over tokens, both over a whole sequence
//! or over what there was so far.

use std::ops::Range;

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4};

use crate::definition::number::{Real, tokens};
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::{Dims, Lengths, filled};
use crate::simd::exp::{exp, sigmoid};
use crate::simd::mem::{Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

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
    pub(crate) fn parts(state: Option<&mut Self>) -> (Option<&mut [f32]>, Option<(&mut [f32], &mut [f64])>) {
        let Some(Self { state, sums, tallies }) = state else { return (None, None) };
        (Some(state.as_mut_slice()), sums.as_slice_mut().zip(tallies.as_slice_mut()))
    }
}

/// One head of a sequence.
pub(crate) struct Head<'a> {
    pub(crate) flows: Flows,
    /// Rows of features.
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    /// Before the first token.
    pub(crate) sums: [&'a mut [f32]; SUMS],
    /// Of exponentials, and of tokens.
    pub(crate) tally: &'a mut [f64],
    /// One number a query, and one a key: what is worked out.
    pub(crate) query: &'a mut [f32],
    pub(crate) value: &'a mut [f32],
    /// The same, for what is needed on the way.
    pub(crate) spare: [&'a mut [f32]; 3],
}

/// How flows are summed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flows {
    pub(crate) isa: Isa,
    /// Added to every element of the sums and of what reads them.
    pub(crate) epsilon: f32,
    /// Whether sums go up to a token alone.
    pub(crate) running: bool,
    stride: usize,
}

/// Calls `work` for each head of each sequence, with sums from and to `kept`
/// (`[sequences, heads, SUMS, dim]` and `[sequences, heads, 2]`) or from
/// epsilon; gives what it worked out, `[batch, heads, len]` of queries and of
/// keys.
pub(crate) fn run<'a>(
    pass: &mut Pass<'a>,
    (isa, epsilon, running): (Isa, f32, bool),
    (dims, lengths): (Dims, Lengths<'_>),
    [q, k]: [&Scratch<'_>; 2],
    kept: Option<(&mut [f32], &mut [f64])>,
    work: impl Fn(Head<'_>) + Sync + Send,
) -> Result<[&'a mut [f32]; 2]> {
    let ((batch, _, q_len, dim), kv_len, heads, stride) = (q.dim(), k.dim().2, dims.q_heads, q.stride());
    let (rows, units, longest) = (batch * heads, dims.batch * heads, q_len.max(kv_len));
    let query = pass.take(rows.saturating_mul(q_len))?;
    let value = pass.take(rows.saturating_mul(kv_len))?;
    let (workers, words) = (parallel::threads(), [rows, rows, units, units].map(claim_words));
    let room = SUMS * bytes_for::<f32>(stride) + 3 * bytes_for::<f32>(longest);
    let bytes = words.iter().map(|&n| bytes_for::<u64>(n)).sum::<usize>() + bytes_for_shares(workers, room);
    // Four sums, and as many dot products.
    let flops = || (4 * rows * (q_len + kv_len) * 2 * dim) as u64;
    let flows = Flows { isa, epsilon, running, stride };
    pass.stage(flops, bytes, |mut arena| {
        let [a, b, c, d] = words.map(|n| arena.take::<u64>(n));
        let (query, value) = (Parts::new(&mut *query, q_len, a), Parts::new(&mut *value, kv_len, b));
        let kept = kept.map(|(sums, tallies)| (Parts::new(sums, SUMS * dim, c), Parts::new(tallies, 2, d)));
        let shares = arena.shares(workers, room);
        let start = |worker| {
            let mut arena = shares.take(worker);
            let sums = [(); SUMS].map(|()| arena.take::<f32>(stride));
            (sums, [(); 3].map(|()| arena.take::<f32>(longest)))
        };
        parallel::for_each(workers, rows, start, |(sums, spare), row| {
            let (query, value) = (query.take(row), value.take(row));
            let own = if dims.packed { 0..dims.batch } else { row / heads..row / heads + 1 };
            for sequence in own.map(|i| lengths.sequence(&dims, i)) {
                let unit = sequence.index * heads + row % heads;
                let mut kept = kept.as_ref().map(|(sums, tallies)| (sums.take(unit), tallies.take(unit)));
                for (i, sum) in sums.iter_mut().enumerate() {
                    sum.fill(0.0);
                    match &kept {
                        Some((kept, _)) => sum[..dim].copy_from_slice(&kept[i * dim..][..dim]),
                        None => sum[..dim].fill(epsilon),
                    }
                }
                let of = |x: &Scratch<'_>, tokens: &Range<usize>| {
                    let (_, own, len, _) = x.dim();
                    let head = row / heads * own + row % heads / (heads / own.max(1)).max(1);
                    (head * len + tokens.start) * stride..(head * len + tokens.end) * stride
                };
                let (queries, keys) = (sequence.queries.clone(), sequence.keys.clone());
                let mut fresh = [0.0; 2];
                let [x, y, z] = spare;
                work(Head {
                    flows,
                    q: &q.numbers()[of(q, &queries)],
                    k: &k.numbers()[of(k, &keys)],
                    sums: sums.each_mut().map(|sum| &mut **sum),
                    tally: kept.as_mut().map_or(&mut fresh[..], |(_, tally)| tally),
                    query: &mut query[queries.clone()],
                    value: &mut value[keys.clone()],
                    spare: [&mut x[..keys.len()], &mut y[..queries.len()], &mut z[..queries.len()]],
                });
                for (kept, sum) in
                    kept.iter_mut().flat_map(|(kept, _)| kept.chunks_mut(dim.max(1))).zip(&*sums)
                {
                    kept.copy_from_slice(&sum[..dim]);
                }
            }
        });
    });
    Ok([query, value])
}

impl Flows {
    /// `out_i = (read_i + epsilon) . (sums + sum_j by_j of_j)`, where no `by` is
    /// 1, over all `j` or those up to `i`; the sums go on.
    pub(crate) fn column(
        &self,
        of: &[f32],
        by: Option<&[f32]>,
        sums: &mut [f32],
        read: &[f32],
        out: &mut [f32],
    ) {
        let &Self { isa, epsilon, stride, .. } = self;
        if stride == 0 {
            out.fill(0.0);
            return;
        }
        let by = |at: usize, len: usize| by.map(|by| &by[at..at + len]);
        let chunk = (CHUNK * stride).max(1);
        if !self.running {
            for (i, of) in of.chunks(chunk).enumerate() {
                isa.dispatch(Collect { of, by: by(i * CHUNK, of.len() / stride), sums });
            }
        }
        for (i, (read, out)) in read.chunks(chunk).zip(out.chunks_mut(CHUNK)).enumerate() {
            let of = if self.running {
                Some((&of[i * chunk..][..read.len()], by(i * CHUNK, out.len())))
            } else {
                None
            };
            isa.dispatch(Column { of, sums, read, epsilon, out });
        }
    }

    /// The logistic function of each.
    pub(crate) fn sigmoid(&self, x: &mut [f32]) {
        self.isa.dispatch(Each::<true>(x));
    }

    /// `n_j exp(x_j) / sum_t exp(x_t)` with `x` kept within -1 and 1: over all
    /// `n` tokens, or those up to `j`, of which there are `n_j`.
    pub(crate) fn softmax(&self, x: &mut [f32], tally: &mut [f64]) {
        self.isa.dispatch(Each::<false>(x));
        if self.running {
            for x in x {
                tally[0] += f64::from(*x);
                tally[1] += 1.0;
                *x = (f64::from(*x) * tally[1] / tally[0]) as f32;
            }
        } else {
            let total: f64 = x.iter().map(|&x| f64::from(x)).sum();
            let share = (x.len() as f64 / total) as f32;
            x.iter_mut().for_each(|x| *x *= share);
        }
    }
}

/// Adds rows to sums.
struct Collect<'a> {
    of: &'a [f32],
    by: Option<&'a [f32]>,
    sums: &'a mut [f32],
}

impl Kernel for Collect<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = self.sums.len();
        for (v, to) in self.sums.chunks_exact_mut(S::LANES).enumerate() {
            let mut sum = s.splat(0.0);
            for (t, row) in self.of.chunks_exact(stride).enumerate() {
                let by = s.splat(self.by.map_or(1.0, |by| by[t]));
                sum = s.mul_add(by, s.load(&row[v * S::LANES..]), sum);
            }
            s.store(to, s.add(s.load(to), sum));
        }
    }
}

/// Dot products of rows with sums, to which each row's token is added first if
/// there are any.
struct Column<'a> {
    of: Option<(&'a [f32], Option<&'a [f32]>)>,
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
                            let by = s.splat(by.map_or(1.0, |by| by[t]));
                            *added = s.mul_add(by, s.load(&of[at..]), *added);
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

/// The definition: sums of a head, and what they are of.
pub(crate) struct Sums<R> {
    sums: Array2<R>,
    pub(crate) tally: [R; 2],
    epsilon: R,
    running: bool,
}

impl<R: Real> Sums<R> {
    /// Those of a head of a state.
    pub(crate) fn new(state: &FlowformerState, at: [usize; 2], epsilon: f32, running: bool) -> Self {
        let [i, h] = at;
        let sums = state.sums.slice(ndarray::s![i, h, .., ..]).map(|&x| R::of(f64::from(x)));
        let tally = [0, 1].map(|which| R::of(state.tallies[[i, h, which]]));
        Self { sums, tally, epsilon: R::of(f64::from(epsilon)), running }
    }

    /// `(read_i + epsilon) . (sums + sum_j by_j of_j)`, for sums number `which`.
    pub(crate) fn column(&mut self, which: usize, of: &Array2<R>, by: &[R], read: &Array2<R>) -> Vec<R> {
        // Without tokens the sums are what they were.
        let mut total = self.sums.row(which).to_owned();
        let (mut sums, epsilon) = (self.sums.row_mut(which), self.epsilon);
        let mut add = |t: usize| {
            sums.iter_mut().zip(of.row(t)).for_each(|(sum, &x)| *sum = sum.term(x, by[t]));
            sums.map(|sum| sum.summed(tokens(t + 1)))
        };
        if !self.running {
            total = (0..of.dim().0).fold(total, |_, t| add(t));
        }
        let each = read.outer_iter().enumerate().map(|(t, read)| {
            if self.running {
                total = add(t);
            }
            R::dot(read.iter().zip(&total).map(|(&x, &sum)| (x + epsilon, sum)))
        });
        each.collect()
    }

    /// `n_j exp(x_j) / sum_t exp(x_t)`, with `x` kept within -1 and 1.
    pub(crate) fn softmax(&mut self, x: &[R]) -> Vec<R> {
        let one = R::of(1.0);
        let weights: Vec<R> = x.iter().map(|x| x.min(one).max(-one).exp()).collect();
        let tally = &mut self.tally;
        let add = |tally: &mut [R; 2], x: R| *tally = [tally[0].term(x, one), tally[1] + one];
        if !self.running {
            weights.iter().for_each(|&x| add(tally, x));
        }
        let of = |&x: &R| {
            if self.running {
                add(tally, x);
            }
            tally[1] * x / tally[0]
        };
        weights.iter().map(of).collect()
    }

    /// Goes to the same head of a state.
    pub(crate) fn keep(&self, state: &mut FlowformerState, [i, h]: [usize; 2]) {
        state.sums.slice_mut(ndarray::s![i, h, .., ..]).assign(&self.sums.map(|x| x.value() as f32));
        (0..2).for_each(|which| state.tallies[[i, h, which]] = self.tally[which].value());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::stages::pass::alone;
    use crate::stages::window::join;
    use crate::testing::arrays::array;
    use ndarray::s;

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len, dim, running) in [
            (1, 1, 5, true),
            (64, 64, 16, true),
            (201, 201, 70, true),
            (70, 201, 33, false),
            (5, 0, 8, false),
        ] {
            let (q, k) = (array(1, (2, 4, q_len, dim)), array(2, (2, 2, kv_len, dim)));
            let (q, k) = (q.mapv(|x: f32| x.abs() + 0.1), k.mapv(|x: f32| x.abs() + 0.1));
            let (batch, q_heads, kv_heads, head_dim, packed) = (2, 4, 2, dim, false);
            let dims = Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim: 0, packed };
            for isa in Isa::available() {
                let [query, value] = alone(|pass| {
                    let (q, k) = (join(pass, isa, 4, None, q.view())?, join(pass, isa, 2, None, k.view())?);
                    let how = (isa, 0.01, running);
                    let numbers = run(pass, how, (dims, Lengths::Full), [&q, &k], None, |head| {
                        let Head { flows, q, k, sums: [a, b, ..], tally, query, value, .. } = head;
                        flows.column(k, None, a, q, query);
                        // What was worked out weighs the other side, kept small.
                        let by: Vec<f32> = query.iter().map(|x| 1.0 / x).collect();
                        flows.column(q, Some(&by), b, k, value);
                        value.iter_mut().for_each(|x| *x *= 0.01);
                        flows.softmax(value, tally);
                        flows.sigmoid(query);
                    })?;
                    Ok(numbers.map(|x| x.to_vec()))
                });
                let state = FlowformerState::empty(&dims, 0.01).unwrap();
                for (b, h) in ndarray::indices((2, 4)) {
                    let rows = |x: ndarray::ArrayView2<'_, f32>| x.map(|&x| Running::of(f64::from(x)));
                    let (q, k) = (rows(q.slice(s![b, h, .., ..])), rows(k.slice(s![b, h / 2, .., ..])));
                    let mut sums = Sums::<Running>::new(&state, [b, h], 0.01, running);
                    let one = Running::of(1.0);
                    let into = sums.column(0, &k, &vec![one; kv_len], &q);
                    let by: Vec<_> = into.iter().map(|&x| one / x).collect();
                    let small = Running::of(f64::from(0.01f32));
                    let rival: Vec<_> = sums.column(1, &q, &by, &k).into_iter().map(|x| x * small).collect();
                    let share = sums.softmax(&rival);
                    let at = |len: usize| (b * 4 + h) * len..(b * 4 + h + 1) * len;
                    let pairs = query[at(q_len)].iter().zip(into.into_iter().map(|x| x.sigmoid()));
                    for (&got, want) in pairs.chain(value[at(kv_len)].iter().zip(share)) {
                        let off = (f64::from(got) - want.value()).abs();
                        assert!(off <= want.off(), "{isa} {q_len} {kv_len} {running}: {got}, not {want:?}");
                        worst = worst.max(off / want.off());
                    }
                }
            }
        }
        println!("flow: {worst:.3} of the bound");
    }
}
