"""All readers. A new one is a file beside this and a line here."""

from __future__ import annotations

from fxlora.checkpoint.readers.base import Reader
from fxlora.checkpoint.readers.llama_cpp import LLAMA_CPP
from fxlora.checkpoint.readers.onnxruntime import ONNXRUNTIME
from fxlora.checkpoint.readers.peft import PEFT
from fxlora.checkpoint.readers.sglang import SGLANG
from fxlora.checkpoint.readers.torchtune import TORCHTUNE
from fxlora.checkpoint.readers.vllm import VLLM

READERS: dict[str, Reader] = {reader.name: reader for reader in (PEFT, VLLM, SGLANG, LLAMA_CPP, TORCHTUNE, ONNXRUNTIME)}
"""By name, in the order of the documentation's table."""
