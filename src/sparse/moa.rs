//! MoA: a sink and a window of its own for every head.

use std::ops::Range;
use std::sync::Arc;

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::keys::Per;
use crate::mask::{Causal, Mask, Window};
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::patterned::{Pattern, patterned};

/// For each query head its sink and its window.
#[derive(Clone, Debug)]
pub(crate) struct HeadWindows(Arc<[(usize, usize)]>);

impl HeadWindows {
    fn window(&self, site: &Site) -> (usize, Option<Window>) {
        let (sink, window) = self.0[site.head];
        (sink, window.checked_sub(1).map(|left| Window::new(Some(left), Some(0))))
    }
}

impl Mask for HeadWindows {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        let (sink, window) = self.window(site);
        Causal::new().visible(site, query, key)
            && (key < sink || window.is_some_and(|window| window.visible(site, query, key)))
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        Causal::new().hull(site, queries)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let (sink, window) = self.window(site);
        let sink = match sink.saturating_sub(first) {
            n if n >= 64 => u64::MAX,
            n => (1 << n) - 1,
        };
        let window = window.map_or(0, |window| window.bits(site, query, first));
        (sink | window) & Causal::new().bits(site, query, first)
    }
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> crate::mask::Coverage {
        use crate::mask::Coverage::{Empty, Full, Partial};
        let (sink, window) = self.window(site);
        let within = window.map_or(Empty, |window| window.coverage(site, queries.clone(), keys.clone()));
        let before = Causal::new().coverage(site, queries, keys.clone());
        match (before, within) {
            (Empty, _) => Empty,
            (Full, Full) => Full,
            (Full, _) if keys.end <= sink => Full,
            (_, Empty) if keys.start >= sink => Empty,
            _ => Partial,
        }
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if dims.q_heads == self.0.len() {
            return Ok(());
        }
        Err(Error::value("q", format!("{} heads, as many as there are windows", self.0.len()), dims.q_heads))
    }
}

impl Pattern for HeadWindows {
    fn per(&self) -> Per {
        Per::Head
    }

    fn ranges(&self, site: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        let (sink, window) = self.window(site);
        let end = Causal::new().hull(site, queries.clone()).end;
        visit(0..sink.min(end));
        if let Some(window) = window {
            visit(window.hull(site, queries));
        }
    }
}

/// MoA: a sink and a window of its own for every head.
///
/// ```text
/// w_h = alpha_h + beta_h N, cut to min..N and rounded up to a multiple of split
/// query t of head h sees key j <= t with   j < sink_h   or   t - j < w_h - sink_h
/// ```
///
/// where `N` is the length that the cache is made for and `sink_h` is `min(w_h,
/// sink)`. From "MoA: Mixture of Sparse Attention for Automatic Large Language
/// Model Compression" (arXiv 2406.14909), with the rounding of its cache. Heads
/// that are all alike are StreamingLLM's (arXiv 2309.17453): see
/// [`streaming`](MoA::streaming).
///
/// Runs over arrays and, in prefill and in decoding, over caches.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, `w_h` of them a query.
/// A ring of `w_h` keys holds all that a head will ever read.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::MoA};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 2, 1000, 32));
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// // Head 0 always spans 256 keys, head 1 half of all.
/// let moa = MoA::builder(1000, &[256.0, 0.0], &[0.0, 0.5]).build()?;
/// assert_eq!(moa.spans().collect::<Vec<_>>(), [256, 512]);
/// let out = moa.forward(x)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MoA {
    config: Config<HeadWindows, Plain>,
}

/// Builds a [`MoA`].
#[derive(Clone, Debug)]
pub struct MoABuilder {
    length: usize,
    rules: Vec<(f32, f32)>,
    betas: usize,
    sink: usize,
    least: usize,
    split: usize,
    scale: Option<f32>,
    isa: Option<crate::simd::Isa>,
}

impl MoA {
    /// For a cache of at most `length` keys, with the spans `alpha + beta
    /// length` of the query heads. A sink of 64 keys, spans of at least 128 and
    /// in steps of 64.
    pub fn builder(length: usize, alphas: &[f32], betas: &[f32]) -> MoABuilder {
        MoABuilder {
            length,
            rules: alphas.iter().copied().zip(betas.iter().copied()).collect(),
            betas: betas.len().max(alphas.len()),
            sink: 64,
            least: 128,
            split: 64,
            scale: None,
            isa: None,
        }
    }

    /// StreamingLLM: all heads have this sink and this window.
    pub fn streaming(heads: usize, sink: usize, window: usize) -> MoABuilder {
        let span = sink.saturating_add(window);
        let builder = Self::builder(span, &vec![0.0; heads], &vec![1.0; heads]);
        MoABuilder { sink, least: 0, split: 1, ..builder }
    }

    /// Keys that each head sees at most.
    pub fn spans(&self) -> impl Iterator<Item = usize> {
        self.config.mask().0.iter().map(|(sink, window)| sink + window)
    }
}

impl MoABuilder {
    /// Keys at the start that are always seen.
    pub fn sink(self, sink: usize) -> Self {
        Self { sink, ..self }
    }

    /// The least span.
    pub fn least(self, least: usize) -> Self {
        Self { least, ..self }
    }

    /// Spans are rounded up to multiples of this.
    pub fn split(self, split: usize) -> Self {
        Self { split, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: crate::simd::Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for rules that are not one a head and finite, a split of
    /// 0 or a scale that is not finite, [`Error::Isa`] for an instruction set
    /// that the CPU lacks.
    pub fn build(self) -> Result<MoA> {
        let Self { length, rules, betas, sink, least, split, scale, isa } = self;
        if rules.len() != betas {
            return Err(Error::value(
                "betas",
                "as many as alphas",
                format_args!("{betas} and {}", rules.len()),
            ));
        }
        if split == 0 {
            return Err(Error::value("split", "at least 1 key", 0));
        }
        let window = |(alpha, beta): (f32, f32)| {
            if !alpha.is_finite() || !beta.is_finite() {
                return Err(Error::value("alphas, betas", "finite numbers", format_args!("{alpha}, {beta}")));
            }
            let span = (f64::from(alpha) + f64::from(beta) * length as f64).trunc() as usize;
            let span = span.min(length).max(least);
            let span = span.checked_next_multiple_of(split).unwrap_or(usize::MAX);
            let sink = span.min(sink);
            Ok((sink, span - sink))
        };
        let windows = rules.into_iter().map(window).collect::<Result<Arc<[_]>>>()?;
        let options = Options { mask: HeadWindows(windows), score: Plain, scale, isa };
        Ok(MoA { config: options.build()? })
    }
}

patterned!(MoA);
patterned!(MoA, caches);

exhibit! {
    MoAExhibit of MoA, "sparse", "MoA", "arXiv 2406.14909, 2309.17453";
    "a sink of 4 keys and a window of its own for every head: 16 keys, 32, 48 and so on";
    not "where no profile says which head needs which span";
    tokens false;
    build(x, _) {
        let heads = x.q.dim().1;
        let alphas: Vec<f32> = (0..heads).map(|h| (16 * h + 16) as f32).collect();
        MoA::builder(1 << 20, &alphas, &vec![0.0; heads]).sink(4).least(16).split(16)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(MoA, MoAExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::mask::mask_fn;
    use crate::sparse::testing::{self, Arrays};

    #[test]
    fn identities() {
        let moa = MoA::builder(200, &[10.0, 0.0, 100.0, -1000.0], &[0.0, 0.5, 0.0, 1.0]);
        let moa = moa.sink(5).least(20).split(16).build().unwrap();
        assert_eq!(moa.spans().collect::<Vec<_>>(), [32, 112, 112, 32]);
        testing::chunks_are_the_whole(&moa);
        testing::last_row_is_decoding(&moa);
        testing::never_ahead(&moa);
        testing::kept_mass_bounds_the_error(&moa, true);
        testing::exact_scores_give_equal_lists(&moa);
        testing::caches_are_arrays(&moa);
        let all = MoA::builder(300, &[0.0; 4], &[1.0; 4]).build().unwrap();
        testing::exact_scores_give_equal_lists(&all);
        for sizes in [[2, 4, 2, 200, 200, 24, 12], [1, 4, 2, 3, 300, 24, 12]] {
            let x = Arrays::normal(sizes, 1);
            let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
            testing::near("all", &all.forward(x.qkv()).unwrap(), &want);
        }
    }

    #[test]
    fn streaming_is_a_sink_and_a_window() {
        let x = Arrays::normal([1, 4, 2, 150, 200, 24, 12], 1);
        for (sink, window) in [(4, 60), (0, 1), (70, 0), (0, 1000)] {
            let mask = mask_fn(move |site, i, j| {
                let t = i + site.kv_len - site.q_len;
                j <= t && (j < sink || t - j < window)
            });
            let want = Dense::builder().mask(mask).build().unwrap().forward(x.qkv()).unwrap();
            let got = MoA::streaming(4, sink, window).build().unwrap().forward(x.qkv()).unwrap();
            testing::near("streaming", &got, &want);
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: MoABuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(MoA::builder(9, &[1.0], &[1.0, 2.0])).starts_with("betas: "));
        assert!(refusal(MoA::builder(9, &[f32::NAN], &[1.0])).starts_with("alphas, betas: "));
        assert!(refusal(MoA::builder(9, &[1.0], &[1.0]).split(0)).starts_with("split: "));
        let x = Arrays::normal([1, 4, 2, 5, 5, 4, 4], 1);
        let two = MoA::builder(9, &[1.0; 2], &[1.0; 2]).build().unwrap();
        assert!(two.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    }
}
