//! Reversed attention (DependencyViT): a token sends its value along its row of
//! weights.

use ndarray::{Array2, ArrayView3, ArrayViewMut4, ShapeBuilder};

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::heads::of_heads;
use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Call, Gains, Norm};
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input, Lengths, Qkv};
use crate::mask::Unmasked;
use crate::score::{KeyShift, Plain};
use crate::stages::attend::{Config, Options};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::scale;
use crate::stages::window::join;

input! {
    /// Queries, keys and values with a factor for what each token sends.
    ReversedInput(qkv) {
        /// Factors of values.
        gates: f32 [batch, heads/, len],
    }
}

/// Reversed attention (DependencyViT): a token sends its value along its row of
/// weights.
///
/// ```text
/// F     = softmax_j(scale q_i . k_j)
/// o_j   = sum_i F[i, j] g_i v_i
/// ```
///
/// `g` is given: in the model the softmax over heads of a projection, times a
/// message that shrinks from layer to layer. A sender's weights sum to `g_i`;
/// nothing is normalised for who receives. "Visual Dependency Transformers:
/// Dependency Tree Emerges from Reversed Attention" (arXiv 2304.03282).
///
/// Cost: `2 (2 head_dim + value_dim)` flops a pair: scores twice, once for the
/// sums of rows, and once with queries and keys in each other's places.
///
/// Attention whose rows send.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::{Reversed, ReversedInput}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::<f32>::ones((1, 3, 50, 32));
/// let gates = Array3::from_elem((1, 3, 50), 1.0 / 3.0);
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = Reversed::builder().build()?.forward(ReversedInput::new(qkv, gates.view()))?;
/// assert!(out.iter().all(|x| (x - 1.0 / 3.0).abs() < 1e-5));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Reversed {
    config: Config<Unmasked, Plain>,
}

impl Reversed {
    /// With the default scale.
    pub fn builder() -> ReversedBuilder {
        ReversedBuilder::with()
    }
}

options! {
    /// Builds a [`Reversed`].
    ReversedBuilder of Reversed, isa;
    own { scale: Option<f32> = None, in FINITE; }
    build(builder, config) {
        let options = Options { scale: builder.scale, isa: Some(config.isa), ..Options::default() };
        Ok(Reversed { config: options.build()? })
    }
}

impl ReversedBuilder {
    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Reversed {
    fn check<T: Element>(&self, x: &ReversedInput<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.qkv.lengths != Lengths::Full {
            let reason = "every token sends to every other one";
            return Err(Error::Conflict { option: "lengths", with: "reversed attention", reason });
        }
        let heads = x.gates.dim().1;
        if heads != 1 && heads != dims.q_heads {
            let (b, _, n) = x.gates.dim();
            let expected = format!("[batch, heads | 1, len] = [{b}, {} | 1, {n}]", dims.q_heads);
            return Err(Error::shape("gates", expected, x.gates.shape()));
        }
        match x.gates.iter().find(|gate| !gate.is_finite()) {
            Some(gate) => Err(Error::value("gates", "finite numbers", gate)),
            None => Ok(dims),
        }
    }
}

impl<T: Element> Pipeline<ReversedInput<'_, T>> for Reversed {
    type State = ();

    fn flow(
        &self,
        x: ReversedInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let Dims { batch, q_heads, q_len: n, head_dim, value_dim, .. } = self.check(&x)?;
        let (isa, rows) = (self.config.isa(), batch * q_heads * n);
        let q = join(pass, isa, q_heads, None, x.qkv.q.reborrow())?;
        let k = join(pass, isa, q_heads, None, x.qkv.k.reborrow())?;
        let v = join(pass, isa, q_heads, None, x.qkv.v.reborrow())?;
        let [sent, received] = [pass.take(rows)?, pass.take(rows)?];
        let mut sums = pass.rows((batch, q_heads, n, value_dim))?;
        let norm = Norm::Softmax { sinks: None };
        let pairs = (2 * rows as u64).saturating_mul(n as u64);

        // The logarithms of the sums of rows.
        let forth = self.config.call(Qkv::<f32>::new(q.view(), k.view(), v.view()), norm, None)?;
        let forth = forth.without_values();
        pass.stage(
            || pairs.saturating_mul(head_dim as u64),
            engine::workspace_bytes(&forth),
            |arena| {
                let lse = ArrayViewMut4::<f32>::from_shape((batch, q_heads, n, 1), &mut *sent).ok();
                let none = ArrayViewMut4::<f32>::from_shape((batch, q_heads, n, 0), &mut []).ok();
                if let (Some(none), Some(lse)) = (none, lse) {
                    engine::run_in(&forth, none, Some(lse), arena);
                }
                sent.iter_mut().for_each(|lse| *lse = -*lse);
            },
        );

        // Who receives asks, who sends is a key of weight e^-lse.
        let dim = (batch, q_heads, n);
        let one = ArrayView3::from_shape(dim.strides((0, 0, 0)), &[1f32]).expect("all the same");
        let gates = x.gates.broadcast(dim).expect("as many tokens, and heads or one");
        let gains = Gains { query: one, value: gates };
        let shift = KeyShift { shifts: sent, heads: q_heads };
        let back = self.config.call(Qkv::<f32>::new(k.view(), q.view(), v.view()), norm, Some(gains))?;
        let back = Call { score: &shift, ..back };
        let flops = || pairs.saturating_mul((head_dim + value_dim) as u64);
        pass.stage(flops, engine::workspace_bytes(&back), |arena| {
            let lse = ArrayViewMut4::<f32>::from_shape((batch, q_heads, n, 1), &mut *received).ok();
            if let (Some(to), Some(lse)) = (sums.view_mut(), lse) {
                engine::run_in(&back, to, Some(lse), arena);
            }
        });
        scale::run(pass, isa, &sums, |row| received[row].exp(), out);
        Ok(())
    }

    fn define<R: Real>(&self, x: ReversedInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let scale = R::rounded(self.config.scale(&dims), 1.0);
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let [q, k, v] = [&x.qkv.q, &x.qkv.k, &x.qkv.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let gate = |i: usize| R::of(f64::from(x.gates[[head.batch, head.of(x.gates.dim().1), i]]));
            let dot = |i: usize, j: usize| R::dot(q.row(i).iter().copied().zip(k.row(j).iter().copied()));
            // What each sends, and to whom: a score of -inf hides its receiver.
            let row = |i: usize| -> Vec<Option<R>> {
                let scores: Vec<R> = (0..k.dim().0).map(|j| dot(i, j) * scale).collect();
                let seen = |score: &&R| score.value() != f64::NEG_INFINITY;
                let mut weights =
                    softmax(&scores.iter().filter(seen).copied().collect::<Vec<_>>()).into_iter();
                scores.iter().map(|score| if seen(&score) { weights.next() } else { None }).collect()
            };
            let sent: Vec<Vec<Option<R>>> = (0..q.dim().0).map(row).collect();
            Array2::from_shape_fn(v.dim(), |(j, c)| {
                R::total(sent.iter().enumerate().filter_map(|(i, row)| Some((row[j]? * gate(i), v[[i, c]]))))
            })
        });
        Ok((out, ()))
    }
}

composite!(Reversed, ReversedInput);

exhibit! {
    ReversedExhibit of Reversed, "neighborhood", "reversed attention", "arXiv 2304.03282";
    "tokens send their values along their rows of weights, each times a gate";
    not "where every token has to gather something: who is attended to by nobody gets nothing";
    tokens true;
    build(_, _) { Reversed::builder() }
    extras(x, field) { Extras { betas: field.tokens(1, x, share), ..Extras::default() } }
    input<'a, T>(x, extras) -> ReversedInput<'a, T> { ReversedInput::new(x, extras.betas.view()) }
}
carded!(Reversed, ReversedExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Weights};
    use crate::dense::Dense;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};
    use ndarray::{Array3, Array4};

    #[test]
    fn kernels_follow_the_definition() {
        for (n, heads, scale) in [(70, 4, 0.3), (5, 1, 2.0), (300, 4, 0.1), (1, 4, 1.0), (0, 4, 1.0)] {
            let (x, gates) = (Qkvs::new([2, 4, 2, n, n, 10, 7], 1), array(2, (2, heads, n)));
            held(
                &Reversed::builder().scale(scale).build().unwrap(),
                ReversedInput::new(x.qkv(), gates.view()),
            );
        }
    }

    /// Values that are sent are those of the transposed weights.
    #[test]
    fn it_is_the_transpose() {
        let x = Qkvs::new([1, 2, 2, 40, 40, 10, 7], 1);
        let weights = Dense::builder().build().unwrap().reference_weights(x.qkv()).unwrap();
        let ones = Array3::ones((1, 1, 40));
        let reversed = Reversed::builder().build().unwrap();
        let got = reversed.reference(ReversedInput::new(x.qkv(), ones.view())).unwrap();
        let want = Array4::from_shape_fn(got.dim(), |(b, h, j, c)| {
            (0..40).map(|i| weights[[b, h, i, j]] * f64::from(x.v[[b, h, i, c]])).sum::<f64>()
        });
        close(&got, &want, 1e-12);
        // What a sender hands out is its gate, in all.
        let (gates, mut all) = (array(3, (1, 2, 40)), x.clone());
        all.v.fill(1.0);
        let out = reversed.reference(ReversedInput::new(all.qkv(), gates.view())).unwrap();
        for h in 0..2 {
            let sent: f64 = gates.slice(ndarray::s![0, h, ..]).iter().map(|&gate| f64::from(gate)).sum();
            assert!((out.slice(ndarray::s![0, h, .., 0]).sum() - sent).abs() < 1e-10);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (x, mut gates) = (Qkvs::new([1, 4, 4, 5, 5, 10, 7], 1), Array3::ones((1, 2, 5)));
        let refusal = |gates: &Array3<f32>| {
            let input = ReversedInput::new(x.qkv(), gates.view());
            Reversed::builder().build().unwrap().forward(input).unwrap_err().to_string()
        };
        assert_eq!(
            refusal(&gates),
            "gates: expected shape [batch, heads | 1, len] = [1, 4 | 1, 5], got [1, 2, 5]"
        );
        gates = Array3::from_elem((1, 1, 5), f32::INFINITY);
        assert_eq!(refusal(&gates), "gates: expected finite numbers, got inf");
    }
}
