//! What this machine can do at most, measured: the limits that kernels are
//! judged against.
//!
//! Rates, each taken by as many threads as asked for at once:
//! [`fma_gflops`] with operands in registers alone, [`tile_gflops`] for the
//! register tile over operands that stay in the first-level cache (what a
//! matrix product can reach on a machine whose load ports are shared with a
//! neighbour), [`code_gops`] for that of 8-bit codes, [`read_gbs`] for memory that is in no cache, and [`update_gbs`]
//! for memory that is read and written.

use std::time::Instant;

use crate::engine::parallel;
use crate::simd::dots::{BESIDE, PANEL, Rectified, Vnni, words};
use crate::simd::mem::{Buffer, CONCURRENT_STREAMS, Rows};
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Isa, Kernel, Simd};

/// Multiply-adds over registers: GFLOP/s of all threads together.
pub fn fma_gflops(isa: Isa, threads: usize) -> f64 {
    struct Chains(usize);
    impl Kernel for Chains {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            let (x, y) = (s.splat(0.999), s.splat(1e-4));
            let mut acc = [s.splat(1.0); 12];
            for _ in 0..self.0 {
                for a in &mut acc {
                    *a = s.mul_add(*a, x, y);
                }
            }
            acc.iter().map(|&a| s.reduce_add(a)).sum()
        }
    }
    let rounds = 400_000 / isa.lanes();
    let flops = 2.0 * (12 * isa.lanes() * rounds) as f64;
    rate(threads, 8, |_| std::hint::black_box(isa.dispatch(Chains(std::hint::black_box(rounds))))) * flops
}

/// The register tile over operands in the first-level cache: GFLOP/s of all
/// threads together.
pub fn tile_gflops(isa: Isa, threads: usize) -> f64 {
    const K: usize = 64;
    const REPEATS: usize = 24;
    let panel = isa.panel();
    let mut operands: Vec<_> = (0..threads.max(1))
        .map(|_| (vec![0.5f32; TILE_ROWS * K], Buffer::default(), vec![0f32; TILE_ROWS * panel]))
        .collect();
    for (_, b, _) in &mut operands {
        b.grow(K * panel * size_of::<f32>());
    }
    let flops = (REPEATS * 2 * TILE_ROWS * K * panel) as f64;
    let operands: Vec<_> = operands.into_iter().map(std::sync::Mutex::new).collect();
    rate(threads, 40, |worker| {
        if let Ok(mut operands) = operands[worker].lock() {
            let (a, b, c) = &mut *operands;
            let b = b.arena().take::<f32>(K * panel);
            for _ in 0..REPEATS {
                isa.dispatch(Product {
                    a: Rows::of_slice(a, TILE_ROWS, K, K),
                    b: Rows::of_slice(b, K, panel, panel),
                    c,
                    ldc: panel,
                    update: Update::Set,
                });
            }
        }
    }) * flops
}

/// Products of 8-bit codes over operands in the first-level cache, each multiply and add
/// counted: Gop/s of all threads together. None where no instruction multiplies them.
pub fn code_gops(threads: usize) -> Option<f64> {
    const ROWS: usize = 2 * TILE_ROWS;
    const COLUMNS: usize = 128;
    const REPEATS: usize = 24;
    let (vnni, words) = (Vnni::detect()?, words(COLUMNS));
    let ops = (REPEATS * 2 * ROWS * COLUMNS * PANEL) as f64;
    let made = || (vec![0f32; ROWS * (words + BESIDE)], Buffer::default(), vec![0f32; PANEL]);
    let operands: Vec<_> = (0..threads.max(1)).map(|_| std::sync::Mutex::new(made())).collect();
    let repeat = |worker: usize| {
        if let Ok(mut operands) = operands[worker].lock() {
            let (a, b, out) = &mut *operands;
            b.grow(words * PANEL * size_of::<f32>());
            let b = &*b.arena().take::<f32>(words * PANEL);
            let a = Rows::of_slice(a, ROWS, words + BESIDE, words + BESIDE);
            for _ in 0..REPEATS {
                vnni.rectify(Rectified { a, each: ROWS, b, scales: &[1.0; PANEL], out, apart: PANEL });
            }
        }
    };
    Some(rate(threads, 400, repeat) * ops)
}

/// Reading memory that is in no cache: GB/s of all threads together.
///
/// `buffer` should be several times the size of the last-level cache; each
/// thread reads a part of it in several concurrent streams: along one alone
/// memory answers more slowly.
pub fn read_gbs(isa: Isa, threads: usize, buffer: &[f32]) -> f64 {
    struct Sum<'a>(&'a [f32]);
    impl Kernel for Sum<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            let mut acc = [s.splat(0.0); CONCURRENT_STREAMS];
            let part = self.0.len() / CONCURRENT_STREAMS;
            for at in (0..part / S::LANES * S::LANES).step_by(S::LANES) {
                for (stream, acc) in acc.iter_mut().enumerate() {
                    *acc = s.add(*acc, s.load(&self.0[stream * part + at..]));
                }
            }
            acc.iter().map(|&a| s.reduce_add(a)).sum()
        }
    }
    let part = buffer.len() / threads.max(1);
    let bytes = (part * size_of::<f32>()) as f64;
    rate(threads, 1, |worker| std::hint::black_box(isa.dispatch(Sum(&buffer[worker * part..][..part]))))
        * bytes
}

/// Changing memory that is in no cache in place: GB/s read and written, of all
/// threads together. `buffer` as for [`read_gbs`].
pub fn update_gbs(isa: Isa, threads: usize, buffer: &mut [f32]) -> f64 {
    struct Scale<'a>(&'a mut [f32]);
    impl Kernel for Scale<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let part = self.0.len() / CONCURRENT_STREAMS;
            for at in (0..part / S::LANES * S::LANES).step_by(S::LANES) {
                for stream in 0..CONCURRENT_STREAMS {
                    let x = &mut self.0[stream * part + at..];
                    s.store(x, s.mul(s.load(x), s.splat(0.999)));
                }
            }
        }
    }
    let part = buffer.len() / threads.max(1);
    let bytes = (2 * part * size_of::<f32>()) as f64;
    let parts: Vec<_> = buffer.chunks_exact_mut(part.max(1)).map(std::sync::Mutex::new).collect();
    rate(threads, 1, |worker| {
        if let Some(Ok(mut part)) = parts.get(worker).map(|part| part.lock()) {
            isa.dispatch(Scale(&mut part));
        }
    }) * bytes
}

/// Runs `work` on every thread `repeats` times and returns how often a
/// nanosecond it ran, all threads together: best of three.
fn rate<R>(threads: usize, repeats: usize, work: impl Fn(usize) -> R + Sync + Send) -> f64 {
    let threads = threads.max(1);
    let mut best = 0f64;
    for _ in 0..3 {
        let start = Instant::now();
        parallel::each_worker(threads, |worker| {
            for _ in 0..repeats {
                work(worker);
            }
        });
        best = best.max((threads * repeats) as f64 / start.elapsed().as_nanos() as f64);
    }
    best
}
