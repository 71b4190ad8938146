//! A tiny random model in a GGUF file that is written here, run over every cache.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, Axis, s};

use crate::caches::{CACHES, Room, Store, stores};
use crate::gguf::Gguf;
use crate::matrix::{Format, Matrix};
use crate::model::{Model, Session};
use crate::tokenizer::{Stream, Tokenizer, char_of};
use crate::{Result, argmax, surprise};

/// Sizes of the model: layers, dim, query heads, key/value heads, head_dim, feed.
const SIZES: [usize; 6] = [2, 64, 4, 2, 32, 96];

/// Bytes that look random.
fn noise(seed: u64) -> impl FnMut() -> u8 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    }
}

/// A file as it is written, and where its header ends.
fn tiny() -> (Vec<u8>, usize) {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }
    let [layers, dim, q_heads, kv_heads, head_dim, feed] = SIZES;
    let mut tokens: Vec<String> = (0..=255).map(|byte| char_of(byte).to_string()).collect();
    tokens.extend(["th", "the", "Ġthe", "<|im_start|>", "<|im_end|>"].map(String::from));
    let vocabulary = tokens.len();

    let (mut pairs, mut count) = (Vec::new(), 0u64);
    let mut pair = |key: &str, kind: u32, value: &[u8]| {
        text(&mut pairs, key);
        pairs.extend(kind.to_le_bytes());
        pairs.extend(value);
        count += 1;
    };
    let of_text = |x: &str| {
        let mut out = Vec::new();
        text(&mut out, x);
        out
    };
    let of_list = |kind: u32, n: usize, values: Vec<u8>| {
        [kind.to_le_bytes().to_vec(), (n as u64).to_le_bytes().to_vec(), values].concat()
    };
    for (key, value) in [
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ] {
        pair(key, 8, &of_text(value));
    }
    for (key, value) in [
        ("block_count", layers),
        ("embedding_length", dim),
        ("feed_forward_length", feed),
        ("attention.head_count", q_heads),
        ("attention.head_count_kv", kv_heads),
        ("attention.key_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("context_length", 256),
    ] {
        pair(&format!("llama.{key}"), 4, &(value as u32).to_le_bytes());
    }
    pair("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
    pair(
        "tokenizer.ggml.tokens",
        9,
        &of_list(8, vocabulary, tokens.iter().flat_map(|x| of_text(x)).collect()),
    );
    let kinds = (0..vocabulary).flat_map(|i| if i < vocabulary - 2 { 1u32 } else { 3 }.to_le_bytes());
    pair("tokenizer.ggml.token_type", 9, &of_list(5, vocabulary, kinds.collect()));
    let merges = ["t h", "th e", "Ġ the"];
    pair("tokenizer.ggml.merges", 9, &of_list(8, 3, merges.iter().flat_map(|x| of_text(x)).collect()));

    // Norms in f32, matrices in Q8_0.
    let mut shapes = vec![("token_embd".to_string(), vocabulary, dim), ("output_norm".into(), 1, dim)];
    for i in 0..layers {
        let (q, kv) = (q_heads * head_dim, kv_heads * head_dim);
        shapes.extend(
            [
                ("attn_norm", 1, dim),
                ("attn_q", q, dim),
                ("attn_k", kv, dim),
                ("attn_v", kv, dim),
                ("attn_output", dim, q),
                ("ffn_norm", 1, dim),
                ("ffn_gate", feed, dim),
                ("ffn_up", feed, dim),
                ("ffn_down", dim, feed),
            ]
            .map(|(name, rows, cols)| (format!("blk.{i}.{name}"), rows, cols)),
        );
    }
    let (mut header, mut data, mut next) = (Vec::new(), Vec::new(), noise(1));
    for (name, rows, cols) in &shapes {
        text(&mut header, &format!("{name}.weight"));
        let vector = *rows == 1;
        header.extend(if vector { 1u32 } else { 2 }.to_le_bytes());
        [*cols, *rows]
            .iter()
            .take(2 - usize::from(vector))
            .for_each(|x| header.extend((*x as u64).to_le_bytes()));
        header.extend(if vector { 0u32 } else { 8 }.to_le_bytes());
        header.extend((data.len() as u64).to_le_bytes());
        if vector {
            (0..*cols).for_each(|_| data.extend((1.0 + f32::from(next() as i8) / 500.0).to_le_bytes()));
        } else {
            for _ in 0..rows * cols / 32 {
                data.extend(half::f16::from_f32(0.003).to_le_bytes());
                data.extend((0..32).map(|_| next()));
            }
        }
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let counts = [shapes.len() as u64, count].map(u64::to_le_bytes).concat();
    let mut file = [b"GGUF".to_vec(), 3u32.to_le_bytes().to_vec(), counts, pairs, header].concat();
    let end = file.len();
    file.resize(end.next_multiple_of(32), 0);
    file.extend(data);
    (file, end)
}

fn load(file: Vec<u8>) -> Result<(Gguf, Tokenizer, Model)> {
    let file = Gguf::parse(file)?;
    let tokenizer = Tokenizer::of(&file)?;
    let model = Model::of(&file, tokenizer.len())?;
    Ok((file, tokenizer, model))
}

fn prompt(len: usize) -> Vec<u32> {
    let mut next = noise(5);
    (0..len).map(|_| u32::from(next())).collect()
}

/// Logits of every token of a text whose first `prompt` tokens are the prompt.
fn logits(
    model: &Model,
    cache: &str,
    text: &[u32],
    prompt: usize,
    window: usize,
    chunk: usize,
) -> Array2<f32> {
    let room = Room { capacity: text.len(), window };
    let mut session = Session::new(model, stores(cache, model, room, &text[..prompt]).unwrap()).unwrap();
    let mut all = Array2::zeros((0, 261));
    for (i, part) in [&text[..prompt], &text[prompt..]].into_iter().enumerate() {
        for tokens in part.chunks(chunk) {
            let rows = session.feed(tokens).unwrap();
            all.append(Axis(0), model.logits(rows.view()).view()).unwrap();
        }
        if i == 0 {
            session.end_prompt().unwrap();
        }
    }
    all
}

fn apart(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    assert!(a.iter().all(|x| x.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The model by its definition: plain loops in f64 over the weights of the file.
fn by_definition(file: &Gguf, text: &[u32]) -> Array2<f32> {
    let [layers, dim, q_heads, kv_heads, d, feed] = SIZES;
    let weight = |name: &str, rows: usize, cols: usize| -> Vec<Vec<f64>> {
        let matrix = file.matrix(&format!("{name}.weight"), rows, cols).unwrap();
        let mut row = vec![0.0; cols];
        (0..rows)
            .map(|r| {
                matrix.row(r, &mut row);
                row.iter().map(|x| f64::from(*x)).collect()
            })
            .collect()
    };
    let times = |w: &[Vec<f64>], x: &[f64]| -> Vec<f64> {
        w.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    };
    let norm = |x: &[f64], name: &str| -> Vec<f64> {
        let size = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-5).sqrt();
        weight(name, 1, dim)[0].iter().zip(x).map(|(w, x)| w * x / size).collect()
    };
    let turn = |x: &mut [f64], position: usize| {
        for i in 0..d / 2 {
            let (sin, cos) = (position as f64 * 10_000f64.powf(-2.0 * i as f64 / d as f64)).sin_cos();
            let (a, b) = (x[2 * i], x[2 * i + 1]);
            (x[2 * i], x[2 * i + 1]) = (a * cos - b * sin, a * sin + b * cos);
        }
    };
    let embedding = weight("token_embd", 261, dim);
    let mut x: Vec<Vec<f64>> = text.iter().map(|token| embedding[*token as usize].clone()).collect();
    for l in 0..layers {
        let of = |name: &str, rows, cols| weight(&format!("blk.{l}.{name}"), rows, cols);
        let (wq, wo) = (of("attn_q", q_heads * d, dim), of("attn_output", dim, q_heads * d));
        let (wk, wv) = (of("attn_k", kv_heads * d, dim), of("attn_v", kv_heads * d, dim));
        let (gate, up, down) =
            (of("ffn_gate", feed, dim), of("ffn_up", feed, dim), of("ffn_down", dim, feed));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (t, x) in x.iter_mut().enumerate() {
            let h = norm(x, &format!("blk.{l}.attn_norm"));
            let (mut q, mut k) = (times(&wq, &h), times(&wk, &h));
            q.chunks_mut(d).chain(k.chunks_mut(d)).for_each(|head| turn(head, t));
            keys.push(k);
            values.push(times(&wv, &h));
            let mut out = vec![0.0; q_heads * d];
            for h in 0..q_heads {
                let of = h / (q_heads / kv_heads) * d;
                let dot = |k: &Vec<f64>| (0..d).map(|c| q[h * d + c] * k[of + c]).sum::<f64>();
                let p: Vec<f64> = keys.iter().map(|k| (dot(k) / (d as f64).sqrt()).exp()).collect();
                let total: f64 = p.iter().sum();
                for (p, v) in p.iter().zip(&values) {
                    (0..d).for_each(|c| out[h * d + c] += p / total * v[of + c]);
                }
            }
            x.iter_mut().zip(times(&wo, &out)).for_each(|(x, y)| *x += y);
            let h = norm(x, &format!("blk.{l}.ffn_norm"));
            let gated = times(&gate, &h).into_iter().zip(times(&up, &h));
            let gated: Vec<f64> = gated.map(|(a, b)| a / (1.0 + (-a).exp()) * b).collect();
            x.iter_mut().zip(times(&down, &gated)).for_each(|(x, y)| *x += y);
        }
    }
    let rows: Vec<f32> =
        x.iter().flat_map(|x| times(&embedding, &norm(x, "output_norm"))).map(|x| x as f32).collect();
    Array2::from_shape_vec((text.len(), 261), rows).unwrap()
}

#[test]
fn logits_are_those_of_the_definition() {
    let (file, _, model) = load(tiny().0).unwrap();
    let text = prompt(37);
    let got = logits(&model, "contiguous", &text, 30, 64, 512);
    let off = apart(&got, &by_definition(&file, &text));
    assert!(off < 1e-4, "{off}");
}

/// Over every cache a text in chunks is the text token by token, forgetting or
/// not. Only `kivi` rounds tokens later than they come, and a chunk that is longer
/// than what it keeps in full precision sees its first tokens rounded.
#[test]
fn chunks_are_token_by_token() {
    let (_, _, model) = load(tiny().0).unwrap();
    let text = prompt(200);
    for (cache, _) in CACHES {
        let text = if cache == "kivi" { &text[..127] } else { &text };
        let prompt = text.len() * 3 / 4;
        let one = logits(&model, cache, text, prompt, 40, 1);
        for chunk in [7, 512] {
            let off = apart(&one, &logits(&model, cache, text, prompt, 40, chunk));
            // Another order of sums may round a code the other way.
            let coded = ["f16", "int8", "int4", "rotated"].contains(&cache);
            assert!(off < if coded { 0.5 } else { 1e-3 }, "{cache} in chunks of {chunk}: {off}");
        }
    }
}

/// What is exact before anything is forgotten, and how far off what is rounded.
#[test]
fn caches_differ_by_what_they_keep() {
    let (_, _, model) = load(tiny().0).unwrap();
    let text = prompt(200);
    let exact = logits(&model, "contiguous", &text, 150, 40, 64);
    let mut rounded = Vec::new();
    for (cache, _) in CACHES {
        let got = logits(&model, cache, &text, 150, 40, 64);
        let equal = match cache {
            "contiguous" | "paged" => 200,
            "ring" | "streaming" | "h2o" | "duo" => 40,
            "snapkv" => 150,
            _ => {
                rounded.push(apart(&exact, &got));
                continue;
            }
        };
        let part = |x: &Array2<f32>, rows: Range<usize>| x.slice(s![rows, ..]).to_owned();
        let off = apart(&part(&exact, 0..equal), &part(&got, 0..equal));
        assert!(off < 1e-3, "{cache}: {off}");
        assert!(equal == 200 || apart(&part(&exact, equal..200), &part(&got, equal..200)) > 0.1, "{cache}");
    }
    let [half, eight, four, kivi, rotated] = rounded[..] else { panic!("{rounded:?}") };
    assert!(0.0 < half && half < eight && eight < four && eight < kivi.min(rotated), "{rounded:?}");
}

fn greedy(model: &Model, cache: &str, window: usize) -> (Vec<u32>, usize) {
    let text = prompt(50);
    let room = Room { capacity: 110, window };
    let mut session = Session::new(model, stores(cache, model, room, &text).unwrap()).unwrap();
    let mut rows = session.prefill(&text, 16, |_| ()).unwrap();
    session.end_prompt().unwrap();
    let mut out = Vec::new();
    for _ in 0..60 {
        out.push(argmax(&session.next(&rows)));
        rows = session.feed(&out[out.len() - 1..]).unwrap();
    }
    (out, session.stores.iter().map(Store::held).max().unwrap())
}

#[test]
fn greedy_text_is_the_same_where_nothing_is_lost() {
    let (_, _, model) = load(tiny().0).unwrap();
    let (text, held) = greedy(&model, "contiguous", 20);
    assert_eq!(held, 110);
    for cache in ["paged", "ring", "streaming", "snapkv", "h2o", "duo"] {
        assert_eq!(greedy(&model, cache, 300), (text.clone(), 110), "{cache}");
    }
    for (cache, most) in [("ring", 20), ("streaming", 20), ("snapkv", 80), ("h2o", 20), ("duo", 110)] {
        let (other, held) = greedy(&model, cache, 20);
        assert_eq!(held, most, "{cache}");
        assert_ne!(other, text, "{cache}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_, _, model) = load(tiny().0).unwrap();
    let room = Room { capacity: 8, window: 16 };
    for cache in ["contiguous", "paged", "int8", "kivi", "snapkv"] {
        let mut session = Session::new(&model, stores(cache, &model, room, &[1]).unwrap()).unwrap();
        let refused = session.feed(&prompt(17)).unwrap_err().to_string();
        assert!(refused.contains("tokens"), "{refused}");
        assert_eq!((session.len, session.stores[0].held()), (0, 0));
    }
    let refused = stores("nothing", &model, room, &[1]).err().unwrap().to_string();
    assert!(refused.contains("nothing") && refused.contains("kivi"), "{refused}");
    assert!(stores("ring", &model, Room { window: 3, ..room }, &[1]).is_err());
}

#[test]
fn surprise_of_noise_is_that_of_the_vocabulary() {
    let (_, _, model) = load(tiny().0).unwrap();
    let options = crate::Options::parse(["--window", "40", "--chunk", "16"].map(String::from).into_iter());
    let options = options.unwrap().unwrap();
    let text = prompt(120);
    let all = logits(&model, "contiguous", &text, 120, 64, 120);
    let of = |t: usize| {
        let row = all.row(t).mapv(f64::from);
        row.mapv(f64::exp).sum().ln() - row[text[t + 1] as usize]
    };
    let want: f64 = (60..119).map(of).sum();
    let (sum, count) = surprise(&model, &options, "contiguous", &text).unwrap();
    assert!(count == 59 && (sum - want).abs() < 1e-2, "{sum} for {want}");
    let (rounded, _) = surprise(&model, &options, "int8", &text).unwrap();
    assert!((rounded / sum - 1.0).abs() < 0.01 && rounded != sum, "{rounded} for {sum}");
}

/// A file that ends anywhere before its end is an error that says so.
#[test]
fn truncated_files_are_refused() {
    let (file, header) = tiny();
    let ends = (0..header).chain((header..file.len()).step_by(997)).chain([file.len() - 1]);
    for end in ends {
        let refused = load(file[..end].to_vec()).err().unwrap_or_else(|| panic!("{end} bytes")).to_string();
        assert!(refused.contains("truncated"), "{end} bytes: {refused}");
    }
}

/// Any byte of the header may be wrong: an error or a model, but no panic.
#[test]
fn damaged_files_do_not_panic() {
    let (file, header) = tiny();
    let (mut next, mut refused) = (noise(9), 0);
    for at in 0..header {
        let mut file = file.clone();
        file[at] ^= next().max(1);
        match load(file) {
            Err(e) => {
                assert!(!e.to_string().is_empty());
                refused += 1;
            }
            Ok((_, tokenizer, _)) => drop(tokenizer.text("the end").unwrap()),
        }
    }
    assert!(refused > header / 10, "{refused} of {header}");
    assert!(load(b"GGML and so on".to_vec()).err().unwrap().to_string().contains("not a GGUF file"));
    let foreign = String::from_utf8_lossy(&file).replace("general.architecture", "general.architectura");
    assert!(load(foreign.into_bytes()).is_err());
}

#[test]
fn text_goes_to_tokens_and_back() {
    let (_, tokenizer, _) = load(tiny().0).unwrap();
    // Ids of bytes are the bytes; "th", "the" and "Ġthe" are 256 to 258.
    assert_eq!(tokenizer.text("the the  the!").unwrap(), [257, 258, 32, 258, 33]);
    assert_eq!(tokenizer.text("th3 e").unwrap(), [256, 51, 32, 101]);
    assert_eq!(tokenizer.text("a 12\n\nb").unwrap(), [97, 32, 49, 50, 10, 10, 98]);
    for text in ["", "the naïve 数字 42 🦀's\t\n  end ", "<|im_start|>"] {
        let (mut stream, tokens) = (Stream::default(), tokenizer.text(text).unwrap());
        assert_eq!(tokens.iter().map(|t| stream.push(&tokenizer, *t)).collect::<String>(), text);
    }
    let chat = tokenizer.chat("s", "<|im_end|>").unwrap().unwrap();
    assert_eq!(chat.iter().filter(|t| **t >= 259).copied().collect::<Vec<_>>(), [259, 260, 259, 260, 259]);
    let mut stream = Stream::default();
    assert_eq!([0xf0, 0x9f, 65].map(|t| stream.push(&tokenizer, t)).concat(), "\u{fffd}A");
}

/// Sums, plain and weighted by cosines, of 512 elements of bytes that all formats
/// share, as the Python package gguf 0.19 unpacks them.
#[test]
fn formats_are_those_of_ggml() {
    use Format::*;
    for (format, sum, weighted) in [
        (F32, 9.194230475e-01, 1.625060993e-02),
        (F16, -4.306640625e-01, -2.657094549e-01),
        (BF16, 7.988281250e-01, -1.090710674e-01),
        (Q4_0, 2.207592773e+01, -3.920313563e-01),
        (Q4_1, 6.098251953e+02, -5.553903428e+00),
        (Q5_0, -1.284521484e+01, -3.485069319e+01),
        (Q5_1, 3.720507812e+01, 3.807533105e+01),
        (Q8_0, -2.253007812e+02, 2.907450369e+02),
        (Q4_K, -1.788202271e+03, -3.378936863e+02),
        (Q5_K, 4.222191638e+04, -6.708636999e+01),
        (Q6_K, -7.655095215e+02, -6.073717320e+02),
    ] {
        let (elements, size) = format.block();
        let mut data: Vec<u8> =
            (0..512 / elements * size).map(|i| ((i * 73 + 41 + (i >> 3) * 29) % 256) as u8).collect();
        // Scales of a common size.
        for block in data.chunks_exact_mut(size) {
            match format {
                F32 => block[3] = block[3] & 128 | 60,
                BF16 => block[1] = block[1] & 128 | 60,
                Q6_K => block[209] = block[209] & 131 | 48,
                F16 | Q4_0 | Q5_0 | Q8_0 => block[1] = block[1] & 131 | 48,
                _ => [1, 3].iter().for_each(|i| block[*i] = block[*i] & 131 | 48),
            }
        }
        let mut out = vec![0.0; 512];
        let matrix = Matrix::new(Arc::new(data), 0, 1, 512, format).unwrap();
        matrix.row(0, &mut out);
        let got: f64 = out.iter().map(|x| f64::from(*x)).sum();
        let cosines: f64 = out.iter().zip(1..).map(|(x, i)| f64::from(*x) * f64::from(i).cos()).sum();
        let near = |got: f64, want: f64| (got - want).abs() < 1e-4 * (1.0 + want.abs());
        assert!(near(got, sum) && near(cosines, weighted), "{format:?}: {got} {cosines}");

        // And a product is the sum of products, for any number of tokens.
        for n in [1, 3, 4, 9] {
            let x = Array2::from_shape_fn((n, 512), |(t, c)| ((t * 7 + c) as f32).cos());
            let exact = (0..n).map(|t| out.iter().zip(x.row(t)).map(|(a, b)| f64::from(a * b)).sum::<f64>());
            let got = matrix.of(x.view());
            assert_eq!(got.dim(), (n, 1));
            let largest = out.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            exact.zip(got.slice(s![.., 0])).for_each(|(exact, got)| {
                assert!(
                    (f64::from(*got) - exact).abs() < 1e-3 * f64::from(largest),
                    "{format:?}: {got} {exact}"
                );
            });
        }
    }
}
