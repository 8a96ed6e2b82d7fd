seq -f pkg%03g 105 >project/packages.lock
new_lock=$(sha256sum project/packages.lock | cut -c1-8)

chapter "The third job has five packages more: it falls back to the nearest cache"
say "No cache has the new checksum, so the second criterion decides: the newest with 'linux'."
newest=$(entries linux | head -n 1)
run podman volume create --driver lvm-cache-friend -o "restore=linux lock-$new_lock; linux" -o "save=linux lock-$new_lock" job3
third_created=$took
holds "a fallback: $newest" restored job3 fallback "$newest"
run podman run --rm -v job3:/cache -v ./project:/src:ro "$image" sh /src/build
holds "only the five new packages had to be fetched" \
    grep -q 'packages: 100 found in the cache, 5 fetched' output
third_mounted=$(mounted_in job3)
eventually has_entry linux "lock-$new_lock"
third_entry=$(entries linux "lock-$new_lock")
holds "published as $third_entry, beside the older one" has_entry linux "lock-$lock"
