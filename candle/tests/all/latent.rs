use attention_kernels::cache::{Latent, Pages};
use attention_kernels::latent::{Form, Mla};
use attention_kernels_candle::{LatentCache, append_latents, latent_attend, latent_attend_cached};
use candle_core::{Result, Tensor};

use crate::support::{Unfused, close, noise, var};

const HEADS: usize = 4;
/// Elements of a latent, of a rotary key, of the rest of a query, and of a value.
const SIZES: [usize; 4] = [32, 8, 16, 24];

/// Queries, latents, and the matrices as released models have them, one after the other.
fn tensors(q_len: usize, kv_len: usize) -> [Tensor; 4] {
    let [r, rope, nope, value] = SIZES;
    let kv_b = noise((HEADS, nope + value, r), 3);
    [
        noise((2, q_len, HEADS, nope + rope), 1).transpose(1, 2).unwrap(),
        noise((2, kv_len, r + rope), 2),
        kv_b.narrow(1, 0, nope).unwrap(),
        kv_b.narrow(1, nope, value).unwrap(),
    ]
}

/// Keys and values of every head, then attention.
fn expanded([q, latents, w_uk, w_uv]: &[Tensor; 4]) -> Result<Tensor> {
    let [r, rope, ..] = SIZES;
    let (batch, kv_len, _) = latents.dims3()?;
    let c = latents.narrow(2, 0, r)?.unsqueeze(1)?;
    let rotary = latents.narrow(2, r, rope)?.unsqueeze(1)?.broadcast_as((batch, HEADS, kv_len, rope))?;
    let of = |w: &Tensor| c.broadcast_matmul(&w.t()?.unsqueeze(0)?.contiguous()?);
    let k = Tensor::cat(&[of(w_uk)?, rotary.contiguous()?], 3)?;
    Unfused::causal(q, &k).run(q, &k, &of(w_uv)?)
}

#[test]
fn both_forms_are_attention_of_expanded_heads() {
    for (q_len, kv_len) in [(33, 33), (1, 70), (5, 41)] {
        let all = tensors(q_len, kv_len);
        let [q, latents, w_uk, w_uv] = &all;
        let want = expanded(&all).unwrap();
        for form in [Form::Absorbed, Form::Expanded] {
            let mla = Mla::builder().causal().form(form).build().unwrap();
            let got = latent_attend(q, latents, w_uk, w_uv, &mla).unwrap();
            assert!(got.transpose(1, 2).unwrap().is_contiguous());
            close("latent", &got, &want, 1e-5);
        }
    }
}

fn grows<C: LatentCache>(mut cache: C) {
    let all = tensors(50, 50);
    let [q, latents, w_uk, w_uv] = &all;
    let want = expanded(&all).unwrap();
    let mla = Mla::builder().causal().build().unwrap();
    for (first, len) in [(0, 30), (30, 1), (31, 19)] {
        append_latents(&mut cache, &[0, 1], &latents.narrow(1, first, len).unwrap()).unwrap();
        let q = q.narrow(2, first, len).unwrap();
        let got = latent_attend_cached(&q, &cache, None, w_uk, w_uv, &mla).unwrap();
        close("cached", &got, &want.narrow(2, first, len).unwrap(), 1e-5);
    }
    let last = q.narrow(0, 1, 1).unwrap().narrow(2, 49, 1).unwrap();
    let got = latent_attend_cached(&last, &cache, Some(&[1]), w_uk, w_uv, &mla).unwrap();
    close("one", &got, &want.narrow(0, 1, 1).unwrap().narrow(2, 49, 1).unwrap(), 1e-5);
    assert!(append_latents(&mut cache, &[0, 1], &noise((2, 99, 40), 1)).is_err());
    assert_eq!(cache.lengths(), [50, 50]);
}

#[test]
fn caches_of_latents_grow() {
    let [r, rope, ..] = SIZES;
    grows(Latent::contiguous::<f32>(r, rope, 2, 64).unwrap());
    grows(Latent::paged::<f32>(r, rope, 2, Pages { count: 8, len: 16 }).unwrap());
}

#[test]
fn what_does_not_fit_is_refused() {
    let mla = Mla::builder().build().unwrap();
    let [q, latents, w_uk, w_uv] = tensors(3, 5);
    assert!(latent_attend(&q, &latents, &w_uv, &w_uv, &mla).is_err());
    assert!(latent_attend(&q, &latents.narrow(2, 0, 39).unwrap(), &w_uk, &w_uv, &mla).is_err());
    let error = latent_attend(&q, &latents.unsqueeze(0).unwrap(), &w_uk, &w_uv, &mla).unwrap_err();
    assert!(error.to_string().contains("latents: expected 3 axes"), "{error}");
    let q = var(q.shape(), 1);
    let loss = latent_attend(&q, &latents, &w_uk, &w_uv, &mla).unwrap().sum_all().unwrap();
    assert!(loss.backward().unwrap_err().to_string().contains("latent attention"));
}
