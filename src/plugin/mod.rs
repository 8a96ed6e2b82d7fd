// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The volume-plugin protocol, as Podman and dockerd speak it, over a unix socket.
//!
//! `router` holds the endpoints, `wire` what the engine's results become; requests and answers are
//! in `crate::api`, the connections in [`crate::http`].
//!
//! What never happens here: an answer of 200 to what was refused; a Get or List
//! that waits, be it for the store or for a free thread; work that stops because
//! its client hung up.

pub(crate) mod wire;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use tokio::sync::Semaphore;

use crate::api::volumes::{self, Request, Use};
use crate::container::Container;
use crate::engine::{Engine, EngineError, Happened};
use crate::http::Peer;
use crate::http::answer::{Refusal, ok};
use crate::http::body::Payload;
use crate::text::printable;
use crate::userns::Ids;

/// How many Creates, Mounts and Removes are under way at once. Each has a thread;
/// what the store does for them it does one after the other anyhow. Well above any
/// number of containers that start at one moment.
pub const MAX_WORK: usize = 128;

/// Threads beyond [`MAX_WORK`], for Unmounts: those must find a thread at once, and
/// hold it for 4 s at most.
pub(crate) const UNMOUNT_THREADS: usize = 64;

/// How long a request waits for one of [`MAX_WORK`] places: less than the 5 s
/// after which Podman gives up, so that its user reads our answer.
const WORK_WAIT: Duration = Duration::from_secs(4);

fn is_root(peer: Peer) -> Result<(), Refusal> {
    if peer.uid == Some(0) {
        Ok(())
    } else {
        let why = "only root ends the uses of others";
        Err(Refusal::new(StatusCode::FORBIDDEN, why))
    }
}

/// The IDs of the client's user namespace.
fn ids_of(peer: Peer) -> Result<Ids, Refusal> {
    let unknown = || io::Error::from(io::ErrorKind::NotFound);
    let ids = peer.pid.ok_or_else(unknown).and_then(Ids::of_process);
    ids.map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, format!("your user namespace: {e}")))
}

struct App {
    engine: Arc<Engine>,
    work: Arc<Semaphore>,
}

/// The protocol's endpoints, served by `engine`.
///
/// It must run in a runtime with at least [`MAX_WORK`] + [`UNMOUNT_THREADS`]
/// blocking threads.
pub(crate) fn router(engine: Arc<Engine>) -> Router {
    let app = Arc::new(App {
        engine,
        work: Arc::new(Semaphore::new(MAX_WORK)),
    });
    Router::new()
        .route("/Plugin.Activate", post(activate))
        .route("/VolumeDriver.Create", post(create))
        .route("/VolumeDriver.Get", post(get))
        .route("/VolumeDriver.List", post(list))
        .route("/VolumeDriver.Remove", post(remove))
        .route("/VolumeDriver.Path", post(path))
        .route("/VolumeDriver.Mount", post(mount))
        .route("/VolumeDriver.Unmount", post(unmount))
        .route("/VolumeDriver.Capabilities", post(capabilities))
        // Ours, for the hooks and for commands.
        .route("/Friend.Stats", post(stats))
        .route("/Friend.Starting", post(starting))
        .route("/Friend.Started", post(started))
        .route("/Friend.Ended", post(ended))
        // Ours, for `gc` and `remove --force`.
        .route("/Friend.Gc", post(gc))
        .route("/Friend.Remove", post(remove_by_force))
        .route("/Friend.Release", post(release))
        // Ours, for the supervisor.
        .route("/Friend.Judged", post(judged))
        .route("/Friend.Admit", post(admit))
        .fallback(no_such_endpoint)
        .method_not_allowed_fallback(not_a_post)
        .with_state(app)
}

type Answer = Result<Response, Refusal>;

async fn activate(_: Payload) -> Response {
    ok(&volumes::Activated::default())
}

async fn capabilities(_: Payload) -> Response {
    ok(&volumes::Capabilities::default())
}

async fn list(State(app): State<Arc<App>>, _: Payload) -> Answer {
    let volumes = app.at_once(Engine::list)?;
    Ok(ok(&volumes::Many {
        volumes: volumes.into_iter().map(Into::into).collect(),
    }))
}

async fn get(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let name = Request::parse(&body.0)?.name()?;
    match app.at_once(|engine| engine.get(&name))? {
        Some(view) => Ok(ok(&volumes::One {
            volume: view.into(),
        })),
        None => Err(EngineError::NoSuchVolume(name).into()),
    }
}

async fn path(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let name = Request::parse(&body.0)?.name()?;
    match app.at_once(|engine| engine.get(&name))? {
        Some(view) => Ok(ok(&volumes::Mountpoint {
            mountpoint: view
                .mountpoint
                .map(|p| p.display().to_string())
                .unwrap_or_default(),
        })),
        None => Err(EngineError::NoSuchVolume(name).into()),
    }
}

async fn create(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let request = Request::parse(&body.0)?;
    let name = request.name()?;
    let options = request.into_options();
    app.done(move |engine| engine.create(&name, &options)).await
}

async fn remove(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let name = Request::parse(&body.0)?.name()?;
    app.done(move |engine| engine.remove(&name)).await
}

/// For people: no client of the protocol takes a volume away from under a container.
async fn remove_by_force(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    body: Payload,
) -> Answer {
    is_root(peer)?;
    let name = Request::parse(&body.0)?.name()?;
    app.done(move |engine| engine.remove_by_force(&name)).await
}

/// For the supervisor, of containers that it knows to be gone.
async fn release(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    body: Payload,
) -> Answer {
    is_root(peer)?;
    let name = Request::parse(&body.0)?.name()?;
    app.done(move |engine| engine.release(&name)).await
}

async fn mount(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    body: Payload,
) -> Answer {
    let request = Request::parse(&body.0)?;
    let (name, id) = (request.name()?, request.id()?);
    let at = app
        .work(move |engine| {
            let at = engine.mount(&name, &id)?;
            if let Some(uid) = peer.uid.filter(|uid| *uid != 0) {
                engine.let_pass(uid);
            }
            Ok(at)
        })
        .await?;
    Ok(ok(&volumes::Mountpoint {
        mountpoint: at.display().to_string(),
    }))
}

async fn unmount(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let request = Request::parse(&body.0)?;
    let (name, id) = (request.name()?, request.id()?);
    let engine = Arc::clone(&app.engine);
    settled(tokio::task::spawn_blocking(move || engine.unmount(&name, &id)).await)?;
    Ok(ok(&volumes::Done {}))
}

async fn starting(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    body: Payload,
) -> Answer {
    let of = volumes::Start::parse(&body.0)?;
    let (names, ids) = (of.names()?, of.ids(&ids_of(peer)?)?);
    app.done(move |engine| names.iter().try_for_each(|name| engine.fit(name, &ids)))
        .await
}

async fn started(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    body: Payload,
) -> Answer {
    let of = Use::parse(&body.0)?;
    let container = match of.pid {
        // Who runs containers in a namespace of his own speaks of none beyond it.
        Some(pid) => {
            let theirs = ids_of(peer)?;
            Container::of_process(&of.container, pid)
                .ok()
                .filter(|container| container.ids.are_part_of(&theirs))
        }
        None => None,
    };
    app.tell(of, Happened::Started(container)).await
}

async fn ended(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let of = Use::parse(&body.0)?;
    let verdict = of.verdict();
    app.tell(of, Happened::Ended(verdict)).await
}

async fn stats(State(app): State<Arc<App>>, _: Payload) -> Answer {
    Ok(ok(&wire::Stats {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        stats: app.at_once(Engine::stats)?,
    }))
}

async fn gc(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let asked = volumes::Gc::parse(&body.0)?;
    let evicted = app.work(move |engine| engine.gc(asked.dry_run)).await?;
    Ok(ok(&wire::Evictions { evicted }))
}

async fn judged(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let of = Use::parse(&body.0)?;
    let verdict = of.verdict();
    app.tell(of, Happened::Judged(verdict)).await
}

async fn admit(State(app): State<Arc<App>>, body: Payload) -> Answer {
    let request = Request::parse(&body.0)?;
    let name = request.name()?;
    let options = request.into_options();
    app.done(move |engine| engine.admit(&name, &options)).await
}

async fn no_such_endpoint(uri: Uri, body: Payload) -> Refusal {
    drop(body);
    Refusal::new(
        StatusCode::NOT_FOUND,
        format!(
            "{} is no endpoint of the volume-plugin protocol",
            uri.path().get(..80).unwrap_or(uri.path())
        ),
    )
}

pub(crate) async fn not_a_post(body: Payload) -> Refusal {
    drop(body);
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "the volume-plugin protocol's requests are POSTs",
    )
}

impl App {
    /// What the engine answers from memory: on this thread, so that it queues
    /// behind nothing.
    fn at_once<T>(&self, ask: impl FnOnce(&Engine) -> T) -> Result<T, Refusal> {
        catch_unwind(AssertUnwindSafe(|| ask(&self.engine))).map_err(|panic| panicked(&*panic))
    }

    /// Tells the engine of a container that uses volumes.
    async fn tell(&self, of: Use, happened: Happened) -> Answer {
        let mut names = of.names()?;
        // A failure that waited for its turn would come after the lease's end, which would be published.
        self.at_once(|engine| {
            names.retain(|name| engine.container(name, &of.container, &happened));
        })?;
        if !names.is_empty() {
            // Nor does this wait for a place among the requests: there is one for a container's end at most.
            let engine = Arc::clone(&self.engine);
            let written = tokio::task::spawn_blocking(move || {
                for name in &names {
                    engine.write_verdict(name);
                }
            });
            settled(written.await)?;
        }
        Ok(ok(&volumes::Done {}))
    }

    /// [`App::work`] that has nothing to answer.
    async fn done(
        &self,
        act: impl FnOnce(&Arc<Engine>) -> Result<(), EngineError> + Send + 'static,
    ) -> Answer {
        self.work(act).await?;
        Ok(ok(&volumes::Done {}))
    }

    /// What the engine does on a thread of its own, to the end, whether or not the
    /// client waits for it.
    async fn work<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Arc<Engine>) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let place = Arc::clone(&self.work).acquire_owned();
        let Ok(Ok(place)) = tokio::time::timeout(WORK_WAIT, place).await else {
            return Err(Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{MAX_WORK} requests are under way already, and none has ended in time"),
            ));
        };
        let engine = Arc::clone(&self.engine);
        let done = tokio::task::spawn_blocking(move || {
            let _place = place;
            act(&engine)
        });
        Ok(settled(done.await)?.inspect_err(|error| self.engine.tally().refused(error))?)
    }
}

fn settled<T>(joined: Result<T, tokio::task::JoinError>) -> Result<T, Refusal> {
    joined.map_err(|error| match error.try_into_panic() {
        Ok(panic) => panicked(&*panic),
        Err(_) => EngineError::Stopping.into(),
    })
}

fn panicked(panic: &(dyn Any + Send)) -> Refusal {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    tracing::error!(panic = %printable(text), "a request made the daemon panic: please report it");
    Refusal::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("the daemon has a defect, see its log: {text}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_panic_becomes_a_refusal() {
        let joined = tokio::task::spawn_blocking(|| panic!("on purpose")).await;
        let refusal = settled::<()>(joined).expect_err("it panicked");
        assert_eq!(refusal.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(refusal.message.contains("on purpose"));
    }
}
