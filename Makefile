# Two commands: `make demo` shows the whole way on this machine, `make test` tests it. Both make their environment first.

PYTHON ?= python3
VENV ?= .venv
SERVE ?= 1
PORT ?= 8000
RAY_CPUS ?= 6
ENVIRONMENT := $(VENV)/.installed

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help install demo test test-faults lint audit ray-head ray-stop clean

help:
	@echo "make demo          the whole way on this machine, ends with a search page (SERVE=0: without; PORT=8000)"
	@echo "make test          all tests but fault injection (TESTS='tests/unit -k stretch' for some)"
	@echo "make test-faults   processes killed, networks cut, disks filled"
	@echo "make lint          ruff and mypy"
	@echo "make audit         compares the pinned versions with known advisories"
	@echo "make ray-head      a Ray head on this machine that takes jobs (make ray-stop ends it)"
	@echo "make clean         removes var/demo; the next demo starts from nothing"

install: $(ENVIRONMENT)

# The extra `dev` contains all others but `vllm`. torch is installed first, on its own, so that nothing else pulls a
# different build. open_clip goes to a folder of its own: transformers imports any torchvision that it finds, and one that
# is not built for this torch breaks it. Only tests of exported models use that folder.
$(ENVIRONMENT): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/open_clip open_clip_torch timm torchvision ftfy
	touch $@

demo: install
	$(VENV)/bin/python pipelines/demo.py --set serve=$(if $(filter 0,$(SERVE)),false,true) --set port=$(PORT)

# Unit tests start no Ray: they run in two processes and in a random order, whose seed pytest prints
# (pytest --randomly-seed=N repeats it). Each group runs whole, whatever became of the one before.
test: install
ifdef TESTS
	$(VENV)/bin/python -m pytest $(TESTS)
else
	status=0; \
	$(VENV)/bin/python -m pytest --durations=30 -n 2 --dist loadfile tests/unit || status=$$?; \
	$(VENV)/bin/python -m pytest --durations=30 -p no:randomly tests/system || status=$$?; \
	exit $$status
endif

test-faults: install
	$(VENV)/bin/python -m pytest --durations=30 -p no:randomly tests/faults

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Beside the environment: what audits it is no part of it. Strict, because a package that could not be looked up is no
# package without advisories.
audit: install
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.9.0
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# A Ray head on loopback for `ray job submit`, whose `python` is the one of this environment. Ray 2.60 asks every client
# for a token. Whoever reads it runs code, and Ray by itself writes it for all to read.
TOKEN := $(HOME)/.ray/auth_token

$(TOKEN): | install
	umask 077; $(VENV)/bin/ray get-auth-token --generate > /dev/null

ray-head: install $(TOKEN)
	PATH=$(abspath $(VENV))/bin:$$PATH RAY_AUTH_MODE=token \
		RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.middleware:before_serve \
		$(VENV)/bin/ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --num-cpus=$(RAY_CPUS) --disable-usage-stats

ray-stop: install
	$(VENV)/bin/ray stop

clean:
	rm -rf var/demo
