//! SeerAttention: a learned gate over pooled queries and keys says which blocks
//! are read.
//!
//! ```text
//! gq_i = mean of the gate's queries of block i
//! gk_j = [max, min, mean of the gate's keys of block j] W_h
//! P_i  = softmax_{j <= i} (rope(gq_i) . rope(gk_j) / sqrt(gate_dim))
//! block i sees block j <= i with   P_ij > threshold   or   j = i
//! ```
//!
//! and, but for what comes after a query, all keys of it. The gate's queries and
//! keys are those before the rotation by position; pooled ones are rotated to
//! the first position of their block. The last two blocks of queries see all. From
//! "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (arXiv
//! 2410.13276), type `Qavg_Kmaxminavg` of its code, which does not force the
//! diagonal: see [`diagonal`](SeerBuilder::diagonal).
//!
//! Cost: a pass over the gate's arrays, `6 head_dim gate_dim` flops a block of keys
//! and `2 gate_dim` a pair of blocks; `2 (head_dim + value_dim)` a selected pair.

use ndarray::{Array3, Array4, ArrayView1, ArrayView4, Axis, s};

use crate::attention::{Cost, Dim4, Input, Margins};
use crate::card::{carded, exhibit};
use crate::definition;
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::{ATOM, BlockLists, Keys, Layout, Per};
use crate::score::Plain;
use crate::select::gate::{Gate, Kind, gate};
use crate::select::{Forced, Pick, Reduce, Rule, Scheme, Selected, Source, Summary, select, workspace_bytes};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Selecting, define, price, selecting, sparse_options, with_call};

/// Queries, keys and values, and what the gate looks at: queries and keys of the
/// same shapes, before the rotation by position.
#[derive(Debug)]
pub struct Gated<'a, Q, K = Q, O = Q> {
    /// What is attended to.
    pub qkv: Qkv<'a, Q, K, O>,
    /// `[batch, q_heads, q_len, head_dim]`
    pub q: ArrayView4<'a, Q>,
    /// `[batch, kv_heads, kv_len, head_dim]`
    pub k: ArrayView4<'a, K>,
}

impl<Q, K, O> Clone for Gated<'_, Q, K, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, K, O> Copy for Gated<'_, Q, K, O> {}

impl<Q: Element, K: Element, O: Element> Input for Gated<'_, Q, K, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        for (name, got, want) in
            [("gate q", self.q.shape(), self.qkv.q.shape()), ("gate k", self.k.shape(), self.qkv.k.shape())]
        {
            if got != want {
                return Err(Error::shape(name, format!("that of what is attended to, {want:?}"), got));
            }
        }
        self.qkv.dims()
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.qkv)
    }
}

/// SeerAttention in prefill; see the [module](crate::sparse) for its kin.
///
/// ```
/// use attention_kernels::sparse::{Gated, SeerAttention};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let weights = Array3::from_shape_fn((2, 48, 16), |(_, i, j)| f32::from(i % 16 == j));
/// let seer = SeerAttention::builder(weights, 0.1).build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = seer.forward(Gated { qkv, q: x.view(), k: x.view() })?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SeerAttention {
    config: Config<Order, Plain>,
    weights: Array3<f32>,
    threshold: f32,
    block: usize,
    theta: Option<f64>,
    diagonal: bool,
    last: usize,
}

/// Builds a [`SeerAttention`].
#[derive(Clone, Debug)]
pub struct SeerBuilder {
    options: Options<Order, Plain>,
    weights: Array3<f32>,
    threshold: f32,
    block: usize,
    theta: Option<f64>,
    diagonal: bool,
    last: usize,
}

impl SeerAttention {
    /// With the gate's weights `[q_heads, 3 head_dim, head_dim]` and the share
    /// that a block must have more of.
    pub fn builder(weights: Array3<f32>, threshold: f32) -> SeerBuilder {
        let options = Options::default();
        SeerBuilder { options, weights, threshold, block: 64, theta: None, diagonal: true, last: 2 }.causal()
    }

    /// The sizes, if the call fits.
    fn dims<Q: Element, K: Element, O: Element>(&self, x: &Gated<'_, Q, K, O>) -> Result<Dims> {
        let dims = Input::dims(x)?;
        let (heads, rows, cols) = self.weights.dim();
        let d = dims.head_dim;
        if heads != dims.q_heads || cols != d || d.checked_mul(3) != Some(rows) {
            let expected = format!("[q_heads, 3 head_dim, head_dim] of {} heads of {d}", dims.q_heads);
            return Err(Error::shape("weights", expected, self.weights.shape()));
        }
        match x.qkv.lengths {
            Lengths::Full => {}
            Lengths::Keys(_) => {
                let reason = "blocks of queries and of keys must start at the same positions";
                return Err(Error::Conflict { option: "SeerAttention", with: "key lengths", reason });
            }
            Lengths::Packed { .. } => return Err(Error::packed("SeerAttention")),
        }
        let before = dims.kv_len.checked_sub(dims.q_len);
        if before.is_none_or(|before| !before.is_multiple_of(self.block)) {
            let expected =
                format!("queries that start at the first key or a multiple of {} after it", self.block);
            return Err(Error::value("q", expected, format_args!("{} of {}", dims.q_len, dims.kv_len)));
        }
        Ok(dims)
    }

    /// The scheme over blocks.
    fn scheme(&self, dims: &Dims) -> Scheme {
        let forced = Forced { first: 0, last: usize::from(self.diagonal), inside: false };
        Scheme {
            unit: 1,
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: Some(1.0 / (dims.head_dim.max(1) as f32).sqrt()),
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::Threshold(self.threshold), forced },
            causal: true,
        }
    }

    /// Lists of blocks as lists of atoms, with all that the last blocks of
    /// queries see.
    fn lists<'a>(&self, dims: &Dims, list: impl Fn(usize) -> &'a [u32]) -> Result<BlockLists> {
        let layout = Layout::new(Per::Head, self.block, dims);
        let (blocks, each) = (layout.blocks(), self.block / ATOM);
        let before = (dims.kv_len - dims.q_len) / self.block;
        let (mut offsets, mut atoms) = (vec![0], Vec::new());
        for i in 0..layout.lists()? {
            let block = i % blocks;
            let mut name = |j: usize| {
                let end = layout.atoms();
                atoms.extend(((j * each).min(end)..((j + 1) * each).min(end)).map(|atom| atom as u32));
            };
            if block + self.last >= blocks {
                (0..=before + block).for_each(name);
            } else {
                list(i).iter().for_each(|&j| name(j as usize));
            }
            offsets.push(atoms.len());
        }
        BlockLists::new(layout, offsets, atoms)
    }
}

sparse_options!(SeerBuilder);

impl SeerBuilder {
    /// Queries and keys of a block: a multiple of 64, by default 64.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// Rotates pooled queries and keys with frequencies `theta^(-2 c /
    /// head_dim)`, halves of the channels together. Default: does not.
    pub fn rope(self, theta: f64) -> Self {
        Self { theta: Some(theta), ..self }
    }

    /// Whether a block of queries always sees its own keys. Default: it does;
    /// the released code does not force it.
    pub fn diagonal(self, forced: bool) -> Self {
        Self { diagonal: forced, ..self }
    }

    /// The last so many blocks of queries see all. Default: 2.
    pub fn last(self, blocks: usize) -> Self {
        Self { last: blocks, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a block that is no multiple of 64, a threshold that
    /// is NaN, a rotation of an odd number of channels or with no positive base,
    /// and a scale that is not finite; [`Error::Isa`] for an instruction set that
    /// the CPU lacks.
    pub fn build(self) -> Result<SeerAttention> {
        let Self { options, weights, threshold, block, theta, diagonal, last } = self;
        if block == 0 || !block.is_multiple_of(ATOM) {
            return Err(Error::value("block", format!("a multiple of {ATOM} tokens"), block));
        }
        if threshold.is_nan() {
            return Err(Error::value("threshold", "a number", threshold));
        }
        if let Some(theta) = theta.filter(|theta| !(theta.is_finite() && *theta > 0.0)) {
            return Err(Error::value("rope", "a positive base", theta));
        }
        if theta.is_some() && weights.dim().2 % 2 == 1 {
            return Err(Error::shape("weights", "an even head_dim, to be rotated", weights.shape()));
        }
        Ok(SeerAttention { config: options.build()?, weights, threshold, block, theta, diagonal, last })
    }
}

impl<Q: Element, K: Element, O: Element> Selecting<Gated<'_, Q, K, O>> for SeerAttention {
    type Index = BlockLists;

    fn select_bytes(&self, x: Gated<'_, Q, K, O>) -> Result<usize> {
        let dims = self.dims(&x)?;
        // Blocks in place of tokens.
        let one = Array4::<f32>::zeros((1, 1, 1, dims.head_dim));
        let shape = |n: usize| (dims.batch, dims.q_heads, n.div_ceil(self.block), dims.head_dim);
        let (Some(q), Some(k)) = (one.broadcast(shape(dims.q_len)), one.broadcast(shape(dims.kv_len))) else {
            return Err(Error::value("q", "blocks that can be held in memory", dims.q_len));
        };
        let source = Source::new(self.config.isa(), Qkv::<f32>::new(q, k.view(), k.view()), None)?;
        workspace_bytes(&source, &self.scheme(&dims))
    }

    fn select_in(&self, x: Gated<'_, Q, K, O>, workspace: &mut Workspace) -> Result<BlockLists> {
        let dims = self.dims(&x)?;
        let isa = self.config.isa();
        let before = (dims.kv_len - dims.q_len) / self.block;
        let pooled = |before, kind| Gate { isa, block: self.block, theta: self.theta, before, kind };
        let heads = dims.q_heads / dims.kv_heads.max(1);
        let q = gate(&pooled(before, Kind::Mean), x.q, dims.q_heads, |h| h);
        let k = gate(&pooled(0, Kind::MaxMinMean(self.weights.view())), x.k, dims.q_heads, |h| h / heads);
        let small = Qkv::<f32>::new(q.view(), k.view(), k.view());
        let found = select(&Source::new(isa, small, None)?, &self.scheme(&dims), workspace)?;
        self.lists(&dims, |i| &found.candidates[found.offsets[i]..found.offsets[i + 1]])
    }

    fn define_select(&self, x: Gated<'_, Q, K, O>) -> Result<(BlockLists, Margins)> {
        let dims = self.dims(&x)?;
        let (d, heads, s) = (dims.head_dim, dims.q_heads / dims.kv_heads.max(1), self.block);
        let rotate = |mut x: Vec<f64>, block: usize| {
            if let Some(theta) = self.theta {
                for c in 0..d / 2 {
                    let angle = (block * s) as f64 * theta.powf(-2.0 * c as f64 / d as f64);
                    let (a, b) = (x[c], x[c + d / 2]);
                    x[c] = a * angle.cos() - b * angle.sin();
                    x[c + d / 2] = b * angle.cos() + a * angle.sin();
                }
            }
            x
        };
        let before = (dims.kv_len - dims.q_len) / s;
        let (q, k) = (x.q.mapv(Element::to_f64), x.k.mapv(Element::to_f64));
        let mean = |x: ArrayView1<'_, f64>| x.sum() / x.len() as f64;
        let score = |b: usize, h: usize, i: usize, keys: std::ops::Range<usize>| {
            let rows = q.slice(s![b, h, i * s..((i + 1) * s).min(dims.q_len), ..]);
            let gq = rotate(rows.columns().into_iter().map(mean).collect(), before + i);
            let j = keys.start;
            let rows = k.slice(s![b, h / heads, j * s..((j + 1) * s).min(dims.kv_len), ..]);
            let fold = |f: fn(f64, f64) -> f64| {
                rows.columns()
                    .into_iter()
                    .map(move |x| {
                        x.iter()
                            .copied()
                            .reduce(|a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { f(a, b) })
                            .unwrap_or(0.0)
                    })
                    .collect::<Vec<_>>()
            };
            let means = rows.columns().into_iter().map(mean);
            let pooled: Vec<f64> = fold(f64::max).into_iter().chain(fold(f64::min)).chain(means).collect();
            let gk = self.weights.index_axis(Axis(0), h);
            let gk = (0..d).map(|c| pooled.iter().zip(gk.column(c)).map(|(x, &w)| x * f64::from(w)).sum());
            let gk = rotate(gk.collect(), j);
            gq.iter().zip(&gk).map(|(a, b)| a * b).sum()
        };
        let blocks = |n: usize| n.div_ceil(s);
        let small =
            Dims { kv_heads: dims.q_heads, q_len: blocks(dims.q_len), kv_len: blocks(dims.kv_len), ..dims };
        let scheme = self.scheme(&dims);
        let layout = scheme.layout(&small, &Lengths::Full);
        layout.lists()?;
        let (lists, mut margins) =
            definition::select::select(&scheme, &small, &Lengths::Full, &layout, score);
        let found = Selected::of(&scheme, &small, &Lengths::Full, &lists);
        for range in margins.doubtful.iter_mut().flatten() {
            *range = range.start * s..(range.end * s).min(dims.kv_len);
        }
        let list = |i: usize| &found.candidates[found.offsets[i]..found.offsets[i + 1]];
        Ok((self.lists(&dims, list)?, margins))
    }

    fn price_select(&self, x: Gated<'_, Q, K, O>) -> Result<Cost> {
        let dims = self.dims(&x)?;
        let (q, k) = (dims.q_len.div_ceil(self.block) as u64, dims.kv_len.div_ceil(self.block) as u64);
        let d = dims.head_dim as u64;
        let flops = (dims.batch * dims.q_heads) as u64 * (6 * k * d * d + 2 * q * k * d);
        Ok(Cost { flops, bytes: ((x.q.len()) * size_of::<Q>() + x.k.len() * size_of::<K>()) as u64 })
    }

    fn with_call<R>(
        &self,
        x: Gated<'_, Q, K, O>,
        index: &BlockLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        self.dims(&x)?;
        with_call(&self.config, x.qkv, Keys::Blocks(index), run)
    }

    fn define(&self, x: Gated<'_, Q, K, O>, index: &BlockLists) -> Result<Reference> {
        self.dims(&x)?;
        define(&self.config, x.qkv, Keys::Blocks(index))
    }

    fn price(&self, x: Gated<'_, Q, K, O>, index: &BlockLists) -> Result<Cost> {
        self.dims(&x)?;
        price(&self.config, &x.qkv, Keys::Blocks(index))
    }
}

selecting!(SeerAttention, BlockLists, [Q, K, O] Gated);

exhibit! {
    SeerExhibit of SeerAttention, "sparse", "SeerAttention", "arXiv 2410.13276";
    "the blocks of 64 keys to which a gate over pooled queries and keys gives more than 0.2, causal";
    not "without its trained gate";
    tokens true;
    build(x, field) {
        let (_, heads, _, d) = x.q.dim();
        // Mostly the mean, and a little of everything.
        let weight = |(h, i, j): (usize, usize, usize)| {
            f32::from(i == 2 * d + j) + 0.05 * field.at(1, h, i, j)
        };
        let builder = SeerAttention::builder(Array3::from_shape_fn((heads, 3 * d, d), weight), 0.2).last(1);
        if d % 2 == 0 { builder.rope(1e4) } else { builder }
    }
    input<'a, T>(x, _) -> Gated<'a, T> { Gated { q: x.q, k: x.k, qkv: x } }
}
carded!(SeerAttention, SeerExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{Arrays, near};

    fn weights(heads: usize, d: usize) -> Array3<f32> {
        Array3::from_shape_fn((heads, 3 * d, d), |(h, i, j)| {
            f32::from(i == 2 * d + j) + ((h * 7 + i * 3 + j * 5) % 11) as f32 / 100.0
        })
    }

    fn gated(x: &Arrays) -> Gated<'_, f32> {
        Gated { qkv: x.qkv(), q: x.q.view(), k: x.k.view() }
    }

    #[test]
    fn a_threshold_below_0_is_dense() {
        let x = Arrays::normal([2, 4, 2, 136, 200, 24, 12], 1);
        let seer = SeerAttention::builder(weights(4, 24), -1.0).rope(1e4).last(0).build().unwrap();
        let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        near("dense", &seer.forward(gated(&x)).unwrap(), &want);
    }

    #[test]
    fn selections_are_the_definition_s_and_shrink_with_the_threshold() {
        for (sizes, rope) in [([2, 4, 2, 500, 500, 24, 12], true), ([1, 4, 2, 330, 458, 24, 12], false)] {
            let x = Arrays::normal(sizes, 2);
            let mut last = usize::MAX;
            for threshold in [0.0, 0.1, 0.15, 0.2, 0.5, 1.0] {
                let builder = SeerAttention::builder(weights(4, 24), threshold).last(1);
                let seer = if rope { builder.rope(1e4) } else { builder }.build().unwrap();
                let got = seer.select(gated(&x)).unwrap();
                let (want, margins) = seer.reference_select(gated(&x)).unwrap();
                let difference =
                    <SeerAttention as Selects<Gated<'_, f32>>>::difference(&got, &want, &margins);
                assert_eq!(difference, None, "{threshold}");
                assert!(got.len() <= last);
                last = got.len();
                let (b, h) = (0, 3);
                let blocks = got.layout().blocks();
                let before = (sizes[4] - sizes[3]) / 64;
                assert!((0..blocks).all(|i| got.atoms(b, h, i).contains(&((before + i) as u32))), "diagonal");
                assert_eq!(got.atoms(b, h, blocks - 1).len(), before + blocks, "the last sees all");
            }
        }
    }

    /// Without rotation a gate does not know the order of tokens in a block.
    #[test]
    fn tokens_of_a_block_permute() {
        let x = Arrays::integers([1, 2, 1, 256, 256, 16, 8], 3);
        let order: Vec<usize> = (0..256).map(|i| i / 64 * 64 + (i % 64 * 5) % 64).collect();
        let pick = |x: &Array4<f32>| x.select(Axis(2), &order);
        let y = Arrays { q: pick(&x.q), k: pick(&x.k), v: pick(&x.v) };
        let seer = SeerAttention::builder(weights(2, 16), 0.2).last(0).build().unwrap();
        assert_eq!(seer.select(gated(&x)).unwrap(), seer.select(gated(&y)).unwrap());
    }

    #[test]
    fn refusals() {
        let refusal = |builder: SeerBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(SeerAttention::builder(weights(2, 16), 0.1).block(32)).starts_with("block: "));
        assert!(refusal(SeerAttention::builder(weights(2, 16), f32::NAN)).starts_with("threshold: "));
        assert!(refusal(SeerAttention::builder(weights(2, 16), 0.1).rope(-1.0)).starts_with("rope: "));
        assert!(refusal(SeerAttention::builder(weights(2, 5), 0.1).rope(1e4)).starts_with("weights: "));
        let seer = SeerAttention::builder(weights(2, 16), 0.1).build().unwrap();
        let refusal = |x: Gated<'_, f32>| seer.forward(x).unwrap_err().to_string();
        let x = Arrays::normal([1, 2, 1, 100, 190, 16, 8], 3);
        assert!(refusal(gated(&x)).starts_with("q: "));
        let x = Arrays::normal([1, 4, 1, 100, 100, 16, 8], 3);
        assert!(refusal(gated(&x)).starts_with("weights: "));
        let (x, y) =
            (Arrays::normal([1, 2, 1, 99, 99, 16, 8], 3), Arrays::normal([1, 2, 1, 98, 98, 16, 8], 3));
        assert!(refusal(Gated { k: y.k.view(), ..gated(&x) }).starts_with("gate k: "));
    }
}
