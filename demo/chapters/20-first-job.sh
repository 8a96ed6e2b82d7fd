# 105 packages of 20 files of 32 KiB, which compress a little.
make_registry() {
    mkdir project/registry &&
        head -c $((105 * 20 * 24 << 10)) /dev/urandom | base64 -w 0 | split -b 32k -a 4 -d - project/registry/file- || return
    local files=(project/registry/file-*) n=0 package
    while read -r package; do
        mkdir "project/registry/$package"
        mv "${files[@]:n:20}" "project/registry/$package"
        n=$((n + 20))
    done < <(seq -f pkg%03g 105)
}
has_entry() { [ -n "$(entries "$@")" ]; }
published() { [ "$(status "$1" last_lease.published)" = "$2" ]; }

unseen make_registry
seq -f pkg%03g 100 >project/packages.lock
lock=$(sha256sum project/packages.lock | cut -c1-8)

chapter "The first job finds nothing, and leaves a cache"
say "Its project names 100 packages in project/packages.lock. Tags say what is in a cache: 'linux', and 'lock-' with the checksum" \
    "of that file. The volume asks for one with both or, failing that, for the newest with 'linux'."
run podman volume create --driver lvm-cache-friend -o "restore=linux lock-$lock; linux" -o "save=linux lock-$lock" job1
run podman run --rm -v job1:/cache -v ./project:/src:ro "$image" sh /src/build
holds "there was no cache: it started from the empty base and fetched everything" \
    grep -q 'packages: 0 found in the cache, 100 fetched' output

say "The container is gone, and what it left becomes an entry with the save tags, behind everybody's back."
eventually has_entry linux "lock-$lock"
first_entry=$(entries linux "lock-$lock")
eventually published job1 "$first_entry"
holds "published as $first_entry" published job1 "$first_entry"
