//! How a recurrence is cut up for threads.

use ndarray::ArrayViewMut4;

use crate::element::Element;
use crate::engine::kept::{Kept, Slots};
use crate::engine::parallel;
use crate::engine::recur::Form;
use crate::engine::recur::chunk::{
    Advance, Count, Finish, Geometry, Prepare, PrepareTotal, Prepared, Reads, Work, Write,
};
use crate::engine::recur::token::Walk;
use crate::engine::recur::{Normaliser, Place, Read, Source, Spec};
use crate::input::Sequence;
use crate::simd::any::{AnyOut, AnyRowsMut};
use crate::simd::mem::{
    self, Ahead, Arena, OutRows, Parts, Stream, bytes_for, bytes_for_shares, claim_words,
};

/// Sequences of at most as many tokens go token by token.
const SHORT: usize = 8;
/// Chunks that are prepared before any is advanced, for each thread.
const AHEAD: usize = 4;

/// The most units that a thread takes at once, where there are many for each.
const RUN: usize = 16;

/// Whether a sequence goes token by token. Depends on its length alone.
fn is_short(spec: &Spec<'_>, sequence: &Sequence) -> bool {
    match (spec.read, spec.form) {
        (Read::Total, _) | (_, Form::Chunked) => false,
        (_, Form::Recurrent) => true,
        (_, Form::Auto) => sequence.queries.len() <= SHORT,
    }
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    g: Geometry,
    workers: usize,
    /// Pairs of sequence and head.
    units: usize,
    /// Chunks of a unit that are prepared at once, where threads share units.
    wave: usize,
    /// Elements of the state of a unit, in panels.
    state: usize,
    /// Whether any sequence goes token by token, and whether any does not.
    short: bool,
    long: bool,
}

impl Plan {
    fn new(spec: &Spec<'_>) -> Self {
        let g = Geometry::new(spec);
        let (workers, units) = (parallel::threads(), spec.dims.batch * spec.dims.q_heads);
        let sequence = |i| spec.sequence(i);
        let longest = (0..spec.dims.batch)
            .map(|i| sequence(i).queries.len().max(sequence(i).keys.len()))
            .max()
            .unwrap_or(0);
        let chunks = longest.div_ceil(g.chunk.max(1));
        let shared = units < workers && units > 0 && chunks > 1;
        Self {
            g,
            workers,
            units,
            wave: if shared { (AHEAD * workers).div_ceil(units).min(chunks) } else { 0 },
            state: g.panels * g.state_panel(),
            short: (0..spec.dims.batch).any(|i| is_short(spec, &sequence(i))),
            long: (0..spec.dims.batch).any(|i| !is_short(spec, &sequence(i))),
        }
    }

    /// Elements of the values of a chunk, in panels.
    fn values(&self) -> usize {
        self.g.panels * self.g.value_panel()
    }

    /// Bytes for each thread.
    fn share(&self) -> usize {
        Work::bytes(&self.g)
            + bytes_for::<f32>(self.g.piece())
            + bytes_for::<f32>(self.values())
            + bytes_for::<f32>(self.state.max(self.g.rows * self.g.cols))
    }

    /// Pieces of a wave: chunks, and panels of states before and after them.
    fn pieces(&self) -> (usize, usize) {
        (self.units * self.wave, self.units * (self.wave + 1) * self.g.panels)
    }

    /// Bytes of the chunks of a wave, for all threads.
    fn shared(&self) -> usize {
        if self.wave == 0 {
            return 0;
        }
        let (chunks, states) = self.pieces();
        bytes_for::<f32>(chunks * self.g.piece())
            + bytes_for::<f32>(chunks * self.values())
            + bytes_for::<f32>(states * self.g.state_panel())
            + bytes_for::<u8>(chunks)
            + 4 * bytes_for::<u64>(claim_words(chunks.max(states)))
    }

    fn bytes(&self, spec: &Spec<'_>) -> usize {
        let rows = out_rows(spec);
        bytes_for::<u64>(claim_words(rows))
            + bytes_for::<u64>(claim_words(self.units))
            + bytes_for_shares(self.workers, self.share())
            + self.shared()
    }
}

fn out_rows(spec: &Spec<'_>) -> usize {
    if spec.silent {
        return 0;
    }
    let batch = if spec.dims.packed { 1 } else { spec.dims.batch };
    batch * spec.dims.q_heads * spec.dims.q_len
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes(spec: &Spec<'_>) -> usize {
    Plan::new(spec).bytes(spec)
}

/// Runs a recurrence from and to `state`, `[sequences, heads, state_dim,
/// columns]`, or from zero, in scratch of at least [`workspace_bytes`] and those of
/// the [slots](Slots::bytes). `out` has no rows if the recurrence is [silent](Spec::silent).
pub(crate) fn run_in<T: Element>(
    spec: &Spec<'_>,
    source: &dyn Source,
    state: Option<Kept<'_>>,
    mut out: ArrayViewMut4<'_, T>,
    mut arena: Arena<'_>,
) {
    let plan = Plan::new(spec);
    if !spec.silent {
        spec.lengths.fill_rest(&mut out, false, T::default());
    }
    let out = T::any_out(OutRows::new(out, arena.take(claim_words(out_rows(spec)))));
    let slots = state.as_ref().map_or(Slots::default(), |state| state.at);
    let claims = arena.take(claim_words(slots.states(plan.units, spec.dims.q_heads)));
    let run = Run { spec, source, plan, out, slots };
    let mut state = state.map(|state| state.numbers);
    if plan.short || (plan.long && plan.wave == 0) {
        let kept = (plan.g.rows * plan.g.cols).max(1);
        let states = state.as_deref_mut().map(|state| Parts::new(state, kept, claims));
        run.by_unit(states.as_ref(), arena.reborrow());
    }
    if plan.long && plan.wave > 0 {
        run.together(state, arena);
    }
}

struct Run<'a> {
    spec: &'a Spec<'a>,
    source: &'a dyn Source,
    plan: Plan,
    out: AnyOut<'a>,
    slots: Slots<'a>,
}

/// What a thread works in.
struct Share<'a> {
    work: Work<'a>,
    state: &'a mut [f32],
    piece: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> Share<'a> {
    fn take(mut arena: Arena<'a>, plan: &Plan) -> Self {
        Self {
            work: Work::take(&mut arena, &plan.g),
            state: arena.take(plan.state.max(plan.g.rows * plan.g.cols)),
            piece: arena.take(plan.g.piece()),
            values: arena.take(plan.values()),
        }
    }
}

impl Run<'_> {
    /// What is read for some tokens, to be prefetched while others are worked on, and what is
    /// written: last, since stores wait for each other less than loads do.
    fn ahead(&self, at: Option<Place>, written: Stream) -> Ahead {
        let mut streams = [Stream::NONE; mem::STREAMS];
        if let Some(at) = at {
            for (to, from) in streams.iter_mut().zip(self.source.streams(&at)) {
                *to = from;
            }
        }
        streams[mem::STREAMS - 1] = written;
        Ahead::new(streams)
    }

    /// The outputs of the tokens that end among these.
    fn rows(&self, batch: usize, head: usize, tokens: &std::ops::Range<usize>) -> AnyRowsMut<'_> {
        let steps = self.spec.steps;
        self.out.take(batch, head, tokens.start / steps..tokens.end / steps)
    }

    /// The number of the state of a unit.
    fn state(&self, unit: usize) -> usize {
        self.slots.state(unit, self.spec.dims.q_heads)
    }

    fn unit(&self, unit: usize) -> (Sequence, usize) {
        let heads = self.spec.dims.q_heads;
        (self.spec.sequence(unit / heads), unit % heads)
    }

    /// The rows of outputs of some steps, of which those that are written are at the
    /// last step of each token.
    fn joined<'b>(&self, at: &Place, rows: &'b mut [f32]) -> &'b [f32] {
        if self.spec.joined {
            self.source.join(self.spec.isa, at, rows, self.plan.g.width);
        }
        rows
    }

    /// The first key that counts, of those that chunks start at: a head whose state alone
    /// is asked for has forgotten those before, and the state at the start.
    fn first(&self, sequence: &Sequence, head: usize) -> usize {
        let keys = &sequence.keys;
        if !self.spec.silent || self.spec.steps > 1 {
            return keys.start;
        }
        let past = keys.len().saturating_sub(self.source.remembers(head));
        keys.start + past / self.plan.g.chunk * self.plan.g.chunk
    }

    /// As [`Source::skip`] has it, or what the normaliser shares out.
    fn skip(&self, head: usize) -> &[f32] {
        match &self.spec.normaliser {
            Some(Normaliser::Shares { share }) => std::slice::from_ref(share),
            _ => self.source.skip(head),
        }
    }

    /// The count of keys that outputs read from a state with `last` as its last
    /// number.
    fn count(&self, head: usize, last: f32) -> Count {
        let before = match self.spec.normaliser {
            None | Some(Normaliser::Sum { .. }) => 0.0,
            Some(Normaliser::Shares { .. } | Normaliser::Bounded) => f64::from(last),
        };
        let total = self.spec.read == Read::Total;
        Count { before, keep: self.source.keep(head), add: if total { 0.0 } else { 1.0 } }
    }

    /// [`count`](Self::count) for a state in panels.
    fn count_in(&self, head: usize, state: &[f32]) -> Count {
        let g = self.plan.g;
        let (panel, col) = (g.cols.saturating_sub(1) / g.panel, g.cols.saturating_sub(1) % g.panel);
        let last = panel * g.state_panel() + g.rows.saturating_sub(1) * g.panel + col;
        self.count(head, state.get(last).copied().unwrap_or_default())
    }

    /// A thread takes a unit.
    fn by_unit(&self, states: Option<&Parts<'_, f32>>, mut arena: Arena<'_>) {
        let plan = &self.plan;
        let shares = arena.shares(plan.workers, plan.share());
        let start = |worker| Share::take(shares.take(worker), plan);
        let run = (plan.units / (plan.workers * RUN)).clamp(1, RUN);
        let tasks = plan.units.div_ceil(run);
        let work = |share: &mut Share<'_>, task: usize, next: Option<usize>| {
            let end = (task * run + run).min(plan.units);
            for unit in task * run..end {
                let (sequence, head) = self.unit(unit);
                let state = || states.map(|states| states.take(self.state(unit)));
                if is_short(self.spec, &sequence) {
                    let following = (unit + 1..end).next().or(next.map(|task| task * run));
                    let following = following.map_or_else(Ahead::nothing, |unit| {
                        let (sequence, head) = self.unit(unit);
                        let tokens = sequence.queries.clone();
                        let state = states.map_or(Stream::NONE, |states| states.stream(self.state(unit)));
                        self.ahead(Some(Place::new(&sequence, head, tokens)), state)
                    });
                    self.walk(share, state(), &sequence, head, following);
                } else if plan.wave == 0 {
                    self.whole(share, state(), &sequence, head);
                }
            }
        };
        if plan.short {
            parallel::for_each_ahead(plan.workers, tasks, start, work);
        } else {
            parallel::for_each(plan.workers, tasks, start, |share, task| work(share, task, None));
        }
    }

    /// A unit token by token, in the state as the caller has it. What follows
    /// is prefetched during its last token.
    fn walk(
        &self,
        share: &mut Share<'_>,
        kept: Option<&mut [f32]>,
        sequence: &Sequence,
        head: usize,
        mut following: Ahead,
    ) {
        let g = self.plan.g;
        let Share { work, state, .. } = share;
        let state = match kept {
            Some(kept) => kept,
            None => {
                let state = &mut state[..g.rows * g.cols];
                state.fill(0.0);
                state
            }
        };
        let silent = self.spec.silent;
        let rows = if silent { 0..0 } else { sequence.queries.clone() };
        let (mut out, steps) = (self.rows(sequence.batch, head, &rows), self.spec.steps);
        for tokens in chunks(&sequence.queries, g.chunk) {
            let (len, first) = (tokens.len(), tokens.start - sequence.queries.start);
            let last = tokens.end == sequence.queries.end;
            let at = Place::new(sequence, head, tokens);
            work.load_queries(self.spec, &g, self.source, &at);
            work.load_keys(self.spec, &g, self.source, &at);
            let (bonus, skip) = (self.source.bonus(head), self.skip(head));
            let count = self.count(head, state.last().copied().unwrap_or_default());
            let mut nothing = Ahead::nothing();
            let ahead = if last { &mut following } else { &mut nothing };
            self.spec.isa.dispatch(Walk {
                spec: self.spec,
                g,
                work,
                bonus,
                skip,
                len,
                state,
                stride: g.cols,
                first: 0,
                cols: g.cols,
                ahead,
            });
            if silent {
                continue;
            }
            let rows = self.joined(&at, work.out);
            self.spec.isa.dispatch(Finish {
                spec: self.spec,
                width: g.width,
                rows,
                to: &mut out,
                first: first / steps,
                past: first % steps,
                len,
                count,
            });
        }
    }

    /// A unit chunk by chunk.
    fn whole(&self, share: &mut Share<'_>, mut kept: Option<&mut [f32]>, sequence: &Sequence, head: usize) {
        let (plan, spec) = (&self.plan, self.spec);
        let g = plan.g;
        let Share { work, state, piece, values } = share;
        let state = &mut state[..plan.state];
        let from = self.first(sequence, head);
        load_state(&g, kept.as_deref().filter(|_| from == sequence.keys.start), state);
        let total = spec.read == Read::Total;
        let reads = !total && !spec.silent;
        let rows = if reads { sequence.queries.clone() } else { 0..0 };
        let (mut out, steps) = (self.rows(sequence.batch, head, &rows), spec.steps);
        for tokens in chunks(&(from..sequence.keys.end), g.chunk) {
            let (len, first) = (tokens.len(), tokens.start - sequence.keys.start);
            let coming = tokens.end..(tokens.end + g.chunk).min(sequence.keys.end);
            let at = Place::new(sequence, head, tokens);
            // This chunk's outputs and the next chunk's operands.
            let following = (!coming.is_empty()).then(|| Place::new(sequence, head, coming));
            let outputs = if reads { out.stream(first / steps..(first + len) / steps) } else { Stream::NONE };
            let ahead = &mut self.ahead(following, outputs);
            let to = Prepared::of(piece, &g);
            let finite = spec.isa.dispatch(Prepare {
                spec,
                g,
                source: self.source,
                at: at.clone(),
                to,
                // Where nothing is read of them but their products, values serve as they were loaded.
                values: if total { &mut [] } else { &mut values[..] },
                read: !spec.silent,
                work,
                ahead,
            });
            let from = &Prepared::of_ready(piece, &g);
            let count = self.count_in(head, state);
            if !finite {
                self.spoilt(work, head, &at, state, 0..g.panels);
            } else {
                // Panel by panel, which stays in the cache.
                let skip = self.skip(head);
                for (panel, values) in values.chunks_exact_mut(g.value_panel()).enumerate() {
                    let width = g.panel_width(panel);
                    let state = &mut state[panel * g.state_panel()..][..g.state_panel()];
                    spec.isa.dispatch(Write { g, len, from, values, state, width, ahead });
                    if reads {
                        let out = &mut *work.out;
                        spec.isa.dispatch(Reads {
                            spec,
                            g,
                            len,
                            from,
                            panel,
                            values,
                            state,
                            skip,
                            out,
                            ahead,
                        });
                    }
                    let values =
                        if total { (&work.v[panel * g.panel..], g.width) } else { (&*values, g.panel) };
                    spec.isa.dispatch(Advance { g, len, from, values, state, width, ahead });
                }
            }
            if reads {
                let rows = self.joined(&at, work.out);
                let (first, past) = (first / steps, first % steps);
                spec.isa.dispatch(Finish {
                    spec,
                    width: g.width,
                    rows,
                    to: &mut out,
                    first,
                    past,
                    len,
                    count,
                });
            }
        }
        if total && !spec.silent {
            for tokens in chunks(&sequence.queries, g.chunk) {
                self.read_total(work, piece, values, state, Place::new(sequence, head, tokens));
            }
        }
        if let Some(kept) = &mut kept {
            store_state(&g, state, kept);
        }
    }

    /// What some queries read of a state that has all tokens.
    fn read_total(
        &self,
        work: &mut Work<'_>,
        piece: &mut [f32],
        values: &mut [f32],
        state: &[f32],
        at: Place,
    ) {
        let (spec, g) = (self.spec, self.plan.g);
        let (skip, count) = (self.skip(at.head), self.count_in(at.head, state));
        let len = at.tokens.len();
        let mut to = self.out.take(at.batch, at.head, at.tokens.clone());
        // There is little else to do before it is written.
        to.stream(0..len).prefetch();
        let prepared = Prepared::of(piece, &g);
        spec.isa.dispatch(PrepareTotal { spec, g, source: self.source, at, to: prepared, values, work });
        let from = &Prepared::of_ready(piece, &g);
        let out = &mut *work.out;
        self.read_panels(from, len, values, state, skip, out);
        let rows = &*work.out;
        spec.isa.dispatch(Finish { spec, width: g.width, rows, to: &mut to, first: 0, past: 0, len, count });
    }

    /// What the queries of a chunk read, all panels.
    fn read_panels(
        &self,
        from: &Prepared<&[f32]>,
        len: usize,
        values: &[f32],
        state: &[f32],
        skip: &[f32],
        out: &mut [f32],
    ) {
        let (spec, g, ahead) = (self.spec, self.plan.g, &mut Ahead::nothing());
        for panel in 0..g.panels {
            let values = &values[panel * g.value_panel()..][..g.value_panel()];
            let state = &state[panel * g.state_panel()..][..g.state_panel()];
            spec.isa.dispatch(Reads { spec, g, len, from, panel, values, state, skip, out, ahead });
        }
    }

    /// A chunk with a NaN or infinity in it, token by token, for some panels
    /// of the state; the outputs are in `work.out` then.
    fn spoilt(
        &self,
        work: &mut Work<'_>,
        head: usize,
        at: &Place,
        state: &mut [f32],
        panels: std::ops::Range<usize>,
    ) {
        let g = self.plan.g;
        work.load_queries(self.spec, &g, self.source, at);
        work.load_keys(self.spec, &g, self.source, at);
        for (i, panel) in panels.enumerate() {
            let state = &mut state[i * g.state_panel()..][..g.state_panel()];
            self.spec.isa.dispatch(Walk {
                spec: self.spec,
                g,
                work,
                bonus: self.source.bonus(head),
                skip: self.skip(head),
                len: at.tokens.len(),
                state,
                stride: g.panel,
                first: panel * g.panel,
                cols: g.panel_width(panel),
                ahead: &mut Ahead::nothing(),
            });
        }
    }

    /// All threads take the same units, some chunks at once.
    fn together(&self, mut kept: Option<&mut [f32]>, mut arena: Arena<'_>) {
        let (plan, spec) = (&self.plan, self.spec);
        let (g, wave, panels) = (plan.g, plan.wave, plan.g.panels);
        let (chunk_count, state_count) = plan.pieces();
        let prepared = arena.take::<f32>(chunk_count * g.piece());
        let values = arena.take::<f32>(chunk_count * plan.values());
        let states = arena.take::<f32>(state_count * g.state_panel());
        let finite = arena.take::<u8>(chunk_count);
        // Without columns there are chunks, but no states.
        let pieces = chunk_count.max(state_count);
        let claims: [&mut [u64]; 4] = std::array::from_fn(|_| arena.take(claim_words(pieces)));
        let [prepared_claims, value_claims, state_claims, finite_claims] = claims;
        // The state before each chunk of a wave, and after the last.
        let stretch = (wave + 1) * plan.state;
        let size = g.rows * g.cols;
        for unit in 0..plan.units {
            let (sequence, head) = self.unit(unit);
            let whole = self.first(&sequence, head) == sequence.keys.start;
            let kept = kept.as_deref().filter(|_| whole);
            let kept = kept.map(|kept| &kept[self.state(unit) * size..][..size]);
            load_state(&g, kept, &mut states[unit * stretch..][..plan.state]);
        }
        // The chunk of a unit, if there is one.
        let place = |unit: usize, chunk: usize| {
            let (sequence, head) = self.unit(unit);
            let keys = &sequence.keys;
            let first = keys.start + chunk * g.chunk;
            let tokens = first..(first + g.chunk).min(keys.end);
            let asked = (self.first(&sequence, head)..keys.end).contains(&first);
            (asked && !is_short(spec, &sequence)).then(|| Place::new(&sequence, head, tokens))
        };
        let longest = |keys: bool| {
            let len = |unit| {
                let sequence = self.unit(unit).0;
                if keys { sequence.keys.len() } else { sequence.queries.len() }
            };
            (0..plan.units).map(len).max().unwrap_or(0)
        };
        let shares = |arena: &mut Arena<'_>, work: &(dyn Fn(&mut Share<'_>, usize) + Sync), tasks: usize| {
            let mut arena = arena.reborrow();
            let shares = arena.shares(plan.workers, plan.share());
            let start = |worker| Share::take(shares.take(worker), plan);
            parallel::for_each(plan.workers, tasks, start, work);
        };
        for first in (0..longest(true).div_ceil(g.chunk)).step_by(wave) {
            {
                let prepared = Parts::new(prepared, g.piece(), prepared_claims);
                let values = Parts::new(values, plan.values(), value_claims);
                let finite = Parts::new(finite, 1, finite_claims);
                let prepare = |share: &mut Share<'_>, task: usize| {
                    let Some(at) = place(task / wave, first + task % wave) else { return };
                    let to = Prepared::of(prepared.take(task), &g);
                    let (values, work) = (values.take(task), &mut share.work);
                    let ahead = &mut Ahead::nothing();
                    let prepare = Prepare {
                        spec,
                        g,
                        source: self.source,
                        at,
                        to,
                        values,
                        read: !spec.silent,
                        work,
                        ahead,
                    };
                    finite.take(task)[0] = u8::from(spec.isa.dispatch(prepare));
                };
                shares(&mut arena, &prepare, chunk_count);
            }
            let (prepared, finite) = (&*prepared, &*finite);
            {
                let values = Parts::new(values, g.value_panel(), value_claims);
                let states = Parts::new(states, g.state_panel(), state_claims);
                let advance = |share: &mut Share<'_>, task: usize| {
                    let (unit, panel) = (task / panels, task % panels);
                    let width = g.panel_width(panel);
                    let mut before = states.take(unit * (wave + 1) * panels + panel);
                    for chunk in 0..wave {
                        let after = states.take((unit * (wave + 1) + chunk + 1) * panels + panel);
                        after.copy_from_slice(before);
                        let piece = unit * wave + chunk;
                        if let Some(at) = place(unit, first + chunk) {
                            let len = at.tokens.len();
                            let values = values.take(piece * panels + panel);
                            let from = &Prepared::of_ready(&prepared[piece * g.piece()..], &g);
                            if finite[piece] != 0 {
                                let ahead = &mut Ahead::nothing();
                                spec.isa.dispatch(Write {
                                    g,
                                    len,
                                    from,
                                    values,
                                    state: before,
                                    width,
                                    ahead,
                                });
                                spec.isa.dispatch(Advance {
                                    g,
                                    len,
                                    from,
                                    values: (values, g.panel),
                                    state: after,
                                    width,
                                    ahead,
                                });
                            } else {
                                // Outputs in place of values.
                                let work = &mut share.work;
                                self.spoilt(work, at.head, &at, after, panel..panel + 1);
                                for (to, row) in
                                    values.chunks_exact_mut(g.panel).zip(work.out.chunks_exact(g.width))
                                {
                                    to[..width].copy_from_slice(&row[panel * g.panel..][..width]);
                                }
                            }
                        }
                        before = after;
                    }
                };
                shares(&mut arena, &advance, plan.units * panels);
            }
            if spec.read != Read::Total && !spec.silent {
                let (values, states) = (&*values, &*states);
                let read = |share: &mut Share<'_>, task: usize| {
                    let (unit, chunk) = (task / wave, task % wave);
                    let Some(at) = place(unit, first + chunk) else { return };
                    let (len, out) = (at.tokens.len(), &mut *share.work.out);
                    let values = &values[task * plan.values()..][..plan.values()];
                    let state = &states[unit * stretch + chunk * plan.state..][..plan.state];
                    if finite[task] != 0 {
                        let from = &Prepared::of_ready(&prepared[task * g.piece()..], &g);
                        let skip = self.skip(at.head);
                        self.read_panels(from, len, values, state, skip, out);
                    } else {
                        for (panel, values) in values.chunks_exact(g.value_panel()).enumerate() {
                            let width = g.panel_width(panel);
                            for (row, from) in out.chunks_exact_mut(g.width).zip(values.chunks_exact(g.panel))
                            {
                                row[panel * g.panel..][..width].copy_from_slice(&from[..width]);
                            }
                        }
                    }
                    let count = self.count_in(at.head, state);
                    let past = at.tokens.start % spec.steps;
                    let mut to = self.rows(at.batch, at.head, &at.tokens);
                    let rows = self.joined(&at, share.work.out);
                    spec.isa.dispatch(Finish {
                        spec,
                        width: g.width,
                        rows,
                        to: &mut to,
                        first: 0,
                        past,
                        len,
                        count,
                    });
                };
                shares(&mut arena, &read, chunk_count);
            }
            for unit in 0..plan.units {
                let states = &mut states[unit * stretch..][..stretch];
                states.copy_within(wave * plan.state.., 0);
            }
        }
        if spec.read == Read::Total && !spec.silent {
            let states = &*states;
            let chunks = longest(false).div_ceil(g.chunk);
            let read = |share: &mut Share<'_>, task: usize| {
                let (unit, chunk) = (task / chunks, task % chunks);
                let (sequence, head) = self.unit(unit);
                let first = sequence.queries.start + chunk * g.chunk;
                if first < sequence.queries.end {
                    let tokens = first..(first + g.chunk).min(sequence.queries.end);
                    let Share { work, piece, values, .. } = share;
                    let state = &states[unit * stretch..][..plan.state];
                    self.read_total(work, piece, values, state, Place::new(&sequence, head, tokens));
                }
            };
            shares(&mut arena, &read, plan.units * chunks);
        }
        if let Some(kept) = &mut kept {
            for unit in 0..plan.units {
                if !is_short(spec, &self.unit(unit).0) {
                    store_state(
                        &g,
                        &states[unit * stretch..][..plan.state],
                        &mut kept[self.state(unit) * size..][..size],
                    );
                }
            }
        }
    }
}

/// `tokens` in chunks.
fn chunks(tokens: &std::ops::Range<usize>, chunk: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = tokens.end;
    tokens.clone().step_by(chunk).map(move |first| first..(first + chunk).min(end))
}

/// A state as the caller has it (zero if there is none), in panels.
fn load_state(g: &Geometry, from: Option<&[f32]>, to: &mut [f32]) {
    to.fill(0.0);
    let Some(from) = from else { return };
    for (panel, to) in to.chunks_exact_mut(g.state_panel().max(1)).enumerate() {
        let cols = (panel * g.panel).min(g.cols)..((panel + 1) * g.panel).min(g.cols);
        for (to, from) in to.chunks_exact_mut(g.panel).zip(from.chunks_exact(g.cols.max(1))) {
            to[..cols.len()].copy_from_slice(&from[cols.clone()]);
        }
    }
}

/// The other way.
fn store_state(g: &Geometry, from: &[f32], to: &mut [f32]) {
    for (panel, from) in from.chunks_exact(g.state_panel().max(1)).enumerate() {
        let cols = (panel * g.panel).min(g.cols)..((panel + 1) * g.panel).min(g.cols);
        for (from, to) in from.chunks_exact(g.panel).zip(to.chunks_exact_mut(g.cols.max(1))) {
            to[cols.clone()].copy_from_slice(&from[..cols.len()]);
        }
    }
}
