//! Multi-head latent attention (MLA), expanded and absorbed.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayViewMut3, ArrayViewMut4, Axis, s};

use crate::attention::{Attention, Bounded, Cost, ERROR_CONSTANT, Mergeable, TopWeights, Weights};
use crate::card::{Extras, carded, exhibit};
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::weights;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::filled;
use crate::mask::{And, Causal, Mask, Unmasked};
use crate::score::Plain;
use crate::simd::Isa;
use crate::stages::attend::Options;
pub use crate::stages::latent::{Form, Latents};
use crate::stages::latent::{LatentHeads, Sizes};

/// Multi-head latent attention (MLA), expanded and absorbed.
///
/// A token is kept as a latent `c` and a rotary key `k_R` that all heads
/// share. Each head has two matrices, `W_UK` and `W_UV`, and queries of two
/// parts, `q = (q_N, q_R)`:
///
/// ```text
/// expanded   k_hj = (W_UK_h c_j, k_Rj),  v_hj = W_UV_h c_j
///            s_hij = scale * q_hi . k_hj,  o_hi = sum_j softmax_j(s_hij) v_hj
/// absorbed   q'_hi = (W_UK_h^T q_Nhi, q_Rhi),  s_hij = scale * q'_hi . (c_j, k_Rj)
///            o_hi = W_UV_h sum_j softmax_j(s_hij) c_j
/// ```
///
/// "DeepSeek-V2" (arXiv 2405.04434), "DeepSeek-V3" (arXiv 2412.19437). Both
/// forms are the same sum in another order. Rotation and normalisation come
/// before: queries and rotary keys are rotated, latents are normalised.
///
/// Cost, with latents of `r` elements and `d_R`, `d_N`, `d_V` those of a rotary
/// key, of the rest of a query and of a value: absorbed `2 (2 r + d_R)` flops a
/// visible pair of each head and `2 r (d_N + d_V)` a query; expanded `2 (d_N +
/// d_R + d_V)` a pair and `2 r (d_N + d_V)` a key. With 512, 64, 128 and 128
/// the absorbed form is cheaper up to about 170 new queries over many keys, and
/// reads `r + d_R` elements a token for all heads, where the expanded form
/// writes and reads `d_N + d_R + d_V` for each. The absorbed form is the engine
/// with all heads on one key/value head; its scratch is `heads (2 r + d_R)`
/// numbers a query, so long prompts are better taken in chunks.
///
/// ```
/// use attention_kernels::Attention;
/// use attention_kernels::cache::{Cached, Latent};
/// use attention_kernels::latent::{Latents, Mla};
/// use ndarray::{Array2, Array3, Array4};
///
/// // 4 heads; latents of 32, rotary keys of 8, and 16 more elements a query.
/// let (w_uk, w_uv) = (Array3::<f32>::ones((4, 16, 32)), Array3::<f32>::ones((4, 24, 32)));
/// let mut cache = Latent::contiguous::<f32>(32, 8, 1, 100)?;
/// cache.append(0, Array2::<f32>::ones((50, 40)).view())?;
///
/// let q = Array4::<f32>::ones((1, 4, 1, 24));
/// let x = Latents::cached(Cached::new(q.view(), &cache), w_uk.view(), w_uv.view());
/// let out = Mla::builder().causal().build()?.forward(x)?;
/// assert_eq!(out.dim(), (1, 4, 1, 24));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mla<M = Unmasked> {
    heads: LatentHeads<M>,
}

/// Builds an [`Mla`].
#[derive(Clone, Debug, Default)]
pub struct MlaBuilder<M = Unmasked> {
    options: Options<M, Plain>,
    form: Form,
}

impl Mla {
    /// Everything visible, absorbed.
    pub fn builder() -> MlaBuilder {
        MlaBuilder::default()
    }
}

impl MlaBuilder {
    /// Which keys a query may see.
    pub fn mask<M: Mask>(self, mask: M) -> MlaBuilder<M> {
        MlaBuilder { options: self.options.mask(mask), form: self.form }
    }

    /// Keys at the query's position and before, the last query at the last
    /// key.
    pub fn causal(self) -> MlaBuilder<Causal> {
        self.mask(Causal::new())
    }
}

impl MlaBuilder<Causal> {
    /// What both masks let a query see: `causal().mask(other)`.
    pub fn mask<M: Mask>(self, mask: M) -> MlaBuilder<And<Causal, M>> {
        MlaBuilder { options: self.options.map_mask(|causal| causal.and(mask)), form: self.form }
    }
}

impl<M: Mask> MlaBuilder<M> {
    /// The factor of the dot product. Default: `1 / sqrt(d_N + d_R)` in both
    /// forms.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// The order of the sums.
    pub fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// Forces an instruction set.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for a scale that is not finite,
    /// [`Error::Isa`](crate::Error::Isa) for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Mla<M>> {
        Ok(Mla { heads: LatentHeads { config: self.options.build()?, form: self.form } })
    }
}

impl<M: Mask> Mla<M> {
    /// The definition, in the order of sums of the form, and its bound.
    fn define<T: Element, O: Element>(&self, x: &Latents<'_, T, O>) -> Result<Reference> {
        let dims = self.heads.dims(x)?;
        let Sizes { nope, rope, latent, value } = x.sizes();
        let (config, absorbed) = (&self.heads.config, self.heads.form == Form::Absorbed);
        let scale = config.scale(&dims);
        let (batch, heads, q_len, _) = x.q.dim();
        let mut out = filled("out", (batch, heads, q_len, value), 0.0)?;
        let mut lse = filled("lse", (batch, heads, q_len), f64::NEG_INFINITY)?;
        let mut all_scores = filled("scores", (batch, heads, q_len, dims.kv_len), f64::NEG_INFINITY)?;
        let mut weights = filled("weights", (batch, heads, q_len, dims.kv_len), 0.0)?;
        let mut bound = filled("out", (batch, heads, q_len), 0.0)?;
        let (latents, sequences) = x.held(&dims);
        let wide = |w: ArrayView2<'_, T>| w.mapv(Element::to_f64);
        for (sequence, h) in sequences.iter().flat_map(|s| (0..heads).map(move |h| (s, h))) {
            let site = sequence.site(h);
            let w_uv = wide(x.w_uv.index_axis(Axis(0), h));
            let w_uk = x.w_uk.map_or(Array2::eye(latent), |w_uk| wide(w_uk.index_axis(Axis(0), h)));
            let rows = latents.slice(s![sequence.batch, sequence.keys.clone(), ..]);
            let (c, rotary) = rows.split_at(Axis(1), latent);
            // Keys without their rotary part, and values: those of the form.
            let (k, v) =
                if absorbed { (c.to_owned(), c.to_owned()) } else { (c.dot(&w_uk.t()), c.dot(&w_uv.t())) };
            // The same of magnitudes.
            let (k_size, v_size) = (c.abs().dot(&w_uk.abs().t()), c.abs().dot(&w_uv.abs().t()));
            for (i, row) in sequence.queries.clone().enumerate() {
                let at = [sequence.batch, h, row];
                let q = x.q.slice(s![at[0], h, row, ..]).mapv(Element::to_f64);
                let (q_n, q_r) = q.view().split_at(Axis(0), nope);
                let q_k = if absorbed { q_n.dot(&w_uk) } else { q_n.to_owned() };
                let keys = (0..site.kv_len).filter(|&j| config.mask().visible(&site, i, j));
                let scored = keys.map(|j| (j, scale * (q_k.dot(&k.row(j)) + q_r.dot(&rotary.row(j)))));
                let scored: Vec<(usize, f64)> = scored.filter(|(_, s)| *s != f64::NEG_INFINITY).collect();
                if scored.is_empty() {
                    continue;
                }
                let max = scored.iter().fold(f64::NEG_INFINITY, |max, (_, s)| max.max(*s));
                let sum: f64 = scored.iter().map(|(_, s)| (s - max).exp()).sum();
                lse[at] = max + sum.ln();
                let mut o = Array1::zeros(v.ncols());
                let (mut size, mut largest) = (0f64, 0f64);
                for &(j, s) in &scored {
                    let weight = (s - max).exp() / sum;
                    o.scaled_add(weight, &v.row(j));
                    weights[[at[0], h, row, sequence.keys.start + j]] = weight;
                    all_scores[[at[0], h, row, sequence.keys.start + j]] = s;
                    if max - s < 25.0 {
                        let dot = q_n.abs().dot(&k_size.row(j)) + q_r.abs().dot(&rotary.row(j).abs());
                        size = size.max(scale.abs() * dot + s.abs());
                    }
                    largest = v_size.row(j).iter().fold(largest, |largest, v| largest.max(*v));
                }
                out.slice_mut(s![at[0], h, row, ..]).assign(&if absorbed { w_uv.dot(&o) } else { o });
                let terms = nope + rope + 2 * latent + scored.len();
                bound[at] = ERROR_CONSTANT * 2f64.powi(-24) * (terms as f64 + size) * largest;
            }
        }
        Ok(Reference { out, lse, scores: all_scores, weights, bound })
    }

    /// The definition's LSE, `[batch, heads, q_len]`.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn reference_lse<T: Element, O: Element>(&self, x: Latents<'_, T, O>) -> Result<Array3<f64>> {
        Ok(self.define(&x)?.lse)
    }
}

impl<T: Element, O: Element, M: Mask> Attention<Latents<'_, T, O>> for Mla<M> {
    fn workspace_bytes(&self, x: Latents<'_, T, O>) -> Result<usize> {
        self.heads.workspace_bytes(&x)
    }

    fn forward_into(
        &self,
        x: Latents<'_, T, O>,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.heads.run(x, out, None, workspace)
    }

    fn reference(&self, x: Latents<'_, T, O>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.out)
    }

    fn cost(&self, x: Latents<'_, T, O>) -> Result<Cost> {
        self.heads.cost(&x)
    }
}

/// That of dense attention ([`ERROR_CONSTANT`]), with the products of latents
/// and matrices counted: `2 r` more terms, and sizes of scores and values as
/// sums of magnitudes, `sum |W_UK| |c|` and `sum |W_UV| |c|`.
impl<T: Element, O: Element, M: Mask> Bounded<Latents<'_, T, O>> for Mla<M> {
    fn error_bound(&self, x: Latents<'_, T, O>) -> Result<Array3<f64>> {
        Ok(self.define(&x)?.bound)
    }
}

impl<T: Element, O: Element, M: Mask> Mergeable<Latents<'_, T, O>> for Mla<M> {
    fn forward_with_lse_into(
        &self,
        x: Latents<'_, T, O>,
        out: ArrayViewMut4<'_, O>,
        lse: ArrayViewMut3<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.heads.run(x, out, Some(lse), workspace)
    }
}

/// Those of the absorbed form.
impl<T: Element, O: Element, M: Mask> Weights<Latents<'_, T, O>> for Mla<M> {
    fn scores(&self, x: Latents<'_, T, O>) -> Result<Array4<f32>> {
        self.heads.with_weights(&x, weights::scores)
    }

    fn reference_scores(&self, x: Latents<'_, T, O>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.scores)
    }

    fn weights(&self, x: Latents<'_, T, O>) -> Result<Array4<f32>> {
        self.heads.with_weights(&x, weights::materialize)
    }

    fn key_weights(&self, x: Latents<'_, T, O>) -> Result<Array3<f32>> {
        self.heads.with_weights(&x, weights::sum_over_queries)
    }

    fn top_weights(&self, x: Latents<'_, T, O>, count: usize) -> Result<TopWeights> {
        self.heads.with_weights(&x, |call| weights::top(call, count))
    }

    fn reference_weights(&self, x: Latents<'_, T, O>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.weights)
    }
}

exhibit! {
    MlaExhibit of Mla<Causal>, "latent", "MLA", "arXiv 2405.04434, 2412.19437";
    "keys and values of all heads from one latent a token, and a quarter of each key shared by all";
    not "where each head has keys and values of its own in memory: dense attention";
    tokens false;
    build(x, _) {
        x.dims()?;
        Mla::builder().causal()
    }
    extras(x, _) {
        // A latent is the keys and values of all heads, which the matrices cut
        // out; the rotary key is the last quarter of the first head's.
        let ((batch, kv_heads, len, dim), value) = (x.k.dim(), x.v.dim().3);
        let (heads, rope) = (x.q.dim().1, dim / 4);
        let (nope, latent) = (dim - rope, kv_heads * (dim - rope + value));
        let latents = Array3::from_shape_fn((batch, len, latent + rope), |(b, j, c)| {
            if c < kv_heads * nope {
                return x.k[[b, c / nope, j, c % nope]];
            }
            match c.checked_sub(latent) {
                None => x.v[[b, (c - kv_heads * nope) / value, j, (c - kv_heads * nope) % value]],
                Some(_) if kv_heads == 0 => T::default(),
                Some(c) => x.k[[b, 0, j, nope + c]],
            }
        });
        let group = (heads / kv_heads.max(1)).max(1);
        let cut = |first: usize, dim: usize| {
            Array3::from_shape_fn((heads, dim, latent), |(h, c, l)| {
                T::from_f32(f32::from(l == first + h / group * dim + c))
            })
        };
        Extras { latents, matrices: [cut(0, nope), cut(kv_heads * nope, value)], ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Latents<'a, T> {
        Latents::new(x.q, extras.latents.view(), extras.matrices[0].view(), extras.matrices[1].view())
    }
}
carded!(Mla<M> where [M: Mask], MlaExhibit);
