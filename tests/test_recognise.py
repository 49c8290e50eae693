"""tools/recognise.py: files are named by the nearest concept, whatever their format and size."""
import numpy as np
import torch

from lib.judge import Judge, JudgeExtractor
from lib.media import write_animation
from lib.sources import draw_shape
from lib.weights import save_model
from tools import recognise


def test_files_are_named_by_the_nearest_concept(tmp_path, capsys):
    torch.manual_seed(0)
    net, judge_file = Judge(["Red star", "blue circle", "green square"]), tmp_path / "judge.safetensors"
    clips = [draw_shape(name.lower().split()[1], name.lower().split()[0], None, 0)[None] for name in net.concepts]
    save_model(judge_file, net.state_dict(), kind="judge", concepts=net.concepts)
    white = np.stack([np.where(clip[..., 3:] > 127, clip[..., :3], 255) for clip in clips])      # 128 px
    net.places.copy_(torch.from_numpy(JudgeExtractor(judge_file)(white)))
    save_model(judge_file, net.state_dict(), kind="judge", concepts=net.concepts)
    files = {"red-star.webp": 0, "blue-circle.webp": 1, "green-square.gif": 1, "frog.png": 0}   # the third is wrong
    for name, k in files.items():
        write_animation(tmp_path / name, clips[k], [100])
    recognise.main([*(str(tmp_path / name) for name in files), "--judge", str(judge_file)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines[:4]] == [net.concepts[k] for k in files.values()]
    assert lines[0].endswith("(its caption is number 1)") and "number 1" not in lines[2]
    assert lines[3].endswith("(its caption is no concept that the judge has)")
    assert lines[4] == "2 of 4 recognised among 3 concepts"
