//! VAR, visual attention redistribution: heads that look at an image take weight
//! from sinks and give it to the rest of the image.

use std::ops::Range as Tokens;

use ndarray::{Array2, ArrayView2};

use crate::card::{carded, exhibit};
use crate::definition::attend::weights;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Qkv, Site};
use crate::simd::Simd;
use crate::stages::options::{Range, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole::{self, HIDDEN, RowFn};

/// Tokens whose hidden state `[tokens, channels]` is large in one of the
/// model's sink channels: more than `threshold` times its root mean square, 20 in
/// the paper.
///
/// ```
/// use attention_kernels::dense::visual_sinks;
/// let hidden = ndarray::array![[1.0, -1.0, 1.0, 1.0], [0.1, 0.1, -9.0, 0.1]];
/// assert_eq!(visual_sinks(hidden.view(), &[2, 3], 1.9), [1]);
/// ```
pub fn visual_sinks(hidden: ArrayView2<'_, f32>, channels: &[usize], threshold: f32) -> Vec<usize> {
    let large = |row: ndarray::ArrayView1<'_, f32>| {
        let square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / row.len().max(1) as f64;
        let most = channels.iter().filter_map(|&c| row.get(c)).fold(0.0, |most: f32, x| most.max(x.abs()));
        f64::from(most) > f64::from(threshold) * square.sqrt()
    };
    hidden.outer_iter().enumerate().filter(|(_, row)| large(*row)).map(|(t, _)| t).collect()
}

/// VAR, visual attention redistribution: heads that look at an image take weight
/// from sinks and give it to the rest of the image.
///
/// ```text
/// A = softmax(scale q_i . k_j)    causal;  masses of A: v on sinks in the image, t on
///                                 others, r on the rest of the image
/// where v <= rho (v + r) and v + r >= sigma, for queries after the image
///     A'_ij = p A_ij                               sinks
///           = (1 + (1 - p) (v + t) / r) A_ij       the rest of the image
///           = A_ij                                 others
/// o_i = sum_j A'_ij v_j
/// ```
///
/// "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv
/// 2503.03321). Weights still sum to 1. [`visual_sinks`] finds sinks in the hidden
/// states of a layer's tokens; the paper leaves the first two layers and the last alone. Where
/// there are no sinks in the image, or no weight on its rest, nothing changes.
///
/// Cost: as dense attention; a thread holds the scores of 48 queries with all
/// keys. The choice of a query jumps at `rho` and `sigma`: there the error bound is
/// infinite.
///
/// Causal attention that gives weight of sinks to an image.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Var};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// // Tokens 5 to 39 are an image; 0 and 12 are sinks.
/// let var = Var::builder(5..40, &[0, 12]).build()?;
/// let out = var.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Var {
    config: Config,
    image: Tokens<usize>,
    /// Rising.
    sinks: Vec<usize>,
    keep: f32,
    most: f32,
    least: f32,
}

impl Var {
    /// The tokens of the image, and sinks, counted from the start of a sequence.
    pub fn builder(image: Tokens<usize>, sinks: &[usize]) -> VarBuilder {
        VarBuilder::with(image, sinks.to_vec())
    }
}

const SHARE: Range = Range::new(["a number from 0 to 1"; 2], |x| (0.0..=1.0).contains(&x));

options! {
    /// Builds a [`Var`].
    VarBuilder of Var, isa;
    given { image: Tokens<usize>; sinks: Vec<usize>; }
    numbers {
        /// `p`: how much of their weight sinks keep. Default: 0.6.
        keep: f32 = 0.6, in SHARE;
        /// `rho`: the largest share of an image's weight that its sinks may have
        /// where a head is chosen. Default: 0.5.
        most_on_sinks: f32 = 0.5, in SHARE;
        /// `sigma`: the least weight on the image where a head is chosen. Default: 0.2.
        least_on_image: f32 = 0.2, in SHARE;
    }
    build(this, config) {
        let (image, mut sinks) = (this.image, this.sinks);
        if image.start > image.end {
            return Err(Error::value("image", "a start before its end", format_args!("{image:?}")));
        }
        sinks.sort_unstable();
        sinks.dedup();
        let (keep, most, least) = (this.keep, this.most_on_sinks, this.least_on_image);
        Ok(Var { config, image, sinks, keep, most, least })
    }
}

impl VarBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl RowFn for Var {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], _: &mut [f32]) {
        let seen = site.position(None, query).saturating_add(1).clamp(0, row.len() as isize) as usize;
        let (row, later) = row.split_at_mut(seen);
        later.fill(HIDDEN);
        whole::softmax(s, row);
        if seen <= self.image.end {
            return;
        }
        let sinks = &self.sinks[..self.sinks.partition_point(|&j| j < seen)];
        let at = |end: usize| sinks.partition_point(|&j| j < end);
        let visual = &sinks[at(self.image.start)..at(self.image.end)];
        let total = |sinks: &[usize]| -> f32 { sinks.iter().map(|&j| row[j]).sum() };
        let on_visual = total(visual);
        let on_others = total(&sinks[..at(self.image.start)]) + total(&sinks[at(self.image.end)..]);
        let parts = || whole::between(self.image.clone(), visual);
        let rest: f32 = parts().map(|part| whole::sum(s, &row[part], 0.0, |x| x)).sum();
        let all = on_visual + rest;
        let chosen = on_visual <= self.most * all && all >= self.least;
        if visual.is_empty() || rest == 0.0 || !chosen {
            return;
        }
        let factor = 1.0 + (1.0 - self.keep) * (on_visual + on_others) / rest;
        parts().for_each(|part| whole::scale(s, &mut row[part], factor));
        sinks.iter().for_each(|&j| row[j] *= self.keep);
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Var {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = whole::checked(x.dims()?)?;
        whole::run(
            pass,
            self.config.isa,
            (x, &dims),
            self.config.scale_or_sqrt(&dims) as f32,
            self,
            None,
            out,
        );
        Ok(())
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = whole::checked(x.dims()?)?;
        let (scale, of) = (self.config.scale_or_sqrt(&dims), |x: f32| R::of(f64::from(x)));
        let (one, keep) = (R::of(1.0), of(self.keep));
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let sees = |j| j + q.dim().0 <= k.dim().0 + i;
                let mut weights = weights(q.row(i), &k, scale, sees, |_, score| score);
                let kind = |j: usize| (self.sinks.contains(&j), self.image.contains(&j));
                let of_kind =
                    |is: (bool, bool)| R::sum(weights.iter().filter(|x| kind(x.0) == is).map(|x| x.1));
                let [visual, others, rest] = [(true, true), (true, false), (false, true)].map(of_kind);
                // How far from the borders of what is chosen.
                let room = [of(self.most) * (visual + rest) - visual, visual + rest - of(self.least)];
                let later = k.dim().0 + i >= self.image.end.saturating_add(q.dim().0);
                let has = self.sinks.iter().any(|j| self.image.contains(j));
                let may = later && has && rest.value() != 0.0;
                if may && room.iter().all(|room| room.value() >= 0.0) {
                    let factor = one + (one - keep) * (visual + others) / rest;
                    for (j, weight) in &mut weights {
                        *weight = *weight
                            * match kind(*j) {
                                (true, _) => keep,
                                (false, true) => factor,
                                (false, false) => one,
                            };
                    }
                }
                let open = may && room.iter().any(|room| room.value().abs() < room.off());
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
                    if open {
                        *out = *out + (R::rounded(1.0, f64::INFINITY) - one);
                    }
                }
            }
            out
        });
        Ok((out, ()))
    }
}

composite!(Var, Qkv);

exhibit! {
    VarExhibit of Var, "dense", "VAR", "arXiv 2503.03321";
    "causal, where heads look at an image its sinks give some of their weight to its rest";
    not "without an image, or sinks in it: causal alone";
    tokens false;
    build(x, field) {
        let keys = x.k.dim().2;
        let sinks: Vec<usize> = (0..keys).filter(|&j| field.at(1, 0, j, 0) > 0.9).collect();
        Var::builder(keys / 8..keys / 2, &sinks)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Var, VarExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, error, held};
    use ndarray::{Array4, s};

    #[test]
    fn kernels_keep_to_the_definition() {
        for (q_len, kv_len) in [(1, 1), (60, 130), (70, 3)] {
            let x = Qkvs::new([2, 2, 1, q_len, kv_len, 12, 17], 1);
            for image in [10..90, 0..kv_len, 4..4, 2..4000] {
                held(&Var::builder(image, &[90, 0, 12, 12, 65, 4000]).keep(0.3).build().unwrap(), x.qkv());
            }
        }
    }

    #[test]
    fn weights_sum_to_1_and_who_is_not_chosen_is_causal() {
        let mut x = Qkvs::new([1, 2, 2, 30, 30, 8, 6], 2);
        let dense = Dense::builder().causal().build().unwrap().reference(x.qkv()).unwrap();
        let of = |builder: VarBuilder, x: &Qkvs| builder.build().unwrap().reference(x.qkv()).unwrap();
        let var = || Var::builder(3..20, &[0, 7]);
        for same in [var().keep(1.0), Var::builder(3..20, &[0]), var().least_on_image(1.0)] {
            close(&of(same, &x), &dense, 1e-12);
        }
        // All are chosen, but queries of the image and before.
        let chosen = var().most_on_sinks(1.0).least_on_image(0.0);
        let out = of(chosen.clone(), &x);
        let early = s![.., .., ..20, ..];
        close(&out.slice(early).to_owned(), &dense.slice(early).to_owned(), 1e-12);
        assert!(
            out.slice(s![.., .., 20.., 0]).iter().zip(dense.slice(s![.., .., 20.., 0])).all(|(a, b)| a != b)
        );
        x.v.fill(1.0);
        close(&of(chosen, &x), &Array4::ones(out.dim()), 1e-12);
        let keep = error(var().keep(1.5).build());
        assert_eq!(keep, "keep: expected a number from 0 to 1, got 1.5");
    }
}
