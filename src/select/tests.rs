//! The kernel against the definition, where scores are exact: equal lists.

use ndarray::{Array4, s};
use proptest::prelude::*;

use super::*;
use crate::definition;
use crate::engine::parallel::on_threads;

#[derive(Clone, Debug)]
struct Case {
    scheme: Scheme,
    /// `[batch, kv_heads, group, q_len, kv_len, head_dim]`
    sizes: [usize; 6],
    seed: u64,
    /// Lengths of keys that are less than all.
    cut: Option<usize>,
}

fn cases() -> impl Strategy<Value = Case> {
    let summary = proptest::sample::select(vec![
        (1, Summary::First),
        (4, Summary::First),
        (4, Summary::Mean),
        (16, Summary::Mean),
        (5, Summary::Max),
        (16, Summary::MinMax),
        (1, Summary::MinMax),
        (64, Summary::Mean),
    ]);
    let per = proptest::sample::select(vec![Per::Head, Per::Group, Per::Sequence]);
    let reduce = proptest::sample::select(vec![Reduce::Max, Reduce::Sum, Reduce::Mean, Reduce::Votes]);
    let rule = prop_oneof![
        3 => (0usize..40).prop_map(Rule::TopK),
        1 => (-4f32..8.0).prop_map(|x| Rule::Threshold(x.round() + 0.5 / 64.0)),
    ];
    let q_block = proptest::sample::select(vec![1, 1, 3, 16, 70]);
    let fold = proptest::sample::select(vec![Fold::Max, Fold::Sum]);
    let scored = (0usize..4, proptest::sample::select(vec![1usize, 2, 4]), fold);
    let forced = (0usize..3, 0usize..3, any::<bool>());
    let scheme = (summary, per, reduce, rule, q_block, forced, any::<bool>(), scored);
    let sizes = (0usize..3, 0usize..3, 1usize..4, 0usize..60, 0usize..200, 0usize..20);
    (scheme, sizes, any::<u64>(), proptest::option::of(0usize..200)).prop_map(|(scheme, sizes, seed, cut)| {
        let ((unit, summary), per, reduce, rule, q_block, (first, last, inside), causal, scored) = scheme;
        let unit: usize = unit;
        let pick = Pick { rule, forced: Forced { first, last, inside } };
        // Of pools there are means, or single keys.
        let (unit, summary, scored) = match scored {
            (0 | 1, ..) => (unit, summary, Scored::Begun),
            (2, ..) => (unit, summary, Scored::Whole),
            (_, reach, fold) => {
                let stride = if reach == 1 { 1 } else { 4 };
                let pools = Pools { width: reach * stride, stride, fold, coarse: None, dense: 0 };
                (
                    unit.next_multiple_of(8),
                    if stride == 1 { Summary::First } else { Summary::Mean },
                    Scored::Pools(pools),
                )
            }
        };
        // Means of a block that is no power of two are not exact.
        let mut sizes: [usize; 6] = sizes.into();
        let step = if summary == Summary::Mean && scored == Scored::Begun { unit } else { 1 };
        sizes[4] = sizes[4] / step * step;
        let cut = cut.map(|cut| cut / step * step);
        // Nor are means of other numbers of queries, and what bounds their scores is
        // no mean of bounds.
        let (mut reduce, mut q_block) = (reduce, q_block);
        if reduce == Reduce::Votes {
            q_block = [1, 4, 16, 64][q_block % 4];
            sizes[3] = sizes[3] / q_block * q_block;
            if summary == Summary::MinMax || summary == Summary::Max {
                reduce = Reduce::Sum;
            }
        }
        let scheme = Scheme { unit, summary, per, q_block, shares: None, reduce, pick, causal, scored };
        Case { scheme, sizes, seed, cut: cut.filter(|&cut| cut <= sizes[4]) }
    })
}

fn check(case: &Case) {
    let [batch, kv_heads, group, q_len, kv_len, dim] = case.sizes;
    let mut state = case.seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % 9) as f32 / 4.0 - 1.0
    };
    let mut array = |heads, len| Array4::from_shape_simple_fn((batch, heads, len, dim), &mut next);
    let (q, k) = (array(kv_heads * group, q_len), array(kv_heads, kv_len));
    let lengths = vec![case.cut.unwrap_or(0); batch];
    let x = Qkv::new(q.view(), k.view(), k.view());
    let x = if case.cut.is_some() { x.key_lengths(&lengths) } else { x };
    let dims = x.dims().unwrap();
    let scheme = &case.scheme;
    let score = |b: usize, h: usize, i: usize, keys: Range<usize>| {
        let keys = k.slice(s![b, h / group, keys, ..]);
        let channel = |(c, q): (usize, &f32)| {
            let (q, keys) = (f64::from(*q), keys.column(c));
            let keys = || keys.iter().map(|&k| f64::from(k));
            match scheme.summary {
                Summary::First => q * keys().next().unwrap(),
                Summary::Mean => q * keys().sum::<f64>() / keys().len() as f64,
                Summary::Max => q * keys().fold(f64::MIN, f64::max),
                Summary::MinMax => keys().map(|k| q * k).fold(f64::MIN, f64::max),
            }
        };
        q.slice(s![b, h, i, ..]).iter().enumerate().map(channel).sum()
    };
    let layout = scheme.layout(&dims, &x.lengths);
    let (lists, _) = definition::select::select(scheme, &dims, &x.lengths, &layout, score);
    let want = Selected::of(scheme, &dims, &x.lengths, &lists);
    for (isa, threads) in Isa::available().map(|isa| (isa, 1)).chain([(Isa::choose(None).unwrap(), 3)]) {
        let source = Source::new(isa, x, None).unwrap();
        on_threads(threads, || {
            let bytes = workspace_bytes(&source, scheme).unwrap();
            let mut workspace = Workspace::with_capacity(bytes);
            // Whatever was in it.
            workspace.arena(bytes).unwrap().take::<u64>(bytes / 8).fill(0x7fc0_0000_7fc0_0000);
            let before = workspace.capacity();
            let got = select(&source, scheme, &mut workspace).unwrap();
            assert_eq!(workspace.capacity(), before, "more memory than it says");
            assert_eq!(got.offsets, want.offsets, "{isa}, {case:?}");
            assert_eq!(got.candidates, want.candidates, "{isa}, {case:?}");
            got.tokens().unwrap();
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn lists_are_those_of_the_definition(case in cases()) {
        check(&case);
    }
}

/// Lists of one row a key head, and of the keys of several heads.
#[test]
fn pools_of_single_keys_under_lists_of_all_heads() {
    let pick = Pick { rule: Rule::TopK(2), forced: Forced::default() };
    let pools = Pools { width: 1, stride: 1, fold: Fold::Max, coarse: None, dense: 0 };
    for per in [Per::Head, Per::Group, Per::Sequence] {
        for group in [1, 3] {
            let scheme = Scheme {
                unit: 8,
                summary: Summary::First,
                per,
                q_block: 1,
                shares: None,
                reduce: Reduce::Max,
                pick,
                causal: false,
                scored: Scored::Pools(pools),
            };
            check(&Case { scheme, sizes: [2, 3, group, 5, 300, 8], seed: 7, cut: None });
        }
    }
}

/// 41 queries in blocks of 16: nine in the last.
#[test]
fn a_last_block_of_fewer_queries_has_a_mean_of_its_own() {
    let pick = Pick { rule: Rule::Threshold(6.0 + 0.5 / 64.0), forced: Forced::default() };
    for per in [Per::Head, Per::Group, Per::Sequence] {
        let scheme = Scheme {
            unit: 16,
            summary: Summary::MinMax,
            per,
            q_block: 16,
            shares: None,
            reduce: Reduce::Mean,
            pick,
            causal: true,
            scored: Scored::Begun,
        };
        check(&Case { scheme, sizes: [2, 1, 3, 41, 170, 19], seed: 3, cut: None });
    }
}

#[test]
fn many_rows_and_long_rows() {
    let pick = Pick { rule: Rule::TopK(100), forced: Forced::default() };
    for (per, causal) in [(Per::Head, true), (Per::Group, false), (Per::Sequence, true)] {
        let scheme = Scheme {
            unit: 1,
            summary: Summary::First,
            per,
            q_block: 1,
            shares: None,
            reduce: Reduce::Sum,
            pick,
            causal,
            scored: Scored::Begun,
        };
        check(&Case { scheme, sizes: [1, 2, 2, 130, 1500, 16], seed: 1, cut: None });
        check(&Case { scheme, sizes: [1, 2, 2, 2, 9000, 4], seed: 2, cut: None });
    }
}

/// Long rows of few queries are scored by several threads, and sequences
/// without queries have empty lists.
#[test]
fn stretches_of_keys_are_the_whole() {
    let mut next = 4u64;
    let mut array = |shape: (usize, usize, usize, usize)| {
        Array4::from_shape_simple_fn(shape, || {
            next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((next >> 33) % 9) as f32 - 4.0
        })
    };
    let (q, k) = (array((1, 2, 2, 4)), array((1, 1, 9001, 4)));
    let x = Qkv::new(q.view(), k.view(), k.view());
    let branch = IndexBranch::new(q.view(), k.view());
    let (queries, keys) = ([0, 0, 2], [0, 5, 9001]);
    for (pool, x) in [(1, x), (4, x), (1, x.packed(&queries, &keys))] {
        let scheme = Scheme {
            unit: pool,
            summary: Summary::First,
            per: Per::Group,
            q_block: 1,
            shares: None,
            reduce: Reduce::Rectified,
            pick: Pick { rule: Rule::TopK(100 / pool), forced: Forced::default() },
            causal: true,
            scored: Scored::Whole,
        };
        let dims = x.dims().unwrap();
        let score = |of: &Sequence, [b, h, i]: [usize; 3], n: usize| {
            let key = k.slice(s![0, 0, of.keys.start + n, ..]);
            let pairs = q.slice(s![b, h, i, ..]).into_iter().zip(key);
            pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>().max(0.0)
        };
        let layout = scheme.layout(&dims, &x.lengths);
        let (lists, _) = definition::select::select_numbered(&scheme, &dims, &x.lengths, &layout, score);
        let want = Selected::of(&scheme, &dims, &x.lengths, &lists);
        for threads in [1, 3, 4] {
            let source = Source::new(Isa::choose(None).unwrap(), x, None).unwrap().branch(&branch);
            let got = on_threads(threads, || select(&source, &scheme, &mut Workspace::new()).unwrap());
            assert_eq!(
                (&got.offsets, &got.candidates),
                (&want.offsets, &want.candidates),
                "{pool} {threads}"
            );
        }
    }
}

#[test]
fn sizes_that_no_memory_holds_are_refused() {
    let one = Array4::<f32>::zeros((1, 1, 1, 1));
    let wide = one.broadcast((1, 1, 1, 1 << 61)).unwrap();
    let x = Qkv::new(wide, wide, wide);
    let scheme = Scheme {
        unit: 1,
        summary: Summary::MinMax,
        per: Per::Head,
        q_block: 1,
        shares: None,
        reduce: Reduce::Max,
        pick: Pick { rule: Rule::TopK(1), forced: Forced::default() },
        causal: false,
        scored: Scored::Begun,
    };
    // The input refuses what the scheme would.
    let refused = Source::new(Isa::choose(None).unwrap(), x, None)
        .and_then(|source| workspace_bytes(&source, &scheme))
        .unwrap_err()
        .to_string();
    assert!(refused.starts_with("q: ") || refused.starts_with("k: "), "{refused}");
}
