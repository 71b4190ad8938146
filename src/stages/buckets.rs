//! Tokens sorted by the bucket that they fall into: queries see the keys of their own
//! block of the sorted ones, and of the others some that are drawn, with the weight of
//! all. Causal, keys are halved until halves are short.

use std::iter::once;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array4, ArrayView3, Axis, ShapeBuilder, concatenate};

use crate::attention::Margins;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::{Sight, Virtual};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::keys::Keys;
use crate::mask::Unmasked;
use crate::mask::interval::Interval;
use crate::math::random::Normal;
use crate::score::Plain;
use crate::select::hash;
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::arrange::{Picked, Places};
use crate::stages::attend::{self, Config};
use crate::stages::listed::Order;
use crate::stages::pass::{Out, Pass};
use crate::stages::scale;
use crate::stages::states::{self, Into};

/// How sorted tokens see each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sorted {
    /// Bits of the number of a bucket.
    pub(crate) bits: usize,
    /// Keys of a block.
    pub(crate) block: usize,
    /// Keys that are drawn; at least as many as there are keys are all, once.
    pub(crate) samples: usize,
    /// Fewer queries than these see all keys; causal, as many keys are halved no more.
    pub(crate) exact_below: usize,
    /// What keys are drawn from.
    pub(crate) seed: u64,
    /// Whether a query sees no key after its position.
    pub(crate) causal: bool,
}

/// The order in which [`HyperAttention`](crate::sparse::HyperAttention) sorts queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets {
    sizes: [usize; 5],
    /// Of each token the bucket, of queries `[batch, q_heads, q_len]` and keys.
    buckets: [Vec<u32>; 2],
    parts: Vec<Part>,
}

/// Some queries, and the keys that they see as they are sorted: all, or causal those of
/// a second half and of the first.
#[derive(Clone, Debug, PartialEq)]
struct Part {
    queries: Range<usize>,
    keys: Range<usize>,
    /// Of each place in its head the query, and the key, counted from the first.
    orders: [Vec<u32>; 2],
    places: Places,
}

impl Buckets {
    /// Which queries are sorted together, and with which keys.
    pub fn parts(&self) -> impl Iterator<Item = [Range<usize>; 2]> {
        self.parts.iter().map(|part| [part.queries.clone(), part.keys.clone()])
    }

    /// The queries of a part of each head, `[batch, q_heads, queries]`, as they are
    /// sorted and counted from the first of the part.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn queries(&self, part: usize) -> &[u32] {
        &self.parts[part].orders[0]
    }

    /// The keys of a part of each head, `[batch, kv_heads, keys]`, likewise.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn keys(&self, part: usize) -> &[u32] {
        &self.parts[part].orders[1]
    }

    /// Which token is in another bucket, though nothing is doubtful of it.
    pub(crate) fn difference(&self, other: &Self, margins: &Margins) -> Option<String> {
        let lens = [self.sizes[3], self.sizes[4]];
        let lists = self
            .buckets
            .iter()
            .zip(&other.buckets)
            .zip(lens)
            .flat_map(|((a, b), n)| a.chunks(n.max(1)).zip(b.chunks(n.max(1))));
        if self.sizes != other.sizes {
            return Some(format!("{:?} and {:?}", self.sizes, other.sizes));
        }
        let heads = lists.zip(&margins.doubtful).enumerate();
        heads.into_iter().find_map(|(list, ((a, b), doubtful))| {
            let sure = |i: &usize| a[*i] != b[*i] && !doubtful.iter().any(|range| range.contains(i));
            (0..a.len()).find(sure).map(|i| format!("list {list}: token {i} is in {} and in {}", a[i], b[i]))
        })
    }
}

/// Keys that are drawn, as places in sorted order, and the logarithm of their weight.
struct Drawn {
    places: Vec<u32>,
    log_weight: f32,
}

impl Sorted {
    /// The queries and the keys of each part, and where the pieces begin whose keys are
    /// seen as they come.
    fn halves(&self, dims: &Dims) -> (Vec<[Range<usize>; 2]>, Vec<usize>) {
        let Dims { q_len, kv_len, .. } = *dims;
        if !self.causal {
            return (vec![[0..q_len, 0..kv_len]], Vec::new());
        }
        let (mut parts, mut pieces, mut open) = (Vec::new(), Vec::new(), Vec::from_iter(once(0..kv_len)));
        while let Some(keys) = open.pop() {
            if keys.len() <= self.exact_below.max(1) {
                pieces.push(keys.start);
                continue;
            }
            let middle = keys.start + keys.len().div_ceil(2);
            let query = |key: usize| (key + q_len).saturating_sub(kv_len);
            let queries = query(middle)..query(keys.end);
            if !queries.is_empty() {
                parts.push([queries, keys.start..middle]);
            }
            open.extend([middle..keys.end, keys.start..middle]);
        }
        (parts, pieces)
    }

    /// The index of the buckets of queries and keys.
    pub(crate) fn index(&self, dims: &Dims, buckets: [Vec<u32>; 2]) -> Result<Buckets> {
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, .. } = *dims;
        let part = |[queries, keys]: [Range<usize>; 2]| {
            let sorted = self.blocks([queries.len(), keys.len()]).is_some();
            let order = |buckets: &[u32], len: usize, of: &Range<usize>| {
                let heads = buckets.chunks(len.max(1));
                let own: Vec<u32> = heads.flat_map(|head| &head[of.clone()]).copied().collect();
                match sorted {
                    true => hash::sorted(&own, of.len(), self.bits),
                    // As they come.
                    false => Ok((0..own.len()).map(|at| (at % of.len()) as u32).collect()),
                }
            };
            let orders = [order(&buckets[0], q_len, &queries)?, order(&buckets[1], kv_len, &keys)?];
            let picked = Picked { rows: &orders[0], units: q_heads, len: queries.len() };
            let places = Places::of(picked, [batch, q_heads, queries.len()])?;
            Ok(Part { queries, keys, orders, places })
        };
        let parts = self.halves(dims).0.into_iter().map(part).collect::<Result<_>>()?;
        Ok(Buckets { sizes: [batch, q_heads, kv_heads, q_len, kv_len], buckets, parts })
    }

    /// Whether so many queries see all of so many keys; queries of a block otherwise.
    fn blocks(&self, [queries, keys]: [usize; 2]) -> Option<usize> {
        let exact = queries < self.exact_below || keys <= self.block;
        (!exact).then(|| queries.div_ceil(keys.div_ceil(self.block)).max(1))
    }

    /// For some of the keys, of which the first is key `first`.
    fn drawn(&self, keys: usize, first: usize) -> Drawn {
        if self.samples >= keys {
            return Drawn { places: (0..keys as u32).collect(), log_weight: 0.0 };
        }
        let mut random = Normal::new((!self.seed).wrapping_add(first as u64));
        let places = (0..self.samples).map(|_| ((random.unit() * keys as f64) as usize).min(keys - 1) as u32);
        Drawn { places: places.collect(), log_weight: (keys as f64 / self.samples as f64).ln() as f32 }
    }

    /// Refuses an index of other sizes.
    pub(crate) fn check(&self, dims: &Dims, index: &Buckets) -> Result<()> {
        let sizes = [dims.batch, dims.q_heads, dims.kv_heads, dims.q_len, dims.kv_len];
        let most = index.buckets.iter().flatten().max().copied().unwrap_or(0);
        if index.sizes == sizes && most >> self.bits == 0 && index.parts().eq(self.halves(dims).0) {
            return Ok(());
        }
        let expected = format!("one of {sizes:?} and {} bits", self.bits);
        Err(Error::value("index", expected, format_args!("{:?}", index.sizes)))
    }

    /// Softmax attention as an index says: of fitting sizes.
    pub(crate) fn run<T: Element>(
        &self,
        config: &Config<Order, Plain>,
        pass: &mut Pass<'_>,
        x: Qkv<'_, T>,
        index: &Buckets,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, isa) = (x.dims()?, config.isa());
        let Dims { batch, q_heads, q_len, kv_len, value_dim, .. } = dims;
        let mut all = states::rows(pass, (batch, q_heads, q_len, value_dim))?;
        let (_, mut pieces) = self.halves(&dims);
        let causal = !pieces.is_empty();
        if causal {
            pieces.sort_unstable();
            let near = config.masked(Interval(|_: &Site, query: usize| {
                let seen = (query + kv_len + 1).saturating_sub(q_len).min(kv_len);
                let after = pieces.partition_point(|&first| first < seen);
                after.checked_sub(1).map_or(0, |piece| pieces[piece])..seen
            }));
            let x = Qkv { q: x.q, k: x.k, v: x.v, lengths: Lengths::Full, out: PhantomData };
            near.attend_states(pass, x, Keys::Mask, None, &mut all)?;
        }
        for part in &index.parts {
            let at = [0, 0, part.queries.start];
            pass.within(|pass| {
                self.attend(config, pass, &x, part, Into { states: &mut all, at, fresh: !causal })
            })?;
        }
        scale::run(pass, isa, &all, |_| 1.0, out);
        Ok(())
    }

    /// Merges what the queries of a part see into their states.
    fn attend<T: Element>(
        &self,
        config: &Config<Order, Plain>,
        pass: &mut Pass<'_>,
        x: &Qkv<'_, T>,
        part: &Part,
        into: Into<'_, '_>,
    ) -> Result<()> {
        let (dims, isa, [queries, keys]) = (x.dims()?, config.isa(), [part.queries.len(), part.keys.len()]);
        let q = x.q.slice_axis(Axis(2), part.queries.clone().into());
        let [k, v] = [&x.k, &x.v].map(|x| x.slice_axis(Axis(2), part.keys.clone().into()));
        let mut states = states::rows(pass, (dims.batch, dims.q_heads, queries, dims.value_dim))?;
        let Some(step) = self.blocks([queries, keys]) else {
            let x = Qkv { q, k, v, lengths: Lengths::Full, out: PhantomData };
            config.masked(Unmasked).attend_states(pass, x, Keys::Mask, None, &mut states)?;
            states::merge(pass, isa, &states, &part.places, into);
            return Ok(());
        };
        let (block, drawn) = (self.block, self.drawn(keys, part.keys.start));
        let of_drawn: Vec<u32> = (part.orders[1].chunks(keys))
            .flat_map(|order| drawn.places.iter().map(|&place| order[place as usize]))
            .collect();
        let picked = |rows, units, len| Picked { rows, units, len };
        let q = picked(&part.orders[0], dims.q_heads, queries).gather(pass, isa, q)?;
        let own = picked(&part.orders[1], dims.kv_heads, keys);
        let more = picked(&of_drawn, dims.kv_heads, drawn.places.len());
        let (dk, dv) = (more.gather(pass, isa, k)?, more.gather(pass, isa, v)?);
        let (k, v) = (own.gather(pass, isa, k)?, own.gather(pass, isa, v)?);

        let weight = [drawn.log_weight];
        let shape = (dims.batch, dims.kv_heads, drawn.places.len()).strides((0, 0, 0));
        let blocks: Vec<u32> = drawn.places.iter().map(|place| place / block as u32).collect();
        let own = config.masked(Interval(move |_: &Site, query: usize| {
            let at = |u: usize| u.saturating_mul(block).min(keys);
            at(query / step)..at(query / step + 1)
        }));
        let extra = Virtual {
            k: f32::any(Heads::new(dk.view())),
            v: f32::any(Heads::new(dv.view())),
            log_weights: ArrayView3::from_shape(shape, &weight)
                .map_err(|_| Error::too_large("samples", self.samples))?,
            seen: Sight::Outside { blocks: &blocks, step },
            q_start: Some(0),
        };
        let sorted =
            Qkv { q: q.view(), k: k.view(), v: v.view(), lengths: Lengths::Full, out: PhantomData::<f32> };
        own.attend_states(pass, sorted, Keys::Mask, Some(extra), &mut states)?;
        states::merge(pass, isa, &states, &part.places, into);
        Ok(())
    }
    /// The definition.
    pub(crate) fn define<R: Real, T: Element>(
        &self,
        x: &Qkv<'_, T>,
        dims: &Dims,
        scale: f64,
        index: &Buckets,
    ) -> Array4<R> {
        let (_, mut pieces) = self.halves(dims);
        pieces.sort_unstable();
        let causal = !pieces.is_empty();
        of_heads(dims, &x.lengths, |head| {
            let [q, mut k, mut v] = [(&x.q, &head.queries), (&x.k, &head.keys), (&x.v, &head.keys)]
                .map(|(x, rows)| head.rows::<R, T>(x, rows));
            let n = dims.kv_len;
            // For each query and key, and then for each key that is drawn: what is added to
            // its score, if it is seen.
            let mut shifts = vec![vec![None; n]; dims.q_len];
            for (i, shifts) in shifts.iter_mut().enumerate().filter(|_| causal) {
                let seen = (i + n + 1).saturating_sub(dims.q_len);
                let first = pieces.iter().copied().filter(|&first| first < seen).max().unwrap_or(0);
                shifts[first.min(n)..seen.min(n)].fill(Some(0.0));
            }
            for part in &index.parts {
                let blocks = self.blocks([part.queries.len(), part.keys.len()]);
                let order = |which: usize, heads: usize, len: usize| {
                    let list = head.batch * heads + head.of(heads);
                    part.orders[which][list * len..(list + 1) * len].iter().map(|&row| row as usize)
                };
                let of_q: Vec<usize> = order(0, dims.q_heads, part.queries.len()).collect();
                let of_k: Vec<usize> = order(1, dims.kv_heads, part.keys.len()).collect();
                for (at, i) in of_q.iter().enumerate() {
                    for (place, j) in of_k.iter().enumerate() {
                        let seen = blocks.is_none_or(|step| at / step == place / self.block);
                        if seen {
                            shifts[part.queries.start + i][part.keys.start + j] = Some(0.0);
                        }
                    }
                }
                let Some(step) = blocks else { continue };
                let drawn = self.drawn(part.keys.len(), part.keys.start);
                let rows: Vec<usize> =
                    drawn.places.iter().map(|&at| part.keys.start + of_k[at as usize]).collect();
                for x in [&mut k, &mut v] {
                    let more = x.select(Axis(0), &rows);
                    *x = concatenate![Axis(0), *x, more];
                }
                let mut own = vec![None; dims.q_len];
                of_q.iter().enumerate().for_each(|(at, i)| own[part.queries.start + i] = Some(at / step));
                for (shifts, own) in shifts.iter_mut().zip(own) {
                    let other = |&place: &u32| own.is_some_and(|own| own != place as usize / self.block);
                    let shift = |place| other(place).then_some(f64::from(drawn.log_weight));
                    shifts.extend(drawn.places.iter().map(shift));
                }
            }
            attend::define([&q, &k, &v], scale, |i, j| shifts[i][j])
        })
    }
}
