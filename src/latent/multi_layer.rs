//! Multi-layers trainable pooling: latents read one token's states in all layers.

use ndarray::Array2;

use crate::card::{Extras, carded, exhibit};
use crate::input::reading::Reading;
use crate::stages::options::{FINITE, options};
use crate::stages::reading::{CrossAttention, FeedForward, Reader, reader_options, reads, showing};

/// Multi-layers trainable pooling: latents read one token's states in all layers.
///
/// ```text
/// h_l = the last token's state in layer l, plus a learned embedding of l
/// x = z + W_O softmax(scale * W_Q norm(z) (W_K norm'(h))^T) W_V norm'(h)
/// x <- x + W_2 (a * gelu(b)) + b_2,  [a; b] = W_1 norm''(x) + b_1
/// e = mean x / |mean x|     over the latents
/// ```
///
/// "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?"
/// (arXiv 2409.02727), and its code, which takes the state at position -1: the last
/// token's where padding is on the left. The caller passes the states of whichever is
/// last. With one layer it is the single-layer variant.
///
/// Cost: `2 r L heads (head_dim + value_dim)` flops a sequence for `r` latents and `L`
/// layers, and the projections; latents that are the same for all of the batch are
/// projected once.
///
/// The published error bound is not the worst case of all roundings together, which
/// layers behind layers multiply by the square root of their widths each, but 16
/// times the root of the sum of their squares: independent errors keep to it.
///
/// Latents that read the states of layers, which are the tokens of a [`Reading`]; ask
/// that for the [pooled](Reading::pooled) embedding.
///
/// ```
/// use attention_kernels::{Attention, latent::{CrossAttention, MultiLayerPooling, Reading}};
/// use ndarray::{Array2, Array3, Array4};
///
/// let w = |out, of| (Array2::from_elem((out, of), 0.1f32), None);
/// let cross = CrossAttention {
///     heads: 8, norm: None, norm_read: None,
///     query: w(32, 64), key: w(32, 64), value: w(32, 64), out: w(64, 32),
/// };
/// let pooling = MultiLayerPooling::builder(cross, Array2::zeros((24, 64))).build()?;
/// let (latents, states) = (Array4::<f32>::ones((1, 1, 16, 64)), Array3::ones((2, 24, 64)));
/// let x = Reading::new(latents.broadcast((2, 1, 16, 64)).unwrap(), states.view());
/// assert_eq!(pooling.forward(x.pooled())?.dim(), (2, 1, 1, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MultiLayerPooling {
    reader: Reader,
    /// `[layers, width]`
    layers: Array2<f32>,
}

impl MultiLayerPooling {
    /// Attention with these projections, and embeddings of layers, `[layers, width]`.
    pub fn builder(cross: CrossAttention, layers: Array2<f32>) -> MultiLayerPoolingBuilder {
        MultiLayerPoolingBuilder::with(cross, layers)
    }
}

options! {
    /// Builds a [`MultiLayerPooling`].
    MultiLayerPoolingBuilder of MultiLayerPooling, isa;
    given { cross: CrossAttention; layers: Array2<f32>, in FINITE; }
    own {
        forward: Option<FeedForward> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let MultiLayerPoolingBuilder { cross, layers, forward, scale, .. } = builder;
        let reader = Reader::new(&cross, forward.as_ref(), scale, config.isa)?;
        reader.check_width("layers", &layers)?;
        Ok(MultiLayerPooling { reader, layers: layers.as_standard_layout().into_owned() })
    }
}

reader_options!(MultiLayerPoolingBuilder);

reads!(MultiLayerPooling, |this| this.reader, Some(&this.layers));

exhibit! {
    MultiLayerExhibit of MultiLayerPooling, "latent", "multi-layers trainable pooling", "arXiv 2409.02727";
    "latents read the keys of all heads as states of layers, and a gated layer follows; not yet pooled";
    not "where the last layer alone was trained to be the embedding";
    tokens false;
    build(x, field) {
        let (dim, width) = (x.q.dim().1 * x.v.dim().3, x.k.dim().1 * x.k.dim().3);
        let (cross, forward) = showing(&|which, a, b| field.at(which, a, b, 0), dim, width, true);
        let layers = Array2::from_shape_fn((x.k.dim().2, width), |(l, c)| field.at(9, 0, l, c));
        MultiLayerPooling::builder(cross, layers).feed_forward(forward)
    }
    extras(x, field) { Extras { values: Extras::latents(x, field), latents: Extras::tokens(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Reading<'a, T> { Reading::new(extras.values.view(), extras.latents.view()) }
}
carded!(MultiLayerPooling, MultiLayerExhibit);

#[cfg(test)]
mod tests {
    use ndarray::Axis;

    use super::*;
    use crate::attention::Attention;
    use crate::stages::reading::tests::{cross, forward};
    use crate::testing::arrays::array;
    use crate::testing::qkv::{close, held, refused};

    fn pooling(cross: CrossAttention, layers: Array2<f32>) -> MultiLayerPooling {
        MultiLayerPooling::builder(cross, layers).feed_forward(forward(18, 36, true)).build().unwrap()
    }

    /// Embeddings have unit length, whatever the layers, which may change places
    /// together with their embeddings.
    #[test]
    fn layers_permute_with_their_embeddings() {
        let (latents, states, layers) = (array(1, (3, 2, 10, 9)), array(2, (3, 12, 14)), array(3, (12, 14)));
        let one = pooling(cross(18, 14, [2, 8, 8]), layers.clone());
        let x = Reading::new(latents.view(), states.view());
        held(&one, x);
        held(&one, x.pooled());
        let want = one.reference(x.pooled()).unwrap();
        assert!(want.outer_iter().all(|e| (e.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-12));
        let order: Vec<usize> = (0..12).rev().collect();
        let (turned, states) = (layers.select(Axis(0), &order), states.select(Axis(1), &order));
        let other = pooling(cross(18, 14, [2, 8, 8]), turned);
        close(&other.reference(Reading::new(latents.view(), states.view()).pooled()).unwrap(), &want, 1e-12);
    }

    /// Of one layer every latent reads the same: queries do not matter.
    #[test]
    fn one_layer_is_read_alike() {
        let (latents, states, layers) = (array(1, (2, 1, 10, 18)), array(2, (2, 1, 14)), array(3, (1, 14)));
        let x = Reading::new(latents.view(), states.view()).pooled();
        let want = pooling(cross(18, 14, [2, 8, 8]), layers.clone()).reference(x).unwrap();
        let mut other = cross(18, 14, [2, 8, 8]);
        other.query.0.fill(0.7);
        close(&pooling(other, layers).reference(x).unwrap(), &want, 1e-12);
    }

    #[test]
    fn other_layers_are_refused() {
        let (latents, states) = (array(1, (2, 1, 4, 18)), array(2, (2, 5, 14)));
        let six = pooling(cross(18, 14, [2, 8, 8]), array(3, (6, 14)));
        let refusal = refused(&six, Reading::new(latents.view(), states.view()));
        assert_eq!(refusal, "tokens: expected shape [batch, tokens, width] = [_, 6, 14], got [2, 5, 14]");
        let wide = MultiLayerPooling::builder(cross(18, 14, [2, 8, 8]), array(3, (6, 13))).build();
        assert_eq!(wide.unwrap_err().to_string(), "layers: expected shape [_, width] = [_, 14], got [6, 13]");
    }
}
