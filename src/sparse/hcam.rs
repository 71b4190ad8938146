//! HCAM: hierarchical chunk attention memory.

use ndarray::ArrayView4;

use crate::attention::{Cost, Margins};
use crate::card::{Extras, carded, exhibit};
use crate::definition;
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv};
use crate::keys::source::Kv;
use crate::keys::{Keys, Layout, Per, TokenLists};
use crate::score::Plain;
use crate::select::{self, Scheme, Selected, Source};
use crate::simd::Isa;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::nested::{self, Groups, Logits, Nested};
use crate::stages::selecting::{Selecting, dot, selecting};

/// What goes into an [`Hcam`].
#[derive(Clone, Copy, Debug)]
pub struct HcamInput<'a, T> {
    /// Queries, and keys and values of all chunks, one after the other.
    pub qkv: Qkv<'a, T>,
    /// Queries of summaries, `[batch, heads, q_len, dim]`, of 1 head, as many as
    /// the keys or as many as the queries.
    pub queries: ArrayView4<'a, T>,
    /// One row a chunk, `[batch, heads, chunks, dim]`, of as many heads.
    pub summaries: ArrayView4<'a, T>,
}

impl<'a, T> HcamInput<'a, T> {
    /// Of these arrays.
    pub fn new(qkv: Qkv<'a, T>, queries: ArrayView4<'a, T>, summaries: ArrayView4<'a, T>) -> Self {
        Self { qkv, queries, summaries }
    }
}

impl<T: Element> Input for HcamInput<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        self.qkv.lengths.check_full("summaries", "there is a summary for every chunk of the arrays")?;
        let Dims { batch, q_heads, kv_heads, q_len, .. } = dims;
        let heads = self.queries.dim().1;
        let any = ![1, q_heads, kv_heads].contains(&heads);
        if any || self.queries.dim() != (batch, heads, q_len, self.queries.dim().3) {
            let expected =
                format!("[batch, 1, {kv_heads} or {q_heads} heads, q_len, dim] = [{batch}, _, {q_len}, _]");
            return Err(Error::shape("queries", expected, self.queries.shape()));
        }
        let (b, h, _, dim) = self.summaries.dim();
        if (b, h, dim) != (batch, heads, self.queries.dim().3) {
            let expected =
                format!("[batch, heads, chunks, dim] = [{batch}, {heads}, _, {}]", self.queries.dim().3);
            return Err(Error::shape("summaries", expected, self.summaries.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims().and_then(|_| self.qkv.out_dim())
    }
}

/// HCAM: hierarchical chunk attention memory.
///
/// ```text
/// r_m = outer scale * s_i . S_m                          for chunks m of C keys, with summaries S_m
/// M_i = the k chunks with the largest r_m, the lower one of equals
/// o_i = sum_{m in M_i} softmax_{M_i}(r)_m  (softmax attention of q_i on the keys of m)
/// ```
///
/// A memory is attended to in two levels: first to what stands for its chunks,
/// then inside the best of them, each by itself. From "Towards mental time
/// travel: a hierarchical memory for reinforcement learning agents" (arXiv
/// 2105.14039), between its projections: there summaries are projected means of
/// chunks, scored once for all heads; contents get positions that run backwards
/// in their chunk before they are projected.
///
/// While a chunk fills, the positions of its contents change with each one, and with
/// them its keys: it runs over arrays.
///
/// Cost: `2 summary dim` flops a pair of a query and a summary; `2 head_dim`
/// flops a chosen pair twice and `2 value_dim` once.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::{Hcam, HcamInput}};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 320, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let (q, summaries) = (Array4::ones((1, 2, 5, 16)), Array4::ones((1, 1, 10, 8)));
/// let queries = Array4::ones((1, 1, 5, 8));
/// let x = HcamInput::new(Qkv::new(q.view(), x.view(), x.view()), queries.view(), summaries.view());
/// let out = Hcam::builder(32, 4).build()?.forward(x)?;
/// assert_eq!(out.dim(), (1, 2, 5, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Hcam {
    config: Config<Order, Plain>,
    chunk: usize,
    k: usize,
    outer_scale: Option<f32>,
}

/// Builds an [`Hcam`].
#[derive(Clone, Debug)]
pub struct HcamBuilder {
    options: Options<Order, Plain>,
    chunk: usize,
    k: usize,
    outer_scale: Option<f32>,
}

impl Hcam {
    /// `k` chunks of `chunk` keys a query.
    pub fn builder(chunk: usize, k: usize) -> HcamBuilder {
        HcamBuilder { options: Options::default(), chunk, k, outer_scale: None }
    }

    fn dims<T: Element>(&self, x: &HcamInput<'_, T>) -> Result<Dims> {
        let (dims, chunks) = (x.dims()?, x.summaries.dim().2);
        if dims.kv_len.div_ceil(self.chunk) != chunks {
            let expected =
                format!("{} rows, one for each {} keys", dims.kv_len.div_ceil(self.chunk), self.chunk);
            return Err(Error::value("summaries", expected, chunks));
        }
        Ok(dims)
    }

    fn outer_scale(&self, dim: usize) -> f64 {
        self.outer_scale.map_or(1.0 / (dim.max(1) as f64).sqrt(), f64::from)
    }

    fn scheme(&self) -> Scheme {
        Scheme::top_rows(self.k)
    }

    /// What chooses: summaries as keys.
    fn outer<'a, T>(x: &HcamInput<'a, T>) -> Qkv<'a, T> {
        Qkv::new(x.queries, x.summaries, x.summaries)
    }

    /// The keys of chosen chunks: of each head of the summaries and query.
    fn lists(&self, dims: &Dims, heads: usize, chunks: (Vec<usize>, Vec<u32>)) -> Result<TokenLists> {
        let per = match heads {
            _ if heads == dims.q_heads => Per::Head,
            _ if heads == dims.kv_heads => Per::Group,
            _ => Per::Sequence,
        };
        let keys = vec![dims.kv_len; dims.batch];
        Selected::new(Layout::new(per, 1, dims), chunks, self.chunk, keys).tokens()
    }
}

impl HcamBuilder {
    /// The factor of the products of keys. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// The factor of the products of summaries. Default: `1 / sqrt(dim)` of
    /// theirs.
    pub fn outer_scale(self, scale: f32) -> Self {
        Self { outer_scale: Some(scale), ..self }
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
    /// [`Error::Value`] for chunks of 0 keys, `k` of 0, a scale that is not
    /// finite or one of summaries that is not above 0, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<Hcam> {
        let Self { options, chunk, k, outer_scale } = self;
        if chunk == 0 || u32::try_from(chunk).is_err() {
            return Err(Error::value("chunk", "from 1 to 2^32 - 1 keys", chunk));
        }
        if k == 0 {
            return Err(Error::value("k", "at least 1 chunk", 0));
        }
        if let Some(scale) = outer_scale.filter(|scale| !(scale.is_finite() && *scale > 0.0)) {
            return Err(Error::value("outer_scale", "a finite number above 0", scale));
        }
        Ok(Hcam { config: options.build()?, chunk, k, outer_scale })
    }
}

impl<T: Element> Selecting<HcamInput<'_, T>> for Hcam {
    type Index = TokenLists;

    fn select_bytes(&self, x: HcamInput<'_, T>) -> Result<usize> {
        self.dims(&x)?;
        select::workspace_bytes(&Source::new(self.config.isa(), Self::outer(&x), None)?, &self.scheme())
    }

    fn select_in(&self, x: HcamInput<'_, T>, workspace: &mut Workspace) -> Result<TokenLists> {
        let dims = self.dims(&x)?;
        let source = Source::new(self.config.isa(), Self::outer(&x), None)?;
        let selected = select::select(&source, &self.scheme(), workspace)?;
        self.lists(&dims, x.queries.dim().1, (selected.offsets, selected.candidates))
    }

    fn define_select(&self, x: HcamInput<'_, T>) -> Result<(TokenLists, Margins)> {
        let (dims, scheme) = (self.dims(&x)?, self.scheme());
        let outer = Self::outer(&x).dims()?;
        let [q, k] = [&x.queries, &x.summaries].map(|x| x.mapv(Element::to_f64));
        let score = |b: usize, h: usize, i: usize, m: std::ops::Range<usize>| {
            dot(q.slice(ndarray::s![b, h, i, ..]), &k.slice(ndarray::s![b, h, m, ..]))
        };
        let layout = scheme.layout(&outer, &Lengths::Full);
        let (lists, mut margins) =
            definition::select::select(&scheme, &outer, &Lengths::Full, &layout, score);
        for range in margins.doubtful.iter_mut().flatten() {
            *range = range.start * self.chunk..(range.end * self.chunk).min(dims.kv_len);
        }
        let Selected { offsets, candidates, .. } = Selected::of(&scheme, &outer, &Lengths::Full, &lists);
        Ok((self.lists(&dims, outer.q_heads, (offsets, candidates))?, margins))
    }

    fn price_select(&self, x: HcamInput<'_, T>) -> Result<Cost> {
        self.dims(&x)?;
        Ok(Cost { flops: 2 * (x.queries.len() * x.summaries.dim().2) as u64, bytes: 0 })
    }

    fn with_call<R>(
        &self,
        x: HcamInput<'_, T>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let dims = self.dims(&x)?;
        Keys::Tokens(index).check(&dims, &x.qkv.lengths)?;
        let any = |x| T::any(Heads::new(x));
        let nested = Nested {
            isa: self.config.isa(),
            dims,
            lengths: x.qkv.lengths,
            slots: None,
            q: any(x.qkv.q),
            k: Kv::Arrays { k: any(x.qkv.k), v: any(x.qkv.v) },
            scale: self.config.scale(&dims) as f32,
            groups: Groups { unit: self.chunk, own: false },
            logits: Logits {
                q: any(x.queries),
                k: Kv::Arrays { k: any(x.summaries), v: any(x.summaries) },
                heads: x.summaries.dim().1,
                scale: self.outer_scale(x.queries.dim().3) as f32,
            },
            index,
        };
        nested::with_call(&self.config, x.qkv, &nested, run)
    }

    fn define(&self, x: HcamInput<'_, T>, index: &TokenLists) -> Result<Reference> {
        self.dims(&x)?;
        let logits = (&x.queries, &x.summaries, self.outer_scale(x.queries.dim().3));
        let groups = Groups { unit: self.chunk, own: false };
        nested::define_on(&self.config, x.qkv, index, &groups, logits)
    }

    fn price(&self, x: HcamInput<'_, T>, index: &TokenLists) -> Result<Cost> {
        Keys::Tokens(index).check(&self.dims(&x)?, &x.qkv.lengths)?;
        self.config.listed(Keys::Tokens(index)).cost(&x.qkv)
    }
}
selecting!(Hcam, TokenLists, [T] HcamInput);

exhibit! {
    HcamExhibit of Hcam, "sparse", "HCAM", "arXiv 2105.14039";
    "of a memory the 3 chunks of 16 keys whose summaries score highest, attended to one by one";
    not "where what belongs together is scattered over the memory";
    tokens false;
    build(_, _) { Hcam::builder(16, 3) }
    extras(x, field) {
        let (batch, heads, _, dim) = x.q.dim();
        let summary = |(_, h, m, c)| T::from_f32((field.round)(field.at(1, h, m, c)));
        let chunks = x.k.dim().2.div_ceil(16);
        Extras { keys: ndarray::Array4::from_shape_fn((batch, heads, chunks, dim), summary), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> HcamInput<'a, T> { HcamInput::new(x, x.q, extras.keys.view()) }
}
carded!(Hcam, HcamExhibit);

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::attention::{Attention, Selects, Weights};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    /// Inner arrays and outer ones: queries and summaries of so many heads.
    fn arrays(heads: usize, chunk: usize) -> (Arrays, Arrays) {
        let inner = Arrays::integers([2, 4, 2, 30, 130, 16, 8], 1);
        (inner, Arrays::integers([2, heads, heads, 30, 130usize.div_ceil(chunk), 12, 1], 2))
    }

    fn input<'a>((inner, outer): &'a (Arrays, Arrays)) -> HcamInput<'a, f32> {
        HcamInput::new(inner.qkv(), outer.q.view(), outer.k.view())
    }

    #[test]
    fn weights_are_products_of_two_softmaxes() {
        for (heads, chunk, k) in [(1, 16, 3), (2, 7, 4), (4, 16, 100), (1, 1, 5), (4, 200, 1)] {
            let arrays = arrays(heads, chunk);
            let hcam = Hcam::builder(chunk, k).build().unwrap();
            assert_eq!(
                hcam.select(input(&arrays)).unwrap(),
                hcam.reference_select(input(&arrays)).unwrap().0
            );
            let weights = hcam.weights(input(&arrays)).unwrap();
            let chunks = arrays.1.k.dim().2;
            for ((b, h, i), row) in ndarray::indices((2, 4, 30)).into_iter().zip(weights.rows()) {
                let product = |q: &Array4<f32>, k: &Array4<f32>, (h, g): (usize, usize), j: usize| {
                    let d = q.dim().3;
                    let terms = (0..d).map(|c| f64::from(q[[b, h, i, c]]) * f64::from(k[[b, g, j, c]]));
                    terms.sum::<f64>() / (d as f64).sqrt()
                };
                let of = h / (4 / heads);
                let mut best: Vec<(f64, usize)> =
                    (0..chunks).map(|m| (product(&arrays.1.q, &arrays.1.k, (of, of), m), m)).collect();
                best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                best.truncate(k);
                let outer: f64 = best.iter().map(|(r, _)| r.exp()).sum();
                let score = |j: usize| product(&arrays.0.q, &arrays.0.k, (h, h / 2), j).exp();
                for (j, &got) in row.iter().enumerate() {
                    let m = j / chunk;
                    let inner: f64 = (m * chunk..((m + 1) * chunk).min(130)).map(score).sum();
                    let chosen = best.iter().find(|(_, of)| *of == m);
                    let want = chosen.map_or(0.0, |(r, _)| r.exp() / outer * score(j) / inner);
                    assert!((f64::from(got) - want).abs() < 1e-5, "{heads} {chunk} {k}: {got}, {want}");
                }
            }
        }
    }

    #[test]
    fn one_chunk_is_dense_and_nothing_is_nothing() {
        let arrays = arrays(1, 200);
        let one = Hcam::builder(200, 1).build().unwrap().forward(input(&arrays)).unwrap();
        testing::near("one chunk", &one, &Dense::builder().build().unwrap().forward(arrays.0.qkv()).unwrap());
        let none = (Arrays::normal([1, 2, 1, 3, 0, 8, 4], 1), Arrays::normal([1, 1, 1, 3, 0, 8, 1], 1));
        let out = Hcam::builder(16, 2).build().unwrap().forward(input(&none)).unwrap();
        assert!(out.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: HcamBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(Hcam::builder(0, 1)).starts_with("chunk: "));
        assert!(refusal(Hcam::builder(1, 0)).starts_with("k: "));
        assert!(refusal(Hcam::builder(1, 1).outer_scale(0.0)).starts_with("outer_scale: "));
        let (arrays, other) = (arrays(1, 16), arrays(3, 16));
        let hcam = |chunk| Hcam::builder(chunk, 1).build().unwrap();
        assert!(hcam(7).forward(input(&arrays)).unwrap_err().to_string().starts_with("summaries: "));
        assert!(hcam(16).forward(input(&other)).unwrap_err().to_string().starts_with("queries: "));
        let mixed = HcamInput { summaries: other.1.k.view(), ..input(&arrays) };
        assert!(hcam(16).forward(mixed).unwrap_err().to_string().starts_with("summaries: "));
    }
}
