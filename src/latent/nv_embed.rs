//! NV-Embed: tokens read learned latents, and are pooled to one embedding.

use ndarray::{Array2, Array3, Array4, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::number::{Likely, Real};
use crate::element::Element;
use crate::error::Result;
use crate::input::reading::Embeddings;
use crate::input::{Dims, Input, Lengths};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite, once};
use crate::stages::reading::{CrossAttention, FeedForward, Reader, reader_options, showing};
use crate::stages::side;

/// NV-Embed: tokens read learned latents, and are pooled to one embedding.
///
/// ```text
/// y = x + W_O softmax(scale * W_Q norm(x) (W_K norm'(l))^T) W_V norm'(l)
/// z = y + W_2 (a * gelu(b)) + b_2,  [a; b] = W_1 norm''(y) + b_1
/// e = mean z / |mean z|     over the tokens that are no padding
/// ```
///
/// "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models"
/// (arXiv 2405.17428), as its modelling file has it: eight heads over 512 latents.
/// Latents have no padding, so that nothing is masked; tokens that are padding count
/// for nothing.
///
/// Cost: keys and values of the latents are made once, when the mechanism is built;
/// then `2 r heads (head_dim + value_dim)` flops a token for `r` latents, and its
/// projections.
///
/// The published error bound is not the worst case of all roundings together, which
/// layers behind layers multiply by the square root of their widths each, but 16
/// times the root of the sum of their squares: independent errors keep to it.
///
/// Tokens that read latents; ask [`Embeddings`] for the [pooled](Embeddings::pooled) one.
///
/// ```
/// use attention_kernels::{Attention, latent::{CrossAttention, Embeddings, NvEmbed}};
/// use ndarray::{Array2, Array4};
///
/// let w = |out, of| (Array2::from_elem((out, of), 0.1f32), None);
/// let cross = CrossAttention {
///     heads: 8, norm: None, norm_read: None,
///     query: w(32, 64), key: w(32, 64), value: w(32, 64), out: w(64, 32),
/// };
/// let pooling = NvEmbed::builder(cross, Array2::ones((512, 64))).build()?;
/// let tokens = Array4::<f32>::ones((2, 1, 100, 64));
/// let out = pooling.forward(Embeddings::new(tokens.view()).pooled(&[100, 17]))?;
/// assert_eq!(out.dim(), (2, 1, 1, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct NvEmbed {
    reader: Reader,
    /// `[latents, width]`
    latents: Array2<f32>,
    /// What is made of them, `[1, heads, latents, dim]`.
    read: [Array4<f32>; 2],
}

impl NvEmbed {
    /// Attention with these projections, and learned latents, `[latents, width]`.
    pub fn builder(cross: CrossAttention, latents: Array2<f32>) -> NvEmbedBuilder {
        NvEmbedBuilder::with(cross, latents)
    }
}

options! {
    /// Builds an [`NvEmbed`].
    NvEmbedBuilder of NvEmbed, isa;
    given { cross: CrossAttention; latents: Array2<f32>, in FINITE; }
    own {
        forward: Option<FeedForward> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let NvEmbedBuilder { cross, latents, forward, scale, .. } = builder;
        let reader = Reader::new(&cross, forward.as_ref(), scale, config.isa)?;
        reader.check_width("latents", &latents)?;
        let (heads, dims) = reader.head_dims();
        let read = once(|pass| {
            let rows = side::run(pass, config.isa, latents.view().insert_axis(Axis(0)).insert_axis(Axis(0)))?;
            let read = reader.keys_and_values(pass, rows.view())?;
            Ok([0, 1].map(|i| read[i].of_heads(heads, dims[i]).to_owned()))
        })?;
        Ok(NvEmbed { reader, latents, read })
    }
}

reader_options!(NvEmbedBuilder);

impl NvEmbed {
    fn check<T: Element>(&self, x: &Embeddings<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        self.reader.check_rows("tokens", &x.tokens, self.latents.dim().0)?;
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Embeddings<'_, T>> for NvEmbed {
    type State = ();

    fn flow(
        &self,
        x: Embeddings<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let Dims { batch, q_heads, head_dim, .. } = self.check(&x)?;
        if [batch, q_heads, head_dim].contains(&0) {
            return Ok(());
        }
        let count = |b: usize| x.lengths.map_or(usize::MAX, |lengths| lengths[b]);
        let pooled: Option<&(dyn Fn(usize) -> usize + Sync)> = if x.pooled { Some(&count) } else { None };
        let read = self.read.each_ref().map(|x| x.view());
        self.reader.run(pass, x.tokens.reborrow(), read, Lengths::Full, pooled, out)
    }

    fn define<R: Real>(&self, x: Embeddings<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.check(&x)?;
        let latents = self.latents.mapv(|x| R::of(f64::from(x)));
        let mut out = Array4::from_elem(x.out_dim()?, R::of(0.0));
        for (b, mut out) in out.outer_iter_mut().enumerate() {
            let mut tokens = side::define(x.tokens.index_axis(Axis(0), b));
            if let Some(lengths) = x.lengths.filter(|_| x.pooled) {
                tokens = tokens.slice_move(ndarray::s![..lengths[b], ..]);
            }
            let y = self.reader.define(&tokens, &latents);
            side::spread(&if x.pooled { Reader::define_pooled(&y) } else { y }, &mut out);
        }
        Ok((out, ()))
    }

    fn bound(&self, x: Embeddings<'_, T>) -> Result<Array3<f64>> {
        self.bound_by::<Likely>(x)
    }

    fn parameters(&self) -> usize {
        self.reader.bytes() + self.read.iter().map(|x| x.len() * size_of::<f32>()).sum::<usize>()
    }
}

composite!(NvEmbed, Embeddings);

exhibit! {
    NvEmbedExhibit of NvEmbed, "latent", "NV-Embed", "arXiv 2405.17428";
    "tokens read 20 learned latents, 3 heads of 8, and a gated layer follows; not yet pooled";
    not "where the last token was trained to be the embedding";
    tokens true;
    build(x, field) {
        let dim = x.q.dim().1 * x.v.dim().3;
        let (cross, forward) = showing(&|which, a, b| field.at(which, a, b, 0), dim, 12, true);
        let latents = Array2::from_shape_fn((20, 12), |(t, c)| field.at(9, 0, t, c));
        NvEmbed::builder(cross, latents).feed_forward(forward)
    }
    extras(x, _) { Extras { keys: Extras::pixels(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Embeddings<'a, T> { Embeddings::new(extras.keys.view()) }
}
carded!(NvEmbed, NvEmbedExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::Attention;
    use crate::stages::reading::tests::{cross, forward};
    use crate::testing::arrays::array;
    use crate::testing::qkv::{close, held, refused};

    fn pooling(latents: Array2<f32>) -> NvEmbed {
        NvEmbed::builder(cross(18, 14, [2, 8, 6]), latents)
            .feed_forward(forward(18, 36, true))
            .build()
            .unwrap()
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (batch, heads, len, part) in [(2, 2, 40, 9), (1, 1, 1, 18), (0, 1, 3, 18), (1, 3, 0, 6)] {
            let tokens = array(1, (batch, heads, len, part));
            let lengths: Vec<usize> = (0..batch).map(|b| len / (b + 1)).collect();
            let x = Embeddings::new(tokens.view());
            for x in [x, x.pooled(&lengths)] {
                held(&pooling(array(2, (30, 14))), x);
            }
        }
    }

    /// Latents may change places; padding is not there, whatever it holds; of one
    /// latent every token reads the same.
    #[test]
    fn latents_permute_and_padding_is_not_there() {
        let (mut tokens, latents) = (array(1, (2, 1, 40, 18)), array(2, (30, 14)));
        tokens.slice_mut(s![1, .., 13.., ..]).fill(f32::NAN);
        let x = Embeddings::new(tokens.view()).pooled(&[40, 13]);
        let want = pooling(latents.clone()).reference(x).unwrap();
        assert!(want.iter().all(|x| x.is_finite()));
        held(&pooling(latents.clone()), x);
        let order: Vec<usize> = (0..30).rev().collect();
        close(&pooling(latents.select(Axis(0), &order)).reference(x).unwrap(), &want, 1e-12);
        let none = pooling(latents.clone()).forward(Embeddings::new(tokens.view()).pooled(&[0, 0])).unwrap();
        assert!(none.iter().all(|x| *x == 0.0));
        let one = NvEmbed::builder(cross(18, 14, [2, 8, 6]), latents.slice(s![..1, ..]).to_owned())
            .build()
            .unwrap();
        let x = Embeddings::new(tokens.slice(s![..1, .., .., ..]));
        let read = one.reference(x).unwrap() - tokens.slice(s![..1, .., .., ..]).mapv(f64::from);
        let first = read.slice(s![.., .., ..1, ..]).broadcast(read.dim()).unwrap().to_owned();
        close(&read, &first, 1e-12);
    }

    /// Nothing read and no layer behind: the mean of the tokens, of unit length.
    #[test]
    fn without_weights_it_is_mean_pooling() {
        let mut cross = cross(18, 14, [2, 8, 6]);
        cross.out = (Array2::zeros((18, 12)), None);
        let tokens = array(1, (1, 2, 25, 9));
        let pooling = NvEmbed::builder(cross, array(2, (30, 14))).build().unwrap();
        let got = pooling.reference(Embeddings::new(tokens.view()).pooled(&[25])).unwrap();
        let mean = tokens.mapv(f64::from).mean_axis(Axis(2)).unwrap().insert_axis(Axis(2));
        let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
        close(&got, &(mean / length), 1e-12);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let wide = NvEmbed::builder(cross(18, 14, [2, 8, 6]), array(2, (30, 13))).build();
        assert_eq!(
            wide.unwrap_err().to_string(),
            "latents: expected shape [_, width] = [_, 14], got [30, 13]"
        );
        let tokens = array(1, (1, 2, 25, 8));
        let refusal = refused(&pooling(array(2, (30, 14))), Embeddings::new(tokens.view()));
        assert_eq!(
            refusal,
            "tokens: expected shape heads and dim of 18 elements together, got [1, 2, 25, 8]"
        );
        let mut layer = forward(18, 36, true);
        layer.down.0 = array(1, (18, 35));
        let cross = cross(18, 14, [2, 8, 6]);
        let refusal = NvEmbed::builder(cross, array(2, (30, 14))).feed_forward(layer).build().unwrap_err();
        assert!(refusal.to_string().starts_with("down: expected shape"), "{refusal}");
    }
}
