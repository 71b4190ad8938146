//! The operator LinearAttention.

use ndarray::{Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis};

use crate::attention::Recurrent;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::input::state::State;
use crate::linear::{
    ChannelGated, DeltaNet, DeltaQkv, GatedDeltaNet, GatedDeltaQkv, Gla, Kda, KdaQkv, Lightning, SimpleGla,
    TokenGated,
};
use crate::onnx::{unpacked, unpacked_mut};

/// What a token does to the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UpdateRule {
    /// `S + k v^T`
    Linear,
    /// `exp(g) S + k v^T`
    Gated,
    /// `S + beta k (v - S^T k)^T`
    Delta,
    /// `S' + beta k (v - S'^T k)^T` with `S' = exp(g) S`
    #[default]
    GatedDelta,
}

impl UpdateRule {
    /// The rule of a name: `linear`, `gated`, `delta` or `gated_delta`.
    ///
    /// # Errors
    /// [`Error::Value`] for another.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "linear" => Ok(Self::Linear),
            "gated" => Ok(Self::Gated),
            "delta" => Ok(Self::Delta),
            "gated_delta" => Ok(Self::GatedDelta),
            _ => Err(Error::value("update_rule", "linear, gated, delta or gated_delta", name)),
        }
    }
}

/// Inputs of [`LinearAttention`], by the operator's names; the state may be of a type of
/// its own.
#[derive(Clone, Debug)]
pub struct LinearAttentionInputs<'a, T, S = T> {
    /// Queries, `[batch, len, q_num_heads * dk]`.
    pub query: ArrayView3<'a, T>,
    /// Keys, `[batch, len, kv_num_heads * dk]`, taken as they are.
    pub key: ArrayView3<'a, T>,
    /// Values, `[batch, len, kv_num_heads * dv]`.
    pub value: ArrayView3<'a, T>,
    /// The state before the first token, `[batch, kv_num_heads, dk, dv]`, or zero.
    pub past_state: Option<ArrayView4<'a, S>>,
    /// Log decays `g` of the gated rules, `[batch, len, kv_num_heads]` or `[batch, len,
    /// kv_num_heads * dk]`.
    pub decay: Option<ArrayView3<'a, T>>,
    /// How much of what is stored a delta rule replaces, `[batch, len, kv_num_heads]` or
    /// `[batch, len, 1]`.
    pub beta: Option<ArrayView3<'a, T>>,
}

impl<'a, T, S> LinearAttentionInputs<'a, T, S> {
    /// Without a state, decays and `beta`.
    pub fn new(query: ArrayView3<'a, T>, key: ArrayView3<'a, T>, value: ArrayView3<'a, T>) -> Self {
        Self { query, key, value, past_state: None, decay: None, beta: None }
    }
}

/// The operator LinearAttention of opset 27; fields are its attributes.
///
/// ```text
/// S_t = the update rule,   o_t = scale * q_t^T S_t
/// ```
///
/// Query heads of a group read the state of their key head. Positive decays are growth,
/// as they are there. `scale` 0 is `1 / sqrt(dk)`.
///
/// The rules are [`Lightning`] without decays, [`SimpleGla`] or [`Gla`], [`DeltaNet`],
/// [`GatedDeltaNet`] or [`Kda`], by whether decays are of heads or of channels.
///
/// Cost: that of the mechanism, with a state for each query head; decays and `beta` are
/// widened to f32 in a copy.
///
/// ```
/// use attention_kernels::onnx::{LinearAttention, LinearAttentionInputs};
/// use ndarray::Array3;
///
/// let (x, numbers) = (Array3::<f32>::from_elem((1, 100, 2 * 16), 0.1), Array3::from_elem((1, 100, 2), 0.5));
/// let operator = LinearAttention::new(2, 2);
/// let decay = numbers.mapv(|x| -x);
/// let (y, state) = operator.forward(LinearAttentionInputs {
///     decay: Some(decay.view()),
///     beta: Some(numbers.view()),
///     ..LinearAttentionInputs::<_, f32>::new(x.view(), x.view(), x.view())
/// })?;
/// assert_eq!((y.dim(), state.dim()), ((1, 100, 32), (1, 2, 16, 16)));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// Calls are refused whose shapes do not fit, gated rules without decays and others with
/// them, delta rules without `beta` and others with it.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearAttention {
    /// A hint of the operator's, which nothing depends on. Default: 64.
    pub chunk_size: usize,
    /// Heads of keys and values.
    pub kv_num_heads: usize,
    /// Heads of queries, a multiple of those.
    pub q_num_heads: usize,
    /// The factor of outputs, or 0 for `1 / sqrt(dk)`. Default: 0.
    pub scale: f32,
    /// What a token does to the state. Default: [`UpdateRule::GatedDelta`].
    pub update_rule: UpdateRule,
}

impl LinearAttention {
    /// Of so many heads, with the defaults of the operator.
    pub fn new(q_num_heads: usize, kv_num_heads: usize) -> Self {
        Self { chunk_size: 64, kv_num_heads, q_num_heads, scale: 0.0, update_rule: UpdateRule::default() }
    }

    /// The output `[batch, len, q_num_heads * dv]`, and the state after the last token,
    /// `[batch, kv_num_heads, dk, dv]`.
    ///
    /// # Errors
    /// What does not fit.
    pub fn forward<T: Element, S: Element>(
        &self,
        x: LinearAttentionInputs<'_, T, S>,
    ) -> Result<(Array3<T>, Array4<S>)> {
        let (heads, groups) = (self.q_num_heads, self.kv_num_heads);
        if groups == 0 || heads == 0 || !heads.is_multiple_of(groups) {
            let expected = format!("a multiple of the {groups} key/value heads, and at least 1 of both");
            return Err(Error::value("q_num_heads", expected, heads));
        }
        let q = unpacked("query", x.query, ("q_num_heads", heads))?;
        let k = unpacked("key", x.key, ("kv_num_heads", groups))?;
        let v = unpacked("value", x.value, ("kv_num_heads", groups))?;
        let ((batch, _, len, dk), dv) = (q.dim(), v.dim().3);
        for (argument, have, dim) in [("key", &k, dk), ("value", &v, dv)] {
            if have.dim() != (batch, groups, len, dim) {
                let expected = format!("[batch, len, heads * dim] = [{batch}, {len}, {groups} * {dim}]");
                return Err(Error::shape(
                    argument,
                    expected,
                    &[have.dim().0, have.dim().2, groups * have.dim().3],
                ));
            }
        }
        let gated = matches!(self.update_rule, UpdateRule::Gated | UpdateRule::GatedDelta);
        let delta = matches!(self.update_rule, UpdateRule::Delta | UpdateRule::GatedDelta);
        let decay = self.numbers("decay", gated, x.decay, [batch, len], [groups, groups * dk])?;
        let beta = self.numbers("beta", delta, x.beta, [batch, len], [groups, 1])?;
        // Query heads of a group have a state each.
        let of = |head: usize| head * groups / heads;
        let mut state = match x.past_state {
            None => State::zeros((batch, heads, dk, dv))?,
            Some(past) if past.dim() != (batch, groups, dk, dv) => {
                let expected = format!("[batch, kv_num_heads, dk, dv] = [{batch}, {groups}, {dk}, {dv}]");
                return Err(Error::shape("past_state", expected, past.shape()));
            }
            Some(past) => State::new(Array4::from_shape_fn((batch, heads, dk, dv), |(b, h, d, e)| {
                past[[b, of(h), d, e]].to_f32()
            }))?,
        };
        let mut out = Array3::from_elem((batch, len, heads * dv), T::default());
        let to = unpacked_mut("output", out.view_mut(), heads)?;
        let scale = if self.scale == 0.0 { 1.0 / (dk.max(1) as f32).sqrt() } else { self.scale };
        self.run(Qkv::new(q.view(), k.view(), v.view()), scale, [decay, beta], &mut state, to)?;
        let present = Array4::from_shape_fn((batch, groups, dk, dv), |(b, h, d, e)| {
            S::from_f32(state.view()[[b, h * heads / groups, d, e]])
        });
        Ok((out, present))
    }

    fn run<T: Element>(
        &self,
        x: Qkv<'_, T>,
        scale: f32,
        [decay, beta]: [Option<Array3<f32>>; 2],
        state: &mut State,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<()> {
        let (workspace, groups) = (&mut Workspace::new(), self.kv_num_heads);
        let by_head =
            |x: &'_ Option<Array3<f32>>| x.as_ref().map(|x| x.view().permuted_axes([0, 2, 1]).to_owned());
        let (tokens, weights) = (by_head(&decay), by_head(&beta).unwrap_or_default());
        let channels = decay.as_ref().filter(|decay| decay.dim().2 != groups);
        let channels = channels.map(|x| unpacked("decay", x.view(), ("kv_num_heads", groups))).transpose()?;
        let tokens = tokens.unwrap_or_default();
        let x = x.reborrow();
        match (self.update_rule, &channels) {
            (UpdateRule::Linear, _) => {
                let slopes = vec![0.0; self.q_num_heads];
                Lightning::from_slopes(&slopes).scale(scale).build()?.prefill_into(x, state, out, workspace)
            }
            (UpdateRule::Gated, None) => {
                let x = TokenGated::new(x, tokens.view());
                let gla = SimpleGla::builder().scale(scale).allow_growth().build()?;
                gla.prefill_into(x, state, out, workspace)
            }
            (UpdateRule::Gated, Some(decay)) => {
                let x = ChannelGated::new(x, decay.view());
                let gla = Gla::builder().scale(scale).allow_growth().build()?;
                gla.prefill_into(x, state, out, workspace)
            }
            (UpdateRule::Delta, _) => {
                let x = DeltaQkv::new(x, weights.view());
                DeltaNet::builder().scale(scale).build()?.prefill_into(x, state, out, workspace)
            }
            (UpdateRule::GatedDelta, None) => {
                let x = GatedDeltaQkv::new(x, tokens.view(), weights.view());
                let delta = GatedDeltaNet::builder().scale(scale).allow_growth().build()?;
                delta.prefill_into(x, state, out, workspace)
            }
            (UpdateRule::GatedDelta, Some(decay)) => {
                let x = KdaQkv::new(x, decay.view(), weights.view());
                let kda = Kda::builder().scale(scale).allow_growth().build()?;
                kda.prefill_into(x, state, out, workspace)
            }
        }
    }

    /// Numbers of tokens, of one of two widths, where the rule has them.
    fn numbers<T: Element>(
        &self,
        argument: &'static str,
        has: bool,
        x: Option<ArrayView3<'_, T>>,
        [batch, len]: [usize; 2],
        widths: [usize; 2],
    ) -> Result<Option<Array3<f32>>> {
        let x = match (x, has) {
            (None, false) => return Ok(None),
            (Some(x), true) => x,
            (None, true) => {
                return Err(Error::value(argument, format!("an array for {:?}", self.update_rule), "none"));
            }
            (Some(x), false) => {
                let expected = format!("none for {:?}", self.update_rule);
                return Err(Error::value(argument, expected, format_args!("an array {:?}", x.shape())));
            }
        };
        if (x.dim().0, x.dim().1) != (batch, len) || !widths.contains(&x.len_of(Axis(2))) {
            let expected = format!("[batch, len, {} or {}] with [{batch}, {len}]", widths[0], widths[1]);
            return Err(Error::shape(argument, expected, x.shape()));
        }
        Ok(Some(x.mapv(T::to_f32)))
    }
}
