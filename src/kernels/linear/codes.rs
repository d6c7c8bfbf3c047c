//! Interface for unpacking stored integer codes.

use super::input::Order;

/// The codes of a weight. They are unpacked in registers, step by step along the columns of a row.
pub(in crate::kernels) trait Codes: Copy {
    /// A row, with the current read position.
    type Row;
    /// The codes of a step, or a pointer to them.
    type Step: Copy;

    /// The order of inputs that matches the order of codes in a step.
    const ORDER: Order;
    /// Maximum number of bits of a code.
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code))] // NEON chooses its products by it
    const BITS: u8;

    /// Returns a row, positioned at its first step. `zeros` are its zero points by unit, in the
    /// form that the instruction set uses.
    ///
    /// # Panics
    /// Panics if the row is out of range.
    fn row(&self, row: usize, zeros: *const u8) -> Self::Row;

    /// Returns whether a step reads the second of two streams. Only implementations with two
    /// streams override it.
    fn is_high(&self, _index: usize) -> bool {
        false
    }

    /// Reads the next step, whose number is `index`. `SMALL` is set if a step has more than one
    /// unit. `HIGH` is the result of [`is_high`](Self::is_high) for the step, for implementations
    /// that override it.
    ///
    /// # Safety
    /// The caller must have the features of the instruction set, since this is inlined into it. The
    /// step must have inputs, and the zero points of the row must exist.
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut Self::Row,
        index: usize,
    ) -> Self::Step;
}
