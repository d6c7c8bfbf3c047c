//! Models in the local cache of Hugging Face's tools, by the id of their repository.
//!
//! The cache has a folder `models--ORG--NAME` for each repository. In it, `refs/REVISION` holds the
//! hash of a commit, and `snapshots/HASH` the files of that commit, as links where the file system
//! has them. Nothing is downloaded.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::read_capped;

/// Longest id, as on Hugging Face's hub.
const MAX_ID_BYTES: usize = 96;
/// Largest file of `refs` that is read.
const MAX_REF_BYTES: u64 = 256;
const DEFAULT_REVISION: &str = "main";

/// The parts of `ORG/NAME@REVISION/FILE`.
#[derive(Debug, PartialEq)]
struct Id<'a> {
    /// `ORG/NAME`.
    repository: &'a str,
    revision: &'a str,
    /// A GGUF file in the repository.
    file: Option<&'a str>,
}

impl<'a> Id<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (organization, rest) = text.split_once('/')?;
        let (rest, file) = match rest.split_once('/') {
            // A revision may have slashes, so a file is only looked for without one.
            Some((name, file)) if is_gguf_name(file) && !name.contains('@') => (name, Some(file)),
            _ => (rest, None),
        };
        let (name, revision) = match rest.split_once('@') {
            Some((name, revision)) => (name, revision),
            None => (rest, DEFAULT_REVISION),
        };
        let repository = &text[..organization.len() + 1 + name.len()];
        let valid = is_part(organization)
            && is_part(name)
            && repository.len() <= MAX_ID_BYTES
            && revision
                .split('/')
                .chain(file.unwrap_or("x").split('/'))
                .all(is_file_name);
        valid.then_some(Self {
            repository,
            revision,
            file,
        })
    }
}

fn is_gguf_name(name: &str) -> bool {
    let (_, extension) = name.rsplit_once('.').unwrap_or_default();
    extension.eq_ignore_ascii_case("gguf")
}

/// Whether a name can be an organization's or a repository's.
fn is_part(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.is_empty()
        && name.chars().all(plain)
        && !name.starts_with(['-', '.'])
        && !name.ends_with(['-', '.'])
        && !name.contains("--")
        && !name.contains("..")
}

/// Whether a name is that of a file in a folder, on any system.
fn is_file_name(name: &str) -> bool {
    name != "." && crate::io::is_plain_file_name(name)
}

/// Returns the path of a model: `path` itself if it exists or cannot be an id, or else the folder
/// of the cache that holds the repository `ORG/NAME`, or its revision after an `@`.
/// `ORG/NAME/FILE.gguf` is a file of a repository.
///
/// # Errors
/// Returns [`Error::Io`] if there is neither such a path nor such a repository in the cache. The
/// text says where it was looked for, and which command downloads it.
pub(crate) fn resolve(path: &Path) -> Result<Cow<'_, Path>> {
    resolve_in(path, || {
        cache_folder(|name| std::env::var_os(name), std::env::home_dir())
    })
}

/// Returns the folder of the cache by the rules of Hugging Face's tools.
fn cache_folder(
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    let folder = |name: &str| {
        let value = PathBuf::from(variable(name).filter(|value| !value.is_empty())?);
        Some(match (value.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => value,
        })
    };
    folder("HF_HUB_CACHE")
        .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(folder("HF_HOME")?.join("hub")))
        .or_else(|| {
            let caches = folder("XDG_CACHE_HOME").or_else(|| Some(home.clone()?.join(".cache")))?;
            Some(caches.join("huggingface").join("hub"))
        })
}

fn resolve_in(path: &Path, cache: impl FnOnce() -> Option<PathBuf>) -> Result<Cow<'_, Path>> {
    let Some(id) = path.to_str().and_then(Id::parse) else {
        return Ok(path.into());
    };
    // A path that exists but cannot be read is one as well.
    if !matches!(path.try_exists(), Ok(false)) {
        return Ok(path.into());
    }
    let missing = |reason: String| {
        let Id {
            repository,
            revision,
            file,
        } = &id;
        let mut command = format!("hf download {repository}");
        if let Some(file) = file {
            command.push_str(&format!(" {file}"));
        }
        if *revision != DEFAULT_REVISION {
            command.push_str(&format!(" --revision {revision}"));
        }
        let reason = format!("no such file or folder, and {reason} (to download it: `{command}`)");
        Error::io(path, IoError::new(ErrorKind::NotFound, reason))
    };
    let Some(cache) = cache() else {
        return Err(missing(
            "there is no home folder with a Hugging Face cache".into(),
        ));
    };
    let folder = cache.join(format!("models--{}", id.repository.replace('/', "--")));
    if !folder.is_dir() {
        return Err(missing(format!(
            "no `{}` in the Hugging Face cache {}",
            id.repository,
            cache.display()
        )));
    }
    let snapshots = folder.join("snapshots");
    // A revision is the name of a branch or tag, or the hash of a commit.
    let named = id
        .revision
        .split('/')
        .fold(folder.join("refs"), |at, part| at.join(part));
    let hash = if named.is_file() {
        let bytes = read_capped(&named, MAX_REF_BYTES)?;
        match std::str::from_utf8(&bytes).map(str::trim) {
            Ok(hash) if is_file_name(hash) => hash.to_string(),
            _ => return Err(Error::invalid_file(&named, "not the hash of a commit")),
        }
    } else {
        id.revision.to_string()
    };
    let mut found = snapshots.join(&hash);
    if !is_file_name(&hash) || !found.is_dir() {
        return Err(missing(format!(
            "no revision `{}` of `{}` in the Hugging Face cache {}",
            id.revision,
            id.repository,
            cache.display()
        )));
    }
    if let Some(file) = id.file {
        found = file.split('/').fold(found, |at, part| at.join(part));
        if !found.exists() {
            return Err(missing(format!(
                "no file `{file}` in {}",
                snapshots.join(&hash).display()
            )));
        }
    }
    Ok(found.into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn ids_have_two_parts_and_maybe_a_revision() {
        let id = |text| Id::parse(text).map(|id| (id.repository, id.revision, id.file));
        assert_eq!(id("org/name"), Some(("org/name", "main", None)));
        assert_eq!(
            id("Qwen/Qwen2.5-0.5B@v1.0"),
            Some(("Qwen/Qwen2.5-0.5B", "v1.0", None))
        );
        assert_eq!(
            id("org/name@refs/pr/1"),
            Some(("org/name", "refs/pr/1", None))
        );
        assert_eq!(
            id("org/name/q/m-Q4_K_M.gguf"),
            Some(("org/name", "main", Some("q/m-Q4_K_M.gguf")))
        );
        for text in [
            "",
            "name",
            "/org/name",
            "org/",
            "/name",
            "./name",
            "../name",
            "~/name",
            "org/name/",
            "org/name/config.json",
            "org/na me",
            "org\\name",
            "c:/name",
            "org/name@",
            "org/name@..",
            "org/name@a//b",
            "org/name@../x",
            "org/a--b",
            "org/a..b",
            "org/-b",
            "org/b.",
            "org/name/../m.gguf",
            "org/name/.gguf/",
            "org/name@a\\b",
        ] {
            assert_eq!(id(text), None, "{text}");
        }
        assert_eq!(id(&format!("org/{}", "n".repeat(93))), None);
    }

    #[test]
    fn the_cache_is_where_hugging_face_has_it() {
        let home = PathBuf::from("h");
        let folder = |set: &[(&str, &str)]| {
            let get = |name: &str| {
                let found = set.iter().find(|(key, _)| *key == name)?;
                Some(found.1.into())
            };
            cache_folder(get, Some(home.clone())).unwrap()
        };
        let path = |parts: &[&str]| parts.iter().collect::<PathBuf>();
        assert_eq!(folder(&[]), path(&["h", ".cache", "huggingface", "hub"]));
        let mut set = vec![("XDG_CACHE_HOME", "x")];
        assert_eq!(folder(&set), path(&["x", "huggingface", "hub"]));
        set.push(("HF_HOME", "~/y"));
        assert_eq!(folder(&set), path(&["h", "y", "hub"]));
        set.push(("HUGGINGFACE_HUB_CACHE", "z"));
        assert_eq!(folder(&set), path(&["z"]));
        set.push(("HF_HUB_CACHE", ""));
        assert_eq!(folder(&set), path(&["z"]));
        set.push(("HF_HUB_CACHE", "w"));
        set.remove(3);
        assert_eq!(folder(&set), path(&["w"]));
        assert_eq!(cache_folder(|_| None, None), None);
    }

    /// A cache with the revision `main` of `org/name`, and a tag `old/one`.
    fn cache() -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--name");
        for (name, hash) in [("main", "c0ffee\n"), ("old/one", "beef")] {
            let name = folder.join("refs").join(name);
            fs::create_dir_all(name.parent().unwrap()).unwrap();
            fs::write(name, hash).unwrap();
            fs::create_dir_all(folder.join("snapshots").join(hash.trim())).unwrap();
        }
        fs::write(folder.join("snapshots/c0ffee/m.gguf"), b"GGUF").unwrap();
        cache
    }

    fn find(text: &str, cache: &Path) -> Result<PathBuf> {
        let found = resolve_in(Path::new(text), || Some(cache.into()))?;
        Ok(found.into_owned())
    }

    #[test]
    fn revisions_are_found_by_name_and_by_hash() {
        let cache = cache();
        let snapshots = cache.path().join("models--org--name/snapshots");
        for (text, hash) in [
            ("org/name", "c0ffee"),
            ("org/name@main", "c0ffee"),
            ("org/name@old/one", "beef"),
            ("org/name@beef", "beef"),
            ("org/name/m.gguf", "c0ffee/m.gguf"),
        ] {
            assert_eq!(
                find(text, cache.path()).unwrap(),
                snapshots.join(hash),
                "{text}"
            );
        }
        // Paths that are no ids, and such that exist, are left alone.
        for text in ["model", "a/b/c", "./org/name", "/org/name", "src/lib.rs"] {
            assert_eq!(find(text, cache.path()).unwrap(), Path::new(text));
        }
    }

    #[test]
    fn what_is_not_there_is_told_with_the_command_that_gets_it() {
        let cache = cache();
        let refs = cache.path().join("models--org--name/refs");
        fs::write(refs.join("up"), "../../x").unwrap();
        fs::write(refs.join("long"), "a".repeat(1000)).unwrap();
        fs::write(refs.join("binary"), [0xFF, 0xFE]).unwrap();
        fs::write(refs.join("gone"), "dead").unwrap();
        let place = cache.path().display().to_string();
        for (text, parts) in [
            (
                "org/other",
                ["no `org/other` in", "`hf download org/other`"],
            ),
            (
                "org/name@v2",
                ["no revision `v2`", "`hf download org/name --revision v2`"],
            ),
            (
                "org/name@gone",
                ["no revision `gone`", "hf download org/name --revision gone"],
            ),
            (
                "org/name/x.gguf",
                ["no file `x.gguf`", "`hf download org/name x.gguf`"],
            ),
            ("org/name@up", ["refs", "not the hash of a commit"]),
            ("org/name@long", ["refs", "1000 bytes"]),
            ("org/name@binary", ["refs", "not the hash of a commit"]),
        ] {
            let error = find(text, cache.path()).unwrap_err().to_string();
            for part in parts.iter().chain([&place.as_str()]) {
                assert!(error.contains(part), "{text}: {error}\nexpected {part}");
            }
        }
        let error = resolve_in(Path::new("org/name"), || None).unwrap_err();
        assert!(error.to_string().contains("no home folder"), "{error}");
    }

    #[test]
    fn mutated_references_stay_inside_the_cache() {
        let cache = cache();
        let main = cache.path().join("models--org--name/refs/main");
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let rounds = crate::io::testing::rounds(2000);
        const PARTS: [&str; 16] = [
            "org", "name", "/", "@", "main", "..", ".", "c0ffee", "beef", "old/one", "\\", ":",
            "\0", "m.gguf", "é", " ",
        ];
        let mut n_found = 0;
        for round in 0..rounds {
            let mut any = |n: usize| -> String {
                let n = rng.random_range(0..n);
                (0..n)
                    .map(|_| PARTS[rng.random_range(0..PARTS.len())])
                    .collect()
            };
            let text = if round % 2 == 0 {
                fs::write(&main, any(3)).unwrap();
                "org/name".to_string()
            } else {
                fs::write(&main, "c0ffee").unwrap();
                format!("org/name{}", any(5))
            };
            let Ok(found) = find(&text, cache.path()) else {
                continue;
            };
            if found != Path::new(&text) {
                let found = found.canonicalize().unwrap();
                let inside = cache
                    .path()
                    .canonicalize()
                    .unwrap()
                    .join("models--org--name/snapshots");
                assert!(
                    found.starts_with(inside),
                    "{text:?} gives {}",
                    found.display()
                );
                n_found += 1;
            }
        }
        assert!(n_found > 0);
    }
}
