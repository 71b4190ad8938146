//! Training through attention: a head learns to look things up.
//!
//! ```text
//! cargo run --release --example train
//! ```
//!
//! A sequence holds pairs of a name and a number, and then asks for some of the names.
//! Names are noisy vectors, so the head must learn which directions tell them apart: it
//! learns the matrices of its queries and keys, by the gradients that [`Backward`]
//! gives, and Adam. Values are the numbers themselves.

use attention_kernels::dense::{Dense, SavedForward};
use attention_kernels::{Backward, Mergeable, Qkv, Result};
use ndarray::{Array, Array2, Array3, Array4, ArrayView4, Dimension, Zip, s};

#[path = "support/noise.rs"]
mod noise;

const BATCH: usize = 32;
const PAIRS: usize = 24;
const ASKED: usize = 12;
/// Dimensions of a name, of which the first tell names apart; the others are noise, and
/// louder.
const DIM: usize = 32;
const TELLING: usize = 8;
const STEPS: usize = 1000;

/// Sequences: names with numbers, names that are asked for, and the answers.
struct Batch {
    names: Array4<f32>,
    numbers: Array4<f32>,
    asked: Array4<f32>,
    answers: Array4<f32>,
}

impl Batch {
    fn new(noise: &mut impl FnMut() -> f32) -> Self {
        let mut loud = |len| Array4::from_shape_simple_fn((BATCH, 1, len, DIM), || 3.0 * noise());
        let (mut names, mut asked) = (loud(PAIRS), loud(ASKED));
        names.slice_mut(s![.., .., .., ..TELLING]).mapv_inplace(|x| x / 3.0);
        let numbers = Array4::from_shape_simple_fn((BATCH, 1, PAIRS, 1), &mut *noise);
        let mut answers = Array4::zeros((BATCH, 1, ASKED, 1));
        for b in 0..BATCH {
            for i in 0..ASKED {
                let pair = (noise().abs() * 1e4) as usize % PAIRS;
                let telling = names.slice(s![b, 0, pair, ..TELLING]);
                asked.slice_mut(s![b, 0, i, ..TELLING]).assign(&telling);
                answers[[b, 0, i, 0]] = numbers[[b, 0, pair, 0]];
            }
        }
        Self { names, numbers, asked, answers }
    }
}

/// `x . matrix` along the last axis.
fn project(x: ArrayView4<'_, f32>, matrix: &Array2<f32>) -> Array4<f32> {
    let (batch, heads, len, dim) = x.dim();
    let rows = x.to_shape((batch * heads * len, dim)).expect("as many elements");
    let out = rows.dot(matrix);
    out.into_shape_with_order((batch, heads, len, matrix.ncols())).expect("as many elements")
}

/// The gradient of that matrix.
fn matrix_gradient(x: ArrayView4<'_, f32>, d_out: ArrayView4<'_, f32>) -> Array2<f32> {
    let rows = |x: ArrayView4<'_, f32>| {
        let dim = x.dim().3;
        x.to_shape((x.len() / dim, dim)).expect("as many elements").to_owned()
    };
    rows(x).t().dot(&rows(d_out))
}

/// Adam, for one array of parameters.
struct Adam<D: Dimension> {
    mean: Array<f32, D>,
    square: Array<f32, D>,
}

impl<D: Dimension> Adam<D> {
    fn new(like: &Array<f32, D>) -> Self {
        Self { mean: Array::zeros(like.raw_dim()), square: Array::zeros(like.raw_dim()) }
    }

    fn step(&mut self, step: usize, parameters: &mut Array<f32, D>, gradient: &Array<f32, D>) {
        const RATE: f32 = 0.01;
        const BETA: f32 = 0.9;
        const BETA2: f32 = 0.99;
        let unbias = |beta: f32| 1.0 - beta.powi(step as i32 + 1);
        Zip::from(parameters).and(gradient).and(&mut self.mean).and(&mut self.square).for_each(
            |x, &g, mean, square| {
                *mean += (1.0 - BETA) * (g - *mean);
                *square += (1.0 - BETA2) * (g * g - *square);
                *x -= RATE * (*mean / unbias(BETA)) / ((*square / unbias(BETA2)).sqrt() + 1e-8);
            },
        );
    }
}

fn main() -> Result<()> {
    let mut noise = noise::noise(3);
    let mut matrix = || Array2::from_shape_simple_fn((DIM, DIM), || 0.1 * noise());
    let (mut of_queries, mut of_keys) = (matrix(), matrix());
    let (mut adam_q, mut adam_k) = (Adam::new(&of_queries), Adam::new(&of_keys));
    let dense = Dense::builder().build()?;

    println!("{PAIRS} names with numbers, {ASKED} are asked for; answers of mean square 1\n");
    println!("step    error");
    for step in 0..=STEPS {
        let batch = Batch::new(&mut noise);
        let (q, k) = (project(batch.asked.view(), &of_queries), project(batch.names.view(), &of_keys));
        let x = Qkv::new(q.view(), k.view(), batch.numbers.view());
        // The backward pass takes output and LSE instead of computing them once more.
        let (out, lse): (Array4<f32>, Array3<f32>) = dense.forward_with_lse(x)?;

        let off = &out - &batch.answers;
        let error = off.mapv(|x| x * x).mean().unwrap_or(0.0);
        if step % 100 == 0 {
            println!("{step:4} {error:8.4}  {}", "#".repeat((40.0 * error.min(1.5)) as usize));
        }
        let d_out = 2.0 / off.len() as f32 * off;
        let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
        let gradients = dense.backward(x, d_out.view(), saved)?;
        adam_q.step(step, &mut of_queries, &matrix_gradient(batch.asked.view(), gradients.q.view()));
        adam_k.step(step, &mut of_keys, &matrix_gradient(batch.names.view(), gradients.k.view()));
    }
    Ok(())
}
