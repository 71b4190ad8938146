//! Projections that are changed for a few concepts: what a row has of a concept is taken
//! off, and what the concept is to become is let in through a gate.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayView4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::math::algebra::{eigen, solve};
use crate::simd::exp::sigmoid;
use crate::simd::{Isa, Simd};
use crate::stages::affine::Affine;
use crate::stages::pass::{Pass, Scratch};
use crate::stages::row::{self, RowMap};
use crate::stages::sum;

/// A concept.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// `i`, its encoding, `[C]`.
    pub input: Array1<f32>,
    /// `o` of keys, `[kv_heads * head_dim]`: what the superclass has.
    pub key: Array1<f32>,
    /// `o` of values, `[kv_heads * value_dim]`.
    pub value: Array1<f32>,
}

/// `C^-1` of encodings, `[n, C]`, with `C` the mean of their squares, not centred: about
/// `2 n C^2 + 6 C^3` flops in `f64`, once.
///
/// # Errors
/// Where they do not span all of `C`.
pub fn inverse_moments(encodings: ArrayView2<'_, f32>) -> Result<Array2<f64>> {
    let x = encodings.mapv(f64::from);
    let (values, vectors) = eigen((x.t().dot(&x) / x.dim().0.max(1) as f64).view());
    let [most, least] = [values.first(), values.last()].map(|x| x.copied().unwrap_or(1.0));
    let spans = least > 1e-12 * most;
    if !spans {
        let expected = format!("finite ones that span all of {} dimensions", x.dim().1);
        return Err(Error::value("encodings", expected, format_args!("{} of them", x.dim().0)));
    }
    Ok((&vectors / &values).dot(&vectors.t()))
}

/// Rows at right angles by the metric, of length 1, that span those of `inputs`; none
/// where these do not span as many dimensions.
pub(crate) fn basis(inputs: &Array2<f64>, metric: &Array2<f64>) -> Option<Array2<f64>> {
    let mut basis = inputs.clone();
    let product = |a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>| a.dot(&metric.dot(&b));
    for c in 0..inputs.dim().0 {
        let mut row = inputs.row(c).to_owned();
        let energy = product(row.view(), row.view());
        // Twice, for what rounding leaves of the first time.
        for before in (0..2).flat_map(|_| 0..c) {
            let by = product(row.view(), basis.row(before));
            row.scaled_add(-by, &basis.row(before));
        }
        let left = product(row.view(), row.view());
        let apart = left > 1e-12 * energy;
        if !apart {
            return None;
        }
        basis.row_mut(c).assign(&(row / left.sqrt()));
    }
    Some(basis)
}

/// How far a concept is let in, of its share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    pub(crate) bias: f32,
    pub(crate) temperature: f32,
}

impl RowMap for Gate {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        for x in row.chunks_mut(S::LANES) {
            let above = s.sub(s.load_tail(x), s.splat(self.bias));
            s.store_tail(x, sigmoid(s, s.div(above, s.splat(self.temperature))));
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let [bias, temperature] = [self.bias, self.temperature].map(|x| R::of(f64::from(x)));
        x.iter().map(|&x| ((x - bias) / temperature).sigmoid().stored()).collect()
    }
}

/// The projections of keys and values, and what is changed of them.
#[derive(Clone, Debug)]
pub(crate) struct Edits {
    weights: [Array2<f32>; 2],
    gate: Gate,
    /// Encodings of the concepts, and rows at right angles that span the same.
    inputs: [Array2<f64>; 2],
    /// Both times the metric.
    seen: [Array2<f64>; 2],
    outputs: [Array2<f32>; 2],
    /// `s_c / E_c`, of all concepts.
    shares: Affine,
    /// `W` of what is left of a row, and `o`.
    edited: [[Affine; 2]; 2],
}

impl Edits {
    /// Of finite `weights`, `[out, C]`, and `metric`, `[C, C]`, which is not looked at
    /// where there are no concepts.
    pub(crate) fn new(
        weights: [Array2<f32>; 2],
        metric: &Array2<f64>,
        concepts: &[Concept],
        gate: Gate,
    ) -> Result<Self> {
        let (n, width) = (concepts.len(), weights[0].dim().1);
        let sides = weights.each_ref().map(|x| x.dim().0);
        if n > 0 && metric.dim() != (width, width) {
            return Err(Error::shape("metric", format!("[C, C] = [{width}, {width}]"), metric.shape()));
        }
        let most = metric.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        let mut pairs = (0..n.min(1) * width).flat_map(|i| (0..i).map(move |j| (i, j)));
        if let Some((i, j)) = pairs.find(|&(i, j)| (metric[[i, j]] - metric[[j, i]]).abs() > 1e-6 * most) {
            let pair = [metric[[i, j]], metric[[j, i]]];
            return Err(Error::value("metric", "a symmetric matrix", format_args!("{pair:?} at {i}, {j}")));
        }
        for concept in concepts {
            let parts = [&concept.input, &concept.key, &concept.value];
            if parts.map(|x| x.len()) != [width, sides[0], sides[1]] {
                let expected = format!("input, key and value of {width}, {} and {}", sides[0], sides[1]);
                return Err(Error::shape("concepts", expected, &parts.map(|x| x.len())));
            }
            if let Some(x) = parts.into_iter().flatten().find(|x| !x.is_finite()) {
                return Err(Error::value("concepts", "finite numbers", x));
            }
        }
        let times = |rows: &Array2<f64>| if n > 0 { rows.dot(metric) } else { rows.clone() };
        let inputs = Array2::from_shape_fn((n, width), |(c, d)| f64::from(concepts[c].input[d]));
        let seen = times(&inputs);
        let products = seen.dot(&inputs.t());
        if let Some(energy) = products.diag().iter().find(|&&x| x.is_nan() || x <= 0.0 || x.is_infinite()) {
            return Err(Error::value("metric", "a positive product of each concept with itself", energy));
        }
        let Some(basis) = basis(&inputs, metric) else {
            return Err(Error::value("concepts", "concepts none of which is made of others", n));
        };
        // How much of each concept a row has, by all of them.
        let mut within = Array2::<f64>::zeros((n, width));
        for (d, mut column) in within.columns_mut().into_iter().enumerate() {
            column.assign(&Array1::from(solve(products.clone(), &seen.column(d).to_vec())));
        }
        let shares = Array2::from_shape_fn((n, width), |(c, d)| (seen[[c, d]] / products[[c, c]]) as f32);
        let output = |which: usize, of: fn(&Concept) -> &Array1<f32>| {
            Array2::from_shape_fn((sides[which], n), |(r, c)| of(&concepts[c])[r])
        };
        let outputs = [output(0, |x| &x.key), output(1, |x| &x.value)];
        let edit = |weights: &Array2<f32>, outputs: &Array2<f32>| -> Result<[Affine; 2]> {
            let wide = weights.mapv(f64::from);
            let rest = (&wide - &wide.dot(&inputs.t()).dot(&within)).mapv(|x| x as f32);
            Ok([Affine::new("concepts", &rest, None)?, Affine::new("concepts", outputs, None)?])
        };
        Ok(Self {
            gate,
            shares: Affine::new("concepts", &shares, None)?,
            edited: [edit(&weights[0], &outputs[0])?, edit(&weights[1], &outputs[1])?],
            weights,
            seen: [seen, times(&basis)],
            inputs: [inputs, basis],
            outputs,
        })
    }

    /// Elements of a key of all heads, of such a value, and of what both are made of.
    pub(crate) fn sides(&self) -> [usize; 3] {
        let [keys, values] = self.weights.each_ref().map(|x| x.dim());
        [keys.0, values.0, keys.1]
    }

    /// Bytes of all that is read.
    pub(crate) fn bytes(&self) -> usize {
        self.shares.bytes() + self.edited.iter().flatten().map(Affine::bytes).sum::<usize>()
    }

    /// Keys and values of rows `[batch, 1, len, C]`.
    pub(crate) fn run<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<[Scratch<'p>; 2]> {
        let shares = self.shares.run(pass, isa, x.reborrow())?;
        let mut gates = pass.rows(shares.dim())?;
        row::run(pass, isa, shares.view(), &self.gate, gates.view_mut());
        let mut project = |[rest, outputs]: &[Affine; 2]| -> Result<Scratch<'p>> {
            let parts = [rest.run(pass, isa, x.reborrow())?, outputs.run(pass, isa, gates.view())?];
            let mut rows = pass.rows(parts[0].dim())?;
            sum::of(pass, isa, &parts.each_ref().map(Scratch::view), rows.view_mut());
            Ok(rows)
        };
        Ok([project(&self.edited[0])?, project(&self.edited[1])?])
    }

    /// The definition, of some rows and one head of so many elements: `which` 0 is its keys.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>, which: usize, head: usize, dim: usize) -> Array2<R> {
        let mut rows = Array2::from_elem((x.dim().0, dim), R::of(0.0));
        for (e, mut row) in x.rows().into_iter().zip(rows.rows_mut()) {
            let product = |seen: ArrayView1<'_, f64>| {
                R::dot(e.iter().zip(seen).map(|(&e, &x)| (e, R::rounded(x, 1.0))))
            };
            let energies = self.seen[0].rows().into_iter().zip(self.inputs[0].rows());
            let shares = energies.map(|(seen, i)| product(seen) / R::rounded(seen.dot(&i), 1.0));
            let gates = self.gate.define(Array1::from_iter(shares).view());
            let mut rest = e.to_owned();
            for (seen, u) in self.seen[1].rows().into_iter().zip(self.inputs[1].rows()) {
                let by = product(seen);
                rest.iter_mut().zip(u).for_each(|(x, &u)| *x = *x - by * R::rounded(u, 1.0));
            }
            for (c, to) in row.iter_mut().enumerate() {
                let [own, new] = [&self.weights, &self.outputs].map(|x| x[which].row(head * dim + c));
                let terms = own.into_iter().zip(&rest).chain(new.into_iter().zip(&gates));
                *to = R::dot(terms.map(|(&w, &x)| (R::of(f64::from(w)), x))).stored();
            }
        }
        rows
    }
}
