"""Where vLLM's sources change tensors while they load, found by reading them."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

import vllm

ROOT = Path(vllm.__file__).parent
FOLDERS = ("model_executor/models", "model_executor/layers/mamba", "models")
NOT_SERVED = {"amd", "xpu"}  # platforms
# Methods of a tensor, and functions of torch, that reorder, cut or join.
REORDERING = {
    *("cat", "chunk", "concat", "expand", "flatten", "flip", "index_select", "movedim", "narrow"),
    *("pad", "permute", "repeat", "repeat_interleave", "reshape", "roll", "split", "stack"),
    *("swapaxes", "t", "tensor_split", "transpose", "unbind", "unflatten", "view"),
}
TENSORS = {"loaded_weight", "weight", "tensor", "w"}


def find_transforms() -> dict[str, str]:
    """Digest of all that each file does to tensors while they load, of files that do anything."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT).with_suffix("")
            if NOT_SERVED.isdisjoint(inside.parts) and (text := _describe(path)):
                place = inside.as_posix().removeprefix("model_executor/").removeprefix("models/")
                found[place] = hashlib.sha256(text.encode()).hexdigest()[:6]
    return found


def _describe(path: Path) -> str:
    source = path.read_text()
    if "load" not in source:
        return ""
    nodes = ast.walk(ast.parse(source))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    loading = _loading(functions)
    lines: list[str] = []
    for function in functions:
        if "weight_loader" in source:
            lines += map(ast.unparse, _overrides(function))
        if function.name in loading:
            lines += map(ast.unparse, _transforms(function))
    return "\n".join(lines)


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _loading(found: list[ast.FunctionDef]) -> set[str]:
    """Names of the functions that weights pass through, and of those of the file that they call."""
    functions: dict[str, list[ast.FunctionDef]] = {}
    for function in found:
        functions.setdefault(function.name, []).append(function)
    todo = [
        name
        for name, same in functions.items()
        if "load_weight" in name
        or "weight_loader" in name
        or any(_is_loaded(arg) for each in same for arg in each.args.args)
    ]
    loading: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in loading:
            loading.add(name)
            for function in functions[name]:
                todo += [each for each in _called(function) if each in functions]
    return loading - {"forward", "__init__"}


def _is_loaded(arg: ast.arg) -> bool:
    if arg.arg.endswith("weights") and arg.annotation is not None:
        return "Iterable[tuple[str" in ast.unparse(arg.annotation)
    return arg.arg == "loaded_weight"


def _called(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and _name(node.value) in ("self", "cls"):
            yield node.attr


def _transforms(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Expressions that may give a tensor other values or another order."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # Strings are split, too, at strings.
            texts = (
                isinstance(each, ast.Constant) and isinstance(each.value, str) for each in node.args
            )
            if node.func.attr in REORDERING and not any(texts):
                yield node
        elif isinstance(node, ast.BinOp | ast.UnaryOp):
            operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
            if any(_name(each) in TENSORS for each in operands):
                yield node
        elif isinstance(node, ast.Attribute):
            if node.attr in ("T", "mT"):
                yield node
        elif isinstance(node, ast.Subscript) and _name(node.value) in TENSORS:
            yield node


def _overrides(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Where something called weight or param gets another loader than its layer's."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _name(node.func) == "set_weight_attrs":
            target, *rest = map(ast.unparse, node.args)
            if "weight_loader" in "".join(rest) and target.endswith(("weight", "param")):
                yield node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = ast.unparse(node.targets[0])
            if target.endswith(("weight.weight_loader", "param.weight_loader")):
                yield node
