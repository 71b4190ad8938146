//! Random calls over the public API, compared with the definitions: whatever
//! the sizes, strides, values, lengths and gates are, a call is refused by every
//! method in the same words, or its output keeps to the error bound, NaN
//! included. Nothing panics.
//!
//! ```text
//! cargo run --release --package fuzz -- --seconds 60 [--target NAME] [--seed N]
//! cargo run --release --package fuzz -- --target NAME --case SEED
//! ```
//!
//! A case is made from a seed of its own, which is printed if it fails.

mod case;
// The numbers and layouts of the tests, of which the fuzzer uses a part.
#[allow(dead_code)]
#[path = "../../tests/common/random.rs"]
mod random;
#[allow(dead_code)]
#[path = "../../tests/common/stored.rs"]
mod stored;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use attention_kernels::catalog::{Catalogued, ENTRIES, Entry, Trial};
use attention_kernels::element::{DType, Element};
use attention_kernels::linear::{
    ChannelGated, DeltaNet, DeltaQkv, Form, Gla, Lightning, RetNet, S6, S6Input, SimpleGla, TokenGated,
};
use attention_kernels::simd::Isa;
use attention_kernels::{Bounded, Error, Input, Recurrent, Workspace};
use half::{bf16, f16};
use ndarray::{Array3, Array4};

use case::{Case, Range, Rows, Sizes, Values};
use random::Random;
use stored::Layout;

type Target = (&'static str, fn(&mut Random));

const TARGETS: [Target; 5] =
    [("shapes", shapes), ("strides", strides), ("values", values), ("offsets", offsets), ("gates", gates)];

const STANDARD: [Layout; 3] = [Layout::Standard; 3];
const NORMAL: [Values; 3] = [Values::Normal(1.0); 3];

fn text<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

thread_local!(static WORKSPACE: Cell<Workspace> = Cell::default());

fn isa(random: &mut Random) -> Isa {
    let all: Vec<Isa> = Isa::available().collect();
    random.pick(&all)
}

/// Mechanisms whose definition does not take the kernel's choice of keys.
const CHOOSE: [&str; 2] = ["causal HyperAttention", "LongHeads"];

/// Whether outputs keep to their bounds. Where numbers leave the range of
/// `f32`, as they may on the way with products as large as `range`, all that
/// counts is that NaN shows. Products below the range are off by the smallest
/// number, times what multiplies them.
fn compare<T: Element>(
    out: &Array4<T>,
    want: &Array4<f64>,
    bound: &Array3<f64>,
    (range, chooses): (Range, bool),
    what: &str,
) {
    const LARGE: f64 = 1e37;
    // Scores that are NaN in `f32` and a large number in `f64`: the definition
    // chooses its own keys, and a NaN among them is not the kernel's.
    if chooses && range.product > LARGE {
        return;
    }
    let underflow = 64.0 * 2f64.powi(-149) * range.number;
    for ((at, got), &want) in out.indexed_iter().zip(want) {
        let (got, bound) = (got.to_f64(), bound[[at.0, at.1, at.2]]);
        if want.is_nan() {
            assert!(!got.is_finite(), "{what} {at:?}: {got} for NaN");
            continue;
        }
        // The smallest subnormal number, and what rounds to infinity.
        let (smallest, largest) = match T::DTYPE {
            DType::F32 => (2f64.powi(-149), LARGE),
            DType::F16 => (2f64.powi(-24), 65504.0),
            DType::Bf16 => (2f64.powi(-133), LARGE),
        };
        let rounding = want.abs() * T::ROUNDING + smallest;
        let most = want.abs() + bound;
        if most.is_nan() || most > largest || range.product > LARGE {
            continue;
        }
        let off = (got - want).abs();
        assert!(
            off <= bound + rounding + underflow,
            "{what} {at:?}: {got:e} for {want:e}, off {off:e}, bound {bound:e}"
        );
    }
}

/// Runs a trial over a used workspace.
fn run<T: Catalogued>(entry: &Entry, case: &Case<T>, isa: Isa, seed: u64, what: &str) {
    let x = case.x();
    let Ok(trial) = entry.trial::<T>(x, Some(isa), seed) else { return };
    let trial: &dyn Trial<T> = &*trial;
    let Sizes { batch, q_heads, q_len, value_dim, .. } = case.sizes;
    let mark = T::from_f32(-123.25);
    let mut out = Array4::from_elem((batch, q_heads, q_len, value_dim), mark);
    let mut workspace = WORKSPACE.take();
    workspace.poison();
    let answer = text(trial.forward_into(out.view_mut(), &mut workspace));
    WORKSPACE.set(workspace);
    let others = [
        text(trial.workspace_bytes()),
        text(trial.reference()),
        text(trial.error_bound()),
        text(trial.cost()),
    ];
    // An output of the wrong shape is this driver's.
    if answer.starts_with("out:") {
        return;
    }
    assert!(others.iter().all(|other| *other == answer), "{what}: {answer}; {others:#?}");
    match (trial.reference(), trial.error_bound()) {
        (Ok(want), Ok(bound)) => {
            let chooses = CHOOSE.contains(&entry.card.name);
            compare(&out, &want, &bound, (case.range(), chooses), what);
        }
        _ => assert!(out.iter().all(|x| x.to_f64() == mark.to_f64()), "{what}: written to"),
    }
}

/// The same in a random type.
fn run_any(random: &mut Random, entry: &Entry, spec: impl Fn(&mut Random) -> Spec) {
    let (isa, seed) = (isa(random), random.bits());
    let Spec { sizes, rows, layouts, values } = spec(random);
    let what = format!("{} {isa} {sizes:?} {rows:?} {layouts:?} {values:?}", entry.card.name);
    match random.below(4) {
        0 => run::<f16>(
            entry,
            &Case::new(random, sizes, rows, layouts, values),
            isa,
            seed,
            &format!("{what} f16"),
        ),
        1 => run::<bf16>(
            entry,
            &Case::new(random, sizes, rows, layouts, values),
            isa,
            seed,
            &format!("{what} bf16"),
        ),
        _ => run::<f32>(entry, &Case::new(random, sizes, rows, layouts, values), isa, seed, &what),
    }
}

/// What a case is made from.
struct Spec {
    sizes: Sizes,
    rows: Rows,
    layouts: [Layout; 3],
    values: [Values; 3],
}

fn entry(random: &mut Random) -> &'static Entry {
    &ENTRIES[random.below(ENTRIES.len())]
}

/// Sizes that fit and sizes that do not.
fn shapes(random: &mut Random) {
    let entry = entry(random);
    run_any(random, entry, |random| {
        let mut sizes = Sizes::random(random, entry.tokens);
        if random.one_in(3) {
            sizes.spoil(random);
        }
        Spec { sizes, rows: Rows::Full, layouts: STANDARD, values: NORMAL }
    });
}

/// Every layout, stride 0 too.
fn strides(random: &mut Random) {
    let entry = entry(random);
    run_any(random, entry, |random| {
        let sizes = Sizes::random(random, entry.tokens);
        let layouts = std::array::from_fn(|_| random.pick(&Layout::ALL));
        Spec { sizes, rows: Rows::Full, layouts, values: NORMAL }
    });
}

/// NaN, infinities, the largest and the smallest numbers.
fn values(random: &mut Random) {
    let entry = entry(random);
    run_any(random, entry, |random| {
        let sizes = Sizes::random(random, entry.tokens);
        let values = std::array::from_fn(|_| match random.below(4) {
            0 => Values::Normal(random.pick(&[1e-20, 1e-3, 10.0, 1e4])),
            1 => Values::Normal(1.0),
            2 => Values::Special(3 + random.below(60)),
            _ => Values::Special(300),
        });
        Spec { sizes, rows: Rows::Full, layouts: STANDARD, values }
    });
}

/// Lengths and offsets, right ones and wrong ones.
fn offsets(random: &mut Random) {
    let entry = entry(random);
    run_any(random, entry, |random| {
        let mut sizes = Sizes::random(random, entry.tokens);
        let right = !random.one_in(4);
        let rows = Rows::random(random, &mut sizes, entry.tokens, right);
        Spec { sizes, rows, layouts: STANDARD, values: NORMAL }
    });
}

/// Kernel and definition of a recurrence, whole and from a state.
fn recurrence<X: Input<Out = f32>, A: Recurrent<X> + Bounded<X>>(what: &str, mechanism: &A, x: X) {
    let answer = text(mechanism.forward(x));
    let others = [
        text(mechanism.workspace_bytes(x)),
        text(mechanism.reference(x)),
        text(mechanism.error_bound(x)),
        text(mechanism.cost(x)),
        text(mechanism.initial_state(x)),
    ];
    assert!(others.iter().all(|other| *other == answer), "{what}: {answer}; {others:#?}");
    let Ok(out) = mechanism.forward(x) else { return };
    let (want, bound) =
        (mechanism.reference(x).expect("a definition"), mechanism.error_bound(x).expect("a bound"));
    compare(&out, &want, &bound, (Range::ONE, false), what);
    let mut state = mechanism.initial_state(x).expect("a state");
    let again = mechanism.prefill(x, &mut state).expect("an output");
    compare(&again, &want, &bound, (Range::ONE, false), what);
}

/// Log decays from nothing to everything, step sizes, forms.
fn gates(random: &mut Random) {
    let (isa, form) = (isa(random), random.pick(&[Form::Auto, Form::Chunked, Form::Recurrent]));
    let mut sizes = Sizes::random(random, true);
    let heads = sizes.kv_heads;
    sizes.q_heads = heads;
    let rows = Rows::random(random, &mut sizes, true, true);
    let size = random.pick(&[1e-20f32, 1e-10, 1.0, 1e5]);
    let values = [Values::Normal(1.0), Values::Normal(1.0), Values::Normal(size)];
    let what = format!("{isa} {form:?} {sizes:?} {rows:?} values {size:e}");
    let case = Case::<f32>::new(random, sizes, rows, STANDARD, values);
    let x = case.x();
    let kind = random.below(6);
    let gate = |random: &mut Random| match kind {
        0 => 0.0,
        1 => random.pick(&[0.0, f32::NEG_INFINITY, -1e9]),
        2 => -3.0 * random.uniform() as f32,
        3 => -0.01 * random.uniform() as f32,
        4 => -40.0 * random.uniform() as f32,
        _ => random.pick(&[0.0, -1e-8, -0.1, -3.0, -20.0, -88.0, -104.0, f32::NEG_INFINITY]),
    };
    let (b, n, d) = (sizes.batch, sizes.q_len, sizes.head_dim);
    let tokens = Array3::from_shape_simple_fn((b, heads, n), || gate(random));
    let channels = Array4::from_shape_simple_fn((b, heads, n, d), || gate(random));
    match random.below(6) {
        0 => {
            let gla = SimpleGla::builder().form(form).isa(isa).build().expect("options");
            let x = TokenGated { qkv: x, log_decay: tokens.view() };
            recurrence(&format!("simple gla {what} gates {kind}"), &gla, x);
        }
        1 | 2 => {
            let gla = Gla::builder().form(form).isa(isa).build().expect("options");
            let x = ChannelGated { qkv: x, log_decay: channels.view() };
            recurrence(&format!("gla {what} gates {kind}"), &gla, x);
        }
        3 => {
            let beta = Array3::from_shape_simple_fn((b, heads, n), || 0.05 * random.uniform() as f32);
            let delta = DeltaNet::builder().form(form).isa(isa).build().expect("options");
            recurrence(&format!("deltanet {what}"), &delta, DeltaQkv { qkv: x, beta: beta.view() });
        }
        4 => {
            let channels = sizes.value_dim;
            let rates = Array3::from_shape_simple_fn((heads, channels, d), || gate(random).max(-1e9));
            let steps = Array4::from_shape_simple_fn((b, heads, n, channels), || random.uniform() as f32);
            let s6 = S6::builder(rates).isa(isa).build().expect("options");
            let x = S6Input::new(x.v, steps.view(), x.k, x.q);
            let x = match &case.rows {
                Rows::Packed(offsets, _) => x.packed(offsets),
                Rows::Padded(lengths) => x.padded(lengths),
                _ => x,
            };
            recurrence(&format!("s6 {what} gates {kind}"), &s6, x);
        }
        _ => {
            let retnet = RetNet::builder(heads).form(form).isa(isa).build().expect("options");
            recurrence(&format!("retnet {what}"), &retnet, x);
            let lightning = Lightning::builder(heads).form(form).isa(isa).build().expect("options");
            recurrence(&format!("lightning {what}"), &lightning, x);
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut seconds, mut seed, mut only, mut single) = (10u64, 0u64, None, None);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        let number = || value.parse::<u64>().unwrap_or_else(|error| panic!("{argument} {value}: {error}"));
        match argument.as_str() {
            "--seconds" => seconds = number(),
            "--seed" => seed = number(),
            "--case" => single = Some(number()),
            "--target" => only = Some(value),
            _ => panic!("{argument}: expected --seconds, --seed, --target or --case"),
        }
    }
    let targets: Vec<Target> =
        TARGETS.into_iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)).collect();
    assert!(!targets.is_empty(), "--target: expected one of {:?}", TARGETS.map(|(name, _)| name));
    if let Some(case) = single {
        targets.iter().for_each(|(_, target)| target(&mut Random::new(case)));
        return;
    }
    // Faults are told below, once each.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut random, mut faults) = (Random::new(seed), 0);
    for (name, target) in &targets {
        let (start, mut count) = (Instant::now(), 0);
        let time = Duration::from_secs(seconds) / targets.len() as u32;
        while start.elapsed() < time {
            let case = random.bits();
            count += 1;
            if let Err(fault) = catch_unwind(AssertUnwindSafe(|| target(&mut Random::new(case)))) {
                let fault = fault
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| fault.downcast_ref::<&str>().map(ToString::to_string));
                println!("--target {name} --case {case}: {}", fault.unwrap_or_default());
                faults += 1;
            }
        }
        println!("{name}: {count} cases");
    }
    if faults > 0 {
        println!("{faults} faults");
        std::process::exit(1);
    }
}
