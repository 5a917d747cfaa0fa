"""What is compared with peft: one case for each layer kind, variant, initialiser and field of the configuration.

A case is a model, a call of it, and the fields of the configuration. The tests of this folder and the table of
`benchmarks.parity` measure the same cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import FunctionalWeight, SharedModule

ALL = ("symbolic", "export", "modules")


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison.

    Attributes:
        name: for people and test ids.
        group: the part of the table: kind, variant, initialiser or field.
        make: the model, from torch's random state.
        inputs: keyword arguments of one call.
        config: fields of the configuration, but `r` and `lora_alpha`, which all cases share unless they set them.
        captures: that can hold the model; the others must refuse it.
        peft_fails: what peft does instead of `W + s B A`, as a regular expression for `Side.failure`; empty where it is
            right.
        by_weight: whether the branches equal an update of the weight, which a float64 reference computes.
        other_factors: whether our factors have other shapes than peft's on purpose.
        unmergeable: whether no weight can hold the branches, so that a merge is refused.
        tolerance: of the largest error relative to the largest value.
        ours: fields that only our configuration has.
        without: figures that mean nothing here.
    """

    name: str
    group: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any]
    captures: tuple[str, ...] = ALL
    peft_fails: str = ""
    by_weight: bool = True
    other_factors: bool = False
    unmergeable: bool = False
    tolerance: float = 2e-5
    ours: dict[str, Any] = field(default_factory=dict[str, Any])
    without: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """The model, always the same, in evaluation."""
        torch.manual_seed(0)
        return self.make().eval()

    def batch(self) -> dict[str, Any]:
        """The call's arguments, always the same."""
        torch.manual_seed(1)
        return self.inputs()

    @property
    def settings(self) -> dict[str, Any]:
        """All fields that both libraries have."""
        return {"r": 4, "lora_alpha": 6, **self.config}


# ---- models ----


class Layer(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Sequence(Layer):
    """A layer that returns its output first, as recurrent layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Pair(Layer):
    """A layer of two inputs."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.layer(x, other)


class LSTMStep(Layer):
    """A cell with two states."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x, (h, c))


class SelfAttention(Layer):
    """Attention of a sequence to itself, without the weights of the attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class CrossAttention(Layer):
    """Attention to other sequences, with the weights of the attention as a second result."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(q, k, v)


class Net(nn.Module):
    """Two linear layers with dropout between, an embedding-free stand-in for a network."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(8, 12), nn.Dropout(0.2), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.fc1(x).tanh()))


class Blocks(nn.Module):
    """Blocks in a list, below a body and a head, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.layers:
            x = x + block["q"](x).tanh() * block["v"](x)
        return self.head(x)


class Tokens(nn.Module):
    """An embedding, a body and a head, whose weight may be the embedding's."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).tanh())


class Weights(nn.Module):
    """A module whose parameters are read by a function of its own."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.names = ["first", "second"][: len(shapes)]
        for name, shape in zip(self.names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *[getattr(self, name) for name in self.names])


class TransposedExperts(Weights):
    """Experts stored `(E, in, out)`, which they say as those of transformers do."""

    is_transposed = True


def experts(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = torch.einsum("bi,eoi->ebo", x, up).relu()
    return torch.einsum("ebi,eoi->bo", hidden, down)


def transposed_experts(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x.unsqueeze(0).expand(up.shape[0], -1, -1), up).relu(), down).sum(0)


def _gpt2_layer() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 8)
    nn.init.normal_(layer.bias)
    return Layer(layer)


def _gemma3_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Layer(Gemma3TextScaledWordEmbedding(11, 8, 8, embed_scale=8**0.5))


def _bart_embedding() -> nn.Module:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    return Layer(BartScaledWordEmbedding(11, 8, 8, embed_scale=3.0))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=32, max_position_embeddings=32, num_local_experts=3, num_experts_per_tok=2, use_cache=False,
        )
    )  # fmt: skip


def llama(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        common = dict(
            hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=32, max_position_embeddings=32, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**{**common, **settings}))

    return make


# ---- inputs ----


def tensors(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(shape) for name, shape in shapes.items()}


def indices() -> dict[str, Any]:
    return {"x": torch.tensor([[0, 3, 3, 7], [10, 0, 5, 3], [1, 2, 3, 4]])}


def token_ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(1, 30, (3, 7))}


VECTOR = tensors(x=(5, 8))
SEQUENCE = tensors(x=(3, 5, 8))
STEPS = tensors(x=(2, 3, 8))


# ---- kinds ----


_NOT_SUPPORTED = "adapter: .*is not supported"
_TWICE = "forward differs"
"""peft adds the update of an attention's output projection twice."""

GRAPHLESS = ("export", "modules")
"""For modules that a symbolic trace keeps whole, so that it does not see their weights."""


def _kind(name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], **more: Any) -> Case:
    config = more.pop("config", {"target_modules": ["layer"]})
    return Case(name, "kind", make, inputs, config, **more)


def _embedding(name: str, **settings: Any) -> Case:
    more = {key: settings.pop(key) for key in ("by_weight", "captures", "unmergeable") if key in settings}
    return _kind(name, lambda: Layer(nn.Embedding(11, 8, **settings)), indices, **more)


def _conv(name: str, cls: type[nn.Module], shape: tuple[int, ...], peft_fails: str = "", **settings: Any) -> Case:
    channels = settings.pop("channels", (4, 6))
    grouped = settings.get("groups", 1) > 1
    captures = GRAPHLESS if peft_fails == _NOT_SUPPORTED else ALL
    return _kind(
        name, lambda: Layer(cls(*channels, **{"kernel_size": 3, **settings})), tensors(x=shape), peft_fails=peft_fails,
        captures=captures, other_factors=grouped,
    )  # fmt: skip


def _attention(name: str, inputs: Callable[[], dict[str, Any]], cls: type[Layer] = CrossAttention, **more: Any) -> Case:
    settings = {"batch_first": True, **more.pop("settings", {})}
    return _kind(
        name, lambda: cls(nn.MultiheadAttention(8, 2, dropout=0.1, **settings)), inputs,
        captures=more.pop("captures", GRAPHLESS), peft_fails=more.pop("peft_fails", _TWICE), **more,
    )  # fmt: skip


def _parameter(name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], *names: str) -> Case:
    config = {"target_modules": [], "target_parameters": [f"layer.{each}" for each in names]}
    return _kind(name, lambda: Layer(make()), inputs, config=config)


KINDS: list[Case] = [
    _kind("nn.Linear", lambda: Layer(nn.Linear(8, 6)), SEQUENCE),
    _kind("nn.Linear without bias", lambda: Layer(nn.Linear(8, 6, bias=False)), VECTOR),
    _kind("transformers Conv1D", _gpt2_layer, SEQUENCE),
    _embedding("nn.Embedding"),
    _embedding("nn.Embedding, padding_idx", padding_idx=3, by_weight=False),
    _embedding("nn.Embedding, scale_grad_by_freq", scale_grad_by_freq=True, by_weight=False),
    _embedding("nn.Embedding, max_norm", max_norm=1.5, by_weight=False, unmergeable=True),
    _kind("Gemma3 scaled embedding", _gemma3_embedding, indices),
    _kind("BART scaled embedding", _bart_embedding, indices),
    _conv("nn.Conv1d", nn.Conv1d, (2, 4, 9)),
    _conv("nn.Conv2d", nn.Conv2d, (2, 4, 7, 6), padding=1),
    _conv("nn.Conv3d", nn.Conv3d, (2, 4, 4, 5, 3)),
    _conv("nn.Conv2d, 1x1", nn.Conv2d, (2, 4, 5, 4), kernel_size=1),
    _conv("nn.Conv2d, stride", nn.Conv2d, (2, 4, 7, 6), stride=(2, 1), kernel_size=(3, 2), bias=False),
    _conv("nn.Conv2d, padding='same'", nn.Conv2d, (2, 4, 7, 6), padding="same", kernel_size=(4, 3)),
    _conv("nn.Conv2d, unbatched", nn.Conv2d, (4, 7, 6)),
    _conv("nn.Conv1d, dilation", nn.Conv1d, (2, 4, 9), "forward: .*size", dilation=2),
    _conv("nn.Conv2d, padding_mode", nn.Conv2d, (2, 4, 7, 6), "forward differs", padding=1, padding_mode="circular"),
    _conv("nn.Conv1d, padding_mode='reflect', 'same'", nn.Conv1d, (2, 4, 9), "forward differs", padding="same",
          padding_mode="reflect", kernel_size=4),
    _conv("nn.Conv2d, groups", nn.Conv2d, (2, 4, 7, 6), "merge: .*NotImplementedError", groups=2),
    _conv("nn.Conv1d, depthwise", nn.Conv1d, (2, 4, 9), "merge: .*NotImplementedError", channels=(4, 4), groups=4),
    _conv("nn.ConvTranspose1d", nn.ConvTranspose1d, (2, 4, 9), _NOT_SUPPORTED, stride=2),
    _conv("nn.ConvTranspose2d, groups", nn.ConvTranspose2d, (2, 4, 5, 4), _NOT_SUPPORTED, groups=2, output_padding=0),
    _kind("nn.Bilinear", lambda: Pair(nn.Bilinear(8, 5, 6)), tensors(x=(4, 8), other=(4, 5)),
          captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _attention("nn.MultiheadAttention, self", SEQUENCE, SelfAttention),
    _attention("nn.MultiheadAttention, cross", tensors(q=(3, 4, 8), k=(3, 5, 8), v=(3, 5, 8))),
    _attention("nn.MultiheadAttention, batch second", SEQUENCE, SelfAttention, settings={"batch_first": False}),
    _attention("nn.MultiheadAttention, kdim and vdim", tensors(q=(3, 4, 8), k=(3, 5, 6), v=(3, 5, 7)),
               settings={"kdim": 6, "vdim": 7}, peft_fails="adapter: .*same embed"),
    _attention("nn.MultiheadAttention, out_proj alone", SEQUENCE, SelfAttention, config={"target_modules": ["out_proj"]},
               peft_fails="forward differs"),
    _kind("nn.TransformerEncoderLayer",
          lambda: Layer(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)), SEQUENCE,
          config={"target_modules": ["self_attn", "linear1", "linear2"]}, captures=GRAPHLESS, peft_fails=_TWICE),
    _parameter("parameter, F.linear", lambda: Weights(F.linear, (6, 8)), VECTOR, "first"),
    _parameter("parameter, x @ W", lambda: Weights(torch.matmul, (8, 6)), VECTOR, "first"),
    _parameter("parameter, einsum", lambda: Weights(lambda x, w: torch.einsum("bi,io->bo", x, w), (8, 6)), VECTOR,
               "first"),
    _parameter("experts (E, out, in)", lambda: Weights(experts, (3, 6, 8), (3, 5, 6)), VECTOR, "first"),
    _parameter("experts, two parameters", lambda: Weights(experts, (3, 6, 8), (3, 5, 6)), VECTOR, "second", "first"),
    _parameter("experts (E, in, out), two parameters",
               lambda: TransposedExperts(transposed_experts, (3, 8, 6), (3, 6, 5)), VECTOR, "first", "second"),
    _kind("Mixtral's experts", _mixtral, token_ids, captures=GRAPHLESS, by_weight=False,
          config={"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    _kind("nn.RNNCell", lambda: Pair(nn.RNNCell(8, 6)), tensors(x=(4, 8), other=(4, 6)), captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _kind("nn.GRUCell", lambda: Pair(nn.GRUCell(8, 6)), tensors(x=(4, 8), other=(4, 6)), captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _kind("nn.LSTMCell", lambda: LSTMStep(nn.LSTMCell(8, 6)), tensors(x=(4, 8), h=(4, 6), c=(4, 6)),
          captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _kind("nn.LSTM", lambda: Sequence(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, dropout=0.1)), STEPS,
          captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _kind("nn.LSTM, projections", lambda: Sequence(nn.LSTM(8, 6, proj_size=4)), STEPS, captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _kind("nn.GRU", lambda: Sequence(nn.GRU(8, 6)), STEPS, captures=GRAPHLESS, peft_fails=_NOT_SUPPORTED),
    _kind("functional weight", FunctionalWeight, VECTOR, config={"target_modules": ["proj", "out"]},
          peft_fails="forward differs"),
    _kind("module under two names", SharedModule, VECTOR, config={"target_modules": ["first", "shared"]},
          peft_fails="forward differs"),
]  # fmt: skip
"""Layer kinds."""


# ---- variants ----


def _variant(name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], **more: Any) -> Case:
    config = {"target_modules": ["layer"], **more.pop("config", {})}
    return Case(name, "variant", make, inputs, config, **more)


_DORA = {"use_dora": True}
_DORA_DROPOUT = {"use_dora": True, "lora_dropout": 0.4}
_BIAS = {"lora_bias": True}

VARIANTS: list[Case] = [
    _variant("DoRA, nn.Linear", lambda: Layer(nn.Linear(8, 6)), SEQUENCE, config=_DORA),
    _variant("DoRA, nn.Linear without bias", lambda: Layer(nn.Linear(8, 6, bias=False)), SEQUENCE, config=_DORA),
    _variant("DoRA, transformers Conv1D", _gpt2_layer, SEQUENCE, config=_DORA),
    _variant("DoRA, nn.Embedding", lambda: Layer(nn.Embedding(11, 8)), indices, config=_DORA),
    _variant("DoRA, Gemma3 scaled embedding", _gemma3_embedding, indices, config=_DORA),
    _variant("DoRA, nn.Conv1d", lambda: Layer(nn.Conv1d(4, 6, 3, stride=2)), tensors(x=(2, 4, 9)), config=_DORA),
    _variant("DoRA, nn.Conv2d", lambda: Layer(nn.Conv2d(4, 6, 3, padding=1)), tensors(x=(2, 4, 5, 6)), config=_DORA),
    _variant("DoRA, nn.Conv3d", lambda: Layer(nn.Conv3d(4, 6, 2)), tensors(x=(2, 4, 4, 3, 3)), config=_DORA),
    _variant("DoRA, nn.Conv2d, groups", lambda: Layer(nn.Conv2d(4, 6, 3, groups=2)), tensors(x=(2, 4, 5, 6)),
             config=_DORA, peft_fails="merge: .*NotImplementedError", other_factors=True),
    _variant("DoRA, nn.Conv1d, circular", lambda: Layer(nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")),
             tensors(x=(2, 4, 9)), config=_DORA, peft_fails="forward differs"),
    _variant("DoRA with dropout, nn.Linear", lambda: Layer(nn.Linear(8, 6)), SEQUENCE, config=_DORA_DROPOUT),
    _variant("DoRA with dropout, transformers Conv1D", _gpt2_layer, SEQUENCE, config=_DORA_DROPOUT),
    _variant("DoRA with dropout, nn.Conv2d", lambda: Layer(nn.Conv2d(4, 6, 3, padding=1)), tensors(x=(2, 4, 5, 6)),
             config=_DORA_DROPOUT),
    _variant("DoRA with dropout, nn.Embedding", lambda: Layer(nn.Embedding(11, 8)), indices, config=_DORA_DROPOUT),
    _variant("DoRA with rsLoRA and patterns", Net, VECTOR,
             config={"target_modules": ["fc1", "fc2"], "use_rslora": True, "rank_pattern": {"fc2": 2}, **_DORA}),
    _variant("lora_bias, nn.Linear", lambda: Layer(nn.Linear(8, 6)), SEQUENCE, config=_BIAS),
    _variant("lora_bias, transformers Conv1D", _gpt2_layer, SEQUENCE, config=_BIAS),
    _variant("lora_bias, nn.Conv2d", lambda: Layer(nn.Conv2d(4, 6, 3)), tensors(x=(2, 4, 5, 6)), config=_BIAS),
    _variant("lora_bias, nn.Conv2d, groups", lambda: Layer(nn.Conv2d(4, 6, 3, groups=2)), tensors(x=(2, 4, 5, 6)),
             config=_BIAS, peft_fails="merge: .*NotImplementedError", other_factors=True),
    _variant("activated LoRA (aLoRA)", llama(), token_ids,
             config={"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
             captures=("export", "modules"), by_weight=False),
    _variant("block-diagonal (BD-LoRA)", Net, VECTOR, by_weight=False,
             config={"target_modules": ["fc1", "fc2"],
                     "use_bdlora": {"target_modules_bd_a": ["fc2"], "target_modules_bd_b": ["fc1"], "nblocks": 2}}),
    _variant("KaSA", Net, VECTOR, config={"target_modules": ["fc1"], "kasa_config": {"beta": 0.01}}, by_weight=False),
    _variant("VeLoRA", Net, VECTOR, config={"target_modules": ["fc1"], "velora_config": {"num_groups": 2}},
             by_weight=False),
    _variant("MonteCLoRA", Net, VECTOR, config={"target_modules": ["fc1"], "monteclora_config": {"num_samples": 2}}, by_weight=False),
]  # fmt: skip
"""Uses of the factors other than `W + s B A`."""


# ---- initialisers ----

INITIALISERS: list[Case] = [
    Case(f"{name!r}", "initialiser", Net, VECTOR, {"target_modules": ["fc1", "fc2"], "init_lora_weights": name, "r": 4},
         by_weight=False)
    for name in (True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "eva", "corda",
                 "loftq", "lora_ga")
]  # fmt: skip
"""Values of `init_lora_weights`."""


# ---- fields ----


def _field(name: str, make: Callable[[], nn.Module] = Net, **more: Any) -> Case:
    inputs = more.pop("inputs", VECTOR)
    config = {"target_modules": ["fc1", "fc2"], **more.pop("config")}
    return Case(name, "field", make, inputs, config, **more)


_LAYERS = {"target_modules": ["q", "v"]}
_CAUSAL = ("export", "modules")


def _half(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "make": lambda: Net().to(dtype),
        "inputs": lambda: {"x": torch.randn(5, 8).to(dtype)},
        "by_weight": False,
        "config": {},
    }


FIELDS: list[Case] = [
    _field("r", config={"r": 3}),
    _field("lora_alpha", config={"lora_alpha": 2.5}),
    _field("use_rslora", config={"use_rslora": True}, by_weight=False),
    _field("lora_dropout", config={"lora_dropout": 0.3}),
    _field("rank_pattern", config={"rank_pattern": {"^fc2": 7, "fc.": 3}}, by_weight=False),
    _field("alpha_pattern", config={"alpha_pattern": {"fc1": 5}}, by_weight=False),
    _field("target_modules: regular expression", config={"target_modules": "fc[12]"}),
    _field("target_modules: 'all-linear'", config={"target_modules": "all-linear"}),
    _field("target_modules: None", llama(), inputs=token_ids, captures=_CAUSAL, config={"target_modules": None}),
    _field("exclude_modules", config={"exclude_modules": ["fc2"]}),
    _field("layers_to_transform", Blocks, config={"layers_to_transform": [0, 2], **_LAYERS}),
    _field("layers_pattern", Blocks,
           config={"layers_to_transform": 1, "layers_pattern": "layers", **_LAYERS}),
    _field("fan_in_fan_out", _gpt2_layer, inputs=SEQUENCE, config={"target_modules": ["layer"], "fan_in_fan_out": True}),
    _field("bias='all'", config={"target_modules": ["fc1"], "bias": "all"}, by_weight=False),
    _field("bias='lora_only'", config={"target_modules": ["fc1"], "bias": "lora_only"}, by_weight=False),
    _field("modules_to_save", config={"target_modules": ["fc1"], "modules_to_save": ["fc2"]}, by_weight=False),
    _field("trainable_token_indices", lambda: Tokens(), inputs=indices, by_weight=False,
           config={"target_modules": ["body"], "trainable_token_indices": {"embed": [0, 3, 5]}}),
    _field("trainable_token_indices, tied", llama(tie_word_embeddings=True), inputs=token_ids, captures=_CAUSAL,
           by_weight=False, config={"target_modules": ["q_proj"], "trainable_token_indices": [0, 3, 5]}),
    _field("ensure_weight_tying, target_modules", llama(tie_word_embeddings=True), inputs=token_ids, captures=_CAUSAL,
           by_weight=False, config={"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
           without=("gradients", "weights")),  # peft has two parameters and adds both: see tests/host/test_weight_tying.py
    _field("ensure_weight_tying, modules_to_save", llama(tie_word_embeddings=True), inputs=token_ids,
           captures=_CAUSAL, by_weight=False,
           config={"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    _field("layer_replication", llama(), inputs=token_ids, captures=("modules",), by_weight=False, unmergeable=True,
           config={"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
           without=("fresh_eval", "fresh_train")),  # the base has other layers
    _field("task_type", llama(), inputs=token_ids, captures=_CAUSAL,
           config={"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    _field("bfloat16 base, branch_dtype='adapter'", **_half(torch.bfloat16), tolerance=0.05, ours={"branch_dtype": "adapter"}),
    _field("bfloat16 base, branch_dtype='base'", **_half(torch.bfloat16), tolerance=0.05),
    _field("float16 base, branch_dtype='adapter'", **_half(torch.float16), tolerance=0.008, ours={"branch_dtype": "adapter"}),
    _field("float16 base, branch_dtype='base'", **_half(torch.float16), tolerance=0.008),
    _field("float64 base", lambda: Net().double(), inputs=lambda: {"x": torch.randn(5, 8).double()}, config={},
           tolerance=1e-12, by_weight=False),
]  # fmt: skip
"""Fields of the configuration."""

CASES: list[Case] = [*KINDS, *VARIANTS, *INITIALISERS, *FIELDS]
