"""Where a model to evaluate, its tokenizer and its original are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcdvq_kernels.config import QUANT_METHOD
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq import layout as vptq
from transformers import AutoTokenizer

from pcdvq_quantizer.identity import weights_sha256
from pcdvq_quantizer.limits import Limits
from pcdvq_quantizer.record import read_run
from pcdvq_quantizer.sources import SafetensorsSource, Source, open_source, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        name: what the user called it.
        source: its files.
        directory: where it is.
        gguf: the file in `directory`, or None for a Hugging Face directory.
        config: its config.json.
    """

    name: str
    source: Source
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
            return cls(model, source, source.directory, None, source.config)
        path = source.location
        return cls(model, source, path.parent, path.name, source.config)

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
            return AutoTokenizer.from_pretrained(
                self.directory, gguf_file=self.gguf, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise PCDVQError(
                f"{self.name} has no tokenizer that transformers can load ({reason(error)}); copy "
                "the tokenizer files of the original model into its directory"
            ) from error

    @property
    def limits(self) -> Limits:
        """What it can read."""
        return Limits.of(self.name, self.config)

    def check_length(self, tokens: int) -> None:
        """Raise PCDVQError if the model's context is shorter than `tokens`."""
        context = self.limits.context
        if context is not None and tokens > context:
            raise PCDVQError(
                f"{self.name} takes {context} tokens, this evaluation needs {tokens}; give shorter "
                "lines or requests"
            )


def find_reference(files: ModelFiles, reference: str | None) -> ModelFiles:
    """The original of `files`: `reference`, or what the checkpoint's report names.

    Raises:
        PCDVQError: it is not known or not reachable, or another model has its name by now.
    """
    if reference is not None:
        return ModelFiles.find(reference)
    run = read_run(files.directory)
    name = run.model
    if name is None:
        raise PCDVQError(
            f"the original of {files.name} is not known; name it with --reference MODEL"
        )
    try:
        found = ModelFiles.find(name)
    except PCDVQError as error:
        raise PCDVQError(
            f"the original of {files.name} is {name} by its report, which cannot be "
            f"opened; name it with --reference MODEL ({error})"
        ) from error
    if run.model_sha256 not in (None, weights_sha256(found.source)):
        raise PCDVQError(
            f"{name} has other weights than the model that {files.name} was made of; name that one "
            "with --reference MODEL"
        )
    return found
