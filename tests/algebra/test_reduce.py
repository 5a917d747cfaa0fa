"""Rank reduction: the best approximation, and a report that says what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlora import AdapterError, LoraConfig, lora_transform
from fxlora._passes import KINDS
from fxlora.algebra.lowrank import SVD, product_norm
from tests.algebra.nets import IDS, LAYERS, net, randomise, relative, update_of
from tests.algebra.test_laws import Zoo, sites, zoo
from tests.host.tied import EMBEDDING, HEAD, base, ours, quiet
from tests.host.tied import randomise as randomise_trained


def as_matrices(model: Any, adapter: str, site: str) -> torch.Tensor:
    spec = next(s for s in model._lora.adapters[adapter].branches if s.site == site)
    return KINDS[spec.kind].as_matrices(spec.layer, "weight", update_of(model, adapter, site))


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_report_is_what_is_measured(r: int) -> None:
    model = zoo({"a": 4}, use_rslora=True)
    report = model.reduce_rank("a", r, "small")
    assert [each.site for each in report.sites] == sites(model, "a") == sites(model, "small")
    for each in report.sites:
        before, after = update_of(model, "a", each.site), update_of(model, "small", each.site)
        assert each.norm == pytest.approx(float(before.norm()), rel=1e-12)
        assert each.error == pytest.approx(float((before - after).norm()), rel=1e-9, abs=1e-13)
        assert each.kept_energy == pytest.approx(float(after.norm() / before.norm()) ** 2, rel=1e-9)
        singular = torch.linalg.svdvals(as_matrices(model, "a", each.site))
        assert each.error == pytest.approx(float(singular[..., each.rank :].norm()), rel=1e-9, abs=1e-13)  # the best
        assert (each.rank, each.rank_before) == (min(r, singular.shape[-1]), 4)
    total = report.total
    assert total.error == pytest.approx(sum(each.error**2 for each in report.sites) ** 0.5)
    assert model.peft_config["small"].r == r and "small" in str(report)
    assert report.to_dict()["total"]["error"] == total.error
    model.verify()


def test_in_float32_the_rounding_is_in_the_report() -> None:
    model: Any = lora_transform(net(), LoraConfig(r=3, target_modules=LAYERS))
    randomise(model)
    report = model.reduce_rank("default", 3)
    for each in report.sites:
        difference = update_of(model, "default", each.site) - update_of(model, "default_reduced", each.site)
        assert each.error == pytest.approx(float(difference.norm()), rel=1e-6)
        assert 0 < each.relative_error < 1e-6


@settings(max_examples=15, deadline=None)
@given(max_error=st.floats(0, 0.95), limit=st.none() | st.integers(1, 4))
def test_ranks_by_error(max_error: float, limit: int | None) -> None:
    model = zoo({"a": 4})
    report = model.reduce_rank("a", limit, "small", max_error=max_error)
    for each in report.sites:
        singular = torch.linalg.svdvals(as_matrices(model, "a", each.site))
        norms = [float(singular[..., rank:].norm() / singular.norm()) for rank in range(singular.shape[-1] + 1)]
        most = min(4 if limit is None else limit, singular.shape[-1])
        alone = next(rank for rank in range(1, most + 1) if norms[rank] <= max_error + 1e-12 or rank == most)
        assert each.rank >= alone
        if "attention" not in each.site and "lstm" not in each.site:
            assert each.rank == alone  # the weights of one compound module have one rank, that of the largest
        assert limit is not None or each.relative_error <= max_error + 1e-9
    ranks = {spec.site: spec.r for spec in model._lora.adapters["small"].branches}
    fresh = lora_transform(Zoo().double(), model.peft_config["small"], capture="modules")
    assert {spec.site: spec.r for spec in fresh._specs()} == ranks


def test_files(tmp_path: Path) -> None:
    model: Any = lora_transform(net(), LoraConfig(r=4, target_modules=LAYERS))
    randomise(model)
    model.reduce_rank("default", max_error=0.4)
    assert len({spec.r for spec in model._lora.adapters["default_reduced"].branches}) > 1
    model.save_pretrained(tmp_path, selected_adapters=["default_reduced"])
    with quiet():
        theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "default_reduced")).eval()
    model.set_adapter("default_reduced")
    torch.testing.assert_close(model.eval()(IDS), theirs(IDS))


def test_dora_becomes_plain() -> None:
    model: Any = lora_transform(net(), LoraConfig(r=2, target_modules=["linear", "conv"], use_dora=True))
    randomise(model)
    for r in (3, 12):
        report = model.reduce_rank("default", r, f"plain{r}")
        for each in report.sites:
            change = update_of(model, "default", each.site)
            error = float((change - update_of(model, f"plain{r}", each.site)).norm())
            assert each.error == pytest.approx(error, rel=1e-6)
            if r == 12:
                assert relative(update_of(model, "plain12", each.site), change) < 1e-6
    assert not model.peft_config["plain3"].use_dora


def test_tied_factors_are_reduced_once() -> None:
    model: Any = ours(base(), r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    randomise_trained(model)
    report = model.reduce_rank("default", 2)
    assert [each.site for each in report.sites] == [EMBEDDING]
    assert torch.equal(update_of(model, "default_reduced", HEAD), update_of(model, "default_reduced", EMBEDDING))


def test_nothing_to_reduce() -> None:
    model: Any = ours(base(), target_modules=[], trainable_token_indices=[1])
    with pytest.raises(AdapterError, match="has no factors whose rank could be reduced"):
        model.reduce_rank("default", 1)
    zero: Any = lora_transform(net(), LoraConfig(r=3, target_modules=["linear"]))
    report = zero.reduce_rank("default", max_error=0.1)
    assert [(each.rank, each.norm, each.relative_error) for each in report.sites] == [(1, 0.0, 0.0)]


@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 9)] * 3), stack=st.sampled_from([(), (3,)]), seed=st.integers(0, 99))
def test_decompositions_from_factors(sizes: tuple[int, int, int], stack: tuple[int, ...], seed: int) -> None:
    rows, q, columns = sizes
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*stack, q, columns, dtype=torch.float64, generator=generator)
    B = torch.randn(*stack, rows, q, dtype=torch.float64, generator=generator)
    svd = SVD.of_product(A, B)
    whole = svd.factors(q)
    torch.testing.assert_close(whole[1] @ whole[0], B @ A, rtol=1e-10, atol=1e-12)
    singular = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(svd.S, singular[..., : svd.S.shape[-1]], rtol=1e-10, atol=1e-12)
    assert product_norm(A, B) == pytest.approx(float((B @ A).norm()), rel=1e-12)
