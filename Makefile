# Everything is installed into .venv on first use, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
UNHURRIED := --override-ini faulthandler_timeout=0

.PHONY: run test test-slurm test-faults test-kills test-fuzz bench bench-scale lint types site wheel format

run: .venv/installed ## the studies named under `run` in config.yaml, and a report
	$(BIN)/snakemake --cores all
	$(BIN)/snakemake --report results/report.html --quiet
	@echo "All studies, and how each file came about: results/report.html"
	@$(BIN)/python -c 'from yaml import safe_load; run = safe_load(open("config.yaml"))["run"]; \
		print("Start here:", *(f"results/{study}/index.html" for study in run))'

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-slurm: .venv/installed-test ## as root, with Debian's slurmctld slurmd slurm-client munge
	$(BIN)/python -m pytest -m slurm

test-faults: .venv/installed-test ## a node dies, disks are full or without locks, clocks differ
	$(BIN)/python -m pytest -m faults

test-kills: .venv/installed-test ## 50 times kill -9, 50 power failures: half an hour
	$(BIN)/python -m pytest -m kills -s $(UNHURRIED)

test-fuzz: .venv/installed-test ## 2,000 damaged copies of every kind of file: half an hour
	$(BIN)/python -m pytest -m fuzz -s $(UNHURRIED)

bench: .venv/installed ## half an hour on 2 cores; nothing else should run meanwhile
	$(BIN)/python -m benchmarks

bench-scale: .venv/installed ## how cost grows, into docs/scale.{csv,png}
	$(BIN)/python -m benchmarks.scale

lint: .venv/installed-test types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check .
	$(BIN)/snakemake --lint
	$(BIN)/codespell

types: .venv/installed-test
	$(BIN)/mypy

site: .venv/installed-test ## into site/
	$(BIN)/mkdocs build --strict

wheel: .venv/installed-test ## wheels and sdist, into dist/, and the wheel used in an empty environment
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m build --no-isolation --wheel --outdir dist packaging/predict
	.ci/installed dist/ensdistill-*-py3-none-any.whl

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt .
	$(BIN)/python -m ensdistill.studies > config.schema.json

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --editable '.[test]'
	@touch $@
