//! Scratch memory: counted, caller-owned, reusable.

use crate::simd::mem::{Arena, Buffer};

/// Scratch memory for kernels.
///
/// Any workspace serves any call: one that is too small grows. After one call,
/// or when made [`with_capacity`](Self::with_capacity) of what the mechanism
/// asks for, further calls of the same sizes allocate nothing.
#[derive(Debug, Default, Clone)]
pub struct Workspace(Buffer);

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// A workspace of at least `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut workspace = Self::new();
        workspace.0.grow(bytes);
        workspace
    }

    /// Bytes that it holds.
    pub fn capacity(&self) -> usize {
        self.0.len()
    }

    /// At least `bytes` of memory to cut up.
    pub(crate) fn arena(&mut self, bytes: usize) -> Arena<'_> {
        self.0.grow(bytes);
        self.0.arena()
    }
}
