"""Requests, chat templates, and answers beside the original's."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.chat import (
    CALIBRATION,
    EVALUATION,
    PLAIN,
    Chat,
    Request,
    bundled,
    requests_of,
)
from pcdvq_quantizer.continuation import continue_texts, is_loop
from pcdvq_quantizer.evaluation import EvaluateOptions, EvaluationReport, evaluate
from pcdvq_quantizer.evaluation.choices import make_patterns, read_cloze
from pcdvq_quantizer.evaluation.data import read_requests
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.report import write_report
from pcdvq_quantizer.run import quantize_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\x02\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# By what a template does to a request; None: it is used.
UNUSABLE = {
    "{{ raise_exception('no tools were given') }}": "no tools were given",
    "{{ tools[0].name }}": "None",
    "{% for x in": "unexpected 'end of template'|Expected an expression",
    "always the same": "leaves out what the user asks",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(
        tmp_path_factory.mktemp("chat") / "tiny", tiny_config(max_position_embeddings=512)
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(original: Path) -> Path:
    out = original.with_name("out")
    quantize_model(make_plan(str(original), QuantizeOptions(bits=2.0, calibration="none")), out)
    return out


@pytest.fixture
def tokenizer(original: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(original)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    lines = [("one", "how?"), ("two", "what is it?"), ("one", "and why not?")]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps({"kind": k, "text": t}) + "\n" for k, t in lines))
    return path


def test_bundled_requests() -> None:
    """Many kinds; what is measured is never what is calibrated on."""
    sets = {
        name: list(requests_of(bundled(name).read_bytes(), bundled(name)))
        for name in (EVALUATION, CALIBRATION)
    }
    for requests in sets.values():
        assert len(requests) >= 99
        assert len({request.id for request in requests}) == len(requests)
        assert min(Counter(request.kind for request in requests).values()) >= 4
    texts = [{request.text for request in requests} for requests in sets.values()]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "file is empty"),
        ("Who?", "file, line 1 is not JSON"),
        ('{"text": "a"}\n\n["b"]', r"file, line 3: no string field 'text' \(found list\)"),
        ('{"prompt": "a"}', r"file, line 1: no string field 'text' \(found fields prompt\)"),
        ('{"text": " "}', "line 1: 'text' is blank"),
        ('{"text": "a", "kind": 3}', r"no string field 'kind' \(found one of type int\); make"),
        ('{"text": "a", "kind": "\\ud83d"}', "'kind' holds half of a surrogate pair"),
    ],
)
def test_requests_that_do_not_fit(content: str, message: str) -> None:
    with pytest.raises(PCDVQError, match=message):
        list(requests_of(content.encode(), Path("file")))


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x1c"])
def test_requests_are_read_as_all_jsonl(character: str, tmp_path: Path) -> None:
    """A mark at the beginning, lines of other systems, strings that hold what ends no line."""
    path = tmp_path / "requests.jsonl"
    text = f"one{character}two"
    line = json.dumps({"text": text, "kind": "odd"}, ensure_ascii=character < " ")
    path.write_bytes(f"\ufeff{line}\r\n\r\n{line}\r\nnonsense".encode())
    _, requests = read_requests(path, 2)
    assert requests == [Request("1", "odd", text), Request("2", "odd", text)]


def test_prompts_in_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    notes: list[str] = []
    chat = Chat(tokenizer, notes.append)
    assert chat.has_template
    assert tokenizer.decode(chat.prompt("why?")).replace(" ", "") == "<user>why?\x02\n<assistant>"
    assert chat.ends == {2}
    assert chat.closing(2) == [2, ord("\n")]
    assert notes == []


@pytest.mark.parametrize("template", UNUSABLE)
def test_templates_that_fail(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    notes: list[str] = []
    tokenizer.chat_template = template
    chat = Chat(tokenizer, notes.append)
    assert not chat.has_template
    assert chat.prompt("why?") == tokenizer(PLAIN.format(text="why?"))["input_ids"]
    (note,) = notes
    assert "requests are asked as plain text" in note
    assert any(part in note for part in UNUSABLE[template].split("|"))


def test_templates_with_other_wishes(tokenizer: PreTrainedTokenizerBase) -> None:
    """Content in parts; the date; a turn that ends in a token of its own."""
    notes: list[str] = []
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}"
        "{% for m in messages %}{{ m['content'][0]['text'] }}~{% endfor %}"
    )
    chat = Chat(tokenizer, notes.append)
    assert tokenizer.decode(chat.prompt("why?")).replace(" ", "") == "01Jul2025why?~"
    assert chat.ends == {2, ord("~")}
    assert notes == ["the chat template adds the date of today; it is given 2025-07-01 here"]


def test_loops() -> None:
    assert is_loop([7, 8, 9, 1, 2, 1, 2, 1, 2])
    assert is_loop([5] * 6)
    assert is_loop([3, 1, 4, 1, 1, 1, 1, 1])
    assert not is_loop([1, 2, 3, 4, 5, 6, 7, 7, 7])
    assert not is_loop([4])


def test_greedy_continuations_are_the_models(original: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    texts = [[5, 6, 7], [9], [70, 71, 72, 73, 74]]
    found = continue_texts(model, texts, {2}, 6)
    for text, (read, more) in zip(texts, found, strict=True):
        assert read == text
        ids = list(text)
        for token in more:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        assert len(more) == 6 or more[-1] == 2
    (_, first), *_ = found
    ((_, cut),) = continue_texts(model, texts[:1], {first[2]}, 6)
    assert cut == first[: first.index(first[2]) + 1]
    model.config.max_position_embeddings = 8
    full = continue_texts(model, [*texts, list(range(5, 20))], {2}, 6)
    assert [len(read) for read, _ in full] == [3, 1, 4, 4]
    assert max(len(more) for _, more in full) == 4


def test_answers_beside_the_originals(original: Path, checkpoint: Path, requests: Path) -> None:
    report = evaluate(str(checkpoint), EvaluateOptions(tasks=("chat",), requests=requests))
    assert report.chat is not None
    tokenizer = AutoTokenizer.from_pretrained(original)
    chat = Chat(tokenizer, print)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (original, checkpoint)
    ]
    kls, same = [], []
    for line in requests.read_text().splitlines():
        prompt = chat.prompt(json.loads(line)["text"])
        ((_, answer),) = continue_texts(models[0], [prompt], chat.ends, 40)
        with torch.no_grad():
            both = [model(torch.tensor([prompt + answer])).logits[0] for model in models]
        p, q = (each[len(prompt) - 1 : -1].log_softmax(1) for each in both)
        kls.append((p.exp() * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
    found = report.chat.all
    assert found.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-2)
    assert found.kl > 1e-4
    assert found.first_kl == pytest.approx(sum(kl[0].item() for kl in kls) / 3, rel=1e-2)
    assert found.agreement == pytest.approx(torch.cat(same).float().mean().item(), abs=0.05)
    assert (found.answers, found.tokens) == (3, sum(map(len, kls)))
    assert {kind: each.answers for kind, each in report.chat.kinds.items()} == {"one": 2, "two": 1}
    assert (report.chat.bound, report.protocol.chat_template) == (False, True)
    assert [row[0] for row in report.rows()] == [
        "chat KL, nats",
        "  of first tokens",
        "  same top token",
    ]
    path = requests.with_name("report.json")
    path.write_text(report.to_json())
    assert EvaluationReport.read(path) == report


def test_answers_on_the_page(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    """Chat KL stands beside perplexity."""
    text, file = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    options = EvaluateOptions(("perplexity", "chat"), text, requests=requests, window=64)
    found = evaluate(str(checkpoint), options)
    assert found.chat is not None
    file.write_text(found.to_json())
    page = write_report(checkpoint, tmp_path / "page.html", (file,)).read_text(encoding="utf-8")
    shown = found.chat.all
    for figure in (f"{shown.kl:.4f}", f"{shown.first_kl:.4f}", f"{100 * shown.agreement:.1f} %"):
        assert f'<td class="number">{figure}</td>' in page
    assert "Answers were not measured" not in page
    file.write_text(replace(found, chat=None).to_json())
    page = write_report(checkpoint, tmp_path / "other.html", (file,)).read_text(encoding="utf-8")
    assert "Answers were not measured" in page


def test_answers_of_the_original_itself(original: Path, requests: Path) -> None:
    options = EvaluateOptions(tasks=("chat",), requests=requests, reference=str(original))
    found = evaluate(str(original), options).chat
    assert found is not None
    assert abs(found.all.kl) < 1e-9
    assert found.all.agreement == 1


def test_cloze(original: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    words = ["red", "blue", "green", "grey", "red"]
    lines.write_text("".join(json.dumps({"text": f"it is {word}"}) + "\n" for word in words))
    _, items = read_cloze(lines, 5)
    for item, word in zip(items, words, strict=True):
        assert item.options[0] == word
        assert sorted(item.options) == ["blue", "green", "grey", "red"]
    found = evaluate(str(original), EvaluateOptions(tasks=("cloze",), lambada=lines)).cloze
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(original)
    right = 0
    for item in items:
        sums = []
        for option in item.options:
            ids = tokenizer(f"it is {option}", return_tensors="pt", add_special_tokens=False)
            tokens = ids.input_ids
            scores = model(tokens).logits[0, :-1].log_softmax(1)
            sums.append(scores.gather(1, tokens[0, 1:, None])[5:].sum().item())
        right += sums[0] == max(sums)
    assert found is not None
    assert (found.correct, found.lines) == (right, 5)
    with pytest.raises(PCDVQError, match="2 different last words to choose from, cloze needs 4"):
        read_cloze(lines, 2)


def test_patterns(original: Path) -> None:
    items = make_patterns(200)
    assert items == make_patterns(200)
    for item in items:
        assert len(set(item.options)) == 4
        assert item.passage.word == item.options[0]
    sums = [item for item in items if "+" in item.passage.context]
    assert len(sums) == 40
    for item in sums:
        a, _, b, _ = item.passage.context.rpartition("\n")[2].split()
        assert int(a) + int(b) == int(item.options[0])
    options = EvaluateOptions(tasks=("patterns",), limit=10, reference=str(original))
    report = evaluate(str(original), options)
    assert report.patterns is not None
    assert report.patterns.lines == 10
    assert report.patterns.paired is not None
    assert report.patterns.paired.difference == 0
