//! DARE: an entry of the catalogue that is [`TopK`], whose docs say how.

use crate::card::exhibit;
use crate::input::Qkv;
use crate::sparse::TopK;

exhibit! {
    DareExhibit of TopK, "dense", "DARE", "arXiv 2410.02604";
    "targets read the 20 of a user's behaviours that score highest, by embeddings of their own";
    not "where embeddings that score may be those that are read: there is one table less";
    tokens false;
    build(_, _) { TopK::builder(20) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close};
    use ndarray::{Array4, Axis, concatenate, s};

    /// A user's 90 behaviours for 7 targets, with embeddings of 4 that score and of 24
    /// that are read.
    fn behaviours() -> Qkvs {
        Qkvs::new([2, 1, 1, 7, 90, 4, 24], 1)
    }

    #[test]
    fn all_behaviours_are_target_attention() {
        let (x, dense) = (behaviours(), Dense::builder().build().unwrap());
        let lengths = [90, 13];
        for x in [x.qkv(), x.qkv().key_lengths(&lengths)] {
            let all = TopK::builder(90).build().unwrap();
            close(&all.reference(x).unwrap(), &dense.reference(x).unwrap(), 1e-12);
        }
        // Fewer than there may be: the others are not in their place.
        let few = TopK::builder(20).build().unwrap().reference(x.qkv().key_lengths(&lengths)).unwrap();
        let want = dense.reference(x.qkv().key_lengths(&lengths)).unwrap();
        close(&few.slice_move(s![1.., .., .., ..]), &want.slice_move(s![1.., .., .., ..]), 1e-12);
    }

    /// Parts of embeddings that are scored apart (of items and of times) are one dot
    /// product of what has been scaled.
    #[test]
    fn parts_are_scored_apart() {
        let (items, times) = (behaviours(), Qkvs::new([2, 1, 1, 7, 90, 9, 24], 2));
        let beside = |a: &Array4<f32>, b: &Array4<f32>| concatenate(Axis(3), &[a.view(), b.view()]).unwrap();
        let q = beside(&(&items.q / 2.0), &(&times.q / 3.0));
        let k = beside(&items.k, &times.k);
        let top = TopK::builder(5).scale(1.0).build().unwrap();
        let out = top.reference(Qkv::new(q.view(), k.view(), items.v.view())).unwrap();
        let dot = |x: &Qkvs, b: usize, i: usize, j: usize| -> f64 {
            let terms =
                x.q.slice(s![b, 0, i, ..]).mapv(f64::from) * x.k.slice(s![b, 0, j, ..]).mapv(f64::from);
            terms.sum() / (x.q.dim().3 as f64).sqrt()
        };
        for (b, i) in ndarray::indices((2, 7)) {
            let mut scored: Vec<(f64, usize)> =
                (0..90).map(|j| (dot(&items, b, i, j) + dot(&times, b, i, j), j)).collect();
            scored.sort_by(|a, b| b.0.total_cmp(&a.0));
            let total: f64 = scored[..5].iter().map(|x| x.0.exp()).sum();
            for c in 0..24 {
                let read = |x: &(f64, usize)| x.0.exp() / total * f64::from(items.v[[b, 0, x.1, c]]);
                assert!((out[[b, 0, i, c]] - scored[..5].iter().map(read).sum::<f64>()).abs() < 1e-6);
            }
        }
    }
}
