//! Every mechanism of the catalogue on the queries, keys and values of a real
//! language model: how far the kernel is off its definition, how fast it is,
//! and a picture of its weights.
//!
//! ```text
//! cargo run --release --example atlas [-- --json] [--filter NAME] [--out FILE]
//! ```
//!
//! The input is the fixture of the tests: three layers of three query heads
//! that share a key/value head, as a batch of three. Fails if a mechanism is
//! further off its definition than its error bound allows.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use attention_kernels::catalog::{Catalogued, ENTRIES, Entry, Trial};
use attention_kernels::element::DType;
use attention_kernels::simd::Isa;
use attention_kernels::{Qkv, Workspace};
use half::{bf16, f16};
use ndarray::{Array4, ArrayView2, Axis, concatenate, s};

#[path = "support/fixture.rs"]
mod fixture;
#[path = "support/kept.rs"]
mod kept;
#[path = "support/program.rs"]
mod program;
use program::Failure;

const USAGE: &str = "\
usage: atlas [--json] [--filter NAME] [--out FILE]

  --json          one object a line instead of a table
  --filter NAME   only mechanisms whose name contains NAME
  --out FILE      where the page goes (default: target/atlas.html)";

const PAGE: &str = include_str!("support/atlas.html");

/// What is random in a mechanism comes from this.
const SEED: u64 = 7;
/// The layer whose pictures are finest.
const FEATURED: usize = 14;
/// Timed runs of a kernel, after one that is not.
const RUNS: usize = 9;

struct Options {
    json: bool,
    filter: String,
    out: PathBuf,
}

/// `None` where help is asked for.
fn options(mut args: impl Iterator<Item = String>) -> Result<Option<Options>, Failure> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let mut options = Options { json: false, filter: String::new(), out: target.join("atlas.html") };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--json" => options.json = true,
            "--filter" => options.filter = value()?,
            "--out" => options.out = value()?.into(),
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
    if !ENTRIES.iter().any(|entry| entry.card.name.contains(&options.filter)) {
        let names = ENTRIES.iter().map(|entry| entry.card.name).collect::<Vec<_>>().join("\n  ");
        return Err(format!("no mechanism's name contains `{}`; they are\n  {names}", options.filter).into());
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        // Nothing that such a build says of speed is true.
        eprintln!("warning: built without --release; its times say little");
    }
    program::run(USAGE, options(std::env::args().skip(1)), run)
}

/// Whether every mechanism keeps its bound.
fn run(options: &Options) -> Result<bool, Failure> {
    let inputs = Inputs::load()?;
    let mut plates = Vec::new();
    let mut broken = Vec::new();
    if !options.json {
        println!("{}", Plate::HEADER);
    }
    for entry in ENTRIES.iter().filter(|entry| entry.card.name.contains(&options.filter)) {
        let plate = Plate::of(entry, &inputs)?;
        if options.json {
            plate.findings.iter().for_each(|finding| println!("{}", finding.json(entry)));
        } else {
            println!("{}", plate.row());
        }
        if plate.findings.iter().any(|finding| !finding.holds()) {
            broken.push(entry.card.name);
        }
        plates.push(plate);
    }
    if !options.json {
        print!("{}", Plate::LEGEND);
        print!("{}", kept_weights(&inputs, &options.filter)?);
    }
    if let Some(folder) = options.out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&options.out, page(&plates)?)?;
    let note = format!("pictures: {}", options.out.display());
    if options.json {
        eprintln!("{note}")
    } else {
        println!("{note}")
    }
    if !broken.is_empty() {
        eprintln!("beyond their error bound: {}", broken.join(", "));
    }
    Ok(broken.is_empty())
}

/// What sparse mechanisms keep of dense attention at several budgets.
fn kept_weights(inputs: &Inputs, filter: &str) -> Result<String, Failure> {
    let mut text = String::new();
    for mechanism in kept::MECHANISMS.into_iter().filter(|(name, _)| name.contains(filter)) {
        if text.is_empty() {
            text +=
                "\nkeys a query         share of dense weights kept (root mean square error against dense)\n";
        }
        text += &format!("{:19}", mechanism.0);
        let curve = kept::curve(mechanism, input(&inputs.f32))?;
        for (kept::Kept { mass, error, .. }, budget) in curve.into_iter().zip(kept::BUDGETS) {
            text += &format!("  {budget:>4}: {:5.1} % ({:5.1} %)", 100.0 * mass, 100.0 * error);
        }
        text += "\n";
    }
    Ok(text)
}

/// Queries, keys and values.
type Layer = (Array4<f16>, Array4<f16>, Array4<f16>);

/// The fixture in each storage type, its layers as a batch.
struct Inputs {
    f32: [Array4<f32>; 3],
    f16: [Array4<f16>; 3],
    bf16: [Array4<bf16>; 3],
}

impl Inputs {
    fn load() -> Result<Self, Failure> {
        let layers = fixture::LAYERS.map(fixture::layer);
        let stack = |part: fn(&Layer) -> &Array4<f16>| {
            concatenate(Axis(0), &layers.each_ref().map(|layer| part(layer).view()))
        };
        let f16 = [stack(|layer| &layer.0)?, stack(|layer| &layer.1)?, stack(|layer| &layer.2)?];
        let f32 = f16.each_ref().map(|x| x.mapv(f16::to_f32));
        let bf16 = f32.each_ref().map(|x| x.mapv(bf16::from_f32));
        Ok(Self { f32, f16, bf16 })
    }
}

/// What there is to say of a mechanism.
struct Plate {
    entry: &'static Entry,
    findings: Vec<Finding>,
    panels: Vec<Panel>,
}

/// A mechanism in a storage type.
struct Finding {
    dtype: DType,
    /// The largest error of an element.
    max_error: f64,
    /// The bound of that element.
    bound: f64,
    /// The largest error of an element as a share of its own bound.
    worst: f64,
    kernel_ms: f64,
    reference_ms: f64,
}

impl Plate {
    fn of(entry: &'static Entry, inputs: &Inputs) -> Result<Self, Failure> {
        progress(entry.card.name);
        let trial = entry.trial(input(&inputs.f32), None, SEED)?;
        let findings = vec![
            Finding::of(&*trial)?,
            Finding::of(&*entry.trial(input(&inputs.f16), None, SEED)?)?,
            Finding::of(&*entry.trial(input(&inputs.bf16), None, SEED)?)?,
        ];
        let weights = if entry.weighs { trial.weights()? } else { sizes(&*trial)? };
        let mut panels = Vec::new();
        for (i, &layer) in fixture::LAYERS.iter().enumerate() {
            for head in 0..weights.dim().1 {
                let cells = if layer == FEATURED { 256 } else { 128 };
                panels.push(Panel::of(layer, head, weights.slice(s![i, head, .., ..]), cells));
            }
        }
        progress("");
        Ok(Self { entry, findings, panels })
    }

    const HEADER: &str = concat!(
        "                                                   largest            share of the bound        milliseconds\n",
        "mechanism           source                           error      bound    f32   f16  bf16    kernel  reference  speed-up\n",
        "-----------------------------------------------------------------------------------------------------------------------",
    );

    const LEGEND: &str = "
Error and bound (of the element that is furthest off) and times are those of f32. The
share is the largest over all elements, each against its own bound: 100 % is the limit.
Half types come near it by themselves: most of their bound is the rounding of outputs.
";

    fn row(&self) -> String {
        let [f32, f16, bf16] = &self.findings[..] else { return String::new() };
        let share = |finding: &Finding| format!("{:.0} %", (100.0 * finding.worst).ceil());
        format!(
            "{:19} {:28} {:>9.1e}  {:>9.1e} {:>6} {:>5} {:>5} {:9.3} {:10.1} {:>8.0}x",
            self.entry.card.name,
            self.entry.card.source,
            f32.max_error,
            f32.bound,
            share(f32),
            share(f16),
            share(bf16),
            f32.kernel_ms,
            f32.reference_ms,
            f32.reference_ms / f32.kernel_ms
        )
    }
}

fn input<T>([q, k, v]: &[Array4<T>; 3]) -> Qkv<'_, T> {
    Qkv::new(q.view(), k.view(), v.view())
}

/// The magnitudes of the outputs: the picture of what has no weights.
fn sizes(trial: &dyn Trial<f32>) -> Result<Array4<f32>, Failure> {
    Ok(trial.reference()?.mapv(|x| x.abs() as f32))
}

impl Finding {
    fn of<T: Catalogued>(trial: &dyn Trial<T>) -> Result<Self, Failure> {
        let timed_reference = || {
            let start = Instant::now();
            (trial.reference(), 1e3 * start.elapsed().as_secs_f64())
        };
        // Each is one thread's work.
        let ((reference, reference_ms), bounds) = rayon::join(timed_reference, || trial.error_bound());
        let (reference, bounds) = (reference?, bounds?);

        let mut out = Array4::from_elem(reference.dim(), T::from_f32(f32::NAN));
        let mut workspace = Workspace::with_capacity(trial.workspace_bytes()?);
        trial.forward_into(out.view_mut(), &mut workspace)?;
        let mut times = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let start = Instant::now();
            trial.forward_into(out.view_mut(), &mut workspace)?;
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);

        // What rounding the output may add: half of the least number of the
        // type, and a part of the magnitude.
        let (relative, least) = match T::DTYPE {
            DType::F32 => (0.0, 0.0),
            DType::F16 => (T::ROUNDING, 2f64.powi(-25)),
            DType::Bf16 => (T::ROUNDING, 2f64.powi(-134)),
        };
        let (mut max_error, mut bound, mut worst) = (0.0, 0.0, 0.0);
        for ((b, h, i, c), &expected) in reference.indexed_iter() {
            let error = (out[[b, h, i, c]].to_f64() - expected).abs();
            let error = if error.is_nan() { f64::INFINITY } else { error };
            let allowed = (1.0 + relative) * bounds[[b, h, i]] + relative * expected.abs() + least;
            if error >= max_error {
                (max_error, bound) = (error, allowed);
            }
            if error > 0.0 {
                worst = f64::max(worst, error / allowed);
            }
        }
        Ok(Self { dtype: T::DTYPE, max_error, bound, worst, kernel_ms: times[RUNS / 2], reference_ms })
    }

    fn holds(&self) -> bool {
        self.worst <= 1.0
    }

    fn json(&self, entry: &Entry) -> String {
        let &Self { dtype, max_error, bound, kernel_ms, reference_ms, .. } = self;
        format!(
            r#"{{"mechanism":{},"family":{},"source":{},"dtype":"{}","max_error":{},"bound":{},"kernel_ms":{kernel_ms:.4},"reference_ms":{reference_ms:.2}}}"#,
            string(entry.card.name),
            string(entry.card.family),
            string(entry.card.source),
            dtype.name(),
            number(max_error),
            number(bound),
        )
    }
}

/// The weights of one head, made smaller: the largest of each block, in
/// [`Panel::LEVELS`] levels of its logarithm.
struct Panel {
    layer: usize,
    head: usize,
    cells: usize,
    levels: String,
}

impl Panel {
    const LEVELS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    /// The least weight that can be told from none, as a power of 10.
    const FLOOR: f64 = -6.0;

    fn of(layer: usize, head: usize, weights: ArrayView2<'_, f32>, cells: usize) -> Self {
        let (queries, keys) = weights.dim();
        // Weights that are not shares count as shares of the largest.
        let largest = weights.iter().fold(1f32, |most, &weight| most.max(weight.abs()));
        let block = |cell: usize, len: usize| cell * len / cells..((cell + 1) * len).div_ceil(cells);
        let mut digits = Vec::with_capacity(cells * cells);
        for i in 0..cells {
            for j in 0..cells {
                let block = weights.slice(s![block(i, queries), block(j, keys)]);
                let most = block.iter().fold(0f32, |most, &weight| most.max(weight.abs()));
                digits.push(Self::LEVELS[Self::level(most / largest)]);
            }
        }
        // Runs become `*`, the digit, and two digits of the length.
        let mut levels = String::new();
        for run in digits.chunk_by(|a, b| a == b).flat_map(|run| run.chunks(64 * 64 - 1)) {
            let (digit, len) = (run[0], run.len());
            if len < 5 {
                levels.extend(run.iter().map(|&digit| char::from(digit)));
            } else {
                let code = [b'*', digit, Self::LEVELS[len / 64], Self::LEVELS[len % 64]];
                levels.extend(code.map(char::from));
            }
        }
        Self { layer, head, cells, levels }
    }

    /// 0 is no weight at all.
    fn level(weight: f32) -> usize {
        if weight.is_nan() || weight == 0.0 {
            return 0;
        }
        let share = 1.0 - f64::from(weight).log10() / Self::FLOOR;
        1 + (share.clamp(0.0, 1.0) * 62.0).round() as usize
    }
}

/// The page, with the plates in it.
fn page(plates: &[Plate]) -> Result<String, Failure> {
    let plate = |plate: &Plate| {
        let finding = |f: &Finding| {
            format!(
                r#"{{"dtype":"{}","error":{},"bound":{},"worst":{},"kernel":{},"reference":{}}}"#,
                f.dtype.name(),
                number(f.max_error),
                number(f.bound),
                number(f.worst),
                number(f.kernel_ms),
                number(f.reference_ms)
            )
        };
        let panel = |p: &Panel| {
            format!(
                r#"{{"layer":{},"head":{},"cells":{},"levels":"{}"}}"#,
                p.layer, p.head, p.cells, p.levels
            )
        };
        format!(
            r#"{{"name":{},"family":{},"source":{},"summary":{},"findings":[{}],"panels":[{}]}}"#,
            string(plate.entry.card.name),
            string(plate.entry.card.family),
            string(plate.entry.card.source),
            string(plate.entry.card.summary),
            plate.findings.iter().map(finding).collect::<Vec<_>>().join(","),
            plate.panels.iter().map(panel).collect::<Vec<_>>().join(",")
        )
    };
    let data = format!(
        "{{\"isa\":\"{}\",\"threads\":{},\"featured\":{FEATURED},\"floor\":{},\"plates\":[\n{}\n]}}",
        Isa::choose(None)?.name(),
        if cfg!(feature = "rayon") { rayon::current_num_threads() } else { 1 },
        Panel::FLOOR,
        plates.iter().map(plate).collect::<Vec<_>>().join(",\n")
    );
    Ok(PAGE.replace("{{data}}", &data.replace("</", "<\\/")))
}

/// A JSON string.
fn string(text: &str) -> String {
    let mut json = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c < ' ' => json.push_str(&format!("\\u{:04x}", c as u32)),
            c => json.push(c),
        }
    }
    json + "\""
}

/// A JSON number; what is none is null.
fn number(x: f64) -> String {
    if x.is_finite() { format!("{x:.3e}") } else { "null".to_owned() }
}

/// One line on a terminal that the next one replaces.
fn progress(what: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K{what}").and_then(|()| stderr.flush());
    }
}
