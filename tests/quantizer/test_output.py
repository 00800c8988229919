"""OUT is one whole checkpoint at any moment, and nothing that is the user's is lost for it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import open_checkpoint
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.output import Output
from pcdvq_quantizer.plan import QuantizeOptions, RunOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.vptq.plan import VPTQOptions

OPTIONS = QuantizeOptions(bits=3.0, calibration="none")
OTHER = QuantizeOptions(bits=2.0, calibration="none")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and checkpoints of it: `old` and `new`."""
    directory = tmp_path_factory.mktemp("models")
    save_model(directory / "model", tiny_config(num_hidden_layers=1))
    for name, options in (("old", OPTIONS), ("new", OTHER)):
        quantize_model(make_plan(str(directory / "model"), options), directory / name)
    return directory


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    """A directory to work in, which has the model and the checkpoint `old`."""
    for name in ("model", "old"):
        shutil.copytree(models / name, tmp_path / "place" / name)
    return tmp_path / "place"


def contents(directory: Path) -> dict[str, object]:
    """Everything in `directory`, links included."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }


def quantize(model: Path, out: Path | str, options: RunOptions = OTHER) -> None:
    quantize_model(make_plan(str(model), options), Path(out), overwrite=True)


class Killed(BaseException):
    """Stands for SIGKILL."""


@contextmanager
def killed_at(step: int) -> Iterator[list[str]]:
    """The `step`-th change of a directory does not happen, nor does any after it.

    What is changed is listed.
    """
    changes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "remove", "rmdir"):
            original = getattr(os, name)

            def change(
                *arguments: object, original: Callable[..., None] = original, **options: object
            ) -> None:
                if len(changes) + 1 >= step:
                    raise Killed
                changes.append(str(arguments[0]))
                original(*arguments, **options)

            patch.setattr(os, name, change)
        yield changes


def is_whole(directory: Path) -> bool:
    try:
        open_checkpoint(directory)
    except PCDVQError:
        return False
    return True


def prepared(models: Path, place: Path) -> Output:
    """A run that has collected `new` and is about to publish it in the place of `old`."""
    output = Output.at(place / "old", overwrite=True)
    output.work.mkdir(parents=True)
    (output.work / "calibration.safetensors").write_bytes(b"state")
    (output.partial / "run.json").write_text("{}")
    shutil.copytree(models / "new", output.new)
    return output


def test_killed_at_every_step_of_publishing(models: Path, tmp_path: Path) -> None:
    """OUT is whole, or both checkpoints are in OUT.partial; the next run puts that in order."""
    expected = {name: contents(models / name) for name in ("old", "new")}
    sizes = {name: len(each) for name, each in expected.items()}
    step, done, away = 0, False, 0
    while not done:
        step += 1
        place = tmp_path / str(step)
        shutil.copytree(models / "old", place / "old")
        output = prepared(models, place)
        with killed_at(step) as changes:
            try:
                with output.locked():
                    output.publish()
                done = True
            except Killed:
                assert len(changes) == step - 1
        if not output.path.exists():
            away += 1
            assert is_whole(output.partial / "replaced")
            assert is_whole(output.new)
            output.recover()
        assert is_whole(output.path)
        assert len(contents(output.path)) in sizes.values()
        assert not {"run.json", "lock", "layers"} & {path.name for path in output.path.iterdir()}
        with output.locked():
            if not output.new.exists():  # it was published
                (output.partial / "run.json").write_text("{}")
                shutil.copytree(models / "new", output.new)
            output.publish()
        assert {path.name for path in place.iterdir()} == {"old"}
        found = contents(output.path)
        assert [*found.values()] == [*expected["new"].values()]
    assert away == 1
    assert step > 10


def test_killed_run_is_continued(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command given again ends what was begun, without doing a layer again."""
    move = os.replace

    def killed_between(source: Path, target: Path) -> None:
        if Path(target) == place / "old":
            raise Killed
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_between)
        with pytest.raises(Killed):
            quantize(place / "model", place / "old")
    assert not (place / "old").exists()
    monkeypatch.setattr(type(make_plan(str(place / "model"), OTHER)), "quantize", None)
    quantize(place / "model", place / "old")
    checkpoint = open_checkpoint(place / "old")
    assert {layer.codebook for layer in checkpoint.layers.values()} == {
        "trellis-2",
        "trellis-2-rows16",
    }
    assert {path.name for path in place.iterdir()} == {"model", "old"}


def test_a_move_that_fails_is_undone(
    models: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, move = prepared(models, place), os.replace
    before = contents(place / "old")

    def refused(source: Path, target: Path) -> None:
        if source == output.new:
            raise PermissionError(13, "Permission denied")
        move(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with output.locked(), pytest.raises(PermissionError):
        output.publish()
    assert contents(place / "old") == before
    assert is_whole(output.new)


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_directory(path: Path) -> None:
    (path / "photos").mkdir(parents=True)
    (path / "photos" / "a").write_text("mine")


def add_notes(path: Path) -> None:
    shutil.copytree(path.parent / "old", path)
    (path / "notes.txt").write_text("mine")


def add_directory(path: Path) -> None:
    shutil.copytree(path.parent / "old", path)
    (path / "LICENSE").mkdir()


def use_other_method(path: Path) -> None:
    shutil.copytree(path.parent / "old", path)
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')


def link_elsewhere(path: Path) -> None:
    make_directory(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_the_model(path: Path) -> None:
    path.symlink_to(path.parent / "model")


def link_partial(path: Path) -> None:
    make_directory(path.parent / "elsewhere")
    path.with_name("out.partial").symlink_to(path.parent / "elsewhere")


def own_partial(path: Path) -> None:
    make_directory(path.with_name("out.partial"))


def own_layers(path: Path) -> None:
    (path.with_name("out.partial") / "layers").mkdir(parents=True)
    (path.with_name("out.partial") / "layers" / "a").write_text("mine")


def link_in_partial(path: Path) -> None:
    make_file(path.parent / "file")
    path.with_name("out.partial").mkdir()
    (path.with_name("out.partial") / "run.json").symlink_to(path.parent / "file")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_file, "is a file"),
        (make_directory, r"not a checkpoint .* \(photos/, for instance"),
        (add_notes, r"holds notes\.txt"),
        (add_directory, "holds LICENSE/"),
        (use_other_method, "not a checkpoint"),
        (link_elsewhere, "not a checkpoint"),
        (link_to_itself, "leads nowhere"),
        (link_to_the_model, "is needed to write OUT"),
        (link_partial, "is no plain directory"),
        (own_partial, "photos was left there by no run"),
        (own_layers, "layers was left there by no run"),
        (link_in_partial, r"run\.json was left there by no run"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_ours_is_kept(place: Path, make: Callable[[Path], None], message: str) -> None:
    make(place / "out")
    before = contents(place)
    with pytest.raises(PCDVQError, match=message):
        quantize(place / "model", place / "out")
    assert contents(place) == before


@pytest.mark.parametrize("out", ["model", "model/", ".", "..", "old/../model", "~", "/", "link"])
def test_model_and_what_is_around_it_are_kept(
    place: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    (place / "link").symlink_to("..")
    before = contents(place.parent)
    with pytest.raises(PCDVQError):
        quantize(Path("model"), out)
    assert contents(place.parent) == before


def test_model_where_the_work_would_go(place: Path) -> None:
    (place / "model").rename(place / "out.partial")
    before = contents(place)
    with pytest.raises(PCDVQError, match="is needed to write OUT"):
        quantize(place / "out.partial", place / "out")
    assert contents(place) == before


def test_weights_that_lie_in_out(place: Path) -> None:
    """The model's directory has links only."""
    (place / "old" / "model-00009-of-00009.safetensors").hardlink_to(
        place / "model" / "model.safetensors"
    )
    (place / "model" / "model.safetensors").unlink()
    (place / "model" / "model.safetensors").symlink_to(
        place / "old" / "model-00009-of-00009.safetensors"
    )
    before = contents(place)
    with pytest.raises(PCDVQError, match="is needed to write OUT"):
        quantize(place / "model", place / "old")
    assert contents(place) == before


def test_current_directory_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "old")
    with pytest.raises(PCDVQError, match="is the current directory"):
        quantize(place / "model", ".")
    assert is_whole(place / "old")


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(place: Path, exists: bool) -> None:
    target = place / ("old" if exists else "later")
    (place / "out").symlink_to(target)
    quantize(place / "model", place / "out")
    assert (place / "out").is_symlink()
    assert is_whole(target)
    assert {path.name for path in place.iterdir()} == {"model", "old", "out", target.name}


@pytest.mark.parametrize("options", [OTHER, VPTQOptions(calibration="none")])
def test_what_may_be_replaced(place: Path, options: RunOptions) -> None:
    """An empty directory, and a checkpoint by either method; also inside of MODEL."""
    (place / "model" / "out").mkdir()
    model = contents(place / "model")
    for _ in range(2):
        quantize(place / "model", place / "model" / "out", options)
    assert (
        "model.embed_tokens.weight"
        in (place / "model" / "out" / "model.safetensors.index.json").read_text()
    )
    found = contents(place / "model")
    assert {name: found[name] for name in model} == model
    quantize(place / "model", place / "old", options)


def test_files_that_came_meanwhile_are_kept(models: Path, place: Path) -> None:
    output = prepared(models, place)
    with output.locked():
        (place / "old" / "notes.txt").write_text("mine")
        with pytest.raises(PCDVQError, match=r"holds notes\.txt"):
            output.publish()
    assert (place / "old" / "notes.txt").exists()
    assert is_whole(output.new)


def test_only_one_run_at_a_time(models: Path, place: Path) -> None:
    output = prepared(models, place)
    with (
        output.locked(),
        pytest.raises(PCDVQError, match="another run is writing"),
        Output.at(place / "old", overwrite=True).locked(),
    ):
        pass


def test_run_that_was_killed_while_it_began(place: Path) -> None:
    """What it left says nothing about options, and is no obstacle."""
    partial = place / "out.partial"
    partial.mkdir()
    (partial / "lock").touch()
    (partial / ".0123.pcdvq-tmp").write_text("{")
    quantize(place / "model", place / "out")
    assert not partial.exists()


def test_scratch_files_are_not_published(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(place / "model", place / "out")
    (place / "out.partial" / "checkpoint" / ".0123.pcdvq-tmp").write_text("half")
    quantize(place / "model", place / "out")
    assert not list((place / "out").glob(".*"))


@pytest.mark.parametrize(
    ("call", "number"), [("mkdir", errno.EROFS), ("open", errno.EACCES), ("replace", errno.EXDEV)]
)
def test_places_that_cannot_be_written(
    place: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent that is read-only, another file system: one sentence, and OUT as it was."""
    before = contents(place / "old")
    original = getattr(os, call)

    def refuse(path: object, *arguments: object, **options: object) -> object:
        if "old" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    plan = make_plan(str(place / "model"), OTHER)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(PCDVQError, match=r"cannot write .*old\.partial.* choose another place"):
            quantize_model(plan, place / "old", overwrite=True)
    assert contents(place / "old") == before
    quantize_model(plan, place / "old", overwrite=True)


def test_name_that_is_too_long(place: Path) -> None:
    with pytest.raises(PCDVQError, match=r"cannot write .*File name too long"):
        quantize(place / "model", place / ("a" * 250))
