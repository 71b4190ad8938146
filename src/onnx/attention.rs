//! The operator Attention.

use ndarray::{
    Array4, ArrayD, ArrayView1, ArrayView4, ArrayViewD, ArrayViewMut4, Axis, CowArray, Ix3, Ix4, IxDyn,
    concatenate, s,
};

use crate::attention::{Attention as _, Weights};
use crate::dense::{Dense, DenseBuilder};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::{Boolean, Mask, Window};
use crate::onnx::{unpacked, unpacked_mut};
use crate::score::{Bias, Chosen, Score, Softcap};

/// What of the keys a query sees, or what is added to its scores: broadcast from the right
/// to `[batch, q_num_heads, q_sequence_length, total_sequence_length]`.
#[derive(Clone, Debug)]
pub enum AttentionMask<'a, T> {
    /// True takes part.
    Bool(ArrayViewD<'a, bool>),
    /// Added to scores; -inf hides a key. It is widened to f32 in a copy.
    Float(ArrayViewD<'a, T>),
}

/// Inputs of [`Attention`], by the operator's names.
#[derive(Clone, Debug)]
pub struct AttentionInputs<'a, T> {
    /// Queries, `[batch, q_num_heads, q_sequence_length, head_size]` or `[batch,
    /// q_sequence_length, q_num_heads * head_size]`.
    pub q: ArrayViewD<'a, T>,
    /// Keys, of as many axes.
    pub k: ArrayViewD<'a, T>,
    /// Values, of as many axes.
    pub v: ArrayViewD<'a, T>,
    /// Who sees whom.
    pub attn_mask: Option<AttentionMask<'a, T>>,
    /// Keys before those of the call, `[batch, kv_num_heads, past_sequence_length, head_size]`.
    pub past_key: Option<ArrayView4<'a, T>>,
    /// Values before those of the call.
    pub past_value: Option<ArrayView4<'a, T>>,
    /// How many keys of each batch entry are no padding, `[batch]`.
    pub nonpad_kv_seqlen: Option<ArrayView1<'a, i64>>,
}

impl<'a, T> AttentionInputs<'a, T> {
    /// Without mask, past and padding.
    pub fn new(q: ArrayViewD<'a, T>, k: ArrayViewD<'a, T>, v: ArrayViewD<'a, T>) -> Self {
        Self { q, k, v, attn_mask: None, past_key: None, past_value: None, nonpad_kv_seqlen: None }
    }
}

/// Outputs of [`Attention`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionOutputs<T> {
    /// `Y`, with the axes of `Q`.
    pub y: ArrayD<T>,
    /// Keys of the past and of the call, `[batch, kv_num_heads, total_sequence_length,
    /// head_size]`, where there is a past. Without one they are `K`, which is not copied.
    pub present_key: Option<Array4<T>>,
    /// Values likewise.
    pub present_value: Option<Array4<T>>,
    /// What [`qk_matmul_output_mode`](Attention::qk_matmul_output_mode) says, `[batch,
    /// q_num_heads, q_sequence_length, total_sequence_length]`, where it was asked for.
    pub qk_matmul_output: Option<Array4<T>>,
}

/// The operator Attention of opsets 23 to 25; fields are its attributes.
///
/// ```text
/// s = softcap(scale Q K^T) + mask         softcap(x) = softcap tanh(x / softcap)
/// Y = softmax(s) V
/// ```
///
/// Query `i` sits at position `i + offset`: `offset` is `past_sequence_length` with a past,
/// `nonpad_kv_seqlen - q_sequence_length` of its batch entry with that, and else 0. A causal
/// query sees keys at its position and before, a window reaches from `left_window_size`
/// before it to `right_window_size` after it; all of this and the mask must let a key
/// through. A query without any key has 0 in `Y` and in the weights of mode 3.
///
/// What differs between opsets: `nonpad_kv_seqlen` is of 24 and later, windows are of 25.
/// The last axis of a mask may be shorter than the keys from 24 on, those beyond it are
/// hidden, and a single entry stands for the first key alone; in 23 it stands for all keys.
/// With 4 axes 25 takes no numbers of heads; before, they must be those of the arrays.
/// Softmax is computed in f32, which serves a `softmax_precision` of f32 and of half types.
///
/// Cost: that of [`Dense`]. `qk_matmul_output` is computed when it is asked for, in a
/// second run.
///
/// ```
/// use attention_kernels::onnx::{Attention, AttentionInputs};
/// use ndarray::{Array3, Array4};
///
/// let q = Array3::<f32>::ones((1, 2, 8 * 64)); // batch, queries, heads and their channels
/// let kv = Array3::<f32>::ones((1, 2, 2 * 64));
/// let past = Array4::<f32>::ones((1, 2, 7, 64));
/// let attention = Attention {
///     is_causal: true,
///     q_num_heads: Some(8),
///     kv_num_heads: Some(2),
///     ..Attention::default()
/// };
/// let [q, k, v] = [&q, &kv, &kv].map(|x| x.view().into_dyn());
/// let out = attention.forward(AttentionInputs {
///     past_key: Some(past.view()),
///     past_value: Some(past.view()),
///     ..AttentionInputs::new(q, k, v)
/// })?;
/// assert_eq!(out.y.shape(), [1, 2, 8 * 64]);
/// assert_eq!(out.present_key.unwrap().dim(), (1, 2, 9, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// Calls are refused whose shapes do not fit, and what the opset does not have or excludes.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// The operator's version: 23, 24 or 25.
    pub opset: usize,
    /// Whether queries see keys at their position and before alone. Default: false.
    pub is_causal: bool,
    /// Of keys and values of 3 axes.
    pub kv_num_heads: Option<usize>,
    /// Keys before its position that a query sees, -1 for all. Default: -1.
    pub left_window_size: i64,
    /// Of queries of 3 axes.
    pub q_num_heads: Option<usize>,
    /// What `qk_matmul_output` is: 0, `scale Q K^T`; 1, after the softcap; 2, after the mask,
    /// -inf where a key is hidden; 3, the weights. Default: 0.
    pub qk_matmul_output_mode: i64,
    /// Keys after its position that a query sees, -1 for all. Default: -1.
    pub right_window_size: i64,
    /// The factor of scores. Default: `1 / sqrt(head_size)`.
    pub scale: Option<f32>,
    /// What scores do not pass; 0 is none. Default: 0.
    pub softcap: f32,
    /// Of the softmax: 1 (f32), 10 (f16) or 16 (bf16).
    pub softmax_precision: Option<i64>,
}

impl Default for Attention {
    fn default() -> Self {
        Self {
            opset: 25,
            is_causal: false,
            kv_num_heads: None,
            left_window_size: -1,
            q_num_heads: None,
            qk_matmul_output_mode: 0,
            right_window_size: -1,
            scale: None,
            softcap: 0.0,
            softmax_precision: None,
        }
    }
}

impl Attention {
    /// `Y`, and what is present where there is a past.
    ///
    /// # Errors
    /// What does not fit.
    pub fn forward<T: Element>(&self, x: AttentionInputs<'_, T>) -> Result<AttentionOutputs<T>> {
        self.run(&x, false)
    }

    /// The same with `qk_matmul_output`.
    ///
    /// # Errors
    /// What does not fit.
    pub fn forward_with_qk<T: Element>(&self, x: AttentionInputs<'_, T>) -> Result<AttentionOutputs<T>> {
        self.run(&x, true)
    }

    fn check(&self) -> Result<()> {
        if !(23..=25).contains(&self.opset) {
            return Err(Error::value("opset", "23, 24 or 25", self.opset));
        }
        if !(0..=3).contains(&self.qk_matmul_output_mode) {
            return Err(Error::value("qk_matmul_output_mode", "0, 1, 2 or 3", self.qk_matmul_output_mode));
        }
        if let Some(of) = self.softmax_precision.filter(|of| ![1, 10, 16].contains(of)) {
            let expected = "1 (f32), 10 (f16) or 16 (bf16), which f32 serves";
            return Err(Error::value("softmax_precision", expected, of));
        }
        if let Some(scale) = self.scale.filter(|&scale| !(0.0..f32::INFINITY).contains(&scale)) {
            return Err(Error::value("scale", "a finite number of at least 0", scale));
        }
        if !(0.0..f32::INFINITY).contains(&self.softcap) {
            return Err(Error::value("softcap", "a finite number of at least 0", self.softcap));
        }
        for (name, size) in
            [("left_window_size", self.left_window_size), ("right_window_size", self.right_window_size)]
        {
            if size < -1 {
                return Err(Error::value(name, "a number of keys, or -1", size));
            }
            if size >= 0 && self.opset < 25 {
                return Err(Error::value(name, format!("-1 in opset {}", self.opset), size));
            }
        }
        Ok(())
    }

    /// An array of 3 or 4 axes as `[batch, heads, len, dim]`.
    fn with_heads<'a, T: Element>(
        &self,
        argument: &'static str,
        x: &'a ArrayViewD<'_, T>,
        (attribute, heads): (&'static str, Option<usize>),
    ) -> Result<CowArray<'a, T, Ix4>> {
        if let Ok(x) = x.view().into_dimensionality::<Ix4>() {
            return match heads {
                Some(_) if self.opset == 25 => {
                    let reason = "they have an axis of heads";
                    Err(Error::Conflict { option: attribute, with: "inputs of 4 axes", reason })
                }
                Some(heads) if heads != x.dim().1 => {
                    Err(Error::value(attribute, format!("the {} heads of {argument}", x.dim().1), heads))
                }
                _ => Ok(x.into()),
            };
        }
        let Ok(packed) = x.view().into_dimensionality::<Ix3>() else {
            let expected = "[batch, heads, len, dim] or [batch, len, heads * dim]";
            return Err(Error::shape(argument, expected, x.shape()));
        };
        let Some(heads) = heads else {
            return Err(Error::value(attribute, "a number of heads for inputs of 3 axes", "none"));
        };
        unpacked(argument, packed, (attribute, heads))
    }

    fn run<T: Element>(&self, x: &AttentionInputs<'_, T>, with_qk: bool) -> Result<AttentionOutputs<T>> {
        self.check()?;
        let packed = x.q.ndim() == 3;
        for (argument, other) in [("K", &x.k), ("V", &x.v)] {
            if other.ndim() != x.q.ndim() {
                let expected = format!("{} axes, as Q has", x.q.ndim());
                return Err(Error::shape(argument, expected, other.shape()));
            }
        }
        let q = self.with_heads("Q", &x.q, ("q_num_heads", self.q_num_heads))?;
        let k = self.with_heads("K", &x.k, ("kv_num_heads", self.kv_num_heads))?;
        let v = self.with_heads("V", &x.v, ("kv_num_heads", self.kv_num_heads))?;
        let past = match (&x.past_key, &x.past_value) {
            (None, None) => None,
            (Some(key), Some(value)) => Some((key, value)),
            (Some(_), None) => return Err(Error::value("past_value", "an array with past_key", "none")),
            (None, Some(_)) => return Err(Error::value("past_key", "an array with past_value", "none")),
        };
        let lengths = self.lengths(x, &k, past.is_some())?;
        let joined = |argument, past: &ArrayView4<'_, T>, x: &CowArray<'_, T, Ix4>| {
            concatenate(Axis(2), &[past.view(), x.view()]).map_err(|_| {
                let (batch, heads, _, dim) = x.dim();
                let expected = format!("[batch, kv_num_heads, any, dim] = [{batch}, {heads}, any, {dim}]");
                Error::shape(argument, expected, past.shape())
            })
        };
        let past_len = past.map_or(0, |(key, _)| key.dim().2);
        let [present_key, present_value] = match past {
            None => [None, None],
            Some((key, value)) => {
                let (key, value) = (joined("past_key", key, &k)?, joined("past_value", value, &v)?);
                [Some(key), Some(value)]
            }
        };
        let k = present_key.as_ref().map_or(k.view(), |x| x.view());
        let v = present_value.as_ref().map_or(v.view(), |x| x.view());
        let qkv = Qkv::new(q.view(), k, v);
        let dims = qkv.dims()?;
        let shape = [dims.batch, dims.q_heads, dims.q_len, dims.kv_len];
        // Keys that a mask does not reach are hidden from all queries: they are left out.
        let (mask, keys) = self.mask(x, shape)?;
        if let Some(&longest) = lengths.iter().flatten().max().filter(|&&longest| longest > keys) {
            let expected = format!("a last axis of at least the {longest} keys of nonpad_kv_seqlen");
            return Err(Error::shape("attn_mask", expected, &[keys]));
        }
        let seen =
            Qkv::new(q.view(), k.slice_move(s![.., .., ..keys, ..]), v.slice_move(s![.., .., ..keys, ..]));
        let seen = lengths.as_ref().map_or(seen, |lengths| seen.key_lengths(lengths));
        let (left, right) = (self.left_window_size, self.right_window_size);
        let right = if self.is_causal { 0 } else { right };
        let [left, right] = [left, right].map(|size| usize::try_from(size).ok());
        let window = Window::new(left, right);
        // With lengths the last query is at the last key, as it is by default.
        let window = if lengths.is_some() { window } else { window.at(past_len as isize) };
        let bias = match &mask {
            Some(Mapped::Float(bias)) => Some(Bias::new(bias.view())),
            _ => None,
        };
        let visible: Box<dyn Mask + '_> = match &mask {
            Some(Mapped::Bool(visible)) => Box::new(window.and(Boolean::new(visible.view()))),
            _ => Box::new(window),
        };
        let cap = Some(self.softcap).filter(|&cap| cap > 0.0).map(Softcap::new).transpose()?;
        let score = match (cap, bias) {
            (None, None) => None,
            (Some(cap), None) => Some(Chosen::new(cap)),
            (None, Some(bias)) => Some(Chosen::new(bias)),
            (Some(cap), Some(bias)) => Some(Chosen::new(cap.then(bias))),
        };
        let [batch, heads, len, _] = shape;
        let mut y = match packed {
            true => ArrayD::from_elem(vec![batch, len, heads * dims.value_dim], T::default()),
            false => ArrayD::from_elem(vec![batch, heads, len, dims.value_dim], T::default()),
        };
        let out = if packed {
            let by_token = y.view_mut().into_dimensionality::<Ix3>();
            by_token.ok().map(|y| unpacked_mut("Y", y, heads)).transpose()?
        } else {
            y.view_mut().into_dimensionality::<Ix4>().ok()
        };
        // Always of as many axes.
        let Some(out) = out else { return Err(Error::shape("Q", "3 or 4 axes", x.q.shape())) };
        let qk = Some(self.qk_matmul_output_mode).filter(|_| with_qk);
        let builder = self.builder();
        let qk = match score {
            None => heard(&builder.mask(visible).build()?, seen, out, qk)?,
            Some(score) => heard(&builder.mask(visible).score(score).build()?, seen, out, qk)?,
        };
        let qk = match (self.qk_matmul_output_mode, with_qk) {
            (_, false) => None,
            (0, _) => Some(self.builder().build()?.scores(qkv)?),
            (1, _) => Some(match cap {
                None => self.builder().build()?.scores(qkv)?,
                Some(cap) => self.builder().score(cap).build()?.scores(qkv)?,
            }),
            (mode, _) => {
                let hidden = if mode == 2 { f32::NEG_INFINITY } else { 0.0 };
                let mut all = Array4::from_elem(shape, hidden);
                all.slice_mut(s![.., .., .., ..keys]).assign(&qk.unwrap_or_default());
                Some(all)
            }
        };
        let qk_matmul_output = qk.map(|qk| qk.mapv(T::from_f32));
        Ok(AttentionOutputs { y, present_key, present_value, qk_matmul_output })
    }

    fn builder(&self) -> DenseBuilder {
        match self.scale {
            Some(scale) => Dense::builder().scale(scale),
            None => Dense::builder(),
        }
    }

    /// Keys of each batch entry that are no padding.
    fn lengths<T: Element>(
        &self,
        x: &AttentionInputs<'_, T>,
        k: &CowArray<'_, T, Ix4>,
        past: bool,
    ) -> Result<Option<Vec<usize>>> {
        let Some(lengths) = &x.nonpad_kv_seqlen else { return Ok(None) };
        if self.opset < 24 {
            return Err(Error::value("nonpad_kv_seqlen", "none in opset 23", "an array"));
        }
        if past {
            let reason = "keys are either joined here or lie in a cache that is padded";
            return Err(Error::Conflict { option: "nonpad_kv_seqlen", with: "past_key", reason });
        }
        let (batch, _, kv_len, _) = k.dim();
        if lengths.len() != batch {
            return Err(Error::shape("nonpad_kv_seqlen", format!("[batch] = [{batch}]"), lengths.shape()));
        }
        let of = |&len: &i64| {
            let fits = usize::try_from(len).ok().filter(|&len| len <= kv_len);
            fits.ok_or_else(|| Error::value("nonpad_kv_seqlen", format!("0 to {kv_len} keys"), len))
        };
        Ok(Some(lengths.iter().map(of).collect::<Result<_>>()?))
    }

    /// The mask with four axes, and the keys that it reaches.
    fn mask<'a, T: Element>(
        &self,
        x: &'a AttentionInputs<'_, T>,
        shape: [usize; 4],
    ) -> Result<(Option<Mapped<'a>>, usize)> {
        let total = shape[3];
        let (mapped, given) = match &x.attn_mask {
            None => return Ok((None, total)),
            Some(AttentionMask::Bool(mask)) => (four(mask.view().into()).map(Mapped::Bool), mask.shape()),
            Some(AttentionMask::Float(mask)) => {
                (four(mask.mapv(T::to_f32).into()).map(Mapped::Float), mask.shape())
            }
        };
        let short = self.opset >= 24;
        let wrong = || {
            let least = if short { "at most " } else { "" };
            let expected =
                format!("what broadcasts to [{}, {}, {}, {least}{total}]", shape[0], shape[1], shape[2]);
            Error::shape("attn_mask", expected, given)
        };
        let mapped = mapped.ok_or_else(wrong)?;
        let dim = mapped.dim();
        let fits = (0..3).all(|axis| dim[axis] == 1 || dim[axis] == shape[axis]);
        let keys = if short { dim[3] } else { total };
        if !fits || keys > total || !short && dim[3] != total && dim[3] != 1 {
            return Err(wrong());
        }
        Ok((Some(mapped), keys))
    }
}

/// A mask of four axes, each whole or 1.
enum Mapped<'a> {
    Bool(CowArray<'a, bool, Ix4>),
    Float(CowArray<'a, f32, Ix4>),
}

impl Mapped<'_> {
    fn dim(&self) -> [usize; 4] {
        let (a, b, c, d) = match self {
            Self::Bool(mask) => mask.dim(),
            Self::Float(mask) => mask.dim(),
        };
        [a, b, c, d]
    }
}

/// An array of at most four axes with four, those on the left 1; `None` for others.
fn four<A: Clone>(x: CowArray<'_, A, IxDyn>) -> Option<CowArray<'_, A, Ix4>> {
    let mut x = x;
    if x.ndim() == 0 {
        return None;
    }
    while x.ndim() < 4 {
        x = x.insert_axis(Axis(0));
    }
    x.into_dimensionality::<Ix4>().ok()
}

/// Writes the output; returns what modes 2 and 3 ask for.
fn heard<T: Element, M: Mask, F: Score>(
    dense: &Dense<M, F>,
    x: Qkv<'_, T>,
    out: ArrayViewMut4<'_, T>,
    mode: Option<i64>,
) -> Result<Option<Array4<f32>>> {
    dense.forward_into(x, out, &mut Workspace::new())?;
    match mode {
        Some(2) => dense.scores(x).map(Some),
        Some(3) => dense.weights(x).map(Some),
        _ => Ok(None),
    }
}
