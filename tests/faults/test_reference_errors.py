"""What peft's LoRA refuses, case by case: our error beside peft's, the model untouched; or that we do it.

One line for each case: a configuration, a model, what peft does with it, and what we do.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fxlora import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    NoTargetError,
    lora_transform,
    merge_checkpoint,
)
from fxlora.checkpoint.safetensors_io import save_tensors
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.oracle.cases import (
    GRAPHLESS,
    SEQUENCE,
    STEPS,
    VECTOR,
    Blocks,
    CrossAttention,
    Layer,
    Net,
    Pair,
    SelfAttention,
    Sequence,
    Tokens,
    Weights,
    _gpt2_layer,
    experts,
    indices,
    tensors,
)
from tests.zoo import ARCHITECTURES, BareParameter, FunctionalWeight, SharedModule

ALL = ("symbolic", "export", "modules")
MODULES = ("modules",)
FC1: dict[str, Any] = {"target_modules": ["fc1"]}
LAYER: dict[str, Any] = {"target_modules": ["layer"], "r": 2}


def layer(cls: type[nn.Module], *sizes: Any, inside: type[Layer] = Layer, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: inside(cls(*sizes, **settings))


def attention(inside: type[Layer] = SelfAttention, **settings: Any) -> Callable[[], nn.Module]:
    return layer(nn.MultiheadAttention, 8, 2, inside=inside, batch_first=True, **settings)


@dataclass(frozen=True)
class Case:
    """A configuration for a model.

    Attributes:
        config: its fields.
        make: the model.
        inputs: a call of it.
        captures: those that the case is for.
        peft: the class of peft's error; None where it takes the configuration.
        error: the class of ours.
        words: what ours says: what is wrong, where, what to do.
    """

    config: dict[str, Any]
    make: Callable[[], nn.Module] = Net
    inputs: Callable[[], dict[str, Any]] = VECTOR
    captures: tuple[str, ...] = ALL
    peft: type[Exception] | None = ValueError
    error: type[Exception] = ConfigError
    words: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()


def each_capture(cases: dict[str, Case]) -> Any:
    pairs = [(case, capture, name) for name, case in cases.items() for capture in case.captures]
    marks = [pytest.param(case, capture, id=f"{name}-{capture}") for case, capture, name in pairs]
    return pytest.mark.parametrize(("case", "capture"), marks)


def each(cases: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def refused(
    config: dict[str, Any], error: type[Exception], *words: str, peft: type[Exception] | None = ValueError, **more: Any
) -> Case:
    return Case(config, error=error, words=words, peft=peft, **more)


CONV = {"make": layer(nn.Conv1d, 4, 6, 3), "inputs": tensors(x=(2, 4, 9))}
TOKENS = {"make": Tokens, "inputs": indices}
TIED = {"make": lambda: Tokens(tied=True), "inputs": indices}
BLOCKS = {"make": Blocks}
DOUBLE = {"make": lambda: Net().double(), "inputs": lambda: {"x": torch.ones(2, 8, dtype=torch.float64)}}
MHA = {"make": attention(), "inputs": SEQUENCE, "captures": GRAPHLESS}
WEIGHT: dict[str, Any] = {"target_parameters": ["fc1.weight"]}
BODY: dict[str, Any] = {"target_modules": ["body"]}

# fmt: off
REFUSED: dict[str, Case] = {
    # the parent's fields
    "task_type": refused({**FC1, "task_type": "CAUSAL"}, ConfigError, "`task_type`", "'CAUSAL_LM'", "not 'CAUSAL'"),
    # ranks, scaling and dropout
    "r zero": refused({**FC1, "r": 0}, ConfigError, "`r` should be a positive integer", "0"),
    "r negative": refused({**FC1, "r": -2}, ConfigError, "`r` should be a positive integer", "-2"),
    "r bool": refused({**FC1, "r": True}, ConfigError, "`r` should be a positive integer", "True", peft=TypeError),
    "r of a pattern": refused({**FC1, "rank_pattern": {"fc1": 0}}, ConfigError, "`rank_pattern['fc1']`", "positive"),
    "alpha a text": refused({**FC1, "lora_alpha": "8"}, ConfigError, "`lora_alpha`", "finite number", "'8'", peft=TypeError),
    "dropout": refused({**FC1, "lora_dropout": 1.5}, ConfigError, "`lora_dropout`", "[0, 1)", "1.5"),
    # biases
    "bias": refused({**FC1, "bias": "some"}, ConfigError, "`bias`", "'lora_only'", "not 'some'", peft=NotImplementedError),
    "lora_bias, use_dora": refused({**FC1, "lora_bias": True, "use_dora": True}, ConfigError, "`use_dora`", "`lora_bias`", "set one of them"),
    "lora_bias, gaussian": refused({**FC1, "lora_bias": True, "init_lora_weights": "gaussian"}, ConfigError, "`lora_bias`", "True or False", "leave one"),
    "lora_bias, embedding": refused({"target_modules": ["embed"], "lora_bias": True}, ConfigError, "`lora_bias`", "'embed'", "exclude it", **TOKENS),
    "lora_bias, parameter": refused({**WEIGHT, "lora_bias": True}, ConfigError, "`lora_bias`", "'fc1.weight'", "lora_bias=False"),
    # layers
    "layers of a string": refused({"target_modules": "fc1", "layers_to_transform": [0]}, ConfigError, "`layers_to_transform`", "need a list of `target_modules`"),
    "pattern of a string": refused({"target_modules": "fc1", "layers_pattern": "layers"}, ConfigError, "`layers_pattern` needs `layers_to_transform`"),
    "pattern alone": refused({**FC1, "layers_pattern": "layers"}, ConfigError, "`layers_pattern` needs `layers_to_transform`"),
    "no such layer": refused({"target_modules": ["q"], "layers_to_transform": [7]}, NoTargetError, "3 modules match", "layers_to_transform leaves none", "`layers_pattern`", **BLOCKS),
    "no such list": refused({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"}, NoTargetError, "layers_to_transform leaves none", "`layers_pattern`", **BLOCKS),
    "layer a text": refused({"target_modules": ["q"], "layers_to_transform": ["1"]}, ConfigError, "`layers_to_transform`", "from 0", "['1']", **BLOCKS),
    "layer a bool": refused({"target_modules": ["q"], "layers_to_transform": True}, ConfigError, "`layers_to_transform`", "from 0", "True", peft=None, **BLOCKS),
    "layer_replication": refused({**FC1, "layer_replication": [(0, 1)]}, ConfigError, "`layer_replication`", "Net has no list of layers", "before the transform", captures=MODULES),
    # types
    "a flag in words": refused({**FC1, "use_dora": "no"}, ConfigError, "`use_dora` should be True or False", "'no'", peft=None),
    "a list of ranks": refused({**FC1, "rank_pattern": [1]}, ConfigError, "`rank_pattern` should be a dict", "[1]", peft=AttributeError),
    "a number as a module": refused({**FC1, "modules_to_save": [3]}, ConfigError, "`modules_to_save` should be a list of names", "[3]", peft=AttributeError),
    "a number as a parameter": refused({"target_parameters": [3]}, ConfigError, "`target_parameters` should be a list of names", "[3]"),
    "a number as a list of layers": refused({**FC1, "layers_to_transform": [0], "layers_pattern": [3]}, ConfigError, "`layers_pattern` should be a list of names", "[3]", peft=None),
    # modules and tokens
    "modules_to_save, a list": refused({"target_modules": ["head"], "modules_to_save": ["layers"]}, ConfigError, "modules_to_save: 'model.layers' is a ModuleList", "name the modules in it", peft=TypeError, **BLOCKS),
    "modules_to_save, a target": refused({**FC1, "modules_to_save": ["fc1"]}, NoTargetError, "1 modules are excluded", "modules_to_save", "Take them out"),
    "modules_to_save, misspelt": refused({**FC1, "modules_to_save": ["fc3"]}, NoTargetError, "modules_to_save", "'fc3'", "Did you mean", peft=None),
    "tokens of a saved module": refused({**BODY, "trainable_token_indices": {"embed": [1]}, "modules_to_save": ["embed"]}, ConfigError, "trainable_token_indices: 'embed'", "modules_to_save", "one of the two", **TOKENS),
    "tokens of a target": refused({"target_modules": ["embed"], "trainable_token_indices": {"embed": [1]}}, ConfigError, "trainable_token_indices: 'embed'", "target_modules", "one of the two", peft=TypeError, **TOKENS),
    "no such token": refused({**BODY, "trainable_token_indices": {"embed": [99]}}, ConfigError, "'embed'", "99 is no token", "from 0 to 10", peft=IndexError, **TOKENS),
    "tokens of nothing": refused({**BODY, "trainable_token_indices": {"embd": [1]}}, NoTargetError, "'embd'", "Did you mean 'embed'", **TOKENS),
    # targets
    "nothing given": refused({}, NoTargetError, "specify `target_modules`", "fc1, fc2", "'all-linear'"),
    "no names": refused({"target_modules": []}, NoTargetError, "`target_modules` is empty", "fc1, fc2", "`target_parameters`"),
    "no text": refused({"target_modules": ""}, NoTargetError, "`target_modules` is empty", "fc1, fc2"),
    "no parameters": refused({"target_modules": [], "target_parameters": []}, NoTargetError, "`target_modules` is empty"),
    "nothing found": refused({"target_modules": ["fc3"]}, NoTargetError, "matches no module", "Did you mean", "fc1, fc2"),
    "a suffix as a text": refused({"target_modules": "q"}, NoTargetError, "regular expression", "into a list", **BLOCKS),
    "all excluded": refused({"target_modules": "fc.*", "exclude_modules": ".*"}, NoTargetError, "3 modules are excluded", "exclude_modules", "Take them out"),
    "one excluded": refused({**FC1, "exclude_modules": ["fc1"]}, NoTargetError, "1 modules are excluded", "exclude_modules", "Take them out"),
    "misspelt, others excluded": refused({"target_modules": ["fc3"], "exclude_modules": ["fc1"]}, NoTargetError, "matches no module", "Did you mean"),
    "one of two misspelt": refused({"target_modules": ["fc1", "fc3"]}, NoTargetError, "no module is called 'fc3'", "Did you mean", peft=None),
    "a layer alone": refused({"target_modules": "all-linear"}, NoTargetError, "itself a Linear", "target_parameters=['weight']", "nn.Sequential", make=lambda: nn.Linear(8, 6), inputs=tensors(input=(2, 8))),
    "no linear layer": refused({"target_modules": "all-linear"}, NoTargetError, "no linear layer", "target_parameters", make=layer(nn.LayerNorm, 8)),
    "unsupported layer": refused(LAYER, NoTargetError, "'layer', a LayerNorm", "nn.Linear", "modules_to_save", make=layer(nn.LayerNorm, 8)),
    "container": refused({"target_modules": ["layers.0"]}, NoTargetError, "a ModuleDict", "The layers inside it are: q, v", **BLOCKS),
    # parameters
    "parameters as a text": refused({"target_parameters": "fc1.weight"}, ConfigError, "`target_parameters` should be a list", peft=TypeError),
    "no such parameter": refused({"target_parameters": ["fc3.weight"]}, NoTargetError, "no parameter is called 'fc3.weight'", "Did you mean", "'fc1.weight'", "exact"),
    "parameter of a target": refused({**FC1, **WEIGHT}, ConfigError, "'fc1.weight' belongs to 'fc1'", "name it once"),
    "parameter, dropout": refused({**WEIGHT, "lora_dropout": 0.1}, ConfigError, "`lora_dropout`", "'fc1.weight'", "set it to 0"),
    "parameter, use_dora": refused({**WEIGHT, "use_dora": True}, ConfigError, "`use_dora`", "'fc1.weight'", "use_dora=False"),
    "parameter of one dimension": refused({"target_parameters": ["fc1.bias"]}, NoTargetError, "'fc1.bias' has the shape (12,)", "two dimensions", "modules_to_save"),
    # initialisers
    "unknown init": refused({**FC1, "init_lora_weights": "gausian"}, ConfigError, "'gausian'", "Did you mean 'gaussian'", "Known: True, False"),
    "init a number": refused({**FC1, "init_lora_weights": 1}, ConfigError, "init_lora_weights should be", "not 1", peft=AttributeError),
    "orthogonal, odd": refused({**FC1, "init_lora_weights": "orthogonal", "r": 3}, ConfigError, "even rank", "r=3", "use 4"),
    "pissa, steps": refused({**FC1, "init_lora_weights": "pissa_niter_x"}, ConfigError, "'pissa_niter_x'", "'pissa_niter_4'"),
    "pissa, float64": refused({**FC1, "init_lora_weights": "pissa", "r": 2}, ConfigError, "'fc1'", "float64", "convert the model", peft=TypeError, **DOUBLE),
    "olora, float64": refused({**FC1, "init_lora_weights": "olora", "r": 2}, ConfigError, "'fc1'", "float64", "convert the model", peft=TypeError, **DOUBLE),
    **{
        f"{init}, convolution": refused({**LAYER, "init_lora_weights": init}, ConfigError, "for linear layers", "'layer'", "`exclude_modules`", **CONV)
        for init in ("pissa", "olora", "orthogonal", "mica")
    },
    # DoRA
    "use_dora, attention": refused({**LAYER, "use_dora": True}, ConfigError, "`use_dora`", "part of an attention", "use_dora=False", **MHA),
    "use_dora, megatron": refused({**FC1, "use_dora": True, "megatron_config": {"a": 1}}, NotImplementedError, "`megatron_config`", "what works now"),
    "use_dora, alora": refused({**FC1, "use_dora": True, "alora_invocation_tokens": [1]}, NotImplementedError, "`alora_invocation_tokens`", "what works now"),
    "loftq without its config": refused({**FC1, "init_lora_weights": "loftq"}, NotImplementedError, "'loftq'", "what works instead"),
    # what peft ignores
    "loftq_config alone": refused({**FC1, "loftq_config": {"loftq_bits": 4}}, NotImplementedError, "`loftq_config`", "what works now", peft=None),
    "use_qalora, plain layer": refused({**FC1, "use_qalora": True, "qalora_group_size": 3}, NotImplementedError, "`use_qalora`", "what works now", peft=None),
}
# fmt: on


@each_capture(REFUSED)
def test_refused(case: Case, capture: Any) -> None:
    model = case.model()
    before = snapshot(model)
    with pytest.raises(case.error) as caught:
        lora_transform(model, dict(case.config), capture=capture, example_inputs=case.inputs())
    for word in case.words:
        assert word in str(caught.value)
    assert_unchanged(model, before)


@each(REFUSED)
def test_refused_by_peft(case: Case) -> None:
    """What the table says of peft is so."""
    if case.peft is None:
        lora_of_peft(case)
        return
    with pytest.raises(case.peft):
        lora_of_peft(case)


def lora_of_peft(case: Case) -> Any:
    """Peft's model, run once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(case.model(), peft.LoraConfig(**case.config))
        return model(**case.inputs())


# ---- where peft refuses and we do it ----


def mamba() -> nn.Module:
    return next(entry for entry in ARCHITECTURES if entry.name == "mamba").make()


MAMBA = {"make": mamba, "inputs": lambda: {"input_ids": torch.randint(5, 60, (1, 3))}, "captures": MODULES}
ROOT = {"make": BareParameter, "inputs": VECTOR}


def conv(cls: type[nn.Module], *shape: int, **settings: Any) -> dict[str, Any]:
    make = layer(cls, 4, 6, **{"kernel_size": 3, **settings})
    return {"make": make, "inputs": tensors(x=(2, 4, *shape))}


# fmt: off
DONE: dict[str, Case] = {
    # peft raises
    "dilation": Case(LAYER, peft=RuntimeError, **conv(nn.Conv1d, 9, dilation=2)),
    "groups, r % groups": Case({**LAYER, "r": 3}, **conv(nn.Conv2d, 5, 5, groups=2)),
    "groups, r % groups, use_dora": Case({**LAYER, "r": 3, "use_dora": True}, **conv(nn.Conv2d, 5, 5, groups=2)),
    "nn.ConvTranspose1d": Case(LAYER, captures=GRAPHLESS, **conv(nn.ConvTranspose1d, 9)),
    "nn.LSTM": Case(LAYER, layer(nn.LSTM, 8, 6, inside=Sequence), STEPS, GRAPHLESS),
    "nn.GRU": Case(LAYER, layer(nn.GRU, 8, 6, inside=Sequence), STEPS, GRAPHLESS),
    "nn.Bilinear": Case(LAYER, layer(nn.Bilinear, 8, 5, 6, inside=Pair), tensors(x=(4, 8), other=(4, 5)), GRAPHLESS),
    "attention, kdim and vdim": Case(LAYER, attention(CrossAttention, kdim=6, vdim=7), tensors(q=(3, 4, 8), k=(3, 5, 6), v=(3, 5, 7)), GRAPHLESS),
    "parameter of the root": Case({"target_parameters": ["weight_in"], "r": 2}, **ROOT),
    "a layer alone, by its parameter": Case({"target_modules": [], "target_parameters": ["weight"], "r": 2}, make=lambda: nn.Linear(8, 6), inputs=tensors(input=(2, 8))),
    "only tokens": Case({"target_modules": [], "trainable_token_indices": {"embed": [1, 3]}}, **TOKENS),
    "olora, Conv1D": Case({**LAYER, "init_lora_weights": "olora"}, _gpt2_layer, SEQUENCE, peft=RuntimeError),
    "pissa, attention": Case({**LAYER, "init_lora_weights": "pissa"}, attention(), SEQUENCE, ("export",), peft=AttributeError),
    "Mamba's out_proj": Case({"target_modules": ["out_proj"], "r": 2}, **MAMBA),
    "Mamba's conv1d": Case({"target_modules": ["conv1d"], "r": 2}, **MAMBA),
    # peft runs, and gives another result or none
    "padding_mode": Case(LAYER, peft=None, **conv(nn.Conv2d, 5, 5, padding=1, padding_mode="circular")),
    "groups": Case(LAYER, peft=None, **conv(nn.Conv2d, 5, 5, groups=2)),
    "attention's out_proj": Case({"target_modules": ["out_proj"], "r": 2}, attention(), SEQUENCE, GRAPHLESS, peft=None),
    "functional weight": Case({"target_modules": ["proj"], "r": 2}, FunctionalWeight, peft=None),
    "shared module": Case({"target_modules": ["shared"], "r": 2}, SharedModule, peft=None),
    "experts that einsum reads": Case({"target_parameters": ["first", "second"], "r": 2}, lambda: Layer(Weights(experts, (3, 5, 8), (3, 6, 5))), VECTOR, ALL, peft=None),
    "lora_bias without a bias": Case({**LAYER, "lora_bias": True}, layer(nn.Linear, 8, 6, bias=False), peft=None),
    "orthogonal, Conv1D": Case({**LAYER, "init_lora_weights": "orthogonal"}, _gpt2_layer, SEQUENCE, peft=None),
}
# fmt: on


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
@each_capture(DONE)
def test_done(case: Case, capture: Any) -> None:
    torch.manual_seed(3)
    inputs = case.inputs()
    expected = _output(case.model()(**inputs))
    model = lora_transform(case.model(), dict(case.config), capture=capture, example_inputs=inputs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    changed = _output(model(**inputs))
    assert not torch.allclose(changed, expected, rtol=1e-2)
    assert changed.isfinite().all()
    model.verify()


def _output(value: Any) -> Tensor:
    value = getattr(value, "logits", value)
    return value if isinstance(value, Tensor) else value[0]


@each(DONE)
def test_not_done_by_peft(case: Case) -> None:
    if case.peft is None:
        lora_of_peft(case)
        return
    with pytest.raises(case.peft):
        lora_of_peft(case)


# ---- errors that come later than the transform ----


@pytest.mark.parametrize("capture", ALL)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_second_adapter_with_biases(bias: str, capture: Any) -> None:
    model = lora_transform(Net(), {**FC1, "bias": bias}, capture=capture, example_inputs=VECTOR())
    before = snapshot(model)
    with pytest.raises(AdapterError, match="only 1 adapter with bias.*'default'.*set bias to 'none'"):
        model.add_adapter("second", {**FC1, "bias": bias})
    assert_unchanged(model, before)


@pytest.mark.parametrize("capture", ALL)
def test_merge_of_a_bias_that_no_bias_can_take(capture: Any) -> None:
    case = DONE["lora_bias without a bias"]
    model = lora_transform(case.model(), dict(case.config), capture=capture, example_inputs=case.inputs())
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="'layer': .*lora_bias.*zero bias before the transform"):
            merge()
    assert_unchanged(model, before)


# ---- what is not applied ----

# fmt: off
NICHE: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], str]] = {
    # the field in JSON, the same with peft's objects, how our error names it
    "loftq_config": ({"loftq_config": {"loftq_bits": 4}}, lambda: {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()}, "loftq"),
    "eva_config": ({"eva_config": {"rho": 2.0}}, lambda: {"eva_config": peft.EvaConfig()}, "eva_config"),
    "corda_config": ({"corda_config": {}}, lambda: {"corda_config": peft.tuners.lora.config.CordaConfig()}, "corda_config"),
    "lora_ga_config": ({"lora_ga_config": {"scale": "stable"}}, lambda: {"lora_ga_config": peft.LoraGAConfig()}, "lora_ga_config"),
    "velora_config": ({"velora_config": {"num_groups": 4}}, lambda: {"velora_config": peft.tuners.lora.VeloraConfig()}, "velora_config"),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [1, 2]}, lambda: {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "use_qalora": ({"use_qalora": True}, lambda: {"use_qalora": True}, "use_qalora"),
    "monteclora_config": ({"monteclora_config": {}}, lambda: {"monteclora_config": {}}, "monteclora_config"),
    "use_bdlora": ({"use_bdlora": {"nblocks": 2}}, lambda: {"use_bdlora": peft.tuners.lora.BdLoraConfig(nblocks=2)}, "use_bdlora"),
    "arrow_config": ({"arrow_config": {"top_k": 2}}, lambda: {"arrow_config": peft.ArrowConfig()}, "arrow_config"),
    "kasa_config": ({"kasa_config": {}}, lambda: {"kasa_config": {}}, "kasa_config"),
    "megatron_config": ({"megatron_config": {"a": 1}}, lambda: {"megatron_config": {"a": 1}}, "megatron_config"),
    "runtime_config": ({"runtime_config": {"ephemeral_gpu_offload": True}}, lambda: {"runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)}, "ephemeral_gpu_offload"),
    "init eva": ({"init_lora_weights": "eva"}, lambda: {"init_lora_weights": "eva"}, "'eva'"),
    "init corda": ({"init_lora_weights": "corda"}, lambda: {"init_lora_weights": "corda"}, "'corda'"),
    "init lora_ga": ({"init_lora_weights": "lora_ga"}, lambda: {"init_lora_weights": "lora_ga"}, "'lora_ga'"),
    "init loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, lambda: {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq'"),
}
# fmt: on

niche = pytest.mark.parametrize("name", NICHE)


def _assert_says(error: Exception, field: str) -> None:
    assert field in str(error)
    assert "what works" in str(error)


def _config(form: str, name: str) -> object:
    fields, of_peft, _ = NICHE[name]
    if form == "dict":
        return {**FC1, **fields}
    if form == "LoraConfig":
        return LoraConfig(**FC1, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**FC1, **of_peft())
    return LoraConfig.from_any(config) if form == "LoraConfig of peft's" else config


@niche
@pytest.mark.parametrize("form", ["dict", "LoraConfig", "peft.LoraConfig", "LoraConfig of peft's"])
def test_niche_field(form: str, name: str) -> None:
    config, model, lora = _config(form, name), Net(), lora_transform(Net(), FC1, capture="modules")
    before, before_lora = snapshot(model), snapshot(lora)
    for capture in ("auto", *ALL):
        with pytest.raises(NotImplementedError) as caught:
            lora_transform(model, config, capture=capture, example_inputs=VECTOR())  # pyright: ignore[reportArgumentType]
        _assert_says(caught.value, NICHE[name][2])
    with pytest.raises(NotImplementedError) as caught:
        lora.add_adapter("second", config)
    _assert_says(caught.value, NICHE[name][2])
    assert_unchanged(model, before)
    assert_unchanged(lora, before_lora)


@niche
def test_niche_field_on_disk(name: str, tmp_path: Path) -> None:
    adapter, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "merged"
    lora_transform(Net(), FC1).save_pretrained(adapter)
    base.mkdir()
    save_tensors(base / "model.safetensors", Net().state_dict())
    merge_checkpoint(base, adapter, tmp_path / "plain")  # as it is without the field
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **NICHE[name][0]}))
    model, lora = Net(), lora_transform(Net(), FC1, capture="modules")
    before, before_lora = snapshot(model), snapshot(lora)
    calls: list[Callable[[], object]] = [
        lambda: lora_transform(model, adapter),
        lambda: lora_transform(model, str(adapter), capture="modules"),
        lambda: lora.load_adapter(adapter, "second"),
        lambda: merge_checkpoint(base, adapter, out),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError) as caught:
            call()
        _assert_says(caught.value, NICHE[name][2])
    assert str(path) in str(caught.value)  # of several adapters that are merged, which
    assert not out.exists()
    assert_unchanged(model, before)
    assert_unchanged(lora, before_lora)


@pytest.mark.parametrize("off", [None, {}, {"ephemeral_gpu_offload": False}, peft.LoraRuntimeConfig()])
def test_runtime_config_that_is_off(off: object) -> None:
    config = LoraConfig.from_any({**FC1, "runtime_config": off})
    assert config == LoraConfig(**FC1)
    assert "runtime_config" not in config.to_dict()
    lora_transform(Net(), config).verify()


def test_custom_modules() -> None:
    config = peft.LoraConfig(**FC1)
    config._register_custom_module({nn.Linear: nn.Linear})
    model = Net()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="_register_custom_module.*what works instead: target_parameters"):
        lora_transform(model, config)
    assert_unchanged(model, before)


# ---- files ----


@pytest.mark.parametrize("field", [{"peft_type": "IA3"}, {"some_new_field": 3}, {"task_type": "CAUSAL"}, {"r": 0}])
def test_bad_file(field: dict[str, Any], tmp_path: Path) -> None:
    lora_transform(Net(), FC1).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **field}))
    base = tmp_path / "base"
    base.mkdir()
    save_tensors(base / "model.safetensors", Net().state_dict())
    model, (name, value) = Net(), next(iter(field.items()))
    before = snapshot(model)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        lora_transform(model, tmp_path / "adapter")
    assert name in str(caught.value) and repr(value) in str(caught.value)
    assert_unchanged(model, before)
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert str(path) in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "merged").exists()
