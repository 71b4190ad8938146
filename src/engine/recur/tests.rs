//! Every recurrence on every instruction set against its definition.

use ndarray::{Array2, Array3, Array4};

use super::{Arrays, Decay, Gate, Normaliser, Place, Read, Rule, Spec, run_in, workspace_bytes};
use crate::definition::recurrence::{Reference, Token, Update, define, number, row};
use crate::engine::kept::Kept;
use crate::engine::parallel::on_threads;
use crate::engine::recur::Form;
use crate::engine::workspace::Workspace;
use crate::input::tokens::token_dims;
use crate::input::{Lengths, Qkv};
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;

pub(super) fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

pub(super) struct Case {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    a: Array4<f32>,
    b: Array4<f32>,
    tokens: Array3<f32>,
    channels: Array4<f32>,
    beta: Array3<f32>,
    bonus: Array2<f32>,
}

/// How strong decays are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Gates {
    Mild,
    /// Too strong for a chunk's keys to be divided by, not for a sub-block's.
    Steady,
    Strong,
    /// Now and then everything is forgotten.
    Cut,
    /// Mild or strong, or just between, by the channel.
    Mixed,
}

impl Case {
    pub(super) fn new([batch, heads, shared, len, dim, value_dim]: [usize; 6], gates: Gates) -> Self {
        let mut next = noise(7);
        let unit = |mut x: Array4<f32>| {
            for mut row in x.rows_mut() {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
                row.mapv_inplace(|x| x / norm);
            }
            x
        };
        let mut array = |heads, dim| Array4::from_shape_simple_fn((batch, heads, len, dim), &mut next);
        let (q, k, v) = (array(shared, dim), unit(array(shared, dim)), array(heads, value_dim));
        let (a, b) = (unit(array(heads, dim)), unit(array(heads, dim)).mapv(|x| 0.7 * x));
        let mut next = noise(8);
        let mut gate = || {
            let x = next().abs();
            match gates {
                Gates::Mild | Gates::Mixed => -0.1 * x,
                Gates::Steady => -1.5 - x,
                Gates::Strong => -12.0 * x * x,
                Gates::Cut if x > 0.9 => {
                    if x > 0.95 {
                        f32::NEG_INFINITY
                    } else {
                        -1e4
                    }
                }
                Gates::Cut => -0.5 * x,
            }
        };
        let tokens = Array3::from_shape_simple_fn((batch, heads, len), &mut gate);
        let mut channels = Array4::from_shape_simple_fn((batch, heads, len, dim), &mut gate);
        if matches!(gates, Gates::Mixed) {
            // Over 16 tokens they come to about -0.8, -41 and -100.
            for ((_, _, _, c), x) in channels.indexed_iter_mut() {
                *x *= [1.0, 51.0, 125.0][c / 16 % 3];
            }
        }
        let beta = Array3::from_shape_simple_fn((batch, heads, len), || next().abs());
        let bonus = Array2::from_shape_simple_fn((heads, dim), &mut next);
        Self { q, k, v, a, b, tokens, channels, beta, bonus }
    }

    pub(super) fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    pub(super) fn arrays(&self, spec: &Spec<'_>) -> Arrays<'_> {
        let any = |x| AnyArray::F32(Heads::new(x));
        Arrays {
            decay: match spec.decay {
                Decay::None => Gate::None,
                Decay::Scalar => Gate::Token(self.tokens.view()),
                Decay::Channel => Gate::Channel(self.channels.view()),
            },
            beta: (spec.rule == Rule::Delta).then(|| self.beta.view()),
            low_rank: (spec.rule == Rule::LowRank).then(|| (any(self.a.view()), any(self.b.view()))),
            bonus: self.bonus.as_slice(),
            ..Arrays::new(&self.qkv(), spec.dims.q_heads)
        }
    }

    fn reference(&self, spec: &Spec<'_>, state: Option<&Array4<f32>>) -> Reference {
        define(spec, state, |at| self.token(spec, at)).unwrap()
    }

    pub(super) fn token(&self, spec: &Spec<'_>, at: &Place) -> Token {
        let heads = spec.dims.q_heads;
        Token {
            q: row(&self.q.view(), at, heads),
            k: row(&self.k.view(), at, heads),
            v: row(&self.v.view(), at, heads),
            decay: match spec.decay {
                Decay::None => vec![1.0; spec.state_dim],
                Decay::Scalar => vec![number(&self.tokens.view(), at, heads).exp(); spec.state_dim],
                Decay::Channel => row(&self.channels.view(), at, heads).into_iter().map(f64::exp).collect(),
            },
            update: match spec.rule {
                Rule::Add => Update::Add,
                Rule::Delta => Update::Delta { beta: number(&self.beta.view(), at, heads) },
                Rule::LowRank => {
                    Update::LowRank { a: row(&self.a.view(), at, heads), b: row(&self.b.view(), at, heads) }
                }
            },
            bonus: self.bonus.row(at.head).iter().map(|&x| f64::from(x)).collect(),
        }
    }
}

/// Which recurrence is checked, on what.
#[derive(Clone, Copy, Debug)]
struct Check<'a> {
    sizes: [usize; 6],
    gates: Gates,
    decay: Decay,
    rule: Rule,
    read: Read,
    normaliser: Option<Normaliser>,
    offsets: Option<&'a [usize]>,
    threads: usize,
}

/// The additive rule of mildly decaying channels.
const PLAIN: Check<'static> = Check {
    sizes: [1; 6],
    gates: Gates::Mild,
    decay: Decay::Channel,
    rule: Rule::Add,
    read: Read::After,
    normaliser: None,
    offsets: None,
    threads: 1,
};

fn check(what: Check<'_>) -> f64 {
    check_case(what, &Case::new(what.sizes, what.gates))
}

/// The largest share of its bound that an output is off.
fn check_case(what: Check<'_>, case: &Case) -> f64 {
    let Check { sizes, decay, rule, read, normaliser, offsets, threads, .. } = what;
    let qkv = case.qkv();
    let qkv = match offsets {
        Some(offsets) => qkv.packed(offsets, offsets),
        None => qkv,
    };
    let dims = token_dims(&qkv).unwrap();
    let mut worst = 0f64;
    for isa in Isa::available() {
        for form in [Form::Chunked, Form::Recurrent, Form::Auto] {
            let lengths = match offsets {
                Some(offsets) => Lengths::Packed { queries: offsets, keys: offsets },
                None => Lengths::Full,
            };
            let spec = Spec {
                dims,
                lengths,
                steps: 1,
                joined: false,
                silent: false,
                state_dim: dims.head_dim,
                decay,
                rule,
                read,
                scale: 0.3,
                normaliser,
                form,
                isa,
            };
            let mut next = noise(9);
            let state = Array4::from_shape_simple_fn(spec.state_shape(), || {
                next() * 0.5 + normaliser.map_or(0.0, |_| 9.0)
            });
            let want = case.reference(&spec, Some(&state));
            let mut got = state.clone();
            let out_dim = (sizes[0], sizes[1], sizes[3], sizes[5]);
            let mut out = Array4::from_elem(out_dim, f32::NAN);
            let mut workspace = Workspace::with_capacity(workspace_bytes(&spec));
            let arrays = case.arrays(&spec);
            on_threads(threads, || {
                let arena = workspace.arena(workspace_bytes(&spec)).unwrap();
                run_in(&spec, &arrays, got.as_slice_mut().map(Kept::own), out.view_mut(), arena);
            });
            let what = format!("{what:?} {isa} {form:?}");
            for ((b, h, t, c), &x) in out.indexed_iter() {
                let (want, bound) = (want.out[[b, h, t, c]], want.bound[[b, h, t]]);
                let off = (f64::from(x) - want).abs();
                assert!(
                    off <= bound,
                    "{what}: [{b}, {h}, {t}, {c}] is {x:e}, not {want:e}: off by {off:e}, bound {bound:e}"
                );
                if bound > 0.0 {
                    worst = worst.max(off / bound);
                }
            }
            let scale = want.state.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
            for (x, want) in got.iter().zip(&want.state) {
                assert!((f64::from(*x) - want).abs() <= 1e-4 * scale, "{what}: state {x:e}, not {want:e}");
            }
        }
    }
    worst
}

const SIZES: [[usize; 6]; 9] = [
    [1, 1, 1, 1, 1, 1],
    [2, 2, 2, 7, 3, 5],
    [1, 2, 1, 63, 16, 16],
    [1, 1, 1, 64, 16, 70],
    [1, 4, 2, 65, 33, 16],
    [1, 1, 1, 197, 64, 64],
    [1, 2, 2, 33, 40, 24],
    [1, 1, 1, 100, 128, 130],
    [2, 1, 1, 0, 16, 16],
];

#[test]
fn every_recurrence_keeps_to_its_definition() {
    for gates in [Gates::Mild, Gates::Steady, Gates::Strong, Gates::Cut, Gates::Mixed] {
        for decay in [Decay::None, Decay::Scalar, Decay::Channel] {
            for rule in [Rule::Add, Rule::Delta, Rule::LowRank] {
                for read in [Read::After, Read::Before] {
                    if (read == Read::Before && rule != Rule::Add)
                        || (decay == Decay::None && !matches!(gates, Gates::Mild))
                        || (decay == Decay::Scalar && matches!(gates, Gates::Mixed))
                    {
                        continue;
                    }
                    let mut worst = 0f64;
                    for sizes in SIZES {
                        for threads in [1, 3] {
                            let what = Check { sizes, gates, decay, rule, read, threads, ..PLAIN };
                            worst = worst.max(check(what));
                        }
                    }
                    println!("{gates:?} {decay:?} {rule:?} {read:?}: {worst:.3}");
                }
            }
        }
    }
}

/// Keys that no decay may divide, and queries of which products with decays
/// must keep their digits.
#[test]
fn huge_keys_and_tiny_queries() {
    let sizes = [1, 1, 1, 150, 40, 24];
    for (gates, read) in
        [(Gates::Mild, Read::After), (Gates::Mixed, Read::After), (Gates::Mixed, Read::Before)]
    {
        let mut case = Case::new(sizes, gates);
        for ((_, _, t, _), x) in case.k.indexed_iter_mut() {
            *x *= if t % 37 == 5 { 1e25 } else { 1e18 };
        }
        case.q.mapv_inplace(|x| x * 1e-20);
        let what = Check { sizes, gates, read, ..PLAIN };
        check_case(what, &case);
        case.k.mapv_inplace(|x| x * 1e-30);
        check_case(what, &case);
    }
}

#[test]
fn sums_of_weights_and_packed_sequences() {
    for threads in [1, 3] {
        let sizes = [1, 2, 2, 130, 16, 16];
        check(Check { sizes, decay: Decay::None, read: Read::Total, threads, ..PLAIN });
        let packed =
            Check { sizes: [1, 1, 1, 130, 16, 20], offsets: Some(&[0, 0, 5, 70, 130]), threads, ..PLAIN };
        check(Check { decay: Decay::Scalar, ..packed });
        check(Check { rule: Rule::Delta, ..packed });
    }
}
