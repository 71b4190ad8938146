//! One chunk of tokens of one head, as matrix products.

use std::ops::Range;

use crate::engine::recur::source::{Keys, Place, Source};
use crate::engine::recur::{Decay, Normaliser, Read, Rule, Spec};
use crate::simd::any::AnyRowsMut;
use crate::simd::exp::exp;
use crate::simd::mem::{Ahead, Arena, Rows, bytes_for};
use crate::simd::pack::PackColumns;
use crate::simd::tile::{self, Product, ProductAhead, TILE_ROWS, Update, flush};
use crate::simd::{Kernel, MAX_LANES, Simd};

/// Tokens of a chunk. More make fewer products with states, of more columns;
/// the products within chunks grow.
pub(crate) const CHUNK: usize = 32;
/// The most columns of scores, and tokens.
pub(crate) const COLUMNS: usize = 64;
/// Rows whose scores stop at the same column.
pub(super) const BLOCK: usize = 2 * TILE_ROWS;
/// Rows within which keys are divided by decays of channels where a chunk is
/// too long for it, and within which a triangular system is solved part by
/// part.
pub(super) const SUB: usize = 16;
/// Rows of such a part, which is solved row by row.
const PART: usize = 4;
/// How far log decays of channels may add up within a sub-block for keys to be
/// divided by their exponentials, and how large these keys may be: products
/// stay within `f32`, and small queries keep their digits.
const REACH: f32 = 41.0;
const LARGE: f32 = (1u64 << 60) as f32;
/// What stands for any log decay below it: its exponential is 0, and sums of
/// it keep the precision of others.
const FORGET: f32 = -1e4;

/// Sizes of what a chunk is worked out in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Tokens.
    pub(crate) chunk: usize,
    /// Columns of scores: the keys of a chunk, and its corrections if it has
    /// any.
    pub(crate) columns: usize,
    /// Rows of a state.
    pub(crate) rows: usize,
    /// The same, rounded up to vectors: from one token's row to the next.
    pub(crate) stride: usize,
    /// Columns of a state.
    pub(crate) cols: usize,
    /// The same, rounded up to vectors.
    pub(crate) width: usize,
    /// Columns of a panel of values or of a state.
    pub(crate) panel: usize,
    pub(crate) panels: usize,
    pub(super) rule: Rule,
    pub(super) decay: Decay,
}

impl Geometry {
    pub(crate) fn new(spec: &Spec<'_>) -> Self {
        let (rows, cols) = (spec.state_dim, spec.state_cols());
        let (width, panel) = (cols.next_multiple_of(MAX_LANES), spec.isa.panel());
        Self {
            chunk: CHUNK,
            columns: if spec.rule == Rule::LowRank { 2 * CHUNK } else { CHUNK },
            rows,
            stride: rows.next_multiple_of(MAX_LANES),
            cols,
            width,
            panel,
            panels: width.div_ceil(panel),
            rule: spec.rule,
            decay: spec.decay,
        }
    }

    /// What becomes of a state that decays by these factors.
    pub(super) fn update<'a>(&self, factors: &'a [f32]) -> Update<'a> {
        match (self.rule, self.decay) {
            (Rule::Add, Decay::None) => Update::Add,
            (Rule::Add, _) => Update::Decay(factors),
            _ => Update::Correct(factors),
        }
    }

    /// Elements of a panel of a state, `[rows, panel]`.
    pub(crate) fn state_panel(&self) -> usize {
        self.rows * self.panel
    }

    /// Elements of a panel of values, `[columns, panel]`.
    pub(crate) fn value_panel(&self) -> usize {
        self.columns * self.panel
    }

    /// Columns of one panel.
    pub(crate) fn panel_width(&self, panel: usize) -> usize {
        (self.width - panel * self.panel).min(self.panel)
    }

    /// Where the corrections of the low-rank rule start among the columns of
    /// scores and the rows of values; those of the delta rule replace the
    /// values.
    fn corrections(&self) -> usize {
        if self.rule == Rule::LowRank { self.chunk } else { 0 }
    }

    /// Columns of scores, and rows of values, that `len` tokens use.
    fn used(&self, len: usize) -> usize {
        self.corrections() + len
    }

    fn piece_sizes(&self) -> [usize; 6] {
        let corrects = usize::from(self.rule != Rule::Add);
        [
            self.chunk * self.columns,
            self.rows * self.columns,
            self.chunk * self.stride,
            corrects * self.chunk * self.stride,
            corrects * self.chunk * self.columns,
            self.rows.next_multiple_of(MAX_LANES),
        ]
    }

    /// Elements of what a chunk is [prepared](Prepare) into.
    pub(crate) fn piece(&self) -> usize {
        self.piece_sizes().iter().sum()
    }
}

/// What a chunk does to any state, and its queries read of any.
#[derive(Debug)]
pub(crate) struct Prepared<X> {
    /// How much of each value each query takes, `[chunk, columns]`, 0 for
    /// those that it does not see.
    pub(super) scores: X,
    /// Keys as columns, decayed to the chunk's end: `[rows, columns]`.
    pub(super) keys: X,
    /// Queries, decayed from the chunk's start: `[chunk, stride]`.
    pub(super) reads: X,
    /// What corrections read of the state, decayed likewise: `[chunk, stride]`.
    pub(super) probes: X,
    /// How corrections depend on each other: `[chunk, columns]`.
    pub(super) coefficients: X,
    /// What the chunk leaves of each row of the state.
    pub(super) decay: X,
}

impl<'a> Prepared<&'a mut [f32]> {
    pub(crate) fn of(piece: &'a mut [f32], g: &Geometry) -> Self {
        let [a, b, c, d, e, f] = g.piece_sizes();
        let (scores, piece) = piece.split_at_mut(a);
        let (keys, piece) = piece.split_at_mut(b);
        let (reads, piece) = piece.split_at_mut(c);
        let (probes, piece) = piece.split_at_mut(d);
        let (coefficients, piece) = piece.split_at_mut(e);
        Self { scores, keys, reads, probes, coefficients, decay: &mut piece[..f] }
    }
}

impl<'a> Prepared<&'a [f32]> {
    pub(crate) fn of_ready(piece: &'a [f32], g: &Geometry) -> Self {
        let [a, b, c, d, e, f] = g.piece_sizes();
        let (scores, piece) = piece.split_at(a);
        let (keys, piece) = piece.split_at(b);
        let (reads, piece) = piece.split_at(c);
        let (probes, piece) = piece.split_at(d);
        let (coefficients, piece) = piece.split_at(e);
        Self { scores, keys, reads, probes, coefficients, decay: &piece[..f] }
    }
}

/// What one thread works in: the operands of a chunk as they are loaded, and
/// what is made of its decays.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) q: &'a mut [f32],
    pub(crate) k: &'a mut [f32],
    pub(crate) v: &'a mut [f32],
    pub(crate) decay: &'a mut [f32],
    pub(crate) beta: &'a mut [f32],
    pub(crate) a: &'a mut [f32],
    pub(crate) b: &'a mut [f32],
    /// Rows of outputs, `[chunk, width]`.
    pub(crate) out: &'a mut [f32],
    /// What one token leaves of each channel.
    pub(crate) coming: &'a mut [f32],
    /// What a sub-block leaves of each channel.
    last: &'a mut [f32],
    /// Of a sub-block, for each vector of channels 1 if they are strong, else
    /// 0; of those the decays token by token, and to the sub-block's end.
    strong: &'a mut [f32],
    each: &'a mut [f32],
    until: &'a mut [f32],
}

impl<'a> Work<'a> {
    fn sizes(g: &Geometry) -> [usize; 13] {
        let (rows, values) = (g.chunk * g.stride, g.chunk * g.width);
        let if_ = |yes: bool, n: usize| if yes { n } else { 0 };
        let low_rank = if_(g.rule == Rule::LowRank, rows);
        let channel = |n: usize| if_(g.decay == Decay::Channel, n);
        [
            rows,
            rows,
            values,
            if g.decay == Decay::Channel { rows } else { g.chunk },
            g.chunk,
            low_rank,
            low_rank,
            values,
            g.stride,
            channel(g.stride),
            channel(g.stride),
            channel(SUB * g.stride),
            channel(SUB * g.stride),
        ]
    }

    pub(crate) fn bytes(g: &Geometry) -> usize {
        Self::sizes(g).iter().map(|&n| bytes_for::<f32>(n)).sum()
    }

    pub(crate) fn take(arena: &mut Arena<'a>, g: &Geometry) -> Self {
        let [q, k, v, decay, beta, a, b, out, coming, last, strong, each, until] = Self::sizes(g);
        Self {
            q: arena.take(q),
            k: arena.take(k),
            v: arena.take(v),
            decay: arena.take(decay),
            beta: arena.take(beta),
            a: arena.take(a),
            b: arena.take(b),
            out: arena.take(out),
            coming: arena.take(coming),
            last: arena.take(last),
            strong: arena.take(strong),
            each: arena.take(each),
            until: arena.take(until),
        }
    }

    /// Loads the queries of some tokens.
    pub(crate) fn load_queries(&mut self, spec: &Spec<'_>, g: &Geometry, source: &dyn Source, at: &Place) {
        if g.stride != g.rows {
            self.q.fill(0.0);
        }
        source.queries(spec.isa, at, self.q, g.stride);
    }

    /// Loads the keys of some tokens and what belongs to them.
    pub(crate) fn load_keys(&mut self, spec: &Spec<'_>, g: &Geometry, source: &dyn Source, at: &Place) {
        if g.stride != g.rows {
            for x in [&mut *self.k, &mut *self.a, &mut *self.b] {
                x.fill(0.0);
            }
            if g.decay == Decay::Channel {
                self.decay.fill(0.0);
            }
        }
        if g.width != spec.dims.value_dim {
            self.v.fill(0.0);
        }
        let keys = Keys {
            k: self.k,
            v: self.v,
            decay: self.decay,
            beta: self.beta,
            a: self.a,
            b: self.b,
            stride: g.stride,
            value_stride: g.width,
        };
        source.keys(spec.isa, at, keys);
        self.add_ones(spec, g, at.tokens.len());
    }

    /// Loads the values of some tokens alone.
    fn load_values(&mut self, spec: &Spec<'_>, g: &Geometry, source: &dyn Source, at: &Place) {
        if g.width != spec.dims.value_dim {
            self.v.fill(0.0);
        }
        source.values(spec.isa, at, self.v, g.width);
        self.add_ones(spec, g, at.tokens.len());
    }

    /// The column of the values that the sum of the weights is made of.
    fn add_ones(&mut self, spec: &Spec<'_>, g: &Geometry, len: usize) {
        if spec.normaliser.is_some() {
            for row in self.v.chunks_exact_mut(g.width).take(len) {
                row[spec.dims.value_dim] = 1.0;
            }
        }
    }

    /// Values into panels; those of the delta rule times beta. Returns whether
    /// all are finite.
    #[inline(always)]
    fn put_values<S: Simd>(&self, s: S, g: &Geometry, len: usize, values: &mut [f32]) -> bool {
        let mut zero = s.splat(0.0);
        for (panel, to) in values.chunks_exact_mut(g.value_panel()).enumerate() {
            let width = g.panel_width(panel);
            for t in 0..len {
                let from = &self.v[t * g.width + panel * g.panel..][..width];
                let to = &mut to[t * g.panel..][..width];
                let beta = s.splat(if g.rule == Rule::Delta { self.beta[t] } else { 1.0 });
                zero = s.add(zero, zeros(s, from));
                for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
                    s.store(to, s.mul(s.load(from), beta));
                }
            }
            if g.rule == Rule::LowRank {
                to[len * g.panel..g.chunk * g.panel].fill(0.0);
            }
        }
        s.reduce_add(zero) == 0.0
    }
}

/// The sum of the elements times 0, lane by lane: 0 if they are finite, else NaN.
#[inline(always)]
fn zeros<S: Simd>(s: S, x: &[f32]) -> S::F {
    let mut zero = s.splat(0.0);
    for x in x.chunks_exact(S::LANES) {
        zero = s.mul_add(s.load(x), s.splat(0.0), zero);
    }
    zero
}

/// `C (+)= A B` over any number of columns, panel by panel. Rows of `b` are
/// `ldb` apart. Meanwhile memory is asked for what comes next.
#[inline(always)]
pub(crate) fn product<S: Simd>(
    s: S,
    a: Rows<'_, f32>,
    (b, ldb): (&[f32], usize),
    cols: usize,
    (c, ldc): (&mut [f32], usize),
    update: Update<'_>,
    ahead: &mut Ahead,
) {
    let panel = S::LANES * S::TILE_VECTORS;
    for col in (0..cols).step_by(panel) {
        let width = (cols - col).min(panel);
        // A product over no tokens has no rows of B to start from.
        let b = if a.cols() == 0 { &[] } else { &b[col..] };
        let b = Rows::of_slice(b, a.cols(), width, ldb);
        let product = Product { a, b, c: &mut c[col..], ldc, update };
        s.vectorize(ProductAhead { product, ahead });
    }
}

/// The queries and keys of a chunk, without any state.
pub(crate) struct Prepare<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) source: &'a dyn Source,
    pub(crate) at: Place,
    pub(crate) to: Prepared<&'a mut [f32]>,
    /// Panels `[panels][columns][panel]` of the values, and of what the
    /// low-rank rule's corrections read of them.
    pub(crate) values: &'a mut [f32],
    pub(crate) work: &'a mut Work<'b>,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Prepare<'_, '_> {
    /// Whether the chunk is finite. If not, nothing is prepared.
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> bool {
        let (g, len) = (self.g, self.at.tokens.len());
        self.work.load_keys(self.spec, &g, self.source, &self.at);
        let whole = self.fits_whole(s);
        let finite = self.work.put_values(s, &g, len, self.values) && self.is_finite(s, whole);
        if !finite && self.spec.read != Read::Total {
            return false;
        }
        if self.spec.read == Read::Total {
            self.columns(s, 0, len, 0);
            self.to.decay.fill(1.0);
            return true;
        }
        self.weigh(s, whole);
        if g.rule == Rule::LowRank {
            self.correct(s);
        }
        true
    }
}

impl Prepare<'_, '_> {
    /// Scores, coefficients, and operands with their decays, of keys that have
    /// been loaded, and fit as a [whole](Self::fits_whole) or not.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(&mut self, s: S, whole: bool) {
        let (g, len) = (self.g, self.at.tokens.len());
        self.work.load_queries(self.spec, &g, self.source, &self.at);
        if g.rule == Rule::LowRank {
            // Between the keys and the corrections.
            for row in self.to.keys.chunks_exact_mut(g.columns) {
                row[len.next_multiple_of(S::LANES).min(g.chunk)..g.chunk].fill(0.0);
            }
        }
        if g.decay == Decay::Channel { self.by_channel(s, whole) } else { self.by_token(s) }
    }

    /// Whether no operand but the values can reach tokens that must not depend
    /// on it: 0 times infinity is not 0. Of keys that fit as a `whole` this is
    /// known.
    #[inline(always)]
    fn is_finite<S: Simd>(&self, s: S, whole: bool) -> bool {
        let (g, len) = (self.g, self.at.tokens.len());
        let Work { k, decay, beta, a, b, .. } = &*self.work;
        let mut zero = s.splat(0.0);
        let (keys, low_rank) = (!whole, g.rule == Rule::LowRank);
        for (x, unknown) in [(k, keys), (a, low_rank), (b, keys && low_rank)] {
            for row in x.chunks_exact(g.stride.max(1)).take(if unknown { len } else { 0 }) {
                zero = s.add(zero, zeros(s, row));
            }
        }
        let mut finite = s.reduce_add(zero) == 0.0;
        if g.rule == Rule::Delta {
            finite &= beta[..len].iter().all(|x| x.is_finite());
        }
        // A log decay may be -inf.
        match g.decay {
            Decay::None => {}
            Decay::Scalar => finite &= decay[..len].iter().all(|x| *x < f32::INFINITY),
            Decay::Channel if whole => {}
            Decay::Channel => {
                let mut bad = s.splat(0.0);
                for x in decay[..len * g.stride].chunks_exact(S::LANES) {
                    // 0 for what is below infinity, 1 for infinity and NaN.
                    let x = s.load(x);
                    let one = s.select(s.lt(x, s.splat(f32::INFINITY)), s.splat(0.0), s.splat(1.0));
                    bad = s.add(bad, one);
                }
                finite &= s.reduce_add(bad) == 0.0;
            }
        }
        finite
    }

    /// Rows `first..end` of the keys as columns from `base` on; of the
    /// corrections' keys too.
    #[inline(always)]
    fn columns<S: Simd>(&mut self, s: S, first: usize, end: usize, base: usize) {
        let g = self.g;
        let Work { k, b, .. } = &*self.work;
        let low_rank = (g.rule == Rule::LowRank).then_some((b, g.chunk));
        for (from, column) in std::iter::once((k, 0)).chain(low_rank) {
            let from = Rows::of_slice(&from[first * g.stride..], end - first, g.rows, g.stride);
            let to = &mut self.to.keys[(column + base).min(g.rows * g.columns)..];
            s.vectorize(PackColumns { from, to, stride: g.columns });
        }
    }

    /// Without decay, or with the same for all channels: products first,
    /// decays afterwards.
    #[inline(always)]
    fn by_token<S: Simd>(&mut self, s: S) {
        let (g, len, spec) = (self.g, self.at.tokens.len(), self.spec);
        self.columns(s, 0, len, 0);
        let sums = if g.decay == Decay::Scalar { sums(&self.work.decay[..len]) } else { [0.0; COLUMNS + 1] };
        let total = sums[len];
        // Reads of the query see its own token or not; a token's correction
        // depends on the state that it finds, decayed by the delta rule.
        let read = usize::from(spec.read == Read::After);
        self.score(s, false, &sums, read, 0);
        match g.rule {
            Rule::Add => {}
            Rule::Delta => self.score(s, true, &sums, 1, 0),
            Rule::LowRank => {
                self.score(s, false, &sums, read, g.chunk);
                self.score(s, true, &sums, 0, 0);
                self.score(s, true, &sums, 0, g.chunk);
            }
        }
        if spec.read == Read::Before {
            for t in 0..len {
                self.to.scores[t * g.columns + t] = self.own_score(s, t);
            }
        }
        // Queries and corrections from the chunk's start, keys to its end.
        let mut factors = [0f32; COLUMNS];
        for t in 0..len {
            factors[t] = sums[t + read] as f32;
        }
        decays(s, &mut factors);
        let Prepared { reads, probes, keys, decay, .. } = &mut self.to;
        for t in 0..len {
            let from = &self.work.q[t * g.stride..][..g.stride];
            scale_row(s, from, factors[t] * spec.scale as f32, &mut reads[t * g.stride..][..g.stride]);
        }
        if g.rule != Rule::Add {
            let delta = g.rule == Rule::Delta;
            for t in 0..len {
                factors[t] = sums[t + usize::from(delta)] as f32;
            }
            decays(s, &mut factors);
            for t in 0..len {
                let from = if delta { &self.work.k } else { &self.work.a };
                let from = &from[t * g.stride..][..g.stride];
                let sign = if delta { -self.work.beta[t] } else { 1.0 };
                scale_row(s, from, factors[t] * sign, &mut probes[t * g.stride..][..g.stride]);
            }
        }
        decay.fill(total as f32);
        decays(s, decay);
        if g.decay == Decay::None {
            return;
        }
        let mut factors = [0f32; COLUMNS];
        for t in 0..len {
            factors[t] = (total - sums[t + 1]) as f32;
        }
        decays(s, &mut factors);
        let bases = if g.rule == Rule::LowRank { 0..=1 } else { 0..=0 };
        for row in keys.chunks_exact_mut(g.columns) {
            for base in bases.clone() {
                let row = &mut row[base * g.chunk..];
                for (row, factors) in row
                    .chunks_exact_mut(S::LANES)
                    .zip(factors.chunks_exact(S::LANES))
                    .take(len.div_ceil(S::LANES))
                {
                    s.store(row, s.mul(s.load(row), s.load(factors)));
                }
            }
        }
    }

    /// Scores of queries (or of what corrections depend on, if `solve`) with
    /// the keys whose columns start at `base`, decayed; 0 for later tokens.
    /// With `own` 1 the decay of the row's token counts, and its own key for
    /// queries.
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, solve: bool, sums: &[f64], own: usize, base: usize) {
        let (g, len) = (self.g, self.at.tokens.len());
        let Work { q, k, a, beta, .. } = &mut *self.work;
        let left = match (solve, g.rule) {
            (false, _) => &**q,
            (true, Rule::LowRank) => &**a,
            (true, _) => &**k,
        };
        let out = if solve { &mut *self.to.coefficients } else { &mut *self.to.scores };
        for first in (0..len).step_by(BLOCK) {
            let end = (first + BLOCK).min(len);
            let cols = end.next_multiple_of(S::LANES);
            product(
                s,
                Rows::of_slice(&left[first * g.stride..], end - first, g.rows, g.stride),
                (&self.to.keys[base.min(g.rows * g.columns)..], g.columns),
                cols,
                (&mut out[first * g.columns + base..], g.columns),
                Update::Set,
                self.ahead,
            );
            for i in first..end {
                // A correction never depends on itself.
                let seen = if solve { i } else { i + own };
                let factor = match (solve, g.rule) {
                    (false, _) => self.spec.scale as f32,
                    (true, Rule::Delta) => -beta[i],
                    (true, _) => 1.0,
                };
                let row = &mut out[i * g.columns + base..][..cols];
                row[seen..].fill(0.0);
                decay_scores(s, row, (g.decay == Decay::Scalar).then_some((sums, i + own)), seen, factor);
            }
        }
    }

    /// What a query that reads before the update sees of its own token.
    #[inline(always)]
    fn own_score<S: Simd>(&self, s: S, t: usize) -> f32 {
        let g = self.g;
        let (q, k) = (&self.work.q[t * g.stride..][..g.rows], &self.work.k[t * g.stride..][..g.rows]);
        self.spec.scale as f32 * dot(s, q, k, Some(self.source.bonus(self.at.head)))
    }

    /// With decays of their own for channels: sub-block by sub-block, or the
    /// chunk as one if its decays are within reach. Rows of queries are decayed
    /// from the start of their sub-block; columns of earlier keys have come
    /// along to there; keys of the sub-block itself are divided by their decays
    /// from there, and so are within reach of the same product. Channels that
    /// this would overflow are multiplied up pair by pair instead.
    #[inline(always)]
    fn by_channel<S: Simd>(&mut self, s: S, whole: bool) {
        let (g, len, spec) = (self.g, self.at.tokens.len(), self.spec);
        self.to.decay.fill(1.0);
        let bases = [0, g.chunk];
        let bases = &bases[..if g.rule == Rule::LowRank { 2 } else { 1 }];
        let sides = [false, true];
        let sides = &sides[..if g.rule == Rule::Add { 1 } else { 2 }];
        let sub = if whole { g.chunk } else { SUB };
        for first in (0..len).step_by(sub) {
            let end = (first + sub).min(len);
            let own = self.own_scores(s, first, end);
            let strong = self.decay_rows(s, first, end, whole);
            self.columns(s, first, end, first);
            if strong {
                self.strong_columns(s, first, end, false);
            }
            for &solve in sides {
                let Prepared { reads, probes, scores, coefficients, keys, .. } = &mut self.to;
                let (left, out) =
                    if solve { (&**probes, &mut **coefficients) } else { (&**reads, &mut **scores) };
                for &base in bases {
                    product(
                        s,
                        Rows::of_slice(&left[first * g.stride..], end - first, g.rows, g.stride),
                        (&keys[base.min(g.rows * g.columns)..], g.columns),
                        end.next_multiple_of(S::LANES),
                        (&mut out[first * g.columns + base..], g.columns),
                        Update::Set,
                        self.ahead,
                    );
                }
            }
            if strong {
                for &solve in sides {
                    for &base in bases {
                        self.pairs(s, solve, first, end, base);
                    }
                }
            }
            // Later tokens are not seen; a correction never depends on itself.
            for &solve in sides {
                let out = if solve { &mut *self.to.coefficients } else { &mut *self.to.scores };
                let seen = usize::from(!solve && spec.read == Read::After);
                for t in first..end {
                    for &base in bases {
                        out[t * g.columns + base..][t + seen..g.chunk].fill(0.0);
                    }
                }
            }
            if spec.read == Read::Before {
                for t in first..end {
                    self.to.scores[t * g.columns + t] = own[t - first];
                }
            }
            // Keys come along to the sub-block's end.
            let Prepared { reads, probes, keys, decay, .. } = &mut self.to;
            let last = &*self.work.last;
            for (row, &left) in keys.chunks_exact_mut(g.columns).zip(last) {
                for &base in bases {
                    for x in row[base..][..end.next_multiple_of(S::LANES)].chunks_exact_mut(S::LANES) {
                        s.store(x, tile::decay(s, s.load(x), s.splat(left)));
                    }
                }
            }
            // Rows, from the chunk's start.
            if first > 0 {
                for t in first..end {
                    let row = t * g.stride..(t + 1) * g.stride;
                    multiply_in_place(s, &mut reads[row.clone()], decay);
                    if g.rule != Rule::Add {
                        multiply_in_place(s, &mut probes[row], decay);
                    }
                }
            }
            multiply_in_place(s, decay, last);
            if strong {
                self.strong_columns(s, first, end, true);
            }
        }
    }

    /// What queries that read before the update see of the tokens of a
    /// sub-block themselves.
    #[inline(always)]
    fn own_scores<S: Simd>(&self, s: S, first: usize, end: usize) -> [f32; COLUMNS] {
        let mut own = [0.0; COLUMNS];
        if self.spec.read == Read::Before {
            for t in first..end {
                own[t - first] = self.own_score(s, t);
            }
        }
        own
    }

    /// Decays the rows of a sub-block from its start, and divides its keys by
    /// the same decays: all of them if it is known that they `fit`. Returns
    /// whether there are strong channels, of which the keys stay as they are.
    #[inline(always)]
    fn decay_rows<S: Simd>(&mut self, s: S, first: usize, end: usize, fit: bool) -> bool {
        let (g, spec) = (self.g, self.spec);
        let mut any = false;
        for (group, col) in (0..g.stride).step_by(S::LANES).enumerate() {
            let strong = !fit && !self.fits(s, first..end, col);
            any |= strong;
            self.work.strong[group] = if strong { 1.0 } else { 0.0 };
            let Prepared { reads, probes, .. } = &mut self.to;
            let Work { q, k, a, b, beta, decay, each, until, last, .. } = &mut *self.work;
            let scale = s.splat(spec.scale as f32);
            let mut past = s.splat(1.0);
            for t in first..end {
                let at = t * g.stride + col;
                let before = past;
                let left = decay_of(s, s.load(&decay[at..]));
                past = s.mul(past, left);
                if strong {
                    past = flush(s, past);
                    s.store(&mut each[at - first * g.stride..], left);
                }
                let of_query = if spec.read == Read::After { past } else { before };
                s.store(&mut reads[at..], s.mul(s.mul(s.load(&q[at..]), scale), of_query));
                match g.rule {
                    Rule::Add => {}
                    Rule::Delta => {
                        let key = s.mul(s.load(&k[at..]), s.splat(-beta[t]));
                        s.store(&mut probes[at..], s.mul(key, past));
                    }
                    Rule::LowRank => s.store(&mut probes[at..], s.mul(s.load(&a[at..]), before)),
                }
                if !strong {
                    let key = s.div(s.load(&k[at..]), past);
                    s.store(&mut k[at..], key);
                    if g.rule == Rule::LowRank {
                        let key = s.div(s.load(&b[at..]), past);
                        s.store(&mut b[at..], key);
                    }
                }
            }
            s.store(&mut last[col..], past);
            if strong {
                let mut left = s.splat(1.0);
                for t in (first..end).rev() {
                    let at = (t - first) * g.stride + col;
                    s.store(&mut until[at..], left);
                    left = flush(s, s.mul(left, s.load(&each[at..])));
                }
            }
        }
        any
    }

    /// Whether all channels [fit](Self::fits) over the whole chunk. Without
    /// decays of their own they need not.
    #[inline(always)]
    pub(super) fn fits_whole<S: Simd>(&self, s: S) -> bool {
        let mut whole = self.g.decay == Decay::Channel;
        for col in (0..self.g.stride).step_by(S::LANES) {
            whole = whole && self.fits(s, 0..self.at.tokens.len(), col);
        }
        whole
    }

    /// Whether a vector of channels decays (or grows) little enough over some
    /// tokens for their keys to be divided by it. Then decays and keys are
    /// finite.
    #[inline(always)]
    fn fits<S: Simd>(&self, s: S, tokens: Range<usize>, col: usize) -> bool {
        let Work { k, b, decay, .. } = &*self.work;
        let (mut sum, mut reach, mut squares) = (s.splat(0.0), s.splat(0.0), s.splat(0.0));
        for t in tokens {
            let at = t * self.g.stride + col;
            sum = s.add(sum, s.load(&decay[at..]));
            // A NaN stays in either.
            reach = s.max(reach, s.abs(sum));
            let key = s.load(&k[at..]);
            squares = s.mul_add(key, key, squares);
            if self.g.rule == Rule::LowRank {
                let key = s.load(&b[at..]);
                squares = s.mul_add(key, key, squares);
            }
        }
        let near = s.bits(s.lt(reach, s.splat(REACH))) & s.bits(s.lt(squares, s.splat(LARGE * LARGE)));
        near == u64::MAX >> (64 - S::LANES)
    }

    /// Columns of the keys of strong channels: decayed to the end of their
    /// sub-block, or 0 before that.
    #[inline(always)]
    fn strong_columns<S: Simd>(&mut self, s: S, first: usize, end: usize, decayed: bool) {
        let g = self.g;
        let Work { k, b, until, strong, .. } = &mut *self.work;
        let low_rank = (g.rule == Rule::LowRank).then_some((&mut **b, g.chunk));
        for (rows, base) in std::iter::once((&mut **k, 0)).chain(low_rank) {
            for col in (0..g.rows).step_by(S::LANES).filter(|col| strong[col / S::LANES] != 0.0) {
                let width = (g.rows - col).min(S::LANES);
                let to = &mut self.to.keys[col * g.columns + base + first..];
                if decayed {
                    for t in first..end {
                        let row = &mut rows[t * g.stride + col..][..S::LANES];
                        multiply_in_place(s, row, &until[(t - first) * g.stride + col..][..S::LANES]);
                    }
                    let from = &rows[first * g.stride + col..];
                    let from = Rows::of_slice(from, end - first, width, g.stride);
                    s.vectorize(PackColumns { from, to, stride: g.columns });
                } else {
                    for row in to.chunks_mut(g.columns).take(width) {
                        row[..(end - first).next_multiple_of(S::LANES)].fill(0.0);
                    }
                }
            }
        }
    }

    /// Adds to the scores of the pairs within a sub-block what strong channels
    /// give, whose keys are multiplied by the decays of one token after the
    /// other.
    #[inline(always)]
    fn pairs<S: Simd>(&mut self, s: S, solve: bool, first: usize, end: usize, base: usize) {
        let (g, n) = (self.g, end - first);
        let Work { q, k, a, b, beta, each, strong, .. } = &mut *self.work;
        let left = match (solve, g.rule) {
            (false, _) => &**q,
            (true, Rule::LowRank) => &**a,
            (true, _) => &**k,
        };
        // Whether the decay of the row's own token counts.
        let own = if solve { g.rule == Rule::Delta } else { self.spec.read == Read::After };
        let rights = if base > 0 { &**b } else { &**k };
        let out = if solve { &mut *self.to.coefficients } else { &mut *self.to.scores };
        let rows = first * g.stride..end * g.stride;
        let x = Pairs { left: &left[rows.clone()], rights: &rights[rows], each, strong, stride: g.stride };
        for j in 0..n {
            let sums = if own { x.sums::<S, true>(s, j, n) } else { x.sums::<S, false>(s, j, n) };
            let mut column = [0f32; MAX_LANES];
            for part in (0..MAX_LANES).step_by(S::LANES) {
                let mut block = [s.splat(0.0); MAX_LANES];
                block[..S::LANES].copy_from_slice(&sums[part..part + S::LANES]);
                s.store(&mut column[part..], s.reduce_add_each(&block));
            }
            for i in j..n {
                let factor = match (solve, g.rule) {
                    (false, _) => self.spec.scale as f32,
                    (true, Rule::Delta) => -beta[first + i],
                    (true, _) => 1.0,
                };
                out[(first + i) * g.columns + base + first + j] += factor * column[i];
            }
        }
    }

    /// What the corrections of the low-rank rule read of the values.
    #[inline(always)]
    fn correct<S: Simd>(&mut self, s: S) {
        let (g, len) = (self.g, self.at.tokens.len());
        let coefficients = &*self.to.coefficients;
        for (panel, values) in self.values.chunks_exact_mut(g.value_panel()).enumerate() {
            let width = g.panel_width(panel);
            let (keys, corrections) = values.split_at_mut(g.corrections() * g.panel);
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let a = Rows::of_slice(&coefficients[first * g.columns..], end - first, end, g.columns);
                let c = (&mut corrections[first * g.panel..], g.panel);
                product(s, a, (keys, g.panel), width, c, Update::Set, self.ahead);
            }
        }
    }
}

/// `X = R + N X` in place, for `len` rows of `x`.
#[inline(always)]
pub(super) fn triangular<S: Simd>(
    s: S,
    (n, ldn): (&[f32], usize),
    (x, ldx): (&mut [f32], usize),
    width: usize,
    len: usize,
    ahead: &mut Ahead,
) {
    for first in (0..len).step_by(SUB) {
        let end = (first + SUB).min(len);
        if first > 0 {
            let (done, x) = x.split_at_mut(first * ldx);
            let a = Rows::of_slice(&n[first * ldn..], end - first, first, ldn);
            product(s, a, (done, ldx), width, (x, ldx), Update::Add, ahead);
        }
        // Rows of a part take the parts before it all at once.
        for part in (first..end).step_by(PART) {
            let rows = (end - part).min(PART);
            let (done, x) = x.split_at_mut(part * ldx);
            let a = Rows::of_slice(&n[part * ldn + first..], rows, part - first, ldn);
            product(s, a, (&done[first * ldx..], ldx), width, (x, ldx), Update::Add, ahead);
            for i in 1..rows {
                let (done, x) = x.split_at_mut(i * ldx);
                let a = Rows::of_slice(&n[(part + i) * ldn + part..], 1, i, ldn);
                product(s, a, (done, ldx), width, (x, ldx), Update::Add, ahead);
            }
        }
    }
}

/// Pairs of the tokens of a sub-block in strong channels.
struct Pairs<'a> {
    left: &'a [f32],
    rights: &'a [f32],
    each: &'a [f32],
    strong: &'a [f32],
    stride: usize,
}

impl Pairs<'_> {
    /// For key `j` and each row from it on, the sum of the products of their
    /// elements and of the decays between them, lane by lane. With `OWN` the
    /// decay of the row's token counts.
    #[inline(always)]
    fn sums<S: Simd, const OWN: bool>(&self, s: S, j: usize, n: usize) -> [S::F; MAX_LANES] {
        let mut sums = [s.splat(0.0); MAX_LANES];
        for col in (0..self.stride).step_by(S::LANES) {
            if self.strong[col / S::LANES] == 0.0 {
                continue;
            }
            let mut key = s.load(&self.rights[j * self.stride + col..]);
            for i in j..n {
                let at = i * self.stride + col;
                let mut decayed = key;
                if i > j {
                    decayed = tile::decay(s, key, s.load(&self.each[at..]));
                }
                let seen = if OWN { decayed } else { key };
                sums[i] = s.mul_add(seen, s.load(&self.left[at..]), sums[i]);
                key = decayed;
            }
        }
        sums
    }
}

/// Sums of log decays from the chunk's start to before token `t`. In `f64`:
/// their differences count.
#[inline(always)]
pub(super) fn sums(decays: &[f32]) -> [f64; COLUMNS + 1] {
    let mut sums = [0f64; COLUMNS + 1];
    for (t, &decay) in decays.iter().enumerate() {
        sums[t + 1] = sums[t] + f64::from(if decay < FORGET { FORGET } else { decay });
    }
    sums
}

/// Multiplies a row of scores by `factor`, and by the decays from after each
/// of the `seen` keys up to where `sums[to]` is.
#[inline(always)]
pub(super) fn decay_scores<S: Simd>(
    s: S,
    row: &mut [f32],
    decay: Option<(&[f64], usize)>,
    seen: usize,
    factor: f32,
) {
    let mut factors = [0f32; COLUMNS];
    if let Some((sums, to)) = decay {
        for (j, factor) in factors[..seen].iter_mut().enumerate() {
            *factor = (sums[to] - sums[j + 1]) as f32;
        }
        decays(s, &mut factors[..row.len()]);
    } else {
        factors.fill(1.0);
    }
    for (row, factors) in row.chunks_exact_mut(S::LANES).zip(factors.chunks_exact(S::LANES)) {
        let factor = s.mul(s.load(factors), s.splat(factor));
        s.store(row, s.mul(s.load(row), factor));
    }
}

/// `e^x` of a log decay, exactly 0 rather than subnormal.
#[inline(always)]
pub(crate) fn decay_of<S: Simd>(s: S, x: S::F) -> S::F {
    s.select(s.lt(x, s.splat(-87.0)), s.splat(0.0), exp(s, x))
}

/// [`decay_of`] in place, for whole vectors.
#[inline(always)]
pub(super) fn decays<S: Simd>(s: S, x: &mut [f32]) {
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, decay_of(s, s.load(x)));
    }
}

#[inline(always)]
pub(super) fn scale_row<S: Simd>(s: S, from: &[f32], factor: f32, to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        s.store(to, s.mul(s.load(from), s.splat(factor)));
    }
}

/// Products of decays, exactly 0 rather than subnormal, which is slow.
#[inline(always)]
pub(super) fn multiply_in_place<S: Simd>(s: S, x: &mut [f32], by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(S::LANES).zip(by.chunks_exact(S::LANES)) {
        s.store(x, tile::decay(s, s.load(x), s.load(by)));
    }
}

/// `sum a b c`, where no `c` is 1.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32], c: Option<&[f32]>) -> f32 {
    let mut sum = s.splat(0.0);
    for (i, (a, b)) in a.chunks(S::LANES).zip(b.chunks(S::LANES)).enumerate() {
        let (a, b) = (s.load_tail(a), s.load_tail(b));
        let a = match c {
            Some(c) => s.mul(a, s.load_tail(&c[i * S::LANES..][..S::LANES.min(c.len() - i * S::LANES)])),
            None => a,
        };
        sum = s.mul_add(a, b, sum);
    }
    s.reduce_add(sum)
}

/// What is written under the keys of a chunk, of its values and the state at
/// the chunk's start: one panel.
pub(crate) struct Write<'a> {
    pub(crate) g: Geometry,
    pub(crate) len: usize,
    pub(crate) from: &'a Prepared<&'a [f32]>,
    /// `[columns, panel]`
    pub(crate) values: &'a mut [f32],
    /// `[rows, panel]`
    pub(crate) state: &'a [f32],
    pub(crate) width: usize,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (g, base) = (self.g, self.g.corrections());
        if g.rule != Rule::Add {
            let a = Rows::of_slice(self.from.probes, self.len, g.rows, g.stride);
            let values = &mut self.values[base * g.panel..];
            product(s, a, (self.state, g.panel), self.width, (values, g.panel), Update::Add, self.ahead);
            let n = &self.from.coefficients[base..];
            triangular(s, (n, g.columns), (values, g.panel), self.width, self.len, self.ahead);
        }
    }
}

/// The state at a chunk's end: one panel.
pub(crate) struct Advance<'a> {
    pub(crate) g: Geometry,
    pub(crate) len: usize,
    pub(crate) from: &'a Prepared<&'a [f32]>,
    /// `[columns, panel]`
    pub(crate) values: &'a [f32],
    /// `[rows, panel]`
    pub(crate) state: &'a mut [f32],
    pub(crate) width: usize,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Advance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let g = self.g;
        let a = Rows::of_slice(self.from.keys, g.rows, g.used(self.len), g.columns);
        let update = g.update(self.from.decay);
        product(s, a, (self.values, g.panel), self.width, (self.state, g.panel), update, self.ahead);
    }
}

/// What the queries of a chunk read of its values and of the state at its
/// start, as rows `[chunk, width]`: one panel.
pub(crate) struct Reads<'a> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) len: usize,
    pub(crate) from: &'a Prepared<&'a [f32]>,
    pub(crate) panel: usize,
    /// `[columns, panel]`
    pub(crate) values: &'a [f32],
    /// `[rows, panel]`
    pub(crate) state: &'a [f32],
    /// As [`Source::skip`] has it.
    pub(crate) skip: &'a [f32],
    pub(crate) out: &'a mut [f32],
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Reads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (g, len, values) = (self.g, self.len, self.values);
        let (width, col) = (g.panel_width(self.panel), self.panel * g.panel);
        let total = self.spec.read == Read::Total;
        if !total {
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let scores = &self.from.scores[first * g.columns..];
                let out = &mut self.out[first * g.width + col..];
                let a = Rows::of_slice(scores, end - first, end, g.columns);
                product(s, a, (values, g.panel), width, (out, g.width), Update::Set, self.ahead);
                if g.rule == Rule::LowRank {
                    let a = Rows::of_slice(&scores[g.chunk..], end - first, end, g.columns);
                    let values = (&values[g.chunk * g.panel..], g.panel);
                    product(s, a, values, width, (out, g.width), Update::Add, self.ahead);
                }
            }
        }
        let a = Rows::of_slice(self.from.reads, len, g.rows, g.stride);
        let update = if total { Update::Set } else { Update::Add };
        let out = (&mut self.out[col..], g.width);
        product(s, a, (self.state, g.panel), width, out, update, self.ahead);
        if !self.skip.is_empty() {
            for t in 0..len {
                let out = &mut self.out[t * g.width + col..][..width];
                for c in (0..width).step_by(S::LANES) {
                    let value = s.load(&values[t * g.panel + c..]);
                    let sum = s.mul_add(skip_at(s, self.skip, col + c), value, s.load(&out[c..]));
                    s.store(&mut out[c..], sum);
                }
            }
        }
    }
}

/// A vector of [`Source::skip`] from column `col` on; columns that round up to
/// a vector have none.
#[inline(always)]
pub(crate) fn skip_at<S: Simd>(s: S, skip: &[f32], col: usize) -> S::F {
    match skip {
        [all] => s.splat(*all),
        each => s.load_tail(each.get(col..).unwrap_or_default()),
    }
}

/// Queries that read a state which has all tokens: nothing but their scale, and
/// their own values if their outputs have these.
pub(crate) struct PrepareTotal<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) source: &'a dyn Source,
    pub(crate) at: Place,
    pub(crate) to: Prepared<&'a mut [f32]>,
    /// As [`Prepare`] has them.
    pub(crate) values: &'a mut [f32],
    pub(crate) work: &'a mut Work<'b>,
}

impl Kernel for PrepareTotal<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.work.load_queries(self.spec, &self.g, self.source, &self.at);
        let len = self.at.tokens.len();
        let n = len * self.g.stride;
        scale_row(s, &self.work.q[..n], self.spec.scale as f32, &mut self.to.reads[..n]);
        if matches!(self.spec.normaliser, Some(Normaliser::Shares { .. })) {
            self.work.load_values(self.spec, &self.g, self.source, &self.at);
            self.work.put_values(s, &self.g, len, self.values);
        }
    }
}

/// Keys that a row of outputs has seen, as far as they have not decayed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count {
    /// Before the first row.
    pub(crate) before: f64,
    /// What each row leaves of them, and adds.
    pub(crate) keep: f64,
    pub(crate) add: f64,
}

/// Writes rows of outputs, divided by their [`Normaliser`] if they have one.
pub(crate) struct Finish<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) width: usize,
    pub(crate) rows: &'a [f32],
    pub(crate) to: &'a mut AnyRowsMut<'b>,
    /// The first row of `to`.
    pub(crate) first: usize,
    pub(crate) len: usize,
    pub(crate) count: Count,
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Count { before: mut count, keep, add } = self.count;
        for (t, row) in self.rows.chunks_exact(self.width.max(1)).take(self.len).enumerate() {
            count = keep * count + add;
            let sum = row.get(self.spec.dims.value_dim).copied().unwrap_or_default();
            let whole = match self.spec.normaliser {
                None => 1.0,
                Some(Normaliser::Sum { epsilon }) => sum + epsilon,
                // The column has the share of the row's own token.
                Some(Normaliser::Shares { share }) => sum + share * (count - 1.0) as f32,
                Some(Normaliser::Bounded) => {
                    let (sum, least) = (sum.abs(), count.sqrt() as f32);
                    // A NaN stays.
                    if sum < least { least } else { sum }
                }
            };
            // No weight at all gives 0.
            let factor = if whole == 0.0 { 0.0 } else { 1.0 / whole };
            self.to.write(s, self.first + t, row, factor);
        }
    }
}
