//! A product that is never stored: it is computed in strips of rows, for some columns at a time,
//! and each strip is used while it is in the cache.

use std::ops::Range;

use super::operand::Operand;
use super::pack::Panels;
use super::packed::{BLOCK, Buffer, Engine, Left};
use super::tile::{COLUMNS, Place, ROWS, tile};

/// Number of rows of a strip.
const STRIP: usize = 8 * ROWS;
/// Maximum number of columns of a strip.
const WIDEST: usize = 4 * COLUMNS;
/// Minimum number of parts into which the columns are split, if there are enough columns.
const PARTS: usize = 8;

impl Left {
    /// Returns the number of columns of a strip of a product with `n` columns. It depends only on
    /// the sizes.
    pub fn strip_columns(&self, n: usize) -> usize {
        let most = (BLOCK / self.units.max(1))
            .min(n.div_ceil(PARTS))
            .clamp(COLUMNS, WIDEST);
        most.next_multiple_of(COLUMNS).min(WIDEST)
    }

    /// Computes the product with some columns of a right operand, strip by strip. `each` is called
    /// with the index of the first row of a strip and the strip itself, row-major, which it may
    /// modify. The strip is discarded afterwards.
    ///
    /// # Safety
    /// There must be one part, which must be packed. The right operand must have the same inner
    /// size and these columns, in live memory.
    pub unsafe fn strips(
        &self,
        right: Operand,
        columns: Range<usize>,
        mut each: impl FnMut(usize, &mut [f32]),
    ) {
        let Engine { level, kind, .. } = self.engine;
        let (units, width) = (self.units, columns.len());
        if self.m == 0 || width == 0 || units == 0 {
            return;
        }
        let panels = width.div_ceil(COLUMNS);
        let mut buffer = Buffer::right(panels * units * COLUMNS);
        let packed = buffer.units_mut().as_mut_ptr();
        let place = Panels {
            first: packed,
            stride: units * COLUMNS,
        };
        // SAFETY: the caller upholds this function's contract, and the buffer has room for these
        // panels.
        unsafe { right.pack::<COLUMNS>(level, kind, columns, 0..units, place) };
        let mut strip = vec![0.0_f32; STRIP.min(self.m) * width];
        for first in (0..self.m).step_by(STRIP) {
            let rows = STRIP.min(self.m - first);
            let out = strip.as_mut_ptr();
            for row in (0..rows).step_by(ROWS) {
                for panel in 0..panels {
                    let place = Place {
                        out: out.wrapping_add(row * width + panel * COLUMNS),
                        width,
                        rows: ROWS.min(rows - row),
                        columns: COLUMNS.min(width - panel * COLUMNS),
                        factor: 1.0,
                        add: false,
                    };
                    let (a, b) = (
                        self.panel(first + row, 0),
                        packed.wrapping_add(panel * units * COLUMNS),
                    );
                    // SAFETY: both panels are packed, and the place is within the strip.
                    unsafe { tile(level, kind, a, b, units, place) };
                }
            }
            each(first, &mut strip[..rows * width]);
        }
    }
}
