//! S2-Attention: a local window of blocks and one block in every stride, at
//! another phase for each head, so that the heads together see everything.

use std::ops::Range;

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::keys::Per;
use crate::mask::{Causal, Coverage, Mask};
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::patterned::{Pattern, patterned};

/// The pattern as a mask.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strided {
    block: usize,
    local: usize,
    stride: usize,
    step: Option<usize>,
    offset: usize,
    dense: usize,
    /// Query heads of a key/value head, and how many of these there are, where
    /// that is known: see [`S2AttentionBuilder::heads`].
    group: usize,
    kv_heads: usize,
}

impl Strided {
    fn sees(&self, head: usize, i: usize, j: usize) -> bool {
        let h = head / self.group;
        let step = self.step.unwrap_or((self.stride / self.kv_heads).max(1));
        let phase = (j % self.stride + h % self.stride * (step % self.stride) + self.offset % self.stride)
            % self.stride;
        j <= i && (i - j < self.local || phase == 0 || h + self.dense >= self.kv_heads)
    }

    /// The block of a query's position; `None` before the first key.
    fn block_of(&self, site: &Site, query: usize) -> Option<usize> {
        (query + site.kv_len).checked_sub(site.q_len).map(|position| position / self.block)
    }
}

impl Mask for Strided {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        let block = self.block_of(site, query);
        Causal::new().visible(site, query, key)
            && block.is_some_and(|i| self.sees(site.head, i, key / self.block))
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        Causal::new().hull(site, queries)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let last = queries.end.saturating_sub(1);
        let (first, last) = (self.block_of(site, queries.start), self.block_of(site, last));
        let j = keys.start / self.block;
        match (first, last) {
            (Some(first), Some(last)) if first == last && j == keys.end.saturating_sub(1) / self.block => {
                if self.sees(site.head, first, j) {
                    Causal::new().coverage(site, queries, keys)
                } else {
                    Coverage::Empty
                }
            }
            _ => Coverage::Partial,
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let Some(i) = self.block_of(site, query) else { return 0 };
        let (mut bits, mut at) = (0, first);
        // Block by block: one where blocks are whole words.
        while at < first + 64 {
            let j = at / self.block;
            let end = ((j + 1) * self.block).min(first + 64);
            if self.sees(site.head, i, j) {
                bits |= (u64::MAX >> (64 - (end - at))) << (at - first);
            }
            at = end;
        }
        bits & Causal::new().bits(site, query, first)
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if (dims.q_heads, dims.kv_heads) == (self.group * self.kv_heads, self.kv_heads) || dims.q_heads == 0 {
            return Ok(());
        }
        let expected =
            format!("{} query heads over {} key/value heads", self.group * self.kv_heads, self.kv_heads);
        Err(Error::value("q", expected, format_args!("{} over {}", dims.q_heads, dims.kv_heads)))
    }
}

impl Pattern for Strided {
    fn per(&self) -> Per {
        Per::Group
    }

    fn ranges(&self, site: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        let last = self.block_of(site, queries.end - 1);
        let Some(last) = last else { return };
        let first = self.block_of(site, queries.start).unwrap_or(0);
        let end = (queries.end + site.kv_len).saturating_sub(site.q_len);
        // One block more for each block that the queries lie in.
        for j in (0..=last).filter(|&j| (first.max(j)..=last).any(|i| self.sees(site.head, i, j))) {
            visit(j * self.block..((j + 1) * self.block).min(end));
        }
    }
}

/// S2-Attention: a local window of blocks and one block in every stride, at
/// another phase for each head, so that the heads together see everything.
///
/// ```text
/// query block i of key/value head h sees key block j <= i with
///     i - j < local   or   (j + h step + offset) mod stride = 0
/// ```
///
/// and of the last block what is at or before the query. `step` is `max(1,
/// stride / heads)` unless it is given. All query heads of a key/value head see
/// the same, so that blocks which have left the window and are not in phase can
/// be evicted from the cache. The last `dense` key/value heads see all blocks.
/// From "Efficient LLM Training and Serving with Heterogeneous Context
/// Sharding among Attention Heads" (arXiv 2407.17678, S2-Attention) and the
/// DKernel library, in its causal form; Phi-3-small's has an offset of 1.
///
/// Runs over arrays and, in prefill and in decoding, over caches.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, of which there are
/// `local + i / stride` blocks a block of queries.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::S2Attention};
/// use ndarray::Array4;
///
/// let q = Array4::<f32>::ones((1, 8, 500, 32));
/// let k = Array4::<f32>::ones((1, 4, 500, 32));
/// let x = Qkv::new(q.view(), k.view(), k.view());
/// let s2 = S2Attention::builder(8, 4).block(64).local(2).stride(4).build()?;
/// let out = s2.forward(x)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct S2Attention {
    config: Config<Strided, Plain>,
}

/// Builds a [`S2Attention`].
#[derive(Clone, Debug)]
pub struct S2AttentionBuilder {
    pattern: Strided,
    q_heads: usize,
    scale: Option<f32>,
    isa: Option<crate::simd::Isa>,
}

impl S2Attention {
    /// For so many heads; blocks of 64, of which 16 are local and one in 8
    /// beyond.
    pub fn builder(q_heads: usize, kv_heads: usize) -> S2AttentionBuilder {
        let pattern =
            Strided { block: 64, local: 16, stride: 8, step: None, offset: 0, dense: 0, group: 1, kv_heads };
        S2AttentionBuilder { pattern, q_heads, scale: None, isa: None }
    }
}

impl S2AttentionBuilder {
    /// Queries and keys of a block; at least 16.
    pub fn block(mut self, block: usize) -> Self {
        self.pattern.block = block;
        self
    }

    /// Blocks of the window, the query's own among them; at least 1.
    pub fn local(mut self, local: usize) -> Self {
        self.pattern.local = local;
        self
    }

    /// One block in so many is seen beyond the window; at least 1.
    pub fn stride(mut self, stride: usize) -> Self {
        self.pattern.stride = stride;
        self
    }

    /// By how many blocks the phase moves from a key/value head to the next; 0
    /// for heads that all see the same.
    pub fn step(mut self, step: usize) -> Self {
        self.pattern.step = Some(step);
        self
    }

    /// By how many blocks all phases are moved.
    pub fn offset(mut self, offset: usize) -> Self {
        self.pattern.offset = offset;
        self
    }

    /// The last so many key/value heads see all blocks.
    pub fn dense(mut self, heads: usize) -> Self {
        self.pattern.dense = heads;
        self
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for blocks below 16 keys, no local block, a stride of 0
    /// or a scale that is not finite, [`Error::Heads`] for heads that do not
    /// divide, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<S2Attention> {
        let Self { mut pattern, q_heads, scale, isa } = self;
        if pattern.block < 16 || pattern.block > u32::MAX as usize {
            return Err(Error::value("block", "at least 16 keys", pattern.block));
        }
        for (name, n) in [("local", pattern.local), ("stride", pattern.stride)] {
            if n == 0 || n > u32::MAX as usize {
                return Err(Error::value(name, "at least 1 block", n));
            }
        }
        if pattern.kv_heads == 0 || !q_heads.is_multiple_of(pattern.kv_heads) {
            let kv_heads = pattern.kv_heads;
            if kv_heads > 0 || q_heads > 0 {
                return Err(Error::Heads { q_heads, kv_heads });
            }
        }
        pattern.group = q_heads.checked_div(pattern.kv_heads).unwrap_or(1).max(1);
        pattern.kv_heads = pattern.kv_heads.max(1);
        let options = Options { mask: pattern, score: Plain, scale, isa };
        Ok(S2Attention { config: options.build()? })
    }
}

patterned!(S2Attention);
patterned!(S2Attention, caches);

exhibit! {
    S2Exhibit of S2Attention, "sparse", "S2-Attention", "arXiv 2407.17678";
    "a window of one block of 64 keys and every third block beyond, at another phase for each head";
    not "where single heads must see everything: only all of them together do";
    tokens false;
    build(x, _) { S2Attention::builder(x.q.dim().1, x.k.dim().1).local(1).stride(3) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(S2Attention, S2Exhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::sparse::testing::{self, Arrays};

    fn s2(block: usize, local: usize, stride: usize) -> S2Attention {
        S2Attention::builder(4, 2).block(block).local(local).stride(stride).build().unwrap()
    }

    #[test]
    fn identities() {
        for (block, local, stride) in [(64, 1, 3), (16, 2, 5), (50, 1, 2), (128, 1, 4)] {
            testing::chunks_are_the_whole(&s2(block, local, stride));
            testing::last_row_is_decoding(&s2(block, local, stride));
            testing::never_ahead(&s2(block, local, stride));
            testing::exact_scores_give_equal_lists(&s2(block, local, stride));
            testing::caches_are_arrays(&s2(block, local, stride));
        }
        let dense = |s2: &S2Attention| {
            for sizes in [[2, 4, 2, 200, 200, 24, 12], [1, 4, 2, 3, 300, 24, 12]] {
                let x = Arrays::normal(sizes, 1);
                let want = crate::dense::Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
                testing::near("dense", &s2.forward(x.qkv()).unwrap(), &want);
            }
        };
        dense(&s2(64, 1, 1));
        dense(&s2(16, 100, 7));
        dense(&S2Attention::builder(4, 2).block(16).local(1).stride(9).dense(2).build().unwrap());
    }

    /// As many heads as the stride see every block once beyond the window.
    #[test]
    fn heads_together_see_everything() {
        let s2 = S2Attention::builder(4, 4).local(1).stride(4).build().unwrap();
        let x = Arrays::normal([1, 4, 4, 1000, 1000, 4, 4], 1);
        let plan = s2.select(x.qkv()).unwrap();
        for block in 0..16u32 {
            let mut seen = vec![0; block as usize + 1];
            for head in 0..4 {
                plan.atoms(0, head, block as usize).iter().for_each(|&atom| seen[atom as usize] += 1);
            }
            let beyond = &seen[..block as usize];
            assert!(beyond.iter().all(|&n| n == 1), "{seen:?}");
            assert_eq!(seen[block as usize], 4, "its own block");
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: S2AttentionBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(S2Attention::builder(4, 2).block(8)).starts_with("block: "));
        assert!(refusal(S2Attention::builder(4, 2).local(0)).starts_with("local: "));
        assert!(refusal(S2Attention::builder(4, 2).stride(0)).starts_with("stride: "));
        assert!(refusal(S2Attention::builder(4, 3)).starts_with("q: "));
        let x = Arrays::normal([1, 6, 2, 5, 5, 4, 4], 1);
        assert!(s2(64, 1, 1).forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    }
}
