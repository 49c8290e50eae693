"""lib/metrics/movement.py: how much clips move, by hand."""
import numpy as np
import pytest

from lib.metrics.movement import MovementExtractor, movement


def test_movement_by_hand():
    clips = np.zeros((2, 4, 2, 2, 3), np.float32)
    clips[1, 1], clips[1, 2] = 0.6, 0.6          # there and back: two of four changes, the last to the first among them
    assert movement(clips).tolist() == pytest.approx([0, np.sqrt(2 * 0.36 / 4)])
    clips[1, 3] = 0.6                            # the way back is where the loop closes
    assert movement(clips)[1] == pytest.approx(np.sqrt(2 * 0.36 / 4))
    clips[1] += np.linspace(0, 0.3, 12).reshape(2, 2, 3)      # what does not change does not count
    assert movement(clips)[1] == pytest.approx(np.sqrt(2 * 0.36 / 4))


def test_the_extractor_takes_bytes():
    clips = np.random.default_rng(0).integers(0, 256, (3, 8, 4, 4, 3)).astype(np.uint8)
    extractor = MovementExtractor()
    features = extractor(clips)
    assert features.shape == (3, 1) and features.dtype == np.float32
    assert extractor.scores(features)["movement"].tolist() == pytest.approx(movement(clips / 255).tolist())
    assert movement(clips / 255).min() > 0.1     # bytes that wrap around have another
