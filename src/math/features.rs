//! Feature maps: what linear attention makes of queries and keys, so that the
//! dot product of two rows of features is the weight of a pair.
//!
//! | map | features of a row `x` | of `head_dim` |
//! |---|---|---|
//! | [`Identity`] | `x` | as many |
//! | [`EluPlusOne`] | `exp x` below 0, `x + 1` from there on | as many |
//! | [`Sigmoid`] | `1 / (1 + exp -x)` | as many |
//! | [`Relu`] | `max(x, 0)` | as many |
//! | [`Taylor`] | all products of up to two elements: `1 + t + t^2/2` of the dot product `t` | `1 + d + d (d + 1) / 2` |
//! | [`Favor`] | exponentials of random projections | as many as wanted |
//! | [`HashSigns`] | signs of a learned hash, and a constant | bits + 1 |

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayView2};

use crate::error::{Error, Result};
use crate::math::random::Normal;
use crate::simd::exp::{exp, sigmoid};
use crate::simd::mem::{Rows, prefetch_l1};
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Isa, Kernel, Simd};

/// Rows to be mapped, and where their features go.
#[derive(Debug)]
pub struct FeatureRows<'a> {
    /// How many rows.
    pub rows: usize,
    /// Elements of a row: `head_dim`.
    pub dim: usize,
    /// The rows one after the other, `[rows, dim]`.
    pub x: &'a [f32],
    /// Rows of features, `stride` apart. What lies past the features of a row
    /// must be left 0.
    pub features: &'a mut [f32],
    /// From one row of features to the next; at least as many as there are
    /// features, rounded up to 16.
    pub stride: usize,
}

/// A function of rows of queries and keys.
///
/// Head `head` of a mechanism may have a function of its own. A NaN in a row
/// must show in its features.
///
/// ```
/// use attention_kernels::math::features::{FeatureMap, FeatureRows};
/// use attention_kernels::{Attention, Qkv, linear::LinearAttention, simd::Isa};
/// use ndarray::Array4;
///
/// #[derive(Clone, Debug)]
/// struct Square;
///
/// impl FeatureMap for Square {
///     fn dim(&self, head_dim: usize) -> usize {
///         head_dim
///     }
///     fn apply(&self, _: Isa, _head: usize, rows: FeatureRows<'_>) {
///         for row in 0..rows.rows {
///             for c in 0..rows.dim {
///                 rows.features[row * rows.stride + c] = rows.x[row * rows.dim + c].powi(2);
///             }
///         }
///     }
///     fn define(&self, _head: usize, row: &[f64]) -> Vec<f64> {
///         row.iter().map(|x| x * x).collect()
///     }
/// }
///
/// let x = Array4::<f32>::ones((1, 2, 5, 16));
/// let attention = LinearAttention::builder().features(Square).build()?;
/// let out = attention.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub trait FeatureMap: std::fmt::Debug + Send + Sync {
    /// Features of a row of `head_dim` elements.
    fn dim(&self, head_dim: usize) -> usize;

    /// Refuses rows that the map is not for.
    ///
    /// # Errors
    /// An error that says which.
    fn check(&self, _heads: usize, _head_dim: usize) -> Result<()> {
        Ok(())
    }

    /// The kernel: maps some rows of a head. Called once a chunk or more.
    fn apply(&self, isa: Isa, head: usize, rows: FeatureRows<'_>);

    /// The definition, of one row.
    fn define(&self, head: usize, row: &[f64]) -> Vec<f64>;

    /// How large the numbers are whose exponential the features of a row are:
    /// that many roundings they have more than others.
    fn roundings(&self, _head: usize, _row: &[f64]) -> f64 {
        0.0
    }
}

/// A function of single elements.
trait Elementwise {
    fn map<S: Simd>(s: S, x: S::F) -> S::F;
}

/// Applies it to every element.
struct Each<'a, M>(FeatureRows<'a>, std::marker::PhantomData<M>);

impl<M: Elementwise> Kernel for Each<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let FeatureRows { rows, dim, x, features, stride } = self.0;
        for row in 0..rows {
            let x = &x[row * dim..][..dim];
            let to = &mut features[row * stride..][..dim];
            for (x, to) in x.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
                s.store_tail(to, M::map(s, s.load_tail(x)));
            }
        }
    }
}

/// Implements a map of single elements.
macro_rules! elementwise {
    ($map:ident, |$x:ident| $define:expr) => {
        impl FeatureMap for $map {
            fn dim(&self, head_dim: usize) -> usize {
                head_dim
            }
            fn apply(&self, isa: Isa, _head: usize, rows: FeatureRows<'_>) {
                isa.dispatch(Each::<Self>(rows, std::marker::PhantomData));
            }
            fn define(&self, _head: usize, row: &[f64]) -> Vec<f64> {
                row.iter().map(|&$x| $define).collect()
            }
        }
    };
}

/// Rows as they are: weights are dot products, of any sign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity;
elementwise!(Identity, |x| x);
impl Elementwise for Identity {
    #[inline(always)]
    fn map<S: Simd>(_: S, x: S::F) -> S::F {
        x
    }
}

/// `elu(x) + 1`: `exp x` below 0 and `x + 1` from there on, so that weights
/// are positive. From "Transformers are RNNs" (arXiv 2006.16236).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EluPlusOne;
elementwise!(EluPlusOne, |x| if x < 0.0 { x.exp() } else { x + 1.0 });
impl Elementwise for EluPlusOne {
    #[inline(always)]
    fn map<S: Simd>(s: S, x: S::F) -> S::F {
        let zero = s.splat(0.0);
        s.select(s.lt(x, zero), exp(s, x), s.add(x, s.splat(1.0)))
    }
}

/// The logistic function: features from 0 to 1. Flowformer's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sigmoid;
elementwise!(Sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
impl Elementwise for Sigmoid {
    #[inline(always)]
    fn map<S: Simd>(s: S, x: S::F) -> S::F {
        sigmoid(s, x)
    }
}

/// `max(x, 0)`. A query with no positive element where keys have one weighs
/// nothing at all: its output is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relu;
elementwise!(Relu, |x| if x < 0.0 { 0.0 } else { x });
impl Elementwise for Relu {
    #[inline(always)]
    fn map<S: Simd>(s: S, x: S::F) -> S::F {
        s.select(s.lt(x, s.splat(0.0)), s.splat(0.0), x)
    }
}

/// The second-order Taylor expansion of `exp(t)` around 0 for the scaled dot
/// product `t = x . y / sqrt(head_dim)`: features whose dot product is `1 + t +
/// t^2 / 2`, which is at least 1/2. From BASED (arXiv 2402.18668).
///
/// `[1, x_a / d^(1/4), x_a x_b / sqrt(d), x_a^2 / sqrt(2 d)]` with `a < b`:
/// half of the paper's `1 + d + d^2` features, for the products of `a` and `b`
/// and of `b` and `a` are the same. Their order is 1, the elements, then for
/// each `a` the products with `b = a, a + 1, ..`.
///
/// The state has a row for each feature: for `head_dim` far above 16 it is
/// larger than the keys of most sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taylor;

impl FeatureMap for Taylor {
    fn dim(&self, head_dim: usize) -> usize {
        1 + head_dim + head_dim * (head_dim + 1) / 2
    }

    fn apply(&self, isa: Isa, _head: usize, rows: FeatureRows<'_>) {
        struct Products<'a>(FeatureRows<'a>);
        impl Kernel for Products<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                let FeatureRows { rows, dim, x, features, stride } = self.0;
                let d = dim as f64;
                let (linear, mixed) = (d.powf(-0.25) as f32, d.powf(-0.5) as f32);
                for row in 0..rows {
                    let to = &mut features[row * stride..][..stride];
                    let x = &x[row * dim..];
                    to[0] = 1.0;
                    scaled(s, x, dim, linear, &mut to[1..]);
                    let mut at = 1 + dim;
                    for a in 0..dim {
                        scaled(s, &x[a..], dim - a, mixed * x[a], &mut to[at..]);
                        to[at] *= std::f32::consts::FRAC_1_SQRT_2;
                        at += dim - a;
                    }
                    // Whole vectors went past the end.
                    to[at..].fill(0.0);
                }
            }
        }
        isa.dispatch(Products(rows));
    }

    fn define(&self, _head: usize, row: &[f64]) -> Vec<f64> {
        let d = row.len() as f64;
        let mut features = vec![1.0];
        features.extend(row.iter().map(|x| x / d.powf(0.25)));
        for a in 0..row.len() {
            for b in a..row.len() {
                let half = if a == b { 2f64.sqrt() } else { 1.0 };
                features.push(row[a] * row[b] / (half * d.sqrt()));
            }
        }
        features
    }
}

/// `to = factor * x` for `len` elements at least: whole vectors where there is
/// room for them.
#[inline(always)]
fn scaled<S: Simd>(s: S, x: &[f32], len: usize, factor: f32, to: &mut [f32]) {
    for c in (0..len).step_by(S::LANES) {
        if c + S::LANES <= x.len().min(to.len()) {
            s.store(&mut to[c..], s.mul(s.load(&x[c..]), s.splat(factor)));
        } else {
            let y = s.mul(s.load_tail(&x[c..len]), s.splat(factor));
            s.store_tail(&mut to[c..len], y);
        }
    }
}

/// How long the random rows of [`Favor`] are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowNorms {
    /// As long as independent normal vectors, which makes the estimate
    /// unbiased.
    #[default]
    Random,
    /// All `sqrt(head_dim)`.
    Equal,
}

/// What [`Favor`] makes of projections.
#[derive(Clone, Copy, Debug, PartialEq)]
enum FavorKind {
    /// `m^(-1/2) (exp(y - |x|^2 / 2 - stabiliser) + epsilon)`, where the
    /// largest `y` of a row is its stabiliser if none is given.
    Positive { stabiliser: Option<f32> },
    /// `max(y, 0) + epsilon`
    Relu,
}

/// FAVOR+: positive orthogonal random features, whose dot product estimates
/// the exponential of the scaled dot product. From "Rethinking Attention with
/// Performers" (arXiv 2009.14794).
///
/// With `z = x / head_dim^(1/4)` and random rows `w_r`, orthogonal within
/// blocks of `head_dim`:
///
/// ```text
/// phi_r(x) = features^(-1/2) (exp(w_r . z - |z|^2 / 2 - c) + epsilon)
/// E[phi(x) . phi(y)] = exp(x . y / sqrt(head_dim)) exp(-c_x - c_y)    for epsilon = 0
/// ```
///
/// The stabiliser `c` of a query is its largest `w_r . z`
/// ([`for_queries`](Self::for_queries)); that of keys is a number which all of
/// them share (0 unless [`stabiliser`](Self::stabiliser) says otherwise), since
/// a key's own would change its weight against the others. No exponent is
/// above `max |w_r|^2 / 2 - c`, about `head_dim / 2 - c`: 0 serves for a
/// `head_dim` up to 128. Whatever is chosen cancels when outputs are divided
/// by the sum of their weights, but for `epsilon`.
///
/// The variance grows with `exp(|x + y|^2)`: rows of norm far above 1 after
/// the scaling need more features than softmax attention has keys.
#[derive(Clone, Debug)]
pub struct Favor {
    /// `[features, head_dim]`
    projection: Arc<Array2<f32>>,
    /// The same as columns, `[head_dim, features]` rounded up to whole vectors.
    columns: Arc<Vec<f32>>,
    kind: FavorKind,
    epsilon: f32,
}

/// Room for the columns of [`Favor`]: whole vectors of any instruction set.
fn padded(features: usize) -> usize {
    features.next_multiple_of(crate::simd::MAX_LANES)
}

impl Favor {
    /// `features` random features of rows of `head_dim` elements, drawn from
    /// a seed, with `epsilon` 1e-4.
    pub fn new(head_dim: usize, features: usize, seed: u64) -> Self {
        Self::with_norms(head_dim, features, seed, RowNorms::Random)
    }

    /// The same with a choice of norms.
    pub fn with_norms(head_dim: usize, features: usize, seed: u64, norms: RowNorms) -> Self {
        let mut normal = Normal::new(seed);
        let mut projection = Array2::<f64>::zeros((features, head_dim));
        for first in (0..features).step_by(head_dim.max(1)) {
            let end = (first + head_dim).min(features);
            for r in first..end {
                // Gram-Schmidt, twice: once leaves what rounding put back.
                let mut row: Vec<f64> = normal.by_ref().take(head_dim).collect();
                for _ in 0..2 {
                    for earlier in projection.outer_iter().take(r).skip(first) {
                        let along = row.iter().zip(&earlier).map(|(a, b)| a * b).sum::<f64>();
                        row.iter_mut().zip(&earlier).for_each(|(a, b)| *a -= along * b);
                    }
                }
                let norm = norm(&row);
                projection.row_mut(r).iter_mut().zip(row).for_each(|(to, x)| *to = x / norm);
            }
        }
        for mut row in projection.rows_mut() {
            let norm = match norms {
                RowNorms::Random => norm(&normal.by_ref().take(head_dim).collect::<Vec<_>>()),
                RowNorms::Equal => (head_dim as f64).sqrt(),
            };
            row.mapv_inplace(|x| x * norm);
        }
        Self::of_projection(projection.mapv(|x| x as f32))
    }

    /// Random rows of your own, `[features, head_dim]`.
    pub fn of_projection(projection: Array2<f32>) -> Self {
        let (features, head_dim) = projection.dim();
        let mut columns = vec![0.0; head_dim * padded(features)];
        for ((r, c), &x) in projection.indexed_iter() {
            columns[c * padded(features) + r] = x;
        }
        Self {
            projection: Arc::new(projection),
            columns: Arc::new(columns),
            kind: FavorKind::Positive { stabiliser: Some(0.0) },
            epsilon: 1e-4,
        }
    }

    /// What is added to every exponential. 0 makes the estimate unbiased, and
    /// stabilisers cancel then. It also lets features of rows that are much
    /// longer than `sqrt(2 * 80)` after the scaling underflow: such queries see
    /// nothing, such keys are not seen.
    #[must_use]
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// What is subtracted from every exponent.
    #[must_use]
    pub fn stabiliser(mut self, stabiliser: f32) -> Self {
        self.kind = FavorKind::Positive { stabiliser: Some(stabiliser) };
        self
    }

    /// The same features with each row's largest projection subtracted from
    /// its exponents.
    #[must_use]
    pub fn for_queries(mut self) -> Self {
        if let FavorKind::Positive { stabiliser } = &mut self.kind {
            *stabiliser = None;
        }
        self
    }

    /// The generalised variant, `max(w_r . z, 0) + 1e-3`: no longer an
    /// estimate of a softmax.
    #[must_use]
    pub fn relu(mut self) -> Self {
        self.kind = FavorKind::Relu;
        self.epsilon = 1e-3;
        self
    }

    /// The random rows, `[features, head_dim]`.
    pub fn projection(&self) -> ArrayView2<'_, f32> {
        self.projection.view()
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

impl FeatureMap for Favor {
    fn dim(&self, _head_dim: usize) -> usize {
        self.projection.dim().0
    }

    fn check(&self, _heads: usize, head_dim: usize) -> Result<()> {
        let stabiliser = match self.kind {
            FavorKind::Positive { stabiliser } => stabiliser.unwrap_or(0.0),
            FavorKind::Relu => 0.0,
        };
        for (argument, x) in [("epsilon", self.epsilon), ("stabiliser", stabiliser)] {
            if !x.is_finite() {
                return Err(Error::value(argument, "a finite number", x));
            }
        }
        if self.projection.dim().1 == head_dim {
            return Ok(());
        }
        let expected = format!("[features, head_dim] = [_, {head_dim}]");
        Err(Error::shape("projection", expected, self.projection.shape()))
    }

    fn apply(&self, isa: Isa, _head: usize, rows: FeatureRows<'_>) {
        isa.dispatch(Exponentials { of: self, rows });
    }

    fn define(&self, _head: usize, row: &[f64]) -> Vec<f64> {
        let (features, head_dim) = self.projection.dim();
        let z: Vec<f64> = row.iter().map(|x| x / (head_dim as f64).powf(0.25)).collect();
        let y: Vec<f64> = self
            .projection
            .outer_iter()
            .map(|w| w.iter().zip(&z).map(|(w, z)| f64::from(*w) * z).sum())
            .collect();
        let epsilon = f64::from(self.epsilon);
        match self.kind {
            FavorKind::Positive { stabiliser } => {
                let largest = y.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let c = stabiliser.map_or(largest, f64::from);
                let half = z.iter().map(|z| z * z).sum::<f64>() / 2.0;
                y.iter().map(|y| ((y - half - c).exp() + epsilon) / (features as f64).sqrt()).collect()
            }
            FavorKind::Relu => y.iter().map(|y| if *y < 0.0 { epsilon } else { y + epsilon }).collect(),
        }
    }

    fn roundings(&self, _head: usize, row: &[f64]) -> f64 {
        let scale = (row.len() as f64).powf(-0.25);
        let size = |w: ndarray::ArrayView1<'_, f32>| {
            w.iter().zip(row).map(|(w, x)| (f64::from(*w) * scale * x).abs()).sum::<f64>()
        };
        let projections = self.projection.outer_iter().map(size).fold(0.0, f64::max);
        match self.kind {
            FavorKind::Positive { stabiliser } => {
                let half = row.iter().map(|x| (x * scale).powi(2)).sum::<f64>() / 2.0;
                projections + half + stabiliser.map_or(projections, |c| f64::from(c).abs())
            }
            FavorKind::Relu => projections,
        }
    }
}

/// The largest of some numbers. NaNs need not show.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let whole = x.len() / S::LANES * S::LANES;
    let mut top = s.splat(f32::NEG_INFINITY);
    for x in x[..whole].chunks_exact(S::LANES) {
        top = s.max(s.load(x), top);
    }
    let mut top = s.reduce_max(top);
    for &x in &x[whole..] {
        if x > top {
            top = x;
        }
    }
    top
}

/// The kernel of [`Favor`].
struct Exponentials<'a, 'b> {
    of: &'a Favor,
    rows: FeatureRows<'b>,
}

impl Kernel for Exponentials<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let FeatureRows { rows, dim, x, features, stride } = self.rows;
        let count = self.of.projection.dim().0;
        let width = padded(count);
        if rows == 0 || count == 0 {
            return;
        }
        // Projections of all rows, then what is made of them.
        let panel = S::LANES * S::TILE_VECTORS;
        for col in (0..width).step_by(panel) {
            let n = (width - col).min(panel);
            let b = self.of.columns.get(col..).unwrap_or_default();
            s.vectorize(Product {
                a: Rows::of_slice(x, rows, dim, dim),
                b: Rows::of_slice(b, dim, n, width),
                c: &mut features[col..],
                ldc: stride,
                update: Update::Set,
            });
        }
        let scale = (dim.max(1) as f64).powf(-0.25) as f32;
        let epsilon = s.splat(self.of.epsilon);
        for row in 0..rows {
            let x = &x[row * dim..][..dim];
            let to = &mut features[row * stride..][..width];
            match self.of.kind {
                FavorKind::Positive { stabiliser } => {
                    let mut squares = s.splat(0.0);
                    for x in x.chunks(S::LANES) {
                        let x = s.mul(s.load_tail(x), s.splat(scale));
                        squares = s.mul_add(x, x, squares);
                    }
                    let half = 0.5 * s.reduce_add(squares);
                    let c = match stabiliser {
                        Some(c) => c,
                        None => scale * largest(s, &to[..count]),
                    };
                    let share = s.splat((1.0 / (count as f64).sqrt()) as f32);
                    for to in to.chunks_exact_mut(S::LANES) {
                        // The maximum first: what is large cancels exactly.
                        let y = s.mul_sub(s.load(to), s.splat(scale), s.splat(c));
                        let y = exp(s, s.sub(y, s.splat(half)));
                        s.store(to, s.mul(s.add(y, epsilon), share));
                    }
                }
                FavorKind::Relu => {
                    for to in to.chunks_exact_mut(S::LANES) {
                        let y = s.mul(s.load(to), s.splat(scale));
                        let y = s.select(s.lt(y, s.splat(0.0)), s.splat(0.0), y);
                        s.store(to, s.add(y, epsilon));
                    }
                }
            }
            to[count..].fill(0.0);
        }
    }
}

/// Codes of a learned hash, whose dot products count equal bits. From
/// EcoFormer (arXiv 2209.09004).
///
/// With `z = x / |x|` (0 for a row of zeros):
///
/// ```text
/// kappa_r = exp(-|z - anchor_r|^2 / (2 variance)) - mean_r        exp(0) for a variance of 0
/// h_b     = 1 if sum_r weight_br kappa_r > 0, and -1 otherwise
/// phi(x)  = [h_1, .., h_bits, sqrt(bits + 1)]
/// phi(x) . phi(y) = bits + 1 + h(x) . h(y) = 2 bits + 1 - 2 hamming(h(x), h(y))
/// ```
///
/// So weights are whole numbers from 1 to `2 bits + 1`. A sum that is within
/// rounding of 0 is decided by the definition, in `f64`: the kernel's codes are
/// the definition's.
#[derive(Clone, Debug)]
pub struct HashSigns {
    parameters: Arc<HashParameters>,
    variance: f32,
    /// The feature after the bits.
    last: f64,
}

#[derive(Debug)]
struct HashParameters {
    /// `[heads, anchors, head_dim]`
    anchors: Array3<f32>,
    /// `[heads, bits, anchors]`
    weights: Array3<f32>,
    /// `[heads, anchors]`
    mean: Array2<f32>,
    heads: Vec<HashHead>,
}

/// What one head's kernel reads: rows rounded up to whole vectors.
#[derive(Debug)]
struct HashHead {
    /// Anchors as columns, `[head_dim, anchors]`.
    anchors: Vec<f32>,
    /// Their squared norms, and the means.
    squares: Vec<f32>,
    mean: Vec<f32>,
    /// Weights as columns, `[anchors, bits]`.
    weights: Vec<f32>,
    /// For each bit how large its sum may be.
    sizes: Vec<f32>,
    /// The largest norm of an anchor.
    longest: f32,
    /// The mean of the anchors, and of their squared norms.
    centre: Vec<f64>,
    mean_square: f64,
}

impl HashHead {
    fn new(
        anchors: ArrayView2<'_, f32>,
        weights: ArrayView2<'_, f32>,
        mean: ndarray::ArrayView1<'_, f32>,
    ) -> Self {
        let ((count, dim), bits) = (anchors.dim(), weights.dim().0);
        let (count_room, bit_room) = (padded(count), padded(bits));
        let mut head = Self {
            anchors: vec![0.0; dim * count_room],
            squares: vec![0.0; count_room],
            mean: vec![0.0; count_room],
            weights: vec![0.0; count * bit_room],
            sizes: vec![0.0; bit_room],
            longest: 0.0,
            centre: vec![0.0; dim],
            mean_square: 0.0,
        };
        let mean_size = mean.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (r, anchor) in anchors.outer_iter().enumerate() {
            for (c, &x) in anchor.iter().enumerate() {
                head.anchors[c * count_room + r] = x;
                head.centre[c] += f64::from(x) / count as f64;
            }
            let square = anchor.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            head.squares[r] = square as f32;
            head.mean[r] = mean[r];
            head.mean_square += square / count as f64;
            head.longest = head.longest.max(square.sqrt() as f32);
            for (b, &x) in weights.column(r).iter().enumerate() {
                head.weights[r * bit_room + b] = x;
                head.sizes[b] += x.abs() * (1.0 + mean_size);
            }
        }
        head
    }
}

impl HashSigns {
    /// A hash with its parameters: anchors `[heads, anchors, head_dim]`,
    /// weights `[heads, bits, anchors]`, the means of the kernel `[heads,
    /// anchors]`, and its variance.
    ///
    /// # Errors
    /// [`Error::Shape`] where they do not agree, [`Error::Value`] for numbers
    /// that are not finite and a variance that is negative.
    pub fn new(anchors: Array3<f32>, weights: Array3<f32>, mean: Array2<f32>, variance: f32) -> Result<Self> {
        let (heads, count, _) = anchors.dim();
        let (_, bits, _) = weights.dim();
        if weights.dim() != (heads, bits, count) {
            let expected = format!("[heads, bits, anchors] = [{heads}, _, {count}]");
            return Err(Error::shape("weights", expected, weights.shape()));
        }
        if mean.dim() != (heads, count) {
            let expected = format!("[heads, anchors] = [{heads}, {count}]");
            return Err(Error::shape("mean", expected, mean.shape()));
        }
        if !variance.is_finite() || variance < 0.0 {
            return Err(Error::value("variance", "a finite number of at least 0", variance));
        }
        let all = [("anchors", anchors.iter()), ("weights", weights.iter())];
        for (argument, mut x) in all {
            if let Some(x) = x.find(|x| !x.is_finite()) {
                return Err(Error::value(argument, "finite numbers", x));
            }
        }
        if let Some(x) = mean.iter().find(|x| !x.is_finite()) {
            return Err(Error::value("mean", "finite numbers", x));
        }
        let head = |h| {
            let view = |x: &Array3<f32>| x.index_axis(ndarray::Axis(0), h).to_owned();
            HashHead::new(view(&anchors).view(), view(&weights).view(), mean.row(h))
        };
        let heads = (0..heads).map(head).collect();
        let parameters = Arc::new(HashParameters { anchors, weights, mean, heads });
        Ok(Self { parameters, variance, last: (bits as f64 + 1.0).sqrt() })
    }

    /// The same hash with another variance of its kernel.
    pub(crate) fn with_variance(&self, variance: f32) -> Self {
        Self { variance, ..self.clone() }
    }

    /// The same hash with another feature after the bits.
    pub(crate) fn with_last(&self, last: f64) -> Self {
        Self { last, ..self.clone() }
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.parameters.weights.dim().1
    }

    /// The mean of the squared distances of rows, made unit vectors, to the
    /// anchors of a head.
    pub(crate) fn spread<R: Iterator<Item = f64> + Clone>(
        &self,
        head: usize,
        rows: impl ExactSizeIterator<Item = R>,
    ) -> f32 {
        let HashHead { centre, mean_square, .. } = &self.parameters.heads[head];
        let (count, mut sum) = (rows.len().max(1), 0.0);
        for row in rows {
            // |z - a|^2 = |z|^2 - 2 z.a + |a|^2
            let norm = row.clone().map(|x| x * x).sum::<f64>().sqrt();
            if norm != 0.0 {
                sum += 1.0 - 2.0 * centre.iter().zip(row).map(|(a, x)| a * (x / norm)).sum::<f64>();
            }
        }
        (sum / count as f64 + mean_square).max(0.0) as f32
    }

    /// The sum whose sign is a bit, of a row of length 1 or 0.
    fn sum(&self, head: usize, bit: usize, z: impl Fn(usize) -> f64) -> f64 {
        let HashParameters { anchors, weights, mean, .. } = &*self.parameters;
        let variance = f64::from(self.variance);
        let mut sum = 0.0;
        for (r, anchor) in anchors.index_axis(ndarray::Axis(0), head).outer_iter().enumerate() {
            let distance =
                anchor.iter().enumerate().map(|(c, a)| (z(c) - f64::from(*a)).powi(2)).sum::<f64>();
            let exponent = if variance == 0.0 { 0.0 * distance } else { -distance / (2.0 * variance) };
            let kappa = exponent.exp() - f64::from(mean[[head, r]]);
            sum += f64::from(weights[[head, bit, r]]) * kappa;
        }
        sum
    }
}

/// The sum of the squares of a row, lane by lane: sums of one after the other would wait
/// for each other.
#[inline(always)]
fn square(x: &[f32]) -> f64 {
    const SUMS: usize = 16;
    let mut sums = [0f64; SUMS];
    let (whole, rest) = x.as_chunks::<SUMS>();
    for x in whole {
        sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    sums.iter().sum()
}

/// The same in `f32`, to within a rounding for every two elements.
#[inline(always)]
fn squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    // Rows that follow are read next: nobody else prefetches them so early.
    const AHEAD: usize = 24;
    let mut sums = [s.splat(0.0); 4];
    let dim = x.len();
    for (i, x) in x.chunks(S::LANES).enumerate() {
        prefetch_l1(x.as_ptr().wrapping_add(AHEAD * dim).cast());
        let x = s.load_tail(x);
        sums[i % 4] = s.mul_add(x, x, sums[i % 4]);
    }
    let [a, b, c, d] = sums;
    s.reduce_add(s.add(s.add(a, b), s.add(c, d)))
}

/// 1 for what is above 0, -1 for other numbers.
fn sign(x: f64) -> f64 {
    if x > 0.0 {
        1.0
    } else if x.is_nan() {
        x
    } else {
        -1.0
    }
}

impl FeatureMap for HashSigns {
    fn dim(&self, _head_dim: usize) -> usize {
        self.bits() + 1
    }

    fn check(&self, heads: usize, head_dim: usize) -> Result<()> {
        let (h, _, d) = self.parameters.anchors.dim();
        if (h, d) == (heads, head_dim) {
            return Ok(());
        }
        let expected = format!("[heads, anchors, head_dim] = [{heads}, _, {head_dim}]");
        Err(Error::shape("anchors", expected, self.parameters.anchors.shape()))
    }

    fn apply(&self, isa: Isa, head: usize, rows: FeatureRows<'_>) {
        isa.dispatch(Codes { of: self, head, rows });
    }

    fn define(&self, head: usize, row: &[f64]) -> Vec<f64> {
        let norm = norm(row);
        let z: Vec<f64> = row.iter().map(|x| if norm == 0.0 { 0.0 } else { x / norm }).collect();
        let mut features: Vec<f64> =
            (0..self.bits()).map(|bit| sign(self.sum(head, bit, |c| z[c]))).collect();
        features.push(self.last);
        features
    }
}

/// The kernel of [`HashSigns`].
struct Codes<'a, 'b> {
    of: &'a HashSigns,
    head: usize,
    rows: FeatureRows<'b>,
}

/// Rows whose codes are worked out at once, and elements of them.
const GROUP: usize = 2 * TILE_ROWS;
const SPAN: usize = 256;
/// The widest panel of an instruction set.
const PANEL: usize = 64;
/// How long rows and anchors may be, and one over how short rows, for products in `f32`.
const FAR: f32 = 1e15;

impl Kernel for Codes<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let FeatureRows { rows, dim, x, features, stride } = self.rows;
        for first in (0..rows).step_by(GROUP) {
            let count = (rows - first).min(GROUP);
            let to = &mut features[first * stride..][..count * stride];
            self.of.group(s, self.head, (&x[first * dim..][..count * dim], dim), to, stride);
        }
    }
}

impl HashSigns {
    /// The codes of at most [`GROUP`] rows: products with all anchors, and with
    /// all weights.
    #[inline(always)]
    fn group<S: Simd>(
        &self,
        s: S,
        head: usize,
        (x, dim): (&[f32], usize),
        features: &mut [f32],
        stride: usize,
    ) {
        let (number, of) = (head, &self.parameters.heads[head]);
        let (bits, count) = (self.bits(), self.parameters.anchors.dim().1);
        let (bit_room, count_room) = (padded(bits), padded(count));
        let (rows, panel) = (features.len() / stride, S::LANES * S::TILE_VECTORS);
        let inverse = if self.variance == 0.0 { 0.0 } else { 0.5 / self.variance };
        let (mut scales, mut lengths) = ([1f32; GROUP], [1f32; GROUP]);
        let (mut norms, mut kappas) = ([1f64; GROUP], [0f32; GROUP * PANEL]);
        // Products with rows as they are, unless they or these may be more than `f32` can hold.
        let mut ordinary = of.longest < FAR;
        for (row, scale) in scales.iter_mut().take(rows).enumerate() {
            let square = squares(s, &x[row * dim..][..dim]);
            ordinary &= (1.0 / (FAR * FAR)..FAR * FAR).contains(&square);
            *scale = 1.0 / square.sqrt();
        }
        if !ordinary {
            (scales, lengths) = ([1.0; GROUP], [0.0; GROUP]);
            for (row, (norm, length)) in norms.iter_mut().zip(&mut lengths).take(rows).enumerate() {
                let square = square(&x[row * dim..][..dim]);
                if square != 0.0 {
                    (*norm, *length) = (square.sqrt(), 1.0);
                }
            }
        }
        features.fill(0.0);
        for first in (0..count).step_by(panel) {
            let width = (count_room - first).min(panel);
            kappas.fill(0.0);
            if ordinary {
                let a = Rows::of_slice(x, rows, dim, dim);
                let b = Rows::of_slice(&of.anchors[first..], dim, width, count_room);
                s.vectorize(Product { a, b, c: &mut kappas, ldc: PANEL, update: Update::Set });
            } else {
                let mut z = [0f32; GROUP * SPAN];
                for from in (0..dim).step_by(SPAN) {
                    let span = (dim - from).min(SPAN);
                    for (row, z) in z.chunks_exact_mut(SPAN).take(rows).enumerate() {
                        let (x, inverse) = (&x[row * dim + from..][..span], 1.0 / norms[row]);
                        z.iter_mut().zip(x).for_each(|(z, &x)| *z = (f64::from(x) * inverse) as f32);
                    }
                    let a = Rows::of_slice(&z, rows, span, SPAN);
                    let b = Rows::of_slice(&of.anchors[from * count_room + first..], span, width, count_room);
                    s.vectorize(Product { a, b, c: &mut kappas, ldc: PANEL, update: Update::Add });
                }
            }
            for (row, kappas) in kappas.chunks_exact_mut(PANEL).take(rows).enumerate() {
                let scale = s.splat(-2.0 * scales[row]);
                for c in (0..width).step_by(S::LANES) {
                    let distance = s.add(s.splat(lengths[row]), s.load(&of.squares[first + c..]));
                    let distance = s.mul_add(s.load(&kappas[c..]), scale, distance);
                    let kappa = exp(s, s.mul(distance, s.splat(-inverse)));
                    s.store(&mut kappas[c..], s.sub(kappa, s.load(&of.mean[first + c..])));
                }
            }
            let anchors = (count - first).min(width);
            for col in (0..bit_room).step_by(panel) {
                let a = Rows::of_slice(&kappas, rows, anchors, PANEL);
                let width = (bit_room - col).min(panel);
                let b = Rows::of_slice(&of.weights[first * bit_room + col..], anchors, width, bit_room);
                s.vectorize(Product { a, b, c: &mut features[col..], ldc: stride, update: Update::Add });
            }
        }
        // How far sums may be off, in the units of their sizes.
        let reach = (1.0 + of.longest) * (1.0 + of.longest);
        let unit = f32::EPSILON * ((count + 16) as f32 + 2.0 * (dim + 8) as f32 * reach * inverse);
        for (row, to) in features.chunks_exact_mut(stride).enumerate() {
            for (sums, (c, sizes)) in
                to[..bit_room].chunks_exact_mut(S::LANES).zip(of.sizes.chunks_exact(S::LANES).enumerate())
            {
                let (sum, margin) = (s.load(sums), s.mul(s.load(sizes), s.splat(unit)));
                let (above, below) = (s.lt(margin, sum), s.lt(sum, s.sub(s.splat(0.0), margin)));
                s.store(sums, s.select(above, s.splat(1.0), s.splat(-1.0)));
                let decided = s.bits(above) | s.bits(below);
                let first = c * S::LANES;
                for bit in
                    (first..(first + S::LANES).min(bits)).filter(|bit| decided >> (bit - first) & 1 == 0)
                {
                    let x = &x[row * dim..][..dim];
                    let norm = if ordinary { square(x).sqrt() } else { norms[row] };
                    let z = |c: usize| f64::from(x[c]) / norm;
                    sums[bit - first] = sign(self.sum(number, bit, z)) as f32;
                }
            }
            // What lies past the bits is in no code.
            to[bits..].fill(0.0);
            to[bits] = self.last as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hash of two heads with numbers from a seed.
    fn hash(dim: usize) -> HashSigns {
        let mut normal = Normal::new(5);
        let mut next = || normal.next().unwrap() as f32;
        let anchors = Array3::from_shape_simple_fn((2, 25, dim), || 0.3 * next());
        let weights = Array3::from_shape_simple_fn((2, 19, 25), &mut next);
        let mean = Array2::from_shape_simple_fn((2, 25), || 0.5 + 0.1 * next());
        HashSigns::new(anchors, weights, mean, 1.3).unwrap()
    }

    #[test]
    fn kernels_keep_to_the_definitions_on_every_instruction_set() {
        const ROWS: usize = 9;
        for dim in [1, 7, 16, 33, 64] {
            let favor = Favor::new(dim, 37, 3);
            let queries = favor.clone().stabiliser(1.5).for_queries();
            // And whether features are differences, which may cancel.
            let maps: [(&dyn FeatureMap, bool); 9] = [
                (&Identity, false),
                (&EluPlusOne, false),
                (&Sigmoid, false),
                (&Relu, false),
                (&Taylor, false),
                (&favor, false),
                (&queries, false),
                (&favor.clone().relu(), true),
                (&hash(dim), false),
            ];
            let x: Vec<f32> = Normal::new(dim as u64).take(ROWS * dim).map(|x| 1.5 * x as f32).collect();
            for ((map, cancels), isa) in maps.iter().flat_map(|x| Isa::available().map(move |isa| (x, isa))) {
                let features = map.dim(dim);
                let stride = padded(features);
                let mut got = vec![0.0; ROWS * stride];
                let rows = FeatureRows { rows: ROWS, dim, x: &x, features: &mut got, stride };
                map.apply(isa, 1, rows);
                for (row, got) in x.chunks(dim).zip(got.chunks(stride)) {
                    let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                    let want = map.define(1, &row);
                    assert_eq!(want.len(), features);
                    let roundings = map.roundings(1, &row);
                    let unit = f64::from(f32::EPSILON) * (8.0 + roundings);
                    for (c, (got, want)) in got.iter().zip(&want).enumerate() {
                        let size = want.abs() + if *cancels { roundings } else { 0.0 };
                        let off = (f64::from(*got) - want).abs();
                        assert!(
                            off <= unit * size,
                            "{isa} {dim}, {features} features: {c} is {got}, not {want}"
                        );
                    }
                    assert!(got[features..].iter().all(|&x| x == 0.0), "{isa}, {features} features: {got:?}");
                }
            }
        }
    }

    #[test]
    fn nan_shows_in_its_own_row() {
        let favor = Favor::new(8, 20, 3);
        let maps: [&dyn FeatureMap; 7] = [&Identity, &EluPlusOne, &Sigmoid, &Relu, &Taylor, &favor, &hash(8)];
        for (map, isa) in maps.iter().flat_map(|map| Isa::available().map(move |isa| (map, isa))) {
            let mut x = vec![0.5; 3 * 8];
            x[8 + 2] = f32::NAN;
            let features = map.dim(8);
            let stride = padded(features);
            let mut got = vec![0.0; 3 * stride];
            map.apply(isa, 0, FeatureRows { rows: 3, dim: 8, x: &x, features: &mut got, stride });
            for (row, got) in got.chunks(stride).enumerate() {
                assert_eq!(
                    got[..features].iter().any(|x| x.is_nan()),
                    row == 1,
                    "{isa}, {features} features: row {row}"
                );
                assert!(got[features..].iter().all(|&x| x == 0.0), "{isa}, {features} features: {got:?}");
            }
        }
    }

    #[test]
    fn taylor_is_the_expansion_of_the_dot_product() {
        let x: Vec<f64> = Normal::new(1).take(12).collect();
        let (a, b) = x.split_at(6);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let t = dot(a, b) / 6f64.sqrt();
        let weight = dot(&Taylor.define(0, a), &Taylor.define(0, b));
        assert!((weight - (1.0 + t + t * t / 2.0)).abs() < 1e-14);
    }

    #[test]
    fn hashes_of_other_sizes_are_refused() {
        let (anchors, weights) = (Array3::zeros((2, 5, 8)), Array3::zeros((2, 4, 6)));
        let error = HashSigns::new(anchors.clone(), weights, Array2::zeros((2, 5)), 1.0).unwrap_err();
        let expected = "weights: expected shape [heads, bits, anchors] = [2, _, 5], got [2, 4, 6]";
        assert_eq!(error.to_string(), expected);
        let weights = Array3::from_elem((2, 4, 5), f32::INFINITY);
        let error = HashSigns::new(anchors, weights, Array2::zeros((2, 5)), 1.0).unwrap_err();
        assert_eq!(error.to_string(), "weights: expected finite numbers, got inf");
    }
}
