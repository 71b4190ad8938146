//! Multi-head latent attention over tensors.

use attention_kernels::cache::{Cache, Cached, Contiguous, Format, Latent, Paged};
use attention_kernels::latent::{Latents, Mla};
use attention_kernels::mask::Mask;
use attention_kernels::{Attention, Input, Workspace};
use candle_core::{Result, Tensor};
use ndarray::ArrayView3;

use crate::arrays::{Stored, by_type, output, read, refusal};
use crate::graph;

/// Multi-head latent attention (DeepSeek-V2 and V3) of queries `[batch, heads, q_len, d_N
/// + d_R]`, whose rotary part comes last, over latents `[batch, kv_len, r + d_R]` with
/// their rotary keys. `w_uk` is `[heads, d_N, r]` and `w_uv` `[heads, d_V, r]`: both are
/// parts of the `kv_b_proj` of released models, `[heads, d_N + d_V, r]`, narrowed without
/// a copy. All of one type, [`f32`], [`f16`](half::f16) or [`bf16`](half::bf16), of any
/// strides. Gives `[batch, heads, q_len, d_V]`, laid out as that of
/// [`attend`](crate::attend).
///
/// Cost: see [`Mla`]. There are no gradients: asking for them is an error.
///
/// # Errors
/// For tensors on another device, of other types or of shapes that do not fit.
pub fn latent_attend<M: Mask>(
    q: &Tensor,
    latents: &Tensor,
    w_uk: &Tensor,
    w_uv: &Tensor,
    mla: &Mla<M>,
) -> Result<Tensor> {
    let made = by_type!("q", q.dtype(), T => {
        let (q, latents) = (read("q", q)?, read("latents", latents)?);
        let (w_uk, w_uv) = (read("w_uk", w_uk)?, read("w_uv", w_uv)?);
        let x = Latents::new(q.array4::<T>()?, latents.array3()?, w_uk.array3()?, w_uv.array3()?);
        output(x.out_dim().map_err(refusal)?, |out| mla.forward_into(x, out, &mut Workspace::new()))
    })?;
    graph::output("latent attention", &[q, latents, w_uk, w_uv], made, || None)?.transpose(1, 2)
}

/// Caches of latents that grow.
pub trait LatentCache: Cache {
    /// [`Latent::append_each`](attention_kernels::cache::Latent::append_each)
    #[doc(hidden)]
    fn append_rows<T: Stored>(
        &mut self,
        sequences: &[usize],
        latents: ArrayView3<'_, T>,
    ) -> attention_kernels::Result<()>;
}

macro_rules! latent_caches {
    ($($cache:ident),+) => {$(
        impl<F: Format> LatentCache for Latent<$cache<F>> {
            fn append_rows<T: Stored>(
                &mut self,
                sequences: &[usize],
                latents: ArrayView3<'_, T>,
            ) -> attention_kernels::Result<()> {
                self.append_each(sequences, latents)
            }
        }
    )+};
}
latent_caches!(Contiguous, Paged);

/// Appends equally many tokens to each of `sequences` of a cache of latents, contiguous or
/// paged: `[sequences, tokens, r + d_R]` in [`f32`], [`f16`](half::f16) or
/// [`bf16`](half::bf16), of any strides, latents after their normalisation and rotary keys
/// after their rotation. Copied once, into their place.
///
/// # Errors
/// For a tensor on another device, of another type or shape, and for tokens that the
/// cache has no room for. Nothing has changed then.
pub fn append_latents(cache: &mut impl LatentCache, sequences: &[usize], latents: &Tensor) -> Result<()> {
    by_type!("latents", latents.dtype(), T => {
        let latents = read("latents", latents)?;
        cache.append_rows(sequences, latents.array3::<T>()?).map_err(refusal)
    })
}

/// [`latent_attend`] over the latents of a cache, whatever its format: one batch entry for
/// each of `sequences`, or for all sequences of the cache. `mla` must be absorbed, as it is
/// by default.
///
/// ```
/// use attention_kernels::{cache::Latent, latent::Mla};
/// use attention_kernels_candle::{append_latents, latent_attend_cached};
/// use candle_core::{DType, Device, Tensor};
/// use half::bf16;
///
/// // 4 heads; latents of 32, rotary keys of 8, 16 more elements a query, values of 24.
/// let mut cache = Latent::contiguous::<bf16>(32, 8, 1, 100)?;
/// append_latents(&mut cache, &[0], &Tensor::rand(-1f32, 1., (1, 50, 40), &Device::Cpu)?)?;
///
/// let kv_b = Tensor::rand(-1f32, 1., (4, 16 + 24, 32), &Device::Cpu)?;
/// let (w_uk, w_uv) = (kv_b.narrow(1, 0, 16)?, kv_b.narrow(1, 16, 24)?);
/// let q = Tensor::rand(-1f32, 1., (1, 4, 1, 24), &Device::Cpu)?;
/// let out = latent_attend_cached(&q, &cache, None, &w_uk, &w_uv, &Mla::builder().causal().build()?)?;
/// assert_eq!(out.dims(), [1, 4, 1, 24]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`latent_attend`], and for sequences that the cache does not have.
pub fn latent_attend_cached<C: LatentCache, M: Mask>(
    q: &Tensor,
    cache: &C,
    sequences: Option<&[usize]>,
    w_uk: &Tensor,
    w_uv: &Tensor,
    mla: &Mla<M>,
) -> Result<Tensor> {
    let made = by_type!("q", q.dtype(), T => {
        let (q, w_uk, w_uv) = (read("q", q)?, read("w_uk", w_uk)?, read("w_uv", w_uv)?);
        let x = Cached::new(q.array4::<T>()?, cache);
        let x = sequences.map_or(x, |sequences| x.sequences(sequences));
        let x = Latents::cached(x, w_uk.array3()?, w_uv.array3()?);
        output(x.out_dim().map_err(refusal)?, |out| mla.forward_into(x, out, &mut Workspace::new()))
    })?;
    graph::output("latent attention over a cache", &[q, w_uk, w_uv], made, || None)?.transpose(1, 2)
}
