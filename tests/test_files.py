"""lib/files.py and lib/options.py: nothing half-written is read, one process writes at a time, errors are one line."""
import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from lib.files import UserError, atomic_write, file_hash, lock, read_json, read_jsonl, rows, run_cli
from lib.options import check_least, check_shares, check_words, parse_fields

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = np.arange(20, dtype=np.float32).reshape(10, 2)


def start(code, *argv):
    """A Python process that runs the code in the repository; its standard output is a pipe."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def batches(done, size=3):
    for i in range(done, 10, size):
        yield EXPECTED[i:min(i + size, 10)]


def test_rows_are_made_once(tmp_path):
    path, calls = tmp_path / "rows", []
    for _ in range(2):
        found = rows(path, 10, (2,), np.float32, lambda done: calls.append(done) or batches(done))
        assert np.array_equal(found, EXPECTED) and not found.flags.writeable
    assert calls == [0] and path.stat().st_size == 80 and not Path(f"{path}.part").exists()
    assert rows(tmp_path / "none", 0, (2,), np.float32, batches).shape == (0, 2)
    path.write_bytes(bytes(79))
    with pytest.raises(UserError, match="rows: 79 bytes, 80 expected; remove it"):
        rows(path, 10, (2,), np.float32, batches)


@pytest.mark.parametrize("torn", [0, 3])
def test_rows_go_on_behind_what_a_killed_process_wrote(tmp_path, torn):
    code = """if True:
        import os, sys, numpy as np
        from lib.files import rows
        def make(done):
            yield np.arange(8, dtype=np.float32).reshape(4, 2)
            os.write(os.open(sys.argv[1] + ".part", os.O_WRONLY | os.O_APPEND), b"x" * int(sys.argv[2]))
            os.kill(os.getpid(), 9)
        rows(sys.argv[1], 10, (2,), np.float32, make)"""
    child, calls = start(code, tmp_path / "rows", torn), []
    assert child.wait(60) == -signal.SIGKILL and not (tmp_path / "rows").exists()
    found = rows(tmp_path / "rows", 10, (2,), np.float32, lambda done: calls.append(done) or batches(done))
    assert calls == [4] and np.array_equal(found, EXPECTED)


def test_a_second_process_waits_for_the_rows_of_the_first(tmp_path):
    code = """if True:
        import sys, numpy as np
        from lib.files import rows
        def make(done):
            raise SystemExit("made twice")
        print(rows(sys.argv[1], 10, (2,), np.float32, make).sum())"""

    def make(done):
        child = children.append(start(code, tmp_path / "rows")) or children[0]
        assert "waiting for it" in child.stderr.readline()
        yield EXPECTED
    children = []
    rows(tmp_path / "rows", 10, (2,), np.float32, make)
    assert children[0].communicate(timeout=60)[0] == "190.0\n" and children[0].returncode == 0


@pytest.mark.parametrize("made, reason", [
    ([EXPECTED[:4]], "4 rows came, 10 were expected"), ([EXPECTED, EXPECTED[:1]], "behind 10 of 10 rows"),
    ([np.zeros((10, 3))], r"\(10, 3\) came behind 0 of 10 rows \(2,\)")])
def test_rows_of_a_wrong_number_or_shape_are_refused(tmp_path, made, reason):
    with pytest.raises(UserError, match=reason):
        rows(tmp_path / "rows", 10, (2,), np.float32, lambda done: iter(made))
    assert not (tmp_path / "rows").exists()


def test_a_lock_is_free_again_after_sigkill(tmp_path):
    code = """if True:
        import os, sys, time
        from lib.files import lock
        with lock(sys.argv[1], "the set"):
            if os.fork():                        # as a loader's worker, which may live a little longer
                print("locked", flush=True)
            time.sleep(10)"""
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


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path, backup = tmp_path / "file", tmp_path / "backup"
    for content in ("one", "two"):
        atomic_write(path, lambda temporary: temporary.write_text(content), backup)  # noqa: B023
    assert path.read_text() == "two" and backup.read_text() == "one" and len(list(tmp_path.iterdir())) == 2
    assert file_hash(backup) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


@pytest.mark.parametrize("error, reason", [(OSError(errno.ENOSPC, "No space left on device"), "No space left"),
                                           (RuntimeError("unexpected pos 64 vs 0"), "unexpected pos")])
def test_a_failed_write_keeps_the_old_file_and_names_the_reason(tmp_path, error, reason):
    def write(temporary):
        temporary.write_text("half")
        raise error
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match=f"file: cannot be written .*{reason}.*what was there before stays"):
        atomic_write(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(KeyError):                # a bug is no message for a user
        atomic_write(path, lambda temporary: {}["x"])


@pytest.mark.parametrize("line, reason", [("{", "not JSON"), ("[1]", "not a JSON object"), ("[" * 9999, "not JSON"),
                                          ('"' + "x" * 2**20, "longer than")])
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=f"lines.jsonl, line 2: {reason}"):
        list(read_jsonl(path))
    assert next(read_jsonl(path)) == (1, {"a": 1}) and read_json(path) == read_json(tmp_path / "none") == {}
    with pytest.raises(UserError, match="none: no such file"):
        list(read_jsonl(tmp_path / "none"))


@pytest.mark.parametrize("error, status, message", [
    (UserError("--steps 0: too few"), 2, "--steps 0: too few"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "full", "a.pt"), 2, "disk full: a.pt"),
    (PermissionError(errno.EACCES, "Permission denied", "a.pt"), 2, "a.pt: Permission denied")])
def test_errors_of_a_script_are_one_line_and_an_exit_code(error, status, message, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == status and capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(ValueError):              # a bug keeps its traceback
        run_cli(lambda: int("x"))


@dataclass
class Options:
    steps: int = 10                              # steps of the training
    share: float = 0.5                           # a share, in %
    tasks: list = field(default_factory=list)    # names
    bucket_size: str = "small"                   # small, large
    fast: bool = False                           # skip the slow part


def test_options_from_a_dataclass(capsys):
    argv = ["--steps", "3", "--tasks", "a", "b", "--bucket-size", "large", "--fast"]
    options = parse_fields(Options, "doc", argv)
    assert options == Options(3, 0.5, ["a", "b"], "large", True) and parse_fields(Options, "doc", []) == Options()
    with pytest.raises(SystemExit):
        parse_fields(Options, "doc", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--bucket-size" in shown and "a share, in % (default: 0.5)" in shown
    for reason, check, limits in (
            ("--steps 3: must be at least 4", check_least, dict(steps=4)),
            ("--bucket-size large: choose from small", check_words, dict(bucket_size=("small",))),
            ("--tasks b: choose from a", check_words, dict(tasks=("a",)))):
        with pytest.raises(UserError, match=reason):
            check(options, **limits)
    with pytest.raises(UserError, match="--share 1.5: a share is 0 to 1"):
        check_shares(Options(share=1.5), "share")
    check_least(options, steps=3), check_words(options, tasks=("a", "b")), check_shares(options, "share")


def test_arrows_point_one_way():
    """tools/ -> scripts -> lib/: lib imports no script, and nobody imports train.py."""
    scripts = {"model", "data", "curriculum", "train", "sample", "evaluate"}
    imported = {path: set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M))
                for folder in (".", "lib", "tools") for path in (ROOT / folder).glob("*.py")}
    assert len(imported) > 20
    for path, names in imported.items():
        assert "train" not in names and "tools" not in names, path
        assert path.parent.name != "lib" or not names & scripts, path
