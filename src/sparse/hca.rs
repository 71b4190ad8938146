//! HCA: heavily compressed attention.

use ndarray::{Array3, Array4, ArrayViewMut4};

use crate::attention::{Attention, Bounded, Cost, Input, Margins, Selects};
use crate::cache::Cache;
use crate::card::{carded, exhibit};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::keys::{Run, TokenLists};
use crate::math::rope::Rope;
use crate::score::Plain;
use crate::stages::attend::{Options, check_out};
use crate::stages::compressed::{
    Compressed, CompressedCache, Compressing, Compression, Pooling, compression_options, exhibited,
};
use crate::stages::listed::Order;
use crate::stages::selecting::difference;

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
/// ([`CompressedCache`]): latent ones, in pages or not, and rings of the window.
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

    fn plan(&self, x: &Pooling<'_>) -> Result<TokenLists> {
        self.0.plan(x, |b, i, runs| {
            let whole = x.seen(b, i) / self.0.stride;
            if whole > 0 {
                runs.push(Run { start: 0, len: whole as u32 });
            }
        })
    }

    fn define_plan(&self, x: &Pooling<'_>) -> Result<TokenLists> {
        let pools = |b, i| {
            (1..=x.sequence(b).keys.len() / self.0.stride)
                .filter(|w| w * self.0.stride <= x.seen(b, i))
                .count()
        };
        self.0.plan(x, |b, i, runs| {
            runs.extend((pools(b, i) > 0).then(|| Run { start: 0, len: pools(b, i) as u32 }));
        })
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

/// The traits, over inputs of a type.
macro_rules! heavily {
    ([$($generics:tt)*] $input:ty) => {
        impl<$($generics)*> Attention<$input> for Hca {
            fn workspace_bytes(&self, x: $input) -> Result<usize> {
                x.with(|x| self.0.bytes(x, &self.plan(x)?))
            }

            fn forward_into(
                &self,
                x: $input,
                out: ArrayViewMut4<'_, <$input as Input>::Out>,
                workspace: &mut Workspace,
            ) -> Result<()> {
                check_out(&x, &out)?;
                x.with(|x| self.0.run(x, &self.plan(x)?, out, workspace))
            }

            fn reference(&self, x: $input) -> Result<Array4<f64>> {
                x.with(|x| Ok(self.0.define(x, &self.define_plan(x)?)?.0))
            }

            fn cost(&self, x: $input) -> Result<Cost> {
                x.with(|x| self.0.price(x, &self.plan(x)?))
            }
        }

        impl<$($generics)*> Selects<$input> for Hca {
            /// Of rows of pools and, after them, the tokens that are held.
            type Index = TokenLists;

            fn select(&self, x: $input) -> Result<TokenLists> {
                x.with(|x| self.plan(x))
            }

            fn workspace_bytes_on(&self, x: $input, index: &TokenLists) -> Result<usize> {
                x.with(|x| self.0.bytes(x, index))
            }

            fn forward_on_into(
                &self,
                x: $input,
                index: &TokenLists,
                out: ArrayViewMut4<'_, <$input as Input>::Out>,
                workspace: &mut Workspace,
            ) -> Result<()> {
                check_out(&x, &out)?;
                x.with(|x| self.0.run(x, index, out, workspace))
            }

            fn reference_select(&self, x: $input) -> Result<(TokenLists, Margins)> {
                x.with(|x| Ok((self.define_plan(x)?, Margins::default())))
            }

            fn reference_on(&self, x: $input, index: &TokenLists) -> Result<Array4<f64>> {
                x.with(|x| Ok(self.0.define(x, index)?.0))
            }

            fn bound_on(&self, x: $input, index: &TokenLists) -> Result<Array3<f64>> {
                x.with(|x| Ok(self.0.define(x, index)?.1))
            }

            fn difference(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
                difference(a, b, margins)
            }
        }

        impl<$($generics)*> Bounded<$input> for Hca {
            fn error_bound(&self, x: $input) -> Result<Array3<f64>> {
                x.with(|x| Ok(self.0.define(x, &self.plan(x)?)?.1))
            }
        }
    };
}
heavily!([T: Element] Compressed<'_, T>);
heavily!([Q: Element, C: Cache + ?Sized, O: Element] CompressedCache<'_, Q, C, O>);

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
mod tests {
    use ndarray::{Array2, Axis, s};

    use super::*;
    use crate::cache::{Append, Cached, Contiguous, Int8, KvShape, Ring};
    use crate::dense::Dense;
    use crate::input::Qkv;
    use crate::math::rope::Pairs;
    use crate::select::{Pooled, Pooling};
    use crate::sparse::testing::{Arrays, compressed_is_its_definition, latents, near};

    fn pools(x: &Arrays, stride: usize) -> Pooled {
        let kv = x.k.index_axis(Axis(1), 0);
        let pooling = Pooling::gated(Array2::zeros((stride, kv.dim().2))).unwrap();
        let mut pools = pooling.start(kv.dim().0, kv.dim().2).unwrap();
        pooling.extend(&mut pools, kv, Some(kv)).unwrap();
        pools
    }

    #[test]
    fn kernels_are_the_definition() {
        for (sizes, stride, window) in [
            ([2, 4, 1, 70, 150, 24, 24], 16, 20),
            ([1, 20, 1, 1, 600, 16, 16], 8, 33),
            ([1, 20, 1, 10, 90, 16, 16], 8, 20),
            ([2, 3, 1, 9, 9, 8, 8], 4, 100),
            ([1, 2, 1, 5, 3, 8, 8], 2, 2),
        ] {
            let x = Arrays::normal(sizes, 1);
            let pools = pools(&x, stride);
            let kv = x.k.index_axis(Axis(1), 0);
            let rope = Rope::builder(6).theta(50.0).last().pairs(Pairs::Neighbours).build().unwrap();
            let builder = Hca::builder().stride(stride).window(window).rope(rope).sinks(vec![0.5; sizes[1]]);
            for isa in crate::Isa::available() {
                let hca = builder.clone().isa(isa).build().unwrap();
                let input = Compressed::new(x.q.view(), kv, pools.view());
                compressed_is_its_definition(&hca, input, hca.error_bound(input).unwrap());
            }
            // Of half types, whose rows are unpacked beside the pools.
            let half = |x: &Array4<f32>| x.mapv(half::f16::from_f32);
            let (q, k) = (half(&x.q), half(&x.k));
            let input = Compressed::new(q.view(), k.index_axis(Axis(1), 0), pools.view());
            let hca = builder.build().unwrap();
            compressed_is_its_definition(&hca, input, hca.error_bound(input).unwrap());
        }
    }

    /// A window of all tokens without pools is dense attention with a sink.
    #[test]
    fn a_window_of_all_tokens_is_dense() {
        let x = Arrays::normal([2, 4, 1, 30, 90, 16, 16], 2);
        let kv = x.k.index_axis(Axis(1), 0);
        let none = Array4::zeros((2, 1, 0, 16));
        let hca = Hca::builder().window(90).sinks(vec![0.3; 4]).build().unwrap();
        let got = hca.forward(Compressed::new(x.q.view(), kv, none.view())).unwrap();
        let dense = Dense::builder().causal().sinks(vec![0.3; 4]).build().unwrap();
        near("dense", &got, &dense.forward(Qkv::new(x.q.view(), x.k.view(), x.k.view())).unwrap());
    }

    /// With pools of one token each key is there twice.
    #[test]
    fn pools_of_one_token_count_twice() {
        let x = Arrays::normal([1, 2, 1, 30, 90, 16, 16], 3);
        let kv = x.k.index_axis(Axis(1), 0);
        let hca = Hca::builder().window(90).stride(1).build().unwrap();
        let got = hca.forward(Compressed::new(x.q.view(), kv, x.k.view())).unwrap();
        let dense = Dense::builder().causal().build().unwrap();
        near("twice", &got, &dense.forward(Qkv::new(x.q.view(), x.k.view(), x.k.view())).unwrap());
    }

    /// A step over the last tokens alone is a row of the whole, and later tokens
    /// change no earlier row. A shift of all positions changes nothing.
    #[test]
    fn steps_are_rows_of_the_whole() {
        let x = Arrays::normal([2, 3, 1, 100, 100, 16, 16], 4);
        let (kv, all) = (x.k.index_axis(Axis(1), 0), pools(&x, 8));
        let hca = Hca::builder()
            .stride(8)
            .window(20)
            .rope(Rope::builder(6).theta(50.0).build().unwrap())
            .build()
            .unwrap();
        let whole = hca.forward(Compressed::new(x.q.view(), kv, all.view())).unwrap();
        for n in [1, 7, 8, 9, 25, 64, 100] {
            let held = n.min(20);
            let q = x.q.slice(s![.., .., n - 1..n, ..]);
            let pools = all.view();
            let step = Compressed::new(
                q,
                kv.slice(s![.., n - held..n, ..]),
                pools.slice_move(s![.., .., ..n / 8, ..]),
            );
            let got = hca.forward(step.tokens(n)).unwrap();
            near("step", &got, &whole.slice(s![.., .., n - 1..n, ..]).to_owned());
        }
    }

    /// Over caches that hold the rows, of sequences of any lengths, in prefill and in
    /// decoding; of half types and of 8 bits it is its definition.
    #[test]
    fn caches_are_arrays() {
        let rope = || Rope::builder(6).theta(50.0).last().build().unwrap();
        let hca = Hca::builder().stride(8).window(20).sinks(vec![0.5; 4]).rope(rope()).build().unwrap();
        for (q_len, lengths) in [(70, [150, 90]), (1, [150, 33]), (9, [4, 150])] {
            let x = Arrays::normal([2, 4, 1, q_len, 150, 16, 16], 6);
            let (kv, all) = (x.k.index_axis(Axis(1), 0), pools(&x, 8));
            let (paged, half) = (latents::<f32>(&x.k, &lengths), latents::<half::f16>(&x.k, &lengths));
            let small = latents::<Int8>(&x.k, &lengths);
            let shape = KvShape { kv_heads: 1, head_dim: 16, value_dim: 3 };
            let mut plain = Contiguous::<f32>::new(shape, 2, 150).unwrap();
            for (b, &n) in lengths.iter().enumerate() {
                let k = x.k.slice(s![b, .., ..n, ..]);
                plain.append(b, k, k.slice(s![.., .., ..3])).unwrap();
            }
            let caches: [&dyn Cache; 4] = [&paged, &plain, &half, &small];
            for (which, cache) in caches.into_iter().enumerate() {
                let cached = CompressedCache::new(Cached::new(x.q.view(), cache), all.view());
                assert_eq!(hca.select(cached).unwrap(), hca.reference_select(cached).unwrap().0);
                compressed_is_its_definition(&hca, cached, hca.error_bound(cached).unwrap());
                let out = hca.forward(cached).unwrap();
                for (b, &n) in lengths.iter().enumerate().filter(|_| which < 2) {
                    let (q, pools) = (x.q.slice(s![b..b + 1, .., .., ..]), all.view());
                    let pools = pools.slice_move(s![b..b + 1, .., .., ..]);
                    let alone = Compressed::new(q, kv.slice(s![b..b + 1, ..n, ..]), pools);
                    let want = hca.forward(alone).unwrap();
                    near("cache", &out.slice(s![b..b + 1, .., .., ..]).to_owned(), &want);
                }
            }
            // A ring that holds the windows of the queries.
            let mut ring = Ring::<f32>::new(KvShape { value_dim: 16, ..shape }, 2, 0, 19 + q_len).unwrap();
            for (b, &n) in lengths.iter().enumerate() {
                let k = x.k.slice(s![b, .., ..n, ..]);
                ring.append(b, k, k).unwrap();
            }
            let cached = CompressedCache::new(Cached::new(x.q.view(), &ring), all.view()).tokens(&lengths);
            let whole = CompressedCache::new(Cached::new(x.q.view(), &paged), all.view());
            near("ring", &hca.forward(cached).unwrap(), &hca.forward(whole).unwrap());
            compressed_is_its_definition(&hca, cached, hca.error_bound(cached).unwrap());
            // Both sequences packed, in the other order.
            let q = ndarray::concatenate![
                Axis(2),
                x.q.slice(s![1..2, .., q_len - 1.., ..]),
                x.q.slice(s![0..1, .., .., ..])
            ];
            let (offsets, turned) = ([0, 1, 1 + q_len], all.view().select(Axis(0), &[1, 0]));
            let packed = Cached::new(q.view(), &paged).sequences(&[1, 0]).packed(&offsets);
            let packed = CompressedCache::new(packed, turned.view());
            compressed_is_its_definition(&hca, packed, hca.error_bound(packed).unwrap());
            let (got, want) = (hca.forward(packed).unwrap(), hca.forward(whole).unwrap());
            let first = got.slice(s![.., .., ..1, ..]).to_owned();
            near("first", &first, &want.slice(s![1..2, .., q_len - 1.., ..]).to_owned());
            let second = got.slice(s![.., .., 1.., ..]).to_owned();
            near("second", &second, &want.slice(s![0..1, .., .., ..]).to_owned());
        }
    }

    #[test]
    fn caches_that_do_not_fit_are_refused() {
        let x = Arrays::normal([2, 2, 1, 5, 40, 8, 8], 5);
        let (all, cache) = (pools(&x, 4), latents::<f32>(&x.k, &[40, 30]));
        let hca = Hca::builder().stride(4).window(20).build().unwrap();
        let own = CompressedCache::new(Cached::new(x.q.view(), &cache), all.view());
        let refusal = |x: CompressedCache<'_, f32, _>| {
            let mut out = Array4::from_elem((2, 2, 5, 8), f32::NAN);
            let refused = hca.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap_err();
            assert!(out.iter().all(|x| x.is_nan()), "something was written");
            refused.to_string()
        };
        let few = all.view().slice_move(s![.., .., ..9, ..]);
        assert_eq!(
            refusal(CompressedCache { pools: few, ..own }),
            "pools: expected 10 or more, one for each 4 tokens, got 9"
        );
        let one = all.view().slice_move(s![..1, .., .., ..]);
        assert!(refusal(CompressedCache { pools: one, ..own }).starts_with("pools: expected shape"));
        assert!(refusal(own.tokens(&[40])).starts_with("tokens: expected one number for each"));
        assert!(refusal(own.tokens(&[40, 29])).starts_with("tokens: expected 30 or more"));
        // The last 24 tokens are in the windows of 5 queries.
        assert!(hca.select(own.tokens(&[40, 31])).is_ok());
        let ring = latents::<f32>(&x.k, &[40, 10]);
        let short = CompressedCache::new(Cached::new(x.q.view(), &ring), all.view()).tokens(&[40, 30]);
        assert!(refusal(short).starts_with("kv: expected the last 24 tokens"));
        let heads = Contiguous::<f32>::new(KvShape { kv_heads: 2, head_dim: 8, value_dim: 8 }, 2, 9).unwrap();
        let two = CompressedCache::new(Cached::new(x.q.view(), &heads), all.view());
        assert_eq!(hca.forward(two).unwrap_err().to_string(), "kv: expected a cache of one head, got 2");
        // Lists that look ahead, of pools or of tokens.
        let index = hca.select(own).unwrap();
        let layout = *index.layout();
        for ahead in [9, 10 + 36] {
            let lists = TokenLists::from_keys(layout, &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &[ahead]).unwrap();
            assert!(hca.forward_on(own, &lists).unwrap_err().to_string().starts_with("index: "), "{ahead}");
            assert!(hca.reference_on(own, &lists).unwrap_err().to_string().starts_with("index: "));
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: HcaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Hca::builder().stride(0)), "stride: expected at least 1 token, got 0");
        assert_eq!(refusal(Hca::builder().window(0)), "window: expected at least 1 token, got 0");
        assert!(refusal(Hca::builder().sinks(vec![f32::NAN])).starts_with("sinks: "));
        let x = Arrays::normal([1, 2, 1, 5, 40, 8, 8], 5);
        let (kv, pools) = (x.k.index_axis(Axis(1), 0), pools(&x, 4));
        let refusal = |builder: HcaBuilder, x: Compressed<'_, f32>| {
            builder.stride(4).build().unwrap().forward(x).unwrap_err().to_string()
        };
        let whole = Compressed::new(x.q.view(), kv, pools.view());
        assert!(refusal(Hca::builder().sinks(vec![0.0]), whole).starts_with("sinks: "));
        assert!(
            refusal(Hca::builder().rope(Rope::builder(10).theta(9.0).build().unwrap()), whole)
                .starts_with("rope: ")
        );
        assert!(refusal(Hca::builder(), whole.tokens(44)).starts_with("kv: "));
        assert!(
            refusal(Hca::builder().window(2), whole.tokens(44)).starts_with("pools: expected 11 or more")
        );
        assert!(refusal(Hca::builder(), whole.tokens(30)).starts_with("tokens: "));
        let narrow = Compressed { kv: kv.slice(s![.., .., ..7]), ..whole };
        assert!(refusal(Hca::builder(), narrow).starts_with("kv: "));
    }
}
