# One virtual environment serves every target; PYTHON names the interpreter that it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(filter-out %/_native.c,$(wildcard pyggml_repkv/native/*.[ch])) pyggml_repkv/native/ops.def pyggml_repkv/native/build.py
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv run test lint sanitize bench report clean

help:
	@echo "make run [MODEL=NAME] [ARGS='-p \"Hello\" -n 32']  generate text (without MODEL: with the demo model;"
	@echo "                                    without ARGS: from a long text). MODEL is a name, as qwen2.5-coder-0.5b, or a file"
	@echo "make test [ARGS='-k name']          run every test"
	@echo "make lint                           ruff and mypy"
	@echo "make sanitize                       tests of the native code with ASan, UBSan and TSan"
	@echo "make bench [MODEL=NAME] [ARGS='...'] compare logits and speed with llama.cpp (compiles it once: ten minutes)"
	@echo "make report TEXT=FILE               measure everything in docs/RESULTS.md, for hours (goes on where it was stopped)"
	@echo "make venv                           only set up $(VENV)"
	@echo "make clean                          remove $(VENV) and what was built (the cached ggml wheel stays)"

venv: $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not a Python 3.11 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "error: $(PYTHON) has no Python.h; install it (Debian: apt-get install python3-dev)" >&2; exit 1; }
	@echo "creating $(VENV)" >&2
	@$(PYTHON) -m venv "$(VENV)"
	@touch "$@"

# The wheel is installed by force first: pip takes any ggml-python of the same version for the one we built.
$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py $(wildcard vendor/ggml/*.*) $(NATIVE)
	@wheel="$$($(BIN)/python vendor/ggml/ggml_wheel.py)" && \
	  echo "installing pyggml_repkv and its dependencies into $(VENV)" >&2 && \
	  $(PIP) install -qq --no-deps --force-reinstall "$$wheel"
	@$(PIP) install -qq -e '.[test,lint,plot]'
	@touch "$@"

# A document longer than the demo model was trained for, and a question whose answer stands near its start.
QUESTION := What is the secret word? The secret word is
run: MODEL =
run: ARGS ?= --kv repkv -f docs/examples/logbook.txt -p "$$(printf '\n\n$(QUESTION)')" --greedy -n 16
run: venv
	@$(if $(filter file,$(origin ARGS)),echo "reading docs/examples/logbook.txt; $(QUESTION) ..." >&2)
	@$(BIN)/python -m pyggml_repkv run $(if $(MODEL),-m "$(MODEL)") $(ARGS)

test: venv
	@$(BIN)/python -m pytest $(ARGS)

lint: venv
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

sanitize: venv
	@$(BIN)/python tools/sanitize.py

# GCC breaks llama.cpp's use of AMX (github.com/ggml-org/llama.cpp/pull/26954): it would end with SIGILL.
NO_AMX := $(shell grep -qsw amx_int8 /proc/cpuinfo && echo -mno-amx-int8)
$(VENV)/.bench: $(VENV)/.installed
	@echo "installing llama-cpp-python (compiled from source: about ten minutes, once)" >&2
	@CMAKE_ARGS="$(if $(NO_AMX),-DCMAKE_C_FLAGS=$(NO_AMX) -DCMAKE_CXX_FLAGS=$(NO_AMX)) $$CMAKE_ARGS" \
	  $(PIP) install -qq -e '.[bench]'
	@touch "$@"

bench: MODEL =
bench: ARGS ?= -p 512,2048 -n 64 -d 0,2048
bench: $(VENV)/.bench
	@$(BIN)/python tools/compare_llama.py $(if $(MODEL),-m "$(MODEL)")
	@$(BIN)/python -m pyggml_repkv bench --vs llama.cpp $(if $(MODEL),-m "$(MODEL)") $(ARGS)

report: $(VENV)/.bench
	@$(BIN)/python tools/report.py $(if $(TEXT),--text "$(TEXT)") $(ARGS)

clean:
	@[ ! -e "$(VENV)" ] || [ -f "$(VENV)/pyvenv.cfg" ] || { echo "error: $(VENV) is not a virtual environment" >&2; exit 1; }
	@rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -f pyggml_repkv/native/_native.c pyggml_repkv/native/*.o pyggml_repkv/native/*.so
	@find pyggml_repkv tests vendor -name __pycache__ -type d -prune -exec rm -rf {} +
