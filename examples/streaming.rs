//! A million tokens through linear attention, in constant memory.
//!
//! ```text
//! cargo run --release --example streaming [-- --tokens N]
//! ```
//!
//! Lightning Attention and Gated DeltaNet read a stream piece by piece and
//! carry their state from one to the next: what a token costs, and the memory
//! that it takes, do not depend on how many came before. One piece of random
//! tokens stands for all of the stream.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attention_kernels::linear::{GatedDeltaNet, GatedDeltaQkv, Lightning};
use attention_kernels::{Input, Qkv, Recurrent, Result, Workspace};
use ndarray::{Array3, Array4, s};

#[path = "support/noise.rs"]
mod noise;
use noise::noise;
#[path = "support/program.rs"]
mod program;
use program::Failure;

const HEADS: usize = 16;
const DIM: usize = 128;
/// Tokens of a piece.
const PIECE: usize = 1024;
/// Lines of the table.
const LINES: usize = 8;

const USAGE: &str = "\
usage: streaming [--tokens N]

  --tokens N      how many tokens each mechanism reads (default: 1048576)";

fn options(mut args: impl Iterator<Item = String>) -> Result<Option<usize>, Failure> {
    let mut tokens = 1 << 20;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--tokens" => {
                let number = args.next().and_then(|value| value.parse().ok()).filter(|&n| n > 0);
                tokens = number.ok_or("--tokens needs a number above 0")?;
            }
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
    Ok(Some(tokens))
}

fn main() -> ExitCode {
    let options = options(std::env::args().skip(1));
    program::run(USAGE, options, |&tokens| Ok(run(tokens).map(|()| true)?))
}

/// Some tokens.
struct Piece {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    log_decay: Array3<f32>,
    beta: Array3<f32>,
}

impl Piece {
    fn new() -> Self {
        let mut noise = noise(1);
        let mut array = || Array4::from_shape_simple_fn((1, HEADS, PIECE, DIM), &mut noise);
        let (q, k, v) = (array(), array(), array());
        let log_decay = Array3::from_shape_simple_fn((1, HEADS, PIECE), || -0.02 * noise().abs());
        let beta = Array3::from_shape_simple_fn((1, HEADS, PIECE), || 1.0 / (1.0 + noise().exp()));
        Self { q, k, v, log_decay, beta }
    }

    /// The first `len` tokens.
    fn qkv(&self, len: usize) -> Qkv<'_, f32> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.slice(s![.., .., ..len, ..]));
        Qkv::new(q, k, v)
    }

    /// The first `len` tokens, with gates.
    fn gated(&self, len: usize) -> GatedDeltaQkv<'_, f32> {
        let [log_decay, beta] = [&self.log_decay, &self.beta].map(|x| x.slice(s![.., .., ..len]));
        GatedDeltaQkv { qkv: self.qkv(len), log_decay, beta }
    }
}

fn run(tokens: usize) -> Result<()> {
    let piece = Piece::new();
    println!("{HEADS} heads of {DIM} dimensions, {PIECE} tokens at a time\n");
    println!("mechanism            tokens   tokens/s  resident MiB");
    println!("-------------------------------------------------------");
    let lightning = Lightning::builder(HEADS).build()?;
    stream("lightning", &lightning, tokens, |len| piece.qkv(len))?;
    let gated = GatedDeltaNet::builder().normalize_qk().build()?;
    stream("gated deltanet", &gated, tokens, |len| piece.gated(len))
}

/// Reads `tokens` tokens and says how fast as it goes.
fn stream<X: Input<Out = f32>>(
    name: &str,
    mechanism: &impl Recurrent<X>,
    tokens: usize,
    input: impl Fn(usize) -> X,
) -> Result<()> {
    let mut state = mechanism.initial_state(input(1))?;
    let mut workspace = Workspace::new();
    let mut out = Array4::zeros((1, HEADS, PIECE, DIM));
    let (mut done, mut line) = (0, 1);
    let (mut since, mut start) = (0, Instant::now());
    let mut shown = Instant::now();
    while done < tokens {
        let len = PIECE.min(tokens - done);
        let to = out.slice_mut(s![.., .., ..len, ..]);
        mechanism.prefill_into(input(len), &mut state, to, &mut workspace)?;
        done += len;
        if done >= tokens * line / LINES {
            let rate = (done - since) as f64 / start.elapsed().as_secs_f64();
            let resident = resident_mib().map_or("unknown".to_owned(), |mib| format!("{mib:.1}"));
            progress("");
            println!("{name:18} {done:8} {rate:10.0} {resident:>13}");
            line = done * LINES / tokens + 1;
            (since, start) = (done, Instant::now());
        } else if shown.elapsed() > Duration::from_millis(100) {
            let cells = 40 * done / tokens;
            progress(&format!("{name} [{:40}] {done} of {tokens}", "#".repeat(cells)));
            shown = Instant::now();
        }
    }
    Ok(())
}

/// What of this process lies in memory, where the system says.
fn resident_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// One line on a terminal that the next one replaces.
fn progress(what: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K{what}").and_then(|()| stderr.flush());
    }
}
