use attention_kernels_burn::{AttentionOptions, attention};
use burn::tensor::{Bool, Device, Tensor, TensorData};
use burn_nn::Linear;
use burn_nn::attention::{
    MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask,
};

use crate::support::{close, gradients, noise};

/// The forward pass of burn's module with the operator in place of its scores, softmax and
/// products, as the README has it.
fn fused(
    mha: &MultiHeadAttention,
    x: Tensor<3>,
    padding: Option<Tensor<2, Bool>>,
    is_causal: bool,
) -> Tensor<3> {
    let [batch, len, width] = x.dims();
    let split = |linear: &Linear| {
        linear.forward(x.clone()).reshape([batch, len, mha.n_heads, mha.d_k]).swap_dims(1, 2)
    };
    let mask = padding.map(|padding| padding.reshape([batch, 1, 1, len]));
    let sinks = mha.quiet_softmax.then(|| vec![0.0; mha.n_heads]);
    let options = AttentionOptions { is_causal, sinks, ..Default::default() };
    let (q, k, v) = (split(&mha.query), split(&mha.key), split(&mha.value));
    let out = attention(q, k, v, mask, None, options).unwrap();
    mha.output.forward(out.swap_dims(1, 2).reshape([batch, len, width]))
}

#[test]
fn is_burns_module() {
    let device = Device::flex().autodiff();
    let x = noise([2, 19, 24], 1, &device).require_grad();
    let padding: Vec<bool> = (0..2 * 19).map(|i| i > 30).collect();
    let padding = Tensor::<2, Bool>::from_data(TensorData::new(padding, [2, 19]), &device);
    for quiet in [false, true] {
        let config = MultiHeadAttentionConfig::new(24, 3).with_dropout(0.0).with_quiet_softmax(quiet);
        // -1e4 in place of -inf, as burn has it, is 0 after the softmax.
        let mha = config.init(&device);
        let input = MhaInput::self_attn(x.clone()).mask_pad(padding.clone());
        let input = input.mask_attn(generate_autoregressive_mask(2, 19, &device));
        let want = mha.forward(input).context;
        let got = fused(&mha, x.clone(), Some(padding.clone()), true);
        close("context", &got, &want, 1e-5);
        let gradient = |out: &Tensor<3>| {
            let gradients = gradients(out);
            (x.grad(&gradients).unwrap(), mha.query.weight.val().grad(&gradients).unwrap())
        };
        let (got, want) = (gradient(&got), gradient(&want));
        close("x", &got.0, &want.0, 1e-4);
        close("weights", &got.1, &want.1, 1e-4);
    }
}
