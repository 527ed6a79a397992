"""Names every linear-like weight that stays in float, as engines look for them in a quantized checkpoint's config.

An engine builds its own modules, some of which are linears where transformers has something else: routers, stacked
experts, vision towers, multi-token prediction layers. An engine that finds such a module neither quantized nor in
`ignore` takes its float weights for codes. So every matrix or stack of matrices is listed that is not quantized, under
the model's name and the file's:

    a matrix `m.weight`              m
    another matrix `m.p`             m.p
    a stack of matrices `m.p`        m, m.p, and `re:m\\..*` for engines that have one linear per expert

Embeddings and convolutions of the model are not listed, since no engine makes linears of them.
"""

import re
from collections.abc import Collection, Iterator

from torch import nn

from ..streaming.streamed_model import StreamedModel

_NO_LINEARS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def float_modules(source: StreamedModel, quantized: Collection[str]) -> tuple[str, ...]:
    """Names of all linear-like modules that stay in float, without duplicates.

    quantized: the linears that are quantized, and the stacks of experts, by the model's names.
    """
    covered = _prefixes([*quantized, *_file_modules(source, quantized)])
    names: dict[str, None] = {}
    for name, dims in _float_weights(source, quantized):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            names[module] = None
        elif dims == 2 or module in covered:
            names[name] = None
        else:
            names |= dict.fromkeys((module, name, f"re:{re.escape(module)}\\..*"))
    return tuple(names)


def float_stacks(source: StreamedModel, quantized: Collection[str]) -> list[str]:
    """The stacks of matrices, mostly experts, that the model uses and that stay in float, by the model's names."""
    return [
        name
        for name, parameter in source.model.named_parameters()
        if parameter.dim() == 3
        and min(parameter.shape) > 1
        and name not in quantized
        and not isinstance(source.model.get_submodule(name.rpartition(".")[0]), _NO_LINEARS)
    ]


def unused_weights(source: StreamedModel) -> list[str]:
    """Matrices and stacks of the file that the text model does not use: a vision tower's, or MTP layers'."""
    return [name for name in source.names.unused if len(source.checkpoint.info(name).shape) > 1]


def starred(names: Collection[str]) -> list[str]:
    """The names with `*` for the numbers in them, without duplicates: one for all layers."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _float_weights(source: StreamedModel, quantized: Collection[str]) -> Iterator[tuple[str, int]]:
    """(name, number of dimensions) of all matrices and stacks in float, by the model's and the file's names."""
    for path, module in source.model.named_modules():
        if isinstance(module, _NO_LINEARS) or path in quantized:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if parameter.dim() > 1 and name not in quantized:
                yield name, parameter.dim()
                for key in _source_names(source, path, name):
                    yield (
                        key,
                        len(source.checkpoint.info(key).shape) if key in source.checkpoint.tensors else 2,
                    )
    for key in unused_weights(source):
        yield key, len(source.checkpoint.info(key).shape)


def _source_names(source: StreamedModel, path: str, name: str) -> list[str]:
    """The file's names of a parameter; for a tied weight the name that an untied one would have."""
    is_linear = name.endswith(".weight") and isinstance(source.model.get_submodule(path), nn.Linear)
    if is_linear and source.names.is_one_tensor(path):
        return [f"{source.names.source_module(path)}.weight"]
    return source.names.sources(name)


def _file_modules(source: StreamedModel, quantized: Collection[str]) -> Iterator[str]:
    """The file's names of what is quantized."""
    for name in quantized:
        owner, _, leaf = name.rpartition(".")
        if leaf in source.model.get_submodule(owner)._parameters:
            yield from (key.removesuffix(".weight") for key in source.names.sources(name))
        else:
            yield source.names.source_module(name)


def _prefixes(names: Collection[str]) -> set[str]:
    """All modules around the named ones, themselves included."""
    parts = (name.split(".") for name in names)
    return {".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}
