//! A sequence that one rank would not hold, cut over all of them: tokens per second, bytes
//! sent a layer, what a rank has in memory, and who waits for whom. `wire` times messages
//! between two ranks.
//!
//! ```text
//! cargo build --release -p attention-kernels-mpi --example long_sequence
//! mpirun -n 4 target/release/examples/long_sequence [tokens] [lightning|ring|gathered|heads|wire] [--memory MiB]
//! ```
//!
//! A rank makes its own tokens alone. `--memory` is how much it may have: where queries, keys,
//! values and outputs of its tokens take more, the example refuses. By default it is 7/8 of what
//! those of the whole sequence take, so that no rank could hold them. Besides its own rows a
//! form has what it sends, what arrives, and what it works in: the most that was allocated at
//! once is counted, and compared with the budget, whatever the form. MPI's own buffers are not
//! Rust's, and not counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
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
/// Bytes of a token's queries, keys, values and outputs.
const TOKEN: usize = 4 * HEADS * DIM * size_of::<f32>();

/// Counts what is allocated now, and the most that was.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, called with what came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(size, Relaxed) + size, Relaxed);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Asked {
    tokens: usize,
    form: Option<String>,
    /// Bytes that a rank may have.
    memory: usize,
}

impl Asked {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let (mut tokens, mut form, mut memory) = (None, None, None);
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            if argument == "--memory" {
                let mib = arguments.next().ok_or("--memory: expected MiB")?;
                memory = Some((mib.parse::<f64>()? * f64::from(1 << 20)) as usize);
            } else if tokens.is_none() && form.is_none() && argument.parse::<usize>().is_ok() {
                tokens = argument.parse().ok();
            } else {
                form = Some(argument);
            }
        }
        let tokens = tokens.unwrap_or(32_768);
        Ok(Self { tokens, form, memory: memory.unwrap_or(tokens * TOKEN / 8 * 7) })
    }

    /// Whether a form is asked for.
    fn is(&self, form: &str) -> bool {
        self.form.as_ref().is_none_or(|asked| asked == form)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let universe = mpi::initialize().ok_or("MPI is initialised already")?;
    let world = universe.world();
    let group = Group::new(&world).with_patience(Duration::from_secs(600));
    let (me, ranks) = (group.rank(), group.size());
    let asked = Asked::new()?;
    let (even, zigzag) = (Cut::even(asked.tokens, ranks), Cut::zigzag(asked.tokens, ranks));
    // The same on all ranks, so that none waits for another.
    let most = (0..ranks).map(|rank| TOKEN * even.held(rank).max(zigzag.held(rank))).max().unwrap_or(0);
    if me == 0 {
        let [whole, most, memory] = [asked.tokens * TOKEN, most, asked.memory].map(mib);
        println!("{} tokens on {ranks} ranks, {HEADS} heads of {DIM}, f32", asked.tokens);
        println!("  queries, keys, values and outputs: {whole:.1} MiB, of a rank at most {most:.1} MiB");
        println!("  a rank may have: {memory:.1} MiB");
    }
    if most > asked.memory {
        let (most, memory) = (mib(most), mib(asked.memory));
        return Err(format!("--memory: expected {most:.1} MiB for a rank's rows, got {memory:.1}").into());
    }

    if asked.is("lightning") {
        let [q, k, v] = rows(&even, me);
        let lightning = Lightning::builder(HEADS).build()?;
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let mut checked = Ok(());
        report(&world, &group, "LASP-2, Lightning", &asked, || {
            checked = lasp::forward(&group, &lightning, qkv, Transition::Rows).map(|_| ());
        });
        checked?;
    }
    if asked.is("ring") || asked.is("gathered") {
        let [q, k, v] = rows(&zigzag, me);
        let (q, k, v, ring) = (q.view(), k.view(), v.view(), Ring::new(zigzag.clone()).causal());
        let mut checked = Ok(());
        if asked.is("ring") {
            report(&world, &group, "ring, causal, zigzag", &asked, || {
                checked = ring.forward(&group, q, k, v).map(|_| ());
            });
            checked.clone()?;
        }
        if asked.is("gathered") {
            report(&world, &group, "gathered, causal, zigzag: the baseline", &asked, || {
                checked = gathered::forward(&group, &ring, q, k, v).map(|_| ());
            });
            checked?;
        }
    }
    if asked.is("heads") {
        let [q, k, v] = rows(&even, me);
        let dense = Dense::builder().causal().build()?;
        let mut checked = Ok(());
        report(&world, &group, "heads, causal", &asked, || {
            checked = heads::forward(&group, &dense, &even, q.view(), k.view(), v.view()).map(|_| ());
        });
        checked?;
    }
    if asked.is("wire") && ranks > 1 {
        for (len, calls) in [(4, 1000), (1 << 18, 4)] {
            let x = Array4::from_shape_fn((1, 1, len, DIM), |(.., i, c)| (i + c) as f32);
            world.barrier();
            let since = Instant::now();
            for call in 0..calls {
                let (from, to) = (call % 2, 1 - call % 2);
                spread::hand(&group, from, to, (me == from).then_some(x.view()))?;
            }
            let each = since.elapsed().as_secs_f64() / calls as f64;
            if me == 0 {
                println!("{} bytes from rank to rank: {:.1} us", 4 * len * DIM, 1e6 * each);
            }
        }
    }
    Ok(())
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Queries, keys and values of a rank's tokens: no rank ever makes those of another.
fn rows(cut: &Cut, rank: usize) -> [Array4<f32>; 3] {
    let tokens: Vec<usize> = cut.positions(rank).collect();
    [0, 1, 2].map(|which| {
        let number = |(_, h, i, c): (usize, usize, usize, usize)| (h + which + tokens[i] * (c + 3)) as f32;
        Array4::from_shape_fn((1, HEADS, tokens.len(), DIM), |at| number(at).sin())
    })
}

/// Runs a layer and shows, on rank 0, what it took.
fn report(world: &impl Communicator, group: &Group, name: &str, asked: &Asked, mut layer: impl FnMut()) {
    // What is allocated for the first time is not what is timed.
    MOST.store(NOW.load(Relaxed), Relaxed);
    layer();
    world.barrier();
    group.take_traffic();
    group.take_waits();
    let since = Instant::now();
    layer();
    let mine = since.elapsed().as_secs_f64();
    let (bytes, waits) = (group.take_traffic().bytes, group.take_waits());
    let (most, waits) =
        (MOST.load(Relaxed) as u64, waits.iter().map(Duration::as_secs_f64).collect::<Vec<_>>());
    let ranks = group.size();
    let (mut all_times, mut all_waits) = (vec![0.0; ranks], vec![0.0; ranks * ranks]);
    let (mut all_bytes, mut all_most) = (vec![0u64; ranks], vec![0u64; ranks]);
    world.all_gather_into(&mine, &mut all_times[..]);
    world.all_gather_into(&bytes, &mut all_bytes[..]);
    world.all_gather_into(&most, &mut all_most[..]);
    world.all_gather_into(&waits[..], &mut all_waits[..]);
    if group.rank() > 0 {
        return;
    }
    let time = all_times.iter().copied().fold(0.0, f64::max);
    println!("{name}");
    println!(
        "  {time:.3} s, {:.0} tokens/s, bytes sent by each rank {all_bytes:?}",
        asked.tokens as f64 / time
    );
    let most = mib(all_most.into_iter().max().unwrap_or(0) as usize);
    let word = if most <= mib(asked.memory) { "within" } else { "more than" };
    println!("  a rank has at its peak {most:.1} MiB, {word} its {:.1} MiB", mib(asked.memory));
    println!("  share of its time that a rank (row) waits for another (column), . works:");
    for (rank, waits) in all_waits.chunks(ranks).enumerate() {
        let cells: Vec<_> = waits.iter().map(|wait| format!("{:5.1} %", 100.0 * wait / time)).collect();
        let filled = (40.0 * waits.iter().sum::<f64>() / time).round() as usize;
        let bar = format!("{}{}", "#".repeat(filled.min(40)), ".".repeat(40 - filled.min(40)));
        println!("  {rank:2} {} {bar}", cells.join(" "));
    }
}
