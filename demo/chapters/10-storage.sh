pool_and_base() {
    lvs --noheadings --options segtype,lv_tags "friend-${disk_file%.img}" | grep -q '^ *thin-pool ' &&
        [ "$(lvm-cache-friend list --json | jq -r '.[].kind')" = base ]
}

printf '%slvm-cache-friend: caches for CI containers that are ready in the time of a mount%s\n' "$bold" "$plain"
say "Each job gets a writable copy of the best cache that an earlier job left: a snapshot by LVM, not a download. Everything below" \
    "really happens, with real LVM and real Podman ($(podman --version)), on $(uname -sr)."
[ -z "${DEMO_DISK:-}" ] || say "The kernel of this machine lacks device-mapper, so it happens in a virtual machine. If its" \
    "processor is emulated too, everything takes some twenty times as long as on a real one: compare the times with each other."

chapter "Storage is prepared, once"
run lvm-cache-friend init --loop "$disk_file" --size 4G --base-size 2G
holds "LVM has a thin pool for the caches, and in it an empty XFS, the base of all" pool_and_base

say "From now on the daemon runs; Podman reaches it through a socket, as its volume plugin 'lvm-cache-friend'."
printf '\n'
typed lvm-cache-friend serve '&'
"$program" --config "$stage/config.toml" serve >"$stage/daemon.log" 2>&1 &
daemon=$!
eventually test -S /run/lvm-cache-friend/plugin.sock
holds "it answers" podman volume ls
