# One command for each job. Every target sets up .venv first; when nothing changed that takes 0.1 s.
#   PYTHON=python3.12        which Python makes the virtual environment (3.11 to 3.13)
#   TORCH_INDEX=URL          where the CPU build of torch is found; empty: your pip's own index (CUDA build)
#   ARGS="--port 8000"       more flags for the program that runs
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

BIN := $(VENV)/bin
SETUP := $(PYTHON) tools/setup_env.py --venv $(VENV) --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)"

.DEFAULT_GOAL := help
.PHONY: help env env-dev serve test test-slow test-gpu test-browser check check-native format docs sim soak fuzz bench train-model eval-model clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

env: ## make .venv with what serving needs
	@$(SETUP)

env-dev: ## make .venv with the tools for tests and checks too
	@$(SETUP) --extras test,check

serve: env ## serve the bundled model on 127.0.0.1:30000; ARGS="--model-path DIR --port N"
	@$(BIN)/trunkline serve $(ARGS)

test: env-dev ## the fast tests; ARGS="-k name"
	@$(BIN)/python -m pytest -q $(ARGS)

test-slow: env-dev ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m "slow and not gpu" $(ARGS)

test-gpu: env-dev ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu $(ARGS)

test-browser: ## the playground in a headless Chromium of this machine (Debian: apt-get install chromium)
	@$(SETUP) --extras test,check,browser
	@$(BIN)/python -m pytest -q -m browser tests/browser $(ARGS)

check: env-dev ## lint, format, types, house rules, generated docs: all of them, then the verdict
	@status=0; \
	for tool in "ruff check ." "ruff format --check ." mypy "python -m tools.check" "python -m tools.generate --check"; do \
		echo "== $$tool"; \
		$(BIN)/$$tool || status=1; \
	done; \
	exit $$status

check-native: env-dev ## build the C++ kernels with sanitizers and run each on every instruction set of this machine
	@$(PYTHON) -c "import shutil, sys; sys.exit(not shutil.which('cmake'))" || $(BIN)/python -m pip install -qq cmake ninja
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/check -DTRUNKLINE_CHECK=ON -DCMAKE_BUILD_TYPE=Debug > /dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/check -j 2
	@build/check/check_kernels

format: env-dev ## apply what `make check` would ask for
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: env-dev ## write the generated pages of docs/ anew
	@$(BIN)/python -m tools.generate

sim: env-dev ## simulate 20,000 random configurations of scheduler and cache
	@$(BIN)/python -m tests.sim --cases 20000 $(ARGS)

soak: env-dev ## clients with all kinds of requests come and go for 2 minutes, against a server that runs already
	@$(BIN)/python -m tests.soak $(ARGS)

fuzz: env-dev ## 20,000 random calls of every route, drawn from the server's OpenAPI document
	@$(BIN)/python -m tests.fuzz $(ARGS)

bench: env ## benchmark the bundled model offline; ARGS="--json"
	@$(BIN)/trunkline bench offline $(ARGS)

train-model: env-dev ## train the bundled model from nothing
	@$(BIN)/python -m training.seedling.train $(ARGS)
	@$(BIN)/python -m training.seedling.export

eval-model: env-dev ## accuracy of the bundled model, task by task, through the engine
	@$(BIN)/python -m training.seedling.evaluate $(ARGS)

clean: ## delete the virtual environment and all caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
