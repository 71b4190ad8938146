//! Gradients on every instruction set against their definition.

use ndarray::Array4;

use super::{Call, Dim, Gradients, run, workspace_bytes};
use crate::definition::recurrence_backward::differentiate;
use crate::engine::parallel::on_threads;
use crate::engine::recur::Form;
use crate::engine::recur::tests::{Case, Gates, noise};
use crate::engine::recur::{Decay, Place, Read, Rule, Spec};
use crate::engine::workspace::Workspace;
use crate::input::Lengths;
use crate::input::tokens::token_dims;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;

/// How far gradients may be off: the root mean square of errors as a share of
/// that of the gradients. Corrections amplify.
fn bound(rule: Rule) -> f64 {
    if rule == Rule::Add { 2e-6 } else { 5e-5 }
}

struct Sizes<'a> {
    /// `batch, heads, heads of q and k, len, head_dim, value_dim`
    sizes: [usize; 6],
    offsets: Option<&'a [usize]>,
    /// Whether there is a state at the start and a gradient of that at the end.
    states: bool,
}

fn spec<'a>(x: &Sizes<'a>, case: &Case, decay: Decay, rule: Rule, read: Read, isa: Isa) -> Spec<'a> {
    let (qkv, lengths) = match x.offsets {
        Some(offsets) => {
            (case.qkv().packed(offsets, offsets), Lengths::Packed { queries: offsets, keys: offsets })
        }
        None => (case.qkv(), Lengths::Full),
    };
    let dims = token_dims(&qkv).unwrap();
    Spec {
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
        normaliser: None,
        form: Form::Auto,
        isa,
    }
}

/// The sizes of the gradients of a case.
fn dims(spec: &Spec<'_>, [batch, heads, shared, len, dim, value_dim]: [usize; 6]) -> Gradients<Dim> {
    Gradients {
        q: (batch, shared, len, dim),
        k: Some((batch, shared, len, dim)),
        v: (batch, heads, len, value_dim),
        decay: match spec.decay {
            Decay::None => None,
            Decay::Scalar => Some((batch, heads, len, 1)),
            Decay::Channel => Some((batch, heads, len, dim)),
        },
        beta: (spec.rule == Rule::Delta).then_some((batch, heads, len, 1)),
        a: (spec.rule == Rule::LowRank).then_some((batch, heads, len, dim)),
        b: (spec.rule == Rule::LowRank).then_some((batch, heads, len, dim)),
        rate: None,
        bias: None,
        bonus: (spec.read == Read::Before).then_some((1, heads, 1, dim)),
        skip: None,
        state: spec.state_shape(),
    }
}

fn any(x: &Array4<f32>) -> AnyArray<'_> {
    AnyArray::F32(Heads::new(x.view()))
}

/// The gradients that the engine gives, on that many threads.
fn kernel(
    spec: &Spec<'_>,
    case: &Case,
    dims: &Gradients<Dim>,
    d_out: &Array4<f32>,
    states: Option<&(Array4<f32>, Array4<f32>)>,
    threads: usize,
) -> Gradients<Array4<f32>> {
    let mut got = dims.map(|dim| Array4::from_elem(dim, f32::NAN));
    let arrays = case.arrays(spec);
    let call = Call {
        spec,
        source: &arrays,
        state: states.map(|x| any(&x.0)),
        d_out: any(d_out),
        d_state: states.map(|x| any(&x.1)),
    };
    on_threads(threads, || {
        // NaN in what is not meant to be read.
        let mut workspace = Workspace::with_capacity(workspace_bytes(spec, dims));
        let words = workspace.capacity() / 4;
        workspace.arena(0).unwrap().take::<f32>(words).fill(f32::NAN);
        run(&call, got.each_mut().map(|x| x.view_mut()), &mut workspace).unwrap();
    });
    got
}

fn list<X>(x: Gradients<X>) -> Vec<(&'static str, X)> {
    let mut list = vec![("q", x.q), ("v", x.v), ("state", x.state)];
    let rest = [("k", x.k), ("decay", x.decay), ("beta", x.beta), ("a", x.a), ("b", x.b), ("bonus", x.bonus)];
    list.extend(rest.into_iter().filter_map(|(name, x)| Some((name, x?))));
    list
}

/// Returns the largest share of the bound.
fn check(x: &Sizes<'_>, gates: Gates, decay: Decay, (rule, read): (Rule, Read)) -> f64 {
    let case = Case::new(x.sizes, gates);
    let mut worst = 0f64;
    let mut want = None;
    for isa in Isa::available() {
        let spec = spec(x, &case, decay, rule, read, isa);
        let dims = dims(&spec, x.sizes);
        let mut next = noise(9);
        let mut random = |dim| Array4::from_shape_simple_fn(dim, &mut next);
        let [batch, heads, _, len, _, value_dim] = x.sizes;
        let d_out = random((batch, heads, len, value_dim));
        let states = x.states.then(|| (random(spec.state_shape()), random(spec.state_shape())));
        let want = want.get_or_insert_with(|| {
            let (state, d_state) = match &states {
                Some((state, d_state)) => (Some(state.view()), Some(d_state.view())),
                None => (None, None),
            };
            let token = |at: &Place| case.token(&spec, at);
            list(differentiate(&spec, &dims, state, d_out.view(), d_state, token, |_, _, _, _| {}))
        });
        let once = kernel(&spec, &case, &dims, &d_out, states.as_ref(), 1);
        let more = kernel(&spec, &case, &dims, &d_out, states.as_ref(), 3);
        for (((name, got), (_, more)), (_, want)) in list(once).into_iter().zip(list(more)).zip(&*want) {
            let what =
                format!("{name}: {:?} {:?} {gates:?} {decay:?} {rule:?} {read:?} {isa}", x.sizes, x.offsets);
            assert!(got.iter().zip(&more).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: threads matter");
            let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
            let off = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
            assert!(off <= bound(rule) * size, "{what}: off by {off:e}, of {size:e}");
            if size > 0.0 {
                worst = worst.max(off / size / bound(rule));
            }
        }
    }
    worst
}

const SIZES: [[usize; 6]; 11] = [
    [2, 1, 1, 0, 16, 16],
    [1, 1, 1, 1, 1, 1],
    [2, 2, 2, 7, 3, 5],
    [1, 2, 1, 63, 16, 16],
    [1, 1, 1, 64, 16, 70],
    [1, 4, 2, 65, 33, 16],
    [1, 1, 1, 197, 64, 64],
    [1, 2, 2, 33, 40, 24],
    [1, 1, 1, 100, 128, 130],
    [1, 2, 1, 5, 0, 4],
    [1, 1, 1, 5, 4, 0],
];

const RULES: [(Rule, Read); 4] = [
    (Rule::Add, Read::After),
    (Rule::Delta, Read::After),
    (Rule::Add, Read::Before),
    (Rule::LowRank, Read::After),
];

#[test]
fn gradients_keep_to_their_definition() {
    for gates in [Gates::Mild, Gates::Steady, Gates::Strong, Gates::Cut] {
        for decay in [Decay::None, Decay::Scalar, Decay::Channel] {
            if decay == Decay::None && !matches!(gates, Gates::Mild) {
                continue;
            }
            for rule in RULES {
                let mut worst = 0f64;
                for sizes in SIZES {
                    for states in [true, false] {
                        worst = worst.max(check(&Sizes { sizes, offsets: None, states }, gates, decay, rule));
                    }
                }
                println!("{gates:?} {decay:?} {rule:?}: {worst:.3}");
            }
        }
    }
}

#[test]
fn packed_sequences() {
    let offsets = [0, 0, 5, 70, 130];
    for (decay, rule) in [(Decay::Scalar, RULES[0]), (Decay::Channel, RULES[1]), (Decay::Channel, RULES[2])] {
        let x = Sizes { sizes: [1, 4, 2, 130, 16, 20], offsets: Some(&offsets), states: true };
        check(&x, Gates::Cut, decay, rule);
    }
}

/// More chunks than states are kept of.
#[test]
fn long_sequences() {
    let len = 2 * super::SEGMENT * 64 + 5;
    for (decay, rule) in [(Decay::Scalar, RULES[0]), (Decay::Scalar, RULES[1]), (Decay::Channel, RULES[3])] {
        let x = Sizes { sizes: [1, 1, 1, len, 5, 4], offsets: None, states: true };
        check(&x, Gates::Mild, decay, rule);
    }
}
