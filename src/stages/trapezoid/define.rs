//! The definition of tokens that turn and write with the next one, too: one after the
//! other, by the paper, in `f64`.

use std::f64::consts::{PI, TAU};

use ndarray::{Array2, ArrayView1, ArrayView3, ArrayView4, s};

use crate::definition::heads::{Head, of_heads};
use crate::definition::number::Real;
use crate::element::Element;
use crate::input::state::State;
use crate::input::{Dims, Lengths};
use crate::math::gates::exact;
use crate::math::rope::Pairs;
use crate::stages::pass::Defined;
use crate::stages::slots;
use crate::stages::trapezoid::{Mamba3State, of_head};

/// A call; parameters `[heads, ranks * dim]`.
pub(crate) struct Defining<'a, T> {
    /// Queries and keys, and values.
    pub(crate) rows: [ArrayView4<'a, T>; 2],
    pub(crate) v: ArrayView4<'a, T>,
    /// Log decays, steps, and logits of shares.
    pub(crate) numbers: [ArrayView3<'a, f32>; 3],
    pub(crate) angle: ArrayView4<'a, f32>,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) layout: Pairs,
    pub(crate) ranks: usize,
    pub(crate) scale: f64,
    pub(crate) skip: &'a [f32],
    pub(crate) biases: [Option<&'a Array2<f32>>; 2],
    pub(crate) values: Option<&'a Array2<f32>>,
    pub(crate) outs: Option<&'a Array2<f32>>,
    /// What values and outputs are multiplied by where there are no weights.
    pub(crate) even: f32,
    pub(crate) gate: Option<(ArrayView4<'a, T>, Option<&'a Array2<f32>>)>,
}

fn of<R: Real>(x: &f32) -> R {
    R::of(f64::from(*x))
}

impl<T: Element> Defining<'_, T> {
    /// Outputs, and the state that becomes of this one.
    pub(crate) fn run<R: Real>(&self, mut state: Mamba3State) -> Defined<R, Mamba3State> {
        let out = of_heads(&self.dims, &self.lengths, |head| self.head(head, &mut state));
        (out, state)
    }

    fn head<R: Real>(&self, head: &Head, state: &mut Mamba3State) -> Array2<R> {
        let (i, h, pairs, ranks) = (head.sequence, head.head, self.angle.dim().3, self.ranks);
        let steps = head.keys.start * ranks..head.keys.end * ranks;
        let [c, b]: [Array2<R>; 2] = self.rows.each_ref().map(|x| head.rows(x, &steps));
        let v: Array2<R> = head.rows(&self.v, &head.keys);
        let angle: Array2<f64> = head.rows(&self.angle, &head.keys);
        let [decays, sizes, traps] = self.numbers.map(|x| {
            let rows = x.slice(s![head.batch, head.of(x.dim().1), head.keys.clone()]);
            rows.mapv(f64::from)
        });
        let of_rows = |state: &State| state.view().slice(s![i, h, .., ..]).map(of::<R>);
        let sum = |p: usize| (0..2).map(|n| f64::from(state.angles.view()[[i, h, n, p]])).sum();
        let mut at: Vec<f64> = (0..pairs).map(sum).collect();
        let mut way = vec![0.0; pairs];
        let (mut sums, mut keys) = (of_rows(&state.state), of_rows(&state.key));
        let mut value = of_rows(&state.value).row(0).to_owned();
        let mut out = Array2::from_elem(v.dim(), R::of(0.0));
        // The weight of a rank and column, and the value of a rank.
        let weight = |of_heads: Option<&Array2<f32>>, at: usize, even: f32| {
            R::of(f64::from(*of_head(of_heads, h).get(at).unwrap_or(&even)))
        };
        let gained = |value: ArrayView1<'_, R>, rank: usize| {
            let gain = |e| weight(self.values, rank * value.len() + e, self.even);
            value.iter().enumerate().map(|(e, &x)| x * gain(e)).collect::<Vec<R>>()
        };
        for t in 0..v.dim().0 {
            for p in 0..pairs {
                let by = PI * angle[[t, p]].tanh() * sizes[t];
                (at[p], way[p]) = (at[p] + by, way[p] + by.abs());
            }
            let turned = |x: &Array2<R>, side: usize| {
                let bias = of_head(self.biases[side], h);
                let mut to = x.slice(s![t * ranks..(t + 1) * ranks, ..]).to_owned();
                for (rank, mut row) in to.outer_iter_mut().enumerate() {
                    let bias = bias.get(rank * row.len()..).unwrap_or_default();
                    let of = turned(row.view(), bias, self.layout, &at, &way);
                    row.assign(&ndarray::Array1::from(of));
                }
                to
            };
            let (c, b) = (turned(&c, 0), turned(&b, 1));
            let decay = slots::left(R::of(decays[t]));
            let own = R::rounded(exact::sigmoid(traps[t]) * sizes[t], 8.0);
            let before = R::rounded(exact::sigmoid(-traps[t]) * sizes[t], 8.0) * decay;
            sums.mapv_inplace(|sum| sum * decay);
            for rank in 0..ranks {
                let (last, v) = (gained(value.view(), rank), gained(v.row(t), rank));
                for ((d, e), sum) in sums.indexed_iter_mut() {
                    *sum = *sum + before * keys[[rank, d]] * last[e] + own * b[[rank, d]] * v[e];
                }
            }
            for rank in 0..ranks {
                let own = gained(v.row(t), rank);
                for (e, out) in out.row_mut(t).iter_mut().enumerate() {
                    let read = R::dot(c.row(rank).iter().copied().zip(sums.column(e).iter().copied()));
                    let mut y = R::rounded(self.scale, 1.0) * read;
                    if let Some(skip) = self.skip.get(h) {
                        y = y + of::<R>(skip) * own[e];
                    }
                    y = y * weight(self.outs, rank * own.len() + e, self.even);
                    if let Some((gate, weights)) = &self.gate {
                        let row = gate.slice(s![head.batch, head.of(gate.dim().1), head.keys.start + t, ..]);
                        let z = R::of(row[e].to_f64()) * weight(*weights, rank * own.len() + e, 1.0);
                        y = y * z * z.rising(exact::sigmoid, 8.0);
                    }
                    *out = *out + y;
                }
            }
            (keys, value) = (b, v.row(t).to_owned());
        }
        let put = |state: &mut State, rows: &Array2<f64>| {
            state.view_mut().slice_mut(s![i, h, .., ..]).assign(&rows.mapv(|x| x as f32));
        };
        let values = |rows: &Array2<R>| rows.mapv(|x| x.value());
        put(&mut state.state, &values(&sums));
        // Within half a turn, the rest of the rounding apart.
        let within = |x: f64| x - TAU * (x / TAU).round();
        let high = |x: f64| f64::from(within(x) as f32);
        let angles = |(n, p): (usize, usize)| if n == 0 { high(at[p]) } else { within(at[p]) - high(at[p]) };
        put(&mut state.angles, &Array2::from_shape_fn((2, pairs), angles));
        put(&mut state.key, &values(&keys));
        put(&mut state.value, &values(&value.insert_axis(ndarray::Axis(0))));
        out
    }
}

/// A row that has turned: with angles, and how far they have come.
fn turned<R: Real>(
    row: ArrayView1<'_, R>,
    bias: &[f32],
    layout: Pairs,
    angles: &[f64],
    way: &[f64],
) -> Vec<R> {
    let half = row.len() / 2;
    let biased = |(d, &x): (usize, &R)| bias.get(d).map_or(x, |bias| x + of(bias));
    let x: Vec<R> = row.iter().enumerate().map(biased).collect();
    let turned = |d: usize| {
        let (pair, other, second) = match layout {
            Pairs::Neighbours => (d / 2, d ^ 1, d % 2 == 1),
            Pairs::Halves if d < half => (d, d + half, false),
            Pairs::Halves => (d - half, d - half, true),
        };
        let Some(&angle) = angles.get(pair) else { return x[d] };
        // Angles are off by what their way was rounded to.
        let off = R::rounded(1.0, 8.0 + 8.0 * way[pair]) - R::of(1.0);
        let sign = if second { 1.0 } else { -1.0 };
        let (cos, sin) = (R::of(angle.cos()) + off, R::of(sign * angle.sin()) + off);
        x[d] * cos + x[other] * sin
    };
    (0..x.len()).map(turned).collect()
}
