//! Perceiver cross-attention: latents read any number of tokens.

use crate::card::{Extras, carded, exhibit};
use crate::input::reading::Reading;
use crate::stages::options::{FINITE, options};
use crate::stages::reading::{CrossAttention, FeedForward, Reader, reader_options, reads, showing};

/// Perceiver cross-attention: latents read any number of tokens.
///
/// ```text
/// z <- z + W_O softmax(scale * W_Q norm(z) (W_K norm'(x))^T) W_V norm'(x)
/// z <- z + W_2 gelu(W_1 norm''(z) + b_1) + b_2
/// ```
///
/// "Perceiver: General Perception with Iterative Attention" (arXiv 2103.03206) and
/// "Perceiver IO" (arXiv 2107.14795). The latents that come out attend to each other
/// next (dense attention) and may read again, or are read by the queries of an output,
/// which is the same with the roles exchanged: queries are the latents then, and
/// latents the tokens. Tokens beyond a sequence's length are hidden.
///
/// Cost: for `M` latents and `N` tokens `2 M N heads (head_dim + value_dim)` flops, and
/// `2 N width heads (head_dim + value_dim)` for keys and values: linear in `N`. Latents
/// that are the same for all of the batch are projected once.
///
/// The published error bound is not the worst case of all roundings together, which
/// layers behind layers multiply by the square root of their widths each, but 16
/// times the root of the sum of their squares: independent errors keep to it.
///
/// Latents that read tokens.
///
/// ```
/// use attention_kernels::{Attention, latent::{CrossAttention, Perceiver, Reading}};
/// use ndarray::{Array2, Array3, Array4};
///
/// let w = |out, of| (Array2::from_elem((out, of), 0.1f32), None);
/// let cross = CrossAttention {
///     heads: 4, norm: None, norm_read: None,
///     query: w(32, 64), key: w(32, 48), value: w(32, 48), out: w(64, 32),
/// };
/// let (latents, tokens) = (Array4::<f32>::ones((1, 1, 16, 64)), Array3::ones((2, 1000, 48)));
/// let x = Reading::new(latents.broadcast((2, 1, 16, 64)).unwrap(), tokens.view());
/// let out = Perceiver::builder(cross).build()?.forward(x.lengths(&[1000, 30]))?;
/// assert_eq!(out.dim(), (2, 1, 16, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Perceiver(Reader);

impl Perceiver {
    /// Attention with these projections.
    pub fn builder(cross: CrossAttention) -> PerceiverBuilder {
        PerceiverBuilder::with(cross)
    }
}

options! {
    /// Builds a [`Perceiver`].
    PerceiverBuilder of Perceiver, isa;
    given { cross: CrossAttention; }
    own {
        forward: Option<FeedForward> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let PerceiverBuilder { cross, forward, scale, .. } = builder;
        Ok(Perceiver(Reader::new(&cross, forward.as_ref(), scale, config.isa)?))
    }
}

reader_options!(PerceiverBuilder);

reads!(Perceiver, |this| this.0, None);

exhibit! {
    PerceiverExhibit of Perceiver, "latent", "Perceiver", "arXiv 2103.03206, 2107.14795";
    "latents read the keys of all heads as tokens, 3 heads of 8, and a feed-forward layer follows";
    not "where each token needs an output of its own";
    tokens false;
    build(x, field) {
        let (dim, width) = (x.q.dim().1 * x.v.dim().3, x.k.dim().1 * x.k.dim().3);
        let (cross, forward) = showing(&|which, a, b| field.at(which, a, b, 0), dim, width, false);
        Perceiver::builder(cross).feed_forward(forward)
    }
    extras(x, field) { Extras { values: Extras::latents(x, field), latents: Extras::tokens(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Reading<'a, T> { Reading::new(extras.values.view(), extras.latents.view()) }
}
carded!(Perceiver, PerceiverExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Array4, Axis, s};

    use super::*;
    use crate::attention::{Attention, Bounded};
    use crate::dense::Dense;
    use crate::input::Qkv;
    use crate::stages::reading::tests::{cross, forward};
    use crate::testing::arrays::array;
    use crate::testing::qkv::{close, held, refused};

    fn perceiver(dim: usize, width: usize) -> Perceiver {
        Perceiver::builder(cross(dim, width, [2, 8, 6]))
            .feed_forward(forward(dim, 30, false))
            .build()
            .unwrap()
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (batch, heads, latents, part, tokens, width) in
            [(2, 2, 9, 10, 70, 12), (1, 1, 1, 5, 1, 3), (2, 1, 3, 4, 0, 7), (1, 3, 0, 2, 4, 5)]
        {
            let x = (array(1, (batch, heads, latents, part)), array(2, (batch, tokens, width)));
            let perceiver = perceiver(heads * part, width);
            let lengths: Vec<usize> = (0..batch).map(|b| tokens / (b + 1)).collect();
            let reading = Reading::new(x.0.view(), x.1.view());
            for reading in [reading, reading.lengths(&lengths), reading.pooled()] {
                held(&perceiver, reading);
                let bound = Bounded::error_bound(&perceiver, reading).unwrap();
                assert!(bound.iter().all(|bound| *bound < 2e-3), "{bound:?}");
            }
        }
    }

    /// The order of tokens does not matter, padding is not there, and latents that lie
    /// once in memory are those that lie twice.
    #[test]
    fn tokens_permute_and_padding_is_hidden() {
        let (latents, tokens) = (array(1, (1, 2, 9, 10)), array(2, (2, 70, 12)));
        let (perceiver, twice) = (perceiver(20, 12), latents.broadcast((2, 2, 9, 10)).unwrap());
        let want = perceiver.forward(Reading::new(twice, tokens.view())).unwrap();
        let own = twice.to_owned();
        let got = perceiver.forward(Reading::new(own.view(), tokens.view())).unwrap();
        assert_eq!(got, want);
        let mut padded = Array4::<f32>::from_elem((1, 2, 90, 12), f32::NAN).index_axis_move(Axis(0), 0);
        padded.slice_mut(s![.., ..70;-1, ..]).assign(&tokens);
        let got = perceiver.forward(Reading::new(twice, padded.view()).lengths(&[70, 70])).unwrap();
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    /// With matrices that change nothing it is dense attention, added to the latents;
    /// without tokens latents stay.
    #[test]
    fn identities() {
        let one = || (Array2::eye(16), None);
        let (query, key, value, out) = (one(), one(), one(), one());
        let cross = CrossAttention { heads: 2, norm: None, norm_read: None, query, key, value, out };
        let perceiver = Perceiver::builder(cross).build().unwrap();
        let (latents, tokens) = (array(1, (1, 1, 5, 16)), array(2, (1, 40, 16)));
        let got = perceiver.reference(Reading::new(latents.view(), tokens.view())).unwrap();
        let by_head = |x: &Array4<f32>| {
            let x = x.to_shape((1, x.dim().2, 2, 8)).unwrap().to_owned();
            x.permuted_axes([0, 2, 1, 3])
        };
        let (q, k) = (by_head(&latents), by_head(&tokens.clone().insert_axis(Axis(1))));
        let dense = Dense::builder().build().unwrap();
        let read = dense.reference(Qkv::new(q.view(), k.view(), k.view())).unwrap();
        let want = Array4::from_shape_fn((1, 1, 5, 16), |(_, _, i, c)| {
            f64::from(latents[[0, 0, i, c]]) + read[[0, c / 8, i, c % 8]]
        });
        close(&got, &want, 1e-12);
        let none = perceiver.forward(Reading::new(latents.view(), tokens.view()).lengths(&[0])).unwrap();
        assert_eq!(none, latents);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |change: &dyn Fn(&mut CrossAttention)| {
            let mut cross = cross(20, 12, [2, 8, 6]);
            change(&mut cross);
            Perceiver::builder(cross).build().unwrap_err().to_string()
        };
        assert_eq!(
            refusal(&|cross| cross.heads = 0),
            "heads: expected a divisor of the 16 rows of query, got 0"
        );
        assert_eq!(
            refusal(&|cross| cross.heads = 8),
            "heads: expected a divisor of the 12 rows of value, got 8"
        );
        let out = refusal(&|cross| cross.out.0 = Array2::zeros((20, 13)));
        assert_eq!(out, "out: expected shape [out, in] = [20, 12], got [20, 13]");
        let norm = refusal(&|cross| cross.norm = cross.norm_read.clone());
        assert_eq!(norm, "norm: expected shape [dim] = [20] twice, got [12]");
        let (latents, tokens) = (array(1, (2, 2, 9, 10)), array(2, (2, 70, 12)));
        let x = |latents| Reading::new(latents, tokens.view());
        let perceiver = perceiver(20, 12);
        let expected = "latents: expected shape heads and dim of 20 elements together, got [2, 1, 9, 10]";
        assert_eq!(refused(&perceiver, x(latents.slice(s![.., ..1, .., ..]))), expected);
        let batch = refused(&perceiver, x(latents.slice(s![..1, .., .., ..])));
        assert!(
            batch.starts_with("tokens: expected shape [batch, tokens, width] with a batch of 1"),
            "{batch}"
        );
        let long = refused(&perceiver, x(latents.view()).lengths(&[70, 71]));
        assert_eq!(long, "lengths: expected 2 lengths of at most 70, got [70, 71]");
        let width = refused(&self::perceiver(20, 13), x(latents.view()));
        assert_eq!(width, "tokens: expected shape [batch, tokens, width] = [_, 70, 13], got [2, 70, 12]");
    }
}
