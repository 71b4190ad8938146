//! Mamba-2, state space duality: a step for each token and head, of which its
//! decay and its weight are made.

use ndarray::{Array2, ArrayView2};

use crate::card::{Extras, carded, exhibit};
use crate::definition::recurrence::{Token, row};
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Gate, Place, Source};
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Qkv};
use crate::stages::differentiate::{Differentiable, Mamba2Gradients, backward_pass};
use crate::stages::discretise::Steps;
use crate::stages::options::{FINITE, options};
use crate::stages::recur::{Config, Recurrence, recurrent};

input! {
    /// What a Mamba-2 layer computes of its tokens. Neighbouring heads share
    /// the `B` and `C` of their group.
    Mamba2Input {
        /// Values.
        x: T [batch, heads/, len, value_dim],
        /// Steps before their bias and softplus.
        dt: f32 [batch, heads/, len],
        /// Keys.
        b: T [batch, heads/, len, state_dim],
        /// Queries.
        c: T [batch, heads/, len, state_dim]
    }
    head_dim state_dim, value_dim value_dim;
}

/// Mamba-2, state space duality: a step for each token and head, of which its
/// decay and its weight are made.
///
/// ```text
/// step_t = softplus(dt_t + dt_bias)
/// S_t = exp(-exp(A_log) step_t) S_{t-1} + step_t B_t x_t^T
/// y_t = C_t^T S_t + D x_t
/// ```
///
/// "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
/// Structured State Space Duality" (arXiv 2405.21060). `C` are queries, `B`
/// keys and `x` values; groups of neighbouring heads share `B` and `C`. The
/// state is `[state_dim, value_dim]`, the transpose of the released code's. The
/// convolution before it, the norm and the gate after it are the caller's.
/// Gradients are those of the inputs and of `A_log`, `dt_bias` and `D`.
///
/// Cost: `32 (state_dim + value_dim) + 4 state_dim value_dim` flops a token and
/// head. The scores of a group are computed for each of its heads. Where
/// decays and keys are known already, use [`SimpleGla`](super::SimpleGla).
///
/// ```
/// use attention_kernels::{Attention, linear::{Mamba2, Mamba2Input}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, value_dim
/// let dt = Array3::<f32>::zeros((1, 4, 100));
/// let bc = Array4::<f32>::ones((1, 1, 100, 64)); // one group, state_dim
/// let mamba = Mamba2::builder(&[0.0, 0.5, 1.0, 1.5]).skip(&[1.0; 4]).build()?;
/// let out = mamba.forward(Mamba2Input::new(x.view(), dt.view(), bc.view(), bc.view()))?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mamba2 {
    config: Config,
    steps: Steps,
    /// `[heads, 1 or value_dim]`, or nothing.
    skip: Array2<f32>,
}

impl Mamba2 {
    /// `A_log`, one a head: a step of 1 leaves `exp(-exp(a_log))` of the state.
    pub fn builder(a_log: &[f32]) -> Mamba2Builder {
        Mamba2Builder::with(a_log.to_vec())
    }
}

options! {
    /// Builds a [`Mamba2`].
    Mamba2Builder of Mamba2, form scale "1";
    given { a_log: Vec<f32>, in FINITE; }
    own {
        dt_bias: Option<Vec<f32>> = None, in FINITE;
        dt_limits: (f32, f32) = (0.0, f32::INFINITY);
        /// `[heads, 1 or value_dim]`
        skip: Option<Array2<f32>> = None, in FINITE;
    }
    build(this, config) {
        let Self { a_log, dt_bias, dt_limits, skip, .. } = this;
        let steps = Steps::new(a_log, dt_bias, dt_limits)?;
        let (heads, skip) = (steps.heads(), skip.unwrap_or_else(|| Array2::default((steps.heads(), 0))));
        if skip.nrows() != heads {
            return Err(Error::value("skip", format!("one for each of the {heads} heads"), skip.nrows()));
        }
        Ok(Mamba2 { config, steps, skip })
    }
}

impl Mamba2Builder {
    /// What is added to steps before their softplus, one a head. Default: 0.
    pub fn dt_bias(mut self, bias: &[f32]) -> Self {
        self.dt_bias = Some(bias.to_vec());
        self
    }

    /// Steps outside these, after their softplus, count as the nearer one.
    /// Default: 0 and infinity.
    pub fn dt_limits(mut self, least: f32, most: f32) -> Self {
        self.dt_limits = (least, most);
        self
    }

    /// `D`, one a head: how much of its own value an output has besides what
    /// it reads. It is not scaled. Default: 0.
    pub fn skip(mut self, skip: &[f32]) -> Self {
        self.skip = Some(Array2::from_shape_fn((skip.len(), 1), |(head, _)| skip[head]));
        self
    }

    /// [`skip`](Self::skip) for each column of the values, `[heads,
    /// value_dim]`.
    pub fn channel_skip(mut self, skip: ArrayView2<'_, f32>) -> Self {
        self.skip = Some(skip.as_standard_layout().into_owned());
        self
    }
}

impl Recurrence for Mamba2 {
    type Operands<'a, T: Element> = Mamba2Input<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a Mamba2Input<'_, T>) -> Arrays<'a> {
        let qkv = Qkv::new(x.c.reborrow(), x.b.reborrow(), x.x.reborrow());
        Arrays {
            decay: Gate::Token(x.dt.reborrow()),
            skip: self.skip.as_slice().unwrap_or_default(),
            ..Arrays::new(&qkv, self.steps.heads())
        }
    }

    fn check<T: Element>(&self, _: &Mamba2Input<'_, T>, dims: &Dims) -> Result<()> {
        self.steps.check(dims)?;
        if self.skip.ncols() > 1 && self.skip.ncols() != dims.value_dim {
            let expected = format!("[heads, value_dim] = [{}, {}]", dims.q_heads, dims.value_dim);
            return Err(Error::shape("skip", expected, self.skip.shape()));
        }
        Ok(())
    }

    fn with_source<T: Element, R>(&self, x: &Mamba2Input<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        self.steps.with_source(self.arrays(x), run)
    }

    fn token<T: Element>(&self, x: &Mamba2Input<'_, T>, at: &Place) -> Token {
        self.steps.token(&self.arrays(x), &x.dt, at)
    }
}
recurrent!(Mamba2, Mamba2Input);

impl Differentiable for Mamba2 {
    type Gradients<A> = Mamba2Gradients<A>;

    fn sizes(&self, of_arrays: Gradients<Dim>) -> Gradients<Dim> {
        let (heads, columns) = self.skip.dim();
        let (one, skip) = (Some((1, heads, 1, 1)), Some((1, heads, 1, columns)));
        Gradients { rate: one, bias: one, skip, ..of_arrays }
    }

    fn token_back<T: Element>(&self, x: &Mamba2Input<'_, T>, at: &Place, found: &mut Found) {
        self.steps.token_back(&row(&x.b, at, self.steps.heads()), &x.dt, at, found);
    }
}
backward_pass!(Mamba2, Mamba2Input, Mamba2Gradients);

exhibit! {
    Mamba2Exhibit of Mamba2, "linear", "Mamba-2", "arXiv 2405.21060";
    "every token says how long a step it is";
    not "where decays and keys are known already: use simple GLA";
    tokens true, forms form, variants 3;
    build(x, field) {
        let heads = x.q.dim().1.max(x.v.dim().1);
        let each = |of: [f32; 4]| -> Vec<f32> { (0..heads).map(|h| of[h % 4]).collect() };
        let varied = || Mamba2::builder(&each([-3.0, 0.0, 1.0, 2.5])).dt_bias(&each([-2.0, 0.5, 0.0, 1.0]));
        let skips = Array2::from_shape_fn((heads, x.v.dim().3), |(h, c)| field.at(7, h, 0, c));
        match field.variant {
            0 => Mamba2::builder(&vec![0.0; heads]).skip(&vec![0.5; heads]),
            1 => varied().skip(&each([1.0, -0.5, 0.0, 3.0])).dt_limits(0.01, 0.5),
            _ => varied().channel_skip(skips.view()).scale(0.3),
        }
    }
    extras(x, field) {
        Extras { decays: field.tokens(1, x, |x| 2.0 * x - 2.0), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Mamba2Input<'a, T> {
        Mamba2Input { lengths: x.lengths, ..Mamba2Input::new(x.v, extras.decays.view(), x.k, x.q) }
    }
}
carded!(Mamba2, Mamba2Exhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{Carried, Form, SimpleGla, TokenGated};
    use crate::testing::{agree, array, noise, pairs, within};
    use crate::{Attention, Backward, Bounded, Recurrent};
    use ndarray::{Array2, Array3, Array4};

    const A_LOG: [f32; 4] = [-3.0, 0.0, 1.0, 2.5];
    const BIAS: [f32; 4] = [-2.0, 0.5, 0.0, 1.0];
    const SKIP: [f32; 4] = [1.0, -0.5, 0.0, 3.0];

    /// Steps of everyday size, and some where softplus ends.
    fn steps(shape: [usize; 3]) -> Array3<f32> {
        let edges = [f32::NEG_INFINITY, -120.0, -90.0, 20.0, 0.0, 60.0];
        let mut i = 0;
        Array3::from_shape_simple_fn(shape, noise(5)).mapv(|x| {
            i += 1;
            if i % 11 == 0 { edges[i / 11 % edges.len()] } else { 5.0 * x }
        })
    }

    fn skips(heads: usize, dim: usize) -> Array2<f32> {
        array([1, 1, heads, dim], 7).into_shape_with_order((heads, dim)).unwrap()
    }

    /// The step of a token, after its bias and softplus.
    fn step(dt: f32, head: usize) -> f64 {
        (f64::from(dt) + f64::from(BIAS[head])).exp().ln_1p()
    }

    fn rate(head: usize) -> f64 {
        -f64::from(A_LOG[head]).exp()
    }

    #[test]
    fn is_its_form_with_all_pairs() {
        let (x, b, c) = (array([1, 4, 70, 5], 1), array([1, 2, 70, 8], 2), array([1, 2, 70, 8], 3));
        let dt = array([1, 1, 4, 70], 4).into_shape_with_order((1, 4, 70)).unwrap();
        let mamba = Mamba2::builder(&A_LOG).dt_bias(&BIAS).skip(&SKIP).build().unwrap();
        let got = mamba.reference(Mamba2Input::new(x.view(), dt.view(), b.view(), c.view())).unwrap();
        let want = pairs(&x, |n, h, i, j| {
            let dot: f64 =
                (0..8).map(|d| f64::from(c[[n, h / 2, i, d]]) * f64::from(b[[n, h / 2, j, d]])).sum();
            let sum: f64 = (j + 1..=i).map(|t| rate(h) * step(dt[[n, h, t]], h)).sum();
            let own = if i == j { f64::from(SKIP[h]) } else { 0.0 };
            dot * sum.exp() * step(dt[[n, h, j]], h) + own
        });
        agree(&got, &want);
    }

    #[test]
    fn is_simple_gla_on_discretised_tokens() {
        let (x, b, c) = (array([1, 4, 150, 16], 1), array([1, 4, 150, 8], 2), array([1, 4, 150, 8], 3));
        let dt = array([1, 1, 4, 150], 4).into_shape_with_order((1, 4, 150)).unwrap();
        let steps = Array3::from_shape_fn((1, 4, 150), |at| step(dt[at], at.1));
        let g = Array3::from_shape_fn((1, 4, 150), |at| (rate(at.1) * steps[at]) as f32);
        // The released minimal listing weighs values; it is the same.
        let v = Array4::from_shape_fn(x.dim(), |(n, h, t, p)| {
            (steps[[n, h, t]] * f64::from(x[[n, h, t, p]])) as f32
        });
        let gla = SimpleGla::builder().scale(1.0).build().unwrap();
        let same = TokenGated { qkv: Qkv::new(c.view(), b.view(), v.view()), log_decay: g.view() };
        let mamba = Mamba2::builder(&A_LOG).dt_bias(&BIAS).build().unwrap();
        let out = mamba.forward(Mamba2Input::new(x.view(), dt.view(), b.view(), c.view())).unwrap();
        within("gla", &out, &gla.reference(same).unwrap(), &gla.error_bound(same).unwrap());
    }

    #[test]
    fn groups_are_repeated_heads_and_skips_repeated_columns() {
        let (x, b, dt) = (array([1, 4, 100, 24], 1), array([1, 2, 100, 16], 2), steps([1, 4, 100]));
        let repeated = Array4::from_shape_fn((1, 4, 100, 16), |(n, h, t, d)| b[[n, h / 2, t, d]]);
        let each = Array2::from_shape_fn((4, 24), |(h, _)| SKIP[h]);
        for form in [Form::Chunked, Form::Recurrent] {
            let mamba = || Mamba2::builder(&A_LOG).dt_bias(&BIAS).form(form);
            let out = |mamba: Mamba2Builder, b: &Array4<f32>| {
                let x = Mamba2Input::new(x.view(), dt.view(), b.view(), b.view());
                mamba.build().unwrap().forward(x).unwrap()
            };
            let shared = out(mamba().skip(&SKIP), &b);
            assert_eq!(shared, out(mamba().skip(&SKIP), &repeated));
            assert_eq!(shared, out(mamba().channel_skip(each.view()), &b));
            assert_ne!(shared, out(mamba(), &b));
        }
    }

    /// Heads share what groups have, and sequences the parameters.
    #[test]
    fn gradients_of_parameters_are_differences() {
        let (x, b) = (array([2, 4, 70, 5], 1), array([2, 2, 70, 8], 2));
        let dt = Array3::from_shape_simple_fn((2, 4, 70), noise(5));
        let x = Mamba2Input::new(x.view(), dt.view(), b.view(), b.view());
        let d_out = array([2, 4, 70, 5], 3);
        let carried = Carried::default();
        let skip = skips(4, 5);
        let (columns, heads) = (skip.column(0).to_vec(), [A_LOG, BIAS, [0.0; 4]]);
        for each in [true, false] {
            let mamba = |[a_log, bias, more]: &[[f32; 4]; 3]| {
                let mamba = Mamba2::builder(a_log).dt_bias(bias).dt_limits(0.3, 2.0);
                let skip = Array2::from_shape_fn(skip.dim(), |at| skip[at] + more[at.0]);
                let one: Vec<f32> = columns.iter().zip(more).map(|(x, more)| x + more).collect();
                if each { mamba.channel_skip(skip.view()) } else { mamba.skip(&one) }.build().unwrap()
            };
            let loss = |at: &[[f32; 4]; 3]| {
                let out = mamba(at).reference(x).unwrap();
                out.iter().zip(&d_out).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
            };
            let got = mamba(&heads).backward(x, d_out.view(), carried).unwrap();
            let want = mamba(&heads).reference_backward(x, d_out.view(), carried).unwrap();
            assert_eq!(got.skip.dim(), (4, if each { 5 } else { 1 }));
            let kernel = [got.a_log, got.dt_bias, got.skip.sum_axis(ndarray::Axis(1))];
            let exact = [want.a_log, want.dt_bias, want.skip.sum_axis(ndarray::Axis(1))];
            for (which, head) in (0..3).flat_map(|which| (0..4).map(move |head| (which, head))) {
                // Steps of a power of two near which no limit is.
                let slope = |by: f32| {
                    let (mut more, mut less) = (heads, heads);
                    more[which][head] += by;
                    less[which][head] -= by;
                    (loss(&more) - loss(&less)) / f64::from(more[which][head] - less[which][head])
                };
                let want = (4.0 * slope(2f32.powi(-12)) - slope(2f32.powi(-11))) / 3.0;
                let (got, exact) = (f64::from(kernel[which][head]), exact[which][head]);
                let close = |x: f64, by: f64| (x - want).abs() < by * want.abs().max(1.0);
                assert!(close(got, 1e-4) && close(exact, 2e-5), "{which} {head}: {got}, {exact}, not {want}");
            }
        }
    }

    #[test]
    fn steps_of_zero_freeze_the_state() {
        let (x, b) = (array([1, 4, 100, 16], 1), array([1, 2, 100, 16], 2));
        let input = |dt| Mamba2Input::new(x.view(), dt, b.view(), b.view());
        let (some, none) = (Array3::zeros((1, 4, 100)), Array3::from_elem((1, 4, 100), f32::NEG_INFINITY));
        let mamba = Mamba2::builder(&A_LOG).skip(&SKIP).build().unwrap();
        let mut state = mamba.initial_state(input(some.view())).unwrap();
        // Without a state only the skip is left.
        let out = mamba.prefill(input(none.view()), &mut state).unwrap();
        let want = Array4::from_shape_fn(x.dim(), |at| SKIP[at.1] * x[at]);
        assert_eq!(out, want);
        mamba.prefill(input(some.view()), &mut state).unwrap();
        let before = state.clone();
        mamba.prefill(input(none.view()), &mut state).unwrap();
        assert_eq!(state, before);
    }

    #[test]
    fn refusals() {
        let error = |mamba: Mamba2Builder| mamba.build().unwrap_err().to_string();
        let mamba = || Mamba2::builder(&A_LOG);
        assert_eq!(error(mamba().dt_bias(&[0.0])), "dt_bias: expected one for each of the 4 heads, got 1");
        assert_eq!(error(mamba().skip(&[0.0; 5])), "skip: expected one for each of the 4 heads, got 5");
        assert_eq!(error(mamba().skip(&[f32::NAN; 4])), "skip: expected finite numbers, got NaN");
        let (x, b, dt) = (array([1, 4, 6, 8], 1), array([1, 2, 6, 8], 2), Array3::<f32>::zeros((1, 4, 6)));
        let input = || Mamba2Input::new(x.view(), dt.view(), b.view(), b.view());
        let call = |mamba: Mamba2Builder, x: Mamba2Input<'_, f32>| {
            mamba.build().unwrap().forward(x).unwrap_err().to_string()
        };
        let want = "a_log: expected one for each of the 4 heads, got 3";
        assert_eq!(call(Mamba2::builder(&A_LOG[..3]), input()), want);
        let want = "skip: expected shape [heads, value_dim] = [4, 8], got [4, 7]";
        assert_eq!(call(mamba().channel_skip(skips(4, 7).view()), input()), want);
        let short = Array3::<f32>::zeros((1, 4, 5));
        let want = "dt: expected shape [batch, heads, len] = [1, 4 or a divisor, 6], got [1, 4, 5]";
        assert_eq!(call(mamba(), Mamba2Input { dt: short.view(), ..input() }), want);
        let three = array([1, 3, 6, 8], 1);
        let want =
            "b: expected shape [batch, heads, len, state_dim] = [1, 4 or a divisor, 6, 8], got [1, 3, 6, 8]";
        assert_eq!(call(mamba(), Mamba2Input { b: three.view(), ..input() }), want);
        let narrow = array([1, 2, 6, 7], 1);
        let want =
            "c: expected shape [batch, heads, len, state_dim] = [1, 4 or a divisor, 6, 7], got [1, 2, 6, 8]";
        assert_eq!(call(mamba(), Mamba2Input { b: narrow.view(), ..input() }), want);
    }
}
