//! Flow-Attention: linear attention in which what flows out of each key and
//! into each query is conserved.
//!
//! With `phi` the logistic function and `e` = `epsilon`, added to every
//! element:
//!
//! ```text
//! I_i  = (phi(q_i) + e) . (sum_j phi(k_j) + e)          what flows into a query
//! O_j  = (phi(k_j) + e) . (sum_i phi(q_i) + e)          and out of a key
//! I'_i = (phi(q_i) + e) . (sum_j phi(k_j) / O_j + e)    with the other side conserved
//! O'_j = (phi(k_j) + e) . (sum_i phi(q_i) / I_i + e)    kept within -1 and 1
//! c_j  = kv_len softmax_j(O'_j)                         keys compete
//! o_i  = sigmoid(I'_i q_len / kv_len) (phi(q_i) / I_i)^T sum_j phi(k_j) c_j v_j^T
//! ```
//!
//! "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv
//! 2202.06258). Causal, sums go up to a token, `n` of them, and
//!
//! ```text
//! I'_i = (phi(q_i) + e) . (sum_{j <= i} phi(k_j) n_j / O_j + e) / n_i
//! O'_j = (phi(k_j) + e) . (sum_{i <= j} phi(q_i) n_i / I_i + e) / n_j
//! c_j  = n_j exp(O'_j) / sum_{t <= j} exp(O'_t)
//! o_i  = sigmoid(I'_i) (phi(q_i) / I_i)^T sum_{j <= i} phi(k_j) c_j v_j^T
//! ```
//!
//! so that a token depends on earlier ones alone: four more sums go along with
//! the state. (The last token of the causal form is not what the other form
//! gives.)
//!
//! Cost: about `16 head_dim + 4 head_dim value_dim` flops a token and head,
//! `32 (head_dim + value_dim)` more where it is causal. The flows of a head
//! are worked out by one thread. Weights vary little, as those of all linear
//! attention without decay do.

use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut4, s};

use crate::attention::{Attention, Bounded, Cost, Input, Recurrent};
use crate::card::{carded, exhibit};
use crate::definition::recurrence::{Reference, Token, define};
use crate::element::Element;
use crate::engine::recur::{Keys, Place, Source, Spec};
use crate::engine::workspace::Workspace;
use crate::engine::{parallel, recur};
use crate::error::{Error, Result};
use crate::input::tokens::heads;
use crate::input::{Qkv, Sequence, filled};
use crate::linear::State;
use crate::math::features::Sigmoid;
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::mapped::{Mapped, MappedArrays, check_epsilon};
use crate::stages::recur::check_out;
use crate::stages::recur::{Config, Options, linear_options};

/// Flow-Attention.
///
/// Unless it is [causal](FlowformerBuilder::causal), every query sees all
/// keys, and no state can be carried from call to call, for all tokens take
/// part in every sum.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Recurrent, linear::Flowformer};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let whole = Qkv::new(x.view(), x.view(), x.view());
/// let out = Flowformer::builder().build()?.forward(whole)?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
///
/// let causal = Flowformer::builder().causal().build()?;
/// let mut state = causal.initial_state(whole)?;
/// let first = x.slice(s![.., .., ..1, ..]);
/// let out = causal.step(Qkv::new(first, first, first), &mut state)?;
/// assert_eq!(out.dim(), (1, 2, 1, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Flowformer {
    config: Config,
    causal: bool,
    epsilon: f32,
}

/// Builds a [`Flowformer`].
#[derive(Clone, Debug)]
pub struct FlowformerBuilder {
    options: Options,
    causal: bool,
    epsilon: f32,
}

impl Flowformer {
    /// Everything visible.
    pub fn builder() -> FlowformerBuilder {
        FlowformerBuilder { options: Options::default(), causal: false, epsilon: 1e-6 }
    }
}

linear_options!(FlowformerBuilder);

impl FlowformerBuilder {
    /// Queries see the keys at their own position and before; queries and
    /// keys are of the same tokens.
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// What is added to every element of features and of their sums. Default:
    /// 1e-6.
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for an epsilon that is negative or not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Flowformer> {
        check_epsilon("epsilon", self.epsilon)?;
        Ok(Flowformer { config: self.options.build()?, causal: self.causal, epsilon: self.epsilon })
    }
}

/// Sums that go along: of the features of keys and of queries, and of both
/// weighed with their flows.
const SUMS: usize = 4;

/// What causal [`Flowformer`] carries from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowformerState {
    /// `sum phi(k_j) c_j v_j^T`
    state: State,
    /// `[sequences, heads, 4, head_dim]`: `sum phi(k)`, `sum phi(q)`, `sum
    /// phi(k) n / O`, `sum phi(q) n / I`, each with epsilon added.
    sums: Array4<f32>,
    /// `[sequences, heads, 2]`: `sum exp O'`, and tokens.
    tallies: Array3<f64>,
}

impl FlowformerState {
    /// `sum phi(k_j) c_j v_j^T`, `[sequences, heads, head_dim, value_dim]`.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sums over the tokens so far, each with epsilon added, `[sequences,
    /// heads, 4, head_dim]`: of the features of keys, of queries, of keys by
    /// what flows out of them, of queries by what flows into them.
    pub fn sums(&self) -> ArrayView4<'_, f32> {
        self.sums.view()
    }
}

/// Rows of features of a chunk, and vectors of as many elements.
const CHUNK: usize = 64;

/// What one thread works out flows in.
struct Room<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    sums: [&'a mut [f32]; SUMS],
    dots: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn bytes(stride: usize) -> usize {
        2 * bytes_for::<f32>(CHUNK * stride) + SUMS * bytes_for::<f32>(stride) + bytes_for::<f32>(CHUNK)
    }

    fn take(mut arena: Arena<'a>, stride: usize) -> Self {
        let mut zeros = |n| {
            let x = arena.take::<f32>(n);
            x.fill(0.0);
            x
        };
        Self {
            q: zeros(CHUNK * stride),
            k: zeros(CHUNK * stride),
            sums: [zeros(stride), zeros(stride), zeros(stride), zeros(stride)],
            dots: zeros(CHUNK),
        }
    }
}

/// `out[t] = (x_t + epsilon) . y` for rows of features, `y` 0 past `dim`.
struct Dots<'a> {
    x: &'a [f32],
    y: &'a [f32],
    epsilon: f32,
    out: &'a mut [f32],
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = self.y.len();
        for (t, out) in self.out.iter_mut().enumerate() {
            let x = &self.x[t * stride..][..stride];
            let mut sum = s.splat(0.0);
            for (x, y) in x.chunks_exact(S::LANES).zip(self.y.chunks_exact(S::LANES)) {
                sum = s.mul_add(s.add(s.load(x), s.splat(self.epsilon)), s.load(y), sum);
            }
            *out = s.reduce_add(sum);
        }
    }
}

/// `sum += factor_t x_t` over rows of features.
struct Collect<'a> {
    x: &'a [f32],
    factors: &'a [f32],
    sum: &'a mut [f32],
}

impl Kernel for Collect<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = self.sum.len();
        for (v, to) in self.sum.chunks_exact_mut(S::LANES).enumerate() {
            // By itself first: sums of chunks are sums of few numbers.
            let mut sum = s.splat(0.0);
            for (t, &factor) in self.factors.iter().enumerate() {
                sum = s.mul_add(s.splat(factor), s.load(&self.x[t * stride + v * S::LANES..]), sum);
            }
            s.store(to, s.add(s.load(to), sum));
        }
    }
}

/// The flows of some tokens, one after the other.
struct Serial<'a, 'b> {
    q: &'a [f32],
    k: &'a [f32],
    sums: &'a mut [&'b mut [f32]; SUMS],
    tally: &'a mut [f64],
    epsilon: f32,
    /// One a token: factors of queries, and of values.
    query: &'a mut [f32],
    value: &'a mut [f32],
}

impl Kernel for Serial<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [keys, queries, out, into] = self.sums;
        let stride = keys.len();
        let epsilon = s.splat(self.epsilon);
        for t in 0..self.query.len() {
            let (q, k) = (&self.q[t * stride..][..stride], &self.k[t * stride..][..stride]);
            self.tally[1] += 1.0;
            let n = self.tally[1] as f32;
            let (mut flow_in, mut flow_out) = (s.splat(0.0), s.splat(0.0));
            for c in (0..stride).step_by(S::LANES) {
                let (q, k) = (s.load(&q[c..]), s.load(&k[c..]));
                let (key_sum, query_sum) = (s.add(s.load(&keys[c..]), k), s.add(s.load(&queries[c..]), q));
                s.store(&mut keys[c..], key_sum);
                s.store(&mut queries[c..], query_sum);
                flow_in = s.mul_add(s.add(q, epsilon), key_sum, flow_in);
                flow_out = s.mul_add(s.add(k, epsilon), query_sum, flow_out);
            }
            let flow_in = s.reduce_add(flow_in);
            let share_out = s.splat(n / s.reduce_add(flow_out));
            let share_in = s.splat(n / flow_in);
            let (mut conserved_in, mut conserved_out) = (s.splat(0.0), s.splat(0.0));
            for c in (0..stride).step_by(S::LANES) {
                let (q, k) = (s.load(&q[c..]), s.load(&k[c..]));
                let out_sum = s.mul_add(k, share_out, s.load(&out[c..]));
                let in_sum = s.mul_add(q, share_in, s.load(&into[c..]));
                s.store(&mut out[c..], out_sum);
                s.store(&mut into[c..], in_sum);
                conserved_in = s.mul_add(s.add(q, epsilon), out_sum, conserved_in);
                conserved_out = s.mul_add(s.add(k, epsilon), in_sum, conserved_out);
            }
            let weight = competition(s.reduce_add(conserved_out) / n);
            self.tally[0] += f64::from(weight);
            self.value[t] = n * weight / self.tally[0] as f32;
            self.query[t] = allocation(s.reduce_add(conserved_in) / n) / flow_in;
        }
    }
}

/// The weight of a key that competes.
fn competition(conserved: f32) -> f32 {
    conserved.clamp(-1.0, 1.0).exp()
}

/// How much of what it takes a query gives on.
fn allocation(conserved: f32) -> f32 {
    1.0 / (1.0 + (-conserved).exp())
}

/// Works out the factors of queries and of values.
struct Flows<'a, 'm> {
    source: MappedArrays<'a, 'm>,
    isa: Isa,
    dim: usize,
    stride: usize,
    epsilon: f32,
}

impl Flows<'_, '_> {
    fn chunks(tokens: &std::ops::Range<usize>) -> impl Iterator<Item = std::ops::Range<usize>> {
        let end = tokens.end;
        tokens.clone().step_by(CHUNK).map(move |first| first..(first + CHUNK).min(end))
    }

    fn dots(&self, x: &[f32], y: &[f32], out: &mut [f32]) {
        self.isa.dispatch(Dots { x, y, epsilon: self.epsilon, out });
    }

    fn collect(&self, x: &[f32], factors: &[f32], sum: &mut [f32]) {
        self.isa.dispatch(Collect { x, factors, sum });
    }

    /// All tokens of a sequence at once.
    fn total(
        &self,
        room: &mut Room<'_>,
        sequence: &Sequence,
        head: usize,
        query: &mut [f32],
        value: &mut [f32],
    ) {
        let Room { q, k, sums: [keys, queries, out, into], dots } = room;
        let (isa, stride) = (self.isa, self.stride);
        for sum in [&mut *keys, &mut *queries, &mut *out, &mut *into] {
            sum.fill(0.0);
            sum[..self.dim].fill(self.epsilon);
        }
        let place = |tokens| Place::new(sequence, head, tokens);
        for tokens in Self::chunks(&sequence.keys) {
            let dots = &mut dots[..tokens.len()];
            dots.fill(1.0);
            self.source.key_features(isa, &place(tokens), k, stride);
            self.collect(k, dots, keys);
        }
        for tokens in Self::chunks(&sequence.queries) {
            let dots = &mut dots[..tokens.len()];
            dots.fill(1.0);
            self.source.queries(isa, &place(tokens), q, stride);
            self.collect(q, dots, queries);
        }
        for tokens in Self::chunks(&sequence.keys) {
            let dots = &mut dots[..tokens.len()];
            self.source.key_features(isa, &place(tokens), k, stride);
            self.dots(k, queries, dots);
            dots.iter_mut().for_each(|x| *x = 1.0 / *x);
            self.collect(k, dots, out);
        }
        let (q_len, kv_len) = (sequence.queries.len() as f32, sequence.keys.len().max(1) as f32);
        for tokens in Self::chunks(&sequence.queries) {
            let flow_in = &mut query[tokens.clone()];
            self.source.queries(isa, &place(tokens.clone()), q, stride);
            self.dots(q, keys, flow_in);
            flow_in.iter_mut().for_each(|x| *x = 1.0 / *x);
            self.collect(q, flow_in, into);
            let dots = &mut dots[..tokens.len()];
            self.dots(q, out, dots);
            for (factor, conserved) in flow_in.iter_mut().zip(dots) {
                *factor *= allocation(*conserved * (q_len / kv_len));
            }
        }
        let mut total = 0f64;
        for tokens in Self::chunks(&sequence.keys) {
            let weights = &mut value[tokens.clone()];
            self.source.key_features(isa, &place(tokens), k, stride);
            self.dots(k, into, weights);
            for weight in weights {
                *weight = competition(*weight);
                total += f64::from(*weight);
            }
        }
        let share = (f64::from(kv_len) / total) as f32;
        value[sequence.keys.clone()].iter_mut().for_each(|weight| *weight *= share);
    }

    /// Token by token, from and to the sums of a state (rows of `dim`).
    fn causal(
        &self,
        room: &mut Room<'_>,
        (sequence, head): (&Sequence, usize),
        kept: Option<(&mut [f32], &mut [f64])>,
        query: &mut [f32],
        value: &mut [f32],
    ) {
        let Room { q, k, sums, .. } = room;
        let (isa, stride, dim) = (self.isa, self.stride, self.dim);
        let mut fresh = [0f64; 2];
        let (mut kept, tally) = match kept {
            Some((kept, tally)) => (Some(kept), tally),
            None => (None, &mut fresh[..]),
        };
        for (i, sum) in sums.iter_mut().enumerate() {
            sum.fill(0.0);
            match &kept {
                Some(kept) => sum[..dim].copy_from_slice(&kept[i * dim..][..dim]),
                None => sum[..dim].fill(self.epsilon),
            }
        }
        for tokens in Self::chunks(&sequence.queries) {
            let at = Place::new(sequence, head, tokens.clone());
            self.source.queries(isa, &at, q, stride);
            self.source.key_features(isa, &at, k, stride);
            isa.dispatch(Serial {
                q,
                k,
                sums,
                tally,
                epsilon: self.epsilon,
                query: &mut query[tokens.clone()],
                value: &mut value[tokens],
            });
        }
        if let Some(kept) = &mut kept {
            for (i, sum) in sums.iter().enumerate() {
                kept[i * dim..][..dim].copy_from_slice(&sum[..dim]);
            }
        }
    }
}

/// Features of queries times their factors, and values times theirs.
struct Weighed<'a, 'm> {
    source: MappedArrays<'a, 'm>,
    /// `[batch, heads, q_len]` and `[batch, heads, kv_len]`.
    query: &'m [f32],
    value: &'m [f32],
    q_len: usize,
    kv_len: usize,
    value_dim: usize,
}

/// Rows times factors.
struct Scale<'a> {
    x: &'a mut [f32],
    stride: usize,
    cols: usize,
    factors: &'a [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (t, &factor) in self.factors.iter().enumerate() {
            for x in self.x[t * self.stride..][..self.cols].chunks_mut(S::LANES) {
                s.store_tail(x, s.mul(s.load_tail(x), s.splat(factor)));
            }
        }
    }
}

impl Weighed<'_, '_> {
    fn row(&self, at: &Place) -> usize {
        at.batch * self.source.arrays.heads + at.head
    }
}

impl Source for Weighed<'_, '_> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.source.queries(isa, at, to, stride);
        let factors = &self.query[self.row(at) * self.q_len..][at.tokens.clone()];
        isa.dispatch(Scale { x: to, stride, cols: self.source.head_dim, factors });
    }

    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>) {
        let Keys { k, v, decay, beta, a, b, stride, value_stride } = to;
        self.source.keys(isa, at, Keys { k, v: &mut *v, decay, beta, a, b, stride, value_stride });
        let factors = &self.value[self.row(at) * self.kv_len..][at.tokens.clone()];
        isa.dispatch(Scale { x: v, stride: value_stride, cols: self.value_dim, factors });
    }
}

/// Rows of a call: batch entries of its arrays, and heads.
fn rows<T>(x: &Qkv<'_, T>) -> usize {
    x.q.dim().0 * heads(x)
}

impl Flowformer {
    fn mapped(&self) -> Mapped<'_> {
        let Self { config, causal, .. } = self;
        Mapped { config, query: &Sigmoid, key: &Sigmoid, causal: *causal, normaliser: None }
    }

    fn spec<'a, T: Element>(&self, x: &'a Qkv<'_, T>) -> Result<Spec<'a>> {
        self.mapped().spec(x)
    }

    /// Bytes of the factors and of what keeps count, then of the rest.
    fn bytes<T: Element>(&self, x: &Qkv<'_, T>, spec: &Spec<'_>) -> usize {
        let rows = rows(x);
        let stride = spec.dims.head_dim.next_multiple_of(MAX_LANES);
        let flows = bytes_for_shares(parallel::threads(), Room::bytes(stride));
        bytes_for::<f32>(rows * spec.dims.q_len)
            + bytes_for::<f32>(rows * spec.dims.kv_len)
            + 2 * bytes_for::<u64>(claim_words(rows))
            + 2 * bytes_for::<u64>(claim_words(spec.dims.batch * spec.dims.q_heads))
            + flows.max(recur::workspace_bytes(spec))
    }

    fn run<T: Element>(
        &self,
        x: &Qkv<'_, T>,
        state: Option<&mut FlowformerState>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let spec = self.spec(x)?;
        let (dims, rows, heads) = (spec.dims, rows(x), heads(x));
        let stride = dims.head_dim.next_multiple_of(MAX_LANES);
        let mut arena = workspace.arena(self.bytes(x, &spec))?;
        let query = arena.take::<f32>(rows * dims.q_len);
        let value = arena.take::<f32>(rows * dims.kv_len);
        let [query_claims, value_claims] = [arena.take(claim_words(rows)), arena.take(claim_words(rows))];
        let units = dims.batch * dims.q_heads;
        let [sum_claims, tally_claims] = [arena.take(claim_words(units)), arena.take(claim_words(units))];
        let (state, kept) = match state {
            Some(FlowformerState { state, sums, tallies }) => {
                let sums = sums.as_slice_mut().unwrap_or_default();
                let tallies = tallies.as_slice_mut().unwrap_or_default();
                let sums = Parts::new(sums, SUMS * dims.head_dim, sum_claims);
                (Some(state.as_mut_slice()), Some((sums, Parts::new(tallies, 2, tally_claims))))
            }
            None => (None, None),
        };
        {
            let (isa, epsilon) = (spec.isa, self.epsilon);
            let flows = Flows { source: self.mapped().source(x), isa, dim: dims.head_dim, stride, epsilon };
            let query = Parts::new(&mut *query, dims.q_len, query_claims);
            let value = Parts::new(&mut *value, dims.kv_len, value_claims);
            let workers = parallel::threads();
            let mut arena = arena.reborrow();
            let shares = arena.shares(workers, Room::bytes(stride));
            let start = |worker| Room::take(shares.take(worker), stride);
            parallel::for_each(workers, rows, start, |room, row| {
                let (batch, head) = (row / heads, row % heads);
                let (query, value) = (query.take(row), value.take(row));
                let sequences = if dims.packed { 0..dims.batch } else { batch..batch + 1 };
                for sequence in sequences.map(|i| spec.lengths.sequence(&dims, i)) {
                    if !self.causal {
                        flows.total(room, &sequence, head, query, value);
                        continue;
                    }
                    let unit = sequence.index * heads + head;
                    let kept = kept.as_ref().map(|(sums, tallies)| (sums.take(unit), tallies.take(unit)));
                    flows.causal(room, (&sequence, head), kept, query, value);
                }
            });
        }
        let source = Weighed {
            source: self.mapped().source(x),
            query,
            value,
            q_len: dims.q_len,
            kv_len: dims.kv_len,
            value_dim: dims.value_dim,
        };
        recur::run_in(&spec, &source, state, out, arena);
        Ok(())
    }

    /// The definition: factors of queries and values first, then the sums.
    fn define<T: Element>(
        &self,
        x: &Qkv<'_, T>,
        state: Option<&FlowformerState>,
    ) -> Result<(Reference, FlowformerState)> {
        let spec = self.spec(x)?;
        let (dims, mapped) = (spec.dims, self.mapped());
        let token = |at: &Place| mapped.token(x, at);
        let mut next = match state {
            Some(state) => state.clone(),
            None => self.empty(&spec)?,
        };
        let (batch, heads) = (x.q.dim().0, heads(x));
        let mut query = Array3::<f64>::zeros((batch, heads, dims.q_len));
        let mut value = Array3::<f64>::zeros((batch, heads, dims.kv_len));
        for sequence in (0..dims.batch).map(|i| spec.lengths.sequence(&dims, i)) {
            for head in 0..heads {
                let q = |t: usize| token(&Place::new(&sequence, head, t..t + 1)).q;
                let k = |t: usize| token(&Place::new(&sequence, head, t..t + 1)).k;
                let mut query = query.slice_mut(s![sequence.batch, head, ..]);
                let mut value = value.slice_mut(s![sequence.batch, head, ..]);
                let at = s![sequence.index, head, .., ..];
                let mut sums = next.sums.slice(at).mapv(f64::from);
                let (e, mut tally) = (f64::from(self.epsilon), [0.0; 2]);
                tally.iter_mut().enumerate().for_each(|(i, x)| *x = next.tallies[[sequence.index, head, i]]);
                // (x + e) . (sum + e), where sums have epsilon already.
                let flow = |x: &[f64], sums: &ndarray::Array2<f64>, which: usize| {
                    x.iter().zip(sums.row(which)).map(|(x, sum)| (x + e) * sum).sum::<f64>()
                };
                let add = |sums: &mut ndarray::Array2<f64>, which: usize, x: &[f64], factor: f64| {
                    sums.row_mut(which).iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
                };
                if self.causal {
                    for t in sequence.queries.clone() {
                        let (q, k) = (q(t), k(t));
                        tally[1] += 1.0;
                        add(&mut sums, 0, &k, 1.0);
                        add(&mut sums, 1, &q, 1.0);
                        let (flow_in, flow_out) = (flow(&q, &sums, 0), flow(&k, &sums, 1));
                        add(&mut sums, 2, &k, tally[1] / flow_out);
                        add(&mut sums, 3, &q, tally[1] / flow_in);
                        let conserved_in = flow(&q, &sums, 2) / tally[1];
                        let conserved_out = flow(&k, &sums, 3) / tally[1];
                        let weight = conserved_out.clamp(-1.0, 1.0).exp();
                        tally[0] += weight;
                        value[t] = tally[1] * weight / tally[0];
                        query[t] = 1.0 / (1.0 + (-conserved_in).exp()) / flow_in;
                    }
                    next.sums.slice_mut(at).assign(&sums.mapv(|x| x as f32));
                    next.tallies.slice_mut(s![sequence.index, head, ..]).assign(&ndarray::aview1(&tally));
                    continue;
                }
                sequence.keys.clone().for_each(|t| add(&mut sums, 0, &k(t), 1.0));
                sequence.queries.clone().for_each(|t| add(&mut sums, 1, &q(t), 1.0));
                for t in sequence.keys.clone() {
                    let flow_out = flow(&k(t), &sums, 1);
                    add(&mut sums, 2, &k(t), 1.0 / flow_out);
                }
                for t in sequence.queries.clone() {
                    let flow_in = flow(&q(t), &sums, 0);
                    add(&mut sums, 3, &q(t), 1.0 / flow_in);
                }
                let (q_len, kv_len) = (sequence.queries.len() as f64, sequence.keys.len().max(1) as f64);
                for t in sequence.queries.clone() {
                    let conserved = flow(&q(t), &sums, 2) * q_len / kv_len;
                    query[t] = 1.0 / (1.0 + (-conserved).exp()) / flow(&q(t), &sums, 0);
                }
                for t in sequence.keys.clone() {
                    value[t] = flow(&k(t), &sums, 3).clamp(-1.0, 1.0).exp();
                }
                let total: f64 = sequence.keys.clone().map(|t| value[t]).sum();
                sequence.keys.clone().for_each(|t| value[t] *= kv_len / total);
            }
        }
        let weighed = |at: &Place| {
            let mut token: Token = token(at);
            let t = at.tokens.start;
            if t < dims.q_len {
                token.q.iter_mut().for_each(|x| *x *= query[[at.batch, at.head, t]]);
            }
            if t < dims.kv_len {
                token.v.iter_mut().for_each(|x| *x *= value[[at.batch, at.head, t]]);
            }
            token
        };
        let before = state.map(|state| state.state.view().to_owned());
        let mut reference = define(&spec, before.as_ref(), weighed)?;
        // Factors are made of four more sums over the tokens.
        reference.bound.mapv_inplace(|bound| 5.0 * bound);
        next.state = State::from_f64(&reference.state);
        Ok((reference, next))
    }

    fn empty(&self, spec: &Spec<'_>) -> Result<FlowformerState> {
        let (sequences, heads, dim, _) = spec.state_shape();
        Ok(FlowformerState {
            state: State::zeros(spec.state_shape())?,
            sums: filled("state", (sequences, heads, SUMS, dim), self.epsilon)?,
            tallies: filled("state", (sequences, heads, 2), 0f64)?,
        })
    }

    fn check_causal(&self) -> Result<()> {
        if self.causal {
            return Ok(());
        }
        let reason = "all tokens take part in the sums of each";
        Err(Error::Conflict { option: "a state", with: "attention that is not causal", reason })
    }
}

impl<T: Element> Attention<Qkv<'_, T>> for Flowformer {
    fn workspace_bytes(&self, x: Qkv<'_, T>) -> Result<usize> {
        Ok(self.bytes(&x, &self.spec(&x)?))
    }

    fn forward_into(
        &self,
        x: Qkv<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.spec(&x)?;
        check_out(&x, &out)?;
        self.run(&x, None, out, workspace)
    }

    fn reference(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x, None)?.0.out)
    }

    fn cost(&self, x: Qkv<'_, T>) -> Result<Cost> {
        let spec = self.spec(&x)?;
        let (batch, heads, len, dim) = x.out_dim()?;
        let tokens = batch * heads * len.max(spec.dims.kv_len);
        let elements = x.q.len() + x.k.len() + x.v.len() + batch * heads * len * dim;
        Ok(Cost {
            flops: (tokens * (spec.flops() + 16 * spec.dims.head_dim)) as u64,
            bytes: (elements * size_of::<T>()) as u64,
        })
    }
}

impl<T: Element> Bounded<Qkv<'_, T>> for Flowformer {
    fn error_bound(&self, x: Qkv<'_, T>) -> Result<Array3<f64>> {
        Ok(self.define(&x, None)?.0.bound)
    }
}

impl<T: Element> Recurrent<Qkv<'_, T>> for Flowformer {
    type State = FlowformerState;

    fn initial_state(&self, x: Qkv<'_, T>) -> Result<FlowformerState> {
        self.check_causal()?;
        self.empty(&self.spec(&x)?)
    }

    fn prefill_into(
        &self,
        x: Qkv<'_, T>,
        state: &mut FlowformerState,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check_causal()?;
        state.state.check(self.spec(&x)?.state_shape())?;
        check_out(&x, &out)?;
        self.run(&x, Some(state), out, workspace)
    }

    fn reference_from(
        &self,
        x: Qkv<'_, T>,
        state: &FlowformerState,
    ) -> Result<(Array4<f64>, FlowformerState)> {
        self.check_causal()?;
        state.state.check(self.spec(&x)?.state_shape())?;
        let (reference, next) = self.define(&x, Some(state))?;
        Ok((reference.out, next))
    }
}

exhibit! {
    FlowformerExhibit of Flowformer, "linear", "Flowformer", "arXiv 2202.06258";
    "keys compete for queries, queries are allotted what flows";
    not "where weights must be sharp: all linear attention without decay weighs keys nearly alike";
    tokens false;
    build(_, _) {
        Flowformer::builder()
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(Flowformer, FlowformerExhibit);

exhibit! {
    CausalFlowformerExhibit of Flowformer, "linear", "causal Flowformer", "arXiv 2202.06258";
    "the same over the keys so far";
    not "where weights must be sharp";
    tokens true;
    build(_, _) {
        Flowformer::builder().causal()
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::Form;
    use crate::testing::LENGTHS;
    use crate::testing::qkv::{Qkvs, close, cuts, held};

    fn flowformer(causal: bool) -> Flowformer {
        let builder = Flowformer::builder();
        if causal { builder.causal() } else { builder }.build().unwrap()
    }

    /// The formulas of the paper over all rows of one head at once, with
    /// cumulative sums as matrices.
    fn literal(x: &Qkvs, h: usize, g: usize, causal: bool) -> ndarray::Array2<f64> {
        use ndarray::{Array1, Array2};
        let e = f64::from(1e-6f32);
        let phi = |x: &Array4<f32>, h: usize| -> Array2<f64> {
            x.slice(s![0, h, .., ..]).mapv(|x| 1.0 / (1.0 + (-f64::from(x)).exp()))
        };
        let (q, k) = (phi(&x.q, h), phi(&x.k, g));
        let v = x.v.slice(s![0, g, .., ..]).mapv(f64::from);
        let (n, m) = (q.dim().0, k.dim().0);
        // sees[[i, j]]: whether j is in the sum of i.
        let sees = |n: usize, m: usize| {
            Array2::from_shape_fn((n, m), |(i, j)| if !causal || j <= i { 1.0 } else { 0.0 })
        };
        let count = |n: usize| Array1::from_shape_fn(n, |i| if causal { (i + 1) as f64 } else { 1.0 });
        let dots = |a: &Array2<f64>, b: &Array2<f64>| ((a + e) * (b + e)).sum_axis(ndarray::Axis(1));
        let by = |a: &Array2<f64>, w: &Array1<f64>| a * &w.view().insert_axis(ndarray::Axis(1));
        let into = count(n) / dots(&q, &sees(n, m).dot(&k));
        let out = count(m) / dots(&k, &sees(m, n).dot(&q));
        let conserved_in = dots(&q, &sees(n, m).dot(&by(&k, &out))) / count(n);
        let conserved_out =
            (dots(&k, &sees(m, n).dot(&by(&q, &into))) / count(m)).mapv(|x| x.clamp(-1.0, 1.0));
        let weight = conserved_out.mapv(f64::exp);
        let totals = sees(m, m).dot(&weight);
        let compete = if causal { count(m) * weight / totals } else { m as f64 * weight / totals };
        let ratio = if causal { 1.0 } else { n as f64 / m as f64 };
        let allocate = conserved_in.mapv(|x| 1.0 / (1.0 + (-x * ratio).exp()));
        // into has count / I.
        let pairs = by(&q, &(into / count(n))).dot(&k.t()) * sees(n, m);
        by(&pairs.dot(&by(&v, &compete)), &allocate)
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for len in LENGTHS {
            let x = Qkvs::new([2, 4, 2, len, len, 20, 24], 1);
            for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                let causal = Flowformer::builder().causal().form(form).build().unwrap();
                worst = worst.max(held(&causal, x.qkv()));
            }
            worst = worst.max(held(&flowformer(false), x.qkv()));
            // Features near 0.
            let low = Qkvs { q: &x.q - 12.0, k: &x.k - 12.0, v: x.v };
            worst = worst.max(held(&flowformer(true), low.qkv()));
            worst = worst.max(held(&flowformer(false), low.qkv()));
        }
        for (q_len, kv_len) in [(5, 130), (130, 5), (7, 0), (0, 7)] {
            let x = Qkvs::new([1, 4, 2, q_len, kv_len, 16, 8], 2);
            worst = worst.max(held(&flowformer(false), x.qkv()));
        }
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 8], 3);
        let offsets = [0, 70, 70, 75, 150];
        for causal in [false, true] {
            worst = worst.max(held(&flowformer(causal), x.qkv().packed(&offsets, &offsets)));
        }
        println!("flowformer: {worst:.3} of the bound");
    }

    #[test]
    fn definition_is_the_formula() {
        for (causal, q_len) in [(true, 60), (false, 60), (false, 23)] {
            let x = Qkvs::new([1, 2, 1, q_len, 60, 8, 5], 4);
            let out = flowformer(causal).reference(x.qkv()).unwrap();
            for h in 0..2 {
                let want = literal(&x, h, 0, causal);
                for ((t, c), want) in want.indexed_iter() {
                    let got = out[[0, h, t, c]];
                    assert!((got - want).abs() < 1e-12, "{causal} token {t}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn order_of_keys_does_not_matter() {
        let mut x = Qkvs::new([1, 1, 1, 30, 50, 8, 5], 5);
        let out = flowformer(false).reference(x.qkv()).unwrap();
        for x in [&mut x.k, &mut x.v] {
            x.invert_axis(ndarray::Axis(2));
        }
        close(&flowformer(false).reference(x.qkv()).unwrap(), &out, 1e-12);
    }

    #[test]
    fn state_carries_over_any_cuts() {
        let x = Qkvs::new([2, 2, 1, 203, 203, 16, 16], 6);
        cuts(&flowformer(true), &x, &[0, 1, 2, 66, 66, 130, 203]);
    }

    #[test]
    fn nan_shows_and_never_reaches_earlier_tokens() {
        for what in 0..3 {
            let mut x = Qkvs::new([1, 1, 1, 100, 100, 8, 8], 7);
            let array = [&mut x.q, &mut x.k, &mut x.v].into_iter().nth(what).unwrap();
            array[[0, 0, 70, 3]] = f32::NAN;
            for form in [Form::Chunked, Form::Recurrent] {
                let flowformer = Flowformer::builder().causal().form(form).build().unwrap();
                for ((_, _, t, c), x) in flowformer.forward(x.qkv()).unwrap().indexed_iter() {
                    let sees = t >= 70 && (what < 2 || c == 3);
                    assert_eq!(x.is_nan(), sees, "array {what}, {form:?}: token {t}, column {c}");
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let x = Qkvs::new([1, 1, 1, 3, 3, 8, 8], 8);
        assert_eq!(
            flowformer(false).initial_state(x.qkv()).unwrap_err().to_string(),
            "a state cannot be combined with attention that is not causal: all tokens take part in the sums of each"
        );
        let error = Flowformer::builder().epsilon(f32::NAN).build().unwrap_err();
        assert_eq!(error.to_string(), "epsilon: expected a finite number of at least 0, got NaN");
        let mut state = flowformer(true).initial_state(x.qkv()).unwrap();
        let wider = Qkvs::new([1, 2, 2, 3, 3, 8, 8], 8);
        assert_eq!(
            flowformer(true).prefill(wider.qkv(), &mut state).unwrap_err().to_string(),
            "state: expected shape [sequences, heads, state_dim, columns] = [1, 2, 8, 8], got [1, 1, 8, 8]"
        );
    }
}
