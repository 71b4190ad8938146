//! The definition of a linear recurrence in `f64`, token by token.

use ndarray::{Array3, Array4};

use crate::element::Element;
use crate::engine::recur::{Arrays, Decay, Gate, Normaliser, Place, Read, Rule, Source, Spec};
use crate::error::Result;
use crate::input::filled;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::simd::tile::NEGLIGIBLE;

/// The constant of the [error bound](crate::linear#error-bound) of recurrences. The
/// tests hold every mechanism to it; the largest ratio that they have seen is
/// a third.
pub const ERROR_CONSTANT: f64 = 0.25;

/// One token of one head, as its paper has it.
#[derive(Clone, Debug)]
pub struct Token {
    /// The query, of `state_dim` elements.
    pub(crate) q: Vec<f64>,
    /// The key.
    pub(crate) k: Vec<f64>,
    /// The value.
    pub(crate) v: Vec<f64>,
    /// What is left of each channel of the state: factors, not logarithms.
    pub(crate) decay: Vec<f64>,
    pub(crate) update: Update,
    /// What the query weighs its own key with where it reads before the
    /// update.
    pub(crate) bonus: Vec<f64>,
}

/// What a token does to the state.
#[derive(Clone, Debug)]
pub enum Update {
    /// Adds `k v^T`.
    Add,
    /// Adds `beta k (v - S^T k)^T`.
    Delta { beta: f64 },
    /// Adds `k v^T + b (a^T S)`, with the state before its decay.
    LowRank { a: Vec<f64>, b: Vec<f64> },
}

impl Token {
    /// A token as arrays have it: decays are exponentials of theirs, and the
    /// rule is the one whose operands there are.
    pub(crate) fn of(arrays: &Arrays<'_>, at: &Place) -> Self {
        let row =
            |x: &AnyArray<'_>| x.rows(at.batch, at.head_of(x.heads(), arrays.heads), &at.tokens).exact(0);
        let q = row(&arrays.q);
        let decay = match &arrays.decay {
            Gate::None => vec![1.0; q.len()],
            Gate::Constant(g) => vec![f64::from(g[at.head]).exp(); q.len()],
            Gate::Token(g) => vec![number(g, at, arrays.heads).exp(); q.len()],
            Gate::Channel(g) => row(&AnyArray::F32(Heads::new(*g))).into_iter().map(f64::exp).collect(),
        };
        let update = match (&arrays.beta, &arrays.low_rank) {
            (Some(beta), _) => Update::Delta { beta: number(beta, at, arrays.heads) },
            (None, Some((a, b))) => Update::LowRank { a: row(a), b: row(b) },
            (None, None) => Update::Add,
        };
        let bonus = arrays.bonus(at.head).iter().map(|&x| f64::from(x)).collect();
        Self { k: row(&arrays.k), v: row(&arrays.v), q, decay, update, bonus }
    }
}

/// What the definition gives.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    /// `[batch, heads, len, value_dim]`
    pub(crate) out: Array4<f64>,
    /// `[sequences, heads, state_dim, columns]`
    pub(crate) state: Array4<f64>,
    /// How far a kernel may be off, `[batch, heads, len]`: see
    /// [`error_bound`](crate::linear#error-bound).
    pub(crate) bound: Array3<f64>,
}

impl Reference {
    /// Adds what outputs have of their own values: `skip(head) * v`.
    pub(crate) fn add_skipped<'a>(
        &mut self,
        spec: &Spec<'_>,
        skip: impl Fn(usize) -> &'a [f32],
        token: impl Fn(&Place) -> Token,
    ) {
        let (_, heads, _, cols) = self.out.dim();
        for head in (0..heads).filter(|&head| !skip(head).is_empty()) {
            let skip = skip(head);
            let tokens = (0..spec.dims.batch).flat_map(|i| {
                let of = spec.lengths.sequence(&spec.dims, i);
                of.queries.map(move |t| (of.batch, t))
            });
            for (batch, t) in tokens {
                let v = token(&Place { batch, head, tokens: t..t + 1 }).v;
                let mut largest = 0f64;
                for c in 0..cols {
                    let x = f64::from(skip[c % skip.len()]) * v[c];
                    self.out[[batch, head, t, c]] += x;
                    largest = largest.max(x.abs());
                }
                self.bound[[batch, head, t]] += ERROR_CONSTANT * 2f64.powi(-24) * 64.0 * largest;
            }
        }
    }
}

/// Row `t` of head `head` of `of` of an array that may have fewer heads.
pub(crate) fn row<T: Element>(x: &ndarray::ArrayView4<'_, T>, at: &Place, of: usize) -> Vec<f64> {
    let head = at.head_of(x.dim().1, of);
    (0..x.dim().3).map(|c| x[[at.batch, head, at.tokens.start, c]].to_f64()).collect()
}

/// The number of a token of `[batch, heads, len]`.
pub(crate) fn number(x: &ndarray::ArrayView3<'_, f32>, at: &Place, of: usize) -> f64 {
    f64::from(x[[at.batch, at.head_of(x.dim().1, of), at.tokens.start]])
}

/// Runs the recurrence from `state` (zero if there is none). `token` gives the
/// token at a place; for [`Read::Total`] its queries are those of the query
/// axis and its keys and values those of the key axis, each empty beyond.
pub(crate) fn define(
    spec: &Spec<'_>,
    state: Option<&Array4<f32>>,
    token: impl Fn(&Place) -> Token,
) -> Result<Reference> {
    let dims = spec.dims;
    let batch = if dims.packed { 1 } else { dims.batch };
    let (rows, cols) = (spec.state_dim, spec.state_cols());
    let mut out = filled("out", (batch, dims.q_heads, dims.q_len, dims.value_dim), 0f64)?;
    let mut bound = filled("out", (batch, dims.q_heads, dims.q_len), 0f64)?;
    let mut states = filled("state", spec.state_shape(), 0f64)?;
    if let Some(state) = state {
        states.assign(&state.mapv(f64::from));
    }
    for sequence in (0..dims.batch).map(|i| spec.lengths.sequence(&dims, i)) {
        for head in 0..dims.q_heads {
            let mut of =
                Recurrence::new(spec, states.slice(ndarray::s![sequence.index, head, .., ..]).to_owned());
            let place = |t| Place::new(&sequence, head, t..t + 1);
            let last = spec.steps - 1;
            if spec.read == Read::Total {
                for t in sequence.keys.clone() {
                    of.update(&token(&place(t)), cols);
                }
            }
            for t in sequence.queries.clone() {
                for step in t * spec.steps..t * spec.steps + last {
                    of.update(&token(&place(step)), cols);
                }
                let token = token(&place(t * spec.steps + last));
                let (o, b) = match spec.read {
                    Read::After => {
                        of.update(&token, cols);
                        of.read(&token)
                    }
                    Read::Before => {
                        let read = of.read(&token);
                        of.update(&token, cols);
                        read
                    }
                    Read::Total => of.read(&token),
                };
                for (c, o) in o.into_iter().enumerate() {
                    out[[sequence.batch, head, t, c]] = o;
                }
                bound[[sequence.batch, head, t]] = b;
            }
            for r in 0..rows {
                for c in 0..cols {
                    states[[sequence.index, head, r, c]] = of.state[[r, c]];
                }
            }
        }
    }
    Ok(Reference { out, state: states, bound })
}

/// The state of one head on its way, and what the error bound is made of.
struct Recurrence<'a> {
    spec: &'a Spec<'a>,
    state: ndarray::Array2<f64>,
    /// What the state would be if nothing cancelled: for each row the largest
    /// over the columns of the sum of magnitudes.
    size: Vec<f64>,
    /// The same for the column of the normaliser.
    total: Vec<f64>,
    /// Of both, for each row: what they are made of, each times the log decays
    /// that it has met, and one more for each.
    stretch: [Vec<f64>; 2],
    /// Of both, for each row: the largest yet, and what the keys add up to that
    /// have been written. What of these decays far enough counts as 0.
    undecayed: [Vec<f64>; 2],
    /// The largest norm that the state has had: what corrections are made of.
    norm: f64,
    tokens: usize,
}

impl<'a> Recurrence<'a> {
    fn new(spec: &'a Spec<'a>, state: ndarray::Array2<f64>) -> Self {
        let width = spec.dims.value_dim;
        let size: Vec<f64> = state
            .outer_iter()
            .map(|row| row.iter().take(width).fold(0.0, |m: f64, x| m.max(x.abs())))
            .collect();
        let total: Vec<f64> = state.outer_iter().map(|row| row.get(width).map_or(0.0, |x| x.abs())).collect();
        let norm = state.iter().map(|x| x * x).sum::<f64>().sqrt();
        let (stretch, undecayed) = (vec![0.0; state.nrows()], [size, total]);
        let [size, total] = undecayed.clone();
        Self { spec, state, size, total, stretch: [stretch.clone(), stretch], undecayed, norm, tokens: 0 }
    }

    fn update(&mut self, token: &Token, cols: usize) {
        let Token { k, v, decay, update, .. } = token;
        let v: Vec<f64> = v.iter().copied().chain(std::iter::once(1.0)).take(cols).collect();
        let rows = self.spec.state_dim;
        // a^T S, of the state before its decay.
        let seen: Vec<f64> = match update {
            Update::LowRank { a, .. } => {
                (0..cols).map(|c| (0..rows).map(|r| a[r] * self.state[[r, c]]).sum()).collect()
            }
            _ => Vec::new(),
        };
        for r in 0..rows {
            for c in 0..cols {
                self.state[[r, c]] *= decay[r];
            }
        }
        // What is written under the key: the value or what corrects the state.
        let written: Vec<f64> = match update {
            Update::Add | Update::LowRank { .. } => v.clone(),
            Update::Delta { beta } => (0..cols)
                .map(|c| beta * (v[c] - (0..rows).map(|r| k[r] * self.state[[r, c]]).sum::<f64>()))
                .collect(),
        };
        for r in 0..rows {
            for c in 0..cols {
                self.state[[r, c]] += k[r] * written[c];
                if let Update::LowRank { b, .. } = update {
                    self.state[[r, c]] += b[r] * seen[c];
                }
            }
        }
        let largest = v.iter().take(self.spec.dims.value_dim).fold(0.0, |m: f64, x| m.max(x.abs()));
        for r in 0..rows {
            let met = if decay[r] == 1.0 || decay[r] == 0.0 { 0.0 } else { decay[r].ln().abs() + 1.0 };
            for (i, (size, most)) in
                [(&mut self.size, largest), (&mut self.total, 1.0)].into_iter().enumerate()
            {
                let stretch = &mut self.stretch[i][r];
                *stretch = decay[r].abs() * (*stretch + met * size[r]);
                size[r] = decay[r].abs() * size[r] + k[r].abs() * most;
                let undecayed = &mut self.undecayed[i][r];
                *undecayed = undecayed.max(size[r]) + k[r].abs() * most;
            }
        }
        if !matches!(update, Update::Add) {
            let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let now = self.state.iter().map(|x| x * x).sum::<f64>().sqrt() + length(k) * length(&v);
            self.norm = self.norm.max(now);
        }
        self.tokens += 1;
    }

    /// `scale * q^T S`, divided by the [`Normaliser`] if there is one, and how
    /// far a kernel may be off.
    fn read(&self, token: &Token) -> (Vec<f64>, f64) {
        let Token { q, k, v, bonus, .. } = token;
        let spec = self.spec;
        let (rows, cols) = (spec.state_dim, spec.state_cols());
        let scale = spec.scale;
        let mut read: Vec<f64> =
            (0..cols).map(|c| (0..rows).map(|r| q[r] * self.state[[r, c]]).sum::<f64>()).collect();
        let mut size = (0..rows).map(|r| q[r].abs() * self.size[r]).sum::<f64>();
        let total = (0..rows).map(|r| q[r].abs() * self.total[r]).sum::<f64>();
        let largest = |x: &[f64]| x.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        if spec.read == Read::Before {
            let weight = (0..rows).map(|r| q[r] * bonus[r] * k[r]).sum::<f64>();
            for (read, v) in read.iter_mut().zip(v) {
                *read += weight * v;
            }
            let magnitude = (0..rows).map(|r| (q[r] * bonus[r] * k[r]).abs()).sum::<f64>();
            size += magnitude * largest(v);
        }
        if spec.rule != Rule::Add {
            // Errors of corrections are carried along; they do not grow where
            // the transitions do not.
            size = size.max(q.iter().map(|x| x * x).sum::<f64>().sqrt() * self.norm);
        }
        let unit = ERROR_CONSTANT * 2f64.powi(-24) * (spec.state_dim + self.tokens + 64) as f64;
        // What rounding the log decays may cost, and what may be dropped.
        let decayed = |i: usize| {
            if spec.decay == Decay::None && spec.rule == Rule::Add {
                return 0.0;
            }
            let row = |r: usize| {
                let tokens = self.tokens as f64;
                let dropped = q[r].abs() * (self.undecayed[i][r] + tokens) + self.undecayed[i][r];
                2f64.powi(-24) * q[r].abs() * self.stretch[i][r] + f64::from(NEGLIGIBLE) * dropped
            };
            scale.abs() * (0..rows).map(row).sum::<f64>()
        };
        read.iter_mut().for_each(|x| *x *= scale);
        let (mut size, mut total) = (scale.abs() * size, scale.abs() * total);
        let Some(normaliser) = spec.normaliser else {
            return (read, unit * size + decayed(0));
        };
        let sum = read.pop().unwrap_or(0.0);
        let count = || self.state[[rows - 1, cols - 1]];
        let weight = match normaliser {
            Normaliser::Sum { epsilon } => {
                total += f64::from(epsilon).abs();
                sum + f64::from(epsilon)
            }
            Normaliser::Shares { share } => {
                let share = f64::from(share);
                read.iter_mut().zip(v).for_each(|(read, v)| *read += share * v);
                size += share * largest(v);
                total += share * count();
                sum + share * count()
            }
            Normaliser::Bounded => {
                let root = count().sqrt();
                total = total.max(root);
                // A NaN stays.
                if sum.abs() < root { root } else { sum.abs() }
            }
        };
        if weight == 0.0 {
            return (vec![0.0; cols - 1], 0.0);
        }
        read.iter_mut().for_each(|x| *x /= weight);
        let off = unit * (size + largest(&read) * total) + decayed(0) + largest(&read) * decayed(1);
        let bound = off / weight.abs();
        (read, bound)
    }
}
