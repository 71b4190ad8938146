//! Channel-group attention (DaViT): channels attend to channels of their group.

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input};
use crate::simd::Isa;
use crate::stages::channels::{Channels, RowOf};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

input! {
    /// Channels to be mixed, and what their weights come from.
    DavitInput {
        /// What is mixed.
        q: T [batch, heads, len, mixed],
        /// A channel for each of the output.
        k: T [batch, heads/, len, value_dim],
        /// A channel for each that is mixed.
        v: T [batch, heads/, len, mixed]
    }
    head_dim mixed, value_dim value_dim;
}

/// Channel-group attention (DaViT): channels attend to channels of their group.
///
/// ```text
/// A[c, c'] = softmax_c'(scale sum_n k[n, c] v[n, c'])
/// y[n, c]  = sum_c' A[c, c'] q[n, c']
/// ```
///
/// Heads are groups of channels, and every token takes part in every weight.
/// "DaViT: Dual Attention Vision Transformers" (arXiv 2204.03645), whose paper
/// calls queries, keys and values what the released code calls keys, values and
/// queries: this is the code. Its other attention is [`Swin`](super::Swin)
/// without shift and bias. Florence-2 scales by `1 / sqrt(len)` instead.
///
/// Cost: `4 channels` flops for each element, linear in the tokens.
///
/// Attention between the channels of a group.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{Davit, DavitInput}};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 3, 14 * 14, 32)); // 3 groups of 32 channels
/// let out = Davit::builder().build()?.forward(DavitInput::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 3, 196, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Davit {
    isa: Isa,
    scale: Option<f32>,
}

impl Davit {
    /// With the default scale.
    pub fn builder() -> DavitBuilder {
        DavitBuilder::with()
    }
}

options! {
    /// Builds a [`Davit`].
    DavitBuilder of Davit, isa;
    own { scale: Option<f32> = None, in FINITE; }
    build(builder, config) { Ok(Davit { isa: config.isa, scale: builder.scale }) }
}

impl DavitBuilder {
    /// The factor of the sums over tokens. Default: `1 / sqrt(channels)` of a
    /// group.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Davit {
    /// Sizes, the stage and its factor.
    fn check<T: Element>(&self, x: &DavitInput<'_, T>) -> Result<(Dims, Channels, f64)> {
        let dims = x.dims()?;
        if dims.packed {
            return Err(Error::packed("attention between channels"));
        }
        let root = 1.0 / (dims.head_dim.max(1) as f64).sqrt();
        let channels = Channels { isa: self.isa, row: RowOf::Softmax, unit: false };
        Ok((dims, channels, self.scale.map_or(root, f64::from)))
    }
}

impl<T: Element> Pipeline<DavitInput<'_, T>> for Davit {
    type State = ();

    fn flow(
        &self,
        x: DavitInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, channels, scale) = self.check(&x)?;
        channels.run(pass, [x.k, x.v, x.q], dims.q_heads, |_| scale as f32, out)
    }

    fn define<R: Real>(&self, x: DavitInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, channels, scale) = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            channels.define([&k, &v, &q], scale)
        });
        Ok((out, ()))
    }
}

composite!(Davit, DavitInput);

exhibit! {
    DavitExhibit of Davit, "neighborhood", "DaViT channels", "arXiv 2204.03645";
    "channels of a group attend to each other over all tokens";
    not "where tokens must be told apart: every one is mixed by the same weights";
    tokens true;
    build(_, _) { Davit::builder() }
    input<'a, T>(x, _) -> DavitInput<'a, T> { DavitInput::new(x.q, x.v, x.k) }
}
carded!(Davit, DavitExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{close, held};
    use ndarray::{Array4, Axis};

    fn input<'a>(q: &'a Array4<f32>, k: &'a Array4<f32>, v: &'a Array4<f32>) -> DavitInput<'a, f32> {
        DavitInput::new(q.view(), k.view(), v.view())
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (len, mixed, channels) in [(49, 32, 32), (1, 5, 3), (1500, 7, 20), (0, 3, 3), (64, 0, 4)] {
            let (q, k, v) =
                (array(1, (2, 4, len, mixed)), array(2, (2, 2, len, channels)), array(3, (2, 1, len, mixed)));
            held(&Davit::builder().build().unwrap(), input(&q, &k, &v));
            held(&Davit::builder().scale(0.01).build().unwrap(), input(&q, &k, &v));
        }
    }

    /// One channel a group has a weight of 1, and tokens have no places.
    #[test]
    fn identities() {
        let (q, k, v) = (array(1, (1, 3, 20, 1)), array(2, (1, 3, 20, 1)), array(3, (1, 3, 20, 1)));
        let davit = Davit::builder().build().unwrap();
        assert_eq!(davit.reference(input(&q, &k, &v)).unwrap(), q.mapv(f64::from));
        let [q, k, v] = [1, 2, 3].map(|seed| array(seed, (1, 2, 20, 6)));
        let order: Vec<usize> = (0..20).map(|i| i * 7 % 20).collect();
        let [a, b, c] = [&q, &k, &v].map(|x| x.select(Axis(2), &order));
        let want = davit.reference(input(&q, &k, &v)).unwrap().select(Axis(2), &order);
        close(&davit.reference(input(&a, &b, &c)).unwrap(), &want, 1e-12);
        // By hand: weights sum to 1 over what is mixed.
        let ones = Array4::ones((1, 2, 20, 6));
        close(&davit.reference(input(&ones, &k, &v)).unwrap(), &ones.mapv(f64::from), 1e-12);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let [q, k] = [array(1, (1, 2, 20, 6)), array(2, (1, 2, 20, 5))];
        let refusal = Davit::builder().build().unwrap().forward(input(&q, &k, &k)).unwrap_err().to_string();
        assert!(refusal.starts_with("v: expected shape"), "{refusal}");
    }
}
