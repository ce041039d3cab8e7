# Each target makes .venv and installs what it needs by itself. `make demo` first.
PY = .venv/bin/python

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: .venv/run
	$(PY) prepare_pile.py --source=python --tokenizer=byte --block_size=256 --val_fraction=0.05 --data_dir=data/python
	$(PY) train.py config/demo.py --overwrite

test: .venv/dev
	$(PY) -m pytest -n auto --dist worksteal

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/run
	$(PY) bench/overhead.py

.venv/run: requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	sh tests/browser.sh
	touch $@

clean:
	rm -rf .venv data out
