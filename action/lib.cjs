// SPDX-License-Identifier: Apache-2.0 OR MIT
"use strict";
// What the entry points share: GitHub's protocol with actions, and what to ask the job volume's client for.

const { spawnSync } = require("node:child_process");
const crypto = require("node:crypto");
const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");

/** Longest term or tag that the daemon takes, in bytes (src/cache/select.rs). */
const MAX_TAG = 512;

/** Most restore keys: with the key, and the key as a beginning, as many criteria as the daemon takes of a request. */
const MAX_RESTORE_KEYS = 10;

/** What the cache's key is in its tags: so no beginning of a key matches a tag that is something else. */
const KEY = "key:";

// GitHub's side.

function input(name) {
  return (process.env[`INPUT_${name.toUpperCase()}`] ?? "").trim();
}

function flag(name) {
  return input(name).toLowerCase() === "true";
}

function lines(name) {
  return input(name).split("\n").map((line) => line.trim()).filter((line) => line !== "");
}

function info(text) {
  // A key may have been another job's: no line of ours is a command to the runner.
  console.log(text.replace(/[\r\n]|##(?=\[)/g, " "));
}

/** `level` is error or warning. */
function annotate(level, text) {
  const escaped = text.replace(/%/g, "%25").replace(/\r/g, "%0D").replace(/\n/g, "%0A");
  console.log(`::${level}::${escaped}`);
}

/** Sets an output, or a state for the post step: `file` is what the runner names the file by. */
function tell(file, name, value) {
  const end = crypto.randomUUID();
  fs.appendFileSync(process.env[file], `${name}<<${end}\n${value}\n${end}\n`);
}

// What is cached.

function sha256(text) {
  return crypto.createHash("sha256").update(text).digest("hex");
}

/** Text in LVM's alphabet for tags, as the daemon itself escapes it. The beginning of a key becomes the beginning of its tag. */
function escape(text) {
  const byte = (c) => `&${c.charCodeAt(0).toString(16).padStart(2, "0")}`;
  return Buffer.from(text).toString("latin1").replace(/[^A-Za-z0-9_+.\-/=!:#]/g, byte);
}

function unescape(text) {
  const byte = (_, hex) => String.fromCharCode(parseInt(hex, 16));
  return Buffer.from(text.replace(/&([0-9a-f]{2})/g, byte), "latin1").toString();
}

function keyTag(key) {
  const tag = KEY + escape(key);
  if (tag.length <= MAX_TAG) return tag;
  // What escape makes has no "&=".
  const hash = `&=${sha256(key).slice(0, 16)}`;
  return tag.slice(0, MAX_TAG - hash.length) + hash;
}

/** The term that matches what begins with `key`; none where that is too long for one. */
function prefixTerm(key) {
  const prefix = KEY + escape(key);
  return prefix.length <= MAX_TAG ? [`${prefix}*`] : [];
}

/** The key that was found, of all of an entry's tags; undefined where nothing was. */
function matchedKey(tags, key) {
  const tag = tags.find((tag) => tag.startsWith(KEY));
  if (tag === undefined) return undefined;
  return tag === keyTag(key) ? key : unescape(tag.slice(KEY.length));
}

function checkKey(key) {
  if (key.length > 512) throw new Error(`key: ${key} has more than 512 characters`);
  if (key.includes(",")) throw new Error(`key: ${key} has a comma`);
  return key;
}

function resolve(place) {
  if (/[*?[\]]|^!/.test(place)) {
    throw new Error(`path: ${place} is a pattern; only directories can be cached, each by its own path`);
  }
  const home = place.replace(/^~(?=\/|$)/, os.homedir());
  return path.resolve(process.env.GITHUB_WORKSPACE || ".", home);
}

function restoreKeys() {
  const keys = lines("restore-keys").map(checkKey);
  if (keys.length > MAX_RESTORE_KEYS) throw new Error(`restore-keys: there are ${keys.length}, and at most ${MAX_RESTORE_KEYS} are taken`);
  return keys;
}

/** When the post step saves. An action without the input, and a workflow that does not say, save as actions/cache does. */
function saving() {
  const [word, words] = [input("save") || "if-missing", ["always", "on-success", "if-missing", "never"]];
  if (!words.includes(word)) throw new Error(`save: ${word} is none of ${words.join(", ")}`);
  return word;
}

/** What the inputs `key` and `path` mean. */
function cache() {
  const given = lines("path").filter((line) => !line.startsWith("#"));
  const key = checkKey(input("key"));
  if (key === "" || given.length === 0) throw new Error("Both key and path must be given");
  // As in actions/cache, caches of the same key and other paths have nothing to do with each other.
  const hash = sha256(given.join("\n")).slice(0, 12);
  const readable = path.basename(given[0]).replace(/[^A-Za-z0-9._-]/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 64);
  return { key, paths: given.map(resolve), name: `${readable || "cache"}-${hash}`, pathTag: `path:${hash}` };
}

// The job volume's side.

/** What the job volume's client answers; undefined where there is no job volume. */
function friend(...args) {
  const dir = process.env.LVM_CACHE_FRIEND_DIR || "/run/lvm-cache-friend";
  const stdio = ["ignore", "pipe", "inherit"];
  const done = spawnSync(path.join(dir, "bin/lvm-cache-friend"), [...args, "--json"], { encoding: "utf8", stdio });
  if (done.error?.code === "ENOENT" || done.status === 3) return undefined;
  if (done.error) throw done.error;
  // A miss that --fail-on-miss was given for.
  if (done.status === 4) return { tags: [] };
  let answer;
  try {
    answer = JSON.parse(done.stdout);
  } catch {
    throw new Error(`lvm-cache-friend ${args[0]} ended with ${done.signal ?? `status ${done.status}`}`);
  }
  if (!answer.ok) throw new Error(answer.error);
  return answer;
}

/** The mount that this job has for the cache already. */
function mounted({ name }) {
  return friend("status")?.mounts.find((mount) => path.basename(mount.path) === name);
}

/** Mounts the cache. Nothing but `save` publishes it: neither the job's end, nor tags of the job volume's own. */
function mount({ name, paths }, criteria) {
  const links = paths.flatMap((place) => ["--path", place]);
  const found = friend("restore", name, ...criteria, "--save", "", ...links);
  if (found?.source) friend("discard", name);
  return found;
}

module.exports = { annotate, cache, flag, friend, info, input, keyTag, matchedKey, mount, mounted, prefixTerm, restoreKeys, saving, tell };
