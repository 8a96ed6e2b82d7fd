saw_its_own() {
    grep -q "$1 reads what $1 wrote" "output.$1" && grep -q 'packages: 105 found in the cache, 0 fetched' "output.$1"
}

chapter "Two jobs at once, from one entry"
say "Each has a copy of its own. Both write the same file, wait until the other has too, and look what is in it."
mkdir meet
cat >project/meet <<'JOB'
#!/bin/sh
# Two of these run at once.
set -eu
echo "$1" >/cache/who
touch "/meet/$1"
until [ -e /meet/job4 ] && [ -e /meet/job5 ]; do sleep 0.1; done
echo "$1 reads what $(cat /cache/who) wrote"
sh /src/build
JOB
printf '\n'
begin=$EPOCHREALTIME
for job in job4 job5; do
    create=(podman volume create --driver lvm-cache-friend -o "restore=linux lock-$new_lock" $job)
    typed "${create[@]}" '&'
    "${create[@]}" >>"$stage/log" 2>&1 &
    eval "$job=$!"
done
for job in job4 job5; do
    wait "${!job}" || failed "$job was not created: $(tail -n 3 "$stage/log")"
done
both_created=$(since "$begin")
for job in job4 job5; do
    holds "$job starts from $third_entry" restored $job exact "$third_entry"
done
printf '\n'
for job in job4 job5; do
    start=(podman run --rm -v $job:/cache -v ./project:/src:ro -v ./meet:/meet "$image" sh /src/meet $job)
    typed "${start[@]}" '&'
    "${start[@]}" >output.$job 2>&1 &
    eval "$job=$!"
done
for job in job4 job5; do
    wait "${!job}" || failed "$job failed: $(cat output.$job)"
    sed 's/^/    /' output.$job
done
for job in job4 job5; do
    holds "$job saw what it wrote itself, and all packages" saw_its_own $job
done
both_mounted=$(printf '%s\n' "$(mounted_in job4)" "$(mounted_in job5)" | sort -n | tail -n 1)

say "What they started from is as it was: the next one to start from it finds all packages, and nothing of theirs."
run podman volume create --driver lvm-cache-friend -o "restore=linux lock-$new_lock" job6
holds "it starts from $third_entry too" restored job6 exact "$third_entry"
run podman run --rm -v job6:/cache -v ./project:/src:ro "$image" sh -c 'sh /src/build; ls /cache | grep -v pkg || echo nothing else'
holds "the entry is whole and unchanged" \
    grep -qx -e 'nothing else' output
