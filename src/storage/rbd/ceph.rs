// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ceph's own libraries, found when a store on Ceph is opened: `librados.so.2` and `librbd.so.1`.
//!
//! They are loaded by dlopen(3), so that a host without Ceph needs no package of it. Their interface in C has been the same
//! since Ceph 14 (`rados/librados.h`, `rbd/librbd.h`): nothing is called that is younger.
//!
//! Every call is bounded: librados gives up on what a monitor or an OSD does not answer in [`PATIENCE`], with ETIMEDOUT. A
//! write that was given up may be done all the same: it is in doubt.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_void};
use std::path::Path;
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;

/// How long a monitor or an OSD may take to answer one message. An operation on an image is several.
pub const PATIENCE: Duration = Duration::from_secs(15);

type Handle = *mut c_void;
/// `librbd_progress_fn_t`.
type Progress = extern "C" fn(u64, u64, *mut c_void) -> c_int;
/// What is called for each part of an image that differs.
type Difference = extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;

/// A library's functions, looked up by their names when it is loaded.
macro_rules! library {
    ($name:ident, $file:literal, $($function:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        struct $name {
            $($function: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $name {
            fn load() -> Result<Self, String> {
                let library = open_library($file)?;
                Ok(Self {
                    $($function: {
                        let symbol = find_symbol(library, $file, stringify!($function))?;
                        // SAFETY: the function of this name has had this type since Ceph 14, and data and function
                        // pointers are alike on Linux.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(symbol)
                        }
                    },)*
                })
            }
        }
    };
}

library! { Rados, "librados.so.2",
    rados_create2(*mut Handle, *const c_char, *const c_char, u64) -> c_int;
    rados_conf_read_file(Handle, *const c_char) -> c_int;
    rados_conf_set(Handle, *const c_char, *const c_char) -> c_int;
    rados_conf_get(Handle, *const c_char, *mut c_char, usize) -> c_int;
    rados_connect(Handle) -> c_int;
    rados_shutdown(Handle);
    rados_cluster_fsid(Handle, *mut c_char, usize) -> c_int;
    rados_mon_command(Handle, *const *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char, *mut usize) -> c_int;
    rados_buffer_free(*mut c_char);
    rados_ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
    rados_ioctx_set_namespace(Handle, *const c_char);
    rados_ioctx_destroy(Handle);
    rados_create_write_op() -> Handle;
    rados_release_write_op(Handle);
    rados_write_op_create(Handle, c_int, *const c_char);
    rados_write_op_omap_cmp2(Handle, *const c_char, u8, *const c_char, usize, usize, *mut c_int);
    rados_write_op_omap_set2(Handle, *const *const c_char, *const *const c_char, *const usize, *const usize, usize);
    rados_write_op_omap_rm_keys2(Handle, *const *const c_char, *const usize, usize);
    rados_write_op_operate(Handle, Handle, *const c_char, *mut libc::time_t, c_int) -> c_int;
    rados_create_read_op() -> Handle;
    rados_release_read_op(Handle);
    rados_read_op_omap_get_vals2(Handle, *const c_char, *const c_char, u64, *mut Handle, *mut c_uchar, *mut c_int);
    rados_read_op_omap_get_vals_by_keys2(Handle, *const *const c_char, usize, *const usize, *mut Handle, *mut c_int);
    rados_read_op_operate(Handle, Handle, *const c_char, c_int) -> c_int;
    rados_omap_get_next2(Handle, *mut *mut c_char, *mut *mut c_char, *mut usize, *mut usize) -> c_int;
    rados_omap_get_end(Handle);
}

library! { Librbd, "librbd.so.1",
    rbd_image_options_create(*mut Handle);
    rbd_image_options_destroy(Handle);
    rbd_image_options_set_uint64(Handle, c_int, u64) -> c_int;
    rbd_create4(Handle, *const c_char, u64, Handle) -> c_int;
    rbd_clone3(Handle, *const c_char, *const c_char, Handle, *const c_char, Handle) -> c_int;
    rbd_remove(Handle, *const c_char) -> c_int;
    rbd_open(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_open_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_close(Handle) -> c_int;
    rbd_get_size(Handle, *mut u64) -> c_int;
    rbd_snap_create(Handle, *const c_char) -> c_int;
    rbd_snap_remove(Handle, *const c_char) -> c_int;
    rbd_resize2(Handle, u64, bool, Progress, *mut c_void) -> c_int;
    rbd_flatten(Handle) -> c_int;
    rbd_diff_iterate2(Handle, *const c_char, u64, u64, u8, u8, Difference, *mut c_void) -> c_int;
    rbd_namespace_exists(Handle, *const c_char, *mut bool) -> c_int;
}

/// `LIBRADOS_CMPXATTR_OP_EQ`.
const EQUAL: u8 = 1;
/// `LIBRADOS_CREATE_EXCLUSIVE`.
const EXCLUSIVE: c_int = 1;
/// `LIBRADOS_OPERATION_FULL_TRY`: the OSD says so where there is no room, and takes what makes room; without it a write to a
/// full pool waits for room.
const FULL_TRY: c_int = 64;
/// `RBD_IMAGE_OPTION_FEATURES`.
const FEATURES: c_int = 1;
/// `RBD_IMAGE_OPTION_CLONE_FORMAT`.
const CLONE_FORMAT: c_int = 12;
/// Layering, exclusive-lock, object-map, fast-diff and deep-flatten (`rbd/features.h`): all that the kernel knows by
/// Linux 5.3. Without an object map to remove an image is a message for each 4 MiB that it could have had.
const IMAGE_FEATURES: u64 = 1 | 4 | 8 | 16 | 32;

/// Where a client looks for a configuration if it is not told, as Ceph's own tools do.
const CONF: &str = "/etc/ceph/ceph.conf";

/// A call of Ceph's libraries failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {}", errno.desc())]
pub struct CephError {
    /// What was asked for.
    pub what: String,
    /// What was answered. ETIMEDOUT: nothing, in [`PATIENCE`].
    pub errno: Errno,
}

/// Ceph could not be reached at all.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A library is missing.
    #[error(
        "{0}: a store on Ceph needs librados2 and librbd1 (Debian: apt-get install librbd1; Fedora: dnf install librbd1)"
    )]
    NoLibrary(String),
    /// There is no such configuration, no keyring, or no cluster answers.
    #[error(transparent)]
    Failed(#[from] CephError),
}

fn open_library(file: &str) -> Result<*mut c_void, String> {
    let name = CString::new(file).expect("no NUL in it");
    // SAFETY: the name is a C string. What these libraries run when loaded are constructors of C++.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        Err(dl_error(file))
    } else {
        Ok(library)
    }
}

fn find_symbol(library: *mut c_void, file: &str, name: &str) -> Result<*mut c_void, String> {
    let symbol = CString::new(name).expect("no NUL in it");
    // SAFETY: the library is open, and is never closed.
    let found = unsafe { libc::dlsym(library, symbol.as_ptr()) };
    if found.is_null() {
        Err(format!("{file} has no {name}: it is older than Ceph 14"))
    } else {
        Ok(found)
    }
}

fn dl_error(file: &str) -> String {
    // SAFETY: dlerror gives a C string of this thread's, valid until its next call, or none.
    let text = unsafe {
        let text = libc::dlerror();
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    text.unwrap_or_else(|| format!("{file} cannot be loaded"))
}

fn libraries() -> Result<&'static (Rados, Librbd), ConnectError> {
    static LOADED: OnceLock<Result<(Rados, Librbd), String>> = OnceLock::new();
    LOADED
        .get_or_init(|| Ok((Rados::load()?, Librbd::load()?)))
        .as_ref()
        .map_err(|error| ConnectError::NoLibrary(error.clone()))
}

/// What a call returned: an error, where it is negative.
fn check(what: impl FnOnce() -> String, result: c_int) -> Result<(), CephError> {
    if result >= 0 {
        return Ok(());
    }
    Err(CephError {
        what: what(),
        errno: Errno::from_raw(-result),
    })
}

fn c_string(text: &str) -> CString {
    // A NUL ends what Ceph would see of a name anyway.
    CString::new(text.split('\0').next().unwrap_or_default()).expect("what is before the first NUL")
}

/// A connection to a cluster, as one of its users.
pub struct Cluster {
    libraries: &'static (Rados, Librbd),
    handle: Handle,
}

// SAFETY: librados' and librbd's handles are for any thread, and several at once (librados.h).
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: nothing else has the handle: a [`Pool`] keeps its cluster.
        unsafe { (self.libraries.0.rados_shutdown)(self.handle) }
    }
}

impl Cluster {
    /// Connects as `user` (without `client.`), as `conf` says, or the configuration where Ceph's tools look for it.
    ///
    /// # Errors
    /// Without the libraries, and what connecting said: ENOENT where there is no configuration or keyring, EACCES and EPERM where
    /// the key is not the user's, ETIMEDOUT where no monitor answers.
    pub fn connect(user: &str, conf: Option<&Path>) -> Result<Arc<Self>, ConnectError> {
        let libraries = libraries()?;
        let rados = &libraries.0;
        let (cluster, name) = (c_string("ceph"), c_string(&format!("client.{user}")));
        let mut handle = ptr::null_mut();
        // SAFETY: both are C strings, and the handle is written.
        let made =
            unsafe { (rados.rados_create2)(&raw mut handle, cluster.as_ptr(), name.as_ptr(), 0) };
        check(|| "librados".to_owned(), made)?;
        let this = Self { libraries, handle };
        let conf = conf.unwrap_or(Path::new(CONF));
        let path = c_string(&conf.to_string_lossy());
        // SAFETY: a handle that was made, and a C string.
        let read = unsafe { (rados.rados_conf_read_file)(handle, path.as_ptr()) };
        check(|| format!("reading {}", conf.display()), read)?;
        let patience = PATIENCE.as_secs().to_string();
        for (key, value) in [
            ("client_mount_timeout", patience.as_str()),
            ("rados_mon_op_timeout", &patience),
            ("rados_osd_op_timeout", &patience),
            // Nothing is read or written by way of librbd, and a daemon of ours says what it has to say itself.
            ("rbd_cache", "false"),
            // What is copied in the background leaves room for the jobs' own I/O: so many objects at a time.
            ("rbd_concurrent_management_ops", "4"),
            ("log_to_stderr", "false"),
            ("err_to_stderr", "false"),
            ("log_file", ""),
            ("admin_socket", ""),
        ] {
            let (key_, value) = (c_string(key), c_string(value));
            // SAFETY: a handle that was made, and C strings.
            let set = unsafe { (rados.rados_conf_set)(handle, key_.as_ptr(), value.as_ptr()) };
            check(|| format!("setting {key}"), set)?;
        }
        // SAFETY: the handle is made and configured.
        let connected = unsafe { (rados.rados_connect)(handle) };
        check(
            || format!("connecting to Ceph as client.{user} by {}", conf.display()),
            connected,
        )?;
        Ok(Arc::new(this))
    }

    /// A setting of the client's, as its configuration and the cluster have it; `None` where there is none of that name.
    #[must_use]
    pub fn setting(&self, key: &str) -> Option<String> {
        let key = c_string(key);
        let mut buffer = vec![0_u8; 16 << 10];
        // SAFETY: a C string, and a buffer of the length that is said.
        let read = unsafe {
            (self.libraries.0.rados_conf_get)(
                self.handle,
                key.as_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        };
        (read >= 0).then(|| until_nul(&buffer))
    }

    /// The cluster's id.
    ///
    /// # Errors
    /// What the library says.
    pub fn fsid(&self) -> Result<String, CephError> {
        let mut buffer = [0_u8; 64];
        // SAFETY: a buffer of the length that is said.
        let read = unsafe {
            (self.libraries.0.rados_cluster_fsid)(
                self.handle,
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        };
        check(|| "the cluster's id".to_owned(), read)?;
        Ok(until_nul(&buffer))
    }

    /// Asks the monitors.
    ///
    /// # Errors
    /// What they answer.
    pub fn ask(&self, command: &serde_json::Value) -> Result<Vec<u8>, CephError> {
        let text = c_string(&command.to_string());
        let commands = [text.as_ptr()];
        let (mut out, mut out_length) = (ptr::null_mut(), 0);
        let (mut status, mut status_length) = (ptr::null_mut(), 0);
        let rados = &self.libraries.0;
        // SAFETY: one C string, no input, and four places to write to.
        let result = unsafe {
            (rados.rados_mon_command)(
                self.handle,
                commands.as_ptr(),
                1,
                ptr::null(),
                0,
                &raw mut out,
                &raw mut out_length,
                &raw mut status,
                &raw mut status_length,
            )
        };
        let taken = |buffer: *mut c_char, length: usize| {
            if buffer.is_null() {
                return Vec::new();
            }
            // SAFETY: librados gives a buffer of this length, which is ours to free.
            unsafe {
                let bytes = std::slice::from_raw_parts(buffer.cast::<u8>(), length).to_vec();
                (rados.rados_buffer_free)(buffer);
                bytes
            }
        };
        let (out, status) = (taken(out, out_length), taken(status, status_length));
        let what = || {
            let said = String::from_utf8_lossy(&status).into_owned();
            format!("asking the monitors: {} ({command})", said.trim())
        };
        check(what, result)?;
        Ok(out)
    }

    /// A pool, or a namespace in it where `namespace` is not empty.
    ///
    /// # Errors
    /// ENOENT where there is no such pool.
    pub fn pool(self: &Arc<Self>, pool: &str, namespace: &str) -> Result<Pool, CephError> {
        let name = c_string(pool);
        let mut io = ptr::null_mut();
        // SAFETY: a C string, and a place to write to.
        let made = unsafe {
            (self.libraries.0.rados_ioctx_create)(self.handle, name.as_ptr(), &raw mut io)
        };
        check(|| format!("pool {pool}"), made)?;
        let namespace = c_string(namespace);
        // SAFETY: made just now, and a C string.
        unsafe { (self.libraries.0.rados_ioctx_set_namespace)(io, namespace.as_ptr()) };
        Ok(Pool {
            cluster: Arc::clone(self),
            io,
        })
    }
}

fn until_nul(buffer: &[u8]) -> String {
    let text = buffer.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

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
    cluster: Arc<Cluster>,
    io: Handle,
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

    fn rbd(&self) -> &'static Librbd {
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
        let keys = if found.is_null() {
            Omap::new()
        } else {
            self.taken(found)?
        };
        if result == -libc::ENOENT {
            return Ok(Omap::new());
        }
        // The step's own status means something only where the operation was done.
        let result = if result < 0 { result } else { status };
        check(|| format!("reading {object}"), result)?;
        Ok(keys)
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
        // SAFETY: it is not used again.
        unsafe { (rados.rados_omap_get_end)(found) };
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
        let keys: Vec<*const c_char> = change.set.keys().map(|key| key.as_ptr().cast()).collect();
        let values: Vec<*const c_char> = change
            .set
            .values()
            .map(|value| value.as_ptr().cast())
            .collect();
        let key_lengths: Vec<usize> = change.set.keys().map(String::len).collect();
        let value_lengths: Vec<usize> = change.set.values().map(Vec::len).collect();
        let removed: Vec<*const c_char> = change
            .remove
            .iter()
            .map(|key| key.as_ptr().cast())
            .collect();
        let removed_lengths: Vec<usize> = change.remove.iter().map(String::len).collect();
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

/// An image that is open.
pub struct Image<'a> {
    pool: &'a Pool,
    handle: Handle,
    name: String,
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
            (self.pool.rbd().rbd_resize2)(self.handle, size, true, no_progress, ptr::null_mut())
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
