//! Tokens of a window that goes along with a sequence: what was kept, joined
//! with what came.

use std::ops::Range;

use ndarray::{Array4, ArrayView4, Axis, concatenate, s};

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::copy_rows;
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::{Lengths, Qkv};
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::stages::pass::{Pass, Scratch};

/// The last keys and values of a sequence, `[batch, kv_heads, len, dim]`, the
/// oldest first.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Window([Array4<f32>; 2]);

impl Window {
    /// Of nothing yet, for keys and values like these.
    pub(crate) fn empty<T>(x: [&ArrayView4<'_, T>; 2]) -> Self {
        Self(x.map(|x| Array4::zeros((x.dim().0, x.dim().1, 0, x.dim().3))))
    }

    /// Of these.
    pub(crate) fn new(keys: Array4<f32>, values: Array4<f32>) -> Result<Self> {
        let (batch, heads, len, _) = keys.dim();
        if values.dim() != (batch, heads, len, values.dim().3) {
            let expected = format!("[batch, kv_heads, len, value_dim] = [{batch}, {heads}, {len}, _]");
            return Err(Error::shape("values", expected, values.shape()));
        }
        Ok(Self([keys, values]))
    }

    pub(crate) fn view(&self) -> [ArrayView4<'_, f32>; 2] {
        self.0.each_ref().map(|x| x.view())
    }

    /// Refuses one that keys and values cannot follow.
    pub(crate) fn check<T>(&self, x: [&ArrayView4<'_, T>; 2]) -> Result<()> {
        for ((argument, kept), x) in ["state keys", "state values"].into_iter().zip(&self.0).zip(x) {
            let ((b, h, _, d), (batch, heads, _, dim)) = (kept.dim(), x.dim());
            if (b, h, d) != (batch, heads, dim) {
                let expected = format!("[batch, kv_heads, _, dim] = [{batch}, {heads}, _, {dim}]");
                return Err(Error::shape(argument, expected, kept.shape()));
            }
        }
        Ok(())
    }

    /// Keeps the last `left` tokens.
    pub(crate) fn keep(&mut self, all: [ArrayView4<'_, f32>; 2], left: usize) {
        for (kept, all) in self.0.iter_mut().zip(all) {
            let first = all.dim().2.saturating_sub(left);
            let last = all.slice_move(s![.., .., first.., ..]);
            if kept.dim() == last.dim() { kept.assign(&last) } else { *kept = last.to_owned() }
        }
    }

    /// The definition of [`join`].
    pub(crate) fn followed_by<T: Element>(&self, x: [&ArrayView4<'_, T>; 2]) -> [Array4<f32>; 2] {
        let [keys, values] = x.map(|x| x.map(|x| x.to_f32()));
        [concatenate![Axis(2), self.0[0], keys], concatenate![Axis(2), self.0[1], values]]
    }
}

/// What [`Based`](crate::linear::Based) carries from token to token: the state
/// of linear attention, and the last keys and values of the window.
#[derive(Clone, Debug, PartialEq)]
pub struct BasedState {
    pub(crate) global: State,
    pub(crate) window: Window,
}

impl BasedState {
    /// A state of these parts, for instance one that was saved: that of linear
    /// attention, and the last keys and values of the window.
    ///
    /// # Errors
    /// [`Error::Shape`] for keys and values that do not belong together.
    pub fn new(global: State, keys: Array4<f32>, values: Array4<f32>) -> Result<Self> {
        Ok(Self { global, window: Window::new(keys, values)? })
    }

    /// The state of linear attention.
    pub fn global(&self) -> &State {
        &self.global
    }

    /// The keys that the next token's window begins with, `[batch, kv_heads,
    /// at most left, head_dim]`, the oldest first.
    pub fn keys(&self) -> ArrayView4<'_, f32> {
        self.window.0[0].view()
    }

    /// Their values.
    pub fn values(&self) -> ArrayView4<'_, f32> {
        self.window.0[1].view()
    }
}

/// Some queries and keys, as a sequence of their own.
pub(crate) fn part<'a, T, K, O>(
    x: &Qkv<'a, T, K, O>,
    queries: &Range<usize>,
    keys: &Range<usize>,
) -> Qkv<'a, T, K, O> {
    Qkv {
        q: x.q.slice_move(s![.., .., queries.clone(), ..]),
        k: x.k.slice_move(s![.., .., keys.clone(), ..]),
        v: x.v.slice_move(s![.., .., keys.clone(), ..]),
        lengths: Lengths::Full,
        out: x.out,
    }
}

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
    pass.stage(
        || 0,
        bytes_for::<u64>(claim_words(units)),
        |mut arena| {
            let piece = (kept + len) * stride;
            let to = Parts::new(joined.numbers_mut(), piece, arena.take(claim_words(units)));
            let (old, new) = (old.map(|old| AnyArray::F32(Heads::new(old))), T::any(Heads::new(new)));
            parallel::for_each(
                parallel::threads(),
                units,
                |_| (),
                |(), unit| {
                    let (b, h) = (unit / heads, unit % heads / (heads / own.max(1)).max(1));
                    let to = to.take(unit);
                    to.fill(0.0);
                    let (first, last) = to.split_at_mut(kept * stride);
                    if let Some(old) = &old {
                        copy_rows(isa, old.rows(b, h, &(0..kept)), first, stride);
                    }
                    copy_rows(isa, new.rows(b, h, &(0..len)), last, stride);
                },
            );
        },
    );
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::{Array2, s};

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

    #[test]
    fn the_last_tokens_are_kept() {
        let x = array(1, (2, 2, 9, 5));
        let part = |from: usize, to: usize| x.slice(s![.., .., from..to, ..]);
        let mut window = Window::empty([&x.view(), &x.view()]);
        for (from, to) in [(0, 2), (2, 2), (2, 5), (5, 9)] {
            let all = window.followed_by([&part(from, to), &part(from, to)]);
            window.keep(all.each_ref().map(|x| x.view()), 3);
            assert_eq!(window.view(), [part(to.saturating_sub(3), to), part(to.saturating_sub(3), to)]);
        }
        window.check([&x.view(), &x.view()]).unwrap();
        let error = window.check([&x.view(), &part(0, 9).slice_move(s![.., ..1, .., ..])]).unwrap_err();
        let expected =
            "state values: expected shape [batch, kv_heads, _, dim] = [2, 1, _, 5], got [2, 2, 3, 5]";
        assert_eq!(error.to_string(), expected);
        let error = Window::new(x.clone(), part(0, 8).to_owned()).unwrap_err().to_string();
        assert_eq!(
            error,
            "values: expected shape [batch, kv_heads, len, value_dim] = [2, 2, 9, _], got [2, 2, 8, 5]"
        );
    }
}
