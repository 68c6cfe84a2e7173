# Two commands for a fresh machine: `make demo` and `make test`. Everything lives in .venv and .sid; removing both undoes it.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
SUITABLE := "import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))"
BIN := .venv/bin
SETTLED := .venv/.installed

.PHONY: help install demo test test-unit test-services study-smoke study-cpu bench lint format clean chaos stability

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(SETTLED)  ## the environment alone, in .venv

demo: $(SETTLED)  ## two nights of MovieLens-100K through Airflow, Spark, torch, Iceberg and MLflow, then a ranker on the release
	$(BIN)/sid demo $(if $(DATASET),--dataset $(DATASET)) $(if $(DATASET_PATH),--dataset-path $(DATASET_PATH))

test: $(SETTLED)  ## every test that needs no accelerator
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu" --durations 10 -q

test-services: $(SETTLED)  ## a night, its readers and a backfill on PostgreSQL, MLflow, Spark and Airflow servers (S3=1: tables on an S3 server)
	$(BIN)/python tests/services/run.py $(if $(S3),--s3)

test-unit: $(SETTLED)  ## the fast tests: no JVM, no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit tests/property -m "not spark and not airflow and not gpu"

chaos: $(SETTLED)  ## random kills and faults on a small shop, half an hour or so; .sid/chaos.json says what held
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/chaos.py --kills $(or $(KILLS),50)

SHOP := items=800 users=1000 events_per_day=1200 days=28
SHOP_NIGHTS := --profile shop $(SHOP:%=--set source.options.%) --set train_behavior_encoder.measure_reliability=false --first 2026-03-14 --last 2026-03-21
stability: $(SETTLED)  ## what each refresh policy keeps and costs, night by night, on a generated shop: make stability WORK=<folder> [SOURCE=<day files of Online Retail>]
	@test -n "$(WORK)" || { echo "make stability WORK=<empty folder> [SOURCE=<folder of YYYY-MM-DD.csv of Online Retail>]"; exit 64; }
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/stability.py --work $(WORK) $(if $(SOURCE),--set source.path=$(SOURCE),$(SHOP_NIGHTS))

study-smoke: $(SETTLED)  ## the study in small: a grid on a generated shop, its verdicts and its page
	$(BIN)/sid study study-smoke

study-cpu: $(SETTLED)  ## one night on two cores: SOURCE is a folder with amazon_beauty/ and online_retail/
	$(BIN)/sid study study-cpu --set source.path=$(SOURCE)

bench: $(SETTLED)  ## ours beside its peers on this machine: ROWS=1,6 and SCALE=quick|normal|full choose; peers: pip install ".[bench]" where they may be installed
	OMP_NUM_THREADS=$(or $(THREADS),2) $(BIN)/python tests/bench/bench.py --threads $(or $(THREADS),2) --scale $(or $(SCALE),normal) --rows "$(ROWS)"

lint: $(SETTLED)  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(SETTLED)  ## let ruff lay out the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the state of all runs, not the environment
	rm -rf .sid

$(SETTLED): constraints.txt pyproject.toml
	@$(or $(PYTHON),false) -c $(SUITABLE) || { echo "sidmill needs Python 3.11 or 3.12 on the PATH; found: $$($(or $(PYTHON),echo none) --version 2>&1)"; exit 64; }
	@echo "installing into .venv (once; about 3 GB and a few minutes)"
	@$(BIN)/python -c $(SUITABLE) 2>/dev/null || rm -rf .venv
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "the module venv is missing (Debian: python3-venv)"; exit 64; }
	$(BIN)/python -m pip install --quiet --requirement constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(SETTLED)
