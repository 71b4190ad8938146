//! Queries, keys and values of a real language model and the words that it reads, from
//! `tests/data/smollm2.safetensors` and `.words`; the README beside them says what they are.

use half::f16;
use ndarray::Array4;
use safetensors::{Dtype, SafeTensors};

/// The layers that the file has.
#[allow(dead_code, reason = "of the programs that have this file some read one layer")]
pub const LAYERS: [usize; 3] = [2, 14, 27];

/// The queries `[1, 3, 512, 64]`, keys and values `[1, 1, 512, 64]` of a
/// layer: 2, 14 or 27.
///
/// # Panics
/// If the file is not there or lacks the layer.
pub fn layer(n: usize) -> (Array4<f16>, Array4<f16>, Array4<f16>) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/smollm2.safetensors");
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{path}: {error}"));
    let tensor = |name: &str| {
        let name = format!("layer{n}.{name}");
        let tensor = file.tensor(&name).unwrap_or_else(|error| panic!("{path}: {name}: {error}"));
        let &[heads, len, dim] = tensor.shape() else { panic!("{path}: {name}: {:?}", tensor.shape()) };
        assert_eq!(tensor.dtype(), Dtype::F16, "{path}: {name}");
        let (pairs, _) = tensor.data().as_chunks::<2>();
        let numbers = pairs.iter().map(|&pair| f16::from_le_bytes(pair)).collect();
        Array4::from_shape_vec((1, heads, len, dim), numbers)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    (tensor("q"), tensor("k"), tensor("v"))
}

/// The text of the 512 tokens, one by one.
///
/// # Panics
/// If the file is not there.
#[allow(dead_code, reason = "of the programs that have this file one shows words")]
pub fn words() -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/smollm2.words");
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.lines().map(|word| word.replace("\\n", "\n")).collect()
}
