# Each target does all its own set-up: an environment in .venv, torch at the pinned version, an editable install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test soak bench lint types emulator interpreter sanitize clean

demo: $(VENV)/.installed
	$(BIN)/fastclip demo

test: $(VENV)/.installed $(VENV)/.frameworks
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# 20,000 steps under each clipping rule, with faults thrown in; about ten minutes
soak: $(VENV)/.installed
	$(BIN)/python -m fastclip.bench.soak --json bench/results/soak.json

bench: $(VENV)/.installed
	$(BIN)/python -m fastclip.bench.compare --json bench/results/cpu.json --markdown bench/results/cpu.md

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

# torch first and alone: with its exact version there, nothing else can pull another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP) --editable '.[examples,test,dev]'
	$(BIN)/python -m fastclip
	touch $@

# What fastclip is tested inside of. The installed package's name adds its extra without another build. ultralytics and
# timm come by themselves: they ask for torchvision, whose wheel wants the CUDA build of torch. torchvision and DeepSpeed
# lie in folders apart: others import either wherever it is installed.
$(VENV)/.frameworks: $(VENV)/.installed
	$(PIP) 'torch-fastclip[integrations]'
	$(PIP) --no-deps ultralytics timm
	$(PIP) --no-deps --upgrade --target $(VENV)/torchvision torchvision
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --upgrade --target $(VENV)/deepspeed deepspeed einops hjson msgpack
	touch $@

# The tests of every backend over the CUDA kernels, compiled for the CPU: each of a kernel's threads is a fiber.
emulator: $(VENV)/.installed $(VENV)/.frameworks
	FASTCLIP_CUDA=emulated $(PIP) --no-deps --upgrade --target build/emulated .
	cd build && env -u FASTCLIP_BACKEND PYTHONPATH=emulated ../$(BIN)/python -m pytest -c ../pyproject.toml --rootdir .. \
	-p no:cacheprovider -q -n auto --maxprocesses 4 -k "cuda or every_unit" \
	--ignore ../tests/test_cuda_build.py ../tests

# The tests of every backend over the Triton kernels, in Triton's interpreter: numpy does what a GPU would do.
interpreter: $(VENV)/.installed $(VENV)/.frameworks
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -p no:cacheprovider -n auto --maxprocesses 4 -k "triton or every_unit" \
	--ignore tests/test_triton_build.py tests

# The native tests under AddressSanitizer and UBSan, in a build of its own: all on the CPU, and for the emulated kernels
# test_cuda.py and test_gpu_kernels.py. Those that start interpreters of their own take long and find nothing more. Its
# launches have parameters of 4 KB, as from an nvcc before 12.1: so lists are cut into many.
sanitize: $(VENV)/.installed
	CXX="$(CXX) -DFASTCLIP_PARAMETER_BYTES=4096" FASTCLIP_SANITIZE=address,undefined FASTCLIP_CUDA=emulated $(PIP) --no-deps --upgrade --target build/sanitized .
	cd build && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=sanitized ../$(BIN)/python -m pytest -c ../pyproject.toml --rootdir .. \
	-p no:cacheprovider -q --capture=sys -n auto --maxprocesses 4 ../tests/test_norms.py ../tests/test_clip.py ../tests/test_writes.py ../tests/test_inputs.py \
	../tests/test_penalty_engine.py ../tests/test_cuda.py ../tests/test_gpu_kernels.py \
	-k "not reference and not cuda-emulated and not by_name and not unknown and not environment and not by_itself"

clean:
	rm -rf $(VENV) build dist *.egg-info fastclip/_C*.so fastclip/_build.json
