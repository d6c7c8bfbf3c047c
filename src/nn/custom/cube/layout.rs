//! A stored weight in words of 32 bits, as every GPU has them.

use crate::format::{StoredMatrix, WeightFormat};

/// What the elements of a weight are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Elements {
    /// Codes of so many bits.
    Codes(u8),
    F16,
    Bf16,
}

impl Elements {
    pub fn bits(self) -> usize {
        match self {
            Self::Codes(bits) => bits as usize,
            Self::F16 | Self::Bf16 => 16,
        }
    }

    pub fn is_code(self) -> bool {
        matches!(self, Self::Codes(_))
    }
}

/// A weight's arrays. None is empty, since not every GPU has empty buffers.
pub(super) struct Layout {
    pub elements: Elements,
    pub sparse: bool,
    /// The elements, without gaps but those that the format has. Of a weight that is not sparse, each row begins at a multiple of
    /// 32 elements.
    pub words: Vec<u32>,
    /// Where a weight is sparse: a bit for each, rows of whole words.
    pub mask: Vec<u32>,
    /// The index of the first element of each word of the mask.
    pub starts: Vec<u32>,
    /// By row and group, as the zero points.
    pub scales: Vec<f32>,
    pub zeros: Vec<f32>,
    pub n_groups: usize,
    /// The group of each column.
    pub groups: Vec<u32>,
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    };
    // One more, so that an element that ends with the last word may look at the next.
    bytes.chunks(4).map(word).chain([0]).collect()
}

impl Layout {
    /// None for a dense weight of numbers, which is a tensor like any other, and for one with more elements than 32 bits count.
    pub fn new(weight: &StoredMatrix) -> Option<Self> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let (elements, sparse) = match weight.format() {
            WeightFormat::Int { bits, .. } => (Elements::Codes(bits), false),
            WeightFormat::SparseInt4 { .. } => (Elements::Codes(4), true),
            WeightFormat::SparseF16 | WeightFormat::NmF16 { .. } => (Elements::F16, true),
            WeightFormat::SparseBf16 | WeightFormat::NmBf16 { .. } => (Elements::Bf16, true),
            _ => return None,
        };
        if u32::try_from(rows * cols.next_multiple_of(64)).is_err() {
            return None;
        }
        let parts = weight.parts();
        let part = |name: &str| parts.iter().find(|part| part.name == name).map_or(&[][..], |part| part.bytes);
        let stored = part(if elements.is_code() { "codes" } else { "values" });
        let mut layout = Self {
            elements,
            sparse,
            words: Vec::new(),
            mask: vec![0],
            starts: vec![0],
            scales: vec![0.0],
            zeros: vec![0.0],
            n_groups: 1,
            groups: vec![0],
        };
        if sparse {
            layout.words = words(stored);
            layout.mask = part("mask").as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
            // Rows are of whole words of 64 bits there, and of 32 here.
            let (wide, narrow) = (cols.div_ceil(64) * 2, cols.div_ceil(32));
            layout.starts = starts(&layout.mask, elements);
            for values in [&mut layout.mask, &mut layout.starts] {
                *values = values.chunks(wide).flat_map(|row| row[..narrow].to_vec()).collect();
            }
        } else {
            let (row_bytes, row_words) = (stored.len() / rows.max(1), cols.div_ceil(32) * elements.bits());
            for row in stored.chunks(row_bytes.max(1)) {
                let start = layout.words.len();
                layout.words.extend(words(row));
                layout.words.resize(start + row_words, 0);
            }
            layout.words.push(0);
        }
        if let Some((grid, n_groups)) = weight.grid() {
            let (scales, zeros) = grid.values();
            layout.n_groups = n_groups;
            layout.scales = scales;
            layout.zeros = zeros.into_iter().map(f32::from).collect();
            layout.groups = (0..cols).map(|column| grid.group_of(column) as u32).collect();
        }
        Some(layout)
    }
}

/// Elements before each word of a mask. The codes of each two words begin at a whole byte.
fn starts(mask: &[u32], elements: Elements) -> Vec<u32> {
    let mut at = 0;
    let mut starts = Vec::with_capacity(mask.len());
    for pair in mask.chunks(2) {
        for word in pair {
            starts.push(at);
            at += word.count_ones();
        }
        if elements.is_code() {
            at = at.next_multiple_of(2);
        }
    }
    starts
}
