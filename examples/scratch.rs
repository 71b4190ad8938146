use attention_kernels::{limits, simd::Isa};
fn main() {
    let isa = Isa::choose(None).unwrap();
    let buf = vec![1f32; 1 << 27];
    for t in [1, 2] {
        println!(
            "{isa} {t} fma {:.1} tile {:.1} read {:.1}",
            limits::fma_gflops(isa, t),
            limits::tile_gflops(isa, t),
            limits::read_gbs(isa, t, &buf)
        );
    }
}
