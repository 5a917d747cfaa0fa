"""Selection beside peft's own functions, on generated module trees and rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, _find_minimal_target_modules, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from fxlora.plan import DEFAULT_TARGETS
from passes.select import (
    Rules,
    decide,
    layer_index,
    lookup,
    minimal_targets,
    select,
    select_parameters,
    unused,
)

VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])
if VERSION < (0, 21):
    pytest.skip("peft counted layers otherwise before 0.21", allow_module_level=True)

SEGMENTS = [
    "model", "layers", "h", "experts", "0", "1", "2", "12", "attn", "q_proj", "v_proj", "proj", "w1", "lm_head", "x.y"
]  # fmt: skip
paths = st.lists(st.sampled_from([each for each in SEGMENTS if "." not in each]), min_size=1, max_size=7)
trees = st.lists(paths, min_size=1, max_size=6).map(
    lambda leaves: list(dict.fromkeys(".".join(leaf[:depth]) for leaf in leaves for depth in range(1, len(leaf) + 1)))
)
"""Names of modules as `named_modules` has them: every module comes with its parents."""

EXPRESSIONS = [
    r".*", r".*_proj", r".*\.(q|v)_proj", r"model\..*", r".*\.\d+\..*", r"(?!.*attn).*proj", r".*layers\.[01]\..*",
    r"[^.]*", r"(model|h)(\.\w+)*", r"\w+\.1\.\w+", r"q_proj|v_proj", r"model\.(?P<idx>\w+)\..*", "(?i).*PROJ",
    r"(?:.*\.)?w\d", r".*(?<!q)_proj", r"model.layers.0.attn", "model\\.layers\\.0|h", "",
]  # fmt: skip
KEYS = [
    *(each for each in EXPRESSIONS if "(?i)" not in each),
    "^q_proj",
    "^model.layers.1.attn",
    "conv(1)",
    "a|h",
    "^h",
]
LAYER_LISTS = ["layers", "h", "experts", "layers|h", "h|layers", r"\w+", "lay.*", "(layers|h)", "model.layers", "", "l"]


def suffix_of(draw: st.DrawFn, names: list[str]) -> str:
    """Something that a user may write for a module: its name, an ending of it with or without a dot, or another word."""
    name = draw(st.sampled_from(names))
    dots = [0, *(match.end() for match in re.finditer(r"\.", name))]
    start = draw(st.one_of(st.sampled_from(dots), st.integers(0, len(name) - 1)))
    return draw(
        st.one_of(st.just(name), st.just(name[start:]), st.sampled_from([*SEGMENTS, ".*", ".proj", "q_pro", ""]))
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    """A module tree, and the fields of a configuration that speak of it."""
    names = draw(trees)

    def several(most: int) -> list[str]:
        return [suffix_of(draw, names) for _ in range(draw(st.integers(0, most)))]

    expression = st.sampled_from(EXPRESSIONS)
    return names, {
        "target_modules": draw(expression) if draw(st.integers(0, 3)) == 0 else several(5),
        "exclude_modules": draw(st.one_of(st.none(), expression, st.just(several(2)), st.just([]))),
        "modules_to_save": draw(st.one_of(st.none(), st.just(several(2)), st.just([".*_proj", "a|h"]))),
        "layers_to_transform": draw(
            st.one_of(st.none(), st.integers(0, 2), st.lists(st.sampled_from([0, 1, 2, 12]), max_size=3))
        ),
        "layers_pattern": draw(
            st.one_of(st.none(), st.sampled_from(LAYER_LISTS), st.lists(st.sampled_from(LAYER_LISTS), max_size=3))
        ),
    }


def as_tuple(value: Any) -> tuple[Any, ...]:
    """What peft takes as one value or several."""
    return () if value in (None, "") else tuple(value) if isinstance(value, list) else (value,)


def rules_of(config: dict[str, Any]) -> Rules:
    targets, excluded = config["target_modules"], config["exclude_modules"]
    return Rules(
        targets if isinstance(targets, str) else tuple(targets),
        excluded if isinstance(excluded, str) else tuple(excluded or ()),
        as_tuple(config["modules_to_save"]),
        as_tuple(config["layers_to_transform"]),
        as_tuple(config["layers_pattern"]),
    )


def verdict_of_peft(config: dict[str, Any], name: str) -> str:
    found = check_target_module_exists(SimpleNamespace(**config), name)
    return "excluded" if isinstance(found, _ExcludedModule) else "matched" if found else "no"


few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
many = settings(max_examples=250, deadline=None, derandomize=True, database=None)


@many
@given(case=cases())
def test_decisions_are_pefts(case: tuple[list[str], dict[str, Any]]) -> None:
    names, config = case
    rules = rules_of(config)
    decisions = select(names, rules)
    assert [decision.name for decision in decisions] == names
    for name, decision in zip(names, decisions, strict=True):
        verdict = decision.verdict if decision.verdict in ("matched", "excluded") else "no"
        assert verdict == verdict_of_peft(config, name), (name, config)
        assert decide(name, rules) == decision


@many
@given(names=trees, index=st.sampled_from([0, 1, 2, 12]), patterns=st.lists(st.sampled_from(LAYER_LISTS), max_size=3))
def test_layer_indices_are_pefts(names: list[str], index: int, patterns: list[str]) -> None:
    for name in names:
        child = f"{name}.proj"  # is a target by its suffix, so that only the layer decides
        config = {
            "target_modules": ["proj"], "target_parameters": None, "layers_to_transform": index, "layers_pattern": patterns
        }  # fmt: skip
        assert (layer_index(child, patterns) == index) == (verdict_of_peft(config, child) == "matched"), child


@many
@given(data=st.data(), names=trees)
def test_lookup_is_pefts(data: st.DataObject, names: list[str]) -> None:
    draw = data.draw
    written = [suffix_of(draw, names) for _ in range(draw(st.integers(0, 3)))]
    anchored = [f"^{name}" for name in draw(st.lists(st.sampled_from(names), max_size=2))]
    regular = draw(st.lists(st.sampled_from(KEYS), max_size=3))
    keys = draw(st.permutations([*written, *anchored, *regular]))
    patterns = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    for name in [*names, "conv(1)", "a.conv(1)"]:
        assert lookup(patterns, name, -1) == patterns.get(get_pattern_key(list(patterns), name), -1), name


@pytest.mark.parametrize("name", ["a\nb.q_proj", "q_proj\n", "\n.layers.1.q_proj", "model.layers.1\n.q_proj"])
def test_line_breaks_are_pefts(name: str) -> None:
    """`.` does not match them and `$` matches before them, in a name as anywhere."""
    for targets in (r".*q_proj", r".*q_proj\n?", ["q_proj"], ["q_proj\n"]):
        config = {"target_modules": targets, "exclude_modules": None, "modules_to_save": ["b"],
                  "layers_to_transform": [1] if isinstance(targets, list) else None, "layers_pattern": None}  # fmt: skip
        matched = decide(name, rules_of(config)).matched
        assert matched == (verdict_of_peft(config, name) == "matched"), targets
    assert lookup({"q_proj": 1}, name, 0) == {"q_proj": 1}.get(get_pattern_key(["q_proj"], name), 0)


# ---- what peft does to a model ----


class Tree(nn.Module):
    """A module tree with these names."""

    def __init__(self, names: list[str], leaf_module: Callable[[], nn.Module] = lambda: nn.Linear(1, 1)) -> None:
        super().__init__()
        for name in names:
            parent, _, leaf = name.rpartition(".")
            is_leaf = not any(other.startswith(f"{name}.") for other in names)
            self.get_submodule(parent).add_module(leaf, leaf_module() if is_leaf else nn.Module())


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


@few
@given(case=cases(), rank_keys=st.lists(st.sampled_from([*KEYS, *SEGMENTS]), max_size=4, unique=True))
def test_injection(case: tuple[list[str], dict[str, Any]], rank_keys: list[str]) -> None:
    """The layers that peft replaces, in its order; and the keys and exclusions of which it says that they do nothing."""
    tree, config = case
    model = Tree(tree)
    names = names_of(model)
    if isinstance(config["target_modules"], str):
        config = {**config, "layers_to_transform": None, "layers_pattern": None}
    if config["layers_to_transform"] is None:
        config = {**config, "layers_pattern": None}
    config = {**config, "modules_to_save": None}
    rules = rules_of(config)
    decisions = select(names, rules)
    chosen = [decision.name for decision in decisions if decision.matched]
    if not chosen or not all(isinstance(model.get_submodule(name), nn.Linear) for name in chosen):
        with pytest.raises(ValueError):
            peft.get_peft_model(model, peft.LoraConfig(r=1, **config))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=1, rank_pattern=dict.fromkeys(rank_keys, 2), **config))
    assert tuned.targeted_module_names == chosen
    ranks = [model.get_submodule(name).r["default"] for name in chosen]
    assert ranks == [lookup(dict.fromkeys(rank_keys, 2), name, 1) for name in chosen]
    found = {each.field: each.entries for each in unused(decisions, rules, rank_pattern=rank_keys)}
    said = [str(each.message) for each in caught]
    expected = next((text.partition("ignored: ")[2] for text in said if "rank_pattern keys" in text), "[].")
    assert str(sorted(found.get("rank_pattern", ()))) + "." == expected
    if any("no modules were excluded" in text for text in said):
        given = config["exclude_modules"]
        assert set(found["exclude_modules"]) == {given} if isinstance(given, str) else set(given)


class Bare(nn.Module):
    """A module with parameters of its own."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(2, 2, 2)))


@few
@given(
    tree=trees,
    own=st.permutations(["gate_up", "down", "up"]),
    targets=st.lists(
        st.sampled_from(["down", "up", "gate_up", "layers.up", "model.down", "0.up", "experts.down", "p", "model.layers.up"]),
        max_size=4,
    ),
)  # fmt: skip
def test_target_parameters(tree: list[str], own: list[str], targets: list[str]) -> None:
    """Which parameters, and in which order: that of the model, however the names are sorted."""
    model = Tree(tree, lambda: Bare(own))  # peft cannot reach the children of a module whose parameters it wrapped
    expected = select_parameters([name for name, _ in model.named_parameters()], targets)
    assume(expected)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[], target_parameters=targets))
    assert tuned.targeted_parameter_names == expected


def test_parameters_of_the_root_are_refused_by_peft_and_found_by_us() -> None:
    model = Bare(["up"])
    assert select_parameters(["up"], ["up"]) == ["up"]
    with pytest.raises(ValueError, match="top-level module is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[], target_parameters=["up"]))


# ---- names that are written ----


@many
@given(names=trees, data=st.data())
def test_minimal_targets_are_pefts(names: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.sets(st.sampled_from(names), min_size=1))
    others = data.draw(st.sets(st.sampled_from(names))) - wanted
    minimal = minimal_targets(wanted, others)
    assert set(minimal) == _find_minimal_target_modules(wanted, others)
    assert minimal == sorted(minimal)
    if not any(other.endswith(f".{name}") for other in others for name in wanted):  # as wherever peft calls it
        found = {each.name for each in select([*wanted, *others], Rules(tuple(minimal))) if each.matched}
        assert found == wanted


@pytest.mark.parametrize(("wanted", "others"), [([], ["a"]), ([""], ["a"]), (["a", "b"], ["b"])])
def test_minimal_targets_refuse_what_peft_refuses(wanted: list[str], others: list[str]) -> None:
    with pytest.raises(ValueError):
        _find_minimal_target_modules(wanted, others)
    with pytest.raises(ValueError, match="wanted"):
        minimal_targets(wanted, others)


def test_default_targets_are_pefts() -> None:
    ours = {name: targets if isinstance(targets, str) else sorted(targets) for name, targets in DEFAULT_TARGETS.items()}
    theirs = {
        name: targets if isinstance(targets, str) else sorted(targets)
        for name, targets in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }
    if VERSION == (0, 21):
        assert ours == theirs
    else:  # later versions may know more models
        assert {name: theirs[name] for name in ours} == ours
