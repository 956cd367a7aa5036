"""Models to measure, and what to feed them: randomly initialised, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _others import OTHERS, others
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@dataclass(frozen=True)
class Built:
    """A model, and one call of it."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    watch: tuple[str, ...] = ()  # modules whose outputs are compared as well
    blocks: tuple[str, ...] = ()  # that Torch-Pruning's examples ignore
    taught: tuple[Any, ...] = ()  # the arguments of a call in train mode, where they are others


@dataclass(frozen=True)
class Family:
    """Models of one package: their names, and how to build one."""

    package: str
    names: Callable[[], list[str]]
    build: Callable[[str], Built]
    about: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def build(family: str, name: str) -> Built:
    """One model with a call of it, from the present state of torch's random numbers."""
    return FAMILIES[family].build(name)


def image(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


# torchvision

# 630 and 640 million parameters: with the copies that a trial makes, more than 10 GB.
HUGE = ("vit_h_14", "regnet_y_128gf")
# The auxiliary head of Inception v3 needs its full size.
SIZES = {"inception_v3": 299, "inception_v4": 96, "maxvit_t": 224}


def by_kind(names: list[str]) -> list[str]:
    """One of each architecture first, so that a limit leaves no kind out."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.split(r"[\d_]", name)[0], []).append(name)
    rounds = max(len(k) for k in kinds.values())
    return [k[i] for i in range(rounds) for k in kinds.values() if i < len(k)]


def of_torchvision(part: str) -> Callable[[], list[str]]:
    def names() -> list[str]:
        import torchvision

        module = getattr(torchvision.models, part) if part else torchvision.models
        found = torchvision.models.list_models(module=module)
        return by_kind([n for n in found if n not in HUGE])

    return names


def classifier(name: str) -> Built:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    size = SIZES.get(name, 64)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # quicker; the auxiliary heads stay, as by default
    if name.startswith("vit"):
        options["image_size"] = size
    return Built(torchvision.models.get_model(name, **options), (image(size),))


def segmenter(name: str) -> Built:
    import torchvision

    options = {"weights": None, "weights_backbone": None, "num_classes": 21}
    return Built(torchvision.models.get_model(name, **options), (image(64),))


def detector(name: str) -> Built:
    import torchvision

    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}
    if not name.startswith("ssd"):  # these have one size
        options |= {"min_size": 96, "max_size": 96}
    if "rcnn" in name:  # boxes of untrained heads must not be thresholded away
        options |= {
            "box_score_thresh": 0.0,
            "box_detections_per_img": 5,
            "rpn_post_nms_top_n_test": 20,
        }
    else:
        options |= {"score_thresh": 0.0, "detections_per_img": 5}
    if not name.startswith("ssd"):
        options["trainable_backbone_layers"] = 6 if "mobilenet" in name else 5
    model = torchvision.models.get_model(name, **options)
    # Boxes are sorted by scores that may tie: the heads are compared before that.
    watch = ("rpn.head",) if "rcnn" in name else ("head",)
    blocks = {
        "ssd": ("head",),
        "fcos": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg",
                 "head.regression_head.bbox_ctrness"),
        "retinanet": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
        "faster": ("rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn", "roi_heads"),
        "keypoint": ("rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn.layer_blocks", "roi_heads.box_head",
                     "roi_heads.box_predictor", "roi_heads.keypoint_predictor"),
        "mask": ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor",
                 "roi_heads.mask_predictor"),
    }  # fmt: skip
    ignored = next(v for k, v in blocks.items() if name.startswith(k))
    size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 96)
    images = [torch.rand(3, size, size), torch.rand(3, size, size)]
    return Built(model, (images,), {}, watch, ignored, (images, targets(size, 2)))


def targets(size: int, images: int) -> list[dict[str, torch.Tensor]]:
    """One object in each image, as a detector is taught: a box, its class, its mask and its keypoints."""
    corner, end = size // 4, 3 * size // 4
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, corner:end, corner:end] = 1
    keypoints = torch.tensor([corner + 1.0, corner + 1.0, 1.0]).expand(1, 17, 3)
    one = {
        "boxes": torch.tensor([[corner, corner, end, end]], dtype=torch.float32),
        "labels": torch.tensor([1]),
        "masks": mask,
        "keypoints": keypoints.clone(),
    }
    return [dict(one) for _ in range(images)]


def film(name: str) -> Built:
    import torchvision

    frames, size = (16, 224) if name.startswith(("mvit", "s3d")) else (8, 64)
    model = torchvision.models.get_model(name, weights=None)
    return Built(model, (torch.randn(1 if size == 224 else 2, 3, frames, size, size),))


# timm

TIMM_NAMES = """
resnet18 resnet26d resnext50_32x4d seresnet18 skresnet18 res2net50_26w_4s densenet121 dla34 hrnet_w18_small
efficientnet_lite0 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_100 mnasnet_small fbnetc_100
tinynet_e regnetx_002 regnety_002 repvgg_a0 convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs
mobileone_s0 fastvit_t8 repghostnet_050 vovnet39a darknet17 cspresnet50 rexnet_100 nf_resnet26 xception41
poolformer_s12 vit_tiny_patch16_224 deit_tiny_patch16_224 levit_128s cait_xxs24_224 mixer_s32_224
resmlp_12_224 gmlp_ti16_224 swin_tiny_patch4_window7_224 pvt_v2_b0 crossvit_tiny_240 twins_svt_small
xcit_nano_12_p16_224 efficientformer_l1 eva02_tiny_patch14_224 lcnet_050 inception_next_atto starnet_s1
tiny_vit_5m_224 mambaout_femto hgnetv2_b0 dpn48b selecsls42b nfnet_l0 resnetv2_50 visformer_tiny pit_ti_224
convit_tiny coat_lite_tiny maxvit_pico_rw_256 focalnet_tiny_srf davit_tiny hiera_tiny_224 mvitv2_tiny
gcvit_xxtiny nest_tiny volo_d1_224 sequencer2d_s repvit_m0_9 efficientvit_b0 efficientvit_m0
efficientformerv2_s0 swiftformer_xs fasternet_t0 shvit_s1 nextvit_small vitamin_small_224 convmixer_768_32
resnest14d ese_vovnet19b_dw inception_v4 hardcorenas_a mobilevitv2_050 swinv2_tiny_window8_256
beit_base_patch16_224 vit_relpos_small_patch16_224 caformer_s18 rdnet_tiny
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
    "tiny_vit", "visformer", "pit", "convit", "coat", "maxvit", "focalnet", "davit", "hiera", "mvitv2", "gcvit", "nest",
    "volo", "sequencer", "vitamin", "nextvit",
)  # fmt: skip


def of_timm(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=10)
    size = model.default_cfg["input_size"][-1]
    fixed = name.startswith(TIMM_FULL) or any(
        k in name for k in ("_patch", "cait", "xcit", "formerv2", "efficientvit_m")
    )
    return Built(model, (image(size if fixed else SIZES.get(name, 64)),))


# transformers

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
# Four heads of queries share keys and values: with two, Torch-Pruning's graph has no end (llama_pairs).
GQA = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 80}
GQA |= {"num_attention_heads": 8, "num_key_value_heads": 2}
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
    "llama_pairs": ("LlamaConfig", "LlamaForCausalLM", {**GQA, "num_key_value_heads": 4}, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", GQA, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", SHAPE, "text"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GQA, **IDS, "num_key_value_heads": 8}, "text"),
    "phi3_gqa": ("Phi3Config", "Phi3ForCausalLM", {**GQA, **IDS}, "text"),
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
    # fused and interleaved queries, keys and values; grouped and multi-query; experts; state spaces; latent attention
    "falcon_gqa": ("FalconConfig", "FalconForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 64,
        "new_decoder_architecture": True}, "text"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**GPT, "multi_query": True}, "text"),
    "llama_mha": ("LlamaConfig", "LlamaForCausalLM", {**SHAPE, "tie_word_embeddings": True}, "text"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "glm": ("GlmConfig", "GlmForCausalLM", {**GQA, **IDS, "head_dim": 8}, "text"),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", GQA, "text"),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", SHAPE, "text"),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {**GPT, "dff": 64}, "text"),
    "openai_gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT, "text"),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**GQA, "num_experts": 4, "num_experts_per_tok": 2}, "text"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {
        **GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32}, "text"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        **GQA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "text"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {
        **GQA, **IDS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "text"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {
        **SHAPE, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}, "text"),
    "recurrent_gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {
        **SHAPE, "num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
        "text"),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}, "text"),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "context_length": 64}, "text"),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {**GQA, **IDS, "layer_types": ["conv", "full_attention"]}, "text"),
    "esm": ("EsmConfig", "EsmForMaskedLM", {**SHAPE, **IDS, "mask_token_id": 3}, "text"),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBertForMaskedLM", {**SHAPE, "embedding_size": 32}, "text"),
    "roformer": ("RoFormerConfig", "RoFormerForMaskedLM", SHAPE, "text"),
    "convbert": ("ConvBertConfig", "ConvBertForMaskedLM", {**SHAPE, "embedding_size": 32}, "text"),
    "funnel": ("FunnelConfig", "FunnelForMaskedLM", {
        "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1,
        "vocab_size": 64}, "text"),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", SEQ2SEQ, "pair"),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", SEQ2SEQ, "pair"),
    "switch": ("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_experts": 4, "num_heads": 4, "vocab_size": 64}, "pairs"),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4],
        "window_size": 4}, "image"),
    "poolformer": ("PoolFormerConfig", "PoolFormerForImageClassification", {
        "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}, "image64"),
    "pvt_v2": ("PvtV2Config", "PvtV2ForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}, "image64"),
    "regnet": ("RegNetConfig", "RegNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "groups_width": 8}, "image64"),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {
        "image_size": 64, "depth_multiplier": 0.35}, "image64"),
    "yolos": ("YolosConfig", "YolosForObjectDetection", {
        **SHAPE, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 6}, "image"),
    "ast": ("ASTConfig", "ASTForAudioClassification", {
        **SHAPE, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
        "spectrum"),
    "wavlm": ("WavLMConfig", "WavLMForCTC", SPEECH, "sound"),
    "sew": ("SEWConfig", "SEWForCTC", {**SPEECH, "squeeze_factor": 2}, "sound"),
    "vilt": ("ViltConfig", "ViltModel", {**SHAPE, **MAPS, "max_image_length": 16}, "text+image"),
    "blip": ("BlipConfig", "BlipForConditionalGeneration", {
        "text_config": {**SHAPE, **IDS, "encoder_hidden_size": 32, "is_decoder": True, "sep_token_id": 2},
        "vision_config": {**SHAPE, **MAPS}, "projection_dim": 16}, "text+image"),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", {
        "text_config": {"model_type": "llama", **GQA},
        "vision_config": {"model_type": "clip_vision_model", **SHAPE, **MAPS},
        "image_token_id": 63}, "pictures"),
}  # fmt: skip


def of_transformers(name: str) -> Built:
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
        "spectrum": {"input_values": torch.randn(2, 32, 16)},
        "mel": {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids},
        "text+image": {"input_ids": ids, "pixel_values": image(32)},
        # 16 patches of the picture take 16 places among the tokens.
        "pictures": {
            "input_ids": torch.cat([torch.full((2, 16), 63), ids], 1),
            "pixel_values": image(32),
        },
        # So many that each expert is chosen.
        "pairs": {
            "input_ids": torch.randint(3, 60, (16, 12)),
            "decoder_input_ids": torch.randint(3, 60, (16, 7)),
        },
    }
    return Built(built, (), inputs[fed])


# Depth: does the time grow with the number of layers alone?

DEPTHS = (8, 16, 32)


def deep(name: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": int(name.rpartition("_")[2])})
    return Built(
        transformers.LlamaForCausalLM(config), (), {"input_ids": torch.randint(3, 60, (2, 12))}
    )


def of_zoo(name: str) -> Built:
    from tests.zoo import ZOO

    return Built(ZOO[name].build(), ZOO[name].inputs())


def zoo_names() -> list[str]:
    from tests.zoo import ZOO

    return [name for name, entry in ZOO.items() if not entry.slow]


def of_others(name: str) -> Built:
    model, inputs = OTHERS[name]()
    return Built(model, (), inputs) if isinstance(inputs, dict) else Built(model, inputs)


FAMILIES = {
    "zoo": Family("torch", zoo_names, of_zoo, "hand-made models of every wiring that the tests know, tests/zoo.py"),
    "classification": Family(
        "torchvision", of_torchvision(""), classifier,
        "torchvision's classification models in their own size; two small images (mostly 64 × 64)",
    ),
    "segmentation": Family("torchvision", of_torchvision("segmentation"), segmenter, "torchvision's, 64 × 64"),
    "detection": Family(
        "torchvision", of_torchvision("detection"), detector,
        "torchvision's, two images of 96 × 96 (300 and 320 for SSD); heads are compared too, before boxes are sorted",
    ),
    "video": Family("torchvision", of_torchvision("video"), film, "torchvision's, clips of 8 or 16 frames"),
    "transformers": Family(
        "transformers", lambda: list(HF), of_transformers,
        "transformers, tiny random configurations (two layers, width 32 or 64)",
    ),
    "timm": Family("timm", TIMM_NAMES.split, of_timm, "timm, small variants in their own size"),
    "others": Family(
        "torch", others, of_others,
        "small models of fifteen packages that ship model code of their own, those that are installed",
    ),
    "depth": Family(
        "transformers", lambda: [f"llama_{n}" for n in DEPTHS], deep, "tiny Llamas of 8, 16 and 32 layers"
    ),
}  # fmt: skip

# What continuous integration runs: a few minutes on one core, whatever is installed.
SUBSET = {
    "classification": [
        "resnet18",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "mnasnet0_5",
    ],
    "segmentation": ["lraspp_mobilenet_v3_large"],
    "transformers": ["gpt2", "llama", "bert", "t5", "mixtral", "mamba", "vit"],
    "timm": ["mobilenetv4_conv_small", "starnet_s1", "lcnet_050"],
}
