//! Agent Attention: two softmax attentions through a few agent tokens, which
//! read all keys and are read by all queries.
//!
//! ```text
//! v'_a = sum_j softmax_j(scale * a_a . k_j + agent_bias_aj) v_j       agents read keys
//! o_i  = sum_a softmax_a(scale * q_i . a_a + query_bias_ia) v'_a      queries read agents
//! ```
//!
//! "Agent Attention: On the Integration of Softmax and Linear Attention"
//! (arXiv 2312.08874): linear attention whose features of queries and of keys
//! are both softmaxes. Agents are given, or means of queries over the cells of
//! a grid. Few agents see little detail, for which the paper adds a depthwise
//! convolution of the values:
//!
//! ```text
//! a_(r, s) = mean of q over rows floor(r height / p) .. ceil((r + 1) height / p)
//!            and the columns likewise
//! o_(y, x) += bias + sum over dy, dx from -1 to 1 of w_(dy + 1, dx + 1) v_(y + dy, x + dx)
//! ```
//!
//! channel by channel, with 0 outside the grid. (Where keys are on a coarser
//! grid the authors enlarge the values first. That is not done here: keys and
//! queries need the same grid.) Every query sees every key through every agent:
//! there is no causal form.
//!
//! Cost: `2 n (head_dim + value_dim) (q_len + kv_len)` flops a head for `n`
//! agents, and `18 value_dim` a token for the convolution. With less than some
//! times `n` keys [`Dense`](crate::dense::Dense) is as fast and exact.

use ndarray::{Array1, Array3, Array4, ArrayView4};

use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::{Head, of_heads};
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::tokens::{Tokens, size};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv, Site};
use crate::mask::Unmasked;
use crate::score::{Bias, Plain, Score as _};
use crate::stages::attend::{Config, Options, define};
use crate::stages::convolve::{Convolution, check_grid};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::pool::Pool;
use crate::stages::window::join;

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
    /// n, kv_len]`, where each axis may be 1.
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

    /// Reborrows for a shorter lifetime.
    pub fn reborrow<'b>(self) -> AgentInput<'b, T>
    where
        'a: 'b,
    {
        AgentInput { qkv: self.qkv.reborrow(), agents: self.agents.map(|x| x.reborrow()), ..self }
    }

    fn bytes(&self) -> usize
    where
        T: Element,
    {
        self.qkv.bytes() + self.agents.as_ref().map_or(0, size)
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
            let Dims { batch, q_heads, head_dim, .. } = dims;
            let (b, h, _, d) = agents.dim();
            let divides = if h == 0 { q_heads == 0 } else { q_heads.is_multiple_of(h) };
            if b != batch || d != head_dim || !divides {
                let expected =
                    format!("[batch, heads, n, head_dim] = [{batch}, {q_heads} or a divisor, _, {head_dim}]");
                return Err(Error::shape("agents", expected, agents.shape()));
            }
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims().and_then(|_| self.qkv.out_dim())
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
        convolution.run(pass, isa, v, sums, out);
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
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::simd::Isa;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};
    use crate::{Attention, Weights, Workspace};
    use half::f16;
    use ndarray::s;

    /// An input that owns its arrays, and biases of which some hide keys.
    struct Case(Qkvs, Array4<f32>, [Array4<f32>; 2]);

    impl Case {
        /// Sizes are batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim.
        fn new(sizes: [usize; 7], n: usize, seed: u64) -> Self {
            let [batch, q_heads, _, q_len, kv_len, dim, _] = sizes;
            let mut bias = array(seed + 2, (1, q_heads, n, kv_len)) * 3.0;
            for ((_, h, a, j), bias) in
                bias.indexed_iter_mut().filter(|((_, h, a, j), _)| (h + 2 * a + 3 * j) % 11 == 5)
            {
                *bias = if h + a + j > 0 { f32::NEG_INFINITY } else { 0.0 };
            }
            let biases = [bias, array(seed + 3, (1, q_heads, q_len, n)) * 3.0];
            Self(Qkvs::new(sizes, seed), array(seed + 1, (batch, q_heads, n, dim)) * 2.0, biases)
        }

        fn plain(&self) -> AgentInput<'_, f32> {
            AgentInput::new(self.0.qkv(), self.1.view())
        }

        fn biases(&self) -> [Bias<'_>; 2] {
            self.2.each_ref().map(|bias| Bias::new(bias.view()))
        }
    }

    fn biased<'a: 'b, 'b, T>(x: AgentInput<'a, T>, [agent, query]: &'b [Bias<'b>; 2]) -> AgentInput<'b, T> {
        AgentInput { agent_bias: Some(agent), query_bias: Some(query), ..x.reborrow() }
    }

    /// The convolution of a grid, for that many channels.
    fn convolving(builder: AgentBuilder, height: usize, width: usize, channels: usize) -> AgentBuilder {
        builder.convolution(height, width, array(70, (channels, 3, 3)), array(71, channels))
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let (mut worst, given) = (0f64, Agent::builder().build().unwrap());
        for (q_len, kv_len, n) in
            [(0, 5, 9), (1, 1, 1), (5, 300, 49), (65, 65, 70), (197, 700, 9), (30, 0, 9), (9, 9, 0)]
        {
            let case = Case::new([2, 4, 2, q_len, kv_len, 12, 20], n, 1);
            worst = worst.max(held(&given, case.plain()));
            worst = worst.max(held(&given, biased(case.plain(), &case.biases())));
        }
        for (height, width, p) in [(1, 1, 1), (7, 10, 3), (5, 3, 7), (1, 90, 4)] {
            let case = Case::new([2, 4, 2, height * width, height * width, 12, 20], p * p, 2);
            let pooled = AgentInput::pooled(case.0.qkv());
            for isa in Isa::available() {
                let pool = Agent::builder().isa(isa).scale(0.7).pool(height, width, p);
                for agent in [pool.clone(), convolving(pool, height, width, 80)].map(|of| of.build().unwrap())
                {
                    worst = worst.max(held(&agent, pooled));
                    worst = worst.max(held(&agent, biased(pooled, &case.biases())));
                }
            }
            // Half types are widened, and rounded once.
            let [q, k, v] = [&case.0.q, &case.0.k, &case.0.v].map(|x| x.mapv(f16::from_f32));
            let agent =
                convolving(Agent::builder().pool(height, width, p), height, width, 80).build().unwrap();
            held(&agent, AgentInput::pooled(Qkv::new(q.view(), k.view(), v.view())));
        }
        println!("agent: {worst:.3} of the bound");
    }

    #[test]
    fn it_is_two_softmax_attentions() {
        let (case, agent) = (Case::new([2, 4, 2, 33, 50, 12, 20], 9, 5), Agent::builder().build().unwrap());
        let biases = case.biases();
        let read = Qkv { q: case.1.view(), ..case.0.qkv() };
        let give = Qkv::new(case.0.q.view(), case.1.view(), case.1.view());
        let weights = |bias: &Bias<'_>, x: Qkv<'_, f32>| {
            Dense::builder().score(bias).build().unwrap().reference_weights(x.reborrow()).unwrap()
        };
        let (first, second) = (weights(&biases[0], read), weights(&biases[1], give));
        let got = agent.reference(biased(case.plain(), &biases)).unwrap();
        let want = Array4::from_shape_fn(got.dim(), |(b, h, i, c)| {
            let value = |j| f64::from(case.0.v[[b, h / 2, j, c]]);
            let read = |a: usize| (0..50).map(|j| first[[b, h, a, j]] * value(j)).sum::<f64>();
            (0..9).map(|a| second[[b, h, i, a]] * read(a)).sum()
        });
        close(&got, &want, 1e-13);
        // An agent for each query, which it alone reads, is softmax attention.
        let mut case = Case::new([2, 4, 2, 30, 45, 12, 20], 30, 8);
        case.1 = case.0.q.clone();
        let own = |(_, _, i, a)| if i == a { 0.0 } else { f32::NEG_INFINITY };
        let own = Array4::from_shape_fn((1, 1, 30, 30), own);
        let bias = Bias::new(own.view());
        let x = AgentInput { query_bias: Some(&bias), ..case.plain() };
        let dense = Dense::builder().build().unwrap().reference(case.0.qkv()).unwrap();
        close(&agent.reference(x).unwrap(), &dense, 1e-13);
    }

    /// Errors of pooled agents count: where queries cancel, these are small.
    #[test]
    fn errors_of_pooled_agents_count() {
        let mut case = Case::new([1, 2, 2, 128, 128, 16, 20], 4, 14);
        for ((.., t, _), q) in case.0.q.indexed_iter_mut() {
            *q = (*q + 3e4) * if t % 8 < 4 { 1.0 } else { -1.0 };
        }
        let pooled = Agent::builder().pool(8, 16, 2).scale(1e-5).build().unwrap();
        println!("cancelling: {:.4} of the bound", held(&pooled, AgentInput::pooled(case.0.qkv())));
    }

    #[test]
    fn what_is_not_seen_does_not_matter() {
        // Lengths of their own: as with just those keys, whatever follows.
        let (mut case, agent) =
            (Case::new([2, 4, 2, 30, 45, 12, 20], 9, 12), Agent::builder().build().unwrap());
        let short = case.0.slice(0..30, 0..17);
        case.0.k.slice_mut(s![.., .., 17.., ..]).fill(f32::NAN);
        case.0.v.slice_mut(s![.., .., 17.., ..]).fill(f32::INFINITY);
        let x = AgentInput::new(case.0.qkv().key_lengths(&[17, 0]), case.1.view());
        held(&agent, x);
        let got = agent.reference(x).unwrap();
        let want = agent.reference(AgentInput { qkv: short.qkv(), ..x }).unwrap();
        assert!(
            got.indexed_iter()
                .all(|((b, h, i, c), &got)| got == if b == 0 { want[[0, h, i, c]] } else { 0.0 })
        );
        let flops = [x, AgentInput { qkv: short.qkv(), ..x }].map(|x| agent.cost(x).unwrap().flops);
        assert_eq!(flops, [1, 2].map(|batch| 2 * 4 * 9 * (2 * 30 + batch * 17) * 32));
        // A NaN shows in its head; beyond a grid nothing is read.
        let mut spoilt = Case::new([2, 4, 2, 24, 24, 12, 20], 9, 13);
        spoilt.0.v.slice_mut(s![.., 1, 0, ..]).fill(f32::NAN);
        let mut hidden = Array4::zeros((1, 1, 1, 24));
        for (ours, agent) in [(false, agent), (true, convolving(Agent::builder(), 4, 6, 80).build().unwrap())]
        {
            hidden[[0, 0, 0, 0]] = if ours { f32::NEG_INFINITY } else { 0.0 };
            let bias = Bias::new(hidden.view());
            let x = AgentInput { agent_bias: Some(&bias), ..spoilt.plain() };
            for ((_, h, t, _), out) in agent.forward(x).unwrap().indexed_iter() {
                assert_eq!(out.is_nan(), h >= 2 && (!ours || (t / 6 < 2 && t % 6 < 2)), "token {t}");
            }
        }
    }

    #[test]
    fn refusals() {
        let (case, given) = (Case::new([2, 4, 2, 30, 30, 12, 20], 9, 16), Agent::builder());
        let pooled = AgentInput::pooled(case.0.qkv());
        let refused = |agent: AgentBuilder, x: AgentInput<'_, f32>, start: &str| {
            let mut out = Array4::from_elem((2, 4, 30, 20), 7f32);
            let agent = agent.build().unwrap();
            let error = agent.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap_err().to_string();
            assert!(error.starts_with(start) && out.iter().all(|&x| x == 7.0), "{error}");
        };
        refused(given.clone(), pooled, "agents: expected an array [batch, heads, n, head_dim], since none");
        refused(given.clone().pool(5, 6, 3), case.plain(), "agents cannot be combined with pool");
        refused(
            given.clone().pool(5, 7, 3),
            pooled,
            "q: expected shape [batch, heads, len, dim] with len = 5 x 7",
        );
        for dim in [(1, 4, 9, 12), (2, 3, 9, 12), (2, 4, 9, 11), (2, 0, 9, 12)] {
            let agents = Array4::zeros(dim);
            let x = AgentInput::new(case.0.qkv(), agents.view());
            refused(
                given.clone(),
                x,
                "agents: expected shape [batch, heads, n, head_dim] = [2, 4 or a divisor, _, 12]",
            );
        }
        held(
            &given.clone().build().unwrap(),
            AgentInput::new(case.0.qkv(), case.1.slice(s![.., ..2, .., ..])),
        );
        let [first, second] = case.biases();
        let x = AgentInput { agent_bias: Some(&second), ..case.plain() };
        refused(
            given.clone(),
            x,
            "agent_bias: expected shape [batch, heads, n, kv_len] = [2, 4, 9, 30] or 1",
        );
        let x = AgentInput { query_bias: Some(&first), ..case.plain() };
        refused(given.clone(), x, "query_bias: expected shape [batch, heads, q_len, n] = [2, 4, 30, 9] or 1");
        let one = Case::new([1, 4, 2, 30, 30, 12, 20], 9, 16);
        let x = AgentInput { qkv: one.0.qkv().packed(&[0, 30], &[0, 30]), ..one.plain() };
        refused(given.clone(), x, "a packed batch cannot be combined with agents");
        let convolve = || convolving(Agent::builder(), 5, 6, 80);
        for (sizes, start) in [
            (
                [2, 4, 2, 31, 30, 12, 20],
                "q: expected shape [batch, heads, len, dim] with len = 5 x 6, the grid of",
            ),
            (
                [2, 4, 2, 30, 31, 12, 20],
                "v: expected shape [batch, heads, len, dim] with len = 5 x 6, the grid of",
            ),
            ([2, 4, 2, 30, 30, 12, 10], "weights: expected shape [heads * value_dim, 3, 3] = [4 * 10, 3, 3]"),
        ] {
            refused(convolve(), Case::new(sizes, 9, 1).plain(), start);
        }
        let lengths = AgentInput { qkv: case.0.qkv().key_lengths(&[30, 30]), ..case.plain() };
        refused(convolve(), lengths, "key_lengths cannot be combined with a convolution");

        let build = |builder: AgentBuilder| builder.build().unwrap_err().to_string();
        for (height, width, p) in [(0, 6, 3), (5, 0, 3), (5, 6, 0), (5, 6, 1025)] {
            let got = format!("1 to 1024 agents a side, got {height} x {width} and {p}");
            assert!(build(given.clone().pool(height, width, p)).ends_with(&got));
        }
        let of = |grid: [usize; 2], weights: [usize; 3], bias| {
            Agent::builder().convolution(grid[0], grid[1], Array3::zeros(weights), Array1::zeros(bias))
        };
        for (builder, start) in [
            (of([0, 6], [8, 3, 3], 8), "convolution: expected a grid of at least 1 x 1, got 0 x 6"),
            (of([5, 6], [8, 3, 5], 8), "weights: expected shape [heads * value_dim, 3, 3], got [8, 3, 5]"),
            (
                of([5, 6], [8, 3, 3], 7),
                "bias: expected shape [heads * value_dim] = [8] as the weights have it",
            ),
            (
                of([6, 5], [8, 3, 3], 8).pool(5, 6, 3),
                "convolution: expected the grid that is pooled, 5 x 6, got 6 x 5",
            ),
            (
                given.clone().convolution(
                    5,
                    6,
                    Array3::from_elem((1, 3, 3), f32::INFINITY),
                    Array1::zeros(1),
                ),
                "weights: expected finite",
            ),
            (
                given.clone().convolution(5, 6, Array3::zeros((1, 3, 3)), Array1::from_elem(1, f32::NAN)),
                "bias: expected finite",
            ),
            (given.clone().scale(f32::NAN), "scale: expected a finite number, got NaN"),
        ] {
            let error = build(builder);
            assert!(error.starts_with(start), "{error}");
        }
    }
}
