//! HyperAttention: blocks of tokens that hash alike, and sampled keys for the rest.

use std::iter::once;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array4, ArrayView3, Axis, ShapeBuilder, concatenate};

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::{Sight, Virtual};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::keys::Keys;
use crate::mask::Unmasked;
use crate::mask::interval::Interval;
use crate::math::random::Normal;
use crate::select::hash::{self, gray_rank};
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::arrange::{Picked, Places};
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::pass::{Out, Pass};
use crate::stages::planned::{check_count, sparse};
use crate::stages::states::{self, Into};
use crate::stages::{attend, scale};

sparse! {
    /// HyperAttention: blocks of tokens that hash alike, and sampled keys for the rest.
    ///
    /// ```text
    /// code(x)   = sum_l 2^l [x . p_l > 0]              for r directions p_l, drawn once
    /// tokens are sorted by the place of their code in the Gray code, queries and keys
    /// block u   = keys u b .. (u + 1) b, and as many queries of as many blocks
    /// o_i       = softmax attention of q_i on the keys of its block, and on m drawn keys
    ///             of others, each with the weight kv_len / m
    /// ```
    ///
    /// From "HyperAttention: Long-context Attention in Near-Linear Time" (arXiv
    /// 2310.05869). Causal, the keys are halved again and again until halves are short:
    /// the queries of a second half see its first half in this way, and those of the
    /// shortest pieces their own keys up to their position; all in one softmax. Later
    /// queries may so change a choice, but no later key or value anything. Codes that follow each other in the Gray code differ in
    /// one bit; the released code takes the code of the Gray code instead, whose
    /// neighbours may differ in more ([`released_order`](HyperBuilder::released_order)).
    /// Keys are drawn from all in sorted order, the same places for all heads; those in a
    /// query's own block count as drawn, so that the sum over others is right on average.
    /// At least as many as there are keys are all of them, once: attention is exact then.
    ///
    /// Buckets are of all tokens, and change with each: it is for prompts, over arrays,
    /// and not for steps over a cache.
    ///
    /// Cost: `2 (head_dim + value_dim)` flops a pair, of `block + samples` a query (causal,
    /// in each of `log2(kv_len / exact_below)` halvings in which it is in a second half),
    /// and `2 head_dim` for each direction and token.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::HyperAttention};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let hyper = HyperAttention::builder(7).block(64).samples(64).exact_below(512).build()?;
    /// let out = hyper.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    HyperAttention;
    /// Builds a [`HyperAttention`].
    HyperBuilder, perhaps causal;
    given {
        planes: usize;
    }
    own {
        /// Keys of a block. Default: 256.
        block: usize = 256;
        /// Keys that are drawn; 0 for none. Default: 256.
        samples: usize = 256;
        /// Fewer queries than these see all keys, and so do, causal, as few keys and
        /// fewer. Default: 4096.
        exact_below: usize = 4096;
        /// Sorts by the code of the Gray code, as the released code does. Default: by
        /// the place in it.
        released_order: bool = false;
        /// What directions and keys are drawn from. Default: 0.
        seed: u64 = 0;
    }
    check(this) {
        if this.planes > hash::MOST {
            return Err(Error::value("planes", format!("at most {}", hash::MOST), this.planes));
        }
        check_count("block", this.block)
    }
}

/// The order in which [`HyperAttention`] sorts queries and keys.
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
}

/// Keys that are drawn, as places in sorted order, and the logarithm of their weight.
struct Drawn {
    places: Vec<u32>,
    log_weight: f32,
}

impl HyperAttention {
    /// With codes of so many bits.
    pub fn builder(planes: usize) -> HyperBuilder {
        HyperBuilder::with(planes)
    }

    fn dims<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.lengths != Lengths::Full {
            let reason = "all tokens of the arrays are sorted";
            return Err(Error::Conflict {
                option: "sequences of other lengths",
                with: "sorted tokens",
                reason,
            });
        }
        Ok(dims)
    }

    fn planes(&self, dim: usize) -> Vec<f32> {
        Normal::new(self.seed).take(self.planes.saturating_mul(dim)).map(|x| x as f32).collect()
    }

    fn bucket(&self, code: u32) -> u32 {
        if self.released_order { code ^ (code >> 1) } else { gray_rank(code) }
    }

    /// The queries and the keys of each part, and where the pieces begin whose keys are
    /// seen as they come.
    fn halves(&self, dims: &Dims) -> (Vec<[Range<usize>; 2]>, Vec<usize>) {
        let Dims { q_len, kv_len, .. } = *dims;
        if !self.config.mask().causal {
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

    /// The index of some codes, of queries and keys.
    fn index(&self, dims: &Dims, codes: [Vec<u32>; 2]) -> Result<Buckets> {
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, .. } = *dims;
        let buckets = codes.map(|codes| codes.into_iter().map(|code| self.bucket(code)).collect::<Vec<_>>());
        let part = |[queries, keys]: [Range<usize>; 2]| {
            let sorted = self.blocks([queries.len(), keys.len()]).is_some();
            let order = |buckets: &[u32], len: usize, of: &Range<usize>| {
                let heads = buckets.chunks(len.max(1));
                let own: Vec<u32> = heads.flat_map(|head| &head[of.clone()]).copied().collect();
                match sorted {
                    true => hash::sorted(&own, of.len(), self.planes),
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

    /// Checks an index, and gives the sizes.
    fn fitting<T: Element>(&self, x: &Qkv<'_, T>, index: &Buckets) -> Result<Dims> {
        let dims = self.dims(x)?;
        let sizes = [dims.batch, dims.q_heads, dims.kv_heads, dims.q_len, dims.kv_len];
        let most = index.buckets.iter().flatten().max().copied().unwrap_or(0);
        if index.sizes == sizes && most >> self.planes == 0 && index.parts().eq(self.halves(&dims).0) {
            return Ok(dims);
        }
        Err(Error::value(
            "index",
            format!("one of {sizes:?} and {} bits", self.planes),
            format_args!("{:?}", index.sizes),
        ))
    }

    /// Merges what the queries of a part see into their states.
    fn attend<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: &Qkv<'_, T>,
        part: &Part,
        into: Into<'_, '_>,
    ) -> Result<()> {
        let (dims, isa, [queries, keys]) =
            (x.dims()?, self.config.isa(), [part.queries.len(), part.keys.len()]);
        let q = x.q.slice_axis(Axis(2), part.queries.clone().into());
        let [k, v] = [&x.k, &x.v].map(|x| x.slice_axis(Axis(2), part.keys.clone().into()));
        let mut states = states::rows(pass, (dims.batch, dims.q_heads, queries, dims.value_dim))?;
        let Some(step) = self.blocks([queries, keys]) else {
            let x = Qkv { q, k, v, lengths: Lengths::Full, out: PhantomData };
            self.config.masked(Unmasked).attend_states(pass, x, Keys::Mask, None, &mut states)?;
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
        let own = self.config.masked(Interval(move |_: &Site, query: usize| {
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
}

impl<T: Element> Choosing<Qkv<'_, T>> for HyperAttention {
    type Index = Buckets;

    fn choose(&self, x: Qkv<'_, T>, _: &mut Workspace) -> Result<Buckets> {
        let dims = self.dims(&x)?;
        let planes = self.planes(dims.head_dim);
        let sides = |x| hash::sides(self.config.isa(), T::any(Heads::new(x)), &planes);
        self.index(&dims, [sides(x.q)?, sides(x.k)?])
    }

    fn define_choice(&self, x: Qkv<'_, T>) -> Result<(Buckets, Margins)> {
        let dims = self.dims(&x)?;
        let planes: Vec<f64> = self.planes(dims.head_dim).into_iter().map(f64::from).collect();
        let mut margins = Margins::default();
        let codes = [&x.q, &x.k].map(|x| {
            let mut codes = Vec::new();
            for head in x
                .outer_iter()
                .flat_map(|x| x.outer_iter().map(|x| x.mapv(Element::to_f64)).collect::<Vec<_>>())
            {
                let mut doubtful = Vec::new();
                for (i, row) in head.outer_iter().enumerate() {
                    let (mut code, mut doubt) = (0, false);
                    for (l, plane) in planes.chunks_exact(dims.head_dim.max(1)).enumerate() {
                        let terms = || row.iter().zip(plane).map(|(x, p)| x * p);
                        let (sum, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        code |= u32::from(sum > 0.0) << l;
                        doubt |= (sum != 0.0 || size != 0.0) && sum.abs() <= SELECTION_MARGIN * size;
                        doubt |= size > f64::from(f32::MAX);
                    }
                    codes.push(code);
                    doubtful.extend(doubt.then_some(i..i + 1));
                }
                margins.doubtful.push(doubtful);
            }
            codes
        });
        Ok((self.index(&dims, codes)?, margins))
    }

    fn choice_flops(&self, x: Qkv<'_, T>) -> Result<u64> {
        Ok(2 * self.planes as u64 * (x.q.len() + x.k.len()) as u64)
    }

    fn differ(a: &Buckets, b: &Buckets, margins: &Margins) -> Option<String> {
        let lens = [a.sizes[3], a.sizes[4]];
        let lists = a
            .buckets
            .iter()
            .zip(&b.buckets)
            .zip(lens)
            .flat_map(|((a, b), n)| a.chunks(n.max(1)).zip(b.chunks(n.max(1))));
        if a.sizes != b.sizes {
            return Some(format!("{:?} and {:?}", a.sizes, b.sizes));
        }
        let heads = lists.zip(&margins.doubtful).enumerate();
        heads.into_iter().find_map(|(list, ((a, b), doubtful))| {
            let sure = |i: &usize| a[*i] != b[*i] && !doubtful.iter().any(|range| range.contains(i));
            (0..a.len()).find(sure).map(|i| format!("list {list}: token {i} is in {} and in {}", a[i], b[i]))
        })
    }

    fn flow_on(&self, x: Qkv<'_, T>, index: &Buckets, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let (dims, isa) = (self.fitting(&x, index)?, self.config.isa());
        let Dims { batch, q_heads, q_len, kv_len, value_dim, .. } = dims;
        let mut all = states::rows(pass, (batch, q_heads, q_len, value_dim))?;
        let (_, mut pieces) = self.halves(&dims);
        let causal = !pieces.is_empty();
        if causal {
            pieces.sort_unstable();
            let near = self.config.masked(Interval(|_: &Site, query: usize| {
                let seen = (query + kv_len + 1).saturating_sub(q_len).min(kv_len);
                let after = pieces.partition_point(|&first| first < seen);
                after.checked_sub(1).map_or(0, |piece| pieces[piece])..seen
            }));
            let x = Qkv { q: x.q, k: x.k, v: x.v, lengths: Lengths::Full, out: PhantomData };
            near.attend_states(pass, x, Keys::Mask, None, &mut all)?;
        }
        for part in &index.parts {
            let at = [0, 0, part.queries.start];
            pass.within(|pass| self.attend(pass, &x, part, Into { states: &mut all, at, fresh: !causal }))?;
        }
        scale::run(pass, isa, &all, |_| 1.0, out);
        Ok(())
    }

    fn define_on<R: Real>(&self, x: Qkv<'_, T>, index: &Buckets) -> Result<Array4<R>> {
        let dims = self.fitting(&x, index)?;
        let (_, mut pieces) = self.halves(&dims);
        pieces.sort_unstable();
        let causal = !pieces.is_empty();
        Ok(of_heads(&dims, &x.lengths, |head| {
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
            attend::define([&q, &k, &v], self.config.scale(&dims), |i, j| shifts[i][j])
        }))
    }
}
choosing!(HyperAttention, Buckets, Qkv);

exhibit! {
    HyperExhibit of HyperAttention, "sparse", "HyperAttention", "arXiv 2310.05869";
    "of queries and keys sorted by 3 hash bits blocks of 16 keys, and 24 drawn keys for all others";
    not "where a few keys far from a query in angle have most of the weight: draws may miss them";
    tokens false;
    build(_, _) { HyperAttention::builder(3).block(16).samples(24).exact_below(0) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(HyperAttention, HyperExhibit);

exhibit! {
    CausalHyperExhibit of HyperAttention, "sparse", "causal HyperAttention", "arXiv 2310.05869";
    "keys up to the query in its piece of at most 24, and of earlier halves 8 that hash alike and 8 drawn";
    not "where a few keys far from a query in angle have most of the weight: draws may miss them";
    tokens false;
    build(_, _) { HyperAttention::builder(3).block(8).samples(8).exact_below(24).causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    fn hyper(block: usize, samples: usize) -> HyperBuilder {
        HyperAttention::builder(4).block(block).samples(samples).exact_below(0)
    }

    /// Large blocks, few queries and all keys drawn are dense, whatever the order.
    #[test]
    fn all_keys_are_dense() {
        for sizes in [[2, 4, 2, 90, 130, 16, 8], [1, 2, 1, 3, 70, 16, 8], [1, 2, 2, 200, 40, 16, 8]] {
            let x = Arrays::normal(sizes, 1);
            let want = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
            for builder in [hyper(130, 0), hyper(16, 1000), hyper(16, 130).released_order(true)] {
                testing::near("all", &builder.build().unwrap().forward(x.qkv()).unwrap(), &want);
            }
            let few = hyper(16, 3).exact_below(201).build().unwrap().forward(x.qkv()).unwrap();
            testing::near("few queries", &few, &want);
        }
    }

    /// Causal, where halves are short, blocks large or all keys drawn.
    #[test]
    fn all_keys_are_causal() {
        for sizes in [[2, 4, 2, 150, 150, 16, 8], [1, 2, 1, 3, 70, 16, 8], [1, 2, 2, 130, 40, 16, 8]] {
            let x = Arrays::normal(sizes, 1);
            let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
            for builder in [hyper(16, 1000), hyper(150, 0).exact_below(9), hyper(4, 3).exact_below(150)] {
                testing::near("all", &builder.causal().build().unwrap().forward(x.qkv()).unwrap(), &want);
            }
        }
    }

    /// The first half is the whole of itself, the second its own past and what a call that
    /// is not causal makes of the first, merged; later keys and values are nothing to it.
    #[test]
    fn halves_are_calls_of_their_own() {
        let (x, causal) = (Arrays::normal([1, 4, 2, 128, 128, 16, 8], 4), hyper(8, 12).exact_below(64));
        let causal = causal.causal().build().unwrap();
        let out = causal.forward(x.qkv()).unwrap();
        let cut = |rows: Range<usize>, keys: Range<usize>| {
            let of = |x: &Array4<f32>, rows: &Range<usize>| x.slice(s![.., .., rows.clone(), ..]).to_owned();
            Arrays { q: of(&x.q, &rows), k: of(&x.k, &keys), v: of(&x.v, &keys) }
        };
        let first = causal.forward(cut(0..64, 0..64).qkv()).unwrap();
        assert_eq!(first, out.slice(s![.., .., ..64, ..]));
        let own = cut(64..128, 64..128);
        let mut want = Dense::builder().causal().build().unwrap().forward(own.qkv()).unwrap();
        // With values of 1 and weights that sum to w in all: w / (w + own).
        let past = hyper(8, 12).exact_below(64).build().unwrap();
        let (mut ones, other) = (cut(64..128, 0..128), past.forward(cut(64..128, 0..64).qkv()).unwrap());
        ones.v.slice_mut(s![.., .., ..64, ..]).fill(1.0);
        ones.v.slice_mut(s![.., .., 64.., ..]).fill(0.0);
        let share = causal.forward(Qkv { q: x.q.view(), ..ones.qkv() }).unwrap();
        for ((b, h, i, c), want) in want.indexed_iter_mut() {
            let share = share[[b, h, 64 + i, c]];
            *want = share * other[[b, h, i, c]] + (1.0 - share) * *want;
            assert!(share > 0.0 && share < 1.0);
        }
        testing::near("second", &out.slice(s![.., .., 64.., ..]).to_owned(), &want);
        let mut later = cut(0..128, 0..128);
        later.k.slice_mut(s![.., .., 64.., ..]).fill(f32::NAN);
        later.v.slice_mut(s![.., .., 64.., ..]).fill(f32::NAN);
        let after = causal.forward(later.qkv()).unwrap();
        assert_eq!(after.slice(s![.., .., ..64, ..]), out.slice(s![.., .., ..64, ..]));
        assert_eq!(causal.select(x.qkv()).unwrap().parts().collect::<Vec<_>>(), [[64..128, 0..64]]);
    }

    /// Without draws tokens of a block see each other alone, wherever they lie.
    #[test]
    fn tokens_may_change_places() {
        let x = Arrays::normal([1, 2, 1, 96, 96, 16, 8], 2);
        let order: Vec<usize> = (0..96).map(|i| i * 5 % 96).collect();
        let turn = |x: &Array4<f32>| x.select(Axis(2), &order);
        let y = Arrays { q: turn(&x.q), k: turn(&x.k), v: turn(&x.v) };
        // Blocks that are buckets: each has as many tokens, whose order in it is free.
        let hyper = HyperAttention::builder(0).block(96).samples(0).exact_below(0).build().unwrap();
        testing::near("turned", &hyper.forward(y.qkv()).unwrap(), &turn(&hyper.forward(x.qkv()).unwrap()));
        assert!(hyper.select(x.qkv()).unwrap().queries(0)[..96].is_sorted());
    }

    /// Over many seeds what is drawn sums to what the other blocks have: for equal keys
    /// the number of these.
    #[test]
    fn draws_are_right_on_average() {
        let mut x = Arrays::normal([1, 1, 1, 64, 640, 8, 1], 3);
        x.q.fill(0.0);
        x.k.fill(0.0);
        x.v.slice_mut(s![.., .., ..32, ..]).fill(0.0);
        x.v.slice_mut(s![.., .., 32.., ..]).fill(1.0);
        // The first query is in the first block of 32 keys: w / (32 + w).
        let others = |seed: u64| {
            let out = hyper(32, 64).seed(seed).build().unwrap().forward(x.qkv()).unwrap()[[0, 0, 0, 0]];
            f64::from(32.0 * out / (1.0 - out))
        };
        let mean = (0..200).map(others).sum::<f64>() / 200.0;
        assert!((mean - 608.0).abs() < 6.0, "{mean}");
    }

    #[test]
    fn refusals() {
        let refusal = |builder: HyperBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(HyperAttention::builder(17)), "planes: expected at most 16, got 17");
        assert_eq!(refusal(hyper(0, 1)), "block: expected at least 1, got 0");
        let (x, y) = (Arrays::normal([1, 1, 1, 5, 40, 8, 4], 5), Arrays::normal([1, 1, 1, 5, 41, 8, 4], 5));
        let hyper = hyper(16, 2).build().unwrap();
        let index = hyper.select(x.qkv()).unwrap();
        assert!(hyper.forward_on(y.qkv(), &index).unwrap_err().to_string().starts_with("index: "));
        assert!(hyper.forward(x.qkv().key_lengths(&[7])).is_err());
    }
}
