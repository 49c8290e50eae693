"""lib/metrics/clip.py: vectors by a local open_clip model, scores by hand. Files that are refused: test_weights.py."""
import numpy as np
import pytest
import torch
from PIL import Image

from lib.metrics.clip import CLIPExtractor, clip_scores, recall
from lib.run.files import UserError, file_hash


def test_vectors_are_open_clips(clip_folder):
    import open_clip
    extractor = CLIPExtractor(str(clip_folder), T=3)
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    rows, texts = extractor(clips), extractor.texts(["a red star", "a frog"])
    assert rows.shape == (2, extractor.width) == (2, 3 * 32) and texts.shape == (2, extractor.dim) == (2, 32)
    for vectors in (rows.reshape(2, 3, 32), texts):
        assert np.allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    net, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}", weights_only=True)
    expected = net.eval().encode_image(prepare(Image.fromarray(clips[1, 2]))[None], normalize=True)[0]
    assert np.allclose(rows[1, 64:], expected.detach(), atol=1e-5)
    assert file_hash(clip_folder / "open_clip_pytorch_model.bin")[:12] in extractor.describe(3, 16)


def test_other_weights_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="(?s)--clip .*other.pt: not the weights of ViT-B-32.*Missing key"):
        CLIPExtractor(str(tmp_path / "other.pt"), "ViT-B-32")


def test_scores_by_hand():
    text = np.eye(4)[:3]                         # right and still; half right; another's
    frames = np.stack([np.eye(4)[[0, 0]], np.eye(4)[[1, 3]], np.eye(4)[[0, 0]]])
    scores = clip_scores(text, frames, first_given=True)
    assert scores["CLIP"].tolist() == [1, 0.5, 0] and scores["CLIP shuffled"].tolist() == [0, 0, 1]
    assert scores["CLIP R@1"].tolist() == [0.5, 1, 1 / 3]
    assert scores["CLIP consistency"].tolist() == scores["CLIP image"].tolist() == [1, 0, 1]
    assert "CLIP image" not in clip_scores(text, frames)


def test_recall_shares_ties():
    assert recall(np.array([[3, 1, 0], [2, 2, 2], [0, 5, 4]])).tolist() == [1, 1 / 3, 0]
    assert recall(np.ones((4, 4)) + 1e-8 * np.arange(4)).tolist() == [0.25] * 4     # rounding is no rank
