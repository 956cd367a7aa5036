"""A changed model as an ONNX file, run by onnxruntime before it is kept."""

from __future__ import annotations

import contextlib
import io
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracker.engine import NeuronEngine
from tracker.errors import ExportError
from tracker.export.compare import (
    apart,
    current_model,
    example_calls,
    limit,
    require_small,
)
from tracker.export.destination import whole_or_nothing
from tracker.export.record import Exported, needed, size_of
from tracker.inputs.calls import Arguments, Call
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.utils.nested import tensors_in


def to_onnx(
    engine: NeuronEngine,
    path: str | PathLike[str],
    *,
    dynamic_shapes: Any = None,
    verify: bool = True,
    **options: Any,
) -> Exported:
    """Write the current model as an ONNX file, by `torch.onnx.export`, in eval mode.

    The example call of the engine (the first of `forward`) is what it is traced with; shapes are those of it, save what
    `dynamic_shapes` says.

    Args:
        engine: Its current model is written; it is not changed, and may be tracked meanwhile.
        path: The file to write; one that is there is replaced once the new one is checked.
        dynamic_shapes: Sizes that may differ between calls, as `torch.export.export` takes them: for one input tensor
            `({0: torch.export.Dim.DYNAMIC},)`.
        verify: Run the file with onnxruntime on the example inputs and compare.
        **options: More options of `torch.onnx.export`.

    Raises:
        ExportError: A package is missing (`pip install 'self-modifying-slm[onnx]'`), or torch cannot export the model.
        VerificationError: Outputs differ; nothing was written.
        StructureError: There are no example inputs.

    Examples:
        >>> from tracker.export import to_onnx
        >>> to_onnx(engine, "small.onnx", dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))  # doctest: +SKIP
    """
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if verify else [])):
        needed(package, "onnx")
    model = current_model(engine)
    call = next(c for c in example_calls(engine) if c.method == "forward")
    difference = None
    with whole_or_nothing(path) as made:
        _write(model, call, made, dynamic_shapes, options)
        if verify:
            difference = _difference(model, call, made)
            require_small(difference, limit(model), "The ONNX model, run by onnxruntime,")
        size = size_of(made)
    return Exported(Path(path), "onnx", size, difference, "onnxruntime" if verify else "")


def _write(
    model: nn.Module, call: Call, path: Path, dynamic_shapes: Any, options: dict[str, Any]
) -> None:
    trial_copy = copy_without_hooks(model)
    for module in trial_copy.modules():
        module.training = False
    settings = {"external_data": False, "dynamo": True, "verbose": False, **options}
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                trial_copy,
                call.args,
                path,
                kwargs=dict(call.kwargs),
                dynamic_shapes=dynamic_shapes,
                **settings,
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export cannot export {type(model).__name__} as it is called in the example "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Nothing was written."
        ) from error


def _difference(model: nn.Module, call: Call, path: Path) -> float:
    session = needed("onnxruntime", "onnx").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    given: list[Tensor] = tensors_in(Arguments(call.args, call.kwargs))
    names = [one.name for one in session.get_inputs()]
    feeds = dict(zip(names, [t.detach().cpu().numpy() for t in given], strict=True))
    found = [torch.from_numpy(array) for array in session.run(None, feeds)]
    once = Call.of(call.args, call.kwargs, training=False)
    expected = tensors_in(forward_once(model, once))
    return apart(expected[: len(found)], found)
