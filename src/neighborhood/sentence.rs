//! Sentence attention: the channels of an image are weighed by a sentence.

use ndarray::{Array1, Array2, Array3, ArrayView1, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input};
use crate::simd::Isa;
use crate::stages::gate;
use crate::stages::norm::{LayerNorm, Rectified};
use crate::stages::options::{FINITE, check, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::project::Project;
use crate::stages::row::{self, RowMap, Shares};

input! {
    /// Pixels, and the sentence of each image.
    SentenceInput {
        /// What is weighed; channels are those of all heads, one after the other.
        x: T [batch, heads, len, dim],
        /// An embedding of each image's sentence; `sentences` is 1.
        sentence: T [batch, sentences, embed]
    }
    head_dim dim, value_dim dim;
}

/// Sentence attention: the channels of an image are weighed by a sentence.
///
/// ```text
/// a    = softmax over channels of W_2 max(0, layer norm(W_1 e + b_1)) + b_2
/// o_pc = x_pc a_c
/// ```
///
/// The weights sum to 1 over the channels of all heads, so that a channel is
/// multiplied by one over their number in the mean. "Sentence Attention Blocks for
/// Answer Grounding" (arXiv 2309.11593), and the code of its authors.
///
/// Cost: one read and one write of the pixels; `2 hidden (embed + channels)` flops
/// for each sentence.
///
/// A sentence as a gate of channels.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{SentenceAttention, SentenceInput}};
/// use ndarray::{Array1, Array2, Array3, Array4};
///
/// let first = (Array2::ones((4 * 12, 12)), Array1::zeros(48));
/// let second = (Array2::zeros((32, 48)), Array1::zeros(32));
/// let block = SentenceAttention::builder(first, second).build()?;
/// let (x, sentence) = (Array4::<f32>::ones((2, 1, 50, 32)), Array3::ones((2, 1, 12)));
/// let out = block.forward(SentenceInput::new(x.view(), sentence.view()))?;
/// assert!(out.iter().all(|x| (x - 1.0 / 32.0).abs() < 1e-7));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SentenceAttention {
    isa: Isa,
    /// `[1, inner, width]` each.
    weights: [Array3<f32>; 2],
    norm: Rectified,
    soft: Shares,
}

impl SentenceAttention {
    /// Two linear layers, `[hidden, embed]` and `[channels, hidden]`, and what each
    /// adds.
    pub fn builder(
        first: (Array2<f32>, Array1<f32>),
        second: (Array2<f32>, Array1<f32>),
    ) -> SentenceAttentionBuilder {
        SentenceAttentionBuilder::with(first, second)
    }
}

options! {
    /// Builds a [`SentenceAttention`].
    SentenceAttentionBuilder of SentenceAttention, isa;
    given { first: (Array2<f32>, Array1<f32>); second: (Array2<f32>, Array1<f32>); }
    own { norm: Option<(Array1<f32>, Array1<f32>)> = None; }
    build(builder, config) {
        let SentenceAttentionBuilder { first, second, norm, .. } = builder;
        let (hidden, channels) = (first.0.dim().0, second.0.dim().0);
        if second.0.dim().1 != hidden {
            return Err(Error::shape("second", format!("[channels, hidden] = [_, {hidden}]"), second.0.shape()));
        }
        let (gain, shift) = norm.unwrap_or_else(|| (Array1::ones(hidden), Array1::zeros(hidden)));
        let rows = [("first", &first.1, hidden), ("second", &second.1, channels), ("gain", &gain, hidden), ("shift", &shift, hidden)];
        for (argument, x, len) in rows {
            if x.len() != len {
                return Err(Error::shape(argument, format!("what is added, [{len}]"), x.shape()));
            }
            check(argument, x, &FINITE)?;
        }
        check("first", &first.0, &FINITE)?;
        check("second", &second.0, &FINITE)?;
        let turned = |x: Array2<f32>| x.t().as_standard_layout().into_owned().insert_axis(Axis(0));
        Ok(SentenceAttention {
            isa: config.isa,
            weights: [turned(first.0), turned(second.0)],
            norm: Rectified { bias: first.1.into(), norm: LayerNorm { gain, shift }.checked("gain", hidden)? },
            soft: Shares { bias: second.1.into() },
        })
    }
}

impl SentenceAttentionBuilder {
    /// Factors and sums of the layer norm, `[hidden]` each. Default: 1 and 0.
    pub fn norm(self, gain: Array1<f32>, shift: Array1<f32>) -> Self {
        Self { norm: Some((gain, shift)), ..self }
    }
}

impl SentenceAttention {
    fn check<T: Element>(&self, x: &SentenceInput<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if dims.packed {
            return Err(Error::packed("a sentence for each image"));
        }
        let (batch, sentences, embed) = x.sentence.dim();
        let (inner, channels) = (self.weights[0].dim().1, self.soft.bias.len());
        if (sentences, embed) != (1, inner) {
            let expected = format!("[batch, 1, embed] = [{batch}, 1, {inner}]");
            return Err(Error::shape("sentence", expected, x.sentence.shape()));
        }
        if dims.q_heads.checked_mul(dims.head_dim) != Some(channels) {
            let expected = format!("heads and dim of {channels} channels together");
            return Err(Error::shape("x", expected, x.x.shape()));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<SentenceInput<'_, T>> for SentenceAttention {
    type State = ();

    fn flow(
        &self,
        x: SentenceInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let Dims { batch, q_heads, head_dim, .. } = self.check(&x)?;
        let [first, second] = &self.weights;
        let (isa, (_, embed, hidden), channels) = (self.isa, first.dim(), self.soft.bias.len());
        let mut summed = pass.rows((batch, 1, 1, hidden))?;
        let mut normed = pass.rows((batch, 1, 1, hidden))?;
        let mut scores = pass.rows((batch, 1, 1, channels))?;
        let mut gates = pass.rows((batch, 1, 1, channels))?;
        let project = |inner, width| Project { isa, batch, heads: 1, len: 1, inner, width };
        let sentence = x.sentence.reborrow().insert_axis(Axis(1));
        project(embed, hidden).stage(pass, sentence, first.view(), &mut summed);
        row::run(pass, isa, summed.view(), &self.norm, normed.view_mut());
        project(hidden, channels).stage(pass, normed.view(), second.view(), &mut scores);
        row::run(pass, isa, scores.view(), &self.soft, gates.view_mut());
        let first = |_: usize| 0;
        let factors: [gate::Factors<'_>; 1] = [(gates.of_heads(q_heads, head_dim), &first)];
        gate::run(pass, isa, x.x, &factors, |_| 1.0, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: SentenceInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let layer = |x: &[R], weights: &Array3<f32>| -> Array1<R> {
            let column = |weights: ArrayView1<'_, f32>| {
                R::dot(x.iter().copied().zip(weights.iter().map(|&w| R::of(f64::from(w)))))
            };
            weights.index_axis(Axis(0), 0).columns().into_iter().map(column).collect()
        };
        let mut out = x.x.mapv(|x| R::of(x.to_f64()));
        for (mut image, sentence) in out.outer_iter_mut().zip(x.sentence.outer_iter()) {
            let embedded: Vec<R> = sentence.iter().map(|x| R::of(x.to_f64())).collect();
            let hidden = RowMap::define(&self.norm, layer(&embedded, &self.weights[0]).view());
            let gates = RowMap::define(&self.soft, layer(&hidden, &self.weights[1]).view());
            for ((h, _, c), x) in image.indexed_iter_mut() {
                *x = *x * gates[h * dims.head_dim + c];
            }
        }
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        self.weights.iter().map(|weights| weights.len()).sum::<usize>() * size_of::<f32>()
    }
}

composite!(SentenceAttention, SentenceInput);

exhibit! {
    SentenceExhibit of SentenceAttention, "neighborhood", "sentence attention", "arXiv 2309.11593";
    "channels of an image times a softmax that is made of a sentence";
    not "where a sentence has to tell places apart: it weighs channels alone";
    tokens true;
    build(x, field) {
        let (channels, embed) = (x.q.dim().1 * x.v.dim().3, 6);
        let of = |which: u64, rows, cols| Array2::from_shape_fn((rows, cols), |(a, b)| field.at(which, a, b, 0));
        let row = |which: u64, len| Array1::from_shape_fn(len, |a| field.at(which, a, 0, 0));
        let (first, second) = ((of(1, 24, embed), row(2, 24)), (of(3, channels, 24) * 0.3, row(4, channels)));
        SentenceAttention::builder(first, second).norm(row(5, 24) + 1.5, row(6, 24))
    }
    extras(x, field) {
        let sentence = |(_, _, c): (usize, usize, usize)| T::from_f32(field.at(7, 0, 0, c));
        Extras { keys: Extras::pixels(x), latents: Array3::from_shape_fn((x.q.dim().0, 1, 6), sentence), ..Extras::default() }
    }
    input<'a, T>(_, extras) -> SentenceInput<'a, T> { SentenceInput::new(extras.keys.view(), extras.latents.view()) }
}
carded!(SentenceAttention, SentenceExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::held;
    use ndarray::Array4;

    fn block(embed: usize, hidden: usize, channels: usize) -> SentenceAttentionBuilder {
        let (first, second) = (array(1, (hidden, embed)), array(3, (channels, hidden)));
        SentenceAttention::builder((first, array(2, hidden)), (second, array(4, channels)))
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (heads, len, dim, embed, hidden) in [
            (2, 50, 20, 9, 36),
            (1, 1, 1, 1, 4),
            (3, 7, 5, 40, 3),
            (2, 0, 3, 4, 5),
            (1, 4, 3, 0, 5),
            (1, 4, 3, 5, 0),
        ] {
            let x = array(5, (3, heads, len, dim));
            let sentence = array(6, (3, 1, embed));
            let plain = block(embed, hidden, heads * dim);
            let with = plain.clone().norm(array(7, hidden), array(8, hidden));
            for block in [plain, with] {
                held(&block.build().unwrap(), SentenceInput::new(x.view(), sentence.view()));
            }
        }
    }

    /// Gates sum to 1 over the channels of all heads, and are the same for all
    /// pixels.
    #[test]
    fn identities() {
        let (ones, sentence) = (Array4::<f32>::ones((2, 3, 4, 5)), array(6, (2, 1, 7)));
        let input = SentenceInput::new(ones.view(), sentence.view());
        let out = block(7, 28, 15).build().unwrap().reference(input).unwrap();
        for image in out.outer_iter() {
            for pixel in image.axis_iter(Axis(1)) {
                assert!((pixel.sum() - 1.0).abs() < 1e-12);
                assert_eq!(pixel, image.index_axis(Axis(1), 0));
            }
        }
        assert_ne!(out.index_axis(Axis(0), 0), out.index_axis(Axis(0), 1));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |block: SentenceAttentionBuilder| block.build().unwrap_err().to_string();
        let (first, second) = ((array(1, (8, 3)), array(2, 8)), (array(3, (6, 7)), array(4, 6)));
        let other = SentenceAttention::builder(first, second);
        assert_eq!(refusal(other), "second: expected shape [channels, hidden] = [_, 8], got [6, 7]");
        let short = block(3, 8, 6).norm(Array1::ones(7), Array1::ones(8));
        assert_eq!(refusal(short), "gain: expected shape what is added, [8], got [7]");
        let (x, sentence) = (array(5, (2, 2, 4, 3)), array::<ndarray::Ix3, _>(6, (2, 2, 3)));
        let block = block(3, 8, 6).build().unwrap();
        let two = block.forward(SentenceInput::new(x.view(), sentence.view())).unwrap_err().to_string();
        assert_eq!(two, "sentence: expected shape [batch, 1, embed] = [2, 1, 3], got [2, 2, 3]");
    }
}
