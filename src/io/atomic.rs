//! Writes files and folders atomically: under a temporary name, then flush, sync and rename.
//!
//! One writer at a time writes to a name. It holds a lock, `.NAME.lock`, and removes what killed
//! ones have left.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use serde::Serialize;
use tempfile::{Builder, TempDir};

use crate::error::{Error, Result};

pub use crate::io::lock::Lock;

/// Destination of the bytes of a file while it is written. Errors name the file.
///
/// Large files are written by a thread of their own, so that whoever makes the bytes does not wait
/// for the disk.
#[derive(Debug)]
pub struct Sink<'a> {
    path: &'a Path,
    buffer: Vec<u8>,
    /// Number of full buffers so far.
    full: usize,
    file: State,
}

/// Size in bytes of a buffer.
const BUFFER: usize = 1 << 20;

/// Number of buffers after which a thread writes, and number of those that wait for it.
const AHEAD: usize = 8;

#[derive(Debug)]
enum State {
    Here(File),
    Behind {
        buffers: SyncSender<Vec<u8>>,
        /// Buffers to be used again.
        empty: Receiver<Vec<u8>>,
        thread: JoinHandle<io::Result<()>>,
    },
    Failed,
}

impl<'a> Sink<'a> {
    fn new(path: &'a Path, file: File) -> Self {
        Self {
            path,
            buffer: Vec::new(),
            full: 0,
            file: State::Here(file),
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the write fails, or an earlier one did.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).map_err(|e| Error::io(self.path, e))
    }

    /// Returns the final path of the file.
    pub fn path(&self) -> &Path {
        self.path
    }

    /// Writes the buffer, or hands it to the thread.
    fn pass_on(&mut self) -> io::Result<()> {
        self.full += 1;
        if let State::Here(file) = &mut self.file {
            file.write_all(&self.buffer)?;
            self.buffer.clear();
            if self.full >= AHEAD {
                self.start_thread()?;
            }
            return Ok(());
        }
        let State::Behind { buffers, empty, .. } = &self.file else {
            return Err(io::Error::other("an earlier write failed"));
        };
        let mut next = empty.try_recv().unwrap_or_default();
        next.clear();
        if buffers
            .send(std::mem::replace(&mut self.buffer, next))
            .is_ok()
        {
            return Ok(());
        }
        // The thread ends early only on an error.
        self.finish()
            .and_then(|()| Err(io::Error::other("the file cannot be written")))
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let State::Here(file) = &self.file else {
            return Ok(());
        };
        let mut file = file.try_clone()?;
        let (buffers, full) = sync_channel::<Vec<u8>>(AHEAD);
        let (give_back, empty) = sync_channel(AHEAD);
        let thread = std::thread::Builder::new().spawn(move || {
            for buffer in full {
                file.write_all(&buffer)?;
                // Nobody may want it any more.
                let _ = give_back.try_send(buffer);
            }
            Ok(())
        })?;
        self.file = State::Behind {
            buffers,
            empty,
            thread,
        };
        Ok(())
    }

    /// Waits for the thread.
    fn finish(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.file, State::Failed) {
            State::Behind {
                buffers, thread, ..
            } => {
                drop(buffers);
                let lost = |_| Err(io::Error::other("the thread that writes panicked"));
                thread.join().unwrap_or_else(lost)
            }
            State::Here(_) | State::Failed => Ok(()),
        }
    }

    /// Writes what is left.
    fn close(mut self) -> Result<()> {
        let result = self.pass_on().and_then(|()| self.finish());
        result.map_err(|e| Error::io(self.path, e))
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() >= BUFFER {
            self.pass_on()?;
        }
        let n = bytes.len().min(BUFFER - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    /// Does nothing: the file is complete when it has its name.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        // The file may be removed now, and nobody asks for the error.
        let _ = self.finish();
    }
}

/// Writes the file `path` atomically: `fill` writes into a temporary file in the same folder, which
/// is synced and then renamed to `path`.
///
/// # Errors
/// Returns [`Error::Io`], also if somebody else is writing the file, or any error of `fill`. The
/// temporary file is then removed, and an existing file at `path` is left unchanged.
pub fn write_file(
    path: impl AsRef<Path>,
    fill: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    write_file_or_refuse(path.as_ref(), true, fill)
}

/// Writes a file like [`write_file`], but replaces an existing one only if `overwrite` is true.
///
/// # Errors
/// Returns the errors of [`write_file`], and [`Error::InvalidFile`] if there is a file that may not
/// be replaced.
pub(crate) fn write_file_or_refuse(
    path: &Path,
    overwrite: bool,
    fill: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(Error::invalid_file(path, "not the name of a file"));
    };
    let folder = parent(path);
    let _lock = claim(folder, name, path)?;
    let refused = || Error::invalid_file(path, "there is a file of that name already");
    if !overwrite && fs::symlink_metadata(path).is_ok() {
        return Err(refused());
    }
    let mut builder = Builder::new();
    let prefix = temporary_prefix(name);
    builder.prefix(&prefix).suffix(TEMPORARY);
    readable(&mut builder, 0o666);
    let at = |e| Error::io(path, e);
    let file = builder.tempfile_in(folder).map_err(at)?;
    let mut sink = Sink::new(path, file.as_file().try_clone().map_err(at)?);
    fill(&mut sink)?;
    sink.close()?;
    file.as_file().sync_all().map_err(|e| Error::io(path, e))?;
    if overwrite {
        file.persist(path).map_err(|e| Error::io(path, e.error))?;
    } else {
        file.persist_noclobber(path)
            .map_err(|e| match e.error.kind() {
                io::ErrorKind::AlreadyExists => refused(),
                _ => Error::io(path, e.error),
            })?;
    }
    sync_folder(folder)
}

/// Writes `value` as indented JSON with a final newline; see [`write_file`].
///
/// # Errors
/// Returns [`Error::Io`], or [`Error::Json`] if JSON cannot represent the value.
pub fn write_json<T: Serialize + ?Sized>(path: impl AsRef<Path>, value: &T) -> Result<()> {
    let path = path.as_ref();
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::json(path, e))?;
    text.push(b'\n');
    write_file(path, |sink| sink.put(&text))
}

/// Builds a folder under a temporary name next to its destination and renames it into place as a
/// whole.
///
/// If it is dropped without [`commit`](Self::commit), the temporary folder is removed with all its
/// contents, unless it was begun by [`go_on`](Self::go_on).
#[derive(Debug)]
#[doc(hidden)]
pub struct FolderWriter {
    destination: PathBuf,
    overwrite: bool,
    place: Place,
    _lock: Lock,
}

/// Where a folder is built.
#[derive(Debug)]
enum Place {
    /// A folder that is removed if it is not finished.
    Temporary(TempDir),
    /// A folder within one that stays, to go on with it.
    Kept { within: PathBuf, folder: PathBuf },
}

/// End of the name of the folder in which [`FolderWriter::go_on`] keeps unfinished work.
const UNFINISHED: &str = ".unfinished";

impl FolderWriter {
    /// Begins the folder `destination`, and creates missing parent folders.
    ///
    /// An existing empty folder is replaced. A folder that is not empty is replaced only if
    /// `overwrite` is true.
    ///
    /// # Errors
    /// Returns [`Error::Io`], also if somebody else is writing the folder, or [`Error::InvalidFile`] if the destination is a file, or a folder
    /// that is not empty while `overwrite` is false.
    pub fn create(destination: impl AsRef<Path>, overwrite: bool) -> Result<Self> {
        Self::begin(destination.as_ref(), overwrite, |destination, name| {
            let mut builder = Builder::new();
            let prefix = temporary_prefix(name);
            builder.prefix(&prefix).suffix(TEMPORARY);
            readable(&mut builder, 0o777);
            let temporary = builder
                .tempdir_in(parent(destination))
                .map_err(|e| Error::io(destination, e))?;
            Ok(Place::Temporary(temporary))
        })
    }

    /// Begins the folder `destination` like [`create`](Self::create), or goes on with it where an
    /// earlier process ended in any way. What is built stays in `NAME.unfinished` until
    /// [`commit`](Self::commit).
    ///
    /// # Errors
    /// Returns the errors of [`create`](Self::create).
    pub(crate) fn go_on(destination: impl AsRef<Path>, overwrite: bool) -> Result<Self> {
        Self::begin(destination.as_ref(), overwrite, |destination, name| {
            let mut name = name.to_os_string();
            name.push(UNFINISHED);
            let within = parent(destination).join(name);
            let folder = within.join("folder");
            fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
            Ok(Place::Kept { within, folder })
        })
    }

    fn begin(
        destination: &Path,
        overwrite: bool,
        place: impl FnOnce(&Path, &OsStr) -> Result<Place>,
    ) -> Result<Self> {
        // Resolve links and `..`, so that the temporary folder is on the same file system.
        let destination = match fs::canonicalize(destination) {
            Ok(path) => path,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let Some(name) = destination.file_name() else {
                    return Err(Error::invalid_file(destination, "not the name of a folder"));
                };
                let above = parent(destination);
                fs::create_dir_all(above).map_err(|e| Error::io(above, e))?;
                fs::canonicalize(above)
                    .map_err(|e| Error::io(above, e))?
                    .join(name)
            }
            Err(e) => return Err(Error::io(destination, e)),
        };
        let Some(name) = destination.file_name() else {
            return Err(Error::invalid_file(
                &destination,
                "not the name of a folder",
            ));
        };
        check_destination(&destination, overwrite)?;
        let lock = claim(parent(&destination), name, &destination)?;
        check_destination(&destination, overwrite)?;
        let place = place(&destination, name)?;
        Ok(Self {
            destination,
            overwrite,
            place,
            _lock: lock,
        })
    }

    /// Returns the path of the temporary folder, to write files into.
    pub fn path(&self) -> &Path {
        match &self.place {
            Place::Temporary(temporary) => temporary.path(),
            Place::Kept { folder, .. } => folder,
        }
    }

    /// Returns the folder for notes about work that is gone on with, or `None` if it is not.
    pub(crate) fn notes(&self) -> Option<&Path> {
        match &self.place {
            Place::Temporary(_) => None,
            Place::Kept { within, .. } => Some(within),
        }
    }

    /// Returns the final path of the folder.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Moves the folder to its destination. With `overwrite`, the old folder is renamed first and
    /// removed last, so that one complete folder exists at any moment.
    ///
    /// # Errors
    /// Returns [`Error::Io`], or [`Error::InvalidFile`] if something was created at the destination
    /// in the meantime. The new folder is then removed (or stays where it is if it was begun by
    /// [`go_on`](Self::go_on)), and the old one is at its original path.
    pub fn commit(self) -> Result<()> {
        let Self {
            destination,
            overwrite,
            place,
            _lock,
        } = self;
        let from = match &place {
            Place::Temporary(temporary) => temporary.path(),
            Place::Kept { folder, .. } => folder,
        };
        let at = |e| Error::io(&destination, e);
        check_destination(&destination, overwrite)?;
        sync_folder(from)?;
        let mut old = None;
        if destination.exists()
            && let Err(e) = fs::remove_dir(&destination)
        {
            // It is not empty, or was filled after the check.
            if !overwrite {
                return Err(at(e));
            }
            let prefix = temporary_prefix(destination.file_name().unwrap_or_default());
            let aside = Builder::new()
                .prefix(&prefix)
                .suffix(TEMPORARY)
                .tempdir_in(parent(&destination))
                .map_err(at)?;
            fs::rename(&destination, aside.path().join(OLD)).map_err(at)?;
            old = Some(aside);
        }
        if let Err(e) = fs::rename(from, &destination) {
            if let Some(aside) = old
                && fs::rename(aside.path().join(OLD), &destination).is_err()
            {
                // Keep the user's files, even if under a temporary name.
                let kept = aside.keep();
                return Err(Error::invalid_file(
                    &destination,
                    format!(
                        "could not be replaced ({e}); what it held is now in {}",
                        kept.display()
                    ),
                ));
            }
            return Err(at(e));
        }
        match place {
            // The folder has its final name now, so the temporary name must not be removed.
            Place::Temporary(temporary) => _ = temporary.keep(),
            Place::Kept { within, .. } => fs::remove_dir_all(within).map_err(at)?,
        }
        if let Some(aside) = old {
            aside.close().map_err(at)?;
        }
        sync_folder(parent(&destination))
    }
}

fn check_destination(destination: &Path, overwrite: bool) -> Result<()> {
    let mut entries = match fs::read_dir(destination) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(Error::invalid_file(
                destination,
                "a folder is to be written here, but there is a file",
            ));
        }
        Err(e) => return Err(Error::io(destination, e)),
    };
    if !overwrite && entries.next().is_some() {
        return Err(Error::invalid_file(
            destination,
            "the folder exists and is not empty; it is not overwritten unasked",
        ));
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// End of the names of temporary files and folders.
const TEMPORARY: &str = ".tmp";

/// Number of characters that the `tempfile` crate chooses for a name.
const CHOSEN: usize = 6;

/// Name of a folder that is replaced, in the temporary folder to which it is moved.
const OLD: &str = "old";

/// Locks the name of a file or a folder, and clears what killed processes have left of it.
fn claim(folder: &Path, name: &OsStr, path: &Path) -> Result<Lock> {
    let mut lock = OsString::from(".");
    lock.push(name);
    lock.push(".lock");
    let lock = Lock::acquire(folder.join(lock), path).map_err(|error| match error {
        // The user knows the file, not the lock.
        Error::Io { source, .. } => Error::io(path, source),
        other => other,
    })?;
    for left in left_behind(folder, name) {
        let old = left.join(OLD);
        if old.is_dir() && fs::symlink_metadata(path).is_err() {
            // Killed between the two renames that replace a folder.
            fs::rename(&old, path).map_err(|e| Error::io(path, e))?;
        }
        let result = if left.is_dir() {
            fs::remove_dir_all(&left)
        } else {
            fs::remove_file(&left)
        };
        result.map_err(|e| Error::io(&left, e))?;
    }
    Ok(lock)
}

/// Brings back a folder that a killed process was about to replace, if it was killed between the two
/// renames of that, and removes what it has left.
///
/// # Errors
/// Returns [`Error::Io`], also if somebody is writing the folder.
#[cfg(feature = "burn")]
pub(crate) fn recover(path: &Path) -> Result<()> {
    match path.file_name() {
        Some(name) if parent(path).is_dir() => claim(parent(path), name, path).map(drop),
        _ => Ok(()),
    }
}

/// The temporary files and folders that were to become `name`.
fn left_behind(folder: &Path, name: &OsStr) -> Vec<PathBuf> {
    let prefix = temporary_prefix(name);
    let is_left = |found: &OsStr| {
        let rest = found
            .as_encoded_bytes()
            .strip_prefix(prefix.as_encoded_bytes());
        let chosen = rest.and_then(|rest| rest.strip_suffix(TEMPORARY.as_bytes()));
        chosen.is_some_and(|chosen| {
            chosen.len() == CHOSEN && chosen.iter().all(u8::is_ascii_alphanumeric)
        })
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| is_left(&entry.file_name()))
        .map(|entry| entry.path())
        .collect()
}

fn temporary_prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push("-");
    prefix
}

/// Gives temporary files, which are private by default, the permissions of ordinary files under the
/// user's umask.
#[cfg(unix)]
fn readable(builder: &mut Builder<'_, '_>, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(fs::Permissions::from_mode(mode));
}

#[cfg(not(unix))]
fn readable(_builder: &mut Builder<'_, '_>, _mode: u32) {}

/// Syncs a folder, so that a rename survives a crash. Only Unix needs this and supports it.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(|e| Error::io(folder, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_whole_or_absent() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.bin");
        let failed = write_file(&path, |sink| {
            sink.put(&[1; 1000])?;
            Err(Error::io(
                sink.path(),
                io::Error::from(io::ErrorKind::StorageFull),
            ))
        });
        assert!(failed.unwrap_err().to_string().contains("x.bin"));
        assert!(entries(root.path()).is_empty());
        write_file(&path, |sink| sink.put(b"one")).unwrap();
        // A failed second write leaves the first file unchanged.
        assert!(write_file(&path, |_| Err(Error::argument("x", 1, "2"))).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_file(&path, |sink| sink.put(b"two")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(entries(root.path()), ["x.bin"]);
        assert!(write_file(root.path().join(".."), |_| Ok(())).is_err());
        assert!(
            write_file(root.path().join("absent/y"), |_| Ok(()))
                .unwrap_err()
                .to_string()
                .contains("absent")
        );
    }

    #[test]
    fn large_files_are_written_behind_and_removed_on_an_error() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("large.bin");
        let parts = || (0..100usize).map(|i| vec![i as u8; i * 7919]);
        write_file(&path, |sink| parts().try_for_each(|part| sink.put(&part))).unwrap();
        assert!(fs::read(&path).unwrap() == parts().flatten().collect::<Vec<_>>());
        fs::remove_file(&path).unwrap();
        let failed = write_file(&path, |sink| {
            parts().try_for_each(|part| sink.put(&part))?;
            Err(Error::argument("x", 1, "2"))
        });
        assert!(failed.is_err());
        assert!(entries(root.path()).is_empty());
    }

    #[test]
    fn unfinished_work_is_gone_on_with() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x");
        let writer = FolderWriter::go_on(&path, false).unwrap();
        fs::write(writer.path().join("a"), "1").unwrap();
        fs::write(writer.notes().unwrap().join("note"), "1").unwrap();
        assert!(FolderWriter::go_on(&path, false).is_err());
        drop(writer);
        assert_eq!(entries(root.path()), ["x.unfinished"]);
        let writer = FolderWriter::go_on(&path, false).unwrap();
        assert_eq!(fs::read(writer.path().join("a")).unwrap(), b"1");
        writer.commit().unwrap();
        assert_eq!(entries(root.path()), ["x"]);
        assert_eq!(entries(&path), ["a"]);
        assert!(FolderWriter::go_on(&path, false).is_err());
        FolderWriter::go_on(&path, true).unwrap().commit().unwrap();
        assert!(entries(&path).is_empty());
    }

    #[test]
    fn one_writer_at_a_time_and_the_next_clears_what_a_killed_one_left() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m.bin");
        let busy = |result: Result<()>, name: &str| {
            let text = result.unwrap_err().to_string();
            let part = format!("{name}: this process is writing here");
            assert!(text.contains(&part), "{text}");
        };
        write_file(&path, |sink| {
            sink.put(b"first")?;
            busy(write_file(&path, |sink| sink.put(b"second")), "m.bin");
            // Another name is free.
            write_file(root.path().join("n.bin"), |sink| sink.put(b"n"))
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        let again = write_file_or_refuse(&path, false, |sink| sink.put(b"second"));
        assert!(again.unwrap_err().to_string().contains("already"));

        let folder = root.path().join("out");
        let writer = FolderWriter::create(&folder, false).unwrap();
        busy(FolderWriter::create(&folder, true).map(drop), "out");
        fs::write(writer.path().join("a"), b"1").unwrap();
        writer.commit().unwrap();

        // What killed processes leave: files, folders, locks, and an old folder that was moved.
        // Files of other names are not touched.
        fs::write(root.path().join(".m.bin-a1B2c3.tmp"), b"half").unwrap();
        fs::write(root.path().join(".m.bin.lock"), b"12").unwrap();
        fs::write(root.path().join(".m.bin-x-a1B2c3.tmp"), b"other").unwrap();
        fs::create_dir(root.path().join(".out-AAAAAA.tmp")).unwrap();
        fs::create_dir(root.path().join(".out-BBBBBB.tmp")).unwrap();
        fs::rename(&folder, root.path().join(".out-BBBBBB.tmp/old")).unwrap();
        write_file(&path, |sink| sink.put(b"third")).unwrap();
        let writer = FolderWriter::create(&folder, true).unwrap();
        assert_eq!(entries(&folder), ["a"]);
        drop(writer);
        assert_eq!(
            entries(root.path()),
            [".m.bin-x-a1B2c3.tmp", "m.bin", "n.bin", "out"]
        );
    }

    #[cfg(unix)]
    #[test]
    fn files_and_folders_follow_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let plain = root.path().join("plain");
        fs::write(&plain, b"x").unwrap();
        fs::create_dir(root.path().join("plain_dir")).unwrap();
        write_file(root.path().join("ours"), |sink| sink.put(b"x")).unwrap();
        FolderWriter::create(root.path().join("ours_dir"), false)
            .unwrap()
            .commit()
            .unwrap();
        let mode = |name: &str| {
            fs::metadata(root.path().join(name))
                .unwrap()
                .permissions()
                .mode()
        };
        assert_eq!(mode("ours"), mode("plain"));
        assert_eq!(mode("ours_dir"), mode("plain_dir"));
    }

    #[test]
    fn a_folder_is_whole_or_absent() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/out");
        let writer = FolderWriter::create(&path, false).unwrap();
        fs::write(writer.path().join("a"), b"1").unwrap();
        assert!(!path.exists());
        drop(writer);
        assert!(entries(&root.path().join("deep")).is_empty());

        let writer = FolderWriter::create(&path, false).unwrap();
        fs::write(writer.path().join("a"), b"1").unwrap();
        writer.commit().unwrap();
        assert_eq!(entries(&path), ["a"]);

        let refused = FolderWriter::create(&path, false).unwrap_err().to_string();
        assert!(
            refused.contains("not empty") && refused.contains("out"),
            "{refused}"
        );
        let writer = FolderWriter::create(&path, true).unwrap();
        fs::write(writer.path().join("b"), b"2").unwrap();
        assert_eq!(entries(&path), ["a"]);
        writer.commit().unwrap();
        assert_eq!(entries(&path), ["b"]);
        assert_eq!(entries(&root.path().join("deep")), ["out"]);
    }

    #[test]
    fn an_empty_folder_is_replaced_and_a_file_is_not() {
        let root = tempfile::tempdir().unwrap();
        let empty = root.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let writer = FolderWriter::create(&empty, false).unwrap();
        fs::write(writer.path().join("a"), b"1").unwrap();
        writer.commit().unwrap();
        assert_eq!(entries(&empty), ["a"]);

        let file = root.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert!(FolderWriter::create(&file, true).is_err());
        assert!(FolderWriter::create("/", true).is_err());

        // Another process filled the destination in the meantime.
        let late = root.path().join("late");
        let writer = FolderWriter::create(&late, false).unwrap();
        fs::create_dir(&late).unwrap();
        fs::write(late.join("theirs"), b"x").unwrap();
        assert!(writer.commit().is_err());
        assert_eq!(entries(&late), ["theirs"]);
        assert_eq!(entries(root.path()), ["empty", "file", "late"]);
    }

    /// A file system of 64 KiB, if the user has the right to mount one.
    #[cfg(target_os = "linux")]
    struct Tiny(tempfile::TempDir);

    #[cfg(target_os = "linux")]
    impl Tiny {
        fn mount() -> Option<Self> {
            let folder = tempfile::tempdir().unwrap();
            let mounted = std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
                .arg(folder.path())
                .output()
                .is_ok_and(|o| o.status.success());
            mounted.then_some(Self(folder))
        }
    }

    #[cfg(target_os = "linux")]
    impl Drop for Tiny {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount")
                .arg(self.0.path())
                .output();
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_that_leaves_nothing() {
        let Some(disk) = Tiny::mount() else {
            eprintln!("skipped: no right to mount a small file system");
            return;
        };
        let root = disk.0.path();
        match write_file(root.join("big"), |sink| sink.put(&vec![7; 1 << 20])) {
            Err(Error::Io { path, source }) => {
                assert_eq!(
                    (path, source.kind()),
                    (root.join("big"), io::ErrorKind::StorageFull)
                );
            }
            other => panic!("{other:?}"),
        }
        let writer = FolderWriter::create(root.join("model"), false).unwrap();
        write_file(writer.path().join("small"), |sink| sink.put(&[7; 100])).unwrap();
        assert!(
            write_file(writer.path().join("big"), |sink| sink
                .put(&vec![7; 1 << 20]))
            .is_err()
        );
        drop(writer);
        assert!(entries(root).is_empty(), "{:?}", entries(root));
    }
}
