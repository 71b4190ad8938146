//! What sparse mechanisms keep of dense attention's weights on real inputs, and
//! how far off its outputs they are: of all of the catalogue, and at several budgets.

use attention_kernels::attention::Input;
use attention_kernels::catalog::{ENTRIES, Entry};
use attention_kernels::dense::Dense;
use attention_kernels::select::{IndexBranch, Indexed};
use attention_kernels::sparse::{
    Dsa, FlexPrefill, Hip, InfLlm, MoA, Moba, Msa, Qsa, Quest, RecycledAttention, S2Attention, TidalDecode,
    TokenSelect, TopK,
};
use attention_kernels::{Attention, Qkv, Result, Weights, Workspace};
use ndarray::{Array4, ArrayView4, s};

/// The outputs and the weights of a mechanism.
pub type Seen = (Array4<f32>, Array4<f32>);

/// A mechanism that takes a budget of keys a query.
pub type Budgeted = (&'static str, fn(usize, Qkv<'_, f32>) -> Result<Seen>);

/// They, all causal: the names are those of the cards. Where a model has learned an
/// index, the queries and the first key head are their own.
pub const MECHANISMS: [Budgeted; 14] = [
    ("top-k", |budget, x| seen(TopK::builder(budget).causal().build()?, x)),
    ("Recycled Attention", |budget, x| seen(RecycledAttention::builder(budget, 10).causal().build()?, x)),
    ("TidalDecode", |budget, x| seen(TidalDecode::builder(budget, 32).force_last().causal().build()?, x)),
    ("TokenSelect", |budget, x| {
        seen(TokenSelect::builder(budget - 20).sinks(4).local(16).chunk(1).build()?, x)
    }),
    ("Quest", |budget, x| seen(Quest::builder(budget).causal().build()?, x)),
    ("HiP", |budget, x| seen(Hip::builder(budget / 2).q_block(16).window(budget / 2).sink(4).build()?, x)),
    ("InfLLM-V2", |budget, x| {
        seen(InfLlm::builder(budget / 64).first(0).local(1).dense_below(0).build()?, x)
    }),
    ("FlexPrefill", |budget, x| {
        seen(FlexPrefill::builder().block(64).tau(0.0).least(budget).most(budget).build()?, x)
    }),
    ("DSA", |budget, x| {
        seen(Dsa::builder(budget).build()?, Indexed::new(x, IndexBranch::new(x.q, first(x.k))))
    }),
    ("QSA", |budget, x| {
        // Every fourth key stands for its group.
        let pools = first(x.k).slice_move(s![.., .., ..;4, ..]);
        seen(Qsa::builder(budget).build()?, Indexed::new(x, IndexBranch::new(x.q, pools)))
    }),
    ("MSA", |budget, x| {
        let queries = x.q.slice_move(s![.., ..1, .., ..]);
        let branch = IndexBranch::new(queries, first(x.k));
        seen(Msa::builder(budget / 64).block(64).build()?, Indexed::new(x, branch))
    }),
    ("MoBA", |budget, x| seen(Moba::builder(budget / 64).block(64).build()?, x)),
    ("S2-Attention", |budget, x| {
        let builder = S2Attention::builder(x.q.dim().1, x.k.dim().1).block(16);
        seen(builder.local(budget / 32).stride(1024 / budget).build()?, x)
    }),
    ("MoA", |budget, x| seen(MoA::streaming(3, 4, budget - 4).build()?, x)),
];

/// Entries of the family that the bound says nothing of, and why.
pub const APART: [(&str, &str); 15] = [
    ("TKSA", "its rows are channels"),
    ("Landmark", "a gate weighs blocks anew"),
    ("HCAM", "summaries weigh chunks anew"),
    ("Dynamic Mask Attention", "biases are added to scores"),
    ("CCA", "merged keys stand for several"),
    ("Combiner", "merged keys stand for several"),
    ("HyperAttention", "drawn keys stand for several"),
    ("causal HyperAttention", "drawn keys stand for several"),
    ("Routing Transformer", "a mean over clusters is no softmax, and rows in none are 0"),
    ("SEA", "the sum of all values by its estimate is added"),
    ("causal SEA", "the mean of all values is added"),
    ("LongHeads", "chunks are at other positions"),
    ("NSA", "a gated sum of three softmaxes"),
    ("CSA", "pools are keys, and values too"),
    ("HCA", "pools are keys, and values too"),
];

fn seen<X: Input<Out = f32> + Copy, M: Attention<X> + Weights<X>>(mechanism: M, x: X) -> Result<Seen> {
    Ok((mechanism.forward(x)?, mechanism.weights(x)?))
}

fn first(k: ArrayView4<'_, f32>) -> ArrayView4<'_, f32> {
    k.slice_move(s![.., ..1, .., ..])
}

/// The budgets.
pub const BUDGETS: [usize; 3] = [64, 128, 256];

/// What is kept.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// The mean share of a row's dense weights that is kept.
    pub mass: f64,
    /// The root mean square of the errors over that of dense outputs.
    pub error: f64,
    /// The largest error of a row as a share of `2 (1 - mass) max|v|`.
    #[allow(dead_code)]
    pub of_bound: f64,
}

impl Kept {
    /// Of what is seen, and of dense attention.
    fn of((got, some): &Seen, (want, all): &Seen, v: ArrayView4<'_, f32>) -> Self {
        let largest = v.iter().fold(0f32, |most, v| most.max(v.abs()));
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
        Self { mass: mass / count, error: (square / norm).sqrt(), of_bound }
    }
}

/// A mechanism on an input, at each budget.
///
/// # Errors
/// What it refuses.
pub fn curve(build: Budgeted, x: Qkv<'_, f32>) -> Result<[Kept; 3]> {
    let dense = seen(Dense::builder().causal().build()?, x)?;
    let [a, b, c] = BUDGETS.map(|budget| Ok(Kept::of(&build.1(budget, x)?, &dense, x.v)));
    Ok([a?, b?, c?])
}

/// The entries that the bound is for.
pub fn subjects() -> impl Iterator<Item = &'static Entry> {
    let apart = |entry: &&Entry| APART.iter().any(|(name, _)| *name == entry.card.name);
    ENTRIES.iter().filter(move |entry| entry.card.family == "sparse" && !apart(entry))
}

/// Dense attention on an input: of all keys, and causal.
///
/// # Errors
/// What it refuses.
pub fn dense(x: Qkv<'_, f32>) -> Result<[Seen; 2]> {
    Ok([seen(Dense::builder().build()?, x)?, seen(Dense::builder().causal().build()?, x)?])
}

/// An entry on an input, as the catalogue has it, beside dense attention: causal where no
/// query sees a later key.
///
/// # Errors
/// What it refuses.
pub fn of_entry(entry: &Entry, x: Qkv<'_, f32>, dense: &[Seen; 2]) -> Result<Kept> {
    let trial = entry.trial(x, None, 7)?;
    let mut out = Array4::zeros(dense[0].0.dim());
    trial.forward_into(out.view_mut(), &mut Workspace::new())?;
    let weights = trial.weights()?;
    let causal = weights.indexed_iter().all(|((_, _, i, j), &weight)| j <= i || weight == 0.0);
    Ok(Kept::of(&(out, weights), &dense[usize::from(causal)], x.v))
}
