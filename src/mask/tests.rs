use ndarray::{Array4, ArrayView4, Axis, s};

use super::*;

fn site(q_len: usize, kv_len: usize) -> Site {
    Site { batch: 0, head: 0, q_len, kv_len }
}

fn dims(q_len: usize, kv_len: usize) -> Dims {
    Dims { batch: 2, q_heads: 3, kv_heads: 3, q_len, kv_len, head_dim: 8, value_dim: 8, packed: false }
}

fn refusal(mask: &dyn Mask, dims: &Dims) -> String {
    mask.check(dims).expect_err("a refusal").to_string()
}

/// All ranges of `0..n` that are not empty, or for a large `n` those with
/// ends at these places.
fn ranges(n: usize) -> Vec<Range<usize>> {
    let places: Vec<_> = if n <= 8 {
        (0..=n).collect()
    } else {
        [0, 1, 2, n / 2, n / 2 + 1, 63, 64, 65, n - 1, n].into_iter().filter(|&i| i <= n).collect()
    };
    let pairs = places.iter().flat_map(|&a| places.iter().map(move |&b| a..b));
    pairs.filter(|range| !range.is_empty()).collect()
}

/// Holds the engine's questions against the definition.
fn agrees(mask: &dyn Mask, site: Site, exact: bool) {
    for query in 0..site.q_len {
        for first in (0..site.kv_len).filter(|first| site.kv_len <= 8 || first % 13 == 0 || first % 64 < 2) {
            let bits = mask.bits(&site, query, first);
            for key in first..site.kv_len.min(first + 64) {
                let visible = mask.visible(&site, query, key);
                assert_eq!(
                    bits >> (key - first) & 1 == 1,
                    visible,
                    "{site:?}: bit of {query}, {key} from {first}"
                );
            }
        }
    }
    for queries in ranges(site.q_len) {
        let seen = |key: usize| queries.clone().filter(|&query| mask.visible(&site, query, key)).count();
        let seen: Vec<_> = (0..site.kv_len).map(seen).collect();
        let hull = mask.hull(&site, queries.clone());
        assert!(hull.start <= hull.end && hull.end <= site.kv_len, "{site:?}: hull {hull:?}");
        let outside = (0..site.kv_len).find(|key| seen[*key] > 0 && !hull.contains(key));
        assert_eq!(outside, None, "{site:?}: hull {hull:?} of {queries:?}");
        if exact && !hull.is_empty() {
            assert!(seen[hull.start] > 0 && seen[hull.end - 1] > 0, "{site:?}: hull {hull:?} of {queries:?}");
        }
        for keys in ranges(site.kv_len) {
            let visible: usize = seen[keys.clone()].iter().sum();
            let truth = match visible {
                0 => Coverage::Empty,
                n if n == queries.len() * keys.len() => Coverage::Full,
                _ => Coverage::Partial,
            };
            let said = mask.coverage(&site, queries.clone(), keys.clone());
            let right = said == truth || (!exact && said == Coverage::Partial);
            assert!(right, "{site:?}: {queries:?} x {keys:?} is {truth:?}, not {said:?}");
        }
    }
}

fn sites() -> impl Iterator<Item = Site> {
    let small = (0..6).flat_map(|q_len| (0..7).map(move |kv_len| site(q_len, kv_len)));
    small.chain([site(3, 64), site(3, 65), site(70, 63), site(70, 130), site(130, 70)])
}

fn starts() -> impl Iterator<Item = isize> {
    [isize::MIN, -100, -5, -2, -1, 0, 1, 2, 4, 9, 100, isize::MAX].into_iter()
}

#[test]
fn positions() {
    for site in sites() {
        agrees(&Unmasked, site, true);
        agrees(&Causal::new(), site, true);
        for q_start in starts() {
            agrees(&Causal::at(q_start), site, true);
        }
        for (group, near) in [(1, 0), (2, 0), (3, 2), (16, 64), (100, 1)] {
            agrees(&Recent { group, near }, site, false);
        }
        for prefix in [0, 1, 3, 6, 64, 100, usize::MAX] {
            agrees(&Prefix::new(prefix), site, true);
            starts().for_each(|q_start| agrees(&Prefix::new(prefix).at(q_start), site, true));
        }
        let limits = [None, Some(0), Some(1), Some(2), Some(64), Some(usize::MAX)];
        for (left, right) in limits.iter().flat_map(|&left| limits.map(|right| (left, right))) {
            agrees(&Window::new(left, right), site, true);
            if site.kv_len <= 6 {
                starts().for_each(|q_start| agrees(&Window::new(left, right).at(q_start), site, true));
            }
        }
    }
}

#[test]
fn positions_by_formula() {
    for (site, q_start) in
        sites().flat_map(|site| [None, Some(-2), Some(0), Some(3)].map(|q_start| (site, q_start)))
    {
        let (causal, window, prefix) = match q_start {
            None => (Causal::new(), Window::new(Some(2), Some(1)), Prefix::new(2)),
            Some(p) => (Causal::at(p), Window::new(Some(2), Some(1)).at(p), Prefix::new(2).at(p)),
        };
        let same_as_causal = match q_start {
            None => Window::new(None, Some(0)),
            Some(p) => Window::new(None, Some(0)).at(p),
        };
        for (i, j) in (0..site.q_len).flat_map(|i| (0..site.kv_len).map(move |j| (i, j))) {
            let p = i as isize + q_start.unwrap_or(site.kv_len as isize - site.q_len as isize);
            let key = j as isize;
            assert_eq!(causal.visible(&site, i, j), key <= p);
            assert_eq!(same_as_causal.visible(&site, i, j), key <= p);
            assert_eq!(window.visible(&site, i, j), p - 2 <= key && key <= p + 1);
            assert_eq!(prefix.visible(&site, i, j), j < 2 || key <= p);
        }
    }
}

#[test]
fn documents_of_neighbours_are_exact() {
    for ids in [&[][..], &[3], &[7, 7, 4, 4, 4], &[0, 1, 1, 2, 9, 9]] {
        agrees(&Documents::new(ids), site(ids.len(), ids.len()), true);
    }
    agrees(&Documents::of(&[4, 9, 7], &[7, 7, 4, 4, 4]), site(3, 5), false);
    let ids: Vec<u32> = (0..200).map(|i| i / 70).collect();
    agrees(&Documents::new(&ids), site(200, 200), true);
    // A shorter sequence has the first of the keys.
    agrees(&Documents::new(&ids), site(200, 131), true);
}

#[test]
fn documents_in_pieces() {
    agrees(&Documents::of(&[4, 9], &[7, 4, 4, 7, 4]), site(2, 5), false);
    agrees(&Documents::of(&[], &[1, 2]), site(0, 2), false);
    agrees(&Documents::of(&[1, 2], &[]), site(2, 0), false);
    let ids: Vec<u32> = (0..200).map(|i| i * i % 7).collect();
    agrees(&Documents::new(&ids), site(200, 200), false);
    agrees(&Documents::new(&ids), site(200, 131), false);
    let mask = Documents::new(&ids);
    for (i, j) in (0..200).flat_map(|i| (0..200).map(move |j| (i, j))) {
        assert_eq!(mask.visible(&site(200, 200), i, j), ids[i] == ids[j]);
    }
}

#[test]
fn documents_refuse() {
    let mask = Documents::of(&[1, 1], &[1, 1, 1]);
    assert_eq!(mask.check(&dims(2, 3)), Ok(()));
    assert_eq!(
        refusal(&mask, &dims(4, 3)),
        "query documents: expected one document number for each token, q_len = 4, got 2 numbers"
    );
    assert_eq!(
        refusal(&mask, &dims(2, 5)),
        "key documents: expected one document number for each token, kv_len = 5, got 3 numbers"
    );
    assert_eq!(
        refusal(&mask, &Dims { packed: true, ..dims(2, 3) }),
        "a mask of documents cannot be combined with a packed batch: positions count from the start of each \
         sequence, and the lengths of the sequences differ"
    );
}

#[test]
fn trees() {
    let random = |n: usize| {
        (0..n).map(|i| (i * 7 % 5 != 0).then(|| i * i % i.clamp(1, 11)).filter(|&p| p < i)).collect()
    };
    let trees: [Vec<Option<usize>>; 5] =
        [vec![], vec![None], vec![None, Some(0), Some(0), Some(1)], random(70), random(130)];
    for parents in &trees {
        let n = parents.len();
        let tree = Tree::new(parents).expect("a tree");
        assert_eq!((tree.len(), tree.is_empty()), (n, n == 0));
        for context in [0, 1, 3, 63, 64, 65] {
            let site = site(n, n + context);
            agrees(&tree, site, false);
            for i in 0..n {
                let mut seen = vec![false; n];
                let mut node = Some(i);
                while let Some(j) = node {
                    seen[j] = true;
                    node = parents[j];
                }
                for j in 0..n + context {
                    assert_eq!(tree.visible(&site, i, j), j < context || seen[j - context], "{i} {j}");
                }
            }
        }
        // A sequence with fewer keys than nodes, as key lengths allow.
        agrees(&tree, site(n, n / 2), false);
    }
}

#[test]
fn each_sequence_has_its_tree() {
    let trees =
        [vec![None, Some(0), Some(0)], vec![None, None], vec![]].map(|parents| Tree::new(&parents).unwrap());
    let mask = Trees::new(trees.to_vec());
    for (batch, tree) in trees.iter().enumerate() {
        let own = Site { batch, ..site(tree.len(), tree.len() + 70) };
        agrees(&mask, own, false);
        assert_eq!(mask.check_sequence(&own), Ok(()));
        for i in 0..own.q_len {
            assert!((0..own.kv_len).all(|j| mask.visible(&own, i, j) == tree.visible(&own, i, j)));
        }
    }
    let of = |batch, q_len, kv_len| Site { batch, ..site(q_len, kv_len) };
    let refusal = |site| mask.check_sequence(&site).unwrap_err().to_string();
    let expected = "trees: expected one node for each of the 3 queries of sequence 1, got 2 nodes";
    assert_eq!(refusal(of(1, 3, 9)), expected);
    let expected = "trees: expected at most as many nodes as the 2 keys of sequence 0, got 3 nodes";
    assert_eq!(refusal(of(0, 3, 2)), expected);
    let two = Dims { batch: 2, ..dims(3, 9) };
    assert_eq!(
        mask.check(&two).unwrap_err().to_string(),
        "trees: expected one for each of 2 sequences, got 3 trees"
    );
}

#[test]
fn a_chain_is_causal() {
    for n in [0, 1, 2, 5, 64, 65, 130] {
        let chain: Vec<_> = (0..n).map(|i: usize| i.checked_sub(1)).collect();
        let dims = Dims { batch: 1, q_heads: 1, ..dims(n, n + 9) };
        let tree = Tree::new(&chain).expect("a tree");
        assert_eq!(tree.materialize(&dims), Causal::new().materialize(&dims));
    }
}

#[test]
fn trees_refuse() {
    let message = |parents: &[Option<usize>]| Tree::new(parents).expect_err("a refusal").to_string();
    let expected = "parents: expected a parent that comes before its child, got parent";
    assert_eq!(message(&[Some(0)]), format!("{expected} 0 of node 0"));
    assert_eq!(message(&[None, Some(2), Some(0)]), format!("{expected} 2 of node 1"));
    let tree = Tree::new(&[None, Some(0)]).expect("a tree");
    assert_eq!(tree.check(&dims(2, 2)), Ok(()));
    assert_eq!(
        refusal(&tree, &dims(3, 9)),
        "parents: expected one node for each query, q_len = 3, got 2 nodes"
    );
    assert_eq!(
        refusal(&tree, &dims(2, 1)),
        "parents: expected at most as many nodes as keys, kv_len = 1, got 2 nodes"
    );
    assert!(
        refusal(&tree, &Dims { packed: true, ..dims(2, 2) }).starts_with("a tree of draft tokens cannot")
    );
}

fn array(shape: [usize; 4]) -> Array4<bool> {
    Array4::from_shape_fn(shape, |(b, h, i, j)| (b * 5 + h * 3 + i * 7 + j * j * 11) % 13 % 3 == 0)
}

/// Whether the mask says what the array does, for each site.
fn follows(view: ArrayView4<bool>, q_len: usize, kv_len: usize) {
    let mask = Boolean::new(view);
    assert_eq!(mask.check(&dims(q_len, kv_len)), Ok(()));
    let all = view.broadcast((2, 3, q_len, kv_len)).expect("a view that fits");
    assert_eq!(mask.materialize(&dims(q_len, kv_len)), all);
    for (batch, head) in [(0, 0), (1, 2)] {
        agrees(&mask, Site { batch, head, q_len, kv_len }, false);
        agrees(&mask, Site { batch, head, q_len, kv_len: kv_len / 2 }, false);
    }
}

#[test]
fn booleans_of_any_shape_and_stride() {
    for (q_len, kv_len) in [(0, 3), (3, 0), (1, 1), (3, 5), (2, 64), (3, 150)] {
        for sizes in 0..16 {
            let axis = |i: usize, len: usize| if sizes >> i & 1 == 1 { len } else { 1 };
            let array = array([axis(0, 2), axis(1, 3), axis(2, q_len), axis(3, kv_len)]);
            follows(array.view(), q_len, kv_len);
            follows(array.slice(s![.., ..;-1, ..;-1, ..]), q_len, kv_len);
            follows(array.slice(s![.., .., .., ..;-1]), q_len, kv_len);
            // Broadcast by a stride of 0 instead of a size of 1.
            let wide = array.broadcast((2, 3, q_len, kv_len)).expect("sizes that fit");
            follows(wide, q_len, kv_len);
            // The strides of an array without elements are all 0.
            let shared = sizes & 3 == 0 || array.is_empty();
            assert_eq!(
                (Boolean::new(array.view()).is_shared(), Boolean::new(wide).is_shared()),
                (shared, shared)
            );
        }
        let columns = array([2, 3, kv_len, q_len]);
        follows(columns.view().permuted_axes([0, 1, 3, 2]), q_len, kv_len);
        let every_other = array([2, 3, q_len, 2 * kv_len]);
        follows(every_other.slice(s![.., .., .., ..;2]), q_len, kv_len);
    }
    let one_site = Array4::from_elem((1, 1, 2, 2), true);
    assert!(Boolean::new(one_site.view()).is_shared());
}

#[test]
fn booleans_of_matrices() {
    let array = array([1, 1, 3, 5]);
    let matrix = array.index_axis(Axis(0), 0).index_axis_move(Axis(0), 0);
    let mask = Boolean::of_pairs(matrix);
    assert_eq!(mask.materialize(&dims(3, 5)), array.broadcast((2, 3, 3, 5)).unwrap());
    let tokens = ndarray::array![[false, true, true, false, true], [true, false, false, true, true]];
    let mask = Boolean::of_keys(tokens.view());
    assert_eq!(mask.check(&dims(3, 5)), Ok(()));
    let want = Array4::from_shape_fn((2, 3, 3, 5), |(b, _, _, j)| tokens[[b, j]]);
    assert_eq!(mask.materialize(&dims(3, 5)), want);
    assert!(refusal(&mask, &dims(3, 4)).starts_with("mask: expected shape"));
}

#[test]
fn operators_are_and_or_not() {
    let dims = dims(7, 9);
    let tokens = ndarray::Array2::from_shape_fn((2, 9), |(b, j)| (b + j) % 3 > 0);
    let (keys, window) = (Boolean::of_keys(tokens.view()), Window::new(Some(2), Some(3)));
    let odd = mask_fn(|_, _, key| key % 2 == 1);
    let a = (!Causal::new() & window) | (keys.clone() & odd) | !(Prefix::new(2) & !Unmasked);
    let b = Causal::new().not().and(window).or(keys.and(odd)).or(Prefix::new(2).and(Unmasked.not()).not());
    assert_eq!(a.materialize(&dims), b.materialize(&dims));
    assert_eq!((Causal::new() & window).materialize(&dims), Causal::new().and(window).materialize(&dims));
    assert_eq!((window | Causal::new()).materialize(&dims), window.or(Causal::new()).materialize(&dims));
}

/// Masks that borrow go through code that knows no mask, and into a box.
#[test]
fn borrowed_masks_are_masks() {
    fn without_first<'a>(mask: impl Mask + 'a) -> Box<dyn Mask + 'a> {
        Box::new(mask.and(mask_fn(|_, _, key| key > 0)))
    }
    let tokens = ndarray::array![[true, true, false, true]];
    let mask = without_first(Boolean::of_keys(tokens.view()));
    let seen = mask.materialize(&Dims { batch: 1, q_heads: 1, kv_heads: 1, ..dims(1, 4) });
    assert_eq!(seen.into_raw_vec_and_offset().0, [false, true, false, true]);
}

#[test]
fn booleans_refuse() {
    let message = |shape: [usize; 4], dims: &Dims| refusal(&Boolean::new(array(shape).view()), dims);
    let expected =
        "mask: expected shape [batch, q_heads, q_len, kv_len] = [2, 3, 4, 5] or 1 in place of any of them";
    assert_eq!(message([2, 3, 4, 6], &dims(4, 5)), format!("{expected}, got [2, 3, 4, 6]"));
    assert_eq!(message([2, 2, 4, 5], &dims(4, 5)), format!("{expected}, got [2, 2, 4, 5]"));
    assert_eq!(message([3, 3, 4, 5], &dims(4, 5)), format!("{expected}, got [3, 3, 4, 5]"));
    assert_eq!(message([2, 3, 0, 5], &dims(4, 5)), format!("{expected}, got [2, 3, 0, 5]"));
    let packed = Dims { packed: true, ..dims(4, 5) };
    for shape in [[1, 1, 4, 5], [2, 3, 1, 5], [2, 3, 4, 1]] {
        assert_eq!(
            message(shape, &packed),
            "a boolean mask with a length axis cannot be combined with a packed batch: positions count from the \
             start of each sequence, and the lengths of the sequences differ"
        );
    }
    let heads = array([2, 3, 1, 1]);
    assert_eq!(Boolean::new(heads.view()).check(&packed), Ok(()));
    let matrix = array([1, 1, 4, 5]);
    let matrix = matrix.index_axis(Axis(0), 0).insert_axis(Axis(0));
    assert_eq!(Boolean::new(matrix).check(&dims(4, 5)), Ok(()));
}

#[test]
fn closures() {
    for site in sites() {
        let window = mask_fn(|site: &crate::input::Extent, i, j| {
            (i as isize + site.q_start()).abs_diff(j as isize) < 3
        });
        let same = Window::new(Some(2), Some(2));
        agrees(&window, site, false);
        for (i, j) in (0..site.q_len).flat_map(|i| (0..site.kv_len).map(move |j| (i, j))) {
            assert_eq!(window.visible(&site, i, j), same.visible(&site, i, j));
        }
        // A closure is not asked about keys that do not exist.
        let keys = vec![true; site.kv_len];
        agrees(&mask_fn(|_, _, j| keys[j]), site, false);
    }
    assert!(mask_fn(|_, _, _| true).is_shared());
    let heads = mask_fn_per_head(|site, _, j| j % 3 == site.head);
    assert!(!heads.is_shared());
    assert!(
        heads.materialize(&dims(2, 7)).indexed_iter().all(|((_, h, _, j), &visible)| visible == (j % 3 == h))
    );
}

#[test]
fn combinations() {
    let ids = [0, 0, 1, 1, 1, 2, 0];
    for q_len in 0..=7 {
        let site = site(q_len, 7);
        let documents = Documents::of(&ids[..q_len], &ids);
        let array = array([1, 1, 1, 7]);
        let masks: Vec<Box<dyn Mask + '_>> = vec![
            Box::new(Unmasked),
            Box::new(Unmasked.not()),
            Box::new(Causal::new()),
            Box::new(Causal::at(-3).not()),
            Box::new(Window::new(Some(1), Some(1))),
            Box::new(Window::new(Some(0), Some(0)).at(20)),
            Box::new(Window::new(Some(2), None).at(0)),
            Box::new(Prefix::new(2)),
            Box::new(documents),
            Box::new(Boolean::new(array.view())),
            Box::new(mask_fn(|_, i, j| (i + j) % 2 == 0)),
        ];
        let dims = dims(q_len, 7);
        for (a, b) in masks.iter().flat_map(|a| masks.iter().map(move |b| (a, b))) {
            let (and, or, not) = (a.and(b), a.or(b), a.not());
            agrees(&and, site, false);
            agrees(&or, site, false);
            agrees(&not, site, false);
            let (x, y) = (a.materialize(&dims), b.materialize(&dims));
            assert_eq!(and.materialize(&dims), &x & &y);
            assert_eq!(or.materialize(&dims), &x | &y);
            assert_eq!(not.materialize(&dims), !x);
            // De Morgan.
            assert_eq!(and.not().materialize(&dims), a.not().or(b.not()).materialize(&dims));
            assert_eq!(or.not().materialize(&dims), a.not().and(b.not()).materialize(&dims));
            assert_eq!(and.is_shared(), a.is_shared() && b.is_shared());
        }
    }
}

#[test]
fn combinations_keep_what_is_known() {
    let site = site(8, 8);
    let (near, far) = (Window::new(Some(1), Some(0)), Window::new(Some(1), Some(0)).at(-4));
    assert!(near.and(far).hull(&site, 6..8).is_empty());
    assert_eq!(near.and(far).coverage(&site, 6..8, 3..4), Coverage::Empty);
    assert_eq!(near.or(far).hull(&site, 6..8), 1..8);
    assert_eq!(near.or(Unmasked).coverage(&site, 6..8, 0..8), Coverage::Full);
    assert_eq!(near.or(far).coverage(&site, 6..8, 4..5), Coverage::Empty);
    assert_eq!(Causal::new().not().coverage(&site, 0..2, 2..8), Coverage::Full);
    assert_eq!(Causal::new().not().coverage(&site, 6..8, 0..7), Coverage::Empty);
    assert_eq!(Causal::new().and(Unmasked).coverage(&site, 6..8, 0..7), Coverage::Full);
}

#[test]
fn combinations_refuse_what_their_parts_refuse() {
    let documents = Documents::new(&[0, 0]);
    let message = refusal(&documents, &dims(3, 2));
    assert_eq!(refusal(&Causal::new().and(&documents), &dims(3, 2)), message);
    assert_eq!(refusal(&(&documents).or(Causal::new()), &dims(3, 2)), message);
    assert_eq!(refusal(&(&documents).not(), &dims(3, 2)), message);
}

/// Of sequences of other lengths each sees pools of its own.
#[test]
fn whole_pools() {
    let (width, stride, tokens) = (4, 2, vec![9, 12, 3]);
    let pools = WholePools { width, stride, tokens: tokens.clone() };
    assert!(!pools.is_shared());
    for (batch, &n) in tokens.iter().enumerate() {
        let count = (n + stride).saturating_sub(width) / stride;
        let site = Site { batch, ..site(n.min(5), count) };
        agrees(&pools, site, true);
        for (query, pool) in (0..site.q_len).flat_map(|i| (0..count).map(move |j| (i, j))) {
            let whole = pool * stride + width <= n - site.q_len + query + 1;
            assert_eq!(pools.visible(&site, query, pool), whole, "{n}: {query} {pool}");
        }
    }
    assert!(WholePools { width, stride, tokens: vec![7, 7] }.is_shared());
}

#[test]
fn pointers_forward() {
    let (dims, tree) = (dims(2, 9), Tree::new(&[None, None]).expect("a tree"));
    let all = tree.materialize(&dims);
    let shared: Arc<dyn Mask> = Arc::new(tree.clone());
    let boxed: Box<dyn Mask> = Box::new(shared.clone());
    for mask in [&tree as &dyn Mask, &&tree, &shared, &boxed] {
        assert_eq!(mask.materialize(&dims), all);
        assert!(mask.is_shared());
        assert_eq!(mask.hull(&site(2, 9), 0..1), 0..8);
        assert_eq!(mask.coverage(&site(2, 9), 0..2, 0..7), Coverage::Full);
        assert_eq!(mask.bits(&site(2, 9), 1, 7) & 3, 2);
        assert!(mask.check(&Dims { q_len: 1, ..dims }).is_err());
    }
}

#[test]
fn grids() {
    use std::sync::Arc;

    use crate::keys::grid::{Grid, Order};
    use crate::keys::regions::Regions;
    use crate::testing::REACHES;

    for shape in [&[0][..], &[7], &[150], &[2, 3], &[1, 5], &[13, 11], &[2, 2, 2], &[5, 3, 7]] {
        let grid = Grid::new(shape).unwrap();
        let orders = [
            ([1, 1, 1], [1, 4], [0; 3]),
            ([1, 1, 1], [2, 8], [1, 0, 2]),
            ([2, 1, 3], [2, 3], [0; 3]),
            ([1, 1, 1], [100, 100], [0; 3]),
        ];
        for (step, tile, roll) in orders {
            let keys = Arc::new(Order::new(grid, step, tile, roll));
            let queries = Arc::new(Order::new(grid, step, [1, 3], roll));
            for reach in REACHES {
                let mask = grid::Local::new(queries.clone(), keys.clone(), reach);
                agrees(&mask, site(grid.len(), grid.len()), false);
                let regions = Regions::new(&queries, &keys, &reach, [3, 2, 5]).unwrap();
                for (i, cuts) in regions.query_cuts.windows(2).enumerate() {
                    let [q_len, kv_len] = [cuts[1] - cuts[0], regions.key_cuts[i + 1] - regions.key_cuts[i]];
                    agrees(&regions, Site { batch: i, ..site(q_len, kv_len) }, false);
                }
                let see = |query: usize, key: usize| {
                    let ((class, at), (other, place)) = (queries.spot(query), keys.spot(key));
                    let sizes = keys.class(class).sizes;
                    let inside = (0..3).all(|axis| reach(axis, at[axis], sizes[axis]).contains(&place[axis]));
                    class == other && inside
                };
                for (query, key) in (0..grid.len()).flat_map(|i| (0..grid.len()).map(move |j| (i, j))) {
                    assert_eq!(mask.visible(&site(grid.len(), grid.len()), query, key), see(query, key));
                }
            }
        }
    }
    let mask = grid::Local::new(
        Arc::new(Order::plain(Grid::new(&[4, 3]).unwrap(), [0; 3])),
        Arc::new(Order::plain(Grid::new(&[4, 3]).unwrap(), [0; 3])),
        |_, _, size| 0..size,
    );
    mask.check(&dims(12, 12)).unwrap();
    assert_eq!(
        refusal(&mask, &dims(11, 12)),
        "q: expected one row for each of the 12 tokens of the shape, got 11"
    );
    assert_eq!(
        refusal(&mask, &dims(12, 13)),
        "k: expected one row for each of the 12 tokens of the shape, got 13"
    );
    let packed = Dims { packed: true, ..dims(12, 12) };
    assert!(refusal(&mask, &packed).starts_with("a spatial shape cannot be combined with a packed batch"));
}
