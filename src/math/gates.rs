//! What models make of a projection before it serves as a gate or a decay.
//!
//! A log decay is at most 0; `log_sigmoid` and `-softplus` are such. None of
//! these overflows, and none loses precision at either end. The functions of
//! single numbers round the [`exact`] ones; [`log_sigmoid_decays`] takes whole
//! arrays, by vectors.

use ndarray::{Array4, ArrayView4};

use crate::error::{Error, Result};
use crate::simd::exp::{exp, sigmoids};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

pub mod exact;

/// `1 / (1 + e^-x)`
///
/// ```
/// assert_eq!(attention_kernels::math::gates::sigmoid(0.0), 0.5);
/// ```
pub fn sigmoid(x: f32) -> f32 {
    exact::sigmoid(x.into()) as f32
}

/// `ln(1 + e^x)`: how Mamba makes a step of a projection.
///
/// ```
/// use attention_kernels::math::gates::softplus;
/// assert_eq!((softplus(1e30), softplus(f32::NEG_INFINITY)), (1e30, 0.0));
/// ```
pub fn softplus(x: f32) -> f32 {
    exact::softplus(x.into()) as f32
}

/// `ln(1 / (1 + e^-x))`: a log decay of a projection.
///
/// ```
/// use attention_kernels::math::gates::log_sigmoid;
/// assert_eq!((log_sigmoid(-1e30), log_sigmoid(f32::INFINITY)), (-1e30, 0.0));
/// ```
pub fn log_sigmoid(x: f32) -> f32 {
    exact::log_sigmoid(x.into()) as f32
}

/// `ln(e^x + e^y)`: the logarithm of a sum of two that are known by theirs.
///
/// ```
/// use attention_kernels::math::gates::log_add_exp;
/// assert_eq!(log_add_exp(f32::NEG_INFINITY, -3.0), -3.0);
/// ```
pub fn log_add_exp(x: f32, y: f32) -> f32 {
    exact::log_add_exp(x.into(), y.into()) as f32
}

/// `log_sigmoid(logits) / normaliser`, element by element: the log decays of
/// [`Gla`](crate::linear::Gla), whose normaliser is 16. Within 3 ulp.
///
/// # Errors
/// [`Error::Value`] for a normaliser that is not finite and above 0.
///
/// ```
/// use attention_kernels::math::gates::log_sigmoid_decays;
/// use ndarray::Array4;
///
/// let decays = log_sigmoid_decays(Array4::zeros((1, 2, 3, 4)).view(), 16.0)?;
/// assert!(decays.iter().all(|decay| (decay - 0.5f32.ln() / 16.0).abs() < 1e-7));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn log_sigmoid_decays(logits: ArrayView4<'_, f32>, normaliser: f32) -> Result<Array4<f32>> {
    struct Map<'a>(&'a mut [f32], f32);
    impl Kernel for Map<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let zero = s.splat(0.0);
            for x in self.0.chunks_mut(S::LANES) {
                let y = softplus_of(s, s.sub(zero, s.load_tail(x)));
                s.store_tail(x, s.div(s.sub(zero, y), s.splat(self.1)));
            }
        }
    }
    if !(normaliser.is_finite() && normaliser > 0.0) {
        return Err(Error::value("normaliser", "a finite number above 0", normaliser));
    }
    let mut decays = logits.as_standard_layout().into_owned();
    // Of standard layout, as it was just made.
    Isa::choose(None)?.dispatch(Map(decays.as_slice_mut().unwrap_or_default(), normaliser));
    Ok(decays)
}

/// `ln(1 + x)` for `x` from -1/2 to 1, within 1.5 ulp.
#[inline(always)]
fn ln_1p<S: Simd>(s: S, x: S::F) -> S::F {
    // 2 atanh(z), of which x - z x is the first term; the others are minimax
    // for z^2 < 1/9.
    let z = s.div(x, s.add(x, s.splat(2.0)));
    let w = s.mul(z, z);
    let p = s.mul_add(s.splat(0.280_128_4), w, s.splat(0.280_016_27));
    let p = s.mul_add(p, w, s.splat(0.400_215_4));
    let p = s.mul_add(p, w, s.splat(0.666_664_2));
    s.sub(x, s.mul(z, s.sub(x, s.mul(w, p))))
}

/// [`softplus`], within 2 ulp; NaN for NaN.
#[inline(always)]
pub(crate) fn softplus_of<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), s.abs(x)));
    // The order of the operands keeps NaN.
    s.add(s.max(s.splat(0.0), x), ln_1p(s, e))
}

/// What HGRN2 makes of a logit `x` and a lower bound: the share of the state
/// that is forgotten, `(1 - bound) sigmoid(-x)`, and the logarithm of what
/// remains, `ln(bound + (1 - bound) sigmoid(x))`, each within 4 ulp. A share
/// below the smallest normal number counts as that.
#[inline(always)]
pub(crate) fn forget_of<S: Simd>(s: S, x: S::F, bound: S::F) -> (S::F, S::F) {
    let one = s.splat(1.0);
    let span = s.sub(one, bound);
    let (open, shut) = sigmoids(s, x);
    let (forgotten, kept) = (s.mul(span, shut), s.mul_add(span, open, bound));
    // Where little is forgotten the logarithm is that of 1 - forgotten; where
    // little is kept, that of 2^n (1 + y) with y near 0.
    let (n, y) = split(s, s.max(kept, s.splat(f32::MIN_POSITIVE)));
    let far = s.lt(s.splat(0.5), forgotten);
    let y = s.select(far, y, s.sub(s.splat(0.0), forgotten));
    let n = s.select(far, n, s.splat(0.0));
    (forgotten, s.mul_add(n, s.splat(std::f32::consts::LN_2), ln_1p(s, y)))
}

/// `n` and `y` with `x = 2^n (1 + y)` and `y` from -1/3 to 1/3, for `x` that is
/// normal and above 0.
#[inline(always)]
fn split<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    /// The bits of 2/3.
    const LEAST: i32 = 0x3f2a_aaab;
    let (mut powers, mut parts) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
    s.store(&mut parts, x);
    for (power, part) in powers[..S::LANES].iter_mut().zip(&mut parts[..S::LANES]) {
        let bits = part.to_bits() as i32;
        let n = bits.wrapping_sub(LEAST) >> 23;
        *power = n as f32;
        *part = f32::from_bits(bits.wrapping_sub(n << 23) as u32) - 1.0;
    }
    (s.load(&powers), s.load(&parts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn the_normal_distribution_is_what_tables_say() {
        // Abramowitz and Stegun, table 26.1, and from 6 on 26.2.
        for (x, want) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_931_457_05),
            (2.5, 6.209_665_325_776_132e-3),
            (5.0, 2.866_515_718_791_939e-7),
            (6.0, 9.865_876_450_376_98e-10),
        ] {
            let [below, above] = [-x, x].map(exact::normal);
            assert!((below / want - 1.0).abs() < 1e-12, "-{x}: {below}");
            assert!((above - (1.0 - want)).abs() < 1e-15, "{x}: {above}");
        }
        assert_eq!([f64::NEG_INFINITY, f64::INFINITY].map(exact::normal), [0.0, 1.0]);
        assert!(exact::normal(f64::NAN).is_nan() && exact::gelu(f64::NEG_INFINITY).is_nan());
        assert!((exact::gelu(-1.0) + 0.158_655_253_931_457_05).abs() < 1e-15);
    }

    /// Where sigmoids and logarithms change or end, and noise.
    fn points() -> Vec<f32> {
        let mut points = vec![
            0.0,
            -0.0,
            1e-30,
            -1e-30,
            1e-7,
            -1e-7,
            20.0,
            -20.0,
            80.0,
            -80.0,
            -87.0,
            88.0,
            -88.5,
            1e30,
            -1e30,
            f32::INFINITY,
            f32::NEG_INFINITY,
        ];
        let mut next = noise(1);
        points.extend((0..4000).map(|i| next() * [0.01, 1.0, 8.0, 85.0][i % 4]));
        while !points.len().is_multiple_of(MAX_LANES) {
            points.push(0.5);
        }
        points
    }

    /// Units in the last place between a result and what it should be.
    fn ulps(got: f32, want: f64) -> f64 {
        if f64::from(got) == want {
            return 0.0;
        }
        let unit = f64::from(f32::EPSILON) * want.abs().log2().floor().exp2();
        (f64::from(got) - want).abs() / unit.max(f64::from(f32::from_bits(1)))
    }

    #[test]
    fn definitions() {
        for x in [-3.0, -0.5, 0.0, 0.5, 3.0f64] {
            assert!((exact::sigmoid(x) - 1.0 / (1.0 + (-x).exp())).abs() < 1e-15);
            assert!((exact::softplus(x) - (1.0 + x.exp()).ln()).abs() < 1e-15);
            assert!((exact::log_sigmoid(x) - exact::sigmoid(x).ln()).abs() < 1e-15);
            for y in [-2.0, 0.0, 2.5f64] {
                assert!((exact::log_add_exp(x, y) - (x.exp() + y.exp()).ln()).abs() < 1e-14);
            }
        }
        let (inf, nan) = (f64::INFINITY, f64::NAN);
        assert_eq!((exact::sigmoid(-inf), exact::sigmoid(inf)), (0.0, 1.0));
        assert_eq!(
            (exact::softplus(-inf), exact::softplus(inf), exact::softplus(-700.0)),
            (0.0, inf, (-700f64).exp())
        );
        for (x, y, sum) in
            [(-inf, -inf, -inf), (inf, inf, inf), (-inf, inf, inf), (-inf, 2.0, 2.0), (2.0, inf, inf)]
        {
            assert_eq!(exact::log_add_exp(x, y), sum);
            assert_eq!(exact::log_add_exp(y, x), sum);
        }
        assert!(exact::sigmoid(nan).is_nan() && exact::softplus(nan).is_nan());
        assert!(exact::log_add_exp(nan, 1.0).is_nan() && exact::log_add_exp(1.0, nan).is_nan());
    }

    #[test]
    fn vectors_of_softplus() {
        struct Op<'a>(&'a mut [f32]);
        impl Kernel for Op<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                for x in self.0.chunks_exact_mut(S::LANES) {
                    s.store(x, softplus_of(s, s.load(x)));
                }
            }
        }
        for isa in Isa::available() {
            let points = points();
            let mut got = points.clone();
            isa.dispatch(Op(&mut got));
            let mut worst = 0f64;
            for (&x, &got) in points.iter().zip(&got) {
                let off = ulps(got, exact::softplus(x.into()));
                assert!(off <= 2.0, "{isa}: softplus({x:e}) is {got:e}, {off} ulp off");
                worst = worst.max(off);
            }
            println!("{isa}: softplus {worst:.2} ulp");
            let mut nan = [f32::NAN; MAX_LANES];
            isa.dispatch(Op(&mut nan));
            assert!(nan.iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn vectors_of_gates() {
        struct Op<'a>(&'a mut [f32], &'a mut [f32], f32);
        impl Kernel for Op<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                for (x, y) in self.0.chunks_exact_mut(S::LANES).zip(self.1.chunks_exact_mut(S::LANES)) {
                    let (forgotten, kept) = forget_of(s, s.load(x), s.splat(self.2));
                    s.store(x, forgotten);
                    s.store(y, kept);
                }
            }
        }
        for isa in Isa::available() {
            let mut worst = [0f64; 2];
            for bound in [0.0, 1e-38, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.999_999_9] {
                let points = points();
                let (mut forgotten, mut kept) = (points.clone(), points.clone());
                isa.dispatch(Op(&mut forgotten, &mut kept, bound));
                for (&x, got) in points.iter().zip(forgotten.iter().zip(&kept)) {
                    let (x, bound) = (f64::from(x), f64::from(bound));
                    let k = (1.0 - bound) * exact::sigmoid(-x);
                    let f = bound + (1.0 - bound) * exact::sigmoid(x);
                    // ln(1 - k) where k is small, for f has lost it.
                    let g = if k < 0.5 { (-k).ln_1p() } else { f.max(f32::MIN_POSITIVE.into()).ln() };
                    for (i, (&got, want)) in [got.0, got.1].into_iter().zip([k, g]).enumerate() {
                        let off = ulps(got, want);
                        assert!(
                            off <= 4.0,
                            "{isa}: {i} of {x:e}, {bound:e} is {got:e}, not {want:e}: {off} ulp"
                        );
                        worst[i] = worst[i].max(off);
                    }
                }
            }
            println!("{isa}: forgotten {:.2} ulp, kept {:.2} ulp", worst[0], worst[1]);
            let (mut forgotten, mut kept) = ([f32::NAN; MAX_LANES], [0.0; MAX_LANES]);
            isa.dispatch(Op(&mut forgotten, &mut kept, 0.5));
            assert!(forgotten.iter().chain(&kept).all(|x| x.is_nan()));
        }
    }

    #[test]
    fn decays_of_arrays() {
        // Transposed, so that the last axis is not the inner one.
        let points = points();
        let x = Array4::from_shape_vec((1, 2, points.len() / 16, 8), points).unwrap();
        let x = x.view().permuted_axes([0, 1, 3, 2]);
        let got = log_sigmoid_decays(x.view(), 16.0).unwrap();
        assert_eq!(got.dim(), x.dim());
        for (at, &got) in got.indexed_iter() {
            let off = ulps(got, exact::log_sigmoid(x[at].into()) / 16.0);
            assert!(off <= 3.0, "{}: {off} ulp", x[at]);
        }
        for normaliser in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = log_sigmoid_decays(x.view(), normaliser).unwrap_err();
            let want = format!("normaliser: expected a finite number above 0, got {normaliser}");
            assert_eq!(error.to_string(), want);
        }
    }
}
