//! Memories that learn while they read, as a stage: what their mechanisms share beside
//! the engine.

use ndarray::{Array3, Array4, ArrayView3, Axis};

use crate::card::{Extras, Field, share};
use crate::definition::number::Real;
use crate::definition::online::define;
use crate::element::Element;
use crate::engine::online::{self, Loss, Memory, Online, Retention, Rules};
use crate::error::{Error, Result};
use crate::input::retained::MirasQkv;
use crate::input::state::State;
use crate::input::tokens::Tokens;
use crate::input::{Dims, Input, Qkv};
use crate::simd::mem::Heads;
use crate::stages::delta_rule::normalize;
use crate::stages::options::{FINITE, Range, check};
use crate::stages::pass::{Defined, Out, Pass};
use crate::stages::recur::Config;

/// What a rate of a token must be. NaN shows.
pub(crate) const RATE: Range =
    Range::new(["a number from 0 to 1"; 2], |x| x.is_nan() || (0.0..=1.0).contains(&x));
/// What a step of descent must be.
pub(crate) const STEP: Range =
    Range::new(["a finite number of at least 0"; 2], |x| x.is_nan() || (x >= 0.0 && x.is_finite()));
/// What a threshold must be.
pub(crate) const THRESHOLD: Range = Range::new(["a number of at least 0"; 2], |x| x.is_nan() || x >= 0.0);

/// Options of a memory, checked.
#[derive(Clone, Debug)]
pub(crate) struct Learning {
    rules: Rules,
    memory: Memory,
    /// Whether queries and keys are divided by their norms.
    normalize: bool,
}

impl Learning {
    pub(crate) fn new(
        config: Config,
        (loss, retention): (Loss, Retention),
        chunk: usize,
        normalize: bool,
        memory: Memory,
    ) -> Result<Self> {
        // States count tokens in f32.
        if !(1..=1 << 20).contains(&chunk) {
            return Err(Error::value("chunk", "from 1 to 2^20 tokens", chunk));
        }
        for weights in &memory.weights {
            check("weights", weights, &FINITE)?;
        }
        check("gamma", &memory.gamma, &FINITE)?;
        if let [first, second] = &memory.weights[..] {
            let (hidden, (heads, rows, columns)) = (first.dim().2, second.dim());
            if rows != hidden {
                let expected = format!("[heads, hidden, value_dim] = [_, {hidden}, _]");
                return Err(Error::shape("outer", expected, &[heads, rows, columns]));
            }
        }
        let rules = Rules { loss, retention, chunk, form: config.form, isa: config.isa };
        Ok(Self { rules, memory, normalize })
    }

    /// Bytes of weights at the start.
    pub(crate) fn bytes(&self) -> usize {
        let Memory { weights, gamma } = &self.memory;
        let gamma = gamma.as_ref().map_or(0, ndarray::ArrayBase::len);
        (weights.iter().map(Array3::len).sum::<usize>() + gamma) * size_of::<f32>()
    }

    /// A call over tokens that each leave a share of the memory.
    pub(crate) fn retained<'a, T: Element>(&'a self, x: &'a MirasQkv<'_, T>) -> Result<Online<'a>> {
        let online = self.online(x.token_dims()?, &x.qkv, x.step.view(), x.keep.view())?;
        check("keep", &x.keep, &RATE)?;
        Ok(online)
    }

    /// A call over these arrays.
    pub(crate) fn online<'a, T: Element>(
        &'a self,
        dims: Dims,
        x: &'a Qkv<'_, T>,
        step: ArrayView3<'a, f32>,
        keep: ArrayView3<'a, f32>,
    ) -> Result<Online<'a>> {
        let (d, w) = (dims.head_dim, dims.value_dim);
        for (i, own) in self.memory.weights.iter().enumerate() {
            let two = self.memory.weights.len() == 2;
            let (rows, columns) = match (two, i) {
                (false, _) => (d, w),
                (true, 0) => (d, own.dim().2),
                (true, _) => (own.dim().1, w),
            };
            if own.dim() != (dims.q_heads, rows, columns) {
                let expected = format!("[heads, _, _] = [{}, {rows}, {columns}]", dims.q_heads);
                return Err(Error::shape("weights", expected, own.shape()));
            }
        }
        if let Some(gamma) = &self.memory.gamma
            && (gamma.dim() != (dims.q_heads, w) || d != w)
        {
            let heads = dims.q_heads;
            let expected = format!("[heads, value_dim] = [{heads}, {w}] and as long keys, of {d}");
            return Err(Error::shape("gamma", expected, gamma.shape()));
        }
        check("step", &step, &STEP)?;
        Ok(Online {
            rules: self.rules,
            memory: &self.memory,
            dims,
            lengths: x.lengths,
            q: T::any(Heads::new(x.q.reborrow())),
            k: T::any(Heads::new(x.k.reborrow())),
            v: T::any(Heads::new(x.v.reborrow())),
            prepare: self.normalize.then_some(normalize),
            step,
            keep,
            forgets: false,
            momentum: None,
            threshold: None,
        })
    }
}

/// Options of memories that learn: the `chunk` of a builder, and its `memory` where that
/// is a matrix or a perceptron.
macro_rules! learning_options {
    ($builder:ident { chunk $(, $memory:ident)? }) => {
        impl $builder {
            /// Tokens whose gradients are of the same weights. Default: 64.
            pub fn chunk(mut self, tokens: usize) -> Self {
                self.chunk = tokens;
                self
            }

            $(
                /// Weights at the start, `[heads, head_dim, value_dim]`, of a memory that is a
                /// matrix.
                pub fn weights(mut self, weights: ndarray::Array3<f32>) -> Self {
                    self.$memory.weights = vec![weights];
                    self
                }

                /// A perceptron with a hidden layer: weights at the start, `[heads, head_dim,
                /// hidden]` and `[heads, hidden, value_dim]`.
                pub fn mlp(mut self, inner: ndarray::Array3<f32>, outer: ndarray::Array3<f32>) -> Self {
                    self.$memory.weights = vec![inner, outer];
                    self
                }

                /// Adds the key (of as many channels as the value), or the query, to `gamma`
                /// times the normalised output: `[heads, value_dim]`.
                pub fn gamma(mut self, gamma: ndarray::Array2<f32>) -> Self {
                    self.$memory.gamma = Some(gamma);
                    self
                }
            )?
        }
    };
}
pub(crate) use learning_options;

/// A mechanism that is a memory that learns. By [`learning!`] it has the traits.
pub(crate) trait Learns<X: Input> {
    fn learning(&self) -> &Learning;

    /// The call for an input, which has been checked then.
    fn online<'a>(&'a self, x: &'a X) -> Result<Online<'a>>;

    /// The state before the first token.
    fn empty(&self, x: &X) -> Result<State> {
        State::new(self.online(x)?.started()?)
    }
}

/// A call, and a state that fits it.
fn checked<'a, X: Input, M: Learns<X>>(
    mechanism: &'a M,
    x: &'a X,
    state: Option<&State>,
) -> Result<Online<'a>> {
    let online = mechanism.online(x)?;
    if let Some(state) = state {
        state.check(online.state_dim())?;
        let (at, chunk) = (online.geometry().weights, online.rules.chunk);
        let counts = state
            .view()
            .into_iter()
            .skip(at)
            .step_by(online.geometry().row())
            .step_by(online.geometry().parts);
        for &count in counts {
            if count < 0.0 || count as usize >= chunk || count.fract() != 0.0 {
                return Err(Error::value("state", format!("tokens of a chunk of {chunk}"), count));
            }
        }
    }
    Ok(online)
}

/// [`Pipeline::flow`](crate::stages::pass::Pipeline::flow) of a memory.
pub(crate) fn flow<X: Input, M: Learns<X>>(
    mechanism: &M,
    x: &X,
    state: Option<&mut State>,
    pass: &mut Pass<'_>,
    out: Out<'_, X::Out>,
) -> Result<()> {
    let online = checked(mechanism, x, state.as_deref())?;
    let Dims { batch, q_heads, q_len, packed, .. } = online.dims;
    let tokens = if packed { 1 } else { batch } * q_heads * q_len;
    let flops = || tokens.saturating_mul(online.flops()) as u64;
    pass.stage(flops, online::workspace_bytes(&online), |arena| {
        if let Some(out) = out {
            online::run(&online, state.map(State::as_mut_slice), out, arena);
        }
    });
    Ok(())
}

/// [`Pipeline::define`](crate::stages::pass::Pipeline::define) of a memory.
pub(crate) fn defined<R: Real, X: Input, M: Learns<X>>(
    mechanism: &M,
    x: &X,
    state: Option<&State>,
) -> Result<Defined<R, State>> {
    let online = checked(mechanism, x, state)?;
    let from = state.map(|state| state.view().to_owned());
    let (out, next) = define(&online, mechanism.learning().normalize, from.as_ref())?;
    Ok((out, State::from_f64(&next.mapv(f64::from))))
}

/// The traits of a mechanism that [`Learns`] from inputs of a type with one parameter.
macro_rules! learning {
    ($mechanism:ty, $input:ident) => {
        impl<T: crate::element::Element> crate::stages::pass::Pipeline<$input<'_, T>> for $mechanism {
            type State = crate::input::state::State;

            fn flow(
                &self,
                x: $input<'_, T>,
                state: Option<&mut Self::State>,
                pass: &mut crate::stages::pass::Pass<'_>,
                out: crate::stages::pass::Out<'_, T>,
            ) -> crate::error::Result<()> {
                crate::stages::online::flow(self, &x, state, pass, out)
            }

            fn define<R: crate::definition::number::Real>(
                &self,
                x: $input<'_, T>,
                state: Option<&Self::State>,
            ) -> crate::error::Result<crate::stages::pass::Defined<R, Self::State>> {
                crate::stages::online::defined(self, &x, state)
            }

            fn parameters(&self) -> usize {
                self.learning.bytes()
            }

            fn bound(&self, x: $input<'_, T>) -> crate::error::Result<ndarray::Array3<f64>> {
                self.bound_by::<crate::definition::number::Likely>(x)
            }
        }

        crate::stages::pass::composite!($mechanism, $input, state crate::input::state::State);
    };
}
pub(crate) use learning;

/// Arrays of a trial: steps that keep a chunk of normalised keys from overshooting, and as
/// rates what tokens forget and keep, momentum and thresholds.
pub(crate) fn extras<T: Element>(x: &Qkv<'_, T>, field: &Field, step: f32) -> Extras<T> {
    let (batch, heads, len, _) = x.q.dim();
    let rate = |(_, h, t, i): (usize, usize, usize, usize)| {
        let of = |which| share(field.at(which, h, t, 0));
        [0.2 * of(1), 1.0 - 0.2 * of(1), 0.9 * of(5), 2.0 * of(6)][i]
    };
    Extras {
        betas: field.tokens(2, x, |x| step * share(x)),
        rates: Array4::from_shape_fn((batch, heads, len, 4), rate),
        ..Extras::default()
    }
}

/// A rate of [`extras`].
pub(crate) fn rate<T>(extras: &Extras<T>, i: usize) -> ArrayView3<'_, f32> {
    extras.rates.index_axis(Axis(3), i)
}
