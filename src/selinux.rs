// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SELinux: the one label that all has which containers see.
//!
//! Everything of ours that a container sees is mounted with the mount option `context=`: one label for
//! the whole tree, whatever is stored in it. So nothing is ever relabelled, and nothing takes longer the more
//! there is in a cache.
//!
//! Which label: what the configuration says, or what the container engine itself gives to containers'
//! files. That is in a file of the policy's, which go-selinux (and so Podman) looks for first at
//! [`CONTEXTS`], where container-selinux puts it, and then at `/etc/selinux/TYPE/contexts/lxc_contexts`.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;

/// Where container-selinux puts what go-selinux reads first (`contextFile` of selinux_linux.go).
pub const CONTEXTS: &str = "/usr/share/containers/selinux/contexts";

/// Where policies are, each in a directory of its name.
const POLICIES: &str = "/etc/selinux";

/// The file system that the kernel tells of SELinux by.
const SELINUXFS: &str = "/sys/fs/selinux";

/// What statfs(2) says of it (linux/magic.h).
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;

/// What a process's label is as long as no policy was loaded (libselinux's `is_selinux_enabled` asks the same).
const NO_POLICY: &str = "kernel";

/// A label of SELinux, such as `system_u:object_r:container_file_t:s0`: well formed, not necessarily one
/// that the policy knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label(String);

impl Label {
    /// It, as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fields = text.split(':').take_while(|field| !field.is_empty());
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.,:".contains(&byte);
        if fields.count() >= 3 && text.bytes().all(plain) && text.len() < 4096 {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is not a label: write one such as \"system_u:object_r:container_file_t:s0\", or \"none\""
            ))
        }
    }
}

/// What the configuration says of labels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Setting {
    /// What the policy says of containers' files.
    #[default]
    Policy,
    /// Nothing is labelled.
    None,
    /// This label.
    Label(Label),
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            text => text.parse().map(Self::Label),
        }
    }
}

/// The labels of containers, as the policy's file has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contexts {
    /// The file that they are from.
    pub path: PathBuf,
    /// Of their files.
    pub file: Option<Label>,
    /// Of their processes.
    pub process: Option<Label>,
}

impl Contexts {
    /// What this host's policy says.
    ///
    /// # Errors
    /// When no file says it: which were looked for, and what the operating system said of the last.
    pub fn of_host() -> Result<Self, String> {
        Self::below(Path::new("/"))
    }

    fn below(root: &Path) -> Result<Self, String> {
        let inside = |path: &str| root.join(path.trim_start_matches('/'));
        let failed = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
        let mut path = inside(CONTEXTS);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let config = inside(POLICIES).join("config");
                let text = fs::read_to_string(&config).map_err(|e| failed(&config, e))?;
                let name = policy_name(&text)
                    .ok_or_else(|| format!("{} names no SELINUXTYPE", config.display()))?;
                path = inside(POLICIES).join(name).join("contexts/lxc_contexts");
                fs::read_to_string(&path)
            }
            other => other,
        };
        let text = text.map_err(|e| failed(&path, e))?;
        Ok(Self::parse(path, &text))
    }

    fn parse(path: PathBuf, text: &str) -> Self {
        let label = |key| value(text, key)?.parse().ok();
        Self {
            path,
            file: label("file"),
            process: label("process"),
        }
    }
}

/// The policy's name in the text of /etc/selinux/config.
fn policy_name(text: &str) -> Option<&str> {
    // It is a directory's name.
    value(text, "SELINUXTYPE").filter(|name| !name.contains('/') && !name.starts_with('.'))
}

/// The value of `KEY = "VALUE"`, with or without spaces and quotes; of several the first one that has any.
/// Lines that begin with `#` or `;` are comments.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with(['#', ';']))
        .filter_map(|line| line.split_once('='))
        .find(|(name, value)| name.trim() == key && !value.trim().is_empty())
        .map(|(_, value)| value.trim().trim_matches('"'))
        .filter(|value| !value.is_empty())
}

/// Whether SELinux is on, in the kernel and with a policy: only then can anything be labelled.
#[must_use]
pub fn is_on() -> bool {
    let mounted = rustix::fs::statfs(SELINUXFS)
        .is_ok_and(|stat| u64::try_from(stat.f_type).is_ok_and(|magic| magic == SELINUX_MAGIC));
    let current = || fs::read_to_string("/proc/thread-self/attr/current");
    mounted && current().is_ok_and(|label| label.trim_end_matches(['\0', '\n']) != NO_POLICY)
}

/// Whether it refuses, and does not only tell; `None`: that cannot be read.
#[must_use]
pub fn is_enforcing() -> Option<bool> {
    let text = fs::read_to_string(Path::new(SELINUXFS).join("enforce")).ok()?;
    Some(text.trim() != "0")
}

/// Asks the kernel whether the policy that is loaded knows `label`.
///
/// # Errors
/// EINVAL where it does not, or what else the kernel says.
pub fn check(label: &Label) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .open(Path::new(SELINUXFS).join("context"))?;
    file.write_all(label.0.as_bytes())
}

/// What is labelled how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Labels {
    /// Every mount that containers see. `None`: mounts say nothing of labels.
    pub mounts: Option<Label>,
    /// Sockets that containers connect to.
    pub sockets: Option<Label>,
}

/// There is no label to be had, with SELinux on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The configuration's is none of the policy's.
    #[error("selinux-context: the loaded policy does not know {0}")]
    Unknown(Label),
    /// The policy says nothing of containers, or what it does not know itself.
    #[error("{0}")]
    Policy(String),
}

impl Labels {
    /// What is to be labelled on this host, with this setting. Nothing where SELinux is off.
    ///
    /// # Errors
    /// See [`LabelError`].
    pub fn of_host(setting: &Setting) -> Result<Self, LabelError> {
        if *setting == Setting::None || !is_on() {
            return Ok(Self::default());
        }
        let contexts = Contexts::of_host();
        let known = |label: &Label| check(label).is_ok();
        // Of no use to confined containers without it, and none to anybody with a wrong one.
        let sockets = contexts.as_ref().ok().and_then(|c| c.process.clone());
        let sockets = sockets.filter(known);
        let mounts = match setting {
            Setting::Label(label) if known(label) => label.clone(),
            Setting::Label(label) => return Err(LabelError::Unknown(label.clone())),
            Setting::Policy | Setting::None => {
                let Contexts { path, file, .. } = contexts.map_err(LabelError::Policy)?;
                let file = file.ok_or_else(|| {
                    LabelError::Policy(format!("{}: it has no line file = …", path.display()))
                })?;
                if !known(&file) {
                    let why = format!(
                        "{}: the policy that is loaded does not know {file}",
                        path.display()
                    );
                    return Err(LabelError::Policy(why));
                }
                file
            }
        };
        Ok(Self {
            mounts: Some(mounts),
            sockets,
        })
    }
}

/// This process's. One for all that it does, as two mounts of one file system must not have different ones:
/// all that mounts (the daemon, and a command beside it) takes its label here.
static LABELS: OnceLock<Labels> = OnceLock::new();

/// Has everything labelled from now on as `setting` says. Once in a process's life, before anything is
/// mounted; what comes later changes nothing.
///
/// # Errors
/// [`LabelError::Unknown`]. Where the policy has no label, nothing is labelled, and the log says so.
pub fn begin(setting: &Setting) -> Result<(), LabelError> {
    let labels = match Labels::of_host(setting) {
        Ok(labels) => labels,
        Err(error @ LabelError::Unknown(_)) => return Err(error),
        Err(error) => {
            tracing::warn!(%error, "SELinux is on, but has no label for caches: confined containers cannot use them (see `lvm-cache-friend doctor`)");
            Labels::default()
        }
    };
    if let Some(label) = &labels.mounts {
        tracing::info!(%label, "SELinux is on: caches are mounted with this label");
    }
    let _ = LABELS.set(labels);
    Ok(())
}

/// The label of every mount that containers see, if it has any.
#[must_use]
pub fn mount_label() -> Option<&'static Label> {
    LABELS.get()?.mounts.as_ref()
}

/// Runs `make`, in which sockets are made that containers connect to. Connecting is checked twice, against the
/// label of the socket's file and against that of the socket itself, which is its maker's if nothing is said:
/// a confined container may connect to its own kind alone.
pub fn with_socket_label<T>(make: impl FnOnce() -> T) -> T {
    let label = LABELS.get().and_then(|labels| labels.sockets.as_ref());
    let Some(label) = label else { return make() };
    if let Err(error) = set_socket_label(label.as_str()) {
        tracing::warn!(%label, %error, "cannot label a job volume's socket: confined containers cannot connect to it");
        return make();
    }
    let made = make();
    if let Err(error) = set_socket_label("") {
        // This thread's next socket has it too; a thread that makes some serves jobs alone.
        tracing::warn!(%error, "cannot reset the label for sockets");
    }
    made
}

/// Which label sockets get that this thread makes; an empty one: its own.
fn set_socket_label(label: &str) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .open("/proc/thread-self/attr/sockcreate")?;
    // One write(2), also of nothing: that takes a label back.
    file.write(label.as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "system_u:object_r:container_file_t:s0";

    #[test]
    fn labels() {
        for good in [
            LABEL,
            "system_u:object_r:container_file_t:s0:c1,c2",
            "user:role:type",
            "u:r:t:s0-s15:c0.c1023",
        ] {
            assert_eq!(good.parse::<Label>().expect(good).as_str(), good);
        }
        for bad in [
            "",
            "container_file_t",
            "a:b",
            "a::b:c",
            "a:b:c d",
            "a:b:c\"",
            "a:b:c\n",
            "a:b:\u{e9}",
        ] {
            let why = bad.parse::<Label>().expect_err(bad);
            assert!(why.contains("container_file_t"), "{why}");
        }
        assert_eq!("none".parse(), Ok(Setting::None));
        assert_eq!(LABEL.parse(), Ok(Setting::Label(Label(LABEL.into()))));
    }

    #[test]
    fn policy_names() {
        for (text, want) in [
            ("SELINUX=permissive\nSELINUXTYPE=default\n", Some("default")),
            (
                "# SELINUXTYPE=mls\n  SELINUXTYPE = targeted  \n",
                Some("targeted"),
            ),
            (
                ";SELINUXTYPE=mls\nSELINUXTYPE=\"targeted\"",
                Some("targeted"),
            ),
            ("SELINUXTYPE=\nSELINUXTYPE=mls", Some("mls")),
            ("SELINUXTYPES=mls\nSELINUX=enforcing", None),
            ("SELINUXTYPE=\"\"", None),
            ("SELINUXTYPE=../shadow", None),
            ("", None),
        ] {
            assert_eq!(policy_name(text), want, "{text:?}");
        }
    }

    #[test]
    fn contexts() {
        let parse = |text| Contexts::parse("x".into(), text);
        let label = |text: &str| Some(Label(text.to_owned()));
        let of = |file, process| Contexts {
            path: "x".into(),
            file,
            process,
        };
        let process = "system_u:system_r:container_t:s0";
        for (text, want) in [
            (
                // Debian's, and as Fedora's container-selinux writes it.
                "process = \"system_u:system_r:container_t:s0\"\n\
                 content = \"system_u:object_r:virt_var_lib_t:s0\"\n\
                 file = \"system_u:object_r:container_file_t:s0\"\n\
                 ro_file=\"system_u:object_r:container_ro_file_t:s0\"\n",
                of(label(LABEL), label(process)),
            ),
            (
                "file=system_u:object_r:container_file_t:s0",
                of(label(LABEL), None),
            ),
            ("#file=\"a:b:c\"\nro_file=\"a:b:d\"", of(None, None)),
            ("file=\"no label\"\nprocess=a:b:c", of(None, label("a:b:c"))),
            ("", of(None, None)),
        ] {
            assert_eq!(parse(text), want, "{text:?}");
        }
    }

    #[test]
    fn where_contexts_are_looked_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("it has one")).expect("made");
            fs::write(&path, text).expect("written");
            path
        };
        let problem = |words: &str| {
            let why = Contexts::below(root).expect_err(words);
            assert!(why.contains(words), "{why}");
        };
        problem("etc/selinux/config");
        put("etc/selinux/config", "SELINUX=enforcing");
        problem("SELINUXTYPE");
        put("etc/selinux/config", "SELINUXTYPE=targeted");
        problem("etc/selinux/targeted/contexts/lxc_contexts");
        let path = put("etc/selinux/targeted/contexts/lxc_contexts", "file=a:b:lxc");
        let found = Contexts::below(root).expect("the policy's");
        assert_eq!(
            (found.path, found.file),
            (path, Some(Label("a:b:lxc".into())))
        );
        // What Podman reads first.
        let path = put("usr/share/containers/selinux/contexts", "file=a:b:podman");
        let found = Contexts::below(root).expect("container-selinux's");
        assert_eq!(
            (found.path, found.file),
            (path, Some(Label("a:b:podman".into())))
        );
    }
}
