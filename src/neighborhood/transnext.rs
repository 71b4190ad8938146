//! Aggregated attention (TransNeXt): a window around each pixel and pooled
//! tokens in one softmax, with cosine scores.

use std::marker::PhantomData;
use std::sync::Arc;

use ndarray::{Array1, Array2, Array3, Axis, Ix2, s};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::laid::Laid;
use crate::input::{Dims, Input, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::mask::beside::Beside;
use crate::mask::grid::Local;
use crate::score::grid::{Offsets, OffsetsBeside};
use crate::stages::attend::Options;
use crate::stages::dynamic::Dynamic;
use crate::stages::grid::{OnGrid, image, orders};
use crate::stages::lay::Lay;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::project::Project;

input! {
    /// Queries, keys and values of pixels, with pooled keys and values.
    TransNextInput(qkv) {
        /// Pooled keys.
        pooled_k: T [batch, heads/, pooled, head_dim],
        /// Pooled values.
        pooled_v: T [batch, heads/, pooled, value_dim],
    }
}

/// Aggregated attention (TransNeXt): a window around each pixel and pooled
/// tokens in one softmax, with cosine scores.
///
/// ```text
/// p_i  = (q_i / |q_i| + e_h) softplus(t_h) ln(L_i + P)
/// s_ij = p_i . k_j / |k_j| + local[h, m]           for the pixel j that is neighbor m of i
/// s_ic = p_i . k_c / |k_c| + pooled[h, i, c]       for the P pooled tokens c
/// o_i  = sum softmax(s_i) v + sum_m (q_i / |q_i| . T[h, :, m] + b[h, m]) v_j
/// ```
///
/// `L_i` is how many pixels the window of `i` has: it is cut at the borders.
/// Pooled keys and values are given; the bias of a pooled token comes from
/// coordinates through a small network of the model ([`coordinates`]). "TransNeXt:
/// Robust Foveal Visual Perception for Vision Transformers" (arXiv 2311.17132),
/// and its code.
///
/// Cost: `2 (head_dim + value_dim) (w^2 + P)` flops a query, and as many for the
/// `w^2` again where there are learnable tokens.
///
/// [`coordinates`]: TransNext::coordinates
///
/// A window and pooled tokens.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::{TransNext, TransNextInput}};
/// use ndarray::Array4;
///
/// let (x, pooled) = (Array4::<f32>::ones((1, 2, 14 * 14, 24)), Array4::<f32>::ones((1, 2, 49, 24)));
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let next = TransNext::builder([14, 14], 49).build()?;
/// let out = next.forward(TransNextInput::new(qkv, pooled.view(), pooled.view()))?;
/// assert_eq!(out.dim(), (1, 2, 196, 24));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TransNext {
    on_grid: OnGrid<OffsetsBeside, Beside<Local>>,
    shape: [usize; 2],
    pooled: usize,
    around: Dynamic,
    /// `softplus(t_h)`; empty for the default.
    temperatures: Vec<f32>,
    /// `ln(L_i + P)`
    logs: Vec<f32>,
    embedding: Option<Laid<Ix2>>,
    local: Option<Array2<f32>>,
    beside: Option<Array3<f32>>,
    learnable: Option<(Array3<f32>, Laid<Ix2>)>,
}

impl TransNext {
    /// Windows of 3 x 3 pixels of an image of `shape`, height and width, and so
    /// many pooled tokens.
    pub fn builder(shape: [usize; 2], pooled: usize) -> TransNextBuilder {
        TransNextBuilder::with(shape, pooled)
    }

    /// What the network that gives the biases of pooled tokens is given, `[height
    /// * width, pooled height * width, 2]`: with the distance `d` of a pixel from
    /// the middle of a pooled cell in pixels of an image of the training's
    /// `pretrained` size, `sign(d) log2(8 |d| / (pretrained - 1) + 1) / 3`.
    pub fn coordinates(shape: [usize; 2], pooled: [usize; 2], pretrained: [usize; 2]) -> Array3<f32> {
        let [pixels, cells] = [shape, pooled].map(|shape| shape[0] * shape[1]);
        Array3::from_shape_fn((pixels, cells, 2), |(pixel, cell, axis)| {
            let at = |token: usize, wide: usize| [token / wide, token % wide][axis];
            // The mean of the pixels of an adaptive average.
            let (i, n, size) = (at(cell, pooled[1]), pooled[axis], shape[axis]);
            let (start, end) = (i * size / n, ((i + 1) * size).div_ceil(n));
            let middle = (start + end - 1) as f64 / 2.0;
            let d = (at(pixel, shape[1]) as f64 - middle) * 8.0 / (pretrained[axis] as f64 - 1.0);
            (d.signum() * (d.abs() + 1.0).log2() / 3.0) as f32
        })
    }
}

/// `softplus(t)` of the `t` that models start with.
const START: f32 = 1.0 / 0.24;

options! {
    /// Builds a [`TransNext`].
    TransNextBuilder of TransNext, isa;
    given { shape: [usize; 2]; pooled: usize; }
    own {
        window: usize = 3;
        temperatures: Option<Array1<f32>> = None, in FINITE;
        embedding: Option<Array2<f32>> = None;
        local: Option<Array2<f32>> = None;
        beside: Option<Array3<f32>> = None;
        learnable: Option<(Array3<f32>, Array2<f32>)> = None;
    }
    build(builder, config) {
        let TransNextBuilder { shape, pooled, window, temperatures, embedding, local, beside, learnable, .. } = builder;
        let grid = Grid::new(&shape)?;
        let (n, half, cells) = (grid.len(), window / 2, window.saturating_mul(window));
        if window.is_multiple_of(2) || u32::try_from(cells).is_err() {
            return Err(Error::value("window", "an odd number of pixels", window));
        }
        if u32::try_from(n.saturating_add(pooled)).is_err() {
            return Err(Error::value("pooled", "fewer than 2^32 keys with the image", pooled));
        }
        let own = |argument: &'static str, shape: &[usize], expected: &[usize]| {
            if shape.get(1..) == Some(expected) {
                return Ok(());
            }
            Err(Error::shape(argument, format!("[heads, ..] and then {expected:?}"), shape))
        };
        local.as_ref().map_or(Ok(()), |x| own("local", x.shape(), &[cells]))?;
        beside.as_ref().map_or(Ok(()), |x| own("beside", x.shape(), &[n, pooled]))?;
        if let Some((tokens, bias)) = &learnable {
            own("learnable", tokens.shape(), &[tokens.dim().1, cells])?;
            own("learnable", bias.shape(), &[cells])?;
        }
        let [queries, keys] = orders(grid, [1; AXES]);
        let offsets = |x: &Array2<f32>| {
            let by_place = x.to_shape((x.dim().0, window, window)).expect("as many numbers").into_owned();
            let reach = Grid::spread(&[half + 1; 2], 1);
            Offsets::new(by_place.into_dyn().view(), reach, [1; AXES], queries.clone(), keys.clone())
        };
        let score = OffsetsBeside {
            offsets: local.as_ref().filter(|x| x.dim().0 > 0).map(offsets).transpose()?,
            known: n,
            more: pooled,
            table: beside.iter().flatten().copied().collect(),
            queries: queries.clone(),
        };
        let sees = |axis: usize, at: usize, size: usize| {
            if axis == 1 { 0..1 } else { at.saturating_sub(half)..(at + half + 1).min(size) }
        };
        let mask = Beside { mask: Local::new(queries.clone(), keys.clone(), sees), known: n, more: pooled };
        let rows = |order: &Order, more: usize| -> Arc<[u32]> {
            order.rows().iter().copied().chain((n..n + more).map(|row| row as u32)).collect()
        };
        let rows = [rows(&queries, 0), rows(&keys, pooled)];
        let on_grid = OnGrid::masked(rows, Options { mask, score, scale: Some(1.0), isa: Some(config.isa) })?;
        let around = Dynamic { image: shape, sides: [window; 2] };
        let keys = |pixel: usize| (around.around(pixel).count() + pooled) as f64;
        let logs = (0..n).map(|pixel| keys(pixel).ln() as f32).collect();
        let softplus = |t: &f32| (f64::from(*t).max(0.0) + (-f64::from(t.abs())).exp().ln_1p()) as f32;
        let temperatures = temperatures.iter().flatten().map(softplus).collect();
        let embedding = embedding.map(Laid::from);
        let learnable = learnable.map(|(tokens, bias)| (tokens, Laid::from(bias)));
        Ok(TransNext { on_grid, shape, pooled, around, temperatures, logs, embedding, local, beside, learnable })
    }
}

impl TransNextBuilder {
    /// The side of a window, which is odd. Default: 3.
    pub fn window(self, window: usize) -> Self {
        Self { window, ..self }
    }

    /// The `t` of each head. Default: those for `softplus(t) = 1 / 0.24`.
    pub fn temperatures(self, t: Array1<f32>) -> Self {
        Self { temperatures: Some(t), ..self }
    }

    /// What is added to queries of unit length, `[heads, head_dim]`.
    pub fn embedding(self, embedding: Array2<f32>) -> Self {
        Self { embedding: Some(embedding), ..self }
    }

    /// The bias of each neighbor, `[heads, window^2]`.
    pub fn local(self, bias: Array2<f32>) -> Self {
        Self { local: Some(bias), ..self }
    }

    /// The bias of each pixel and pooled token, `[heads, height * width,
    /// pooled]`.
    pub fn beside(self, bias: Array3<f32>) -> Self {
        Self { beside: Some(bias), ..self }
    }

    /// Weights beside the softmax: tokens `[heads, head_dim, window^2]` and a
    /// bias `[heads, window^2]`.
    pub fn learnable(self, tokens: Array3<f32>, bias: Array2<f32>) -> Self {
        Self { learnable: Some((tokens, bias)), ..self }
    }
}

impl TransNext {
    fn check<T: Element>(&self, x: &TransNextInput<'_, T>) -> Result<Dims> {
        x.dims()?;
        let dims = image(&x.qkv, [self.shape; 2])?;
        let (heads, dim) = (dims.q_heads, dims.head_dim);
        let expected = (dims.batch, dims.kv_heads, self.pooled);
        for (argument, (b, h, n, _)) in [("pooled_k", x.pooled_k.dim()), ("pooled_v", x.pooled_v.dim())] {
            if (b, h, n) != expected {
                let want = format!("[batch, kv_heads, pooled, dim] = {expected:?} and dim");
                return Err(Error::shape(argument, want, &[b, h, n]));
            }
        }
        let of = |argument: &'static str, have: Option<&[usize]>, want: &[usize]| match have {
            Some(have) if !have.starts_with(want) => {
                Err(Error::shape(argument, format!("[heads, ..] that begins with {want:?}"), have))
            }
            _ => Ok(()),
        };
        let given = [self.temperatures.len()];
        of("temperatures", Some(&given[..]).filter(|_| given[0] > 0), &[heads])?;
        of("embedding", self.embedding.as_ref().map(|x| x.shape()), &[heads, dim])?;
        of("local", self.local.as_ref().map(|x| x.shape()), &[heads])?;
        of("beside", self.beside.as_ref().map(|x| x.shape()), &[heads])?;
        of("learnable", self.learnable.as_ref().map(|x| x.0.shape()), &[heads, dim])?;
        of("learnable", self.learnable.as_ref().map(|x| x.1.shape()), &[heads])?;
        Ok(dims)
    }

    fn temperature(&self, head: usize) -> f32 {
        self.temperatures.get(head).copied().unwrap_or(START)
    }
}

impl<T: Element> Pipeline<TransNextInput<'_, T>> for TransNext {
    type State = ();

    fn flow(
        &self,
        x: TransNextInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let Dims { batch, q_heads, kv_heads, q_len, head_dim, value_dim, .. } = self.check(&x)?;
        let (isa, n, all, one) = (self.on_grid.isa(), q_len, q_len + self.pooled, |_: usize, _: usize| 1.0);
        let unit = Lay { unit: true, add: None };
        let mut q = pass.rows((batch, q_heads, n, head_dim))?;
        let factor = |head: usize, row: usize| self.temperature(head) * self.logs[row];
        Lay { add: self.embedding.as_ref(), ..unit }.run(
            pass,
            isa,
            x.qkv.q.reborrow(),
            (&mut q, 0),
            factor,
        )?;
        let mut k = pass.rows((batch, kv_heads, all, head_dim))?;
        unit.run(pass, isa, x.qkv.k.reborrow(), (&mut k, 0), one)?;
        unit.run(pass, isa, x.pooled_k.reborrow(), (&mut k, n), one)?;
        let mut v = pass.rows((batch, kv_heads, all, value_dim))?;
        Lay::default().run(pass, isa, x.qkv.v.reborrow(), (&mut v, 0), one)?;
        Lay::default().run(pass, isa, x.pooled_v.reborrow(), (&mut v, n), one)?;
        let Qkv { q: queries, k, v, lengths, .. } = Qkv::new(q.view(), k.view(), v.view());
        let Some((tokens, bias)) = &self.learnable else {
            let x = Qkv { q: queries, k, v, lengths, out: PhantomData::<T> };
            return self.on_grid.attend(pass, x, None, out);
        };
        let mut sums = pass.rows((batch, q_heads, n, value_dim))?;
        let call = Qkv { q: queries, k, v, lengths, out: PhantomData::<f32> };
        self.on_grid.attend(pass, call, None, sums.view_mut())?;
        let mut queries = pass.rows((batch, q_heads, n, head_dim))?;
        unit.run(pass, isa, x.qkv.q.reborrow(), (&mut queries, 0), one)?;
        let width = bias.dim().1;
        let project = Project { isa, batch, heads: q_heads, len: n, inner: head_dim, width };
        let mut weights = pass.rows((batch, q_heads, n, width))?;
        project.stage(pass, queries.view(), tokens.view(), &mut weights);
        let of = (x.qkv.v.reborrow(), weights.view(), bias.numbers());
        self.around.run(pass, isa, of, Some(sums), out);
        Ok(())
    }

    fn define<R: Real>(&self, x: TransNextInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let n = dims.q_len;
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let h = head.head;
            let unit = |x: Array2<R>, add: Option<&Laid<Ix2>>, factor: &dyn Fn(usize) -> R| {
                let mut to = x.clone();
                for (i, (x, mut to)) in x.outer_iter().zip(to.outer_iter_mut()).enumerate() {
                    to.assign(&Lay { unit: true, add }.define(x, h, factor(i)));
                }
                to
            };
            let one = |_: usize| R::of(1.0);
            let q = head.rows::<R, T>(&x.qkv.q, &head.queries);
            let factor = |i: usize| {
                R::rounded(f64::from(self.temperature(h)), 1.0) * R::rounded(f64::from(self.logs[i]), 1.0)
            };
            let (queries, q) = (unit(q.clone(), self.embedding.as_ref(), &factor), unit(q, None, &one));
            let pooled = 0..self.pooled;
            let k = [(&x.qkv.k, &head.keys), (&x.pooled_k, &pooled)]
                .map(|(x, rows)| unit(head.rows(x, rows), None, &one));
            let v =
                [(&x.qkv.v, &head.keys), (&x.pooled_v, &pooled)].map(|(x, rows)| head.rows::<R, T>(x, rows));
            let [k, v] = [k, v].map(|[a, b]| ndarray::concatenate![Axis(0), a, b]);
            let neighbor =
                |i: usize, j: usize| self.around.around(i).find(|&(_, at)| at == j).map(|(m, _)| m);
            let score = |i: usize, j: usize, score: R| {
                let by = match (j.checked_sub(n), &self.beside, &self.local) {
                    (Some(c), Some(beside), _) => beside[[h, i, c]],
                    (None, _, Some(local)) => neighbor(i, j).map_or(0.0, |m| local[[h, m]]),
                    _ => 0.0,
                };
                score + R::of(f64::from(by))
            };
            let sees = |i: usize, j: usize| j >= n || neighbor(i, j).is_some();
            let sums = attend([&queries, &k, &v], 1.0, sees, score);
            let Some((tokens, bias)) = &self.learnable else { return sums };
            let weights = Array2::from_shape_fn((n, bias.dim().1), |(i, m)| {
                let tokens = tokens.slice(s![h, .., m]);
                let terms = q.row(i).into_iter().zip(tokens).map(|(&q, &t)| (q, R::of(f64::from(t))));
                R::dot(terms.collect::<Vec<_>>()) + R::of(f64::from(bias[[h, m]]))
            });
            self.around.define(&v, &weights, &sums)
        });
        Ok((out, ()))
    }
}

composite!(TransNext, TransNextInput);

exhibit! {
    TransNextExhibit of TransNext, "neighborhood", "aggregated attention", "arXiv 2311.17132";
    "3 x 3 pixels and pooled tokens in one softmax of cosines, and learnable weights beside it";
    not "where scores must be as large as queries and keys make them: cosines are at most 1";
    tokens true;
    build(x, field) {
        let (heads, len, dim) = (x.q.dim().1, x.q.dim().2, x.q.dim().3);
        let pooled = len.min(5);
        let of = |which: u64, (h, a, b): (usize, usize, usize)| field.at(which, h, a, b);
        TransNext::builder(Grid::squarest(len), pooled)
            .embedding(Array2::from_shape_fn((heads, dim), |(h, c)| 0.2 * of(1, (h, c, 0))))
            .local(Array2::from_shape_fn((heads, 9), |(h, m)| of(2, (h, m, 0))))
            .beside(Array3::from_shape_fn((heads, len, pooled), |at| of(3, at)))
            .learnable(
                Array3::from_shape_fn((heads, dim, 9), |at| 0.2 * of(4, at)),
                Array2::from_shape_fn((heads, 9), |(h, m)| 0.1 * of(5, (h, m, 0))),
            )
    }
    input<'a, T>(x, _) -> TransNextInput<'a, T> {
        let pooled = |x: ndarray::ArrayView4<'a, T>| {
            let n = x.dim().2.min(5);
            x.slice_move(s![.., .., ..n, ..])
        };
        let (k, v) = (pooled(x.k), pooled(x.v));
        TransNextInput::new(x, k, v)
    }
}
carded!(TransNext, TransNextExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::mask::mask_fn;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};

    /// Pixels, and what is pooled.
    fn arrays(shape: [usize; 2], pooled: usize) -> [Qkvs; 2] {
        let n = shape[0] * shape[1];
        [Qkvs::new([2, 4, 2, n, n, 10, 7], 1), Qkvs::new([2, 4, 2, n, pooled, 10, 7], 2)]
    }

    fn input<'a>([x, pooled]: &'a [Qkvs; 2]) -> TransNextInput<'a, f32> {
        TransNextInput::new(x.qkv(), pooled.k.view(), pooled.v.view())
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, pooled, window) in
            [([7, 9], 6, 3), ([4, 30], 0, 5), ([12, 11], 70, 3), ([1, 2], 1, 7), ([0, 3], 2, 3)]
        {
            let (x, n, m) = (arrays(shape, pooled), shape[0] * shape[1], window * window);
            let next = TransNext::builder(shape, pooled).window(window);
            let more = next.clone().temperatures(array(3, 4)).embedding(array(4, (4, 10)));
            let more = more.local(array(5, (4, m))).beside(array(6, (4, n, pooled)));
            let all = more.clone().learnable(array(7, (4, 10, m)), array(8, (4, m)));
            for next in [next, more, all] {
                held(&next.build().unwrap(), input(&x));
            }
        }
    }

    /// Learned arrays count whatever their strides.
    #[test]
    fn learned_arrays_of_any_strides() {
        let ([x, pooled], [n, m]) = (arrays([4, 5], 3), [20, 9]);
        let (x, all) = ([x, pooled], |turned: bool| {
            let two = |x: Array2<f32>| match turned {
                true => x.t().as_standard_layout().into_owned().reversed_axes(),
                false => x,
            };
            let three = |x: Array3<f32>| match turned {
                true => x.view().reversed_axes().as_standard_layout().into_owned().reversed_axes(),
                false => x,
            };
            TransNext::builder([4, 5], 3)
                .embedding(two(array(4, (4, 10))))
                .local(two(array(5, (4, m))))
                .beside(three(array(6, (4, n, 3))))
                .learnable(three(array(7, (4, 10, m))), two(array(8, (4, m))))
                .build()
                .unwrap()
        });
        assert_eq!(all(true).forward(input(&x)).unwrap(), all(false).forward(input(&x)).unwrap());
        held(&all(true), input(&x));
    }

    /// Without anything pooled: a window that is cut, over cosines.
    #[test]
    fn a_window_of_cosines() {
        let (shape, mut x) = ([6, 8], arrays([6, 8], 0));
        let next = TransNext::builder(shape, 0).window(5).build().unwrap().reference(input(&x)).unwrap();
        let near = |i: usize, j: usize| (i / 8).abs_diff(j / 8) < 3 && (i % 8).abs_diff(j % 8) < 3;
        for rows in [&mut x[0].q, &mut x[0].k] {
            for mut row in rows.rows_mut() {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.mapv_inplace(|x| x / length);
            }
        }
        for (i, mut row) in x[0].q.rows_mut().into_iter().enumerate() {
            let count = (0..48).filter(|&j| near(i % 48, j)).count();
            row.mapv_inplace(|x| x * START * (count as f32).ln());
        }
        let dense = Dense::builder().mask(mask_fn(move |_, i, j| near(i, j))).scale(1.0).build().unwrap();
        close(&next, &dense.reference(x[0].qkv()).unwrap(), 1e-5);
    }

    #[test]
    fn coordinates_of_the_network() {
        let x = TransNext::coordinates([4, 6], [2, 3], [5, 9]);
        assert_eq!(x.dim(), (24, 6, 2));
        // Pixel (3, 0) is 2.5 rows below the middle of the first cell, and half a
        // column before it.
        assert!((x[[18, 0, 0]] - 6f32.log2() / 3.0).abs() < 1e-6);
        assert!((x[[18, 0, 1]] + 1.5f32.log2() / 3.0).abs() < 1e-6);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |builder: TransNextBuilder| builder.build().unwrap_err().to_string();
        let next = || TransNext::builder([2, 3], 2);
        assert_eq!(refusal(next().window(4)), "window: expected an odd number of pixels, got 4");
        let local = "local: expected shape [heads, ..] and then [9], got [4, 8]";
        assert_eq!(refusal(next().local(array(1, (4, 8)))), local);
        let other = next().local(array(1, (3, 9))).build().unwrap();
        let refusal = other.forward(input(&arrays([2, 3], 2))).unwrap_err().to_string();
        assert_eq!(refusal, "local: expected shape [heads, ..] that begins with [4], got [3, 9]");
        let few = next().build().unwrap().forward(input(&arrays([2, 3], 3))).unwrap_err().to_string();
        assert!(few.starts_with("pooled_k: expected shape"), "{few}");
    }
}
