"""Means of scores and distances between sets of features, each with its interval: the numbers in eval.json."""
import numpy as np

from lib.metrics.distances import bootstrap, bootstrap_difference, bootstrap_fd, extrapolate, frechet
from lib.metrics.standins import fd_app, fd_mot
from lib.run.files import UserError

DISTANCES = {"FVD": ("i3d", frechet), "FD-app": ("unknown", fd_app), "FD-mot": ("local", fd_mot)}  # of which features
DISTANT = {"i3d", "local"}


def mean_of(values, seed):
    return dict(mean=float(np.mean(values)), interval=bootstrap(values, seed=seed),
                clips=[round(float(v), 4) for v in values])


def distances(reference, other, seed, paired=True):
    """{n; FVD, FD-app, FD-mot where features are there: value, interval; FVD-inf: value at infinite n, its error}."""
    n, m = (len(next(iter(features.values()))) for features in (reference, other))
    if n != m:
        raise UserError(f"{n} real clips against {m} others: a distance depends on n; choose --n {min(n, m)}")
    result = dict(n=n)
    for name, (extractor, distance) in DISTANCES.items():
        if extractor in reference and extractor in other:
            a, b = reference[extractor].astype(float), other[extractor].astype(float)
            interval = bootstrap_fd(a, b, seed=seed, paired=paired, distance=distance)
            result[name] = dict(value=distance(a, b), interval=interval)
            if name == "FVD" and n >= 2 * a.shape[1]:    # a line in 1/n says nothing at fewer clips
                result["FVD-inf"] = extrapolate(a, b, seed=seed)
    return result


def compare_distances(real, features, seed):
    """{copy, blend: {distance: value, interval}}: the model's less the baseline's, paired by concept.

    features: {"model" and the baselines: {extractor: (N, width)}}."""
    def runs(name):
        return {d: (lambda rows, a=real[x], b=features[name][x], f=f: f(a[rows].astype(float), b[rows].astype(float)))
                for d, (x, f) in DISTANCES.items() if x in features[name]}
    mine, n = runs("model"), len(real["local"])
    return {name: {d: bootstrap_difference([other], [mine[d]], n, seed=seed) for d, other in runs(name).items()}
            for name in ("copy", "blend") if name in features}
