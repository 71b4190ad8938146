//! BASED: linear attention over everything before, and softmax attention over
//! a small window, side by side.
//!
//! ```text
//! w_ij = 1 + t + t^2 / 2                                        t = q_i . k_j / sqrt(head_dim)
//! o_i  = sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + epsilon)
//!      + softmax over i - left <= j <= i of (q'_i . k'_j / sqrt(head_dim')) of v'_j
//! ```
//!
//! "Simple linear attention language models balance the recall-throughput
//! tradeoff" (arXiv 2402.18668). The first part is
//! [`LinearAttention`] of the features [`Taylor`], and has small queries and
//! keys (`head_dim` 16); the second, with primes, is [`Dense`] with
//! [`Window`](crate::mask::Window), with queries, keys and values of its own.
//! The paper puts the two into neighbouring layers or adds them up; here they
//! are added. With either part's values 0 the other remains.
//!
//! Cost, for `f = 1 + d + d (d + 1) / 2` features: `32 (f + value_dim) + 4 f
//! value_dim` flops a token and head, and those of a window of `left + 1`
//! keys. The state has `f` rows: a `head_dim` far above 16 makes it larger
//! than the cache of a softmax attention over some thousand tokens.

use ndarray::{Array3, Array4, ArrayView0, ArrayView4, ArrayViewMut4, Zip, aview0, s};

use crate::attention::{Attention, Bounded, Cost, Input, Recurrent};
use crate::card::{carded, exhibit};
use crate::dense::Dense;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::engine::{self, recur};
use crate::error::{Error, Result};
use crate::input::tokens::token_dims;
use crate::input::{Dims, Lengths, Qkv};
use crate::linear::{LinearAttention, State};
use crate::mask::Window;
use crate::math::features::Taylor;
use crate::simd::mem::{Arena, bytes_for};
use crate::stages::attend::Attending;
use crate::stages::recur::{Options, linear_options};
use crate::stages::recur::{Recurrence, check_out};

/// What both parts of [`Based`] take.
#[derive(Clone, Copy, Debug)]
pub struct BasedInput<'a, T> {
    /// Queries and keys `[batch, heads, len, head_dim]` and values `[batch,
    /// heads, len, value_dim]` of linear attention. Heads of keys and values
    /// may be fewer.
    pub global: Qkv<'a, T>,
    /// Queries, keys and values of the window: the same but for `head_dim` and
    /// the number of heads of keys and values.
    pub window: Qkv<'a, T>,
}

impl<'a, T> BasedInput<'a, T> {
    /// Reborrows.
    pub fn reborrow<'b>(self) -> BasedInput<'b, T>
    where
        'a: 'b,
    {
        BasedInput { global: self.global.reborrow(), window: self.window.reborrow() }
    }
}

impl<T: Element> Input for BasedInput<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.global.lengths
    }

    /// The sizes of the first part.
    fn dims(&self) -> Result<Dims> {
        let dims = token_dims(&self.global)?;
        token_dims(&self.window)?;
        let (want, got) = (self.global.out_dim()?, self.window.out_dim()?);
        if want != got {
            let expected =
                format!("an output [batch, heads, len, value_dim] = {want:?} as the other part has it");
            return Err(Error::value("window", expected, format_args!("{got:?}")));
        }
        if self.global.lengths != self.window.lengths {
            let expected = "the lengths of the other part";
            return Err(Error::value("window", expected, format_args!("{:?}", self.window.lengths)));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        self.dims()?;
        self.global.out_dim()
    }
}

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
    global: LinearAttention<Taylor>,
    window: Dense<Window>,
    left: usize,
}

/// Builds a [`Based`].
#[derive(Clone, Debug)]
pub struct BasedBuilder {
    options: Options,
    left: usize,
    epsilon: f32,
}

impl Based {
    /// A window of `left` keys before the query's own, which it has too. The
    /// released layers call a window of 65 keys, `left` 64, one of 128.
    pub fn builder(left: usize) -> BasedBuilder {
        BasedBuilder { options: Options::default(), left, epsilon: 1e-12 }
    }
}

linear_options!(BasedBuilder);

impl BasedBuilder {
    /// What is added to the sum of the weights of linear attention before it
    /// divides. Default: 1e-12, as in the authors' code; 1e-6 in
    /// flash-linear-attention. The sum is at least half the number of keys.
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for an epsilon that is negative or not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Based> {
        let Options { form, isa, .. } = self.options;
        let global = LinearAttention::builder().features(Taylor).causal().epsilon(self.epsilon).form(form);
        let window = Dense::builder().mask(Window::new(Some(self.left), Some(0)));
        let (global, window) = match isa {
            Some(isa) => (global.isa(isa), window.isa(isa)),
            None => (global, window),
        };
        Ok(Based { global: global.build()?, window: window.build()?, left: self.left })
    }
}

/// What [`Based`] carries from token to token: the state of linear attention,
/// and the last keys and values of the window.
#[derive(Clone, Debug, PartialEq)]
pub struct BasedState {
    global: State,
    /// `[batch, kv_heads, room, head_dim]`, the oldest first.
    keys: Array4<f32>,
    /// `[batch, kv_heads, room, value_dim]`
    values: Array4<f32>,
    /// Tokens that are there.
    len: usize,
}

impl BasedState {
    /// The state of linear attention.
    pub fn global(&self) -> &State {
        &self.global
    }

    /// The keys that the next token's window begins with, `[batch, kv_heads,
    /// at most left, head_dim]`.
    pub fn keys(&self) -> ArrayView4<'_, f32> {
        self.keys.slice(s![.., .., ..self.len, ..])
    }

    /// Their values.
    pub fn values(&self) -> ArrayView4<'_, f32> {
        self.values.slice(s![.., .., ..self.len, ..])
    }

    /// Keeps the last `left` of all tokens.
    fn keep(&mut self, keys: &ArrayView4<'_, f32>, values: &ArrayView4<'_, f32>, left: usize) {
        let all = keys.dim().2;
        let len = all.min(left);
        for (kept, all_rows) in [(&mut self.keys, keys), (&mut self.values, values)] {
            let (batch, heads, room, dim) = kept.dim();
            if len > room {
                let room = len.max(2 * room).min(left);
                *kept = Array4::zeros((batch, heads, room, dim));
            }
            kept.slice_mut(s![.., .., ..len, ..]).assign(&all_rows.slice(s![.., .., all - len.., ..]));
        }
        self.len = len;
    }
}

/// Queries of a call, and the keys and values of the state and of the call.
struct Joined<'a> {
    q: ArrayViewMut4<'a, f32>,
    k: ArrayViewMut4<'a, f32>,
    v: ArrayViewMut4<'a, f32>,
}

impl<'a> Joined<'a> {
    fn dims<T>(x: &Qkv<'_, T>, state: &BasedState) -> [(usize, usize, usize, usize); 3] {
        let longer = |(b, h, n, d)| (b, h, n + state.len, d);
        [x.q.dim(), longer(x.k.dim()), longer(x.v.dim())]
    }

    /// Where they lie one after the other, and how many numbers that is.
    fn sizes<T>(x: &Qkv<'_, T>, state: &BasedState) -> [usize; 3] {
        Self::dims(x, state).map(|(b, h, n, d)| b * h * n * d)
    }

    fn new<T: Element>(x: &Qkv<'_, T>, state: &BasedState, room: [&'a mut [f32]; 3]) -> Result<Self> {
        let [q, k, v] = Self::dims(x, state);
        let [q_room, k_room, v_room] = room;
        let mut joined = Self { q: shaped(q, q_room)?, k: shaped(k, k_room)?, v: shaped(v, v_room)? };
        joined.q.zip_mut_with(&x.q, |to, x| *to = x.to_f32());
        for (joined, old, new) in [(&mut joined.k, state.keys(), &x.k), (&mut joined.v, state.values(), &x.v)]
        {
            joined.slice_mut(s![.., .., ..state.len, ..]).assign(&old);
            joined.slice_mut(s![.., .., state.len.., ..]).zip_mut_with(new, |to, x| *to = x.to_f32());
        }
        Ok(joined)
    }

    fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

/// `room`, which must have just that many numbers, as an array.
pub(crate) fn shaped(dim: (usize, usize, usize, usize), room: &mut [f32]) -> Result<ArrayViewMut4<'_, f32>> {
    let numbers = room.len();
    ArrayViewMut4::from_shape(dim, room)
        .map_err(|_| Error::value("workspace", format!("as many numbers as {dim:?} has"), numbers))
}

/// An array of one number for its sizes alone.
pub(crate) fn like<'a>(
    zero: &'a ArrayView0<'_, f32>,
    dim: (usize, usize, usize, usize),
) -> Result<ArrayView4<'a, f32>> {
    zero.broadcast(dim)
        .ok_or_else(|| Error::value("workspace", "sizes that memory has", format_args!("{dim:?}")))
}

impl Based {
    /// Refuses what the two parts do.
    fn check<T: Element>(&self, x: &BasedInput<'_, T>) -> Result<()> {
        x.dims()?;
        self.window.with_call(x.window.reborrow(), |_| ())?;
        Recurrence::spec::<T>(&self.global, &x.global)?;
        Ok(())
    }

    /// The sum of the two parts.
    fn run<T: Element, U: Element>(
        &self,
        global: &Qkv<'_, T>,
        window: Qkv<'_, U>,
        state: Option<&mut State>,
        mut out: ArrayViewMut4<'_, T>,
        mut arena: Arena<'_>,
    ) -> Result<()> {
        let dim = out.dim();
        let (mut first, mut second) =
            (shaped(dim, arena.take(out.len()))?, shaped(dim, arena.take(out.len()))?);
        let spec = Recurrence::spec::<T>(&self.global, global)?;
        let state = state.map(State::as_mut_slice);
        self.global.with_source::<T, _>(global, |source| {
            recur::run_in(&spec, source, state, first.view_mut(), arena.reborrow());
        });
        let to = second.view_mut();
        self.window.with_call(window.reborrow(), |call| engine::run_in(call, to, None, arena))?;
        Zip::from(&mut out).and(&first).and(&second).for_each(|out, a, b| *out = T::from_f32(a + b));
        Ok(())
    }

    /// Bytes of scratch that [`run`](Self::run) needs.
    fn scratch<T: Element, U: Element>(&self, global: &Qkv<'_, T>, window: Qkv<'_, U>) -> Result<usize> {
        let (b, h, n, d) = global.out_dim()?;
        let spec = Recurrence::spec::<T>(&self.global, global)?;
        let engines = recur::workspace_bytes(&spec)
            .max(self.window.with_call(window.reborrow(), engine::workspace_bytes)?);
        Ok(2 * bytes_for::<f32>(b * h * n * d) + engines)
    }

    fn check_state<T: Element>(&self, x: &BasedInput<'_, T>, state: &BasedState) -> Result<()> {
        self.check(x)?;
        if x.dims()?.packed {
            let reason = "the windows of its sequences would differ in length";
            return Err(Error::Conflict { option: "a packed batch", with: "the state of a window", reason });
        }
        state.global.check(Recurrence::spec::<T>(&self.global, &x.global)?.state_shape())?;
        let (batch, heads, _, head_dim) = x.window.k.dim();
        for (argument, kept, dim) in
            [("state keys", &state.keys, head_dim), ("state values", &state.values, x.window.v.dim().3)]
        {
            let (b, h, _, d) = kept.dim();
            if (b, h, d) != (batch, heads, dim) {
                let expected = format!("[batch, kv_heads, _, dim] = [{batch}, {heads}, _, {dim}]");
                return Err(Error::shape(argument, expected, kept.shape()));
            }
        }
        Ok(())
    }
}

impl<T: Element> Attention<BasedInput<'_, T>> for Based {
    fn workspace_bytes(&self, x: BasedInput<'_, T>) -> Result<usize> {
        self.check(&x)?;
        self.scratch(&x.global, x.window.reborrow())
    }

    fn forward_into(
        &self,
        x: BasedInput<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check(&x)?;
        check_out(&x, &out)?;
        let arena = workspace.arena(self.scratch(&x.global, x.window.reborrow())?)?;
        self.run(&x.global, x.window.reborrow(), None, out, arena)
    }

    fn reference(&self, x: BasedInput<'_, T>) -> Result<Array4<f64>> {
        self.check(&x)?;
        Ok(self.global.reference(x.global.reborrow())? + self.window.reference(x.window.reborrow())?)
    }

    fn cost(&self, x: BasedInput<'_, T>) -> Result<Cost> {
        self.check(&x)?;
        let global = self.global.cost(x.global.reborrow())?;
        let window = self.window.cost(x.window.reborrow())?;
        let (b, h, n, d) = x.out_dim()?;
        let once = (b * h * n * d * size_of::<T>()) as u64;
        Ok(Cost { flops: global.flops + window.flops, bytes: global.bytes + window.bytes - once })
    }
}

impl<T: Element> Bounded<BasedInput<'_, T>> for Based {
    fn error_bound(&self, x: BasedInput<'_, T>) -> Result<Array3<f64>> {
        self.check(&x)?;
        let mut bound =
            self.global.error_bound(x.global.reborrow())? + self.window.error_bound(x.window.reborrow())?;
        // And the sum is rounded.
        for ((b, h, t, _), x) in self.reference(x)?.indexed_iter() {
            bound[[b, h, t]] += x.abs() * f32::ROUNDING;
        }
        Ok(bound)
    }
}

impl<T: Element> Recurrent<BasedInput<'_, T>> for Based {
    type State = BasedState;

    fn initial_state(&self, x: BasedInput<'_, T>) -> Result<BasedState> {
        let empty = |(batch, heads, _, dim)| Array4::zeros((batch, heads, 0, dim));
        let state = BasedState {
            global: self.global.initial_state(x.global.reborrow())?,
            keys: empty(x.window.k.dim()),
            values: empty(x.window.v.dim()),
            len: 0,
        };
        self.check_state(&x, &state)?;
        Ok(state)
    }

    fn prefill_into(
        &self,
        x: BasedInput<'_, T>,
        state: &mut BasedState,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check_state(&x, state)?;
        check_out(&x, &out)?;
        let sizes = Joined::sizes(&x.window, state);
        let copies: usize = sizes.iter().map(|&n| bytes_for::<f32>(n)).sum();
        // Arrays of the same sizes say how much the engines need.
        let [q, k, v] = Joined::dims(&x.window, state);
        let zero = aview0(&0f32);
        let window = Qkv::new(like(&zero, q)?, like(&zero, k)?, like(&zero, v)?);
        let engines = self.scratch(&x.global, window)?;
        let mut arena = workspace.arena(copies.saturating_add(engines))?;
        let joined = Joined::new(&x.window, state, sizes.map(|n| arena.take(n)))?;
        self.run(&x.global, joined.qkv(), Some(&mut state.global), out, arena)?;
        state.keep(&joined.k.view(), &joined.v.view(), self.left);
        Ok(())
    }

    fn reference_from(&self, x: BasedInput<'_, T>, state: &BasedState) -> Result<(Array4<f64>, BasedState)> {
        self.check_state(&x, state)?;
        let mut room = Joined::sizes(&x.window, state).map(|n| vec![0.0; n]);
        let joined = Joined::new(&x.window, state, room.each_mut().map(Vec::as_mut_slice))?;
        let (global, next) = self.global.reference_from(x.global.reborrow(), &state.global)?;
        let out = global + self.window.reference(joined.qkv())?;
        let mut state = BasedState { global: next, ..state.clone() };
        state.keep(&joined.k.view(), &joined.v.view(), self.left);
        Ok((out, state))
    }
}

exhibit! {
    BasedExhibit of Based, "linear", "BASED", "arXiv 2402.18668";
    "the exponential's Taylor series for all keys, and exact softmax for the last 16";
    not "for large feature dimensions: features are as many as pairs of channels";
    tokens true;
    build(_, _) {
        Based::builder(16)
    }
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
    use crate::linear::Form;
    use crate::testing::LENGTHS;
    use crate::testing::qkv::{Qkvs, close, held};

    /// Both parts of an input, of other sizes.
    fn parts(len: usize, seed: u64) -> [Qkvs; 2] {
        [Qkvs::new([2, 4, 2, len, len, 12, 20], seed), Qkvs::new([2, 4, 1, len, len, 24, 20], seed + 1)]
    }

    fn input([global, window]: &[Qkvs; 2]) -> BasedInput<'_, f32> {
        BasedInput { global: global.qkv(), window: window.qkv() }
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for len in LENGTHS {
            for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                for left in [0, 3, 64, 1000] {
                    let based = Based::builder(left).form(form).epsilon(1e-6).build().unwrap();
                    worst = worst.max(held(&based, input(&parts(len, 1))));
                }
            }
        }
        println!("based: {worst:.3} of the bound");
    }

    #[test]
    fn each_part_is_what_it_says() {
        let mut x = parts(70, 3);
        let based = Based::builder(7).build().unwrap();
        let both = based.reference(input(&x)).unwrap();
        // All keys in the window: dense.
        let all = Based::builder(70).build().unwrap().reference(input(&x)).unwrap();
        let dense = Dense::builder().causal().build().unwrap().reference(x[1].qkv()).unwrap();
        x[0].v.fill(0.0);
        let window = based.reference(input(&x)).unwrap();
        let all_window = Based::builder(70).build().unwrap().reference(input(&x)).unwrap();
        close(&all_window, &dense, 1e-12);
        let taylor = all - all_window;
        close(&(&both - &window), &taylor, 1e-12);
        // Queries of 0 make every weight 1: a running mean of the values.
        let mut x = parts(40, 4);
        x[0].q.fill(0.0);
        x[1].v.fill(0.0);
        let exact = Based::builder(7).epsilon(0.0).build().unwrap();
        let out = exact.reference(input(&x)).unwrap();
        for ((b, h, t, c), out) in out.indexed_iter() {
            let values = x[0].v.slice(s![b, h / 2, ..=t, c]);
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / (t + 1) as f64;
            assert!((out - mean).abs() < 1e-12, "token {t}: {out}, not {mean}");
        }
    }

    #[test]
    fn state_carries_over_any_cuts() {
        let x = parts(150, 5);
        for left in [0, 5, 64, 1000] {
            let based = Based::builder(left).build().unwrap();
            let (want, bound) = (based.reference(input(&x)).unwrap(), based.error_bound(input(&x)).unwrap());
            let mut state = based.initial_state(input(&x)).unwrap();
            let mut exact: BasedState = state.clone();
            for cut in [0, 1, 2, 2, 70, 71, 150].windows(2) {
                let part = [0, 1].map(|i| x[i].slice(cut[0]..cut[1], cut[0]..cut[1]));
                let out = based.prefill(input(&part), &mut state).unwrap();
                let (definition, next) = based.reference_from(input(&part), &exact).unwrap();
                exact = next;
                for ((b, h, t, c), got) in out.indexed_iter() {
                    let t_all = cut[0] + t;
                    let (want, bound) = (want[[b, h, t_all, c]], bound[[b, h, t_all]]);
                    assert!(
                        (f64::from(*got) - want).abs() <= bound,
                        "left {left}: token {t_all} is {got}, not {want}"
                    );
                    assert!(
                        (definition[[b, h, t, c]] - want).abs() <= bound,
                        "left {left}: definition, token {t_all}"
                    );
                }
                assert_eq!(state.keys(), exact.keys());
                assert_eq!(state.keys().dim().2, cut[1].min(left));
            }
        }
    }

    #[test]
    fn refusals() {
        let based = Based::builder(4).build().unwrap();
        let (x, longer) = (parts(5, 6), parts(6, 6));
        let odd = BasedInput { global: x[0].qkv(), window: longer[1].qkv() };
        assert_eq!(
            based.forward(odd).unwrap_err().to_string(),
            "window: expected an output [batch, heads, len, value_dim] = (2, 4, 5, 20) as the other part has it, got (2, 4, 6, 20)"
        );
        let single = Qkvs::new([1, 1, 1, 5, 5, 8, 8], 1);
        let offsets = [0, 2, 5];
        let packed = single.qkv().packed(&offsets, &offsets);
        let x = BasedInput { global: packed, window: packed };
        held(&based, x);
        assert_eq!(
            based.initial_state(x).unwrap_err().to_string(),
            "a packed batch cannot be combined with the state of a window: the windows of its sequences would differ in length"
        );
        let x = BasedInput { global: packed, window: single.qkv() };
        assert_eq!(
            based.forward(x).unwrap_err().to_string(),
            "window: expected the lengths of the other part, got Full"
        );
        let error = Based::builder(4).epsilon(-0.5).build().unwrap_err();
        assert_eq!(error.to_string(), "epsilon: expected a finite number of at least 0, got -0.5");
    }
}
