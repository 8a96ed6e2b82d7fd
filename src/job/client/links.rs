// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths of a job that become links to a cache: what is there is moved into it first.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::{env, process};

use super::{Failure, failed};

/// A path that becomes a link to a cache.
#[derive(Debug)]
pub(super) struct Link {
    /// With no link on the way to its last name.
    path: PathBuf,
    to: PathBuf,
}

/// The links to the cache at `at`, or to directories in it where they are several.
pub(super) fn links(paths: &[PathBuf], at: &Path, job: &Path) -> Result<Vec<Link>, Failure> {
    let mut links: Vec<Link> = Vec::new();
    for given in paths {
        let refused = |why: &str| Failure::Failed(format!("--path {}: {why}", given.display()));
        let path = resolved(given).map_err(|error| refused(&error.to_string()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let to = match paths.len() {
            1 => at.to_owned(),
            _ => at.join(format!("{}-{name}", links.len())),
        };
        if path.starts_with(job) || job.starts_with(&path) {
            let why = format!("the job volume is at {}", job.display());
            return Err(refused(&why));
        }
        let overlaps =
            |other: &&Link| path.starts_with(&other.path) || other.path.starts_with(&path);
        if let Some(other) = links.iter().find(overlaps) {
            let why = format!("{} is to be a link too", other.path.display());
            return Err(refused(&why));
        }
        links.push(Link { path, to });
    }
    Ok(links)
}

/// The path with all links on the way to its last name followed; not all of it needs to be there.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    let bad = |why| Err(io::Error::new(ErrorKind::InvalidInput, why));
    let path: PathBuf = env::current_dir()?.join(path).components().collect();
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return bad("it does not end in a name");
    };
    for there in dir.ancestors() {
        let rest = dir.strip_prefix(there).expect("an ancestor");
        match there.canonicalize() {
            Ok(_) if rest.components().any(|name| name == Component::ParentDir) => {
                return bad("it has .. after a directory that does not exist");
            }
            Ok(there) => return Ok(there.join(rest).join(name)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the root is there")
}

impl Link {
    /// Finds what is in the way. `true`: the link is there already.
    pub(super) fn check(&self) -> Result<bool, Failure> {
        let refused = |why: &str| {
            let path = self.path.display();
            Err(Failure::Failed(format!("{path} {why}: it stays as it is")))
        };
        let there = match fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            other => other.map_err(failed(&self.path))?,
        };
        if there.is_symlink() {
            let to = fs::read_link(&self.path).map_err(failed(&self.path))?;
            if to == self.to {
                return Ok(true);
            }
            return refused(&format!("is a link to {}", to.display()));
        }
        if !there.is_dir() {
            return refused("is not a directory");
        }
        let around = self.path.parent().and_then(|dir| fs::metadata(dir).ok());
        if around.is_some_and(|around| around.dev() != there.dev()) {
            return refused("is a mount");
        }
        match immovable(&self.path, there.dev()).map_err(failed(&self.path))? {
            Some(why) => refused(&format!("has {why} in it")),
            None => Ok(false),
        }
    }

    pub(super) fn make(&self) -> Result<(), Failure> {
        if self.check()? {
            return Ok(());
        }
        let made = || -> io::Result<()> {
            let (Some(dir), Some(name)) = (self.path.parent(), self.path.file_name()) else {
                unreachable!("it was resolved");
            };
            fs::create_dir_all(dir)?;
            // Made first, and moved into place at the end: where that cannot be done nothing is.
            let new = format!(".{}.{}", name.to_string_lossy(), process::id());
            let new = dir.join(new);
            symlink(&self.to, &new)?;
            self.adopt()
                .and_then(|()| fs::rename(&new, &self.path))
                .inspect_err(|_| drop(fs::remove_file(&new)))
        };
        made().map_err(failed(&self.path))
    }

    /// Moves what a directory in the link's place holds to where the link leads.
    fn adopt(&self) -> io::Result<()> {
        let is_dir = self.path.is_dir();
        if is_dir {
            let mut copy = Copy::default();
            copy.all(&self.path, &self.to)
                .inspect_err(|_| copy.undo())?;
        } else if let Err(error) = fs::create_dir(&self.to)
            && error.kind() != ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        if !fs::symlink_metadata(&self.to)?.is_dir() {
            let why = format!("{} in the cache is not a directory", self.to.display());
            return Err(io::Error::new(ErrorKind::NotADirectory, why));
        }
        if is_dir {
            fs::remove_dir_all(&self.path)?;
        }
        Ok(())
    }
}

/// What in a directory on `device` cannot be moved, if anything.
fn immovable(dir: &Path, device: u64) -> io::Result<Option<String>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, there) = (entry.path(), entry.metadata()?);
        if there.is_dir() {
            if there.dev() != device {
                return Ok(Some(format!("a mount ({})", path.display())));
            }
            if let Some(found) = immovable(&path, device)? {
                return Ok(Some(found));
            }
        } else if !there.is_file() && !there.is_symlink() {
            let what = "something that is no file, directory or link";
            return Ok(Some(format!("{what} ({})", path.display())));
        }
    }
    Ok(None)
}

/// A copy of a directory into another, where what is there already stays. Owners are kept as far as this
/// user may; extended attributes are not.
#[derive(Debug, Default)]
struct Copy {
    made: Vec<PathBuf>,
    /// Files with several names, and the first of each that was copied.
    names: HashMap<(u64, u64), PathBuf>,
}

impl Copy {
    fn all(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let old = fs::symlink_metadata(from)?;
        let is_new = match fs::symlink_metadata(to) {
            Ok(there) if there.is_dir() && old.is_dir() => false,
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        if is_new {
            self.made.push(to.to_owned());
        }
        if old.is_dir() {
            if is_new {
                fs::create_dir(to)?;
            }
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                self.all(&entry.path(), &to.join(entry.file_name()))?;
            }
        } else if old.is_symlink() {
            symlink(fs::read_link(from)?, to)?;
        } else if let Some(first) = self.names.get(&(old.dev(), old.ino())) {
            return fs::hard_link(first, to);
        } else {
            fs::copy(from, to)?;
            if old.nlink() > 1 {
                self.names.insert((old.dev(), old.ino()), to.to_owned());
            }
        }
        if is_new { dress(to, &old) } else { Ok(()) }
    }

    fn undo(&self) {
        for made in self.made.iter().rev() {
            let _ = fs::remove_file(made).or_else(|_| fs::remove_dir(made));
        }
    }
}

/// Gives a copy the owner, mode and times of what it was made of.
fn dress(copy: &Path, of: &Metadata) -> io::Result<()> {
    let _ = lchown(copy, Some(of.uid()), Some(of.gid()));
    if of.is_symlink() {
        return Ok(());
    }
    // Opened before its mode may forbid that.
    let file = File::open(copy)?;
    file.set_permissions(of.permissions())?;
    let times = FileTimes::new().set_accessed(of.accessed()?);
    file.set_times(times.set_modified(of.modified()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;
    use std::time::{Duration, SystemTime};

    use super::*;

    /// A place with `cache`, a cache, in `job`, a job volume.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(place.at("job/cache")).unwrap();
            place
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().canonicalize().unwrap().join(path)
        }

        /// Makes `paths` links to the cache, if nothing is in the way.
        fn links(&self, paths: &[&str]) -> Result<(), String> {
            let paths: Vec<_> = paths.iter().map(|path| self.at(path)).collect();
            let made = links(&paths, &self.at("job/cache"), &self.at("job")).and_then(|links| {
                for link in &links {
                    link.check()?;
                }
                links.iter().try_for_each(Link::make)
            });
            made.map_err(|why| why.to_string())
        }

        fn write(&self, path: &str, text: &str) {
            fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
            fs::write(self.at(path), text).unwrap();
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.at(path)).unwrap_or_default()
        }
    }

    #[test]
    fn links_to_a_cache() {
        let place = Place::new();
        // Nothing there, its parents neither; then the link is.
        for _ in 0..2 {
            place.links(&["home/.cargo/registry"]).unwrap();
            assert_eq!(
                fs::read_link(place.at("home/.cargo/registry")).unwrap(),
                place.at("job/cache")
            );
        }
        // An empty directory.
        fs::create_dir(place.at("empty")).unwrap();
        place.links(&["empty/."]).unwrap();
        assert!(place.at("empty").is_symlink());
        // One with content: what was restored stays.
        place.write("job/cache/old", "restored");
        place.write("job/cache/sub/old", "restored");
        place.write("job/cache/dir/x", "restored");
        symlink("old", place.at("job/cache/link")).unwrap();
        place.write("full/old", "lost");
        place.write("full/sub/old", "lost");
        place.write("full/sub/new", "moved");
        place.write("full/dir", "a file, where a directory was restored");
        place.write("full/link/x", "a directory, where a link was restored");
        place.write("full/more/.hidden", "moved");
        fs::set_permissions(
            place.at("full/more/.hidden"),
            fs::Permissions::from_mode(0o400),
        )
        .unwrap();
        fs::set_permissions(place.at("full/more"), fs::Permissions::from_mode(0o2500)).unwrap();
        fs::hard_link(place.at("full/sub/new"), place.at("full/twin")).unwrap();
        symlink("../nowhere", place.at("full/more-link")).unwrap();
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for name in ["full/sub/new", "full/more"] {
            File::open(place.at(name))
                .unwrap()
                .set_modified(then)
                .unwrap();
        }
        place.links(&["full"]).unwrap();
        assert_eq!(
            fs::read_link(place.at("full")).unwrap(),
            place.at("job/cache")
        );
        for (path, want) in [
            ("full/old", "restored"),
            ("full/sub/old", "restored"),
            ("full/sub/new", "moved"),
            ("full/twin", "moved"),
            ("full/dir/x", "restored"),
            ("full/link", "restored"),
            ("full/more/.hidden", "moved"),
        ] {
            assert_eq!(place.read(path), want, "{path}");
        }
        let metadata = |path| fs::symlink_metadata(place.at(path)).unwrap();
        assert_eq!(metadata("full/twin").ino(), metadata("full/sub/new").ino());
        assert_eq!(metadata("full/more").mode() & 0o7777, 0o2500);
        assert_eq!(metadata("full/more/.hidden").mode() & 0o7777, 0o400);
        assert_eq!(
            fs::read_link(place.at("full/more-link")).unwrap(),
            Path::new("../nowhere")
        );
        for path in ["full/more", "full/sub/new"] {
            assert_eq!(metadata(path).modified().unwrap(), then, "{path}");
        }
        let left = fs::read_dir(place.at(".")).unwrap().count();
        assert_eq!(left, 4, "job, home, empty, full, and nothing half-made");
    }

    #[test]
    fn links_to_directories_of_a_cache() {
        let place = Place::new();
        place.write("job/cache/1-git/x", "restored");
        place.write("git/x", "lost");
        place.write("bin/y", "moved");
        fs::set_permissions(place.at("bin"), fs::Permissions::from_mode(0o700)).unwrap();
        place.links(&["a/registry", "git", "bin"]).unwrap();
        for (path, to) in [
            ("a/registry", "0-registry"),
            ("git", "1-git"),
            ("bin", "2-bin"),
        ] {
            let to = place.at("job/cache").join(to);
            assert_eq!(fs::read_link(place.at(path)).unwrap(), to);
            assert!(fs::symlink_metadata(to).unwrap().is_dir());
        }
        assert_eq!(place.read("git/x"), "restored");
        assert_eq!(place.read("bin/y"), "moved");
        assert_eq!(fs::metadata(place.at("bin")).unwrap().mode() & 0o777, 0o700);
        // A cache that has something else there leads nowhere.
        let place = Place::new();
        symlink("/etc", place.at("job/cache/0-a")).unwrap();
        let why = place.links(&["a", "b"]).unwrap_err();
        assert!(why.contains("0-a"), "{why}");
    }

    #[test]
    fn paths_that_stay_as_they_are() {
        let place = Place::new();
        place.write("file", "file");
        place.write("with-socket/x", "x");
        symlink("file", place.at("link")).unwrap();
        symlink("job", place.at("link-to-job")).unwrap();
        let _socket = UnixListener::bind(place.at("with-socket/socket")).unwrap();
        for (paths, words) in [
            (&["file"][..], "not a directory"),
            (&["link"], "is a link to file"),
            (&["with-socket"], "no file, directory or link"),
            (&["fresh", "file"], "not a directory"),
            (&["file/x"], "Not a directory"),
            (&["job"], "job volume"),
            (&["job/x"], "job volume"),
            (&["link-to-job/new/x"], "job volume"),
            (&["new/../../x"], ".. after"),
            (&["job/.."], "end in a name"),
            (&[""], "job volume"),
            (&["a", "b", "a/c"], "a link too"),
            (&["a/b/c", "a/b"], "a link too"),
        ] {
            let why = place.links(paths).expect_err(&format!("{paths:?}"));
            assert!(why.contains(words), "{paths:?}: {why}");
        }
        assert!(
            !place.at("fresh").exists(),
            "refused before anything is done"
        );
        assert_eq!(place.read("with-socket/x"), "x");
        assert_eq!(fs::read_dir(place.at("job/cache")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(place.at(".")).unwrap().count(), 5);
        assert!(resolved(Path::new("/")).is_err());
    }
}
