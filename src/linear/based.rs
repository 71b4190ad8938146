//! BASED: linear attention over everything before, and softmax attention over
//! a small window, side by side.

use std::marker::PhantomData;

use ndarray::{Array2, s};

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::recur::{Normaliser, Spec};
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::tokens::token_dims;
use crate::input::views::views;
use crate::input::{Input, Lengths, Qkv};
use crate::mask;
use crate::math::features::Taylor;
use crate::score::Plain;
use crate::stages::attend;
use crate::stages::linear::{self, Memory};
use crate::stages::mapped::Mapped;
use crate::stages::options::{EPSILON, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::window::{Window, join, part};

pub use crate::stages::window::BasedState;

views! {
    /// What both parts of [`Based`] take.
    BasedInput<'a, T> {
        /// Queries and keys `[batch, heads, len, head_dim]` and values `[batch,
        /// heads, len, value_dim]` of linear attention. Heads of keys and values
        /// may be fewer.
        global: array Qkv<'a, T>,
        /// Queries, keys and values of the window: the same but for `head_dim` and
        /// the number of heads of keys and values.
        window: array Qkv<'a, T>,
    }
    lengths(x) x.global.lengths;
    dims(x) {
        let (dims, _) = (token_dims(&x.global)?, token_dims(&x.window)?);
        if matches!(x.window.lengths, Lengths::Tokens(_)) {
            // The window sees pairs, which padding is refused for.
            x.window.dims()?;
        }
        let (want, got) = (x.global.out_dim()?, x.window.out_dim()?);
        if want != got {
            let axes = "an output [batch, heads, len, value_dim]";
            let expected = format!("{axes} = {want:?} as the other part has it");
            return Err(Error::value("window", expected, format_args!("{got:?}")));
        }
        if x.global.lengths != x.window.lengths {
            let got = format_args!("{:?}", x.window.lengths).to_string();
            return Err(Error::value("window", "the lengths of the other part", got));
        }
        Ok(dims)
    }
}

/// BASED: linear attention over everything before, and softmax attention over
/// a small window, side by side.
///
/// ```text
/// w_ij = 1 + t + t^2 / 2                                        t = q_i . k_j / sqrt(head_dim)
/// o_i  = sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + epsilon)
///      + softmax over i - left <= j <= i of (q'_i . k'_j / sqrt(head_dim')) of v'_j
/// ```
///
/// "Simple linear attention language models balance the recall-throughput
/// tradeoff" (arXiv 2402.18668). The first part is
/// [`LinearAttention`](super::LinearAttention) of the features [`Taylor`], and has small queries and
/// keys (`head_dim` 16); the second, with primes, is [`Dense`](crate::dense::Dense) with
/// [`Window`](crate::mask::Window), with queries, keys and values of its own.
/// The paper puts the two into neighbouring layers or adds them up; here they
/// are added. With either part's values 0 the other remains.
///
/// Cost, for `f = 1 + d + d (d + 1) / 2` features: `32 (f + value_dim) + 4 f
/// value_dim` flops a token and head, and those of a window of `left + 1`
/// keys. The state has `f` rows: a `head_dim` far above 16 makes it larger
/// than the cache of a softmax attention over some thousand tokens.
///
/// BASED attention. Causal.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{Based, BasedInput}};
/// use ndarray::Array4;
///
/// let small = Array4::<f32>::ones((1, 4, 100, 16)); // batch, heads, tokens, head_dim
/// let large = Array4::<f32>::ones((1, 4, 100, 64));
/// let global = Qkv::new(small.view(), small.view(), large.view());
/// let window = Qkv::new(large.view(), large.view(), large.view());
/// let based = Based::builder(64).build()?;
/// let out = based.forward(BasedInput { global, window })?;
/// assert!(out.iter().all(|x| (x - 2.0).abs() < 1e-5)); // two means of values
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Based {
    config: Config,
    window: attend::Config<mask::Window, Plain>,
    left: usize,
    epsilon: f32,
}

impl Based {
    /// A window of `left` keys before the query's own, which it has too. The
    /// released layers call a window of 65 keys, `left` 64, one of 128.
    pub fn builder(left: usize) -> BasedBuilder {
        BasedBuilder::with(left)
    }

    /// Keys of the window before the query's own: a state has as many, or those that there
    /// were.
    pub fn left(&self) -> usize {
        self.left
    }
}

options! {
    /// Builds a [`Based`].
    BasedBuilder of Based, form;
    given { left: usize; }
    numbers {
        /// What is added to the sum of the weights of linear attention before
        /// it divides. Default: 1e-12, as in the authors' code; 1e-6 in
        /// flash-linear-attention. The sum is at least half the number of keys.
        epsilon: f32 = 1e-12, in EPSILON;
    }
    build(builder, config) {
        let BasedBuilder { left, epsilon, .. } = builder;
        let mask = mask::Window::new(Some(left), Some(0));
        let window = attend::Options { mask, isa: Some(config.isa), ..attend::Options::default() };
        Ok(Based { config, window: window.build()?, left, epsilon })
    }
}

impl Based {
    fn mapped(&self) -> Mapped<'_> {
        let normaliser = Some(Normaliser::Sum { epsilon: self.epsilon });
        Mapped { config: &self.config, query: &Taylor, key: &Taylor, causal: true, normaliser }
    }

    fn spec<'a, T: Element>(&self, x: &'a BasedInput<'_, T>, state: Option<&BasedState>) -> Result<Spec<'a>> {
        x.dims()?;
        let spec = self.mapped().spec(&x.global)?;
        let Some(state) = state else { return Ok(spec) };
        if spec.dims.packed {
            let reason = "the windows of its sequences would differ in length";
            return Err(Error::Conflict { option: "a packed batch", with: "the state of a window", reason });
        }
        state.global.check(spec.state_shape())?;
        state.window.check([&x.window.k, &x.window.v])?;
        Ok(spec)
    }

    /// Adds up both parts, some tokens of all heads at a time: what is made of these is still in
    /// the cache where it is read.
    fn parts<T: Element, K: Element>(
        &self,
        pass: &mut Pass<'_>,
        global: Qkv<'_, T>,
        window: Qkv<'_, T, K, T>,
        state: &mut [f32],
        mut out: Out<'_, T>,
    ) -> Result<()> {
        let (len, mapped) = (window.q.dim().2, self.mapped());
        let before = window.k.dim().2 - len;
        // Of packed sequences windows would reach from one to the other.
        let step = if window.dims()?.packed { len.max(1) } else { self.step(len) };
        for first in (0..len).step_by(step) {
            let tokens = first..(first + step).min(len);
            let global = if step < len { part(&global, &tokens, &tokens) } else { global.reborrow() };
            let keys = (before + first).saturating_sub(self.left)..before + tokens.end;
            let window = if step < len { part(&window, &tokens, &keys) } else { window.reborrow() };
            let spec = mapped.spec(&global)?;
            pass.within(|pass| {
                let mut sums = pass.rows(global.out_dim()?)?;
                linear::run(pass, &spec, &mapped.source(&global), Some(&mut *state), sums.view_mut());
                let out = out.as_mut().map(|out| out.slice_mut(s![.., .., tokens, ..]));
                self.window.attend_onto(pass, window, sums.view(), out)
            })?;
        }
        Ok(())
    }

    /// Tokens that are taken at a time: whole chunks, and whole tiles of the window's queries.
    /// Keys of the window before them are read again.
    fn step(&self, len: usize) -> usize {
        const LEAST: usize = 192;
        const MOST: usize = 1024;
        self.left.max(len / MOST).saturating_add(1).checked_next_multiple_of(LEAST).unwrap_or(len.max(1))
    }

    fn empty<T: Element>(&self, x: &BasedInput<'_, T>) -> Result<BasedState> {
        let global = State::zeros(self.spec(x, None)?.state_shape())?;
        let state = BasedState { global, window: Window::empty([&x.window.k, &x.window.v]) };
        self.spec(x, Some(&state)).map(|_| state)
    }
}

impl<T: Element> Pipeline<BasedInput<'_, T>> for Based {
    type State = BasedState;

    fn flow(
        &self,
        x: BasedInput<'_, T>,
        state: Option<&mut BasedState>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (spec, isa, runs) = (self.spec(&x, state.as_deref())?, self.config.isa, out.is_some());
        let Some(BasedState { global, window }) = state else {
            let (sequences, heads, rows, cols) = spec.state_shape();
            let sums = pass.take(sequences * heads * rows * cols)?;
            sums.fill(0.0);
            return self.parts(pass, x.global, x.window, sums, out);
        };
        let (Qkv { q, k, v, .. }, [keys, values]) = (x.window, window.view());
        let k = join(pass, isa, k.dim().1, Some(keys), k)?;
        let v = join(pass, isa, v.dim().1, Some(values), v)?;
        let (lengths, to) = (Lengths::Full, PhantomData);
        let all = Qkv { q: q.reborrow(), k: k.view(), v: v.view(), lengths, out: to };
        self.parts(pass, x.global, all, global.as_mut_slice(), out)?;
        if runs {
            window.keep([k.view(), v.view()], self.left);
        }
        Ok(())
    }

    fn define<R: Real>(
        &self,
        x: BasedInput<'_, T>,
        state: Option<&BasedState>,
    ) -> Result<Defined<R, BasedState>> {
        let (spec, left, epsilon) = (self.spec(&x, state)?, self.left, R::of(f64::from(self.epsilon)));
        let of_window = [&x.window.k, &x.window.v];
        let mut state = match state {
            Some(state) => state.clone(),
            None => {
                BasedState { global: State::zeros(spec.state_shape())?, window: Window::empty(of_window) }
            }
        };
        let [keys, values] = state.window.followed_by(of_window);
        let before = keys.dim().2 - x.window.k.dim().2;
        let scale = 1.0 / (x.window.q.dim().3.max(1) as f64).sqrt();
        let out = of_heads(&spec.dims, &x.global.lengths, |head| {
            let seen = head.keys.start..before + head.keys.end;
            let (k, v) = (head.rows(&keys.view(), &seen), head.rows(&values.view(), &seen));
            let visible = |i, j| (j <= before + i && before + i - j <= left).then_some(0.0);
            let window: Array2<R> =
                attend::define([&head.rows(&x.window.q, &head.queries), &k, &v], scale, visible);
            let q = head.features(&Taylor, &x.global.q, &head.queries);
            let k = head.features(&Taylor, &x.global.k, &head.keys);
            let v = head.rows(&x.global.v, &head.keys);
            let at = [head.sequence, head.head];
            let global = linear::on_state(&mut state.global, at, |memory: &mut Memory<R>| {
                memory.define([&q, &k, &v], true, |memory, _, q| memory.mean(q, |_| R::of(0.0), epsilon))
            });
            Array2::from_shape_fn(window.dim(), |at| global[at] + window[at])
        });
        state.window.keep([keys.view(), values.view()], left);
        Ok((out, state))
    }
}

composite!(Based, BasedInput, state BasedState);

exhibit! {
    BasedExhibit of Based, "linear", "BASED", "arXiv 2402.18668";
    "the exponential's Taylor series for all keys, and exact softmax for the last 16";
    not "for large feature dimensions: features are as many as pairs of channels";
    tokens true, forms form, variants 4;
    build(_, field) { Based::builder([16, 0, 5, 1000][field.variant]) }
    input<'a, T>(x, _) -> BasedInput<'a, T> {
        {
            // Features are as many as pairs of channels: of a few.
            let few = x.q.dim().3.min(x.k.dim().3).min(8);
            let global = Qkv {
                q: x.q.reborrow().slice_move(s![.., .., .., ..few]),
                k: x.k.reborrow().slice_move(s![.., .., .., ..few]),
                ..x.reborrow()
            };
            BasedInput { global, window: x }
        }
    }
}
carded!(Based, BasedExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, error, held, refused};
    use crate::{Attention, Bounded, Recurrent};

    /// Both parts of an input, of other sizes.
    fn parts(len: usize, seed: u64) -> [Qkvs; 2] {
        [Qkvs::new([2, 4, 2, len, len, 12, 20], seed), Qkvs::new([2, 4, 1, len, len, 24, 20], seed + 1)]
    }

    fn input([global, window]: &[Qkvs; 2]) -> BasedInput<'_, f32> {
        BasedInput { global: global.qkv(), window: window.qkv() }
    }

    fn based(left: usize) -> Based {
        Based::builder(left).build().unwrap()
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        for (len, left) in [(1, 64), (9, 0), (64, 64), (130, 3), (130, 1000), (401, 20)] {
            let based = Based::builder(left).epsilon(1e-6).build().unwrap();
            println!("based: {:.3} of the bound", held(&based, input(&parts(len, 1))));
        }
    }

    #[test]
    fn each_part_is_what_it_says() {
        let mut x = parts(70, 3);
        let both = based(7).reference(input(&x)).unwrap();
        // All keys in the window: dense.
        let all = based(70).reference(input(&x)).unwrap();
        let dense = Dense::builder().causal().build().unwrap().reference(x[1].qkv()).unwrap();
        x[0].v.fill(0.0);
        let [window, all_window] = [7, 70].map(|left| based(left).reference(input(&x)).unwrap());
        close(&all_window, &dense, 1e-12);
        close(&(&both - &window), &(all - all_window), 1e-12);
        // Queries of 0 make every weight 1: a running mean of the values.
        let mut x = parts(40, 4);
        x[0].q.fill(0.0);
        x[1].v.fill(0.0);
        let exact = Based::builder(7).epsilon(0.0).build().unwrap();
        for ((b, h, t, c), out) in exact.reference(input(&x)).unwrap().indexed_iter() {
            let mean = x[0].v.slice(s![b, h / 2, ..=t, c]).mapv(f64::from).mean().unwrap();
            assert!((out - mean).abs() < 1e-12, "token {t}: {out}, not {mean}");
        }
    }

    #[test]
    fn states_are_saved() {
        let (x, of) = (parts(270, 5), |x: &[Qkvs; 2], range: std::ops::Range<usize>| {
            [0, 1].map(|i| x[i].slice(range.clone(), range.clone()))
        });
        for left in [0, 5, 64, 1000] {
            let (based, rest) = (based(left), of(&x, 66..270));
            let mut state = based.initial_state(input(&x)).unwrap();
            based.prefill(input(&of(&x, 0..66)), &mut state).unwrap();
            assert_eq!(state.keys().dim().2, left.min(66));
            assert_eq!(state.values(), x[1].v.slice(s![.., .., 66 - left.min(66)..66, ..]));
            let global = State::new(state.global().view().to_owned()).unwrap();
            let (keys, values) = (state.keys().to_owned(), state.values().to_owned());
            let mut restored = BasedState::new(global, keys, values).unwrap();
            assert_eq!(restored, state);
            let again = based.prefill(input(&rest), &mut restored).unwrap();
            assert_eq!(again, based.prefill(input(&rest), &mut state).unwrap());
            let want = based.reference(input(&x)).unwrap();
            let bound = based.error_bound(input(&x)).unwrap();
            for ((b, h, t, c), &got) in again.indexed_iter() {
                let off = (f64::from(got) - want[[b, h, 66 + t, c]]).abs();
                assert!(off <= bound[[b, h, 66 + t]], "left {left}, token {t}: {off} off");
            }
        }
    }

    #[test]
    fn refusals() {
        let (x, longer, single) = (parts(5, 6), parts(6, 6), Qkvs::new([1, 1, 1, 5, 5, 8, 8], 1));
        let offsets = [0, 2, 5];
        let packed = single.qkv().packed(&offsets, &offsets);
        for (x, want) in [
            (
                BasedInput { global: x[0].qkv(), window: longer[1].qkv() },
                "window: expected an output [batch, heads, len, value_dim] = (2, 4, 5, 20) as the other part has it, got (2, 4, 6, 20)",
            ),
            (
                BasedInput { global: packed, window: single.qkv() },
                "window: expected the lengths of the other part, got Full",
            ),
        ] {
            assert_eq!(refused(&based(4), x), want);
        }
        let x = BasedInput { global: packed, window: packed };
        held(&based(4), x);
        assert_eq!(
            error(based(4).initial_state(x)),
            "a packed batch cannot be combined with the state of a window: the windows of its sequences would differ in length"
        );
        let want = "epsilon: expected a finite number of at least 0, got -0.5";
        assert_eq!(error(Based::builder(4).epsilon(-0.5).build()), want);
    }
}
