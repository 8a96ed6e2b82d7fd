// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An image that is open: its size, its snapshots, and what it holds.

use std::ffi::{c_int, c_void};
use std::ptr;

use super::{CephError, Handle, Pool, Watcher, c_string, check};

/// An image that is open.
pub struct Image<'a> {
    pub(super) pool: &'a Pool,
    pub(super) handle: Handle,
    pub(super) name: String,
}

impl Drop for Image<'_> {
    fn drop(&mut self) {
        // SAFETY: opened by librbd, and not used any more.
        unsafe { (self.pool.rbd().rbd_close)(self.handle) };
    }
}

impl Image<'_> {
    fn check(&self, what: &str, result: c_int) -> Result<(), CephError> {
        check(|| format!("{what} image {}", self.name), result)
    }

    /// Its size in bytes, or that of the snapshot that it was opened at.
    ///
    /// # Errors
    /// What is answered.
    pub fn size(&self) -> Result<u64, CephError> {
        let mut size = 0;
        // SAFETY: an open image, and a place to write to.
        let asked = unsafe { (self.pool.rbd().rbd_get_size)(self.handle, &raw mut size) };
        self.check("looking at", asked)?;
        Ok(size)
    }

    /// The clients that watch it, by the numbers that the cluster gave them; each that has it mapped does. One that is gone does so
    /// for half a minute more (`osd_client_watch_timeout`). This handle's client is among them unless it only reads.
    ///
    /// # Errors
    /// What is answered.
    pub fn watchers(&self) -> Result<Vec<i64>, CephError> {
        let rbd = self.pool.rbd();
        let mut found = Vec::new();
        loop {
            let mut count = found.len();
            // SAFETY: an open image, and room for as many as is said.
            let asked =
                unsafe { (rbd.rbd_watchers_list)(self.handle, found.as_mut_ptr(), &raw mut count) };
            // Then it says how many there are.
            if asked == -libc::ERANGE {
                found.resize_with(count, Watcher::default);
                continue;
            }
            self.check("looking for watchers of", asked)?;
            found.truncate(count);
            let clients = found.iter().map(|watcher| watcher.client).collect();
            // SAFETY: so many were filled in, whose strings this frees; nobody reads them.
            unsafe { (rbd.rbd_watchers_list_cleanup)(found.as_mut_ptr(), count) };
            return Ok(clients);
        }
    }

    /// Takes a snapshot. A host that has the image mapped gives up its lock for that, with all that was written.
    ///
    /// # Errors
    /// EEXIST, or what else is answered.
    pub fn snapshot(&self, name: &str) -> Result<(), CephError> {
        let name = c_string(name);
        // SAFETY: an open image, and a C string.
        let made = unsafe { (self.pool.rbd().rbd_snap_create)(self.handle, name.as_ptr()) };
        self.check("taking a snapshot of", made)
    }

    /// Removes a snapshot. One that has clones stays, unseen, until they are gone.
    ///
    /// # Errors
    /// ENOENT, or what else is answered.
    pub fn remove_snapshot(&self, name: &str) -> Result<(), CephError> {
        let name = c_string(name);
        // SAFETY: an open image, and a C string.
        let removed = unsafe { (self.pool.rbd().rbd_snap_remove)(self.handle, name.as_ptr()) };
        self.check("removing a snapshot of", removed)
    }

    /// Makes it as long; what is behind is given back where it gets shorter.
    ///
    /// # Errors
    /// What is answered.
    pub fn resize(&self, size: u64) -> Result<(), CephError> {
        // SAFETY: an open image, and a callback that looks at no argument.
        let done = unsafe {
            (self.pool.rbd().rbd_resize2)(self.handle, size, false, no_progress, ptr::null_mut())
        };
        self.check("resizing", done)
    }

    /// Copies all that it has from its parents, also for its snapshots, so that it has none any more.
    ///
    /// # Errors
    /// What is answered; EINVAL where it has no parent.
    pub fn flatten(&self) -> Result<(), CephError> {
        // SAFETY: an open image.
        let done = unsafe { (self.pool.rbd().rbd_flatten)(self.handle) };
        self.check("flattening", done)
    }

    /// Bytes that differ from snapshot `from`, or that there are at all, in whole objects: those that are there, and those that
    /// are not any more. With `parents`, what its parents have counts.
    ///
    /// # Errors
    /// What is answered.
    pub fn differs(&self, from: Option<&str>, parents: bool) -> Result<(u64, u64), CephError> {
        let size = self.size()?;
        let from = from.map(c_string);
        let mut counted = (0_u64, 0_u64);
        // SAFETY: an open image, a C string or none, and a callback whose argument outlives the call.
        let asked = unsafe {
            (self.pool.rbd().rbd_diff_iterate2)(
                self.handle,
                from.as_ref().map_or(ptr::null(), |name| name.as_ptr()),
                0,
                size,
                parents.into(),
                1,
                count,
                (&raw mut counted).cast(),
            )
        };
        self.check("looking at", asked)?;
        Ok(counted)
    }
}

extern "C" fn no_progress(_done: u64, _all: u64, _argument: *mut c_void) -> c_int {
    0
}

extern "C" fn count(_offset: u64, length: usize, exists: c_int, counted: *mut c_void) -> c_int {
    // SAFETY: what `differs` gave, which nothing else uses meanwhile.
    let counted = unsafe { &mut *counted.cast::<(u64, u64)>() };
    if exists == 0 {
        counted.1 += length as u64;
    } else {
        counted.0 += length as u64;
    }
    0
}
