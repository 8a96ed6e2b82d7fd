// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What LVM answers: `--reportformat json` with its command log.
//!
//! Everything is text in that format; numbers are parsed here. LVM writes one
//! JSON object a command: `report` with the rows, `log` with the messages and,
//! from the `lvm` shell, a last row with the command's return code.

use serde::Deserialize;

use super::super::{Capacity, Lv};
use crate::cache::names::{LvName, Tag};
use crate::cache::units::Bytes;

/// The columns that [`LvRow`] has, for `lvs -o`.
pub(super) const LV_COLUMNS: &str = "lv_name,pool_lv,thin_id,lv_time,lv_size,lv_tags,origin,\
lv_kernel_major,lv_kernel_minor,lv_device_open,lv_layout,lv_when_full,data_percent,\
metadata_percent,lv_metadata_size,transaction_id,zero,vg_mda_size,vg_mda_free";

/// Usage of a pool, in percent, above which LVM refuses to make volumes for us.
pub(super) const LIMIT: f64 = 95.0;

/// The tag on pools that we made.
pub(super) const POOL: &str = "friend:pool";

/// lvm2's ECMD_PROCESSED (tools/errors.h): the return code of a command that
/// did what it was asked, as the shell's log shows it.
const ECMD_PROCESSED: &str = "1";

/// lvm2's ENO_SUCH_CMD and EINVALID_CMD_LINE (tools/errors.h): the return codes of a line that was
/// refused before anything was done.
const REFUSED: [&str; 2] = ["2", "3"];

/// One command's answer.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Document {
    #[serde(default)]
    report: Vec<Section>,
    #[serde(default)]
    log: Vec<LogRow>,
}

#[derive(Debug, Default, Deserialize)]
struct Section {
    #[serde(default)]
    lv: Vec<LvRow>,
    #[serde(default, alias = "pv")]
    vg: Vec<VgRow>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LogRow {
    log_type: String,
    log_context: String,
    log_message: String,
    log_ret_code: String,
}

/// A row of `lvs` with [`LV_COLUMNS`], `--binary`, and times in seconds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct LvRow {
    pub(super) lv_name: String,
    pub(super) pool_lv: String,
    pub(super) thin_id: String,
    pub(super) transaction_id: String,
    pub(super) zero: String,
    pub(super) lv_time: String,
    pub(super) lv_size: String,
    pub(super) lv_tags: String,
    pub(super) origin: String,
    pub(super) lv_kernel_major: String,
    pub(super) lv_kernel_minor: String,
    pub(super) lv_device_open: String,
    pub(super) lv_layout: String,
    pub(super) lv_when_full: String,
    pub(super) data_percent: String,
    pub(super) metadata_percent: String,
    pub(super) lv_metadata_size: String,
    pub(super) vg_mda_size: String,
    pub(super) vg_mda_free: String,
}

/// A row of `vgs`, or of `pvs` about the group that a device is in.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct VgRow {
    pub(super) vg_name: String,
    pub(super) vg_free: String,
    pub(super) pv_name: String,
}

/// How full a pool is, in more detail than [`Capacity`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct PoolUse {
    pub(super) capacity: Capacity,
    /// What the text that describes the group may still grow by.
    pub(super) group_free: Bytes,
    /// Its device is there, so the percentages are known.
    pub(super) active: bool,
    /// It zeroes new blocks.
    pub(super) zeroes: bool,
}

impl PoolUse {
    /// Why no volume can be made in the pool `pool` of `vg`, and what to do; `None`
    /// where these numbers are no reason.
    ///
    /// `text` is the number of bytes that the volume adds to the group's description.
    pub(super) fn exhausted(&self, vg: &LvName, pool: &LvName, text: usize) -> Option<String> {
        let Capacity {
            data_size,
            data_percent,
            data_limit,
            metadata_size,
            metadata_percent,
            metadata_limit,
            group_percent,
            ..
        } = self.capacity;
        if data_percent > data_limit {
            Some(format!(
                "{data_percent} % of the {data_size} of thin pool {pool} are in use, and new volumes are made up to {data_limit} %; remove entries, or `lvextend --size +SIZE {vg}/{pool}`"
            ))
        } else if metadata_percent >= metadata_limit {
            Some(format!(
                "{metadata_percent} % of the {metadata_size} for metadata of thin pool {pool} are in use, and new volumes are made up to {metadata_limit:.0} %; remove entries, or `lvextend --poolmetadatasize +SIZE {vg}/{pool}`"
            ))
        } else if self.group_free.0 < text as u64 {
            Some(format!(
                "{group_percent:.1} % of the group's metadata area are in use, which cannot be enlarged; remove entries, or `vgextend --metadatasize SIZE {vg} DEVICE` and `pvchange --metadataignore y` the other devices"
            ))
        } else {
            None
        }
    }
}

/// Whether `output` is a whole answer. LVM writes line by line, and a partial
/// object is never valid JSON, so it is parsed only where it may have ended.
pub(super) fn is_whole(output: &[u8]) -> bool {
    output.trim_ascii_end().last() == Some(&b'}')
        && serde_json::from_slice::<serde::de::IgnoredAny>(output).is_ok()
}

impl Document {
    /// Parses an answer.
    pub(super) fn parse(output: &[u8]) -> serde_json::Result<Self> {
        if output.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_slice(output)
    }

    /// Whether the shell's log says that the command succeeded; `None` when it
    /// says nothing, as for a command that ran as a process.
    pub(super) fn succeeded(&self) -> Option<bool> {
        self.return_code().map(|code| code == ECMD_PROCESSED)
    }

    /// Whether the shell's log says that it did not even begin with the command.
    pub(super) fn refused(&self) -> bool {
        self.return_code()
            .is_some_and(|code| REFUSED.contains(&code))
    }

    fn return_code(&self) -> Option<&str> {
        let status = |row: &&LogRow| row.log_context == "shell" && row.log_type == "status";
        self.log
            .iter()
            .rev()
            .find(status)
            .map(|row| row.log_ret_code.as_str())
    }

    /// LVM's error messages in it.
    pub(super) fn errors(&self) -> String {
        self.messages("error")
    }

    /// LVM's warnings in it.
    pub(super) fn warnings(&self) -> String {
        self.messages("warn")
    }

    fn messages(&self, log_type: &str) -> String {
        let texts: Vec<&str> = self
            .log
            .iter()
            .filter(|row| row.log_type == log_type)
            .map(|row| row.log_message.trim())
            .collect();
        texts.join("; ")
    }

    /// The rows about logical volumes.
    pub(super) fn lvs(&self) -> impl Iterator<Item = &LvRow> {
        self.report.iter().flat_map(|section| &section.lv)
    }

    /// The rows about volume groups.
    pub(super) fn groups(&self) -> impl Iterator<Item = &VgRow> {
        self.report.iter().flat_map(|section| &section.vg)
    }
}

impl LvRow {
    /// Whether it is a thin pool that zeroes new blocks, as it says with or without `--binary`.
    pub(super) fn zeroes(&self) -> bool {
        matches!(self.zero.as_str(), "1" | "zero")
    }

    /// Whether it is a thin pool.
    pub(super) fn is_thin_pool(&self) -> bool {
        self.lv_layout.split(',').eq(["thin", "pool"])
    }

    /// The thin volume that the row shows; `None` where a field is not what we
    /// know: then it is nothing that we made.
    pub(super) fn thin_volume(&self) -> Option<Lv> {
        let tags = self.lv_tags.split(',').filter(|tag| !tag.is_empty());
        let origin = match self.origin.as_str() {
            "" => None,
            name => Some(name.parse().ok()?),
        };
        Some(Lv {
            name: self.lv_name.parse().ok()?,
            seq: self.thin_id.parse().ok()?,
            created: self.lv_time.parse().ok()?,
            size: Bytes(self.lv_size.parse().ok()?),
            tags: tags.map(str::parse::<Tag>).collect::<Result<_, _>>().ok()?,
            origin,
            device: self.device(),
            open: self.lv_device_open == "1",
        })
    }

    /// The device number; `None` while it is not active (LVM shows -1).
    pub(super) fn device(&self) -> Option<(u32, u32)> {
        Some((
            self.lv_kernel_major.parse().ok()?,
            self.lv_kernel_minor.parse().ok()?,
        ))
    }

    /// How full the thin pool is that the row shows; `None` where a number is
    /// missing.
    pub(super) fn pool_use(&self) -> Option<PoolUse> {
        let group_size: u64 = self.vg_mda_size.parse().ok()?;
        let group_free: u64 = self.vg_mda_free.parse().ok()?;
        // LVM writes the new text beside the old one, so that half of the area
        // is all that it can take (_vg_mda_free in lvm2's format-text.c).
        let group_room = group_size / 2;
        let group_used = group_room.saturating_sub(group_free);
        let metadata_size = Bytes(self.lv_metadata_size.parse().ok()?);
        Some(PoolUse {
            capacity: Capacity {
                data_size: Bytes(self.lv_size.parse().ok()?),
                data_percent: percent(&self.data_percent)?,
                data_limit: LIMIT,
                metadata_size,
                metadata_percent: percent(&self.metadata_percent)?,
                metadata_limit: metadata_limit(metadata_size),
                group_size: Bytes(group_room),
                group_percent: if group_room == 0 {
                    0.0
                } else {
                    group_used as f64 * 100.0 / group_room as f64
                },
            },
            group_free: Bytes(group_free),
            active: !self.data_percent.is_empty(),
            zeroes: self.zeroes(),
        })
    }
}

/// Usage in percent from which on LVM refuses volumes, with [`LIMIT`] in its configuration: that of
/// `pool_below_threshold` in lvm2's thin_manip.c.
fn metadata_limit(size: Bytes) -> f64 {
    let free = (4 * Bytes::MIB) as f64 * 100.0 / size.0.max(1) as f64;
    LIMIT.min(100.0 - free.min(25.0))
}

/// LVM leaves the percentages of an inactive pool empty.
fn percent(text: &str) -> Option<f64> {
    if text.is_empty() {
        Some(0.0)
    } else {
        text.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_a_pool() {
        let pool = |data: f64, metadata: f64, metadata_mib: u64, group_free: u64| PoolUse {
            capacity: Capacity {
                data_size: Bytes::mib(300),
                data_percent: data,
                data_limit: LIMIT,
                metadata_size: Bytes::mib(metadata_mib),
                metadata_percent: metadata,
                metadata_limit: metadata_limit(Bytes::mib(metadata_mib)),
                group_size: Bytes::mib(1),
                group_percent: 98.76,
            },
            group_free: Bytes(group_free),
            active: true,
            zeroes: true,
        };
        for (of, said) in [
            (pool(95.0, 74.9, 8, 10_000), None),
            (
                pool(95.1, 10.0, 8, 10_000),
                Some("95.1 % of the 300 MiB of thin pool pool are in use"),
            ),
            // A quarter of it, or 4 MiB, have to be free.
            (
                pool(10.0, 75.0, 8, 10_000),
                Some("75 % of the 8 MiB for metadata of thin pool pool are in use"),
            ),
            (pool(10.0, 75.0, 64, 10_000), None),
            (pool(10.0, 93.75, 64, 10_000), Some("93.75 % of the 64 MiB")),
            (pool(10.0, 94.9, 1024, 10_000), None),
            (pool(10.0, 95.0, 1024, 10_000), Some("95 % of the 1 GiB")),
            (
                pool(10.0, 10.0, 8, 999),
                Some("98.8 % of the group's metadata area"),
            ),
            (pool(10.0, 10.0, 8, 1000), None),
        ] {
            let name = |text: &str| text.parse().unwrap();
            let found = of.exhausted(&name("vg"), &name("pool"), 1000);
            match said {
                None => assert_eq!(found, None),
                Some(said) => assert!(
                    found.as_ref().is_some_and(|it| it.starts_with(said)),
                    "{found:?}, not {said}"
                ),
            }
        }
    }
}
