.PHONY: bench demo test

# Installs what is missing, then tells the whole story on real LVM and real Podman.
demo:
	@demo/run

# Installs what is missing, then runs every test of every tier, those in virtual machines too.
test:
	tests/vm/deps nextest browser
	cargo nextest run --locked --features failpoints

# Installs what is missing, then measures: against the kernel's own calls in one guest, LVM's shell
# against a process a command, choices among 10,000 entries, and what is shown of 2,000.
bench:
	tests/vm/deps
	cargo bench --locked --bench ratios --bench lvm_shell --bench select --bench views
