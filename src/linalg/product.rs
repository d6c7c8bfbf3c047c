//! Matrix products on slices, on one thread: callers split the work into parts whose sizes do not depend on how many threads
//! there are, so that results do not either.

/// A matrix of any strides in a slice.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    size: [usize; 2],
    strides: [usize; 2],
}

impl<'a> View<'a> {
    /// Row-major, with `stride` elements from row to row.
    pub fn rows(values: &'a [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        Self {
            values,
            size: [rows, cols],
            strides: [stride, 1],
        }
    }

    pub fn transposed(self) -> Self {
        let ([rows, cols], [row, col]) = (self.size, self.strides);
        Self {
            size: [cols, rows],
            strides: [col, row],
            ..self
        }
    }

    /// Elements that the slice must have.
    fn reach(&self) -> usize {
        let last = |axis: usize| (self.size[axis] - 1) * self.strides[axis];
        if self.size.contains(&0) {
            0
        } else {
            last(0) + last(1) + 1
        }
    }
}

/// `out += factor * a b`, for `a` `[m, k]`, `b` `[k, n]` and `out` row-major `[m, n]` with `stride` elements from row to row.
///
/// # Panics
/// Where the sizes do not fit together or into the slices.
pub(crate) fn add_product(out: &mut [f32], stride: usize, factor: f32, a: View<'_>, b: View<'_>) {
    let ([m, k], [inner, n]) = (a.size, b.size);
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(
        k == inner && n <= stride,
        "a product of {m} x {k} and {inner} x {n} in rows of {stride}"
    );
    assert!(
        (m - 1) * stride + n <= out.len()
            && a.reach() <= a.values.len()
            && b.reach() <= b.values.len()
    );
    let [a_row, a_col] = a.strides.map(|stride| stride as isize);
    let [b_row, b_col] = b.strides.map(|stride| stride as isize);
    // SAFETY: all elements that the sizes and strides reach lie in the slices, as was asserted; `out` is borrowed mutably,
    // so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            true,
            a.values.as_ptr(),
            a_col,
            a_row,
            b.values.as_ptr(),
            b_col,
            b_row,
            1.0,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
