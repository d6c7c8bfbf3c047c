//! Matrix products on slices, on one thread. Callers split the work into parts whose sizes do not
//! depend on the number of threads, so the results do not either.

use gemm_common::Parallelism;

/// A product of the library: sizes `m`, `n`, `k`; the output with its column and row strides and
/// whether it is added to; both operands with their column and row strides; factors of the output
/// and of the product; conjugation, which real numbers do not need; threads.
type Call<T> = unsafe fn(
    usize,
    usize,
    usize,
    *mut T,
    isize,
    isize,
    bool,
    *const T,
    isize,
    isize,
    *const T,
    isize,
    isize,
    T,
    T,
    bool,
    bool,
    bool,
    Parallelism,
);

/// A number type that products are computed in.
pub(crate) trait Number: Copy + Send + Sync + 'static {
    /// 1.
    const ONE: Self;

    /// Returns the library's product for this machine.
    fn call() -> Call<Self>;
}

impl Number for f32 {
    const ONE: Self = 1.0;

    fn call() -> Call<f32> {
        gemm_f32::gemm::f32::get_gemm_fn()
    }
}

impl Number for f64 {
    const ONE: Self = 1.0;

    fn call() -> Call<f64> {
        gemm_f64::gemm::f64::get_gemm_fn()
    }
}

/// A matrix in memory: its first element, and the distances from row to row and column to column.
#[derive(Clone, Copy)]
pub(crate) struct Strided<P> {
    pub first: P,
    pub row: isize,
    pub column: isize,
}

/// Computes `out = out * add + factor * a b` for `a` `[m, k]` and `b` `[k, n]`. The strides of `out`
/// must not be negative.
///
/// # Safety
/// All elements of the matrices must be in live memory, and nothing else may use those of `out`.
pub(crate) unsafe fn raw_product<T: Number>(
    [m, n, k]: [usize; 3],
    a: Strided<*const T>,
    b: Strided<*const T>,
    (out, add): (Strided<*mut T>, bool),
    factor: T,
    threads: Parallelism,
) {
    // The library prefers outputs whose columns are contiguous, so it is given the transposed
    // product for one whose rows are.
    let flip = |a: Strided<_>| Strided {
        row: a.column,
        column: a.row,
        ..a
    };
    let (m, n, a, b, out) = if out.column < out.row {
        let out = Strided {
            row: out.column,
            column: out.row,
            ..out
        };
        (n, m, flip(b), flip(a), out)
    } else {
        (m, n, a, b, out)
    };
    // SAFETY: the caller upholds this function's contract; a transposed product reaches the same
    // elements.
    unsafe {
        T::call()(
            m,
            n,
            k,
            out.first,
            out.column,
            out.row,
            add,
            a.first,
            a.column,
            a.row,
            b.first,
            b.column,
            b.row,
            T::ONE,
            factor,
            false,
            false,
            false,
            threads,
        );
    }
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
    let strided = |view: &View<'_, T>| Strided {
        first: view.values.as_ptr(),
        row: view.strides[0] as isize,
        column: view.strides[1] as isize,
    };
    let output = Strided {
        first: out.as_mut_ptr(),
        row: stride as isize,
        column: 1,
    };
    // SAFETY: the assertions above check that all elements reached by the sizes and strides are in
    // the slices; `out` is borrowed mutably, so it does not overlap `a` or `b`.
    unsafe {
        raw_product(
            [m, n, k],
            strided(&a),
            strided(&b),
            (output, true),
            factor,
            Parallelism::None,
        );
    }
}
