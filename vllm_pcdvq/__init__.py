"""vLLM plugin that serves PCDVQ checkpoints, and published VPTQ ones."""

SUPPORTED_VLLM = (0, 32)


def register() -> None:
    """Make `pcdvq` and `vptq` known to vLLM; the `vllm.general_plugins` entry point.

    vLLM calls this in every process, possibly more than once. Whatever goes wrong is raised: a
    plugin that is only half there would fail later and less clearly.

    Raises:
        PCDVQError: the installed vLLM is not a version this release was tested with.
    """
    import vllm

    check_vllm_version(vllm.__version__)

    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_pcdvq.config import PCDVQConfig
    from vllm_pcdvq.vptq import VPTQConfig

    register_quantization_config("pcdvq")(PCDVQConfig)
    register_quantization_config("vptq")(VPTQConfig)


def check_vllm_version(found: str) -> None:
    """Check `found`, a version string of vLLM.

    Raises:
        PCDVQError: outside of the supported range, or not a release.
    """
    from pcdvq_kernels.errors import PCDVQError

    major, minor = SUPPORTED_VLLM
    if found.split(".")[:2] != [str(major), str(minor)]:
        raise PCDVQError(
            f"vllm-pcdvq supports vLLM {major}.{minor}.x, found {found}. Install a version that "
            f"fits (pip install 'vllm>={major}.{minor},<{major}.{minor + 1}'), or a release of "
            "vllm-pcdvq for your vLLM."
        )
