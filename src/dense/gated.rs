//! Output-gated attention: what a query gathers goes through a gate of its own.

use ndarray::{Array4, ArrayView4, Axis, Zip};

use crate::attention::{Cost, Input, Mechanism};
use crate::card::{Card, Exhibit, Extras, exhibit};
use crate::definition::softmax::Reference;
use crate::definition::softmax_backward::Gradients;
use crate::dense::{Dense, DenseBuilder};
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Lengths, Qkv};
use crate::mask::Causal;
use crate::score::smooth::AnySmooth;
use crate::simd::Isa;
use crate::simd::mem::Heads;
use crate::stages::attend::{Attending, attending, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, smooth};

/// An input of attention, arrays or a cache, and the logits of the gates of its
/// output.
#[derive(Clone, Copy, Debug)]
pub struct WithGate<'a, X, G> {
    /// What the attention takes.
    pub x: X,
    /// Logits, `[batch, q_heads, q_len, value_dim]`, or 1 in place of `value_dim`
    /// for one a head.
    pub gate: ArrayView4<'a, G>,
}

impl<X: Input, G: Element> Input for WithGate<'_, X, G> {
    type Out = X::Out;

    fn lengths(&self) -> Lengths<'_> {
        self.x.lengths()
    }

    fn dims(&self) -> Result<Dims> {
        let (dims, (batch, heads, len, dim)) = (self.x.dims()?, self.x.out_dim()?);
        let gate = self.gate.dim();
        if gate != (batch, heads, len, dim) && gate != (batch, heads, len, 1) {
            let expected =
                format!("[batch, q_heads, q_len, value_dim | 1] = [{batch}, {heads}, {len}, {dim} | 1]");
            return Err(Error::shape("gate", expected, self.gate.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        self.x.out_dim()
    }
}

/// Output-gated attention: what a query gathers goes through a gate of its own.
///
/// ```text
/// y_ic = sigmoid(g_ic) o_ic          o: the output of any attention
/// ```
///
/// From "Gated Attention for Large Language Models" (arXiv 2505.06708), as in
/// Qwen3-Next and its kin: `g` is a projection of the layer's input, without norm
/// and without rotary positions, one logit an element or one a head. The LSE is
/// that of the attention: results of parts of the keys are merged first and gated
/// once.
///
/// Cost: a logistic function and a product an element (or a row) of the output,
/// in the epilogue of the attention, before the output is rounded.
///
/// [`Backward`](crate::Backward) gives the gradient of the logits, too.
///
/// Attention whose output is gated: [`Dense`], [`Sigmoid`](super::Sigmoid),
/// [`Selective`](super::Selective) and whatever else is one call of the engine,
/// over arrays and caches.
///
/// ```
/// use attention_kernels::dense::{Dense, Gated, WithGate};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 2, 4, 16));
/// let gated = Gated(Dense::builder().causal().build()?);
/// let out = gated.forward(WithGate { x: Qkv::new(x.view(), x.view(), x.view()), gate: x.view() })?;
/// assert!((out[[0, 0, 0, 0]] - 1.0 / (1.0 + (-1f32).exp())).abs() < 1e-6);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Gated<A>(
    /// The attention.
    pub A,
);

impl<X: Input, G: Element, A: Attending<X>> Attending<WithGate<'_, X, G>> for Gated<A> {
    fn with_call<R>(&self, x: WithGate<'_, X, G>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.dims()?;
        let gate = G::any(Heads::new(x.gate.reborrow()));
        self.0.with_call(x.x, |call| run(&call.gated(gate)))
    }

    fn define(&self, x: WithGate<'_, X, G>) -> Result<Reference> {
        x.dims()?;
        let mut reference = self.0.define(x.x)?;
        let whole = x.gate.broadcast(reference.out.dim()).unwrap_or(x.gate.reborrow());
        Zip::from(&mut reference.out).and(whole).for_each(|out, g| *out /= 1.0 + (-g.to_f64()).exp());
        // What the logistic function and the product round.
        for (row, bound) in reference.out.rows().into_iter().zip(&mut reference.bound) {
            *bound += 16.0 * 2f64.powi(-24) * row.fold(0.0, |most: f64, x| most.max(x.abs()));
        }
        Ok(reference)
    }

    fn price(&self, x: WithGate<'_, X, G>) -> Result<Cost> {
        x.dims()?;
        let Cost { flops, bytes } = self.0.price(x.x)?;
        Ok(Cost { flops, bytes: bytes + (x.gate.len() * size_of::<G>()) as u64 })
    }
}

attending!(@kernel [X: Input, G: Element, A: Attending<X> + Send + Sync] WithGate<'_, X, G>, Gated<A>);
attending!(@weights [X: Input, G: Element, A: Attending<X> + Send + Sync] WithGate<'_, X, G>, Gated<A>);
mergeable!(@impl [X: Input, G: Element, A: Attending<X> + Send + Sync] WithGate<'_, X, G>, Gated<A>);

impl<X: Input, G: Element, A: Attending<X> + Smooth<X>> Smooth<WithGate<'_, X, G>> for Gated<A> {
    fn with_smooth<R>(
        &self,
        x: WithGate<'_, X, G>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        x.dims()?;
        let gate = G::any(Heads::new(x.gate.reborrow()));
        self.0.with_smooth(x.x, |call, score| run(&call.gated(gate), score))
    }

    fn define_back(
        &self,
        x: WithGate<'_, X, G>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<Gradients> {
        let out = match saved.softmax {
            Some((out, _)) => out.mapv(f64::from),
            None => self.0.define(x.x)?.out,
        };
        let open = x.gate.mapv(|g| 1.0 / (1.0 + (-g.to_f64()).exp()));
        let whole = |x: &Array4<f64>| x.broadcast(out.dim()).map_or_else(|| x.clone(), |x| x.to_owned());
        // Gradients are linear in that of the output: what `f32` leaves of it comes second.
        let before = d_out.mapv(f64::from) * whole(&open);
        let near = before.mapv(|x| x as f32);
        let rest = (before - near.mapv(f64::from)).mapv(|x| x as f32);
        let found = [near, rest].map(|d_out| self.0.define_back(x.x, d_out.view(), saved));
        let [near, rest] = found;
        let gate = d_out.mapv(f64::from) * &out * whole(&open.mapv(|open| open * (1.0 - open)));
        let gate = if x.gate.dim().3 == 1 { gate.sum_axis(Axis(3)).insert_axis(Axis(3)) } else { gate };
        Ok(Gradients { gate: Some(gate), ..near?.plus(rest?) })
    }

    fn shapes(&self, x: WithGate<'_, X, G>) -> Result<Shapes> {
        self.0.shapes(x.x)
    }

    fn gate(&self, x: WithGate<'_, X, G>) -> Option<Dim4> {
        Some(x.gate.dim())
    }

    fn arrange<N>(&self, entries: &mut [N]) {
        self.0.arrange(entries);
    }
}

smooth!(@backward [X: Input, G: Element, A: Attending<X> + Smooth<X> + Send + Sync] WithGate<'_, X, G>, Gated<A>);

impl<A: Send + Sync> Mechanism for Gated<A> {
    fn card(&self) -> &'static Card {
        GatedExhibit::CARD
    }
}

/// What the exhibit is built by.
struct Causally(DenseBuilder<Causal>);

impl Causally {
    fn isa(self, isa: Isa) -> Self {
        Self(self.0.isa(isa))
    }
    fn build(self) -> Result<Gated<Dense<Causal>>> {
        Ok(Gated(self.0.build()?))
    }
}

exhibit! {
    GatedExhibit of Gated<Dense<Causal>>, "dense", "output-gated", "arXiv 2505.06708";
    "causal, each element of the output times a gate of the query's own";
    not "where the model was not trained with gates: it is dense attention without them";
    tokens false;
    build(_, _) { Causally(Dense::builder().causal()) }
    extras(x, field) {
        let ((batch, heads, len, _), dim) = (x.q.dim(), x.v.dim().3);
        let gate = |(_, h, i, c): (usize, usize, usize, usize)| T::from_f32(4.0 * field.at(1, h, i, c));
        Extras { keys: ndarray::Array4::from_shape_fn((batch, heads, len, dim), gate), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithGate<'a, Qkv<'a, T>, T> {
        WithGate { x, gate: extras.keys.view() }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use ndarray::s;

    use super::*;
    use crate::attention::{Attention, Bounded, Mergeable};
    use crate::cache::{Append, Cached, Contiguous, KvShape};
    use crate::dense::Sigmoid;
    use crate::merge::merge;

    fn random(dim: Dim4, seed: usize) -> Array4<f32> {
        let at =
            |(b, h, i, c): Dim4| ((b * 7 + h * 31 + i * 131 + c * 17 + seed * 1009) % 97) as f32 / 24.0 - 2.0;
        Array4::from_shape_fn(dim, at)
    }

    /// Few queries and many, each on its engine.
    const LENGTHS: [(usize, usize); 3] = [(1, 700), (3, 40), (90, 130)];

    fn arrays(q_len: usize, kv_len: usize) -> [Array4<f32>; 4] {
        let dims = [(2, 4, q_len, 24), (2, 2, kv_len, 24), (2, 2, kv_len, 20), (2, 4, q_len, 20)];
        std::array::from_fn(|i| random(dims[i], i))
    }

    #[test]
    fn open_and_half_open() {
        for (q_len, kv_len) in LENGTHS {
            let [q, k, v, gate] = arrays(q_len, kv_len);
            let x = || Qkv::new(q.view(), k.view(), v.view());
            let dense = Dense::builder().causal().build().unwrap();
            let out = dense.forward(x()).unwrap();
            let gated = |gate: &Array4<f32>| {
                Gated(dense.clone()).forward(WithGate { x: x(), gate: gate.view() }).unwrap()
            };
            assert_eq!(gated(&(&gate * 0.0 + f32::INFINITY)), out);
            assert_eq!(gated(&(&gate * 0.0)), &out * 0.5);
            assert_eq!(gated(&(&gate * 0.0 - 200.0)), &out * 0.0);
            assert_ne!(gated(&gate), out);
            // One a head is the same for every element.
            let one = gate.slice(s![.., .., .., 3..4]).to_owned();
            assert_eq!(gated(&one), gated(&one.broadcast(gate.dim()).unwrap().to_owned()));
            // A gate that is NaN spoils its own element.
            let mut spoilt = gate.clone();
            spoilt[[1, 2, 0, 5]] = f32::NAN;
            let spoilt = gated(&spoilt);
            assert!(spoilt[[1, 2, 0, 5]].is_nan());
            assert_eq!(spoilt.iter().filter(|x| x.is_nan()).count(), 1);
        }
    }

    /// Parts are merged first and gated then.
    #[test]
    fn gates_come_after_merging() {
        let [q, k, v, gate] = arrays(5, 300);
        let dense = Dense::builder().build().unwrap();
        let part = |keys: std::ops::Range<usize>| {
            let (k, v) = (k.slice(s![.., .., keys.clone(), ..]), v.slice(s![.., .., keys, ..]));
            dense.forward_with_lse(Qkv::new(q.view(), k, v)).unwrap()
        };
        let ((a, a_lse), (b, b_lse)) = (part(0..100), part(100..300));
        let (merged, lse) = merge((a.view(), a_lse.view()), (b.view(), b_lse.view())).unwrap();
        let whole = WithGate { x: Qkv::new(q.view(), k.view(), v.view()), gate: gate.view() };
        let (got, got_lse) = Gated(dense).forward_with_lse(whole).unwrap();
        let want = merged * gate.mapv(|g| 1.0 / (1.0 + (-g).exp()));
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5));
        assert!(got_lse.iter().zip(&lse).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    /// Half outputs are rounded once, after the gate.
    #[test]
    fn rounded_once() {
        for (q_len, kv_len) in LENGTHS {
            let [q, k, v, gate] = arrays(q_len, kv_len).map(|x| x.mapv(f16::from_f32));
            let gated = Gated(Dense::builder().build().unwrap());
            let x = || Qkv::new(q.view(), k.view(), v.view());
            let narrow = gated.forward(WithGate { x: x(), gate: gate.view() }).unwrap();
            let wide = gated.forward(WithGate { x: x().widened(), gate: gate.view() }).unwrap();
            assert_eq!(narrow, wide.mapv(f16::from_f32));
        }
    }

    #[test]
    fn over_caches_and_other_attention() {
        let [q, k, v, gate] = arrays(1, 700);
        let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 20 };
        let mut cache = Contiguous::<f32>::new(shape, 2, 700).unwrap();
        cache.append_each(&[0, 1], k.view(), v.view()).unwrap();
        let x = Qkv::new(q.view(), k.view(), v.view());
        let gated = Gated(Dense::builder().causal().build().unwrap());
        let from_cache =
            gated.forward(WithGate { x: Cached::new(q.view(), &cache), gate: gate.view() }).unwrap();
        assert_eq!(from_cache, gated.forward(WithGate { x, gate: gate.view() }).unwrap());
        let logistic = Sigmoid::builder().build().unwrap();
        let x = WithGate { x, gate: gate.view() };
        let gated = Gated(logistic);
        let (got, want) = (gated.forward(x).unwrap(), gated.reference(x).unwrap());
        let bound = gated.error_bound(x).unwrap();
        for ((i, got), want) in got.indexed_iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() <= bound[[i.0, i.1, i.2]], "{i:?}: {got}, not {want}");
        }
    }

    #[test]
    fn refusals() {
        let [q, k, v, _] = arrays(3, 40);
        for dim in [(2, 4, 3, 19), (2, 2, 3, 20), (2, 4, 1, 20), (1, 4, 3, 1)] {
            let gate = random(dim, 1);
            let gated = Gated(Dense::builder().build().unwrap());
            let x = WithGate { x: Qkv::new(q.view(), k.view(), v.view()), gate: gate.view() };
            let error = gated.forward(x).unwrap_err().to_string();
            assert!(
                error.starts_with("gate: expected shape [batch, q_heads, q_len, value_dim | 1]"),
                "{error}"
            );
        }
    }
}
