//! Small dense linear algebra in `f64`, for what is computed once from the
//! weights of a model.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

/// Eigenvalues of a symmetric matrix, largest first, and their vectors, which
/// are the columns of an orthogonal matrix. The lower triangle is read.
///
/// Householder reflections to a tridiagonal matrix, then QL steps with implicit
/// shifts. Cost: about `6 n^3` flops.
pub(crate) fn eigen(matrix: ArrayView2<'_, f64>) -> (Array1<f64>, Array2<f64>) {
    let n = matrix.nrows();
    assert_eq!(n, matrix.ncols(), "symmetric matrices are square");
    let mut a = matrix.to_owned();
    for (i, j) in (0..n).flat_map(|i| (0..i).map(move |j| (i, j))) {
        a[[j, i]] = a[[i, j]];
    }
    // Rows of what becomes the transpose of the vectors.
    let mut rows = Array2::eye(n);
    for k in 0..n.saturating_sub(2) {
        let mut v = a.slice(s![k + 1.., k]).to_owned();
        let length = v.dot(&v).sqrt();
        v[0] += if v[0] < 0.0 { -length } else { length };
        let square = v.dot(&v);
        if square == 0.0 || !square.is_finite() {
            continue;
        }
        v /= square.sqrt();
        let mut below = a.slice_mut(s![k + 1.., ..]);
        let left = v.dot(&below);
        rank_one(&mut below, -2.0, &v, &left);
        let mut beside = a.slice_mut(s![.., k + 1..]);
        let right = beside.dot(&v);
        rank_one(&mut beside, -2.0, &right, &v);
        let mut turned = rows.slice_mut(s![k + 1.., ..]);
        let left = v.dot(&turned);
        rank_one(&mut turned, -2.0, &v, &left);
    }
    let mut values: Vec<f64> = (0..n).map(|i| a[[i, i]]).collect();
    // What lies beside the diagonal, and nothing at the end.
    let mut beside: Vec<f64> = (1..n).map(|i| a[[i, i - 1]]).chain([0.0]).collect();
    for first in 0..n {
        // Each value takes two or three steps; numbers that are not finite none.
        for _ in 0..64 {
            let negligible = |&m: &usize| {
                m + 1 == n || beside[m].abs() <= f64::EPSILON * (values[m].abs() + values[m + 1].abs())
            };
            let last = (first..n).find(negligible).unwrap_or(first);
            if last == first {
                break;
            }
            step(&mut values, &mut beside, &mut rows, first, last);
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    (order.iter().map(|&i| values[i]).collect(), rows.select(Axis(0), &order).reversed_axes())
}

/// `to += factor a b^T`
fn rank_one(to: &mut ndarray::ArrayViewMut2<'_, f64>, factor: f64, a: &Array1<f64>, b: &Array1<f64>) {
    for (mut row, a) in to.rows_mut().into_iter().zip(a) {
        row.scaled_add(factor * a, b);
    }
}

/// One QL step on rows `first..=last` of a tridiagonal matrix: the shift's
/// rotation at the end, and those that chase what it leaves up to the start.
fn step(values: &mut [f64], beside: &mut [f64], rows: &mut Array2<f64>, first: usize, last: usize) {
    // The eigenvalue of the leading two by two that is nearer to its corner.
    let half = (values[first + 1] - values[first]) / (2.0 * beside[first]);
    let root = half.hypot(1.0);
    let shift = values[first] - beside[first] / (half + if half < 0.0 { -root } else { root });
    let (mut sin, mut cos, mut moved) = (1.0, 1.0, 0.0);
    let mut g = values[last] - shift;
    for i in (first..last).rev() {
        let (f, b) = (sin * beside[i], cos * beside[i]);
        let r = f64::hypot(f, g);
        beside[i + 1] = r;
        if r == 0.0 {
            // The matrix falls apart here.
            values[i + 1] -= moved;
            beside[last] = 0.0;
            return;
        }
        (sin, cos) = (f / r, g / r);
        let lower = values[i + 1] - moved;
        let r = (values[i] - lower) * sin + 2.0 * cos * b;
        moved = sin * r;
        values[i + 1] = lower + moved;
        g = cos * r - b;
        let (mut upper, mut lower) = rows.multi_slice_mut((s![i, ..], s![i + 1, ..]));
        for (x, y) in upper.iter_mut().zip(lower.iter_mut()) {
            (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
        }
    }
    values[first] -= moved;
    beside[first] = g;
    beside[last] = 0.0;
}

/// A matrix `[m, n]` as the product of an orthonormal `[m, k]` and a `[k, n]`
/// with orthogonal rows, of as many columns as `rank` says of the singular
/// values: `U` and `S V^T`, cut off. With all of `m` the product is the matrix to
/// rounding, whatever its singular values are.
pub(crate) fn low_rank(
    matrix: ArrayView2<'_, f64>,
    rank: impl FnOnce(&[f64]) -> usize,
) -> (Array2<f64>, Array2<f64>) {
    let (squares, vectors) = eigen(matrix.dot(&matrix.t()).view());
    let singular: Vec<f64> = squares.iter().map(|square| square.max(0.0).sqrt()).collect();
    let kept = vectors.slice(s![.., ..rank(&singular).min(singular.len())]).to_owned();
    let rest = kept.t().dot(&matrix);
    (kept, rest)
}

/// The solution of `A x = b`, by elimination with the largest of a column first. Cost:
/// `2/3 n^3` flops.
pub(crate) fn solve(mut a: Array2<f64>, b: &[f64]) -> Vec<f64> {
    let (n, mut x) = (b.len(), b.to_vec());
    for col in 0..n {
        let larger =
            |best: usize, row: usize| if a[[row, col]].abs() > a[[best, col]].abs() { row } else { best };
        let best = (col + 1..n).fold(col, larger);
        for c in 0..n {
            a.swap([col, c], [best, c]);
        }
        x.swap(col, best);
        let (above, mut below) = a.view_mut().split_at(Axis(0), col + 1);
        let pivot = above.slice_move(s![col, col..]);
        for (row, mut below) in (col + 1..n).zip(below.outer_iter_mut()) {
            let factor = below[col] / pivot[0];
            below.slice_mut(s![col..]).scaled_add(-factor, &pivot);
            x[row] -= factor * x[col];
        }
    }
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n).map(|c| a[[row, c]] * x[c]).sum();
        x[row] = (x[row] - known) / a[[row, row]];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::random::Normal;

    fn random(m: usize, n: usize) -> Array2<f64> {
        let mut normal = Normal::new((m * 100 + n) as u64);
        Array2::from_shape_simple_fn((m, n), || normal.next().unwrap_or_default())
    }

    fn near(a: &Array2<f64>, b: &Array2<f64>, within: f64) {
        assert_eq!(a.dim(), b.dim());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= within));
    }

    #[test]
    fn vectors_are_orthonormal_and_give_the_matrix() {
        for n in [0, 1, 2, 3, 7, 20, 65] {
            let x = random(n, n);
            let low = random(n, n / 3);
            for a in [&x + &x.t(), x.dot(&x.t()), low.dot(&low.t()), Array2::eye(n), Array2::zeros((n, n))] {
                let (values, vectors) = eigen(a.view());
                assert!(values.windows(2).into_iter().all(|pair| pair[0] >= pair[1]));
                near(&vectors.t().dot(&vectors), &Array2::eye(n), 1e-12);
                near(&vectors.dot(&Array2::from_diag(&values)).dot(&vectors.t()), &a, 1e-11);
            }
        }
    }

    #[test]
    fn solutions_solve() {
        for n in [0, 1, 2, 9, 40] {
            // Without a pivot the first step would divide by 0.
            let mut a = random(n, n);
            a.iter_mut().take(1).for_each(|x| *x = 0.0);
            a.diag_mut().iter_mut().skip(1).for_each(|x| *x += 3.0);
            let a = if n == 1 { a + 2.0 } else { a };
            let b: Vec<f64> = Normal::new(9).take(n).collect();
            let x = Array1::from(solve(a.clone(), &b));
            assert!(a.dot(&x).iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-10), "{n}");
        }
    }

    /// Eckart-Young: what is cut off is the error.
    #[test]
    fn cut_off_singular_values_are_the_error() {
        for (m, n) in [(6, 6), (5, 12), (12, 5)] {
            let a = random(m, n);
            let (u, rest) = low_rank(a.view(), <[f64]>::len);
            near(&u.dot(&rest), &a, 1e-12);
            let mut dropped = 0.0;
            let (u, rest) = low_rank(a.view(), |singular| {
                dropped = singular[3..].iter().map(|x| x * x).sum::<f64>();
                3
            });
            near(&u.t().dot(&u), &Array2::eye(3), 1e-12);
            let error = (&u.dot(&rest) - &a).mapv(|x| x * x).sum();
            assert!((error - dropped).abs() < 1e-10 * dropped.max(1.0), "{error} for {dropped}");
        }
    }
}
