// SPDX-License-Identifier: Apache-2.0 OR MIT
//! System tests: on real kernels, real devices, real tools, as root.
//!
//! Each module has a table of tests, and each test says where it runs (see [`harness::Tier`]).
//! What needs device-mapper or cgroup2 runs in a guest (`tests/vm/run`), which the tests of one
//! group share and which boots when the first of them asks.

mod action;
mod bounds;
mod cli;
mod crash;
mod damage;
mod dependencies;
mod docker;
mod docs;
mod full;
mod github;
mod harness;
mod jobs;
mod leases;
mod lvm;
mod mounts;
mod package;
mod podman;
mod powercut;
mod quickstart;
mod raw;
mod rbd;
mod reflink;
mod security;
mod stop;
mod store;
mod support;
mod torture;
mod views;
mod vm;

fn main() {
    harness::main(
        [
            action::tests(),
            bounds::tests(),
            cli::tests(),
            crash::tests(),
            damage::tests(),
            dependencies::tests(),
            docker::tests(),
            docs::tests(),
            full::tests(),
            github::tests(),
            jobs::tests(),
            leases::tests(),
            lvm::tests(),
            mounts::tests(),
            package::tests(),
            podman::tests(),
            powercut::tests(),
            quickstart::tests(),
            raw::tests(),
            rbd::tests(),
            reflink::tests(),
            security::tests(),
            stop::tests(),
            #[cfg(feature = "failpoints")]
            store::tests_in_memory(),
            torture::tests(),
            views::tests(),
            vm::tests(),
        ]
        .into_iter()
        .flatten()
        .collect(),
    );
}
