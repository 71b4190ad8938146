//! Flow-Attention: linear attention in which what flows out of each key and
//! into each query is conserved.
//!
//! With `phi` the logistic function and `e` = `epsilon`, added to every
//! element:
//!
//! ```text
//! I_i  = (phi(q_i) + e) . (sum_j phi(k_j) + e)          what flows into a query
//! O_j  = (phi(k_j) + e) . (sum_i phi(q_i) + e)          and out of a key
//! I'_i = (phi(q_i) + e) . (sum_j phi(k_j) / O_j + e)    with the other side conserved
//! O'_j = (phi(k_j) + e) . (sum_i phi(q_i) / I_i + e)    kept within -1 and 1
//! c_j  = kv_len softmax_j(O'_j)                         keys compete
//! o_i  = sigmoid(I'_i q_len / kv_len) (phi(q_i) / I_i)^T sum_j phi(k_j) c_j v_j^T
//! ```
//!
//! "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv
//! 2202.06258). Causal, sums go up to a token, `n` of them, and
//!
//! ```text
//! I'_i = (phi(q_i) + e) . (sum_{j <= i} phi(k_j) n_j / O_j + e) / n_i
//! O'_j = (phi(k_j) + e) . (sum_{i <= j} phi(q_i) n_i / I_i + e) / n_j
//! c_j  = n_j exp(O'_j) / sum_{t <= j} exp(O'_t)
//! o_i  = sigmoid(I'_i) (phi(q_i) / I_i)^T sum_{j <= i} phi(k_j) c_j v_j^T
//! ```
//!
//! so that a token depends on earlier ones alone: four more sums go along with
//! the state. (The last token of the causal form is not what the other form
//! gives.)
//!
//! Cost: about `16 head_dim + 4 head_dim value_dim` flops a token and head,
//! `32 (head_dim + value_dim)` more where it is causal. The flows of a head
//! are worked out by one thread. Weights vary little, as those of all linear
//! attention without decay do. The error bound runs along with the definition.

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::tokens::Tokens;
use crate::input::{Dims, Input, Qkv};
use crate::math::features::Sigmoid;
use crate::stages::flow::{self, Head, Sums};
use crate::stages::linear::{self, Memory, Weighed};
use crate::stages::map;
use crate::stages::options::{EPSILON, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;

pub use crate::stages::flow::FlowformerState;

/// Flow-Attention.
///
/// Unless it is [causal](FlowformerBuilder::causal), every query sees all
/// keys, and no state can be carried from call to call, for all tokens take
/// part in every sum.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Recurrent, linear::Flowformer};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let whole = Qkv::new(x.view(), x.view(), x.view());
/// let out = Flowformer::builder().build()?.forward(whole)?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
///
/// let causal = Flowformer::builder().causal().build()?;
/// let mut state = causal.initial_state(whole)?;
/// let first = x.slice(s![.., .., ..1, ..]);
/// let out = causal.step(Qkv::new(first, first, first), &mut state)?;
/// assert_eq!(out.dim(), (1, 2, 1, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Flowformer {
    config: Config,
    causal: bool,
    epsilon: f32,
}

impl Flowformer {
    /// Everything visible.
    pub fn builder() -> FlowformerBuilder {
        FlowformerBuilder::with()
    }
}

options! {
    /// Builds a [`Flowformer`].
    FlowformerBuilder of Flowformer, form;
    flags {
        /// Queries see the keys at their own position and before; queries and
        /// keys are of the same tokens.
        causal;
    }
    numbers {
        /// What is added to every element of features and of their sums.
        /// Default: 1e-6.
        epsilon: f32 = 1e-6, in EPSILON;
    }
    build(builder, config) {
        Ok(Flowformer { config, causal: builder.causal, epsilon: builder.epsilon })
    }
}

impl Flowformer {
    fn dims<T: Element>(&self, x: &Qkv<'_, T>, state: Option<&FlowformerState>) -> Result<Dims> {
        let dims = if self.causal { x.token_dims()? } else { Input::dims(x)? };
        if state.is_some() && !self.causal {
            let reason = "all tokens take part in the sums of each";
            return Err(Error::Conflict { option: "a state", with: "attention that is not causal", reason });
        }
        let shape = (dims.batch, dims.q_heads, dims.head_dim, dims.value_dim);
        state.map_or(Ok(()), |state| state.state.check(shape))?;
        Ok(dims)
    }

    fn empty<T: Element>(&self, x: &Qkv<'_, T>) -> Result<FlowformerState> {
        let state = FlowformerState::empty(&self.dims(x, None)?, self.epsilon);
        self.dims(x, Some(&state)).map(|_| state)
    }

    /// The factors of a head's queries and values.
    fn flows(head: Head<'_>) {
        let Head { flows, q, k, sums: [keys, queries, from, to], tally, query: into, value: rival, spare } = head;
        let ([out, shares, kept], first) = (spare, tally[1] as f32);
        let n = |t: usize| if flows.running { first + (t + 1) as f32 } else { 1.0 };
        flows.column(k, None, keys, q, into);
        flows.column(q, None, queries, k, out);
        out.iter_mut().enumerate().for_each(|(t, x)| *x = n(t) / *x);
        shares.iter_mut().zip(&*into).enumerate().for_each(|(t, (share, into))| *share = n(t) / into);
        flows.column(k, Some(out), from, q, kept);
        flows.column(q, Some(shares), to, k, rival);
        let ratio = if flows.running { 1.0 } else { kept.len() as f32 / rival.len().max(1) as f32 };
        kept.iter_mut().enumerate().for_each(|(t, x)| *x *= ratio / n(t));
        rival.iter_mut().enumerate().for_each(|(t, x)| *x /= n(t));
        flows.sigmoid(kept);
        into.iter_mut().zip(kept).for_each(|(into, kept)| *into = *kept / *into);
        flows.softmax(rival, tally);
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Flowformer {
    type State = FlowformerState;

    fn flow(&self, x: Qkv<'_, T>, state: Option<&mut FlowformerState>, pass: &mut Pass<'_>, out: Out<'_, T>)
    -> Result<()> {
        let dims = self.dims(&x, state.as_deref())?;
        let (isa, of) = (self.config.isa, (dims, x.lengths));
        let mut features = |x: ndarray::ArrayView4<'_, T>| {
            let (_, heads, _, dim) = x.dim();
            map::map(pass, isa, (x, heads, dim), |_, _, rows, run| run(&Sigmoid, rows))
        };
        let (q, k) = (features(x.q.reborrow())?, features(x.k.reborrow())?);
        let (state, kept) = FlowformerState::parts(state);
        let how = (isa, self.epsilon, self.causal);
        let [query, value] = flow::run(pass, how, of, [&q, &k], kept, Self::flows)?;
        let spec = linear::spec(&self.config, of, dims.head_dim, self.causal, None);
        let weighed = Weighed::new([q.view(), k.view()], x.v.reborrow(), dims, [query, value]);
        linear::run(pass, &spec, &weighed, state, out);
        Ok(())
    }

    fn define<R: Real>(
        &self,
        x: Qkv<'_, T>,
        state: Option<&FlowformerState>,
    ) -> Result<Defined<R, FlowformerState>> {
        let (dims, causal) = (self.dims(&x, state)?, self.causal);
        let mut state = state.map_or_else(|| FlowformerState::empty(&dims, self.epsilon), Clone::clone);
        let out = of_heads(&dims, &x.lengths, |head| {
            let at = [head.sequence, head.head];
            let q = head.features::<R, T>(&Sigmoid, &x.q, &head.queries);
            let k = head.features::<R, T>(&Sigmoid, &x.k, &head.keys);
            let mut sums = Sums::new(&state, at, self.epsilon, causal);
            let first = sums.tally[1];
            let n = |t: usize| if causal { first + R::of((t + 1) as f64) } else { R::of(1.0) };
            let over = |x: &[R]| x.iter().enumerate().map(|(t, &x)| n(t) / x).collect::<Vec<R>>();
            let ones = vec![R::of(1.0); q.dim().0.max(k.dim().0)];
            let (into, out) = (sums.column(0, &k, &ones, &q), sums.column(1, &q, &ones, &k));
            let (kept, rival) = (sums.column(2, &k, &over(&out), &q), sums.column(3, &q, &over(&into), &k));
            let rival: Vec<R> = rival.into_iter().enumerate().map(|(t, x)| x / n(t)).collect();
            let shares = sums.softmax(&rival);
            let ratio = R::of(if causal { 1.0 } else { q.dim().0 as f64 / k.dim().0.max(1) as f64 });

            let (mut q, mut v) = (q, head.rows(&x.v, &head.keys));
            for (t, mut q) in q.outer_iter_mut().enumerate() {
                q.map_inplace(|x| *x = *x * (kept[t] * ratio / n(t)).sigmoid() / into[t]);
            }
            for (mut v, &share) in v.outer_iter_mut().zip(&shares) {
                v.map_inplace(|x| *x = *x * share);
            }
            sums.keep(&mut state, at);
            linear::on_state(&mut state.state, at, |memory: &mut Memory<R>| {
                memory.define([&q, &k, &v], causal, |memory, _, q| memory.read(q))
            })
        });
        Ok((out, state))
    }
}

composite!(Flowformer, Qkv, state FlowformerState);

exhibit! {
    FlowformerExhibit of Flowformer, "linear", "Flowformer", "arXiv 2202.06258";
    "keys compete for queries, queries are allotted what flows";
    not "where weights must be sharp: all linear attention without decay weighs keys nearly alike";
    tokens false;
    build(_, _) { Flowformer::builder() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Flowformer, FlowformerExhibit);

exhibit! {
    CausalFlowformerExhibit of Flowformer, "linear", "causal Flowformer", "arXiv 2202.06258";
    "the same over the keys so far";
    not "where weights must be sharp";
    tokens true;
    build(_, _) { Flowformer::builder().causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array4, s};
    use crate::linear::Form;
    use crate::{Attention, Recurrent};
    use crate::testing::LENGTHS;
    use crate::testing::qkv::{Qkvs, close, cuts, held};

    fn flowformer(causal: bool) -> Flowformer {
        let builder = Flowformer::builder();
        if causal { builder.causal() } else { builder }.build().unwrap()
    }

    /// The formulas of the paper over all rows of one head at once, with
    /// cumulative sums as matrices.
    fn literal(x: &Qkvs, h: usize, g: usize, causal: bool) -> ndarray::Array2<f64> {
        use ndarray::{Array1, Array2};
        let e = f64::from(1e-6f32);
        let phi = |x: &Array4<f32>, h: usize| -> Array2<f64> {
            x.slice(s![0, h, .., ..]).mapv(|x| 1.0 / (1.0 + (-f64::from(x)).exp()))
        };
        let (q, k) = (phi(&x.q, h), phi(&x.k, g));
        let v = x.v.slice(s![0, g, .., ..]).mapv(f64::from);
        let (n, m) = (q.dim().0, k.dim().0);
        // sees[[i, j]]: whether j is in the sum of i.
        let sees = |n: usize, m: usize| {
            Array2::from_shape_fn((n, m), |(i, j)| if !causal || j <= i { 1.0 } else { 0.0 })
        };
        let count = |n: usize| Array1::from_shape_fn(n, |i| if causal { (i + 1) as f64 } else { 1.0 });
        let dots = |a: &Array2<f64>, b: &Array2<f64>| ((a + e) * (b + e)).sum_axis(ndarray::Axis(1));
        let by = |a: &Array2<f64>, w: &Array1<f64>| a * &w.view().insert_axis(ndarray::Axis(1));
        let into = count(n) / dots(&q, &sees(n, m).dot(&k));
        let out = count(m) / dots(&k, &sees(m, n).dot(&q));
        let conserved_in = dots(&q, &sees(n, m).dot(&by(&k, &out))) / count(n);
        let conserved_out =
            (dots(&k, &sees(m, n).dot(&by(&q, &into))) / count(m)).mapv(|x| x.clamp(-1.0, 1.0));
        let weight = conserved_out.mapv(f64::exp);
        let totals = sees(m, m).dot(&weight);
        let compete = if causal { count(m) * weight / totals } else { m as f64 * weight / totals };
        let ratio = if causal { 1.0 } else { n as f64 / m as f64 };
        let allocate = conserved_in.mapv(|x| 1.0 / (1.0 + (-x * ratio).exp()));
        // into has count / I.
        let pairs = by(&q, &(into / count(n))).dot(&k.t()) * sees(n, m);
        by(&pairs.dot(&by(&v, &compete)), &allocate)
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for len in LENGTHS {
            let x = Qkvs::new([2, 4, 2, len, len, 20, 24], 1);
            for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                let causal = Flowformer::builder().causal().form(form).build().unwrap();
                worst = worst.max(held(&causal, x.qkv()));
            }
            worst = worst.max(held(&flowformer(false), x.qkv()));
            // Features near 0.
            let low = Qkvs { q: &x.q - 12.0, k: &x.k - 12.0, v: x.v };
            worst = worst.max(held(&flowformer(true), low.qkv()));
            worst = worst.max(held(&flowformer(false), low.qkv()));
        }
        for (q_len, kv_len) in [(5, 130), (130, 5), (7, 0), (0, 7)] {
            let x = Qkvs::new([1, 4, 2, q_len, kv_len, 16, 8], 2);
            worst = worst.max(held(&flowformer(false), x.qkv()));
        }
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 8], 3);
        let offsets = [0, 70, 70, 75, 150];
        for causal in [false, true] {
            worst = worst.max(held(&flowformer(causal), x.qkv().packed(&offsets, &offsets)));
        }
        println!("flowformer: {worst:.3} of the bound");
    }

    #[test]
    fn definition_is_the_formula() {
        for (causal, q_len) in [(true, 60), (false, 60), (false, 23)] {
            let x = Qkvs::new([1, 2, 1, q_len, 60, 8, 5], 4);
            let out = flowformer(causal).reference(x.qkv()).unwrap();
            for h in 0..2 {
                let want = literal(&x, h, 0, causal);
                for ((t, c), want) in want.indexed_iter() {
                    let got = out[[0, h, t, c]];
                    assert!((got - want).abs() < 1e-12, "{causal} token {t}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn order_of_keys_does_not_matter() {
        let mut x = Qkvs::new([1, 1, 1, 30, 50, 8, 5], 5);
        let out = flowformer(false).reference(x.qkv()).unwrap();
        for x in [&mut x.k, &mut x.v] {
            x.invert_axis(ndarray::Axis(2));
        }
        close(&flowformer(false).reference(x.qkv()).unwrap(), &out, 1e-12);
    }

    #[test]
    fn state_carries_over_any_cuts() {
        let x = Qkvs::new([2, 2, 1, 203, 203, 16, 16], 6);
        cuts(&flowformer(true), &x, &[0, 1, 2, 66, 66, 130, 203]);
    }

    #[test]
    fn nan_shows_and_never_reaches_earlier_tokens() {
        for what in 0..3 {
            let mut x = Qkvs::new([1, 1, 1, 100, 100, 8, 8], 7);
            let array = [&mut x.q, &mut x.k, &mut x.v].into_iter().nth(what).unwrap();
            array[[0, 0, 70, 3]] = f32::NAN;
            for form in [Form::Chunked, Form::Recurrent] {
                let flowformer = Flowformer::builder().causal().form(form).build().unwrap();
                for ((_, _, t, c), x) in flowformer.forward(x.qkv()).unwrap().indexed_iter() {
                    let sees = t >= 70 && (what < 2 || c == 3);
                    assert_eq!(x.is_nan(), sees, "array {what}, {form:?}: token {t}, column {c}");
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let x = Qkvs::new([1, 1, 1, 3, 3, 8, 8], 8);
        assert_eq!(
            flowformer(false).initial_state(x.qkv()).unwrap_err().to_string(),
            "a state cannot be combined with attention that is not causal: all tokens take part in the sums of each"
        );
        let error = Flowformer::builder().epsilon(f32::NAN).build().unwrap_err();
        assert_eq!(error.to_string(), "epsilon: expected a finite number of at least 0, got NaN");
        let mut state = flowformer(true).initial_state(x.qkv()).unwrap();
        let wider = Qkvs::new([1, 2, 2, 3, 3, 8, 8], 8);
        assert_eq!(
            flowformer(true).prefill(wider.qkv(), &mut state).unwrap_err().to_string(),
            "state: expected shape [sequences, heads, state_dim, columns] = [1, 2, 8, 8], got [1, 1, 8, 8]"
        );
    }
}
