"""What `import fxlora` loads: little of its own, nothing of the packages that only some of its functions need."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

import fxlora

HEAVY = {
    *("networkx", "rich", "click", "peft", "transformers", "triton", "matplotlib", "safetensors", "tokenizers"),
    *("torch._dynamo", "torch._inductor", "torch.export", "torch.onnx", "torch.distributed.fsdp"),
}


def loaded(code: str) -> set[str]:
    """The modules that code loads on top of torch, in a fresh interpreter."""
    script = (
        f"import json, sys, torch\nbefore = set(sys.modules)\n{code}\nprint(json.dumps([*set(sys.modules) - before]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_no_heavy_package() -> None:
    new = loaded("import fxlora")
    assert new & HEAVY == set()
    assert {"fxlora.capture.modules", "fxlora.checkpoint.adapter", "fxlora.inspect.explain"} & new == set()


def test_transform_loads_no_heavy_package() -> None:
    new = loaded("from fxlora import LoraConfig, lora_transform")
    assert new & (HEAVY - {"safetensors"}) == set()
    assert {"fxlora.checkpoint.merge_files", "fxlora.inspect.explain", "fxlora.training"} & new == set()


def test_everything_public_is_found_and_listed() -> None:
    assert set(fxlora.__all__) <= set(dir(fxlora))
    for name in fxlora.__all__:
        assert getattr(fxlora, name).__name__ == name


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    code = "import fxlora, fxlora.transform, fxlora.inspect.diff, fxlora.inspect.compare, fxlora.inspect.doctor"
    names = "fxlora.plan, fxlora.diff, fxlora.compare, fxlora.doctor, fxlora.explain, fxlora.spectra"
    loaded(f"{code}\nassert all(map(callable, ({names})))")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'fxlora' has no attribute 'lora_transfrom'"):
        cast(Any, fxlora).lora_transfrom  # noqa: B018


def test_what_type_checkers_see_is_what_is_loaded_at_first_use() -> None:
    tree = ast.parse(Path(cast(str, fxlora.__file__)).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (cast(str, each.module).removeprefix("fxlora."), alias.name)
        for each in guarded.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    assert seen == {(module, name) for name, module in fxlora._MODULE_OF.items()}
