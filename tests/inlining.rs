//! Every kernel body must be inlined into the one function that has the
//! target features: what is left out runs 10 to 80 times slower. The floors
//! are far below what a quiet machine does and far above that.

mod shared;

use std::time::Instant;

use attention_kernels::dense::Dense;
use attention_kernels::mask::{Causal, Unmasked};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Workspace, limits};
use half::{bf16, f16};
use ndarray::Array4;

use shared::{AnyScore, Case, isas, scored, shape};

/// Attempts, for a machine that does other things too.
const ATTEMPTS: usize = 12;

/// A floor for kernels as they are used, and one for builds with debug
/// assertions: those check the arithmetic of pointers in the innermost loops.
fn floor(release: f64, checked: f64) -> f64 {
    if cfg!(debug_assertions) { checked } else { release }
}

/// Whether something holds within a few attempts; what it measured last.
fn eventually(mut attempt: impl FnMut() -> (bool, String)) {
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        let (holds, measured) = attempt();
        if holds {
            return;
        }
        last = measured;
    }
    panic!("{last}");
}

/// The instruction sets whose vectors must not be emulated.
fn vector_isas() -> impl Iterator<Item = Isa> {
    isas().into_iter().filter(|&isa| isa != Isa::Scalar)
}

#[test]
fn register_tile() {
    for isa in vector_isas() {
        eventually(|| {
            let (tile, fma) = (limits::tile_gflops(isa, 1), limits::fma_gflops(isa, 1));
            (tile >= floor(0.5, 0.1) * fma, format!("{isa}: tile {tile:.1} GFLOP/s of {fma:.1}"))
        });
    }
}

/// Useful GFLOP/s of a call on this thread alone, best of a few.
fn gflops<A, T>(mechanism: &A, case: &Case<T>) -> f64
where
    T: attention_kernels::Element,
    A: for<'a> Attention<attention_kernels::Qkv<'a, T>>,
{
    let mut out = Array4::from_elem(mechanism.forward(case.x()).unwrap().dim(), T::default());
    let mut workspace = Workspace::new();
    let flops = mechanism.cost(case.x()).unwrap().flops as f64;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        mechanism.forward_into(case.x(), out.view_mut(), &mut workspace).unwrap();
        best = best.min(start.elapsed().as_nanos() as f64);
    }
    flops / best
}

/// On one thread, with or without rayon.
fn alone<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "rayon")]
    return rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(work);
    #[cfg(not(feature = "rayon"))]
    work()
}

#[test]
fn prefill() {
    let case = Case::new(shape([1, 1, 1, 512, 512, 64, 64]), 1);
    for isa in vector_isas() {
        let share = |what: &str, share: f64, run: &(dyn Fn() -> f64 + Sync)| {
            eventually(|| {
                let (rate, fma) = alone(|| (run(), limits::fma_gflops(isa, 1)));
                (
                    rate >= floor(share, 0.4 * share) * fma,
                    format!("{isa}, {what}: {rate:.1} GFLOP/s of {fma:.1}"),
                )
            });
        };
        let dense = Dense::builder().isa(isa).build().unwrap();
        share("dense", 0.2, &|| gflops(&dense, &case));
        let causal = Dense::builder().isa(isa).causal().build().unwrap();
        share("causal", 0.15, &|| gflops(&causal, &case));
        let half = case.map(f16::from_f32);
        share("f16", 0.15, &|| gflops(&dense, &half));
        let half = case.map(bf16::from_f32);
        share("bf16", 0.15, &|| gflops(&dense, &half));
        // A score of the caller's own, inlined into the kernel.
        let score = AnyScore::HandmadeAlibi(vec![0.01]);
        let handmade = scored(isa, Causal::new(), score).build().unwrap();
        share("closure", 0.06, &|| gflops(&handmade, &case));
        let softcap = AnyScore::Softcap(attention_kernels::score::Softcap::new(20.0).unwrap());
        let softcap = scored(isa, Unmasked, softcap).build().unwrap();
        share("softcap", 0.06, &|| gflops(&softcap, &case));
    }
}

/// One query against keys and values that stay in the second-level cache.
#[test]
fn decode() {
    let case = Case::new(shape([1, 4, 1, 1, 512, 64, 64]), 1);
    let (f16s, bf16s) = (case.map(f16::from_f32), case.map(bf16::from_f32));
    for isa in vector_isas() {
        let dense = Dense::builder().isa(isa).causal().build().unwrap();
        let share = |what: &str, run: &(dyn Fn() -> f64 + Sync)| {
            eventually(|| {
                let (rate, fma) = alone(|| (run(), limits::fma_gflops(isa, 1)));
                (rate >= floor(0.05, 0.02) * fma, format!("{isa}, {what}: {rate:.1} GFLOP/s of {fma:.1}"))
            });
        };
        share("f32", &|| gflops(&dense, &case));
        share("f16", &|| gflops(&dense, &f16s));
        share("bf16", &|| gflops(&dense, &bf16s));
    }
}
