//! How gradients of a call are cut up.

use crate::engine::parallel;
use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{COLUMNS, Geometry};
use crate::engine::recur::{Rule, Spec};
use crate::simd::MAX_LANES;
use crate::simd::mem::{bytes_for, bytes_for_shares, claim_words};

/// Chunks of a segment: a thread holds their states at once, and a checkpoint
/// for each segment.
pub(super) const SEGMENT: usize = 64;
/// A log decay below it leaves nothing.
pub(super) const NOTHING: f32 = -87.0;

/// Rows of `n` elements that start in different sets of a cache.
pub(super) fn apart(n: usize) -> usize {
    (n.div_ceil(MAX_LANES) | 1) * MAX_LANES
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) g: Geometry,
    /// From one row of a state to the next, and of a state transposed.
    pub(super) stride: usize,
    pub(super) turned: usize,
    pub(super) workers: usize,
    pub(super) units: usize,
    /// States that are kept of a unit, and segments of as many chunks.
    pub(super) kept: usize,
    pub(super) segments: usize,
    /// Numbers of a head's parameters, in the order of [`Gradients`].
    pub(super) parameters: [usize; 4],
}

impl Plan {
    pub(super) fn new(spec: &Spec<'_>, gradients: &Gradients<Dim>) -> Self {
        // States of chunks are kept: long ones. A state of no rows is worked out
        // as one of a row of nothing.
        let chunk = if spec.rule == Rule::LowRank { COLUMNS / 2 } else { COLUMNS };
        let g = Geometry::new(&Spec { state_dim: spec.state_dim.max(1), ..*spec });
        let g = Geometry { chunk, columns: COLUMNS, ..g };
        let longest =
            (0..spec.dims.batch).map(|i| spec.lengths.sequence(&spec.dims, i).keys.len()).max().unwrap_or(0);
        let chunks = longest.div_ceil(g.chunk);
        Self {
            g,
            stride: apart(g.cols),
            turned: apart(g.rows),
            workers: parallel::threads(),
            units: spec.dims.batch * spec.dims.q_heads,
            kept: chunks.min(SEGMENT),
            segments: chunks.div_ceil(SEGMENT).max(1),
            parameters: { *gradients }.take_parameters().map(|dim| dim.map_or(0, |dim| dim.3)),
        }
    }

    /// Numbers of all of a head's parameters.
    pub(super) fn parameters(&self) -> usize {
        self.parameters.iter().sum()
    }

    /// Elements of a state.
    pub(super) fn state(&self) -> usize {
        self.g.rows * self.stride
    }

    /// Elements of what corrections of a chunk have made, which is kept with its state.
    pub(super) fn corrected(&self) -> usize {
        if self.g.rule == Rule::Add { 0 } else { self.g.chunk * self.g.width }
    }

    /// Bytes for each thread.
    pub(super) fn share(&self) -> usize {
        Scratch::bytes(self)
            + bytes_for::<f32>(self.kept * self.state())
            + bytes_for::<f32>(self.segments * self.state())
            + bytes_for::<f32>(self.kept * self.corrected())
    }

    pub(super) fn bytes(&self, heads: usize, gradients: &Gradients<Dim>) -> usize {
        let mut bytes = bytes_for_shares(self.workers, self.share());
        bytes += bytes_for::<f64>(self.units * self.parameters()) + bytes_for::<u64>(claim_words(self.units));
        let mut arrays = *gradients;
        arrays.take_parameters();
        arrays.map(|dim| bytes += Sink::bytes(heads, dim));
        bytes
    }
}

/// Bytes of scratch that [`run`] needs for gradients of these sizes.
pub(crate) fn workspace_bytes(spec: &Spec<'_>, gradients: &Gradients<Dim>) -> usize {
    Plan::new(spec, gradients).bytes(spec.dims.q_heads, gradients)
}
