"""Difficulty-adaptive curriculum (RDTF, arXiv 2503.17735; Table 6 for Kp, Ki, Kd; Fig. 4 for the entropy).

    python curriculum.py --plot assets/curriculum.png            # weights and entropy of the three modes
    python curriculum.py --plot out.png --log runs/dfgn/log.jsonl  # the same with a run's own entropy

Few unknown frames make an easy task (low entropy), many a hard one. A task's probability is proportional to a static weight, a
straight line over the training, plus an adaptive one that follows the loss through a PID score.

Modes: none (uniform; the paper's "w/o CL"), linear (static alone; LCL), adaptive (static + adaptive; DCL).
"""
import argparse
from collections import deque

import numpy as np

from data import TASKS, UserError, read_jsonl, run_cli, unknown_share

MODES = ("none", "linear", "adaptive")
KP, KI, KD = 5.0, 3.0, 1.3                # paper Table 6
WINDOW = 1000                             # losses and scores remembered
WARM = 10                                 # scores before r leaves 0
GENERATION = ("t2v", "i2v", "it2v")


def static_knots(task):
    """(weight at the start, weight at the end)."""
    return (0.1, 0.9) if task in GENERATION else (0.9, 0.1) if task == "interpolation" else (0.7, 0.3)


def adaptive_weight(task, r):
    """Weight at ease r in 0..1: 0 asks for the easy map, 1 for the hard one."""
    return 0.1 + 0.8 * r if task in GENERATION else 0.9 - 0.8 * r if task == "interpolation" else 0.5


class Curriculum:
    """Task probabilities of every step. `observe` takes in a step's losses; the state is in the checkpoint.

    steps: length of the static line. raw: the PID sees the bare loss, not the one divided by the running mean of its
    (task, timestep decile), which says little but what was drawn. r is the share of recent scores above the current one, smoothed
    over `smooth` steps: bare, it jumps over its whole range with the noise of single batches. tasks: those to draw; none named: all."""

    def __init__(self, mode="adaptive", steps=1, raw=False, tasks=(), smooth=None):
        if mode not in MODES:
            raise UserError(f"--curriculum {mode}: choose one of {', '.join(MODES)}")
        self.mode, self.steps, self.raw = mode, max(steps, 1), raw
        self.trained = np.array([not tasks or task in tasks for task in TASKS], float)
        self.smooth = smooth or max(self.steps // 20, WARM)
        self.losses, self.scores = deque(maxlen=WINDOW), deque(maxlen=WINDOW)
        self.sums, self.counts = np.zeros((len(TASKS), 10)), np.zeros((len(TASKS), 10))
        self.r = 0.0

    def weights(self, step):
        """Unnormalised weights (tasks,) at a step."""
        if self.mode == "none":
            return np.ones(len(TASKS))
        u = min(step / self.steps, 1.0)
        static = np.array([(1 - u) * a + u * b for a, b in map(static_knots, TASKS)])
        return static if self.mode == "linear" else static + [adaptive_weight(task, self.r) for task in TASKS]

    def probabilities(self, step):
        weights = self.weights(step) * self.trained
        return weights / weights.sum()

    def entropy(self, step):
        """Expected share of unknown frames, H = sum_k p_k u_k: 0 everything given, 1 nothing given."""
        return float(self.probabilities(step) @ [unknown_share(task) for task in TASKS])

    def normalise(self, losses, tasks, deciles):
        """Losses (n,) divided by the running mean of their cell, which they then enter."""
        known = self.counts[tasks, deciles] > 0
        mean = np.where(known, self.sums[tasks, deciles] / np.maximum(self.counts[tasks, deciles], 1), losses)
        np.add.at(self.sums, (tasks, deciles), losses)
        np.add.at(self.counts, (tasks, deciles), 1)
        return losses / np.maximum(mean, 1e-8)

    def observe(self, losses, tasks, deciles):
        """One step's losses (n,) of all ranks, their task numbers and timestep deciles (0..9)."""
        losses = np.asarray(losses, float)
        values = self.normalise(losses, np.asarray(tasks), np.asarray(deciles))
        self.losses.append(float(losses.mean() if self.raw else values.mean()))
        last, before = self.losses[-1], self.losses[-2] if len(self.losses) > 1 else self.losses[-1]
        score = KP * last + KI * float(np.mean(self.losses)) + KD * (last - before)
        share = float(np.mean(np.array(self.scores) > score)) if len(self.scores) >= WARM else 0.0
        self.scores.append(score)
        self.r += (share - self.r) / self.smooth

    def state_dict(self):
        return dict(losses=list(self.losses), scores=list(self.scores), sums=self.sums.tolist(), counts=self.counts.tolist(), r=self.r)

    def load_state_dict(self, state):
        self.losses, self.scores = deque(state["losses"], WINDOW), deque(state["scores"], WINDOW)
        self.sums, self.counts, self.r = np.array(state["sums"]), np.array(state["counts"]), state["r"]


def rehearse(mode, steps=2000, seed=0):
    """Probabilities (steps, tasks) and entropy (steps,) under a made-up loss that falls by half, with the noise of a batch of 16."""
    rng, curriculum = np.random.default_rng(seed), Curriculum(mode, steps)
    rows, entropy = [], []
    for step in range(steps):
        p = curriculum.probabilities(step)
        rows.append(p)
        entropy.append(curriculum.entropy(step))
        tasks, deciles = rng.choice(len(TASKS), 16, p=p), rng.integers(0, 10, 16)
        difficulty = np.array([unknown_share(task) for task in TASKS])[tasks]
        curriculum.observe(difficulty * (0.5 + 0.5 * np.exp(-4 * step / steps)) * rng.gamma(8, 1 / 8, 16), tasks, deciles)
    return np.array(rows), np.array(entropy)


def read_entropy(log):
    """Steps and entropies of a run's log.jsonl."""
    lines = [line for _, line in read_jsonl(log) if "entropy" in line and "step" in line]
    if not lines:
        raise UserError(f"--log {log}: no line with a step and an entropy; give the log of a dfgn run")
    return [line["step"] for line in lines], [line["entropy"] for line in lines]


def plot(path, log=None):
    steps, measured = read_entropy(log) if log else ((), ())
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.4), constrained_layout=True)
    for mode, axis in zip(MODES, axes):
        rows, entropy = rehearse(mode)
        for task, p in zip(TASKS, rows.T):
            axis.plot(np.linspace(0, 1, len(p)), p, label=task)
        axis.set(title=mode, xlabel="share of the training", ylim=(0, 0.45))
        axes[3].plot(np.linspace(0, 1, len(entropy)), entropy, label=f"{mode} (made-up loss)")
    axes[0].set_ylabel("probability of a task")
    axes[2].legend(fontsize=7)
    if log:
        axes[3].plot([step / steps[-1] for step in steps], measured, "k", label="measured")
    axes[3].set(title="expected sample entropy H", xlabel="share of the training")
    axes[3].legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", required=True, help="PNG to write")
    parser.add_argument("--log", help="log.jsonl of a run, whose entropy is drawn too")
    args = parser.parse_args(argv)
    plot(args.plot, args.log)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_cli(main)
