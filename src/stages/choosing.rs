//! Pipelines on an index: what a mechanism chooses first, then stages.

use ndarray::Array4;

use crate::attention::{Input, Margins};
use crate::definition::number::Real;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::stages::pass::{Defined, Out, Pass, Pipeline};

/// A mechanism of several stages that run on an index. With [`choosing!`] it has
/// [`Attention`](crate::Attention) and [`Selects`](crate::Selects).
pub(crate) trait Choosing<X: Input>: Sized {
    type Index: Clone + std::fmt::Debug + PartialEq + Send + Sync;

    /// The index by the kernel.
    fn choose(&self, x: X, workspace: &mut Workspace) -> Result<Self::Index>;

    /// Bytes that the choice takes from its workspace.
    fn choice_bytes(&self, x: X) -> Result<usize> {
        let _ = x;
        Ok(0)
    }

    /// The index by definition, and what is in doubt.
    fn define_choice(&self, x: X) -> Result<(Self::Index, Margins)>;

    /// Multiply-adds of the choice, twice, where it is none of the stages.
    fn choice_flops(&self, x: X) -> Result<u64> {
        let _ = x;
        Ok(0)
    }

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

/// A mechanism whose stages make what it chooses of: they run once for both. With
/// [`choosing!`]`(.., at once)` these are its [`Attention`](crate::Attention).
pub(crate) trait AtOnce<X: Input>: Choosing<X> {
    /// Checks the input, and all stages, the choice among them.
    fn flow(&self, x: X, pass: &mut Pass<'_>, out: Out<'_, X::Out>) -> Result<()>;
}

/// Such a mechanism on an index of its own.
pub(crate) struct OnOwn<'a, M>(pub(crate) &'a M);

impl<X: Input + Copy, M: AtOnce<X>> Pipeline<X> for OnOwn<'_, M> {
    type State = ();

    fn flow(&self, x: X, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, X::Out>) -> Result<()> {
        self.0.flow(x, pass, out)
    }

    fn define<R: Real>(&self, x: X, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (index, _) = self.0.define_choice(x)?;
        Ok((self.0.define_on(x, &index)?, ()))
    }
}

/// The traits of a [`Choosing`] mechanism over inputs of a type with one parameter, or of
/// some in brackets.
macro_rules! choosing {
    ($mechanism:ty, $index:ty, $input:ident, at once) => {
        $crate::stages::choosing::choosing!(
            @once [T: crate::element::Element] $mechanism, $index, $input<'_, T>
        );
    };
    ($mechanism:ty, $index:ty, $input:ident) => {
        $crate::stages::choosing::choosing!(
            @first [T: crate::element::Element] $mechanism, $index, $input<'_, T>
        );
    };
    ($mechanism:ty, $index:ty, [$($generics:tt)*] $input:ty) => {
        $crate::stages::choosing::choosing!(@first [$($generics)*] $mechanism, $index, $input);
    };
    (@once [$($generics:tt)*] $mechanism:ty, $index:ty, $input:ty) => {
        impl<$($generics)*> crate::attention::Attention<$input> for $mechanism {
            fn workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                use crate::stages::{choosing::OnOwn, pass::Pipeline};
                Ok(OnOwn(self).dry(x, None, false)?.0)
            }

            fn forward_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                use crate::stages::{choosing::OnOwn, pass::Pipeline};
                OnOwn(self).wet(x, None, out, workspace)
            }

            fn reference(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::stages::{choosing::OnOwn, pass::Pipeline};
                Ok(OnOwn(self).define::<f64>(x, None)?.0)
            }

            fn cost(&self, x: $input) -> crate::error::Result<crate::attention::Cost> {
                use crate::stages::{choosing::OnOwn, pass::Pipeline};
                OnOwn(self).price(x, crate::input::tokens::Tokens::bytes(&x))
            }
        }
        crate::stages::choosing::choosing!(@selects [$($generics)*] $mechanism, $index, $input);
    };
    (@first [$($generics:tt)*] $mechanism:ty, $index:ty, $input:ty) => {
        impl<$($generics)*> crate::attention::Attention<$input> for $mechanism {
            /// Chooses first: what the stages work in depends on what is chosen.
            fn workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                use crate::{attention::Selects, stages::choosing::Choosing};
                let bytes = self.choice_bytes(x)?;
                Ok(bytes.max(self.workspace_bytes_on(x, &self.select(x)?)?))
            }

            fn forward_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                use crate::{attention::Selects, stages::choosing::Choosing};
                crate::stages::recur::check_out(&x, &out)?;
                let index = self.choose(x, workspace)?;
                self.forward_on_into(x, &index, out, workspace)
            }

            fn reference(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::attention::Selects;
                self.reference_on(x, &self.reference_select(x)?.0)
            }

            fn cost(&self, x: $input) -> crate::error::Result<crate::attention::Cost> {
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
        crate::stages::choosing::choosing!(@selects [$($generics)*] $mechanism, $index, $input);
    };
    (@selects [$($generics:tt)*] $mechanism:ty, $index:ty, $input:ty) => {
        impl<$($generics)*> crate::attention::Selects<$input> for $mechanism {
            type Index = $index;

            fn select(&self, x: $input) -> crate::error::Result<$index> {
                use crate::{engine::workspace::Workspace, stages::choosing::Choosing};
                self.choose(x, &mut Workspace::new())
            }

            fn workspace_bytes_on(&self, x: $input, index: &$index) -> crate::error::Result<usize> {
                use crate::stages::{choosing::OnIndex, pass::Pipeline};
                Ok(OnIndex(self, index).dry(x, None, false)?.0)
            }

            fn forward_on_into(
                &self,
                x: $input,
                index: &$index,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                use crate::stages::{choosing::OnIndex, pass::Pipeline};
                OnIndex(self, index).wet(x, None, out, workspace)
            }

            fn reference_select(
                &self,
                x: $input,
            ) -> crate::error::Result<($index, crate::attention::Margins)> {
                crate::stages::choosing::Choosing::define_choice(self, x)
            }

            fn reference_on(
                &self,
                x: $input,
                index: &$index,
            ) -> crate::error::Result<ndarray::Array4<f64>> {
                crate::stages::choosing::Choosing::define_on::<f64>(self, x, index)
            }

            fn bound_on(
                &self,
                x: $input,
                index: &$index,
            ) -> crate::error::Result<ndarray::Array3<f64>> {
                use crate::stages::{choosing::OnIndex, pass::Pipeline};
                OnIndex(self, index).bound(x)
            }

            fn difference(a: &$index, b: &$index, margins: &crate::attention::Margins) -> Option<String> {
                <Self as crate::stages::choosing::Choosing<$input>>::differ(a, b, margins)
            }
        }
    };
}
pub(crate) use choosing;
