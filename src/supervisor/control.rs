// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor's socket, for `runners`: JSON over HTTP, as the plugin's. Root's alone.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::pool::{Orders, SlotView, Worker, read};
use super::trouble::Trouble;
use crate::api::runners::{PoolReport, Report, Row};
use crate::api::volumes::One;
use crate::cache::verdict::Verdict;
use crate::http::answer::{Refusal, ok};
use crate::text::unix_now;

/// Between two reports to the daemon.
const REPORT: Duration = Duration::from_secs(5);

struct App {
    workers: Vec<Arc<Worker>>,
    asked: watch::Sender<Orders>,
}

/// What is asked of one pool, or of all.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Asked {
    pool: Option<String>,
    now: bool,
    runner: String,
    lines: u32,
}

/// The endpoints.
pub(super) fn router(workers: Vec<Arc<Worker>>, asked: watch::Sender<Orders>) -> Router {
    Router::new()
        .route("/Runners.List", post(list))
        .route("/Runners.Pause", post(pause))
        .route("/Runners.Resume", post(resume))
        .route("/Runners.Drain", post(drain))
        .route("/Runners.Logs", post(logs))
        .with_state(Arc::new(App { workers, asked }))
}

type Answer = Result<Response, Refusal>;

fn parse(body: &[u8]) -> Result<Asked, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, e.to_string()))
}

fn missing(what: &str, name: &str) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, format!("there is no {what} {name}"))
}

impl App {
    fn pools(&self, name: Option<&str>) -> Result<Vec<&Arc<Worker>>, Refusal> {
        let Some(name) = name else {
            return Ok(self.workers.iter().collect());
        };
        let pool = self.workers.iter().find(|worker| worker.pool.name == name);
        Ok(vec![pool.ok_or_else(|| missing("pool", name))?])
    }

    fn order(&self, asked: &Asked, orders: Orders) -> Answer {
        let pools = self.pools(asked.pool.as_deref())?;
        // What ends is not called back.
        if pools.iter().any(|worker| worker.ends()) {
            let problem = "the supervisor is ending".to_owned();
            return Err(Refusal::new(StatusCode::CONFLICT, problem));
        }
        for worker in pools {
            worker.orders.send_replace(orders);
            worker.poke();
        }
        Ok(ok(&json!({})))
    }
}

async fn list(State(app): State<Arc<App>>, body: Bytes) -> Answer {
    let asked = parse(&body)?;
    let mut rows = Vec::new();
    for worker in app.pools(asked.pool.as_deref())? {
        for (slot, view) in worker.views() {
            let mut row = row(worker, slot, &view);
            (row.hits, row.caches) = caches(worker, &view).await;
            rows.push(row);
        }
    }
    Ok(ok(&rows))
}

/// Reports to the daemon for ever: it is never asked for anything, so that no page of the daemon's
/// waits for us.
pub(super) async fn report(workers: Vec<Arc<Worker>>) {
    let Some(first) = workers.first() else { return };
    let mut trouble = Trouble::new("the status page".to_owned());
    loop {
        let mut report = Report::default();
        for worker in &workers {
            let views = worker.views();
            let rows = views.iter().map(|(slot, view)| row(worker, *slot, view));
            report.slots.extend(rows);
            let counts = |state: &str| views.iter().filter(|(_, view)| view.state == state).count();
            let board = worker.board();
            for (verdict, n) in &board.ended {
                *report.jobs.entry(verdict.clone()).or_default() += n;
            }
            report.waits.add(&board.waits);
            // A scale set says it before its runner is looked at.
            let running = board.jobs.running().max(counts("busy"));
            let pool = PoolReport {
                assigned: running + board.demand.waiting(running),
                running,
                idle: counts("idle"),
                wanted: board.wanted,
            };
            report.pools.insert(worker.pool.name.clone(), pool);
            report.github_faults += worker.github.faults();
        }
        let rest = match first.friend("Friend.Slots", json!(report)).await {
            Ok(_) => {
                trouble.over();
                REPORT
            }
            Err(error) => trouble.with(&error.into()),
        };
        tokio::time::sleep(rest).await;
    }
}

/// How many caches of a runner were restored, and how many it has.
async fn caches(worker: &Worker, view: &SlotView) -> (usize, usize) {
    let (mut hits, mut caches) = (0, 0);
    for volume in &view.volumes {
        let asked = worker
            .friend("VolumeDriver.Get", json!({"Name": volume}))
            .await;
        let status = asked
            .and_then(read::<One>)
            .map(|answer| Value::Object(answer.volume.status))
            .unwrap_or_default();
        let mounts = status["mounts"]
            .as_object()
            .map(|all| all.values().cloned().collect());
        for cache in mounts.unwrap_or_else(|| vec![status]) {
            caches += usize::from(cache["restored"].is_string());
            hits += usize::from(matches!(
                cache["restored"].as_str(),
                Some("exact" | "fallback")
            ));
        }
    }
    (hits, caches)
}

fn row(worker: &Worker, slot: usize, view: &SlotView) -> Row {
    let paused = *worker.orders.borrow() == Orders::Pause;
    let mut problem = view.problem.clone();
    // A pool that hears of no jobs shows why where it has no runner.
    if view.runner.is_empty()
        && let Some(unheard) = &worker.board().set_problem
    {
        problem = Some(problem.map_or_else(
            || unheard.clone(),
            |problem| format!("{problem}; {unheard}"),
        ));
    }
    Row {
        slot: worker.pool.slot_name(slot),
        state: if paused && view.state == "empty" {
            "paused"
        } else {
            view.state
        }
        .to_owned(),
        runner: view.runner.clone(),
        job: view.job.clone(),
        url: (!view.url.is_empty()).then(|| view.url.clone()),
        age: unix_now().saturating_sub(view.since),
        hits: 0,
        caches: 0,
        last: view.last.as_ref().map(Verdict::to_string),
        problem,
    }
}

async fn pause(State(app): State<Arc<App>>, body: Bytes) -> Answer {
    app.order(&parse(&body)?, Orders::Pause)
}

async fn resume(State(app): State<Arc<App>>, body: Bytes) -> Answer {
    let asked = parse(&body)?;
    for worker in app.pools(asked.pool.as_deref())? {
        worker.board().backoff.forgive();
    }
    app.order(&asked, Orders::Run)
}

async fn drain(State(app): State<Arc<App>>, body: Bytes) -> Answer {
    let asked = parse(&body)?;
    let orders = if asked.now {
        Orders::Stop
    } else {
        Orders::Drain
    };
    app.asked.send_replace(orders);
    Ok(ok(&json!({})))
}

async fn logs(State(app): State<Arc<App>>, body: Bytes) -> Answer {
    let asked = parse(&body)?;
    for worker in &app.workers {
        for (slot, view) in worker.views() {
            let named = view.runner == asked.runner || worker.pool.slot_name(slot) == asked.runner;
            if !named || view.container.is_empty() {
                continue;
            }
            let text = worker.logs(&view.container, asked.lines).await;
            return match text {
                Ok(text) => Ok(ok(&Value::String(text)).into_response()),
                Err(error) => Err(Refusal::new(StatusCode::BAD_GATEWAY, error.to_string())),
            };
        }
    }
    Err(missing("runner with a container", &asked.runner))
}
