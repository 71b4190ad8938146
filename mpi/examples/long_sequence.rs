//! A sequence that is cut over all ranks: tokens per second, bytes a layer, and who waits
//! for whom. `wire` times messages between two ranks.
//!
//! ```text
//! cargo build --release -p attention-kernels-mpi --example long_sequence
//! mpirun -n 4 target/release/examples/long_sequence [tokens] [lightning|ring|gathered|heads|wire]
//! ```

use std::time::{Duration, Instant};

use attention_kernels::linear::Lightning;
use attention_kernels::{Qkv, dense::Dense};
use attention_kernels_mpi::lasp::{self, Transition};
use attention_kernels_mpi::mpi::traits::{Communicator, CommunicatorCollectives};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::ring::Ring;
use attention_kernels_mpi::{Group, gathered, heads, mpi, spread};
use ndarray::Array4;

const HEADS: usize = 8;
const DIM: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let universe = mpi::initialize().ok_or("MPI is initialised already")?;
    let world = universe.world();
    let group = Group::new(&world).with_patience(Duration::from_secs(600));
    let mut arguments = std::env::args().skip(1);
    let tokens: usize = arguments.next().map_or(Ok(32_768), |x| x.parse())?;
    let only = arguments.next();
    let asked = |name: &str| only.as_ref().is_none_or(|only| only == name);

    if asked("lightning") {
        let x = rows(Cut::even(tokens, group.size()).held(group.rank()), group.rank());
        let lightning = Lightning::builder(HEADS).build()?;
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let mut checked = Ok(());
        report(&world, &group, "LASP-2, Lightning", tokens, || {
            checked = lasp::forward(&group, &lightning, qkv, Transition::Rows).map(|_| ());
        });
        checked?;
    }
    if asked("ring") || asked("gathered") {
        let cut = Cut::zigzag(tokens, group.size());
        let x = rows(cut.held(group.rank()), group.rank());
        let (x, ring) = (x.view(), Ring::new(cut).causal());
        let mut checked = Ok(());
        if asked("ring") {
            report(&world, &group, "ring, causal, zigzag", tokens, || {
                checked = ring.forward(&group, x, x, x).map(|_| ());
            });
            checked.clone()?;
        }
        if asked("gathered") {
            report(&world, &group, "gathered, causal, zigzag: the baseline", tokens, || {
                checked = gathered::forward(&group, &ring, x, x, x).map(|_| ());
            });
            checked?;
        }
    }
    if asked("heads") {
        let cut = Cut::even(tokens, group.size());
        let x = rows(cut.held(group.rank()), group.rank());
        let dense = Dense::builder().causal().build()?;
        let mut checked = Ok(());
        report(&world, &group, "heads, causal", tokens, || {
            checked = heads::forward(&group, &dense, &cut, x.view(), x.view(), x.view()).map(|_| ());
        });
        checked?;
    }
    if asked("wire") && group.size() > 1 {
        for (len, calls) in [(4, 1000), (1 << 18, 4)] {
            let x = rows(len, group.rank()).into_shape_with_order((1, 1, len * HEADS, DIM))?;
            let x = x.slice(ndarray::s![.., .., ..len, ..]);
            world.barrier();
            let since = Instant::now();
            for call in 0..calls {
                let (from, to) = (call % 2, 1 - call % 2);
                spread::hand(&group, from, to, (group.rank() == from).then_some(x))?;
            }
            let each = since.elapsed().as_secs_f64() / calls as f64;
            if group.rank() == 0 {
                println!("{} bytes from rank to rank: {:.1} us", 4 * len * DIM, 1e6 * each);
            }
        }
    }
    Ok(())
}

/// This rank's rows: no rank ever has those of another.
fn rows(held: usize, rank: usize) -> Array4<f32> {
    Array4::from_shape_fn((1, HEADS, held, DIM), |(_, h, i, c)| ((h + i * (c + 3) + rank) as f32).sin())
}

/// Runs a layer and shows, on rank 0, what it took.
fn report(world: &impl Communicator, group: &Group, name: &str, tokens: usize, mut layer: impl FnMut()) {
    // What is allocated for the first time is not what is measured.
    layer();
    world.barrier();
    group.take_traffic();
    group.take_waits();
    let since = Instant::now();
    layer();
    let mine = since.elapsed().as_secs_f64();
    let (bytes, waits) = (group.take_traffic().bytes, group.take_waits());
    let waits: Vec<f64> = waits.iter().map(Duration::as_secs_f64).collect();
    let ranks = group.size();
    let (mut all_times, mut all_bytes, mut all_waits) =
        (vec![0.0; ranks], vec![0u64; ranks], vec![0.0; ranks * ranks]);
    world.all_gather_into(&mine, &mut all_times[..]);
    world.all_gather_into(&bytes, &mut all_bytes[..]);
    world.all_gather_into(&waits[..], &mut all_waits[..]);
    if group.rank() > 0 {
        return;
    }
    let time = all_times.iter().copied().fold(0.0, f64::max);
    println!("{name}: {tokens} tokens on {ranks} ranks, {HEADS} heads of {DIM}");
    println!("  {time:.3} s, {:.0} tokens/s, bytes sent by each rank {all_bytes:?}", tokens as f64 / time);
    println!("  share of its time that a rank (row) waits for another (column), . works:");
    for (rank, waits) in all_waits.chunks(ranks).enumerate() {
        let cells: Vec<_> = waits.iter().map(|wait| format!("{:5.1} %", 100.0 * wait / time)).collect();
        let filled = (40.0 * waits.iter().sum::<f64>() / time).round() as usize;
        let bar = format!("{}{}", "#".repeat(filled.min(40)), ".".repeat(40 - filled.min(40)));
        println!("  {rank:2} {} {bar}", cells.join(" "));
    }
}
