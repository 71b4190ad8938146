//! Heads whose keys and values come from one row a token: matrices of the
//! heads before and after a call of the attention engine, in either order of
//! the sums.

mod input;

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis, aview0, s};

use crate::attention::Cost;
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Arrays, Call, Norm};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv};
use crate::mask::Mask;
use crate::score::Plain;
use crate::simd::Isa;
use crate::simd::mem::{Arena, bytes_for};
use crate::stages::attend::{Config, check_lse, check_out, price};
use crate::stages::project::Project;

pub use input::Latents;
pub(crate) use input::Sizes;
use input::Tokens;

/// The order of the sums: see the [module](crate::latent).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// Queries take up `W_UK`, outputs `W_UV`: for few queries over many keys.
    #[default]
    Absorbed,
    /// Keys and values of every head are made first: for long prompts, over
    /// arrays.
    Expanded,
}

/// Attention of heads over latents.
#[derive(Clone, Debug)]
pub(crate) struct LatentHeads<M> {
    pub(crate) config: Config<M, Plain>,
    pub(crate) form: Form,
}

/// Bytes of keys and values that are held at once, unless one head has more.
const HELD: usize = 64 << 20;

const NORM: Norm<'static> = Norm::Softmax { sinks: None };

/// How a call is cut up: groups of heads are worked off one after the other,
/// all of them at once where they are absorbed.
struct Plan {
    form: Form,
    isa: Isa,
    dims: Dims,
    sizes: Sizes,
    /// Size of the batch axis.
    entries: usize,
    /// Heads of a group.
    heads: usize,
    /// Rows of a head in the two arrays that are made (absorbed: queries and
    /// sums of latents; expanded: keys and values), and their columns.
    len: usize,
    cols: [usize; 2],
}

impl Plan {
    /// The shapes of the two arrays for so many heads.
    fn made(&self, heads: usize) -> [Dim4; 2] {
        self.cols.map(|cols| (self.entries, heads, self.len, cols))
    }

    fn project(&self, heads: usize, inner: usize, width: usize) -> Project {
        let &Self { isa, entries: batch, len, .. } = self;
        Project { isa, batch, heads, len, inner, width }
    }

    /// The two arrays, to be written.
    fn take<'a>(&self, heads: usize, arena: &mut Arena<'a>) -> [ArrayViewMut4<'a, f32>; 2] {
        self.made(heads).map(|dim| {
            let (b, h, n, d) = dim;
            ArrayViewMut4::from_shape(dim, arena.take(b * h * n * d)).expect("as many elements")
        })
    }
}

impl<M: Mask> LatentHeads<M> {
    fn plan<T: Element, O: Element>(&self, x: &Latents<'_, T, O>, form: Form) -> Result<Plan> {
        let (dims, sizes, entries) = (self.config.checked(x.dims()?)?, x.sizes(), x.q.dim().0);
        let (len, cols) = match form {
            Form::Absorbed => (dims.q_len, [sizes.latent.saturating_add(sizes.rope), sizes.latent]),
            Form::Expanded if matches!(x.tokens, Tokens::Cache(_)) => {
                let reason = "keys and values of every head would be written for all of its tokens: merge \
                              an expanded call over new tokens with an absorbed one over the cache";
                return Err(Error::Conflict { option: "Form::Expanded", with: "a cache", reason });
            }
            Form::Expanded if x.w_uk.is_none() => {
                let reason = "there are no keys but the latents";
                return Err(Error::Conflict {
                    option: "Form::Expanded",
                    with: "queries that took up W_UK",
                    reason,
                });
            }
            Form::Expanded => (dims.kv_len, [dims.head_dim, sizes.value]),
        };
        let bytes = [entries, len, cols[0].saturating_add(cols[1]), size_of::<f32>()];
        let head = bytes.into_iter().fold(1, usize::saturating_mul);
        if head.saturating_mul(dims.q_heads) > isize::MAX as usize / 2 {
            let got = format!("{} heads, {} queries, {} keys", dims.q_heads, dims.q_len, dims.kv_len);
            return Err(Error::value("q", "sizes for which there is memory", got));
        }
        // Heads over one key/value head stay together, since it depends on
        // their number which engine is faster; and so do those that a mask
        // tells apart.
        let apart = form == Form::Expanded && self.config.mask().is_shared();
        let most = if apart { HELD / head.max(1) } else { usize::MAX };
        let heads = most.clamp(1, dims.q_heads.max(1));
        Ok(Plan { form, isa: self.config.isa(), dims, sizes, entries, heads, len, cols })
    }

    /// Bytes of scratch.
    pub(crate) fn workspace_bytes<T: Element, O: Element>(&self, x: &Latents<'_, T, O>) -> Result<usize> {
        self.bytes(x, &self.plan(x, self.form)?)
    }

    fn bytes<T: Element, O: Element>(&self, x: &Latents<'_, T, O>, plan: &Plan) -> Result<usize> {
        let heads = plan.dims.q_heads;
        let last = heads % plan.heads;
        Ok(self.group_bytes(x, plan, plan.heads.min(heads))?.max(self.group_bytes(x, plan, last)?))
    }

    /// Bytes of scratch for a group of so many heads.
    fn group_bytes<T: Element, O: Element>(
        &self,
        x: &Latents<'_, T, O>,
        plan: &Plan,
        heads: usize,
    ) -> Result<usize> {
        let (zero, made) = (aview0(&0f32), plan.made(heads));
        let [Some(first), Some(second)] = made.map(|dim| zero.broadcast(dim)) else {
            return Err(Error::value("q", "sizes for which there is memory", format_args!("{made:?}")));
        };
        let Sizes { nope, latent, value, .. } = plan.sizes;
        let (call, projections) = match plan.form {
            Form::Absorbed => (self.absorbed(x, plan, heads, first), [(nope, latent), (latent, value)]),
            Form::Expanded => {
                (self.expanded(x, plan, &(0..heads), [first, second]), [(latent, nope), (latent, value)])
            }
        };
        let projections = projections.map(|(inner, width)| plan.project(heads, inner, width).bytes());
        let held = made.map(|(b, h, n, d)| bytes_for::<f32>(b * h * n * d));
        let scratch = engine::workspace_bytes(&call).max(projections[0]).max(projections[1]);
        Ok(held[0] + held[1] + scratch)
    }

    /// The engine's call of projected queries: all heads over one.
    fn absorbed<'a, T: Element, O: Element>(
        &'a self,
        x: &'a Latents<'_, T, O>,
        plan: &Plan,
        heads: usize,
        q: ArrayView4<'a, f32>,
    ) -> Call<'a> {
        let Sizes { latent, rope, .. } = plan.sizes;
        let arrays = match &x.tokens {
            Tokens::Array(latents, lengths) => {
                let k = latents.view().insert_axis(Axis(1));
                let v = latents.slice(s![.., .., ..latent]).insert_axis(Axis(1));
                Qkv { q, k, v, lengths: *lengths, out: PhantomData::<f32> }.into()
            }
            Tokens::Cache(x) => Arrays::cached(q, x.cache.source(), x.slots()),
        };
        let dims = Dims {
            q_heads: heads,
            kv_heads: heads.min(1),
            head_dim: latent + rope,
            value_dim: latent,
            ..plan.dims
        };
        Call { scale: self.config.scale(&plan.dims) as f32, ..self.config.over(arrays, dims, NORM, None) }
    }

    /// The engine's call of projected keys and values: each head over its own.
    fn expanded<'a, T: Element, O: Element>(
        &'a self,
        x: &'a Latents<'_, T, O>,
        plan: &Plan,
        heads: &Range<usize>,
        [k, v]: [ArrayView4<'a, f32>; 2],
    ) -> Call<'a> {
        let lengths = match &x.tokens {
            Tokens::Array(_, lengths) => *lengths,
            Tokens::Cache(_) => Lengths::Full,
        };
        let q = x.q.slice(s![.., heads.clone(), .., ..]);
        let arrays = Qkv { q, k, v, lengths, out: PhantomData::<O> }.into();
        let dims = Dims { q_heads: heads.len(), kv_heads: heads.len(), ..plan.dims };
        self.config.over(arrays, dims, NORM, None)
    }

    /// Output, and the LSE where there is a place for it.
    pub(crate) fn run<T: Element, O: Element>(
        &self,
        x: Latents<'_, T, O>,
        mut out: ArrayViewMut4<'_, O>,
        mut lse: Option<ArrayViewMut3<'_, f32>>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let plan = self.plan(&x, self.form)?;
        check_out(&x, &out)?;
        lse.as_ref().map_or(Ok(()), |lse| check_lse(&x, lse))?;
        let Sizes { nope, latent, value, .. } = plan.sizes;
        let mut arena = workspace.arena(self.bytes(&x, &plan)?)?;
        for first in (0..plan.dims.q_heads).step_by(plan.heads) {
            let heads = first..(first + plan.heads).min(plan.dims.q_heads);
            let n = heads.len();
            let mut out = out.slice_mut(s![.., heads.clone(), .., ..]);
            let lse = lse.as_mut().map(|lse| lse.slice_mut(s![.., heads.clone(), ..]).insert_axis(Axis(3)));
            let w_uv = x.w_uv.slice(s![heads.clone(), .., ..]).permuted_axes([0, 2, 1]);
            let mut arena = arena.reborrow();
            let [mut made, mut other] = plan.take(n, &mut arena);
            match (plan.form, &x.tokens) {
                (Form::Expanded, Tokens::Array(latents, _)) => {
                    // One head that stands for all.
                    let one = latents.view().insert_axis(Axis(1));
                    let (entries, _, len, row) = one.dim();
                    let all = one.broadcast((entries, n, len, row)).expect("an axis of one");
                    let c = all.slice(s![.., .., .., ..latent]);
                    let (k, rotary) = made.view_mut().split_at(Axis(3), nope);
                    if let Some(w_uk) = x.w_uk {
                        let w_uk = w_uk.slice_move(s![heads.clone(), .., ..]).permuted_axes([0, 2, 1]);
                        plan.project(n, latent, nope).run(c.view(), w_uk, k, arena.reborrow());
                    }
                    copy(all.slice(s![.., .., .., latent..]), rotary);
                    plan.project(n, latent, value).run(c, w_uv, other.view_mut(), arena.reborrow());
                    let call = self.expanded(&x, &plan, &heads, [made.view(), other.view()]);
                    engine::run_in(&call, out, lse, arena);
                }
                _ => {
                    self.take_up(&x, &plan, heads, made.view_mut(), arena.reborrow());
                    let call = self.absorbed(&x, &plan, n, made.view());
                    engine::run_in(&call, other.view_mut(), lse, arena.reborrow());
                    plan.project(n, latent, value).run(other.view(), w_uv, out.view_mut(), arena);
                }
            }
        }
        Ok(())
    }

    /// Queries of some heads that have taken up `W_UK`, and their rotary part.
    fn take_up<T: Element, O: Element>(
        &self,
        x: &Latents<'_, T, O>,
        plan: &Plan,
        heads: Range<usize>,
        mut to: ArrayViewMut4<'_, f32>,
        arena: Arena<'_>,
    ) {
        let Sizes { nope, latent, .. } = plan.sizes;
        let q = x.q.slice(s![.., heads.clone(), .., ..]);
        let (taken, rotary) = to.view_mut().split_at(Axis(3), latent);
        let part = q.slice(s![.., .., .., ..nope]);
        match &x.w_uk {
            Some(w_uk) => {
                let w_uk = w_uk.slice(s![heads.clone(), .., ..]);
                plan.project(heads.len(), nope, latent).run(part, w_uk, taken, arena);
            }
            None => copy(part, taken),
        }
        copy(q.slice(s![.., .., .., nope..]), rotary);
    }

    /// Hands `run` the call whose weights are those of every head.
    pub(crate) fn with_weights<T: Element, O: Element, R>(
        &self,
        x: &Latents<'_, T, O>,
        run: impl FnOnce(&Call<'_>) -> Result<R>,
    ) -> Result<R> {
        let plan = self.plan(x, Form::Absorbed)?;
        let mut workspace = Workspace::new();
        let mut arena = workspace.arena(self.bytes(x, &plan)?)?;
        let [mut q, _] = plan.take(plan.dims.q_heads, &mut arena);
        self.take_up(x, &plan, 0..plan.dims.q_heads, q.view_mut(), arena);
        run(&self.absorbed(x, &plan, plan.dims.q_heads, q.view()))
    }

    /// The sizes, if arrays, mask and form agree.
    pub(crate) fn dims<T: Element, O: Element>(&self, x: &Latents<'_, T, O>) -> Result<Dims> {
        Ok(self.plan(x, self.form)?.dims)
    }

    /// What the form does; latents are read once for all heads.
    pub(crate) fn cost<T: Element, O: Element>(&self, x: &Latents<'_, T, O>) -> Result<Cost> {
        let Plan { dims, sizes: Sizes { nope, rope, latent, value }, entries, .. } =
            self.plan(x, self.form)?;
        let (rows, head_dim, value_dim) = match self.form {
            Form::Absorbed => (entries * dims.q_len, latent + rope, latent),
            Form::Expanded => (entries * dims.kv_len, dims.head_dim, value),
        };
        let out = entries * dims.q_heads * dims.q_len * value * size_of::<O>();
        let w_uk = x.w_uk.map_or(0, |w_uk| w_uk.len());
        let bytes = (x.q.len() + w_uk + x.w_uv.len()) * size_of::<T>() + out;
        let pairs = Dims { head_dim, value_dim, ..dims };
        let cost = match &x.tokens {
            Tokens::Array(latents, lengths) => {
                let bytes = bytes + latents.len() * size_of::<T>();
                price(self.config.mask(), &pairs, |i| lengths.sequence(&dims, i), bytes, 0)
            }
            Tokens::Cache(x) => {
                let slots = x.slots();
                let tokens: usize = (0..dims.batch).map(|i| slots.len(i)).sum();
                let bytes = bytes + tokens * x.cache.token_bytes();
                price(self.config.mask(), &pairs, |i| slots.sequence(&dims, i), bytes, 0)
            }
        };
        let taken = if x.w_uk.is_some() { nope } else { 0 };
        let projections = 2 * rows * dims.q_heads * latent * (taken + value);
        Ok(Cost { flops: cost.flops + projections as u64, ..cost })
    }
}

/// Widens.
fn copy<T: Element>(from: ArrayView4<'_, T>, mut to: ArrayViewMut4<'_, f32>) {
    to.zip_mut_with(&from, |to, from| *to = from.to_f32());
}
