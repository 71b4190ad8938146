//! candle's quantised Llama on the file and the tokens of the program `generate`, greedily:
//! the largest logits after the prompt, the tokens that follow, tokens a second.
//!
//! ```sh
//! generate --model FILE --trace "Why is the sky blue?" 2> trace
//! cargo run --release -- FILE trace
//! ```

use std::error::Error;
use std::fs::{File, read_to_string};
use std::time::Instant;

use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

/// The numbers of the line that starts with a word and a colon.
fn numbers(trace: &str, word: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    let line = trace.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(':'));
    let line = line.ok_or_else(|| format!("the trace has no line \"{word}: …\""))?;
    Ok(line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(trace)) = (args.next(), args.next()) else {
        return Err("smollm2 FILE.gguf TRACE".into());
    };
    let trace = read_to_string(trace)?;
    let (prompt, theirs) = (numbers(&trace, "prompt tokens")?, numbers(&trace, "tokens")?);
    let mut file = File::open(model)?;
    let content = Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let mut logits = |tokens: &[u32], first: usize| -> candle_core::Result<Vec<f32>> {
        let x = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        model.forward(&x, first)?.squeeze(0)?.to_dtype(DType::F32)?.to_vec1()
    };

    let started = Instant::now();
    let mut row = logits(&prompt, 0)?;
    let prefill = started.elapsed();
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    let best: Vec<String> = order[..5].iter().map(|&i| format!("{i} {:.3}", row[i])).collect();
    println!("logits: {}", best.join(", "));

    let (started, mut tokens) = (Instant::now(), Vec::new());
    while tokens.len() < theirs.len() {
        let best = (0..row.len()).fold(0, |a, b| if row[b] > row[a] { b } else { a });
        tokens.push(best as u32);
        row = logits(&[best as u32], prompt.len() + tokens.len() - 1)?;
    }
    let decode = started.elapsed();
    let alike = tokens.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
    println!("tokens: {}", tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" "));
    println!("the first {alike} of {} tokens are the same", theirs.len());
    println!("prompt      {:>7} tokens {:>8.1} a second", prompt.len(), prompt.len() as f64 / prefill.as_secs_f64());
    println!("generated   {:>7} tokens {:>8.1} a second", tokens.len(), tokens.len() as f64 / decode.as_secs_f64());
    Ok(())
}
