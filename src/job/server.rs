// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sockets of job volumes: connections, bounded in number, in length and in time,
//! each of which makes requests ([`super::protocol`]) of the engine.
//!
//! A job is not trusted. What it does on its socket costs its own connections and its own places
//! among the threads that work for it, and nobody else's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, timeout, timeout_at};

use super::protocol::{self, Parser, Request, Said, error, list, told};
use crate::cache::late_path::LatePath;
use crate::cache::names::LvName;
use crate::config::JobLimits;
use crate::engine::{Engine, Job, JobSocket};
use crate::mount::{self, MountPoint};
use crate::userns::Ids;

/// How many requests of all jobs are worked on at once beside the first of each, which waits for no other job's: each has a
/// thread.
const SHARED_WORK: usize = 32;

/// And of one job, beside its first.
const SHARED_OF_JOB: usize = 3;

/// Threads for all of them: a host runs no more jobs at once than some hundred.
pub const MAX_WORK: usize = SHARED_WORK + 480;

/// How long a request waits for somebody to say whose job it is. A supervisor is told of a job
/// some seconds after it has begun.
const ADMISSION: Duration = Duration::from_secs(120);

/// What is mounted where, if nothing else can be found out.
const USUAL_TARGET: &str = "/run/lvm-cache-friend";

/// How much of what a client still sends is read before its connection closes, so that it reads
/// our answer instead of dying of a broken pipe.
const DRAIN: (u64, Duration) = (1 << 20, Duration::from_secs(1));

/// Serves the sockets that `sockets` brings, for as long as that is open.
pub async fn serve(
    engine: Arc<Engine>,
    limits: JobLimits,
    mut sockets: UnboundedReceiver<JobSocket>,
) {
    let shared = Arc::new(Semaphore::new(SHARED_WORK));
    while let Some(JobSocket { job, listener }) = sockets.recv().await {
        match UnixListener::from_std(listener) {
            Ok(listener) => {
                let place = Place {
                    engine: Arc::clone(&engine),
                    limits,
                    work: Arc::new(Work {
                        first: Arc::new(Semaphore::new(1)),
                        more: Arc::new(Semaphore::new(SHARED_OF_JOB)),
                        shared: Arc::clone(&shared),
                    }),
                    job,
                };
                tokio::spawn(place.serve(listener));
            }
            Err(error) => tracing::error!(job = job.name(), %error, "its socket is not served"),
        }
    }
}

/// A job volume's socket.
#[derive(Clone)]
struct Place {
    engine: Arc<Engine>,
    limits: JobLimits,
    work: Arc<Work>,
    job: Arc<Job>,
}

/// The places for a job's requests: one of its own, and some that all jobs share, so that however many of the others'
/// requests take long, each job has a request worked on.
struct Work {
    first: Arc<Semaphore>,
    more: Arc<Semaphore>,
    shared: Arc<Semaphore>,
}

impl Work {
    /// Waits for a place, which is free again when what this gives is dropped.
    async fn place(&self) -> impl Send + use<> {
        let take = |places: &Arc<Semaphore>| Arc::clone(places).acquire_owned();
        tokio::select! {
            biased;
            first = take(&self.first) => (first, None),
            more = async { (take(&self.more).await, take(&self.shared).await) } => (more.0, Some(more.1)),
        }
    }
}

/// Ends a connection: see [`DRAIN`].
async fn drain(mut stream: UnixStream) -> io::Result<()> {
    stream.shutdown().await?;
    let (most, patience) = DRAIN;
    let mut rest = stream.take(most);
    let _ = timeout(patience, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
    Ok(())
}

impl Place {
    async fn serve(self, listener: UnixListener) {
        let mut closed = self.job.closed();
        let connections = Arc::new(Semaphore::new(self.limits.connections));
        let accept = async {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else {
                    // No descriptors, no memory: what waits stays in the queue.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                if let Ok(connection) = Arc::clone(&connections).try_acquire_owned() {
                    let place = self.clone();
                    let mut closed = self.job.closed();
                    tokio::spawn(async move {
                        tokio::select! {
                            _ = place.talk(stream) => {}
                            _ = closed.wait_for(|closed| *closed) => {}
                        }
                        drop(connection);
                    });
                } else {
                    let most = self.limits.connections;
                    let text = format!("error a job has at most {most} connections at once\n");
                    let _ =
                        timeout(Duration::from_millis(10), stream.write_all(text.as_bytes())).await;
                    // A client that connects as fast as it can waits, and no other.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        tokio::select! {
            () = accept => {}
            _ = closed.wait_for(|closed| *closed) => {}
        }
    }

    async fn talk(&self, mut stream: UnixStream) -> io::Result<()> {
        let client = match self.client(&stream) {
            Ok(client) => client,
            Err(why) => return self.say(&mut stream, &error(why)).await,
        };
        let mut parser = Parser::new(protocol::Limits {
            criteria: self.limits.criteria,
            terms: self.limits.terms,
        });
        let mut buffer = Vec::new();
        // By when the request that has begun must have arrived.
        let mut deadline = None;
        'connection: loop {
            while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                if line.len() > self.limits.line + 1 {
                    self.refuse_line(&mut stream).await?;
                    break 'connection;
                }
                let said = parser.line(&line);
                if !said.is_empty() {
                    deadline = None;
                }
                if !self.answer_all(&mut stream, client, said).await? {
                    break 'connection;
                }
            }
            if buffer.len() > self.limits.line {
                self.refuse_line(&mut stream).await?;
                break;
            }
            if buffer.is_empty() && !parser.is_pending() {
                deadline = None;
            }
            let Some(read) = self.read(&mut stream, &mut buffer, deadline).await? else {
                break;
            };
            if read == 0 {
                let mut said = Vec::new();
                if !buffer.is_empty() {
                    said = parser.line(&buffer);
                }
                said.extend(parser.end());
                self.answer_all(&mut stream, client, said).await?;
                break;
            }
            deadline = deadline.or_else(|| Some(Instant::now() + self.limits.request_time));
        }
        drain(stream).await
    }

    /// Reads more of a request, and gives how many bytes; `None`: it has not arrived in time, and the client was told.
    async fn read(
        &self,
        stream: &mut UnixStream,
        buffer: &mut Vec<u8>,
        deadline: Option<Instant>,
    ) -> io::Result<Option<usize>> {
        let Some(deadline) = deadline else {
            return stream.read_buf(buffer).await.map(Some);
        };
        match timeout_at(deadline, stream.read_buf(buffer)).await {
            Ok(read) => read.map(Some),
            Err(_) => {
                let seconds = self.limits.request_time.as_secs_f32();
                let text = format!("the request was not finished within {seconds} s");
                self.say(stream, &error(&text)).await?;
                Ok(None)
            }
        }
    }

    /// The process at the other end, where it may speak here: one in a container that has the job volume, or root, who may do all
    /// that this socket gives by other ways. Of this host's users nobody else gets as far as the socket but members of the
    /// plugin's group, and their namespaces, if they made some, are no containers.
    fn client(&self, stream: &UnixStream) -> Result<Client, &'static str> {
        let peer = stream.peer_cred().map_err(|_| UNKNOWN_CLIENT)?;
        let pid = peer.pid().ok_or(UNKNOWN_CLIENT)?;
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
        let (its, ours) = (namespace(&pid.to_string()), namespace("self"));
        let (its, ours) = (
            its.map_err(|_| UNKNOWN_CLIENT)?,
            ours.map_err(|_| UNKNOWN_CLIENT)?,
        );
        let root = peer.uid() == 0;
        let inside = self.job.is_in_container(pid);
        if !root && (its == ours || inside == Some(false)) {
            return Err(NOT_INSIDE);
        }
        Ok(Client {
            pid,
            unplaced: !root && inside.is_none(),
        })
    }

    async fn refuse_line(&self, stream: &mut UnixStream) -> io::Result<()> {
        let text = format!("a line has at most {} bytes", self.limits.line);
        self.say(stream, &error(&text)).await
    }

    async fn say(&self, stream: &mut UnixStream, text: &str) -> io::Result<()> {
        match timeout(self.limits.request_time, stream.write_all(text.as_bytes())).await {
            Ok(written) => written,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Answers one after the other, and gives whether the connection goes on.
    async fn answer_all(
        &self,
        stream: &mut UnixStream,
        client: Client,
        all: Vec<Said>,
    ) -> io::Result<bool> {
        for said in all {
            if !self.answer(stream, client, said).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Answers, and gives whether the connection goes on.
    async fn answer(
        &self,
        stream: &mut UnixStream,
        client: Client,
        said: Said,
    ) -> io::Result<bool> {
        let text = match said {
            Said::Bye => return Ok(false),
            Said::Refused(why) => error(&why),
            Said::Request(request) => {
                if needs_scope(&request) && timeout(ADMISSION, self.job.admitted()).await.is_err() {
                    let seconds = ADMISSION.as_secs();
                    let text = format!("whose job this is was not known within {seconds} s");
                    self.say(stream, &error(&text)).await?;
                    return Ok(true);
                }
                let act = self.clone();
                let work = self.work.place().await;
                let done = tokio::task::spawn_blocking(move || {
                    let _place = work;
                    // Here, as a job can make its mount table as long as it likes.
                    act.act(
                        &Peer::of(client, &act.job, &act.engine.place_of(&act.job))?,
                        request,
                    )
                });
                match done.await {
                    Ok(Ok(text)) => text,
                    Ok(Err(why)) => error(&why),
                    Err(_) => error("the daemon failed at this request: its log says more"),
                }
            }
        };
        self.say(stream, &text).await?;
        Ok(true)
    }

    /// Why the job would not see what is mounted in its job volume, which it has at `deaf`.
    fn why_deaf(&self, deaf: &str) -> String {
        let here = self.engine.place_of(&self.job);
        let shared = |table: Vec<MountPoint>| table.iter().any(|m| m.at == here && m.shared);
        if mount::table().is_ok_and(shared) {
            format!(
                "the job volume is mounted at {deaf} without rslave, so nothing that is mounted later would be seen: \
                 use -v NAME:{deaf}:rslave"
            )
        } else {
            "the job volume's mount is not shared any more on the host, so nothing that is mounted later would be seen: something \
             there has made its mounts private (doctor tells which)"
                .to_owned()
        }
    }

    fn act(&self, peer: &Peer, request: Request) -> Result<String, String> {
        let (engine, job) = (&self.engine, &self.job);
        let place = |path: &str| LatePath::parse(path, &peer.targets);
        match request {
            Request::Mount {
                path,
                criteria,
                save,
            } => {
                let at = place(&path)?;
                if let Some(deaf) = &peer.deaf {
                    return Err(self.why_deaf(deaf));
                }
                let view = engine
                    .mount_late(job, &at, &criteria, &save, &self.limits, &peer.ids)
                    .inspect_err(|e| engine.tally().refused(e))
                    .map_err(|e| e.to_string())?;
                Ok(format!(
                    "{}ok {} ms={} path={}\n",
                    self.source(view.lv.as_ref()),
                    told(&view),
                    view.took.as_millis(),
                    peer.seen(&at),
                ))
            }
            Request::Lookup { criteria } => {
                let view = engine.lookup(job, &criteria).map_err(|e| e.to_string())?;
                Ok(format!(
                    "{}ok {}\n",
                    self.source(view.lv.as_ref()),
                    told(&view)
                ))
            }
            Request::Save { path, tags } => {
                let saved = engine
                    .save_late(job, &place(&path)?, &tags, &self.limits)
                    .map_err(|e| e.to_string())?;
                Ok(format!(
                    "{}ok saved={} tags={} ms={}\n",
                    self.source(Some(&saved.lv)),
                    saved.lv,
                    list(&saved.tags),
                    saved.took.as_millis(),
                ))
            }
            Request::Discard { path } => {
                let at = place(&path)?;
                engine.discard_late(job, &at).map_err(|e| e.to_string())?;
                Ok(format!("ok discarded={}\n", peer.seen(&at)))
            }
            Request::Status => {
                let (mounts, verdict) = job.status();
                let mut text = String::new();
                for (at, view) in &mounts {
                    text += &format!("mount {} path={}\n", told(view), peer.seen(at));
                }
                Ok(format!(
                    "{text}ok mounts={} verdict={verdict}\n",
                    mounts.len()
                ))
            }
            Request::Verdict { success } => {
                engine
                    .judge(job, success, &self.limits)
                    .map_err(|e| e.to_string())?;
                let verdict = if success { "success" } else { "failure" };
                Ok(format!("ok verdict={verdict}\n"))
            }
        }
    }

    /// The first line of an answer, as the original script gave it.
    fn source(&self, lv: Option<&LvName>) -> String {
        lv.map(|lv| format!("{} {lv}\n", self.engine.store_name()))
            .unwrap_or_default()
    }
}

/// A client that has gone before it was looked at would get what is not its own.
const UNKNOWN_CLIENT: &str = "who asks is not known: the client has to wait for the answer";

/// How much of a client's mount table is read, in bytes.
const MAX_TABLE: u64 = 1 << 20;

fn needs_scope(request: &Request) -> bool {
    matches!(
        request,
        Request::Mount { .. } | Request::Lookup { .. } | Request::Save { .. }
    )
}

/// Why a process is refused that is in no container which has the job volume.
const NOT_INSIDE: &str = "only containers that have this job volume, and root, are served here";

/// A process at the other end that may speak here, as far as that can be told before its mount table is read.
#[derive(Debug, Clone, Copy)]
struct Client {
    pid: i32,
    /// No container that has the job volume is known, so its mount table has to tell.
    unplaced: bool,
}

/// The client, as the kernel tells.
#[derive(Debug)]
struct Peer {
    ids: Ids,
    /// Where it has the job volume mounted.
    targets: Vec<String>,
    /// That place, where nothing mounted later is seen.
    deaf: Option<String>,
}

impl Peer {
    /// `host_place`: where the job volume is on this host.
    fn of(client: Client, job: &Job, host_place: &Path) -> Result<Self, String> {
        let pid = client.pid;
        let gone = |_| UNKNOWN_CLIENT.to_owned();
        let file = PathBuf::from(format!("/proc/{pid}/mountinfo"));
        let table = mount::table_in(&file, MAX_TABLE).map_err(gone)?;
        let device = job.device_number().ok();
        let mut peer = Self {
            ids: Ids::of_process(pid).map_err(gone)?,
            targets: Vec::new(),
            deaf: None,
        };
        let mut hears = false;
        for m in table {
            let whole = Some(m.device) == device && m.root.as_os_str() == "/";
            if whole && client.unplaced && m.at == host_place {
                // A copy of this host's own table is a user's, and no container's.
                return Err(NOT_INSIDE.to_owned());
            }
            if let (true, Some(at)) = (whole, m.at.to_str()) {
                hears |= m.shared || m.follows;
                peer.targets.push(at.to_owned());
            }
        }
        match peer.targets.first() {
            Some(at) if !hears => peer.deaf = Some(at.clone()),
            Some(_) => {}
            None => peer.targets.push(USUAL_TARGET.to_owned()),
        }
        Ok(peer)
    }

    /// A mount's path as the peer sees it.
    fn seen(&self, at: &LatePath) -> String {
        let target = self.targets.first().map_or("", String::as_str);
        format!("{target}/{at}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(shared: &Arc<Semaphore>) -> Work {
        Work {
            first: Arc::new(Semaphore::new(1)),
            more: Arc::new(Semaphore::new(SHARED_OF_JOB)),
            shared: Arc::clone(shared),
        }
    }

    #[test]
    fn no_jobs_take_all_places() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let shared = Arc::new(Semaphore::new(2));
            let now = Duration::ZERO;
            let (greedy, other) = (work(&shared), work(&shared));
            let mut held = Vec::new();
            while let Ok(place) = timeout(now, greedy.place()).await {
                held.push(place);
            }
            assert_eq!(held.len(), 3, "its own, and all that are shared");
            let first = timeout(now, other.place()).await.expect("its own");
            assert!(timeout(now, other.place()).await.is_err());
            // One that is free again is there for all.
            held.pop();
            let second = timeout(now, other.place()).await.expect("a shared one");
            assert!(timeout(now, greedy.place()).await.is_err());
            drop((first, second));
            // No job takes all that are shared.
            let many = work(&Arc::new(Semaphore::new(100)));
            let mut held = Vec::new();
            while let Ok(place) = timeout(now, many.place()).await {
                held.push(place);
            }
            assert_eq!(held.len(), 1 + SHARED_OF_JOB);
        });
    }
}
