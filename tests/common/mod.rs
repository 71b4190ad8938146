//! What the tests share: numbers, layouts of arrays, thread pools, and the
//! comparison of a kernel with its definition.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::fmt::Display;

use attention_kernels::Element;
use attention_kernels::attention::ERROR_CONSTANT;
use attention_kernels::element::DType;
use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut4};

#[path = "../../examples/support/fixture.rs"]
pub mod fixture;
mod random;
mod stored;

pub use random::Random;
pub use stored::{Layout, Stored};

/// An output filled with NaN, in the middle of memory that must not change.
pub struct Output<T> {
    stored: Stored<T>,
}

const CANARY: f32 = -77.0;

impl<T: Element> Output<T> {
    pub fn new(dim: (usize, usize, usize, usize), layout: Layout) -> Self {
        let mut stored = Stored::filled(dim, layout, T::from_f32(CANARY));
        stored.view_mut().fill(T::from_f32(f32::NAN));
        Self { stored }
    }

    pub fn view_mut(&mut self) -> ArrayViewMut4<'_, T> {
        self.stored.view_mut()
    }

    pub fn view(&self) -> ArrayView4<'_, T> {
        self.stored.view()
    }

    /// What has been written; panics if something beside it was.
    pub fn read(mut self, what: &dyn Display) -> Array4<T> {
        let values = self.stored.view().to_owned();
        self.stored.view_mut().fill(T::from_f32(CANARY));
        let untouched = self.stored.memory().iter().all(|x| x.to_f32() == CANARY);
        assert!(untouched, "{what}: something was written beside the output");
        values
    }
}

/// Runs on a pool of so many threads.
#[cfg(feature = "rayon")]
pub fn on_threads<R: Send>(threads: usize, run: impl FnOnce() -> R + Send) -> R {
    use std::sync::OnceLock;
    static POOLS: [OnceLock<rayon::ThreadPool>; 3] = [const { OnceLock::new() }; 3];
    let make =
        || rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap_or_else(|e| panic!("{e}"));
    POOLS[threads].get_or_init(make).install(run)
}

#[cfg(not(feature = "rayon"))]
pub fn on_threads<R: Send>(_: usize, run: impl FnOnce() -> R + Send) -> R {
    run()
}

/// Whether all bits are equal, those of a NaN aside.
pub fn same_bits<T: Element>(a: &Array4<T>, b: &Array4<T>) -> bool {
    let same = |(a, b): (&T, &T)| {
        let (a, b) = (a.to_f32(), b.to_f32());
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    };
    a.dim() == b.dim() && a.iter().zip(b).all(same)
}

/// Half of the smallest subnormal number of a type, and its largest number.
pub fn range<T: Element>() -> (f64, f64) {
    match T::DTYPE {
        DType::F32 => (2f64.powi(-150), f64::from(f32::MAX)),
        DType::F16 => (2f64.powi(-25), 65504.0),
        DType::Bf16 => (2f64.powi(-134), 3.389_531_389_251_535e38),
    }
}

/// What rounding a number to `T` may cost on its way out. The bound of an
/// `f32` output includes it.
pub fn rounding<T: Element>(x: f64) -> f64 {
    if T::DTYPE == DType::F32 { 0.0 } else { T::ROUNDING * x.abs() + range::<T>().0 }
}

/// The largest error in units of the bound without its constant, and where.
#[derive(Clone, Debug, Default)]
pub struct Ratio {
    pub worst: f64,
    pub at: String,
}

impl Ratio {
    pub fn see(&mut self, ratio: f64, at: impl Display) {
        if ratio > self.worst {
            *self = Self { worst: ratio, at: at.to_string() };
        }
    }

    pub fn join(&mut self, other: Self) {
        if other.worst > self.worst {
            *self = other;
        }
    }

    /// Prints it; `--nocapture` shows it.
    pub fn report(&self, kind: &str) {
        println!("{kind}: largest error {:.3} in units of the bound's terms ({})", self.worst, self.at);
    }
}

/// Holds an output to its bound; returns the largest error in units of the
/// bound without its constant. Where the definition is NaN the output must
/// be, where it is infinite the output must not be finite.
#[track_caller]
pub fn check<T: Element>(
    what: &dyn Display,
    got: &Array4<T>,
    reference: &Array4<f64>,
    bound: &Array3<f64>,
) -> Ratio {
    assert_eq!(got.dim(), reference.dim(), "{what}: shape");
    let mut ratio = Ratio::default();
    for (((b, h, i, c), &want), x) in reference.indexed_iter().zip(got) {
        let (x, bound) = (x.to_f64(), bound[[b, h, i]]);
        let place = || format!("{what}: [{b}, {h}, {i}, {c}]");
        if want.is_nan() {
            assert!(x.is_nan(), "{}: {x:e}, by definition NaN", place());
            continue;
        }
        if want.is_infinite() {
            assert!(!x.is_finite(), "{}: {x:e}, by definition {want}", place());
            continue;
        }
        let error = (x - want).abs();
        let allowed = bound * (1.0 + T::ROUNDING) + rounding::<T>(want);
        assert!(
            error <= allowed,
            "{}: {x:e}, by definition {want:e}: off by {error:.3e}, {allowed:.3e} is allowed",
            place()
        );
        let excess = error - rounding::<T>(want);
        if excess > 0.0 && bound > 0.0 {
            ratio.see(excess / bound * ERROR_CONSTANT, place());
        }
    }
    ratio
}

/// The root mean square of the errors over that of the reference.
pub fn rms_error<T: Element>(got: &Array4<T>, reference: &Array4<f64>) -> f64 {
    let error: f64 = got.iter().zip(reference).map(|(x, want)| (x.to_f64() - want).powi(2)).sum();
    (error / reference.iter().map(|want| want * want).sum::<f64>()).sqrt()
}
