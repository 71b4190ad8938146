//! The definitions, in `f64`.

/// `1 / (1 + e^-x)`
pub fn sigmoid(x: f64) -> f64 {
    // e^-|x| never overflows.
    let e = (-x.abs()).exp();
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}

/// `ln(1 + e^x)`
pub fn softplus(x: f64) -> f64 {
    // A maximum would swallow NaN.
    let positive = if x < 0.0 { 0.0 } else { x };
    positive + (-x.abs()).exp().ln_1p()
}

/// `ln(1 / (1 + e^-x))`
pub fn log_sigmoid(x: f64) -> f64 {
    -softplus(-x)
}

/// `ln(e^x + e^y)`: `-inf` where both are.
pub fn log_add_exp(x: f64, y: f64) -> f64 {
    let (least, most) = if x < y { (x, y) } else { (y, x) };
    // Infinities of one sign have no difference.
    if least == most { most + std::f64::consts::LN_2 } else { most + (least - most).exp().ln_1p() }
}

/// What the normal distribution has below `x`, as exact in relative terms far
/// below 0: a series of terms of one sign, and far from 0 a continued fraction.
pub fn normal(x: f64) -> f64 {
    let (a, root) = (x.abs() * std::f64::consts::FRAC_1_SQRT_2, std::f64::consts::PI.sqrt());
    let beyond = if a > 2.5 {
        let fraction = (1..80).rev().fold(a, |below, n| a + 0.5 * f64::from(n) / below);
        0.5 * (-a * a).exp() / (root * fraction)
    } else {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            term *= 2.0 * a * a / f64::from(2 * n + 1);
            sum += term;
        }
        0.5 - (-a * a).exp() * sum / root
    };
    if x < 0.0 { beyond } else { 1.0 - beyond }
}

/// `x` times the normal distribution up to `x`: GELU as it is defined
/// (arXiv 1606.08415), not its approximation by `tanh`. NaN for -inf.
pub fn gelu(x: f64) -> f64 {
    x * normal(x)
}
