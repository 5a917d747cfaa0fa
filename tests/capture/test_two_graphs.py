"""Models whose training and evaluation are two graphs over one set of parameters."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import CaptureError, LoraConfig, MergeError, VerifyError, lora_transform
from fxlora._passes import DropBranches
from fxlora.capture.graph_module import CapturedModule
from tests.models.checks import randomise, run, same

X = {"x": torch.randn(6, 8)}
OTHER = {"x": torch.randn(9, 8)}
CAPTURES = ["symbolic", "export"]


class DropPath(nn.Module):
    """Stochastic depth: arXiv:1603.09382."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1) > 0.5) / 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.path = nn.Linear(8, 8), nn.Dropout(0.2), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.drop(self.fc(x).relu()))


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * self.scale


class OwnLayers(nn.Module):
    """Each mode calls a layer that the other does not, and returns something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux, self.post = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.fc(x)
        if self.training:
            return x, {"aux": self.aux(x)}
        return {"post": self.post(x).tanh(), "x": x}


ENTRIES = [(StochasticDepth, ["fc"]), (OwnLayers, ["fc", "aux", "post"])]


def transformed(cls: type[nn.Module], targets: list[str], capture: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = cls().eval().requires_grad_(False)
    config = LoraConfig(r=2, target_modules=targets, **options)
    example = None if capture == "modules" else X
    return model, lora_transform(model, config, capture=capture, example_inputs=example)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("cls", "targets"), ENTRIES)
def test_both_modes_are_the_models(cls: type[nn.Module], targets: list[str], capture: str) -> None:
    model, lora = transformed(cls, targets, capture)
    assert "only training computes" in lora.two_graphs and len(lora.regions()) == 2
    for batch in (X, OTHER):
        for training in (False, True):
            expected = run(model, batch, training=training)
            assert same(run(lora, batch, training=training), expected)
            assert same(run(lora.unload() if training else lora, batch, training=training), expected)
        model, lora = transformed(cls, targets, capture)
    assert [key for key in lora.state_dict() if "lora_" not in key] == list(model.state_dict())
    assert list(inspect.signature(lora.forward).parameters) == ["x"]
    own = dict(lora.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert type(lora.eval()(**OTHER)) is type(model.eval()(**OTHER))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("cls", "targets"), ENTRIES)
def test_branches_are_in_the_graph_that_calls_their_site(
    cls: type[nn.Module], targets: list[str], capture: str
) -> None:
    """The same adapter on layers that stay modules gives the same numbers in both modes."""
    _, lora = transformed(cls, targets, capture)
    _, reference = transformed(cls, targets, "modules")
    for model in (lora, reference):
        randomise(model)
    for training in (False, True):
        for found, expected in zip(
            run(lora, OTHER, training=training), run(reference, OTHER, training=training), strict=True
        ):
            torch.testing.assert_close(found, expected)
    unmerged = run(lora, X)
    lora.merge_adapter()
    for found, expected in zip(run(lora, X), unmerged, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    lora.unmerge_adapter()
    lora.verify()
    assert same(run(lora, X), unmerged)
    plain = lora.merge_and_unload()
    assert type(plain).__mro__[1] is CapturedModule and not any("lora_" in key for key in plain.state_dict())
    for training in (False, True):
        merged = run(plain, X, training=training)
        for found, expected in zip(merged, run(reference, X, training=training), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capture", CAPTURES)
def test_adapters_of_one_mode_only(capture: str) -> None:
    _, lora = transformed(OwnLayers, ["aux"], capture)
    evaluation = run(lora, X)
    randomise(lora)
    assert same(run(lora, X), evaluation)
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["post"]))
    lora.set_adapter(["default", "second"])
    randomise(lora)
    assert not same(run(lora, X), evaluation)
    texts = lora.print_graph().partition("# evaluation")
    assert ("aux_lora" in texts[0], "post_lora" in texts[0]) == (True, False)
    assert ("aux_lora" in texts[2], "post_lora" in texts[2]) == (False, True)
    with lora.disable_adapter():
        assert same(run(lora, X), evaluation)
    lora.delete_adapter("default")
    lora.verify()
    with pytest.raises(CaptureError, match="'unused' is a target, but the captured graph never calls it"):
        transformed(WithUnused, ["unused"], capture)


class WithUnused(OwnLayers):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("index", [0, 1])
def test_a_branch_that_vanishes_from_either_graph_is_noticed(capture: str, index: int) -> None:
    _, lora = transformed(StochasticDepth, ["fc"], capture)
    lora.verify()
    regions = lora.regions()
    DropBranches().run(regions[index])
    with pytest.raises(VerifyError, match=r"'blocks\.0\.fc': the graph has branches of no adapter"):
        lora.verify()


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("cls", "targets"), ENTRIES)
def test_copies_and_pickles(cls: type[nn.Module], targets: list[str], capture: str, tmp_path: Path) -> None:
    _, lora = transformed(cls, targets, capture, lora_dropout=0.1)
    randomise(lora)
    expected = {training: run(lora, OTHER, training=training) for training in (False, True)}
    copied = copy.deepcopy(lora)
    for each in (copied, pickle.loads(pickle.dumps(lora)), copy.deepcopy(pickle.loads(pickle.dumps(copied)))):
        assert type(each).__mro__[1] is type(lora).__mro__[1]
        for training in (False, True):
            assert same(run(each, OTHER, training=training), expected[training])
        each.verify()
    with torch.no_grad():
        copied.get_parameter(f"{copied._specs()[0].site}.weight").zero_()
    for training in (False, True):
        assert not same(run(copied, OTHER, training=training), expected[training])
        assert same(run(lora, OTHER, training=training), expected[training])
    torch.save((lora, OTHER, expected), tmp_path / "model.pt")
    program = (
        "import sys, torch; from tests.models.checks import run, same\n"
        "model, batch, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert all(same(run(model, batch, training=mode), expected[mode]) for mode in (False, True))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("cls", "targets"), ENTRIES)
def test_each_mode_compiles_to_one_graph(cls: type[nn.Module], targets: list[str], capture: str) -> None:
    _, lora = transformed(cls, targets, capture)
    randomise(lora)
    torch._dynamo.reset()
    compiled = torch.compile(lora, backend="eager", fullgraph=True)
    for training in (True, False, True, False):
        lora.train(training)
        torch.manual_seed(1)
        expected = lora(**X)
        torch.manual_seed(1)
        found = compiled(**X)
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_each_rewrite_has_a_cache_of_its_own() -> None:
    """Dynamo compiles a function anew at most eight times, so no function may serve all adapters and models."""
    torch._dynamo.reset()
    for _ in range(2):
        _, lora = transformed(StochasticDepth, ["fc"], "symbolic")
        compiled = torch.compile(lora, backend="eager", fullgraph=True)
        for index in range(5):
            lora.add_adapter(f"more{index}", LoraConfig(r=2, target_modules=["fc"]))
            lora.set_adapter(f"more{index}")
            for training in (True, False):
                lora.train(training)
                assert compiled(**X).shape == (6, 8)


@pytest.mark.parametrize("capture", CAPTURES)
def test_each_mode_can_be_exported_again(capture: str) -> None:
    _, lora = transformed(StochasticDepth, ["fc"], capture)
    randomise(lora)
    for training in (True, False):
        lora.train(training)
        program = torch.export.export(lora, (), X, strict=False).module()
        torch.manual_seed(1)
        expected = lora(**X)
        torch.manual_seed(1)
        torch.testing.assert_close(program(**X), expected)
        assert ("rand" in str(lora.graph)) == training
    graphs = lora.regions()[0].graph, lora.regions()[1].graph
    lora.graph = graphs[1]
    assert lora.regions()[0].graph is graphs[0]


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_mixture_of_modes_is_refused_where_it_matters(capture: str) -> None:
    model, lora = transformed(StochasticDepth, ["fc"], capture)
    lora.train()
    lora.get_submodule("blocks.1").eval()
    with pytest.raises(CaptureError, match=r"'blocks\.1[.a-z]*' is in evaluation while the model is in training"):
        lora(**X)
    lora.eval()
    lora.get_submodule("blocks.0.path").train()
    with pytest.raises(CaptureError, match=r"'blocks\.0\.path' is in training while .* capture='modules'"):
        lora(**X)
    for each in (model, lora.eval()):
        each.get_submodule("blocks.0.fc").train()  # which makes no difference
    assert torch.equal(lora(**X), model(**X))


def test_a_layer_that_stays_whole_follows_its_own_mode() -> None:
    """As a frozen batch norm does."""
    model, lora = transformed(StochasticDepth, ["fc"], "symbolic")
    for each in (model, lora):
        each.train()
        each.get_submodule("blocks.0.drop").eval()
    torch.manual_seed(1)
    expected = model(**X)
    torch.manual_seed(1)
    assert torch.equal(lora(**X), expected)


class UsedOtherwise(nn.Module):
    """Evaluation reads a weight that training calls as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu() if self.training else self.fc(x) + self.fc.weight.sum()


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_merge_looks_at_both_graphs(capture: str) -> None:
    _, lora = transformed(UsedOtherwise, ["fc"], capture)
    randomise(lora)
    before = lora.get_parameter("fc.weight").clone()
    with pytest.raises(MergeError, match="'fc': its weight is shared with"):
        lora.merge_adapter()
    assert torch.equal(lora.get_parameter("fc.weight"), before) and not lora._lora.merged


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_log_says_why(capture: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fxlora"):
        transformed(StochasticDepth, ["fc"], capture)
    assert "stay two graphs, since in '" in caplog.text and "rand" in caplog.text


def test_auto_keeps_a_mode_for_each_module() -> None:
    _, lora = transformed(StochasticDepth, ["fc"], "auto")
    assert lora.capture == "modules" and "the graphs of the two modes part" in lora._lora.reason


class ConstantOfTheMode(nn.Module):
    """Tensors of one name and two values, which export lifts out of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.training:
            return (x + torch.tensor([1.0] * 8)).relu()
        with torch.no_grad():
            scale = self.fc.weight.sum() * 2
        return x + torch.tensor([2.0] * 8) * scale


def test_constants_of_both_modes_are_kept_apart() -> None:
    model, lora = transformed(ConstantOfTheMode, ["fc"], "export")
    assert len(lora.regions()) == 2
    for each in (lora, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        for training in (False, True):
            assert same(run(each, OTHER, training=training), run(model, OTHER, training=training))
