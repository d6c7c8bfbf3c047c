//! A stored weight as arrays of 32-bit words, which every GPU can read.

use half::f16;
use rayon::prelude::*;

use crate::format::{Body, Grid, Number, Sparse16, SparseInt4, StoredMatrix, bits};

/// Mask words of a sparse weight that share a start index, and their number of columns.
pub(super) const BLOCK_WORDS: usize = 8;
const BLOCK: usize = 32 * BLOCK_WORDS;

/// The type of a weight's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Elements {
    /// Codes with this number of bits.
    Codes(usize),
    F16,
    Bf16,
    F32,
}

impl Elements {
    pub fn bits(self) -> usize {
        match self {
            Self::Codes(bits) => bits,
            Self::F16 | Self::Bf16 => 16,
            Self::F32 => 32,
        }
    }

    /// Elements in a word. No element spans two words.
    pub fn per_word(self) -> usize {
        32 / self.bits()
    }

    /// Mask of one element at the low end of a word.
    pub fn mask(self) -> u32 {
        u32::MAX >> (32 - self.bits())
    }

    pub fn is_code(self) -> bool {
        matches!(self, Self::Codes(_))
    }
}

impl From<Number> for Elements {
    fn from(number: Number) -> Self {
        match number {
            Number::F32 => Self::F32,
            Number::F16 => Self::F16,
            Number::Bf16 => Self::Bf16,
        }
    }
}

/// The compile-time parameters of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    pub elements: Elements,
    pub sparse: bool,
    /// Columns in a group; `None` if the group of each column is stored.
    pub group_size: Option<usize>,
    /// Whether scales have 32 bits instead of 16.
    pub wide: bool,
}

impl Form {
    fn of_numbers(number: Number, sparse: bool) -> Self {
        Self {
            elements: number.into(),
            sparse,
            group_size: Some(1),
            wide: false,
        }
    }

    fn of_codes(grid: &Grid, sparse: bool) -> Self {
        let group_size = grid
            .group_of
            .is_none()
            .then_some(grid.group_size.min(grid.cols));
        Self {
            elements: Elements::Codes(grid.bits.into()),
            sparse,
            group_size,
            wide: grid.wide,
        }
    }

    /// Whether all codes of a word are in the same group.
    pub fn one_group(self) -> bool {
        let per_word = self.elements.per_word();
        self.elements.is_code()
            && self
                .group_size
                .is_some_and(|size| size.is_multiple_of(per_word))
    }
}

/// The arrays of a weight. None is empty, since not every GPU supports empty buffers.
pub(super) struct Layout {
    pub form: Form,
    /// The elements, [`Elements::per_word`] in each word, starting at the low end. In a dense
    /// weight, each row starts at a new word. In a sparse weight, only the stored elements are
    /// present, ordered by row and column; a row of codes starts at a new word, a row of floats at
    /// the next element. One more word follows at the end.
    pub words: Vec<u32>,
    /// The mask of a sparse weight: one bit per element, with rows padded to whole blocks.
    pub mask: Vec<u32>,
    /// The index of the first element of each block of the mask.
    pub starts: Vec<u32>,
    /// For each row and group, the scale as `f16` in the low half of a word and the zero point in
    /// the high half; two words if scales are wide.
    pub grid: Vec<u32>,
    pub n_groups: usize,
    /// The group of each column, if it is not `column / group_size`.
    pub groups: Vec<u32>,
}

/// Bytes as little-endian words; the last word is padded with zeros.
fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let (whole, rest) = bytes.as_chunks::<4>();
    let last = (!rest.is_empty()).then(|| {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        last
    });
    whole.iter().copied().chain(last).map(u32::from_le_bytes)
}

/// The rows of an array, each padded to `row_words` words.
fn rows(bytes: &[u8], n_rows: usize, row_words: usize) -> Vec<u32> {
    let mut out = Vec::with_capacity(n_rows * row_words + 1);
    let row_bytes = bytes.len() / n_rows.max(1);
    if row_bytes == 4 * row_words {
        out.extend(words(bytes));
    } else {
        for (index, row) in bytes.chunks(row_bytes.max(1)).enumerate() {
            out.extend(words(row));
            out.resize((index + 1) * row_words, 0);
        }
    }
    out
}

/// Packs codes into words, [`Elements::per_word`] each.
fn packed(codes: &[u8], elements: Elements) -> impl Iterator<Item = u32> + '_ {
    let word = move |codes: &[u8]| {
        codes
            .iter()
            .rev()
            .fold(0, |word, code| word << elements.bits() | u32::from(*code))
    };
    codes.chunks(elements.per_word()).map(word)
}

impl Layout {
    /// Returns `None` if the weight is empty, if its parts contradict each other, or if it has more
    /// elements than 32 bits can count.
    pub fn new(weight: &StoredMatrix) -> Option<Self> {
        let (n_rows, cols) = (weight.rows(), weight.cols());
        let size = n_rows.checked_mul(cols.next_multiple_of(BLOCK))?;
        if n_rows == 0 || cols == 0 || u32::try_from(size).is_err() || weight.check().is_err() {
            return None;
        }
        let mut layout = match weight.body() {
            Body::Dense(dense) => {
                let form = Form::of_numbers(dense.number, false);
                Self::dense(
                    form,
                    rows(
                        &dense.values,
                        n_rows,
                        cols.div_ceil(form.elements.per_word()),
                    ),
                )
            }
            Body::Int(packed_codes) => {
                let form = Form::of_codes(packed_codes.whole_grid(), false);
                let (elements, bits) = (form.elements, packed_codes.bits());
                let row_words = cols.div_ceil(elements.per_word());
                let words = if 32 % elements.bits() == 0 {
                    rows(packed_codes.codes(), n_rows, row_words)
                } else {
                    let mut codes = vec![0; cols];
                    let mut words = Vec::with_capacity(n_rows * row_words);
                    for row in 0..n_rows {
                        bits::unpack(packed_codes.row_codes(row), bits, &mut codes);
                        words.extend(packed(&codes, elements));
                    }
                    words
                };
                Self::dense(form, words)
            }
            Body::Sparse16(sparse) => Self::sparse_numbers(sparse),
            Body::SparseInt4(sparse) => Self::sparse_codes(sparse),
        };
        layout.words.push(0);
        match weight.body() {
            Body::Int(packed_codes) => layout.set_grid(packed_codes.whole_grid()),
            Body::SparseInt4(sparse) => layout.set_grid(&sparse.grid),
            Body::Dense(_) | Body::Sparse16(_) => {}
        }
        Some(layout)
    }

    fn dense(form: Form, words: Vec<u32>) -> Self {
        Self {
            form,
            words,
            mask: vec![0],
            starts: vec![0],
            grid: vec![0],
            n_groups: 1,
            groups: vec![0],
        }
    }

    fn sparse_numbers(sparse: &Sparse16) -> Self {
        let form = Form::of_numbers(sparse.number, true);
        Self::dense(form, words(&sparse.values).collect()).with_mask(
            sparse.bits.rows,
            sparse.bits.cols,
            &sparse.bits.bytes,
        )
    }

    fn sparse_codes(sparse: &SparseInt4) -> Self {
        let form = Form::of_codes(&sparse.grid, true);
        let cols = sparse.bits.cols;
        let row_words = |row: usize| {
            let mut codes = vec![0; cols];
            sparse.row_codes(row, &mut codes);
            let mut kept = Vec::with_capacity(cols);
            for (word, codes) in sparse.bits.row(row).zip(codes.chunks(64)) {
                kept.extend(
                    codes
                        .iter()
                        .enumerate()
                        .filter(|(index, _)| word >> index & 1 == 1)
                        .map(|(_, code)| *code),
                );
            }
            packed(&kept, form.elements).collect::<Vec<u32>>()
        };
        let words = (0..sparse.bits.rows)
            .into_par_iter()
            .map(row_words)
            .collect::<Vec<_>>()
            .concat();
        Self::dense(form, words).with_mask(sparse.bits.rows, cols, &sparse.bits.bytes)
    }

    fn with_mask(mut self, n_rows: usize, cols: usize, mask: &[u8]) -> Self {
        let row_words = cols.div_ceil(BLOCK) * BLOCK_WORDS;
        self.mask = rows(mask, n_rows, row_words);
        self.starts.clear();
        let mut at = 0_u32;
        for row in self.mask.chunks(row_words) {
            if self.form.elements.is_code() {
                at = at.next_multiple_of(self.form.elements.per_word() as u32);
            }
            for block in row.chunks(BLOCK_WORDS) {
                self.starts.push(at);
                at += block.iter().map(|word| word.count_ones()).sum::<u32>();
            }
        }
        self
    }

    fn set_grid(&mut self, grid: &Grid) {
        self.n_groups = grid.groups();
        self.grid.clear();
        for row in 0..grid.rows {
            for group in 0..self.n_groups {
                let (scale, zero) = grid.at(row, group);
                let zero = u32::from(zero);
                if grid.wide {
                    self.grid.extend([scale.to_bits(), zero]);
                } else {
                    self.grid
                        .push(u32::from(f16::from_f32(scale).to_bits()) | zero << 16);
                }
            }
        }
        if let Some(group_of) = &grid.group_of {
            self.groups = group_of.to_vec();
        }
    }
}
