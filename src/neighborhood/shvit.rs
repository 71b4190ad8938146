//! SHViT: attention on some of the channels, the others pass.

use ndarray::{Axis, s};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::rest;

/// SHViT: attention on some of the channels, the others pass.
///
/// ```text
/// o_i = [sum_j softmax_j(scale q_i . k_j) v_j[..p], v_i[p..]]        and ReLU, if asked for
/// ```
///
/// "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design"
/// (arXiv 2401.16456): one head with queries and keys of 16 channels and `p` of
/// about a fifth of the values' channels; the ReLU comes before the projection
/// that mixes them. The released model projects and normalises the first `p`
/// channels before: so does the caller.
///
/// Cost: `2 (head_dim + p)` flops a pair.
///
/// Attention on the first channels of the values.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::ShVit};
/// use ndarray::Array4;
///
/// let (q, v) = (Array4::<f32>::ones((8, 1, 14 * 14, 16)), Array4::<f32>::ones((8, 1, 14 * 14, 128)));
/// let out = ShVit::builder(32).relu().build()?.forward(Qkv::new(q.view(), q.view(), v.view()))?;
/// assert_eq!(out.dim(), (8, 1, 196, 128));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ShVit {
    config: Config<Unmasked, Plain>,
    channels: usize,
    relu: bool,
}

impl ShVit {
    /// Attention on the first `channels` of the values.
    pub fn builder(channels: usize) -> ShVitBuilder {
        ShVitBuilder::with(channels)
    }
}

options! {
    /// Builds a [`ShVit`].
    ShVitBuilder of ShVit, isa;
    given { channels: usize; }
    own { scale: Option<f32> = None, in FINITE; }
    flags {
        /// Negative outputs become 0.
        relu;
    }
    build(builder, config) {
        let options = Options { scale: builder.scale, isa: Some(config.isa), ..Options::default() };
        Ok(ShVit { config: options.build()?, channels: builder.channels, relu: builder.relu })
    }
}

impl ShVitBuilder {
    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl ShVit {
    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if dims.packed || x.lengths != Lengths::Full {
            let reason = "every query has a value that passes";
            return Err(Error::Conflict { option: "lengths", with: "channels that pass", reason });
        }
        if dims.q_len != dims.kv_len {
            return Err(Error::value("k", format!("as many as the {} queries", dims.q_len), dims.kv_len));
        }
        if self.channels > dims.value_dim {
            let expected = format!("at most value_dim, {}", dims.value_dim);
            return Err(Error::value("channels", expected, self.channels));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for ShVit {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.check(&x)?;
        let mut sums = pass.rows((dims.batch, dims.q_heads, dims.q_len, dims.value_dim))?;
        let v = x.v.slice(s![.., .., .., ..self.channels]);
        let attended = Qkv::<T>::new(x.q.reborrow(), x.k.reborrow(), v).widened();
        let first = sums.view_mut().map(|sums| sums.split_at(Axis(3), self.channels).0);
        self.config.attend(pass, attended, first)?;
        rest::run(pass, self.config.isa(), x.v.reborrow(), (self.channels, self.relu), sums, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let (q, k) = (head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys));
            let v = head.rows::<R, T>(&x.v, &head.keys);
            let first = v.slice(s![.., ..self.channels]).to_owned();
            let sums = attend([&q, &k, &first], self.config.scale(&dims), |_, _| true, |_, _, score| score);
            let all = ndarray::concatenate![Axis(1), sums, v.slice(s![.., self.channels..])];
            all.mapv(|x| if self.relu { x.max(R::of(0.0)) } else { x })
        });
        Ok((out, ()))
    }
}

composite!(ShVit, Qkv);

exhibit! {
    ShVitExhibit of ShVit, "neighborhood", "SHViT", "arXiv 2401.16456";
    "attention on a quarter of the channels, the others pass";
    not "where every channel has to reach every token in one layer";
    tokens true;
    build(x, _) { ShVit::builder(x.v.dim().3.div_ceil(4)) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(ShVit, ShVitExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, held};

    #[test]
    fn kernels_follow_the_definition() {
        for (n, channels) in [(49, 32), (70, 0), (130, 45), (3, 7), (0, 2)] {
            let x = Qkvs::new([2, 2, 1, n, n, 16, 45], 1);
            let shvit = ShVit::builder(channels);
            for shvit in [shvit.clone(), shvit.relu().scale(0.1)] {
                held(&shvit.build().unwrap(), x.qkv());
            }
        }
    }

    #[test]
    fn all_channels_are_dense_and_none_is_the_values() {
        let x = Qkvs::new([2, 2, 2, 30, 30, 16, 20], 1);
        let with = |channels| ShVit::builder(channels).build().unwrap().forward(x.qkv()).unwrap();
        close(
            &with(20).mapv(f64::from),
            &Dense::builder().build().unwrap().reference(x.qkv()).unwrap(),
            1e-5,
        );
        assert_eq!(with(0), x.v);
        assert!(
            ShVit::builder(9).relu().build().unwrap().forward(x.qkv()).unwrap().iter().all(|&x| x >= 0.0)
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |channels, x: &Qkvs| {
            ShVit::builder(channels).build().unwrap().forward(x.qkv()).unwrap_err().to_string()
        };
        let x = Qkvs::new([1, 1, 1, 4, 5, 16, 20], 1);
        assert_eq!(refusal(3, &x), "k: expected as many as the 4 queries, got 5");
        let x = Qkvs::new([1, 1, 1, 4, 4, 16, 20], 1);
        assert_eq!(refusal(21, &x), "channels: expected at most value_dim, 20, got 21");
    }
}
