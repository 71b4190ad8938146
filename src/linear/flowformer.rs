//! Flow-Attention: linear attention in which what flows out of each key and
//! into each query is conserved.

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::math::features::Sigmoid;
use crate::stages::flow::{self, Flow};
use crate::stages::linear::{self, Memory, Weighed};
use crate::stages::mapped::Mapped;
use crate::stages::options::{EPSILON, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;

pub use crate::stages::flow::FlowformerState;

/// Flow-Attention: linear attention in which what flows out of each key and
/// into each query is conserved.
///
/// With `phi` the logistic function and `e` = `epsilon`, added to every
/// element:
///
/// ```text
/// I_i  = (phi(q_i) + e) . (sum_j phi(k_j) + e)          what flows into a query
/// O_j  = (phi(k_j) + e) . (sum_i phi(q_i) + e)          and out of a key
/// I'_i = (phi(q_i) + e) . (sum_j phi(k_j) / O_j + e)    with the other side conserved
/// O'_j = (phi(k_j) + e) . (sum_i phi(q_i) / I_i + e)    kept within -1 and 1
/// c_j  = kv_len softmax_j(O'_j)                         keys compete
/// o_i  = sigmoid(I'_i q_len / kv_len) (phi(q_i) / I_i)^T sum_j phi(k_j) c_j v_j^T
/// ```
///
/// "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv
/// 2202.06258). Causal, sums go up to a token, `n` of them, and
///
/// ```text
/// I'_i = (phi(q_i) + e) . (sum_{j <= i} phi(k_j) n_j / O_j + e) / n_i
/// O'_j = (phi(k_j) + e) . (sum_{i <= j} phi(q_i) n_i / I_i + e) / n_j
/// c_j  = n_j exp(O'_j) / sum_{t <= j} exp(O'_t)
/// o_i  = sigmoid(I'_i) (phi(q_i) / I_i)^T sum_{j <= i} phi(k_j) c_j v_j^T
/// ```
///
/// so that a token depends on earlier ones alone: four more sums go along with
/// the state. (The last token of the causal form is not what the other form
/// gives.)
///
/// Cost: about `16 head_dim + 4 head_dim value_dim` flops a token and head,
/// `32 (head_dim + value_dim)` more where it is causal. The flows of a head
/// are worked out by one thread. Weights vary little, as those of all linear
/// attention without decay do. The error bound runs along with the definition.
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
    fn mapped(&self) -> Mapped<'_> {
        let Self { config, causal, .. } = self;
        Mapped { config, query: &Sigmoid, key: &Sigmoid, causal: *causal, normaliser: None }
    }

    fn dims<T: Element>(&self, x: &Qkv<'_, T>, state: Option<&FlowformerState>) -> Result<Dims> {
        let dims = self.mapped().dims(x)?;
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
        let (mapped, (state, kept)) = (self.mapped(), FlowformerState::parts(state));
        let how = Flow { isa: self.config.isa, epsilon: self.epsilon, causal: self.causal };
        let [query, value] = flow::run(pass, how, (dims, x.lengths), &mapped.source(&x), kept)?;
        let source = Weighed { source: mapped.source(&x), dims, factors: [query, value] };
        linear::run(pass, &mapped.spec(&x)?, &source, state, out);
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
            let mut q = head.features::<R, T>(&Sigmoid, &x.q, &head.queries);
            let k = head.features::<R, T>(&Sigmoid, &x.k, &head.keys);
            let mut v = head.rows(&x.v, &head.keys);
            let [query, value] = flow::define([&q, &k], &mut state, at, self.epsilon, causal);
            for (x, factors) in [(&mut q, query), (&mut v, value)] {
                x.outer_iter_mut()
                    .zip(factors)
                    .for_each(|(mut x, factor)| x.map_inplace(|x| *x = *x * factor));
            }
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
    tokens true, forms form;
    build(_, _) { Flowformer::builder().causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::qkv::{Qkvs, close, error, held};
    use crate::{Attention, Recurrent};
    use ndarray::{Array1, Array2, Array4, Axis, s};

    fn flowformer(causal: bool) -> Flowformer {
        let builder = Flowformer::builder();
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
            let out = flowformer(causal).reference(x.qkv()).unwrap();
            for ((_, h, t, c), got) in out.indexed_iter() {
                let want = literal(&x, h, causal)[[t, c]];
                assert!((got - want).abs() < 1e-12, "{causal} token {t}: {got}, not {want}");
            }
            if !causal {
                [&mut x.k, &mut x.v].into_iter().for_each(|x| x.invert_axis(Axis(2)));
                close(&flowformer(false).reference(x.qkv()).unwrap(), &out, 1e-12);
            }
        }
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len) in [(5, 130), (130, 5), (7, 0), (0, 7), (64, 64), (101, 101)] {
            let x = Qkvs::new([2, 4, 2, q_len, kv_len, 20, 24], 2);
            // Features near 0 too.
            let low = Qkvs { q: &x.q - 12.0, k: &x.k - 12.0, v: x.v.clone() };
            for (x, causal) in [(&x, false), (&low, false), (&low, true)] {
                if !causal || q_len == kv_len {
                    worst = worst.max(held(&flowformer(causal), x.qkv()));
                }
            }
        }
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 8], 3);
        for keys in [[0, 70, 70, 75, 150], [0, 1, 70, 150, 150]] {
            worst = worst.max(held(&flowformer(false), x.qkv().packed(&[0, 70, 70, 75, 150], &keys)));
        }
        println!("flowformer: {worst:.3} of the bound");
    }

    #[test]
    fn refusals() {
        let x = Qkvs::new([1, 1, 1, 3, 3, 8, 8], 8);
        assert_eq!(
            error(flowformer(false).initial_state(x.qkv())),
            "a state cannot be combined with attention that is not causal: all tokens take part in the sums of each"
        );
        assert_eq!(
            error(Flowformer::builder().epsilon(f32::NAN).build()),
            "epsilon: expected a finite number of at least 0, got NaN"
        );
    }
}
