"""CLIP similarity of captions and frames by an open_clip model from a local file (Radford et al., 2021)."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.nets.towers import find_clip
from lib.nets.weights import read_weights
from lib.run.files import UserError, file_hash


class CLIPExtractor:
    """Clips -> unit image vectors of all T frames; captions -> unit text vectors.

    file: weights of the open_clip model `model_name`, or a folder that holds open_clip_config.json beside them."""
    name, batch = "clip", 4

    def __init__(self, file, model_name="ViT-H-14", T=8, device="cpu"):
        import open_clip
        self.file, self.T, self.device = file, T, device
        self.model = f"local-dir:{file}" if Path(file).is_dir() else model_name
        weights, _ = find_clip(file, model_name, "--clip")
        read_weights(weights, "--clip")          # refuses code
        try:
            self.net, _, self.prepare = open_clip.create_model_and_transforms(
                self.model, pretrained=None, load_weights=False, device="cpu")
            open_clip.load_checkpoint(self.net, str(weights), weights_only=True)
        except Exception as error:               # open_clip passes on whatever the reader of the file raises
            lines = [line.strip()[:160] for line in str(error).splitlines()[:4]]
            raise UserError(f"--clip {file}: not the weights of {self.model}: {' '.join(lines)}") from None
        self.net = self.net.eval().requires_grad_(False).to(device)
        self.tokenize = open_clip.get_tokenizer(self.model)
        self.dim = self.net.encode_text(self.tokenize(["a"]).to(device)).shape[1]
        self.width = T * self.dim
        config = Path(file) / "open_clip_config.json"
        self.key = dict(clip=file_hash(weights), model=self.model,
                        config=file_hash(config) if config.is_file() else None)

    def describe(self, T, size):
        model, sha256 = self.model.split(":")[0], self.key["clip"][:12]
        return f"CLIP: {model}, {self.file} (SHA-256 {sha256}); compare with no other model's"

    @torch.no_grad()
    def __call__(self, clips):
        """uint8 (N, T, H, W, 3) on white -> (N, T * dim) float32."""
        x = torch.stack([self.prepare(Image.fromarray(frame)) for clip in clips for frame in clip])
        vectors = self.net.encode_image(x.to(self.device), normalize=True)
        return vectors.float().cpu().numpy().reshape(len(clips), -1)

    def scores(self, vectors, captions, task, **_):
        """{metric: (N,)} of vectors (N, T * dim) and their captions."""
        text = self.texts(captions)
        return clip_scores(text, vectors.reshape(len(text), self.T, -1), first_given=task in ("i2v", "it2v"))

    @torch.no_grad()
    def texts(self, captions):
        """List of N captions -> (N, dim) float32."""
        return self.net.encode_text(self.tokenize(captions).to(self.device), normalize=True).float().cpu().numpy()


def clip_scores(text, frames, first_given=False):
    """Cosines of unit vectors, one a clip: text (N, E), frames (N, T, E) -> {name: (N,)}.

    CLIP: caption and frame, mean over frames. shuffled: with the next clip's caption, the level of chance. R@1: is the
    caption's clip the nearest of all N. consistency: neighbouring frames (1 for a frozen clip). image: the first frame,
    if it was given, and the others."""
    cosine = text @ frames.mean(1).T             # (N captions, N clips)
    scores = {"CLIP": cosine.diagonal().copy(),
              "CLIP shuffled": np.roll(cosine, -1, 0).diagonal().copy(),
              "CLIP R@1": recall(cosine),
              "CLIP consistency": (frames[:, 1:] * frames[:, :-1]).sum(-1).mean(1)}
    if first_given:
        scores["CLIP image"] = (frames[:, :1] * frames[:, 1:]).sum(-1).mean(1)
    return scores


def recall(similarity):
    """R@1 of captions n among clips (N, N) -> (N,): 0 if one is nearer than clip n, else 1 over the number as near."""
    margin = similarity - similarity.diagonal()[:, None]
    equal = np.abs(margin) < 1e-5                # a clip's vector depends in its last bits on the batch
    return np.where((margin >= 1e-5).any(1), 0, 1 / equal.sum(1))
