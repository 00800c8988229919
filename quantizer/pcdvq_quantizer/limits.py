"""What a model can read: how many tokens at once, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pcdvq_kernels.errors import PCDVQError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pcdvq_quantizer.selection import hf_config

# Of different architectures. Learned positions with an offset (OPT) have more rows than this.
CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
    "context_length",
    "seq_length",
)


@dataclass(frozen=True)
class Limits:
    """Limits of a model, None for what its configuration does not tell.

    Attributes:
        model: what the user called it.
        context: tokens it was made to read at once.
        vocabulary: tokens it has an embedding for.
    """

    model: str
    context: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: str, config: dict[str, Any] | PreTrainedConfig) -> Limits:
        """The limits that the config.json of `model`, or what transformers made of it, tells."""
        try:
            whole = hf_config(config) if isinstance(config, dict) else config
            text = whole.get_text_config()
        except (KeyError, ValueError, AttributeError, TypeError):
            return cls(model)  # opening the model says more
        context = (_positive(getattr(text, field, None)) for field in CONTEXT_FIELDS)
        vocabulary = _positive(getattr(text, "vocab_size", None))
        return cls(model, next(filter(None, context), None), vocabulary)

    def fit_window(self, window: int, option: str, spare: int, note: Callable[[str], None]) -> int:
        """`window`, or what the model can read where that is less.

        Args:
            window: tokens wanted.
            option: what asks for them, such as `--window`.
            spare: tokens that the model reads beside the window.
            note: is told if they are fewer.
        """
        if self.context is None or window + spare <= self.context:
            return window
        fitting = max(self.context - spare, 1)
        besides = f", {spare} beside the window" if spare else ""
        note(
            f"windows have {fitting} tokens, not the {window} of {option}: {self.model} reads at "
            f"most {self.context} at once{besides}"
        )
        return fitting

    def check_tokens(
        self, texts: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, owner: str
    ) -> None:
        """Raise PCDVQError if `texts` hold token ids that the model has no embedding for.

        Args:
            texts: token ids.
            tokenizer: what made them.
            owner: the model that it belongs to.
        """
        largest = max((max(text, default=0) for text in texts), default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise PCDVQError(
                f"the tokenizer of {owner} ({type(tokenizer).__name__}, {len(tokenizer)} tokens) "
                f"makes token {largest} of the text, {self.model} has embeddings for "
                f"{self.vocabulary} tokens; give the model its own tokenizer files"
            )


def check_vocabulary(tokens: int | None, original: int | None) -> None:
    """Raise PCDVQError if a model and its original have vocabularies of different size."""
    if None not in (tokens, original) and tokens != original:
        raise PCDVQError(
            f"the model has {tokens} tokens, its original {original}; name the original model with "
            "--reference"
        )


def _positive(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
