"""What of a module trains: M, the coordinates an SFT may change, and the head.

deftx's own modules say it themselves. In any other LightningModule both are found by structure: the encoder is its one
transformers model (or the submodule that a person names), M is what of the encoder's base requires gradients, norms
left out, and the head is everything else that does. As in the reference, norms stay frozen while a phase runs, and an
output embedding is a frozen copy that does not follow the input embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deftx.core.delta import fingerprint
from deftx.errors import DeftxError


class Parts:
    """M and the head of a model.

    Attributes:
        maskable: M, by the base's own names.
        head: The head's tensors, by full names.
        model: Holds both, and what never trains; P is counted over it.
        selection: In the sparse phase of deftx's own modules the flat indices by name, else None.
        gradients: Where such a module gathers the selected gradients, else None.
    """

    maskable: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    model: Any
    selection: dict[str, Tensor] | None = None
    gradients: Any = None

    def named(self) -> dict[str, nn.Parameter]:
        """Return M by its names, then the head under ``head.<name>``."""
        return {**self.maskable, **{f"head.{name}": parameter for name, parameter in self.head.items()}}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what of :meth:`named` trains now: a phase freezes parameters for a while."""
        return {name: parameter for name, parameter in self.named().items() if parameter.requires_grad}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors (keys as in :meth:`named`) into the model, bit for bit.

        Raises:
            DeftxError: A tensor fits no parameter of this model.
        """
        parameters = self.named()
        unknown = sorted(set(state) - set(parameters))
        if unknown:
            raise DeftxError(f"{len(unknown)} trained tensors fit no parameter of this model, such as {unknown[0]!r}")
        with torch.no_grad():
            for name, tensor in state.items():
                parameters[name].copy_(tensor)

    def end_fit(self) -> None:
        """Let gradients be what torch makes them again."""


class FoundParts(Parts):
    """The parts of a LightningModule that is not deftx's, while a phase runs.

    Attributes:
        frozen: Norms that :meth:`release` lets train again.
        base_fingerprint: Identity of the base's weights, as an SFT's metadata names them.
    """

    def __init__(self, module: nn.Module, encoder: str | None = None, *, base_fingerprint: str | None = None) -> None:
        """Find them, freeze the norms, and untie the output embedding.

        Args:
            module: A LightningModule whose layers exist.
            encoder: Path of the encoder inside it; None finds the one transformers model.
            base_fingerprint: Of the weights that the module started from; None takes those that it holds.

        Raises:
            DeftxError: There is no such encoder, or nothing of it trains.
        """
        from deftx.training.encoder import base_parameters, norm_parameters, untie

        holder = _encoder(module, encoder)
        base = getattr(holder, "base_model", holder)
        named = base_parameters(holder) if hasattr(holder, "base_model") else dict(base.named_parameters())
        inside = {id(parameter) for parameter in named.values()}

        def outside_of() -> dict[str, nn.Parameter]:
            return {name: parameter for name, parameter in _named(module, holder) if id(parameter) not in inside}

        of_base = norm_parameters(base)
        self.maskable, self.head = _training(named, of_base), _training(outside_of(), [])
        self._refuse(module)  # before anything of it is changed
        for model in _tied(module, holder):
            untie(model)
        outside = outside_of()
        norms = [*of_base, *(p for name, p in outside.items() if "LayerNorm" in name)]
        self.model = module
        self.frozen = [parameter for parameter in norms if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        weights = {name: parameter.detach() for name, parameter in named.items()}
        self.base_fingerprint = base_fingerprint or fingerprint(weights)
        self.maskable, self.head = _training(named, norms), _training(outside, norms)

    def _refuse(self, module: nn.Module) -> None:
        """Refuse a module whose φ would not say all that training changed, or could not say it exactly."""
        if not self.maskable:
            raise DeftxError(
                f"no parameter of the encoder in {type(module).__name__} requires a gradient; "
                "SparseFineTuning chooses what stays frozen itself"
            )
        for name, parameter in self.named().items():
            if parameter.dtype != torch.float32:
                raise DeftxError(
                    f"{name} is {parameter.dtype}; an SFT needs float32 weights: load the encoder with "
                    "dtype=torch.float32, and train with precision='bf16-mixed' where that is faster"
                )
        embeddings = {id(parameter) for parameter in self.maskable.values()}
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Embedding) and layer.sparse and id(layer.weight) in embeddings:
                raise DeftxError(f"{name} has sparse=True, and its gradients cannot be masked; use sparse=False")
            if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
                raise DeftxError(
                    f"{name} ({type(layer).__name__}) keeps running statistics, which an SFT does not hold; "
                    "use LayerNorm, or track_running_stats=False"
                )


def _training(parameters: Mapping[str, nn.Parameter], norms: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters that train: those that require gradients and are no norm."""
    frozen = {id(parameter) for parameter in norms}
    return {name: p for name, p in parameters.items() if p.requires_grad and id(p) not in frozen}


def _tied(module: nn.Module, holder: nn.Module) -> list[Any]:
    """Return the models that may tie their output embedding to the encoder's: the encoder's own, and one around it."""
    from transformers import PreTrainedModel

    models: list[Any] = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    around = [part for part in models if any(inner is holder for inner in part.modules())]
    return [part for part in around if part.get_output_embeddings() is not None]


def _encoder(module: nn.Module, path: str | None) -> Any:
    """Return the encoder at ``path``, or the module's only transformers model."""
    from transformers import PreTrainedModel

    kind = type(module).__name__
    if path is not None:
        try:
            return module.get_submodule(path)
        except AttributeError as error:
            raise DeftxError(f"{kind} has no submodule {path!r} (encoder={path!r}): {error}") from error
    models = {name: part for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    outer = [name for name in models if not any(name.startswith(f"{other}.") for other in models if other != name)]
    if len(outer) == 1:
        return models[outer[0]]
    if not outer:
        raise DeftxError(
            f"{kind} holds no transformers model; make it in __init__, or name the encoder's submodule: "
            'SparseFineTuning(encoder="backbone")'
        )
    raise DeftxError(
        f"{kind} holds {len(outer)} transformers models ({', '.join(outer)}); choose the encoder: "
        f'SparseFineTuning(encoder="{outer[0]}")'
    )


def _named(module: nn.Module, holder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by full names: those of the encoder's model as it calls them, then the module's own."""
    inner = list(holder.named_parameters())
    seen = {id(parameter) for _, parameter in inner}
    return inner + [(name, p) for name, p in module.named_parameters() if id(p) not in seen]
