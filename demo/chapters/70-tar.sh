# archive VOLUME FILE: what the volume holds, as a tar.
archive() {
    podman volume mount "$1" &&
        tar --zstd -C "/run/lvm-cache-friend/mnt/$1" -cf "$2" . &&
        podman volume unmount "$1"
}
untar() { mkdir "$2" && tar --zstd -C "$2" -xf "$1"; }
same_files() { diff <(cd "$1" && find . -type f | sort) <(tar --zstd -tf "$2" | grep -v '/$' | sort); }
row() { printf '    %-26s %10s %12s %12s %10s\n' "$@"; }
# compare WHAT CREATED MOUNTED TAR, all in seconds
compare() {
    local slower
    slower=$(awk -v c="$2" -v m="$3" -v t="$4" 'BEGIN { printf "%.0f times", t / (c + m) }')
    row "$1" "$(seconds "$2")" "$(seconds "$3")" "$(seconds "$4")" "$slower"
}

chapter "And with tar?"
say "A cache that is kept as an archive has to be unpacked for each job. Here the archives are on the local disk and in memory" \
    "already: only the unpacking is measured, no download, and no packing when the job is done."
unseen archive job2 second.tar.zst
unseen archive job6 third.tar.zst
bytes=$(zstd -dc second.tar.zst | wc -c)
mkdir second
run tar --zstd -C second -xf second.tar.zst
second_tar=$took
holds "the same $(find second -type f | wc -l) files, $((bytes >> 20)) MiB" same_files second second.tar.zst
rm -rf second
begin=$EPOCHREALTIME
unseen untar second.tar.zst third
third_tar=$(since "$begin")
rm -rf third
begin=$EPOCHREALTIME
untar third.tar.zst fourth &
fourth=$!
unseen untar third.tar.zst fifth
wait "$fourth" || failed "tar failed"
both_tar=$(since "$begin")

say "How long until the cache was there: the volume's creation, which can be over before the job comes, the mount that its" \
    "container waits for, and the unpacking of the same bytes."
printf '\n'
row '' create mount tar 'tar takes'
compare '2nd job, exact' "$second_created" "$second_mounted" "$second_tar"
compare '3rd job, fallback' "$third_created" "$third_mounted" "$third_tar"
compare '4th and 5th, at once' "$both_created" "$both_mounted" "$both_tar"
say "What tar takes grows with the bytes; a snapshot does not copy any. ('make bench' compares 1 GiB.)"
