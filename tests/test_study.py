"""tools/study.py: the page, ranked by keyboard in headless Chromium, and its table, made by hand."""
import base64
import html
import json
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest

from lib.media.pictures import read_animation
from lib.run.files import UserError
from tools import study

METHODS = ["method-alpha", "gamma-ray", "zeta-net"]
NASTY = '<b>"x"</b> </script><!-- <script>\u2028 & \\'


def make_inputs():
    """Two inputs of random clips, the second with a given picture."""
    def clip(seed):
        frames = np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 4), np.uint8)
        frames[..., 3] = 255
        return frames
    clips = [{method: clip((k, m)) for m, method in enumerate(METHODS)} for k in (0, 1)]
    return [dict(caption=NASTY, given=[], clips=clips[0]), dict(caption="a star", given=[clip(9)[0]], clips=clips[1])]


def answer(key, participant, choose):
    """A participant's file; choose(input, criterion) -> methods, best first."""
    codes = [{method: code for code, method in x["codes"].items()} for x in key["inputs"]]
    answers = [{c: [code[m] for m in choose(i, c)] for c in key["criteria"]} for i, code in enumerate(codes)]
    return dict(study=key["study"], participant=participant, answers=answers)


@pytest.fixture
def key(tmp_path):
    """What the key says of a study that is written as tmp_path / "study.html"."""
    study.write_study(tmp_path / "study.html", make_inputs(), METHODS, seed=3)
    return json.loads((tmp_path / "study.key.json").read_text())


def results(folder, **files):
    """study_results of answers that are saved as NAME.json."""
    paths = [folder / f"{name}.json" for name in files]
    for path, value in zip(paths, files.values()):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return study.study_results(folder / "study.key.json", paths)


def test_page_is_blind_lossless_and_the_same_again(key, tmp_path):
    text, inputs = (tmp_path / "study.html").read_text("utf-8"), make_inputs()
    shown = json.loads(text.split('id="study">')[1].split("</script>")[0])
    assert not any(method in text for method in METHODS) and "http" not in text.replace("http-equiv", "")
    assert [x["caption"] for x in shown["inputs"]] == [x["caption"] for x in inputs] and shown["id"] == key["study"]
    for k, (x, secret) in enumerate(zip(shown["inputs"], key["inputs"])):
        assert sorted(secret["codes"].values()) == sorted(METHODS) and len(x["given"]) == k
        for s in x["stickers"]:
            frames, durations = read_animation(base64.b64decode(s["image"].split(",")[1]))
            assert (frames == inputs[k]["clips"][secret["codes"][s["code"]]]).all() and list(durations) == [125] * 4
    for seed in (3, 4):
        study.write_study(tmp_path / "again.html", make_inputs(), METHODS, seed=seed)
        assert ((tmp_path / "again.html").read_text("utf-8") == text) == (seed == 3)


def test_order_is_shuffled_evenly():
    codes = [study.blind(k, make_inputs()[0], METHODS, 0, 125)[1]["codes"] for k in range(60)]
    firsts = [next(iter(of_input.values())) for of_input in codes]
    assert all(10 <= firsts.count(method) <= 30 for method in METHODS)


@pytest.mark.parametrize("change, methods, culprit", [
    ({}, METHODS[:1], "2 to 26 methods"), ({}, METHODS[:1] * 2, "2 to 26 methods"),
    (dict(caption=" "), METHODS, "input 1 has no caption"), ({}, [*METHODS, "new"], "input 1, .* lacks a sticker")])
def test_study_that_cannot_be_ranked_is_refused(tmp_path, change, methods, culprit):
    with pytest.raises(UserError, match=culprit):
        study.write_study(tmp_path / "a.html", [{**make_inputs()[0], **change}], methods, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_page_of_two_runs(tiny_dfgn, stickers16, tmp_path, capsys):
    runs = [str(shutil.copytree(tiny_dfgn, tmp_path / name)) for name in ("first", "second")]
    options = ["--out", str(tmp_path / "study.html"), "--data", str(stickers16), "--groups", "star", "circle", "square",
               "triangle", "--n", "2", "--steps", "1", "--tasks", "t2v", "interpolation"]
    study.main(["page", *runs, *options])
    assert "study.html: 4 inputs, 2 methods" in capsys.readouterr().out
    shown = json.loads((tmp_path / "study.html").read_text("utf-8").split('id="study">')[1].split("</script>")[0])
    assert [(len(x["given"]), len(x["stickers"])) for x in shown["inputs"]] == [(0, 2), (0, 2), (4, 2), (4, 2)]
    with pytest.raises(UserError, match="2 to 26 methods"):
        study.main(["page", runs[0], *options])


def test_scores_by_hand_and_table_beside_the_paper(key, tmp_path, capsys):
    a, b, c = METHODS
    results(tmp_path, one=answer(key, "p1", lambda i, criterion: [a, b, c]),
            two=answer(key, "p2", lambda i, criterion: [c, a, b] if (i, criterion) == (1, "text") else [a, b, c]))
    files = [str(tmp_path / name) for name in ("one.json", "two.json", "study.key.json")]    # as study*.json finds them
    study.main(["results", *files, "--key", files[-1]])
    head, table, note = capsys.readouterr().out.strip().split("\n\n")
    assert "participants: 2, inputs: 2" in head and "best of 3 = 3" in head and "ours sums to 6" in note
    rows = table.splitlines()
    assert rows[0] == "| method | text | interest | motion | text, paper | interest, paper | motion, paper |"
    assert rows[2] == f"| {a} | 2.75 [2.00, 3.00] | 3.00 [3.00, 3.00] | 3.00 [3.00, 3.00] | - | - | - |"
    assert rows[4].startswith(f"| {c} | 1.50 [1.00, 3.00] |") and "| SimDA | - | - | - | 1.97 | 2.06 | 2.03 |" in rows


def test_interval_resamples_both_ways():
    rng = np.random.default_rng(0)
    for axis in (0, 1):                          # what differs between inputs alone, or participants alone
        x = np.broadcast_to(np.expand_dims(rng.normal(0, 1, 50), 1 - axis), (50, 50))
        low, high = study.two_way_bootstrap(x[..., None])
        assert (high - low).item() == pytest.approx(2 * 1.96 * x.std() / 50**0.5, rel=0.1)


@pytest.mark.parametrize("change, reason", [
    (lambda v: v.update(study="0123"), "answers to another study"),
    (lambda v: v.update(participant=None), "who the participant is"),
    (lambda v: v.update(participant="p0"), "participant p0 is in .*good.json already"),
    (lambda v: v["answers"].pop(), "does not answer text, interest, motion for each of the 2 inputs"),
    (lambda v: v["answers"][1].pop("motion"), "does not answer text, interest, motion for each"),
    (lambda v: v["answers"][1]["motion"].append("x"), "input 2, motion, does not rank each sticker exactly once"),
    (lambda v: v["answers"][1].update(motion=["x", {}, []]), "input 2, motion, does not rank each sticker"),
    (lambda v: v.pop("answers"), "not a JSON object with study")])
def test_bad_answers_are_refused_by_name(key, tmp_path, change, reason):
    good, bad = (answer(key, participant, lambda i, criterion: METHODS) for participant in ("p0", "p1"))
    change(bad)
    with pytest.raises(UserError, match=f"bad.json: .*{reason}"):
        results(tmp_path, good=good, bad=bad)


def test_files_that_are_no_answers_are_refused(key, tmp_path):
    with pytest.raises(UserError, match="results: no answers"):
        results(tmp_path)
    with pytest.raises(UserError, match="cut.json: cannot be read as JSON"):
        results(tmp_path, cut="{")


# ---- the page in a browser
SCRIPT = """
const seen = [], press = (...keys) => keys.forEach(key => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true})));
const look = () => seen.push([$("where").textContent, load()?.answers.length || 0]);
HTMLAnchorElement.prototype.click = function () {
  $("saved").remove();
  document.body.replaceChildren(JSON.stringify({seen, caption, wide, name: this.download, href: this.href}));
};
press("Enter");
const caption = $("caption").textContent, wide = document.documentElement.scrollWidth > innerWidth;
"""


def test_ranking_in_a_browser(key, tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no chromium, chromium-browser or google-chrome")
    page, (a, b, c) = tmp_path / "study.html", METHODS

    def press(i, *methods):
        letters = ["ABC"[list(key["inputs"][i]["codes"].values()).index(m)] for m in methods]
        return f"press({json.dumps(letters)[1:-1]}, 'Enter'); "
    script = SCRIPT + "press('Enter', 'ArrowRight', 'Z'); " + press(0, b, b, c) + "look(); "      # two are not enough
    script += "press('Backspace', 'Backspace'); " + press(0, a, b, c) + press(0, c, b, a) + "look(); "
    script += "press('ArrowLeft', 'Backspace', 'ArrowRight'); look(); " + press(0, a, c, b)       # that changed nothing
    script += "".join(press(1, *ranking) for ranking in ((a, b, c), (a, b, c), (b, a, c))) + "press('d');"
    page.write_text(page.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={tmp_path}/profile", "--window-size=360,900", "--dump-dom"]
    done = subprocess.run([program, *flags, page.as_uri()], capture_output=True, text=True, timeout=100)
    found = json.loads(html.unescape(done.stdout.split("<body>")[1].split("</body>")[0]))
    assert found["caption"] == NASTY and not found["wide"]
    assert found["seen"] == [["input 1 of 2, question 1 of 3", 0], *[["input 1 of 2, question 3 of 3", 2]] * 2]
    answers = urllib.parse.unquote(found["href"].split(",", 1)[1])
    assert found["name"] == f"study-{key['study']}-{json.loads(answers)['participant']}.json"
    scores = results(tmp_path, answers=answers)["scores"]
    assert [[scores[m][c]["value"] for c in key["criteria"]] for m in METHODS] == [[3, 2, 2.5], [2, 2, 2], [1, 2, 1.5]]
