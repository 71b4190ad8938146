//! HyperAttention: blocks of tokens that hash alike, and sampled keys for the rest.
//!
//! ```text
//! code(x)   = sum_l 2^l [x . p_l > 0]              for r directions p_l, drawn once
//! tokens are sorted by the place of their code in the Gray code, queries and keys
//! block u   = keys u b .. (u + 1) b, and as many queries of as many blocks
//! o_i       = softmax attention of q_i on the keys of its block, and on m drawn keys
//!             of others, each with the weight kv_len / m
//! ```
//!
//! From "HyperAttention: Long-context Attention in Near-Linear Time" (arXiv
//! 2310.05869); not causal. Codes that follow each other in the Gray code differ in
//! one bit; the released code takes the code of the Gray code instead, whose
//! neighbours may differ in more ([`released_order`](HyperBuilder::released_order)).
//! Keys are drawn from all in sorted order, the same places for all heads; those in a
//! query's own block count as drawn, so that the sum over others is right on average.
//! At least as many as there are keys are all of them, once: attention is exact then.
//!
//! Cost: `2 (head_dim + value_dim)` flops a pair, of `block + samples` a query, and
//! `2 head_dim` for each direction and token.

use ndarray::{Array2, Array4, ArrayView3, Axis, ShapeBuilder, concatenate};

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::call::{Sight, Virtual};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::mask::interval::Interval;
use crate::math::random::Normal;
use crate::select::hash::{self, gray_rank};
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::arrange::{Picked, Places};
use crate::stages::attend;
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::pass::{Out, Pass};
use crate::stages::planned::{check_count, sparse};

sparse! {
    /// HyperAttention; see the [module](crate::sparse) for its kin.
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
    HyperBuilder, never causal;
    given {
        planes: usize;
    }
    own {
        /// Keys of a block. Default: 256.
        block: usize = 256;
        /// Keys that are drawn; 0 for none. Default: 256.
        samples: usize = 256;
        /// Fewer queries than these see all keys. Default: 4096.
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
    /// Of each place the token.
    orders: [Vec<u32>; 2],
    places: Places,
}

impl Buckets {
    /// The queries of each head, `[batch, q_heads, q_len]`, as they are sorted.
    pub fn queries(&self) -> &[u32] {
        &self.orders[0]
    }

    /// The keys of each head, `[batch, kv_heads, kv_len]`, as they are sorted.
    pub fn keys(&self) -> &[u32] {
        &self.orders[1]
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
        if x.lengths != Lengths::Full {
            let reason = "all tokens of the arrays are sorted";
            return Err(Error::Conflict {
                option: "sequences of other lengths",
                with: "sorted tokens",
                reason,
            });
        }
        x.dims()
    }

    fn planes(&self, dim: usize) -> Vec<f32> {
        Normal::new(self.seed).take(self.planes.saturating_mul(dim)).map(|x| x as f32).collect()
    }

    fn bucket(&self, code: u32) -> u32 {
        if self.released_order { code ^ (code >> 1) } else { gray_rank(code) }
    }

    /// The index of some codes, of queries and keys.
    fn index(&self, dims: &Dims, codes: [Vec<u32>; 2]) -> Result<Buckets> {
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, .. } = *dims;
        let buckets = codes.map(|codes| codes.into_iter().map(|code| self.bucket(code)).collect::<Vec<_>>());
        let sort = |i: usize, n| hash::sorted(&buckets[i], n, self.planes);
        let orders = [sort(0, q_len)?, sort(1, kv_len)?];
        let picked = Picked { rows: &orders[0], units: q_heads, len: q_len };
        let places = Places::of(picked, [batch, q_heads, q_len])?;
        Ok(Buckets { sizes: [batch, q_heads, kv_heads, q_len, kv_len], buckets, orders, places })
    }

    /// Whether queries see all keys; queries of a block otherwise.
    fn blocks(&self, dims: &Dims) -> Option<usize> {
        let exact = dims.q_len < self.exact_below || dims.kv_len <= self.block;
        (!exact).then(|| dims.q_len.div_ceil(dims.kv_len.div_ceil(self.block)).max(1))
    }

    fn drawn(&self, keys: usize) -> Drawn {
        if self.samples >= keys {
            return Drawn { places: (0..keys as u32).collect(), log_weight: 0.0 };
        }
        let mut random = Normal::new(!self.seed);
        let places = (0..self.samples).map(|_| ((random.unit() * keys as f64) as usize).min(keys - 1) as u32);
        Drawn { places: places.collect(), log_weight: (keys as f64 / self.samples as f64).ln() as f32 }
    }

    /// Checks an index, and gives the sizes.
    fn fitting<T: Element>(&self, x: &Qkv<'_, T>, index: &Buckets) -> Result<Dims> {
        let dims = self.dims(x)?;
        let sizes = [dims.batch, dims.q_heads, dims.kv_heads, dims.q_len, dims.kv_len];
        let most = index.buckets.iter().flatten().max().copied().unwrap_or(0);
        if index.sizes == sizes && most >> self.planes == 0 {
            return Ok(dims);
        }
        Err(Error::value(
            "index",
            format!("one of {sizes:?} and {} bits", self.planes),
            format_args!("{:?}", index.sizes),
        ))
    }
}

impl<T: Element> Choosing<Qkv<'_, T>> for HyperAttention {
    type Index = Buckets;

    fn choose(&self, x: Qkv<'_, T>) -> Result<Buckets> {
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
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, .. } = dims;
        let all = self.config.masked(Interval(move |_: &Site, _| 0..kv_len));
        let Some(queries) = self.blocks(&dims) else { return all.attend(pass, x, out) };
        let (block, drawn) = (self.block, self.drawn(kv_len));
        let of_drawn: Vec<u32> = (index.orders[1].chunks(kv_len.max(1)))
            .flat_map(|order| drawn.places.iter().map(|&place| order[place as usize]))
            .collect();
        let picked = |rows, units, len| Picked { rows, units, len };
        let q = picked(&index.orders[0], q_heads, q_len).gather(pass, isa, x.q)?;
        let [k, v] = [x.k, x.v].map(|x| picked(&index.orders[1], kv_heads, kv_len).gather(pass, isa, x));
        let [dk, dv] =
            [x.k, x.v].map(|x| picked(&of_drawn, kv_heads, drawn.places.len()).gather(pass, isa, x));
        let (k, v, dk, dv) = (k?, v?, dk?, dv?);
        let mut sorted = pass.rows((batch, q_heads, q_len, dims.value_dim))?;

        let weight = [drawn.log_weight];
        let logs = ArrayView3::from_shape((batch, kv_heads, drawn.places.len()).strides((0, 0, 0)), &weight);
        let blocks: Vec<u32> = drawn.places.iter().map(|place| place / block as u32).collect();
        let own = self.config.masked(Interval(move |_: &Site, query: usize| {
            let at = |u: usize| u.saturating_mul(block).min(kv_len);
            at(query / queries)..at(query / queries + 1)
        }));
        let extra = Virtual {
            k: f32::any(Heads::new(dk.view())),
            v: f32::any(Heads::new(dv.view())),
            log_weights: logs.map_err(|_| Error::too_large("samples", self.samples))?,
            seen: Sight::Outside { blocks: &blocks, step: queries },
            q_start: Some(0),
        };
        let of_sorted = Qkv {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            lengths: Lengths::Full,
            out: std::marker::PhantomData::<f32>,
        };
        own.attend_with(pass, of_sorted, Some(extra), sorted.view_mut())?;
        index.places.means(pass, isa, &sorted, out);
        Ok(())
    }

    fn define_on<R: Real>(&self, x: Qkv<'_, T>, index: &Buckets) -> Result<Array4<R>> {
        let dims = self.fitting(&x, index)?;
        let (n, drawn, queries) = (dims.kv_len, self.drawn(dims.kv_len), self.blocks(&dims));
        // The block of each token, from its place among all.
        let blocks = |which: usize, list: usize, len: usize, size: usize| {
            let mut blocks = vec![0; len];
            for (place, &row) in index.orders[which][list * len..][..len].iter().enumerate() {
                blocks[row as usize] = place / size;
            }
            blocks
        };
        Ok(of_heads(&dims, &x.lengths, |head| {
            let [q, k, v] = [(&x.q, &head.queries), (&x.k, &head.keys), (&x.v, &head.keys)]
                .map(|(x, rows)| head.rows::<R, T>(x, rows));
            let scale = self.config.scale(&dims);
            let Some(queries) = queries else { return attend::define([&q, &k, &v], scale, |_, _| Some(0.0)) };
            let list = head.batch * dims.kv_heads + head.of(dims.kv_heads);
            let of_q = blocks(0, head.batch * dims.q_heads + head.head, dims.q_len, queries);
            let of_k = blocks(1, list, n, self.block);
            let rows: Vec<usize> =
                drawn.places.iter().map(|&at| index.orders[1][list * n + at as usize] as usize).collect();
            let with = |x: &Array2<R>| concatenate(Axis(0), &[x.view(), x.select(Axis(0), &rows).view()]);
            let (Ok(k), Ok(v)) = (with(&k), with(&v)) else { return v };
            attend::define([&q, &k, &v], scale, |i, j| match j.checked_sub(n) {
                None => (of_q[i] == of_k[j]).then_some(0.0),
                Some(at) => (of_q[i] != of_k[rows[at]]).then_some(f64::from(drawn.log_weight)),
            })
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

#[cfg(test)]
mod tests {
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
        assert!(hyper.select(x.qkv()).unwrap().queries()[..96].is_sorted());
    }

    /// Over many seeds what is drawn sums to what the other blocks have: for equal keys
    /// the number of these.
    #[test]
    fn draws_are_right_on_average() {
        let mut x = Arrays::normal([1, 1, 1, 64, 640, 8, 1], 3);
        x.q.fill(0.0);
        x.k.fill(0.0);
        x.v.slice_mut(ndarray::s![.., .., ..32, ..]).fill(0.0);
        x.v.slice_mut(ndarray::s![.., .., 32.., ..]).fill(1.0);
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
