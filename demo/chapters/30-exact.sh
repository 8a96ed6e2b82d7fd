restored() { [ "$(status "$1" restored)" = "$2" ] && [ "$(status "$1" from)" = "$3" ]; }

# How long Podman waited for the volume when it started the container, in seconds. The daemon tells when the lease has ended.
mounted_in() {
    eventually lease_ended "$1"
    awk -v ms="$(status "$1" last_lease.mount_ms)" 'BEGIN { printf "%.3f", ms / 1000 }'
}
lease_ended() { [ "$(status "$1" last_lease)" != '<no value>' ]; }

chapter "The second job has the same packages: it gets that cache"
run podman volume create --driver lvm-cache-friend -o "restore=linux lock-$lock; linux" -o "save=linux lock-$lock" job2
second_created=$took
holds "chosen for its exact tags: $first_entry" restored job2 exact "$first_entry"
run podman run --rm -v job2:/cache -v ./project:/src:ro "$image" sh /src/build
holds "all packages were there, and every file has the right content" \
    grep -q 'packages: 100 found in the cache, 0 fetched' output
second_mounted=$(mounted_in job2)
