//! A decoder of the Llama architecture. Its attention is the crate's; where keys
//! and values live is the affair of a [`Store`] for each layer.

use std::time::{Duration, Instant};

use attention_kernels::math::rope::{Pairs, Rope, Scaling};
use ndarray::{Array2, Array3, ArrayView2, Axis, s};
use rayon::prelude::*;

use crate::Result;
use crate::caches::{Attend, Chunk, Store};
use crate::gguf::Gguf;
use crate::matrix::Matrix;

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub layers: usize,
    pub dim: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Tokens that it was trained on.
    pub context: usize,
    epsilon: f32,
}

struct Layer {
    attention_norm: Vec<f32>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    feed_norm: Vec<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

pub struct Model {
    pub config: Config,
    pub rope: Rope,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    output: Matrix,
}

impl Model {
    pub fn of(file: &Gguf, vocabulary: usize) -> Result<Self> {
        let architecture: String = file.get("general.architecture")?;
        if architecture != "llama" {
            return Err(format!("the architecture is \"{architecture}\"; \"llama\" is what is known").into());
        }
        let size = |key: &str| file.find::<usize>(&format!("llama.{key}"));
        let needed = |key: &str| match size(key)? {
            Some(x) if x > 0 => Ok::<usize, Box<dyn std::error::Error + Send + Sync>>(x),
            Some(_) => Err(format!("metadata llama.{key} is 0").into()),
            None => Err(format!("metadata llama.{key} is missing").into()),
        };
        if size("expert_count")?.unwrap_or(0) > 0 {
            return Err("a mixture of experts, which this program does not run".into());
        }
        let (layers, dim, feed) =
            (needed("block_count")?, needed("embedding_length")?, needed("feed_forward_length")?);
        let q_heads = needed("attention.head_count")?;
        let kv_heads = size("attention.head_count_kv")?.unwrap_or(q_heads);
        let head_dim = size("attention.key_length")?.unwrap_or(dim / q_heads);
        if kv_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            return Err(
                format!("{q_heads} query heads do not divide among {kv_heads} key/value heads").into()
            );
        }
        let (Some(q_dim), true) = (q_heads.checked_mul(head_dim), head_dim > 0) else {
            return Err(format!("{q_heads} heads of {head_dim} elements").into());
        };
        let epsilon = file.get::<f64>("llama.attention.layer_norm_rms_epsilon")? as f32;
        let config =
            Config { layers, dim, q_heads, kv_heads, head_dim, context: needed("context_length")?, epsilon };

        let kv_dim = kv_heads * head_dim;
        let layer = |i: usize| {
            let matrix = |name: &str, rows, cols| file.matrix(&format!("blk.{i}.{name}.weight"), rows, cols);
            let vector = |name: &str| file.vector(&format!("blk.{i}.{name}.weight"), dim);
            Ok(Layer {
                attention_norm: vector("attn_norm")?,
                q: matrix("attn_q", q_dim, dim)?,
                k: matrix("attn_k", kv_dim, dim)?,
                v: matrix("attn_v", kv_dim, dim)?,
                o: matrix("attn_output", dim, q_dim)?,
                feed_norm: vector("ffn_norm")?,
                gate: matrix("ffn_gate", feed, dim)?,
                up: matrix("ffn_up", feed, dim)?,
                down: matrix("ffn_down", dim, feed)?,
            })
        };
        let embedding = file.matrix("token_embd.weight", vocabulary, dim)?;
        let output = match file.has_tensor("output.weight") {
            true => file.matrix("output.weight", vocabulary, dim)?,
            false => embedding.clone(),
        };
        Ok(Self {
            rope: rope(file, size("rope.dimension_count")?.unwrap_or(head_dim), head_dim)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            norm: file.vector("output_norm.weight", dim)?,
            config,
            embedding,
            output,
        })
    }

    /// What the model says of the next token after each of some rows that
    /// [`Session::feed`] gave, `[rows, vocabulary]`.
    pub fn logits(&self, rows: ArrayView2<'_, f32>) -> Array2<f32> {
        self.output.of(normed(rows, &self.norm, self.config.epsilon).view())
    }
}

/// GGUF files have Llama's own order of elements, in which neighbours are pairs.
fn rope(file: &Gguf, dim: usize, head_dim: usize) -> Result<Rope> {
    if dim > head_dim {
        return Err(format!("a rotation of {dim} of the {head_dim} elements of a head").into());
    }
    let scaling = match file.find::<String>("llama.rope.scaling.type")?.as_deref() {
        _ if file.has_tensor("rope_freqs.weight") => {
            let factors = file.vector("rope_freqs.weight", dim / 2)?;
            Scaling::PerFrequency(factors.into_iter().map(f64::from).collect())
        }
        None | Some("none") => Scaling::None,
        Some("linear") => Scaling::Linear(file.get("llama.rope.scaling.factor")?),
        Some(other) => {
            return Err(format!("positions are scaled by \"{other}\", which is not known here").into());
        }
    };
    let theta = file.find::<f64>("llama.rope.freq_base")?.unwrap_or(10_000.0);
    Ok(Rope::builder(dim).theta(theta).pairs(Pairs::Neighbours).scaling(scaling).build()?)
}

/// A text that grows, and what its layers remember of it.
pub struct Session<'m, S = Box<dyn Store>> {
    model: &'m Model,
    pub stores: Vec<S>,
    attend: Attend,
    /// Tokens so far.
    pub len: usize,
    /// Time that went into attention: rotating, storing, attending, evicting.
    pub attention: Duration,
}

impl<'m, S: Store> Session<'m, S> {
    pub fn new(model: &'m Model, stores: Vec<S>) -> Result<Self> {
        let attend = Attend::new(model.rope.clone())?;
        Ok(Self { model, stores, attend, len: 0, attention: Duration::ZERO })
    }

    /// Runs more tokens through the model, all at once: the last layer's rows,
    /// `[tokens, dim]`.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<Array2<f32>> {
        let Config { dim, q_heads, kv_heads, head_dim, epsilon, .. } = self.model.config;
        let mut x = Array2::zeros((tokens.len(), dim));
        for (mut row, &token) in x.rows_mut().into_iter().zip(tokens) {
            self.model.embedding.row(token as usize, row.as_slice_mut().expect("a row of a new array"));
        }
        // [tokens, heads * head_dim] as [1, heads, tokens, head_dim]: a view is enough.
        let heads = |x: Array2<f32>, heads: usize| {
            let shape = (1, x.nrows(), heads, head_dim);
            x.into_shape_with_order(shape).expect("heads of head_dim").permuted_axes([0, 2, 1, 3])
        };
        for (layer, store) in self.model.layers.iter().zip(&mut self.stores) {
            let h = normed(x.view(), &layer.attention_norm, epsilon);
            let [q, k, v] = [&layer.q, &layer.k, &layer.v].map(|matrix| matrix.of(h.view()));
            let chunk =
                Chunk { q: heads(q, q_heads), k: heads(k, kv_heads), v: heads(v, kv_heads), first: self.len };
            let mut out = Array3::zeros((tokens.len(), q_heads, head_dim));
            let started = Instant::now();
            let view = out.view_mut().insert_axis(Axis(0)).permuted_axes([0, 2, 1, 3]);
            store.attend(&mut self.attend, chunk, view)?;
            self.attention += started.elapsed();
            let out =
                out.into_shape_with_order((tokens.len(), q_heads * head_dim)).expect("rows of all heads");
            x += &layer.o.of(out.view());

            let h = normed(x.view(), &layer.feed_norm, epsilon);
            let (mut gate, up) = (layer.gate.of(h.view()), layer.up.of(h.view()));
            let rows = gate.axis_iter_mut(Axis(0)).zip(up.axis_iter(Axis(0)));
            rows.collect::<Vec<_>>().into_par_iter().for_each(|(mut gate, up)| {
                gate.zip_mut_with(&up, |gate, up| *gate = *gate / (1.0 + (-*gate).exp()) * up);
            });
            x += &layer.down.of(gate.view());
        }
        self.len += tokens.len();
        Ok(x)
    }

    /// The same in chunks: the rows of the last one. `progress` hears of each.
    pub fn prefill(&mut self, tokens: &[u32], chunk: usize, progress: impl Fn(usize)) -> Result<Array2<f32>> {
        let mut rows = Array2::zeros((0, self.model.config.dim));
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            rows = self.feed(tokens)?;
            progress(i * chunk + tokens.len());
        }
        Ok(rows)
    }

    /// Says that what was fed so far is the prompt: some caches choose what they
    /// keep of it then.
    pub fn end_prompt(&mut self) -> Result<()> {
        let started = Instant::now();
        self.stores.iter_mut().try_for_each(|store| store.end_prompt(&mut self.attend))?;
        self.attention += started.elapsed();
        Ok(())
    }

    /// The next token's logits after the last of some rows.
    pub fn next(&self, rows: &Array2<f32>) -> Vec<f32> {
        let last = rows.nrows().saturating_sub(1);
        self.model.logits(rows.slice(s![last.., ..])).into_raw_vec_and_offset().0
    }
}

/// RMSNorm of each row.
fn normed(x: ArrayView2<'_, f32>, weight: &[f32], epsilon: f32) -> Array2<f32> {
    let mut out = x.to_owned();
    for mut row in out.rows_mut() {
        let square = row.iter().map(|x| x * x).sum::<f32>() / weight.len() as f32;
        let factor = 1.0 / (square + epsilon).sqrt();
        row.iter_mut().zip(weight).for_each(|(x, weight)| *x *= factor * weight);
    }
    out
}
