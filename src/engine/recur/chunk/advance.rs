//! *Advance*: the values that are written, and the state after them.

use crate::engine::recur::Rule;
use crate::engine::recur::chunk::*;
use crate::simd::mem::{Ahead, Rows};
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

/// What is written under the keys of a chunk, of its values and the state at
/// the chunk's start: one panel.
pub(crate) struct Write<'a> {
    pub(crate) g: Geometry,
    pub(crate) len: usize,
    pub(crate) from: &'a Prepared<&'a [f32]>,
    /// `[columns, panel]`
    pub(crate) values: &'a mut [f32],
    /// `[rows, panel]`
    pub(crate) state: &'a [f32],
    pub(crate) width: usize,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (g, base) = (self.g, self.g.corrections());
        if g.rule != Rule::Add {
            let a = Rows::of_slice(self.from.probes, self.len, g.rows, g.stride);
            let values = &mut self.values[base * g.panel..];
            product(s, a, (self.state, g.panel), self.width, (values, g.panel), Update::Add, self.ahead);
            let n = &self.from.coefficients[base..];
            triangular(s, (n, g.columns), (values, g.panel), self.width, self.len, self.ahead);
        }
    }
}

/// The state at a chunk's end: one panel.
pub(crate) struct Advance<'a> {
    pub(crate) g: Geometry,
    pub(crate) len: usize,
    pub(crate) from: &'a Prepared<&'a [f32]>,
    /// `[columns, panel]`, rows so far apart.
    pub(crate) values: (&'a [f32], usize),
    /// `[rows, panel]`
    pub(crate) state: &'a mut [f32],
    pub(crate) width: usize,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Advance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let g = self.g;
        let a = Rows::of_slice(self.from.keys, g.rows, g.used(self.len), g.columns);
        let update = g.update(self.from.decay);
        product(s, a, self.values, self.width, (self.state, g.panel), update, self.ahead);
    }
}
