//! What every page here refuses, in one table, and what bad numbers do to a choice.

use ndarray::{Array1, Array2, Array3, Array4, Axis, s};

use crate::attention::{Attention, Mergeable, Selects};
use crate::cache::{Append, Cached, Contiguous, KvShape};
use crate::dense::Dense;
use crate::error::Result;
use crate::input::Qkv;
use crate::keys::{ATOM, BlockLists, Layout, Per, TokenLists};
use crate::math::rope::Rope;
use crate::sparse::testing::{Arrays, ByKeys, near};
use crate::sparse::*;
use crate::stages::selecting::Listing;

/// Sizes of blocks, budgets and counts of none, and what is no multiple: the page refuses
/// it by the name of the argument.
#[test]
fn options_of_none_are_refused_by_name() {
    fn of<M>(built: Result<M>) -> String {
        built.err().map_or_else(|| "accepted".to_owned(), |refusal| refusal.to_string())
    }
    let rope = || Rope::builder(16).build().unwrap();
    let weights = || Array3::<f32>::zeros((2, 48, 16));
    let table = [
        ("BiFormer", of(BiFormer::builder([2, 2], 0).build()), "k: "),
        ("BiFormer", of(BiFormer::builder([4, 4], 1).regions([0, 2]).build()), "regions: "),
        ("Bottleneck", of(Bottleneck::builder(0).build()), "k: "),
        ("Cca", of(Cca::builder(0, 4).build()), "group: "),
        ("Combiner", of(Combiner::builder(0).build()), "segment: "),
        ("Csa", of(Csa::builder(0).build()), "k: "),
        ("Csa", of(Csa::builder(1).stride(0).build()), "stride: "),
        ("Csa", of(Csa::builder(1).window(0).build()), "window: "),
        ("Dsa", of(Dsa::builder(0).build()), "k: "),
        ("Dsa", of(Dsa::builder(8).pool(0).build()), "pool: "),
        (
            "DynamicMask",
            of(DynamicMask::builder(Array1::zeros(2), Array2::zeros((2, 8))).keep(0).build()),
            "keep: ",
        ),
        ("FlexPrefill", of(FlexPrefill::builder().block(0).build()), "block: "),
        ("FlexPrefill", of(FlexPrefill::builder().block(ATOM + 1).build()), "block: "),
        ("Hca", of(Hca::builder().stride(0).build()), "stride: "),
        ("Hca", of(Hca::builder().window(0).build()), "window: "),
        ("Hcam", of(Hcam::builder(0, 1).build()), "chunk: "),
        ("Hcam", of(Hcam::builder(4, 0).build()), "k: "),
        ("Hip", of(Hip::builder(64).block(0).build()), "block: "),
        ("Hip", of(Hip::builder(0).build()), "budget: "),
        ("HyperAttention", of(HyperAttention::builder(4).block(0).build()), "block: "),
        ("InfLlm", of(InfLlm::builder(0).build()), "k: "),
        ("Landmark", of(Landmark::builder(0).build()), "block: "),
        ("Landmark", of(Landmark::builder(4).k(0).build()), "k: "),
        ("LongHeads", of(LongHeads::builder(rope(), 0).build()), "chunks: "),
        ("LongHeads", of(LongHeads::builder(rope(), 3).chunk(0).build()), "chunk: "),
        ("LongLora", of(LongLora::builder(2, 0).build()), "group: "),
        ("Moba", of(Moba::builder(0).build()), "k: "),
        ("Moba", of(Moba::builder(2).block(0).build()), "block: "),
        ("Moba", of(Moba::builder(2).block(ATOM + 1).build()), "block: "),
        ("Msa", of(Msa::builder(0).build()), "k: "),
        ("Msa", of(Msa::builder(2).block(0).build()), "block: "),
        ("Nsa", of(Nsa::builder(0).build()), "k: "),
        ("Nsa", of(Nsa::builder(2).window(0).build()), "window: "),
        ("Nsa", of(Nsa::builder(2).pool(0, 0).build()), "pool: "),
        ("Nsa", of(Nsa::builder(2).block(0).build()), "block: "),
        ("Qsa", of(Qsa::builder(0).build()), "k: "),
        ("Qsa", of(Qsa::builder(8).group(0).build()), "group: "),
        ("Quest", of(Quest::builder(0).build()), "budget: "),
        ("Quest", of(Quest::builder(64).page(0).build()), "page: "),
        ("Radial", of(Radial::builder(4, 0).build()), "tokens: "),
        ("Radial", of(Radial::builder(4, 16).block(0).build()), "block: "),
        ("RecycledAttention", of(RecycledAttention::builder(0, 4).build()), "k: "),
        ("RecycledAttention", of(RecycledAttention::builder(4, 0).build()), "every: "),
        ("Routing", of(Routing::builder(Array3::zeros((2, 4, 16)), 0).build()), "window: "),
        ("S2Attention", of(S2Attention::builder(4, 2).block(0).build()), "block: "),
        ("Sea", of(Sea::builder(0).build()), "k: "),
        ("SeerAttention", of(SeerAttention::builder(weights(), 0.1).block(0).build()), "block: "),
        ("SlidingTile", of(SlidingTile::builder([4, 4, 4], [0, 1, 1]).tile([2; 3]).build()), "window: "),
        ("SlidingTile", of(SlidingTile::builder([4, 4, 4], [1, 1, 1]).tile([2, 0, 2]).build()), "tile: "),
        ("TidalDecode", of(TidalDecode::builder(0, 4).build()), "k: "),
        ("TokenSelect", of(TokenSelect::builder(0).build()), "k: "),
        ("TokenSelect", of(TokenSelect::builder(4).chunk(0).build()), "chunk: "),
        ("Tksa", of(Tksa::builder(vec![]).build()), "temperatures: "),
        ("TopK", of(TopK::builder(0).build()), "k: "),
    ];
    let wrong: Vec<_> = table.iter().filter(|(_, refusal, name)| !refusal.starts_with(name)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A sequence that is shorter than a block is one block: that is dense attention.
#[test]
fn sequences_may_be_shorter_than_a_block() {
    /// One token after the other over a cache, and the shorter ones of a ragged batch.
    fn fills<M>(name: &str, m: &M)
    where
        M: for<'a> Attention<Qkv<'a, f32>> + for<'a> Attention<Cached<'a, f32, Contiguous>>,
    {
        short(name, m);
        let x = Arrays::normal([1, 4, 2, 40, 40, 24, 12], 5);
        let dense = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
        let mut cache = Contiguous::<f32>::new(shape, 1, 40).unwrap();
        for n in 0..40 {
            let token = s![0, .., n..n + 1, ..];
            cache.append(0, x.k.slice(token), x.v.slice(token)).unwrap();
            let q = x.q.slice(s![.., .., n..n + 1, ..]);
            let step = m.forward(Cached::new(q, &cache)).unwrap();
            near(&format!("{name}, token {n}"), &step, &dense.slice(s![.., .., n..n + 1, ..]).to_owned());
        }
    }
    fn short(name: &str, m: &impl for<'a> Attention<Qkv<'a, f32>>) {
        for n in [1, 5, 33] {
            let x = Arrays::normal([2, 4, 2, n, n, 24, 12], n as u64);
            let dense = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
            near(&format!("{name} of {n} tokens"), &m.forward(x.qkv()).unwrap(), &dense);
        }
    }
    fn ragged(name: &str, m: &impl for<'a> Attention<Qkv<'a, f32>>) {
        let (x, lengths) = (Arrays::normal([3, 4, 2, 3, 300, 24, 12], 9), [3, 300, 40]);
        let dense = Dense::builder().causal().build().unwrap();
        let [got, want] =
            [m.forward(x.qkv().key_lengths(&lengths)), dense.forward(x.qkv().key_lengths(&lengths))];
        let ([got, want], of) = ([got.unwrap(), want.unwrap()], s![..;2, .., .., ..]);
        near(name, &got.slice(of).to_owned(), &want.slice(of).to_owned());
    }
    macro_rules! all {
        ($($how:ident),+: $builder:expr) => {{
            let m = $builder.build().unwrap();
            $($how(stringify!($builder), &m);)+
        }};
    }
    all!(fills, ragged: Moba::builder(2).block(64));
    all!(fills, ragged: Quest::builder(64).page(64).causal());
    all!(fills, ragged: InfLlm::builder(1).local(1).dense_below(0));
    all!(fills, ragged: Hip::builder(64).block(64).window(64).q_block(64));
    all!(fills, ragged: FlexPrefill::builder().block(64));
    all!(fills, ragged: S2Attention::builder(4, 2).block(64));
    all!(fills: Landmark::builder(100).k(1));
    all!(short: Landmark::builder(100));
    all!(short: Cca::builder(100, 1));
    all!(short: Combiner::builder(100).causal());
    all!(short: LongLora::builder(4, 100));
    all!(short: HyperAttention::builder(4).block(100).exact_below(0).causal());
    // Tokens whose number is known are another matter.
    let refusal = Radial::builder(2, 20).block(41).build().unwrap_err().to_string();
    assert_eq!(refusal, "block: expected at most the 40 tokens of the video, got 41");
    let refusal = SlidingTile::builder([4, 4, 4], [1, 1, 1]).tile([8, 4, 4]).build().unwrap_err();
    assert_eq!(refusal.to_string(), "canvas: expected multiples of [8, 4, 4], got [4, 4, 4]");
}

/// Lists out of range, out of order or of other sizes never come to be.
#[test]
fn lists_out_of_range_or_order_are_refused_by_name() {
    let layout = Layout {
        per: Per::Sequence,
        sequences: 1,
        q_heads: 1,
        kv_heads: 1,
        queries: 2,
        q_block: 1,
        keys: 100,
    };
    let tokens = |offsets: &[usize], keys: &[u32]| {
        TokenLists::from_keys(layout, offsets, keys).map_err(|refusal| refusal.to_string())
    };
    let blocks = |offsets: &[usize], atoms: &[u32]| {
        BlockLists::new(layout, offsets.to_vec(), atoms.to_vec()).map_err(|refusal| refusal.to_string())
    };
    assert!(tokens(&[0, 1, 2], &[3, 99]).is_ok() && blocks(&[0, 1, 3], &[1, 0, 1]).is_ok());
    for (offsets, keys) in [(&[0, 1, 2], [3, 100]), (&[0, 2, 2], [4, 3]), (&[0, 2, 2], [4, 4])] {
        assert!(tokens(offsets, &keys).unwrap_err().starts_with("keys: "), "{offsets:?} {keys:?}");
    }
    for (offsets, atoms) in [(&[0, 1, 2], [0, 2]), (&[0, 2, 2], [1, 0]), (&[0, 2, 2], [1, 1])] {
        assert!(blocks(offsets, &atoms).unwrap_err().starts_with("atoms: "), "{offsets:?} {atoms:?}");
    }
    for offsets in [&[0, 2][..], &[0, 1, 1], &[1, 1, 2], &[0, 3, 2]] {
        assert!(tokens(offsets, &[3, 4]).unwrap_err().starts_with("offsets: "), "{offsets:?}");
        assert!(blocks(offsets, &[0, 1]).unwrap_err().starts_with("offsets: "), "{offsets:?}");
    }
}

/// What a causal page does with a list, whatever it names: rows without keys give 0 and an
/// LSE of -inf; keys after a query are nothing to it; and lists of other sizes are refused.
fn holds<M, I: Listing>(m: &M, all: impl Fn(Layout) -> I)
where
    M: for<'a> Selects<Qkv<'a, f32>, Index = I> + for<'a> Mergeable<Qkv<'a, f32>>,
{
    let x = Arrays::normal([1, 4, 2, 70, 40, 24, 12], 1);
    let (out, lse) = m.forward_with_lse(x.qkv()).unwrap();
    assert!(out.slice(s![.., .., ..30, ..]).iter().all(|&x| x == 0.0));
    assert!(lse.slice(s![.., .., ..30]).iter().all(|&x| x == f32::NEG_INFINITY));
    assert!(lse.slice(s![.., .., 30..]).iter().all(|x| x.is_finite()));

    let x = Arrays::normal([1, 4, 2, 60, 300, 24, 12], 2);
    let index = m.select(x.qkv()).unwrap();
    let every = all(*index.layout());
    let dense = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
    near("lists that look ahead", &m.forward_on(x.qkv(), &every).unwrap(), &dense);
    let longer = Arrays::normal([1, 4, 2, 60, 330, 24, 12], 2);
    let wider = Arrays::normal([1, 4, 2, 61, 300, 24, 12], 2);
    let other = Arrays::normal([2, 4, 2, 60, 300, 24, 12], 2);
    let mut out = Array4::from_elem((1, 4, 60, 12), f32::NAN);
    let refusal = |refused: Result<()>| refused.unwrap_err().to_string();
    let workspace = &mut crate::engine::workspace::Workspace::new();
    for y in [&longer, &other] {
        let index = all(*m.select(y.qkv()).unwrap().layout());
        let refused = refusal(m.forward_on_into(x.qkv(), &index, out.view_mut(), workspace));
        assert!(refused.starts_with("keys: ") || refused.starts_with("index: "), "{refused}");
    }
    let mut long = Array4::from_elem((1, 4, 61, 12), f32::NAN);
    let refused = refusal(m.forward_on_into(wider.qkv(), &index, long.view_mut(), workspace));
    assert!(refused.starts_with("keys: ") || refused.starts_with("index: "), "{refused}");
    assert!(out.iter().chain(&long).all(|x| x.is_nan()), "something was written");
}

/// Of keys that are NaN none is in a list, unless it must be.
fn leaves_out_nan<M, I: Listing>(m: &M)
where
    M: for<'a> Selects<Qkv<'a, f32>, Index = I> + for<'a> Mergeable<Qkv<'a, f32>>,
{
    // Keys 64 to 127 lie in the middle: no page must read them. All are NaN, since a
    // summary of some keys of a block may leave out others.
    let mut x = Arrays::normal([1, 4, 2, 1, 300, 24, 12], 3);
    x.k.slice_mut(s![.., .., 64..128, ..]).fill(f32::NAN);
    let index = m.select(x.qkv()).unwrap();
    for head in 0..4 {
        let named = index.list(0, head, 0).into_iter().any(|run| run.start < 128 && run.end > 64);
        assert!(!named, "a key that is NaN is chosen");
    }
    assert!(m.forward(x.qkv()).unwrap().iter().all(|x| x.is_finite()));
}

/// Of more keys than are numbers those that are, in prefill and in decoding, over arrays
/// and over a cache; where none is, none, but what must be seen.
fn fills_up_with_nothing<M, I: Listing>(m: &M, forced: bool, shares: bool)
where
    M: for<'a> Selects<Qkv<'a, f32>, Index = I>
        + for<'a> Mergeable<Qkv<'a, f32>>
        + for<'a> Selects<Cached<'a, f32, Contiguous>, Index = I>,
{
    // The forced window of the first of them begins behind what is NaN.
    for queries in [1, 32] {
        let mut x = Arrays::normal([1, 4, 2, queries, 300, 24, 12], 3);
        x.k.slice_mut(s![.., .., 64..256, ..]).fill(f32::NAN);
        let mut cache =
            Contiguous::<f32>::new(KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 }, 1, 300).unwrap();
        cache.append(0, x.k.index_axis(Axis(0), 0), x.v.index_axis(Axis(0), 0)).unwrap();
        let (index, cached) = (m.select(x.qkv()).unwrap(), Cached::new(x.q.view(), &cache));
        assert!(m.select(cached).unwrap() == index);
        let (want, margins) = m.reference_select(x.qkv()).unwrap();
        assert_eq!(<M as Selects<Qkv<'_, f32>>>::difference(&index, &want, &margins), None);
        for (head, query) in (0..4).flat_map(|head| (0..queries).map(move |query| (head, query))) {
            let list = index.list(0, head, query / index.layout().q_block);
            assert!(list.iter().all(|run| run.end <= 64 || run.start >= 256), "{list:?}");
            // Of shares none is known where one is not.
            assert_eq!(list.is_empty(), shares && !forced);
        }
        let out = m.forward(x.qkv()).unwrap();
        assert!(out.iter().all(|x| x.is_finite()));
        near("a cache", &m.forward(cached).unwrap(), &out);

        x.k.fill(f32::NAN);
        let (out, lse) = m.forward_with_lse(x.qkv()).unwrap();
        let index = m.select(x.qkv()).unwrap();
        assert!(index == m.reference_select(x.qkv()).unwrap().0);
        if forced {
            assert!(out.iter().chain(&lse).all(|x| x.is_nan()));
        } else {
            assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
        }
    }
}

#[test]
fn budgets_above_the_numbers_are_not_filled_up() {
    fills_up_with_nothing(&TopK::builder(200).build().unwrap(), false, false);
    fills_up_with_nothing(&TopK::builder(200).causal().build().unwrap(), false, false);
    fills_up_with_nothing(&TidalDecode::builder(200, 4).causal().build().unwrap(), false, false);
    fills_up_with_nothing(&RecycledAttention::builder(200, 4).causal().build().unwrap(), false, true);
    fills_up_with_nothing(&Quest::builder(320).causal().build().unwrap(), true, false);
    fills_up_with_nothing(&Moba::builder(5).block(64).build().unwrap(), true, false);
    fills_up_with_nothing(&TokenSelect::builder(200).chunk(1).sinks(4).local(8).build().unwrap(), true, true);
    fills_up_with_nothing(&InfLlm::builder(5).local(1).dense_below(0).build().unwrap(), true, true);
}

/// Lists of all keys.
fn every_token(layout: Layout) -> TokenLists {
    let (lists, n) = (layout.lists().unwrap(), layout.keys);
    let offsets: Vec<usize> = (0..=lists).map(|list| list * n).collect();
    let keys: Vec<u32> = (0..lists).flat_map(|_| 0..n as u32).collect();
    TokenLists::from_keys(layout, &offsets, &keys).unwrap()
}

fn every_block(layout: Layout) -> BlockLists {
    let (lists, n) = (layout.lists().unwrap(), layout.atoms());
    let offsets = (0..=lists).map(|list| list * n).collect();
    BlockLists::new(layout, offsets, (0..lists).flat_map(|_| 0..n as u32).collect()).unwrap()
}

#[test]
fn lists_and_choices_of_every_page() {
    fn held<M, I: Listing>(m: &M, all: impl Fn(Layout) -> I)
    where
        M: for<'a> Selects<Qkv<'a, f32>, Index = I> + for<'a> Mergeable<Qkv<'a, f32>>,
    {
        holds(m, all);
        leaves_out_nan(m);
    }
    held(&Moba::builder(2).block(64).build().unwrap(), every_block);
    // Its normaliser takes the pools of all keys: where one is NaN no score is a number, and
    // what must be seen is all that is.
    let infllm = InfLlm::builder(3).local(1).dense_below(0).build().unwrap();
    holds(&infllm, every_block);
    leaves_out_nan(&infllm);
    let mut x = Arrays::normal([1, 4, 2, 1, 300, 24, 12], 3);
    x.k.slice_mut(s![.., .., 64..128, ..]).fill(f32::NAN);
    let index = infllm.select(x.qkv()).unwrap();
    assert!((0..4).all(|head| index.list(0, head, 0) == [0..64, 256..300]));
    held(&Quest::builder(64).causal().build().unwrap(), every_token);
    held(&TopK::builder(20).causal().build().unwrap(), every_token);
    held(&TidalDecode::builder(20, 4).causal().build().unwrap(), every_token);
    held(&RecycledAttention::builder(20, 4).causal().build().unwrap(), every_token);
    held(&TokenSelect::builder(20).chunk(1).sinks(4).local(8).build().unwrap(), every_token);
    let heads = Some(4);
    held(&ByKeys { mechanism: Dsa::builder(20).build().unwrap(), pool: 1, heads }, every_token);
    held(&ByKeys { mechanism: Dsa::builder(20).pool(4).build().unwrap(), pool: 4, heads }, every_token);
    held(&ByKeys { mechanism: Qsa::builder(20).build().unwrap(), pool: 4, heads }, every_token);
    let msa = Msa::builder(2).block(64).build().unwrap();
    held(&ByKeys { mechanism: msa, pool: 1, heads: None }, every_block);
}
