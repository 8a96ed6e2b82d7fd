// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What was written to a disk, in order: the logs of Linux's device-mapper target `log-writes` (Documentation/admin-guide/device-mapper/
//! log-writes.rst, drivers/md/dm-log-writes.c) and of QEMU's `blklogwrites`, which have one format. A log applied to what the disk held
//! before, up to a flush, gives what a disk holds whose power was cut right then, and whose cache was lost.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

/// Bits of an entry's flags; another one marks what a file system says is metadata.
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// What an entry's fields take at the beginning of its sector.
const HEAD: usize = 32;

/// A log, to be applied.
pub struct Log {
    file: File,
    pub entries: Vec<Entry>,
}

/// One request that the disk was sent.
pub struct Entry {
    pub what: What,
    /// What was written before it is on the disk after it.
    pub flush: bool,
    /// It is itself on the disk once it is answered.
    pub fua: bool,
}

#[derive(Debug)]
pub enum What {
    /// Bytes of the disk, and where in the log they begin that it was given. Of a flush alone there are none.
    Write(Range<u64>, u64),
    /// Bytes of the disk.
    Discard(Range<u64>),
    /// Text: `dmsetup message DEVICE 0 mark TEXT`.
    Mark(String),
}

impl Log {
    /// What there is by the log's own account, which is brought up to date with each flush and at its end; in a file, which is to have
    /// been blank and sparse before, what QEMU wrote after that, too.
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut sector = [0; 512];
        let field = |sector: &[u8; 512], n: usize| {
            u64::from_le_bytes(sector[8 * n..8 * n + 8].try_into().expect("eight bytes"))
        };
        file.read_exact_at(&mut sector, 0)?;
        let (magic, version) = (field(&sector, 0), field(&sector, 1));
        // Nothing was flushed yet.
        if magic == 0 {
            return Ok(Self {
                file,
                entries: Vec::new(),
            });
        }
        assert_eq!((magic, version), (MAGIC, VERSION));
        let (count, size) = (field(&sector, 2), field(&sector, 3) & 0xffff_ffff);
        let is_file = file.metadata()?.is_file();
        let mut entries = Vec::new();
        let mut at = size;
        loop {
            file.read_exact_at(&mut sector, at)?;
            let [first, sectors, flags, length] = [0, 1, 2, 3].map(|n| field(&sector, n));
            if entries.len() as u64 >= count && !is_file {
                break;
            }
            if (sectors, flags) == (0, 0) {
                // Of a write that was under way when QEMU was killed there is nothing, though of later ones there is.
                match lseek(&file, at.cast_signed(), Whence::SeekData) {
                    Ok(data) => at = (at + size).max(data.cast_unsigned() / size * size),
                    Err(Errno::ENXIO) => break,
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            at += size;
            let place = first * size..(first + sectors) * size;
            let what = if flags & MARK != 0 {
                let text = &sector[HEAD..HEAD + usize::try_from(length).expect("in a sector")];
                What::Mark(String::from_utf8_lossy(text).into_owned())
            } else if flags & DISCARD != 0 {
                What::Discard(place)
            } else {
                let data = at;
                at += sectors * size;
                What::Write(place, data)
            };
            entries.push(Entry {
                what,
                flush: flags & FLUSH != 0,
                fua: flags & FUA != 0,
            });
        }
        Ok(Self { file, entries })
    }

    /// How many entries a disk has without fail: those up to the last flush.
    pub fn flushed(&self) -> usize {
        let last = self.entries.iter().rposition(|entry| entry.flush);
        last.map_or(0, |last| last + 1)
    }

    /// Has a disk, or an image of one, hold what these entries say, on top of what it held before the first of them.
    pub fn apply<'a>(
        &self,
        entries: impl IntoIterator<Item = &'a Entry>,
        disk: &File,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        for entry in entries {
            match &entry.what {
                What::Write(place, data) => {
                    bytes.resize(length(place), 0);
                    self.file.read_exact_at(&mut bytes, *data)?;
                    disk.write_all_at(&bytes, place.start)?;
                }
                What::Discard(place) => {
                    let flags =
                        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let (at, length) = (place.start.cast_signed(), length(place) as i64);
                    match fallocate(disk, flags, at, length) {
                        // A disk may do as it likes with it.
                        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                What::Mark(_) => {}
            }
        }
        disk.sync_all()
    }
}

fn length(place: &Range<u64>) -> usize {
    usize::try_from(place.end - place.start).expect("less than memory")
}
