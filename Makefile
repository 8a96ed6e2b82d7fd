.PHONY: bench deb demo package rpm test

# Installs what is missing, then tells the whole story on real LVM and real Podman.
demo:
	@demo/run

# Installs what is missing, then runs every test of every tier, those in virtual machines too.
test:
	tests/vm/deps nextest browser
	$(MAKE) deb rpm
	cargo nextest run --locked --features failpoints

# Installs what is missing, then measures: against the kernel's own calls in one guest, LVM's shell
# against a process a command, choices among 10,000 entries, and what is shown of 2,000.
bench:
	tests/vm/deps
	cargo bench --locked --bench ratios --bench lvm_shell --bench select --bench views

# Packages: target/debian/*.deb and target/generate-rpm/*.rpm. What they hold is in Cargo.toml. The tools are compiled as
# quickly as can be: not optimized.
deb: package
	cargo deb --version >/dev/null 2>&1 || cargo install --locked --quiet --debug cargo-deb --version 3.8.0
	cargo deb --no-build --quiet

rpm: package
	cargo generate-rpm --version >/dev/null 2>&1 || cargo install --locked --quiet --debug cargo-generate-rpm --version 0.21.1
	cargo generate-rpm

# The program, and what it writes itself of what is packed with it.
package: program = $${CARGO_TARGET_DIR:-target}/release/lvm-cache-friend
package:
	cargo build --release --locked --quiet
	rm -rf target/package
	$(program) man target/package/man
	for shell in bash zsh fish; do $(program) completions $$shell >target/package/$$shell || exit; done
	$(program) example-config >target/package/config.toml
	printf 'lvm-cache-friend (%s-1) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' \
		"$$($(program) --version | cut -d ' ' -f 2)" "$$(sed -n 's/^maintainer = "\(.*\)"/\1/p' Cargo.toml)" \
		"$$(date --rfc-email --reference CHANGELOG.md)" >target/package/changelog
