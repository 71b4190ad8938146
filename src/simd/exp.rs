//! Vector exponentials.

use super::Simd;

/// `2^x` for the weights of a softmax: relative error at most 2e-7, exact
/// for a whole `x`, exactly 0 below `x = -102`, 0 for -inf, NaN for NaN. `x` is
/// to be less than 128.
///
/// What is smaller is far below the error bound, which is a share of the largest
/// value, and the parts that it is split into may be subnormal numbers: to
/// compute with these costs hundreds of cycles on some CPUs.
#[inline(always)]
pub(crate) fn exp2_flush<S: Simd>(s: S, x: S::F) -> S::F {
    // Minimax on [0, 1] among the polynomials that are 1 at 0, degree 5.
    let f = s.fract(x);
    let p = s.mul_add(s.splat(1.867_115_1e-3), f, s.splat(9.017_031e-3));
    let p = s.mul_add(p, f, s.splat(5.579_988_3e-2));
    let p = s.mul_add(p, f, s.splat(2.401_645e-1));
    let p = s.mul_add(p, f, s.splat(6.931_513e-1));
    let p = s.mul_add(p, f, s.splat(1.0));
    s.ldexp_flush(p, x, -102.0)
}

/// `e^x` within 1.1 ulp over the whole range of `f32`, subnormal results
/// included: 1 for 0, 0 for -inf, inf above 88.72, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts; the first has 15 trailing zero bits, so that its
    // product with an exponent is exact without a fused multiply-add.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Beyond these the result is 0 or inf whatever the polynomial says. The
    // order of the operands keeps NaN.
    let x = s.min(s.splat(89.5), s.max(s.splat(-104.5), x));
    let n = s.round(s.mul(x, s.splat(LOG2_E)));
    let r = s.mul_add(n, s.splat(-LN2_HIGH), x);
    let r = s.mul_add(n, s.splat(-LN2_LOW), r);
    // 1 + r + r^2 p(r), minimax on |r| < 0.347, degree 6.
    let p = s.mul_add(s.splat(1.381_454e-3), r, s.splat(8.368_745e-3));
    let p = s.mul_add(p, r, s.splat(4.166_839e-2));
    let p = s.mul_add(p, r, s.splat(1.666_652e-1));
    let p = s.mul_add(p, r, s.splat(4.999_999_3e-1));
    let p = s.mul_add(p, s.mul(r, r), r);
    s.ldexp(s.add(p, s.splat(1.0)), n)
}

/// `x^y` for `x` that are 0, normal or infinite and not negative, within `8 + 2 |y
/// log2 x|` roundings: 0 where it is below `2^-102`, NaN for NaN. `y` is not 0.
#[inline(always)]
pub(crate) fn power<S: Simd>(s: S, x: S::F, y: f32) -> S::F {
    let [m, n] = s.split(x);
    // From 1/sqrt(2) to sqrt(2), around 1, where the logarithm is an odd function of
    // (m - 1) / (m + 1).
    let high = s.lt(s.splat(std::f32::consts::SQRT_2), m);
    let (one, half) = (s.splat(1.0), s.splat(0.5));
    let (m, n) = (s.select(high, s.mul(m, half), m), s.select(high, s.add(n, one), n));
    let t = s.div(s.sub(m, one), s.add(m, one));
    let square = s.mul(t, t);
    let p = s.mul_add(s.splat(1.0 / 9.0), square, s.splat(1.0 / 7.0));
    let p = s.mul_add(p, square, s.splat(0.2));
    let p = s.mul_add(p, square, s.splat(1.0 / 3.0));
    let p = s.mul_add(s.mul(p, square), t, t);
    let log = s.mul_add(p, s.splat(2.0 * std::f32::consts::LOG2_E), n);
    let power = exp2_flush(s, s.mul(log, s.splat(y)));
    let [least, most] = if y > 0.0 { [0.0, f32::INFINITY] } else { [f32::INFINITY, 0.0] };
    let power = s.select(s.lt(x, s.splat(f32::MIN_POSITIVE)), s.splat(least), power);
    // Of what is no number no comparison holds: it stays.
    let beyond = s.select(s.lt(s.splat(f32::MAX), x), s.splat(most), x);
    s.select(s.lt(x, s.splat(f32::INFINITY)), power, beyond)
}

/// `2^(a b)` for the decays of a state, which multiply up over many tokens:
/// what the polynomial is off is a share of the exponent, `5e-7 |a b|` for
/// exponents up to 1/2, so that the product of any number of decays is off by
/// no more than its own exponent says, and roundings. Exactly 1 for
/// 0, exactly 0 below about -126, NaN for NaN. `a b` is to be less than
/// 2^22.
#[inline(always)]
pub(crate) fn exp2_product<S: Simd>(s: S, a: S::F, b: S::F) -> S::F {
    // Adding it leaves no fraction bits. Far below -126 what comes of that is
    // no remainder any more, but the result is 0 whatever it is.
    let whole = s.splat(12_582_912.0);
    let n = s.sub(s.mul_add(a, b, whole), whole);
    let f = s.mul_sub(a, b, n);
    // 1 + f p(f), minimax of p on |f| < 1/2, degree 4.
    let p = s.mul_add(s.splat(1.340_043_6e-3), f, s.splat(9.666_373e-3));
    let p = s.mul_add(p, f, s.splat(5.550_333e-2));
    let p = s.mul_add(p, f, s.splat(2.402_234_8e-1));
    let p = s.mul_add(p, f, s.splat(std::f32::consts::LN_2));
    s.ldexp_flush(s.mul_add(p, f, s.splat(1.0)), n, -126.0)
}

/// `ln(1 + e^x)` within 3.5 ulp, exactly 0 below -87: inf for inf, NaN for NaN.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    // max(x, 0) + ln(1 + e^-|x|), of which nothing overflows.
    let e = exp(s, s.sub(zero, s.abs(x)));
    // ln(1 + e) = 2 artanh(e / (2 + e)): an odd function, of which the
    // quotient by its argument is minimax in the square, degree 4.
    let z = s.div(e, s.add(s.splat(2.0), e));
    let v = s.mul(z, z);
    let p = s.mul_add(s.splat(0.281_915_5), v, s.splat(0.279_576_66));
    let p = s.mul_add(p, v, s.splat(0.400_251_15));
    let p = s.mul_add(p, v, s.splat(0.666_663_1));
    let p = s.mul_add(p, v, s.splat(2.0));
    let sum = s.mul_add(z, p, s.max(zero, x));
    s.select(s.lt(x, s.splat(-87.0)), zero, sum)
}

/// `1 / (1 + e^-x)` within 2.5 ulp over the whole range of `f32`, subnormal
/// results included: 0 for -inf, 1 for inf, NaN for NaN.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    sigmoids(s, x).0
}

/// [`sigmoid`] of `x` and of `-x`, from one exponential.
#[inline(always)]
pub(crate) fn sigmoids<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    // e^-|x| never overflows, and the quotients lose nothing at either end.
    let one = s.splat(1.0);
    let e = exp(s, s.sub(s.splat(0.0), s.abs(x)));
    let (negative, sum) = (s.lt(x, s.splat(0.0)), s.add(one, e));
    (s.div(s.select(negative, e, one), sum), s.div(s.select(negative, one, e), sum))
}

/// `tanh x` within 1.6 ulp, and never beyond 1: NaN for NaN.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let a = s.abs(x);
    // Near 0 the quotient cancels: an odd polynomial serves there, minimax on
    // |x| < 0.625, degree 11.
    let x2 = s.mul(x, x);
    let p = s.mul_add(s.splat(-0.005_705), x2, s.splat(0.020_639_2));
    let p = s.mul_add(p, x2, s.splat(-0.053_739_7));
    let p = s.mul_add(p, x2, s.splat(0.133_314_42));
    let p = s.mul_add(p, x2, s.splat(-0.333_332_8));
    let small = s.mul_add(s.mul(p, x2), x, x);
    let e = exp(s, s.mul(a, s.splat(-2.0)));
    let large = s.div(s.sub(one, e), s.add(one, e));
    let large = s.select(s.lt(x, s.splat(0.0)), s.sub(s.splat(0.0), large), large);
    s.select(s.lt(a, s.splat(0.625)), small, large)
}

/// Sine and cosine of an angle of at most some turns, each within `2e-7`: NaN
/// for NaN.
#[inline(always)]
pub(crate) fn sin_cos<S: Simd>(s: S, x: S::F) -> [S::F; 2] {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    // Quarter turns, and what is left of at most half of one; pi / 2 in three
    // parts, whose products with few quarters are exact.
    let n = s.round(s.mul(x, s.splat(std::f32::consts::FRAC_2_PI)));
    let r = s.mul_add(n, s.splat(-1.570_312_5), x);
    let r = s.mul_add(n, s.splat(-4.837_513e-4), r);
    let r = s.mul_add(n, s.splat(-7.549_79e-8), r);
    let r2 = s.mul(r, r);
    let p = s.mul_add(s.splat(-1.951_529_6e-4), r2, s.splat(8.332_161e-3));
    let p = s.mul_add(p, r2, s.splat(-1.666_665_5e-1));
    let sin = s.mul_add(s.mul(p, r2), r, r);
    let p = s.mul_add(s.splat(2.443_315_7e-5), r2, s.splat(-1.388_731_6e-3));
    let p = s.mul_add(p, r2, s.splat(4.166_664_6e-2));
    let cos = s.mul_add(s.mul(p, r2), r2, s.mul_add(s.splat(-0.5), r2, one));
    // From -2 to 2 quarters.
    let m = s.sub(n, s.mul(s.splat(4.0), s.round(s.mul(n, s.splat(0.25)))));
    let odd = s.lt(s.abs(s.sub(s.abs(m), one)), s.splat(0.5));
    let half = s.lt(s.splat(1.5), s.abs(m));
    let signs = [s.lt(m, s.splat(-0.5)), s.lt(s.splat(0.5), m)];
    let bases = [s.select(odd, cos, sin), s.select(odd, sin, cos)];
    std::array::from_fn(|i| {
        let minus = s.sub(zero, bases[i]);
        s.select(half, minus, s.select(signs[i], minus, bases[i]))
    })
}

/// What the normal distribution has below `x`, within `12 + x^2` roundings: 0 for
/// -inf, 1 for inf, NaN for NaN.
#[inline(always)]
pub(crate) fn normal<S: Simd>(s: S, x: S::F) -> S::F {
    // erfc(z) = t e^(p(t) - z^2) with t = 1 / (1 + z / 2): Numerical Recipes,
    // section 6.2, of a relative error of 1.2e-7.
    let (one, z) = (s.splat(1.0), s.mul(s.abs(x), s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    let t = s.div(one, s.mul_add(z, s.splat(0.5), one));
    let mut p = s.splat(0.170_872_76);
    for c in [-0.822_152_26, 1.488_515_9, -1.135_204, 0.278_868_08, -0.186_288_06, 0.096_784_18, 0.374_091_95]
    {
        p = s.mul_add(p, t, s.splat(c));
    }
    let p = s.mul_add(s.mul_add(p, t, s.splat(1.000_023_7)), t, s.splat(-1.265_512_2));
    // Of infinity there is nothing beyond.
    let beyond = s.mul(s.mul(t, s.splat(0.5)), exp(s, s.mul_add(s.mul(x, s.splat(-0.5)), x, p)));
    s.select(s.lt(x, s.splat(0.0)), beyond, s.sub(one, beyond))
}

/// `x` times the normal distribution up to `x` (GELU, not its approximation by
/// `tanh`), within `13 + x^2` roundings, or `1 + |x|` times the least subnormal
/// number: NaN for -inf, as for NaN.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, normal(s, x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, Kernel, MAX_LANES};

    struct Power<'a>(&'a mut [f32; MAX_LANES], f32);

    impl Kernel for Power<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for x in self.0.chunks_exact_mut(S::LANES) {
                let y = power(s, s.load(x), self.1);
                s.store(x, y);
            }
        }
    }

    #[test]
    fn powers_keep_to_their_roundings() {
        for isa in Isa::available() {
            for y in [-0.5f32, -0.375, 0.25, 1.0] {
                for first in 0..40 {
                    let x: [f32; MAX_LANES] = std::array::from_fn(|i| {
                        2f32.powi(first * 5 - 90) * (1.0 + i as f32 / MAX_LANES as f32)
                    });
                    let mut got = x;
                    isa.dispatch(Power(&mut got, y));
                    for (x, got) in x.iter().zip(got) {
                        let (x, y) = (f64::from(*x), f64::from(y));
                        let (want, most) = (x.powf(y), (8.0 + 2.0 * (y * x.log2()).abs()) / 16_777_216.0);
                        assert!((f64::from(got) / want - 1.0).abs() <= most, "{isa}: {x:e}^{y} is {got:e}");
                    }
                }
                let mut got = [0.0; MAX_LANES];
                got[..3].copy_from_slice(&[0.0, f32::INFINITY, f32::NAN]);
                isa.dispatch(Power(&mut got, y));
                let [least, most] = if y > 0.0 { [0.0, f32::INFINITY] } else { [f32::INFINITY, 0.0] };
                assert!(got[0] == least && got[1] == most && got[2].is_nan(), "{isa}: {got:?}");
            }
        }
    }
}
