//! Checks that no kernel reads or writes out of bounds for any contents of a weight. All buffers in
//! these tests end where readable memory ends.

use std::io::Write;
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions};
use rand::seq::IndexedRandom;

use super::*;

/// A multiple of the page size of every machine.
const PAGES: usize = 1 << 16;

/// Bytes that are followed by mapped pages beyond the end of a file. Accessing these pages ends the
/// process with a signal.
struct AtTheEnd {
    map: MmapMut,
    first: usize,
    len: usize,
}

impl AtTheEnd {
    fn new(bytes: &[u8]) -> Self {
        let end = bytes.len().next_multiple_of(PAGES);
        let first = end - bytes.len();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0xA5; first]).unwrap();
        file.write_all(bytes).unwrap();
        // SAFETY: nothing else uses the file.
        let map = unsafe { MmapOptions::new().len(end + PAGES).map_copy(&file).unwrap() };
        Self {
            map,
            first,
            len: bytes.len(),
        }
    }

    fn of_numbers(numbers: &[f32]) -> Self {
        Self::new(bytemuck::cast_slice(numbers))
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.first..][..self.len]
    }

    fn numbers_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }
}

impl AsRef<[u8]> for AtTheEnd {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.first..][..self.len]
    }
}

/// Copies a weight into buffers that end where readable memory ends. If `lie` is set, the contents
/// of its parts are corrupted. Returns `None` if the copy is rejected.
fn moved(weight: &StoredMatrix, lie: bool, rng: &mut Rng) -> Option<StoredMatrix> {
    let lie = if lie { rng.random_range(1..6) } else { 0 };
    let find = |name: &str| {
        let part = weight.parts().into_iter().find(|part| part.name == name)?;
        let mut bytes = part.bytes.to_vec();
        match lie {
            1 => bytes.iter_mut().for_each(|byte| *byte = rng.random()),
            2 => bytes.fill(0xFF),
            3 if ["values", "codes"].contains(&name) => {
                bytes.truncate(rng.random_range(0..=bytes.len() / 2) * 2)
            }
            4 if ["mask", "offsets"].contains(&name) => bytes.fill(0xFF),
            5 if name == "mask" => bytes.fill(0xFF),
            _ => (),
        }
        let len = bytes.len();
        Buffer::new(Arc::new(AtTheEnd::new(&bytes)), 0..len).ok()
    };
    StoredMatrix::from_parts(&weight.header(), find).ok()
}

#[test]
fn nothing_beyond_the_end_is_touched() {
    let mut rng = Rng::seed_from_u64(5);
    let pool = Pool::new(2);
    for number in 0..16 * FORMATS {
        let cols = match number % 3 {
            0 => rng.random_range(1..700),
            1 => 128 * rng.random_range(1..6),
            _ => 64 * rng.random_range(1..12),
        };
        let mut case = Case::random(number % FORMATS, cols, &mut rng);
        let lie = rng.random_bool(0.6);
        let Some(weight) = moved(&case.weight, lie, &mut rng) else {
            continue;
        };
        case.weight = weight;
        // The last row is the most important one.
        if rng.random_bool(0.7) {
            case.outputs = case.weight.rows();
        }
        case.adapter = case.adapter.take().and_then(|(a, bt, rank, scale)| {
            Some((
                moved(&a, false, &mut rng)?,
                moved(&bt, false, &mut rng)?,
                rank,
                scale,
            ))
        });
        let layers = [case.linear()];
        let inputs = if rng.random() {
            cols
        } else {
            rng.random_range(1..=cols)
        };
        let rows = *[1, 2, 3, 5, 8, 9, 14].choose(&mut rng).unwrap();
        let stride = inputs + rng.random_range(0..3);
        let mut x = AtTheEnd::of_numbers(&super::inputs((rows - 1) * stride + inputs, &mut rng));
        let x = Rows {
            values: x.numbers_mut(),
            rows,
            stride,
        };
        let activations = *[Activations::Int16, Activations::Int8]
            .choose(&mut rng)
            .unwrap();
        for level in Level::available() {
            let mut y = AtTheEnd::of_numbers(&vec![0.0; rows * case.outputs]);
            let mut y = [RowsMut {
                values: y.numbers_mut(),
                rows,
                stride: case.outputs,
            }];
            // The scratch memory begins at a cache line, so that no bytes are left unused at its
            // end.
            let bytes =
                scratch_bytes(&pool, &layers, rows, inputs, activations).next_multiple_of(64);
            let mut memory = AtTheEnd::new(&vec![0xA5; bytes]);
            let mut scratch = Scratch::new(memory.bytes_mut());
            forward_on(
                level,
                &pool,
                &layers,
                x,
                inputs,
                &mut y,
                activations,
                &mut scratch,
            )
            .unwrap();
        }
    }
}
