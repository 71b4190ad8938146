//! Additive attention: scores of a small network instead of dot products. Its
//! weights are what pointer networks point with.

use ndarray::{Array2, Array3, ArrayView2, ArrayView3};

use crate::card::{carded, exhibit};
use crate::definition::attend::weighed;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::simd::Simd;
use crate::simd::exp::tanh;
use crate::stages::options::{FINITE, POSITIVE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole::{self, RowFn, load_or};

/// Additive attention: scores of a small network instead of dot products. Its
/// weights are what pointer networks point with.
///
/// ```text
/// u_ij = sum_c w_c tanh(q_ic + k_jc),   or clip tanh of it
/// p_ij = softmax_j(u_ij),   o_i = sum_j p_ij v_j
/// ```
///
/// "Neural Machine Translation by Jointly Learning to Align and Translate" (arXiv
/// 1409.0473) has `o`, its glimpse; "Pointer Networks" (arXiv 1506.03134) points
/// with `p`, for which values are unit vectors. `q = W_2 d` and `k = W_1 e` of
/// decoder and encoder states are the caller's. Models that must not point twice mask
/// what they have visited; "Neural Combinatorial Optimization" (arXiv 1611.09940) clips.
///
/// Cost: `head_dim` hyperbolic tangents a pair, about 20 flops each; a thread holds
/// the scores of 48 queries with all keys.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Additive};
/// use ndarray::{Array2, Array4};
///
/// let x = Array4::from_shape_fn((1, 1, 5, 16), |(_, _, i, c)| ((i * (c + 3)) as f32).sin());
/// // Values that are unit vectors: where each query points.
/// let each = Array4::from_shape_fn((1, 1, 5, 5), |(_, _, j, c)| f32::from(j == c));
/// let pointer = Additive::builder(Array2::ones((1, 16)).view()).build()?;
/// let p = pointer.forward(Qkv::new(x.view(), x.view(), each.view()))?;
/// assert!(p.rows().into_iter().all(|row| (row.sum() - 1.0).abs() < 1e-6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Additive {
    config: Config,
    /// `[heads | 1, head_dim]`
    weights: Array2<f32>,
    clip: Option<f32>,
    visited: Option<Array3<bool>>,
}

impl Additive {
    /// `w`, `[q_heads | 1, head_dim]`.
    pub fn builder(weights: ArrayView2<'_, f32>) -> AdditiveBuilder {
        AdditiveBuilder::with(weights.as_standard_layout().into_owned())
    }
}

options! {
    /// Builds an [`Additive`].
    AdditiveBuilder of Additive, isa;
    given { weights: Array2<f32>, in FINITE; }
    own {
        clip: Option<f32> = None, in POSITIVE;
        visited: Option<Array3<bool>> = None;
    }
    build(this, config) {
        Ok(Additive { config, weights: this.weights, clip: this.clip, visited: this.visited })
    }
}

impl AdditiveBuilder {
    /// Scores become `clip` times their hyperbolic tangent. Default: they stay.
    pub fn clip(self, clip: f32) -> Self {
        Self { clip: Some(clip), ..self }
    }

    /// Hides keys where it is true: `[batch | 1, q_len | 1, kv_len]`. Not for
    /// packed batches.
    pub fn visited(self, visited: ArrayView3<'_, bool>) -> Self {
        Self { visited: Some(visited.as_standard_layout().into_owned()), ..self }
    }
}

impl Additive {
    fn checked<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = whole::checked(x.dims()?)?;
        let (heads, dim) = self.weights.dim();
        if !([1, dims.q_heads].contains(&heads) && dim == dims.head_dim) {
            let expected = format!("[q_heads | 1, head_dim] = [{} | 1, {}]", dims.q_heads, dims.head_dim);
            return Err(Error::shape("weights", expected, &[heads, dim]));
        }
        let Some(visited) = &self.visited else { return Ok(dims) };
        if dims.packed {
            return Err(Error::packed("visited keys"));
        }
        let (batch, queries, keys) = visited.dim();
        if [1, dims.batch].contains(&batch) && [1, dims.q_len].contains(&queries) && keys == dims.kv_len {
            return Ok(dims);
        }
        let (batch, q_len, kv_len) = (dims.batch, dims.q_len, dims.kv_len);
        let expected = format!("[batch | 1, q_len | 1, kv_len] = [{batch} | 1, {q_len} | 1, {kv_len}]");
        Err(Error::shape("visited", expected, visited.shape()))
    }

    #[inline(always)]
    fn weight(&self, head: usize, element: usize) -> f32 {
        self.weights[[if self.weights.dim().0 == 1 { 0 } else { head }, element]]
    }

    /// Which of a sequence's keys are hidden from a query; none are left out.
    #[inline(always)]
    fn visited(&self, sequence: usize, query: usize) -> &[bool] {
        let Some(visited) = &self.visited else { return &[] };
        let (batch, queries, keys) = visited.dim();
        let row = if batch == 1 { 0 } else { sequence } * queries + if queries == 1 { 0 } else { query };
        &visited.as_slice().unwrap_or_default()[row * keys..][..keys]
    }
}

impl RowFn for Additive {
    const PAIRS: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, head: usize, element: usize, q: S::F, k: S::F) -> S::F {
        s.mul(s.splat(self.weight(head, element)), tanh(s, s.add(q, k)))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], _: &mut [f32]) {
        if let Some(clip) = self.clip {
            for x in row.chunks_mut(S::LANES) {
                let clipped = s.mul(s.splat(clip), tanh(s, load_or(s, x, 0.0)));
                s.store_tail(x, clipped);
            }
        }
        for (score, &visited) in row.iter_mut().zip(self.visited(site.batch, query)) {
            *score = if visited { f32::NEG_INFINITY } else { *score };
        }
        whole::softmax(s, row);
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Additive {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.checked(&x)?;
        whole::run(pass, self.config.isa, (x, &dims), 1.0, self, None, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.checked(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let score = |j: usize| {
                    let weight = |c| R::of(f64::from(self.weight(head.head, c)));
                    let score = R::dot((0..q.dim().1).map(|c| (weight(c), (q[[i, c]] + k[[j, c]]).tanh())));
                    self.clip.map_or(score, |clip| R::of(f64::from(clip)) * score.tanh())
                };
                let visited = self.visited(head.sequence, i);
                let open = (0..k.dim().0).filter(|&j| visited.get(j) != Some(&true));
                let weights = weighed(open.map(|j| (j, score(j))));
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
                }
            }
            out
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        size_of::<f32>() * self.weights.len() + self.visited.as_ref().map_or(0, |visited| visited.len())
    }
}

composite!(Additive, Qkv);

exhibit! {
    AdditiveExhibit of Additive, "dense", "additive", "arXiv 1409.0473, 1506.03134";
    "scores of a small network; of pointer networks the weights are the output";
    not "where dot products will do: a hyperbolic tangent an element costs ten times as much";
    tokens false;
    build(x, field) { Additive::builder(field.heads(1, x).view()) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Additive, AdditiveExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held, refused};
    use ndarray::{Array4, s};

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len, dim) in [(1, 1, 5), (50, 70, 12), (3, 0, 4), (2, 9, 0)] {
            let x = Qkvs::new([2, 2, 1, q_len, kv_len, dim, 17], 1);
            let additive = Additive::builder(array(2, (2, dim)).view());
            let visited = Array3::from_shape_fn((2, q_len, kv_len), |(b, i, j)| (b + i + j) % 3 == 1);
            for additive in [additive.clone(), additive.clip(2.0).visited(visited.view())] {
                worst = worst.max(held(&additive.build().unwrap(), x.qkv()));
            }
        }
        println!("additive: {worst:.3} of the bound");
    }

    #[test]
    fn weights_of_zeros_are_a_mean_and_what_is_visited_takes_none() {
        let x = Qkvs::new([1, 1, 1, 4, 6, 8, 3], 2);
        let mean = x.v.mapv(f64::from).mean_axis(ndarray::Axis(2)).unwrap().insert_axis(ndarray::Axis(2));
        let builder = Additive::builder(Array2::zeros((1, 8)).view());
        let out = builder.clone().build().unwrap().reference(x.qkv()).unwrap();
        close(&out, &mean.broadcast(out.dim()).unwrap().to_owned(), 1e-12);
        // The last two keys visited: as if they were not there.
        let visited = Array3::from_shape_fn((1, 1, 6), |(_, _, j)| j > 3);
        let w = array(3, (1, 8));
        let hides = Additive::builder(w.view()).visited(visited.view()).build().unwrap();
        let few = x.slice(0..4, 0..4);
        let want = Additive::builder(w.view()).build().unwrap().reference(few.qkv()).unwrap();
        close(&hides.reference(x.qkv()).unwrap(), &want, 1e-12);
        // Where all are, there is nothing.
        let all = builder.visited(Array3::from_elem((1, 1, 6), true).view()).build().unwrap();
        assert!(all.forward(x.qkv()).unwrap().iter().all(|&x| x == 0.0));
    }

    /// Turning all of it around turns scores around.
    #[test]
    fn the_tangent_is_odd() {
        let x = Qkvs::new([1, 1, 1, 4, 6, 8, 3], 4);
        let (w, minus) = (array(3, (1, 8)), |x: &Array4<f32>| x.mapv(|x| -x));
        let turned = Qkvs { q: minus(&x.q), k: minus(&x.k), v: x.v.clone() };
        let of = |w: &Array2<f32>, x: &Qkvs| {
            Additive::builder(w.view()).build().unwrap().reference(x.qkv()).unwrap()
        };
        close(&of(&w, &x), &of(&w.mapv(|w| -w), &turned), 1e-12);
    }

    #[test]
    fn refusals() {
        let x = Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8);
        let weights = array(1, (2, 8));
        let short = Additive::builder(weights.slice(s![.., ..7])).build().unwrap();
        let want = "weights: expected shape [q_heads | 1, head_dim] = [2 | 1, 8], got [2, 7]";
        assert_eq!(refused(&short, x.qkv()), want);
        let visited = Array3::from_elem((1, 2, 3), false);
        let wrong = Additive::builder(weights.view()).visited(visited.view()).build().unwrap();
        let want =
            "visited: expected shape [batch | 1, q_len | 1, kv_len] = [1 | 1, 3 | 1, 3], got [1, 2, 3]";
        assert_eq!(refused(&wrong, x.qkv()), want);
    }
}
