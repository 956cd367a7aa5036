"""How the loss bends where consumers put out: what an error of theirs costs, in the loss itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.compensation.linear import cholesky
from tracker.errors import StructureError, SurgeryError
from tracker.modules.kinds import is_linear
from tracker.observation.consumer_inputs import Sensitivity
from tracker.surgery.calibration.loss import Objective
from tracker.utils.nested import tensors_in

if TYPE_CHECKING:
    from tracker.surgery.calibration.consumers import Consumer

FULL, SMALL = (
    4096,
    512,
)  # outputs up to which the whole matrix is taken, and up to which it is in any case


class CurvatureWatcher:
    """Sums of g gᵀ over all rows of a batch, g a probe of the loss's curvature at the outputs of each consumer.

    The mean over batches is the Gauss-Newton block of a consumer's outputs, positions taken for independent, as in
    K-FAC (Martens & Grosse, 2015; Grosse & Martens, 2016): Δloss ≈ ½ tr(ΔW E[x xᵀ] ΔWᵀ E[Σ g gᵀ]). Optimal Brain
    Surgeon (Hassibi & Stork, 1993) with that Hessian is what LLM Surgeon (van der Ouderaa et al., 2024) does.

    model: A copy whose parameters may be told to need no gradients; inside `with` it has hooks.
    wanted, kernel_positions: Consumers by their weights, and columns of each feature that they read.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Mapping[str, Consumer],
        kernel_positions: Mapping[str, int],
        objective: Objective,
    ) -> None:
        self._model, self._objective = model, objective
        self._sums = {
            name: _Sums(one, kernel_positions[name], model) for name, one in wanted.items()
        }
        self._batches, self._failed = 0, False
        self._batch: Any = None
        self._of_loss = False  # the gradients under way are those of the loss, not of a probe
        self._handles: list[Any] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def __enter__(self) -> CurvatureWatcher:
        for sums in self._sums.values():
            module = self._model.get_submodule(sums.one.module)
            self._handles.append(
                module.register_forward_hook(self._hook(sums), with_kwargs=True, prepend=True)
            )
        self._handles.append(self._model.register_forward_hook(self._sent_back))
        self._flags = [(p, p.requires_grad) for p in self._model.parameters()]
        for parameter, _ in self._flags:  # only what flows between layers
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    @contextmanager
    def expecting(self, batch: Any) -> Iterator[None]:
        """Inside, a pass of this batch is sent back; with None, none is."""
        self._batch = batch
        try:
            yield
        except StructureError as error:
            if isinstance(error.__cause__, SurgeryError):  # of the loss
                raise error.__cause__ from None
            raise
        finally:
            self._batch = None

    def mode(self) -> AbstractContextManager[Any]:
        """What the pass runs within."""
        return torch.enable_grad() if self._takes_gradients else nullcontext()

    def values(self, means: Mapping[str, Tensor]) -> dict[str, Sensitivity]:
        """By weight; empty where no gradients could be taken. `means`: of what each consumer reads, (columns,)."""
        if self._failed or not self._batches:
            return {}
        given = self._objective.loss is not None
        return {
            name: sums.value(self._batches, means[name], given=given)
            for name, sums in self._sums.items()
            if sums.squares is not None and name in means
        }

    @property
    def _takes_gradients(self) -> bool:
        return self._batch is not None and not self._failed

    def _sent_back(self, module: nn.Module, args: object, output: Any) -> None:
        # Inside the pass: afterwards its buffers are written to.
        if not self._takes_gradients:
            return
        self._objective.check(output, self._batch)
        try:
            self._take(output, torch.Generator().manual_seed(self._batches))
            self._batches += 1
        except (RuntimeError, NotImplementedError):  # an operation has no derivative
            self._failed = True

    def _take(self, output: Any, generator: torch.Generator) -> None:
        found = self._objective.probe(output, self._batch, generator)
        probes = [p for p in found if p.at.requires_grad]
        if self._objective.loss is not None:
            value = self._objective.loss(output, self._batch)
            if value.requires_grad:
                self._of_loss = True
                value.backward(retain_graph=bool(probes))
        self._of_loss = False
        if probes:
            torch.autograd.backward([p.at for p in probes], [p.direction for p in probes])

    def _hook(self, sums: _Sums) -> Callable[..., Any]:
        def hook(module: nn.Module, args: object, kwargs: object, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not self._takes_gradients:
                return None
            replaced = None
            if (
                not output.requires_grad
            ):  # the first of the network: from here on there are gradients
                output = replaced = output.detach().requires_grad_().clone()
            x = tensors_in((args, kwargs))[0].detach()
            version = x._version

            def arrived(gradient: Tensor) -> None:
                with torch.no_grad():
                    if not self._of_loss:
                        sums.add_probe(gradient)
                    elif sums.full:
                        sums.add_slope(gradient, module, x if x._version == version else None)

            output.register_hook(arrived)
            return replaced

        return hook


class _Sums:
    """What gradients say of one consumer, summed over batches."""

    def __init__(self, one: Consumer, kernel_positions: int, model: nn.Module) -> None:
        self.one, self._kernel_positions = one, kernel_positions
        weight = model.get_parameter(one.weight)
        columns = weight.shape[one.reads]
        # Of what only reads a narrow stream the diagonal will do.
        self.full = weight.shape[one.makes] <= min(FULL, max(columns, SMALL))
        self.squares: Tensor | None = None  # Σ g gᵀ, or its diagonal, of probes
        self._slope: Tensor | None = None  # Σ of the loss's gradient by the weight
        self._shift: Tensor | None = None  # and by the bias
        self._lost = False  # of what was read some is no more

    def add_probe(self, gradient: Tensor) -> None:
        """What the consumer was sent is a probe of the curvature."""
        rows = self._rows(gradient).float()
        own = (rows.T @ rows if self.full else rows.square().sum(0)).double()
        self.squares = own if self.squares is None else self.squares.add_(own)

    def add_slope(self, gradient: Tensor, module: nn.Module, x: Tensor | None) -> None:
        """What the consumer was sent is the gradient of the loss; `x`: what it had read, None where that is no more."""
        if x is None:
            self._lost = True
            return
        if is_linear(module):
            slope = self._rows(gradient).float().T @ self._rows(x).float()
        else:
            key = self.one.weight.rpartition(".")[2]
            weight = module.get_parameter(key).detach().requires_grad_()
            alone = copy.copy(module)  # its hooks are not to see this
            alone._parameters = {**module._parameters, key: weight}  # type: ignore[dict-item]
            with torch.enable_grad():
                again = alone.forward(x)
            slope = self.one.matrix(
                torch.autograd.grad(again, weight, gradient)[0], self._kernel_positions
            )
        shift = self._rows(gradient).sum(0, dtype=torch.float64).cpu()
        self._slope = slope.float() if self._slope is None else self._slope.add_(slope)
        self._shift = shift if self._shift is None else self._shift + shift

    def value(self, batches: int, mean: Tensor, *, given: bool) -> Sensitivity:
        """Means over batches. `mean`: of the columns that the consumer reads; `given`: the loss has a slope at all."""
        assert self.squares is not None
        slope = None
        if not given:
            slope = torch.zeros(0)
        elif self._slope is not None and self._shift is not None and not self._lost:
            slope = self._slope.double().cpu() / batches
            if self.one.bias is not None:
                shift = (self._shift / batches)[:, None, None] * mean.double()
                slope = (slope.view(len(shift), -1, slope.shape[1]) - shift).view_as(slope)
            slope = slope.float()
        return Sensitivity(self.squares.cpu() / batches, self.one.makes, slope)

    def _rows(self, tensor: Tensor) -> Tensor:
        moved = tensor.detach().movedim(self.one.axis, -1)
        return moved.reshape(-1, moved.shape[-1])


def eager() -> Any:
    """Compiled parts of a model run as they were written: their graphs know no hooks of ours."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def in_loss(weight: Tensor, curvature: Tensor) -> Tensor:
    """A consumer's weight as a matrix whose outputs are in units of the loss's square root: (rows, columns) float64.

    weight: (outputs · places, columns), outputs first. An error Δs of the result raises the loss by ‖Δs‖².
    """
    half = curvature.double() / 2
    outputs = weight.view(len(half), -1)
    if half.ndim == 1:
        return (half.clamp(min=0).sqrt()[:, None] * outputs).view(-1, weight.shape[1])
    if not bool((half.diagonal() > 0).any()):
        return torch.zeros_like(outputs).view(-1, weight.shape[1])
    return (cholesky(half).T @ outputs).view(-1, weight.shape[1])
