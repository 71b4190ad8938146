//! Landmark attention: a token after each block gates the block.

use ndarray::s;

use crate::attention::{Cost, Margins};
use crate::card::{carded, exhibit};
use crate::definition::select::chosen;
use crate::definition::softmax::Reference;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::marked::Marks;
use crate::keys::{Keys, Layout, Per, TokenLists};
use crate::score::Plain;
use crate::select::{self, Forced, Pick, Reduce, Rule, Scheme, Scored, Summary};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::marked::Marked;
use crate::stages::selecting::{Selecting, dot, selecting, sparse_options};

/// Landmark attention: a token after each block gates the block.
///
/// ```text
/// a = softmax over the tokens of the query's own block up to it, and the landmarks before
/// w_j = a_j                                              for a token of the own block
/// w_j = a_b exp(s_j) / sum_{l in block b} exp(s_l)       for a token of an earlier block b
/// ```
///
/// A landmark's score decides what its block as a whole gets, and the tokens of
/// the block share that; its own value counts for nothing. Every `block` tokens
/// are followed by a landmark. In inference only the blocks are read whose
/// landmarks score highest ([`k`](LandmarkBuilder::k)). From "Landmark
/// Attention: Random-Access Infinite Context Length for Transformers" (arXiv
/// 2305.16300). Positions are the caller's: the released inference numbers
/// retrieved blocks anew.
///
/// Runs over arrays and, in prefill and in decoding, over caches, each of whose
/// sequences has its landmarks from its start on: append a landmark as any other token.
/// A block may be longer than a sequence, which then has no landmark yet.
///
/// Cost: `2 head_dim` flops a visible pair twice and `2 value_dim` once; 8 bytes
/// are held for each block that a query sees.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::Landmark};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 510, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let train = Landmark::builder(50).build()?.forward(x)?;
/// // The 3 blocks of 50 tokens that score highest, and the query's own.
/// let index = Landmark::builder(50).k(3).build()?.select(x)?;
/// assert_eq!(index.keys(0, 0, 500), 3 * 50 + 42);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Landmark {
    config: Config<Order, Plain>,
    marks: Marks,
    k: Option<usize>,
}

/// Builds a [`Landmark`].
#[derive(Clone, Debug)]
pub struct LandmarkBuilder {
    options: Options<Order, Plain>,
    block: usize,
    k: Option<usize>,
}

impl Landmark {
    /// A landmark after every `block` tokens.
    pub fn builder(block: usize) -> LandmarkBuilder {
        let options = Options { mask: Order { causal: true }, ..Options::default() };
        LandmarkBuilder { options, block, k: None }
    }

    fn pick(count: usize) -> Pick {
        Pick { rule: Rule::TopK(count), forced: Forced::default() }
    }

    fn scheme(&self, count: usize) -> Scheme {
        Scheme {
            unit: self.marks.unit(),
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Self::pick(count),
            causal: true,
            scored: Scored::Begun,
        }
    }

    /// Without a choice, no list is in doubt.
    fn define_all(&self, dims: &Dims, lengths: &Lengths<'_>) -> Result<(TokenLists, Margins)> {
        let lists = self.marks.lists(dims, lengths, None)?;
        let margins = Margins { doubtful: vec![Vec::new(); lists.layout().lists()?] };
        Ok((lists, margins))
    }
}

sparse_options!(LandmarkBuilder, always causal);

impl LandmarkBuilder {
    /// Each head of each query reads so many of the earlier blocks, those whose
    /// landmarks score highest. Default: all.
    pub fn k(self, k: usize) -> Self {
        Self { k: Some(k), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a block of 0 tokens, `k` of 0 or a scale that is not
    /// finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Landmark> {
        let Self { options, block, k } = self;
        if block == 0 || u32::try_from(block).is_err() {
            return Err(Error::value("block", "from 1 to 2^32 - 1 tokens", block));
        }
        if k == Some(0) {
            return Err(Error::value("k", "at least 1 block", 0));
        }
        Ok(Landmark { config: options.build()?, marks: Marks { block }, k })
    }
}

impl<X: Marked> Selecting<X> for Landmark {
    type Index = TokenLists;

    fn select_bytes(&self, x: X) -> Result<usize> {
        x.fitting()?;
        let Some(count) = self.k else { return Ok(0) };
        x.with_marks(self.marks, self.config.isa(), |source| {
            select::workspace_bytes(source, &self.scheme(count))
        })
    }

    fn select_in(&self, x: X, workspace: &mut Workspace) -> Result<TokenLists> {
        x.fitting()?;
        x.measured(|dims, lengths| {
            let Some(count) = self.k else { return self.marks.lists(dims, lengths, None) };
            let found = x.with_marks(self.marks, self.config.isa(), |source| {
                select::select(source, &self.scheme(count), workspace)
            })?;
            self.marks.lists(dims, lengths, Some((&found.offsets, &found.candidates)))
        })
    }

    fn define_select(&self, x: X) -> Result<(TokenLists, Margins)> {
        x.fitting()?;
        let Some(count) = self.k else { return x.measured(|dims, lengths| self.define_all(dims, lengths)) };
        x.with_exact(|(dims, lengths), q, k| {
            let (marks, layout) = (self.marks, Layout::of(Per::Head, 1, dims, lengths));
            let (mut ends, mut blocks, mut margins) = (vec![0], Vec::<u32>::new(), Margins::default());
            layout.lists()?;
            for of in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
                for (h, i) in (0..dims.q_heads).flat_map(|h| (0..layout.queries).map(move |i| (h, i))) {
                    let score = |block: usize| {
                        let mark = of.keys.start + block * marks.unit() + marks.block;
                        let key =
                            k.slice(s![of.batch, h / (dims.q_heads / dims.kv_heads), mark..mark + 1, ..]);
                        dot(q.slice(s![of.batch, h, of.queries.start + i, ..]), &key)
                    };
                    let before = if i < of.queries.len() { marks.before(&of, i) } else { 0 };
                    let scores: Vec<f64> = (0..before).map(score).collect();
                    let (ids, doubtful) = chosen(&Self::pick(count), &scores);
                    blocks.extend(ids.into_iter().map(|block| block as u32));
                    ends.push(blocks.len());
                    let tokens = |block: usize| block * marks.unit()..block * marks.unit() + marks.block;
                    margins.doubtful.push(doubtful.into_iter().map(tokens).collect());
                }
            }
            Ok((marks.lists(dims, lengths, Some((&ends, &blocks)))?, margins))
        })
    }

    fn price_select(&self, x: X) -> Result<Cost> {
        x.fitting()?;
        x.measured(|dims, lengths| {
            let pairs = if self.k.is_some() { self.marks.pairs(dims, lengths) } else { 0 };
            Ok(Cost { flops: (2 * pairs * dims.q_heads * dims.head_dim) as u64, bytes: 0 })
        })
    }

    fn with_call<R>(&self, x: X, index: &TokenLists, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.with_nested(self.marks, &self.config, index, run)
    }

    fn define(&self, x: X, index: &TokenLists) -> Result<Reference> {
        x.define_nested(self.marks, &self.config, index)
    }

    fn price(&self, x: X, index: &TokenLists) -> Result<Cost> {
        x.fitting()?;
        x.price(&self.config, Keys::Tokens(index))
    }
}
selecting!(Landmark, TokenLists, [Q, K, O] Qkv);
selecting!(Landmark, TokenLists, caches);

exhibit! {
    LandmarkExhibit of Landmark, "sparse", "Landmark", "arXiv 2305.16300";
    "the query's own block of 8 tokens, and the 4 earlier ones whose landmarks it scores highest, gated by these";
    not "where the model was not trained with landmarks";
    tokens false;
    build(_, _) { Landmark::builder(8).k(4) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Landmark, LandmarkExhibit);

#[cfg(test)]
mod tests;
