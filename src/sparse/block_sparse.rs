//! Block-sparse attention with a map of the caller's.

use ndarray::ArrayView4;

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::Reference;
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::Result;
use crate::input::Qkv;
use crate::keys::maps::{BlockPlan, block_map};
use crate::keys::{ATOM, Layout, Per};
use crate::score::Plain;
use crate::score::smooth::AnySmooth;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, define_back, shapes, smooth};
use crate::stages::listed::Order;
use crate::stages::selecting::{Attended, sparse_options};

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
/// Runs over arrays and, in prefill and in decoding, over caches: the map of a step has rows
/// for the queries of that step alone, and columns for all keys that the longest sequence
/// has by then. Where sequences are shorter than the longest,
/// [`within`](BlockPlan::within) leaves out what is past their ends.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Cached, Contiguous, KvShape};
/// use attention_kernels::keys::{Layout, Per};
/// use attention_kernels::sparse::{BlockSparse, block_map};
/// use attention_kernels::Attention;
/// use ndarray::{Array3, Array4};
///
/// let mut cache = Contiguous::<f32>::new(KvShape { kv_heads: 1, head_dim: 8, value_dim: 8 }, 2, 256)?;
/// for (sequence, len) in [(0, 200), (1, 70)] {
///     let x = Array3::<f32>::ones((1, len, 8));
///     cache.append(sequence, x.view(), x.view())?;
/// }
/// let q = Array4::<f32>::ones((2, 1, 1, 8)); // a step
/// let step = Cached::new(q.view(), &cache);
/// // The first 32 keys and the last ones of each sequence, in blocks of 32.
/// let ends = [200, 70];
/// let map = Array4::from_shape_fn((2, 1, 1, 7), |(b, _, _, j)| j == 0 || j == (ends[b] - 1) / 32);
/// let plan = block_map(Layout::new(Per::Sequence, 1, &step.dims()?), 32, map.view())?;
/// let out = BlockSparse::builder(plan.within(cache.lengths())?).build()?.forward(step)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
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
}

sparse_options!(BlockSparseBuilder);

impl BlockSparseBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for a scale that is not finite,
    /// [`Error::Isa`](crate::Error::Isa) for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<BlockSparse> {
        Ok(BlockSparse { config: self.options.build()?, plan: self.plan })
    }
}

impl<X: Attended> Attending<X> for BlockSparse {
    fn with_call<R>(&self, x: X, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.with_call(&self.config, self.plan.keys(), run)
    }

    fn define(&self, x: X) -> Result<Reference> {
        x.define(&self.config, self.plan.keys())
    }

    fn price(&self, x: X) -> Result<Cost> {
        x.price(&self.config, self.plan.keys())
    }
}

attending!(BlockSparse, [Q, K, O] Qkv);
mergeable!(BlockSparse, [Q, K, O] Qkv);
attending!(BlockSparse, caches);
mergeable!(BlockSparse, caches);

impl<Q: Element, K: Element, O: Element> Smooth<Qkv<'_, Q, K, O>> for BlockSparse {
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        x.with_call(&self.config, self.plan.keys(), |call| run(call, &Plain))
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        self.plan.keys().check(&x.dims()?, &x.lengths)?;
        define_back(&self.config.listed(self.plan.keys()), x, d_out, saved)
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
    use ndarray::{Array4, Axis, s};

    use super::*;
    use crate::attention::{Attention, Mergeable};
    use crate::cache::{Append, Cache, Cached, Contiguous, KvShape, Paged, Pages};
    use crate::dense::Dense;
    use crate::engine::workspace::Workspace;
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

    /// A map over caches, whose sequences have different lengths: in prefill, and in steps
    /// whose maps have rows for their own queries alone.
    #[test]
    fn a_map_over_caches_is_that_over_arrays() {
        let shape = KvShape { kv_heads: 2, head_dim: 20, value_dim: 12 };
        let lengths = [260, 5, 131];
        let x = Arrays::normal([3, 4, 2, 150, 260, 20, 12], 2);
        let mut flat = Contiguous::<f32>::new(shape, 3, 260).unwrap();
        let mut paged = Paged::<f32>::new(shape, 3, Pages { count: 40, len: 16 }).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            let (k, v) = (x.k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..]));
            flat.append(b, k, v).unwrap();
            paged.append(b, k, v).unwrap();
        }
        let caches: [&dyn Cache; 2] = [&flat, &paged];
        for (queries, q_block, k_block) in [(150, 64, 64), (1, 1, 64), (1, 64, 16), (5, 2, 128), (40, 1, 8)] {
            let q = x.q.slice(s![.., .., ..queries, ..]);
            let arrays = Qkv::new(q, x.k.view(), x.v.view()).key_lengths(&lengths);
            for cache in caches {
                let cached = Cached::new(q, cache);
                for per in [Per::Head, Per::Group, Per::Sequence] {
                    let layout = Layout::new(per, q_block, &cached.dims().unwrap());
                    assert_eq!((layout.queries, layout.keys), (queries, 260));
                    let sizes = (3, layout.heads(), layout.blocks(), 260usize.div_ceil(k_block));
                    let map =
                        Array4::from_shape_fn(sizes, |(b, h, i, j)| (b + 3 * h + 5 * i + 2 * j) % 3 > 0);
                    let plan = block_map(layout, k_block, map.view()).unwrap();
                    let whole = BlockSparse::builder(plan.clone()).build().unwrap();
                    assert!(whole.forward(cached).unwrap_err().to_string().starts_with("keys: "));
                    let plan = plan.within(&lengths).unwrap();
                    let shared = 4 / layout.heads();
                    let full = Array4::from_shape_fn((3, 4, queries, 260), |(b, h, i, j)| {
                        map[[b, h / shared, i / q_block, j / k_block]]
                    });
                    let mask = Boolean::new(full.view());
                    let dense = Dense::builder().mask(mask).build().unwrap();
                    let sparse = BlockSparse::builder(plan.clone()).build().unwrap();
                    near("a mask", &sparse.forward(arrays).unwrap(), &dense.forward(arrays).unwrap());
                    for causal in [false, true] {
                        let sparse = BlockSparse::builder(plan.clone());
                        let sparse = if causal { sparse.causal() } else { sparse }.build().unwrap();
                        let (want, want_lse) = sparse.forward_with_lse(arrays).unwrap();
                        let (out, lse) = sparse.forward_with_lse(cached).unwrap();
                        near("a cache", &out, &want);
                        assert!(lse.iter().zip(&want_lse).all(|(a, b)| a == b || (a - b).abs() < 2e-5));
                        near("by definition", &out, &sparse.reference(cached).unwrap().mapv(|x| x as f32));
                        assert_eq!(sparse.cost(cached).unwrap().flops, sparse.cost(arrays).unwrap().flops);
                    }
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let x = Arrays::normal(SIZES, 1);
        let layout = Layout::new(Per::Head, 64, &x.qkv().dims().unwrap());
        let map = Array4::from_elem((2, 4, 3, 5), true);
        let other = Arrays::normal([2, 4, 2, 150, 192, 20, 12], 1);
        let sparse = BlockSparse::builder(block_map(layout, 64, map.view()).unwrap()).build().unwrap();
        let refusal = sparse.forward(other.qkv()).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
        // A cache that has fewer keys than the lists name, or more queries than there are lists.
        let shape = KvShape { kv_heads: 2, head_dim: 20, value_dim: 12 };
        let mut cache = Contiguous::<f32>::new(shape, 2, 260).unwrap();
        for b in 0..2 {
            cache.append(b, other.k.index_axis(Axis(0), b), other.v.index_axis(Axis(0), b)).unwrap();
        }
        let mut out = Array4::from_elem((2, 4, 150, 12), f32::NAN);
        let cached = Cached::new(x.q.view(), &cache);
        let refusal = sparse.forward_into(cached, out.view_mut(), &mut Workspace::new()).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
        assert!(sparse.reference(cached).is_err() && sparse.cost(cached).is_err());
        let longer = Array4::from_elem((2, 4, 200, 20), 1.0);
        let refusal = sparse.forward(Cached::new(longer.view(), &cache)).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
        assert!(out.iter().all(|x| x.is_nan()), "something was written");
    }
}
