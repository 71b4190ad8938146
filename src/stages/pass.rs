//! Pipelines: what a mechanism of several stages does, written once and run
//! dry (which counts the memory and the operations) or wet (which does it).

use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut4, Axis, ShapeBuilder};

use crate::attention::Cost;
use crate::definition::number::{Real, Running};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Input};
use crate::simd::MAX_LANES;
use crate::simd::mem::{Arena, bytes_for};
use crate::stages::recur::check_out;

/// One run of a pipeline.
pub(crate) struct Pass<'a>(Kind<'a>);

enum Kind<'a> {
    /// Bytes that are taken, the most that were at any time, and operations.
    Dry {
        taken: usize,
        most: usize,
        flops: u64,
        counts: bool,
    },
    Wet(Arena<'a>),
}

impl<'a> Pass<'a> {
    /// A run that counts bytes and, if `counts`, operations.
    fn dry(counts: bool) -> Self {
        Self(Kind::Dry { taken: 0, most: 0, flops: 0, counts })
    }

    /// Numbers that stay to the end of the run, of any value; none in a dry
    /// run.
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a mut [f32]> {
        match &mut self.0 {
            Kind::Dry { taken, most, .. } => {
                let fits = n.checked_mul(size_of::<f32>()).filter(|&bytes| bytes < isize::MAX as usize / 2);
                let bytes = fits.ok_or_else(|| Error::value("workspace", "sizes that memory has", n))?;
                *taken = taken.saturating_add(bytes.next_multiple_of(bytes_for::<u8>(1)));
                *most = (*most).max(*taken);
                Ok(&mut [])
            }
            Kind::Wet(arena) => Ok(arena.take(n)),
        }
    }

    /// [`take`](Self::take) for rows of an array.
    pub(crate) fn rows(&mut self, dim: Dim4) -> Result<Scratch<'a>> {
        let (batch, heads, len, width) = dim;
        let stride = width.next_multiple_of(MAX_LANES);
        let n = [heads, len, stride.max(1)].iter().try_fold(batch, |n, &x| n.checked_mul(x));
        let n = n.map(|n| if width == 0 { 0 } else { n });
        let n =
            n.ok_or_else(|| Error::value("workspace", "sizes that memory has", format_args!("{dim:?}")))?;
        Ok(Scratch { dim, stride, numbers: self.take(n)? })
    }

    /// Stages whose numbers are free again after them.
    pub(crate) fn within<R>(&mut self, run: impl for<'b> FnOnce(&mut Pass<'b>) -> Result<R>) -> Result<R> {
        match &mut self.0 {
            Kind::Dry { taken, most, flops, counts } => {
                let (taken, counts) = (*taken, *counts);
                let mut inner = Pass(Kind::Dry { taken, most: *most, flops: *flops, counts });
                let result = run(&mut inner);
                if let Kind::Dry { most: inner_most, flops: inner_flops, .. } = inner.0 {
                    (*most, *flops) = (inner_most, inner_flops);
                }
                result
            }
            Kind::Wet(arena) => run(&mut Pass(Kind::Wet(arena.reborrow()))),
        }
    }

    /// One stage: what it counts as, the bytes that it works in, and what it
    /// does.
    pub(crate) fn stage(
        &mut self,
        operations: impl FnOnce() -> u64,
        bytes: usize,
        run: impl FnOnce(Arena<'_>),
    ) {
        match &mut self.0 {
            Kind::Dry { taken, most, flops, counts } => {
                *most = (*most).max(taken.saturating_add(bytes));
                if *counts {
                    *flops = flops.saturating_add(operations());
                }
            }
            Kind::Wet(arena) => run(arena.reborrow()),
        }
    }
}

/// Rows in scratch, `[batch, heads, len, dim]`, whole vectors apart. In a dry
/// run they have their sizes, and no memory.
#[derive(Debug)]
pub(crate) struct Scratch<'a> {
    dim: Dim4,
    stride: usize,
    numbers: &'a mut [f32],
}

impl Scratch<'_> {
    pub(crate) fn view(&self) -> ArrayView4<'_, f32> {
        // Of no memory, or of nothing: sizes alone.
        if self.numbers.is_empty() {
            let sizes = ArrayView4::from_shape(self.dim.strides((0, 0, 0, 0)), &[0.0]);
            return sizes.expect("sizes that memory has");
        }
        let (_, h, n, _) = self.dim;
        let strides = (h * n * self.stride, n * self.stride, self.stride, 1);
        ArrayView4::from_shape(self.dim.strides(strides), self.numbers).expect("rows of this stride")
    }

    /// Rows that are those of several heads, one after the other, as an array
    /// `[batch, heads, len, dim]`.
    pub(crate) fn of_heads(&self, heads: usize, dim: usize) -> ArrayView4<'_, f32> {
        let (batch, _, len, _) = self.dim;
        let dim = (batch, len, heads, dim);
        let strides = (len * self.stride, self.stride, dim.3, 1);
        let (strides, numbers) =
            if self.numbers.is_empty() { ((0, 0, 0, 0), &[0.0][..]) } else { (strides, &*self.numbers) };
        let all = ArrayView4::from_shape(dim.strides(strides), numbers).expect("rows of this stride");
        all.permuted_axes([0, 2, 1, 3])
    }

    /// The same to write into; nothing in a dry run.
    pub(crate) fn of_heads_mut(&mut self, heads: usize, dim: usize) -> Option<ArrayViewMut4<'_, f32>> {
        let (batch, _, len, _) = self.dim;
        let strides = (len * self.stride, self.stride, dim, 1);
        let all = ArrayViewMut4::from_shape((batch, len, heads, dim).strides(strides), self.numbers).ok()?;
        Some(all.permuted_axes([0, 2, 1, 3]))
    }

    /// To write into; nothing in a dry run.
    pub(crate) fn view_mut(&mut self) -> Option<ArrayViewMut4<'_, f32>> {
        let (_, h, n, _) = self.dim;
        let strides = (h * n * self.stride, n * self.stride, self.stride, 1);
        ArrayViewMut4::from_shape(self.dim.strides(strides), self.numbers).ok()
    }

    pub(crate) fn dim(&self) -> Dim4 {
        self.dim
    }

    /// From one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// The rows with what lies between them.
    pub(crate) fn numbers(&self) -> &[f32] {
        self.numbers
    }

    pub(crate) fn numbers_mut(&mut self) -> &mut [f32] {
        self.numbers
    }
}

/// An array of sizes alone, for a dry run.
pub(crate) fn of_no_memory<'a>(dim: Dim4) -> Result<ArrayView4<'a, f32>> {
    let all = ArrayView4::from_shape(dim.strides((0, 0, 0, 0)), &[0.0]);
    all.map_err(|_| Error::value("workspace", "sizes that memory has", format_args!("{dim:?}")))
}

/// Where a pipeline writes: nowhere in a dry run.
pub(crate) type Out<'a, T> = Option<ArrayViewMut4<'a, T>>;

/// What a definition gives: outputs `[batch, heads, len, value_dim]`, and the
/// state after the last token where there is one.
pub(crate) type Defined<R, S> = (Array4<R>, S);

/// A mechanism that is a pipeline of stages. With [`composite!`] it has
/// [`Attention`](crate::Attention) and [`Bounded`](crate::Bounded), and
/// [`Recurrent`](crate::Recurrent) where it has a state.
pub(crate) trait Pipeline<X: Input> {
    /// What is carried from call to call; `()` is nothing.
    type State;

    /// Checks the input, and all stages, from and to a state if there is one.
    /// `out` is there where they really run.
    fn flow(
        &self,
        x: X,
        state: Option<&mut Self::State>,
        pass: &mut Pass<'_>,
        out: Out<'_, X::Out>,
    ) -> Result<()>;

    /// The paper's formula, after the same checks.
    fn define<R: Real>(&self, x: X, state: Option<&Self::State>) -> Result<Defined<R, Self::State>>;

    /// Bytes of parameters, which are read besides the input.
    fn parameters(&self) -> usize {
        0
    }

    fn dry(&self, x: X, state: Option<&mut Self::State>, counts: bool) -> Result<(usize, u64)> {
        let mut pass = Pass::dry(counts);
        self.flow(x, state, &mut pass, None)?;
        match pass.0 {
            Kind::Dry { most, flops, .. } => Ok((most, flops)),
            Kind::Wet(_) => Ok((0, 0)),
        }
    }

    fn wet(
        &self,
        x: X,
        mut state: Option<&mut Self::State>,
        mut out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (bytes, _) = self.dry(x, state.as_deref_mut(), false)?;
        check_out(&x, &out)?;
        self.flow(x, state, &mut Pass(Kind::Wet(workspace.arena(bytes)?)), Some(out.view_mut()))?;
        // Stages may have made something of rows that are no sequence's.
        x.lengths().fill_rest(&mut out, false, X::Out::default());
        Ok(())
    }

    fn price(&self, x: X, bytes: usize) -> Result<Cost> {
        let (_, flops) = self.dry(x, None, true)?;
        let (batch, heads, len, dim) = x.out_dim()?;
        let out = batch * heads * len * dim * size_of::<X::Out>();
        Ok(Cost { flops, bytes: (bytes + self.parameters() + out) as u64 })
    }

    /// How far each row may be off.
    fn bound(&self, x: X) -> Result<Array3<f64>> {
        self.bound_by::<Running>(x)
    }

    /// The same, as these numbers count it.
    fn bound_by<R: Real>(&self, x: X) -> Result<Array3<f64>> {
        let out = self.define::<R>(x, None)?.0;
        Ok(out.map_axis(Axis(3), |row| {
            let off = |x: &R| x.off() + f32::ROUNDING * x.value().abs();
            row.iter()
                .map(off)
                .fold(0.0, |most: f64, off| if off > most || off.is_nan() { off } else { most })
        }))
    }
}

/// The traits of a [`Pipeline`] over inputs of a type with one parameter, or of any.
macro_rules! composite {
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, $input:ident) => {
        $crate::stages::pass::composite!(
            $mechanism, [T: crate::element::Element $($(, $param: $bound)+)?] $input<'_, T>
        );
    };
    ($mechanism:ty, [$($generics:tt)*] $input:ty) => {
        impl<$($generics)*> crate::attention::Attention<$input> for $mechanism {
            fn workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                use crate::stages::pass::Pipeline;
                Ok(self.dry(x, None, false)?.0)
            }

            fn forward_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::pass::Pipeline::wet(self, x, None, out, workspace)
            }

            fn reference(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                Ok(crate::stages::pass::Pipeline::define::<f64>(self, x, None)?.0)
            }

            fn cost(&self, x: $input) -> crate::error::Result<crate::attention::Cost> {
                crate::stages::pass::Pipeline::price(self, x, crate::input::tokens::Tokens::bytes(&x))
            }
        }

        impl<$($generics)*> crate::attention::Bounded<$input> for $mechanism {
            fn error_bound(&self, x: $input) -> crate::error::Result<ndarray::Array3<f64>> {
                crate::stages::pass::Pipeline::bound(self, x)
            }
        }
    };
    ($mechanism:ty, $input:ident, state $state:ty) => {
        crate::stages::pass::composite!($mechanism, $input);

        impl<T: crate::element::Element> crate::attention::Recurrent<$input<'_, T>> for $mechanism {
            type State = $state;

            fn initial_state(&self, x: $input<'_, T>) -> crate::error::Result<$state> {
                self.empty(&x)
            }

            fn prefill_into(
                &self,
                x: $input<'_, T>,
                state: &mut $state,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::pass::Pipeline::wet(self, x, Some(state), out, workspace)
            }

            fn reference_from(
                &self,
                x: $input<'_, T>,
                state: &$state,
            ) -> crate::error::Result<(ndarray::Array4<f64>, $state)> {
                crate::stages::pass::Pipeline::define::<f64>(self, x, Some(state))
            }
        }
    };
}
pub(crate) use composite;

/// Runs some stages dry, to count, and then in memory of their own.
pub(crate) fn once<R>(mut run: impl for<'a> FnMut(&mut Pass<'a>) -> Result<R>) -> Result<R> {
    let bytes = counted(&mut run)?;
    run_in(&mut Workspace::new(), bytes, run)
}

/// How many bytes some stages work in.
pub(crate) fn counted<R>(run: impl for<'a> FnOnce(&mut Pass<'a>) -> Result<R>) -> Result<usize> {
    let mut dry = Pass::dry(false);
    run(&mut dry)?;
    match dry.0 {
        Kind::Dry { most, .. } => Ok(most),
        Kind::Wet(_) => Ok(0),
    }
}

/// Runs some stages in memory of as many bytes as were counted.
pub(crate) fn run_in<R>(
    workspace: &mut Workspace,
    bytes: usize,
    run: impl for<'a> FnOnce(&mut Pass<'a>) -> Result<R>,
) -> Result<R> {
    run(&mut Pass(Kind::Wet(workspace.arena(bytes)?)))
}

/// Runs a stage alone, in just the memory that it asks for.
#[cfg(test)]
pub(crate) fn alone<R>(run: impl for<'a> Fn(&mut Pass<'a>) -> Result<R>) -> R {
    let mut dry = Pass::dry(true);
    run(&mut dry).unwrap();
    let Kind::Dry { most, .. } = dry.0 else { panic!("wet") };
    let mut workspace = Workspace::with_capacity(most);
    let before = workspace.capacity();
    let result = run(&mut Pass(Kind::Wet(workspace.arena(most).unwrap()))).unwrap();
    assert_eq!(workspace.capacity(), before);
    result
}
