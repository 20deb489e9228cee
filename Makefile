# make demo | test | test-slow | lint | docs | clean. Each sets up .venv by itself, once.
#
#   PYTHON     interpreter for a new .venv     make test PYTHON=python3.12
#   TESTFLAGS  more arguments for pytest       make test TESTFLAGS="-x tests/frames_test.py"
#   WORKERS    test files at the same time     make test WORKERS=8

PYTHON ?= python3
TESTFLAGS ?=
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
BUSY := $(VENV)/.installing

.PHONY: demo test test-slow lint docs clean

demo: $(READY)
	$(RUN) recipes/demo.py --workdir=demo_output

test: lint
	$(RUN) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(TESTFLAGS)

# pytest exits with 5 when no test matches.
test-slow: $(READY)
	@echo '$(RUN) -m pytest -m slow -n $(WORKERS) --dist loadfile $(TESTFLAGS)'; \
	$(RUN) -m pytest -m slow -n $(WORKERS) --dist loadfile $(TESTFLAGS) || { \
		code=$$?; \
		test $$code -eq 5 || exit $$code; \
		echo "No slow test to run: that counts as success."; \
	}

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(RUN) -m mypy
# Benchmarks are run by hand: this finds the names of tests/ that they use and that are gone.
	MYPYPATH=tests:benchmarks $(RUN) -m mypy --check-untyped-defs $(addprefix --disable-error-code=, \
		arg-type assignment method-assign func-returns-value) benchmarks

# Material announces on each build the end of its own life; no reader of these pages can act on that.
docs: $(READY)
	@$(RUN) -c 'import jupytext, material, mkdocs, mkdocstrings_handlers.python' 2>/dev/null || \
		$(RUN) -m pip --disable-pip-version-check install -qq -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict
	@echo "built: .build/docs/index.html"

# Leaves .venv and runs/ alone.
clean:
	rm -rf .build dist *.egg-info demo_output .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name .git -prune -o -name runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

# $(BUSY) is there while an install runs: one left behind was interrupted, and that .venv is built
# anew, as is one whose pip doesn't run. Otherwise pip only adds what pyproject.toml asks for.
# tensorflow-serving-api asks for `tensorflow`, whose files would replace those of tensorflow-cpu.
$(READY): setup.py pyproject.toml etfzoo/version.py
	@if test -e $(BUSY) || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
			echo "etfzoo needs Python 3.11 to 3.13 (TensorFlow 2.21 has no wheels for later ones)," \
				"but '$(PYTHON)' is '$$($(PYTHON) --version 2>&1)': name another one, as in make PYTHON=python3.12" >&2; \
			exit 1; \
		}; \
		$(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing etfzoo and its dependencies into $(VENV); the first time takes a minute or two."
	@touch $(BUSY)
	@$(RUN) -m pip --disable-pip-version-check install -qq -e '.[cpu,train,test]'
	@$(RUN) -m pip --disable-pip-version-check install -qq --no-deps 'tensorflow-serving-api==2.21.*'
	@rm $(BUSY)
	@touch $@
