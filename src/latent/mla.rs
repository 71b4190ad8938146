//! Multi-head latent attention (MLA), expanded and absorbed.
//!
//! A token is kept as a latent `c` and a rotary key `k_R` that all heads
//! share. Each head has two matrices, `W_UK` and `W_UV`, and queries of two
//! parts, `q = (q_N, q_R)`:
//!
//! ```text
//! expanded   k_hj = (W_UK_h c_j, k_Rj),  v_hj = W_UV_h c_j
//!            s_hij = scale * q_hi . k_hj,  o_hi = sum_j softmax_j(s_hij) v_hj
//! absorbed   q'_hi = (W_UK_h^T q_Nhi, q_Rhi),  s_hij = scale * q'_hi . (c_j, k_Rj)
//!            o_hi = W_UV_h sum_j softmax_j(s_hij) c_j
//! ```
//!
//! "DeepSeek-V2" (arXiv 2405.04434), "DeepSeek-V3" (arXiv 2412.19437). Both
//! forms are the same sum in another order. Rotation and normalisation come
//! before: queries and rotary keys are rotated, latents are normalised.
//!
//! Cost, with latents of `r` elements and `d_R`, `d_N`, `d_V` those of a rotary
//! key, of the rest of a query and of a value: absorbed `2 (2 r + d_R)` flops a
//! visible pair of each head and `2 r (d_N + d_V)` a query; expanded `2 (d_N +
//! d_R + d_V)` a pair and `2 r (d_N + d_V)` a key. With 512, 64, 128 and 128
//! the absorbed form is cheaper up to about 170 new queries over many keys, and
//! reads `r + d_R` elements a token for all heads, where the expanded form
//! writes and reads `d_N + d_R + d_V` for each. The absorbed form is the engine
//! with all heads on one key/value head; its scratch is `heads (2 r + d_R)`
//! numbers a query, so long prompts are better taken in chunks.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{
    Array1, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis, arr0, s,
};

use crate::attention::{Attention, Bounded, Cost, ERROR_CONSTANT, Mechanism, Mergeable};
use crate::cache::{Cache, Cached};
use crate::card::Card;
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Arrays, Call, Norm};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv, Sequence};
use crate::mask::{Mask, Unmasked};
use crate::score::Plain;
use crate::simd::Isa;
use crate::simd::mem::{Arena, bytes_for};
use crate::stages::attend::{Config, Options, check_lse, check_out};
use crate::stages::project::Project;

/// Queries over latents, and the matrices of the heads.
#[derive(Debug)]
pub struct Latents<'a, T, O = T> {
    /// Queries `[batch, heads, q_len, d_N + d_R]`, the rotary part last.
    pub q: ArrayView4<'a, T>,
    /// `W_UK`, `[heads, d_N, r]`: from a latent to the key of a head.
    pub w_uk: ArrayView3<'a, T>,
    /// `W_UV`, `[heads, d_V, r]`: from a latent to the value of a head.
    pub w_uv: ArrayView3<'a, T>,
    tokens: Tokens<'a, T>,
    out: PhantomData<O>,
}

/// Where the latents are.
#[derive(Debug)]
enum Tokens<'a, T> {
    /// `[batch, kv_len, r + d_R]`
    Array(ArrayView3<'a, T>, Lengths<'a>),
    Cache(Cached<'a, T, dyn Cache + 'a>),
}

impl<T> Clone for Tokens<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Tokens<'_, T> {}
impl<T, O> Clone for Latents<'_, T, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, O> Copy for Latents<'_, T, O> {}

impl<'a, T> Latents<'a, T> {
    /// Over an array `[batch, kv_len, r + d_R]`: latents and rotary keys.
    pub fn new(
        q: ArrayView4<'a, T>,
        latents: ArrayView3<'a, T>,
        w_uk: ArrayView3<'a, T>,
        w_uv: ArrayView3<'a, T>,
    ) -> Self {
        Self { q, w_uk, w_uv, tokens: Tokens::Array(latents, Lengths::Full), out: PhantomData }
    }

    /// Over a cache of [`Latent`](crate::cache::Latent) rows: the sequences and
    /// queries of `x`.
    pub fn cached<C: Cache>(x: Cached<'a, T, C>, w_uk: ArrayView3<'a, T>, w_uv: ArrayView3<'a, T>) -> Self {
        Self { q: x.q, w_uk, w_uv, tokens: Tokens::Cache(x.erased()), out: PhantomData }
    }
}

/// The sizes of the parts.
#[derive(Clone, Copy)]
struct Sizes {
    nope: usize,
    rope: usize,
    latent: usize,
    value: usize,
}

impl<'a, T: Element, O: Element> Latents<'a, T, O> {
    /// The array's batch entries have different lengths: see
    /// [`Qkv::key_lengths`] and [`Qkv::packed`]. A cache knows its own.
    pub fn lengths(self, lengths: Lengths<'a>) -> Self {
        let tokens = match self.tokens {
            Tokens::Array(latents, _) => Tokens::Array(latents, lengths),
            cache @ Tokens::Cache(_) => cache,
        };
        Self { tokens, ..self }
    }

    /// The same with outputs in `f32`.
    pub fn widened(self) -> Latents<'a, T, f32> {
        Latents { q: self.q, w_uk: self.w_uk, w_uv: self.w_uv, tokens: self.tokens, out: PhantomData }
    }

    fn sizes(&self) -> Sizes {
        let (nope, latent, value) = (self.w_uk.dim().1, self.w_uk.dim().2, self.w_uv.dim().1);
        Sizes { nope, latent, value, rope: self.q.dim().3.saturating_sub(nope) }
    }

    /// The latents as the definition reads them, and their sequences.
    fn held(&self, dims: &Dims) -> (Array3<f64>, Vec<Sequence>) {
        match &self.tokens {
            Tokens::Array(latents, lengths) => {
                let sequences = (0..dims.batch).map(|i| lengths.sequence(dims, i)).collect();
                (latents.mapv(Element::to_f64), sequences)
            }
            Tokens::Cache(x) => {
                let held =
                    x.held(&Dims { kv_heads: 1, head_dim: x.cache.shape().head_dim, value_dim: 0, ..*dims });
                let lengths = held.lengths(x);
                let sequences = (0..dims.batch).map(|i| lengths.sequence(dims, i)).collect();
                (held.k.index_axis(Axis(1), 0).mapv(f64::from), sequences)
            }
        }
    }
}

impl<T: Element, O: Element> Input for Latents<'_, T, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        let (batch, heads, _, query) = self.q.dim();
        let Sizes { nope, rope, latent, value } = self.sizes();
        if self.w_uk.dim().0 != heads || nope > query {
            let expected = format!("[heads, d_N, r] = [{heads}, at most {query}, _] as q has it");
            return Err(Error::shape("w_uk", expected, self.w_uk.shape()));
        }
        if (self.w_uv.dim().0, self.w_uv.dim().2) != (heads, latent) {
            let expected = format!("[heads, d_V, r] = [{heads}, _, {latent}] as w_uk has it");
            return Err(Error::shape("w_uv", expected, self.w_uv.shape()));
        }
        let row = latent.saturating_add(rope);
        let dims = match &self.tokens {
            Tokens::Array(latents, lengths) => {
                if (latents.dim().0, latents.dim().2) != (batch, row) {
                    let expected =
                        format!("[batch, kv_len, r + d_R] = [{batch}, _, {row}] as q and w_uk have it");
                    return Err(Error::shape("latents", expected, latents.shape()));
                }
                // Lengths alone are left to be checked.
                let q = self.q.slice(s![.., .., .., ..0]);
                let k = latents.slice(s![.., .., ..0]).insert_axis(Axis(1));
                Qkv { q, k: k.view(), v: k.view(), lengths: *lengths, out: PhantomData::<O> }.dims()?
            }
            Tokens::Cache(x) => {
                let shape = x.cache.shape();
                if (shape.kv_heads, shape.head_dim, shape.value_dim) != (1, row, latent) {
                    let expected = format!("a cache of latents of {latent} + {rope} elements");
                    return Err(Error::value("cache", expected, format_args!("{shape:?}")));
                }
                x.dims_for(query)?
            }
        };
        Ok(Dims { head_dim: query, value_dim: value, ..dims })
    }

    fn out_dim(&self) -> Result<Dim4> {
        let dims = self.dims()?;
        Ok((self.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// The order of the sums: see the [module](crate::latent).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// Queries take up `W_UK`, outputs `W_UV`: for few queries over many keys.
    #[default]
    Absorbed,
    /// Keys and values of every head are made first: for long prompts, over
    /// arrays.
    Expanded,
}

/// Multi-head latent attention.
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
    config: Config<M, Plain>,
    form: Form,
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
    pub fn causal(self) -> MlaBuilder<crate::mask::Causal> {
        self.mask(crate::mask::Causal::new())
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
    pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<Mla<M>> {
        Ok(Mla { config: self.options.build()?, form: self.form })
    }
}

/// Bytes of keys and values that are held at once, unless one head has more.
const HELD: usize = 64 << 20;

const NORM: Norm<'static> = Norm::Softmax { sinks: None };

/// How a call is cut up: groups of heads are worked off one after the other,
/// all of them at once where they are absorbed.
struct Plan {
    isa: Isa,
    dims: Dims,
    sizes: Sizes,
    /// Size of the batch axis.
    entries: usize,
    /// Heads of a group.
    heads: usize,
    /// Rows of a head in the two arrays that are made (absorbed: queries and
    /// sums of latents; expanded: keys and values), and their columns.
    len: usize,
    cols: [usize; 2],
}

impl Plan {
    /// The shapes of the two arrays for so many heads.
    fn made(&self, heads: usize) -> [Dim4; 2] {
        self.cols.map(|cols| (self.entries, heads, self.len, cols))
    }

    fn project(&self, heads: usize, inner: usize, width: usize) -> Project {
        let &Self { isa, entries: batch, len, .. } = self;
        Project { isa, batch, heads, len, inner, width }
    }

    /// The two arrays, to be written.
    fn take<'a>(&self, heads: usize, arena: &mut Arena<'a>) -> [ArrayViewMut4<'a, f32>; 2] {
        self.made(heads).map(|dim| {
            let (b, h, n, d) = dim;
            ArrayViewMut4::from_shape(dim, arena.take(b * h * n * d)).expect("as many elements")
        })
    }
}

impl<M: Mask> Mla<M> {
    fn plan<T: Element, O: Element>(&self, x: &Latents<'_, T, O>) -> Result<Plan> {
        let (dims, sizes, entries) = (self.config.checked(x.dims()?)?, x.sizes(), x.q.dim().0);
        let (len, cols) = match self.form {
            Form::Absorbed => (dims.q_len, [sizes.latent.saturating_add(sizes.rope), sizes.latent]),
            Form::Expanded if matches!(x.tokens, Tokens::Cache(_)) => {
                let reason = "keys and values of every head would be written for all of its tokens: merge \
                              an expanded call over new tokens with an absorbed one over the cache";
                return Err(Error::Conflict { option: "Form::Expanded", with: "a cache", reason });
            }
            Form::Expanded => (dims.kv_len, [dims.head_dim, sizes.value]),
        };
        let bytes = [entries, len, cols[0].saturating_add(cols[1]), size_of::<f32>()];
        let head = bytes.into_iter().fold(1, usize::saturating_mul);
        if head.saturating_mul(dims.q_heads) > isize::MAX as usize / 2 {
            let got = format!("{} heads, {} queries, {} keys", dims.q_heads, dims.q_len, dims.kv_len);
            return Err(Error::value("q", "sizes for which there is memory", got));
        }
        // Heads over one key/value head stay together, since it depends on
        // their number which engine is faster; and so do those that a mask
        // tells apart.
        let apart = self.form == Form::Expanded && self.config.mask().is_shared();
        let most = if apart { HELD / head.max(1) } else { usize::MAX };
        let heads = most.clamp(1, dims.q_heads.max(1));
        Ok(Plan { isa: self.config.isa(), dims, sizes, entries, heads, len, cols })
    }

    /// Bytes of scratch.
    fn bytes<T: Element, O: Element>(&self, x: &Latents<'_, T, O>, plan: &Plan) -> Result<usize> {
        let heads = plan.dims.q_heads;
        let last = heads % plan.heads;
        Ok(self.group_bytes(x, plan, plan.heads.min(heads))?.max(self.group_bytes(x, plan, last)?))
    }

    /// Bytes of scratch for a group of so many heads.
    fn group_bytes<T: Element, O: Element>(
        &self,
        x: &Latents<'_, T, O>,
        plan: &Plan,
        heads: usize,
    ) -> Result<usize> {
        let (zero, made) = (arr0(0f32), plan.made(heads));
        let [Some(first), Some(second)] = made.map(|dim| zero.broadcast(dim)) else {
            return Err(Error::value("q", "sizes for which there is memory", format_args!("{made:?}")));
        };
        let Sizes { nope, latent, value, .. } = plan.sizes;
        let (call, projections) = match self.form {
            Form::Absorbed => (self.absorbed(x, plan, heads, first), [(nope, latent), (latent, value)]),
            Form::Expanded => {
                (self.expanded(x, plan, &(0..heads), [first, second]), [(latent, nope), (latent, value)])
            }
        };
        let projections = projections.map(|(inner, width)| plan.project(heads, inner, width).bytes());
        let held = made.map(|(b, h, n, d)| bytes_for::<f32>(b * h * n * d));
        let scratch = engine::workspace_bytes(&call).max(projections[0]).max(projections[1]);
        Ok(held[0] + held[1] + scratch)
    }

    /// The engine's call of projected queries: all heads over one.
    fn absorbed<'a, T: Element, O: Element>(
        &'a self,
        x: &'a Latents<'_, T, O>,
        plan: &Plan,
        heads: usize,
        q: ArrayView4<'a, f32>,
    ) -> Call<'a> {
        let Sizes { latent, rope, .. } = plan.sizes;
        let arrays = match &x.tokens {
            Tokens::Array(latents, lengths) => {
                let k = latents.view().insert_axis(Axis(1));
                let v = latents.slice(s![.., .., ..latent]).insert_axis(Axis(1));
                Qkv { q, k, v, lengths: *lengths, out: PhantomData::<f32> }.into()
            }
            Tokens::Cache(x) => Arrays::cached(q, x.cache.source(), x.slots()),
        };
        let dims = Dims {
            q_heads: heads,
            kv_heads: heads.min(1),
            head_dim: latent + rope,
            value_dim: latent,
            ..plan.dims
        };
        Call { scale: self.config.scale(&plan.dims) as f32, ..self.config.over(arrays, dims, NORM, None) }
    }

    /// The engine's call of projected keys and values: each head over its own.
    fn expanded<'a, T: Element, O: Element>(
        &'a self,
        x: &'a Latents<'_, T, O>,
        plan: &Plan,
        heads: &Range<usize>,
        [k, v]: [ArrayView4<'a, f32>; 2],
    ) -> Call<'a> {
        let lengths = match &x.tokens {
            Tokens::Array(_, lengths) => *lengths,
            Tokens::Cache(_) => Lengths::Full,
        };
        let q = x.q.slice(s![.., heads.clone(), .., ..]);
        let arrays = Qkv { q, k, v, lengths, out: PhantomData::<O> }.into();
        let dims = Dims { q_heads: heads.len(), kv_heads: heads.len(), ..plan.dims };
        self.config.over(arrays, dims, NORM, None)
    }

    fn run<T: Element, O: Element>(
        &self,
        x: Latents<'_, T, O>,
        mut out: ArrayViewMut4<'_, O>,
        mut lse: Option<ArrayViewMut3<'_, f32>>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let plan = self.plan(&x)?;
        check_out(&x, &out)?;
        lse.as_ref().map_or(Ok(()), |lse| check_lse(&x, lse))?;
        let Sizes { nope, latent, value, .. } = plan.sizes;
        let mut arena = workspace.arena(self.bytes(&x, &plan)?)?;
        for first in (0..plan.dims.q_heads).step_by(plan.heads) {
            let heads = first..(first + plan.heads).min(plan.dims.q_heads);
            let n = heads.len();
            let mut out = out.slice_mut(s![.., heads.clone(), .., ..]);
            let lse = lse.as_mut().map(|lse| lse.slice_mut(s![.., heads.clone(), ..]).insert_axis(Axis(3)));
            let w_uk = x.w_uk.slice(s![heads.clone(), .., ..]);
            let w_uv = x.w_uv.slice(s![heads.clone(), .., ..]).permuted_axes([0, 2, 1]);
            let mut arena = arena.reborrow();
            let [mut made, mut other] = plan.take(n, &mut arena);
            match (self.form, &x.tokens) {
                (Form::Expanded, Tokens::Array(latents, _)) => {
                    // One head that stands for all.
                    let one = latents.view().insert_axis(Axis(1));
                    let (entries, _, len, row) = one.dim();
                    let all = one.broadcast((entries, n, len, row)).expect("an axis of one");
                    let c = all.slice(s![.., .., .., ..latent]);
                    let (k, rotary) = made.view_mut().split_at(Axis(3), nope);
                    let w_uk = w_uk.permuted_axes([0, 2, 1]);
                    plan.project(n, latent, nope).run(c.view(), w_uk, k, arena.reborrow());
                    copy(all.slice(s![.., .., .., latent..]), rotary);
                    plan.project(n, latent, value).run(c, w_uv, other.view_mut(), arena.reborrow());
                    let call = self.expanded(&x, &plan, &heads, [made.view(), other.view()]);
                    engine::run_in(&call, out, lse, arena);
                }
                _ => {
                    let q = x.q.slice(s![.., heads.clone(), .., ..]);
                    let (taken, rotary) = made.view_mut().split_at(Axis(3), latent);
                    let part = q.slice(s![.., .., .., ..nope]);
                    plan.project(n, nope, latent).run(part, w_uk, taken, arena.reborrow());
                    copy(q.slice(s![.., .., .., nope..]), rotary);
                    let call = self.absorbed(&x, &plan, n, made.view());
                    engine::run_in(&call, other.view_mut(), lse, arena.reborrow());
                    plan.project(n, latent, value).run(other.view(), w_uv, out.view_mut(), arena);
                }
            }
        }
        Ok(())
    }

    /// The definition, in the order of sums of the form, and its bound.
    fn define<T: Element, O: Element>(&self, x: &Latents<'_, T, O>) -> Result<Reference> {
        let plan = self.plan(x)?;
        let Sizes { nope, rope, latent, value } = plan.sizes;
        let scale = self.config.scale(&plan.dims);
        let (batch, heads, q_len, _) = x.q.dim();
        let mut out = Array4::zeros((batch, heads, q_len, value));
        let mut lse = Array3::from_elem((batch, heads, q_len), f64::NEG_INFINITY);
        let mut bound = Array3::zeros((batch, heads, q_len));
        let (latents, sequences) = x.held(&plan.dims);
        let wide = |w: ArrayView2<'_, T>| w.mapv(Element::to_f64);
        for (sequence, h) in sequences.iter().flat_map(|s| (0..heads).map(move |h| (s, h))) {
            let site = sequence.site(h);
            let (w_uk, w_uv) = (wide(x.w_uk.index_axis(Axis(0), h)), wide(x.w_uv.index_axis(Axis(0), h)));
            let rows = latents.slice(s![sequence.batch, sequence.keys.clone(), ..]);
            let (c, rotary) = rows.split_at(Axis(1), latent);
            // Keys without their rotary part, and values: those of the form.
            let (k, v) = match self.form {
                Form::Absorbed => (c.to_owned(), c.to_owned()),
                Form::Expanded => (c.dot(&w_uk.t()), c.dot(&w_uv.t())),
            };
            // The same of magnitudes.
            let (k_size, v_size) = (c.abs().dot(&w_uk.abs().t()), c.abs().dot(&w_uv.abs().t()));
            for (i, row) in sequence.queries.clone().enumerate() {
                let q = x.q.slice(s![sequence.batch, h, row, ..]).mapv(Element::to_f64);
                let (q_n, q_r) = q.view().split_at(Axis(0), nope);
                let q_k = match self.form {
                    Form::Absorbed => q_n.dot(&w_uk),
                    Form::Expanded => q_n.to_owned(),
                };
                let keys = (0..site.kv_len).filter(|&j| self.config.mask().visible(&site, i, j));
                let scored = keys.map(|j| (j, scale * (q_k.dot(&k.row(j)) + q_r.dot(&rotary.row(j)))));
                let scored: Vec<(usize, f64)> = scored.filter(|(_, s)| *s != f64::NEG_INFINITY).collect();
                if scored.is_empty() {
                    continue;
                }
                let max = scored.iter().fold(f64::NEG_INFINITY, |max, (_, s)| max.max(*s));
                let sum: f64 = scored.iter().map(|(_, s)| (s - max).exp()).sum();
                let at = [sequence.batch, h, row];
                lse[at] = max + sum.ln();
                let mut o = Array1::zeros(v.ncols());
                let (mut size, mut largest) = (0f64, 0f64);
                for &(j, s) in &scored {
                    o.scaled_add((s - max).exp() / sum, &v.row(j));
                    if max - s < 25.0 {
                        let dot = q_n.abs().dot(&k_size.row(j)) + q_r.abs().dot(&rotary.row(j).abs());
                        size = size.max(scale.abs() * dot + s.abs());
                    }
                    largest = v_size.row(j).iter().fold(largest, |largest, v| largest.max(*v));
                }
                let o = match self.form {
                    Form::Absorbed => w_uv.dot(&o),
                    Form::Expanded => o,
                };
                out.slice_mut(s![sequence.batch, h, row, ..]).assign(&o);
                let terms = nope + rope + 2 * latent + scored.len();
                bound[at] = ERROR_CONSTANT * 2f64.powi(-24) * (terms as f64 + size) * largest;
            }
        }
        Ok(Reference { out, lse, bound })
    }

    /// The definition's LSE, `[batch, heads, q_len]`.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn reference_lse<T: Element, O: Element>(&self, x: Latents<'_, T, O>) -> Result<Array3<f64>> {
        Ok(self.define(&x)?.lse)
    }
}

/// What the definition gives.
struct Reference {
    out: Array4<f64>,
    lse: Array3<f64>,
    bound: Array3<f64>,
}

/// Widens.
fn copy<T: Element>(from: ArrayView4<'_, T>, mut to: ArrayViewMut4<'_, f32>) {
    to.zip_mut_with(&from, |to, from| *to = from.to_f32());
}

impl<T: Element, O: Element, M: Mask> Attention<Latents<'_, T, O>> for Mla<M> {
    fn workspace_bytes(&self, x: Latents<'_, T, O>) -> Result<usize> {
        self.bytes(&x, &self.plan(&x)?)
    }

    fn forward_into(
        &self,
        x: Latents<'_, T, O>,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.run(x, out, None, workspace)
    }

    fn reference(&self, x: Latents<'_, T, O>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.out)
    }

    /// What the form does; latents are read once for all heads.
    fn cost(&self, x: Latents<'_, T, O>) -> Result<Cost> {
        let Plan { dims, sizes, .. } = self.plan(&x)?;
        let Sizes { nope, rope, latent, value } = sizes;
        let (rows, head_dim, value_dim) = match self.form {
            Form::Absorbed => (x.q.dim().0 * dims.q_len, latent + rope, latent),
            Form::Expanded => (x.q.dim().0 * dims.kv_len, dims.head_dim, value),
        };
        let weights = x.w_uk.len() + x.w_uv.len();
        let out = x.q.dim().0 * dims.q_heads * dims.q_len * value * size_of::<O>();
        let bytes = (x.q.len() + weights) * size_of::<T>() + out;
        let pairs = Dims { head_dim, value_dim, ..dims };
        let cost = match &x.tokens {
            Tokens::Array(latents, lengths) => {
                let bytes = bytes + latents.len() * size_of::<T>();
                self.config.price(&pairs, |i| lengths.sequence(&dims, i), bytes, 0)
            }
            Tokens::Cache(x) => {
                let slots = x.slots();
                let tokens: usize = (0..dims.batch).map(|i| slots.len(i)).sum();
                let bytes = bytes + tokens * x.cache.token_bytes();
                self.config.price(&pairs, |i| slots.sequence(&dims, i), bytes, 0)
            }
        };
        let projections = 2 * rows * dims.q_heads * latent * (nope + value);
        Ok(Cost { flops: cost.flops + projections as u64, ..cost })
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
        self.run(x, out, Some(lse), workspace)
    }
}

impl<M: Mask> Mechanism for Mla<M> {
    fn card(&self) -> &'static Card {
        const CARD: Card = Card {
            name: "MLA",
            family: "latent",
            source: "arXiv 2405.04434, 2412.19437",
            summary: "multi-head latent attention: keys and values of all heads from one latent a token",
            when_not: "where each head has keys and values of its own: dense attention",
        };
        &CARD
    }
}
