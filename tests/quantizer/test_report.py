"""The page of `pcdvq report` against the files it is made of."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import REPORT_FILE, open_checkpoint
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import cli
from pcdvq_quantizer.codebooks import codebooks_at_hand
from pcdvq_quantizer.codecs import DIRECTION_AND_MAGNITUDE
from pcdvq_quantizer.identity import weights_sha256
from pcdvq_quantizer.inspection import inspect_checkpoint
from pcdvq_quantizer.plan import NONE, QuantizeOptions, make_plan
from pcdvq_quantizer.record import RunRecord
from pcdvq_quantizer.report import write_report
from pcdvq_quantizer.report.evaluations import read_evaluations
from pcdvq_quantizer.report.record import _place, read_record
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.sources import open_source
from safetensors.torch import load_file, save_file

LAYERS, KINDS = 3, 7
UP = "model.layers.1.mlp.up_proj"
UP_SERIES = "6"
PLOTS = 4  # errors, rates, directions, distortion


class Page(HTMLParser):
    """Rows of the tables, plots, and everything the page refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.rows: list[list[str]] = []
        self.plots: dict[str, str] = {}
        self.references: list[tuple[str, str]] = []
        self._cell = False
        self.feed(self.text)
        for svg in re.findall(r"<svg.*?</svg>", self.text, re.DOTALL):
            label = re.search(r'aria-label="([^"]*)"', svg)
            assert label
            self.plots[label[1]] = svg

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                self.references.append((tag, value or ""))

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        (found,) = [row for row in self.rows if row[0] == first]
        return found[1:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer has a rate of its own, and output errors are known."""
    directory = tmp_path_factory.mktemp("report")
    config = tiny_config(num_hidden_layers=LAYERS, tie_word_embeddings=True)
    source = save_model(directory / "original", config)
    plan = make_plan(str(source), QuantizeOptions(bits=3.0, embedding_bits=8, calibration=NONE))
    plan = dataclasses.replace(plan, codebooks=plan.codebooks | {UP: plan.codebook(UP, 2.0)})
    quantize_model(plan, directory / "tiny")
    change_record(
        directory / "tiny",
        lambda record: [
            error.update(output=error["weight"] / 3) for error in record["errors"].values()
        ],
    )
    return directory / "tiny"


def change_record(directory: Path, change: object) -> None:
    path = directory / REPORT_FILE
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "tiny")


def evaluation(path: Path, model: Path | str, figure: float, **changes: object) -> Path:
    """A file as `pcdvq eval --json` writes it."""
    text = {"file": "wiki.txt", "sha256": "ab" * 32}
    report = {
        "model": str(model),
        "backend": "hf",
        "dtype": "float32",
        "weights": "dense",
        "protocol": {
            "text": text, "window": 64, "windows": 5, "lambada": None, "lines": None, "bos": False
        },
        "perplexity": {
            "perplexity": figure, "perplexity_stderr": 0.5, "nll": 3.0, "windows": 5,
            "tokens": 315, "seconds": 1.0,
        },
        "kl": None,
        "lambada": None,
        "seconds": 2.0,
        "versions": {"torch": "2"},
    }  # fmt: skip
    path.write_text(json.dumps(report | changes))
    return path


def test_figures_are_those_of_the_files(checkpoint: Path, tmp_path: Path) -> None:
    page = Page(write_report(checkpoint, tmp_path / "page.html"))
    opened = open_checkpoint(checkpoint)
    recorded = json.loads((checkpoint / REPORT_FILE).read_text())["errors"]
    assert len(opened.layers) == KINDS * LAYERS + 1
    for name, layer in opened.layers.items():
        error = recorded[name]
        assert page.row(name) == [
            f"{layer.out_features} \N{MULTIPLICATION SIGN} {layer.in_features}",
            layer.codebook,
            f"{layer.bits_per_weight:.3f}",
            f"{error['weight']:.5f}",
            f"{100 * error['direction']:.1f} %",
            f"{error['output']:.5f}",
            f"{layer.bytes / 1024:.1f}",
        ]
    assert page.row("bits per weight, linear layers") == [f"{opened.bits_per_weight:.3f}"]
    both = f"{opened.bits_per_weight_with_embeddings:.3f}"
    assert page.row("bits per weight, with embeddings") == [both]
    assert page.row("embedding bits") == ["8"]
    files = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert page.row("size now") == [f"{files / 2**20:.1f} MiB"]
    original = (checkpoint.parent / "original" / "model.safetensors").stat().st_size
    assert page.row("size at 16 bits") == [f"{original / 2**20:.1f} MiB"]


def test_means_count_each_weight_alike(checkpoint: Path) -> None:
    record, opened = read_record(checkpoint), open_checkpoint(checkpoint)
    recorded = json.loads((checkpoint / REPORT_FILE).read_text())["errors"]
    total = error = direction = 0.0
    for name, layer in opened.linears.items():
        total += layer.weights
        error += layer.weights * recorded[name]["weight"]
        direction += layer.weights * recorded[name]["weight"] * recorded[name]["direction"]
    assert record.weight_error == pytest.approx(error / total)
    assert record.direction_share == pytest.approx(direction / error)
    assert record.direction_share > 0.5


def test_plots(checkpoint: Path, tmp_path: Path) -> None:
    page = Page(write_report(checkpoint, tmp_path / "page.html"))
    assert len(page.plots) == PLOTS
    errors = page.plots["Error of every layer by its number"]
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f">{kind}<" in errors
    assert ">output error<" in errors
    heights = re.findall(r'<use [^>]* y="([\d.]+)"[^>]*var\(--series-(\d)\)', errors)
    # In each of two plots a marker for every layer, and one for each kind in the legend.
    assert len(heights) == 2 * KINDS * LAYERS + KINDS
    up = [float(height) for height, series in heights if series == UP_SERIES][:LAYERS]
    assert up.index(min(up)) == 1  # y grows downwards; this layer alone has 2 bits
    assert up[0] == pytest.approx(up[2], rel=0.1)
    rates = page.plots["Codebook of every layer"]
    books = "trellis-2-rows16: 2 bits", "trellis-3: 3 bits", "trellis-3-rows16: 3 bits"
    assert all(f">{book}<" in rates for book in books)
    cells = Counter(re.findall(r'style="fill: (#[0-9a-f]{6})"', rates))
    # Each with a legend; chains are longest where no rank splits rows, in o_proj and down_proj.
    assert sorted(cells.values()) == [2, 2 * LAYERS + 1, (KINDS - 2) * LAYERS]
    for codec, text in DIRECTION_AND_MAGNITUDE.items():
        assert (f"{codec}: {text}." in page.text) == (codec in ("trellis", "int8"))
    directions = page.plots["Error due to directions and to magnitudes"]
    assert all(f">{part}<" in directions for part in ("direction", "magnitude"))
    distortion = page.plots["Distortion of codebooks by bits per weight"]
    codecs = {book.codebook.spec.codec for book in codebooks_at_hand()}
    assert {"pvq", "trellis", "int8"} <= codecs
    assert all(f">{name}<" in distortion for name in (*codecs, "least possible", "this checkpoint"))


def test_without_output_errors(checkpoint: Path, tmp_path: Path) -> None:
    other = copied(checkpoint, tmp_path)
    change_record(other, lambda record: record["errors"][UP].update(output=None))
    page = Page(write_report(other))
    assert ">output error<" not in page.plots["Error of every layer by its number"]
    assert "output error is not known" in page.text
    assert page.row(UP)[5] == "-"


def test_page_needs_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    page = Page(write_report(checkpoint, tmp_path / "page.html"))
    for tag, reference in page.references:
        assert reference.startswith("#") or tag == "a", reference
    assert "<script" not in page.text
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)
    links = [reference for tag, reference in page.references if tag == "a"]
    assert page.text.count("http") == len(links)
    ids = set(re.findall(r'id="([^"]*)"', page.text))
    assert {ref[1:] for _, ref in page.references if ref.startswith("#")} <= ids
    # Every colour comes from the page: none of the stand-ins is left.
    assert not re.search(r"#0000[0-9a-f]{2}\b", page.text)


def test_same_input_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    pages = [write_report(checkpoint, tmp_path / f"{n}.html").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def test_perplexities(checkpoint: Path, tmp_path: Path) -> None:
    original = checkpoint.parent / "original"
    files = (
        evaluation(tmp_path / "a.json", checkpoint, 23.4567),
        evaluation(tmp_path / "b.json", original, 20.1234),
    )
    page = Page(write_report(checkpoint, tmp_path / "page.html", files))
    assert len(page.plots) == PLOTS + 1
    bits = open_checkpoint(checkpoint).bits_per_weight
    assert page.row(str(checkpoint)) == [f"{bits:.3f}", "23.457", "-", "-", "-"]
    assert page.row(str(original)) == ["unquantized", "20.123", "-", "-", "-"]
    assert "Answers were not measured" in page.text
    assert "5 windows of 64 tokens of wiki.txt" in page.text
    plot = page.plots["Perplexity by bits per weight"]
    assert f">{checkpoint}<" in plot
    assert f">{original}<" in plot
    without = write_report(checkpoint, tmp_path / "without.html").read_text()
    assert "Not measured yet" in without
    assert "pcdvq eval tiny --tasks perplexity,chat --text FILE" in without


def test_where_evaluations_find_bits(checkpoint: Path, tmp_path: Path) -> None:
    """The original's perplexity comes with kl; a checkpoint may have moved along with the file."""
    other = copied(checkpoint, tmp_path)
    kl = {
        "kl": 0.1, "kl_stderr": None, "top1_agreement": 0.9, "reference": "org/original",
        "reference_perplexity": 19.5, "windows": 5, "tokens": 315, "seconds": 1.0,
    }  # fmt: skip
    file = evaluation(tmp_path / "a.json", "/gone/tiny", 23.0, kl=kl)
    found = read_evaluations([file], RunRecord(model="org/original"))
    assert found
    assert [each.bits for each in found.quantized] == [open_checkpoint(other).bits_per_weight]
    assert [(each.model, each.perplexity) for each in found.references] == [("org/original", 19.5)]
    assert read_evaluations([], RunRecord()) is None


def test_bad_evaluations(checkpoint: Path, tmp_path: Path) -> None:
    good = evaluation(tmp_path / "good.json", checkpoint, 23.0)
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": ')
    protocol = json.loads(good.read_text())["protocol"]
    for file, message in (
        (tmp_path / "missing.json", r"cannot read .*missing\.json"),
        (broken, r"broken\.json was not written by pcdvq eval"),
        (evaluation(tmp_path / "c.json", checkpoint, 9.0, seconds="long"), "seconds: "),
        (evaluation(tmp_path / "d.json", checkpoint, 9.0, perplexity=None), "has no perplexity"),
        (evaluation(tmp_path / "e.json", "elsewhere/model", 9.0), "about elsewhere/model"),
        (
            evaluation(tmp_path / "f.json", checkpoint, 9.0, protocol=protocol | {"window": 32}),
            "of 64 tokens .* of 32 tokens .* evaluate both alike",
        ),
    ):
        with pytest.raises(PCDVQError, match=message):
            write_report(checkpoint, tmp_path / "page.html", (good, file))
        assert not (tmp_path / "page.html").exists()


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PCDVQError, match=r"config\.json is missing"):
        write_report(tmp_path / "nothing")
    with pytest.raises(PCDVQError, match="not a PCDVQ checkpoint"):
        write_report(checkpoint.parent / "original")
    other = copied(checkpoint, tmp_path)
    change_record(other, lambda record: record["errors"].pop(UP))
    with pytest.raises(PCDVQError, match=f"no error of layer {UP}"):
        write_report(other)
    change_record(other, lambda record: record.pop("errors"))
    with pytest.raises(PCDVQError, match=r"not a record of this release \(errors: Field required"):
        write_report(other)
    (other / REPORT_FILE).unlink()
    with pytest.raises(PCDVQError, match=r"pcdvq_report\.json is missing.*quantize again"):
        write_report(other)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure", [NAN, INFINITE, 0.0, -1.0, 1e308, 5e-324])
def test_odd_figures(checkpoint: Path, tmp_path: Path, figure: float) -> None:
    """They are shown as they are, and plots leave them out."""
    other = copied(checkpoint, tmp_path)
    change_record(
        other,
        lambda record: [
            error.update(weight=figure, direction=figure, output=figure)
            for error in record["errors"].values()
        ],
    )
    perplexity = {
        "perplexity": figure, "perplexity_stderr": figure, "nll": 3.0, "windows": 5, "tokens": 315,
        "seconds": 1.0,
    }  # fmt: skip
    files = (
        evaluation(tmp_path / "a.json", other, 0.0, perplexity=perplexity),
        evaluation(tmp_path / "b.json", checkpoint.parent / "original", 0.0, perplexity=perplexity),
    )
    page = Page(write_report(other, tmp_path / "page.html", files))
    assert len(page.plots) == PLOTS + 1
    shown = f"{figure:.5f}" if abs(figure) < 10 else f"{figure:.3g}"
    assert page.row(UP)[3] == shown
    assert inspect_checkpoint(other).to_json().count("NaN") == 0


def test_record_without_a_model(checkpoint: Path, tmp_path: Path) -> None:
    other = copied(checkpoint, tmp_path)
    change_record(other, lambda record: [record.pop(key) for key in ("model", "options")])
    assert Page(write_report(other)).row("original") == ["a model without a name"]
    change_record(other, lambda record: record.update(options=["a"]))
    with pytest.raises(PCDVQError, match=r"record of this release \(options: "):
        write_report(other)


@pytest.mark.parametrize("digits", [1, 6, 7, 400, 5000])
def test_numbers_of_layers(digits: int) -> None:
    number, kind = _place(f"model.layers.{'7' * digits}.mlp.up_proj")
    assert kind == "up_proj"
    assert number == (int("7" * digits) if digits < 7 else None)


def test_names_are_no_formulas(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "$x^$ & <script>")
    page = Page(write_report(other, None, (evaluation(tmp_path / "a.json", other, 23.0),)))
    assert "<script" not in page.text
    assert "$x^$ &amp; &lt;script" in page.plots["Perplexity by bits per weight"]


def test_evaluations_know_models_by_their_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Two of one name are two; the original is known by another name; a changed one is not."""
    original = checkpoint.parent / "original"
    run = read_record(checkpoint).run
    other = Path(shutil.copytree(checkpoint, tmp_path / "other" / "tiny"))
    weights = load_file(other / "model-00001-of-00001.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model-00001-of-00001.safetensors", {"format": "pt"})
    shutil.copytree(original, tmp_path / "renamed")
    files = [
        evaluation(
            tmp_path / f"{number}.json",
            model,
            20.0 + number,
            model_sha256=weights_sha256(open_source(str(model))),
        )
        for number, model in enumerate((checkpoint, other, tmp_path / "renamed"))
    ]
    found = read_evaluations(files, run)
    assert found
    assert [each.perplexity for each in found.quantized] == [20.0, 21.0]
    assert [each.perplexity for each in found.references] == [22.0]
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model-00001-of-00001.safetensors", {"format": "pt"})
    with pytest.raises(PCDVQError, match="as it was evaluated"):
        read_evaluations(files, run)


def test_only_its_own_pages_are_replaced(checkpoint: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(checkpoint, page)
    first = page.read_bytes()
    page.write_bytes(first + b"changed")
    assert write_report(checkpoint, page).read_bytes() == first
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    with pytest.raises(PCDVQError, match=r"notes\.html exists and is no page of pcdvq report"):
        write_report(checkpoint, notes)
    assert notes.read_text() == "mine"
    with pytest.raises(PCDVQError, match="there is no directory"):
        write_report(checkpoint, tmp_path / "none" / "page.html")


def test_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copied(checkpoint, tmp_path)
    file = evaluation(tmp_path / "a.json", other, 23.0)
    monkeypatch.setattr("sys.argv", ["pcdvq", "report", str(other), "--eval", str(file)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    assert "23.000" in (tmp_path / "tiny.html").read_text()
