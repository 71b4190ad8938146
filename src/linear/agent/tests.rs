//! Tests of [`Agent`].

use super::*;
use crate::dense::Dense;
use crate::engine::parallel::on_threads;
use crate::simd::Isa;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, error, held, refused};
use crate::{Attention, Bounded, Weights, Workspace};
use half::{bf16, f16};
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
    for (q_len, kv_len, heads) in [
        (0, 5, [4, 4]),
        (1, 1, [4, 2]),
        (5, 300, [3, 1]),
        (63, 64, [4, 2]),
        (65, 65, [4, 4]),
        (130, 70, [3, 1]),
        (197, 1100, [4, 2]),
        (30, 0, [4, 2]),
    ] {
        for n in [0, 1, 9, 49, 70] {
            let case = Case::new([2, heads[0], heads[1], q_len, kv_len, 12, 20], n, 1);
            for x in [case.plain(), biased(case.plain(), &case.biases())] {
                worst = worst.max(held(&given, x));
                if kv_len == 0 {
                    assert!(given.forward(x).unwrap().iter().all(|&x| x == 0.0));
                }
            }
        }
    }
    for (height, width, p) in [(1, 1, 1), (6, 6, 3), (7, 10, 3), (5, 3, 7), (14, 14, 7), (1, 90, 4)] {
        let case = Case::new([2, 4, 2, height * width, height * width, 12, 20], p * p, 2);
        let pooled = AgentInput::pooled(case.0.qkv());
        for isa in Isa::available() {
            let pool = Agent::builder().isa(isa).scale(0.7).pool(height, width, p);
            for agent in [pool.clone(), convolving(pool, height, width, 80)].map(|of| of.build().unwrap()) {
                worst = worst.max(held(&agent, pooled));
                worst = worst.max(held(&agent, biased(pooled, &case.biases())));
            }
            let agent = convolving(Agent::builder().isa(isa), height, width, 80).build().unwrap();
            worst = worst.max(held(&agent, case.plain()));
        }
    }
    println!("agent: {worst:.3} of the bound");
}

#[test]
fn half_types_are_widened_and_rounded_once() {
    fn check<T: Element>(case: &Case) -> f64 {
        let [q, k, v] = [&case.0.q, &case.0.k, &case.0.v].map(|x| x.mapv(T::from_f32));
        let (qkv, agents) = (Qkv::new(q.view(), k.view(), v.view()), case.1.mapv(T::from_f32));
        let given = Agent::builder().build().unwrap();
        let all = convolving(Agent::builder().pool(7, 10, 3), 7, 10, 80).build().unwrap();
        let worst = held(&given, biased(AgentInput::new(qkv, agents.view()), &case.biases()));
        worst.max(held(&all, AgentInput::pooled(qkv)))
    }
    let case = Case::new([2, 4, 2, 70, 70, 12, 20], 9, 4);
    println!("f16: {:.3}, bf16: {:.3} of the bound", check::<f16>(&case), check::<bf16>(&case));
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
        held(&Agent::builder().build().unwrap(), biased(case.plain(), &case.biases()));
        let all = convolving(Agent::builder().pool(5, 6, 3), 5, 6, sizes[1] * sizes[6]);
        held(&all.build().unwrap(), AgentInput::pooled(case.0.qkv()));
    }
}

#[test]
fn memory_and_threads() {
    let case = Case::new([2, 4, 2, 70, 70, 12, 20], 9, 15);
    let biases = case.biases();
    let all = convolving(Agent::builder().pool(7, 10, 3), 7, 10, 80).build().unwrap();
    let x = biased(AgentInput::pooled(case.0.qkv()), &biases);
    let run = |workspace: &mut Workspace| {
        let mut out = Array4::zeros((2, 4, 70, 20));
        all.forward_into(x, out.view_mut(), workspace).unwrap();
        out
    };
    let [one, three] = [1, 3].map(|threads| {
        on_threads(threads, || {
            let mut workspace = Workspace::with_capacity(all.workspace_bytes(x).unwrap());
            let before = workspace.capacity();
            let out = run(&mut workspace);
            assert_eq!(workspace.capacity(), before);
            // Whatever is in it.
            let mut dirty = Workspace::new();
            let nan = Array4::from_elem((2, 4, 90, 30), f32::NAN);
            let poison = Qkv::new(nan.view(), nan.view(), nan.view());
            let dense = Dense::builder().build().unwrap();
            dense.forward_into(poison, nan.clone().view_mut(), &mut dirty).unwrap();
            assert_eq!(out, run(&mut dirty));
            out
        })
    });
    assert_eq!(one, three);
}

#[test]
fn it_is_two_softmax_attentions() {
    let (case, agent) = (Case::new([2, 4, 2, 33, 50, 12, 20], 9, 5), Agent::builder().build().unwrap());
    let biases = case.biases();
    let read = Qkv { q: case.1.view(), ..case.0.qkv() };
    let give = Qkv::new(case.0.q.view(), case.1.view(), case.1.view());
    // Without biases is with biases of 0.
    let zeros = [(9, 50), (33, 9)].map(|(q_len, kv_len)| Array4::zeros((1, 1, q_len, kv_len)));
    let none = zeros.each_ref().map(|bias| Bias::new(bias.view()));
    let weights = |bias: &Bias<'_>, x: Qkv<'_, f32>| {
        Dense::builder().score(bias).build().unwrap().reference_weights(x.reborrow()).unwrap()
    };
    for (x, [first, second]) in [(biased(case.plain(), &biases), &biases), (case.plain(), &none)] {
        let (first, second) = (weights(first, read), weights(second, give));
        let got = agent.reference(x).unwrap();
        let want = Array4::from_shape_fn(got.dim(), |(b, h, i, c)| {
            let value = |j| f64::from(case.0.v[[b, h / 2, j, c]]);
            let read = |a: usize| (0..50).map(|j| first[[b, h, a, j]] * value(j)).sum::<f64>();
            (0..9).map(|a| second[[b, h, i, a]] * read(a)).sum()
        });
        close(&got, &want, 1e-13);
    }
    // An agent for each query, which it alone reads, is softmax attention.
    let mut case = Case::new([2, 4, 2, 30, 45, 12, 20], 30, 8);
    case.1 = case.0.q.clone();
    let own = |(_, _, i, a)| if i == a { 0.0 } else { f32::NEG_INFINITY };
    let own = Array4::from_shape_fn((1, 1, 30, 30), own);
    let bias = Bias::new(own.view());
    let x = AgentInput { query_bias: Some(&bias), ..case.plain() };
    let dense = Dense::builder().build().unwrap().reference(case.0.qkv()).unwrap();
    close(&agent.reference(x).unwrap(), &dense, 1e-13);
    held(&agent, x);
}

#[test]
fn pools_and_convolutions_are_what_they_say() {
    let (height, width, p, dim) = (5, 7, 3, 5);
    let mut case = Case::new([1, 4, 2, 35, 35, 12, dim], p * p, 9);
    // Means over what has a part of a cell.
    let within = |row: usize, y: usize, len: usize| row * len < (y + 1) * p && y * p < (row + 1) * len;
    case.1 = Array4::from_shape_fn(case.1.dim(), |(b, h, a, c)| {
        let of_cell = |t: &usize| within(a / p, t / width, height) && within(a % p, t % width, width);
        let cell: Vec<f64> = (0..35).filter(of_cell).map(|t| f64::from(case.0.q[[b, h, t, c]])).collect();
        (cell.iter().sum::<f64>() / cell.len() as f64) as f32
    });
    let of = |builder: AgentBuilder| builder.build().unwrap();
    let pooled =
        of(Agent::builder().pool(height, width, p)).reference(AgentInput::pooled(case.0.qkv())).unwrap();
    let given = of(Agent::builder()).reference(case.plain()).unwrap();
    close(&pooled, &given, 1e-6);
    // Each value is sent to where it counts.
    let (weights, bias) = (array(70, (4 * dim, 3, 3)), array(71, 4 * dim));
    let mut want = given;
    want.indexed_iter_mut().for_each(|((_, h, _, c), out)| *out += f64::from(bias[h * dim + c]));
    for (h, y, x, c, row, column) in ndarray::indices((4, height, width, dim, 3, 3)) {
        let (to_y, to_x) = ((y + 1).wrapping_sub(row), (x + 1).wrapping_sub(column));
        if to_y < height && to_x < width {
            let value = f64::from(case.0.v[[0, h / 2, y * width + x, c]]);
            want[[0, h, to_y * width + to_x, c]] += f64::from(weights[[h * dim + c, row, column]]) * value;
        }
    }
    let convolved = of(convolving(Agent::builder(), height, width, 4 * dim));
    close(&convolved.reference(case.plain()).unwrap(), &want, 1e-13);
}

/// Errors of pooled agents count: where queries cancel, these are small.
#[test]
fn errors_of_pooled_agents_count() {
    let mut case = Case::new([1, 2, 2, 128, 128, 16, 20], 4, 14);
    for ((.., t, _), q) in case.0.q.indexed_iter_mut() {
        *q = (*q + 3e4) * if t % 8 < 4 { 1.0 } else { -1.0 };
    }
    // Agents that see different keys have different values.
    case.2[0] = Array4::from_shape_fn((1, 1, 4, 128), |(.., a, j)| -20.0 * f32::from(j % 4 != a));
    let bias = Bias::new(case.2[0].view());
    let pool = Pool { height: 8, width: 16, side: 2 };
    for h in 0..2 {
        let means = pool.define::<f64>(&case.0.q.slice(s![0, h, .., ..]).mapv(f64::from));
        case.1.slice_mut(s![0, h, .., ..]).assign(&means.mapv(|x| x as f32));
    }
    let [pooled, given] =
        [Agent::builder().pool(8, 16, 2), Agent::builder()].map(|of| of.scale(1e-5).build().unwrap());
    let x = AgentInput { agent_bias: Some(&bias), ..AgentInput::pooled(case.0.qkv()) };
    let exact = AgentInput { agents: Some(case.1.view()), ..x };
    let (share, less) = (held(&pooled, x), given.error_bound(exact).unwrap());
    let (got, want) = (pooled.forward(x).unwrap(), pooled.reference(x).unwrap());
    let off = got
        .indexed_iter()
        .zip(&want)
        .map(|(((b, h, t, _), &got), want)| (f64::from(got) - want).abs() / less[[b, h, t]]);
    let most = off.fold(0f64, f64::max);
    println!("cancelling: {share:.4} of the bound, {most:.2} of that for exact agents");
    let bound = pooled.error_bound(x).unwrap();
    assert!(bound.iter().zip(&less).all(|(bound, less)| bound > &(2.0 * less)));
}

#[test]
fn what_is_not_seen_does_not_matter() {
    // Lengths of their own: as with just those keys, whatever follows.
    let (mut case, agent) = (Case::new([2, 4, 2, 30, 45, 12, 20], 9, 12), Agent::builder().build().unwrap());
    let short = case.0.slice(0..30, 0..17);
    case.0.k.slice_mut(s![.., .., 17.., ..]).fill(f32::NAN);
    case.0.v.slice_mut(s![.., .., 17.., ..]).fill(f32::INFINITY);
    let biases = case.biases();
    let x = AgentInput::new(case.0.qkv().key_lengths(&[17, 0]), case.1.view());
    let x = biased(x, &biases);
    held(&agent, x);
    let bias = Bias::new(case.2[0].slice(s![.., .., .., ..17]));
    let shorter = AgentInput { qkv: short.qkv(), agent_bias: Some(&bias), ..x };
    let (got, want) = (agent.reference(x).unwrap(), agent.reference(shorter).unwrap());
    let of_short = |((b, h, i, c), &got): ((usize, usize, usize, usize), &f64)| {
        got == if b == 0 { want[[0, h, i, c]] } else { 0.0 }
    };
    assert!(got.indexed_iter().all(of_short));
    let flops = [x, shorter].map(|x| agent.cost(x).unwrap().flops);
    assert_eq!(flops, [1, 2].map(|batch| 2 * 4 * 9 * (2 * 30 + batch * 17) * 32));
    let mut key = case.0.slice(0..30, 0..17);
    key.k[[1, 1, 16, 3]] = f32::NAN;
    for ((b, h, ..), out) in agent.forward(AgentInput { qkv: key.qkv(), ..shorter }).unwrap().indexed_iter() {
        assert_eq!(out.is_nan(), b == 1 && h >= 2);
    }
    // A NaN shows in its head; beyond a grid nothing is read.
    let mut spoilt = Case::new([2, 4, 2, 24, 24, 12, 20], 9, 13);
    spoilt.0.v.slice_mut(s![.., 1, 0, ..]).fill(f32::NAN);
    let mut hidden = Array4::zeros((1, 1, 1, 24));
    for (ours, agent) in [(false, agent), (true, convolving(Agent::builder(), 4, 6, 80).build().unwrap())] {
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
    let (pooled, plain) = (AgentInput::pooled(case.0.qkv()), case.plain());
    let check = |agent: AgentBuilder, x: AgentInput<'_, f32>, want: &str| {
        assert_eq!(refused(&agent.build().unwrap(), x), want);
    };
    let want = "agents: expected an array [batch, heads, n, head_dim], since none are pooled, got none";
    check(given.clone(), pooled, want);
    let want = "agents cannot be combined with pool: agents are given or made of the queries, not both";
    check(given.clone().pool(5, 6, 3), plain, want);
    let grid = "expected shape [batch, heads, len, dim] with len = 5 x";
    let want = format!("q: {grid} 7, the grid, got [2, 4, 30, 12]");
    check(given.clone().pool(5, 7, 3), pooled, &want);
    for dim in [(1, 4, 9, 12), (2, 3, 9, 12), (2, 4, 9, 11), (2, 0, 9, 12)] {
        let agents = Array4::zeros(dim);
        let sizes = "[batch, heads, n, head_dim] = [2, 4 or a divisor, _, 12]";
        let want = format!("agents: expected shape {sizes}, got {:?}", agents.shape());
        check(given.clone(), AgentInput::new(case.0.qkv(), agents.view()), &want);
    }
    held(&given.clone().build().unwrap(), AgentInput::new(case.0.qkv(), case.1.slice(s![.., ..2, .., ..])));
    let [first, second] = case.biases();
    for (x, want) in [
        (
            AgentInput { agent_bias: Some(&second), ..plain },
            "agent_bias: expected shape [batch, heads, n, kv_len] = [2, 4, 9, 30] or 1 in place of any of them, got [1, 4, 30, 9]",
        ),
        (
            AgentInput { query_bias: Some(&first), ..plain },
            "query_bias: expected shape [batch, heads, q_len, n] = [2, 4, 30, 9] or 1 in place of any of them, got [1, 4, 9, 30]",
        ),
    ] {
        check(given.clone(), x, want);
    }
    let one = Case::new([1, 4, 2, 30, 30, 12, 20], 9, 16);
    let x = AgentInput { qkv: one.0.qkv().packed(&[0, 10, 30], &[0, 10, 30]), ..one.plain() };
    let reason = "agents belong to an entry of the batch and would mix its sequences";
    check(given.clone(), x, &format!("a packed batch cannot be combined with agents: {reason}"));
    let mut out = Array4::from_elem((2, 4, 30, 19), 7f32);
    assert_eq!(
        error(given.clone().build().unwrap().forward_into(plain, out.view_mut(), &mut Workspace::new())),
        "out: expected shape [batch, heads, len, value_dim] = [2, 4, 30, 20], got [2, 4, 30, 19]"
    );
    assert!(out.iter().all(|&x| x == 7.0));
    let convolve = || convolving(Agent::builder(), 5, 6, 80);
    for (sizes, want) in [
        ([2, 4, 2, 31, 30, 12, 20], format!("q: {grid} 6, the grid of the convolution, got [2, 4, 31, 12]")),
        ([2, 4, 2, 30, 31, 12, 20], format!("v: {grid} 6, the grid of the convolution, got [2, 2, 31, 20]")),
        (
            [2, 4, 2, 30, 30, 12, 10],
            "weights: expected shape [heads * value_dim, 3, 3] = [4 * 10, 3, 3], got [80, 3, 3]".to_owned(),
        ),
    ] {
        check(convolve(), Case::new(sizes, 9, 1).plain(), &want);
    }
    let x = AgentInput { qkv: case.0.qkv().key_lengths(&[30, 30]), ..plain };
    let want = "key_lengths cannot be combined with a convolution: the grid has a value for each token";
    check(convolve(), x, want);
}

#[test]
fn options_are_checked() {
    for (height, width, p) in [(0, 6, 3), (5, 0, 3), (5, 6, 0), (5, 6, 1025)] {
        let want = "pool: expected a grid of at least 1 x 1 and 1 to 1024 agents a side";
        let got = format!("{want}, got {height} x {width} and {p}");
        assert_eq!(error(Agent::builder().pool(height, width, p).build()), got);
    }
    let of = |grid: [usize; 2], weights: Array3<f32>, bias: Array1<f32>| {
        Agent::builder().convolution(grid[0], grid[1], weights, bias)
    };
    let (weights, bias) = (Array3::zeros((8, 3, 3)), Array1::zeros(8));
    let of_bias = "bias: expected shape [heads * value_dim] = [8] as the weights have it, got [7]";
    for (builder, want) in [
        (
            of([0, 6], weights.clone(), bias.clone()),
            "convolution: expected a grid of at least 1 x 1, got 0 x 6",
        ),
        (
            of([5, 6], Array3::zeros((8, 3, 5)), bias.clone()),
            "weights: expected shape [heads * value_dim, 3, 3], got [8, 3, 5]",
        ),
        (of([5, 6], weights.clone(), Array1::zeros(7)), of_bias),
        (
            of([6, 5], weights.clone(), bias.clone()).pool(5, 6, 3),
            "convolution: expected the grid that is pooled, 5 x 6, got 6 x 5",
        ),
        (of([5, 6], &weights + f32::INFINITY, bias.clone()), "weights: expected finite numbers, got inf"),
        (of([5, 6], weights, bias * f32::NAN), "bias: expected finite numbers, got NaN"),
        (Agent::builder().scale(f32::NAN), "scale: expected a finite number, got NaN"),
    ] {
        assert_eq!(error(builder.build()), want);
    }
}
