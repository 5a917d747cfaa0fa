"""Draws the README's pictures: `python docs/pictures.py`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform
from fxlora.capture.graph_module import LoraGraphModule
from fxlora.inspect.picture import draw


class Net(nn.Module):
    """The README's example."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Two layers."""
        return self.fc2(self.fc1(x).relu())


net = lora_transform(Net(), LoraConfig(r=2, target_modules=["fc1"]))
assert isinstance(net, LoraGraphModule)
here = Path(__file__).parent
draw(net.graph, here / "after.svg")
with net.disable_adapter():
    draw(net.graph, here / "before.svg")
