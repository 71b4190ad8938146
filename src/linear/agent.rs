//! Agent Attention: two softmax attentions through a few agent tokens, which
//! read all keys and are read by all queries.
//!
//! ```text
//! v'_a = sum_j softmax_j(scale * a_a . k_j + agent_bias_aj) v_j       agents read keys
//! o_i  = sum_a softmax_a(scale * q_i . a_a + query_bias_ia) v'_a      queries read agents
//! ```
//!
//! "Agent Attention: On the Integration of Softmax and Linear Attention"
//! (arXiv 2312.08874). It is linear attention whose features of queries and
//! of keys are both softmaxes over the agents or the keys. Agents are given,
//! or they are means of queries over the cells of a grid. Few agents see little
//! detail, for which the paper adds a depthwise convolution of the values:
//!
//! ```text
//! a_(r, s) = mean of q over rows floor(r height / p) .. ceil((r + 1) height / p)
//!            and the columns likewise
//! o_(y, x) += bias + sum over dy, dx from -1 to 1 of w_(dy + 1, dx + 1) v_(y + dy, x + dx)
//! ```
//!
//! channel by channel, with 0 outside the grid. (Where keys are on a coarser
//! grid the authors enlarge the values before they convolve them. That is not
//! done here: the convolution needs keys and queries of the same grid.)
//!
//! Every query sees every key through every agent: there is no causal form,
//! and no option for one. Where tokens must not see later ones use another
//! mechanism.
//!
//! Cost: `2 n (head_dim + value_dim) (q_len + kv_len)` flops a head for `n`
//! agents, and `18 value_dim` a token for the convolution. With less than some
//! times `n` keys [`Dense`](crate::dense::Dense) is as fast and exact.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayView4, ArrayViewMut4, aview0, s};

use crate::attention::{Attention, Bounded, Cost, ERROR_CONSTANT, Input};
use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::Workspace;
use crate::engine::{self, parallel};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site, filled};
use crate::linear::based::{like, shaped};
use crate::score::{Bias, Score};
use crate::simd::any::{AnyRows, AnyRowsMut};
use crate::simd::mem::{Arena, Heads, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::attend::{Config, Options};
use crate::stages::recur::check_out;

/// What [`Agent`] takes.
#[derive(Clone, Copy, Debug)]
pub struct AgentInput<'a, T> {
    /// Queries `[batch, heads, q_len, head_dim]`, keys and values. The latter
    /// may have fewer heads, and key lengths; a packed batch is refused.
    pub qkv: Qkv<'a, T>,
    /// Agents `[batch, heads, n, head_dim]`, where they are not
    /// [pooled](AgentBuilder::pool). Heads may be fewer.
    pub agents: Option<ArrayView4<'a, T>>,
    /// What is added to the scores of agents and keys: a view `[batch, heads,
    /// n, kv_len]`, where each axis may be 1. A bias of `[heads, n, kv_len]`
    /// comes in by `insert_axis(Axis(0))`.
    pub agent_bias: Option<&'a Bias<'a>>,
    /// What is added to the scores of queries and agents: a view `[batch,
    /// heads, q_len, n]`, where each axis may be 1.
    pub query_bias: Option<&'a Bias<'a>>,
}

impl<'a, T> AgentInput<'a, T> {
    /// Agents that are pooled from the queries, without biases.
    pub fn pooled(qkv: Qkv<'a, T>) -> Self {
        Self { qkv, agents: None, agent_bias: None, query_bias: None }
    }

    /// These agents, without biases.
    pub fn new(qkv: Qkv<'a, T>, agents: ArrayView4<'a, T>) -> Self {
        Self { agents: Some(agents), ..Self::pooled(qkv) }
    }

    /// Reborrows.
    pub fn reborrow<'b>(self) -> AgentInput<'b, T>
    where
        'a: 'b,
    {
        AgentInput {
            qkv: self.qkv.reborrow(),
            agents: self.agents.map(ArrayView4::reborrow),
            agent_bias: self.agent_bias,
            query_bias: self.query_bias,
        }
    }
}

impl<T: Element> Input for AgentInput<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        if dims.packed {
            let reason = "agents belong to an entry of the batch and would mix its sequences";
            return Err(Error::Conflict { option: "a packed batch", with: "agents", reason });
        }
        if let Some(agents) = &self.agents {
            let (b, h, _, d) = agents.dim();
            let divides = if h == 0 { dims.q_heads == 0 } else { dims.q_heads.is_multiple_of(h) };
            if b != dims.batch || d != dims.head_dim || !divides {
                let Dims { batch, q_heads, head_dim, .. } = dims;
                let expected =
                    format!("[batch, heads, n, head_dim] = [{batch}, {q_heads} or a divisor, _, {head_dim}]");
                return Err(Error::shape("agents", expected, agents.shape()));
            }
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        self.dims()?;
        self.qkv.out_dim()
    }
}

/// Agent Attention; see [`AgentInput`] for what it takes. Not causal.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{Agent, AgentInput}};
/// use ndarray::Array4;
///
/// // A grid of 14 x 14 tokens through 7 x 7 agents.
/// let x = Array4::from_shape_fn((1, 2, 14 * 14, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let agent = Agent::builder().pool(14, 14, 7).build()?;
/// let out = agent.forward(AgentInput::pooled(qkv))?;
/// assert_eq!(out.dim(), (1, 2, 14 * 14, 32));
///
/// // Through 5 agents of the caller.
/// let agents = Array4::<f32>::zeros((1, 2, 5, 32));
/// let out = Agent::builder().build()?.forward(AgentInput::new(qkv, agents.view()))?;
/// let mean = x.slice(ndarray::s![0, 0, .., 3]).mean().unwrap();
/// assert!((out[[0, 0, 0, 3]] - mean).abs() < 1e-6); // agents of 0 see all keys alike
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Semantics
/// - With no key, or none that a bias leaves, an agent's value is 0, and the
///   agent takes part with it. With no agents the output is 0, besides the
///   convolution.
/// - A NaN in a key or a value shows in all outputs of its head.
/// - Agents and their values are `f32` between the two attentions whatever
///   the storage type: given agents are widened, pooled ones are not rounded
///   to it.
///
/// # Error bound
///
/// With `u = 2^-24` and `C` the [constant](crate::attention::ERROR_CONSTANT) of
/// dense attention:
///
/// - An element of a pooled agent, over a cell of `r` rows and `s` columns, is
///   off by `e = (r + s) u mean|q|`; a given one by nothing.
/// - Scores that are all off by at most `d` change a softmax's weights by at
///   most `d` together, and so what it gives by `d max|v|`.
/// - An agent's value is off by `E_a = C u (head_dim + keys + size) max|v| + d
///   max|v|` with `d = scale max_j sum_c e_c |k_jc|`: the bound of dense
///   attention and what the agent's own error does. `size` is as there.
/// - An output is off by `C u (head_dim + n + size) M + d' M + sum_a w_ia E_a`
///   with `M = max_a (|v'_a| + E_a)`, `w_ia` the weights, and `d' = scale max_a
///   sum_c |q_ic| e_ac`.
/// - The convolution adds `8 C u (|o| + |bias| + sum |w v|)`.
#[derive(Clone, Debug)]
pub struct Agent {
    config: Config<crate::mask::Unmasked, crate::score::Plain>,
    pool: Option<Pool>,
    convolution: Option<Convolution>,
}

/// Builds an [`Agent`].
#[derive(Clone, Debug, Default)]
pub struct AgentBuilder {
    options: Options,
    pool: Option<Pool>,
    convolution: Option<(usize, usize, Array3<f32>, Array1<f32>)>,
}

impl Agent {
    /// Agents given, no convolution.
    pub fn builder() -> AgentBuilder {
        AgentBuilder::default()
    }
}

/// The most agents a side.
const MAX_SIDE: usize = 1024;

impl AgentBuilder {
    /// Makes `p * p` agents of the queries, which are tokens of a grid row by
    /// row: means over the cells of a `p * p` grid (adaptive average pooling).
    /// Cells overlap where `p` does not divide the sides.
    pub fn pool(mut self, height: usize, width: usize, p: usize) -> Self {
        self.pool = Some(Pool { height, width, side: p });
        self
    }

    /// Adds a depthwise convolution of the values, which are tokens of a grid
    /// row by row: `weights` are `[heads * value_dim, 3, 3]`, `bias` is
    /// `[heads * value_dim]`. They are correlated, not flipped, as models
    /// have it. Heads that share values convolve them each with its own.
    pub fn convolution(
        mut self,
        height: usize,
        width: usize,
        weights: Array3<f32>,
        bias: Array1<f32>,
    ) -> Self {
        self.convolution = Some((height, width, weights, bias));
        self
    }

    /// The factor of both dot products. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale or parameters that are not finite, for
    /// grids with a side of 0 or that differ, and for no agents or more than
    /// 1024 a side; [`Error::Shape`] for parameters of a convolution that do
    /// not fit; [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Agent> {
        if let Some(Pool { height, width, side }) = self.pool
            && (height == 0 || width == 0 || !(1..=MAX_SIDE).contains(&side))
        {
            let expected = format!("a grid of at least 1 x 1 and 1 to {MAX_SIDE} agents a side");
            return Err(Error::value("pool", expected, format_args!("{height} x {width} and {side}")));
        }
        let convolution = match self.convolution {
            Some((height, width, weights, bias)) => {
                let sides = (height, width);
                if let Some(pool) = self.pool.filter(|pool| (pool.height, pool.width) != sides) {
                    let expected = format!("the grid that is pooled, {} x {}", pool.height, pool.width);
                    return Err(Error::value("convolution", expected, format_args!("{height} x {width}")));
                }
                Some(Convolution::new(height, width, &weights, &bias)?)
            }
            None => None,
        };
        Ok(Agent { config: self.options.build()?, pool: self.pool, convolution })
    }
}

/// A grid of tokens, and how many cells it has a side.
#[derive(Clone, Copy, Debug)]
struct Pool {
    height: usize,
    width: usize,
    side: usize,
}

impl Pool {
    /// What cell `i` of `side` has of `len` rows or columns.
    fn cell(&self, i: usize, len: usize) -> Range<usize> {
        i * len / self.side..((i + 1) * len).div_ceil(self.side)
    }

    /// Rows and columns of the cell of an agent.
    fn cells(&self, agent: usize) -> [Range<usize>; 2] {
        [self.cell(agent / self.side, self.height), self.cell(agent % self.side, self.width)]
    }

    /// Scratch of [`Agent::pool`].
    fn bytes(&self, agents: usize, stride: usize) -> usize {
        bytes_for::<u64>(claim_words(agents)) + bytes_for_shares(parallel::threads(), self.room(stride))
    }

    /// What a thread needs: a row of a cell.
    fn room(&self, stride: usize) -> usize {
        bytes_for::<f32>((self.width / self.side + 2) * stride)
    }
}

/// The mean of some rows of a grid: one agent.
struct Mean<'a> {
    /// All tokens of the grid.
    q: AnyRows<'a>,
    cell: [Range<usize>; 2],
    width: usize,
    copy: &'a mut [f32],
    to: &'a mut [f32],
}

impl Kernel for Mean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [rows, cols] = self.cell;
        let (stride, count) = (self.to.len(), s.splat((rows.len() * cols.len()) as f32));
        self.to.fill(0.0);
        for row in rows {
            let first = row * self.width;
            self.q.part(first + cols.start..first + cols.end).pack_rows(s, self.copy, stride);
            for (v, to) in self.to.chunks_exact_mut(S::LANES).enumerate() {
                // By itself first: sums of sums are of few numbers.
                let mut sum = s.splat(0.0);
                for i in 0..cols.len() {
                    sum = s.add(sum, s.load(&self.copy[i * stride + v * S::LANES..]));
                }
                s.store(to, s.add(s.load(to), sum));
            }
        }
        for to in self.to.chunks_exact_mut(S::LANES) {
            s.store(to, s.div(s.load(to), count));
        }
    }
}

/// Taps of a kernel.
const TAPS: usize = 9;

/// A depthwise convolution over a grid of tokens.
#[derive(Clone, Debug)]
struct Convolution {
    height: usize,
    width: usize,
    channels: usize,
    /// `[10, channels + MAX_LANES]`: the taps, then the bias. So many zeros at
    /// the end of a row that whole vectors can be loaded.
    weights: Vec<f32>,
}

impl Convolution {
    fn new(height: usize, width: usize, weights: &Array3<f32>, bias: &Array1<f32>) -> Result<Self> {
        if height == 0 || width == 0 {
            let got = format_args!("{height} x {width}").to_string();
            return Err(Error::value("convolution", "a grid of at least 1 x 1", got));
        }
        let channels = weights.dim().0;
        if weights.dim() != (channels, 3, 3) {
            return Err(Error::shape("weights", "[heads * value_dim, 3, 3]", weights.shape()));
        }
        if bias.len() != channels {
            let expected = format!("[heads * value_dim] = [{channels}] as the weights have it");
            return Err(Error::shape("bias", expected, bias.shape()));
        }
        for (argument, x) in [
            ("weights", weights.iter().find(|x| !x.is_finite())),
            ("bias", bias.iter().find(|x| !x.is_finite())),
        ] {
            if let Some(x) = x {
                return Err(Error::value(argument, "finite numbers", x));
            }
        }
        let mut convolution = Self { height, width, channels, weights: Vec::new() };
        let row = convolution.row();
        convolution.weights = vec![0.0; (TAPS + 1) * row];
        for ((channel, y, x), &weight) in weights.indexed_iter() {
            convolution.weights[(3 * y + x) * row + channel] = weight;
        }
        for (channel, &bias) in bias.iter().enumerate() {
            convolution.weights[TAPS * row + channel] = bias;
        }
        Ok(convolution)
    }

    /// From one tap to the next.
    fn row(&self) -> usize {
        self.channels + MAX_LANES
    }

    /// The weight of a channel, or its bias for tap 9.
    fn weight(&self, tap: usize, channel: usize) -> f64 {
        f64::from(self.weights[tap * self.row() + channel])
    }

    /// Rows of the grid that lie under the kernel at a row, and the rows of
    /// the kernel that lie above them.
    fn under(&self, y: usize, len: usize) -> [Range<usize>; 2] {
        let rows = y.saturating_sub(1)..(y + 2).min(len);
        [rows.clone(), rows.start + 1 - y..rows.end + 1 - y]
    }

    /// Scratch of [`Agent::convolve`].
    fn bytes(&self, heads: usize, stride: usize) -> usize {
        bytes_for::<u64>(claim_words(heads * self.height))
            + bytes_for::<u64>(claim_words(heads * self.height * self.width))
            + bytes_for_shares(parallel::threads(), self.room(stride))
    }

    /// What a thread needs: three rows of the grid.
    fn room(&self, stride: usize) -> usize {
        bytes_for::<f32>(3 * self.width * stride)
    }
}

/// One row of a grid, convolved and written.
struct Convolve<'a, 'b> {
    /// The tokens of the rows under the kernel.
    v: AnyRows<'a>,
    /// Rows of the kernel that lie above them.
    taps: Range<usize>,
    /// Weights from the head's first channel on.
    weights: &'a [f32],
    /// From one tap to the next.
    row: usize,
    copy: &'a mut [f32],
    /// What is there without the convolution, `[width, stride]`.
    sums: &'a mut [f32],
    stride: usize,
    width: usize,
    out: AnyRowsMut<'b>,
}

impl Kernel for Convolve<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { v, taps, weights, row, copy, sums, stride, width, mut out } = self;
        v.pack_rows(s, copy, stride);
        for x in 0..width {
            // Columns of the kernel that lie within the grid.
            let columns = usize::from(x == 0)..3 - usize::from(x + 1 == width);
            let to = &mut sums[x * stride..][..stride];
            for c in (0..stride).step_by(S::LANES) {
                let mut sum = s.add(s.load(&to[c..]), s.load(&weights[TAPS * row + c..]));
                for (i, tap) in taps.clone().enumerate() {
                    for column in columns.clone() {
                        let token = i * width + x + column - 1;
                        let weight = s.load(&weights[(3 * tap + column) * row + c..]);
                        sum = s.mul_add(weight, s.load(&copy[token * stride + c..]), sum);
                    }
                }
                s.store(&mut to[c..], sum);
            }
            out.write(s, x, to, 1.0);
        }
    }
}

/// An array in scratch whose rows lie whole vectors apart.
fn padded(dim: usize) -> usize {
    dim.next_multiple_of(MAX_LANES)
}

/// Sizes of a call that has been checked.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    dims: Dims,
    agents: usize,
}

impl Sizes {
    fn heads(&self) -> usize {
        self.dims.batch * self.dims.q_heads
    }

    /// Numbers that the agents take up.
    fn agents(&self) -> usize {
        self.heads() * self.agents * padded(self.dims.head_dim)
    }

    /// Numbers that their values take up.
    fn values(&self) -> usize {
        self.heads() * self.agents * self.dims.value_dim
    }

    /// Numbers that an output takes up which is convolved.
    fn sums(&self) -> usize {
        self.heads() * self.dims.q_len * padded(self.dims.value_dim)
    }
}

/// Refuses a bias that does not fit, by the name that it has here.
fn check_bias(argument: &'static str, axes: &'static str, bias: Option<&Bias<'_>>, dims: Dims) -> Result<()> {
    match bias.map_or(Ok(()), |bias| bias.check(&dims)) {
        Err(Error::Shape { got, .. }) => {
            let sizes = [dims.batch, dims.q_heads, dims.q_len, dims.kv_len];
            let expected = format!("{axes} = {sizes:?} or 1 in place of any of them");
            Err(Error::shape(argument, expected, &got))
        }
        other => other,
    }
}

impl Agent {
    fn check<T: Element>(&self, x: &AgentInput<'_, T>) -> Result<Sizes> {
        let dims = x.dims()?;
        let agents = match (&self.pool, &x.agents) {
            (Some(_), Some(_)) => {
                let reason = "agents are given or made of the queries, not both";
                return Err(Error::Conflict { option: "agents", with: "pool", reason });
            }
            (None, None) => {
                let expected = "an array [batch, heads, n, head_dim], since none are pooled";
                return Err(Error::value("agents", expected, "none"));
            }
            (None, Some(agents)) => agents.dim().2,
            (Some(pool), None) => {
                let Pool { height, width, side } = *pool;
                if dims.q_len != height.saturating_mul(width) {
                    let expected =
                        format!("[batch, heads, len, head_dim] with len = {height} x {width}, the grid");
                    return Err(Error::shape("q", expected, x.qkv.q.shape()));
                }
                side.saturating_mul(side)
            }
        };
        let first = Dims { q_len: agents, ..dims }.checked()?;
        check_bias("agent_bias", "[batch, heads, n, kv_len]", x.agent_bias, first)?;
        let second = Dims { kv_len: agents, ..dims }.checked()?;
        check_bias("query_bias", "[batch, heads, q_len, n]", x.query_bias, second)?;
        if let Some(Convolution { height, width, channels, .. }) = self.convolution {
            for (argument, view) in [("q", &x.qkv.q), ("v", &x.qkv.v)] {
                if view.dim().2 != height.saturating_mul(width) {
                    let expected = format!(
                        "[batch, heads, len, dim] with len = {height} x {width}, the grid of the convolution"
                    );
                    return Err(Error::shape(argument, expected, view.shape()));
                }
            }
            if channels != dims.q_heads * dims.value_dim {
                let expected =
                    format!("[heads * value_dim, 3, 3] = [{} * {}, 3, 3]", dims.q_heads, dims.value_dim);
                return Err(Error::shape("weights", expected, &[channels, 3, 3]));
            }
            if matches!(x.qkv.lengths, Lengths::Keys(_)) {
                let reason = "the grid has a value for each token";
                return Err(Error::Conflict { option: "key_lengths", with: "a convolution", reason });
            }
        }
        Ok(Sizes { dims, agents })
    }

    /// Runs something with the call of an engine for one of the attentions.
    fn with_call<Q: Element, T: Element, R>(
        &self,
        q: ArrayView4<'_, Q>,
        [k, v]: [ArrayView4<'_, T>; 2],
        lengths: Lengths<'_>,
        bias: Option<&Bias<'_>>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let x = Qkv { lengths, ..Qkv::new(q.reborrow(), k.reborrow(), v.reborrow()) };
        let norm = Norm::Softmax { sinks: None };
        match bias {
            None => Ok(run(&self.config.call(x, norm, None)?)),
            Some(bias) => {
                let config = self.config.with_score(bias);
                Ok(run(&config.call(x, norm, None)?))
            }
        }
    }

    /// Bytes of scratch.
    fn bytes<T: Element>(&self, x: &AgentInput<'_, T>, sizes: &Sizes) -> Result<usize> {
        let (b, h, _, d) = x.qkv.q.dim();
        let (n, value_dim) = (sizes.agents, sizes.dims.value_dim);
        let zero = aview0(&0f32);
        let like = |dim| like(&zero, (b, h, n, dim));
        let Qkv { q, k, v, lengths, .. } = x.qkv;
        let first = self.with_call(like(d)?, [k, v], lengths, x.agent_bias, engine::workspace_bytes)?;
        let second = self.with_call(
            q,
            [like(d)?, like(value_dim)?],
            Lengths::Full,
            x.query_bias,
            engine::workspace_bytes,
        )?;
        let pool = self.pool.map_or(0, |pool| pool.bytes(sizes.heads() * n, padded(d)));
        let (sums, convolution) = match &self.convolution {
            Some(conv) => (sizes.sums(), conv.bytes(sizes.heads(), padded(value_dim))),
            None => (0, 0),
        };
        let kept = [sizes.agents(), sizes.values(), sums].map(bytes_for::<f32>);
        Ok(kept.iter().sum::<usize>() + first.max(second).max(pool).max(convolution))
    }

    fn run<T: Element>(
        &self,
        x: &AgentInput<'_, T>,
        sizes: &Sizes,
        out: ArrayViewMut4<'_, T>,
        mut arena: Arena<'_>,
    ) -> Result<()> {
        let Dims { batch, q_heads, q_len, head_dim, value_dim, .. } = sizes.dims;
        let (n, stride) = (sizes.agents, padded(head_dim));
        let agents = arena.take::<f32>(sizes.agents());
        match (self.pool, &x.agents) {
            (Some(pool), _) => self.pool(pool, &x.qkv.q, sizes, agents, arena.reborrow()),
            (None, Some(given)) => {
                let mut agents = shaped((batch, q_heads, n, stride), agents)?;
                let group = q_heads.checked_div(given.dim().1).unwrap_or(1);
                for h in 0..q_heads {
                    let mut to = agents.slice_mut(s![.., h, .., ..head_dim]);
                    to.zip_mut_with(&given.slice(s![.., h / group, .., ..]), |to, x| *to = x.to_f32());
                }
            }
            (None, None) => {}
        }
        let agents = shaped((batch, q_heads, n, stride), agents)?;
        let agents = agents.slice(s![.., .., .., ..head_dim]);
        let mut values = shaped((batch, q_heads, n, value_dim), arena.take(sizes.values()))?;

        let Qkv { q, k, v, lengths, .. } = x.qkv;
        self.with_call(agents, [k, v], lengths, x.agent_bias, |call| {
            engine::run_in(call, values.view_mut(), None, arena.reborrow());
        })?;
        let from = [agents, values.view()];
        let Some(convolution) = &self.convolution else {
            return self.with_call(q, from, Lengths::Full, x.query_bias, |call| {
                engine::run_in(call, out, None, arena);
            });
        };
        let stride = padded(value_dim);
        let sums = arena.take::<f32>(sizes.sums());
        let mut rows = shaped((batch, q_heads, q_len, stride), &mut *sums)?;
        self.with_call(q, from, Lengths::Full, x.query_bias, |call| {
            engine::run_in(call, rows.slice_mut(s![.., .., .., ..value_dim]), None, arena.reborrow());
        })?;
        self.convolve(convolution, &v, sizes, sums, out, arena);
        Ok(())
    }

    /// Agents of the queries, into rows of whole vectors.
    fn pool<T: Element>(
        &self,
        pool: Pool,
        q: &ArrayView4<'_, T>,
        sizes: &Sizes,
        agents: &mut [f32],
        mut arena: Arena<'_>,
    ) {
        let (isa, stride, n) = (self.config.isa(), padded(sizes.dims.head_dim), sizes.agents);
        let (heads, tasks) = (sizes.dims.q_heads, sizes.heads() * n);
        let agents = Parts::new(agents, stride, arena.take(claim_words(tasks)));
        let queries = T::any(Heads::new(q.reborrow()));
        let workers = parallel::threads();
        let shares = arena.shares(workers, pool.room(stride));
        let room = pool.room(stride) / size_of::<f32>();
        let start = |worker| shares.take(worker).take::<f32>(room);
        parallel::for_each(workers, tasks, start, |copy, task| {
            let (head, agent) = (task / n, task % n);
            let q = queries.rows(head / heads, head % heads, &(0..sizes.dims.q_len));
            let (cell, width) = (pool.cells(agent), pool.width);
            isa.dispatch(Mean { q, cell, width, copy, to: agents.take(task) });
        });
    }

    /// Adds the convolution of the values to `sums` and writes the output.
    fn convolve<T: Element>(
        &self,
        convolution: &Convolution,
        v: &ArrayView4<'_, T>,
        sizes: &Sizes,
        sums: &mut [f32],
        out: ArrayViewMut4<'_, T>,
        mut arena: Arena<'_>,
    ) {
        let Dims { q_heads, kv_heads, value_dim, .. } = sizes.dims;
        let &Convolution { height, width, ref weights, .. } = convolution;
        let (isa, stride) = (self.config.isa(), padded(value_dim));
        let tasks = sizes.heads() * height;
        let sums = Parts::new(sums, width * stride, arena.take(claim_words(tasks)));
        let out = T::any_out(OutRows::new(out, arena.take(claim_words(tasks * width))));
        let values = T::any(Heads::new(v.reborrow()));
        let workers = parallel::threads();
        let shares = arena.shares(workers, convolution.room(stride));
        let room = 3 * width * stride;
        let start = |worker| shares.take(worker).take::<f32>(room);
        parallel::for_each(workers, tasks, start, |copy, task| {
            let (b, h, y) = (task / height / q_heads, task / height % q_heads, task % height);
            let [rows, taps] = convolution.under(y, height);
            isa.dispatch(Convolve {
                v: values.rows(b, h / (q_heads / kv_heads), &(rows.start * width..rows.end * width)),
                taps,
                weights: &weights[h * value_dim..],
                row: convolution.row(),
                copy,
                sums: sums.take(task),
                stride,
                width,
                out: out.take(b, h, y * width..(y + 1) * width),
            });
        });
    }
}

/// What rounding to `f32` is off by at most, of a number.
const U: f64 = 1.0 / 16_777_216.0;

/// Rows of the definition, and how far those of the kernel may be off.
struct Rows {
    x: Array2<f64>,
    off: Array2<f64>,
}

impl Rows {
    fn exact<T: Element>(x: ArrayView2<'_, T>) -> Self {
        Self { x: x.mapv(Element::to_f64), off: Array2::zeros(x.dim()) }
    }

    /// Means over the cells of a grid.
    fn means(&self, pool: &Pool) -> Self {
        let dim = (pool.side * pool.side, self.x.dim().1);
        let mut means = Self { x: Array2::zeros(dim), off: Array2::zeros(dim) };
        for (agent, c) in ndarray::indices(dim) {
            let [rows, cols] = pool.cells(agent);
            let count = (rows.len() * cols.len()) as f64;
            for (y, x) in rows.clone().flat_map(|y| cols.clone().map(move |x| (y, x))) {
                let q = self.x[[y * pool.width + x, c]];
                means.x[[agent, c]] += q / count;
                means.off[[agent, c]] += (rows.len() + cols.len()) as f64 * U * q.abs() / count;
            }
        }
        means
    }

    /// `softmax(score(scale q k^T)) v`, where a score of -inf hides a key.
    fn attend(q: &Self, k: &Self, v: &Self, scale: f64, score: impl Fn(usize, usize, f64) -> f64) -> Self {
        let dim = (q.x.dim().0, v.x.dim().1);
        let mut out = Self { x: Array2::zeros(dim), off: Array2::zeros(dim) };
        for i in 0..dim.0 {
            let (mut keys, mut scores, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
            let mut moved = 0f64;
            for j in 0..k.x.dim().0 {
                let s = score(i, j, scale * q.x.row(i).dot(&k.x.row(j)));
                if s == f64::NEG_INFINITY {
                    continue;
                }
                let (mut size, mut off) = (0.0, 0.0);
                for c in 0..k.x.dim().1 {
                    let ([q, k], [q_off, k_off]) =
                        ([q.x[[i, c]].abs(), k.x[[j, c]].abs()], [q.off[[i, c]], k.off[[j, c]]]);
                    size += (q + q_off) * (k + k_off);
                    off += q_off * k + q * k_off + q_off * k_off;
                }
                keys.push(j);
                scores.push(s);
                sizes.push(scale.abs() * size + s.abs());
                moved = moved.max(scale.abs() * off);
            }
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            let (mut size, mut largest) = (0f64, 0f64);
            for ((&j, s), &of) in keys.iter().zip(&scores).zip(&sizes) {
                let weight = (s - max).exp() / sum;
                if max - s < 25.0 {
                    size = size.max(of);
                }
                for c in 0..dim.1 {
                    out.x[[i, c]] += weight * v.x[[j, c]];
                    out.off[[i, c]] += weight * v.off[[j, c]];
                    largest = largest.max(v.x[[j, c]].abs() + v.off[[j, c]]);
                }
            }
            let terms = k.x.dim().1 as f64 + keys.len() as f64 + size;
            out.off.row_mut(i).mapv_inplace(|off| off + (ERROR_CONSTANT * U * terms + moved) * largest);
        }
        out
    }

    /// Adds a convolution of values, for the channels from `first` on.
    fn convolve(&mut self, v: &Self, convolution: &Convolution, first: usize) {
        let (height, width) = (convolution.height, convolution.width);
        for ((token, c), out) in self.x.indexed_iter_mut() {
            let (y, x) = (token / width, token % width);
            let bias = convolution.weight(TAPS, first + c);
            let mut size = out.abs() + self.off[[token, c]] + bias.abs();
            *out += bias;
            for (row, column) in (0..3).flat_map(|row| (0..3).map(move |column| (row, column))) {
                // The token at (y + row - 1, x + column - 1), if it is there.
                if !(1..=height).contains(&(y + row)) || !(1..=width).contains(&(x + column)) {
                    continue;
                }
                let value = v.x[[(y + row - 1) * width + x + column - 1, c]];
                let product = convolution.weight(3 * row + column, first + c) * value;
                *out += product;
                size += product.abs();
            }
            self.off[[token, c]] += 8.0 * ERROR_CONSTANT * U * size;
        }
    }
}

impl Agent {
    /// The definition, and how far each row may be off.
    fn define<T: Element>(&self, x: &AgentInput<'_, T>) -> Result<(Array4<f64>, Array3<f64>)> {
        let Sizes { dims, agents: n } = self.check(x)?;
        let scale = self.config.scale(&dims);
        let Dims { batch, q_heads, kv_heads, q_len, value_dim, .. } = dims;
        let mut out = filled("out", (batch, q_heads, q_len, value_dim), 0f64)?;
        let mut bound = filled("out", (batch, q_heads, q_len), 0f64)?;
        for (b, h) in (0..batch).flat_map(|b| (0..q_heads).map(move |h| (b, h))) {
            let keys = x.qkv.lengths.sequence(&dims, b).keys.len();
            let g = h / (q_heads / kv_heads);
            let q = Rows::exact(x.qkv.q.slice(s![b, h, .., ..]));
            let k = Rows::exact(x.qkv.k.slice(s![b, g, ..keys, ..]));
            let v = Rows::exact(x.qkv.v.slice(s![b, g, ..keys, ..]));
            let agents = match (&self.pool, &x.agents) {
                (Some(pool), _) => q.means(pool),
                (None, Some(agents)) => {
                    let own = h / (q_heads / agents.dim().1);
                    Rows::exact(agents.slice(s![b, own, .., ..]))
                }
                (None, None) => continue,
            };
            let biased = |bias: Option<&Bias<'_>>, q_len, kv_len, i, j, score| match bias {
                Some(bias) => bias.define(&Site { batch: b, head: h, q_len, kv_len }, i, j, score),
                None => score,
            };
            let first = |a, j, score| biased(x.agent_bias, n, keys, a, j, score);
            let second = |i, a, score| biased(x.query_bias, q_len, n, i, a, score);
            let values = Rows::attend(&agents, &k, &v, scale, first);
            let mut rows = Rows::attend(&q, &agents, &values, scale, second);
            if let Some(convolution) = &self.convolution {
                rows.convolve(&v, convolution, h * value_dim);
            }
            out.slice_mut(s![b, h, .., ..]).assign(&rows.x);
            for (i, off) in rows.off.rows().into_iter().enumerate() {
                bound[[b, h, i]] =
                    off.fold(0.0, |most: f64, &off| if off > most || off.is_nan() { off } else { most });
            }
        }
        Ok((out, bound))
    }
}

impl<T: Element> Attention<AgentInput<'_, T>> for Agent {
    fn workspace_bytes(&self, x: AgentInput<'_, T>) -> Result<usize> {
        let sizes = self.check(&x)?;
        self.bytes(&x, &sizes)
    }

    fn forward_into(
        &self,
        x: AgentInput<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check(&x)?;
        check_out(&x, &out)?;
        let arena = workspace.arena(self.bytes(&x, &sizes)?)?;
        self.run(&x, &sizes, out, arena)
    }

    fn reference(&self, x: AgentInput<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.0)
    }

    /// Pairs of agents and keys and of queries and agents, what is pooled,
    /// and the taps of the convolution that lie within the grid.
    fn cost(&self, x: AgentInput<'_, T>) -> Result<Cost> {
        let sizes = self.check(&x)?;
        let Dims { batch, q_heads, q_len, head_dim, value_dim, .. } = sizes.dims;
        let keys: usize = (0..batch).map(|b| x.qkv.lengths.sequence(&sizes.dims, b).keys.len()).sum();
        let mut flops = 2 * q_heads * sizes.agents * (batch * q_len + keys) * (head_dim + value_dim);
        if let Some(pool) = &self.pool {
            let tokens = |len| (0..pool.side).map(|i| pool.cell(i, len).len()).sum::<usize>();
            flops += sizes.heads() * tokens(pool.height) * tokens(pool.width) * head_dim;
        }
        if let Some(Convolution { height, width, .. }) = self.convolution {
            flops += 2 * sizes.heads() * (3 * height - 2) * (3 * width - 2) * value_dim;
        }
        let agents = x.agents.map_or(0, |agents| agents.len());
        let Qkv { q, k, v, .. } = x.qkv;
        let elements = q.len() + k.len() + v.len() + agents + batch * q_heads * q_len * value_dim;
        Ok(Cost { flops: flops as u64, bytes: (elements * size_of::<T>()) as u64 })
    }
}

impl<T: Element> Bounded<AgentInput<'_, T>> for Agent {
    fn error_bound(&self, x: AgentInput<'_, T>) -> Result<Array3<f64>> {
        Ok(self.define(&x)?.1)
    }
}

exhibit! {
    AgentExhibit of Agent, "linear", "Agent Attention", "arXiv 2312.08874";
    "two softmax attentions through 9 agent tokens";
    not "with few keys: dense attention is exact and as fast";
    tokens false;
    build(_, _) {
        Agent::builder()
    }
    extras(x, field) {
        let (batch, heads, _, dim) = x.q.dim();
        let agent = |(_, h, a, c)| T::from_f32((field.round)(field.at(1, h, a, c)));
        Extras { keys: Array4::from_shape_fn((batch, heads, 9, dim), agent), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> AgentInput<'a, T> {
        AgentInput::new(x, extras.keys.view())
    }
}
carded!(Agent, AgentExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::engine::parallel::on_threads;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};
    use crate::{Weights, score};
    use half::{bf16, f16};
    use ndarray::Axis;

    /// An input that owns its arrays.
    struct Case {
        x: Qkvs,
        agents: Array4<f32>,
        agent_bias: Array4<f32>,
        query_bias: Array4<f32>,
    }

    impl Case {
        /// Sizes are batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim.
        fn new(sizes: [usize; 7], n: usize, seed: u64) -> Self {
            let [batch, q_heads, _, q_len, kv_len, dim, _] = sizes;
            let mut agent_bias = array(seed + 2, (1, q_heads, n, kv_len)) * 3.0;
            // Some agents do not see some keys, as a mask would have it.
            for ((_, h, a, j), bias) in agent_bias.indexed_iter_mut() {
                if (h + 2 * a + 3 * j) % 11 == 5 {
                    *bias = f32::NEG_INFINITY;
                }
            }
            Self {
                x: Qkvs::new(sizes, seed),
                agents: array(seed + 1, (batch, q_heads, n, dim)) * 2.0,
                agent_bias,
                query_bias: array(seed + 3, (1, q_heads, q_len, n)) * 3.0,
            }
        }

        fn plain(&self) -> AgentInput<'_, f32> {
            AgentInput::new(self.x.qkv(), self.agents.view())
        }

        fn biases(&self) -> [Bias<'_>; 2] {
            [Bias::new(self.agent_bias.view()), Bias::new(self.query_bias.view())]
        }
    }

    fn biased<'a: 'b, 'b, T>(x: AgentInput<'a, T>, [agent, query]: &'b [Bias<'b>; 2]) -> AgentInput<'b, T> {
        AgentInput { agent_bias: Some(agent), query_bias: Some(query), ..x.reborrow() }
    }

    /// The convolution of a grid, for that many channels.
    fn convolving(builder: AgentBuilder, height: usize, width: usize, channels: usize) -> AgentBuilder {
        builder.convolution(height, width, array(70, (channels, 3, 3)), array(71, channels))
    }

    fn error<R: std::fmt::Debug>(result: Result<R>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        let agent = Agent::builder().build().unwrap();
        for (q_len, kv_len) in [(0, 5), (1, 1), (5, 300), (63, 64), (65, 65), (130, 70), (197, 1100)] {
            for n in [0, 1, 9, 49, 70] {
                for heads in [[4, 4], [4, 2], [3, 1]] {
                    let case = Case::new([2, heads[0], heads[1], q_len, kv_len, 12, 20], n, 1);
                    worst = worst.max(held(&agent, case.plain()));
                    worst = worst.max(held(&agent, biased(case.plain(), &case.biases())));
                }
            }
        }
        for (height, width, p) in [(1, 1, 1), (6, 6, 3), (7, 10, 3), (5, 3, 7), (14, 14, 7), (1, 90, 4)] {
            let len = height * width;
            let case = Case::new([2, 4, 2, len, len, 12, 20], p * p, 2);
            let pooled = AgentInput::pooled(case.x.qkv());
            for builder in [
                Agent::builder().pool(height, width, p),
                convolving(Agent::builder().pool(height, width, p), height, width, 80),
            ] {
                let agent = builder.scale(0.7).build().unwrap();
                worst = worst.max(held(&agent, pooled));
                worst = worst.max(held(&agent, biased(pooled, &case.biases())));
            }
            let agent = convolving(Agent::builder(), height, width, 80).build().unwrap();
            worst = worst.max(held(&agent, case.plain()));
        }
        for isa in Isa::available() {
            let case = Case::new([1, 2, 1, 30, 30, 9, 17], 4, 3);
            let builder = convolving(Agent::builder().isa(isa).pool(5, 6, 2), 5, 6, 34);
            worst = worst.max(held(&builder.build().unwrap(), AgentInput::pooled(case.x.qkv())));
        }
        println!("agent: {worst:.3} of the bound");
    }

    #[test]
    fn half_types_are_widened_and_rounded_once() {
        fn check<T: Element>(case: &Case) -> f64 {
            let narrow = |x: &Array4<f32>| x.mapv(T::from_f32);
            let (q, k, v) = (narrow(&case.x.q), narrow(&case.x.k), narrow(&case.x.v));
            let (qkv, agents) = (Qkv::new(q.view(), k.view(), v.view()), narrow(&case.agents));
            let given = Agent::builder().build().unwrap();
            let all = convolving(Agent::builder().pool(7, 10, 3), 7, 10, 80).build().unwrap();
            let mut worst = held(&given, biased(AgentInput::new(qkv, agents.view()), &case.biases()));
            worst = worst.max(held(&all, AgentInput::pooled(qkv)));
            // Few queries take another engine.
            let few = Qkv { q: q.slice(s![.., .., ..2, ..]), ..qkv };
            worst.max(held(&given, AgentInput::new(few, agents.view())))
        }
        let case = Case::new([2, 4, 2, 70, 70, 12, 20], 9, 4);
        println!("f16: {:.3}, bf16: {:.3} of the bound", check::<f16>(&case), check::<bf16>(&case));
    }

    #[test]
    fn it_is_two_softmax_attentions() {
        let case = Case::new([2, 4, 2, 33, 50, 12, 20], 9, 5);
        let biases = case.biases();
        let agent = Agent::builder().build().unwrap();
        let with = agent.reference(biased(case.plain(), &biases)).unwrap();
        let without = agent.reference(case.plain()).unwrap();
        assert!(with.iter().zip(&without).any(|(a, b)| (a - b).abs() > 0.1));

        // The weights of each, from dense attention's own definition.
        let read = Qkv { q: case.agents.view(), ..case.x.qkv() };
        let give = Qkv::new(case.x.q.view(), case.agents.view(), case.agents.view());
        let weights = |bias: Option<&Bias<'_>>, x: Qkv<'_, f32>| match bias {
            Some(bias) => {
                Dense::builder().score(bias).build().unwrap().reference_weights(x.reborrow()).unwrap()
            }
            None => {
                Dense::builder().score(score::Plain).build().unwrap().reference_weights(x.reborrow()).unwrap()
            }
        };
        for (got, [first, second]) in [(with, [Some(&biases[0]), Some(&biases[1])]), (without, [None, None])]
        {
            let (first, second) = (weights(first, read), weights(second, give));
            let want = Array4::from_shape_fn(got.dim(), |(b, h, i, c)| {
                let read = |a: usize| -> f64 {
                    (0..50).map(|j| first[[b, h, a, j]] * f64::from(case.x.v[[b, h / 2, j, c]])).sum()
                };
                (0..9).map(|a| second[[b, h, i, a]] * read(a)).sum()
            });
            close(&got, &want, 1e-13);
        }
    }

    #[test]
    fn rows_of_weights_sum_to_one() {
        let mut case = Case::new([2, 4, 2, 30, 30, 12, 20], 9, 6);
        for ((_, _, _, c), v) in case.x.v.indexed_iter_mut() {
            *v = c as f32 - 7.5;
        }
        let agent = Agent::builder().build().unwrap();
        let pooled = Agent::builder().pool(5, 6, 3).build().unwrap();
        let biases = case.biases();
        let outs = [
            agent.reference(biased(case.plain(), &biases)).unwrap(),
            pooled.reference(AgentInput::pooled(case.x.qkv())).unwrap(),
        ];
        for out in outs {
            for ((.., c), out) in out.indexed_iter() {
                assert!((out - (c as f64 - 7.5)).abs() < 1e-13, "channel {c}: {out}");
            }
        }
        held(&agent, biased(case.plain(), &biases));
    }

    #[test]
    fn the_order_of_keys_does_not_matter() {
        let case = Case::new([2, 4, 2, 30, 45, 12, 20], 9, 7);
        let order: Vec<usize> = (0..45).map(|j| (7 * j + 3) % 45).collect();
        let mixed = Case {
            x: Qkvs {
                q: case.x.q.clone(),
                k: case.x.k.select(Axis(2), &order),
                v: case.x.v.select(Axis(2), &order),
            },
            agents: case.agents.clone(),
            agent_bias: case.agent_bias.select(Axis(3), &order),
            query_bias: case.query_bias.clone(),
        };
        let agent = Agent::builder().build().unwrap();
        let [want, got] = [&case, &mixed].map(|case| {
            let biases = case.biases();
            held(&agent, biased(case.plain(), &biases));
            agent.reference(biased(case.plain(), &biases)).unwrap()
        });
        close(&got, &want, 1e-13);
        // The bias has to go with its keys.
        let wrong = Case { agent_bias: case.agent_bias.clone(), ..mixed };
        let wrong = agent.reference(biased(wrong.plain(), &wrong.biases())).unwrap();
        assert!(wrong.iter().zip(&want).any(|(a, b)| (a - b).abs() > 0.05));
    }

    /// An agent for each query, which it alone reads, is softmax attention.
    #[test]
    fn agents_that_are_the_queries() {
        let mut case = Case::new([2, 4, 2, 30, 45, 12, 20], 30, 8);
        case.agents = case.x.q.clone();
        case.query_bias = Array4::from_shape_fn(
            (1, 1, 30, 30),
            |(_, _, i, a)| {
                if i == a { 0.0 } else { f32::NEG_INFINITY }
            },
        );
        let bias = Bias::new(case.query_bias.view());
        let x = AgentInput { query_bias: Some(&bias), ..case.plain() };
        let agent = Agent::builder().build().unwrap();
        let dense = Dense::builder().build().unwrap().reference(case.x.qkv()).unwrap();
        close(&agent.reference(x).unwrap(), &dense, 1e-13);
        held(&agent, x);
    }

    #[test]
    fn cells_are_those_of_adaptive_pooling() {
        let pool = |len, side| {
            let pool = Pool { height: len, width: 1, side };
            (0..side).map(|i| pool.cell(i, len)).collect::<Vec<_>>()
        };
        assert_eq!(pool(5, 3), [0..2, 1..4, 3..5]);
        assert_eq!(pool(6, 3), [0..2, 2..4, 4..6]);
        assert_eq!(pool(3, 4), [0..1, 0..2, 1..3, 2..3]);
        assert_eq!(pool(10, 4), [0..3, 2..5, 5..8, 7..10]);

        // A token is in every cell that it has a part of.
        for (height, width, p) in [(5, 7, 3), (6, 4, 2), (2, 3, 4), (14, 15, 7)] {
            let mut case = Case::new([1, 2, 2, height * width, 20, 12, 16], p * p, 9);
            let within =
                |row: usize, y: usize, len: usize| row * len < (y + 1) * p && y * p < (row + 1) * len;
            case.agents = Array4::from_shape_fn(case.agents.dim(), |(b, h, a, c)| {
                let (mut sum, mut count) = (0.0, 0.0);
                for (y, x) in ndarray::indices((height, width)) {
                    if within(a / p, y, height) && within(a % p, x, width) {
                        sum += f64::from(case.x.q[[b, h, y * width + x, c]]);
                        count += 1.0;
                    }
                }
                (sum / count) as f32
            });
            let pooled = Agent::builder().pool(height, width, p).build().unwrap();
            let given = Agent::builder().build().unwrap();
            let got = pooled.reference(AgentInput::pooled(case.x.qkv())).unwrap();
            close(&got, &given.reference(case.plain()).unwrap(), 1e-6);
            held(&pooled, AgentInput::pooled(case.x.qkv()));
        }
    }

    #[test]
    fn the_convolution_is_a_sum_of_shifted_grids() {
        let (height, width, dim) = (4, 6, 5);
        let case = Case::new([2, 4, 2, 24, 24, 12, dim], 9, 10);
        let plain = Agent::builder().build().unwrap();
        let without = plain.reference(case.plain()).unwrap();
        let (weights, bias) = (array(70, (4 * dim, 3, 3)), array(71, 4 * dim));
        let agent = convolving(Agent::builder(), height, width, 4 * dim).build().unwrap();
        // Each value is sent to where it counts.
        let mut want = without.clone();
        for ((.., h, _, c), out) in want.indexed_iter_mut() {
            *out += f64::from(bias[h * dim + c]);
        }
        for (b, h, y, x, c) in ndarray::indices((2, 4, height, width, dim)) {
            let value = f64::from(case.x.v[[b, h / 2, y * width + x, c]]);
            for (row, column) in ndarray::indices((3, 3)) {
                let (to_y, to_x) = ((y + 1).checked_sub(row), (x + 1).checked_sub(column));
                if let (Some(to_y), Some(to_x)) = (to_y, to_x)
                    && to_y < height
                    && to_x < width
                {
                    let weight = f64::from(weights[[h * dim + c, row, column]]);
                    want[[b, h, to_y * width + to_x, c]] += weight * value;
                }
            }
        }
        close(&agent.reference(case.plain()).unwrap(), &want, 1e-13);
        held(&agent, case.plain());
        // Beyond the grid nothing is read, not even what is not a number.
        let mut spoilt = case.x.clone();
        spoilt.v.slice_mut(s![.., .., 0, ..]).fill(f32::NAN);
        let mut agents = case.agents.clone();
        agents.slice_mut(s![.., .., 1.., ..]).fill(0.0);
        let bias =
            Array4::from_shape_fn((1, 1, 1, 24), |(.., j)| if j == 0 { f32::NEG_INFINITY } else { 0.0 });
        let bias = Bias::new(bias.view());
        let x = AgentInput { agent_bias: Some(&bias), ..AgentInput::new(spoilt.qkv(), agents.view()) };
        for ((_, _, t, _), out) in agent.forward(x).unwrap().indexed_iter() {
            assert_eq!(out.is_nan(), t / width < 2 && t % width < 2, "token {t} is {out}");
        }
    }

    #[test]
    fn keys_that_are_not_there() {
        let agent = Agent::builder().build().unwrap();
        let none = Case::new([2, 4, 2, 30, 0, 12, 20], 9, 11);
        for x in [none.plain(), biased(none.plain(), &none.biases())] {
            assert!(agent.forward(x).unwrap().iter().all(|&x| x == 0.0));
            assert!(agent.reference(x).unwrap().iter().all(|&x| x == 0.0));
            assert!(agent.error_bound(x).unwrap().iter().all(|&x| x == 0.0));
        }
        // Lengths of their own: as with just those keys, whatever follows.
        let mut case = Case::new([2, 4, 2, 30, 45, 12, 20], 9, 12);
        let short = case.x.slice(0..30, 0..17);
        case.x.k.slice_mut(s![.., .., 17.., ..]).fill(f32::NAN);
        case.x.v.slice_mut(s![.., .., 17.., ..]).fill(f32::INFINITY);
        let x = AgentInput::new(case.x.qkv().key_lengths(&[17, 0]), case.agents.view());
        let biases = case.biases();
        let x = biased(x, &biases);
        held(&agent, x);
        let bias = Bias::new(case.agent_bias.slice(s![.., .., .., ..17]));
        let shorter = AgentInput { qkv: short.qkv(), agent_bias: Some(&bias), ..x };
        let (got, want) = (agent.reference(x).unwrap(), agent.reference(shorter).unwrap());
        close(&got.slice(s![..1, .., .., ..]).to_owned(), &want.slice(s![..1, .., .., ..]).to_owned(), 1e-13);
        assert!(got.slice(s![1, .., .., ..]).iter().all(|&x| x == 0.0));
        let keys_for_all = agent.cost(shorter).unwrap().flops;
        let want = 2 * 4 * 9 * (2 * 30 + 2 * 17) * 32;
        assert_eq!((keys_for_all, agent.cost(x).unwrap().flops), (want, want - 2 * 4 * 9 * 17 * 32));
    }

    #[test]
    fn a_nan_shows_in_its_head() {
        let case = Case::new([2, 4, 2, 30, 45, 12, 20], 9, 13);
        let agent = Agent::builder().build().unwrap();
        let mut spoilt = case.x.clone();
        spoilt.k[[1, 1, 44, 3]] = f32::NAN;
        let x = AgentInput { qkv: spoilt.qkv(), ..case.plain() };
        for ((b, h, ..), out) in agent.forward(x).unwrap().indexed_iter() {
            assert_eq!(out.is_nan(), b == 1 && h >= 2);
        }
    }

    /// Where queries cancel, pooled agents are small and their errors large:
    /// what is off by more than the bound for exact agents is within theirs.
    #[test]
    fn errors_of_pooled_agents_count() {
        let mut case = Case::new([1, 2, 2, 128, 128, 16, 20], 4, 14);
        for ((.., t, _), q) in case.x.q.indexed_iter_mut() {
            // Halves of the rows of a cell.
            *q = (*q + 3e4) * if t % 8 < 4 { 1.0 } else { -1.0 };
        }
        // Agents that see different keys have different values.
        case.agent_bias = Array4::from_shape_fn((1, 1, 4, 128), |(.., a, j)| -20.0 * f32::from(j % 4 != a));
        let bias = Bias::new(case.agent_bias.view());
        let pooled = Agent::builder().pool(8, 16, 2).scale(1e-5).build().unwrap();
        let given = Agent::builder().scale(1e-5).build().unwrap();
        for h in 0..2 {
            let means = Rows::exact(case.x.q.slice(s![0, h, .., ..])).means(&pooled.pool.unwrap());
            case.agents.slice_mut(s![0, h, .., ..]).assign(&means.x.mapv(|x| x as f32));
        }
        let x = AgentInput { agent_bias: Some(&bias), ..AgentInput::pooled(case.x.qkv()) };
        let exact = AgentInput { agents: Some(case.agents.view()), ..x };
        let (share, less) = (held(&pooled, x), given.error_bound(exact).unwrap());
        let (got, want) = (pooled.forward(x).unwrap(), pooled.reference(x).unwrap());
        let mut most = 0f64;
        for ((b, h, t, c), got) in got.indexed_iter() {
            most = most.max((f64::from(*got) - want[[b, h, t, c]]).abs() / less[[b, h, t]]);
        }
        println!("cancelling: {share:.4} of the bound, {most:.2} of that for exact agents");
        assert!(most > 1.0);
    }

    /// Sizes of 0 wherever they can be.
    #[test]
    fn nothing_of_something() {
        for sizes in [
            [0, 2, 1, 30, 30, 12, 20],
            [2, 0, 0, 30, 30, 12, 20],
            [2, 2, 1, 30, 30, 0, 20],
            [2, 2, 1, 30, 30, 12, 0],
        ] {
            let case = Case::new(sizes, 9, 17);
            let agent = Agent::builder().build().unwrap();
            held(&agent, biased(case.plain(), &case.biases()));
            let pool = Agent::builder().pool(5, 6, 3);
            let all = convolving(pool, 5, 6, sizes[1] * sizes[6]).build().unwrap();
            held(&all, AgentInput::pooled(case.x.qkv()));
        }
    }

    #[test]
    fn memory_and_threads() {
        let case = Case::new([2, 4, 2, 70, 70, 12, 20], 9, 15);
        let all = convolving(Agent::builder().pool(7, 10, 3), 7, 10, 80).build().unwrap();
        let given = Agent::builder().build().unwrap();
        let biases = case.biases();
        for (agent, x) in [
            (&all, biased(AgentInput::pooled(case.x.qkv()), &biases)),
            (&given, biased(case.plain(), &biases)),
        ] {
            let [one, three] = [1, 3].map(|threads| {
                on_threads(threads, || {
                    let bytes = agent.workspace_bytes(x).unwrap();
                    let mut workspace = Workspace::with_capacity(bytes);
                    let mut out = Array4::zeros((2, 4, 70, 20));
                    agent.forward_into(x, out.view_mut(), &mut workspace).unwrap();
                    assert_eq!(workspace.capacity(), Workspace::with_capacity(bytes).capacity());
                    // Whatever is in it.
                    let mut dirty = Workspace::new();
                    let nan = Array4::from_elem((2, 4, 90, 30), f32::NAN);
                    let poison = Qkv::new(nan.view(), nan.view(), nan.view());
                    Dense::builder()
                        .build()
                        .unwrap()
                        .forward_into(poison, nan.clone().view_mut(), &mut dirty)
                        .unwrap();
                    let mut again = Array4::zeros((2, 4, 70, 20));
                    agent.forward_into(x, again.view_mut(), &mut dirty).unwrap();
                    assert_eq!(out, again);
                    out
                })
            });
            assert_eq!(one, three);
        }
    }

    #[test]
    fn refusals() {
        let case = Case::new([2, 4, 2, 30, 30, 12, 20], 9, 16);
        let agent = Agent::builder().build().unwrap();
        let pooled = AgentInput::pooled(case.x.qkv());
        assert_eq!(
            error(agent.forward(pooled)),
            "agents: expected an array [batch, heads, n, head_dim], since none are pooled, got none"
        );
        let pooling = Agent::builder().pool(5, 6, 3).build().unwrap();
        pooling.forward(pooled).unwrap();
        assert_eq!(
            error(pooling.forward(case.plain())),
            "agents cannot be combined with pool: agents are given or made of the queries, not both"
        );
        assert_eq!(
            error(Agent::builder().pool(5, 7, 3).build().unwrap().forward(pooled)),
            "q: expected shape [batch, heads, len, head_dim] with len = 5 x 7, the grid, got [2, 4, 30, 12]"
        );
        for dim in [(1, 4, 9, 12), (2, 3, 9, 12), (2, 4, 9, 11), (2, 0, 9, 12)] {
            let agents = Array4::zeros(dim);
            assert_eq!(
                error(agent.forward(AgentInput::new(case.x.qkv(), agents.view()))),
                format!(
                    "agents: expected shape [batch, heads, n, head_dim] = [2, 4 or a divisor, _, 12], got {:?}",
                    agents.shape()
                )
            );
        }
        let shared = case.agents.slice(s![.., ..2, .., ..]);
        held(&agent, AgentInput::new(case.x.qkv(), shared));

        let biases = case.biases();
        let swapped = [biases[1].clone(), biases[0].clone()];
        assert_eq!(
            error(agent.forward(biased(case.plain(), &swapped))),
            "agent_bias: expected shape [batch, heads, n, kv_len] = [2, 4, 9, 30] or 1 in place of any of them, got [1, 4, 30, 9]"
        );
        let both = AgentInput { query_bias: Some(&biases[0]), ..case.plain() };
        assert_eq!(
            error(agent.forward(both)),
            "query_bias: expected shape [batch, heads, q_len, n] = [2, 4, 30, 9] or 1 in place of any of them, got [1, 4, 9, 30]"
        );
        let one = Case::new([1, 4, 2, 30, 30, 12, 20], 9, 16);
        let offsets = [0, 10, 30];
        let packed = AgentInput { qkv: one.x.qkv().packed(&offsets, &offsets), ..one.plain() };
        assert_eq!(
            error(agent.forward(packed)),
            "a packed batch cannot be combined with agents: agents belong to an entry of the batch and would mix its sequences"
        );
        let mut out = Array4::from_elem((2, 4, 30, 19), 7f32);
        assert_eq!(
            error(agent.forward_into(case.plain(), out.view_mut(), &mut Workspace::new())),
            "out: expected shape [batch, heads, len, value_dim] = [2, 4, 30, 20], got [2, 4, 30, 19]"
        );
        assert!(out.iter().all(|&x| x == 7.0));

        let convolve = convolving(Agent::builder(), 5, 6, 80).build().unwrap();
        assert_eq!(
            error(convolve.forward(Case::new([2, 4, 2, 31, 30, 12, 20], 9, 1).plain())),
            "q: expected shape [batch, heads, len, dim] with len = 5 x 6, the grid of the convolution, got [2, 4, 31, 12]"
        );
        assert_eq!(
            error(convolve.forward(Case::new([2, 4, 2, 30, 31, 12, 20], 9, 1).plain())),
            "v: expected shape [batch, heads, len, dim] with len = 5 x 6, the grid of the convolution, got [2, 2, 31, 20]"
        );
        assert_eq!(
            error(convolve.forward(Case::new([2, 4, 2, 30, 30, 12, 10], 9, 1).plain())),
            "weights: expected shape [heads * value_dim, 3, 3] = [4 * 10, 3, 3], got [80, 3, 3]"
        );
        let lengths = AgentInput { qkv: case.x.qkv().key_lengths(&[30, 30]), ..case.plain() };
        assert_eq!(
            error(convolve.forward(lengths)),
            "key_lengths cannot be combined with a convolution: the grid has a value for each token"
        );
    }

    #[test]
    fn options_are_checked() {
        let build = |builder: AgentBuilder| error(builder.build());
        for (height, width, p, got) in [
            (0, 6, 3, "0 x 6 and 3"),
            (5, 0, 3, "5 x 0 and 3"),
            (5, 6, 0, "5 x 6 and 0"),
            (5, 6, 1025, "5 x 6 and 1025"),
        ] {
            assert_eq!(
                build(Agent::builder().pool(height, width, p)),
                format!("pool: expected a grid of at least 1 x 1 and 1 to 1024 agents a side, got {got}")
            );
        }
        let convolution = |height, width, weights, bias| {
            Agent::builder().convolution(height, width, Array3::zeros(weights), Array1::zeros(bias))
        };
        assert_eq!(
            build(convolution(0, 6, (8, 3, 3), 8)),
            "convolution: expected a grid of at least 1 x 1, got 0 x 6"
        );
        assert_eq!(
            build(convolution(5, 6, (8, 3, 5), 8)),
            "weights: expected shape [heads * value_dim, 3, 3], got [8, 3, 5]"
        );
        assert_eq!(
            build(convolution(5, 6, (8, 3, 3), 7)),
            "bias: expected shape [heads * value_dim] = [8] as the weights have it, got [7]"
        );
        assert_eq!(
            build(convolution(6, 5, (8, 3, 3), 8).pool(5, 6, 3)),
            "convolution: expected the grid that is pooled, 5 x 6, got 6 x 5"
        );
        let infinite = Array3::from_elem((1, 3, 3), f32::INFINITY);
        assert_eq!(
            build(Agent::builder().convolution(5, 6, infinite, Array1::zeros(1))),
            "weights: expected finite numbers, got inf"
        );
        let nan = Array1::from_elem(1, f32::NAN);
        assert_eq!(
            build(Agent::builder().convolution(5, 6, Array3::zeros((1, 3, 3)), nan)),
            "bias: expected finite numbers, got NaN"
        );
        assert_eq!(build(Agent::builder().scale(f32::NAN)), "scale: expected a finite number, got NaN");
    }
}
