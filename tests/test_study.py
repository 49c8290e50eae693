"""tools/study.py: the page, ranked by keyboard in headless Chromium, and its table, made by hand."""
import base64
import html
import json
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest

from lib.files import UserError
from lib.media import read_animation
from tools import study

METHODS = ["method-alpha", "gamma-ray", "zeta-net"]
NASTY = '<b>"x"</b> </script><!-- <script>\u2028 & \\'


def make_inputs(methods=METHODS, side=16):
    """Two inputs with moving squares, the second with a given picture."""
    def clip(seed):
        frames = np.zeros((4, side, side, 4), np.uint8)
        for t in range(4):
            frames[t, 2:10, 2 + t:10 + t] = [*np.random.default_rng(seed).integers(256, size=3), 255]
        return frames
    clips = [{method: clip((k, m)) for m, method in enumerate(methods)} for k in (0, 1)]
    return [dict(caption=NASTY, given=[], clips=clips[0]), dict(caption="a star", given=[clip(9)[0]], clips=clips[1])]


def answer(key, participant, choose):
    """A participant's file; choose(input, criterion) -> methods, best first."""
    codes = [{method: code for code, method in x["codes"].items()} for x in key["inputs"]]
    answers = [{c: [code[m] for m in choose(i, c)] for c in key["criteria"]} for i, code in enumerate(codes)]
    return dict(study=key["study"], participant=participant, answers=answers)


@pytest.fixture
def written(tmp_path):
    """-> page, key, and a function that saves answers as the file NAME.json."""
    study.write_study(tmp_path / "study.html", make_inputs(), METHODS, seed=3)

    def save(name, value):
        (tmp_path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / f"{name}.json"
    return tmp_path / "study.html", json.loads((tmp_path / "study.key.json").read_text()), save


def test_page_is_blind_lossless_and_the_same_again(written, tmp_path):
    text, key, inputs = written[0].read_text("utf-8"), written[1], make_inputs()
    shown = json.loads(text.split('id="study">')[1].split("</script>")[0])
    assert not any(method in text for method in METHODS) and "http" not in text.replace("http-equiv", "")
    assert [x["caption"] for x in shown["inputs"]] == [x["caption"] for x in inputs] and shown["id"] == key["study"]
    for k, (x, secret) in enumerate(zip(shown["inputs"], key["inputs"])):
        assert sorted(secret["codes"].values()) == sorted(METHODS) and len(x["given"]) == k
        for s in x["stickers"]:
            frames, durations = read_animation(base64.b64decode(s["image"].split(",")[1]))
            assert (frames == inputs[k]["clips"][secret["codes"][s["code"]]]).all() and list(durations) == [125] * 4
    for name, seed in (("again", 3), ("other", 4)):
        study.write_study(tmp_path / f"{name}.html", make_inputs(), METHODS, seed=seed)
        assert ((tmp_path / f"{name}.html").read_bytes() == written[0].read_bytes()) == (seed == 3)


def test_order_on_the_page_is_shuffled_evenly(tmp_path):
    study.write_study(tmp_path / "a.html", make_inputs()[:1] * 60, METHODS, seed=0)
    firsts = [next(iter(x["codes"].values())) for x in json.loads((tmp_path / "a.key.json").read_text())["inputs"]]
    assert all(10 <= firsts.count(method) <= 30 for method in METHODS)


@pytest.mark.parametrize("inputs, methods, culprit", [
    (make_inputs(), METHODS[:1], "2 to 26 methods"), (make_inputs(), METHODS[:1] * 2, "2 to 26 methods"),
    ([dict(make_inputs()[0], caption=" ")], METHODS, "input 1 has no caption"),
    (make_inputs(), [*METHODS, "new"], "input 1, .* lacks a sticker")])
def test_study_that_cannot_be_ranked_is_refused(tmp_path, inputs, methods, culprit):
    with pytest.raises(UserError, match=culprit):
        study.write_study(tmp_path / "a.html", inputs, methods, seed=0)
    assert not list(tmp_path.iterdir())


def test_scores_by_hand_and_table_beside_the_paper(written, tmp_path, capsys):
    _, key, save = written
    a, b, c = METHODS
    first = answer(key, "p1", lambda i, criterion: [a, b, c])
    second = answer(key, "p2", lambda i, criterion: [c, a, b] if criterion == "text" and i == 1 else [a, b, c])
    files = [str(save("one", first)), str(save("two", second))]
    study.main(["results", *files, "--key", str(tmp_path / "study.key.json")])
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
    (lambda v: v["answers"].pop(), "text, interest, motion for each of the 2 inputs"),
    (lambda v: v["answers"][1].pop("motion"), "does not answer text, interest, motion for each"),
    *((lambda v, c=c: v["answers"][1].update(motion=[*v["answers"][1]["motion"][:2], *c]),
       "input 2, motion, does not rank each sticker exactly once") for c in ([], ["x"], [{}]))])
def test_bad_answers_are_refused_by_name(written, tmp_path, change, reason):
    _, key, save = written
    good = answer(key, "p1", lambda i, c: METHODS)
    bad = json.loads(json.dumps(good))
    change(bad)
    key = tmp_path / "study.key.json"
    with pytest.raises(UserError, match=f"bad.json: .*{reason}"):
        study.study_results(key, [save("good", dict(good, participant="p0")), save("bad", bad)])
    for match, files in (("b.json: participant p1 is in .*a.json", [save("a", good), save("b", good)]),
                         ("cut.json: cannot be read as JSON", [save("cut", "{")]), ("no answers", []),
                         ("list.json: not a JSON object with study", [save("list", "[]")])):
        with pytest.raises(UserError, match=match):
            study.study_results(key, files)


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


def test_ranking_in_a_browser(written, tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no chromium, chromium-browser or google-chrome")
    (page, key, save), (a, b, c) = written, METHODS

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
    scores = study.study_results(tmp_path / "study.key.json", [save("answers", answers)])["scores"]
    assert [[scores[m][c]["value"] for c in key["criteria"]] for m in METHODS] == [[3, 2, 2.5], [2, 2, 2], [1, 2, 1.5]]
