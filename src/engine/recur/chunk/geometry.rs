//! Sizes of a chunk: how tokens, rows and columns are laid out in its operands.

use crate::engine::recur::{Decay, Rule, Spec};
use crate::simd::MAX_LANES;
use crate::simd::tile::{TILE_ROWS, Update};

/// Tokens of a chunk. More make fewer products with states, of more columns;
/// the products within chunks grow.
pub(crate) const CHUNK: usize = 32;
/// The most columns of scores, and tokens.
pub(crate) const COLUMNS: usize = 64;
/// Rows whose scores stop at the same column.
pub(in crate::engine::recur) const BLOCK: usize = 2 * TILE_ROWS;
/// Rows within which keys are divided by decays of channels where a chunk is
/// too long for it, and within which a triangular system is solved part by
/// part.
pub(in crate::engine::recur) const SUB: usize = 16;
/// Rows of such a part, which is solved row by row.
pub(in crate::engine::recur) const PART: usize = 4;
/// How far log decays of channels may add up within a sub-block for keys to be
/// divided by their exponentials, and how large these keys may be: products
/// stay within `f32`, and small queries keep their digits.
pub(in crate::engine::recur) const REACH: f32 = 41.0;
pub(in crate::engine::recur) const LARGE: f32 = (1u64 << 60) as f32;
/// What stands for any log decay below it: its exponential is 0, and sums of
/// it keep the precision of others.
pub(in crate::engine::recur) const FORGET: f32 = -1e4;

/// Sizes of what a chunk is worked out in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Tokens.
    pub(crate) chunk: usize,
    /// Columns of scores: the keys of a chunk, and its corrections if it has
    /// any.
    pub(crate) columns: usize,
    /// Rows of a state.
    pub(crate) rows: usize,
    /// The same, rounded up to vectors: from one token's row to the next.
    pub(crate) stride: usize,
    /// Columns of a state.
    pub(crate) cols: usize,
    /// The same, rounded up to vectors.
    pub(crate) width: usize,
    /// Columns of a panel of values or of a state.
    pub(crate) panel: usize,
    pub(crate) panels: usize,
    pub(in crate::engine::recur) rule: Rule,
    pub(in crate::engine::recur) decay: Decay,
}

impl Geometry {
    pub(crate) fn new(spec: &Spec<'_>) -> Self {
        let (rows, cols) = (spec.state_dim, spec.state_cols());
        let (width, panel) = (cols.next_multiple_of(MAX_LANES), spec.isa.panel());
        Self {
            // Whole tokens, where the steps of one see each other.
            chunk: if spec.joined { CHUNK / spec.steps * spec.steps } else { CHUNK },
            columns: if spec.rule == Rule::LowRank { 2 * CHUNK } else { CHUNK },
            rows,
            stride: rows.next_multiple_of(MAX_LANES),
            cols,
            width,
            panel,
            panels: width.div_ceil(panel),
            rule: spec.rule,
            decay: spec.decay,
        }
    }

    /// What becomes of a state that decays by these factors.
    pub(in crate::engine::recur) fn update<'a>(&self, factors: &'a [f32]) -> Update<'a> {
        match (self.rule, self.decay) {
            (Rule::Add, Decay::None) => Update::Add,
            (Rule::Add, _) => Update::Decay(factors),
            _ => Update::Correct(factors),
        }
    }

    /// Elements of a panel of a state, `[rows, panel]`.
    pub(crate) fn state_panel(&self) -> usize {
        self.rows * self.panel
    }

    /// Elements of a panel of values, `[columns, panel]`.
    pub(crate) fn value_panel(&self) -> usize {
        self.columns * self.panel
    }

    /// Columns of one panel.
    pub(crate) fn panel_width(&self, panel: usize) -> usize {
        (self.width - panel * self.panel).min(self.panel)
    }

    /// Where the corrections of the low-rank rule start among the columns of
    /// scores and the rows of values; those of the delta rule replace the
    /// values.
    pub(super) fn corrections(&self) -> usize {
        if self.rule == Rule::LowRank { self.chunk } else { 0 }
    }

    /// Columns of scores, and rows of values, that `len` tokens use.
    pub(super) fn used(&self, len: usize) -> usize {
        self.corrections() + len
    }

    fn piece_sizes(&self) -> [usize; 6] {
        let corrects = usize::from(self.rule != Rule::Add);
        [
            self.chunk * self.columns,
            self.rows * self.columns,
            self.chunk * self.stride,
            corrects * self.chunk * self.stride,
            corrects * self.chunk * self.columns,
            self.rows.next_multiple_of(MAX_LANES),
        ]
    }

    /// Elements of what a chunk is [prepared](Prepare) into.
    pub(crate) fn piece(&self) -> usize {
        self.piece_sizes().iter().sum()
    }
}

/// What a chunk does to any state, and its queries read of any.
#[derive(Debug)]
pub(crate) struct Prepared<X> {
    /// How much of each value each query takes, `[chunk, columns]`, 0 for
    /// those that it does not see.
    pub(in crate::engine::recur) scores: X,
    /// Keys as columns, decayed to the chunk's end: `[rows, columns]`.
    pub(in crate::engine::recur) keys: X,
    /// Queries, decayed from the chunk's start: `[chunk, stride]`.
    pub(in crate::engine::recur) reads: X,
    /// What corrections read of the state, decayed likewise: `[chunk, stride]`.
    pub(in crate::engine::recur) probes: X,
    /// How corrections depend on each other: `[chunk, columns]`.
    pub(in crate::engine::recur) coefficients: X,
    /// What the chunk leaves of each row of the state.
    pub(in crate::engine::recur) decay: X,
}

impl<'a> Prepared<&'a mut [f32]> {
    pub(crate) fn of(piece: &'a mut [f32], g: &Geometry) -> Self {
        let [a, b, c, d, e, f] = g.piece_sizes();
        let (scores, piece) = piece.split_at_mut(a);
        let (keys, piece) = piece.split_at_mut(b);
        let (reads, piece) = piece.split_at_mut(c);
        let (probes, piece) = piece.split_at_mut(d);
        let (coefficients, piece) = piece.split_at_mut(e);
        Self { scores, keys, reads, probes, coefficients, decay: &mut piece[..f] }
    }
}

impl<'a> Prepared<&'a [f32]> {
    pub(crate) fn of_ready(piece: &'a [f32], g: &Geometry) -> Self {
        let [a, b, c, d, e, f] = g.piece_sizes();
        let (scores, piece) = piece.split_at(a);
        let (keys, piece) = piece.split_at(b);
        let (reads, piece) = piece.split_at(c);
        let (probes, piece) = piece.split_at(d);
        let (coefficients, piece) = piece.split_at(e);
        Self { scores, keys, reads, probes, coefficients, decay: &piece[..f] }
    }
}
