// SPDX-License-Identifier: Apache-2.0 OR MIT
//! lvm-cache-friend's program: parse, log, call.

use std::process::ExitCode;

use clap::Parser as _;
use lvm_cache_friend::cli::{Cli, Command};
use lvm_cache_friend::commands::{self, Failure};
use lvm_cache_friend::job::client;
use lvm_cache_friend::serve;
use lvm_cache_friend::text::printable_lines;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = &cli.config;
    let done = match &cli.command {
        Command::Init(args) => commands::init::run(config, args),
        Command::Serve(args) => serve::command(config, args),
        Command::List(args) => commands::list::run(config, args),
        Command::Tree(args) => commands::tree::run(config, args),
        Command::Stats(args) => commands::stats::run(config, args),
        Command::Show(args) => commands::show::run(config, args),
        Command::Import(args) => commands::import::run(config, args),
        Command::Remove(args) => commands::remove::run(config, args),
        Command::Doctor(args) => commands::doctor::run(config, args),
        Command::Pin(args) => commands::pin::run(config, args, true),
        Command::Unpin(args) => commands::pin::run(config, args, false),
        Command::Gc(args) => commands::gc::run(config, args),
        Command::Supervise(args) => commands::runners::supervise(config, args),
        Command::Runners(args) => commands::runners::runners(config, args),
        Command::Hook(args) => commands::hook::run(config, args),
        Command::Restore(raw) => return client::run("restore", &raw.args),
        Command::Save(raw) => return client::run("save", &raw.args),
        Command::Discard(raw) => return client::run("discard", &raw.args),
        Command::Status(raw) => return client::run("status", &raw.args),
        Command::Verdict(raw) => return client::run("verdict", &raw.args),
        Command::Completions { shell } => commands::generate::completions(*shell),
        Command::Man { dir } => commands::generate::man(dir),
        Command::ExampleConfig => commands::generate::example_config(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Names and annotations of others are in it.
            let text = printable_lines(&failure.to_string());
            eprintln!("lvm-cache-friend: {text}");
            match failure {
                Failure::Failed(_) => ExitCode::from(1),
                Failure::Usage(_) => ExitCode::from(2),
                Failure::NotFound(_) => ExitCode::from(3),
            }
        }
    }
}
