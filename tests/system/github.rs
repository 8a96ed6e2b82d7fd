// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A stand-in for GitHub, and tests of the client of GitHub against it.
//!
//! [`fake`] answers as GitHub's REST API and its Actions service do, and takes a request that is
//! not of the documented shape for a failure of the test.

mod check;
mod client;
pub mod fake;
mod listening;
mod proxy;
mod turns;

use crate::harness::{Test, Tier, test};

pub fn tests() -> Vec<Test> {
    let mut tests = client::tests();
    let refused = test(Tier::Host, "github::bad_configurations", check::refused);
    tests.push(refused);
    tests.extend(listening::tests());
    tests.extend(turns::tests());
    tests.push(test(
        Tier::Host,
        "github::behind_a_proxy",
        proxy::through_it,
    ));
    tests
}
