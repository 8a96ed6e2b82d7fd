.PHONY: demo test

# Installs what is missing, then tells the whole story on real LVM and real Podman.
demo:
	@demo/run

# Installs what is missing, then runs every test of every tier, those in virtual machines too.
test:
	tests/vm/deps nextest
	cargo nextest run --locked --features failpoints
