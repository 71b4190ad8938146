//! Picks: which candidates of a row of scores are chosen.

use crate::mask::interval::bits_of;
use crate::simd::mem::{Arena, bytes_for};
use crate::simd::{Isa, Kernel, Simd};

/// How many candidates are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Rule {
    /// The highest scores, this many, or as many as are numbers.
    TopK(usize),
    /// The highest scores until they sum to `mass`, for scores that are shares:
    /// at least `least` of them and at most `most`.
    TopP {
        /// Where the sum, from the highest on, ends.
        mass: f64,
        /// At least so many.
        least: usize,
        /// At most so many.
        most: usize,
    },
    /// All scores above this one.
    Threshold(f32),
}

/// Candidates that are chosen whatever their scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forced {
    /// The first so many: sinks.
    pub first: usize,
    /// The last so many that the queries see: what is local.
    pub last: usize,
    /// Whether they count among those that the rule chooses.
    pub inside: bool,
}

impl Forced {
    /// The candidates of `n` that are not forced: those between.
    pub(crate) fn between(&self, n: usize) -> std::ops::Range<usize> {
        let start = self.first.min(n);
        start..n.saturating_sub(self.last).max(start)
    }
}

/// A rule and what is forced beside it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    /// How many are chosen.
    pub rule: Rule,
    /// What is chosen in any case.
    pub forced: Forced,
}

/// What [`choose`] works in.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    keys: &'a mut [u64],
    counts: &'a mut [u32],
}

impl<'a> Room<'a> {
    pub(crate) fn bytes(candidates: usize) -> usize {
        bytes_for::<u64>(candidates) + bytes_for::<u32>(2 * COUNTS)
    }

    pub(crate) fn take(arena: &mut Arena<'a>, candidates: usize) -> Self {
        Self { keys: arena.take(candidates), counts: arena.take(2 * COUNTS) }
    }
}

/// Buckets of scores, and one for what is no number.
const BUCKETS: usize = 2048;
const COUNTS: usize = BUCKETS + 1;
/// Rows so short are not worth buckets: they stay in the first-level cache, and where
/// the choice ends is found by halving.
const SHORT: usize = 1024;

/// Sets the bits of the chosen candidates of `scores`, and clears the others.
///
/// The highest come first, equal ones from the lower index on, and -0 equals 0.
/// NaN is chosen where it is forced alone: where fewer scores are numbers than are
/// wanted, fewer are chosen. Reads the row three times: for its range, to count how many
/// scores fall into each of some buckets, and to set bits; only those of the bucket in
/// which the choice ends are ordered. A short row is read some ten times more, and ordered
/// where scores are equal alone.
pub(crate) fn choose(isa: Isa, pick: &Pick, scores: &[f32], room: &mut Room<'_>, bits: &mut [u64]) {
    let n = scores.len();
    let between = pick.forced.between(n);
    let forced = n - between.len();
    for (w, word) in bits.iter_mut().enumerate() {
        *word = bits_of(&(0..n), 64 * w) & !bits_of(&between, 64 * w);
    }
    let left = |k: usize| if pick.forced.inside { k.saturating_sub(forced) } else { k };
    match pick.rule {
        Rule::TopK(k) => isa.dispatch(Top { scores, between, k: left(k), room, bits }),
        Rule::TopP { mass, least, most } => {
            let outside = scores[..between.start].iter().chain(&scores[between.end..]);
            let known = outside.filter(|x| !x.is_nan());
            let held = if pick.forced.inside { known.map(|&x| f64::from(x)).sum() } else { 0.0 };
            let (least, most) = (left(least), left(most));
            let found = isa.dispatch(Gather { scores, between, room });
            let keys = &mut room.keys[..found];
            keys.sort_unstable_by(|a, b| b.cmp(a));
            let mut sum: f64 = held;
            for (i, &key) in keys.iter().take(most).enumerate() {
                if i >= least && sum >= mass {
                    break;
                }
                let index = index_of(key);
                sum += f64::from(scores[index]);
                bits[index / 64] |= 1 << (index % 64);
            }
        }
        Rule::Threshold(least) => isa.dispatch(Above { scores, between, least, bits }),
    }
}

/// A number that orders as the scores do: 0 for NaN, more for all others.
#[inline(always)]
pub(super) fn order(x: f32) -> u32 {
    // -0 becomes 0.
    let bits = (x + 0.0).to_bits();
    let flip = ((bits as i32) >> 31) as u32 | 0x8000_0000;
    if x.is_nan() { 0 } else { bits ^ flip }
}

/// The score of an [`order`], or the next lower one: -0 has none.
#[inline(always)]
fn score_of(order: u32) -> f32 {
    let order = if order == 0x7fff_ffff { order - 1 } else { order };
    f32::from_bits(if order >> 31 == 1 { order & 0x7fff_ffff } else { !order })
}

/// What is lower than every score but NaN.
const LEAST: u32 = 0x007f_fffe;

/// Orders by score, and lower indices before higher ones.
#[inline(always)]
pub(super) fn key(order: u32, index: usize) -> u64 {
    u64::from(order) << 32 | u64::from(!(index as u32))
}

pub(super) fn index_of(key: u64) -> usize {
    !(key as u32) as usize
}

/// A word of bits of what is larger than `than`: for each of 64 scores from
/// `first` on.
#[inline(always)]
fn larger<S: Simd>(s: S, scores: &[f32], first: usize, than: S::F) -> u64 {
    let mut word = 0;
    let end = scores.len().min(first + 64);
    for at in (first..end).step_by(S::LANES) {
        let x = if at + S::LANES <= end { s.load(&scores[at..]) } else { s.load_tail(&scores[at..end]) };
        word |= s.bits(s.lt(than, x)) << (at - first);
    }
    word
}

/// A word of bits of scores whose [`order`] is above one.
#[inline(always)]
fn above<S: Simd>(s: S, scores: &[f32], first: usize, order: u32) -> u64 {
    if order > LEAST {
        return larger(s, scores, first, s.splat(score_of(order)));
    }
    // All but NaN: -inf is larger than nothing.
    let end = scores.len().min(first + 64);
    (first..end).fold(0, |word, at| word | u64::from(!scores[at].is_nan()) << (at - first))
}

/// Words that hold a range of bits.
fn words(range: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    if range.is_empty() { 0..0 } else { range.start / 64..range.end.div_ceil(64) }
}

/// The highest `k` scores of a range, NaN left out.
struct Top<'a, 'b> {
    scores: &'a [f32],
    between: std::ops::Range<usize>,
    k: usize,
    room: &'a mut Room<'b>,
    bits: &'a mut [u64],
}

impl Kernel for Top<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, between, k, room, bits } = self;
        if k == 0 || between.is_empty() {
            return;
        }
        // What ends up chosen: orders above `sure`, and `left` of those above
        // `maybe`.
        let (sure, maybe, left) = if between.len() <= SHORT {
            halve(s, scores, &between, k)
        } else {
            bounds(&scores[between.clone()], k, room.counts)
        };
        let mut found = 0;
        for w in words(&between) {
            let valid = bits_of(&between, 64 * w);
            let certain = if sure == u32::MAX { 0 } else { above(s, scores, 64 * w, sure) & valid };
            bits[w] |= certain;
            if left == 0 {
                continue;
            }
            let mut doubtful = above(s, scores, 64 * w, maybe) & valid & !certain;
            while doubtful != 0 {
                let at = 64 * w + doubtful.trailing_zeros() as usize;
                room.keys[found] = key(order(scores[at]), at);
                found += 1;
                doubtful &= doubtful - 1;
            }
        }
        let keys = &mut room.keys[..found];
        if left > 0 && left < found {
            keys.select_nth_unstable_by(left - 1, |a, b| b.cmp(a));
        }
        let keys = &keys[..left.min(found)];
        for &key in keys {
            let index = index_of(key);
            bits[index / 64] |= 1 << (index % 64);
        }
    }
}

/// [`bounds`] of a short range.
#[inline(always)]
fn halve<S: Simd>(s: S, scores: &[f32], between: &std::ops::Range<usize>, k: usize) -> (u32, u32, usize) {
    let count = |than: u32| -> usize {
        let word = |w: usize| above(s, scores, 64 * w, than) & bits_of(between, 64 * w);
        words(between).map(|w| word(w).count_ones() as usize).sum()
    };
    if count(LEAST) <= k {
        return (LEAST, LEAST, 0);
    }
    let mut most = s.splat(f32::NEG_INFINITY);
    for part in scores[between.clone()].chunks_exact(S::LANES) {
        most = s.max(s.load(part), most);
    }
    let rest = scores[between.clone()].chunks_exact(S::LANES).remainder();
    let most = rest.iter().fold(s.reduce_max(most), |most, &x| most.max(x));
    // More than `k` are above `low`, and `over`, fewer, above `high`.
    let (mut low, mut high, mut over) = (LEAST, order(most), 0);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match count(middle) {
            n if n == k => return (middle, middle, 0),
            n if n > k => low = middle,
            n => (high, over) = (middle, n),
        }
    }
    (high, low, k - over)
}

/// Two orders between which the choice of the highest `k` ends, and how many
/// scores between them it takes.
#[inline(always)]
fn bounds(scores: &[f32], k: usize, counts: &mut [u32]) -> (u32, u32, usize) {
    let (mut low, mut high, mut valid) = (u32::MAX, 0, 0u32);
    for &x in scores {
        let order = order(x);
        high = high.max(order);
        low = low.min(if order == 0 { u32::MAX } else { order });
        valid += u32::from(order != 0);
    }
    if valid as usize <= k {
        return (LEAST, LEAST, 0);
    }
    let span = high - low;
    let shift = (u32::BITS - span.leading_zeros()).saturating_sub(BUCKETS.trailing_zeros());
    counts.fill(0);
    // Two histograms, so that equal neighbours do not wait for each other.
    let (even, odd) = counts.split_at_mut(COUNTS);
    let mut buckets = [0u32; 64];
    for scores in scores.chunks(64) {
        for (bucket, &x) in buckets.iter_mut().zip(scores) {
            // NaN, whose order is 0, lands past the highest bucket.
            *bucket = (order(x).wrapping_sub(low) >> shift).min(BUCKETS as u32);
        }
        for pair in buckets[..scores.len()].chunks(2) {
            even[pair[0] as usize] += 1;
            if let Some(&bucket) = pair.get(1) {
                odd[bucket as usize] += 1;
            }
        }
    }
    let (mut bucket, mut above) = ((span >> shift) as usize, 0);
    loop {
        let here = (even[bucket] + odd[bucket]) as usize;
        if above + here >= k || bucket == 0 {
            let start = low + ((bucket as u32) << shift);
            let end = u64::from(start) + (1 << shift);
            if above + here == k {
                return (start - 1, start - 1, 0);
            }
            let sure = u32::try_from(end - 1).ok().filter(|&sure| sure < high).unwrap_or(u32::MAX);
            return (sure, start - 1, k - above);
        }
        above += here;
        bucket -= 1;
    }
}

/// The keys of all scores of a range that are numbers.
struct Gather<'a, 'b> {
    scores: &'a [f32],
    between: std::ops::Range<usize>,
    room: &'a mut Room<'b>,
}

impl Kernel for Gather<'_, '_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        let mut found = 0;
        for at in self.between {
            let order = order(self.scores[at]);
            self.room.keys[found] = key(order, at);
            found += usize::from(order != 0);
        }
        found
    }
}

/// All scores of a range above one.
struct Above<'a> {
    scores: &'a [f32],
    between: std::ops::Range<usize>,
    least: f32,
    bits: &'a mut [u64],
}

impl Kernel for Above<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for w in words(&self.between) {
            let found = larger(s, self.scores, 64 * w, s.splat(self.least));
            self.bits[w] |= found & bits_of(&self.between, 64 * w);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::select::chosen;
    use crate::engine::workspace::Workspace;
    use proptest::prelude::*;

    fn ids(isa: Isa, pick: &Pick, scores: &[f32]) -> Vec<usize> {
        let n = scores.len();
        let mut workspace = Workspace::new();
        let mut room = Room::take(&mut workspace.arena(Room::bytes(n)).unwrap(), n);
        let mut bits = vec![u64::MAX; n.div_ceil(64)];
        choose(isa, pick, scores, &mut room, &mut bits);
        (0..64 * bits.len()).filter(|i| bits[i / 64] >> (i % 64) & 1 == 1).collect()
    }

    fn score() -> impl Strategy<Value = f32> {
        prop_oneof![
            8 => -4i8..4,
            1 => Just(0),
        ]
        .prop_map(f32::from)
        .prop_flat_map(|x| {
            prop_oneof![
                12 => Just(x),
                4 => any::<f32>(),
                4 => -8f32..8.0,
                1 => Just(f32::NAN),
                1 => Just(-0.0),
                1 => Just(f32::INFINITY),
                1 => Just(f32::NEG_INFINITY),
            ]
        })
    }

    fn rule(n: usize) -> impl Strategy<Value = Rule> {
        prop_oneof![
            4 => (0..n + 3).prop_map(Rule::TopK),
            1 => (-5f32..5.0).prop_map(Rule::Threshold),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 400, ..ProptestConfig::default() })]
        #[test]
        fn the_kernel_chooses_what_a_full_sort_does(
            (scores, rule) in (0usize..1500).prop_flat_map(|n| {
                (proptest::collection::vec(score(), n), rule(n))
            }),
            first in 0usize..4, last in 0usize..70, inside in any::<bool>(),
        ) {
            let pick = Pick { rule, forced: Forced { first, last, inside } };
            let exact: Vec<f64> = scores.iter().map(|&x| f64::from(x)).collect();
            let want = chosen(&pick, &exact).0;
            for isa in Isa::available() {
                prop_assert_eq!(&ids(isa, &pick, &scores), &want, "{}", isa);
            }
        }

        #[test]
        fn shares_are_taken_until_they_sum_to_the_mass(
            counts in proptest::collection::vec(0u8..16, 1..400),
            mass in 0u16..1030, least in 0usize..5, most in 0usize..500, inside in any::<bool>(),
        ) {
            // Exact in f32: multiples of 2^-10.
            let scores: Vec<f32> = counts.iter().map(|&x| f32::from(x) / 1024.0).collect();
            let rule = Rule::TopP { mass: f64::from(mass) / 1024.0, least, most };
            let pick = Pick { rule, forced: Forced { first: 1, last: 2, inside } };
            let exact: Vec<f64> = scores.iter().map(|&x| f64::from(x)).collect();
            for isa in Isa::available() {
                prop_assert_eq!(&ids(isa, &pick, &scores), &chosen(&pick, &exact).0, "{}", isa);
            }
        }
    }
}
