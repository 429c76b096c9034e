# The verbs a person types. Every one of them is one call of `ddpm`; `make help` lists them.

DATASET ?= landscape-sample
BUCKET  ?= $(or $(DDPM_BUCKET),./bucket)
ON      ?= local
PYTHON  ?= python3

DDPM      = .venv/bin/ddpm
INSTALLED = .venv/.installed
TESTED    = .venv/.installed-test
RUN_NAME  = $(or $(RUN),$(subst _,-,$(subst .,-,$(DATASET))))
TRAIN     = train --dataset '$(DATASET)' --run '$(RUN_NAME)' --bucket '$(BUCKET)' $(if $(EPOCHS),--epochs $(EPOCHS)) \
            $(if $(SIZE),--set data.size=$(SIZE))

.PHONY: help setup submit-train train sample pack test lint bench clean

help: ## List the verbs and their variables
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo
	@echo "Variables: DATASET=landscape-sample|fashion-mnist|cifar10|celeba|landscape|… SOURCE=path-or-URI RUN=name"
	@echo "           BUCKET=./bucket|gs://name EPOCHS=n SIZE=pixels ON=local ARGS='--set train.batch_size=64'"

setup: $(INSTALLED) ## Install into .venv

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[gs,s3]'
	@touch $@

$(TESTED): $(INSTALLED)
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[gs,s3,test,lint]'
	@touch $@

submit-train: $(INSTALLED) ## Pack if needed, then train (or go on) where ON= says: the main job
	@$(DDPM) data ensure '$(DATASET)' --bucket '$(BUCKET)' $(if $(SIZE),--size $(SIZE)) $(if $(SOURCE),--source '$(SOURCE)')
	@$(DDPM) submit $(TRAIN) --on '$(ON)' $(ARGS)

train: $(INSTALLED) ## Train or go on in this process
	@$(DDPM) $(TRAIN) $(ARGS)

sample: $(INSTALLED) ## Draw images from RUN's newest checkpoint
	@$(DDPM) sample --run '$(RUN_NAME)' --bucket '$(BUCKET)' $(ARGS)

pack: $(INSTALLED) ## Pack SOURCE into DATASET
	@$(DDPM) data pack '$(or $(SOURCE),$(DATASET))' '$(DATASET)' --bucket '$(BUCKET)' $(if $(SIZE),--size $(SIZE)) $(ARGS)

test: $(TESTED) ## Install what the tests need and run them
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)

lint: $(TESTED) ## Style, docstrings and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(TESTED) ## Measure speed against peers on this machine
	.venv/bin/python -m benchmarks $(ARGS)

clean: ## Remove .venv; buckets and caches stay
	rm -rf .venv
