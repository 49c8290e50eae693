"""One page about a run, to be opened in any browser: stickers that move, given frames, losses, curriculum, results.

    python tools/report.py runs/demo                     # -> runs/demo/report.html

Shows what is in the run folder: log.jsonl, stickers/*.webp (of `sample.py --out RUN/stickers/`), eval.json and the
clips that evaluate.py made for it. Everything is inside the one file; nothing is fetched.
"""
import argparse
import base64
import html
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from data import TASKS, eval_mask  # noqa: E402
from lib.media.pictures import save  # noqa: E402
from lib.metrics.tables import all_of  # noqa: E402
from lib.run.files import UserError, atomic_write, check_outputs, read_json, read_jsonl, run_cli  # noqa: E402

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .8rem 0; }
.grid { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 9rem; }
figcaption { font-size: .85rem; }
img.sticker { width: 64px; background: white; }
img.dark { background: #223; }
img.frame { width: 48px; background: white; border: 2px solid transparent; }
img.given { border-color: #36f; }
svg { max-width: 100%; height: auto; background: white; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { border: 1px solid #8888; padding: .2rem .5rem; white-space: nowrap; text-align: left; }
"""


def uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def animated(clip):
    """(T, S, S, 4) -> an animated WebP's bytes."""
    return save([Image.fromarray(frame) for frame in clip], "WEBP", 125, lossless=True, exact=True)


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def image(content, kind, classes, alt):
    return f'<img src="{uri(content, kind)}" class="{classes}" alt="{html.escape(alt, quote=True)}">'


def stickers(folder):
    """The stickers of a folder on white and on dark, each with its name."""
    figures = []
    for path in sorted(folder.glob("*.webp")):
        both = "".join(image(path.read_bytes(), "webp", f"sticker{ground}", path.stem) for ground in ("", " dark"))
        figures.append(f"<figure>{both}<figcaption>{html.escape(path.stem.replace('-', ' '))}</figcaption></figure>")
    return f'<div class="grid">{"".join(figures)}</div>' if figures else (
        f"<p>No stickers yet: <code>python sample.py --model {html.escape(str(folder.parent))}/model.safetensors "
        f"--prompt ... --out {html.escape(str(folder))}/</code> makes them.</p>")


def strip(clip, mask, label):
    """A clip that moves, and its frames, the given ones framed."""
    frames = "".join(image(png(frame), "png", "frame given" if given else "frame", f"frame {i}")
                     for i, (frame, given) in enumerate(zip(clip, mask)))
    cells = html.escape(label), image(animated(clip), "webp", "sticker", label), frames
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def clips(run, report, count):
    """The first clips of each task that evaluate.py made, above the ground truth; they come from its cache."""
    options = ["--run", run, "--data", report["data"], "--split", report["split"], "--n", report["n"],
               "--seed", report["seed"], *(["--groups", *report["groups"]] if report["groups"] else [])]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in report["asked"].items()]
    args = evaluate.parse([str(option) for option in options])
    made = evaluate.Run(run, args)
    test = evaluate.EvalSet(args, made.sampler.T, made.sampler.size)
    parts = []
    for task in report["tasks"]:
        mask, found = eval_mask(task, test.T, test.T), made.clips(task, test)
        rows = [strip(found[k], mask, test.captions[k]) + strip(test.clips[k], 0 * mask, "ground truth")
                for k in range(min(count, len(found)))]
        parts.append(f'<h3>{task}</h3><div class="wide"><table>{"".join(rows)}</table></div>')
    return "".join(parts)


def table(markdown):
    """A markdown table as HTML."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
             for row, tag in ((head, "th"), *((row, "td") for row in rows))]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def plot(curves, title):
    """{label: (steps, values)} -> an inline SVG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axis = plt.subplots(figsize=(6.4, 3), layout="constrained")
    for label, (steps, values) in curves.items():
        axis.plot(steps, values, label=label, linewidth=1.2)
    axis.set(title=title, xlabel="step")
    axis.legend(fontsize=7, ncols=2)
    file = io.StringIO()
    fig.savefig(file, format="svg")
    plt.close(fig)
    return file.getvalue()[file.getvalue().index("<svg"):]


def smooth(values, width):
    """Means over neighbouring log lines, shorter at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plots(log):
    """Loss, loss by task and by timestep decile, entropy and r, of a run's log lines."""
    def curve(values):
        pairs = [(line["step"], value) for line in log if (value := values(line)) is not None]
        steps, found = zip(*pairs) if pairs else ((), ())
        return steps, smooth(found, max(1, len(found) // 40)) if found else ()
    panels = {
        "loss": {"loss": curve(lambda line: line["loss"])},
        "loss by task": {task: curve(lambda line, task=task: line["tasks"].get(task)) for task in TASKS},
        "loss by timestep decile": {f"t in {d}00..{d}99": curve(lambda line, d=d: line["deciles"].get(str(d)))
                                    for d in range(10)},
        "curriculum: expected sample entropy, ease r": {
            name: curve(lambda line, name=name: line.get(name)) for name in ("entropy", "entropy_all", "r")}}
    drawn = {title: {name: c for name, c in curves.items() if len(c[0])} for title, curves in panels.items()}
    figures = "".join(f"<div>{plot(curves, title)}</div>" for title, curves in drawn.items() if curves)
    return f'<div class="grid">{figures}</div>'


def page(run, count):
    """The HTML of a run folder."""
    if not (run / "log.jsonl").is_file():
        raise UserError(f"{run}: no run folder of train.py (it has no log.jsonl)")
    log = [line for _, line in read_jsonl(run / "log.jsonl") if "step" in line]
    trained, report = read_json(run / "config.json").get("train", {}), read_json(run / "eval.json")
    facts = f"{trained.get('stage')} stage, preset {trained.get('preset')}, data {' '.join(trained.get('data', []))}"
    steps = f"{log[-1]['step']} of {trained.get('steps')} steps" if log else "no step yet"
    cpu = sum(line.get("cpu_s", 0) for line in log)
    parts = [f"<h1>{html.escape(str(run))}</h1><p>{html.escape(facts)}; {steps}; CPU time {cpu:,.0f} s.</p>",
             "<h2>Stickers</h2>", stickers(run / "stickers")]
    if report:
        parts += ["<h2>Given frames</h2><p>Framed frames are given, the others drawn by the network.</p>",
                  clips(run, report, count), f"<h2>Results</h2><p>{html.escape(report['protocol'])}</p>"]
        parts += map(table, all_of(report))
        parts += [f"<p>{html.escape(line)}</p>" for line in report["metrics"]]
    else:
        parts.append(f"<p>Not evaluated: <code>python evaluate.py --run {html.escape(str(run))}</code> adds held-out "
                     "clips and tables.</p>")
    parts += ["<h2>Training</h2>", plots(log) if log else "<p>No log line yet.</p>"]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.name)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f'<body>{"".join(parts)}</body></html>')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    parser.add_argument("--clips", type=int, default=3, help="held-out clips of each task (default: %(default)s)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    check_outputs([("--out", out)])
    content = page(args.run, args.clips)
    atomic_write(out, lambda path: path.write_text(content, encoding="utf-8"))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
