//! Where the operands of a recurrence come from.

use std::ops::Range;

use ndarray::{ArrayView3, ArrayView4};

use crate::element::Element;
use crate::engine::recur::Decay;
use crate::input::{Qkv, Sequence};
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::{Heads, Stream};
use crate::simd::tile::NEGLIGIBLE;
use crate::simd::{Isa, Kernel, Simd};

/// Some tokens of one head of one sequence.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its place on the batch axis of the arrays.
    pub(crate) batch: usize,
    /// The head, of as many as have a state.
    pub(crate) head: usize,
    /// Along the length axis of the arrays.
    pub(crate) tokens: Range<usize>,
}

impl Place {
    pub(crate) fn new(sequence: &Sequence, head: usize, tokens: Range<usize>) -> Self {
        Self { batch: sequence.batch, head, tokens }
    }

    /// This head's place in an array of `heads` heads, which neighbours share.
    pub(crate) fn head_of(&self, heads: usize, of: usize) -> usize {
        self.head / (of / heads.max(1)).max(1)
    }
}

/// Where [`Source::keys`] writes, row by row. Columns past those of the
/// arrays are zero and stay so.
#[derive(Debug)]
pub struct Keys<'a> {
    /// `[tokens, state_dim]`, `stride` apart.
    pub(crate) k: &'a mut [f32],
    /// `[tokens, value_dim]`, `value_stride` apart.
    pub(crate) v: &'a mut [f32],
    /// Log decays: one a token, or rows as those of `k`, or none.
    pub(crate) decay: &'a mut [f32],
    /// Of the delta rule, one a token.
    pub(crate) beta: &'a mut [f32],
    /// Of the low-rank rule, rows as those of `k`.
    pub(crate) a: &'a mut [f32],
    /// Of the low-rank rule, rows as those of `k`.
    pub(crate) b: &'a mut [f32],
    /// What a query that reads after the update weighs its own token with, one
    /// a token: 1 unless a source says otherwise. For
    /// [`Rule::Add`](super::Rule::Add).
    pub(crate) own: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) value_stride: usize,
}

impl Keys<'_> {
    /// Reborrows for a shorter lifetime.
    pub(crate) fn reborrow(&mut self) -> Keys<'_> {
        Keys {
            k: self.k,
            v: self.v,
            decay: self.decay,
            beta: self.beta,
            a: self.a,
            b: self.b,
            own: self.own,
            stride: self.stride,
            value_stride: self.value_stride,
        }
    }
}

/// Gradients of the operands of some tokens as they were handed out, in place
/// of which [`Source::back`] puts those of what they were made of. Rows as
/// those of [`Keys`]; past the columns of the arrays anything may stand.
#[derive(Debug)]
pub struct Back<'a> {
    /// What was handed out.
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) a: &'a [f32],
    pub(crate) decay: &'a [f32],
    pub(crate) d_q: &'a mut [f32],
    pub(crate) d_k: &'a mut [f32],
    pub(crate) d_decay: &'a mut [f32],
    pub(crate) d_a: &'a mut [f32],
    pub(crate) d_b: &'a mut [f32],
    /// Gradients of the head's parameters, to be added to.
    pub(crate) parameters: &'a mut [f64],
    /// Room for as many rows.
    pub(crate) scratch: &'a mut [f32],
    pub(crate) stride: usize,
}

/// What hands an engine the operands of some tokens. Called once a chunk.
pub trait Source: Sync {
    /// Writes queries, `[tokens, state_dim]`, rows `stride` apart. Columns
    /// past `state_dim` stay as they are.
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize);

    /// Writes keys and what belongs to them.
    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>);

    /// Writes values alone, `[tokens, value_dim]`, rows `stride` apart. For
    /// [`Normaliser::Shares`](super::Normaliser::Shares) of
    /// [`Read::Total`](super::Read::Total), where queries come after all keys.
    fn values(&self, _isa: Isa, _at: &Place, _to: &mut [f32], _stride: usize) {}

    /// Where the operands of some tokens lie: what is worth prefetching.
    fn streams(&self, _at: &Place) -> [Stream; 6] {
        [Stream::NONE; 6]
    }

    /// Gradients of what was handed out become those of what it was made of.
    fn back(&self, _isa: Isa, _at: &Place, _of: Back<'_>) {}

    /// What a head's queries weigh their own token's key with, channel by
    /// channel, where they read before it is in the state.
    fn bonus(&self, _head: usize) -> &[f32] {
        &[]
    }

    /// The skip connection of a head (Mamba's `D`): how much of its own
    /// token's value an output has besides what it reads, a factor for each
    /// column, or one for all, or none. It is not scaled. For [`Rule::Add`](super::Rule::Add) without a normaliser.
    fn skip(&self, _head: usize) -> &[f32] {
        &[]
    }

    /// Makes one output of those of each token's steps, in the row of the last: rows
    /// `stride` apart. For [`Spec::joined`](super::Spec::joined).
    fn join(&self, _isa: Isa, _at: &Place, _rows: &mut [f32], _stride: usize) {}

    /// Of how many of the last tokens a head's state has anything: a fixed decay leaves
    /// less than [`NEGLIGIBLE`] of those before.
    fn remembers(&self, _head: usize) -> usize {
        usize::MAX
    }

    /// What each token leaves of the count of a head's keys. For
    /// [`Normaliser::Bounded`](super::Normaliser::Bounded).
    fn keep(&self, _head: usize) -> f64 {
        1.0
    }
}

/// Log decays.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gate<'a> {
    /// Nothing decays.
    None,
    /// One a head.
    Constant(&'a [f32]),
    /// `[batch, heads, len]`
    Token(ArrayView3<'a, f32>),
    /// `[batch, heads, len, state_dim]`
    Channel(ArrayView4<'a, f32>),
}

/// Operands that lie in arrays as they are. Arrays of fewer heads are shared
/// by neighbouring ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrays<'a> {
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    pub(crate) v: AnyArray<'a>,
    /// Heads that have a state.
    pub(crate) heads: usize,
    pub(crate) decay: Gate<'a>,
    /// `[batch, heads, len]`
    pub(crate) beta: Option<ArrayView3<'a, f32>>,
    /// `a` and `b` of the low-rank rule.
    pub(crate) low_rank: Option<(AnyArray<'a>, AnyArray<'a>)>,
    /// `[heads, state_dim]`, one head after the other: queries read before
    /// the update then.
    pub(crate) bonus: Option<&'a [f32]>,
    /// As [`Source::skip`] has it, one head after the other.
    pub(crate) skip: &'a [f32],
    /// As [`Source::keep`] has it, one a head.
    pub(crate) keep: &'a [f64],
}

impl Gate<'_> {
    /// What of the state each token leaves.
    pub(crate) fn decay(&self) -> Decay {
        match self {
            Self::None => Decay::None,
            Self::Constant(_) | Self::Token(_) => Decay::Scalar,
            Self::Channel(_) => Decay::Channel,
        }
    }
}

impl<'a> Arrays<'a> {
    /// Queries, keys and values alone.
    pub(crate) fn new<T: Element>(x: &Qkv<'a, T>, heads: usize) -> Self {
        let any = |view: &ArrayView4<'a, T>| T::any(Heads::new(*view));
        Self {
            q: any(&x.q),
            k: any(&x.k),
            v: any(&x.v),
            heads,
            decay: Gate::None,
            beta: None,
            low_rank: None,
            bonus: None,
            skip: &[],
            keep: &[],
        }
    }

    /// A head's part of parameters of all heads.
    fn of_head<'b>(&self, parameters: &'b [f32], head: usize) -> &'b [f32] {
        let len = parameters.len() / self.heads.max(1);
        &parameters[head * len..][..len]
    }

    /// Writes keys alone.
    pub(crate) fn key_rows(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        copy_rows(isa, self.rows(self.k, at), to, stride);
    }

    /// Writes gates alone: one a token, or rows.
    pub(crate) fn gates(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        match self.decay {
            Gate::None => {}
            Gate::Constant(g) => to[..at.tokens.len()].fill(g[at.head]),
            Gate::Token(g) => copy_tokens(&g, self.heads, at, to),
            Gate::Channel(g) => copy_rows(isa, self.rows(AnyArray::F32(Heads::new(g)), at), to, stride),
        }
    }

    /// The rows of some tokens.
    pub(crate) fn rows(&self, x: AnyArray<'a>, at: &Place) -> AnyRows<'a> {
        x.rows(at.batch, at.head_of(x.heads(), self.heads), &at.tokens)
    }
}

/// Copies rows, widened, `stride` apart.
pub(crate) fn copy_rows(isa: Isa, from: AnyRows<'_>, to: &mut [f32], stride: usize) {
    struct Copy<'a, 'b>(AnyRows<'a>, &'b mut [f32], usize);
    impl Kernel for Copy<'_, '_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            self.0.pack_rows(s, self.1, self.2);
        }
    }
    isa.dispatch(Copy(from, to, stride));
}

impl<'a> Source for Arrays<'a> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        copy_rows(isa, self.rows(self.q, at), to, stride);
    }

    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>) {
        copy_rows(isa, self.rows(self.k, at), to.k, to.stride);
        copy_rows(isa, self.rows(self.v, at), to.v, to.value_stride);
        self.gates(isa, at, to.decay, to.stride);
        if let Some(beta) = &self.beta {
            copy_tokens(beta, self.heads, at, to.beta);
        }
        if let Some((a, b)) = self.low_rank {
            copy_rows(isa, self.rows(a, at), to.a, to.stride);
            copy_rows(isa, self.rows(b, at), to.b, to.stride);
        }
    }

    fn values(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        copy_rows(isa, self.rows(self.v, at), to, stride);
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        // Where queries and keys are other tokens, one may lack these.
        let stream = |x: AnyArray<'a>| match at.tokens.end <= x.dim().2 {
            true => self.rows(x, at).stream(),
            false => Stream::NONE,
        };
        let decay = match self.decay {
            Gate::Channel(g) => stream(AnyArray::F32(Heads::new(g))),
            _ => Stream::NONE,
        };
        let (a, b) = self.low_rank.map_or((Stream::NONE, Stream::NONE), |(a, b)| (stream(a), stream(b)));
        [stream(self.k), stream(self.q), stream(self.v), decay, a, b]
    }

    fn bonus(&self, head: usize) -> &[f32] {
        self.of_head(self.bonus.unwrap_or_default(), head)
    }

    fn skip(&self, head: usize) -> &[f32] {
        self.of_head(self.skip, head)
    }

    fn remembers(&self, head: usize) -> usize {
        match self.decay {
            Gate::Constant(g) if g[head] < 0.0 => {
                ((f64::from(NEGLIGIBLE).ln() / f64::from(g[head])) as usize).saturating_add(1)
            }
            _ => usize::MAX,
        }
    }

    fn keep(&self, head: usize) -> f64 {
        self.keep.get(head).copied().unwrap_or(1.0)
    }
}

/// Copies one number a token from `[batch, heads, len]`.
pub(crate) fn copy_tokens(from: &ArrayView3<'_, f32>, of: usize, at: &Place, to: &mut [f32]) {
    let head = at.head_of(from.dim().1, of);
    for (to, t) in to.iter_mut().zip(at.tokens.clone()) {
        *to = from[[at.batch, head, t]];
    }
}
