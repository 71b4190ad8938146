//! Attention between channels by cosines: SparseGSA of DLGSANet, and MDTA of
//! Restormer.

use ndarray::Array1;

use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input};
use crate::stages::channels::{Channels, RowOf};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

input! {
    /// Channels to be mixed, and what their weights come from.
    ChannelQkv {
        /// A channel for each of the output.
        q: T [batch, heads, len, value_dim],
        /// A channel for each that is mixed.
        k: T [batch, heads/, len, mixed],
        /// What is mixed.
        v: T [batch, heads/, len, mixed]
    }
    head_dim mixed, value_dim value_dim;
}

/// Attention between channels by cosines: SparseGSA of DLGSANet, and MDTA of
/// Restormer.
///
/// ```text
/// A[c, c'] = f(temperature_h sum_n q[n, c] k[n, c'] / (|q_c| |k_c'|))      f: softmax over c', or max(0, .)
/// y[n, c]  = sum_c' A[c, c'] v[n, c']
/// ```
///
/// Lengths are over all tokens. A row of `max(0, .)` is not normalised, and may
/// be 0. Softmax is "Restormer: Efficient Transformer for High-Resolution Image
/// Restoration" (arXiv 2111.09881), the other "Lightweight Dynamic Local and
/// Global Self-Attention Networks for Image Super-Resolution" (arXiv
/// 2301.02031).
///
/// Cost: `4 channels` flops for each element, linear in the tokens.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{ChannelAttention, ChannelQkv}};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 6, 8 * 8, 15));
/// let sparse = ChannelAttention::builder().rectified().build()?;
/// let out = sparse.forward(ChannelQkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 6, 64, 15));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChannelAttention {
    channels: Channels,
    temperatures: Option<Array1<f32>>,
}

impl ChannelAttention {
    /// Softmax, with temperatures of 1.
    pub fn builder() -> ChannelAttentionBuilder {
        ChannelAttentionBuilder::with()
    }
}

options! {
    /// Builds a [`ChannelAttention`].
    ChannelAttentionBuilder of ChannelAttention, isa;
    own { temperatures: Option<Array1<f32>> = None, in FINITE; }
    flags {
        /// What is below 0 becomes 0, and nothing is normalised (SparseGSA).
        rectified;
    }
    build(builder, config) {
        let row = if builder.rectified { RowOf::Relu } else { RowOf::Softmax };
        let channels = Channels { isa: config.isa, row, unit: true };
        Ok(ChannelAttention { channels, temperatures: builder.temperatures })
    }
}

impl ChannelAttentionBuilder {
    /// What cosines are multiplied by, `[heads]`. Default: 1.
    pub fn temperatures(self, temperatures: Array1<f32>) -> Self {
        Self { temperatures: Some(temperatures), ..self }
    }
}

impl ChannelAttention {
    fn check<T: Element>(&self, x: &ChannelQkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if dims.packed {
            return Err(Error::packed("attention between channels"));
        }
        match &self.temperatures {
            Some(t) if t.len() != dims.q_heads => {
                Err(Error::shape("temperatures", format!("[heads] = [{}]", dims.q_heads), t.shape()))
            }
            _ => Ok(dims),
        }
    }

    fn temperature(&self, head: usize) -> f32 {
        self.temperatures.as_ref().map_or(1.0, |t| t[head])
    }
}

impl<T: Element> Pipeline<ChannelQkv<'_, T>> for ChannelAttention {
    type State = ();

    fn flow(
        &self,
        x: ChannelQkv<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.check(&x)?;
        self.channels.run(pass, [x.q, x.k, x.v], dims.q_heads, |head| self.temperature(head), out)
    }

    fn define<R: Real>(&self, x: ChannelQkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            self.channels.define([&q, &k, &v], f64::from(self.temperature(head.head)))
        });
        Ok((out, ()))
    }
}

composite!(ChannelAttention, ChannelQkv);

exhibit! {
    ChannelAttentionExhibit of ChannelAttention, "neighborhood", "SparseGSA", "arXiv 2301.02031, 2111.09881";
    "cosines of channels over all tokens, of which those above 0 mix channels";
    not "where tokens must be told apart: every one is mixed by the same weights";
    tokens true;
    build(x, field) {
        let temperature = |h| 1.0 + 0.5 * field.at(1, h, 0, 0);
        ChannelAttention::builder().rectified().temperatures(Array1::from_shape_fn(x.q.dim().1, temperature))
    }
    extras(x, _) {
        // What is a query here has the channels of values.
        Extras { keys: Extras::pixels(x), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> ChannelQkv<'a, T> { ChannelQkv::new(extras.keys.view(), x.q, x.k) }
}
carded!(ChannelAttention, ChannelAttentionExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::held;
    use ndarray::{Array4, arr1};

    fn input<'a>([q, k, v]: &'a [Array4<f32>; 3]) -> ChannelQkv<'a, f32> {
        ChannelQkv::new(q.view(), k.view(), v.view())
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (len, mixed, channels) in [(64, 15, 15), (1, 5, 3), (1500, 7, 20), (0, 3, 3), (9, 4, 0)] {
            let x =
                [array(1, (2, 4, len, channels)), array(2, (2, 2, len, mixed)), array(3, (2, 1, len, mixed))];
            let of = || ChannelAttention::builder().temperatures(arr1(&[0.5, 1.0, 2.0, -1.0]));
            held(&of().build().unwrap(), input(&x));
            held(&of().rectified().build().unwrap(), input(&x));
        }
    }

    /// One channel has a cosine of 1 with itself.
    #[test]
    fn heads_of_one_channel() {
        let (q, v) = (array(1, (1, 2, 20, 1)), array(3, (1, 2, 20, 1)));
        let x = [q.clone(), q, v.clone()];
        let sparse =
            ChannelAttention::builder().rectified().temperatures(arr1(&[0.5, -2.0])).build().unwrap();
        for ((_, h, t, _), got) in sparse.reference(input(&x)).unwrap().indexed_iter() {
            let want = if h == 0 { 0.5 * f64::from(v[[0, h, t, 0]]) } else { 0.0 };
            assert!((got - want).abs() < 1e-12);
        }
        let softmax = ChannelAttention::builder().build().unwrap().reference(input(&x)).unwrap();
        assert!(softmax.iter().zip(&v).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-12));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = [array(1, (1, 2, 5, 3)), array(2, (1, 2, 5, 4)), array(3, (1, 2, 5, 4))];
        let few = ChannelAttention::builder().temperatures(arr1(&[1.0])).build().unwrap();
        let refusal = few.forward(input(&x)).unwrap_err().to_string();
        assert_eq!(refusal, "temperatures: expected shape [heads] = [2], got [1]");
    }
}
