used_cache() { [ "$(grep -c 'Using cache' output)" = "$1" ]; }
lacks_sys_admin() { (((0x$(awk '$1 == "CapBnd:" { print $2 }' output) & 1 << 21) == 0)); }
# nested_job FIRST_ID: runs the job with 2 x 65,536 ids of its own, from FIRST_ID on.
nested_job() {
    run podman run --rm --uidmap "0:$1:131072" --gidmap "0:$1:131072" -v job7:/run/lvm-cache-friend:rslave \
        -v ./project/image:/src:ro localhost/builder sh /src/job
    holds "it has no CAP_SYS_ADMIN, and cannot gain it" lacks_sys_admin
}

unseen "$demo/../tests/vm/builder-image"
unseen podman save --quiet --output project/image/busybox.tar "$image"

chapter "podman build, in a job"
say "A job may ask for caches while it runs, by way of a volume with a socket in it. The next one builds an image with rootless Podman," \
    "in a container with a user namespace of its own. Podman's store is the cache."
run cat project/image/job
run podman volume create --driver lvm-cache-friend -o type=job -o owner=1000:1000 job7
nested_job 1000000
first_build=$took
holds "it started from nothing, and every step was done" used_cache 0
eventually has_entry podman

say "The next job has other ids on this host. What is mounted for it shows files as its own, so that Podman takes the store for its."
nested_job 3000000
holds "no step was done again" used_cache 3
say "The first job took $(seconds "$first_build"), this one $(seconds "$took"), each with the start of its container."
