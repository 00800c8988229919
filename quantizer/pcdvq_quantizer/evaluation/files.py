"""Where a model to evaluate, its tokenizer and its original are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcdvq_kernels.checkpoint import REPORT_FILE, read_json
from pcdvq_kernels.config import QUANT_METHOD
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq import layout as vptq
from transformers import AutoTokenizer

from pcdvq_quantizer.sources import SafetensorsSource, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        name: what the user called it.
        directory: where it is.
        gguf: the file in `directory`, or None for a Hugging Face directory.
        config: its config.json.
    """

    name: str
    directory: Path
    gguf: str | None
    config: dict[str, Any]

    @classmethod
    def find(cls, model: str) -> ModelFiles:
        """Find `model`: a directory, a .gguf file, or a hub id (downloaded, cached).

        Raises:
            PCDVQError: it does not exist or holds no weights that can be read.
        """
        source = open_source(model)
        if isinstance(source, SafetensorsSource):
            return cls(model, source.directory, None, source.config)
        path = Path(model).expanduser()
        return cls(model, path.parent, path.name, source.config)

    @property
    def is_pcdvq(self) -> bool:
        return self._method == QUANT_METHOD

    @property
    def is_vptq(self) -> bool:
        return self._method == vptq.QUANT_METHOD

    @property
    def _method(self) -> str | None:
        return (self.config.get("quantization_config") or {}).get("quant_method")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            PCDVQError: there is none that can be read.
        """
        try:
            return AutoTokenizer.from_pretrained(self.directory, gguf_file=self.gguf)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PCDVQError(
                f"{self.name} has no tokenizer that transformers can load ({reason}); copy the "
                "tokenizer files of the original model into its directory"
            ) from error

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model gives probabilities."""
        return (self.config.get("text_config") or self.config)["vocab_size"]

    @property
    def context(self) -> int | None:
        """Tokens the model can read at once, None where its configuration does not say."""
        text_config = self.config.get("text_config") or self.config
        context = text_config.get("max_position_embeddings")
        return context if isinstance(context, int) else None

    def check_length(self, tokens: int) -> None:
        """Raise PCDVQError if the model's context is shorter than `tokens`."""
        if self.context is not None and tokens > self.context:
            raise PCDVQError(
                f"{self.name} takes {self.context} tokens, this evaluation needs {tokens}; give a "
                "smaller --window or shorter lines"
            )


def find_reference(files: ModelFiles, reference: str | None) -> ModelFiles:
    """The original of `files`: `reference`, or what the checkpoint's report names.

    Raises:
        PCDVQError: it is not known or not reachable.
    """
    if reference is not None:
        return ModelFiles.find(reference)
    report = files.directory / REPORT_FILE
    name = read_json(report).get("model") if report.is_file() else None
    if not isinstance(name, str):
        raise PCDVQError(
            f"the original of {files.name} is not known; name it with --reference MODEL"
        )
    try:
        return ModelFiles.find(name)
    except PCDVQError as error:
        raise PCDVQError(
            f"the original of {files.name} is {name} by its report, which cannot be "
            f"opened; name it with --reference MODEL ({error})"
        ) from error
