//! Scored rows and queries as 8-bit codes with a scale each: what index keys
//! are stored as, and products of whole numbers.
//!
//! ```text
//! scale = max_c |x_c| / 127          at least 2^-126
//! code_c = round(x_c / scale)        ties to even, from -127 to 127
//! ```
//!
//! Rows that a cache does not store in this way are coded once a call.

use std::ops::Range;

use super::score::Candidates;
use super::summaries::Made;
use super::{Reduce, Scheme, Source};
use crate::engine::parallel;
use crate::input::Sequence;
use crate::keys::source::At;
use crate::simd::any::AnyRows;
use crate::simd::dots::{LONGEST, PANEL, Vnni, words};
use crate::simd::mem::{Arena, Parts, Rows, bytes_for, bytes_for_shares, cast_mut, claim_words};
use crate::simd::quant::{Dequantize, Quantize};
use crate::simd::{Isa, Simd};

/// Rows that are coded at once.
const CHUNK: usize = 256;

impl Scheme {
    /// Whether scores are products of codes.
    pub(super) fn is_coded(&self) -> bool {
        self.reduce == Reduce::RectifiedCodes
    }

    /// What multiplies codes of so many columns; without it what they stand for is
    /// multiplied.
    pub(super) fn dots(&self, isa: Isa, width: usize) -> Option<Vnni> {
        let fits = matches!(isa, Isa::Avx512 | Isa::Amx) && (1..=LONGEST).contains(&width);
        if self.is_coded() && fits { Vnni::detect() } else { None }
    }
}

/// Codes of all scored rows: how many rows those of a sequence have room for,
/// and how many sequences there are. None where they are stored.
fn sizes(source: &Source<'_>, scheme: &Scheme) -> Option<[usize; 2]> {
    let given = source.given.as_ref().filter(|_| scheme.is_coded() && source.dims.q_heads > 0)?;
    let sequence = &Sequence { index: 0, batch: 0, slot: 0, queries: 0..0, keys: 0..0 };
    if given.codes(&At { sequence, kv_head: 0, keys: 0..0 }).is_some() {
        return None;
    }
    let keys = scheme.layout(&source.dims, &source.lengths).keys;
    Some([scheme.rows(keys, true).next_multiple_of(CHUNK), source.dims.batch])
}

/// Bytes that [`make`] works in.
pub(super) fn workspace_bytes(source: &Source<'_>, scheme: &Scheme) -> usize {
    let Some([rows, sequences]) = sizes(source, scheme) else { return 0 };
    let (width, rows) = (source.dims.head_dim, rows.saturating_mul(sequences));
    let claims = bytes_for::<u64>(claim_words(rows / CHUNK));
    [
        bytes_for::<i8>(rows.saturating_mul(width)),
        bytes_for::<f32>(rows),
        claims,
        claims,
        bytes_for_shares(parallel::threads(), bytes_for::<f32>(CHUNK.saturating_mul(width))),
    ]
    .iter()
    .fold(0, |all, &bytes| all.saturating_add(bytes))
}

/// Codes the rows that are scored, unless they are stored so.
pub(super) fn make<'w>(source: &'w Source<'_>, scheme: &Scheme, arena: &mut Arena<'w>) -> Option<Made<'w>> {
    let [stride, sequences] = sizes(source, scheme)?;
    let (isa, width, workers) = (source.isa, source.dims.head_dim, parallel::threads());
    let (chunks, all) = (stride / CHUNK, stride * sequences);
    let (codes, scales) = (arena.take::<i8>(all * width), arena.take::<f32>(all));
    let claims: [&mut [u64]; 2] = std::array::from_fn(|_| arena.take(claim_words(all / CHUNK)));
    let share = bytes_for::<f32>(CHUNK * width);
    let shares = arena.shares(workers, share);
    {
        let [of_codes, of_scales] = claims;
        let scales = Parts::new(&mut *scales, CHUNK, of_scales);
        // Rows of no columns have no codes.
        let codes = Parts::new(&mut *codes, (CHUNK * width).max(1), of_codes);
        let start = |worker: usize| shares.take(worker).take::<f32>(CHUNK * width);
        parallel::for_each(workers, sequences * chunks, start, |room, task| {
            let sequence = source.sequence(task / chunks);
            let have = scheme.rows(sequence.keys.len(), true);
            let rows = (task % chunks * CHUNK).min(have)..((task % chunks + 1) * CHUNK).min(have);
            if rows.is_empty() || width == 0 {
                return;
            }
            let (n, from) = (rows.len(), Made::Keys.rows(source, &sequence, 0, rows));
            let (codes, scales) = (&mut codes.take(task)[..n * width], &mut scales.take(task)[..n]);
            quantise(isa, from.part(isa, 0..n, room), codes, scales);
        });
    }
    Some(Made::Coded { codes, scales, stride, width })
}

/// [`Quantize`] of rows of any type.
fn quantise(isa: Isa, from: AnyRows<'_>, codes: &mut [i8], scales: &mut [f32]) {
    match from {
        AnyRows::F32(from) => isa.dispatch(Quantize { from, codes, scales }),
        AnyRows::F16(from) => isa.dispatch(Quantize { from, codes, scales }),
        AnyRows::Bf16(from) => isa.dispatch(Quantize { from, codes, scales }),
    }
}

/// A query as what its codes stand for.
pub(super) fn round(isa: Isa, query: &mut [f32], room: &mut [f32]) {
    let (n, codes, mut scale) = (query.len(), cast_mut::<i8>(room), [0.0]);
    quantise(isa, super::rows_of(query, 1, n), &mut codes[..n], &mut scale);
    isa.dispatch(Dequantize { codes: Rows::of_slice(codes, 1, n, n), scales: &scale, to: query, stride: n });
}

/// A query of `width` columns as words, with a factor of its scores and an offset:
/// see [`Rectified`](crate::simd::dots::Rectified).
pub(super) fn encode(isa: Isa, query: &mut [f32], width: usize, weight: f32, room: &mut [f32]) {
    let (codes, mut scale) = (&mut cast_mut::<i8>(room)[..width], [0.0]);
    quantise(isa, super::rows_of(query, 1, width), codes, &mut scale);
    let (words, beside) = query.split_at_mut(words(width));
    // Codes past the last are 0.
    words[words.len() - 1] = 0.0;
    cast_mut::<i8>(words)[..width].copy_from_slice(codes);
    let factor = weight * scale[0];
    // Infinity times a sum of 0 would be NaN. A NaN stays.
    beside[0] = if weight.is_finite() { factor.clamp(f32::MIN, f32::MAX) } else { factor };
    let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
    beside[1] = f32::from_bits((-128 * sum) as u32);
}

impl Candidates<'_> {
    /// Codes of some of them from the first on, with a scale each.
    fn codes(&self, part: Range<usize>) -> Option<(Rows<'_, i8>, &[f32])> {
        match self {
            Self::Codes { codes, scales } => Some((codes.part(part.clone(), 0..codes.cols()), &scales[part])),
            Self::Cache(kv, at) => {
                let keys = at.keys.start + part.start..at.keys.start + part.end;
                kv.codes(&At { keys, ..at.clone() })
            }
            Self::Rows(_) | Self::Listed { .. } => None,
        }
    }

    /// Codes of up to a panel as `[words, PANEL]`, 128 added to each, and their
    /// scales.
    #[inline(always)]
    pub(super) fn pack_codes<S: Simd>(
        &self,
        s: S,
        part: Range<usize>,
        width: usize,
        held: &mut [f32],
        panel: &mut [f32],
    ) -> [f32; PANEL] {
        let (words, n, mut scales) = (words(width), part.len(), [0.0; PANEL]);
        let (mut at, mut whole) = (0, None);
        while at < n {
            let Some((codes, own)) = self.codes(part.start + at..part.end) else { break };
            scales[at..at + own.len()].copy_from_slice(own);
            whole = codes.words().filter(|_| own.len() == n);
            if whole.is_none() {
                let to = held[at * words..].chunks_exact_mut(words);
                for (i, to) in to.take(own.len()).enumerate() {
                    to[words - 1] = 0.0;
                    cast_mut::<i8>(to)[..width].copy_from_slice(codes.row(i).unwrap_or_default());
                }
            }
            at += own.len();
        }
        let from = whole.unwrap_or_else(|| Rows::of_slice(held, n, words, words));
        AnyRows::F32(from).pack_keys(s, panel);
        for word in &mut panel[..words * PANEL] {
            *word = f32::from_bits(word.to_bits() ^ 0x8080_8080);
        }
        scales
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, Array4, ArrayView1, Axis, s};

    use super::*;
    use crate::cache::{Int8, Latent, Pages};
    use crate::definition;
    use crate::engine::workspace::Workspace;
    use crate::input::Qkv;
    use crate::keys::Per;
    use crate::select::{Forced, IndexBranch, Pick, Rule, Scored, Selected, Summary, select};
    use crate::testing::arrays::array;

    /// `k` keys a query, of pools.
    fn scheme(k: usize, pool: usize, reduce: Reduce) -> Scheme {
        Scheme {
            unit: pool,
            summary: Summary::First,
            per: Per::Group,
            q_block: 1,
            shares: None,
            reduce,
            pick: Pick { rule: Rule::TopK(k / pool), forced: Forced { first: 0, last: 0, inside: true } },
            causal: true,
            scored: Scored::Whole,
        }
    }

    fn chosen(isa: Isa, x: Qkv<'_, f32>, branch: &IndexBranch<'_, f32>, scheme: &Scheme) -> Selected {
        let source = Source::new(isa, x.reborrow(), None).unwrap().branch(&branch.reborrow());
        select(&source, scheme, &mut Workspace::new()).unwrap()
    }

    /// The numbers that the codes of a row stand for.
    fn numbers(row: ArrayView1<'_, f32>) -> Vec<f64> {
        let scale = (row.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0).max(f32::MIN_POSITIVE);
        let code = |x: &f32| f64::from((x / scale).round_ties_even().clamp(-127.0, 127.0));
        row.iter().map(|x| code(x) * f64::from(scale)).collect()
    }

    /// Refuses lists that are not those of the numbers of codes, up to what is in doubt.
    fn agrees(
        got: &Selected,
        (x, keys, weights): (Qkv<'_, f32>, &Array4<f32>, &Array3<f32>),
        scheme: &Scheme,
    ) {
        let dims = x.dims().unwrap();
        let score = |of: &Sequence, [b, h, i]: [usize; 3], n: usize| {
            let (q, k) = (numbers(x.q.slice(s![b, h, i, ..])), numbers(keys.slice(s![of.batch, 0, n, ..])));
            let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
            f64::from(weights[[b, h, i]]) * dot.max(0.0)
        };
        let layout = scheme.layout(&dims, &x.lengths);
        let (lists, margins) = definition::select::select_numbered(scheme, &dims, &x.lengths, &layout, score);
        assert_eq!(got.offsets.len(), lists.len() + 1);
        for (list, want) in lists.iter().enumerate() {
            let got: Vec<usize> = got.candidates[got.offsets[list]..got.offsets[list + 1]]
                .iter()
                .map(|&c| c as usize)
                .collect();
            let apart = |a: &[usize], b: &[usize]| {
                a.iter().copied().find(|c| {
                    let doubt = margins.doubtful[list].iter().any(|keys| keys.start == c * scheme.unit);
                    !doubt && !b.contains(c)
                })
            };
            assert_eq!((apart(&got, want), apart(want, &got)), (None, None), "list {list}");
        }
    }

    /// Rows as arrays of any type and in caches, by every instruction set.
    #[test]
    fn codes_choose_what_their_numbers_do() {
        let (q, k) = (array(5, (2, 4, 70, 33)), array(6, (2, 1, 300, 33)));
        let weights = Array3::from_shape_fn((2, 4, 70), |(b, h, i)| ((b + 3 * h + i) % 5) as f32 - 1.0);
        let half = k.mapv(half::f16::from_f32);
        let widened = half.mapv(f32::from);
        let mut codes = Latent::paged::<Int8>(33, 0, 2, Pages { count: 60, len: 16 }).unwrap();
        let mut halves = Latent::contiguous::<half::f16>(33, 0, 2, 300).unwrap();
        for b in 0..2 {
            let rows = k.index_axis(Axis(0), b).index_axis_move(Axis(0), 0);
            codes.append(b, rows).unwrap();
            halves.append(b, rows).unwrap();
        }
        for (isa, pool) in Isa::available().flat_map(|isa| [1, 4].map(|pool| (isa, pool))) {
            let scheme = scheme(20, pool, Reduce::RectifiedCodes);
            for rows in [0..70, 69..70] {
                let (q, w) = (q.slice(s![.., .., rows.clone(), ..]), weights.slice(s![.., .., rows]));
                let (x, owned) = (Qkv::new(q, k.view(), k.view()), w.to_owned());
                let of = |branch: IndexBranch<'_, f32>, keys: &Array4<f32>| {
                    let got = chosen(isa, x, &branch.reborrow().weighted(w.reborrow()), &scheme);
                    agrees(&got, (x, keys, &owned), &scheme);
                    got
                };
                let plain = of(IndexBranch::new(q, k.view()), &k);
                let stored = of(IndexBranch::cached(q, &codes), &k);
                assert_eq!((stored.offsets, stored.candidates), (plain.offsets, plain.candidates));
                of(IndexBranch::cached(q, &halves), &widened);
            }
            let (q, ones) = (q.mapv(half::f16::from_f32), Array3::ones((2, 4, 70)));
            let q_widened = q.mapv(f32::from);
            let x = Qkv::new(q_widened.view(), k.view(), k.view());
            let branch = IndexBranch::new(q.view(), half.view());
            let source = Source::new(isa, x, None).unwrap().branch(&branch);
            let got = select(&source, &scheme, &mut Workspace::new()).unwrap();
            agrees(&got, (x, &widened, &ones), &scheme);
        }
    }

    /// Whole numbers up to 127 are their own codes.
    #[test]
    fn codes_of_whole_numbers_are_exact() {
        let whole = |seed: u64, shape| {
            let mut x: Array4<f32> = array(seed, shape);
            for mut row in x.rows_mut() {
                row.mapv_inplace(|x| (x * 20.0).round().clamp(-126.0, 126.0));
                row[3] = 127.0;
            }
            x
        };
        let (q, k) = (whole(6, (1, 4, 70, 32)), whole(7, (1, 1, 300, 32)));
        let branch = IndexBranch::new(q.view(), k.view());
        for isa in Isa::available() {
            let select = |reduce| {
                let found =
                    chosen(isa, Qkv::new(q.view(), k.view(), k.view()), &branch, &scheme(20, 1, reduce));
                (found.offsets, found.candidates)
            };
            assert_eq!(select(Reduce::RectifiedCodes), select(Reduce::Rectified), "{isa}");
        }
    }

    /// A row with a number that has no code is never chosen, and does not spoil others.
    #[test]
    fn codes_of_no_number_show() {
        let (q, k) = (array(7, (1, 2, 3, 12)), array(8, (1, 1, 40, 12)));
        let mut keys = k.clone();
        (keys[[0, 0, 5, 3]], keys[[0, 0, 7, 2]]) = (f32::INFINITY, f32::NAN);
        let branch = IndexBranch::new(q.view(), keys.view());
        for isa in Isa::available() {
            let x = Qkv::new(q.view(), k.view(), k.view());
            let found = chosen(isa, x, &branch, &scheme(100, 1, Reduce::RectifiedCodes));
            assert_eq!(found.offsets, [0, 36, 36 + 37, 36 + 37 + 38], "{isa}");
        }
    }
}
