# Needs Python 3.11 or newer as `python3` (or PYTHON=...), and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lab book release clean
help:
	@echo 'make demo      train on the embedded world, write report/index.html'
	@echo 'make test      everything that CI runs'
	@echo 'make lab       JupyterLab on nbs/'
	@echo 'make book      the book, in _book/_build/html/index.html'
	@echo 'make release   check, build and tag the version in settings.ini; uploads nothing'

.venv/installed: constraints.txt settings.ini setup.py
	PYTHON='$(PYTHON)' bash tools/install.sh

demo: .venv/installed
	$(BIN)/reidlit demo --out report

test: .venv/installed
	bash tools/check.sh

lab: .venv/installed
	PYTHONWARNINGS=ignore::FutureWarning $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs

book: .venv/installed
	bash tools/book.sh

release: .venv/installed
	bash tools/release.sh

clean:
	rm -rf .venv .wheel .wheel312 _book report dist build
