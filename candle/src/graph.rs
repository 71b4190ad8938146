//! Outputs of any number of inputs in candle's graph.
//!
//! candle tracks at most three arguments of an operator from outside. A [`Link`]
//! stands for up to three tensors: in the forward pass a tensor of as many elements
//! as they have together, none of which is ever read or written; in the backward
//! pass its gradient is theirs, one after the other. An operator over three links
//! has nine tracked inputs, and nothing is copied on the way forth.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Tensor};

use crate::arrays::{Made, constant, zeros};

/// Gradients of all inputs, each in the order of its axes, given that of the output.
pub(crate) type Pull = Box<dyn Fn(&Tensor) -> Result<Vec<Vec<f32>>> + Send + Sync>;

/// Inputs of a link, and links of an output.
const MOST: usize = 3;

/// An output that has been computed from `inputs`, in the graph. Where `pull` is none,
/// asking for gradients is an error.
pub(crate) fn output(
    name: &'static str,
    inputs: &[&Tensor],
    made: Made,
    pull: impl FnOnce() -> Option<Pull>,
) -> Result<Tensor> {
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(constant(made));
    }
    let links = inputs.chunks(MOST).map(link).collect::<Result<Vec<_>>>()?;
    let sizes = inputs.chunks(MOST).map(<[_]>::len).collect();
    let op = Output { name, made: Mutex::new(Some(made)), pull: pull(), sizes };
    apply(&links.iter().collect::<Vec<_>>(), op)
}

/// An operator of one to three arguments.
fn apply<C: CustomOp1 + CustomOp2 + CustomOp3 + Send + Sync + 'static>(
    arguments: &[&Tensor],
    op: C,
) -> Result<Tensor> {
    match arguments {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => Err(Error::Msg(format!("one to {MOST} arguments, not {}", arguments.len())).bt()),
    }
}

fn link(inputs: &[&Tensor]) -> Result<Tensor> {
    apply(inputs, Link)
}

/// Something with as many gradients as arguments.
trait Pulls {
    fn title(&self) -> &'static str;

    fn make(&self, layouts: &[&Layout]) -> Result<Made>;

    fn pull(&self, arguments: &[&Tensor], gradient: &Tensor) -> Result<Vec<Option<Tensor>>>;
}

struct Link;

impl Pulls for Link {
    fn title(&self) -> &'static str {
        "inputs"
    }

    fn make(&self, layouts: &[&Layout]) -> Result<Made> {
        let elements = layouts.iter().map(|layout| layout.shape().elem_count());
        let elements = elements.fold(0, usize::saturating_add);
        Ok((CpuStorage::F32(zeros("inputs", &[elements])?), Shape::from(elements)))
    }

    fn pull(&self, arguments: &[&Tensor], gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let mut first = 0;
        let mut part = |argument: &&Tensor| {
            let elements = argument.elem_count();
            let part = gradient.narrow(0, first, elements)?;
            first += elements;
            part.reshape(argument.shape())?.to_dtype(argument.dtype()).map(Some)
        };
        arguments.iter().map(&mut part).collect()
    }
}

struct Output {
    name: &'static str,
    made: Mutex<Option<Made>>,
    pull: Option<Pull>,
    /// Inputs of each link.
    sizes: Vec<usize>,
}

impl Pulls for Output {
    fn title(&self) -> &'static str {
        self.name
    }

    fn make(&self, _: &[&Layout]) -> Result<Made> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.take().ok_or_else(|| Error::Msg(format!("{} is made once", self.name)).bt())
    }

    fn pull(&self, arguments: &[&Tensor], gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let pull = self.pull.as_ref().ok_or(Error::BackwardNotSupported { op: self.name })?;
        let mut gradients = pull(&gradient.to_dtype(DType::F32)?)?.into_iter();
        let mut of_link = |(argument, &inputs): (&&Tensor, &usize)| {
            let all = gradients.by_ref().take(inputs).collect::<Vec<_>>().concat();
            let shape = Shape::from(all.len());
            argument.track_op().then(|| constant((CpuStorage::F32(all), shape)))
        };
        Ok(arguments.iter().zip(&self.sizes).map(&mut of_link).collect())
    }
}

macro_rules! operators {
    ($($op:ty),+) => {$(
        impl CustomOp1 for $op {
            fn name(&self) -> &'static str {
                self.title()
            }

            fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<Made> {
                self.make(&[layout])
            }

            fn bwd(&self, a: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
                let mut all = self.pull(&[a], gradient)?.into_iter();
                Ok(all.next().flatten())
            }
        }

        impl CustomOp2 for $op {
            fn name(&self) -> &'static str {
                self.title()
            }

            fn cpu_fwd(
                &self,
                _: &CpuStorage,
                a: &Layout,
                _: &CpuStorage,
                b: &Layout,
            ) -> Result<Made> {
                self.make(&[a, b])
            }

            fn bwd(
                &self,
                a: &Tensor,
                b: &Tensor,
                _: &Tensor,
                gradient: &Tensor,
            ) -> Result<(Option<Tensor>, Option<Tensor>)> {
                let mut all = self.pull(&[a, b], gradient)?.into_iter();
                Ok((all.next().flatten(), all.next().flatten()))
            }
        }

        impl CustomOp3 for $op {
            fn name(&self) -> &'static str {
                self.title()
            }

            fn cpu_fwd(
                &self,
                _: &CpuStorage,
                a: &Layout,
                _: &CpuStorage,
                b: &Layout,
                _: &CpuStorage,
                c: &Layout,
            ) -> Result<Made> {
                self.make(&[a, b, c])
            }

            fn bwd(
                &self,
                a: &Tensor,
                b: &Tensor,
                c: &Tensor,
                _: &Tensor,
                gradient: &Tensor,
            ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
                let mut all = self.pull(&[a, b, c], gradient)?.into_iter();
                Ok((all.next().flatten(), all.next().flatten(), all.next().flatten()))
            }
        }
    )+};
}
operators!(Link, Output);
