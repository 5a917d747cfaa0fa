"""Generated code in files: it is what runs, line by line, and computes the same; and what its comments say."""

from __future__ import annotations

import bdb
import copy
import inspect
import json
import pickle
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from fxlora import AdapterError, ConfigError, LoraConfig, lora_transform, write_code
from fxlora._passes import Instance, Region, comment_sites
from fxlora.cli import cli as commands
from tests.zoo import ARCHITECTURES

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class ByMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x.relu() if self.training else x.tanh())


X = torch.linspace(-1, 1, 24).reshape(3, 8)
CONFIG = LoraConfig(r=2, target_modules=["fc1"])


def transformed(model: nn.Module, capture: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False, **settings)
    example = X if capture == "export" else None
    return lora_transform(model, config, capture=capture, example_inputs=example)  # pyright: ignore[reportArgumentType]


def lines_run(path: Path, run: Any) -> set[int]:
    """The lines of a file that a call executes."""
    found: set[int] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != str(path):
            return None
        if event == "line":
            found.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return found


def numbered(path: Path, part: str) -> int:
    (number,) = [
        i for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if part in line and "#" not in line
    ]
    return number


@pytest.mark.parametrize("capture", ["modules", "symbolic", "export"])
def test_every_line_runs_and_computes_the_same(capture: str, tmp_path: Path) -> None:
    model = transformed(Net(), capture)
    before = model(X)
    (file,) = write_code(model, tmp_path).files
    assert file.path.name == ("linear.py" if capture == "modules" else "net.py")
    assert file.modules == (("fc1",) if capture == "modules" else ("",))
    results: list[Tensor] = []
    lines = lines_run(file.path, lambda: results.append(model(X)))
    code = file.path.read_text("utf-8").splitlines()
    statements = {i for i, line in enumerate(code, 1) if line.startswith("    ") and not line.strip().startswith("#")}
    assert lines == {i for i in statements if code[i - 1].strip()}
    assert torch.equal(results[0], before)


class Breaking(bdb.Bdb):
    """A debugger that notes where it stops and what it sees there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def user_line(self, frame: FrameType) -> None:
        if self.break_here(frame):
            self.seen.append((frame.f_lineno, tuple(frame.f_locals["lora_b"].shape)))
        self.set_continue()


def test_a_breakpoint_is_hit_in_every_layer(tmp_path: Path) -> None:
    model = lora_transform(LLAMA.model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    (file,) = write_code(model, tmp_path).files
    assert len(file.modules) == 4 and "model.layers.1.self_attn.v_proj" in file.modules
    line = numbered(file.path, "lora_scaling = self")
    debugger = Breaking()
    assert debugger.set_break(str(file.path), line) is None
    debugger.runcall(model, **LLAMA.batch())
    assert debugger.seen == [(line, (3, 11, 32)), (line, (3, 11, 16))] * 2


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_tracebacks_and_inspect_show_the_file(capture: str, tmp_path: Path) -> None:
    model = transformed(Net(), capture)
    (file,) = write_code(model, tmp_path).files
    with pytest.raises(RuntimeError) as caught:
        model.fc1.lora_B.default.weight.data = torch.zeros(16, 3)
        model(X)
    frames = traceback.extract_tb(caught.value.__traceback__)
    (frame,) = [each for each in frames if each.filename == str(file.path)]
    assert frame.lineno == numbered(file.path, "lora_b = torch") and "lora_b = torch._C._nn.linear(" in (
        frame.line or ""
    )
    owner: Any = type(model.fc1) if capture == "modules" else type(model)
    assert inspect.getsourcefile(owner.forward) == str(file.path)
    assert "# lora: fc1, adapter 'default', role 'factor_B'" in inspect.getsource(owner.forward)


def test_a_file_for_each_mode(tmp_path: Path) -> None:
    model = transformed(ByMode(), "symbolic")
    before = model.train()(X), model.eval()(X)
    files = write_code(model, tmp_path).files
    assert [each.path.name for each in files] == ["bymode_training.py", "bymode_evaluation.py"]
    for file, mode, expected in zip(files, (True, False), before, strict=True):
        model.train(mode)
        assert lines_run(file.path, lambda: model(X)) and torch.equal(model(X), expected)
        model.train(not mode)
        assert not lines_run(file.path, lambda: model(X))
    assert "tanh" in files[1].path.read_text("utf-8") and "tanh" in model.eval().print_readable(False)


def test_a_weight_that_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    config = LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False)
    lora = lora_transform(model, config, capture="modules")
    before = lora(X[None])
    (file,) = write_code(lora, tmp_path).files
    assert file.path.name == "linear_weight.py"
    assert lines_run(file.path, lambda: lora(X[None])) and torch.equal(lora(X[None]), before)


@pytest.mark.parametrize("capture", ["modules", "symbolic", "export"])
def test_copies_and_pickles_compute_the_same(capture: str, tmp_path: Path) -> None:
    model = transformed(Net(), capture)
    write_code(model, tmp_path)
    expected = model(X)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(X), expected) and torch.equal(loaded(X), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    expected.sum().backward()
    assert model.fc1.lora_A.default.weight.grad is not None


def test_it_compiles(tmp_path: Path) -> None:
    model = transformed(Net(), "modules")
    expected = torch.compile(model, backend="eager", fullgraph=True)(X)
    write_code(model, tmp_path)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), expected)


def test_files_that_run_are_not_replaced(tmp_path: Path) -> None:
    model = transformed(Net(), "modules")
    (first,) = write_code(model, tmp_path).files
    assert write_code(model, tmp_path).files == (first,)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    model.set_adapter(["default", "other"])
    (both,) = write_code(model, tmp_path).files
    assert both.path.name == "linear_2.py" and "adapter 'other'" in both.path.read_text("utf-8")
    assert lines_run(both.path, lambda: model(X))
    model.set_adapter("default")
    assert lines_run(first.path, lambda: model(X))


def test_errors(tmp_path: Path) -> None:
    model = transformed(Net(), "modules")
    (tmp_path / "linear.py").write_text("mine = 1\n")
    with pytest.raises(ConfigError, match="linear.py' is there, and fxlora did not write it"):
        write_code(model, tmp_path)
    assert (tmp_path / "linear.py").read_text() == "mine = 1\n"
    with model.disable_adapter(), pytest.raises(AdapterError, match="no generated code runs"):
        write_code(model, tmp_path)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        write_code(model, tmp_path)


def test_command(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path / "model")
    arguments = ["inspect", str(tmp_path / "model"), "--targets", "q_proj", "--code", str(tmp_path / "code")]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'code' / 'linear.py'}: model.layers.0.self_attn.q_proj and 1 more" in result.output
    assert "lora_A" in (tmp_path / "code" / "linear.py").read_text("utf-8")
    (file,) = json.loads(CliRunner().invoke(commands, [*arguments, "--json"]).output)["files"]
    assert len(file["modules"]) == 2
    assert CliRunner().invoke(commands, [*arguments, "--before"]).exit_code == 2


# ---- comments ----


def test_comments_of_a_whole_graph(capsys: pytest.CaptureFixture[str]) -> None:
    model = transformed(Net(), "export")
    batch = next(node for node in model.graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    text = model.print_readable()
    assert capsys.readouterr().out == text + "\n"
    lines = [line.strip() for line in text.splitlines()]
    expected = (
        ("fc1_lora_A:", "# lora: fc1, adapter 'default', role 'factor_A', float32 [2, 8]"),
        ("linear:", f"# lora: fc1, the linear itself, float32 [{batch}, 16]"),
        ("fc1_lora_s:", f"# lora: fc1, adapter 'default', role 'scale', float32 [{batch}, 16]"),
        ("fc1_lora_y:", f"# lora: fc1, all adapters, role 'add', float32 [{batch}, 16]"),
    )
    for name, comment in expected:
        at = next(i for i, line in enumerate(lines) if line.startswith(name))
        assert lines[at - 1] == comment
    nodes = [line for line in lines if line.startswith(("fc1_lora_", "linear:"))]
    assert sum(line.startswith("# lora:") for line in lines) == len(nodes) > 10


def test_comments_of_templates() -> None:
    model: Any = lora_transform(LLAMA.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    text = model.print_readable(print_output=False)
    assert "# lora: model.layers.*.self_attn.q_proj, adapter 'default', role 'factor_A', float32 [2, 32]" in text
    assert "# lora: model.layers.*.self_attn.q_proj, the linear itself" in text
    more: Any = lora_transform(LLAMA.model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    text = more.print_readable(print_output=False)
    assert "# lora: this layer, adapter 'default', role 'factor_B'\n" in text  # of two shapes


def test_comments_change_no_line() -> None:
    model = transformed(Net(), "symbolic")
    code = model.code
    commented = comment_sites(code, Region(model.graph, (Instance("", model),)))
    assert [line for line in commented.splitlines() if "# lora:" not in line] == code.splitlines()
    plain = torch.fx.symbolic_trace(Net())
    assert comment_sites(plain.code, Region(plain.graph, (Instance("", plain),))) == "\n".join(plain.code.splitlines())
    assert (
        model.print_readable(False, colored=True).count("# lora:") == model.print_readable(False).count("# lora:") > 9
    )
