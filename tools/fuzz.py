"""Read mutated sticker files in a process with limits of time and memory, and count what happens.

    python tools/fuzz.py FOLDER --n 2000 --seed 0

FOLDER holds good GIF, WebP, PNG, APNG or JPEG files. Mutant i of a seed is the same everywhere. Status 1 where one
crashed the reader, needed more than MEMORY, or hung."""
import argparse
import multiprocessing
import random
import sys
import zlib
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.media.pictures import FORMATS, MAX_PIXELS, read_animation  # noqa: E402
from lib.run.files import UserError, first_line, run_cli  # noqa: E402

SECONDS = 60                                     # more than that is a hang
MEMORY = int(8 * MAX_PIXELS) + 2**31             # bytes of address space: its frames twice, and the libraries
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def mend_png(content):
    """The PNG with right checksums: without them Pillow refuses most mutants before it looks inside."""
    out, at = content[:8], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        out += content[at:end] + zlib.crc32(content[at + 4:end]).to_bytes(4, "big")
        at = end + 4
    return out + content[at:]


def mutate(content, other, rng):
    """One change: a bit, a number, a cut, a part doubled or removed, or the tail of another file."""
    kind = rng.choice(("bit", "number", "header", "cut", "double", "remove", "splice"))
    at, size = rng.randrange(min(len(content), 64) if kind == "header" else len(content)), rng.choice((1, 2, 4))
    end = at + rng.randrange(1, 200)
    if kind in ("number", "header"):
        value = rng.choice(EXTREMES) % 2 ** (8 * size)
        return content[:at] + value.to_bytes(size, rng.choice(("big", "little"))) + content[at + size:]
    return dict(bit=content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:], cut=content[:at],
                double=content[:end] + content[at:], remove=content[:at] + content[end:],
                splice=content[:at] + other[rng.randrange(len(other)):])[kind]


def mutant(files, seed, i):
    """(name, bytes) of mutant i: one to three changes to one of the files."""
    rng = random.Random(f"{seed} {i}")
    path, other = rng.choice(files), rng.choice(files).read_bytes()
    content = path.read_bytes()
    for _ in range(rng.randint(1, 3)):
        content = mutate(content, other, rng) or b"\0"
    if path.suffix.lower() in (".png", ".apng") and rng.random() < 0.8:
        content = mend_png(content)
    return f"{i}-{path.name}", content


def read(content):
    """What becomes of it, as a word and a reason."""
    try:
        frames, durations = read_animation(content)
        good = len(frames) == len(durations) > 0 and min(durations) > 0 and frames.dtype == "uint8"
        return ("read", "") if good else ("crashed", f"frames {frames.shape}, durations {durations}")
    except UserError as error:
        return "crashed" if "MemoryError" in str(error) else "refused", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {first_line(error)}"


def worker(pipe):
    import resource  # of POSIX alone, as the limit is
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        pipe.send(read(pipe.recv_bytes()))


class Reader:
    """A process that reads what it is given; a new one where it died or hung."""

    def __init__(self):
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=worker, args=(end,), daemon=True)
        self.process.start()
        end.close()

    def read(self, content):
        self.pipe.send_bytes(content)
        try:
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            result = "hung", f"more than {SECONDS} s"
        except EOFError:
            self.process.join()
            result = "crashed", f"the process ended with {self.process.exitcode}"
        self.process.kill()
        self.__init__()
        return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="good files")
    parser.add_argument("--n", type=int, default=2000, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    files = [p for p in sorted(Path(args.folder).rglob("*")) if p.suffix.lower() in FORMATS and p.stat().st_size]
    if not files:
        raise UserError(f"{args.folder}: no {', '.join(FORMATS)} files")
    counts, reader = Counter(refused=0, read=0, crashed=0, hung=0), Reader()
    for i in tqdm(range(args.n), "mutants"):
        name, content = mutant(files, args.seed, i)
        result, reason = reader.read(content)
        counts[result] += 1
        if result in ("crashed", "hung"):
            print(f"{name}: {result}: {reason}")
    total = ", ".join(f"{n} {result}" for result, n in counts.items())
    print(f"{args.n} mutants of {len(files)} files, seed {args.seed}: {total}")
    return int(counts["crashed"] + counts["hung"] > 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
