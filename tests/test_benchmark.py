"The benchmark runs, prints its table and logs a line. Nothing depends on how fast anything is."

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_nb import cli

pytest.importorskip(
    "diffusers", reason="the benchmark compares with diffusers: pip install '.[dev,interop]'"
)
from benchmarks import gpu, side_by_side, sides, users  # noqa: E402

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
