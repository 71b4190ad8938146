//! What is refused, in which words, and that nothing is written then; and
//! what may look wrong and is right.

mod shared;

use attention_kernels::dense::{Dense, Selective, Sigmoid, Tempered};
use attention_kernels::input::{Dims, Qkv};
use attention_kernels::mask::{Boolean, Causal, Documents, Mask, Tree, Unmasked, Window};
use attention_kernels::merge;
use attention_kernels::score::{Alibi, Bias, RelativeTable, Score, Softcap};
use attention_kernels::simd::{ISA_VARIABLE, Isa};
use attention_kernels::{Attention, Bounded, Error, Mergeable, Weights, Workspace};
use ndarray::{Array2, Array3, Array4, ArrayViewMut4};

use shared::{AnyMask, AnyScore, Case, Shape, masked, scored, selective, shape, sigmoid};

/// Not a number that any call computes.
const FILL: f32 = -123.25;

const PACKED: &str =
    "positions count from the start of each sequence, and the lengths of the sequences differ";

fn text<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn untouched<'a>(what: &str, values: impl IntoIterator<Item = &'a f32>) {
    assert!(values.into_iter().all(|&x| x == FILL), "{what}: the output was written to");
}

/// Whether every method refuses the input in the same words, nothing written.
#[track_caller]
fn refuses<A>(mechanism: &A, x: Qkv<'_, f32>, message: &str)
where
    A: for<'b> Bounded<Qkv<'b, f32>> + for<'b> Weights<Qkv<'b, f32>>,
{
    // The output that the queries ask for, so that nothing else is wrong.
    let (batch, heads, rows, _) = x.q.dim();
    let mut out = Array4::from_elem((batch, heads, rows, x.v.dim().3), FILL);
    let mut workspace = Workspace::new();
    let refusals = [
        text(mechanism.forward_into(x.reborrow(), out.view_mut(), &mut workspace)),
        text(mechanism.forward(x.reborrow())),
        text(mechanism.workspace_bytes(x.reborrow())),
        text(mechanism.reference(x.reborrow())),
        text(mechanism.error_bound(x.reborrow())),
        text(mechanism.cost(x.reborrow())),
        text(mechanism.scores(x.reborrow())),
        text(mechanism.reference_scores(x.reborrow())),
        text(mechanism.weights(x.reborrow())),
        text(mechanism.key_weights(x.reborrow())),
        text(mechanism.top_weights(x.reborrow(), 2)),
        text(mechanism.reference_weights(x.reborrow())),
    ];
    for refusal in refusals {
        assert_eq!(refusal, message);
    }
    untouched(message, &out);
    assert_eq!(workspace.capacity(), 0, "{message}: memory was asked for");
}

/// The same, and the methods that dense attention has besides.
#[track_caller]
fn dense_refuses<F: Score + 'static>(mechanism: &Dense<AnyMask, F>, x: Qkv<'_, f32>, message: &str) {
    refuses(mechanism, x.reborrow(), message);
    let (batch, heads, rows, _) = x.q.dim();
    let mut out = Array4::from_elem((batch, heads, rows, x.v.dim().3), FILL);
    let mut lse = Array3::from_elem((batch, heads, rows), FILL);
    let refusals = [
        text(mechanism.forward_with_lse_into(
            x.reborrow(),
            out.view_mut(),
            lse.view_mut(),
            &mut Workspace::new(),
        )),
        text(mechanism.forward_with_lse(x.reborrow())),
        text(mechanism.reference_lse(x)),
    ];
    for refusal in refusals {
        assert_eq!(refusal, message);
    }
    untouched(message, out.iter().chain(&lse));
}

fn zeros(n: [usize; 7]) -> Case {
    let n = shape(n);
    Case {
        q: Array4::zeros((n.batch, n.q_heads, n.q_len, n.head_dim)),
        k: Array4::zeros((n.batch, n.kv_heads, n.kv_len, n.head_dim)),
        v: Array4::zeros((n.batch, n.kv_heads, n.kv_len, n.value_dim)),
    }
}

/// 2 sequences of 4 over 2 heads, 3 queries, 5 keys.
fn usual() -> Case {
    zeros([2, 4, 2, 3, 5, 8, 6])
}

fn plain() -> Dense<AnyMask> {
    masked(Isa::Scalar, Unmasked).build().unwrap()
}

#[test]
fn arrays_that_disagree() {
    let dense = plain();
    let mut x = usual();
    x.k = Array4::zeros((2, 2, 5, 7));
    let expected = "k: expected shape [batch, kv_heads, kv_len, head_dim] = [2, 2, 5, 8] as q and v have it";
    dense_refuses(&dense, x.x(), &format!("{expected}, got [2, 2, 5, 7]"));
    x.k = Array4::zeros((2, 2, 4, 8));
    dense_refuses(&dense, x.x(), &format!("{expected}, got [2, 2, 4, 8]"));
    x.k = Array4::zeros((2, 1, 5, 8));
    dense_refuses(&dense, x.x(), &format!("{expected}, got [2, 1, 5, 8]"));
    x.k = Array4::zeros((1, 2, 5, 8));
    dense_refuses(&dense, x.x(), &format!("{expected}, got [1, 2, 5, 8]"));

    let mut x = usual();
    x.v = Array4::zeros((3, 2, 5, 6));
    let expected = "v: expected shape [batch, kv_heads, kv_len, value_dim] with batch = 2 as q has it";
    dense_refuses(&dense, x.x(), &format!("{expected}, got [3, 2, 5, 6]"));
}

#[test]
fn heads_that_cannot_be_shared_out() {
    let message = |q_heads, kv_heads| {
        format!(
            "q: expected a number of heads that is a multiple of the {kv_heads} key/value heads, got {q_heads}"
        )
    };
    let dense = plain();
    dense_refuses(&dense, zeros([2, 4, 3, 3, 5, 8, 6]).x(), &message(4, 3));
    dense_refuses(&dense, zeros([2, 2, 4, 3, 5, 8, 6]).x(), &message(2, 4));
    dense_refuses(&dense, zeros([2, 4, 0, 3, 5, 8, 6]).x(), &message(4, 0));
}

#[test]
fn lengths_that_do_not_fit() {
    let (dense, x) = (plain(), usual());
    let count = "key_lengths: expected one length for each of the 2 batch entries";
    dense_refuses(&dense, x.x().key_lengths(&[5]), &format!("{count}, got 1 lengths"));
    dense_refuses(&dense, x.x().key_lengths(&[5, 5, 5]), &format!("{count}, got 3 lengths"));
    dense_refuses(&dense, x.x().key_lengths(&[]), &format!("{count}, got 0 lengths"));
    let long = "key_lengths: expected at most kv_len = 5, got 6 for batch entry 1";
    dense_refuses(&dense, x.x().key_lengths(&[5, 6]), long);

    let batch = "q: expected shape [1, q_heads, total_q, head_dim] in a packed batch, got [2, 4, 3, 8]";
    dense_refuses(&dense, x.x().packed(&[0, 3], &[0, 5]), batch);

    let x = zeros([1, 4, 2, 3, 5, 8, 6]);
    let queries = "queries: expected non-decreasing offsets from 0 to at most 3, one more than there are sequences, got";
    let keys =
        "keys: expected non-decreasing offsets from 0 to at most 5, one more than there are sequences, got";
    for (q, k, message) in [
        (&[2, 3][..], &[0, 5][..], format!("{queries} 2 offsets from Some(2) to Some(3)")),
        (&[1, 3], &[0, 5], format!("{queries} 2 offsets from Some(1) to Some(3)")),
        (&[0, 4], &[0, 5], format!("{queries} 2 offsets from Some(0) to Some(4)")),
        (&[], &[0, 5], format!("{queries} 0 offsets from None to None")),
        (&[0, 2, 1, 3], &[0, 1, 2, 5], format!("{queries} 1 after 2 at index 2")),
        (&[0, 3], &[0, 6], format!("{keys} 2 offsets from Some(0) to Some(6)")),
        (&[0, 3], &[2, 5], format!("{keys} 2 offsets from Some(2) to Some(5)")),
        (&[0, 3], &[], format!("{keys} 0 offsets from None to None")),
        (&[0, 1, 2, 3], &[0, 4, 3, 5], format!("{keys} 3 after 4 at index 2")),
        (&[0, 1, 3], &[0, 5], "keys: expected as many offsets as queries, 3, got 2 offsets".to_owned()),
        (&[0], &[0, 5], "keys: expected as many offsets as queries, 1, got 2 offsets".to_owned()),
    ] {
        dense_refuses(&dense, x.x().packed(q, k), &message);
    }
    let padded = "padded cannot be combined with pairs of queries and keys: \
                  key_lengths hides the keys of padding, and nothing reads the rows of its queries";
    dense_refuses(&dense, zeros([1, 4, 2, 3, 3, 8, 6]).x().padded(&[3]), padded);
    // Offsets beyond what can be counted.
    let message = format!("{queries} {} after {} at index 2", 1, usize::MAX);
    dense_refuses(&dense, x.x().packed(&[0, usize::MAX, 1, 3], &[0, 1, 2, 5]), &message);
}

#[test]
fn outputs_that_do_not_fit() {
    let x = usual();
    let expected = "out: expected shape [batch, q_heads, q_len, value_dim] = [2, 4, 3, 6]";
    let (dense, logistic) = (plain(), sigmoid(Isa::Scalar, Unmasked).build().unwrap());
    for dim in [(2, 4, 3, 8), (1, 4, 3, 6), (2, 2, 3, 6), (2, 4, 5, 6), (2, 4, 3, 0)] {
        let mut out = Array4::from_elem(dim, FILL);
        let mut lse = Array3::from_elem((2, 4, 3), FILL);
        let message = format!("{expected}, got {:?}", out.shape());
        let mut workspace = Workspace::new();
        assert_eq!(text(dense.forward_into(x.x(), out.view_mut(), &mut workspace)), message);
        assert_eq!(text(logistic.forward_into(x.x(), out.view_mut(), &mut workspace)), message);
        let refusal = dense.forward_with_lse_into(x.x(), out.view_mut(), lse.view_mut(), &mut workspace);
        assert_eq!(text(refusal), message);
        untouched(&message, out.iter().chain(&lse));
    }
    for dim in [(2, 4, 4), (2, 2, 3), (1, 4, 3)] {
        let mut out = Array4::from_elem((2, 4, 3, 6), FILL);
        let mut lse = Array3::from_elem(dim, FILL);
        let message =
            format!("lse: expected shape [batch, q_heads, q_len] = [2, 4, 3], got {:?}", lse.shape());
        let mut workspace = Workspace::new();
        let refusal = dense.forward_with_lse_into(x.x(), out.view_mut(), lse.view_mut(), &mut workspace);
        assert_eq!(text(refusal), message);
        untouched(&message, out.iter().chain(&lse));
    }
}

#[test]
fn sinks() {
    let builder = || masked(Isa::Scalar, Causal::new());
    let refused = |sinks: &[f32]| text(builder().sinks(sinks).build());
    assert_eq!(refused(&[0.0, f32::NAN]), "sinks: expected finite logits or -inf, got NaN");
    assert_eq!(refused(&[f32::INFINITY]), "sinks: expected finite logits or -inf, got inf");
    let none = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 2.0];
    builder().sinks(none).build().unwrap().forward(usual().x()).unwrap();

    let count = "sinks: expected one for each of the 4 query heads";
    dense_refuses(&builder().sinks([1.0, 2.0]).build().unwrap(), usual().x(), &format!("{count}, got 2"));
    dense_refuses(&builder().sinks([]).build().unwrap(), usual().x(), &format!("{count}, got 0"));
}

#[test]
fn numbers_of_builders() {
    for (x, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let scale = format!("scale: expected a finite number, got {name}");
        assert_eq!(text(Dense::builder().scale(x).build()), scale);
        assert_eq!(text(Sigmoid::builder().scale(x).build()), scale);
        assert_eq!(text(Selective::builder().scale(x).build()), scale);
        let bias = format!("bias: expected a finite number, got {name}");
        assert_eq!(text(Sigmoid::builder().bias(x).build()), bias);
        let cap = format!("softcap: expected a cap above 0 and finite, got {name}");
        assert_eq!(text(Softcap::new(x)), cap);
    }
    assert_eq!(text(Softcap::new(0.0)), "softcap: expected a cap above 0 and finite, got 0");
    assert_eq!(text(Softcap::new(-0.0)), "softcap: expected a cap above 0 and finite, got -0");
    assert_eq!(text(Softcap::new(-2.5)), "softcap: expected a cap above 0 and finite, got -2.5");
    for scale in [0.0, -3.0, f32::MAX, f32::MIN_POSITIVE] {
        masked(Isa::Scalar, Unmasked).scale(scale).build().unwrap().forward(usual().x()).unwrap();
    }
}

#[test]
fn alibi() {
    let slopes = "slopes: expected finite slopes, 1e28 at most, got";
    assert_eq!(text(Alibi::from_slopes(&[1.0, f32::NAN])), format!("{slopes} NaN for head 1"));
    assert_eq!(text(Alibi::from_slopes(&[f32::NEG_INFINITY])), format!("{slopes} -inf for head 0"));
    assert_eq!(
        text(Alibi::from_slopes(&[0.0, 1e28, -2e28])),
        format!("{slopes} -20000000000000000000000000000 for head 2")
    );
    let mechanism = scored(Isa::Scalar, Unmasked, AnyScore::Alibi(Alibi::new(3))).build().unwrap();
    let message = "slopes: expected one slope for each query head, q_heads = 4, got 3 slopes";
    dense_refuses(&mechanism, usual().x(), message);
}

#[test]
fn documents() {
    let build = |queries: &[u32], keys: &[u32]| {
        masked(Isa::Scalar, Documents::of(queries, keys).and(Causal::new())).build().unwrap()
    };
    let queries = "query documents: expected one document number for each token, q_len = 3, got 4 numbers";
    dense_refuses(&build(&[0; 4], &[0; 5]), usual().x(), queries);
    let keys = "key documents: expected one document number for each token, kv_len = 5, got 3 numbers";
    dense_refuses(&build(&[0; 3], &[0; 3]), usual().x(), keys);
    let packed = format!("a mask of documents cannot be combined with a packed batch: {PACKED}");
    let x = zeros([1, 4, 2, 3, 5, 8, 6]);
    dense_refuses(&build(&[0; 3], &[0; 5]), x.x().packed(&[0, 3], &[0, 5]), &packed);
}

#[test]
fn trees() {
    let parents = "parents: expected a parent that comes before its child, got";
    assert_eq!(text(Tree::new(&[None, Some(1)])), format!("{parents} parent 1 of node 1"));
    assert_eq!(text(Tree::new(&[Some(0)])), format!("{parents} parent 0 of node 0"));
    let far = format!("{parents} parent {} of node 2", usize::MAX);
    assert_eq!(text(Tree::new(&[None, None, Some(usize::MAX)])), far);

    let chain = |nodes: usize| {
        let parents: Vec<_> = (0..nodes).map(|i| i.checked_sub(1)).collect();
        masked(Isa::Scalar, Tree::new(&parents).unwrap()).build().unwrap()
    };
    let message = "parents: expected one node for each query, q_len = 3, got 2 nodes";
    dense_refuses(&chain(2), usual().x(), message);
    let x = zeros([2, 4, 2, 6, 5, 8, 6]);
    let message = "parents: expected at most as many nodes as keys, kv_len = 5, got 6 nodes";
    dense_refuses(&chain(6), x.x(), message);
    let x = zeros([1, 4, 2, 3, 5, 8, 6]);
    let packed = format!("a tree of draft tokens cannot be combined with a packed batch: {PACKED}");
    dense_refuses(&chain(3), x.x().packed(&[0, 3], &[0, 5]), &packed);
}

#[test]
fn arrays_for_pairs() {
    let expected =
        "expected shape [batch, q_heads, q_len, kv_len] = [2, 4, 3, 5] or 1 in place of any of them";
    for dim in [(2, 4, 3, 4), (3, 1, 1, 1), (1, 2, 1, 1), (1, 1, 5, 1), (0, 1, 1, 1), (1, 1, 1, 0)] {
        let visible = &*Box::leak(Box::new(Array4::from_elem(dim, true)));
        let got = format!("got {:?}", visible.shape());
        let mechanism = masked(Isa::Scalar, Boolean::new(visible.view())).build().unwrap();
        dense_refuses(&mechanism, usual().x(), &format!("mask: {expected}, {got}"));
        let score = AnyScore::bias(Array4::zeros(dim));
        let mechanism = scored(Isa::Scalar, Unmasked, score).build().unwrap();
        dense_refuses(&mechanism, usual().x(), &format!("bias: {expected}, {got}"));
    }

    // In a packed batch an axis of length counts rows of the arrays, which
    // no sequence has. The first axis counts sequences.
    let x = zeros([1, 4, 2, 3, 5, 8, 6]);
    let x = x.x().packed(&[0, 1, 3], &[0, 2, 5]);
    for dim in [(1, 1, 3, 5), (1, 1, 3, 1), (1, 1, 1, 5)] {
        let visible = &*Box::leak(Box::new(Array4::from_elem(dim, true)));
        let mechanism = masked(Isa::Scalar, Boolean::new(visible.view())).build().unwrap();
        let option = "a boolean mask with a length axis";
        let message = format!("{option} cannot be combined with a packed batch: {PACKED}");
        dense_refuses(&mechanism, x, &message);
        let mechanism = scored(Isa::Scalar, Unmasked, AnyScore::bias(Array4::zeros(dim))).build().unwrap();
        let message = format!("a bias with a length axis cannot be combined with a packed batch: {PACKED}");
        dense_refuses(&mechanism, x, &message);
    }
    let per_sequence = scored(Isa::Scalar, Unmasked, AnyScore::bias(Array4::zeros((2, 4, 1, 1))));
    per_sequence.build().unwrap().forward(x).unwrap();
    let three = scored(Isa::Scalar, Unmasked, AnyScore::bias(Array4::zeros((3, 4, 1, 1)))).build().unwrap();
    dense_refuses(&three, x, &format!("bias: {expected}, got [3, 4, 1, 1]"));
}

#[test]
fn relative_tables() {
    let shape = "table: expected shape [heads | 1, 2 * max_distance + 1], got";
    assert_eq!(text(RelativeTable::new(Array2::zeros((4, 6)))), format!("{shape} [4, 6]"));
    assert_eq!(text(RelativeTable::new(Array2::zeros((4, 0)))), format!("{shape} [4, 0]"));
    assert_eq!(text(RelativeTable::new(Array2::zeros((0, 5)))), format!("{shape} [0, 5]"));
    let table = RelativeTable::new(Array2::zeros((3, 7))).unwrap();
    let mechanism = scored(Isa::Scalar, Unmasked, AnyScore::Table(table)).build().unwrap();
    let message = "table: expected shape [q_heads | 1, 2 * max_distance + 1] with q_heads = 4, got [3, 7]";
    dense_refuses(&mechanism, usual().x(), message);
}

/// A refusal comes through whatever the mask or the score is a part of.
#[test]
fn parts_are_asked() {
    let dims = Dims {
        batch: 2,
        q_heads: 4,
        kv_heads: 2,
        q_len: 3,
        kv_len: 5,
        head_dim: 8,
        value_dim: 6,
        packed: false,
    };
    let bad = || Documents::of(&[0; 3], &[0; 4]);
    let message = text(bad().check(&dims));
    assert_eq!(
        message,
        "key documents: expected one document number for each token, kv_len = 5, got 4 numbers"
    );
    let masks: [AnyMask; 8] = [
        Box::new(bad().and(Unmasked)),
        Box::new(Causal::new().and(bad())),
        Box::new(bad().or(Unmasked)),
        Box::new(Causal::new().or(bad())),
        Box::new(bad().not()),
        Box::new(Box::new(bad())),
        Box::new(std::sync::Arc::new(bad())),
        Box::new(Window::new(None, None).and(Causal::new().or(bad().not()))),
    ];
    for mask in masks {
        assert_eq!(text(mask.check(&dims)), message);
    }
    let bad = Alibi::new(5);
    let message = text(bad.check(&dims));
    assert_eq!(message, "slopes: expected one slope for each query head, q_heads = 4, got 5 slopes");
    let cap = Softcap::new(1.0).unwrap();
    assert_eq!(text((cap, bad.clone()).check(&dims)), message);
    assert_eq!(text((bad.clone(), cap).check(&dims)), message);
    assert_eq!(text(Score::check(&&bad, &dims)), message);
    let zero = Array4::<f32>::zeros((1, 1, 1, 1));
    assert_eq!(text(cap.then(Bias::new(zero.view())).then(bad).check(&dims)), message);
}

#[test]
fn temperatures() {
    let x = usual();
    let tempered = selective(Isa::Scalar, Causal::new()).build().unwrap();
    let (query, value) = (Array3::ones((2, 4, 3)), Array3::ones((2, 2, 5)));
    let nan = |mut x: Array3<f32>, with| {
        x[[1, 1, 2]] = with;
        x
    };
    let by_query = "query temperatures: expected";
    let by_value = "value temperatures: expected";
    let cases = [
        (
            Array3::ones((2, 2, 3)),
            value.clone(),
            format!("{by_query} shape [batch, q_heads, q_len] = [2, 4, 3], got [2, 2, 3]"),
        ),
        (
            Array3::ones((2, 4, 5)),
            value.clone(),
            format!("{by_query} shape [batch, q_heads, q_len] = [2, 4, 3], got [2, 4, 5]"),
        ),
        (
            query.clone(),
            Array3::ones((2, 4, 5)),
            format!("{by_value} shape [batch, kv_heads, kv_len] = [2, 2, 5], got [2, 4, 5]"),
        ),
        (
            query.clone(),
            Array3::ones((1, 2, 5)),
            format!("{by_value} shape [batch, kv_heads, kv_len] = [2, 2, 5], got [1, 2, 5]"),
        ),
        (nan(query.clone(), f32::NAN), value.clone(), format!("{by_query} finite numbers, got NaN")),
        (nan(query.clone(), f32::INFINITY), value.clone(), format!("{by_query} finite numbers, got inf")),
        (query.clone(), nan(value.clone(), f32::NAN), format!("{by_value} finite numbers, got NaN")),
        (query.clone(), nan(value, f32::NEG_INFINITY), format!("{by_value} finite numbers, got -inf")),
    ];
    for (query, value, message) in cases {
        let x = Tempered { qkv: x.x(), query: query.view(), value: value.view() };
        let mut out = Array4::from_elem((2, 4, 3, 6), FILL);
        let mut lse = Array3::from_elem((2, 4, 3), FILL);
        let mut workspace = Workspace::new();
        let refusals = [
            text(tempered.forward_into(x, out.view_mut(), &mut workspace)),
            text(tempered.forward_with_lse_into(x, out.view_mut(), lse.view_mut(), &mut workspace)),
            text(tempered.forward(x)),
            text(tempered.forward_with_lse(x)),
            text(tempered.workspace_bytes(x)),
            text(tempered.reference(x)),
            text(tempered.error_bound(x)),
            text(tempered.cost(x)),
            text(tempered.weights(x)),
            text(tempered.key_weights(x)),
            text(tempered.top_weights(x, 1)),
            text(tempered.reference_weights(x)),
        ];
        for refusal in refusals {
            assert_eq!(refusal, message);
        }
        untouched(&message, out.iter().chain(&lse));
    }
}

#[test]
fn more_weights_than_there_is_memory() {
    let x = usual();
    for count in [usize::MAX, usize::MAX / 24, usize::MAX / 100] {
        let message = format!("count: expected few enough weights to be held in memory, got {count}");
        assert_eq!(text(plain().top_weights(x.x(), count)), message);
        let logistic = sigmoid(Isa::Scalar, Unmasked).build().unwrap();
        assert_eq!(text(logistic.top_weights(x.x(), count)), message);
    }
}

/// What any mechanism refuses, the others do too.
#[test]
fn other_mechanisms() {
    let logistic = sigmoid(Isa::Scalar, Unmasked).build().unwrap();
    let message = "q: expected a number of heads that is a multiple of the 3 key/value heads, got 4";
    let x = zeros([2, 4, 3, 3, 5, 8, 6]);
    refuses(&logistic, x.x(), message);
    let tempered = selective(Isa::Scalar, Unmasked).build().unwrap();
    let (query, value) = (Array3::ones((2, 4, 3)), Array3::ones((2, 3, 5)));
    let x = Tempered { qkv: x.x(), query: query.view(), value: value.view() };
    assert_eq!(text(tempered.forward(x)), message);
    assert_eq!(text(tempered.cost(x)), message);
}

#[test]
fn merging() {
    let mut out = Array4::from_elem((2, 4, 3, 6), FILL);
    let mut lse = Array3::from_elem((2, 4, 3), FILL);
    let (other, other_lse) = (Array4::<f32>::zeros((2, 4, 3, 6)), Array3::zeros((2, 4, 3)));
    let rows = "expected shape [batch, q_heads, q_len] = [2, 4, 3] as out has it, got [2, 4, 4]";
    let mut short = Array3::from_elem((2, 4, 4), FILL);
    let refusal = merge::merge_into(out.view_mut(), short.view_mut(), other.view(), other_lse.view());
    assert_eq!(text(refusal), format!("lse: {rows}"));
    let refusal = merge::merge_into(out.view_mut(), lse.view_mut(), other.view(), short.view());
    assert_eq!(text(refusal), format!("other_lse: {rows}"));
    let narrow = Array4::zeros((2, 4, 3, 5));
    let message = "other_out: expected shape [2, 4, 3, 6] as out has it, got [2, 4, 3, 5]";
    let refusal = merge::merge_into(out.view_mut(), lse.view_mut(), narrow.view(), other_lse.view());
    assert_eq!(text(refusal), message);
    let refusal = merge::merge((out.view(), lse.view()), (narrow.view(), other_lse.view()));
    assert_eq!(text(refusal), message);
    let refusal = merge::apply_sinks(out.view_mut(), short.view(), &[0.0; 4]);
    assert_eq!(text(refusal), format!("lse: {rows}"));
    let refusal = merge::apply_sinks(out.view_mut(), lse.view(), &[0.0; 3]);
    assert_eq!(text(refusal), "sinks: expected one for each of the 4 query heads, got 3");
    untouched("merge", out.iter().chain(&lse).chain(&short));
}

#[test]
fn instruction_sets_of_other_machines() {
    let names: Vec<_> = Isa::available().map(Isa::name).collect();
    let mut missing = 0;
    for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon] {
        if isa.is_available() {
            assert!(names.contains(&isa.name()));
            continue;
        }
        missing += 1;
        let message = format!(
            "isa: instruction set `{isa}` is not available on this CPU, which has {}",
            names.join(", ")
        );
        assert_eq!(text(Isa::choose(Some(isa))), message);
        assert_eq!(text(Dense::builder().isa(isa).build()), message);
        assert_eq!(text(Sigmoid::builder().isa(isa).build()), message);
        assert_eq!(text(Selective::builder().isa(isa).build()), message);
    }
    assert!(missing > 0, "no machine has both AVX2 and NEON");
    assert_eq!(names[0], "scalar");
}

/// Checks what the variable of this process says. Run by itself it checks
/// the default; [`isa_variable`] runs it with others.
#[test]
fn isa_variable_of_this_process() {
    let case = Case::new(shape([1, 2, 1, 20, 70, 33, 17]), 7);
    let available: Vec<_> = Isa::available().collect();
    let asked = std::env::var(ISA_VARIABLE).unwrap_or_default();
    let expected = match asked.as_str() {
        "" => available.last(),
        name => available.iter().find(|isa| isa.name() == name),
    };
    let built = Dense::builder().mask(Box::new(Unmasked) as AnyMask).build();
    let Some(&isa) = expected else {
        let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
        let message = format!(
            "ATTENTION_KERNELS_ISA: instruction set `{asked}` is not available on this CPU, which has {}",
            names.join(", ")
        );
        assert_eq!(text(built), message);
        assert_eq!(text(Isa::choose(None)), message);
        assert_eq!(text(Sigmoid::builder().build()), message);
        assert_eq!(text(Selective::builder().build()), message);
        // A builder that names one does not look.
        masked(Isa::Scalar, Unmasked).build().unwrap().forward(case.x()).unwrap();
        println!("refused {asked}");
        return;
    };
    assert_eq!(Isa::choose(None), Ok(isa));
    let out = built.unwrap().forward(case.x()).unwrap();
    // It is this one that ran: others differ in some last bit.
    for &other in &available {
        let of_other = masked(other, Unmasked).build().unwrap().forward(case.x()).unwrap();
        assert_eq!(out == of_other, other == isa, "{asked} ran as {other}");
    }
    println!("ran {isa}");
}

#[test]
fn isa_variable() {
    let run = |value: &str| {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "isa_variable_of_this_process", "--nocapture", "--test-threads=1"])
            .env(ISA_VARIABLE, value)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{value}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let best = Isa::available().last().unwrap();
    assert!(run("").contains(&format!("ran {best}")));
    for isa in Isa::available() {
        assert!(run(isa.name()).contains(&format!("ran {isa}")));
    }
    for nonsense in ["sse9", "Scalar", " scalar", "neon avx2", "0"] {
        assert!(run(nonsense).contains(&format!("refused {nonsense}")));
    }
}

/// Sizes of 0 are sizes.
#[test]
fn nothing_is_not_refused() {
    let n = [2, 4, 2, 3, 5, 8, 6];
    for isa in Isa::available() {
        for (axis, what) in
            ["batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim"].iter().enumerate()
        {
            for q_len in [3, 40] {
                let mut n = n;
                n[3] = q_len;
                n[axis] = 0;
                if axis == 2 {
                    // Without key/value heads there can be no query heads.
                    n[1] = 0;
                }
                let Shape { batch, q_heads, kv_heads, q_len, kv_len, value_dim, .. } = shape(n);
                let case = Case::new(shape(n), 3);
                let x = case.x();
                let dense = masked(isa, Causal::new()).build().unwrap();
                let mut out = Array4::from_elem((batch, q_heads, q_len, value_dim), f32::NAN);
                let mut lse = Array3::from_elem((batch, q_heads, q_len), f32::NAN);
                let mut workspace = Workspace::with_capacity(dense.workspace_bytes(x).unwrap());
                let capacity = workspace.capacity();
                dense
                    .forward_with_lse_into(x, out.view_mut(), lse.view_mut(), &mut workspace)
                    .unwrap_or_else(|error| panic!("{isa}, no {what}: {error}"));
                assert_eq!(workspace.capacity(), capacity, "{isa}, no {what}");
                assert!(!out.iter().chain(&lse).any(|x| x.is_nan()), "{isa}, no {what}");
                let reference = dense.reference(x).unwrap();
                let bound = dense.error_bound(x).unwrap();
                shared::within(what, &out, reference.view(), &bound);
                if kv_len == 0 {
                    assert!(out.iter().all(|&x| x == 0.0));
                    assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY));
                }
                let weights = dense.weights(x).unwrap();
                assert_eq!(weights.dim(), (batch, q_heads, q_len, kv_len));
                assert_eq!(dense.key_weights(x).unwrap().dim(), (batch, q_heads, kv_len));
                for count in [0, 2, 9] {
                    let top = dense.top_weights(x, count).unwrap();
                    assert_eq!(top.keys.dim(), (batch, q_heads, q_len, count));
                    assert_eq!(top.weights.dim(), (batch, q_heads, q_len, count));
                }
                let cost = dense.cost(x).unwrap();
                if out.is_empty() && kv_len > 0 && value_dim > 0 {
                    assert_eq!(cost.flops, 0, "no {what}");
                }
                let mut out: Array4<f32> = Array4::from_elem(out.dim(), f32::NAN);
                let view: ArrayViewMut4<'_, f32> = out.view_mut();
                sigmoid(isa, Unmasked).build().unwrap().forward_into(x, view, &mut workspace).unwrap();
                assert!(!out.iter().any(|x| x.is_nan()), "{isa}, sigmoid, no {what}");
                let (query, value) =
                    (Array3::ones((batch, q_heads, q_len)), Array3::ones((batch, kv_heads, kv_len)));
                let x = Tempered { qkv: x, query: query.view(), value: value.view() };
                let out = selective(isa, Unmasked).build().unwrap().forward(x).unwrap();
                assert!(!out.iter().any(|x| x.is_nan()), "{isa}, selective, no {what}");
            }
        }
    }
}

/// Sequences of no queries, of no keys, of neither; no sequences at all.
#[test]
fn packed_sequences_may_be_empty() {
    for isa in Isa::available() {
        let case = Case::new(shape([1, 4, 2, 3, 5, 8, 6]), 11);
        let dense = masked(isa, Causal::new()).build().unwrap();
        let x = case.x().packed(&[0, 0, 1, 1, 3, 3], &[0, 2, 2, 2, 5, 5]);
        let (out, lse) = dense.forward_with_lse(x).unwrap();
        let (reference, bound) = (dense.reference(x).unwrap(), dense.error_bound(x).unwrap());
        shared::within("packed", &out, reference.view(), &bound);
        // The second sequence has a query and no keys.
        for h in 0..4 {
            assert_eq!(lse[[0, h, 0]], f32::NEG_INFINITY);
        }
        let case = Case::new(shape([1, 4, 2, 0, 0, 8, 6]), 11);
        let out = dense.forward(case.x().packed(&[0], &[0])).unwrap();
        assert_eq!(out.dim(), (1, 4, 0, 6));
        let case = Case::new(shape([2, 4, 2, 3, 5, 8, 6]), 11);
        let (out, lse) = dense.forward_with_lse(case.x().key_lengths(&[0, 2])).unwrap();
        assert!(out.iter().zip(&case.q).all(|(x, _)| !x.is_nan()));
        assert!(lse.iter().take(12).all(|&x| x == f32::NEG_INFINITY));
    }
}
