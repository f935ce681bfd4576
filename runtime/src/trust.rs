//! Trust in files that hold code. An artifact is machine code, so it is loaded only from where no other user can have
//! written it.
//!
//! A file or folder is trusted if the user who runs the program or root owns it and nobody else may write to it, and if
//! the same holds for every folder on the path to it, since whoever may write to a folder may replace what is in it.
//! There are two exceptions:
//!
//! - the owner's private group may write: the primary group, if it has the owner's name and no other member, as many
//!   systems create for each user;
//! - a folder on the path, such as `/tmp`, may be writable by all if it is sticky, because there only the owner of an
//!   entry can replace it.
//!
//! The path is resolved once and then checked from the root down, so that nobody can change what was checked before;
//! what is opened afterwards is the resolved path.

use std::io;
use std::path::{Path, PathBuf};

/// What is loaded, which decides how to fix a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustSubject {
    /// An artifact that the user named.
    Artifact,
    /// The program's own cache.
    Cache,
}

/// The error for code that another user may have written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` {why}, and what is loaded from there is code, which runs with your rights: {remedy}", path.display())]
pub struct Untrusted {
    /// The file or folder that is not trusted.
    pub path: PathBuf,
    /// The owner or the permission that is wrong, to follow the path.
    pub why: String,
    /// How to fix it.
    pub remedy: String,
}

/// Why a path is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Another user may have written it.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// Its owner or permissions cannot be read.
    #[error(transparent)]
    Unreadable(#[from] io::Error),
}

/// Resolves symbolic links and checks that what is at `path` is trusted.
///
/// # Errors
///
/// If it is not trusted or cannot be read.
pub fn trusted(path: &Path, what: TrustSubject) -> Result<PathBuf, TrustError> {
    let resolved = path.canonicalize()?;
    check_path(&resolved, &resolved, what)?;
    Ok(resolved)
}

/// Resolves and checks the file `name` of an artifact whose folder is resolved and trusted.
///
/// # Errors
///
/// If the file is not trusted or cannot be read.
pub fn trusted_file(artifact: &Path, name: &str) -> Result<PathBuf, TrustError> {
    let resolved = artifact.join(name).canonicalize()?;
    check_path(&resolved, artifact, TrustSubject::Artifact)?;
    Ok(resolved)
}

#[cfg(not(unix))]
fn check_path(_: &Path, _: &Path, _: TrustSubject) -> Result<(), TrustError> {
    Ok(())
}

/// Checks every component of a resolved path. A problem inside `whole` is to be fixed for all of `whole`.
#[cfg(unix)]
fn check_path(path: &Path, whole: &Path, what: TrustSubject) -> Result<(), TrustError> {
    use std::os::unix::fs::MetadataExt;

    let me = nix::unistd::geteuid().as_raw();
    let mut components: Vec<&Path> = path.ancestors().collect();
    components.reverse();
    for component in components {
        let found = component.symlink_metadata()?;
        let last = component == path;
        let wanted = if last { found.is_dir() || found.is_file() } else { found.is_dir() };
        if !wanted {
            return Err(io::Error::other(format!("`{}` has changed, or is no file", component.display())).into());
        }
        let (owner, mode) = (found.uid(), found.mode());
        let sticky = !last && mode & 0o1000 != 0;
        let others = mode & 0o002 != 0 && !sticky;
        let group = mode & 0o020 != 0 && !sticky && !is_private_group(component, owner, found.gid());
        let why = match (owner == 0 || owner == me, others, group) {
            (true, false, false) => continue,
            (false, ..) => format!("belongs to {}", user(owner)),
            (true, true, _) => "may be written by everyone".to_string(),
            (true, false, true) => format!("may be written by the group {}", group_name(found.gid())),
        };
        let mine = me == 0 || owner == me;
        let all = if component.starts_with(whole) { Some(whole) } else { None };
        return Err(
            Untrusted { path: component.into(), why, remedy: remedy(component, all, what, mine, owner == me) }.into()
        );
    }
    Ok(())
}

/// True if the group is the owner's private group and no access list names further users.
#[cfg(unix)]
fn is_private_group(path: &Path, owner: u32, gid: u32) -> bool {
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

/// True if the file has an access list (`setfacl`); users named there write with the group's permission bit.
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

/// The command that fixes a problem at `component`, which is in `whole` or on the path to it. `mine`: the user may change
/// its permissions; `owned`: the user owns it, so only the permissions are wrong.
#[cfg(unix)]
fn remedy(component: &Path, whole: Option<&Path>, what: TrustSubject, mine: bool, owned: bool) -> String {
    let at = quoted(whole.unwrap_or(component));
    let deep = if whole.is_some() { "-R " } else { "" };
    match (what, mine, owned) {
        (_, true, true) => format!("mend it with `chmod {deep}go-w {at}`"),
        (TrustSubject::Cache, true, false) if whole.is_some() => {
            format!("remove it with `rm -r {at}`; it is made again when it is needed")
        }
        (_, true, false) => {
            format!("if you trust it, make it yours with `chown {deep}root {at} && chmod {deep}go-w {at}`")
        }
        (TrustSubject::Cache, false, _) => {
            "set PEFTC_CACHE to a folder of your own, such as `export PEFTC_CACHE=~/.peftc`".into()
        }
        (TrustSubject::Artifact, false, _) => match whole.and_then(Path::file_name) {
            Some(name) => {
                format!("if you trust it, take a copy of your own with `cp -r {at} ~/{}`", quoted(Path::new(name)))
            }
            None => "if you trust it, copy the artifact to a folder of your own".into(),
        },
    }
}

/// The path, quoted for a shell if necessary.
#[cfg(unix)]
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
