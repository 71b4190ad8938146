//! The state that linear attention carries from token to token.

use ndarray::{Array4, ArrayView4, ArrayViewMut4};

use crate::error::{Error, Result};
use crate::input::{countable, filled};

/// The matrix that a recurrence keeps for each sequence and head:
/// `[sequences, heads, state_dim, columns]`, where `state_dim` is `head_dim`
/// or what a feature map makes of it, and `columns` is `value_dim`, and one
/// more for mechanisms that divide by the sum of their weights. Where these
/// count keys too, the count is the last number, in a row of its own.
///
/// A NaN token spoils it, which shows in every later output.
///
/// ```
/// use attention_kernels::linear::State;
/// use ndarray::Array4;
///
/// let state = State::new(Array4::zeros((1, 2, 16, 8)))?;
/// assert_eq!(state.view().dim(), (1, 2, 16, 8));
/// assert!(State::new(Array4::from_elem((1, 1, 1, 1), f32::NAN)).is_err());
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct State(Array4<f32>);

impl State {
    /// A state with these numbers, for instance one that was saved.
    ///
    /// # Errors
    /// [`Error::Value`] if one is NaN or infinite.
    pub fn new(state: Array4<f32>) -> Result<Self> {
        match state.iter().find(|x| !x.is_finite()) {
            Some(x) => Err(Error::value("state", "finite numbers", x)),
            // Kernels cut it into pieces as it lies.
            None => Ok(Self(state.as_standard_layout().into_owned())),
        }
    }

    pub(crate) fn zeros(shape: (usize, usize, usize, usize)) -> Result<Self> {
        Ok(Self(filled("state", shape, 0f32)?))
    }

    /// Refuses sizes of more numbers than can be counted in bytes, for as many sequences
    /// and heads and for each thread.
    pub(crate) fn countable(shape: (usize, usize, usize, usize)) -> Result<()> {
        const THREADS: usize = 1 << 12;
        let (sequences, heads, rows, cols) = shape;
        let units = sequences.saturating_mul(heads).saturating_add(THREADS);
        let padded = |n: usize| n.saturating_add(64);
        if countable(&[units, padded(rows), padded(cols), 64 * size_of::<f32>()]) {
            return Ok(());
        }
        Err(Error::too_large("state", format_args!("{:?}", [sequences, heads, rows, cols])))
    }

    /// The numbers.
    pub fn view(&self) -> ArrayView4<'_, f32> {
        self.0.view()
    }

    /// The numbers.
    pub fn into_inner(self) -> Array4<f32> {
        self.0
    }

    /// Refuses a state of other sizes.
    pub(crate) fn check(&self, shape: (usize, usize, usize, usize)) -> Result<()> {
        if self.0.dim() == shape {
            return Ok(());
        }
        let (sequences, heads, dim, cols) = shape;
        let expected =
            format!("[sequences, heads, state_dim, columns] = [{sequences}, {heads}, {dim}, {cols}]");
        Err(Error::shape("state", expected, self.0.shape()))
    }

    /// The numbers, one after the other.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // Always of standard layout.
        self.0.as_slice_mut().unwrap_or_default()
    }

    /// The numbers, in the order of the axes.
    pub(crate) fn view_mut(&mut self) -> ArrayViewMut4<'_, f32> {
        self.0.view_mut()
    }

    pub(crate) fn from_f64(state: &Array4<f64>) -> Self {
        Self(state.mapv(|x| x as f32))
    }
}

/// States `[slots, heads, state_dim, columns]` that the caller lends, one after the
/// other: sequence `s` of a call has slot `slots[s]`, and the other slots stay as
/// they are. Sizes are those of [`State`], and zeros are the state before the first
/// token.
#[derive(Debug)]
pub struct StatePool<'a> {
    states: ArrayViewMut4<'a, f32>,
    slots: &'a [usize],
}

impl<'a> StatePool<'a> {
    /// Of these states, which no two sequences may share.
    pub fn new(states: ArrayViewMut4<'a, f32>, slots: &'a [usize]) -> Self {
        Self { states, slots }
    }

    /// Refuses a pool that has no slots of its own for the sequences of a call.
    pub(crate) fn check(&self, shape: (usize, usize, usize, usize)) -> Result<()> {
        let (sequences, heads, rows, cols) = shape;
        let (count, own) = (self.states.dim().0, self.states.dim());
        if (own.1, own.2, own.3) != (heads, rows, cols) {
            let expected = format!("[slots, heads, state_dim, columns] = [slots, {heads}, {rows}, {cols}]");
            return Err(Error::shape("pool", expected, self.states.shape()));
        }
        if !self.states.is_standard_layout() {
            let strides = self.states.strides();
            return Err(Error::value(
                "pool",
                "states that lie one after the other",
                format_args!("strides {strides:?}"),
            ));
        }
        if self.slots.len() != sequences {
            let expected = format!("one slot for each of the {sequences} sequences");
            return Err(Error::value("slots", expected, format_args!("{} slots", self.slots.len())));
        }
        let mut taken = filled("slots", count, false)?;
        for (sequence, &slot) in self.slots.iter().enumerate() {
            match taken.get_mut(slot) {
                Some(taken) if !*taken => *taken = true,
                _ => {
                    let expected = format!("different slots below {count}");
                    return Err(Error::value(
                        "slots",
                        expected,
                        format_args!("{slot} for sequence {sequence}"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// All states, and which slots are asked for.
    pub(crate) fn into_parts(self) -> (ArrayViewMut4<'a, f32>, &'a [usize]) {
        (self.states, self.slots)
    }
}
