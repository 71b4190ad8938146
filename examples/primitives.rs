//! What adapters, editors, probes and attribution methods do with attention, one
//! short function each, on the queries, keys and values of a language model.
//!
//! ```text
//! cargo run --release --example primitives
//! ```
//!
//! Each line says what was done and holds it against another way to the same
//! numbers; the program fails where the two differ.

use attention_kernels::dense::{
    Dense, Guidance, KeyMask, Paint, Sets, Vhr, WithKeyMask, WithTags, ZeroTuning,
};
use attention_kernels::merge::merge;
use attention_kernels::score::Bias;
use attention_kernels::{Attention, Mergeable, Qkv, Result, ScoreGradients, Weights};
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView4, Axis, Zip, concatenate, s, stack};

#[path = "support/fixture.rs"]
mod fixture;

/// Queries `[1, heads, len, dim]`, keys and values of a layer.
struct Layer {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
}

impl Layer {
    fn new(n: usize) -> Self {
        let (q, k, v) = fixture::layer(n);
        let wide = |x: Array4<half::f16>| x.mapv(f32::from);
        Self { q: wide(q), k: wide(k), v: wide(v) }
    }

    fn x(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

/// A line of the report; whether it holds.
fn report(name: &str, what: &str, off: f32, within: f32) -> bool {
    let holds = off <= within;
    let verdict = if holds { "" } else { "  <- more than it may be" };
    println!("{name:<24} {what:<76} {off:.1e}{verdict}");
    holds
}

/// The largest difference.
fn apart(a: ArrayView4<'_, f32>, b: ArrayView4<'_, f32>) -> f32 {
    Zip::from(a).and(b).fold(0.0, |worst: f32, a, b| worst.max((a - b).abs()))
}

/// `weights . values`, the long way.
fn weighted(weights: &Array4<f32>, v: &Array4<f32>) -> Array4<f32> {
    let (_, heads, len, _) = weights.dim();
    let mut out = Array4::zeros((1, heads, len, v.dim().3));
    for h in 0..heads {
        let v: ArrayView2<'_, f32> = v.slice(s![0, h * v.dim().1 / heads, .., ..]);
        let weights: ArrayView2<'_, f32> = weights.slice(s![0, h, .., ..]);
        out.slice_mut(s![0, h, .., ..]).assign(&weights.dot(&v));
    }
    out
}

/// A reference image beside the own one, a prompt beside a text: more keys and
/// values in the same softmax, without joining arrays (AM-Adapter, VideoBooth).
fn more_keys(own: &Layer, other: &Layer) -> Result<bool> {
    let dense = Dense::builder().build()?;
    let (out, lse) = dense.forward_with_lse(own.x())?;
    let beside = Qkv::new(own.q.view(), other.k.view(), other.v.view());
    let (more, more_lse) = dense.forward_with_lse(beside)?;
    let (merged, _) = merge((out.view(), lse.view()), (more.view(), more_lse.view()))?;
    let join = |a: &Array4<f32>, b: &Array4<f32>| concatenate![Axis(2), *a, *b];
    let (k, v) = (join(&own.k, &other.k), join(&own.v, &other.v));
    let joined = dense.forward(Qkv::new(own.q.view(), k.view(), v.view()))?;
    let off = apart(merged.view(), joined.view());
    Ok(report(
        "extra keys and values",
        "two parts merged by their LSE, against keys joined into one array",
        off,
        1e-5,
    ))
}

/// Keys and values between those of two sources (DiffUHaul).
fn between(own: &Layer, other: &Layer) -> Result<bool> {
    let mix = |a: &Array4<f32>, b: &Array4<f32>, t: f32| (1.0 - t) * a + t * b;
    let dense = Dense::builder().causal().build()?;
    let at = |t: f32| {
        let (k, v) = (mix(&own.k, &other.k, t), mix(&own.v, &other.v, t));
        dense.forward(Qkv::new(own.q.view(), k.view(), v.view()))
    };
    let off = apart(at(0.0)?.view(), dense.forward(own.x())?.view());
    let far = apart(at(0.5)?.view(), at(0.0)?.view());
    let what = format!("none of the other source changes nothing, half of it up to {far:.2}");
    Ok(report("interpolated keys", &what, off, 0.0))
}

/// Several sets of values under the same weights (structured guidance): their mean
/// under one softmax.
fn many_values(own: &Layer, other: &Layer) -> Result<bool> {
    let dense = Dense::builder().build()?;
    let of = |v: ArrayView4<'_, f32>| dense.forward(Qkv::new(own.q.view(), own.k.view(), v));
    let mean = (of(own.v.view())? + of(other.v.view())?) / 2.0;
    let values = stack![Axis(0), own.v, other.v];
    let sets = Sets { q: own.q.view(), keys: own.k.view().insert_axis(Axis(0)), values: values.view() };
    let once = Guidance::builder().build()?.forward(sets)?;
    Ok(report(
        "averaged values",
        "the mean of two outputs, against one call over mean values",
        apart(mean.view(), once.view()),
        1e-5,
    ))
}

/// Each head by itself: read, made louder, switched off, replaced by that of
/// another run (VHR, ablation, activation patching).
fn heads(own: &Layer, other: &Layer) -> Result<bool> {
    let dense = Dense::builder().causal().build()?;
    let out = dense.forward(own.x())?;
    let norms: Vec<f32> = out.axis_iter(Axis(1)).map(|head| head.mapv(|x| x * x).sum().sqrt()).collect();
    let mut changed = Vhr::builder(vec![2.0, 1.0, 0.0]).build()?.forward(own.x())?;
    let patch = dense.forward(Qkv::new(other.q.view(), own.k.view(), own.v.view()))?;
    changed.slice_mut(s![.., 1, .., ..]).assign(&patch.slice(s![.., 1, .., ..]));
    // The same from heads that are computed alone.
    let alone = |q: &Array4<f32>, h: usize, gain: f32| -> Result<Array4<f32>> {
        let v = &own.v * gain;
        dense.forward(Qkv::new(q.slice(s![.., h..=h, .., ..]), own.k.view(), v.view()))
    };
    let parts = [alone(&own.q, 0, 2.0)?, alone(&other.q, 1, 1.0)?, alone(&own.q, 2, 0.0)?];
    let want = concatenate![Axis(1), parts[0], parts[1], parts[2]];
    let what = format!("norms {:.0?}; one doubled, one patched, one off", norms);
    Ok(report("heads", &what, apart(changed.view(), want.view()), 1e-5))
}

/// All weights, the largest of each query, and what each key receives; how much
/// of it the first token does is the sink metric.
fn maps(own: &Layer) -> Result<bool> {
    let dense = Dense::builder().causal().build()?;
    let weights = dense.weights(own.x())?;
    let off = apart(weighted(&weights, &own.v).view(), dense.forward(own.x())?.view());
    let received = dense.key_weights(own.x())?;
    let len = weights.dim().2 as f32;
    let sinks: Vec<f32> = received.slice(s![0, .., 0]).iter().map(|x| x / len).collect();
    let top = dense.top_weights(own.x(), 4)?;
    let kept = top.weights.sum_axis(Axis(3)).mean().unwrap_or(0.0);
    let what = format!("weights times values; the first key gets {sinks:.2?}, the best 4 keys {kept:.2}");
    Ok(report("weights", &what, off, 1e-4))
}

/// The weight of the first token times gamma, renormalised: `ln gamma` is added to
/// its score (ZeroTuning).
fn tuned(own: &Layer) -> Result<bool> {
    let gammas = [0.5f32, 1.0, 2.0];
    let out = ZeroTuning::builder(gammas.to_vec()).build()?.forward(own.x())?;
    let mut weights = Dense::builder().causal().build()?.weights(own.x())?;
    for (mut head, gamma) in weights.axis_iter_mut(Axis(1)).zip(gammas) {
        for mut row in head.rows_mut() {
            row[0] *= gamma;
            let sum = row.sum();
            row /= sum;
        }
    }
    let off = apart(out.view(), weighted(&weights, &own.v).view());
    Ok(report(
        "first token tuned",
        "a bias of its score, against weights changed and normalised again",
        off,
        1e-4,
    ))
}

/// Some keys louder for the last query (PAINT): `s + alpha abs(s)`.
fn emphasised(own: &Layer) -> Result<bool> {
    let len = own.q.dim().2;
    let tags = Array2::from_shape_fn((1, len), |(_, key)| u8::from((100..140).contains(&key)));
    let paint = Paint::builder().alpha(vec![0.5]).build()?;
    let before = Dense::builder().causal().build()?.weights(own.x())?;
    let after = paint.weights(WithTags { x: own.x(), tags: tags.view() })?;
    let share = |weights: &Array4<f32>| weights.slice(s![0, .., len - 1, 100..140]).sum() / 3.0;
    let off = apart(before.slice(s![.., .., ..len - 1, ..]), after.slice(s![.., .., ..len - 1, ..]));
    let what = format!(
        "40 keys get {:.3} for {:.3} of the last query, no other query changes",
        share(&after),
        share(&before)
    );
    let louder = share(&after) > share(&before);
    Ok(report("emphasis", &what, if louder { off } else { f32::INFINITY }, 0.0))
}

/// A region removed (DesignEdit): its keys are zero and still take part, or they
/// are hidden.
fn removed(own: &Layer) -> Result<bool> {
    let len = own.k.dim().2;
    let mask = Array2::from_shape_fn((1, len), |(_, key)| f32::from((200..300).contains(&key)));
    let x = WithKeyMask { x: own.x(), mask: mask.view() };
    let scores = KeyMask::builder().build()?.scores(x)?;
    let weights = KeyMask::builder().exclude().build()?.weights(x)?;
    let most = |x: &Array4<f32>| x.slice(s![.., .., .., 200..300]).fold(0.0, |a: f32, b| a.max(b.abs()));
    let (zero, left) = (most(&scores), most(&weights));
    Ok(report(
        "a region removed",
        "scores of zero keys are 0, weights of hidden ones are 0",
        left.max(zero),
        0.0,
    ))
}

/// Which scores a loss hangs on (Grad-SAM), and a step along them (adversarial
/// training): the loss changes by as much as the gradient says.
fn gradients(own: &Layer) -> Result<bool> {
    let dense = Dense::builder().causal().build()?;
    let len = own.q.dim().2;
    // The loss: the sum of what the last query of the first head gets.
    let mut d_out = Array4::zeros(own.q.dim());
    d_out.slice_mut(s![0, 0, len - 1, ..]).fill(1.0);
    let pull = dense.score_gradients(own.x(), d_out.view())?;
    let relevance = pull.mapv(|x| x.max(0.0)) * dense.weights(own.x())?;
    let best = relevance
        .slice(s![0, 0, len - 1, ..])
        .iter()
        .enumerate()
        .fold((0, 0.0), |best, (j, &x)| if x > best.1 { (j, x) } else { best });
    let norm = pull.mapv(|x| x * x).sum().sqrt();
    let step = 0.01;
    let bias = &pull * (step / norm);
    let moved = Dense::builder().causal().score(Bias::new(bias.view())).build()?;
    let loss = |out: &Array4<f32>| (out * &d_out).sum();
    let gained = loss(&moved.forward(own.x())?) - loss(&dense.forward(own.x())?);
    let what = format!("the last query hangs on key {} most; a step of {step} gains {gained:.2e}", best.0);
    Ok(report("score gradients", &what, (gained / (step * norm) - 1.0).abs(), 0.05))
}

/// How values relate to each other (MiniLM): attention whose queries and keys are
/// the values.
fn relations(own: &Layer) -> Result<bool> {
    let dense = Dense::builder().build()?;
    let relation = dense.weights(Qkv::new(own.v.view(), own.v.view(), own.v.view()))?;
    let sums: Array3<f32> = relation.sum_axis(Axis(3));
    let off = sums.iter().fold(0.0, |worst: f32, sum| worst.max((sum - 1.0).abs()));
    let own_share = (0..sums.len()).map(|i| relation[[0, 0, i, i]]).sum::<f32>() / sums.len() as f32;
    let what = format!("rows sum to 1; a token keeps {own_share:.2} for itself");
    Ok(report("value relations", &what, off, 1e-4))
}

fn main() -> Result<()> {
    let (own, other) = (Layer::new(14), Layer::new(27));
    println!("{:<24} {:<76} off by", "primitive", "what");
    let holds = [
        more_keys(&own, &other)?,
        between(&own, &other)?,
        many_values(&own, &other)?,
        heads(&own, &other)?,
        maps(&own)?,
        tuned(&own)?,
        emphasised(&own)?,
        removed(&own)?,
        gradients(&own)?,
        relations(&own)?,
    ];
    assert!(holds.iter().all(|&holds| holds), "a primitive is off by more than it may be");
    Ok(())
}
