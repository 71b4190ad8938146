//! The gradients of a linear recurrence by definition, in `f64`, token by
//! token from the last to the first.

use ndarray::{Array2, Array4, ArrayView4, s};

use crate::definition::recurrence::{Token, Update};
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Place, Read, Spec};

/// The gradients of `sum out * d_out + sum state * d_state` for arrays of the
/// sizes `dims`: of each array as it is given, so that heads that share it add
/// up. The decay's are those of log decays, of channels or for all of them.
/// `back`, given a token and the gradient of its output, makes of the gradients
/// of its operands those of what they are made of.
///
/// Keeps the state of every token of a head.
pub(crate) fn differentiate(
    spec: &Spec<'_>,
    dims: &Gradients<Dim>,
    state: Option<ArrayView4<'_, f32>>,
    d_out: ArrayView4<'_, f32>,
    d_state: Option<ArrayView4<'_, f32>>,
    token: impl Fn(&Place) -> Token,
    back: impl Fn(&Place, &Token, &[f64], &mut Found),
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
                let mut found =
                    differentiate_token(&token, [&states[n], &states[n + 1]], spec, &d_o, &mut d_s);
                back(&at, &token, &d_o, &mut found);
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
                add(&mut to.v, &found.v);
                for (to, found) in [
                    (&mut to.k, &found.k[..]),
                    (&mut to.decay, &found.decay),
                    (&mut to.beta, &[found.beta]),
                    (&mut to.a, &found.a),
                    (&mut to.b, &found.b),
                ] {
                    if let Some(to) = to {
                        add(to, found);
                    }
                }
                for (to, found) in [
                    (&mut to.rate, &[found.rate][..]),
                    (&mut to.bias, &found.bias),
                    (&mut to.bonus, &found.bonus),
                    (&mut to.skip, &found.skip),
                ] {
                    if let Some(to) = to {
                        to.slice_mut(s![0, head, 0, ..]).iter_mut().zip(found).for_each(|(to, x)| *to += x);
                    }
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
    let before = state.clone();
    *state = decayed(state, &token.decay);
    let written = match token.update {
        Update::Delta { beta } => lacking(token, state).into_iter().map(|x| beta * x).collect(),
        _ => token.v.clone(),
    };
    add_outer(state, &token.k, &written);
    if let Update::LowRank { a, b } = &token.update {
        add_outer(state, b, &read(a, &before));
    }
}

/// The gradients of one token's operands, and what it adds to those of
/// parameters of its head.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    /// Of log decays.
    pub(crate) decay: Vec<f64>,
    pub(crate) beta: f64,
    pub(crate) a: Vec<f64>,
    pub(crate) b: Vec<f64>,
    pub(crate) rate: f64,
    pub(crate) bias: Vec<f64>,
    pub(crate) bonus: Vec<f64>,
    pub(crate) skip: Vec<f64>,
}

impl Found {
    /// Adds what a skip connection gives, whose outputs have `skip * v` besides.
    pub(crate) fn add_skipped(&mut self, skip: &[f32], v: &[f64], d_o: &[f64]) {
        self.skip = vec![0.0; skip.len()];
        for c in 0..if skip.is_empty() { 0 } else { v.len() } {
            self.v[c] += f64::from(skip[c % skip.len()]) * d_o[c];
            self.skip[c % skip.len()] += d_o[c] * v[c];
        }
    }
}

fn scaled(x: &[f64], factor: f64) -> Vec<f64> {
    x.iter().map(|x| factor * x).collect()
}

/// One token, with the states before and after it: `d_s` is the gradient of the
/// state after it and becomes that of the state before it.
fn differentiate_token(
    token: &Token,
    [before, after]: [&Array2<f64>; 2],
    spec: &Spec<'_>,
    d_o: &[f64],
    d_s: &mut Array2<f64>,
) -> Found {
    let Token { q, k, v, decay, update, bonus } = token;
    let scale = spec.scale;
    let early = spec.read == Read::Before;
    // o = scale q^T S, of the state before or after
    let mut d_q = scaled(&times(if early { before } else { after }, d_o), scale);
    if !early {
        add_outer(d_s, &scaled(q, scale), d_o);
    }
    // S = diag(decay) S_before + k e^T
    let state = decayed(before, decay);
    let d_e = read(k, d_s);
    let (mut d_a, mut d_b, mut d_seen) = (Vec::new(), Vec::new(), Vec::new());
    let (mut d_k, mut d_v, d_beta) = match update {
        &Update::Delta { beta } => {
            // e = beta (v - S^T k)
            let lacking = lacking(token, &state);
            let e: Vec<f64> = lacking.iter().map(|x| beta * x).collect();
            let d_r: Vec<f64> = d_e.iter().map(|x| beta * x).collect();
            let d_k = times(d_s, &e).iter().zip(times(&state, &d_r)).map(|(a, b)| a - b).collect();
            let d_beta = d_e.iter().zip(&lacking).map(|(d, x)| d * x).sum();
            add_outer(d_s, &k.iter().map(|k| -k).collect::<Vec<_>>(), &d_r);
            (d_k, d_r, d_beta)
        }
        Update::Add => (times(d_s, v), d_e, 0.0),
        Update::LowRank { a, b } => {
            // And b seen^T, with seen = S_before^T a
            d_seen = read(b, d_s);
            d_a = times(before, &d_seen);
            d_b = times(d_s, &read(a, before));
            (times(d_s, v), d_e, 0.0)
        }
    };
    // Of a log decay: the decay times that of the decay.
    let d_decay = (0..k.len()).map(|r| (0..v.len()).map(|c| state[[r, c]] * d_s[[r, c]]).sum()).collect();
    *d_s = decayed(d_s, decay);
    if let Update::LowRank { a, .. } = update {
        add_outer(d_s, a, &d_seen);
    }
    let mut d_bonus = Vec::new();
    if early {
        add_outer(d_s, &scaled(q, scale), d_o);
        // And (scale sum_c q_c bonus_c k_c) v
        let along = scale * v.iter().zip(d_o).map(|(v, d)| v * d).sum::<f64>();
        let weight = scale * (0..q.len()).map(|c| q[c] * bonus[c] * k[c]).sum::<f64>();
        for c in 0..q.len() {
            d_q[c] += along * bonus[c] * k[c];
            d_k[c] += along * bonus[c] * q[c];
        }
        d_bonus = (0..q.len()).map(|c| along * q[c] * k[c]).collect();
        d_v.iter_mut().zip(d_o).for_each(|(to, d)| *to += weight * d);
    }
    Found {
        q: d_q,
        k: d_k,
        v: d_v,
        decay: d_decay,
        beta: d_beta,
        a: d_a,
        b: d_b,
        bonus: d_bonus,
        ..Found::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::recurrence::define;
    use crate::engine::recur::Form;
    use crate::engine::recur::{Decay, Rule};
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
        /// Queries, keys, values, log decays, beta, `a`, `b`, and the bonus.
        arrays: [Array4<f64>; 8],
        state: Array4<f32>,
    }

    fn spec(decay: Decay, rule: Rule, read: Read) -> Spec<'static> {
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
            joined: false,
            silent: false,
            state_dim: DIM,
            decay,
            rule,
            read,
            scale: 0.7,
            normaliser: None,
            form: Form::Auto,
            isa: Isa::Scalar,
        }
    }

    impl Operands {
        fn token(&self, rule: Rule, at: &Place) -> Token {
            let [q, k, v, decay, beta, a, b, bonus] = &self.arrays;
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
                    Rule::LowRank => Update::LowRank { a: row(a), b: row(b) },
                    Rule::Add => Update::Add,
                },
                bonus: bonus.slice(s![0, at.head, 0, ..]).to_vec(),
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
            for (rule, read) in [
                (Rule::Add, Read::After),
                (Rule::Add, Read::Before),
                (Rule::Delta, Read::After),
                (Rule::LowRank, Read::After),
            ] {
                let spec = spec(decay, rule, read);
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
                    wide(random((1, HEADS, 6, DIM))),
                    wide(random((1, HEADS, 6, DIM))),
                    wide(random((1, HEADS, 1, DIM))),
                ];
                if decay == Decay::None {
                    arrays[3].fill(0.0);
                }
                let (state, d_state) = (random(spec.state_shape()), random(spec.state_shape()));
                let d_out = random((1, HEADS, 6, VALUE_DIM));
                let operands = Operands { arrays, state };
                let dim = |n: usize, there: bool| there.then(|| operands.arrays[n].dim());
                let dims = Gradients {
                    q: operands.arrays[0].dim(),
                    k: dim(1, true),
                    v: operands.arrays[2].dim(),
                    decay: dim(3, decay != Decay::None),
                    beta: dim(4, rule == Rule::Delta),
                    a: dim(5, rule == Rule::LowRank),
                    b: dim(6, rule == Rule::LowRank),
                    bonus: dim(7, read == Read::Before),
                    rate: None,
                    bias: None,
                    skip: None,
                    state: spec.state_shape(),
                };
                let Gradients { q, k, v, decay: log_decay, beta, a, b, bonus, state, .. } = differentiate(
                    &spec,
                    &dims,
                    Some(operands.state.view()),
                    d_out.view(),
                    Some(d_state.view()),
                    |at| operands.token(rule, at),
                    |_, _, _, _| {},
                );
                let loss = |x: &Operands| x.loss(&spec, &d_out, &d_state);
                let close = |what: &str, got: f64, want: f64| {
                    let what = format!("{decay:?} {rule:?} {read:?} {what}");
                    assert!((got - want).abs() <= 1e-8, "{what}: {got:e}, not {want:e}");
                };
                let found = [Some(q), k, Some(v), log_decay, beta, a, b, bonus];
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
