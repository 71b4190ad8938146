//! Overlapping cross-attention (HAT): windows of queries over larger windows of
//! keys.

use ndarray::{Array2, Array3};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::grid::{AXES, Grid};
use crate::score::Score as _;
use crate::score::grid::Offsets;
use crate::stages::halo::Halo;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

/// Overlapping cross-attention (HAT): windows of queries over larger windows of
/// keys.
///
/// ```text
/// o_i  = sum_j softmax_j(scale q_i . k_j + table[t(i, j), h]) v_j     for all E_0 x E_1 pixels j of i's window
/// t    = ((y_j - y_i + W_0 - E_0 + 1) M_1 + x_j - x_i + W_1 - E_1 + 1)   mod   M_0 M_1
/// ```
///
/// Queries of a window of `W_0 x W_1` pixels see one of `E_0 x E_1` around it;
/// places count from the corner of each. Outside the image keys and values are
/// 0: they take a share of the weights. `M = W + E - 1`; the index may be
/// negative, and counts from the end of the table then, as in the released
/// models. "Activating More Pixels in Image Super-Resolution Transformer"
/// (arXiv 2205.04437, arXiv 2309.05239). HAT's other attention is
/// [`Swin`](super::Swin).
///
/// Cost: `2 (head_dim + value_dim) E_0 E_1` flops a query.
///
/// Windows over larger windows with a relative position bias.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::Overlapping};
/// use ndarray::{Array2, Array4};
///
/// let x = Array4::<f32>::ones((1, 6, 16 * 32, 30));
/// let table = Array2::zeros((39 * 39, 6)); // 16 + 24 - 1
/// let hat = Overlapping::builder([16, 32], [16, 16]).bias(table).build()?;
/// let out = hat.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 6, 512, 30));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Overlapping {
    halo: Halo,
    window: [usize; 2],
    bias: Option<(Array2<f32>, Offsets)>,
}

impl Overlapping {
    /// Windows of `window` pixels, height and width, of an image of `shape`,
    /// over such as are half as large again.
    pub fn builder(shape: [usize; 2], window: [usize; 2]) -> OverlappingBuilder {
        OverlappingBuilder::with(shape, window)
    }

    /// Where the table has the bias of a query's and a key's place.
    fn index(window: [usize; 2], larger: [usize; 2], query: [usize; 2], key: [usize; 2]) -> usize {
        let m: [usize; 2] = std::array::from_fn(|i| window[i] + larger[i] - 1);
        let from =
            |i: usize| key[i] as isize - query[i] as isize + window[i] as isize - larger[i] as isize + 1;
        (from(0) * m[1] as isize + from(1)).rem_euclid((m[0] * m[1]) as isize) as usize
    }
}

options! {
    /// Builds an [`Overlapping`].
    OverlappingBuilder of Overlapping, isa;
    given { shape: [usize; 2]; window: [usize; 2]; }
    own {
        larger: Option<[usize; 2]> = None;
        bias: Option<Array2<f32>> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let OverlappingBuilder { shape, window, larger, bias, scale, .. } = builder;
        let larger = larger.unwrap_or_else(|| window.map(|window| window.saturating_add(window / 4 * 2)));
        for (larger, window) in larger.into_iter().zip(window) {
            if !larger.checked_sub(window).is_some_and(|more| more.is_multiple_of(2)) {
                let expected = format!("the window, {window}, and as much on both sides");
                return Err(Error::value("larger", expected, larger));
            }
        }
        let around = std::array::from_fn(|i| (larger[i] - window[i]) / 2);
        let halo = match Halo::new(shape, window, around, 1, scale, Some(config.isa)) {
            Err(Error::Value { argument: "block", expected, got }) => {
                return Err(Error::Value { argument: "window", expected, got });
            }
            halo => halo?,
        };
        let offsets = |table: &Array2<f32>| {
            let entries = (0..2).map(|i| window[i] + larger[i] - 1).product::<usize>();
            let heads = table.dim().1;
            if table.dim().0 != entries {
                let expected = format!("[{entries}, heads] for windows of {window:?} over {larger:?}");
                return Err(Error::shape("bias", expected, table.shape()));
            }
            // By distances from `1 - larger` to `larger - 1`; those before `1 -
            // window` are none.
            let sides = larger.map(|side| 2 * side - 1);
            let by_head = Array3::from_shape_fn((heads, sides[0], sides[1]), |(h, y, x)| {
                let from = |at: usize, i: usize| (at + window[i]).checked_sub(larger[i]);
                match (from(y, 0), from(x, 1)) {
                    (Some(y), Some(x)) => {
                        let query = window.map(|window| window - 1);
                        table[[Overlapping::index(window, larger, query, [y, x]), h]]
                    }
                    _ => 0.0,
                }
            });
            let [queries, keys] = halo.orders();
            Offsets::new(by_head.into_dyn().view(), Grid::spread(&larger, 1), [1; AXES], queries, keys)
        };
        let bias = bias.map(|table| offsets(&table).map(|offsets| (table, offsets))).transpose()?;
        Ok(Overlapping { halo, window, bias })
    }
}

impl OverlappingBuilder {
    /// The windows of keys, which have as much more on both sides. Default:
    /// half as much again.
    pub fn larger(self, larger: [usize; 2]) -> Self {
        Self { larger: Some(larger), ..self }
    }

    /// The relative position bias as models store it, `[M_0 M_1, heads]`.
    pub fn bias(self, table: Array2<f32>) -> Self {
        Self { bias: Some(table), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Overlapping {
    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = self.halo.check(x)?;
        self.bias.as_ref().map_or(Ok(()), |(_, bias)| bias.check(&dims))?;
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Overlapping {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.check(&x)?;
        self.halo.attend(pass, x, self.bias.as_ref().map(|(_, bias)| bias), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| self.halo.border().define(&head.rows::<R, T>(x, &head.keys)));
            let score = |i: usize, j: usize, s: R| match (&self.bias, self.halo.inside(i, j)) {
                (Some((table, _)), Some([query, key])) => {
                    let index = Self::index(self.window, self.halo.window(), query, key);
                    let column = if table.dim().1 == 1 { 0 } else { head.head };
                    s + R::of(f64::from(table[[index, column]]))
                }
                _ => s,
            };
            attend([&q, &k, &v], self.halo.scale(&dims), |i, j| self.halo.inside(i, j).is_some(), score)
        });
        Ok((out, ()))
    }
}

composite!(Overlapping, Qkv);

exhibit! {
    OverlappingExhibit of Overlapping, "neighborhood", "overlapping cross-attention", "arXiv 2205.04437, 2309.05239";
    "windows of 8 x 8 pixels over windows of 12 x 12 around them, with a relative position bias";
    not "where windows need not exchange: 2.25 times the keys of plain windows";
    tokens true;
    build(x, field) {
        let shape = Grid::squarest(x.q.dim().2);
        let window = shape.map(|size| Grid::divisor(size, 8));
        let entries = (2 * window[0] + 3) * (2 * window[1] + 3);
        let bias = |(t, h): (usize, usize)| 2.0 * field.at(1, h, t, 0);
        Overlapping::builder(shape, window)
            .larger(window.map(|window| window + 4))
            .bias(Array2::from_shape_fn((entries, x.q.dim().1.max(1)), bias))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Overlapping, OverlappingExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::neighborhood::Swin;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};

    fn image(shape: [usize; 2]) -> Qkvs {
        let n = shape[0] * shape[1];
        Qkvs::new([2, 4, 2, n, n, 10, 7], 1)
    }

    fn table(window: [usize; 2], larger: [usize; 2], heads: usize) -> Array2<f32> {
        array(9, ((window[0] + larger[0] - 1) * (window[1] + larger[1] - 1), heads)) * 3.0
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, window, larger) in [
            ([8, 12], [4, 4], [6, 6]),
            ([6, 9], [2, 3], [2, 9]),
            ([8, 8], [8, 4], [8, 4]),
            ([4, 0], [2, 2], [4, 4]),
        ] {
            let x = image(shape);
            let hat = Overlapping::builder(shape, window).larger(larger);
            for hat in
                [hat.clone(), hat.clone().bias(table(window, larger, 4)), hat.bias(table(window, larger, 1))]
            {
                held(&hat.build().unwrap(), x.qkv());
            }
        }
    }

    /// Every entry of the table is some pair's, and of one distance only.
    #[test]
    fn the_index_is_one_to_one() {
        for (window, larger) in [([4, 4], [6, 6]), ([2, 3], [6, 5]), ([16, 16], [24, 24])] {
            let entries = table(window, larger, 1).dim().0;
            let mut distances = vec![None; entries];
            for (a, b, c, d) in ndarray::indices((window[0], window[1], larger[0], larger[1])) {
                let distance = (c as isize - a as isize, d as isize - b as isize);
                let entry = &mut distances[Overlapping::index(window, larger, [a, b], [c, d])];
                assert_eq!(*entry.get_or_insert(distance), distance);
            }
            assert!(distances.iter().all(Option::is_some));
        }
    }

    #[test]
    fn without_overlap_it_is_plain_windows() {
        let (shape, window) = ([8, 12], [4, 6]);
        let x = image(shape);
        let by_swin = table(window, window, 4);
        // Swin's entry of a distance of the query from the key.
        let mut own = by_swin.clone();
        for (a, b, c, d) in ndarray::indices((4, 6, 4, 6)) {
            let swin = (a + 3 - c) * 11 + b + 5 - d;
            own.row_mut(Overlapping::index(window, window, [a, b], [c, d])).assign(&by_swin.row(swin));
        }
        let hat = Overlapping::builder(shape, window).larger(window).bias(own).build().unwrap();
        let swin = Swin::builder(shape, window).bias(by_swin).build().unwrap();
        close(&hat.reference(x.qkv()).unwrap(), &swin.reference(x.qkv()).unwrap(), 1e-12);
        close(
            &hat.forward(x.qkv()).unwrap().mapv(f64::from),
            &swin.forward(x.qkv()).unwrap().mapv(f64::from),
            2e-6,
        );
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let refusal = |builder: OverlappingBuilder| builder.build().unwrap_err().to_string();
        let hat = |window| Overlapping::builder([8, 12], window);
        assert_eq!(refusal(hat([4, 8])), "window: expected a divisor of 12 pixels on axis 1, got 8");
        let larger = "larger: expected the window, 4, and as much on both sides, got 7";
        assert_eq!(refusal(hat([4, 4]).larger([6, 7])), larger);
        let bias = "bias: expected shape [81, heads] for windows of [4, 4] over [6, 6], got [80, 2]";
        assert_eq!(refusal(hat([4, 4]).bias(Array2::zeros((80, 2)))), bias);
    }
}
