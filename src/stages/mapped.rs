//! Linear attention of features: rows are mapped as they are loaded.

use crate::definition::recurrence::{Token, Update, row};
use crate::element::Element;
use crate::engine::recur::{Arrays, Decay, Keys, Normaliser, Place, Read, Rule, Source, Spec, copy_rows};
use crate::error::{Error, Result};
use crate::input::tokens::{Tokens, heads};
use crate::input::{Dims, Qkv};
use crate::math::features::{FeatureMap, FeatureRows};
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::Stream;
use crate::stages::map::as_lie;
use crate::stages::recur::Config;

/// Linear attention of features: what all mechanisms of that kind are.
pub(crate) struct Mapped<'a> {
    pub(crate) config: &'a Config,
    /// What is made of queries, and of keys.
    pub(crate) query: &'a dyn FeatureMap,
    pub(crate) key: &'a dyn FeatureMap,
    pub(crate) causal: bool,
    pub(crate) normaliser: Option<Normaliser>,
}

/// Elements that rows to be mapped are copied to at once.
const BLOCK: usize = 4096;

impl<'m> Mapped<'m> {
    pub(crate) fn dims<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = if self.causal { x.token_dims()? } else { x.dims()? };
        if dims.head_dim > BLOCK {
            return Err(Error::value("q", format!("a head_dim of at most {BLOCK}"), dims.head_dim));
        }
        self.query.check(dims.q_heads, dims.head_dim)?;
        self.key.check(dims.q_heads, dims.head_dim)?;
        Ok(dims)
    }

    pub(crate) fn spec<'a, T: Element>(&self, x: &'a Qkv<'_, T>) -> Result<Spec<'a>> {
        let dims = self.dims(x)?;
        let spec = Spec {
            dims,
            lengths: x.lengths,
            steps: 1,
            joined: false,
            silent: false,
            state_dim: self.key.dim(dims.head_dim),
            decay: Decay::None,
            rule: Rule::Add,
            read: if self.causal { Read::After } else { Read::Total },
            scale: self.config.scale_or_one(),
            normaliser: self.normaliser,
            form: self.config.form,
            isa: self.config.isa,
        };
        spec.checked()
    }

    pub(crate) fn source<'a, T: Element>(&self, x: &Qkv<'a, T>) -> MappedArrays<'a, 'm> {
        MappedArrays {
            arrays: Arrays::new(x, heads(x)),
            head_dim: x.q.dim().3,
            query: self.query,
            key: self.key,
        }
    }

    pub(crate) fn token<T: Element>(&self, x: &Qkv<'_, T>, at: &Place) -> Token {
        let of = heads(x);
        // Beyond the shorter of the two axes there is nothing.
        let is_query = at.tokens.start < x.q.dim().2;
        let is_key = at.tokens.start < x.k.dim().2;
        let k = if is_key { self.key.define(at.head, &row(&x.k, at, of)) } else { Vec::new() };
        let q = if is_query { self.query.define(at.head, &row(&x.q, at, of)) } else { Vec::new() };
        Token {
            v: if is_key { row(&x.v, at, of) } else { Vec::new() },
            decay: vec![1.0; k.len()],
            update: Update::Add,
            bonus: Vec::new(),
            q,
            k,
        }
    }

    pub(crate) fn roundings<T: Element>(&self, x: &Qkv<'_, T>) -> f64 {
        let of = heads(x);
        let most = |x: &ndarray::ArrayView4<'_, T>, map: &dyn FeatureMap| {
            let (batch, _, len, _) = x.dim();
            let mut most = 0f64;
            for batch in 0..batch {
                for head in 0..of {
                    for t in 0..len {
                        let row = row(x, &Place { batch, head, tokens: t..t + 1 }, of);
                        most = most.max(map.roundings(head, &row));
                    }
                }
            }
            most
        };
        most(&x.q, self.query) + most(&x.k, self.key)
    }
}

/// Arrays whose queries and keys are mapped as they are loaded.
pub(crate) struct MappedArrays<'a, 'm> {
    pub(crate) arrays: Arrays<'a>,
    pub(crate) head_dim: usize,
    pub(crate) query: &'m dyn FeatureMap,
    pub(crate) key: &'m dyn FeatureMap,
}

impl MappedArrays<'_, '_> {
    /// Features of keys alone, `stride` apart.
    pub(crate) fn key_features(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.map(isa, (self.key, at.head), self.arrays.rows(self.arrays.k, at), to, stride);
    }

    /// Features of rows, `stride` apart.
    fn map(
        &self,
        isa: Isa,
        (map, head): (&dyn FeatureMap, usize),
        rows: AnyRows<'_>,
        to: &mut [f32],
        stride: usize,
    ) {
        let dim = self.head_dim;
        let mut block = [0f32; BLOCK];
        let step = BLOCK / dim.max(1);
        for first in (0..rows.len()).step_by(step) {
            let end = (first + step).min(rows.len());
            let x = as_lie(isa, rows.part(first..end), &mut block);
            let features = &mut to[first * stride..];
            map.apply(isa, head, FeatureRows { rows: end - first, dim, x, features, stride });
        }
    }
}

impl Source for MappedArrays<'_, '_> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.map(isa, (self.query, at.head), self.arrays.rows(self.arrays.q, at), to, stride);
    }

    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>) {
        self.key_features(isa, at, to.k, to.stride);
        self.values(isa, at, to.v, to.value_stride);
    }

    fn values(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        copy_rows(isa, self.arrays.rows(self.arrays.v, at), to, stride);
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        self.arrays.streams(at)
    }
}

/// [`Recurrence`](crate::stages::recur::Recurrence) and its traits for a
/// mechanism whose method `mapped` gives a [`Mapped`].
macro_rules! mapped {
    ($mechanism:ty $(where [$param:ident: $bound:path])?) => {
        impl$(<$param: $bound>)? $crate::stages::recur::Recurrence for $mechanism {
            type Operands<'a, T: $crate::element::Element> = $crate::input::Qkv<'a, T>;

            fn config(&self) -> &$crate::stages::recur::Config {
                &self.config
            }

            fn arrays<'a, T: $crate::element::Element>(
                &'a self,
                x: &'a $crate::input::Qkv<'_, T>,
            ) -> $crate::engine::recur::Arrays<'a> {
                let x = x.reborrow();
                $crate::engine::recur::Arrays::new(&x, $crate::input::tokens::heads(&x))
            }

            fn spec<'a, T: $crate::element::Element>(
                &'a self,
                x: &'a $crate::input::Qkv<'_, T>,
            ) -> $crate::error::Result<$crate::engine::recur::Spec<'a>> {
                self.mapped().spec(x)
            }

            fn with_source<T: $crate::element::Element, R>(
                &self,
                x: &$crate::input::Qkv<'_, T>,
                run: impl FnOnce(&dyn $crate::engine::recur::Source) -> R,
            ) -> R {
                run(&self.mapped().source(x))
            }

            fn token<T: $crate::element::Element>(
                &self,
                x: &$crate::input::Qkv<'_, T>,
                at: &$crate::engine::recur::Place,
            ) -> $crate::definition::recurrence::Token {
                self.mapped().token(x, at)
            }

            fn roundings<T: $crate::element::Element>(&self, x: &$crate::input::Qkv<'_, T>) -> f64 {
                self.mapped().roundings(x)
            }
        }
        $crate::stages::recur::recurrent!($mechanism $(where [$param: $bound])?, Qkv);
    };
}
pub(crate) use mapped;
