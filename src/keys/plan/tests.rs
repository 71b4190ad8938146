use ndarray::Array4;
use proptest::prelude::*;

use super::*;
use crate::mask::Boolean;

fn layout(per: Per, q_block: usize, n: [usize; 5]) -> Layout {
    let [sequences, kv_heads, group, queries, keys] = n;
    Layout { per, sequences, q_heads: kv_heads * group, kv_heads, queries, q_block, keys }
}

fn dims(layout: &Layout) -> Dims {
    Dims {
        batch: layout.sequences,
        q_heads: layout.q_heads,
        kv_heads: layout.kv_heads,
        q_len: layout.queries,
        kv_len: layout.keys,
        head_dim: 1,
        value_dim: 1,
        packed: false,
    }
}

fn per() -> impl Strategy<Value = Per> {
    prop_oneof![Just(Per::Head), Just(Per::Group), Just(Per::Sequence)]
}

/// A layout and as many bits as it has pairs of queries and keys.
fn pairs() -> impl Strategy<Value = (Layout, Vec<bool>)> {
    (per(), 1..40usize, (1..3usize, 1..3usize, 1..3usize, 1..70usize, 0..200usize)).prop_flat_map(
        |(per, q_block, (sequences, kv_heads, group, queries, keys))| {
            let layout = layout(per, q_block, [sequences, kv_heads, group, queries, keys]);
            let pairs = sequences * layout.q_heads * queries * keys;
            // Few bits, for most keys must be hidden from whole blocks.
            let bits = proptest::collection::vec(0..60u8, pairs);
            (Just(layout), bits.prop_map(|bits| bits.iter().map(|&bit| bit == 0).collect()))
        },
    )
}

/// Whether a pair is visible to some query and head that share its list.
fn named(
    layout: &Layout,
    seen: &Array4<bool>,
    pair: (usize, usize, usize),
    keys: std::ops::Range<usize>,
) -> bool {
    let (b, h, i) = pair;
    let shared = layout.q_heads / layout.heads();
    let heads = h / shared * shared..(h / shared + 1) * shared;
    let start = i / layout.q_block * layout.q_block;
    let rows = start..(start + layout.q_block).min(layout.queries);
    heads.into_iter().any(|h| rows.clone().any(|i| keys.clone().any(|j| seen[[b, h, i, j]])))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn lists_from_a_mask_are_those_of_the_naive_matrix((layout, bits) in pairs()) {
        let dims = dims(&layout);
        let dim = (dims.batch, dims.q_heads, dims.q_len, dims.kv_len);
        let seen = Array4::from_shape_vec(dim, bits).unwrap();
        let mask = Boolean::new(seen.view());
        let atom = |j: usize| j / ATOM * ATOM..((j / ATOM + 1) * ATOM).min(layout.keys);
        let blocks = BlockLists::from_mask(layout, &mask).unwrap();
        let naive = Array4::from_shape_fn(dim, |(b, h, i, j)| named(&layout, &seen, (b, h, i), atom(j)));
        prop_assert_eq!(Keys::Blocks(&blocks).materialize(&dims), naive);
        Keys::Blocks(&blocks).check(&dims, &Lengths::Full).unwrap();
        let tokens = TokenLists::from_mask(layout, &mask).unwrap();
        let naive = Array4::from_shape_fn(dim, |(b, h, i, j)| named(&layout, &seen, (b, h, i), j..j + 1));
        prop_assert_eq!(Keys::Tokens(&tokens).materialize(&dims), naive);
        Keys::Tokens(&tokens).check(&dims, &Lengths::Full).unwrap();
        let mut total = 0;
        for b in 0..layout.sequences {
            for h in (0..layout.q_heads).step_by(layout.q_heads / layout.heads()) {
                for block in 0..layout.blocks() {
                    let keys: usize = tokens.runs(b, h, block).iter().map(|run| run.range().len()).sum();
                    prop_assert_eq!(tokens.keys(b, h, block), keys);
                    // Neighbours are joined.
                    prop_assert!(tokens.runs(b, h, block).windows(2).all(|w| w[0].range().end < w[1].range().start));
                    total += keys;
                }
            }
        }
        prop_assert_eq!(tokens.len(), total);
    }

    #[test]
    fn lists_of_keys_are_those_that_came((layout, bits) in pairs()) {
        let lists = layout.lists().unwrap();
        let (mut offsets, mut keys) = (vec![0], Vec::new());
        for list in 0..lists {
            keys.extend((0..layout.keys).filter(|j| bits[(list * 7 + j * 3) % bits.len().max(1)]).map(|j| j as u32));
            offsets.push(keys.len());
        }
        let plan = TokenLists::from_keys(layout, &offsets, &keys).unwrap();
        prop_assert_eq!(plan.len(), keys.len());
        for list in 0..lists {
            let (b, h, block) = layout.place(list);
            let got: Vec<u32> = plan.runs(b, h, block).iter().flat_map(|run| run.start..run.start + run.len).collect();
            prop_assert_eq!(&got, &keys[offsets[list]..offsets[list + 1]]);
        }
        prop_assert_eq!(&TokenLists::new(layout, plan.offsets.clone(), plan.runs.clone()).unwrap(), &plan);
    }
}

#[test]
fn a_map_of_larger_blocks() {
    let layout = layout(Per::Group, 3, [1, 2, 2, 7, 300]);
    let map = Array4::from_shape_fn((1, 2, 3, 3), |(_, h, i, j)| (h + 2 * i + j) % 3 == 0);
    let plan = BlockLists::from_map(layout, 2 * ATOM, map.view()).unwrap();
    let got = Keys::Blocks(&plan).materialize(&dims(&layout));
    for ((_, h, i, j), &seen) in got.indexed_iter() {
        assert_eq!(seen, map[[0, h / 2, i / 3, j / 128]], "{h} {i} {j}");
    }
}

#[track_caller]
fn refuses<T: std::fmt::Debug>(result: Result<T>, names: &str) {
    let error = result.unwrap_err();
    let named = match &error {
        Error::Value { argument, .. } | Error::Shape { argument, .. } => argument,
        Error::Heads { .. } => "q",
        _ => "",
    };
    assert_eq!(named, names, "{error}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let one = layout(Per::Sequence, 64, [1, 1, 1, 128, 192]);
    let blocks =
        |layout, offsets: &[usize], atoms: &[u32]| BlockLists::new(layout, offsets.to_vec(), atoms.to_vec());
    assert!(blocks(one, &[0, 1, 3], &[0, 0, 2]).is_ok());
    refuses(blocks(one, &[0, 1, 3], &[0, 2, 2]), "atoms");
    refuses(blocks(one, &[0, 1, 3], &[0, 2, 1]), "atoms");
    refuses(blocks(one, &[0, 1, 3], &[0, 1, 3]), "atoms");
    refuses(blocks(one, &[0, 1], &[0]), "offsets");
    refuses(blocks(one, &[0, 2, 1], &[0]), "offsets");
    refuses(blocks(one, &[0, 1, 2], &[0, 1, 2]), "offsets");
    refuses(blocks(one, &[1, 1, 3], &[0, 1, 2]), "offsets");
    refuses(blocks(one, &[], &[]), "offsets");
    refuses(blocks(Layout { q_block: 0, ..one }, &[0, 1, 3], &[0, 0, 2]), "q_block");
    refuses(blocks(Layout { kv_heads: 2, ..one }, &[0, 1, 3], &[0, 0, 2]), "q");
    let huge = Layout { sequences: usize::MAX, queries: usize::MAX, q_block: 1, ..one };
    refuses(blocks(huge, &[0], &[]), "layout");
    refuses(blocks(Layout { keys: usize::MAX, ..one }, &[0, 0, 0], &[]), "keys");

    let run = |start, len| Run { start, len };
    let tokens = |runs: &[Run]| TokenLists::new(one, vec![0, 1, runs.len()], runs.to_vec());
    assert!(tokens(&[run(0, 1), run(0, 3), run(3, 189)]).is_ok());
    refuses(tokens(&[run(0, 1), run(0, 3), run(2, 1)]), "runs");
    refuses(tokens(&[run(0, 1), run(0, 0), run(2, 1)]), "runs");
    refuses(tokens(&[run(0, 1), run(0, 3), run(191, 2)]), "runs");
    refuses(tokens(&[run(0, 1), run(0, 3), run(u32::MAX, u32::MAX)]), "runs");
    refuses(TokenLists::from_keys(one, &[0, 1, 2], &[0, 192]), "keys");
    refuses(TokenLists::from_keys(one, &[0, 1, 3], &[0, 4, 4]), "keys");
    refuses(TokenLists::from_keys(one, &[0, 1, 3], &[0, 4, 0]), "keys");

    refuses(BlockLists::from_map(one, 96, Array4::from_elem((1, 1, 2, 2), true).view()), "k_block");
    refuses(BlockLists::from_map(one, 64, Array4::from_elem((1, 1, 2, 2), true).view()), "map");

    let plan = blocks(one, &[0, 1, 3], &[0, 0, 2]).unwrap();
    let fits = |dims: &Dims, lengths: &Lengths<'_>| Keys::Blocks(&plan).check(dims, lengths);
    let dims = dims(&one);
    assert!(fits(&dims, &Lengths::Full).is_ok());
    assert!(fits(&Dims { kv_len: 129, ..dims }, &Lengths::Full).is_ok(), "a shorter last atom");
    refuses(fits(&Dims { kv_len: 128, ..dims }, &Lengths::Full), "keys");
    refuses(fits(&dims, &Lengths::Keys(&[100])), "keys");
    refuses(fits(&Dims { q_len: 129, ..dims }, &Lengths::Full), "keys");
    refuses(fits(&Dims { batch: 2, ..dims }, &Lengths::Full), "keys");
    let plan = TokenLists::from_keys(one, &[0, 1, 2], &[0, 191]).unwrap();
    let fits = |dims: &Dims, lengths: &Lengths<'_>| Keys::Tokens(&plan).check(dims, lengths);
    assert!(fits(&dims, &Lengths::Full).is_ok());
    refuses(fits(&dims, &Lengths::Keys(&[191])), "keys");
}
