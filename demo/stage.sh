# What chapters are told with. A chapter is a file of chapters/, which demo/story sources in the order of the names. It has:
#
#   chapter TITLE           begins one
#   say TEXT                a paragraph for the reader
#   run COMMAND…            shows a command as one would type it, runs it, and shows what it prints; its time is in $took
#   unseen COMMAND…         runs a command that the reader need not see
#   holds WHAT COMMAND…     WHAT is true, as COMMAND shows: printed with a tick, or the story ends here
#   eventually COMMAND…     waits until COMMAND succeeds, two minutes at most
#   status VOLUME KEY       one value of what `podman volume inspect` shows under Status
#   entries TAG…            the LVs of the entries that carry all these tags, newest first, as `list` has them
#   seconds TIME            such as 0.52 s, or 12 ms
#
# and the directory that it runs in, with project/ (what jobs are mounted at /src), `lvm-cache-friend` with the stage's
# configuration, `podman` with the stage's storage, and $image. What the story needs no more is undone by take_down_stage.

stage= program=${DEMO_PROGRAM:-} daemon= supervisor= service= over= number=0 took=0 made_run=
image=localhost/busybox
width=${DEMO_WIDTH:-100}
if [ -n "${DEMO_COLOR:-}" ]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
    bold='' dim='' green='' red='' plain=''
fi

# ---- telling ----

chapter() {
    number=$((number + 1))
    printf '\n%s%s. %s%s\n' "$bold" "$number" "$1" "$plain"
}

say() {
    printf '\n%s\n' "$*" | fold -s -w "$width" | sed 's/ *$//'
}

run() {
    printf '\n'
    typed "$@"
    local begin=$EPOCHREALTIME code=0
    "$@" >"$stage/output" 2>"$stage/errors" || code=$?
    took=$(since "$begin")
    sed 's/^/    /' "$stage/output"
    if [ $code != 0 ]; then
        failed "that ended with exit status $code: $(cat "$stage/errors")"
    fi
}

# Prints a command with its words quoted where a shell needs that, and broken between options where the line would be too long.
typed() {
    local line='  $' word piece=''
    for word in "$@"; do
        case $word in
            '&') ;;
            *[!A-Za-z0-9_./:,=+@%-]*)
                case $word in
                    *=*) word="${word%%=*}='${word#*=}'" ;;
                    *) word="'$word'" ;;
                esac
                ;;
        esac
        piece+=" $word"
        case $word in -o | -v) continue ;; esac
        if [ $((${#line} + ${#piece} + 2)) -gt "$width" ]; then
            printf '%s%s \\%s\n' "$bold" "$line" "$plain"
            line='       '
        fi
        line+=$piece piece=''
    done
    printf '%s%s%s\n' "$bold" "$line" "$plain"
}

unseen() {
    "$@" >>"$stage/log" 2>&1 || failed "'$*' failed: $(tail -n 3 "$stage/log")"
}

holds() {
    local what=$1
    shift
    if ! "$@" >>"$stage/log" 2>&1; then
        failed "it is not so that: $what
    ($*)"
    fi
    printf '  %s✓%s %s\n' "$green" "$plain" "$what"
}

eventually() {
    local deadline=$((SECONDS + 120))
    until "$@" >>"$stage/log" 2>&1; do
        [ $SECONDS -lt $deadline ] || failed "for two minutes it was not so that: $*"
        sleep 0.2
    done
}

failed() {
    printf '\n%sThe story ends here:%s %s\n' "$red" "$plain" "$1" >&2
    for log in daemon supervisor; do
        if [ -s "$stage/$log.log" ]; then
            printf "\nThe last lines of the $log's log:\n" >&2
            tail -n 20 "$stage/$log.log" | sed 's/^/    /' >&2
        fi
    done
    exit 1
}

status() {
    podman volume inspect --format "{{.Status.$2}}" "$1"
}

entries() {
    lvm-cache-friend list --json | jq -r --args '
        map(select(.kind == "entry" and ($ARGS.positional - (.tags | map(ltrimstr("friend:cache:"))) == []))) | .[].name
    ' "$@"
}

since() {
    awk -v begin="$1" -v end="$EPOCHREALTIME" 'BEGIN { printf "%.3f", end - begin }'
}

seconds() {
    awk -v t="$1" 'BEGIN { if (t < 0.1) printf "%.0f ms", t * 1000; else if (t < 10) printf "%.2f s", t; else printf "%.1f s", t }'
}

lvm-cache-friend() { "$program" --config "$stage/config.toml" "$@"; }

# ---- the stage ----

# Whether this machine can have a stage: by setting one, and running a container on it.
probe_stage() {
    [ "$(id -u)" = 0 ] && [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] || return 1
    # A module that is missing is asked for, as LVM would; one that is not there at all says no.
    dmsetup targets | grep -q '^thin-pool ' || modprobe -n dm-thin-pool || return 1
    dmsetup version || return 1
    trap take_down_stage EXIT
    set_stage
    podman run --rm "$image" true
    over=yes
}

set_stage() {
    umask 022
    if [ -n "${DEMO_DISK:-}" ]; then
        stage=$(mktemp -d /run/lvm-cache-friend-demo.XXXXXXXX)
        mkfs.xfs -q "$DEMO_DISK"
        mount "$DEMO_DISK" "$stage"
    else
        stage=$(mktemp -d "${TMPDIR:-/var/tmp}/lvm-cache-friend-demo.XXXXXXXX")
    fi
    cd "$stage"
    if [ ! -d /run/lvm-cache-friend ]; then
        mkdir /run/lvm-cache-friend
        made_run=yes
    fi
    mount -t tmpfs -o mode=755 demo /run/lvm-cache-friend

    export LVM_SYSTEM_DIR=$stage/lvm
    mkdir -p "$LVM_SYSTEM_DIR/backup" containers
    cat /etc/lvm/lvm.conf >"$LVM_SYSTEM_DIR/lvm.conf" 2>/dev/null || true
    # Of a setting that is there twice LVM takes the later one.
    {
        cat /etc/lvm/lvmlocal.conf 2>/dev/null || true
        echo "backup/backup_dir=\"$LVM_SYSTEM_DIR/backup\""
        echo 'backup/archive=0'
    } >"$LVM_SYSTEM_DIR/lvmlocal.conf"

    export CONTAINERS_CONF=$stage/containers.conf CONTAINERS_STORAGE_CONF=$stage/storage.conf
    cat >"$CONTAINERS_CONF" <<CONF
[containers]
netns = "none"
[engine]
events_logger = "file"
hooks_dir = ["$stage/hooks.d"]
tmp_dir = "$stage/containers/libpod"
volume_path = "$stage/containers/volumes"
volume_plugin_timeout = 60
[engine.volume_plugins]
lvm-cache-friend = "/run/lvm-cache-friend/plugin.sock"
[network]
network_backend = "netavark"
CONF
    cat >"$CONTAINERS_STORAGE_CONF" <<CONF
[storage]
driver = "overlay"
runroot = "$stage/containers/run"
graphroot = "$stage/containers/storage"
CONF
    mkdir hooks.d
    for hook in "$demo"/../hooks.d/*.json; do
        jq --arg program "$program" --arg config "$stage/config.toml" \
            '.hook.path = $program | .hook.args[1:1] = ["--config", $config]' "$hook" >"hooks.d/${hook##*/}"
    done
    unseen "$demo/../tests/vm/busybox-image" "$image"
    cp -r "$demo/project" .
}

# In the order that things hold each other; what is not there needs no taking down.
take_down_stage() {
    local code=$?
    trap '' INT TERM HUP
    set +e
    [ -n "$stage" ] || exit "$code"
    {
        # The supervisor first: it would start containers anew.
        for program in $supervisor; do
            kill -KILL "$program"
            wait "$program"
        done
        podman rm --all --force --time 0
        for program in $service $daemon; do
            kill "$program"
            wait "$program"
        done
        mounted_at /run/lvm-cache-friend/
        for device in $(losetup --noheadings --output NAME --associated "$stage/$disk_file"); do
            group=$(pvs --noheadings --options vg_name "$device")
            [ -z "$group" ] || vgremove --force --yes $group
            losetup --detach "$device"
        done
        umount /run/lvm-cache-friend
        [ -z "$made_run" ] || rmdir /run/lvm-cache-friend
        cd /
        mounted_at "$stage/"
    } >/dev/null 2>&1 </dev/null
    if [ -n "${DEMO_DISK:-}" ]; then umount -l "$stage"; fi
    rm -rf --one-file-system "$stage"
    if [ "$code" = 0 ] && [ -z "$over" ]; then code=1; fi
    exit "$code"
}

# Unmounts all below a directory, the last mounted first.
mounted_at() {
    awk -v below="$1" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac | while read -r at; do
        umount -l "$(printf %b "$at")"
    done
}

disk_file=demo-$$.img
