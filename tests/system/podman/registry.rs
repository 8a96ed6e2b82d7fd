// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A registry of one image, over plain HTTP: what pulling asks (OCI Distribution Specification, "Pull"), and no more.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};

use crate::support::background;
use crate::support::command::sh;

/// A registry, for as long as the test lives; its files are what `podman push` leaves in a directory.
pub struct Registry {
    dir: tempfile::TempDir,
    /// The image's name there.
    pub image: String,
}

impl Registry {
    /// An empty one, which Podman is told of in the test's own /etc/containers.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (listener, host) = background::listener();
        let host = host.to_string();
        let text = format!("[[registry]]\nlocation = '{host}'\ninsecure = true\n");
        fs::write("/etc/containers/registries.conf", text).unwrap();
        let files: Arc<Path> = dir.path().into();
        let router = Router::new().fallback(move |uri: Uri| {
            let files = Arc::clone(&files);
            async move { answer(&files, uri.path()) }
        });
        background::serve(listener, router);
        Self {
            dir,
            image: format!("{host}/runner:latest"),
        }
    }

    /// Has this image in it, in place of the one before.
    pub fn push(&self, image: &str) {
        let dir = self.dir.path().display();
        sh(&format!(
            "podman push --quiet --format v2s2 {image} dir:{dir}"
        ));
    }
}

fn answer(files: &Path, path: &str) -> Response {
    let file = match path.rsplit('/').collect::<Vec<_>>()[..] {
        [_, "manifests", ..] => "manifest.json",
        [digest, "blobs", ..] => digest.trim_start_matches("sha256:"),
        _ => return StatusCode::OK.into_response(),
    };
    let kind = match file {
        "manifest.json" => "application/vnd.docker.distribution.manifest.v2+json",
        _ => "application/octet-stream",
    };
    match fs::read(files.join(file)) {
        Ok(content) => ([(header::CONTENT_TYPE, kind)], content).into_response(),
        Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}
