# make demo   set everything up and run the demonstration
# make test   set everything up, check style and types, run the tests
# make bench  measure; see tools/bench
# make torture  an hour of kills, stops and restarts, judged by logs
# make sanitize  the core with gcc's address and undefined-behaviour sanitizers: its tests, and the fuzzer
# make fuzz overwrite the shared memory at random (SHMCBW_SEED, SHMCBW_FUZZ_SECONDS; make test does a part of that)
# make untrusted  overwrite every word of the shared memory (make test does a part of that)
# make matrix kill and stop at every failpoint (make test does a part of that)
# make differential  the same scripts for QEMU's storage daemon (make test does a part of that)
# make faults make every kind of system call fail (make test does a part of that); hours, SHMCBW_NTH_CALL_RECORD=DIR goes on

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(wildcard shmcbw/_core/*.c shmcbw/_core/*.h)
DEBIAN_PACKAGES := bindfs e2fsprogs exfat-fuse exfatprogs fio fuse iproute2 libnbd-bin openssl qemu-system-common qemu-system-x86 qemu-utils strace

.PHONY: demo test lint sanitize fuzz untrusted bench matrix differential faults torture model clean

demo: $(VENV)/.installed
	$(BIN)/shmcbw demo

# Tests wait more than they compute: several files at a time, also on two CPUs.
test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-test types-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check shmcbw workers tests tools
	MYPYPATH=build/types:typings $(BIN)/mypy -p shmcbw
	MYPYPATH=build/types:typings $(BIN)/mypy tests tools

# What is compared with is optional: a figure that can't be measured says so.
bench: $(VENV)/.installed-test
	-@tools/debian_packages.sh fio libnbd-bin nbdkit qemu-system-common qemu-utils
	$(BIN)/python -m tools.bench $(BENCH_ARGS)

matrix: $(VENV)/.installed-test
	SHMCBW_MATRIX=all $(BIN)/python -m pytest tests/crash/test_matrix.py tests/crash/test_bitmap_kill.py tests/crash/test_job_kill.py \
		tests/crash/test_groups.py tests/crash/test_resize_kill.py tests/crash/test_failpoints.py tests/crash/test_errnos.py

faults: $(VENV)/.installed-test
	SHMCBW_NTH_CALL=all $(BIN)/python -m pytest tests/crash/test_nth_call.py tests/crash/test_socket_faults.py \
		tests/crash/test_nbd_faults.py

differential: $(VENV)/.installed-test
	SHMCBW_DIFFERENTIAL=all $(BIN)/python -m pytest tests/qmp/test_differential.py tests/qmp/test_jobs_over_qmp.py

# A tree of its own, with another build of the core; whoever is started from it inherits both.
SANITIZED := build/sanitized
sanitize: $(VENV)/.installed-test $(CORE)
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	@cp -r shmcbw workers tests tools pyproject.toml $(SANITIZED)/
	@ln -s ../workers $(SANITIZED)/shmcbw/workers
	gcc -std=c11 -O1 -g -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
		-DPy_LIMITED_API=0x030B0000 -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
		shmcbw/_core/*.c -o $(SANITIZED)/shmcbw/_core.abi3.so -lpthread
	cd $(SANITIZED) && export PYTHONPATH="$$PWD" ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:handle_segv=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" && \
		$(CURDIR)/$(BIN)/python -c 'import shmcbw._core as core; assert "sanitized" in core.__file__, core.__file__' && \
		$(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider tests/core tests/crash/test_fuzz.py $(SANITIZE_ARGS)

fuzz: $(VENV)/.installed-test
	SHMCBW_FUZZ_SECONDS=$${SHMCBW_FUZZ_SECONDS:-60} $(BIN)/python -m pytest --timeout 0 tests/crash/test_fuzz.py tests/crash/test_fuzz_adoption.py

untrusted: $(VENV)/.installed-test
	SHMCBW_MATRIX=all $(BIN)/python -m pytest tests/crash/test_untrusted.py

torture: $(VENV)/.installed-test
	$(BIN)/python tools/torture.py --seconds 3600 $(TORTURE_ARGS)

model: $(VENV)/.installed
	$(BIN)/python -m tools.model

# workers/ is installed as shmcbw.workers; mypy looks at directories, so it is shown the tree as it is installed.
.PHONY: types-tree
types-tree:
	@rm -rf build/types && mkdir -p build/types/shmcbw
	@ln -s $(CURDIR)/shmcbw/* build/types/shmcbw/ && ln -s $(CURDIR)/workers build/types/shmcbw/workers

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tools/debian_packages.sh python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml $(CORE)
	@command -v gcc >/dev/null && test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| tools/debian_packages.sh gcc libc6-dev python3-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[ui]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[ui,test]'
	@tools/debian_packages.sh $(DEBIAN_PACKAGES)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info shmcbw/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
