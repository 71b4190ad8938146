//! Arrays in every layout that a caller may have.

use attention_kernels::element::Element;
use ndarray::{Array4, ArrayView4, ArrayViewMut4, Axis, Slice};

/// How an array lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[batch, heads, len, dim]`, as it is.
    Standard,
    /// `[batch, len, heads, dim]`, as projections leave it.
    LengthFirst,
    /// Every axis backwards.
    Reversed,
    /// Every other element of the last axis of something larger.
    Sparse,
    /// `[batch, heads, dim, len]`: the last axis has the stride of the length.
    Transposed,
    /// The rows of a larger array, as of a cache that is not full.
    Padded,
    /// One batch entry for all: stride 0.
    OneBatch,
    /// One head for all: stride 0.
    OneHead,
    /// One row for all: stride 0.
    OneRow,
    /// One column for all: stride 0.
    OneColumn,
}

impl Layout {
    /// Those in which every element has a place of its own.
    pub const OWN: [Self; 6] =
        [Self::Standard, Self::LengthFirst, Self::Reversed, Self::Sparse, Self::Transposed, Self::Padded];
    pub const ALL: [Self; 10] = [
        Self::Standard,
        Self::LengthFirst,
        Self::Reversed,
        Self::Sparse,
        Self::Transposed,
        Self::Padded,
        Self::OneBatch,
        Self::OneHead,
        Self::OneRow,
        Self::OneColumn,
    ];
}

/// An array in some layout.
#[derive(Clone, Debug)]
pub struct Stored<T> {
    base: Array4<T>,
    layout: Layout,
    dim: (usize, usize, usize, usize),
}

impl<T: Element> Stored<T> {
    /// Memory for an array of this shape, filled with `fill`.
    pub fn filled(dim: (usize, usize, usize, usize), layout: Layout, fill: T) -> Self {
        let (b, h, n, d) = dim;
        let base = match layout {
            Layout::Standard | Layout::Reversed => (b, h, n, d),
            Layout::LengthFirst => (b, n, h, d),
            Layout::Sparse => (b, h, n, 2 * d + 1),
            Layout::Transposed => (b, h, d, n),
            Layout::Padded => (b + 1, h + 1, n + 3, d + 5),
            Layout::OneBatch => (b.min(1), h, n, d),
            Layout::OneHead => (b, h.min(1), n, d),
            Layout::OneRow => (b, h, n.min(1), d),
            Layout::OneColumn => (b, h, n, d.min(1)),
        };
        Self { base: Array4::from_elem(base, fill), layout, dim }
    }

    /// An array of numbers from `next`.
    pub fn from_fn(dim: (usize, usize, usize, usize), layout: Layout, next: impl FnMut() -> T) -> Self {
        // Whoever reads beside the array finds this.
        let mut stored = Self::filled(dim, layout, T::from_f32(f32::NAN));
        match layout {
            Layout::OneBatch | Layout::OneHead | Layout::OneRow | Layout::OneColumn => {
                stored.base = Array4::from_shape_simple_fn(stored.base.dim(), next)
            }
            _ => {
                let values = Array4::from_shape_simple_fn(dim, next);
                stored.view_mut().assign(&values);
            }
        }
        stored
    }

    /// All that lies beneath, also what no view of it shows.
    pub fn memory(&self) -> &Array4<T> {
        &self.base
    }

    pub fn view(&self) -> ArrayView4<'_, T> {
        let base = self.base.view();
        match self.layout {
            Layout::Standard => base,
            Layout::LengthFirst => base.permuted_axes([0, 2, 1, 3]),
            Layout::Reversed => {
                let mut view = base;
                (0..4).for_each(|axis| view.invert_axis(Axis(axis)));
                view
            }
            Layout::Sparse => base.slice_axis_move(Axis(3), Slice::new(1, None, 2)),
            Layout::Transposed => base.permuted_axes([0, 1, 3, 2]),
            Layout::Padded => {
                let (b, h, n, d) = self.dim;
                base.slice_move(ndarray::s![1..1 + b, ..h, 2..2 + n, 3..3 + d])
            }
            // A view into `self`, with an axis of stride 0.
            Layout::OneBatch | Layout::OneHead | Layout::OneRow | Layout::OneColumn => {
                let view = self.base.broadcast(self.dim);
                view.unwrap_or_else(|| panic!("{:?} from {:?}", self.dim, self.base.dim()))
            }
        }
    }

    /// # Panics
    /// If elements share places.
    pub fn view_mut(&mut self) -> ArrayViewMut4<'_, T> {
        let (b, h, n, d) = self.dim;
        let base = self.base.view_mut();
        match self.layout {
            Layout::Standard => base,
            Layout::LengthFirst => base.permuted_axes([0, 2, 1, 3]),
            Layout::Reversed => {
                let mut view = base;
                (0..4).for_each(|axis| view.invert_axis(Axis(axis)));
                view
            }
            Layout::Sparse => base.slice_axis_move(Axis(3), Slice::new(1, None, 2)),
            Layout::Transposed => base.permuted_axes([0, 1, 3, 2]),
            Layout::Padded => base.slice_move(ndarray::s![1..1 + b, ..h, 2..2 + n, 3..3 + d]),
            Layout::OneBatch | Layout::OneHead | Layout::OneRow | Layout::OneColumn => {
                panic!("{:?} is not for writing", self.layout)
            }
        }
    }
}
