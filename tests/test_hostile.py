"""Files and neighbours that are not to be trusted: two jobs on one folder."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

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
