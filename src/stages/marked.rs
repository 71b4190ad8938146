//! Arrays and caches whose blocks of tokens have marks after them: what selects by these
//! marks, and attention in which they share out the softmax of their blocks.

use ndarray::{Array4, s};

use crate::cache::{Cache, Cached};
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::marked::Marks;
use crate::keys::source::{Kv, Slots};
use crate::keys::{Keys, TokenLists};
use crate::score::Plain;
use crate::select::Source;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::nested::{self, Groups, Logits, Nested};
use crate::stages::selecting::{Attended, Spans};

/// What has marks.
pub(crate) trait Marked: Attended {
    /// The sizes, checked.
    fn fitting(&self) -> Result<Dims>;

    /// Calls `run` with what the marks are chosen from.
    fn with_marks<R>(&self, marks: Marks, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R>;

    /// Calls `run` with the queries and keys in `f64`, and where sequences lie in these.
    fn with_exact<R>(
        &self,
        run: impl FnOnce((&Dims, &Lengths<'_>), &Array4<f64>, &Array4<f64>) -> Result<R>,
    ) -> Result<R>;

    /// The call of an engine, where marks share out the softmax of their blocks.
    fn with_nested<R>(
        &self,
        marks: Marks,
        config: &Config<Order, Plain>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R>;

    /// Its definition.
    fn define_nested(
        &self,
        marks: Marks,
        config: &Config<Order, Plain>,
        index: &TokenLists,
    ) -> Result<Reference>;
}

/// Each block is a group, but the query's own.
fn groups(marks: Marks) -> Groups {
    Groups { unit: marks.unit(), own: true }
}

fn nested<'a>(
    (marks, config): (Marks, &Config<Order, Plain>),
    (dims, lengths, slots): (Dims, Lengths<'a>, Option<Slots<'a>>),
    (q, k, rows): (AnyArray<'a>, Kv<'a>, Kv<'a>),
    index: &'a TokenLists,
) -> Nested<'a> {
    let (isa, scale, groups) = (config.isa(), config.scale(&dims) as f32, groups(marks));
    let logits = Logits { q, k: rows, heads: dims.kv_heads, scale };
    Nested { isa, dims, lengths, slots, q, k, scale, groups, logits, index }
}

impl<Q: Element, K: Element, O: Element> Marked for Qkv<'_, Q, K, O> {
    fn fitting(&self) -> Result<Dims> {
        let dims = self.dims()?;
        if self.lengths != Lengths::Full {
            let reason = "landmarks are counted from the start of the arrays";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "landmarks", reason });
        }
        Ok(dims)
    }

    fn with_marks<R>(&self, marks: Marks, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R> {
        let k = marks.ahead(&self.k);
        run(&Source::new(isa, Qkv::<Q, K>::new(self.q.reborrow(), k, k), None)?)
    }

    fn with_exact<R>(
        &self,
        run: impl FnOnce((&Dims, &Lengths<'_>), &Array4<f64>, &Array4<f64>) -> Result<R>,
    ) -> Result<R> {
        let (q, k) = (self.q.mapv(Element::to_f64), self.k.mapv(Element::to_f64));
        run((&self.fitting()?, &self.lengths), &q, &k)
    }

    fn with_nested<R>(
        &self,
        marks: Marks,
        config: &Config<Order, Plain>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let dims = self.fitting()?;
        Keys::Tokens(index).check(&dims, &self.lengths)?;
        let (q, k) = (Q::any(Heads::new(self.q.reborrow())), K::any(Heads::new(self.k.reborrow())));
        let [k, rows] = [k, K::any(Heads::new(marks.rows(&self.k)))].map(|k| Kv::Arrays { k, v: k });
        let nested = nested((marks, config), (dims, self.lengths, None), (q, k, rows), index);
        nested::with_call(config, self.reborrow(), &nested, run)
    }

    fn define_nested(
        &self,
        marks: Marks,
        config: &Config<Order, Plain>,
        index: &TokenLists,
    ) -> Result<Reference> {
        let logits = (&self.q.reborrow(), &marks.rows(&self.k), config.scale(&self.fitting()?));
        nested::define_on(config, self.reborrow(), index, &groups(marks), logits)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Marked for Cached<'_, Q, C, O> {
    fn fitting(&self) -> Result<Dims> {
        let dims = self.dims()?;
        self.check_alike()?;
        Ok(dims)
    }

    /// Of keys that are one for each token from the first mark on but the last, as
    /// [`Marks::ahead`] has them, the marks alone are ever read.
    fn with_marks<R>(&self, marks: Marks, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R> {
        let (dims, slots) = (self.fitting()?, self.slots());
        let shorter: Vec<usize> = slots.lengths.iter().map(|n| n.saturating_sub(marks.unit())).collect();
        let slots = Slots { lengths: &shorter, ..slots };
        let spans = Spans::new(&dims, &slots);
        let rows = marks.of_cache(self.cache.source(), &dims);
        let of = (Q::any(Heads::new(self.q.reborrow())), Kv::CacheKeys(&rows));
        let source = Source::any(isa, dims, of, (spans.lengths(&slots), Some(slots)));
        run(&source.given(Kv::CacheKeys(&rows)))
    }

    fn with_exact<R>(
        &self,
        run: impl FnOnce((&Dims, &Lengths<'_>), &Array4<f64>, &Array4<f64>) -> Result<R>,
    ) -> Result<R> {
        let dims = self.fitting()?;
        let held = self.held(&dims);
        let (q, k) = (self.q.mapv(Element::to_f64), held.k.mapv(f64::from));
        run((&dims, &held.lengths(self)), &q, &k)
    }

    fn with_nested<R>(
        &self,
        marks: Marks,
        config: &Config<Order, Plain>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let (dims, slots) = (self.fitting()?, self.slots());
        let (spans, rows) = (Spans::new(&dims, &slots), marks.of_cache(self.cache.source(), &dims));
        let q = Q::any(Heads::new(self.q.reborrow()));
        let of = (q, Kv::Cache(self.cache.source()), Kv::CacheKeys(&rows));
        let places = (dims, spans.lengths(&slots), Some(slots));
        let nested = nested((marks, config), places, of, index);
        nested::with_call_cached(config, self.reborrow(), &nested, run)
    }

    fn define_nested(
        &self,
        marks: Marks,
        config: &Config<Order, Plain>,
        index: &TokenLists,
    ) -> Result<Reference> {
        let dims = self.fitting()?;
        let held = self.held(&dims);
        let lengths = held.lengths(self);
        // Marks by sequence.
        let sequences: Vec<_> = (0..dims.batch).map(|i| lengths.sequence(&dims, i)).collect();
        let most = sequences.iter().map(|of| of.keys.len() / marks.unit()).max().unwrap_or(0);
        let mut rows = Array4::<f32>::zeros((dims.batch, dims.kv_heads, most, dims.head_dim));
        for of in &sequences {
            for mark in 0..of.keys.len() / marks.unit() {
                let at = of.keys.start + mark * marks.unit() + marks.block;
                let key = held.k.slice(s![of.batch, .., at, ..]);
                rows.slice_mut(s![of.index, .., mark, ..]).assign(&key);
            }
        }
        let q = self.q.mapv(Element::to_f32);
        let x = Qkv { q: q.view(), k: held.k.view(), v: held.v.view(), lengths, out: self.out };
        let logits = (&x.q.reborrow(), &rows.view(), config.scale(&dims));
        nested::define_on(config, x.reborrow(), index, &groups(marks), logits)
    }
}
