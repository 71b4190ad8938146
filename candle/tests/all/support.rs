//! Numbers, comparisons, and attention of candle's operators.

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Result, Shape, Tensor, Var};

/// Numbers between -1 and 1 that look like noise.
pub fn noise(shape: impl Into<Shape>, seed: usize) -> Tensor {
    let shape = shape.into();
    let number = |i: usize| {
        let x = ((i + 1) as f64 * 12.9898 + seed as f64 * 78.233).sin() * 43758.5453;
        (2.0 * (x - x.floor()) - 1.0) as f32
    };
    let all: Vec<f32> = (0..shape.elem_count()).map(number).collect();
    Tensor::from_vec(all, shape, &Device::Cpu).unwrap()
}

pub fn var(shape: impl Into<Shape>, seed: usize) -> Var {
    Var::from_tensor(&noise(shape, seed)).unwrap()
}

/// Numbers between two limits.
pub fn between(low: f64, high: f64, shape: impl Into<Shape>, seed: usize) -> Tensor {
    noise(shape, seed).affine((high - low) / 2.0, (high + low) / 2.0).unwrap()
}

pub fn numbers(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Whether all numbers are within `tolerance` of each other.
#[track_caller]
pub fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    for (i, (a, b)) in numbers(got).iter().zip(numbers(want)).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}, element {i}: {a}, not {b}");
    }
}

#[track_caller]
pub fn same(what: &str, got: &Tensor, want: &Tensor) {
    close(what, got, want, 0.0);
}

/// Gradients of a loss in which every element has a weight of its own.
pub fn gradients(out: &Tensor) -> Result<GradStore> {
    let weights = noise(out.shape(), 99).to_dtype(out.dtype())?;
    (out * weights)?.sum_all()?.backward()
}

/// Compares an output and the gradients of all of these.
#[track_caller]
pub fn agree(what: &str, got: &Tensor, want: &Tensor, vars: &[&Var], tolerance: f32) {
    close(what, got, want, tolerance);
    let (got, want) = (gradients(got).unwrap(), gradients(want).unwrap());
    for (i, var) in vars.iter().enumerate() {
        let (got, want) = (got.get(var).expect("a gradient"), want.get(var).expect("a gradient"));
        assert_eq!(got.dtype(), var.dtype());
        close(&format!("{what}, gradient {i}"), got, want, 10.0 * tolerance);
    }
}

/// `[q_len, kv_len]`, 0 where keys are visible and very low elsewhere.
pub fn window_mask(q_len: usize, kv_len: usize, window: Option<usize>) -> Tensor {
    let visible = |i: usize, j: usize| {
        let at = i + kv_len - q_len;
        j <= at && window.is_none_or(|window| j + window > at)
    };
    let at = |i| if visible(i / kv_len, i % kv_len) { 0f32 } else { -1e30 };
    Tensor::from_vec((0..q_len * kv_len).map(at).collect(), (q_len, kv_len), &Device::Cpu).unwrap()
}

pub fn repeat_kv(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, kv_heads, len, dim) = x.dims4()?;
    let group = heads / kv_heads;
    x.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, len, dim))?.reshape((batch, heads, len, dim))
}

/// Attention as `candle-transformers` has it.
pub struct Unfused {
    pub mask: Option<Tensor>,
    pub scale: Option<f64>,
    pub softcap: Option<f64>,
    pub sinks: Option<Tensor>,
}

impl Unfused {
    pub fn new() -> Self {
        Self { mask: None, scale: None, softcap: None, sinks: None }
    }

    pub fn causal(q: &Tensor, k: &Tensor) -> Self {
        Self { mask: Some(window_mask(q.dim(2).unwrap(), k.dim(2).unwrap(), None)), ..Self::new() }
    }

    pub fn scores(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        let scale = self.scale.unwrap_or(1.0 / (q.dim(3)? as f64).sqrt());
        let k = repeat_kv(k, q.dim(1)?)?;
        let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
        let scores = match self.softcap {
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
            None => scores,
        };
        match &self.mask {
            Some(mask) => scores.broadcast_add(mask),
            None => Ok(scores),
        }
    }

    pub fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let mut scores = self.scores(q, k)?;
        let (batch, heads, q_len, kv_len) = scores.dims4()?;
        if let Some(sinks) = &self.sinks {
            let sinks = sinks.reshape((1, heads, 1, 1))?.broadcast_as((batch, heads, q_len, 1))?;
            scores = Tensor::cat(&[&scores, &sinks.contiguous()?], 3)?;
        }
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.narrow(3, 0, kv_len)?;
        weights.contiguous()?.matmul(&repeat_kv(v, heads)?.contiguous()?)
    }
}
