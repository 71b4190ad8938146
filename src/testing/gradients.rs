//! For gradients of pipelines: kernels against definitions, and definitions against
//! differences.

use ndarray::{Array4, ArrayViewD};

use crate::attention::{Backward, Input};
use crate::engine::parallel::on_threads;
use crate::engine::workspace::Workspace;

/// The arrays of gradients, by name.
pub(crate) trait Arrays<A> {
    fn arrays(&self) -> Vec<(&'static str, ArrayViewD<'_, A>)>;
}

/// Holds a kernel to its definition, on one thread and on others, which give the same
/// bits, in the scratch that it says. The largest error is a share of the root mean
/// square of its array, or of a tenth where gradients cancel.
pub(crate) fn held<X, M>(what: &str, mechanism: &M, x: X, d_out: &Array4<f32>)
where
    X: Input + Send + Sync,
    M: for<'a> Backward<X, Carried<'a> = ()>,
    M::Gradients<f32>: Arrays<f32> + PartialEq + std::fmt::Debug + Send,
    M::Gradients<f64>: Arrays<f64>,
{
    let want = mechanism.reference_backward(x, d_out.view(), ()).unwrap();
    let run = |threads| {
        on_threads(threads, || {
            let mut workspace = Workspace::with_capacity(mechanism.backward_workspace_bytes(x).unwrap());
            let capacity = workspace.capacity();
            let mut to = mechanism.zero_gradients(x).unwrap();
            // What was there does not matter.
            for _ in 0..2 {
                mechanism.backward_into(x, d_out.view(), (), &mut to, &mut workspace).unwrap();
            }
            assert_eq!(workspace.capacity(), capacity, "{what}: more scratch than was said");
            to
        })
    };
    let got = run(1);
    assert!(got == run(2), "{what}: threads matter");
    assert!(got == run(3), "{what}: threads matter");
    let (got, want) = (got.arrays(), want.arrays());
    assert_eq!(got.len(), want.len(), "{what}");
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        assert_eq!(got.shape(), want.shape(), "{what}: {name}");
        let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt();
        // Embeddings and biases have sums over many pairs, which cancel.
        let least = if ["q", "k", "v"].contains(name) { 0.1 } else { 1.0 };
        for (got, want) in got.iter().zip(want) {
            let off = (f64::from(*got) - want).abs() / size.max(least);
            assert!(off < 2e-5, "{what}: {got} for {want} of {name}, off by {off:e}");
        }
    }
}

/// Holds a gradient to differences: `moved` gives element `i` moved by about so much, as
/// it is rounded, and the loss.
pub(crate) fn differences(
    name: &str,
    want: ArrayViewD<'_, f64>,
    mut moved: impl FnMut(usize, f32) -> [f64; 2],
) {
    let step = 1.0 / 1024.0;
    for (i, want) in want.iter().enumerate() {
        let ([more, gained], [less, lost]) = (moved(i, step), moved(i, -step));
        let got = (gained - lost) / (more - less);
        assert!((got - want).abs() < 1e-4, "{name}, element {i}: {got}, not {want}");
    }
}
