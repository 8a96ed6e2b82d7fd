//! What LVM answers: `--reportformat json` with its command log.
//!
//! Everything is text in that format; numbers are parsed here. LVM writes one
//! JSON object a command: `report` with the rows, `log` with the messages and,
//! from the `lvm` shell, a last row with the command's return code.

use serde::Deserialize;

use super::super::{Capacity, Lv};
use crate::cache::names::Tag;
use crate::cache::units::Bytes;

/// The columns that [`LvRow`] has, for `lvs -o`.
pub(super) const LV_COLUMNS: &str = "lv_name,pool_lv,thin_id,lv_time,lv_size,lv_tags,origin,\
lv_kernel_major,lv_kernel_minor,lv_device_open,lv_layout,lv_when_full,data_percent,\
metadata_percent,lv_metadata_size,vg_mda_size,vg_mda_free";

/// lvm2's ECMD_PROCESSED (tools/errors.h): the return code of a command that
/// did what it was asked, as the shell's log shows it.
const ECMD_PROCESSED: &str = "1";

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

#[derive(Debug, Deserialize)]
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
    thin_id: String,
    lv_time: String,
    lv_size: String,
    pub(super) lv_tags: String,
    origin: String,
    lv_kernel_major: String,
    lv_kernel_minor: String,
    lv_device_open: String,
    lv_layout: String,
    pub(super) lv_when_full: String,
    data_percent: String,
    metadata_percent: String,
    lv_metadata_size: String,
    vg_mda_size: String,
    vg_mda_free: String,
}

/// A row of `vgs`, or of `pvs` about the group that a device is in.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct VgRow {
    pub(super) vg_name: String,
    pub(super) vg_free: String,
}

/// How full a pool is, in more detail than [`Capacity`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct PoolUse {
    pub(super) capacity: Capacity,
    /// Size of the pool's metadata.
    pub(super) metadata_size: Bytes,
    /// What the text that describes the group may still grow by.
    pub(super) group_free: Bytes,
    /// Its device is there, so the percentages are known.
    pub(super) active: bool,
}

impl PoolUse {
    /// Why no volume can be made in the pool `name` (`VG/POOL`), and what to do;
    /// `None` where these numbers are no reason.
    ///
    /// `threshold` is LVM's activation/thin_pool_autoextend_threshold, and `text`
    /// the number of bytes that the volume adds to the group's description. The
    /// limits are those of `pool_below_threshold` in lvm2's thin_manip.c.
    pub(super) fn exhausted(&self, name: &str, threshold: f64, text: usize) -> Option<String> {
        let Capacity {
            data_size,
            data_percent,
            metadata_percent,
            group_percent,
        } = self.capacity;
        let metadata_size = self.metadata_size;
        let (vg, _) = name.split_once('/').unwrap_or((name, ""));
        let full = |percent| percent > threshold || percent >= 100.0;
        let metadata_free = (4 * Bytes::MIB) as f64 * 100.0 / metadata_size.0.max(1) as f64;
        if full(data_percent) {
            Some(format!(
                "{data_percent} % of its {data_size} are in use; remove entries, or `lvextend --size +SIZE {name}`"
            ))
        } else if full(metadata_percent) || metadata_percent >= 100.0 - metadata_free.min(25.0) {
            Some(format!(
                "{metadata_percent} % of its metadata's {metadata_size} are in use; remove entries, or `lvextend --poolmetadatasize +SIZE {name}`"
            ))
        } else if self.group_free.0 < text as u64 {
            Some(format!(
                "{group_percent:.1} % of what the group's metadata area holds are in use, and it cannot be enlarged; remove entries, or `vgextend --metadatasize SIZE {vg} DEVICE` and `pvchange --metadataignore y` the others"
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
        let status = |row: &&LogRow| row.log_context == "shell" && row.log_type == "status";
        self.log
            .iter()
            .rev()
            .find(status)
            .map(|row| row.log_ret_code == ECMD_PROCESSED)
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
        Some(PoolUse {
            capacity: Capacity {
                data_size: Bytes(self.lv_size.parse().ok()?),
                data_percent: percent(&self.data_percent)?,
                metadata_percent: percent(&self.metadata_percent)?,
                group_percent: if group_room == 0 {
                    0.0
                } else {
                    group_used as f64 * 100.0 / group_room as f64
                },
            },
            metadata_size: Bytes(self.lv_metadata_size.parse().ok()?),
            group_free: Bytes(group_free),
            active: !self.data_percent.is_empty(),
        })
    }
}

/// LVM leaves the percentages of an inactive pool empty.
fn percent(text: &str) -> Option<f64> {
    if text.is_empty() {
        Some(0.0)
    } else {
        text.parse().ok()
    }
}
