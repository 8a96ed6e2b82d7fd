// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pool, or a namespace of it: objects with their keys, and images made, opened and removed.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int};
use std::ptr;
use std::sync::Arc;

use super::{
    CLONE_FORMAT, CephError, Cluster, EQUAL, EXCLUSIVE, FEATURES, FULL_TRY, Handle, IMAGE_FEATURES,
    Image, Librbd, Rados, c_string, check,
};

/// Keys and values of an object, in order.
pub type Omap = BTreeMap<String, Vec<u8>>;

/// A change to an object's keys: all of it, where everything compares equal, or nothing.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct OmapWrite {
    /// The object is made, and must not be there yet.
    pub create: bool,
    /// What has to be there; a key that is not there equals an empty value. An OSD compares nothing with an object that is not there.
    pub compare: Omap,
    /// What is set.
    pub set: Omap,
    /// What is removed.
    pub remove: Vec<String>,
}

/// A pool, or a namespace in it.
pub struct Pool {
    pub(super) cluster: Arc<Cluster>,
    pub(super) io: Handle,
}

// SAFETY: as for [`Cluster`]; the namespace is set once.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: made by rados_ioctx_create, and nothing of it is used any more: an [`Image`] borrows its pool.
        unsafe { (self.rados().rados_ioctx_destroy)(self.io) }
    }
}

impl Pool {
    fn rados(&self) -> &'static Rados {
        &self.cluster.libraries.0
    }

    pub(super) fn rbd(&self) -> &'static Librbd {
        &self.cluster.libraries.1
    }

    /// The cluster that it is in.
    #[must_use]
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Those of these keys that an object has. An object that is not there has none.
    ///
    /// # Errors
    /// What the OSD answers.
    pub fn keys(&self, object: &str, keys: &[&str]) -> Result<Omap, CephError> {
        let pointers: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr().cast()).collect();
        let lengths: Vec<usize> = keys.iter().map(|key| key.len()).collect();
        self.read(object, |operation, found, status| {
            // SAFETY: as many pointers and lengths as is said; librados copies the keys.
            unsafe {
                (self.rados().rados_read_op_omap_get_vals_by_keys2)(
                    operation,
                    pointers.as_ptr(),
                    pointers.len(),
                    lengths.as_ptr(),
                    found,
                    status,
                );
            }
        })
    }

    /// Up to `most` keys of an object that begin with `prefix`, behind `after`, and whether there are more.
    ///
    /// # Errors
    /// What the OSD answers.
    pub fn page(
        &self,
        object: &str,
        prefix: &str,
        after: &str,
        most: u64,
    ) -> Result<(Omap, bool), CephError> {
        let (after, prefix) = (c_string(after), c_string(prefix));
        let mut more = 0;
        let place = &raw mut more;
        let found = self.read(object, |operation, found, status| {
            // SAFETY: C strings, and places that outlive the operation.
            unsafe {
                (self.rados().rados_read_op_omap_get_vals2)(
                    operation,
                    after.as_ptr(),
                    prefix.as_ptr(),
                    most,
                    found,
                    place,
                    status,
                );
            }
        })?;
        Ok((found, more != 0))
    }

    /// One read of an object, to which `step` adds what is read.
    fn read(
        &self,
        object: &str,
        step: impl FnOnce(Handle, *mut Handle, *mut c_int),
    ) -> Result<Omap, CephError> {
        let rados = self.rados();
        let name = c_string(object);
        let (mut found, mut status) = (ptr::null_mut(), 0);
        // SAFETY: the operation lives from here to its release, and what it writes to is still there then.
        let result = unsafe {
            let operation = (rados.rados_create_read_op)();
            step(operation, &raw mut found, &raw mut status);
            let result = (rados.rados_read_op_operate)(operation, self.io, name.as_ptr(), 0);
            (rados.rados_release_read_op)(operation);
            result
        };
        // The iterator begins where the answer is taken in. Of an operation that was given up, or failed, it must not be asked.
        let keys = if result >= 0 && !found.is_null() {
            self.taken(found)
        } else {
            Ok(Omap::new())
        };
        if !found.is_null() {
            // SAFETY: it is not used again.
            unsafe { (rados.rados_omap_get_end)(found) };
        }
        if result == -libc::ENOENT {
            return Ok(Omap::new());
        }
        // The step's own status means something only where the operation was done.
        let result = if result < 0 { result } else { status };
        check(|| format!("reading {object}"), result)?;
        keys
    }

    fn taken(&self, found: Handle) -> Result<Omap, CephError> {
        let rados = self.rados();
        let mut keys = Omap::new();
        let end = loop {
            let (mut key, mut value) = (ptr::null_mut::<c_char>(), ptr::null_mut::<c_char>());
            let (mut key_length, mut value_length) = (0, 0);
            // SAFETY: an iterator that librados filled, and four places to write to.
            let next = unsafe {
                (rados.rados_omap_get_next2)(
                    found,
                    &raw mut key,
                    &raw mut value,
                    &raw mut key_length,
                    &raw mut value_length,
                )
            };
            if next < 0 || key.is_null() {
                break next;
            }
            let bytes = |start: *mut c_char, length: usize| {
                if start.is_null() || length == 0 {
                    return Vec::new();
                }
                // SAFETY: the iterator owns as many bytes, until it is ended.
                unsafe { std::slice::from_raw_parts(start.cast::<u8>(), length).to_vec() }
            };
            let name = String::from_utf8_lossy(&bytes(key, key_length)).into_owned();
            keys.insert(name, bytes(value, value_length));
        };
        check(|| "reading keys".to_owned(), end)?;
        Ok(keys)
    }

    /// Changes an object's keys, in one step that is done or not. `false`: something was not as [`OmapWrite::create`] and
    /// [`OmapWrite::compare`] say, and nothing was changed.
    ///
    /// # Errors
    /// What the OSD answers. After ETIMEDOUT it may be done all the same.
    pub fn write(&self, object: &str, change: &OmapWrite) -> Result<bool, CephError> {
        let rados = self.rados();
        let name = c_string(object);
        let mut statuses = vec![0; change.compare.len()];
        let (keys, key_lengths) = pieces(change.set.keys());
        let (values, value_lengths) = pieces(change.set.values());
        let (removed, removed_lengths) = pieces(&change.remove);
        // SAFETY: librados copies keys and values, whose lengths are said; the statuses are there until the operation is released.
        let result = unsafe {
            let operation = (rados.rados_create_write_op)();
            if change.create {
                (rados.rados_write_op_create)(operation, EXCLUSIVE, ptr::null());
            }
            for ((key, value), status) in change.compare.iter().zip(&mut statuses) {
                (rados.rados_write_op_omap_cmp2)(
                    operation,
                    key.as_ptr().cast(),
                    EQUAL,
                    value.as_ptr().cast(),
                    key.len(),
                    value.len(),
                    status,
                );
            }
            if !keys.is_empty() {
                (rados.rados_write_op_omap_set2)(
                    operation,
                    keys.as_ptr(),
                    values.as_ptr(),
                    key_lengths.as_ptr(),
                    value_lengths.as_ptr(),
                    keys.len(),
                );
            }
            if !removed.is_empty() {
                (rados.rados_write_op_omap_rm_keys2)(
                    operation,
                    removed.as_ptr(),
                    removed_lengths.as_ptr(),
                    removed.len(),
                );
            }
            let result = (rados.rados_write_op_operate)(
                operation,
                self.io,
                name.as_ptr(),
                ptr::null_mut(),
                FULL_TRY,
            );
            (rados.rados_release_write_op)(operation);
            result
        };
        if result == -libc::ECANCELED || (change.create && result == -libc::EEXIST) {
            return Ok(false);
        }
        check(|| format!("writing {object}"), result)?;
        Ok(true)
    }

    /// Whether the pool has a namespace of that name for images.
    ///
    /// # Errors
    /// What is answered.
    pub fn has_namespace(&self, namespace: &str) -> Result<bool, CephError> {
        let name = c_string(namespace);
        let mut exists = false;
        // SAFETY: a C string, and a place to write to.
        let asked =
            unsafe { (self.rbd().rbd_namespace_exists)(self.io, name.as_ptr(), &raw mut exists) };
        check(|| format!("namespace {namespace}"), asked)?;
        Ok(exists)
    }

    /// Makes a namespace for images.
    ///
    /// # Errors
    /// EPERM, as for every user who may not write to the pool itself, or what else is answered.
    pub fn create_namespace(&self, namespace: &str) -> Result<(), CephError> {
        let name = c_string(namespace);
        // SAFETY: a C string.
        let made = unsafe { (self.rbd().rbd_namespace_create)(self.io, name.as_ptr()) };
        if made == -libc::EEXIST {
            return Ok(());
        }
        check(|| format!("making namespace {namespace}"), made)
    }

    /// Calls `then` with the options of an image that is made.
    fn with_options<T>(&self, clone: bool, then: impl FnOnce(Handle) -> T) -> Result<T, CephError> {
        let rbd = self.rbd();
        let mut options = ptr::null_mut();
        // SAFETY: made here, and destroyed below.
        let result = unsafe {
            (rbd.rbd_image_options_create)(&raw mut options);
            let set = (rbd.rbd_image_options_set_uint64)(options, FEATURES, IMAGE_FEATURES);
            // librbd refuses it for what is no clone.
            if clone {
                set.min((rbd.rbd_image_options_set_uint64)(options, CLONE_FORMAT, 2))
            } else {
                set
            }
        };
        let done = check(|| "an image's options".to_owned(), result).map(|()| then(options));
        // SAFETY: not used any more.
        unsafe { (rbd.rbd_image_options_destroy)(options) };
        done
    }

    /// Makes an empty image.
    ///
    /// # Errors
    /// EEXIST, or what else is answered.
    pub fn create_image(&self, name: &str, size: u64) -> Result<(), CephError> {
        let c_name = c_string(name);
        let made = self.with_options(false, |options| {
            // SAFETY: a C string and options that live.
            unsafe { (self.rbd().rbd_create4)(self.io, c_name.as_ptr(), size, options) }
        })?;
        check(|| format!("making image {name}"), made)
    }

    /// Makes an image a clone of a snapshot in the same pool and namespace; the snapshot needs no protection (format 2).
    ///
    /// # Errors
    /// ENOENT without the parent, EEXIST, or what else is answered.
    pub fn clone_image(&self, parent: &str, snapshot: &str, name: &str) -> Result<(), CephError> {
        let (c_parent, c_snapshot, c_name) = (c_string(parent), c_string(snapshot), c_string(name));
        let made = self.with_options(true, |options| {
            // SAFETY: C strings and options that live.
            unsafe {
                (self.rbd().rbd_clone3)(
                    self.io,
                    c_parent.as_ptr(),
                    c_snapshot.as_ptr(),
                    self.io,
                    c_name.as_ptr(),
                    options,
                )
            }
        })?;
        check(|| format!("cloning {parent}@{snapshot} to {name}"), made)
    }

    /// Removes an image, and gives its data back.
    ///
    /// # Errors
    /// ENOENT, EBUSY while a client has it open or mapped, ENOTEMPTY while it has snapshots.
    pub fn remove_image(&self, name: &str) -> Result<(), CephError> {
        let c_name = c_string(name);
        // SAFETY: a C string.
        let removed = unsafe { (self.rbd().rbd_remove)(self.io, c_name.as_ptr()) };
        check(|| format!("removing image {name}"), removed)
    }

    /// Opens an image, to change it.
    ///
    /// # Errors
    /// ENOENT, or what else is answered.
    pub fn image(&self, name: &str) -> Result<Image<'_>, CephError> {
        self.open(name, None, self.rbd().rbd_open)
    }

    /// Opens an image, or a snapshot of it, to look at.
    ///
    /// # Errors
    /// ENOENT, or what else is answered.
    pub fn look_at(&self, name: &str, snapshot: Option<&str>) -> Result<Image<'_>, CephError> {
        self.open(name, snapshot, self.rbd().rbd_open_read_only)
    }

    fn open(
        &self,
        name: &str,
        snapshot: Option<&str>,
        how: unsafe extern "C" fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int,
    ) -> Result<Image<'_>, CephError> {
        let (c_name, snapshot) = (c_string(name), snapshot.map(c_string));
        let mut handle = ptr::null_mut();
        // SAFETY: C strings, or none, and a place to write to.
        let opened = unsafe {
            how(
                self.io,
                c_name.as_ptr(),
                &raw mut handle,
                snapshot.as_ref().map_or(ptr::null(), |name| name.as_ptr()),
            )
        };
        check(|| format!("opening image {name}"), opened)?;
        Ok(Image {
            pool: self,
            handle,
            name: name.to_owned(),
        })
    }
}

/// Where each piece begins, and how long it is, as librados takes lists of keys and values.
fn pieces<T: AsRef<[u8]>>(of: impl IntoIterator<Item = T>) -> (Vec<*const c_char>, Vec<usize>) {
    let pieces = of.into_iter();
    pieces
        .map(|piece| (piece.as_ref().as_ptr().cast(), piece.as_ref().len()))
        .unzip()
}
