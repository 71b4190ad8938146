//! Flows between rows of features, head by head: linear attention with a
//! single value column, and a softmax over tokens, both over a whole sequence
//! or over what there was so far.

use std::ops::Range;

use crate::definition::number::{Real, tokens};
use crate::engine::parallel;
use crate::error::Result;
use crate::input::{Dims, Lengths};
use crate::simd::exp::{exp, sigmoid};
use crate::simd::mem::{Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Sums that go along: what a head keeps from token to token.
pub(crate) const SUMS: usize = 4;
/// Tokens that are summed by themselves first.
const CHUNK: usize = 64;

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
                for (kept, sum) in kept.iter_mut().flat_map(|(kept, _)| kept.chunks_mut(dim.max(1))).zip(&*sums) {
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
            let of = if self.running { Some((&of[i * chunk..][..read.len()], by(i * CHUNK, out.len()))) } else { None };
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
            for (t, dots) in dots[..out.len().next_multiple_of(S::LANES).min(CHUNK)].chunks_mut(S::LANES).enumerate() {
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

/// The definition of a column: what is read, and the sums after it.
pub(crate) fn column<R: Real>(
    (of, by): (&[Vec<R>], &[R]),
    sums: &mut [R],
    read: &[Vec<R>],
    (epsilon, running): (R, bool),
) -> Vec<R> {
    let mut added = 0;
    let mut add = |sums: &mut [R], t: usize| {
        sums.iter_mut().zip(&of[t]).for_each(|(sum, &x)| *sum = sum.term(x, by[t]));
        added += 1;
        tokens(added)
    };
    let mut roundings = 0;
    if !running {
        roundings = (0..of.len()).fold(0, |_, t| add(sums, t));
    }
    let each = read.iter().enumerate().map(|(t, read)| {
        if running {
            roundings = add(sums, t);
        }
        R::dot(read.iter().zip(&*sums).map(|(&x, sum)| (x + epsilon, sum.summed(roundings))))
    });
    each.collect()
}

/// The definition of the softmax.
pub(crate) fn softmax<R: Real>(x: &[R], tally: &mut [R; 2], running: bool) -> Vec<R> {
    let one = R::of(1.0);
    let weights: Vec<R> = x.iter().map(|x| x.min(one).max(-one).exp()).collect();
    let add = |tally: &mut [R; 2], x: R| *tally = [tally[0].term(x, one), tally[1] + one];
    if !running {
        weights.iter().for_each(|&x| add(tally, x));
    }
    let mut of = |&x: &R| {
        if running {
            add(tally, x);
        }
        tally[1] * x / tally[0]
    };
    weights.iter().map(&mut of).collect()
}
