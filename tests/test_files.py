"""lib/run/files.py, options.py: nothing half-written is read, one process writes at a time, errors are one line."""
import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from lib.run.files import UserError, atomic_write, check_outputs, file_hash, lock, rows, run_cli
from lib.run.options import parse_fields

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = np.arange(20, dtype=np.float32).reshape(10, 2)


def start(code, *argv):
    """A Python process that runs the code in the repository, with pipes."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


BARE = """
import importlib, os, pathlib, signal, sys
import matplotlib.pyplot, open_clip, scipy.stats, torch.distributed, torchvision   # they may have it
names = [path.stem for path in pathlib.Path().glob("*.py")]
for folder in "lib", "tools":
    names += [".".join(path.with_suffix("").parts) for path in pathlib.Path(folder).rglob("*.py")]
for missing in "fcntl", "resource", "pwd", "grp", "termios", "pty":
    sys.modules[missing] = None
for owner, gone in ((os, "posix_fadvise fork getuid nice sched_getaffinity mkfifo"), (signal, "SIGKILL SIGHUP pause")):
    for name in gone.split():
        if hasattr(owner, name):
            delattr(owner, name)
sys.platform = "win32"
for name in sorted(names):
    importlib.import_module(name)
from lib.nets.cpu import keep_memory, peak_memory
keep_memory()
print(len(names), peak_memory())
"""


def test_every_script_is_imported_where_posix_is_missing():
    """Windows has none of these names, macOS not all of them."""
    process = start(BARE)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    count, memory = map(int, said.split())
    assert count > 35 and memory == 0


def test_rows_are_made_once_and_of_the_right_number_and_shape(tmp_path):
    path, calls = tmp_path / "rows", []
    for _ in range(2):
        found = rows(path, 10, (2,), np.float32, 4, lambda part: calls.append(part) or EXPECTED[part])
        assert np.array_equal(found, EXPECTED) and not found.flags.writeable
    assert calls == [slice(0, 4), slice(4, 8), slice(8, 10)] and not Path(f"{path}.part").exists()
    assert rows(tmp_path / "none", 0, (2,), np.float32, 4, EXPECTED.__getitem__).shape == (0, 2)
    path.write_bytes(bytes(79))
    with pytest.raises(UserError, match="rows: 79 bytes, 80 expected; remove it"):
        rows(path, 10, (2,), np.float32, 4, EXPECTED.__getitem__)
    for made in (EXPECTED[:3], np.zeros((4, 3))):
        with pytest.raises(UserError, match=rf"\({len(made)}, {made.shape[1]}\) came for rows 0 and on of \(10, 2\)"):
            rows(tmp_path / "wrong", 10, (2,), np.float32, 4, lambda part, made=made: made)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("torn", [0, 3])
def test_rows_go_on_behind_what_a_killed_process_wrote(tmp_path, torn):
    """The third slice is not made; of the second the last row is missing where the write was torn."""
    code = """if True:
        import os, sys, numpy as np
        from lib.run.files import rows
        def make(part):
            if part.start == 8:
                os.truncate(sys.argv[1] + ".part", 64 - int(sys.argv[2]))
                os.kill(os.getpid(), 9)
            return np.arange(20, dtype=np.float32).reshape(10, 2)[part]
        rows(sys.argv[1], 10, (2,), np.float32, 4, make)"""
    child, calls = start(code, tmp_path / "rows", torn), []
    assert child.wait(60) == -signal.SIGKILL and not (tmp_path / "rows").exists()
    found = rows(tmp_path / "rows", 10, (2,), np.float32, 4, lambda part: calls.append(part) or EXPECTED[part])
    assert calls == [slice(4, 8)][:torn] + [slice(8, 10)] and np.array_equal(found, EXPECTED)


def test_a_second_process_waits_for_the_rows_of_the_first(tmp_path):
    code = """if True:
        import sys, numpy as np
        from lib.run.files import rows
        print(rows(sys.argv[1], 10, (2,), np.float32, 10, lambda part: sys.exit("made twice")).sum())"""
    children = []

    def make(part):
        children.append(start(code, tmp_path / "rows"))
        assert "waiting for it" in children[0].stderr.readline()
        return EXPECTED
    rows(tmp_path / "rows", 10, (2,), np.float32, 10, make)
    assert children[0].communicate(timeout=60)[0] == "190.0\n" and len(children) == 1


def test_a_lock_is_free_again_after_sigkill(tmp_path):
    code = """if True:
        import os, sys
        from lib.run.files import lock
        with lock(sys.argv[1], "the set"):
            if os.fork():                        # the child lives longer, as a loader's worker may
                print("locked", flush=True)
            sys.stdin.read()"""
    path = tmp_path / "folder/lock"
    child = start(code, path)
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="the set is being written by another process"), lock(path, "the set"):
        pass
    child.kill()
    child.wait(60)
    for _ in range(2):                           # the second time after an orderly release
        with lock(path, "the set"):
            pass
    child.communicate()                          # the child's child ends with its standard input


def test_an_atomic_write_replaces_the_whole_file_or_keeps_the_old_one(tmp_path):
    path, backup = tmp_path / "file", tmp_path / "backup"
    for content in ("one", "two"):
        atomic_write(path, lambda temporary: temporary.write_text(content), backup)  # noqa: B023
    assert file_hash(backup) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"

    def failing(error):
        def write(temporary):
            temporary.write_text("half")
            raise error
        return write
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")):
        with pytest.raises(UserError, match=f"file: cannot be written .*{error.args[-1]}.*was there before stays"):
            atomic_write(path, failing(error))
    with pytest.raises(KeyError):                # a bug is no message for a user
        atomic_write(path, failing(KeyError("x")))
    assert path.read_text() == "two" and sorted(os.listdir(tmp_path)) == ["backup", "file"]


@pytest.mark.parametrize("error, status, message", [
    (UserError("--steps 0: too few"), 2, "--steps 0: too few"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "full", "a.pt"), 2, "disk full: a.pt"), (MemoryError(), 2, "out of memory"),
    (OSError(errno.ENOLCK, "No locks"), 2, "OSError: No locks"), (OSError("odd"), 2, "OSError: odd"),
    (PermissionError(errno.EACCES, "Permission denied", "a.pt"), 2, "a.pt: Permission denied")])
def test_errors_of_a_script_are_one_line_and_an_exit_code(error, status, message, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == status and capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(ValueError):              # a bug keeps its traceback
        run_cli(lambda: int("x"))


class Broken:
    """A stream whose terminal is gone."""
    def __init__(self, error):
        self.error, self.encoding = error, "utf-8"

    def write(self, _):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x"),
                                   OSError(errno.ENOSPC, "x"), ValueError("operation on closed file")])
def test_a_line_that_cannot_be_written_does_not_end_the_work(error, monkeypatch):
    """Lines, bars, and the error itself: the status still says that there was one."""
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))

    def main():
        print("hello", flush=True)
        for _ in tqdm(range(3), mininterval=0):
            print("x", file=sys.stderr, flush=True)
        raise UserError("at the end")
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2


CONSOLES = """if True:
    import contextlib, os, sys
    from lib.run.files import run_cli
    def main():
        with open(sys.argv[1], "w") as file:         # not one of the standard streams' numbers
            print("\u7b11 Fr\u00e9chet", flush=True)
            print("an error", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):       # of a full disk
                os.write(2, b"from C")
            file.write("whole" * (file.fileno() > 2))
    run_cli(main)"""


@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full",
                                 "PYTHONIOENCODING=ascii", "PYTHONIOENCODING=cp932"])
def test_consoles_of_services_pipes_and_other_code_pages(how, tmp_path):
    before, after = (how, "") if "=" in how else ("", how)
    command = f'{before} "$0" -c "$1" "$2" {after}'
    done = subprocess.run(["bash", "-c", command, sys.executable, CONSOLES, tmp_path / "out"], cwd=ROOT,
                          capture_output=True)
    assert done.returncode == 0 and (tmp_path / "out").read_text() == "whole", done
    if "=" in how:
        assert done.stdout.decode("ascii" if "ascii" in how else "cp932").startswith(
            "\\u7b11 Fr\\xe9chet" if "ascii" in how else "\u7b11 Fr\\xe9chet")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_folders_without_locks(number, tmp_path, monkeypatch):
    """Lustre, NFS, FUSE: one process at a time all the same, and a dead one's lock is taken over."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, "no locks here")
    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "set.lock"
    with lock(path, "the set"):
        assert Path(f"{path}.soft").exists()
        with pytest.raises(UserError, match="the set is being written .*if there is none, remove .*set.lock.soft"), \
                lock(path, "the set"):
            pass
    assert not Path(f"{path}.soft").exists()
    code = f"""if True:
        import fcntl, os, sys
        def refuse(*_):
            raise OSError({number}, "no locks here")
        fcntl.flock = refuse
        from lib.run.files import lock
        with lock(sys.argv[1], "the set"):
            os.kill(os.getpid(), 9)"""
    assert start(code, path).wait(60) == -signal.SIGKILL and Path(f"{path}.soft").exists()
    with lock(path, "the set"):
        pass


def test_what_would_be_lost_is_refused_before_the_work(tmp_path):
    """Other spellings, links and hard links of an input; folders and files in the way; folders of others."""
    given, link, hard, folder = (tmp_path / name for name in ("a.png", "link.png", "hard.png", "folder"))
    given.write_bytes(b"x")
    link.symlink_to(given)
    os.link(given, hard)
    folder.mkdir()
    for path in (given, folder / ".." / "a.png", link, hard):
        with pytest.raises(UserError, match=f"--out {re.escape(str(path))}: is the file of --image, which it would"):
            check_outputs([("--out", path)], [("--model", ""), ("--image", given), ("--vae", None)])
    refused = {folder: "a folder is there; name a file", given / "b.png": "a.png is no folder",
               given / "c" / "b.png": "a.png is no folder"}
    for path, reason in refused.items():
        with pytest.raises(UserError, match=f"--sheet {path}: .*{reason}"):
            check_outputs([("--out", None), ("--sheet", path)])
    if os.getuid():                              # root may write everywhere
        folder.chmod(0o500)
        with pytest.raises(UserError, match="folder cannot be written to"):
            check_outputs([("--out", folder / "a.png")])
    check_outputs([("--out", tmp_path / "new/deep/a.png"), ("--out", hard)], [("--image", tmp_path / "gone.png")])


def test_a_link_is_written_through(tmp_path):
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("old")
    link.symlink_to(there)
    atomic_write(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink() and there.read_text() == "new"


@dataclass
class Options:
    share: float = 0.5                           # a share, in %


def test_the_comment_beside_a_field_is_its_help(capsys):
    with pytest.raises(SystemExit):
        parse_fields(Options, "doc", ["--help"])
    assert "a share, in % (default: 0.5)" in " ".join(capsys.readouterr().out.split())


def test_arrows_point_one_way():
    """tools/ -> scripts -> lib/: lib imports no script, nobody imports train.py, tools alone import tools."""
    scripts = {"model", "data", "curriculum", "train", "sample", "evaluate"}
    imported = {path: set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M))
                for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/**/*.py"), *ROOT.glob("tools/*.py")]}
    assert len(imported) > 50
    for path, names in imported.items():
        assert "train" not in names and ("tools" not in names or path.parent == ROOT / "tools"), path
        assert "lib" not in path.relative_to(ROOT).parts or not names & scripts, path
