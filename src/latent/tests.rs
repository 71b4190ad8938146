//! Latent attention: its forms, caches, and dense attention are one thing.

use half::bf16;
use ndarray::{Array3, Array4, Axis, s};

use super::*;
use crate::attention::{Attention, Bounded, Mergeable};
use crate::cache::{Cached, Contiguous, KvShape, Latent, Pages};
use crate::dense::Dense;
use crate::element::{DType, Element};
use crate::input::{Lengths, Qkv};
use crate::mask::{Window, mask_fn_per_head};
use crate::math::random::Normal;
use crate::simd::Isa;

/// Sizes: `batch, heads, q_len, kv_len`, then `d_N, d_R, r, d_V`.
const SIZES: [[usize; 8]; 7] = [
    [2, 3, 5, 70, 12, 8, 40, 20],
    [1, 16, 1, 200, 32, 16, 64, 32],
    [2, 2, 90, 90, 7, 3, 9, 11],
    [1, 2, 3, 4, 0, 4, 8, 5],
    [1, 2, 3, 4, 4, 0, 8, 0],
    [0, 2, 3, 4, 4, 2, 8, 3],
    [2, 2, 3, 0, 4, 2, 8, 3],
];

struct Case<T> {
    q: Array4<T>,
    latents: Array3<T>,
    w_uk: Array3<T>,
    w_uv: Array3<T>,
}

impl<T: Element> Case<T> {
    fn new([batch, heads, q_len, kv_len, nope, rope, latent, value]: [usize; 8]) -> Self {
        let mut normal = Normal::new(3);
        let mut next = |size: f64| T::from_f32((size * normal.next().unwrap()) as f32);
        let small = 1.0 / (latent as f64).sqrt();
        Self {
            q: Array4::from_shape_simple_fn((batch, heads, q_len, nope + rope), || next(1.5)),
            latents: Array3::from_shape_simple_fn((batch, kv_len, latent + rope), || next(1.0)),
            w_uk: Array3::from_shape_simple_fn((heads, nope, latent), || next(small)),
            w_uv: Array3::from_shape_simple_fn((heads, value, latent), || next(small)),
        }
    }

    fn x(&self) -> Latents<'_, T> {
        Latents::new(self.q.view(), self.latents.view(), self.w_uk.view(), self.w_uv.view())
    }
}

fn close(got: impl IntoIterator<Item = f64>, want: impl IntoIterator<Item = f64>, within: f64) {
    for (got, want) in got.into_iter().zip(want) {
        assert!(got == want || (got - want).abs() <= within, "{got} for {want}");
    }
}

#[test]
fn absorbed_is_expanded() {
    for sizes in SIZES {
        let case = Case::<f32>::new(sizes);
        let [absorbed, expanded] = [Form::Absorbed, Form::Expanded]
            .map(|form| Mla::builder().mask(Window::new(Some(40), Some(0))).form(form).build().unwrap());
        let (a, e) = (absorbed.reference(case.x()).unwrap(), expanded.reference(case.x()).unwrap());
        assert_eq!(a.dim(), (sizes[0], sizes[1], sizes[2], sizes[7]));
        close(a, e, 1e-12);
        let (a, e) = (absorbed.reference_lse(case.x()).unwrap(), expanded.reference_lse(case.x()).unwrap());
        close(a, e, 1e-12);
    }
}

fn both_forms_are_held_to_the_definition<T: Element + PartialEq>() {
    for sizes in SIZES {
        let case = Case::<T>::new(sizes);
        for isa in Isa::available() {
            for form in [Form::Absorbed, Form::Expanded] {
                let mla = Mla::builder().causal().form(form).isa(isa).build().unwrap();
                let want = mla.reference(case.x()).unwrap();
                let (got, lse) = mla.forward_with_lse(case.x()).unwrap();
                assert_eq!(got, mla.forward(case.x()).unwrap());
                let bound = mla.error_bound(case.x()).unwrap();
                for (at, want) in want.indexed_iter() {
                    let rounding = if T::DTYPE == DType::F32 { 0.0 } else { T::ROUNDING * want.abs() };
                    let bound = 1.01 * rounding + bound[[at.0, at.1, at.2]];
                    let off = (got[at].to_f64() - want).abs();
                    assert!(off <= bound, "{isa} {form:?} {at:?}: off by {off:e}, {bound:e} allowed");
                }
                let want = mla.reference_lse(case.x()).unwrap();
                close(lse.iter().map(|x| f64::from(*x)), want, 1e-4);
            }
        }
    }
}

#[test]
fn both_forms_of_f32() {
    both_forms_are_held_to_the_definition::<f32>();
}

#[test]
fn both_forms_of_bf16() {
    both_forms_are_held_to_the_definition::<bf16>();
}

#[test]
fn heads_that_a_mask_knows() {
    let case = Case::<f32>::new(SIZES[0]);
    for form in [Form::Absorbed, Form::Expanded] {
        let mask = || mask_fn_per_head(|site, i, j| !(site.head + i + j).is_multiple_of(3));
        let mla = Mla::builder().mask(mask()).form(form).build().unwrap();
        let (got, want) = (mla.forward(case.x()).unwrap(), mla.reference(case.x()).unwrap());
        close(got.iter().map(|x| f64::from(*x)), want, 2e-5);
    }
}

/// With a latent that is the keys and values of all heads one after the other,
/// and matrices that cut them out, it is dense attention.
#[test]
fn matrices_that_cut_out_heads_give_dense_attention() {
    let (heads, len, dim) = (3, 30, 8);
    let mut normal = Normal::new(4);
    let mut next = || normal.next().unwrap() as f32;
    let [q, k, v] = [(); 3].map(|()| Array4::from_shape_simple_fn((2, heads, len, dim), &mut next));
    let latent = 2 * heads * dim;
    let mut latents = Array3::<f32>::zeros((2, len, latent));
    for ((b, h, t, c), _) in k.indexed_iter() {
        latents[[b, t, h * dim + c]] = k[[b, h, t, c]];
        latents[[b, t, (heads + h) * dim + c]] = v[[b, h, t, c]];
    }
    let cut = |first: usize| {
        Array3::from_shape_fn((heads, dim, latent), |(h, c, l)| {
            f32::from(u8::from(l == (first + h) * dim + c))
        })
    };
    let (w_uk, w_uv) = (cut(0), cut(heads));
    let dense = Dense::builder().causal().build().unwrap();
    let want = dense.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
    for form in [Form::Absorbed, Form::Expanded] {
        let mla = Mla::builder().causal().form(form).build().unwrap();
        let x = Latents::new(q.view(), latents.view(), w_uk.view(), w_uv.view());
        close(mla.reference(x).unwrap(), want.clone(), 1e-12);
        close(mla.forward(x).unwrap().iter().map(|x| f64::from(*x)), want.clone(), 1e-5);
    }
}

#[test]
fn caches_give_what_arrays_give() {
    let sizes = [3, 4, 2, 90, 12, 8, 40, 20];
    let case = Case::<f32>::new(sizes);
    let lengths = [90, 0, 17];
    let mla = Mla::builder().causal().build().unwrap();
    let want = mla.forward(case.x().lengths(Lengths::Keys(&lengths))).unwrap();
    let mut contiguous = Latent::contiguous::<f32>(40, 8, 3, 90).unwrap();
    let mut paged = Latent::paged::<f32>(40, 8, 3, Pages { count: 8, len: 16 }).unwrap();
    for (i, &len) in lengths.iter().enumerate() {
        contiguous.append(i, case.latents.slice(s![i, ..len, ..])).unwrap();
        paged.append(i, case.latents.slice(s![i, ..len, ..])).unwrap();
    }
    let (uk, uv) = (case.w_uk.view(), case.w_uv.view());
    let a = Latents::cached(Cached::new(case.q.view(), &contiguous), uk, uv);
    let b = Latents::cached(Cached::new(case.q.view(), &paged), uk, uv);
    for x in [a, b] {
        assert_eq!(mla.forward(x).unwrap(), want);
        close(want.iter().map(|x| f64::from(*x)), mla.reference(x).unwrap(), 2e-5);
        assert_eq!(
            mla.cost(x).unwrap().flops,
            mla.cost(case.x().lengths(Lengths::Keys(&lengths))).unwrap().flops
        );
    }
    // Packed queries over some of the sequences.
    let q = case.q.slice(s![2..3, .., .., ..]);
    let x = Latents::cached(Cached::new(q, &paged).sequences(&[2, 0]).packed(&[0, 2, 2]), uk, uv);
    close(
        mla.forward(x).unwrap().iter().map(|x| f64::from(*x)),
        want.slice(s![2..3, .., .., ..]).iter().map(|x| f64::from(*x)),
        1e-5,
    );
    let expanded = Mla::builder().form(Form::Expanded).build().unwrap();
    assert!(expanded.forward(x).unwrap_err().to_string().starts_with("Form::Expanded cannot be combined"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::<f32>::new(SIZES[0]);
    let mla = Mla::builder().build().unwrap();
    let refused = |x: Latents<'_, f32>| {
        let message = mla.forward(x).unwrap_err().to_string();
        assert_eq!(mla.reference(x).unwrap_err().to_string(), message);
        assert_eq!(mla.workspace_bytes(x).unwrap_err().to_string(), message);
        message
    };
    let (q, c, uk, uv) = (case.q.view(), case.latents.view(), case.w_uk.view(), case.w_uv.view());
    assert!(refused(Latents::new(q, c, uk.slice(s![..2, .., ..]), uv)).starts_with("w_uk: expected shape"));
    assert!(refused(Latents::new(q.slice(s![.., .., .., ..11]), c, uk, uv)).starts_with("w_uk: expected"));
    assert!(refused(Latents::new(q, c, uk, uv.slice(s![.., .., 1..]))).starts_with("w_uv: expected shape"));
    assert!(
        refused(Latents::new(q, c.slice(s![.., .., 1..]), uk, uv)).starts_with("latents: expected shape")
    );
    assert!(
        refused(Latents::new(q, c.slice(s![1.., .., ..]), uk, uv)).starts_with("latents: expected shape")
    );
    assert!(refused(case.x().lengths(Lengths::Keys(&[71, 0]))).starts_with("key_lengths: "));
    let shape = KvShape { kv_heads: 1, head_dim: 48, value_dim: 39 };
    let cache = Contiguous::<f32>::new(shape, 2, 4).unwrap();
    let x = Latents::cached(Cached::new(q, &cache), uk, uv);
    assert!(refused(x).starts_with("cache: expected a cache of latents of 40 + 8 elements"));
    // Sizes of arrays that take no memory.
    let wide = q.slice(s![..1, .., ..1, ..]);
    let wide = wide.broadcast((1, 3, 1, 20)).unwrap();
    let many = wide.index_axis(Axis(2), 0).insert_axis(Axis(2));
    let many = many.broadcast((1, 3, usize::MAX >> 12, 20));
    if let Some(many) = many {
        let one = c.slice(s![..1, .., ..]);
        let error = refused(Latents::new(many, one, uk, uv));
        assert!(error.contains("memory") || error.contains("too large"), "{error}");
    }
}
