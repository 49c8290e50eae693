"""lib/animation.py: files of every colour type, depth, disposal and blend as browsers show them, and broken ones.

Of tests/cases those that begin with r are random: written byte by byte, their frames composed pixel by pixel by another
program and equal to Chromium's."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.files import UserError
from lib.media import read_animation

CASES = Path(__file__).with_name("cases")
EXPECTED = json.loads((CASES / "expected.json").read_text())


def seen(x):
    """Frames without the colours that lie under alpha 0."""
    return x * (x[..., 3:] > 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_known_files(name):
    facts, (frames, durations) = EXPECTED[name], read_animation(CASES / name)
    wanted = np.asarray(Image.open((CASES / name).with_suffix(".expected.png")).convert("RGBA"))
    wanted = wanted.reshape(facts["frames"], facts["height"], facts["width"], 4)
    assert np.array_equal(seen(frames), seen(wanted)) and durations == [ms or 100 for ms in facts["ms"]]


def test_a_photograph_is_one_upright_still():
    for name, size in (("mpo_preview.jpg", (32, 48)), ("mpo_stripped.jpg", (32, 48)), ("exif6.jpg", (48, 32))):
        frames, durations = read_animation(CASES / name)
        assert frames.shape == (1, *size, 4) and durations == [100]
    assert frames[0, 2, 2, 2] > 200                              # turned, so that blue is at the top left


def test_what_is_cut_off():
    """A missing trailer is no harm; a picture that is cut off, or changed bytes of a PNG, are refused."""
    for name, trailer in (("r11_random.gif", 1), ("r6_rgba8_fallback.png", 12)):
        content = (CASES / name).read_bytes()
        assert np.array_equal(read_animation(content[:-trailer])[0], read_animation(content)[0])
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_animation(content[:-trailer - 20])
    with pytest.raises(UserError, match="chunk b'fdAT' is cut off or damaged"):
        read_animation(content[:-trailer - 10] + b"?" + content[-trailer - 9:])
