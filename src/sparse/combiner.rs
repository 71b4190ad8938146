//! Combiner: full attention whose distant keys are merged by segment.

use std::ops::Range;

use ndarray::Array2;

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::Sight;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::mask::interval::bits_of;
use crate::mask::{Coverage, Mask};
use crate::score::Plain;
use crate::select::Summary;
use crate::simd::Isa;
use crate::stages::attend::{Config, Options};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::summarise::summarise;
use crate::stages::virtuals::{self, Merging};

/// A query sees its own segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    len: usize,
    causal: bool,
    own: bool,
}

impl Segment {
    /// The keys that some queries see, of as many tokens: all of them together,
    /// and each.
    #[inline(always)]
    fn seen(&self, site: &Site, queries: &Range<usize>) -> [Range<usize>; 2] {
        let of = |i: usize| {
            let start = i / self.len * self.len;
            start..if self.causal { i + 1 } else { (start + self.len).min(site.kv_len) }
        };
        let (first, last) = (of(queries.start), of(queries.end - 1));
        [first.start..last.end, last.start..first.end]
    }

    /// Who sees the abstractions.
    fn sight(&self) -> Sight<'static> {
        match self {
            Self { causal: true, .. } => Sight::Every { first: self.len as isize, step: self.len },
            Self { own: true, .. } => Sight::Every { first: 0, step: 0 },
            _ => Sight::Others { step: self.len },
        }
    }
}

impl Mask for Segment {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.seen(site, &(query..query + 1))[0].contains(&key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        if queries.is_empty() { 0..0 } else { self.seen(site, &queries)[0].clone() }
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let [all, each] = self.seen(site, &queries);
        if keys.start >= all.end || keys.end <= all.start {
            Coverage::Empty
        } else if keys.start >= each.start && keys.end <= each.end {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let [seen, _] = self.seen(site, &(query..query + 1));
        bits_of(&seen, first)
    }
    fn is_shared(&self) -> bool {
        true
    }
}

/// What stands for the queries and the keys of a segment, channel by channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// The largest.
    #[default]
    Max,
    /// The mean.
    Mean,
}

impl Pooling {
    fn summary(self) -> Summary {
        match self {
            Self::Max => Summary::Max,
            Self::Mean => Summary::Mean,
        }
    }

    fn define<R: Real>(self, x: &Array2<R>, segment: usize) -> Array2<R> {
        let (n, d) = x.dim();
        Array2::from_shape_fn((n.div_ceil(segment), d), |(s, c)| {
            let tokens = s * segment..((s + 1) * segment).min(n);
            let (first, count) = (tokens.start, tokens.len());
            match self {
                Self::Max => tokens.map(|i| x[[i, c]]).fold(x[[first, c]], R::max),
                Self::Mean => R::sum(tokens.map(|i| x[[i, c]])) / R::of(count as f64),
            }
        })
    }
}

/// Combiner: full attention whose distant keys are merged by segment.
///
/// ```text
/// Q_s = pool of scale q_i,  K_s = pool of k_i               over the tokens i of segment s
/// V_s = sum_{j in s} softmax_j(Q_s . k_j) v_j               its abstraction
/// o_i = softmax attention of q_i on the keys of its own segment, and the K_s, V_s
///       of the others (causal: of the segments before)
/// ```
///
/// Every query sees every token, of its own segment as it is and of the others
/// through one abstraction each, all in one softmax in which an abstraction
/// counts once. From "Combiner: Full Attention Transformer with Sparse
/// Computation Cost" (arXiv 2107.05768), its fixed form: the paper's partition
/// leaves a query's own segment out of the abstractions, while its code has it
/// in where nothing is causal ([`own`](CombinerBuilder::own)). No learned
/// parameters.
///
/// Every token is a query: there is no step over a cache, so it runs over arrays.
///
/// Cost: `2 (head_dim + value_dim)` flops for each of `segment + len / segment`
/// pairs of a query: least for segments of `sqrt(len)`.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::Combiner};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 400, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let combiner = Combiner::builder(20).causal().build()?;
/// let out = combiner.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Combiner {
    config: Config<Segment, Plain>,
    merging: Merging,
    pooling: Pooling,
    isa: Isa,
}

impl Combiner {
    /// Segments of so many tokens.
    pub fn builder(segment: usize) -> CombinerBuilder {
        CombinerBuilder::with(segment)
    }

    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.lengths != Lengths::Full {
            let reason = "all sequences have as many segments";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "segments", reason });
        }
        if dims.q_len != dims.kv_len {
            let expected = format!("the queries of all {} tokens", dims.kv_len);
            return Err(Error::value("q", expected, dims.q_len));
        }
        Ok(dims)
    }
}

options! {
    /// Builds a [`Combiner`].
    CombinerBuilder of Combiner, scale "1 / sqrt(head_dim)" isa;
    given { segment: usize; }
    own { pooling: Pooling = Pooling::Max; }
    flags {
        /// A query sees no token after its own.
        causal;
        /// A query sees the abstraction of its own segment too, unless it is
        /// causal.
        own;
    }
    build(this, config) {
        let CombinerBuilder { segment, pooling, causal, own, .. } = this;
        if segment == 0 || u32::try_from(segment).is_err() {
            return Err(Error::value("segment", "from 1 to 2^32 - 1 tokens", segment));
        }
        let merging = Merging::new(segment, config.scale, config.isa)?;
        let mask = Segment { len: segment, causal, own };
        let isa = config.isa;
        let config = Options { mask, score: Plain, scale: config.scale, isa: Some(isa) }.build()?;
        Ok(Combiner { config, merging, pooling, isa })
    }
}

impl CombinerBuilder {
    /// What stands for queries and keys. Default: [`Pooling::Max`].
    pub fn pooling(self, pooling: Pooling) -> Self {
        Self { pooling, ..self }
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Combiner {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.check(&x)?;
        let segment = self.config.mask();
        let q = summarise(pass, self.isa, x.q.reborrow(), segment.len, self.pooling.summary())?;
        let k = summarise(pass, self.isa, x.k.reborrow(), segment.len, self.pooling.summary())?;
        let v = self.merging.run(pass, q.view(), x.k.reborrow(), x.v.reborrow())?;
        virtuals::attend(&self.config, pass, x, [k.view(), v.view()], segment.sight(), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, segment) = (self.check(&x)?, self.config.mask());
        let out = of_heads(&dims, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            let v: Array2<R> = head.rows(&x.v, &head.keys);
            let [more_q, more_k] = [&q, &k].map(|x| self.pooling.define(x, segment.len));
            let more_v = self.merging.define([&more_q, &k, &v]);
            virtuals::define(&self.config, [&q, &k, &v], [&more_k, &more_v], |i, s| match segment {
                Segment { causal: true, .. } => s < i / segment.len,
                Segment { own: true, .. } => true,
                _ => s != i / segment.len,
            })
        });
        Ok((out, ()))
    }
}
composite!(Combiner, Qkv);

exhibit! {
    CombinerExhibit of Combiner, "sparse", "Combiner", "arXiv 2107.05768";
    "a query's own segment of 16 tokens, and of each segment before it one key that stands for it";
    not "where single distant tokens matter: a segment hides them";
    tokens true;
    build(_, _) { Combiner::builder(16).causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Combiner, CombinerExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::sparse::testing::{Arrays, near};
    use crate::testing::qkv::held;

    const KINDS: [(bool, bool); 3] = [(true, false), (false, false), (false, true)];

    fn combiner(segment: usize, (causal, own): (bool, bool), pooling: Pooling) -> Combiner {
        let builder = Combiner::builder(segment).pooling(pooling);
        let builder = if causal { builder.causal() } else { builder };
        if own { builder.own() } else { builder }.build().unwrap()
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        for (n, segment) in [(0, 4), (1, 4), (70, 16), (333, 20), (150, 7), (40, 64)] {
            let x = Arrays::normal([2, 4, 2, n, n, 24, 12], n as u64);
            for (kind, pooling) in
                KINDS.into_iter().flat_map(|kind| [(kind, Pooling::Max), (kind, Pooling::Mean)])
            {
                held(&combiner(segment, kind, pooling), x.qkv());
            }
        }
    }

    #[test]
    fn one_segment_and_segments_of_one_are_dense() {
        let x = Arrays::normal([2, 4, 2, 200, 200, 24, 12], 1);
        let causal = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        let all = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
        for pooling in [Pooling::Max, Pooling::Mean] {
            for segment in [1, 200, 1000] {
                let what = format!("{segment} {pooling:?}");
                near(&what, &combiner(segment, KINDS[0], pooling).forward(x.qkv()).unwrap(), &causal);
                near(&what, &combiner(segment, KINDS[1], pooling).forward(x.qkv()).unwrap(), &all);
            }
        }
    }

    /// A segment of equal tokens counts as one of them, not as all.
    #[test]
    fn an_abstraction_counts_once() {
        let mut x = Arrays::normal([1, 1, 1, 40, 40, 8, 4], 2);
        for j in 1..20 {
            let (k, v) = (
                x.k.index_axis(ndarray::Axis(2), 0).to_owned(),
                x.v.index_axis(ndarray::Axis(2), 0).to_owned(),
            );
            x.k.index_axis_mut(ndarray::Axis(2), j).assign(&k);
            x.v.index_axis_mut(ndarray::Axis(2), j).assign(&v);
        }
        let got = combiner(20, KINDS[0], Pooling::Mean).forward(x.qkv()).unwrap();
        let once = crate::mask::mask_fn(|_, i, j| j <= i && j / 20 == i / 20 || i >= 20 && j == 0);
        near("once", &got, &Dense::builder().mask(once).build().unwrap().forward(x.qkv()).unwrap());
    }

    #[test]
    fn refusals() {
        let refusal = Combiner::builder(0).build().unwrap_err().to_string();
        assert_eq!(refusal, "segment: expected from 1 to 2^32 - 1 tokens, got 0");
        let x = Arrays::normal([1, 2, 1, 5, 60, 8, 4], 1);
        let combiner = combiner(8, KINDS[0], Pooling::Max);
        assert!(combiner.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
        assert!(combiner.forward(x.qkv().key_lengths(&[3])).is_err());
    }
}
