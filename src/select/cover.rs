//! How many of the highest shares cover a mass.

/// Buckets of shares: their exponents and three bits more.
const BUCKETS: usize = 1024;

/// The length of the longest prefix of the shares, by falling size, that sums to
/// at most `mass`; what is negative or NaN is left out. `room` holds as many
/// elements. Reads the shares twice: to sum buckets of them, and for those of the
/// bucket in which the prefix ends, which alone are ordered.
pub(crate) fn within(shares: &[f32], mass: f64, room: &mut [u32]) -> usize {
    let (mut counts, mut sums) = ([0u32; BUCKETS], [0f64; BUCKETS]);
    for &x in shares {
        if x >= 0.0 {
            let bucket = bucket(x);
            counts[bucket] += 1;
            sums[bucket] += f64::from(x);
        }
    }
    let (mut count, mut sum) = (0, 0.0);
    for last in (0..BUCKETS).rev() {
        if sum + sums[last] <= mass {
            (count, sum) = (count + counts[last] as usize, sum + sums[last]);
            continue;
        }
        let mut found = 0;
        for &x in shares {
            if x >= 0.0 && bucket(x) == last {
                room[found] = x.to_bits();
                found += 1;
            }
        }
        let here = &mut room[..found];
        here.sort_unstable_by(|a, b| b.cmp(a));
        for &bits in &*here {
            sum += f64::from(f32::from_bits(bits));
            if sum > mass {
                return count;
            }
            count += 1;
        }
    }
    count
}

/// Rises with a share.
fn bucket(x: f32) -> usize {
    ((x.to_bits() >> 20) as usize).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn the_count_is_that_of_a_full_sort(
            counts in proptest::collection::vec(-2i16..200, 0..400), mass in -0.1f64..8.0,
        ) {
            // Sums of multiples of 2^-10 are exact.
            let shares: Vec<f32> = counts.iter().map(|&x| f32::from(x) / 1024.0).collect();
            let mut sorted: Vec<f64> = shares.iter().filter(|x| **x >= 0.0).map(|&x| f64::from(x)).collect();
            sorted.sort_by(|a, b| b.partial_cmp(a).unwrap());
            let sums = sorted.iter().scan(0.0, |sum, x| { *sum += x; Some(*sum) });
            let want = sums.take_while(|&sum| sum <= mass).count();
            prop_assert_eq!(within(&shares, mass, &mut vec![0; shares.len()]), want);
        }
    }

    #[test]
    fn what_is_no_share_is_left_out() {
        let shares = [f32::NAN, 0.5, f32::NEG_INFINITY, 0.25, 0.0];
        assert_eq!(within(&shares, 0.74, &mut [0; 5]), 1);
        assert_eq!(within(&shares, 0.75, &mut [0; 5]), 3);
        assert_eq!(within(&shares, 9.0, &mut [0; 5]), 3);
    }
}
