# make demo: train ATSS on the embedded shapes and show its detections.
# make test: run the tests. Both first set up the environment, once.
#
#   make test VENV=/somewhere/else      environment in another folder
#   make demo DEMO_FLAGS=--quick        options of tools/demo.py

VENV ?= .venv
PYTHON ?= python3
DEMO_FLAGS ?=
TEST_FLAGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.atss-setup

.PHONY: setup demo test lint clean help

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile
	@echo '  make setup | lint | clean           only the environment; ruff; remove outputs'

setup: $(STAMP)

# The stamp is written last: an interrupted set-up starts over, and pip skips what is installed.
$(STAMP): setup.py tools/install_detectron2.py tools/_install/patches.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(0 if v >= (3, 9) else \
	    "Python >= 3.9 is needed, %s is %d.%d: make PYTHON=..." % (sys.executable, v[0], v[1]))'
	@# pip, not Python, is looked for: an interrupted venv may have Python and no pip yet.
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools<81" wheel
	$(PY) -m pip install torch torchvision
	$(PY) -m pip install --no-build-isolation -e ".[dev]"
	@if ! $(PY) -c "import cv2" 2>/dev/null; then \
	    echo "opencv-python does not import here (libGL is missing): installing opencv-python-headless."; \
	    $(PY) -m pip uninstall --quiet --yes opencv-python && \
	    $(PY) -m pip install --quiet --force-reinstall --no-deps opencv-python-headless && \
	    $(PY) -c "import cv2"; \
	fi
	@# After cv2, because Detectron2 imports it. ninja builds Detectron2's operators in parallel.
	$(PY) -m pip install --quiet ninja
	$(PY) tools/install_detectron2.py
	$(PY) -c "import atss"
	touch $(STAMP)

demo: setup
	$(PY) tools/demo.py $(DEMO_FLAGS)

# Two processes with one thread each: there are many small tests.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --cov=atss --cov-report=term $(TEST_FLAGS)

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) output build *.egg-info projects/ATSS/*.egg-info
