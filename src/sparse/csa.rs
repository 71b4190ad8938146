//! CSA: compressed sparse attention.

use std::ops::Range;

use ndarray::{Array3, Array4, ArrayViewMut4, Axis, s};

use crate::attention::{Cost, Input, Margins};
use crate::cache::Cache;
use crate::card::{carded, exhibit};
use crate::definition;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::keys::{Per, Run, TokenLists};
use crate::math::rope::Rope;
use crate::score::Plain;
use crate::select::{
    Forced, IndexBranch, Indexed, Pick, Reduce, Rule, Scheme, Scored, Source, Summary, select,
    workspace_bytes,
};
use crate::stages::attend::Options;
use crate::stages::compressed::{
    Compressed, CompressedCache, Compressing, Compression, Pooling, compression_options, exhibited,
};
use crate::stages::listed::Order;
use crate::stages::opened::opened;
use crate::stages::selecting::Spans;

/// CSA: compressed sparse attention.
///
/// ```text
/// I_tw = sum_h w_th max(qI_th . kI_w, 0)      pools w of 4 tokens that t sees whole
/// S_t  = the k pools with the largest I_tw, the lower one of equals
/// o_t  = sum over S_t and the last 128 tokens j <= t of softmax (scale q_t . key)
///        key, with a sink in the sum
/// ```
///
/// rotated back by `t`. Keys are rows of one head that all query heads share, and
/// their values; recent tokens count twice, as they are and in a pool. From
/// DeepSeek-V4 (arXiv 2606.19348). Pools of keys, and those of the index, are
/// made, and continued while decoding, by
/// [`Pooling::overlapping`](crate::select::Pooling::overlapping) with a norm and
/// the rotation of the keys; the index is an [`IndexBranch`](crate::select::IndexBranch) with a key a pool.
///
/// Runs over arrays ([`Compressed`]) and, in prefill and in decoding, over caches
/// ([`CompressedCache`]): latent ones, in pages or not, and rings of the window. Index keys
/// may lie in a cache too. What is chosen is of rows of pools and, after them, the tokens that
/// are held.
///
/// Cost: `2 index_heads index_dim / 4` flops a visible pair for the index; `4
/// dim` a pair of a head, of `k + 128` keys at most.
///
/// ```
/// use attention_kernels::select::{IndexBranch, Indexed, Pooling};
/// use attention_kernels::sparse::{Compressed, Csa};
/// use attention_kernels::Attention;
/// use ndarray::{Array2, Array3, Array4};
///
/// let q = Array4::from_shape_fn((1, 4, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let kv = Array3::from_shape_fn((1, 300, 16), |(_, i, c)| ((i * (c + 1)) as f32).cos());
/// let rows = Array3::from_shape_fn((1, 300, 32), |(_, i, c)| ((i * (c + 2)) as f32).cos());
/// let pooling = Pooling::overlapping(Array2::zeros((4, 32)))?;
/// let mut pools = pooling.start(1, 16)?;
/// pooling.extend(&mut pools, rows.view(), Some(rows.view()))?;
/// let x = Compressed::new(q.view(), kv.view(), pools.view());
/// let branch = IndexBranch::new(q.view(), pools.view());
/// let out = Csa::builder(16).window(32).build()?.forward(Indexed::new(x, branch))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Csa {
    compression: Compression,
    k: usize,
}

/// Builds a [`Csa`].
#[derive(Clone, Debug)]
pub struct CsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    stride: usize,
    window: usize,
    sinks: Option<Vec<f32>>,
    rope: Option<Rope>,
}

/// Rows and pools of a call, and its index.
type Opened<'a, 'p, 'i, I> = (&'a Pooling<'p>, &'a IndexBranch<'i, I>);

impl Csa {
    /// `k` pools of 4 tokens a query.
    pub fn builder(k: usize) -> CsaBuilder {
        let (sinks, rope) = (None, None);
        CsaBuilder { options: Options::default(), k, stride: 4, window: 128, sinks, rope }
    }

    fn scheme(&self) -> Scheme {
        Scheme {
            unit: self.compression.stride,
            summary: Summary::First,
            per: Per::Group,
            q_block: 1,
            shares: None,
            reduce: Reduce::Rectified,
            pick: Pick { rule: Rule::TopK(self.k), forced: Forced::default() },
            causal: true,
            scored: Scored::Whole,
        }
    }

    /// Calls `run` with what is selected from.
    fn with_source<I: Element, R>(
        &self,
        (x, branch): Opened<'_, '_, '_, I>,
        run: impl FnOnce(&Source<'_>) -> Result<R>,
    ) -> Result<R> {
        let spans = Spans::new(&x.dims, &x.tokens);
        let places = (spans.lengths(&x.tokens), Some(x.tokens));
        let source = Source::any(self.compression.config.isa(), x.dims, x.rows_of_tokens(), places);
        run(&source.branch(&branch.reborrow()))
    }

    fn open<X: Compressing, I: Element, R>(
        &self,
        x: &Indexed<'_, X, I>,
        run: impl FnOnce(Opened<'_, '_, '_, I>) -> Result<R>,
    ) -> Result<R>
    where
        for<'a> Indexed<'a, X, I>: Input,
    {
        Input::dims(x)?;
        x.x.with(|rows| {
            self.compression.check(rows)?;
            let spans = Spans::new(&rows.dims, &rows.tokens);
            let slot = |i: usize| rows.tokens.slot(i);
            x.branch.check_keys(&self.scheme(), &rows.dims, &spans.lengths(&rows.tokens), Some(&slot))?;
            run((rows, &x.branch))
        })
    }

    /// The plan of whole pools by sequence and query.
    fn plan<'p>(&self, x: &Pooling<'_>, pools: impl Fn(usize, usize) -> &'p [u32]) -> Result<TokenLists> {
        self.compression.plan(x, |b, i, runs| {
            let (first, whole) = (runs.len(), x.seen(b, i) / self.compression.stride);
            for &pool in pools(b, i).iter().filter(|&&pool| (pool as usize) < whole) {
                match runs[first..].last_mut().filter(|run| run.range().end == pool as usize) {
                    Some(run) => run.len += 1,
                    None => runs.push(Run { start: pool, len: 1 }),
                }
            }
        })
    }

    fn choose<I: Element>(&self, x: Opened<'_, '_, '_, I>, workspace: &mut Workspace) -> Result<TokenLists> {
        let found = self.with_source(x, |source| select(source, &self.scheme(), workspace))?;
        let x = x.0;
        let queries = x.longest();
        self.plan(x, |b, i| {
            let list = b * queries + i;
            &found.candidates[found.offsets[list]..found.offsets[list + 1]]
        })
    }

    fn choice_bytes<I: Element>(&self, x: Opened<'_, '_, '_, I>) -> Result<usize> {
        self.with_source(x, |source| workspace_bytes(source, &self.scheme()))
    }

    fn bytes<I>(&self, (x, _): Opened<'_, '_, '_, I>, plan: &TokenLists) -> Result<usize> {
        self.compression.bytes(x, plan)
    }

    fn run<I, O: Element>(
        &self,
        (x, _): Opened<'_, '_, '_, I>,
        plan: &TokenLists,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.compression.run(x, plan, out, workspace)
    }

    fn define<I>(
        &self,
        (x, _): Opened<'_, '_, '_, I>,
        plan: &TokenLists,
    ) -> Result<(Array4<f64>, Array3<f64>)> {
        self.compression.define(x, plan)
    }

    fn define_choice<I: Element>(&self, (x, branch): Opened<'_, '_, '_, I>) -> Result<(TokenLists, Margins)> {
        let (stride, longest) = (self.compression.stride, x.longest());
        let (mut lists, mut margins) = (Vec::new(), Margins::default());
        for (b, i) in (0..x.dims.batch).flat_map(|b| (0..longest).map(move |i| (b, i))) {
            let of = x.sequence(b);
            if i >= of.queries.len() {
                lists.push(Vec::new());
                margins.doubtful.push(Vec::new());
                continue;
            }
            // Position `t` sees tokens up to itself.
            let t = i as isize + of.keys.len() as isize - of.queries.len() as isize;
            let whole = (0..of.keys.len() / stride).take_while(|w| ((w + 1) * stride) as isize - 1 <= t);
            let row = of.queries.start + i;
            let score = |w: usize| -> f64 {
                // Without heads there are no keys.
                let key = if branch.q.dim().1 > 0 { branch.row(b, of.slot, w) } else { Vec::new() };
                let head = |h: usize| {
                    let q = |c: usize| branch.q[[of.batch, h, row, c]].to_f64();
                    let dot: f64 = key.iter().enumerate().map(|(c, k)| q(c) * k).sum();
                    branch.weights.map_or(1.0, |w| f64::from(w[[of.batch, h, row]]))
                        * if dot < 0.0 { 0.0 } else { dot }
                };
                (0..branch.q.dim().1).map(head).sum()
            };
            let scores: Vec<f64> = whole.map(score).collect();
            let (ids, doubtful) = definition::select::chosen(&self.scheme().pick, &scores);
            lists.push(ids.iter().map(|&w| w as u32).collect::<Vec<_>>());
            let ranges: Vec<Range<usize>> = doubtful.iter().map(|&w| w..w + 1).collect();
            margins.doubtful.push(ranges);
        }
        Ok((self.plan(x, |b, i| &lists[b * longest + i])?, margins))
    }

    fn price<X: Compressing, I: Element>(&self, x: &Indexed<'_, X, I>, plan: &TokenLists) -> Result<Cost> {
        x.x.with(|rows| {
            let attend = self.compression.price(rows, plan)?;
            let of = |b: usize| (0..rows.sequence(b).queries.len()).map(move |i| rows.seen(b, i));
            let pairs: usize =
                (0..rows.dims.batch).flat_map(of).map(|seen| seen / self.compression.stride).sum();
            let (_, heads, _, dim) = x.branch.q.dim();
            Ok(Cost { flops: attend.flops + 2 * (pairs * heads * dim) as u64, ..attend })
        })
    }
}

compression_options!(CsaBuilder);

impl CsaBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a `k`, a stride or a window of 0, a sink that is NaN
    /// or a scale that is not finite, [`Error::Isa`] for an instruction set that
    /// the CPU lacks.
    pub fn build(self) -> Result<Csa> {
        if self.k == 0 {
            return Err(Error::value("k", "at least 1 pool", 0));
        }
        Ok(Csa { k: self.k, compression: self.compression()? })
    }
}

opened!(Csa, TokenLists, [T: Element, I: Element] Indexed<'_, Compressed<'_, T>, I>);
opened!(
    Csa, TokenLists,
    [Q: Element, C: Cache + ?Sized, O: Element, I: Element] Indexed<'_, CompressedCache<'_, Q, C, O>, I>
);

exhibit! {
    CsaExhibit of Csa, "sparse", "CSA", "arXiv 2606.19348";
    "the last 24 tokens and of the means of every 4 the 6 that an index picks, in one softmax; keys are their values";
    not "without its trained index";
    tokens false;
    build(x, _) {
        x.dims()?;
        Csa::builder(6).window(24)
    }
    extras(x, _) { exhibited(x, 4) }
    input<'a, T>(x, extras) -> Indexed<'a, Compressed<'a, T>, T> {
        let rows = Compressed::new(extras.keys.view(), extras.latents.view(), extras.rates.view());
        let keys = extras.matrices[0].view().insert_axis(Axis(1));
        let keys = keys.slice_move(s![.., ..x.q.dim().1.min(1), .., ..]);
        Indexed::new(rows, IndexBranch::new(x.q, keys))
    }
}
carded!(Csa, CsaExhibit);

#[cfg(test)]
mod tests;
