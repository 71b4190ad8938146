//! Dynamic mask attention (DMA): values say how much each key matters, and which
//! keys are seen at all.

use ndarray::{Array1, Array2};

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition::select::chosen;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence};
use crate::keys::{ATOM, Per, TokenLists};
use crate::score::{Plain, Score};
use crate::select::summaries::filled;
use crate::select::{Forced, Pick, Rule, Source, Ties, gate, stream};
use crate::simd::exp::{exp, softplus};
use crate::simd::mem::{Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Kernel, Simd};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::lived::DynamicKeys;
use crate::stages::planned::{Exact, Planned, check_count, planned, sparse};

sparse! {
    /// Dynamic mask attention (DMA): values say how much each key matters, and which
    /// keys are seen at all.
    ///
    /// ```text
    /// b_j = A softplus([v_j of all key/value heads] W + c)   for each key/value head
    /// S_t = the `keep` keys up to position t with the largest b, the older of equals
    /// o_t = softmax over S_t of (scale q_t . k_j + b_j)
    /// ```
    ///
    /// From "Trainable Dynamic Mask Sparse Attention" (arXiv 2508.02124). The paper
    /// writes `exp(A softplus(..))`, which its code leaves out: see
    /// [`exponential`](DynamicMaskBuilder::exponential). Its mask for a whole prompt
    /// chooses once for all queries: [`shared`](DynamicMaskBuilder::shared). All heads
    /// of a group share a mask.
    ///
    /// Cost: `2 kv_heads value_dim` flops a key and key/value head, `log keep`
    /// comparisons, and `2 (head_dim + value_dim)` flops a pair that some query of 64
    /// neighbours sees: what is seen changes by one key a query.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::DynamicMask};
    /// use ndarray::{Array1, Array2, Array4};
    ///
    /// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let weights = Array2::from_shape_fn((32, 2), |(i, h)| ((i * (h + 2)) as f32).cos());
    /// let dma = DynamicMask::builder(Array1::ones(2), weights).keep(128).build()?;
    /// let out = dma.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    DynamicMask;
    /// Builds a [`DynamicMask`].
    DynamicMaskBuilder, always causal;
    given {
        slopes: Array1<f32>;
        weights: Array2<f32>;
    }
    own {
        /// Keys that a query sees. Default: 2048.
        keep: usize = 2048;
        /// Added to the products with the weights, `[kv_heads]`. Default: nothing.
        offsets: Option<Array1<f32>> = None;
        /// Whether biases are exponentials of these. Default: they are not.
        exponential: bool = false;
        /// Whether keys are chosen once, for all queries. Default: for each, of
        /// those up to its position.
        shared: bool = false;
        /// Whether all keys of a bias above 0 are seen, however many. Default: they
        /// are not.
        positive: bool = false;
        /// Which of equal biases count more. Default: the older ones.
        ties: Ties = Ties::Oldest;
    }
    check(this) {
        check_count("keep", this.keep)?;
        let heads = this.slopes.len();
        if this.weights.ncols() != heads {
            let expected = format!("[kv_heads value_dim, kv_heads] of {heads} heads");
            return Err(Error::shape("weights", expected, this.weights.shape()));
        }
        match this.offsets.as_ref().filter(|offsets| offsets.len() != heads) {
            Some(offsets) => Err(Error::shape("offsets", format!("[{heads}]"), offsets.shape())),
            None => Ok(()),
        }
    }
}

/// `A softplus(x + offset)` of a column of products, or its exponential.
struct Biases<'a> {
    products: &'a [f32],
    heads: usize,
    head: usize,
    slope: f32,
    offset: f32,
    exponential: bool,
    to: &'a mut [f32],
}

impl Kernel for Biases<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (to, x) in self.to.iter_mut().zip(self.products.chunks(self.heads)) {
            *to = x[self.head];
        }
        for part in self.to.chunks_mut(S::LANES) {
            let x = softplus(s, s.add(s.load_tail(part), s.splat(self.offset)));
            let x = s.mul(s.splat(self.slope), x);
            s.store_tail(part, if self.exponential { exp(s, x) } else { x });
        }
    }
}

impl DynamicMask {
    /// With a slope for each key/value head, and weights `[kv_heads value_dim,
    /// kv_heads]` of the values of all of them, one after the other.
    pub fn builder(slopes: Array1<f32>, weights: Array2<f32>) -> DynamicMaskBuilder {
        DynamicMaskBuilder::with(slopes, weights)
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        let (rows, heads) = self.weights.dim();
        if heads != dims.kv_heads || dims.kv_heads.checked_mul(dims.value_dim) != Some(rows) {
            let expected =
                format!("[kv_heads value_dim, kv_heads] of {} heads of {}", dims.kv_heads, dims.value_dim);
            return Err(Error::shape("weights", expected, self.weights.shape()));
        }
        Ok(())
    }

    /// Keys of a sequence in whole tasks, and elements of a heap.
    fn sizes(&self, source: &Source<'_>) -> Result<[usize; 2]> {
        self.check(&source.dims)?;
        let layout = source.layout_per(Per::Group, ATOM);
        layout.lists()?;
        Ok([gate::padded(layout.keys), self.keep.min(layout.keys)])
    }

    /// Until when each key is seen.
    fn until(&self, bias: &[f32], heap: &mut [u64], until: &mut [u32]) {
        let gone = |until: &mut [u32], seen: &dyn Fn(usize) -> bool| {
            until
                .iter_mut()
                .enumerate()
                .for_each(|(j, until)| *until = if seen(j) { u32::MAX } else { j as u32 });
        };
        if self.positive {
            return gone(until, &|j| bias[j] > 0.0);
        }
        stream::until(bias, self.keep, self.ties, heap, until);
        if self.shared {
            let last: Vec<bool> = until.iter().map(|&until| until == u32::MAX).collect();
            gone(until, &|j| last[j]);
        }
    }
}

impl Planned for DynamicMask {
    type Index = DynamicKeys;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn score<'a>(&self, index: &'a DynamicKeys) -> impl Score + 'a {
        index.score()
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        let ([padded, heap], dims) = (self.sizes(source)?, &source.dims);
        let lists = dims.batch.saturating_mul(dims.kv_heads);
        let products = bytes_for::<f32>(lists.saturating_mul(padded));
        let claims = 2 * bytes_for::<u64>(claim_words(lists));
        let heaps = bytes_for_shares(parallel::threads(), bytes_for::<u64>(heap));
        let parts = [gate::of_values_bytes(dims, dims.kv_heads, padded), claims, heaps];
        Ok(parts.into_iter().fold(products, usize::saturating_add))
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<DynamicKeys> {
        let ([padded, most], dims, isa) = (self.sizes(source)?, &source.dims, source.isa);
        let (heads, workers, n) =
            (dims.kv_heads, parallel::threads(), source.layout_per(Per::Group, ATOM).keys);
        let lists = dims.batch * heads;
        let (mut bias, mut until) = (filled(n * lists, || Ok(0f32))?, filled(n * lists, || Ok(0u32))?);
        let mut arena = workspace.arena(self.find_bytes(source)?)?;
        let products = arena.take::<f32>(padded * lists);
        gate::of_values(source, self.weights.view(), padded, &mut arena, products);
        {
            let biases = Parts::new(&mut bias, n, arena.take(claim_words(lists)));
            let ends = Parts::new(&mut until, n, arena.take(claim_words(lists)));
            let shares = arena.shares(workers, bytes_for::<u64>(most));
            let start = |worker: usize| shares.take(worker).take::<u64>(most);
            parallel::for_each(workers, if n == 0 { 0 } else { lists }, start, |heap, list| {
                let (of, head, bias) = (source.sequence(list / heads), list % heads, biases.take(list));
                let products = &products[list / heads * padded * heads..];
                let bias = &mut bias[..of.keys.len()];
                let (slope, exponential) = (self.slopes[head], self.exponential);
                let offset = self.offsets.as_ref().map_or(0.0, |offsets| offsets[head]);
                isa.dispatch(Biases { products, heads, head, slope, offset, exponential, to: &mut *bias });
                self.until(bias, heap, &mut ends.take(list)[..of.keys.len()]);
            });
        }
        DynamicKeys::find(source, workspace, bias, until)
    }

    fn define_plan(&self, x: &Exact) -> Result<(DynamicKeys, Margins)> {
        self.check(&x.dims)?;
        let heads = x.dims.kv_heads;
        let biases = |of: &Sequence, head: usize| -> Vec<f64> {
            let bias = |j: usize| {
                let rows = (0..heads).flat_map(|h| x.v(of, h).row(j).to_vec());
                let dot: f64 = rows.zip(self.weights.column(head)).map(|(x, &w)| x * f64::from(w)).sum();
                let dot = dot + self.offsets.as_ref().map_or(0.0, |offsets| f64::from(offsets[head]));
                let bias = f64::from(self.slopes[head]) * (dot.max(0.0) + (-dot.abs()).exp().ln_1p());
                if dot.is_nan() {
                    dot
                } else if self.exponential {
                    bias.exp()
                } else {
                    bias
                }
            };
            (0..of.keys.len()).map(bias).collect()
        };
        // The highest of the first `n`, and what is in doubt.
        let highest = |bias: &[f64], n: usize| {
            let (rule, newest) = (Rule::TopK(self.keep), self.ties == Ties::Newest);
            let rule = if self.positive { Rule::Threshold(0.0) } else { rule };
            let turn = |j: usize| if newest { n - 1 - j } else { j };
            let scores: Vec<f64> = (0..n).map(|j| bias[turn(j)]).collect();
            let (ids, doubt) = chosen(&Pick { rule, forced: Forced::default() }, &scores);
            [ids, doubt].map(|ids| {
                let mut ids: Vec<usize> = ids.into_iter().map(turn).collect();
                ids.sort_unstable();
                ids
            })
        };
        let group = (x.dims.q_heads / heads.max(1)).max(1);
        let (lists, margins): (TokenLists, Margins) = x.plan((Per::Group, 1), 1, |of, head| {
            let bias = biases(of, head / group);
            let all = highest(&bias, bias.len());
            let row = |i: usize| {
                let n = (i + 1 + bias.len()).saturating_sub(of.queries.len());
                if !self.shared {
                    return highest(&bias, n);
                }
                all.clone().map(|ids| ids.into_iter().filter(|&j| j < n).collect())
            };
            (0..of.queries.len()).map(row).collect()
        })?;
        Ok((DynamicKeys::define(x, lists, biases), margins))
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let dims = &source.dims;
        2 * (dims.batch * dims.kv_heads * dims.kv_len) as u64 * self.weights.nrows() as u64
    }
}

planned!(DynamicMask, DynamicKeys);
planned!(DynamicMask, DynamicKeys, caches);

exhibit! {
    DynamicMaskExhibit of DynamicMask, "sparse", "Dynamic Mask Attention", "arXiv 2508.02124";
    "the 48 keys up to the query that have the largest biases, which their values say";
    not "where the model was not trained with it";
    tokens false;
    build(x, field) {
        let (_, heads, _, d) = x.v.dim();
        let weights = Array2::from_shape_fn((heads * d, heads), |(i, h)| field.at(1, h, i, 0));
        DynamicMask::builder(Array1::from_shape_fn(heads, |h| 0.3 * field.at(2, h, 0, 0)), weights).keep(48)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(DynamicMask, DynamicMaskExhibit);

#[cfg(test)]
mod tests;
