//! HaloNet: blocks of queries over the block and a halo around it.

use ndarray::Array2;

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::Result;
use crate::input::{Dims, Qkv};
use crate::keys::grid::Grid;
use crate::score::grid::Terms;
use crate::stages::halo::Halo;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::relative::Relative;

/// HaloNet: blocks of queries over the block and a halo around it.
///
/// ```text
/// s_ij = scale q_i . k_j + q_i . rows[y_j - y_i + r_0 - 1] + q_i . columns[x_j - x_i + r_1 - 1]
/// o_i  = sum_j softmax_j(s_ij) v_j       for all r_0 x r_1 pixels j of the window of i's block
/// ```
///
/// Queries of a block of `b_0 x b_1` pixels share a window that has `halo`
/// pixels more on each side, `r = b + 2 halo`; here `y_i` counts from the
/// corner of the block and `y_j` from that of the window. Outside the image
/// keys and values are 0: they take a share of the weights. With a stride every
/// `stride`-th pixel has a query, and `y_i` counts queries. "Scaling Local
/// Self-Attention for Parameter Efficient Visual Backbones" (arXiv 2103.12731);
/// padding, index and the relative term of the query as it is, without the
/// scale, as in timm.
///
/// Cost: `2 (head_dim + value_dim) r_0 r_1` flops a query, and `4 head_dim (r_0
/// + r_1)` for the relative terms.
///
/// [`Backward`](crate::Backward) gives the gradients of the embeddings, too.
///
/// Blocks over windows with a halo.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::HaloNet};
/// use ndarray::{Array2, Array4};
///
/// let x = Array4::<f32>::ones((1, 4, 16 * 16, 16));
/// let relative = Array2::zeros((2 * 14 - 1, 16)); // windows of 8 + 2 * 3
/// let halo = HaloNet::builder([16, 16]).relative(relative.clone(), relative).build()?;
/// let out = halo.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 4, 256, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HaloNet {
    halo: Halo,
    relative: Option<Relative>,
    scales_relative: bool,
}

impl HaloNet {
    /// Blocks of 8 x 8 pixels with a halo of 3, of an image of `shape`, height
    /// and width.
    pub fn builder(shape: [usize; 2]) -> HaloNetBuilder {
        HaloNetBuilder::with(shape)
    }
}

options! {
    /// Builds a [`HaloNet`].
    HaloNetBuilder of HaloNet, isa;
    given { shape: [usize; 2]; }
    own {
        block: [usize; 2] = [8, 8];
        halo: usize = 3;
        stride: usize = 1;
        relative: Option<[Array2<f32>; 2]> = None;
        scale: Option<f32> = None, in FINITE;
    }
    flags {
        /// The scale is a factor of the relative terms, too.
        scale_relative;
    }
    build(builder, config) {
        let HaloNetBuilder { shape, block, halo, stride, relative, scale, .. } = builder;
        let halo = Halo::new(shape, block, [halo; 2], stride, scale, Some(config.isa))?;
        let relative = relative.map(|[rows, cols]| Relative::new([&rows, &cols], halo.window()));
        Ok(HaloNet { halo, relative: relative.transpose()?, scales_relative: builder.scale_relative })
    }
}

impl HaloNetBuilder {
    /// The pixels of a block, which divide the image.
    pub fn block(self, block: [usize; 2]) -> Self {
        Self { block, ..self }
    }

    /// How much wider a window is on each side.
    pub fn halo(self, halo: usize) -> Self {
        Self { halo, ..self }
    }

    /// How far apart pixels with queries are on each axis: a divisor of the
    /// block. Default: 1.
    pub fn stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Embeddings of distances, `[2 r - 1, head_dim]` of rows and of columns,
    /// for all heads: entry `r - 1` is for a distance of 0.
    pub fn relative(self, rows: Array2<f32>, columns: Array2<f32>) -> Self {
        Self { relative: Some([rows, columns]), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl HaloNet {
    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = self.halo.check(x)?;
        self.relative.as_ref().map_or(Ok(()), |relative| relative.check(dims.head_dim))?;
        Ok(dims)
    }

    /// What relative terms are multiplied by.
    fn factor(&self, dims: &Dims) -> f64 {
        if self.scales_relative { self.halo.scale(dims) } else { 1.0 }
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for HaloNet {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.check(&x)?;
        let Some(relative) = &self.relative else {
            return self.halo.attend(pass, x, None::<Terms<'_>>, out);
        };
        let terms = relative.run(pass, self.halo.isa(), x.q)?;
        let terms = self.halo.terms(&dims, &terms, relative.extents(), self.factor(&dims) as f32);
        self.halo.attend(pass, x, Some(terms), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| self.halo.border().define(&head.rows::<R, T>(x, &head.keys)));
            let score = |i: usize, j: usize, s: R| match (&self.relative, self.halo.inside(i, j)) {
                (Some(relative), Some([query, key])) => {
                    let [dy, dx] = [0, 1].map(|axis| key[axis] as isize - query[axis] as isize);
                    let term = |x: ndarray::ArrayView1<'_, f32>| {
                        R::dot(q.row(i).iter().zip(x).map(|(&q, &x)| (q, R::of(f64::from(x)))))
                    };
                    let [rows, cols] = relative.of(dy, dx);
                    s + R::rounded(self.factor(&dims), 1.0) * (term(rows) + term(cols))
                }
                _ => s,
            };
            attend([&q, &k, &v], self.halo.scale(&dims), |i, j| self.halo.inside(i, j).is_some(), score)
        });
        Ok((out, ()))
    }
}

composite!(HaloNet, Qkv);

exhibit! {
    HaloNetExhibit of HaloNet, "neighborhood", "HaloNet", "arXiv 2103.12731";
    "blocks of 8 x 8 pixels over themselves and 3 pixels around, with relative terms of the query";
    not "where every query needs the same distance to each side: neighborhood attention";
    tokens true;
    build(x, field) {
        let shape = Grid::squarest(x.q.dim().2);
        let block = shape.map(|size| Grid::divisor(size, 8));
        let terms = |axis: usize| {
            let entries = 2 * (block[axis] + 6) - 1;
            Array2::from_shape_fn((entries, x.q.dim().3), |(t, c)| 0.5 * field.at(1, axis, t, c))
        };
        HaloNet::builder(shape).block(block).relative(terms(0), terms(1))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(HaloNet, HaloNetExhibit);

pub(crate) mod backward;

#[cfg(test)]
mod backward_tests;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};

    pub(super) fn image(shape: [usize; 2], stride: usize) -> Qkvs {
        let n = shape[0] * shape[1];
        Qkvs::new([2, 4, 2, n / stride / stride, n, 10, 7], 1)
    }

    pub(super) fn relative(window: usize) -> Array2<f32> {
        array(window as u64, (2 * window - 1, 10))
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, block, halo, stride) in
            [([8, 12], [4, 4], 3, 1), ([6, 9], [2, 3], 0, 1), ([8, 8], [8, 4], 9, 2), ([0, 4], [2, 2], 1, 1)]
        {
            let x = image(shape, stride);
            let halo = HaloNet::builder(shape).block(block).halo(halo).stride(stride);
            let [rows, cols] = block.map(|block| relative(block + 2 * halo.halo));
            let with = halo.clone().relative(rows, cols);
            for halo in [halo, with.clone(), with.scale(0.7).scale_relative()] {
                held(&halo.build().unwrap(), x.qkv());
            }
        }
    }

    #[test]
    fn one_block_is_dense() {
        let x = image([6, 7], 1);
        let dense = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
        let halo = HaloNet::builder([6, 7]).block([6, 7]).halo(0);
        close(&halo.clone().build().unwrap().reference(x.qkv()).unwrap(), &dense, 1e-12);
        let [rows, cols] = [6, 7].map(|window| 0.0 * relative(window));
        close(&halo.relative(rows, cols).build().unwrap().reference(x.qkv()).unwrap(), &dense, 1e-12);
    }

    /// A corner's pixel among zeros: their scores are 0, and they have values.
    #[test]
    fn zeros_take_their_share() {
        let x = Qkvs { q: array(1, (1, 1, 1, 4)), k: array(2, (1, 1, 1, 4)), v: array(3, (1, 1, 1, 2)) };
        let halo = HaloNet::builder([1, 1]).block([1, 1]).halo(2).scale(1.0).build().unwrap();
        let score: f32 = x.q.iter().zip(&x.k).map(|(q, k)| q * k).sum();
        let want = x.v.mapv(|v| f64::from(v) * f64::from(score).exp() / (f64::from(score).exp() + 24.0));
        close(&halo.reference(x.qkv()).unwrap(), &want, 1e-6);
        close(&halo.forward(x.qkv()).unwrap().mapv(f64::from), &want, 1e-6);
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let refusal = |builder: HaloNetBuilder| builder.build().unwrap_err().to_string();
        let halo = || HaloNet::builder([8, 12]);
        assert_eq!(refusal(halo()), "block: expected a divisor of 12 pixels on axis 1, got 8");
        let stride = "stride: expected a divisor of the block, 4, on axis 0, got 3";
        assert_eq!(refusal(halo().block([4, 4]).stride(3)), stride);
        let rows = "rows: expected shape [2 reach - 1, head_dim] = [19, 10], got [17, 10]";
        assert_eq!(refusal(halo().block([4, 4]).relative(relative(9), relative(10))), rows);
        let scale = refusal(halo().block([4, 4]).scale(f32::NAN));
        assert_eq!(scale, "scale: expected a finite number, got NaN");
    }
}
