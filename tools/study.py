"""The user study of the paper's Table 5: a page on which people rank stickers blind, and the table of their answers.

    python tools/study.py page runs/a runs/b --out out/study.html --n 20     # then any options of evaluate.py
    python tools/study.py results study-*.json --key out/study.key.json

The page needs no network. It shows each input with the stickers that the runs made for it, in random order, and lets
participants download their rankings; the .key.json beside it alone tells which sticker is whose.
"""
import argparse
import base64
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from data import eval_mask  # noqa: E402
from lib.media.pictures import write_animation  # noqa: E402
from lib.metrics.tables import markdown, with_interval  # noqa: E402
from lib.run.files import UserError, atomic_write, json_hash, run_cli, write_json  # noqa: E402

CRITERIA = dict(text="Which fits the text best?", interest="Which is the most interesting?", motion="Which moves best?")


def require(fact, message):
    if not fact:
        raise UserError(message)


def hash_of(value):
    return json_hash(value)[:16]


# ---- the page
def data_uri(frames, duration):
    """(T, S, S, 4) uint8 straight RGBA -> data URI of a lossless WebP; one frame: a still."""
    with tempfile.TemporaryDirectory() as folder:
        write_animation(file := Path(folder) / "sticker.webp", frames, [duration] * len(frames))
        return "data:image/webp;base64," + base64.b64encode(file.read_bytes()).decode()


def check_methods(methods):
    require(2 <= len(set(methods)) == len(methods) <= 26,
            f"page {' '.join(methods)}: 2 to 26 methods of different names can be ranked")


def blind(k, x, methods, seed, duration):
    """Input k as the page shows it, methods hidden by codes and shuffled, and as the key has it."""
    order = np.random.default_rng((seed, k)).permutation(len(methods))
    codes = {hash_of([seed, k, x["caption"], methods[i]]): methods[i] for i in order}
    stickers = [dict(code=code, image=data_uri(x["clips"][method], duration)) for code, method in codes.items()]
    given = [data_uri(frame[None], duration) for frame in x["given"]]
    return dict(caption=x["caption"], given=given, stickers=stickers), dict(caption=x["caption"], codes=codes)


def write_study(path, inputs, methods, seed, duration=125):
    """Write the page, and PATH.key.json, which alone tells the methods. The same arguments write the same bytes.

    inputs: [{caption, given: stills (S, S, 4) or empty, clips: {method: (T, S, S, 4)}}], uint8 straight RGBA; duration:
    ms a frame. UserError: not 2 to 26 methods of different names, no input, a blank caption, a sticker missing."""
    check_methods(methods)
    for k, x in enumerate(inputs, 1):
        require(x["caption"].strip(), f"page: input {k} has no caption, so nobody can rank how stickers fit the text")
        require(set(methods) <= set(x["clips"]), f"page: input {k}, {x['caption']!r}, lacks a sticker of some method")
    shown, key = zip(*(blind(k, x, methods, seed, duration) for k, x in enumerate(inputs)))
    criteria = [dict(name=name, question=question) for name, question in CRITERIA.items()]
    page = dict(id=hash_of([CRITERIA, shown]), criteria=criteria, inputs=shown)
    content = json.dumps(page).replace("<", "\\u003c")          # a caption may hold </script>
    html = Path(__file__).with_name("study.html").read_text("utf-8").replace("__STUDY__", content)
    secret = dict(study=page["id"], seed=seed, criteria=list(CRITERIA), methods=list(methods), inputs=key)
    write_json(Path(path).with_suffix(".key.json"), secret)
    atomic_write(path, lambda p: p.write_text(html, "utf-8"))


def make_page(folders, out, options):
    """A page that compares runs, for the first concepts of the test; options: of evaluate.py."""
    methods = [Path(folder).resolve().name for folder in folders]
    check_methods(methods)                       # before the sampling, which takes minutes
    args = evaluate.parse(["--n", "20", "--tasks", "it2v", *options])
    runs, inputs = [evaluate.Run(folder, args) for folder in folders], []
    sizes = {(run.sampler.T, run.sampler.size) for run in runs}
    require(len(sizes) == 1, f"page {' '.join(folders)}: frames and pixels differ, {sorted(sizes)}")
    test = evaluate.EvalSet(args, *sizes.pop())
    for task in args.tasks:
        made, given = [run.clips(task, test) for run in runs], np.flatnonzero(eval_mask(task, test.T, test.T))
        for k, caption in enumerate(test.captions):
            clips = {method: clips[k] for method, clips in zip(methods, made)}
            inputs.append(dict(caption=caption, given=list(test.clips[k][given]), clips=clips))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_study(out, inputs, methods, args.seed)
    print(f"{out}: {len(inputs)} inputs, {len(methods)} methods; give this file to participants",
          f"{out.with_suffix('.key.json')}: which sticker is whose; keep it", sep="\n")


# ---- the answers
def read_object(path, *fields):
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})") from None
    whole = isinstance(value, dict) and set(fields) <= set(value)
    require(whole, f"{path}: not a JSON object with {', '.join(fields)}")
    return value


def read_answers(path, key):
    """A file -> participant, scores (inputs, criteria, methods): of m methods the best has m, the worst 1."""
    result, methods, criteria = read_object(path, "study", "participant", "answers"), key["methods"], key["criteria"]
    require(result["study"] == key["study"], f"{path}: answers to another study than {key['study']}")
    participant, answers, n = result["participant"], result["answers"], len(key["inputs"])
    require(isinstance(participant, str) and participant, f"{path}: does not say who the participant is")
    whole = isinstance(answers, list) and all(isinstance(a, dict) and set(a) == set(criteria) for a in answers)
    require(whole and len(answers) == n, f"{path}: does not answer {', '.join(criteria)} for each of the {n} inputs")
    scores = np.zeros((n, len(criteria), len(methods)))
    for k, (answer, codes) in enumerate(zip(answers, (x["codes"] for x in key["inputs"]))):
        for c, ranking in enumerate(answer[criterion] for criterion in criteria):
            once = isinstance(ranking, list) and len(ranking) == len(codes) and all(code in ranking for code in codes)
            require(once, f"{path}: input {k + 1}, {criteria[c]}, does not rank each sticker exactly once")
            scores[k, c, [methods.index(codes[code]) for code in ranking]] = range(len(methods), 0, -1)
    return participant, scores


def two_way_bootstrap(scores, draws=2000, seed=0):
    """95 % intervals (2, ...) of the mean of scores (participants, inputs, ...), both resampled; rather too wide."""
    rng = np.random.default_rng(seed)
    people, inputs = (rng.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in scores.shape[:2])
    means = np.einsum("dp,di,pi...->d...", people, inputs, scores, optimize=True)
    return np.percentile(means, (2.5, 97.5), axis=0)


def study_results(key_path, result_paths):
    """-> {participants, inputs, scores: {method: {criterion: {value, interval}}}}: mean rank scores, more is better.

    UserError: not JSON, of another study, a ranking missing or not whole, a participant twice."""
    key, files, scores = read_object(key_path, "study", "criteria", "methods", "inputs"), {}, []
    require(result_paths, f"results: no answers to the study of {key_path}")
    for path in result_paths:
        participant, of_one = read_answers(path, key)
        require(participant not in files, f"{path}: participant {participant} is in {files.get(participant)} already")
        files[participant] = path
        scores.append(of_one)
    scores = np.stack(scores)                    # (participants, inputs, criteria, methods)
    mean, (low, high), table = scores.mean((0, 1)), two_way_bootstrap(scores), {}
    for m, method in enumerate(key["methods"]):
        table[method] = {criterion: dict(value=mean[c, m].item(), interval=(low[c, m].item(), high[c, m].item()))
                         for c, criterion in enumerate(key["criteria"])}
    return dict(participants=len(scores), inputs=scores.shape[1], scores=table)


def study_table(results):
    """Markdown: who was asked, a row for each method of the study or of the paper, why the two scales differ."""
    scores, paper, m = results["scores"], evaluate.PAPER["table5_user_study"]["rows"], len(results["scores"])
    rows = []
    for method in dict.fromkeys([*scores, *paper]):
        ours = [with_interval(**scores[method][c]) if method in scores else "-" for c in CRITERIA]
        rows.append([method, *ours, *(f"{paper[method][c]:.2f}" if method in paper else "-" for c in CRITERIA)])
    head = (f"participants: {results['participants']}, inputs: {results['inputs']}; mean rank, best of {m} = {m}, "
            "worst = 1; 95 % intervals over both")
    note = (f"Each column of ours sums to {m * (m + 1) // 2}, of the paper's to 8.0 (motion: 7.99) over 4 methods, "
            "where ranks 1 to 4 sum to 10: its scale is another. Compare the order of the methods, not the numbers.")
    return "\n\n".join([head, markdown(["method", *CRITERIA, *(f"{c}, paper" for c in CRITERIA)], rows), note])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    page, results = commands.add_parser("page"), commands.add_parser("results")
    page.add_argument("runs", nargs="+", help="run folders to compare")
    page.add_argument("--out", type=Path, default=Path("out/study.html"), help="default: %(default)s")
    results.add_argument("files", nargs="+", help="what participants downloaded")
    results.add_argument("--key", required=True, help="the .key.json that was written beside the page")
    args, rest = parser.parse_known_args(argv)
    if args.command == "page":
        return make_page(args.runs, args.out, rest)
    require(not rest, f"results: unknown options {' '.join(rest)}")
    print(study_table(study_results(args.key, [path for path in args.files if not path.endswith(".key.json")])))


if __name__ == "__main__":
    run_cli(main)
