//! Gradients of HaloNet.

use half::{bf16, f16};
use ndarray::{Array4, ArrayViewD, s};

use super::backward::HaloGradients;
use super::tests::{image, relative};
use super::*;
use crate::attention::{Attention, Backward};
use crate::dense::{Dense, SavedForward};
use crate::engine::workspace::Workspace;
use crate::simd::Isa;
use crate::testing::arrays::array;
use crate::testing::gradients::{Arrays, differences, held};
use crate::testing::qkv::Qkvs;

impl<A> Arrays<A> for HaloGradients<A> {
    fn arrays(&self) -> Vec<(&'static str, ArrayViewD<'_, A>)> {
        let mut all = vec![
            ("q", self.q.view().into_dyn()),
            ("k", self.k.view().into_dyn()),
            ("v", self.v.view().into_dyn()),
        ];
        if let Some([rows, columns]) = &self.relative {
            all.extend([("rows", rows.view().into_dyn()), ("columns", columns.view().into_dyn())]);
        }
        all
    }
}

/// Without terms, with them, and with terms that are scaled.
fn builders(shape: [usize; 2], block: [usize; 2], halo: usize, stride: usize) -> [HaloNetBuilder; 3] {
    let plain = HaloNet::builder(shape).block(block).halo(halo).stride(stride);
    let [rows, columns] = block.map(|block| relative(block + 2 * halo));
    let with = plain.clone().relative(rows, columns);
    [plain, with.clone(), with.scale(0.7).scale_relative()]
}

#[test]
fn kernels_keep_to_the_definition() {
    for isa in Isa::available() {
        for (shape, block, halo, stride) in
            [([8, 12], [4, 4], 3, 1), ([6, 9], [2, 3], 0, 1), ([8, 8], [8, 4], 9, 2), ([0, 4], [2, 2], 1, 1)]
        {
            let x = image(shape, stride);
            let (b, h, n, _) = x.q.dim();
            let d_out = array(9, (b, h, n, 7));
            for (i, builder) in builders(shape, block, halo, stride).into_iter().enumerate() {
                let halo = builder.isa(isa).build().unwrap();
                held(&format!("{isa}, {i} of {shape:?}"), &halo, x.qkv(), &d_out);
                if isa != Isa::Scalar {
                    continue;
                }
                fn halves<T: Element>(halo: &HaloNet, x: &Qkvs, d_out: &Array4<f32>) {
                    let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| x.mapv(T::from_f32));
                    held(T::DTYPE.name(), halo, Qkv::new(q.view(), k.view(), v.view()), d_out);
                }
                halves::<f16>(&halo, &x, &d_out);
                halves::<bf16>(&halo, &x, &d_out);
            }
        }
    }
}

#[test]
fn definitions_are_what_differences_give() {
    let x = Qkvs::new([2, 2, 1, 12, 12, 3, 2], 4);
    let d_out = array::<ndarray::Ix4, _>(9, (2, 2, 12, 2));
    let exact = d_out.mapv(f64::from);
    for mut builder in builders([3, 4], [3, 2], 1, 1) {
        builder.relative = builder.relative.map(|x| x.map(|x| x.slice(s![.., ..3]).to_owned()));
        let want = builder.clone().build().unwrap().reference_backward(x.qkv(), d_out.view(), ()).unwrap();
        for (name, want) in want.arrays() {
            differences(name, want, |i, by| {
                let (mut x, mut builder) = (x.clone(), builder.clone());
                let mut tables = builder.relative.iter_mut().flatten();
                let at = match name {
                    "q" => x.q.iter_mut().nth(i),
                    "k" => x.k.iter_mut().nth(i),
                    "v" => x.v.iter_mut().nth(i),
                    "rows" => tables.next().unwrap().iter_mut().nth(i),
                    _ => tables.nth(1).unwrap().iter_mut().nth(i),
                };
                let at = at.unwrap();
                *at += by;
                let value = f64::from(*at);
                [value, (builder.build().unwrap().reference(x.qkv()).unwrap() * &exact).sum()]
            });
        }
    }
}

#[test]
fn one_block_has_the_gradients_of_dense_attention() {
    let x = image([6, 7], 1);
    let d_out = array(9, (2, 4, 42, 7));
    let halo = HaloNet::builder([6, 7]).block([6, 7]).halo(0).build().unwrap();
    let got = halo.backward(x.qkv(), d_out.view(), ()).unwrap();
    let dense = Dense::builder().build().unwrap();
    let want = dense.backward(x.qkv(), d_out.view(), SavedForward::default()).unwrap();
    for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5));
    }
    assert!(got.relative.is_none());
}

#[test]
fn what_is_hidden_cannot_matter_and_what_is_visible_shows() {
    let [_, builder, _] = builders([4, 8], [4, 4], 1, 1);
    let (halo, mut x) = (builder.build().unwrap(), image([4, 8], 1));
    let d_out = array(9, (2, 4, 32, 7));
    let clean = halo.backward(x.qkv(), d_out.view(), ()).unwrap();
    // Pixel 7 of the first row is beyond the left block and its halo.
    x.k.slice_mut(s![0, .., 7, ..]).fill(f32::NAN);
    let got = halo.backward(x.qkv(), d_out.view(), ()).unwrap();
    for pixel in 0..32 {
        let of = |x: &Array4<f32>| x.slice(s![0, .., pixel, ..]).to_owned();
        if pixel % 8 < 4 {
            assert_eq!(of(&got.q), of(&clean.q), "pixel {pixel}");
        } else {
            assert!(of(&got.q).iter().all(|x| x.is_nan()), "pixel {pixel}");
        }
    }
    assert_eq!(got.q.slice(s![1, .., .., ..]), clean.q.slice(s![1, .., .., ..]));
    let [rows, columns] = got.relative.unwrap();
    assert!(rows.iter().chain(&columns).any(|x| x.is_nan()));
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let [plain, with, _] = builders([4, 8], [4, 4], 1, 1).map(|builder| builder.build().unwrap());
    let (x, d_out) = (image([4, 8], 1), array(9, (2, 4, 32, 7)));
    let mut to = plain.zero_gradients(x.qkv()).unwrap();
    let workspace = &mut Workspace::new();
    let error = with.backward_into(x.qkv(), d_out.view(), (), &mut to, workspace).unwrap_err();
    assert_eq!(error.to_string(), "gradients.relative: expected [11, 10], got none");
    let short = Array4::zeros((2, 4, 31, 7));
    let error = plain.backward_into(x.qkv(), short.view(), (), &mut to, workspace).unwrap_err();
    assert_eq!(error.to_string(), "d_out: expected shape [2, 4, 32, 7], got [2, 4, 31, 7]");
}
