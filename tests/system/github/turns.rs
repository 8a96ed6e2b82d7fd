// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whose request goes first.

use std::time::Duration;

use super::client::{run, with_token};
use super::fake::{FaultKind, MAIN};
use crate::harness::{Test, Tier, test};

pub fn tests() -> Vec<Test> {
    let body = || {
        run(|fake| async move {
            let github = with_token(&fake);
            let job = fake.queue(&MAIN, "");
            // Longer than the client waits: what is behind that one fails.
            let slow = FaultKind::Slow(Duration::from_secs(3600));
            fake.inject("/actions/runners", slow, 1);
            let names = github.names();
            let whose = async {
                while fake.state().faults_left() > 0 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                github
                    .run("octo", "project", job * 10, MAIN.workflow_ref)
                    .await
            };
            tokio::select! {
                run = whose => assert_eq!(run.unwrap().event, "push"),
                names = names => panic!("{names:?} was waited for"),
            }
        });
    };
    vec![test(Tier::Host, "github::whose_job_it_is_goes_first", body)]
}
