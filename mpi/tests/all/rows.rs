//! Softmax attention, whose rows travel.

use attention_kernels::dense::{Dense, SavedForward};
use attention_kernels::half::{bf16, f16};
use attention_kernels::mask::Causal;
use attention_kernels::{Attention, Backward, Bounded, Element, Qkv};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::ring::Ring;
use attention_kernels_mpi::{Group, Stored, heads, lasp, spread};
use ndarray::{Array3, Array4, Axis, s};

use super::data::{cuts, held, numbers, worst};

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

fn bound(x: &Array3<f64>, cut: &Cut, rank: usize) -> Array3<f64> {
    x.select(Axis(2), &cut.positions(rank).collect::<Vec<_>>())
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
            for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
                let want = held(want.view(), &cut, group.rank());
                let off = worst(got, &want, |_, _, _| 2e-5);
                assert!(off <= 1.0, "off by {off} times 2e-5, len {len}, {cut:?}");
            }
        }
    }
}

pub fn arrival_does_not_matter(group: &Group) {
    let whole = Whole::<f32>::new(64);
    let cut = Cut::zigzag(64, group.size());
    let mine = whole.held(&cut, group.rank());
    let ring = Ring::new(cut).causal();
    let (q, k, v) = (mine.q.view(), mine.k.view(), mine.v.view());
    let d_out = mine.v.slice(s![.., ..1, .., ..]).broadcast((2, 4, q.dim().2, 9)).unwrap().to_owned();
    let run = |group: &Group| {
        let out = ring.forward(group, q, k, v).unwrap();
        let back = ring.backward(group, (q, k, v), d_out.view(), &out).unwrap();
        (out, back)
    };
    let want = run(group);
    let world = attention_kernels_mpi::mpi::topology::SimpleCommunicator::world();
    for seed in 1..4 {
        let late = Group::new(&world).with_jitter(seed * 77 + 5 * group.rank() as u64);
        assert_eq!(run(&late), want);
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

pub fn gathered_layers_are_attention(group: &Group) {
    let whole = Whole::<f16>::new(33);
    for cut in cuts(33, group.size()) {
        let mine = whole.held(&cut, group.rank());
        assert_eq!(lasp::gather(group, &cut, "k", mine.k.view()).unwrap(), whole.k);
        assert_eq!(lasp::gather(group, &cut, "v", mine.v.view()).unwrap(), whole.v);
    }
}
