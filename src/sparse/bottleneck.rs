//! The consciousness prior's bottleneck: a few elements of a large state are
//! selected, and all readers see these alone.

use std::ops::Range;

use ndarray::{ArrayView4, s};

use crate::attention::{Cost, Margins};
use crate::card::{Extras, carded, exhibit};
use crate::definition;
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv};
use crate::keys::{Keys, Layout, Per, TokenLists};
use crate::score::Plain;
use crate::select::{self, Forced, Pick, Reduce, Rule, Scheme, Source, Summary};
use crate::simd::Isa;
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{self, Selecting, dot, selecting};

/// What goes into a [`Bottleneck`].
#[derive(Clone, Copy, Debug)]
pub struct BottleneckInput<'a, T> {
    /// Readers as queries, elements of the state as keys and values.
    pub qkv: Qkv<'a, T>,
    /// Selectors, `[batch, kv_heads, selectors, head_dim]`.
    pub selectors: ArrayView4<'a, T>,
}

impl<'a, T> BottleneckInput<'a, T> {
    /// Of these arrays.
    pub fn new(qkv: Qkv<'a, T>, selectors: ArrayView4<'a, T>) -> Self {
        Self { qkv, selectors }
    }
}

impl<T: Element> Input for BottleneckInput<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        if self.qkv.lengths != Lengths::Full {
            let reason = "selectors choose from all elements of the arrays";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "selectors", reason });
        }
        let (batch, heads, _, dim) = self.selectors.dim();
        if (batch, heads, dim) != (dims.batch, dims.kv_heads, dims.head_dim) {
            let Dims { batch, kv_heads, head_dim, .. } = dims;
            let expected = format!("[batch, kv_heads, n, head_dim] = [{batch}, {kv_heads}, _, {head_dim}]");
            return Err(Error::shape("selectors", expected, self.selectors.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims().and_then(|_| self.qkv.out_dim())
    }
}

/// The consciousness prior's bottleneck: a few elements of a large state are
/// selected, and all readers see these alone.
///
/// ```text
/// S   = union over selectors c of the k elements i with the largest c . k_i, the lower one of equals
/// o_r = softmax attention of reader r on the elements of S
/// ```
///
/// "The Consciousness Prior" (arXiv 1709.08568) describes an attention that picks
/// a low-dimensional conscious state out of all that is unconscious, and
/// broadcasts it; it gives no formulas, and these are ours. An element that two
/// selectors choose is there once. Every key/value head is a state of its own.
///
/// Elements are those of one state, not tokens that accumulate: it runs over arrays.
///
/// Cost: `2 head_dim` flops a pair of a selector and an element, `2 (head_dim +
/// value_dim)` a pair of a reader and a selected element.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::{Bottleneck, BottleneckInput}};
/// use ndarray::Array4;
///
/// let state = Array4::from_shape_fn((1, 1, 500, 16), |(_, _, i, c)| ((i * (c + 3)) as f32).sin());
/// let (readers, selector) = (Array4::ones((1, 1, 30, 16)), Array4::ones((1, 1, 1, 16)));
/// let x = BottleneckInput::new(Qkv::new(readers.view(), state.view(), state.view()), selector.view());
/// let bottleneck = Bottleneck::builder(7).build()?;
/// let conscious = bottleneck.select(x)?;
/// assert_eq!(conscious.keys(0, 0, 0), 7);
/// let out = bottleneck.forward_on(x, &conscious)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Bottleneck {
    config: Config<Order, Plain>,
    k: usize,
}

/// Builds a [`Bottleneck`].
#[derive(Clone, Debug)]
pub struct BottleneckBuilder {
    options: Options<Order, Plain>,
    k: usize,
}

impl Bottleneck {
    /// `k` elements a selector.
    pub fn builder(k: usize) -> BottleneckBuilder {
        BottleneckBuilder { options: Options::default(), k }
    }

    fn scheme(&self) -> Scheme {
        Scheme {
            unit: 1,
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(self.k), forced: Forced::default() },
            causal: false,
            scored: crate::select::Scored::Begun,
        }
    }

    /// One list for all readers: what some selector has chosen of each head's
    /// elements. `chosen` are the lists of all selectors.
    fn lists<'a>(
        &self,
        dims: &Dims,
        selectors: usize,
        chosen: impl Iterator<Item = &'a [u32]>,
    ) -> Result<TokenLists> {
        let layout = Layout::new(Per::Group, dims.q_len.max(1), dims);
        let chosen: Vec<_> = chosen.collect();
        let (mut offsets, mut keys) = (vec![0], Vec::<u32>::new());
        for list in 0..layout.lists()? {
            let first = keys.len();
            chosen[list * selectors..(list + 1) * selectors]
                .iter()
                .for_each(|ids| keys.extend_from_slice(ids));
            keys[first..].sort_unstable();
            let mut kept = first;
            for at in first..keys.len() {
                if kept == first || keys[at] != keys[kept - 1] {
                    keys[kept] = keys[at];
                    kept += 1;
                }
            }
            keys.truncate(kept);
            offsets.push(keys.len());
        }
        TokenLists::from_keys(layout, &offsets, &keys)
    }
}

impl BottleneckBuilder {
    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0 or a scale that is not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Bottleneck> {
        if self.k == 0 {
            return Err(Error::value("k", "at least 1 element", 0));
        }
        Ok(Bottleneck { config: self.options.build()?, k: self.k })
    }
}

/// What selectors choose from, as queries and keys.
fn choice<'a, T: Element>(x: &'a BottleneckInput<'_, T>) -> Qkv<'a, T> {
    Qkv::new(x.selectors.reborrow(), x.qkv.k.reborrow(), x.qkv.k.reborrow())
}

impl<T: Element> Selecting<BottleneckInput<'_, T>> for Bottleneck {
    type Index = TokenLists;

    fn select_bytes(&self, x: BottleneckInput<'_, T>) -> Result<usize> {
        x.dims()?;
        select::workspace_bytes(&Source::new(self.config.isa(), choice(&x), None)?, &self.scheme())
    }

    fn select_in(&self, x: BottleneckInput<'_, T>, workspace: &mut Workspace) -> Result<TokenLists> {
        let dims = x.dims()?;
        let source = Source::new(self.config.isa(), choice(&x), None)?;
        let selected = select::select(&source, &self.scheme(), workspace)?;
        let lists = selected.offsets.windows(2).map(|ends| &selected.candidates[ends[0]..ends[1]]);
        self.lists(&dims, x.selectors.dim().2, lists)
    }

    fn define_select(&self, x: BottleneckInput<'_, T>) -> Result<(TokenLists, Margins)> {
        let (dims, scheme, of) = (x.dims()?, self.scheme(), choice(&x).dims()?);
        let [q, k] = [&x.selectors, &x.qkv.k].map(|x| x.mapv(Element::to_f64));
        let score = |b: usize, h: usize, i: usize, key: Range<usize>| {
            dot(q.slice(s![b, h, i, ..]), &k.slice(s![b, h, key, ..]))
        };
        let layout = scheme.layout(&of, &Lengths::Full);
        let (lists, margins) = definition::select::select(&scheme, &of, &Lengths::Full, &layout, score);
        let lists: Vec<Vec<u32>> =
            lists.iter().map(|list| list.iter().map(|&i| i as u32).collect()).collect();
        let selectors = x.selectors.dim().2;
        let index = self.lists(&dims, selectors, lists.iter().map(|list| &list[..]))?;
        // What is in doubt for one selector is so for all readers.
        let of_list = |list: usize| margins.doubtful[list * selectors..(list + 1) * selectors].concat();
        let doubtful = (0..index.layout().lists()?).map(of_list).collect();
        Ok((index, Margins { doubtful }))
    }

    fn price_select(&self, x: BottleneckInput<'_, T>) -> Result<Cost> {
        let dims = x.dims()?;
        Ok(Cost { flops: 2 * (x.selectors.len() * dims.kv_len) as u64, bytes: 0 })
    }

    fn with_call<R>(
        &self,
        x: BottleneckInput<'_, T>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        x.dims()?;
        selecting::with_call(&self.config, x.qkv, Keys::Tokens(index), run)
    }

    fn define(&self, x: BottleneckInput<'_, T>, index: &TokenLists) -> Result<Reference> {
        x.dims()?;
        selecting::define(&self.config, x.qkv, Keys::Tokens(index))
    }

    fn price(&self, x: BottleneckInput<'_, T>, index: &TokenLists) -> Result<Cost> {
        x.dims()?;
        selecting::price(&self.config, &x.qkv, Keys::Tokens(index))
    }
}
selecting!(Bottleneck, TokenLists, [T] BottleneckInput);

exhibit! {
    BottleneckExhibit of Bottleneck, "sparse", "top-k bottleneck", "arXiv 1709.08568";
    "the elements of a state that 2 selectors choose, 7 each, for all readers alike";
    not "where readers need different elements";
    tokens false;
    build(_, _) { Bottleneck::builder(7) }
    extras(x, field) {
        let (batch, heads, _, dim) = x.k.dim();
        let selector = |(_, h, i, c)| T::from_f32((field.round)(field.at(1, h, i, c)));
        Extras { keys: ndarray::Array4::from_shape_fn((batch, heads, 2, dim), selector), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> BottleneckInput<'a, T> { BottleneckInput::new(x, extras.keys.view()) }
}
carded!(Bottleneck, BottleneckExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{Arrays, near};

    fn bottleneck(k: usize) -> Bottleneck {
        Bottleneck::builder(k).build().unwrap()
    }

    #[test]
    fn all_elements_are_dense_and_one_is_the_best() {
        let x = Arrays::integers([2, 4, 2, 30, 70, 16, 8], 1);
        let selectors = Arrays::integers([2, 2, 2, 1, 1, 16, 1], 2).q;
        let input = BottleneckInput::new(x.qkv(), selectors.view());
        let all = bottleneck(100).forward(input).unwrap();
        near("all", &all, &Dense::builder().build().unwrap().forward(x.qkv()).unwrap());
        let one = bottleneck(1).forward(input).unwrap();
        for ((b, h, i, c), &got) in one.indexed_iter() {
            let score =
                |j: usize| (0..16).map(|c| selectors[[b, h / 2, 0, c]] * x.k[[b, h / 2, j, c]]).sum::<f32>();
            let best = (1..70).fold(0, |best, j| if score(j) > score(best) { j } else { best });
            assert!((got - x.v[[b, h / 2, best, c]]).abs() < 1e-6, "reader {i}");
        }
    }

    /// Nothing but what is selected reaches a reader, and twice is once.
    #[test]
    fn readers_depend_on_what_is_selected_alone() {
        let mut x = Arrays::integers([2, 4, 2, 30, 70, 16, 8], 3);
        let selectors = Arrays::integers([2, 2, 2, 3, 1, 16, 1], 4).q;
        let bottleneck = bottleneck(5);
        let index = bottleneck.select(BottleneckInput::new(x.qkv(), selectors.view())).unwrap();
        let (want, _) = bottleneck.reference_select(BottleneckInput::new(x.qkv(), selectors.view())).unwrap();
        assert_eq!(index, want);
        assert!((0..2).all(|b| [0, 2].iter().all(|&h| (5..=15).contains(&index.keys(b, h, 0)))));
        let before = bottleneck.forward(BottleneckInput::new(x.qkv(), selectors.view())).unwrap();
        for (b, g, j) in ndarray::indices((2, 2, 70)) {
            if !index.runs(b, 2 * g, 0).iter().any(|run| run.range().contains(&j)) {
                x.k.slice_mut(s![b, g, j, ..]).fill(f32::NAN);
                x.v.slice_mut(s![b, g, j, ..]).fill(f32::INFINITY);
            }
        }
        let x = BottleneckInput::new(x.qkv(), selectors.view());
        assert_eq!(bottleneck.forward_on(x, &index).unwrap(), before);
        assert_eq!(bottleneck.forward(x).unwrap(), before);
    }

    #[test]
    fn refusals() {
        assert_eq!(
            Bottleneck::builder(0).build().unwrap_err().to_string(),
            "k: expected at least 1 element, got 0"
        );
        let x = Arrays::normal([1, 2, 1, 3, 9, 8, 4], 1);
        let other = Arrays::normal([1, 2, 2, 3, 9, 8, 4], 1);
        let refusal = bottleneck(2).forward(BottleneckInput::new(x.qkv(), other.q.view())).unwrap_err();
        assert!(refusal.to_string().starts_with("selectors: "), "{refusal}");
    }
}
