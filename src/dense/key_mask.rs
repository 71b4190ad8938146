//! DesignEdit's key mask: a region of an image is removed by its keys, while its
//! queries and values stay.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayView3};

use crate::attention::{Cost, Input};
use crate::card::{Extras, carded, exhibit};
use crate::definition::softmax::Reference;
use crate::engine::call::Call;
use crate::error::Result;
use crate::input::filled;
use crate::input::keyed::{self, keyed};
use crate::input::{Qkv, Site};
use crate::mask::{Coverage, Mask, Unmasked};
use crate::score::{Plain, Score};
use crate::simd::Simd;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::options::options;
use crate::stages::over::Over;

keyed! {
    /// An input of attention with how much of each of its keys is removed.
    WithKeyMask<'a, X> {
        /// `[batch, kv_len]`, from 0 to 1.
        mask: f32, "a number from 0 to 1" |m| (0.0..=1.0).contains(&m)
    }
}

/// Masks `[batch, height, width]` at another size, `[batch, rows * columns]`, pixels one
/// row after the other: bilinear, between the middles of pixels, and beyond the outermost
/// of them as they are. A mask without pixels is 0.
///
/// ```
/// use attention_kernels::dense::resized_mask;
/// let mask = ndarray::array![[[0.0, 1.0], [0.0, 1.0]]];
/// assert_eq!(resized_mask(mask.view(), [1, 4])?, ndarray::array![[0.0, 0.25, 0.75, 1.0]]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::TooLarge`](crate::Error::TooLarge) for more than memory has room for.
pub fn resized_mask(mask: ArrayView3<'_, f32>, [rows, columns]: [usize; 2]) -> Result<Array2<f32>> {
    let (batch, height, width) = mask.dim();
    // Two neighbours, and the share of the second.
    let between = |at: usize, to: usize, from: usize| {
        let place = ((at as f64 + 0.5) * from as f64 / to as f64 - 0.5).clamp(0.0, from as f64 - 1.0);
        let first = place as usize;
        (first, (first + 1).min(from - 1), (place - first as f64) as f32)
    };
    let mut to = filled("mask", (batch, rows.saturating_mul(columns)), 0.0)?;
    to.indexed_iter_mut().for_each(|((b, pixel), to)| {
        if height == 0 || width == 0 {
            return;
        }
        let (top, bottom, down) = between(pixel / columns, rows, height);
        let (left, right, along) = between(pixel % columns, columns, width);
        let row = |y: usize| mask[[b, y, left]] * (1.0 - along) + mask[[b, y, right]] * along;
        *to = row(top) * (1.0 - down) + row(bottom) * down;
    });
    Ok(to)
}

/// DesignEdit's key mask: a region of an image is removed by its keys, while its
/// queries and values stay.
///
/// ```text
/// o_i = sum_j softmax_j(scale q_i . (1 - m_j) k_j) v_j      m_j in [0, 1], 1 is removed
/// ```
///
/// "DesignEdit: Multi-Layered Latent Decomposition and Fusion for Unified & Accurate Image
/// Editing" (arXiv 2403.14487), whose keys are projections, without bias, of tokens times
/// `1 - m`. A key that is removed has a score of 0, not of -inf, and still takes part: where
/// all are removed the output is the mean of the values.
/// [`exclude`](KeyMaskBuilder::exclude) hides every key whose mask is not 0 instead; where
/// all are hidden the output is 0. The paper masks self-attention of its background branch
/// in the first 40 steps; [`resized_mask`] brings a mask to the size of a layer.
///
/// Cost: that of attention, and a product a score. Excluding costs no product, and blocks
/// of which all keys are hidden are skipped. Where the region is the same in every
/// call, [`Dense`](super::Dense) over the keys that are left does less.
///
/// Attention with keys that are removed, over arrays and caches.
///
/// ```
/// use attention_kernels::dense::{KeyMask, WithKeyMask, resized_mask};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array3, Array4};
///
/// // An image of 8 x 8, of which the left half is removed.
/// let x = Array4::from_shape_fn((1, 2, 64, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let mask = Array3::from_shape_fn((1, 32, 32), |(_, _, x)| f32::from(x < 16));
/// let mask = resized_mask(mask.view(), [8, 8])?;
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let out = KeyMask::builder().build()?.forward(WithKeyMask { x, mask: mask.view() })?;
/// assert_eq!(out.dim(), (1, 2, 64, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KeyMask {
    config: Config<Unmasked, Plain>,
    exclude: bool,
}

impl KeyMask {
    /// Keys that are removed have scores of 0.
    pub fn builder() -> KeyMaskBuilder {
        KeyMaskBuilder::with()
    }
}

options! {
    /// Builds a [`KeyMask`].
    KeyMaskBuilder of KeyMask, isa;
    flags {
        /// Hides keys whose mask is not 0.
        exclude;
    }
    build(this, config) {
        let options = Options { mask: Unmasked, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(KeyMask { config: options.build()?, exclude: this.exclude })
    }
}

impl KeyMaskBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

/// Scores of keys of which some is removed.
struct Faded<'a>(ArrayView2<'a, f32>);

impl Score for Faded<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, _: usize, key: usize, score: f64) -> f64 {
        let rest = 1.0 - f64::from(self.0[[site.batch, key]]);
        if score == f64::NEG_INFINITY { score } else { score * rest }
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, _: usize, first: usize, scores: &mut [f32]) {
        keyed::each(&self.0, site.batch, first, scores, |score, mask| {
            if score == f32::NEG_INFINITY { score } else { score * (1.0 - mask) }
        });
    }
}

/// Keys of which nothing is removed.
struct Whole<'a>(ArrayView2<'a, f32>);

impl Mask for Whole<'_> {
    #[inline(always)]
    fn visible(&self, site: &Site, _: usize, key: usize) -> bool {
        self.0[[site.batch, key]] == 0.0
    }

    #[inline(always)]
    fn coverage(&self, site: &Site, _: Range<usize>, keys: Range<usize>) -> Coverage {
        let all = keys.len();
        match keys.filter(|&key| self.visible(site, 0, key)).count() {
            0 => Coverage::Empty,
            some if some < all => Coverage::Partial,
            _ => Coverage::Full,
        }
    }
}

impl<X: Over> Attending<WithKeyMask<'_, X>> for KeyMask {
    fn with_call<R>(&self, x: WithKeyMask<'_, X>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.dims()?;
        x.x.in_order("mask")?;
        match self.exclude {
            true => x.x.over(&self.config.masked(Whole(x.mask.reborrow())), run),
            false => x.x.over(&self.config.with_score(Faded(x.mask.reborrow())), run),
        }
    }

    fn define(&self, x: WithKeyMask<'_, X>) -> Result<Reference> {
        x.dims()?;
        x.x.in_order("mask")?;
        match self.exclude {
            true => x.x.defined(&self.config.masked(Whole(x.mask.reborrow()))),
            false => x.x.defined(&self.config.with_score(Faded(x.mask.reborrow()))),
        }
    }

    fn price(&self, x: WithKeyMask<'_, X>) -> Result<Cost> {
        x.dims()?;
        x.x.in_order("mask")?;
        let Cost { flops, bytes } = match self.exclude {
            true => x.x.priced(&self.config.masked(Whole(x.mask.reborrow())))?,
            false => x.x.priced(&self.config)?,
        };
        Ok(Cost { flops, bytes: bytes + (x.mask.len() * size_of::<f32>()) as u64 })
    }
}

attending!(@kernel [X: Over] WithKeyMask<'_, X>, KeyMask);
attending!(@weights [X: Over] WithKeyMask<'_, X>, KeyMask);
mergeable!(@impl [X: Over] WithKeyMask<'_, X>, KeyMask);

exhibit! {
    KeyMaskExhibit of KeyMask, "dense", "DesignEdit", "arXiv 2403.14487";
    "keys of a region are scaled down to 0, queries and values stay";
    not "where the region must not take part at all: a mask";
    tokens false;
    build(_, _) { KeyMask::builder() }
    extras(x, field) {
        // Some keys are removed, some are not, and others are between.
        let mask = |(_, _, j): (usize, usize, usize)| (0.5 + 0.7 * field.at(1, 0, j, 0)).clamp(0.0, 1.0);
        let decays = ndarray::Array3::from_shape_fn((x.k.dim().0, 1, x.k.dim().2), mask);
        Extras { decays, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithKeyMask<'a, Qkv<'a, T>> {
        WithKeyMask { x, mask: extras.decays.view().index_axis_move(ndarray::Axis(1), 0) }
    }
}
carded!(KeyMask, KeyMaskExhibit);

#[cfg(test)]
mod tests;
