//! What the linear mechanisms have in common: options and checks.

use ndarray::{ArrayView, Axis};

use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::simd::mem::PLACES;
use crate::simd::{Isa, Kernel, Simd};

/// In which form a recurrence is computed. Results differ by rounding alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Form {
    /// Token by token for a few tokens, in chunks otherwise.
    #[default]
    Auto,
    /// In chunks, as matrix products.
    Chunked,
    /// Token by token: what decoding does, and the definition of the
    /// recurrence. For long inputs several times slower.
    Recurrent,
}

/// Options that every linear mechanism has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) scale: Option<f32>,
    pub(crate) form: Form,
    pub(crate) isa: Option<Isa>,
    pub(crate) growth: bool,
}

/// [`Options`] that have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) scale: Option<f32>,
    pub(crate) form: Form,
    pub(crate) isa: Isa,
    pub(crate) growth: bool,
}

impl Options {
    pub(crate) fn build(self) -> Result<Config> {
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::value("scale", "a finite number", scale));
        }
        let Self { scale, form, isa, growth } = self;
        Ok(Config { scale, form, isa: Isa::choose(isa)?, growth })
    }
}

impl Config {
    /// The factor of the outputs: what was asked for, or `1 / sqrt(head_dim)`.
    pub(crate) fn scale_or_sqrt(&self, dims: &Dims) -> f32 {
        self.scale.unwrap_or((1.0 / (dims.head_dim.max(1) as f64).sqrt()) as f32)
    }

    /// Refuses log decays above 0, unless growth was asked for.
    pub(crate) fn check_decays<D: ndarray::Dimension>(
        &self,
        argument: &'static str,
        decays: ArrayView<'_, f32, D>,
    ) -> Result<()> {
        if self.growth {
            return Ok(());
        }
        if any_above_zero(self.isa, decays.view()) {
            let largest = decays.fold(0f32, |most, &x| if x > most { x } else { most });
            let expected = "log decays of at most 0; allow_growth() permits others";
            return Err(Error::value(argument, expected, largest));
        }
        Ok(())
    }
}

/// Elements that a thread looks at by itself.
const PIECE: usize = 1 << 17;

fn any_above_zero<D: ndarray::Dimension>(isa: Isa, x: ArrayView<'_, f32, D>) -> bool {
    match (0..x.ndim()).map(Axis).find(|&axis| x.len_of(axis) > 1) {
        Some(axis) if x.len() > PIECE => {
            let middle = x.len_of(axis) / 2;
            let (a, b) = x.split_at(axis, middle);
            let (a, b) = parallel::both(|| any_above_zero(isa, a), || any_above_zero(isa, b));
            a || b
        }
        _ => match x.as_slice_memory_order() {
            Some(x) => isa.dispatch(AnyAboveZero(x)),
            // Folded without an exit and into an integer, which the compiler
            // turns into vectors.
            None => x.fold(0u32, |any, &x| any | u32::from(x > 0.0)) != 0,
        },
    }
}

/// Whether any element is above 0, read in several [`PLACES`] in turn.
struct AnyAboveZero<'a>(&'a [f32]);

impl Kernel for AnyAboveZero<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let part = self.0.len() / PLACES / S::LANES * S::LANES;
        let mut most = [s.splat(0.0); PLACES];
        for at in (0..part).step_by(S::LANES) {
            for place in 0..PLACES {
                // A NaN leaves what was there.
                most[place] = s.max(s.load(&self.0[place * part + at..]), most[place]);
            }
        }
        let rest = &self.0[PLACES * part..];
        most.iter().any(|&most| s.reduce_max(most) > 0.0) || rest.iter().any(|&x| x > 0.0)
    }
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
            crate::input::check_offsets("queries", queries, q_len)?;
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

fn divides(part: usize, whole: usize) -> bool {
    if part == 0 { whole == 0 } else { whole.is_multiple_of(part) }
}

/// The builder methods that every linear mechanism has.
macro_rules! linear_options {
    ($builder:ident) => {
        impl $builder {
            /// Forces a form. Default: [`Form::Auto`](crate::linear::Form::Auto).
            pub fn form(mut self, form: crate::linear::Form) -> Self {
                self.options.form = form;
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::simd::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }
        }
    };
    ($builder:ident, scale $default:literal) => {
        crate::linear::config::linear_options!($builder);
        impl $builder {
            #[doc = concat!("The factor of the outputs. Default: `", $default, "`.")]
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }
        }
    };
    ($builder:ident, scale $default:literal, growth) => {
        crate::linear::config::linear_options!($builder, scale $default);
        impl $builder {
            /// Permits log decays above 0, which let the state grow without
            /// bounds.
            pub fn allow_growth(mut self) -> Self {
                self.options.growth = true;
                self
            }
        }
    };
}
pub(crate) use linear_options;

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, s};

    #[test]
    fn growth_is_found_wherever_it_is() {
        for isa in Isa::available() {
            for len in [1, 7, 16, 127, 128, 129, 300] {
                let mut x = Array1::from_shape_fn(len, |i| [f32::NAN, f32::NEG_INFINITY, -0.0, -1.0][i % 4]);
                assert!(!any_above_zero(isa, x.view()), "{isa} {len}");
                for at in 0..len {
                    let before = std::mem::replace(&mut x[at], 1e-30);
                    assert!(any_above_zero(isa, x.view()), "{isa} {len} {at}");
                    assert_eq!(any_above_zero(isa, x.slice(s![..;2])), at % 2 == 0, "{isa} {len} {at}");
                    x[at] = before;
                }
            }
        }
    }
}
