//! Attention on pools of tokens and a window of the last ones, in one softmax
//! with a sink, whose keys are their values.
//!
//! Rows of pools and tokens are the keys of one head, the pools first; a plan
//! names those that a query sees. Values are rotated keys, so each output is
//! rotated back by its query's position.

use std::ops::Range;

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis, s};

use crate::attention::{Cost, Dim4, ERROR_CONSTANT, Input};
use crate::card::Extras;
use crate::element::Element;
use crate::engine::call::{Arrays, Call, Norm};
use crate::engine::workspace::{Workspace, take_array};
use crate::engine::{self, parallel};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::keys::joined::Joined;
use crate::keys::source::Slots;
use crate::keys::{Keys, Layout, Per, Run, TokenLists};
use crate::math::rope::Rope;
use crate::score::Plain;
use crate::simd::any::{AnyArray, AnyOut, IntoAny};
use crate::simd::mem::{Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Kernel, MAX_LANES, Simd};
use crate::stages::attend::{Config, check_out};
use crate::stages::listed::Order;

/// Queries of many heads, and rows of one head that are keys and values: the
/// last tokens, and pools of all of them.
#[derive(Clone, Copy, Debug)]
pub struct Compressed<'a, T> {
    /// `[batch, heads, q_len, dim]`
    pub q: ArrayView4<'a, T>,
    /// The last tokens, `[batch, held, dim]`.
    pub kv: ArrayView3<'a, T>,
    /// Pools from the first token on, `[batch, 1, pools, dim]`.
    pub pools: ArrayView4<'a, f32>,
    /// Tokens of each sequence; the last query sits at the last one.
    pub tokens: usize,
}

impl<'a, T> Compressed<'a, T> {
    /// Of sequences all of whose tokens are held.
    pub fn new(q: ArrayView4<'a, T>, kv: ArrayView3<'a, T>, pools: ArrayView4<'a, f32>) -> Self {
        Self { tokens: kv.dim().1, q, kv, pools }
    }

    /// Of sequences of so many tokens, of which the last are held.
    pub fn tokens(self, tokens: usize) -> Self {
        Self { tokens, ..self }
    }

    /// Keys that a query sees.
    pub(crate) fn seen(&self, query: usize) -> usize {
        (query + self.tokens + 1).saturating_sub(self.q.dim().2).min(self.tokens)
    }
}

impl<T: Element> Input for Compressed<'_, T> {
    type Out = T;

    /// Keys are tokens.
    fn dims(&self) -> Result<Dims> {
        let (batch, q_heads, q_len, dim) = self.q.dim();
        if (self.kv.dim().0, self.kv.dim().2) != (batch, dim) {
            let expected = format!("[batch, held, dim] = [{batch}, _, {dim}] as q has it");
            return Err(Error::shape("kv", expected, self.kv.shape()));
        }
        if (self.pools.dim().0, self.pools.dim().1, self.pools.dim().3) != (batch, 1, dim) {
            let expected = format!("[batch, 1, pools, dim] = [{batch}, 1, _, {dim}] as q has it");
            return Err(Error::shape("pools", expected, self.pools.shape()));
        }
        if self.kv.dim().1 > self.tokens {
            return Err(Error::value(
                "tokens",
                format!("{} or more, as kv holds", self.kv.dim().1),
                self.tokens,
            ));
        }
        let (kv_heads, kv_len) = (q_heads.min(1), self.tokens);
        let dims =
            Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim: dim, value_dim: dim, packed: false };
        dims.checked()
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Ok(self.q.dim())
    }
}

/// Arrays for a catalogue entry: values of the first head as rows, queries cut
/// or lengthened to their size, and means of `stride` rows and of keys.
pub(crate) fn exhibited<T: Element>(x: &Qkv<'_, T>, stride: usize) -> Extras<T> {
    let ((batch, heads, q_len, head_dim), (_, kv_heads, len, dim)) = (x.q.dim(), x.v.dim());
    let query = |(b, h, i, c)| if c < head_dim { x.q[[b, h, i, c]] } else { T::default() };
    let of = |x: &ArrayView4<'_, T>, b, j, c| if kv_heads > 0 { x[[b, 0, j, c]] } else { T::default() };
    let mean = |x: &ArrayView4<'_, T>, b, w: usize, c| {
        (w * stride..(w + 1) * stride).map(|j| of(x, b, j, c).to_f32()).sum::<f32>() / stride as f32
    };
    let pools = len / stride;
    let index = Array3::from_shape_fn((batch, pools, head_dim), |(b, w, c)| T::from_f32(mean(&x.k, b, w, c)));
    Extras {
        keys: Array4::from_shape_fn((batch, heads, q_len, dim), query),
        latents: Array3::from_shape_fn((batch, len, dim), |(b, j, c)| of(&x.v, b, j, c)),
        rates: Array4::from_shape_fn((batch, 1, pools, dim), |(b, _, w, c)| mean(&x.v, b, w, c)),
        matrices: [index, Array3::from_elem((0, 0, 0), T::default())],
        ..Extras::default()
    }
}

/// The builder methods of such mechanisms, and what they are made of.
macro_rules! compression_options {
    ($builder:ident) => {
        impl $builder {
            /// Tokens of a pool, and from one to the next.
            pub fn stride(mut self, stride: usize) -> Self {
                self.stride = stride;
                self
            }

            /// Tokens that are read as they are, the query's own among them.
            /// Default: 128.
            pub fn window(mut self, window: usize) -> Self {
                self.window = window;
                self
            }

            /// A logit without a value for each query head, which is not scaled.
            /// Default: none.
            pub fn sinks(mut self, sinks: Vec<f32>) -> Self {
                self.sinks = Some(sinks);
                self
            }

            /// Rotates outputs back by the positions of their queries, as the
            /// keys were rotated. Default: does not.
            pub fn rope(mut self, rope: crate::math::rope::Rope) -> Self {
                self.rope = Some(rope);
                self
            }

            /// The factor of the dot product. Default: `1 / sqrt(dim)`.
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }

            fn compression(self) -> crate::error::Result<crate::stages::compressed::Compression> {
                for (name, n) in [("stride", self.stride), ("window", self.window)] {
                    if n == 0 {
                        return Err(crate::error::Error::value(name, "at least 1 token", 0));
                    }
                }
                if let Some(x) = self.sinks.iter().flatten().find(|x| x.is_nan()) {
                    return Err(crate::error::Error::value("sinks", "numbers", x));
                }
                let (stride, window) = (self.stride, self.window);
                let (config, sinks, rope) = (self.options.build()?, self.sinks, self.rope);
                Ok(crate::stages::compressed::Compression { config, stride, window, sinks, rope })
            }
        }
    };
}
pub(crate) use compression_options;

/// What such mechanisms have in common.
#[derive(Clone, Debug)]
pub(crate) struct Compression {
    pub(crate) config: Config<Order, Plain>,
    /// Tokens of a pool and from one to the next.
    pub(crate) stride: usize,
    /// Tokens that are read as they are, the query's own among them.
    pub(crate) window: usize,
    /// A logit for each head, if there are any.
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) rope: Option<Rope>,
}

impl Compression {
    /// The sizes of a call that fits.
    pub(crate) fn dims<T: Element>(&self, x: &Compressed<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if let Some(sinks) = self.sinks.as_ref().filter(|sinks| sinks.len() != dims.q_heads) {
            let expected = format!("one for each of the {} query heads", dims.q_heads);
            return Err(Error::value("sinks", expected, sinks.len()));
        }
        self.rope.as_ref().map_or(Ok(()), |rope| rope.fits(dims.head_dim))?;
        let held = x.tokens.min((self.window - 1).saturating_add(dims.q_len));
        if x.kv.dim().1 < held {
            let expected = format!("the last {held} tokens, which are in the windows of the queries");
            return Err(Error::value("kv", expected, x.kv.dim().1));
        }
        if x.pools.dim().2 < x.tokens / self.stride {
            let expected = format!("{} or more, one for each {} tokens", x.tokens / self.stride, self.stride);
            return Err(Error::value("pools", expected, x.pools.dim().2));
        }
        Ok(dims)
    }

    /// The rows that each query sees, of pools and tokens together: of the pools
    /// those that `picked` gives, ascending runs.
    pub(crate) fn plan<T: Element>(
        &self,
        x: &Compressed<'_, T>,
        mut picked: impl FnMut(usize, usize, &mut Vec<Run>),
    ) -> Result<TokenLists> {
        let dims = self.dims(x)?;
        let layout = self.layout(x, &dims);
        layout.lists()?;
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        let before = x.tokens - x.kv.dim().1;
        for (b, i) in (0..if dims.q_heads > 0 { dims.batch } else { 0 })
            .flat_map(|b| (0..dims.q_len).map(move |i| (b, i)))
        {
            picked(b, i, &mut runs);
            let seen = x.seen(i);
            let first = seen.saturating_sub(self.window);
            if first < seen {
                let start = (x.pools.dim().2 + first - before) as u32;
                runs.push(Run { start, len: (seen - first) as u32 });
            }
            offsets.push(runs.len());
        }
        TokenLists::new(layout, offsets, runs)
    }

    fn layout<T>(&self, x: &Compressed<'_, T>, dims: &Dims) -> Layout {
        let keys = x.pools.dim().2 + x.kv.dim().1;
        Layout { keys, ..Layout::new(Per::Sequence, 1, dims) }
    }

    /// Calls `run` with the call of the engine on a plan.
    fn with_call<T: Element, R>(
        &self,
        x: &Compressed<'_, T>,
        plan: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let dims = self.dims(x)?;
        let want = self.layout(x, &dims);
        if *plan.layout() != want {
            return Err(Error::value(
                "index",
                format!("lists for {want:?}"),
                format_args!("{:?}", plan.layout()),
            ));
        }
        let lengths = vec![want.keys; dims.batch];
        let kv = x.kv.insert_axis(Axis(1));
        let arrays = [f32::any(Heads::new(x.pools)), T::any(Heads::new(kv))];
        let joined = Joined { k: arrays, v: arrays, split: x.pools.dim().2 };
        let arrays = Arrays::cached(x.q, &joined, Slots { slots: None, offsets: None, lengths: &lengths });
        let norm = Norm::Softmax { sinks: self.sinks.as_deref() };
        let dims = Dims { kv_len: want.keys, ..dims };
        let call = self.config.over(arrays, dims, norm, None);
        Ok(run(&Call { keys: Keys::Tokens(plan), ..call }))
    }

    fn turn_bytes(&self, dims: &Dims) -> usize {
        let rows = dims.batch * dims.q_heads * dims.q_len;
        bytes_for::<u64>(claim_words(rows))
            + bytes_for_shares(parallel::threads(), bytes_for::<f32>(self.room(dims)))
    }

    /// Numbers that a thread rotates with.
    fn room(&self, dims: &Dims) -> usize {
        dims.head_dim.next_multiple_of(MAX_LANES) + self.rope.as_ref().map_or(0, Rope::dim)
    }

    /// Bytes of scratch.
    pub(crate) fn bytes<T: Element>(&self, x: &Compressed<'_, T>, plan: &TokenLists) -> Result<usize> {
        let dims = self.dims(x)?;
        let engine = self.with_call(x, plan, engine::workspace_bytes)?;
        let held = dims.batch * dims.q_heads * dims.q_len * dims.head_dim;
        Ok(bytes_for::<f32>(held) + engine.max(self.turn_bytes(&dims)))
    }

    /// The kernel.
    pub(crate) fn run<T: Element>(
        &self,
        x: &Compressed<'_, T>,
        plan: &TokenLists,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        check_out(x, &out)?;
        let dims = self.dims(x)?;
        let mut arena = workspace.arena(self.bytes(x, plan)?)?;
        let mut made = take_array(&mut arena, x.q.dim());
        self.with_call(x, plan, |call| engine::run_in(call, made.view_mut(), None, arena.reborrow()))?;

        let from = f32::any(Heads::new(made.view()));
        let rows = dims.batch * dims.q_heads * dims.q_len;
        let to = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
        let shares = arena.shares(parallel::threads(), bytes_for::<f32>(self.room(&dims)));
        let start = |worker: usize| shares.take(worker).take::<f32>(self.room(&dims));
        // The angles of a query are those of all heads.
        parallel::for_each(parallel::threads(), dims.batch * dims.q_len, start, |room, i| {
            let (batch, query) = (i / dims.q_len, i % dims.q_len);
            let position = x.seen(query) as f64 - 1.0;
            let heads = 0..dims.q_heads;
            self.config.isa().dispatch(Turn {
                rope: self.rope.as_ref(),
                position: -position,
                from: &from,
                to: &to,
                at: (batch, heads, query),
                room,
                dim: dims.head_dim,
            });
        });
        Ok(())
    }

    /// Multiply-adds of listed pairs, and the rows that lists name.
    pub(crate) fn price<T: Element>(&self, x: &Compressed<'_, T>, plan: &TokenLists) -> Result<Cost> {
        let dims = self.dims(x)?;
        let pairs = plan.len() * dims.q_heads;
        let bytes =
            2 * x.q.len() * size_of::<T>() + x.kv.len() * size_of::<T>() + x.pools.len() * size_of::<f32>();
        Ok(Cost { flops: 4 * (pairs * dims.head_dim) as u64, bytes: bytes as u64 })
    }

    /// The definition on a plan: the output, and how far the kernel may be off.
    pub(crate) fn define<T: Element>(
        &self,
        x: &Compressed<'_, T>,
        plan: &TokenLists,
    ) -> Result<(Array4<f64>, Array3<f64>)> {
        let dims = self.dims(x)?;
        self.with_call(x, plan, |_| ())?;
        let Dims { batch, q_heads, q_len, head_dim, .. } = dims;
        let scale = self.config.scale(&dims);
        let (mut out, mut bound) = (Array4::zeros(x.q.dim()), Array3::zeros((batch, q_heads, q_len)));
        for b in 0..batch {
            let n = x.pools.dim().2;
            let row = |j: usize, c: usize| {
                if j < n { f64::from(x.pools[[b, 0, j, c]]) } else { x.kv[[b, j - n, c]].to_f64() }
            };
            let rows = Array2::from_shape_fn((n + x.kv.dim().1, head_dim), |(j, c)| row(j, c));
            for (h, i) in (0..q_heads).flat_map(|h| (0..q_len).map(move |i| (h, i))) {
                let q = x.q.slice(s![b, h, i, ..]).mapv(Element::to_f64);
                let site = Site { batch: b, head: h, q_len, kv_len: rows.nrows() };
                let score = |&j: &usize| scale * q.dot(&rows.row(j));
                // A score of -inf hides its key.
                let sees = |j: &usize| plan.visible(&site, i, *j) && score(j) != f64::NEG_INFINITY;
                let keys: Vec<usize> = (0..rows.nrows()).filter(sees).collect();
                let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[h]));
                let most = keys.iter().map(score).fold(sink, f64::max);
                let total = keys.iter().map(|j| (score(j) - most).exp()).sum::<f64>() + (sink - most).exp();
                let mut o = vec![0.0; head_dim];
                let (mut size, mut largest) = (0f64, 0f64);
                for j in &keys {
                    let weight = (score(j) - most).exp() / total;
                    o.iter_mut().zip(rows.row(*j)).for_each(|(o, v)| *o += weight * v);
                    let products = q.iter().zip(rows.row(*j)).map(|(q, k)| (q * k).abs()).sum::<f64>();
                    if most - score(j) < 25.0 {
                        size = size.max(scale.abs() * products + score(j).abs());
                    }
                    largest = rows.row(*j).iter().fold(largest, |most, v| most.max(v.abs()));
                }
                if let Some(rope) = &self.rope {
                    rope.define(-(x.seen(i) as f64 - 1.0), &mut o);
                }
                o.iter().enumerate().for_each(|(c, &o)| out[[b, h, i, c]] = o);
                // A rotation makes sums of two numbers.
                let terms = (head_dim + keys.len() + 4) as f64 + size;
                bound[[b, h, i]] = 2.0 * ERROR_CONSTANT * 2f64.powi(-24) * terms * largest;
            }
        }
        Ok((out, bound))
    }
}

/// Rotates the output rows of a query.
struct Turn<'a, 'b> {
    rope: Option<&'a Rope>,
    position: f64,
    from: &'a AnyArray<'b>,
    to: &'a AnyOut<'b>,
    at: (usize, Range<usize>, usize),
    room: &'a mut [f32],
    dim: usize,
}

impl Kernel for Turn<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rope, position, from, to, at: (batch, heads, query), room, dim } = self;
        // Whole vectors are written.
        let (row, angles) = room.split_at_mut(dim.next_multiple_of(MAX_LANES));
        if let Some(rope) = rope {
            for (to, (sin, cos)) in angles.chunks_exact_mut(2).zip(rope.angles(position)) {
                to.copy_from_slice(&[sin as f32, cos as f32]);
            }
        }
        for head in heads {
            from.rows(batch, head, &(query..query + 1)).pack_rows(s, &mut row[..dim], dim);
            if let Some(rope) = rope {
                rope.turn(angles, &mut row[..dim]);
            }
            to.take(batch, head, query..query + 1).write(s, 0, row, 1.0);
        }
    }
}
