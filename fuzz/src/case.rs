//! Random arrays: sizes, layouts, values, lengths.

use attention_kernels::Element;
use attention_kernels::input::{Lengths, Qkv};

use crate::random::Random;
use crate::stored::{Layout, Stored};

/// Sizes of a call.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

impl Sizes {
    /// Sizes that fit each other; `tokens` are as many queries as keys.
    pub fn random(random: &mut Random, tokens: bool) -> Self {
        let len = |random: &mut Random| match random.below(8) {
            0 => 0,
            1 => 1,
            2..5 => random.below(12),
            5 => random.below(70),
            6 => random.below(140),
            _ => random.below(300),
        };
        let dim = |random: &mut Random| match random.below(8) {
            0 => random.below(2),
            1..5 => 1 + random.below(20),
            _ => 1 + random.below(70),
        };
        let kv_heads = random.below(4);
        let kv_len = len(random);
        Self {
            batch: if random.one_in(20) { 0 } else { 1 + random.below(2) },
            q_heads: kv_heads * random.below(4),
            kv_heads,
            q_len: if tokens { kv_len } else { len(random) },
            kv_len,
            head_dim: dim(random),
            value_dim: dim(random),
        }
    }

    /// One size that does not fit.
    pub fn spoil(&mut self, random: &mut Random) {
        let size = match random.below(5) {
            0 => &mut self.q_heads,
            1 => &mut self.kv_heads,
            2 => &mut self.q_len,
            3 => &mut self.batch,
            _ => &mut self.head_dim,
        };
        *size = random.below(9);
    }
}

/// Which numbers an array has.
#[derive(Clone, Copy, Debug)]
pub enum Values {
    /// Normal ones of this size.
    Normal(f32),
    /// With others strewn in, one in so many.
    Special(usize),
}

impl Values {
    pub fn next(self, random: &mut Random) -> f32 {
        const SPECIAL: [f32; 14] = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            -0.0,
            f32::MAX,
            f32::MIN,
            1e30,
            -1e30,
            1e18,
            -1e10,
            1e-20,
            1e-39,
            f32::MIN_POSITIVE,
        ];
        match self {
            Self::Normal(size) => size * random.normal() as f32,
            Self::Special(every) if random.one_in(every) => random.pick(&SPECIAL),
            Self::Special(_) => random.normal() as f32,
        }
    }
}

/// Lengths of sequences.
#[derive(Clone, Debug)]
pub enum Rows {
    Full,
    Keys(Vec<usize>),
    Packed(Vec<usize>, Vec<usize>),
    Padded(Vec<usize>),
}

impl Rows {
    /// Offsets from 0 to `total` or less, or something that looks like it.
    fn offsets(random: &mut Random, sequences: usize, total: usize, right: bool) -> Vec<usize> {
        let end = if random.below(3) == 0 { random.below(total + 1) } else { total };
        let mut offsets: Vec<usize> = (1..sequences).map(|_| random.below(end + 1)).collect();
        offsets.sort_unstable();
        offsets.insert(0, 0);
        offsets.push(end);
        if !right {
            let at = random.below(offsets.len());
            offsets[at] = random.pick(&[0, 1, total + 1, usize::MAX, usize::MAX / 2]);
        }
        offsets
    }

    pub fn random(random: &mut Random, sizes: &mut Sizes, tokens: bool, right: bool) -> Self {
        match random.below(3) {
            0 => Self::Full,
            1 => {
                let most = if right { sizes.kv_len } else { sizes.kv_len + 1 };
                let lengths = (0..sizes.batch).map(|_| random.below(most + 1)).collect();
                if tokens { Self::Padded(lengths) } else { Self::Keys(lengths) }
            }
            _ => {
                sizes.batch = 1;
                let sequences = 1 + random.below(4);
                let queries = Self::offsets(random, sequences, sizes.q_len, right);
                let keys = match tokens {
                    true => queries.clone(),
                    false => Self::offsets(random, sequences, sizes.kv_len, right),
                };
                Self::Packed(queries, keys)
            }
        }
    }

    pub fn lengths(&self) -> Lengths<'_> {
        match self {
            Self::Full => Lengths::Full,
            Self::Keys(keys) => Lengths::Keys(keys),
            Self::Padded(tokens) => Lengths::Tokens(tokens),
            Self::Packed(queries, keys) => Lengths::Packed { queries, keys },
        }
    }
}

/// How large numbers become.
#[derive(Clone, Copy)]
pub struct Range {
    pub product: f64,
    pub number: f64,
}

impl Range {
    /// Of numbers of ordinary size.
    pub const ONE: Self = Self { product: 1.0, number: 1.0 };
}

/// Queries, keys and values.
pub struct Case<T> {
    pub sizes: Sizes,
    pub rows: Rows,
    arrays: [Stored<T>; 3],
}

impl<T: Element> Case<T> {
    pub fn new(
        random: &mut Random,
        sizes: Sizes,
        rows: Rows,
        layouts: [Layout; 3],
        values: [Values; 3],
    ) -> Self {
        let Sizes { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim } = sizes;
        let dims = [
            (batch, q_heads, q_len, head_dim),
            (batch, kv_heads, kv_len, head_dim),
            (batch, kv_heads, kv_len, value_dim),
        ];
        let arrays = std::array::from_fn(|i| {
            Stored::from_fn(dims[i], layouts[i], || T::from_f32(values[i].next(random)))
        });
        Self { sizes, rows, arrays }
    }

    /// How large products of numbers of a query, a key and a value may become
    /// on the way, where some mechanisms square the first two, with room for
    /// sums; and the largest number.
    pub fn range(&self) -> Range {
        let [q, k, v] = [0, 1, 2].map(|i| {
            let sizes = self.arrays[i].memory().iter().map(|x| x.to_f64().abs());
            sizes.filter(|x| x.is_finite()).fold(1.0, f64::max)
        });
        Range { product: 1e4 * q * q * k * k * v, number: q.max(k).max(v) }
    }

    pub fn x(&self) -> Qkv<'_, T> {
        let [q, k, v] = &self.arrays;
        Qkv { lengths: self.rows.lengths(), ..Qkv::new(q.view(), k.view(), v.view()) }
    }
}
