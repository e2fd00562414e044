# Two commands need nothing installed but Python 3.10+ and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest whose schemas the manifests are checked against; its checker passes over kinds of other vendors.
KUBERNETES := 1.31

.PHONY: demo test check audit format schemas licences clean

demo: $(VENV)/installed-demo
	$(BIN)/python examples/demo.py --out demo

# Each file's tests in one process, and more than four processes would only share the memory's bandwidth.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: $(VENV)/installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict --config-file deploy/yamllint.yaml deploy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/standalone/compose.yaml deploy/service/compose.yaml
	$(BIN)/kubernetes-validate --quiet --strict --kubernetes-version $(KUBERNETES) deploy/kubernetes/*.yaml
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml delf_milvus

# Known weaknesses of what is installed. It asks the advisory service of PyPI, so that it is no part of `check`: what was
# published since yesterday is no fault of a change, and a machine without that service could pass none.
audit: $(VENV)/installed-check
	$(BIN)/pip-audit --skip-editable --progress-spinner off

format: $(VENV)/installed-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schemas: $(VENV)/installed-test
	$(BIN)/python -m delf_milvus.schemas schemas

$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

# Of all that users install, every extra included, in an environment of its own: some gigabytes to download.
USERS := $(shell sed -n '/^\[project.optional-dependencies\]/,/^\[project.scripts\]/s/^\([a-z0-9]*\) = \[.*/\1/p' pyproject.toml | grep -vx -e test -e check | paste -sd,)

licences:
	$(PYTHON) -m venv --clear build/licences
	build/licences/bin/python -m pip install --quiet '.[$(USERS)]' pip-licenses
	{ \
	  printf '# Licences of what is installed\n\n'; \
	  printf 'What `pip install "delf-milvus[%s]"` brings on Linux x86-64, as each package says itself; ' '$(USERS)'; \
	  printf 'written by `make licences`. The bundled model: [NOTICE](../NOTICE).\n\n'; \
	  build/licences/bin/pip-licenses --from=mixed --format=markdown --no-version --with-urls --ignore-packages delf-milvus \
	    | sed -E 's/ +\|/ |/g; s/-{3,}/---/g'; \
	} > schemas/licences.md

clean:
	rm -rf $(VENV) demo build dist
