"""tools/report.py: a page with all parts of a run, safe with any name, shown and moving in headless Chromium."""
import html
import json
import shutil

import numpy as np
import pytest

import evaluate
from lib.media.pictures import write_animation
from lib.run.files import UserError
from tools import report

NASTY = 'a"><img src=q onerror=alert(1)>&amp;'


@pytest.fixture(scope="module")
def run(tiny_dfgn, stickers16, tmp_path_factory):
    """An evaluated run with two stickers."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(tiny_dfgn, folder)
    evaluate.main(["--run", str(folder), "--data", str(stickers16), "--n", "2", "--steps", "2", "--groups", "star",
                   "circle", "square", "triangle", "--tasks", "t2v", "interpolation"])
    (folder / "stickers").mkdir()
    for name in ("red-heart", NASTY.replace("/", "")):
        frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 4), np.uint8)
        write_animation(folder / f"stickers/{name}.webp", frames, 125)
    return folder


def test_all_parts_are_on_the_page_and_nothing_is_fetched(run, capsys, monkeypatch):
    def sampled(*_, **__):
        pytest.fail("clips were sampled again")
    monkeypatch.setattr(evaluate.Sampler, "sample", sampled)             # they come from evaluate.py's cache
    report.main([str(run), "--clips", "1"])
    text = (run / "report.html").read_text("utf-8")
    assert "report.html:" in capsys.readouterr().out and "red heart</figcaption>" in text
    assert NASTY not in text and "<img src=q" not in text and html.escape(NASTY) in text
    body = text.replace("http://www.w3.org", "")                         # names in SVG, which nobody fetches
    assert "http:" not in body.replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "https:" not in body.replace("https://matplotlib.org", "") and "<script" not in text
    assert text.count('class="frame given"') == 4 and text.count('class="frame"') == 8 + 8 + 4 + 8
    assert text.count("<svg") == 4 and "<th>FD-app</th>" in text and "7 of 7 steps" in text
    value = json.loads((run / "eval.json").read_text())["tasks"]["t2v"]["fd"]["model"]["FD-app"]["value"]
    assert f"<td>{value:.2f} [" in text


def test_what_is_missing_is_said_and_other_folders_are_refused(tiny_vae, tmp_path):
    report.main([str(tiny_vae), "--out", str(tmp_path / "vae.html")])
    text = (tmp_path / "vae.html").read_text("utf-8")
    assert "No stickers yet" in text and "Not evaluated" in text and text.count("<svg") == 1
    with pytest.raises(UserError, match="no run folder of train.py"):
        report.main([str(tmp_path)])


PROBE = """<script>
const errors = []; addEventListener("error", e => errors.push(String(e.message || e.target.src)), true);
addEventListener("load", async () => {
  const counts = [];
  for (const image of document.querySelectorAll("img.sticker")) {
    const data = Uint8Array.from(atob(image.src.split(",")[1]), c => c.charCodeAt(0));
    const decoder = new ImageDecoder({data, type: "image/webp"});
    await decoder.tracks.ready;
    counts.push(decoder.tracks.selectedTrack.frameCount);
  }
  const root = document.documentElement, broken = [...document.images].filter(image => !image.naturalWidth).length;
  const found = {errors, counts, broken, wide: root.scrollWidth, inner: innerWidth};
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
});
</script>"""


def test_in_a_browser(run, tmp_path, in_browser):
    page = tmp_path / "page.html"
    report.main([str(run), "--clips", "1", "--out", str(page)])
    found = in_browser(page.read_text("utf-8").replace("<head>", f"<head>{PROBE}").encode(), width=400)
    assert found["errors"] == [] and found["broken"] == 0
    assert len(found["counts"]) == 2 * 2 + 2 * 2 and min(found["counts"]) > 1 and found["counts"][:4] == [4] * 4
    assert found["wide"] <= found["inner"]
