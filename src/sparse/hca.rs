//! HCA: heavily compressed attention.

use ndarray::{Array3, Array4, ArrayViewMut4};

use crate::attention::{Bounded, Cost, Margins};
use crate::cache::Cache;
use crate::card::{carded, exhibit};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::keys::{Run, TokenLists};
use crate::math::rope::Rope;
use crate::score::Plain;
use crate::stages::attend::Options;
use crate::stages::compressed::{
    Compressed, CompressedCache, Compressing, Compression, Pooling, compression_options, exhibited,
};
use crate::stages::listed::Order;
use crate::stages::opened::opened;

/// HCA: heavily compressed attention.
///
/// ```text
/// o_t = sum over {pools w of 128 tokens that t sees whole} and {the last 128
///       tokens j <= t} of softmax (scale q_t . key) key, with a sink in the sum
/// ```
///
/// rotated back by `t`. Keys are rows of one head that all query heads share, and
/// their values; recent tokens count twice, as they are and in a pool. From
/// DeepSeek-V4 (arXiv 2606.19348). Pools are made, and continued while decoding,
/// by [`Pooling::gated`](crate::select::Pooling::gated) with a norm and the
/// rotation of the keys.
///
/// Runs over arrays ([`Compressed`]) and, in prefill and in decoding, over caches
/// ([`CompressedCache`]): latent ones, in pages or not, and rings of the window. Its index is
/// of rows of pools and, after them, the tokens that are held.
///
/// Cost: `4 dim` flops a pair of a head, of `window + t / 128` keys; of each
/// token `dim / 128` numbers are kept, and of those of the window all.
///
/// ```
/// use attention_kernels::select::Pooling;
/// use attention_kernels::sparse::{Compressed, Hca};
/// use attention_kernels::Attention;
/// use ndarray::{Array2, Array3, Array4};
///
/// let q = Array4::from_shape_fn((1, 4, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let kv = Array3::from_shape_fn((1, 300, 16), |(_, i, c)| ((i * (c + 1)) as f32).cos());
/// let pooling = Pooling::gated(Array2::zeros((64, 16)))?;
/// let mut pools = pooling.start(1, 16)?;
/// pooling.extend(&mut pools, kv.view(), Some(kv.view()))?;
/// let hca = Hca::builder().stride(64).window(32).sinks(vec![0.0; 4]).build()?;
/// let out = hca.forward(Compressed::new(q.view(), kv.view(), pools.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Hca(Compression);

/// Builds an [`Hca`].
#[derive(Clone, Debug)]
pub struct HcaBuilder {
    options: Options<Order, Plain>,
    stride: usize,
    window: usize,
    sinks: Option<Vec<f32>>,
    rope: Option<Rope>,
}

impl Hca {
    /// With pools of 128 tokens.
    pub fn builder() -> HcaBuilder {
        HcaBuilder { options: Options::default(), stride: 128, window: 128, sinks: None, rope: None }
    }

    fn open<R>(&self, x: &impl Compressing, run: impl FnOnce(&Pooling<'_>) -> Result<R>) -> Result<R> {
        x.with(run)
    }

    fn choose(&self, x: &Pooling<'_>, _: &mut Workspace) -> Result<TokenLists> {
        self.0.plan(x, |b, i, runs| {
            let whole = x.seen(b, i) / self.0.stride;
            if whole > 0 {
                runs.push(Run { start: 0, len: whole as u32 });
            }
        })
    }

    fn choice_bytes(&self, _: &Pooling<'_>) -> Result<usize> {
        Ok(0)
    }

    fn bytes(&self, x: &Pooling<'_>, plan: &TokenLists) -> Result<usize> {
        self.0.bytes(x, plan)
    }

    fn run<O: Element>(
        &self,
        x: &Pooling<'_>,
        plan: &TokenLists,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.0.run(x, plan, out, workspace)
    }

    fn price(&self, x: &impl Compressing, plan: &TokenLists) -> Result<Cost> {
        x.with(|x| self.0.price(x, plan))
    }

    fn define_choice(&self, x: &Pooling<'_>) -> Result<(TokenLists, Margins)> {
        let pools = |b, i| {
            (1..=x.sequence(b).keys.len() / self.0.stride)
                .filter(|w| w * self.0.stride <= x.seen(b, i))
                .count()
        };
        let plan = self.0.plan(x, |b, i, runs| {
            runs.extend((pools(b, i) > 0).then(|| Run { start: 0, len: pools(b, i) as u32 }));
        })?;
        Ok((plan, Margins::default()))
    }

    fn define(&self, x: &Pooling<'_>, plan: &TokenLists) -> Result<(Array4<f64>, Array3<f64>)> {
        self.0.define(x, plan)
    }
}

compression_options!(HcaBuilder);

impl HcaBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for a stride or a window of 0, a
    /// sink that is NaN or a scale that is not finite,
    /// [`Error::Isa`](crate::Error::Isa) for an instruction set that the CPU
    /// lacks.
    pub fn build(self) -> Result<Hca> {
        Ok(Hca(self.compression()?))
    }
}

opened!(Hca, TokenLists, [T: Element] Compressed<'_, T>);
opened!(Hca, TokenLists, [Q: Element, C: Cache + ?Sized, O: Element] CompressedCache<'_, Q, C, O>);

macro_rules! bounded {
    ([$($generics:tt)*] $input:ty) => {
        impl<$($generics)*> Bounded<$input> for Hca {
            fn error_bound(&self, x: $input) -> Result<Array3<f64>> {
                x.with(|x| Ok(self.define(x, &self.define_choice(x)?.0)?.1))
            }
        }
    };
}
bounded!([T: Element] Compressed<'_, T>);
bounded!([Q: Element, C: Cache + ?Sized, O: Element] CompressedCache<'_, Q, C, O>);

exhibit! {
    HcaExhibit of Hca, "sparse", "HCA", "arXiv 2606.19348";
    "the last 24 tokens and the means of every 8, in one softmax with a sink; keys are their values";
    not "where single tokens far back decide";
    tokens false;
    build(x, _) {
        x.dims()?;
        Hca::builder().stride(8).window(24).sinks(vec![0.5; x.q.dim().1])
    }
    extras(x, _) { exhibited(x, 8) }
    input<'a, T>(_, extras) -> Compressed<'a, T> {
        Compressed::new(extras.keys.view(), extras.latents.view(), extras.rates.view())
    }
}
carded!(Hca, HcaExhibit);

#[cfg(test)]
mod tests;
