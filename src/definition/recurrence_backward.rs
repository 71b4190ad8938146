//! The gradients of a linear recurrence by definition, in `f64`, token by
//! token from the last to the first.

use ndarray::{Array2, Array4, ArrayView4, s};

use crate::definition::recurrence::{Token, Update};
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Place, Spec};

/// The gradients of `sum out * d_out + sum state * d_state` for arrays of the
/// sizes `dims`: of each array as it is given, so that heads that share it add
/// up. The decay's are those of log decays, of channels or for all of them.
///
/// Keeps the state of every token of a head.
pub(crate) fn differentiate(
    spec: &Spec<'_>,
    dims: &Gradients<Dim>,
    state: Option<ArrayView4<'_, f32>>,
    d_out: ArrayView4<'_, f32>,
    d_state: Option<ArrayView4<'_, f32>>,
    token: impl Fn(&Place) -> Token,
) -> Gradients<Array4<f64>> {
    let heads = spec.dims.q_heads;
    let mut to = dims.map(Array4::<f64>::zeros);
    let start = |from: &Option<ArrayView4<'_, f32>>, sequence: usize, head: usize| match from {
        Some(from) => from.slice(s![sequence, head, .., ..]).mapv(f64::from),
        None => Array2::zeros((spec.state_dim, spec.state_cols())),
    };
    for sequence in (0..spec.dims.batch).map(|i| spec.lengths.sequence(&spec.dims, i)) {
        for head in 0..heads {
            let place = |t| Place::new(&sequence, head, t..t + 1);
            // The states before each token, and after the last.
            let mut states = vec![start(&state, sequence.index, head)];
            for t in sequence.keys.clone() {
                let mut state = states[states.len() - 1].clone();
                advance(&mut state, &token(&place(t)));
                states.push(state);
            }
            let mut d_s = start(&d_state, sequence.index, head);
            for (n, t) in sequence.keys.clone().enumerate().rev() {
                let (at, token) = (place(t), token(&place(t)));
                let d_o: Vec<f64> = (0..spec.dims.value_dim)
                    .map(|c| f64::from(d_out[[sequence.batch, head, t, c]]))
                    .collect();
                let found = back(&token, &states[n], &states[n + 1], spec.scale, &d_o, &mut d_s);
                let add = |to: &mut Array4<f64>, row: &[f64]| {
                    let own = at.head_of(to.dim().1, heads);
                    let mut to = to.slice_mut(s![at.batch, own, t, ..]);
                    if to.len() == 1 && row.len() != 1 {
                        // One number for all channels.
                        to[0] += row.iter().sum::<f64>();
                        return;
                    }
                    to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
                };
                add(&mut to.q, &found.q);
                add(&mut to.k, &found.k);
                add(&mut to.v, &found.v);
                if let Some(to) = &mut to.decay {
                    add(to, &found.decay);
                }
                if let Some(to) = &mut to.beta {
                    add(to, &[found.beta]);
                }
            }
            to.state.slice_mut(s![sequence.index, head, .., ..]).assign(&d_s);
        }
    }
    to
}

/// `sum_r x_r S_r`
fn read(x: &[f64], state: &Array2<f64>) -> Vec<f64> {
    (0..state.dim().1).map(|c| x.iter().enumerate().map(|(r, x)| x * state[[r, c]]).sum()).collect()
}

/// `sum_c S_c x_c`
fn times(state: &Array2<f64>, x: &[f64]) -> Vec<f64> {
    state.outer_iter().map(|row| row.iter().zip(x).map(|(s, x)| s * x).sum()).collect()
}

/// `S += a b^T`
fn add_outer(state: &mut Array2<f64>, a: &[f64], b: &[f64]) {
    for ((r, c), x) in state.indexed_iter_mut() {
        *x += a[r] * b[c];
    }
}

fn decayed(state: &Array2<f64>, decay: &[f64]) -> Array2<f64> {
    Array2::from_shape_fn(state.dim(), |(r, c)| decay[r] * state[[r, c]])
}

/// What a key's value lacks of what the decayed state has for it.
fn lacking(token: &Token, state: &Array2<f64>) -> Vec<f64> {
    token.v.iter().zip(read(&token.k, state)).map(|(v, read)| v - read).collect()
}

fn advance(state: &mut Array2<f64>, token: &Token) {
    *state = decayed(state, &token.decay);
    let written = match token.update {
        Update::Delta { beta } => lacking(token, state).into_iter().map(|x| beta * x).collect(),
        _ => token.v.clone(),
    };
    add_outer(state, &token.k, &written);
}

/// The gradients of one token's operands.
struct Found {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    decay: Vec<f64>,
    beta: f64,
}

/// One token: `d_s` is the gradient of the state after it and becomes that of
/// the state before it.
fn back(
    token: &Token,
    before: &Array2<f64>,
    after: &Array2<f64>,
    scale: f64,
    d_o: &[f64],
    d_s: &mut Array2<f64>,
) -> Found {
    let Token { q, k, v, decay, update, .. } = token;
    // o = scale q^T S
    let d_q: Vec<f64> = times(after, d_o).iter().map(|x| scale * x).collect();
    add_outer(d_s, &q.iter().map(|q| scale * q).collect::<Vec<_>>(), d_o);
    // S = diag(decay) S_before + k e^T
    let state = decayed(before, decay);
    let d_e = read(k, d_s);
    let (d_k, d_v, d_beta) = match *update {
        Update::Delta { beta } => {
            // e = beta (v - S^T k)
            let lacking = lacking(token, &state);
            let e: Vec<f64> = lacking.iter().map(|x| beta * x).collect();
            let d_r: Vec<f64> = d_e.iter().map(|x| beta * x).collect();
            let d_k = times(d_s, &e).iter().zip(times(&state, &d_r)).map(|(a, b)| a - b).collect();
            let d_beta = d_e.iter().zip(&lacking).map(|(d, x)| d * x).sum();
            add_outer(d_s, &k.iter().map(|k| -k).collect::<Vec<_>>(), &d_r);
            (d_k, d_r, d_beta)
        }
        _ => (times(d_s, v), d_e, 0.0),
    };
    // Of a log decay: the decay times that of the decay.
    let d_decay = (0..k.len()).map(|r| (0..v.len()).map(|c| state[[r, c]] * d_s[[r, c]]).sum()).collect();
    *d_s = decayed(d_s, decay);
    Found { q: d_q, k: d_k, v: d_v, decay: d_decay, beta: d_beta }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::recurrence::define;
    use crate::engine::recur::Form;
    use crate::engine::recur::{Decay, Read, Rule};
    use crate::input::{Dims, Lengths};
    use crate::simd::Isa;
    use crate::testing::noise;

    const OFFSETS: [usize; 4] = [0, 0, 2, 6];
    const HEADS: usize = 2;
    const DIM: usize = 3;
    const VALUE_DIM: usize = 2;

    /// Operands in `f64`, so that they can be moved a little; `q` is shared by
    /// both heads.
    #[derive(Clone)]
    struct Operands {
        arrays: [Array4<f64>; 5],
        state: Array4<f32>,
    }

    fn spec(decay: Decay, rule: Rule) -> Spec<'static> {
        Spec {
            dims: Dims {
                batch: OFFSETS.len() - 1,
                q_heads: HEADS,
                kv_heads: HEADS,
                q_len: 6,
                kv_len: 6,
                head_dim: DIM,
                value_dim: VALUE_DIM,
                packed: true,
            },
            lengths: Lengths::Packed { queries: &OFFSETS, keys: &OFFSETS },
            steps: 1,
            state_dim: DIM,
            decay,
            rule,
            read: Read::After,
            scale: 0.7,
            normaliser: None,
            form: Form::Auto,
            isa: Isa::Scalar,
        }
    }

    impl Operands {
        fn token(&self, rule: Rule, at: &Place) -> Token {
            let [q, k, v, decay, beta] = &self.arrays;
            let row = |x: &Array4<f64>| {
                let own = at.head_of(x.dim().1, HEADS);
                x.slice(s![at.batch, own, at.tokens.start, ..]).to_vec()
            };
            let decay = row(decay);
            Token {
                q: row(q),
                k: row(k),
                v: row(v),
                // One for all channels, or one a channel.
                decay: (0..DIM).map(|c| decay[c.min(decay.len() - 1)].exp()).collect(),
                update: match rule {
                    Rule::Delta => Update::Delta { beta: row(beta)[0] },
                    _ => Update::Add,
                },
                bonus: Vec::new(),
            }
        }

        fn loss(&self, spec: &Spec<'_>, d_out: &Array4<f32>, d_state: &Array4<f32>) -> f64 {
            let found = define(spec, Some(&self.state), |at| self.token(spec.rule, at)).unwrap();
            let sum = |x: &Array4<f64>, d: &Array4<f32>| {
                x.iter().zip(d).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
            };
            sum(&found.out, d_out) + sum(&found.state, d_state)
        }
    }

    #[test]
    fn gradients_are_differences() {
        for decay in [Decay::None, Decay::Scalar, Decay::Channel] {
            for rule in [Rule::Add, Rule::Delta] {
                let spec = spec(decay, rule);
                let mut next = noise(3);
                let mut random = |dim: Dim| Array4::from_shape_simple_fn(dim, &mut next);
                let gate = match decay {
                    Decay::Channel => DIM,
                    _ => 1,
                };
                let wide = |x: Array4<f32>| x.mapv(f64::from);
                let mut arrays = [
                    wide(random((1, 1, 6, DIM))),
                    wide(random((1, HEADS, 6, DIM))),
                    wide(random((1, HEADS, 6, VALUE_DIM))),
                    wide(random((1, HEADS, 6, gate))).mapv(|x| -x.abs()),
                    wide(random((1, HEADS, 6, 1))),
                ];
                if decay == Decay::None {
                    arrays[3].fill(0.0);
                }
                let (state, d_state) = (random(spec.state_shape()), random(spec.state_shape()));
                let d_out = random((1, HEADS, 6, VALUE_DIM));
                let operands = Operands { arrays, state };
                let dims = Gradients {
                    q: operands.arrays[0].dim(),
                    k: operands.arrays[1].dim(),
                    v: operands.arrays[2].dim(),
                    decay: (decay != Decay::None).then(|| operands.arrays[3].dim()),
                    beta: (rule == Rule::Delta).then(|| operands.arrays[4].dim()),
                    state: spec.state_shape(),
                };
                let Gradients { q, k, v, decay: log_decay, beta, state } = differentiate(
                    &spec,
                    &dims,
                    Some(operands.state.view()),
                    d_out.view(),
                    Some(d_state.view()),
                    |at| operands.token(rule, at),
                );
                let loss = |x: &Operands| x.loss(&spec, &d_out, &d_state);
                let close = |what: &str, got: f64, want: f64| {
                    assert!((got - want).abs() <= 1e-8, "{decay:?} {rule:?} {what}: {got:e}, not {want:e}");
                };
                let found = [Some(q), Some(k), Some(v), log_decay, beta];
                for (n, found) in found.iter().enumerate() {
                    let Some(found) = found else { continue };
                    for (at, &got) in found.indexed_iter() {
                        let moved = |by: f64| {
                            let mut moved = operands.clone();
                            moved.arrays[n][at] += by;
                            loss(&moved)
                        };
                        close(&format!("{n} {at:?}"), got, (moved(1e-5) - moved(-1e-5)) / 2e-5);
                    }
                }
                for (at, &got) in state.indexed_iter() {
                    // The loss is linear in the state.
                    let moved = |by: f32| {
                        let mut moved = operands.clone();
                        moved.state[at] = by;
                        loss(&moved)
                    };
                    close(&format!("state {at:?}"), got, (moved(1.0) - moved(-1.0)) / 2.0);
                }
            }
        }
    }
}
