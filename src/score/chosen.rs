//! A change of scores whose type is chosen at run time.

use std::fmt;
use std::sync::Arc;

use super::{AnyScore, Score};
use crate::error::Result;
use crate::input::{Dims, Site};
use crate::simd::Simd;

/// A change of scores whose type is chosen at run time: for configurations
/// that are read from a file, and for generic code that must not know it.
///
/// A row of scores costs one virtual call more than with the type itself.
///
/// ```
/// use attention_kernels::dense::Dense;
/// use attention_kernels::score::{Alibi, Chosen, Plain, Softcap};
///
/// let cap: Option<f32> = Some(50.0); // from a model's configuration
/// let score = match cap {
///     Some(cap) => Chosen::new(Softcap::new(cap)?),
///     None => Chosen::new(Alibi::new(8)),
/// };
/// let dense: Dense<_, Chosen> = Dense::builder().causal().score(score).build()?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone)]
pub struct Chosen<'a>(Arc<dyn Erased + 'a>);

impl<'a> Chosen<'a> {
    /// Any change of scores.
    pub fn new(score: impl Score + 'a) -> Self {
        Self(Arc::new(score))
    }
}

impl fmt::Debug for Chosen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Chosen").finish_non_exhaustive()
    }
}

/// [`Score`] behind a pointer.
trait Erased: AnyScore {
    fn define_pair(&self, site: &Site, query: usize, key: usize, score: f64) -> f64;
    fn check_dims(&self, dims: &Dims) -> Result<()>;
}

impl<F: Score> Erased for F {
    fn define_pair(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.define(site, query, key, score)
    }
    fn check_dims(&self, dims: &Dims) -> Result<()> {
        self.check(dims)
    }
}

impl Score for Chosen<'_> {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.0.define_pair(site, query, key, score)
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        self.0.apply_row(S::ISA, site, query, first, scores, None);
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check_dims(dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::input::Qkv;
    use crate::score::{Alibi, Softcap};
    use ndarray::Array4;

    #[test]
    fn the_bits_are_those_of_the_type() {
        let x = Array4::<f32>::from_shape_fn((1, 2, 90, 16), |(_, h, i, c)| ((h + 3 * i * c) as f32).sin());
        let x = Qkv::new(x.view(), x.view(), x.view());
        let score = || Softcap::new(0.5).unwrap().then(Alibi::new(2));
        let known = Dense::builder().causal().score(score()).build().unwrap();
        let chosen = Dense::builder().causal().score(Chosen::new(score())).build().unwrap();
        assert_eq!(known.forward(x).unwrap(), chosen.forward(x).unwrap());
        assert_eq!(known.reference(x).unwrap(), chosen.reference(x).unwrap());
        let wrong = Dense::builder().score(Chosen::new(Alibi::new(3))).build().unwrap();
        assert!(wrong.forward(x).unwrap_err().to_string().starts_with("slopes: "));
    }
}
