# Each target makes .venv and installs what it needs by itself. `make demo` first.
PY = .venv/bin/python

.PHONY: demo test lint bench experiments-quick clean
.DELETE_ON_ERROR:

demo: .venv/run
	$(PY) prepare_pile.py --source=python --tokenizer=byte --block_size=256 --val_fraction=0.05 --data_dir=data/python
	$(PY) train.py configs/demo.py --overwrite

test: .venv/dev
	$(PY) -m pytest -n auto --dist worksteal

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/run
	$(PY) bench/overhead.py

# each of them tiny, on the text of this installation: whether they still work, not what they find
experiments-quick: .venv/experiments
	$(PY) experiments/any_model.py
	set -e; for name in counterfactual curation finetune stages domains paraphrase mislabeled; do $(PY) experiments/$$name.py --quick; done

.venv/run: requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	sh tests/browser.sh
	touch $@

.venv/experiments: requirements-experiments.txt .venv/dev
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-experiments.txt
	touch $@

clean:
	rm -rf .venv data out
