//! SageAttention: softmax attention whose scores are products of 8-bit codes.

use ndarray::{ArrayView4, s};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::Result;
use crate::input::Qkv;
use crate::mask::{And, Causal, Mask, Unmasked};
use crate::score::Plain;
use crate::simd::Isa;
use crate::stages::attend::{Config, Options};
use crate::stages::codes::{self, Codes};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

/// SageAttention: softmax attention whose scores are products of 8-bit codes.
///
/// ```text
/// o_i = sum_j softmax_j(scale q'_i . k'_j) v_j
/// x'  = s round(x / s),  s = max_c |x_c| / 127      x = q_i, or k_j - mean_j k_j
/// ```
///
/// From "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference
/// Acceleration" (arXiv 2410.02367), a scale for each token. The mean of the keys of
/// a sequence and a head changes no softmax, but without it channels with a large
/// one take up all the codes. Weights and values stay what they are.
///
/// The definition is exact attention with the numbers that codes stand for, which the
/// kernel keeps to like any other. How far that is from [`Dense`](crate::dense::Dense):
/// a score is off by at most `|scale| (s_k |q|_1 + s_q |k|_1 + D s_q s_k / 2) / 2`, and an
/// output, where scores are off by at most `e`, by `(exp(2 e) - 1) max |v|`. Measured
/// as `|o - dense| / |dense|`, causal, over the last 64 of 512 tokens of a language model:
/// 0.0055 in layer 2, 0.0164 in layer 14, 0.0276 in layer 27.
///
/// All keys have a part in the mean, masked and later ones too: they change how the
/// rest is rounded. What is not finite counts as 0 in it.
///
/// Cost: as dense attention, where a CPU has AVX-512 VNNI with the products of queries
/// and keys at some three times the rate, which makes 1.4 to 1.6 times that of the whole
/// at 4,096 keys and more; elsewhere codes are multiplied as `f32`.
///
/// Softmax attention with scores of 8-bit codes.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Sage};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 300, 64), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let out = Sage::builder().causal().build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 300, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// Scores stay as they are, since other functions of them than sums change with what is
/// taken off the keys; so do the normalisers of a softmax, which are not given.
#[derive(Clone, Debug)]
pub struct Sage<M = Unmasked> {
    config: Config<M, Plain>,
}

/// Builds a [`Sage`].
#[derive(Clone, Debug, Default)]
pub struct SageBuilder<M = Unmasked> {
    options: Options<M>,
}

impl Sage {
    /// Everything visible.
    pub fn builder() -> SageBuilder {
        SageBuilder::default()
    }
}

impl SageBuilder {
    /// Which keys a query may see.
    pub fn mask<M: Mask>(self, mask: M) -> SageBuilder<M> {
        SageBuilder { options: self.options.mask(mask) }
    }

    /// `mask(Causal::new())`
    pub fn causal(self) -> SageBuilder<Causal> {
        self.mask(Causal::new())
    }
}

impl SageBuilder<Causal> {
    /// What both masks let a query see: `causal().mask(other)`.
    pub fn mask<M: Mask>(self, mask: M) -> SageBuilder<And<Causal, M>> {
        SageBuilder { options: self.options.map_mask(|causal| causal.and(mask)) }
    }
}

impl<M: Mask> SageBuilder<M> {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
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
    /// [`Error::Value`](crate::Error::Value) for a scale that is not finite,
    /// [`Error::Isa`](crate::Error::Isa) for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Sage<M>> {
        Ok(Sage { config: self.options.build()? })
    }
}

impl<T: Element, M: Mask> Pipeline<Qkv<'_, T>> for Sage<M> {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.config.checked(x.dims()?)?;
        let codes = Codes { isa: self.config.isa(), dims: &dims, lengths: x.lengths };
        let coded = codes.run(pass, [x.q.reborrow(), x.k.reborrow()])?;
        codes::attend(pass, &self.config, x, &coded, out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.config.checked(x.dims()?)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let of = |x: &ArrayView4<'_, T>, rows| {
                x.slice(s![head.batch, head.of(x.dim().1), rows, ..]).map(|x| x.to_f32())
            };
            let (q, k) = (of(&x.q, head.queries.clone()), of(&x.k, head.keys.clone()));
            let (q, k) = (codes::define(&q), codes::define(&codes::define_centred(k)));
            let v = head.rows::<R, T>(&x.v, &head.keys);
            let site = x.lengths.sequence(&dims, head.sequence).site(head.head);
            let sees = |i, j| self.config.mask().visible(&site, i, j);
            attend([&q, &k, &v], self.config.scale(&dims), sees, |_, _, score| score)
        });
        Ok((out, ()))
    }
}

composite!(Sage<M> where [M: Mask], Qkv);

exhibit! {
    SageExhibit of Sage<Causal>, "dense", "SageAttention", "arXiv 2410.02367, 2411.10958";
    "causal, scores of 8-bit codes, keys less their mean";
    not "where CPUs multiply tiles (AMX): dense is faster there";
    tokens false;
    build(_, _) { Sage::builder().causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Sage<M> where [M: Mask], SageExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::mask::mask_fn;
    use crate::testing::qkv::{Qkvs, close, error, held, refused};
    use crate::{Attention, Bounded};
    use ndarray::Array4;

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len, dim) in [(1, 1, 5), (70, 300, 20), (2, 1100, 33), (3, 0, 4), (2, 70, 0)] {
            let x = Qkvs::new([2, 4, 2, q_len, kv_len, dim, 17], 1);
            for isa in Isa::available() {
                worst = worst.max(held(&Sage::builder().isa(isa).build().unwrap(), x.qkv()));
                let odd = mask_fn(|_, i, j| (i + j) % 3 == 1);
                worst =
                    worst.max(held(&Sage::builder().mask(odd).scale(0.3).isa(isa).build().unwrap(), x.qkv()));
            }
        }
        println!("SageAttention: {worst:.3} of the bound");
        let causal = Sage::builder().causal().build().unwrap();
        let (x, offsets) = (Qkvs::new([1, 4, 2, 90, 90, 12, 17], 2), [0, 30, 30, 90]);
        held(&causal, x.qkv().packed(&offsets, &offsets));
        held(&causal, Qkvs::new([2, 2, 1, 30, 90, 12, 17], 3).qkv().key_lengths(&[90, 31]));
    }

    /// A vector that is added to all keys takes no part, where no bits are lost.
    #[test]
    fn what_all_keys_have_in_common_changes_nothing() {
        let mut x = Qkvs::new([1, 2, 1, 40, 128, 32, 8], 4);
        let grid = |x: &mut Array4<f32>| x.mapv_inplace(|x| (x * 64.0).round() / 64.0);
        grid(&mut x.k);
        let mut moved = x.clone();
        for ((_, _, _, c), x) in moved.k.indexed_iter_mut() {
            *x += 16.0 * (c as f32 - 3.0);
        }
        let sage = Sage::builder().build().unwrap();
        assert_eq!(sage.forward(moved.qkv()).unwrap(), sage.forward(x.qkv()).unwrap());
        // Without taking them off, codes of a step of 4 would be left.
        let dense = Dense::builder().build().unwrap();
        close(&sage.reference(moved.qkv()).unwrap(), &dense.reference(x.qkv()).unwrap(), 0.1);
    }

    /// Whole numbers up to 127 that have 0 as their mean are their own codes.
    #[test]
    fn whole_numbers_are_dense_attention() {
        let mut x = Qkvs::new([1, 2, 1, 40, 128, 32, 8], 5);
        let whole = |x: &mut Array4<f32>| {
            for mut row in x.rows_mut() {
                row.mapv_inplace(|x| (x * 20.0).round().clamp(-126.0, 126.0));
                row[3] = 127.0;
            }
        };
        whole(&mut x.q);
        whole(&mut x.k);
        for i in 0..64 {
            let other = -&x.k.slice(s![.., .., 2 * i, ..]);
            x.k.slice_mut(s![.., .., 2 * i + 1, ..]).assign(&other);
        }
        let (sage, dense) = (Sage::builder().scale(1e-3), Dense::builder().scale(1e-3).build().unwrap());
        let sage = sage.build().unwrap();
        close(&sage.reference(x.qkv()).unwrap(), &dense.reference(x.qkv()).unwrap(), 1e-12);
    }

    /// How far codes are from the numbers that they stand for, by the docs above.
    #[test]
    fn scores_are_off_by_what_codes_say() {
        let x = Qkvs::new([1, 1, 1, 20, 200, 64, 16], 6);
        let (sage, dense) = (Sage::builder().build().unwrap(), Dense::builder().build().unwrap());
        let (got, want) = (sage.reference(x.qkv()).unwrap(), dense.reference(x.qkv()).unwrap());
        let centred = codes::define_centred(x.k.slice(s![0, 0, .., ..]).to_owned());
        let figures = |row: ndarray::ArrayView1<'_, f32>| {
            let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
            [most / 127.0, row.iter().map(|x| x.abs()).sum::<f32>()].map(f64::from)
        };
        let largest = x.v.iter().fold(0f64, |most, &x| most.max(f64::from(x.abs())));
        for (i, q) in x.q.slice(s![0, 0, .., ..]).outer_iter().enumerate() {
            let [s_q, q] = figures(q);
            let off = centred.outer_iter().map(|k| {
                let [s_k, k] = figures(k);
                (s_k * q + s_q * k + 32.0 * s_q * s_k) / 16.0
            });
            let bound = ((2.0 * off.fold(0.0, f64::max)).exp() - 1.0) * largest;
            let apart = (0..16).map(|c| (got[[0, 0, i, c]] - want[[0, 0, i, c]]).abs()).fold(0.0, f64::max);
            assert!(apart <= bound && apart > 1e-4 * bound, "{apart:e}, bound {bound:e}");
        }
    }

    #[test]
    fn numbers_that_have_no_codes_show() {
        let mut x = Qkvs::new([1, 1, 1, 9, 70, 12, 5], 7);
        let causal = Sage::builder().causal().build().unwrap();
        x.k[[0, 0, 69, 3]] = f32::INFINITY;
        x.k[[0, 0, 2, 3]] = 1e38;
        let out = causal.forward(x.qkv()).unwrap();
        assert!(out.slice(s![.., .., 8, ..]).iter().all(|x| x.is_nan()));
        let bound = causal.error_bound(x.qkv()).unwrap();
        let want = causal.reference(x.qkv()).unwrap();
        for ((at, got), want) in out.indexed_iter().zip(&want).filter(|x| x.0.0.2 < 8) {
            assert!((f64::from(*got) - want).abs() <= bound[[0, 0, at.2]], "{at:?}");
        }
        assert_eq!(
            error(Sage::builder().scale(f32::NAN).build()),
            "scale: expected a finite number, got NaN"
        );
        let odd = Qkv::new(x.q.view(), x.k.view(), x.v.slice(s![.., .., ..69, ..]));
        assert!(refused(&causal, odd).starts_with("k: expected shape"));
    }
}
