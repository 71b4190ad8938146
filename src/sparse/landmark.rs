//! Landmark attention: a token after each block gates the block.

use ndarray::{ArrayView4, s};

use crate::attention::{Cost, Margins};
use crate::card::{carded, exhibit};
use crate::definition;
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::{ATOM, Keys, Layout, Per, Run, TokenLists};
use crate::score::Plain;
use crate::select::{self, Forced, Pick, Reduce, Rule, Scheme, Source, Summary};
use crate::simd::Isa;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::nested::{self, Groups, Logits, Nested};
use crate::stages::selecting::{Selecting, dot, selecting};

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
    block: usize,
    k: Option<usize>,
}

/// Builds a [`Landmark`].
#[derive(Clone, Debug)]
pub struct LandmarkBuilder {
    block: usize,
    k: Option<usize>,
    scale: Option<f32>,
    isa: Option<Isa>,
}

impl Landmark {
    /// A landmark after every `block` tokens.
    pub fn builder(block: usize) -> LandmarkBuilder {
        LandmarkBuilder { block, k: None, scale: None, isa: None }
    }

    /// Tokens of a block and its landmark.
    fn unit(&self) -> usize {
        self.block + 1
    }

    fn groups(&self) -> Groups {
        Groups { unit: self.unit(), own: true }
    }

    fn dims<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.lengths != Lengths::Full {
            let reason = "landmarks are counted from the start of the arrays";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "landmarks", reason });
        }
        Ok(dims)
    }

    /// The landmarks.
    fn landmarks<'a, K>(&self, k: &'a ArrayView4<'_, K>) -> ArrayView4<'a, K> {
        let first = self.block.min(k.dim().2);
        k.slice(s![.., .., first..; self.unit(), ..])
    }

    /// The keys from the first landmark on without the last key: of that many
    /// tokens fewer, a query sees the landmarks before its own block.
    fn ahead<'a, K>(&self, k: &'a ArrayView4<'_, K>) -> ArrayView4<'a, K> {
        let len = k.dim().2;
        k.slice(s![.., .., if len < self.unit() { len..len } else { self.block..len - 1 }, ..])
    }

    fn scheme(&self, count: usize) -> Scheme {
        Scheme {
            unit: self.unit(),
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(count), forced: Forced::default() },
            causal: true,
            scored: crate::select::Scored::Begun,
        }
    }

    /// Runs of the tokens of some blocks and of those of the one of a position.
    fn runs(
        &self,
        blocks: impl Iterator<Item = usize>,
        position: Option<usize>,
    ) -> impl Iterator<Item = Run> {
        let (unit, block) = (self.unit(), self.block);
        let run = |start: usize, len: usize| Run { start: start as u32, len: len as u32 };
        let own = position.map(|t| run(t / unit * unit, (t % unit + 1).min(block)));
        blocks.map(move |b| run(b * unit, block)).chain(own)
    }

    /// The lists of all queries: of the blocks that they have chosen, or of all
    /// blocks.
    fn lists(&self, dims: &Dims, chosen: Option<(&[usize], &[u32])>) -> Result<TokenLists> {
        let layout = match chosen {
            Some(_) => Layout::new(Per::Head, 1, dims),
            None => Layout::new(Per::Sequence, ATOM, dims),
        };
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        for list in 0..layout.lists()? {
            let last = ((list % layout.blocks() + 1) * layout.q_block).min(dims.q_len) - 1;
            let position = (last + dims.kv_len).checked_sub(dims.q_len);
            match chosen {
                Some((ends, blocks)) => {
                    let blocks = &blocks[ends[list]..ends[list + 1]];
                    runs.extend(self.runs(blocks.iter().map(|&b| b as usize), position));
                }
                None => runs.extend(self.runs(0..position.unwrap_or(0) / self.unit(), position)),
            }
            offsets.push(runs.len());
        }
        TokenLists::new(layout, offsets, runs)
    }
}

impl LandmarkBuilder {
    /// Each head of each query reads so many of the earlier blocks, those whose
    /// landmarks score highest. Default: all.
    pub fn k(self, k: usize) -> Self {
        Self { k: Some(k), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a block of 0 tokens, `k` of 0 or a scale that is not
    /// finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Landmark> {
        let Self { block, k, scale, isa } = self;
        if block == 0 || u32::try_from(block).is_err() {
            return Err(Error::value("block", "from 1 to 2^32 - 1 tokens", block));
        }
        if k == Some(0) {
            return Err(Error::value("k", "at least 1 block", 0));
        }
        let options = Options { mask: Order { causal: true }, score: Plain, scale, isa };
        Ok(Landmark { config: options.build()?, block, k })
    }
}

impl<Q: Element, K: Element, O: Element> Selecting<Qkv<'_, Q, K, O>> for Landmark {
    type Index = TokenLists;

    fn select_bytes(&self, x: Qkv<'_, Q, K, O>) -> Result<usize> {
        self.dims(&x)?;
        let Some(count) = self.k else { return Ok(0) };
        let k = self.ahead(&x.k);
        let source = Source::new(self.config.isa(), Qkv::<Q, K>::new(x.q.reborrow(), k, k), None)?;
        select::workspace_bytes(&source, &self.scheme(count))
    }

    fn select_in(&self, x: Qkv<'_, Q, K, O>, workspace: &mut Workspace) -> Result<TokenLists> {
        let dims = self.dims(&x)?;
        let Some(count) = self.k else { return self.lists(&dims, None) };
        let k = self.ahead(&x.k);
        let source = Source::new(self.config.isa(), Qkv::<Q, K>::new(x.q.reborrow(), k, k), None)?;
        let selected = select::select(&source, &self.scheme(count), workspace)?;
        self.lists(&dims, Some((&selected.offsets, &selected.candidates)))
    }

    fn define_select(&self, x: Qkv<'_, Q, K, O>) -> Result<(TokenLists, Margins)> {
        let dims = self.dims(&x)?;
        let Some(count) = self.k else {
            let lists = self.lists(&dims, None)?;
            let margins = Margins { doubtful: vec![Vec::new(); lists.layout().lists()?] };
            return Ok((lists, margins));
        };
        let (scheme, k) = (self.scheme(count), self.ahead(&x.k).mapv(Element::to_f64));
        let (q, ahead) = (x.q.mapv(Element::to_f64), Dims { kv_len: k.dim().2, ..dims });
        let group = dims.q_heads / dims.kv_heads.max(1);
        let score = |b: usize, h: usize, i: usize, keys: std::ops::Range<usize>| {
            dot(q.slice(s![b, h, i, ..]), &k.slice(s![b, h / group, keys, ..]))
        };
        let layout = scheme.layout(&ahead, &Lengths::Full);
        let (lists, mut margins) =
            definition::select::select(&scheme, &ahead, &Lengths::Full, &layout, score);
        for range in margins.doubtful.iter_mut().flatten() {
            range.end = range.start + self.block;
        }
        let ends: Vec<usize> = std::iter::once(0)
            .chain(lists.iter().scan(0, |end, list| {
                *end += list.len();
                Some(*end)
            }))
            .collect();
        let blocks: Vec<u32> = lists.iter().flatten().map(|&b| b as u32).collect();
        Ok((self.lists(&dims, Some((&ends, &blocks)))?, margins))
    }

    fn price_select(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        let dims = self.dims(&x)?;
        let seen = |i: usize| (i + dims.kv_len).checked_sub(dims.q_len).map_or(0, |t| t / self.unit());
        let pairs = (0..dims.q_len).map(seen).sum::<usize>() * dims.batch * dims.q_heads;
        let flops = if self.k.is_some() { 2 * pairs * dims.head_dim } else { 0 };
        Ok(Cost { flops: flops as u64, bytes: 0 })
    }

    fn with_call<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let dims = self.dims(&x)?;
        Keys::Tokens(index).check(&dims, &x.lengths)?;
        let scale = self.config.scale(&dims) as f32;
        let (q, k) = (Q::any(Heads::new(x.q.reborrow())), K::any(Heads::new(x.k.reborrow())));
        let landmarks = K::any(Heads::new(self.landmarks(&x.k)));
        let nested = Nested {
            isa: self.config.isa(),
            dims,
            lengths: x.lengths,
            q,
            k,
            scale,
            groups: self.groups(),
            logits: Logits { q, k: landmarks, scale },
            index,
        };
        nested::with_call(&self.config, x.reborrow(), &nested, run)
    }

    fn define(&self, x: Qkv<'_, Q, K, O>, index: &TokenLists) -> Result<Reference> {
        let logits = (&x.q.reborrow(), &self.landmarks(&x.k), self.config.scale(&self.dims(&x)?));
        nested::define_on(&self.config, x.reborrow(), index, &self.groups(), logits)
    }

    fn price(&self, x: Qkv<'_, Q, K, O>, index: &TokenLists) -> Result<Cost> {
        Keys::Tokens(index).check(&self.dims(&x)?, &x.lengths)?;
        self.config.listed(Keys::Tokens(index)).cost(&x)
    }
}
selecting!(Landmark, TokenLists, [Q, K, O] Qkv);

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
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::attention::{Attention, Selects, Weights};
    use crate::dense::Dense;
    use crate::mask::{Causal, Mask, mask_fn};
    use crate::sparse::testing::{self, Arrays};

    fn landmark(block: usize, k: Option<usize>) -> Landmark {
        let builder = Landmark::builder(block);
        k.map_or(builder.clone(), |k| builder.k(k)).build().unwrap()
    }

    /// The grouped softmax, as the paper has it.
    #[test]
    fn weights_are_those_of_two_softmaxes_and_sum_to_one() {
        for (block, n) in [(5, 60), (1, 20), (50, 130), (100, 40)] {
            let x = Arrays::normal([1, 2, 1, n, n, 16, 8], n as u64);
            let weights = landmark(block, None).weights(x.qkv()).unwrap();
            let is_landmark = |j: usize| j % (block + 1) == block;
            for (h, t) in (0..2).flat_map(|h| (0..n).map(move |t| (h, t))) {
                let score = |j: usize| {
                    (0..16).map(|c| f64::from(x.q[[0, h, t, c]]) * f64::from(x.k[[0, 0, j, c]])).sum::<f64>()
                        / 4.0
                };
                let own = t / (block + 1);
                let outer = (0..=t)
                    .filter(|&j| if j / (block + 1) == own { !is_landmark(j) } else { is_landmark(j) });
                let total: f64 = outer.map(|j| score(j).exp()).sum();
                let mut sum = 0.0;
                for j in 0..n {
                    let b = j / (block + 1);
                    let inner =
                        || (b * (block + 1)..b * (block + 1) + block).map(|l| score(l).exp()).sum::<f64>();
                    let want = if j > t || is_landmark(j) {
                        0.0
                    } else if b == own {
                        score(j).exp() / total
                    } else {
                        score(b * (block + 1) + block).exp() / total * score(j).exp() / inner()
                    };
                    let got = f64::from(weights[[0, h, t, j]]);
                    assert!((got - want).abs() < 1e-5, "{block}: {t}, {j}: {got}, {want}");
                    sum += want;
                }
                assert!((sum - 1.0).abs() < 1e-9);
            }
        }
    }

    /// Where a landmark scores as all of its block together, blocks are no
    /// matter: here its key is that of the block's only token.
    #[test]
    fn landmarks_of_single_tokens_that_score_alike_are_dense() {
        let mut x = Arrays::normal([2, 4, 2, 90, 90, 16, 8], 3);
        for j in (1..90).step_by(2) {
            let before = x.k.slice(s![.., .., j - 1, ..]).to_owned();
            x.k.slice_mut(s![.., .., j, ..]).assign(&before);
        }
        let tokens = mask_fn(|_, _, j| j % 2 == 0).and(Causal::new());
        let want = Dense::builder().mask(tokens).build().unwrap().forward(x.qkv()).unwrap();
        testing::near("blocks of 1", &landmark(1, None).forward(x.qkv()).unwrap(), &want);
    }

    #[test]
    fn all_blocks_are_the_train_form_and_later_tokens_change_nothing() {
        let x = Arrays::integers([2, 4, 2, 130, 150, 24, 12], 4);
        let [train, all] = [None, Some(100)].map(|k| landmark(9, k).forward(x.qkv()).unwrap());
        testing::near("all blocks", &all, &train);
        let few = landmark(9, Some(2));
        assert_eq!(few.select(x.qkv()).unwrap(), few.reference_select(x.qkv()).unwrap().0);
        let mut y = Arrays { q: x.q.clone(), k: x.k.clone(), v: x.v.clone() };
        y.k.slice_mut(s![.., .., 101.., ..]).fill(f32::NAN);
        y.v.slice_mut(s![.., .., 101.., ..]).fill(f32::NAN);
        let first = |x: &Array4<f32>| x.slice(s![.., .., ..81, ..]).to_owned();
        for k in [None, Some(2)] {
            let (before, after) =
                (landmark(9, k).forward(x.qkv()).unwrap(), landmark(9, k).forward(y.qkv()).unwrap());
            testing::near("before", &first(&after), &first(&before));
        }
        // A step is the last row.
        let step = Qkv::new(x.q.slice(s![.., .., 129.., ..]), x.k.view(), x.v.view());
        let want = few.forward(x.qkv()).unwrap().slice(s![.., .., 129.., ..]).to_owned();
        testing::near("step", &few.forward(step).unwrap(), &want);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: LandmarkBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(Landmark::builder(0)).starts_with("block: "));
        assert_eq!(refusal(Landmark::builder(4).k(0)), "k: expected at least 1 block, got 0");
        let x = Arrays::normal([1, 1, 1, 10, 10, 4, 4], 1);
        assert!(landmark(4, None).forward(x.qkv().key_lengths(&[7])).is_err());
    }
}
