"""Reading a prepared set: its meta.json, its frames and its index, of which millions of records cost little memory."""
import functools
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np

from lib.run.files import UserError, json_hash, parse_line, read_json

VERSION = 3                                      # of the format: raise it when the files of a set change
SPLITS = ("train", "val", "test")
WORDLESS = "wordless"                  # group of stickers whose texts are not read in training (data.py varied)

# The end of a line in index.jsonl, frames, numbers of the split (in SPLITS), group (in meta.json) and concept (sorted).
COLUMNS = np.dtype([("end", "u8"), ("n", "u4"), ("split", "u1"), ("group", "u4"), ("concept", "u4")])


def read_meta(folder):
    """meta.json of a prepared set -> dict. UserError: missing, corrupt or of another version."""
    path, advice = Path(folder) / "meta.json", f"remove {folder} and prepare it again"
    if not path.is_file():
        raise UserError(f"{path}: no prepared set here; make one with `python data.py fluent`")
    meta = read_json(path)
    if meta.get("version", VERSION) != VERSION:
        raise UserError(f"{path}: of version {meta['version']}, this program writes {VERSION}; {advice}")
    kinds = dict(size=int, frames=int, stickers=int, shards=list, groups=list, hash=str)
    if not all(isinstance(meta.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path}: corrupt; {advice}")
    return meta


class Frames:
    """All frames of a set, (n, S, S, 4) uint8: a number, a slice or a list of numbers reads an array."""
    def __init__(self, folder, shards, size):
        self.folder, self.lengths, self.ends = Path(folder), shards, np.cumsum(shards)
        self.shape = (sum(shards), size, size, 4)
        self.map = functools.lru_cache(256)(self.map)                        # each map holds a file open

    def map(self, shard):
        path = self.folder / f"frames-{shard:05}.bin"
        return np.memmap(path, np.uint8, "r", shape=(self.lengths[shard], *self.shape[1:]))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            number = range(len(self))[key]
            shard = int(self.ends.searchsorted(number, "right"))
            return np.array(self.map(shard)[number - self.ends[shard]])      # negative: counted from the shard's end
        numbers = range(len(self))[key] if isinstance(key, slice) else key
        return np.array([self[i] for i in numbers], np.uint8).reshape(-1, *self.shape[1:])


class Index(Sequence):
    """The index records of a set, parsed when asked for: two million stickers take 170 MB and open in 1.5 s.

    columns: COLUMNS of each; first: number of its first frame; frames: Frames; meta. UserError: missing or corrupt."""
    def __init__(self, folder):
        self.folder, self.path, self.meta = Path(folder), Path(folder) / "index.jsonl", read_meta(folder)
        try:
            self.frames = Frames(folder, self.meta["shards"], self.meta["size"])
            self.columns = np.lib.format.open_memmap(Path(folder) / "index.npy", "r")
            self.text = np.memmap(self.path, np.uint8, "r")
            self.first = np.cumsum(self.columns["n"], dtype=np.int64) - self.columns["n"]
            self.check(self.columns, self.meta)
        except Exception as error:               # a damaged header can make NumPy raise nearly anything
            raise UserError(f"{folder}: {error}; remove the set and prepare it again") from None
        self.rows = np.arange(len(self.columns))

    def check(self, columns, meta):
        """ValueError: the files do not fit each other."""
        if columns.dtype != COLUMNS or columns.shape != (meta["stickers"],) or (
                not columns["n"].sum() == meta["frames"] == len(self.frames) or
                columns["split"].max() >= len(SPLITS) or columns["group"].max() >= len(meta["groups"])):
            raise ValueError("index.npy does not fit meta.json")
        if (np.diff(columns["end"].astype(np.int64), prepend=0) <= 0).any() or columns["end"][-1] != len(self.text):
            raise ValueError("index.jsonl does not fit index.npy")
        for shard, n in enumerate(meta["shards"]):
            path = self.frames.folder / f"frames-{shard:05}.bin"
            if path.stat().st_size != 4 * n * meta["size"] ** 2:
                raise ValueError(f"{path.name} is of the wrong length")

    def select(self, rows):
        """The records of these rows alone."""
        part = copy(self)
        part.rows = rows
        return part

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.read(int(self.rows[i]))

    def read(self, row):
        start, end = int(self.columns["end"][row - 1]) if row else 0, int(self.columns["end"][row])
        record = parse_line(self.path, row + 1, self.text[start:end].tobytes())
        if (record.get("first"), record.get("n")) != (self.first[row], self.columns["n"][row]):
            raise UserError(f"{self.path}, line {row + 1}: does not fit index.npy; prepare the set again")
        return record


class Members(Sequence):
    """For each concept, in order, an array of its records' numbers. concept: (n,), of each record; only: of these."""
    def __init__(self, concept, only=None):
        only = np.arange(len(concept)) if only is None else only
        self.order = only[np.argsort(concept[only], kind="stable")]
        self.starts = np.append(np.flatnonzero(np.diff(concept[self.order], prepend=-1)), len(only))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.order[self.starts[i]:self.starts[i + 1]]


class Chain:
    """Arrays, one behind the other: a number, or a list or array of numbers, reads rows."""
    def __init__(self, parts):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, numbers):
        if np.ndim(numbers):
            return np.stack([self[i] for i in numbers])
        part = int(self.ends.searchsorted(numbers, "right"))
        return self.parts[part][numbers - self.ends[part]]                   # negative: counted from the part's end


class JoinedIndex(Index):
    """The indexes of several sets as one: concepts and groups of one name are one, `first` counts on through all.

    UserError: missing or corrupt, or of different sizes."""
    def __init__(self, folders):
        self.parts = [Index(folder) for folder in folders]
        self.folder, self.path = Path(folders[0]), ", ".join(str(part.path) for part in self.parts)
        sizes, self.ends = [part.meta["size"] for part in self.parts], np.cumsum([len(part) for part in self.parts])
        if len(set(sizes)) > 1:
            raise UserError(f"--data {' '.join(map(str, folders))}: of {', '.join(map(str, sizes))} px; prepare them "
                            "with one --size")
        self.frames, self.rows = Chain([part.frames for part in self.parts]), np.arange(self.ends[-1])
        groups = list(dict.fromkeys(name for part in self.parts for name in part.meta["groups"]))
        names = [self.names(part) for part in self.parts]
        numbers = {name: i for i, name in enumerate(sorted(set().union(*names)))}
        self.columns = np.concatenate([part.columns for part in self.parts])
        for part, named, columns in zip(self.parts, names, np.split(self.columns, self.ends[:-1])):
            columns["group"] = np.array([groups.index(name) for name in part.meta["groups"]])[columns["group"]]
            columns["concept"] = np.array([numbers[name] for name in named])[columns["concept"]]
        self.meta = dict(size=sizes[0], frames=len(self.frames), groups=groups,
                         hash=json_hash([part.meta["hash"] for part in self.parts]))

    @staticmethod
    def names(part):
        """Names of an index's concepts, in the order of their numbers."""
        return [part[int(row)]["concept"] for row in np.unique(part.columns["concept"], return_index=True)[1]]

    def read(self, row):
        part = int(self.ends.searchsorted(row, "right"))
        record = self.parts[part][row - (self.ends[part] - len(self.parts[part]))]
        return dict(record, first=record["first"] + int(self.frames.ends[part]) - len(self.parts[part].frames))
