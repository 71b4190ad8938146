//! Gradients of the selective scan, tokens from the last to the first.
//!
//! With `dy` the gradient of `y`, and `G_t` that of the state `h_t`:
//!
//! ```text
//! G_t[s, c]   = c_t[s] dy_t[c] + exp(delta_{t+1}[c] a[s, c]) G_{t+1}[s, c]
//! w_t[c]      = sum_s G_t[s, c] b_t[s]
//! m_t[s, c]   = G_t[s, c] exp(delta_t[c] a[s, c]) h_{t-1}[s, c]
//! du_t[c]     = delta_t[c] w_t[c] + d[c] dy_t[c]        dd[c] = sum_t dy_t[c] u_t[c]
//! ddelta_t[c] = u_t[c] w_t[c] + sum_s m_t[s, c] a[s, c] da[s, c] = sum_t m_t[s, c] delta_t[c]
//! db_t[s]     = sum_c G_t[s, c] delta_t[c] u_t[c]       dc_t[s] = sum_c dy_t[c] h_t[s, c]
//! ```
//!
//! A task is a panel of channels, as forwards. A run over the tokens keeps the
//! states at the starts of chunks; then a chunk at a time, from the last, its
//! states and decays are worked out again and kept, and its tokens taken
//! backwards: two exponentials an element of the state and token. What `b` and
//! `c` get of each panel is added up at the end, in order.

use ndarray::{ArrayViewMut2, ArrayViewMut3, ArrayViewMut4};

use super::*;
use crate::engine::recur::backward::{Dim, Sink};
use crate::simd::MAX_LANES;
use crate::simd::pack::WriteRow;
use crate::simd::tile::flush;

/// What gradients are computed from.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) scan: &'a Scan<'a>,
    /// The state at the start, `[sequences, heads, n, channels]`; 0 if there is
    /// none.
    pub(crate) state: Option<AnyArray<'a>>,
    /// Of the outputs.
    pub(crate) d_out: AnyArray<'a>,
    /// Of the state at the end; 0 if there is none.
    pub(crate) d_state: Option<AnyArray<'a>>,
}

/// Where gradients go, each of the shape of its array.
pub(crate) struct Gradients<'a> {
    pub(crate) u: ArrayViewMut4<'a, f32>,
    pub(crate) delta: ArrayViewMut4<'a, f32>,
    pub(crate) z: Option<ArrayViewMut4<'a, f32>>,
    pub(crate) b: ArrayViewMut4<'a, f32>,
    pub(crate) c: ArrayViewMut4<'a, f32>,
    pub(crate) state: ArrayViewMut4<'a, f32>,
    /// `[heads, channels, n]`
    pub(crate) a: ArrayViewMut3<'a, f32>,
    /// `[heads, channels]`
    pub(crate) skip: ArrayViewMut2<'a, f32>,
    pub(crate) bias: ArrayViewMut2<'a, f32>,
}

impl Plan {
    /// Elements of a state.
    fn state(&self) -> usize {
        self.n * self.panel
    }

    /// Rows of parameters: rates, the skip connection and the bias.
    fn parameters(&self) -> usize {
        self.n + 2
    }
}

/// Chunks of the longest sequence.
fn chunks(scan: &Scan<'_>) -> usize {
    let len = |i| scan.lengths.sequence(&scan.dims, i).queries.len();
    (0..scan.dims.batch).map(len).max().unwrap_or(0).div_ceil(CHUNK)
}

/// Bytes of scratch that [`run`] needs for gradients of `b` and of `c` of
/// these sizes.
pub(crate) fn workspace_bytes(scan: &Scan<'_>, [b, c]: [Dim; 2]) -> usize {
    let plan = Plan::new(scan);
    let [rows, states] = plan.claims(plan.units).map(bytes_for::<u64>);
    let tasks = plan.units * plan.panels;
    let sums = bytes_for::<f32>(tasks * plan.parameters() * plan.panel);
    let parts = scan.dims.q_heads * plan.panels;
    let shared = Sink::bytes(parts, b) + Sink::bytes(parts, c);
    let own = 3 * rows + states + bytes_for::<u64>(claim_words(tasks * plan.parameters()));
    own + sums + shared + bytes_for_shares(plan.workers, Share::bytes(&plan, chunks(scan)))
}

/// Writes the gradients.
pub(crate) fn run(call: &Call<'_>, to: Gradients<'_>, workspace: &mut Workspace) -> Result<()> {
    let scan = call.scan;
    let (plan, kept) = (Plan::new(scan), chunks(scan));
    let mut arena = workspace.arena(workspace_bytes(scan, [to.b.dim(), to.c.dim()]))?;
    let [rows, states] = plan.claims(plan.units);
    let tasks = plan.units * plan.panels;
    let Gradients { mut u, mut delta, mut z, b, c, state, mut a, mut skip, mut bias } = to;
    for to in [Some(&mut u), Some(&mut delta), z.as_mut()].into_iter().flatten() {
        scan.lengths.fill_rest(to, false, 0.0);
    }
    let mut blocks = |to, claims: usize| OutRows::in_blocks(to, plan.panel, arena.take(claims));
    let wide = [Some(blocks(u, rows)), Some(blocks(delta, rows)), z.map(|z| blocks(z, rows))];
    let state = blocks(state, states);
    let parts = scan.dims.q_heads * plan.panels;
    let (mut b, mut c) = (Sink::new(b, parts, &mut arena), Sink::new(c, parts, &mut arena));
    let sums = arena.take::<f32>(tasks * plan.parameters() * plan.panel);
    {
        let claims = arena.take(claim_words(tasks * plan.parameters()));
        let out = Out {
            wide,
            narrow: [b.rows(&scan.lengths), c.rows(&scan.lengths)],
            state,
            sums: OutRows::of_slice(&mut *sums, (tasks, 1, plan.parameters(), plan.panel), claims),
        };
        let shares = arena.shares(plan.workers, Share::bytes(&plan, kept));
        let start = |worker| Share::take(shares.take(worker), &plan, kept);
        parallel::for_each(plan.workers, tasks, start, |share, task| {
            scan.isa.dispatch(Panel { call, plan, task, out: &out, share });
        });
    }
    b.sum(plan.workers);
    c.sum(plan.workers);
    // What sequences share.
    let sum = |row: usize, head: usize, channel: usize| {
        let (panel, lane) = (channel / plan.panel, channel % plan.panel);
        let of = |sequence: usize| {
            let task = (sequence * scan.dims.q_heads + head) * plan.panels + panel;
            f64::from(sums[(task * plan.parameters() + row) * plan.panel + lane])
        };
        (0..scan.dims.batch).map(of).sum::<f64>() as f32
    };
    a.indexed_iter_mut().for_each(|((head, channel, row), to)| *to = sum(row, head, channel));
    skip.indexed_iter_mut().for_each(|((head, channel), to)| *to = sum(plan.n, head, channel));
    bias.indexed_iter_mut().for_each(|((head, channel), to)| *to = sum(plan.n + 1, head, channel));
    Ok(())
}

/// Where the panels write.
struct Out<'a> {
    /// Of `u`, `delta` and `z`, in blocks of panels.
    wide: [Option<OutRows<'a, f32>>; 3],
    /// Of `b` and `c`: `[batch, heads and their panels, len, n]`.
    narrow: [OutRows<'a, f32>; 2],
    state: OutRows<'a, f32>,
    /// `[tasks, 1, parameters, panel]`
    sums: OutRows<'a, f32>,
}

/// What a thread works in.
struct Share<'a> {
    work: Work<'a>,
    d_out: &'a mut [f32],
    /// States at the starts of chunks.
    kept: &'a mut [f32],
    /// The gradient of the state and, of a chunk, those of rates, both by vectors
    /// as the state.
    d_state: &'a mut [f32],
    of_rates: &'a mut [f32],
    /// As rows, `[n, panel]`.
    rows: &'a mut [f32],
    /// Of one vector of channels and the tokens of a chunk, `[tokens, n, lanes]`.
    states: &'a mut [f32],
    decays: &'a mut [f32],
    /// The same summed over vectors: what `b` and `c` get.
    of_b: &'a mut [f32],
    of_c: &'a mut [f32],
    /// `[tokens, lanes]`
    steps: &'a mut [f32],
    y: &'a mut [f32],
    /// Of a chunk, `[panel]`.
    of_skip: &'a mut [f32],
    of_bias: &'a mut [f32],
    /// A row of `n`, in whole vectors.
    row: &'a mut [f32],
    /// `[parameters, panel]`
    sums: &'a mut [f64],
}

impl<'a> Share<'a> {
    fn sizes(plan: &Plan, kept: usize) -> [usize; 14] {
        let (state, chunk) = (plan.state(), CHUNK * plan.n * MAX_LANES);
        let (tokens, panel) = (CHUNK * MAX_LANES, plan.panel);
        let row = plan.n.next_multiple_of(MAX_LANES);
        [
            CHUNK * panel,
            kept * state,
            state,
            state,
            state,
            chunk,
            chunk,
            chunk,
            chunk,
            tokens,
            tokens,
            panel,
            panel,
            row,
        ]
    }

    fn bytes(plan: &Plan, kept: usize) -> usize {
        let sums = bytes_for::<f64>(plan.parameters() * plan.panel);
        Work::bytes(plan) + sums + Self::sizes(plan, kept).iter().map(|&n| bytes_for::<f32>(n)).sum::<usize>()
    }

    fn take(mut arena: Arena<'a>, plan: &Plan, kept: usize) -> Self {
        let sums = arena.take(plan.parameters() * plan.panel);
        let [
            d_out,
            kept,
            d_state,
            of_rates,
            rows,
            states,
            decays,
            of_b,
            of_c,
            steps,
            y,
            of_skip,
            of_bias,
            row,
        ] = Self::sizes(plan, kept).map(|n| arena.take(n));
        let work = Work::take(arena, plan);
        Self {
            work,
            d_out,
            kept,
            d_state,
            of_rates,
            rows,
            states,
            decays,
            of_b,
            of_c,
            steps,
            y,
            of_skip,
            of_bias,
            row,
            sums,
        }
    }
}

/// All tokens of one panel of channels of one head of one sequence.
struct Panel<'a, 'b> {
    call: &'a Call<'a>,
    plan: Plan,
    task: usize,
    out: &'a Out<'a>,
    share: &'a mut Share<'b>,
}

impl Kernel for Panel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (call, plan, scan) = (self.call, self.plan, self.call.scan);
        let (d, n, size) = (&scan.dims, plan.n, plan.state());
        let (unit, panel) = (self.task / plan.panels, self.task % plan.panels);
        let (index, head) = (unit / d.q_heads, unit % d.q_heads);
        let sequence = scan.lengths.sequence(d, index);
        let cols = panel * plan.panel..((panel + 1) * plan.panel).min(d.value_dim);
        let vectors = cols.len().div_ceil(S::LANES);
        let tokens = sequence.queries.clone();
        let place = |chunk: usize| {
            let first = tokens.start + chunk * CHUNK;
            Place::new(&sequence, head, first..(first + CHUNK).min(tokens.end))
        };
        let chunks = tokens.len().div_ceil(CHUNK);
        let share = &mut *self.share;
        share.work.parameters(s, scan, &plan, head, &cols);
        share.d_out.fill(0.0);
        share.sums.fill(0.0);
        for (from, to) in [(call.state, &mut *share.work.state), (call.d_state, &mut *share.d_state)] {
            to.fill(0.0);
            let Some(from) = from else { continue };
            share.rows.fill(0.0);
            from.rows(index, head, &(0..n)).columns(cols.clone()).pack_panel(s, share.rows);
            by_vectors::<S>(n, plan.panel, share.rows, to);
        }
        let plain = Scan { z: None, ..*scan };
        for chunk in 0..chunks {
            share.kept[chunk * size..][..size].copy_from_slice(share.work.state);
            if chunk + 1 < chunks {
                let at = place(chunk);
                share.work.operands(s, &plain, &at, &cols);
                share.work.steps(s, &plain, &plan, at.tokens.len(), vectors);
            }
        }
        let out = self.out;
        let mut wide = [const { None }; 3];
        for (to, out) in wide.iter_mut().zip(&out.wide) {
            *to = out.as_ref().map(|out| out.take_block(sequence.batch, head, tokens.clone(), panel));
        }
        let part = head * plan.panels + panel;
        let mut narrow = [0, 1].map(|i: usize| out.narrow[i].take(sequence.batch, part, tokens.clone()));
        for chunk in (0..chunks).rev() {
            let at = place(chunk);
            let (first, len) = (at.tokens.start - tokens.start, at.tokens.len());
            let share = &mut *self.share;
            share.work.operands(s, scan, &at, &cols);
            rows(call.d_out, &at, d.q_heads).columns(cols.clone()).pack_panel(s, share.d_out);
            share.of_rates.fill(0.0);
            share.of_skip.fill(0.0);
            share.of_bias.fill(0.0);
            for x in [&mut *share.of_b, &mut *share.of_c] {
                x[..len * n * S::LANES].fill(0.0);
            }
            for v in 0..vectors {
                self.forth(s, chunk, len, v);
                self.back(s, chunk, len, v);
            }
            self.write(s, first, len, (&mut wide, &mut narrow));
            self.sum::<S>(vectors);
        }
        let Share { d_state, rows, sums, .. } = &mut *self.share;
        by_rows::<S>(n, plan.panel, d_state, rows);
        let mut state = out.state.take_block(index, head, 0..n, panel);
        for (i, row) in rows.chunks_exact(plan.panel).enumerate() {
            s.vectorize(WriteRow { row, factor: 1.0, to: &mut state, i });
        }
        let mut to = out.sums.take(self.task, 0, 0..plan.parameters());
        for (i, sums) in sums.chunks_exact(plan.panel).enumerate() {
            if let Some(to) = to.row(i) {
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to = *sum as f32);
            }
        }
    }
}

/// Rows `[n, panel]` by vectors, `[vectors][n][lanes]`.
#[inline(always)]
fn by_vectors<S: Simd>(n: usize, panel: usize, rows: &[f32], to: &mut [f32]) {
    for (row, from) in rows.chunks_exact(panel).enumerate() {
        for (v, from) in from.chunks_exact(S::LANES).enumerate() {
            to[(v * n + row) * S::LANES..][..S::LANES].copy_from_slice(from);
        }
    }
}

/// The reverse of [`by_vectors`].
#[inline(always)]
fn by_rows<S: Simd>(n: usize, panel: usize, from: &[f32], rows: &mut [f32]) {
    for (row, to) in rows.chunks_exact_mut(panel).enumerate() {
        for (v, to) in to.chunks_exact_mut(S::LANES).enumerate() {
            to.copy_from_slice(&from[(v * n + row) * S::LANES..][..S::LANES]);
        }
    }
}

impl Panel<'_, '_> {
    /// Vector `v` of a chunk forwards: keeps states, decays, steps and outputs.
    #[inline(always)]
    fn forth<S: Simd>(&mut self, s: S, chunk: usize, len: usize, v: usize) {
        let (scan, n, panel) = (self.call.scan, self.plan.n, self.plan.panel);
        let Share { work, kept, states, decays, steps, y, .. } = &mut *self.share;
        let Work { u, delta, b, c, rates, skip, bias, .. } = work;
        let (at, row) = (v * S::LANES, n * S::LANES);
        let rates = &rates[at * n..][..row];
        let start = &kept[chunk * self.plan.state() + at * n..][..row];
        for t in 0..len {
            let mut step = s.add(s.load(&delta[t * panel + at..]), s.load(&bias[at..]));
            if scan.softplus {
                step = softplus(s, step);
            }
            let input = s.load(&u[t * panel + at..]);
            let scaled = s.mul(step, input);
            let (before, states) = states.split_at_mut(t * row);
            let before = if t == 0 { start } else { &before[(t - 1) * row..] };
            let (b, c) = (&b[t * n..][..n], &c[t * n..][..n]);
            let limit = s.splat(if t.is_multiple_of(FLUSH) { NEGLIGIBLE } else { 0.0 });
            let mut sum = s.splat(0.0);
            for i in 0..n {
                let lanes = i * S::LANES;
                let decay = exp2_product(s, step, s.load(&rates[lanes..]));
                let old = s.load(&before[lanes..]);
                let state = s.mul_add(old, decay, s.mul(scaled, s.splat(b[i])));
                let decays_here = s.lt(decay, s.splat(1.0));
                let state = drop_rest(s, state, old, s.select(decays_here, limit, s.splat(0.0)));
                s.store(&mut decays[t * row + lanes..], decay);
                s.store(&mut states[lanes..], state);
                sum = s.mul_add(s.splat(c[i]), state, sum);
            }
            s.store(&mut steps[t * S::LANES..], step);
            s.store(&mut y[t * S::LANES..], s.mul_add(s.load(&skip[at..]), input, sum));
        }
    }

    /// Vector `v` of a chunk backwards: gradients in place of `u`, `delta` and
    /// `z`.
    #[inline(always)]
    fn back<S: Simd>(&mut self, s: S, chunk: usize, len: usize, v: usize) {
        let (scan, n, panel) = (self.call.scan, self.plan.n, self.plan.panel);
        let share = &mut *self.share;
        let Share { work, d_out, kept, d_state, of_rates, states, decays, of_b, of_c, .. } = share;
        let Share { steps, y, of_skip, of_bias, .. } = share;
        let Work { u, delta, z, b, c, rates, skip, bias, .. } = work;
        let (at, row) = (v * S::LANES, n * S::LANES);
        let rates = &rates[at * n..][..row];
        let start = &kept[chunk * self.plan.state() + at * n..][..row];
        let (d_state, of_rates) = (&mut d_state[at * n..][..row], &mut of_rates[at * n..][..row]);
        let (skip, bias) = (s.load(&skip[at..]), s.load(&bias[at..]));
        let (mut skipped, mut biased) = (s.splat(0.0), s.splat(0.0));
        for t in (0..len).rev() {
            let here = t * panel + at;
            let mut d_y = s.load(&d_out[here..]);
            if scan.z.is_some() {
                let (x, y) = (s.load(&z[here..]), s.load(&y[t * S::LANES..]));
                let open = sigmoid(s, x);
                let gate = s.mul(x, open);
                // The slope of x sigmoid(x): sigmoid(x) (1 + x (1 - sigmoid(x))).
                let slope = s.mul_add(open, s.sub(x, gate), open);
                s.store(&mut z[here..], s.mul(s.mul(d_y, y), slope));
                d_y = s.mul(d_y, gate);
            }
            let (step, input) = (s.load(&steps[t * S::LANES..]), s.load(&u[here..]));
            let scaled = s.mul(step, input);
            let now = &states[t * row..][..row];
            let before = if t == 0 { start } else { &states[(t - 1) * row..][..row] };
            let decays = &decays[t * row..][..row];
            let (of_b, of_c) = (&mut of_b[t * row..][..row], &mut of_c[t * row..][..row]);
            let (b, c) = (&b[t * n..][..n], &c[t * n..][..n]);
            let (mut written, mut decayed) = (s.splat(0.0), s.splat(0.0));
            for i in 0..n {
                let lanes = i * S::LANES;
                let d = s.mul_add(s.splat(c[i]), d_y, s.load(&d_state[lanes..]));
                let read = s.mul_add(d_y, s.load(&now[lanes..]), s.load(&of_c[lanes..]));
                s.store(&mut of_c[lanes..], read);
                let wrote = s.mul_add(d, scaled, s.load(&of_b[lanes..]));
                s.store(&mut of_b[lanes..], wrote);
                written = s.mul_add(d, s.splat(b[i]), written);
                let d = flush(s, s.mul(d, s.load(&decays[lanes..])));
                s.store(&mut d_state[lanes..], d);
                let met = s.mul(d, s.load(&before[lanes..]));
                decayed = s.mul_add(met, s.load(&rates[lanes..]), decayed);
                let of_rate = s.mul_add(met, step, s.load(&of_rates[lanes..]));
                s.store(&mut of_rates[lanes..], of_rate);
            }
            // Rates are those of powers of 2.
            let decayed = s.mul(decayed, s.splat(std::f32::consts::LN_2));
            let mut d_step = s.mul_add(input, written, decayed);
            if scan.softplus {
                let raw = s.add(s.load(&delta[here..]), bias);
                d_step = s.mul(d_step, sigmoid(s, raw));
            }
            s.store(&mut delta[here..], d_step);
            biased = s.add(biased, d_step);
            skipped = s.mul_add(d_y, input, skipped);
            s.store(&mut u[here..], s.mul_add(step, written, s.mul(skip, d_y)));
        }
        s.store(&mut of_skip[at..], skipped);
        s.store(&mut of_bias[at..], biased);
    }

    /// Writes the gradients of a chunk of arrays, from token `first` on.
    #[inline(always)]
    fn write<S: Simd>(
        &mut self,
        s: S,
        first: usize,
        len: usize,
        (wide, narrow): (&mut [Option<RowsMut<'_, f32>>; 3], &mut [RowsMut<'_, f32>; 2]),
    ) {
        let (n, panel) = (self.plan.n, self.plan.panel);
        let Share { work: Work { u, delta, z, .. }, of_b, of_c, row, .. } = &mut *self.share;
        for (to, from) in wide.iter_mut().zip([&**u, &**delta, &**z]) {
            let Some(to) = to else { continue };
            for (t, row) in from.chunks_exact(panel).take(len).enumerate() {
                s.vectorize(WriteRow { row, factor: 1.0, to, i: first + t });
            }
        }
        for (to, from) in narrow.iter_mut().zip([&**of_b, &**of_c]) {
            for t in 0..len {
                for group in (0..n).step_by(S::LANES) {
                    let mut block = [s.splat(0.0); MAX_LANES];
                    for (i, block) in block[..S::LANES.min(n - group)].iter_mut().enumerate() {
                        *block = s.load(&from[(t * n + group + i) * S::LANES..]);
                    }
                    s.store(&mut row[group..], s.reduce_add_each(&block));
                }
                s.vectorize(WriteRow { row, factor: 1.0, to, i: first + t });
            }
        }
    }

    /// Adds what a chunk gives to the gradients of parameters.
    #[inline(always)]
    fn sum<S: Simd>(&mut self, vectors: usize) {
        let (n, panel) = (self.plan.n, self.plan.panel);
        let Share { of_rates, of_skip, of_bias, sums, .. } = &mut *self.share;
        let (rates, rest) = sums.split_at_mut(n * panel);
        for (row, sums) in rates.chunks_exact_mut(panel).enumerate() {
            for (v, sums) in sums.chunks_exact_mut(S::LANES).take(vectors).enumerate() {
                let from = &of_rates[(v * n + row) * S::LANES..];
                sums.iter_mut().zip(from).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        for (sums, from) in rest.chunks_exact_mut(panel).zip([&**of_skip, &**of_bias]) {
            sums.iter_mut().zip(from).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}
