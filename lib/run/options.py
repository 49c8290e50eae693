"""A command line from a dataclass: a field is an option, the comment beside it its help. Dataclasses from files."""
import argparse
import inspect
import json
import math
from dataclasses import MISSING, fields

from lib.run.files import UserError


def flag(name):
    """Field name -> option: save_every -> --save-every."""
    return "--" + name.replace("_", "-")


def parse_fields(cls, doc, argv=None):
    """An instance of the dataclass `cls` from the command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines = inspect.getsource(cls).splitlines()
    helps = {line.split(":")[0].strip(): line.split("# ", 1)[1] for line in lines if "# " in line}
    for f in fields(cls):
        default = f.default_factory() if f.default is MISSING else f.default
        kind = dict(type=type(default))
        if isinstance(default, list):
            kind = dict(nargs="*", type=type(default[0]) if default else str)
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        help_text = f"{helps.get(f.name, '')} (default: {default})".replace("%", "%%")
        parser.add_argument(flag(f.name), default=default, help=help_text, **kind)
    return cls(**vars(parser.parse_args(argv)))


def check_words(options, **allowed):
    """UserError for an option (a word, or a list of words) outside the words allowed for it."""
    for name, words in allowed.items():
        value = getattr(options, name)
        for word in value if isinstance(value, list) else [value]:
            if word not in words:
                raise UserError(f"{flag(name)} {word}: choose from {', '.join(words)}")


def check_least(options, **least):
    """UserError for a number below the least that makes sense; None passes."""
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and not limit <= value < math.inf:              # nan is neither
            raise UserError(f"{flag(name)} {value}: must be at least {limit}")


def check_most(options, **most):
    """UserError for a number above the greatest that can be used; None passes."""
    for name, limit in most.items():
        value = getattr(options, name)
        if value is not None and value > limit:
            raise UserError(f"{flag(name)} {value}: must be at most {limit}")


def check_shares(options, *names):
    """UserError for a share, or one of a list, that is not in 0..1."""
    for name in names:
        value = getattr(options, name)
        for share in value if isinstance(value, list) else [value]:
            if not 0 <= share <= 1:
                raise UserError(f"{flag(name)} {share}: a share is 0 to 1")


def check_value(name, value, default):
    """ValueError unless value has the type of `default`: whole numbers below 65,536, up to 16 in a tuple, floats."""
    def whole(x):
        return type(x) is int and 0 <= x < 2 ** 16
    fits = {bool: lambda x: type(x) is bool, str: lambda x: type(x) is str, int: whole,
            float: lambda x: type(x) in (int, float) and abs(x) < 2 ** 16,
            tuple: lambda x: isinstance(x, (list, tuple)) and 0 < len(x) <= 16 and all(map(whole, x))}
    if not fits[type(default)](value):
        raise ValueError(f"{name} is {str(value)[:40]}, not such as {default}")


def dataclass_from_dict(kind, d, name):
    """An instance of a dataclass from what a file says. TypeError, ValueError: fields or types do not fit.

    A field that is newer than the file has its default, which therefore must mean what was done before."""
    for f in fields(kind):
        check_value(f"{name}.{f.name}", d.get(f.name, f.default), f.default)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in d.items()})


def apply_changes(config, changes):
    """{part: {field: value}} with `part.field=value` changes. UserError: no such field, or another type."""
    for change in changes:
        name, _, text = change.partition("=")
        part, _, key = name.partition(".")
        if not isinstance(config.get(part), dict) or key not in config[part]:
            parts = ", ".join(part for part, value in config.items() if isinstance(value, dict))
            raise UserError(f"--set {change}: no field {name!r}; write part.field=value with a part of {parts}")
        old = config[part][key]
        try:
            value = text if isinstance(old, str) else json.loads(f"[{text}]" if isinstance(old, tuple) else text)
            check_value(name, value, old)
        except ValueError:
            raise UserError(f"--set {change}: {text!r} is not a {type(old).__name__}") from None
        config[part][key] = tuple(value) if isinstance(old, tuple) else value
    return config


def check_config(config):
    """ValueError where the parts do not go together."""
    vae, text, dfgn, sampling = config.vae, config.text, config.dfgn, config.sampling
    if dfgn.given not in ("difference", "zeros"):
        raise ValueError(f"dfgn.given {dfgn.given!r} is unknown: difference or zeros")
    if text.kind not in ("small", "minilm", "open_clip"):
        raise ValueError(f"text.kind {text.kind!r} is unknown: small, minilm or open_clip")
    if sampling.order not in (1, 2):
        raise ValueError(f"sampling.order {sampling.order} is unknown: 1 (DDIM) or 2")
    if not 0 <= sampling.eta <= 1:
        raise ValueError(f"sampling.eta is {sampling.eta}, not from 0 to 1")
    if not 1 <= sampling.steps <= config.diffusion.steps:
        raise ValueError(f"sampling.steps is {sampling.steps}, not from 1 to diffusion.steps, {config.diffusion.steps}")
    for ours, a, theirs, b in (("vae.latent_channels", vae.latent_channels, "dfgn.channels", dfgn.channels),
                               ("text.width", text.width, "dfgn.text_width", dfgn.text_width)):
        if a != b:
            raise ValueError(f"{ours} is {a}, {theirs} is {b}; they must be equal")
    unit = vae.factor * 2 ** (len(dfgn.widths) - 1)
    if vae.size % unit:
        raise ValueError(f"vae.size is {vae.size}, not a multiple of {unit} (vae.patch, vae.widths, dfgn.widths)")
    if min(vae.layers, dfgn.layers) < 1:
        raise ValueError("vae.layers and dfgn.layers must be at least 1")
    if min(dfgn.widths) < dfgn.head_dim:
        raise ValueError(f"dfgn.head_dim is {dfgn.head_dim}, dfgn.widths {dfgn.widths} are too narrow for one head")
