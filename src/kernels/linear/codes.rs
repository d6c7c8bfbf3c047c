//! How integer codes come out of storage.

use super::input::Order;

/// The codes of a weight, unpacked in registers: the columns of a row step after step.
pub(in crate::kernels) trait Codes: Copy {
    /// A row, and how far it was read.
    type Row;
    /// The codes of a step, or where they are.
    type Step: Copy;

    /// The order of the inputs that the codes of a step have.
    const ORDER: Order;
    /// Bits of a code, at most.
    const BITS: u8;

    /// A row from its first step on. `zeros` are its zero points by units, as the instruction set keeps them.
    ///
    /// # Panics
    /// For a row that there is not.
    fn row(&self, row: usize, zeros: *const u8) -> Self::Row;

    /// Whether a step reads the second of two streams, for those who ask.
    fn is_high(&self, _index: usize) -> bool {
        false
    }

    /// The next step, number `index`. `SMALL` where it has more than one unit; `HIGH` is what [`is_high`](Self::is_high) says of
    /// it, where that is not always false.
    ///
    /// # Safety
    /// The caller has the features of the instruction set, into which this is inlined; the step has inputs, and the row's zero
    /// points are there.
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut Self::Row,
        index: usize,
    ) -> Self::Step;
}
