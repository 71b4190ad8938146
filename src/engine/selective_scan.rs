//! The selective scan: a recurrence whose every channel of every state has a
//! decay of its own, so that nothing of it is a matrix product.
//!
//! ```text
//! h_t[s, c] = exp(delta_t[c] a[s, c]) h_{t-1}[s, c] + delta_t[c] b_t[s] u_t[c]
//! y_t[c]    = sum_s c_t[s] h_t[s, c] + d[c] u_t[c]
//! ```
//!
//! Channels do not touch each other: they lie in lanes, and a task is one
//! panel of channels of one head, whose state stays in the first-level cache
//! while the tokens go by, a chunk of them loaded at a time. Exponentials are
//! what costs. Bits depend neither on threads nor on panels.
//!
//! Gradients go over the tokens backwards ([`backward`]).

use std::ops::Range;

use ndarray::{ArrayView4, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::kept::Slots;
use crate::engine::parallel;
use crate::engine::recur::Place;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::{Dims, Lengths};
use crate::simd::any::{AnyArray, AnyOut, AnyRows};
use crate::simd::exp::{exp2_product, sigmoid, softplus};
use crate::simd::mem::{Arena, OutRows, RowsMut, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{NEGLIGIBLE, drop_rest};
use crate::simd::{Isa, Kernel, Simd};

pub(crate) mod backward;

/// Tokens that are loaded at once: operands and state of a panel fit in the
/// first-level cache.
const CHUNK: usize = 32;
/// Of so many tokens, the first has what is left of the state
/// [flushed](flush): between two of them little becomes subnormal.
const FLUSH: usize = 8;

/// One call. Shapes have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scan<'a> {
    /// Sizes: `head_dim` is that of a state, `value_dim` the channels.
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    /// `[batch, heads, len, channels]`
    pub(crate) u: AnyArray<'a>,
    /// As `u`.
    pub(crate) delta: AnyArray<'a>,
    /// `[batch, heads or a divisor, len, n]`
    pub(crate) b: AnyArray<'a>,
    /// As `b`.
    pub(crate) c: AnyArray<'a>,
    /// As `u`: outputs are multiplied by `z sigmoid(z)`.
    pub(crate) z: Option<AnyArray<'a>>,
    /// `a log2 e`, `[heads, n, channels]`.
    pub(crate) rates: &'a [f32],
    /// `d`, `[heads, channels]`.
    pub(crate) skip: Option<&'a [f32]>,
    /// Added to `delta`, `[heads, channels]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// Whether `delta` is then what the softplus makes of it.
    pub(crate) softplus: bool,
    pub(crate) isa: Isa,
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    panel: usize,
    /// Panels of a head.
    panels: usize,
    /// Pairs of sequence and head.
    units: usize,
    workers: usize,
    /// Size of a state, in rows.
    n: usize,
    /// Rows of the output.
    rows: usize,
}

impl Plan {
    fn new(scan: &Scan<'_>) -> Self {
        let d = &scan.dims;
        let panel = scan.isa.panel();
        let batch = if d.packed { 1 } else { d.batch };
        Self {
            panel,
            panels: d.value_dim.div_ceil(panel),
            units: d.batch * d.q_heads,
            workers: parallel::threads(),
            n: d.head_dim,
            rows: batch * d.q_heads * d.q_len,
        }
    }

    /// Of outputs and of so many states.
    fn claims(&self, states: usize) -> [usize; 2] {
        let panels = self.panels.max(1);
        [self.rows, states * self.n].map(|rows| claim_words(rows * panels))
    }

    fn bytes(&self) -> usize {
        let claims: usize = self.claims(self.units).iter().map(|&words| bytes_for::<u64>(words)).sum();
        claims + bytes_for_shares(self.workers, Work::bytes(self))
    }
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes(scan: &Scan<'_>) -> usize {
    Plan::new(scan).bytes()
}

/// Runs the scan from and to `state`, `[sequences, heads, n, channels]` with
/// neighbouring channels, or from zero: of sequences, or of slots.
pub(crate) fn run<T: Element>(
    scan: &Scan<'_>,
    state: Option<(ArrayViewMut4<'_, f32>, Slots<'_>)>,
    mut out: ArrayViewMut4<'_, T>,
    workspace: &mut Workspace,
) -> Result<()> {
    let plan = Plan::new(scan);
    let (heads, slots) = (scan.dims.q_heads, state.as_ref().map_or(Slots::default(), |state| state.1));
    let states = slots.states(plan.units, heads);
    let mut arena = workspace.arena(plan.bytes() + slots.bytes(heads * plan.n * plan.panels))?;
    scan.lengths.fill_rest(&mut out, false, T::default());
    let [rows, states] = plan.claims(states).map(|words| arena.take(words));
    let out = T::any_out(OutRows::in_blocks(out, plan.panel, rows));
    let states = state.map(|(state, _)| OutRows::in_blocks(state, plan.panel, states));
    let shares = arena.shares(plan.workers, Work::bytes(&plan));
    let start = |worker| Work::take(shares.take(worker), &plan);
    parallel::for_each(plan.workers, plan.units * plan.panels, start, |work, task| {
        let (unit, panel) = (task / plan.panels, task % plan.panels);
        let (sequence, head) = (unit / heads, unit % heads);
        let state =
            states.as_ref().map(|states| states.take_block(slots.slot(sequence), head, 0..plan.n, panel));
        scan.isa.dispatch(Panel { scan, plan, sequence, head, panel, state, out: &out, work });
    });
    Ok(())
}

/// What a thread works in: operands of a chunk of tokens in rows of a panel,
/// and by vectors of channels, `[vectors][n][lanes]`, rates and state.
struct Work<'a> {
    u: &'a mut [f32],
    delta: &'a mut [f32],
    z: &'a mut [f32],
    b: &'a mut [f32],
    c: &'a mut [f32],
    rates: &'a mut [f32],
    state: &'a mut [f32],
    skip: &'a mut [f32],
    bias: &'a mut [f32],
}

impl<'a> Work<'a> {
    fn sizes(plan: &Plan) -> [usize; 9] {
        let (rows, small, state) = (CHUNK * plan.panel, CHUNK * plan.n, plan.n * plan.panel);
        [rows, rows, rows, small, small, state, state, plan.panel, plan.panel]
    }

    fn bytes(plan: &Plan) -> usize {
        Self::sizes(plan).iter().map(|&n| bytes_for::<f32>(n)).sum()
    }

    fn take(mut arena: Arena<'a>, plan: &Plan) -> Self {
        let [u, delta, z, b, c, rates, state, skip, bias] = Self::sizes(plan);
        Self {
            u: arena.take(u),
            delta: arena.take(delta),
            z: arena.take(z),
            b: arena.take(b),
            c: arena.take(c),
            rates: arena.take(rates),
            state: arena.take(state),
            skip: arena.take(skip),
            bias: arena.take(bias),
        }
    }
}

/// All tokens of one panel of channels of one head of one sequence.
struct Panel<'a, 'b, 'c> {
    scan: &'a Scan<'c>,
    plan: Plan,
    sequence: usize,
    head: usize,
    panel: usize,
    /// `[n, channels of the panel]`
    state: Option<RowsMut<'a, f32>>,
    out: &'a AnyOut<'a>,
    work: &'a mut Work<'b>,
}

impl Kernel for Panel<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (scan, panel) = (self.scan, self.plan.panel);
        let d = &scan.dims;
        let sequence = scan.lengths.sequence(d, self.sequence);
        let cols = self.panel * panel..((self.panel + 1) * panel).min(d.value_dim);
        let vectors = cols.len().div_ceil(S::LANES);
        self.load(s, &cols);
        let tokens = sequence.queries.clone();
        let mut out = self.out.take_block(sequence.batch, self.head, tokens.clone(), self.panel);
        for first in tokens.clone().step_by(CHUNK) {
            let chunk = first..(first + CHUNK).min(tokens.end);
            let at = Place::new(&sequence, self.head, chunk.clone());
            self.work.operands(s, scan, &at, &cols);
            self.work.steps(s, scan, &self.plan, chunk.len(), vectors);
            for (t, row) in self.work.u.chunks_exact(panel).take(chunk.len()).enumerate() {
                out.write(s, chunk.start - tokens.start + t, row, 1.0);
            }
        }
        self.store(s, cols.len());
    }
}

impl Panel<'_, '_, '_> {
    /// What does not depend on tokens.
    #[inline(always)]
    fn load<S: Simd>(&mut self, s: S, cols: &Range<usize>) {
        let n = self.plan.n;
        self.work.parameters(s, self.scan, &self.plan, self.head, cols);
        for row in 0..n {
            let kept = self.state.as_mut().and_then(|state| state.row(row));
            for v in 0..cols.len().div_ceil(S::LANES) {
                let x = kept.as_ref().map_or(s.splat(0.0), |kept| tail(s, kept, v));
                s.store(&mut self.work.state[(v * n + row) * S::LANES..], x);
            }
        }
    }

    /// The state, back where it came from.
    #[inline(always)]
    fn store<S: Simd>(&mut self, s: S, cols: usize) {
        let n = self.plan.n;
        let Some(kept) = &mut self.state else { return };
        for row in 0..n {
            if let Some(kept) = kept.row(row) {
                for (v, to) in kept[..cols].chunks_mut(S::LANES).enumerate() {
                    s.store_tail(to, s.load(&self.work.state[(v * n + row) * S::LANES..]));
                }
            }
        }
    }
}

impl Work<'_> {
    /// What a panel's channels have besides tokens and states.
    #[inline(always)]
    fn parameters<S: Simd>(&mut self, s: S, scan: &Scan<'_>, plan: &Plan, head: usize, cols: &Range<usize>) {
        let (n, channels) = (plan.n, scan.dims.value_dim);
        let Work { u, delta, z, rates, skip, bias, .. } = &mut *self;
        if cols.len() < plan.panel {
            // Lanes without a channel are zero, and stay so.
            for x in [u, delta, z] {
                x.fill(0.0);
            }
        }
        for (to, from) in [(skip, scan.skip), (bias, scan.bias)] {
            to.fill(0.0);
            if let Some(from) = from {
                to[..cols.len()].copy_from_slice(&from[head * channels..][cols.clone()]);
            }
        }
        for row in 0..n {
            let from = &scan.rates[(head * n + row) * channels..][cols.clone()];
            for v in 0..cols.len().div_ceil(S::LANES) {
                s.store(&mut rates[(v * n + row) * S::LANES..], tail(s, from, v));
            }
        }
    }

    /// The operands of a chunk of tokens.
    #[inline(always)]
    fn operands<S: Simd>(&mut self, s: S, scan: &Scan<'_>, at: &Place, cols: &Range<usize>) {
        let d = &scan.dims;
        rows(scan.u, at, d.q_heads).columns(cols.clone()).pack_panel(s, self.u);
        rows(scan.delta, at, d.q_heads).columns(cols.clone()).pack_panel(s, self.delta);
        if let Some(from) = scan.z {
            rows(from, at, d.q_heads).columns(cols.clone()).pack_panel(s, self.z);
        }
        rows(scan.b, at, d.q_heads).pack_rows(s, self.b, d.head_dim);
        rows(scan.c, at, d.q_heads).pack_rows(s, self.c, d.head_dim);
    }

    /// The tokens of a chunk: outputs in place of `u`. Vectors of channels take turns, not
    /// tokens: rates and state of one stay in the first-level cache.
    #[inline(always)]
    fn steps<S: Simd>(&mut self, s: S, scan: &Scan<'_>, plan: &Plan, len: usize, vectors: usize) {
        let (n, panel) = (plan.n, plan.panel);
        let Work { u, delta, z, b, c, rates, state, skip, bias } = self;
        for at in (0..vectors).map(|v| v * S::LANES) {
            let (rates, state) = (&rates[at * n..], &mut state[at * n..][..n * S::LANES]);
            let (skip, bias) = (s.load(&skip[at..]), s.load(&bias[at..]));
            for t in 0..len {
                let row = t * panel + at;
                let mut step = s.add(s.load(&delta[row..]), bias);
                if scan.softplus {
                    step = softplus(s, step);
                }
                let input = s.load(&u[row..]);
                let (b, c) = (&b[t * n..][..n], &c[t * n..][..n]);
                let x = Step { step, input: s.mul(step, input), b, c };
                let y = if t.is_multiple_of(FLUSH) {
                    x.take::<true>(s, rates, state)
                } else {
                    x.take::<false>(s, rates, state)
                };
                let mut y = s.mul_add(skip, input, y);
                if scan.z.is_some() {
                    let z = s.load(&z[row..]);
                    y = s.mul(y, s.mul(z, sigmoid(s, z)));
                }
                s.store(&mut u[row..], y);
            }
        }
    }
}

/// The rows of a place in an array that may have fewer heads.
fn rows<'a>(x: AnyArray<'a>, at: &Place, heads: usize) -> AnyRows<'a> {
    x.rows(at.batch, at.head_of(x.heads(), heads), &at.tokens)
}

/// Vector `v` of a row, zero past its end.
#[inline(always)]
fn tail<S: Simd>(s: S, row: &[f32], v: usize) -> S::F {
    s.load_tail(&row[v * S::LANES..])
}

/// One token of one vector of channels.
struct Step<'a, S: Simd> {
    step: S::F,
    /// `step` times the input.
    input: S::F,
    b: &'a [f32],
    c: &'a [f32],
}

impl<S: Simd> Step<'_, S> {
    /// Updates the state and reads it.
    #[inline(always)]
    fn take<const FLUSHED: bool>(&self, s: S, rates: &[f32], state: &mut [f32]) -> S::F {
        let mut y = s.splat(0.0);
        let rows = rates.chunks_exact(S::LANES).zip(state.chunks_exact_mut(S::LANES));
        for (((rate, h), &b), &c) in rows.zip(self.b).zip(self.c) {
            let decay = exp2_product(s, self.step, s.load(rate));
            let old = s.load(h);
            let mut sum = s.mul_add(old, decay, s.mul(self.input, s.splat(b)));
            if FLUSHED {
                let decays = s.lt(decay, s.splat(1.0));
                sum = drop_rest(s, sum, old, s.select(decays, s.splat(NEGLIGIBLE), s.splat(0.0)));
            }
            s.store(h, sum);
            y = s.mul_add(s.splat(c), sum, y);
        }
        y
    }
}

/// The smallest of `delta + bias`, NaN aside.
pub(crate) fn smallest_step(delta: &ArrayView4<'_, f32>, bias: Option<&[f32]>) -> f32 {
    // Folded without an exit, which the compiler turns into vectors.
    let smaller = |least: f32, x: f32| if x < least { x } else { least };
    let Some(bias) = bias else {
        return delta.fold(f32::INFINITY, |least, &x| smaller(least, x));
    };
    let channels = delta.dim().3;
    delta.axis_iter(Axis(1)).zip(bias.chunks(channels.max(1))).fold(f32::INFINITY, |least, (head, bias)| {
        head.rows().into_iter().fold(least, |least, row| {
            row.iter().zip(bias).fold(least, |least, (x, bias)| smaller(least, x + bias))
        })
    })
}
