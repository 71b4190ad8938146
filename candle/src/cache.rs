//! Key/value caches filled from tensors, and attention over them.

use attention_kernels::cache::{Append, Cache, Cached};
use attention_kernels::dense::Dense;
use attention_kernels::mask::Mask;
use attention_kernels::score::Score;
use attention_kernels::{Attention, Input, Workspace};
use candle_core::{Result, Tensor};

use crate::arrays::{by_type, output, read, refusal};
use crate::graph;

/// Appends equally many tokens to each of `sequences` of a cache, contiguous, paged,
/// quantised or any other: keys `[sequences, kv_heads, tokens, head_dim]` and values
/// `[sequences, kv_heads, tokens, value_dim]` of one type, [`f32`], [`f16`](half::f16)
/// or [`bf16`](half::bf16), of any strides. They are rounded to the cache's format and
/// copied once, into their place; `Tensor::cat` would copy all tokens before them too.
///
/// No gradient goes through a cache.
///
/// # Errors
/// For tensors on another device, of other types or shapes, and for tokens that the
/// cache has no room for. Nothing has changed then.
pub fn append<C: Append>(cache: &mut C, sequences: &[usize], k: &Tensor, v: &Tensor) -> Result<()> {
    by_type!("k", k.dtype(), T => {
        let (k, v) = (read("k", k)?, read("v", v)?);
        cache.append_each(sequences, k.array4::<T>()?, v.array4::<T>()?).map_err(refusal)
    })
}

/// Attention over sequences of a cache: `[sequences, q_heads, q_len, value_dim]`, laid
/// out as that of [`attend`](crate::attend). Queries are `[sequences, q_heads, q_len,
/// head_dim]` in [`f32`], [`f16`](half::f16) or [`bf16`](half::bf16), of any strides, for
/// each of `sequences` of the cache or, where it is none, for all of them. With a causal
/// `dense` the last query sits at the last token that the sequence has: append first.
///
/// One query reads the cache once: time is that of its bytes. Nothing of it is copied.
/// There are no gradients: asking for them is an error.
///
/// ```
/// use attention_kernels::cache::{Contiguous, Int8, KvShape};
/// use attention_kernels::dense::Dense;
/// use attention_kernels_candle::{append, attend_cached};
/// use candle_core::{Device, Tensor};
///
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
/// let mut cache = Contiguous::<Int8>::new(shape, 1, 1024)?;
/// let dense = Dense::builder().causal().build()?;
/// for tokens in [100, 1, 1] {
///     let q = Tensor::rand(-1f32, 1., (1, tokens, 8, 64), &Device::Cpu)?.transpose(1, 2)?;
///     let kv = Tensor::rand(-1f32, 1., (1, tokens, 2, 64), &Device::Cpu)?.transpose(1, 2)?;
///     append(&mut cache, &[0], &kv, &kv)?;
///     let out = attend_cached(&q, &cache, None, &dense)?;
///     assert_eq!(out.dims(), [1, 8, tokens, 64]);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// For queries on another device, of other types or shapes, and for sequences that the
/// cache does not have.
pub fn attend_cached<C: Cache, M: Mask, F: Score>(
    q: &Tensor,
    cache: &C,
    sequences: Option<&[usize]>,
    dense: &Dense<M, F>,
) -> Result<Tensor> {
    let made = by_type!("q", q.dtype(), T => {
        let q = read("q", q)?;
        let x = Cached::new(q.array4::<T>()?, cache);
        let x = sequences.map_or(x, |sequences| x.sequences(sequences));
        output(x.out_dim().map_err(refusal)?, |out| dense.forward_into(x, out, &mut Workspace::new()))
    })?;
    graph::output("attention over a cache", &[q], made, || None)?.transpose(1, 2)
}
