//! VHR, vision-aware head reinforcement: heads that an image changes most count for more.

use ndarray::ArrayView2;

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::Reference;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::Causal;
use crate::score::Plain;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::options::{FINITE, options};
use crate::stages::over::Over;

/// How far the outputs of heads are from those without the image, both `[heads,
/// value_dim]`, of the last token; 0 for heads that are outliers.
///
/// ```
/// use attention_kernels::dense::vhd;
/// let with = ndarray::array![[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]];
/// let without = ndarray::array![[0.0, 0.0], [1.0, 0.0], [9.0, 8.0]];
/// assert_eq!(vhd(with.view(), without.view())?, [5.0, 0.0, 1.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] where the shapes differ.
pub fn vhd(with: ArrayView2<'_, f32>, without: ArrayView2<'_, f32>) -> Result<Vec<f32>> {
    if with.dim() != without.dim() {
        let expected = format!("[heads, value_dim] = {:?}", with.shape());
        return Err(Error::shape("without", expected, without.shape()));
    }
    let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let rows = || with.outer_iter().zip(without.outer_iter());
    let apart = |(a, b): (ndarray::ArrayView1<'_, f32>, ndarray::ArrayView1<'_, f32>)| {
        square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b))).sqrt()
    };
    let apart: Vec<f64> = rows().map(apart).collect();
    let text: Vec<f64> = rows().map(|(_, b)| square(&mut b.iter().map(|&b| f64::from(b)))).collect();
    let limit = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        mean + (square(&mut x.iter().map(|x| x - mean)) / x.len() as f64).sqrt()
    };
    let [most_apart, most_text] = [&apart, &text].map(|x| limit(x));
    let kept = |(&apart, &text): (&f64, &f64)| {
        if apart > most_apart && text > most_text { 0.0 } else { apart as f32 }
    };
    Ok(apart.iter().zip(&text).map(kept).collect())
}

/// The heads whose [`vhd`] is above the median, which a NaN never is.
///
/// ```
/// assert_eq!(attention_kernels::dense::vision_aware_heads(&[0.5, 2.0, 0.0, 1.0]), [1, 3]);
/// ```
pub fn vision_aware_heads(vhd: &[f32]) -> Vec<usize> {
    let mut sorted: Vec<f64> = vhd.iter().map(|&x| f64::from(x)).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = |at: usize| sorted.get(at).copied().unwrap_or(0.0);
    let n = sorted.len();
    let median = (middle(n.saturating_sub(1) / 2) + middle(n / 2)) / 2.0;
    (0..n).filter(|&h| f64::from(vhd[h]) > median).collect()
}

/// Gains of heads: `alpha` (2 in the paper) for [`vision_aware_heads`], 1 for others.
pub fn vhr_gains(vhd: &[f32], alpha: f32) -> Vec<f32> {
    let mut gains = vec![1.0; vhd.len()];
    vision_aware_heads(vhd).into_iter().for_each(|h| gains[h] = alpha);
    gains
}

/// How much a token hangs on the image: of each layer the `k` largest [`vhd`], all added
/// up.
///
/// ```
/// let layers = [vec![1.0, 3.0, 2.0], vec![0.5]];
/// assert_eq!(attention_kernels::dense::t_vhd(&layers, 2), 5.5);
/// ```
pub fn t_vhd(layers: &[Vec<f32>], k: usize) -> f32 {
    let of = |layer: &Vec<f32>| {
        let mut sorted = layer.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.iter().take(k).map(|&x| f64::from(x)).sum::<f64>()
    };
    layers.iter().map(of).sum::<f64>() as f32
}

/// VHR, vision-aware head reinforcement: heads that an image changes most count for more.
///
/// ```text
/// VHD_h = |a_h - a0_h|      a: the output of a head at the last token,  a0: without the image
///       = 0                 where VHD_h and |a0_h|^2 are both beyond mean + std of the heads
/// o_h = alpha a_h           where VHD_h is above the median of the heads,  a_h elsewhere
/// ```
///
/// "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence" (arXiv
/// 2412.13949). Standard deviations are those of a population, and the median of an even
/// number of heads is the mean of the two in the middle. Heads are chosen at the first
/// token that is generated, one layer after the other, and stay. [`vhd`] is the metric of a layer,
/// [`vhr_gains`] makes gains of it, [`Vhr`] is causal attention with gains of heads.
///
/// Cost: that of causal attention, and a product an element of the output, before it is
/// rounded. Without an image there is nothing to reinforce: [`Dense`](super::Dense).
///
/// Causal attention whose heads have gains, over arrays and caches. Weights are those
/// before the gains, and so is the LSE: parts of the keys merge.
///
/// ```
/// use attention_kernels::dense::{Vhr, vhd, vhr_gains};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 4, 50, 16), |(_, h, i, c)| ((h * 7 + i * (c + 3)) as f32).sin());
/// let plain = Vhr::builder(vec![1.0; 4]).build()?;
/// // The last token, with tokens 5 to 29 of an image and without.
/// let q = x.slice(s![.., .., 49.., ..]);
/// let text = ndarray::concatenate![ndarray::Axis(2), x.slice(s![.., .., ..5, ..]), x.slice(s![.., .., 30.., ..])];
/// let with = plain.forward(Qkv::new(q, x.view(), x.view()))?;
/// let without = plain.forward(Qkv::new(q, text.view(), text.view()))?;
/// let vhd = vhd(with.slice(s![0, .., 0, ..]), without.slice(s![0, .., 0, ..]))?;
/// let reinforced = Vhr::builder(vhr_gains(&vhd, 2.0)).build()?;
/// let out = reinforced.forward(Qkv::new(q, x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 4, 1, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Vhr {
    config: Config<Causal, Plain>,
    gains: Vec<f32>,
}

impl Vhr {
    /// One gain for each query head.
    pub fn builder(gains: Vec<f32>) -> VhrBuilder {
        VhrBuilder::with(gains)
    }
}

options! {
    /// Builds a [`Vhr`].
    VhrBuilder of Vhr, isa;
    given { gains: Vec<f32>, in FINITE; }
    build(this, config) {
        let options = Options { mask: Causal::new(), score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(Vhr { config: options.build()?, gains: this.gains })
    }
}

impl VhrBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl Vhr {
    fn checked<X: Over>(&self, x: &X) -> Result<()> {
        let heads = x.dims()?.q_heads;
        if self.gains.len() == heads {
            return Ok(());
        }
        let expected = format!("one for each of the {heads} query heads");
        Err(Error::value("gains", expected, self.gains.len()))
    }
}

impl<X: Over> Attending<X> for Vhr {
    fn with_call<R>(&self, x: X, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.checked(&x)?;
        x.over(&self.config, |call| run(&call.gained(&self.gains)))
    }

    fn define(&self, x: X) -> Result<Reference> {
        self.checked(&x)?;
        let mut reference = x.defined(&self.config)?;
        for (h, &gain) in self.gains.iter().enumerate() {
            let gain = f64::from(gain);
            reference.out.index_axis_mut(ndarray::Axis(1), h).mapv_inplace(|x| gain * x);
            reference
                .bound
                .index_axis_mut(ndarray::Axis(1), h)
                .mapv_inplace(|x| gain.abs() * x + f64::from(f32::from_bits(1)));
        }
        Ok(reference)
    }

    fn price(&self, x: X) -> Result<Cost> {
        self.checked(&x)?;
        x.priced(&self.config)
    }
}

attending!(Vhr, [Q, K, O] Qkv);
mergeable!(Vhr, [Q, K, O] Qkv);
attending!(Vhr, caches);
mergeable!(Vhr, caches);

exhibit! {
    VhrExhibit of Vhr, "dense", "VHR", "arXiv 2412.13949";
    "causal, with a gain of each head: heads that an image changes most count for more";
    not "where heads count as the model has them: causal alone";
    tokens false;
    build(x, field) {
        let vhd: Vec<f32> = (0..x.q.dim().1).map(|h| 1.0 + field.at(1, h, 0, 0)).collect();
        Vhr::builder(vhr_gains(&vhd, 2.5))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Vhr, VhrExhibit);

#[cfg(test)]
mod tests;
