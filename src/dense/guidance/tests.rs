use super::*;
use crate::Attention;
use crate::dense::Dense;
use crate::testing::arrays::array;
use crate::testing::qkv::{close, held, refused};
use ndarray::{Array4, Array5, concatenate, s};

/// Queries, keys and values of so many sets.
fn sets(p: usize, r: usize, q_len: usize, kv_len: usize) -> (Array4<f32>, Array5<f32>, Array5<f32>) {
    let (keys, values) = (array(2, (p, 2, 2, kv_len, 12)), array(3, (r, 2, 2, kv_len, 17)));
    (array(1, (2, 4, q_len, 12)), keys, values)
}

fn guidance() -> Guidance {
    Guidance::builder().build().unwrap()
}

const COUNTS: [(usize, usize); 6] = [(1, 1), (2, 2), (5, 5), (1, 3), (3, 1), (1, 2)];

#[test]
fn kernels_keep_to_the_definition() {
    for ((p, r), (q_len, kv_len)) in
        COUNTS.into_iter().flat_map(|n| [(1, 300), (70, 77), (5, 0), (0, 4)].map(|len| (n, len)))
    {
        let (q, keys, values) = sets(p, r, q_len, kv_len);
        held(&guidance(), Sets { q: q.view(), keys: keys.view(), values: values.view() });
        // Sets that lie in other orders.
        let keys = keys.permuted_axes([3, 1, 0, 4, 2]).as_standard_layout().into_owned();
        let keys = keys.view().permuted_axes([2, 1, 4, 0, 3]);
        held(&guidance(), Sets { q: q.view(), keys, values: values.view() });
    }
}

#[test]
fn it_is_the_mean_of_all_pairs() {
    let dense = Dense::builder().build().unwrap();
    for (p, r) in COUNTS {
        let (q, keys, values) = sets(p, r, 20, 33);
        let x = Sets { q: q.view(), keys: keys.view(), values: values.view() };
        let n = p.max(r);
        let of = |t: usize| dense.reference(x.pair(t.min(p - 1), t.min(r - 1))).unwrap();
        let want = (1..n).fold(of(0), |sum, t| sum + of(t)) / n as f64;
        close(&guidance().reference(x).unwrap(), &want, 1e-12);
    }
}

#[test]
fn equal_sets_are_one_and_keys_side_by_side_are_another_thing() {
    let dense = Dense::builder().build().unwrap();
    let (q, keys, values) = sets(2, 2, 20, 33);
    let of = |keys: &Array5<f32>, values: &Array5<f32>| {
        guidance().reference(Sets { q: q.view(), keys: keys.view(), values: values.view() }).unwrap()
    };
    let twice = |x: &Array5<f32>| {
        concatenate![Axis(0), x.slice(s![..1, .., .., .., ..]), x.slice(s![..1, .., .., .., ..])]
    };
    let x = Sets { q: q.view(), keys: keys.view(), values: values.view() };
    close(&of(&twice(&keys), &twice(&values)), &dense.reference(x.pair(0, 0)).unwrap(), 1e-12);
    // Values under one set of keys are averaged.
    let one = keys.slice(s![..1, .., .., .., ..]).to_owned();
    let mean = values.mean_axis(Axis(0)).unwrap().insert_axis(Axis(0));
    close(&of(&one, &values), &of(&one, &mean), 1e-6);
    let join = |x: &Array5<f32>| concatenate![Axis(2), x.index_axis(Axis(0), 0), x.index_axis(Axis(0), 1)];
    let (k, v) = (join(&keys), join(&values));
    let joined = dense.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
    assert!(of(&keys, &values).iter().zip(&joined).any(|(a, b)| (a - b).abs() > 1e-2));
}

/// Sets without an output are not counted.
#[test]
fn many_sets_of_nothing() {
    let (q, set) = (Array4::<f32>::zeros((0, 2, 3, 8)), ndarray::Array5::<f32>::zeros((1, 0, 2, 7, 8)));
    let sets = set.broadcast((1 << 40, 0, 2, 7, 8)).unwrap();
    let x = Sets { q: q.view(), keys: sets, values: sets };
    assert_eq!(guidance().forward(x).unwrap().dim(), (0, 2, 3, 8));
    assert_eq!(guidance().reference(x).unwrap().dim(), (0, 2, 3, 8));
}

#[test]
fn refusals() {
    let (q, keys, values) = sets(3, 3, 5, 7);
    let refused = |p: usize, r: usize, len: usize| {
        let (keys, values) = (keys.slice(s![..p, .., .., .., ..]), values.slice(s![..r, .., .., ..len, ..]));
        refused(&guidance(), Sets { q: q.view(), keys, values })
    };
    let sets = "values: expected shape [sets, batch, kv_heads, kv_len, value_dim] of";
    assert_eq!(refused(3, 2, 7), format!("{sets} 3 sets, as of keys, or one, got [2, 2, 2, 7, 17]"));
    assert_eq!(refused(1, 0, 7), format!("{sets} one set at least, got [0, 2, 2, 7, 17]"));
    let keys = "keys: expected shape [sets, batch, kv_heads, kv_len, head_dim] of one set at least";
    assert_eq!(refused(0, 3, 7), format!("{keys}, got [0, 2, 2, 7, 12]"));
    let short = refused(3, 3, 6);
    assert!(short.starts_with("k: expected shape") || short.starts_with("v: expected shape"), "{short}");
}
