"""A training run's folder: its newest checkpoint, its log, its model."""
import shutil

import numpy as np
import torch

from lib.nets.weights import is_own, save_model
from lib.run import loop
from lib.run.checkpoints import append, write_config
from lib.run.distributed import gather, on_rank_0
from lib.run.files import UserError, atomic_write


class Run:
    """What restores, logs and saves. parts: what a checkpoint holds, {name: object with a state_dict}; rank 0 alone has
    the averages, `ema`. tasks: names of the stage's tasks, of which the log has means; () for none."""

    def __init__(self, folder, config, stage, parts, tasks):
        self.folder, self.config, self.stage, self.tasks = folder, config, stage, tasks
        self.window = loop.Window()
        self.parts = dict(parts, window=self.window)

    def on_rank_0(self, work, *arguments):
        on_rank_0(lambda: work(*arguments), self.stage.rank, self.stage.world)

    def restore(self):
        """Load the newest checkpoint. -> the step that it was saved behind, 0 where there is none."""
        step = loop.restore(self.folder, self.parts, remove_damaged=self.stage.rank == 0)
        if len(set(gather(torch.tensor([step]), self.stage.world).tolist())) > 1:
            raise UserError(f"--out {self.folder}: the processes do not see the same checkpoint; all nodes must share "
                            "it")
        return step

    def write_config(self, facts, step):
        self.on_rank_0(write_config, self.folder, facts, step)

    def record(self, losses, norm, tasks, deciles, unknown=None, frames=None):
        """Take a step into the window. unknown: share of unknown frames of each sample, frames: their numbers of real
        frames, where there are tasks."""
        self.window.seen += len(losses)
        self.window.add("loss", float(losses.mean()))
        self.window.add("norm", norm)
        if self.tasks:
            for loss, task, decile in zip(losses.tolist(), tasks, deciles):
                self.window.add(f"task {self.tasks[task]}", loss)
                self.window.add(f"decile {decile}", loss)
            self.window.add("entropy_all", float(np.mean(unknown)))
            clips = frames[frames > 1]
            shown = dict(stills=len(frames) - len(clips), clips=len(clips), frames=clips.sum(),
                         whole=(clips == self.stage.preset.frames).sum())
            for name, number in shown.items():
                self.window.add(f"shown {name}", int(number))

    def log(self, step, lr, **more):
        """Write a line and begin a new window. -> the line."""
        means = self.window.means
        if self.tasks:
            more.update(entropy_all=means("entropy_all")[""], shown=self.window.totals("shown "))
        line = dict(step=step, loss=means("loss")[""], grad_norm=means("norm")[""], lr=lr, **more,
                    tasks=means("task "), deciles=means("decile "),
                    **self.window.rates(self.stage.device, self.stage.world))
        self.on_rank_0(append, self.folder / "log.jsonl", line)
        self.window.restart()
        return line

    def save(self, step):
        with self.window.pause():
            loop.complete_state(self.parts["optimizer"])
            self.on_rank_0(self.write, step)

    def write(self, step):
        append(self.folder / "log.jsonl", durably=True)  # the checkpoint says that its lines are there
        line = self.write_model(step)
        if self.config.keep_every and step % self.config.keep_every == 0:
            atomic_write(self.folder / f"model-{step:06}.safetensors",
                         lambda path: shutil.copyfile(self.folder / "model.safetensors", path))
        loop.save_state(self.folder, step, self.parts)   # its step says what is done
        if line:
            print(line)

    def write_model(self, step):
        """Write model.safetensors. -> a line on it."""
        weights, extra, line = self.stage.export(self.parts["ema"].weights)
        facts = dict(kind=self.config.stage, step=step, config=self.stage.preset.to_dict())
        save_model(self.folder / "model.safetensors", weights, **{**facts, **extra})
        return line

    def finished(self, step):
        """Of a run that is done: say so, and write its model again where that is gone or damaged."""
        model = self.folder / "model.safetensors"
        if is_own(model):
            print(f"{self.folder}: done, {step} steps; nothing to do")
        else:
            self.write_model(step)
            print(f"{self.folder}: done, {step} steps; {model} was gone or damaged and is written again")
