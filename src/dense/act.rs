//! ACT, attention calibration: sinks beside the first token give weight to the
//! other keys.

use ndarray::{Array2, ArrayView1};

use crate::card::{carded, exhibit};
use crate::definition::attend::weights;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::simd::Simd;
use crate::stages::options::{Range, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole::{self, HIDDEN, RowFn};

/// The sinks of a head: tokens that receive more than `threshold` on average of
/// the queries that see them, without the first of those. `received` is what each
/// key gets from all queries of a causal prompt, as
/// [`Weights::key_weights`](crate::Weights::key_weights) has it. The paper's
/// scripts have a threshold of 0.1.
///
/// ```
/// use attention_kernels::dense::act_sinks;
/// // Four queries: means 0.8, 0.1, 0.05 and 0.4.
/// let received = ndarray::array![3.2, 0.3, 0.1, 0.4];
/// assert_eq!(act_sinks(received.view(), 0.2), [3]);
/// ```
pub fn act_sinks(received: ArrayView1<'_, f32>, threshold: f32) -> Vec<usize> {
    let n = received.len();
    let sinks = received.iter().enumerate().filter(|&(j, &x)| x / (n - j) as f32 > threshold);
    sinks.map(|(j, _)| j).skip(1).collect()
}

/// ACT, attention calibration: sinks beside the first token give weight to the
/// other keys.
///
/// ```text
/// A = softmax(scale q_i . k_j)    causal;  m = sum of A over the sinks S of the head
/// A'_ij = beta A_ij                             j in S
///       = (1 + (1 - beta) m / (1 - m)) A_ij     otherwise
/// o_i = sum_j A'_ij v_j
/// ```
///
/// "Unveiling and Harnessing Hidden Attention Sinks" (arXiv 2406.15765). Weights
/// still sum to 1. Where all weight lies on sinks it stays there, which released
/// code divides by 0 for. Sinks are found by [`act_sinks`] in what keys receive on a prompt, and
/// stay for what is generated after it.
///
/// Cost: as dense attention; a thread holds the scores of 48 queries with all
/// keys. Heads without sinks are best left to [`Dense`](super::Dense).
///
/// Causal attention with calibrated weights.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Act};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// // Tokens 7 and 30 are sinks of the first head.
/// let act = Act::builder(vec![vec![7, 30], vec![]]).build()?;
/// let out = act.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Act {
    config: Config,
    /// Rising, of each head.
    sinks: Vec<Vec<usize>>,
    beta: f32,
}

impl Act {
    /// The sinks of each query head, counted from the start of a sequence.
    pub fn builder(sinks: Vec<Vec<usize>>) -> ActBuilder {
        ActBuilder::with(sinks)
    }
}

const SHARE: Range = Range::new(["a number from 0 to 1"; 2], |x| (0.0..=1.0).contains(&x));

options! {
    /// Builds an [`Act`].
    ActBuilder of Act, isa;
    given { sinks: Vec<Vec<usize>>; }
    numbers {
        /// How much of their weight sinks keep, from 0 to 1. Default: 0.4.
        beta: f32 = 0.4, in SHARE;
    }
    build(this, config) {
        let mut sinks = this.sinks;
        for head in &mut sinks {
            head.sort_unstable();
            head.dedup();
        }
        Ok(Act { config, sinks, beta: this.beta })
    }
}

impl ActBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl Act {
    fn checked<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = whole::checked(x.dims()?)?;
        if self.sinks.len() == dims.q_heads {
            return Ok(dims);
        }
        let expected = format!("those of each of the {} query heads", dims.q_heads);
        Err(Error::value("sinks", expected, self.sinks.len()))
    }
}

impl RowFn for Act {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], _: &mut [f32]) {
        let seen = site.position(None, query).saturating_add(1).clamp(0, row.len() as isize) as usize;
        let (row, later) = row.split_at_mut(seen);
        later.fill(HIDDEN);
        whole::softmax(s, row);
        let sinks = &self.sinks[site.head];
        let sinks = &sinks[..sinks.partition_point(|&j| j < seen)];
        let parts = || whole::between(0..seen, sinks);
        let mass: f32 = sinks.iter().map(|&j| row[j]).sum();
        let rest: f32 = parts().map(|part| whole::sum(s, &row[part], 0.0, |x| x)).sum();
        if mass == 0.0 || rest == 0.0 {
            return;
        }
        let factor = 1.0 + (1.0 - self.beta) * mass / rest;
        parts().for_each(|part| whole::scale(s, &mut row[part], factor));
        sinks.iter().for_each(|&j| row[j] *= self.beta);
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Act {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.checked(&x)?;
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
        let dims = self.checked(&x)?;
        let (scale, beta) = (self.config.scale_or_sqrt(&dims), R::of(f64::from(self.beta)));
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let is_sink = |j: usize| self.sinks[head.head].contains(&j);
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let sees = |j| j + q.dim().0 <= k.dim().0 + i;
                let mut weights = weights(q.row(i), &k, scale, sees, |_, score| score);
                let of = |sinks: bool| R::sum(weights.iter().filter(|x| is_sink(x.0) == sinks).map(|x| x.1));
                let (mass, rest) = (of(true), of(false));
                if mass.value() != 0.0 && rest.value() != 0.0 {
                    let factor = R::of(1.0) + (R::of(1.0) - beta) * mass / rest;
                    for (j, weight) in &mut weights {
                        *weight = *weight * if is_sink(*j) { beta } else { factor };
                    }
                }
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
                }
            }
            out
        });
        Ok((out, ()))
    }
}

composite!(Act, Qkv);

exhibit! {
    ActExhibit of Act, "dense", "ACT", "arXiv 2406.15765";
    "causal, sinks beside the first token give most of their weight to other keys";
    not "where a head has no sinks: causal alone";
    tokens false;
    build(x, field) {
        let sink = |h: usize| move |j: &usize| field.at(1, h, *j, 0) > 0.9;
        Act::builder((0..x.q.dim().1).map(|h| (1..x.k.dim().2).filter(sink(h)).collect()).collect())
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Act, ActExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, error, held, refused};
    use ndarray::Array4;

    #[test]
    fn kernels_keep_to_the_definition() {
        for (q_len, kv_len) in [(1, 1), (60, 130), (70, 3)] {
            let x = Qkvs::new([2, 2, 1, q_len, kv_len, 12, 17], 1);
            // Beyond the keys, too.
            let sinks = vec![vec![90, 0, 2, 2, 65, 4000], vec![1, 3]];
            held(&Act::builder(sinks).beta(0.3).build().unwrap(), x.qkv());
        }
    }

    #[test]
    fn weights_sum_to_1_and_what_stays_is_causal() {
        let mut x = Qkvs::new([1, 2, 2, 30, 30, 8, 6], 2);
        let act = |sinks: Vec<Vec<usize>>, beta| Act::builder(sinks).beta(beta).build().unwrap();
        let dense = Dense::builder().causal().build().unwrap();
        for same in [act(vec![vec![], vec![]], 0.4), act(vec![vec![3], vec![5, 6]], 1.0)] {
            close(&same.reference(x.qkv()).unwrap(), &dense.reference(x.qkv()).unwrap(), 1e-12);
        }
        x.v.fill(1.0);
        let out = act(vec![vec![0], vec![5, 6]], 0.4).reference(x.qkv()).unwrap();
        close(&out, &Array4::ones(out.dim()), 1e-12);
    }

    #[test]
    fn refusals() {
        let x = Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8);
        let act = Act::builder(vec![vec![]]).build().unwrap();
        assert_eq!(refused(&act, x.qkv()), "sinks: expected those of each of the 2 query heads, got 1");
        let beta = error(Act::builder(vec![]).beta(1.5).build());
        assert_eq!(beta, "beta: expected a number from 0 to 1, got 1.5");
    }
}
