//! Calls of the attention engine: mask, score, scale, instruction set, the
//! checks of a call, and the traits of the mechanisms that are such a call.

use ndarray::{Array2, ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis};

use crate::attention::{Cost, Input};
use crate::cache::{Cache, Cached};
use crate::definition::attend::attend;
use crate::definition::number::Real;
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::element::Element;
use crate::engine;
use crate::engine::attend_backward::{self, Back, Gradients};
use crate::engine::call::{Arrays, Call, Gains, Norm, Sight, Virtual};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence};
use crate::keys::Keys;
use crate::keys::source::{KvSource, Slots};
use crate::mask::{Mask, Unmasked};
use crate::score::smooth::{AnySmooth, Smooth};
use crate::score::{Plain, Score};
use crate::simd::Isa;
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::late::Late;
use crate::stages::listed::Listed;
use crate::stages::pass::{Pass, Scratch};

/// Options that every mechanism over scores has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options<M = Unmasked, F = Plain> {
    pub(crate) mask: M,
    pub(crate) score: F,
    pub(crate) scale: Option<f32>,
    pub(crate) isa: Option<Isa>,
}

impl<M: Mask, F: Score> Options<M, F> {
    pub(crate) fn mask<N: Mask>(self, mask: N) -> Options<N, F> {
        self.map_mask(|_| mask)
    }

    /// With a mask made of the one that it has.
    pub(crate) fn map_mask<N: Mask>(self, map: impl FnOnce(M) -> N) -> Options<N, F> {
        Options { mask: map(self.mask), score: self.score, scale: self.scale, isa: self.isa }
    }

    pub(crate) fn score<G: Score>(self, score: G) -> Options<M, G> {
        Options { mask: self.mask, score, scale: self.scale, isa: self.isa }
    }

    pub(crate) fn build(self) -> Result<Config<M, F>> {
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::value("scale", "a finite number", scale));
        }
        Ok(Config { mask: self.mask, score: self.score, scale: self.scale, isa: Isa::choose(self.isa)? })
    }
}

/// [`Options`] that have been checked.
#[derive(Clone, Debug)]
pub(crate) struct Config<M, F> {
    mask: M,
    score: F,
    scale: Option<f32>,
    isa: Isa,
}

impl<M: Mask + Clone, F: Score + Clone> Config<M, F> {
    /// The same on a plan.
    pub(crate) fn listed<'a>(&self, keys: Keys<'a>) -> Config<Listed<'a, M>, F> {
        let mask = Listed { mask: self.mask.clone(), keys };
        Config { mask, score: self.score.clone(), scale: self.scale, isa: self.isa }
    }
}

impl<M, F: Clone> Config<M, F> {
    /// The same with another mask.
    pub(crate) fn masked<N: Mask>(&self, mask: N) -> Config<N, F> {
        Config { mask, score: self.score.clone(), scale: self.scale, isa: self.isa }
    }
}

impl<M: Mask + Clone> Config<M, Plain> {
    /// The same with a change of scores.
    pub(crate) fn with_score<F: Score>(&self, score: F) -> Config<M, F> {
        Config { mask: self.mask.clone(), score, scale: self.scale, isa: self.isa }
    }
}

impl<M: Mask, F: Smooth> Config<M, F> {
    /// Gradients, given that of the output, as a stage of a pipeline. `whole` is the
    /// output where weights meet more than values.
    pub(crate) fn backward<'a, Q: Element, K: Element, O>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Qkv<'a, Q, K, O>,
        d_out: ArrayView4<'a, f32>,
        whole: Option<ArrayView4<'a, f32>>,
        to: Option<Gradients<'_>>,
    ) -> Result<()> {
        let call = self.call(x, Norm::Softmax { sinks: None }, None)?;
        backward(pass, &call, &self.score, (d_out, whole), to);
        Ok(())
    }

    /// The change of scores, with its derivative.
    pub(crate) fn smooth(&self) -> &dyn AnySmooth {
        &self.score
    }
}

/// Gradients of a call as a stage of a pipeline.
pub(crate) fn backward<'a>(
    pass: &mut Pass<'_>,
    call: &Call<'a>,
    score: &dyn AnySmooth,
    (d_out, whole): (ArrayView4<'a, f32>, Option<ArrayView4<'a, f32>>),
    to: Option<Gradients<'_>>,
) {
    let bytes = attend_backward::workspace_bytes(call, score, false);
    pass.stage(
        || 0,
        bytes,
        |arena| {
            let Some(to) = to else { return };
            let (d_out, whole) = (Heads::new(d_out), whole.map(Heads::new));
            attend_backward::run_in(&Back { call, score, d_out, saved: None, whole }, to, arena);
        },
    );
}

impl<M: Mask, F: Score> Config<M, F> {
    pub(crate) fn checked(&self, dims: Dims) -> Result<Dims> {
        self.mask.check(&dims)?;
        self.score.check(&dims)?;
        Ok(dims)
    }

    /// The same, and what the mask says of each sequence.
    fn checked_each(&self, dims: Dims, sequence: impl Fn(&Dims, usize) -> Sequence) -> Result<Dims> {
        let dims = self.checked(dims)?;
        (0..dims.batch).try_for_each(|i| self.mask.check_sequence(&sequence(&dims, i).site(0)))?;
        Ok(dims)
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn mask(&self) -> &M {
        &self.mask
    }

    pub(crate) fn scale(&self, dims: &Dims) -> f64 {
        self.scale_of(dims.head_dim)
    }

    /// The same for rows of so many elements.
    pub(crate) fn scale_of(&self, head_dim: usize) -> f64 {
        self.scale.map_or(1.0 / (head_dim.max(1) as f64).sqrt(), f64::from)
    }

    /// The call of an engine, its arrays checked.
    pub(crate) fn call<'a, Q: Element, K: Element, O>(
        &'a self,
        x: Qkv<'a, Q, K, O>,
        norm: Norm<'a>,
        gains: Option<Gains<'a>>,
    ) -> Result<Call<'a>> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.lengths.sequence(dims, i))?;
        Ok(self.over(x.into(), dims, norm, gains))
    }

    /// A call over arrays that have been checked.
    pub(crate) fn over<'a>(
        &'a self,
        x: Arrays<'a>,
        dims: Dims,
        norm: Norm<'a>,
        gains: Option<Gains<'a>>,
    ) -> Call<'a> {
        Call {
            x,
            dims,
            mask: &self.mask,
            keys: Keys::Mask,
            order: None,
            regions: None,
            extra: None,
            score: &self.score,
            norm,
            scale: self.scale(&dims) as f32,
            gains,
            gate: None,
            head_gains: None,
            plus: None,
            dots: None,
            isa: self.isa,
        }
    }

    /// Hands `run` the call of an engine over a cache, with what stands for the
    /// tokens that it dropped, and without those that a head does not hold.
    pub(crate) fn with_whole_cache<'a, Q: Element, C: Cache + ?Sized, O: Element, R>(
        &'a self,
        x: Cached<'a, Q, C, O>,
        norm: Norm<'a>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.slots().sequence(dims, i))?;
        let extra = x.cache.summary().map(|means| Virtual {
            k: f32::any(Heads::new(means.k.view())),
            v: f32::any(Heads::new(means.v.view())),
            log_weights: means.log_weights.view(),
            seen: Sight::From(&[isize::MIN]),
            q_start: None,
        });
        let late = self.late(x.cache.missing(), x.slots(), &dims);
        let arrays = Arrays::cached(x.q, x.cache.source(), x.slots());
        let call = Call { extra, ..self.over(arrays, dims, norm, None) };
        Ok(if late.missing.is_some() { run(&call.masked(&late)) } else { run(&call) })
    }

    /// The mask over the tokens that heads of a cache hold.
    fn late<'a>(&'a self, missing: Option<&'a [usize]>, slots: Slots<'a>, dims: &Dims) -> Late<'a> {
        let (kv_heads, group) = (dims.kv_heads, (dims.q_heads / dims.kv_heads.max(1)).max(1));
        Late { mask: &self.mask, missing, slots, kv_heads, group }
    }

    /// The definition over a cache.
    pub(crate) fn define_whole_cache<'a, Q: Element, C: Cache + ?Sized, O: Element>(
        &'a self,
        x: Cached<'a, Q, C, O>,
        normalisation: Normalisation<'a>,
    ) -> Result<Reference> {
        let own = x.dims()?;
        let (held, late) = (x.held(&own), self.late(x.cache.missing(), x.slots(), &own));
        let lengths = held.lengths(&x);
        let arrays = Qkv { q: x.q.reborrow(), k: held.k.view(), v: held.v.view(), lengths, out: x.out };
        let Definition { x, dims, score, scale, .. } = self.definition(arrays, normalisation, None)?;
        Definition { x, dims, mask: &late, score, scale, normalisation, gains: None, extra: held.extra() }
            .compute()
    }

    /// The call of an engine over the keys of a cache alone.
    pub(crate) fn call_cached<'a, Q: Element, C: Cache + ?Sized, O: Element>(
        &'a self,
        x: Cached<'a, Q, C, O>,
        norm: Norm<'a>,
    ) -> Result<Call<'a>> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.slots().sequence(dims, i))?;
        x.check_alike()?;
        let x = Arrays::cached(x.q, x.cache.source(), x.slots());
        Ok(self.over(x, dims, norm, None))
    }

    /// The definition of the same.
    pub(crate) fn definition<'a, Q: Element, K: Element, O>(
        &'a self,
        x: Qkv<'a, Q, K, O>,
        normalisation: Normalisation<'a>,
        gains: Option<Gains<'a>>,
    ) -> Result<Definition<'a, Q, K, O, M, F>> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.lengths.sequence(dims, i))?;
        let gains = gains.map(|gains| (gains.query, gains.value));
        let scale = self.scale(&dims);
        Ok(Definition {
            x,
            dims,
            mask: &self.mask,
            score: &self.score,
            scale,
            normalisation,
            gains,
            extra: None,
        })
    }

    /// Multiply-adds of the visible pairs, and every array once.
    pub(crate) fn cost<Q, K, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Cost> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.lengths.sequence(dims, i))?;
        self.cost_of(x, dims.batch, |i| x.lengths.sequence(&dims, i))
    }

    /// The same of so many sequences.
    pub(crate) fn cost_of<Q, K, O>(
        &self,
        x: &Qkv<'_, Q, K, O>,
        sequences: usize,
        sequence: impl Fn(usize) -> Sequence,
    ) -> Result<Cost> {
        let dims = Dims { batch: sequences, ..self.checked(x.dims()?)? };
        let keys = (x.k.len() + x.v.len()) * size_of::<K>();
        Ok(price(
            &self.mask,
            &dims,
            sequence,
            x.q.len() * size_of::<Q>() + keys,
            x.q.dim().0 * size_of::<O>(),
        ))
    }

    /// The same over a cache, of which the tokens of the call are read.
    pub(crate) fn cost_cached<Q: Element, C: Cache + ?Sized, O: Element>(
        &self,
        x: &Cached<'_, Q, C, O>,
    ) -> Result<Cost> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.slots().sequence(dims, i))?;
        let slots = x.slots();
        let out = x.q.dim().0 * size_of::<O>();
        let tokens = (0..dims.batch).map(|i| slots.len(i)).sum::<usize>();
        let bytes = x.q.len() * size_of::<Q>() + tokens * x.cache.token_bytes();
        let sequence = |i| slots.sequence(&dims, i);
        let late = self.late(x.cache.missing(), x.slots(), &dims);
        let Some(missing) = late.missing else { return Ok(price(&self.mask, &dims, sequence, bytes, out)) };
        // Tokens that a head does not hold are read as little as they are seen.
        let own = x.cache.token_bytes().checked_div(dims.kv_heads).unwrap_or(0);
        let of = |i: usize| &missing[slots.slot(i) * dims.kv_heads..][..dims.kv_heads];
        let absent = (0..dims.batch).flat_map(of).sum::<usize>();
        Ok(price(&late, &dims, sequence, bytes.saturating_sub(absent * own), out))
    }
}

/// Multiply-adds of the pairs that a mask leaves, and `bytes` with those of the
/// output, of which an element of each batch entry takes `out`.
pub(crate) fn price(
    mask: &dyn Mask,
    dims: &Dims,
    sequence: impl Fn(usize) -> Sequence,
    bytes: usize,
    out: usize,
) -> Cost {
    let mut pairs = 0;
    for sequence in (0..dims.batch).map(sequence) {
        let heads = if mask.is_shared() { dims.q_heads.min(1) } else { dims.q_heads };
        let repeats = dims.q_heads.checked_div(heads).unwrap_or(0) as u64;
        for head in 0..heads {
            let site = sequence.site(head);
            for query in 0..site.q_len {
                let hull = mask.hull(&site, query..query + 1);
                for first in (hull.start / 64 * 64..hull.end.min(site.kv_len)).step_by(64) {
                    let valid = u64::MAX >> (64 - (site.kv_len - first).min(64));
                    let bits = mask.bits(&site, query, first) & valid;
                    pairs += repeats * u64::from(bits.count_ones());
                }
            }
        }
    }
    let bytes = bytes + out * dims.q_heads * dims.q_len * dims.value_dim;
    let pair = 2 * (dims.head_dim + dims.value_dim) as u64;
    Cost { flops: pair.saturating_mul(pairs), bytes: bytes as u64 }
}

impl<M: Mask, F: Score> Config<M, F> {
    /// Softmax attention as a stage of a pipeline, over arrays or scratch.
    pub(crate) fn attend<Q: Element, K: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, Q, K, O>,
        out: Option<ArrayViewMut4<'_, O>>,
    ) -> Result<()> {
        self.attend_with(pass, x.reborrow(), None, out)
    }

    /// The same whose values are others, in scratch.
    pub(crate) fn attend_to<Q: Element, K: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, Q, K, O>,
        v: ArrayView4<'_, f32>,
        out: Option<ArrayViewMut4<'_, O>>,
    ) -> Result<()> {
        let dims = self.checked_each(x.dims()?, |dims, i| x.lengths.sequence(dims, i))?;
        let arrays = Arrays::with_values(x.reborrow(), f32::any(Heads::new(v)));
        let call = self.over(arrays, dims, Norm::Softmax { sinks: None }, None);
        self.stage(pass, &x, &call, out.map(|out| (out, None)));
        Ok(())
    }

    /// The same, with these rows added before it is rounded.
    pub(crate) fn attend_onto<Q: Element, K: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, Q, K, O>,
        plus: ArrayView4<'_, f32>,
        out: Option<ArrayViewMut4<'_, O>>,
    ) -> Result<()> {
        let call = self.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?;
        let call = Call { plus: Some(f32::any(Heads::new(plus))), ..call };
        self.stage(pass, &x, &call, out.map(|out| (out, None)));
        Ok(())
    }

    /// The same with virtual keys.
    pub(crate) fn attend_with<'a, Q: Element, K: Element, O: Element>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Qkv<'a, Q, K, O>,
        extra: Option<Virtual<'a>>,
        out: Option<ArrayViewMut4<'_, O>>,
    ) -> Result<()> {
        self.attend_in(pass, x, Keys::Mask, extra, out.map(|out| (out, None)))
    }

    /// The same, whose rows are [states](crate::stages::states): outputs, maxima and sums.
    pub(crate) fn attend_states<'a, Q: Element, K: Element>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Qkv<'a, Q, K, f32>,
        keys: Keys<'a>,
        extra: Option<Virtual<'a>>,
        states: &mut Scratch<'_>,
    ) -> Result<()> {
        let value_dim = x.v.dim().3;
        let to = states.view_mut().map(|states| states.split_at(Axis(3), value_dim));
        self.attend_in(pass, x, keys, extra, to.map(|(out, figures)| (out, Some(figures))))
    }

    /// The same of one sequence over what a source gives.
    pub(crate) fn attend_source<'a, Q: Element>(
        &'a self,
        pass: &mut Pass<'_>,
        (q, source): (ArrayView4<'a, Q>, &'a dyn KvSource),
        dims: Dims,
        keys: Keys<'a>,
        states: &mut Scratch<'_>,
    ) -> Result<()> {
        let dims = self.checked(dims.checked()?)?;
        let norm = Norm::Softmax { sinks: None };
        let call = Call { keys, ..self.over(Arrays::sourced(q, source), dims, norm, None) };
        let flops = || price(call.mask, &dims, |i| Lengths::Full.sequence(&dims, i), 0, 0).flops;
        let to = states.view_mut().map(|states| states.split_at(Axis(3), dims.value_dim));
        stage(pass, &call, flops, to.map(|(out, figures)| (out, Some(figures))));
        Ok(())
    }

    fn attend_in<'a, Q: Element, K: Element, O: Element>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Qkv<'a, Q, K, O>,
        keys: Keys<'a>,
        extra: Option<Virtual<'a>>,
        to: Option<(ArrayViewMut4<'_, O>, Option<ArrayViewMut4<'_, f32>>)>,
    ) -> Result<()> {
        let call = Call { keys, extra, ..self.call(x.reborrow(), Norm::Softmax { sinks: None }, None)? };
        self.stage(pass, &x, &call, to);
        Ok(())
    }

    /// A call of these arrays as a stage.
    fn stage<Q: Element, K: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: &Qkv<'_, Q, K, O>,
        call: &Call<'_>,
        to: Option<(ArrayViewMut4<'_, O>, Option<ArrayViewMut4<'_, f32>>)>,
    ) {
        stage(pass, call, || self.cost(x).map_or(0, |cost| cost.flops), to);
    }

    /// Attention on the keys of a cache, with virtual keys of each of its sequences.
    pub(crate) fn attend_cached_with<'a, Q: Element, C: Cache + ?Sized, O: Element>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Cached<'a, Q, C, O>,
        extra: Virtual<'a>,
        out: Option<ArrayViewMut4<'_, O>>,
    ) -> Result<()> {
        let call = Call { extra: Some(extra), ..self.call_cached(x, Norm::Softmax { sinks: None })? };
        let flops = || self.cost_cached(&x).map_or(0, |cost| cost.flops);
        stage(pass, &call, flops, out.map(|out| (out, None)));
        Ok(())
    }
}

/// A call as a stage, with the operations on the keys that are no virtual ones.
fn stage<O: Element>(
    pass: &mut Pass<'_>,
    call: &Call<'_>,
    flops: impl FnOnce() -> u64,
    to: Option<(ArrayViewMut4<'_, O>, Option<ArrayViewMut4<'_, f32>>)>,
) {
    let flops = || flops() + virtual_flops(call);
    pass.stage(flops, engine::workspace_bytes(call), |arena| {
        if let Some((out, figures)) = to {
            engine::run_in(call, out, figures, arena);
        }
    });
}

/// Operations on the virtual keys of a call.
fn virtual_flops(call: &Call<'_>) -> u64 {
    let (dims, queries) = (&call.dims, (0..call.dims.batch).map(|i| call.sequence(i).queries.len()));
    let pairs = call.extra.map_or(0, |extra| extra.len() * dims.q_heads * queries.sum::<usize>());
    2 * (pairs * (dims.head_dim + dims.value_dim)) as u64
}

/// The definition of softmax attention over rows of a head. `shift` gives what
/// is added to the scaled score of a query and a key, if that is visible.
pub(crate) fn define<R: Real>(
    [q, k, v]: [&Array2<R>; 3],
    scale: f64,
    shift: impl Fn(usize, usize) -> Option<f64>,
) -> Array2<R> {
    let score = |i, j, score: R| score + R::of(shift(i, j).unwrap_or(0.0));
    attend([q, k, v], scale, |i, j| shift(i, j).is_some(), score)
}

/// Refuses an output that does not fit.
pub(crate) fn check_out<X: Input>(x: &X, out: &ArrayViewMut4<'_, X::Out>) -> Result<()> {
    let want = x.out_dim()?;
    if out.dim() == want {
        return Ok(());
    }
    let (batch, q_heads, q_len, value_dim) = want;
    let expected = format!("[batch, q_heads, q_len, value_dim] = [{batch}, {q_heads}, {q_len}, {value_dim}]");
    Err(Error::shape("out", expected, out.shape()))
}

/// Refuses an LSE output that does not fit.
pub(crate) fn check_lse<X: Input>(x: &X, lse: &ArrayViewMut3<'_, f32>) -> Result<()> {
    let (batch, q_heads, q_len, _) = x.out_dim()?;
    if lse.dim() == (batch, q_heads, q_len) {
        return Ok(());
    }
    let expected = format!("[batch, q_heads, q_len] = [{batch}, {q_heads}, {q_len}]");
    Err(Error::shape("lse", expected, lse.shape()))
}

/// Refuses packed queries over a cache, whose tokens have no columns in common.
pub(crate) fn check_columns<Q: Element, C: Cache + ?Sized, O: Element>(
    x: &Cached<'_, Q, C, O>,
) -> Result<()> {
    if !x.dims()?.packed {
        return Ok(());
    }
    let reason = "keys of a cache lie apart: ask for the weights of each sequence";
    Err(Error::Conflict { option: "weights", with: "packed queries over a cache", reason })
}

/// A mechanism that is one call of the attention engine. With
/// [`attending!`] it has [`Attention`](crate::Attention),
/// [`Bounded`](crate::Bounded) and [`Weights`](crate::Weights).
pub(crate) trait Attending<X: Input> {
    /// Hands `run` the call for an input, which has been checked then.
    fn with_call<R>(&self, x: X, run: impl FnOnce(&Call<'_>) -> R) -> Result<R>;

    /// The definition of the same.
    fn define(&self, x: X) -> Result<Reference>;

    /// What the call costs.
    fn price(&self, x: X) -> Result<Cost>;
}

/// [`Attention::forward_into`](crate::Attention::forward_into), and the LSE
/// where there is a place for it.
pub(crate) fn forward_into<X: Input>(
    mechanism: &impl Attending<X>,
    x: X,
    out: ArrayViewMut4<'_, X::Out>,
    lse: Option<ArrayViewMut3<'_, f32>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let checked = check_out(&x, &out).and_then(|()| lse.as_ref().map_or(Ok(()), |lse| check_lse(&x, lse)));
    mechanism.with_call(x, |call| {
        checked?;
        engine::run(call, out, lse.map(|lse| lse.insert_axis(Axis(3))), workspace)
    })?
}

/// The traits of a mechanism that is [`Attending`] inputs of a type with
/// these parameters, or `caches`.
macro_rules! attending {
    (@kernel [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> crate::attention::Attention<$input> for $mechanism {
            fn workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                self.with_call(x, crate::engine::workspace_bytes)
            }

            fn forward_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::attend::forward_into(self, x, out, None, workspace)
            }

            fn reference(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                Ok(self.define(x)?.out)
            }

            fn cost(&self, x: $input) -> crate::error::Result<crate::attention::Cost> {
                self.price(x)
            }
        }

        impl<$($generics)*> crate::attention::Bounded<$input> for $mechanism {
            fn error_bound(&self, x: $input) -> crate::error::Result<ndarray::Array3<f64>> {
                Ok(self.define(x)?.bound)
            }
        }
    };
    (@weights [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> crate::attention::Weights<$input> for $mechanism {
            fn scores(&self, x: $input) -> crate::error::Result<ndarray::Array4<f32>> {
                self.with_call(x, crate::engine::weights::scores)?
            }

            fn weights(&self, x: $input) -> crate::error::Result<ndarray::Array4<f32>> {
                self.with_call(x, crate::engine::weights::materialize)?
            }

            fn key_weights(&self, x: $input) -> crate::error::Result<ndarray::Array3<f32>> {
                self.with_call(x, crate::engine::weights::sum_over_queries)?
            }

            fn top_weights(
                &self,
                x: $input,
                count: usize,
            ) -> crate::error::Result<crate::attention::TopWeights> {
                self.with_call(x, |call| crate::engine::weights::top(call, count))?
            }

            fn reference_scores(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                Ok(self.define(x)?.scores)
            }

            fn reference_weights(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                Ok(self.define(x)?.weights)
            }
        }
    };
    (@weights_cached [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        /// Of sequences that are not packed: a column is a token of each.
        impl<$($generics)*> crate::attention::Weights<$input> for $mechanism {
            fn scores(&self, x: $input) -> crate::error::Result<ndarray::Array4<f32>> {
                crate::stages::attend::check_columns(&x)?;
                self.with_call(x, crate::engine::weights::scores)?
            }

            fn reference_scores(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                crate::stages::attend::check_columns(&x)?;
                Ok(self.define(x)?.scores)
            }

            fn weights(&self, x: $input) -> crate::error::Result<ndarray::Array4<f32>> {
                crate::stages::attend::check_columns(&x)?;
                self.with_call(x, crate::engine::weights::materialize)?
            }

            fn key_weights(&self, x: $input) -> crate::error::Result<ndarray::Array3<f32>> {
                crate::stages::attend::check_columns(&x)?;
                self.with_call(x, crate::engine::weights::sum_over_queries)?
            }

            fn top_weights(
                &self,
                x: $input,
                count: usize,
            ) -> crate::error::Result<crate::attention::TopWeights> {
                crate::stages::attend::check_columns(&x)?;
                self.with_call(x, |call| crate::engine::weights::top(call, count))?
            }

            fn reference_weights(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                crate::stages::attend::check_columns(&x)?;
                Ok(self.define(x)?.weights)
            }
        }
    };
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, caches) => {
        $crate::stages::attend::attending!(
            @weights_cached [
                Q: crate::element::Element,
                C: crate::cache::Cache + ?Sized,
                O: crate::element::Element
                $($(, $param: $bound)+)?
            ]
            crate::cache::Cached<'_, Q, C, O>, $mechanism
        );
        $crate::stages::attend::attending!(
            @kernel [
                Q: crate::element::Element,
                C: crate::cache::Cache + ?Sized,
                O: crate::element::Element
                $($(, $param: $bound)+)?
            ]
            crate::cache::Cached<'_, Q, C, O>, $mechanism
        );
    };
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, [$($element:ident),+] $input:ident) => {
        $crate::stages::attend::attending!(
            @kernel [$($element: crate::element::Element),+ $($(, $param: $bound)+)?]
            $input<'_, $($element),+>, $mechanism
        );
        $crate::stages::attend::attending!(
            @weights [$($element: crate::element::Element),+ $($(, $param: $bound)+)?]
            $input<'_, $($element),+>, $mechanism
        );
    };
}
pub(crate) use attending;

/// [`Mergeable`](crate::Mergeable) for a mechanism that is [`Attending`] by
/// softmax.
macro_rules! mergeable {
    (@impl [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> crate::attention::Mergeable<$input> for $mechanism {
            fn forward_with_lse_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                lse: ndarray::ArrayViewMut3<'_, f32>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::attend::forward_into(self, x, out, Some(lse), workspace)
            }
        }
    };
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, caches) => {
        $crate::stages::attend::mergeable!(
            @impl [
                Q: crate::element::Element,
                C: crate::cache::Cache + ?Sized,
                O: crate::element::Element
                $($(, $param: $bound)+)?
            ]
            crate::cache::Cached<'_, Q, C, O>, $mechanism
        );
    };
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, [$($element:ident),+] $input:ident) => {
        $crate::stages::attend::mergeable!(
            @impl [$($element: crate::element::Element),+ $($(, $param: $bound)+)?]
            $input<'_, $($element),+>, $mechanism
        );
    };
}
pub(crate) use mergeable;

/// The builder methods that every dense mechanism has. Mask and score can be
/// set once: a second one would silently replace the first, so there is no
/// such method.
macro_rules! common_options {
    ($builder:ident { $($own:ident),* }) => {
        impl<F: crate::score::Score> $builder<crate::mask::Unmasked, F> {
            /// Which keys a query may see. Combine masks with
            /// [`Mask::and`](crate::mask::Mask::and), `or` and `not`.
            pub fn mask<M: crate::mask::Mask>(self, mask: M) -> $builder<M, F> {
                $builder { options: self.options.mask(mask), $($own: self.$own),* }
            }

            /// `mask(Causal::new())`: keys at the query's position and before,
            /// the last query at the last key.
            pub fn causal(self) -> $builder<crate::mask::Causal, F> {
                self.mask(crate::mask::Causal::new())
            }
        }

        impl<F: crate::score::Score> $builder<crate::mask::Causal, F> {
            /// What both masks let a query see: `causal().mask(other)`.
            pub fn mask<M: crate::mask::Mask>(
                self,
                mask: M,
            ) -> $builder<crate::mask::And<crate::mask::Causal, M>, F> {
                let options = self.options.map_mask(|causal| crate::mask::Mask::and(causal, mask));
                $builder { options, $($own: self.$own),* }
            }
        }

        impl<M: crate::mask::Mask> $builder<M, crate::score::Plain> {
            /// What happens to scores before they become weights. Combine
            /// changes with [`Score::then`](crate::score::Score::then).
            pub fn score<F: crate::score::Score>(self, score: F) -> $builder<M, F> {
                $builder { options: self.options.score(score), $($own: self.$own),* }
            }
        }

        impl<M: crate::mask::Mask, F: crate::score::Score> $builder<M, F> {
            /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }
        }
    };
}
pub(crate) use common_options;
