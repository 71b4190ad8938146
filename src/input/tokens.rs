//! Checks of arrays whose queries and keys are the same tokens.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::divides;
use crate::input::{Dims, Input, Lengths, Qkv, check_offsets};

/// An input whose queries and keys are the same tokens.
pub trait Tokens: Input {
    /// How rows belong to sequences.
    fn lengths(&self) -> Lengths<'_>;

    /// Bytes of all arrays.
    fn bytes(&self) -> usize;

    /// [`dims`](Input::dims), where queries and keys must be the same tokens.
    ///
    /// # Errors
    /// As `dims`.
    fn token_dims(&self) -> Result<Dims> {
        self.dims()
    }
}

impl<T: Element> Tokens for Qkv<'_, T> {
    fn lengths(&self) -> Lengths<'_> {
        self.lengths
    }

    fn bytes(&self) -> usize {
        bytes(self)
    }

    fn token_dims(&self) -> Result<Dims> {
        self.dims()?;
        token_dims(self)
    }
}

/// Bytes of an array.
pub(crate) fn size<A, D: ndarray::Dimension>(x: &ndarray::ArrayView<'_, A, D>) -> usize {
    x.len() * size_of::<A>()
}

/// The sizes of queries, keys and values whose tokens are the same, and which
/// may have different numbers of heads: each must divide the largest, and
/// heads of an array that has fewer are shared by neighbours. In the result
/// `q_heads` is the largest number, `kv_heads` that of the values.
pub(crate) fn token_dims<T>(x: &Qkv<'_, T>) -> Result<Dims> {
    token_dims_named(x, ["q", "k", "v"])
}

/// [`token_dims`] of arrays that the mechanism knows by other names.
pub(crate) fn token_dims_named<T>(x: &Qkv<'_, T>, names: [&'static str; 3]) -> Result<Dims> {
    let (batch, q_heads, q_len, head_dim) = x.q.dim();
    let (_, kv_heads, _, value_dim) = x.v.dim();
    let heads = q_heads.max(x.k.dim().1).max(kv_heads);
    for (i, (argument, view)) in names.into_iter().zip([&x.q, &x.k, &x.v]).enumerate() {
        let (b, h, n, d) = view.dim();
        let dim = if i == 2 { value_dim } else { head_dim };
        if b != batch || n != q_len || d != dim {
            let axes = if i == 2 { "value_dim" } else { "head_dim" };
            let expected =
                format!("[batch, heads, len, {axes}] = [{batch}, _, {q_len}, {dim}] as the others have it");
            return Err(Error::shape(argument, expected, view.shape()));
        }
        if (h == 0 && heads > 0) || (h > 0 && !heads.is_multiple_of(h)) {
            let [q, k, v] = names;
            let expected = format!("a number of heads that divides {heads}, the largest of {q}, {k} and {v}");
            return Err(Error::value(argument, expected, h));
        }
    }
    let mut dims =
        Dims { batch, q_heads: heads, kv_heads, q_len, kv_len: q_len, head_dim, value_dim, packed: false };
    match x.lengths {
        Lengths::Full => {}
        Lengths::Keys(_) => {
            let reason = "queries and keys are the same tokens; pack sequences of different lengths instead";
            return Err(Error::Conflict { option: "key_lengths", with: "a recurrence", reason });
        }
        Lengths::Packed { queries, keys } => {
            if batch != 1 {
                let expected = "[1, heads, total_len, head_dim] in a packed batch";
                return Err(Error::shape(names[0], expected, x.q.shape()));
            }
            check_offsets("queries", queries, q_len)?;
            if queries != keys {
                let expected = "the offsets of the queries, which are the same tokens";
                return Err(Error::value("keys", expected, format_args!("{keys:?}")));
            }
            dims.batch = queries.len() - 1;
            dims.packed = true;
        }
    }
    Ok(dims)
}

/// Refuses an array of one number a token, `[batch, heads, len]`, whose
/// number of heads does not divide the mechanism's.
pub(crate) fn check_tokens(
    argument: &'static str,
    x: &ndarray::ArrayView3<'_, f32>,
    batch: usize,
    dims: &Dims,
) -> Result<()> {
    let (b, h, n) = x.dim();
    if b == batch && n == dims.q_len && divides(h, dims.q_heads) {
        return Ok(());
    }
    let expected = format!("[batch, heads, len] = [{batch}, {} or a divisor, {}]", dims.q_heads, dims.q_len);
    Err(Error::shape(argument, expected, x.shape()))
}

/// Refuses an array of one number a token and channel, `[batch, heads, len,
/// dim]`, whose number of heads does not divide the mechanism's.
pub(crate) fn check_channels<T>(
    argument: &'static str,
    x: &ndarray::ArrayView4<'_, T>,
    batch: usize,
    dims: &Dims,
    dim: usize,
) -> Result<()> {
    let (b, h, n, d) = x.dim();
    if b == batch && n == dims.q_len && d == dim && divides(h, dims.q_heads) {
        return Ok(());
    }
    let expected =
        format!("[batch, heads, len, dim] = [{batch}, {} or a divisor, {}, {dim}]", dims.q_heads, dims.q_len);
    Err(Error::shape(argument, expected, x.shape()))
}

/// Heads that have a state: the largest number.
pub(crate) fn heads<T>(x: &Qkv<'_, T>) -> usize {
    x.q.dim().1.max(x.k.dim().1).max(x.v.dim().1)
}

/// Bytes of queries, keys and values.
pub(crate) fn bytes<T>(x: &Qkv<'_, T>) -> usize {
    (x.q.len() + x.k.len() + x.v.len()) * size_of::<T>()
}
