# The verbs a person types. Every one of them is one call of `ddpm`; `make help` lists them.

DATASET ?= landscape-sample
ON      ?= local
PYTHON  ?= python3

# What a person types is text: make does not expand it, and no shell sees it without quotes. ARGS are words.
define newline


endef
literal = $(subst $(newline), ,$(value $(1)))
$(foreach name,DATASET SOURCE RUN BUCKET EPOCHS SIZE ON TARGETS ARGS,$(eval override $(name) := $$(call literal,$(name))))
quoted = '$(subst ','\'',$(1))'
each_quoted = $(foreach word,$(1),$(call quoted,$(word)))

DDPM      = .venv/bin/ddpm
INSTALLED = .venv/.installed
TESTED    = .venv/.installed-test
RUN_NAME  = $(or $(RUN),$(subst _,-,$(subst .,-,$(DATASET))))
# Without BUCKET= it is the target's, else that of DDPM_BUCKET, else ./bucket, as for `ddpm` itself.
IN_BUCKET = $(if $(BUCKET),--bucket $(call quoted,$(BUCKET)))
PLACE     = --on $(call quoted,$(ON)) $(if $(TARGETS),--targets $(call quoted,$(TARGETS)))
TRAIN     = train --dataset $(call quoted,$(DATASET)) --run $(call quoted,$(RUN_NAME)) $(IN_BUCKET) \
            $(if $(EPOCHS),--epochs $(call quoted,$(EPOCHS))) $(if $(SIZE),--set $(call quoted,data.size=$(SIZE)))
SAMPLE    = sample --run $(call quoted,$(RUN_NAME)) $(IN_BUCKET)
PACKING   = $(IN_BUCKET) $(if $(SIZE),--size $(call quoted,$(SIZE)))
PACK      = $(call quoted,$(or $(SOURCE),$(DATASET))) $(call quoted,$(DATASET)) $(PACKING)

.PHONY: help setup submit-train submit-sample submit-pack train sample pack test lint bench crash-test clean

help: ## List the verbs and their variables
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo
	@echo "Variables: DATASET=landscape-sample|fashion-mnist|cifar10|celeba|landscape|… SOURCE=path-or-URI RUN=name"
	@echo "           BUCKET=./bucket|gs://name EPOCHS=n SIZE=pixels ARGS='--set train.batch_size=64'"
	@echo "           ON=local|container|name-of-a-target TARGETS=targets.yaml"

setup: $(INSTALLED) ## Install into .venv

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[gs,s3]'
	@touch $@

$(TESTED): $(INSTALLED)
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[gs,s3,kubernetes,google,test,lint]'
	@touch $@

submit-train: $(INSTALLED) ## Pack if needed, then train (or go on) where ON= says: the main job
	@$(if $(filter --dry-run,$(ARGS)),:,$(DDPM) data ensure $(call quoted,$(DATASET)) $(PACKING) $(PLACE) $(if $(SOURCE),--source $(call quoted,$(SOURCE))))
	@$(DDPM) submit $(TRAIN) $(PLACE) $(call each_quoted,$(ARGS))

submit-sample: $(INSTALLED) ## Draw images of RUN where ON= says
	@$(DDPM) submit $(SAMPLE) $(PLACE) $(call each_quoted,$(ARGS))

submit-pack: $(INSTALLED) ## Pack SOURCE (elsewhere a URI) into DATASET where ON= says
	@$(DDPM) submit pack $(PACK) $(PLACE) $(call each_quoted,$(ARGS))

train: $(INSTALLED) ## Train or go on in this process
	@$(DDPM) $(TRAIN) $(call each_quoted,$(ARGS))

sample: $(INSTALLED) ## Draw images from RUN's newest checkpoint
	@$(DDPM) $(SAMPLE) $(call each_quoted,$(ARGS))

pack: $(INSTALLED) ## Pack SOURCE into DATASET
	@$(DDPM) data pack $(PACK) $(call each_quoted,$(ARGS))

test: $(TESTED) ## Install what the tests need and run them
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)

lint: $(TESTED) ## Style, docstrings and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(TESTED) ## Measure speed against peers on this machine
	.venv/bin/python -m benchmarks $(ARGS)

crash-test: $(TESTED) ## Kill a run at every point of its protocols, then at random: ARGS='--kills 100 --bucket gs'
	.venv/bin/python -m benchmarks.crash_campaign $(call each_quoted,$(ARGS))

clean: ## Remove .venv; buckets and caches stay
	rm -rf .venv
