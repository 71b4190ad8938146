//! The traits of mechanisms that choose keys and open what they are given: a call of any
//! element type, over arrays or caches, that their methods read.

/// [`Attention`](crate::attention::Attention) and [`Selects`](crate::attention::Selects) over
/// an input, of what the mechanism's own methods do with it once it is open:
///
/// ```text
/// open(&input, run)             calls run with the call, checked
/// choose(call, workspace)       the index
/// choice_bytes(call)            scratch of that
/// bytes(call, &index)           scratch of attention on it
/// run(call, &index, out, workspace)
/// price(&input, &index)         the cost
/// define_choice(call)           the index by definition, with its margins
/// define(call, &index)          the output by definition, and its bound
/// ```
macro_rules! opened {
    ($mechanism:ty, $index:ty, [$($generics:tt)*] $input:ty) => {
        impl<$($generics)*> crate::attention::Attention<$input> for $mechanism {
            /// Selects first: scratch of the attention depends on what is selected.
            fn workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                self.open(&x, |x| {
                    let index = self.choose(x, &mut crate::engine::workspace::Workspace::new())?;
                    Ok(self.choice_bytes(x)?.max(self.bytes(x, &index)?))
                })
            }

            fn forward_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::attend::check_out(&x, &out)?;
                self.open(&x, |x| {
                    let index = self.choose(x, workspace)?;
                    self.run(x, &index, out, workspace)
                })
            }

            fn reference(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                self.open(&x, |x| Ok(self.define(x, &self.define_choice(x)?.0)?.0))
            }

            fn cost(&self, x: $input) -> crate::error::Result<crate::attention::Cost> {
                self.price(&x, &crate::attention::Selects::select(self, x)?)
            }
        }

        impl<$($generics)*> crate::attention::Selects<$input> for $mechanism {
            type Index = $index;

            fn select(&self, x: $input) -> crate::error::Result<$index> {
                self.open(&x, |x| self.choose(x, &mut crate::engine::workspace::Workspace::new()))
            }

            fn workspace_bytes_on(&self, x: $input, index: &$index) -> crate::error::Result<usize> {
                self.open(&x, |x| self.bytes(x, index))
            }

            fn forward_on_into(
                &self,
                x: $input,
                index: &$index,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::attend::check_out(&x, &out)?;
                self.open(&x, |x| self.run(x, index, out, workspace))
            }

            fn reference_select(
                &self,
                x: $input,
            ) -> crate::error::Result<($index, crate::attention::Margins)> {
                self.open(&x, |x| self.define_choice(x))
            }

            fn reference_on(&self, x: $input, index: &$index) -> crate::error::Result<ndarray::Array4<f64>> {
                self.open(&x, |x| Ok(self.define(x, index)?.0))
            }

            fn bound_on(&self, x: $input, index: &$index) -> crate::error::Result<ndarray::Array3<f64>> {
                self.open(&x, |x| Ok(self.define(x, index)?.1))
            }

            fn difference(a: &$index, b: &$index, margins: &crate::attention::Margins) -> Option<String> {
                crate::stages::selecting::difference(a, b, margins)
            }
        }
    };
}
pub(crate) use opened;
