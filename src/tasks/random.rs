//! Python's random numbers, so that examples are drawn as lm-evaluation-harness draws them.

use std::collections::HashSet;

/// Number of words of the state.
const N: usize = 624;
/// Distance of the words that are mixed.
const M: usize = 397;

/// The Mersenne Twister MT19937 (M. Matsumoto and T. Nishimura, 1998), seeded and drawn from as
/// CPython's `random.Random` does.
#[derive(Clone)]
pub(super) struct PythonRandom {
    words: [u32; N],
    next: usize,
}

impl PythonRandom {
    /// Seeds the generator like `random.Random(seed)`.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key = [low, high];
        let key = if high == 0 { &key[..1] } else { &key[..] };
        let mut words = [0u32; N];
        words[0] = 19_650_218;
        for i in 1..N {
            words[i] = mixed(words[i - 1], 1_812_433_253).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        let step = |words: &mut [u32; N], i: &mut usize| {
            *i += 1;
            if *i == N {
                words[0] = words[N - 1];
                *i = 1;
            }
        };
        for _ in 0..N.max(key.len()) {
            let add = key[j].wrapping_add(j as u32);
            words[i] = (words[i] ^ mixed(words[i - 1], 1_664_525)).wrapping_add(add);
            step(&mut words, &mut i);
            j = (j + 1) % key.len();
        }
        for _ in 1..N {
            words[i] = (words[i] ^ mixed(words[i - 1], 1_566_083_941)).wrapping_sub(i as u32);
            step(&mut words, &mut i);
        }
        words[0] = 1 << 31;
        Self { words, next: N }
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let both = (self.words[i] & (1 << 31)) | (self.words[(i + 1) % N] & !(1 << 31));
                let odd = if both & 1 == 1 { 0x9908_b0df } else { 0 };
                self.words[i] = self.words[(i + M) % N] ^ (both >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut word = self.words[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Draws a number below `n`, which is at least 1 and below 2^32, like `_randbelow`.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.word() >> (32 - bits.clamp(1, 32))) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// Draws `k` different numbers below `n`, like `Random.sample(range(n), k)`. `k` is at most
    /// `n`, and `n` is below 2^32.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        if n <= pool_size(k) {
            let mut pool: Vec<usize> = (0..n).collect();
            let draw = |i| {
                let drawn = self.below(n - i);
                let value = pool[drawn];
                pool[drawn] = pool[n - i - 1];
                value
            };
            return (0..k).map(draw).collect();
        }
        let mut seen = HashSet::with_capacity(k);
        let mut out = Vec::with_capacity(k);
        while out.len() < k {
            let drawn = self.below(n);
            if seen.insert(drawn) {
                out.push(drawn);
            }
        }
        out
    }
}

fn mixed(word: u32, factor: u32) -> u32 {
    (word ^ (word >> 30)).wrapping_mul(factor)
}

/// Returns the largest population from which `k` are drawn by a list: 21, and for more than 5 the
/// smallest power of 4 that is at least 3 `k` besides.
fn pool_size(k: usize) -> usize {
    let mut table = 1;
    while k > 5 && table < k.saturating_mul(3) {
        table *= 4;
    }
    if k > 5 { 21 + table } else { 21 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython 3.11 draws.
    #[test]
    fn samples_are_pythons() {
        let mut random = PythonRandom::new(1234);
        let words: Vec<u32> = (0..3).map(|_| random.word()).collect();
        assert_eq!(words, [4_150_886_329, 3_342_196_574, 1_892_932_127]);
        for (n, k, expected) in [
            (7473, 5, &[957, 61, 742, 7462, 6610][..]),
            (7473, 5, &[4769, 286, 5501, 5677, 687]),
            (30, 8, &[3, 24, 11, 7, 0, 25, 28, 27]),
            (85, 5, &[82, 79, 61, 78, 59]),
        ] {
            assert_eq!(random.sample(n, k), expected);
        }
        let mut wide = PythonRandom::new((5 << 32) + 7);
        assert_eq!(wide.sample(100, 3), WIDE);
    }

    /// `random.Random((5 << 32) + 7).sample(range(100), 3)`.
    const WIDE: [usize; 3] = [9, 3, 21];
}
