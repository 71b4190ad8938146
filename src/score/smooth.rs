//! Changes of scores that have a derivative, for gradients.

use super::{Alibi, Bias, Forget, Plain, RelativeTable, Score, Softcap, ends_of};
use crate::element::Element;
use crate::input::Site;
use crate::simd::{Isa, Kernel, Simd, exp};

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

    /// Multiplies the gradients of what [`Score::apply`] gives by its
    /// derivative, for the scores of one query with the keys from `first` on as
    /// they were before the change. These may be changed. Adds to the gradients
    /// of the entries of the table for this head, unless `table` is empty.
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
        table: &mut [f32],
    );
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
                _: &mut [f32],
            ) {
            }
        }
    )*};
}
added!([] Plain, [] Alibi, [] Forget, [T] Bias<'_, T>);

/// Adds gradients to entries, one for one.
#[inline(always)]
pub(crate) fn add_each(entries: &mut [f32], gradients: &[f32]) {
    entries.iter_mut().zip(gradients).for_each(|(to, x)| *to += x);
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
        _: S,
        site: &Site,
        query: usize,
        first: usize,
        _: &mut [f32],
        gradients: &mut [f32],
        table: &mut [f32],
    ) {
        let column = self.column(site, query, first);
        let [start, end] = ends_of(column, table.len(), gradients.len());
        let [.., last] = table else { return };
        *last += gradients[end..].iter().sum::<f32>();
        table[0] += gradients[..start].iter().sum::<f32>();
        add_each(table.get_mut(column.max(0) as usize..).unwrap_or_default(), &gradients[start..end]);
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
        _: &mut [f32],
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

/// Of two tables, the gradient is that of the first.
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

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        table: &mut [f32],
    ) {
        let of_first = self.0.table()[1] > 0;
        const BLOCK: usize = 64;
        for (i, (x, g)) in before.chunks_mut(BLOCK).zip(gradients.chunks_mut(BLOCK)).enumerate() {
            let first = first + i * BLOCK;
            let mut between = [0.0; BLOCK];
            let between = &mut between[..x.len()];
            between.copy_from_slice(x);
            self.0.apply(s, site, query, first, between);
            let [a, b]: [&mut [f32]; 2] =
                if of_first { [&mut *table, &mut []] } else { [&mut [], &mut *table] };
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
        table: &mut [f32],
    );
}

impl<F: Smooth> AnySmooth for F {
    fn table_of(&self) -> [usize; 2] {
        self.table()
    }

    fn entry_of(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(usize, f64)> {
        self.define_entry(site, query, key, score)
    }

    fn pull_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        table: &mut [f32],
    ) {
        isa.dispatch(Pull { score: self, site, query, first, before, gradients, table });
    }
}

struct Pull<'a, F> {
    score: &'a F,
    site: &'a Site,
    query: usize,
    first: usize,
    before: &'a mut [f32],
    gradients: &'a mut [f32],
    table: &'a mut [f32],
}

impl<F: Smooth> Kernel for Pull<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.score.pull(s, self.site, self.query, self.first, self.before, self.gradients, self.table);
    }
}
