//! CSA: compressed sparse attention.

use std::ops::Range;

use ndarray::{Array3, Array4, ArrayViewMut4, Axis, s};

use crate::attention::{Attention, Cost, Input, Margins, Selects};
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
use crate::stages::attend::{Options, check_out};
use crate::stages::compressed::{
    Compressed, CompressedCache, Compressing, Compression, Pooling, compression_options, exhibited,
};
use crate::stages::listed::Order;
use crate::stages::selecting::{Spans, difference};

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
/// may lie in a cache too.
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
        x: &Pooling<'_>,
        branch: &IndexBranch<'_, I>,
        run: impl FnOnce(&Source<'_>) -> Result<R>,
    ) -> Result<R> {
        self.check(x, branch)?;
        let spans = Spans::new(&x.dims, &x.tokens);
        let places = (spans.lengths(&x.tokens), Some(x.tokens));
        let source = Source::any(self.compression.config.isa(), x.dims, x.rows_of_tokens(), places);
        run(&source.branch(&branch.reborrow()))
    }

    /// Refuses a call that does not fit.
    fn check<I: Element>(&self, x: &Pooling<'_>, branch: &IndexBranch<'_, I>) -> Result<()> {
        self.compression.check(x)?;
        let spans = Spans::new(&x.dims, &x.tokens);
        let slot = |i: usize| x.tokens.slot(i);
        branch.check_keys(&self.scheme(), &x.dims, &spans.lengths(&x.tokens), Some(&slot))
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

    fn select_in<I: Element>(
        &self,
        x: &Pooling<'_>,
        branch: &IndexBranch<'_, I>,
        workspace: &mut Workspace,
    ) -> Result<TokenLists> {
        let found = self.with_source(x, branch, |source| select(source, &self.scheme(), workspace))?;
        let queries = x.longest();
        self.plan(x, |b, i| {
            let list = b * queries + i;
            &found.candidates[found.offsets[list]..found.offsets[list + 1]]
        })
    }

    fn define_select<I: Element>(
        &self,
        x: &Pooling<'_>,
        branch: &IndexBranch<'_, I>,
    ) -> Result<(TokenLists, Margins)> {
        self.check(x, branch)?;
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

    fn price<I: Element>(&self, x: &Pooling<'_>, branch: &IndexBranch<'_, I>) -> Result<Cost> {
        let attend = self.compression.price(x, &self.select_in(x, branch, &mut Workspace::new())?)?;
        let of = |b: usize| (0..x.sequence(b).queries.len()).map(move |i| x.seen(b, i));
        let pairs: usize = (0..x.dims.batch).flat_map(of).map(|seen| seen / self.compression.stride).sum();
        let (_, heads, _, dim) = branch.q.dim();
        Ok(Cost { flops: attend.flops + 2 * (pairs * heads * dim) as u64, ..attend })
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

/// The traits, over inputs of a type.
macro_rules! compressed {
    ([$($generics:tt)*] $input:ty) => {
        impl<$($generics)*, I: Element> Attention<Indexed<'_, $input, I>> for Csa {
            /// Selects first: scratch of the attention depends on what is selected.
            fn workspace_bytes(&self, x: Indexed<'_, $input, I>) -> Result<usize> {
                let index = self.select(x)?;
                x.x.with(|rows| {
                    let own = |source: &Source<'_>| workspace_bytes(source, &self.scheme());
                    let bytes = self.with_source(rows, &x.branch, own)?;
                    Ok(bytes.max(self.compression.bytes(rows, &index)?))
                })
            }

            fn forward_into(
                &self,
                x: Indexed<'_, $input, I>,
                out: ArrayViewMut4<'_, <$input as Input>::Out>,
                workspace: &mut Workspace,
            ) -> Result<()> {
                check_out(&x, &out)?;
                x.x.with(|rows| {
                    let plan = self.select_in(rows, &x.branch, workspace)?;
                    self.compression.run(rows, &plan, out, workspace)
                })
            }

            fn reference(&self, x: Indexed<'_, $input, I>) -> Result<Array4<f64>> {
                self.reference_on(x, &self.reference_select(x)?.0)
            }

            fn cost(&self, x: Indexed<'_, $input, I>) -> Result<Cost> {
                Input::dims(&x)?;
                x.x.with(|rows| self.price(rows, &x.branch))
            }
        }

        impl<$($generics)*, I: Element> Selects<Indexed<'_, $input, I>> for Csa {
            /// Of rows of pools and, after them, the tokens that are held.
            type Index = TokenLists;

            fn select(&self, x: Indexed<'_, $input, I>) -> Result<TokenLists> {
                Input::dims(&x)?;
                x.x.with(|rows| self.select_in(rows, &x.branch, &mut Workspace::new()))
            }

            fn workspace_bytes_on(
                &self,
                x: Indexed<'_, $input, I>,
                index: &TokenLists,
            ) -> Result<usize> {
                x.x.with(|rows| self.compression.bytes(rows, index))
            }

            fn forward_on_into(
                &self,
                x: Indexed<'_, $input, I>,
                index: &TokenLists,
                out: ArrayViewMut4<'_, <$input as Input>::Out>,
                workspace: &mut Workspace,
            ) -> Result<()> {
                check_out(&x, &out)?;
                x.x.with(|rows| {
                    self.check(rows, &x.branch)?;
                    self.compression.run(rows, index, out, workspace)
                })
            }

            fn reference_select(&self, x: Indexed<'_, $input, I>) -> Result<(TokenLists, Margins)> {
                Input::dims(&x)?;
                x.x.with(|rows| self.define_select(rows, &x.branch))
            }

            fn reference_on(
                &self,
                x: Indexed<'_, $input, I>,
                index: &TokenLists,
            ) -> Result<Array4<f64>> {
                Input::dims(&x)?;
                x.x.with(|rows| {
                    self.check(rows, &x.branch)?;
                    Ok(self.compression.define(rows, index)?.0)
                })
            }

            fn bound_on(&self, x: Indexed<'_, $input, I>, index: &TokenLists) -> Result<Array3<f64>> {
                Input::dims(&x)?;
                x.x.with(|rows| {
                    self.check(rows, &x.branch)?;
                    Ok(self.compression.define(rows, index)?.1)
                })
            }

            fn difference(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
                difference(a, b, margins)
            }
        }
    };
}
compressed!([T: Element] Compressed<'_, T>);
compressed!([Q: Element, C: Cache + ?Sized, O: Element] CompressedCache<'_, Q, C, O>);

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
mod tests {

    use super::*;
    use crate::cache::Cached;
    use crate::sparse::Hca;
    use crate::sparse::testing::{Arrays, compressed_is_its_definition, latents, near};

    /// Rows of the keys as pools, and as those of the index.
    fn input(x: &Arrays) -> Indexed<'_, Compressed<'_, f32>, f32> {
        let compressed = Compressed::new(x.q.view(), x.k.index_axis(Axis(1), 0), x.k.view());
        Indexed::new(compressed, IndexBranch::new(x.q.view(), x.k.view()))
    }

    #[test]
    fn kernels_are_the_definition() {
        for (sizes, stride) in [
            ([2, 4, 1, 70, 150, 24, 24], 4),
            ([1, 20, 1, 1, 600, 16, 16], 4),
            ([1, 20, 1, 10, 90, 16, 16], 4),
            ([2, 3, 1, 9, 9, 8, 8], 2),
        ] {
            let x = Arrays::integers(sizes, 1);
            let weights =
                Array3::from_shape_fn((sizes[0], sizes[1], sizes[3]), |(_, h, i)| ((h + i) % 5) as f32 - 1.0);
            let branch = input(&x).branch.weighted(weights.view());
            let x = Indexed::new(input(&x).x, branch);
            for isa in crate::Isa::available() {
                let builder = Csa::builder(7).stride(stride).window(11).sinks(vec![0.5; sizes[1]]).isa(isa);
                let csa = builder.rope(Rope::builder(6).theta(50.0).last().build().unwrap()).build().unwrap();
                let index = csa.select(x).unwrap();
                assert_eq!(index, csa.reference_select(x).unwrap().0, "{sizes:?}");
                assert_eq!(csa.forward_on(x, &index).unwrap(), csa.forward(x).unwrap());
                compressed_is_its_definition(&csa, x, csa.bound_on(x, &index).unwrap());
            }
        }
    }

    /// With a budget of all pools it is HCA with pools of as many tokens.
    #[test]
    fn all_pools_are_hca() {
        let x = Arrays::normal([2, 4, 1, 40, 100, 16, 16], 2);
        let csa = Csa::builder(100).window(20).build().unwrap();
        let hca = Hca::builder().stride(4).window(20).build().unwrap();
        near("all", &csa.forward(input(&x)).unwrap(), &hca.forward(input(&x).x).unwrap());
    }

    /// Pools count from when their last token is seen, one list serves all heads.
    #[test]
    fn later_tokens_change_nothing() {
        let mut x = Arrays::normal([1, 4, 1, 100, 100, 16, 16], 3);
        let csa = Csa::builder(5).window(9).build().unwrap();
        let before = csa.forward(input(&x)).unwrap();
        let index = csa.select(input(&x)).unwrap();
        assert_eq!(index.keys(0, 3, 99), 5 + 9);
        assert_eq!(index.keys(0, 3, 2), 3);
        // Rows of pools are those of keys, of which the 15th pool ends with 59.
        x.k.slice_mut(s![.., .., 60.., ..]).fill(f32::NAN);
        let after = csa.forward(input(&x)).unwrap();
        near(
            "before",
            &after.slice(s![.., .., ..60, ..]).to_owned(),
            &before.slice(s![.., .., ..60, ..]).to_owned(),
        );
        let one = x.q.slice(s![.., .., 50..51, ..]);
        let step = Compressed::new(one, x.k.slice(s![0..1, 0, 42..51, ..]), x.k.slice(s![.., .., ..12, ..]))
            .tokens(51);
        let step =
            csa.forward(Indexed::new(step, IndexBranch::new(one, x.k.slice(s![.., .., ..12, ..])))).unwrap();
        near("step", &step, &before.slice(s![.., .., 50..51, ..]).to_owned());
    }

    /// Over latent caches that hold the rows, of sequences of any lengths, in prefill and in
    /// decoding, with index keys in an array or a cache.
    #[test]
    fn caches_are_arrays() {
        let csa = Csa::builder(7).window(11).sinks(vec![0.5; 4]).build().unwrap();
        for (q_len, lengths) in [(70, [150, 90]), (1, [150, 33]), (9, [4, 150])] {
            let x = Arrays::integers([2, 4, 1, q_len, 150, 16, 16], 6);
            let pools = Arrays::integers([2, 1, 1, 1, 37, 16, 16], 7).k;
            let (cache, keys) =
                (latents::<f32>(&x.k, &lengths), latents::<f32>(&pools, &lengths.map(|n| n / 4)));
            let cached = CompressedCache::new(Cached::new(x.q.view(), &cache), pools.view());
            let branches =
                [IndexBranch::new(x.q.view(), pools.view()), IndexBranch::cached(x.q.view(), &keys)];
            for branch in branches {
                let cached = Indexed::new(cached, branch);
                let index = csa.select(cached).unwrap();
                assert_eq!(index, csa.reference_select(cached).unwrap().0, "{q_len}");
                compressed_is_its_definition(&csa, cached, csa.bound_on(cached, &index).unwrap());
                let out = csa.forward(cached).unwrap();
                for (b, &n) in lengths.iter().enumerate() {
                    let (q, kv) = (x.q.slice(s![b..b + 1, .., .., ..]), x.k.slice(s![b..b + 1, 0, ..n, ..]));
                    let pools = pools.slice(s![b..b + 1, .., .., ..]);
                    let alone = Indexed::new(Compressed::new(q, kv, pools), IndexBranch::new(q, pools));
                    let want = csa.forward(alone).unwrap();
                    near("cache", &out.slice(s![b..b + 1, .., .., ..]).to_owned(), &want);
                }
            }
            // Both sequences packed, in the other order.
            let q = ndarray::concatenate![
                Axis(2),
                x.q.slice(s![1..2, .., q_len - 1.., ..]),
                x.q.slice(s![0..1, .., .., ..])
            ];
            let (offsets, turned) = ([0, 1, 1 + q_len], pools.select(Axis(0), &[1, 0]));
            let packed = Cached::new(q.view(), &cache).sequences(&[1, 0]).packed(&offsets);
            let packed = CompressedCache::new(packed, turned.view());
            let want = csa.forward(Indexed::new(cached, branches[0])).unwrap();
            for branch in [IndexBranch::new(q.view(), turned.view()), IndexBranch::cached(q.view(), &keys)] {
                let packed = Indexed::new(packed, branch);
                let index = csa.select(packed).unwrap();
                assert_eq!(index, csa.reference_select(packed).unwrap().0, "{q_len}");
                compressed_is_its_definition(&csa, packed, csa.bound_on(packed, &index).unwrap());
                let got = csa.forward(packed).unwrap();
                let first = got.slice(s![.., .., ..1, ..]).to_owned();
                near("first", &first, &want.slice(s![1..2, .., q_len - 1.., ..]).to_owned());
                let second = got.slice(s![.., .., 1.., ..]).to_owned();
                near("second", &second, &want.slice(s![0..1, .., .., ..]).to_owned());
            }
        }
    }

    #[test]
    fn caches_that_do_not_fit_are_refused() {
        let x = Arrays::normal([2, 2, 1, 5, 40, 8, 8], 5);
        let (pools, cache) = (x.k.slice(s![.., .., ..10, ..]), latents::<f32>(&x.k, &[40, 30]));
        let csa = Csa::builder(2).window(20).build().unwrap();
        let own = CompressedCache::new(Cached::new(x.q.view(), &cache), pools);
        let few = latents::<f32>(&x.k, &[10, 6]);
        let refused = csa.forward(Indexed::new(own, IndexBranch::cached(x.q.view(), &few))).unwrap_err();
        assert_eq!(refused.to_string(), "index k: expected 7 index keys or more for sequence 1, got 6");
        let branch = IndexBranch::new(x.q.view(), pools.slice(s![.., .., ..9, ..]));
        let refused = csa.forward(Indexed::new(own, branch)).unwrap_err().to_string();
        assert!(refused.starts_with("index k: expected 10 index keys"), "{refused}");
        let whole = Indexed::new(own, IndexBranch::new(x.q.view(), pools));
        let index = csa.select(whole).unwrap();
        let lists = TokenLists::from_keys(*index.layout(), &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &[9]).unwrap();
        assert!(csa.forward_on(whole, &lists).unwrap_err().to_string().starts_with("index: "));
    }

    #[test]
    fn refusals() {
        assert_eq!(Csa::builder(0).build().unwrap_err().to_string(), "k: expected at least 1 pool, got 0");
        let x = Arrays::normal([1, 2, 1, 5, 40, 8, 8], 5);
        let csa = Csa::builder(2).build().unwrap();
        let few = IndexBranch::new(x.q.view(), x.k.slice(s![.., .., ..9, ..]));
        let refused = csa.forward(Indexed::new(input(&x).x, few)).unwrap_err().to_string();
        assert!(refused.starts_with("index k: expected 10 index keys"), "{refused}");
        let y = Arrays::normal([1, 2, 1, 5, 44, 8, 8], 5);
        let index = csa.select(input(&y)).unwrap();
        assert!(csa.forward_on(input(&x), &index).unwrap_err().to_string().starts_with("index: "));
    }
}
