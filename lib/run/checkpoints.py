"""A run folder's files: the newest checkpoint that can be read, the options that it was started with, its log."""
import contextlib
import json
import os
import sys
from dataclasses import asdict

from lib.nets.weights import read_checkpoint
from lib.run.files import UserError, atomic_write, clutter, first_line, lock, write_json
from lib.run.options import flag


@contextlib.contextmanager
def lock_run(run):
    """Keep other processes out of the run folder, and remove what a killed one left half-written.

    UserError: the folder holds something else than a run."""
    held = [path.name for path in run.iterdir() if path.suffix != ".tmp"] if run.is_dir() else []
    if any(name not in ("lock", "lock.soft") and not clutter(name) for name in held) and "config.json" not in held:
        raise UserError(f"--out {run}: holds other files ({', '.join(sorted(held)[:3])}); name a new folder")
    with lock(run / "lock", f"--out {run}"):
        for path in run.glob("*.tmp"):
            path.unlink()
        yield


def states(run):
    """Paths of the checkpoints that are there, the newest first."""
    return [path for path in (run / "state.pt", run / "state.prev.pt") if path.is_file()]


def read_state(run, remove_damaged=False):
    """The newest checkpoint that can be read; None where there is none yet, UserError where none can be read.

    remove_damaged: else the next save would put a damaged state.pt in the place of the good state.prev.pt."""
    damaged = []
    for path in states(run):
        try:
            state = read_checkpoint(path)
        except Exception as error:               # a damaged file may raise nearly anything
            print(f"{path}: not readable ({first_line(error)}); trying the one before", file=sys.stderr)
            damaged.append(path)
            continue
        for old in damaged if remove_damaged else ():
            old.unlink(missing_ok=True)
        return state
    if damaged:
        names = " and ".join(path.name for path in damaged)
        raise UserError(f"{run}: {names} cannot be read; remove the folder, or name another --out")
    return None


def flat(tree, prefix=""):
    """{a: {b: 1}} -> {"a.b": 1}, with lists for tuples as JSON has them."""
    found = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return json.loads(json.dumps(found))


def read_config(run):
    """config.json of a run: dict(train, model, inputs, precision, world)."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
        parts = {name: dict(config[name]) for name in ("train", "model", "inputs")}
        return dict(parts, precision=str(config["precision"]), world=config.get("world"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: missing or damaged ({first_line(error)}), so that nobody knows what was trained "
                        "here; put it back, or name another --out") from None


def shown(value):
    """An option's value as it is written on a command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def check_same_config(run, config, may_change, defaults, names=None):
    """Refuse to go on with another training; how, where and from which copy it runs may change: options and fields of
    the model in may_change.

    config: of the command that is to go on, as read_config returns it. defaults: of options that are newer than the
    run. names: {input: other names of it}. -> (the run's precision, what changed)."""
    old, other, changed = read_config(run), "name another --out", []
    started, inputs, model = {**defaults, **old["train"]}, old["inputs"], flat(old["model"])
    for name, value in dict(config["train"], precision=old["precision"]).items():
        if started[name] != value and name not in may_change:
            raise UserError(f"{flag(name)} {shown(value)}: {run} was started with {shown(started[name])}; go on with "
                            f"that, or {other}")
        if started[name] != value and name not in ("out", "precision"):
            changed.append(f"{flag(name)} {shown(value)} instead of {shown(started[name])}")
    if config["precision"] not in ("auto", old["precision"]):
        raise UserError(f"--precision {config['precision']}: {run} was started in {old['precision']}; "
                        f"go on with that, or {other}")
    for name, value in flat(config["model"]).items():
        if model.get(name) != value and name not in may_change:
            raise UserError(f"{run}: started when {name} was {model.get(name)}, it is {value} now; {other}")
    for name in {**inputs, **config["inputs"]}:
        was, now = inputs.get(name, "none"), config["inputs"].get(name, "none")
        if was != now and was not in (names or {}).get(name, ()):
            raise UserError(f"{flag(name)} {shown(config['train'].get(name))}: not what {run} was started with "
                            f"(hash {str(now)[:12]}, was {str(was)[:12]}); {other}")
    if old["world"] != config["world"]:
        changed.append(f"{config['world']} processes instead of {old['world']}")
    return old["precision"], changed


def check_equal(file, found, wanted, free=()):
    """UserError for a model file whose configuration is not the wanted one. free: fields that may differ."""
    for name, value in asdict(wanted).items():
        if getattr(found, name) != value and name not in free:
            raise UserError(f"{file}: trained with {name} {getattr(found, name)}, the preset has {value}")


def step_of(line):
    """Step of a log line; infinite for a line that a killed process or a broken disk left."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return float("inf")


def write_config(run, config, step):
    """Write config.json, and drop log lines after the checkpoint of this step: those steps are run again."""
    log = run / "log.jsonl"
    if log.is_file():
        lines = [line + "\n" for line in log.read_text(errors="replace").splitlines() if step_of(line) <= step]
        atomic_write(log, lambda temporary: temporary.write_text("".join(lines)))
    write_json(run / "config.json", config)


def append(log, line=None, durably=False):
    """Add a JSON line to the log, or wait until its lines are on the disk."""
    try:
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n" if line else "")
            file.flush()
            if durably:
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{log}: cannot be written ({error.strerror}); the same command goes on from the last "
                        "checkpoint") from None
