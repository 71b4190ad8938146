//! Rows of arrays in scratch: widened, for as many heads as share them, after
//! rows that were kept.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::copy_rows;
use crate::error::Result;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::stages::pass::{Pass, Scratch};

/// The rows of `old`, if there are any, and then those of `new`, for `heads`
/// heads of which neighbours share what there is less of.
pub(crate) fn join<'a, T: Element>(
    pass: &mut Pass<'a>,
    isa: Isa,
    heads: usize,
    old: Option<ArrayView4<'_, f32>>,
    new: ArrayView4<'_, T>,
) -> Result<Scratch<'a>> {
    let (batch, own, len, dim) = new.dim();
    let kept = old.map_or(0, |old| old.dim().2);
    let mut joined = pass.rows((batch, heads, kept + len, dim))?;
    let (units, stride) = (batch * heads, joined.stride());
    pass.stage(|| 0, bytes_for::<u64>(claim_words(units)), |mut arena| {
        let piece = (kept + len) * stride;
        let to = Parts::new(joined.numbers_mut(), piece, arena.take(claim_words(units)));
        let (old, new) = (old.map(|old| AnyArray::F32(Heads::new(old))), T::any(Heads::new(new)));
        parallel::for_each(parallel::threads(), units, |_| (), |(), unit| {
            let (b, h) = (unit / heads, unit % heads / (heads / own.max(1)).max(1));
            let to = to.take(unit);
            to.fill(0.0);
            let (first, last) = to.split_at_mut(kept * stride);
            if let Some(old) = &old {
                copy_rows(isa, old.rows(b, h, &(0..kept)), first, stride);
            }
            copy_rows(isa, new.rows(b, h, &(0..len)), last, stride);
        });
    });
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::{Array2, Axis, concatenate, s};

    #[test]
    fn rows_are_those_of_both() {
        let (old, new) = (array(1, (2, 2, 3, 5)), array(2, (2, 2, 4, 5)));
        let want = concatenate(Axis(2), &[old.view(), new.view()]).unwrap();
        for isa in Isa::available() {
            let both = alone(|pass| Ok(join(pass, isa, 2, Some(old.view()), new.view())?.view().to_owned()));
            assert_eq!(both, want);
            let wider = alone(|pass| Ok(join(pass, isa, 4, None, new.view())?.view().to_owned()));
            for h in 0..4 {
                let (got, want): (Array2<f32>, _) =
                    (wider.slice(s![1, h, .., ..]).to_owned(), new.slice(s![1, h / 2, .., ..]));
                assert_eq!(got, want);
            }
        }
    }
}
