//! Changes of scores that have a derivative, for gradients.

use super::{Alibi, Bias, Forget, Plain, RelativeTable, Score, Softcap};
use crate::input::Site;
use crate::simd::{Isa, Kernel, Simd, exp};

/// A change of scores whose derivative is known: every one of this module
/// but closures, and tuples of them.
pub trait Smooth: Score {
    /// Multiplies the gradients of what [`Score::apply`] gives by its
    /// derivative, for the scores of one query with the keys from `first` on as
    /// they were before the change. These may be changed.
    #[doc(hidden)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
    );
}

/// What only adds to a score has a derivative of 1.
macro_rules! added {
    ($($score:ty),*) => {$(
        impl Smooth for $score {
            #[inline(always)]
            fn pull<S: Simd>(&self, _: S, _: &Site, _: usize, _: usize, _: &mut [f32], _: &mut [f32]) {}
        }
    )*};
}
added!(Plain, Alibi, Forget, RelativeTable, Bias<'_>);

impl Smooth for Softcap {
    #[inline(always)]
    fn pull<S: Simd>(&self, s: S, _: &Site, _: usize, _: usize, before: &mut [f32], gradients: &mut [f32]) {
        // 1 - tanh^2 as it stands would cancel near 1: (1 - t)(1 + t) does not.
        let one = s.splat(1.0);
        for (x, g) in before.chunks_mut(S::LANES).zip(gradients.chunks_mut(S::LANES)) {
            let t = exp::tanh(s, s.div(s.load_tail(x), s.splat(self.cap)));
            let slope = s.mul(s.sub(one, t), s.add(one, t));
            s.store_tail(g, s.mul(s.load_tail(g), slope));
        }
    }
}

impl<A: Smooth, B: Smooth> Smooth for (A, B) {
    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
    ) {
        const BLOCK: usize = 64;
        for (i, (x, g)) in before.chunks_mut(BLOCK).zip(gradients.chunks_mut(BLOCK)).enumerate() {
            let first = first + i * BLOCK;
            let mut between = [0.0; BLOCK];
            let between = &mut between[..x.len()];
            between.copy_from_slice(x);
            self.0.apply(s, site, query, first, between);
            self.1.pull(s, site, query, first, between, g);
            self.0.pull(s, site, query, first, x, g);
        }
    }
}

/// [`Smooth`] for engines that know no score by type.
pub(crate) trait AnySmooth: Send + Sync {
    /// [`Smooth::pull`]
    fn pull_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
    );
}

impl<F: Smooth> AnySmooth for F {
    fn pull_row(
        &self,
        isa: Isa,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
    ) {
        isa.dispatch(Pull { score: self, site, query, first, before, gradients });
    }
}

struct Pull<'a, F> {
    score: &'a F,
    site: &'a Site,
    query: usize,
    first: usize,
    before: &'a mut [f32],
    gradients: &'a mut [f32],
}

impl<F: Smooth> Kernel for Pull<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.score.pull(s, self.site, self.query, self.first, self.before, self.gradients);
    }
}
