//! For mechanisms that take queries, keys and values alone.

use std::ops::Range;

use ndarray::{Array4, Axis, concatenate, s};

use crate::attention::{Attention, Bounded, Input, Recurrent};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::math::random::Normal;

/// Normal random queries, keys and values.
#[derive(Clone, Debug)]
pub(crate) struct Qkvs {
    pub(crate) q: Array4<f32>,
    pub(crate) k: Array4<f32>,
    pub(crate) v: Array4<f32>,
}

impl Qkvs {
    /// Sizes are batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim.
    pub(crate) fn new(
        [batch, q_heads, kv_heads, q_len, kv_len, dim, value_dim]: [usize; 7],
        seed: u64,
    ) -> Self {
        let mut normal = Normal::new(seed);
        let mut array = |heads, len, dim| {
            Array4::from_shape_simple_fn((batch, heads, len, dim), || {
                normal.next().unwrap_or_default() as f32
            })
        };
        let (q, k) = (array(q_heads, q_len, dim), array(kv_heads, kv_len, dim));
        Self { q, k, v: array(kv_heads, kv_len, value_dim) }
    }

    pub(crate) fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    /// Some of the queries, and some of the keys.
    pub(crate) fn slice(&self, queries: Range<usize>, keys: Range<usize>) -> Self {
        Self {
            q: self.q.slice(s![.., .., queries, ..]).to_owned(),
            k: self.k.slice(s![.., .., keys.clone(), ..]).to_owned(),
            v: self.v.slice(s![.., .., keys, ..]).to_owned(),
        }
    }
}

/// Holds a kernel to its definition under the published bound; returns the
/// largest share of it.
pub(crate) fn held<X: Input>(attention: &impl Bounded<X>, x: X) -> f64 {
    let (out, want) = (attention.forward(x).unwrap(), attention.reference(x).unwrap());
    let bound = attention.error_bound(x).unwrap();
    assert_eq!(out.dim(), want.dim());
    let mut worst = 0f64;
    for ((b, h, t, c), got) in out.indexed_iter() {
        let (want, got) = (want[[b, h, t, c]], got.to_f64());
        let rounding = if size_of::<X::Out>() == 4 { 0.0 } else { X::Out::ROUNDING * want.abs() + 3e-8 };
        let (off, bound) = ((got - want).abs(), bound[[b, h, t]] + rounding);
        assert!(
            off <= bound,
            "[{b}, {h}, {t}, {c}] is {got:e}, not {want:e}: off by {off:e}, bound {bound:e}"
        );
        if bound > 0.0 {
            worst = worst.max(off / bound);
        }
    }
    worst
}

/// `sum_j w_ij v_j`, divided by `sum_j w_ij + epsilon` if there is one, where
/// `weight` gives `w_ij` of a query and a key.
pub(crate) fn quadratic(
    x: &Qkvs,
    causal: bool,
    epsilon: Option<f64>,
    weight: impl Fn(&[f64], &[f64]) -> f64,
) -> Array4<f64> {
    let ((batch, heads, q_len, _), (_, kv_heads, kv_len, value_dim)) = (x.q.dim(), x.v.dim());
    let row = |x: &Array4<f32>, b: usize, h: usize, t: usize| -> Vec<f64> {
        x.slice(s![b, h, t, ..]).iter().map(|&x| f64::from(x)).collect()
    };
    let mut out = Array4::zeros((batch, heads, q_len, value_dim));
    for ((b, h, i), mut out) in
        ndarray::indices((batch, heads, q_len)).into_iter().zip(out.lanes_mut(Axis(3)))
    {
        let g = h / (heads / kv_heads);
        let q = row(&x.q, b, h, i);
        let mut total = 0.0;
        for j in 0..if causal { i + 1 } else { kv_len } {
            let w = weight(&q, &row(&x.k, b, g, j));
            total += w;
            for (out, v) in out.iter_mut().zip(row(&x.v, b, g, j)) {
                *out += w * v;
            }
        }
        if let Some(epsilon) = epsilon {
            out.mapv_inplace(|x| x / (total + epsilon));
        }
    }
    out
}

/// Every element within `tolerance` of what it should be.
pub(crate) fn close(got: &Array4<f64>, want: &Array4<f64>, tolerance: f64) {
    assert_eq!(got.dim(), want.dim());
    for ((at, got), want) in got.indexed_iter().zip(want) {
        let off = (got - want).abs();
        assert!(off <= tolerance * want.abs().max(1.0), "{at:?} is {got:e}, not {want:e}");
    }
}

/// One call, calls for the tokens between `at`, and the definition of the
/// same calls: all agree, and so do the states at the end.
pub(crate) fn cuts<A, S>(attention: &A, x: &Qkvs, at: &[usize])
where
    A: for<'a> Bounded<Qkv<'a, f32>> + for<'a> Recurrent<Qkv<'a, f32>, State = S>,
    S: Clone,
{
    let want = attention.reference(x.qkv()).unwrap();
    let bound = attention.error_bound(x.qkv()).unwrap();
    let mut state = attention.initial_state(x.qkv()).unwrap();
    let mut exact = state.clone();
    let mut parts = Vec::new();
    for cut in at.windows(2) {
        let part = x.slice(cut[0]..cut[1], cut[0]..cut[1]);
        parts.push(attention.prefill(part.qkv(), &mut state).unwrap());
        let (out, next) = attention.reference_from(part.qkv(), &exact).unwrap();
        exact = next;
        for ((b, h, t, c), got) in out.indexed_iter() {
            let (want, t) = (want[[b, h, cut[0] + t, c]], cut[0] + t);
            assert!((got - want).abs() <= bound[[b, h, t]], "definition: token {t} is {got:e}, not {want:e}");
        }
    }
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    let out = concatenate(Axis(2), &views).unwrap();
    for ((b, h, t, c), &got) in out.indexed_iter() {
        let (got, want) = (f64::from(got), want[[b, h, t, c]]);
        assert!((got - want).abs() <= bound[[b, h, t]], "token {t} is {got:e}, not {want:e}");
    }
    // As one call leaves it.
    let mut whole = attention.initial_state(x.qkv()).unwrap();
    let once = attention.prefill(x.qkv(), &mut whole).unwrap();
    for ((b, h, t, c), &got) in once.indexed_iter() {
        let (got, want) = (f64::from(got), want[[b, h, t, c]]);
        assert!((got - want).abs() <= bound[[b, h, t]], "at once, token {t} is {got:e}, not {want:e}");
    }
}

/// What is refused, and that nothing is written then.
pub(crate) fn refused<X: Input>(attention: &impl Attention<X>, x: X) -> String {
    let mut out = Array4::from_elem(x.out_dim().unwrap_or((1, 1, 1, 1)), X::Out::from_f32(7.0));
    let error = error(attention.forward_into(x, out.view_mut(), &mut Workspace::new()));
    assert!(out.iter().all(|x| x.to_f64() == 7.0), "refused, and yet written: {error}");
    assert_eq!(self::error(attention.reference(x)), error, "the definition refuses something else");
    error
}

/// What an error says.
pub(crate) fn error<R: std::fmt::Debug>(result: Result<R>) -> String {
    result.unwrap_err().to_string()
}
