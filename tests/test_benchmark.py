"The benchmark runs, prints its table and logs a line. Nothing depends on how fast anything is."

import json

import pytest

pytest.importorskip(
    "diffusers", reason="the benchmark compares with diffusers: pip install '.[dev,interop]'"
)
from benchmarks import train_step  # noqa: E402

SMALL = [
    "--widths",
    "32,32",
    "--size",
    "8",
    "--attention",
    "4",
    "--batch",
    "2",
    "--rounds",
    "1",
    "--steps",
    "1",
]


def test_prints_and_logs(tmp_path, capsys):
    train_step.main([*SMALL, "--no-memory", "--log", str(tmp_path / "log.jsonl")])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "log.jsonl").read_text())
    assert [(r["network"], r["precision"]) for r in result["rows"]] == [
        (side, precision) for precision in ("float32", "bf16") for side in ("ours", "theirs")
    ]
    assert (
        result["parameters"]["ours"] == result["parameters"]["theirs"]
    )  # the same network, or the comparison is none
    assert all(r["train_per_s"] > 0 and r["sample_per_s"] > 0 for r in result["rows"])
    assert all(
        0 < r[k] < 1
        for r in result["rows"]
        if r["network"] == "ours"
        for k in ("randomness_share", "ema_share")
    )
    assert "matrix products" in out and "ratio" in out


def test_memory_is_measured_in_a_fresh_process():
    assert train_step.peak_memory_in_fresh_process(SMALL, "ours", "float32", "train") > 1e6


def test_what_may_be_typed_wrong(capsys):
    for argv, message in [
        (["--precision", "fp8"], "expected float32, bf16"),
        (["--widths", "32,48"], "multiples of the first"),
        (["--size", "30"], "every level halves"),
        (["--rounds", "0"], "at least 1"),
    ]:
        with pytest.raises(SystemExit) as e:
            train_step.main(argv)
        assert e.value.code == 2 and message in capsys.readouterr().err
