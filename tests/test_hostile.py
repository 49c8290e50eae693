"""Files and neighbours that are not to be trusted: two jobs on one folder."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
from data import UserError


def script(code, *argv):
    """Start a process of its own that runs the code."""
    return subprocess.Popen([sys.executable, "-c", f"import data, os, sys, time\n{code}", *map(str, argv)], cwd=Path(data.__file__).parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- two jobs on one folder

TAKE = "lock = data.hold(sys.argv[1], 'the run', wait=True)\n"


def test_a_lock_names_its_owner_and_ends_with_it_though_its_worker_lives(tmp_path):
    path = tmp_path / "run/lock"
    owner = script(TAKE + "worker = os.fork()\nif worker:\n    print(worker, flush=True)\ntime.sleep(60)", path)
    worker = int(owner.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=f"^the run is being written by process {owner.pid}; wait"):
                data.hold(path, "the run")
        waiting = script(TAKE + "print('mine')", path)
        assert waiting.stderr.readline() == f"the run is being written by process {owner.pid}: waiting for it\n"
        owner.kill()
        owner.wait()
        assert waiting.communicate(timeout=30)[0] == "mine\n"
        lock = data.hold(path, "the run")
        assert path.read_text() == str(os.getpid())
        lock.close()
        data.hold(path, "the run").close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_whose_folder_was_removed_is_taken_anew(tmp_path):
    path = tmp_path / "run/lock"
    lock = data.hold(path, "the run")
    waiting = script(TAKE + "print('mine', flush=True)\ntime.sleep(60)", path)
    waiting.stderr.readline()
    shutil.rmtree(path.parent)
    lock.close()
    assert waiting.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=f"written by process {waiting.pid};"):
        data.hold(path, "the run")
    waiting.kill()


PREPARE = "plain = data.decode\ndata.decode = lambda *a: time.sleep(0.05) or plain(*a)\ndata.run_cli(lambda: data.main(sys.argv[1:]))"


def test_two_processes_on_one_set(tmp_path, capsys):
    """The second is refused while the first lives, goes on where it was killed, and finds the set finished where it was not."""
    argv = ["synthetic", "--n", "64", "--size", "8", "--workers", "1", "--out", str(tmp_path / "set")]
    data.main([*argv[:-1], str(tmp_path / "alone")])
    first = script(PREPARE, *argv)
    while not list(tmp_path.glob(".set.part/blocks/block-*.jsonl")):
        assert first.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"set is being written by process {first.pid};"):
        data.main(argv)
    first.kill()
    first.wait()
    second = script(PREPARE, *argv)
    assert "going on behind" in second.stdout.readline()
    hold = data.hold

    def late(path, *more):                                            # asks for the lock when the other has just finished
        assert second.wait(60) == 0
        return hold(path, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "hold", late)
        capsys.readouterr()
        data.main(argv)
    assert "set: already prepared (64 stickers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "set"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}


ENCODE = """import numpy as np
def batches(start):
    print(start, flush=True)
    for i in range(start, 60):
        time.sleep(60 * (i == int(sys.argv[2])))
        yield np.full((2, 1, 1, 2, 2), i)                             # mean and logvar of a frame
data.LATENT_ROWS = 10
data.write_latents(sys.argv[1], "a" * 64, 60, (1, 2, 2), batches)"""


def test_two_processes_on_one_cache_of_latents(stickers16, tmp_path):
    """The second waits, goes on behind what a killed one wrote, and encodes nothing where another has finished."""
    shutil.copytree(stickers16, tmp_path / "set", ignore=shutil.ignore_patterns("latents-*", ".latents-*"))
    first = script(ENCODE, tmp_path / "set", 25)
    assert first.stdout.readline() == "0\n"
    others = [script(ENCODE, tmp_path / "set", -1) for _ in range(2)]
    for other in others:
        assert f"is being written by process {first.pid}: waiting" in other.stderr.readline()
    while len(list(tmp_path.glob("set/.latents-*.part/logvar-*.bin"))) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    said = [other.communicate(timeout=60)[0] for other in others]
    assert sorted(said) == ["", "20\n"]
    mean, logvar = data.open_latents(tmp_path / "set", "a" * 64)
    assert np.asarray(mean)[:, 0, 0, 0].tolist() == list(range(60)) and np.array_equal(mean, logvar)
