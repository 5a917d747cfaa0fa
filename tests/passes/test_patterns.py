"""Regular expressions of strangers: those that people use run here and at once, hostile ones end in time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes import patterns
from passes.errors import PatternError
from passes.patterns import Found, Patterns, fault
from passes.select import Rules, lookup, select

pytestmark = pytest.mark.usefixtures("garbage_left")

LLAMA = [
    f"model.layers.{layer}.{part}"
    for layer in range(80)
    for part in (
        "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
    )
]  # fmt: skip
VISION = [f"model.visual.blocks.{layer}.attn.{part}" for layer in range(32) for part in ("qkv", "proj")]
NAMES = ["model", "model.embed_tokens", "model.layers", *LLAMA, *VISION, "model.norm", "lm_head"]

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj)))"
)
IN_USE = [
    r".*\.(q|k|v)_proj",
    r"^(?!.*vision).*(q|v)_proj$",
    r"model\.layers\.(1[0-9]|2[0-9])\..*",
    r".*\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    r".*language_model\..*\.(q_proj|v_proj)",
    r"^(model)(?=\.).*\.(k_proj|down_proj|v_proj|up_proj|o_proj|q_proj|gate_proj)$",
    r"(?!.*(visual|lm_head)).*proj",
    r".*(self_attn|mlp).*(q|k|v|o|gate|up|down)_proj.*",
    r"model\.layers\.[0-9]+\.(self_attn|mlp)\.\w+",
    r"(?:.*\.)?layers\.(?:[0-9]|[1-3][0-9])\.[^.]+\.[a-z]+_proj",
    r"(model|h)(\.\w+)*",
    r"model.*layers.*attn.*proj",
    r"(q_proj)|(v_proj)",
    UNSLOTH,
]


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def answers(pattern: str, names: Sequence[str], *, whole: bool = True) -> list[bool]:
    return [found is not None for found in Patterns("target_modules", [pattern], whole=whole).find(names)]


# ---- what people use ----


IN_OTHER_FIELDS = {
    r"(.*\.)?({})$": ["q_proj", r".*\.gate_up_proj", r"^model\.layers\.0\..*", r"layers\.[0-9]+\.mlp\.(up|down)_proj"],
    r"(^|.*\.){}($|\..*)": ["lm_head", "embed_tokens", r"layers\.\d+\.mlp", "score|classifier"],
    r"(?:^|.*?\.){}\.(?P<idx>\d+)\.": ["layers", "h", "model.layers", "layers|h", r"\w+", "(blocks|layers)"],
}


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    ("template", "pattern"),
    [*(("{}", each) for each in IN_USE), *((key, each) for key, values in IN_OTHER_FIELDS.items() for each in values)],
)
def test_expressions_in_use_run_here_and_at_once(template: str, pattern: str) -> None:
    start = time.perf_counter()
    found = Patterns("target_modules", [pattern], template, whole=template == "{}").find(NAMES)
    assert time.perf_counter() - start < 1
    expression = re.compile(template.replace("{}", pattern))
    match = expression.fullmatch if template == "{}" else expression.match
    assert [each is not None for each in found] == [match(name) is not None for name in NAMES]


@pytest.mark.usefixtures("no_child")
def test_a_thousand_keys_run_here() -> None:
    keys = {name: rank for rank, name in enumerate(NAMES)}
    assert [lookup(keys, name, -1) for name in NAMES[-20:]] == [keys[name] for name in NAMES[-20:]]


@pytest.mark.usefixtures("no_child")
def test_thousands_of_escaped_words_are_a_set() -> None:
    names = [f"blocks.{layer}.x-{part}.proj" for layer in range(100) for part in range(300)]
    pattern = "|".join(map(re.escape, names[:20_000]))
    start = time.perf_counter()
    assert answers(pattern, names) == [True] * 20_000 + [False] * 10_000
    assert time.perf_counter() - start < 2


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.text("ab.|\\-_\n*", max_size=4), min_size=1, max_size=4),
    st.lists(st.text("ab.|\\-_\n*", max_size=5), min_size=1, max_size=5),
)
def test_words_are_what_they_match(words: list[str], names: list[str]) -> None:
    escaped = "|".join(map(re.escape, words))
    for pattern in (escaped, escaped.replace("\\", "", 1)):
        found = patterns._words(pattern)
        if found:
            assert [each in found for each in names + words] == [
                bool(re.fullmatch(pattern, each)) for each in names + words
            ]
    if not any("|" in word for word in words):
        assert patterns._words(escaped) == frozenset(words)


# ---- what is hostile ----

HOSTILE = [
    r"(a+)+$", r"(.*)*x", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.*a){25}", r"(a|a)*$", r"(a|aa)+$", r"([a-zA-Z]+)*$",
    r"(.*?,){11}P", r"(a*)*b", r"(\w+\s?)*$", r"((a+)*)+#", r"(a?){60}a{60}#", r".*.*.*.*.*.*.*.*#", r"(?=(a+)+$)a#",
    r"(a*)(a*)(a*)(a*)(a*)(a*)\1#", r"^(\w+\.?)+@", r"(?:a|[a-z]|\w)+#", r"(?i)(A+)+#",
]  # fmt: skip
LONG = ["a" * 60 + "!", "a" * 3000 + "!", ",a" * 500 + "!", "ab" * 400 + "A!"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_expressions_end_in_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the error or with a right answer: names that end in `!` are matched by none of these."""
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    start = time.perf_counter()
    try:
        assert answers(pattern, LONG) == [False] * 4
    except PatternError as error:
        assert f"target_modules: {pattern!r} takes too long" in str(error)
    assert time.perf_counter() - start < 0.1 + 5  # and the start of the child


def test_the_limit_is_one_second() -> None:
    start = time.perf_counter()
    with pytest.raises(PatternError) as caught:
        select(["a" * 60 + "!"], Rules(r"(a+)+$"))
    assert 1 <= time.perf_counter() - start < 8
    assert str(caught.value) == (
        "target_modules: '(a+)+$' takes too long: 1 name was not matched within 1 s. Repeats inside of repeats, and "
        "several that can match the same text, make `re` try very many ways: write it without them ('.*' for "
        "'(.*)*'), or list the names"
    )


FIELDS = {
    "target_modules": lambda: select(LONG, Rules(r"(a+)+$")),
    "exclude_modules": lambda: select(LONG, Rules(("q",), exclude_modules=r"(a+)+$")),
    "modules_to_save": lambda: select(LONG, Rules(("q",), modules_to_save=(r"(a+)+$",))),
    "layers_pattern": lambda: select(
        [f"{LONG[0]}.q"], Rules(("q",), layers_to_transform=(1,), layers_pattern=(r"(a+)+",))
    ),
    "rank_pattern or alpha_pattern": lambda: lookup({"q": 1, r"(a+)+": 2, "v": 3}, LONG[0], 0),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_with_expressions(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(PatternError, match=re.escape(f"{field}: '(a+)+")) as caught:
        FIELDS[field]()
    assert "takes too long" in str(caught.value)


@pytest.mark.parametrize(
    "pattern", [r"(\w+\.?)+_proj", r"(model|layers|\d+|\.)*self_attn", r"(.)(.).*\2\1.*", r"((.*)*)*"]
)
def test_the_child_gives_right_answers(pattern: str) -> None:
    names = [
        *NAMES[:3],
        "a.b.q_proj",
        "q_proj",
        "layers.0.self_attn",
        "é.q_proj",
        "\ud800.k_proj",
        "a\nq_proj",
        "abab",
        "",
    ]
    assert answers(pattern, names) == [re.fullmatch(pattern, name) is not None for name in names]
    assert answers(pattern, names, whole=False) == [re.match(pattern, name) is not None for name in names]


def test_the_child_says_which_expression_matched_first_and_its_group() -> None:
    compiled = Patterns("layers_pattern", [r"(h)\1", r"(?P<idx>(\d+)+)x", r"((\d)+)+x"], whole=True)
    assert compiled.find(["hh", "12x", "x"]) == [Found(0), Found(1, "12"), None]
    assert compiled.unmatched(["12x"]) == [r"(h)\1"]
    assert compiled.unmatched([]) == [r"(h)\1", r"(?P<idx>(\d+)+)x", r"((\d)+)+x"]


def test_answers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (runs.append(1), run(*a, **k))[1])
    compiled = Patterns("rank_pattern", [r"(a+)+b"])
    names = [*["a" * count + "b" for count in range(40)], "b"]
    expected = [name != "b" for name in names]
    assert [each is not None for each in compiled.find(names)] == expected
    assert [compiled.find([name])[0] is not None for name in names] == expected
    assert len(runs) == 1


def test_names_one_at_a_time_take_no_longer_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these names takes about a tenth of the limit."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    compiled = Patterns("rank_pattern", [r"(a+)+$"])
    start = time.perf_counter()
    with pytest.raises(PatternError, match="takes too long"):
        for count in range(200):
            compiled.find(["a" * 20 + "!" * (count + 1)])
    assert compiled._spent > 0.1
    assert time.perf_counter() - start < 8


def test_slow_but_bounded_expressions_are_stopped_between_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Patterns("target_modules", [r".*[a-z].*[a-z].*[a-z]#"], whole=True)
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    monkeypatch.setattr(patterns, "_SECONDS_PER_NAME", 0.0)
    names = ["a" * 80 + str(number) for number in range(20_000)]
    for ask in (compiled.find, compiled.unmatched):
        start = time.perf_counter()
        with pytest.raises(PatternError, match=r"takes too long: 20000 names were not matched within 0\.05 s"):
            ask(names)
        assert time.perf_counter() - start < 2


# ---- what cannot be compiled, or takes long to compile ----

UNUSABLE = {
    "(": "missing ), unterminated subpattern",
    "*a": "nothing to repeat",
    "(" * 3000 + ")" * 3000: "it is nested too deeply",
    "a{99999999999}": "the repetition number is too large",
    "a{" + "9" * 5000 + "}": "Exceeds the limit",
    r"(a*)*(?<=a+)b": "look-behind requires fixed-width pattern",
}


@pytest.mark.parametrize("pattern", UNUSABLE, ids=lambda pattern: pattern[:12])
def test_what_is_no_expression(pattern: str) -> None:
    reason = UNUSABLE[pattern]
    assert reason in (fault(pattern) or "")
    with pytest.raises(PatternError) as caught:
        Patterns("exclude_modules", [pattern])
    assert str(caught.value).startswith(f"exclude_modules: {pattern!r}"[:200])
    assert f"is no regular expression: {reason}" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_only_the_child_compiles_and_cannot() -> None:
    pattern = "(?i)" + "[\u0100-\u0200]" * 30 + "(?<=a+)b"
    with pytest.raises(PatternError, match="is no regular expression: look-behind requires fixed-width pattern"):
        Patterns("exclude_modules", [pattern]).find(["a"])


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{1000}){1000}",
        "(?:" * 50 + "a" + "{65535})" * 50,
        "(?i)" + "[\u0100-\uffff]" * 3000,
        "a" * 5000 + "b|" + "a" * 4990 + ".",
        "a" * 40_000 + "b|" + "a" * 40_000 + ".",
        "(?:a|b|" * 200 + "c" + ")" * 200,
    ],
    ids=lambda pattern: pattern[:12],
)
def test_large_expressions_end_in_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    start = time.perf_counter()
    try:
        assert fault(pattern) is None
        assert answers(pattern, ["a" * 50 + "!"]) == [False]
    except PatternError as error:
        assert "takes too long" in str(error) and len(str(error)) < 1000
    assert time.perf_counter() - start < 5


def test_too_long() -> None:
    pattern = "a" * 100_000 + "+"
    assert fault(pattern) == "it has more than 100000 characters"
    with pytest.raises(
        PatternError, match="has more than 100000 characters, which is too long; list the names instead"
    ):
        Patterns("exclude_modules", [pattern], whole=True)
    assert fault("|".join(["model\\.q"] * 20_000)) is None  # words may be as many as there are modules


def test_no_child_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(PatternError, match=r"'\(a\+\)\+' cannot be matched safely: no child process .*/no/such/python"):
        answers("(a+)+", ["b"])


def test_the_child_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_CHILD", "raise SystemExit('out of memory')")
    with pytest.raises(PatternError, match=r"the child process failed \(out of memory"):
        answers("(a+)+", ["b"])


def test_the_child_process_does_not_start_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(patterns, "_START_SECONDS", 0.2)
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(PatternError, match="takes too long"):
        answers("(a+)+", ["b"])


def test_nothing_asked() -> None:
    assert Patterns("modules_to_save", []).find(["a"]) == [None]
    assert Patterns("modules_to_save", ["(a+)+"]).find([]) == []
    assert Patterns("modules_to_save", []).unmatched(["a"]) == []
