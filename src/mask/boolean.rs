//! Masks from arrays.

use ndarray::{ArrayView2, ArrayView4, Axis};

use super::{Mask, pack};
use crate::error::Result;
use crate::input::{Dims, PairRow, Pairs, Site};

/// What a query sees is written in an array: `true` is visible.
///
/// The view is `[batch, q_heads, q_len, kv_len]` of any strides, and each
/// axis may be 1 instead, which stands for all of them: [`of_pairs`](Self::of_pairs) and
/// [`of_keys`](Self::of_keys) make it of a matrix.
///
/// The array is read where a tile needs it, and nothing is skipped because
/// of it; a mask that can be said in words costs less said so. Where key
/// lengths are given, the last axis has still the `kv_len` of the arrays.
///
/// # Errors
/// A call is refused whose sizes the view does not have. In a packed batch
/// the first axis counts sequences and the two last must be 1.
#[derive(Clone, Debug)]
pub struct Boolean<'a>(Pairs<'a, bool>);

impl<'a> Boolean<'a> {
    /// A mask from a view `[batch | 1, q_heads | 1, q_len | 1, kv_len | 1]`.
    pub fn new(visible: ArrayView4<'a, bool>) -> Self {
        Self(Pairs::new(visible))
    }

    /// A mask from a matrix `[q_len | 1, kv_len | 1]` that serves every sequence and
    /// head.
    ///
    /// ```
    /// use attention_kernels::mask::Boolean;
    /// use ndarray::array;
    ///
    /// let visible = array![[true, false, false], [true, false, true]];
    /// let mask = Boolean::of_pairs(visible.view());
    /// ```
    pub fn of_pairs(visible: ArrayView2<'a, bool>) -> Self {
        Self::new(visible.insert_axis(Axis(0)).insert_axis(Axis(0)))
    }

    /// A mask from a matrix `[batch | 1, kv_len]` that says which keys of each sequence
    /// are tokens and which are padding, anywhere among them. Where all padding follows
    /// the tokens, [`key_lengths`](crate::Qkv::key_lengths) says so for less: what lies
    /// there is then never read.
    ///
    /// ```
    /// use attention_kernels::dense::Dense;
    /// use attention_kernels::mask::{Boolean, Causal, Mask};
    /// use ndarray::array;
    ///
    /// let tokens = array![[false, true, true], [true, true, true]];
    /// let mask = Causal::new().and(Boolean::of_keys(tokens.view()));
    /// let dense = Dense::builder().mask(mask).build()?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    #[doc(alias = "padding")]
    #[doc(alias = "key_padding_mask")]
    pub fn of_keys(tokens: ArrayView2<'a, bool>) -> Self {
        Self::new(tokens.insert_axis(Axis(1)).insert_axis(Axis(1)))
    }
}

impl Mask for Boolean<'_> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.0.row(site, query).and_then(|row| row.get(key)).unwrap_or(false)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        match self.0.row(site, query) {
            None | Some(PairRow::Same(false)) => 0,
            Some(PairRow::Same(true)) => u64::MAX,
            Some(PairRow::Slice(row)) => slice_bits(row.get(first..).unwrap_or(&[])),
            Some(PairRow::Strided(matrix, query)) => {
                pack(matrix.cols().saturating_sub(first).min(64), |t| matrix.at(query, first + t))
            }
        }
    }
    fn is_opaque(&self) -> bool {
        true
    }
    fn is_shared(&self) -> bool {
        self.0.is_shared()
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check("mask", "a boolean mask with a length axis", dims)
    }
}

/// The first 64 of a slice as bits.
#[inline(always)]
fn slice_bits(x: &[bool]) -> u64 {
    let Some(x) = x.first_chunk::<64>() else {
        return pack(x.len(), |t| x[t]);
    };
    // Eight bytes of 0 or 1 times this constant have their bits, in order,
    // in the topmost byte.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let (bytes, _) = x.as_chunks::<8>();
    bytes.iter().enumerate().fold(0, |bits, (i, bytes)| {
        bits | (u64::from_le_bytes(bytes.map(u8::from)).wrapping_mul(GATHER) >> 56) << (8 * i)
    })
}
