"""The data sets' own formats: files that end early, and what is said where files and network are missing."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_nb import datasets
from ddpm_nb.datasets import DATASETS


def idx(array):
    """An array in the IDX format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_idx_files_plain_and_zipped(tmp_path):
    array = np.random.RandomState(0).randint(0, 256, (3, 4, 5)).astype(np.uint8)
    (tmp_path / "plain").write_bytes(idx(array))
    with gzip.open(tmp_path / "zipped.gz", "wb") as f:
        f.write(idx(array))
    for name in ("plain", "zipped.gz"):
        assert torch.equal(datasets._read_idx(tmp_path / name), torch.from_numpy(array))


def test_half_a_file_is_not_half_a_data_set(tmp_path):
    whole = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    zipped = gzip.compress(whole)
    floats = whole[:2] + b"\x0d" + whole[3:]  # another type of numbers
    for name, content in {
        "short": whole[:-2],
        "header only": whole[:3],
        "empty": b"",
        "long": whole + b"\0",
        "half.gz": zipped[: len(zipped) // 2],
        "not zipped.gz": whole,
        "floats": floats,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            datasets._read_idx(tmp_path / name)
    with pytest.raises(ValueError, match="damaged"):
        datasets._read_idx(tmp_path / "not there")


def test_records_that_end_early(tmp_path):
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.parent.mkdir()
    np.zeros(3073 * 2, np.uint8).tofile(file)
    assert len(DATASETS["cifar10"](tmp_path, "test").pictures) == 2
    np.zeros(3073 * 2 - 1, np.uint8).tofile(file)
    with pytest.raises(ValueError, match="a record has 3,073 bytes"):
        DATASETS["cifar10"](tmp_path, "test")


@pytest.mark.parametrize(
    "name, kind, advice",
    [
        ("mnist", "MNIST", "put train-images-idx3-ubyte.gz"),
        ("fashion_mnist", "FashionMNIST", "apt-get install dataset-fashion-mnist"),
        ("cifar10", "CIFAR10", "unpack cifar-10-binary.tar.gz"),
    ],
)
def test_without_files_or_network(name, kind, advice, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(f"torchvision.datasets.{kind}", fails)
    real = datasets._idx_files
    monkeypatch.setattr(datasets, "_idx_files", lambda *args: ([], real(*args)[1]))
    with pytest.raises(ValueError, match=f"{name}: found no .*no network.*{advice}"):
        DATASETS[name](tmp_path, "train")


def test_files_that_lie_loose_in_data_are_not_taken(tmp_path, monkeypatch):
    """In ./data they could be MNIST's or Fashion-MNIST's; a data_dir that was given says which."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data" / "t10k-images-idx3-ubyte"
    file.parent.mkdir()
    file.write_bytes(idx(np.zeros((2, 28, 28), np.uint8)))
    assert datasets._idx_files("mnist", None, "test", "images")[0] == []
    assert datasets._idx_files("mnist", Path("data"), "test", "images")[0] == [
        Path("data") / file.name
    ]
    found = DATASETS["mnist"](Path("data"), "test")
    assert found.labels is None and found.pictures.shape == (2, 1, 28, 28)


def test_registry_gives_pictures():
    found = DATASETS["digits"](None, "all")
    assert found.num_levels == 17 and len(found.class_names) == 10
    assert len(found.pictures) == len(found.labels) == 1797
    assert list(DATASETS) == ["digits", "fashion_mnist", "mnist", "cifar10"]
