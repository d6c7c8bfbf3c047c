//! Matrix products on slices, on one thread. Callers split the work into parts whose sizes do not
//! depend on the number of threads, so the results do not either.

/// A view of a slice as a matrix with arbitrary strides.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    size: [usize; 2],
    strides: [usize; 2],
}

impl<'a> View<'a> {
    /// Creates a row-major view, with `stride` elements from row to row.
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

    /// Number of elements that the slice must have.
    fn reach(&self) -> usize {
        let last = |axis: usize| (self.size[axis] - 1) * self.strides[axis];
        if self.size.contains(&0) {
            0
        } else {
            last(0) + last(1) + 1
        }
    }
}

/// Computes `out += factor * a b`, for `a` `[m, k]`, `b` `[k, n]` and row-major `out` `[m, n]` with
/// `stride` elements from row to row.
///
/// # Panics
/// Panics if the sizes do not match or exceed the slices.
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
    // SAFETY: the assertions above check that all elements reached by the sizes and strides are in
    // the slices; `out` is borrowed mutably, so it does not overlap `a` or `b`.
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
