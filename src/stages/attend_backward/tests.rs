//! Gradients of dense attention against their definition, and the definition
//! against differences.

use half::{bf16, f16};
use ndarray::{Array2, Array3, Array4, s};

use crate::attention::{Attention, Backward, Input, Mergeable, ScoreGradients};
use crate::dense::{Dense, Gated, SavedForward, Sigmoid, SoftmaxGradients, WithGate};
use crate::element::Element;
use crate::engine::parallel::on_threads;
use crate::engine::workspace::Workspace;
use crate::input::Qkv;
use crate::keys::{Layout, Per};
use crate::mask::{Causal, Mask, Window, mask_fn};
use crate::math::random::Normal;
use crate::neighborhood::{Clear, Fit, Neighborhood, Padding, Swin};
use crate::score::{Alibi, Bias, Forget, RelativeTable, Score, Softcap};
use crate::simd::Isa;
use crate::sparse::{BlockSparse, LongLora, MoA, Radial, S2Attention, SlidingTile, block_map};

fn noise<T: Element>(dim: (usize, usize, usize, usize), seed: u64) -> Array4<T> {
    let mut normal = Normal::new(seed);
    Array4::from_shape_simple_fn(dim, || T::from_f32(normal.next().unwrap_or_default() as f32))
}

struct Case<T> {
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    d_out: Array4<f32>,
}

/// Batch, query heads, key/value heads, queries, keys, head_dim, value_dim.
type Sizes = [usize; 7];

impl<T: Element> Case<T> {
    fn new([b, h, g, n, m, d, dv]: Sizes) -> Self {
        let (q, k) = (noise((b, h, n, d), 1), noise((b, g, m, d), 2));
        Self { q, k, v: noise((b, g, m, dv), 3), d_out: noise((b, h, n, dv), 4) }
    }

    fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

/// The largest error in units of the root mean square of its array, or of a
/// tenth of what its operands are like where gradients cancel (of one key, whose
/// weight is 1 whatever its score).
fn worst(got: &SoftmaxGradients, want: &SoftmaxGradients<f64>) -> f64 {
    let mut worst = 0f64;
    for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
        assert_eq!(got.dim(), want.dim());
        let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt();
        for (got, want) in got.iter().zip(want) {
            let off = (f64::from(*got) - want).abs();
            assert!(off.is_finite(), "{got} for {want}");
            worst = worst.max(off / size.max(0.1));
        }
    }
    assert_eq!(got.table.is_some(), want.table.is_some());
    if let (Some(got), Some(want)) = (&got.table, &want.table) {
        // Each is a sum over many pairs, which cancel.
        let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt();
        for (got, want) in got.iter().zip(want) {
            worst = worst.max((f64::from(*got) - want).abs() / size.max(1.0));
        }
    }
    assert_eq!(got.log_gates.as_ref().map(|x| x.dim()), want.log_gates.as_ref().map(|x| x.dim()));
    if let (Some(got), Some(want)) = (&got.log_gates, &want.log_gates) {
        let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt();
        for (got, want) in got.iter().zip(want) {
            let off = (f64::from(*got) - want).abs();
            assert!(off.is_finite(), "{got} for {want}, of a gate");
            worst = worst.max(off / size.max(1.0));
        }
    }
    assert_eq!(got.gate.as_ref().map(|x| x.dim()), want.gate.as_ref().map(|x| x.dim()));
    for (got, want) in got.gate.iter().flatten().zip(want.gate.iter().flatten()) {
        worst = worst.max((f64::from(*got) - want).abs() / want.abs().max(1.0));
    }
    if let (Some(got), Some(want)) = (&got.sinks, &want.sinks) {
        for (got, want) in got.iter().zip(want) {
            worst = worst.max((f64::from(*got) - want).abs() / want.abs().max(1.0));
        }
    }
    worst
}

/// The length of the longest row.
fn longest<T: Element>(x: &Array4<T>) -> f64 {
    let length = |row: ndarray::ArrayView1<'_, T>| row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt();
    x.rows().into_iter().map(length).fold(0.0, f64::max)
}

/// Kernel and definition of one mechanism on one case, on one and two threads.
fn held<X, M, T: Element>(what: &str, mechanism: &M, x: X, case: &Case<T>)
where
    X: Input + Send + Sync,
    M: for<'a> Backward<
            X,
            Gradients<f32> = SoftmaxGradients,
            Gradients<f64> = SoftmaxGradients<f64>,
            Carried<'a> = SavedForward<'a>,
        > + ScoreGradients<X>,
{
    let d_out = &case.d_out;
    let scores = || mechanism.score_gradients(x, d_out.view()).unwrap();
    let (one, two) = (on_threads(1, scores), on_threads(2, scores));
    assert_eq!(one, two, "{what}: threads matter for scores");
    let want = mechanism.reference_score_gradients(x, d_out.view()).unwrap();
    // Products of the output's gradient with values cancel: 16 roundings of the largest.
    let size = longest(d_out) * longest(&case.v);
    for (got, want) in one.iter().zip(&want) {
        let off = (f64::from(*got) - want).abs();
        assert!(off < 1e-6 * size, "{what}: {got} for {want}, a gradient of a score");
    }
    gradients_held(what, mechanism, x, d_out);
}

/// Of what does not show its weights.
fn gradients_held<X, M>(what: &str, mechanism: &M, x: X, d_out: &Array4<f32>)
where
    X: Input + Send + Sync,
    M: for<'a> Backward<
            X,
            Gradients<f32> = SoftmaxGradients,
            Gradients<f64> = SoftmaxGradients<f64>,
            Carried<'a> = SavedForward<'a>,
        >,
{
    let want = mechanism.reference_backward(x, d_out.view(), SavedForward::default()).unwrap();
    let run = |threads| {
        on_threads(threads, || mechanism.backward(x, d_out.view(), SavedForward::default()).unwrap())
    };
    let got = run(1);
    assert_eq!(got, run(2), "{what}: threads matter");
    let off = worst(&got, &want);
    assert!(off < 2e-5, "{what}: {off:e}");
}

const SIZES: [Sizes; 8] = [
    [1, 1, 1, 5, 7, 16, 16],
    [2, 4, 2, 61, 77, 24, 40],
    [1, 3, 1, 200, 300, 64, 64],
    [1, 2, 2, 1, 513, 8, 5],
    [1, 1, 1, 257, 1, 3, 3],
    [1, 2, 1, 0, 9, 4, 4],
    [1, 2, 1, 9, 0, 4, 4],
    [3, 1, 1, 33, 33, 1, 70],
];

#[test]
fn kernels_keep_to_the_definition() {
    for isa in Isa::available() {
        for sizes in SIZES {
            let case = Case::<f32>::new(sizes);
            let (x, heads) = (case.qkv(), sizes[1]);
            let what = format!("{isa} {sizes:?}");
            held(&what, &Dense::builder().isa(isa).build().unwrap(), x, &case);
            held(&what, &Dense::builder().isa(isa).causal().build().unwrap(), x, &case);
            let window = Window::new(Some(20), Some(3)).and(Causal::at(4));
            let sinks: Vec<f32> = (0..heads).map(|h| h as f32 - 1.0).collect();
            let dense = Dense::builder().isa(isa).mask(window).sinks(sinks).scale(0.7).build().unwrap();
            held(&what, &dense, x, &case);
            let bias = noise::<f32>((1, 1, sizes[3], sizes[4]), 9);
            let score = Softcap::new(1.5).unwrap().then(Alibi::new(heads)).then(Bias::new(bias.view()));
            held(&what, &Dense::builder().isa(isa).score(score).build().unwrap(), x, &case);
            held(&what, &Sigmoid::builder().isa(isa).causal().build().unwrap(), x, &case);
        }
    }
}

fn table(heads: usize, columns: usize) -> Array2<f32> {
    noise::<f32>((1, 1, heads, columns), 8).into_shape_with_order((heads, columns)).unwrap()
}

#[test]
fn tables_and_grids() {
    for isa in Isa::available() {
        // Few heads, so that two threads cut them, and many.
        for (batch, heads) in [(1, 1), (2, 4)] {
            let case = Case::<f32>::new([batch, heads, heads.div_ceil(2), 210, 210, 24, 40]);
            let x = case.qkv();
            for of in [1, heads] {
                let score = RelativeTable::new(table(of, 41)).unwrap().then(Softcap::new(3.0).unwrap());
                let dense = Dense::builder().isa(isa).causal().score(score).build().unwrap();
                held(&format!("{isa}: a table of {of} of {heads} heads"), &dense, x, &case);
                let bias = table(of, 5 * 9).into_shape_with_order((of, 5, 9)).unwrap().into_dyn();
                let image = Neighborhood::builder(&[14, 15], &[3, 5]).dilation(&[4, 1]).bias(bias);
                held(
                    &format!("{isa}: a bias of {of} of {heads} heads"),
                    &image.isa(isa).build().unwrap(),
                    x,
                    &case,
                );
            }
            let line = Neighborhood::builder(&[210], &[31]).causal(&[true]).isa(isa);
            held(&format!("{isa}: a line"), &line.build().unwrap(), x, &case);
            let volume = Neighborhood::builder(&[5, 6, 7], &[3, 4, 3]).stride(&[1, 2, 1]).isa(isa);
            held(&format!("{isa}: a volume"), &volume.build().unwrap(), x, &case);
        }
        let none = Case::<f32>::new([1, 1, 1, 0, 0, 4, 4]);
        let empty = Neighborhood::builder(&[0, 3], &[1, 1]).isa(isa).build().unwrap();
        held(&format!("{isa}: nothing"), &empty, none.qkv(), &none);
    }
}

/// Kernels of what looks at some keys, and what differences of the definition give.
#[test]
fn windows_lists_and_patterns() {
    fn each<M>(what: &str, mechanism: &M, sizes: Sizes)
    where
        M: for<'a, 'x> Backward<
                Qkv<'x, f32>,
                Gradients<f32> = SoftmaxGradients,
                Gradients<f64> = SoftmaxGradients<f64>,
                Carried<'a> = SavedForward<'a>,
            > + for<'x> ScoreGradients<Qkv<'x, f32>>,
    {
        let case = Case::<f32>::new(sizes);
        held(what, mechanism, case.qkv(), &case);
        if sizes[3] > 12 {
            return;
        }
        let none = SavedForward::default();
        differences_agree(
            what,
            case,
            |case| mechanism.reference(case.qkv()).unwrap(),
            |case| mechanism.reference_backward(case.qkv(), case.d_out.view(), none).unwrap(),
        );
    }
    for isa in Isa::available() {
        for (heads, shape, window) in [(4, [14, 15], [7, 5]), (2, [3, 4], [2, 3])] {
            let len = shape[0] * shape[1];
            let sizes = [1, heads, heads / 2, len, len, 6, 5];
            let bias = table((2 * window[0] - 1) * (2 * window[1] - 1), heads);
            let swin = Swin::builder(shape, window).shift([1, 2]).padding(Padding::Hidden).isa(isa);
            each(&format!("{isa}: swin"), &swin.clone().build().unwrap(), sizes);
            each(&format!("{isa}: swin with a bias"), &swin.bias(bias).build().unwrap(), sizes);
            each(&format!("{isa}: FIT"), &Fit::builder(3).earlier().isa(isa).build().unwrap(), sizes);
        }
        for n in [300, 12] {
            let sizes = [1, 4, 2, n, n, 6, 5];
            let case = Case::<f32>::new(sizes);
            let dims = case.qkv().dims().unwrap();
            for (per, q_block, k_block) in [(Per::Head, 64, 64), (Per::Group, 3, 8), (Per::Sequence, 50, 128)]
            {
                let layout = Layout::new(per, q_block, &dims);
                let map = (1, layout.heads(), layout.blocks(), n.div_ceil(k_block));
                let map = Array4::from_shape_fn(map, |(_, h, i, j)| (3 * h + 5 * i + i * j + j) % 3 != 1);
                let plan = block_map(layout, k_block, map.view()).unwrap();
                let sparse = BlockSparse::builder(plan).causal().isa(isa).build().unwrap();
                each(&format!("{isa}: blocks {per:?} of {k_block} of {n}"), &sparse, sizes);
            }
            let radial = Radial::builder(n / 4, 4).block(2).sink().isa(isa).build().unwrap();
            each(&format!("{isa}: radial"), &radial, sizes);
            let strided = S2Attention::builder(4, 2).local(1).stride(3).isa(isa).build().unwrap();
            each(&format!("{isa}: S2"), &strided, sizes);
            let spans = MoA::builder(1 << 20, &[4.0, 16.0, 32.0, 100.0], &[0.0; 4]);
            each(&format!("{isa}: MoA"), &spans.sink(2).least(2).split(1).isa(isa).build().unwrap(), sizes);
            let lora = LongLora::builder(4, 6).sinks(2).isa(isa).build().unwrap();
            each(&format!("{isa}: LongLoRA"), &lora, sizes);
            let tiles = SlidingTile::builder([n / 6, 2, 2], [3, 1, 1]).tile([1, 1, 2]).text(n - n / 6 * 4);
            each(&format!("{isa}: sliding tiles"), &tiles.isa(isa).build().unwrap(), sizes);
            // A disc, which shows no weights.
            let case = Case::<f32>::new(sizes);
            let clear =
                Clear::builder([(n - 2) / 5, 5], 3).text(n - (n - 2) / 5 * 5).isa(isa).build().unwrap();
            gradients_held(&format!("{isa}: CLEAR"), &clear, case.qkv(), &case.d_out);
        }
    }
    let pooled = Clear::builder([2, 5], 3).text(2).pooled(Array2::ones((1, 1))).build().unwrap();
    let case = Case::<f32>::new([1, 1, 1, 12, 12, 4, 4]);
    let refusal = pooled.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap_err();
    assert!(refusal.to_string().starts_with("pooled"), "{refusal}");
}

/// The bias of windows as models store it, transposed.
#[test]
fn tables_of_windows_are_what_differences_give() {
    let case = Case::<f32>::new([1, 2, 1, 12, 12, 4, 3]);
    let (d_out, bias, step) = (case.d_out.mapv(f64::from), table(3 * 5, 2), 1.0 / 1024.0);
    let swin =
        |bias: &Array2<f32>| Swin::builder([4, 3], [2, 3]).shift([1, 1]).bias(bias.clone()).build().unwrap();
    let none = SavedForward::default();
    let want = swin(&bias).reference_backward(case.qkv(), case.d_out.view(), none).unwrap().table.unwrap();
    // Rolled by a column no two of a region are two columns apart: of five offsets three.
    assert_eq!(want.iter().filter(|x| x.abs() > 1e-3).count(), 2 * 3 * 3);
    for (at, _) in bias.indexed_iter() {
        let moved = |by: f32| {
            let mut bias = bias.clone();
            bias[at] += by;
            (swin(&bias).reference(case.qkv()).unwrap() * &d_out).sum()
        };
        let (got, want) = ((moved(step) - moved(-step)) / f64::from(2.0 * step), want[[at.1, at.0]]);
        assert!((got - want).abs() < 1e-4, "{at:?}: {got}, not {want}");
    }
}

/// Log gates of all tokens, of which some forget little, some much and some all.
fn log_gates(batch: usize, heads: usize, len: usize) -> Array3<f32> {
    let gates = noise::<f32>((1, batch, heads, len), 6).index_axis_move(ndarray::Axis(0), 0);
    let mut at = 0;
    gates.mapv(|x| {
        at += 1;
        if at % 97 == 11 { f32::NEG_INFINITY } else { -(-3.0 * x).exp().ln_1p() }
    })
}

#[test]
fn forget_gates() {
    for isa in Isa::available() {
        // Few heads, so that two threads cut them, and many; fewer queries than keys and more.
        for sizes in [[1, 1, 1, 210, 210, 24, 40], [2, 4, 2, 70, 300, 16, 16], [1, 3, 1, 90, 40, 8, 5]] {
            let case = Case::<f32>::new(sizes);
            let [batch, heads, _, n, kv_len, ..] = sizes;
            let gates = log_gates(batch, heads, kv_len);
            let (x, forget) = (case.qkv(), || Forget::new(gates.view()).unwrap());
            let what = format!("{isa} {sizes:?}, gates");
            held(&what, &Dense::builder().isa(isa).score(forget()).build().unwrap(), x, &case);
            held(
                &what,
                &Dense::builder().isa(isa).causal().score(forget().at(-7)).build().unwrap(),
                x,
                &case,
            );
            let sinks: Vec<f32> = (0..heads).map(|h| h as f32 - 1.0).collect();
            let window = Window::new(Some(50), None).at(3);
            let score = Softcap::new(3.0).unwrap().then(forget().at(3)).then(Softcap::new(40.0).unwrap());
            let dense = Dense::builder().isa(isa).mask(window).sinks(sinks).score(score).scale(0.7);
            held(&what, &dense.build().unwrap(), x, &case);
            let score = forget().then(RelativeTable::new(table(heads, 41)).unwrap());
            held(&what, &Sigmoid::builder().isa(isa).score(score).build().unwrap(), x, &case);
            let gate = noise::<f16>((batch, heads, n, 1), 5);
            let dense = Dense::builder().isa(isa).causal().score(forget()).build().unwrap();
            gradients_held(&what, &Gated(dense), WithGate { x, gate: gate.view() }, &case.d_out);
        }
    }
    let case = Case::<f32>::new([3, 2, 1, 10, 140, 16, 16]);
    let gates = log_gates(3, 2, 140);
    let dense = Dense::builder().score(Forget::new(gates.view()).unwrap()).build().unwrap();
    let padded = case.qkv().key_lengths(&[140, 0, 77]);
    held("padded, gates", &dense, padded, &case);
    let found = dense.backward(padded, case.d_out.view(), SavedForward::default()).unwrap();
    assert!(found.log_gates.unwrap().slice(s![1, .., ..]).iter().all(|&x| x == 0.0));
    fn halves<T: Element>(gates: &Array3<f32>) {
        let case = Case::<T>::new([3, 2, 1, 90, 140, 16, 16]);
        let dense = Dense::builder().score(Forget::new(gates.view()).unwrap()).build().unwrap();
        held(T::DTYPE.name(), &dense, case.qkv(), &case);
    }
    halves::<f16>(&gates);
    halves::<bf16>(&gates);
}

/// Of parts of the keys, given output and LSE of all, gates have gradients that add up,
/// and those of hidden tokens matter to none.
#[test]
fn forget_gates_of_parts_add_up() {
    let mut case = Case::<f32>::new([1, 2, 1, 40, 200, 16, 16]);
    let gates = log_gates(1, 2, 200);
    let forget = || Forget::new(gates.view()).unwrap();
    let dense = Dense::builder().score(forget()).build().unwrap();
    let (out, lse) = dense.forward_with_lse(case.qkv()).unwrap();
    let whole = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
    let mut sum = Array3::<f32>::zeros((1, 2, 200));
    for part in [0..77, 77..200] {
        let mask = mask_fn(move |_, _, key| part.contains(&key));
        let dense = Dense::builder().mask(mask).score(forget()).build().unwrap();
        sum += &dense.backward(case.qkv(), case.d_out.view(), saved).unwrap().log_gates.unwrap();
    }
    let whole = whole.log_gates.unwrap();
    assert!(sum.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 2e-5));
    // Queries 0 to 39 sit at tokens -10 to 29.
    let dense = Dense::builder().score(forget().at(-10)).build().unwrap();
    let clean = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    assert!(clean.log_gates.as_ref().unwrap().slice(s![.., .., 30..]).iter().all(|x| x.abs() < 1e-5));
    case.q.slice_mut(s![.., .., ..10, ..]).fill(f32::NAN);
    case.d_out.slice_mut(s![.., .., ..10, ..]).fill(f32::INFINITY);
    case.k.slice_mut(s![.., .., 30.., ..]).fill(f32::NAN);
    case.v.slice_mut(s![.., .., 30.., ..]).fill(f32::NAN);
    let got = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    assert_eq!((got.k, got.v, got.log_gates), (clean.k, clean.v, clean.log_gates));
    // What is visible shows, in the gates of the tokens that the query sees past: it sits
    // at token 15, and token 10 forgets all before it.
    case.d_out[[0, 0, 25, 3]] = f32::NAN;
    let got = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    let got = got.log_gates.unwrap();
    assert_eq!(gates[[0, 0, 10]], f32::NEG_INFINITY);
    let spoilt = |h, t: usize| got[[0, h, t]].is_nan();
    assert!((0..40).all(|t| spoilt(0, t) == (11..16).contains(&t) && !spoilt(1, t)));
}

#[test]
fn forget_gates_are_what_differences_give() {
    let case = Case::<f32>::new([2, 2, 1, 7, 9, 4, 3]);
    let (d_out, gates, step) = (case.d_out.mapv(f64::from), log_gates(2, 2, 9), 1.0 / 1024.0);
    assert!(gates.iter().any(|&x| x == f32::NEG_INFINITY));
    let dense = |gates: &Array3<f32>| {
        let score = Softcap::new(5.0).unwrap().then(Forget::new(gates.view()).unwrap());
        let score = score.then(Softcap::new(9.0).unwrap());
        Dense::builder().sinks([0.5, -1.0]).score(score).build().unwrap()
    };
    let none = SavedForward::default();
    let want = dense(&gates).reference_backward(case.qkv(), case.d_out.view(), none).unwrap();
    let want = want.log_gates.unwrap();
    for (at, &gate) in gates.indexed_iter() {
        let moved = |by: f32| {
            let mut gates = gates.clone();
            gates[at] = gate + by;
            (f64::from(gate + by), (dense(&gates).reference(case.qkv()).unwrap() * &d_out).sum())
        };
        // A gate may be at most 1.
        let base = if gate + step > 0.0 { -step } else { 0.0 };
        let ((more, gained), (less, lost)) = (moved(base + step), moved(base - step));
        // One that forgets all forgets all.
        let apart = if gate == f32::NEG_INFINITY { 1.0 } else { more - less };
        let got = (gained - lost) / apart;
        let off = (got - want[at]).abs();
        assert!(off < if base == 0.0 { 1e-4 } else { 5e-3 }, "{at:?}: {got}, not {}", want[at]);
    }
    assert!(want.iter().filter(|x| x.abs() > 1e-3).count() > 20);
    differences_agree(
        "gates",
        Case::<f32>::new([2, 2, 1, 7, 9, 4, 3]),
        |case| dense(&gates).reference(case.qkv()).unwrap(),
        |case| dense(&gates).reference_backward(case.qkv(), case.d_out.view(), none).unwrap(),
    );
}

/// Outputs that are multiplied by gates, one an element and one a head.
#[test]
fn gates() {
    for isa in Isa::available() {
        for sizes in SIZES {
            let case = Case::<f32>::new(sizes);
            let [b, h, _, n, .., dim] = sizes;
            for cols in [dim, 1] {
                let gate = noise::<f16>((b, h, n, cols), 5);
                let x = WithGate { x: case.qkv(), gate: gate.view() };
                let what = format!("{isa} {sizes:?}, {cols} a gate");
                let sinks: Vec<f32> = (0..h).map(|h| h as f32 - 1.0).collect();
                let dense = Dense::builder().isa(isa).causal().sinks(sinks).build().unwrap();
                gradients_held(&what, &Gated(dense), x, &case.d_out);
                gradients_held(&what, &Gated(Sigmoid::builder().isa(isa).build().unwrap()), x, &case.d_out);
            }
        }
    }
    let step = 1.0 / 1024.0;
    for cols in [3, 1] {
        let gate = noise::<f32>((1, 2, 5, cols), 5);
        let gated = Gated(Dense::builder().causal().sinks([0.3, -0.5]).build().unwrap());
        let none = SavedForward::default();
        let back = |case: &Case<f32>| {
            let x = WithGate { x: case.qkv(), gate: gate.view() };
            gated.reference_backward(x, case.d_out.view(), none).unwrap()
        };
        let out = |case: &Case<f32>, gate: &Array4<f32>| {
            gated.reference(WithGate { x: case.qkv(), gate: gate.view() }).unwrap()
        };
        let case = || Case::<f32>::new([1, 2, 1, 5, 6, 4, 3]);
        differences_agree("gated", case(), |case| out(case, &gate), back);
        let (case, d_out) = (case(), case().d_out.mapv(f64::from));
        let want = back(&case).gate.unwrap();
        for (at, &want) in want.indexed_iter() {
            let moved = |by: f32| {
                let mut gate = gate.clone();
                gate[at] += by;
                (out(&case, &gate) * &d_out).sum()
            };
            let got = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            assert!((got - want).abs() < 1e-4, "{at:?}: {got}, not {want}");
        }
    }
    // With the output and the LSE of a forward pass, and rows of no sequence.
    let mut case = Case::<f32>::new([1, 2, 1, 100, 140, 16, 16]);
    let gate = noise::<f32>((1, 2, 100, 16), 5);
    let dense = Dense::builder().causal().build().unwrap();
    let (out, lse) = dense.forward_with_lse(case.qkv()).unwrap();
    let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
    let gated = Gated(dense);
    let back = |saved| {
        let x = WithGate { x: case.qkv(), gate: gate.view() };
        gated.backward(x, case.d_out.view(), saved).unwrap()
    };
    let (got, want) = (back(saved), back(SavedForward::default()));
    let apart =
        |a: &Array4<f32>, b: &Array4<f32>| a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(apart(&got.q, &want.q) < 1e-5 && apart(&got.k, &want.k) < 1e-5);
    assert_eq!(got.gate, want.gate);
    case.d_out.slice_mut(s![.., .., 93.., ..]).fill(f32::NAN);
    let x = WithGate { x: case.qkv().packed(&[0, 30, 93], &[0, 50, 140]), gate: gate.view() };
    let found = gated.backward(x, case.d_out.view(), SavedForward::default()).unwrap();
    assert!(found.gate.unwrap().slice(s![.., .., 93.., ..]).iter().all(|&x| x == 0.0));
    assert!(found.k.iter().all(|x| x.is_finite()));
}

/// What a loss gains by a unit of one score.
#[test]
fn score_gradients_are_what_differences_give() {
    let case = Case::<f32>::new([1, 2, 1, 5, 6, 4, 3]);
    let (x, d_out, step) = (case.qkv(), case.d_out.mapv(f64::from), 1.0 / 1024.0);
    let pulls = [
        Dense::builder()
            .causal()
            .sinks([0.5, -1.0])
            .build()
            .unwrap()
            .reference_score_gradients(x, case.d_out.view()),
        Sigmoid::builder().causal().build().unwrap().reference_score_gradients(x, case.d_out.view()),
    ]
    .map(Result::unwrap);
    let loss = |at: (usize, usize, usize), by: f32| {
        let mut bias = Array4::zeros((1, 2, 5, 6));
        bias[[0, at.0, at.1, at.2]] = by;
        let bias = || Bias::new(bias.view());
        let dense = Dense::builder().causal().sinks([0.5, -1.0]).score(bias()).build().unwrap();
        let sigmoid = Sigmoid::builder().causal().score(bias()).build().unwrap();
        [dense.reference(x).unwrap(), sigmoid.reference(x).unwrap()].map(|out| (out * &d_out).sum())
    };
    let mut seen = 0;
    for at in (0..2).flat_map(|h| (0..5).flat_map(move |i| (0..6).map(move |j| (h, i, j)))) {
        let (more, less) = (loss(at, step), loss(at, -step));
        for (which, pull) in pulls.iter().enumerate() {
            let (got, want) =
                (pull[[0, at.0, at.1, at.2]], (more[which] - less[which]) / (2.0 * f64::from(step)));
            assert!((got - want).abs() < 1e-5, "{at:?}: {got} for {want}");
            seen += usize::from(want != 0.0);
        }
    }
    assert!(seen > 50, "most of what a causal mask leaves");
}

#[test]
fn tables_are_what_differences_give() {
    let case = Case::<f32>::new([2, 2, 1, 12, 12, 4, 3]);
    let d_out = case.d_out.mapv(f64::from);
    let dense = |table: &Array2<f32>| {
        let score = Softcap::new(9.0).unwrap().then(RelativeTable::new(table.clone()).unwrap());
        Dense::builder().causal().score(score.then(Softcap::new(2.0).unwrap())).build().unwrap()
    };
    let image = |table: &Array2<f32>| {
        let bias = table.clone().into_shape_with_order((table.dim().0, 3, 5)).unwrap().into_dyn();
        Neighborhood::builder(&[3, 4], &[2, 3]).bias(bias).build().unwrap()
    };
    let step = 1.0 / 1024.0;
    for heads in [1, 2] {
        let table = table(heads, 15);
        let none = SavedForward::default();
        let of_dense = dense(&table).reference_backward(case.qkv(), case.d_out.view(), none).unwrap();
        let of_image = image(&table).reference_backward(case.qkv(), case.d_out.view(), none).unwrap();
        for at in (0..heads).flat_map(|h| (0..15).map(move |e| [h, e])) {
            let moved = |by: f32| {
                let mut table = table.clone();
                table[at] += by;
                let outputs = [dense(&table).reference(case.qkv()), image(&table).reference(case.qkv())];
                outputs.map(|out| (&out.unwrap() * &d_out).sum())
            };
            let (more, less) = (moved(step), moved(-step));
            for (i, want) in [&of_dense, &of_image].into_iter().enumerate() {
                let got = (more[i] - less[i]) / f64::from(2.0 * step);
                let want = want.table.as_ref().unwrap()[at];
                assert!((got - want).abs() < 1e-4, "{i}, {at:?}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn storage_types() {
    fn each<T: Element>() {
        let case = Case::<T>::new([1, 4, 2, 70, 90, 32, 32]);
        held(T::DTYPE.name(), &Dense::builder().causal().build().unwrap(), case.qkv(), &case);
    }
    each::<f16>();
    each::<bf16>();
}

#[test]
fn packed_and_padded() {
    let case = Case::<f32>::new([1, 2, 1, 100, 140, 16, 16]);
    let causal = Dense::builder().causal().build().unwrap();
    held("packed", &causal, case.qkv().packed(&[0, 30, 30, 100], &[0, 50, 60, 140]), &case);
    // What lies after the last offset is never read.
    let mut case = case;
    for (array, end) in [(&mut case.q, 93), (&mut case.k, 131), (&mut case.v, 131), (&mut case.d_out, 93)] {
        array.slice_mut(s![.., .., end.., ..]).fill(f32::NAN);
    }
    let sunk = Dense::builder().causal().sinks([0.3, -0.5]).build().unwrap();
    held("rows of no sequence", &sunk, case.qkv().packed(&[0, 30, 30, 93], &[0, 50, 60, 131]), &case);
    let case = Case::<f32>::new([3, 2, 1, 10, 140, 16, 16]);
    held("padded", &causal, case.qkv().key_lengths(&[140, 0, 77]), &case);
}

/// The gradients of `sum d_out * out` for queries, keys and values are what differences
/// of the definition give.
fn differences_agree(
    what: &str,
    mut case: Case<f32>,
    out: impl Fn(&Case<f32>) -> Array4<f64>,
    back: impl Fn(&Case<f32>) -> SoftmaxGradients<f64>,
) {
    let d_out = case.d_out.mapv(f64::from);
    let loss = |case: &Case<f32>| (out(case) * &d_out).sum();
    let (want, step) = (back(&case), 1.0 / 1024.0);
    let arrays = |case: &mut Case<f32>, which: usize, at, x: f32| {
        let array = [&mut case.q, &mut case.k, &mut case.v];
        std::mem::replace(&mut array.into_iter().nth(which).unwrap()[at], x)
    };
    for which in 0..3 {
        let of = [&want.q, &want.k, &want.v][which];
        for (at, &want) in of.indexed_iter() {
            let before = arrays(&mut case, which, at, 0.0);
            arrays(&mut case, which, at, before + step);
            let more = loss(&case);
            arrays(&mut case, which, at, before - step);
            let less = loss(&case);
            arrays(&mut case, which, at, before);
            let got = (more - less) / f64::from(2.0 * step);
            assert!((got - want).abs() < 1e-4, "{what}, {which} {at:?}: {got}, not {want}");
        }
    }
}

#[test]
fn the_definition_is_what_differences_give() {
    let case = || Case::<f32>::new([1, 2, 1, 5, 6, 4, 3]);
    let score = Softcap::new(2.0).unwrap().then(Alibi::new(2));
    let dense = Dense::builder().causal().score(score).sinks([0.3, -0.5]).build().unwrap();
    differences_agree(
        "dense",
        case(),
        |case| dense.reference(case.qkv()).unwrap(),
        |case| dense.reference_backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap(),
    );
    let (case, step) = (case(), 1.0 / 1024.0);
    let d_out = case.d_out.mapv(f64::from);
    let want = dense.reference_backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    for head in 0..2 {
        let moved = |by: f32| {
            let mut sinks = [0.3, -0.5];
            sinks[head] += by;
            let score = Softcap::new(2.0).unwrap().then(Alibi::new(2));
            let dense = Dense::builder().causal().score(score).sinks(sinks).build().unwrap();
            (&dense.reference(case.qkv()).unwrap() * &d_out).sum()
        };
        let got = (moved(step) - moved(-step)) / f64::from(2.0 * step);
        let want = want.sinks.as_ref().unwrap()[head];
        assert!((got - want).abs() < 1e-4, "sink {head}: {got}, not {want}");
    }
}

/// Parts of the keys, given the output and the LSE of all, add up.
#[test]
fn parts_of_the_keys_add_up() {
    let case = Case::<f32>::new([1, 2, 1, 40, 600, 16, 16]);
    let dense = Dense::builder().build().unwrap();
    let (out, lse) = dense.forward_with_lse(case.qkv()).unwrap();
    let whole = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
    let mut dq = Array4::<f32>::zeros(case.q.dim());
    for at in [0..250, 250..251, 251..600] {
        let (k, v) = (case.k.slice(s![.., .., at.clone(), ..]), case.v.slice(s![.., .., at.clone(), ..]));
        let part = dense.backward(Qkv::new(case.q.view(), k, v), case.d_out.view(), saved).unwrap();
        dq += &part.q;
        for (got, want) in [(&part.k, &whole.k), (&part.v, &whole.v)] {
            let want = want.slice(s![.., .., at.clone(), ..]);
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-5));
        }
    }
    assert!(dq.iter().zip(&whole.q).all(|(a, b)| (a - b).abs() < 2e-5));
}

#[test]
fn what_is_masked_cannot_matter() {
    for isa in Isa::available() {
        let mut case = Case::<f32>::new([1, 2, 1, 90, 300, 16, 16]);
        let window = Window::new(Some(30), Some(0));
        let dense = Dense::builder().isa(isa).mask(window).build().unwrap();
        let clean = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
        // Query 0 sits at key 210 and sees none before 180.
        case.k.slice_mut(s![.., .., ..170, ..]).fill(f32::NAN);
        case.v.slice_mut(s![.., .., ..170, ..]).fill(f32::INFINITY);
        let got = dense.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
        assert_eq!(got, clean, "{isa}");
        // A row that sees nothing: neither its query nor its gradient matters.
        let none = Dense::builder().isa(isa).mask(Causal::at(-5)).build().unwrap();
        let mut case = Case::<f32>::new([1, 1, 1, 20, 20, 16, 16]);
        let clean = none.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
        case.q.slice_mut(s![.., .., ..5, ..]).fill(f32::NAN);
        case.d_out.slice_mut(s![.., .., ..5, ..]).fill(f32::NAN);
        let got = none.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
        assert_eq!((got.k, got.v), (clean.k, clean.v), "{isa}");
    }
}

#[test]
fn what_is_visible_shows() {
    let mut case = Case::<f32>::new([1, 1, 1, 20, 20, 8, 8]);
    let causal = Dense::builder().causal().build().unwrap();
    case.d_out[[0, 0, 10, 3]] = f32::NAN;
    let got = causal.backward(case.qkv(), case.d_out.view(), SavedForward::default()).unwrap();
    for key in 0..20 {
        assert_eq!(got.v.slice(s![0, 0, key, 3]).iter().any(|x| x.is_nan()), key <= 10, "value {key}");
        assert_eq!(got.k.slice(s![0, 0, key, ..]).iter().all(|x| x.is_nan()), key <= 10, "key {key}");
        assert_eq!(got.q.slice(s![0, 0, key, ..]).iter().any(|x| x.is_nan()), key == 10, "query {key}");
    }
}

#[test]
fn scratch_is_counted_and_contents_do_not_matter() {
    let case = Case::<f32>::new([2, 4, 2, 150, 270, 24, 40]);
    let dense = Dense::builder().causal().build().unwrap();
    let mut got = dense.zero_gradients(case.qkv()).unwrap();
    let bytes = dense.backward_workspace_bytes(case.qkv()).unwrap();
    let mut workspace = Workspace::with_capacity(bytes);
    let capacity = workspace.capacity();
    let mut before = None;
    for _ in 0..2 {
        got.q.fill(f32::NAN);
        got.k.fill(f32::NAN);
        got.v.fill(f32::NAN);
        let saved = SavedForward::default();
        dense.backward_into(case.qkv(), case.d_out.view(), saved, &mut got, &mut workspace).unwrap();
        assert_eq!(workspace.capacity(), capacity);
        assert!(before.as_ref().is_none_or(|before| *before == got));
        before = Some(got.clone());
    }
}

#[test]
fn refusals() {
    let case = Case::<f32>::new([1, 2, 1, 5, 6, 8, 8]);
    let dense = Dense::builder().build().unwrap();
    let says = |result: crate::Result<SoftmaxGradients>| result.unwrap_err().to_string();
    let short = Array4::<f32>::zeros((1, 2, 4, 8));
    let error = says(dense.backward(case.qkv(), short.view(), SavedForward::default()));
    assert_eq!(error, "d_out: expected shape [1, 2, 5, 8], got [1, 2, 4, 8]");
    let lse = Array3::<f32>::zeros((1, 2, 4));
    let saved = SavedForward { softmax: Some((case.d_out.view(), lse.view())) };
    let error = says(dense.backward(case.qkv(), case.d_out.view(), saved));
    assert_eq!(error, "saved lse: expected shape [1, 2, 5], got [1, 2, 4]");
    let sinks = Dense::builder().sinks([0.0, 0.0]).build().unwrap();
    let mut gradients = dense.zero_gradients(case.qkv()).unwrap();
    let workspace = &mut Workspace::new();
    let error = sinks
        .backward_into(case.qkv(), case.d_out.view(), SavedForward::default(), &mut gradients, workspace)
        .unwrap_err();
    assert_eq!(error.to_string(), "gradients.sinks: expected one for each of the 2 query heads, got none");
    let gates = Array3::zeros((1, 2, 6));
    let forget = Dense::builder().score(Forget::new(gates.view()).unwrap()).build().unwrap();
    let error = forget
        .backward_into(case.qkv(), case.d_out.view(), SavedForward::default(), &mut gradients, workspace)
        .unwrap_err();
    assert_eq!(error.to_string(), "gradients.log_gates: expected (1, 2, 6), got none");
}
