"""data.py: masks, key frames, texts, sets and the one rule: a draw is a function of (seed, step, n)."""
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_media import BLUE, GREEN, RED, moving_square
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

import data
from data import TASKS
from lib.media.pictures import square, write_animation
from lib.run.draws import StepSampler
from lib.run.files import UserError


def plates(colours):
    return np.array(colours, np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)


# ---- masks
def text_of(mask):
    return "".join(str(int(v)) for v in mask)


@pytest.mark.parametrize("n, interpolation", [
    (8, {"10101010", "01010101", "10010010"}), (5, {"10101000", "01010000", "10010000"}),
    (3, {"10100000", "01000000", "10000000"}), (2, {"10000000"})])
def test_masks_are_those_of_the_paper(n, interpolation):
    """Over n real frames, padded to 8: one at least is given and one left to predict, padding is never given."""
    drawn = {t: [text_of(data.cond_mask(t, n, 8, u / 400)) for u in range(400)] for t in TASKS}
    one = {text_of(np.arange(8) == i) for i in range(n)}
    assert {task: set(masks) for task, masks in drawn.items()} == {
        "t2v": {"00000000"}, "i2v": one, "it2v": one, "interpolation": interpolation,
        "prediction_forward": {"1" * q + "0" * (8 - q) for q in range(1, n)},
        "prediction_backward": {"0" * (n - q) + "1" * q + "0" * (8 - n) for q in range(1, n)}}
    for task in TASKS:
        assert text_of(data.eval_mask(task, n, 8)) in drawn[task]     # evaluation uses a mask that training draws
        share = np.mean([mask[:n].count("0") / n for mask in drawn[task]])
        assert data.unknown_share(data.fit_task(task, n), n) == pytest.approx(share, abs=0.04)


def test_masks_of_evaluation_of_one_frame_and_of_padding():
    assert {t: text_of(data.eval_mask(t, 8, 8)) for t in TASKS} == {
        "t2v": "00000000", "i2v": "10000000", "it2v": "10000000", "interpolation": "10101010",
        "prediction_forward": "11111000", "prediction_backward": "00111111"}
    for task in TASKS:
        assert data.fit_task(task, 1) == "t2v" and data.fit_task(task, 3) == task
        mask = data.cond_mask(task, 1, 8, 0.5)
        assert mask.dtype == np.float32 and not mask.any() and not data.eval_mask(task, 1, 8).any()
    assert data.fit_task("interpolation", 2) == "prediction_forward" and data.fit_task("it2v", 2) == "it2v"
    with pytest.raises(UserError, match="guess"):
        data.fit_task("guess", 8)
    assert data.loss_mask(3, 5).tolist() == [1, 1, 1, 0, 0] and data.loss_mask(9, 4).tolist() == [1] * 4


# ---- key frames
def test_key_frames_are_the_first_of_each_scene_and_exactly_k():
    frames = plates([RED] * 4 + [GREEN] * 5 + [BLUE] * 3)
    frames[:, 0, 0, 0] += np.arange(12, dtype=np.uint8)              # no two frames alike
    x = data.features(frames)
    assert x.shape == (12, 16 * 16 * 6) and not x[-1].reshape(256, 6)[:, 3:].any()   # after the last there is no motion
    assert data.key_frames(x[:, np.arange(x.shape[1]) % 6 < 3], 3) == [0, 4, 9]
    table = data.key_table(frames)["keys"]
    assert list(table) == ["3", "4", "5", "6", "7", "8"]
    for k, keys in table.items():
        assert keys == sorted(set(keys)) and len(keys) == int(k) and keys[0] == 0 and keys[-1] < 12
        assert keys == data.key_frames(x, int(k))                     # fewer coordinates change no cluster
    for n in (2, 3, 5, 12):                                           # equal frames: filled up
        table = data.key_table(plates([RED] * n))["keys"]
        assert len(table) == min(n, 8) - 2
        assert all(len(set(keys)) == int(k) and keys == sorted(keys) and keys[-1] < n for k, keys in table.items())


def test_choose_frames():
    record = dict(n=20, keys={str(k): list(range(k)) for k in range(3, 9)})
    rngs = [data.rng_for(0, 0, i, 0) for i in range(300)]
    assert {tuple(data.choose_frames(record, r, 8)) for r in rngs} == {tuple(range(k)) for k in range(3, 9)}
    assert len({tuple(data.choose_frames(record, r, 8, k=1)) for r in rngs}) == 20             # one frame: any of them
    assert {len(data.choose_frames(record, r, 12, k=12)) for r in rngs} == {12}                # more than are stored
    even = np.array([data.choose_frames(record, r, 8, "even", 8) for r in rngs])
    assert set(np.diff(even).flat) == {2, 3} and even.max() < 20 and len(set(even[:, 0])) > 1
    mixed = [data.choose_frames(record, r, 8, "mixed") for r in rngs]
    assert 60 < sum(m[-1] == len(m) - 1 for m in mixed) < 240
    assert {len(data.choose_frames(dict(record, n=4), r, 8)) for r in rngs} == {3, 4}
    for n in (1, 2, 3):
        assert data.choose_frames(dict(n=n, keys={"3": [0, 1, 2]}), rngs[0], 8) == list(range(n))
    record["keyframe_idx"] = [9, 13]                                  # a manifest's
    for r in rngs:
        chosen = data.choose_frames(record, r, 8)
        assert {9, 13} <= set(chosen) and chosen == sorted(set(chosen)) and 3 <= len(chosen) <= 8
    record["keyframe_idx"] = list(range(1, 20, 2))
    assert {i for r in rngs for i in data.choose_frames(record, r, 8)} == set(range(1, 20, 2))


# ---- texts
def test_text_augmentation():
    record = dict(caption="a red cat", keywords=["pet", "sleepy cat"])
    for chances, text in (((0, 0), "a red cat"), ((1, 0), "# # #")):
        assert data.text_for(record, data.rng_for(0, 0, 0, 0), *chances) == text
    rngs = [data.rng_for(0, 0, i, 0) for i in range(2000)]
    texts = [data.text_for(record, rng) for rng in rngs]
    assert np.mean([t.split()[0] == "#" for t in texts]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([len(t.split()) > 3 for t in texts]) == pytest.approx(0.25, abs=0.03)
    texts = [data.text_for(dict(record, style="noto"), rng, 0, 0.8) for rng in rngs]
    whole, alone = "a red cat, pet, sleepy cat", ["pet", "sleepy cat", "pet, sleepy cat", "sleepy cat, pet"]
    wanted = "a red cat", whole, *(f"{t}, noto style" for t in alone)
    shares = [np.mean([t == text for t in texts]) for text in wanted]
    assert shares == pytest.approx([0.2, 0.4, 0.1, 0.1, 0.1, 0.1], abs=0.03)
    assert data.text_for(dict(caption="x", keywords=[]), rngs[0], 0, 1) == "x"
    tokens = data.tokenize(["clapping hands", "# hands", "word " * 200])
    assert tokens.shape == (3, 77) and tokens.dtype == torch.int64 and tokens[0, 4] == tokens[1, 3] == 49407   # the end


@pytest.fixture(scope="module")
def synthetic(stickers16):
    """A prepared set and latents for it."""
    n = data.StickerSet(stickers16).meta["frames"]
    return stickers16, np.random.default_rng(0).standard_normal((n, 2, 4, 4, 4)).astype(np.float16)


def clips(synthetic, split="train", **options):
    return data.ClipDataset(data.StickerSet(synthetic[0], split), synthetic[1], **{"seed": 3, "batch": 4, **options})


def test_sticker_texts(synthetic):
    stickers = data.StickerSet(synthetic[0])
    texts = data.StickerTexts(stickers, 3, 7, 0.5, 0.5)
    assert len(texts) == len(list(texts)) == 1 + 3 * 48 and texts[0] == ""
    assert [texts[1 + 3 * i] for i in range(48)] == [r["caption"] for r in stickers.records]
    assert texts[2 + 3 * 5] == data.text_for(stickers.records[5], data.rng_for(7, 5, 1, 5), 0.5, 0.5)
    dataset = clips(synthetic, split=None, texts=texts)
    items = [dataset[0, n, 8, 0] for n in range(40)]
    assert all((it["text_row"] - 1) // 3 == it["index"] for it in items)
    assert len({(it["text_row"] - 1) % 3 for it in items}) == 3 and "text_row" not in clips(synthetic)[0, 0, 8, 0]


# ---- sets and latents
def test_sticker_set_views(synthetic):
    everything = data.StickerSet(synthetic[0])
    parts = [data.StickerSet(synthetic[0], split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(everything) == 48 and set(parts[0].split) == {"train"}
    with pytest.raises(UserError, match="--groups start: .* has .*star"):
        data.StickerSet(synthetic[0], groups=["star", "start"])
    stars = data.StickerSet(synthetic[0], groups=["star"])
    assert 0 < len(stars) < 48 and all("star" in r["caption"] for r in stars.records)
    for stickers in everything, parts[0], stars:
        names = sorted({r["concept"] for r in stickers.records})
        assert stickers.concepts == names and sorted(np.concatenate(stickers.members)) == list(range(len(stickers)))
        for name, members in zip(names, stickers.members):
            assert {stickers.records[i]["concept"] for i in members} == {name}
        assert stickers.lengths.tolist() == [r["n"] for r in stickers.records]
        assert stickers.split.tolist() == [r["split"] for r in stickers.records]
        again = pickle.loads(pickle.dumps(stickers))
        assert list(again.records) == list(stickers.records) and len(pickle.dumps(stickers)) < 1000
    first = stars.records[5]["first"]
    assert np.array_equal(stars.clip(stars.records[5], [2, 0]), everything.frames[[first + 2, first]])


def test_latents_are_encoded_once_and_go_on_behind_whole_rows(synthetic):
    def moments(x):
        seen.append(len(x))
        return avg_pool2d(x, 4), torch.full((len(x), 4, 4, 4), 1e9)
    vae = SimpleNamespace(config=SimpleNamespace(factor=4, latent_channels=4), latent_mean=torch.zeros(4),
                          images=lambda x: x, moments=moments)
    stickers, seen = data.StickerSet(synthetic[0]), []
    file = data.latents_path(stickers, "a" * 64)
    latents, n = np.array(data.cache_latents(synthetic[0], vae, "a" * 64)), len(stickers.frames)
    assert latents.shape == (n, 2, 4, 4, 4) and latents.dtype == np.float16 and sum(seen) == n
    want = avg_pool2d(data.to_tensor(stickers.frames[:]), 4)
    assert np.allclose(latents[:, 0], want, atol=1e-3) and (latents[:, 1] == 65504).all()     # within float16
    part = file.rename(f"{file}.part")                                # as if killed within row 200
    os.truncate(part, 200 * latents[0].nbytes + 5)
    seen.clear()
    assert np.array_equal(data.cache_latents(synthetic[0], vae, "a" * 64), latents)
    assert sum(seen) == n - 192                                       # the batches are those of the first time


# ---- clips
def test_items(synthetic):
    dataset = clips(synthetic)
    mean, logvar = synthetic[1].astype(np.float32).swapaxes(0, 1)
    items = [dataset[0, n, 8, 0] for n in range(60)]
    for item in items:
        record, z, n = dataset.set.records[item["index"]], item["z"].numpy(), item["n"]
        assert z.shape == (8, 4, 4, 4) and z.dtype == np.float32 and not z[n:].any()
        assert item["loss_mask"].tolist() == [1] * n + [0] * (8 - n) and (n == 1) == (record["n"] == 1)
        frames = slice(record["first"], record["first"] + record["n"])
        near = np.abs(z[:n, None] - mean[frames]) < 6 * np.exp(logvar[frames] / 2)
        assert near.all((2, 3, 4)).any(1).all()                       # every latent is of this sticker
    assert {item["n"] for item in items} >= {1, 3, 8}
    still = next(i for i, n in enumerate(dataset.set.lengths) if n == 1)
    z = [it["z"][0].numpy() for it in (dataset[s, 1, 8, s] for s in range(1600)) if it["index"] == still]
    place = dataset.set.records[still]["first"]                       # the noise has the posterior's spread
    assert np.mean(((z - mean[place]) / np.exp(logvar[place] / 2)) ** 2) == pytest.approx(1, abs=0.12)


def test_steps_of_whole_clips_and_of_single_frames(synthetic):
    dataset = clips(synthetic, k="step")
    for s, n in np.ndindex(8, 4):
        whole, single = dataset[s, n, 5, s], dataset[s, n, 1, s]
        assert whole["n"] == min(5, dataset.set.lengths[whole["index"]]) >= 3 and len(whole["z"]) == 5
        assert single["n"] == len(single["z"]) == 1
    assert {dataset.set.lengths[dataset[s, 0, 1, s]["index"]] == 1 for s in range(20)} == {True, False}
    stickers = data.StickerSet(synthetic[0])
    stickers.lengths = np.ones_like(stickers.lengths)
    for latents, reason in ((synthetic[1][1:], "latents"), (synthetic[1], "3 frames or more; --lengths sample")):
        with pytest.raises(UserError, match=reason):
            data.ClipDataset(stickers, latents, 0, 4, k="step")


def test_wordless_stickers_are_drawn_as_clips_alone(synthetic):
    stickers = data.StickerSet(synthetic[0], "train")
    stickers.wordless = np.arange(len(stickers)) % 2 == 1
    drawn = {T: {int(n) for turn in range(30) for n in range(4) for n in
                 data.ClipDataset(stickers, synthetic[1], 0, 4).variants(turn, n, T)} for T in (1, 8)}
    assert drawn[1] == set(np.flatnonzero(~stickers.wordless).tolist())
    assert drawn[8] & set(np.flatnonzero(stickers.wordless).tolist())
    stickers.wordless[:] = True
    with pytest.raises(UserError, match="a varied set is trained on beside the one that it was made of"):
        data.ClipDataset(stickers, synthetic[1], 0, 4)


@pytest.mark.parametrize(("shortest", "k", "least"), [(None, "sample", 1), (2, "sample", 2), (8, "step", 8),
                                                      (8, "sample", 8), (None, "step", 3)])
def test_clips_come_from_stickers_of_enough_frames(synthetic, shortest, k, least):
    """Single frames of any."""
    stickers = data.StickerSet(synthetic[0])
    stickers.lengths = np.resize([1, 2, 3, 7, 8, 24], len(stickers))
    dataset = data.ClipDataset(stickers, synthetic[1], 0, 4, k=k, shortest=shortest)
    for T, wanted in ((8, {n for n in (1, 2, 3, 7, 8, 24) if n >= least}), (1, {1, 2, 3, 7, 8, 24})):
        drawn = [dataset.variants(turn, n, T) for turn in range(30) for n in range(4)]
        assert {int(n) for ids in drawn for n in stickers.lengths[ids]} == wanted


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in ("z", "noise", "draws", "tokens", "index"))


def test_draws_are_a_function_of_seed_step_and_n_and_an_epoch_visits_every_concept_once(synthetic):
    a, b, other = clips(synthetic), clips(synthetic), clips(synthetic, seed=4)
    keys = [(s, n, 8, s) for s in range(6) for n in range(4)]
    backwards = {key: b[key] for key in reversed(keys)}
    assert all(same(a[key], backwards[key]) for key in keys) and not all(same(a[key], other[key]) for key in keys)
    order = np.reshape([a.variants(g // 4, g % 4, 8)[0] for g in range(3 * len(a))], (3, -1))
    assert all(len(set(epoch)) == len(a) for epoch in order) and (order[0] != order[1]).any()


def test_an_epoch_is_whole_where_clips_and_stills_take_turns(synthetic):
    """Every concept comes once an epoch of each kind, however the kinds are mixed."""
    dataset, rng = clips(synthetic, k="step", batch=2, T=4), np.random.default_rng(0)
    kinds, seen = rng.random(200) < 0.7, {1: [], 4: []}
    for keys in StepSampler(2, 0, 200, plan=lambda step: (1, 4) if kinds[step] else (4, 1)):
        for _, n, T, turn in keys:
            seen[T].append(int(dataset.variants(turn, n, T)[0]))
    for T, pool in ((1, dataset.everything), (4, dataset.clips)):
        assert len(seen[T]) > 2 * len(pool)
        for epoch in (seen[T][:len(pool)], seen[T][len(pool):2 * len(pool)]):
            assert sorted(epoch) == sorted(int(ids[0]) for ids in pool)


def test_several_sets_are_one(synthetic, tmp_path):
    more = tmp_path / "more"
    data.main(["synthetic", "--n", "70", "--size", "16", "--out", str(more), "--workers", "1"])
    first, second = data.StickerSet(synthetic[0]), data.StickerSet(more)
    both = data.StickerSet([synthetic[0], more])
    assert len(both) == 118 and both.concepts == sorted({*first.concepts, *second.concepts})
    for i in (0, 47, 48, 117):
        part, k = (first, i) if i < 48 else (second, i - 48)
        assert dict(both.records[i], first=0) == dict(part.records[k], first=0)
        assert both.concepts[both.concept[i]] == part.concepts[part.concept[k]]
        assert np.array_equal(both.clip(both.records[i], [0]), part.clip(part.records[k], [0]))
    stars = data.StickerSet([synthetic[0], more], "train", ["star"])
    assert len(stars) == sum(len(data.StickerSet(s, "train", ["star"])) for s in (synthetic[0], more)) > 0
    assert {r["group"] for r in stars.records} == {"star"} and set(stars.split) == {"train"}
    assert both.meta["frames"] == len(both.frames) == len(first.frames) + len(second.frames)
    assert len({s.meta["hash"] for s in (first, second, both, data.StickerSet([more, synthetic[0]]))}) == 4
    latents = data.Chain([synthetic[1], np.zeros((len(second.frames), 2, 4, 4, 4), np.float16)])
    items = [data.ClipDataset(both, latents, 0, 4)[0, n, 8, 0] for n in range(60)]
    assert all(bool((it["z"] ** 2).sum((1, 2, 3))[0] > 40) == (it["index"] < 48) or it["index"] >= 48 for it in items)
    assert {it["index"] >= 48 for it in items} == {True, False}
    assert len(pickle.loads(pickle.dumps(stars))) == len(stars)
    data.main(["synthetic", "--n", "4", "--size", "8", "--out", str(tmp_path / "small"), "--workers", "1"])
    with pytest.raises(UserError, match="of 16, 8 px; prepare them with one --size"):
        data.StickerSet([synthetic[0], tmp_path / "small"])


def test_the_vocabulary_is_that_of_captions_and_keywords(synthetic):
    records = [dict(caption="a red cat", keywords=["pet"]), dict(caption="cat", keywords=[])]
    known = data.vocabulary(records)
    assert known == sorted(set(known)) and {0, 258, 49406, 49407} < set(known)
    want = set(data.tokenize(["a red cat, pet"])[0].tolist()) | {258}
    assert set(known) == want and not set(data.tokenize(["dog"])[0].tolist()) <= want


def test_variants_of_a_concept_take_turns(synthetic):
    stickers = data.StickerSet(synthetic[0])
    stickers.concept[stickers.lengths > 1] = stickers.concept.max() + 1
    stickers.members = data.Members(stickers.concept)
    dataset = data.ClipDataset(stickers, synthetic[1], 0, 1)
    drawn = (dataset[s, 0, 8, s]["index"] for s in range(30 * len(stickers.members)))
    twins = [i for i in drawn if stickers.lengths[i] > 1]
    assert len(twins) == 30 and len(set(twins)) > 12                  # once an epoch, not the same one


def test_neither_ranks_nor_workers_change_a_draw(synthetic):
    plan = lambda step: (1, 8) if step % 3 else (8, 1)                # every third step: clips; else 8 stills for each
    ranks = [list(StepSampler(4, 2, 7, rank, 2, plan)) for rank in range(2)]
    whole = list(StepSampler(4, 2, 7, plan=plan))
    assert [a + b for a, b in zip(*ranks)] == whole and whole[0] == [(2, n, 1, 1) for n in range(32)]
    assert len(whole) == 5 and whole[1] == [(3, n, 8, 1) for n in range(4)]      # behind one step of clips
    assert whole[2] == [(4, n, 1, 2) for n in range(32)]                         # behind two of stills
    with pytest.raises(UserError, match="batch 3"):
        StepSampler(3, world=2)
    loaders = [DataLoader(clips(synthetic), batch_sampler=whole, num_workers=w, collate_fn=list) for w in (0, 2)]
    assert all(same(a, b) for x, y in zip(*loaders) for a, b in zip(x, y))


# ---- command line
def test_captions_belong_to_the_source_of_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 5), "blue").save(tmp_path / "in/c.jpg")
    (tmp_path / "in/c.txt").write_text("A Blue Thing\n")
    argv = ["folder", str(tmp_path / "in"), "--size", "16", "--out", str(tmp_path / "set")]
    data.main(argv), data.main(argv)
    assert data.StickerSet(tmp_path / "set").records[0]["caption"] == "A Blue Thing"
    (tmp_path / "in/c.txt").write_text("another")
    with pytest.raises(UserError, match="remove it"):
        data.main(argv)


def test_vsd2m(tmp_path):
    frames = moving_square(40, (20, 100))
    write_animation(tmp_path / "a.webp", frames, 40)
    line = json.dumps(dict(visual_path="a.webp", keyframe_idx=[1, 17, 39], eng_cap=" A Cat ")) + "\n"
    (tmp_path / "m").write_text(2 * line + "a bad line beyond the limit\n")
    argv = ["vsd2m", str(tmp_path / "m"), "--root", str(tmp_path), "--size", "99", "--out", str(tmp_path / "set")]
    data.main([*argv, "--limit", "2"])
    stickers = data.StickerSet(tmp_path / "set")
    record = stickers.records[1]
    assert len(stickers) == 2 and record["caption"] == "A Cat" and record["n"] == 24
    assert np.array_equal(stickers.clip(record, record["keyframe_idx"]), square(frames[[1, 17, 39]], 99))
    for option in ("--size", "--workers", "--most-frames", "--limit"):
        with pytest.raises(UserError, match=f"{option} 0: must be at least 1"):
            data.main([*argv, option, "0"])
