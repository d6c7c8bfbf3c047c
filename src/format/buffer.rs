//! Shared bytes, in owned memory or in a part of a mapped file.

use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

use crate::error::{Error, Result};

/// Size in bytes from which memory is mapped anonymously by the operating system, with huge pages
/// if available.
const MAPPED: usize = 1 << 18;

/// Size in bytes from which memory of a mapped file is given back.
#[cfg(unix)]
const RELEASED: usize = 1 << 20;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _bytes: [u8; 64],
}

/// Writable bytes that start at a cache line.
pub(crate) struct Aligned(Memory);

enum Memory {
    Lines(Vec<Line>, usize),
    Pages(MmapMut),
}

impl Aligned {
    /// Allocates `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        if len >= MAPPED
            && let Ok(pages) = MmapMut::map_anon(len)
        {
            // This is only a hint; failure has no effect.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Self(Memory::Pages(pages));
        }
        Self(Memory::Lines(
            vec![Line { _bytes: [0; 64] }; len.div_ceil(64)],
            len,
        ))
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Lines(lines, len) => {
                // SAFETY: `Line` is 64 bytes without padding, and the slice covers exactly the
                // elements of `lines`, which is borrowed mutably.
                let all = unsafe {
                    std::slice::from_raw_parts_mut(
                        lines.as_mut_ptr().cast::<u8>(),
                        64 * lines.len(),
                    )
                };
                &mut all[..*len]
            }
            Memory::Pages(pages) => pages,
        }
    }
}

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Memory::Lines(lines, len) => &lines.as_flattened_bytes()[..*len],
            Memory::Pages(pages) => pages,
        }
    }
}

trait AsFlattenedBytes {
    fn as_flattened_bytes(&self) -> &[u8];
}

impl AsFlattenedBytes for [Line] {
    fn as_flattened_bytes(&self) -> &[u8] {
        // SAFETY: `Line` is 64 bytes without padding, and the slice covers exactly the elements of
        // `self`.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast::<u8>(), 64 * self.len()) }
    }
}

/// What holds the bytes of buffers, until the last of them is dropped.
#[derive(Clone)]
#[doc(hidden)]
pub enum Owner {
    /// A file that is mapped for reading.
    Map(Arc<Mmap>),
    /// Other memory.
    Memory(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl Owner {
    /// Gives the memory of a range back to the system, which reads the file again if the range is
    /// used again. Does nothing for memory that is no file.
    ///
    /// Work that goes through a large file once calls this, so that its memory does not grow by the
    /// size of the file.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Self::Map(map) = self
            && range.len() >= RELEASED
            && range.end <= map.len()
        {
            // SAFETY: the map is read-only, so that its pages hold nothing that the file does not
            // hold. This is only a hint; failure has no effect.
            let _ = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Memory(memory) => (**memory).as_ref(),
        }
    }
}

impl From<Arc<dyn AsRef<[u8]> + Send + Sync>> for Owner {
    fn from(memory: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        Self::Memory(memory)
    }
}

impl<T: AsRef<[u8]> + Send + Sync + 'static> From<Arc<T>> for Owner {
    fn from(memory: Arc<T>) -> Self {
        Self::Memory(memory)
    }
}

/// Immutable bytes shared by all clones: a range of the bytes of an owner, which lives as long as
/// the last clone.
#[derive(Clone)]
#[doc(hidden)]
pub struct Buffer {
    owner: Owner,
    range: Range<usize>,
}

impl Buffer {
    /// Creates a buffer from a range of an owner's bytes, such as those of a memory map, without
    /// copying.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the range is outside the owner's bytes.
    pub fn new(owner: impl Into<Owner>, range: Range<usize>) -> Result<Self> {
        let owner = owner.into();
        let len = owner.as_ref().len();
        if range.start > range.end || range.end > len {
            return Err(Error::argument(
                "range",
                format!("{range:?}"),
                format!("a range of {len} bytes"),
            ));
        }
        Ok(Self { owner, range })
    }

    /// Gives the memory back to the system, if it is that of a mapped file; see
    /// [`Owner::release`].
    pub(crate) fn release(&self) {
        self.owner.release(self.range.clone());
    }

    /// Copies the bytes into memory that starts at a cache line.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let mut aligned = Aligned::zeroed(bytes.len());
        aligned.bytes_mut().copy_from_slice(&bytes);
        aligned.into()
    }

    /// Returns a part of the buffer, without copying.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the range is outside the buffer.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.len() {
            return Err(Error::argument(
                "range",
                format!("{range:?}"),
                format!("a range of {} bytes", self.len()),
            ));
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        Ok(Self {
            owner: self.owner.clone(),
            range,
        })
    }
}

impl From<Aligned> for Buffer {
    fn from(bytes: Aligned) -> Self {
        let range = 0..bytes.as_ref().len();
        Self {
            owner: Arc::new(bytes).into(),
            range,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_ref()[self.range.clone()]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.range.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_and_parts_are_parts() {
        for len in [0, 1, 63, 64, 1000, MAPPED + 17] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let buffer = Buffer::from_vec(bytes.clone());
            assert_eq!(*buffer, *bytes);
            assert_eq!(buffer.as_ptr() as usize % 64, 0);
            assert_eq!(buffer.clone().as_ptr(), buffer.as_ptr());
            let part = buffer.slice(len / 3..len / 2).unwrap();
            assert_eq!(*part, bytes[len / 3..len / 2]);
            assert!(part.slice(0..part.len() + 1).is_err());
        }
        let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(vec![1_u8, 2, 3]);
        assert_eq!(*Buffer::new(owner.clone(), 1..3).unwrap(), [2, 3]);
        assert!(Buffer::new(owner.clone(), 2..4).is_err());
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = Buffer::new(owner, 2..1);
        assert!(reversed.is_err());
    }
}
