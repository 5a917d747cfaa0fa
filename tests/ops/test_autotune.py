"""Measured choices: made once for each kind of call, kept on disk, read by later processes, and visible in reports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fxlora
from fxlora import optimize
from fxlora.compile import backend
from fxlora.ops import aten, autotune, call, choice, tuning_file
from fxlora.ops.autotune import Kind, measured_choice
from fxlora.ops.choice import Implementation, Shape
from fxlora.ops.linear import implementation
from tests.ops.compiling import Recorder
from tests.ops.test_optimize import assert_near, batch, results, transformed

CPU, GPU, F32, B16 = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
SHAPE = Shape(8, (6, 4), (2, 3))


class Timer:
    """Stands for the measurement: which implementation is fastest is given."""

    def __init__(self, fastest: Implementation) -> None:
        self.fastest: Implementation = fastest
        self.asked: list[str] = []
        self.seconds = 0.0

    def __call__(self, kind: Kind, device: torch.device, rows: int, candidates: Any) -> dict[str, float]:
        self.asked.append(str(kind))
        time.sleep(self.seconds)
        assert kind.rows // 2 < rows <= kind.rows
        return {how: 20.0 if how == self.fastest else 57.4 for how in candidates}


@pytest.fixture(autouse=True)
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: None) -> Iterator[None]:
    """Switched on, with a cache of its own."""
    monkeypatch.setenv("FXLORA_CACHE_DIR", str(tmp_path / "cache"))
    autotune.forget()
    autotune.switch(True)
    yield
    autotune.switch(False)
    autotune.forget()


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    found = Timer("products")
    monkeypatch.setattr(autotune, "_time_all", found)
    return found


def choice_of(rows: int, shape: Shape = SHAPE, dtype: torch.dtype = F32) -> Implementation | None:
    return measured_choice(CPU, dtype, rows, shape)


def only_file() -> Path:
    (path,) = tuning_file.cache_directory().iterdir()
    return path


def test_once_for_each_kind(timer: Timer) -> None:
    assert [choice_of(rows) for rows in (5, 7, 8, 9, 1, 5)] == ["products"] * 6
    assert timer.asked == [f"float32 {rows} x 8 -> 6+4 r 2+3" for rows in (8, 16, 1)]
    choice_of(8, dtype=B16)
    choice_of(8, Shape(8, (6, 4), (2, 3), True))
    assert timer.asked[3:] == ["bfloat16 8 x 8 -> 6+4 r 2+3", "float32 8 x 8 -> 6+4 r 2+3 dropout"]
    assert choice_of(0) is None
    autotune.switch(False)
    assert choice_of(5) is None
    assert len(timer.asked) == 5


def test_later_processes_read_the_file(timer: Timer) -> None:
    drops = Shape(8, (6, 4), (2, 3), True)
    choice_of(5)
    choice_of(300, drops)
    page = json.loads(only_file().read_text())
    assert page["torch"] == torch.__version__ and page["fxlora"] == fxlora.__version__
    assert page["measured"]["float32 8 x 8 -> 6+4 r 2+3"] == {"composed": 57.4, "products": 20.0}
    autotune.forget()
    timer.fastest = "composed"
    assert choice_of(6) == choice_of(257, drops) == "products"
    assert len(timer.asked) == 2
    assert choice_of(9) == "composed"
    assert len(json.loads(only_file().read_text())["measured"]) == 3


FOREIGN: dict[str, Any] = {
    "no JSON": "{",
    "no text": b"\xff\xfe",
    "a list": [1],
    "deep": "[" * 100_000,
    "of another torch": {"torch": "1.0"},
    "of another device": {"device": "an abacus"},
    "of another format": {"format": 99},
    "no times": {"measured": {"float32 8 x 8 -> 6+4 r 2+3": {"products": "fast"}}},
    "negative times": {"measured": {"float32 8 x 8 -> 6+4 r 2+3": {"products": -1.0, "composed": 1.0}}},
    "not finite": {"measured": {"float32 8 x 8 -> 6+4 r 2+3": {"products": float("nan"), "composed": 1.0}}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_written_anew(name: str, timer: Timer, caplog: pytest.LogCaptureFixture) -> None:
    choice_of(5)
    path, what = only_file(), FOREIGN[name]
    if isinstance(what, dict):
        what = {**json.loads(path.read_text()), **what}
    path.write_bytes(
        what if isinstance(what, bytes) else (what if isinstance(what, str) else json.dumps(what)).encode()
    )
    autotune.forget()
    timer.fastest = "composed"
    with caplog.at_level(logging.WARNING, "fxlora"):
        assert choice_of(5) == "composed"
    assert "is written anew" in caplog.text and str(path) in caplog.text
    assert json.loads(only_file().read_text())["measured"]["float32 8 x 8 -> 6+4 r 2+3"]["composed"] == 20.0


@pytest.mark.parametrize(
    "text", ["nonsense", "float32 8 x 8 -> 6 r", "strided 8 x 8 -> 6+4 r 2+3", "float32 8 x 8 -> 6+4 r 2+3 drop"]
)
def test_unknown_entries_of_a_file_are_left_alone(text: str, timer: Timer) -> None:
    tuning_file.add(autotune.name_of(CPU), {text: {"products": 1.0, "composed": 2.0}})
    assert choice_of(5) == "products"
    assert len(timer.asked) == 1
    assert set(json.loads(only_file().read_text())["measured"]) == {text, *timer.asked}


def test_incomplete_entries_are_measured(timer: Timer) -> None:
    tuning_file.add(autotune.name_of(CPU), {"float32 8 x 8 -> 6+4 r 2+3": {"composed": 1.0}})
    assert choice_of(5) == "products"


def test_processes_add_to_each_other(timer: Timer) -> None:
    choice_of(5)
    tuning_file.add(autotune.name_of(CPU), {"float32 1 x 8 -> 6+4 r 2+3": {"composed": 1.0, "products": 2.0}})
    choice_of(9)
    assert len(json.loads(only_file().read_text())["measured"]) == 3


def test_a_directory_that_cannot_be_written(timer: Timer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING, "fxlora"):
        assert choice_of(5) == "products"
    assert "measurements are not kept" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_where_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FXLORA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_file.file_of("x").parent == tmp_path / "fxlora"
    assert tuning_file.file_of("x") != tuning_file.file_of("y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_file.cache_directory() == Path.home() / ".cache" / "fxlora"


def test_threads_measure_once(timer: Timer) -> None:
    timer.seconds = 0.05
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(choice_of, [5] * 64)) == {"products"}
    assert len(timer.asked) == 1


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def fail(*args: Any) -> dict[str, float]:
        tries.append(1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(autotune, "_time_all", fail)
    with caplog.at_level(logging.WARNING, "fxlora"):
        assert choice_of(5) == choice_of(6) == "products"  # the cost model's, among operators
    assert len(tries) == 1 and "too little memory" in caplog.text
    assert not autotune.known(CPU, F32, SHAPE)
    assert not tuning_file.cache_directory().exists()


def test_never_while_a_graph_is_captured(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = True
    monkeypatch.setattr(choice, "has_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(autotune, "_gpu_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    choice.chosen.cache_clear()
    x: Any = SimpleNamespace(shape=(300, 8), device=GPU, dtype=B16, is_cuda=True)
    Bs = [torch.empty(6, 2), torch.empty(4, 3)]
    assert measured_choice(GPU, B16, 300, SHAPE) is None
    assert choice.chosen(GPU, B16, 300, SHAPE) == "kernels"
    assert not timer.asked
    capturing = False
    assert implementation(x, Bs) is aten
    assert timer.asked == ["bfloat16 512 x 8 -> 6+4 r 2+3"]
    capturing = True
    assert measured_choice(GPU, B16, 300, SHAPE) == "products"
    assert measured_choice(GPU, F32, 300, SHAPE) is None  # nothing to compare
    assert measured_choice(GPU, B16, choice.MOST_ROWS + 1, SHAPE) is None  # likewise: the kernels cannot
    choice.chosen.cache_clear()


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(3, F32), (3, B16), (300, F32)])
def test_measuring_leaves_no_trace(drops: bool, rows: int, dtype: torch.dtype) -> None:
    """In whatever mode the caller is, and of the generator's state."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert choice_of(rows, Shape(8, (6, 4), (2, 3), drops), dtype) in ("composed", "products")
    assert torch.equal(torch.get_rng_state(), before)
    (times,) = json.loads(only_file().read_text())["measured"].values()
    assert set(times) == {"composed", "products"} and min(times.values()) > 0


@pytest.mark.parametrize("fastest", ["composed", "products"])
@pytest.mark.parametrize("rows", [3, 300])
def test_models_run_what_is_fastest(
    fastest: Implementation, rows: int, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer.fastest = fastest
    called: list[int] = []
    operator = call._operator

    def counted(x: torch.Tensor, weights: list[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        called.append(len(weights))
        return operator(x, weights, *args)

    monkeypatch.setattr(call, "_operator", counted)
    model, canonical = transformed("symbolic"), transformed("symbolic")
    optimize(model, autotune=True)
    x = torch.randn(rows, 8)
    assert_near(results(model, x), results(canonical, x))
    assert called == ([3, 2, 1] if fastest == "products" else [])
    assert timer.asked == [
        f"float32 {4 if rows == 3 else 512} x {sizes}"
        for sizes in ("8 -> 8+4+4 r 2+2+2", "8 -> 12+12 r 2+2", "12 -> 8 r 2")
    ]


def test_reports_have_the_times(timer: Timer) -> None:
    model = transformed("symbolic")
    text = str(optimize(model, autotune=True))
    assert "until calls are measured: on a CPU the call of an operator costs more than it saves" in text
    model(batch())
    model(torch.randn(600, 8))
    report = optimize(model)
    (line,) = [str(each) for each in report.choices if "8 + 4 + 4" in each.shape]
    assert line == (
        "1 × float32 8 -> 8 + 4 + 4, r 2: ATen's products (measured: 16 rows torch 57 us, ATen 20 us; "
        "1,024 rows torch 57 us, ATen 20 us)"
    )
    assert all(each.reason.startswith("measured: ") for each in report.choices)
    autotune.switch(False)
    assert "measured" not in str(optimize(model))


def test_switched_on_by_whoever_asks(recorder: Recorder, timer: Timer) -> None:
    autotune.switch(False)
    model = transformed("modules")
    optimize(model)
    assert not autotune.is_on()
    compiled = torch.compile(model, backend=backend, options={"autotune": True, "max_autotune": False})
    compiled(batch())
    assert autotune.is_on()
    assert recorder.patches == [{"max_autotune": False}]
    autotune.switch(False)
    optimize(model, autotune=True)
    assert autotune.is_on()


def test_compiles_in_one_graph(timer: Timer) -> None:
    model, canonical = transformed("symbolic"), transformed("symbolic")
    optimize(model, autotune=True)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(results(model, batch(), call), results(canonical, batch()))
    assert not timer.asked
