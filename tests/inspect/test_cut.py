"""`extract_subgraph`: the piece computes what the whole computes, and a cut that is not closed is refused with a way out."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxlora import GraphError, LoraConfig, extract_subgraph, lora_transform
from tests.zoo import ARCHITECTURES, MLP

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
Q1 = "model.layers.1.self_attn.q_proj"


class Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        self.__dict__.setdefault("seen", {})[n.name] = value = super().run_node(n)
        return value


@pytest.fixture(scope="module")
def llama() -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = lora_transform(LLAMA.model(), config, capture="export", example_inputs=LLAMA.batch()).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def values(model: Any, *inputs: torch.Tensor) -> dict[str, Any]:
    recorder = Recorder(model)
    with torch.no_grad():
        recorder.run(*inputs, enable_io_processing=False)
    return recorder.__dict__["seen"]


def test_a_branch_with_its_layer(llama: Any) -> None:
    end = f"{Q1.replace('.', '_')}_lora_y_1"
    piece = extract_subgraph(llama, between=(Q1, end), example_inputs=LLAMA.batch())
    whole = values(llama, LLAMA.batch()["input_ids"])
    assert [node.op for node in piece.graph.nodes].count("placeholder") == 1
    assert piece.example_inputs is not None
    with torch.no_grad():
        assert torch.equal(piece(*piece.example_inputs), whole[end])
    names = {name for name, _ in piece.named_parameters()}
    assert names == {f"{Q1}.weight", f"{Q1}.lora_A.default.weight", f"{Q1}.lora_B.default.weight"}
    assert piece.get_parameter(f"{Q1}.weight") is llama.get_parameter(f"{Q1}.weight")


def test_a_cut_that_is_not_closed(llama: Any) -> None:
    with pytest.raises(GraphError, match="the cut is not closed: ") as raised:
        extract_subgraph(llama, between=(Q1, "lm_head"))
    value = re.search(r"also reads '(\w+)' and \d+ more, which", str(raised.value))
    assert value is not None and f"such as '{value[1]}', or give open_inputs=True" in str(raised.value)
    piece = extract_subgraph(llama, between=(Q1, "lm_head"), example_inputs=LLAMA.batch(), open_inputs=True)
    inputs = [node.name for node in piece.graph.nodes if node.op == "placeholder"]
    assert value[1] in inputs and piece.example_inputs is not None and len(piece.example_inputs) == len(inputs)
    with torch.no_grad():
        assert torch.equal(piece(*piece.example_inputs), llama(**LLAMA.batch()).logits)


def test_the_whole_from_its_input(llama: Any) -> None:
    piece = extract_subgraph(llama, between=("input_ids", "lm_head"))
    ids = LLAMA.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(piece(ids), llama(input_ids=ids).logits)


def test_gradients_of_a_piece_are_those_of_the_whole() -> None:
    model = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])).eval()
    x = torch.randn(5, 8)
    piece = extract_subgraph(model, between=("fc1", "fc2"), example_inputs=x)
    factor = model.get_parameter("fc1.lora_B.default.weight")
    grads = [torch.autograd.grad(each(x).square().sum(), factor)[0] for each in (model, piece)]
    assert torch.equal(grads[0], grads[1]) and grads[0].abs().sum() > 0
    assert piece.training is False and extract_subgraph(model.train(), between=("fc1", "fc2")).training


def test_a_piece_can_be_saved() -> None:
    model = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])).eval()
    piece = extract_subgraph(model, between=("fc1", "relu"), example_inputs=torch.randn(5, 8))
    file = io.BytesIO()
    torch.save(piece, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert piece.example_inputs is not None
    assert torch.equal(again(*piece.example_inputs), piece(*piece.example_inputs))


def test_errors(llama: Any) -> None:
    traced = fx.symbolic_trace(MLP())
    with pytest.raises(GraphError, match="called 'fc3'. Did you mean 'fc2'|'fc1'"):
        extract_subgraph(traced, between=("fc1", "fc3"))
    with pytest.raises(GraphError, match="'fc2' does not lead to 'fc1'"):
        extract_subgraph(traced, between=("fc2", "fc1"))
    with pytest.raises(GraphError, match="a MLP has no graph of the whole model to cut from"):
        extract_subgraph(MLP(), between=("fc1", "fc2"))
    with pytest.raises(GraphError, match="example_inputs do not fit the graph, whose inputs are x"):
        extract_subgraph(traced, between=("fc1", "fc2"), example_inputs={"y": torch.ones(1)})
