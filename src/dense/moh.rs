//! Mixture-of-head attention: each token is read by some of the heads, whose
//! outputs count as a router says.

use ndarray::{ArrayView3, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv};
use crate::mask::Causal;
use crate::mask::routed::Routed;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::scale;

/// Queries, keys and values, and how much the output of each query and head
/// counts.
#[derive(Clone, Copy, Debug)]
pub struct WithGains<'a, T> {
    /// What is attended to.
    pub qkv: Qkv<'a, T>,
    /// Factors of outputs, `[batch, q_heads, q_len]`; what counts for nothing is not
    /// worked out, NaN or not.
    pub gains: ArrayView3<'a, f32>,
}

impl<T: Element> Input for WithGains<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let (dims, (batch, heads, len, _)) = (self.qkv.dims()?, self.qkv.q.dim());
        if self.gains.dim() != (batch, heads, len) {
            let expected = format!("[batch, q_heads, q_len] = [{batch}, {heads}, {len}]");
            return Err(Error::shape("gains", expected, self.gains.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        self.qkv.out_dim()
    }
}

/// The gains of the heads of a token: of its shared heads, which always count, and
/// of its routed heads, of which `active` do, the first of equal ones. `kinds`
/// are the logits of both kinds; where one kind has no heads, or none of the routed
/// ones counts, they are not looked at. Gains of each kind add up to as many as
/// count, times twice its share.
///
/// ```
/// use attention_kernels::dense::moh_gains;
/// // A router that has no opinion, of one shared head and two of two others.
/// assert_eq!(moh_gains(&[0.0], &[0.0, 0.0], [0.0, 0.0], 2), [1.0, 1.0, 1.0]);
/// assert_eq!(moh_gains(&[], &[0.3, 0.9, 0.3], [0.0; 2], 1), [0.0, 1.0, 0.0]);
/// ```
pub fn moh_gains(shared: &[f32], routed: &[f32], kinds: [f32; 2], active: usize) -> Vec<f32> {
    let softmax = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = x.iter().map(|x| (x - most).exp()).collect();
        let total: f32 = weights.iter().sum();
        weights.into_iter().map(move |x| x / total).collect::<Vec<_>>()
    };
    let active = active.min(routed.len());
    let both = !shared.is_empty() && active > 0;
    let kinds = if both { softmax(&kinds).iter().map(|x| 2.0 * x).collect() } else { vec![1.0; 2] };
    // A NaN comes last.
    let rank = |head: usize| if routed[head].is_nan() { f32::NEG_INFINITY } else { routed[head] };
    let mut order: Vec<usize> = (0..routed.len()).collect();
    order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
    let mut chosen = vec![f32::NEG_INFINITY; routed.len()];
    order[..active].iter().for_each(|&head| chosen[head] = routed[head]);
    let always = softmax(shared).into_iter().map(|x| kinds[0] * shared.len() as f32 * x);
    let rest = if active == 0 { vec![0.0; routed.len()] } else { softmax(&chosen) };
    always.chain(rest.into_iter().map(|x| kinds[1] * active as f32 * x)).collect()
}

/// Mixture-of-head attention: each token is read by some of the heads, whose
/// outputs count as a router says.
///
/// ```text
/// o_hi = g_hi sum_j softmax_j(scale q_hi . k_j) v_j          heads of no gain are left out
/// ```
///
/// "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842):
/// [`moh_gains`] makes gains of a router's logits. "BAM! Just Like That: Simple and
/// Efficient Parameter Upcycling for Mixture of Experts" (arXiv 2408.08274) has
/// heads of several experts, which the router's softmax weighs, none left out. What the
/// gained outputs are multiplied by and added up to is the caller's.
///
/// Cost: that of causal attention for the queries that count, in groups of 6
/// neighbours of a head, and a factor an element of the output. While
/// decoding, keys that no head of a group asks for are not read.
///
/// Causal attention whose heads count for some queries, each as much as its gain
/// says.
///
/// ```
/// use attention_kernels::dense::{Moh, WithGains, moh_gains};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 3, 50, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// // A shared head, and one of two others.
/// let each: Vec<Vec<f32>> =
///     (0..50).map(|i| moh_gains(&[0.0], &[(i as f32).sin(), 0.1], [0.0, 0.0], 1)).collect();
/// let gains = Array3::from_shape_fn((1, 3, 50), |(_, h, i)| each[i][h]);
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = Moh::builder().build()?.forward(WithGains { qkv, gains: gains.view() })?;
/// assert_eq!(out.dim(), (1, 3, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Moh {
    attend: Config<Causal, Plain>,
}

impl Moh {
    /// Causal attention.
    pub fn builder() -> MohBuilder {
        MohBuilder::with()
    }
}

options! {
    /// Builds a [`Moh`].
    MohBuilder of Moh, isa;
    build(this, config) {
        let options =
            Options { mask: Causal::new(), score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(Moh { attend: options.build()? })
    }
}

impl MohBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl<T: Element> Pipeline<WithGains<'_, T>> for Moh {
    type State = ();

    fn flow(
        &self,
        x: WithGains<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.attend.checked(x.dims()?)?;
        let mask = Routed { mask: Causal::new(), gains: x.gains, lengths: x.qkv.lengths };
        let mut whole = pass.rows(x.qkv.out_dim()?)?;
        self.attend.masked(mask).attend(pass, x.qkv.widened(), whole.view_mut())?;
        let (heads, len) = (dims.q_heads, dims.q_len);
        let gain = |row: usize| x.gains[[row / len / heads, row / len % heads, row % len]];
        scale::run(pass, self.attend.isa(), &whole, gain, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: WithGains<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.attend.checked(x.dims()?)?;
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let q = head.rows::<R, T>(&x.qkv.q, &head.queries);
            let [k, v] = [&x.qkv.k, &x.qkv.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let gains = x.gains.slice(s![head.batch, head.head, head.queries.clone()]);
            let sees = |i: usize, j: usize| gains[i] != 0.0 && j + q.dim().0 <= k.dim().0 + i;
            let mut out = attend([&q, &k, &v], self.attend.scale(&dims), sees, |_, _, score| score);
            for (mut row, &gain) in out.outer_iter_mut().zip(gains) {
                row.mapv_inplace(|x| x * R::of(f64::from(gain)));
            }
            out
        });
        Ok((out, ()))
    }
}

impl<T: Element> crate::input::tokens::Tokens for WithGains<'_, T> {
    fn bytes(&self) -> usize {
        crate::input::tokens::bytes(&self.qkv) + crate::input::tokens::size(&self.gains)
    }
}

composite!(Moh, WithGains);

exhibit! {
    MohExhibit of Moh, "dense", "MoH", "arXiv 2410.11842";
    "causal, each query is read by some of the heads, with gains";
    not "where every head counts the same: causal alone";
    tokens false;
    build(_, _) { Moh::builder() }
    extras(x, field) {
        let (batch, heads, len, _) = x.q.dim();
        let shared = heads / 4;
        let gains = |token: usize| {
            let logits = |which, heads: usize| (0..heads).map(|h| 2.0 * field.at(which, h, token, 0)).collect::<Vec<_>>();
            moh_gains(&logits(1, shared), &logits(2, heads - shared), [0.0; 2], (heads - shared).div_ceil(2))
        };
        let each: Vec<Vec<f32>> = (0..len).map(gains).collect();
        let decays = ndarray::Array3::from_shape_fn((batch, heads, len), |(_, h, i)| each[i][h]);
        Extras { decays, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithGains<'a, T> { WithGains { qkv: x, gains: extras.decays.view() } }
}
carded!(Moh, MohExhibit);

exhibit! {
    BamExhibit of Moh, "dense", "BAM", "arXiv 2408.08274";
    "the same with heads of several experts, weighed by a router, none left out";
    not "where experts differ in their feed-forward networks alone: causal alone";
    tokens false;
    build(_, _) { Moh::builder() }
    extras(x, field) {
        let (batch, heads, len, _) = x.q.dim();
        // Two experts, or one for each head.
        let experts = if heads.is_multiple_of(2) { 2.min(heads) } else { heads };
        let gain = |(_, h, i): (usize, usize, usize)| {
            let logits: Vec<f32> = (0..experts).map(|e| 2.0 * field.at(1, e, i, 0)).collect();
            moh_gains(&logits, &[], [0.0; 2], 0)[h / (heads / experts)] / experts as f32
        };
        Extras { decays: ndarray::Array3::from_shape_fn((batch, heads, len), gain), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithGains<'a, T> { WithGains { qkv: x, gains: extras.decays.view() } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, held, refused};
    use ndarray::{Array3, Array4};

    /// Every third query of a head counts, one whole tile does not.
    fn gains(heads: usize, len: usize) -> Array3<f32> {
        let gain = |(_, h, i): (usize, usize, usize)| {
            if (i + h) % 3 == 1 || (i > 40 && h == 1) { 0.0 } else { 1.5 - ((i + h) % 5) as f32 }
        };
        Array3::from_shape_fn((2, heads, len), gain)
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let moh = Moh::builder().build().unwrap();
        for (q_len, kv_len) in [(1, 300), (230, 260), (20, 3)] {
            let (x, gains) = (Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 1), gains(4, q_len));
            held(&moh, WithGains { qkv: x.qkv(), gains: gains.view() });
        }
        let (x, offsets) = (Qkvs::new([1, 4, 2, 90, 90, 12, 17], 2), [0, 30, 30, 90]);
        let gains = gains(4, 90).slice_move(s![..1, .., ..]);
        held(&moh, WithGains { qkv: x.qkv().packed(&offsets, &offsets), gains: gains.view() });
    }

    #[test]
    fn gains_are_factors_and_what_has_none_is_0() {
        let x = Qkvs::new([2, 4, 2, 60, 60, 12, 17], 1);
        let (moh, gains) = (Moh::builder().build().unwrap(), gains(4, 60));
        let dense = Dense::builder().causal().build().unwrap().reference(x.qkv()).unwrap();
        let want = Array4::from_shape_fn(dense.dim(), |(b, h, i, c)| {
            f64::from(gains[[b, h, i]]) * dense[[b, h, i, c]]
        });
        close(&moh.reference(WithGains { qkv: x.qkv(), gains: gains.view() }).unwrap(), &want, 1e-12);
        // A query that counts for nothing may be NaN.
        let mut spoilt = x.clone();
        for ((b, h, i), _) in gains.indexed_iter().filter(|x| *x.1 == 0.0) {
            spoilt.q.slice_mut(s![b, h, i, ..]).fill(f32::NAN);
        }
        let of = |x: &Qkvs| moh.forward(WithGains { qkv: x.qkv(), gains: gains.view() }).unwrap();
        assert_eq!(of(&spoilt), of(&x));
        let few = Array3::ones((2, 4, 59));
        let want = "gains: expected shape [batch, q_heads, q_len] = [2, 4, 60], got [2, 4, 59]";
        assert_eq!(refused(&moh, WithGains { qkv: x.qkv(), gains: few.view() }), want);
    }

    #[test]
    fn gains_of_routers() {
        let near = |got: Vec<f32>, want: &[f32]| {
            assert!(
                got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6),
                "{got:?}"
            );
        };
        // Odds of 3 to 1 of the kinds, and of the shared heads.
        let three = 3f32.ln();
        near(moh_gains(&[three, 0.0], &[1.0, 5.0, 5.0], [three, 0.0], 1), &[2.25, 0.75, 0.0, 0.5, 0.0]);
        near(moh_gains(&[], &[three, 0.0, -1.0], [9.0, 0.0], 2), &[1.5, 0.5, 0.0]);
        near(moh_gains(&[three, 0.0], &[1.0], [9.0, 0.0], 0), &[1.5, 0.5, 0.0]);
        assert!(moh_gains(&[], &[], [0.0; 2], 3).is_empty());
    }
}
