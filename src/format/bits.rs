//! Small integers as a stream of bits without gaps: code `i` starts at bit `i * bits` of
//! little-endian bytes.
//!
//! Eight codes take exactly `bits` bytes for every number of bits, so no width is a special case.
//! Read as little-endian 32-bit words, this is the packing of GPTQ (including its 3-bit codes that
//! cross word borders) and of compressed-tensors.

/// Number of bytes that `n` codes take.
pub(crate) fn packed_len(n: usize, bits: u8) -> usize {
    // Divide first, so that no product can overflow.
    n / 8 * usize::from(bits) + (n % 8 * usize::from(bits)).div_ceil(8)
}

/// Packs codes below `2^bits`. Bytes of `out` after the last code are set to 0.
pub(crate) fn pack(codes: &[u8], bits: u8, out: &mut [u8]) {
    let width = usize::from(bits);
    let used = packed_len(codes.len(), bits);
    out[used..].fill(0);
    for (codes, out) in codes.chunks(8).zip(out[..used].chunks_mut(width)) {
        let word = codes.iter().enumerate().fold(0_u64, |word, (i, code)| {
            word | u64::from(*code) << (i * width)
        });
        out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
    }
}

/// Unpacks `codes.len()` codes; the inverse of [`pack`]. `bytes` may be longer than needed.
pub(crate) fn unpack(bytes: &[u8], bits: u8, codes: &mut [u8]) {
    match bits {
        2 => unpack_width::<2>(bytes, codes),
        3 => unpack_width::<3>(bytes, codes),
        4 => unpack_width::<4>(bytes, codes),
        _ => codes.copy_from_slice(&bytes[..codes.len()]),
    }
}

fn unpack_width<const WIDTH: usize>(bytes: &[u8], codes: &mut [u8]) {
    let mask = u8::MAX >> (8 - WIDTH);
    let spread = |group: &[u8], codes: &mut [u8]| {
        let mut word = [0; 8];
        word[..group.len()].copy_from_slice(group);
        let word = u64::from_le_bytes(word);
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (word >> (i * WIDTH)) as u8 & mask;
        }
    };
    let (whole, rest) = codes.as_chunks_mut::<8>();
    for (codes, group) in whole.iter_mut().zip(bytes.as_chunks::<WIDTH>().0) {
        spread(group, codes);
    }
    if !rest.is_empty() {
        let start = whole.len() * WIDTH;
        spread(
            &bytes[start..start + packed_len(rest.len(), WIDTH as u8)],
            rest,
        );
    }
}

/// Returns the code at `index`.
pub(crate) fn get(bytes: &[u8], bits: u8, index: usize) -> u8 {
    let at = index * usize::from(bits);
    let next = bytes.get(at / 8 + 1).copied().unwrap_or(0);
    let pair = u16::from_le_bytes([bytes[at / 8], next]);
    (pair >> (at % 8)) as u8 & (u8::MAX >> (8 - bits))
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn codes_come_back_at_every_length() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for bits in [2, 3, 4, 8] {
            for n in 0..70 {
                let codes: Vec<u8> = (0..n).map(|_| rng.random::<u8>() >> (8 - bits)).collect();
                let len = packed_len(n, bits);
                assert_eq!(len, (n * usize::from(bits)).div_ceil(8));
                let mut bytes = vec![0xFF; len + 3];
                pack(&codes, bits, &mut bytes);
                assert_eq!(bytes[len..], [0; 3]);
                let mut back = vec![0xFF; n];
                unpack(&bytes[..len], bits, &mut back);
                assert_eq!(back, codes, "{bits} bits, {n} codes");
                let one_by_one: Vec<u8> = (0..n).map(|i| get(&bytes[..len], bits, i)).collect();
                assert_eq!(one_by_one, codes);
            }
        }
    }

    /// Packs as AutoGPTQ does. The first word holds ten codes and two bits of the eleventh; the
    /// second holds its last bit, ten more codes and one bit of the next; and so on.
    #[test]
    fn three_bits_cross_the_borders_of_words_as_gptq_has_it() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let codes: Vec<u8> = (0..32).map(|_| rng.random_range(0..8)).collect();
        let code = |i: usize| u32::from(codes[i]);
        let mut words = [0_u32; 3];
        for j in 0..10 {
            words[0] |= code(j) << (3 * j);
            words[1] |= code(11 + j) << (3 * j + 1);
            words[2] |= code(22 + j) << (3 * j + 2);
        }
        words[0] |= code(10) << 30;
        words[1] |= code(10) >> 2 | code(21) << 31;
        words[2] |= code(21) >> 1;
        let mut bytes = [0; 12];
        pack(&codes, 3, &mut bytes);
        assert_eq!(bytes, *words.map(u32::to_le_bytes).as_flattened());
    }
}
