//! Agent Attention: two softmax attentions through a few agent tokens, which
//! read all keys and are read by all queries.

use ndarray::{Array1, Array3, Array4, ArrayView4};

use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::{Head, of_heads};
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dim4, Dims, Input as _, Qkv, Site};
use crate::mask::Unmasked;
use crate::score::{Bias, Plain, Score as _};
use crate::stages::attend::{Config, Options, define};
use crate::stages::convolve::{Convolution, Then, check_grid};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::pool::Pool;
use crate::stages::window::join;

views! {
    /// What [`Agent`] takes.
    AgentInput<'a, T> {
        /// Queries `[batch, heads, q_len, head_dim]`, keys and values. The latter
        /// may have fewer heads, and key lengths; a packed batch is refused.
        qkv: array Qkv<'a, T>,
        /// Agents `[batch, heads, n, head_dim]`, where they are not
        /// [pooled](AgentBuilder::pool). Heads may be fewer.
        agents: maybe Option<ArrayView4<'a, T>>,
        /// What is added to the scores of agents and keys: a view `[batch, heads,
        /// n, kv_len]`, where each axis may be 1.
        agent_bias: shared Option<&'a Bias<'a>>,
        /// What is added to the scores of queries and agents: a view `[batch,
        /// heads, q_len, n]`, where each axis may be 1.
        query_bias: shared Option<&'a Bias<'a>>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let dims = x.qkv.dims()?;
        if dims.packed {
            let reason = "agents belong to an entry of the batch and would mix its sequences";
            return Err(Error::Conflict { option: "a packed batch", with: "agents", reason });
        }
        let Dims { batch, q_heads, head_dim, .. } = dims;
        let fits = |&(b, h, _, d): &Dim4| {
            let divides = if h == 0 { q_heads == 0 } else { q_heads.is_multiple_of(h) };
            (b, d) == (batch, head_dim) && divides
        };
        match &x.agents {
            Some(agents) if !fits(&agents.dim()) => {
                let sizes = format!("[{batch}, {q_heads} or a divisor, _, {head_dim}]");
                let expected = format!("[batch, heads, n, head_dim] = {sizes}");
                Err(Error::shape("agents", expected, agents.shape()))
            }
            _ => Ok(dims),
        }
    }
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
}

/// Agent Attention: two softmax attentions through a few agent tokens, which
/// read all keys and are read by all queries.
///
/// ```text
/// v'_a = sum_j softmax_j(scale * a_a . k_j + agent_bias_aj) v_j       agents read keys
/// o_i  = sum_a softmax_a(scale * q_i . a_a + query_bias_ia) v'_a      queries read agents
/// ```
///
/// "Agent Attention: On the Integration of Softmax and Linear Attention"
/// (arXiv 2312.08874): linear attention whose features of queries and of keys
/// are both softmaxes. Agents are given, or means of queries over the cells of
/// a grid. Few agents see little detail, for which the paper adds a depthwise
/// convolution of the values:
///
/// ```text
/// a_(r, s) = mean of q over rows floor(r height / p) .. ceil((r + 1) height / p)
///            and the columns likewise
/// o_(y, x) += bias + sum over dy, dx from -1 to 1 of w_(dy + 1, dx + 1) v_(y + dy, x + dx)
/// ```
///
/// channel by channel, with 0 outside the grid. (Where keys are on a coarser
/// grid the authors enlarge the values first. That is not done here: keys and
/// queries need the same grid.) Every query sees every key through every agent:
/// there is no causal form.
///
/// Cost: `2 n (head_dim + value_dim) (q_len + kv_len)` flops a head for `n`
/// agents, and `18 value_dim` a token for the convolution. With less than some
/// times `n` keys [`Dense`](crate::dense::Dense) is as fast and exact.
///
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
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// With no key, or none that a bias leaves, an agent's value is 0, and the
/// agent takes part with it; with no agents the output is 0, besides the
/// convolution. A NaN in a key or a value shows in all outputs of its head.
/// Agents and their values are `f32` between the two attentions.
///
/// The error bound runs along with the definition: every operation adds its
/// rounding and what its operands are off.
#[derive(Clone, Debug)]
pub struct Agent {
    config: Config<Unmasked, Plain>,
    pool: Option<Pool>,
    convolution: Option<Convolution>,
}

impl Agent {
    /// Agents given, no convolution.
    pub fn builder() -> AgentBuilder {
        AgentBuilder::with()
    }
}

options! {
    /// Builds an [`Agent`].
    AgentBuilder of Agent, scale "1 / sqrt(head_dim)" isa;
    own {
        pool: Option<Pool> = None;
        convolution: Option<([usize; 2], Array3<f32>, Array1<f32>)> = None;
    }
    build(builder, config) {
        let AgentBuilder { pool, convolution, .. } = builder;
        pool.map_or(Ok(()), |pool| pool.check())?;
        let convolution = convolution.map(|(grid @ [height, width], weights, bias)| {
            if let Some(pool) = pool.filter(|pool| [pool.height, pool.width] != grid) {
                let expected = format!("the grid that is pooled, {} x {}", pool.height, pool.width);
                return Err(Error::value("convolution", expected, format_args!("{height} x {width}")));
            }
            Convolution::new(grid, [3, 3], &weights, &bias)
        });
        let options = Options { scale: config.scale, isa: Some(config.isa), ..Options::default() };
        Ok(Agent { config: options.build()?, pool, convolution: convolution.transpose()? })
    }
}

impl AgentBuilder {
    /// Makes `p * p` agents, 1 to 1024 a side, of the queries, which are tokens
    /// of a grid row by row: means over the cells of a `p * p` grid (adaptive
    /// average pooling). Cells overlap where `p` does not divide the sides.
    pub fn pool(self, height: usize, width: usize, p: usize) -> Self {
        Self { pool: Some(Pool { height, width, side: p }), ..self }
    }

    /// Adds a depthwise convolution of the values, which are tokens of a grid
    /// row by row: `weights` are `[heads * value_dim, 3, 3]`, `bias` is
    /// `[heads * value_dim]`. They are correlated, not flipped, as models
    /// have it. Heads that share values convolve them each with its own.
    pub fn convolution(self, height: usize, width: usize, weights: Array3<f32>, bias: Array1<f32>) -> Self {
        Self { convolution: Some(([height, width], weights, bias)), ..self }
    }
}

/// Where agents come from.
enum Agents<'a, T> {
    Pooled(Pool),
    Given(ArrayView4<'a, T>),
}

impl Agent {
    fn check<'a, T: Element>(&self, x: &AgentInput<'a, T>) -> Result<(Dims, Agents<'a, T>)> {
        let dims = x.dims()?;
        let (agents, n) = match (self.pool, x.agents) {
            (Some(_), Some(_)) => {
                let reason = "agents are given or made of the queries, not both";
                return Err(Error::Conflict { option: "agents", with: "pool", reason });
            }
            (None, None) => {
                let expected = "an array [batch, heads, n, head_dim], since none are pooled";
                return Err(Error::value("agents", expected, "none"));
            }
            (None, Some(agents)) => (Agents::Given(agents), agents.dim().2),
            (Some(pool), None) => {
                check_grid("q", &x.qkv.q, [pool.height, pool.width], "the grid")?;
                (Agents::Pooled(pool), pool.side * pool.side)
            }
        };
        let first =
            x.agent_bias.map(|bias| bias.check_as("agent_bias", "n, kv_len", Dims { q_len: n, ..dims }));
        let second =
            x.query_bias.map(|bias| bias.check_as("query_bias", "q_len, n", Dims { kv_len: n, ..dims }));
        first.transpose().and(second.transpose())?;
        self.convolution.as_ref().map_or(Ok(()), |convolution| convolution.check(&dims, &x.qkv))?;
        Ok((dims, agents))
    }

    fn attend<Q: Element, K: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, Q, K, O>,
        bias: Option<&Bias<'_>>,
        out: Out<'_, O>,
    ) -> Result<()> {
        match bias {
            None => self.config.attend(pass, x, out),
            Some(bias) => self.config.with_score(bias).attend(pass, x, out),
        }
    }
}

impl<T: Element> Pipeline<AgentInput<'_, T>> for Agent {
    type State = ();

    fn flow(
        &self,
        x: AgentInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, agents) = self.check(&x)?;
        let Dims { batch, q_heads, q_len, value_dim, .. } = dims;
        let (isa, Qkv { q, k, v, lengths, .. }) = (self.config.isa(), x.qkv);
        let agents = match agents {
            Agents::Pooled(pool) => pool.run(pass, isa, q)?,
            Agents::Given(agents) => join(pass, isa, q_heads, None, agents)?,
        };
        let mut values = pass.rows((batch, q_heads, agents.dim().2, value_dim))?;
        let read = Qkv { lengths, ..Qkv::new(agents.view(), k.reborrow(), v.reborrow()) };
        self.attend(pass, read, x.agent_bias, values.view_mut())?;
        let given = Qkv::new(q.reborrow(), agents.view(), values.view());
        let Some(convolution) = &self.convolution else {
            return self.attend(pass, given, x.query_bias, out);
        };
        let mut sums = pass.rows((batch, q_heads, q_len, value_dim))?;
        self.attend(pass, given.widened(), x.query_bias, sums.view_mut())?;
        convolution.run(pass, isa, v, Some(sums), Then::Nothing, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: AgentInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, agents) = self.check(&x)?;
        let scale = self.config.scale(&dims);
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let Head { sequence: batch, head: h, .. } = *head;
            let q = head.rows(&x.qkv.q, &head.queries);
            let (k, v) = (head.rows(&x.qkv.k, &head.keys), head.rows(&x.qkv.v, &head.keys));
            let agents = match agents {
                Agents::Pooled(pool) => pool.define(&q),
                Agents::Given(agents) => head.rows(&agents, &(0..agents.dim().2)),
            };
            let shift = |bias: Option<&Bias<'_>>, [q_len, kv_len]: [usize; 2], i, j| {
                let shift =
                    bias.map_or(0.0, |bias| bias.define(&Site { batch, head: h, q_len, kv_len }, i, j, 0.0));
                (shift != f64::NEG_INFINITY).then_some(shift)
            };
            let (m, n) = (agents.dim().0, k.dim().0);
            let values = define([&agents, &k, &v], scale, |a, j| shift(x.agent_bias, [m, n], a, j));
            let rows =
                define([&q, &agents, &values], scale, |i, a| shift(x.query_bias, [dims.q_len, m], i, a));
            match &self.convolution {
                Some(convolution) => convolution.define(&v, &rows, h * dims.value_dim),
                None => rows,
            }
        });
        Ok((out, ()))
    }
}

composite!(Agent, AgentInput);

exhibit! {
    AgentExhibit of Agent, "linear", "Agent Attention", "arXiv 2312.08874";
    "two softmax attentions through 9 agent tokens";
    not "with few keys: dense attention is exact and as fast";
    tokens false;
    build(_, _) { Agent::builder() }
    extras(x, field) {
        let (batch, heads, _, dim) = x.q.dim();
        let agent = |(_, h, a, c)| T::from_f32((field.round)(field.at(1, h, a, c)));
        Extras { keys: Array4::from_shape_fn((batch, heads, 9, dim), agent), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> AgentInput<'a, T> { AgentInput::new(x, extras.keys.view()) }
}
carded!(Agent, AgentExhibit);

#[cfg(test)]
mod tests;
