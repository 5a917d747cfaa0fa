"""Any sequence of lifecycle calls leaves the model as a simple reference model says: a state machine of Hypothesis.

After every call the outputs equal those of the reference in float64, the lists of adapters and the trained parameters
are the same, base weights have their original bits where nothing is merged, and `verify` has nothing to say.

Mixed batches are compared row by row, and in slots every rule goes on: only what the model computes with changes.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import fxlora
from fxlora import AdapterError, LoraConfig, lora_transform
from tests.lifecycle_reference import IDS, SITES, Adapter, Net, Reference, loss

CAPTURES = ("symbolic", "export", "modules")
EXAMPLES = 170
"""Sequences for each capture."""

NAMES = ("default", "lora", "b", "weight")
FILE_PARTS = {"A": "lora_A.{}.weight", "B": "lora_B.{}.weight", "m": "lora_magnitude_vector.{}.weight"}
EMBEDDING_PARTS = {"A": "lora_embedding_A.{}.weight", "B": "lora_embedding_B.{}.weight"}

which = st.integers(0, len(NAMES) - 1)
"""An adapter, by its place among those that there are."""
several = st.tuples(st.permutations(range(len(NAMES))), st.sampled_from([1, 2, 2, 3, 0])).map(
    lambda pair: pair[0][: pair[1]]
)
some_or_active = st.none() | several
factors = st.sampled_from([-1.5, 0.0, 0.5, 1.0, 3.0])
configs = st.builds(
    dict,
    target_modules=st.lists(st.sampled_from(SITES), min_size=1, max_size=4, unique=True),
    r=st.integers(1, 3),
    lora_alpha=st.sampled_from([1, 2, 5]),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
    lora_dropout=st.sampled_from([0.0, 0.5]),
)


@functools.cache
def transformed(capture: Any) -> bytes:
    """A model with the adapter `default`, pickled: capturing takes longer than a whole sequence."""
    torch.manual_seed(0)
    model = Net().double()
    config = LoraConfig(r=2, target_modules=["fc1", "emb"])
    return pickle.dumps(lora_transform(model, config, capture=capture, example_inputs=IDS))


class LifecycleMachine(RuleBasedStateMachine):
    """Every call is made of the model and of the reference; a call that must fail is checked to change nothing."""

    capture: ClassVar[str]

    @initialize(seed=st.integers(0, 100), more=st.lists(configs, min_size=1, max_size=3), chosen=several)
    def transform(self, seed: int, more: list[dict[str, Any]], chosen: list[int]) -> None:
        self.model: Any = pickle.loads(transformed(self.capture))
        self.generator = torch.Generator().manual_seed(seed)
        state = self.model.state_dict()
        base = {name: tensor.clone() for name, tensor in state.items() if "lora_" not in name}
        self.reference = Reference(base)
        self.dropouts: set[str] = set()
        self.in_slots = False
        self.note("default", LoraConfig(r=2, target_modules=["fc1", "emb"]))
        self.reference.active = ("default",)
        self.reference.adapters["default"].trained = True
        for config in more:
            self.add_adapter(config)
        if chosen:
            self.set_adapter(chosen, False)

    # ---- adapters come and go ----

    @rule(config=configs)
    def add_adapter(self, config: dict[str, Any]) -> None:
        name = self.free()
        if name is not None:
            self.model.add_adapter(name, LoraConfig(**config))
            self.note(name, LoraConfig(**config))

    @rule(chosen=several, inference_mode=st.booleans())
    def set_adapter(self, chosen: list[int], inference_mode: bool) -> None:
        names = self.named(chosen)
        self.model.set_adapter(names[0] if len(names) == 1 else names, inference_mode)
        self.reference.set_adapter(names, trained=not inference_mode)

    @rule(one=which)
    def delete_adapter(self, one: int) -> None:
        for name in self.named([one]):
            if name in self.reference.merged:
                self.refused(partial(self.model.delete_adapter, name), "merged; call unmerge_adapter")
            else:
                self.model.delete_adapter(name)
                self.reference.delete(name)
                self.in_slots = self.in_slots and bool(self.reference.adapters)
                self.dropouts.discard(name)

    @rule(one=which, trained=st.booleans())
    def save_and_load(self, one: int, trained: bool) -> None:
        new = self.free()
        for name in self.named([one]) if new else ():
            with tempfile.TemporaryDirectory() as directory:
                self.model.save_pretrained(directory, selected_adapters=[name])
                path = Path(directory) / ("" if name == "default" else name)
                self.refused(partial(self.model.load_adapter, path, name), "already exists; hotswap_adapter")
                assert self.model.load_adapter(path, new, is_trainable=trained) == ((), (), ())
            old = self.reference.adapters[name]
            loaded = Adapter(old.sites, old.r, old.alpha, old.rslora, old.dora, trained=trained)
            loaded.factors = {
                site: {k: t.detach().clone() for k, t in parts.items()} for site, parts in old.factors.items()
            }
            self.reference.adapters[new] = loaded
            self.dropouts |= {new} if name in self.dropouts else set()

    @rule(call=st.sampled_from(range(9)))
    def unknown_adapter(self, call: int) -> None:
        model, known = self.model, list(self.reference.adapters)
        calls = (
            lambda: model.set_adapter([*known, "nope"]), lambda: model.delete_adapter("nope"),
            lambda: model.merge_adapter([*known, "nope"]), lambda: model.merge_and_unload(adapter_names=["nope"]),
            lambda: model.set_scale("nope", 2.0), lambda: model.scale_adapter(2.0, [*known, "nope"]),
            lambda: model.unscale_adapter(None, [*known, "nope"]), lambda: model.set_requires_grad([*known, "nope"]),
            lambda: model.save_pretrained("never", selected_adapters=[*known, "nope"]),
        )  # fmt: skip
        self.refused(calls[call], "no adapter is called 'nope'")

    # ---- on and off ----

    @rule(enabled=st.sampled_from([True, True, False]))
    def switch(self, enabled: bool) -> None:
        if enabled:
            self.model.enable_adapter_layers()
        else:
            self.model.disable_adapter_layers()
            self.reference.merged = ()
        self.reference.enabled = enabled

    @rule(
        inside=st.sampled_from(["nothing", "set", "delete", "delete", "enable", "error"]),
        one=which,
        merge=st.booleans(),
    )
    def disable_adapter(self, inside: str, one: int, merge: bool) -> None:
        if merge:
            self.merge_one_that_is_not_active(one)
        reference = self.reference
        enabled, merged, active = reference.enabled, reference.merged, reference.active
        try:
            with self.model.disable_adapter():
                reference.enabled, reference.merged = False, ()
                self.agrees()
                if inside == "set":
                    self.set_adapter([one], False)
                elif inside == "delete":
                    idle = [name for name in merged if name not in active]  # else the merge ends with the choice
                    self.delete_adapter(list(reference.adapters).index(idle[0]) if idle else one)
                elif inside == "enable":
                    self.switch(True)
                    self.agrees()
                elif inside == "error":
                    raise KeyError(one)
        except KeyError:
            assert inside == "error"
        reference.enabled = enabled
        if reference.active == active:
            reference.merged = tuple(each for each in merged if each in reference.adapters)

    # ---- several adapters in one graph ----

    @rule(rows=st.tuples(st.integers(-1, 3), st.integers(-1, 3)))
    def mixed_batch(self, rows: tuple[int, int]) -> None:
        names = ["__base__" if not self.named([row]) or row < 0 else self.named([row])[0] for row in rows]
        if self.reference.merged:
            return self.refused(lambda: self.model(IDS, adapter_names=names), "merged.*unmerge_adapter")
        training = self.model.training
        self.model.train(training and not self.dropouts)
        found = self.model(IDS, adapter_names=names)
        self.model.train(training)
        own = [self.reference.output([] if name == "__base__" else [name])[row] for row, name in enumerate(names)]
        torch.testing.assert_close(found, torch.stack(own), rtol=1e-9, atol=1e-9)
        return None

    @rule(on=st.booleans())
    def slots(self, on: bool) -> None:
        if not on:
            self.model.leave_slots()
            self.in_slots = False
            return None
        if not self.in_slots:
            self.model.train()
            self.refused(self.model.use_slots, "call eval")
        self.model.eval()
        if self.reference.merged or not self.reference.adapters:
            return None if self.in_slots else self.refused(self.model.use_slots, "unmerge_adapter|no adapter")
        self.model.use_slots()
        self.in_slots = True
        return None

    @rule(one=which, factor=factors)
    def set_scale(self, one: int, factor: float) -> None:
        for name in self.named([one]):
            self.scaled([name], partial(self.model.set_scale, name, factor), lambda each: factor * each.configured)

    @rule(chosen=some_or_active, factor=factors)
    def scale(self, chosen: list[int] | None, factor: float) -> None:
        names = self.named_or_active(chosen)
        self.scaled(
            names, lambda: self.model.scale_adapter(factor, self.given(chosen)), lambda each: factor * each.scale
        )

    @rule(chosen=some_or_active, factor=st.none() | factors)
    def unscale(self, chosen: list[int] | None, factor: float | None) -> None:
        if factor == 0:
            return self.refused(lambda: self.model.unscale_adapter(0, self.given(chosen)), "divide by zero")
        new = (lambda each: each.configured) if factor is None else (lambda each: each.scale / factor)
        return self.scaled(
            self.named_or_active(chosen), lambda: self.model.unscale_adapter(factor, self.given(chosen)), new
        )

    def scaled(self, names: list[str], call: Callable[[], None], new: Callable[[Adapter], float]) -> None:
        if set(names) & set(self.reference.merged):
            return self.refused(call, "merged; call unmerge_adapter")
        call()
        for name in names:
            self.reference.adapters[name].scale = new(self.reference.adapters[name])

    @rule(multiplier=factors, merge=st.booleans())
    def rescale(self, multiplier: float, merge: bool) -> None:
        reference = self.reference
        context = fxlora.rescale_adapter_scale(self.model, multiplier)
        if reference.merged or not reference.adapters:
            return self.refused(context.__enter__, "merged|no adapter")
        before = {name: adapter.scale for name, adapter in reference.adapters.items()}
        with context:
            for adapter in reference.adapters.values():
                adapter.scale *= multiplier
            self.agrees()
            if merge:
                self.merge_adapter(None)
                self.agrees()
        for name, scale in before.items():
            reference.adapters[name].scale = scale

    # ---- merging ----

    @rule(chosen=some_or_active)
    def merge_adapter(self, chosen: list[int] | None) -> None:
        if not self.reference.enabled:
            return self.refused(lambda: self.model.merge_adapter(self.given(chosen)), "disabled")
        names = self.named_or_active(chosen)
        self.model.merge_adapter(self.given(chosen))
        self.reference.merged = tuple(dict.fromkeys([*self.reference.merged, *names]))

    @rule(one=which)
    def merge_one_of_the_active(self, one: int) -> None:
        names, active = list(self.reference.adapters), self.reference.active
        if active:
            self.merge_adapter([names.index(active[one % len(active)])])

    @rule(one=which)
    def merge_one_that_is_not_active(self, one: int) -> None:
        names = list(self.reference.adapters)
        idle = [name for name in names if name not in self.reference.active]
        if idle:
            self.merge_adapter([names.index(idle[one % len(idle)])])

    @rule()
    def unmerge_adapter(self) -> None:
        self.model.unmerge_adapter()
        self.reference.merged = ()

    @rule(merge=st.booleans(), chosen=some_or_active)
    def take_off(self, merge: bool, chosen: list[int] | None) -> None:
        """Of a copy, so that the sequence goes on."""
        copied, reference, names = copy.deepcopy(self.model), copy.deepcopy(self.reference), self.given(chosen)
        if not reference.enabled:
            return self.refused(lambda: self.model.merge_and_unload(adapter_names=names), "disabled")
        if merge:
            added = [*reference.merged, *self.named_or_active(chosen)]
            reference.merged, reference.active = tuple(dict.fromkeys(added)), ()
        else:
            reference.merged, reference.active = (), ()
        plain = copied.merge_and_unload(adapter_names=names) if merge else copied.unload()
        assert list(plain.state_dict()) == list(Net().state_dict())
        torch.testing.assert_close(plain(IDS), reference.output(), rtol=1e-9, atol=1e-9)
        if not merge:
            assert all(torch.equal(tensor, reference.base[name]) for name, tensor in plain.state_dict().items())
        return None

    # ---- training ----

    @rule(chosen=several, flag=st.booleans())
    def set_requires_grad(self, chosen: list[int], flag: bool) -> None:
        names = self.named(chosen)
        self.model.set_requires_grad(names[0] if len(names) == 1 else names, flag)
        for name in names:
            self.reference.adapters[name].trained = flag

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        if training and self.in_slots:
            return self.refused(self.model.train, "leave_slots")
        self.model.train(training)
        return None

    @rule()
    def step(self) -> None:
        merged = {name: self.reference.adapters[name] for name in self.reference.merged}
        if self.in_slots or any(adapter.trained for adapter in merged.values()):
            return  # slots are not trained; the weights keep what was merged, and the reference has no memory of it
        parameters = {key: self.parameter(*key) for key in self.parts()}
        output = self.output()
        gradients = self.reference.step(0.01)
        used = any(gradient is not None for gradient in gradients.values())
        assert output.requires_grad == used
        if used:
            loss(output).backward()
        for key, parameter in parameters.items():
            expected = gradients.get(key)
            if expected is None:
                assert parameter.grad is None or not parameter.grad.any()
            else:
                torch.testing.assert_close(parameter.grad, expected.view_as(parameter), rtol=1e-9, atol=1e-9)
                parameter.data.sub_(0.01 * parameter.grad)
            parameter.grad = None

    # ---- copies ----

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copied(self, how: Callable[[Any], Any]) -> None:
        self.model = how(self.model)

    # ---- what holds after every call ----

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        model, reference = self.model, self.reference
        assert list(model.peft_config) == list(reference.adapters)
        assert tuple(model.active_adapters) == reference.active
        assert (model._lora.enabled, model._lora.merged) == (reference.enabled, reference.merged)
        torch.testing.assert_close(self.output(), reference.output(), rtol=1e-9, atol=1e-9)
        state = model.state_dict()
        assert [name for name in state if "lora_" not in name] == list(reference.base)
        for name, expected in reference.weights().items():
            if reference.merged:
                torch.testing.assert_close(state[name], expected, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(state[name], expected)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {self.path(*key) for key in self.parts() if reference.adapters[key[0]].trained}
        for name, site, part in self.parts():
            expected = reference.adapters[name].factors[site][part]
            torch.testing.assert_close(
                self.parameter(name, site, part).view_as(expected), expected, rtol=1e-9, atol=1e-9
            )
        model.verify()

    # ---- helpers ----

    def note(self, name: str, config: LoraConfig) -> None:
        """Give a new adapter factors that have an effect, and the reference the same."""
        sites = tuple(site for site in SITES if site in (config.target_modules or ()))
        adapter = Adapter(sites, config.r, config.lora_alpha, config.use_rslora, config.use_dora)
        self.reference.adapters[name] = adapter
        for site in sites:
            adapter.factors[site] = {}
            for part in ("A", "B", *("m" for _ in range(config.use_dora))):
                adapter.factors[site][part] = self.parameter(name, site, part).detach().clone()
            weight = self.reference.base[f"{site}.weight"]
            fresh = adapter.delta(site, weight)
            torch.testing.assert_close(fresh, torch.zeros_like(weight), rtol=0, atol=1e-12)
            for part, tensor in adapter.factors[site].items():
                tensor += 0.5 * torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
                self.parameter(name, site, part).data.copy_(tensor)
        self.model.refresh_slots()
        if config.lora_dropout:
            self.dropouts.add(name)

    def path(self, name: str, site: str, part: str) -> str:
        parts = FILE_PARTS | EMBEDDING_PARTS if site == "emb" else FILE_PARTS
        return f"{site}.{parts[part].format(name)}"

    def parameter(self, name: str, site: str, part: str) -> torch.nn.Parameter:
        return self.model.get_parameter(self.path(name, site, part))

    def parts(self) -> list[tuple[str, str, str]]:
        adapters = self.reference.adapters.items()
        return [(name, site, part) for name, each in adapters for site in each.sites for part in each.factors[site]]

    def free(self) -> str | None:
        return next((name for name in NAMES if name not in self.reference.adapters), None)

    def named(self, chosen: list[int]) -> list[str]:
        """The adapters at these places, counted round; none if there is none."""
        names = list(self.reference.adapters)
        return list(dict.fromkeys(names[index % len(names)] for index in chosen if names))

    def given(self, chosen: list[int] | None) -> list[str] | None:
        return None if chosen is None else self.named(chosen)

    def named_or_active(self, chosen: list[int] | None) -> list[str]:
        return list(self.reference.active) if chosen is None else self.named(chosen)

    def output(self) -> torch.Tensor:
        """The model's output; in evaluation where dropout would make it random."""
        training = self.model.training
        self.model.train(training and not self.dropouts)
        output = self.model(IDS)
        self.model.train(training)
        return output

    def refused(self, call: Callable[[], object], words: str) -> None:
        """The invariant checks that nothing was changed."""
        with pytest.raises(AdapterError, match=words):
            call()


def machine(capture_name: str) -> type[Any]:
    class Machine(LifecycleMachine):
        capture = capture_name

    Machine.TestCase.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    return Machine.TestCase


TestSymbolic = machine("symbolic")
TestExport = machine("export")
TestModules = machine("modules")
