"""`LoraModel`: what a user does with adapters, the same for every capture.

A subclass knows how its graphs are run: it implements `regions`, `_rewrite` (put the branches of some adapters into the
graphs) and `_strip` (give the plain model back). Method names and behaviour are those of peft's `PeftModel`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from fxlora import scaling
from fxlora._passes import (
    CallSite,
    Instance,
    Loss,
    MergeBranches,
    MergeError,
    Mode,
    Region,
    SavedModule,
    Stage,
    Tied,
    Verify,
    WeightNorm,
    base_weight,
    check_not_shared,
    did_you_mean,
    foldable,
    has_factors,
    parameter_at,
    print_graph,
    resolve,
    token_ids,
    variant_leaves,
)
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError, ConfigError
from fxlora.factors import Drawn, Factors, draw
from fxlora.host.biases import check_one_with_biases, install_biases, set_biases
from fxlora.host.saved_modules import check_copies, put_in_place, running_copies, set_untied
from fxlora.host.untying import check_tied, has_parted_ties, weights_of_their_own
from fxlora.naming import LoadResult, check_adapter_name, check_device, names_of
from fxlora.plan import Plan
from fxlora.progress import progress
from fxlora.registered import attach, detach, factor_names, trainable_names
from fxlora.rounding import RoundingReport
from fxlora.serving import check_in_slots
from fxlora.several import SeveralAdapters
from fxlora.state import ChangedBase

if TYPE_CHECKING:
    from torch import fx

    from fxlora.algebra.prune import MajoritySign
    from fxlora.algebra.reduce import RankReport
    from fxlora.inspect.trace import PassTrace
    from fxlora.status import LayerStatus, ModelStatus

log = logging.getLogger("fxlora")

_BIASES_STAY = "biases of the base were trained, and keep their trained values while adapters are disabled"


class LoraModel(SeveralAdapters):
    """A model with LoRA adapters. Made by `lora_transform`, not by calling this class."""

    # ---- what a capture implements ----

    def regions(self) -> list[Region]:
        """The graphs that run now, with the modules that run them."""
        raise NotImplementedError

    def lowered_regions(self) -> list[Region]:
        """The graphs of which `fxlora.optimize` makes the code that runs: copies of `regions()` with operators for branches.

        They are made anew at each call. `fxlora.diff` takes them beside the others.
        """
        raise NotImplementedError

    def _strip(self) -> nn.Module:
        """The model without LoRA, once no adapter is left."""
        raise NotImplementedError

    def _place(self, plan: Plan) -> Plan:
        """The plan with each branch where it can be run: in an output, or in a weight that is read and not called."""
        raise NotImplementedError

    def _forwards(self) -> list[Callable[..., Any] | None]:
        """The generated function of each region; None where a class runs its own forward."""
        raise NotImplementedError

    def _sites_graph(self) -> fx.Graph:
        """The graph in which a merge looks for other uses of a weight."""
        return self.regions()[0].graph

    # ---- reading ----

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configuration of each adapter, by name."""
        return {name: plan.config for name, plan in self._lora.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use."""
        return list(self._lora.active)

    @property
    def active_adapter(self) -> str:
        """Name of the adapter in use, the first if there are several."""
        if not self._lora.active:
            raise AdapterError("no adapter is active; choose one with set_adapter")
        return self._lora.active[0]

    @property
    def capture(self) -> str:
        """How the graphs were captured: `symbolic`, `export` or `modules`."""
        return self._lora.capture

    @property
    def pass_trace(self) -> PassTrace:
        """Every pass that has run on this model's graphs, with copies of these, if `trace_passes=True` asked for them.

        Raises:
            AdapterError: when passes are not traced.
        """
        from fxlora.inspect.trace import PassTrace

        if not self._lora.traced:
            raise AdapterError("passes are not traced; transform the model with lora_transform(..., trace_passes=True)")
        return PassTrace(tuple(self._lora.transient.trace), self)

    def _note(self, stages: Sequence[Stage], *, more: bool = False) -> None:
        """Keep what a pipeline run did; their graphs only in the trace, if there is one."""
        state = self._lora
        if state.traced:
            state.transient.trace += stages
        plain = [replace(stage, before=None, after=None) for stage in stages]
        state.stages = [*state.stages, *plain] if more else plain

    def print_graph(self) -> str:
        """The graphs that run now as text, inserted nodes marked with `+`; for templates, which layers run them."""
        parts: list[str] = []
        for region in self.regions():
            names = [instance.name for instance in region.instances]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts += [f"# {names[0]}{more}"] if names[0] else []
            parts.append(print_graph(region.graph))
        return "\n".join(parts)

    def print_readable(self, print_output: bool = True) -> str:
        """The generated code that runs now, with a comment that names the site above each inserted line.

        Args:
            print_output: whether to print it, beside returning it.
        """
        from fxlora.inspect.code import generated_code

        text = "\n\n".join(part.text for part in generated_code(self))
        if print_output:
            print(text)
        return text

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(number of trainable entries, number of all entries) over all parameters, shared ones counted once."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[LayerStatus]:
        """See `fxlora.get_layer_status`."""
        from fxlora.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """See `fxlora.get_model_status`."""
        from fxlora.status import get_model_status

        return get_model_status(self)

    def get_base_model(self) -> Self:
        """This model itself: there is no wrapper around it.

        As in peft, whose base model holds the adapters in its layers, calling it uses the active adapters. For `modules`
        capture it is an instance of the original class, for the others the captured graph. `unload()` gives the model
        without adapters.
        """
        return self

    def verify(self) -> None:
        """Check graphs, factors and scales against the adapters' plans.

        Raises:
            VerifyError: names the site that is wrong, or that has vanished since the transform.
        """
        for region in self.regions():
            self._verifier(region, self._shown(), self._lora.mode).run(region)
        check_copies(self, self._lora.adapters.values())

    def get_submodule(self, target: str) -> nn.Module:
        """The registered module of that name, also where a trained copy runs in place of one around it."""
        module = resolve(self, target)
        if not isinstance(module, nn.Module):
            raise AttributeError(f"'{target}' is no module")  # noqa: TRY004 (as in torch)
        return module

    def get_parameter(self, target: str) -> nn.Parameter:
        """The registered parameter of that name, also where its module's class gives another value under it."""
        parameter = resolve(self, target)
        if not isinstance(parameter, nn.Parameter):
            raise AttributeError(f"'{target}' is no parameter")  # noqa: TRY004 (as in torch)
        return parameter

    # ---- adapters ----

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: object,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter, frozen and not active, as peft does. The others stay as trainable as they are.

        Args:
            adapter_name: a new name without a dot.
            peft_config: anything that `lora_transform` takes as a configuration.
            low_cpu_mem_usage: must be False: factors without values would be left behind.
            autocast_adapter_dtype: False keeps the base's float16 or bfloat16 for the factors, as the field of the
                configuration does.

        Raises:
            AdapterError: when the name is taken or cannot be used.
            NoTargetError: when a target matches nothing.
        """
        check_adapter_name(adapter_name, self._lora.adapters)
        if low_cpu_mem_usage:
            raise NotImplementedError(
                "low_cpu_mem_usage=True would add factors without values; leave it out, or use load_adapter, which reads "
                "files without drawing initial values first"
            )
        config = LoraConfig.from_any(peft_config)
        if not autocast_adapter_dtype:
            config = config.replace(autocast_adapter_dtype=False)
        plan = self._plan(config, adapter_name)
        self._add(plan, draw(self, plan, self._lora.originals))

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        load_base_weights: bool = False,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
    ) -> LoadResult:
        """Add an adapter from the files that `save_pretrained` or peft wrote; it is not activated.

        Files are read strictly by default, so that nothing is missing or left over. Unlike with peft a name that is taken
        is refused, and the model's mode stays as it is.

        Args:
            model_id: directory with `adapter_config.json` and `adapter_model.safetensors`; nothing is downloaded.
            adapter_name: a new name.
            is_trainable: whether its parameters require gradients, from now on.
            torch_device: accepted for peft's sake. Factors are always where their layer's weight is.
            autocast_adapter_dtype: False keeps the base's float16 or bfloat16 for the factors.
            ephemeral_gpu_offload: must be False.
            low_cpu_mem_usage: accepted for peft's sake. No initial values are drawn in any case.
            key_mapping: regular expressions and replacements for keys without `base_model.model.`; of several that
                match a key the first is used.
            load_base_weights: take base weights that the file has (a resized embedding, say) into the model, as peft
                always does. They stay when the adapter goes. If False, one that differs from the model's is refused.
            strict: if False, keys and targets that the model does not know are left out, and layers of which a part is
                missing or misshapen start as those of a fresh adapter; a warning says which. Broken files, entries that
                are not finite, and base weights are refused in any case.
            ignore_mismatched_sizes: the same for misshapen tensors alone.

        Returns:
            `(missing_keys, unexpected_keys, mismatched_keys)`, all empty after a strict reading.

        Raises:
            AdapterError: when the name is taken; when a base weight is to be taken that is merged now.
            CheckpointError: when a file is missing or broken, or its tensors do not fit this model.
        """
        from fxlora.checkpoint.adapter import Reading, fit_plan, read_drawn

        if adapter_name in self._lora.adapters:
            raise AdapterError(
                f"Adapter with name '{adapter_name}' already exists; hotswap_adapter replaces the weights of an adapter, and "
                "delete_adapter removes it"
            )
        check_adapter_name(adapter_name, self._lora.adapters)
        if ephemeral_gpu_offload:
            raise NotImplementedError(
                "ephemeral_gpu_offload is not supported; leave it at False, and factors stay in place"
            )
        check_device(torch_device)
        config = LoraConfig.read(model_id).replace(inference_mode=not is_trainable)
        if not autocast_adapter_dtype:
            config = config.replace(autocast_adapter_dtype=False)
        if not strict:
            config = config.replace(strict_targets=False)
        reading = Reading.of(
            key_mapping,
            load_base_weights=load_base_weights,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        plan = fit_plan(Path(model_id), self, self._plan(config, adapter_name), reading)
        drawn, result = read_drawn(Path(model_id), self, plan, reading)
        self._add(plan, drawn)
        if is_trainable:
            self.set_requires_grad(adapter_name)
        return result

    def _plan(self, config: LoraConfig, adapter_name: str) -> Plan:
        from fxlora.plan import plan

        config.validate()
        check_one_with_biases(config, self._lora.adapters)
        self._check_layers(config)
        return self._place(plan(self, config, adapter_name=adapter_name, sites=self._sites()))

    def _sites(self) -> list[CallSite]:
        """Call sites that a whole graph shows beyond the module tree."""
        return []

    def _add(self, plan: Plan, drawn: Drawn, *, activate: bool = False) -> None:
        """Register a planned adapter; on any error the model is as before."""
        if drawn.base:
            self._check_base_may_change(plan)
        self._check_unmerged(drawn.taken)
        if self._lora.slots is not None:
            check_in_slots(plan)
        with self._without_slots():
            self._add_to_graphs(plan, drawn, activate=activate)

    def _add_to_graphs(self, plan: Plan, drawn: Drawn, *, activate: bool) -> None:
        state = self._lora
        before = (dict(state.adapters), state.active)
        taken = self._swap(drawn.taken)
        replaced = self._swap(drawn.base)
        biases: dict[str, Tensor] = {}
        try:
            attach(self, plan, drawn.factors)
            biases = install_biases(self, plan, drawn.factors)
            state.adapters[plan.adapter] = plan
            if activate:
                state.active = (*state.active, plan.adapter)
                check_rows([state.adapters[name] for name in state.active])
            self._render(state.rendered)
        except BaseException:
            state.adapters, state.active = before
            set_biases(self, biases)
            detach(self, plan)
            self._swap(replaced)
            self._swap(taken)
            raise
        if replaced:
            initial = {
                site: {part: t.detach().clone() for part, t in parts.items()} for site, parts in drawn.factors.items()
            }
            state.changed_base[plan.adapter] = ChangedBase(replaced, initial)
        state.biases.update(biases)
        trained = trainable_names([plan]) if activate and not plan.config.inference_mode else set[str]()
        for path in {*factor_names([plan]), *trainable_names([plan])}:
            self.get_parameter(path).requires_grad_(path in trained)

    def _check_unmerged(self, taken: Iterable[str]) -> None:
        merged = [path for path in taken if path in self._lora.originals]
        if merged:
            raise AdapterError(
                f"'{merged[0]}' is to be loaded, and adapters are merged into it; call unmerge_adapter first"
            )

    def _check_base_may_change(self, plan: Plan) -> None:
        """Refuse an initialisation that would change a base weight under something else.

        Raises:
            AdapterError: while adapters are merged.
            ConfigError: when a weight is shared.
        """
        init = plan.config.init_lora_weights
        if self._lora.merged:
            raise AdapterError(f"init_lora_weights={init!r} changes base weights; call unmerge_adapter first")
        try:
            check_not_shared(Region(self._sites_graph(), (Instance("", self),)), plan.branches)
        except MergeError as error:
            raise ConfigError(f"init_lora_weights={init!r} changes base weights, but {error}") from error

    def _give_back_base(self, adapter: str) -> None:
        """Undo what an adapter's initialisation did to the base; what later ones did to it stays."""
        state = self._lora
        changed = state.changed_base.pop(adapter, None)
        if changed is None:
            return
        values = dict(changed.replaced)
        for later in state.changed_base.values():
            for path in later.replaced.keys() & values.keys():
                current = cast(nn.Parameter, parameter_at(self, path)).detach()
                shift = values[path].double() - later.replaced[path].double()
                later.replaced[path], values[path] = values[path], (current.double() + shift).to(current.dtype)
        self._swap(values)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters, and no others; they become trainable (unless `inference_mode`), the others frozen.

        Raises:
            AdapterError: for an unknown name.
        """
        names = names_of(adapter_name)
        self._check_known(names)
        running_copies(self._lora.adapters[name] for name in names)
        check_rows([self._lora.adapters[name] for name in names])
        if self._lora.merged:
            log.warning("set_adapter takes the merged adapters %s out of the weights first", self._lora.merged)
            self.unmerge_adapter()
        self._activate(names)
        self._train_only(() if inference_mode else names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make all that some adapters train require gradients, or none of it, whether they are active or not.

        Args:
            adapter_names: one or several. Parts that are never trained (of `init_lora_weights="mica"`) stay frozen.
            requires_grad: False freezes them.

        Raises:
            AdapterError: for an unknown name.
        """
        names = names_of(adapter_names)
        self._check_known(names)
        for path in trainable_names(self._lora.adapters[name] for name in names):
            self.get_parameter(path).requires_grad_(requires_grad)

    def _train_only(self, names: Iterable[str]) -> None:
        chosen = trainable_names(self._lora.adapters[name] for name in names)
        for path in trainable_names(self._lora.adapters.values()):
            self.get_parameter(path).requires_grad_(path in chosen)

    def _activate(self, names: tuple[str, ...]) -> None:
        state = self._lora
        check_rows([state.adapters[name] for name in names])
        before = state.active
        state.active = names
        try:
            self._render(state.rendered)
        except BaseException:
            state.active = before
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others by name becomes active.

        As in peft, when an active adapter goes, those that are active then become trainable and the others frozen. What
        its initialisation did to the base (PiSSA, OLoRA) is undone.

        Raises:
            AdapterError: for an unknown name, or while the adapter is merged.
        """
        state = self._lora
        self._check_known([adapter_name])
        changes_base = bool(state.adapters[adapter_name].biases) or adapter_name in state.changed_base
        scaling.check_not_merged(self, state.merged if changes_base else [adapter_name])
        with self._without_slots():
            self._delete(adapter_name)

    def _delete(self, adapter_name: str) -> None:
        state = self._lora
        remaining = tuple(name for name in state.active if name != adapter_name)
        others = sorted(name for name in state.adapters if name != adapter_name)
        if remaining != state.active:
            if others and not remaining:
                log.warning("adapter '%s' was active and is deleted now; '%s' is active now", adapter_name, others[0])
            self._activate(remaining or tuple(others[:1]))
            self._train_only(state.active)
        self._restore_biases([adapter_name])
        detach(self, state.adapters.pop(adapter_name))
        self._give_back_base(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Within this context the model is the base model; merged adapters are taken out for its time.

        Biases that an adapter trains (`bias="all"`, `"lora_only"`) keep their trained values, as in peft.
        """
        state = self._lora
        merged, tied, enabled, active = state.merged, state.tied, state.enabled, state.active
        if merged:
            self.unmerge_adapter()
        state.enabled = False
        if state.biases:
            log.warning(_BIASES_STAY)
        try:
            self._render(())
            yield
        finally:
            state.enabled = enabled
            self._render(state.rendered)
            if merged and state.active == active:  # another choice of adapters ends the merge, as it does outside
                self._merge([name for name in merged if name in state.adapters], tied)

    def disable_adapter_layers(self) -> None:
        """Be the base model from now on; merged adapters are taken out of the weights."""
        if self._lora.merged:
            self.unmerge_adapter()
        if self._lora.biases:
            log.warning(_BIASES_STAY)
        self._lora.enabled = False
        self._render(())

    def enable_adapter_layers(self) -> None:
        """Use the active adapters again, after `disable_adapter_layers` or in a copy made inside `disable_adapter`."""
        self._lora.enabled = True
        self._render(self._lora.rendered)

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """Make an adapter's scaling `factor` times what its configuration says. Compiled graphs stay valid.

        As in peft, files do not hold this factor: `save_pretrained` writes the configuration's alpha.

        Raises:
            AdapterError: for an unknown name, a factor that is not finite, or while the adapter is merged.
        """
        self._check_known([adapter_name])
        call = f"set_scale({factor!r})"
        factor = scaling.check_factor(factor, call)
        scales = scaling.multiplied(scaling.configured(self, adapter_name), factor)
        scaling.put(self, {adapter_name: scales}, call)

    def scale_adapter(self, factor: float, adapter_names: str | Sequence[str] | None = None) -> None:
        """Multiply the scaling that adapters have now.

        Args:
            factor: a finite number.
            adapter_names: which; the active ones if None.

        Raises:
            AdapterError: for an unknown name, a factor that is not finite, or while an adapter is merged.
        """
        call = f"scale_adapter({factor!r})"
        factor = scaling.check_factor(factor, call)
        names = self._chosen(adapter_names)
        scaling.put(self, {name: scaling.multiplied(scaling.current(self, name), factor) for name in names}, call)

    def unscale_adapter(self, factor: float | None = None, adapter_names: str | Sequence[str] | None = None) -> None:
        """Divide the scaling that adapters have now, or give them what their configuration says.

        Args:
            factor: a finite number other than 0; None for the configuration's scaling.
            adapter_names: which; the active ones if None.

        Raises:
            AdapterError: for an unknown name, a factor that is 0 or not finite, or while an adapter is merged.
        """
        call, names = f"unscale_adapter({factor!r})", self._chosen(adapter_names)
        if factor is None:
            scaling.put(self, {name: scaling.configured(self, name) for name in names}, call)
            return
        divisor = scaling.check_factor(factor, call)
        if divisor == 0:
            raise AdapterError(
                "unscale_adapter(0) would divide by zero; unscale_adapter() gives the configuration's scaling back"
            )
        scaling.put(self, {name: scaling.divided(scaling.current(self, name), divisor) for name in names}, call)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add an adapter that is a weighted sum of others, with peft's combination types and, for one seed, its results.

        Biases of branches (`lora_bias`) and changes of rows (trainable tokens) are summed with the weights; a module's
        trained copy is taken over from the one adapter that has it.

        Args:
            adapters: names of the adapters to combine.
            weights: one factor for each; may be negative.
            adapter_name: the new adapter's name; it is not activated.
            combination_type: `cat` is the exact sum, `svd` the best approximation of it of its rank; the others are in
                `fxlora.algebra.combine`. One adapter is always combined linearly.
            svd_rank: rank for the types that end with `svd`; the largest rank of the adapters if None.
            svd_clamp: for these types, the quantile of the factors' entries beyond which they are clamped.
            svd_full_matrices: accepted for peft's sake; the vectors that it adds are never used, and not computed.
            svd_driver: for these types, cuSOLVER's method on CUDA; see `torch.linalg.svd`.
            density: for the types that prune, the share of entries that is kept, in (0, 1].
            majority_sign_method: for the TIES types, `total` or `frequency`.

        Raises:
            AdapterError: for an unknown or taken name, arguments that do not fit, or something that has no sum: trained
                biases of the base, two copies of one module, bases that an initialisation changed, DoRA with a type that
                works on factors. Nothing is changed then.
        """
        from fxlora.algebra.combine import Combination, combine

        del svd_full_matrices
        self._check_known(adapters)
        check_adapter_name(adapter_name, self._lora.adapters)
        how = Combination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        plan, factors = combine(self, list(adapters), list(weights), adapter_name, how)
        self._add(plan, Drawn(factors))

    def subtract_adapter(self, minuend: str, subtrahend: str, adapter_name: str) -> None:
        """Add an adapter that is exactly one adapter minus another; its rank is the sum of theirs.

        It is `add_weighted_adapter([minuend, subtrahend], [1, -1], adapter_name, "cat")`.

        Args:
            minuend: name of the adapter to start from.
            subtrahend: name of the adapter that is taken out of it.
            adapter_name: the new adapter's name; it is not activated.

        Raises:
            AdapterError: as `add_weighted_adapter`.
        """
        self.add_weighted_adapter([minuend, subtrahend], [1.0, -1.0], adapter_name, "cat")

    def reduce_rank(
        self,
        adapter_name: str,
        r: int | None = None,
        new_name: str | None = None,
        *,
        max_error: float | None = None,
    ) -> RankReport:
        """Add an adapter that approximates another one with a lower rank, as well as that rank allows.

        The update of each site, scaling included, is decomposed through its small factors in float64. DoRA is
        approximated by plain LoRA. The new adapter is not activated, and the other one stays as it is.

        Args:
            adapter_name: the adapter to approximate.
            r: the rank; sites that have no more than it keep theirs.
            new_name: the new adapter's name; `<adapter_name>_reduced` if None.
            max_error: choose for each site the smallest rank whose relative error (Frobenius norm) is at most this; `r`
                is a limit then. The ranks are in the new adapter's `rank_pattern`.

        Returns:
            Rank, norm and error of each site, measured on the factors as they are stored.

        Raises:
            ConfigError: when `r` or `max_error` cannot be used, or neither is given.
            AdapterError: for an unknown or taken name, or an adapter that has more than updates; as
                `add_weighted_adapter`.
        """
        from fxlora.algebra.reduce import reduced

        name = f"{adapter_name}_reduced" if new_name is None else new_name
        self._check_known([adapter_name])
        check_adapter_name(name, self._lora.adapters)
        plan, factors, report = reduced(self, adapter_name, name, r, max_error)
        self._add(plan, Drawn(factors))
        return report

    def hotswap_adapter(self, model_id: str | Path, adapter_name: str = "default") -> None:
        """Replace an adapter by one from files; see `fxlora.hotswap_adapter`."""
        from fxlora.hotswap import hotswap_adapter

        hotswap_adapter(self, model_id, adapter_name)

    # ---- merging ----

    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = True,
        *,
        tied: Literal["refuse", "both"] = "refuse",
    ) -> None:
        """Fold adapters into the base weights, each entry rounded once; `unmerge_adapter` restores the bits.

        Args:
            adapter_names: which; the active ones if None.
            safe_merge: accepted for peft's sake. A merge that would make NaN or infinite weights is always refused.
            tied: whether to change weights that other layers have too, in all of them.

        Raises:
            AdapterError: for an unknown name.
            MergeError: when a weight is shared with another layer, or would not be finite. Nothing is changed then.
        """
        del safe_merge
        check_tied(tied, ("refuse", "both"))
        self._merge(self._chosen(adapter_names), tied).warn()

    def _merge(
        self, names: Sequence[str], tied: Tied = "refuse", on_folded: Callable[[str], None] | None = None
    ) -> RoundingReport:
        """Merge adapters too, from the original weights; returns what rounding takes of a sample."""
        state = self._lora
        tied = state.tied if state.merged and tied == "refuse" else tied
        self._check_enabled("merge them")
        new = [name for name in names if name not in state.merged]
        if not new:
            return RoundingReport(())
        wanted = (*state.merged, *new)
        check_rows([state.adapters[name] for name in dict.fromkeys((*wanted, *state.active))])
        earlier, traced = dict(state.originals), len(state.transient.trace)
        # from the original weights, so that the result does not depend on the order of merging
        current = self._swap(earlier)
        replaced: dict[str, Tensor] = {}
        try:
            report = self._fold(wanted, replaced, tied, on_folded)
            state.merged, state.originals, state.tied = wanted, replaced, tied
            self._render(state.rendered)
            self._warn_of_norms()
            return report
        except BaseException:
            self._swap(replaced)
            self._swap(current)
            state.merged, state.originals = tuple(n for n in wanted if n not in new), earlier
            del state.transient.trace[traced:]
            raise

    def _warn_of_norms(self) -> None:
        """Say where a branch depends on the weight that it is on, and this one has just changed."""
        state = self._lora
        folded = {spec.site for name in state.merged for spec in state.adapters[name].branches}
        for spec in (spec for name in state.rendered for spec in state.adapters[name].branches):
            if spec.variant and spec.site in folded:
                log.warning(
                    "'%s': adapter '%s' (%s) stays a branch and rescales the merged weight, as in peft, which is not what "
                    "both did before; merge it too for that",
                    spec.site,
                    spec.adapter,
                    spec.variant,
                )
                return

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights: these have their original bits again."""
        state = self._lora
        self._swap(state.originals)
        state.originals, state.merged, state.tied = {}, (), "refuse"
        self._render(state.rendered)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: str | Sequence[str] | None = None,
        *,
        tied: Tied = "refuse",
    ) -> nn.Module:
        """Fold adapters into the base weights and return the model without any LoRA.

        The adapters' trained copies of modules take these modules' places, and biases keep their trained values.

        Args:
            progressbar: show on standard error how many layers are folded.
            safe_merge: as in `merge_adapter`.
            adapter_names: which adapters to fold; the active ones if None.
            tied: what to do where a weight belongs to other layers too, as tied embeddings do: refuse the merge, give the
                layer a weight of its own (and set `tie_word_embeddings` of the configuration), or change it in all.

        Raises:
            MergeError: when a weight is shared with another layer and `tied` does not say what is wanted, or when an
                entry would not be finite. Nothing is changed then.

        Returns:
            The original model object for `modules` capture; the captured graph for the others. Its state dict has
            the original's names, and its parameters require gradients where the original's did.
        """
        del safe_merge
        check_tied(tied)
        state = self._lora
        names = tuple(dict.fromkeys([*state.merged, *self._chosen(adapter_names)]))
        self._check_enabled("merge them")
        copies = running_copies(state.adapters[name] for name in names)
        specs = [spec for name in names for spec in state.adapters[name].branches]
        layers, whole = len(foldable(specs)), Region(self._sites_graph(), (Instance("", self),))
        with (
            self._base_kept_on_error(),
            weights_of_their_own(whole, specs, tied),
            progress("Merging layers", layers, shown=progressbar) as step,
        ):
            for name in [each for each in state.changed_base if each not in names and not state.merged]:
                self._give_back_base(name)
            self._merge(names, tied, step).warn()
        if tied == "untie" and has_parted_ties(self):
            set_untied(getattr(self, "config", None))
        state.originals = {}
        self._restore_biases([name for name in state.adapters if name not in state.merged])
        return self._remove_all(copies)

    def unload(self) -> nn.Module:
        """The model without any LoRA and with its original weights, biases and layers, bit for bit.

        As in peft, modules of `modules_to_save` stay as the active adapter trained them: delete that adapter first to
        have the original ones.

        Raises:
            AdapterError: inside `disable_adapter`.
        """
        self._check_enabled("unload")
        state = self._lora
        copies = state.copies
        if state.merged:
            self.unmerge_adapter()
        self._restore_biases(list(state.adapters))
        for name in list(state.changed_base):
            self._give_back_base(name)
        replication = state.replication
        model = self._remove_all(copies)
        if replication is not None:
            replication.undo(model)
        return model

    def _remove_all(self, copies: Sequence[SavedModule]) -> nn.Module:
        state = self._lora
        trained = {saved.module: self.get_submodule(saved.path) for saved in copies}
        self.leave_slots()
        state.active = ()
        self._render(())
        for name in list(state.adapters):
            detach(self, state.adapters.pop(name))
        put_in_place(self, trained)
        for path, parameter in self.named_parameters():
            parameter.requires_grad_(path in state.trained_before)
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _renew_after_loading]:
            del hooks[key]
        return self._strip()

    def _restore_biases(self, names: Iterable[str]) -> None:
        """Undo what adapters trained of the base's biases."""
        state = self._lora
        paths = [path for name in names for path in state.adapters[name].biases]
        set_biases(self, {path: state.biases.pop(path) for path in paths})

    @contextmanager
    def _base_kept_on_error(self) -> Generator[None]:
        """On an error put back what initialisations have done to the base."""
        state = self._lora
        before = {name: ChangedBase(dict(each.replaced), each.initial) for name, each in state.changed_base.items()}
        paths = {path for each in before.values() for path in each.replaced}
        values = {path: cast(nn.Parameter, parameter_at(self, path)).detach().clone() for path in paths}
        try:
            yield
        except BaseException:
            state.changed_base = before
            self._swap(values)
            raise

    def _check_enabled(self, what: str) -> None:
        if not self._lora.enabled:
            raise AdapterError(
                f"adapters are disabled here; {what} outside of disable_adapter(), or after enable_adapter_layers()"
            )

    def _fold(
        self,
        names: Sequence[str],
        replaced: dict[str, Tensor],
        tied: Tied,
        on_folded: Callable[[str], None] | None = None,
    ) -> RoundingReport:
        specs = tuple(spec for name in names for spec in self._lora.adapters[name].branches)
        losses: dict[str, Loss] = {}
        region, start = Region(self._sites_graph(), (Instance("", self),)), time.perf_counter()
        result = MergeBranches(specs, replaced, on_folded, tied, losses).run(region)
        seconds = time.perf_counter() - start
        self._note([Stage(MergeBranches.name, "weights", seconds, result.modified, summary=result.summary)])
        self._renew_weight_norms()
        return RoundingReport.of(losses, {path: (value.dtype, value.numel()) for path, value in replaced.items()})

    def _swap(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put weights in place by path, and return what was there."""
        with torch.no_grad():
            parameters = {path: cast(nn.Parameter, parameter_at(self, path)) for path in weights}
            before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
            for path, value in weights.items():
                parameters[path].copy_(value)
        if weights:
            self._renew_weight_norms()
        return before

    def _renew_weight_norms(self) -> None:
        """Make the norms of base weights anew, after these have changed."""
        for spec in [spec for spec in self._specs() if spec.variant]:
            for container, leaf in variant_leaves(spec, base_weight(self, spec.site)[1]).items():
                if isinstance(leaf, WeightNorm):
                    place = cast(WeightNorm, self.get_submodule(f"{spec.owner}.{container}.{spec.adapter}"))
                    if (place.squared.device, place.squared.dtype) == (leaf.squared.device, leaf.squared.dtype):
                        place.squared.copy_(leaf.squared)  # in place: compiled graphs keep the buffer
                    else:
                        place.squared = leaf.squared
        self.refresh_slots()

    # ---- files ----

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        convert_to_plain: bool = False,
        portable: bool = False,
    ) -> None:
        """Write the adapters, and only them, as peft does: "default" into the directory, others below it.

        Args:
            save_directory: created if need be; an adapter's files in it are replaced as one.
            safe_serialization: must be True; pickled weights are not written.
            selected_adapters: names; all adapters if None.
            save_embedding_layers: whether to write the base's weights of input and output embeddings too. `"auto"` does
                where they are targets by the names `embed_tokens` or `lm_head`, and where the vocabulary has another
                size than that of the base's directory; see `fxlora.checkpoint.embeddings`.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: as `convert_to_plain`, with the initial factors from an adapter
                that was saved before training, as in peft.
            state_dict: where to take the tensors from, such as one that was gathered from several processes.
            convert_to_plain: write adapters whose initialisation changed the base (PiSSA, OLoRA) as plain LoRA of twice
                the rank, which needs the original base only.
            portable: write them so that every reader that knows plain LoRA computes the same: scales folded into B, one
                rank; see `fxlora.make_portable`. Embedding layers are not written then unless they are asked for.

        Raises:
            AdapterError: for an unknown name.
            CheckpointError: when the directory cannot be written; when an adapter has no portable form.
        """
        from fxlora.checkpoint.adapter_writing import initial_factors, save_adapters

        names = list(self._lora.adapters) if selected_adapters is None else list(names_of(selected_adapters))
        self._check_known(names)
        if save_embedding_layers not in (True, False, "auto"):
            raise AdapterError(f"save_embedding_layers should be True, False or 'auto', not {save_embedding_layers!r}")
        if not safe_serialization:
            raise NotImplementedError("adapters are written as safetensors only; leave safe_serialization at True")
        initial: dict[str, Factors] = {}
        if convert_to_plain or path_initial_model_for_weight_conversion is not None:
            where = path_initial_model_for_weight_conversion
            plans = [self._lora.adapters[name] for name in names]
            changing = [plan for plan in plans if plan.adapter in self._lora.changed_base or where is not None]
            path = None if where is None else Path(where)
            initial = {plan.adapter: initial_factors(self, plan, path) for plan in changing or plans}
        if is_main_process:
            save_adapters(self, Path(save_directory), names, state_dict, initial, save_embedding_layers, portable)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write what model hubs ask for into the head of `README.md`; see `fxlora.checkpoint.card`."""
        from fxlora.checkpoint.card import update_card

        update_card(self, Path(output_dir))

    # ---- helpers ----

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        result = super()._apply(fn, recurse)
        if "_lora" in self.__dict__:
            self._renew_weight_norms()
        return result

    def _chosen(self, adapter_names: str | Sequence[str] | None) -> tuple[str, ...]:
        """The named adapters, the active ones for None; each once.

        Raises:
            AdapterError: for an unknown name.
        """
        names = self._lora.active if adapter_names is None else names_of(adapter_names)
        self._check_known(names)
        return names

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._lora.adapters
        for name in names:
            if name not in known:
                raise AdapterError(
                    f"no adapter is called '{name}'; there is {', '.join(known) or 'none'}.{did_you_mean(name, known)}"
                )

    def _check_layers(self, config: LoraConfig) -> None:
        """A later adapter has the layers that the first one made."""
        others = [plan.config.layer_replication for plan in self._lora.adapters.values()]
        wanted = config.layer_replication
        if wanted and [list(pair) for pair in wanted] not in [[list(p) for p in other or ()] for other in others]:
            raise AdapterError(
                "`layer_replication` rebuilds the model, which only the first adapter can; start from the base model"
            )

    def _verifier(self, region: Region, active: tuple[str, ...], mode: Mode) -> Verify:
        slots = self._lora.slots
        shown = slots.specs if mode == "slots" and slots is not None else None
        return Verify(self._specs(), active, mode=mode, shown=shown)


def watch_loading(model: LoraModel) -> None:
    """From now on make anew what was computed from the base's weights when these are loaded, also as part of a whole."""
    model.register_load_state_dict_post_hook(_renew_after_loading)


def _renew_after_loading(model: LoraModel, incompatible_keys: object) -> None:
    del incompatible_keys
    model._renew_weight_norms()


def check_rows(plans: Iterable[Plan]) -> None:
    """Refuse adapters that cannot be used together: one replaces rows of a weight that another one changes too.

    Raises:
        AdapterError: naming the layer and both adapters.
    """
    specs = [spec for plan in plans for spec in plan.branches]
    for spec in [spec for spec in specs if not has_factors(spec)]:
        for other in specs:
            if other.site != spec.site or other.adapter == spec.adapter:
                continue
            common = set(token_ids(spec.options)).intersection(() if has_factors(other) else token_ids(other.options))
            if has_factors(other) or common:
                what = "has LoRA" if has_factors(other) else f"has token {min(common)} too"
                raise AdapterError(
                    f"'{spec.site}': adapter '{spec.adapter}' trains rows of this weight, and '{other.adapter}' {what} "
                    "there; use one of them at a time"
                )
