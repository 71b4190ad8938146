//! Text to tokens and back: byte-level BPE with the vocabulary and the merges of
//! the file, as GPT-2, SmolLM2 and Llama 3 have it.

use std::collections::HashMap;

use fancy_regex::Regex;

use crate::Result;
use crate::gguf::Gguf;

/// Words of GPT-2: merges do not cross their borders.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Those of Llama 3.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

#[derive(Debug)]
pub struct Tokenizer {
    texts: Vec<String>,
    ids: HashMap<String, u32>,
    /// Of two tokens that may become one: how early, and which one.
    merges: HashMap<(u32, u32), (usize, u32)>,
    /// The token of each byte, where there is one.
    bytes: Vec<Option<u32>>,
    words: Regex,
    /// Whether each digit is a word.
    digits: bool,
    /// Tokens that are no text.
    control: Vec<bool>,
    first: Option<u32>,
    ends: Vec<u32>,
}

impl Tokenizer {
    pub fn of(file: &Gguf) -> Result<Self> {
        let model: String = file.get("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(
                format!("the tokenizer is \"{model}\"; byte-level BPE (\"gpt2\") is what is known").into()
            );
        }
        let pre = file.find::<String>("tokenizer.ggml.pre")?.unwrap_or_else(|| "default".into());
        let (words, digits) = match pre.as_str() {
            "smollm" => (GPT2, true),
            "default" | "gpt-2" => (GPT2, false),
            "llama-bpe" | "llama3" | "llama-v3" => (LLAMA3, false),
            _ => return Err(format!("\"{pre}\" cuts text into words in a way that is not known here").into()),
        };
        let texts: Vec<String> = file.get("tokenizer.ggml.tokens")?;
        let ids: HashMap<String, u32> = texts.iter().cloned().zip(0..).collect();
        let kinds: Vec<u32> = file.find("tokenizer.ggml.token_type")?.unwrap_or_default();
        let control = (0..texts.len()).map(|i| kinds.get(i) == Some(&3)).collect();

        let mut merges = HashMap::new();
        for (rank, merge) in file.get::<Vec<String>>("tokenizer.ggml.merges")?.iter().enumerate() {
            let Some((a, b)) = merge.split_once(' ') else {
                return Err(format!("merge {rank} of the tokenizer, {merge:?}, is not of two parts").into());
            };
            if let [Some(&a), Some(&b), Some(&both)] = [a, b, &format!("{a}{b}")].map(|text| ids.get(text)) {
                merges.entry((a, b)).or_insert((rank, both));
            }
        }
        let bytes = (0..=255).map(|byte| ids.get(char_of(byte).encode_utf8(&mut [0; 4])).copied()).collect();

        let special = |key: &str| file.find::<u32>(&format!("tokenizer.ggml.{key}"));
        let first = match file.find::<bool>("tokenizer.ggml.add_bos_token")? {
            Some(true) => special("bos_token_id")?,
            _ => None,
        };
        let mut ends: Vec<u32> =
            special("eos_token_id")?.into_iter().chain(special("eot_token_id")?).collect();
        ends.extend(["<|im_end|>", "<|eot_id|>", "<|endoftext|>"].iter().filter_map(|end| ids.get(*end)));
        if let Some(id) = first.iter().chain(&ends).find(|id| **id as usize >= texts.len()) {
            return Err(format!("special token {id} is beyond the {} of the vocabulary", texts.len()).into());
        }
        let words = Regex::new(words)?;
        Ok(Self { texts, ids, merges, bytes, words, digits, control, first, ends })
    }

    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether a text ends with this token.
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// A text as it is, as a model continues it.
    pub fn text(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens: Vec<u32> = self.first.into_iter().collect();
        self.push_text(text, &mut tokens)?;
        Ok(tokens)
    }

    /// A question in the template of SmolLM2-Instruct (ChatML), up to where the
    /// answer starts; `None` for a vocabulary that has not its marks. What
    /// looks like a mark within the texts is text.
    pub fn chat(&self, system: &str, user: &str) -> Result<Option<Vec<u32>>> {
        let [Some(&start), Some(&end)] = ["<|im_start|>", "<|im_end|>"].map(|mark| self.ids.get(mark)) else {
            return Ok(None);
        };
        let mut tokens = Vec::new();
        for (role, text) in [("system", system), ("user", user)] {
            tokens.push(start);
            self.push_text(&format!("{role}\n{text}"), &mut tokens)?;
            tokens.push(end);
            self.push_text("\n", &mut tokens)?;
        }
        tokens.push(start);
        self.push_text("assistant\n", &mut tokens)?;
        Ok(Some(tokens))
    }

    fn push_text(&self, text: &str, tokens: &mut Vec<u32>) -> Result<()> {
        let mut rest = text;
        while let Some(char) = rest.chars().next() {
            let digit = |char: char| self.digits && char.is_numeric();
            let len = if digit(char) { char.len_utf8() } else { rest.find(digit).unwrap_or(rest.len()) };
            let (part, after) = rest.split_at(len);
            for word in self.words.find_iter(part) {
                self.push_word(word?.as_str(), tokens);
            }
            rest = after;
        }
        Ok(())
    }

    /// Merges the tokens of the bytes of a word, the earliest merge first. A byte
    /// that the vocabulary lacks is left out.
    fn push_word(&self, word: &str, tokens: &mut Vec<u32>) {
        let mut parts: Vec<u32> = word.bytes().filter_map(|byte| self.bytes[usize::from(byte)]).collect();
        let merge = |parts: &[u32], at: usize| {
            let pair = (*parts.get(at)?, *parts.get(at + 1)?);
            self.merges.get(&pair).copied()
        };
        let rank = |parts: &[u32], at| merge(parts, at).map_or(usize::MAX, |(rank, _)| rank);
        let mut ranks: Vec<usize> = (0..parts.len()).map(|at| rank(&parts, at)).collect();
        while let Some((at, _)) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank) {
            let Some((_, both)) = merge(&parts, at) else { break };
            parts[at] = both;
            parts.remove(at + 1);
            ranks.remove(at + 1);
            ranks[at] = rank(&parts, at);
            if at > 0 {
                ranks[at - 1] = rank(&parts, at - 1);
            }
        }
        tokens.append(&mut parts);
    }

    /// The bytes that a token stands for; none for marks.
    fn bytes_of(&self, token: u32) -> Vec<u8> {
        match self.texts.get(token as usize) {
            Some(text) if !self.control[token as usize] => text.chars().filter_map(byte_of).collect(),
            _ => Vec::new(),
        }
    }
}

/// GPT-2 writes bytes that are no visible characters as ones from 256 on.
pub fn char_of(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !visible(*byte)).count() as u32;
    char::from_u32(256 + before).expect("one of 68 characters from 256 on")
}

fn byte_of(char: char) -> Option<u8> {
    (0..=255).find(|byte| char_of(*byte) == char)
}

/// Text from tokens as they come: characters whose last byte is still to come
/// wait.
#[derive(Debug, Default)]
pub struct Stream(Vec<u8>);

impl Stream {
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.0.extend(tokenizer.bytes_of(token));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.0) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.0.clear();
                    return text;
                }
                Err(e) => {
                    text.push_str(&String::from_utf8_lossy(&self.0[..e.valid_up_to()]));
                    // Bytes that nothing can complete are shown as what they are not.
                    let Some(bad) = e.error_len() else {
                        self.0.drain(..e.valid_up_to());
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.0.drain(..e.valid_up_to() + bad);
                }
            }
        }
    }
}
