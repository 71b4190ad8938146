//! NSA: native sparse attention, a gated sum of three branches.

use ndarray::{Array4, ArrayView4, ArrayViewMut4};

use crate::attention::Cost;
use crate::cache::{Cache, CachedBranches};
use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::branched::Branches;
use crate::keys::{ATOM, BlockLists, Keys, Per};
use crate::mask::{WholePools, Window};
use crate::score::Plain;
use crate::select::{
    Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored, Summary, select, workspace_bytes,
};
use crate::stages::attend::{Config, Options};
use crate::stages::branches::{Branched, Branching, Mixed};
use crate::stages::listed::Order;
use crate::stages::means::Means;
use crate::stages::opened::opened;
use crate::stages::planned::check_count;
use crate::stages::selecting::sparse_options;

mod define;

/// NSA: native sparse attention, a gated sum of three branches.
///
/// ```text
/// p_c  = softmax_c (scale q . k~_c)       pools c of 32 keys, every 16, seen whole
/// I_b  = sum over the heads of a group and the pools c of p_c times the strides
///        that pool c and block b of 64 keys share
/// S    = the first block, the query's own and the one before it, and those with
///        the largest I_b, 16 together
/// o    = g_1 sum_c p_c v~_c + g_2 attention on S + g_3 attention on a window
/// ```
///
/// each a softmax of its own, of keys up to the query's position. From "Native
/// Sparse Attention" (arXiv 2502.11089). Gates are the model's; so are compressed
/// keys and values where it has learned to make them
/// ([`compressed`](Branches::compressed)), which otherwise are means, and the
/// keys and values of the window if it has its own.
///
/// Runs over arrays ([`Branches`]) and, in prefill and in decoding, over caches
/// ([`CachedBranches`], packed queries included).
///
/// Cost: `2 head_dim / stride` flops a visible pair for the selection and `2
/// (head_dim + value_dim) / stride` for the pools; `2 (head_dim + value_dim)` a
/// pair of a selected block or of the window.
///
/// ```
/// use attention_kernels::sparse::{Branches, Nsa};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let gates = Array4::from_elem((1, 2, 700, 3), 0.5);
/// let nsa = Nsa::builder(4).window(100).build()?;
/// let out = nsa.forward(Branches::new(Qkv::new(x.view(), x.view(), x.view()), gates.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Nsa {
    config: Config<Order, Plain>,
    builder: NsaBuilder,
}

/// Builds an [`Nsa`].
#[derive(Clone, Debug)]
pub struct NsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    pool: [usize; 2],
    block: usize,
    first: usize,
    local: usize,
    window: usize,
}

impl Nsa {
    /// `k` blocks a query, those that are always read among them (16 in the
    /// paper); causal.
    pub fn builder(k: usize) -> NsaBuilder {
        let options = Options::default();
        NsaBuilder { options, k, pool: [32, 16], block: 64, first: 1, local: 2, window: 512 }.causal()
    }
}

sparse_options!(NsaBuilder);

impl NsaBuilder {
    /// Keys of a pool and from one to the next, of which the former are a
    /// multiple. Default: 32 and 16.
    pub fn pool(self, width: usize, stride: usize) -> Self {
        Self { pool: [width, stride], ..self }
    }

    /// Keys of a block: a multiple of 64, and of those from one pool to the
    /// next. Default: 64.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// The first so many blocks are always read. Default: 1.
    pub fn first(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// So are the query's own and those before it, so many together. Default: 2.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// Keys of the window, the query's own among them. Default: 512.
    pub fn window(self, window: usize) -> Self {
        Self { window, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` or a window of 0, pools and blocks that are no
    /// multiples as they should be, and a scale that is not finite;
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Nsa> {
        let [width, stride] = self.pool;
        check_count("k", self.k)?;
        check_count("window", self.window)?;
        if stride == 0 || width == 0 || !width.is_multiple_of(stride) {
            let expected = "a multiple of the keys from one to the next, at least 1";
            return Err(Error::value("pool", expected, format_args!("{width} every {stride}")));
        }
        if self.block == 0 || !self.block.is_multiple_of(ATOM) || !self.block.is_multiple_of(stride) {
            return Err(Error::value(
                "block",
                format!("a multiple of {ATOM} and of {stride} keys"),
                self.block,
            ));
        }
        Ok(Nsa { config: self.options.clone().build()?, builder: self })
    }
}

impl Nsa {
    fn scheme(&self, dims: &Dims) -> Scheme {
        let NsaBuilder { k, pool: [width, stride], block, first, local, .. } = self.builder;
        Scheme {
            unit: block,
            summary: Summary::Mean,
            per: Per::Group,
            q_block: 1,
            shares: Some(self.config.scale(dims) as f32),
            reduce: Reduce::Sum,
            pick: Pick { rule: Rule::TopK(k), forced: Forced { first, last: local, inside: true } },
            causal: true,
            scored: Scored::Pools(Pools { width, stride, fold: Fold::Sum, coarse: None, dense: 0 }),
        }
    }

    /// The window, its last key the query's own.
    fn near(&self) -> Window {
        Window::new(Some(self.builder.window - 1), Some(0))
    }

    fn open<R>(&self, x: &impl Branching, run: impl FnOnce(&Branched<'_>) -> Result<R>) -> Result<R> {
        x.with_branches(&self.means(), run)
    }

    fn choose(&self, x: &Branched<'_>, workspace: &mut Workspace) -> Result<BlockLists> {
        select(&x.source(self.config.isa()), &self.scheme(&x.dims), workspace)?.blocks()
    }

    fn choice_bytes(&self, x: &Branched<'_>) -> Result<usize> {
        workspace_bytes(&x.source(self.config.isa()), &self.scheme(&x.dims))
    }

    fn bytes(&self, x: &Branched<'_>, index: &BlockLists) -> Result<usize> {
        self.mix_bytes(x, index)
    }

    fn run<O: Element>(
        &self,
        x: &Branched<'_>,
        index: &BlockLists,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.mix(x, index, out, workspace)
    }

    fn price(&self, x: &impl Branching, index: &BlockLists) -> Result<Cost> {
        let blocks = x.price(&self.config.listed(Keys::Blocks(index)))?;
        let window = x.price(&self.config.masked(self.near()))?;
        let pools = self.open(x, |x| {
            let pairs = x.pairs_with_pools(&self.means());
            Ok(2 * pairs * x.dims.q_heads * (2 * x.dims.head_dim + x.dims.value_dim))
        })?;
        Ok(Cost { flops: blocks.flops + window.flops + pools as u64, ..blocks })
    }
}

impl Mixed for Nsa {
    fn means(&self) -> Means {
        let [width, stride] = self.builder.pool;
        Means { isa: self.config.isa(), width, stride }
    }

    fn with_calls<R>(
        &self,
        x: &Branched<'_>,
        index: &BlockLists,
        made: [ArrayView4<'_, f32>; 2],
        run: impl FnOnce([Call<'_>; 3]) -> R,
    ) -> Result<R> {
        const NORM: Norm<'static> = Norm::Softmax { sinks: None };
        let (dims, keys, [width, stride]) = (x.dims, Keys::Blocks(index), self.builder.pool);
        keys.check(&dims, &x.lengths)?;
        let pools = self.config.masked(WholePools { width, stride, tokens: x.tokens() });
        let window = self.config.masked(self.near());
        x.with_pools(&self.means(), made, |arrays, of_pools| {
            let first = pools.over(arrays, pools.checked(of_pools.checked()?)?, NORM, None);
            let second = Call { keys, ..self.config.over(x.on_tokens(x.own), dims, NORM, None) };
            let third = window.over(x.on_tokens(x.window.unwrap_or(x.own)), dims, NORM, None);
            Ok(run([first, second, third]))
        })
    }
}

opened!(Nsa, BlockLists, [T: Element] Branches<'_, T>);
opened!(Nsa, BlockLists, [Q: Element, C: Cache + ?Sized, O: Element] CachedBranches<'_, Q, C, O>);

exhibit! {
    NsaExhibit of Nsa, "sparse", "NSA", "arXiv 2502.11089";
    "means of 16 keys, 3 blocks of 64 keys by the weights of those, and a window of 24 keys, gated";
    not "where the model was not trained with it, and below some thousand keys";
    tokens false;
    build(_, _) { Nsa::builder(3).pool(16, 8).local(1).window(24) }
    extras(x, field) {
        let (batch, heads, len, _) = x.q.dim();
        let gate = |(_, h, i, part)| 0.5 + 0.4 * field.at(1, h, i, part);
        Extras { rates: Array4::from_shape_fn((batch, heads, len, 3), gate), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Branches<'a, T> { Branches::new(x, extras.rates.view()) }
}
carded!(Nsa, NsaExhibit);

#[cfg(test)]
mod tests;
