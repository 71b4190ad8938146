//! Which tokens a cache keeps, by what queries gave them.
//!
//! What a key received is a statistic that the kernels give without holding all
//! weights: [`Weights::key_weights`](crate::Weights::key_weights), over arrays
//! and over caches. A policy makes lists of it, one for each key/value head,
//! ascending, for [`Compacted::keep`](crate::cache::Compacted::keep). Equal
//! shares go to the lower token. All heads of a cache keep as many tokens, so lists are
//! not shorter where shares are NaN: such tokens are below all others, and fill up.
//!
//! | policy | keeps | from |
//! |---|---|---|
//! | [`SnapKv`] | what the last queries of a prompt looked at, and they themselves | arXiv 2404.14469 |
//! | [`HeavyHitters`] | what received most since it came, and the last tokens (H2O) | arXiv 2306.14048 |
//!
//! First and last tokens alone (StreamingLLM) are a [`Ring`](crate::cache::Ring).

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

use super::pick::order;
use crate::error::{Error, Result};

/// How neighbours smooth a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Smoothing {
    /// Their mean, where those beyond an end count as 0.
    #[default]
    Mean,
    /// The largest.
    Max,
}

/// SnapKV: after a prompt each head keeps the tokens that its last `window`
/// queries gave most, smoothed over `kernel` neighbours so that runs stay
/// together, and the window.
///
/// ```text
/// s_j = sum_{i in window} P_ij      for j before the window
/// keep the capacity - window tokens of the largest pool(s)_j, and the window
/// ```
///
/// Query heads of a group share a list and a mean of their shares.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Cached, Compacted, KvShape};
/// use attention_kernels::select::{Smoothing, SnapKv};
/// use attention_kernels::{Attention, Weights, dense::Dense};
/// use ndarray::{Array3, Array4, Axis, s};
///
/// let shape = KvShape { kv_heads: 2, head_dim: 16, value_dim: 16 };
/// let mut cache = Compacted::<f32>::new(shape, 1, 1000)?;
/// let k = Array3::from_shape_fn((2, 500, 16), |(h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// cache.append(0, k.view(), k.view())?;
///
/// let snap = SnapKv { window: 32, capacity: 100, kernel: 5, pooling: Smoothing::Mean };
/// let q = Array4::from_shape_fn((1, 4, 32, 16), |(_, h, i, c)| ((h + i * (c + 1)) as f32).cos());
/// let x = Cached::new(q.view(), &cache); // the last 32 queries of the prompt
/// let received = Dense::builder().causal().build()?.key_weights(x)?;
/// let kept = snap.keep(received.index_axis(Axis(0), 0), 2)?;
/// cache.keep(0, kept.view())?;
/// assert_eq!(cache.lengths(), [100]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapKv {
    /// Queries that are asked, the last of the prompt; 32 in most models.
    pub window: usize,
    /// Tokens that are kept, the window among them; more than it.
    pub capacity: usize,
    /// Neighbours that smooth a share: an odd number, 5 or 7.
    pub kernel: usize,
    /// How.
    pub pooling: Smoothing,
}

impl SnapKv {
    /// The tokens that each key/value head keeps, `[kv_heads, n]`, by what the
    /// queries of the window gave them, `[q_heads, len]`: all of them where they
    /// are no more than the capacity.
    ///
    /// Cost: `O(q_heads len)`.
    ///
    /// # Errors
    /// [`Error::Value`] for an even kernel or a capacity below the window,
    /// [`Error::Heads`] for heads that groups do not divide.
    pub fn keep(&self, received: ArrayView2<'_, f32>, kv_heads: usize) -> Result<Array2<usize>> {
        let &Self { window, capacity, kernel, pooling } = self;
        if kernel.is_multiple_of(2) {
            return Err(Error::value("kernel", "an odd number of neighbours", kernel));
        }
        if capacity < window {
            return Err(Error::value("capacity", format!("at least the window, {window}"), capacity));
        }
        let shares = by_group(received, kv_heads, true)?;
        let len = shares.ncols();
        if len <= capacity {
            return Ok(Array2::from_shape_fn((kv_heads, len), |(_, j)| j));
        }
        let before = len - window;
        let lists = shares.rows().into_iter().map(|row| {
            let mut kept = largest(&pooled(row.slice(s![..before]), kernel, pooling), capacity - window);
            kept.extend(before..len);
            kept
        });
        Ok(rows_of(lists.collect(), capacity))
    }
}

/// What the query heads of each group gave, together or on average.
fn by_group(received: ArrayView2<'_, f32>, kv_heads: usize, mean: bool) -> Result<Array2<f32>> {
    let (q_heads, len) = received.dim();
    if (kv_heads == 0 && q_heads > 0) || (kv_heads > 0 && !q_heads.is_multiple_of(kv_heads)) {
        return Err(Error::Heads { q_heads, kv_heads });
    }
    let group = q_heads / kv_heads.max(1);
    let mut sums = Array2::zeros((kv_heads, len));
    for (h, row) in received.outer_iter().enumerate() {
        let mut sum = sums.index_axis_mut(Axis(0), h / group);
        sum += &row;
    }
    if mean && group > 1 {
        sums /= group as f32;
    }
    Ok(sums)
}

/// Each share with its neighbours.
fn pooled(shares: ArrayView1<'_, f32>, kernel: usize, pooling: Smoothing) -> Array1<f32> {
    let (n, reach) = (shares.len(), kernel / 2);
    let mut out = shares.to_owned();
    for distance in 1..=reach.min(n.saturating_sub(1)) {
        let mut join = |to: std::ops::Range<usize>, from: std::ops::Range<usize>| {
            let mut to = out.slice_mut(s![to]);
            match pooling {
                Smoothing::Mean => to += &shares.slice(s![from]),
                Smoothing::Max => to.zip_mut_with(&shares.slice(s![from]), |to, x| *to = to.max(*x)),
            }
        };
        join(distance..n, 0..n - distance);
        join(0..n - distance, distance..n);
    }
    if pooling == Smoothing::Mean {
        out /= kernel as f32;
    }
    out
}

/// The places of the `count` largest numbers, ascending.
fn largest(shares: &Array1<f32>, count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..shares.len()).collect();
    if count < places.len() {
        // NaN has the order 0.
        let by_order = |a: &usize, b: &usize| order(shares[*b]).cmp(&order(shares[*a])).then(a.cmp(b));
        places.select_nth_unstable_by(count, by_order);
        places.truncate(count);
        places.sort_unstable();
    }
    places
}

/// Lists of equal length as rows.
fn rows_of(lists: Vec<Vec<usize>>, len: usize) -> Array2<usize> {
    Array2::from_shape_fn((lists.len(), len), |(h, i)| lists[h][i])
}

/// H2O: of all tokens but the last `recent`, the `heavy` ones that received most
/// since they came are kept; what the others received is lost with them.
///
/// ```text
/// a_j += sum_i P_ij      for the tokens that are there
/// keep the heavy tokens of the largest a_j before the last recent, and these
/// ```
///
/// One of these for each sequence and layer. With `heavy = 0` it is a sliding
/// window; with room for every token nothing is dropped.
///
/// ```
/// use attention_kernels::select::HeavyHitters;
/// use ndarray::array;
///
/// let mut hitters = HeavyHitters::new(1, 1, 2); // one head: one heavy token, two recent ones
/// hitters.observe(array![[0.2, 0.5, 0.2, 0.1]].view())?;
/// assert_eq!(hitters.evict(), Some(array![[1, 2, 3]]));
/// hitters.observe(array![[0.1, 0.3, 0.3, 0.3]].view())?; // one more token
/// assert_eq!(hitters.received().row(0).to_vec(), [0.6, 0.5, 0.4, 0.3]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct HeavyHitters {
    heavy: usize,
    recent: usize,
    /// `[kv_heads, len]`
    received: Array2<f32>,
}

impl HeavyHitters {
    /// Of no tokens yet.
    pub fn new(kv_heads: usize, heavy: usize, recent: usize) -> Self {
        Self { heavy, recent, received: Array2::zeros((kv_heads, 0)) }
    }

    /// What each token received so far, `[kv_heads, len]`.
    pub fn received(&self) -> ArrayView2<'_, f32> {
        self.received.view()
    }

    /// Adds what queries gave the tokens that are there, `[q_heads, len]`; those
    /// beyond the known ones are new. Heads of a group add up.
    ///
    /// # Errors
    /// [`Error::Heads`] for heads that groups do not divide, [`Error::Shape`] for
    /// fewer tokens than are known.
    pub fn observe(&mut self, received: ArrayView2<'_, f32>) -> Result<()> {
        let (kv_heads, known) = self.received.dim();
        let mut sums = by_group(received, kv_heads, false)?;
        if sums.ncols() < known {
            let expected = format!("[q_heads, len] = [_, at least {known}]");
            return Err(Error::shape("received", expected, received.shape()));
        }
        let mut old = sums.slice_mut(s![.., ..known]);
        old += &self.received;
        self.received = sums;
        Ok(())
    }

    /// The tokens that each head keeps, `[kv_heads, heavy + recent]`, if there
    /// are more than that: those are the ones that are there from now on.
    pub fn evict(&mut self) -> Option<Array2<usize>> {
        let len = self.received.ncols();
        let most = self.heavy.saturating_add(self.recent);
        if len <= most {
            return None;
        }
        let before = len - self.recent;
        let lists = self.received.rows().into_iter().map(|row| {
            let mut kept = largest(&row.slice(s![..before]).to_owned(), self.heavy);
            kept.extend(before..len);
            kept
        });
        let kept = rows_of(lists.collect(), most);
        self.received = Array2::from_shape_fn(kept.dim(), |(h, i)| self.received[[h, kept[[h, i]]]]);
        Some(kept)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, Array4, array};

    use super::*;
    use crate::attention::{Attention, Weights};
    use crate::cache::{Append, Cached, Compacted, KvShape};
    use crate::dense::Dense;
    use crate::input::Qkv;
    use crate::mask::mask_fn_per_head;
    use crate::testing::noise;

    fn shares(heads: usize, len: usize) -> Array2<f32> {
        let mut next = noise(7);
        Array2::from_shape_simple_fn((heads, len), || next().abs())
    }

    /// By sorting everything, from the paper.
    #[test]
    fn snap_is_what_the_paper_says() {
        let received = shares(6, 80);
        for (window, capacity, kernel, pooling) in [
            (8, 30, 5, Smoothing::Mean),
            (0, 11, 1, Smoothing::Mean),
            (16, 16, 7, Smoothing::Max),
            (5, 79, 3, Smoothing::Max),
            (8, 40, 201, Smoothing::Mean),
        ] {
            let snap = SnapKv { window, capacity, kernel, pooling };
            let got = snap.keep(received.view(), 2).unwrap();
            assert_eq!(got.dim(), (2, capacity));
            for h in 0..2 {
                let mean = |j: usize| (0..3).map(|q| received[[3 * h + q, j]]).sum::<f32>() / 3.0;
                let smooth = |j: usize| {
                    let near = j.saturating_sub(kernel / 2)..(j + kernel / 2 + 1).min(80 - window);
                    match pooling {
                        Smoothing::Mean => near.map(mean).sum::<f32>() / kernel as f32,
                        Smoothing::Max => near.map(mean).fold(0.0, f32::max),
                    }
                };
                let mut order: Vec<usize> = (0..80 - window).collect();
                order.sort_by(|&a, &b| smooth(b).total_cmp(&smooth(a)).then(a.cmp(&b)));
                let kept = &order[..capacity - window];
                // Sums in another order differ in the last places.
                let least = kept.iter().map(|&j| smooth(j)).fold(f32::INFINITY, f32::min);
                for &j in got.row(h).iter().take(capacity - window) {
                    assert!(kept.contains(&j) || (smooth(j) - least).abs() < 1e-5);
                }
                assert!(got.row(h).windows(2).into_iter().all(|pair| pair[0] < pair[1]));
                assert_eq!(got.row(h).to_vec()[capacity - window..], (80 - window..80).collect::<Vec<_>>());
            }
        }
        let all = SnapKv { window: 8, capacity: 80, kernel: 1, pooling: Smoothing::Mean };
        assert_eq!(all.keep(received.view(), 3).unwrap().row(2).to_vec(), (0..80).collect::<Vec<_>>());
        let equal = SnapKv { capacity: 11, ..all }.keep(Array2::ones((1, 40)).view(), 1).unwrap();
        assert_eq!(equal, array![[0, 1, 2, 32, 33, 34, 35, 36, 37, 38, 39]]);
        let odd = array![[1.0, f32::NAN, 2.0, 0.0, 0.0]];
        let one = SnapKv { window: 0, capacity: 3, kernel: 1, pooling: Smoothing::Mean };
        assert_eq!(one.keep(odd.view(), 1).unwrap(), array![[0, 2, 3]]);
    }

    /// Decoding over what is kept is dense attention with the others hidden.
    #[test]
    fn decoding_over_kept_tokens_is_masked_attention() {
        let shape = KvShape { kv_heads: 2, head_dim: 8, value_dim: 5 };
        let (mut a, mut b) = (noise(1), noise(2));
        let k = Array3::from_shape_simple_fn((2, 90, 8), || 2.0 * a());
        let v = Array3::from_shape_simple_fn((2, 90, 5), &mut b);
        let q = Array4::from_shape_simple_fn((1, 4, 16, 8), || 2.0 * b());
        let mut cache = Compacted::<f32>::new(shape, 1, 100).unwrap();
        cache.append(0, k.view(), v.view()).unwrap();
        let dense = Dense::builder().causal().build().unwrap();
        let received = dense.key_weights(Cached::new(q.view(), &cache)).unwrap();
        let of_arrays = Qkv::new(q.view(), k.view().insert_axis(Axis(0)), v.view().insert_axis(Axis(0)));
        assert_eq!(received, dense.key_weights(of_arrays).unwrap());
        let reference = dense.reference_weights(Cached::new(q.view(), &cache)).unwrap();
        for ((_, h, j), got) in received.indexed_iter() {
            let want: f64 = (0..16).map(|i| reference[[0, h, i, j]]).sum();
            assert!((f64::from(*got) - want).abs() < 1e-5);
        }
        let snap = SnapKv { window: 16, capacity: 40, kernel: 5, pooling: Smoothing::Max };
        let kept = snap.keep(received.index_axis(Axis(0), 0), 2).unwrap();
        cache.keep(0, kept.view()).unwrap();
        assert_eq!(cache.positions(0, 1).unwrap(), kept.row(1).to_vec());
        let last = q.slice(s![.., .., 15.., ..]);
        let got = dense.forward(Cached::new(last, &cache)).unwrap();
        let lists = kept.clone();
        let mask = mask_fn_per_head(move |site, _, key| lists.row(site.head / 2).iter().any(|&j| j == key));
        let masked = Dense::builder().mask(mask).build().unwrap();
        let want = masked
            .reference(Qkv::new(last, k.view().insert_axis(Axis(0)), v.view().insert_axis(Axis(0))))
            .unwrap();
        for (got, want) in got.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} for {want}");
        }
    }

    /// What is dropped is dropped for good: sums over a masked history, step by
    /// step, are those over what is there.
    #[test]
    fn heavy_hitters_are_greedy_sums() {
        let (mut next, steps) = (noise(3), 40);
        for (heavy, recent) in [(4, 6), (0, 5), (5, 0), (100, 3)] {
            let mut hitters = HeavyHitters::new(2, heavy, recent);
            // Positions that each head has, and what they received.
            let mut model: Vec<Vec<(usize, f32)>> = vec![Vec::new(); 2];
            for t in 0..steps {
                model.iter_mut().for_each(|tokens| tokens.push((t, 0.0)));
                let len = model[0].len();
                let given = Array2::from_shape_simple_fn((4, len), || next().abs());
                for (h, tokens) in model.iter_mut().enumerate() {
                    for (i, token) in tokens.iter_mut().enumerate() {
                        token.1 += given[[2 * h, i]] + given[[2 * h + 1, i]];
                    }
                }
                hitters.observe(given.view()).unwrap();
                let kept = hitters.evict();
                assert_eq!(kept.is_some(), len > heavy + recent);
                for (h, tokens) in model.iter_mut().enumerate() {
                    while tokens.len() > heavy + recent {
                        let before = tokens.len() - recent;
                        let least = (0..before).rev().min_by(|&a, &b| tokens[a].1.total_cmp(&tokens[b].1));
                        tokens.remove(least.unwrap());
                    }
                    let want: Vec<f32> = tokens.iter().map(|token| token.1).collect();
                    assert_eq!(hitters.received().row(h).to_vec(), want);
                    if heavy == 0 {
                        assert!(tokens.iter().all(|token| token.0 + recent > t));
                    }
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let snap = SnapKv { window: 8, capacity: 20, kernel: 4, pooling: Smoothing::Mean };
        let refusal = |snap: SnapKv| snap.keep(shares(4, 50).view(), 2).unwrap_err().to_string();
        assert_eq!(refusal(snap), "kernel: expected an odd number of neighbours, got 4");
        let narrow = SnapKv { capacity: 7, kernel: 5, ..snap };
        assert_eq!(refusal(narrow), "capacity: expected at least the window, 8, got 7");
        assert!(SnapKv { kernel: 5, ..snap }.keep(shares(4, 50).view(), 3).is_err());
        let mut hitters = HeavyHitters::new(2, 3, 3);
        hitters.observe(shares(4, 5).view()).unwrap();
        assert!(hitters.observe(shares(3, 6).view()).is_err());
        let text = hitters.observe(shares(4, 4).view()).unwrap_err().to_string();
        assert!(text.starts_with("received: expected shape [q_heads, len] = [_, at least 5]"), "{text}");
        assert_eq!(hitters.received().dim(), (2, 5));
    }
}
