use ndarray::s;

use super::*;
use crate::attention::{Attention, Selects};
use crate::cache::{Append, Cache, Cached, Contiguous, KvShape, Paged, Pages};
use crate::dense::Dense;
use crate::sparse::testing::{self, Arrays};

fn rope() -> Rope {
    Rope::builder(16).theta(100.0).build().unwrap()
}

fn long(chunks: usize, begin: usize) -> LongHeadsBuilder {
    LongHeads::builder(rope(), chunks).chunk(16).begin(begin)
}

/// Where no chunk is left out positions are those of the sequence.
#[test]
fn all_chunks_are_dense() {
    let x = Arrays::normal([2, 4, 2, 150, 150, 16, 16], 1);
    let [mut q, mut k] = [x.q.clone(), x.k.clone()];
    let positions: Vec<isize> = (0..150).collect();
    [&mut q, &mut k].into_iter().for_each(|x| rope().rotate(x.view_mut(), &positions).unwrap());
    let turned = Qkv::new(q.view(), k.view(), x.v.view());
    let want = Dense::builder().causal().build().unwrap().forward(turned).unwrap();
    for builder in [long(10, 0), long(3, 150)] {
        testing::near("all", &builder.build().unwrap().forward(LongInput::from(x.qkv())).unwrap(), &want);
    }
}

/// A step over keys at their places and chunks that were kept is the last row, and
/// later tokens are nothing to it.
#[test]
fn last_row_is_decoding() {
    for (heads, groups) in [(4, 2), (2, 2)] {
        let x = Arrays::normal([1, heads, groups, 150, 150, 16, 16], 2);
        let all = long(4, 64).build().unwrap();
        let (whole, chunks) =
            (all.forward(LongInput::from(x.qkv())).unwrap(), all.chunk_keys(x.qkv()).unwrap());
        let mut k = x.k.clone();
        let places: Vec<isize> = (0..150).map(|j| j % 16).collect();
        rope().rotate(k.view_mut(), &places).unwrap();
        for row in [149, 143, 100] {
            let of = |x: &Array4<f32>, n: usize| x.slice(s![.., .., ..n, ..]).to_owned();
            let (q, k, v) = (x.q.slice(s![.., .., row..row + 1, ..]), of(&k, row + 1), of(&x.v, row + 1));
            let qkv = Qkv::new(q, k.view(), v.view());
            let step = LongInput { qkv, chunks: Some(chunks.view()) };
            let got = long(4, 64).turned().build().unwrap().forward(step).unwrap();
            testing::near("step", &got, &whole.slice(s![.., .., row..row + 1, ..]).to_owned());
        }
        let index = all.select(LongInput::from(x.qkv())).unwrap();
        let chunks: Vec<usize> = all.lists.of(&index, (0, 1, 149)).collect();
        assert!(chunks.len() == 4 && chunks[0] == 0 && chunks[2..] == [8, 9], "{chunks:?}");
        let mut later = Arrays { q: x.q.clone(), k: x.k.clone(), v: x.v.clone() };
        for x in [&mut later.q, &mut later.k, &mut later.v] {
            x.slice_mut(s![.., .., 120.., ..]).fill(f32::NAN);
        }
        let before = all.forward(LongInput::from(later.qkv())).unwrap();
        testing::near(
            "before",
            &before.slice(s![.., .., ..120, ..]).to_owned(),
            &whole.slice(s![.., .., ..120, ..]).to_owned(),
        );
    }
}

/// Over caches that hold the rows, turned or not, of sequences of any lengths, in chunks
/// of a prompt and in decoding, it selects and gives what it does over arrays.
#[test]
fn caches_are_arrays() {
    let x = Arrays::normal([2, 4, 2, 150, 150, 16, 16], 5);
    let chunks = long(4, 64).build().unwrap().chunk_keys(x.qkv()).unwrap();
    let mut placed = x.k.clone();
    let places: Vec<isize> = (0..150).map(|j| j % 16).collect();
    rope().rotate(placed.view_mut(), &places).unwrap();
    let shape = KvShape { kv_heads: 2, head_dim: 16, value_dim: 16 };
    for (q_len, lengths) in [(1, [150, 90]), (20, [100, 150]), (5, [3, 149])] {
        let first = |b: usize| lengths[b] as isize - q_len as isize;
        // The queries of the last tokens; those of none see nothing.
        let mut q = Array4::from_elem((2, 4, q_len, 16), 0.5);
        for (b, i) in (0..2).flat_map(|b| (0..q_len).map(move |i| (b, i))) {
            if let Ok(row) = usize::try_from(first(b) + i as isize) {
                q.slice_mut(s![b, .., i, ..]).assign(&x.q.slice(s![b, .., row, ..]));
            }
        }
        for turned in [false, true] {
            let builder = if turned { long(4, 64).turned() } else { long(4, 64) };
            let (long, k) = (builder.build().unwrap(), if turned { &placed } else { &x.k });
            let mut flat = Contiguous::<f32>::new(shape, 2, 150).unwrap();
            let mut paged = Paged::<f32>::new(shape, 2, Pages { count: 60, len: 8 }).unwrap();
            let mut half = Paged::<half::f16>::new(shape, 2, Pages { count: 60, len: 8 }).unwrap();
            for (b, &n) in lengths.iter().enumerate() {
                let (k, v) = (k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..]));
                flat.append(b, k, v).unwrap();
                paged.append(b, k, v).unwrap();
                half.append(b, k, v).unwrap();
            }
            let caches: [&dyn Cache; 3] = [&flat, &paged, &half];
            for (which, cache) in caches.into_iter().enumerate() {
                let cached = LongCache { cached: Cached::new(q.view(), cache), chunks: chunks.view() };
                let (index, out) = (long.select(cached).unwrap(), long.forward(cached).unwrap());
                let (want, margins) = long.reference_select(cached).unwrap();
                let apart = <LongHeads as Selects<LongInput<'_, f32>>>::difference(&index, &want, &margins);
                assert_eq!(apart, None);
                let want = long.reference_on(cached, &index).unwrap().mapv(|x| x as f32);
                testing::near("definition", &out, &want);
                let bytes = long.workspace_bytes(cached).unwrap();
                let mut workspace = Workspace::with_capacity(bytes);
                let before = workspace.capacity();
                let mut again = Array4::zeros(out.dim());
                long.forward_into(cached, again.view_mut(), &mut workspace).unwrap();
                assert_eq!((workspace.capacity(), again), (before, out.clone()));
                for (b, &n) in lengths.iter().enumerate().filter(|_| which < 2) {
                    let of = |x: &Array4<f32>| x.slice(s![b..b + 1, .., ..n, ..]).to_owned();
                    let (k, v) = (of(k), of(&x.v));
                    let qkv = Qkv::new(q.slice(s![b..b + 1, .., .., ..]), k.view(), v.view());
                    let given = Some(chunks.slice(s![b..b + 1, .., .., ..]));
                    let alone = long.forward(LongInput { qkv, chunks: given }).unwrap();
                    testing::near("cache", &out.slice(s![b..b + 1, .., .., ..]).to_owned(), &alone);
                }
            }
            // Both sequences packed, in the other order, and a row of none.
            let parts = [q.slice(s![1..2, .., q_len - 1.., ..]), q.slice(s![0..1, .., .., ..])];
            let rest = Array4::from_elem((1, 4, 1, 16), f32::NAN);
            let all = ndarray::concatenate![Axis(2), parts[0], parts[1], rest];
            let (offsets, swapped) = ([0, 1, 1 + q_len], chunks.select(Axis(0), &[1, 0]));
            let packed = Cached::new(all.view(), &paged).sequences(&[1, 0]).packed(&offsets);
            let packed = LongCache { cached: packed, chunks: swapped.view() };
            let (got, want) = (
                long.forward(packed).unwrap(),
                long.forward(LongCache { cached: Cached::new(q.view(), &paged), chunks: chunks.view() })
                    .unwrap(),
            );
            let first = got.slice(s![.., .., ..1, ..]).to_owned();
            testing::near("first", &first, &want.slice(s![1..2, .., q_len - 1.., ..]).to_owned());
            let second = got.slice(s![.., .., 1..1 + q_len, ..]).to_owned();
            testing::near("second", &second, &want.slice(s![0..1, .., .., ..]).to_owned());
            assert!(got.slice(s![.., .., 1 + q_len.., ..]).iter().all(|&x| x == 0.0));
        }
    }
}

/// A batch of none has lists of none, of as many queries as its arrays have.
#[test]
fn a_batch_of_none_is_one() {
    let (x, long) = (Arrays::normal([0, 4, 2, 40, 40, 16, 16], 7), long(4, 16).build().unwrap());
    let x = LongInput::from(x.qkv());
    let index = long.select(x).unwrap();
    assert_eq!(index.layout().queries, 40);
    assert_eq!(long.reference_select(x).unwrap().0, index);
    assert_eq!(long.forward_on(x, &index).unwrap().dim(), (0, 4, 40, 16));
    assert_eq!(long.reference(x).unwrap().dim(), long.forward(x).unwrap().dim());
}

#[test]
fn caches_that_do_not_fit_are_refused() {
    let x = Arrays::normal([2, 4, 2, 3, 90, 16, 16], 6);
    let shape = KvShape { kv_heads: 2, head_dim: 16, value_dim: 16 };
    let mut cache = Paged::<f32>::new(shape, 2, Pages { count: 60, len: 8 }).unwrap();
    for (b, n) in [(0, 90), (1, 40)] {
        cache.append(b, x.k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..])).unwrap();
    }
    let long = long(3, 0).build().unwrap();
    let zero = Array4::zeros((2, 4, 5, 16));
    let refusal = |chunks: ArrayView4<'_, f32>| {
        let x = LongCache { cached: Cached::new(x.q.view(), &cache), chunks };
        let mut out = Array4::from_elem((2, 4, 3, 16), f32::NAN);
        let refused = long.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap_err();
        assert!(out.iter().all(|x| x.is_nan()), "something was written");
        refused.to_string()
    };
    assert_eq!(refusal(zero.slice(s![.., .., ..4, ..])), "chunks: expected 5 or more chunks, got 4");
    assert!(refusal(zero.slice(s![..1, .., .., ..])).starts_with("chunks: expected shape"));
    assert!(refusal(zero.slice(s![.., ..2, .., ..])).starts_with("chunks: expected shape"));
    let own = LongCache { cached: Cached::new(x.q.view(), &cache), chunks: zero.view() };
    let index = long.select(own).unwrap();
    // Keys that a shorter sequence has not, and a part of a chunk.
    for key in [48, 3] {
        let lists = 2 * 4 * 3;
        let offsets: Vec<usize> = (0..=lists).map(|list| usize::from(list == lists)).collect();
        let other = TokenLists::from_keys(*index.layout(), &offsets, &[key]).unwrap();
        assert!(long.forward_on(own, &other).unwrap_err().to_string().starts_with("index: "), "{key}");
    }
}

#[test]
fn refusals() {
    let refusal = |builder: LongHeadsBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(long(2, 0)), "chunks: expected at least 3, got 2");
    assert_eq!(refusal(long(3, 0).chunk(0)), "chunk: expected at least 1, got 0");
    let (x, long) = (Arrays::normal([1, 2, 1, 90, 90, 16, 16], 1), long(4, 0).build().unwrap());
    let short = Qkv { q: x.q.slice(s![.., .., 80.., ..]), ..x.qkv() };
    assert!(long.forward(LongInput::from(short)).unwrap_err().to_string().starts_with("chunks: "));
    let zero = Array4::zeros((1, 2, 4, 16));
    let few = LongInput { qkv: x.qkv(), chunks: Some(zero.view()) };
    assert!(long.forward(few).unwrap_err().to_string().starts_with("chunks: "));
    let layout = Layout { queries: 90, ..*long.select(LongInput::from(x.qkv())).unwrap().layout() };
    let keys: Vec<u32> = (0..180).map(|_| 3).collect();
    let other = TokenLists::from_keys(layout, &(0..=180).collect::<Vec<_>>(), &keys).unwrap();
    assert!(
        long.forward_on(LongInput::from(x.qkv()), &other).unwrap_err().to_string().starts_with("index: ")
    );
}
