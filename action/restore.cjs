// SPDX-License-Identifier: Apache-2.0 OR MIT
"use strict";
// The action's main step, and all of action/restore.

const lib = require("./lib.cjs");

/** What is there by these keys; undefined where there is no job volume. */
function find(cache, keys, lookupOnly, failOnMiss) {
  const { key, pathTag } = cache;
  const prefixes = keys.flatMap(lib.prefixTerm);
  const criteria = ["--key", `${lib.keyTag(key)} ${pathTag}`];
  criteria.push("--restore-keys", prefixes.map((prefix) => `${prefix} ${pathTag}`).join(";"));
  if (failOnMiss) criteria.push("--fail-on-miss");
  return lookupOnly
    ? lib.friend("restore", cache.name, ...criteria, "--lookup-only")
    : lib.mounted(cache) ?? lib.mount(cache, criteria);
}

function restore() {
  // What is wrong in the workflow is an error. What is wrong with caches is none: the job does without.
  const cache = lib.cache();
  const { key } = cache;
  const keys = [key, ...lib.restoreKeys()];
  lib.saving();
  const [lookupOnly, failOnMiss] = [lib.flag("lookup-only"), lib.flag("fail-on-cache-miss")];
  lib.tell("GITHUB_OUTPUT", "cache-primary-key", key);

  let [found, absent] = [undefined, false];
  try {
    found = find(cache, keys, lookupOnly, failOnMiss);
    absent = found === undefined;
    if (absent) lib.annotate("warning", "There is no job volume of lvm-cache-friend here, or nobody answers in it: nothing is restored");
  } catch (error) {
    lib.annotate("warning", `Nothing is restored: ${error.message}`);
  }
  const matched = lib.matchedKey(found?.tags ?? [], key);
  lib.tell("GITHUB_STATE", "cache", JSON.stringify({ ...cache, matched, absent }));
  if (matched === undefined && failOnMiss) {
    throw new Error(`Cache not found by the key ${key}, and fail-on-cache-miss is set`);
  }
  if (matched === undefined) {
    lib.info(`Cache not found by: ${keys.join(", ")}`);
    return;
  }
  lib.tell("GITHUB_OUTPUT", "cache-hit", matched === key);
  lib.tell("GITHUB_OUTPUT", "cache-matched-key", matched);
  lib.info(lookupOnly ? `Cache found by the key: ${matched}` : `Cache restored from the key: ${matched}`);
}

try {
  restore();
} catch (error) {
  lib.annotate("error", error.message);
  process.exitCode = 1;
}
