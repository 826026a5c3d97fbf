# The one place that says how the project is installed, served, tested and checked.
PYTHON ?= python3
# pip arguments that choose a build of torch. None are needed: on Linux without an NVIDIA driver the CPU build is taken, else the
# default one. Another CUDA release, say: make install TORCH_ARGS="--extra-index-url https://download.pytorch.org/whl/cu126"
TORCH_ARGS ?=
# Extra arguments for what the target runs: make serve ARGS="--port 9000", make test ARGS="tests/test_house.py -v"
ARGS ?=

# Threads that wait for work give their core to those that have some; on a busy machine spinning ones starve everybody.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
BIN := $(VENV)/bin
# What serving and training need, and what linting and testing need beside it.
LOCK := requirements.lock
TOOLS_LOCK := requirements-dev.lock
CODE := topkapi/__init__.py model engine service training python tests benchmarks install_torch.py setup.py
PIP := $(BIN)/python -m pip --disable-pip-version-check
# They lie in the environment and go with it: that an install began, that what serves is there, that the tools are, too.
BEGUN := $(VENV)/.begun
DONE := $(VENV)/.done
TOOLS := $(VENV)/.tools

.DEFAULT_GOAL := help
.PHONY: help install tools serve test test-all test-processor lint format lock clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' Makefile | expand -t 26

install: $(DONE)  ## set up .venv with what serving and training need (the targets below do it when needed)

tools: $(TOOLS)  ## add what linting and testing need

# An environment whose install was interrupted, or whose interpreter is gone, is made anew.
# The locks are complete, so pip has nothing to resolve but what torch's own build asks for (see install_torch.py);
# setuptools is in them, so that building topkapi itself needs no second, unpinned environment. The core is compiled while
# pip fetches and unpacks; where that fails, building topkapi tries again and says why.
NATIVE := $(wildcard setup.py model/native/*.cpp model/native/*.h)
$(DONE): pyproject.toml $(LOCK) install_torch.py $(NATIVE) $(if $(wildcard $(BEGUN)),rebuild) $(if $(wildcard $(BIN)/python),,rebuild)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: Topkapi needs Python 3.11 or later, and "$(PYTHON)" is' "$$($(PYTHON) --version 2>&1)"; \
	  echo 'hint: choose another one: make install PYTHON=python3.12'; exit 2; }
	@if [ -e $(BEGUN) ] || ! [ -x $(BIN)/python ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(BEGUN)
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing about 80 packages from $(LOCK), then torch, and compiling the core; this takes two or three minutes'
	@$(PIP) install --quiet --no-deps $$(grep -o '^setuptools==[^ ;]*' $(LOCK))
	$(BIN)/python setup.py --quiet build_ext --inplace >/dev/null 2>&1 & \
	  grep -v '^torch==' $(LOCK) | $(PIP) install --quiet --no-deps -r /dev/stdin && \
	  $(BIN)/python install_torch.py $(TORCH_ARGS); failed=$$?; wait; exit $$failed
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@rm $(BEGUN) && touch $@

# Most of what the tools bring is never imported: what is gets compiled then.
$(TOOLS): $(DONE) $(TOOLS_LOCK)
	@touch $(BEGUN)
	@echo 'Installing about 80 more packages from $(TOOLS_LOCK), to lint and test; this takes a minute'
	$(PIP) install --quiet --no-deps --no-compile -r $(TOOLS_LOCK)
	@rm $(BEGUN) && touch $@

.PHONY: rebuild
rebuild:

serve: install  ## serve the default checkpoints on http://127.0.0.1:8000
	@exec $(BIN)/topkapi serve $(ARGS)

# Tests run in as many processes as there are cores, up to four (each takes about 1.5 GB), whose matrices share none:
# two threads that wait for each other's cores are slower than one. Files are shared out evenly, so that their fixtures
# are made once, and whoever has done with its own takes from the others'. Modules are compiled once, not by each of the
# many processes that tests start.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses logical --maxprocesses 4 --dist worksteal
test: lint  ## lint, then run the tests
	$(PARALLEL) -m "not slow" $(ARGS)

test-all: lint  ## lint, then run the tests with the slow ones
	$(PARALLEL) $(ARGS)

# What depends on the processor, on the kernels of older ones: oneDNN's for AVX2, PyTorch's own for AVX2, in one process with as
# many threads as there are cores, and for none, with one thread. The native core has instructions of its own, whatever theirs.
# Where this processor has no more than AVX2, `make test` ran on the former with one thread: what threads share is run again.
BY_THREADS := tests/model/test_invariance.py tests/model/test_quantize.py
BEYOND_AVX2 := $(shell grep -m1 -oE 'avx512f|avx_vnni' /proc/cpuinfo 2>/dev/null)
PROCESSOR_TESTS := $(addprefix tests/,$(addsuffix .py,$(addprefix model/test_,quantize invariance families nf4) \
  model/storage/test_checkpoint model/decoding/test_speculation training/recipes/test_arguments))
# What is served through the native core, by PyTorch. (That the core's bits are those of its plainest instructions is
# among the tests of the core.)
SERVED_TESTS := $(addprefix tests/,service/test_invariance.py service/api/native model/storage/test_gguf.py)
test-processor: tools  ## run the tests that depend on the processor as on one with AVX2 and without VNNI
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not slow" -k "not native" \
	  $(if $(BEYOND_AVX2),$(PROCESSOR_TESTS),$(BY_THREADS)) $(ARGS)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default $(PARALLEL) -m "not slow" -k "not native" $(PROCESSOR_TESTS) $(ARGS)
	TOPKAPI_NATIVE=0 $(PARALLEL) -m "not slow" $(SERVED_TESTS) $(ARGS)

lint: tools  ## ruff and mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check --quiet $(CODE)
	$(BIN)/mypy --num-workers auto

format: tools  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --extra train --extra gguf
ELSEWHERE := "^(cuda|nvidia-[cn]|triton)[a-z0-9-]*=|== '(win32|emscripten)'|^\#"
lock:  ## pin every dependency again (needs uv; ARGS=--upgrade takes newer versions)
	@command -v uv >/dev/null || { echo 'error: make lock needs uv'; echo 'hint: $(PYTHON) -m pip install uv'; exit 2; }
	$(COMPILE) --output-file $(LOCK) $(ARGS) pyproject.toml
	$(COMPILE) --extra dev --constraints $(LOCK) --output-file $(TOOLS_LOCK) $(ARGS) pyproject.toml
	@{ echo '# What linting and testing need beside $(LOCK), written by "make lock": do not edit.'; \
	   grep -vxFf $(LOCK) $(TOOLS_LOCK) | grep -Ev $(ELSEWHERE); } > $(TOOLS_LOCK).new
	@{ echo '# Exact versions for Python 3.11 and later on Linux and macOS, written by "make lock": do not edit.'; \
	   echo '# CUDA libraries are left out: they come as dependencies of the torch build that needs them (install_torch.py).'; \
	   grep -Ev $(ELSEWHERE) $(LOCK); } > $(LOCK).new
	@mv $(TOOLS_LOCK).new $(TOOLS_LOCK) && mv $(LOCK).new $(LOCK)

# Both take tools that are in no lock: pip install cyclonedx-bom pip-audit
.PHONY: sbom audit
sbom:  ## write sbom.json (CycloneDX): what serving and training install (needs cyclonedx-bom)
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --output-format JSON --output-file sbom.json $(LOCK)

audit:  ## look up what is known of the locked packages (needs pip-audit)
	$(BIN)/pip-audit --no-deps --disable-pip --progress-spinner off --requirement $(LOCK) $(ARGS)

# What docs/models.md says about the default checkpoints comes from these commands; the data and their digests stand there.
# A rehearsal of all of them: make checkpoints RUNS=runs/rehearsal ARGS="--max-steps 2"
CORPUS ?= corpus
INSTRUCTIONS ?= instruct
RUNS ?= runs
TEXT = --data '$(CORPUS)/classic-books-*.jsonl.bz2=9' '$(CORPUS)/wikipedia-en-*.jsonl.bz2=10' \
  '$(CORPUS)/childrens-stories-*.jsonl.bz2=1'
BOOKS = --data '$(CORPUS)/classic-books-*.jsonl.bz2=15' '$(CORPUS)/wikipedia-en-*.jsonl.bz2=4' \
  '$(CORPUS)/childrens-stories-*.jsonl.bz2=1'
HARD = addition subtraction multiplication hours 'number stories' 'number words' sequences 'area and perimeter' sorting \
  lists 'odd one out' 'yes or no' spelling reversing 'first and last letter' 'counting letters' 'capital letters' alphabet \
  opposites synonyms 'what kind of thing' 'memory: say it again' 'memory: go on from there' 'memory: one of two' \
  'reading: things'
# Kinds that are hard after the first part of the chat checkpoint.
HARD_STILL = days units 'past tense' 'counting words' 'list formats' plural definitions naming facts
# Questions of public sets, answered honestly, and the book's instructions.
HONEST = $$topkapi prepare dolly-14.5k.json oasst1-en100-firstturn.json self-instruct-*.jsonl --honest --except $$first \
    --longest-question 200 --longest-answer 400 $$out; \
  $$topkapi prepare gsm8k-train.jsonl --honest --longest-question 200 --except $$first $$out; \
  $$topkapi prepare rasbt-instruction-data.json --first 935 --except $$first $$out
CHAT := $(RUNS)/chat-data
MANNERS := $(RUNS)/manners-data
DRILL := $(RUNS)/drill-data
OPENINGS := $(RUNS)/openings-data
REVIEW := $(RUNS)/review-data
SAID := $(RUNS)/said-data
BEYOND := $(RUNS)/beyond-data
.PHONY: checkpoints
checkpoints: install  ## make the default checkpoints anew from CORPUS and INSTRUCTIONS, in hours; call again to continue
	[ -d $(RUNS)/tokenizer ] || $(BIN)/topkapi tokenizer train $(CORPUS)/c*.jsonl.bz2 $(CORPUS)/w*.jsonl.bz2 \
	  --vocab-size 8192 --out $(RUNS)/tokenizer
	$(BIN)/topkapi pretrain topkapi-base $(TEXT) --tokenizer $(RUNS)/tokenizer --out $(RUNS)/base-short --resume $(ARGS)
	$(BIN)/topkapi pretrain topkapi-base-books $(BOOKS) --checkpoint $(RUNS)/base-short/last --out $(RUNS)/base-books \
	  --resume $(ARGS)
	$(BIN)/topkapi pretrain topkapi-base-cooldown $(BOOKS) --checkpoint $(RUNS)/base-books/last \
	  --out $(RUNS)/base-cooldown --resume $(ARGS)
	$(BIN)/topkapi pretrain topkapi-base-second-cooldown $(BOOKS) --checkpoint $(RUNS)/base-cooldown/last \
	  --out $(RUNS)/topkapi-base --resume $(ARGS)
	@[ -d $(CHAT) ] || (set -ex; rm -rf $(CHAT).new; mkdir -p $(CHAT).new; out="--out $(abspath $(CHAT)).new"; \
	  topkapi="$(abspath $(BIN))/topkapi instructions"; cd $(INSTRUCTIONS); \
	  $$topkapi make --kinds basics --count 100000 --seed 1 $$out/made.jsonl; \
	  $$topkapi make --count 40000 --seed 2 $$out/hard.jsonl --kinds $(HARD); \
	  $$topkapi prepare dolly-14.5k.json self-instruct-*.jsonl $$out; \
	  $$topkapi prepare oasst1-en100-firstturn.json --longest-answer 600 $$out; \
	  $$topkapi prepare rasbt-instruction-data.json --first 935 $$out; \
	  $$topkapi prepare gsm8k-train.jsonl --longest-question 240 --longest-answer 160 $$out; \
	  mv $(abspath $(CHAT)).new $(abspath $(CHAT)))
	$(BIN)/topkapi finetune topkapi-chat --checkpoint $(RUNS)/topkapi-base/last --data $(CHAT)/*.jsonl \
	  --out $(RUNS)/topkapi-chat --resume $(ARGS)
	@[ -d $(MANNERS) ] || (set -ex; rm -rf $(MANNERS).new; mkdir -p $(MANNERS).new; out="--out $(abspath $(MANNERS)).new"; \
	  first="$(abspath $(MANNERS)).new/first.txt"; $(BIN)/python -m benchmarks.first_messages --list > $$first; \
	  $(BIN)/python -m benchmarks.first_messages --development --list >> $$first; \
	  topkapi="$(abspath $(BIN))/topkapi instructions"; cd $(INSTRUCTIONS); \
	  $$topkapi make --kinds manners --count 60000 --seed 3 --steps --except $$first $$out/manners.jsonl; \
	  $$topkapi make --kinds basics --count 30000 --seed 4 --steps --except $$first $$out/made.jsonl; \
	  $$topkapi make --count 20000 --seed 5 --steps --except $$first $$out/hard.jsonl --kinds $(HARD) $(HARD_STILL); \
	  $(HONEST); \
	  mv $(abspath $(MANNERS)).new $(abspath $(MANNERS)))
	$(BIN)/topkapi finetune topkapi-chat-manners --checkpoint $(RUNS)/topkapi-chat/last --data $(MANNERS)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-manners --resume $(ARGS)
	@[ -d $(DRILL) ] || (set -ex; rm -rf $(DRILL).new; mkdir -p $(DRILL).new; out="--out $(abspath $(DRILL)).new"; \
	  first="$(abspath $(MANNERS))/first.txt"; topkapi="$(abspath $(BIN))/topkapi instructions"; cd $(INSTRUCTIONS); \
	  $$topkapi make --kinds drill --count 30000 --seed 6 --steps --except $$first $$out/drill.jsonl; \
	  $$topkapi make --kinds manners --count 20000 --seed 7 --steps --except $$first $$out/manners.jsonl; \
	  $$topkapi make --kinds basics --count 10000 --seed 8 --steps --except $$first $$out/made.jsonl; \
	  $$topkapi make --count 10000 --seed 9 --steps --except $$first $$out/hard.jsonl --kinds $(HARD) $(HARD_STILL); \
	  cp $(abspath $(MANNERS))/dolly-*.jsonl $(abspath $(MANNERS))/oasst1-*.jsonl $(abspath $(MANNERS))/self-instruct-*.jsonl \
	    $(abspath $(MANNERS))/gsm8k-*.jsonl $(abspath $(MANNERS))/rasbt-*.jsonl $(abspath $(DRILL)).new; \
	  mv $(abspath $(DRILL)).new $(abspath $(DRILL)))
	$(BIN)/topkapi finetune topkapi-chat-drill --checkpoint $(RUNS)/topkapi-chat-manners/last --data $(DRILL)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-drill --resume $(ARGS)
	$(BIN)/topkapi finetune topkapi-chat-drill-cooldown --checkpoint $(RUNS)/topkapi-chat-drill/last --data $(DRILL)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-drill-cooldown --resume $(ARGS)
	[ -d $(RUNS)/topkapi-chat-drill-average ] || $(BIN)/topkapi export average $(RUNS)/topkapi-chat-manners/last \
	  $(RUNS)/topkapi-chat-drill-cooldown/last $(RUNS)/topkapi-chat-drill-average
	$(BIN)/topkapi finetune topkapi-chat-drill-mend --checkpoint $(RUNS)/topkapi-chat-drill-average --data $(DRILL)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-drill-mend --resume $(ARGS)
	[ -d $(RUNS)/topkapi-chat-average ] || $(BIN)/topkapi export average $(RUNS)/topkapi-chat-manners/last \
	  $(RUNS)/topkapi-chat-drill-mend/last $(RUNS)/topkapi-chat-average --part 0.6
	@[ -d $(OPENINGS) ] || (set -ex; rm -rf $(OPENINGS).new; mkdir -p $(OPENINGS).new; out="--out $(abspath $(OPENINGS)).new"; \
	  first="$(abspath $(OPENINGS)).new/first.txt"; cp $(abspath $(MANNERS))/first.txt $$first; \
	  $(BIN)/python -m benchmarks.first_messages --fresh --list >> $$first; \
	  topkapi="$(abspath $(BIN))/topkapi instructions"; cd $(INSTRUCTIONS); \
	  $$topkapi make --kinds openings --count 24000 --seed 50 --steps --except $$first $$out/openings.jsonl; \
	  $$topkapi make --kinds manners --count 30000 --seed 51 --steps --except $$first $$out/manners.jsonl; \
	  $$topkapi make --kinds drill --count 16000 --seed 52 --steps --except $$first $$out/drill.jsonl; \
	  $$topkapi make --kinds polish --count 10000 --seed 53 --steps --except $$first $$out/polish.jsonl; \
	  $$topkapi make --kinds basics --count 14000 --seed 54 --steps --except $$first $$out/made.jsonl; \
	  $$topkapi make --count 14000 --seed 55 --steps --except $$first $$out/hard.jsonl --kinds $(HARD) $(HARD_STILL); \
	  $(HONEST); \
	  mv $(abspath $(OPENINGS)).new $(abspath $(OPENINGS)))
	$(BIN)/topkapi finetune topkapi-chat-openings --checkpoint $(RUNS)/topkapi-chat-average --data $(OPENINGS)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-openings --resume $(ARGS)
	$(BIN)/topkapi finetune topkapi-chat-openings-cooldown --checkpoint $(RUNS)/topkapi-chat-openings/last --data $(OPENINGS)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-openings-cooldown --resume $(ARGS)
	[ -d $(RUNS)/topkapi-chat-openings-average ] || $(BIN)/topkapi export average $(RUNS)/topkapi-chat-average \
	  $(RUNS)/topkapi-chat-openings-cooldown/last $(RUNS)/topkapi-chat-openings-average --part 0.55
	@[ -d $(REVIEW) ] || (set -ex; rm -rf $(REVIEW).new; mkdir -p $(REVIEW).new; out="--out $(abspath $(REVIEW)).new"; \
	  first="$(abspath $(REVIEW)).new/first.txt"; cp $(abspath $(OPENINGS))/first.txt $$first; \
	  $(BIN)/python -m benchmarks.first_messages --unread --list >> $$first; \
	  topkapi="$(abspath $(BIN))/topkapi instructions"; cd $(INSTRUCTIONS); \
	  $$topkapi make --kinds review --count 8000 --seed 60 --steps --except $$first $$out/review.jsonl; \
	  $$topkapi make --kinds openings --count 20000 --seed 61 --steps --except $$first $$out/openings.jsonl; \
	  $$topkapi make --kinds manners --count 24000 --seed 62 --steps --except $$first $$out/manners.jsonl; \
	  $$topkapi make --kinds drill --count 14000 --seed 63 --steps --except $$first $$out/drill.jsonl; \
	  $$topkapi make --kinds polish --count 8000 --seed 64 --steps --except $$first $$out/polish.jsonl; \
	  $$topkapi make --kinds basics --count 20000 --seed 65 --steps --except $$first $$out/made.jsonl; \
	  $$topkapi make --count 14000 --seed 66 --steps --except $$first $$out/hard.jsonl --kinds $(HARD) $(HARD_STILL); \
	  $$topkapi make --count 12000 --seed 67 --steps --except $$first $$out/sums.jsonl \
	    --kinds addition subtraction multiplication 'sums as typed' 'problems of one step'; \
	  $$topkapi make --kinds multiplication --count 4000 --seed 68 --steps --except $$first $$out/products.jsonl; \
	  $(HONEST); \
	  mv $(abspath $(REVIEW)).new $(abspath $(REVIEW)))
	$(BIN)/topkapi finetune topkapi-chat-review --checkpoint $(RUNS)/topkapi-chat-openings-average --data $(REVIEW)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-review --resume $(ARGS)
	[ -d $(RUNS)/topkapi-chat-review-average ] || $(BIN)/topkapi export average $(RUNS)/topkapi-chat-openings-average \
	  $(RUNS)/topkapi-chat-review/last $(RUNS)/topkapi-chat-review-average --part 0.7
	@[ -d $(SAID) ] || (set -ex; rm -rf $(SAID).new; cp -r $(REVIEW) $(SAID).new; \
	  $(BIN)/topkapi instructions make --kinds said --count 12000 --seed 70 --steps --except $(REVIEW)/first.txt \
	    --out $(SAID).new/said.jsonl; mv $(SAID).new $(SAID))
	$(BIN)/topkapi finetune topkapi-chat-said --checkpoint $(RUNS)/topkapi-chat-review-average --data $(SAID)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-said --resume $(ARGS)
	[ -d $(RUNS)/topkapi-chat-said-average ] || $(BIN)/topkapi export average $(RUNS)/topkapi-chat-review-average \
	  $(RUNS)/topkapi-chat-said/last $(RUNS)/topkapi-chat-said-average --part 0.7
	@[ -d $(BEYOND) ] || (set -ex; rm -rf $(BEYOND).new; cp -r $(SAID) $(BEYOND).new; \
	  $(BIN)/topkapi instructions make --kinds beyond --count 24000 --seed 80 --steps --except $(REVIEW)/first.txt \
	    --out $(BEYOND).new/beyond.jsonl; mv $(BEYOND).new $(BEYOND))
	$(BIN)/topkapi finetune topkapi-chat-beyond --checkpoint $(RUNS)/topkapi-chat-said-average --data $(BEYOND)/*.jsonl \
	  --out $(RUNS)/topkapi-chat-beyond --resume $(ARGS)
	[ -d $(RUNS)/topkapi-chat-beyond-average ] || $(BIN)/topkapi export average $(RUNS)/topkapi-chat-said-average \
	  $(RUNS)/topkapi-chat-beyond/last $(RUNS)/topkapi-chat-beyond-average --part 0.85

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
