//! Keys and values beside a grid, which every query sees.

use std::sync::Arc;

use ndarray::{ArrayView3, ShapeBuilder};

use crate::attention::Cost;
use crate::element::Element;
use crate::engine::call::{Sight, Virtual};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::input::global::GlobalQkv;
use crate::keys::grid::Order;
use crate::simd::mem::Heads;

/// How many there are.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    /// From which position on each is seen.
    from: Vec<isize>,
    plain: Arc<Order>,
}

impl Beside {
    /// `plain` are the grid's tokens as they lie.
    pub(crate) fn new(count: usize, plain: Arc<Order>) -> Self {
        Self { from: vec![0; count], plain }
    }

    pub(crate) fn len(&self) -> usize {
        self.from.len()
    }

    /// The grid's tokens as they lie.
    pub(crate) fn plain(&self) -> &Arc<Order> {
        &self.plain
    }

    /// Refuses an input that has none where there are some.
    pub(crate) fn none(&self) -> Result<()> {
        match self.len() {
            0 => Ok(()),
            n => Err(Error::value("global_k", format!("{n} keys beside the grid"), "none")),
        }
    }

    /// The keys of an input, which has been checked then.
    pub(crate) fn keys<'a, T: Element>(&'a self, x: &GlobalQkv<'a, T>) -> Result<Virtual<'a>> {
        x.dims()?;
        let dims = x.qkv.dims()?;
        let expected = (dims.batch, dims.kv_heads, self.len());
        for (argument, (b, h, n, _)) in [("global_k", x.global_k.dim()), ("global_v", x.global_v.dim())] {
            if (b, h, n) != expected {
                let want = format!("[batch, kv_heads, global, dim] = {expected:?} and dim");
                return Err(Error::shape(argument, want, &[b, h, n]));
            }
        }
        let log_weights = ArrayView3::from_shape(expected.strides((0, 0, 0)), &[0f32]).expect("all the same");
        let [k, v] = [x.global_k, x.global_v].map(|x| T::any(Heads::new(x)));
        Ok(Virtual { k, v, log_weights, seen: Sight::From(&self.from), q_start: Some(0) })
    }

    /// What a call of so many queries a head costs with them, given what it costs
    /// without.
    pub(crate) fn cost<T: Element>(&self, without: Cost, x: &GlobalQkv<'_, T>, queries: usize) -> Cost {
        let (_, heads, _, dim) = x.qkv.q.dim();
        let pairs = (2 * heads * queries).saturating_mul(self.len());
        let flops = pairs.saturating_mul(dim + x.qkv.v.dim().3) as u64;
        let bytes = ((x.global_k.len() + x.global_v.len()) * size_of::<T>()) as u64;
        Cost { flops: without.flops.saturating_add(flops), bytes: without.bytes.saturating_add(bytes) }
    }
}
