"""`fxlora demo`: a real pretrained language model captured, rewritten, tuned, merged and checked, with figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from fxlora import LoraConfig, LoraModel, explain, export_merged, lora_transform
from fxlora.capture.modules import template
from fxlora.demo import shakespeare, smollm2
from fxlora.demo.training import evaluate, train
from fxlora.rendering import human_bytes

PROMPT = "To be, or not"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to run.

    Attributes:
        model: a Hugging Face directory; SmolLM2-135M-Instruct if None.
        data: a text file; Shakespeare's plays, Hamlet held out, if None.
        out: the folder for everything that the demo leaves.
        steps: optimizer steps of `batch` sequences of `length` tokens.
        r: rank.
        lora_alpha: numerator of the scaling.
        lr: highest learning rate.
        held_out_blocks: sequences of the held-out text that the loss is measured on.
        seed: decides everything random.
    """

    model: Path | None = None
    data: Path | None = None
    out: Path = Path("fxlora-demo")
    steps: int = 30
    batch: int = 2
    length: int = 64
    r: int = 8
    lora_alpha: int = 16
    lr: float = 2e-3
    held_out_blocks: int = 32
    seed: int = 0


@dataclass
class DemoReport:
    """All figures of a run; losses in nats per token, times in seconds, sizes in bytes."""

    capture: str = ""
    reason: str = ""
    sites: int = 0
    trainable: int = 0
    total: int = 0
    losses: list[float] = field(default_factory=list[float])
    loss_before: float = 0.0
    loss_after: float = 0.0
    sample_before: str = ""
    sample_after: str = ""
    adapter_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    fresh_equals_base: bool = False
    reloaded_equals: bool = False
    merge_error: float = 0.0
    merge_bound: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all three checks hold."""
        return self.fresh_equals_base and self.reloaded_equals and self.merge_error <= self.merge_bound


def run(options: DemoOptions, console: Console) -> DemoReport:
    """Run the demo, print its course, and leave adapter, merged model, pictures and figures in `options.out`.

    Raises:
        FileNotFoundError: when the model or the text is not there; says how to get it.
        ImportError: when a package of the extra `demo` is missing.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    report, out = DemoReport(), options.out
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock(report.seconds)

    with clock("load model"), console.status("reading the model"):
        path = options.model or smollm2.cached_model_dir()
        model, tokenizer = smollm2.load_model(path), smollm2.load_tokenizer(path)
        name = getattr(model.config, "name_or_path", "") or path.name
    console.print(f"[bold]Model[/] {Path(name).name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    with clock("load text"), console.status("reading the text"):
        training, held_out = _texts(options)
        blocks = shakespeare.token_blocks(tokenizer, training, options.length)
        measured = _spread(shakespeare.token_blocks(tokenizer, held_out, options.length), options.held_out_blocks)
    console.print(f"[bold]Text[/] {len(blocks):,} sequences of {options.length} tokens; {len(measured)} held out")

    model.requires_grad_(False)  # so that base and transformed model run the same kernels
    base_logits = _logits(model, measured[:4])
    with clock("evaluate"), console.status("measuring the base model"):
        report.loss_before = evaluate(model, measured)
        report.sample_before = _sample(model, tokenizer)

    config = LoraConfig(r=options.r, lora_alpha=options.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    console.print(_explanation(model, config))
    torch.manual_seed(options.seed)
    with clock("transform"):
        lora = lora_transform(model, config)
    _fill_from_transform(report, lora)
    console.print(f"[bold]Capture[/] '{report.capture}', {report.reason}; {1e3 * report.seconds['transform']:.0f} ms")
    lora.print_trainable_parameters()
    report.fresh_equals_base = torch.equal(_logits(lora, measured[:4]), base_logits)
    _check(console, report.fresh_equals_base, "a fresh adapter (B = 0) gives the base's logits bit for bit")

    with clock("train"), _progress(console, options.steps) as on_step:
        drawn = shakespeare.batches(blocks, options.batch, options.steps, options.seed)
        report.losses = train(lora, drawn, steps=options.steps, lr=options.lr, on_step=on_step)
    with clock("evaluate"), console.status("measuring the tuned model"):
        report.loss_after = evaluate(lora, measured)
        report.sample_after = _sample(lora, tokenizer)
    console.print(_before_after(report))

    with clock("save adapter"):
        lora.save_pretrained(out / "adapter")
    report.adapter_bytes = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    console.print(f"[bold]Adapter[/] {human_bytes(report.adapter_bytes)} in {out / 'adapter'}")
    tuned_logits = _logits(lora, measured[:4])
    with clock("reload"):
        fresh = lora_transform(smollm2.load_model(path), out / "adapter")
    report.reloaded_equals = torch.equal(_logits(fresh, measured[:4]), tuned_logits)
    _check(
        console, report.reloaded_equals, "the adapter, reloaded into a fresh model, gives the same logits bit for bit"
    )
    del fresh

    _pictures(lora, report, out)
    with clock("export merged"):
        export_merged(lora, out / "merged", tokenizer=tokenizer)
    with clock("merge"):
        merged = lora.merge_and_unload()
    merged_logits = _logits(merged, measured[:4])
    report.merge_error = (merged_logits - tuned_logits).abs().max().item()
    report.merge_bound = _bound(tuned_logits)
    _check(
        console,
        report.merge_error <= report.merge_bound,
        f"merged and unmerged logits differ by {report.merge_error:.1e} at most (bound {report.merge_bound:.1e}, "
        f"largest logit {tuned_logits.abs().max().item():.1f}); merged in {1e3 * report.seconds['merge']:.0f} ms",
    )
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    console.print(f"[bold]Left in[/] {out.resolve()}: adapter/, merged/, loss.png, graph-*.svg, graph.txt, report.json")
    return report


class _Clock:
    """Adds up seconds by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def _texts(options: DemoOptions) -> tuple[str, str]:
    return shakespeare.load_text_file(options.data) if options.data else shakespeare.load_shakespeare()


def _spread(blocks: Tensor, count: int) -> Tensor:
    """`count` blocks spread evenly over a text."""
    stride = max(1, len(blocks) // count)
    return blocks[::stride][:count]


@torch.no_grad()
def _logits(model: nn.Module, blocks: Tensor) -> Tensor:
    return model.eval()(input_ids=blocks).logits


def _bound(logits: Tensor) -> float:
    """What rounding the weights and the sums of a network in float32 may do to its logits: 2⁻¹⁵ of the largest.

    Each layer rounds its weights once and its sums differently; over tens of layers these relative errors of 2⁻²⁴ add
    up to a few hundred times that.
    """
    return logits.abs().max().item() * 2**-15


def _sample(model: nn.Module, tokenizer: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _explanation(model: nn.Module, config: LoraConfig) -> Table:
    explanation = explain(model, config)
    table = Table(title="Matched layers", title_justify="left", caption="\n".join(explanation.summary()))
    header, *rows = explanation.table()
    for index, cell in enumerate(header[:-1]):
        table.add_column(cell, justify="right" if index in (1, 5, 6) else "left")
    for row in rows:
        table.add_row(*row[:-1], style="" if row[4] == "yes" else "dim")
    return table


def _fill_from_transform(report: DemoReport, lora: LoraModel) -> None:
    report.capture, report.reason = lora.capture, lora._lora.reason
    report.sites = len(lora._specs())
    report.trainable, report.total = lora.get_nb_trainable_parameters()


@contextmanager
def _progress(console: Console, steps: int) -> Generator[Callable[[int, float], None]]:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and (step % 5 == 0 or step == steps):
                console.print(f"  step {step:3d}/{steps}: loss {loss:.3f}")

        yield on_step


def _before_after(report: DemoReport) -> Table:
    table = Table("", "before", "after", title="On the held-out text", title_justify="left")
    table.add_row("loss (nats per token)", f"{report.loss_before:.3f}", f"{report.loss_after:.3f}")
    perplexities = (torch.tensor([report.loss_before, report.loss_after]).exp()).tolist()
    table.add_row("perplexity", *(f"{value:.1f}" for value in perplexities))
    table.add_row(f"'{PROMPT}' goes on", report.sample_before[len(PROMPT) :], report.sample_after[len(PROMPT) :])
    return table


def _check(console: Console, passed: bool, what: str) -> None:
    console.print(f"[green]✓[/] {what}" if passed else f"[red bold]✗ FAILED:[/] {what}")


def _pictures(lora: LoraModel, report: DemoReport, out: Path) -> None:
    """The loss curve, and one layer's graph before and after the rewrite, as pictures and text."""
    from matplotlib.figure import Figure

    from fxlora.inspect.picture import draw

    region = lora.regions()[0]
    if region.instances[0].name:  # one layer; a whole graph would be unreadable
        before = template(type(region.module).__mro__[1])
        draw(before, out / "graph-before.svg", f"{region.instances[0].name}, before")
        draw(region.graph, out / "graph-after.svg", f"{region.instances[0].name}, after")
    (out / "graph.txt").write_text(lora.print_graph() + "\n", encoding="utf-8")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.plot(range(1, len(report.losses) + 1), report.losses)
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    figure.savefig(out / "loss.png", dpi=120)
