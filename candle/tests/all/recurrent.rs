use attention_kernels::linear::{
    DeltaNet, GatedDeltaNet, Gla, Kda, Lightning, Mamba2, RetNet, Rwkv7, SimpleGla,
};
use attention_kernels_candle::{Mamba2Tensors, mamba2, mix, mix_from, state_from_tensor, state_to_tensor};
use candle_core::{D, DType, Device, Result, Tensor, Var};

use crate::support::{agree, between, close, gradients, noise, repeat_kv, same, var};

const HEADS: usize = 3;
const LEN: usize = 21;
const DIM: usize = 16;
const VALUE: usize = 10;

/// The plain recurrence, a token at a time, of candle's operators. The state is `[batch, heads,
/// dim, value_dim]`.
struct Plain<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    /// `[batch, heads, len, 1 or dim]`, what is left.
    decay: Option<Tensor>,
    /// `[batch, heads, len]`, the weight of the correction.
    beta: Option<&'a Tensor>,
    /// Removal keys and rates.
    removal: Option<[&'a Tensor; 2]>,
    scale: f64,
}

impl Plain<'_> {
    fn run(&self) -> Result<Tensor> {
        let (batch, heads, len, dim) = self.q.dims4()?;
        let mut state = Tensor::zeros((batch, heads, dim, self.v.dim(3)?), DType::F32, &Device::Cpu)?;
        let mut rows = Vec::new();
        for t in 0..len {
            // A column `[batch, heads, dim, 1]`, and a row.
            let column = |x: &Tensor| x.narrow(2, t, 1)?.transpose(2, 3);
            let row = |x: &Tensor| x.narrow(2, t, 1);
            let read = |x: &Tensor, state: &Tensor| state.broadcast_mul(&column(x)?)?.sum_keepdim(2);
            let before = state.clone();
            if let Some(decay) = &self.decay {
                state = state.broadcast_mul(&column(decay)?)?;
            }
            if let Some([kappa, rate]) = self.removal {
                let removed = column(&(kappa * rate)?)?.broadcast_mul(&read(kappa, &before)?)?;
                state = (state - removed)?;
            }
            let mut added = row(self.v)?;
            if let Some(beta) = self.beta {
                let beta = beta.narrow(2, t, 1)?.unsqueeze(D::Minus1)?;
                added = (added - read(self.k, &state)?)?.broadcast_mul(&beta)?;
            }
            state = (state + column(self.k)?.broadcast_mul(&added)?)?;
            rows.push((read(self.q, &state)? * self.scale)?);
        }
        Tensor::cat(&rows, 2)
    }
}

fn arrays() -> [Var; 3] {
    let unit = |seed| {
        let x = noise((2, HEADS, LEN, DIM), seed);
        x.broadcast_div(&x.sqr().unwrap().sum_keepdim(3).unwrap().sqrt().unwrap()).unwrap()
    };
    let var = |x: &Tensor| Var::from_tensor(x).unwrap();
    [var(&noise((2, HEADS, LEN, DIM), 1)), var(&unit(2)), var(&noise((2, HEADS, LEN, VALUE), 3))]
}

fn gate(low: f64, high: f64, channels: bool, seed: usize) -> Var {
    let gate = between(low, high, (2, HEADS, LEN, DIM), seed);
    Var::from_tensor(&if channels { gate } else { gate.narrow(3, 0, 1).unwrap().squeeze(3).unwrap() })
        .unwrap()
}

#[test]
fn lightning_is_its_recurrence() {
    let [q, k, v] = arrays();
    let slopes = [0.0, 0.1, 1.5];
    let decay = Tensor::new(&slopes.map(|x: f32| (-x).exp()), &Device::Cpu).unwrap();
    let decay = decay.reshape((1, HEADS, 1, 1)).unwrap().broadcast_as((2, HEADS, LEN, 1)).unwrap();
    let plain = Plain { q: &q, k: &k, v: &v, decay: Some(decay), beta: None, removal: None, scale: 1.0 };
    let got = mix(&Lightning::from_slopes(&slopes).build().unwrap(), [&q, &k, &v]).unwrap();
    assert!(got.transpose(1, 2).unwrap().is_contiguous());
    agree("lightning", &got, &plain.run().unwrap(), &[&q, &k, &v], 3e-6);
}

#[test]
fn gated_delta_rules_are_their_recurrence() {
    let [q, k, v] = arrays();
    let (one, many, beta) = (gate(-1.0, 0.0, false, 4), gate(-1.0, 0.0, true, 5), gate(0.0, 1.0, false, 6));
    let scale = 0.25;
    let plain = |decay: Option<Tensor>, beta| {
        let decay = decay.map(|decay| decay.exp().unwrap());
        Plain { q: &q, k: &k, v: &v, decay, beta, removal: None, scale }.run().unwrap()
    };
    let wide = || Some(one.unsqueeze(3).unwrap());

    let got = mix(&GatedDeltaNet::builder().build().unwrap(), [&q, &k, &v, &one, &beta]).unwrap();
    agree("gated deltanet", &got, &plain(wide(), Some(&beta)), &[&q, &k, &v, &one, &beta], 1e-5);
    let got = mix(&Kda::builder().build().unwrap(), [&q, &k, &v, &many, &beta]).unwrap();
    let want = plain(Some(many.as_tensor().clone()), Some(&beta));
    agree("kda", &got, &want, &[&q, &k, &v, &many, &beta], 1e-5);
    let got = mix(&DeltaNet::builder().build().unwrap(), [&q, &k, &v, &beta]).unwrap();
    agree("deltanet", &got, &plain(None, Some(&beta)), &[&q, &k, &v, &beta], 1e-5);
    let got = mix(&SimpleGla::builder().build().unwrap(), [&q, &k, &v, &one]).unwrap();
    agree("simple gla", &got, &plain(wide(), None), &[&q, &k, &v, &one], 1e-5);
    let got = mix(&Gla::builder().build().unwrap(), [&q, &k, &v, &many]).unwrap();
    agree("gla", &got, &plain(Some(many.as_tensor().clone()), None), &[&q, &k, &v, &many], 1e-5);
}

#[test]
fn rwkv7_is_its_recurrence() {
    let [q, k, v] = arrays();
    let kappa = Var::from_tensor(&arrays()[1].roll(1, 2).unwrap()).unwrap();
    let (decay, rate) = (gate(-0.6, 0.0, true, 4), gate(0.0, 1.0, true, 5));
    let plain = Plain {
        q: &q,
        k: &k,
        v: &v,
        decay: Some(decay.exp().unwrap()),
        beta: None,
        removal: Some([&kappa, &rate]),
        scale: 1.0,
    };
    let got = mix(&Rwkv7::builder().build().unwrap(), [&q, &k, &v, &decay, &kappa, &rate]).unwrap();
    agree("rwkv7", &got, &plain.run().unwrap(), &[&q, &k, &v, &decay, &kappa, &rate], 1e-5);
}

/// Heads share what there is less of, and strided and broadcast tensors are read where they lie.
#[test]
fn strides_and_shared_heads_do_not_matter() {
    let mixed = var((2, LEN, 4, DIM), 1);
    let part = |first, heads| mixed.narrow(2, first, heads).unwrap().transpose(1, 2).unwrap();
    let (one, all) = (part(0, 1), part(1, 3));
    let decay = gate(-1.0, 0.0, false, 4);
    let spread = decay.narrow(1, 0, 1).unwrap().broadcast_as((2, 3, LEN)).unwrap();
    let gla = SimpleGla::builder().build().unwrap();
    let got = mix(&gla, [&one, &one, &all, &spread]).unwrap();
    let repeated = repeat_kv(&one.contiguous().unwrap(), 3).unwrap();
    let whole = [&repeated, &repeated, &all.contiguous().unwrap(), &spread.contiguous().unwrap()];
    let want = mix(&gla, whole).unwrap();
    agree("shared", &got, &want, &[&mixed, &decay], 1e-6);
}

#[test]
fn half_types_keep_to_their_rounding() {
    let [q, k, v] = arrays();
    let one = gate(-1.0, 0.0, false, 4);
    let gla = SimpleGla::builder().build().unwrap();
    for dtype in [DType::F16, DType::BF16] {
        let halves = [&q, &k, &v].map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap());
        let wide = halves.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
        let got = mix(&gla, [&halves[0], &halves[1], &halves[2], &one]).unwrap();
        let want = mix(&gla, [&wide[0], &wide[1], &wide[2], &one]).unwrap();
        close("rounded", &got, &want, if dtype == DType::F16 { 1.0 / 2048.0 } else { 1.0 / 256.0 });
        let all = gradients(&got).unwrap();
        assert_eq!(all.get(&halves[2]).unwrap().dtype(), dtype);
        assert_eq!(all.get(&one).unwrap().dtype(), DType::F32);
    }
}

#[test]
fn pieces_are_the_whole() {
    let [q, k, v] = arrays().map(|x| x.as_detached_tensor());
    let (many, rate) =
        (gate(-0.6, 0.0, true, 4).as_detached_tensor(), gate(0.0, 1.0, true, 5).as_detached_tensor());
    let rwkv = Rwkv7::builder().build().unwrap();
    let whole = mix(&rwkv, [&q, &k, &v, &many, &k, &rate]).unwrap();
    let (mut state, mut pieces) = (None, Vec::new());
    for (first, len) in [(0, 9), (9, 1), (10, 0), (10, 11)] {
        let [q, k, v, many, rate] = [&q, &k, &v, &many, &rate].map(|x| x.narrow(2, first, len).unwrap());
        pieces.push(mix_from(&rwkv, [&q, &k, &v, &many, &k, &rate], &mut state).unwrap());
        // Saved and read again.
        let saved = state_to_tensor(state.as_ref().unwrap()).unwrap();
        assert_eq!(saved.dims(), [2, HEADS, DIM, VALUE]);
        let read = state_from_tensor(&saved).unwrap();
        assert_eq!(Some(&read), state.as_ref());
        state = Some(read);
    }
    close("pieces", &Tensor::cat(&pieces, 2).unwrap(), &whole, 1e-5);
    let retnet = RetNet::builder(HEADS).build().unwrap();
    let (whole, mut state) = (mix(&retnet, [&q, &k, &v]).unwrap(), None);
    for t in 0..LEN {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, t, 1).unwrap());
        let out = mix_from(&retnet, [&q, &k, &v], &mut state).unwrap();
        close("step", &out, &whole.narrow(2, t, 1).unwrap(), 1e-5);
    }
}

const GROUPS: usize = 2;
const MAMBA_HEADS: usize = 4;

fn mamba_tensors() -> ([Var; 4], Mamba2Tensors) {
    let columns = MAMBA_HEADS * VALUE + 2 * GROUPS * DIM;
    // A projection has the gate before and the steps after.
    let projected = var((2, LEN, columns + 7 + MAMBA_HEADS), 1);
    let vars = [projected, var(MAMBA_HEADS, 2), var(MAMBA_HEADS, 3), var(MAMBA_HEADS, 4)];
    let [projected, a_log, dt_bias, d] = &vars;
    let tensors = Mamba2Tensors {
        xbc: projected.narrow(2, 7, columns).unwrap(),
        dt: projected.narrow(2, 7 + columns, MAMBA_HEADS).unwrap(),
        a_log: a_log.as_tensor().clone(),
        dt_bias: dt_bias.as_tensor().clone(),
        d: d.as_tensor().clone(),
        groups: GROUPS,
        state_dim: DIM,
    };
    (vars, tensors)
}

/// A layer of `candle-transformers`, a token at a time.
fn plain_mamba(tensors: &Mamba2Tensors) -> Result<Tensor> {
    let Mamba2Tensors { xbc, dt, a_log, dt_bias, d, .. } = tensors;
    let heads = |first: usize, heads: usize, dim: usize| {
        xbc.narrow(2, first, heads * dim)?.reshape((2, LEN, heads, dim))?.transpose(1, 2)?.contiguous()
    };
    let x = heads(0, MAMBA_HEADS, VALUE)?;
    let (first, more) = (MAMBA_HEADS * VALUE, GROUPS * DIM);
    let b = repeat_kv(&heads(first, GROUPS, DIM)?, MAMBA_HEADS)?;
    let c = repeat_kv(&heads(first + more, GROUPS, DIM)?, MAMBA_HEADS)?;
    let steps = (dt.broadcast_add(dt_bias)?.exp()? + 1.0)?.log()?;
    let decay = steps.broadcast_mul(&a_log.exp()?.neg()?)?.exp()?.transpose(1, 2)?.unsqueeze(3)?;
    let weighed = x.broadcast_mul(&steps.transpose(1, 2)?.unsqueeze(3)?)?;
    let plain =
        Plain { q: &c, k: &b, v: &weighed, decay: Some(decay), beta: None, removal: None, scale: 1.0 };
    let y = (plain.run()? + x.broadcast_mul(&d.reshape((1, MAMBA_HEADS, 1, 1))?)?)?;
    y.transpose(1, 2)?.reshape((2, LEN, MAMBA_HEADS * VALUE))
}

#[test]
fn mamba2_trains_as_with_candle() {
    let ([projected, a_log, dt_bias, d], tensors) = mamba_tensors();
    let (got, want) = (mamba2(&tensors, None).unwrap(), plain_mamba(&tensors).unwrap());
    agree("mamba2", &got, &want, &[&projected, &a_log, &dt_bias, &d], 1e-5);
}

#[test]
fn mamba2_carries_its_state() {
    let (_, tensors) = mamba_tensors();
    let whole = mamba2(&tensors, None).unwrap();
    let mut state = None;
    for (first, len) in [(0, 12), (12, 1), (13, 8)] {
        let part = Mamba2Tensors {
            xbc: tensors.xbc.narrow(1, first, len).unwrap(),
            dt: tensors.dt.narrow(1, first, len).unwrap(),
            ..tensors.clone()
        };
        let out = mamba2(&part, Some(&mut state)).unwrap();
        close("piece", &out, &whole.narrow(1, first, len).unwrap(), 1e-5);
        assert!(out.sum_all().unwrap().backward().unwrap_err().to_string().contains("mamba2"));
    }
    assert_eq!(state.as_ref().unwrap().view().dim(), (2, MAMBA_HEADS, DIM, VALUE));
    // What does not fit leaves the state as it is.
    let before = state.clone();
    for wrong in [
        Mamba2Tensors { state_dim: 999, ..tensors.clone() },
        Mamba2Tensors { groups: 3, state_dim: 8, ..tensors.clone() },
        Mamba2Tensors { d: noise(3, 1), ..tensors.clone() },
        Mamba2Tensors { dt: tensors.dt.to_dtype(DType::F16).unwrap(), ..tensors.clone() },
        Mamba2Tensors { xbc: tensors.xbc.to_dtype(DType::F64).unwrap(), ..tensors.clone() },
    ] {
        assert!(mamba2(&wrong, Some(&mut state)).is_err());
    }
    assert_eq!(state, before);
}

#[test]
fn mamba2_of_parts_is_mamba2() {
    let (_, tensors) = mamba_tensors();
    let heads = |first: usize, heads: usize, dim: usize| {
        let part = tensors.xbc.narrow(2, first, heads * dim).unwrap();
        part.reshape((2, LEN, heads, dim)).unwrap().transpose(1, 2).unwrap()
    };
    let (first, more) = (MAMBA_HEADS * VALUE, GROUPS * DIM);
    let numbers = |x: &Tensor| x.to_vec1::<f32>().unwrap();
    let mechanism = Mamba2::builder(&numbers(&tensors.a_log)).dt_bias(&numbers(&tensors.dt_bias));
    let mechanism = mechanism.skip(&numbers(&tensors.d)).build().unwrap();
    let (x, dt) = (heads(0, MAMBA_HEADS, VALUE), tensors.dt.transpose(1, 2).unwrap());
    let (b, c) = (heads(first, GROUPS, DIM), heads(first + more, GROUPS, DIM));
    let got = mix(&mechanism, [&x, &dt, &b, &c]).unwrap();
    let got = got.transpose(1, 2).unwrap().reshape((2, LEN, MAMBA_HEADS * VALUE)).unwrap();
    same("parts", &got, &mamba2(&tensors, None).unwrap());
}
