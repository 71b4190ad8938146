use ndarray::{Axis, concatenate};

use super::*;
use crate::attention::Attention;
use crate::cache::cored::CoredCache;
use crate::cache::{Append, Cache, Cached, Contiguous, Int8, KvShape, Paged, Pages};
use crate::dense::Dense;
use crate::engine::workspace::Workspace;
use crate::input::Site;
use crate::mask::Mask;
use crate::sparse::testing::{Arrays, near};
use crate::testing::qkv::held;

fn cca(group: usize, near: usize) -> Cca {
    Cca::builder(group, near).build().unwrap()
}

#[test]
fn all_near_or_alone_is_dense_and_the_mean_of_equal_tokens_is_one_of_them() {
    let x = Arrays::normal([2, 4, 2, 300, 300, 24, 12], 1);
    let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
    for (group, near_) in [(16, 300), (7, 1000), (1, 0), (1, 40)] {
        near(&format!("{group} {near_}"), &cca(group, near_).forward(x.qkv()).unwrap(), &want);
    }
    // Equal keys in a group: both poolings are means.
    let mut x = x;
    for j in 0..300 {
        let first = x.k.slice(s![.., .., j / 8 * 8, ..]).to_owned();
        x.k.slice_mut(s![.., .., j, ..]).assign(&first);
    }
    let mean = Cca::builder(8, 50).mean().build().unwrap();
    near("means", &cca(8, 50).forward(x.qkv()).unwrap(), &mean.forward(x.qkv()).unwrap());
}

#[test]
fn kernels_keep_to_the_definition() {
    for (n, group, near) in [(0, 4, 3), (1, 4, 0), (70, 4, 9), (333, 16, 100), (150, 7, 20)] {
        let x = Arrays::normal([2, 4, 2, n, n, 24, 12], n as u64);
        held(&cca(group, near), x.qkv());
        held(&Cca::builder(group, near).mean().scale(2.0).build().unwrap(), x.qkv());
    }
}

/// Groups and what is near are all tokens up to the query's, each once.
#[test]
fn every_token_is_seen_once() {
    for (group, near) in [(4, 9), (16, 3), (7, 0), (5, 12)] {
        let cca = cca(group, near);
        for t in 0..200 {
            let site = Site { batch: 0, head: 0, q_len: 200, kv_len: 200 };
            let mut words = [0; 4];
            cca.sight().fill(t as isize, 0, 200, &mut words);
            let cores = words.iter().map(|word| word.count_ones() as usize).sum::<usize>();
            let seen = (0..200).filter(|&j| cca.near.mask().visible(&site, t, j));
            assert!(seen.eq(cores * group..t + 1), "{group} {near} {t}");
            assert!(t + 1 - cores * group >= near.min(t + 1));
        }
    }
}

#[test]
fn decoding_is_the_last_row() {
    let x = Arrays::normal([2, 4, 2, 120, 120, 24, 12], 3);
    let at = |rows: Range<usize>| {
        let keys = s![.., .., ..rows.end, ..];
        Qkv::new(x.q.slice(s![.., .., rows, ..]), x.k.slice(keys), x.v.slice(keys))
    };
    let cca = cca(8, 21);
    let whole = cca.forward(x.qkv()).unwrap();
    let mut cores = cca.cores(at(0..50)).unwrap();
    for cut in [50..51, 51..60, 60..64, 64..120] {
        cca.extend(&mut cores, at(cut.clone())).unwrap();
        let x = Cored::new(at(cut.clone()), &cores);
        held(&cca, x);
        near("step", &cca.forward(x).unwrap(), &whole.slice(s![.., .., cut, ..]).to_owned());
    }
    assert_eq!(cores.len(), 15);
    let once = cca.cores(x.qkv()).unwrap();
    near("keys", &cores.k, &once.k);
    near("values", &cores.v, &once.v);
}

/// Of no sequences no groups are missing.
#[test]
fn a_batch_of_none_has_no_cores() {
    let x = Arrays::normal([0, 4, 2, 60, 60, 16, 8], 4);
    let (cca, none) = (cca(8, 21), cca(8, 21).cores(x.qkv()).unwrap());
    assert_eq!(cca.forward(Cored::new(x.qkv(), &none)).unwrap().dim(), (0, 4, 60, 8));
}

#[test]
fn refusals() {
    let refusal = |builder: CcaBuilder| builder.build().unwrap_err().to_string();
    assert!(refusal(Cca::builder(0, 3)).starts_with("group: "));
    assert!(refusal(Cca::builder(4, usize::MAX)).starts_with("near: "));
    let (x, cca) = (Arrays::normal([1, 2, 1, 5, 60, 8, 4], 1), cca(8, 8));
    assert!(cca.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    assert!(cca.cores(x.qkv()).unwrap_err().to_string().starts_with("q: "));
    let all = Arrays::normal([1, 2, 1, 60, 60, 8, 4], 1);
    let few = cca.cores(Qkv::new(all.q.view(), all.k.view(), all.v.view())).unwrap();
    let few = Cores {
        k: few.k.slice(s![.., .., ..3, ..]).to_owned(),
        v: few.v.slice(s![.., .., ..3, ..]).to_owned(),
        counts: vec![3],
    };
    assert!(cca.forward(Cored::new(x.qkv(), &few)).unwrap_err().to_string().starts_with("cores: "));
    let other = Arrays::normal([1, 4, 1, 5, 60, 8, 4], 1);
    assert!(cca.forward(Cored::new(other.qkv(), &few)).unwrap_err().to_string().starts_with("cores: "));
    assert!(cca.forward(all.qkv().key_lengths(&[3])).is_err());
}

fn alone(x: &Arrays, b: usize) -> Qkv<'_, f32> {
    let of = s![b..b + 1, .., .., ..];
    Qkv::new(x.q.slice(of), x.k.slice(of), x.v.slice(of))
}

/// Sequences of caches of their own lengths, which grow in pieces of their own: cores and
/// outputs are those of the arrays.
#[test]
fn caches_are_arrays() {
    let (x, cca) = (Arrays::normal([3, 4, 2, 120, 120, 24, 12], 5), cca(8, 21));
    let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
    let mut flat = Contiguous::<f32>::new(shape, 3, 120).unwrap();
    let mut paged = Paged::<f32>::new(shape, 3, Pages { count: 30, len: 16 }).unwrap();
    let [mut of_flat, mut of_paged] = [0; 2].map(|_| cca.cores_for(&flat, 4).unwrap());
    let whole: Vec<Array4<f32>> = (0..3).map(|b| cca.forward(alone(&x, b)).unwrap()).collect();
    // Of each sequence the tokens of a piece: the middle one stays behind and catches up.
    let pieces = [[0..70, 0..9, 0..120], [70..71, 9..10, 120..120], [71..80, 10..90, 120..120]];
    for piece in pieces {
        let slots: Vec<usize> = (0..3).filter(|&b| !piece[b].is_empty()).collect();
        let mut offsets = vec![0];
        for &b in &slots {
            let (k, v) =
                (x.k.slice(s![b, .., piece[b].clone(), ..]), x.v.slice(s![b, .., piece[b].clone(), ..]));
            flat.append(b, k, v).unwrap();
            paged.append(b, k, v).unwrap();
            offsets.push(offsets[offsets.len() - 1] + piece[b].len());
        }
        let parts: Vec<_> =
            slots.iter().map(|&b| x.q.slice(s![b..b + 1, .., piece[b].clone(), ..])).collect();
        let q = concatenate(Axis(2), &parts).unwrap();
        let caches: [(&dyn Cache, &mut Cores); 2] = [(&flat, &mut of_flat), (&paged, &mut of_paged)];
        for (cache, cores) in caches {
            let packed = Cached::new(q.view(), cache).sequences(&slots).packed(&offsets);
            cca.extend_cached(cores, packed).unwrap();
            let x = CoredCache::new(packed, cores);
            held(&cca, x);
            let bytes = cca.workspace_bytes(x).unwrap();
            let (mut workspace, mut out) =
                (Workspace::with_capacity(bytes), Array4::zeros((1, 4, q.dim().2, 12)));
            let before = workspace.capacity();
            cca.forward_into(x, out.view_mut(), &mut workspace).unwrap();
            assert_eq!(workspace.capacity(), before);
            assert!(cca.cost(x).unwrap().flops > 0);
            for (i, &b) in slots.iter().enumerate() {
                let got = out.slice(s![.., .., offsets[i]..offsets[i + 1], ..]).to_owned();
                near("packed", &got, &whole[b].slice(s![.., .., piece[b].clone(), ..]).to_owned());
            }
        }
    }
    assert_eq!((of_flat.counts(), of_flat.len()), ([10, 11, 15].as_slice(), 15));
    for b in 0..3 {
        let once = cca.cores(alone(&x, b)).unwrap();
        let n = of_flat.counts()[b];
        near(
            "keys",
            &of_flat.k.slice(s![b..b + 1, .., ..n, ..]).to_owned(),
            &once.k.slice(s![.., .., ..n, ..]).to_owned(),
        );
        near(
            "values",
            &of_paged.v.slice(s![b..b + 1, .., ..n, ..]).to_owned(),
            &once.v.slice(s![.., .., ..n, ..]).to_owned(),
        );
    }
    // A batch of single tokens over few bits.
    let mut few = Contiguous::<Int8>::new(shape, 3, 120).unwrap();
    for b in 0..3 {
        few.append(b, x.k.index_axis(Axis(0), b), x.v.index_axis(Axis(0), b)).unwrap();
    }
    let mut cores = cca.cores_for(&few, 4).unwrap();
    cca.extend_cached(&mut cores, Cached::new(x.q.view(), &few)).unwrap();
    held(&cca, CoredCache::new(Cached::new(x.q.slice(s![.., .., 119.., ..]), &few), &cores));
}

/// What does not fit a cache is refused, and nothing is merged.
#[test]
fn caches_that_do_not_fit_are_refused() {
    let (x, cca) = (Arrays::normal([2, 4, 2, 5, 60, 8, 4], 6), cca(8, 8));
    let shape = KvShape { kv_heads: 2, head_dim: 8, value_dim: 4 };
    let mut cache = Contiguous::<f32>::new(shape, 2, 60).unwrap();
    for b in 0..2 {
        cache.append(b, x.k.index_axis(Axis(0), b), x.v.index_axis(Axis(0), b)).unwrap();
    }
    let cached = Cached::new(x.q.view(), &cache);
    let mut cores = cca.cores_for(&cache, 4).unwrap();
    let refused = cca.extend_cached(&mut cores, cached).unwrap_err().to_string();
    assert_eq!(refused, "q: expected the queries of the tokens from 7 on, got the last 5 of 60");
    assert!(cores.is_empty());
    let refused = cca.forward(CoredCache::new(cached, &cores)).unwrap_err().to_string();
    assert_eq!(refused, "cores: expected at least 6 groups, of 60 tokens, got 0");
    let mut other = cca.cores_for(&cache, 2).unwrap();
    assert!(cca.extend_cached(&mut other, cached).unwrap_err().to_string().starts_with("cores: "));
    assert!(cca.forward(CoredCache::new(cached, &other)).is_err());
}
