"""Are the optimized model's gradients as exact as peft's? A step on a 16-bit base, beside the same model in float32.

Run: python -m benchmarks.gradient_errors [--device cuda] [--only plain] [--json FILE]

All variants have the same factors, float32 and random, and the same batch; those of one list are compared with peft's eager
step on the base's values in float32. An error is the norm of the difference over the norm of the gradient. Most of it is the
base's, whose activations are in 16 bits; what a library adds shows in a comparison with the others. Loss curves show it
less well: any other order of sums moves them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import model_shapes
from benchmarks.isolated import Isolated, VariantFailed
from benchmarks.report import environment, number, save, table
from benchmarks.run_settings import LANGUAGE_SHAPE, Shared, language_options, shared_values
from benchmarks.variants import Adapter, Variant, callable_of, trained_by_name, with_adapter

LISTS = {
    "plain": ("peft fp32 eager", "peft fp32", "fxlora fp32 canonical eager", "fxlora fp32 eager", "fxlora fp32"),
    "dora": ("peft fp32 dora eager", "peft fp32 dora", "fxlora fp32 dora eager", "fxlora fp32 dora"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Shared):
    """What is the same for all variants."""

    def __str__(self) -> str:
        """One line."""
        batches = f", sums over {self.steps} batches" if self.steps > 1 else ""
        return f"{self.sizes}, float32 adapters of r {self.rank}{batches}"


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant gave.

    Attributes:
        variant: its words.
        reason: why it has no figures; empty where it has.
        loss: in nats.
        loss_error: its difference to float32's.
        error: of all gradients together, relative.
        median: over the factors, relative.
        worst: of the factor where it is largest, relative.
        worst_name: that factor.
    """

    variant: str
    reason: str = ""
    loss: float = 0.0
    loss_error: float = 0.0
    error: float = 0.0
    median: float = 0.0
    worst: float = 0.0
    worst_name: str = ""


class OneStep:
    """A variant in its process."""

    def __init__(self, words: str, settings: Settings, dtype: str) -> None:
        torch.set_num_threads(settings.threads)
        variant = Variant.parse(words)
        base = getattr(torch, settings.dtype)
        model = model_shapes.build(settings.shape, settings.layers, settings.shrink, settings.device, base, head=True)
        model = model.to(getattr(torch, dtype))
        self._model = with_adapter(model, variant, Adapter(settings.rank, model_shapes.targets(model)))
        self._call = callable_of(self._model, variant)
        generator = torch.Generator().manual_seed(3)
        size = (settings.steps, *settings.tokens)
        self._batches = torch.randint(0, 1024, size, generator=generator).to(settings.device)

    def write(self, path: Path) -> None:
        """The loss and the gradients into a file."""
        torch.save(self._run(), path)

    def compared(self, path: Path) -> dict[str, float | str]:
        """The fields of a `Row`, by comparison with what another variant wrote."""
        loss, found = self._run()
        exact_loss, exact = torch.load(path)
        if found.keys() != exact.keys():
            raise ValueError(f"other factors are trained: {sorted(found.keys() ^ exact.keys())[:4]}")
        squares = {name: (found[name] - exact[name]).square().sum().item() for name in exact}
        sizes = {name: exact[name].square().sum().item() for name in exact}
        errors = {name: (squares[name] / sizes[name]) ** 0.5 for name in exact}
        worst = max(errors, key=errors.__getitem__)
        return dict(
            loss=loss,
            loss_error=loss - exact_loss,
            error=(sum(squares.values()) / sum(sizes.values())) ** 0.5,
            median=statistics.median(errors.values()),
            worst=errors[worst],
            worst_name=worst,
        )

    def _run(self) -> tuple[float, dict[str, Tensor]]:
        self._model.train()
        losses: list[float] = []
        for tokens in self._batches:
            loss = self._call(input_ids=tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.item())
        gradients = {name: parameter.grad for name, parameter in trained_by_name(self._model).items()}
        found = {name: gradient.double().cpu() for name, gradient in gradients.items() if gradient is not None}
        if len(found) != len(gradients):
            raise ValueError(f"{len(gradients) - len(found)} of {len(gradients)} factors have no gradient")
        return statistics.mean(losses), found


def measure(words: Sequence[str], settings: Settings) -> list[Row]:
    """One list, each variant in its process after the other.

    Args:
        words: of the variants; the first one's in float32 is what all are compared with.
        settings: of all.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "exact.pt"
        exact = Isolated(OneStep, words[0], settings, "float32")
        try:
            exact.call("write", path)
        finally:
            exact.close()
        for each in words:
            process = Isolated(OneStep, each, settings, settings.dtype)
            try:
                rows.append(Row(each, **process.call("compared", path)))
            except VariantFailed as error:
                rows.append(Row(each, reason=str(error)))
            process.close()
            print(f"  {each:32} {rows[-1].reason or number(rows[-1].error)}", flush=True)
    return rows


def lines(rows: Iterable[Row]) -> list[str]:
    """A table in Markdown."""
    header = ("variant", "loss", "its error", "gradients' error", "median factor's", "worst factor's", "which")
    cells = [
        (row.variant, row.reason, *[""] * 5)
        if row.reason
        else (
            row.variant, f"{row.loss:.5f}", f"{row.loss_error:+.1e}", f"{row.error:.2e}", f"{row.median:.2e}",
            f"{row.worst:.2e}", row.worst_name,
        )
        for row in rows
    ]  # fmt: skip
    return ["", *table(header, cells)]


def main() -> None:
    """Measure, print the table, write what was asked for."""
    parser = language_options(
        __doc__ or "", steps="batches whose gradients are summed, by default 1", lists=LISTS,
        only="variants without DoRA, or with it",
    )  # fmt: skip
    parser.set_defaults(dtype="bfloat16", shape=LANGUAGE_SHAPE)
    options = parser.parse_args()
    small = options.device == "cpu"
    tokens = (2, 64) if small else (8, 1024)
    settings = Settings(**shared_values(options, shape=options.shape, layers=4, tokens=tokens, steps=1))
    about = environment(settings.device, settings.threads)
    print(f"{about}\n{settings}", flush=True)
    rows: list[Row] = []
    for which in [options.only] if options.only else LISTS:
        rows += measure(LISTS[which], settings)
        if options.json:
            save(options.json, "gradient_errors", about, settings, [asdict(row) for row in rows])
    print("\n".join(lines(rows)))


if __name__ == "__main__":
    main()
