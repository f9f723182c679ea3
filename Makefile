PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: demo test

# The five stages at tiny scale on synthetic images, in a folder of their own.
demo: .venv/installed
	rm -rf runs/demo
	$(VENV) train.py --steps 800 --out runs/demo/dense.pt
	$(VENV) search.py --checkpoint runs/demo/dense.pt --crops 8 --out runs/demo/plan.json
	$(VENV) prune.py --checkpoint runs/demo/dense.pt --plan runs/demo/plan.json --steps 300 --out runs/demo/pruned.pt
	$(VENV) quantize.py --checkpoint runs/demo/pruned.pt --steps 100 --out runs/demo/quantized.pt
	$(VENV) evaluate.py runs/demo/dense.pt runs/demo/pruned.pt runs/demo/quantized.pt
	$(VENV) -m lic compare docs/coffee.png runs/demo/beside.png --checkpoint runs/demo/quantized.pt
	@echo "Look at runs/demo/beside.png: what a minute of synthetic images teaches a codec of this size."
	@echo "Next: what real training makes of it, .venv/bin/python -m lic compare docs/coffee.png beside.png"
	@echo "      how it works, in pictures: docs/tour.md; on your own photographs: README.md"

test: .venv/installed
	$(VENV) -m pytest tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
