"""Builds a transformers model without its weights: parameters are on meta, buffers are real.

`from_pretrained` builds everything on meta and then recomputes the buffers, which misses buffers that custom code
computes in its `__init__`. Here a parameter moves to meta at the moment a module registers it. Everything else (rotary
tables, masks, position ids) is computed by the model's own code.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# `torch.empty` of more bytes than this is a parameter in the making: buffers of this size are not made with it.
_LARGE = 64 << 20


# Outputs that transformers gathers with hooks on all blocks at once, which a lane that waits between blocks breaks.
_EXTRA_OUTPUTS = ("output_router_logits", "output_attentions", "output_hidden_states")


def load_config(folder: str | Path, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """The config of a checkpoint folder. Raises CheckpointError if transformers knows none for it."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _config_errors() as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder} brings Python code of its own, which is not run unless you trust it: pass "
                "--trust-remote-code (trust_remote_code=True)"
            ) from None
        reason = _one_line(error)
        raise CheckpointError(f"{folder} has a config.json that transformers cannot use: {reason}") from None
    return config


def _config_errors() -> tuple[type[Exception], ...]:
    """What constructors of configs and models raise for invalid values."""
    from huggingface_hub.errors import StrictDataclassError

    usual = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    return (*usual, StrictDataclassError)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def build_meta_model(
    config: "PreTrainedConfig | str | Path",
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    experts_implementation: str = "eager",
) -> "PreTrainedModel":
    """The causal language model of a config, or of a checkpoint folder, with its parameters on meta.

    dtype: of the parameters; None for the config's, or float32 if it names none. Parameters that the model's class
    keeps in float32 stay so, as in `from_pretrained`. Tied weights are one parameter. The model is in evaluation mode
    and keeps no cache. Raises CheckpointError if there is no such class, or if it cannot be built.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(config, str | Path):
        config = load_config(config, trust_remote_code)
    config = copy.deepcopy(config)
    options: dict[str, Any] = {"experts_implementation": experts_implementation}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        dtype = dtype or _config_dtype(config)
        with _parameters_on_meta(), _LargeOnMeta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except _config_errors() as error:
        reason = _one_line(error)
        raise CheckpointError(f"no causal language model can be built from config.json: {reason}") from None
    keep_in_float32(model, dtype)
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        part.use_cache = False
        for extra in _EXTRA_OUTPUTS:
            if getattr(part, extra, False):
                setattr(part, extra, False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _config_dtype(config: "PreTrainedConfig") -> torch.dtype:
    named = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Context manager: parameters that modules register move to meta, and are not initialised."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.to("meta"), requires_grad=False)
            # transformers' own mark: its initialisation functions skip such a parameter.
            vars(meta).update(vars(param), _is_hf_initialized=True)
            module._parameters[name] = meta

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _LargeOnMeta(TorchFunctionMode):
    """Context manager: a large `torch.empty` is made on meta at once, before it is registered as a parameter.

    All experts of a layer are one parameter, and the system refuses an allocation larger than its memory.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            tensor = func(*args, **(kwargs | {"device": "meta"}))
            if tensor.nbytes >= _LARGE:
                return tensor
        return func(*args, **kwargs)


def keep_in_float32(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Make the parameters and persistent buffers float32 that the model's class keeps so, as `from_pretrained` does."""
    patterns = [plan.replace("*", ".*") for plan in model._get_dtype_plan(dtype)]
    if not patterns:
        return
    pattern = re.compile("|".join(patterns))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if pattern.search(name) and tensor.is_floating_point():
            tensor.data = tensor.data.float()
