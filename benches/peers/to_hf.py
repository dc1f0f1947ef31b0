"""A GGUF file as a Hugging Face directory in bfloat16, made once and kept beside it: what vLLM and TRL read.

Used by their scripts; needs torch, transformers, gguf and accelerate.
"""

import os


def directory(path):
    """The directory for a model: itself, or the one made from a GGUF file."""
    if os.path.isdir(path):
        return path
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = os.path.split(path)
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    out = os.path.join(cache, "engine-peers", name.removesuffix(".gguf"))
    if os.path.exists(os.path.join(out, "complete")):
        return out
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # The tensors are plain by now, and saving refuses a model that says it is quantised.
    model.hf_quantizer = None
    for attribute in ("is_quantized", "quantization_method"):
        setattr(model, attribute, None)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
    open(os.path.join(out, "complete"), "w").close()
    return out
