"""The cost model: what it counts, what it chooses, and the reasons that it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxlora.ops import choice
from fxlora.ops.choice import Shape, choose, chosen, estimate, foreseen

GPU = torch.device("cuda")
B16 = torch.bfloat16


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(choice, "has_kernels", lambda device: device.type == "cuda")


def test_operations_are_those_of_six_products() -> None:
    """`x A`, `xs B`, `dy B`, `dyᵀ xs`, `dxa A` and `dxaᵀ x`, two for each entry of the factors and row."""
    for kernels in (True, False):
        found = estimate(Shape(10, (20, 30), (2, 4)), 7, kernels)
        assert found.flop == 6 * 7 * (2 * (10 + 20) + 4 * (10 + 30))


def test_kernels_read_less() -> None:
    for shape in (Shape(512, (512,), (16,)), Shape(512, (512, 128, 128), (8, 8, 8)), Shape(512, (512,), (16,), True)):
        kernels, products = (estimate(shape, 1024, each) for each in (True, False))
        assert kernels.bytes < products.bytes
        assert kernels.launches < products.launches
        assert kernels.seconds < products.seconds
    activations = 2 * 1024 * 512 * 5
    assert activations < estimate(Shape(512, (512,), (16,)), 1024, True).bytes < 1.2 * activations


REFUSED: dict[str, tuple[torch.device, torch.dtype, int, Shape]] = {
    "no Triton kernels on cpu": (torch.device("cpu"), B16, 8, Shape(64, (64,), (8,))),
    "an empty batch": (GPU, B16, 0, Shape(64, (64,), (8,))),
    "float32 activations: only 16-bit ones have kernels": (GPU, torch.float32, 8, Shape(64, (64,), (8,))),
    "4 layers share an input: the kernels take up to 3": (GPU, B16, 8, Shape(64, (64,) * 4, (8,) * 4)),
    "2,097,121 rows: the kernels take up to 2,097,120": (GPU, B16, 2_097_121, Shape(64, (64,), (8,))),
    "rank 256 is above 64: 6.44 GFLOP at 512 rows would take kernels 43 us, cuBLAS 11 us": (
        GPU, B16, 512, Shape(4096, (4096,), (256,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_kernels(reason: str, with_kernels: None) -> None:
    found = choose(*REFUSED[reason])
    assert (found.how, found.reason) == ("products", reason)


def test_reasons_have_the_figures(with_kernels: None) -> None:
    found = choose(GPU, B16, 8192, Shape(4096, (4096,), (16,)))
    assert found.kernels
    assert found.reason.startswith("rank 16 at 8,192 rows: 6.44 GFLOP, about ")
    assert " launches) by kernels, " in found.reason and found.reason.endswith(" launches) by ATen")


def test_the_cheaper_one_is_chosen(with_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(4096, (4096,), (64,))
    assert choose(GPU, B16, 8192, shape).how == "kernels"
    monkeypatch.setattr(choice, "_KERNELS_RATE", 1e12)
    assert choose(GPU, B16, 8192, shape).how == "products"
    assert choose(GPU, B16, 1, shape).how == "kernels"
    found = choose(GPU, B16, None, shape)
    assert found.how == "products"
    assert found.reason.startswith("but Triton's kernels at 1 rows, which a call knows; 512 rows: 1.61 GFLOP, about ")


def test_rows_are_not_known_before_a_call(with_kernels: None) -> None:
    found = foreseen(GPU, B16, Shape(4096, (4096,), (16,)))
    assert found.how == "kernels"
    assert found.reason.startswith("whatever the number of rows, which a call knows; 512 rows: 403 MFLOP, about ")
    assert "; 8,192 rows: 6.44 GFLOP, about " in found.reason


def test_on_a_cpu(composed: None) -> None:
    found = foreseen(torch.device("cpu"), B16, Shape(64, (64,), (8,)))
    assert (found.how, found.reason) == ("composed", "on a CPU the call of an operator costs more than it saves")


@pytest.mark.parametrize(("layers", "multiplications", "waits"), [(56, 1024 * 4.9e8, True), (28, 8192 * 8.7e8, False)])
def test_small_steps_wait_for_the_host(layers: int, multiplications: float, waits: bool) -> None:
    """8 layers of Llama-3.2-1B's shape at 1,024 tokens; 4 of Llama-3-8B's at 8,192."""
    assert choice.waits_for_host(GPU, layers, multiplications) == waits
    assert not choice.waits_for_host(torch.device("cpu"), layers, multiplications)


def test_calls_ask_once_for_a_shape(with_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(function: Callable[..., choice.Choice]) -> Callable[..., choice.Choice]:
        def ask(device: torch.device, dtype: torch.dtype, rows: int, shape: Shape) -> choice.Choice:
            asked.append(rows)
            return function(device, dtype, rows, shape)

        return ask

    monkeypatch.setattr(choice, "choose", counted(choose))
    chosen.cache_clear()
    shape = Shape(77, (33,), (5,))
    assert [chosen(GPU, B16, rows, shape) for rows in (1024, 1024, 0, 1024)] == [
        "kernels",
        "kernels",
        "products",
        "kernels",
    ]
    assert asked == [1024, 0]
    chosen.cache_clear()
