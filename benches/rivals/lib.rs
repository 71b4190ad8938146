//! Other ways to compute attention in Rust.

use candle_core::{Device, Tensor, WithDType};
use candle_nn::attention::{AttnMask, flash_attn};
use gemm::{Parallelism, gemm};
use ndarray::{Array4, ArrayView2, ArrayView4, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Queries whose scores are in memory at once.
const ROWS: usize = 256;

/// `softmax(q k^T / sqrt(head_dim)) v` composed of matrix products of the
/// crate `gemm`: a task for each head and block of queries, whose scores stay
/// in the second-level cache for the lengths of a few thousand.
pub fn composed(
    q: ArrayView4<'_, f32>,
    k: ArrayView4<'_, f32>,
    v: ArrayView4<'_, f32>,
    causal: bool,
    mut out: Array4<f32>,
) -> Array4<f32> {
    let (_, q_heads, q_len, head_dim) = q.dim();
    let (_, kv_heads, kv_len, value_dim) = v.dim();
    let scale = 1.0 / (head_dim as f32).sqrt();
    let heads = out.as_slice_mut().expect("an output in standard layout").par_chunks_mut(q_len * value_dim);
    heads.enumerate().for_each(|(head, out)| {
        let (b, h) = (head / q_heads, head % q_heads);
        let g = h / (q_heads / kv_heads);
        let blocks = out.par_chunks_mut(ROWS * value_dim).enumerate();
        blocks.for_each_init(Vec::new, |scratch, (block, out)| {
            let (first, rows) = (block * ROWS, out.len() / value_dim);
            let keys = if causal { (first + rows + kv_len - q_len).min(kv_len) } else { kv_len };
            scratch.resize(rows * keys, 0.0);
            let q = q.slice(s![b, h, first..first + rows, ..]);
            let mut scores = view(scratch, rows, keys);
            product(q, k.slice(s![b, g, ..keys, ..]).t(), scores.view_mut());
            for (i, mut row) in scores.axis_iter_mut(Axis(0)).enumerate() {
                if causal {
                    row.slice_mut(s![(first + i + 1 + kv_len - q_len).min(keys)..]).fill(f32::NEG_INFINITY);
                }
                let most = row.fold(f32::NEG_INFINITY, |most, &score| most.max(score));
                row.mapv_inplace(|score| (scale * (score - most)).exp());
                let sum = row.sum();
                row /= sum;
            }
            product(scores.view(), v.slice(s![b, g, ..keys, ..]), view(out, rows, value_dim));
        });
    });
    out
}

fn view(data: &mut [f32], rows: usize, cols: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, cols), data).expect("as many numbers as the shape says")
}

/// `c = a b`
fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, mut c: ArrayViewMut2<'_, f32>) {
    let ((m, k), n) = (a.dim(), b.ncols());
    assert_eq!((b.nrows(), c.dim()), (k, (m, n)));
    let (at, bt, ct) = (
        [a.strides()[0], a.strides()[1]],
        [b.strides()[0], b.strides()[1]],
        [c.strides()[0], c.strides()[1]],
    );
    // SAFETY: pointers, sizes and strides are those of the views, and the
    // sizes agree.
    unsafe {
        gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            ct[1],
            ct[0],
            false,
            a.as_ptr(),
            at[1],
            at[0],
            b.as_ptr(),
            bt[1],
            bt[0],
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Arrays in candle's layout, `[batch, len, heads, dim]`.
///
/// # Errors
/// What candle refuses.
pub fn tensors<T: WithDType>(arrays: &[Array4<T>; 3]) -> candle_core::Result<[Tensor; 3]> {
    let tensor = |x: &Array4<T>| {
        let x = x.view().permuted_axes([0, 2, 1, 3]);
        let (shape, data) = (x.dim(), x.iter().copied().collect());
        Tensor::from_vec(data, shape, &Device::Cpu)
    };
    Ok([tensor(&arrays[0])?, tensor(&arrays[1])?, tensor(&arrays[2])?])
}

/// candle's flash attention on the CPU. The output is `[batch, heads, len,
/// dim]`.
///
/// # Errors
/// What candle refuses.
pub fn candle<T: WithDType + num_traits::Float>(
    [q, k, v]: &[Tensor; 3],
    causal: bool,
) -> candle_core::Result<Tensor> {
    let scale = 1.0 / (q.dims()[3] as f32).sqrt();
    let mask = if causal { AttnMask::causal() } else { AttnMask::None };
    flash_attn::<T>(q, k, v, scale, mask, None, None)
}
