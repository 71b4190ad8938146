//! The SIMD layer and the two files that it calls, with its tests and the
//! definitions that these know. Nothing above it is compiled, so that the gate can run it on an emulated CPU and
//! under AddressSanitizer without building a hundred mechanisms each time.
#![allow(dead_code, unused_imports)]

#[path = "../../src/element.rs"]
pub mod element;
#[path = "../../src/error.rs"]
pub mod error;
#[path = "../../src/math/gates/exact.rs"]
pub mod exact;
pub mod math {
    pub mod gates {
        pub use crate::exact;
    }
}
#[path = "../../src/simd/mod.rs"]
#[allow(unsafe_code)]
pub mod simd;
