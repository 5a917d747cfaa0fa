"""Selection: tables by hand and messages that help; `tests/oracle/test_selection.py` has peft itself as the oracle."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.errors import NoTargetError
from passes.select import (
    Rules,
    Unused,
    check_targets,
    decide,
    layer_index,
    lookup,
    minimal_targets,
    select,
    select_parameters,
    summarise,
    unused,
)

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
        ("layers.1.q_proj", ("h|layers",), 1),
        (
            "model.layers.1.q_proj",
            ("layers|h",),
            None,
        ),  # the alternative is "a name that begins with layers", as in peft
        ("model.layers.1.q_proj", (r"\w+",), 1),
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


# ---- which target decided ----


@pytest.mark.parametrize(
    ("targets", "name", "rule"),
    [
        (("proj", "attn.proj", "h.attn.proj"), "model.h.attn.proj", "proj"),  # the first in the list
        (("h.attn.proj", "proj", "attn.proj"), "model.h.attn.proj", "h.attn.proj"),
        (("proj", "model.h.attn.proj"), "model.h.attn.proj", "model.h.attn.proj"),  # the whole name before any suffix
        (("proj", "proj"), "a.proj", "proj"),
        (("",), "a.", ""),
        (("", "x"), "a", None),
        ((".proj",), "a.proj", None),
        ((".proj",), "a..proj", ".proj"),
    ],
)
def test_the_rule_that_is_named(targets: tuple[str, ...], name: str, rule: str | None) -> None:
    assert decide(name, Rules(targets)).rule == rule


def test_exclude_modules_is_named_before_modules_to_save() -> None:
    rules = Rules(("v_proj",), exclude_modules=("self_attn.v_proj",), modules_to_save=("self_attn",))
    assert decide("model.layers.0.self_attn.v_proj", rules).rule == "self_attn.v_proj"
    assert decide("model.layers.0.self_attn.q_proj", rules).rule == "self_attn"


words = st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=5).map(".".join)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(names=st.lists(words, min_size=1, max_size=8), targets=st.lists(words, max_size=6))
def test_rules_are_those_of_a_scan_of_the_list(names: list[str], targets: list[str]) -> None:
    for decision in select(names, Rules(tuple(targets))):
        name = decision.name
        scan = next((target for target in targets if name.endswith(f".{target}")), None)
        assert decision.rule == (name if name in targets else scan)


@pytest.mark.usefixtures("garbage_left")
def test_a_hundred_thousand_names() -> None:
    """Half a second on a quiet machine; on any, time grows with the number of names and not with that of pairs."""
    names = [
        f"model.layers.{i // 1000}.mlp.experts.{i % 1000 // 2}.{'up' if i % 2 else 'down'}_proj" for i in range(100_000)
    ]
    rules = Rules(
        (*(f"part_{i}" for i in range(19)), "up_proj"), exclude_modules=("lm_head",), layers_to_transform=(7,)
    )
    seconds: list[float] = []
    for count in (10_000, 100_000):
        start = time.process_time()
        decisions = select(names[:count], rules)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 40 * seconds[0]
    assert sum(decision.matched for decision in decisions) == 500


@pytest.mark.usefixtures("garbage_left")
def test_a_name_of_nothing_but_dots() -> None:
    start = time.process_time()
    assert not decide("." * 200_000, Rules(("q_proj",))).matched
    assert time.process_time() - start < 1


# ---- parameters ----


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], []),
        (["w"], ["b.w", "a.w", "w"]),  # in the order of the model
        (["a.w", "b.w"], ["b.w", "a.w"]),
        (["x.w"], []),
        (["experts.up", "w"], ["b.w", "a.w", "w", "m.experts.up"]),
        (["up", "experts.up"], ["m.experts.up", "m.gate.up"]),
        ([".*up"], []),
    ],
)
def test_select_parameters(targets: list[str], expected: list[str]) -> None:
    assert select_parameters(["b.w", "a.w", "w", "m.experts.up", "m.gate.up"], targets) == expected


# ---- names to write ----


@pytest.mark.parametrize(
    ("wanted", "others", "expected"),
    [
        (["m.0.q", "m.1.q"], ["m.0.v"], ["q"]),
        (["m.0.q", "m.1.q"], ["n.0.q"], ["1.q", "m.0.q"]),
        (["m.attn.q", "m.attn.v"], ["m.mlp.q"], ["attn.q", "v"]),
        (["q", "m.q"], [], ["q"]),
        (["q"], ["m.q"], ["q"]),
    ],
)
def test_minimal_targets(wanted: list[str], others: list[str], expected: list[str]) -> None:
    assert minimal_targets(wanted, others) == expected


def test_minimal_targets_names_what_is_on_both_sides() -> None:
    with pytest.raises(ValueError, match="'b' is among the wanted names and among the others"):
        minimal_targets(["a", "b", "c"], ["c", "b"])


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


# ---- what is unused ----


def findings(rules: Rules, rank: tuple[str, ...] = (), alpha: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    return {
        each.field: each.entries for each in unused(select(NAMES, rules), rules, rank_pattern=rank, alpha_pattern=alpha)
    }


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(("v_proj", "lm_head")), {}),
        (Rules(("v_proj", "xx", "lm_head", "yy")), {"target_modules": ("xx", "yy")}),
        (Rules(r".*z"), {"target_modules": (".*z",)}),
        (Rules(("v_proj",), exclude_modules=("lm_head", "model.layers.1.self_attn.v_proj")), {}),
        (Rules(("v_proj",), exclude_modules=("v_pro", "lm_head", "_head")), {"exclude_modules": ("v_pro", "_head")}),
        (Rules(("v_proj",), exclude_modules=".*v_proj"), {}),
        (Rules(("v_proj",), exclude_modules="v_proj"), {"exclude_modules": ("v_proj",)}),
        (Rules(("v_proj",), modules_to_save=("lm_head", "score")), {"modules_to_save": ("score",)}),
        (Rules(("v_proj",), modules_to_save=("head",)), {}),  # peft finds lm_head
        (Rules(("v_proj",), layers_to_transform=(0, 2)), {}),
        (Rules(("v_proj",), layers_to_transform=(0, 3, 9)), {"layers_to_transform": ("3", "9")}),
        (Rules(("v_proj",), layers_to_transform=(0,), layers_pattern=("h",)), {"layers_to_transform": ("0",)}),
        (Rules(("model.layers.0.mlp.up_proj",), layers_to_transform=(0,)), {"layers_to_transform": ("0",)}),
        (Rules(r".*v_proj", layers_to_transform=(9,)), {}),
    ],
    ids=str,
)
def test_unused(rules: Rules, expected: dict[str, tuple[str, ...]]) -> None:
    assert findings(rules) == expected


def test_unused_keys() -> None:
    rules = Rules(("v_proj", "lm_head"))
    used = ("v_proj", "^lm_head", r"layers\.[01]\..*", "model.layers.2.self_attn.v_proj")  # the last is never the first
    assert findings(rules, used, used) == {}
    assert findings(rules, (*used, "q_proj", "^v_proj"), ("up_proj", "v_proj")) == {
        "rank_pattern": ("q_proj", "^v_proj"), "alpha_pattern": ("up_proj",),
    }  # fmt: skip


def test_unused_keys_of_parameters() -> None:
    """Parameters get branches too; and a key that matches nothing as an expression may be a name itself."""
    found = unused(
        [],
        Rules((), exclude_modules=("x",)),
        rank_pattern=["experts.up", "conv(1)"],
        targets=["m.experts.up", "conv(1)"],
    )
    assert found == []


def test_messages_of_the_unused() -> None:
    rules = Rules(
        ("v_proj",), exclude_modules=("v_porj",), modules_to_save=("lm_haed",), layers_to_transform=(1, 33),
    )  # fmt: skip
    found = unused(select(NAMES, rules), rules, rank_pattern=["v_prj", *(f"xx{i}" for i in range(9))])
    assert [each.message for each in found] == [
        "exclude_modules: no module is matched by 'v_porj'. Did you mean 'v_proj' or 'q_proj' or 'up_proj'?",
        "modules_to_save: no module is matched by 'lm_haed'. Did you mean 'lm_head'?",
        "layers_to_transform: no target lies in layer 33. Did you mean 0 or 1 or 2?",
        (
            "rank_pattern: no target is matched by 'v_prj' or 'xx0' or 'xx1' or 'xx2' or 'xx3' (and 5 more). "
            "Did you mean 'v_proj'?"
        ),
    ]
    assert [each.is_error for each in found] == [False, True, False, False]
    assert Unused("target_modules", ("x" * 1000,)).is_error
    assert len(Unused("target_modules", ("x" * 1000,)).message) < 300
