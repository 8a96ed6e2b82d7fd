// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration's table `[supervise]`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::github::group::Group;
use super::github::{Auth, Owner, Url, check_api};
use super::scope::{Rule, Template, Values, default_rules};
use super::secret::Source;
use super::slot::{Bounds, LOOK};
use crate::cache::spec::{Admit, Kind as VolumeKind, Publish, Spec};
use crate::cache::units::Bytes;
use crate::config::{ConfigError, RUN_DIR, duration};

/// Longest name of a pool: a runner's has at most 64 characters at GitHub.
const MAX_NAME: usize = 40;

/// Most slots of a pool.
const MAX_SLOTS: usize = 1000;

/// The supervisor's settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Supervise {
    /// The socket of `podman system service`.
    #[serde(default = "podman_socket")]
    pub podman_socket: PathBuf,
    /// Where `runners` finds the supervisor.
    #[serde(default = "control_socket")]
    pub control_socket: PathBuf,
    /// How long running jobs are waited for at the end.
    #[serde(default = "drain_timeout", deserialize_with = "duration")]
    pub drain_timeout: Duration,
    /// The pools, one at least.
    #[serde(rename = "pool", deserialize_with = "pools")]
    pub pools: Vec<Pool>,
}

fn podman_socket() -> PathBuf {
    "/run/podman/podman.sock".into()
}

fn control_socket() -> PathBuf {
    Path::new(RUN_DIR).join("runners.sock")
}

const fn drain_timeout() -> Duration {
    Duration::from_secs(3600)
}

/// How many runners a pool has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Size {
    /// So many, each of which waits for a job.
    Fixed(usize),
    /// As a scale set says.
    ScaleSet(ScaleSet),
}

/// A scale set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScaleSet {
    /// Its name, which `runs-on` names.
    pub name: String,
    /// So many runners wait for a job.
    #[serde(default)]
    pub min: usize,
    /// There are so many at most.
    pub max: usize,
}

/// Runners of one kind.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "PoolText")]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Whose runners they are.
    pub url: Url,
    /// The REST API's address, where it does not follow from that.
    pub api: Option<String>,
    /// How we say who we are.
    pub auth: Auth,
    /// How many there are.
    pub size: Size,
    /// The runner group.
    pub group: Group,
    /// The runners' labels.
    pub labels: Vec<String>,
    /// How long things may take.
    pub bounds: Bounds,
    /// The container.
    pub container: ContainerText,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Which scopes a job's caches have.
    pub rules: Vec<Rule>,
}

/// A container, as the configuration describes it: what may be set, and nothing else.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ContainerText {
    /// Its image.
    #[serde(deserialize_with = "some_text")]
    pub image: String,
    /// When its image is pulled.
    #[serde(default)]
    pub pull: Pull,
    /// Its command, if not the image's.
    #[serde(default)]
    pub command: Vec<String>,
    /// Variables; nothing secret, for jobs see them.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Most memory.
    #[serde(default, deserialize_with = "bytes")]
    pub memory: Option<Bytes>,
    /// Most processors.
    #[serde(default, deserialize_with = "cpus")]
    pub cpus: Option<f64>,
    /// Most processes.
    pub pids: Option<u32>,
    /// Its network.
    pub network: Option<Network>,
    /// Its user namespace: `host`, `auto`, or `auto:size=131072`.
    pub userns: Option<Userns>,
    /// Its root is read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Directories in memory.
    #[serde(default, deserialize_with = "paths")]
    pub tmpfs: Vec<String>,
    /// Devices of the host.
    #[serde(default, deserialize_with = "paths")]
    pub devices: Vec<String>,
    /// Capabilities beyond Podman's own.
    #[serde(default)]
    pub cap_add: Vec<String>,
    /// Paths of /proc and /sys that are not hidden; `ALL`.
    #[serde(default)]
    pub unmask: Vec<String>,
    /// SELinux's options, such as `disable`.
    #[serde(default)]
    pub selinux: Vec<String>,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// When it is not there.
    #[default]
    Missing,
    /// And when the registry has another one.
    Newer,
    /// By somebody else.
    Never,
}

/// A container's network, by Podman's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A bridge.
    Bridge,
    /// The host's.
    Host,
    /// None.
    None,
    /// Podman's default for its user.
    Private,
    /// In user space.
    Slirp4netns,
    /// In user space.
    Pasta,
}

/// A container's user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Userns {
    /// The host's.
    Host,
    /// One of its own with so many ids; 0: as many as the image needs.
    Auto(u32),
}

impl TryFrom<String> for Userns {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let size = || text.strip_prefix("auto:size=")?.parse().ok();
        match text.as_str() {
            "host" => Ok(Self::Host),
            "auto" => Ok(Self::Auto(0)),
            _ => size().map(Self::Auto).ok_or_else(|| {
                format!("{text:?} is no user namespace: write host, auto, or auto:size=131072")
            }),
        }
    }
}

/// A volume of each runner.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Volume {
    /// Its name, after the runner's.
    #[serde(deserialize_with = "volume_name")]
    pub name: String,
    /// Where it is in the container.
    #[serde(deserialize_with = "path")]
    pub target: String,
    /// The driver's options, with placeholders.
    #[serde(default)]
    pub options: BTreeMap<String, Template>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct PoolText {
    #[serde(deserialize_with = "pool_name")]
    name: String,
    url: Url,
    #[serde(default, deserialize_with = "api_url")]
    api_url: Option<String>,
    token: Option<Source>,
    app: Option<App>,
    #[serde(default, deserialize_with = "count")]
    count: Option<usize>,
    scale_set: Option<ScaleSet>,
    #[serde(default)]
    group: Group,
    #[serde(default)]
    labels: Vec<String>,
    #[serde(default = "registration_timeout", deserialize_with = "duration")]
    registration_timeout: Duration,
    #[serde(default = "job_timeout", deserialize_with = "duration")]
    job_timeout: Duration,
    #[serde(default = "max_idle", deserialize_with = "duration")]
    max_idle: Duration,
    container: ContainerText,
    #[serde(default, rename = "volume")]
    volumes: Vec<Volume>,
    #[serde(default = "default_rules", rename = "scope")]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct App {
    id: u64,
    installation: u64,
    key: Source,
}

const fn registration_timeout() -> Duration {
    Duration::from_secs(300)
}

const fn job_timeout() -> Duration {
    Duration::from_secs(6 * 3600)
}

const fn max_idle() -> Duration {
    Duration::from_secs(12 * 3600)
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

// Each refuses a value where it stands, so that the error names its line.

/// A value that is right; else the error says what is.
fn right<'de, T: Deserialize<'de> + fmt::Debug, D: Deserializer<'de>>(
    deserializer: D,
    is_right: impl Fn(&T) -> bool,
    what: &str,
) -> Result<T, D::Error> {
    let value = T::deserialize(deserializer)?;
    if is_right(&value) {
        Ok(value)
    } else {
        Err(D::Error::custom(format!("{value:?}: {what}")))
    }
}

fn pool_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_right = |name: &String| {
        (1..=MAX_NAME).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('-')
    };
    let what = format!("a pool's name has lower-case letters, digits and -, at most {MAX_NAME}");
    right(deserializer, is_right, &what)
}

fn volume_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let is_right = |name: &String| !name.is_empty() && name.chars().all(plain);
    right(
        deserializer,
        is_right,
        "a volume's name has letters, digits, - and _",
    )
}

fn some_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    right(
        deserializer,
        |text: &String| !text.is_empty(),
        "it is empty",
    )
}

fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let is_right = |path: &String| path.starts_with('/');
    right(deserializer, is_right, "a path begins with /")
}

fn paths<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let is_right = |paths: &Vec<String>| paths.iter().all(|path| path.starts_with('/'));
    right(deserializer, is_right, "a path begins with /")
}

fn api_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let url = String::deserialize(deserializer)?;
    check_api(&url).map_err(D::Error::custom)?;
    Ok(Some(url))
}

fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let is_right = |count: &usize| (1..=MAX_SLOTS).contains(count);
    right(deserializer, is_right, "count is from 1 to 1000").map(Some)
}

fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    let is_right = |cpus: &f64| (0.01..=10_000.0).contains(cpus);
    right(deserializer, is_right, "cpus is a number such as 2 or 0.5").map(Some)
}

fn pools<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Pool>, D::Error> {
    let pools = Vec::<Pool>::deserialize(deserializer)?;
    let mut names = BTreeSet::new();
    if let Some(twice) = pools.iter().find(|pool| !names.insert(&pool.name)) {
        return Err(D::Error::custom(format!(
            "two pools are called {}",
            twice.name
        )));
    }
    if pools.is_empty() {
        return Err(D::Error::custom("a table [[supervise.pool]] is needed"));
    }
    Ok(pools)
}

impl TryFrom<PoolText> for Pool {
    type Error = String;

    fn try_from(text: PoolText) -> Result<Self, String> {
        let auth = match (text.token, text.app) {
            (Some(token), None) => Auth::Token(token),
            (
                None,
                Some(App {
                    id,
                    installation,
                    key,
                }),
            ) => Auth::App {
                id,
                installation,
                key,
            },
            _ => return Err("one of token and app is needed, and not both".into()),
        };
        let size = match (text.count, text.scale_set) {
            (Some(count), None) => Size::Fixed(count),
            (None, Some(set)) => {
                let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
                if !(1..=MAX_SLOTS).contains(&set.max) || set.min > set.max {
                    return Err("scale-set: max is from 1 to 1000, and min at most max".into());
                }
                if set.name.is_empty() || !set.name.chars().all(plain) {
                    return Err("scale-set: its name has letters, digits and - _ .".into());
                }
                Size::ScaleSet(set)
            }
            _ => return Err("one of count and scale-set is needed, and not both".into()),
        };
        let slots = match &size {
            Size::Fixed(count) => *count,
            Size::ScaleSet(set) => set.max,
        };
        let labels = match (&size, text.labels) {
            (Size::ScaleSet(set), labels) if labels.is_empty() => vec![set.name.clone()],
            (_, labels) => labels,
        };
        if !(1..=100).contains(&labels.len()) || labels.iter().any(String::is_empty) {
            return Err("labels: 1 to 100 are needed, none of them empty".into());
        }
        let pool = Self {
            bounds: Bounds {
                registration: text.registration_timeout.as_secs().max(1),
                job: text.job_timeout.as_secs().max(1),
                idle: text.max_idle.as_secs().max(1),
                // A job is known to run from the first look after its start. Many slots look more seldom: an
                // App or a token has 5,000 requests an hour.
                look: LOOK
                    .min(text.job_timeout.as_secs() / 4)
                    .max(2 * slots as u64),
            },
            url: text.url,
            api: text.api_url,
            group: text.group,
            container: text.container,
            volumes: text.volumes,
            rules: text.rules,
            name: text.name,
            auth,
            size,
            labels,
        };
        let mut names = BTreeSet::new();
        for volume in &pool.volumes {
            if !names.insert(&volume.name) {
                return Err(format!("two volumes are called {}", volume.name));
            }
            pool.check(volume)
                .map_err(|problem| format!("volume {}: {problem}", volume.name))?;
        }
        Ok(pool)
    }
}

/// Options that are said once the job is known.
fn is_late(option: &str, template: &Template) -> bool {
    matches!(option, "restore" | "save") && (template.has("repository") || template.has("ref"))
}

impl Pool {
    /// How many slots it has.
    #[must_use]
    pub const fn slots(&self) -> usize {
        match &self.size {
            Size::Fixed(count) => *count,
            Size::ScaleSet(set) => set.max,
        }
    }

    /// Jobs of one pool may be of many repositories, branches and forks: nothing that they could
    /// write may be there before it is known whose they are.
    fn check(&self, volume: &Volume) -> Result<(), String> {
        let known = matches!(self.url.owner, Owner::Repository(..));
        let set = matches!(self.size, Size::ScaleSet(_));
        for (option, template) in &volume.options {
            if let Some(other) = template.other_than(&["slot", "repository", "ref"]) {
                return Err(format!(
                    "option {option}: {{{other}}} is for [[supervise.pool.scope]]; here are {{slot}}, {{repository}} and {{ref}}"
                ));
            }
            if is_late(option, template) && set {
                continue;
            }
            if template.has("ref") {
                return Err(format!(
                    "option {option}: {{ref}} is known for a scale set's jobs only, in restore and save"
                ));
            }
            if template.has("repository") && (set || !known) {
                return Err(format!(
                    "option {option}: the repository is not known before the job is"
                ));
            }
        }
        // As the daemon reads them: options may be in any case, and within `o`.
        let spec = Spec::parse(&self.options(volume, 0)).map_err(|e| e.to_string())?;
        let late = spec.admit == Admit::Later;
        if !set {
            return if late {
                Err("admit=later is for scale sets: without one, it is never known which job a runner has".into())
            } else {
                Ok(())
            };
        }
        if spec.kind == VolumeKind::Job && !late {
            return Err("a scale set's job is not known when its volumes are created, so its job volumes need admit=later, the default there".into());
        }
        if spec.scope.is_some() {
            return Err("option scope: the scope of a scale set's job follows from what GitHub says of it; [[supervise.pool.scope]] sets the rules".into());
        }
        if spec.kind != VolumeKind::Job {
            return if spec.publish == Publish::Never {
                Ok(())
            } else {
                Err("a scale set's job is not known when its volumes are made, so they have type=job, or publish=never".into())
            };
        }
        let late = self.late_options(volume, "a/b", "branch/c");
        spec.admitted(&late).map(drop).map_err(|e| e.to_string())
    }

    /// The options that a runner's volume is created with.
    #[must_use]
    pub fn options(&self, volume: &Volume, slot: usize) -> BTreeMap<String, String> {
        let mut options = self.filled(volume, slot);
        // What a failed job wrote is never taken for what a good one did, whatever becomes of us.
        options
            .entry("publish".into())
            .or_insert_with(|| "on-success".into());
        if matches!(self.size, Size::ScaleSet(_)) && self.is_job(volume) {
            options
                .entry("admit".into())
                .or_insert_with(|| Admit::Later.to_string());
        }
        options
    }

    /// The options that are known before the job is, as the configuration has them.
    fn filled(&self, volume: &Volume, slot: usize) -> BTreeMap<String, String> {
        let repository = self.url.owner.repository();
        let values = Values::from([
            ("slot", self.slot_name(slot)),
            ("repository", repository.unwrap_or_default()),
        ]);
        let set = matches!(self.size, Size::ScaleSet(_));
        let options = volume.options.iter();
        options
            .filter(|(option, template)| !(set && is_late(option, template)))
            .map(|(option, template)| (option.clone(), template.fill(&values)))
            .collect()
    }

    /// Whether a volume is a job volume, by what the daemon makes of its options.
    #[must_use]
    pub fn is_job(&self, volume: &Volume) -> bool {
        Spec::parse(&self.filled(volume, 0)).is_ok_and(|spec| spec.kind == VolumeKind::Job)
    }

    /// The options that depend on the job, without its scopes.
    #[must_use]
    pub fn late_options(
        &self,
        volume: &Volume,
        repository: &str,
        reference: &str,
    ) -> BTreeMap<String, String> {
        let escape = crate::cache::names::escape;
        let values = Values::from([
            ("repository", escape(repository)),
            ("ref", escape(reference)),
        ]);
        let options = volume.options.iter();
        options
            .filter(|(option, template)| is_late(option, template))
            .map(|(option, template)| (option.clone(), template.fill(&values)))
            .collect()
    }

    /// A slot's name, with which its runners' names begin.
    #[must_use]
    pub fn slot_name(&self, slot: usize) -> String {
        format!("{}-{slot}", self.name)
    }
}

impl Supervise {
    /// Reads and validates the table `[supervise]` of a configuration.
    ///
    /// # Errors
    /// When the file cannot be read, has no such table, or says there what it should not.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(file).map_err(|source| ConfigError::Io {
            path: file.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|problem| ConfigError::Bad {
            path: file.to_owned(),
            problem,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        /// The other tables are the daemon's.
        #[derive(Deserialize)]
        struct Document {
            supervise: Option<Supervise>,
        }
        let document: Document =
            toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
        let supervise = document
            .supervise
            .ok_or("there is nothing to supervise: a table [[supervise.pool]] is needed")?;
        Ok(supervise)
    }
}

/// The names of all settings, as the types say when they refuse another.
#[cfg(test)]
pub(crate) fn names() -> Vec<String> {
    fn of<T: serde::de::DeserializeOwned + fmt::Debug>() -> Vec<String> {
        let refused = toml::from_str::<T>("no-such-setting = 1").expect_err("there is none");
        let (_, expected) = refused.message().split_once("expected").expect("a list");
        let names = expected.split('`').skip(1).step_by(2);
        names.map(str::to_owned).collect()
    }
    let tables = [
        of::<Supervise>(),
        of::<PoolText>(),
        of::<App>(),
        of::<ScaleSet>(),
        of::<ContainerText>(),
        of::<Volume>(),
        of::<Rule>(),
    ];
    tables.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: &str = "[[supervise.pool]]\nname = 'linux'\nurl = 'https://github.com/o/r'\ntoken = 'credential:token'\n";

    fn pool(more: &str) -> String {
        format!("{POOL}{more}\ncontainer.image = 'i'\n")
    }

    #[test]
    fn job_volumes_in_any_spelling() {
        for options in [
            "type = 'job'",
            "Type = 'job'",
            "o = 'type=job'",
            "o = 'size=1G,TYPE=job'",
        ] {
            let text = pool(&format!(
                "scale-set = {{name = 's', max = 4}}\nvolume = [{{name = 'j', target = '/j', options = {{{options}}}}}]"
            ));
            let supervise = Supervise::parse(&text).unwrap();
            let pool = &supervise.pools[0];
            assert!(pool.is_job(&pool.volumes[0]), "{options}");
            assert_eq!(pool.options(&pool.volumes[0], 0)["admit"], "later");
        }
    }

    #[test]
    fn accepted() {
        let text = pool(
            "count = 2\nlabels = ['linux']\nvolume = [{name = 'c', target = '/c', options = {save = '{slot}', scope = '{repository}'}}]",
        );
        let supervise = Supervise::parse(&text).unwrap();
        let pool = &supervise.pools[0];
        let options = pool.options(&pool.volumes[0], 3);
        assert_eq!(options["save"], "linux-3");
        assert_eq!(options["scope"], "o/r");
        assert_eq!(options["publish"], "on-success");
        let text = super::tests::pool(
            "scale-set = {name = 's', max = 4}\nvolume = [{name = 'j', target = '/j', options = {type = 'job', save = 'ref={ref}'}}]",
        );
        let supervise = Supervise::parse(&text).unwrap();
        let pool = &supervise.pools[0];
        let options = pool.options(&pool.volumes[0], 0);
        assert_eq!(options["admit"], "later");
        assert!(!options.contains_key("save"));
        assert_eq!(
            pool.late_options(&pool.volumes[0], "o/r", "branch/a b")["save"],
            "ref=branch/a&20b"
        );
        assert_eq!(pool.labels, ["s"]);
    }

    #[test]
    fn refused() {
        let set = "scale-set = {name = 's', max = 4}\n";
        let volume = |options: &str| {
            pool(&format!(
                "{set}volume = [{{name = 'c', target = '/c', options = {{{options}}}}}]"
            ))
        };
        for (text, words) in [
            (String::new(), &["[[supervise.pool]]"][..]),
            (
                "[supervise]\ncolour = 3".into(),
                &["line 2", "colour", "drain-timeout"],
            ),
            (pool("labels = ['a']"), &["line 1", "count", "scale-set"]),
            (pool("count = 1"), &["labels"]),
            (
                pool("count = 0\nlabels = ['a']"),
                &["line 5", "from 1 to 1000"],
            ),
            (
                pool("count = 1\nlabels = ['a']\njob-timeout = 'soon'"),
                &["line 7", "30s"],
            ),
            (
                pool("count = 1\nlabels = ['a']").replace("o/r", ""),
                &["line 3", "OWNER/NAME"],
            ),
            (
                pool("count = 1\nlabels = ['a']").replace("credential:token", "ghp_1"),
                &["line 4", "absolute path"],
            ),
            (
                pool("count = 1\nlabels = ['a']\ncontainer.privileged = true"),
                &["privileged", "read-only"],
            ),
            (
                pool("count = 1\nlabels = ['a']\ncontainer.network = 'container:x'"),
                &["line 7", "container:x", "slirp4netns"],
            ),
            (
                pool("count = 1\nlabels = ['a']\ncontainer.userns = 'auto:size=many'"),
                &["line 7", "many", "auto:size=131072"],
            ),
            (
                pool("count = 1\nlabels = ['a']\ncontainer.pull = 'often'"),
                &["line 7", "often", "newer"],
            ),
            (
                pool("count = 1\nlabels = ['a']\ncontainer.cpus = 0.0"),
                &["line 7", "0.5"],
            ),
            (
                pool("count = 1\nlabels = ['a']\ncontainer.tmpfs = ['tmp']"),
                &["line 7", "tmp", "begins with /"],
            ),
            (
                pool("count = 1\nlabels = ['a']\napi-url = 'api.github.com'"),
                &["line 7", "https://HOST/api/v3"],
            ),
            (
                pool("count = 1\nlabels = ['a']").replace("'linux'", "'Linux'"),
                &["line 2", "Linux", "lower-case"],
            ),
            (
                "[supervise]\npool = []".into(),
                &["line 2", "[[supervise.pool]]"],
            ),
            (
                pool(
                    "count = 1\nlabels = ['a']\nvolume = [{name = 'c', target = '/c', options = {save = '{rev}'}}]",
                ),
                &["line 7", "{rev}", "{slot}"],
            ),
            (
                pool(
                    "count = 1\nlabels = ['a']\nvolume = [{name = 'c', target = '/c', options = {save = '{ref}'}}]",
                ),
                &["volume c", "{ref}"],
            ),
            (
                pool(
                    "count = 1\nlabels = ['a']\nvolume = [{name = 'c', target = '/c', options = {colour = 'x'}}]",
                ),
                &["volume c", "colour", "restore"],
            ),
            (
                pool("count = 1\nlabels = ['a']\nvolume = [{name = 'c', target = 'c'}]"),
                &["line 7", "begins with /"],
            ),
            (
                pool(&format!(
                    "{set}volume = [{{name = 'c', target = '/c', options = {{save = 'x'}}}}]"
                )),
                &["volume c", "type=job"],
            ),
            (
                pool(&format!(
                    "{set}volume = [{{name = 'c', target = '/c', options = {{type = 'job', scope = 'x'}}}}]"
                )),
                &["volume c", "scope"],
            ),
            (
                format!("{0}{0}", pool("count = 1\nlabels = ['a']")),
                &["line", "two pools"],
            ),
            // What a scale set's job is given before it is known whose it is, in any spelling.
            (
                volume("type = 'job', admit = 'at-once'"),
                &["volume c", "admit=later"],
            ),
            (
                volume("o = 'type=job,admit=at-once'"),
                &["volume c", "admit"],
            ),
            (
                volume("TYPE = 'job', o = 'Admit=at-once'"),
                &["volume c", "admit"],
            ),
            (
                volume("type = 'job', admit = 'at-once', scope = 'x'"),
                &["volume c", "admit=later"],
            ),
            (
                volume("type = 'job', read-scopes = 'x'"),
                &["volume c", "read-scopes"],
            ),
            (volume("o = 'type=job,scope=x'"), &["volume c", "scope"]),
            (
                volume("publish = 'never', scope = 'x'"),
                &["volume c", "scope"],
            ),
            (
                volume("publish = 'never', o = 'SCOPE=x'"),
                &["volume c", "scope"],
            ),
            (
                volume("type = 'job', save = '{event}'"),
                &["volume c", "{event}"],
            ),
            (
                pool(
                    "count = 1\nlabels = ['a']\nvolume = [{name = 'c', target = '/c', options = {type = 'job', admit = 'later'}}]",
                ),
                &["volume c", "admit=later"],
            ),
            (
                pool(&format!("{set}scope = [{{write = '{{repository}}'}}]")),
                &["line 6", "{repository-id}"],
            ),
        ] {
            let problem = Supervise::parse(&text).expect_err(&text);
            for word in words {
                assert!(
                    problem.contains(word),
                    "{text}: {word:?} is not in: {problem}"
                );
            }
        }
    }
}
