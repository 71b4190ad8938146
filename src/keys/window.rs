//! Windows of nearest keys on an axis, as NATTEN has them.

use std::ops::Range;

use crate::error::{Error, Result};

/// What a window is on one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    pub(crate) window: usize,
    pub(crate) dilation: usize,
    pub(crate) stride: usize,
    pub(crate) causal: bool,
}

impl Axis {
    /// An axis that a grid does not have.
    pub(crate) const NONE: Self = Self { window: 1, dilation: 1, stride: 1, causal: false };

    /// One for each of `n` axes, on which dilation and stride are 1 unless given, and
    /// which are not causal.
    pub(crate) fn all(
        n: usize,
        window: &[usize],
        dilation: Option<Vec<usize>>,
        stride: Option<Vec<usize>>,
        causal: Option<Vec<bool>>,
    ) -> Result<Vec<Self>> {
        let [dilation, stride] = [dilation, stride].map(|of_axes| of_axes.unwrap_or_else(|| vec![1; n]));
        let causal = causal.unwrap_or_else(|| vec![false; n]);
        let counts = [("window", window.len()), ("dilation", dilation.len()), ("stride", stride.len())];
        for (argument, count) in counts.into_iter().chain([("causal", causal.len())]) {
            if count != n {
                return Err(Error::value(argument, format!("one for each of the {n} axes"), count));
            }
        }
        let axis =
            |i| Self { window: window[i], dilation: dilation[i], stride: stride[i], causal: causal[i] };
        Ok((0..n).map(axis).collect())
    }

    /// Refuses axes that no place of one of the shapes could have, unless there are no
    /// places. An error says `name` of the shape.
    pub(crate) fn check_all(
        axes: &[Self],
        shapes: &[Vec<usize>],
        name: impl Fn(usize) -> String,
    ) -> Result<()> {
        let check = |shape: &[usize], name: String| {
            let mut rules = axes.iter().zip(shape).enumerate();
            rules.try_for_each(|(axis, (rule, &size))| {
                rule.check(size, shape.contains(&0), format!("axis {axis}{name}"))
            })
        };
        if shapes.is_empty() {
            return check(&vec![0; axes.len()], String::new());
        }
        shapes.iter().enumerate().try_for_each(|(i, shape)| check(shape, name(i)))
    }

    fn check(self, size: usize, is_empty: bool, name: String) -> Result<()> {
        let Self { window, dilation, stride, .. } = self;
        let fits = is_empty || window.checked_mul(dilation).is_some_and(|span| span <= size);
        if dilation == 0 {
            return Err(Error::value("dilation", "at least 1", format_args!("0 on {name}")));
        }
        if window == 0 || !fits {
            let expected = format!("from 1 to {size} places on {name} at a dilation of {dilation}");
            return Err(Error::value("window", expected, window));
        }
        if stride == 0 || stride > window {
            let expected = format!("from 1 to the window, {window}, on {name}");
            return Err(Error::value("stride", expected, stride));
        }
        Ok(())
    }

    /// What a place of a residue class of `size` sees.
    pub(crate) fn reach(self, at: usize, size: usize) -> Range<usize> {
        let Self { window, stride, causal, .. } = self;
        if causal {
            let leader = (at / stride * stride + stride - 1).min(size - 1);
            return (leader + 1).saturating_sub(window)..at + 1;
        }
        let leader = (at / stride * stride + stride / 2).min(size - 1);
        let start = leader.saturating_sub(window / 2).min(size.saturating_sub(window));
        start..(start + window).min(size)
    }

    /// The rule as NATTEN's kernels have it, for places of an axis of `size`.
    pub(crate) fn sees(self, size: usize, query: usize, key: usize) -> bool {
        let (group, d, s) = (query % self.dilation, self.dilation as isize, self.stride as isize);
        let (x, y) = ((query / self.dilation) as isize, (key / self.dilation) as isize);
        let length = (size as isize - group as isize + d - 1) / d;
        let (left, right) = ((self.window / 2) as isize, ((self.window - 1) / 2) as isize);
        let (start, end);
        if self.causal {
            let leader = (x / s * s + s - 1).min(length - 1);
            start = (leader - left - right).max(0);
            end = (x + 1).min(length);
        } else {
            let leader = (x / s * s + s / 2).min(length - 1);
            let past = if leader + right >= length { length - right - leader - 1 } else { 0 };
            start = (leader - left).max(0) + past;
            end = start + self.window as isize;
        }
        key % self.dilation == group && start <= y && y < end
    }
}
