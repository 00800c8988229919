"""PCDVQ checkpoints in transformers: `import pcdvq_quantizer.hf`, then `from_pretrained`.

    import pcdvq_quantizer.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)  # computes on the packed codes
    model.dequantize()                                        # plain torch modules from here on

Importing registers the quantization method `pcdvq`. For inference: no training, and only a
dequantized model can be saved. Needs no vLLM.
"""

from pcdvq_quantizer.hf.embedding import PCDVQEmbedding
from pcdvq_quantizer.hf.linear import PCDVQLinear, PCDVQTiedHead
from pcdvq_quantizer.hf.quantizer import PCDVQConfig, PCDVQHfQuantizer

__all__ = ["PCDVQConfig", "PCDVQEmbedding", "PCDVQHfQuantizer", "PCDVQLinear", "PCDVQTiedHead"]
