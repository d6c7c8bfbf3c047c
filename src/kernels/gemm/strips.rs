//! A product that nobody keeps: its rows come strip by strip, from some columns at a time, and are
//! used while in the cache.

use std::ops::Range;

use super::operand::Operand;
use super::pack::Panels;
use super::packed::{BLOCK, Buffer, Engine, Left};
use super::tile::{COLUMNS, Place, ROWS, tile};

/// Rows of a strip.
const STRIP: usize = 8 * ROWS;
/// Most columns of one.
const WIDEST: usize = 4 * COLUMNS;
/// Into how many parts the columns are split at least, as far as they go.
const PARTS: usize = 8;

impl Left {
    /// Columns of a strip of a product with `n` columns; follows from sizes alone.
    pub fn strip_columns(&self, n: usize) -> usize {
        let most = (BLOCK / self.units.max(1))
            .min(n.div_ceil(PARTS))
            .clamp(COLUMNS, WIDEST);
        most.next_multiple_of(COLUMNS).min(WIDEST)
    }

    /// The product with some columns of a right operand. Each strip, row-major, is given to `each`
    /// with the number of its first row, to be changed as that likes, and is then forgotten.
    ///
    /// # Safety
    /// There is one part, which is packed; the right operand has its inner size and these columns,
    /// in living memory.
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
        // SAFETY: the caller's promise, and the buffer has room for these panels.
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
