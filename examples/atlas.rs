//! Every mechanism of the catalogue on the queries, keys and values of a real
//! language model: how far the kernel is off its definition, how fast it is,
//! a picture of its weights, and of sparse ones what they keep of dense attention.
//!
//! ```text
//! cargo run --release --example atlas [-- --json] [--filter NAME] [--out FILE]
//! ```
//!
//! The input is the fixture of the tests: three layers of three query heads
//! that share a key/value head. Pictures are of all of them; definitions, which
//! take most of the time, run on one layer. Fails if a mechanism is further off
//! its definition than its error bound allows.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use attention_kernels::catalog::{Catalogued, ENTRIES, Entry, Trial};
use attention_kernels::element::DType;
use attention_kernels::simd::Isa;
use attention_kernels::{Qkv, Workspace};
use half::{bf16, f16};
use ndarray::{Array3, Array4, ArrayView2, Axis, concatenate, s};

#[path = "support/docs.rs"]
mod docs;
#[path = "support/fixture.rs"]
mod fixture;
#[path = "support/kept.rs"]
mod kept;
#[path = "support/program.rs"]
mod program;
use docs::Docs;
use program::Failure;

const USAGE: &str = "\
usage: atlas [--json] [--filter NAME] [--out FILE]

  --json          one object a line instead of a table
  --filter NAME   only mechanisms whose name contains NAME
  --out FILE      where the page goes (default: target/atlas.html)";

const PAGE: &str = include_str!("support/atlas.html");

/// What is random in a mechanism comes from this.
const SEED: u64 = 7;
/// The layer that definitions run on, and whose pictures are finest.
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
        print!("{}", kept_weights(&plates));
    }
    if let Some(folder) = options.out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&options.out, page(&plates, &inputs)?)?;
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
fn kept_weights(plates: &[Plate]) -> String {
    let mut text = String::new();
    for plate in plates {
        let Some(curve) = plate.choice.as_ref().and_then(|choice| choice.curve) else { continue };
        if text.is_empty() {
            text +=
                "\nkeys a query         share of dense weights kept (root mean square error against dense)\n";
        }
        text += &format!("{:19}", plate.entry.card.name);
        for (kept::Kept { mass, error, .. }, budget) in curve.into_iter().zip(kept::BUDGETS) {
            text += &format!("  {budget:>4}: {:5.1} % ({:5.1} %)", 100.0 * mass, 100.0 * error);
        }
        text += "\n";
    }
    text
}

/// Queries, keys and values.
type Heads<T> = [Array4<T>; 3];

/// The fixture.
struct Inputs {
    /// Its layers as a batch.
    layers: Heads<f32>,
    /// The featured layer in each storage type.
    f32: Heads<f32>,
    f16: Heads<f16>,
    bf16: Heads<bf16>,
    /// Dense attention on that layer: of all keys, and causal.
    dense: [kept::Seen; 2],
}

impl Inputs {
    fn load() -> Result<Self, Failure> {
        let layers = fixture::LAYERS.map(|n| <[_; 3]>::from(fixture::layer(n)));
        let wide = |part: usize| {
            let parts = layers.each_ref().map(|layer| layer[part].mapv(f16::to_f32));
            concatenate(Axis(0), &parts.each_ref().map(|part| part.view()))
        };
        let f16 = <[_; 3]>::from(fixture::layer(FEATURED));
        let f32 = f16.each_ref().map(|x| x.mapv(f16::to_f32));
        let bf16 = f32.each_ref().map(|x| x.mapv(bf16::from_f32));
        let dense = kept::dense(input(&f32))?;
        Ok(Self { layers: [wide(0)?, wide(1)?, wide(2)?], f32, f16, bf16, dense })
    }
}

/// What there is to say of a mechanism.
struct Plate {
    entry: &'static Entry,
    docs: Docs,
    findings: [Finding; 3],
    panels: Vec<Panel>,
    choice: Option<Choice>,
}

/// What a sparse mechanism keeps of dense attention.
struct Choice {
    /// Whether that is causal.
    causal: bool,
    /// Of its weights and outputs as the catalogue has it, where they are comparable.
    own: Option<kept::Kept>,
    /// At several budgets.
    curve: Option<[kept::Kept; 3]>,
}

impl Choice {
    fn of(entry: &'static Entry, inputs: &Inputs) -> Result<Self, Failure> {
        let x = input(&inputs.f32);
        let own = kept::subjects().find(|subject| subject.card.name == entry.card.name);
        let own = own.map(|entry| kept::of_entry(entry, x, &inputs.dense)).transpose()?;
        let curve = kept::MECHANISMS.into_iter().find(|(name, _)| *name == entry.card.name);
        let curve = curve.map(|mechanism| kept::curve(mechanism, x)).transpose()?;
        Ok(Self { causal: entry.patterns()?.causal, own, curve })
    }

    fn json(&self) -> String {
        let pair = |kept: &kept::Kept| format!("[{},{}]", number(kept.mass), number(kept.error));
        let own = self.own.as_ref().map_or_else(|| "null".to_owned(), pair);
        let curve = self.curve.iter().flatten().map(pair).collect::<Vec<_>>().join(",");
        format!(r#"{{"causal":{},"own":{own},"curve":[{curve}]}}"#, self.causal)
    }
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
        let trials = (
            entry.trial(input(&inputs.f32), None, SEED)?,
            entry.trial(input(&inputs.f16), None, SEED)?,
            entry.trial(input(&inputs.bf16), None, SEED)?,
        );
        let (f32, (f16, bf16)) = rayon::join(
            || Definition::of(&*trials.0),
            || rayon::join(|| Definition::of(&*trials.1), || Definition::of(&*trials.2)),
        );
        // Kernels are timed while nothing else runs.
        let (f32, f16, bf16) = (f32?, f16?, bf16?);
        let findings = [f32.judge(&*trials.0)?, f16.judge(&*trials.1)?, bf16.judge(&*trials.2)?];

        let whole = entry.trial(input(&inputs.layers), None, SEED)?;
        let weights = if entry.weighs {
            whole.weights()?
        } else {
            // The magnitudes of the outputs are the picture of what has no weights.
            let (_, heads, len, dim) = f32.out.dim();
            let mut out = Array4::from_elem((fixture::LAYERS.len(), heads, len, dim), f32::NAN);
            whole.forward_into(out.view_mut(), &mut Workspace::with_capacity(whole.workspace_bytes()?))?;
            out.mapv_into(f32::abs)
        };
        let mut panels = Vec::new();
        for (i, &layer) in fixture::LAYERS.iter().enumerate() {
            for head in 0..weights.dim().1 {
                let cells = if layer == FEATURED { 128 } else { 64 };
                panels.push(Panel::of(layer, head, weights.slice(s![i, head, .., ..]), cells));
            }
        }
        progress("");
        let mut docs = docs::of(entry.card.family, entry.card.mechanism)?;
        if let Some(builder) = docs::entry(entry.card.name)? {
            docs.builder = builder;
        }
        let choice = (entry.card.family == "sparse").then(|| Choice::of(entry, inputs)).transpose()?;
        Ok(Self { entry, docs, findings, panels, choice })
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
        let [f32, f16, bf16] = &self.findings;
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

/// What a trial's output is by definition, and how far from it the kernel may be.
struct Definition {
    out: Array4<f64>,
    bounds: Array3<f64>,
    ms: f64,
}

impl Definition {
    fn of<T: Catalogued>(trial: &dyn Trial<T>) -> attention_kernels::Result<Self> {
        let timed = || {
            let start = Instant::now();
            (trial.reference(), 1e3 * start.elapsed().as_secs_f64())
        };
        // Each is one thread's work.
        let ((out, ms), bounds) = rayon::join(timed, || trial.error_bound());
        Ok(Self { out: out?, bounds: bounds?, ms })
    }

    /// Times the kernel and compares what it gives.
    fn judge<T: Catalogued>(&self, trial: &dyn Trial<T>) -> Result<Finding, Failure> {
        let mut out = Array4::from_elem(self.out.dim(), T::from_f32(f32::NAN));
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
        for ((b, h, i, c), &expected) in self.out.indexed_iter() {
            let error = (out[[b, h, i, c]].to_f64() - expected).abs();
            let error = if error.is_nan() { f64::INFINITY } else { error };
            let allowed = (1.0 + relative) * self.bounds[[b, h, i]] + relative * expected.abs() + least;
            if error >= max_error {
                (max_error, bound) = (error, allowed);
            }
            if error > 0.0 {
                worst = f64::max(worst, error / allowed);
            }
        }
        Ok(Finding {
            dtype: T::DTYPE,
            max_error,
            bound,
            worst,
            kernel_ms: times[RUNS / 2],
            reference_ms: self.ms,
        })
    }
}

impl Finding {
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
    /// The powers of 10 of the lowest level and of the highest.
    range: (f64, f64),
    levels: String,
}

impl Panel {
    const LEVELS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    /// Weights that many powers of 10 below the largest are of the lowest level.
    const DEEPEST: f64 = 6.0;
    /// As many powers at least, or rounding would be seen.
    const FLATTEST: f64 = 0.1;

    fn of(layer: usize, head: usize, weights: ArrayView2<'_, f32>, cells: usize) -> Self {
        let (queries, keys) = weights.dim();
        let block = |cell: usize, len: usize| cell * len / cells..((cell + 1) * len).div_ceil(cells);
        let mut logs = Vec::with_capacity(cells * cells);
        for i in 0..cells {
            for j in 0..cells {
                let block = weights.slice(s![block(i, queries), block(j, keys)]);
                let most = block.iter().fold(0f32, |most, &weight| most.max(weight.abs()));
                logs.push(f64::from(most).log10());
            }
        }
        let high = logs.iter().copied().filter(|log| log.is_finite()).fold(f64::NEG_INFINITY, f64::max);
        let high = if high.is_finite() { high } else { 0.0 };
        let low = logs.iter().copied().filter(|log| log.is_finite()).fold(high, f64::min);
        let low = low.clamp(high - Self::DEEPEST, high - Self::FLATTEST);
        // 0 is no weight at all.
        let level = |log: f64| match log {
            f64::NEG_INFINITY => 0,
            _ => 1 + ((log - low) / (high - low) * 62.0).round().clamp(0.0, 62.0) as usize,
        };
        let digits: Vec<_> = logs.into_iter().map(|log| Self::LEVELS[level(log)]).collect();
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
        Self { layer, head, cells, range: (low, high), levels }
    }
}

/// The page, with the plates in it.
fn page(plates: &[Plate], inputs: &Inputs) -> Result<String, Failure> {
    let panel = |p: &Panel| {
        format!(
            r#"{{"layer":{},"head":{},"cells":{},"low":{:.3},"high":{:.3},"levels":"{}"}}"#,
            p.layer, p.head, p.cells, p.range.0, p.range.1, p.levels
        )
    };
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
        format!(
            r#"{{"name":{},"family":{},"type":{},"module":{},"source":{},"summary":{},"not":{},"formula":{},"builder":{},"findings":[{}],"panels":[{}],"choice":{}}}"#,
            string(plate.entry.card.name),
            string(plate.entry.card.family),
            string(plate.entry.card.mechanism),
            string(&plate.docs.module),
            string(plate.entry.card.source),
            string(plate.entry.card.summary),
            string(plate.entry.card.when_not),
            string(&plate.docs.formula),
            string(&plate.docs.builder),
            plate.findings.iter().map(finding).collect::<Vec<_>>().join(","),
            plate.panels.iter().map(panel).collect::<Vec<_>>().join(","),
            plate.choice.as_ref().map_or_else(|| "null".to_owned(), Choice::json)
        )
    };
    let dense = inputs.dense.each_ref().map(|(_, weights)| {
        let panels = (0..weights.dim().1)
            .map(|head| panel(&Panel::of(FEATURED, head, weights.slice(s![0, head, .., ..]), 128)));
        format!("[{}]", panels.collect::<Vec<_>>().join(","))
    });
    let data = format!(
        "{{\"isa\":\"{}\",\"threads\":{},\"featured\":{FEATURED},\"words\":[{}],\"budgets\":{:?},\"dense\":[{}],\"plates\":[\n{}\n]}}",
        Isa::choose(None)?.name(),
        if cfg!(feature = "rayon") { rayon::current_num_threads() } else { 1 },
        fixture::words().iter().map(|word| string(word)).collect::<Vec<_>>().join(","),
        kept::BUDGETS,
        dense.join(","),
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
