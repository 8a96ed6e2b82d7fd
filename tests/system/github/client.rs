// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of GitHub against the stand-in: what it asks for, how it says who it is, and what it
//! makes of refusals.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lvm_cache_friend::engine::Verdict;
use lvm_cache_friend::supervisor::github::rest::{NewRunner, Removed};
use lvm_cache_friend::supervisor::github::scaleset::{Event, ScaleSets};
use lvm_cache_friend::supervisor::github::{Auth, GitHub, GitHubError, Url};
use lvm_cache_friend::supervisor::secret::Source;
use lvm_cache_friend::supervisor::slot::Presence;
use secrecy::ExposeSecret as _;

use super::fake::{APP, FORK, Fake, FaultKind, MAIN, Origin, REPOSITORY, TIP, id_of};
use crate::harness::{Test, Tier, test};

pub fn tests() -> Vec<Test> {
    let rows: [(&str, fn()); 5] = [
        ("registrations", || run(registrations)),
        ("an_app_says_who_it_is", || run(app)),
        ("runs", || run(runs)),
        ("refusals", || run(refusals)),
        ("a_scale_set", || run(scale_set)),
    ];
    let row = |(name, body): (&str, fn())| test(Tier::Host, format!("github::{name}"), body);
    rows.into_iter().map(row).collect()
}

fn run<F: Future<Output = ()>>(body: impl FnOnce(Fake) -> F) {
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

fn with_token(fake: &Fake) -> GitHub {
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

async fn scale_set(fake: Fake) {
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
    let Event::JobAvailable(available) = &message.events[0] else {
        panic!("{message:?}")
    };
    let got = sets
        .acquire(set, &session, &[available.runner_request_id])
        .await
        .unwrap();
    assert_eq!(got, [job as i64]);
    let message = next(&mut sets, &session).await;
    assert!(
        matches!(message.events[..], [Event::JobAssigned(_)]),
        "{message:?}"
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
    sets.close(set, &session).await.unwrap();
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
