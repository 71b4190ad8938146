//! Pools of index keys, or of keys and values, that a model makes from several
//! tokens: means or gated sums, normalised and rotated.
//!
//! ```text
//! pool_w = sum_s softmax_s(z_s + bias_s) * x_s     channel by channel, over the
//!          tokens s = stride w .. stride w + stride
//! ```
//!
//! or the mean; where pools overlap, over as many tokens before as well, of
//! which the first half of the channels counts, and of the pool's own the
//! second. Then `pool_w / sqrt(mean pool_w^2 + epsilon) * weight`, rotated to the
//! position of the pool's first token, each if asked for.

use ndarray::{Array1, Array2, Array3, ArrayView3, ArrayView4, Ix1, Ix2, s};

use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::laid::Laid;
use crate::math::rope::Rope;
use crate::simd::exp::exp;
use crate::simd::mem::{Parts, claim_words};
use crate::simd::{Isa, Kernel, Simd};

/// How pools are made.
///
/// ```
/// use attention_kernels::select::Pooling;
/// use ndarray::{Array3, s};
///
/// let rows = Array3::from_shape_fn((1, 10, 4), |(_, i, c)| (i * (c + 1)) as f32);
/// let pooling = Pooling::mean(4)?;
/// let mut pools = pooling.start(1, 4)?;
/// pooling.extend(&mut pools, rows.slice(s![.., ..7, ..]), None)?;
/// assert_eq!(pools.view().dim(), (1, 1, 1, 4));
/// pooling.extend(&mut pools, rows.slice(s![.., 7.., ..]), None)?; // as at once
/// assert_eq!(pools.view()[[0, 0, 1, 0]], 5.5);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pooling {
    isa: Isa,
    stride: usize,
    /// Biases of the tokens of a pool, and whether pools overlap.
    gate: Option<(Laid<Ix2>, bool)>,
    norm: Option<(Laid<Ix1>, f32)>,
    rope: Option<Rope>,
}

/// Pools so far, and the tokens that are not in a whole one.
#[derive(Clone, Debug, PartialEq)]
pub struct Pooled {
    batch: usize,
    dim: usize,
    tokens: usize,
    /// Rows and logits of the last tokens, by sequence.
    held: [Vec<f32>; 2],
    /// By pool and sequence.
    pools: Vec<f32>,
}

impl Pooled {
    /// The pools, `[batch, 1, pools, dim]`.
    pub fn view(&self) -> ArrayView4<'_, f32> {
        let n = self.pools.len().checked_div(self.batch * self.dim).unwrap_or(0);
        let shape = (n, self.batch, 1, self.dim);
        let view = ArrayView4::from_shape(shape, &self.pools).expect("as many elements");
        view.permuted_axes([1, 2, 0, 3])
    }

    /// Tokens of each sequence so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Pooling {
    fn new(stride: usize, gate: Option<(Array2<f32>, bool)>) -> Result<Self> {
        if stride == 0 {
            return Err(Error::value("stride", "at least 1 token", 0));
        }
        let gate = gate.map(|(bias, overlap)| (Laid::from(bias), overlap));
        Ok(Self { isa: Isa::choose(None)?, stride, gate, norm: None, rope: None })
    }

    /// Means of `stride` tokens.
    ///
    /// # Errors
    /// [`Error::Value`] for a stride of 0.
    pub fn mean(stride: usize) -> Result<Self> {
        Self::new(stride, None)
    }

    /// Sums of as many tokens as there are biases, `[stride, dim]`, gated by the
    /// softmax of logits that come with the tokens.
    ///
    /// # Errors
    /// [`Error::Value`] for no bias.
    pub fn gated(bias: Array2<f32>) -> Result<Self> {
        Self::new(bias.nrows(), Some((bias, false)))
    }

    /// The same where a pool has the tokens of the one before as well: biases
    /// `[stride, 2 dim]`, and tokens and logits of `2 dim` channels.
    ///
    /// # Errors
    /// [`Error::Value`] for no bias, [`Error::Shape`] for an odd number of
    /// channels.
    pub fn overlapping(bias: Array2<f32>) -> Result<Self> {
        if !bias.ncols().is_multiple_of(2) {
            return Err(Error::shape("bias", "[stride, 2 dim]", bias.shape()));
        }
        Self::new(bias.nrows(), Some((bias, true)))
    }

    /// Divides a pool by its root mean square, and multiplies it with weights.
    pub fn norm(self, weight: Array1<f32>, epsilon: f32) -> Self {
        Self { norm: Some((weight.into(), epsilon)), ..self }
    }

    /// Rotates a pool to the position of its first token.
    pub fn rope(self, rope: Rope) -> Self {
        Self { rope: Some(rope), ..self }
    }

    /// Forces an instruction set.
    ///
    /// # Errors
    /// [`Error::Isa`] for one that the CPU lacks.
    pub fn isa(self, isa: Isa) -> Result<Self> {
        Ok(Self { isa: Isa::choose(Some(isa))?, ..self })
    }

    /// Channels of a token for pools of `dim`.
    fn channels(&self, dim: usize) -> usize {
        if matches!(self.gate, Some((_, true))) { 2 * dim } else { dim }
    }

    /// No tokens yet, of `batch` sequences, whose pools have `dim` channels.
    ///
    /// # Errors
    /// Biases, weights or a rotation of another number of channels.
    pub fn start(&self, batch: usize, dim: usize) -> Result<Pooled> {
        let channels = self.channels(dim);
        if let Some((bias, _)) = self.gate.as_ref().filter(|(bias, _)| bias.ncols() != channels) {
            return Err(Error::shape("bias", format!("[stride, {channels}]"), bias.shape()));
        }
        if let Some((weight, _)) = self.norm.as_ref().filter(|(weight, _)| weight.len() != dim) {
            return Err(Error::shape("weight", format!("[{dim}]"), weight.shape()));
        }
        self.rope.as_ref().map_or(Ok(()), |rope| rope.fits(dim))?;
        let held = [const { Vec::new() }; 2];
        Ok(Pooled { batch, dim, tokens: 0, held, pools: Vec::new() })
    }

    /// Refuses tokens that do not fit.
    fn check(
        &self,
        batch: usize,
        dim: usize,
        rows: &ArrayView3<'_, f32>,
        logits: Option<&ArrayView3<'_, f32>>,
    ) -> Result<()> {
        let channels = self.channels(dim);
        if (rows.dim().0, rows.dim().2) != (batch, channels) {
            let expected = format!("[batch, tokens, channels] = [{batch}, _, {channels}]");
            return Err(Error::shape("rows", expected, rows.shape()));
        }
        match logits {
            Some(logits) if self.gate.is_none() || logits.dim() != rows.dim() => {
                let expected =
                    if self.gate.is_none() { "none: pools are means" } else { "the shape of rows" };
                Err(Error::shape("logits", expected, logits.shape()))
            }
            None if self.gate.is_some() => Err(Error::value("logits", "those of the tokens", "none")),
            _ => Ok(()),
        }
    }

    /// Takes in tokens, `[batch, tokens, channels]`, and their logits where
    /// pools are gated; the same pools in any number of pieces.
    ///
    /// # Errors
    /// Arrays that do not fit; no memory.
    pub fn extend(
        &self,
        pooled: &mut Pooled,
        rows: ArrayView3<'_, f32>,
        logits: Option<ArrayView3<'_, f32>>,
    ) -> Result<()> {
        let &mut Pooled { batch, dim, tokens, .. } = pooled;
        self.check(batch, dim, &rows, logits.as_ref())?;
        let (channels, new) = (self.channels(dim), rows.dim().1);
        let overlap = channels > dim;
        // The first token that is held, now and after.
        let held_from =
            |tokens: usize| (tokens / self.stride).saturating_sub(usize::from(overlap)) * self.stride;
        let (from, end) = (held_from(tokens), tokens + new);
        let joined = |held: &[f32], new: ArrayView3<'_, f32>| -> Result<Vec<f32>> {
            let mut all = Vec::new();
            let n = held.len() + new.len();
            all.try_reserve_exact(n).map_err(|_| Error::too_large("rows", format_args!("{n} elements")))?;
            let each = (tokens - from) * channels;
            for b in 0..batch {
                all.extend_from_slice(&held[b * each..][..each]);
                all.extend(new.slice(s![b, .., ..]));
            }
            Ok(all)
        };
        let x = joined(&pooled.held[0], rows)?;
        let z = logits.map_or(Ok(Vec::new()), |logits| joined(&pooled.held[1], logits))?;
        let (first, last) = (tokens / self.stride, end / self.stride);
        let count = (last - first) * batch;
        let size = count * dim;
        pooled
            .pools
            .try_reserve(size)
            .map_err(|_| Error::too_large("rows", format_args!("{size} elements")))?;
        let start = pooled.pools.len();
        pooled.pools.resize(start + size, 0.0);
        let mut claims = vec![0; claim_words(count)];
        let parts = Parts::new(&mut pooled.pools[start..], dim, &mut claims);
        let each = (end - from) * channels;
        parallel::for_each(
            parallel::threads(),
            if dim == 0 { 0 } else { count },
            |_| (),
            |(), i| {
                let (pool, b) = (first + i / batch, i % batch);
                let own = |x: &'_ [f32]| if x.is_empty() { 0..0 } else { b * each..(b + 1) * each };
                let call =
                    OnePool { pooling: self, x: &x[own(&x)], z: &z[own(&z)], pool, from, out: parts.take(i) };
                self.isa.dispatch(call);
            },
        );
        let kept = held_from(end) - from;
        let keep = |all: Vec<f32>| -> Vec<f32> {
            if all.is_empty() {
                return all;
            }
            let of = |b: usize| b * each + kept * channels..(b + 1) * each;
            (0..batch).flat_map(|b| all[of(b)].to_vec()).collect()
        };
        pooled.held = [keep(x), keep(z)];
        pooled.tokens = end;
        Ok(())
    }

    /// The pools of all tokens by definition, `[batch, pools, dim]`.
    ///
    /// # Errors
    /// What [`extend`](Self::extend) refuses.
    pub fn reference(
        &self,
        rows: ArrayView3<'_, f32>,
        logits: Option<ArrayView3<'_, f32>>,
    ) -> Result<Array3<f64>> {
        let (batch, len, channels) = rows.dim();
        let overlap = matches!(self.gate, Some((_, true)));
        let dim = if overlap { channels / 2 } else { channels };
        self.start(batch, dim)?;
        self.check(batch, dim, &rows, logits.as_ref())?;
        let m = self.stride;
        let mut out = Array3::zeros((batch, len / m, dim));
        for (b, w) in (0..batch).flat_map(|b| (0..len / m).map(move |w| (b, w))) {
            let mut pool: Vec<f64> = (0..dim)
                .map(|c| {
                    let before = (w * m).saturating_sub(if overlap { m } else { 0 })..w * m;
                    let own = w * m..(w + 1) * m;
                    let shift = if overlap { dim } else { 0 };
                    let slots = before.map(|t| (t, c)).chain(own.map(|t| (t, c + shift)));
                    let weight = |&(t, c): &(usize, usize)| match (&self.gate, &logits) {
                        (Some((bias, _)), Some(z)) => {
                            (f64::from(z[[b, t, c]]) + f64::from(bias[[t % m, c]])).exp()
                        }
                        _ => 1.0,
                    };
                    let sum: f64 = slots.clone().map(|slot| weight(&slot)).sum();
                    slots.map(|slot| weight(&slot) * f64::from(rows[[b, slot.0, slot.1]])).sum::<f64>() / sum
                })
                .collect();
            if let Some((weight, epsilon)) = &self.norm {
                let square = pool.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                let root = (square + f64::from(*epsilon)).sqrt();
                pool.iter_mut().zip(weight.numbers()).for_each(|(x, &w)| *x = *x / root * f64::from(w));
            }
            if let Some(rope) = &self.rope {
                rope.define((w * m) as f64, &mut pool);
            }
            out.slice_mut(s![b, w, ..]).assign(&Array1::from(pool));
        }
        Ok(out)
    }
}

/// A pool of one sequence, whose tokens from `from` on are held.
struct OnePool<'a> {
    pooling: &'a Pooling,
    x: &'a [f32],
    z: &'a [f32],
    pool: usize,
    from: usize,
    out: &'a mut [f32],
}

impl Kernel for OnePool<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { pooling, x, z, pool, from, out } = self;
        let (dim, m) = (out.len(), pooling.stride);
        let channels = pooling.channels(dim);
        let overlap = channels > dim;
        let first = (pool - usize::from(overlap && pool > 0)) * m;
        for c in (0..dim).step_by(S::LANES) {
            let lanes = (dim - c).min(S::LANES);
            // Where a token's channels start: its own half, or the first.
            let at = |t: usize| (t - from) * channels + c + if overlap && t >= pool * m { dim } else { 0 };
            let load = |x: &[f32], at: usize| s.load_tail(&x[at..at + lanes]);
            let (mut sum, mut total) = (s.splat(0.0), s.splat(0.0));
            if let Some((bias, _)) = &pooling.gate {
                let bias = bias.numbers();
                let logit = |t: usize| {
                    let shift = if overlap && t >= pool * m { dim } else { 0 };
                    s.add(load(z, at(t)), load(bias, t % m * channels + c + shift))
                };
                let mut most = s.splat(f32::NEG_INFINITY);
                for t in first..(pool + 1) * m {
                    most = s.max(most, logit(t));
                }
                for t in first..(pool + 1) * m {
                    let weight = exp(s, s.sub(logit(t), most));
                    sum = s.mul_add(weight, load(x, at(t)), sum);
                    total = s.add(total, weight);
                }
            } else {
                for t in first..(pool + 1) * m {
                    sum = s.add(sum, load(x, at(t)));
                }
                total = s.splat(m as f32);
            }
            s.store_tail(&mut out[c..c + lanes], s.div(sum, total));
        }
        if let Some((weight, epsilon)) = &pooling.norm {
            let weight = weight.numbers();
            let mut square = s.splat(0.0);
            for x in out.chunks(S::LANES) {
                let x = s.load_tail(x);
                square = s.mul_add(x, x, square);
            }
            let factor = s.splat(1.0 / (s.reduce_add(square) / dim as f32 + epsilon).sqrt());
            for (x, w) in out.chunks_mut(S::LANES).zip(weight.chunks(S::LANES)) {
                let y = s.mul(s.mul(s.load_tail(x), factor), s.load_tail(w));
                s.store_tail(x, y);
            }
        }
        if let Some(rope) = &pooling.rope {
            for (c, (sin, cos)) in rope.angles((pool * m) as f64).enumerate() {
                let (i, j) = rope.pair(c, dim);
                let ((a, b), (sin, cos)) = ((out[i], out[j]), (sin as f32, cos as f32));
                (out[i], out[j]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::random::Normal;
    use crate::math::rope::Pairs;

    /// In any pieces, on any instruction set, the pools are the definition's.
    #[test]
    fn pools_are_the_definition_however_the_tokens_come() {
        let (batch, len, dim) = (2, 45, 20);
        let mut random = Normal::new(1);
        let mut array = |a, b, c| Array3::from_shape_simple_fn((a, b, c), || random.next().unwrap() as f32);
        let (x, z, bias) = (array(batch, len, 2 * dim), array(batch, len, 2 * dim), array(1, 8, 2 * dim));
        let half = s![.., .., ..dim];
        let bias = |m: usize, channels: usize| bias.slice(s![0, ..m, ..channels]).to_owned();
        let rope = Rope::builder(8).theta(100.0).last().pairs(Pairs::Neighbours).build().unwrap();
        let kinds = [
            (Pooling::mean(4).unwrap(), false, false),
            (
                Pooling::mean(4)
                    .unwrap()
                    .norm(bias(1, dim).remove_axis(ndarray::Axis(0)), 1e-6)
                    .rope(rope.clone()),
                false,
                false,
            ),
            (Pooling::gated(bias(8, dim)).unwrap(), true, false),
            (Pooling::overlapping(bias(4, 2 * dim)).unwrap().rope(rope), true, true),
        ];
        for (pooling, gated, overlap) in kinds {
            let (x, z) = if overlap { (x.view(), z.view()) } else { (x.slice(half), z.slice(half)) };
            let logits = |range: std::ops::Range<usize>| gated.then(|| z.slice(s![.., range, ..]));
            let want = pooling.reference(x.view(), gated.then_some(z.view())).unwrap();
            for isa in Isa::available() {
                let pooling = pooling.clone().isa(isa).unwrap();
                let run = |cuts: &[usize]| {
                    let mut pools = pooling.start(batch, dim).unwrap();
                    let mut from = 0;
                    for &end in cuts.iter().chain(&[len]) {
                        pooling
                            .extend(&mut pools, x.slice(s![.., from..end, ..]), logits(from..end))
                            .unwrap();
                        from = end;
                    }
                    pools
                };
                let whole = run(&[]);
                assert_eq!(whole.view().dim(), (batch, 1, want.dim().1, dim));
                for ((b, _, w, c), &got) in whole.view().indexed_iter() {
                    assert!((f64::from(got) - want[[b, w, c]]).abs() < 2e-5, "{isa}, {b} {w} {c}: {got}");
                }
                assert_eq!(run(&[7, 8, 8, 30]), whole);
                assert_eq!(run(&(0..len).collect::<Vec<_>>()), whole);
            }
        }
    }

    /// Biases and weights count whatever their strides.
    #[test]
    fn learned_arrays_of_any_strides() {
        let x = Array3::from_shape_fn((1, 12, 3), |(_, t, c)| ((5 * t + c) as f32).sin());
        let bias = Array2::from_shape_fn((4, 3), |(t, c)| (2 * t + c) as f32);
        let weight = Array1::from_iter([0.5, 2.0, -3.0]);
        let turned = bias.t().as_standard_layout().into_owned().reversed_axes();
        let backwards = Array1::from_iter([-3.0, 2.0, 0.5]).slice_move(s![..;-1]);
        let pools = |bias: &Array2<f32>, weight: &Array1<f32>| {
            let pooling = Pooling::gated(bias.clone()).unwrap().norm(weight.clone(), 1e-6);
            let mut pools = pooling.start(1, 3).unwrap();
            pooling.extend(&mut pools, x.view(), Some(x.view())).unwrap();
            pools
        };
        assert_eq!(pools(&turned, &backwards), pools(&bias, &weight));
    }

    /// Equal logits are means, of eight tokens where pools overlap, of four in
    /// the first.
    #[test]
    fn equal_logits_are_means() {
        let x = Array3::from_shape_fn((1, 12, 2), |(_, t, c)| (100 * c + t) as f32);
        let z = Array3::zeros((1, 12, 2));
        let pooling = Pooling::overlapping(Array2::zeros((4, 2))).unwrap();
        let mut pools = pooling.start(1, 1).unwrap();
        pooling.extend(&mut pools, x.view(), Some(z.view())).unwrap();
        let want = [101.5, (1.5 + 105.5) / 2.0, (5.5 + 109.5) / 2.0];
        assert!(pools.view().iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-4));
    }

    #[test]
    fn refusals() {
        let zeros = |m, c| Array2::zeros((m, c));
        assert!(Pooling::mean(0).is_err() && Pooling::gated(zeros(0, 3)).is_err());
        assert!(Pooling::overlapping(zeros(4, 3)).unwrap_err().to_string().starts_with("bias: "));
        let (mean, gated) = (Pooling::mean(4).unwrap(), Pooling::gated(zeros(4, 3)).unwrap());
        assert!(gated.start(1, 4).unwrap_err().to_string().starts_with("bias: "));
        let wide = mean.clone().rope(Rope::builder(8).theta(10.0).build().unwrap());
        assert!(wide.start(1, 4).unwrap_err().to_string().starts_with("rope: "));
        let x = Array3::zeros((1, 5, 3));
        let refusal = |pooling: &Pooling, batch, logits: Option<ArrayView3<'_, f32>>| {
            let mut pools = pooling.start(batch, 3).unwrap();
            pooling.extend(&mut pools, x.view(), logits).unwrap_err().to_string()
        };
        assert!(refusal(&mean, 2, None).starts_with("rows: "));
        assert!(refusal(&mean, 1, Some(x.view())).starts_with("logits: "));
        assert!(refusal(&gated, 1, None).starts_with("logits: "));
    }
}
