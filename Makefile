# make demo   stretch the small Llama in data/tiny-llama from 256 to 1024 tokens, measure, merge, generate
# make test   run the tests
# make lint   check style
# Each creates .venv and installs requirements.txt when that is missing or has changed; tests also need
# requirements-extras.txt, as do documents, the web page and parts of the evaluation suite (make extras).

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
# The evaluation suite, documents and the web page need more than training does.
EXTRAS := $(VENV)/.extras-$(shell cat requirements.txt requirements-extras.txt | cksum | cut -d' ' -f1)
# Idle threads that spin take the cores from threads that work.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint extras benchmark clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(VENV)/bin/python script/demo.py

# A file of tests stays in one process, so that its fixtures are made once.
test: $(EXTRAS)
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(EXTRAS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

benchmark: $(STAMP)
	$(VENV)/bin/python benchmark/attention.py

$(STAMP): requirements.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
	@rm -f $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

extras: $(EXTRAS)

$(EXTRAS): requirements-extras.txt $(STAMP)
	@rm -f $(VENV)/.extras-*
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extras.txt
	@touch $@

clean:
	rm -rf $(VENV) output
