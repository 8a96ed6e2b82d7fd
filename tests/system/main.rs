//! System tests: on real devices, real kernels, as root.

mod mounts;
mod support {
    pub mod disks;
}

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    libtest_mimic::run(&arguments, mounts::tests()).exit();
}
