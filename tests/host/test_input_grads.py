"""Gradient checkpointing, reentrant or not, switched on before or after the transform: all factors get their gradients."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxlora import AdapterError, LoraConfig, LoraModel, enable_input_require_grads, lora_transform
from fxlora.host.input_grads import care_for_checkpointing
from tests.models.checks import error, randomise, tensors
from tests.zoo import ARCHITECTURES, Entry

transformers = pytest.importorskip("transformers")

BY_NAME = {entry.name: entry for entry in ARCHITECTURES}
SWITCHABLE = [name for name in BY_NAME if name not in ("albert", "convnext")]
"""The architectures that transformers can checkpoint."""


def transformed(model: nn.Module, entry: Entry, **config: Any) -> Any:
    torch.manual_seed(5)
    lora = lora_transform(model, LoraConfig(r=4, target_modules=entry.targets, **config), capture="modules")
    randomise(lora)
    return lora


def switch_on(model: Any, reentrant: bool) -> None:
    """As `gradient_checkpointing_enable`, which warns in newer versions of transformers."""
    name = "activation_checkpointing_enable"
    switch = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    switch({"use_reentrant": reentrant})


def switch_off(model: Any) -> None:
    name = "activation_checkpointing_disable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_disable")()


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(11)
    outputs = tensors(model(**batch))
    loss = sum(((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert error(list(found.values()), [expected[name] for name in found]) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", SWITCHABLE)
def test_architectures(name: str, reentrant: bool) -> None:
    entry = BY_NAME[name]
    batch = entry.batch()
    expected = gradients(transformed(entry.model(), entry), batch)
    assert len(expected) == 2 * len(lora_sites(entry))
    after = transformed(entry.model(), entry)
    switch_on(after, reentrant)
    check_equal(gradients(after, batch), expected)
    before = entry.model()
    switch_on(before, reentrant)
    check_equal(gradients(transformed(before, entry), batch), expected)


def lora_sites(entry: Entry) -> list[Any]:
    return list(transformed(entry.model(), entry)._specs())


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_peft_leaves_encoders_of_pictures_and_sound_untrained(name: str) -> None:
    entry = BY_NAME[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(entry.model(), peft.LoraConfig(r=4, target_modules=entry.targets))
        switch_on(model, True)
        assert not gradients(model, entry.batch())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_only_trained_copies_get_gradients_otherwise() -> None:
    """The silent case: a head that trains gives the loss a gradient, and nobody sees that no factor has one."""
    entry = BY_NAME["vit"]
    lora = transformed(entry.model(), entry, modules_to_save=["layernorm"])
    expected = gradients(lora, entry.batch())
    switch_on(lora, True)
    check_equal(gradients(lora, entry.batch()), expected)
    lora.__dict__["_lora_input_grads"].remove()
    assert all("modules_to_save" in name for name in gradients(lora, entry.batch()))


def test_embedded_inputs() -> None:
    """What a caller embedded needs gradients as well; transformers looks at its embedding layer only."""
    entry = BY_NAME["llama"]
    lora = transformed(entry.model(), entry)
    batch = {"inputs_embeds": torch.randn(2, 5, 32)}
    expected = gradients(lora, batch)
    switch_on(lora, True)
    check_equal(gradients(lora, batch), expected)
    assert not batch["inputs_embeds"].requires_grad


def test_a_block_trained_whole() -> None:
    """A trained copy of a checkpointed block, and factors in another one."""
    entry = BY_NAME["llama"]
    batch = entry.batch()

    def make() -> Any:
        config = LoraConfig(r=4, target_modules=r"model\.layers\.1\..*q_proj", modules_to_save=["layers.0"])
        torch.manual_seed(5)
        return lora_transform(entry.model(), config)

    expected, lora = gradients(make(), batch), make()
    switch_on(lora, True)
    check_equal(gradients(lora, batch), expected)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_come_and_go() -> None:
    entry = BY_NAME["vit"]
    model = entry.model()
    assert hooks(model) == 0
    lora = transformed(model, entry)
    assert hooks(lora) == 0
    switch_on(lora, False)
    assert hooks(lora) == 0
    for _ in range(2):
        switch_on(lora, True)
        count = hooks(lora)
        care_for_checkpointing(lora)
        assert hooks(lora) == count > 0
    switch_off(lora)
    assert hooks(lora) == 0
    switch_on(lora, True)
    assert hooks(lora.unload()) == 0 and not isinstance(model, LoraModel)


def test_copies_and_pickles_keep_their_own_hooks() -> None:
    entry = BY_NAME["vit"]
    lora = transformed(entry.model(), entry)
    switch_on(lora, True)
    expected = gradients(lora, entry.batch())
    for twin in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        check_equal(gradients(twin, entry.batch()), expected)
        switch_off(twin)
        assert hooks(twin) == 0 < hooks(lora)


def test_evaluation_has_no_gradients() -> None:
    entry = BY_NAME["vit"]
    lora = transformed(entry.model(), entry)
    batch = entry.batch()
    with torch.no_grad():
        expected = lora.eval()(**batch).last_hidden_state
        switch_on(lora, True)
        found = lora(**batch, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, expected) and not any(t.requires_grad for t in found.hidden_states)


# ---- models of any other library ----


class Blocks(nn.Module):
    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.stem = nn.Embedding(9, 8) if tokens else nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.reentrant = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None or not mask.requires_grad
        x = self.stem(x)
        x += 1.0  # what enters may not be a leaf
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)  # pyright: ignore[reportAssignmentType]
        return self.head(x if mask is None else x * mask)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("tokens", [True, False])
def test_any_model(tokens: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r"blocks\.\d", modules_to_save=["head"])
    lora: Any = lora_transform(Blocks(tokens), config, capture="modules")
    randomise(lora)
    batch = {"x": torch.arange(6).reshape(2, 3) if tokens else torch.randn(2, 3, 8), "mask": torch.ones(2, 3, 1)}
    lora.reentrant = False
    expected = gradients(lora, batch)
    assert len(expected) == 8
    lora.reentrant = True
    assert len(gradients(lora, batch)) == 2
    with enable_input_require_grads(lora) as handle:
        assert handle.inputs == ("",) and handle.outputs == (("stem",) if tokens else ())
        check_equal(gradients(lora, batch), expected)
        assert not batch["x"].requires_grad
    assert hooks(lora) == 0 and len(gradients(lora, batch)) == 2
    handle = enable_input_require_grads(lora, at="stem")
    check_equal(gradients(lora, batch), expected)
    handle.remove()
    handle.remove()
    assert hooks(lora) == 0


def test_inputs_by_position() -> None:
    model = Blocks(False).requires_grad_(False)
    with enable_input_require_grads(model):
        assert model(torch.randn(2, 8), torch.ones(2, 1)).requires_grad


class Frozen(nn.Module):
    """A module that returns a parameter of its own, in a tuple with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        return self.table, x.argmax(), 3


def test_parameters_stay_frozen() -> None:
    """The hooks of transformers would make the parameter itself trainable, and fail for a tuple."""
    model = nn.Sequential(Frozen())
    with enable_input_require_grads(model, at=["0"]):
        table, index, number = model(torch.randn(3))
    assert table.requires_grad and not model[0].table.requires_grad and not index.requires_grad and number == 3


def test_unknown_place() -> None:
    model = Blocks(True)
    with pytest.raises(AdapterError, match="the model has no module called 'stemm'.*Did you mean 'stem'"):
        enable_input_require_grads(model, at=["head", "stemm"])
    assert hooks(model) == 0
