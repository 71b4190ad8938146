//! Angular hashes by definition.

use ndarray::ArrayView4;

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::element::Element;

/// For each row of each head a number whose bit `i` says whether its product with row `i`
/// of `planes` is above 0. Each head has a list of margins: rows one of whose products
/// is so near 0, or of so large terms, that rounding may turn it.
pub(crate) fn sides<T: Element>(x: &ArrayView4<'_, T>, planes: &[f64], margins: &mut Margins) -> Vec<u32> {
    let (dim, mut codes) = (x.dim().3.max(1), Vec::new());
    for head in
        x.outer_iter().flat_map(|x| x.outer_iter().map(|x| x.mapv(Element::to_f64)).collect::<Vec<_>>())
    {
        let mut doubtful = Vec::new();
        for (i, row) in head.outer_iter().enumerate() {
            let (mut code, mut doubt) = (0, false);
            for (l, plane) in planes.chunks_exact(dim).enumerate() {
                let terms = || row.iter().zip(plane).map(|(x, p)| x * p);
                let (sum, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                code |= u32::from(sum > 0.0) << l;
                doubt |= (sum != 0.0 || size != 0.0) && sum.abs() <= SELECTION_MARGIN * size;
                doubt |= size > f64::from(f32::MAX);
            }
            codes.push(code);
            doubtful.extend(doubt.then_some(i..i + 1));
        }
        margins.doubtful.push(doubtful);
    }
    codes
}
