PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: demo test

# The five stages at tiny scale on synthetic images.
demo: .venv/installed
	$(VENV) train.py
	$(VENV) search.py
	$(VENV) prune.py
	$(VENV) quantize.py
	$(VENV) evaluate.py

test: .venv/installed
	$(VENV) -m pytest tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
