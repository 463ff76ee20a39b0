"""The tuner: puts ``SO8TLayer`` around the chosen modules of any transformers model.

It owns gates and LoRA together, so that one adapter folder, one ``from_pretrained`` and one merge serve both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from so8t_torch.adapter.config import SO8TConfig
from so8t_torch.adapter.layer import SO8TLayer, refuse_quantized, refuse_several
from so8t_torch.adapter.loading import check_keys, check_tensors
from so8t_torch.adapter.quantized import keep_training_on_cpu, quantization_of
from so8t_torch.adapter.routing import GateRoutes
from so8t_torch.adapter.selection import check, expand_all_linear, gate_rule, lora_rank, lora_rule
from so8t_torch.adapter.summary import GateSummary, gate_summary, layers
from so8t_torch.core.errors import AdapterError


class SO8TModel(BaseTuner):
    """Installs SO(8) gates and LoRA in a model; made by ``peft.get_peft_model(model, SO8TConfig(...))``.

    Step 0 is the base model bit for bit. On a CPU, 4-bit layers of the whole model stay in training mode from
    then on, because bitsandbytes corrupts them otherwise (``so8t_torch.adapter.quantized``).
    """

    prefix = "so8t_"
    tuner_layer_cls = SO8TLayer

    def set_gate_routes(self, rows_to_safe: Bool[Tensor, "*rows"] | None) -> None:
        """Say which rows of the next batch train R_safe; the others train R_cmd. Keep until backward is done.

        Args:
            rows_to_safe: (batch,) or (batch, tokens), True for rows labelled ESCALATE or REFUSE; None forgets.

        Raises:
            AdapterError: the model has no gates.
            TrainingError: the tensor is not boolean.
        """
        set_gate_routes(self.model, rows_to_safe)

    def gate_summary(self) -> dict[str, GateSummary]:
        """Return angles, commutator distance and orthogonality error of every active gate, by module name."""
        return gate_summary(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Args:
            adapter_name: one name.
            inference_mode: leave its parameters frozen.

        Raises:
            AdapterError: more than one name.
        """
        refuse_several([adapter_name] if isinstance(adapter_name, str) else list(adapter_name))
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a weighted sum of rotations is not a rotation.

        Raises:
            AdapterError: always.
        """
        del args, kwargs
        raise AdapterError(
            "add_weighted_adapter: a weighted sum of rotations is not a rotation, and a sum of generators depends on "
            "the order in which the adapters act. Train one adapter on the mixture, or bake one and train the next."
        )

    def _prepare_model(self, peft_config: SO8TConfig, model: nn.Module) -> None:
        expand_all_linear(peft_config, model)
        check(peft_config, model)
        keep_training_on_cpu(model)
        if peft_config.quantization is None:
            peft_config.quantization = quantization_of(model)

    @staticmethod
    def _check_target_module_exists(peft_config: SO8TConfig, key: str) -> bool:
        return gate_rule(peft_config).selects(key) or lora_rule(peft_config).selects(key)

    def _create_and_replace(
        self,
        peft_config: SO8TConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        gated, rank = gate_rule(peft_config).selects(current_key), lora_rank(peft_config, current_key)
        if isinstance(target, SO8TLayer):
            target.add_adapter(adapter_name, peft_config, gated=gated, rank=rank)
            return
        layer = SO8TLayer(target, self._routes())
        layer.train(target.training)
        layer.add_adapter(adapter_name, peft_config, gated=gated, rank=rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _routes(self) -> GateRoutes:
        return next((layer.routes for _, layer in layers(self.model)), GateRoutes())

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        tied = self._get_tied_target_modules(self.model)
        if tied:
            raise AdapterError(
                f"merge: {', '.join(tied)} shares its weight with the other end of the model; folding would change "
                "both. Load the base with tie_word_embeddings=False."
            )
        for _, layer in layers(self.model):
            refuse_quantized(layer.get_base_layer())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        del args
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("adapter_names: one SO(8) adapter is active for the whole batch; use set_adapter(name).")
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SO8TConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_tensors(state_dict, config)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_keys(model, adapter_name, remapped)
        return remapped


def set_gate_routes(model: nn.Module, rows_to_safe: Bool[Tensor, "*rows"] | None) -> None:
    """Say which rows of the next batch train R_safe, for a model that holds SO(8) layers in any wrapping.

    Args:
        model: wrapped by PEFT, or with injected layers.
        rows_to_safe: (batch,) or (batch, tokens), True for rows labelled ESCALATE or REFUSE; None forgets.

    Raises:
        AdapterError: the model has no SO(8) layers.
        TrainingError: the tensor is not boolean.
    """
    found = {id(layer.routes): layer.routes for _, layer in layers(model)}
    if not found:
        raise AdapterError("set_gate_routes: this model has no SO(8) layers; wrap it with SO8TConfig first.")
    for routes in found.values():
        routes.set(rows_to_safe)
