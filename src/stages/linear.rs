//! Linear attention over rows that other stages made: the recurrence engine as
//! a stage, and its definition.

use ndarray::{Array2, ArrayView2, ArrayView4, ArrayViewMut4};

use crate::definition::number::{Real, tokens};
use crate::element::Element;
use crate::engine::kept::Kept;
use crate::engine::recur::{self, Arrays, Keys, Place, Source, Spec};
use crate::input::state::State;
use crate::input::{Dims, Qkv};
use crate::simd::any::AnyArray;
use crate::simd::mem::{Heads, Stream};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::Pass;

/// Runs a recurrence from and to a state, or from zero.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    spec: &Spec<'_>,
    source: &dyn Source,
    state: Option<&mut [f32]>,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let Dims { batch, q_heads, q_len, kv_len, packed, .. } = spec.dims;
    let rows = if packed { 1 } else { batch } * q_heads * q_len.max(kv_len);
    let flops = || (rows * spec.flops()) as u64;
    pass.stage(flops, recur::workspace_bytes(spec), |arena| {
        if let Some(out) = out {
            recur::run_in(spec, source, state.map(Kept::own), out, arena);
        }
    });
}

/// Queries and keys of scratch, and values.
pub(crate) fn arrays<'a, T: Element>(
    [q, k]: [ArrayView4<'a, f32>; 2],
    v: ArrayView4<'a, T>,
    heads: usize,
) -> Arrays<'a> {
    let (q, k) = (AnyArray::F32(Heads::new(q)), AnyArray::F32(Heads::new(k)));
    Arrays { q, k, ..Arrays::new(&Qkv::new(v, v, v), heads) }
}

/// Operands whose queries and values are multiplied by a factor a token.
pub(crate) struct Weighed<'a, S> {
    pub(crate) source: S,
    pub(crate) dims: Dims,
    /// `[batch, heads, q_len]` and `[batch, heads, kv_len]`.
    pub(crate) factors: [&'a [f32]; 2],
}

impl<S> Weighed<'_, S> {
    fn scale(&self, isa: Isa, at: &Place, side: usize, x: &mut [f32], stride: usize) {
        let len = [self.dims.q_len, self.dims.kv_len][side];
        let first = (at.batch * self.dims.q_heads + at.head) * len;
        let factors = &self.factors[side][first..][at.tokens.clone()];
        isa.dispatch(Scale { x, stride, factors });
    }
}

impl<S: Source> Source for Weighed<'_, S> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.source.queries(isa, at, to, stride);
        self.scale(isa, at, 0, to, stride);
    }

    fn keys(&self, isa: Isa, at: &Place, mut to: Keys<'_>) {
        self.source.keys(isa, at, to.reborrow());
        self.scale(isa, at, 1, to.v, to.value_stride);
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        self.source.streams(at)
    }
}

/// Rows times factors.
struct Scale<'a> {
    x: &'a mut [f32],
    stride: usize,
    factors: &'a [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, &factor) in self.x.chunks_exact_mut(self.stride.max(1)).zip(self.factors) {
            for x in row.chunks_exact_mut(S::LANES) {
                s.store(x, s.mul(s.load(x), s.splat(factor)));
            }
        }
    }
}

/// The definition: the state of a head, to which tokens are added and from
/// which queries read.
pub(crate) struct Memory<R> {
    sums: Array2<R>,
    tokens: usize,
}

impl<R: Real> Memory<R> {
    /// A state, `[state_dim, columns]`.
    fn new(state: ArrayView2<'_, f32>) -> Self {
        Self { sums: state.map(|&x| R::of(f64::from(x))), tokens: 0 }
    }

    /// `S += k v^T`, where columns past the values take 1.
    fn add(&mut self, k: &[R], v: &[R]) {
        for ((r, c), sum) in self.sums.indexed_iter_mut() {
            *sum = sum.term(k[r], v.get(c).copied().unwrap_or(R::of(1.0)));
        }
        self.tokens += 1;
    }

    /// `q^T S`
    pub(crate) fn read(&self, q: &[R]) -> Vec<R> {
        let roundings = tokens(self.tokens);
        let sums = |c| self.sums.column(c).into_iter().map(|sum| sum.summed(roundings));
        (0..self.sums.dim().1).map(|c| R::dot(q.iter().copied().zip(sums(c)))).collect()
    }

    /// `q^T S` and `own` without the last column, divided by that and `more`;
    /// 0 where there is no weight.
    pub(crate) fn mean(&self, q: &[R], own: impl Fn(usize) -> R, more: R) -> Vec<R> {
        let mut read = self.read(q);
        let weight = read.pop().unwrap_or(R::of(0.0)) + more;
        let each = read.into_iter().enumerate();
        let none = weight.value() == 0.0;
        each.map(|(c, x)| if none { R::of(0.0) } else { (x + own(c)) / weight }).collect()
    }

    /// The last number: the count of keys, where these end with a 1.
    pub(crate) fn count(&self) -> R {
        self.sums.last().copied().unwrap_or(R::of(0.0))
    }

    fn state(&self) -> Array2<f32> {
        self.sums.map(|x| x.value() as f32)
    }

    /// What `read` gives for each query, of all keys or those up to its own.
    pub(crate) fn define(
        &mut self,
        [q, k, v]: [&Array2<R>; 3],
        causal: bool,
        read: impl Fn(&Self, usize, &[R]) -> Vec<R>,
    ) -> Array2<R> {
        let add = |of: &mut Self, t: usize| of.add(&k.row(t).to_vec(), &v.row(t).to_vec());
        if !causal {
            (0..k.dim().0).for_each(|t| add(self, t));
        }
        let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
        for (t, mut out) in out.outer_iter_mut().enumerate() {
            if causal {
                add(self, t);
            }
            out.iter_mut().zip(read(self, t, &q.row(t).to_vec())).for_each(|(out, x)| *out = x);
        }
        out
    }
}

/// What a definition does with a head of a state.
pub(crate) fn on_state<R: Real, O>(
    state: &mut State,
    [i, h]: [usize; 2],
    define: impl FnOnce(&mut Memory<R>) -> O,
) -> O {
    let mut memory = Memory::new(state.view().slice(ndarray::s![i, h, .., ..]));
    let out = define(&mut memory);
    state.view_mut().slice_mut(ndarray::s![i, h, .., ..]).assign(&memory.state());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::engine::recur::{Form, Read};
    use crate::input::Lengths;
    use crate::stages::pass::alone;
    use crate::stages::recur::Options;
    use crate::testing::arrays::array;
    use ndarray::{Array4, s};

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (len, causal, form) in [
            (5, true, Form::Auto),
            (70, true, Form::Recurrent),
            (70, true, Form::Chunked),
            (201, true, Form::Auto),
            (201, false, Form::Auto),
        ] {
            let (heads, d, dv) = (3, 20, 17);
            let x = |seed, dim| array(seed, (2, heads, len, dim));
            let (q, k, v) = (x(1, d), x(2, d), x(3, dv));
            let factors = [array(4, 2 * heads * len), array(5, 2 * heads * len)];
            let shape = Qkv::new(q.view(), k.view(), v.view());
            let dims = shape.dims().unwrap();
            let given = Arrays::new(&shape, heads);
            let config = Options { form, ..Options::default() }.build().unwrap();
            let read = if causal { Read::After } else { Read::Total };
            let spec = Spec { read, ..config.spec(dims, Lengths::Full, &given) };
            let (start, mut state) = (array(6, (2, heads, d, dv)), Array4::zeros((2, heads, d, dv)));
            let mut out = Array4::<f32>::zeros(v.dim());
            let to = std::cell::RefCell::new((&mut state, &mut out));
            alone(|pass| {
                let (state, out) = &mut *to.borrow_mut();
                state.assign(&start);
                let views = [q.view(), k.view()];
                let factors = factors.each_ref().map(|x| x.as_slice().unwrap());
                let source = Weighed { source: arrays(views, v.view(), heads), dims, factors };
                run(pass, &spec, &source, state.as_slice_mut(), Some(out.view_mut()));
                Ok(())
            });
            for (b, h) in ndarray::indices((2, heads)) {
                let rows = |x: &Array4<f32>| x.slice(s![b, h, .., ..]).map(|&x| Running::of(f64::from(x)));
                let (q, k, v) = (rows(&q), rows(&k), rows(&v));
                let weighed = |x: &Array2<Running>, side: usize| {
                    Array2::from_shape_fn(x.dim(), |(t, c)| {
                        x[[t, c]] * Running::of(f64::from(factors[side][(b * heads + h) * len + t]))
                    })
                };
                let mut memory = Memory::new(start.slice(s![b, h, .., ..]));
                let want =
                    memory.define([&weighed(&q, 0), &k, &weighed(&v, 1)], causal, |of, _, q| of.read(q));
                for ((t, c), want) in want.indexed_iter() {
                    let off = (f64::from(out[[b, h, t, c]]) - want.value()).abs();
                    assert!(off <= want.off(), "{form:?} {causal}, token {t}: {off} off, {want:?}");
                    worst = worst.max(off / want.off());
                }
                let last = memory.state();
                assert!(state.slice(s![b, h, .., ..]).iter().zip(&last).all(|(a, b)| (a - b).abs() < 1e-4));
            }
        }
        println!("linear: {worst:.3} of the bound");
    }
}
