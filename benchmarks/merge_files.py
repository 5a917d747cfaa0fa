"""Merging files: time beside `cp` of the same file, and peak memory; peft's load, merge and save beside it.

Run: python -m benchmarks.merge_files [--work DIR] [--rounds N] [--peft N] [--large] [--json FILE]. The checkpoints are made
once in DIR: 2.2 GB of a 1.1 billion Llama in bfloat16, rank 16 on all linears of its layers; with --large one of 12 GB in
three shards too. Each measurement is a process of its own, in turns: cp, fxlora, cp, fxlora, … and then peft. "seconds" is
without imports for fxlora and peft, and "process" is all of it. Peak memory is VmHWM. Everything that fxlora writes is
on disk (fsync) when it ends, and hashed; "cp, sync" is a copy that is on disk too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.merge_inputs import LARGE, TINY_LLAMA, make_adapter, make_base


@dataclass(frozen=True)
class Measured:
    """One process.

    Attributes:
        what: was run.
        seconds: of the work.
        process: seconds from its start to its end.
        megabytes: peak of its resident memory.
    """

    what: str
    seconds: float
    process: float
    megabytes: float


# ---- what is measured ----


def fxlora(base: Path, adapter: Path, out: Path) -> float:
    """Merge from files to files; returns seconds."""
    from fxlora import merge_checkpoint

    start = time.perf_counter()
    merge_checkpoint(base, adapter, out)
    return time.perf_counter() - start


def peft(base: Path, adapter: Path, out: Path) -> float:
    """Load, merge and save with peft and transformers; returns seconds."""
    return _peft(base, adapter, out, safe=False)


def peft_safe(base: Path, adapter: Path, out: Path) -> float:
    """The same with safe_merge."""
    return _peft(base, adapter, out, safe=True)


def _peft(base: Path, adapter: Path, out: Path, *, safe: bool) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe).save_pretrained(out)
    return time.perf_counter() - start


CHILDREN = {"fxlora": fxlora, "peft": peft, "peft, safe_merge": peft_safe}


def child(what: str, *paths: str) -> None:
    """Do one thing and print its seconds and its peak memory."""
    seconds = CHILDREN[what](*map(Path, paths))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "megabytes": int(kilobytes) * 1024 / 1e6}))


def measure(what: str, base: Path, adapter: Path, out: Path) -> Measured:
    """Run one of `CHILDREN` in a process of its own, into a directory that is not there."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.merge_files", "--child", what, str(base), str(adapter), str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measured(what, process=time.perf_counter() - start, **json.loads(done.stdout.splitlines()[-1]))


def copy(what: str, base: Path, out: Path) -> Measured:
    """`cp` of all weights, and a sync of the copies if `what` says so."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(out)], check=True)
    for file in out.iterdir() if what == "cp, sync" else ():
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    return Measured(what, seconds, seconds, 0.0)


# ---- rounds ----


def rounds(base: Path, adapter: Path, out: Path, number: int, peft_number: int) -> Iterator[Measured]:
    """All measurements, in turns."""
    copy("cp", base, out)  # so that the file is in the page cache
    for _ in range(number):
        yield copy("cp", base, out)
        yield measure("fxlora", base, adapter, out)
        yield copy("cp, sync", base, out)
        yield measure("fxlora", base, adapter, out)
    for _ in range(peft_number):
        for what in ("peft", "peft, safe_merge"):
            yield measure(what, base, adapter, out)
    shutil.rmtree(out, ignore_errors=True)


def differences(base: Path, adapter: Path, work: Path) -> dict[str, int]:
    """How many merged weights of peft differ from fxlora's, which are the rounded exact sums (benchmarks.merge_rounding)."""
    from safetensors import safe_open

    found: dict[str, int] = {}
    measure("fxlora", base, adapter, work / "ours")
    for what in ("peft", "peft, safe_merge"):
        measure(what, base, adapter, work / "theirs")
        pair = [work / name / "model.safetensors" for name in ("ours", "theirs")]
        with safe_open(pair[0], "pt") as ours, safe_open(pair[1], "pt") as theirs:
            found[what] = sum(int((ours.get_tensor(k) != theirs.get_tensor(k)).sum()) for k in ours.keys())  # noqa: SIM118
    return found


def summary(title: str, found: list[Measured]) -> list[str]:
    """The lines of a table: medians, and the range of seconds."""
    copies = statistics.median(each.seconds for each in found if each.what == "cp")
    lines = [title, f"{'':18} {'seconds':>8} {'range':>14} {'process':>8} {'x cp':>6} {'peak MB':>8} {'runs':>5}"]
    for what in dict.fromkeys(each.what for each in found):
        of = [each for each in found if each.what == what]
        seconds = [each.seconds for each in of]
        middle = statistics.median(seconds)
        lines.append(
            f"{what:18} {middle:8.2f} {f'{min(seconds):.2f}-{max(seconds):.2f}':>14} "
            f"{statistics.median(each.process for each in of):8.2f} {middle / copies:6.2f} "
            f"{max(each.megabytes for each in of):8.0f} {len(of):5}"
        )
    return lines


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fxlora-merge-files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft", type=int, default=2)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work: Path = options.work
    results: dict[str, Any] = {"processors": os.cpu_count()}
    base, adapter = make_base(work / "base", TINY_LLAMA), make_adapter(work / "adapter", TINY_LLAMA)
    found = list(rounds(base, adapter, work / "out", options.rounds, options.peft))
    print("\n".join(summary("2.2 GB", found)))
    results["2.2 GB"] = [asdict(each) for each in found]
    if options.peft:
        results["differences"] = differences(base, adapter, work)
        print("merged weights that differ from the rounded exact sums:", results["differences"])
    if options.large:
        base = make_base(work / "large", LARGE, max_shard_bytes=5 * 10**9)
        adapter = make_adapter(work / "large-adapter", LARGE)
        found = list(rounds(base, adapter, work / "out", 1, 0))
        print("\n".join(summary("12 GB", found)))
        results["12 GB"] = [asdict(each) for each in found]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
