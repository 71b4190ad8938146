//! PAINT: the last query listens to chosen tokens of an image.

use ndarray::{ArrayView2, Axis};

use crate::attention::{Cost, Input};
use crate::card::{Extras, carded, exhibit};
use crate::definition::softmax::Reference;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::keyed::{self, keyed};
use crate::input::{Qkv, Site};
use crate::mask::Causal;
use crate::score::{Plain, Score};
use crate::simd::Simd;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::options::{FINITE, options};
use crate::stages::over::Over;

keyed! {
    /// An input of attention with tags of its keys.
    WithTags<'a, X> {
        /// `[batch, kv_len]`: 1 for local tokens, 2 for summaries, 0 for others.
        tags: u8, "0, 1 or 2" |tag| tag <= 2
    }
}

/// Tags of the tokens of an image, from what its class token gives each in two layers of
/// the vision encoder, `[heads, tokens]`, the first layer and the last but one. Local
/// are the quarter that the first gives most, of equal ones those that come first.
/// Summaries are those to which the last but one gives more than is usual: beyond the
/// upper quartile by more than 1.5 times the distance of the quartiles, which lie
/// between two tokens as their ranks do. A token that is both is a summary.
///
/// ```
/// use attention_kernels::dense::paint_tags;
/// let first = ndarray::array![[0.1, 0.4, 0.2, 0.1, 0.1, 0.1, 0.0, 0.0]];
/// let last_but_one = ndarray::array![[0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3]];
/// assert_eq!(paint_tags(first.view(), last_but_one.view())?, [0, 1, 1, 0, 0, 0, 0, 2]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] for layers of different numbers of tokens.
pub fn paint_tags(first: ArrayView2<'_, f32>, last_but_one: ArrayView2<'_, f32>) -> Result<Vec<u8>> {
    let n = first.dim().1;
    if last_but_one.dim().1 != n {
        let expected = format!("[heads, tokens] = [_, {n}]");
        return Err(Error::shape("last_but_one", expected, last_but_one.shape()));
    }
    let received = |layer: ArrayView2<'_, f32>| {
        layer.map_axis(Axis(0), |x| x.iter().map(|&x| f64::from(x)).sum::<f64>())
    };
    let (local, summary) = (received(first), received(last_but_one));
    let mut order: Vec<usize> = (0..n).filter(|&j| !local[j].is_nan()).collect();
    order.sort_by(|&a, &b| local[b].total_cmp(&local[a]));
    let mut tags = vec![0; n];
    order.into_iter().take(n / 4).for_each(|j| tags[j] = 1);
    let mut sorted: Vec<f64> = summary.iter().copied().filter(|x| !x.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    let quartile = |share: f64| {
        let rank = share * sorted.len().saturating_sub(1) as f64;
        let [below, above] = [rank.floor(), rank.ceil()].map(|rank| sorted.get(rank as usize).copied());
        let (below, above) = (below.unwrap_or(0.0), above.unwrap_or(0.0));
        below + (above - below) * rank.fract()
    };
    let [lower, upper] = [0.25, 0.75].map(quartile);
    let most = upper + 1.5 * (upper - lower);
    summary.iter().zip(&mut tags).filter(|(x, _)| **x > most).for_each(|(_, tag)| *tag = 2);
    Ok(tags)
}

/// PAINT: the last query listens to chosen tokens of an image.
///
/// ```text
/// s_j = scale q . k_j                           of the last query, before the mask
/// s'_j = s_j + alpha_h |s_j|                    token j is local
///      = s_j + beta_h |s_j|                     token j is a summary
/// o = sum_j softmax_j(s'_j) v_j                 causal; other queries of a call as they are
/// ```
///
/// "PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large
/// Vision-Language Model" (arXiv 2501.12206). [`paint_tags`] finds both kinds of tokens in
/// what the class token of the vision encoder looks at. The paper changes some layers of
/// the language model, all heads alike.
///
/// Cost: that of causal attention. Without an image there is nothing to tag:
/// [`Dense`](super::Dense).
///
/// Causal attention in which scores of tagged keys are raised for the last query, over
/// arrays and caches.
///
/// ```
/// use attention_kernels::dense::{Paint, WithTags};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array2, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// // Of 20 tokens of an image some are local, and one is a summary.
/// let tags = Array2::from_shape_fn((1, 50), |(_, j)| if j == 7 { 2 } else { u8::from(j < 20 && j % 4 == 0) });
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let out = Paint::builder().build()?.forward(WithTags { x, tags: tags.view() })?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Paint {
    config: Config<Causal, Plain>,
    alpha: Vec<f32>,
    beta: Vec<f32>,
}

impl Paint {
    /// As the released code has it.
    pub fn builder() -> PaintBuilder {
        PaintBuilder::with()
    }
}

options! {
    /// Builds a [`Paint`].
    PaintBuilder of Paint, isa;
    numbers {
        /// How much louder local tokens are, of each query head or of all. Default: 0.7.
        alpha: Vec<f32> = vec![0.7], in FINITE;
        /// The same of summaries. Default: 0.3.
        beta: Vec<f32> = vec![0.3], in FINITE;
    }
    build(this, config) {
        let options = Options { mask: Causal::new(), score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(Paint { config: options.build()?, alpha: this.alpha, beta: this.beta })
    }
}

impl PaintBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl Paint {
    /// The configuration for an input, which has been checked then.
    fn tagged<'a, X: Over>(&'a self, x: &'a WithTags<'_, X>) -> Result<Config<Causal, Louder<'a>>> {
        x.x.in_order("tags")?;
        let heads = x.dims()?.q_heads;
        for (argument, of) in [("alpha", &self.alpha), ("beta", &self.beta)] {
            if of.len() != 1 && of.len() != heads {
                let expected = format!("one, or one for each of the {heads} query heads");
                return Err(Error::value(argument, expected, of.len()));
            }
        }
        Ok(self.config.with_score(Louder { of: self, tags: x.tags.reborrow() }))
    }
}

/// Raises scores of the last query.
struct Louder<'a> {
    of: &'a Paint,
    tags: ArrayView2<'a, u8>,
}

impl Louder<'_> {
    /// What is added to a score of 1, by tag.
    #[inline(always)]
    fn gains(&self, site: &Site) -> [f32; 3] {
        let of = |x: &[f32]| x[if x.len() == 1 { 0 } else { site.head }];
        [0.0, of(&self.of.alpha), of(&self.of.beta)]
    }
}

impl Score for Louder<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let gain = f64::from(self.gains(site)[usize::from(self.tags[[site.batch, key]])]);
        if query + 1 != site.q_len || gain == 0.0 || score.is_infinite() {
            return score;
        }
        let (louder, most) = (score + gain * score.abs(), f64::from(f32::MAX));
        if louder.is_nan() { louder } else { louder.clamp(-most, most) }
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        if query + 1 != site.q_len {
            return;
        }
        let gains = self.gains(site);
        keyed::each(&self.tags, site.batch, first, scores, |score, tag| {
            let louder = score + gains[usize::from(tag.min(2))] * score.abs();
            // The order keeps NaN; a score that is finite stays so.
            let louder = if louder > f32::MAX { f32::MAX } else { louder };
            let louder = if louder < f32::MIN { f32::MIN } else { louder };
            if score.is_infinite() { score } else { louder }
        });
    }
}

impl<X: Over> Attending<WithTags<'_, X>> for Paint {
    fn with_call<R>(&self, x: WithTags<'_, X>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.x.over(&self.tagged(&x)?, run)
    }

    fn define(&self, x: WithTags<'_, X>) -> Result<Reference> {
        let (dims, mut reference) = (x.dims()?, x.x.defined(&self.tagged(&x)?)?);
        // What is wrong with a score is louder, too.
        let at = |x: &[f32], h: usize| f64::from(x[if x.len() == 1 { 0 } else { h }].abs());
        for (b, h) in (0..dims.batch).flat_map(|b| (0..dims.q_heads).map(move |h| (b, h))) {
            if let Some(last) = x.lengths().sequence(&dims, b).queries.last() {
                reference.bound[[b, h, last]] *= 1.0 + at(&self.alpha, h).max(at(&self.beta, h));
            }
        }
        Ok(reference)
    }

    fn price(&self, x: WithTags<'_, X>) -> Result<Cost> {
        let Cost { flops, bytes } = x.x.priced(&self.tagged(&x)?)?;
        Ok(Cost { flops, bytes: bytes + x.tags.len() as u64 })
    }
}

attending!(@kernel [X: Over] WithTags<'_, X>, Paint);
attending!(@weights [X: Over] WithTags<'_, X>, Paint);
mergeable!(@impl [X: Over] WithTags<'_, X>, Paint);

exhibit! {
    PaintExhibit of Paint, "dense", "PAINT", "arXiv 2501.12206";
    "causal, the last query's scores of chosen tokens of an image are raised";
    not "without an image: causal alone";
    tokens false;
    build(_, _) { Paint::builder() }
    extras(x, field) {
        let tag = |(_, j): (usize, usize)| (1.5 * (1.0 + field.at(1, 0, j, 0))) as u8;
        Extras { tags: ndarray::Array2::from_shape_fn((x.k.dim().0, x.k.dim().2), tag), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithTags<'a, Qkv<'a, T>> { WithTags { x, tags: extras.tags.view() } }
}
carded!(Paint, PaintExhibit);

#[cfg(test)]
mod tests;
