# Two commands are enough on a fresh machine: `make demo` and `make test`. Both set the project up first.
#
#   make demo [DATA=log.tsv]      train and compare four methods, on made or on your own clicks; more options in ARGS,
#                                 e.g. ARGS='--label clicked --ignore time --max-rows 1000000'
#   make test                     all tests          make lint      style, types, layers
#   make bench                    all benchmarks     make bench-quality, bench-systems, …
#   make setup EXTRA=cuda         for a machine with NVIDIA GPUs; the default is EXTRA=cpu
#   make setup PYTHON=python3.12  with another Python (3.10 to 3.12)

PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
BENCHES := quality systems maps lookup steps training gpu jobs distributed residents trust
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-nightly lint format bench $(BENCHES:%=bench-%) clean

setup: $(STAMP)

# torch comes first and on its own, so that pip does not choose another build for what depends on it. On a CPU machine
# the metadata-only package keeps the CUDA build of FBGEMM away (see deploy/fbgemm-gpu-on-cpu).
$(STAMP): pyproject.toml deploy/fbgemm-gpu-on-cpu/pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit(f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "setting up $(VENV) for $(EXTRA) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@if [ "$(EXTRA)" = cpu ]; then $(BIN)/python -m pip install --quiet ./deploy/fbgemm-gpu-on-cpu; fi
	@$(BIN)/python -m pip install --quiet -e '.[$(EXTRA),dev]'
	@$(BIN)/python -m pip check
	@touch $@

demo: setup
	$(BIN)/torchrec-cce demo $(if $(DATA),--data '$(DATA)') $(ARGS)

# No restarts: under loadfile, pytest-xdist runs a file that killed its worker again, and then waits for ever.
test: setup
	$(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0 -m 'not nightly and not gpu'

test-nightly: setup
	$(BIN)/pytest -m nightly

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCHES:%=bench-%)

$(BENCHES:%=bench-%): bench-%: setup
	$(BIN)/python -m benchmarks.$*

clean:
	rm -rf $(VENV) build *.egg-info runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
