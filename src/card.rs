//! A mechanism's card, and how to show it on an input: what catalogue, tests,
//! benches and the table of the README are made from. It stands in the
//! mechanism's own file.

use ndarray::{Array2, Array3, Array4};

use crate::attention::Input;
use crate::element::Element;
use crate::engine::recur::Form;
use crate::error::Result;
use crate::input::Qkv;
use crate::simd::Isa;

/// What there is to say of a mechanism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its name, as its paper has it.
    pub name: &'static str,
    /// The module that it lives in.
    pub family: &'static str,
    /// Its type.
    pub mechanism: &'static str,
    /// Where it was published.
    pub source: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// When something else does better.
    pub when_not: &'static str,
}

/// A mechanism in the catalogue: how it is built for an input, and how its own
/// input comes from queries, keys and values. Written with [`exhibit!`].
pub(crate) trait Exhibit: 'static {
    const CARD: &'static Card;

    /// Whether queries and keys are the same tokens, so that there are as many
    /// of the ones as of the others.
    const TOKENS: bool;

    /// Configurations that [`build`](Self::build) knows, of which the first is
    /// the catalogue's; tests take all.
    #[cfg(test)]
    const VARIANTS: usize;

    type Mechanism: Send + Sync;
    type Input<'a, T: Element>: Input<Out = T> + Send + Sync;

    /// The mechanism for inputs of these sizes.
    fn build<T: Element>(x: &Qkv<'_, T>, isa: Option<Isa>, field: &Field) -> Result<Self::Mechanism>;

    /// What else it takes.
    fn extras<T: Element>(x: &Qkv<'_, T>, field: &Field) -> Extras<T>;

    fn input<'a, T: Element>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> Self::Input<'a, T>;
}

/// Declares an [`Exhibit`]: a mechanism with its card, a builder for inputs of
/// the sizes of `x`, arrays besides queries, keys and values made from a seed,
/// and the input of all of them. With `card of TYPE` the card is the type's own.
macro_rules! exhibit {
    (
        $(#[$meta:meta])*
        $exhibit:ident of $mechanism:ty, $family:literal, $name:literal, $source:literal;
        $summary:literal;
        not $when_not:literal;
        tokens $tokens:literal $(, forms $form:ident)? $(, variants $variants:literal)?;
        build($x:pat, $field:pat) $build:block
        $(extras($ex:pat, $efield:pat) $extras:block)?
        input<$lt:lifetime, $t:ident>($ix:pat, $iextras:pat) -> $input:ty $body:block
    ) => {
        $(#[$meta])*
        pub(crate) struct $exhibit;
        impl $crate::card::Exhibit for $exhibit {
            const CARD: &'static $crate::card::Card = &$crate::card::Card {
                name: $name,
                family: $family,
                mechanism: stringify!($mechanism),
                source: $source,
                summary: $summary,
                when_not: $when_not,
            };
            const TOKENS: bool = $tokens;
            #[cfg(test)]
            const VARIANTS: usize = 1 $(- 1 + $variants)?;
            type Mechanism = $mechanism;
            type Input<$lt, $t: $crate::element::Element> = $input;

            fn build<T: $crate::element::Element>(
                $x: &$crate::input::Qkv<'_, T>,
                isa: Option<$crate::simd::Isa>,
                field: &$crate::card::Field,
            ) -> $crate::error::Result<$mechanism> {
                let $field = field;
                let builder = $build;
                $(let builder = builder.$form(field.form);)?
                match isa {
                    Some(isa) => builder.isa(isa),
                    None => builder,
                }
                .build()
            }

            $crate::card::exhibit!(@extras $($ex, $efield, $extras)?);

            fn input<$lt, $t: $crate::element::Element>(
                $ix: $crate::input::Qkv<$lt, $t>,
                $iextras: &$lt $crate::card::Extras<$t>,
            ) -> $input $body
        }
    };
    (@extras) => {
        fn extras<T: $crate::element::Element>(
            _: &$crate::input::Qkv<'_, T>,
            _: &$crate::card::Field,
        ) -> $crate::card::Extras<T> {
            $crate::card::Extras::default()
        }
    };
    (@extras $x:pat, $field:pat, $extras:block) => {
        fn extras<T: $crate::element::Element>(
            $x: &$crate::input::Qkv<'_, T>,
            $field: &$crate::card::Field,
        ) -> $crate::card::Extras<T> $extras
    };
}
pub(crate) use exhibit;

/// [`Mechanism`](crate::attention::Mechanism) for a type whose card is that of
/// an exhibit.
macro_rules! carded {
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, $exhibit:ty) => {
        impl$(<$($param: $bound),+>)? $crate::attention::Mechanism for $mechanism {
            fn card(&self) -> &'static $crate::card::Card {
                <$exhibit as $crate::card::Exhibit>::CARD
            }
        }
    };
}
pub(crate) use carded;

/// Arrays besides queries, keys and values; those that a mechanism does not
/// take are empty.
pub(crate) struct Extras<T> {
    /// `[batch, heads, len]`
    pub(crate) decays: Array3<f32>,
    pub(crate) betas: Array3<f32>,
    /// `[batch, heads, len, dim]`
    pub(crate) channels: Array4<f32>,
    pub(crate) rates: Array4<f32>,
    pub(crate) keys: Array4<T>,
    /// `[batch, heads, len, value_dim]`
    pub(crate) values: Array4<T>,
    pub(crate) writes: Array4<f32>,
    /// `[batch, len, dim]`
    pub(crate) latents: Array3<T>,
    /// `[batch, len]`
    pub(crate) images: Array2<bool>,
    pub(crate) tags: Array2<u8>,
    /// `[heads, rows, cols]`
    pub(crate) matrices: [Array3<T>; 2],
}

impl<T: Element> Default for Extras<T> {
    fn default() -> Self {
        Self {
            decays: Array3::default((0, 0, 0)),
            betas: Array3::default((0, 0, 0)),
            channels: Array4::default((0, 0, 0, 0)),
            rates: Array4::default((0, 0, 0, 0)),
            keys: Array4::from_elem((0, 0, 0, 0), T::default()),
            values: Array4::from_elem((0, 0, 0, 0), T::default()),
            writes: Array4::default((0, 0, 0, 0)),
            latents: Array3::from_elem((0, 0, 0), T::default()),
            images: Array2::default((0, 0)),
            tags: Array2::default((0, 0)),
            matrices: [(); 2].map(|()| Array3::from_elem((0, 0, 0), T::default())),
        }
    }
}

impl<T: Element> Extras<T> {
    /// The keys of all heads, side by side, `[batch, kv_len, heads * head_dim]`.
    pub(crate) fn tokens(x: &Qkv<'_, T>) -> Array3<T> {
        let (batch, heads, len, dim) = x.k.dim();
        Array3::from_shape_fn((batch, len, heads * dim), |(b, t, c)| x.k[[b, c / dim, t, c % dim]])
    }

    /// Latents that are the same for all of the batch, as many as there are queries,
    /// `[batch, heads, q_len, value_dim]`.
    pub(crate) fn latents(x: &Qkv<'_, T>, field: &Field) -> Array4<T> {
        let (batch, heads, len, _) = x.q.dim();
        let at = |(_, h, t, c): (usize, usize, usize, usize)| T::from_f32(field.at(8, h, t, c));
        Array4::from_shape_fn((batch, heads, len, x.v.dim().3), at)
    }

    /// The values with as many heads as the queries have.
    pub(crate) fn pixels(x: &Qkv<'_, T>) -> Array4<T> {
        let ((batch, heads, _, _), (_, own, len, dim)) = (x.q.dim(), x.v.dim());
        Array4::from_shape_fn((batch, heads, len, dim), |(b, h, t, c)| {
            x.v.get([b, h * own / heads, t, c]).copied().unwrap_or_default()
        })
    }
}

/// Numbers that depend on a seed and on a head, a token and a channel alone:
/// the same for every sequence.
pub(crate) struct Field {
    pub(crate) seed: u64,
    /// Rounds to the storage type of the trial.
    pub(crate) round: fn(f32) -> f32,
    /// Makes a log decay of a number from -1 to 1.
    pub(crate) decay: fn(f32) -> f32,
    /// Which of an exhibit's configurations.
    pub(crate) variant: usize,
    pub(crate) form: Form,
}

impl Field {
    pub(crate) fn of<T: Element>(seed: u64) -> Self {
        let round = |x| T::from_f32(x).to_f32();
        Self { seed, round, decay: mild, variant: 0, form: Form::Auto }
    }

    /// From -1 to 1.
    pub(crate) fn at(&self, which: u64, head: usize, token: usize, channel: usize) -> f32 {
        let mut z = self.seed;
        for part in [which, head as u64, token as u64, channel as u64] {
            z = z.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
        }
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `[batch, heads, len]`
    pub(crate) fn tokens<T>(&self, which: u64, x: &Qkv<'_, T>, f: impl Fn(f32) -> f32) -> Array3<f32> {
        let (batch, heads, len, _) = x.q.dim();
        Array3::from_shape_fn((batch, heads, len), |(_, h, t)| f(self.at(which, h, t, 0)))
    }

    /// `[batch, heads, len, dim]`
    pub(crate) fn channels<T>(&self, which: u64, x: &Qkv<'_, T>, f: impl Fn(f32) -> f32) -> Array4<f32> {
        Array4::from_shape_fn(x.q.dim(), |(_, h, t, c)| f(self.at(which, h, t, c)))
    }

    /// Log decays of tokens, `[batch, heads, len]`.
    pub(crate) fn token_decays<T>(&self, x: &Qkv<'_, T>) -> Array3<f32> {
        self.tokens(1, x, self.decay)
    }

    /// Log decays of channels, `[batch, heads, len, dim]`.
    pub(crate) fn channel_decays<T>(&self, x: &Qkv<'_, T>) -> Array4<f32> {
        self.channels(1, x, self.decay)
    }

    /// `[heads, dim]`
    pub(crate) fn heads<T>(&self, which: u64, x: &Qkv<'_, T>) -> Array2<f32> {
        Array2::from_shape_fn((x.q.dim().1, x.q.dim().3), |(h, c)| self.at(which, h, 0, c))
    }
}

/// A log decay from a number from -1 to 1: half of what there was is gone
/// after some tokens.
fn mild(x: f32) -> f32 {
    -0.15 * (1.0 + x)
}

/// From 0 to 1.
pub(crate) fn share(x: f32) -> f32 {
    0.5 + 0.5 * x
}
