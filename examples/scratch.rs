use attention_kernels::{
    Attention, Workspace, dense::Dense, element::Element, input::Qkv, limits, simd::Isa,
};
use ndarray::Array4;
use std::time::Instant;
fn rnd<T: Element>(dim: (usize, usize, usize, usize), seed: &mut u64) -> Array4<T> {
    Array4::from_shape_simple_fn(dim, || {
        let mut s = 0.0;
        for _ in 0..12 {
            *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            s += (*seed >> 40) as f32 / (1u64 << 24) as f32;
        }
        T::from_f32(s - 6.0)
    })
}
fn check<T: Element>(b: usize, h: usize, hk: usize, n: usize, m: usize, d: usize) {
    let mut seed = 7;
    let (q, k, v) = (
        rnd::<T>((b, h, n, d), &mut seed),
        rnd::<T>((b, hk, m, d), &mut seed),
        rnd::<T>((b, hk, m, d), &mut seed),
    );
    let x = Qkv::new(q.view(), k.view(), v.view());
    let a = Dense::builder().build().unwrap();
    let c = Dense::builder().causal().build().unwrap();
    for (name, o, r) in [
        ("full", a.forward(x).unwrap(), a.reference(x).unwrap()),
        ("causal", c.forward(x).unwrap(), c.reference(x).unwrap()),
    ] {
        let (mut e, mut f, mut mx) = (0.0, 0.0, 0f64);
        for (o, r) in o.iter().zip(&r) {
            e += (o.to_f64() - r).powi(2);
            f += r * r;
            mx = mx.max((o.to_f64() - r).abs());
        }
        println!("{name} {b},{h}/{hk},{n},{m},{d} {:?} rms {:.2e} max {mx:.2e}", T::DTYPE, (e / f).sqrt());
    }
}
fn main() {
    let isa = Isa::choose(None).unwrap();
    let arg: Vec<String> = std::env::args().skip(1).collect();
    if arg.first().map(|s| s == "check").unwrap_or(false) {
        check::<f32>(1, 2, 1, 1024, 1024, 128);
        check::<f32>(2, 4, 2, 1, 3000, 40);
        check::<f32>(2, 2, 2, 3, 3000, 72);
        check::<half::bf16>(2, 4, 1, 2, 300, 128);
        check::<half::f16>(2, 4, 1, 2, 300, 65);
        check::<f32>(2, 4, 2, 37, 301, 40);
        check::<f32>(1, 2, 2, 301, 77, 65);
        check::<half::bf16>(1, 2, 1, 300, 300, 128);
        check::<half::f16>(1, 2, 1, 300, 300, 128);
        return;
    }
    let threads: usize = arg.first().map(|s| s.parse().unwrap()).unwrap_or(2);
    let filter = arg.get(1).cloned().unwrap_or_default();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        bench::<f32>(
            isa,
            threads,
            &filter,
            "f32",
            &[
                ("prefill-4k-128", 1, 8, 8, 4096, 4096, 128, false),
                ("prefill-2k-64", 1, 8, 8, 2048, 2048, 64, false),
                ("causal-4k-128", 1, 8, 8, 4096, 4096, 128, true),
                ("causal-4k-64", 1, 8, 8, 4096, 4096, 64, true),
                ("gqa-2k-128", 1, 32, 8, 2048, 2048, 128, true),
                ("win-16k-128", 1, 8, 8, 16384, 16384, 128, true),
                ("vit-196", 8, 12, 12, 196, 196, 64, false),
                ("short-128", 8, 12, 12, 128, 128, 64, false),
                ("few-48-", 1, 8, 8, 48, 4096, 128, false),
                ("few-64-", 1, 8, 8, 64, 4096, 128, false),
                ("few-96-", 1, 8, 8, 96, 4096, 128, false),
                ("few-128-", 1, 8, 8, 128, 4096, 128, false),
                ("few-192-", 1, 8, 8, 192, 4096, 128, false),
                ("few-s16-", 8, 12, 12, 16, 16, 64, false),
                ("few-s24-", 8, 12, 12, 24, 24, 64, false),
                ("few-s32-", 8, 12, 12, 32, 32, 64, false),
                ("few-s48-", 8, 12, 12, 48, 48, 64, false),
                ("few-s64-", 8, 12, 12, 64, 64, 64, false),
                ("few-4-", 1, 8, 8, 4, 4096, 128, false),
                ("few-8-", 1, 8, 8, 8, 4096, 128, false),
                ("few-12-", 1, 8, 8, 12, 4096, 128, false),
                ("few-16-", 1, 8, 8, 16, 4096, 128, false),
                ("few-24-", 1, 8, 8, 24, 4096, 128, false),
                ("few-32-", 1, 8, 8, 32, 4096, 128, false),
                ("few-g8", 1, 32, 4, 8, 4096, 128, false),
                ("decode-gqa", 1, 32, 8, 1, 16384, 128, false),
                ("decode-mha", 8, 16, 16, 1, 4096, 64, false),
                ("decode-cached-gqa", 1, 4, 1, 1, 512, 128, false),
                ("decode-r1-128", 1, 8, 8, 1, 16384, 128, false),
                ("decode-r2-128", 1, 16, 8, 1, 16384, 128, false),
                ("decode-r4-64", 1, 32, 8, 1, 32768, 64, false),
                ("decode-cached-mha", 1, 1, 1, 1, 1024, 64, false),
            ],
        );
        bench::<half::bf16>(
            isa,
            threads,
            &filter,
            "bf16",
            &[
                ("causal-4k-128", 1, 8, 8, 4096, 4096, 128, true),
                ("decode-cached", 1, 4, 1, 1, 1024, 128, false),
                ("decode-gqa", 1, 32, 8, 1, 16384, 128, false),
            ],
        );
        bench::<half::f16>(
            isa,
            threads,
            &filter,
            "f16",
            &[
                ("causal-4k-128", 1, 8, 8, 4096, 4096, 128, true),
                ("decode-cached", 1, 4, 1, 1, 1024, 128, false),
                ("decode-gqa", 1, 32, 8, 1, 16384, 128, false),
            ],
        );
    });
}
fn bench<T: Element>(
    isa: Isa,
    threads: usize,
    filter: &str,
    dt: &str,
    shapes: &[(&str, usize, usize, usize, usize, usize, usize, bool)],
) {
    let buf = vec![1f32; 1 << 27];
    for &(name, b, h, hk, n, m, d, causal) in shapes {
        let name = format!("{name}-{dt}");
        if !name.contains(filter) {
            continue;
        }
        let mut seed = 1;
        let (q, k, v) = (
            rnd::<T>((b, h, n, d), &mut seed),
            rnd::<T>((b, hk, m, d), &mut seed),
            rnd::<T>((b, hk, m, d), &mut seed),
        );
        let (k2, v2) = (k.clone(), v.clone());
        let x = Qkv::new(q.view(), k.view(), v.view());
        let x2 = Qkv::new(q.view(), k2.view(), v2.view());
        let mut out = Array4::from_elem((b, h, n, d), T::default());
        let mut ws = Workspace::new();
        let full = Dense::builder().build().unwrap();
        let caus = Dense::builder().causal().build().unwrap();
        let pairs = if causal { n * (n + 1) / 2 } else { n * m };
        let dec = n == 1;
        let work =
            if dec { (2 * b * hk * m * d * size_of::<T>()) as f64 } else { (4 * b * h * pairs * d) as f64 };
        let mut i = 0;
        let mut go = || {
            i += 1;
            let x = if i % 2 == 0 { x } else { x2 };
            if causal {
                caus.forward_into(x, out.view_mut(), &mut ws).unwrap()
            } else {
                full.forward_into(x, out.view_mut(), &mut ws).unwrap()
            }
        };
        go();
        let (mut ts, mut tiles) = (vec![], vec![]);
        let t0 = Instant::now();
        while t0.elapsed().as_secs_f64() < 2.0 || ts.len() < 5 {
            tiles.push(if std::env::var("NOLIM").is_ok() {
                100.0
            } else if dec {
                limits::read_gbs(isa, threads, &buf)
            } else {
                limits::tile_gflops(isa, threads)
            });
            for _ in 0..if dec { if std::env::var("NOLIM").is_ok() { 200 } else { 5 } } else { 1 } {
                let t = Instant::now();
                go();
                ts.push(work / t.elapsed().as_nanos() as f64);
            }
        }
        ts.sort_by(f64::total_cmp);
        tiles.sort_by(f64::total_cmp);
        let (a, b) = (ts[ts.len() / 2], tiles[tiles.len() / 2]);
        println!(
            "{name} t{threads}: {a:.1} G/s limit {b:.1} = {:.1}%  (best {:.1}, n {})",
            100.0 * a / b,
            ts[ts.len() - 1],
            ts.len()
        );
    }
}
