//! Block-sparse attention with a map of the caller's.

use ndarray::ArrayView4;

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::Reference;
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::keys::{ATOM, BlockLists, Keys, Layout, Per, Run, TokenLists};
use crate::score::Plain;
use crate::score::smooth::AnySmooth;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, define_back, shapes, smooth};
use crate::stages::listed::Order;
use crate::stages::selecting::{define, price, sparse_options, with_call};

/// Which blocks, or runs of keys, each block of queries sees.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum BlockPlan {
    /// Blocks of 64 keys.
    Blocks(BlockLists),
    /// Runs of keys, for smaller blocks.
    Tokens(TokenLists),
}

impl From<BlockLists> for BlockPlan {
    fn from(lists: BlockLists) -> Self {
        Self::Blocks(lists)
    }
}

impl From<TokenLists> for BlockPlan {
    fn from(lists: TokenLists) -> Self {
        Self::Tokens(lists)
    }
}

/// The plan of `map[sequence, list of the sequence, block of queries, block of
/// keys]`, where a block of keys is `k_block` of them: a multiple of 64, or a
/// divisor. Of queries it is the layout's `q_block`, any number.
///
/// # Errors
/// [`Error::Value`] for another `k_block`, [`Error::Shape`] for a map that does
/// not fit the layout, and what [`Layout::lists`] refuses.
pub fn block_map(layout: Layout, k_block: usize, map: ArrayView4<'_, bool>) -> Result<BlockPlan> {
    if k_block > 0 && k_block.is_multiple_of(ATOM) {
        return Ok(BlockLists::from_map(layout, k_block, map)?.into());
    }
    if k_block == 0 || !ATOM.is_multiple_of(k_block) {
        return Err(Error::value("k_block", format!("a multiple or a divisor of {ATOM} keys"), k_block));
    }
    layout.lists()?;
    let want = [layout.sequences, layout.heads(), layout.blocks(), layout.keys.div_ceil(k_block)];
    if map.shape() != want {
        let expected = format!("[sequences, lists, query blocks, key blocks] = {want:?}");
        return Err(Error::shape("map", expected, map.shape()));
    }
    let (mut offsets, mut runs) = (vec![0], Vec::<Run>::new());
    for row in map.rows() {
        let mut open = false;
        for (block, &named) in row.iter().enumerate() {
            let start = block * k_block;
            let len = k_block.min(layout.keys - start) as u32;
            match runs.last_mut().filter(|_| open && named) {
                Some(run) => run.len += len,
                None if named => runs.push(Run { start: start as u32, len }),
                None => {}
            }
            open = named;
        }
        offsets.push(runs.len());
    }
    Ok(TokenLists::new(layout, offsets, runs)?.into())
}

/// Block-sparse attention with a map of the caller's.
///
/// ```text
/// o_i = softmax attention of q_i on the keys of the blocks b with map[i / q_block, b]
/// ```
///
/// As in "Generating Long Sequences with Sparse Transformers" (arXiv
/// 1904.10509) and the block kernels since. A map, or compressed lists, may
/// be per query head, per group of heads that share keys, or for all heads; what
/// it names may be cut at each query's position. A query that no block is left
/// to gives 0, and an LSE of -inf.
///
/// The lists of any selection are such lists, and [`Backward`](crate::Backward)
/// gives the gradients on them.
///
/// Cost: `2 (head_dim + value_dim)` flops a named pair.
///
/// ```
/// use attention_kernels::keys::{Layout, Per};
/// use attention_kernels::sparse::{BlockSparse, block_map};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 2, 256, 32));
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// // The first block of keys and the query's own, for all heads.
/// let map = Array4::from_shape_fn((1, 1, 4, 4), |(_, _, i, j)| j == 0 || i == j);
/// let plan = block_map(Layout::new(Per::Sequence, 64, &x.dims()?), 64, map.view())?;
/// let out = BlockSparse::builder(plan).causal().build()?.forward(x)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BlockSparse {
    config: Config<Order, Plain>,
    plan: BlockPlan,
}

/// Builds a [`BlockSparse`].
#[derive(Clone, Debug)]
pub struct BlockSparseBuilder {
    options: Options<Order, Plain>,
    plan: BlockPlan,
}

impl BlockSparse {
    /// With the plan of a [map](block_map), or with lists as they are.
    pub fn builder(plan: impl Into<BlockPlan>) -> BlockSparseBuilder {
        BlockSparseBuilder { options: Options::default(), plan: plan.into() }
    }

    fn keys(&self) -> Keys<'_> {
        match &self.plan {
            BlockPlan::Blocks(lists) => Keys::Blocks(lists),
            BlockPlan::Tokens(lists) => Keys::Tokens(lists),
        }
    }
}

sparse_options!(BlockSparseBuilder);

impl BlockSparseBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<BlockSparse> {
        Ok(BlockSparse { config: self.options.build()?, plan: self.plan })
    }
}

impl<Q: Element, K: Element, O: Element> Attending<Qkv<'_, Q, K, O>> for BlockSparse {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        with_call(&self.config, x, self.keys(), run)
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        define(&self.config, x, self.keys())
    }

    fn price(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        price(&self.config, &x, self.keys())
    }
}

attending!(BlockSparse, [Q, K, O] Qkv);
mergeable!(BlockSparse, [Q, K, O] Qkv);

impl<Q: Element, K: Element, O: Element> Smooth<Qkv<'_, Q, K, O>> for BlockSparse {
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        with_call(&self.config, x, self.keys(), |call| run(call, &Plain))
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        self.keys().check(&x.dims()?, &x.lengths)?;
        define_back(&self.config.listed(self.keys()), x, d_out, saved)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        Ok(shapes(&x))
    }
}

smooth!(BlockSparse, [Q, K, O] Qkv);

exhibit! {
    BlockSparseExhibit of BlockSparse, "sparse", "block-sparse", "arXiv 1904.10509";
    "exact attention on the blocks of 64 keys that a map names, here half of them at random";
    not "where single keys matter: a block is read whole";
    tokens false;
    build(x, field) {
        let layout = Layout::new(Per::Head, 64, &x.dims()?);
        let sizes = (layout.sequences, layout.heads(), layout.blocks(), layout.atoms());
        let map = ndarray::Array4::from_shape_fn(sizes, |(_, h, i, j)| field.at(1, h, i, j) > 0.0);
        BlockSparse::builder(block_map(layout, ATOM, map.view())?)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(BlockSparse, BlockSparseExhibit);

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::mask::{Boolean, Causal, Mask};
    use crate::sparse::testing::{Arrays, near};

    const SIZES: [usize; 7] = [2, 4, 2, 150, 260, 20, 12];

    /// Any map, of any blocks, is dense attention under the mask that it is.
    #[test]
    fn a_map_is_a_mask() {
        let x = Arrays::normal(SIZES, 1);
        let dims = x.qkv().dims().unwrap();
        for (per, q_block, k_block) in
            [(Per::Head, 64, 64), (Per::Group, 1, 16), (Per::Sequence, 50, 128), (Per::Head, 7, 8)]
        {
            let layout = Layout::new(per, q_block, &dims);
            let sizes = (2, layout.heads(), layout.blocks(), 260usize.div_ceil(k_block));
            for (name, map) in [
                ("some", Array4::from_shape_fn(sizes, |(b, h, i, j)| (b + 3 * h + 5 * i * (j + 2)) % 3 == 0)),
                ("all", Array4::from_elem(sizes, true)),
                ("none", Array4::from_elem(sizes, false)),
            ] {
                let shared = 4 / layout.heads();
                let full = Array4::from_shape_fn((2, 4, 150, 260), |(b, h, i, j)| {
                    map[[b, h / shared, i / q_block, j / k_block]]
                });
                let plan = block_map(layout, k_block, map.view()).unwrap();
                for causal in [false, true] {
                    let builder = BlockSparse::builder(plan.clone());
                    let builder = if causal { builder.causal() } else { builder };
                    let got = builder.build().unwrap().forward(x.qkv()).unwrap();
                    let mask = Boolean::new(full.view());
                    let want = if causal {
                        Dense::builder().mask(mask.and(Causal::new())).build().unwrap().forward(x.qkv())
                    } else {
                        Dense::builder().mask(mask).build().unwrap().forward(x.qkv())
                    };
                    near(&format!("{per:?} {q_block} {k_block} {name}"), &got, &want.unwrap());
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let x = Arrays::normal(SIZES, 1);
        let layout = Layout::new(Per::Head, 64, &x.qkv().dims().unwrap());
        let map = Array4::from_elem((2, 4, 3, 5), true);
        for (k_block, starts) in [(0, "k_block: "), (48, "k_block: "), (128, "map: "), (32, "map: ")] {
            let refusal = block_map(layout, k_block, map.view()).unwrap_err();
            assert!(refusal.to_string().starts_with(starts), "{refusal}");
        }
        let other = Arrays::normal([2, 4, 2, 150, 192, 20, 12], 1);
        let sparse = BlockSparse::builder(block_map(layout, 64, map.view()).unwrap()).build().unwrap();
        let refusal = sparse.forward(other.qkv()).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
    }
}
