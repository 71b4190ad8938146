//! Reads GGUF files: metadata, and where the tensors lie.
//!
//! Everything that a file says is checked against its length before it is used,
//! so that a truncated file or one of another kind is an error that names what
//! is wrong.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::Result;
use crate::matrix::{Format, Matrix};

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// What a Rust type is in the metadata.
pub trait FromValue: Sized {
    const NAME: &'static str;
    fn from(value: &Value) -> Option<Self>;
}

macro_rules! from_value {
    ($($type:ty, $name:literal, $pattern:pat => $value:expr;)*) => {$(
        impl FromValue for $type {
            const NAME: &'static str = $name;
            fn from(value: &Value) -> Option<Self> {
                match value {
                    $pattern => $value,
                    _ => None,
                }
            }
        }
    )*};
}
from_value! {
    usize, "a number that is not negative", Value::Int(x) => usize::try_from(*x).ok();
    u32, "a number below 2^32", Value::Int(x) => u32::try_from(*x).ok();
    f64, "a number", Value::Float(x) => Some(*x);
    bool, "true or false", Value::Bool(x) => Some(*x);
    String, "a text", Value::Text(x) => Some(x.clone());
    Vec<String>, "a list of texts", Value::Array(x) => x.iter().map(FromValue::from).collect();
    Vec<u32>, "a list of numbers below 2^32", Value::Array(x) => x.iter().map(FromValue::from).collect();
}

/// Where a tensor lies: its shape, the fastest axis first, its type as the file
/// names it, and its first byte.
#[derive(Clone, Debug)]
struct Tensor {
    shape: Vec<usize>,
    kind: u32,
    start: usize,
}

/// A file in memory.
#[derive(Debug)]
pub struct Gguf {
    data: Arc<Vec<u8>>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Self> {
        let data = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(data).map_err(|e| format!("{}: {e}", path.display()).into())
    }

    pub fn parse(data: Vec<u8>) -> Result<Self> {
        let mut r = Reader { data: &data, at: 0 };
        if r.take(4, "the magic number")? != b"GGUF" {
            return Err("not a GGUF file: it does not start with \"GGUF\"".into());
        }
        let version = r.u32("the version")?;
        if ![2, 3].contains(&version) {
            return Err(format!("GGUF of version {version}; 2 and 3 are known").into());
        }
        let tensor_count = r.count(24, "the number of tensors")?;
        let pair_count = r.count(13, "the number of metadata pairs")?;

        let mut metadata = HashMap::new();
        for i in 0..pair_count {
            let key = r.text(&format!("the name of metadata pair {i}"))?;
            let kind = r.u32(&key)?;
            let value = r.value(kind, true, &key)?;
            metadata.insert(key, value);
        }

        let mut tensors = HashMap::new();
        for i in 0..tensor_count {
            let name = r.text(&format!("the name of tensor {i}"))?;
            let dims = r.u32(&name)?;
            if dims > 4 {
                return Err(format!("tensor {name} has {dims} axes; 4 are the most").into());
            }
            let shape = (0..dims).map(|_| r.size(&name)).collect::<Result<_>>()?;
            let tensor = Tensor { shape, kind: r.u32(&name)?, start: r.size(&name)? };
            tensors.insert(name, tensor);
        }

        // Tensors start at the next multiple of the alignment, and count from there.
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Int(x)) if (1..=1 << 20).contains(x) => *x as usize,
            Some(x) => return Err(format!("general.alignment is {x:?}, no alignment").into()),
        };
        let base = r.at.next_multiple_of(alignment);
        for (name, tensor) in &mut tensors {
            let start = base.checked_add(tensor.start);
            tensor.start = start.ok_or_else(|| format!("tensor {name} starts beyond all memory"))?;
        }
        Ok(Self { data: Arc::new(data), metadata, tensors })
    }

    /// A value of the metadata, if the file has it.
    pub fn find<T: FromValue>(&self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match T::from(value) {
            Some(value) => Ok(Some(value)),
            None => Err(format!("metadata {key} is not {}", T::NAME).into()),
        }
    }

    /// A value of the metadata that must be there.
    pub fn get<T: FromValue>(&self, key: &str) -> Result<T> {
        self.find(key)?.ok_or_else(|| format!("metadata {key} is missing").into())
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A matrix of so many rows and columns, which stays as the file has it.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let Some(Tensor { shape, kind, start }) = self.tensors.get(name) else {
            return Err(format!("tensor {name} is missing").into());
        };
        if shape.iter().copied().chain([1; 4]).take(4).ne([cols, rows, 1, 1]) {
            return Err(format!("tensor {name} is {shape:?} instead of [{cols}, {rows}]").into());
        }
        let format = Format::of_gguf(*kind)
            .ok_or_else(|| format!("tensor {name} is of type {kind}, which this program does not read"))?;
        if !cols.is_multiple_of(format.block().0) {
            return Err(
                format!("tensor {name}: {cols} columns do not divide into blocks of {format:?}").into()
            );
        }
        Matrix::new(self.data.clone(), *start, rows, cols, format).ok_or_else(|| {
            format!("tensor {name} ends beyond the {} bytes of the file: is it truncated?", self.data.len())
                .into()
        })
    }

    /// A vector of so many elements.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let matrix = self.matrix(name, 1, len)?;
        let mut out = vec![0.0; len];
        matrix.row(0, &mut out);
        Ok(out)
    }
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let left = self.data.get(self.at..).unwrap_or_default();
        let Some(bytes) = left.get(..n) else {
            return Err(format!("truncated at byte {}, in {what}", self.data.len()).into());
        };
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(self.take(N, what)?.try_into().expect("as many as were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn size(&mut self, what: &str) -> Result<usize> {
        let size = u64::from_le_bytes(self.array(what)?);
        usize::try_from(size).map_err(|_| format!("{what}: {size} is beyond all memory").into())
    }

    /// How many of something there are, each of at least so many bytes: no more
    /// than the rest of the file can hold.
    fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let count = self.size(what)?;
        match count.checked_mul(least) {
            Some(bytes) if bytes <= self.data.len() - self.at => Ok(count),
            _ => Err(format!(
                "truncated: {what} says {count}, and {} bytes are left",
                self.data.len() - self.at
            )
            .into()),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let len = self.count(1, what)?;
        let bytes = self.take(len, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8").into())
    }

    fn value(&mut self, kind: u32, arrays: bool, key: &str) -> Result<Value> {
        macro_rules! number {
            ($value:ident, $type:ty) => {
                Value::$value(<$type>::from_le_bytes(self.array(key)?).into())
            };
        }
        Ok(match kind {
            0 => number!(Int, u8),
            1 => number!(Int, i8),
            2 => number!(Int, u16),
            3 => number!(Int, i16),
            4 => number!(Int, u32),
            5 => number!(Int, i32),
            6 => number!(Float, f32),
            7 => Value::Bool(self.array::<1>(key)? != [0]),
            8 => Value::Text(self.text(key)?),
            9 if arrays => {
                let kind = self.u32(key)?;
                let least = [1, 1, 2, 2, 4, 4, 4, 1, 8, 1, 8, 8, 8];
                let count = self.count(least.get(kind as usize).copied().unwrap_or(1), key)?;
                Value::Array((0..count).map(|_| self.value(kind, false, key)).collect::<Result<_>>()?)
            }
            10 => number!(Int, u64),
            11 => number!(Int, i64),
            12 => number!(Float, f64),
            _ => return Err(format!("metadata {key} is of unknown type {kind}").into()),
        })
    }
}
