"""Errors that a user can put right, atomic writes, locks, JSON lines, and the one resumable cache of rows."""
import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock, SoftFileLock, Timeout
from tqdm import tqdm

MAX_LINE = 2**20                                 # bytes of a line of JSON


class UserError(Exception):
    """Something the user can put right; its message names the option or file and says what to do."""


class Console:
    """A stream that people read: what it cannot show or write (gone, closed, full) is never worth the work."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def open_consoles():
    """Put a Console in the place of stdout and stderr; letters that its code page lacks are shown as escapes.

    A standard stream that was closed, or that a service does not have, is the null device: the next file to be opened
    would get its number, and what libraries say of themselves."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)       # it takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream if isinstance(stream, Console) else Console(stream))


def run_cli(main):
    """Run `main()`. A UserError or what the system refuses becomes one line on stderr and exit code 2, Ctrl-C one line
    and 130."""
    open_consoles()
    status = 2
    try:
        return main()
    except UserError as error:
        message = str(error)
    except MemoryError as error:
        message = f"out of memory {error}".strip()
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + signal.SIGINT
    except FileExistsError as error:
        message = f"{error.filename}: a file is in the way of a folder of this name"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"disk full: {error.filename or 'free some space'}"
        else:
            message = f"{error.filename or type(error).__name__}: {error.strerror or error}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def first_line(error):
    """The first line of an error's text, cut to 240 characters."""
    return str(error).partition("\n")[0][:240]


# ---- JSON
def numbered_lines(path):
    """Yield (line number, bytes) of a file, one line in memory at a time. UserError: a line longer than MAX_LINE."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, line {number}: longer than {MAX_LINE} bytes; mend or remove it")
            yield number, line


def parse_line(path, number, line):
    """One line of a JSON-lines file -> dict. UserError names the line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: not a JSON object")
    return value


def read_jsonl(path):
    """Yield (line number, dict) of a JSON-lines file."""
    for number, line in numbered_lines(path):
        yield number, parse_line(path, number, line)


def read_json(path):
    """The object in a file that this project wrote; an empty one where the file is missing or damaged."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def json_hash(value):
    """SHA-256 of a value as JSON has it, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- writing
def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clutter(name):
    """Is a file of this name what systems, shells and schedulers leave in a folder, not somebody's work?"""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini") or (
        Path(name).suffix.lower() in (".log", ".out", ".err", ".txt"))


def real_folder(path):
    """The folder that a link leads to, there or not yet; another path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def sync_folder(folder):
    """Make the names in a folder durable, where the system can (not Windows, not every network file system)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_durably(temporary, path, backup=None):
    """Rename a written file to `path` once its bytes are on the disk. backup: new name of the file that was there."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if backup and Path(path).exists():
        os.replace(path, backup)
    os.replace(temporary, path)
    sync_folder(Path(path).parent)


def atomic_write(path, write, backup=None):
    """write(temporary path), then rename: a reader sees the old file or the whole new one.

    backup: new name of the file that was there. UserError where it cannot be written; the old file then stays."""
    path = os.path.realpath(path)                        # the file that a link leads to, not the link, is replaced
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        rename_durably(temporary, path, backup)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)            # on a full disk it is in the way
        if isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError":
            cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
            reason = getattr(cause, "strerror", None) or first_line(cause)
            raise UserError(f"{path}: cannot be written ({reason}); what was there before stays") from None
        raise


def check_outputs(outputs, inputs=()):
    """Refuse, before anything slow, what cannot be written or would replace an input. Both: (option, path) pairs, an
    empty path stands for none. UserError names the option."""
    for option, path in outputs:
        if not path:
            continue
        path = Path(path)
        if path.is_dir():
            raise UserError(f"{option} {path}: a folder is there; name a file")
        for other, given in inputs:
            if given and path.exists() and os.path.exists(given) and os.path.samefile(path, given):
                raise UserError(f"{option} {path}: is the file of {other}, which it would replace; name another")
        folder = next(parent for parent in (path.absolute()).parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {folder} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{option} {path}: {folder} cannot be written to")


def write_bytes(path, content):
    """A file of this name, whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def write_json(path, value):
    """Write a value as JSON, atomically; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def file_lock(path):
    """A lock on a file, which the system frees; where the folder's file system has none (Lustre, NFS, FUSE), a file
    beside it that names its holder, and is taken over when that process is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)   # FileLock takes a folder without room for it for a held lock
    try:
        import fcntl  # not on Windows
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):                  # else somebody holds it
            return SoftFileLock(f"{path}.soft")
    finally:
        os.close(descriptor)
    return FileLock(str(path))


@contextlib.contextmanager
def lock(path, what, wait=False):
    """Hold the lock file `path` while inside; it is free again when the process ends, however it ends.

    UserError where another process holds it, as that is writing `what`; with `wait` it is waited for."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    held = file_lock(path)
    gone = f" (if there is none, remove {held.lock_file})" if isinstance(held, SoftFileLock) else ""
    busy = f"{what} is being written by another process{gone}"
    try:
        held.acquire(timeout=0 if wait else 3)   # a killed process's children may hold it a moment longer
    except Timeout:
        if not wait:
            raise UserError(f"{busy}; wait until it is done, or write somewhere else") from None
        print(f"{busy}: waiting for it", file=sys.stderr, flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def map_rows(path, n, shape, dtype):
    """Read-only memory map (n, *shape) of a file that `rows` wrote. UserError: of another length."""
    size = n * int(np.prod(shape)) * np.dtype(dtype).itemsize
    if Path(path).stat().st_size != size:
        raise UserError(f"{path}: {Path(path).stat().st_size} bytes, {size} expected; remove it, and it is made again")
    return np.memmap(path, dtype, "r", shape=(n, *shape)) if size else np.zeros((n, *shape), dtype)


def cache_path(folder, name, made_of):
    """folder/NAME-HASH.bin, where rows are cached; the hash is of `made_of`, all that they depend on (JSON)."""
    return Path(folder) / f"{name}-{json_hash(made_of)[:16]}.bin"


def rows(path, n, shape, dtype, batch, make, progress=None):
    """Read-only memory map (n, *shape) of cached rows, made where they are missing.

    make(slice) returns the rows of a slice, `batch` at a time. They gather in PATH.part: a killed process leaves its
    whole rows there and the next one goes on behind them, with the same slices, as rounding may depend on them; a
    second process waits for the first. progress: the label of a progress bar."""
    path, part = Path(path), Path(f"{path}.part")
    if not path.is_file():
        with lock(f"{path}.lock", path, wait=True):
            if not path.is_file():
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                with open(part, "ab") as file:
                    done = min(file.tell() // size, n)
                    file.truncate(done * size)
                    starts = range(done - done % batch, n, batch) if done < n else ()
                    for start in tqdm(starts, progress, disable=progress is None, delay=1, mininterval=2):
                        made = np.ascontiguousarray(make(slice(start, min(start + batch, n))), dtype)
                        if made.shape != (min(batch, n - start), *shape):
                            raise UserError(f"{path}: {made.shape} came for rows {start} and on of {(n, *shape)}")
                        file.write(made[max(done - start, 0):].data)
                        file.flush()
                rename_durably(part, path)
    return map_rows(path, n, shape, dtype)
