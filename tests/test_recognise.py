"""tools/recognise.py: files are named by the nearest concept, whatever their format and size."""
import numpy as np
import torch

from lib.media.pictures import write_animation
from lib.media.sources import draw_shape
from lib.metrics.judge import Judge, JudgeExtractor
from lib.nets.weights import save_model
from tools import recognise


def test_files_are_named_by_the_nearest_concept(tmp_path, capsys):
    torch.manual_seed(0)
    net, names, clips = Judge(["Red star", "blue circle", "green square"]), {}, []
    for name in net.concepts:
        colour, shape = name.lower().split()
        clip = draw_shape(shape, colour, None, 0)[None]                  # 128 px
        clips.append(clip)
        names[name] = tmp_path / f"{colour}-{shape}.webp"
        write_animation(names[name], clip, [100])
    judge_file = tmp_path / "judge.safetensors"
    save_model(judge_file, net.state_dict(), kind="judge", concepts=net.concepts)
    white = np.stack([np.where(clip[..., 3:] > 127, clip[..., :3], 255) for clip in clips])
    net.places.copy_(torch.from_numpy(JudgeExtractor(judge_file)(white)))
    save_model(judge_file, net.state_dict(), kind="judge", concepts=net.concepts)
    wrong = tmp_path / "green-square.gif"                                # a blue circle, as it is
    write_animation(wrong, clips[1], [100])
    other = tmp_path / "frog.png"
    write_animation(other, clips[0], [100])
    second = tmp_path / "Red star-2.png"                                 # as sample.py names one more of a caption
    write_animation(second, clips[0], [100])
    recognise.main([*map(str, names.values()), str(wrong), str(other), str(second), "--judge", str(judge_file)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines[:5]] == [*net.concepts, "blue circle", "Red star"]
    assert lines[0].endswith("(its caption is number 1)") and "number 1" not in lines[3]
    assert lines[4].endswith("(its caption is no concept that the judge has)")
    assert lines[5].endswith("(its caption is number 1)")
    assert lines[6] == "4 of 6 recognised among 3 concepts"
