//! Locks that keep two processes from writing to one place.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file that is locked for as long as the value lives, and then removed. It holds the number of
/// the process.
///
/// The operating system releases the lock of a process that ends in any way, so that a file that a
/// killed process left behind is taken over.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Locks the file `path`, which is made if it does not exist. `what` names what is written
    /// under the lock in errors.
    ///
    /// # Errors
    /// Returns [`Error::Io`] of kind [`ResourceBusy`](io::ErrorKind::ResourceBusy), which names the
    /// process that holds the lock, and other errors of the operating system.
    pub fn acquire(path: impl Into<PathBuf>, what: &Path) -> Result<Self> {
        let path = path.into();
        let at = |e| Error::io(&path, e);
        loop {
            // A link or a pipe in the place of the file is no lock.
            if let Ok(meta) = fs::symlink_metadata(&path)
                && !meta.is_file()
            {
                return Err(Error::invalid_file(&path, "not a regular file"));
            }
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(at)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(busy(&mut file, what)),
                // There are file systems without locks.
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(e)) => return Err(at(e)),
            }
            // The one before may have removed the file between the two calls above.
            if !is_at(&file, &path) {
                continue;
            }
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
                .map_err(at)?;
            return Ok(Self { path, file });
        }
    }

    /// Checks that nobody holds the lock at `path`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] of kind [`ResourceBusy`](io::ErrorKind::ResourceBusy) if somebody does.
    pub fn check_free(path: &Path, what: &Path) -> Result<()> {
        if !path.is_file() {
            return Ok(());
        }
        // A file that cannot be opened is told by whoever locks it.
        let Ok(mut file) = OpenOptions::new().read(true).write(true).open(path) else {
            return Ok(());
        };
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(busy(&mut file, what)),
            _ => Ok(()),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while it is locked, so that it is nobody else's.
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The error for a lock that a process holds, which has written its number into the file.
fn busy(file: &mut File, what: &Path) -> Error {
    let mut text = String::new();
    let _ = file.take(20).read_to_string(&mut text);
    let process = match text.trim().parse::<u32>() {
        Ok(process) if process == std::process::id() => "this process".to_string(),
        Ok(process) => format!("process {process}"),
        // It has not written its number yet.
        Err(_) => "another process".to_string(),
    };
    let reason = format!("{process} is writing here; wait until it ends, or choose another name");
    Error::io(what, io::Error::new(io::ErrorKind::ResourceBusy, reason))
}

/// Returns whether the open file is the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Returns whether the open file is the one at `path`. An open file keeps its name here.
#[cfg(not(unix))]
fn is_at(_file: &File, path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_holds_a_lock_and_the_next_takes_it_over() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run.lock");
        let what = root.path().join("out");
        let lock = Lock::acquire(&path, &what).unwrap();
        for error in [
            Lock::acquire(&path, &what).map(drop).unwrap_err(),
            Lock::check_free(&path, &what).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("out: this process is writing here"), "{text}");
        }
        drop(lock);
        assert!(!path.exists());
        // A killed process leaves the file.
        fs::write(&path, "123").unwrap();
        Lock::check_free(&path, &what).unwrap();
        let lock = Lock::acquire(&path, &what).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!("{}\n", std::process::id())
        );
        drop(lock);
        fs::create_dir(&path).unwrap();
        assert!(Lock::acquire(&path, &what).is_err());
    }

    #[test]
    fn never_two_at_once() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.lock");
        let (inside, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..400 {
                        let Ok(lock) = Lock::acquire(&path, &path) else {
                            continue;
                        };
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        taken.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert!(taken.into_inner() > 0);
        assert!(!path.exists());
    }
}
