//! Queries, keys and values of memories that learn and forget.

use crate::input::declare::input;

input! {
    /// Queries, keys and values with what tokens leave of a memory, and their steps of
    /// descent: what [`Moneta`](crate::linear::Moneta) and
    /// [`Memora`](crate::linear::Memora) take.
    MirasQkv(qkv) {
        /// What each token leaves of the memory: from 0 to 1.
        keep: f32 [batch, heads/, len],
        /// How far each token goes down its gradient: at least 0.
        step: f32 [batch, heads/, len],
    }
}
