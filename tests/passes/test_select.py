"""Selection: tables by hand, peft itself as the oracle, and messages that help."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

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
        (
            "model.layers.1.self_attn.q_proj",
            "other layer",
            "'q_proj' matches, but the layer is not in layers_to_transform",
        ),
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


def name_sets(seed: int, count: int = 10) -> Iterator[list[str]]:
    """Random module trees: every name comes with its parents, as `named_modules` has them."""
    draw = random.Random(seed)
    for _ in range(count):
        leaves = [draw.choices(SEGMENTS, k=draw.randint(1, 6)) for _ in range(4)]
        yield sorted({".".join(leaf[:depth]) for leaf in leaves for depth in range(1, len(leaf) + 1)})


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(config=configs, seed=st.integers(0, 2**32))
def test_decisions_are_pefts(config: dict[str, Any], seed: int) -> None:
    rules = rules_of(config)
    for names in (NAMES, *name_sets(seed)):
        for name in names:
            expected = check_target_module_exists(SimpleNamespace(**config), name)
            found = decide(name, rules)
            assert found.matched == bool(expected), (name, config)
            assert (found.verdict == "excluded") == isinstance(expected, _ExcludedModule), (name, config)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    patterns=st.dictionaries(st.one_of(expressions, names_, st.just("conv(1)"), st.just("^q_proj")), st.integers()),
    names=st.lists(st.one_of(names_, st.just("conv(1)"), st.just("a.conv(1)")), min_size=5, max_size=10),
)
def test_lookup_is_pefts(patterns: dict[str, int], names: list[str]) -> None:
    for name in names:
        expected = patterns.get(get_pattern_key(list(patterns), name), -1)
        assert lookup(patterns, name, -1) == expected


# ---- messages ----

LAYERS = [name for name in (*LLAMA, "lm_head") if name.endswith(("proj", "head"))]


def refusal(rules: Rules, names: list[str] = NAMES, available: list[str] = LAYERS) -> str:
    with pytest.raises(NoTargetError) as caught:
        check_targets(select(names, rules), rules, available)
    return str(caught.value)


def test_nothing_is_refused_where_every_target_is_found() -> None:
    for rules in (
        Rules(("q_proj", "lm_head")),
        Rules(r".*\.q_proj"),
        Rules(("q_proj", "v_proj"), exclude_modules=("v_proj",)),
        Rules(("q_proj", "model.layers.2.mlp.up_proj"), layers_to_transform=(0,)),
        Rules(("q_proj", "lm_head"), modules_to_save=("lm_head",)),
        Rules(("self_attn.q_proj", "model.layers.0.self_attn.q_proj")),  # two targets for one name
    ):
        check_targets(select(NAMES, rules), rules, LAYERS)


def test_misspelt_target() -> None:
    text = refusal(Rules(("q_porj",)))
    assert text == (
        "target_modules=['q_porj'] matches no module of the model. Did you mean 'q_proj' or 'v_proj' or 'up_proj'? "
        "The model's linear layers are: q_proj (3), v_proj (3), up_proj (3), lm_head."
    )


def test_one_misspelt_target_of_two() -> None:
    text = refusal(Rules(("q_proj", "v_porj")))
    assert "target_modules=['q_proj', 'v_porj']: no module is called 'v_porj'." in text
    assert "Did you mean 'v_proj'" in text


def test_two_missing_targets() -> None:
    assert "no module is called 'xx' or 'yy'." in refusal(Rules(("q_proj", "xx", "yy")))


def test_suffix_given_as_an_expression() -> None:
    text = refusal(Rules("self_attn"))
    assert "target_modules='self_attn' matches no module" in text
    assert "A string is a regular expression for the whole name: put a suffix into a list." in text


def test_expression_without_a_match() -> None:
    text = refusal(Rules(r".*\.z\d+"))
    assert text.startswith(r"target_modules='.*\.z\d+' matches no module of the model.")
    assert "suffix into a list" not in text


@pytest.mark.parametrize(
    "rules",
    [
        Rules(("v_proj",), exclude_modules=("self_attn.v_proj",)),
        Rules(("v_proj",), modules_to_save=("self_attn",)),
        Rules(r".*v_proj", exclude_modules=r".*v_proj"),
    ],
)
def test_everything_is_excluded(rules: Rules) -> None:
    text = refusal(rules, [name for name in NAMES if name.endswith("v_proj")])
    assert "finds nothing: 3 modules are excluded (exclude_modules, modules_to_save)." in text


def test_no_layer_is_left() -> None:
    text = refusal(Rules(("v_proj",), layers_to_transform=(7,)))
    assert "finds nothing: 3 modules match, but layers_to_transform leaves none of them." in text


def test_no_target_at_all() -> None:
    assert "target_modules=[] matches no module" in refusal(Rules(()))


def test_model_without_layers() -> None:
    assert refusal(Rules(("fc",)), ["conv"], []).endswith("The model's linear layers are: none.")


def test_summarise() -> None:
    assert summarise([]) == "none"
    assert summarise(["a.q", "b.q", "c.v"]) == "q (2), v"
    assert summarise(["net.0", "net.2"]) == "net.0, net.2"  # a number alone says nothing
    assert summarise([f"layer{i}" for i in range(15)], limit=3) == "layer0, layer1, layer2, and 12 more"
