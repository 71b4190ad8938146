//! PaTH attention: the position of a key is what the tokens between it and the query do
//! to it.

use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut4};

use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::Tokens;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::reflect::{self, Advance, Reflected};

input! {
    /// Queries, keys and values with what tokens do to the keys before them: what
    /// [`Path`] takes.
    PathInput {
        /// Queries.
        q: T [batch, heads/, len, head_dim],
        /// Keys.
        k: T [batch, heads/, len, head_dim],
        /// Values.
        v: T [batch, heads/, len, value_dim],
        /// Directions, of length 1.
        w: T [batch, heads/, len, head_dim],
        /// How much of a direction a token takes off: from 0 to 2, which reflects.
        beta: f32 [batch, heads/, len];
        /// Log gates: finite, and at most 0.
        gated by log_gate: f32 [batch, heads/, len]
    }
    head_dim head_dim, value_dim value_dim;
}

/// PaTH attention: the position of a key is what the tokens between it and the query do
/// to it.
///
/// ```text
/// H_t  = I - beta_t w_t w_t^T
/// s_ij = scale * (q_i^T H_i H_{i-1} .. H_{j+1} k_j + g_{j+1} + .. + g_i)       j <= i
/// o_i  = sum_j softmax_j(s_ij) v_j
/// ```
///
/// "PaTH Attention: Position Encoding via Accumulating Householder Transformations" (arXiv
/// 2505.16381). `w` have length 1, and `beta` is `2 sigmoid` of a projection: `H` turns, and
/// never lets anything grow. `g` are log gates of at most 0, if there are any, in the released
/// code's place: they are scaled with the scores, where those of
/// [`Forget`](crate::score::Forget) are not. With `beta` 0 it is causal
/// [`Dense`](super::Dense) attention without positions.
///
/// The kernel takes queries through chunks of 64 tokens, last ones first, whose maps are
/// `I + W^T N`: see the docs of its [error bound](crate::Bounded::error_bound) below.
///
/// To decode, a new token's map goes over all keys that are cached,
/// [`Path::advance`], whose scores with the new query are then those of
/// [`Dense`](super::Dense). Keys depend on the tokens after them, so that no two sequences share
/// a cached prefix.
///
/// Cost: about twice causal [`Dense`](super::Dense): `6 head_dim + 2 value_dim` flops a
/// pair, and `64 (5 head_dim + 64)` a token.
///
/// # Error bound
///
/// Scores are off by at most `2^-24 * (2 head_dim + 128 + 16 (i - j)) * scale |q| |k|`, times what
/// maps let grow where a `w` is longer than 1 or a `beta` above 2; their softmax has the error of any.
///
/// ```
/// use attention_kernels::{Attention, dense::{Path, PathInput}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let mut w = x.clone();
/// w.rows_mut().into_iter().for_each(|mut w| w /= w.dot(&w).sqrt().max(1e-6));
/// let beta = Array3::from_elem((1, 2, 100), 0.8);
///
/// let input = PathInput::new(x.view(), x.view(), x.view(), w.view(), beta.view());
/// let out = Path::builder().build()?.forward(input)?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Path {
    config: Config,
}

impl Path {
    /// As the paper has it.
    pub fn builder() -> PathBuilder {
        PathBuilder::with()
    }

    /// Takes the cached keys of a decode step, `[batch, kv_heads, len, head_dim]` one after
    /// the other, through the new token's map: directions `[batch, kv_heads, head_dim]` and
    /// `beta` `[batch, kv_heads]`. The new token's own key comes after that.
    ///
    /// # Errors
    /// [`Error::Shape`] for arrays of other sizes, [`Error::Value`] for keys of other
    /// strides.
    pub fn advance(
        &self,
        mut keys: ArrayViewMut4<'_, f32>,
        w: ArrayView3<'_, f32>,
        beta: ArrayView2<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (batch, heads, len, dim) = keys.dim();
        if w.dim() != (batch, heads, dim) {
            let expected = format!("[batch, kv_heads, head_dim] = [{batch}, {heads}, {dim}]");
            return Err(Error::shape("w", expected, w.shape()));
        }
        if beta.dim() != (batch, heads) {
            return Err(Error::shape(
                "beta",
                format!("[batch, kv_heads] = [{batch}, {heads}]"),
                beta.shape(),
            ));
        }
        let strides = format!("{:?}", keys.strides());
        let Some(keys) = keys.as_slice_mut() else {
            return Err(Error::value("keys", "an array of standard layout", strides));
        };
        let (units, words) = (batch * heads, claim_words(batch * heads));
        let mut arena = workspace.arena(bytes_for::<u64>(words) + bytes_for::<f32>(units * dim))?;
        let (claims, rows) = (arena.take::<u64>(words), arena.take::<f32>(units * dim));
        rows.iter_mut().zip(&w).for_each(|(to, &w)| *to = w);
        let (rows, keys) = (&*rows, Parts::new(keys, (len * dim).max(1), claims));
        parallel::for_each(
            parallel::threads(),
            if len * dim > 0 { units } else { 0 },
            |_| (),
            |(), unit| {
                let (w, beta) = (&rows[unit * dim..][..dim], beta[[unit / heads, unit % heads]]);
                self.config.isa.dispatch(Advance { keys: keys.take(unit), w, beta });
            },
        );
        Ok(())
    }
}

options! {
    /// Builds a [`Path`].
    PathBuilder of Path, isa scale "1 / sqrt(head_dim)";
    build(this, config) {
        Ok(Path { config })
    }
}

impl Path {
    fn dims<T: Element>(&self, x: &PathInput<'_, T>) -> Result<Dims> {
        let dims = x.token_dims()?;
        let offender = |gate: &ArrayView3<'_, f32>| gate.iter().copied().find(|g| !g.is_finite() || *g > 0.0);
        match x.log_gate.as_ref().and_then(offender) {
            Some(gate) => Err(Error::value("log_gate", "finite log gates of at most 0", gate)),
            None => Ok(dims),
        }
    }
}

impl<T: Element> Pipeline<PathInput<'_, T>> for Path {
    type State = ();

    fn flow(
        &self,
        x: PathInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.dims(&x)?;
        let any = |x| T::any(Heads::new(x));
        let reflected = Reflected {
            q: any(x.q),
            k: any(x.k),
            v: any(x.v),
            w: any(x.w),
            beta: x.beta,
            gate: x.log_gate,
            dims,
            lengths: x.lengths,
            scale: self.config.scale(&dims) as f32,
        };
        reflect::attend(pass, self.config.isa, &reflected, out)
    }

    fn define<R: Real>(&self, x: PathInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.dims(&x)?;
        let scale = f64::from(self.config.scale(&dims) as f32);
        let out = of_heads(&dims, &x.lengths, |head| {
            let rows = |x| head.rows::<f64, T>(x, &head.keys);
            let (q, k, w, v) = (rows(&x.q), rows(&x.k), rows(&x.w), head.rows::<R, T>(&x.v, &head.keys));
            let number = |x: &ArrayView3<'_, f32>, t: usize| {
                f64::from(x[[head.batch, head.of(x.dim().1), head.keys.start + t]])
            };
            let length = |x: ndarray::ArrayView1<'_, f64>| x.dot(&x).sqrt();
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let mut y = q.row(i).to_owned();
                // What the maps may let grow, and the sum of the gates.
                let (mut grown, mut gates) = (1f64, 0f64);
                let mut scores = Vec::new();
                for j in (0..=i).rev() {
                    let size = scale.abs() * length(q.row(i)) * length(k.row(j)) * grown;
                    let terms = 2 * dims.head_dim + 128 + 16 * (i - j);
                    // What is not known to be in the range of f32 has no bound.
                    let off = if size < 1e36 { size * terms as f64 } else { f64::INFINITY };
                    let off = R::rounded(1.0, off) - R::of(1.0);
                    scores.push(R::of(scale * y.dot(&k.row(j))) + off + R::rounded(scale * gates, 8.0));
                    let (w, beta) = (w.row(j), number(&x.beta, j));
                    let along = beta * y.dot(&w);
                    y.scaled_add(-along, &w);
                    grown *= (1.0 - beta * w.dot(&w)).abs().max(1.0);
                    gates += x.log_gate.as_ref().map_or(0.0, |gate| number(gate, j));
                }
                scores.reverse();
                let weights = softmax(&scores);
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().copied().zip(v.column(c).iter().copied()));
                }
            }
            out
        });
        Ok((out, ()))
    }
}

composite!(Path, PathInput);

exhibit! {
    PathExhibit of Path, "dense", "PaTH", "arXiv 2505.16381";
    "each token turns the keys before it, which is where these are for a query";
    not "where rotations by position alone will do: they cost half, and cached keys stay as they are";
    tokens true;
    build(_, _) { Path::builder() }
    extras(x, field) {
        let (batch, heads, len, dim) = x.q.dim();
        let norm = |h, t| (0..dim).map(|c| field.at(3, h, t, c).powi(2)).sum::<f32>().sqrt().max(1e-6);
        let keys = ndarray::Array4::from_shape_fn((batch, heads, len, dim), |(_, h, t, c)| {
            T::from_f32(field.at(3, h, t, c) / norm(h, t))
        });
        Extras { decays: field.token_decays(x), betas: field.tokens(2, x, |x| 1.0 + x), keys, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> PathInput<'a, T> {
        let input = PathInput::new(x.q, x.k, x.v, extras.keys.view(), extras.betas.view());
        PathInput { lengths: x.lengths, ..input.gated(extras.decays.view()) }
    }
}
carded!(Path, PathExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::input::Qkv;
    use crate::mask::Causal;
    use crate::testing::{agree, array, keeps, unit};
    use crate::{Attention, simd::Isa};
    use ndarray::{Array3, Array4, s};

    fn betas(heads: usize, len: usize) -> Array3<f32> {
        Array3::from_shape_fn((1, heads, len), |(_, h, t)| 1.0 + ((3 * h + t) as f32).sin())
    }

    #[test]
    fn definition_is_the_products_of_all_maps() {
        let [q, k, v] = [1, 2, 3].map(|seed| array([1, 2, 11, 5], seed));
        let (w, beta) = (unit(array([1, 2, 11, 5], 4)), betas(2, 11));
        let x = PathInput::new(q.view(), k.view(), v.view(), w.view(), beta.view());
        let got = Path::builder().scale(0.7).build().unwrap().reference(x).unwrap();
        let exact = |x: &Array4<f32>, h: usize, t: usize| -> ndarray::Array1<f64> {
            x.slice(s![0, h, t, ..]).mapv(f64::from)
        };
        let want = Array4::from_shape_fn((1, 2, 11, 5), |(_, h, i, c)| {
            let weight = |j: usize| {
                let mut map = Array2::<f64>::eye(5);
                for t in j + 1..=i {
                    let w: Array2<f64> = exact(&w, h, t).insert_axis(ndarray::Axis(1));
                    map = (Array2::eye(5) - w.dot(&w.t()) * f64::from(beta[[0, h, t]])).dot(&map);
                }
                let key: ndarray::Array1<f64> = map.dot(&exact(&k, h, j));
                (f64::from(0.7f32) * exact(&q, h, i).dot(&key)).exp()
            };
            let sum: f64 = (0..=i).map(weight).sum();
            (0..=i).map(|j| weight(j) / sum * f64::from(v[[0, h, j, c]])).sum()
        });
        agree(&got, &want);
    }

    #[test]
    fn without_maps_it_is_dense_and_turning_everything_changes_nothing() {
        let [q, k, v] = [1, 2, 3].map(|seed| array([1, 2, 70, 4], seed));
        let (w, none) = (unit(array([1, 2, 70, 4], 4)), Array3::zeros((1, 2, 70)));
        let path = Path::builder().build().unwrap();
        let x = PathInput::new(q.view(), k.view(), v.view(), w.view(), none.view());
        let dense = Dense::builder().causal().build().unwrap();
        agree(&path.reference(x).unwrap(), &dense.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap());
        let beta = betas(2, 70);
        let x = PathInput { beta: beta.view(), ..x };
        // Channels in another order, of other signs.
        let turn = |x: &Array4<f32>| {
            Array4::from_shape_fn(x.dim(), |(b, h, t, c)| {
                x[[b, h, t, (c + 1) % 4]] * if c == 2 { -1.0 } else { 1.0 }
            })
        };
        let [tq, tk, tw] = [&q, &k, &w].map(turn);
        let turned = PathInput { q: tq.view(), k: tk.view(), w: tw.view(), ..x };
        agree(&path.reference(turned).unwrap(), &path.reference(x).unwrap());
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        for [heads, kv_heads, len, dim, value_dim] in
            [[4, 2, 200, 16, 20], [2, 1, 64, 33, 5], [1, 1, 65, 64, 64], [2, 2, 3, 1, 1], [1, 1, 130, 0, 3]]
        {
            let x = |heads, dim, seed| array([1, heads, len, dim], seed);
            let (q, k, v) = (x(heads, dim, 1), x(kv_heads, dim, 2), x(kv_heads, value_dim, 3));
            let (w, beta) = (unit(x(kv_heads, dim, 4)), betas(kv_heads, len));
            let gates =
                Array3::from_shape_fn((1, heads, len), |(_, h, t)| -0.2 * ((h + t) as f32).cos().abs());
            let plain = PathInput::new(q.view(), k.view(), v.view(), w.view(), beta.view());
            for isa in Isa::available() {
                for scale in [1.0, -3.0] {
                    let path = Path::builder().isa(isa).scale(scale).build().unwrap();
                    for x in [plain, plain.gated(gates.view())] {
                        let share = keeps("path", &path, x);
                        println!("{isa} {heads}/{kv_heads} {len} {dim}: {share:.3} of the bound");
                    }
                }
            }
        }
    }

    /// What a later token has in it does not show, nor the map of the first.
    #[test]
    fn nan_shows_from_its_token_on() {
        let [q, k, v] = [1, 2, 3].map(|seed| array([1, 1, 90, 16], seed));
        let (w, beta) = (unit(array([1, 1, 90, 16], 4)), betas(1, 90));
        let path = Path::builder().build().unwrap();
        for (t, which) in [(0, 2), (40, 0), (40, 1), (40, 2), (70, 0), (70, 1), (70, 2)] {
            let mut arrays = [k.clone(), v.clone(), w.clone()];
            arrays[which].slice_mut(s![.., .., t, ..]).fill(f32::NAN);
            let [k, v, w] = &arrays;
            let x = PathInput::new(q.view(), k.view(), v.view(), w.view(), beta.view());
            let (out, want) = (path.forward(x).unwrap(), path.reference(x).unwrap());
            assert!(want.iter().zip(&out).all(|(a, b)| a.is_nan() == b.is_nan()), "{which} of {t}");
            assert_eq!(out.slice(s![.., .., 89, ..]).iter().all(|x| x.is_nan()), t > 0);
            assert!(out.slice(s![.., .., ..t, ..]).iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn cached_keys_go_along() {
        let [q, k, v] = [1, 2, 3].map(|seed| array([1, 2, 80, 8], seed));
        let (w, beta) = (unit(array([1, 2, 80, 8], 4)), betas(2, 80));
        let path = Path::builder().build().unwrap();
        let want =
            path.reference(PathInput::new(q.view(), k.view(), v.view(), w.view(), beta.view())).unwrap();
        let dense = Dense::builder().mask(Causal::default()).build().unwrap();
        let (mut cache, mut workspace) = (Array4::zeros((1, 2, 0, 8)), Workspace::new());
        for t in 0..80 {
            let (w, beta) = (w.slice(s![.., .., t, ..]), beta.slice(s![.., .., t]));
            path.advance(cache.view_mut(), w, beta, &mut workspace).unwrap();
            let token = s![.., .., t..t + 1, ..];
            cache = ndarray::concatenate(ndarray::Axis(2), &[cache.view(), k.slice(token)]).unwrap();
            cache = cache.as_standard_layout().into_owned();
            let x = Qkv::new(q.slice(token), cache.view(), v.slice(s![.., .., ..t + 1, ..]));
            let got = dense.forward(x).unwrap();
            assert!(got.iter().zip(want.slice(token)).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5), "{t}");
        }
        let one = Array3::zeros((1, 2, 7));
        let error = path.advance(cache.view_mut(), one.view(), Array2::zeros((1, 2)).view(), &mut workspace);
        assert_eq!(
            error.unwrap_err().to_string(),
            "w: expected shape [batch, kv_heads, head_dim] = [1, 2, 8], got [1, 2, 7]"
        );
    }

    #[test]
    fn gates_are_finite_and_shut_nothing_wider() {
        let x = array([1, 2, 6, 8], 1);
        let (beta, gates) = (betas(2, 6), Array3::from_elem((1, 2, 6), 0.5));
        let input = PathInput::new(x.view(), x.view(), x.view(), x.view(), beta.view()).gated(gates.view());
        let error = Path::builder().build().unwrap().forward(input).unwrap_err().to_string();
        assert_eq!(error, "log_gate: expected finite log gates of at most 0, got 0.5");
    }
}
