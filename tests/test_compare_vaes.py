"""tools/compare_vaes.py: the same held-out frames at two sizes, by two VAEs."""
import re

import numpy as np
import pytest
from PIL import Image

import data
from lib.media.pictures import to_tensor
from lib.nets.autoencoder import VAE, VAEConfig
from lib.nets.weights import save_model
from lib.run.files import UserError
from tools import compare_vaes

CONFIG = dict(image_channels=4, patch=4, widths=(8,), latent_channels=64, groups=4)    # as many numbers as pixels have


def test_the_smaller_pictures_are_enlarged_and_then_measured(tmp_path, capsys):
    sets, vaes = [tmp_path / "32", tmp_path / "16"], [tmp_path / "32.safetensors", tmp_path / "16.safetensors"]
    for folder, file in zip(sets, vaes, strict=True):
        data.main(["synthetic", "--n", "48", "--size", folder.name, "--out", str(folder), "--workers", "1"])
        stickers = data.StickerSet(folder)
        vae = VAE(VAEConfig(size=stickers.size, **CONFIG))
        vae.start_shortcut(to_tensor(stickers.frames[:64]))              # all components: every picture comes back
        save_model(file, vae.state_dict(), kind="vae", step=1,
                   config=dict(vae={**CONFIG, "size": stickers.size}))
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    compare_vaes.main(["--data", *map(str, sets), "--vae", *map(str, vaes), "--sheet", str(sheet)])
    head, _, own, real, enlarged = capsys.readouterr().out.splitlines()
    values = [float(re.search(r"\| (-?[\d.]+) \[", line)[1]) for line in (own, real, enlarged)]
    assert own.startswith("| 32 px by its VAE |") and own.endswith("| - |") and values[0] > 40
    assert enlarged.startswith("| 16 px by its VAE, enlarged |") and values[2] == pytest.approx(values[1], abs=0.1)
    minus = float(re.search(r"\| (-[\d.]+) \[[^|]*\|$", real)[1])
    assert minus == pytest.approx(values[1] - values[0], abs=0.011)

    large, small = (data.StickerSet(folder, "test") for folder in sets)
    numbers = compare_vaes.shared_frames(large, small)
    assert head.startswith(f"| {len(numbers)} held-out frames") and len(numbers) > 2
    by_hand = []
    for a, b in numbers:
        image = Image.fromarray(small.frames[b]).resize((32, 32), Image.Resampling.BICUBIC)
        pictures = [Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), x)
                    for x in (image, Image.fromarray(large.frames[a]))]
        x, y = (np.asarray(picture.convert("RGB")) / 255 for picture in pictures)
        by_hand.append(-10 * np.log10(((x - y) ** 2).mean()))
    assert values[1] == pytest.approx(np.mean(by_hand), abs=0.05)
    with Image.open(sheet) as picture:
        assert picture.size == (4 + 8 * 36, 4 + 4 * 50)
    with pytest.raises(UserError, match="--vae .*16.safetensors: of 16 px, and .*32 has 32"):
        compare_vaes.main(["--data", *map(str, sets), "--vae", str(vaes[1]), str(vaes[0])])
