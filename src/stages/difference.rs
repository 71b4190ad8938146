//! The difference of two outputs, row by row.

use ndarray::{ArrayView3, ArrayView4, ArrayViewMut4};

use crate::attention::Input;
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::engine::{self, parallel};
use crate::error::{Error, Result};
use crate::input::Dim4;
use crate::simd::any::{AnyArray, AnyOut};
use crate::simd::exp::sigmoid;
use crate::simd::mem::{Arena, Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::attend::Attending;

/// Rows of a task.
const ROWS: usize = 64;

/// What becomes of a row after the difference: its root mean square is divided
/// by, each element multiplied by its weight.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Vec<f32>,
    pub(crate) epsilon: f32,
}

impl RmsNorm {
    /// Of one weight a column.
    ///
    /// # Errors
    /// [`Error::Value`] for a weight that is not finite, and an epsilon that is not above 0.
    pub(crate) fn new(weight: Vec<f32>, epsilon: f32) -> Result<Self> {
        if let Some(x) = weight.iter().find(|x| !x.is_finite()) {
            return Err(Error::value("weight", "finite numbers", x));
        }
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(Error::value("epsilon", "a number above 0 and finite", epsilon));
        }
        Ok(Self { weight, epsilon })
    }
}

/// How the outputs of two calls of one attention are subtracted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subtracting {
    /// Whether lambda goes through a logistic function.
    pub(crate) logits: bool,
    pub(crate) norm: Option<RmsNorm>,
}

/// Numbers of both outputs, which are kept in `f32` until they are subtracted.
fn scratch(dims: [Dim4; 2]) -> [usize; 2] {
    dims.map(|(batch, heads, len, dim)| batch * heads * len * dim)
}

impl Subtracting {
    /// Refuses weights of another number of columns than the output has.
    pub(crate) fn check(&self, out: Dim4) -> Result<()> {
        match &self.norm {
            Some(norm) if norm.weight.len() != out.3 => Err(Error::value(
                "weight",
                format!("one for each of the {} value columns", out.3),
                norm.weight.len(),
            )),
            _ => Ok(()),
        }
    }

    /// Scratch of the calls for these inputs, the signal first.
    pub(crate) fn workspace_bytes<X: Input>(
        &self,
        attention: &impl Attending<X>,
        x: [X; 2],
    ) -> Result<usize> {
        let dims = [x[0].out_dim()?, x[1].out_dim()?];
        let outputs: usize = scratch(dims).map(bytes_for::<f32>).iter().sum();
        let signal = attention.with_call(x[0], engine::workspace_bytes)?;
        let noise = attention.with_call(x[1], engine::workspace_bytes)?;
        Ok(outputs + signal.max(noise).max(workspace_bytes(dims[0])))
    }

    /// Writes the signal's output less `lambda` times the noise's, each of which has a softmax
    /// of its own. Shapes have been checked then.
    pub(crate) fn run<X: Input>(
        &self,
        attention: &impl Attending<X>,
        x: [X; 2],
        lambda: ArrayView3<'_, f32>,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let dims = [x[0].out_dim()?, x[1].out_dim()?];
        let mut arena = workspace.arena(self.workspace_bytes(attention, x)?)?;
        let [first, second] = scratch(dims).map(|n| arena.take::<f32>(n));
        let view = |x, dim| {
            ArrayViewMut4::from_shape(dim, x).map_err(|_| Error::too_large("out", format!("{dim:?}")))
        };
        let (mut first, mut second) = (view(first, dims[0])?, view(second, dims[1])?);
        let mut isa = Isa::Scalar;
        attention.with_call(x[0], |call: &Call<'_>| {
            isa = call.isa;
            engine::run_in(call, first.view_mut(), None, arena.reborrow());
        })?;
        attention.with_call(x[1], |call| engine::run_in(call, second.view_mut(), None, arena.reborrow()))?;
        let (a, b, lambda) = (first.view(), second.view(), lambda.reborrow());
        Difference { isa, a, b, lambda, logits: self.logits, norm: self.norm.as_ref() }.run(out, arena);
        Ok(())
    }
}

/// `y[b, h, i, ..] = a[b, h, i, ..] - lambda[b, h, i] b[b, h / r, i, ..]`, where `b`
/// has one head for `r` of `a`.
pub(crate) struct Difference<'a> {
    pub(crate) isa: Isa,
    pub(crate) a: ArrayView4<'a, f32>,
    pub(crate) b: ArrayView4<'a, f32>,
    pub(crate) lambda: ArrayView3<'a, f32>,
    /// Whether lambda goes through a logistic function.
    pub(crate) logits: bool,
    pub(crate) norm: Option<&'a RmsNorm>,
}

/// Bytes of scratch for an output of this shape.
pub(crate) fn workspace_bytes((batch, heads, len, dim): (usize, usize, usize, usize)) -> usize {
    bytes_for::<u64>(claim_words(batch * heads * len))
        + bytes_for_shares(parallel::threads(), share_bytes(dim))
}

fn share_bytes(dim: usize) -> usize {
    bytes_for::<f32>(dim.next_multiple_of(MAX_LANES))
}

impl Difference<'_> {
    /// Writes the difference, in scratch of [`workspace_bytes`].
    pub(crate) fn run<T: Element>(&self, out: ArrayViewMut4<'_, T>, mut arena: Arena<'_>) {
        let (batch, heads, len, dim) = self.a.dim();
        assert!(out.dim() == self.a.dim() && self.lambda.dim() == (batch, heads, len));
        let out = &T::any_out(OutRows::new(out, arena.take(claim_words(batch * heads * len))));
        let [a, b] = [&self.a, &self.b].map(|x| f32_array(x.reborrow()));
        let (blocks, workers) = (len.div_ceil(ROWS), parallel::threads());
        let shares = arena.shares(workers, share_bytes(dim));
        let start = |worker: usize| shares.take(worker).take::<f32>(dim.next_multiple_of(MAX_LANES));
        parallel::for_each(workers, batch * heads * blocks, start, |row, task| {
            let (place, block) = (task / blocks, task % blocks);
            let [batch, head] = [place / heads, place % heads];
            let rows = block * ROWS..((block + 1) * ROWS).min(len);
            self.isa.dispatch(Rows { stage: self, a, b, batch, head, rows, row, out });
        });
    }
}

fn f32_array(x: ArrayView4<'_, f32>) -> AnyArray<'_> {
    AnyArray::F32(Heads::new(x))
}

/// Some rows of one head.
struct Rows<'a, 'b, 'c, 'd> {
    stage: &'a Difference<'c>,
    a: AnyArray<'b>,
    b: AnyArray<'b>,
    batch: usize,
    head: usize,
    rows: std::ops::Range<usize>,
    row: &'a mut [f32],
    out: &'a AnyOut<'d>,
}

impl Kernel for Rows<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { stage, a, b, batch, head, rows, row, out } = self;
        let (_, heads, _, dim) = stage.a.dim();
        let second = head / (heads / stage.b.dim().1);
        let (a, b) = (a.rows(batch, head, &rows), b.rows(batch, second, &rows));
        let mut out = out.take(batch, head, rows.clone());
        for (i, at) in rows.enumerate() {
            let lambda = s.splat(stage.lambda[[batch, head, at]]);
            let lambda = s.sub(s.splat(0.0), if stage.logits { sigmoid(s, lambda) } else { lambda });
            let mut squares = s.splat(0.0);
            for (j, y) in row.chunks_exact_mut(S::LANES).enumerate().take(dim.div_ceil(S::LANES)) {
                let x = s.mul_add(lambda, b.load(s, i, j * S::LANES), a.load(s, i, j * S::LANES));
                squares = s.mul_add(x, x, squares);
                s.store(y, x);
            }
            let mut factor = 1.0;
            if let Some(norm) = stage.norm {
                factor = 1.0 / (s.reduce_add(squares) / dim as f32 + norm.epsilon).sqrt();
                for (y, w) in row.chunks_exact_mut(S::LANES).zip(norm.weight.chunks(S::LANES)) {
                    s.store(y, s.mul(s.load(y), s.load_tail(w)));
                }
            }
            out.write(s, i, row, factor);
        }
    }
}
