//! Log-linear attention: states of segments of the past, the longer the further back,
//! each read with a weight of its own.

use ndarray::{Array2, Array4, s};

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::state::State;
use crate::input::tokens::Tokens;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::levels::{self, Levels, levels_of};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;

input! {
    /// Queries, keys and values with a log decay and weights of levels for each token:
    /// what [`LogLinear`] takes.
    LevelQkv(qkv) {
        /// Natural logarithms of what a token leaves of all states: at most 0,
        /// `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len],
        /// What a query weighs itself with, and then its level of one token, of two, of
        /// four.
        weights: f32 [batch, heads/, len, levels],
    }
}

/// What [`LogLinear`] carries from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct LevelState {
    pub(crate) states: State,
    pub(crate) tokens: Vec<usize>,
}

impl LevelState {
    /// A state of these parts, for instance one that was saved: matrices of the levels,
    /// one below the other, `[sequences, heads, levels * head_dim, value_dim]`, and how many
    /// tokens each sequence has had.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of sequences.
    pub fn new(states: State, tokens: &[usize]) -> Result<Self> {
        let sequences = states.view().dim().0;
        if tokens.len() != sequences {
            return Err(Error::value(
                "tokens",
                format!("one for each of {sequences} sequences"),
                tokens.len(),
            ));
        }
        Ok(Self { states, tokens: tokens.to_vec() })
    }

    /// Matrices of the levels from the first on, one below the other, `[sequences, heads,
    /// levels * head_dim, value_dim]`: 0 where the bit of the tokens is not set.
    pub fn states(&self) -> &State {
        &self.states
    }

    /// How many tokens each sequence has had.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }
}

/// Log-linear attention: states of segments of the past, the longer the further back,
/// each read with a weight of its own.
///
/// ```text
/// o_i = scale * sum_{j <= i} weight_i[level(i, j)] exp(g_{j+1} + .. + g_i) (q_i . k_j) v_j
/// level(i, j) = bits of (i xor j): 0 for the token itself
/// ```
///
/// "Log-Linear Attention" (arXiv 2506.04761), over Mamba-2's recurrence. The keys of
/// one level of a query are the `2^(level - 1)` tokens that a Fenwick tree sums up in one
/// node: there is a state for each bit of `i` that is set. With weights of 1 it is
/// [`SimpleGla`](crate::linear::SimpleGla). Models make the weights by a softplus of a
/// projection, and have a scale of 1 in the paper, of `1 / sqrt(head_dim)` in recent code.
///
/// A sequence of `n` tokens has `ceil(log2 n) + 1` levels. Where more are to follow, as many
/// as the whole sequence has: the state has room for a matrix each.
///
/// Cost: as [`SimpleGla`](crate::linear::SimpleGla), and on average `head_dim value_dim`
/// flops a token for each level from the seventh on. A step reads all states. The tokens
/// of a head are one thread's work.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{LevelQkv, LogLinear}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let decay = Array3::from_elem((1, 2, 100), -0.01);
/// let weights = Array4::from_elem((1, 2, 100, 8), 0.5); // up to 128 tokens
///
/// let attention = LogLinear::builder().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = attention.forward(LevelQkv::new(qkv, decay.view(), weights.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LogLinear {
    config: Config,
}

impl LogLinear {
    /// As the paper has it.
    pub fn builder() -> LogLinearBuilder {
        LogLinearBuilder::with()
    }
}

options! {
    /// Builds a [`LogLinear`].
    LogLinearBuilder of LogLinear, form scale "1";
    build(this, config) {
        Ok(LogLinear { config })
    }
}

impl LogLinear {
    fn dims<T: Element>(&self, x: &LevelQkv<'_, T>, state: Option<&LevelState>) -> Result<Dims> {
        let (dims, levels) = (x.token_dims()?, x.weights.dim().3);
        self.config.check_decays("log_decay", x.log_decay)?;
        if let Some(LevelState { states, .. }) = state {
            states.check((dims.batch, dims.q_heads, levels.saturating_mul(dims.head_dim), dims.value_dim))?;
        }
        for i in 0..dims.batch {
            let before = state.map_or(0, |state| state.tokens[i]);
            let tokens = before.saturating_add(x.qkv.lengths.sequence(&dims, i).queries.len());
            if levels < levels_of(tokens) {
                let expected = format!("{} levels or more, for {tokens} tokens", levels_of(tokens));
                return Err(Error::value("weights", expected, levels));
            }
        }
        Ok(dims)
    }

    fn empty<T: Element>(&self, x: &LevelQkv<'_, T>) -> Result<LevelState> {
        let Dims { batch, q_heads, head_dim, value_dim, .. } = self.dims(x, None)?;
        let rows = x.weights.dim().3.saturating_mul(head_dim);
        Ok(LevelState { states: State::zeros((batch, q_heads, rows, value_dim))?, tokens: vec![0; batch] })
    }
}

impl<T: Element> Pipeline<LevelQkv<'_, T>> for LogLinear {
    type State = LevelState;

    fn flow(
        &self,
        x: LevelQkv<'_, T>,
        state: Option<&mut LevelState>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.dims(&x, state.as_deref())?;
        let any = |x| T::any(Heads::new(x));
        let x = Levels {
            q: any(x.qkv.q),
            k: any(x.qkv.k),
            v: any(x.qkv.v),
            decay: x.log_decay,
            weights: AnyArray::F32(Heads::new(x.weights)),
            dims,
            lengths: x.qkv.lengths,
            scale: self.config.scale(&dims) as f32,
            form: self.config.form,
        };
        // A state that can be counted, for each thread.
        State::countable((
            dims.batch,
            dims.q_heads,
            x.weights.dim().3.saturating_mul(dims.head_dim),
            dims.value_dim,
        ))?;
        let Some(LevelState { states, tokens }) = state else {
            levels::run(pass, self.config.isa, &x, None, out);
            return Ok(());
        };
        levels::run(pass, self.config.isa, &x, Some((states.as_mut_slice(), tokens)), out);
        pass.stage(
            || 0,
            0,
            |_| {
                for (i, tokens) in tokens.iter_mut().enumerate() {
                    *tokens += x.lengths.sequence(&dims, i).queries.len();
                }
            },
        );
        Ok(())
    }

    fn define<R: Real>(
        &self,
        x: LevelQkv<'_, T>,
        state: Option<&LevelState>,
    ) -> Result<Defined<R, LevelState>> {
        let dims = self.dims(&x, state)?;
        let mut state = state.map_or_else(|| self.empty(&x), |state| Ok(state.clone()))?;
        let (scale, dim) = (R::rounded(self.config.scale(&dims), 1.0), dims.head_dim);
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let of = |level: usize| s![head.sequence, head.head, level * dim..(level + 1) * dim, ..];
            let view = state.states.view();
            let all = 0..x.weights.dim().3;
            let mut states: Vec<Array2<R>> =
                all.map(|level| view.slice(of(level)).map(|&x| R::of(f64::from(x)))).collect();
            let rows = |x| head.rows::<R, T>(x, &head.keys);
            let (q, k, v) = (rows(&x.qkv.q), rows(&x.qkv.k), rows(&x.qkv.v));
            let (g, own) = (&x.log_decay, head.of(x.log_decay.dim().1));
            let log_decay = |t| f64::from(g[[head.batch, own, head.keys.start + t]]);
            let weights = head.rows(&x.weights, &head.keys);
            let tokens = state.tokens[head.sequence];
            let out = levels::define(&mut states, tokens, [&q, &k, &v, &weights], log_decay);
            for (level, sums) in states.iter().enumerate() {
                state.states.view_mut().slice_mut(of(level)).assign(&sums.map(|x| x.value() as f32));
            }
            out.mapv(|x| scale * x)
        });
        for (i, tokens) in state.tokens.iter_mut().enumerate() {
            *tokens += x.qkv.lengths.sequence(&dims, i).queries.len();
        }
        Ok((out, state))
    }
}

composite!(LogLinear, LevelQkv, state LevelState);

exhibit! {
    LogLinearExhibit of LogLinear, "linear", "Log-linear attention", "arXiv 2506.04761";
    "a state for each power of two of the past, each read with a weight of its own";
    not "where one state will do: gated linear attention reads one";
    tokens true, forms form, variants 2;
    build(_, field) {
        let builder = LogLinear::builder();
        if field.variant == 0 { builder } else { builder.scale(0.3) }
    }
    extras(x, field) {
        let (batch, heads, len, _) = x.q.dim();
        let weight = |(_, h, t, level)| 1.5 * share(field.at(3, h, t, level));
        let channels = Array4::from_shape_fn((batch, heads, len, levels_of(len)), weight);
        Extras { decays: field.token_decays(x), channels, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> LevelQkv<'a, T> {
        LevelQkv::new(x, extras.decays.view(), extras.channels.view())
    }
}
carded!(LogLinear, LogLinearExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{Form, SimpleGla, TokenGated};
    use crate::testing::{GATES, agree, array, pairs, within};
    use crate::{Attention, Bounded, Recurrent};
    use ndarray::Array3;

    #[test]
    fn definition_weighs_all_pairs_and_kernels_keep_to_it() {
        let (q, k, v) = (array([1, 4, 270, 8], 1), array([1, 2, 270, 8], 2), array([1, 2, 270, 5], 3));
        let weights = array([1, 4, 270, 10], 4);
        let all = Array4::from_shape_fn((1, 4, 270, 5), |(b, h, t, c)| v[[b, h / 2, t, c]]);
        for gates in GATES {
            let g = gates.tokens([1, 4, 270], 5);
            let x = LevelQkv::new(Qkv::new(q.view(), k.view(), v.view()), g.view(), weights.view());
            let attention = LogLinear::builder().scale(0.7).build().unwrap();
            let got = attention.reference(x).unwrap();
            let want = pairs(&all, |b, h, i, j| {
                let level = (0..).find(|&level| i >> level == j >> level).unwrap();
                let dot: f64 =
                    (0..8).map(|c| f64::from(q[[b, h, i, c]]) * f64::from(k[[b, h / 2, j, c]])).sum();
                let decay: f64 = (j + 1..=i).map(|t| f64::from(g[[b, h, t]])).sum();
                f64::from(0.7f32) * f64::from(weights[[b, h, i, level]]) * decay.exp() * dot
            });
            agree(&got, &want);
            for form in [Form::Chunked, Form::Recurrent] {
                let kernel = LogLinear::builder().scale(0.7).form(form).build().unwrap();
                let bound = kernel.error_bound(x).unwrap();
                println!(
                    "{gates:?}: {:.3} of the bound",
                    within("levels", &kernel.forward(x).unwrap(), &got, &bound)
                );
            }
        }
    }

    #[test]
    fn weights_of_one_are_linear_attention_and_those_of_the_token_alone_read_nothing_else() {
        let (q, k, v) = (array([1, 2, 200, 8], 1), array([1, 2, 200, 8], 2), array([1, 2, 200, 5], 3));
        let g = GATES[1].tokens([1, 2, 200], 4);
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let attention = LogLinear::builder().build().unwrap();
        let ones = Array4::ones((1, 2, 200, 9));
        let x = LevelQkv::new(qkv, g.view(), ones.view());
        let gla = SimpleGla::builder().scale(1.0).build().unwrap();
        let gated = TokenGated::new(qkv, g.view());
        agree(&attention.reference(x).unwrap(), &gla.reference(gated).unwrap());
        // States add up to the one state.
        let (mut state, mut one) = (attention.initial_state(x).unwrap(), gla.initial_state(gated).unwrap());
        attention.prefill(x, &mut state).unwrap();
        gla.prefill(gated, &mut one).unwrap();
        for ((_, h, d, c), &want) in one.view().indexed_iter() {
            let sum: f32 = (0..9).map(|level| state.states().view()[[0, h, level * 8 + d, c]]).sum();
            assert!((sum - want).abs() < 1e-4, "{sum}, not {want}");
        }
        let own = Array4::from_shape_fn((1, 2, 200, 9), |(_, _, _, level)| f32::from(u8::from(level == 0)));
        let out = attention.forward(LevelQkv { weights: own.view(), ..x }).unwrap();
        for ((b, h, t, c), x) in out.indexed_iter() {
            let dot: f32 = (0..8).map(|c| q[[b, h, t, c]] * k[[b, h, t, c]]).sum();
            assert!((x - dot * v[[b, h, t, c]]).abs() < 1e-5);
        }
    }

    #[test]
    fn refusals() {
        let (x, g) = (array([1, 2, 6, 8], 1), Array3::zeros((1, 2, 6)));
        let attention = LogLinear::builder().build().unwrap();
        let (few, enough) = (Array4::zeros((1, 2, 6, 3)), Array4::zeros((1, 2, 6, 4)));
        let input = |weights| LevelQkv::new(Qkv::new(x.view(), x.view(), x.view()), g.view(), weights);
        let error = attention.forward(input(few.view())).unwrap_err().to_string();
        assert_eq!(error, "weights: expected 4 levels or more, for 6 tokens, got 3");
        let mut state = attention.initial_state(input(enough.view())).unwrap();
        attention.prefill(input(enough.view()), &mut state).unwrap();
        assert_eq!(state.tokens(), [6]);
        let before = state.clone();
        let error = attention.prefill(input(enough.view()), &mut state).unwrap_err().to_string();
        assert_eq!(error, "weights: expected 5 levels or more, for 12 tokens, got 4");
        assert_eq!(state, before);
        let error = LevelState::new(before.states().clone(), &[1, 2]).unwrap_err().to_string();
        assert_eq!(error, "tokens: expected one for each of 1 sequences, got 2");
    }
}
