use attention_kernels::dense::Dense;
use attention_kernels::mask::{Causal, Documents, Mask};
use attention_kernels::score::{Alibi, Softcap};
use attention_kernels_burn::{AttentionBackend, AttentionOptions, attend, attention};
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Device, Tensor, TensorData};

use crate::support::{agree, hidden, noise, same, unfused, vars};

#[test]
fn any_mask_and_any_smooth_change_of_scores() {
    let [q, k, v] = vars([2, 4, 2, 45, 45, 24, 40]);
    let mask = Causal::new().and(Documents::new(&[0; 45].map(|_: u32| 0)));
    let score = (Softcap::new(0.9).unwrap(), Alibi::new(4));
    let dense = Dense::builder().mask(mask).score(score).scale(0.4).build().unwrap();
    let got = attend(q.clone(), k.clone(), v.clone(), &dense).unwrap();
    let slopes = Alibi::new(4).slopes().to_vec();
    let bias = (0..4 * 45 * 45).map(|at| {
        let (h, i, j) = (at / (45 * 45), at / 45 % 45, at % 45);
        -slopes[h] * i.abs_diff(j) as f32
    });
    let bias = TensorData::new(bias.collect::<Vec<_>>(), [1, 4, 45, 45]);
    let bias = Some(Tensor::from_data(bias, &q.device()));
    let options = AttentionOptions { scale: Some(0.4), softcap: Some(0.9), ..Default::default() };
    let want = unfused([&q, &k, &v], Some(hidden(45, 45, |j| j > 0)), bias, &options);
    agree("alibi", &got, &want, &[&q, &k, &v], 1e-5);
}

#[test]
fn primitives_are_what_tensors_hold() {
    let x = noise([1, 2, 9, 16], 1, &Device::flex());
    let dense = Dense::builder().causal().build().unwrap();
    let options = AttentionOptions { is_causal: true, ..Default::default() };
    let want = attend(x.clone(), x.clone(), x.clone(), &dense).unwrap();
    same("options", &attention(x.clone(), x.clone(), x.clone(), None, None, options.clone()).unwrap(), &want);
    let y = x.clone().try_into_primitive::<Flex>().unwrap();
    let out = Flex::attend(y.clone(), y.clone(), y, &dense).unwrap();
    same("flex", &Tensor::from_primitive::<Flex>(out), &want);
    let y = Tensor::<4>::from_inner(x).try_into_primitive::<Autodiff<Flex>>().unwrap();
    let out = <Autodiff<Flex>>::attention(y.clone(), y.clone(), y, None, None, options).unwrap();
    same("autodiff", &Tensor::from_primitive::<Autodiff<Flex>>(out).inner(), &want);
}
