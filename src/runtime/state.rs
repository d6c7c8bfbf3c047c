//! Copies of sessions, in memory and in files.
//!
//! A state holds the tokens of a session with their keys and values, so that a prompt need not be
//! computed again. It begins with [`MAGIC`] and [`VERSION`]; all numbers have the machine's own byte
//! order. A checksum (CRC-32) of everything before it stands at the end. It is not a signature: a
//! state from a stranger can make a session compute anything, but nothing else.

use std::path::Path;

use crate::error::{Error, Result};
use crate::io::{atomic, read_capped};

use super::cache::{CacheFormat, Extent, Piece};
use super::model::{Model, Weights};
use super::session::Session;

/// First bytes of a state.
const MAGIC: &[u8; 8] = b"ELORASES";
/// Version that is written, and the only one that is read.
const VERSION: u32 = 1;
/// Number of bytes before the tokens: the magic, four numbers of 4 bytes, and five of 8.
const HEADER: usize = 8 + 4 * 4 + 8 * 5;
/// Number of bytes of a weight's parts that identify it.
const SAMPLE: usize = 256;

impl Weights {
    /// Returns a number that differs between models: a checksum of the config, the norms, and the
    /// first bytes of each weight with its name and format.
    pub(super) fn fingerprint(&self) -> u64 {
        let (mut hash, mut total) = (crc32fast::Hasher::new(), 0u32);
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            total = total.wrapping_add(bytes.len() as u32);
        };
        put(serde_json::to_string(self.config.raw())
            .unwrap_or_default()
            .as_bytes());
        put(bytemuck::cast_slice(&self.final_norm));
        for norm in self.norms.iter().flat_map(|norms| norms.values()) {
            put(bytemuck::cast_slice(norm));
        }
        for weight in self.all() {
            put(weight.name().as_bytes());
            put(format!("{:?}", weight.unchecked().format()).as_bytes());
            for part in weight.unchecked().parts() {
                put(&part.bytes[..part.bytes.len().min(SAMPLE)]);
            }
        }
        u64::from(hash.finalize()) << 32 | u64::from(total)
    }
}

/// Reads numbers and bytes from a state.
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(n) else {
            return Err(bad(format!("cut off: {n} bytes of {}", self.rest.len())));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.rest.split_first_chunk::<N>() {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(*taken)
            }
            None => Err(bad(format!("cut off: {N} bytes of {}", self.rest.len()))),
        }
    }

    fn u32(&mut self) -> Result<u32> {
        self.number().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.number().map(u64::from_ne_bytes)
    }
}

fn bad(reason: impl Into<String>) -> Error {
    Error::invalid_file("state of a session", reason)
}

fn format_number(format: CacheFormat) -> u32 {
    match format {
        CacheFormat::F32 => 0,
        CacheFormat::F16 => 1,
    }
}

impl Session {
    /// Returns a copy of the session, which goes on by itself. The memory of keys and values is
    /// shared until one of the two writes to it, so copies of a session with a long prompt cost
    /// little.
    pub fn copy(&self) -> Self {
        self.with_cache(self.cache.clone())
    }

    /// Number of bytes of the session's state.
    pub fn state_bytes(&self) -> usize {
        let (bytes, layers) = self.cache.exported();
        HEADER + 4 * self.position() + 16 * layers + bytes + 4
    }

    /// Passes the parts of the state to `put`, without the checksum.
    fn write_state(&self, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (extent, [model, setting]) = (self.cache.extent(), self.identity());
        put(MAGIC)?;
        for number in [VERSION, 0, format_number(self.cache_format), 0] {
            put(&number.to_ne_bytes())?;
        }
        for number in [model, setting, self.position() as u64] {
            put(&number.to_ne_bytes())?;
        }
        // The tokens are those of the sequence, the rest is what the cache has of them.
        for number in [
            extent.n_tokens,
            extent.written << 32 | extent.len & 0xffff_ffff,
        ] {
            put(&number.to_ne_bytes())?;
        }
        put(bytemuck::cast_slice(self.tokens()))?;
        self.cache.export(&mut |piece| match piece {
            Piece::Layer(tiles) => {
                put(&(tiles.start as u64).to_ne_bytes())?;
                put(&(tiles.len() as u64).to_ne_bytes())
            }
            Piece::Tile(bytes) => put(bytes),
        })
    }

    /// Returns the session's state: its tokens, with their keys and values.
    ///
    /// # Errors
    /// Returns [`Error::OutOfMemory`] if memory runs out.
    pub fn state(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let size = self.state_bytes();
        let fail = |_| Error::OutOfMemory {
            what: "the state of a session",
            bytes: size,
        };
        bytes.try_reserve_exact(size).map_err(fail)?;
        self.write_state(&mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_ne_bytes());
        Ok(bytes)
    }

    /// Writes the session's state to a file, atomically.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if the file exists and `overwrite` is false, and
    /// [`Error::Io`] if writing fails.
    pub fn save(&self, path: impl AsRef<Path>, overwrite: bool) -> Result<()> {
        let path = path.as_ref();
        if !overwrite && path.exists() {
            let reason = "there is a file of that name already";
            return Err(Error::invalid_file(path, reason));
        }
        atomic::write_file(path, |sink| {
            let mut hash = crc32fast::Hasher::new();
            self.write_state(&mut |part| {
                hash.update(part);
                sink.put(part)
            })?;
            sink.put(&hash.finalize().to_ne_bytes())
        })
    }

    /// Replaces the session's tokens by those of a file that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// Returns the errors of [`restore`](Self::restore), and [`Error::Io`].
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let named = |error| match error {
            Error::InvalidFile { reason, .. } => Error::invalid_file(path, reason),
            error => error,
        };
        // No valid state of this session is larger.
        let most = self.most_state_bytes();
        let bytes = read_capped(path, most)?;
        self.restore(&bytes).map_err(named)
    }

    /// Replaces the session's tokens by those of a state, with their keys and values.
    ///
    /// The session must be on the same model, with the same subnet, adapters, precision of
    /// activations and format of the cache. If layers have sliding windows, `n_ctx` and
    /// `prefill_rows` must be the same, too.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if the state is damaged, [`Error::InvalidState`] if it is of
    /// another model or setting, [`Error::SequenceTooLong`] if the session has no room for its
    /// tokens, and [`Error::OutOfMemory`]. The session then holds the same tokens as before, but
    /// may compute them again in the next call.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        let Some((content, checksum)) = bytes.split_last_chunk::<4>() else {
            return Err(bad(format!("{} bytes, too short", bytes.len())));
        };
        let mut state = Cursor { rest: content };
        if state.bytes(MAGIC.len())? != MAGIC {
            return Err(bad("it does not begin as a state does"));
        }
        match state.u32()? {
            VERSION => {}
            other => return Err(bad(format!("version {other}; {VERSION} is read"))),
        }
        if crc32fast::hash(content) != u32::from_ne_bytes(*checksum) {
            return Err(bad("its contents are not those that were written"));
        }
        let (_, format, _) = (state.u32()?, state.u32()?, state.u32()?);
        let [model, setting] = self.identity();
        let differs = [
            (state.u64()? == model, "another model"),
            (
                state.u64()? == setting,
                "another subnet, other adapters or another precision of activations",
            ),
            (
                format == format_number(self.cache_format),
                "another format of the cache",
            ),
        ];
        if let Some((_, what)) = differs.iter().find(|(same, _)| !same) {
            return Err(Error::InvalidState {
                what: "restoring a session",
                reason: format!("the state is of {what}"),
            });
        }
        let n_tokens = usize::try_from(state.u64()?).unwrap_or(usize::MAX);
        if n_tokens > self.n_ctx() {
            return Err(Error::SequenceTooLong {
                what: "session".into(),
                found: n_tokens,
                max: self.n_ctx(),
            });
        }
        let (cached, packed) = (state.u64()?, state.u64()?);
        let extent = Extent {
            n_tokens: cached,
            written: packed >> 32,
            len: packed & 0xffff_ffff,
        };
        let most = self.n_ctx() as u64;
        if cached > n_tokens as u64 || cached > extent.written || extent.written > most {
            return Err(bad(format!("{extent:?} of {n_tokens} tokens")));
        }
        let tokens = state.bytes(4 * n_tokens)?.chunks_exact(4);
        let tokens: Vec<u32> = tokens.map(bytemuck::pod_read_unaligned).collect();
        let vocab_size = self.model().config().vocab_size();
        if let Some(found) = tokens.iter().find(|id| **id as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange {
                found: *found,
                vocab_size,
            });
        }
        let imported = self.cache.import(&extent, &mut |tiles, size| {
            let found = (state.u64()?, state.u64()?);
            if found != (tiles.start as u64, tiles.len() as u64) {
                return Err(Error::InvalidState {
                    what: "restoring a session",
                    reason: format!(
                        "a layer keeps the tiles {tiles:?}, and the state has {} from {} on: n_ctx \
                         or prefill_rows differ",
                        found.1, found.0
                    ),
                });
            }
            state.bytes(tiles.len().saturating_mul(size))
        });
        let surplus = state.rest.len();
        if imported.is_ok() && surplus > 0 {
            self.cache.truncate(0);
            return Err(bad(format!("{surplus} bytes too long")));
        }
        imported?;
        self.set_tokens(tokens);
        Ok(())
    }

    /// Largest number of bytes of a state that this session can take.
    fn most_state_bytes(&self) -> u64 {
        let of_token = self.cache.bytes_of_token() as u64;
        // The last slab of a layer is whole.
        let tokens = self.n_ctx() as u64 + 1024;
        (HEADER as u64 + 4096 * 16).saturating_add(tokens.saturating_mul(of_token + 4))
    }

    /// Returns what a state must have in common with the session: the model, and the setting.
    fn identity(&self) -> [u64; 2] {
        let (mut hash, mut total) = (crc32fast::Hasher::new(), 0u32);
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            total = total.wrapping_add(bytes.len() as u32);
        };
        let setting = format!("{:?} {:?}", self.shape(), self.activations());
        put(setting.as_bytes());
        for (adapter, scale) in self.adapters() {
            put(&scale.to_bits().to_le_bytes());
            adapter.identify(&mut put);
        }
        let setting = u64::from(hash.finalize()) << 32 | u64::from(total);
        [self.model().fingerprint(), setting]
    }
}

impl Model {
    /// Returns a number that differs between models; see [`Session::restore`].
    fn fingerprint(&self) -> u64 {
        *self
            .weights
            .fingerprint
            .get_or_init(|| self.weights.fingerprint())
    }
}
