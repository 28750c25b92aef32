# make          what there is to do
# make demo     set up, fetch, and run the whole main job (resumes where it stopped)
# make test     set up, fetch, and check everything; LOCKED=1 installs the versions of requirements-dev.lock, by their hashes
PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=
LOCKED ?=
BIN    := .venv/bin
STAMP  := .venv/installed
COMPONENTS = $(filter-out $(wildcard nbs/runners/*),$(wildcard nbs/*/*.ipynb)) nbs/index.ipynb
REFRESH := $(BIN)/python -c "import sys; from medvlm3d.front.kernels import refresh; refresh(*sys.argv[1:])"
# one thread a kernel and no GPU: stored outputs are the same whatever else the machine does
STEADY := OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= TOKENIZERS_PARALLELISM=false
RECIPE  = { pwd; $(BIN)/python --version; cat pyproject.toml $(if $(LOCKED),requirements-dev.lock); }

.DEFAULT_GOAL := help
.PHONY: help setup fetch demo test browser lint export lab notebooks readme docs lock sbom clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## .venv with the library and its development tools (only when pyproject.toml changed)
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "Python 3.11 to 3.14 is needed, and $(PYTHON) is another: make PYTHON=python3.12 ..."; exit 1; }; \
	  echo "setting up .venv"; $(PYTHON) -m venv .venv; }
	@git config filter.notebook.clean "python3 .ci/clean_notebook.py" 2>/dev/null || true
	@$(RECIPE) | cmp -s - $(STAMP) || { echo "installing (about three minutes the first time)"; \
	  $(if $(LOCKED),$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock &&) \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' && \
	  $(BIN)/python -c "import sysconfig; from medvlm3d.base.compat import write_startup; write_startup(sysconfig.get_path('purelib'))" && \
	  $(RECIPE) > $(STAMP); }

fetch: setup  ## embedded weights and volumes, verified by their SHA-256
	@$(BIN)/medvlm3d fetch

demo: setup  ## the main job: fetch, prepare, train, evaluate, report; ARGS="--llm smollm2" for a real LLM
	@$(BIN)/medvlm3d demo $(ARGS)
	@$(MAKE) --no-print-directory readme

test: fetch  ## everything CI checks: export, lint, notebooks, runners, command line
	@$(BIN)/ruff check --quiet medvlm3d tests
	@$(STEADY) $(BIN)/python -m pytest tests -q -n $(JOBS) --maxschedchunk 1 $(ARGS)

browser: fetch  ## the local page in a real Chromium (on Debian: apt-get install chromium); pictures in site-shots/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[browser]'
	@$(STEADY) $(BIN)/python -m pytest tests/browser_page.py -q $(ARGS)

lint: setup  ## ruff on the exported library and the tests
	@$(BIN)/ruff check medvlm3d tests

export: setup  ## clean the notebooks and write medvlm3d/ from them
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export

lab: fetch  ## JupyterLab on the notebooks; opening one changes nothing in git
	@JUPYTER_CONFIG_PATH=.ci $(BIN)/jupyter lab nbs

notebooks: fetch  ## execute every component notebook from a fresh kernel and store its outputs
	@printf '%s\n' $(COMPONENTS) | $(STEADY) xargs -P $(JOBS) -n 1 $(REFRESH)
	@$(BIN)/nbdev_clean

readme: setup  ## README.md from nbs/index.ipynb
	@$(STEADY) $(REFRESH) nbs/index.ipynb && $(BIN)/nbdev_clean --fname nbs/index.ipynb
	@$(BIN)/python -c "from medvlm3d.front.pages import write_readme; write_readme()"

docs: setup  ## the site, in site/; a dead link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

lock:  ## requirements-dev.lock: every package of the development environment with its hash (needs uv)
	@{ echo '# The development environment with the hash of each package: written by `make lock`, installed by `make setup LOCKED=1`.'; \
	  uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header --quiet; } > .lock.part \
	  && mv .lock.part requirements-dev.lock

sbom: setup  ## sbom.json: the parts list (CycloneDX) of what is installed
	@$(BIN)/python .ci/sbom.py > sbom.json

clean:  ## remove what is generated (.venv, fetched data and reports stay)
	@rm -rf build dist site _docs .pytest_cache .ruff_cache *.egg-info
	@find medvlm3d tests nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
