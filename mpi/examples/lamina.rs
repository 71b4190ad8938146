//! Decoding with attention on some ranks and the model on another: rank 0 has the weights and
//! no cache, the others have the cache and no weights. "Lamina", arXiv 2405.01814.
//!
//! Each layer, rank 0 projects; keys and values of the new tokens go to the rank whose block
//! is next; queries go to all of them, and output and LSE of each come back and are merged.
//!
//! ```text
//! cargo build --release -p attention-kernels-mpi --example lamina
//! mpirun -n 4 target/release/examples/lamina [tokens in the cache] [tokens to decode]
//! ```

use std::time::{Duration, Instant};

use attention_kernels::{Attention, Bounded, Qkv, dense::Dense};
use attention_kernels_mpi::mpi::traits::CommunicatorCollectives;
use attention_kernels_mpi::plan::debit_and_credit;
use attention_kernels_mpi::{Group, mpi, spread};
use ndarray::{Array2, Array4, Axis, concatenate, s};

const LAYERS: usize = 2;
const BATCH: usize = 4;
const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const WIDTH: usize = Q_HEADS * DIM;
/// Tokens of a block, which one rank has.
const BLOCK: usize = 16;
/// With more tokens than these, outputs are not compared with those of one process.
const CHECKED: usize = 4096;

type Error = Box<dyn std::error::Error>;

/// Keys or values, `[batch, kv_heads, tokens, dim]`.
type Rows = Array4<f32>;

fn main() -> Result<(), Error> {
    let universe = mpi::initialize().ok_or("MPI is initialised already")?;
    let world = universe.world();
    let group = Group::new(&world);
    let (me, ranks) = (group.rank(), group.size());
    let mut arguments = std::env::args().skip(1);
    let mut number = |otherwise| arguments.next().map_or(Ok(otherwise), |x| x.parse::<usize>());
    let (tokens, steps) = (number(4096)?, number(32)?);

    // Blocks of the prompt: the last rank has had them all, and lends what is more than its
    // share. With one rank, that has all of it.
    let blocks = tokens.div_ceil(BLOCK);
    let workers = if ranks == 1 { 1 } else { ranks - 1 };
    let mut shares = vec![0; workers];
    shares[workers - 1] = blocks;
    let capacity = vec![blocks.div_ceil(workers); workers];
    for loan in debit_and_credit(&shares.clone(), &capacity)? {
        shares[loan.debtor] -= loan.blocks;
        shares[loan.creditor] += loan.blocks;
    }
    // Who has a block, of the prompt and then in turns; as a rank.
    let mut owners: Vec<usize> = (0..workers).flat_map(|worker| vec![worker; shares[worker]]).collect();
    owners.extend((0..steps.div_ceil(BLOCK) + 1).map(|block| block % workers));
    owners.iter_mut().for_each(|owner| *owner += ranks - workers);
    let owner = |token: usize| owners[token / BLOCK];

    let mine: Vec<_> = (0..tokens).filter(|&token| owner(token) == me).collect();
    // With room for what is to come.
    let new = (tokens..tokens + steps).filter(|&token| owner(token) == me).count();
    let mut caches: Vec<[Rows; 2]> =
        (0..LAYERS).map(|layer| [0, 1].map(|which| prompt(layer, which, &mine, new))).collect();
    let mut held = [mine.len(); LAYERS];
    let checks = me == 0 && tokens + steps <= CHECKED + 64;
    let everything: Vec<_> = (0..if checks { tokens } else { 0 }).collect();
    let mut whole: Vec<[Rows; 2]> =
        (0..LAYERS).map(|layer| [0, 1].map(|which| prompt(layer, which, &everything, 0))).collect();

    let model = (me == 0).then(Model::new);
    let mut x = Array2::from_shape_fn((BATCH, WIDTH), |(b, c)| ((b * 7 + c) as f32).sin());
    let (mut worst, mut modelled) = (0f64, Duration::ZERO);
    world.barrier();
    group.take_traffic();
    let since = Instant::now();
    for step in 0..steps {
        for layer in 0..LAYERS {
            let begun = Instant::now();
            let projected = model.as_ref().map(|model| model.project(layer, &x));
            modelled += begun.elapsed();
            let to = owner(tokens + step);
            let mut arrived = false;
            for which in [0, 1] {
                let rows = projected.as_ref().map(|rows| rows[1 + which].view());
                if let Some(new) = spread::hand(&group, 0, to, rows)? {
                    caches[layer][which].slice_mut(s![.., .., held[layer]..held[layer] + 1, ..]).assign(&new);
                    arrived = true;
                }
            }
            held[layer] += usize::from(arrived);
            let q = projected.as_ref().map(|rows| rows[0].view());
            let [k, v] = caches[layer].each_ref().map(|rows| rows.slice(s![.., .., ..held[layer], ..]));
            let attended = spread::attend(&group, 0, q, k, v, None)?;
            let (Some(model), Some(attended), Some(projected)) = (&model, attended, projected) else {
                continue;
            };
            if checks {
                for which in [0, 1] {
                    let all = &mut whole[layer][which];
                    *all = concatenate(Axis(2), &[all.view(), projected[1 + which].view()])?;
                }
                let [k, v] = &whole[layer];
                let one = Qkv::new(projected[0].view(), k.view(), v.view());
                let dense = Dense::builder().build()?;
                let (want, allowed) = (dense.reference(one)?, dense.error_bound(one)?);
                for ((b, h, i, c), got) in attended.out.indexed_iter() {
                    let off = (f64::from(*got) - want[[b, h, i, c]]).abs();
                    worst = worst.max(off / allowed[[b, h, i]]);
                }
            }
            let begun = Instant::now();
            x = model.mix(layer, &x, &attended.out);
            modelled += begun.elapsed();
        }
    }
    let time = since.elapsed().as_secs_f64();
    let traffic = group.take_traffic();
    let mut waited = vec![0f64; ranks];
    world.all_gather_into(&traffic.waited.as_secs_f64(), &mut waited[..]);
    let mut caching = vec![0u64; ranks];
    world.all_gather_into(&(held[0] as u64), &mut caching[..]);
    if me == 0 {
        let calls = (steps * LAYERS) as u64;
        println!("{tokens} tokens in the caches of {workers} ranks, {BATCH} sequences, {LAYERS} layers");
        println!("  tokens that each rank has: {caching:?}");
        println!(
            "  {:.0} tokens/s; the model {:.1} % of the time; rank 0 sends {} bytes a layer, whatever they are",
            (steps * BATCH) as f64 / time,
            100.0 * modelled.as_secs_f64() / time,
            traffic.bytes / calls.max(1)
        );
        let waits: Vec<_> = waited.iter().map(|wait| format!("{:.0} %", 100.0 * wait / time)).collect();
        println!("  share of its time that each rank waits: {}", waits.join(", "));
        if checks {
            println!("  {worst:.1e} of the bound of one process, at most");
            if worst > 1.0 || worst.is_nan() {
                return Err("outputs are not those of one process".into());
            }
        }
    }
    Ok(())
}

/// Keys (0) or values (1) of some tokens of the prompt, and rows for so many others.
fn prompt(layer: usize, which: usize, tokens: &[usize], others: usize) -> Rows {
    Array4::from_shape_fn((BATCH, KV_HEADS, tokens.len() + others, DIM), |(b, h, i, c)| {
        let token = tokens.get(i).copied().unwrap_or_default();
        let place = (layer * 31 + which * 17 + b * 7 + h * 5 + token * (c + 3)) as f32;
        if which == 0 { 0.5 * place.sin() } else { place.cos() }
    })
}

/// Weights of random numbers.
struct Model {
    layers: Vec<Weights>,
}

struct Weights {
    q: Array2<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    out: Array2<f32>,
    up: Array2<f32>,
    down: Array2<f32>,
}

impl Model {
    fn new() -> Self {
        let of = |seed: usize, rows: usize, columns: usize| {
            Array2::from_shape_fn((rows, columns), |(i, j)| {
                let x = ((i * columns + j + seed * 7919) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                (x as f32 / (1 << 23) as f32 - 1.0) * (3.0 / rows as f32).sqrt()
            })
        };
        let narrow = KV_HEADS * DIM;
        let layers = (0..LAYERS).map(|layer| Weights {
            q: of(layer * 6, WIDTH, WIDTH),
            k: of(layer * 6 + 1, WIDTH, narrow),
            v: of(layer * 6 + 2, WIDTH, narrow),
            out: of(layer * 6 + 3, WIDTH, WIDTH),
            up: of(layer * 6 + 4, WIDTH, 4 * WIDTH),
            down: of(layer * 6 + 5, 4 * WIDTH, WIDTH),
        });
        Self { layers: layers.collect() }
    }

    /// Queries, keys and values of a token of each sequence.
    fn project(&self, layer: usize, x: &Array2<f32>) -> [Rows; 3] {
        let weights = &self.layers[layer];
        let x = normed(x);
        [(&weights.q, Q_HEADS), (&weights.k, KV_HEADS), (&weights.v, KV_HEADS)].map(|(weights, heads)| {
            let rows = x.dot(weights);
            Array4::from_shape_fn((BATCH, heads, 1, DIM), |(b, h, _, c)| rows[[b, h * DIM + c]])
        })
    }

    /// The rest of the layer.
    fn mix(&self, layer: usize, x: &Array2<f32>, attended: &Rows) -> Array2<f32> {
        let weights = &self.layers[layer];
        let rows = attended.slice(s![.., .., 0, ..]);
        let rows = Array2::from_shape_fn((BATCH, WIDTH), |(b, c)| rows[[b, c / DIM, c % DIM]]);
        let x = x + &rows.dot(&weights.out);
        let hidden = normed(&x).dot(&weights.up).mapv(|x| x / (1.0 + (-x).exp()));
        x + &hidden.dot(&weights.down)
    }
}

/// Rows of a mean square of 1.
fn normed(x: &Array2<f32>) -> Array2<f32> {
    let sizes = x.mapv(|x| x * x).mean_axis(Axis(1)).map(|sizes| sizes.mapv(|x| (x + 1e-6).sqrt()));
    sizes.map_or(x.clone(), |sizes| x / &sizes.insert_axis(Axis(1)))
}
