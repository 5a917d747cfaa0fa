r"""Other libraries' fast LoRA on the same models, each as its documentation advises; the benchmarks run without them.

A machine without a network gets them in a folder, which is then named in PYTHONPATH (34 MB when unpacked):

    pip install --no-deps --no-compile --target peers_site liger-kernel==0.8.5 axolotl==0.19.0 torchtune==0.6.1 \
        unsloth==2026.10.9 unsloth_zoo==2026.10.9 && rm -r peers_site/studio peers_site/unsloth_cli

Only what computes is taken from them. Their packages import what trains, loads data and serves, which is not wanted here, so
packages are found without running their own first lines, and names that only 4-bit weights need are stand-ins.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def liger(model: Any, settings: dict[str, Any]) -> Any:
    """peft, and Liger's RMSNorm, rotary embedding and SwiGLU."""
    with_liger(model, swiglu=True)
    return _peft(model, settings)


def axolotl(model: Any, settings: dict[str, Any]) -> Any:
    """Peft's layers computed by axolotl's `lora_mlp_kernel`, `lora_qkv_kernel` and `lora_o_kernel`."""
    _locate("axolotl")
    with_4_bit = [
        name for name in ("bitsandbytes", "bitsandbytes.functional") if _folder(name.partition(".")[0]) is None
    ]
    for name in with_4_bit:
        sys.modules[name] = _FourBit(name)
    if with_4_bit:
        sys.modules["bitsandbytes"].functional = sys.modules["bitsandbytes.functional"]
    from axolotl.kernels.lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    for name in with_4_bit:
        del sys.modules[name]
    return with_kernels(_peft(model, settings), apply_lora_qkv, apply_lora_o, apply_lora_mlp_swiglu)


def axolotl_liger(model: Any, settings: dict[str, Any]) -> Any:
    """The same with Liger's RMSNorm and rotary embedding, which axolotl's documentation combines with it."""
    with_liger(model, swiglu=False)
    return axolotl(model, settings)


def unsloth(model: Any, settings: dict[str, Any]) -> Any:
    """Peft's layers computed by unsloth's kernels for LoRA; its other kernels need a model that it has loaded itself."""
    if settings["use_dora"]:
        raise NotImplementedError("unsloth's kernels leave DoRA to peft")
    _locate("unsloth_zoo")
    _bare("unsloth")
    _bare("unsloth.kernels")
    os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")  # as the package itself says
    from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    return with_kernels(_peft(model, settings), apply_lora_qkv, apply_lora_o, apply_lora_mlp_swiglu)


def torchtune(model: Any, settings: dict[str, Any]) -> Any:
    """Torchtune's `LoRALinear` in place of each linear layer; factors have the dtype of the base, its only way."""
    if settings["use_dora"]:
        raise NotImplementedError("torchtune's DoRA is not measured")
    for name in ("torchtune", "torchtune.modules", "torchtune.modules.peft"):
        _bare(name)
    names = ("torchao", "torchao.dtypes", "torchao.dtypes.nf4tensor", "torchtune.modules.low_precision")
    sys.modules.update({name: _FourBit(name) for name in names})
    from torchtune.modules.peft._utils import AdapterModule

    sys.modules["torchtune.modules.peft"].AdapterModule = AdapterModule
    from torchtune.modules.peft.lora import LoRALinear

    for name in names:
        del sys.modules[name]
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.rpartition(".")[2] in settings["target_modules"]:
            model.set_submodule(name, _lora_linear(LoRALinear, linear, settings))
    return model


PEERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "liger": liger, "axolotl": axolotl, "axolotl-liger": axolotl_liger, "unsloth": unsloth, "torchtune": torchtune,
}  # fmt: skip


def _lora_linear(kind: Callable[..., Any], linear: nn.Linear, settings: dict[str, Any]) -> nn.Module:
    layer = kind(
        linear.in_features, linear.out_features, settings["r"], settings["lora_alpha"], settings["lora_dropout"],
        use_bias=linear.bias is not None,
    ).to(linear.weight)  # fmt: skip
    layer.weight, layer.bias = linear.weight, linear.bias
    if not settings["init_lora_weights"]:
        nn.init.kaiming_uniform_(layer.lora_b.weight, a=5**0.5)
    return layer


def _peft(model: Any, settings: dict[str, Any]) -> Any:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def with_liger(model: Any, swiglu: bool) -> None:
    """Patch a model with Liger's RMSNorm and rotary embedding, and its SwiGLU if asked for."""
    _locate("liger_kernel")
    if model.config.model_type != "llama":
        raise NotImplementedError(f"only Llama's layers are patched here, not those of {model.config.model_type}")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # Its loss is left out: a step ends at the last hidden state for all variants.
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, swiglu=swiglu, model=model)


def with_kernels(model: Any, qkv: Any, o: Any, mlp: Any) -> Any:
    """Let attention and SwiGLU blocks call functions that take the block and its input, as both libraries do it."""
    modules = list(model.modules())
    attentions = {type(module) for module in modules if all(hasattr(module, f"{name}_proj") for name in "qkvo")}
    blocks = {
        type(module) for module in modules if all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down"))
    }
    if not attentions or not blocks:
        raise NotImplementedError("there are no attentions and SwiGLU blocks as Llama has them")
    for kind in attentions:
        kind.forward = _rewritten(kind)
        kind.apply_qkv, kind.apply_o = qkv, o
    for kind in blocks:
        kind.forward = mlp
    return model


def _rewritten(attention: type[nn.Module]) -> Any:
    """The forward of an attention, with one call for the three projections and another for the last."""
    source = textwrap.dedent(inspect.getsource(attention.forward))
    lines = source.splitlines()
    first = next((number for number, line in enumerate(lines) if "self.q_proj(hidden_states)" in line), None)
    if first is None or "self.o_proj(attn_output)" not in source:
        raise NotImplementedError(f"the forward of {attention.__name__} is not written as expected")
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    lines.insert(first, f"{indent}projected = self.apply_qkv(hidden_states)")
    source = "\n".join(lines).replace("self.o_proj(attn_output)", "self.apply_o(attn_output)")
    for index, name in enumerate("qkv"):
        source = source.replace(f"self.{name}_proj(hidden_states)", f"projected[{index}]")
    namespace = dict(vars(sys.modules[attention.__module__]))
    exec(compile(source, f"<{attention.__name__}.forward>", "exec"), namespace)  # noqa: S102 (as axolotl does it)
    return namespace["forward"]


class _FourBit(ModuleType):
    """A module of which only 4-bit weights need anything: every name is there, and none does anything."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None, is_package=True), []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Nothing if name[0].isupper() else _Nothing()
        setattr(self, name, found)
        return found


class _Nothing:
    """Of such a module: a class, or a function, or a library of functions."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


def _locate(package: str) -> Path:
    folder = _folder(package)
    if folder is None:
        raise ModuleNotFoundError(f"{package} is not installed: benchmarks/peers.py says how")
    return folder


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _bare(name: str) -> None:
    """Make a package known without running its `__init__`."""
    top, *rest = name.split(".")
    folder = Path(_locate(top) if top not in sys.modules else sys.modules[top].__path__[0], *rest)
    module = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), [str(folder)]
    sys.modules[name] = module
