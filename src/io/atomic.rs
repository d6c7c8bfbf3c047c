//! Files and folders that appear whole or not at all: temporary name, flush, sync, rename.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Where a file's bytes go while it is being written; errors name the file.
#[derive(Debug)]
pub struct Sink<'a> {
    path: &'a Path,
    inner: BufWriter<&'a mut NamedTempFile>,
}

impl Sink<'_> {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.inner.write_all(bytes).map_err(|e| Error::io(self.path, e))
    }

    /// The name that the file will have.
    pub fn path(&self) -> &Path {
        self.path
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes the file `path` through `fill`: into a temporary file beside it, which is synced and then takes the name.
///
/// # Errors
/// [`Error::Io`], and whatever `fill` returns. Nothing is left behind then, and what `path` held before is untouched.
pub fn write_file(path: impl AsRef<Path>, fill: impl FnOnce(&mut Sink<'_>) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    let Some(name) = path.file_name() else {
        return Err(Error::invalid_file(path, "not the name of a file"));
    };
    let folder = parent(path);
    let mut builder = Builder::new();
    let prefix = temporary_prefix(name);
    builder.prefix(&prefix).suffix(".tmp");
    readable(&mut builder, 0o666);
    let mut file = builder.tempfile_in(folder).map_err(|e| Error::io(path, e))?;
    let mut sink = Sink { path, inner: BufWriter::with_capacity(1 << 18, &mut file) };
    fill(&mut sink)?;
    sink.inner.flush().map_err(|e| Error::io(path, e))?;
    drop(sink);
    file.as_file().sync_all().map_err(|e| Error::io(path, e))?;
    file.persist(path).map_err(|e| Error::io(path, e.error))?;
    sync_folder(folder)
}

/// Writes `value` as indented JSON with a final newline; see [`write_file`].
///
/// # Errors
/// [`Error::Io`]; [`Error::Json`] for a value that JSON cannot hold.
pub fn write_json<T: Serialize + ?Sized>(path: impl AsRef<Path>, value: &T) -> Result<()> {
    let path = path.as_ref();
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::json(path, e))?;
    text.push(b'\n');
    write_file(path, |sink| sink.put(&text))
}

/// Builds a folder under a temporary name beside its destination and renames it into place as a whole.
///
/// Dropped without [`commit`](Self::commit), it vanishes with all that was written into it.
#[derive(Debug)]
pub struct FolderWriter {
    destination: PathBuf,
    overwrite: bool,
    temporary: TempDir,
}

impl FolderWriter {
    /// Begins the folder `destination`; folders above it are made where they are missing.
    ///
    /// An empty folder of that name is replaced. One that holds something is replaced only with `overwrite`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidFile`] where the destination is a file, or a folder that holds something and
    /// `overwrite` is false.
    pub fn create(destination: impl AsRef<Path>, overwrite: bool) -> Result<Self> {
        let destination = destination.as_ref();
        // Through links and `..`, so that the temporary folder lies on the same file system.
        let destination = match fs::canonicalize(destination) {
            Ok(path) => path,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let Some(name) = destination.file_name() else {
                    return Err(Error::invalid_file(destination, "not the name of a folder"));
                };
                let above = parent(destination);
                fs::create_dir_all(above).map_err(|e| Error::io(above, e))?;
                fs::canonicalize(above).map_err(|e| Error::io(above, e))?.join(name)
            }
            Err(e) => return Err(Error::io(destination, e)),
        };
        check_destination(&destination, overwrite)?;
        let Some(name) = destination.file_name() else {
            return Err(Error::invalid_file(&destination, "not the name of a folder"));
        };
        let mut builder = Builder::new();
        let prefix = temporary_prefix(name);
        builder.prefix(&prefix).suffix(".tmp");
        readable(&mut builder, 0o777);
        let temporary = builder.tempdir_in(parent(&destination)).map_err(|e| Error::io(&destination, e))?;
        Ok(Self { destination, overwrite, temporary })
    }

    /// The temporary folder, to write into.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Where the folder will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Puts the folder in its place. With `overwrite` the old one is renamed aside first and removed last, so that at
    /// every moment one of the two is whole.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::InvalidFile`] where something came to lie at the destination meanwhile. The new folder is
    /// gone then and the old one is where it was.
    pub fn commit(self) -> Result<()> {
        let Self { destination, overwrite, temporary } = self;
        let at = |e| Error::io(&destination, e);
        check_destination(&destination, overwrite)?;
        sync_folder(temporary.path())?;
        let mut old = None;
        if destination.exists() && fs::remove_dir(&destination).is_err() {
            // Not empty, and `overwrite` (checked above).
            let aside = Builder::new().prefix(".old-").suffix(".tmp").tempdir_in(parent(&destination)).map_err(at)?;
            fs::rename(&destination, aside.path().join("old")).map_err(at)?;
            old = Some(aside);
        }
        if let Err(e) = fs::rename(temporary.path(), &destination) {
            if let Some(aside) = old
                && fs::rename(aside.path().join("old"), &destination).is_err()
            {
                // Keep the user's files, under whatever name, over tidiness.
                let kept = aside.keep();
                return Err(Error::invalid_file(
                    &destination,
                    format!("could not be replaced ({e}); what it held is now in {}", kept.display()),
                ));
            }
            return Err(at(e));
        }
        // It carries the final name now; nothing must remove the temporary one.
        let _ = temporary.keep();
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
            return Err(Error::invalid_file(destination, "a folder is to be written here, but there is a file"));
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

fn temporary_prefix(name: &std::ffi::OsStr) -> std::ffi::OsString {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(name);
    prefix.push("-");
    prefix
}

/// Temporary files are private by default; these become real ones and follow the user's umask.
#[cfg(unix)]
fn readable(builder: &mut Builder<'_, '_>, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(fs::Permissions::from_mode(mode));
}

#[cfg(not(unix))]
fn readable(_builder: &mut Builder<'_, '_>, _mode: u32) {}

/// Makes a rename last through a crash; only Unix can and must.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder, e))?;
    }
    Ok(())
}
