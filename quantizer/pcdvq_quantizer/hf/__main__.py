"""`python -m pcdvq_quantizer.hf MODULE ARGUMENTS...`: `python -m MODULE ...` that knows PCDVQ.

For programs that load a model with transformers and leave no place for an import:

    python -m pcdvq_quantizer.hf lm_eval --model hf --model_args pretrained=CHECKPOINT ...
"""

from __future__ import annotations

import runpy
import sys

import pcdvq_quantizer.hf  # noqa: F401 (registers the quantization method)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m pcdvq_quantizer.hf MODULE ARGUMENTS...")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
