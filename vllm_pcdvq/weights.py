"""A look at every tensor of a checkpoint while vLLM loads it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import ClassVar

from pcdvq_kernels.checkpoint import check_finite
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper


class FiniteWeights(WeightsMapper):
    """A mapper that refuses tensors with NaN or infinity, under their names in the checkpoint.

    vLLM loads norms, embeddings and heads itself. It asks the quantization config for nothing but a
    mapper of names, which it then hands all tensors of any load format, and of a reload.
    """

    # What a mapper has just looked at: models hand their parts' loaders the tensor again.
    _last: ClassVar[weakref.ReferenceType[Tensor] | None] = None

    @classmethod
    def of(cls, mapper: WeightsMapper) -> FiniteWeights:
        """The same mapping of names."""
        return cls(**vars(mapper))

    def __or__(self, other: WeightsMapper) -> FiniteWeights:
        return self.of(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> FiniteWeights:
        # Python asks this before `other.__or__`, which would make a plain mapper.
        return self.of(WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The tensors under their new names.

        Raises:
            CheckpointError: one is not finite.
        """
        return super().apply(self._checked(weights))

    @classmethod
    def _checked(cls, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if cls._last is None or cls._last() is not tensor:
                check_finite(name, tensor)
                cls._last = weakref.ref(tensor)
            yield name, tensor
