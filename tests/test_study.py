"""The user study: its page, ranked by keyboard in headless Chromium, and its table, made by hand."""
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import numpy as np
import pytest

import data
import evaluate as study

METHODS = ["method-alpha", "gamma-ray", "zeta-net"]
NASTY = '<b>"x"</b> </script><!-- <script>\u2028 & \\'


def make_inputs(methods=METHODS, side=16):
    """Two inputs with moving squares, the second with a given picture."""
    def clip(seed):
        frames = np.zeros((4, side, side, 4), np.uint8)
        for t in range(4):
            frames[t, 2:10, 2 + t:10 + t] = [*np.random.default_rng(seed).integers(256, size=3), 255]
        return frames
    clips = lambda k: {method: clip((k, m)) for m, method in enumerate(methods)}
    return [dict(caption=NASTY, given=[], clips=clips(0)), dict(caption="a red star" * 20, given=[clip(9)[0]], clips=clips(1))]


def embedded(page):
    """The JSON in the page."""
    return json.loads(page.split('id="study">')[1].split("</script>")[0])


def answer(key, participant, choose):
    """A participant's file; choose(input, criterion) -> methods, best first."""
    code = lambda x, method: next(c for c, m in x["codes"].items() if m == method)
    answers = [{c: [code(x, m) for m in choose(i, c)] for c in key["criteria"]} for i, x in enumerate(key["inputs"])]
    return dict(study=key["study"], participant=participant, answers=answers)


@pytest.fixture
def written(tmp_path):
    """-> page, key, and a function that saves answers as the file NAME.json."""
    study.write_study(tmp_path / "study.html", make_inputs(), METHODS, seed=3)
    def save(name, value):
        (tmp_path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / f"{name}.json"
    return tmp_path / "study.html", tmp_path / "study.key.json", save


# ---- the page

def test_page_is_blind_whole_and_the_same_again(written, tmp_path):
    page, key = written[0].read_text("utf-8"), json.loads(written[1].read_text())
    shown = embedded(page)
    assert not any(method in page for method in METHODS) and "http" not in page.replace("http-equiv", "")
    assert [x["caption"] for x in shown["inputs"]] == [x["caption"] for x in key["inputs"]] == [x["caption"] for x in make_inputs()]
    assert [len(x["given"]) for x in shown["inputs"]] == [0, 1] and shown["id"] == key["study"]
    for x, secret in zip(shown["inputs"], key["inputs"]):
        assert [s["code"] for s in x["stickers"]] == list(secret["codes"]) and sorted(secret["codes"].values()) == sorted(METHODS)
    study.write_study(tmp_path / "again.html", make_inputs(), METHODS, seed=3)
    study.write_study(tmp_path / "other.html", make_inputs(), METHODS, seed=4)
    assert (tmp_path / "again.html").read_bytes() == written[0].read_bytes() != (tmp_path / "other.html").read_bytes()
    assert (tmp_path / "again.key.json").read_bytes() == written[1].read_bytes()


def test_stickers_come_back_to_the_last_bit(written):
    import base64
    key, inputs = json.loads(written[1].read_text()), make_inputs()
    for k, x in enumerate(embedded(written[0].read_text("utf-8"))["inputs"]):
        for s in x["stickers"]:
            frames, durations = data.read_animation(base64.b64decode(s["image"].split(",")[1]))
            assert (frames == inputs[k]["clips"][key["inputs"][k]["codes"][s["code"]]]).all() and durations == [125] * 4


def test_order_on_the_page_is_shuffled_evenly(tmp_path):
    inputs = make_inputs()[:1] * 60
    study.write_study(tmp_path / "a.html", inputs, METHODS, seed=0)
    firsts = [next(iter(x["codes"].values())) for x in json.loads((tmp_path / "a.key.json").read_text())["inputs"]]
    assert all(10 <= firsts.count(method) <= 30 for method in METHODS)
    assert len({c for x in json.loads((tmp_path / "a.key.json").read_text())["inputs"] for c in x["codes"]}) == 180


@pytest.mark.parametrize("inputs, methods, culprit", [
    (make_inputs(), METHODS[:1], "2 to 26 methods"), (make_inputs(), METHODS[:1] * 2, "2 to 26 methods"), ([], METHODS, "no input"),
    ([dict(make_inputs()[0], caption=" ")], METHODS, "input 1 has no caption"), (make_inputs(), [*METHODS, "new"], "input 1, .* lacks a sticker")])
def test_study_that_cannot_be_ranked_is_refused(tmp_path, inputs, methods, culprit):
    with pytest.raises(data.UserError, match=culprit):
        study.write_study(tmp_path / "a.html", inputs, methods, seed=0)
    assert not list(tmp_path.iterdir())


# ---- the table

def test_scores_by_hand(written):
    _, key, save = written
    a, b, c = METHODS
    first = answer(json.loads(key.read_text()), "p1", lambda i, criterion: [a, b, c])
    second = answer(json.loads(key.read_text()), "p2", lambda i, criterion: [c, a, b] if criterion == "text" and i == 1 else [a, b, c])
    results = study.study_results(key, [save("one", first), save("two", second)])
    assert (results["participants"], results["inputs"]) == (2, 2)
    value = lambda method, criterion: results["scores"][method][criterion]["value"]
    assert [value(m, "motion") for m in METHODS] == [3, 2, 1]
    assert [value(m, "text") for m in METHODS] == [(3 + 3 + 3 + 2) / 4, (2 + 2 + 2 + 1) / 4, (1 + 1 + 1 + 3) / 4]
    assert results["scores"][a]["motion"]["interval"] == pytest.approx((3, 3))
    low, high = results["scores"][c]["text"]["interval"]
    assert (low, high) == pytest.approx((1, 3))       # the one odd ranking, never drawn or always


def test_interval_resamples_both_ways():
    """Scores that differ between inputs alone, or between participants alone, are as uncertain as their mean over that axis."""
    rng = np.random.default_rng(0)
    for axis in (0, 1):
        x = np.broadcast_to(np.expand_dims(rng.normal(0, 1, 50), 1 - axis), (50, 50))
        low, high = study.two_way_bootstrap(x[..., None])
        assert (high - low).item() == pytest.approx(2 * 1.96 * x.std() / 50**0.5, rel=0.1)
    many = rng.normal(0, 1, (200, 15, 1, 1)) + rng.normal(0, 1, (200, 1, 20, 1)) + rng.normal(0, 1, (200, 15, 20, 1))
    inside = [low.item() < 0 < high.item() for low, high in (study.two_way_bootstrap(x, draws=300) for x in many)]
    assert 0.87 < np.mean(inside) < 0.99


def spoiled(value, name):
    value = json.loads(json.dumps(value))
    ranking = value["answers"][1]["motion"]
    if name == "other study":
        value["study"] = "0123"
    elif name == "nobody":
        value["participant"] = None
    elif name == "input missing":
        value["answers"].pop()
    elif name == "criterion missing":
        del value["answers"][1]["motion"]
    else:
        ranking[:] = {"twice": [ranking[0]] * 3, "short": ranking[:2], "unknown": [*ranking[:2], "x"], "no code": [*ranking[:2], {}]}[name]
    return value


@pytest.mark.parametrize("name, reason", [
    ("other study", "answers to another study"), ("nobody", "who the participant is"),
    ("input missing", "text, interest, motion for each of the 2 inputs"),
    ("criterion missing", "does not answer text, interest, motion for each"),
    *((name, "input 2, motion, does not rank each sticker exactly once") for name in ("twice", "short", "unknown", "no code"))])
def test_bad_answers_are_refused_by_name(written, name, reason):
    _, key, save = written
    good = answer(json.loads(key.read_text()), "p1", lambda i, c: METHODS)
    with pytest.raises(data.UserError, match=f"bad.json: .*{reason}"):
        study.study_results(key, [save("good", dict(good, participant="p0")), save("bad", spoiled(good, name))])


def test_other_bad_files_are_refused(written, tmp_path):
    _, key, save = written
    good = save("good", answer(json.loads(key.read_text()), "p1", lambda i, c: METHODS))
    def refused(match, key, files):
        with pytest.raises(data.UserError, match=match):
            study.study_results(key, files)
    refused("again.json: participant p1 is in .*good.json", key, [good, save("again", good.read_text())])
    refused("cut.json: cannot be read as JSON", key, [save("cut", good.read_text()[:40])])
    refused("list.json: not a JSON object with study, participant, answers", key, [save("list", "[]")])
    refused("nowhere.json: cannot be read", key, ["nowhere.json"])
    refused("good.json: not a JSON object with study, criteria", good, [good])
    refused("no answers", key, [])


def test_table_beside_the_paper(written, tmp_path):
    methods = ["RDTF", "ours"]
    study.write_study(tmp_path / "b.html", make_inputs(methods), methods, seed=0)
    key = tmp_path / "b.key.json"
    results = study.study_results(key, [written[2]("p", answer(json.loads(key.read_text()), "p", lambda i, c: methods))])
    said, table, note = study.study_table(results).split("\n\n")
    rows = table.splitlines()
    assert "participants: 1, inputs: 2" in said and "best of 2 = 2" in said and "ours sums to 3" in note and "8.0" in note
    assert rows[0] == "| method | text | interest | motion | text, paper | interest, paper | motion, paper |"
    assert rows[2] == "| RDTF | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] | 2.03 | 2.34 | 2.31 |"
    assert rows[3].startswith("| ours | 1.00 [1.00, 1.00] |") and rows[3].endswith("| - | - | - |")
    assert "| SimDA | - | - | - | 1.97 | 2.06 | 2.03 |" in rows and len(rows) == 7


def test_numbers_of_the_paper():
    rows = json.loads(study.PAPER.read_text())["table5_user_study"]["rows"]
    assert np.allclose(np.sum([list(row.values()) for row in rows.values()], axis=0), 8, atol=0.011)    # what the note says; motion: 7.99


# ---- the page in a browser

class Chromium:
    """Headless Chromium driven over a pipe: JSON messages, each ended by NUL, on its file descriptors 3 and 4."""
    KEYS = dict(Enter=13, Backspace=8, ArrowLeft=37, ArrowRight=39, Tab=9)

    def __init__(self, program, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs_in, theirs_out)]    # the numbers 3 and 4 stay free
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                 f"--user-data-dir={folder}"]
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([program, *flags, "about:blank"], **quiet, pass_fds=(3, 4),
                                        preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)))
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.ends, self.buffer, self.events, self.number, self.session = (ours_in, ours_out), b"", [], 0, None

    def __enter__(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(10)
        for end in self.ends:
            os.close(end)

    def receive(self, seconds=20):
        while b"\0" not in self.buffer:
            if not select.select([self.ends[0]], [], [], seconds)[0] or not (more := os.read(self.ends[0], 1 << 20)):
                raise RuntimeError("Chromium does not answer")
            self.buffer += more
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params, **(dict(sessionId=self.session) if self.session else {}))
        os.write(self.ends[1], json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def js(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=10):
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"in vain: {expression}"
            time.sleep(0.02)

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def press(self, *keys):
        for key in keys:
            code = self.KEYS.get(key) or ord(key.upper())
            text = {"Enter": "\r", "Backspace": ""}.get(key, key if len(key) == 1 else "")
            common = dict(key=key, code=key if len(key) > 1 else f"Key{key.upper()}", windowsVirtualKeyCode=code)
            self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
            self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector):
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{element}.scrollIntoView()")
        x, y = self.js(f"(box => [box.x + box.width / 2, box.y + 20])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def width(self, pixels, height=900):
        self.send("Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=False)

    def overflow(self):
        return self.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def complaints(self):
        """Console errors, exceptions, and requests that leave the machine."""
        errors = [e for e in self.events if e["method"] == "Runtime.exceptionThrown" or e["method"] == "Log.entryAdded"
                  or e["method"] == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "warning", "assert")]
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        assert any(u.startswith("data:image/webp") for u in urls), "no request was seen at all"
        return errors + [u for u in urls if not u.startswith(("file:", "data:", "about:"))]


@pytest.fixture
def chromium(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no chromium, chromium-browser or google-chrome")
    (tmp_path / "profile").mkdir()
    with Chromium(program, tmp_path / "profile") as browser:
        yield browser


WHERE = "document.getElementById('where').textContent"
HINT = "document.getElementById('hint').textContent"
SCREEN = "document.querySelector('section:not([hidden])').id"


def test_ranking_in_a_browser(written, chromium, tmp_path):
    page, key_path, _ = written
    key = json.loads(key_path.read_text())
    a, b, c = METHODS
    letter = lambda i, method: "ABC"[list(key["inputs"][i]["codes"].values()).index(method)]
    letters = lambda i, *methods: [letter(i, m) for m in methods]
    chromium.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got"))
    chromium.width(360)
    chromium.open(page.as_uri())
    assert chromium.js(SCREEN) == "start" and chromium.overflow() <= 0
    assert not any(method in chromium.js("document.documentElement.outerHTML") for method in METHODS)

    chromium.press("Enter")
    assert chromium.js(WHERE) == "input 1 of 2, question 1 of 3" and chromium.overflow() <= 0
    assert chromium.js("document.getElementById('caption').textContent") == NASTY and not chromium.js("document.querySelector('#caption *')")
    chromium.wait("!document.querySelector('.loading') && [...document.querySelectorAll('.sticker img')].every(i => i.naturalWidth === 16)")
    chromium.press("Enter", "ArrowRight", "ArrowLeft", "Z", *letters(0, b, b, c))    # only what can be done does something
    assert chromium.js(WHERE) == "input 1 of 2, question 1 of 3" and chromium.js(HINT).startswith(f"Ranked: {letter(0, b)}, {letter(0, c)}.")
    chromium.press("Backspace", "Backspace", *letters(0, a, b, c), "Enter")
    chromium.press(*letters(0, c, b, a), "Enter")
    assert chromium.js(WHERE) == "input 1 of 2, question 3 of 3"

    chromium.open("about:blank")
    chromium.open(page.as_uri())                      # goes on, and keeps what was answered
    assert chromium.js(WHERE) == "input 1 of 2, question 3 of 3" and chromium.js("document.getElementById('bar').value") == 2
    chromium.press("ArrowLeft")
    assert chromium.js(HINT).startswith("Ranked: " + ", ".join(letters(0, c, b, a)))
    chromium.press("Backspace", "ArrowRight")         # not confirmed: stays as it was
    assert chromium.js(WHERE) == "input 1 of 2, question 3 of 3"
    for method in (a, c, b):
        chromium.click(f".sticker:nth-child({list(key['inputs'][0]['codes'].values()).index(method) + 1})")
    chromium.click("#confirm")
    assert chromium.js(WHERE) == "input 2 of 2, question 1 of 3" and chromium.overflow() <= 0
    assert chromium.js("document.querySelectorAll('#given img').length") == 1
    for _ in range(3):
        chromium.press(*letters(1, a, b, c), "Enter")

    assert chromium.js(SCREEN) == "end" and chromium.overflow() <= 0
    chromium.press("ArrowLeft")
    assert chromium.js(WHERE) == "input 2 of 2, question 3 of 3"
    chromium.press("Backspace", "Backspace", "Backspace", *letters(1, b, a, c), "Enter", "d")
    end = time.monotonic() + 10
    while not (files := list((tmp_path / "got").glob("*.json"))):
        assert time.monotonic() < end
        time.sleep(0.02)
    participant = json.loads(files[0].read_text())["participant"]
    assert files[0].name == f"study-{key['study']}-{participant}.json" and len(participant) == 12

    scores = study.study_results(key_path, files)["scores"]
    assert [[scores[m][c]["value"] for c in key["criteria"]] for m in METHODS] == [[3, 2, 2.5], [2, 2, 2], [1, 2, 1.5]]
    assert not chromium.complaints()
    chromium.click("#another")
    assert chromium.js(SCREEN) == "start"
    chromium.press("Enter")
    assert chromium.js(WHERE) == "input 1 of 2, question 1 of 3" and chromium.js(HINT) == "Choose the best."
    assert chromium.js("state.participant") != participant
