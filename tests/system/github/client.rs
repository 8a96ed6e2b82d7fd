// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of GitHub against the stand-in: what it asks for, how it says who it is, and what it
//! makes of refusals.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lvm_cache_friend::cache::verdict::Verdict;
use lvm_cache_friend::supervisor::github::group::Group;
use lvm_cache_friend::supervisor::github::rest::{NewRunner, Removed};
use lvm_cache_friend::supervisor::github::scaleset::{Event, ScaleSets};
use lvm_cache_friend::supervisor::github::{Auth, GitHub, GitHubError, Url};
use lvm_cache_friend::supervisor::secret::Source;
use lvm_cache_friend::supervisor::slot::Presence;
use secrecy::ExposeSecret as _;

use super::fake::{APP, FORK, Fake, FaultKind, MAIN, OTHER, Origin, REPOSITORY, Set, TIP, id_of};
use crate::harness::{Test, Tier, test};

pub fn tests() -> Vec<Test> {
    let rows: [(&str, fn()); 11] = [
        ("registrations", || run(registrations)),
        ("an_app_says_who_it_is", || run(app)),
        ("runs", || run(runs)),
        ("refusals", || run(refusals)),
        ("a_scale_set", || run(|fake| scale_set(fake, false))),
        ("a_scale_set_of_an_enterprise_server", || {
            run(|fake| scale_set(fake, true));
        }),
        ("an_existing_scale_set", || run(existing_set)),
        ("renamed_repositories", || run(renamed)),
        ("pauses_of_each_side", || run(pauses)),
        ("a_new_registration_token", || run(new_token)),
        ("an_organization", || run(organization)),
    ];
    let row = |(name, body): (&str, fn())| test(Tier::Host, format!("github::{name}"), body);
    rows.into_iter().map(row).collect()
}

pub fn run<F: Future<Output = ()>>(body: impl FnOnce(Fake) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let whole = tokio::time::timeout(Duration::from_secs(120), body(Fake::start()));
        whole.await.expect("within two minutes");
    });
}

fn url(fake: &Fake) -> Url {
    Url::try_from(format!("{}/{REPOSITORY}", fake.url)).unwrap()
}

pub fn with_token(fake: &Fake) -> GitHub {
    let auth = Auth::Token(Source::File(fake.file("token")));
    GitHub::new(&url(fake), Some(&fake.url), &auth).unwrap()
}

fn with_app(fake: &Fake) -> GitHub {
    let auth = Auth::App {
        id: APP.0,
        installation: APP.1,
        key: Source::File(fake.file("app.pem")),
    };
    GitHub::new(&url(fake), Some(&fake.url), &auth).unwrap()
}

async fn register(github: &GitHub, name: &str) -> Result<String, GitHubError> {
    let labels = ["self-hosted".to_owned(), "linux".to_owned()];
    let new = NewRunner {
        name,
        runner_group_id: 1,
        labels: &labels,
        work_folder: "_work",
    };
    let config = github.generate_jit(&new).await?;
    Ok(config.expose_secret().to_owned())
}

async fn registrations(fake: Fake) {
    let github = with_token(&fake);
    assert_eq!(github.presence("a").await.unwrap(), Presence::Gone);
    let config = register(&github, "a").await.unwrap();
    assert!(fake.state().configurations.contains(&config));
    let there = github.presence("a").await.unwrap();
    let Presence::There {
        id,
        online: false,
        busy: false,
    } = there
    else {
        panic!("{there:?}");
    };
    let taken = register(&github, "a").await.unwrap_err();
    assert_eq!(taken.status().unwrap().as_u16(), 409, "{taken}");
    let job = fake.queue(&MAIN, "true");
    fake.occupy(id, Some(job));
    assert_eq!(github.remove(id).await.unwrap(), Removed::Busy);
    fake.occupy(id, None);
    assert_eq!(github.remove(id).await.unwrap(), Removed::Gone);
    assert_eq!(github.remove(id).await.unwrap(), Removed::Gone);
    for n in 0..205 {
        register(&github, &format!("many-{n}")).await.unwrap();
    }
    let names = github.names().await.unwrap();
    assert_eq!(names.len(), 205);
    assert!(names.contains(&"many-204".to_owned()));
}

async fn app(fake: Fake) {
    let github = with_app(&fake);
    let tokens =
        |fake: &Fake| fake.count("access_tokens", Instant::now() - Duration::from_secs(600));
    for _ in 0..3 {
        github.names().await.unwrap();
    }
    assert_eq!(tokens(&fake), 1, "a token is used again");
    // Renewed before it ends: one that ends in less than half a minute is not used.
    fake.state().token_life = 20;
    let github = with_app(&fake);
    github.names().await.unwrap();
    github.names().await.unwrap();
    assert_eq!(tokens(&fake), 3);
    // One that was taken back, and GitHub's clock off by more than what is allowed for.
    fake.state().token_life = 3600;
    let github = with_app(&fake);
    github.names().await.unwrap();
    for clock in [-3600, 3600] {
        fake.state().clock = clock;
        let far = with_app(&fake);
        let refused = far.names().await.unwrap_err();
        assert_eq!(refused.status().unwrap().as_u16(), 401, "{refused}");
        assert!(refused.to_string().contains("claim"), "{refused}");
        fake.state().clock = clock / 3600 * 40;
        far.names().await.expect("forty seconds are allowed for");
        fake.state().clock = 0;
        far.names().await.unwrap();
    }
    // A key that is not the App's.
    std::fs::write(fake.file("token"), "no key").unwrap();
    let auth = Auth::App {
        id: APP.0,
        installation: APP.1,
        key: Source::File(fake.file("token")),
    };
    let error = GitHub::new(&url(&fake), Some(&fake.url), &auth)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("PEM") && !error.contains("no key"),
        "{error}"
    );
}

async fn runs(fake: Fake) {
    let github = with_token(&fake);
    let evil = "bad0bad0bad0bad0bad0bad0bad0bad0bad0bad0";
    let tag = "octo/project/.github/workflows/ci.yml@refs/tags/main";
    let called = |commit| Origin {
        workflow_ref: "octo/project/.github/workflows/called.yml@refs/heads/main",
        referenced: Some(1),
        commit,
        ..MAIN
    };
    let tagged = Origin {
        workflow_ref: tag,
        commit: evil,
        ..MAIN
    };
    let gone = Origin {
        head_repository: "",
        ..FORK
    };
    let silent = Origin {
        referenced: None,
        ..MAIN
    };
    let topic = Origin {
        head_branch: "topic",
        ..called(TIP)
    };
    let earlier = "600d600d600d600d600d600d600d600d600d600d";
    fake.state().earlier.insert(earlier.to_owned());
    for (what, origin, tags, default, fork, reference) in [
        (
            "the default branch",
            &MAIN,
            false,
            true,
            false,
            "branch/main",
        ),
        (
            "with a tag called as it",
            &MAIN,
            true,
            true,
            false,
            "branch/main",
        ),
        ("that tag", &tagged, true, false, false, "tag/main"),
        (
            "that tag, which is gone",
            &tagged,
            false,
            false,
            false,
            "tag/main",
        ),
        (
            "with a reusable workflow",
            &called(TIP),
            false,
            true,
            false,
            "branch/main",
        ),
        (
            "an earlier commit",
            &called(earlier),
            false,
            true,
            false,
            "branch/main",
        ),
        // The tag's, or the branch's.
        (
            "and a tag called as it",
            &called(TIP),
            true,
            false,
            false,
            "run/",
        ),
        (
            "of that tag, which is gone",
            &called(evil),
            false,
            false,
            false,
            "run/",
        ),
        ("an old server", &silent, false, true, false, "branch/main"),
        ("a branch that is gone", &topic, false, false, false, "run/"),
        (
            "a fork's",
            &FORK,
            false,
            false,
            true,
            &format!("fork/{}/main", id_of(FORK.head_repository)),
        ),
        ("a deleted fork's", &gone, false, false, true, "run/"),
    ] {
        if tags {
            fake.state().refs.insert("tags/main".into(), evil.into());
        } else {
            fake.state().refs.remove("tags/main");
        }
        let job = fake.queue(origin, "true");
        let run = github
            .run("octo", "project", job * 10, origin.workflow_ref)
            .await
            .unwrap();
        let reference = match reference {
            "run/" => format!("run/{}", job * 10),
            known => known.to_owned(),
        };
        assert_eq!(
            (run.is_default(), run.is_fork(), run.reference()),
            (default, fork, reference),
            "{what}: {run:?}"
        );
        assert_eq!(format!("{}:{}", run.host, run.repository_id), fake.scope());
    }
    // A credential that may not read the contents: it may be a tag.
    let refuse = |path, status| {
        fake.inject(
            path,
            FaultKind::Status(status, Vec::new(), "Resource not accessible by integration"),
            1,
        );
    };
    let job = fake.queue(&called(TIP), "true");
    refuse("/git/ref/heads", 403);
    let run = github.run("octo", "project", job * 10, called(TIP).workflow_ref);
    assert!(!run.await.unwrap().is_default());
    // That nobody says whether there is a tag does not mean that there is none.
    refuse("/git/ref/tags", 403);
    let run = github.run("octo", "project", job * 10, called(TIP).workflow_ref);
    assert_eq!(run.await.unwrap_err().status().unwrap().as_u16(), 403);
    let missing = github.run("octo", "project", 5, "").await.unwrap_err();
    assert_eq!(missing.status().unwrap().as_u16(), 404);
}

async fn refusals(fake: Fake) {
    let status = |status, headers: &[(&'static str, &str)], message| {
        let headers = headers
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()));
        FaultKind::Status(status, headers.collect(), message)
    };
    for (fault, code, rest) in [
        (status(401, &[], "Bad credentials"), Some(401), None),
        (status(403, &[], "Resource not accessible"), Some(403), None),
        (status(404, &[], "Not Found"), Some(404), None),
        (status(500, &[], "Server Error"), Some(500), None),
        (status(502, &[], "<html>"), Some(502), None),
        (FaultKind::Dropped, None, None),
        (FaultKind::DroppedAfter, None, None),
        (
            status(403, &[("retry-after", "2")], "secondary rate limit"),
            Some(403),
            Some(2),
        ),
        (
            status(429, &[("retry-after", "1")], "slow down"),
            Some(429),
            Some(1),
        ),
    ] {
        let github = with_token(&fake);
        fake.inject("/actions/runners", fault.clone(), 1);
        let error = github.names().await.unwrap_err();
        assert_eq!(
            error.status().map(|s| s.as_u16()),
            code,
            "{fault:?}: {error}"
        );
        assert_eq!(error.retry().map(|r| r.as_secs()), rest, "{fault:?}");
        assert!(!error.to_string().contains(super::fake::TOKEN), "{error}");
        let Some(rest) = rest else {
            github.names().await.expect("that was once");
            continue;
        };
        // Nobody is asked until then, for anything.
        let since = Instant::now();
        let still = register(&github, "a").await.unwrap_err();
        assert!(matches!(still, GitHubError::Still(_)), "{still}");
        assert_eq!(fake.count("", since), 0);
        tokio::time::sleep(Duration::from_secs(rest)).await;
        github.names().await.unwrap();
    }
    let github = with_token(&fake);
    fake.inject(
        "/actions/runners",
        FaultKind::Slow(Duration::from_secs(2)),
        1,
    );
    github.names().await.expect("slow is not wrong");
    let nobody = GitHub::new(
        &url(&fake),
        Some("http://127.0.0.1:9"),
        &Auth::Token(Source::File(fake.file("token"))),
    )
    .unwrap();
    let error = nobody.names().await.unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}

/// The same story at github.com, which assigns jobs, and at an Enterprise Server, which offers them.
async fn scale_set(fake: Fake, ghes: bool) {
    fake.state().ghes = ghes;
    let github = Arc::new(with_app(&fake));
    let mut sets = ScaleSets::new(Arc::clone(&github));
    let labels = ["linux".to_owned()];
    let set = sets.find_or_create("linux", 1, &labels).await.unwrap();
    assert_eq!(sets.find_or_create("linux", 1, &labels).await.unwrap(), set);
    let mut session = sets.open(set, "host").await.unwrap();
    let taken = ScaleSets::new(Arc::clone(&github))
        .open(set, "other")
        .await
        .unwrap_err();
    assert_eq!(taken.status().unwrap().as_u16(), 409, "{taken}");
    assert!(sets.poll(&session, 0, 2).await.unwrap().is_none());

    let job = fake.queue(&FORK, "true");
    let mut last = 0;
    let mut next = async |sets: &mut ScaleSets, session: &_| {
        loop {
            if let Some(message) = sets.poll(session, last, 2).await.unwrap() {
                last = message.id;
                let again = sets.poll(session, last - 1, 2).await.unwrap();
                assert_eq!(
                    again.unwrap().id,
                    last,
                    "it comes again until it is acknowledged"
                );
                sets.acknowledge(session, message.id).await.unwrap();
                break message;
            }
        }
    };
    let message = next(&mut sets, &session).await;
    let message = if ghes {
        let Event::JobAvailable(available) = &message.events[0] else {
            panic!("{message:?}")
        };
        let asked = [available.runner_request_id];
        let got = sets.acquire(set, &session, &asked).await.unwrap();
        assert_eq!(got, [job as i64]);
        next(&mut sets, &session).await
    } else {
        let refused = sets.acquire(set, &session, &[0]).await.unwrap_err();
        assert_eq!(refused.status().unwrap().as_u16(), 404, "{refused}");
        message
    };
    let [Event::JobAssigned(assigned)] = &message.events[..] else {
        panic!("{message:?}")
    };
    let number = if ghes { job as i64 } else { 0 };
    assert_eq!(assigned.runner_request_id, number);
    assert!(assigned.job_id.len() == 36 && assigned.scale_set_assign_time.is_some());
    assert_eq!(
        (assigned.runner_name.as_str(), &assigned.runner_assign_time),
        ("", &None)
    );
    assert_eq!(message.statistics.unwrap().total_assigned_jobs, 1);

    let config = sets.generate_jit(set, "r", "_work").await.unwrap();
    assert!(
        fake.state()
            .configurations
            .contains(&config.expose_secret().to_owned())
    );
    let secret = fake
        .state()
        .secrets
        .iter()
        .rev()
        .find(|s| s.starts_with("runner_"))
        .unwrap()
        .clone();
    standin(&fake, &secret, "next");
    // The session's token ends, and is renewed.
    fake.state().session_life = 0;
    sets.refresh(set, &mut session).await.unwrap();
    let ended = sets.poll(&session, 0, 2).await.unwrap_err();
    assert_eq!(ended.status().unwrap().as_u16(), 401);
    fake.state().session_life = 3600;
    sets.refresh(set, &mut session).await.unwrap();
    let message = next(&mut sets, &session).await;
    let Event::JobStarted(started) = &message.events[0] else {
        panic!("{message:?}")
    };
    assert_eq!(
        (started.runner_name.as_str(), started.workflow_run_id),
        ("r", job * 10)
    );
    standin(&fake, &secret, "done/1");
    let message = next(&mut sets, &session).await;
    let Event::JobCompleted(completed) = &message.events[0] else {
        panic!("{message:?}")
    };
    assert_eq!(completed.verdict(), Verdict::Failure);

    // The service's token is bought anew where the service does not know it any more.
    fake.inject(
        "runnerscalesets",
        FaultKind::Status(401, Vec::new(), "unauthorized"),
        1,
    );
    sets.close(set, session.id()).await.unwrap();
    sets.open(set, "host")
        .await
        .expect("the other session is over");
}

/// Says something as the stand-in for a runner.
fn standin(fake: &Fake, secret: &str, what: &str) {
    let mut stream = std::net::TcpStream::connect(&fake.url["http://".len()..]).unwrap();
    write!(
        stream,
        "POST /standin/{what} HTTP/1.0\r\nauthorization: {secret}\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 "), "{answer}");
}

async fn existing_set(fake: Fake) {
    let github = Arc::new(with_token(&fake));
    let mut sets = ScaleSets::new(Arc::clone(&github));
    {
        let mut state = fake.state();
        state.groups.insert(5, "Big Machines".to_owned());
        state.sets.insert(6, Set::new("linux", 5, &["linux"]));
        state.sets.insert(7, Set::new("linux-arm", 1, &["linux"]));
        state.sets.insert(8, Set::new("linux", 1, &["old"]));
    }
    let labels = ["linux".to_owned(), "Big".to_owned()];
    let changed = || {
        fake.count(
            "/runnerscalesets/",
            Instant::now() - Duration::from_secs(600),
        )
    };
    assert_eq!(sets.find_or_create("linux", 1, &labels).await.unwrap(), 8);
    {
        let state = fake.state();
        let set = &state.sets[&8];
        assert_eq!((&set.labels[..], set.disable_update), (&labels[..], true));
        assert_eq!(state.sets[&7].labels, ["linux"], "another's is left alone");
    }
    assert_eq!(changed(), 1);
    // In another order and case it is the same.
    let again = ["big".to_owned(), "linux".to_owned()];
    assert_eq!(sets.find_or_create("linux", 1, &again).await.unwrap(), 8);
    assert_eq!(changed(), 1);
    // One that may not be changed is used as it is.
    let refused = FaultKind::Status(403, Vec::new(), "no");
    fake.inject("PATCH /tenant/", refused, 1);
    let other = ["linux".to_owned()];
    assert_eq!(sets.find_or_create("linux", 1, &other).await.unwrap(), 8);
    // Whose server knows one label.
    fake.state().drops_labels = true;
    let made = sets.find_or_create("windows", 1, &labels).await.unwrap();
    assert_eq!(fake.state().sets[&made].labels, ["linux"]);
    // Runner groups by name.
    let named = |name: &str| Group::Name(name.to_owned());
    let group = sets.group(&named("Big Machines")).await.unwrap();
    assert_eq!(group, 5);
    assert_eq!(
        sets.find_or_create("linux", group, &other).await.unwrap(),
        6
    );
    assert_eq!(sets.group(&Group::Number(9)).await.unwrap(), 9);
    let missing = sets.group(&named("Big")).await.unwrap_err();
    assert!(matches!(missing, GitHubError::NoGroup(_)), "{missing}");
    assert!(missing.to_string().contains("\"Big\""), "{missing}");
}

async fn renamed(fake: Fake) {
    let github = with_token(&fake);
    register(&github, "a").await.unwrap();
    let job = fake.queue(&MAIN, "true");
    fake.state().renamed = Some(fake.url.clone());
    let run = github.run("octo", "project", job * 10, MAIN.workflow_ref);
    assert!(run.await.unwrap().is_default());
    assert_eq!(github.names().await.unwrap(), ["a"]);
    // What is not only read is not done elsewhere, and it is said why.
    let refused = register(&github, "b").await.unwrap_err().to_string();
    assert!(
        refused.contains("renamed") && refused.contains("url"),
        "{refused}"
    );
    assert_eq!(fake.state().runners.len(), 1);
    // No other host is told who we are.
    let stranger = Fake::start();
    fake.state().renamed = Some(stranger.url.clone());
    let refused = github.names().await.unwrap_err();
    assert_eq!(refused.status().unwrap().as_u16(), 301, "{refused}");
    assert!(stranger.state().asked.is_empty());
}

async fn pauses(fake: Fake) {
    let github = Arc::new(with_token(&fake));
    let mut sets = ScaleSets::new(Arc::clone(&github));
    let labels = ["linux".to_owned()];
    let set = sets.find_or_create("linux", 1, &labels).await.unwrap();
    let session = sets.open(set, "host").await.unwrap();
    let much = |status, message| {
        let headers = vec![("retry-after", "600".to_owned())];
        FaultKind::Status(status, headers, message)
    };
    fake.inject("/actions/runners", much(403, "secondary rate limit"), 1);
    github.names().await.unwrap_err();
    let still = github.names().await.unwrap_err();
    assert!(matches!(still, GitHubError::Still(_)), "{still}");
    sets.poll(&session, 0, 2)
        .await
        .expect("the queue is not meant");

    let other = with_token(&fake);
    let mut sets = ScaleSets::new(Arc::new(with_token(&fake)));
    fake.forget_sessions();
    let session = sets.open(set, "host").await.unwrap();
    fake.inject("/queue/", much(429, "slow down"), 1);
    sets.poll(&session, 0, 2).await.unwrap_err();
    let still = sets.poll(&session, 0, 2).await.unwrap_err();
    assert!(matches!(still, GitHubError::Still(_)), "{still}");
    other.names().await.expect("the REST API is not meant");
}

/// Not all servers know it at once: the same one is tried again.
async fn new_token(fake: Fake) {
    fake.state().late = 4;
    let labels = ["linux".to_owned()];
    let mut sets = ScaleSets::new(Arc::new(with_token(&fake)));
    let since = Instant::now();
    sets.find_or_create("linux", 1, &labels).await.unwrap();
    assert_eq!(fake.count("/registration-token", since), 1);
    assert_eq!(fake.count("/runner-registration", since), 5);
    // One that is never known is an error in the end.
    fake.state().late = 1000;
    let mut sets = ScaleSets::new(Arc::new(with_token(&fake)));
    let refused = sets.find_or_create("linux", 1, &labels).await.unwrap_err();
    assert!(
        matches!(refused.status().unwrap().as_u16(), 401 | 403),
        "{refused}"
    );
}

async fn organization(fake: Fake) {
    let url = Url::try_from(format!("{}/octo", fake.url)).unwrap();
    let auth = Auth::Token(Source::File(fake.file("token")));
    let github = Arc::new(GitHub::new(&url, Some(&fake.url), &auth).unwrap());
    register(&github, "a").await.unwrap();
    assert_eq!(github.names().await.unwrap(), ["a"]);
    // Jobs of several repositories come to one set, each with its own's name.
    let mut sets = ScaleSets::new(Arc::clone(&github));
    let labels = ["linux".to_owned()];
    let set = sets.find_or_create("linux", 1, &labels).await.unwrap();
    let session = sets.open(set, "host").await.unwrap();
    let other = Origin {
        repository: OTHER,
        head_repository: OTHER,
        workflow_ref: "octo/other/.github/workflows/ci.yml@refs/heads/main",
        ..MAIN
    };
    let jobs = [fake.queue(&MAIN, "true"), fake.queue(&other, "true")];
    let message = loop {
        if let Some(message) = sets.poll(&session, 0, 2).await.unwrap() {
            break message;
        }
    };
    assert_eq!(message.events.len(), 2, "{message:?}");
    for (event, (job, repository)) in message
        .events
        .iter()
        .zip(jobs.iter().zip([REPOSITORY, OTHER]))
    {
        let Event::JobAssigned(assigned) = event else {
            panic!("{event:?}")
        };
        let (owner, name) = (&assigned.owner_name, &assigned.repository_name);
        assert_eq!(format!("{owner}/{name}"), repository);
        assert_eq!(assigned.workflow_run_id, job * 10);
        let run = github.run(owner, name, job * 10, &assigned.job_workflow_ref);
        assert_eq!(run.await.unwrap().repository_id, id_of(repository));
    }
    // A run is its own repository's.
    let missing = github
        .run("octo", "other", jobs[0] * 10, "")
        .await
        .unwrap_err();
    assert_eq!(missing.status().unwrap().as_u16(), 404);
}
