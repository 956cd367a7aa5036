"""Replicas of a model in several processes: what one saw, all saw, and all change alike or none does.

Every call here is a collective: all ranks make it, in the same order, or all wait.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tracker.errors import SurgeryError, VerificationError
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.observation.hooks import LayerStatistics, Observer
from tracker.statistics import Activity, ActivityStream, Covariance, CovarianceStream
from tracker.statistics.activity import ROWS
from tracker.surgery.optimizer_state.moments import unwrapped
from tracker.surgery.plan import Plan

MODES = (False, True)


class Ranks:
    """The processes of a group (None: all), each with its replica."""

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise SurgeryError(
                "There are no other processes: call torch.distributed.init_process_group first."
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = "nccl" in dist.get_backend(group)
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        )
        self._first = dist.get_global_rank(group, 0) if group is not None else 0

    # Words

    def texts(self, text: str) -> list[str]:
        """What each rank says, in the order of ranks."""
        data = text.encode()
        sizes = self._gather(torch.tensor([len(data)]))
        longest = max(int(s) for s in sizes)
        if not longest:
            return [""] * self.size
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        return [
            bytes(part[: int(size)].tolist()).decode()
            for part, size in zip(self._gather(padded), sizes, strict=True)
        ]

    def broadcast_value(self, value: Any) -> Any:
        """What the first rank has, of plain data."""
        return json.loads(self.texts(json.dumps(value) if self.rank == 0 else "")[0])

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What happens inside succeeds on all ranks, or fails on all.

        Raises:
            SurgeryError: On another rank it failed. (Where it failed, its own error is raised.)
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.texts("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = next((rank for rank, text in enumerate(said) if text), None)
        if failed is not None:
            raise SurgeryError(
                f"{what} failed on rank {failed}, so no rank changed: {said[failed]}"
            )

    def require_same(self, text: str, what: str) -> None:
        """Refuse where ranks say different things.

        Raises:
            VerificationError: They do; the message tells which.
        """
        said = self.texts(hashlib.sha256(text.encode()).hexdigest())
        other = next((rank for rank, each in enumerate(said) if each != said[0]), None)
        if other is not None:
            raise VerificationError(
                f"{what} of rank {other} is not that of rank 0: nothing was changed. Replicas begin with the same "
                "weights, see changes in the same order, and share what they observed (merge_statistics, calibrate)."
            )

    # Numbers

    def mean(self, value: float) -> float:
        """Mean over ranks; those without a number do not count."""
        found = torch.cat(self._gather(torch.tensor([value], dtype=torch.float64)))
        found = found[~found.isnan()]
        return float(found.mean()) if len(found) else float("nan")

    def means(self, values: Tensor) -> Tensor:
        """Mean over ranks of each of several numbers, (numbers,); ranks that have fewer lack the first ones."""
        most = int(torch.cat(self._gather(torch.tensor([len(values)]))).max())
        padded = torch.full((most,), float("nan"), dtype=torch.float64)
        padded[most - len(values) :] = values
        return torch.stack(self._gather(padded)).nanmean(0)

    def sync_plan(self, plan: Plan) -> None:
        """Compare what the ranks are about to do, and take the first rank's numbers.

        Raises:
            VerificationError: They are not about to do the same.
        """
        self.require_same(_words(plan), f"The plan of {plan.operation}")
        for tensor in _numbers(plan):
            tensor.copy_(self._from_first(tensor))

    def require_same_model(self, model: nn.Module, optimizers: Sequence[Any] = ()) -> None:
        """Refuse where parameters, or optimizers' states of them, are not bit for bit those of the first rank.

        Raises:
            VerificationError: They are not.
        """
        digest, names = hashlib.sha256(), dict[Tensor, str]()
        for name, p in model.named_parameters():
            names[p] = name
            _take_in(digest, name, p)
        self.require_same(digest.hexdigest(), "The model")
        for number, optimizer in enumerate(unwrapped(optimizers)):
            digest = hashlib.sha256(type(optimizer).__name__.encode())
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = optimizer.state.get(p, {})
                    for key in sorted(state):
                        _take_in(digest, f"{names.get(p)} {key}", state[key])
            self.require_same(digest.hexdigest(), f"The state of optimizer {number}")

    # Statistics

    def merge_windows(self, observer: Observer) -> None:
        """Give each rank the statistics of all: counts, moments and extremes of layers, and their correlation."""
        points = [s for s in observer.points if s.shares_with is None]
        widths = [[float(s.neurons or 0)] for s in points]
        held = [[float(_covered(s.windows.get(mode))) for mode in MODES] for s in points]
        samples = [[float(observer.samples.get(mode, 0)) for mode in MODES]]
        facts = torch.tensor(
            [*(w + h for w, h in zip(widths, held, strict=True)), [0.0, *samples[0]]]
        )
        every = torch.stack(self._gather(facts.double()))
        observer.samples = {
            m: int(every[:, -1, 1 + i].sum())
            for i, m in enumerate(MODES)
            if every[:, -1, 1 + i].any()
        }
        for i, point in enumerate(points):
            if not point.neurons or not every[:, i, 0].all():
                continue  # of a custom layer that some rank has not seen yet
            for j, mode in enumerate(MODES):
                most = int(every[:, i, 1 + j].max())
                if most:
                    own = point.windows.get(mode)
                    point.windows[mode] = self._window(
                        own, point.neurons, most > 1, observer.threshold
                    )
        observer.version += 1

    def merge_reads(self, reads: Mapping[str, ConsumerInput]) -> dict[str, ConsumerInput]:
        """What the consumers of all ranks read, by their weights' names."""
        names = sorted(
            {n for text in self.texts(json.dumps(sorted(reads))) for n in json.loads(text)}
        )
        merged = {}
        for name in names:
            own = reads.get(name)
            facts = torch.tensor(
                [0, 0, 0]
                if own is None
                else [len(own.covariance.mean), own.dim, own.kernel_positions]
            )
            width, dim, kernel_positions = torch.stack(self._gather(facts)).max(0).values.tolist()
            covariance = None if own is None else own.covariance
            merged[name] = ConsumerInput(dim, self._covariance(covariance, width), kernel_positions)
        return merged

    def sums(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all ranks of tensors that all have."""
        found = {}
        for name in sorted(products):
            sent = products[name].to(self._device, copy=True)
            dist.all_reduce(sent, group=self.group)
            found[name] = sent.cpu()
        return found

    def _window(
        self, own: LayerStatistics | None, neurons: int, correlated: bool, threshold: float
    ) -> LayerStatistics:
        value = Activity.empty(neurons) if own is None else own.activity.value()
        tables = torch.stack(self._gather(value.table.cpu()), 1)
        assert tables.shape == (ROWS, self.size, neurons)
        activity = ActivityStream.resumed(Activity.fold(tables, dim=1), threshold)
        if not correlated:
            return LayerStatistics(activity, None)
        covariance = None if own is None or own.covariance is None else own.covariance.value()
        return LayerStatistics(
            activity, CovarianceStream.resumed(self._covariance(covariance, neurons))
        )

    def _covariance(self, own: Covariance | None, width: int) -> Covariance:
        """Σ of all ranks' co-moments, each with its mean's distance from the whole's (Chan et al., 1983, pairwise)."""
        own = Covariance.empty(width) if own is None else own
        mine = torch.stack((own.count.double().cpu(), own.mean.cpu()))
        counts, means = torch.stack(self._gather(mine)).unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count.clamp(min=1)
        row = (own.mean.cpu() - mean) * own.count.cpu().sqrt()
        comoment = torch.addr(own.comoment.cpu(), row, row).to(self._device)
        dist.all_reduce(comoment, group=self.group)
        return Covariance(count.long(), mean, comoment.cpu())

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        mine = tensor.contiguous().to(self._device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return [part.cpu() for part in parts]

    def _from_first(self, tensor: Tensor) -> Tensor:
        sent = tensor.detach().contiguous().to(self._device, copy=True)
        dist.broadcast(sent, self._first, group=self.group)
        return sent.to(tensor.device)


def renew(wrapper: DistributedDataParallel) -> DistributedDataParallel:
    """A new wrapper, with the options of the old one, around its module, which has changed shape.

    The old wrapper lets go of the parameters and cannot be used any more: `model = renew(model)`.

    Args:
        wrapper: The one that was made before the change.

    Raises:
        SurgeryError: It is no DistributedDataParallel.

    Examples:
        >>> from tracker import renew
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> wrapper = DistributedDataParallel(model)  # doctest: +SKIP
        >>> if engine.step(0.5) is not None:  # a change
        ...     wrapper = renew(wrapper)
    """
    if not isinstance(wrapper, DistributedDataParallel):
        raise SurgeryError(f"renew takes a DistributedDataParallel, not {type(wrapper).__name__}.")
    options = {
        "device_ids": wrapper.device_ids,
        "output_device": wrapper.output_device,
        "dim": wrapper.dim,
        "process_group": wrapper.process_group,
        "bucket_cap_mb": wrapper.bucket_bytes_cap / 2**20,
        "find_unused_parameters": wrapper.find_unused_parameters,
        "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
        "static_graph": wrapper.static_graph,
    }
    module, watched = (
        wrapper.module,
        any(isinstance(h, StaleWrapperGuard) for h in wrapper._forward_pre_hooks.values()),
    )
    # Its hooks on the parameters go with it; without them it would reduce gradients of the old shapes.
    wrapper.__dict__.pop("logger", None)
    wrapper.__dict__.pop("reducer", None)
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()  # it may lie in a bucket of the old one
    if not wrapper.broadcast_buffers:
        options["broadcast_buffers"] = False
    with warnings.catch_warnings():  # its other name, since torch 2.14, would still copy them once
        warnings.simplefilter("ignore", FutureWarning)
        fresh = DistributedDataParallel(module, **options)
    if watched:
        watch_wrapper(fresh)
    return fresh


class StaleWrapperGuard:
    """Stands at a wrapper's door and refuses a pass once its parameters were replaced.

    The wrapper reduces gradients through the accumulators that its parameters had when it was made. A change gives a
    parameter another one, even where its shape stays: then ranks would go apart without a word.
    """

    def __init__(self, wrapper: nn.Module) -> None:
        self._accumulators = _accumulators(wrapper)

    def __call__(self, wrapper: nn.Module, args: object) -> None:
        """Forward pre-hook.

        Raises:
            SurgeryError: The wrapper does not know its parameters any more.
        """
        if torch.compiler.is_compiling():  # a change of shapes recompiles, and is seen before
            return
        now, known = _accumulators(wrapper), self._accumulators
        if len(now) != len(known) or any(a is not b for a, b in zip(now, known, strict=True)):
            raise SurgeryError(
                "The model was changed behind its DistributedDataParallel wrapper, which would leave ranks with "
                "different weights. Wrap it anew: model = tracker.renew(model)."
            )


def refuse_alone(ranks: Ranks | None) -> None:
    """Refuse a change of one replica where there are others.

    Raises:
        SurgeryError: Several processes run, and no group of them was attached.
    """
    if (
        ranks is None
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        raise SurgeryError(
            f"{dist.get_world_size()} processes run (torch.distributed is initialised), and this one would change its "
            "replica alone. Call engine.attach_process_group() on all of them; for a model that is only here, attach "
            "a group of this process: attach_process_group(group), made by torch.distributed.new_group on all ranks."
        )


class WrapperFinder:
    """Stands at a module's door, and has the wrapper that first runs it refuse once its module changed shape."""

    def __call__(self, module: nn.Module, args: object) -> None:
        """Forward pre-hook."""
        if torch.compiler.is_compiling():
            return
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is not None and wrapper.module is module:
            watch_wrapper(wrapper)


def watch_wrapper(model: nn.Module) -> None:
    """Have a DistributedDataParallel, at the door or behind `torch.compile`, refuse once its module changed shape."""
    inner: object = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, DistributedDataParallel):
            if not any(
                isinstance(hook, StaleWrapperGuard) for hook in inner._forward_pre_hooks.values()
            ):
                inner.register_forward_pre_hook(StaleWrapperGuard(inner), prepend=True)
            return
        inner = getattr(inner, "_orig_mod", None)


def _accumulators(wrapper: nn.Module) -> list[object]:
    """Where the gradients of its parameters arrive: autograd's own nodes, new after each `set_`."""
    with torch.inference_mode(False), torch.enable_grad():
        views = [p.view_as(p).grad_fn for p in wrapper.parameters() if p.requires_grad]
        return [view.next_functions[0][0] for view in views if view is not None]


def _take_in(digest: Any, name: str, value: Any) -> None:
    """Add a tensor's shape and bytes, or a plain value, to a hash."""
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    flat = value.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().tobytes())


def _covered(window: LayerStatistics | None) -> int:
    return 0 if window is None else 1 if window.covariance is None else 2


def _words(plan: Plan) -> str:
    """All of a plan that is no number of a tensor, as text that is equal where plans are."""
    mixes = [
        (
            m.tensor,
            m.dim,
            m.across,
            m.source,
            m.target,
            m.bias,
            m.kernel_positions,
            tuple(m.matrix.shape),
        )
        for m in plan.mixes
    ]
    return repr(
        (
            plan.operation,
            sorted((name, tuple(units)) for name, units in plan.units.items()),
            _sorted(
                {n: {d: s.source for d, s in dims.items()} for n, dims in plan.tensors.items()}
            ),
            _sorted({n: s.source for n, s in plan.layers.items()}),
            plan.removed_ids,
            sorted(mixes, key=repr),
            sorted((str(a), v) for a, v in plan.attributes.items()),
            sorted((n, tuple(t.shape)) for n, t in plan.fresh.items()),
            sorted((n, repr(m)) for n, m in plan.modules.items()),
        )
    )


def _sorted(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    return sorted((name, repr(value)) for name, value in table.items())


def _numbers(plan: Plan) -> Iterable[Tensor]:
    """The tensors that a plan brings, in the same order on all ranks."""
    for mix in sorted(plan.mixes, key=lambda m: m.tensor):
        yield from (mix.matrix, mix.shift)
    for name in sorted(plan.fresh):
        yield plan.fresh[name]
    for name in sorted(plan.gains):
        yield from _in_order(plan.gains[name])
    for name in sorted(plan.modules):
        yield from (t.data for t in plan.modules[name].state_dict().values())


def _in_order(table: Mapping[int, Tensor]) -> Sequence[Tensor]:
    return [table[key] for key in sorted(table)]
