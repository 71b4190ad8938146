//! What a thread works in: the operands of a chunk, loaded.

use crate::engine::recur::chunk::*;
use crate::engine::recur::source::{Keys, Place, Source};
use crate::engine::recur::{Decay, Rule, Spec};
use crate::simd::Simd;
use crate::simd::mem::{Ahead, Arena, bytes_for};

/// What one thread works in: the operands of a chunk as they are loaded, and
/// what is made of its decays.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) q: &'a mut [f32],
    pub(crate) k: &'a mut [f32],
    pub(crate) v: &'a mut [f32],
    pub(crate) decay: &'a mut [f32],
    pub(crate) beta: &'a mut [f32],
    pub(crate) a: &'a mut [f32],
    pub(crate) b: &'a mut [f32],
    /// As [`Keys`] has it.
    pub(crate) own: &'a mut [f32],
    /// Rows of outputs, `[chunk, width]`.
    pub(crate) out: &'a mut [f32],
    /// What one token leaves of each channel.
    pub(crate) coming: &'a mut [f32],
    /// What a sub-block leaves of each channel.
    pub(in crate::engine::recur) last: &'a mut [f32],
    /// Of a sub-block, for each vector of channels 1 if they are strong, else
    /// 0; of those the decays token by token, and to the sub-block's end.
    pub(in crate::engine::recur) strong: &'a mut [f32],
    pub(in crate::engine::recur) each: &'a mut [f32],
    pub(in crate::engine::recur) until: &'a mut [f32],
}

impl<'a> Work<'a> {
    fn sizes(g: &Geometry) -> [usize; 14] {
        let (rows, values) = (g.chunk * g.stride, g.chunk * g.width);
        let if_ = |yes: bool, n: usize| if yes { n } else { 0 };
        let low_rank = if_(g.rule == Rule::LowRank, rows);
        let channel = |n: usize| if_(g.decay == Decay::Channel, n);
        [
            rows,
            rows,
            values,
            if g.decay == Decay::Channel { rows } else { g.chunk },
            g.chunk,
            low_rank,
            low_rank,
            g.chunk,
            values,
            g.stride,
            channel(g.stride),
            channel(g.stride),
            channel(SUB * g.stride),
            channel(SUB * g.stride),
        ]
    }

    pub(crate) fn bytes(g: &Geometry) -> usize {
        Self::sizes(g).iter().map(|&n| bytes_for::<f32>(n)).sum()
    }

    pub(crate) fn take(arena: &mut Arena<'a>, g: &Geometry) -> Self {
        let [q, k, v, decay, beta, a, b, own, out, coming, last, strong, each, until] = Self::sizes(g);
        Self {
            q: arena.take(q),
            k: arena.take(k),
            v: arena.take(v),
            decay: arena.take(decay),
            beta: arena.take(beta),
            a: arena.take(a),
            b: arena.take(b),
            own: arena.take(own),
            out: arena.take(out),
            coming: arena.take(coming),
            last: arena.take(last),
            strong: arena.take(strong),
            each: arena.take(each),
            until: arena.take(until),
        }
    }

    /// Loads the queries of some tokens.
    pub(crate) fn load_queries(&mut self, spec: &Spec<'_>, g: &Geometry, source: &dyn Source, at: &Place) {
        if g.stride != g.rows {
            self.q.fill(0.0);
        }
        source.queries(spec.isa, at, self.q, g.stride);
    }

    /// Loads the keys of some tokens and what belongs to them.
    pub(crate) fn load_keys(&mut self, spec: &Spec<'_>, g: &Geometry, source: &dyn Source, at: &Place) {
        if g.stride != g.rows {
            for x in [&mut *self.k, &mut *self.a, &mut *self.b] {
                x.fill(0.0);
            }
            if g.decay == Decay::Channel {
                self.decay.fill(0.0);
            }
        }
        if g.width != spec.dims.value_dim {
            self.v.fill(0.0);
        }
        self.own.fill(1.0);
        let keys = Keys {
            k: self.k,
            v: self.v,
            decay: self.decay,
            beta: self.beta,
            a: self.a,
            b: self.b,
            own: self.own,
            stride: g.stride,
            value_stride: g.width,
        };
        source.keys(spec.isa, at, keys);
        self.add_ones(spec, g, at.tokens.len());
    }

    /// Loads the values of some tokens alone.
    pub(super) fn load_values(&mut self, spec: &Spec<'_>, g: &Geometry, source: &dyn Source, at: &Place) {
        if g.width != spec.dims.value_dim {
            self.v.fill(0.0);
        }
        source.values(spec.isa, at, self.v, g.width);
        self.add_ones(spec, g, at.tokens.len());
    }

    /// The column of the values that the sum of the weights is made of.
    fn add_ones(&mut self, spec: &Spec<'_>, g: &Geometry, len: usize) {
        if spec.normaliser.is_some() {
            for row in self.v.chunks_exact_mut(g.width).take(len) {
                row[spec.dims.value_dim] = 1.0;
            }
        }
    }

    /// Values into panels; those of the delta rule times beta. Returns whether
    /// all are finite. Meanwhile what comes next is prefetched.
    #[inline(always)]
    pub(super) fn put_values<S: Simd>(
        &self,
        s: S,
        g: &Geometry,
        len: usize,
        values: &mut [f32],
        ahead: &mut Ahead,
    ) -> bool {
        let mut zero = s.splat(0.0);
        for (panel, to) in values.chunks_exact_mut(g.value_panel()).enumerate() {
            let width = g.panel_width(panel);
            for t in 0..len {
                let from = &self.v[t * g.width + panel * g.panel..][..width];
                let to = &mut to[t * g.panel..][..width];
                ahead.prefetch_along(2);
                let beta = s.splat(if g.rule == Rule::Delta { self.beta[t] } else { 1.0 });
                zero = s.add(zero, zeros(s, from));
                for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
                    s.store(to, s.mul(s.load(from), beta));
                }
            }
            if g.rule == Rule::LowRank {
                to[len * g.panel..g.chunk * g.panel].fill(0.0);
            }
        }
        s.reduce_add(zero) == 0.0
    }
}
