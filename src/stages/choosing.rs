//! Pipelines on an index: what a mechanism chooses first, then stages.

use ndarray::Array4;

use crate::attention::{Input, Margins};
use crate::definition::number::Real;
use crate::error::Result;
use crate::stages::pass::{Defined, Out, Pass, Pipeline};

/// A mechanism of several stages that run on an index. With [`choosing!`] it has
/// [`Attention`](crate::Attention) and [`Selects`](crate::Selects).
pub(crate) trait Choosing<X: Input>: Sized {
    type Index: Clone + std::fmt::Debug + PartialEq + Send + Sync;

    /// The index by the kernel.
    fn choose(&self, x: X) -> Result<Self::Index>;

    /// The index by definition, and what is in doubt.
    fn define_choice(&self, x: X) -> Result<(Self::Index, Margins)>;

    /// Multiply-adds of the choice, twice.
    fn choice_flops(&self, x: X) -> Result<u64>;

    /// The first place where two indices differ beyond doubt.
    fn differ(a: &Self::Index, b: &Self::Index, margins: &Margins) -> Option<String>;

    /// Checks the input and the index, and all stages. `out` is there where they
    /// really run.
    fn flow_on(&self, x: X, index: &Self::Index, pass: &mut Pass<'_>, out: Out<'_, X::Out>) -> Result<()>;

    /// The paper's formula on an index, after the same checks.
    fn define_on<R: Real>(&self, x: X, index: &Self::Index) -> Result<Array4<R>>;
}

/// A mechanism on an index.
pub(crate) struct OnIndex<'a, M, I>(pub(crate) &'a M, pub(crate) &'a I);

impl<X: Input, M: Choosing<X, Index = I>, I> Pipeline<X> for OnIndex<'_, M, I> {
    type State = ();

    fn flow(&self, x: X, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, X::Out>) -> Result<()> {
        self.0.flow_on(x, self.1, pass, out)
    }

    fn define<R: Real>(&self, x: X, _: Option<&()>) -> Result<Defined<R, ()>> {
        Ok((self.0.define_on(x, self.1)?, ()))
    }
}

/// The traits of a [`Choosing`] mechanism over inputs of a type with one parameter.
macro_rules! choosing {
    ($mechanism:ty, $index:ty, $input:ident) => {
        impl<T: crate::element::Element> crate::attention::Attention<$input<'_, T>> for $mechanism {
            /// Chooses first: what the stages work in depends on what is chosen.
            fn workspace_bytes(&self, x: $input<'_, T>) -> crate::error::Result<usize> {
                use crate::attention::Selects;
                self.workspace_bytes_on(x, &self.select(x)?)
            }

            fn forward_into(
                &self,
                x: $input<'_, T>,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                use crate::attention::Selects;
                self.forward_on_into(x, &self.select(x)?, out, workspace)
            }

            fn reference(&self, x: $input<'_, T>) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::attention::Selects;
                self.reference_on(x, &self.reference_select(x)?.0)
            }

            fn cost(&self, x: $input<'_, T>) -> crate::error::Result<crate::attention::Cost> {
                use crate::attention::Selects;
                use crate::stages::{
                    choosing::{Choosing, OnIndex},
                    pass::Pipeline,
                };
                let on = &OnIndex(self, &self.select(x)?);
                let cost = on.price(x, crate::input::tokens::Tokens::bytes(&x))?;
                Ok(crate::attention::Cost { flops: cost.flops.saturating_add(self.choice_flops(x)?), ..cost })
            }
        }

        impl<T: crate::element::Element> crate::attention::Selects<$input<'_, T>> for $mechanism {
            type Index = $index;

            fn select(&self, x: $input<'_, T>) -> crate::error::Result<$index> {
                crate::stages::choosing::Choosing::choose(self, x)
            }

            fn workspace_bytes_on(&self, x: $input<'_, T>, index: &$index) -> crate::error::Result<usize> {
                use crate::stages::{choosing::OnIndex, pass::Pipeline};
                Ok(OnIndex(self, index).dry(x, None, false)?.0)
            }

            fn forward_on_into(
                &self,
                x: $input<'_, T>,
                index: &$index,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                use crate::stages::{choosing::OnIndex, pass::Pipeline};
                OnIndex(self, index).wet(x, None, out, workspace)
            }

            fn reference_select(
                &self,
                x: $input<'_, T>,
            ) -> crate::error::Result<($index, crate::attention::Margins)> {
                crate::stages::choosing::Choosing::define_choice(self, x)
            }

            fn reference_on(
                &self,
                x: $input<'_, T>,
                index: &$index,
            ) -> crate::error::Result<ndarray::Array4<f64>> {
                crate::stages::choosing::Choosing::define_on::<f64>(self, x, index)
            }

            fn bound_on(
                &self,
                x: $input<'_, T>,
                index: &$index,
            ) -> crate::error::Result<ndarray::Array3<f64>> {
                use crate::stages::{choosing::OnIndex, pass::Pipeline};
                OnIndex(self, index).bound(x)
            }

            fn difference(a: &$index, b: &$index, margins: &crate::attention::Margins) -> Option<String> {
                <Self as crate::stages::choosing::Choosing<$input<'_, T>>>::differ(a, b, margins)
            }
        }
    };
}
pub(crate) use choosing;
