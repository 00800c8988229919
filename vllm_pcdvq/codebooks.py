"""The codebooks of a checkpoint on their way from the API server into the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from pcdvq_kernels.checkpoint import (
    CODEBOOK_FILE,
    load_codebooks,
    open_checkpoint,
    read_quantization_config,
)
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import CodebookSpec, PCDVQCheckpointConfig
from pcdvq_kernels.errors import CheckpointError


def read_codebooks(
    model: str, revision: str | None, config: PCDVQCheckpointConfig
) -> dict[str, Codebook]:
    """Read the codebooks of `model`, a directory or the id of a repository on the Hub.

    Every header of a directory is checked on the way; of a repository only two small files are
    fetched, through the Hub's cache, and its weights are checked while they load. A directory
    without weights will do for `--load-format dummy`; any other loader refuses it.

    Args:
        model: directory or repository id.
        revision: of the repository; None is its main branch.
        config: what the configuration of `model` must be.

    Raises:
        CheckpointError: a damaged checkpoint, another configuration, or a file that cannot be
            fetched.
    """
    local = Path(model)
    if local.is_dir() and any(path.name != CODEBOOK_FILE for path in local.glob("*.safetensors*")):
        checkpoint = open_checkpoint(local)
        found, codebooks = checkpoint.config, checkpoint.codebooks
    else:
        config_file, codebook_file = (
            local / name if local.is_dir() else _fetch(model, revision, name)
            for name in ("config.json", CODEBOOK_FILE)
        )
        found = PCDVQCheckpointConfig.parse(read_quantization_config(config_file.parent))
        codebooks = load_codebooks(codebook_file, found)
    if found != config:
        raise CheckpointError(
            f"the quantization_config of {model} is not the one this server was started with: "
            "its weights do not fit. Start a server for it."
        )
    return codebooks


def _fetch(model: str, revision: str | None, name: str) -> Path:
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot fetch {name} of {model} (revision {revision or 'main'}): {error}. "
            "Check the name and the network, or serve a local copy of the whole checkpoint."
        ) from error


class CodebookStore:
    """Codebooks that are pickled once and shared by all layers of a worker.

    The tables are kept as numpy arrays: torch tensors would cross process borders as handles of
    shared memory, which die with the process that made them.
    """

    def __init__(self, codebooks: dict[str, Codebook]) -> None:
        self._tables: dict[str, tuple[CodebookSpec, np.ndarray, np.ndarray]] = {}
        self._codebooks: dict[tuple[str, torch.device], Codebook] = {}
        self._codewords: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.replace(codebooks)

    def replace(self, codebooks: dict[str, Codebook]) -> None:
        """Take other tables of the same shapes; layers that share codewords see them at once."""
        for id, book in codebooks.items():
            self._tables[id] = book.spec, book.directions.numpy(), book.magnitudes.numpy()
        self._codebooks.clear()
        for (id, device), codewords in self._codewords.items():
            codewords.copy_(self._served(id, device))

    def codebook(self, id: str, device: torch.device) -> Codebook:
        """The tables of codebook `id` on `device`."""
        key = id, device
        if key not in self._codebooks:
            spec, *tables = self._tables[id]
            on_device = (torch.as_tensor(table, device=device) for table in tables)
            self._codebooks[key] = Codebook(spec, *on_device)
        return self._codebooks[key]

    def codewords(self, id: str, device: torch.device) -> torch.Tensor:
        """The one tensor that all layers on `device` share: the op's argument `codewords`."""
        key = id, device
        if key not in self._codewords:
            self._codewords[key] = self._served(id, device)
        return self._codewords[key]

    def _served(self, id: str, device: torch.device) -> torch.Tensor:
        # Imported here because it brings the op library: `register` must stay light.
        from pcdvq_kernels.ops import prepack_codewords

        codebook = self.codebook(id, device)
        return prepack_codewords(codebook.codewords(), codebook.spec)

    def __getstate__(self) -> dict[str, Any]:
        return {"_tables": self._tables, "_codebooks": {}, "_codewords": {}}
