//! HyperAttention: blocks of tokens that hash alike, and sampled keys for the rest.

use ndarray::Array4;

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::math::random::Normal;
use crate::select::hash::{self, gray_rank};
use crate::simd::mem::Heads;
use crate::stages::buckets::{Buckets, Sorted};
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::pass::{Out, Pass};
use crate::stages::planned::{check_count, sparse};

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

impl HyperAttention {
    /// With codes of so many bits.
    pub fn builder(planes: usize) -> HyperBuilder {
        HyperBuilder::with(planes)
    }

    fn dims<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        x.lengths.check_full("sorted tokens", "all tokens of the arrays are sorted")?;
        Ok(dims)
    }

    fn planes(&self, dim: usize) -> Vec<f32> {
        Normal::new(self.seed).take(self.planes.saturating_mul(dim)).map(|x| x as f32).collect()
    }

    fn bucket(&self, code: u32) -> u32 {
        if self.released_order { code ^ (code >> 1) } else { gray_rank(code) }
    }

    fn sorted(&self) -> Sorted {
        let &Self { planes: bits, block, samples, exact_below, seed, .. } = self;
        Sorted { bits, block, samples, exact_below, seed, causal: self.config.mask().causal }
    }

    /// The index of some codes, of queries and keys.
    fn index(&self, dims: &Dims, codes: [Vec<u32>; 2]) -> Result<Buckets> {
        let of = |codes: Vec<u32>| codes.into_iter().map(|code| self.bucket(code)).collect();
        self.sorted().index(dims, codes.map(of))
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
        let codes = [&x.q, &x.k].map(|x| definition::hash::sides(x, &planes, &mut margins));
        Ok((self.index(&dims, codes)?, margins))
    }

    fn choice_flops(&self, x: Qkv<'_, T>) -> Result<u64> {
        Ok(2 * self.planes as u64 * (x.q.len() + x.k.len()) as u64)
    }

    fn differ(a: &Buckets, b: &Buckets, margins: &Margins) -> Option<String> {
        a.difference(b, margins)
    }

    fn flow_on(&self, x: Qkv<'_, T>, index: &Buckets, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.sorted().check(&self.dims(&x)?, index)?;
        self.sorted().run(&self.config, pass, x, index, out)
    }

    fn define_on<R: Real>(&self, x: Qkv<'_, T>, index: &Buckets) -> Result<Array4<R>> {
        let dims = self.dims(&x)?;
        self.sorted().check(&dims, index)?;
        Ok(self.sorted().define(&x, &dims, self.config.scale(&dims), index))
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
    use std::ops::Range;

    use ndarray::{Axis, s};

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
