
use super::*;
use crate::simd::Isa;
use ndarray::s;
use crate::dense::Dense;
use crate::engine::parallel::on_threads;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, held};
use crate::{Attention, Bounded, Weights, Workspace, score};
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
        let means = pooled.pool.unwrap().define::<f64>(&case.x.q.slice(s![0, h, .., ..]).mapv(f64::from));
        case.agents.slice_mut(s![0, h, .., ..]).assign(&means.mapv(|x| x as f32));
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
        "q: expected shape [batch, heads, len, dim] with len = 5 x 7, the grid, got [2, 4, 30, 12]"
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
