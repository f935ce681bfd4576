//! An artifact is code. It is loaded only from where no stranger can have written it.
//!
//! A stranger is every user but the one who runs the program and root. A file or folder is trusted if one of these two
//! owns it and nobody else may write to it, and if the same holds for every folder on the way to it, since who may write
//! to a folder may put something else in a place there. Two things are allowed nevertheless:
//!
//! - the owner's private group may write: his primary group, if it has his name and no other member, as many systems give
//!   each user one;
//! - a folder on the way, such as `/tmp`, may be open to all if it is sticky: there only an entry's owner replaces it.
//!
//! The way is resolved once and then checked from the root down, so that from each folder on nobody can change what was
//! checked before; what is opened afterwards is the resolved path.

use std::io;
use std::path::{Path, PathBuf};

/// What is loaded, which decides how to mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Artifact,
    Cache,
}

/// Somebody else may have written what would be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` {why}, and what is loaded from there is code, which runs with your rights: {mend}", path.display())]
pub struct Stranger {
    pub path: PathBuf,
    pub why: String,
    pub mend: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error(transparent)]
    Stranger(#[from] Stranger),
    #[error(transparent)]
    Unreadable(#[from] io::Error),
}

/// The path without symbolic links, if what is there is trusted.
pub fn trusted(path: &Path, what: What) -> Result<PathBuf, TrustError> {
    let resolved = path.canonicalize()?;
    within(&resolved, &resolved, what)?;
    Ok(resolved)
}

/// The file `name` of an artifact whose folder is trusted and resolved.
pub fn trusted_file(artifact: &Path, name: &str) -> Result<PathBuf, TrustError> {
    let resolved = artifact.join(name).canonicalize()?;
    within(&resolved, artifact, What::Artifact)?;
    Ok(resolved)
}

#[cfg(not(unix))]
fn within(_: &Path, _: &Path, _: What) -> Result<(), TrustError> {
    Ok(())
}

/// Checks everything on a resolved path. `whole`: what a mend is to change as a whole, if the fault lies in there.
#[cfg(unix)]
fn within(path: &Path, whole: &Path, what: What) -> Result<(), TrustError> {
    use std::os::unix::fs::MetadataExt;

    let me = nix::unistd::geteuid().as_raw();
    let mut way: Vec<&Path> = path.ancestors().collect();
    way.reverse();
    for place in way {
        let found = place.symlink_metadata()?;
        let last = place == path;
        let wanted = if last { found.is_dir() || found.is_file() } else { found.is_dir() };
        if !wanted {
            return Err(io::Error::other(format!("`{}` has changed, or is no file", place.display())).into());
        }
        let (owner, mode) = (found.uid(), found.mode());
        let sticky = !last && mode & 0o1000 != 0;
        let others = mode & 0o002 != 0 && !sticky;
        let group = mode & 0o020 != 0 && !sticky && !private(place, owner, found.gid());
        let why = match (owner == 0 || owner == me, others, group) {
            (true, false, false) => continue,
            (false, ..) => format!("belongs to {}", user(owner)),
            (true, true, _) => "may be written by everyone".to_string(),
            (true, false, true) => format!("may be written by the group {}", group_name(found.gid())),
        };
        let mine = me == 0 || owner == me;
        let all = if place.starts_with(whole) { Some(whole) } else { None };
        return Err(Stranger { path: place.into(), why, mend: mend(place, all, what, mine, owner == me) }.into());
    }
    Ok(())
}

/// The group is its user's own, and no list of further users stands beside it.
#[cfg(unix)]
fn private(path: &Path, owner: u32, gid: u32) -> bool {
    use nix::unistd::{Gid, Group, Uid, User};

    let (Ok(Some(user)), Ok(Some(group))) = (User::from_uid(Uid::from_raw(owner)), Group::from_gid(Gid::from_raw(gid)))
    else {
        return false;
    };
    user.gid.as_raw() == gid
        && group.name == user.name
        && group.mem.iter().all(|member| *member == user.name)
        && !has_access_list(path)
}

/// Users named in an access list (`setfacl`) write with the group's bit.
#[cfg(unix)]
fn has_access_list(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::io::Errno;
        let list = rustix::fs::lgetxattr(path, c"system.posix_acl_access", &mut [0u8; 4096][..]);
        !matches!(list, Err(Errno::NODATA | Errno::NOTSUP))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        false
    }
}

#[cfg(unix)]
fn user(uid: u32) -> String {
    let known = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    known.map_or(format!("user {uid}"), |user| format!("user {uid} ({})", user.name))
}

#[cfg(unix)]
fn group_name(gid: u32) -> String {
    let known = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(gid)).ok().flatten();
    known.map_or(gid.to_string(), |group| format!("{gid} ({})", group.name))
}

/// The command that mends a fault at `place`, which lies in `whole` or on the way to it. `mine`: its mode may be changed;
/// `owned`: it is only the mode.
#[cfg(unix)]
fn mend(place: &Path, whole: Option<&Path>, what: What, mine: bool, owned: bool) -> String {
    let at = quoted(whole.unwrap_or(place));
    let deep = if whole.is_some() { "-R " } else { "" };
    match (what, mine, owned) {
        (_, true, true) => format!("mend it with `chmod {deep}go-w {at}`"),
        (What::Cache, true, false) if whole.is_some() => format!("remove it with `rm -r {at}`; it is made anew"),
        (_, true, false) => {
            format!("if you trust it, make it yours with `chown {deep}root {at} && chmod {deep}go-w {at}`")
        }
        (What::Cache, false, _) => {
            "set PEFTC_CACHE to a folder of your own, such as `export PEFTC_CACHE=~/.peftc`".into()
        }
        (What::Artifact, false, _) => match whole.and_then(Path::file_name) {
            Some(name) => {
                format!("if you trust it, take a copy of your own with `cp -r {at} ~/{}`", quoted(Path::new(name)))
            }
            None => "if you trust it, copy the artifact to a folder of your own".into(),
        },
    }
}

/// The path as a shell reads it.
#[cfg(unix)]
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
