//! Mechanisms that find their plan by themselves, with what
//! [`select`](crate::select) offers, rather than by a scheme.

use ndarray::{Array4, ArrayView2, s};

use crate::attention::{Cost, Margins};
use crate::cache::{Cache, Cached};
use crate::definition::softmax::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence};
use crate::keys::{ATOM, Layout, Per};
use crate::score::{Plain, Score};
use crate::select::{Selected, Source};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::selecting::{self, Listing, Written};

/// The arrays of a call in `f64`, for definitions.
pub(crate) struct Exact {
    pub(crate) dims: Dims,
    pub(crate) sequences: Vec<Sequence>,
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
}

impl Exact {
    pub(crate) fn new<Q: Element, K: Element, O: Element>(x: &Qkv<'_, Q, K, O>) -> Result<Self> {
        let dims = x.dims()?;
        let sequences = (0..dims.batch).map(|i| x.lengths.sequence(&dims, i)).collect();
        let [k, v] = [&x.k, &x.v].map(|x| x.mapv(Element::to_f64));
        Ok(Self { dims, sequences, q: x.q.mapv(Element::to_f64), k, v })
    }

    /// The queries of a head, `[q_len, head_dim]`.
    pub(crate) fn q(&self, of: &Sequence, head: usize) -> ArrayView2<'_, f64> {
        self.q.slice(s![of.batch, head, of.queries.clone(), ..])
    }

    /// The keys that a query head reads, `[kv_len, head_dim]`.
    pub(crate) fn k(&self, of: &Sequence, head: usize) -> ArrayView2<'_, f64> {
        let head = head / (self.dims.q_heads / self.dims.kv_heads.max(1));
        self.k.slice(s![of.batch, head, of.keys.clone(), ..])
    }

    /// The plan of a layout whose lists are of candidates of `unit` keys: for a
    /// sequence and the first query head of a list `find` gives, for each block
    /// of queries, the list and what of it is in doubt.
    pub(crate) fn plan<I: Written>(
        &self,
        (per, q_block): (Per, usize),
        unit: usize,
        find: impl Fn(&Sequence, usize) -> Vec<[Vec<usize>; 2]>,
    ) -> Result<(I, Margins)> {
        let longest = |n: fn(&Sequence) -> usize| self.sequences.iter().map(n).max().unwrap_or(0);
        let (queries, keys) = (longest(|of| of.queries.len()), longest(|of| of.keys.len()));
        let layout = Layout { queries, keys, ..Layout::new(per, q_block, &self.dims) };
        let (mut offsets, mut entries) = (Vec::with_capacity(layout.lists()?), Vec::new());
        offsets.push(0);
        let mut margins = Margins::default();
        for of in &self.sequences {
            for head in 0..layout.heads() {
                // A group of no heads sees nothing.
                let group = layout.q_heads / layout.heads();
                let mut lists = if group == 0 { Vec::new() } else { find(of, head * group) };
                lists.resize(layout.blocks(), Default::default());
                for [list, doubt] in lists {
                    let range = |j: usize| j * unit..((j + 1) * unit).min(of.keys.len());
                    entries.extend(list.into_iter().map(|j| j as u32));
                    offsets.push(entries.len());
                    margins.doubtful.push(doubt.into_iter().map(range).collect());
                }
            }
        }
        let keys = self.sequences.iter().map(|of| of.keys.len()).collect();
        Ok((I::of(&Selected::new(layout, (offsets, entries), unit, keys))?, margins))
    }

    /// The values of a key/value head, `[kv_len, value_dim]`.
    pub(crate) fn v(&self, of: &Sequence, kv_head: usize) -> ArrayView2<'_, f64> {
        self.v.slice(s![of.batch, kv_head, of.keys.clone(), ..])
    }
}

/// A mechanism that finds its plan by itself. With [`planned!`] it is
/// [`Selecting`](crate::stages::selecting::Selecting).
pub(crate) trait Planned: Sized {
    type Index: Listing;

    fn config(&self) -> &Config<Order, Plain>;

    /// Bytes that [`find`](Self::find) works in.
    fn find_bytes(&self, source: &Source<'_>) -> Result<usize>;

    /// The plan.
    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<Self::Index>;

    /// The plan by definition, and what is in doubt.
    fn define_plan(&self, x: &Exact) -> Result<(Self::Index, Margins)>;

    /// What an index does to scores besides.
    fn score<'a>(&self, index: &'a Self::Index) -> impl Score + 'a {
        let _ = index;
        Plain
    }

    /// Multiply-adds that finding it takes, twice.
    fn find_flops(&self, source: &Source<'_>) -> u64;
}

/// The plan of arrays by definition.
pub(crate) fn define_plan<M: Planned, Q: Element, K: Element, O: Element>(
    mechanism: &M,
    x: &Qkv<'_, Q, K, O>,
) -> Result<(M::Index, Margins)> {
    mechanism.define_plan(&Exact::new(x)?)
}

/// The plan of a cache by definition.
pub(crate) fn define_cached<M: Planned, Q: Element, C: Cache + ?Sized, O: Element>(
    mechanism: &M,
    x: Cached<'_, Q, C, O>,
) -> Result<(M::Index, Margins)> {
    let held = x.held(&x.dims()?);
    let lengths = held.lengths(&x);
    let out = x.out;
    define_plan(mechanism, &Qkv { q: x.q.reborrow(), k: held.k.view(), v: held.v.view(), lengths, out })
}

/// The call on an index.
pub(crate) fn with_call<M: Planned, Q: Element, K: Element, O: Element, R>(
    mechanism: &M,
    x: Qkv<'_, Q, K, O>,
    index: &M::Index,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    let score = mechanism.score(index);
    selecting::with_scored_call(mechanism.config(), &score, x, index.plan(), run)
}

/// The call on an index over a cache.
pub(crate) fn with_call_cached<M: Planned, Q: Element, C: Cache + ?Sized, O: Element, R>(
    mechanism: &M,
    x: Cached<'_, Q, C, O>,
    index: &M::Index,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    let score = mechanism.score(index);
    selecting::with_call_cached(mechanism.config(), &score, x, index.plan(), run)
}

/// The attention on an index by definition.
pub(crate) fn define<M: Planned, Q: Element, K: Element, O: Element>(
    mechanism: &M,
    x: &Qkv<'_, Q, K, O>,
    index: &M::Index,
) -> Result<Reference> {
    index.plan().check(&x.dims()?, &x.lengths)?;
    let listed = mechanism.config().listed(index.plan()).with_score(mechanism.score(index));
    listed.definition(x.reborrow(), Normalisation::Softmax { sinks: None }, None)?.compute()
}

/// The same over a cache.
pub(crate) fn define_on_cached<M: Planned, Q: Element, C: Cache + ?Sized, O: Element>(
    mechanism: &M,
    x: Cached<'_, Q, C, O>,
    index: &M::Index,
) -> Result<Reference> {
    let held = x.held(&x.dims()?);
    let lengths = held.lengths(&x);
    let out = x.out;
    define(mechanism, &Qkv { q: x.q.reborrow(), k: held.k.view(), v: held.v.view(), lengths, out }, index)
}

/// What finding a plan costs.
pub(crate) fn price(mechanism: &impl Planned, source: &Source<'_>) -> Cost {
    Cost { flops: mechanism.find_flops(source), bytes: 0 }
}

/// [`Selecting`](crate::stages::selecting::Selecting) for a [`Planned`]
/// mechanism, from arrays and, with `caches`, from these too; with `gated` of what a
/// gate looks at.
macro_rules! planned {
    ($mechanism:ty, $index:ty) => {
        crate::stages::planned::planned!(@arrays $mechanism, $index, Qkv, x => x.reborrow(), x);
    };
    ($mechanism:ty, $index:ty, gated) => {
        crate::stages::planned::planned!(@arrays $mechanism, $index, Gated, x => x.looked_at(), x.qkv);
    };
    (@arrays $mechanism:ty, $index:ty, $input:ident, $x:ident => $seen:expr, $qkv:expr) => {
        impl<Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element>
            crate::stages::selecting::Selecting<$input<'_, Q, K, O>> for $mechanism
        {
            type Index = $index;

            fn select_bytes(&self, $x: $input<'_, Q, K, O>) -> crate::error::Result<usize> {
                use crate::stages::planned::Planned;
                crate::input::Input::dims(&$x)?;
                self.find_bytes(&crate::select::Source::new(self.config().isa(), $seen, None)?)
            }
            fn select_in(
                &self,
                $x: $input<'_, Q, K, O>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<$index> {
                use crate::stages::planned::Planned;
                crate::input::Input::dims(&$x)?;
                self.find(&crate::select::Source::new(self.config().isa(), $seen, None)?, workspace)
            }
            fn define_select(
                &self,
                $x: $input<'_, Q, K, O>,
            ) -> crate::error::Result<($index, crate::attention::Margins)> {
                crate::input::Input::dims(&$x)?;
                crate::stages::planned::define_plan(self, &$seen)
            }
            fn price_select(
                &self,
                $x: $input<'_, Q, K, O>,
            ) -> crate::error::Result<crate::attention::Cost> {
                use crate::stages::planned::{Planned, price};
                crate::input::Input::dims(&$x)?;
                Ok(price(self, &crate::select::Source::new(self.config().isa(), $seen, None)?))
            }
            fn with_call<R>(
                &self,
                $x: $input<'_, Q, K, O>,
                index: &$index,
                run: impl FnOnce(&crate::engine::call::Call<'_>) -> R,
            ) -> crate::error::Result<R> {
                crate::input::Input::dims(&$x)?;
                crate::stages::planned::with_call(self, $qkv, index, run)
            }
            fn define(
                &self,
                $x: $input<'_, Q, K, O>,
                index: &$index,
            ) -> crate::error::Result<crate::definition::softmax::Reference> {
                crate::input::Input::dims(&$x)?;
                crate::stages::planned::define(self, &$qkv, index)
            }
            fn price(
                &self,
                $x: $input<'_, Q, K, O>,
                index: &$index,
            ) -> crate::error::Result<crate::attention::Cost> {
                use crate::stages::{planned::Planned, selecting::Listing};
                crate::stages::selecting::price(self.config(), &$qkv, index.plan())
            }
        }
        crate::stages::selecting::selecting!($mechanism, $index, [Q, K, O] $input);
    };
    ($mechanism:ty, $index:ty, caches) => {
        crate::stages::planned::planned!(
            @caches [Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element]
            crate::cache::Cached<'_, Q, C, O>, $mechanism, $index, x => x, x
        );
    };
    ($mechanism:ty, $index:ty, gated caches) => {
        crate::stages::planned::planned!(
            @caches [
                Q: crate::element::Element, C: crate::cache::Cache + ?Sized,
                G: crate::cache::Cache + ?Sized, O: crate::element::Element
            ]
            crate::cache::GatedCache<'_, Q, C, G, O>, $mechanism, $index, x => x.looked_at(), x.cached
        );
    };
    (
        @caches [$($generics:tt)*] $input:ty, $mechanism:ty, $index:ty,
        $x:ident => $seen:expr, $cached:expr
    ) => {
        impl<$($generics)*> crate::stages::selecting::Selecting<$input> for $mechanism
        {
            type Index = $index;

            fn select_bytes(&self, $x: $input) -> crate::error::Result<usize> {
                use crate::stages::{planned::Planned, selecting::with_source};
                crate::input::Input::dims(&$x)?;
                with_source(self.config().isa(), $seen, |source| self.find_bytes(source))
            }
            fn select_in(
                &self,
                $x: $input,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<$index> {
                use crate::stages::{planned::Planned, selecting::with_source};
                crate::input::Input::dims(&$x)?;
                with_source(self.config().isa(), $seen, |source| self.find(source, workspace))
            }
            fn define_select(
                &self,
                $x: $input,
            ) -> crate::error::Result<($index, crate::attention::Margins)> {
                crate::input::Input::dims(&$x)?;
                crate::stages::planned::define_cached(self, $seen)
            }
            fn price_select(
                &self,
                $x: $input,
            ) -> crate::error::Result<crate::attention::Cost> {
                use crate::stages::{planned::{Planned, price}, selecting::with_source};
                crate::input::Input::dims(&$x)?;
                with_source(self.config().isa(), $seen, |source| Ok(price(self, source)))
            }
            fn with_call<R>(
                &self,
                $x: $input,
                index: &$index,
                run: impl FnOnce(&crate::engine::call::Call<'_>) -> R,
            ) -> crate::error::Result<R> {
                crate::input::Input::dims(&$x)?;
                crate::stages::planned::with_call_cached(self, $cached, index, run)
            }
            fn define(
                &self,
                $x: $input,
                index: &$index,
            ) -> crate::error::Result<crate::definition::softmax::Reference> {
                crate::input::Input::dims(&$x)?;
                crate::stages::planned::define_on_cached(self, $cached, index)
            }
            fn price(
                &self,
                $x: $input,
                index: &$index,
            ) -> crate::error::Result<crate::attention::Cost> {
                use crate::stages::{planned::Planned, selecting::Listing};
                crate::input::Input::dims(&$x)?;
                crate::stages::selecting::price_cached(self.config(), $cached, index.plan())
            }
        }
        crate::stages::selecting::selecting!(@kernel [$($generics)*] $input, $mechanism, $index);
    };
}
pub(crate) use planned;

/// Declares a mechanism that selects, and its builder: the options of all, and
/// its own a line each, with their docs.
///
/// ```text
/// sparse! {
///     /// What it is.
///     Mechanism;
///     /// Builds a [`Mechanism`].
///     Builder, always causal;               // or `never`, or `perhaps` with a method
///     given { weights: Array3<f32>; }       // what Builder::with is given
///     own {
///         /// What it is. Default: 64.
///         block: usize = 64;
///     }
///     check(this) { Ok(()) }                // a builder's own refusals
/// }
/// ```
macro_rules! sparse {
    (
        $(#[$meta:meta])* $mechanism:ident;
        $(#[$builder_meta:meta])* $builder:ident, $order:ident causal;
        given { $($given:ident: $given_type:ty;)* }
        own { $($(#[$doc:meta])* $own:ident: $type:ty = $default:expr;)* }
        check($this:ident) $check:block
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        pub struct $mechanism {
            config: $crate::stages::attend::Config<$crate::stages::listed::Order, $crate::score::Plain>,
            $($given: $given_type,)*
            $($own: $type,)*
        }

        $(#[$builder_meta])*
        #[derive(Clone, Debug)]
        pub struct $builder {
            options: $crate::stages::attend::Options<$crate::stages::listed::Order, $crate::score::Plain>,
            $($given: $given_type,)*
            $($own: $type,)*
        }

        impl $builder {
            fn with($($given: $given_type),*) -> Self {
                let mask = $crate::stages::listed::Order { causal: $crate::stages::planned::sparse!(@initial $order) };
                let options = $crate::stages::attend::Options { mask, ..Default::default() };
                Self { options, $($given,)* $($own: $default,)* }
            }

            $(
                $(#[$doc])*
                pub fn $own(mut self, $own: $type) -> Self {
                    self.$own = $own;
                    self
                }
            )*

            /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU, or
            /// what [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: $crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }

            /// Checks the options.
            ///
            /// # Errors
            /// [`Error::Value`](crate::Error::Value) or
            /// [`Error::Shape`](crate::Error::Shape) for an option out of its
            /// range, [`Error::Isa`](crate::Error::Isa) for an instruction set
            /// that the CPU lacks.
            pub fn build(self) -> $crate::error::Result<$mechanism> {
                let $this = &self;
                let checked: $crate::error::Result<()> = $check;
                checked?;
                let Self { options, $($given,)* $($own,)* } = self;
                Ok($mechanism { config: options.build()?, $($given,)* $($own,)* })
            }
        }
        $crate::stages::planned::sparse!(@causal $builder $order);
    };
    (@initial always) => { true };
    (@initial $other:ident) => { false };
    (@causal $builder:ident perhaps) => {
        impl $builder {
            /// A query sees no key after its position, where the last query sits
            /// at the last key. Default: every key may be selected.
            pub fn causal(mut self) -> Self {
                self.options.mask.causal = true;
                self
            }
        }
    };
    (@causal $builder:ident $other:ident) => {};
}
pub(crate) use sparse;

/// Refuses a block that is no whole number of [atoms](crate::keys::ATOM).
pub(crate) fn check_block(argument: &'static str, block: usize) -> Result<()> {
    if block > 0 && block.is_multiple_of(ATOM) {
        return Ok(());
    }
    Err(Error::value(argument, format!("a multiple of {ATOM} tokens"), block))
}

/// Refuses a count of none.
pub(crate) fn check_count(argument: &'static str, count: usize) -> Result<()> {
    if count > 0 { Ok(()) } else { Err(Error::value(argument, "at least 1", 0)) }
}

/// Refuses a base of a rotation that is none, and an odd number of channels to
/// be rotated, those of an array of this name and shape.
pub(crate) fn check_theta(
    theta: Option<f64>,
    channels: usize,
    array: &'static str,
    shape: &[usize],
) -> Result<()> {
    match theta {
        Some(theta) if !(theta.is_finite() && theta > 0.0) => {
            Err(Error::value("rope", "a positive base", theta))
        }
        Some(_) if channels % 2 == 1 => {
            Err(Error::shape(array, "an even number of channels, to be rotated", shape))
        }
        _ => Ok(()),
    }
}
