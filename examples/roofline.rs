//! How near the kernels are to what the machine can do.
//!
//! ```text
//! cargo run --release --example roofline [-- --json] [--filter NAME] [--threads N] [--isa NAME]
//! ```
//!
//! For each standard shape, for sparse and neighborhood attention at the lengths
//! that they are for, and for each mechanism of the catalogue on a standard shape:
//! milliseconds, GFLOP/s (useful flops), GB/s (keys
//! and values), and the share of the shape's limit. What computes is held
//! against the rate of the register tile over operands in the first-level
//! cache, what reads (decoding) against the bandwidth of reads, and what reads
//! and writes a state (one token of linear attention) against that of changing
//! memory in place. Limits are
//! measured in this process before, between and after the runs of a shape;
//! every figure is a median.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use attention_kernels::attention::Cost;
use attention_kernels::catalog::ENTRIES;
use attention_kernels::dense::Dense;
use attention_kernels::element::{DType, Element};
use attention_kernels::linear::{GatedDeltaNet, GatedDeltaQkv, Lightning};
use attention_kernels::mask::{Window, mask_fn};
use attention_kernels::score::{Alibi, Bias};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Qkv, Recurrent, Result, Workspace, limits};
use half::{bf16, f16};
use ndarray::{Array3, Array4, ArrayViewMut4};

#[path = "support/shapes.rs"]
mod shapes;
use shapes::families::{FAMILIES, listed, near};
use shapes::stored::STORED;
use shapes::{Forward, SHAPES, Shape, Variant, built};

#[path = "support/program.rs"]
mod program;
use program::Failure;

const USAGE: &str = "\
usage: roofline [--json] [--filter NAME] [--threads N] [--isa NAME]

  --json          one object a line instead of a table
  --filter NAME   only shapes whose name contains NAME, in upper or lower case
  --threads N     only with N threads (default: with 1, then with 2)
  --isa NAME      on this instruction set (default: the best one)";

/// Rounds of a shape: its limits are measured before and after each.
const ROUNDS: usize = 7;
/// Seconds of a run after which half as many do.
const LONG: f64 = 1.5;
/// A shape runs for as long at least.
const LEAST: Duration = Duration::from_millis(1200);
/// A round of a short kernel has several runs that last as long together.
const ROUND: Duration = Duration::from_millis(30);
/// What the bandwidth is measured on: several times the last-level cache.
const BUFFER: usize = 512 << 20;

struct Options {
    json: bool,
    filter: String,
    threads: Vec<usize>,
    isa: Isa,
}

/// `None` where help is asked for.
fn options(mut args: impl Iterator<Item = String>) -> Result<Option<Options>, Failure> {
    let threads = if cfg!(feature = "rayon") { vec![1, 2] } else { vec![1] };
    let mut options = Options { json: false, filter: String::new(), threads, isa: Isa::choose(None)? };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--json" => options.json = true,
            "--filter" => options.filter = value()?,
            "--threads" => {
                let threads = value()?.parse().ok().filter(|&n| n > 0);
                options.threads = vec![threads.ok_or("--threads needs a number above 0")?];
            }
            "--isa" => {
                let name = value()?;
                let isa = Isa::available().find(|isa| isa.name() == name);
                let names = || Isa::available().map(Isa::name).collect::<Vec<_>>().join(", ");
                options.isa = isa.ok_or_else(|| format!("--isa {name}: this CPU has {}", names()))?;
            }
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
    if options.threads != [1] && cfg!(not(feature = "rayon")) {
        return Err("without the feature `rayon` there is one thread".into());
    }
    if chosen(&options.filter).is_empty() {
        let names = chosen("").iter().map(|shape| shape.name).collect::<Vec<_>>().join("\n  ");
        return Err(format!("no shape's name contains `{}`; they are\n  {names}", options.filter).into());
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        // Nothing that such a build says of speed is true.
        eprintln!("warning: built without --release; its times say little");
    }
    program::run(USAGE, options(std::env::args().skip(1)), |options| run(options).map(|()| true))
}

/// The shapes whose name contains `filter`, in upper or lower case.
fn chosen(filter: &str) -> Vec<Shape> {
    let has = |shape: &Shape| shape.name.to_lowercase().contains(&filter.to_lowercase());
    SHAPES.iter().chain(FAMILIES).chain(STORED).copied().chain(shapes::entries()).filter(has).collect()
}

fn run(options: &Options) -> Result<(), Failure> {
    let buffer = vec![1f32; BUFFER / size_of::<f32>()];
    if !options.json {
        println!("{}", Figures::HEADER);
    }
    for &threads in &options.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        for shape in &chosen(&options.filter) {
            let bench = Bench { shape, isa: options.isa, threads, buffer: &buffer };
            let figures = pool.install(|| {
                match shape.dtype {
                    DType::F32 => bench.run::<f32>(),
                    DType::F16 => bench.run::<f16>(),
                    DType::Bf16 => bench.run::<bf16>(),
                }
                .map_err(|error| error.to_string())
            })?;
            let line = if options.json { figures.json(&bench) } else { figures.row(&bench) };
            println!("{line}");
        }
    }
    if !options.json {
        print!("{}", Figures::LEGEND);
    }
    Ok(())
}

struct Bench<'a> {
    shape: &'a Shape,
    isa: Isa,
    threads: usize,
    buffer: &'a [f32],
}

/// Storage types that shapes are measured in.
trait Measured: Element {
    /// The kernel of a shape, and what a call costs.
    fn forward<'a>(
        shape: &Shape,
        isa: Isa,
        x: Qkv<'a, Self>,
        _bias: &'a Array4<f32>,
    ) -> Result<(Forward<'a, Self>, Cost)> {
        match shape.variant {
            Variant::Near(extents, window) => near([extents, window], isa, x),
            Variant::CausalBackward => shapes::backward(isa, x),
            _ => shapes::plain(shape, isa, x),
        }
    }
}

/// Half types have plain shapes, their gradients and neighborhoods alone, which is less to
/// compile.
impl Measured for f16 {}
impl Measured for bf16 {}

impl Measured for f32 {
    fn forward<'a>(
        shape: &Shape,
        isa: Isa,
        x: Qkv<'a, Self>,
        bias: &'a Array4<f32>,
    ) -> Result<(Forward<'a, Self>, Cost)> {
        let dense = Dense::builder().isa(isa);
        match shape.variant {
            Variant::Full | Variant::Causal => shapes::plain(shape, isa, x),
            Variant::CausalClosure => {
                let ahead = shape.kv_len - shape.q_len;
                built(dense.mask(mask_fn(move |_, query, key| key <= query + ahead)), x)
            }
            Variant::Window(keys) => built(dense.mask(Window::new(Some(keys - 1), Some(0))), x),
            Variant::Alibi(most) => {
                let slopes = vec![most / shape.kv_len as f32; shape.q_heads];
                built(dense.causal().score(Alibi::from_slopes(&slopes)?), x)
            }
            Variant::Bias(_) => built(dense.score(Bias::new(bias.view())), x),
            Variant::LightningStep => {
                let lightning = Lightning::builder(shape.q_heads).isa(isa).build()?;
                let cost = lightning.cost(x)?;
                let state = Mutex::new(lightning.initial_state(x)?);
                let forward =
                    move |x: Qkv<'_, f32>, out: ArrayViewMut4<'_, f32>, workspace: &mut Workspace| {
                        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                        lightning.step_into(x.reborrow(), &mut state, out, workspace)
                    };
                Ok((Box::new(forward), cost))
            }
            Variant::GatedDeltaStep => {
                let gated = GatedDeltaNet::builder().isa(isa).build()?;
                let dim = (shape.batch, shape.q_heads, 1);
                let (log_decay, beta) = (Array3::from_elem(dim, -0.1), Array3::from_elem(dim, 0.01));
                let (cost, state) = {
                    let (log_decay, beta) = (log_decay.view(), beta.view());
                    let x = GatedDeltaQkv { qkv: x.reborrow(), log_decay, beta };
                    (gated.cost(x)?, Mutex::new(gated.initial_state(x)?))
                };
                let forward =
                    move |x: Qkv<'_, f32>, out: ArrayViewMut4<'_, f32>, workspace: &mut Workspace| {
                        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                        let (log_decay, beta) = (log_decay.view(), beta.view());
                        let x = GatedDeltaQkv { qkv: x.reborrow(), log_decay, beta };
                        gated.step_into(x, &mut state, out, workspace)
                    };
                Ok((Box::new(forward), cost))
            }
            Variant::CausalBackward => shapes::backward(isa, x),
            Variant::Near(extents, window) => near([extents, window], isa, x),
            Variant::Family(make) | Variant::Stored(make) => make(shape, isa, x),
            Variant::Listed => listed(isa, x),
            Variant::Entry(i) => {
                // What it makes from the seed is made once.
                let trial = ENTRIES[i].trial(x, Some(isa), 1)?;
                let cost = trial.cost()?;
                let forward =
                    move |_: Qkv<'_, f32>, out: ArrayViewMut4<'_, f32>, workspace: &mut Workspace| {
                        trial.forward_into(out, workspace)
                    };
                Ok((Box::new(forward), cost))
            }
        }
    }
}

/// The bias of a shape: of one element if it has none.
fn bias(shape: &Shape) -> Array4<f32> {
    let Variant::Bias(most) = shape.variant else { return Array4::zeros((1, 1, 1, 1)) };
    // A slope that starts elsewhere for each query.
    let at = |i: usize, j: usize| ((i * 7 + j) % shape.kv_len) as f32 / shape.kv_len as f32;
    Array4::from_shape_fn((1, 1, shape.q_len, shape.kv_len), |(_, _, i, j)| -most * at(i, j))
}

/// Medians.
#[derive(Default)]
struct Figures {
    ms: f64,
    gflops: f64,
    gbs: f64,
    fma_gflops: f64,
    tile_gflops: f64,
    read_gbs: f64,
    /// Of a shape that is a step alone.
    update_gbs: f64,
    /// Beside [`Shape::against`]: time for each flop as a multiple, and how many
    /// times as fast a call is.
    against: Option<[f64; 2]>,
}

impl Bench<'_> {
    fn run<T: Measured>(&self) -> Result<Figures, Failure> {
        let own = arrays::<T>(self.shape);
        let mut case = Case::new(self.shape, &own);
        let other_shape = self.shape.against.and_then(shapes::named);
        let other_arrays = other_shape.map(arrays::<T>);
        let mut other = match (other_shape, &other_arrays) {
            (Some(shape), Some(arrays)) => Some(Case::new(shape, arrays)),
            _ => None,
        };
        let bias = bias(self.shape);
        let (forward, cost) = T::forward(self.shape, self.isa, case.input(0), &bias)?;
        let other_forward = match &other {
            Some(other) => Some(T::forward(other.shape, self.isa, other.input(0), &bias)?),
            None => None,
        };

        self.progress("warming up");
        let once = case.time(&forward)?;
        if let (Some(other), Some((forward, _))) = (&mut other, &other_forward) {
            other.time(forward)?;
        }
        let runs = ((ROUND.as_secs_f64() / once) as usize).clamp(1, 16);
        let rounds = if once > LONG { ROUNDS / 2 } else { ROUNDS };
        let (mut times, mut other_times) = (Vec::new(), Vec::new());
        let (mut fma, mut tile, mut read) = (Vec::new(), Vec::new(), Vec::new());
        let mut update = Vec::new();
        let mut updated = vec![1f32; if self.shape.is_step() { self.buffer.len() } else { 0 }];
        let mut limits = || {
            fma.push(limits::fma_gflops(self.isa, self.threads));
            tile.push(limits::tile_gflops(self.isa, self.threads));
            read.push(limits::read_gbs(self.isa, self.threads, self.buffer));
            if self.shape.is_step() {
                update.push(limits::update_gbs(self.isa, self.threads, &mut updated));
            }
        };
        let start = Instant::now();
        let mut round = 0;
        while round < rounds || start.elapsed() < LEAST {
            self.progress(&format!("round {}", round + 1));
            limits();
            for _ in 0..runs {
                times.push(case.time(&forward)?);
            }
            if let (Some(other), Some((forward, _))) = (&mut other, &other_forward) {
                for _ in 0..runs {
                    other_times.push(other.time(forward)?);
                }
            }
            round += 1;
        }
        limits();
        self.progress("");

        let seconds = median(&mut times);
        let stored = matches!(self.shape.variant, Variant::Stored(_));
        let bytes = if stored { cost.bytes } else { self.shape.kv_bytes() as u64 };
        let against = other_forward.map(|(_, other)| {
            let other_seconds = median(&mut other_times);
            let flop = |seconds: f64, cost: Cost| seconds / cost.flops as f64;
            [flop(seconds, cost) / flop(other_seconds, other), other_seconds / seconds]
        });
        Ok(Figures {
            ms: 1e3 * seconds,
            gflops: cost.flops as f64 / seconds * 1e-9,
            gbs: bytes as f64 / seconds * 1e-9,
            fma_gflops: median(&mut fma),
            tile_gflops: median(&mut tile),
            read_gbs: median(&mut read),
            update_gbs: median(&mut update),
            against,
        })
    }

    /// One line on a terminal that the next one replaces.
    fn progress(&self, what: &str) {
        let mut stderr = std::io::stderr();
        if stderr.is_terminal() {
            let what = if what.is_empty() { String::new() } else { format!("{}: {what}", self.shape.name) };
            let _ = write!(stderr, "\r\x1b[K{what}").and_then(|()| stderr.flush());
        }
    }
}

/// A shape's arrays. What decodes has its keys and values twice and takes
/// them in turns, so that no cache can serve it.
fn arrays<T: Measured>(shape: &Shape) -> Vec<[Array4<T>; 3]> {
    vec![shape.qkv(); if shape.is_decode() { 2 } else { 1 }]
}

/// A shape on its [`arrays`].
struct Case<'a, T> {
    shape: &'a Shape,
    inputs: &'a [[Array4<T>; 3]],
    out: Array4<T>,
    workspace: Workspace,
    turn: usize,
}

impl<'a, T: Measured> Case<'a, T> {
    fn new(shape: &'a Shape, inputs: &'a [[Array4<T>; 3]]) -> Self {
        let out = Array4::from_elem(shape.q_dim(), T::default());
        Self { shape, inputs, out, workspace: Workspace::new(), turn: 0 }
    }

    fn input(&self, turn: usize) -> Qkv<'a, T> {
        let [q, k, v] = &self.inputs[turn % self.inputs.len()];
        Qkv::new(q.view(), k.view(), v.view())
    }

    /// Seconds of one run.
    fn time(&mut self, forward: &Forward<'_, T>) -> Result<f64, Failure> {
        let x = self.input(self.turn);
        self.turn += 1;
        let start = Instant::now();
        forward(x, self.out.view_mut(), &mut self.workspace)?;
        let seconds = start.elapsed().as_secs_f64();
        std::hint::black_box(&self.out);
        Ok(seconds)
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

impl Figures {
    const HEADER: &str = concat!(
        "                                                                    |        limits        |\n",
        "shape                     isa     threads        ms  GFLOP/s   GB/s |   FMA   tile    read | share of limit\n",
        "--------------------------------------------------------------------+----------------------+---------------",
    );

    const LEGEND: &str = "
GFLOP/s counts the multiply-adds of visible pairs (of linear attention those that
its chunks need), GB/s keys and values once, or a state read and written.
Limits: FMA over registers and the register tile over operands in the first-level
cache (GFLOP/s), reads of memory (GB/s); `update` is memory changed in place. AMX
tiles are beyond the rate of the register tile, which is that of f32. Figures
before `x` compare the time for each flop with that of another shape, run in turns
with this one, and those before `times` how much faster a call is.
";

    /// The name of the limit, and the share of it in percent.
    fn share(&self, shape: &Shape) -> (&'static str, f64) {
        let read = ("read_gbs", 100.0 * self.gbs / self.read_gbs);
        let tile = ("tile_gflops", 100.0 * self.gflops / self.tile_gflops);
        match shape.variant {
            // The nearer one.
            Variant::Stored(_) if read.1 > tile.1 => read,
            Variant::Stored(_) => tile,
            _ if shape.is_step() => ("update_gbs", 100.0 * self.gbs / self.update_gbs),
            _ if shape.is_decode() => read,
            _ => tile,
        }
    }

    fn row(&self, bench: &Bench<'_>) -> String {
        let &Self { ms, gflops, gbs, fma_gflops, tile_gflops, read_gbs, against, .. } = self;
        let (limit, percent) = self.share(bench.shape);
        let limit = limit.split('_').next().unwrap_or(limit);
        let compared = match (against, bench.shape.against) {
            (Some([times, faster]), Some(name)) => format!("  {times:.2} x, {faster:.2} times {name}"),
            _ => String::new(),
        };
        let (name, isa, threads) = (bench.shape.name, bench.isa.name(), bench.threads);
        format!(
            "{name:25} {isa:7} {threads:7} {ms:9.3} {gflops:8.1} {gbs:6.2} \
             | {fma_gflops:5.0} {tile_gflops:6.0} {read_gbs:7.2} | {percent:5.1} % of {limit:4}{compared}"
        )
    }

    fn json(&self, bench: &Bench<'_>) -> String {
        let &Self { ms, gflops, gbs, fma_gflops, tile_gflops, read_gbs, .. } = self;
        let (limit, percent) = self.share(bench.shape);
        let (shape, dtype) = (bench.shape.name, bench.shape.dtype.name());
        let (threads, isa) = (bench.threads, bench.isa.name());
        let mechanism = match bench.shape.variant {
            Variant::Entry(_) => shape,
            Variant::LightningStep => "lightning",
            Variant::GatedDeltaStep => "Gated DeltaNet",
            Variant::Family(_) | Variant::Stored(_) | Variant::Listed => shape,
            _ => "dense",
        };
        let compared = match (self.against, bench.shape.against) {
            (Some([times, faster]), Some(name)) => {
                format!(r#","against":"{name}","per_flop":{times:.4},"faster":{faster:.4}"#)
            }
            _ => String::new(),
        };
        format!(
            r#"{{"mechanism":"{mechanism}","shape":"{shape}","threads":{threads},"isa":"{isa}","dtype":"{dtype}","ms":{ms:.4},"gflops":{gflops:.2},"gbs":{gbs:.3},"fma_gflops":{fma_gflops:.1},"tile_gflops":{tile_gflops:.1},"read_gbs":{read_gbs:.2},"limit":"{limit}","percent":{percent:.1}{compared}}}"#
        )
    }
}
