//! The bits of a row depend on its own sequence and on which engine the
//! sizes of the call choose: not on threads, the batch, the rows around it,
//! or what was in the workspace before.

mod shared;

use attention_kernels::catalog::{Catalogued, ENTRIES};
use attention_kernels::dense::Tempered;
use attention_kernels::input::Qkv;
use attention_kernels::mask::{Causal, mask_fn};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Element, Mergeable, Workspace};
#[cfg(feature = "rayon")]
use half::{bf16, f16};
use ndarray::{Array3, Array4, ArrayView4, Axis, Slice, s};

use shared::{AnyScore, Case, Shape, isas, masked, normals, same_bits, scored, selective, shape};

/// Sizes that take each way through the engines: few query rows; heads that a
/// thread packs for itself; heads that are packed together because they are
/// few or large.
const WAYS: [(&str, Shape); 9] = [
    ("few queries", shape([3, 4, 2, 5, 1100, 20, 12])),
    ("one query", shape([2, 8, 2, 1, 2050, 16, 16])),
    ("many small heads", shape([4, 6, 3, 50, 130, 20, 12])),
    ("few small heads", shape([1, 2, 1, 210, 300, 20, 12])),
    ("more queries against many keys", shape([2, 2, 1, 30, 1300, 20, 12])),
    ("large heads", shape([2, 2, 1, 70, 1300, 64, 48])),
    ("more queries than keys", shape([2, 2, 2, 200, 90, 9, 33])),
    ("tokens", shape([2, 4, 2, 70, 70, 20, 12])),
    ("tokens of one head", shape([1, 1, 1, 330, 330, 16, 20])),
];

/// Entries that make something from the seed for each sequence or query, so
/// that a part of the input is another mechanism.
const BY_BATCH: [&str; 2] = ["selective", "efficient probing"];
const BY_QUERY: [&str; 19] = [
    "selective",
    "output-gated",
    "differential",
    "tree",
    "closures",
    "block-sparse",
    "DSA",
    "NSA",
    "causal SEA",
    "Perceiver",
    "multi-layers trainable pooling",
    "MoH",
    "BAM",
    "p-adapter",
    "RCMHA",
    "AM-Adapter",
    "attention AT",
    "AbMILP",
    "SimPool",
];
/// Entries in which queries compete or are averaged, or which have few keys however many are
/// given, so that other numbers of queries are few.
const OF_ALL_QUERIES: [&str; 6] = [
    "Flowformer",
    "Agent Attention",
    "HyperAttention",
    "causal HyperAttention",
    "Routing Transformer",
    "SEA",
];

/// Entries in which neighbouring queries share a list of blocks, counted from the first one
/// of the call: what some of a block see is passed over, masked, for the others.
const BY_BLOCK: [&str; 3] = ["HiP", "Dynamic Mask Attention", "S2-Attention"];
/// Queries that share one, or a multiple.
const SHARING: usize = 64;

fn widened<T: Element>(x: &Array4<T>) -> Array4<f32> {
    x.mapv(Element::to_f32)
}

fn run<T: Catalogued>(entry: usize, x: Qkv<'_, T>, isa: Isa, workspace: &mut Workspace) -> Array4<f32> {
    let mut out =
        Array4::from_elem((x.q.dim().0, x.q.dim().1, x.q.dim().2, x.v.dim().3), T::from_f32(f32::NAN));
    let trial = ENTRIES[entry].trial(x, Some(isa), 77).unwrap();
    trial.forward_into(out.view_mut(), workspace).unwrap();
    widened(&out)
}

fn fresh<T: Catalogued>(entry: usize, x: Qkv<'_, T>, isa: Isa) -> Array4<f32> {
    run(entry, x, isa, &mut Workspace::new())
}

#[cfg(feature = "rayon")]
fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// Those entries that fit: a tree has no more nodes than there are keys, and
/// tokens have a query and a key each.
fn fitting(n: Shape) -> impl Iterator<Item = usize> {
    (0..ENTRIES.len()).filter(move |&i| match &ENTRIES[i] {
        entry if entry.tokens => n.q_len == n.kv_len,
        entry => entry.card.name != "tree" || n.q_len <= n.kv_len,
    })
}

/// The best instruction set for every way, the others for two of them.
fn each_way(mut check: impl FnMut(Isa, &str, Shape)) {
    let best = isas().into_iter().last().unwrap();
    for isa in isas() {
        for (way, n) in WAYS {
            let cheap = n.q_len * n.kv_len * n.batch * n.q_heads < 200_000;
            if isa == best || (cheap && isa != Isa::Scalar) {
                check(isa, way, n);
            }
        }
    }
    check(Isa::Scalar, "scalar, few queries", shape([2, 2, 1, 3, 1030, 7, 5]));
    check(Isa::Scalar, "scalar", shape([2, 2, 1, 20, 270, 7, 5]));
}

#[cfg(feature = "rayon")]
#[test]
fn threads() {
    fn check<T: Catalogued>(isa: Isa, way: &str, n: Shape, convert: impl Fn(f32) -> T + Copy) {
        let case = Case::new(n, 1).map(convert);
        for entry in fitting(n) {
            let alone = on_threads(1, || fresh(entry, case.x(), isa));
            for threads in [2, 3] {
                let out = on_threads(threads, || fresh(entry, case.x(), isa));
                let what = format!("{isa}, {}, {way}, {threads} threads", ENTRIES[entry].card.name);
                same_bits(&what, &out, &alone);
            }
        }
    }
    each_way(|isa, way, n| check(isa, way, n, |x| x));
    let best = isas().into_iter().last().unwrap();
    check(best, "f16", WAYS[0].1, f16::from_f32);
    check(best, "f16", WAYS[2].1, f16::from_f32);
    check(best, "bf16", WAYS[1].1, bf16::from_f32);
    check(best, "bf16", WAYS[3].1, bf16::from_f32);
}

#[cfg(feature = "rayon")]
#[test]
fn lse_on_threads() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 2);
        let dense = masked(isa, Causal::new()).sinks(vec![0.25; n.q_heads]).build().unwrap();
        let (out, lse) = on_threads(1, || dense.forward_with_lse(case.x())).unwrap();
        let plain = dense.forward(case.x()).unwrap();
        same_bits(&format!("{isa}, {way}, without lse"), &plain, &out);
        for threads in [2, 3] {
            let (a, b) = on_threads(threads, || dense.forward_with_lse(case.x())).unwrap();
            same_bits(&format!("{isa}, {way}, {threads} threads"), &a, &out);
            same_bits(&format!("{isa}, {way}, {threads} threads, lse"), &b, &lse);
        }
    });
}

fn sequence<T>(x: &Array4<T>, b: usize) -> ArrayView4<'_, T> {
    x.slice_axis(Axis(0), Slice::from(b..b + 1))
}

#[test]
fn batch() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 3);
        for entry in fitting(n).filter(|&i| !BY_BATCH.contains(&ENTRIES[i].card.name)) {
            let together = fresh(entry, case.x(), isa);
            for b in 0..n.batch {
                let x = Qkv::new(sequence(&case.q, b), sequence(&case.k, b), sequence(&case.v, b));
                let what = format!("{isa}, {}, {way}, sequence {b}", ENTRIES[entry].card.name);
                same_bits(&what, &fresh(entry, x, isa), &sequence(&together, b).to_owned());
            }
        }
    });
}

#[test]
fn heads() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 4);
        let dense = masked(isa, Causal::new()).build().unwrap();
        let together = dense.forward(case.x()).unwrap();
        let group = n.q_heads / n.kv_heads;
        for g in 0..n.kv_heads {
            let x = Qkv::new(
                case.q.slice(s![.., g * group..(g + 1) * group, .., ..]),
                case.k.slice(s![.., g..g + 1, .., ..]),
                case.v.slice(s![.., g..g + 1, .., ..]),
            );
            let want = together.slice(s![.., g * group..(g + 1) * group, .., ..]).to_owned();
            same_bits(&format!("{isa}, {way}, head {g}"), &dense.forward(x).unwrap(), &want);
        }
    });
}

#[test]
fn selective_batch() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 5);
        let noise = |seed, heads, len| {
            normals(seed, (n.batch, heads, len, 1)).remove_axis(Axis(3)).mapv(|x| 1.0 + 0.3 * x)
        };
        let (query, value): (Array3<f32>, Array3<f32>) =
            (noise(1, n.q_heads, n.q_len), noise(2, n.kv_heads, n.kv_len));
        let tempered = selective(isa, Causal::new()).build().unwrap();
        let x = Tempered { qkv: case.x(), query: query.view(), value: value.view() };
        let together = tempered.forward(x).unwrap();
        for b in 0..n.batch {
            let x = Tempered {
                qkv: Qkv::new(sequence(&case.q, b), sequence(&case.k, b), sequence(&case.v, b)),
                query: query.slice(s![b..b + 1, .., ..]),
                value: value.slice(s![b..b + 1, .., ..]),
            };
            let alone = tempered.forward(x).unwrap();
            same_bits(&format!("{isa}, {way}, {b}"), &alone, &sequence(&together, b).to_owned());
        }
    });
}

/// Entries whose queries have lists of blocks of their own. Where they are this many, those that
/// visit a block are attended together: sums are cut in other places there.
const OWN_BLOCKS: [&str; 4] = ["MoBA", "MSA", "InfLLM-V2", "SeerAttention-R"];
const MANY: usize = 128;

/// Whether as many queries of these sizes take the engine of few queries.
/// Sums are cut in other places there.
fn few(n: Shape, queries: usize) -> bool {
    let rows = n.q_heads / n.kv_heads * queries;
    rows <= 12 || (rows <= 64 && 16 * rows <= n.kv_len)
}

/// The last queries alone sit where they sat among the others.
#[test]
fn last_rows() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 6);
        let alone = |i: &usize| {
            let entry = &ENTRIES[*i];
            !entry.tokens
                && !OF_ALL_QUERIES.contains(&entry.card.name)
                && !BY_QUERY.contains(&entry.card.name)
        };
        for entry in fitting(n).filter(alone) {
            let together = fresh(entry, case.x(), isa);
            let by_block = BY_BLOCK.contains(&ENTRIES[entry].card.name);
            let whole_blocks = (SHARING..n.q_len).step_by(SHARING).map(|first| n.q_len - first);
            let anywhere = [1, 2, 7, 31, 49, 193].into_iter();
            for queries in anywhere.filter(|_| !by_block).chain(whole_blocks.filter(|_| by_block)) {
                let own_blocks = OWN_BLOCKS.contains(&ENTRIES[entry].card.name);
                let meet = |queries: usize| own_blocks && queries >= MANY;
                if queries > n.q_len || few(n, queries) != few(n, n.q_len) || meet(queries) != meet(n.q_len) {
                    continue;
                }
                let rows = n.q_len - queries..n.q_len;
                let q = case.q.slice(s![.., .., rows.clone(), ..]);
                let out = fresh(entry, Qkv::new(q, case.k.view(), case.v.view()), isa);
                let what = format!("{isa}, {}, {way}, last {queries}", ENTRIES[entry].card.name);
                same_bits(&what, &out, &together.slice(s![.., .., rows, ..]).to_owned());
            }
        }
    });
}

/// Any rows, at the positions they had.
#[test]
fn rows_in_the_middle() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 7);
        let (q_start, heads) = (n.kv_len as isize - n.q_len as isize, n.q_heads);
        let build = |first: usize| {
            let at = q_start + first as isize;
            let alibi = attention_kernels::score::Alibi::new(heads).at(at);
            let holes = mask_fn(move |_, query, key| !(query + first + 2 * key).is_multiple_of(5));
            (
                masked(isa, Causal::at(at)).build().unwrap(),
                scored(isa, holes, AnyScore::Alibi(alibi)).build().unwrap(),
            )
        };
        let (causal, other) = build(0);
        let (all, all_lse) = causal.forward_with_lse(case.x()).unwrap();
        let all_other = other.forward(case.x()).unwrap();
        for rows in [0..1, 1..3, 2..5, 0..n.q_len / 2, 5..40, 17..18, 11..59, 3..197] {
            if rows.end > n.q_len || few(n, rows.len()) != few(n, n.q_len) {
                continue;
            }
            let (causal, other) = build(rows.start);
            let part = s![.., .., rows.clone(), ..];
            let x = Qkv::new(case.q.slice(part), case.k.view(), case.v.view());
            let (out, lse) = causal.forward_with_lse(x).unwrap();
            let what = format!("{isa}, {way}, rows {rows:?}");
            same_bits(&what, &out, &all.slice(part).to_owned());
            same_bits(&what, &lse, &all_lse.slice(s![.., .., rows.clone()]).to_owned());
            same_bits(&what, &other.forward(x).unwrap(), &all_other.slice(part).to_owned());
        }
    });
}

/// Whatever is in keys and values that nobody sees, and in queries that are
/// somebody else's, the bits are the same.
#[test]
fn what_is_not_seen() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 11);
        // No query sees these keys, and a few keys only some see.
        let hidden = move |j: usize| j % 7 == 3 || j / 64 == 1;
        let mask = mask_fn(move |site, i, j| !hidden(j) && (j as isize) <= i as isize + site.q_start());
        let closure = masked(isa, mask).build().unwrap();
        let (want, want_lse) = closure.forward_with_lse(case.x()).unwrap();
        for garbage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut dirty = case.clone();
            for j in (0..n.kv_len).filter(|&j| hidden(j)) {
                dirty.k.slice_mut(s![.., .., j, ..]).fill(garbage);
                dirty.v.slice_mut(s![.., .., j, ..]).fill(garbage);
            }
            let (out, lse) = closure.forward_with_lse(dirty.x()).unwrap();
            same_bits(&format!("{isa}, {way}, {garbage} hidden"), &out, &want);
            same_bits(&format!("{isa}, {way}, {garbage} hidden, lse"), &lse, &want_lse);
        }
    });
}

/// A NaN that only the last query sees shows there and nowhere else.
#[test]
fn what_only_one_row_sees() {
    each_way(|isa, way, n| {
        let case = Case::new(n, 12);
        let causal = masked(isa, Causal::new()).build().unwrap();
        let (want, want_lse) = causal.forward_with_lse(case.x()).unwrap();
        for what in ["key", "value", "query"] {
            let mut dirty = case.clone();
            let at = match what {
                "key" => &mut dirty.k,
                "value" => &mut dirty.v,
                _ => &mut dirty.q,
            };
            at.slice_mut(s![.., .., -1, ..]).fill(f32::NAN);
            let (out, lse) = causal.forward_with_lse(dirty.x()).unwrap();
            let what = format!("{isa}, {way}, NaN in the last {what}");
            assert!(out.slice(s![.., .., -1, ..]).iter().all(|x| x.is_nan()), "{what}");
            let others = s![.., .., ..-1, ..];
            same_bits(&what, &out.slice(others).to_owned(), &want.slice(others).to_owned());
            let others = s![.., .., ..-1];
            same_bits(&what, &lse.slice(others).to_owned(), &want_lse.slice(others).to_owned());
        }
    });
}

/// One workspace for everything, left full of NaN by calls before.
#[test]
fn dirty_workspace() {
    let mut workspace = Workspace::with_capacity(3 << 20);
    each_way(|isa, way, n| {
        let case = Case::new(n, 8);
        let poison = Case {
            q: Array4::from_elem(case.q.dim(), f32::NAN),
            k: Array4::from_elem(case.k.dim(), f32::INFINITY),
            v: Array4::from_elem(case.v.dim(), f32::NAN),
        };
        for entry in fitting(n) {
            let clean = fresh(entry, case.x(), isa);
            let poisoned = run(entry, poison.x(), isa, &mut workspace);
            let name = ENTRIES[entry].card.name;
            // A query whose scores are NaN sees nothing of what it has to choose.
            let hidden = ENTRIES[entry].selects && poisoned.iter().all(|&x| x == 0.0);
            assert!(hidden || poisoned.iter().any(|x| x.is_nan()), "{isa}, {name}, {way}");
            for again in 0..2 {
                let out = run(entry, case.x(), isa, &mut workspace);
                let what = format!("{isa}, {name}, {way}, call {again}");
                same_bits(&what, &out, &clean);
            }
        }
    });
}

/// More heads than are packed at once: they go in waves.
#[test]
fn waves() {
    let (batch, q_len, kv_len, dim) = (208, 70, 1100, 64);
    // 16 MiB of packed keys and values are 25 of these heads, 64 MiB, which many threads
    // share, 102; all of them are 130 MiB. Sequences overlap in memory, each starts a key
    // after the one before.
    let noise = normals(9, (1, 1, 1, (batch + kv_len) * dim)).into_raw_vec_and_offset().0;
    let rows = ndarray::ArrayView2::from_shape((batch + kv_len, dim), &noise).unwrap();
    let windows = rows.windows((kv_len, dim));
    let windows: Vec<_> = windows.into_iter().take(batch).collect();
    let q = normals(10, (batch, 1, q_len, dim));
    let keys: Vec<_> = windows.iter().map(|x| x.insert_axis(Axis(0))).collect();
    let keys = ndarray::stack(Axis(0), &keys).unwrap();
    let dense = masked(isas().into_iter().last().unwrap(), Causal::new()).build().unwrap();
    let x = Qkv::new(q.view(), keys.view(), keys.view());
    let bytes = dense.workspace_bytes(x).unwrap();
    assert!((15 << 20..80 << 20).contains(&bytes), "{bytes} bytes of workspace");
    let together = dense.forward(x).unwrap();
    for b in [0, 1, 24, 25, 26, 50, 100, 101, 102, 103, 203, 204, 205, 207] {
        let keys = sequence(&keys, b);
        let alone = dense.forward(Qkv::new(sequence(&q, b), keys, keys)).unwrap();
        same_bits(&format!("sequence {b}"), &sequence(&together, b).to_owned(), &alone);
    }
}
