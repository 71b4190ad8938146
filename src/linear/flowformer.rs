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
        let state = FlowformerState::empty(&self.dims(x, None)?, self.epsilon)?;
        self.dims(x, Some(&state)).map(|_| state)
    }

    /// The factors of a head's queries and values.
    fn flows(head: Head<'_>) {
        let Head { flows, q, k, sums: [keys, queries, from, to], tally, query: into, value: rival, spare } =
            head;
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

    fn flow(
        &self,
        x: Qkv<'_, T>,
        state: Option<&mut FlowformerState>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
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
        let fresh = || FlowformerState::empty(&dims, self.epsilon);
        let mut state = state.map_or_else(fresh, |state| Ok(state.clone()))?;
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
    use crate::linear::Form;
    use crate::testing::qkv::{Qkvs, close, cuts, held};
    use crate::{Attention, Recurrent};
    use ndarray::{Array1, Array2, Array4, Axis, s};

    fn flowformer(causal: bool, form: Form) -> Flowformer {
        let builder = Flowformer::builder().form(form);
        if causal { builder.causal() } else { builder }.build().unwrap()
    }

    /// The formulas over all rows of a head at once, sums as matrices.
    fn literal(x: &Qkvs, h: usize, causal: bool) -> Array2<f64> {
        let phi = |x: &Array4<f32>, h: usize| -> Array2<f64> {
            x.slice(s![0, h, .., ..]).mapv(|x| 1.0 / (1.0 + (-f64::from(x)).exp()))
        };
        let (e, q, k) = (f64::from(1e-6f32), phi(&x.q, h), phi(&x.k, 0));
        let v = x.v.slice(s![0, 0, .., ..]).mapv(f64::from);
        let (n, m) = (q.dim().0, k.dim().0);
        let sees = |n, m| Array2::from_shape_fn((n, m), |(i, j)| if !causal || j <= i { 1.0 } else { 0.0 });
        let count = |n: usize| Array1::from_shape_fn(n, |i| if causal { (i + 1) as f64 } else { 1.0 });
        let dots = |a: &Array2<f64>, b: &Array2<f64>| ((a + e) * (b + e)).sum_axis(Axis(1));
        let by = |a: &Array2<f64>, w: &Array1<f64>| a * &w.view().insert_axis(Axis(1));
        let into = count(n) / dots(&q, &sees(n, m).dot(&k));
        let out = count(m) / dots(&k, &sees(m, n).dot(&q));
        let kept = dots(&q, &sees(n, m).dot(&by(&k, &out))) / count(n);
        let rival = dots(&k, &sees(m, n).dot(&by(&q, &into))) / count(m);
        let weight = rival.mapv(|x| x.clamp(-1.0, 1.0).exp());
        let total = sees(m, m).dot(&weight);
        let compete = weight * if causal { count(m) } else { count(m) * m as f64 } / total;
        let ratio = if causal { 1.0 } else { n as f64 / m as f64 };
        let pairs = by(&q, &(into / count(n))).dot(&k.t()) * sees(n, m);
        by(&pairs.dot(&by(&v, &compete)), &kept.mapv(|x| 1.0 / (1.0 + (-x * ratio).exp())))
    }

    #[test]
    fn definition_is_the_formula_whatever_the_order_of_keys() {
        for (causal, q_len) in [(true, 60), (false, 60), (false, 23)] {
            let mut x = Qkvs::new([1, 2, 1, q_len, 60, 8, 5], 4);
            let out = flowformer(causal, Form::Auto).reference(x.qkv()).unwrap();
            for ((_, h, t, c), got) in out.indexed_iter() {
                let want = literal(&x, h, causal)[[t, c]];
                assert!((got - want).abs() < 1e-12, "{causal} token {t}: {got}, not {want}");
            }
            if !causal {
                [&mut x.k, &mut x.v].into_iter().for_each(|x| x.invert_axis(Axis(2)));
                close(&flowformer(false, Form::Auto).reference(x.qkv()).unwrap(), &out, 1e-12);
            }
        }
    }

    #[test]
    fn kernels_keep_to_the_definition_in_every_form() {
        let mut worst = 0f64;
        for len in [1, 9, 64, 130, 300] {
            let x = Qkvs::new([2, 4, 2, len, len, 20, 24], 1);
            // Features near 0 too.
            let low = Qkvs { q: &x.q - 12.0, k: &x.k - 12.0, v: x.v.clone() };
            for (x, form) in
                [&x, &low].into_iter().flat_map(|x| [Form::Chunked, Form::Recurrent].map(|f| (x, f)))
            {
                worst = worst.max(held(&flowformer(true, form), x.qkv()));
                worst = worst.max(held(&flowformer(false, form), x.qkv()));
            }
        }
        let (x, offsets) = (Qkvs::new([1, 2, 1, 150, 150, 16, 8], 3), [0, 70, 70, 75, 150]);
        for causal in [false, true] {
            worst = worst.max(held(&flowformer(causal, Form::Auto), x.qkv().packed(&offsets, &offsets)));
        }
        println!("flowformer: {worst:.3} of the bound");
        cuts(
            &flowformer(true, Form::Auto),
            &Qkvs::new([2, 2, 1, 203, 203, 16, 16], 6),
            &[0, 1, 2, 66, 66, 203],
        );
    }

    #[test]
    fn nan_shows_and_never_reaches_earlier_tokens() {
        for (what, form) in (0..3).flat_map(|what| [Form::Chunked, Form::Recurrent].map(|f| (what, f))) {
            let mut x = Qkvs::new([1, 1, 1, 100, 100, 8, 8], 7);
            [&mut x.q, &mut x.k, &mut x.v][what][[0, 0, 70, 3]] = f32::NAN;
            for ((_, _, t, c), x) in flowformer(true, form).forward(x.qkv()).unwrap().indexed_iter() {
                assert_eq!(x.is_nan(), t >= 70 && (what < 2 || c == 3), "array {what}, {form:?}: {t}, {c}");
            }
        }
    }

    #[test]
    fn states_are_taken_apart_and_checked() {
        let (x, causal) = (Qkvs::new([1, 1, 1, 3, 3, 8, 8], 8), flowformer(true, Form::Auto));
        let refusal = flowformer(false, Form::Auto).initial_state(x.qkv()).unwrap_err().to_string();
        assert!(refusal.starts_with("a state cannot be combined with attention that is not causal"));
        let mut state = causal.initial_state(x.qkv()).unwrap();
        causal.prefill(x.qkv(), &mut state).unwrap();
        let parts = |sums| FlowformerState::new(state.state().clone(), sums, state.tallies().to_owned());
        assert_eq!(parts(state.sums().to_owned()).unwrap(), state);
        let error = parts(Array4::zeros((1, 1, 3, 8))).unwrap_err().to_string();
        let expected =
            "sums: expected shape [sequences, heads, 4, head_dim] = [1, 1, 4, 8], got [1, 1, 3, 8]";
        assert_eq!(error, expected);
        let error =
            causal.prefill(Qkvs::new([1, 2, 2, 3, 3, 8, 8], 8).qkv(), &mut state).unwrap_err().to_string();
        assert!(error.ends_with("= [1, 2, 8, 8], got [1, 1, 8, 8]"), "{error}");
    }
}
