//! The entry of [`RandomFeatureAttention`], whose values are parameters: its
//! weights are seen key by key.

use ndarray::{Array3, Array4, ArrayViewMut4, Axis, s};

use super::{Entry, Trial, common};
use crate::attention::{Attention, Bounded, Cost};
use crate::card::Field;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::linear::{RANDOM_FEATURES, RandomFeatureAttention, RandomFeatureInput};
use crate::simd::Isa;

pub(super) const ENTRY: Entry = Entry {
    card: RANDOM_FEATURES,
    tokens: false,
    selects: false,
    weighs: true,
    make_f32: trial,
    make_f16: trial,
    make_bf16: trial,
};

fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
    let (field, features) = (Field::of::<T>(seed), 2);
    let ((_, heads, _, dim), value_dim) = (x.q.dim(), x.v.dim().3);
    let builder = RandomFeatureAttention::builder(dim, features).biased().seed(seed);
    let builder = match isa {
        Some(isa) => builder.isa(isa),
        None => builder,
    };
    let mechanism = builder.build()?;
    // A 1 takes what weights are read with, so that the bound holds for these
    // too.
    let value = |(h, r, c, v)| if c == dim { 1.0 } else { field.at(1 + r as u64, h, c, v) };
    let values = Array4::from_shape_fn((heads, features, dim + 1, value_dim), value);
    Ok(Box::new(OnRandomFeatures { mechanism, values, x }))
}

/// Random-feature attention on queries and keys. Its values are parameters:
/// of the values of the input it takes nothing but their dimension.
struct OnRandomFeatures<'a, T> {
    mechanism: RandomFeatureAttention,
    values: Array4<f32>,
    x: Qkv<'a, T>,
}

impl<T: Element> OnRandomFeatures<'_, T> {
    fn input(&self) -> RandomFeatureInput<'_, T> {
        RandomFeatureInput { q: self.x.q.reborrow(), k: self.x.k.reborrow(), values: self.values.view() }
    }

    /// What keys weigh for all features together: what each gives by itself,
    /// in `f32`, where the value of the 1 that is appended to it is its share.
    fn key_by_key<W: Clone + Default>(
        &self,
        run: impl Fn(RandomFeatureInput<'_, f32>) -> Result<Array4<W>>,
    ) -> Result<Array4<W>> {
        let (q, k) = (self.x.q.mapv(Element::to_f32), self.x.k.mapv(Element::to_f32));
        let ((batch, heads, q_len, dim), kv_len) = (q.dim(), k.dim().2);
        let mut values = Array4::zeros((heads, self.values.dim().1, dim + 1, 1));
        values.slice_mut(s![.., .., dim, ..]).fill(1.0 / kv_len.max(1) as f32);
        let mut weights = Array4::default((batch, heads, q_len, kv_len));
        for (j, mut to) in weights.axis_iter_mut(Axis(3)).enumerate() {
            let k = k.slice(s![.., .., j..j + 1, ..]);
            let of_key = run(RandomFeatureInput { q: q.view(), k, values: values.view() })?;
            to.assign(&of_key.index_axis(Axis(3), 0));
        }
        Ok(weights)
    }
}

impl<T: Element> Trial<T> for OnRandomFeatures<'_, T> {
    common!(self, self.mechanism, self.input());

    fn weights(&self) -> Result<Array4<f32>> {
        self.key_by_key(|x| self.mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.key_by_key(|x| self.mechanism.reference(x))
    }
}
