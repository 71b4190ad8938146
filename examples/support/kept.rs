//! What sparse mechanisms keep of dense attention's weights on real inputs, and
//! how far off its outputs they are, at several budgets.

use attention_kernels::dense::Dense;
use attention_kernels::sparse::{MoA, Moba, Quest, TopK};
use attention_kernels::{Qkv, Result, Weights};

/// A mechanism that takes a budget of keys a query.
pub type Budgeted = (&'static str, fn(usize) -> Result<Box<dyn for<'a> Weights<Qkv<'a, f32>>>>);

/// They, all causal: the names are those of the cards.
pub const MECHANISMS: [Budgeted; 4] = [
    ("top-k", |budget| Ok(Box::new(TopK::builder(budget).causal().build()?))),
    ("Quest", |budget| Ok(Box::new(Quest::builder(budget).causal().build()?))),
    ("MoBA", |budget| Ok(Box::new(Moba::builder(budget / 64).block(64).build()?))),
    ("MoA", |budget| Ok(Box::new(MoA::streaming(3, 4, budget - 4).build()?))),
];

/// The budgets.
pub const BUDGETS: [usize; 3] = [64, 128, 256];

/// What comes of a budget.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    pub budget: usize,
    /// The mean share of a row's dense weights that is kept.
    pub mass: f64,
    /// The root mean square of the errors over that of dense outputs.
    pub error: f64,
    /// The largest error of a row as a share of `2 (1 - mass) max|v|`.
    #[allow(dead_code)]
    pub of_bound: f64,
}

/// A mechanism on an input, at each budget.
///
/// # Errors
/// What it refuses.
pub fn curve(build: Budgeted, x: Qkv<'_, f32>) -> Result<Vec<Kept>> {
    use attention_kernels::Attention;
    let dense = Dense::builder().causal().build()?;
    let (want, all) = (dense.forward(x)?, dense.weights(x)?);
    let largest = x.v.iter().fold(0f32, |most, v| most.max(v.abs()));
    let at = |budget| {
        let sparse = build.1(budget)?;
        let (got, some) = (sparse.forward(x)?, sparse.weights(x)?);
        let (mut mass, mut square, mut of_bound) = (0.0, 0.0, 0f64);
        let rows = got.rows().into_iter().zip(want.rows());
        let weights = some.rows().into_iter().zip(all.rows());
        for ((got, want), (some, all)) in rows.zip(weights) {
            let pairs = some.iter().zip(all).filter(|(some, _)| **some > 0.0);
            let kept: f64 = pairs.map(|(_, &all)| f64::from(all)).sum();
            let errors = got.iter().zip(want).map(|(a, b)| f64::from((a - b).abs()));
            let most = errors.clone().fold(0.0, f64::max);
            square += errors.map(|error| error * error).sum::<f64>();
            mass += kept;
            // Rounding, beside the bound.
            of_bound =
                of_bound.max((most - 2e-5).max(0.0) / (2.0 * (1.0 - kept).max(1e-9) * f64::from(largest)));
        }
        let norm: f64 = want.iter().map(|&x| f64::from(x).powi(2)).sum();
        let count = some.rows().into_iter().count().max(1) as f64;
        Ok(Kept { budget, mass: mass / count, error: (square / norm).sqrt(), of_bound })
    };
    BUDGETS.into_iter().map(at).collect()
}
