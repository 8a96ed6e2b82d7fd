// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ceph's own libraries, found when a store on Ceph is opened: `librados.so.2` and `librbd.so.1`.
//!
//! They are loaded by dlopen(3), so that a host without Ceph needs no package of it. Their interface in C has been the same
//! since Ceph 14 (`rados/librados.h`, `rbd/librbd.h`): nothing is called that is younger.
//!
//! Every call is bounded: librados gives up on what a monitor or an OSD does not answer in [`PATIENCE`], with ETIMEDOUT. A
//! write that was given up may be done all the same: it is in doubt.

mod image;
mod pool;

use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_void};
use std::path::Path;
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;

pub use self::image::Image;
pub use self::pool::{Omap, OmapWrite, Pool};

/// How long a monitor or an OSD may take to answer one message. An operation on an image is several.
pub const PATIENCE: Duration = Duration::from_secs(15);

type Handle = *mut c_void;
/// `librbd_progress_fn_t`.
type Progress = extern "C" fn(u64, u64, *mut c_void) -> c_int;
/// `rbd_image_watcher_t`.
#[repr(C)]
struct Watcher {
    address: *mut c_char,
    client: i64,
    cookie: u64,
}

impl Default for Watcher {
    fn default() -> Self {
        Self {
            address: ptr::null_mut(),
            client: 0,
            cookie: 0,
        }
    }
}

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
    rbd_watchers_list(Handle, *mut Watcher, *mut usize) -> c_int;
    rbd_watchers_list_cleanup(*mut Watcher, usize);
    rbd_namespace_exists(Handle, *const c_char, *mut bool) -> c_int;
    rbd_namespace_create(Handle, *const c_char) -> c_int;
    rbd_version(*mut c_int, *mut c_int, *mut c_int);
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
pub(super) const IMAGE_FEATURES: u64 = 1 | 4 | 8 | 16 | 32;

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

unsafe extern "C" {
    /// Of glibc: on_exit(3).
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// Ends the process before Ceph's libraries take down what they have in common: a thread may be in them still, and would crash.
extern "C" fn leave(status: c_int, _: *mut c_void) {
    // SAFETY: it does not return. What is written to standard output was flushed before exit(3).
    unsafe { libc::_exit(status) }
}

fn libraries() -> Result<&'static (Rados, Librbd), ConnectError> {
    static LOADED: OnceLock<Result<(Rados, Librbd), String>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            let loaded = (Rados::load()?, Librbd::load()?);
            // SAFETY: a function that lives as long as the process. What was registered last is called first.
            unsafe { on_exit(leave, ptr::null_mut()) };
            Ok(loaded)
        })
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

    /// The version of librbd's interface, such as `1.18.0` of Ceph 18.
    #[must_use]
    pub fn librbd(&self) -> String {
        let (mut major, mut minor, mut extra) = (0, 0, 0);
        // SAFETY: three places to write to.
        unsafe {
            (self.libraries.1.rbd_version)(&raw mut major, &raw mut minor, &raw mut extra);
        }
        format!("{major}.{minor}.{extra}")
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
