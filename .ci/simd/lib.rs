//! The SIMD layer and the two files that it calls, with its tests. Nothing
//! above it is compiled, so that the gate can run it on an emulated CPU and
//! under AddressSanitizer without building a hundred mechanisms each time.
#![allow(dead_code, unused_imports)]

#[path = "../../src/element.rs"]
pub mod element;
#[path = "../../src/error.rs"]
pub mod error;
#[path = "../../src/simd/mod.rs"]
#[allow(unsafe_code)]
pub mod simd;
