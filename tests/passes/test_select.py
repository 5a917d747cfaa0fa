"""Selection: tables by hand, peft itself as the oracle, and messages that help."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from passes.errors import NoTargetError
from passes.select import Rules, check_targets, decide, layer_index, lookup, select, summarise

LLAMA = [
    f"model.layers.{layer}.{part}"
    for layer in range(3)
    for part in ("self_attn", "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
NAMES = ["model", "model.layers", *LLAMA, "lm_head"]


def chosen(rules: Rules, names: list[str] = NAMES) -> list[str]:
    return [decision.name for decision in select(names, rules) if decision.matched]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(("q_proj",)), [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        (Rules(("lm_head",)), ["lm_head"]),
        (Rules(("self_attn.q_proj",)), [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        (Rules(("model.layers.1.mlp.up_proj",)), ["model.layers.1.mlp.up_proj"]),
        (Rules(("proj",)), []),  # a suffix ends at a dot
        (Rules((".*q_proj",)), []),  # no expressions in lists
        (Rules("q_proj"), []),  # a string must match the whole name
        (Rules(r".*\.(q|v)_proj"), [name for name in LLAMA if re.search("[qv]_proj", name)]),
        (Rules(r"model\.layers\.0\..*proj"), [n for n in LLAMA if ".0." in n and n.endswith("proj")]),
        (Rules(()), []),
        (Rules(("v_proj",), exclude_modules=("model.layers.1.self_attn.v_proj",)),
         ["model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.v_proj"]),
        (Rules(("q_proj", "v_proj"), exclude_modules=("q_proj",)), [n for n in LLAMA if n.endswith("v_proj")]),
        (Rules(("v_proj",), exclude_modules=r".*\.[01]\..*"), ["model.layers.2.self_attn.v_proj"]),
        (Rules(("v_proj", "lm_head"), modules_to_save=("lm_head",)), [n for n in LLAMA if n.endswith("v_proj")]),
        (Rules(("v_proj", "up_proj"), modules_to_save=("self_attn",)), [n for n in LLAMA if n.endswith("up_proj")]),
        (Rules(("v_proj",), layers_to_transform=(0, 2)),
         ["model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.v_proj"]),
        (Rules(("v_proj",), layers_to_transform=(1,), layers_pattern=("layers",)), ["model.layers.1.self_attn.v_proj"]),
        (Rules(("v_proj",), layers_to_transform=(1,), layers_pattern=("blocks",)), []),
        (Rules(("model.layers.0.mlp.up_proj",), layers_to_transform=(2,)), ["model.layers.0.mlp.up_proj"]),  # exact name
    ],
    ids=str,
)  # fmt: skip
def test_table(rules: Rules, expected: list[str]) -> None:
    assert chosen(rules) == expected


def test_the_root_is_never_a_target() -> None:
    assert [decision.name for decision in select(["", "fc"], Rules(".*"))] == ["fc"]


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("model.layers.0.self_attn.q_proj", "matched", "target_modules: 'q_proj'"),
        ("model.layers.1.self_attn.q_proj", "other layer", "'q_proj' matches, but the layer is not in layers_to_transform"),
        ("model.layers.0.self_attn.v_proj", "excluded", "excluded by 'v_proj'"),
        ("lm_head", "excluded", "excluded by 'lm_head'"),
        ("model.layers.0.mlp.up_proj", "not targeted", "no target matches"),
    ],
)
def test_reasons(name: str, verdict: str, reason: str) -> None:
    rules = Rules(
        ("q_proj", "v_proj", "lm_head"),
        exclude_modules=("v_proj",),
        modules_to_save=("lm_head",),
        layers_to_transform=(0,),
    )
    decision = decide(name, rules)
    assert (decision.verdict, decision.reason, decision.matched) == (verdict, reason, verdict == "matched")


@pytest.mark.parametrize(
    ("name", "patterns", "index"),
    [
        ("model.layers.12.q_proj", (), 12),
        ("layers.1.q_proj", (), None),  # without a pattern the list needs a parent, as in peft
        ("layers.1.q_proj", ("layers",), 1),
        ("model.layers.1.experts.7.w1", (), 1),
        ("model.layers.1.experts.7.w1", ("experts",), 7),
        ("model.layers.1.experts.7.w1", ("blocks", "experts"), 7),
        ("model.layers.1.experts.7.w1", ("experts", "layers"), 7),
        ("model.layers.1", (), None),  # the layer itself lies in no layer
        ("lm_head", (), None),
    ],
)
def test_layer_index(name: str, patterns: tuple[str, ...], index: int | None) -> None:
    assert layer_index(name, patterns) == index


@pytest.mark.parametrize(
    ("patterns", "name", "value"),
    [
        ({"q_proj": 4}, "model.layers.0.q_proj", 4),
        ({"q_proj": 4}, "model.layers.0.my_q_proj", 8),
        ({"^q_proj": 4}, "q_proj", 4),
        ({"^q_proj": 4}, "model.q_proj", 8),
        ({r"layers\.[01]\.q": 4}, "model.layers.1.q", 4),
        ({"q": 1, "layers.0.q": 2}, "layers.0.q", 1),  # the first in order
        ({"a|b": 4}, "x.b", 4),
        ({}, "q", 8),
        ({"conv(1)": 4}, "conv(1)", 4),  # matches nothing as an expression, but is the name
    ],
)
def test_lookup(patterns: dict[str, int], name: str, value: int) -> None:
    assert lookup(patterns, name, 8) == value


# ---- peft as the oracle ----

SEGMENTS = ["model", "layers", "h", "experts", "0", "1", "12", "attn", "q_proj", "v_proj", "proj", "w1", "lm_head"]
names_ = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=6).map(".".join)
plain = st.one_of(st.sampled_from(SEGMENTS), names_, st.sampled_from(["q_pro", "j", ".proj", "attn.q_proj", ".*"]))
expressions = st.one_of(
    names_,
    st.sampled_from([
        r".*", r".*_proj", r".*\.(q|v)_proj", r"model\..*", r".*\.\d+\..*", r"(?!.*attn).*proj", r".*layers\.[01]\..*",
        r"[^.]*", r"(model|h)(\.\w+)*", r"\w+\.1\.\w+", r"q_proj|v_proj",
    ]),
)  # fmt: skip


def lists(of: st.SearchStrategy[str], most: int = 4) -> st.SearchStrategy[list[str]]:
    return st.lists(of, max_size=most)


configs = st.fixed_dictionaries({
    "target_modules": st.one_of(lists(plain), expressions),
    "exclude_modules": st.one_of(st.none(), lists(plain, 2), expressions),
    "modules_to_save": st.one_of(st.none(), lists(st.one_of(st.sampled_from(SEGMENTS), names_), 2)),
    "layers_to_transform": st.one_of(st.none(), st.integers(0, 2), st.lists(st.sampled_from([0, 1, 2, 12]), max_size=3)),
    "layers_pattern": st.one_of(st.none(), st.sampled_from(["", "layers", "h"]), lists(st.sampled_from(SEGMENTS), 2)),
})  # fmt: skip


def as_tuple(value: object) -> tuple[object, ...]:
    return () if value in (None, "") else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def rules_of(config: dict[str, object]) -> Rules:
    targets, excluded = config["target_modules"], config["exclude_modules"]
    return Rules(
        targets if isinstance(targets, str) else tuple(targets),
        excluded if isinstance(excluded, str) else tuple(excluded or ()),
        as_tuple(config["modules_to_save"]),
        as_tuple(config["layers_to_transform"]),
        as_tuple(config["layers_pattern"]),
    )


def check_against_peft(config: dict[str, object], names: list[str]) -> int:
    """Number of names that both choose; they must agree on every name."""
    theirs, rules = SimpleNamespace(**config), rules_of(config)
    if isinstance(config["target_modules"], str):  # peft refuses layers with an expression
        theirs.layers_to_transform = theirs.layers_pattern = None
    matched = 0
    for name in names:
        expected = check_target_module_exists(theirs, name)
        found = decide(name, rules)
        assert found.matched == bool(expected), (name, config)
        assert (found.verdict == "excluded") == isinstance(expected, _ExcludedModule), (name, config)
        matched += found.matched
    return matched


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(config=configs, names=st.lists(names_, min_size=8, max_size=12, unique=True))
def test_decisions_are_pefts(config: dict[str, object], names: list[str]) -> None:
    check_against_peft(config, [*names, *NAMES])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    patterns=st.dictionaries(st.one_of(expressions, names_, st.just("conv(1)"), st.just("^q_proj")), st.integers()),
    names=st.lists(st.one_of(names_, st.just("conv(1)"), st.just("a.conv(1)")), min_size=5, max_size=10),
)
def test_lookup_is_pefts(patterns: dict[str, int], names: list[str]) -> None:
    for name in names:
        expected = patterns.get(get_pattern_key(list(patterns), name), -1)
        assert lookup(patterns, name, -1) == expected
