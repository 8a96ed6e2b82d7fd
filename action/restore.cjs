// SPDX-License-Identifier: Apache-2.0 OR MIT
"use strict";
// The action's main step, and all of action/restore.

const lib = require("./lib.cjs");

function restore() {
  const cache = lib.cache();
  const { key, pathTag } = cache;
  const restoreKeys = lib.lines("restore-keys").map(lib.checkKey);
  const [lookupOnly, failOnMiss] = [lib.flag("lookup-only"), lib.flag("fail-on-cache-miss")];
  lib.tell("GITHUB_OUTPUT", "cache-primary-key", key);

  const prefixes = [key, ...restoreKeys].flatMap(lib.prefixTerm);
  const criteria = ["--key", `${lib.keyTag(key)} ${pathTag}`];
  criteria.push("--restore-keys", prefixes.map((prefix) => `${prefix} ${pathTag}`).join(";"));
  if (failOnMiss) criteria.push("--fail-on-miss");

  const found = lookupOnly
    ? lib.friend("restore", cache.name, ...criteria, "--lookup-only")
    : lib.mounted(cache) ?? lib.mount(cache, criteria);
  if (found === undefined) {
    lib.annotate("warning", "There is no job volume of lvm-cache-friend here: nothing is restored, and nothing will be saved");
  }
  const matched = lib.matchedKey(found?.tags ?? [], key);
  if (matched === undefined && failOnMiss) {
    throw new Error(`Cache not found by the key ${key}, and fail-on-cache-miss is set`);
  }
  lib.tell("GITHUB_STATE", "cache", JSON.stringify({ ...cache, matched }));
  if (matched === undefined) {
    lib.info(`Cache not found by: ${[key, ...restoreKeys].join(", ")}`);
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
