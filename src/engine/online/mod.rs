//! Memories that learn while they read: weights that a step of gradient descent changes
//! at every token.
//!
//! ```text
//! S_t = eta_t S_{t-1} - theta_t dl(M_r; k_t, v_t)        momentum, if there is one
//! A_t = keep_t A_{t-1} + S_t
//! y_t = M_t(q_t)
//! ```
//!
//! `M` is the memory with weights `A`, or with what a [`Retention`] makes of them; `r` is
//! the last token of the chunk before. So all gradients of a chunk are of the same
//! weights, errors are one matrix product for all of its tokens, and what tokens write
//! are outer products, which queries read as weights of each other:
//!
//! ```text
//! y_i = b_i q_i A + f_i q_i S + sum_{j<=i} G_ij (q_i . k_j) g_j
//! ```
//!
//! with the gradients `-g_j k_j^T`, and `b`, `f` and `G` by recurrences over the chunk
//! that divide by nothing. A layer behind a layer reads likewise. A head of a sequence is
//! one thread's work. Where a token is not finite its piece goes token by token.

mod layer;
mod learn;
mod piece;

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::Form;
use crate::engine::workspace::room;
use crate::error::Result;
use crate::input::{Dim4, Dims, Lengths, filled};
use crate::simd::any::{AnyArray, AnyOut};
use crate::simd::mem::{Ahead, Arena, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, MAX_LANES};

/// Tokens that are taken together at most.
const PIECE: usize = 64;
/// What logarithms of weights are at least.
pub(crate) const LEAST_LOG: f32 = -80.0;
/// What is added to a variance.
pub(crate) const NORM_EPSILON: f64 = 1e-5;
/// What is added to the square of an error before its root.
pub(crate) const POWER_EPSILON: f64 = 1e-6;

/// What a memory is trained to make small, of errors `e = M(k) - v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Loss {
    /// Of the gradient `factor e`; by the mean over channels if `mean`.
    Squared { factor: f32, mean: bool },
    /// `p sign(e) |e|^(p-1)`, or `p tanh(sharpness e) (e^2 + 1e-6)^((p-1)/2)`.
    Power { p: u32, sharpness: Option<f32> },
    /// `e` up to a norm of the token's threshold, and beyond it the threshold times the
    /// direction of `e`, or times the signs of its elements.
    Huber { signs: bool },
}

impl Loss {
    /// The factor of the gradient of squares.
    pub(crate) fn factor(factor: f32, mean: bool, channels: usize) -> f32 {
        if mean { factor / channels.max(1) as f32 } else { factor }
    }
}

/// What weights a memory has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Retention {
    /// What has been accumulated.
    Linear,
    /// The same over `|A|_q^(q-2)`, or `A (|A| / |A|_q)^(q-2)` element by element: since
    /// the end of the last chunk.
    Norm { q: u32, mirror: bool },
    /// `softmax A` over the elements that an output sums, after the first and the last
    /// token of each chunk.
    Softmax,
}

/// A memory: a matrix, or two with a GELU between them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    /// Weights at the start, `[heads, n, m]` for each layer; of none a matrix of zeros.
    pub(crate) weights: Vec<Array3<f32>>,
    /// Outputs are `k + gamma LN(y)`: gammas, `[heads, value_dim]`.
    pub(crate) gamma: Option<Array2<f32>>,
}

/// How a memory learns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) loss: Loss,
    pub(crate) retention: Retention,
    /// Tokens whose gradients are of the same weights.
    pub(crate) chunk: usize,
    pub(crate) form: Form,
    pub(crate) isa: Isa,
}

/// Makes rows of queries and keys what the memory takes: `(isa, rows, len, dim, stride)`.
pub(crate) type Prepare = fn(Isa, &mut [f32], usize, usize, usize);

/// One call. Shapes have been checked; arrays of tokens are `[batch, heads or a divisor,
/// len]`.
#[derive(Clone, Copy)]
pub(crate) struct Online<'a> {
    pub(crate) rules: Rules,
    pub(crate) memory: &'a Memory,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    pub(crate) v: AnyArray<'a>,
    pub(crate) prepare: Option<Prepare>,
    pub(crate) step: ArrayView3<'a, f32>,
    /// What a token leaves of the weights, or what it takes of them if `forgets`.
    pub(crate) keep: ArrayView3<'a, f32>,
    pub(crate) forgets: bool,
    pub(crate) momentum: Option<ArrayView3<'a, f32>>,
    pub(crate) threshold: Option<ArrayView3<'a, f32>>,
}

/// Sizes of a memory and of its state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) layers: usize,
    /// Inputs and outputs of each layer.
    pub(crate) n: [usize; 2],
    pub(crate) m: [usize; 2],
    /// Weights, of both layers.
    pub(crate) weights: usize,
    /// Rows of a state: weights, those of the chunk's start, momentum.
    pub(crate) parts: usize,
    piece: usize,
    norm: bool,
}

fn pad(n: usize) -> usize {
    n.checked_next_multiple_of(MAX_LANES).unwrap_or(n)
}

/// From a row of weights to the next: where they are read as columns, rows that are a
/// multiple of 512 bytes apart would share a part of the first-level cache.
fn apart(m: usize) -> usize {
    let row = pad(m);
    if row > 0 && row.is_multiple_of(128) { row.saturating_add(MAX_LANES) } else { row }
}

impl Geometry {
    /// Numbers of a row of a state: behind the weights come the tokens of the chunk so
    /// far and a normaliser for each layer, in the first row.
    pub(crate) fn row(&self) -> usize {
        self.weights.saturating_add(1 + self.layers)
    }

    /// Where the weights of a layer lie in a row.
    pub(crate) fn first(&self, layer: usize) -> usize {
        layer * self.n[0] * self.m[0]
    }

    /// The same in scratch, where rows are whole vectors.
    fn lies(&self, layer: usize) -> usize {
        layer * self.n[0] * apart(self.m[0])
    }

    /// Weights in scratch.
    fn room(&self) -> usize {
        (0..self.layers).map(|l| self.n[l].saturating_mul(apart(self.m[l]))).fold(0, usize::saturating_add)
    }

    fn widest(&self, of: [usize; 2]) -> usize {
        of[..self.layers].iter().copied().max().unwrap_or_default()
    }

    /// Rows of a piece, of so many elements.
    fn rows(&self, width: usize) -> usize {
        self.piece.saturating_mul(pad(width))
    }

    fn hidden(&self) -> usize {
        if self.layers == 2 { self.rows(self.n[1]) } else { 0 }
    }

    fn values(&self) -> usize {
        self.rows(self.m[self.layers - 1])
    }
}

impl Online<'_> {
    pub(crate) fn geometry(&self) -> Geometry {
        let (d, w) = (self.dims.head_dim, self.dims.value_dim);
        let (layers, n, m) = match self.memory.weights.get(1) {
            Some(second) => (2, [d, second.dim().1], [second.dim().1, w]),
            None => (1, [d, 0], [w, 0]),
        };
        Geometry {
            layers,
            n,
            m,
            weights: n[0].saturating_mul(m[0]).saturating_add(n[1].saturating_mul(m[1])),
            parts: 2 + usize::from(self.momentum.is_some()),
            piece: if self.rules.form == Form::Recurrent { 1 } else { self.rules.chunk.min(PIECE) },
            norm: self.memory.gamma.is_some(),
        }
    }

    /// `[sequences, heads, parts, weights and more]`
    pub(crate) fn state_dim(&self) -> Dim4 {
        let g = self.geometry();
        (self.dims.batch, self.dims.q_heads, g.parts, g.row())
    }

    /// The state of a head before its first token.
    pub(crate) fn start(&self, head: usize, unit: &mut [f32]) {
        let g = self.geometry();
        unit.fill(0.0);
        let (first, rest) = unit.split_at_mut(g.row());
        let reference = &mut rest[..g.weights];
        first[g.weights + 1..].fill(1.0);
        if self.rules.retention == Retention::Softmax {
            let share = 1.0 / self.dims.head_dim.max(1) as f64;
            first[..g.weights].fill(share.ln() as f32);
            reference.fill(share as f32);
            return;
        }
        for (layer, weights) in self.memory.weights.iter().enumerate() {
            let own = weights.index_axis(ndarray::Axis(0), head);
            let (at, len) = (g.first(layer), own.len());
            first[at..at + len].iter_mut().zip(own).for_each(|(to, &x)| *to = x);
            reference[at..at + len].copy_from_slice(&first[at..at + len]);
            if let Retention::Norm { q, mirror } = self.rules.retention {
                let q = f64::from(q);
                let sum: f64 = own.iter().map(|x| f64::from(x.abs()).powf(q)).sum();
                let norm = if sum == 0.0 { 1.0 } else { sum.powf(1.0 / q) };
                let whole = norm.powf(q - 2.0);
                first[g.weights + 1 + layer] = if mirror { 1.0 } else { whole as f32 };
                for x in &mut reference[at..at + len] {
                    let of = f64::from(*x);
                    *x = (if mirror { of * (of.abs() / norm).powf(q - 2.0) } else { of / whole }) as f32;
                }
            }
        }
    }

    /// The states of all heads before their first tokens.
    pub(crate) fn started(&self) -> Result<Array4<f32>> {
        let mut states = filled("state", self.state_dim(), 0f32)?;
        for mut heads in states.outer_iter_mut() {
            for (head, mut state) in heads.outer_iter_mut().enumerate() {
                if let Some(state) = state.as_slice_mut() {
                    self.start(head, state);
                }
            }
        }
        Ok(states)
    }

    /// Operations of a token and head.
    pub(crate) fn flops(&self) -> usize {
        let g = self.geometry();
        let passes = 3 + 2 * usize::from(self.momentum.is_some());
        let widths = [g.n[0], g.m[0], g.n[1], g.m[1]].into_iter().fold(0, usize::saturating_add);
        let back = 2usize.saturating_mul(g.n[1]).saturating_mul(g.m[1]);
        (2 * passes).saturating_mul(g.weights).saturating_add(back).saturating_add(2 * g.piece * widths)
    }
}

room! {
    /// What a thread works in: rows of a piece, whole vectors apart, and the memory.
    Work<'a>(g: &Geometry) {
        unit: f32 = g.parts.saturating_mul(g.row()),
        weights: f32 = g.room(),
        reference: f32 = g.room(),
        momentum: f32 = if g.parts > 2 { g.room() } else { 0 },
        back: f32 = if g.layers == 2 { g.m[1].saturating_mul(pad(g.n[1])) } else { 0 },
        q: f32 = g.rows(g.n[0]),
        k: f32 = g.rows(g.n[0]),
        v: f32 = g.values(),
        found: f32 = g.values(),
        normed: f32 = if g.norm { g.values() } else { 0 },
        out: f32 = g.values(),
        gamma: f32 = if g.norm { pad(g.m[g.layers - 1]) } else { 0 },
        slopes: f32 = g.hidden(),
        active: f32 = g.hidden(),
        inner: f32 = g.hidden(),
        read: f32 = g.hidden(),
        scaled: f32 = g.rows(g.widest(g.n)),
        columns: f32 = g.widest(g.n).saturating_mul(pad(g.piece)),
        written: f32 = g.rows(g.widest(g.m)),
        scores: f32 = g.piece * pad(g.piece),
        shares: f32 = g.piece * pad(g.piece),
        pushed: f32 = pad(g.piece),
        left: f32 = g.piece,
        moved: f32 = g.piece,
        factors: f32 = g.widest(g.n),
        step: f32 = g.piece,
        keep: f32 = g.piece,
        carry: f32 = g.piece,
        threshold: f32 = g.piece
    }
}

fn claims(x: &Online<'_>) -> [usize; 2] {
    let Dims { batch, q_heads, q_len, packed, .. } = x.dims;
    [if packed { 1 } else { batch } * q_heads * q_len, batch * q_heads].map(claim_words)
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes(x: &Online<'_>) -> usize {
    let claims: usize = claims(x).iter().map(|&words| bytes_for::<u64>(words)).sum();
    claims.saturating_add(bytes_for_shares(parallel::threads(), Work::bytes(&x.geometry())))
}

/// Runs the memory from and to a state, or from its start.
pub(crate) fn run<T: Element>(
    x: &Online<'_>,
    state: Option<&mut [f32]>,
    out: ArrayViewMut4<'_, T>,
    mut arena: Arena<'_>,
) {
    let (g, heads, workers) = (x.geometry(), x.dims.q_heads, parallel::threads());
    let [rows, units] = claims(x).map(|words| arena.take(words));
    let out: AnyOut<'_> = T::any_out(OutRows::new(out, rows));
    let state = state.map(|state| Parts::new(state, g.parts * g.row(), units));
    let shares = arena.shares(workers, Work::bytes(&g));
    let start = |worker| {
        let mut work = Work::take(&mut shares.take(worker), &g);
        work.clear();
        work
    };
    parallel::for_each(workers, x.dims.batch * heads, start, |work, unit| {
        let (sequence, head) = (x.lengths.sequence(&x.dims, unit / heads), unit % heads);
        let mut out = out.take(sequence.batch, head, sequence.queries.clone());
        let state = state.as_ref().map(|state| state.take(unit));
        let (out, ahead) = (&mut out, Ahead::nothing());
        x.rules.isa.dispatch(piece::Head { x, g, sequence, head, state, out, work, ahead });
    });
}

impl Work<'_> {
    /// What fills rows up is 0, and stays so.
    fn clear(&mut self) {
        let Self { q, k, v, gamma, back, inner, .. } = self;
        for rows in [q, k, v, gamma, back, inner] {
            rows.fill(0.0);
        }
    }
}
