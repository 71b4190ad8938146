//! Identities that every mechanism here has, and inputs to test them with.

use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis, s};

use crate::attention::{Attention, Cost, Margins, Mergeable, Reuses, Selects, TopWeights, Weights};
use crate::cache::{
    Append, Cache, Cached, Contiguous, Format, GatedCache, Int8, KvShape, Latent, Paged, Pages,
};
use crate::dense::Dense;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::input::gate::Gated;
use crate::keys::source::At;
use crate::math::random::Normal;
use crate::select::{IndexBranch, Indexed, Reused};
use crate::simd::Isa;

/// Queries, keys and values.
pub(super) struct Arrays {
    pub(super) q: Array4<f32>,
    pub(super) k: Array4<f32>,
    pub(super) v: Array4<f32>,
}

impl Arrays {
    fn of(
        [batch, q_heads, kv_heads, q_len, kv_len, dim, value_dim]: [usize; 7],
        mut next: impl FnMut() -> f32,
    ) -> Self {
        let mut array = |heads, len, dim| Array4::from_shape_simple_fn((batch, heads, len, dim), &mut next);
        Self {
            q: array(q_heads, q_len, dim),
            k: array(kv_heads, kv_len, dim),
            v: array(kv_heads, kv_len, value_dim),
        }
    }

    pub(super) fn normal(sizes: [usize; 7], seed: u64) -> Self {
        let mut random = Normal::new(seed);
        Self::of(sizes, || random.next().unwrap() as f32)
    }

    /// Small multiples of 1/8, whose products and sums are exact.
    pub(super) fn integers(sizes: [usize; 7], seed: u64) -> Self {
        let mut random = Normal::new(seed);
        Self::of(sizes, || ((random.next().unwrap() * 4.0).round() / 8.0) as f32)
    }

    pub(super) fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

#[track_caller]
pub(super) fn near(what: &str, got: &Array4<f32>, want: &Array4<f32>) {
    assert_eq!(got.dim(), want.dim(), "{what}");
    for (at, &x) in got.indexed_iter() {
        assert!((x - want[at]).abs() < 2e-5, "{what}: {at:?}: {x} and {}", want[at]);
    }
}

const SIZES: [usize; 7] = [2, 4, 2, 200, 200, 24, 12];

pub(super) trait Mechanism:
    for<'a> Selects<Qkv<'a, f32>> + for<'a> Mergeable<Qkv<'a, f32>> + for<'a> Weights<Qkv<'a, f32>>
{
}
impl<M: for<'a> Selects<Qkv<'a, f32>> + for<'a> Mergeable<Qkv<'a, f32>> + for<'a> Weights<Qkv<'a, f32>>>
    Mechanism for M
{
}

fn dense(x: Qkv<'_, f32>, causal: bool) -> (Array4<f32>, Array3<f32>, Array4<f32>) {
    if causal {
        let dense = Dense::builder().causal().build().unwrap();
        let (out, lse) = dense.forward_with_lse(x).unwrap();
        (out, lse, dense.weights(x).unwrap())
    } else {
        let dense = Dense::builder().build().unwrap();
        let (out, lse) = dense.forward_with_lse(x).unwrap();
        (out, lse, dense.weights(x).unwrap())
    }
}

/// A budget of all keys is dense attention, LSE included.
pub(super) fn all_keys_are_dense(m: &impl Mechanism, causal: bool) {
    for sizes in [SIZES, [1, 4, 2, 3, 300, 24, 12], [1, 2, 1, 70, 40, 24, 12]] {
        let x = Arrays::normal(sizes, 1);
        let (out, lse) = m.forward_with_lse(x.qkv()).unwrap();
        let (want, want_lse, _) = dense(x.qkv(), causal);
        near("all keys", &out, &want);
        assert!(lse.iter().zip(&want_lse).all(|(a, b)| a == b || (a - b).abs() < 2e-5));
    }
}

fn part<'a>(x: &'a Arrays, rows: std::ops::Range<usize>, keys: usize) -> Qkv<'a, f32> {
    let (q, k, v) = (
        x.q.slice(s![.., .., rows, ..]),
        x.k.slice(s![.., .., ..keys, ..]),
        x.v.slice(s![.., .., ..keys, ..]),
    );
    Qkv::new(q, k, v)
}

/// A prompt in pieces is the prompt.
pub(super) fn chunks_are_the_whole(m: &impl Mechanism) {
    let x = Arrays::integers(SIZES, 2);
    let whole = m.forward(x.qkv()).unwrap();
    for cut in [1, 64, 77, 190] {
        let parts = [m.forward(part(&x, 0..cut, cut)).unwrap(), m.forward(part(&x, cut..200, 200)).unwrap()];
        let parts = ndarray::concatenate(Axis(2), &[parts[0].view(), parts[1].view()]).unwrap();
        near("chunks", &parts, &whole);
    }
}

/// A decoding step is the last row of a prefill.
pub(super) fn last_row_is_decoding(m: &impl Mechanism) {
    let x = Arrays::integers(SIZES, 3);
    let whole = m.forward(x.qkv()).unwrap();
    let step = m.forward(part(&x, 199..200, 200)).unwrap();
    near("decoding", &step, &whole.slice(s![.., .., 199..200, ..]).to_owned());
}

/// Later tokens change nothing.
pub(super) fn never_ahead(m: &impl Mechanism) {
    let mut x = Arrays::normal(SIZES, 4);
    let before = m.forward(x.qkv()).unwrap();
    x.k.slice_mut(s![.., .., 123.., ..]).fill(f32::NAN);
    x.v.slice_mut(s![.., .., 123.., ..]).fill(f32::NAN);
    let after = m.forward(x.qkv()).unwrap();
    let first = |x: &Array4<f32>| x.slice(s![.., .., ..123, ..]).to_owned();
    near("before", &first(&after), &first(&before));
    let weights = m.weights(x.qkv()).unwrap();
    assert!(weights.indexed_iter().all(|((_, _, i, j), &w)| i >= 123 || j <= i || w == 0.0));
}

/// The share of dense weights that is kept bounds the error.
pub(super) fn kept_mass_bounds_the_error(m: &impl Mechanism, causal: bool) {
    kept_mass_bounds_the_error_of(m, &Arrays::normal(SIZES, 5), causal);
}

/// The same on some arrays.
pub(super) fn kept_mass_bounds_the_error_of(m: &impl Mechanism, x: &Arrays, causal: bool) {
    let got = m.forward(x.qkv()).unwrap();
    let (want, _, all) = dense(x.qkv(), causal);
    let some = m.weights(x.qkv()).unwrap();
    let largest = x.v.iter().fold(0f32, |most, v| most.max(v.abs()));
    let mut lossy = 0;
    for ((b, h, i, c), &x) in got.indexed_iter() {
        let rows = all.slice(s![b, h, i, ..]).into_iter().zip(some.slice(s![b, h, i, ..]));
        let kept: f32 = rows.filter(|(_, some)| **some > 0.0).map(|(all, _)| all).sum();
        lossy += usize::from(kept < 0.99);
        let error = (x - want[[b, h, i, c]]).abs();
        assert!(
            error <= 2.0 * (1.0 - kept).max(0.0) * largest + 2e-5,
            "{b} {h} {i} {c}: {error}, {kept} kept"
        );
    }
    assert!(lossy > 0, "all is kept");
}

/// Where scores are exact, the kernel's lists are the definition's.
pub(super) fn exact_scores_give_equal_lists(m: &impl Mechanism) {
    for (seed, sizes) in [SIZES, [1, 4, 2, 3, 300, 24, 12], [3, 4, 2, 70, 40, 9, 12]].into_iter().enumerate()
    {
        let x = Arrays::integers(sizes, 6 + seed as u64);
        let (want, _) = m.reference_select(x.qkv()).unwrap();
        assert!(m.select(x.qkv()).unwrap() == want, "{sizes:?}");
        // Of a packed batch likewise.
        let (q, k) = ([0, 2, 2, sizes[3]], [0, 10, 15, sizes[4]]);
        let one = |x: &Array4<f32>| x.slice(s![..1, .., .., ..]).to_owned();
        let (qs, ks, vs) = (one(&x.q), one(&x.k), one(&x.v));
        let packed = Qkv::new(qs.view(), ks.view(), vs.view()).packed(&q, &k);
        let (want, _) = m.reference_select(packed).unwrap();
        assert!(m.select(packed).unwrap() == want, "packed, {sizes:?}");
        let out = m.forward(packed).unwrap();
        let alone = Qkv::new(
            qs.slice(s![.., .., 2.., ..]),
            ks.slice(s![.., .., 15.., ..]),
            vs.slice(s![.., .., 15.., ..]),
        );
        near("packed", &out.slice(s![.., .., 2.., ..]).to_owned(), &m.forward(alone).unwrap());
    }
}

/// What a causal mechanism with lists of single queries has in common, of which one
/// sees `all` keys and one `some`.
pub(super) fn identities_of_causal(all: &impl Mechanism, some: &impl Mechanism) {
    all_keys_are_dense(all, true);
    chunks_are_the_whole(some);
    last_row_is_decoding(some);
    never_ahead(some);
    kept_mass_bounds_the_error(some, true);
    heads_permute(some);
}

/// Heads do not know their places.
pub(super) fn heads_permute(m: &impl Mechanism) {
    let x = Arrays::normal(SIZES, 7);
    let swap = |x: &Array4<f32>, order: &[usize]| x.select(Axis(1), order);
    let y = Arrays { q: swap(&x.q, &[2, 3, 0, 1]), k: swap(&x.k, &[1, 0]), v: swap(&x.v, &[1, 0]) };
    let (a, b) = (m.forward(x.qkv()).unwrap(), m.forward(y.qkv()).unwrap());
    assert_eq!(swap(&a, &[2, 3, 0, 1]), b);
}

/// Over a cache that holds the arrays it selects the same keys and gives the
/// same outputs, in prefill, in decoding and where sequences are packed; on an
/// 8-bit cache it is its definition.
pub(super) fn caches_are_arrays<M>(m: &M)
where
    M: Mechanism
        + for<'a> Selects<Cached<'a, f32, Contiguous>, Index = <M as Selects<Qkv<'a, f32>>>::Index>
        + for<'a> Selects<Cached<'a, f32, Paged>, Index = <M as Selects<Qkv<'a, f32>>>::Index>
        + for<'a> Selects<Cached<'a, f32, Contiguous<Int8>>>,
{
    for (q_len, lengths) in [(150, [200, 170]), (1, [200, 131]), (3, [7, 200])] {
        let x = Arrays::integers([2, 4, 2, q_len, 200, 24, 12], 8);
        let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
        let mut contiguous = Contiguous::<f32>::new(shape, 2, 256).unwrap();
        let mut paged = Paged::<f32>::new(shape, 2, Pages { count: 40, len: 16 }).unwrap();
        let mut int8 = Contiguous::<Int8>::new(shape, 2, 256).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            let (k, v) = (x.k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..]));
            contiguous.append(b, k, v).unwrap();
            paged.append(b, k, v).unwrap();
            int8.append(b, k, v).unwrap();
        }
        let arrays = x.qkv().key_lengths(&lengths);
        let (want, out) = (m.select(arrays).unwrap(), m.forward(arrays).unwrap());
        let cached = Cached::new(x.q.view(), &contiguous);
        assert!(m.select(cached).unwrap() == want, "contiguous");
        near("contiguous", &m.forward(cached).unwrap(), &out);
        assert!(m.reference_select(cached).unwrap().0 == m.reference_select(arrays).unwrap().0);
        let cached = Cached::new(x.q.view(), &paged);
        assert!(m.select(cached).unwrap() == want, "paged");
        near("paged", &m.forward(cached).unwrap(), &out);

        let cached = Cached::new(x.q.view(), &int8);
        let index = m.select(cached).unwrap();
        let (want, margins) = m.reference_select(cached).unwrap();
        let difference =
            <M as Selects<Cached<'_, f32, Contiguous<Int8>>>>::difference(&index, &want, &margins);
        assert_eq!(difference, None);
        let want = m.reference_on(cached, &index).unwrap().mapv(|x| x as f32);
        near("8 bits", &m.forward(cached).unwrap(), &want);
    }
    // Queries of the two sequences packed, in the other order.
    let x = Arrays::integers([2, 4, 2, 60, 200, 24, 12], 9);
    let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
    let mut cache = Contiguous::<f32>::new(shape, 2, 256).unwrap();
    for b in 0..2 {
        cache.append(b, x.k.slice(s![b, .., .., ..]), x.v.slice(s![b, .., .., ..])).unwrap();
    }
    let q =
        ndarray::concatenate(Axis(2), &[x.q.slice(s![1..2, .., 50.., ..]), x.q.slice(s![0..1, .., .., ..])]);
    let q = q.unwrap();
    let packed = Cached::new(q.view(), &cache).sequences(&[1, 0]).packed(&[0, 10, 70]);
    let (got, want) = (m.forward(packed).unwrap(), m.forward(x.qkv()).unwrap());
    near(
        "first",
        &got.slice(s![.., .., ..10, ..]).to_owned(),
        &want.slice(s![1..2, .., 50.., ..]).to_owned(),
    );
    near("second", &got.slice(s![.., .., 10.., ..]).to_owned(), &want.slice(s![0..1, .., .., ..]).to_owned());
}

/// Appends a part of a sequence of arrays.
fn append(cache: &mut impl Append, [k, v]: [&Array4<f32>; 2], b: usize, of: std::ops::Range<usize>) {
    cache.append(b, k.slice(s![b, .., of.clone(), ..]), v.slice(s![b, .., of, ..])).unwrap();
}

/// Queries over a cache, and those of a gate over another.
type OverCaches<'a> = GatedCache<'a, f32, dyn Cache + 'a, dyn Cache + 'a>;

/// Over caches that hold the arrays a gated mechanism selects the same keys and gives
/// the same bits, in prefill and in chunks, of one token where queries may start
/// anywhere and else of a block; on caches of 8 bits it is its
/// definition, and what it is on the arrays that they read back as; caches that are
/// not of the same tokens are refused.
pub(super) fn gated_caches_are_arrays<M, I: PartialEq>(m: &M, chunk: usize)
where
    M: for<'a> Selects<Gated<'a, f32>, Index = I> + for<'a> Selects<OverCaches<'a>, Index = I>,
{
    // Queries and keys of the gate are not those of the attention.
    let [x, gate] = [8, 9].map(|seed| Arrays::normal([2, 4, 2, 200, 200, 24, 12], seed));
    let (shape, pages) = (KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 }, Pages { count: 40, len: 16 });
    let of_gate = KvShape { value_dim: 0, ..shape };
    let (own, of_gates) = ([&x.k, &x.v], [&gate.k, &Array4::zeros((2, 2, 200, 0))]);
    let cases = match chunk {
        1 => [(150, [200, 170]), (1, [200, 131]), (3, [7, 200])],
        _ => [(136, [200, 136]), (1, [193, 129]), (8, [8, 200])],
    };
    for (q_len, lengths) in cases {
        let (q, of) = (x.q.slice(s![.., .., ..q_len, ..]), gate.q.slice(s![.., .., ..q_len, ..]));
        let qkv = Qkv::new(q, x.k.view(), x.v.view()).key_lengths(&lengths);
        let arrays = Gated { qkv, q: of, k: gate.k.view() };
        let (want, out) = (m.select(arrays).unwrap(), m.forward(arrays).unwrap());
        let mut flat = Contiguous::<f32>::new(shape, 2, 256).unwrap();
        let mut paged = Paged::<f32>::new(shape, 2, pages).unwrap();
        let mut small = Contiguous::<Int8>::new(shape, 2, 256).unwrap();
        let mut flat_gate = Contiguous::<f32>::new(of_gate, 2, 256).unwrap();
        let mut paged_gate = Paged::<f32>::new(of_gate, 2, pages).unwrap();
        let mut small_gate = Paged::<Int8>::new(of_gate, 2, pages).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            append(&mut flat, own, b, 0..n);
            append(&mut paged, own, b, 0..n);
            append(&mut small, own, b, 0..n);
            append(&mut flat_gate, of_gates, b, 0..n);
            append(&mut paged_gate, of_gates, b, 0..n);
            append(&mut small_gate, of_gates, b, 0..n);
        }
        let (caches, gates): ([&dyn Cache; 2], [&dyn Cache; 2]) =
            ([&flat, &paged], [&paged_gate, &flat_gate]);
        for (cache, keys) in caches.into_iter().zip(gates) {
            let cached = OverCaches { cached: Cached::new(q, cache), q: of, keys };
            assert!(m.select(cached).unwrap() == want, "{q_len}");
            assert!(m.reference_select(cached).unwrap().0 == m.reference_select(arrays).unwrap().0);
            assert_eq!(m.forward(cached).unwrap(), out, "{q_len}");
        }
        let cached = OverCaches { cached: Cached::new(q, &small), q: of, keys: &small_gate };
        let index = m.select(cached).unwrap();
        let (want, margins) = m.reference_select(cached).unwrap();
        assert_eq!(<M as Selects<OverCaches<'_>>>::difference(&index, &want, &margins), None);
        let (read, gates) = (cached.cached, Cached::new(of, &small_gate));
        let (read, gates) = (read.held(&read.dims().unwrap()), gates.held(&gates.dims().unwrap()));
        let qkv = Qkv::new(q, read.k.view(), read.v.view()).key_lengths(&lengths);
        let arrays = Gated { qkv, q: of, k: gates.k.view() };
        assert!(m.select(arrays).unwrap() == index, "8 bits");
        near("8 bits", &m.forward(cached).unwrap(), &m.forward(arrays).unwrap());
        let reference = m.reference_on(cached, &index).unwrap().mapv(|x| x as f32);
        near("8 bits by definition", &m.forward(cached).unwrap(), &reference);
    }
    // Chunk by chunk.
    let whole = m.forward(Gated { qkv: x.qkv(), q: gate.q.view(), k: gate.k.view() }).unwrap();
    let mut cache = Paged::<f32>::new(shape, 2, pages).unwrap();
    let mut keys = Paged::<f32>::new(of_gate, 2, pages).unwrap();
    let mut last = Array4::zeros((0, 0, 0, 0));
    for n in (0..200).step_by(chunk) {
        let end = (n + chunk).min(200);
        for b in 0..2 {
            append(&mut cache, own, b, n..end);
            append(&mut keys, of_gates, b, n..end);
        }
        let [q, of] = [&x, &gate].map(|x| x.q.slice(s![.., .., n..end, ..]));
        last = m.forward(OverCaches { cached: Cached::new(q, &cache), q: of, keys: &keys }).unwrap();
        near("chunk", &last, &whole.slice(s![.., .., n..end, ..]).to_owned());
    }
    // A part of the sequences, and what does not fit.
    let mut short = Paged::<f32>::new(of_gate, 2, pages).unwrap();
    append(&mut short, of_gates, 1, 0..199);
    let other = Contiguous::<f32>::new(KvShape { kv_heads: 1, ..of_gate }, 2, 8).unwrap();
    let [q, of] = [&x, &gate].map(|x| x.q.slice(s![1.., .., 200 - last.dim().2.., ..]));
    let held: &dyn Cache = &cache;
    let one = OverCaches { cached: Cached::new(q, held).sequences(&[1]), q: of, keys: &keys };
    near("one", &m.forward(one).unwrap(), &last.slice(s![1.., .., .., ..]).to_owned());
    let refused = |x: OverCaches<'_>| m.forward(x).unwrap_err().to_string();
    assert_eq!(
        refused(OverCaches { keys: &short, ..one }),
        "gate keys: expected 200 keys of sequence 1, as the cache has them, got 199"
    );
    assert_eq!(
        refused(OverCaches { keys: &other, ..one }),
        "gate keys: expected 2 heads of 24, as the cache has them, got 1 of 24"
    );
    assert!(refused(OverCaches { q: gate.q.view(), ..one }).starts_with("gate q: "));
}

/// The first rows of the keys of each sequence in a latent cache in pages.
pub(super) fn latents<F: Format>(k: &Array4<f32>, lengths: &[usize]) -> Latent<Paged<F>> {
    let pages = Pages { count: 60, len: 8 };
    let mut cache = Latent::paged::<F>(k.dim().3, 0, lengths.len(), pages).unwrap();
    for (b, &n) in lengths.iter().enumerate() {
        cache.append(b, k.slice(s![b, 0, ..n, ..])).unwrap();
    }
    cache
}

/// The last of `n` tokens as a query over all of them.
pub(super) fn token(x: &Arrays, n: usize) -> Qkv<'_, f32> {
    let (k, v) = (x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
    Qkv::new(x.q.slice(s![.., .., n - 1..n, ..]), k, v)
}

/// Tokens whose queries turn away slowly.
fn turning(seed: u64) -> Arrays {
    let mut x = Arrays::normal([2, 4, 2, 90, 90, 24, 12], seed);
    for n in 1..90 {
        let before = x.q.slice(s![.., .., n - 1, ..]).to_owned();
        x.q.slice_mut(s![.., .., n, ..]).zip_mut_with(&before, |q, before| *q = 0.9 * before + 0.4 * *q);
    }
    x
}

pub(super) trait Stepping: Mechanism + for<'a> Reuses<Qkv<'a, f32>, State = Reused> {}
impl<M: Mechanism + for<'a> Reuses<Qkv<'a, f32>, State = Reused>> Stepping for M {}

/// Step by step what the definition says, of sequences of different lengths; some
/// steps select and some do not.
pub(super) fn steps_are_their_definition(m: &impl Stepping) {
    let (x, mut kept, mut selected) = (turning(11), Reused::new(), [0; 2]);
    for n in 40..90 {
        let lengths = [n, n - 7];
        let mut q = x.q.slice(s![.., .., n - 1..n, ..]).to_owned();
        q.slice_mut(s![1, .., .., ..]).assign(&x.q.slice(s![1, .., n - 8..n - 7, ..]));
        let part = Qkv { q: q.view(), ..token(&x, n).key_lengths(&lengths) };
        let (want, next) = m.reference_step(part, &kept).unwrap();
        let out = m.step(part, &mut kept).unwrap();
        assert_eq!(kept, next, "{n} keys");
        near("step", &out, &want.mapv(|x| x as f32));
        for (i, count) in selected.iter_mut().enumerate() {
            *count += usize::from(kept.selected_at(i) == Some(lengths[i]));
        }
    }
    assert!(selected.iter().all(|&n| 1 < n && n < 50), "{selected:?} steps have selected");
}

/// Over a cache that grows token by token.
pub(super) fn steps_of_caches_are_those_of_arrays<M>(m: &M)
where
    M: Stepping + for<'a> Reuses<Cached<'a, f32, Paged>, State = Reused>,
{
    let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
    let mut cache = Paged::<f32>::new(shape, 2, Pages { count: 40, len: 16 }).unwrap();
    let (x, mut of_arrays, mut of_cache) = (turning(12), Reused::new(), Reused::new());
    for n in 1..90 {
        let of = |x: &Array4<f32>| x.slice(s![.., .., n - 1..n, ..]).to_owned();
        cache.append_each(&[0, 1], of(&x.k).view(), of(&x.v).view()).unwrap();
        let part = token(&x, n);
        let want = m.step(part, &mut of_arrays).unwrap();
        let got = m.step(Cached::new(part.q.reborrow(), &cache), &mut of_cache).unwrap();
        assert_eq!(of_cache, of_arrays);
        near("cache", &got, &want);
    }
}

/// What does not follow the last call changes nothing.
pub(super) fn steps_out_of_turn_are_refused(m: &impl Stepping) {
    let (x, mut kept) = (turning(13), Reused::new());
    m.step(token(&x, 50), &mut kept).unwrap();
    let other = Arrays::normal([2, 4, 4, 51, 51, 24, 12], 14);
    for wrong in [token(&x, 50), token(&x, 52), token(&x, 20), token(&other, 51)] {
        let before = kept.clone();
        let mut out = Array4::from_elem((2, 4, 1, 12), f32::NAN);
        let refusal = m.step_into(wrong, &mut kept, out.view_mut(), &mut Workspace::new()).unwrap_err();
        assert!(refusal.to_string().starts_with("reused: expected "), "{refusal}");
        assert!(out.iter().all(|x| x.is_nan()) && kept == before);
        assert_eq!(m.reference_step(wrong, &kept).unwrap_err(), refusal);
    }
    m.step(token(&x, 51), &mut kept).unwrap();
}

/// Over caches that hold the arrays, and where queries are packed.
pub(super) fn indices_of_caches_are_those_of_arrays<M>(m: &M, x: &Arrays)
where
    M: Mechanism
        + for<'a> Selects<Cached<'a, f32, Contiguous>, Index = <M as Selects<Qkv<'a, f32>>>::Index>
        + for<'a> Selects<Cached<'a, f32, Paged>, Index = <M as Selects<Qkv<'a, f32>>>::Index>,
{
    let (batch, kv_heads, n, head_dim) = x.k.dim();
    let shape = KvShape { kv_heads, head_dim, value_dim: x.v.dim().3 };
    let mut contiguous = Contiguous::<f32>::new(shape, batch, n).unwrap();
    let mut paged = Paged::<f32>::new(shape, batch, Pages { count: 2 * n, len: 16 }).unwrap();
    for b in 0..batch {
        let (k, v) = (x.k.index_axis(Axis(0), b), x.v.index_axis(Axis(0), b));
        contiguous.append(b, k, v).unwrap();
        paged.append(b, k, v).unwrap();
    }
    let (want, out) = (m.select(x.qkv()).unwrap(), m.forward(x.qkv()).unwrap());
    let (a, b) = (Cached::new(x.q.view(), &contiguous), Cached::new(x.q.view(), &paged));
    assert!(m.select(a).unwrap() == want && m.reference_select(a).unwrap().0 == want, "contiguous");
    assert!(m.select(b).unwrap() == want && m.reference_select(b).unwrap().0 == want, "paged");
    near("contiguous", &m.forward(a).unwrap(), &out);
    near("paged", &m.forward(b).unwrap(), &out);
    let rows: Vec<usize> = (0..batch + 1).map(|i| i * x.q.dim().2).collect();
    let entries: Vec<_> = x.q.outer_iter().collect();
    let q = ndarray::concatenate(Axis(1), &entries).unwrap().insert_axis(Axis(0));
    let packed = Cached::new(q.view(), &paged).packed(&rows);
    let got = m.forward(packed).unwrap();
    assert!(m.reference_select(packed).unwrap().0 == m.select(packed).unwrap(), "packed");
    for b in 0..batch {
        let want = out.slice(s![b..b + 1, .., .., ..]).to_owned();
        near("packed", &got.slice(s![.., .., rows[b]..rows[b + 1], ..]).to_owned(), &want);
    }
}

/// The kernel is off the definition by at most a bound, in memory of the size
/// that it asks for, on any number of threads.
pub(super) fn compressed_is_its_definition<X: crate::Input + Send + Sync>(
    m: &impl Attention<X>,
    x: X,
    bound: Array3<f64>,
) {
    let want = m.reference(x).unwrap();
    let run = |threads| {
        crate::engine::parallel::on_threads(threads, || {
            let mut workspace = Workspace::with_capacity(m.workspace_bytes(x).unwrap());
            let before = workspace.capacity();
            workspace.poison();
            let mut out = Array4::from_elem(x.out_dim().unwrap(), X::Out::default());
            m.forward_into(x, out.view_mut(), &mut workspace).unwrap();
            assert_eq!(workspace.capacity(), before, "more memory than it says");
            out.mapv(Element::to_f64)
        })
    };
    let (got, other) = (run(1), run(3));
    assert_eq!(got, other, "threads");
    for ((b, h, i, c), got) in got.indexed_iter() {
        let off = bound[[b, h, i]] + X::Out::ROUNDING * want[[b, h, i, c]].abs() + 1e-7;
        assert!((got - want[[b, h, i, c]]).abs() <= off, "{b} {h} {i} {c}: {got}, {}", want[[b, h, i, c]]);
    }
}

/// A mechanism with an index branch as one over queries, keys and values: index
/// queries are the first of the queries' heads, index keys the first head's
/// keys, or means of `pool` of them, and a query's weights its last channel's
/// magnitude. There are `heads` of the queries, or as many as keys have.
pub(super) struct ByKeys<M> {
    pub(super) mechanism: M,
    pub(super) pool: usize,
    pub(super) heads: Option<usize>,
}

impl<M> ByKeys<M> {
    fn branch<R>(
        &self,
        (q, k): (ArrayView4<'_, f32>, ArrayView4<'_, f32>),
        run: impl FnOnce(IndexBranch<'_, f32>) -> R,
    ) -> R {
        let heads = self.heads.unwrap_or(k.dim().1).min(q.dim().1);
        let weights = q.index_axis(Axis(3), q.dim().3 - 1).slice(s![.., ..heads, ..]).mapv(f32::abs);
        let q = q.slice(s![.., ..heads, .., ..]);
        let (batch, _, len, dim) = k.dim();
        let pools = Array4::from_shape_fn((batch, 1, len / self.pool, dim), |(b, _, w, c)| {
            (0..self.pool).map(|t| k[[b, 0, w * self.pool + t, c]]).sum::<f32>() / self.pool as f32
        });
        run(IndexBranch::new(q, pools.view()).weighted(weights.view()))
    }
}

impl<M: crate::Mechanism> crate::Mechanism for ByKeys<M> {
    fn card(&self) -> &'static crate::Card {
        self.mechanism.card()
    }
}

/// Keys of the first head of a cache, by sequence of the call.
fn keys_of<C: Cache>(x: &Cached<'_, f32, C>) -> Array4<f32> {
    let dims = x.dims().unwrap();
    let slots = x.slots();
    let longest = (0..dims.batch).map(|i| slots.len(i)).max().unwrap_or(0);
    let (mut keys, mut room) =
        (Array4::zeros((dims.batch, 1, longest, dims.head_dim)), vec![0.0; dims.head_dim]);
    for i in 0..dims.batch {
        let sequence = slots.sequence(&dims, i);
        for j in 0..slots.len(i) {
            let row = x.cache.source().keys(
                Isa::Scalar,
                &At { sequence: &sequence, kv_head: 0, keys: j..j + 1 },
                &mut room,
            );
            for c in 0..dims.head_dim {
                keys[[i, 0, j, c]] = row.at(0, c);
            }
        }
    }
    keys
}

macro_rules! by_keys {
    ([$($generics:tt)*] $input:ty, $x:ident => $keys:expr) => {
        impl<$($generics)*, M> Attention<$input> for ByKeys<M>
        where
            M: for<'b> Selects<Indexed<'b, $input, f32>>,
        {
            fn workspace_bytes(&self, $x: $input) -> Result<usize> {
                self.branch($keys, |branch| self.mechanism.workspace_bytes(Indexed::new($x, branch)))
            }
            fn forward_into(&self, $x: $input, out: ArrayViewMut4<'_, f32>, workspace: &mut Workspace) -> Result<()> {
                self.branch($keys, |branch| self.mechanism.forward_into(Indexed::new($x, branch), out, workspace))
            }
            fn reference(&self, $x: $input) -> Result<Array4<f64>> {
                self.branch($keys, |branch| self.mechanism.reference(Indexed::new($x, branch)))
            }
            fn cost(&self, $x: $input) -> Result<Cost> {
                self.branch($keys, |branch| self.mechanism.cost(Indexed::new($x, branch)))
            }
        }

        impl<$($generics)*, M, I> Selects<$input> for ByKeys<M>
        where
            M: for<'b> Selects<Indexed<'b, $input, f32>, Index = I>,
            I: Clone + std::fmt::Debug + PartialEq + Send + Sync,
        {
            type Index = I;
            fn select(&self, $x: $input) -> Result<I> {
                self.branch($keys, |branch| self.mechanism.select(Indexed::new($x, branch)))
            }
            fn workspace_bytes_on(&self, $x: $input, index: &I) -> Result<usize> {
                self.branch($keys, |branch| self.mechanism.workspace_bytes_on(Indexed::new($x, branch), index))
            }
            fn forward_on_into(
                &self,
                $x: $input,
                index: &I,
                out: ArrayViewMut4<'_, f32>,
                workspace: &mut Workspace,
            ) -> Result<()> {
                self.branch($keys, |branch| {
                    self.mechanism.forward_on_into(Indexed::new($x, branch), index, out, workspace)
                })
            }
            fn reference_select(&self, $x: $input) -> Result<(I, Margins)> {
                self.branch($keys, |branch| self.mechanism.reference_select(Indexed::new($x, branch)))
            }
            fn reference_on(&self, $x: $input, index: &I) -> Result<Array4<f64>> {
                self.branch($keys, |branch| self.mechanism.reference_on(Indexed::new($x, branch), index))
            }
            fn bound_on(&self, $x: $input, index: &I) -> Result<Array3<f64>> {
                self.branch($keys, |branch| self.mechanism.bound_on(Indexed::new($x, branch), index))
            }
            fn difference(a: &I, b: &I, margins: &Margins) -> Option<String> {
                <M as Selects<Indexed<'_, $input, f32>>>::difference(a, b, margins)
            }
        }
    };
}
by_keys!(['a] Qkv<'a, f32>, x => (x.q, x.k));
by_keys!(['a, C: Cache] Cached<'a, f32, C>, x => (x.q, keys_of(&x).view()));

impl<'a, M> Mergeable<Qkv<'a, f32>> for ByKeys<M>
where
    M: for<'b> Mergeable<Indexed<'b, Qkv<'a, f32>, f32>> + for<'b> Selects<Indexed<'b, Qkv<'a, f32>, f32>>,
{
    fn forward_with_lse_into(
        &self,
        x: Qkv<'a, f32>,
        out: ArrayViewMut4<'_, f32>,
        lse: ArrayViewMut3<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.branch((x.q, x.k), |branch| {
            self.mechanism.forward_with_lse_into(Indexed::new(x, branch), out, lse, workspace)
        })
    }
}

impl<'a, M> Weights<Qkv<'a, f32>> for ByKeys<M>
where
    M: for<'b> Weights<Indexed<'b, Qkv<'a, f32>, f32>> + for<'b> Selects<Indexed<'b, Qkv<'a, f32>, f32>>,
{
    fn scores(&self, x: Qkv<'a, f32>) -> Result<Array4<f32>> {
        self.branch((x.q, x.k), |branch| self.mechanism.scores(Indexed::new(x, branch)))
    }
    fn reference_scores(&self, x: Qkv<'a, f32>) -> Result<Array4<f64>> {
        self.branch((x.q, x.k), |branch| self.mechanism.reference_scores(Indexed::new(x, branch)))
    }
    fn weights(&self, x: Qkv<'a, f32>) -> Result<Array4<f32>> {
        self.branch((x.q, x.k), |branch| self.mechanism.weights(Indexed::new(x, branch)))
    }
    fn key_weights(&self, x: Qkv<'a, f32>) -> Result<Array3<f32>> {
        self.branch((x.q, x.k), |branch| self.mechanism.key_weights(Indexed::new(x, branch)))
    }
    fn top_weights(&self, x: Qkv<'a, f32>, count: usize) -> Result<TopWeights> {
        self.branch((x.q, x.k), |branch| self.mechanism.top_weights(Indexed::new(x, branch), count))
    }
    fn reference_weights(&self, x: Qkv<'a, f32>) -> Result<Array4<f64>> {
        self.branch((x.q, x.k), |branch| self.mechanism.reference_weights(Indexed::new(x, branch)))
    }
}
