"""How much of well-known models the structure covers: three families of architectures, randomly initialised.

For each model: groups found, the share of its parameters in prunable groups before and after the trial (in which a
part of each group is removed from a copy and compared with the masked model), what was refused and why, and the time
both took. Nothing is downloaded. What fails is in the table, with what it failed with.

    python benchmarks/coverage.py                                # what is installed of: torchvision, hf, timm
    python benchmarks/coverage.py --family hf --only gpt2,llama
    python benchmarks/coverage.py --limit torchvision=40 --write  # and docs/coverage.md
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
from tqdm import tqdm

from tracker.probe import arguments
from tracker.structure import trace_structure
from tracker.structure.trial import try_groups
from tracker.structure.units import coverage

PAGE = ROOT / "docs" / "coverage.md"
Built = tuple[nn.Module, Any]


@dataclass(slots=True)
class Result:
    """What came of one model."""

    family: str
    name: str
    error: str = (
        ""  # building, tracing or the trial failed, or the time was up: which, and with what
    )
    parameters: int = 0
    groups: int = 0
    before: float | None = None
    after: float | None = None
    refused: Counter[str] = field(default_factory=Counter)  # reason → groups, by the trial
    frozen: Counter[str] = field(default_factory=Counter)  # reason → dimensions of tensors
    trace_seconds: float | None = None
    trial_seconds: float | None = None


class TimeUpError(BaseException):
    """No `Exception`: the trial takes those for properties of the model."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        # Once more soon, in case that this one is swallowed.
        signal.alarm(5)
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure(family: str, name: str, seconds: int) -> Result:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result, stage = Result(family, name), "build"
    try:
        with at_most(seconds):
            torch.manual_seed(0)
            model, inputs = FAMILIES[family].build(name)
            result.parameters = sum(p.numel() for p in model.parameters())
            stage, start = "trace", time.perf_counter()
            structure = trace_structure(model, inputs, trial=False)
            result.trace_seconds = time.perf_counter() - start
            result.groups, result.before = len(structure.groups), structure.coverage
            result.frozen.update(brief(f.reason) for f in structure.frozen)
            stage, start = "trial", time.perf_counter()
            groups = try_groups(model, arguments(inputs), structure.groups, structure.integers)
            result.trial_seconds = time.perf_counter() - start
            result.after = coverage(model, groups)
            tried = zip(structure.groups, groups, strict=True)
            result.refused.update(brief(g.reason) for b, g in tried if b.prunable > g.prunable)
    except TimeUpError:
        result.error = f"{stage}: not done within {seconds} s"
    except Exception as error:
        result.error = (
            f"{stage}: {brief(type(error).__name__ + ': ' + str(error))} {raised_at(error)}"
        )
    return result


def raised_at(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.lineno}: {frame.line})"


def brief(reason: str) -> str:
    """A reason that many groups can share: in one line, no directories, no module's name, no sizes of tensors."""
    text = " ".join(reason.split())
    text = re.sub(r"(?:/[\w.+@-]+)+/(?=[\w.+-])", "", text)
    text = re.sub(r"\bin (?:the model|[\w.-]+) \((?=[\w<>.]+:\d+: )", "(", text)
    return re.sub(r"\d\.\de[+-]\d\d", "…", text) if "masked" in text else text


# Families


@dataclass(frozen=True)
class Family:
    """Models of one package: their names, and how to build one with example inputs."""

    package: str
    names: Callable[[], list[str]]
    build: Callable[[str], Built]
    about: str


def image(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


# Too much for a copy in float64 in seconds.
HUGE = ("vit_h_14", "regnet_y_128gf", "vit_l_16", "vit_l_32")
SIZES = {"inception_v3": 96, "alexnet": 64, "maxvit_t": 224, "googlenet": 64}


def torchvision_names() -> list[str]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    names = [n for n in names if n not in HUGE]
    # One of each architecture first, so that a limit leaves no kind out.
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.split(r"[\d_]", name)[0], []).append(name)
    rounds = max(len(k) for k in kinds.values())
    return [k[i] for i in range(rounds) for k in kinds.values() if i < len(k)]


def torchvision_build(name: str) -> Built:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    size = SIZES.get(name, 64)
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    if name.startswith("vit"):
        options["image_size"] = size
    return torchvision.models.get_model(name, **options), image(size)


TIMM_NAMES = """
resnet18 resnet26d resnext50_32x4d seresnet18 skresnet18 res2net50_26w_4s densenet121 dla34 hrnet_w18_small
efficientnet_lite0 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_100 mnasnet_small fbnetc_100 tinynet_e
regnetx_002 regnety_002 repvgg_a0 convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs mobileone_s0
fastvit_t8 repghostnet_050 vovnet39a darknet17 cspresnet50 rexnet_100 nf_resnet26 xception41 poolformer_s12
vit_tiny_patch16_224 deit_tiny_patch16_224 levit_128s cait_xxs24_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224
swin_tiny_patch4_window7_224 pvt_v2_b0 crossvit_tiny_240 twins_svt_small xcit_nano_12_p16_224 efficientformer_l1
eva02_tiny_patch14_224 lcnet_050 inception_next_atto starnet_s1 tiny_vit_5m_224 mambaout_femto
"""
TIMM_FULL = (
    "swin",
    "twins",
    "crossvit",
    "levit",
    "efficientformer",
    "mixer",
    "resmlp",
    "gmlp",
    "tiny_vit",
)


def timm_build(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=10)
    size = model.default_cfg["input_size"][-1]
    fixed = name.startswith(TIMM_FULL) or "_patch" in name or "cait" in name or "xcit" in name
    return model, image(size if fixed else 64, 1 if fixed else 2)


# Tiny configurations, by the names that most of them share.
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SHAPE |= {"vocab_size": 64, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
GQA = {**SHAPE, "num_key_value_heads": 2}
MAPS = {"image_size": 32, "patch_size": 8, "num_channels": 3}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64,
           "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
SPEECH = {**{k: v for k, v in SHAPE.items() if k != "max_position_embeddings"}, "conv_dim": (16, 16),
          "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
TOWERS = {"text_config": {**SHAPE, **IDS}, "vision_config": {**SHAPE, **MAPS}}
# name: (configuration, model, options, what it is fed)
HF: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, "text"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", GQA, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", SHAPE, "text"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GQA, **IDS}, "text"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SHAPE, "text"),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]]}, "text"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, "text"),
    "opt": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64,
        "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}, "text"),
    "bloom": ("BloomConfig", "BloomForCausalLM", {
        "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "text"),
    "falcon": ("FalconConfig", "FalconForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}, "text"),
    "mpt": ("MptConfig", "MptForCausalLM", {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64}, "text"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GQA, "num_local_experts": 4}, "text"),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", GQA, "text"),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", GQA, "text"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GQA, "text"),
    "cohere": ("CohereConfig", "CohereForCausalLM", GQA, "text"),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GQA, "text"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**GQA, **IDS}, "text"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", GQA, "text"),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, "text"),
    "mamba": ("MambaConfig", "MambaForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}, "text"),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "num_heads": 8,
        "head_dim": 8, "n_groups": 2, "chunk_size": 8}, "text"),
    "bert": ("BertConfig", "BertForMaskedLM", SHAPE, "text"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SHAPE, "text"),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", SHAPE, "text"),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {
        "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 64,
        "max_position_embeddings": 64}, "text"),
    "electra": ("ElectraConfig", "ElectraForPreTraining", {**SHAPE, "embedding_size": 16}, "text"),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**SHAPE, "embedding_size": 16}, "text"),
    "deberta_v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", {
        **SHAPE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "text"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {
        **SHAPE, **IDS, "cls_token_id": 1, "sep_token_id": 2}, "text"),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", SHAPE, "text"),
    "fnet": ("FNetConfig", "FNetForMaskedLM", SHAPE, "text"),
    "xlnet": ("XLNetConfig", "XLNetLMHeadModel", {
        "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 64}, "text"),
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}, "pair"),
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ, "pair"),
    "marian": ("MarianConfig", "MarianMTModel", {**SEQ2SEQ, "pad_token_id": 0}, "pair"),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", SEQ2SEQ, "pair"),
    "vit": ("ViTConfig", "ViTForImageClassification", {**SHAPE, **MAPS}, "image"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {**SHAPE, **MAPS}, "image"),
    "beit": ("BeitConfig", "BeitForImageClassification", {**SHAPE, **MAPS}, "image"),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**SHAPE, **MAPS}, "image"),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification", {
        "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}, "image64"),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2ForImageClassification", {
        "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}, "image64"),
    "swin": ("SwinConfig", "SwinForImageClassification", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4],
        "window_size": 4}, "image"),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 2]}, "image64"),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
        "image64"),
    "segformer": ("SegformerConfig", "SegformerForImageClassification", {
        "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
        "image64"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH, "sound"),
    "hubert": ("HubertConfig", "HubertForCTC", SPEECH, "sound"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, **IDS,
        "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32}, "mel"),
    "clip": ("CLIPConfig", "CLIPModel", {**TOWERS, "projection_dim": 16}, "text+image"),
    "siglip": ("SiglipConfig", "SiglipModel", TOWERS, "text+image"),
}  # fmt: skip


def hf_build(name: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()
    config, model, options, fed = HF[name]
    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    ids = torch.randint(3, 60, (2, 12))
    inputs: dict[str, Any] = {
        "text": {"input_ids": ids},
        "pair": {"input_ids": ids, "decoder_input_ids": torch.randint(3, 60, (2, 7))},
        "image": {"pixel_values": image(32)},
        "image64": {"pixel_values": image(64)},
        "sound": {"input_values": torch.randn(2, 800)},
        "mel": {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids},
        "text+image": {"input_ids": ids, "pixel_values": image(32)},
    }
    return built, inputs[fed]


FAMILIES = {
    "torchvision": Family(
        "torchvision", torchvision_names, torchvision_build,
        "torchvision's classification models in their own size, small images (mostly 64 × 64)",
    ),
    "hf": Family(
        "transformers", lambda: list(HF), hf_build, "transformers, tiny random configurations (two layers, width 32)"
    ),
    "timm": Family("timm", TIMM_NAMES.split, timm_build, "timm, small variants in their own size"),
}  # fmt: skip


# The run, and what it says


def run(tasks: Sequence[tuple[str, str]], seconds: int, jobs: int) -> list[Result]:
    results = []
    with ProcessPoolExecutor(jobs) as pool:
        futures = [(f, n, pool.submit(measure, f, n, seconds)) for f, n in tasks]
        for family, name, future in tqdm(futures, disable=None):
            try:
                result = future.result()
            except BrokenProcessPool as error:
                result = Result(family, name, f"not run: {error}")
            results.append(result)
            tqdm.write(row(result, " ", family=True))
    return results


def row(r: Result, separator: str, family: bool = False) -> str:
    first = f"{r.family}/{r.name}" if family else r.name
    share = [f"{v:.1%}" if v is not None else "-" for v in (r.before, r.after)]
    clock = [f"{v:.1f}" if v is not None else "-" for v in (r.trace_seconds, r.trial_seconds)]
    note = cell(r.error) or "; ".join(f"{cell(k)} ({n})" for k, n in r.refused.most_common(1))
    traced = "yes" if r.before is not None else "no"
    cells = [traced, f"{r.groups}", *share, f"{r.refused.total()}", *clock]
    widths = (6, 6, 7, 7, 7, 6, 6)
    if separator == " ":
        return (
            f"{first:<36}"
            + " ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
            + f"  {note}"
        )
    return "| " + " | ".join([first, *cells, note]) + " |"


def cell(text: str, most: int = 170) -> str:
    """Fit for a cell of a table."""
    text = text.removeprefix("the model's code does not follow a removal: ").replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1] + "…"


def totals(results: Sequence[Result]) -> list[str]:
    """Counts, and the share in prunable groups, in each family."""
    lines = []
    for family in dict.fromkeys(r.family for r in results):
        mine = [r for r in results if r.family == family]
        before = [r.before for r in mine if r.before is not None]
        after = [r.after for r in mine if r.after is not None]
        cells = [
            family,
            f"{len(mine)}",
            f"{len(before)}",
            f"{len(after)}",
            f"{sum(r.groups for r in mine)}",
            f"{sum(r.refused.total() for r in mine)}",
            f"{fmean(before):.1%}" if before else "-",
            f"{fmean(after):.1%} ({median(after):.1%}, {min(after):.1%})" if after else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def most_frequent(counters: Sequence[Counter[str]], count: int) -> list[str]:
    """Reasons, by the number of models in which they occur."""
    models: Counter[str] = Counter(reason for c in counters for reason in c)
    places: Counter[str] = sum(counters, Counter())
    return [f"| {cell(r, 220)} | {n} | {places[r]} |" for r, n in models.most_common(count)]


def without_rule(results: Sequence[Result]) -> list[Counter[str]]:
    """Operations that no rule understands, of each model."""
    found = []
    for r in results:
        mine: Counter[str] = Counter()
        for reason, n in r.frozen.items():
            if match := re.match(r"not understood: (\S+)", reason):
                mine[match[1]] += n
        found.append(mine)
    return found


def kinds_of_refusal(results: Sequence[Result]) -> list[Counter[str]]:
    """What the trial found, of each model, without the line."""
    found = []
    for r in results:
        mine: Counter[str] = Counter()
        for reason, n in r.refused.items():
            kind = re.sub(r"'?\[[^\]]*\]'?", "[…]", re.sub(r" \([\w<>.]+\.py:\d+: .*", "", reason))
            mine[re.sub(r"\d+", "N", kind)] += n
        found.append(mine)
    return found


def page(results: Sequence[Result], missing: Sequence[str], seconds: int) -> str:
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}"
        for p in dict.fromkeys(["torch", *(FAMILIES[r.family].package for r in results)])
    )
    done = [r for r in results if r.after is not None]
    lines = [
        "# Coverage",
        "",
        f"Written by `python benchmarks/coverage.py --write` on {datetime.date.today().isoformat()} with",
        f"{versions}; randomly initialised models, one CPU thread each,",
        f"at most {seconds} s for each model.",
        f"{len(results)} models were run: {sum(r.before is not None for r in results)} were traced, "
        f"{len(done)} went through the trial too.",
        *[f"\n{m}" for m in missing],
        "",
        "A share is that of the model's parameters that lie in prunable groups, as the rules see it (before) and",
        "when the trial has refused what the model's own code does not follow (after). What both mean:",
        "[structure.md](structure.md).",
        "",
        "| family | models | traced | tried | groups | refused by the trial | mean share before "
        "| mean share after (median, least) |",
        "|---|---|---|---|---|---|---|---|",
        *totals(results),
        "",
        "Seconds depend on the machine, and on what else ran on it.",
    ]
    for family in dict.fromkeys(r.family for r in results):
        lines += [
            "",
            f"## {family}",
            "",
            f"{FAMILIES[family].about[0].upper()}{FAMILIES[family].about[1:]}.",
            "",
            "| model | traced | groups | before | after | refused | trace, s | trial, s "
            "| error, or the most frequent refusal |",
            "|---|---|---|---|---|---|---|---|---|",
            *[row(r, "|") for r in results if r.family == family],
        ]
    for title, counters, what in (
        ("Why the trial refused", kinds_of_refusal(results), "groups"),
        ("Operations without a rule", without_rule(results), "dimensions frozen"),
        ("Why dimensions are frozen", [r.frozen for r in results], "dimensions frozen"),
    ):
        if found := most_frequent(counters, 20):
            lines += [
                "",
                f"## {title}",
                "",
                f"The most frequent, by models.\n\n| | models | {what} |",
            ]
            lines += ["|---|---|---|", *found]
    return "\n".join(lines) + "\n"


def limits(text: str) -> dict[str, int]:
    if text.isdecimal():
        return dict.fromkeys(FAMILIES, int(text))
    return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    parser.add_argument(
        "--limit", type=limits, default={}, help="models at most: 40, or timm=40,hf=10"
    )
    parser.add_argument("--seconds", type=int, default=20, help="for each model, at most")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    options = parser.parse_args()
    only, tasks, missing = {n for n in options.only.split(",") if n}, [], []
    for name in options.family or FAMILIES:
        family = FAMILIES[name]
        if importlib.util.find_spec(family.package) is None:
            missing.append(
                f"Family {name} was skipped: the package {family.package} is not installed."
            )
            continue
        importlib.import_module(family.package)  # once, before the processes fork
        names = [n for n in family.names() if not only or n in only]
        tasks += [(name, n) for n in names[: options.limit.get(name)]]
    print(*missing, sep="\n", end="\n" if missing else "")
    head = ("traced", "groups", "before", "after", "refused", "trace", "trial")
    print(
        f"{'model':<36}"
        + " ".join(f"{h:>{w}}" for h, w in zip(head, (6, 6, 7, 7, 7, 6, 6), strict=True))
    )
    results = run(tasks, options.seconds, options.jobs)
    print(
        "",
        "family, models, traced, tried, groups, refused, mean before, mean after (median, least)",
        sep="\n",
    )
    print(*totals(results), sep="\n")
    if options.write:
        PAGE.write_text(page(results, missing, options.seconds), encoding="utf-8")
        print(f"Written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
