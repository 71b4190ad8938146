//! Memora: a memory whose weights are shares, which its training leaves near what they
//! were in relative entropy.

use crate::card::{carded, exhibit};
use crate::element::Element;
use crate::engine::online::{Loss, Memory, Online, Retention};
use crate::error::Result;
use crate::input::retained::MirasQkv;
use crate::stages::online::{Learning, Learns, extras, learning, learning_options, rate};
use crate::stages::options::options;

/// Memora: a memory whose weights are shares, which its training leaves near what they
/// were in relative entropy.
///
/// ```text
/// Z_t = log softmax(keep_t Z_{t-1} - step_t k_t (k_t^T W_r - v_t)^T),   W = exp(Z)
/// y_t = q_t^T W
/// ```
///
/// "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias,
/// Retention, and Online Optimization" (Miras, arXiv 2504.13173). The softmax is over the
/// channels of the key, so that an output is a mean of the query's channels; logarithms are
/// at least -80, and memories start with equal shares.
///
/// The size of a [`chunk`](MemoraBuilder::chunk) is part of the definition: its first token
/// takes the softmax, and gradients of the others are of those weights, which they read
/// too; `Z` adds up, and the last token takes the softmax of that and reads it. With chunks
/// of 1 or 2 it is the formula above with `r = t - 1`.
///
/// The published error bound is that of likely errors, as long as steps are not so large
/// that the memory diverges.
///
/// Cost: `6 head_dim value_dim + 128 (head_dim + value_dim)` flops a token and head, and `4
/// head_dim value_dim` exponentials a chunk.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{Memora, MirasQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let (keep, step) = (Array3::from_elem((1, 2, 100), 0.98), Array3::from_elem((1, 2, 100), 0.1));
///
/// let memora = Memora::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = memora.forward(MirasQkv::new(qkv, keep.view(), step.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// The [`State`](crate::linear::State) is `[sequences, heads, 2, weights and more]`: a row
/// of `Z` and one of `W`, row by row; behind `Z` are the tokens of the chunk so far.
#[derive(Clone, Debug)]
pub struct Memora {
    learning: Learning,
}

impl Memora {
    /// Shares that sum to 1.
    pub fn builder() -> MemoraBuilder {
        MemoraBuilder::with()
    }
}

options! {
    /// Builds a [`Memora`].
    MemoraBuilder of Memora, form;
    own { chunk: usize = 64; }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        let rules = (Loss::Squared { factor: 1.0, mean: false }, Retention::Softmax);
        let learning = Learning::new(config, rules, this.chunk, this.normalize_qk, Memory::default())?;
        Ok(Memora { learning })
    }
}

learning_options!(MemoraBuilder { chunk });

impl<T: Element> Learns<MirasQkv<'_, T>> for Memora {
    fn learning(&self) -> &Learning {
        &self.learning
    }

    fn online<'a>(&'a self, x: &'a MirasQkv<'_, T>) -> Result<Online<'a>> {
        self.learning.retained(x)
    }
}
learning!(Memora, MirasQkv);

exhibit! {
    MemoraExhibit of Memora, "linear", "Memora", "arXiv 2504.13173";
    "a memory of shares, which its training leaves near what they were";
    not "where outputs are no means of a query's channels: Titans has weights of any sign";
    tokens true, forms form, variants 3;
    build(_, field) {
        // The token that tests spoil begins a chunk.
        Memora::builder().normalize_qk().chunk([14, 70, 1][field.variant])
    }
    extras(x, field) { extras(x, field, 0.2) }
    input<'a, T>(x, extras) -> MirasQkv<'a, T> {
        MirasQkv::new(x, rate(extras, 1), extras.betas.view())
    }
}
carded!(Memora, MemoraExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::testing::{agree, array};
    use crate::{Attention, Recurrent};
    use ndarray::{Array3, Axis, s};

    #[test]
    fn weights_are_shares_and_a_second_token_is_exact() {
        let (q, k, v) = (array([1, 2, 41, 8], 1), array([1, 2, 41, 8], 2), array([1, 2, 41, 5], 3));
        let (keep, step) = (Array3::from_elem((1, 2, 41), 0.9), Array3::from_elem((1, 2, 41), 0.7));
        let x = MirasQkv::new(Qkv::new(q.view(), k.view(), v.view()), keep.view(), step.view());
        let of = |chunk| Memora::builder().normalize_qk().chunk(chunk).build().unwrap();
        let (one, two, more) = (of(1), of(2), of(9));
        // 41 tokens end in the middle of a chunk, whose first token is exact too.
        agree(&two.reference(x).unwrap(), &one.reference(x).unwrap());
        assert!(more.reference(x).unwrap() != one.reference(x).unwrap());
        for memora in [one, two, more] {
            let mut state = memora.initial_state(x).unwrap();
            memora.prefill(x, &mut state).unwrap();
            let shares = state.view().slice(s![0, .., 1, ..40]).to_owned();
            assert!(shares.iter().all(|&x| x > 0.0));
            let sums = shares.into_shape_with_order((2, 8, 5)).unwrap().sum_axis(Axis(1));
            assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5), "{sums}");
        }
    }

    #[test]
    fn refusals() {
        let (x, rate) = (array([1, 2, 6, 8], 1), Array3::from_elem((1, 2, 6), 1.25));
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let memora = Memora::builder().build().unwrap();
        let error = memora.forward(MirasQkv::new(qkv, rate.view(), rate.view())).unwrap_err().to_string();
        assert_eq!(error, "keep: expected a number from 0 to 1, got 1.25");
    }
}
