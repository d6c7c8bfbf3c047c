//! Matrix products on slices, on one thread. Callers split the work into parts whose sizes do not
//! depend on the number of threads, so the results do not either.

/// A number type that products are computed in.
pub(crate) trait Number: Copy + Send + Sync + 'static {
    /// 1.
    const ONE: Self;
}

impl Number for f32 {
    const ONE: Self = 1.0;
}

impl Number for f64 {
    const ONE: Self = 1.0;
}

/// A view of a slice as a matrix with arbitrary strides.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T = f32> {
    values: &'a [T],
    size: [usize; 2],
    strides: [usize; 2],
}

impl<'a, T> View<'a, T> {
    /// Creates a row-major view, with `stride` elements from row to row.
    pub fn rows(values: &'a [T], [rows, cols]: [usize; 2], stride: usize) -> Self {
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

    /// Sizes, `[rows, cols]`.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// Some of the rows, from `start` on; fewer than `n` at the end.
    pub fn part(self, start: usize, n: usize) -> Self {
        let [rows, cols] = self.size;
        let start = start.min(rows);
        let values = &self.values[(start * self.strides[0]).min(self.values.len())..];
        Self {
            values,
            size: [n.min(rows - start), cols],
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
pub(crate) fn add_product<T: Number>(
    out: &mut [T],
    stride: usize,
    factor: T,
    a: View<'_, T>,
    b: View<'_, T>,
) {
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
            T::ONE,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
