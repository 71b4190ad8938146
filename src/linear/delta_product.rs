//! DeltaProduct: some steps of the delta rule for each token, so that its
//! transition is a product of reflections.

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::{Token, Update, number, row};
use crate::element::Element;
use crate::engine::recur::{Arrays, Place, Source, Spec};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::input::declare::input;
use crate::input::tokens::{Tokens, all_heads};
use crate::stages::delta_rule::{DeltaRule, unit};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};
use crate::stages::substeps::Substeps;

input! {
    /// What [`DeltaProduct`] takes: the steps of token `t` are `n t` to `n t +
    /// n - 1`.
    DeltaProductInput {
        /// Queries.
        q: T [batch, heads/, len, head_dim],
        /// Keys of all steps.
        k: T [batch, heads/, steps, head_dim],
        /// Values of all steps.
        v: T [batch, heads/, steps, value_dim],
        /// How much of what is stored under its key a step replaces: from 0
        /// to 1, or to 2 where models let it turn around what is stored.
        beta: f32 [batch, heads/, steps];
        /// Natural logarithms of what a token leaves of the state: at most 0,
        /// `-inf` to forget everything.
        gated by log_decay: f32 [batch, heads/, len]
    }
    head_dim head_dim, value_dim value_dim;
}

/// DeltaProduct: some steps of the delta rule for each token, so that its
/// transition is a product of reflections.
///
/// ```text
/// S_{t,0} = exp(g_t) S_{t-1}
/// S_{t,i} = S_{t,i-1} + beta_{t,i} k_{t,i} (v_{t,i} - S_{t,i-1}^T k_{t,i})^T        i = 1..=n
/// S_t = S_{t,n},   o_t = scale * q_t^T S_t
/// ```
///
/// "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder
/// Products" (arXiv 2502.10297), with log decays `g_t` of one number a token and
/// head or without. Keys, values and weights have `n` steps for each token, one
/// after the other along their length. With weights up to 2 a step may
/// reflect, and two of them rotate. With one step it is
/// [`GatedDeltaNet`](crate::linear::GatedDeltaNet), or without decays
/// [`DeltaNet`](crate::linear::DeltaNet).
///
/// Cost: `n` times that of [`DeltaNet`](crate::linear::DeltaNet).
///
/// ```
/// use attention_kernels::{Attention, linear::{DeltaProduct, DeltaProductInput}};
/// use ndarray::{Array3, Array4};
///
/// let q = Array4::from_shape_fn((1, 2, 50, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let k = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h * t + c) as f32).cos());
/// let beta = Array3::from_elem((1, 2, 100), 1.5);
///
/// let product = DeltaProduct::builder(2).normalize_qk().build()?; // two steps a token
/// let out = product.forward(DeltaProductInput::new(q.view(), k.view(), k.view(), beta.view()))?;
/// assert_eq!(out.dim(), (1, 2, 50, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DeltaProduct {
    rule: DeltaRule,
    steps: usize,
}

impl DeltaProduct {
    /// So many steps a token, at least 1, of queries and keys as they are.
    pub fn builder(steps: usize) -> DeltaProductBuilder {
        DeltaProductBuilder::with(steps)
    }

    fn steps<'a, T: Element>(&'a self, x: &'a DeltaProductInput<'_, T>) -> Substeps<'a> {
        let (rule, steps, log_decay) = (self.rule, self.steps, x.log_decay.map(|g| g.reborrow()));
        Substeps { rule, steps, arrays: self.arrays(x), log_decay }
    }
}

options! {
    /// Builds a [`DeltaProduct`].
    DeltaProductBuilder of DeltaProduct, form growth scale "1 / sqrt(head_dim)";
    given { steps: usize; }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        if this.steps == 0 {
            return Err(Error::value("steps", "at least 1", 0));
        }
        Ok(DeltaProduct { rule: DeltaRule { config, normalize: this.normalize_qk }, steps: this.steps })
    }
}

impl Recurrence for DeltaProduct {
    type Operands<'a, T: Element> = DeltaProductInput<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a DeltaProductInput<'_, T>) -> Arrays<'a> {
        let qkv = Qkv::new(x.q.reborrow(), x.k.reborrow(), x.v.reborrow());
        Arrays { beta: Some(x.beta.reborrow()), ..Arrays::new(&qkv, all_heads(x)) }
    }

    fn spec<'a, T: Element>(&'a self, x: &'a DeltaProductInput<'_, T>) -> Result<Spec<'a>> {
        self.steps(x).spec(x.token_dims()?, x.lengths)
    }

    fn with_source<T: Element, R>(
        &self,
        x: &DeltaProductInput<'_, T>,
        run: impl FnOnce(&dyn Source) -> R,
    ) -> R {
        run(&self.steps(x))
    }

    fn token<T: Element>(&self, x: &DeltaProductInput<'_, T>, at: &Place) -> Token {
        let (heads, t) = (all_heads(x), at.tokens.start);
        let token = Place { tokens: t / self.steps..t / self.steps + 1, ..at.clone() };
        let mut q = row(&x.q, &token, heads);
        let mut k = row(&x.k, at, heads);
        if self.rule.normalize {
            [&mut q, &mut k].into_iter().for_each(|x| unit(x));
        }
        let log_decay = x.log_decay.filter(|_| t.is_multiple_of(self.steps));
        Token {
            decay: vec![log_decay.map_or(1.0, |g| number(&g, &token, heads).exp()); q.len()],
            q,
            k,
            v: row(&x.v, at, heads),
            update: Update::Delta { beta: number(&x.beta, at, heads) },
            bonus: Vec::new(),
        }
    }
}
recurrent!(DeltaProduct, DeltaProductInput);

exhibit! {
    DeltaProductExhibit of DeltaProduct, "linear", "DeltaProduct", "arXiv 2502.10297";
    "some steps of the delta rule a token, which may reflect and rotate the state";
    not "where one step will do: Gated DeltaNet costs less";
    tokens true, forms form, variants 3;
    build(_, field) { DeltaProduct::builder([2, 1, 3][field.variant]).normalize_qk() }
    extras(x, field) {
        let steps = [2, 1, 3][field.variant];
        // The last step of a token has its own key and value.
        let (batch, heads, len, dim) = x.k.dim();
        let keys = |(b, h, t, c): (usize, usize, usize, usize)| match steps - 1 - t % steps {
            0 => x.k[[b, h, t / steps, c]],
            step => T::from_f32((field.round)(field.at(4 + step as u64, h, t / steps, c))),
        };
        let values = |(b, h, t, c): (usize, usize, usize, usize)| {
            let v = x.v[[b, h, t / steps, c]];
            if t % steps == steps - 1 { v } else { T::from_f32(0.5 * v.to_f32()) }
        };
        let betas = |(_, h, t): (usize, usize, usize)| share(field.at(2, h, t, 0));
        Extras {
            keys: ndarray::Array4::from_shape_fn((batch, heads, len * steps, dim), keys),
            values: {
                let (batch, heads, len, dim) = x.v.dim();
                ndarray::Array4::from_shape_fn((batch, heads, len * steps, dim), values)
            },
            betas: ndarray::Array3::from_shape_fn((batch, x.q.dim().1, len * steps), betas),
            decays: if field.variant == 2 { ndarray::Array3::default((0, 0, 0)) } else { field.token_decays(x) },
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> DeltaProductInput<'a, T> {
        let input = DeltaProductInput {
            lengths: x.lengths,
            ..DeltaProductInput::new(x.q, extras.keys.view(), extras.values.view(), extras.betas.view())
        };
        if extras.decays.shape() == [0, 0, 0] { input } else { input.gated(extras.decays.view()) }
    }
}
carded!(DeltaProduct, DeltaProductExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{DeltaNet, DeltaQkv, Form, GatedDeltaNet, GatedDeltaQkv};
    use crate::testing::{array, unit, within};
    use crate::{Attention, Bounded, Recurrent};
    use ndarray::{Array3, Array4, Axis, s};

    fn betas(len: usize, least: f32) -> Array3<f32> {
        array([1, 1, 2, len], 4).mapv(|x| least + (1.0 - least) * share(x)).remove_axis(Axis(0))
    }

    #[test]
    fn steps_that_do_nothing_leave_gated_delta_net() {
        let (q, k, v) =
            (array([1, 2, 70, 16], 1), unit(array([1, 2, 140, 16], 2)), array([1, 4, 140, 24], 3));
        let (mut beta, g) =
            (betas(140, 0.0), array([1, 1, 4, 70], 5).mapv(|x| -x.abs()).remove_axis(Axis(0)));
        // The first of each two steps has no weight.
        beta.slice_mut(s![.., .., ..;2]).fill(0.0);
        let own = |x: &Array4<f32>| x.slice(s![.., .., 1..;2, ..]).to_owned();
        let (k1, v1, beta1) = (own(&k), own(&v), beta.slice(s![.., .., 1..;2]).to_owned());
        let x = GatedDeltaQkv::new(Qkv::new(q.view(), k1.view(), v1.view()), g.view(), beta1.view());
        let gated = GatedDeltaNet::builder().build().unwrap();
        let (want, bound) = (gated.reference(x).unwrap(), gated.error_bound(x).unwrap());
        for form in [Form::Chunked, Form::Recurrent] {
            let of = |steps| DeltaProduct::builder(steps).form(form).build().unwrap();
            let one = DeltaProductInput::new(q.view(), k1.view(), v1.view(), beta1.view());
            within("one", &of(1).forward(one.gated(g.view())).unwrap(), &want, &bound);
            let two = DeltaProductInput::new(q.view(), k.view(), v.view(), beta.view());
            within("two", &of(2).forward(two.gated(g.view())).unwrap(), &want, &bound);
        }
    }

    #[test]
    fn is_the_delta_rule_of_all_steps_read_after_the_last() {
        let (q, k, v) =
            (array([1, 2, 50, 16], 1), unit(array([1, 2, 150, 16], 2)), array([1, 2, 150, 24], 3));
        let beta = betas(150, 0.5).mapv(|x| 2.0 * x);
        // Queries of every step, of which those of the last are read.
        let all = Array4::from_shape_fn((1, 2, 150, 16), |(b, h, t, c)| q[[b, h, t / 3, c]]);
        let x = DeltaQkv::new(Qkv::new(all.view(), k.view(), v.view()), beta.view());
        let delta = DeltaNet::builder().build().unwrap();
        let (want, bound) = (delta.reference(x).unwrap(), delta.error_bound(x).unwrap());
        let (want, bound) =
            (want.slice(s![.., .., 2..;3, ..]).to_owned(), bound.slice(s![.., .., 2..;3]).to_owned());
        let x = DeltaProductInput::new(q.view(), k.view(), v.view(), beta.view());
        for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
            let product = DeltaProduct::builder(3).form(form).build().unwrap();
            within("product", &product.forward(x).unwrap(), &want, &bound);
        }
        let packed = DeltaProduct::builder(3).build().unwrap();
        let offsets = [0, 0, 1, 30, 50];
        let out = packed.forward(x.packed(&offsets)).unwrap();
        within(
            "packed",
            &out,
            &packed.reference(x.packed(&offsets)).unwrap(),
            &packed.error_bound(x.packed(&offsets)).unwrap(),
        );
        let mut state = packed.initial_state(x).unwrap();
        packed.prefill(x, &mut state).unwrap();
        assert_eq!(state.view().dim(), (1, 2, 16, 24));
    }

    #[test]
    fn of_two_values_under_one_key_the_last_stays_and_reflections_undo_themselves() {
        let (q, v) = (unit(array([1, 1, 1, 8], 1)), array([1, 1, 2, 4], 2));
        let k = Array4::from_shape_fn((1, 1, 2, 8), |(_, _, _, c)| q[[0, 0, 0, c]]);
        let beta = Array3::from_elem((1, 1, 2), 1.0);
        let product = DeltaProduct::builder(2).scale(1.0).build().unwrap();
        let x = DeltaProductInput::new(q.view(), k.view(), v.view(), beta.view());
        let out = product.forward(x).unwrap();
        assert!((0..4).all(|c| (out[[0, 0, 0, c]] - v[[0, 0, 1, c]]).abs() < 1e-5));
        let (twice, none) = (Array3::from_elem((1, 1, 2), 2.0), Array4::zeros(v.dim()));
        let mut state = product.initial_state(x).unwrap();
        state.view_mut().assign(&array([1, 1, 8, 4], 5));
        let before = state.clone();
        product
            .prefill(DeltaProductInput::new(q.view(), k.view(), none.view(), twice.view()), &mut state)
            .unwrap();
        assert!(state.view().iter().zip(before.view()).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn refusals() {
        let (x, beta) = (array([1, 2, 6, 8], 1), Array3::ones((1, 2, 6)));
        let x = DeltaProductInput::new(x.view(), x.view(), x.view(), beta.view());
        let error = DeltaProduct::builder(2).build().unwrap().forward(x).unwrap_err().to_string();
        assert_eq!(error, "k: expected 2 steps for each of 6 tokens, got 6");
        let error = DeltaProduct::builder(0).build().unwrap_err().to_string();
        assert_eq!(error, "steps: expected at least 1, got 0");
        let (short, growth) = (Array3::zeros((1, 1, 5)), Array3::ones((1, 1, 6)));
        let error = |g: &Array3<f32>| {
            DeltaProduct::builder(1)
                .build()
                .unwrap()
                .forward(x.reborrow().gated(g.view()))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error(&short),
            "log_decay: expected shape [batch, heads, len] = [1, 2 or a divisor, 6], got [1, 1, 5]"
        );
        assert_eq!(
            error(&growth),
            "log_decay: expected log decays of at most 0; allow_growth() permits others, got 1"
        );
    }
}
