//! Small helpers.
#![allow(dead_code, reason = "each test binary uses some of it")]

use attention_kernels::dense::{Dense, DenseBuilder, Selective, SelectiveBuilder, Sigmoid, SigmoidBuilder};
use attention_kernels::input::{Dims, Qkv, Site};
use attention_kernels::mask::Mask;
use attention_kernels::score::{Alibi, Bias, RelativeTable, Score, Softcap, score_fn};
use attention_kernels::simd::{Isa, Simd};
use ndarray::{Array, Array3, Array4, ArrayView4, Dimension};

/// Numbers in 0..1 from a seed (SplitMix64).
pub fn uniform(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Nearly normal numbers, standard deviation 1.
pub fn normal(seed: u64) -> impl FnMut() -> f32 {
    let mut uniform = uniform(seed);
    move || (((0..6).map(|_| uniform()).sum::<f64>() - 3.0) * std::f64::consts::SQRT_2) as f32
}

/// An array of [`normal`] numbers.
pub fn normals(seed: u64, dim: (usize, usize, usize, usize)) -> Array4<f32> {
    Array4::from_shape_simple_fn(dim, normal(seed))
}

/// Sizes of a call.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

/// `batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim`.
pub const fn shape(n: [usize; 7]) -> Shape {
    let [batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim] = n;
    Shape { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim }
}

/// Queries, keys and values.
#[derive(Clone, Debug)]
pub struct Case<T = f32> {
    pub q: Array4<T>,
    pub k: Array4<T>,
    pub v: Array4<T>,
}

impl Case {
    pub fn new(n: Shape, seed: u64) -> Self {
        Self {
            q: normals(seed, (n.batch, n.q_heads, n.q_len, n.head_dim)),
            k: normals(seed + 1000, (n.batch, n.kv_heads, n.kv_len, n.head_dim)),
            v: normals(seed + 2000, (n.batch, n.kv_heads, n.kv_len, n.value_dim)),
        }
    }
}

impl<T: Clone> Case<T> {
    pub fn x(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    pub fn map<U>(&self, f: impl Fn(T) -> U + Copy) -> Case<U> {
        Case {
            q: self.q.map(|x| f(x.clone())),
            k: self.k.map(|x| f(x.clone())),
            v: self.v.map(|x| f(x.clone())),
        }
    }
}

/// Every instruction set of this CPU.
pub fn isas() -> Vec<Isa> {
    Isa::available().collect()
}

/// Fails unless both are the same bits; any NaN equals any other.
#[track_caller]
pub fn same_bits<D: Dimension>(what: &str, got: &Array<f32, D>, want: &Array<f32, D>) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(same, "{what}: element {i} of {:?} is {a:e}, not {b:e}", got.shape());
    }
}

/// Fails unless each element is as near as the bound of its row allows.
#[track_caller]
pub fn within(what: &str, got: &Array4<f32>, want: ArrayView4<'_, f64>, bound: &Array3<f64>) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    for ((b, h, i, c), &x) in got.indexed_iter() {
        let (want, bound) = (want[[b, h, i, c]], bound[[b, h, i]]);
        let off = (f64::from(x) - want).abs();
        assert!(
            off <= bound,
            "{what}: [{b}, {h}, {i}, {c}] is {x:e}, not {want:e}: off by {off:e}, bound {bound:e}"
        );
    }
}

/// `got` as `f64`.
pub fn wide<D: Dimension>(x: &Array<f32, D>) -> Array<f64, D> {
    x.mapv(f64::from)
}

/// Any mask, so that the kernels are compiled once a test.
pub type AnyMask = Box<dyn Mask>;

/// Any score, for the same reason.
#[derive(Clone, Debug)]
pub enum AnyScore {
    Same,
    Softcap(Softcap),
    Alibi(Alibi),
    Table(RelativeTable),
    Bias(Bias<'static>),
    /// `s - slope_h |p(i) - j|`, written as a caller would.
    HandmadeAlibi(Vec<f32>),
}

impl AnyScore {
    /// A bias of an array, which is leaked.
    pub fn bias(bias: Array4<f32>) -> Self {
        Self::Bias(Bias::new(Box::leak(Box::new(bias)).view()))
    }
}

impl Score for AnyScore {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        match self {
            Self::Same => score,
            Self::Softcap(x) => x.define(site, query, key, score),
            Self::Alibi(x) => x.define(site, query, key, score),
            Self::Table(x) => x.define(site, query, key, score),
            Self::Bias(x) => x.define(site, query, key, score),
            Self::HandmadeAlibi(slopes) => handmade(slopes).define(site, query, key, score),
        }
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        match self {
            Self::Same => {}
            Self::Softcap(x) => x.apply(s, site, query, first, scores),
            Self::Alibi(x) => x.apply(s, site, query, first, scores),
            Self::Table(x) => x.apply(s, site, query, first, scores),
            Self::Bias(x) => x.apply(s, site, query, first, scores),
            Self::HandmadeAlibi(slopes) => handmade(slopes).apply(s, site, query, first, scores),
        }
    }
    fn check(&self, dims: &Dims) -> attention_kernels::Result<()> {
        match self {
            Self::Same | Self::HandmadeAlibi(_) => Ok(()),
            Self::Softcap(x) => x.check(dims),
            Self::Alibi(x) => x.check(dims),
            Self::Table(x) => x.check(dims),
            Self::Bias(x) => x.check(dims),
        }
    }
}

#[inline(always)]
fn handmade(slopes: &[f32]) -> impl Score + use<'_> {
    score_fn(|score, site, query, key| {
        let distance = (query as isize + site.q_start() - key as isize).abs();
        score - slopes[site.head] * distance as f32
    })
}

/// Dense attention under any mask.
pub fn masked(isa: Isa, mask: impl Mask + 'static) -> DenseBuilder<AnyMask> {
    Dense::builder().isa(isa).mask(Box::new(mask) as AnyMask)
}

/// Dense attention under any mask with any score.
pub fn scored(isa: Isa, mask: impl Mask + 'static, score: AnyScore) -> DenseBuilder<AnyMask, AnyScore> {
    masked(isa, mask).score(score)
}

/// Sigmoid attention under any mask.
pub fn sigmoid(isa: Isa, mask: impl Mask + 'static) -> SigmoidBuilder<AnyMask> {
    Sigmoid::builder().isa(isa).mask(Box::new(mask) as AnyMask)
}

/// Selective attention under any mask.
pub fn selective(isa: Isa, mask: impl Mask + 'static) -> SelectiveBuilder<AnyMask> {
    Selective::builder().isa(isa).mask(Box::new(mask) as AnyMask)
}
