# Each target sets up its environment first; that takes no time when nothing changed.
PYTHON ?= python3
VENV := .venv/bin
DATA ?= ../shared/data

.PHONY: setup demo test bench docs lab notebooks readme clean

setup:
	@$(PYTHON) tools/set_up.py

demo: setup            ## the main job on the phantom cohort; ends in demo/run/report.html
	$(VENV)/brainmets demo --out demo

test: setup            ## notebooks and tests
	$(VENV)/python -m pytest -n 2 --dist worksteal

bench: setup           ## timings, as ratios against a reference in the same run
	$(VENV)/python tests/bench/run.py

lab: setup             ## JupyterLab on the notebooks
	$(VENV)/jupyter lab nbs

docs: setup            ## the site (needs Quarto)
	$(VENV)/nbdev-docs

notebooks: setup       ## run all notebooks, store fresh outputs, export, clean
	$(VENV)/python tools/refresh_notebooks.py

readme: setup          ## README.md from nbs/index.ipynb
	$(VENV)/python tools/make_readme.py

clean:
	rm -rf demo bench-results _proc _docs
