"""Commands as they may be shown: without the secrets that options carry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

HIDDEN = "***"
# Options of `vllm serve` whose values are secrets; argparse takes what they begin with, too.
SECRET_OPTIONS = ("--api-key", "--hf-token")
SECRET_WORDS = frozenset(
    (
        *("key", "keys", "apikey", "token", "secret", "secrets", "credential", "credentials"),
        *("password", "passwd", "passphrase", "pwd", "auth", "authorization", "bearer"),
        *("cookie", "cookies", "signature", "headers"),
    )
)
# Values that are secrets wherever they stand: tokens of the Hub and the like, and parts of a URL.
SECRET_VALUES = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|AKIA|xox[a-z]-)[\w-]{8,}|(?<=://)[^\s/@]+(?=@)"
    r"|(?<=Bearer )\S+"
)
SECRET_FIELD = re.compile(r"(?P<name>[\w.-]+)(?P<is>[=:]\s*)(?P<value>[^&?\s,;]+)")


def redacted(arguments: Iterable[str]) -> Iterator[str]:
    """`arguments` of a command, HIDDEN in the place of each secret."""
    hides = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        # A secret may begin with one dash, as short options do.
        if re.match("--[A-Za-z]" if hides else "--?[A-Za-z]", argument):
            hides = _is_secret(name)
            if equals:
                yield f"{name}={HIDDEN if hides else _shown(value)}"
            else:
                yield argument
        else:
            yield HIDDEN if hides else _shown(argument)


def _is_secret(name: str) -> bool:
    """Whether a field or option of that name has a secret."""
    words = re.split(r"[^a-z0-9]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
    option = name.lower().replace("_", "-")
    begins = option.startswith("--") and any(each.startswith(option) for each in SECRET_OPTIONS)
    return begins or not SECRET_WORDS.isdisjoint(words)


def _shown(value: str) -> str:
    """`value` without what is a secret in it."""
    if value.lstrip().startswith(("{", "[")):
        try:
            return json.dumps(_without_secrets(json.loads(value)))
        except (ValueError, RecursionError):
            return HIDDEN
    value = SECRET_VALUES.sub(HIDDEN, value)
    return SECRET_FIELD.sub(_hide_field, value)


def _hide_field(field: re.Match[str]) -> str:
    return f"{field['name']}{field['is']}{HIDDEN}" if _is_secret(field["name"]) else field[0]


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if _is_secret(key) else _without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(each) for each in value]
    return _shown(value) if isinstance(value, str) else value
