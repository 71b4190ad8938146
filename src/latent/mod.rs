//! Latent attention: keys and values of all heads come from one small row a
//! token.
//!
//! | mechanism | a token is |
//! |---|---|
//! | [`Mla`] | a latent, and a rotary key that all heads share |

mod mla;
#[cfg(test)]
mod tests;

pub use mla::{Form, Latents, Mla, MlaBuilder};
