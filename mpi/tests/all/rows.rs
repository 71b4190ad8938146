//! Softmax attention, whose rows travel.

use attention_kernels::dense::{Dense, SavedForward};
use attention_kernels::half::{bf16, f16};
use attention_kernels::linear::Lightning;
use attention_kernels::mask::Causal;
use attention_kernels::{Attention, Backward, Bounded, Element, Qkv};
use attention_kernels_mpi::lasp::{self, Transition};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::ring::Ring;
use attention_kernels_mpi::{Error, Group, Stored, gathered, heads, spread};
use ndarray::{Array4, Axis, s};

use super::data::{bound, cuts, held, numbers, worst};

/// How far gradients of softmax attention may be off.
const SHARE: f64 = 2e-6;

struct Whole<T> {
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
}

impl<T: Stored> Whole<T> {
    fn new(len: usize) -> Self {
        let of =
            |seed, heads, dim, by: f32| numbers(seed, (2, heads, len, dim)).mapv(|x| T::from_f32(by * x));
        Self { q: of(1, 4, 16, 3.0), k: of(2, 2, 16, 2.0), v: of(3, 2, 9, 1.0) }
    }

    fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn held(&self, cut: &Cut, rank: usize) -> Self {
        let of = |x: &Array4<T>| held(x.view(), cut, rank);
        Self { q: of(&self.q), k: of(&self.k), v: of(&self.v) }
    }
}

pub fn ring_is_attention(group: &Group) {
    for len in [0, 1, 5, 130] {
        let whole = Whole::<f32>::new(len);
        let causal = Dense::builder().causal().build().unwrap();
        let all = Dense::builder().build().unwrap();
        for cut in cuts(len, group.size()) {
            for masked in [true, false] {
                let ring = Ring::new(cut.clone());
                let ring = if masked { ring.causal() } else { ring };
                let mine = whole.held(&cut, group.rank());
                let got = ring.forward(group, mine.q.view(), mine.k.view(), mine.v.view()).unwrap();
                let (want, allowed, lse) = if masked {
                    let x = whole.qkv();
                    (causal.reference(x), causal.error_bound(x), causal.reference_lse(x))
                } else {
                    let x = whole.qkv();
                    (all.reference(x), all.error_bound(x), all.reference_lse(x))
                };
                let want = held(want.unwrap().view(), &cut, group.rank());
                let allowed = bound(&allowed.unwrap(), &cut, group.rank());
                let off = worst(&got.out, &want, |b, h, i| allowed[[b, h, i]]);
                assert!(off <= 1.0, "{off} of the bound, len {len}, {cut:?}, causal {masked}");
                let lse = bound(&lse.unwrap(), &cut, group.rank());
                assert!(got.lse.iter().zip(&lse).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4));
            }
        }
    }
}

pub fn ring_of_halves_is_rounded_once(group: &Group) {
    fn of<T: Stored>(group: &Group) {
        let whole = Whole::<T>::new(77);
        let cut = Cut::zigzag(77, group.size());
        let mine = whole.held(&cut, group.rank());
        let ring = Ring::new(cut.clone()).causal();
        let got = ring.forward(group, mine.q.view(), mine.k.view(), mine.v.view()).unwrap();
        let dense = Dense::builder().causal().build().unwrap();
        let want = held(dense.reference(whole.qkv()).unwrap().view(), &cut, group.rank());
        let allowed = bound(&dense.error_bound(whole.qkv()).unwrap(), &cut, group.rank());
        let off = worst(&got.out, &want, |b, h, i| allowed[[b, h, i]]);
        assert!(off <= 1.0, "{off} of the bound in f32");
        let rounded = got.rounded::<T>().mapv(Element::to_f32);
        let off = worst(&rounded, &want, |b, h, i| allowed[[b, h, i]] + 2.0 * T::ROUNDING);
        assert!(off <= 1.0, "{off} of the bound and the rounding");
    }
    of::<f16>(group);
    of::<bf16>(group);
}

pub fn ring_keeps_packed_sequences_apart(group: &Group) {
    let whole = Whole::<f32>::new(101);
    let single = |x: &Array4<f32>| x.slice(s![..1, .., .., ..]).to_owned();
    let whole = Whole { q: single(&whole.q), k: single(&whole.k), v: single(&whole.v) };
    let offsets = [0, 3, 3, 40, 41, 97];
    for cut in cuts(101, group.size()) {
        let mine = whole.held(&cut, group.rank());
        let ring = Ring::new(cut.clone()).causal().packed(offsets);
        let got = ring.forward(group, mine.q.view(), mine.k.view(), mine.v.view()).unwrap();
        let dense = Dense::builder().causal().build().unwrap();
        let x = whole.qkv().packed(&offsets, &offsets);
        let want = held(dense.reference(x).unwrap().view(), &cut, group.rank());
        let allowed = bound(&dense.error_bound(x).unwrap(), &cut, group.rank());
        let off = worst(&got.out, &want, |b, h, i| allowed[[b, h, i]] + f64::MIN_POSITIVE);
        assert!(off <= 1.0, "{off} of the bound, {cut:?}");
    }
}

pub fn ring_gradients(group: &Group) {
    for (len, causal) in [(1, true), (61, true), (40, false)] {
        let whole = Whole::<f32>::new(len);
        let d_out = numbers(9, (2, 4, len, 9));
        let want = if causal {
            let dense = Dense::builder().mask(Causal::new()).build().unwrap();
            dense.reference_backward(whole.qkv(), d_out.view(), SavedForward::default()).unwrap()
        } else {
            let dense = Dense::builder().build().unwrap();
            dense.reference_backward(whole.qkv(), d_out.view(), SavedForward::default()).unwrap()
        };
        for cut in cuts(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let ring = Ring::new(cut.clone());
            let ring = if causal { ring.causal() } else { ring };
            let (q, k, v) = (mine.q.view(), mine.k.view(), mine.v.view());
            let saved = ring.forward(group, q, k, v).unwrap();
            let d_mine = held(d_out.view(), &cut, group.rank());
            let got = ring.backward(group, (q, k, v), d_mine.view(), &saved).unwrap();
            let other = gathered::backward(group, &ring, (q, k, v), d_mine.view(), &saved).unwrap();
            // Where there is one key, those of queries and keys are 0.
            let of = |x: &Array4<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let size = of(&want.q).max(of(&want.k)).max(of(&want.v));
            for got in [got, other] {
                for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
                    // As the crate's own tests measure gradients.
                    let want = held(want.view(), &cut, group.rank());
                    let off = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
                    assert!(off.sqrt() <= SHARE * size, "{off:e} of {size:e}, len {len}, {cut:?}");
                }
            }
        }
    }
}

pub fn arrival_does_not_matter(group: &Group) {
    let (whole, me) = (Whole::<f32>::new(64), group.rank());
    let cut = Cut::zigzag(64, group.size());
    let mine = whole.held(&cut, me);
    let ring = Ring::new(cut.clone()).causal();
    let (q, k, v) = (mine.q.view(), mine.k.view(), mine.v.view());
    let d_out = mine.v.slice(s![.., ..1, .., ..]).broadcast((2, 4, q.dim().2, 9)).unwrap().to_owned();
    let chain = whole.held(&Cut::even(64, group.size()), me);
    let states = Qkv::new(chain.q.slice(s![.., ..2, .., ..]), chain.k.view(), chain.v.view());
    let d_states = chain.v.view();
    let lightning = Lightning::from_slopes(&[0.1, 0.3]).build().unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    let run = |group: &Group| {
        let out = ring.forward(group, q, k, v).unwrap();
        let back = ring.backward(group, (q, k, v), d_out.view(), &out).unwrap();
        let all = gathered::forward(group, &ring, q, k, v).unwrap();
        let all_back = gathered::backward(group, &ring, (q, k, v), d_out.view(), &out).unwrap();
        let by_head = heads::forward(group, &dense, &cut, q, k, v).unwrap();
        let by_head_back = heads::backward(group, &dense, &cut, (q, k, v), d_out.view()).unwrap();
        let asked = (me == 0).then_some(q);
        let cached = spread::attend(group, 0, asked, k, v, None).unwrap();
        let mixed = lasp::forward(group, &lightning, states, Transition::Rows).unwrap();
        let mixed_back =
            lasp::backward(group, &lightning, states, Transition::Rows, d_states, &mixed.before).unwrap();
        ((out, back), (all, all_back), (by_head, by_head_back), cached, (mixed, mixed_back))
    };
    let want = run(group);
    let world = attention_kernels_mpi::mpi::topology::SimpleCommunicator::world();
    for seed in 1..4 {
        let late = Group::new(&world).with_jitter(seed * 77 + 5 * me as u64);
        assert!(run(&late) == want, "seed {seed}");
    }
}

pub fn heads_are_attention(group: &Group) {
    let dense = Dense::builder().causal().build().unwrap();
    for len in [0, 3, 50] {
        let whole = Whole::<f32>::new(len);
        let (want, allowed) =
            (dense.reference(whole.qkv()).unwrap(), dense.error_bound(whole.qkv()).unwrap());
        for cut in cuts(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let got =
                heads::forward(group, &dense, &cut, mine.q.view(), mine.k.view(), mine.v.view()).unwrap();
            let want = held(want.view(), &cut, group.rank());
            let allowed = bound(&allowed, &cut, group.rank());
            let off = worst(&got, &want, |b, h, i| allowed[[b, h, i]]);
            assert!(off <= 1.0, "{off} of the bound, len {len}, {cut:?}");
        }
    }
}

/// Four query heads of two key/value heads: with more than two ranks, several have queries of
/// the same key/value head.
pub fn heads_gradients(group: &Group) {
    let dense = Dense::builder().causal().build().unwrap();
    for len in [0, 1, 50] {
        let (whole, d_out) = (Whole::<f32>::new(len), numbers(9, (2, 4, len, 9)));
        let want = dense.reference_backward(whole.qkv(), d_out.view(), SavedForward::default()).unwrap();
        let of = |x: &Array4<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        // Where there is one key, those of queries and keys are 0.
        let size = of(&want.q).max(of(&want.k)).max(of(&want.v));
        for cut in cuts(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let d_mine = held(d_out.view(), &cut, group.rank());
            let (q, k, v) = (mine.q.view(), mine.k.view(), mine.v.view());
            let got = heads::backward(group, &dense, &cut, (q, k, v), d_mine.view()).unwrap();
            for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
                let want = held(want.view(), &cut, group.rank());
                assert_eq!(got.dim(), want.dim());
                let off = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
                assert!(off.sqrt() <= SHARE * size, "{off:e} of {size:e}, len {len}, {cut:?}");
            }
            let wrong = group.size() - 1;
            let d_wrong = if group.rank() == wrong { Array4::zeros((2, 4, 1, 3)) } else { d_mine };
            let got = heads::backward(group, &dense, &cut, (q, k, v), d_wrong.view()).unwrap_err();
            let Error::Argument { rank, message } = got else { panic!("{got}") };
            assert_eq!(rank, wrong);
            assert!(message.starts_with("d_out: expected shape"), "{message}");
        }
    }
}

pub fn spread_cache_is_attention(group: &Group) {
    let (whole, q) = (Whole::<f32>::new(90), numbers(4, (2, 4, 3, 16)));
    let dense = Dense::builder().build().unwrap();
    for cut in cuts(90, group.size()) {
        // Of the second sequence each rank has fewer.
        let lengths: Vec<_> =
            (0..group.size()).map(|rank| [cut.held(rank), cut.held(rank) * rank / 7]).collect();
        let places = |entry: usize| {
            let of = |rank: usize| cut.positions(rank).take(lengths[rank][entry]).collect::<Vec<_>>();
            (0..group.size()).flat_map(of).collect::<Vec<_>>()
        };
        let mine = whole.held(&cut, group.rank());
        for home in 0..group.size() {
            let asked = (group.rank() == home).then(|| q.view());
            let own = Some(&lengths[group.rank()][..]);
            let got = spread::attend(group, home, asked, mine.k.view(), mine.v.view(), own).unwrap();
            assert_eq!(got.is_some(), group.rank() == home);
            let Some(got) = got else { continue };
            for entry in 0..2 {
                let of = |x: &Array4<f32>| {
                    x.slice(s![entry..entry + 1, .., .., ..]).select(Axis(2), &places(entry))
                };
                let (k, v) = (of(&whole.k), of(&whole.v));
                let x = Qkv::new(q.slice(s![entry..entry + 1, .., .., ..]), k.view(), v.view());
                let (want, allowed) = (dense.reference(x).unwrap(), dense.error_bound(x).unwrap());
                let out = got.out.slice(s![entry..entry + 1, .., .., ..]).to_owned();
                let off = worst(&out, &want, |b, h, i| allowed[[b, h, i]] + f64::MIN_POSITIVE);
                assert!(off <= 1.0, "{off} of the bound, {cut:?}");
            }
        }
    }
}

/// Distributed multi-head attention is what one process has, and what the other forms are
/// compared with: within the bound of both, and the ring to the bit.
pub fn the_baseline_and_the_others(group: &Group) {
    fn of<T: Stored>(group: &Group, len: usize) {
        let (whole, me) = (Whole::<T>::new(len), group.rank());
        let dense = Dense::builder().causal().build().unwrap();
        let (want, allowed) = (dense.reference(whole.qkv()), dense.error_bound(whole.qkv()));
        let (want, allowed) = (want.unwrap(), allowed.unwrap());
        for cut in cuts(len, group.size()) {
            let mine = whole.held(&cut, me);
            let (q, k, v) = (mine.q.view(), mine.k.view(), mine.v.view());
            let options = Ring::new(cut.clone()).causal();
            let (want, allowed) = (held(want.view(), &cut, me), bound(&allowed, &cut, me));
            let baseline = gathered::forward(group, &options, q, k, v).unwrap();
            let off = worst(&baseline.out, &want, |b, h, i| allowed[[b, h, i]] + f64::MIN_POSITIVE);
            assert!(off <= 1.0, "{off} of the bound, len {len}, {cut:?}");

            assert_eq!(options.forward(group, q, k, v).unwrap(), baseline);
            let base = baseline.out.mapv(f64::from);
            let other = heads::forward(group, &dense, &cut, q, k, v).unwrap();
            let off = worst(&other, &base, |b, h, i| 2.0 * allowed[[b, h, i]] + f64::MIN_POSITIVE);
            assert!(off <= 1.0, "heads: {off} of both bounds, len {len}, {cut:?}");
        }
        // The last token sees what a spread cache has; who has it last is its home.
        let cut = Cut::even(len, group.size());
        let Some(home) = (0..group.size()).rev().find(|&rank| cut.held(rank) > 0) else { return };
        let mine = whole.held(&cut, me);
        let (k, v) = (mine.k.view(), mine.v.view());
        let baseline = gathered::forward(group, &Ring::new(cut).causal(), mine.q.view(), k, v).unwrap();
        let q = (me == home).then(|| mine.q.slice(s![.., .., -1.., ..]));
        let got = spread::attend(group, home, q, k, v, None).unwrap();
        if let Some(got) = got {
            let base = baseline.out.slice(s![.., .., -1.., ..]).mapv(f64::from);
            let off = worst(&got.out, &base, |b, h, _| 2.0 * allowed[[b, h, len - 1]] + f64::MIN_POSITIVE);
            assert!(off <= 1.0, "spread: {off} of both bounds, len {len}");
        }
    }
    for len in [0, 1, 77] {
        of::<f32>(group, len);
        of::<bf16>(group, len);
    }
}

/// A layer of each kind, as hybrids have them, over one cut: LASP-2H.
pub fn hybrid_layers(group: &Group) {
    let len = 66;
    let (whole, cut) = (Whole::<f32>::new(len), Cut::even(len, group.size()));
    let mine = whole.held(&cut, group.rank());
    // As many heads everywhere, and values as wide as queries.
    let (q, v) = (whole.q.slice(s![.., ..2, .., ..]), whole.k.view());
    let (of_q, of_v) = (mine.q.slice(s![.., ..2, .., ..]), mine.k.view());
    let lightning = Lightning::from_slopes(&[0.05, 0.3]).scale(0.1).build().unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    let mixed = lasp::forward(group, &lightning, Qkv::new(of_q, of_v, of_v), Transition::Rows).unwrap();
    let one = lightning.forward(Qkv::new(q, v, v)).unwrap();
    let options = Ring::new(cut.clone()).causal();
    let got = gathered::forward(group, &options, of_q, of_v, mixed.out.view()).unwrap();
    // The second layer is linear in what the first one gives, with weights that add up to 1.
    let x = Qkv::new(q, v, one.view());
    let (want, second) = (dense.reference(x).unwrap(), dense.error_bound(x).unwrap());
    let first = lightning.error_bound(Qkv::new(q, v, v)).unwrap();
    let largest = first.iter().fold(0f64, |most, x| most.max(*x));
    let (want, second) = (held(want.view(), &cut, group.rank()), bound(&second, &cut, group.rank()));
    let off = worst(&got.out, &want, |b, h, i| second[[b, h, i]] + 2.0 * largest);
    assert!(off <= 1.0, "{off} of the bounds of both layers");
}
