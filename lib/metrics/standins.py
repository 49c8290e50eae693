"""FD-app and FD-mot: Fréchet distances on a fixed random network, for where I3D's weights are not at hand.

They order the sets of one table, and are comparable with no published number."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.metrics.distances import fd, to_signed

SEED = 1                                         # of the first seeds, it has the fewest nearly silent channels
APPEARANCE, MOTION = 128, 256                    # features
TIMESTEPS = 100, 300, 500, 700, 900, 999         # of errors in one step, of 1,000; the last is pure noise


class RandomFeatures(nn.Module):
    """A fixed random convolutional network a frame; what its maps hold is appearance, how they change is motion.

    Weights are normal, half of the first kernels' spatial mean removed (or brightness would drown edges), every filter
    rescaled to the standard deviation sqrt(2 / fan_in) that keeps ReLU maps of equal size."""

    def __init__(self, seed=SEED):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.convs = nn.ModuleList(nn.Conv2d(cin, cout, k, stride=2, padding=k // 2, bias=False)
                                   for cin, cout, k in ((3, 32, 5), (32, 48, 3), (48, 64, 3)))
        for i, conv in enumerate(self.convs):
            w = rng.standard_normal(conv.weight.shape)
            if i == 0:
                w -= 0.5 * w.mean((2, 3), keepdims=True)
            w *= np.sqrt(2 / w[0].size) / w.std((1, 2, 3), keepdims=True)
            conv.weight = nn.Parameter(torch.from_numpy(w).float(), requires_grad=False)

    def maps(self, clips):
        """(N, T, 3, H, W) in [-1, 1] -> (N, T, 64, 8, 8); frames of other sizes are resized to 64 px first."""
        x = clips.flatten(0, 1)
        if x.shape[-2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        for conv in self.convs:
            x = F.relu(conv(x))
        return x.unflatten(0, clips.shape[:2])

    @torch.no_grad()
    def forward(self, clips, batch=16):
        """float32 (N, T, 3, H, W) in [-1, 1], on white -> (N, 384) float64. ValueError for fewer than 5 frames."""
        if clips.shape[1] < 5:
            raise ValueError(f"clips of {clips.shape[1]} frames; the change over 4 frames needs at least 5")
        device = self.convs[0].weight.device
        return torch.cat([clip_features(self.maps(part.to(device)).double()) for part in clips.split(batch)])


def clip_features(h, e=1e-3):
    """Maps (N, T, C, h, w) -> (N, 6C).

    Appearance, 2C: mean and deviation of every map over the clip. Motion, 4C: logarithms of the mean change from frame
    to frame, and of the changes over 4 and 2 frames and the second difference relative to it."""
    change = lambda d: d.abs().mean((1, 3, 4)) + e
    one, two, four = (change(h[:, k:] - h[:, :-k]) for k in (1, 2, 4))
    second = change(h[:, 2:] - 2 * h[:, 1:-1] + h[:, :-2])
    appearance = [h.mean((1, 3, 4)), h.std((1, 3, 4), correction=0)]
    return torch.cat([*appearance, one.log(), (four / one).log(), (two / one).log(), (second / one).log()], 1)


class StandinExtractor:
    """Clips -> features of RandomFeatures: 128 of appearance, 256 of motion."""
    name, width, batch = "local", APPEARANCE + MOTION, 64

    def __init__(self, device="cpu"):
        self.net, self.key = RandomFeatures().to(device), dict(seed=SEED)

    def scores(self, features, **_):
        """No number of a single clip: distances are of sets."""
        return {}

    def describe(self, T, size):
        return "FD-app, FD-mot: Fréchet distance a feature, a fixed random network on 64 px; not FVD"

    def __call__(self, clips):
        """uint8 (N, T, H, W, 3) on white -> (N, 384) float32."""
        return self.net(to_signed(clips)).float().cpu().numpy()


def looped(clips):
    """Clips (N, t, ...) shown over and over until they have 5 frames: what FD-app of a few frames is made of. Means and
    deviations over the frames do not feel it."""
    return np.tile(clips, (1, -(-5 // clips.shape[1]), *[1] * (clips.ndim - 2)))


def fd_app(reference, other):
    """Distance of looks, (..., N, 384) and (..., M, 384); blind to the order of frames."""
    return fd(reference[..., :APPEARANCE], other[..., :APPEARANCE])


def fd_mot(reference, other):
    """Distance of motion, (..., N, 384) and (..., M, 384)."""
    return fd(reference[..., APPEARANCE:], other[..., APPEARANCE:])


@torch.no_grad()
def z0_errors(sampler, clips, captions, mask, seed, batch, timesteps):
    """(N, timesteps, T) squared error of the predicted latents of every frame, in one step from each timestep.

    clips (N, T, S, S, 4) uint8, mask (T,) of the given frames; clip k's noise is seeded by (seed, k) and is that of all
    timesteps, tasks and networks, so that errors are compared clip by clip."""
    net, errors = sampler.net, []
    for i in range(0, len(clips), batch):
        part, share = clips[i:i + batch], captions[i:i + batch]
        z0 = sampler.known_latents(part, torch.ones(part.shape[:2]))
        rngs = [np.random.default_rng((seed, i + k)) for k in range(len(part))]
        noise = torch.from_numpy(np.stack([rng.standard_normal(z0.shape[1:], np.float32) for rng in rngs])).to(z0)
        text = net.encode_text(sampler.text(share))
        given, real = torch.tensor(np.stack([mask] * len(part))).to(z0), torch.ones(part.shape[:2]).to(z0)
        found = []
        for t in timesteps:
            at = torch.full((len(part),), t, device=z0.device)
            predicted = net.z0(net.diffusion.add_noise(z0, noise, at), at, *text, z0, given, real)
            found.append(((predicted - z0) ** 2).mean((2, 3, 4)).cpu())               # (b, T)
        errors.append(torch.stack(found, 1))
    return torch.cat(errors).numpy()


def timesteps_of(sampler):
    """TIMESTEPS of a model's schedule."""
    steps = sampler.config.diffusion.steps
    return [*(t * steps // 1000 for t in TIMESTEPS[:-1]), steps - 1]


def denoising_loss(sampler, errors):
    """(N, TIMESTEPS) errors of predicted latents -> (N,): weighted as in training, mean of all but pure noise."""
    weights = sampler.net.diffusion.z0_weight(torch.tensor(timesteps_of(sampler)[:-1])).cpu().numpy()
    return (errors[:, :-1] * weights).mean(1)
