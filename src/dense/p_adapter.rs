//! p-adapter: attention weights that count less, or more, the farther apart the
//! features of query and value are.

use ndarray::Array2;

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::weights;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::Result;
pub use crate::input::features::WithFeatures;
use crate::input::{Input, Site};
use crate::simd::Simd;
use crate::simd::any::AnyArray;
use crate::simd::exp::power;
use crate::simd::mem::Heads;
use crate::stages::options::{Range, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole::{self, HIDDEN, RowFn};

/// `e`
const GUARD: f64 = 1e-8;

/// p-adapter: attention weights that count less, or more, the farther apart the
/// features of query and value are.
///
/// ```text
/// A    = softmax_j(scale q_i . k_j)
/// M_ij = A_ij ((A_ij + e) |f_i - v_j|^2 + n e^2)^((p - 2) / 2)      e = 1e-8, n features
/// o_i  = (sum_j M_ij v_j + b f_i) / (sum_j M_ij + b)                b = 2 mu / p
/// ```
///
/// "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models" (arXiv
/// 2312.10613): a step of message passing by the p-Laplacian over the graph of queries
/// and values, `p < 2` for graphs whose neighbours are not alike. Values `v` and `f` are
/// features of both sides, projected down. Between two kinds of tokens, where released
/// code looks at the block of queries and values alone, `b f_i` falls away:
/// [`own`](PAdapterBuilder::own) has it, for queries that are the last of the keys. Of a
/// difference of 0 the paper's power is infinite; `e` is where released code has it.
/// Pooling of image tokens, the gate and both projections are the caller's.
///
/// Cost: as dense attention, and some 40 flops and `3 value_dim` a pair; a thread holds the
/// scores of 48 queries with all keys, and as many distances.
///
/// Attention of a p-adapter.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::{PAdapter, WithFeatures}};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 50, 32), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let features = Array4::from_shape_fn((1, 2, 50, 8), |(_, _, i, c)| ((i + c) as f32).cos());
/// let qkv = Qkv::new(x.view(), x.view(), features.view());
/// let input = WithFeatures { qkv, features: features.view() };
/// let out = PAdapter::builder().own().build()?.forward(input)?;
/// assert_eq!(out.dim(), (1, 2, 50, 8));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PAdapter {
    config: Config,
    p: f32,
    mu: f32,
    own: bool,
}

impl PAdapter {
    /// Between two kinds of tokens.
    pub fn builder() -> PAdapterBuilder {
        PAdapterBuilder::with()
    }
}

const POWER: Range = Range::new(["a number from 1 to 4"; 2], |x| (1.0..=4.0).contains(&x));
const WEIGHT: Range = Range::new(["a number from 1e-3 to 1e6"; 2], |x| (1e-3..=1e6).contains(&x));

options! {
    /// Builds a [`PAdapter`].
    PAdapterBuilder of PAdapter, isa;
    flags {
        /// Each query is the key at its place, the last query the last key: its own
        /// features take part.
        own;
    }
    numbers {
        /// `p`. Default: 1.25.
        p: f32 = 1.25, in POWER;
        /// `mu`, of released code from 0.1 to 0.3. Default: 0.2.
        mu: f32 = 0.2, in WEIGHT;
    }
    build(this, config) { Ok(PAdapter { config, p: this.p, mu: this.mu, own: this.own }) }
}

impl PAdapterBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

/// The weights of a call.
struct Spread<'a> {
    of: &'a PAdapter,
    features: AnyArray<'a>,
}

impl RowFn for Spread<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, _: &Site, _: usize, row: &mut [f32], _: &mut [f32]) {
        whole::softmax(s, row);
    }

    fn features(&self) -> Option<AnyArray<'_>> {
        Some(self.features)
    }

    #[inline(always)]
    fn spread<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], squares: &[f32]) {
        let (n, half) = (self.features.dim().3 as f64, 0.5 * (self.of.p - 2.0));
        let (guard, least) = (s.splat(GUARD as f32), s.splat((n * GUARD * GUARD) as f32));
        // Without features all are as far apart; of a power of 0 all stay as they are.
        if n > 0.0 && half != 0.0 {
            for (row, squares) in row.chunks_mut(S::LANES).zip(squares.chunks(S::LANES)) {
                let (weight, square) = (s.load_tail(row), s.load_tail(squares));
                let far = power(s, s.mul_add(s.add(weight, guard), square, least), half);
                // What is hidden stays so, however far it is.
                let hidden = s.bits(s.lt(s.splat(0.0), s.div(s.splat(1.0), weight)));
                let spread = s.mul(weight, far);
                s.store_tail(row, s.select(s.mask(hidden), spread, weight));
            }
        }
        let own = 2.0 * self.of.mu / self.of.p;
        let share = 1.0 / (whole::sum(s, row, 0.0, |x| x) + own);
        for x in row.chunks_mut(S::LANES) {
            let weight = s.mul(s.load_tail(x), s.splat(share));
            s.store_tail(x, weight);
        }
        let place = usize::try_from(site.position(None, query)).ok();
        if let Some(x) = place.and_then(|place| row.get_mut(place)).filter(|_| self.of.own) {
            *x = share * own + if x.to_bits() == HIDDEN.to_bits() { 0.0 } else { *x };
        }
    }
}

impl<T: Element> Pipeline<WithFeatures<'_, T>> for PAdapter {
    type State = ();

    fn flow(
        &self,
        x: WithFeatures<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = whole::checked(x.dims()?)?;
        let f = Spread { of: self, features: T::any(Heads::new(x.features.reborrow())) };
        let scale = self.config.scale_or_sqrt(&dims) as f32;
        whole::run(pass, self.config.isa, (x.qkv, &dims), scale, &f, None, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: WithFeatures<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = whole::checked(x.dims()?)?;
        let (p, n) = (f64::from(self.p), dims.value_dim as f64);
        let b = R::rounded(2.0 * f64::from(self.mu) / p, 2.0);
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let [q, f] = [&x.qkv.q, &x.features].map(|x| head.rows::<R, T>(x, &head.queries));
            let [k, v] = [&x.qkv.k, &x.qkv.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let spread = |(j, weight): (usize, R)| {
                    let apart = f.row(i).into_iter().zip(v.row(j)).map(|(&f, &v)| f - v);
                    let square = R::dot(apart.map(|x| (x, x)));
                    let norm = (weight + R::of(GUARD)) * square + R::rounded(n * GUARD * GUARD, 1.0);
                    let power = 0.5 * (p - 2.0);
                    let rising = |x: f64| x.powf(power.abs());
                    let roundings = 8.0 + 2.0 * (power * norm.value().max(f64::MIN_POSITIVE).log2()).abs();
                    let far = norm.rising(rising, roundings);
                    let spread = if power < 0.0 { weight / far } else { weight * far };
                    (j, if power == 0.0 || n == 0.0 { weight } else { spread })
                };
                let scale = self.config.scale_or_sqrt(&dims);
                let spread: Vec<(usize, R)> =
                    weights(q.row(i), &k, scale, |_| true, |_, x| x).into_iter().map(spread).collect();
                let all = R::sum(spread.iter().map(|x| x.1)) + b;
                let place = (i + k.dim().0).checked_sub(q.dim().0).filter(|_| self.own);
                for (c, out) in out.iter_mut().enumerate() {
                    let read = R::total(spread.iter().map(|&(j, weight)| (weight / all, v[[j, c]])));
                    *out = place.map_or(read, |_| read + b / all * f[[i, c]]);
                }
            }
            out
        });
        Ok((out, ()))
    }
}

composite!(PAdapter, WithFeatures);

exhibit! {
    PAdapterExhibit of PAdapter, "dense", "p-adapter", "arXiv 2312.10613";
    "weights of a softmax times a power of the distance between features of query and value";
    not "where features of neighbours are alike: p = 2, which is dense attention";
    tokens false;
    build(_, _) { PAdapter::builder() }
    extras(x, field) { Extras { values: Extras::latents(x, field), ..Extras::default() } }
    input<'a, T>(x, extras) -> WithFeatures<'a, T> { WithFeatures { qkv: x, features: extras.values.view() } }
}
carded!(PAdapter, PAdapterExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::dense::Dense;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, error, held, refused};
    use ndarray::{Array4, s};

    /// Features that are values where both are the same tokens.
    fn own(x: &Qkvs) -> Array4<f32> {
        let (len, all) = (x.q.dim().2, x.v.dim().2);
        Array4::from_shape_fn((2, 4, len, x.v.dim().3), |(b, h, i, c)| x.v[[b, h / 2, all - len + i, c]])
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len, dim, value_dim) in [(1, 1, 5, 3), (50, 130, 12, 17), (3, 0, 4, 2), (2, 9, 0, 0)] {
            let x = Qkvs::new([2, 4, 2, q_len, kv_len, dim, value_dim], 1);
            let features = array(2, (2, 4, q_len, value_dim));
            for p in [1.0, 1.25, 2.0, 3.5] {
                let adapter = PAdapter::builder().p(p).mu(0.3).build().unwrap();
                worst = worst.max(held(&adapter, WithFeatures { qkv: x.qkv(), features: features.view() }));
            }
            if kv_len >= q_len {
                let adapter = PAdapter::builder().own().build().unwrap();
                worst = worst.max(held(&adapter, WithFeatures { qkv: x.qkv(), features: own(&x).view() }));
            }
        }
        println!("p-adapter: {worst:.3} of the bound");
    }

    /// Where `p` is 2, weights are those of a softmax, and `mu` is what they give up.
    #[test]
    fn p_of_2_is_dense_attention() {
        let x = Qkvs::new([2, 4, 2, 20, 60, 12, 7], 3);
        let dense = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
        let features = own(&x);
        let input = WithFeatures { qkv: x.qkv(), features: features.view() };
        let between = PAdapter::builder().p(2.0).mu(0.5).build().unwrap().reference(input).unwrap();
        close(&between, &(&dense / 1.5), 1e-12);
        let own = PAdapter::builder().p(2.0).mu(0.5).own().build().unwrap().reference(input).unwrap();
        close(&own, &((dense + 0.5 * features.mapv(f64::from)) / 1.5), 1e-12);
    }

    /// Below 2 a value that is near counts more than one that is far.
    #[test]
    fn near_values_count_more() {
        let mut x = Qkvs::new([2, 4, 2, 1, 2, 4, 1], 4);
        x.k.fill(0.0);
        x.v.slice_mut(s![.., .., 0, ..]).fill(1.0);
        x.v.slice_mut(s![.., .., 1, ..]).fill(5.0);
        let features = Array4::from_elem((2, 4, 1, 1), 2.0);
        let adapter = PAdapter::builder().p(1.0).mu(1e-3).build().unwrap();
        let out = adapter.forward(WithFeatures { qkv: x.qkv(), features: features.view() }).unwrap();
        // Distances of 1 and 3: weights of 1/2 (1/2)^(-1/2), and a third of that.
        let [near, far] = [0.5f64.sqrt(), 0.5f64.sqrt() / 3.0];
        let want = (near + 5.0 * far) / (near + far + 2e-3);
        assert!(out.iter().all(|&x| (f64::from(x) - want).abs() < 1e-5), "{out}, not {want}");
    }

    #[test]
    fn refusals() {
        let (x, few) = (Qkvs::new([1, 2, 1, 3, 4, 5, 6], 5), Array4::zeros((1, 2, 3, 5)));
        let adapter = PAdapter::builder().build().unwrap();
        let input = WithFeatures { qkv: x.qkv(), features: few.view() };
        let want =
            "features: expected shape [batch, q_heads, q_len, value_dim] = [1, 2, 3, 6], got [1, 2, 3, 5]";
        assert_eq!(refused(&adapter, input), want);
        assert_eq!(error(PAdapter::builder().p(0.5).build()), "p: expected a number from 1 to 4, got 0.5");
        assert_eq!(
            error(PAdapter::builder().mu(0.0).build()),
            "mu: expected a number from 1e-3 to 1e6, got 0"
        );
    }
}
