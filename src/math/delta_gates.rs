//! Gates of the delta-rule mechanisms: what their models make of the raw
//! outputs of their projections.
//!
//! All are evaluated in `f64` and rounded once. Log decays that come out are
//! at most 0, which is what the mechanisms ask for.

/// `ln(1 + e^x)`, without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + e^-x)`
fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    (if x < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

/// The log decay of [`GatedDeltaNet`](crate::linear::GatedDeltaNet) (one
/// `raw` a token and head) and of [`Kda`](crate::linear::Kda) (one a token and
/// channel): `-exp(a_log) softplus(raw + dt_bias)`, where `a_log` is learned
/// for each head and `dt_bias` for each head or channel (arXiv 2412.06464,
/// 2510.26692).
///
/// ```
/// use attention_kernels::math::delta_gates::log_decay;
///
/// assert_eq!(log_decay(0.0, 0.0, 0.0), -std::f32::consts::LN_2);
/// assert_eq!(log_decay(-1e9, 0.0, 0.0), 0.0);
/// ```
pub fn log_decay(raw: f32, a_log: f32, dt_bias: f32) -> f32 {
    (-f64::from(a_log).exp() * softplus(f64::from(raw) + f64::from(dt_bias))) as f32
}

/// The bounded log decay of [`Kda`](crate::linear::Kda): `lower_bound
/// sigmoid(exp(a_log) (raw + dt_bias))`, from `lower_bound` (-5 in the
/// published code) to 0.
///
/// ```
/// use attention_kernels::math::delta_gates::bounded_log_decay;
///
/// assert_eq!(bounded_log_decay(0.0, 0.0, 0.0, -5.0), -2.5);
/// assert_eq!(bounded_log_decay(100.0, 1.0, 0.0, -5.0), -5.0);
/// ```
pub fn bounded_log_decay(raw: f32, a_log: f32, dt_bias: f32, lower_bound: f32) -> f32 {
    let x = f64::from(a_log).exp() * (f64::from(raw) + f64::from(dt_bias));
    (f64::from(lower_bound) * sigmoid(x)) as f32
}

/// The weight `beta` of a correction: `sigmoid(raw)`, or twice that if
/// `negative`, which lets a token turn what is stored under its key around
/// (transitions with negative eigenvalues).
///
/// ```
/// use attention_kernels::math::delta_gates::beta;
///
/// assert_eq!((beta(0.0, false), beta(0.0, true)), (0.5, 1.0));
/// ```
pub fn beta(raw: f32, negative: bool) -> f32 {
    let most = if negative { 2.0 } else { 1.0 };
    (most * sigmoid(f64::from(raw))) as f32
}

/// The log decay of [`Rwkv7`](crate::linear::Rwkv7): `-e^(-1/2)
/// sigmoid(raw)`, from -0.6065 to 0 (arXiv 2503.14456).
///
/// ```
/// use attention_kernels::math::delta_gates::rwkv7_log_decay;
///
/// assert!((rwkv7_log_decay(0.0) + 0.5 * (-0.5f32).exp()).abs() < 1e-7);
/// ```
pub fn rwkv7_log_decay(raw: f32) -> f32 {
    (-(-0.5f64).exp() * sigmoid(f64::from(raw))) as f32
}

/// One channel of the key that [`Rwkv7`](crate::linear::Rwkv7) writes under:
/// `k (1 + (rate - 1) mix)`, where `rate` is the in-context learning rate of
/// the channel and `mix` is learned (`k_a` in the published code).
///
/// ```
/// use attention_kernels::math::delta_gates::rwkv7_key;
///
/// assert_eq!(rwkv7_key(3.0, 0.25, 1.0), 0.75);
/// assert_eq!(rwkv7_key(3.0, 0.25, 0.0), 3.0);
/// ```
pub fn rwkv7_key(k: f32, rate: f32, mix: f32) -> f32 {
    (f64::from(k) * (1.0 + (f64::from(rate) - 1.0) * f64::from(mix))) as f32
}

/// The removal key of a token of one head of [`Rwkv7`](crate::linear::Rwkv7),
/// in place: `x / max(|x|, 1e-12)` for `x = k * weight`, channel by channel
/// (`weight` is `k_k` in the published code). A key of zeros stays one.
/// Channels beyond the shorter of the two slices are left alone.
///
/// ```
/// use attention_kernels::math::delta_gates::rwkv7_removal_key;
///
/// let mut k = [3.0, 2.0];
/// rwkv7_removal_key(&mut k, &[1.0, 2.0]);
/// assert_eq!(k, [0.6, 0.8]);
/// ```
pub fn rwkv7_removal_key(k: &mut [f32], weight: &[f32]) {
    let product = |k: f32, w: f32| f64::from(k) * f64::from(w);
    let sum: f64 = k.iter().zip(weight).map(|(&k, &w)| product(k, w) * product(k, w)).sum();
    let norm = sum.sqrt();
    // NaN stays one.
    let norm = if norm < 1e-12 { 1e-12 } else { norm };
    for (k, &w) in k.iter_mut().zip(weight) {
        *k = (product(*k, w) / norm) as f32;
    }
}

/// What a layer of RWKV-7 weighs a token's own value with, to be added to the
/// normalised output: `sum_c r_c k_c weight_c`, where `k` is the key that was
/// written under and `weight` is learned (`r_k` in the published code).
///
/// ```
/// use attention_kernels::math::delta_gates::rwkv7_bonus;
///
/// assert_eq!(rwkv7_bonus(&[1.0, 2.0], &[3.0, 4.0], &[1.0, 0.5]), 7.0);
/// ```
pub fn rwkv7_bonus(r: &[f32], k: &[f32], weight: &[f32]) -> f32 {
    let terms = r.iter().zip(k).zip(weight);
    terms.map(|((&r, &k), &w)| f64::from(r) * f64::from(k) * f64::from(w)).sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_arguments_neither_overflow_nor_lose_their_sign() {
        // softplus(x) -> x, and the decay of a large one is all of it.
        assert_eq!(log_decay(1e6, 0.0, 0.5), -1e6 - 0.5);
        assert_eq!(log_decay(3e38, 20.0, 3e38), f32::NEG_INFINITY);
        // softplus(x) -> e^x, far below the spacing of numbers near 1.
        assert!((log_decay(-30.0, 0.0, 0.0) / -(-30f32).exp() - 1.0).abs() < 1e-6);
        assert_eq!(log_decay(f32::NEG_INFINITY, 0.0, 0.0), 0.0);
        assert_eq!(bounded_log_decay(f32::NEG_INFINITY, 0.0, 0.0, -5.0), 0.0);
        assert_eq!(rwkv7_log_decay(f32::INFINITY), -(-0.5f64).exp() as f32);
        assert_eq!((beta(-1e9, true), beta(1e9, true)), (0.0, 2.0));
        assert!(log_decay(f32::NAN, 0.0, 0.0).is_nan() && beta(f32::NAN, false).is_nan());
    }

    #[test]
    fn a_removal_key_is_a_unit_vector_or_nothing() {
        let mut k = [1e-30, -1e-30, 2e-30, 7.0];
        // Below the guard: 1e-30 / 1e-12.
        rwkv7_removal_key(&mut k, &[1.0, 1.0, 1.0]);
        assert_eq!(k[..2], [1e-18, -1e-18]);
        assert_eq!(k[3], 7.0);
        let mut k = [1e30, -1e30, 0.0, 0.0];
        rwkv7_removal_key(&mut k, &[1.0; 4]);
        let half = std::f32::consts::FRAC_1_SQRT_2;
        assert_eq!(k, [half, -half, 0.0, 0.0]);
        let mut k = [0.0; 3];
        rwkv7_removal_key(&mut k, &[1.0; 3]);
        assert_eq!(k, [0.0; 3]);
        let mut k = [1.0, f32::NAN];
        rwkv7_removal_key(&mut k, &[1.0; 2]);
        assert!(k.iter().all(|x| x.is_nan()));
    }
}
