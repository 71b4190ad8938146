//! What a layer remembers: the crate's caches behind one trait.
//!
//! A [`Store`] gets a chunk's queries, keys and values as the model has them, not
//! yet rotated, and gives what attention makes of them: it rotates, appends, and
//! calls the same [`Dense`] over whatever cache it has. Where a cache forgets
//! tokens, a chunk that overflows it goes token by token, so that every query
//! sees what it would see if the text came one token at a time.

use std::ops::Range;

use attention_kernels::cache::{
    Append, ByHead, Cache, Cached, Compacted, Contiguous, Int4, Int8, Kivi, KvShape, Paged, Pages, Ring,
    Rotated,
};
use attention_kernels::mask::Causal;
use attention_kernels::math::rope::Rope;
use attention_kernels::select::{HeavyHitters, Smoothing, SnapKv};
use attention_kernels::{Attention, Weights, Workspace, dense::Dense};
use half::f16;
use ndarray::{Array2, Array4, ArrayViewMut4, Axis, concatenate, s};

use crate::Result;
use crate::model::{Config, Model, Session};

/// The caches by name, and what they are.
pub const CACHES: [(&str, &str); 12] = [
    ("contiguous", "every token in f32"),
    ("f16", "every token in f16"),
    ("paged", "every token in f32, in pages of 16"),
    ("int8", "every token, 8 bits an element"),
    ("int4", "every token, 4 bits an element"),
    ("kivi", "every token, 2 bits an element, the newest in f16"),
    ("rotated", "every token, keys of 3 bits and values of 4, rotated at random"),
    ("ring", "the last tokens"),
    ("streaming", "the first tokens and the last ones, at positions within the cache"),
    ("snapkv", "of the prompt what its last queries looked at, and every token since"),
    ("h2o", "the tokens that received most attention, and the last ones"),
    ("duo", "every token for the half of the heads that looks far back, first and last ones for the others"),
];

/// First tokens that `streaming` and `duo` keep.
const SINKS: usize = 4;
/// The last queries of a prompt, which say what matters.
const OBSERVED: usize = 32;

/// How much there is to remember.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Tokens of the longest text.
    pub capacity: usize,
    /// Tokens that are kept by caches that forget, sinks among them.
    pub window: usize,
}

/// What attention takes besides a cache, for all layers.
pub struct Attend {
    dense: Dense<Causal>,
    rope: Rope,
    workspace: Workspace,
}

impl Attend {
    pub fn new(rope: Rope) -> Result<Self> {
        Ok(Self { dense: Dense::builder().causal().build()?, rope, workspace: Workspace::new() })
    }

    /// Attention of queries, the last ones of the sequence, over a cache.
    fn over<C: Cache>(&mut self, q: &Array4<f32>, cache: &C, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        Ok(self.dense.forward_into(Cached::new(q.view(), cache), out, &mut self.workspace)?)
    }

    /// What each token of a cache received from such queries, `[q_heads, len]`.
    fn received<C: Cache>(&self, q: &Array4<f32>, cache: &C) -> Result<Array2<f32>> {
        Ok(self.dense.key_weights(Cached::new(q.view(), cache))?.index_axis_move(Axis(0), 0))
    }

    fn rotate(&self, x: &mut Array4<f32>, first: usize) -> Result<()> {
        let positions: Vec<isize> = (first..first + x.dim().2).map(|position| position as isize).collect();
        Ok(self.rope.rotate(x.view_mut(), &positions)?)
    }
}

/// Queries, keys and values of tokens that follow each other, `[1, heads, tokens,
/// head_dim]`, the first of them at a position.
pub struct Chunk {
    pub q: Array4<f32>,
    pub k: Array4<f32>,
    pub v: Array4<f32>,
    pub first: usize,
}

impl Chunk {
    fn rotated(mut self, attend: &Attend) -> Result<Self> {
        attend.rotate(&mut self.q, self.first)?;
        attend.rotate(&mut self.k, self.first)?;
        Ok(self)
    }

    fn tokens(&self, tokens: Range<usize>) -> Self {
        let [q, k, v] =
            [&self.q, &self.k, &self.v].map(|x| x.slice(s![.., .., tokens.clone(), ..]).to_owned());
        Self { q, k, v, first: self.first + tokens.start }
    }

    /// Runs pieces: as many tokens as there is room for, and then one by one.
    fn pieces(
        self,
        room: usize,
        mut out: ArrayViewMut4<'_, f32>,
        mut run: impl FnMut(Chunk, ArrayViewMut4<'_, f32>) -> Result<()>,
    ) -> Result<()> {
        let n = self.q.dim().2;
        if n <= room {
            return run(self, out);
        }
        for tokens in std::iter::once(0..room).chain((room..n).map(|t| t..t + 1)) {
            run(self.tokens(tokens.clone()), out.slice_mut(s![.., .., tokens, ..]))?;
        }
        Ok(())
    }
}

/// Keys and values of a layer.
pub trait Store {
    /// Takes up the keys and values of a chunk and attends with its queries.
    fn attend(&mut self, attend: &mut Attend, chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()>;

    /// The prompt has been taken up: see [`Session::end_prompt`].
    fn end_prompt(&mut self, _: &mut Attend) -> Result<()> {
        Ok(())
    }

    /// Bytes of memory, filled or not.
    fn bytes(&self) -> usize;

    /// Tokens that it holds, of the head that has most.
    fn held(&self) -> usize;
}

impl<S: Store + ?Sized> Store for Box<S> {
    fn attend(&mut self, attend: &mut Attend, chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        (**self).attend(attend, chunk, out)
    }
    fn end_prompt(&mut self, attend: &mut Attend) -> Result<()> {
        (**self).end_prompt(attend)
    }
    fn bytes(&self) -> usize {
        (**self).bytes()
    }
    fn held(&self) -> usize {
        (**self).held()
    }
}

fn held(cache: &impl Cache) -> usize {
    cache.lengths()[0]
}

/// Every token in a cache of one sequence, whatever its format: an error once it
/// is full.
struct All<C>(C);

impl<C: Append> Store for All<C> {
    fn attend(&mut self, attend: &mut Attend, chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        let Chunk { q, k, v, .. } = chunk.rotated(attend)?;
        self.0.append_each(&[0], k.view(), v.view())?;
        attend.over(&q, &self.0, out)
    }
    fn bytes(&self) -> usize {
        self.0.bytes()
    }
    fn held(&self) -> usize {
        held(&self.0)
    }
}

/// The first tokens and the last ones.
struct Last {
    ring: Ring,
    /// Whether the ring turns keys to their places in it as they are read.
    turned: bool,
}

impl Store for Last {
    fn attend(&mut self, attend: &mut Attend, mut chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        if !self.turned {
            chunk = chunk.rotated(attend)?;
        }
        chunk.pieces(self.ring.capacity() - held(&self.ring), out, |Chunk { mut q, k, v, .. }, out| {
            self.ring.append_each(&[0], k.view(), v.view())?;
            if self.turned {
                attend.rotate(&mut q, held(&self.ring) - k.dim().2)?;
            }
            attend.over(&q, &self.ring, out)
        })
    }
    fn bytes(&self) -> usize {
        self.ring.bytes()
    }
    fn held(&self) -> usize {
        held(&self.ring)
    }
}

/// SnapKV: once the prompt is there, its last queries say what stays of it.
struct Snap {
    cache: Compacted,
    policy: SnapKv,
    /// The last queries, while the prompt comes.
    last: Option<Array4<f32>>,
}

impl Snap {
    fn new(shape: KvShape, room: Room) -> Result<Self> {
        let window = OBSERVED.min(room.window);
        let policy = SnapKv { window, capacity: room.window, kernel: 5, pooling: Smoothing::Mean };
        Ok(Self { cache: Compacted::new(shape, 1, room.capacity)?, policy, last: None })
    }

    /// What the tokens of the prompt received from its last queries.
    fn received(&self, attend: &Attend) -> Result<Option<Array2<f32>>> {
        self.last.as_ref().map(|q| attend.received(q, &self.cache)).transpose()
    }
}

impl Store for Snap {
    fn attend(&mut self, attend: &mut Attend, chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        let Chunk { q, k, v, first } = chunk.rotated(attend)?;
        self.cache.append_each(&[0], k.view(), v.view())?;
        attend.over(&q, &self.cache, out)?;
        if first == 0 || self.last.is_some() {
            let all = match &self.last {
                Some(last) => concatenate(Axis(2), &[last.view(), q.view()])?,
                None => q,
            };
            let before = all.dim().2.saturating_sub(self.policy.window);
            self.last = Some(all.slice_move(s![.., .., before.., ..]));
        }
        Ok(())
    }

    fn end_prompt(&mut self, attend: &mut Attend) -> Result<()> {
        let Some(received) = self.received(attend)? else { return Ok(()) };
        let kept = self.policy.keep(received.view(), self.cache.shape().kv_heads)?;
        self.cache.keep(0, kept.view())?;
        self.last = None;
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.cache.bytes()
    }
    fn held(&self) -> usize {
        held(&self.cache)
    }
}

/// H2O: as soon as there is a token too many, each head drops the one that
/// received least so far.
struct Heavy {
    cache: Compacted,
    hitters: HeavyHitters,
}

impl Store for Heavy {
    fn attend(&mut self, attend: &mut Attend, chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        // There is room for one token more than are kept.
        let room = self.cache.capacity() - 1 - held(&self.cache);
        chunk.rotated(attend)?.pieces(room, out, |Chunk { q, k, v, .. }, out| {
            self.cache.append_each(&[0], k.view(), v.view())?;
            attend.over(&q, &self.cache, out)?;
            self.hitters.observe(attend.received(&q, &self.cache)?.view())?;
            if let Some(kept) = self.hitters.evict() {
                self.cache.keep(0, kept.view())?;
            }
            Ok(())
        })
    }
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }
    fn held(&self) -> usize {
        held(&self.cache)
    }
}

/// DuoAttention: some heads remember everything, the others their first tokens
/// and their last ones.
struct Duo {
    cache: ByHead,
    /// Tokens that those others keep, if there are any.
    window: Option<usize>,
}

impl Duo {
    fn new(shape: KvShape, room: Room, far: &[bool]) -> Result<Self> {
        let heads = |far_too| (0..shape.kv_heads).filter(|head| far[*head] == far_too).collect::<Vec<_>>();
        let of = |heads: &[usize]| KvShape { kv_heads: heads.len(), ..shape };
        let (all, last) = (heads(true), heads(false));
        let full = Contiguous::<f32>::new(of(&all), 1, room.capacity)?;
        let ring = Ring::<f32>::new(of(&last), 1, SINKS, room.window - SINKS)?;
        let cache = ByHead::builder().heads(&all, full).heads(&last, ring).build()?;
        Ok(Self { cache, window: Some(room.window).filter(|_| !last.is_empty()) })
    }
}

impl Store for Duo {
    fn attend(&mut self, attend: &mut Attend, chunk: Chunk, out: ArrayViewMut4<'_, f32>) -> Result<()> {
        let room = self.window.map_or(usize::MAX, |window| window.saturating_sub(held(&self.cache)));
        chunk.rotated(attend)?.pieces(room, out, |Chunk { q, k, v, .. }, out| {
            self.cache.append_each(&[0], k.view(), v.view())?;
            attend.over(&q, &self.cache, out)
        })
    }
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }
    fn held(&self) -> usize {
        held(&self.cache)
    }
}

/// For each layer the heads that look beyond first and last tokens: the half of
/// all whose last queries in `text` gave most to the tokens between.
///
/// DuoAttention learns this once for a model; measured like this, it costs a pass
/// over the text.
fn far_heads(model: &Model, room: Room, text: &[u32]) -> Result<Vec<Vec<bool>>> {
    let shape = shape_of(&model.config);
    let kv_heads = shape.kv_heads;
    let room = Room { capacity: text.len(), ..room };
    let stores = (0..model.config.layers).map(|_| Snap::new(shape, room)).collect::<Result<_>>()?;
    let mut session = Session::new(model, stores)?;
    session.prefill(text, 512, |_| ())?;
    let attend = Attend::new(model.rope.clone())?;
    let mut shares = Vec::new();
    for store in &session.stores {
        let received = store.received(&attend)?.unwrap_or_default();
        let between = SINKS..text.len().saturating_sub(room.window - SINKS).max(SINKS);
        let far = |row: usize| received.slice(s![row, between.clone()]).sum();
        let group = received.nrows() / kv_heads;
        shares.extend((0..kv_heads).map(|head| match between.is_empty() {
            true => 0.0,
            false => (head * group..(head + 1) * group).map(far).sum::<f32>(),
        }));
    }
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
    let mut far = vec![false; shares.len()];
    order.iter().take(shares.len().div_ceil(2)).for_each(|head| far[*head] = true);
    Ok(far.chunks(kv_heads).map(<[bool]>::to_vec).collect())
}

fn shape_of(config: &Config) -> KvShape {
    KvShape { kv_heads: config.kv_heads, head_dim: config.head_dim, value_dim: config.head_dim }
}

/// A store for each layer. `text` is what `duo` looks at to tell heads apart.
pub fn stores(name: &str, model: &Model, room: Room, text: &[u32]) -> Result<Vec<Box<dyn Store>>> {
    let Room { capacity, window } = room;
    if window <= 2 * SINKS {
        return Err(format!("a window of {window} tokens; more than {} are needed", 2 * SINKS).into());
    }
    let shape = shape_of(&model.config);
    let far = if name == "duo" { far_heads(model, room, text)? } else { Vec::new() };
    let store = |layer: usize| {
        fn all<C: Append + 'static>(cache: C) -> Box<dyn Store> {
            Box::new(All(cache))
        }
        Ok(match name {
            "contiguous" => all(Contiguous::<f32>::new(shape, 1, capacity)?),
            "f16" => all(Contiguous::<f16>::new(shape, 1, capacity)?),
            "paged" => all(Paged::<f32>::new(shape, 1, Pages { count: capacity.div_ceil(16), len: 16 })?),
            "int8" => all(Contiguous::<Int8>::new(shape, 1, capacity)?),
            "int4" => all(Contiguous::<Int4>::new(shape, 1, capacity)?),
            "kivi" => all(Kivi::<2>::new(shape, 1, capacity, 128)?),
            "rotated" => all(Contiguous::<Rotated<3>, Rotated<4>>::new(shape, 1, capacity)?),
            "ring" => Box::new(Last { ring: Ring::new(shape, 1, 0, window)?, turned: false }),
            "streaming" => {
                let ring = Ring::new(shape, 1, SINKS, window - SINKS)?.with_rope(&model.rope)?;
                Box::new(Last { ring, turned: true })
            }
            "snapkv" => Box::new(Snap::new(shape, room)?),
            "h2o" => {
                let (heavy, cache) = (window / 2, Compacted::new(shape, 1, window + 1)?);
                Box::new(Heavy { cache, hitters: HeavyHitters::new(shape.kv_heads, heavy, window - heavy) })
            }
            "duo" => Box::new(Duo::new(shape, room, &far[layer])?),
            _ => {
                let names = CACHES.map(|(name, _)| name).join(", ");
                return Err(format!("no cache is called \"{name}\"; there are {names}").into());
            }
        })
    };
    (0..model.config.layers).map(store).collect()
}
