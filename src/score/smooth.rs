//! Changes of scores that have a derivative, for gradients.

use std::ops::Range;

use super::{Alibi, Bias, Forget, Plain, RelativeTable, Score, Softcap, ends_of};
use crate::element::Element;
use crate::input::Site;
use crate::simd::{Isa, Kernel, Simd, exp};

/// Where gradients of the scores of one query with some keys are added up. Each is
/// empty where it is not wanted.
#[doc(hidden)]
#[derive(Debug)]
pub struct Sums<'a> {
    /// Of the entries of the table, for this head.
    pub table: &'a mut [f32],
    /// Of the numbers that this query has.
    pub query: &'a mut [f32],
    /// Of the number that each of the keys has.
    pub keys: &'a mut [f32],
}

impl Sums<'_> {
    /// The same for the keys from number `key` on.
    fn from(&mut self, key: usize) -> Sums<'_> {
        let keys = self.keys.get_mut(key..).unwrap_or_default();
        Sums { table: self.table, query: self.query, keys }
    }
}

/// A change of scores whose derivative is known: every one of this module
/// but closures, and tuples of them.
pub trait Smooth: Score {
    /// Heads and entries of the table that it adds from, whose gradient can be
    /// had: none unless it has one.
    #[doc(hidden)]
    fn table(&self) -> [usize; 2] {
        [0, 0]
    }

    /// The entry that is added to the score of a pair, and how fast the changed
    /// score moves with it: the definition.
    #[doc(hidden)]
    fn define_entry(&self, _: &Site, _: usize, _: usize, _: f64) -> Option<(usize, f64)> {
        None
    }

    /// How many numbers each query has of which scores have some added, and how
    /// many sums [`meet`](Self::meet) makes of its weights.
    #[doc(hidden)]
    fn of_queries(&self) -> [usize; 2] {
        [0, 0]
    }

    /// Whether each key has a gate, whose logarithm is added for the queries after
    /// it: gradients are then summed for each query, as its one number, and for
    /// each key, and [`gates`](Self::gates) makes theirs of these.
    #[doc(hidden)]
    fn has_gates(&self) -> bool {
        false
    }

    /// The keys whose log gates are added to the score of a pair, and how fast the
    /// changed score moves with them: the definition.
    #[doc(hidden)]
    fn define_gates(&self, _: &Site, _: usize, _: usize, _: f64) -> Option<(Range<usize>, f64)> {
        None
    }

    /// Gradients of the log gates of a head's keys, from those that were summed for
    /// each query and for each key.
    #[doc(hidden)]
    fn gates(&self, _: &Site, _queries: &[f32], _keys: &[f32], _to: &mut [f32]) {}

    /// Multiplies the gradients of what [`Score::apply`] gives by its
    /// derivative, for the scores of one query with the keys from `first` on as
    /// they were before the change. These may be changed. Adds up `to`.
    #[doc(hidden)]
    #[expect(clippy::too_many_arguments, reason = "a row of three arrays")]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    );

    /// Adds to the gradients of the weights of one query with the keys from `first`
    /// on what they meet besides values, and adds up the weights, unless `sums` is
    /// empty.
    #[doc(hidden)]
    #[expect(clippy::too_many_arguments, reason = "a row of three arrays")]
    #[inline(always)]
    fn meet<S: Simd>(
        &self,
        _: S,
        _: &Site,
        _query: usize,
        _first: usize,
        _weights: &[f32],
        _gradients: &mut [f32],
        _sums: &mut [f32],
    ) {
    }
}

/// What only adds to a score has a derivative of 1.
macro_rules! added {
    ($([$($T:ident)?] $score:ty),*) => {$(
        impl$(<$T: Element>)? Smooth for $score {
            #[inline(always)]
            fn pull<S: Simd>(
                &self,
                _: S,
                _: &Site,
                _: usize,
                _: usize,
                _: &mut [f32],
                _: &mut [f32],
                _: Sums<'_>,
            ) {
            }
        }
    )*};
}
added!([] Plain, [] Alibi, [T] Bias<'_, T>);

/// Adds gradients to entries, one for one.
#[inline(always)]
pub(crate) fn add_each(entries: &mut [f32], gradients: &[f32]) {
    entries.iter_mut().zip(gradients).for_each(|(to, x)| *to += x);
}

/// The sum of gradients.
#[inline(always)]
pub(crate) fn total<S: Simd>(s: S, gradients: &[f32]) -> f32 {
    let add = |sum, x: &[f32]| s.add(sum, s.load_tail(x));
    s.reduce_add(gradients.chunks(S::LANES).fold(s.splat(0.0), add))
}

/// Adds gradients, times `factor`, to the numbers of distances that scores have had
/// added by [`shift_by_distance`](super::shift_by_distance).
#[inline(always)]
pub(crate) fn add_by_distance<S: Simd>(s: S, row: &mut [f32], gradients: &[f32], column: isize, factor: f32) {
    let [start, end] = ends_of(column, row.len(), gradients.len());
    let [.., last] = row else { return };
    *last += factor * total(s, &gradients[end..]);
    row[0] += factor * total(s, &gradients[..start]);
    let middle = row.get_mut(column.max(0) as usize..).unwrap_or_default();
    middle.iter_mut().zip(&gradients[start..end]).for_each(|(to, x)| *to += factor * x);
}

impl Smooth for RelativeTable {
    fn table(&self) -> [usize; 2] {
        [self.heads, 2 * self.max_distance + 1]
    }

    fn define_entry(&self, site: &Site, query: usize, key: usize, _: f64) -> Option<(usize, f64)> {
        let w = self.max_distance as isize;
        let distance = (key as isize).saturating_sub(site.position(self.q_start, query));
        Some(((distance.clamp(-w, w) + w) as usize, 1.0))
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        _: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        add_by_distance(s, to.table, gradients, self.column(site, query, first), 1.0);
    }
}

impl Smooth for Forget {
    fn of_queries(&self) -> [usize; 2] {
        [1, 0]
    }

    fn has_gates(&self) -> bool {
        true
    }

    fn define_gates(&self, site: &Site, query: usize, key: usize, _: f64) -> Option<(Range<usize>, f64)> {
        Some((key + 1..self.token(site, query)? + 1, 1.0))
    }

    /// `dln f_t = sum_(j < t <= i) ds_ij`: what queries at `t` and later have in sum,
    /// less what keys at `t` and later have.
    fn gates(&self, site: &Site, queries: &[f32], keys: &[f32], to: &mut [f32]) {
        let (mut total, mut query) = (0.0, queries.len());
        for t in (0..to.len()).rev() {
            while query > 0 && self.token(site, query - 1).is_some_and(|at| at >= t) {
                query -= 1;
                total += f64::from(queries[query]);
            }
            total -= f64::from(keys[t]);
            if self.is_first(site, t) {
                // No query at this token or later sees a key before it.
                total = 0.0;
            }
            to[t] = total as f32;
        }
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        _: &Site,
        _: usize,
        _: usize,
        _: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        if let [sum, ..] = to.query {
            *sum += total(s, gradients);
        }
        add_each(to.keys, gradients);
    }
}

impl Smooth for Softcap {
    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        _: &Site,
        _: usize,
        _: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        _: Sums<'_>,
    ) {
        // 1 - tanh^2 as it stands would cancel near 1: (1 - t)(1 + t) does not.
        let one = s.splat(1.0);
        for (x, g) in before.chunks_mut(S::LANES).zip(gradients.chunks_mut(S::LANES)) {
            let t = exp::tanh(s, s.div(s.load_tail(x), s.splat(self.cap)));
            let slope = s.mul(s.sub(one, t), s.add(one, t));
            s.store_tail(g, s.mul(s.load_tail(g), slope));
        }
    }
}

/// Of two tables, or two changes with gates, the gradient is that of the first.
impl<A: Smooth, B: Smooth> Smooth for (A, B) {
    fn table(&self) -> [usize; 2] {
        if self.0.table()[1] > 0 { self.0.table() } else { self.1.table() }
    }

    fn define_entry(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(usize, f64)> {
        let between = self.0.define(site, query, key, score);
        match self.0.define_entry(site, query, key, score) {
            Some((entry, rate)) => {
                Some((entry, rate * slope(|s| self.1.define(site, query, key, s), between)))
            }
            None => self.1.define_entry(site, query, key, between),
        }
    }

    fn of_queries(&self) -> [usize; 2] {
        if self.0.has_gates() { self.0.of_queries() } else { self.1.of_queries() }
    }

    fn has_gates(&self) -> bool {
        self.0.has_gates() || self.1.has_gates()
    }

    fn define_gates(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(Range<usize>, f64)> {
        let between = self.0.define(site, query, key, score);
        match self.0.define_gates(site, query, key, score) {
            Some((gates, rate)) => {
                Some((gates, rate * slope(|s| self.1.define(site, query, key, s), between)))
            }
            None => self.1.define_gates(site, query, key, between),
        }
    }

    fn gates(&self, site: &Site, queries: &[f32], keys: &[f32], to: &mut [f32]) {
        if self.0.has_gates() {
            self.0.gates(site, queries, keys, to);
        } else {
            self.1.gates(site, queries, keys, to);
        }
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        mut to: Sums<'_>,
    ) {
        let (of_first, gates_first) = (self.0.table()[1] > 0, self.0.has_gates());
        const BLOCK: usize = 64;
        for (i, (x, g)) in before.chunks_mut(BLOCK).zip(gradients.chunks_mut(BLOCK)).enumerate() {
            let first = first + i * BLOCK;
            let mut between = [0.0; BLOCK];
            let between = &mut between[..x.len()];
            between.copy_from_slice(x);
            self.0.apply(s, site, query, first, between);
            let Sums { table, query: own, keys } = to.from(i * BLOCK);
            let mut a = Sums { table: &mut [], query: &mut [], keys: &mut [] };
            let mut b = Sums { table: &mut [], query: &mut [], keys: &mut [] };
            *(if of_first { &mut a.table } else { &mut b.table }) = table;
            let gates = if gates_first { &mut a } else { &mut b };
            (gates.query, gates.keys) = (own, keys);
            self.1.pull(s, site, query, first, between, g, b);
            self.0.pull(s, site, query, first, x, g, a);
        }
    }
}

/// How fast a change of scores moves at a score, by a difference that is as
/// exact as the square root of `f64` allows; additive changes give 1 exactly
/// enough.
pub(crate) fn slope(define: impl Fn(f64) -> f64, score: f64) -> f64 {
    let step = 1e-5 * score.abs().max(1.0);
    (define(score + step) - define(score - step)) / (2.0 * step)
}

/// [`Smooth`] for engines that know no score by type.
pub(crate) trait AnySmooth: Send + Sync {
    /// [`Smooth::table`]
    fn table_of(&self) -> [usize; 2];

    /// [`Smooth::define_entry`]
    fn entry_of(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(usize, f64)>;

    /// [`Smooth::of_queries`]
    fn of_each_query(&self) -> [usize; 2];

    /// [`Smooth::has_gates`]
    fn of_each_key(&self) -> bool;

    /// [`Smooth::define_gates`]
    fn gates_of(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(Range<usize>, f64)>;

    /// [`Smooth::gates`]
    fn gate_gradients(&self, site: &Site, queries: &[f32], keys: &[f32], to: &mut [f32]);

    /// [`Smooth::pull`]
    #[expect(clippy::too_many_arguments, reason = "a row of three arrays")]
    fn pull_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    );

    /// [`Smooth::meet`]
    #[expect(clippy::too_many_arguments, reason = "a row of three arrays")]
    fn meet_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        weights: &[f32],
        gradients: &mut [f32],
        sums: &mut [f32],
    );
}

impl<F: Smooth> AnySmooth for F {
    fn table_of(&self) -> [usize; 2] {
        self.table()
    }

    fn entry_of(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(usize, f64)> {
        self.define_entry(site, query, key, score)
    }

    fn of_each_query(&self) -> [usize; 2] {
        self.of_queries()
    }

    fn of_each_key(&self) -> bool {
        self.has_gates()
    }

    fn gates_of(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(Range<usize>, f64)> {
        self.define_gates(site, query, key, score)
    }

    fn gate_gradients(&self, site: &Site, queries: &[f32], keys: &[f32], to: &mut [f32]) {
        self.gates(site, queries, keys, to);
    }

    fn pull_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        isa.dispatch(Pull { score: self, site, query, first, before, gradients, to });
    }

    fn meet_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        weights: &[f32],
        gradients: &mut [f32],
        sums: &mut [f32],
    ) {
        isa.dispatch(Meet { score: self, site, query, first, weights, gradients, sums });
    }
}

struct Pull<'a, F> {
    score: &'a F,
    site: &'a Site,
    query: usize,
    first: usize,
    before: &'a mut [f32],
    gradients: &'a mut [f32],
    to: Sums<'a>,
}

impl<F: Smooth> Kernel for Pull<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.score.pull(s, self.site, self.query, self.first, self.before, self.gradients, self.to);
    }
}

struct Meet<'a, F> {
    score: &'a F,
    site: &'a Site,
    query: usize,
    first: usize,
    weights: &'a [f32],
    gradients: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<F: Smooth> Kernel for Meet<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.score.meet(s, self.site, self.query, self.first, self.weights, self.gradients, self.sums);
    }
}
