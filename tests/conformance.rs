//! Every mechanism of the catalogue on every instruction set, storage type
//! and number of threads: the kernel is off the definition by at most the
//! published bound, writes what it should and nothing else, and needs the
//! memory that it says.

mod common;

use std::fmt::{self, Display};
use std::num::NonZero;
use std::sync::Mutex;
use std::thread;

use attention_kernels::catalog::{Catalogued, ENTRIES, Entry, Trial};
use attention_kernels::simd::Isa;
use attention_kernels::{Qkv, Workspace};
use common::{Layout, Output, Random, Ratio, Stored, check, on_threads, same_bits};
use half::{bf16, f16};
use ndarray::{Array3, Array4};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

/// Sizes and layouts of a call.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    kv_heads: usize,
    group: usize,
    q_len: usize,
    kv_len: usize,
    head_dim: usize,
    value_dim: usize,
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    seed: u64,
}

impl Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, kv_heads, group, q_len, kv_len, head_dim, value_dim, q, k, v, out, seed } = self;
        write!(
            f,
            "batch {batch}, heads {}/{kv_heads}, lengths {q_len}/{kv_len}, dims {head_dim}/{value_dim}, \
             q {q:?}, k {k:?}, v {v:?}, out {out:?}, seed {seed}",
            kv_heads * group
        )
    }
}

/// The arrays of a case.
struct Arrays<T> {
    q: Stored<T>,
    k: Stored<T>,
    v: Stored<T>,
}

impl<T: Catalogued> Arrays<T> {
    fn new(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let mut next = || T::from_f32(random.normal() as f32);
        let &Case { batch, kv_heads, group, q_len, kv_len, head_dim, value_dim, .. } = case;
        Self {
            q: Stored::from_fn((batch, kv_heads * group, q_len, head_dim), case.q, &mut next),
            k: Stored::from_fn((batch, kv_heads, kv_len, head_dim), case.k, &mut next),
            v: Stored::from_fn((batch, kv_heads, kv_len, value_dim), case.v, &mut next),
        }
    }

    fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

/// The table of the README says what is tested here: entries that it calls cross take as
/// many queries as they like, and the random cases hold them to their definitions.
#[test]
fn patterns_are_those_that_are_tested() {
    for entry in ENTRIES {
        let patterns = entry.patterns().unwrap_or_else(|error| panic!("{}: {error}", entry.card.name));
        assert_eq!(patterns.cross, !entry.tokens, "{}", entry.card.name);
        let mut random = Random::new(7);
        let mut array =
            |heads, len| Array4::from_shape_simple_fn((1, heads, len, 16), || random.normal() as f32);
        let (q, k) = (array(4, 40), array(2, 56));
        let taken = entry.trial(Qkv::new(q.view(), k.view(), k.view()), None, 1).and_then(|x| x.reference());
        assert!(entry.tokens || taken.is_ok(), "{}: {:?}", entry.card.name, taken.err());
    }
}

/// Holds an entry to its definition on a case; returns the largest errors of
/// outputs and of weights.
fn conforms<T: Catalogued>(entry: &Entry, case: &Case, with_weights: bool) -> (Ratio, Ratio) {
    let case = &Case { kv_len: if entry.tokens { case.q_len } else { case.kv_len }, ..*case };
    let arrays = Arrays::<T>::new(case);
    let what = format!("{} on {}, {case}", entry.card.name, T::DTYPE.name());
    if entry.card.name.ends_with("Performer") && case.head_dim == 0 {
        // There are no random features of nothing.
        let refusal = entry.trial(arrays.qkv(), None, case.seed).err();
        assert!(refusal.is_some_and(|error| error.to_string().starts_with("features: ")), "{what}");
        return (Ratio::default(), Ratio::default());
    }
    let trial = |isa| {
        let trial = entry.trial(arrays.qkv(), isa, case.seed);
        trial.unwrap_or_else(|error| panic!("{what}: cannot be built: {error}"))
    };
    let mut ratios = (Ratio::default(), Ratio::default());
    let defined = match trial(None).reference() {
        Ok(reference) => reference,
        Err(error) => {
            // A tree needs a key for each of its nodes; nothing else refuses.
            assert!(entry.card.name == "tree" && case.q_len > case.kv_len, "{what}: refused: {error}");
            for isa in Isa::available() {
                refuses(trial(Some(isa)).as_ref(), case, &error, &what);
            }
            return ratios;
        }
    };
    let bound = trial(None).error_bound().unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut workspace = Workspace::new();
    for isa in Isa::available() {
        let trial = trial(Some(isa));
        // Where scores are nearly equal, each selects its own keys.
        let own = entry.selects.then(|| {
            let fail = |error| -> ! { panic!("{what}, {isa:?}: {error}") };
            assert_eq!(trial.selection_error().unwrap_or_else(|e| fail(e)), None, "{what}, {isa:?}");
            (trial.reference().unwrap_or_else(|e| fail(e)), trial.error_bound().unwrap_or_else(|e| fail(e)))
        });
        let (defined, bound) = own.as_ref().map_or((&defined, &bound), |(defined, bound)| (defined, bound));
        let runs = [1, 2].map(|threads| {
            let what = format!("{what}, {isa:?}, {threads} threads");
            let got = on_threads(threads, || run(trial.as_ref(), case, &mut workspace, &what));
            ratios.0.join(check(&what, &got, defined, bound));
            got
        });
        assert!(same_bits(&runs[0], &runs[1]), "{what}, {isa:?}: the number of threads changes bits");
    }
    if with_weights && entry.weighs {
        ratios.1 = conforming_weights(entry, case, &arrays, &what);
    }
    ratios
}

/// Runs a kernel, in memory of just the size that it asks for if that is
/// possible and in what `dirty` holds otherwise.
fn run<T: Catalogued>(trial: &dyn Trial<T>, case: &Case, dirty: &mut Workspace, what: &str) -> Array4<T> {
    let dim = (case.batch, case.kv_heads * case.group, case.q_len, case.value_dim);
    let bytes = trial.workspace_bytes().unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut exact = Workspace::with_capacity(bytes);
    let before = exact.capacity();
    let outputs = [&mut exact, dirty].map(|workspace| {
        let mut out = Output::<T>::new(dim, case.out);
        let result = trial.forward_into(out.view_mut(), workspace);
        result.unwrap_or_else(|error| panic!("{what}: {error}"));
        out.read(&what)
    });
    assert_eq!(exact.capacity(), before, "{what}: needs more memory than it says, {bytes}");
    assert!(same_bits(&outputs[0], &outputs[1]), "{what}: what the workspace holds changes bits");
    let [out, _] = outputs;
    out
}

/// Whether a call is refused as its definition is, with nothing written.
fn refuses<T: Catalogued>(trial: &dyn Trial<T>, case: &Case, error: &attention_kernels::Error, what: &str) {
    let dim = (case.batch, case.kv_heads * case.group, case.q_len, case.value_dim);
    let mut out = Output::<T>::new(dim, case.out);
    let refusal = trial.forward_into(out.view_mut(), &mut Workspace::new());
    assert_eq!(refusal.as_ref(), Err(error), "{what}");
    assert_eq!(trial.weights().err().as_ref(), Some(error), "{what}");
    assert!(out.read(&what).iter().all(|x| x.to_f32().is_nan()), "{what}: refused, and yet written");
}

/// Holds the weights that a kernel shows to their definition.
fn conforming_weights<T: Catalogued>(entry: &Entry, case: &Case, arrays: &Arrays<T>, what: &str) -> Ratio {
    // A weight is the output for a value that is 1 for its key: the bound of
    // the output for values of 1 holds for it.
    let values = if entry.card.family == "linear" {
        // A state has a column for each.
        let one = |(_, _, j, c)| T::from_f32(f32::from(j == c));
        Array4::from_shape_fn((case.batch, case.kv_heads, case.kv_len, case.kv_len), one)
    } else {
        Array4::from_elem((case.batch, case.kv_heads, case.kv_len, 1), T::from_f32(1.0))
    };
    let x = Qkv { v: values.view(), ..arrays.qkv() };
    let fail = |error| -> ! { panic!("{what}: {error}") };
    let trial = entry.trial(x.reborrow(), None, case.seed).unwrap_or_else(|e| fail(e));
    let mut bound: Array3<f64> = trial.error_bound().unwrap_or_else(|e| fail(e));
    if entry.card.name == "selective" {
        // Its values have temperatures, 0.23 at least, which weights have not.
        bound /= 0.23;
    }
    let defined = trial.reference_weights().unwrap_or_else(|e| fail(e));
    let mut ratio = Ratio::default();
    for isa in Isa::available() {
        let trial = entry.trial(x.reborrow(), Some(isa), case.seed).unwrap_or_else(|e| fail(e));
        let own = entry.selects.then(|| {
            let defined = trial.reference_weights().unwrap_or_else(|e| fail(e));
            (defined, trial.error_bound().unwrap_or_else(|e| fail(e)))
        });
        let (defined, bound) = own.as_ref().map_or((&defined, &bound), |(defined, bound)| (defined, bound));
        let got = trial.weights().unwrap_or_else(|e| fail(e));
        ratio.join(check(&format!("weights of {what}, {isa:?}"), &got, defined, bound));
        // What is hidden has no weight at all. Where a score below 0 has none,
        // rounding may bring one above it.
        let hidden = got.iter().zip(defined).find(|&(&got, &want)| want == 0.0 && got != 0.0);
        let rectified = entry.card.name == "random-feature attention";
        assert!(rectified || hidden.is_none(), "{what}, {isa:?}: a hidden key has weight, {hidden:?}");
    }
    // Rows that see nothing are 0, not merely near.
    let empty = bound.indexed_iter().filter(|&(_, &bound)| bound == 0.0);
    for ((b, h, i), _) in empty {
        assert!((0..case.kv_len).all(|j| defined[[b, h, i, j]] == 0.0), "{what}: [{b}, {h}, {i}]");
    }
    ratio
}

const LENGTHS: [usize; 18] = [0, 1, 2, 5, 6, 7, 63, 64, 65, 127, 128, 129, 192, 193, 255, 256, 257, 300];

/// Sizes at the edges of tiles, vectors, chunks; each layout at least once.
fn fixed_cases() -> Vec<Case> {
    use Layout::*;
    // [batch, kv_heads, group, q_len, kv_len, head_dim, value_dim]
    let sizes: [[usize; 7]; 41] = [
        // Nothing of something.
        [0, 2, 1, 5, 7, 16, 16],
        [2, 0, 1, 5, 7, 16, 16],
        [2, 1, 2, 0, 7, 16, 16],
        [2, 1, 2, 5, 0, 16, 16],
        [1, 1, 1, 20, 0, 3, 5],
        [2, 1, 1, 5, 7, 0, 16],
        [1, 2, 1, 65, 70, 0, 3],
        [1, 1, 2, 5, 7, 16, 0],
        [1, 1, 2, 20, 7, 16, 0],
        // One of each.
        [1, 1, 1, 1, 1, 1, 1],
        [3, 2, 2, 1, 2, 3, 1],
        [1, 1, 1, 2, 1, 1, 3],
        // Few queries: keys as they lie.
        [2, 2, 4, 1, 300, 64, 64],
        [1, 1, 3, 2, 257, 40, 72],
        [1, 2, 1, 7, 129, 65, 128],
        [3, 1, 2, 6, 64, 16, 40],
        [1, 1, 1, 5, 65, 128, 3],
        [1, 1, 2, 1, 1100, 16, 24],
        [2, 1, 1, 2, 63, 160, 16],
        [1, 1, 4, 3, 192, 72, 65],
        [1, 1, 4, 13, 1100, 8, 12],
        // Many queries: packed tiles.
        [2, 2, 2, 63, 64, 64, 64],
        [1, 1, 2, 64, 63, 40, 65],
        [1, 2, 1, 65, 65, 65, 40],
        [1, 1, 1, 127, 128, 16, 128],
        [1, 1, 1, 128, 129, 128, 16],
        [1, 1, 1, 129, 127, 3, 64],
        [1, 1, 2, 192, 192, 1, 1],
        [1, 1, 1, 193, 255, 72, 65],
        [1, 1, 1, 255, 193, 64, 3],
        [1, 1, 1, 256, 256, 16, 72],
        [1, 1, 1, 257, 257, 40, 16],
        [1, 1, 1, 300, 300, 16, 40],
        [1, 1, 1, 300, 5, 64, 160],
        [1, 1, 4, 13, 256, 160, 1],
        [1, 1, 3, 7, 257, 16, 65],
        [2, 1, 4, 5, 300, 65, 16],
        [3, 3, 1, 16, 17, 24, 24],
        [1, 1, 1, 6, 6, 64, 64],
        [2, 2, 1, 13, 63, 128, 160],
        [8, 2, 2, 17, 33, 16, 16],
    ];
    let mut random = Random::new(1);
    let cases =
        sizes.iter().enumerate().map(|(i, &[batch, kv_heads, group, q_len, kv_len, head_dim, value_dim])| {
            // Every layout of every array in turn, out of step with each other.
            let own = |shift: usize| Layout::OWN[(i + shift) % Layout::OWN.len()];
            let mut case = Case {
                batch,
                kv_heads,
                group,
                q_len,
                kv_len,
                head_dim,
                value_dim,
                q: own(0),
                k: Layout::ALL[(i + i / 8) % Layout::ALL.len()],
                v: Layout::ALL[(3 * i + 1) % Layout::ALL.len()],
                out: own(2 + i / 6),
                seed: random.bits(),
            };
            if i % 5 == 0 {
                (case.q, case.k, case.v, case.out) = (Standard, Standard, Standard, Standard);
            }
            case
        });
    cases.collect()
}

/// Whether a case is among those that entry `index` runs with half types:
/// one in `among`, another for each entry.
fn turn(case: usize, index: usize, among: usize) -> bool {
    (case + index).is_multiple_of(among)
}

/// The entries whose name contains what the variable `ENTRY` says, or one of
/// several with commas between them, by number.
fn chosen() -> impl Iterator<Item = (usize, &'static Entry)> {
    let part = std::env::var("ENTRY").unwrap_or_default().to_lowercase();
    let named = move |entry: &Entry| {
        let name = entry.card.name.to_lowercase();
        part.split(',').any(|part| name.contains(part))
    };
    ENTRIES.iter().enumerate().filter(move |(_, entry)| named(entry))
}

fn fixed<T: Catalogued>(among: usize) {
    let (entries, ratios) = (Mutex::new(chosen()), Mutex::new((Ratio::default(), Ratio::default())));
    let next = || entries.lock().unwrap().next();
    let run = || {
        while let Some((index, entry)) = next() {
            for (i, case) in fixed_cases().iter().enumerate().filter(|&(i, _)| turn(i, index, among)) {
                let (output, weight) = conforms::<T>(entry, case, turn(i, index, 3 * among));
                let mut ratios = ratios.lock().unwrap();
                ratios.0.join(output);
                ratios.1.join(weight);
            }
        }
    };
    // Definitions are the long part, and each of them runs on one thread.
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(run))));
    let (outputs, weights) = ratios.into_inner().unwrap();
    outputs.report(&format!("fixed sizes, {}", T::DTYPE.name()));
    weights.report(&format!("weights for fixed sizes, {}", T::DTYPE.name()));
}

#[test]
fn fixed_sizes_f32() {
    fixed::<f32>(1);
}

#[test]
fn fixed_sizes_f16() {
    fixed::<f16>(4);
}

#[test]
fn fixed_sizes_bf16() {
    fixed::<bf16>(4);
}

fn cases() -> impl Strategy<Value = (usize, Case)> {
    let layout = || proptest::sample::select(Layout::ALL.to_vec());
    let own = || proptest::sample::select(Layout::OWN.to_vec());
    let length = || prop_oneof![proptest::sample::select(LENGTHS.to_vec()), 0usize..20, 0usize..300,];
    let dim = || prop_oneof![proptest::sample::select(vec![1, 3, 16, 40, 64, 65, 72, 128, 160]), 0usize..80];
    let sizes = (0usize..4, 1usize..3, 1usize..5, length(), length(), dim(), dim());
    let layouts = (own(), layout(), layout(), own());
    let entries = proptest::sample::select(chosen().map(|(index, _)| index).collect::<Vec<_>>());
    (entries, sizes, layouts, any::<u64>()).prop_map(|(entry, sizes, (q, k, v, out), seed)| {
        let (batch, kv_heads, group, q_len, kv_len, head_dim, value_dim) = sizes;
        (entry, Case { batch, kv_heads, group, q_len, kv_len, head_dim, value_dim, q, k, v, out, seed })
    })
}

/// Random cases; the same ones each time unless `PROPTEST_RNG_SEED` says
/// otherwise, and as many as `PROPTEST_CASES` says or `count`.
fn random<T: Catalogued>(count: u32) {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if config.cases == ProptestConfig::with_cases(256).cases {
        config.cases = count;
    }
    if matches!(config.rng_seed, RngSeed::Random) {
        config.rng_seed = RngSeed::Fixed(0x5eed);
    }
    let (outputs, weights) = (std::cell::RefCell::default(), std::cell::RefCell::default());
    let result = TestRunner::new(config).run(&cases(), |(entry, case)| {
        let (output, weight) = conforms::<T>(&ENTRIES[entry], &case, case.seed % 3 == 0);
        Ratio::join(&mut outputs.borrow_mut(), output);
        Ratio::join(&mut weights.borrow_mut(), weight);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    outputs.into_inner().report(&format!("random sizes, {}", T::DTYPE.name()));
    weights.into_inner().report(&format!("weights for random sizes, {}", T::DTYPE.name()));
}

#[test]
fn random_sizes_f32() {
    random::<f32>(48);
}

#[test]
fn random_sizes_f16() {
    random::<f16>(24);
}

#[test]
fn random_sizes_bf16() {
    random::<bf16>(24);
}
