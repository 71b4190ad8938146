//! The trait that every mechanism implements, and the capability traits.

use std::ops::Range;

use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut3, ArrayViewMut4};

use crate::card::Card;
pub use crate::engine::weights::TopWeights;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::state::{State, StatePool};
pub use crate::input::{Dim4, Input};
use crate::input::{Sequence, filled};
use crate::raw;

/// The constant of the published error bound.
///
/// An element of a row of an `f32` output is off the definition by at most
///
/// ```text
/// ERROR_CONSTANT * 2^-24 * (head_dim + keys + size) * max|v| * total
/// ```
///
/// where `keys` is how many keys the row sees, `size` the largest `scale *
/// sum_c |q_c k_c| + |score|` among the scores that count (within 25 of the
/// row's largest), `max|v|` the largest visible value, and `total` the sum of
/// the row's weights: 1 for a softmax. The bias of a sigmoid adds to `size`.
/// Outputs of half types add the rounding
/// of the output: [`Element::ROUNDING`](crate::Element::ROUNDING) times its magnitude, and half the
/// smallest subnormal number at least.
/// [`Bounded::error_bound`] computes it for an input. The tests hold every
/// mechanism to it; the largest ratio that they have seen is 0.8 where this is
/// 2.
pub const ERROR_CONSTANT: f64 = 2.0;

/// What one call costs, as the mechanism's definition counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations that the result needs: 2 for each
    /// multiply-add of a visible pair, softmax not counted.
    pub flops: u64,
    /// Bytes of inputs that must be read and outputs that must be written at
    /// least once.
    pub bytes: u64,
}

/// What every mechanism can say of itself, whatever its inputs are.
pub trait Mechanism: Send + Sync {
    /// Its card.
    fn card(&self) -> &'static Card;

    /// Its name, as its paper has it.
    fn name(&self) -> &'static str {
        self.card().name
    }
}

/// A mechanism with its configuration and plan, over inputs `X`. Immutable,
/// shared between threads, cheap to keep.
///
/// A mechanism may take several kinds of input: arrays of any storage type,
/// caches. Any mechanism over queries, keys and values is a trait object:
///
/// ```
/// use attention_kernels::dense::{Dense, Sigmoid};
/// use attention_kernels::{Attention, Mechanism, Qkv};
/// use ndarray::Array4;
///
/// let mechanisms: Vec<Box<dyn for<'a> Attention<Qkv<'a, f32>>>> = vec![
///     Box::new(Dense::builder().causal().build()?),
///     Box::new(Sigmoid::builder().build()?),
/// ];
/// let x = Array4::<f32>::ones((1, 2, 5, 16));
/// for mechanism in &mechanisms {
///     let out = mechanism.forward(Qkv::new(x.view(), x.view(), x.view()))?;
///     println!("{}: {:?}", mechanism.name(), out.dim());
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait Attention<X: Input>: Mechanism {
    /// Bytes of [`Workspace`] that [`forward_into`](Self::forward_into) works
    /// in for this input, on as many threads as there are now.
    ///
    /// # Errors
    /// What `forward_into` refuses.
    fn workspace_bytes(&self, x: X) -> Result<usize>;

    /// The kernel: writes `out`, `[batch, q_heads, q_len, value_dim]` of any
    /// strides, and allocates nothing unless `workspace` is too small.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn forward_into(&self, x: X, out: ArrayViewMut4<'_, X::Out>, workspace: &mut Workspace) -> Result<()>;

    /// The definition: plain `f64` loops, one line for one line of the paper.
    ///
    /// # Errors
    /// What `forward_into` refuses.
    fn reference(&self, x: X) -> Result<Array4<f64>>;

    /// What the call costs.
    ///
    /// # Errors
    /// What `forward_into` refuses.
    fn cost(&self, x: X) -> Result<Cost>;

    /// [`forward_into`](Self::forward_into) a slice; see [`raw`].
    ///
    /// # Errors
    /// As there.
    fn forward_raw_into(&self, x: X, out: raw::ViewMut<'_, X::Out>, workspace: &mut Workspace) -> Result<()> {
        self.forward_into(x, out.0, workspace)
    }

    /// [`forward_into`](Self::forward_into) a new array.
    ///
    /// # Errors
    /// Whatever does not fit.
    fn forward(&self, x: X) -> Result<Array4<X::Out>> {
        let mut out = filled("out", x.out_dim()?, X::Out::default())?;
        self.forward_into(x, out.view_mut(), &mut Workspace::new())?;
        Ok(out)
    }
}

/// Mechanisms whose kernel is off the definition by at most a bound that is
/// known for each input. A selection of keys is none of them: it jumps where
/// scores are nearly equal. Where layers follow each other the docs of a mechanism
/// say if the bound is that of likely errors and not that of the worst ones.
pub trait Bounded<X: Input>: Attention<X> {
    /// How far the kernel may be off the definition for this input, for the
    /// elements of each row, `[batch, q_heads, q_len]`, before the output is
    /// rounded to its type; see [`ERROR_CONSTANT`].
    ///
    /// # Errors
    /// What `forward_into` refuses.
    fn error_bound(&self, x: X) -> Result<Array3<f64>>;
}

/// Mechanisms that also return the natural logarithm of each row's sum of
/// exponentials, with which partial results merge (see
/// [`merge`](crate::merge)).
pub trait Mergeable<X: Input>: Attention<X> {
    /// Writes `out` and `lse`, `[batch, q_heads, q_len]`. A row with no
    /// visible key has `out` 0 and `lse` -inf.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn forward_with_lse_into(
        &self,
        x: X,
        out: ArrayViewMut4<'_, X::Out>,
        lse: ArrayViewMut3<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// [`forward_with_lse_into`](Self::forward_with_lse_into) new arrays.
    ///
    /// # Errors
    /// Whatever does not fit.
    fn forward_with_lse(&self, x: X) -> Result<(Array4<X::Out>, Array3<f32>)> {
        let dim = x.out_dim()?;
        let mut out = filled("out", dim, X::Out::default())?;
        let mut lse = filled("lse", (dim.0, dim.1, dim.2), 0f32)?;
        self.forward_with_lse_into(x, out.view_mut(), lse.view_mut(), &mut Workspace::new())?;
        Ok((out, lse))
    }
}
/// Keys whose score is so near the one at which a selection ends that rounding
/// may decide: for each list of an index, in its order, runs of keys,
/// ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Margins {
    /// One a list.
    pub doubtful: Vec<Vec<Range<usize>>>,
}

/// A score is in doubt within this times the largest of the list, in
/// magnitude.
pub const SELECTION_MARGIN: f64 = 1e-5;

/// Mechanisms that choose which keys each query sees, and are exact attention
/// on these.
///
/// The choice is an index, which is data: it can be kept, looked at and handed
/// in again. A selection jumps where two scores are nearly equal, so nothing
/// bounds the error of the whole; [`bound_on`](Self::bound_on) bounds the
/// attention on a given index, and [`reference_select`](Self::reference_select)
/// says with its [`Margins`] where another choice is as good.
///
/// What is chosen: highest scores first, equal ones from the lower key on; never
/// what has no score because it is NaN, so that lists may be shorter than a budget, or
/// empty; always what is forced.
///
/// ```
/// use attention_kernels::sparse::TopK;
/// use attention_kernels::{Attention, Qkv, Selects};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let top = TopK::builder(32).causal().build()?;
/// let index = top.select(x)?;
/// assert_eq!(top.forward_on(x, &index)?, top.forward(x)?);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait Selects<X: Input>: Attention<X> {
    /// Which keys each query sees.
    type Index: Clone + std::fmt::Debug + PartialEq + Send + Sync;

    /// The selection by the kernel. Allocates the index, and what it works in.
    ///
    /// # Errors
    /// What [`forward_into`](Attention::forward_into) refuses.
    fn select(&self, x: X) -> Result<Self::Index>;

    /// Bytes of [`Workspace`] that [`forward_on_into`](Self::forward_on_into)
    /// works in.
    ///
    /// # Errors
    /// What `forward_on_into` refuses.
    fn workspace_bytes_on(&self, x: X, index: &Self::Index) -> Result<usize>;

    /// The attention by the kernel, on an index. Allocates nothing unless
    /// `workspace` is too small.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn forward_on_into(
        &self,
        x: X,
        index: &Self::Index,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// The selection by definition, in `f64` and by sorting all scores, with
    /// what is in doubt.
    ///
    /// # Errors
    /// What [`forward_into`](Attention::forward_into) refuses.
    fn reference_select(&self, x: X) -> Result<(Self::Index, Margins)>;

    /// The attention by definition, on an index.
    ///
    /// # Errors
    /// What [`forward_on_into`](Self::forward_on_into) refuses.
    fn reference_on(&self, x: X, index: &Self::Index) -> Result<Array4<f64>>;

    /// How far the attention by the kernel may be off the definition on an
    /// index, as [`Bounded::error_bound`].
    ///
    /// # Errors
    /// What [`forward_on_into`](Self::forward_on_into) refuses.
    fn bound_on(&self, x: X, index: &Self::Index) -> Result<Array3<f64>>;

    /// The first place where two indices differ in a key that is not in doubt,
    /// or in how many keys they have where only the order of scores decides.
    fn difference(a: &Self::Index, b: &Self::Index, margins: &Margins) -> Option<String>;

    /// [`forward_on_into`](Self::forward_on_into) a new array.
    ///
    /// # Errors
    /// Whatever does not fit.
    fn forward_on(&self, x: X, index: &Self::Index) -> Result<Array4<X::Out>> {
        let mut out = Array4::from_elem(x.out_dim()?, X::Out::default());
        self.forward_on_into(x, index, out.view_mut(), &mut Workspace::new())?;
        Ok(out)
    }
}

/// Mechanisms whose selection serves several calls: later steps of a layer, or
/// later layers of a step. What they have selected the caller keeps.
///
/// Calls follow each other as the mechanism says, and each one has the keys of the
/// one before and those of its own queries: any other is refused, and changes
/// nothing. Of a call by itself, [`forward`](Attention::forward) is selection and
/// attention on what was selected.
///
/// ```
/// use attention_kernels::select::Reused;
/// use attention_kernels::sparse::RecycledAttention;
/// use attention_kernels::{Qkv, Reuses};
/// use ndarray::{Array4, s};
///
/// let cache = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let recycled = RecycledAttention::builder(64, 10).build()?;
/// let mut kept = Reused::new();
/// for n in 401..430 {
///     let keys = cache.slice(s![.., .., ..n, ..]);
///     let x = Qkv::new(cache.slice(s![.., .., n - 1..n, ..]), keys, keys);
///     let out = recycled.step(x, &mut kept)?; // reads all keys in one of ten steps
///     # assert!(recycled.step(x, &mut kept).is_err(), "again the same keys");
/// }
/// assert_eq!((kept.calls(), kept.selected_at(0)), (29, Some(421)));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait Reuses<X: Input>: Attention<X> {
    /// What is kept between calls.
    type State: Clone + std::fmt::Debug + Default + PartialEq + Send + Sync;

    /// The kernel, on the call after those that `state` knows, which then knows
    /// this one too. Allocates what it selects.
    ///
    /// # Errors
    /// Whatever does not fit and a call out of turn, before anything is written
    /// or kept.
    fn step_into(
        &self,
        x: X,
        state: &mut Self::State,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// The definition, on the same call: the output, and what is kept after it.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn reference_step(&self, x: X, state: &Self::State) -> Result<(Array4<f64>, Self::State)>;

    /// [`step_into`](Self::step_into) a new array.
    ///
    /// # Errors
    /// Whatever does not fit, and a call out of turn.
    fn step(&self, x: X, state: &mut Self::State) -> Result<Array4<X::Out>> {
        let mut out = filled("out", x.out_dim()?, X::Out::default())?;
        self.step_into(x, state, out.view_mut(), &mut Workspace::new())?;
        Ok(out)
    }
}

/// Mechanisms that read a sequence token by token through a state of fixed
/// size: a sequence can be worked off in pieces of any length, and decoding
/// costs the same for every token.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Recurrent, linear::Lightning};
/// use ndarray::{Array4, concatenate, s, Axis};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * c) as f32).sin());
/// let whole = Qkv::new(x.view(), x.view(), x.view());
/// let tokens = |range: std::ops::Range<usize>| {
///     let part = x.slice(s![.., .., range, ..]);
///     Qkv::new(part, part, part)
/// };
///
/// let lightning = Lightning::builder(2).build()?;
/// let mut state = lightning.initial_state(whole)?;
/// let prompt = lightning.prefill(tokens(0..49), &mut state)?;
/// let next = lightning.step(tokens(49..50), &mut state)?;
///
/// let parts = concatenate(Axis(2), &[prompt.view(), next.view()]).unwrap();
/// let once = lightning.forward(whole)?;
/// assert!(parts.iter().zip(&once).all(|(a, b)| (a - b).abs() < 1e-4));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait Recurrent<X: Input>: Attention<X> {
    /// What is known of the tokens so far, for every sequence and head.
    type State: Clone + std::fmt::Debug + PartialEq + Send + Sync;

    /// The state before the first token, for inputs of these sizes.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn initial_state(&self, x: X) -> Result<Self::State>;

    /// The kernel, on tokens that follow those of `state`, which then has
    /// these too. Where sequences are packed, each has its own state.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn prefill_into(
        &self,
        x: X,
        state: &mut Self::State,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// The definition, on tokens that follow those of `state`: the output and
    /// the state after them, rounded.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn reference_from(&self, x: X, state: &Self::State) -> Result<(Array4<f64>, Self::State)>;

    /// [`prefill_into`](Self::prefill_into) a new array.
    ///
    /// # Errors
    /// Whatever does not fit.
    fn prefill(&self, x: X, state: &mut Self::State) -> Result<Array4<X::Out>> {
        let mut out = filled("out", x.out_dim()?, X::Out::default())?;
        self.prefill_into(x, state, out.view_mut(), &mut Workspace::new())?;
        Ok(out)
    }

    /// The state that [`prefill_into`](Self::prefill_into) leaves, without outputs: of
    /// pieces that only later tokens need, as where a sequence is cut over machines. A
    /// recurrence of the engine reads no queries then and does less than half of the work;
    /// tokens that a fixed decay leaves nothing of are not looked at, not even for NaN.
    /// Other mechanisms write their outputs to an array that is thrown away.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn advance_into(&self, x: X, state: &mut Self::State, workspace: &mut Workspace) -> Result<()> {
        let mut out = filled("out", x.out_dim()?, X::Out::default())?;
        self.prefill_into(x, state, out.view_mut(), workspace)
    }

    /// [`advance_into`](Self::advance_into) in scratch of its own.
    ///
    /// ```
    /// use attention_kernels::{Qkv, Recurrent, linear::Lightning};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::<f32>::ones((1, 2, 50, 16));
    /// let x = Qkv::new(x.view(), x.view(), x.view());
    /// let lightning = Lightning::builder(2).build()?;
    /// let (mut state, mut same) = (lightning.initial_state(x)?, lightning.initial_state(x)?);
    /// lightning.prefill(x, &mut state)?;
    /// lightning.advance(x, &mut same)?;
    /// assert_eq!(same, state);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    ///
    /// # Errors
    /// Whatever does not fit.
    fn advance(&self, x: X, state: &mut Self::State) -> Result<()> {
        self.advance_into(x, state, &mut Workspace::new())
    }

    /// [`prefill_into`](Self::prefill_into) for one token of each sequence:
    /// reads and writes the state once.
    ///
    /// # Errors
    /// Whatever does not fit, and any other number of tokens.
    fn step_into(
        &self,
        x: X,
        state: &mut Self::State,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let dims = x.dims()?;
        for index in 0..dims.batch {
            let Sequence { queries, keys, .. } = x.lengths().sequence(&dims, index);
            if queries.len() != 1 || keys.len() != 1 {
                let tokens = queries.len().max(keys.len());
                return Err(Error::value(
                    "q",
                    "one token of each sequence",
                    format_args!("{tokens} of sequence {index}"),
                ));
            }
        }
        self.prefill_into(x, state, out, workspace)
    }

    /// [`step_into`](Self::step_into) a new array.
    ///
    /// # Errors
    /// Whatever does not fit, and any other number of tokens.
    fn step(&self, x: X, state: &mut Self::State) -> Result<Array4<X::Out>> {
        let mut out = filled("out", x.out_dim()?, X::Out::default())?;
        self.step_into(x, state, out.view_mut(), &mut Workspace::new())?;
        Ok(out)
    }
}

/// Mechanisms whose states may lie in a pool that the caller lends, as servers keep
/// them for requests that come and go: nothing is copied between calls.
///
/// ```
/// use attention_kernels::linear::{Lightning, StatePool};
/// use attention_kernels::{Pooled, Qkv, Workspace};
/// use ndarray::Array4;
///
/// let lightning = Lightning::builder(2).build()?;
/// let mut pool = Array4::zeros((64, 2, 16, 16)); // slots of states
/// let (mut out, mut workspace) = (Array4::zeros((3, 2, 1, 16)), Workspace::new());
/// let x = Array4::from_shape_fn((3, 2, 1, 16), |(b, h, _, c)| ((b + h + c) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// for slots in [[5, 2, 9], [2, 33, 5]] {
///     let pool = StatePool::new(pool.view_mut(), &slots);
///     lightning.prefill_pooled_into(x, pool, out.view_mut(), &mut workspace)?;
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait Pooled<X: Input>: Recurrent<X> {
    /// [`prefill_into`](Recurrent::prefill_into) from and to the states in these
    /// slots. Works in a bit more than [`Attention::workspace_bytes`] for each row of
    /// the pool's states.
    ///
    /// # Errors
    /// Whatever does not fit, and slots that two sequences share, before anything is
    /// written.
    fn prefill_pooled_into(
        &self,
        x: X,
        pool: StatePool<'_>,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()>;
}

/// Mechanisms with gradients, for training.
///
/// The loss is a function of the outputs and, perhaps, of what is
/// [carried](Self::Carried): of the state after the last token of a
/// recurrence. Given its gradients with respect to these, here are those with
/// respect to whatever the input consists of: queries, keys, values, gates
/// (logarithms of decays as they are given, beta), and the state at the start.
/// Where heads share an array, its gradient is their sum, in a fixed order.
///
/// Nothing of the forward pass has to be kept: states are computed again, and
/// of these only a bounded number is held. A call does about three times the
/// operations of [`forward_into`](Attention::forward_into). Gradients are `f32`
/// whatever the type of the input, and are not rounded to it.
///
/// A sequence that was worked off in pieces is differentiated in pieces, from
/// the last: the gradient of a piece's state at the start is that of the state
/// at the end of the piece before.
///
/// ```
/// use attention_kernels::linear::{Carried, Lightning};
/// use attention_kernels::{Backward, Qkv, Recurrent};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * c) as f32).sin());
/// let d_out = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h * i + c) as f32).cos());
/// let whole = Qkv::new(x.view(), x.view(), x.view());
/// let tokens = |range: std::ops::Range<usize>| {
///     let part = x.slice(s![.., .., range, ..]);
///     Qkv::new(part, part, part)
/// };
///
/// let lightning = Lightning::builder(2).build()?;
/// let once = lightning.backward(whole, d_out.view(), Carried::default())?;
///
/// let mut state = lightning.initial_state(whole)?;
/// lightning.prefill(tokens(0..30), &mut state)?;
/// let d_last = d_out.slice(s![.., .., 30.., ..]);
/// let carried = Carried { state: Some(&state), d_state: None };
/// let last = lightning.backward(tokens(30..50), d_last, carried)?;
/// let d_first = d_out.slice(s![.., .., ..30, ..]);
/// let carried = Carried { state: None, d_state: Some(last.state.view()) };
/// let first = lightning.backward(tokens(0..30), d_first, carried)?;
///
/// let keys = once.k.slice(s![.., .., ..30, ..]);
/// assert!(keys.iter().zip(&first.k).all(|(a, b)| (a - b).abs() < 1e-3));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait Backward<X: Input>: Attention<X> {
    /// One array for each of the input's, of its shape, and one for the state
    /// at the start where there is one.
    type Gradients<A>;

    /// What goes with a call besides its input: of a recurrence the state at
    /// the start and the gradient of the one at the end. Its default is
    /// neither.
    type Carried<'a>: Copy + Default;

    /// Gradients to write into, all 0.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn zero_gradients(&self, x: X) -> Result<Self::Gradients<f32>>;

    /// Bytes of [`Workspace`] that [`backward_into`](Self::backward_into)
    /// works in, on as many threads as there are now: some states a thread,
    /// and rows of all heads for each array that heads share.
    ///
    /// # Errors
    /// What `backward_into` refuses.
    fn backward_workspace_bytes(&self, x: X) -> Result<usize>;

    /// The kernel: writes `gradients`, whatever was in them, and allocates
    /// nothing unless `workspace` is too small.
    ///
    /// `d_out` is the gradient of the output, of its shape.
    ///
    /// A NaN in the input shows in the gradients that depend on it, and may
    /// show in others of its sequence and head.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn backward_into(
        &self,
        x: X,
        d_out: ArrayView4<'_, f32>,
        carried: Self::Carried<'_>,
        gradients: &mut Self::Gradients<f32>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// The definition, in `f64`. That of a recurrence keeps the state of each
    /// token.
    ///
    /// # Errors
    /// What `backward_into` refuses.
    fn reference_backward(
        &self,
        x: X,
        d_out: ArrayView4<'_, f32>,
        carried: Self::Carried<'_>,
    ) -> Result<Self::Gradients<f64>>;

    /// [`backward_into`](Self::backward_into) new arrays.
    ///
    /// # Errors
    /// Whatever does not fit.
    fn backward(
        &self,
        x: X,
        d_out: ArrayView4<'_, f32>,
        carried: Self::Carried<'_>,
    ) -> Result<Self::Gradients<f32>> {
        let mut gradients = self.zero_gradients(x)?;
        self.backward_into(x, d_out, carried, &mut gradients, &mut Workspace::new())?;
        Ok(gradients)
    }
}

/// Recurrences that can tell earlier tokens what they need to know of later ones, and
/// nothing else: where a sequence is cut over machines, this is what crosses them.
///
/// ```
/// use attention_kernels::{Backward, BackwardState, Qkv, linear::{Carried, Lightning}};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * c) as f32).sin());
/// let (d_out, x) = (Array4::<f32>::ones(x.dim()), Qkv::new(x.view(), x.view(), x.view()));
/// let lightning = Lightning::builder(2).build()?;
/// let all = lightning.backward(x, d_out.view(), Carried::default())?;
/// assert_eq!(lightning.backward_state(x, d_out.view(), None)?, all.state);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait BackwardState<X: Input>: Backward<X> + Recurrent<X, State = State> {
    /// Writes the gradient of the state at the start, `[sequences, heads, state_dim,
    /// columns]`, given those of the output and of the state after the last token, 0 if
    /// there is none. It does not depend on the state itself. Tokens that a fixed decay
    /// lets nothing of the state reach are not looked at, not even for NaN.
    ///
    /// # Errors
    /// Whatever does not fit, before anything is written.
    fn backward_state_into(
        &self,
        x: X,
        d_out: ArrayView4<'_, f32>,
        d_state: Option<ArrayView4<'_, f32>>,
        to: ArrayViewMut4<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// [`backward_state_into`](Self::backward_state_into) a new array.
    ///
    /// # Errors
    /// Whatever does not fit.
    fn backward_state(
        &self,
        x: X,
        d_out: ArrayView4<'_, f32>,
        d_state: Option<ArrayView4<'_, f32>>,
    ) -> Result<Array4<f32>> {
        let mut to = self.initial_state(x)?.into_inner();
        self.backward_state_into(x, d_out, d_state, to.view_mut(), &mut Workspace::new())?;
        Ok(to)
    }
}

/// Mechanisms that can show their weights, and the scores that these come from.
pub trait Weights<X: Input>: Attention<X> {
    /// All scores, `[batch, q_heads, q_len, kv_len]` along the rows of the
    /// arrays: scaled, with whatever a [`score`](crate::score) makes of them, -inf where a key is
    /// masked or not selected; before the softmax, without sinks, or before the
    /// logistic function, without its bias. Memory as [`weights`](Self::weights).
    ///
    /// # Errors
    /// What the kernel refuses.
    fn scores(&self, x: X) -> Result<Array4<f32>>;

    /// All weights, `[batch, q_heads, q_len, kv_len]` along the rows of the
    /// arrays; 0 where a key is masked. Memory O(q_len * kv_len): for reading
    /// and plots.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn weights(&self, x: X) -> Result<Array4<f32>>;

    /// What each key receives from all queries together, `[batch, q_heads,
    /// kv_len]`, without the weights in memory: what cache eviction looks at.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn key_weights(&self, x: X) -> Result<Array3<f32>>;

    /// The `count` largest weights of each query, without all of them in
    /// memory. Equal weights go to the lower key; NaN is never selected.
    ///
    /// # Errors
    /// What the kernel refuses, and a `count` that memory has no room for.
    fn top_weights(&self, x: X, count: usize) -> Result<TopWeights>;

    /// All scores by definition.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn reference_scores(&self, x: X) -> Result<Array4<f64>>;

    /// All weights by definition.
    ///
    /// # Errors
    /// What the kernel refuses.
    fn reference_weights(&self, x: X) -> Result<Array4<f64>>;
}

/// Mechanisms that give the gradient of each score: which pairs of tokens an
/// output, or a loss, hangs on. Attributions weigh attention maps by it
/// (Grad-SAM), and adversarial training moves scores along it.
///
/// With `d_ij = d_out_i . v_j` and weights `w` it is `w_ij (d_ij - sum_k w_ik
/// d_ik)` for a softmax, whose rows sum to 0 where there are no sinks, and
/// `w_ij (1 - w_ij) d_ij` for a logistic function. The scores are those that
/// [`Weights::scores`] shows.
///
/// ```
/// use attention_kernels::{Qkv, ScoreGradients, dense::Dense};
/// use ndarray::{Array4, Axis};
///
/// let x = Array4::from_shape_fn((1, 2, 10, 16), |(_, h, i, c)| ((h + i * c) as f32).sin());
/// let loss = Array4::from_shape_fn((1, 2, 10, 16), |(_, _, i, _)| if i == 9 { 1.0 } else { 0.0 });
/// let dense = Dense::builder().causal().build()?;
/// let pull = dense.score_gradients(Qkv::new(x.view(), x.view(), x.view()), loss.view())?;
/// assert_eq!(pull.dim(), (1, 2, 10, 10));
/// assert!(pull.sum_axis(Axis(3)).iter().all(|sum| sum.abs() < 1e-5));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait ScoreGradients<X: Input>: Weights<X> {
    /// Gradients of all scores, `[batch, q_heads, q_len, kv_len]` along the rows
    /// of the arrays, given that of the output, of its shape; 0 where a key is
    /// hidden. Memory O(q_len * kv_len), twice that of [`Weights::weights`], and
    /// about twice its time.
    ///
    /// # Errors
    /// What the kernel refuses, and a `d_out` of another shape.
    fn score_gradients(&self, x: X, d_out: ArrayView4<'_, f32>) -> Result<Array4<f32>>;

    /// The same by definition.
    ///
    /// # Errors
    /// What `score_gradients` refuses.
    fn reference_score_gradients(&self, x: X, d_out: ArrayView4<'_, f32>) -> Result<Array4<f64>>;
}
