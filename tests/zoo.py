"""Tiny random models of real architectures, and plain models, with inputs to run them on.

Each entry makes the same model for the same seed. Dropout is on wherever an architecture has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Entry:
    """A model to make, the call to make of it, and its LoRA targets."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: list[str]
    kind: str = ""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def model_with_seed_kept(self) -> nn.Module:
        """The model, with torch's random state left as it was."""
        state = torch.get_rng_state()
        model = self.model()
        torch.set_rng_state(state)
        return model

    def batch(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.inputs()


def _decoder(config: str, model: str, **extra: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        common = dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, max_position_embeddings=64, attention_dropout=0.1, use_cache=False, pad_token_id=0,
        )  # fmt: skip
        return getattr(transformers, model)(getattr(transformers, config)(**{**common, **extra}))

    return make


def _plain_config(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 60, (3, 11))}


_BERT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
_QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ALL = [*_QKVO, "gate_proj", "up_proj", "down_proj"]


ARCHITECTURES: list[Entry] = [
    Entry("llama", _decoder("LlamaConfig", "LlamaForCausalLM"), _tokens, _ALL, "decoder, grouped attention"),
    Entry("llama-mha", _decoder("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=4), _tokens, _ALL, "decoder"),
    Entry("qwen2", _decoder("Qwen2Config", "Qwen2ForCausalLM"), _tokens, _ALL, "decoder, biases"),
    Entry("qwen3", _decoder("Qwen3Config", "Qwen3ForCausalLM", head_dim=8), _tokens, _ALL, "decoder"),
    Entry("mistral", _decoder("MistralConfig", "MistralForCausalLM"), _tokens, _ALL, "decoder, sliding window"),
    Entry("gemma2", _decoder("Gemma2Config", "Gemma2ForCausalLM", head_dim=8), _tokens, _ALL, "decoder"),
    Entry("gemma3", _decoder("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8), _tokens, _ALL, "decoder"),
    Entry(
        "phi3",
        _decoder("Phi3Config", "Phi3ForCausalLM", resid_pdrop=0.1, eos_token_id=1, bos_token_id=2),
        _tokens,
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "decoder, fused projections",
    ),
    Entry(
        "mixtral",
        _decoder("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
        _tokens,
        _QKVO,
        "mixture of experts",
    ),
    Entry(
        "qwen3-moe",
        _decoder("Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        _tokens,
        _QKVO,
        "mixture of experts",
    ),
    Entry(
        "gpt2",
        _plain_config("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=64, use_cache=False),
        _tokens,
        ["c_attn", "c_proj", "c_fc"],
        "decoder, Conv1D",
    ),
    Entry(
        "opt",
        _plain_config(
            "OPTConfig", "OPTForCausalLM", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=64, use_cache=False,
        ),
        _tokens,
        ["q_proj", "v_proj", "fc1", "fc2"],
        "decoder",
    ),
    Entry(
        "bert",
        _plain_config("BertConfig", "BertForSequenceClassification", **_BERT),
        _tokens,
        ["query", "value", "dense"],
        "encoder",
    ),
    Entry(
        "roberta",
        _plain_config("RobertaConfig", "RobertaModel", max_position_embeddings=64, **_BERT),
        _tokens,
        ["query", "key", "value"],
        "encoder",
    ),
    Entry(
        "distilbert",
        _plain_config("DistilBertConfig", "DistilBertModel", dim=32, hidden_dim=48, n_layers=2, n_heads=4,
                      vocab_size=64),
        _tokens,
        ["q_lin", "v_lin", "lin1"],
        "encoder",
    ),
    Entry(
        "deberta-v2",
        _plain_config("DebertaV2Config", "DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"],
                      **_BERT),
        _tokens,
        ["query_proj", "value_proj"],
        "encoder, relative positions",
    ),
    Entry(
        "albert",
        _plain_config("AlbertConfig", "AlbertModel", embedding_size=16, **_BERT),
        _tokens,
        ["query", "value", "ffn"],
        "encoder, one layer called twice",
    ),
    Entry(
        "t5",
        _plain_config("T5Config", "T5ForConditionalGeneration", d_model=32, d_ff=48, d_kv=8, num_layers=2,
                      num_heads=4, vocab_size=64, use_cache=False, decoder_start_token_id=0),
        lambda: {**_tokens(), "decoder_input_ids": torch.randint(5, 60, (3, 7))},
        ["q", "v", "wi"],
        "encoder-decoder",
    ),
    Entry(
        "bart",
        _plain_config("BartConfig", "BartForConditionalGeneration", d_model=32, encoder_layers=2, decoder_layers=2,
                      encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                      vocab_size=64, max_position_embeddings=64, use_cache=False),
        lambda: {**_tokens(), "decoder_input_ids": torch.randint(5, 60, (3, 7))},
        ["q_proj", "v_proj", "fc1"],
        "encoder-decoder",
    ),
    Entry(
        "vit",
        _plain_config("ViTConfig", "ViTModel", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, image_size=16, patch_size=4),
        lambda: {"pixel_values": torch.randn(3, 3, 16, 16)},
        ["q_proj", "v_proj"],
        "vision",
    ),
    Entry(
        "clip",
        _plain_config(
            "CLIPConfig", "CLIPModel",
            text_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                             vocab_size=64, eos_token_id=63),
            vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                               image_size=16, patch_size=4),
            projection_dim=16,
        ),
        lambda: {**_tokens(), "pixel_values": torch.randn(3, 3, 16, 16)},
        ["q_proj", "v_proj", "fc1"],
        "vision and text",
    ),
    Entry(
        "whisper",
        _plain_config("WhisperConfig", "WhisperForConditionalGeneration", d_model=32, encoder_layers=2,
                      decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                      decoder_ffn_dim=48, vocab_size=64, num_mel_bins=16, max_source_positions=20,
                      max_target_positions=32, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                      decoder_start_token_id=1),
        lambda: {"input_features": torch.randn(3, 16, 40), "decoder_input_ids": torch.randint(5, 60, (3, 7))},
        ["q_proj", "v_proj", "fc1"],
        "audio, encoder-decoder",
    ),
    Entry(
        "mamba",
        _plain_config("MambaConfig", "MambaForCausalLM", hidden_size=32, num_hidden_layers=2, vocab_size=64,
                      state_size=8, use_cache=False),
        _tokens,
        ["in_proj", "x_proj"],
        "state space, a loop over the sequence",
    ),
    Entry(
        "bloom",
        _plain_config("BloomConfig", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4, vocab_size=64,
                      use_cache=False, hidden_dropout=0.1, attention_dropout=0.1),
        _tokens,
        ["query_key_value", "dense_h_to_4h"],
        "decoder, fused projections, positions as a bias of attention",
    ),
    Entry(
        "dinov2",
        _plain_config("Dinov2Config", "Dinov2Model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                      image_size=32, patch_size=8, drop_path_rate=0.3, hidden_dropout_prob=0.1),
        lambda: {"pixel_values": torch.randn(3, 3, 32, 32)},
        ["fc1", "fc2"],
        "vision, stochastic depth: two graphs",
    ),
    Entry(
        "convnext",
        _plain_config("ConvNextConfig", "ConvNextModel", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2,
                      drop_path_rate=0.3, layer_scale_init_value=1.0),
        lambda: {"pixel_values": torch.randn(3, 3, 32, 32)},
        ["pwconv1", "pwconv2"],
        "convolutions, stochastic depth: two graphs",
    ),
    Entry(
        "wav2vec2",
        _plain_config("Wav2Vec2Config", "Wav2Vec2Model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3],
                      num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, layerdrop=0.0,
                      apply_spec_augment=False),
        lambda: {"input_values": torch.randn(3, 800)},
        ["q_proj", "v_proj"],
        "audio, a parametrized convolution",
    ),
]  # fmt: skip


# ---- plain models ----


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(self.fc1(x).relu()))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class BatchNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + F.dropout(block(x), 0.1, self.training)
        return self.head(x)


class SharedModule(nn.Module):
    """One layer called three times, and reached under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)
        self.alias = self.shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alias(self.shared(self.shared(self.first(x)).tanh()).tanh())


class FunctionalWeight(nn.Module):
    """A layer's weight that is used without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.linear(x, self.proj.weight, self.proj.bias).relu() + x @ self.proj.weight.t())


class BareParameter(nn.Module):
    """A weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.randn(8, 8) / 3)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.linear(x, self.weight_in).relu())


class Attention(nn.Module):
    """Attention written by hand, with fixed heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(-2, -3) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = F.dropout((q @ k.transpose(-1, -2) / 2).softmax(-1), 0.1, self.training)
        return self.o_proj((weights @ v).transpose(-2, -3).flatten(-2))


class OptionalInput(nn.Module):
    """A forward whose optional argument a trace freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.fc(x)
        return x if mask is None else x * mask


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoderLayer`, whose fast path reads weights without calling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _vector() -> dict[str, Any]:
    return {"x": torch.randn(5, 8)}


def _sequence() -> dict[str, Any]:
    return {"x": torch.randn(3, 5, 8)}


PLAIN: list[tuple[Entry, dict[str, str]]] = [
    (Entry("mlp", MLP, _vector, ["fc1", "fc2"]), {}),
    (Entry("cnn", CNN, lambda: {"x": torch.randn(5, 3, 8, 8)}, ["fc1", "fc2"]), {}),
    (Entry("batch-norm", BatchNormNet, _vector, ["fc1", "fc2"]), {}),
    (Entry("residual", Residual, _vector, ["1.1", "head"]), {}),
    (Entry("shared-module", SharedModule, _vector, ["first", "shared"]), {}),
    (Entry("functional-weight", FunctionalWeight, _vector, ["proj", "out"]), {}),
    (Entry("attention", Attention, _sequence, ["q_proj", "v_proj", "o_proj"]), {}),
    (Entry("optional-input", OptionalInput, _vector, ["fc"]), {}),
    (Entry("given-input", OptionalInput, lambda: {**_vector(), "mask": torch.rand(5, 8)}, ["fc"]), {}),
    (Entry("torch-encoder", TorchEncoder, _sequence, ["linear1", "linear2"]), {}),
]
"""Plain models, each with the captures that must refuse it and words of the reason."""
