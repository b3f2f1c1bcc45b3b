"The benchmark runs, prints its table and logs a line. Nothing depends on how fast anything is."

import functools
import importlib
import json

import numpy as np
import pytest
import torch
from networks import unlabelled
from PIL import Image
from safetensors.torch import load_file

from ddpm_nb import cli

pytest.importorskip(
    "diffusers", reason="the benchmark compares with diffusers: pip install '.[dev,interop]'"
)
from benchmarks import gpu, growth, quality, side_by_side, sides, speed, users  # noqa: E402

SMALL = "--widths 32,32 --size 8 --attention 4 --batch 2 --rounds 1 --steps 1".split()


def test_prints_and_logs(tmp_path, capsys):
    side_by_side.main([*SMALL, "--no-memory", "--log", str(tmp_path / "log.jsonl")])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "log.jsonl").read_text())
    there = [side for side in sides.SIDES if sides.installed(side)]
    assert [(r["network"], r["precision"]) for r in result["rows"]] == [
        (side, precision) for precision in ("float32", "bf16") for side in there
    ]
    assert result["parameters"]["ours"] == result["parameters"]["diffusers"]
    assert (result["lucidrains"] is None) == ("lucidrains" not in there)
    assert ("lucidrains is left out" in out) == ("lucidrains" not in there)
    assert all(r["train_per_s"] > 0 and r["sample_per_s"] > 0 for r in result["rows"])
    assert all(r["compile_seconds"] is None for r in result["rows"])
    assert result["rows"][1]["train_ratio"] == result["rows"][1]["sample_ratio"] == 1
    assert all(result["rows"][0][k] > 0 for k in ("randomness_share", "ema_share"))
    assert result["lines"].keys() == sides.SIDES.keys()
    assert "matrix products" in out and "ratio" in out


def test_stops_if_the_networks_are_not_the_same():
    args = side_by_side.parse(SMALL)
    ours, theirs = (sides.SIDES[k](args, "float32").model for k in ("ours", "diffusers"))
    sides.check_same(ours, theirs, (2, 3, 8, 8), "cpu")
    attention = theirs.mid_block.attentions[0]
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    with pytest.raises(SystemExit, match="should answer the same"):
        sides.check_same(ours, theirs, (2, 3, 8, 8), "cpu")


@pytest.mark.parametrize("side", ["ours", "diffusers"])
def test_memory_is_measured_in_a_fresh_process(side):
    assert side_by_side.peak_memory_in_fresh_process(SMALL, side, "float32", False, "train") > 1e6


@pytest.mark.parametrize("name", ["ours", "diffusers_", "lucidrains"])
def test_programs(name, tmp_path):
    if name == "lucidrains":
        pytest.importorskip("denoising_diffusion_pytorch")
    (tmp_path / "pictures").mkdir()
    for i, x in enumerate(np.random.default_rng(0).integers(0, 256, (100, 8, 8), np.uint8)):
        Image.fromarray(x).save(tmp_path / "pictures" / f"{i}.png")  # grey: it is made RGB
    program = importlib.import_module(f"benchmarks.users.{name}")
    tiny = dict(size=8, width=32, batch=16, sample_steps=2, save_every=1)
    for steps in (1, 2):  # the second run goes on where the first one ended
        program.main(tmp_path / "pictures", tmp_path / "run", steps=steps, **tiny)
    kept = [
        p for kind in ("step-*", "checkpoint-*", "model-*") for p in tmp_path.glob(f"run/{kind}")
    ]
    assert sorted(p.stem[-1] for p in kept if p.stem != "model_index") == ["1", "2"]
    grids = sorted((tmp_path / "run").glob("*.png"))
    assert grids and Image.open(grids[-1]).size[0] >= 4 * 8


def test_lines_of_code(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""One\n\ntwo."""\n\nx = [\n    1,  # a\n    # b\n]\ny = """\n\nz"""\n'
    )
    assert users.code_lines(tmp_path / "a.py") == 6


def test_what_may_be_typed_wrong(capsys):
    for argv, message in [
        (["--precision", "fp8"], "expected float32, bf16"),
        (["--widths", "32,48"], "multiples of the first"),
        (["--size", "30"], "every level halves"),
        (["--rounds", "0"], "at least 1"),
    ]:
        with pytest.raises(SystemExit) as e:
            side_by_side.main(argv)
        assert e.value.code == 2 and message in capsys.readouterr().err


# ---- growth, speed, quality


@pytest.mark.parametrize("part", ["size", "memory", "data", "busy"])
def test_growth_measures_every_kind_of_point(part, tmp_path, monkeypatch):
    argv = [
        part,
        "--size",
        "16",
        "--width",
        "8",
        "--batch",
        "2",
        "--preset",
        "digits",
        "--rounds",
        "1",
    ]
    args = growth.parse([*argv, "--log", str(tmp_path / "log.jsonl")])
    last = {part: growth.points(args)[part][-1:]}
    monkeypatch.setattr(growth, "points", lambda _: last)
    monkeypatch.setattr(growth, "photos", functools.partial(growth.photos, n=64, size=(64, 64)))
    if part != "busy":  # that one's threads are set by its process
        monkeypatch.setattr(growth, "in_fresh_process", growth.found_at)
    growth.main([*argv, "--log", str(args.log)])
    row = json.loads(args.log.read_text())
    assert row["part"] == part and row["device"] and growth.shown(row)
    assert ("train_bytes" in row) == (part in ("size", "memory"))  # of this process: any number
    expected = dict(
        size={"train_per_s", "walk_per_s", "attention", "attention_time"},
        memory={"train_per_s"},
        data={"data_per_s", "opened_per_s"},
        busy={"train_per_s"},
    )[part]
    assert all(row[k] > 0 for k in expected)


@pytest.fixture
def threads(monkeypatch):
    "What a benchmark sets in this process is set back."
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_speed_times_the_ways_by_turns(tmp_path, capsys, monkeypatch, threads):
    asked = []

    def seconds(step, device):
        asked.append(step.func.__self__ if step.func is not speed.answer else None)
        step()
        return 1.0

    monkeypatch.setattr(speed, "seconds", seconds)
    log = tmp_path / "log.jsonl"
    speed.main(["--preset", "digits", "--batch", "2", "--rounds", "3", "--log", str(log)])
    result = json.loads(log.read_text())
    assert [w["layout"] for w in result["ways"]] == ["channels_last", "contiguous"]
    assert all(w[k] == 1 for w in result["ways"] for k in ("seconds", "answer", "first"))
    assert "convolution, backward" in capsys.readouterr().out
    steps = [trainer for trainer in asked if trainer]
    assert len({id(t) for t in steps}) == 2  # two ways, and a first step of each before the rounds
    assert (
        steps[:2] == steps[0:1] * 2
        and steps[4::2] == steps[:1] * 3
        and steps[5::2] == steps[2:3] * 3
    )


def fids(method, steps, values, spacing="uniform"):
    "Rows of tools/few_steps.py: one FID a seed."
    way = dict(method=method, spacing=spacing, steps=steps, evaluations=steps)
    return [dict(way, what="fid", seed=s, fid=v, snapped=v) for s, v in enumerate(values)]


def test_as_good_is_judged_on_all_seeds_of_the_reference():
    rows = fids("ddim", 50, [2.0, 4.0])
    assert quality.as_good(rows, quality.DDPM) is None
    assert quality.as_good(rows, quality.DDIM)["evaluations"] == 50  # nothing but itself
    rows += fids("dpm++", 5, [2.0])  # as good, in one seed only
    rows += fids("dpm++", 8, [2.3, 4.4])  # by 12% worse
    rows += fids("dpm++", 9, [1.0, 5.0])  # as good, but who knows
    rows += fids("dpm++", 12, [1.9, 4.0]) + fids("dpm++", 10, [2.1, 4.2])
    found = quality.as_good(rows, quality.DDIM)
    assert found["way"] == ("dpm++", "uniform", 10) and found["seeds"] == 2
    assert found["fid"] == pytest.approx((3.15, 3.0, 0.05))
    for row in rows[-2:]:
        row["snapped"] = 9.0
    assert quality.as_good(rows, quality.DDIM)["evaluations"] == 12


def test_as_near_is_judged_against_the_walk_of_all_steps():
    way = dict(what="rms", spacing="uniform")
    rows = [dict(way, method="ddim", steps=1000, evaluations=1000, rms=1.0)]
    rows += [dict(way, method="dpm++", steps=n, evaluations=n, rms=12 / n) for n in (5, 10, 11, 20)]
    assert quality.as_near(rows)["way"] == ("dpm++", "uniform", 11)
    assert quality.as_near(rows[1:]) is None


@torch.no_grad()
def test_quality_times_the_same_weights(tmp_path, capsys):
    net, unets = unlabelled("digits").net, [p.unet for p in quality.pipelines("digits").values()]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 700])
    for unet in unets:
        torch.testing.assert_close(unet(x, t - 1).sample, net(x, t), rtol=1e-4, atol=1e-4)
    rows = fids("ddim", 50, [3.0]) + fids("dpm++", 2, [3.0])
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["digits", "--n", "1", "--rounds", "1", "--log", str(tmp_path / "log.jsonl")]
    quality.main([*argv, "--rows", str(tmp_path)])
    result = json.loads((tmp_path / "log.jsonl").read_text())["ddim"]
    assert result["ours"]["way"] == ["dpm++", "uniform", 2]
    assert result["ratio"] == result["seconds"] / result["ours"]["seconds"]
    assert 0 < result["solver_seconds"] < result["seconds"]  # 2 steps and 50
    assert "ddpm: the rows do not say" in capsys.readouterr().out


# ---- benchmarks.gpu, with everything tiny, on the CPU


@pytest.fixture
def part(tmp_path, monkeypatch, run):
    "A part that runs in this process; its commands go to the forks."

    def command(self, name, *args, timeout=60):
        said = run(f"ddpm-{name}", *args).stdout
        self.row("command", name=f"ddpm-{name}", status=0, seconds=0.0, said=said[-200:])

    def part(name):
        args = gpu.parse(["--part", name, "--out", str(tmp_path), "--small", "--device", "cpu"])
        monkeypatch.setattr(gpu.Part, "command", command)
        monkeypatch.setattr(gpu.Part, "process", lambda *_: True)
        gpu.PARTS[name](gpu.Part(args))
        return [json.loads(line) for line in open(tmp_path / "gpu.jsonl")]

    return part


def test_the_gpus_check_tries_every_command(part):
    rates, *commands = part("check")
    assert rates["kind"] == "rates" and rates["copy_gb_s"] > 0 and rates["device"]
    tried = {row["name"] for row in commands}
    assert tried == {f"ddpm-{n.removeprefix('main_')}" for n in cli.__all__}


def test_the_gpus_training_leaves_weights_and_rows(part, tmp_path):
    rows = part("train")
    assert [r["kind"] for r in rows] == ["train", "command", "command"]
    weights = load_file(tmp_path / "digits-half.safetensors")
    assert {v.dtype for v in weights.values()} == {torch.float16}
    assert (tmp_path / "digits-log.jsonl").exists() and (tmp_path / "evaluation.json").exists()


def test_the_gpus_peers_and_throughput(part):
    there = [side for side in sides.SIDES if sides.installed(side)]
    rows = part("peers")
    assert [(r["precision"], r["kind"]) for r in rows] == [
        (precision, side) for precision in ("bf16", "tf32", "float32") for side in there
    ]
    assert all(r["train_per_s"] > 0 and r["memory"] > 0 for r in rows)
    row = part("throughput")[-1]
    assert row["mfu"] > 0 and row["flops"] > row["attention"] > 0


def test_a_part_ends_at_its_limit(tmp_path, capfd):
    gpu.main(["train", "--minutes", "0.06", "--out", str(tmp_path), "--small", "--device", "cpu"])
    assert "ended at its limit" in capfd.readouterr().out


@pytest.mark.parametrize(
    "argv, said", [(["fly"], "PART: expected"), (["--minutes", "0"], "above 0")]
)
def test_what_the_gpus_benchmark_refuses(tmp_path, argv, said, capsys):
    with pytest.raises(SystemExit) as e:
        gpu.main([*argv, "--out", str(tmp_path)])
    assert e.value.code == 2 and said in capsys.readouterr().err
