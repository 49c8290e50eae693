"""How much stickers move: a generator that has learnt too little of motion draws stickers that hold still."""
import numpy as np


def movement(clips):
    """(N, T, S, S, 3) floats in 0..1 -> (N,): root of the mean squared change from a frame to the next, from the last
    to the first, as stickers loop. How much moves, not how: what a model has is to be compared with real clips'."""
    change = np.roll(clips, -1, 1) - clips
    return np.sqrt((change ** 2).mean((1, 2, 3, 4), dtype=np.float64))


class MovementExtractor:
    """Clips -> their movement."""
    name, key, width, batch = "movement", {}, 1, 64

    def describe(self, T, size):
        return "movement: root mean squared change of pixels from frame to frame, looped; as much as the real is best"

    def scores(self, features, **_):
        return {"movement": features[:, 0]}

    def __call__(self, clips):
        """uint8 (N, T, H, W, 3) on white -> (N, 1) float32."""
        return movement(clips.astype(np.float32) / 255)[:, None].astype(np.float32)
