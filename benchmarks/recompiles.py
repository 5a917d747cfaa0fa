"""How often ten switches recompile a compiled model: three adapters, in slots, without them, and in peft.

Run: python -m benchmarks.recompiles [--json FILE]. `torch.compile(fullgraph=True)` with a backend that counts the graphs
it is given and runs them as they are, without gradients. After each step the compiled model's output is compared with the eager one's.
"first" is the number of graphs before the first step; a base model has 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, fx

from fxlora import LoraConfig, lora_transform

ADAPTERS = ("x", "y", "z")
RANKS = {"x": 4, "y": 8, "z": 2}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
SWITCHES = 10

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Counts:
    """Graphs that were compiled: before the first step, and in each step after it; or why there is no count."""

    library: str
    operation: str
    first: int = 0
    later: tuple[int, ...] = ()
    failed: str = ""


class Counter:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        """See the class."""
        del inputs
        self.graphs += 1
        return gm.forward


# ---- models ----


def base() -> Any:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def ours(*, slots: bool = False) -> Any:
    """With three adapters of different ranks."""
    model = lora_transform(base(), _config(LoraConfig, "x"), adapter_name="x", capture="modules")
    for name in ADAPTERS[1:]:
        model.add_adapter(name, _config(LoraConfig, name))
    _randomise(model)
    if slots:
        model.eval().use_slots()
    return model.eval()


def theirs() -> Any:
    """The same in peft."""
    model: Any = peft.get_peft_model(base(), _config(peft.LoraConfig, "x"), adapter_name="x")
    for name in ADAPTERS[1:]:
        model.add_adapter(name, _config(peft.LoraConfig, name))
    _randomise(model)
    return model.eval()


def _config(cls: Any, name: str) -> Any:
    return cls(r=RANKS[name], lora_alpha=2 * RANKS[name], target_modules=TARGETS)


def _randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def files(directory: Path) -> list[str]:
    """Directories of the three adapters."""
    ours().save_pretrained(directory)
    return [str(directory / name) for name in ADAPTERS]


# ---- counting ----


@dataclass
class Compiled:
    """A compiled model beside the eager one."""

    model: Any
    tokens: Tensor
    backend: Counter
    call: Callable[..., Any]

    @classmethod
    def of(cls, model: Any, *, fullgraph: bool = True) -> Compiled:
        """The model as it is now, not run yet."""
        torch._dynamo.reset()
        counter = Counter()
        tokens = torch.arange(4 * 6).view(4, 6) % 61
        return cls(model, tokens, counter, torch.compile(model, backend=counter, fullgraph=fullgraph))

    def run(self, tokens: Tensor | None = None) -> Tensor:
        """The compiled output.

        Raises:
            RuntimeError: when it is not the eager model's.
        """
        tokens = self.tokens if tokens is None else tokens
        found = self.call(tokens).last_hidden_state
        expected = self.model(tokens).last_hidden_state
        if not torch.allclose(found, expected, atol=1e-5):
            raise RuntimeError(f"the compiled output differs by {(found - expected).abs().max():.1e}")
        return found


@torch.no_grad()
def count(library: str, operation: str, compiled: Compiled, step: Callable[[int], object]) -> Counts:
    """Run once, and then after each of ten steps.

    Args:
        library: and form, for the table.
        operation: what a step does, for the table.
        compiled: the model.
        step: called with 0, 1, …; it may run the model itself, within a context.

    Raises:
        RuntimeError: when no step changes the output, which would count nothing.
    """
    try:
        before = compiled.run()
        first, later, changed = compiled.backend.graphs, list[int](), False
        for number in range(SWITCHES):
            start = compiled.backend.graphs
            result = step(number)
            output = result if isinstance(result, Tensor) else compiled.run()
            changed |= output.shape != before.shape or not torch.allclose(output, before, atol=1e-3)
            later.append(compiled.backend.graphs - start)
    except torch._dynamo.exc.TorchDynamoException as error:
        return Counts(library, operation, failed=str(error).strip().partition("\n")[0])
    if not changed:
        raise RuntimeError(f"{library}: {operation} changes nothing")
    return Counts(library, operation, first, tuple(later))


def all_counts(directory: Path) -> Iterator[Counts]:
    """Every operation, ours in slots first."""
    paths = files(directory)
    yield from switching(paths)
    yield from disabling()
    yield from scaling()
    yield from mixing()
    yield from lengths()


def switching(paths: list[str]) -> Iterator[Counts]:
    """`set_adapter`, and hot swap among files, each time another rank."""
    others = ("y", "z", "x")
    for name, model in (("fxlora, slots", ours(slots=True)), ("fxlora", ours()), ("peft", theirs())):
        compiled = Compiled.of(model)
        yield count(name, "set_adapter", compiled, lambda n, model=model: model.set_adapter(others[n % 3]))
    for name, model in (("fxlora, slots", ours(slots=True)), ("fxlora", ours())):
        compiled = Compiled.of(model)
        step = lambda n, model=model: model.hotswap_adapter(paths[(n + 1) % 3], "x")
        yield count(name, "hotswap_adapter", compiled, step)
    for name, prepared in (("peft, prepared", True), ("peft", False)):
        model = peft.PeftModel.from_pretrained(base(), paths[0], adapter_name="x")
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=max(RANKS.values()))
        compiled = Compiled.of(model)
        step = lambda n, model=model: hotswap_adapter(model, paths[(n + 1) % 3], "x", torch_device="cpu")
        yield count(name, "hotswap_adapter", compiled, step)


def disabling() -> Iterator[Counts]:
    """`disable_adapter`, left after each run."""
    for name, model in (("fxlora, slots", ours(slots=True)), ("fxlora", ours()), ("peft", theirs())):
        compiled = Compiled.of(model)

        def step(number: int, compiled: Compiled = compiled) -> Tensor | None:
            if number % 2:
                return None
            with compiled.model.disable_adapter():
                return compiled.run()

        yield count(name, "disable_adapter", compiled, step)


def scaling() -> Iterator[Counts]:
    """Another scale for the active adapter."""
    for name, model in (("fxlora, slots", ours(slots=True)), ("fxlora", ours())):
        compiled = Compiled.of(model)
        yield count(name, "set_scale", compiled, lambda n, model=model: model.set_scale("x", 2.0 + n))
    model = theirs()

    def step(number: int) -> None:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("x", 2.0 + number)

    yield count("peft", "set_scale", Compiled.of(model), step)


def mixing(*, with_peft: bool = True) -> Iterator[Counts]:
    """Other adapters for the rows of a batch."""
    batches = [["x", "y", "z", "__base__"], ["y", "y", "x", "z"], ["z", "x", "__base__", "x"], ["y", "x", "z", "z"]]
    for name, slots in (("fxlora, slots", True), ("fxlora", False)):
        compiled = Compiled.of(ours(slots=slots))

        def step(number: int, compiled: Compiled = compiled) -> Tensor:
            with compiled.model.adapter_rows(batches[number % 4]):
                return compiled.run()

        yield count(name, "rows of a batch", compiled, step)
    if not with_peft:
        return
    compiled = Compiled.of(theirs(), fullgraph=False)  # with fullgraph it is refused: names are given by hooks

    def peft_step(number: int) -> Tensor:
        names = batches[number % 4]
        found = compiled.call(compiled.tokens, adapter_names=names).last_hidden_state
        expected = compiled.model(compiled.tokens, adapter_names=names).last_hidden_state
        assert torch.allclose(found, expected, atol=1e-5)
        return found

    yield count("peft, breaks", "rows of a batch", compiled, peft_step)


def lengths(*, with_peft: bool = True) -> Iterator[Counts]:
    """Other lengths of the sequences, with the base beside: one more graph, for any length, is torch's own."""
    makers: dict[str, Callable[[], Any]] = {"base": base, "fxlora, slots": lambda: ours(slots=True), "fxlora": ours}
    for name, make in {**makers, **({"peft": theirs} if with_peft else {})}.items():
        compiled = Compiled.of(make())
        step = lambda n, compiled=compiled: compiled.run(torch.arange(4 * (7 + n)).view(4, -1) % 61)
        yield count(name, "length of sequences", compiled, step)


# ---- exported programs ----


def exported(directory: Path) -> Iterator[tuple[str, float]]:
    """Largest error of an exported program after each switch by a copy into its gates, and once it was saved and loaded."""
    model = ours(slots=True)
    tokens = torch.arange(4 * 6).view(4, 6) % 61
    program = torch.export.export(_Logits(model), (tokens,), strict=False)
    path = directory / "slots.pt2"
    torch.export.save(program, path)
    for label, each in (("exported", program), ("saved and loaded", torch.export.load(path))):
        runnable = each.module()
        worst = 0.0
        for number in range(SWITCHES):
            name = ADAPTERS[number % 3]
            model.set_adapter(name)
            copy_gates(runnable, {name: 1.0}, ADAPTERS)
            with torch.no_grad():
                found, expected = runnable(tokens), model(tokens).last_hidden_state
            worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
        yield label, worst


def copy_gates(program: torch.nn.Module, weights: dict[str, float], order: tuple[str, ...]) -> None:
    """Switch an exported program: all its gates are copies of one buffer.

    Raises:
        RuntimeError: when it has none.
    """
    gates = [buffer for name, buffer in program.named_buffers() if name.endswith(".gates")]
    if not gates:
        raise RuntimeError("the program has no gates")
    for buffer in gates:
        buffer.copy_(torch.tensor([weights.get(name, 0.0) for name in order]))


class _Logits(torch.nn.Module):
    """A model that returns one tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).last_hidden_state


def main() -> None:
    """Count, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what peft says of frozen adapters
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64  # peft's would be eager after 8, and refused with fullgraph
    print(f"graphs compiled, torch {torch.__version__}, peft {peft.__version__}")
    print(f"{'':16} {'':20} {'first':>6} {'in 10 steps':>12}")
    found: list[Counts] = []
    with tempfile.TemporaryDirectory() as directory:
        for counts in all_counts(Path(directory)):
            found.append(counts)
            values = counts.failed or f"{counts.first:6} {sum(counts.later):12}   {' '.join(map(str, counts.later))}"
            print(f"{counts.library:16} {counts.operation:20} {values}", flush=True)
        errors = dict(exported(Path(directory)))
    for label, error in errors.items():
        print(f"slots, {label}: 10 switches by copies into its gates, largest error {error:.0e}")
    if options.json:
        values = {"counts": [asdict(counts) for counts in found], "exported": errors}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
