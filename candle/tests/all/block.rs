use attention_kernels_candle::{BlockAttention, BlockOptions};
use candle_core::{D, DType, Result, Tensor, Var};

use crate::support::{Unfused, agree, close, noise, numbers, var, window_mask};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 16;

/// The projections of a block.
struct Weights([Var; 4]);

impl Weights {
    fn new() -> Self {
        let (hidden, wide, narrow) = (24, HEADS * DIM, KV_HEADS * DIM);
        Self([
            var((hidden, wide), 2),
            var((hidden, narrow), 3),
            var((hidden, narrow), 4),
            var((wide, hidden), 5),
        ])
    }

    /// A block of Llama around its attention.
    fn block(
        &self,
        x: &Tensor,
        attention: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        let Self([q, k, v, o]) = self;
        let project = |w: &Var, heads| -> Result<Tensor> {
            x.broadcast_matmul(w)?.reshape((batch, len, heads, DIM))?.transpose(1, 2)
        };
        let y = attention(&project(q, HEADS)?, &project(k, KV_HEADS)?, &project(v, KV_HEADS)?)?;
        y.transpose(1, 2)?.reshape((batch, len, HEADS * DIM))?.broadcast_matmul(o)
    }
}

#[test]
fn a_block_of_a_model_trains_as_with_candle() {
    let (weights, x) = (Weights::new(), var((2, 33, 24), 1));
    let sinks = noise(HEADS, 6);
    let configurations = [
        BlockOptions::default(),
        BlockOptions { scale: Some(0.1), window: Some(7), softcap: Some(2.0), sinks: None },
        BlockOptions { sinks: Some(numbers(&sinks)), ..BlockOptions::default() },
    ];
    for options in configurations {
        let block = BlockAttention::new(options.clone()).unwrap();
        let unfused = Unfused {
            mask: Some(window_mask(33, 33, options.window)),
            scale: options.scale.map(f64::from),
            softcap: options.softcap.map(f64::from),
            sinks: options.sinks.as_ref().map(|_| sinks.clone()),
        };
        let got = weights.block(&x, |q, k, v| block.forward(q, k, v)).unwrap();
        let want = weights.block(&x, |q, k, v| unfused.run(q, k, v)).unwrap();
        let [q, k, v, o] = &weights.0;
        agree(&format!("{options:?}"), &got, &want, &[&x, q, k, v, o], 3e-5);
    }
}

#[test]
fn tokens_one_at_a_time_are_the_prompt_at_once() {
    let (q, kv) = (noise((1, HEADS, 20, DIM), 1), noise((1, KV_HEADS, 20, DIM), 2));
    for window in [None, Some(4)] {
        let block = BlockAttention::new(BlockOptions { window, ..Default::default() }).unwrap();
        let whole = block.forward(&q, &kv, &kv).unwrap();
        for len in [1, 3] {
            // The cache of candle-transformers: everything so far.
            let kv = kv.narrow(2, 0, 15).unwrap();
            let out = block.forward(&q.narrow(2, 15 - len, len).unwrap(), &kv, &kv).unwrap();
            close("last tokens", &out, &whole.narrow(2, 15 - len, len).unwrap(), 1e-6);
        }
    }
}

#[test]
fn half_types_go_in_and_come_out() {
    let block = BlockAttention::new(BlockOptions::default()).unwrap();
    let (q, kv) = (noise((1, HEADS, 20, DIM), 1), noise((1, KV_HEADS, 20, DIM), 2));
    for dtype in [DType::F16, DType::BF16] {
        let [q, kv] = [&q, &kv].map(|x| x.to_dtype(dtype).unwrap());
        let out = block.forward(&q, &kv, &kv).unwrap();
        assert_eq!((out.dtype(), out.dim(D::Minus1).unwrap()), (dtype, DIM));
        let [q, kv] = [&q, &kv].map(|x| x.to_dtype(DType::F32).unwrap());
        let want = Unfused::causal(&q, &kv).run(&q, &kv, &kv).unwrap();
        close("half", &out.to_dtype(DType::F32).unwrap(), &want, 1.0 / 256.0);
    }
}

#[test]
fn options_that_mean_nothing_are_refused() {
    let refused = |options: BlockOptions| BlockAttention::new(options).unwrap_err().to_string();
    assert!(refused(BlockOptions { window: Some(0), ..Default::default() }).contains("window"));
    assert!(refused(BlockOptions { scale: Some(f32::NAN), ..Default::default() }).contains("scale"));
    assert!(refused(BlockOptions { softcap: Some(0.0), ..Default::default() }).contains("cap"));
    assert!(refused(BlockOptions { sinks: Some(vec![f32::NAN]), ..Default::default() }).contains("sinks"));
    let block =
        BlockAttention::new(BlockOptions { sinks: Some(vec![0.0; 5]), ..Default::default() }).unwrap();
    let x = noise((1, HEADS, 20, DIM), 1);
    assert!(block.forward(&x, &x, &x).unwrap_err().to_string().contains("sinks"));
}
