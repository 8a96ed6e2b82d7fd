# github REQUEST…: asks the stand-in for GitHub; its answer is in $answer.
github() {
    echo "$*" >&"${GITHUB[1]}"
    read -r answer <&"${GITHUB[0]}" || failed "the stand-in for GitHub is gone: $(tail -n 3 "$stage/github.log")"
}
# queue NAME main|fork VERSION: queues a job under a name.
queue() {
    github queue "$2" "$3" project/ci-job
    number_of[$1]=$answer
}
ended_as() { [ "${result_of[$1]}" = "$2" ]; }
await() {
    github await "${number_of[$1]}" "job-$1.log"
    result_of[$1]=$answer
}
restored() { grep '^{' "job-$1.log" | jq -r "$2"; }
# The name of the job whose cache a job got.
origin() {
    local number name
    number=$(restored "$1" '.tags[] | select(startswith("job-")) | ltrimstr("job-")')
    for name in "${!number_of[@]}"; do
        [ "${number_of[$name]}" != "$number" ] || echo "$name"
    done
}
published_as() { entries "job-${number_of[$1]}"; }
is_published() { [ -n "$(published_as "$1")" ]; }
steps_found() { [ "$(grep -c 'Using cache' "job-$1.log")" = "$2" ]; }
knows_of() { grep -q "^image localhost/app:$2\$" "job-$1.log"; }
nothing_left() { [ -z "$(podman ps --all --quiet)$(podman volume ls --quiet | grep '^linux-')" ]; }
none_runs() { lvm-cache-friend runners list --json | jq -e 'all(.state == "empty")'; }
table() { printf '    %-10s %-10s %-14s %-10s %6s %8s %7s  %s\n' "$@"; }

declare -A number_of result_of
unseen "$demo/../tests/vm/runner-image" podman

chapter "Runners of GitHub's, each for one job"
say "The supervisor keeps runners. This one has two slots of a scale set: a container is made when there is a job, and is gone with" \
    "it. GitHub and its runner are stand-ins here, as there is no network; Podman, the daemon and the caches are real."
mkdir github
coproc GITHUB { exec "$DEMO_GITHUB" github 2>github.log; }
eventually test -s github/url
cat >pool.toml <<CONF

[supervise]
podman-socket = "$stage/podman.sock"

[[supervise.pool]]
name = "linux"
url = "$(cat github/url)"
api-url = "$(cut -d / -f 1-3 github/url)"
token = "$stage/github/token"
scale-set = { name = "linux-cached", max = 2 }
container = { image = "localhost/podman-runner", userns = "auto:size=131072", network = "host" }

[[supervise.pool.volume]]
name = "job"
target = "/run/lvm-cache-friend"
options = { type = "job", owner = "1000:1000" }
CONF
run cat pool.toml
cat pool.toml >>config.toml
for file in subuid subgid passwd; do
    line=containers:1000000:13107200
    [ $file != passwd ] || line=containers:x:990:990::/:/usr/sbin/nologin
    { cat "/etc/$file" && echo "$line"; } >"$file"
    mount --bind "$file" "/etc/$file"
done
podman system service --time=0 "unix://$stage/podman.sock" >service.log 2>&1 &
service=$!
eventually test -S podman.sock
printf '\n'
typed lvm-cache-friend supervise '&'
"$program" --config "$stage/config.toml" supervise >supervisor.log 2>&1 &
supervisor=$!
eventually none_runs

say "Each job builds an image, of a source that is another one than the last job's. The first is alone."
run tail -n +4 project/ci-job
queue first main one
await first
holds "it succeeded, from nothing" ended_as first succeeded
eventually is_published first

say "Five more are queued at once: a pull request from a fork, a change, one whose test fails, the first one again, another change."
queue fork fork evil
queue change main two
queue failing main broken
queue again main one
queue last main three
for job in fork change failing again last; do await "$job"; done
for job in fork change again last; do
    eventually is_published "$job"
done
printf '\n'
table job result from how ms build cached published
for job in first fork change failing again last; do
    from=$(origin "$job")
    published=$(published_as "$job")
    table "$job" "${result_of[$job]}" "${from:--}" "$(restored "$job" .restored)" "$(restored "$job" .ms)" \
        "$(seconds "$(sed -n 's/^build seconds: //p' "job-$job.log")")" \
        "$(grep -c 'Using cache' "job-$job.log" || true) of 3" "${published:--}"
done
printf '\n'
for job in fork change last; do
    holds "$job: only the last step was done again" steps_found "$job" 2
done
holds "the first one again: no step was" steps_found again 3
holds "the failing job failed" ended_as failing failed
! is_published failing || failed "the failing job published something"
for job in change failing again last; do
    ! knows_of "$job" evil || failed "$job got what the fork wrote"
done
for job in fork change again last; do
    ! knows_of "$job" broken || failed "$job got what the failing job wrote"
done
holds "what the fork built is in no job's store but its own, nor what the failing job built" knows_of fork evil
eventually none_runs
holds "no container is left, and no volume of theirs" nothing_left
