"""One model read aloud: its graph before, after each pass, and after the merge, as a person sees it."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxlora import LoraConfig, lora_transform
from fxlora._passes import print_graph
from fxlora.capture.graph_module import LoraGraphModule


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


BEFORE = """\
  x    = input
  fc1  = self.fc1(x)
  relu = fc1.relu()
  fc2  = self.fc2(relu)
  return fc2"""

AFTER_INSERT = """\
  x                = input
  fc1              = self.fc1(x)
+ fc1_lora_A       = self.fc1.lora_A.default.weight
+ fc1_lora_B       = self.fc1.lora_B.default.weight
+ fc1_lora_dropout = self.fc1.lora_dropout.default(x)
+ fc1_lora_dtype   = fc1_lora_dropout.dtype
+ fc1_lora_A_1     = fc1_lora_A.to(fc1_lora_dtype)
+ fc1_lora_B_1     = fc1_lora_B.to(fc1_lora_dtype)
+ fc1_lora_a       = linear(fc1_lora_dropout, fc1_lora_A_1)
+ fc1_lora_b       = linear(fc1_lora_a, fc1_lora_B_1)
+ fc1_lora_scaling = self.fc1.lora_scaling.default()
+ fc1_lora_s       = mul(fc1_lora_b, fc1_lora_scaling)
+ fc1_lora_y       = add(fc1, fc1_lora_s)
+ fc1_lora_dtype_1 = fc1.dtype
+ fc1_lora_y_1     = fc1_lora_y.to(fc1_lora_dtype_1)
  relu             = fc1_lora_y_1.relu()
  fc2              = self.fc2(relu)
  return fc2"""

PEFT_ARITHMETIC = """\
  x                = input
  fc1              = self.fc1(x)
+ fc1_lora_A       = self.fc1.lora_A.default.weight
+ fc1_lora_B       = self.fc1.lora_B.default.weight
+ fc1_lora_dtype   = fc1_lora_A.dtype
+ fc1_lora_x       = x.to(fc1_lora_dtype)
+ fc1_lora_dropout = self.fc1.lora_dropout.default(fc1_lora_x)
+ fc1_lora_a       = linear(fc1_lora_dropout, fc1_lora_A)
+ fc1_lora_b       = linear(fc1_lora_a, fc1_lora_B)
+ fc1_lora_scaling = self.fc1.lora_scaling.default()
+ fc1_lora_s       = mul(fc1_lora_b, fc1_lora_scaling)
+ fc1_lora_y       = add(fc1, fc1_lora_s)
+ fc1_lora_dtype_1 = fc1.dtype
+ fc1_lora_y_1     = fc1_lora_y.to(fc1_lora_dtype_1)
  relu             = fc1_lora_y_1.relu()
  fc2              = self.fc2(relu)
  return fc2"""


def test_before_after_insert_after_merge() -> None:
    model = TwoLayers().eval()
    assert print_graph(fx.symbolic_trace(model).graph) == BEFORE
    lora = lora_transform(model, LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.1)).eval()
    assert lora.print_graph() == AFTER_INSERT
    nn.init.normal_(lora.get_parameter("fc1.lora_B.default.weight"))
    x = torch.randn(3, 4)
    live, weight = lora(x), lora.get_parameter("fc1.weight").clone()
    lora.merge_adapter()
    assert lora.print_graph() == BEFORE
    assert not torch.equal(lora.get_parameter("fc1.weight"), weight)
    torch.testing.assert_close(lora(x), live)
    lora.unmerge_adapter()
    assert lora.print_graph() == AFTER_INSERT
    assert torch.equal(lora.get_parameter("fc1.weight"), weight)
    with lora.disable_adapter():
        assert lora.print_graph() == BEFORE
    merged = lora.merge_and_unload()
    assert isinstance(merged, fx.GraphModule) and not isinstance(merged, LoraGraphModule)
    assert print_graph(merged.graph) == BEFORE
    assert list(merged.state_dict()) == list(TwoLayers().state_dict())


def test_the_other_branch_dtype() -> None:
    config = LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.1, branch_dtype="adapter")
    assert lora_transform(TwoLayers(), config).print_graph() == PEFT_ARITHMETIC
