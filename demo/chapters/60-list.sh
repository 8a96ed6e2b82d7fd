# Two entries, their base, and the volumes of six jobs, each of which has its next copy ready.
all_listed() {
    lvm-cache-friend list --json | jq -e --arg one "$first_entry" --arg two "$third_entry" '
        (map(select(.kind == "base")) | length) == 1
        and (map(select(.kind == "entry") | .name) | sort) == ([$one, $two] | sort)
        and (map(select(.kind == "volume") | .volume) | sort) == ["job1", "job2", "job3", "job4", "job5", "job6"]
    '
}

chapter "What there is now"
eventually all_listed
run lvm-cache-friend list
holds "the base, two entries, and six volumes, each with a fresh copy ready for its next use" all_listed
say "USED counts what copies share with each entry, so the sum is more than what is taken: LVM keeps shared blocks once."
