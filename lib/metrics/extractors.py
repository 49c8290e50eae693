"""The networks that look at clips, and their features, cached under names with a hash of all that they depend on."""
import hashlib
import inspect

import numpy as np
import torch

from lib.metrics.clip import CLIPExtractor
from lib.metrics.dover import DOVERExtractor
from lib.metrics.i3d import I3DExtractor
from lib.metrics.judge import JudgeExtractor
from lib.metrics.movement import MovementExtractor
from lib.metrics.standins import StandinExtractor
from lib.run.files import UserError, cache_path, file_hash, rows


def extractors(args, T, concepts=()):
    """All that looks at clips of these concepts: what needs no weights, and the networks whose weights are named."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (args.i3d_eps or args.i3d_trust or args.i3d_frames != "loop") and not args.i3d:
        raise UserError("--i3d-eps, --i3d-trust and --i3d-frames: name the weights with --i3d FILE")
    found = [StandinExtractor(device), MovementExtractor()]
    if args.judge and (judge := JudgeExtractor(args.judge, device)).knows(concepts):
        found.append(judge)
    if args.i3d:
        found.append(I3DExtractor(args.i3d, args.i3d_eps, args.i3d_frames, device, args.i3d_trust))
    if args.dover:
        found.append(DOVERExtractor(args.dover, args.seed, device))
    if args.clip:
        found.append(CLIPExtractor(args.clip, args.clip_model, T, device))
    return found


def features_of(extractors, folder, clips, names=None):
    """{extractor: (N, width) float32} of clips (N, T, S, S, 3) uint8 on white, by all or the named ones; cached."""
    found, content = {}, hashlib.sha256(np.ascontiguousarray(clips)).hexdigest()
    for x in extractors:
        if names is None or x.name in names:
            code = file_hash(inspect.getfile(type(x)))
            made_of = dict(clips=content, shape=clips.shape, by=x.key, code=code)
            path = cache_path(folder, x.name, made_of)
            found[x.name] = rows(path, len(clips), (x.width,), np.float32, x.batch, lambda p, x=x: x(clips[p]), x.name)
    return found
