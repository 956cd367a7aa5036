"""Files that are broken, foreign or out to harm: each is refused, and nothing is changed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoint.runs import begun, fresh
from tests.surgery.subjects import equal, snapshot, train
from tracker import CheckpointError, NeuronEngine, apply_journal


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change a JSON file and make its hash right again: the content itself must be refused."""

    def do(folder: Path) -> None:
        file = folder / name
        data = json.loads(file.read_text())
        data = change(data) or data
        file.write_text(json.dumps(data))
        if name != "manifest.json":
            rehash(folder, name)

    return do


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return do


def flip(name: str, at: float) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * at)] ^= 0x10
        (folder / name).write_bytes(bytes(data))

    return do


def retable(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change tensors of a file and make its hash right again."""

    def do(folder: Path) -> None:
        file = folder / name
        table = load_file(str(file))
        table = {k: v.clone() for k, v in table.items()}
        change(table)
        save_file(table, str(file))
        rehash(folder, name)

    return do


def rehash(folder: Path, name: str) -> None:
    file = folder / name
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["files"][name]
    facts["bytes"] = file.stat().st_size
    facts["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def deep(folder: Path) -> None:
    (folder / J).write_text("[" * 10**6 + "]" * 10**6)
    rehash(folder, J)


def huge_number(folder: Path) -> None:
    (folder / J).write_text('{"schema_version": 1, "entries": ' + "9" * 10**5 + "}")
    rehash(folder, J)


def pipe(folder: Path) -> None:
    (folder / M).unlink()
    os.mkfifo(folder / M)


def device(folder: Path) -> None:
    (folder / J).unlink()
    (folder / J).symlink_to("/dev/zero")


def link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder / "elsewhere")


def folder_for_a_file(folder: Path) -> None:
    (folder / J).unlink()
    (folder / J).mkdir()


def endless_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(bytes(data))
    rehash(folder, "model.safetensors")


def claims_more_than_is_there(folder: Path) -> None:
    header = b'{"0.weight":{"dtype":"F32","shape":[100000,100000],"data_offsets":[0,40000000000]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    rehash(folder, "model.safetensors")


def wide_for_long(data: Any) -> None:
    """A thousand entries that each claim the widest axis, and fingerprints that fit."""
    entry = data["entries"][1]
    wide = {
        **entry,
        "slots": {"0.weight": {"0": [[-1, 2**24]], "1": [[-1, 2**24]]}},
        "before": entry["after"],
    }
    data["entries"] += [{**wide, "number": 3 + i, "after": entry["after"]} for i in range(1000)]


def ten_thousand_empty(data: Any) -> None:
    last = data["entries"][-1]
    empty = {
        **last,
        "slots": {},
        "layers": {},
        "attributes": [],
        "modules": {},
        "before": last["after"],
        "added_ids": [],
    }
    data["entries"] += [{**empty, "number": 3 + i} for i in range(10_000)]
    data["entries"][-1]["modules"] = {"nope": BYPASS}


def nested(depth: int) -> Any:
    return {"tuple": [nested(depth - 1)]} if depth else {"value": 1}


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(data: Any, *path: Any, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


FILES = (
    "manifest.json", "journal.json", "engine.json", "model.safetensors", "optimizer.safetensors",
    "statistics.safetensors", "random.safetensors",
)  # fmt: skip
J, G, M = "journal.json", "engine.json", "manifest.json"
FOREIGN = [["", ["__class__"], "__init__", None, 3]]
BYPASS = {"kind": "Bypass", "returns": "tensor", "scale": 1.0, "shift": 0.0}
BLOCK = {"kind": "ReluIdentity", "layer": "Linear", "width": 9}
GIGANTIC = {"0.inserted": {"kind": "ReluIdentity", "layer": "Linear", "width": 10**9}}
HOSTILE: dict[str, Callable[[Path], None]] = {
    **{f"no {f}": gone(f) for f in FILES},
    **{f"half of {f}": truncate(f, 0.5) for f in FILES},
    **{f"nothing of {f}": truncate(f, 0.0) for f in FILES},
    **{f"a bit of {f}": flip(f, 0.6) for f in FILES},
    "another format": edit(M, lambda d: put(d, "format", value="pickle")),
    "a future version": edit(M, lambda d: put(d, "version", value=2)),
    "a version of text": edit(M, lambda d: put(d, "version", value="1")),
    "a list for a manifest": edit(M, lambda d: [1, 2]),
    "a path that leads out": edit(M, lambda d: put(d, "files", "../../etc/passwd", value={})),
    "no files": edit(M, lambda d: put(d, "files", value={})),
    "a gigantic size": edit(M, lambda d: put(d, "files", J, "bytes", value=2**60)),
    "a size of NaN": edit(M, lambda d: put(d, "files", J, "bytes", value=float("nan"))),
    "no hash": edit(M, lambda d: put(d, "files", J, value={"bytes": 3})),
    "a future journal": edit(J, lambda d: put(d, "schema_version", value=9)),
    "a journal of text": edit(J, lambda d: "journal"),
    "entries of text": edit(J, lambda d: put(d, "entries", value="x")),
    "an unknown operation": edit(J, lambda d: put(d, "entries", 0, "operation", value="exec")),
    "negative slots": edit(J, lambda d: put(d, "entries", 0, "slots", "0.weight", "0", value=[[-7, 2]])),
    "a gigantic axis": edit(J, lambda d: put(d, "entries", 0, "slots", "0.weight", "0", value=[[-1, 2**40]])),
    "slots beyond the axis": edit(J, lambda d: put(d, "entries", 0, "slots", "0.weight", "0", value=[[90, 10]])),
    "slots of another tensor": edit(J, lambda d: put(d, "entries", 0, "slots", "nope", value={"0": [[0, 1]]})),
    "a dimension too many": edit(J, lambda d: put(d, "entries", 0, "slots", "0.weight", "7", value=[[0, 1]])),
    "a foreign attribute": edit(
        J, lambda d: put(d, "entries", 0, "attributes", value=FOREIGN)),
    "a foreign module": edit(J, lambda d: put(d, "entries", 0, "modules", value={"0.inserted": {"kind": "os.system"}})),
    "a bypass that multiplies with NaN": edit(
        J, lambda d: put(d, "entries", 0, "modules", value={"1": {**BYPASS, "scale": float("nan")}})),
    "a bypass that adds text": edit(
        J, lambda d: put(d, "entries", 0, "modules", value={"1": {**BYPASS, "shift": "1"}})),
    "a gigantic module": edit(J, lambda d: put(d, "entries", 0, "modules", value=GIGANTIC)),
    "another fingerprint": edit(J, lambda d: put(d, "entries", 0, "before", value="0" * 64)),
    "an entry left out": edit(J, lambda d: d["entries"].pop(0) and None),
    "an entry of null": edit(J, lambda d: put(d, "entries", 0, value=None)),
    "ids twice": edit(G, lambda d: put(d, "registry", "layers", "0", value=[1] * len(d["registry"]["layers"]["0"]))),
    "an id never given": edit(G, lambda d: put(d, "registry", "layers", "0", 0, value=10**9)),
    "too few ids": edit(G, lambda d: d["registry"]["layers"]["0"].pop() and None),
    "no registry": edit(G, lambda d: d.pop("registry") and None),
    "settings of nobody": edit(G, lambda d: put(d, "settings", value={"evil": 1})),
    "thresholds of text": edit(G, lambda d: put(d, "settings", "activation_threshold", value="x")),
    "another optimizer": edit(G, lambda d: put(d, "optimizers", 0, "class", value="SGD")),
    "two optimizers": edit(G, lambda d: d["optimizers"].append(d["optimizers"][0])),
    "a foreign parameter": edit(G, lambda d: put(d, "optimizers", 0, "groups", 0, "names", 0, value="nope")),
    "an alias to nowhere": edit(G, lambda d: put(d, "aliases", value={"0.weight": "nope"})),
    "no random states": edit(G, lambda d: put(d, "random", value={})),
    "random states of text": edit(G, lambda d: put(d, "random", "python", value="x")),
    "a history of text": edit(G, lambda d: put(d, "history", value="x")),
    "engine is a list": edit(G, lambda d: [1]),
    "a pipe for a manifest": pipe,
    "a device for a journal": device,
    "a link for the weights": link,
    "a folder for a journal": folder_for_a_file,
    "JSON without end": deep,
    "a number without end": huge_number,
    "a header without end": endless_header,
    "weights that are not there": claims_more_than_is_there,
    "a size that is true": edit(M, lambda d: put(d, "files", J, "bytes", value=True)),
    "gigantic axes a thousand times": edit(J, wide_for_long),
    "numbers out of order": edit(J, lambda d: put(d, "entries", 1, "number", value=1)),
    "entries that do not follow": edit(J, lambda d: put(d, "entries", 1, "before", value=d["entries"][0]["before"])),
    "a field too many": edit(J, lambda d: put(d, "entries", 0, "code", value="import os")),
    "a promise of nobody": edit(J, lambda d: put(d, "entries", 0, "promise", value="better")),
    "a time of nobody": edit(J, lambda d: put(d, "entries", 0, "time", value="yesterday")),
    "an empty axis": edit(J, lambda d: put(d, "entries", 0, "slots", "0.weight", "0", value=[])),
    "training for an attribute": edit(
        J, lambda d: put(d, "entries", 0, "attributes", value=[["", [], "training", None, 0]])),
    "hooks for an attribute": edit(
        J, lambda d: put(d, "entries", 0, "attributes", value=[["0", [], "_forward_hooks", None, 7]])),
    "a layer for an attribute": edit(
        J, lambda d: put(d, "entries", 0, "attributes", value=[["", ["_modules", "0"], "in_features", None, 7]])),
    "the model bypassed": edit(
        J, lambda d: put(d, "entries", 0, "modules", value={"": BYPASS})),
    "a bypass of nobody": edit(
        J, lambda d: put(d, "entries", 0, "modules", value={"9": BYPASS})),
    "a layer in the place of another": edit(
        J, lambda d: put(d, "entries", 0, "modules", value={"2": BLOCK})),
    "a parameter held twice": edit(
        G, lambda d: put(d, "optimizers", 0, "groups", 0, "names", 1, value="0.weight")),
    "parameters among the options": edit(
        G, lambda d: put(d, "optimizers", 0, "groups", 0, "options", "params", value=[])),
    "a learning rate of text": edit(G, lambda d: put(d, "optimizers", 0, "groups", 0, "options", "lr", value="fast")),
    "a learning rate of NaN": edit(
        G, lambda d: put(d, "optimizers", 0, "groups", 0, "options", "lr", value=float("nan"))),
    "optimizers of text": edit(G, lambda d: put(d, "optimizers", value="Adam")),
    "sites of another model": edit(G, lambda d: put(d, "sites", "ghost", value=d["sites"]["0"])),
    "a tap at no module": edit(G, lambda d: put(d, "sites", "0", "tap", value=["nope", -1, 1, "nope"])),
    "a ghost of a layer": edit(G, lambda d: put(d, "registry", "layers", "ghost", value=[])),
    "inputs of nobody": edit(G, lambda d: put(d, "inputs", value={"os.system": ["true"]})),
    "inputs without end": edit(
        G, lambda d: put(d, "inputs", value=nested(300))),
    "strides without end": edit(G, lambda d: put(d, "strides", "0.weight", value=[2**40, 2**40])),
    "a run of text": edit(G, lambda d: put(d, "run", value="x")),
    "a run of nobody": edit(G, lambda d: put(d, "run", value={"policy": {}})),
    "a policy of nobody": edit(G, lambda d: put(d, "run", value={"policy": {"evil": 1}})),
    "a policy of text": edit(G, lambda d: put(d, "run", value={"policy": {"warm_up": "x"}})),
    "a mode of nobody": edit(G, lambda d: put(d, "mode", value="turbo")),
    "a batch of text": edit(G, lambda d: put(d, "batch_dim", value="x")),
    "a weight of another shape": retable("model.safetensors", lambda t: t.update({"0.weight": torch.zeros(1, 1)})),
    "a weight of another dtype": retable(
        "model.safetensors", lambda t: t.update({"0.weight": t["0.weight"].double()})),
    "a weight too many": retable("model.safetensors", lambda t: t.update(more=torch.zeros(1))),
    "a weight too few": retable("model.safetensors", lambda t: t.pop("0.weight")),
    "moments of another shape": retable(
        "optimizer.safetensors", lambda t: t.update({"0/0.weight/exp_avg": torch.zeros(1, 6)})),
    "moments of nobody": retable(
        "optimizer.safetensors", lambda t: t.update({"0/nope/exp_avg": torch.zeros(1)})),
    "moments of a tenth optimizer": retable(
        "optimizer.safetensors", lambda t: t.update({"9/0.weight/exp_avg": torch.zeros(11, 6)})),
    "statistics of another shape": retable(
        "statistics.safetensors", lambda t: t.update({next(k for k in t if "activity" in k): torch.zeros(9, 1)})),
    "statistics of nobody": retable(
        "statistics.safetensors", lambda t: t.update({"activity/train/nope": torch.zeros(9, 4)})),
    "half a covariance": retable(
        "statistics.safetensors", lambda t: t.pop(next(k for k in t if k.endswith("/comoment")))),
    "a covariance of another shape": retable(
        "statistics.safetensors",
        lambda t: t.update({next(k for k in t if k.endswith("/comoment")): torch.zeros(2, 2).double()})),
    "statistics of another type": retable(
        "statistics.safetensors",
        lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if k.startswith("activity")})),
    "statistics of fewer rows": retable(
        "statistics.safetensors", lambda t: t.update({k: v[:1] for k, v in t.items() if k.startswith("activity")})),
    "statistics of less than nothing": retable(
        "statistics.safetensors", lambda t: t.update({k: -v - 1 for k, v in t.items() if k.startswith("activity")})),
    "a covariance of another type": retable(
        "statistics.safetensors",
        lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if k.startswith("covariance")})),
    "scalar moments": retable(
        "optimizer.safetensors",
        lambda t: t.update({k: torch.zeros(()) for k in t if "exp_avg" in k})),
    "moments of another type": retable(
        "optimizer.safetensors", lambda t: t.update({k: v.half() for k, v in t.items() if "exp_avg" in k})),
    "half the moments": retable(
        "optimizer.safetensors", lambda t: [t.pop(k) for k in list(t) if k.endswith("exp_avg_sq")]),
    "steps of infinity": retable(
        "optimizer.safetensors", lambda t: t.update({k: v / 0 for k, v in t.items() if k.endswith("/step")})),
    "an accuracy of text": edit(
        G, lambda d: put(d, "history", "neuron_histories", "2", "accuracy", 0, value="x")),
    "a loss of another epoch": edit(
        G, lambda d: put(d, "history", "neuron_histories", "2", "loss", 0, value=7.5)),
    "a block of another layer": edit(G, lambda d: put(d, "registry", "blocks", 0, 1, value="2")),
    "a block from elsewhere": edit(G, lambda d: put(d, "registry", "blocks", 0, 0, value=1)),
    "a block of half a number": edit(G, lambda d: put(d, "registry", "blocks", 0, 0, value=0.5)),
    "new neurons of nobody": edit(J, lambda d: put(d, "entries", 1, "added_ids", value=[999])),
    "gone neurons that live": edit(J, lambda d: put(d, "entries", 0, "removed_ids", value=[1])),
    "a hundred thousand entries": edit(J, lambda d: put(d, "entries", value=[d["entries"][0]] * 100_001)),
    "ten thousand empty entries": edit(J, ten_thousand_empty),
    "a policy of a class that is not here": edit(
        G, lambda d: put(d, "run", value={"policy": {"class": "os:system"}})),
    "no noise": retable("random.safetensors", lambda t: t.clear()),
    "noise of another length": retable("random.safetensors", lambda t: t.update(torch=torch.zeros(3).byte())),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _model, _, engine, _ = begun("mlp")
    engine.prune_neurons({"0": [0, 3]})
    engine.expand_layer("0", 1)
    return engine.save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "run")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_change_nothing(name: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    HOSTILE[name](folder)
    model, opt, x = fresh("mlp", "Adam")
    train(model, opt, x)
    before, noise = copy.deepcopy(snapshot(model, opt)), states_of_noise()
    hooks, options = hooks_of(model, opt), copy.deepcopy(groups_of(opt))
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        NeuronEngine.load_checkpoint(folder, model, opt)
    assert time.process_time() - start < 2
    assert str(caught.value)
    assert equal(snapshot(model, opt), before)
    assert equal(states_of_noise(), noise)
    assert hooks_of(model, opt) == hooks
    assert groups_of(opt) == options


def states_of_noise() -> list[Any]:
    numpy: Any = np.random.get_state()
    return [torch.get_rng_state(), random.getstate(), numpy[1].tolist(), numpy[2:]]


def hooks_of(model: nn.Module, opt: torch.optim.Optimizer) -> list[list[Any]]:
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    tables += [opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks]
    return [list(t.values()) for t in tables]


def groups_of(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]


def test_another_model_is_refused(saved: Path) -> None:
    for name in ("conv", "gated"):
        model, opt, _ = fresh(name, "Adam")
        before = snapshot(model, opt)
        with pytest.raises(CheckpointError, match="does not fit this model"):
            NeuronEngine.load_checkpoint(saved, model, opt)
        assert equal(snapshot(model, opt), before)
    with pytest.raises(CheckpointError, match="No checkpoint can be read"):
        apply_journal(nn.Linear(2, 2), saved.parent / "nothing")
