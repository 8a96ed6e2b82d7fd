//! lvm-cache-friend's program: parse, log, call.

fn main() {}
