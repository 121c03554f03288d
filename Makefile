# Each target sets itself up: a virtual environment, the build, what the target needs.
#   make demo    the main job on real text        make test   the tests
#   make bench   the microbenchmarks and plots    make lint   linters and types
#   make sanitize   the CPU tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make gpu     build, tests, benchmarks on a GPU  make clean  remove what these made
PYTHON ?= python3
VENV ?= .venv
# another torch, e.g. TORCH=torch==2.11.0; a build of torch for this machine's GPU is installed before, by hand
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/pip --disable-pip-version-check
RUN = $(VENV)/bin/python
CLANG_SOURCES = '*.cpp' '*.h' '*.cu' '*.cuh'
SOURCES = $(shell find csrc CMakeLists.txt setup.py pyproject.toml -type f)

.PHONY: demo test bench lint sanitized sanitize gpu clean format
.DELETE_ON_ERROR:

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) install -q "$(TORCH)" "numpy<2.4"
	$(PIP) install -q "setuptools>=77,<82" "pybind11>=3" "cmake>=3.26" ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q --no-build-isolation -e .
	touch $@

# extras are installed without touching torch or the build
$(VENV)/.extra-%: $(VENV)/.built pyproject.toml
	$(PIP) install -q --no-build-isolation -e ".[$(subst +,$(comma),$*)]"
	touch $@
comma := ,

# adapters are tested against the real RankLLM, whose dependencies would bring vLLM and its torch; and the emulation of
# CUDA kernels against CUTLASS's headers
$(VENV)/.test-alone: $(VENV)/.extra-test+demo+bench
	$(PIP) install -q --no-deps "rank_llm==0.25.7" "nvidia-cutlass==4.2.0.0"
	touch $@

demo: $(VENV)/.extra-demo
	$(VENV)/bin/embedding-kernels demo $(ARGS)

test: $(VENV)/.extra-test+demo+bench $(VENV)/.test-alone
	$(RUN) -m pytest $(ARGS)

bench: $(VENV)/.extra-bench
	$(RUN) bench/run.py $(ARGS)

lint: $(VENV)/.extra-lint+test+demo
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	git ls-files $(CLANG_SOURCES) | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.extra-lint+test+demo
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	git ls-files $(CLANG_SOURCES) | xargs $(VENV)/bin/clang-format -i

# a package of its own beside the sources, so that the ordinary build stays as it is
SANITIZED = build/sanitized
# without libstdc++ beside it, the first C++ exception would end the process
SANITIZER = PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)"
# without the tests' packages, so that it can be compiled while those are unpacked
sanitized: $(VENV)/.built
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -rL python/embedding_kernels $(SANITIZED)/
	rm -f $(SANITIZED)/embedding_kernels/*.so
	EMBEDDING_KERNELS_SANITIZE=ON EMBEDDING_KERNELS_CUDA=OFF $(RUN) setup.py -q build_ext --build-lib $(SANITIZED)
sanitize: sanitized $(VENV)/.extra-test+demo+bench
	$(SANITIZER) $(RUN) -c "import embedding_kernels as e; assert '$(SANITIZED)' in e.__file__, e.__file__"
	# of codes of every width one kind: the others read the same bytes
	# -s: a sanitizer ends the process, and what it says must not be lost with what pytest has captured
	$(SANITIZER) $(RUN) -m pytest -q -s -p no:cacheprovider --backend cpu -m "not slow" tests/anchor_scores tests/hamming \
	  tests/latent_attention tests/norm tests/paragraph_vector tests/pooling tests/attention/test_properties.py \
	  tests/contract/test_bad_input.py tests/contract/test_layout.py \
	  -k "not guard and not past_a_buffer and not two_to_the and not gradcheck and not (test_every_width and not random)" \
	  $(ARGS)

# with the torch that is there: one that sees a GPU before another, of .venv or else the system's; nothing is installed
# unless there is none
SEES_GPU = import sys, torch; sys.exit(not torch.cuda.is_available())
MAKE_VENV = $(MAKE) --no-print-directory $(VENV)/.extra-test+demo+bench
gpu:
	@for asked in "$(SEES_GPU)" "import torch"; do for python in $(RUN) $(PYTHON); do \
	  if $$python -c "$$asked" 2>/dev/null; then exec $$python bench/gpu.py $(ARGS); fi; \
	done; done; \
	$(MAKE_VENV) && exec $(RUN) bench/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info python/embedding_kernels/*.so
