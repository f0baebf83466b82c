# `make demo` runs the whole pipeline on this machine, `make test` tests it. Both create the environment first.

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
	@echo "make demo          run the whole pipeline, then serve a search page (SERVE=0: do not serve; PORT=8000)"
	@echo "make test          run all tests except fault injection (TESTS='tests/unit -k stretch': only those)"
	@echo "make test-faults   run the fault tests: killed processes, network partitions, full disks"
	@echo "make lint          run ruff and mypy"
	@echo "make audit         compare the pinned versions with known advisories"
	@echo "make ray-head      start a Ray head on this machine for job submission (make ray-stop stops it)"
	@echo "make clean         remove var/demo; the next demo starts from scratch"

install: $(ENVIRONMENT)

# The extra `dev` contains all others but `vllm`. torch is installed first, on its own, so that nothing else pulls a
# different build. open_clip goes to a separate folder: transformers imports any torchvision that it finds, and fails
# with one that is not built for this torch. Only tests of exported models use that folder.
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

# Files are shared among two processes, because most tests wait for Ray more than they compute. Unit tests start no Ray
# and run in random order; pytest prints the seed (pytest --randomly-seed=N repeats it). The system tests run even if
# unit tests fail.
PYTEST := $(VENV)/bin/python -m pytest --durations=30 -n 2 --dist loadfile

test: install
ifdef TESTS
	$(VENV)/bin/python -m pytest $(TESTS)
else
	status=0; \
	$(PYTEST) tests/unit || status=$$?; \
	$(PYTEST) -p no:randomly tests/system || status=$$?; \
	exit $$status
endif

test-faults: install
	$(PYTEST) -p no:randomly tests/faults

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The auditor has its own environment. Strict, because a package that cannot be looked up may have advisories.
audit: install
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.9.0
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# A Ray head on loopback for `ray job submit`; jobs run with the Python of this environment. Ray 2.60 requires a token
# from every client. Anyone who has it can run code, and Ray creates the file readable for everyone, hence the umask.
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
