//! Linear layers: rows times a matrix that all of them share, and what is added.

use ndarray::{Array1, Array2, Array3, ArrayView4, Axis};

use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::simd::Isa;
use crate::stages::pass::{Pass, Scratch};
use crate::stages::project::Project;

/// `W x + b`
#[derive(Clone, Debug)]
pub(crate) struct Affine {
    /// `[1, in, out]`
    weights: Array3<f32>,
    bias: Option<Vec<f32>>,
}

impl Affine {
    /// `weights` are `[out, in]`, and what is added is `[out]`; `argument` is what
    /// they are called.
    pub(crate) fn new(
        argument: &'static str,
        weights: &Array2<f32>,
        bias: Option<&Array1<f32>>,
    ) -> Result<Self> {
        let out = weights.dim().0;
        if let Some(bias) = bias.filter(|bias| bias.len() != out) {
            return Err(Error::shape(argument, format!("what is added, [{out}]"), bias.shape()));
        }
        let added = bias.into_iter().flatten();
        if let Some(x) = weights.iter().chain(added).find(|x| !x.is_finite()) {
            return Err(Error::value(argument, "finite numbers", x));
        }
        let turned = weights.t().as_standard_layout().into_owned().insert_axis(Axis(0));
        Ok(Self { weights: turned, bias: bias.map(|bias| bias.to_vec()) })
    }

    /// Elements of a row that comes, and of one that is made.
    pub(crate) fn sides(&self) -> [usize; 2] {
        [self.weights.dim().1, self.weights.dim().2]
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        (self.weights.len() + self.bias.as_ref().map_or(0, Vec::len)) * size_of::<f32>()
    }

    /// What rows `[batch, 1, len, in]` become.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'a>> {
        let ((batch, _, len, _), [inner, width]) = (x.dim(), self.sides());
        let mut to = pass.rows((batch, 1, len, width))?;
        let project = Project { isa, batch, heads: 1, len, inner, width };
        let flops = || (2 * batch * len * inner) as u64 * width as u64;
        pass.stage(flops, project.bytes(), |arena| {
            if let Some(to) = to.view_mut() {
                project.run_on(x, self.weights.view(), self.bias.as_deref(), to, arena);
            }
        });
        Ok(to)
    }

    /// The definition, of some rows.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>) -> Array2<R> {
        let weights = self.weights.index_axis(Axis(0), 0);
        Array2::from_shape_fn((x.dim().0, weights.dim().1), |(t, c)| {
            let terms = x.row(t).into_iter().zip(weights.column(c));
            let bias = self.bias.as_ref().map(|bias| (R::of(f64::from(bias[c])), R::of(1.0)));
            R::dot(terms.map(|(&x, &w)| (x, R::of(f64::from(w)))).chain(bias)).stored()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::s;

    #[test]
    fn kernels_keep_to_the_definition() {
        for (len, inner, width) in [(1, 1, 1), (50, 33, 70), (3, 0, 5), (3, 5, 0), (0, 4, 4)] {
            let (x, bias) = (array(1, (2, 1, len, inner)), array(2, width));
            for bias in [None, Some(&bias)] {
                let layer = Affine::new("layer", &array(3, (width, inner)), bias).unwrap();
                assert_eq!(layer.sides(), [inner, width]);
                let rows = x.slice(s![1, 0, .., ..]).map(|&x| Running::of(f64::from(x)));
                let want = layer.define(&rows);
                for isa in Isa::available() {
                    let got = alone(|pass| Ok(layer.run(pass, isa, x.view())?.view().to_owned()));
                    for (got, want) in got.slice(s![1, 0, .., ..]).iter().zip(&want) {
                        assert!((f64::from(*got) - want.value()).abs() <= want.off(), "{isa}: {got}");
                    }
                }
            }
        }
        let other = Affine::new("layer", &array(1, (3, 2)), Some(&array(2, 2))).unwrap_err().to_string();
        assert_eq!(other, "layer: expected shape what is added, [3], got [2]");
        let nan = Affine::new("layer", &array(1, (3, 2)), Some(&(array(2, 3) * f32::NAN))).unwrap_err();
        assert_eq!(nan.to_string(), "layer: expected finite numbers, got NaN");
    }
}
