"""Difficulty-adaptive curriculum (RDTF, arXiv 2503.17735; Table 6 for Kp, Ki, Kd; Fig. 4 for the entropy).

    python curriculum.py --plot assets/curriculum.png              # weights and entropy of the three modes
    python curriculum.py --plot out.png --log runs/dfgn/log.jsonl  # the same with a run's own entropy

Few unknown frames make an easy task (low entropy), many a hard one: by the masks of data.py predictions have 0.50,
interpolation 0.54, with which the weights begin as in the paper, generation 0.88 and 1. A task's probability is
proportional to a static weight, a line over the training, plus an adaptive one, by a PID score of the loss. Modes:
none (uniform; "w/o CL"), linear (static; LCL), adaptive (both; DCL).
"""
import argparse
import io
from collections import deque

import numpy as np

from data import TASKS, UNKNOWN
from lib.run.files import UserError, check_outputs, read_jsonl, run_cli, write_bytes

MODES = ("none", "linear", "adaptive")
KP, KI, KD = 5.0, 3.0, 1.3                # paper Table 6
WINDOW = 1000                             # losses and scores remembered
WARMUP = 10                               # scores before r leaves 0
DECILES = 10                              # of the timestep
WEIGHTS = {                               # static at the start and at the end; adaptive at r = 0 and at r = 1
    "t2v": (0.1, 0.9, 0.1, 0.9), "i2v": (0.1, 0.9, 0.1, 0.9), "it2v": (0.1, 0.9, 0.1, 0.9),
    "interpolation": (0.9, 0.1, 0.9, 0.1), "prediction_forward": (0.7, 0.3, 0.5, 0.5),
    "prediction_backward": (0.7, 0.3, 0.5, 0.5)}


class Curriculum:
    """Task probabilities of every step. `observe` takes in a step's losses; the state is in the checkpoint.

    steps: length of the static line. tasks: those to draw; none named: all. smooth: steps over which r, the share of
    recent scores above the current one, is averaged: a single batch's would jump over its whole range. losses: how many
    the run will show; a tenth of a (task, timestep decile)'s share of them is what later ones are divided by."""

    def __init__(self, mode="adaptive", steps=1, tasks=(), smooth=None, losses=0):
        if mode not in MODES:
            raise UserError(f"--curriculum {mode}: choose one of {', '.join(MODES)}")
        self.mode, self.steps = mode, max(steps, 1)
        self.trained = np.array([not tasks or task in tasks for task in TASKS], float)
        self.smooth = smooth or max(self.steps // 20, WARMUP)
        self.losses, self.scores, self.r = deque(maxlen=WINDOW), deque(maxlen=WINDOW), 0.0
        self.reference = max(losses // (10 * len(TASKS) * DECILES), 5)
        self.sums, self.counts = np.zeros((2, len(TASKS), DECILES))

    def weights(self, step):
        """Unnormalised weights (tasks,) at a step."""
        if self.mode == "none":
            return np.ones(len(TASKS))
        start, end, low, high = np.array([WEIGHTS[task] for task in TASKS]).T
        u = min(step / self.steps, 1.0)
        static = (1 - u) * start + u * end
        return static if self.mode == "linear" else static + (low + (high - low) * self.r)

    def probabilities(self, step):
        weights = self.weights(step) * self.trained
        return weights / weights.sum()

    def entropy(self, step):
        """Expected share of unknown frames, H = sum_k p_k u_k: 0 everything given, 1 nothing given."""
        return float(self.probabilities(step) @ UNKNOWN)

    def normalise(self, losses, tasks, deciles):
        """Losses (n,) divided by the mean of the first of their (task, timestep decile), which they mostly tell of.

        It is frozen then: a mean that kept running would follow the loss down, and a plateau would look like a rise."""
        for loss, *cell in zip(losses, tasks, deciles):
            if self.counts[*cell] < self.reference:
                self.sums[*cell] += loss
                self.counts[*cell] += 1
        return losses / np.maximum(self.sums[tasks, deciles] / self.counts[tasks, deciles], 1e-8)

    def observe(self, losses, tasks, deciles):
        """One step's losses (n,) of all ranks' clips, their task numbers and timestep deciles (0..9)."""
        self.losses.append(float(np.mean(self.normalise(losses, tasks, deciles))))
        last, before = self.losses[-1], self.losses[-2] if len(self.losses) > 1 else self.losses[-1]
        score = KP * last + KI * float(np.mean(self.losses)) + KD * (last - before)
        share = float(np.mean(np.array(self.scores) > score)) if len(self.scores) >= WARMUP else 0.0
        self.scores.append(score)
        self.r += (share - self.r) / self.smooth

    def state_dict(self):
        return dict(losses=list(self.losses), scores=list(self.scores), sums=self.sums.tolist(),
                    counts=self.counts.tolist(), r=self.r)

    def load_state_dict(self, state):
        self.losses, self.scores = deque(state["losses"], WINDOW), deque(state["scores"], WINDOW)
        self.sums, self.counts, self.r = np.array(state["sums"]), np.array(state["counts"]), state["r"]


def simulate(mode, steps=2000, seed=0):
    """Probabilities (steps, tasks) and entropy (steps,) under a made-up loss that falls by half, of batches of 16."""
    rng, curriculum = np.random.default_rng(seed), Curriculum(mode, steps, losses=16 * steps)
    probabilities = np.zeros((steps, len(TASKS)))
    for step in range(steps):
        probabilities[step] = curriculum.probabilities(step)
        tasks, deciles = rng.choice(len(TASKS), 16, p=probabilities[step]), rng.integers(0, 10, 16)
        falling = 0.5 + 0.5 * np.exp(-4 * step / steps)
        curriculum.observe(UNKNOWN[tasks] * falling * rng.gamma(8, 1 / 8, 16), tasks, deciles)
    return probabilities, probabilities @ UNKNOWN


def read_entropy(log):
    """Steps of a run's log.jsonl, and its entropies: of clips, and of all samples."""
    lines = [line for _, line in read_jsonl(log) if "entropy" in line and "step" in line]
    if not lines:
        raise UserError(f"--log {log}: no line with a step and an entropy; give the log of a dfgn run")
    values = {name: [line.get(name, np.nan) for line in lines] for name in ("entropy", "entropy_all")}
    return [line["step"] for line in lines], values


def plot(path, log=None):
    from matplotlib.figure import Figure
    axes = (fig := Figure(figsize=(15, 3.4), layout="constrained")).subplots(1, 4)
    for mode, axis in zip(MODES, axes):
        probabilities, entropy = simulate(mode)
        for task, p in zip(TASKS, probabilities.T):
            axis.plot(np.linspace(0, 1, len(p)), p, label=task)
        axis.set(title=mode, ylim=(0, 0.45), ylabel="probability of a task")
        axes[3].plot(np.linspace(0, 1, len(entropy)), entropy, label=f"{mode} (made-up loss)")
    steps, measured = read_entropy(log) if log else ([], {})
    for (name, values), style in zip(measured.items(), ("k", "k:")):
        axes[3].plot(np.array(steps) / steps[-1], values, style, label=f"{name}, measured")
    axes[3].set_title("expected sample entropy H"), axes[2].legend(fontsize=7), axes[3].legend(fontsize=7)
    fig.supxlabel("share of the training")
    fig.savefig(file := io.BytesIO(), dpi=110, format="png")
    write_bytes(path, file.getvalue())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", required=True, help="PNG to write")
    parser.add_argument("--log", help="log.jsonl of a run, whose entropy is drawn too")
    args = parser.parse_args(argv)
    if not args.plot.lower().endswith(".png"):
        raise UserError(f"--plot {args.plot}: a plot is a .png file")
    check_outputs([("--plot", args.plot)], [("--log", args.log)])
    plot(args.plot, args.log)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_cli(main)
