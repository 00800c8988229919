"""Damaged checkpoints are refused by name before any weight is read."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import (
    CODEBOOK_FILE,
    INDEX_FILE,
    MOST_JSON_BYTES,
    REPORT_FILE,
    _unique,
    open_checkpoint,
    open_tensors,
)
from pcdvq_kernels.errors import CheckpointError
from pcdvq_quantizer.inspection import inspect_checkpoint
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from safetensors.torch import load_file, save_file

SHARD = "model-00001-of-00001.safetensors"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of codec e8, whose codes have two fields, with embeddings of codec trellis."""
    directory = tmp_path_factory.mktemp("checkpoint")
    source = save_model(directory / "model", tiny_config())
    options = QuantizeOptions(bits=2.0, codec="e8", embedding_bits=4, calibration="none")
    quantize_model(make_plan(str(source), options), directory / "quantized")
    return directory / "quantized"


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "copy")
    return tmp_path / "copy"


def change_tensors(directory: Path, change: Callable[[dict], None], index: bool = False) -> None:
    """Rewrite the shard, and with `index` the index so that it agrees."""
    tensors = load_file(directory / SHARD)
    change(tensors)
    save_file(tensors, directory / SHARD)
    if index:
        content = json.loads((directory / INDEX_FILE).read_text())
        content["weight_map"] = dict.fromkeys(tensors, SHARD)
        (directory / INDEX_FILE).write_text(json.dumps(content))


def change_config(directory: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def test_pristine_opens(copy: Path) -> None:
    assert len(open_checkpoint(copy).layers) == 14 + 2


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(
    "tensor", [f"{LAYER}.qweight", f"{LAYER}.row_scale", f"{LAYER}.signs_in", "model.norm.weight"]
)
def test_missing_tensor(copy: Path, tensor: str, index: bool) -> None:
    change_tensors(copy, lambda tensors: tensors.pop(tensor), index)
    with pytest.raises(CheckpointError, match=r"missing|lacks tensor|total_size|say"):
        open_checkpoint(copy)


@pytest.mark.parametrize("index", [False, True])
def test_extra_tensor(copy: Path, index: bool) -> None:
    change_tensors(copy, lambda tensors: tensors.update(other=torch.zeros(3)), index)
    with pytest.raises(CheckpointError, match=r"unexpected tensor other|all tensors take"):
        open_checkpoint(copy)


def change_index(directory: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index)
    (directory / INDEX_FILE).write_text(json.dumps(index))


def test_total_size(copy: Path) -> None:
    change_index(copy, lambda index: index["metadata"].update(total_size=1))
    with pytest.raises(CheckpointError, match="all tensors take 1 bytes"):
        open_checkpoint(copy)
    change_index(copy, lambda index: index["metadata"].clear())
    assert open_checkpoint(copy).layers
    change_index(copy, lambda index: index.pop("metadata"))
    assert open_checkpoint(copy).layers


def header_with_two_entries(path: Path, offsets: list[int]) -> Path:
    """A file with tensor `name` [2, 4] in its first 8 bytes, and `name` [8] at `offsets`."""
    entries = [
        json.dumps({"dtype": "U8", "shape": shape, "data_offsets": place})
        for shape, place in (([2, 4], [0, 8]), ([8], offsets))
    ]
    header = f'{{"name": {entries[0]}, "name": {entries[1]}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(offsets[1]))
    return path


def test_name_twice_in_a_header(tmp_path: Path) -> None:
    with open_tensors(header_with_two_entries(tmp_path / "same", [0, 8])) as file:
        assert file.get_slice("name").get_shape() == [8]
    path = header_with_two_entries(tmp_path / "other", [8, 16])
    with pytest.raises(CheckpointError, match="cannot be read"), open_tensors(path):
        pass


def test_embedding_that_is_no_layer(copy: Path) -> None:
    change_config(copy, lambda config: config.update(embedding="model.norm"))
    with pytest.raises(CheckpointError, match=r"model\.norm is not among the layers"):
        open_checkpoint(copy)


def test_dense_weight_beside_the_codes(copy: Path) -> None:
    def add(tensors: dict) -> None:
        tensors[f"{LAYER}.weight"] = torch.zeros(192, 64)
        tensors.pop("model.norm.weight")

    change_tensors(copy, add, index=True)
    content = json.loads((copy / INDEX_FILE).read_text())
    del content["metadata"]
    (copy / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight does not belong"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (f"{LAYER}.qweight", torch.zeros(192, 17, dtype=torch.uint8), r"\[192, 17\], expected"),
        (f"{LAYER}.qweight", torch.zeros(192, 16, dtype=torch.int8), "is I8"),
        (f"{LAYER}.row_scale", torch.zeros(191, dtype=torch.bfloat16), r"expected \[191, 16\]"),
        ("lm_head.row_scale", torch.zeros(191, dtype=torch.bfloat16), r"expected \[192, 32\]"),
        ("lm_head.row_scale", torch.zeros(257, dtype=torch.bfloat16), r"expected \[320, 32\]"),
        (f"{LAYER}.row_scale", torch.zeros(192), "is F32, the format asks for BF16"),
        (f"{LAYER}.row_scale", torch.zeros(192, 1, dtype=torch.bfloat16), r"\[192, 1\]"),
        (f"{LAYER}.signs_in", torch.zeros(7, dtype=torch.uint8), "input size 56"),
        (f"{LAYER}.signs_in", torch.zeros(0, dtype=torch.uint8), "is empty"),
    ],
)
def test_wrong_tensor(copy: Path, tensor: str, value: torch.Tensor, message: str) -> None:
    change_tensors(copy, lambda tensors: tensors.update({tensor: value}))
    content = json.loads((copy / INDEX_FILE).read_text())
    del content["metadata"]
    (copy / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize("file", [SHARD, CODEBOOK_FILE, INDEX_FILE, "config.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_truncated_or_missing_file(copy: Path, file: str, keep: float | None) -> None:
    content = (copy / file).read_bytes()
    (copy / file).unlink()
    if keep is not None:
        (copy / file).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=file):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format_version=3), "format_version is 3"),
        (lambda config: config.update(format_version="1"), "format_version is '1'"),
        (lambda config: config.update(quant_method="gptq"), "not a PCDVQ checkpoint"),
        (lambda config: config.update(colour="red"), "colour"),
        (lambda config: config["codebooks"]["e8-2"].update(codec="qtip"), "codec"),
        (lambda config: config["codebooks"]["e8-2"].update(pattern_bits=40), "pattern_bits"),
        (lambda config: config["codebooks"]["e8-2"].update(magnitude_bits=1), "damaged"),
        (
            lambda config: config["codebooks"]["e8-2"].update(magnitude_bits=1, pattern_bits=15),
            "codebook directions",
        ),
        (lambda config: config["codebooks"]["e8-2"].update(chain_rows=16), "e8 with chain_rows 16"),
        (lambda config: config["codebooks"]["trellis-4"].update(chain_rows=48), "chain_rows"),
        (lambda config: config["codebooks"]["trellis-4"].pop("chain_rows"), "with chain_rows 0"),
        (lambda config: config["codebooks"]["trellis-4"].update(pattern_bits=9), "3 to 8 pattern_"),
        (lambda config: config["layers"].update({LAYER: "trellis-3"}), "unknown codebook"),
        (lambda config: config["layers"].pop(LAYER), "does not list"),
        (lambda config: config["layers"].update({"model.other": "e8-2"}), "model.other"),
        (lambda config: config.update(layers={}), "layers"),
        (lambda config: config["hadamard_blocks"].update({"64": 48}), "power of two"),
        (lambda config: config["hadamard_blocks"].update({"64": 128}), "divides 64"),
        (lambda config: config["hadamard_blocks"].pop("64"), "input size 64"),
        (lambda config: config["hadamard_blocks"].update({"12": 4}), "12.* is not an input size"),
        (lambda config: config.update(max_tp=0), "max_tp"),
        (lambda config: config.pop("codebooks"), "codebooks"),
    ],
)
def test_bad_configuration(copy: Path, change: Callable[[dict], None], message: str) -> None:
    change_config(copy, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_codebook_out_of_limits(copy: Path) -> None:
    tables = load_file(copy / CODEBOOK_FILE)
    tables["e8-2.magnitudes"] = torch.tensor([0, 3, 5, 7], dtype=torch.uint8)
    save_file(tables, copy / CODEBOOK_FILE)
    with pytest.raises(CheckpointError, match="magnitudes"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "a/b.safetensors", "x.bin", 7])
def test_index_cannot_point_outside(copy: Path, name: object) -> None:
    content = json.loads((copy / INDEX_FILE).read_text())
    content["weight_map"]["model.norm.weight"] = name
    (copy / INDEX_FILE).write_text(json.dumps(content))
    for open_ in (open_checkpoint, lambda path: make_plan(str(path), QuantizeOptions())):
        with pytest.raises(CheckpointError, match="is not the name of a safetensors file"):
            open_(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
        ('{"quantization_config": {}, "quantization_config": {}}', "is there twice"),
        ("[]", "does not hold a JSON object"),
    ],
)
def test_json_that_parsers_choke_on(copy: Path, text: str, message: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize("file", [SHARD, CODEBOOK_FILE, INDEX_FILE, "config.json"])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)],
    ids=["pipe", "directory", "device"],
)
def test_not_a_regular_file(copy: Path, file: str, make: Callable[[Path], None]) -> None:
    (copy / file).unlink()
    make(copy / file)
    with pytest.raises(CheckpointError, match=f"{file} is not a regular file"):
        open_checkpoint(copy)


def test_json_too_large(copy: Path) -> None:
    os.truncate(copy / INDEX_FILE, MOST_JSON_BYTES + 1)  # a hole: takes no space
    with pytest.raises(CheckpointError, match="over the limit"):
        open_checkpoint(copy)


def test_keys_are_compared_once_each() -> None:
    """However many a file has, with one of them there twice."""

    class Key(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Key.compared += 1
            return str.__eq__(self, other)

    pairs = [(Key(number), 0) for number in range(2000)] + [(Key(1999), 0)]
    with pytest.raises(ValueError, match="'1999' is there twice"):
        _unique(pairs)
    assert Key.compared < 4000
    assert _unique(pairs[:-1]) == dict(pairs)


def test_nested_too_deep(copy: Path) -> None:
    (copy / INDEX_FILE).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        open_checkpoint(copy)


def test_file_with_holes(copy: Path) -> None:
    """4 TiB of which next to nothing is on the disk."""
    side = 1 << 20
    name = "model.norm.weight"
    entry = {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side * side]}
    header = json.dumps({name: entry}).encode()
    (copy / SHARD).write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(copy / SHARD, 8 + len(header) + 4 * side * side)
    with pytest.raises(CheckpointError, match=r"has 4398\d+ bytes|lacks tensor"):
        open_checkpoint(copy)


def test_names_are_printable(copy: Path) -> None:
    change_config(copy, lambda config: config["modules_to_not_convert"].append("\x1b[2J"))
    with pytest.raises(CheckpointError, match="cannot be printed"):
        open_checkpoint(copy)


@pytest.mark.parametrize("report", [{"errors": [1]}, {"errors": {"a": 1}}, {"errors": {"a": {}}}])
def test_report_of_something_else(copy: Path, report: dict) -> None:
    (copy / REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match="is not the record of a run"):
        inspect_checkpoint(copy)
