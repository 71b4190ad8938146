//! Softmax attention whose keys reach their queries through a map of every token
//! between them: `H_t = I - beta_t w_t w_t^T`.
//!
//! ```text
//! s_ij = scale * (q_i^T H_i H_{i-1} .. H_{j+1} k_j + g_{j+1} + .. + g_i)      j <= i
//! ```
//!
//! Tokens are taken in chunks. The maps of a chunk are one map `I + W^T N`, where `N`
//! solves a triangular system, and its keys are taken to its end once for all queries
//! (*prepare*). Queries go through the chunks from their own to the first: scores with keys at a
//! chunk's end, softmax, values, and the map of the chunk (*read*).

use ndarray::{ArrayView3, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::{Place, copy_rows, copy_tokens, product};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Sequence, countable};
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::exp::exp;
use crate::simd::mem::{Ahead, Arena, OutRows, Parts, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::Update;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::Pass;

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;

/// Queries, keys and values with the maps of tokens.
#[derive(Clone, Copy)]
pub(crate) struct Reflected<'a> {
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    pub(crate) v: AnyArray<'a>,
    pub(crate) w: AnyArray<'a>,
    /// `[batch, heads, len]`
    pub(crate) beta: ArrayView3<'a, f32>,
    /// Log gates, finite.
    pub(crate) gate: Option<ArrayView3<'a, f32>>,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) scale: f32,
}

/// Sizes of rows, and of what is prepared of a chunk.
#[derive(Clone, Copy)]
struct Geometry {
    dim: usize,
    stride: usize,
    width: usize,
}

impl Geometry {
    /// Tokens' vectors `w` and their keys, taken to the chunk's end, as columns; `N`, and
    /// what `N` is of the keys.
    fn sizes(&self) -> [usize; 4] {
        [self.dim * CHUNK, self.dim * CHUNK, CHUNK * self.stride, CHUNK * CHUNK]
    }

    fn piece(&self) -> usize {
        self.sizes().iter().sum()
    }

    fn cut<'a>(&self, piece: &'a [f32]) -> [&'a [f32]; 4] {
        let [a, b, c, _] = self.sizes();
        let (w, rest) = piece.split_at(a);
        let (keys, rest) = rest.split_at(b);
        let (map, own) = rest.split_at(c);
        [w, keys, map, own]
    }

    fn cut_mut<'a>(&self, piece: &'a mut [f32]) -> [&'a mut [f32]; 4] {
        let [a, b, c, _] = self.sizes();
        let (w, rest) = piece.split_at_mut(a);
        let (keys, rest) = rest.split_at_mut(b);
        let (map, own) = rest.split_at_mut(c);
        [w, keys, map, own]
    }
}

impl Reflected<'_> {
    /// Heads whose keys have other maps: a divisor of the heads that those of keys, `w` and
    /// `beta` divide.
    fn own_heads(&self) -> usize {
        let of = [self.k.heads(), self.w.heads(), self.beta.dim().1];
        let most = of.into_iter().max().unwrap_or(0);
        let fits = most > 0 && of.iter().all(|&heads| heads > 0 && most.is_multiple_of(heads));
        if fits { most } else { self.dims.q_heads }
    }

    /// The chunks of the sequences before one, or as many at least.
    fn chunks_before(&self, sequence: usize) -> usize {
        if !self.dims.packed {
            return sequence * self.dims.q_len.div_ceil(CHUNK);
        }
        let tokens = if sequence < self.dims.batch {
            self.lengths.sequence(&self.dims, sequence).queries.start
        } else {
            self.dims.q_len
        };
        tokens / CHUNK + sequence
    }

    fn rows<'b>(&self, of: AnyArray<'b>, at: &Place) -> AnyRows<'b> {
        of.rows(at.batch, at.head_of(of.heads(), self.dims.q_heads), &at.tokens)
    }
}

/// The tokens of a chunk.
fn tokens(sequence: &Sequence, chunk: usize) -> std::ops::Range<usize> {
    let first = sequence.queries.start + chunk * CHUNK;
    first..(first + CHUNK).min(sequence.queries.end)
}

/// Attention of every query to the keys up to its own.
pub(crate) fn attend<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: &Reflected<'_>,
    out: Option<ArrayViewMut4<'_, T>>,
) -> Result<()> {
    let Dims { batch, q_heads: heads, q_len: len, head_dim: dim, value_dim, packed, .. } = x.dims;
    // What threads work in can be counted in bytes.
    const ROOM: usize = 1 << 24;
    if ![[ROOM, dim, 1], [ROOM, value_dim, 1], [batch, heads, len]]
        .iter()
        .all(|n| countable(&[n[0], n[1], n[2], 8]))
    {
        return Err(Error::too_large("workspace", format_args!("rows of {dim} and {value_dim} numbers")));
    }
    let [stride, width] = [dim, value_dim].map(|n| n.next_multiple_of(MAX_LANES));
    let g = Geometry { dim, stride, width };
    let (own, chunks, workers) = (x.own_heads(), x.chunks_before(batch), parallel::threads());
    let all = (0..batch).map(|i| x.lengths.sequence(&x.dims, i).queries.len().div_ceil(CHUNK));
    let longest = all.max().unwrap_or(0);
    let pieces = chunks.checked_mul(own).and_then(|n| n.checked_mul(g.piece())).unwrap_or(usize::MAX);
    let prepared = pass.take(pieces)?;
    let sizes = [CHUNK * stride, CHUNK * CHUNK, CHUNK];
    let room = sizes.map(bytes_for::<f32>).iter().sum::<usize>();
    let words = claim_words(chunks * own);
    let flops = || (chunks as f64 * own as f64 * (CHUNK * CHUNK) as f64 * (5 * dim + CHUNK) as f64) as u64;
    pass.stage(flops, bytes_for::<u64>(words) + bytes_for_shares(workers, room), |mut arena| {
        let pieces = Parts::new(&mut *prepared, g.piece().max(1), arena.take::<u64>(words));
        let shares = arena.shares(workers, room);
        let start = |worker| {
            let mut arena = shares.take(worker);
            sizes.map(|n| arena.take::<f32>(n))
        };
        parallel::for_each(workers, batch * own * longest, start, |room, task| {
            let (index, head, chunk) = (task / longest / own, task / longest % own, task % longest);
            let sequence = x.lengths.sequence(&x.dims, index);
            let tokens = tokens(&sequence, chunk);
            if tokens.is_empty() {
                return;
            }
            // The first of the heads that share them.
            let at = Place::new(&sequence, head * (heads / own), tokens);
            let piece = pieces.take((x.chunks_before(index) + chunk) * own + head);
            let [w, gram, beta] = room;
            w.fill(0.0);
            beta.fill(0.0);
            copy_rows(isa, x.rows(x.w, &at), w, stride);
            copy_tokens(&x.beta, heads, &at, beta);
            if chunk == 0 {
                // Nothing is before the first token.
                w[..stride].fill(0.0);
                beta[0] = 0.0;
            }
            let [columns, of_keys, map, own] = g.cut_mut(piece);
            let keys = x.rows(x.k, &at);
            isa.dispatch(Prepare { g, w, beta, gram, keys, columns, of_keys, map, own });
        });
    });
    let prepared = &*prepared;
    let sizes =
        [CHUNK * stride, dim * CHUNK, CHUNK * CHUNK, CHUNK * CHUNK, CHUNK * width, CHUNK * width, 2 * CHUNK];
    let room = sizes.map(bytes_for::<f32>).iter().sum::<usize>();
    let rows = if packed { 1 } else { batch } * heads * len;
    let sums = x.gate.map_or(0, |_| rows);
    let words = claim_words(rows);
    let bytes = bytes_for::<u64>(words) + bytes_for::<u64>(sums) + bytes_for_shares(workers, room);
    let pairs =
        || (batch * heads) as f64 * (longest as f64 * (longest + 1) as f64 / 2.0) * (CHUNK * CHUNK) as f64;
    let flops = || (pairs() * (6 * dim + 2 * value_dim) as f64) as u64;
    pass.stage(flops, bytes, |mut arena| {
        let Some(out) = out.filter(|out| !out.is_empty()) else { return };
        let out = T::any_out(OutRows::new(out, arena.take(words)));
        let gates = arena.take::<u64>(sums);
        if let Some(gate) = &x.gate {
            let each = |i: usize| x.lengths.sequence(&x.dims, i);
            for (i, head) in (0..batch).flat_map(|i| (0..heads).map(move |head| (i, head))) {
                let (of, mut sum) = (each(i), 0f64);
                for t in of.queries.clone() {
                    let at = Place::new(&of, head, t..t + 1);
                    sum += f64::from(gate[[of.batch, at.head_of(gate.dim().1, heads), t]]);
                    gates[(of.batch * heads + head) * len + t] = sum.to_bits();
                }
            }
        }
        let gates = &*gates;
        let shares = arena.shares(workers, room);
        let start = |worker| Room::take(shares.take(worker), sizes);
        parallel::for_each(workers, batch * heads * longest, start, |room, task| {
            // Those that read most come first.
            let (chunk, unit) = (longest - 1 - task / (batch * heads), task % (batch * heads));
            let (index, head) = (unit / heads, unit % heads);
            let sequence = x.lengths.sequence(&x.dims, index);
            let tokens = tokens(&sequence, chunk);
            if tokens.is_empty() {
                return;
            }
            let to = out.take(sequence.batch, head, tokens.clone());
            let at = Place::new(&sequence, head, tokens);
            let first = (at.batch * heads + head) * len + sequence.queries.start;
            let gates = gates.get(first..first + sequence.queries.len()).unwrap_or_default();
            let pieces = |chunk: usize| {
                let piece = (x.chunks_before(index) + chunk) * own + head / (heads / own);
                g.cut(&prepared[piece * g.piece()..][..g.piece()])
            };
            isa.dispatch(Read { x, g, sequence: &sequence, at, chunk, pieces: &pieces, gates, room, to });
        });
    });
    Ok(())
}

/// `to += sum_s x_s row_s`, in vectors.
#[inline(always)]
fn add<S: Simd>(s: S, x: &[f32], rows: &[f32], stride: usize, to: &mut [f32]) {
    let mut col = 0;
    while col < to.len() {
        col += match (to.len() - col) / S::LANES {
            0..4 => columns::<S, 1>(s, x, rows, stride, to, col),
            _ => columns::<S, 4>(s, x, rows, stride, to, col),
        };
    }
}

#[inline(always)]
fn columns<S: Simd, const NV: usize>(
    s: S,
    x: &[f32],
    rows: &[f32],
    stride: usize,
    to: &mut [f32],
    col: usize,
) -> usize {
    let mut sums = [s.splat(0.0); NV];
    for v in 0..NV {
        sums[v] = s.load(&to[col + v * S::LANES..]);
    }
    for (row, &x) in rows.chunks_exact(stride).zip(x) {
        for v in 0..NV {
            sums[v] = s.mul_add(s.splat(x), s.load(&row[col + v * S::LANES..]), sums[v]);
        }
    }
    for v in 0..NV {
        s.store(&mut to[col + v * S::LANES..], sums[v]);
    }
    NV * S::LANES
}

/// `x *= factor`, in vectors.
#[inline(always)]
fn scale<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, s.mul(s.load(x), s.splat(factor)));
    }
}

/// What all queries need of a chunk.
struct Prepare<'a, 'b> {
    g: Geometry,
    /// `[CHUNK, stride]`, 0 past the last token.
    w: &'a [f32],
    beta: &'a [f32],
    /// `[CHUNK, CHUNK]`
    gram: &'a mut [f32],
    keys: AnyRows<'b>,
    columns: &'a mut [f32],
    of_keys: &'a mut [f32],
    map: &'a mut [f32],
    own: &'a mut [f32],
}

impl Kernel for Prepare<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { g, w, beta, gram, keys, columns, of_keys, map, own } = self;
        let ahead = &mut Ahead::nothing();
        for d in 0..g.dim {
            for t in 0..CHUNK {
                columns[d * CHUNK + t] = w[t * g.stride + d];
            }
        }
        of_keys.fill(0.0);
        keys.pack_columns(s, of_keys, CHUNK);
        let rows = || Rows::of_slice(w, CHUNK, g.dim, g.stride);
        product(s, rows(), (&*columns, CHUNK), CHUNK, (&mut *gram, CHUNK), Update::Set, ahead);
        product(s, rows(), (&*of_keys, CHUNK), CHUNK, (&mut *own, CHUNK), Update::Set, ahead);
        // Row by row: `-beta (w + sum of earlier rows times w . w)`, and the same of the scores
        // of earlier keys.
        for t in 0..CHUNK {
            let products = &gram[t * CHUNK..][..t];
            let (before, row) = map.split_at_mut(t * g.stride);
            let row = &mut row[..g.stride];
            row.copy_from_slice(&w[t * g.stride..][..g.stride]);
            add(s, products, before, g.stride, row);
            scale(s, row, -beta[t]);
            let (before, row) = own.split_at_mut(t * CHUNK);
            let row = &mut row[..CHUNK];
            row[t..].fill(0.0);
            add(s, products, before, CHUNK, row);
            scale(s, &mut row[..t.next_multiple_of(MAX_LANES)], -beta[t]);
        }
        // Keys at the chunk's end.
        if g.dim == 0 {
            return;
        }
        let columns = Rows::of_slice(columns, g.dim, CHUNK, CHUNK);
        product(s, columns, (&*own, CHUNK), CHUNK, (of_keys, CHUNK), Update::Add, ahead);
    }
}

/// What one thread works in.
struct Room<'a> {
    q: &'a mut [f32],
    keys: &'a mut [f32],
    scores: &'a mut [f32],
    /// Queries times the vectors of a chunk.
    along: &'a mut [f32],
    v: &'a mut [f32],
    out: &'a mut [f32],
    /// Of each query the largest score, and then the sum of its weights.
    sums: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn take(mut arena: Arena<'a>, sizes: [usize; 7]) -> Self {
        let [q, keys, scores, along, v, out, sums] = sizes.map(|n| arena.take::<f32>(n));
        Self { q, keys, scores, along, v, out, sums }
    }
}

/// The queries of a chunk.
struct Read<'a, 'b, 'c> {
    x: &'a Reflected<'b>,
    g: Geometry,
    sequence: &'a Sequence,
    at: Place,
    chunk: usize,
    pieces: &'a dyn Fn(usize) -> [&'a [f32]; 4],
    /// Sums of log gates up to each token of the sequence, as bits; or none.
    gates: &'a [u64],
    room: &'a mut Room<'c>,
    to: AnyRowsMut<'a>,
}

impl Kernel for Read<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (x, g, len, ahead) = (self.x, self.g, self.at.tokens.len(), &mut Ahead::nothing());
        let Room { q, keys, scores, along, v, out, sums } = &mut *self.room;
        q.fill(0.0);
        v.fill(0.0);
        out.fill(0.0);
        sums[..CHUNK].fill(f32::NEG_INFINITY);
        sums[CHUNK..].fill(0.0);
        keys.fill(0.0);
        x.rows(x.q, &self.at).pack_rows(s, q, g.stride);
        x.rows(x.k, &self.at).pack_columns(s, keys, CHUNK);
        for chunk in (0..=self.chunk).rev() {
            let [w, of_keys, map, own] = (self.pieces)(chunk);
            let tokens = tokens(self.sequence, chunk);
            let count = tokens.len();
            let at = Place { tokens, ..self.at.clone() };
            let diagonal = chunk == self.chunk;
            let through = chunk > 0 || diagonal;
            if through {
                product(
                    s,
                    Rows::of_slice(q, len, g.dim, g.stride),
                    (w, CHUNK),
                    CHUNK,
                    (&mut **along, CHUNK),
                    Update::Set,
                    ahead,
                );
            }
            let of_keys = if diagonal { &**keys } else { of_keys };
            product(
                s,
                Rows::of_slice(q, len, g.dim, g.stride),
                (of_keys, CHUNK),
                CHUNK,
                (&mut **scores, CHUNK),
                Update::Set,
                ahead,
            );
            x.rows(x.v, &at).pack_rows(s, v, g.width);
            // Queries of the same chunk go through the maps up to their own.
            for i in 0..len {
                let row = &mut scores[i * CHUNK..][..CHUNK];
                let seen = if diagonal { i + 1 } else { count };
                if diagonal {
                    let along = &along[i * CHUNK..][..seen];
                    add(s, along, own, CHUNK, row);
                    if chunk > 0 {
                        add(s, along, map, g.stride, &mut q[i * g.stride..][..g.stride]);
                    }
                }
                let gates = (!self.gates.is_empty()).then(|| {
                    let first = chunk * CHUNK;
                    let own = f64::from_bits(self.gates[self.chunk * CHUNK + i]);
                    (own, &self.gates[first..first + count])
                });
                let out = &mut out[i * g.width..][..g.width];
                let [most, sum] = [i, CHUNK + i].map(|at| sums[at]);
                let (most, factor, sum) = weigh(s, row, seen, x.scale, gates, [most, sum]);
                (sums[i], sums[CHUNK + i]) = (most, sum);
                if factor != 1.0 {
                    scale(s, out, factor);
                }
                if diagonal {
                    add(s, &row[..seen], v, g.width, out);
                }
            }
            if diagonal {
                continue;
            }
            let weights = Rows::of_slice(scores, len, count, CHUNK);
            product(s, weights, (&**v, g.width), g.width, (&mut **out, g.width), Update::Add, ahead);
            if chunk > 0 {
                let along = Rows::of_slice(along, len, CHUNK, CHUNK);
                product(s, along, (map, g.stride), g.stride, (&mut **q, g.stride), Update::Add, ahead);
            }
        }
        for (i, row) in out.chunks_exact(g.width).take(len).enumerate() {
            self.to.write(s, i, row, 1.0 / sums[CHUNK + i]);
        }
    }
}

/// Weights in the place of the first `seen` scores of a row, and 0 after them: the largest score
/// yet, what is left of earlier weights, and the sum of all.
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    row: &mut [f32],
    seen: usize,
    scale: f32,
    gates: Option<(f64, &[u64])>,
    [most, sum]: [f32; 2],
) -> (f32, f32, f32) {
    if let Some((own, gates)) = gates {
        for (x, gate) in row.iter_mut().zip(gates).take(seen) {
            *x += (own - f64::from_bits(*gate)) as f32;
        }
    }
    self::scale(s, row, scale);
    row[seen..].fill(f32::NEG_INFINITY);
    let mut largest = s.splat(f32::NEG_INFINITY);
    for x in row.chunks_exact(S::LANES) {
        largest = s.max(s.load(x), largest);
    }
    let now = s.reduce_max(largest).max(most);
    let base = if now == f32::NEG_INFINITY { 0.0 } else { now };
    let factor = if most == f32::NEG_INFINITY { 1.0 } else { (most - base).exp() };
    let mut total = s.splat(0.0);
    for x in row.chunks_exact_mut(S::LANES) {
        let weight = exp(s, s.sub(s.load(x), s.splat(base)));
        s.store(x, weight);
        total = s.add(total, weight);
    }
    (now, factor, sum * factor + s.reduce_add(total))
}

/// Takes keys through the map of one token: `k -= beta (w . k) w`, all of a head.
pub(crate) struct Advance<'a> {
    /// Rows of neighbouring numbers, one after the other.
    pub(crate) keys: &'a mut [f32],
    pub(crate) w: &'a [f32],
    pub(crate) beta: f32,
}

impl Kernel for Advance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { keys, w, beta } = self;
        for key in keys.chunks_exact_mut(w.len().max(1)) {
            let mut along = s.splat(0.0);
            for (k, w) in key.chunks(S::LANES).zip(w.chunks(S::LANES)) {
                along = s.mul_add(s.load_tail(k), s.load_tail(w), along);
            }
            let along = s.splat(-beta * s.reduce_add(along));
            for (k, w) in key.chunks_mut(S::LANES).zip(w.chunks(S::LANES)) {
                s.store_tail(k, s.mul_add(along, s.load_tail(w), s.load_tail(k)));
            }
        }
    }
}
