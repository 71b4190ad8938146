//! Terms of scores that are dot products of queries with an embedding of each
//! distance, worked out for some queries at a time.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{
    Array2, Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, s,
};

use crate::element::Element;
use crate::engine::attend_backward::Gradients;
use crate::engine::parallel;
use crate::engine::recur::copy_rows;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::mask::Window;
use crate::score::smooth::{Smooth, Sums, add_by_distance};
use crate::score::{Plain, Score, define_shift, ends_of, shift_by_distance};
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::attend;
use crate::stages::outer::Outer;
use crate::stages::pass::{Out, Pass, Scratch};
use crate::stages::project::Project;
use crate::stages::sum;
use crate::stages::whole::{self, HIDDEN, RowFn};

/// Queries whose terms are there at once.
const BLOCK: usize = 256;

/// Embeddings of the distances from a query to keys.
#[derive(Clone, Debug)]
pub(crate) struct Distances {
    /// `[heads | 1, head_dim, reach]`
    matrix: Array3<f32>,
    /// The column of the query's own position, before which are those of keys
    /// before it.
    own: usize,
}

/// How a call goes over embeddings of distances.
pub(crate) struct Over<'a> {
    pub(crate) config: &'a attend::Config<Window, Plain>,
    /// Whether later keys are hidden.
    pub(crate) causal: bool,
    /// `[heads, head_dim]`: added to queries that meet keys, and to those that
    /// meet embeddings.
    pub(crate) biases: [Option<ArrayView2<'a, f32>>; 2],
    /// `[heads, reach]`: added to the terms of a distance, whatever the query.
    pub(crate) offsets: Option<ArrayView2<'a, f32>>,
    /// `[heads | 1, reach, value_dim]`: added to values, by distance.
    pub(crate) values: Option<ArrayView3<'a, f32>>,
}

impl Distances {
    /// A table `[heads | 1, reach, head_dim]`, in order of position.
    pub(crate) fn new(table: &Array3<f32>, own: usize) -> Result<Self> {
        if table.dim().1 == 0 || table.dim().0 == 0 {
            let expected = "[q_heads | 1, reach, head_dim] with a reach of at least 1";
            return Err(Error::shape("table", expected, table.shape()));
        }
        Ok(Self { matrix: table.view().permuted_axes([0, 2, 1]).as_standard_layout().into_owned(), own })
    }

    pub(crate) fn len(&self) -> usize {
        self.matrix.len()
    }

    /// The table as it was given.
    pub(crate) fn table(&self) -> ArrayView3<'_, f32> {
        self.matrix.view().permuted_axes([0, 2, 1])
    }

    /// How many distances there are.
    pub(crate) fn reach(&self) -> usize {
        self.matrix.dim().2
    }

    /// Refuses queries of other sizes.
    pub(crate) fn check(&self, dims: &Dims) -> Result<()> {
        let (heads, dim, reach) = self.matrix.dim();
        if (heads == 1 || heads == dims.q_heads) && dim == dims.head_dim {
            return Ok(());
        }
        let expected =
            format!("[q_heads | 1, reach, head_dim] = [{} | 1, _, {}]", dims.q_heads, dims.head_dim);
        Err(Error::shape("table", expected, &[heads, reach, dim]))
    }

    /// The column of a key so far behind a query: the last for those beyond.
    pub(crate) fn column(&self, behind: isize) -> usize {
        (self.own as isize).saturating_sub(behind).clamp(0, self.reach() as isize - 1) as usize
    }

    /// The embedding of a key so far behind a query.
    pub(crate) fn of(&self, head: usize, behind: isize) -> ArrayView1<'_, f32> {
        let head = if self.matrix.dim().0 == 1 { 0 } else { head };
        self.matrix.slice(s![head, .., self.column(behind)])
    }

    /// Softmax attention with these terms.
    pub(crate) fn attend<T: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        over: &Over<'_>,
        x: Qkv<'_, T, T, O>,
        mut out: Out<'_, O>,
    ) -> Result<()> {
        self.each_block(pass, over, &x, |pass, block| {
            let to = out.as_mut().map(|out| out.slice_mut(s![.., .., block.rows.clone(), ..]));
            let (k, v, lengths) = (x.k.reborrow(), x.v.reborrow(), x.lengths);
            match block.shifted[0] {
                Some(q) => over.block(pass, block.terms, Qkv { q, k, v, lengths, out: PhantomData }, to),
                None => {
                    let q = x.q.slice(s![.., .., block.rows.clone(), ..]);
                    over.block(pass, block.terms, Qkv { q, k, v, lengths, out: PhantomData }, to)
                }
            }
        })
    }

    /// The columns of which queries from the position `first` on meet any: of those before,
    /// whole tasks of [`Outer`].
    fn met(&self, over: &Over<'_>, first: isize, n: usize, kv_len: usize) -> Range<usize> {
        if over.offsets.is_some() || over.values.is_some() || n == 0 {
            return 0..self.reach();
        }
        let (own, most) = (self.own as isize, self.reach() as isize - 1);
        let start = own.saturating_sub(first + n as isize - 1).clamp(0, most);
        let last = if over.causal { own } else { own.saturating_add(kv_len as isize - 1 - first) };
        let start = start as usize / Outer::ROWS * Outer::ROWS;
        start..last.clamp(start as isize, most) as usize + 1
    }

    /// How many queries a block has at most.
    fn block_len<T, O>(x: &Qkv<'_, T, T, O>) -> usize {
        // Of sequences of one length a block of queries is one of the call's.
        let len = x.q.dim().2;
        if matches!(x.lengths, Lengths::Full) { len.min(BLOCK) } else { len }
    }

    /// Calls `run` for some queries after the other, with their terms.
    fn each_block<T: Element, O>(
        &self,
        pass: &mut Pass<'_>,
        over: &Over<'_>,
        x: &Qkv<'_, T, T, O>,
        mut run: impl FnMut(&mut Pass<'_>, Block<'_>) -> Result<()>,
    ) -> Result<()> {
        let (dims, isa, reach) = (over.config.checked(x.dims()?)?, over.config.isa(), self.reach());
        let (batch, heads, len, dim) = x.q.dim();
        let (full, block) = (matches!(x.lengths, Lengths::Full), Self::block_len(x));
        let mut terms = pass.rows((batch, heads, block, reach))?;
        let stride = terms.stride();
        let mut shifted = [None, None];
        for (shifted, bias) in shifted.iter_mut().zip(&over.biases) {
            if bias.is_some() {
                *shifted = Some(pass.rows((batch, heads, block, dim))?);
            }
        }
        for first in (0..len).step_by(block.max(1)) {
            let rows = first..(first + block).min(len);
            let (q, n) = (x.q.slice(s![.., .., rows.clone(), ..]), rows.len());
            let position = dims.kv_len as isize - len as isize + first as isize;
            let columns = if full { self.met(over, position, n, dims.kv_len) } else { 0..self.reach() };
            let (reach, matrix) = (columns.len(), self.matrix.slice(s![.., .., columns.clone()]));
            for (shifted, bias) in shifted.iter_mut().zip(&over.biases) {
                if let (Some(shifted), Some(bias)) = (shifted, bias) {
                    shift(pass, isa, q, *bias, shifted);
                }
            }
            let project = Project { isa, batch, heads, len: n, inner: dim, width: reach };
            let flops = || (2 * batch * heads * n * dim).saturating_mul(reach) as u64;
            pass.stage(flops, project.bytes(), |arena| {
                let matrix = matrix.broadcast((heads, dim, reach));
                let (Some(to), Some(matrix)) = (terms.view_mut(), matrix) else { return };
                let to = to.slice_move(s![.., .., ..n, ..reach]);
                let offsets = over.offsets.as_ref().and_then(|offsets| offsets.to_slice());
                match &shifted[1] {
                    Some(q) => {
                        project.run_on(q.view().slice(s![.., .., ..n, ..]), matrix, offsets, to, arena);
                    }
                    None => project.run_on(q, matrix, offsets, to, arena),
                }
            });
            let units = batch * heads;
            pass.stage(
                || 0,
                bytes_for::<u64>(claim_words(units)),
                |mut arena| {
                    let to = Parts::new(terms.numbers_mut(), block * stride, arena.take(claim_words(units)));
                    parallel::for_each(
                        parallel::threads(),
                        units,
                        |_| (),
                        |(), unit| {
                            let rows = q.slice(s![unit / heads, unit % heads, .., ..]);
                            for (terms, q) in to.take(unit).chunks_exact_mut(stride).zip(rows.rows()) {
                                whole::saturate(&mut terms[..reach], || {
                                    q.iter().all(|x| x.to_f32().is_finite())
                                });
                            }
                        },
                    );
                },
            );
            let terms = Terms {
                terms: terms.numbers(),
                stride: terms.stride(),
                rows: block,
                heads,
                reach,
                own: self.own as isize - columns.start as isize,
                starts: match x.lengths {
                    Lengths::Packed { queries, .. } => queries,
                    _ => &[],
                },
                q_start: full.then_some(position),
                factor: over.config.scale(&dims) as f32,
            };
            let shifted = shifted
                .each_ref()
                .map(|x| x.as_ref().map(|x: &Scratch<'_>| x.view().slice_move(s![.., .., ..n, ..])));
            run(pass, Block { terms, rows, columns, shifted })?;
        }
        Ok(())
    }

    /// Gradients, given that of the output: for some queries after the other, whose
    /// parts of those of keys, values and embeddings add up.
    pub(crate) fn backward<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        over: &Over<'_>,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        mut to: Option<DistanceGradients<'_>>,
    ) -> Result<()> {
        let (isa, reach) = (over.config.isa(), self.reach());
        let ((batch, heads, _, dim), value_dim) = (x.q.dim(), x.v.dim().3);
        let (len, sums) = (Self::block_len(&x), if over.values.is_some() { reach } else { 0 });
        let [mut dk, mut dv] = [pass.rows(x.k.dim())?, pass.rows(x.v.dim())?];
        let mut own = pass.rows((batch, heads, len, reach + sums))?;
        let mut dq = pass.rows((batch, heads, len, dim))?;
        let mut of_values = pass.rows((batch, heads, len, sums))?;
        let mut out = pass.rows((batch, heads, len, if sums > 0 { value_dim } else { 0 }))?;
        let outer = |len, cols| Outer { isa, batch, heads, len, rows: reach, cols };
        let table = pass.take(outer(len, dim).numbers())?;
        let values = pass.take(if sums > 0 { outer(len, value_dim).numbers() } else { 0 })?;
        table.fill(0.0);
        values.fill(0.0);
        if let Some(to) = &mut to {
            to.clear();
        }
        let kv_len = x.k.dim().2;
        self.each_block(pass, over, &x, |pass, Block { terms, rows, columns, shifted }| {
            let (n, d_out) = (rows.len(), d_out.slice(s![.., .., rows.clone(), ..]));
            let q = x.q.slice(s![.., .., rows.clone(), ..]);
            let lengths = x.lengths;
            // Keys after the last query are hidden from all.
            let seen = terms.q_start.filter(|_| over.causal).map_or(kv_len as isize, |q| q + n as isize);
            let keys = ..seen.clamp(0, kv_len as isize) as usize;
            let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., keys, ..]));
            let (reach, matrix) = (columns.len(), self.matrix.slice(s![.., .., columns.clone()]));
            if let Some(embeddings) = over.values {
                let project = Project { isa, batch, heads, len: n, inner: value_dim, width: reach };
                pass.stage(
                    || 0,
                    project.bytes(),
                    |arena| {
                        let embeddings = embeddings.broadcast((heads, reach, value_dim));
                        let (Some(to), Some(embeddings)) = (of_values.view_mut(), embeddings) else { return };
                        let to = to.slice_move(s![.., .., ..n, ..]);
                        project.run(d_out, embeddings.permuted_axes([0, 2, 1]), to, arena);
                    },
                );
                let to = out.view_mut().map(|out| out.slice_move(s![.., .., ..n, ..]));
                let (k, v) = (k.reborrow(), v.reborrow());
                match shifted[0] {
                    Some(q) => {
                        over.block(pass, terms, Qkv::<_, T, f32> { q, k, v, lengths, out: PhantomData }, to)?
                    }
                    None => {
                        let q = q.reborrow();
                        over.block(pass, terms, Qkv::<_, T, f32> { q, k, v, lengths, out: PhantomData }, to)?;
                    }
                }
            }
            let whole = over.values.map(|_| out.view().slice_move(s![.., .., ..n, ..]));
            let values_met = over.values.map(|_| of_values.numbers());
            let score = ByDistanceBack { terms, values: values_met, stride: of_values.stride() };
            // Without keys nothing is written.
            own.numbers_mut().fill(0.0);
            let gradients = to.as_mut().and_then(|to| {
                Some(Gradients {
                    q: to.q.slice_mut(s![.., .., rows.clone(), ..]),
                    k: dk.view_mut()?.slice_move(s![.., .., keys, ..]),
                    v: dv.view_mut()?.slice_move(s![.., .., keys, ..]),
                    sinks: None,
                    table: None,
                    of_queries: Some(own.view_mut()?.slice_move(s![.., .., ..n, ..reach + sums])),
                    of_keys: None,
                    gate: None,
                })
            });
            let config = over.masked(&terms).with_score(score);
            match shifted[0] {
                Some(q) => config.backward(
                    pass,
                    Qkv { q, k, v, lengths, out: PhantomData::<T> },
                    d_out,
                    whole,
                    gradients,
                )?,
                None => {
                    let q = q.reborrow();
                    config.backward(
                        pass,
                        Qkv { q, k, v, lengths, out: PhantomData::<T> },
                        d_out,
                        whole,
                        gradients,
                    )?;
                }
            }
            let own = own.view().slice_move(s![.., .., ..n, ..]);
            let project = Project { isa, batch, heads, len: n, inner: reach, width: dim };
            pass.stage(
                || 0,
                project.bytes(),
                |arena| {
                    let matrix = matrix.broadcast((heads, dim, reach));
                    let (Some(to), Some(matrix)) = (dq.view_mut(), matrix) else { return };
                    let to = to.slice_move(s![.., .., ..n, ..]);
                    project.run(
                        own.slice(s![.., .., .., ..reach]),
                        matrix.permuted_axes([0, 2, 1]),
                        to,
                        arena,
                    );
                },
            );
            let (of_table, first) = (outer(n, dim), columns.start);
            pass.stage(
                || 0,
                of_table.bytes(),
                |arena| {
                    let own = own.slice(s![.., .., .., ..reach]);
                    match shifted[1] {
                        Some(q) => of_table.add_from(first, own, q, table, arena),
                        None => of_table.add_from(first, own, q, table, arena),
                    }
                },
            );
            if sums > 0 {
                let of_values = outer(n, value_dim);
                pass.stage(
                    || 0,
                    of_values.bytes(),
                    |arena| {
                        of_values.add(own.slice(s![.., .., .., reach..]), d_out, values, arena);
                    },
                );
            }
            let of_terms = dq.view().slice_move(s![.., .., ..n, ..]);
            let [of_keys, of_values] = [&dk, &dv].map(|x| x.view().slice_move(s![.., .., keys, ..]));
            let [mut to_q, mut to_k, mut to_v] = [None, None, None];
            if let Some(to) = &mut to {
                let of_queries = to.q.slice(s![.., .., rows.clone(), ..]);
                for (to, from) in to.biases.iter_mut().zip([of_queries, of_terms]) {
                    if let Some(to) = to {
                        add_columns(to.view_mut(), from);
                    }
                }
                to_q = Some(to.q.slice_mut(s![.., .., rows, ..]));
                to_k = Some(to.k.slice_mut(s![.., .., keys, ..]));
                to_v = Some(to.v.slice_mut(s![.., .., keys, ..]));
            }
            sum::onto(pass, isa, of_terms, to_q);
            sum::onto(pass, isa, of_keys, to_k);
            sum::onto(pass, isa, of_values, to_v);
            Ok(())
        })?;
        if let Some(to) = to {
            outer(len, dim).write(table, 0, to.table.view_mut());
            if let Some(to) = to.values {
                outer(len, value_dim).write(values, 0, to.view_mut());
            }
        }
        Ok(())
    }
}

/// Some queries, with their terms.
struct Block<'a> {
    terms: Terms<'a>,
    rows: Range<usize>,
    /// Columns of the table that the terms are of.
    columns: Range<usize>,
    /// With their biases, where there are any.
    shifted: [Option<ArrayView4<'a, f32>>; 2],
}

/// Where [`Distances::backward`] writes, each of the shape of its array.
pub(crate) struct DistanceGradients<'a> {
    pub(crate) q: &'a mut Array4<f32>,
    pub(crate) k: &'a mut Array4<f32>,
    pub(crate) v: &'a mut Array4<f32>,
    /// `[heads | 1, reach, head_dim]`
    pub(crate) table: &'a mut Array3<f32>,
    pub(crate) biases: [Option<&'a mut Array2<f32>>; 2],
    pub(crate) values: Option<&'a mut Array3<f32>>,
}

impl DistanceGradients<'_> {
    fn clear(&mut self) {
        self.q.fill(0.0);
        self.k.fill(0.0);
        self.v.fill(0.0);
        self.biases.iter_mut().flatten().for_each(|to| to.fill(0.0));
    }
}

/// Adds the sums of each head's rows, in `f64`.
fn add_columns(mut to: ArrayViewMut2<'_, f32>, rows: ArrayView4<'_, f32>) {
    for ((h, c), to) in to.indexed_iter_mut() {
        let sum: f64 = rows.slice(s![.., h, .., c]).iter().map(|&x| f64::from(x)).sum();
        *to = (f64::from(*to) + sum) as f32;
    }
}

impl Over<'_> {
    /// Some queries.
    fn block<Q: Element, T: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        terms: Terms<'_>,
        x: Qkv<'_, Q, T, O>,
        out: Out<'_, O>,
    ) -> Result<()> {
        if self.values.is_some() {
            let dims = x.dims()?;
            let scale = self.config.scale(&dims) as f32;
            let f = ByDistance { terms, causal: self.causal };
            whole::run(pass, self.config.isa(), (x, &dims), scale, &f, self.values, out);
            return Ok(());
        }
        self.masked(&terms).with_score(terms).attend(pass, x, out)
    }

    /// The call with the mask of some queries.
    fn masked(&self, terms: &Terms<'_>) -> attend::Config<Window, Plain> {
        let mask = Window::new(None, self.causal.then_some(0));
        self.config.masked(terms.q_start.map_or(mask, |q_start| mask.at(q_start)))
    }
}

/// Writes queries with a bias of their head.
fn shift<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    q: ArrayView4<'_, T>,
    bias: ArrayView2<'_, f32>,
    to: &mut Scratch<'_>,
) {
    let ((_, heads, rows, dim), stride, n) = (to.dim(), to.stride(), q.dim().2);
    let units = q.dim().0 * heads;
    pass.stage(
        || (q.len()) as u64,
        bytes_for::<u64>(claim_words(units)),
        |mut arena| {
            let to = Parts::new(to.numbers_mut(), rows * stride, arena.take(claim_words(units)));
            let bias = AnyArray::F32(Heads::new(bias.insert_axis(Axis(0)).insert_axis(Axis(2))));
            let q = T::any(Heads::new(q));
            parallel::for_each(
                parallel::threads(),
                units,
                |_| (),
                |(), unit| {
                    let to = to.take(unit);
                    copy_rows(isa, q.rows(unit / heads, unit % heads, &(0..n)), to, stride);
                    let bias = bias.rows(0, unit % heads, &(0..1));
                    isa.dispatch(Add { rows: to, stride, n, dim, bias });
                },
            );
        },
    );
}

struct Add<'a> {
    rows: &'a mut [f32],
    stride: usize,
    n: usize,
    dim: usize,
    bias: AnyRows<'a>,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows.chunks_exact_mut(self.stride.max(1)).take(self.n) {
            for col in (0..self.dim).step_by(S::LANES) {
                let x = &mut row[col..self.dim];
                let sum = s.add(s.load_tail(x), self.bias.load(s, 0, col));
                s.store_tail(x, sum);
            }
        }
    }
}

/// Adds `factor` times the term of the distance from query to key.
#[derive(Clone, Copy, Debug)]
struct Terms<'a> {
    /// Rows `stride` apart, `rows` for each sequence and head.
    terms: &'a [f32],
    stride: usize,
    rows: usize,
    heads: usize,
    reach: usize,
    /// The column of distance 0, which need not be among them.
    own: isize,
    /// The first query of each packed sequence.
    starts: &'a [usize],
    q_start: Option<isize>,
    factor: f32,
}

impl Terms<'_> {
    /// The row of a query.
    #[inline(always)]
    fn index(&self, site: &Site, query: usize) -> usize {
        let unit = match self.starts.get(site.batch) {
            Some(start) => site.head * self.rows + start,
            None => (site.batch * self.heads + site.head) * self.rows,
        };
        unit + query
    }

    /// The terms of a query.
    #[inline(always)]
    fn row(&self, site: &Site, query: usize) -> &[f32] {
        &self.terms[self.index(site, query) * self.stride..][..self.reach]
    }

    /// The column of a key, were the table long enough.
    #[inline(always)]
    fn column(&self, site: &Site, query: usize, key: usize) -> isize {
        let ahead = (key as isize).saturating_sub(site.position(self.q_start, query));
        ahead.saturating_add(self.own)
    }
}

impl Score for Terms<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let column = self.column(site, query, key).clamp(0, self.reach as isize - 1);
        define_shift(score, f64::from(self.factor * self.row(site, query)[column as usize]))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        shift_by_distance(scores, self.row(site, query), self.column(site, query, first), self.factor);
    }
}

/// These terms for gradients: what weights meet of embeddings of values, too.
#[derive(Clone, Copy, Debug)]
struct ByDistanceBack<'a> {
    terms: Terms<'a>,
    /// Products of the output's gradient with embeddings of values, rows as those of
    /// the terms.
    values: Option<&'a [f32]>,
    stride: usize,
}

impl Score for ByDistanceBack<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.terms.define(site, query, key, score)
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        self.terms.apply(s, site, query, first, scores);
    }
}

impl Smooth for ByDistanceBack<'_> {
    fn of_queries(&self) -> [usize; 2] {
        [self.terms.reach, if self.values.is_some() { self.terms.reach } else { 0 }]
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        _: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        let column = self.terms.column(site, query, first);
        add_by_distance(s, to.query, gradients, column, self.terms.factor);
    }

    #[inline(always)]
    fn meet<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        weights: &[f32],
        gradients: &mut [f32],
        sums: &mut [f32],
    ) {
        let (column, reach) = (self.terms.column(site, query, first), self.terms.reach);
        let Some(row) = self.values.and_then(|x| x.get(self.terms.index(site, query) * self.stride..)) else {
            return;
        };
        let [start, end] = ends_of(column, reach, gradients.len());
        gradients[..start].iter_mut().for_each(|x| *x += row[0]);
        gradients[end..].iter_mut().for_each(|x| *x += row[reach - 1]);
        for (x, by) in gradients[start..end].iter_mut().zip(row.get(column.max(0) as usize..).unwrap_or(&[]))
        {
            *x += by;
        }
        add_by_distance(s, sums, weights, column, 1.0);
    }
}

/// Softmax weights with these terms, and those of all keys at each distance.
struct ByDistance<'a> {
    terms: Terms<'a>,
    causal: bool,
}

impl RowFn for ByDistance<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], more: &mut [f32]) {
        let position = site.position(self.terms.q_start, query);
        let seen = if self.causal {
            position.saturating_add(1).clamp(0, row.len() as isize) as usize
        } else {
            row.len()
        };
        let (row, later) = row.split_at_mut(seen);
        later.fill(HIDDEN);
        self.terms.apply(s, site, query, 0, row);
        whole::softmax(s, row);
        // As the terms are: the ends have those of all keys beyond.
        let (column, reach) = (self.terms.column(site, query, 0), self.terms.reach);
        let [start, end] = ends_of(column, reach, seen);
        let sum = |row: &[f32]| whole::sum(s, row, 0.0, |x| x);
        for (more, &weight) in
            more[column.clamp(0, reach as isize) as usize..].iter_mut().zip(&row[start..end])
        {
            *more = weight;
        }
        more[0] += sum(&row[..start]);
        more[reach - 1] += sum(&row[end..]);
    }
}
