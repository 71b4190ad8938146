//! Gradients of softmax and sigmoid attention, tiled: weights are computed again
//! from each row's normaliser and never held for more than a block.
//!
//! With `P` the weights, `s` the final scores, `dO` the gradient of the output
//! and `delta_i = dO_i . O_i`:
//!
//! ```text
//! dV_j  = sum_i P_ij dO_i
//! dP_ij = dO_i . v_j
//! ds_ij = P_ij (dP_ij - delta_i)              softmax
//! ds_ij = P_ij (1 - P_ij) dP_ij               sigmoid
//! dq_i  = scale sum_j ds_ij f'_ij k_j         f' what the change of scores makes of ds
//! dk_j  = scale sum_i ds_ij f'_ij q_i
//! dsink = -sum_i P_i,sink delta_i
//! dT_e  = sum_ij ds_ij        over the pairs whose score has entry e of a table in it
//! dt_ie = sum_j ds_ij         over the keys whose score has number e of query i in it, or of the
//!                             pair's query or key: those that a change of scores asks for
//! dg_ic = dy_ic o_ic sigmoid'(g_ic)           outputs y = sigmoid(g) o, with dO = dy sigmoid(g)
//! ```
//!
//! Keys and values are taken a tile at a time. Where there are at least as many
//! key/value heads as threads, a thread takes a head: all five products of a
//! block are made while its weights are near. Where there are fewer, one pass
//! over tiles of keys makes `dK` and `dV`, and one over tiles of queries `dQ`,
//! which costs two more products. Sums are cut and ordered alike either way, so
//! that bits do not depend on threads.
//!
//! What is masked cannot matter: its `P` is 0, and so is its `ds`, whatever its
//! value is; operands that are not finite are 0 in the products in which only
//! weights of 0 meet them.

use std::ops::Range;

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::engine;
use crate::engine::call::{Call, Norm};
use crate::engine::parallel;
use crate::engine::row::SoftmaxSum;
use crate::engine::scores::{BLOCK, Geometry, KEY_TILE, QUERY_TILE, ScoreTile, Scratch, Span, Stored, runs};
use crate::engine::weights::weigh;
use crate::input::Sequence;
use crate::score::smooth::{AnySmooth, Sums};
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::exp::sigmoids;
use crate::simd::mem::{
    Arena, Heads, OutRows, Parts, Rows, RowsMut, bytes_for, bytes_for_shares, claim_words,
};
use crate::simd::pack::{PackColumns, SLICE};
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Kernel, MAX_LANES, Simd};

/// What is known of the forward pass: the output and the LSE, of which the
/// latter may be that of more keys than the call has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved<'a> {
    pub(crate) out: Heads<'a, f32>,
    /// `[batch, q_heads, q_len, 1]`
    pub(crate) lse: Heads<'a, f32>,
}

/// A call whose gradients are asked for.
#[derive(Clone, Copy)]
pub(crate) struct Back<'a, 'c> {
    pub(crate) call: &'a Call<'c>,
    pub(crate) score: &'a dyn AnySmooth,
    /// `[batch, q_heads, q_len, value_dim]`
    pub(crate) d_out: Heads<'a, f32>,
    pub(crate) saved: Option<Saved<'a>>,
    /// The output, where weights meet more than the values of the call.
    pub(crate) whole: Option<Heads<'a, f32>>,
}

/// Where gradients go, each of the shape of its array.
pub(crate) struct Gradients<'a> {
    pub(crate) q: ArrayViewMut4<'a, f32>,
    pub(crate) k: ArrayViewMut4<'a, f32>,
    pub(crate) v: ArrayViewMut4<'a, f32>,
    /// One a query head.
    pub(crate) sinks: Option<&'a mut [f32]>,
    /// Of the table that the score adds from, `[heads, entries]`.
    pub(crate) table: Option<&'a mut [f32]>,
    /// Of the numbers that queries have, and sums of their weights, `[batch, q_heads,
    /// q_len, numbers + sums]`.
    pub(crate) of_queries: Option<ArrayViewMut4<'a, f32>>,
    /// Of the number that each key has, `[batch, q_heads, kv_len, 1]`.
    pub(crate) of_keys: Option<ArrayViewMut4<'a, f32>>,
    /// Of the gates' logits, one after the other.
    pub(crate) gate: Option<&'a mut [f32]>,
}

/// The most bytes of gradients of queries that a thread holds.
const WHOLE: usize = 64 << 20;

/// Sizes of a call.
#[derive(Clone, Copy, Debug)]
struct Plan {
    g: Geometry,
    workers: usize,
    units: usize,
    /// Whether a thread takes whole key/value heads.
    whole: bool,
    group: usize,
    query_tiles: usize,
    /// `head_dim` and `value_dim` in panels.
    key_panels: usize,
    value_panels: usize,
    /// Entries of the table of a head.
    entries: usize,
    /// Numbers that each query has, and sums of its weights.
    of_queries: [usize; 2],
    /// Whether each key has a number.
    of_keys: bool,
}

impl Plan {
    fn new(call: &Call<'_>, score: &dyn AnySmooth) -> Self {
        let ([_, entries], of_queries) = (score.table_of(), score.of_each_query());
        let (q_len, kv_len) = call.longest(|_| true);
        let g = Geometry::new(call.isa, call.dims.head_dim, call.dims.value_dim, kv_len);
        let workers = parallel::threads();
        let units = call.dims.batch * call.dims.kv_heads;
        let rows = call.group() * q_len.next_multiple_of(QUERY_TILE);
        let own = of_queries.iter().sum::<usize>().next_multiple_of(MAX_LANES);
        let room = bytes_for::<f32>(rows * (call.dims.head_dim.next_multiple_of(g.panel) + own));
        Self {
            g,
            workers,
            units,
            whole: units >= workers && room <= WHOLE,
            group: call.group(),
            query_tiles: q_len.div_ceil(QUERY_TILE),
            key_panels: call.dims.head_dim.div_ceil(g.panel),
            value_panels: call.dims.value_dim.div_ceil(g.panel),
            entries,
            of_queries,
            of_keys: score.of_each_key(),
        }
    }

    /// Columns of what is added up for each query.
    fn own_cols(&self) -> usize {
        self.of_queries.iter().sum::<usize>().next_multiple_of(MAX_LANES)
    }

    /// Columns of gradients of queries and keys in scratch.
    fn key_cols(&self) -> usize {
        self.key_panels * self.g.panel
    }

    fn value_cols(&self) -> usize {
        self.value_panels * self.g.panel
    }

    /// Rows of gradients of queries that a thread holds.
    fn query_rows(&self) -> usize {
        if self.whole { self.group * self.query_tiles * QUERY_TILE } else { QUERY_TILE }
    }

    /// Numbers of each part of a thread's scratch.
    fn sizes(&self, call: &Call<'_>) -> [usize; 17] {
        let room = self.g.key_room;
        // Rows in another order are brought together first.
        let dim = call.order.map_or(0, |_| call.dims.head_dim.max(call.dims.value_dim));
        [
            room.next_multiple_of(self.g.panel) * self.g.head_dim,
            room * self.key_cols(),
            room.next_multiple_of(self.g.panel) * call.dims.value_dim,
            QUERY_TILE * call.dims.value_dim,
            QUERY_TILE * self.key_cols(),
            QUERY_TILE * self.value_cols(),
            BLOCK * KEY_TILE,
            BLOCK * KEY_TILE,
            KEY_TILE * BLOCK,
            KEY_TILE * BLOCK,
            room * self.key_cols(),
            room * self.value_cols(),
            self.query_rows() * self.key_cols(),
            KEY_TILE.max(QUERY_TILE) * dim,
            self.tables(),
            self.query_rows() * self.own_cols(),
            if self.of_keys { self.group * KEY_TILE } else { 0 },
        ]
    }

    fn share_bytes(&self, call: &Call<'_>) -> usize {
        let numbers: usize = self.sizes(call).into_iter().map(bytes_for::<f32>).sum();
        Scratch::bytes(&self.g) + numbers
    }

    /// Entries that the pairs of a tile of keys add to.
    fn tables(&self) -> usize {
        self.group * self.entries
    }

    /// Tiles of keys of all units: sums are cut alike whatever the threads are.
    fn pieces(&self) -> usize {
        if self.entries == 0 { 0 } else { self.units.saturating_mul(self.g.key_tiles) }
    }

    fn all_tables(&self) -> usize {
        self.pieces().saturating_mul(self.tables())
    }

    /// Rows of the output.
    fn rows(call: &Call<'_>) -> usize {
        call.out_rows()
    }
}

/// Bytes of scratch that a call needs; `saved` says whether the forward pass is
/// known.
pub(crate) fn workspace_bytes(call: &Call<'_>, score: &dyn AnySmooth, saved: bool) -> usize {
    let plan = Plan::new(call, score);
    let rows = Plan::rows(call);
    let forward =
        if saved { 0 } else { bytes_for::<f32>(rows * call.dims.value_dim) + bytes_for::<f32>(2 * rows) };
    let of_each_key = call.x.batch * call.dims.q_heads * call.dims.kv_len;
    let claims = 2 * bytes_for::<u64>(claim_words(call.x.batch * call.dims.kv_heads * call.dims.kv_len))
        + bytes_for::<u64>(claim_words(of_each_key))
        + 2 * bytes_for::<u64>(claim_words(rows));
    let tables = bytes_for::<f32>(plan.all_tables()) + bytes_for::<u64>(claim_words(plan.pieces()));
    let run = bytes_for_shares(plan.workers, plan.share_bytes(call)) + claims + tables;
    let before = if saved { 0 } else { engine::workspace_bytes(call) };
    let heads = bytes_for::<u64>(claim_words(call.x.batch * call.dims.q_heads));
    let gates =
        if call.gate.is_some() { bytes_for::<f32>(rows * call.dims.value_dim) + 2 * heads } else { 0 };
    gates + 3 * bytes_for::<f32>(rows) + forward + run.max(before)
}

/// Runs the kernel in scratch of at least [`workspace_bytes`].
pub(crate) fn run_in(back: &Back<'_, '_>, gradients: Gradients<'_>, mut arena: Arena<'_>) {
    let call = back.call;
    let (b, h, n, d) = (call.x.batch, call.dims.q_heads, call.dims.q_len, call.dims.value_dim);
    let rows = Plan::rows(call);
    let [delta, max, sum] = [arena.take::<f32>(rows), arena.take::<f32>(rows), arena.take::<f32>(rows)];
    let sigmoid = matches!(call.norm, Norm::Sigmoid { .. });
    // A weight of a sigmoid does not depend on the others.
    let forward = if back.saved.is_none() && !(sigmoid && call.gate.is_none()) {
        let out = arena.take::<f32>(rows * d);
        let figures = arena.take::<f32>(2 * rows);
        let (Ok(mut out), Ok(mut figures)) =
            (ArrayViewMut4::from_shape((b, h, n, d), out), ArrayViewMut4::from_shape((b, h, n, 2), figures))
        else {
            return;
        };
        let wanted = (!sigmoid).then(|| figures.view_mut());
        engine::run_in(&call.ungated(), out.view_mut(), wanted, arena.reborrow());
        Some((out, figures))
    } else {
        None
    };
    let out = match (&forward, back.whole) {
        (_, Some(whole)) => Some(whole),
        (Some((out, _)), None) => Some(Heads::new(out.view())),
        (None, None) => back.saved.map(|saved| saved.out),
    };
    let before = match (call.gate, out) {
        (Some(gate), Some(out)) => {
            let to = arena.take::<f32>(rows * d);
            let claims = [arena.take(claim_words(b * h)), arena.take(claim_words(b * h))];
            before_gates(call, gate, [back.d_out, out], to, gradients.gate, claims);
            ArrayView4::from_shape((b, h, n, d), &*to).ok()
        }
        _ => None,
    };
    let back = &match before {
        Some(d_out) => Back { d_out: Heads::new(d_out), ..*back },
        None => *back,
    };
    match (back.saved, &forward) {
        // What is left is whether gradients of outputs are finite.
        _ if sigmoid => {
            max.fill(0.0);
            sum.fill(0.0);
            row_dots(call, back.d_out, back.d_out, delta);
            delta.iter_mut().for_each(|x| *x *= 0.0);
        }
        (Some(saved), _) => {
            for (i, (max, sum)) in max.iter_mut().zip(&mut *sum).enumerate() {
                *max = saved.lse.rows(i / n / h, i / n % h, &(0..n)).at(i % n, 0);
                *sum = f32::from(*max != f32::NEG_INFINITY);
            }
            row_dots(call, back.d_out, out.unwrap_or(saved.out), delta);
        }
        (None, Some((forward, figures))) => {
            for ((max, sum), row) in max.iter_mut().zip(&mut *sum).zip(figures.rows()) {
                (*max, *sum) = (row[0], row[1]);
            }
            row_dots(call, back.d_out, out.unwrap_or(Heads::new(forward.view())), delta);
        }
        (None, None) => return,
    }
    let known = Known { delta, max, sum };
    if let (Some(sinks), Norm::Softmax { sinks: Some(logits) }) = (gradients.sinks, call.norm) {
        sink_gradients(call, &known, logits, sinks);
    }
    let plan = Plan::new(call, back.score);
    let partial = arena.take::<f32>(plan.all_tables());
    partial.fill(0.0);
    let mut to = [gradients.q, gradients.k, gradients.v];
    let mut of_each = [gradients.of_queries, gradients.of_keys];
    let of_rows = of_each.iter_mut().zip([false, true]).filter_map(|(to, keys)| Some((to.as_mut()?, keys)));
    for (to, keys) in to.iter_mut().zip([false, true, true]).chain(of_rows) {
        call.fill_rest(to, keys, 0.0);
    }
    sweep(back, &plan, &known, (to, of_each), partial, arena);
    if let Some(table) = gradients.table {
        table_gradients(&plan, call, back.score.table_of()[0], partial, table);
    }
}

/// One number for each row of the output, `[batch, q_heads, q_len]`.
struct Known<'a> {
    delta: &'a [f32],
    max: &'a [f32],
    sum: &'a [f32],
}

impl Known<'_> {
    fn at(call: &Call<'_>, batch: usize, head: usize, row: usize) -> usize {
        (batch * call.dims.q_heads + head) * call.dims.q_len + row
    }
}

/// `dots[row] = a_row . b_row`, in `f64`: what is left of a softmax's gradient
/// is a difference with it.
fn row_dots(call: &Call<'_>, a: Heads<'_, f32>, b: Heads<'_, f32>, dots: &mut [f32]) {
    let (heads, len, dim) = (call.dims.q_heads, call.dims.q_len, call.dims.value_dim);
    let tasks = if len == 0 { 0 } else { call.x.batch * heads };
    let mut claims = vec![0; claim_words(tasks)];
    let parts = Parts::new(dots, len, &mut claims);
    parallel::for_each(
        parallel::threads(),
        tasks,
        |_| (),
        |(), task| {
            let of = |x: Heads<'_, f32>, row, c| {
                f64::from(x.rows(task / heads, task % heads, &(0..len)).at(row, c))
            };
            for (row, dot) in parts.take(task).iter_mut().enumerate() {
                *dot = (0..dim).map(|c| of(a, row, c) * of(b, row, c)).sum::<f64>() as f32;
            }
        },
    );
}

/// Gradients of the output before its gates, and of these.
fn before_gates(
    call: &Call<'_>,
    gate: AnyArray<'_>,
    [d_out, out]: [Heads<'_, f32>; 2],
    to: &mut [f32],
    mut of_gates: Option<&mut [f32]>,
    [first, second]: [&mut [u64]; 2],
) {
    let (heads, len, dim) = (call.dims.q_heads, call.dims.q_len, call.dims.value_dim);
    let gate_dim = gate.dim().3;
    let tasks = if len == 0 { 0 } else { call.x.batch * heads };
    let to = Parts::new(to, len * dim, first);
    let parts = of_gates.as_deref_mut().map(|of_gates| Parts::new(of_gates, len * gate_dim, second));
    parallel::for_each(
        parallel::threads(),
        tasks,
        |_| (),
        |(), task| {
            let (batch, head, all) = (task / heads, task % heads, 0..len);
            call.isa.dispatch(BeforeGates {
                gate: gate.rows(batch, head, &all),
                d_out: AnyArray::F32(d_out).rows(batch, head, &all),
                out: AnyArray::F32(out).rows(batch, head, &all),
                to: to.take(task),
                of_gate: parts.as_ref().map_or(&mut [], |parts| parts.take(task)),
            });
        },
    );
    let shape = (call.x.batch, heads, len, gate_dim);
    if let Some(Ok(mut rest)) = of_gates.map(|x| ArrayViewMut4::from_shape(shape, x)) {
        call.fill_rest(&mut rest, false, 0.0);
    }
}

/// [`before_gates`] of a head.
struct BeforeGates<'a> {
    gate: AnyRows<'a>,
    d_out: AnyRows<'a>,
    out: AnyRows<'a>,
    to: &'a mut [f32],
    of_gate: &'a mut [f32],
}

impl Kernel for BeforeGates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { gate, d_out, out, to, of_gate } = self;
        let (dim, zero) = (d_out.cols(), s.splat(0.0));
        let one_a_head = gate.cols() == 1;
        for i in 0..d_out.len() {
            let mut total = zero;
            for c in (0..dim).step_by(S::LANES) {
                let d = d_out.load(s, i, c);
                let logit = if one_a_head { s.splat(gate.at(i, 0)) } else { gate.load(s, i, c) };
                let (open, shut) = sigmoids(s, logit);
                s.store_tail(&mut to[i * dim + c..(i + 1) * dim], s.mul(d, open));
                let of_logit = s.mul(s.mul(d, out.load(s, i, c)), s.mul(open, shut));
                if one_a_head {
                    total = s.add(total, of_logit);
                } else if !of_gate.is_empty() {
                    s.store_tail(&mut of_gate[i * dim + c..(i + 1) * dim], of_logit);
                }
            }
            if let Some(of_gate) = of_gate.get_mut(i).filter(|_| one_a_head) {
                *of_gate = s.reduce_add(total);
            }
        }
    }
}

/// Gradients of the sink logits: in `f64`, row by row.
fn sink_gradients(call: &Call<'_>, known: &Known<'_>, logits: &[f32], sinks: &mut [f32]) {
    for (head, (sink, &logit)) in sinks.iter_mut().zip(logits).enumerate() {
        let mut total = 0.0;
        for sequence in (0..call.dims.batch).map(|i| call.sequence(i)) {
            for row in sequence.queries {
                let at = Known::at(call, sequence.batch, head, row);
                let figures = SoftmaxSum { max: known.max[at], sum: known.sum[at] };
                let lse = f64::from(figures.lse());
                // A row that sees no key gives 0 whatever the sink is.
                if logit != f32::NEG_INFINITY && lse != f64::NEG_INFINITY {
                    total -= f64::from(known.delta[at]) / (1.0 + (lse - f64::from(logit)).exp());
                }
            }
        }
        *sink = total as f32;
    }
}

/// Adds up what tiles of keys have added to entries, in `f64`.
fn table_gradients(plan: &Plan, call: &Call<'_>, heads: usize, partial: &[f32], table: &mut [f32]) {
    let (entries, kv_heads, tiles) = (plan.entries, call.dims.kv_heads, plan.g.key_tiles);
    for (i, to) in table.iter_mut().enumerate() {
        let (head, entry) = (i / entries, i % entries);
        // All heads share a table of one.
        let of = if heads == 1 { 0..call.dims.q_heads } else { head..head + 1 };
        let units = (0..call.dims.batch).flat_map(|b| of.clone().map(move |h| (b, h)));
        let pieces = units.flat_map(|(b, h)| {
            let unit = b * kv_heads + h / plan.group;
            let at = move |tile| (unit * tiles + tile) * plan.tables() + h % plan.group * entries + entry;
            (0..tiles).map(at)
        });
        *to = pieces.map(|at| f64::from(partial[at])).sum::<f64>() as f32;
    }
}

/// The passes over tiles.
fn sweep(
    back: &Back<'_, '_>,
    plan: &Plan,
    known: &Known<'_>,
    ([q, k, v], [of_queries, of_keys]): ([ArrayViewMut4<'_, f32>; 3], [Option<ArrayViewMut4<'_, f32>>; 2]),
    partial: &mut [f32],
    mut arena: Arena<'_>,
) {
    let call = back.call;
    let key_rows = call.x.batch * call.dims.kv_heads * call.dims.kv_len;
    let q = OutRows::new(q, arena.take(claim_words(Plan::rows(call))));
    let k = OutRows::new(k, arena.take(claim_words(key_rows)));
    let v = OutRows::new(v, arena.take(claim_words(key_rows)));
    let of_queries = of_queries.map(|to| OutRows::new(to, arena.take(claim_words(Plan::rows(call)))));
    let of_each_key = call.x.batch * call.dims.q_heads * call.dims.kv_len;
    let of_keys = of_keys.map(|to| OutRows::new(to, arena.take(claim_words(of_each_key))));
    let tables = Parts::new(partial, plan.tables(), arena.take(claim_words(plan.pieces())));
    let heads = call.dims.kv_heads;
    let task = |unit: usize| {
        let sequence = call.sequence(unit / heads);
        Task {
            back,
            plan: *plan,
            known,
            unit,
            kv_head: unit % heads,
            sequence,
            to: [&q, &k, &v],
            of_each: [of_queries.as_ref(), of_keys.as_ref()],
            tables: &tables,
        }
    };
    let mut run = |tasks: usize, work: &(dyn Fn(&mut Room<'_>, usize) + Sync)| {
        let mut arena = arena.reborrow();
        let shares = arena.shares(plan.workers, plan.share_bytes(call));
        let start = |worker: usize| Room::take(&mut shares.take(worker), plan, call);
        parallel::for_each(plan.workers, tasks, start, |room, i| work(room, i));
    };
    if plan.whole {
        run(plan.units, &|room, unit| {
            let task = task(unit);
            call.isa.dispatch(Whole { task: &task, room });
        });
        return;
    }
    let key_tiles = plan.g.key_tiles;
    run(plan.units * key_tiles, &|room, i| {
        let task = task(i / key_tiles);
        call.isa.dispatch(KeyTile { task: &task, room, tile: i % key_tiles });
    });
    let query_tiles = plan.query_tiles;
    run(plan.units * plan.group * query_tiles, &|room, i| {
        let task = task(i / query_tiles / plan.group);
        let member = i / query_tiles % plan.group;
        call.isa.dispatch(QueryTile { task: &task, room, member, tile: i % query_tiles });
    });
}

/// What one thread works in.
struct Room<'a> {
    score: Scratch<'a>,
    /// A tile of keys, in lanes and in columns, and of values in lanes.
    keys: &'a mut [f32],
    key_cols: &'a mut [f32],
    values: &'a mut [f32],
    /// A tile of gradients of outputs, and of queries and these in columns.
    d_out: &'a mut [f32],
    query_cols: &'a mut [f32],
    d_out_cols: &'a mut [f32],
    /// Scores before their change, of a block of rows, and gradients of weights.
    raw: &'a mut [f32],
    d_weights: &'a mut [f32],
    /// Weights and gradients of scores, keys as rows.
    weights_t: &'a mut [f32],
    d_scores_t: &'a mut [f32],
    /// Gradients.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    dq: &'a mut [f32],
    /// Rows that lie apart, brought together.
    rows: &'a mut [f32],
    /// Gradients of the entries of a table, one part for each head of the group.
    table: &'a mut [f32],
    /// Of the numbers of queries, with sums of weights, and of those of keys, one part
    /// for each head of the group.
    of_queries: &'a mut [f32],
    of_keys: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn take(arena: &mut Arena<'a>, plan: &Plan, call: &Call<'_>) -> Self {
        let score = Scratch::take(arena, &plan.g);
        let [
            keys,
            key_cols,
            values,
            d_out,
            query_cols,
            d_out_cols,
            raw,
            d_weights,
            weights_t,
            d_scores_t,
            dk,
            dv,
            dq,
            rows,
            table,
            of_queries,
            of_keys,
        ] = plan.sizes(call).map(|n| arena.take::<f32>(n));
        Self {
            score,
            keys,
            key_cols,
            values,
            d_out,
            query_cols,
            d_out_cols,
            raw,
            d_weights,
            weights_t,
            d_scores_t,
            dk,
            dv,
            dq,
            rows,
            table,
            of_queries,
            of_keys,
        }
    }
}

/// One key/value head of one sequence.
struct Task<'a, 'c> {
    back: &'a Back<'a, 'c>,
    plan: Plan,
    known: &'a Known<'a>,
    sequence: Sequence,
    unit: usize,
    kv_head: usize,
    to: [&'a OutRows<'a, f32>; 3],
    of_each: [Option<&'a OutRows<'a, f32>>; 2],
    /// Of each unit and tile of keys.
    tables: &'a Parts<'a, f32>,
}

/// Which gradients a step adds to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    All,
    Keys,
    Queries,
}

/// A head at once.
struct Whole<'a, 'b, 'c, 'r> {
    task: &'a Task<'b, 'c>,
    room: &'a mut Room<'r>,
}

impl Kernel for Whole<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, room } = self;
        room.dq.fill(0.0);
        room.of_queries.fill(0.0);
        for tile in 0..task.sequence.keys.len().div_ceil(KEY_TILE) {
            task.load_keys(s, room, tile);
            task.clear(room);
            for (member, query_tile) in task.query_tiles() {
                let first = (member * task.plan.query_tiles + query_tile) * QUERY_TILE;
                task.step(s, room, tile, (member, query_tile), first, Want::All);
            }
            task.write_keys(s, room, tile);
        }
        for (member, query_tile) in task.query_tiles() {
            let first = (member * task.plan.query_tiles + query_tile) * QUERY_TILE;
            task.write_queries(s, room, (member, query_tile), first);
        }
    }
}

/// A tile of keys with all queries.
struct KeyTile<'a, 'b, 'c, 'r> {
    task: &'a Task<'b, 'c>,
    room: &'a mut Room<'r>,
    tile: usize,
}

impl Kernel for KeyTile<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, room, tile } = self;
        if tile * KEY_TILE >= task.sequence.keys.len() {
            return;
        }
        task.load_keys(s, room, tile);
        task.clear(room);
        for at in task.query_tiles() {
            task.step(s, room, tile, at, 0, Want::Keys);
        }
        task.write_keys(s, room, tile);
    }
}

/// A tile of queries with all keys.
struct QueryTile<'a, 'b, 'c, 'r> {
    task: &'a Task<'b, 'c>,
    room: &'a mut Room<'r>,
    member: usize,
    tile: usize,
}

impl Kernel for QueryTile<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, room, member, tile } = self;
        if tile * QUERY_TILE >= task.sequence.queries.len() {
            return;
        }
        room.dq.fill(0.0);
        room.of_queries.fill(0.0);
        for key_tile in 0..task.sequence.keys.len().div_ceil(KEY_TILE) {
            task.load_keys(s, room, key_tile);
            task.step(s, room, key_tile, (member, tile), 0, Want::Queries);
        }
        task.write_queries(s, room, (member, tile), 0);
    }
}

impl<'a, 'c> Task<'a, 'c> {
    fn call(&self) -> &'a Call<'c> {
        self.back.call
    }

    /// Heads of the group and tiles of their queries.
    fn query_tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let tiles = self.sequence.queries.len().div_ceil(QUERY_TILE);
        (0..self.plan.group).flat_map(move |member| (0..tiles).map(move |tile| (member, tile)))
    }

    fn keys(&self, tile: usize) -> Range<usize> {
        tile * KEY_TILE..((tile + 1) * KEY_TILE).min(self.sequence.keys.len())
    }

    fn queries(&self, tile: usize) -> Range<usize> {
        tile * QUERY_TILE..((tile + 1) * QUERY_TILE).min(self.sequence.queries.len())
    }

    /// Some rows of an array of keys, in the order of the call.
    #[inline(always)]
    fn key_rows<'r, S: Simd>(
        &self,
        s: S,
        x: AnyArray<'r>,
        keys: &Range<usize>,
        dim: usize,
        room: &'r mut [f32],
    ) -> AnyRows<'r> {
        let (start, call) = (self.sequence.keys.start, self.call());
        let rows = |rows: &Range<usize>| x.rows(self.sequence.batch, self.kv_head, rows);
        match call.order {
            None => rows(&(start + keys.start..start + keys.end)),
            Some(_) => {
                let runs = call.key_runs(&self.sequence, keys.clone());
                gather(s, dim, runs.map(|(i, run)| (i, rows(&run))), room)
            }
        }
    }

    /// Likewise of queries or what is as they are.
    #[inline(always)]
    fn query_rows<'r, S: Simd>(
        &self,
        s: S,
        of: impl Fn(&Range<usize>) -> AnyRows<'r>,
        queries: &Range<usize>,
        dim: usize,
        room: &'r mut [f32],
    ) -> AnyRows<'r> {
        let (start, call) = (self.sequence.queries.start, self.call());
        match call.order {
            None => of(&(start + queries.start..start + queries.end)),
            Some(_) => {
                let runs = call.query_runs(&self.sequence, queries.clone());
                gather(s, dim, runs.map(|(i, run)| (i, of(&run))), room)
            }
        }
    }

    #[inline(always)]
    fn load_keys<S: Simd>(&self, s: S, room: &mut Room<'_>, tile: usize) {
        let Some([keys, values]) = self.call().x.kv.arrays() else { return };
        let (range, dims) = (self.keys(tile), &self.call().dims);
        let rows = self.key_rows(s, values, &range, dims.value_dim, room.rows);
        rows.pack_keys(s, room.values);
        let rows = self.key_rows(s, keys, &range, dims.head_dim, room.rows);
        rows.pack_keys(s, room.keys);
        pack_columns(s, rows, room.key_cols, self.plan.g.key_room);
    }

    #[inline(always)]
    fn clear(&self, room: &mut Room<'_>) {
        room.dk.fill(0.0);
        room.dv.fill(0.0);
        room.table.fill(0.0);
        room.of_keys.fill(0.0);
    }

    /// Writes the gradients of a tile of keys and values.
    #[inline(always)]
    fn write_keys<S: Simd>(&self, s: S, room: &mut Room<'_>, tile: usize) {
        let (range, call) = (self.keys(tile), self.call());
        let [_, k, v] = self.to;
        let (batch, head) = (self.sequence.batch, self.kv_head);
        for (to, from, cols) in [(k, &*room.dk, self.plan.key_cols()), (v, &*room.dv, self.plan.value_cols())]
        {
            for (i, rows) in call.key_runs(&self.sequence, range.clone()) {
                write(s, to.take(batch, head, rows), &from[i * cols..], cols);
            }
        }
        if let Some(to) = self.of_each[1] {
            for (member, from) in room.of_keys.chunks_exact(KEY_TILE).enumerate() {
                for (first, rows) in call.key_runs(&self.sequence, range.clone()) {
                    let mut to = to.take(batch, self.kv_head * self.plan.group + member, rows);
                    (0..to.len()).for_each(|i| to.set(i, 0, from[first + i]));
                }
            }
        }
        if !room.table.is_empty() {
            self.tables.take(self.unit * self.plan.g.key_tiles + tile).copy_from_slice(room.table);
        }
    }

    /// Writes those of a tile of queries, from row `first` of the scratch on.
    #[inline(always)]
    fn write_queries<S: Simd>(
        &self,
        s: S,
        room: &mut Room<'_>,
        (member, tile): (usize, usize),
        first: usize,
    ) {
        let (range, call) = (self.queries(tile), self.call());
        let (batch, head) = (self.sequence.batch, self.kv_head * self.plan.group + member);
        let of_queries = self.of_each[0].map(|to| (to, &*room.of_queries, self.plan.own_cols()));
        for (to, from, cols) in [(self.to[0], &*room.dq, self.plan.key_cols())].into_iter().chain(of_queries)
        {
            let from = &from[first * cols..];
            for (i, rows) in call.query_runs(&self.sequence, range.clone()) {
                write(s, to.take(batch, head, rows), &from[i * cols..], cols);
            }
        }
    }

    /// What a tile of queries and a tile of keys add to the gradients: those of
    /// the queries from row `first` of the scratch on.
    #[inline(always)]
    fn step<S: Simd>(
        &self,
        s: S,
        room: &mut Room<'_>,
        tile: usize,
        (member, query_tile): (usize, usize),
        first: usize,
        want: Want,
    ) {
        let (call, g) = (self.call(), self.plan.g);
        let head = self.kv_head * self.plan.group + member;
        let (rows, keys) = (self.queries(query_tile), self.keys(tile));
        let site = self.sequence.site(head);
        let hull = call.mask.hull(&site, rows.clone());
        if hull.end <= keys.start || keys.end <= hull.start {
            return;
        }
        let sequence = self.sequence.clone();
        let mut score = ScoreTile::new(call, g, sequence, head..head + 1, rows.clone(), &mut room.score);
        score.set_tile(tile);
        if !score.plan() {
            return;
        }
        score.load(s);
        let of = |rows: &Range<usize>| AnyArray::F32(self.back.d_out).rows(self.sequence.batch, head, rows);
        let d_out = self.query_rows(s, of, &rows, call.dims.value_dim, room.rows);
        d_out.pack_rows(s, room.d_out, call.dims.value_dim);
        if want != Want::Queries {
            pack_columns(s, d_out, room.d_out_cols, QUERY_TILE);
            let of = |rows: &Range<usize>| call.query_rows_of(&self.sequence, head, rows);
            let queries = self.query_rows(s, of, &rows, call.dims.head_dim, room.rows);
            pack_columns(s, queries, room.query_cols, QUERY_TILE);
        }
        let part = |n: usize, wanted| if wanted { member * n..(member + 1) * n } else { 0..0 };
        let entries = part(self.plan.entries, want != Want::Queries);
        let of_keys = part(KEY_TILE, want != Want::Queries && self.plan.of_keys);
        let own = if want == Want::Keys { 0 } else { self.plan.own_cols() };
        for block in score.blocks() {
            score.score(s, room.keys, Stored::Tile(0), block.clone());
            self.products(s, &score, room.d_out, room.values, keys.len(), &block, room.d_weights);
            for i in block.clone() {
                let at = (i - block.start) * KEY_TILE;
                let row = rows.start + i;
                let d_row = &mut room.d_weights[at..][..KEY_TILE];
                let raw = &mut room.raw[at..][..KEY_TILE];
                let to = Sums {
                    table: &mut room.table[entries.clone()],
                    query: &mut room.of_queries[(first + i) * own..][..own],
                    keys: &mut room.of_keys[of_keys.clone()],
                };
                self.finish_row(s, &mut score, &keys, i, at, row, raw, d_row, to);
            }
            let n = block.len();
            let width = keys.len().next_multiple_of(S::LANES);
            let d_scores = &room.d_weights[..n * KEY_TILE];
            if want != Want::Keys {
                let a = Rows::of_slice(d_scores, n, keys.len(), KEY_TILE);
                let cols = self.plan.key_cols();
                let dq = &mut room.dq[(first + block.start) * cols..];
                self.add(s, a, room.key_cols, g.key_room, call.dims.head_dim, dq, cols);
            }
            if want != Want::Queries {
                let transpose = |from: &[f32], to: &mut [f32]| {
                    s.vectorize(PackColumns {
                        from: Rows::of_slice(from, n, width, KEY_TILE),
                        to,
                        stride: BLOCK,
                    });
                };
                transpose(&score.scratch.scores[..n * KEY_TILE], room.weights_t);
                transpose(d_scores, room.d_scores_t);
                for (from, b, to, dim) in [
                    (&*room.weights_t, &*room.d_out_cols, &mut *room.dv, call.dims.value_dim),
                    (&*room.d_scores_t, &*room.query_cols, &mut *room.dk, call.dims.head_dim),
                ] {
                    let a = Rows::of_slice(from, keys.len(), n, BLOCK);
                    let cols = dim.next_multiple_of(g.panel);
                    let b = b.get(block.start * g.panel..).unwrap_or_default();
                    self.add(s, a, b, QUERY_TILE, dim, to, cols);
                }
            }
        }
    }

    /// `to += a b`, for `b` of `dim` columns in panels of `stride` rows.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a product")]
    fn add<S: Simd>(
        &self,
        s: S,
        a: Rows<'_, f32>,
        b: &[f32],
        stride: usize,
        dim: usize,
        to: &mut [f32],
        ldc: usize,
    ) {
        let panel = self.plan.g.panel;
        for col in (0..dim).step_by(panel) {
            let width = (dim - col).min(panel).next_multiple_of(S::LANES);
            let b = Rows::of_slice(&b[col * stride..], a.cols(), width, panel);
            s.vectorize(Product { a, b, c: &mut to[col..], ldc, update: Update::Add });
        }
    }

    /// `dO V^T` of a block of rows with the keys that some row of a group sees.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a product")]
    fn products<S: Simd>(
        &self,
        s: S,
        score: &ScoreTile<'_, '_, '_>,
        d_out: &[f32],
        values: &[f32],
        len: usize,
        rows: &Range<usize>,
        to: &mut [f32],
    ) {
        let (panel, dim) = (self.plan.g.panel, self.call().dims.value_dim);
        let d_out = Rows::of_slice(&d_out[rows.start * dim..], rows.len(), dim, dim);
        let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        for first in (0..len).step_by(panel) {
            let width = (len - first).min(panel).next_multiple_of(S::LANES);
            let values = Rows::of_slice(&values[first * dim..], dim, width, panel);
            let spans = &score.scratch.spans;
            let needed = |group| !Span::get(spans, group).within(&(first..first + width)).is_empty();
            runs(groups.clone(), rows.len(), needed, |run, needed| {
                if needed {
                    s.vectorize(Product {
                        a: d_out.part(run.clone(), 0..dim),
                        b: values,
                        c: &mut to[run.start * KEY_TILE + first..],
                        ldc: KEY_TILE,
                        update: Update::Set,
                    });
                }
            });
        }
    }

    /// Makes weights of a row's scores, in place, and gradients of the dot
    /// products of `d_row`, which are 0 where nothing is visible.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a row of five arrays")]
    fn finish_row<S: Simd>(
        &self,
        s: S,
        score: &mut ScoreTile<'_, '_, '_>,
        keys: &Range<usize>,
        i: usize,
        at: usize,
        row: usize,
        raw: &mut [f32],
        d_row: &mut [f32],
        to: Sums<'_>,
    ) {
        let call = self.call();
        let smooth = !call.score.is_identity();
        if smooth {
            raw.copy_from_slice(&score.scratch.scores[at..][..KEY_TILE]);
        }
        let site = self.sequence.site(score.heads.start);
        let finished = score.finish_row(s, &(0..KEY_TILE), i, at);
        let weights = &mut score.scratch.scores[at..][..KEY_TILE];
        let Some((factor, whole)) = finished else {
            weights.fill(0.0);
            d_row.fill(0.0);
            return;
        };
        let line = call.query_row(&self.sequence, row);
        let index = Known::at(call, self.sequence.batch, site.head, line);
        let figures = SoftmaxSum { max: self.known.max[index], sum: self.known.sum[index] };
        let delta = s.splat(self.known.delta[index]);
        weights[..whole.start].fill(0.0);
        weights[whole.end..].fill(0.0);
        d_row[..whole.start].fill(0.0);
        d_row[whole.end..].fill(0.0);
        weigh(s, call.norm, &mut weights[whole.clone()], factor, figures, &site);
        // A gradient that is not finite shows wherever its row is visible: its
        // columns are 0 in the products.
        let spoiled = s.splat(if self.known.delta[index].is_finite() { 0.0 } else { f32::NAN });
        let least = s.splat(f32::from_bits(1));
        let seen = whole.start..whole.end.min(keys.len());
        let (query, first) = (row, keys.start + seen.start);
        let [numbers, sums] = self.plan.of_queries;
        let (own, of_weights) = if to.query.is_empty() {
            (to.query, Default::default())
        } else {
            let (own, rest) = to.query.split_at_mut(numbers);
            (own, &mut rest[..sums])
        };
        if sums > 0 {
            for j in whole.clone().step_by(S::LANES) {
                let weight = s.load(&weights[j..]);
                let zero = s.lt(weight, least);
                s.store(&mut weights[j..], s.select(zero, s.splat(0.0), s.add(weight, spoiled)));
            }
            let (weights, d_row) = (&weights[seen.clone()], &mut d_row[seen.clone()]);
            self.back.score.meet_row(call.isa, &site, query, first, weights, d_row, of_weights);
        }
        for j in whole.clone().step_by(S::LANES) {
            let (weight, d_weight) = (s.load(&weights[j..]), s.load(&d_row[j..]));
            let slope = match call.norm {
                Norm::Softmax { .. } => s.mul(weight, s.sub(d_weight, delta)),
                Norm::Sigmoid { .. } => s.mul(s.mul(weight, s.sub(s.splat(1.0), weight)), d_weight),
            };
            // A weight of 0 is not seen, or as good as not.
            let zero = s.lt(weight, least);
            s.store(&mut weights[j..], s.select(zero, s.splat(0.0), s.add(weight, spoiled)));
            s.store(&mut d_row[j..], s.select(zero, s.splat(0.0), slope));
        }
        let scale = call.scale;
        if smooth {
            for x in &mut raw[seen.clone()] {
                *x *= scale;
            }
            let keys = to.keys.get_mut(seen.clone()).unwrap_or_default();
            let to = Sums { table: to.table, query: own, keys };
            let (raw, d_row) = (&mut raw[seen.clone()], &mut d_row[seen]);
            self.back.score.pull_row(call.isa, &site, query, first, raw, d_row, to);
        }
        for j in whole.step_by(S::LANES) {
            let x = s.mul(s.load(&d_row[j..]), s.splat(scale));
            let zero = s.lt(s.load(&weights[j..]), least);
            s.store(&mut d_row[j..], s.select(zero, s.splat(0.0), x));
        }
    }
}

/// Runs of rows that lie apart, one after the other.
#[inline(always)]
fn gather<'r, S: Simd>(
    s: S,
    dim: usize,
    runs: impl Iterator<Item = (usize, AnyRows<'r>)>,
    to: &'r mut [f32],
) -> AnyRows<'r> {
    let mut len = 0;
    for (i, run) in runs {
        len = i + run.len();
        run.pack_rows(s, &mut to[i * dim..len * dim], dim);
    }
    AnyRows::F32(Rows::of_slice(to, len, dim, dim))
}

/// Rows in panels of columns, `stride` rows apart; what is not finite is 0.
#[inline(always)]
pub(crate) fn pack_columns<S: Simd>(s: S, from: AnyRows<'_>, to: &mut [f32], stride: usize) {
    let mut finite = [1u8; QUERY_TILE.next_multiple_of(KEY_TILE) / SLICE];
    let slices = from.len().div_ceil(SLICE);
    from.pack_values(s, to, stride, &mut finite[..slices]);
    if finite[..slices].contains(&0) {
        let limit = s.splat(f32::INFINITY);
        for x in to.chunks_exact_mut(S::LANES) {
            let value = s.load(x);
            s.store(x, s.select(s.lt(s.abs(value), limit), value, s.splat(0.0)));
        }
    }
}

/// Writes rows that lie `stride` apart.
#[inline(always)]
fn write<S: Simd>(s: S, to: RowsMut<'_, f32>, from: &[f32], stride: usize) {
    let rows = to.len();
    let mut to = AnyRowsMut::F32(to);
    for i in 0..rows {
        to.write(s, i, &from[i * stride..][..stride], 1.0);
    }
}
