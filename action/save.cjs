// SPDX-License-Identifier: Apache-2.0 OR MIT
"use strict";
// The action's post step, and all of action/save.

const crypto = require("node:crypto");
const fs = require("node:fs");
const lib = require("./lib.cjs");

function save() {
  // Only the action with a post step has this input.
  const post = process.env["INPUT_JOB-STATUS"] !== undefined;
  if (post && process.env.STATE_cache === undefined) {
    lib.info("Nothing is saved, as the inputs are not right");
    return;
  }
  const saving = lib.saving();
  if (saving === "never") {
    lib.info("Nothing is saved, as save is never");
    return;
  }
  const always = saving === "always" || lib.flag("save-always");
  if (post && !always && lib.input("job-status") !== "success") {
    lib.info("Nothing is saved, as the job did not succeed");
    return;
  }
  // The post step goes by what the main step understood: files that a key is a hash of may have changed since.
  const cache = post ? JSON.parse(process.env.STATE_cache) : lib.cache();
  const { absent, key, matched, name, paths, pathTag } = cache;
  const ifMissing = saving === "if-missing";
  if (ifMissing && matched === key) {
    lib.info(`Cache was restored from the key ${key}: not saved again`);
    return;
  }
  const tags = [lib.keyTag(key), pathTag];
  const criteria = ["--key", tags.join(" ")];
  const there = lib.friend("restore", name, ...criteria, "--lookup-only");
  if (there === undefined) {
    // The main step said so.
    if (!absent) lib.annotate("warning", "There is no job volume of lvm-cache-friend here, or nobody answers in it: nothing is saved");
    return;
  }
  if (ifMissing && lib.matchedKey(there.tags, key) === key) {
    lib.info(`A cache with the key ${key} is there already: not saved again`);
    return;
  }
  let mount = lib.mounted(cache);
  if (mount === undefined) {
    const missing = paths.find((place) => !fs.existsSync(place));
    if (missing) throw new Error(`${missing} does not exist`);
    // Moves in what is at the paths, into a cache that has nothing yet.
    mount = lib.mount(cache, ["--key", `none:${crypto.randomUUID()}`]);
  }
  const inside = fs.realpathSync(mount.path);
  for (const place of paths) {
    // A job may have put something else there: then what is mounted is not what it means.
    const real = fs.realpathSync(place);
    if (!`${real}/`.startsWith(`${inside}/`)) {
      throw new Error(`${place} does not lead to ${mount.path} any more`);
    }
  }
  lib.friend("save", name, ...tags);
  lib.info(`Cache saved with the key: ${key}`);
}

try {
  save();
} catch (error) {
  // A job that succeeded does not fail because of its cache.
  lib.annotate("warning", `Cache not saved: ${error.message}`);
}
