.PHONY: advisories bench deb demo package packers pictures rpm run-tests test test-all torture

# Installs what is missing, then tells the whole story on real LVM and real Podman.
demo:
	@demo/run

# Makes docs/pictures/ anew, from a run of the demo.
pictures:
	demo/record

# Installs what is missing, then runs every test on one system, and on Debian 13 too what touches the system's own behaviour and what
# needs a Ceph cluster (.config/nextest.toml); in virtual machines where that is needed.
test: trees = own trixie trixie-ceph
test: run-tests

# The same, and everything on each system.
test-all: trees = own trixie trixie-ceph forky
test-all: options = --ignore-default-filter --filterset 'not test(/::torture::/)'
test-all: run-tests

trees =
options =
run-tests:
	tests/vm/deps nextest browser
	for tree in $(trees); do tests/vm/tree $$tree >/dev/null || exit; done
	$(MAKE) packers
	tests/tested --cargo-profile tests | diff docs/tested.md -
	cargo nextest run --locked --cargo-profile tests --features failpoints --test-threads $$((2 * $$(nproc) + 1)) $(options)

# Looks for known vulnerabilities in what the program is built from. It needs the network: the advisories are in a repository at GitHub.
advisories:
	cargo deny --version >/dev/null 2>&1 || cargo install --locked --quiet --debug cargo-deny --version 0.20.2
	cargo deny --locked check advisories

# For half an hour, on Debian 12: the power is cut a hundred times and at every moment that there is, the daemon is killed over and over, the
# group is locked by others, one lease's disk is slow or fails. Prints what it did; any entry that is lost, damaged or should not be there,
# and whatever is left over, is a failure.
torture:
	tests/vm/deps nextest
	cargo nextest run --locked --cargo-profile tests --features failpoints --test-threads $$((2 * $$(nproc) + 1)) --retries 0 \
		--ignore-default-filter --success-output final --filterset 'test(/^(reflink|driver|guest::lvm|guest::podman)::torture::/)'

# Installs what is missing, then measures: against the kernel's own calls in one guest, LVM's shell
# against a process a command, choices among 10,000 entries, and what is shown of 2,000.
bench:
	tests/vm/deps
	cargo bench --locked --bench ratios --bench lvm_shell --bench select --bench views

# Packages: target/debian/*.deb and target/generate-rpm/*.rpm. What they hold is in Cargo.toml. Those of a given program are for
# tests, which have no time to compress it well.
deb: packers package
	cargo deb --no-build --quiet $(if $(program),--fast)

rpm: packers package
	cargo generate-rpm $(if $(program),--payload-compress none)

# Compiled as quickly as can be: not optimized.
packers:
	cargo deb --version >/dev/null 2>&1 || cargo install --locked --quiet --debug cargo-deb --version 3.8.0
	cargo generate-rpm --version >/dev/null 2>&1 || cargo install --locked --quiet --debug cargo-generate-rpm --version 0.21.1

# The program, built here unless it is given (tests pack the one that they test), and what it writes itself of what is packed with it.
program =
package: packed = target/package/lvm-cache-friend
package:
	$(if $(program),,cargo build --release --locked --quiet)
	rm -rf target/package
	mkdir -p target/package
	strip -o $(packed) $(or $(program),$${CARGO_TARGET_DIR:-target}/release/lvm-cache-friend)
	$(packed) man target/package/man
	for shell in bash zsh fish; do $(packed) completions $$shell >target/package/$$shell || exit; done
	$(packed) example-config >target/package/config.toml
	printf 'lvm-cache-friend (%s-1) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' \
		"$$($(packed) --version | cut -d ' ' -f 2)" "$$(sed -n 's/^maintainer = "\(.*\)"/\1/p' Cargo.toml)" \
		"$$(date --rfc-email --reference CHANGELOG.md)" >target/package/changelog
