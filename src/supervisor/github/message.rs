// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a scale set's queue tells: how many jobs there are, and what happened to them (github.com/actions/scaleset, types.go).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::cache::verdict::Verdict;

/// How many jobs and runners a scale set has, as GitHub counts them: it may be late, and it may be wrong for long. What it
/// does not say is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Statistics {
    /// Jobs that could be had.
    #[serde(deserialize_with = "or_default")]
    pub total_available_jobs: u32,
    /// Jobs that were taken, and are not assigned yet.
    #[serde(deserialize_with = "or_default")]
    pub total_acquired_jobs: u32,
    /// Jobs that are assigned to it, those that run among them: as many runners are wanted.
    #[serde(deserialize_with = "or_default")]
    pub total_assigned_jobs: u32,
    /// Jobs that run.
    #[serde(deserialize_with = "or_default")]
    pub total_running_jobs: u32,
    /// Its runners.
    #[serde(deserialize_with = "or_default")]
    pub total_registered_runners: u32,
    /// Those that have a job.
    #[serde(deserialize_with = "or_default")]
    pub total_busy_runners: u32,
    /// Those that wait for one.
    #[serde(deserialize_with = "or_default")]
    pub total_idle_runners: u32,
}

/// What the queue had.
#[derive(Debug)]
pub struct Message {
    /// Its number.
    pub id: u64,
    /// How many jobs there are now.
    pub statistics: Option<Statistics>,
    /// What happened to jobs.
    pub events: Vec<Event>,
}

/// What happened to a job.
#[derive(Debug, Clone)]
pub enum Event {
    /// It can be had.
    JobAvailable(Job),
    /// It is the set's.
    JobAssigned(Job),
    /// A runner has it.
    JobStarted(Job),
    /// It has ended.
    JobCompleted(Job),
}

/// A job, as far as GitHub says: what it leaves out, or has as null, is empty or 0 (the official client reads it so too).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Job {
    /// Its number in the queue; 0 at github.com, where jobs are assigned without being asked for.
    #[serde(deserialize_with = "or_default")]
    pub runner_request_id: i64,
    /// A UUID, by which jobs are told apart.
    #[serde(deserialize_with = "or_default")]
    pub job_id: String,
    /// Its repository's name.
    #[serde(deserialize_with = "or_default")]
    pub repository_name: String,
    /// And owner.
    #[serde(deserialize_with = "or_default")]
    pub owner_name: String,
    /// For people.
    #[serde(deserialize_with = "or_default")]
    pub job_display_name: String,
    /// `OWNER/NAME/PATH@REF` of the workflow that it stands in. A reusable workflow's is that one's.
    #[serde(deserialize_with = "or_default")]
    pub job_workflow_ref: String,
    /// The run that it belongs to; 0: it is not known.
    #[serde(deserialize_with = "or_default")]
    pub workflow_run_id: u64,
    /// The event that its run was begun by.
    #[serde(deserialize_with = "or_default")]
    pub event_name: String,
    /// The labels that it wants.
    #[serde(deserialize_with = "or_default")]
    pub request_labels: Vec<String>,
    /// The runner that has it.
    #[serde(deserialize_with = "or_default")]
    pub runner_name: String,
    /// How it ended.
    #[serde(deserialize_with = "or_default")]
    pub result: String,
    /// When it was queued, RFC 3339.
    #[serde(deserialize_with = "time")]
    pub queue_time: Option<String>,
    /// When it became the set's.
    #[serde(deserialize_with = "time")]
    pub scale_set_assign_time: Option<String>,
    /// When a runner got it.
    #[serde(deserialize_with = "time")]
    pub runner_assign_time: Option<String>,
}

/// A value; null is what is left out.
pub(super) fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A time. The service writes the first moment of the year 1 where there is none.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let time = Option::<String>::deserialize(deserializer)?;
    Ok(time.filter(|time| !time.is_empty() && !time.starts_with("0001-")))
}

/// A value, or none where it is none of that kind.
pub(super) fn if_right<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

impl Event {
    /// Of its type and its fields; `None` where the type is unknown.
    pub(super) fn of(kind: &str, fields: Value) -> Option<Result<Self, serde_json::Error>> {
        let event = match kind {
            "JobAvailable" => Self::JobAvailable,
            "JobAssigned" => Self::JobAssigned,
            "JobStarted" => Self::JobStarted,
            "JobCompleted" => Self::JobCompleted,
            _ => return None,
        };
        Some(serde_json::from_value(fields).map(event))
    }
}

impl Job {
    /// How it ended.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.result.to_ascii_lowercase().as_str() {
            "succeeded" | "succeededwithissues" => Verdict::Success,
            "" => Verdict::Unknown,
            _ => Verdict::Failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn results() {
        for (result, verdict) in [
            ("succeeded", Verdict::Success),
            ("Succeeded", Verdict::Success),
            ("failed", Verdict::Failure),
            ("canceled", Verdict::Failure),
            ("abandoned", Verdict::Failure),
            ("", Verdict::Unknown),
        ] {
            let job: Job =
                serde_json::from_value(json!({"runnerRequestId": 1, "repositoryName": "r",
                "ownerName": "o", "result": result}))
                .unwrap();
            assert_eq!(job.verdict(), verdict, "{result}");
        }
    }
}
