"""Models of packages with model code of their own: segmentation, diffusion, graphs, tables, speech, detectors.

Small configurations, randomly initialised, in the way that each package's own examples build them. A package that is
not installed is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[
    nn.Module, Any
]  # a model, and the arguments of a call: a tuple, or a dict of keyword arguments


def ids(most: int, *size: int) -> torch.Tensor:
    return torch.randint(0, most, size)


def made(path: str, call: Callable[[], Any], *args: Any, **kwargs: Any) -> Callable[[], Built]:
    """The class at `path` with these arguments, and what it is called with."""

    def build() -> Built:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)(*args, **kwargs), call()

    return build


def images(size: int, channels: int = 3, batch: int = 2) -> Callable[[], Any]:
    return lambda: (torch.randn(batch, channels, size, size),)


def values(*size: int) -> Callable[[], Any]:
    return lambda: (torch.randn(size),)


OTHERS: dict[str, Callable[[], Built]] = {}


def other(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def add(build: Callable[[], Built]) -> Callable[[], Built]:
        OTHERS[name] = build
        return build

    return add


def others() -> list[str]:
    """Names of those whose package is installed; the part before the dot is the package."""
    return [name for name in OTHERS if importlib.util.find_spec(name.partition(".")[0])]


# Segmentation

SEGMENTERS = (
    "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer"
)
for _name in SEGMENTERS.split():
    OTHERS[f"segmentation_models_pytorch.{_name}"] = made(
        f"segmentation_models_pytorch.{_name}",
        images(128 if _name == "PAN" else 64),
        "resnet18",
        encoder_weights=None,
        # A second head, which only training reads.
        **({"aux_params": {"classes": 3}} if _name == "Unet" else {}),
    )

FLAT = {"spatial_dims": 2}
SIDES = {**FLAT, "in_channels": 1, "out_channels": 2}
DEEP = {**FLAT, "features": (8, 8, 16, 16, 32, 8), "deep_supervision": True}
for _name, _size, _options in (
    ("UNet", 32, {**SIDES, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1}),
    ("BasicUNet", 32, {**SIDES, "features": (8, 8, 16, 16, 32, 8)}),
    ("BasicUNetPlusPlus", 32, DEEP),
    ("SegResNet", 32, {**FLAT, "init_filters": 8}),
    ("SegResNetDS", 32, {**FLAT, "init_filters": 8, "dsdepth": 2}),
    ("AttentionUnet", 32, {**SIDES, "channels": (8, 16, 32), "strides": (2, 2)}),
    ("VNet", 32, FLAT),
    ("HighResNet", 16, FLAT),
    (
        "DynUNet",
        32,
        {**SIDES, "kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3}
        | {"deep_supervision": True, "deep_supr_num": 1},
    ),
    (
        "UNETR",
        32,
        {**SIDES, "img_size": (32, 32), "feature_size": 8, "hidden_size": 32, "mlp_dim": 64}
        | {"num_heads": 4},
    ),
):
    OTHERS[f"monai.{_name}"] = made(f"monai.networks.nets.{_name}", images(_size, 1), **_options)

# Diffusion

STEPS = {"timestep": torch.tensor([3, 7])}
LEVELS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
AUTOENCODER = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
OTHERS |= {
    "diffusers.UNet2DModel": made(
        "diffusers.UNet2DModel",
        lambda: {"sample": torch.randn(2, 3, 16, 16), **STEPS},
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **LEVELS,
    ),
    "diffusers.UNet2DConditionModel": made(
        "diffusers.UNet2DConditionModel",
        lambda: {
            "sample": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 5, 24),
            **STEPS,
        },
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        **LEVELS,
    ),
    "diffusers.AutoencoderKL": made("diffusers.AutoencoderKL", images(16), **AUTOENCODER),
    "diffusers.VQModel": made("diffusers.VQModel", images(16), **AUTOENCODER),
    "diffusers.DiTTransformer2DModel": made(
        "diffusers.DiTTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "class_labels": torch.tensor([1, 2]),
            **STEPS,
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ),
    "denoising_diffusion_pytorch.Unet": made(
        "denoising_diffusion_pytorch.Unet",
        lambda: (torch.randn(2, 3, 16, 16), torch.tensor([3, 7])),
        dim=16,
        dim_mults=(1, 2),
    ),
    "denoising_diffusion_pytorch.Unet1D": made(
        "denoising_diffusion_pytorch.Unet1D",
        lambda: (torch.randn(2, 4, 32), torch.tensor([3, 7])),
        dim=16,
        dim_mults=(1, 2),
        channels=4,
    ),
}

# Graphs, tables, recommenders

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
for _name in ("GCN", "GraphSAGE", "GIN", "GAT"):
    OTHERS[f"torch_geometric.{_name}"] = made(
        f"torch_geometric.nn.{_name}", lambda: (torch.randn(6, 8), EDGES), 8, 16, 3, 4, dropout=0.1
    )
for _name, _options in (
    ("GAT", {"v2": True, "heads": 2}),
    ("EdgeCNN", {}),
    ("PMLP", {}),
):
    OTHERS[f"torch_geometric.{_name}{'v2' if 'v2' in _options else ''}"] = made(
        f"torch_geometric.nn.{_name}",
        lambda: {"x": torch.randn(6, 8), "edge_index": EDGES},
        8,
        16,
        3,
        2,
        **_options,
    )
OTHERS["torch_geometric.GraphUNet"] = made(
    "torch_geometric.nn.GraphUNet", lambda: (torch.randn(6, 8), EDGES), 8, 16, 4, 2
)
OTHERS["egnn_pytorch.EGNN"] = made(
    "egnn_pytorch.EGNN_Network", lambda: (ids(9, 2, 6), torch.randn(2, 6, 3)), num_tokens=9, dim=16, depth=2,
    num_nearest_neighbors=3,
)  # fmt: skip


def recommender(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import deepctr_torch.models as models
        from deepctr_torch.inputs import DenseFeat, SparseFeat

        features = [
            SparseFeat(f"item{i}", vocabulary_size=10, embedding_dim=4) for i in range(3)
        ] + [DenseFeat("price", 2)]
        tables = (features,) if name == "PNN" else (features, features)
        options = {} if name == "AFM" else {"dnn_hidden_units": (16, 8)}
        rows = torch.cat([ids(10, 8, 3).float(), torch.randn(8, 2)], 1)
        return getattr(models, name)(*tables, **options), (rows,)

    return build


for _name in [
    "DeepFM",
    "xDeepFM",
    "DCN",
    "DCNMix",
    "AutoInt",
    "PNN",
    "NFM",
    "AFM",
    "WDL",
    "FiBiNET",
    "IFM",
    "ONN",
]:
    OTHERS[f"deepctr_torch.{_name}"] = recommender(_name)
for _name, _options in (
    ("TabNet", {"input_dim": 10, "output_dim": 3}),
    ("TabNetPretraining", {"input_dim": 10}),
):
    OTHERS[f"pytorch_tabnet.{_name}"] = made(
        f"pytorch_tabnet.tab_network.{_name}",
        values(8, 10),
        n_steps=2,
        group_attention_matrix=torch.eye(10),
        **_options,
    )


FIELDS = {"embed_dim": 8, "mlp_dims": (16, 8)}
for _name, _options in (
    ("afi.AutomaticFeatureInteractionModel", {"atten_embed_dim": 8, "num_heads": 2, "num_layers": 2}
     | {"dropouts": (0.1,) * 3}),
    ("fnfm.FieldAwareNeuralFactorizationMachineModel", {"dropouts": (0.1, 0.1)}),
    ("dcn.DeepCrossNetworkModel", {"num_layers": 2, "dropout": 0.1}),
    ("xdfm.ExtremeDeepFactorizationMachineModel", {"dropout": 0.1, "cross_layer_sizes": (8, 8)}),
):  # fmt: skip
    OTHERS[f"torchfm.{_name.partition('.')[0]}"] = made(
        f"torchfm.model.{_name}", lambda: (ids(5, 4, 3),), [5, 6, 7], **FIELDS, **_options
    )
OTHERS["rtdl_revisiting_models.ResNet"] = made(
    "rtdl_revisiting_models.ResNet", values(4, 6), d_in=6, d_out=2, n_blocks=2, d_block=16, d_hidden=24,
    d_hidden_multiplier=None, dropout1=0.1, dropout2=0.1,
)  # fmt: skip
OTHERS["g_mlp_pytorch.gMLP"] = made(
    "g_mlp_pytorch.gMLP",
    lambda: (ids(32, 2, 8),),
    num_tokens=32,
    dim=16,
    depth=2,
    seq_len=8,
    causal=True,
)


class Flow(nn.Module):
    """Two masked autoregressive layers: their weights are masked before each use."""

    def __init__(self) -> None:
        super().__init__()
        from nflows.transforms import (
            CompositeTransform,
            MaskedAffineAutoregressiveTransform,
            ReversePermutation,
        )

        layers = [
            layer
            for _ in range(2)
            for layer in (
                ReversePermutation(6),
                MaskedAffineAutoregressiveTransform(features=6, hidden_features=16),
            )
        ]
        self.transform = CompositeTransform(layers)

    def forward(self, x: torch.Tensor) -> Any:
        return self.transform(x)


@other("nflows.MAF")
def _() -> Built:
    return Flow(), (torch.randn(4, 6),)


# Transformers written in other ways

CLASSIFIER = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "mlp_dim": 64}
STAGES = {"num_classes": 10, "depth": (1, 1, 1, 1)}
for _path, _size, _options in (
    ("ViT", 32, {**CLASSIFIER, "depth": 2, "heads": 4, "dropout": 0.1}),
    ("SimpleViT", 32, {**CLASSIFIER, "depth": 2, "heads": 4}),
    ("deepvit.DeepViT", 32, {**CLASSIFIER, "depth": 2, "heads": 4}),
    ("cait.CaiT", 32, {**CLASSIFIER, "depth": 2, "cls_depth": 1, "heads": 4, "layer_dropout": 0.05}),
    ("pit.PiT", 32, {**CLASSIFIER, "depth": (1, 1), "heads": 4}),
    ("levit.LeViT", 64, {"image_size": 64, "num_classes": 10, "stages": 2, "dim": (32, 48)}
     | {"depth": 2, "heads": (2, 3), "mlp_mult": 2}),
    ("cvt.CvT", 64, {"num_classes": 10, "s1_emb_dim": 16, "s2_emb_dim": 32, "s2_heads": 2}
     | {"s3_emb_dim": 32, "s3_heads": 2, "s3_depth": 2}),
    ("regionvit.RegionViT", 64, {**STAGES, "dim": (16, 32, 48, 64), "window_size": 2}),
    ("scalable_vit.ScalableViT", 64, {**STAGES, "dim": 16, "heads": (2,) * 4, "ssa_dim_key": (8,) * 4}
     | {"reduction_factor": (4, 2, 2, 1), "window_size": (2, 2, None, None), "dropout": 0.1}),
    ("max_vit.MaxViT", 64, {"num_classes": 10, "dim_conv_stem": 16, "dim": 16, "dim_head": 8}
     | {"depth": (1, 1), "window_size": 4, "mbconv_expansion_rate": 2}),
    ("mobile_vit.MobileViT", 64, {"image_size": (64, 64), "dims": [16, 24, 32], "num_classes": 10}
     | {"channels": [8, 8, 16, 16, 16, 16, 24, 24, 32, 32, 48]}),
    ("cct.CCT", 32, {"img_size": (32, 32), "embedding_dim": 32, "n_conv_layers": 1, "num_layers": 2}
     | {"num_heads": 4, "mlp_ratio": 2.0, "num_classes": 10, "positional_embedding": "learnable"}),
    ("xcit.XCiT", 32, {**CLASSIFIER, "depth": 2, "cls_depth": 1, "heads": 4}),
):  # fmt: skip
    OTHERS[f"vit_pytorch.{_path.rpartition('.')[2]}"] = made(
        f"vit_pytorch.{_path}", images(_size), **_options
    )


def wrapped(kind: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import x_transformers

        layers = getattr(x_transformers, kind)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
        model = x_transformers.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers)
        return model, (ids(64, 2, 12),)

    return build


OTHERS |= {
    "x_transformers.decoder": wrapped("Decoder"),
    "x_transformers.modern": wrapped(
        "Decoder", rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True, attn_kv_heads=2
    ),
    "x_transformers.dropout": wrapped(
        "Encoder", layer_dropout=0.2, attn_dropout=0.1, ff_dropout=0.1
    ),
    "perceiver_pytorch.PerceiverIO": made(
        "perceiver_pytorch.PerceiverIO",
        lambda: {"data": torch.randn(2, 10, 16), "queries": torch.randn(3, 8)},
        dim=16,
        queries_dim=8,
        logits_dim=5,
        depth=2,
        num_latents=6,
        latent_dim=24,
        cross_heads=1,
        latent_heads=2,
        cross_dim_head=8,
        latent_dim_head=8,
        decoder_ff=True,
    ),
    "conformer.Conformer": made(
        "conformer.Conformer",
        values(2, 12, 16),
        dim=16,
        depth=2,
        dim_head=8,
        heads=2,
        ff_mult=2,
        conv_kernel_size=7,
        attn_dropout=0.1,
    ),
    "open_clip.CLIP": made(
        "open_clip.model.CLIP",
        lambda: (torch.randn(2, 3, 32, 32), ids(64, 2, 16)),
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
    ),
}


@other("peft.LoRA")
def _() -> Built:
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=64,
    )
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], lora_dropout=0.1
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    return model, {"input_ids": ids(64, 2, 12)}


# Sound

OTHERS |= {
    "torchaudio.Conformer": made(
        "torchaudio.models.Conformer",
        lambda: (torch.randn(2, 20, 32), torch.tensor([20, 16])),
        input_dim=32,
        num_heads=4,
        ffn_dim=64,
        num_layers=2,
        depthwise_conv_kernel_size=7,
    ),
    "torchaudio.ConvTasNet": made(
        "torchaudio.models.ConvTasNet",
        values(2, 1, 400),
        enc_num_feats=32,
        msk_num_feats=16,
        msk_num_hidden_feats=32,
        msk_num_layers=2,
        msk_num_stacks=1,
    ),
    "torchaudio.DeepSpeech": made(
        "torchaudio.models.DeepSpeech", values(2, 1, 10, 16), n_feature=16, n_hidden=32
    ),
    "torchaudio.Tacotron2": made(
        "torchaudio.models.Tacotron2",
        lambda: (
            ids(20, 2, 9),
            torch.tensor([9, 7]),
            torch.randn(2, 8, 12),
            torch.tensor([12, 10]),
        ),
        n_mels=8,
        n_symbol=20,
        symbol_embedding_dim=16,
        encoder_embedding_dim=16,
        attention_rnn_dim=32,
        attention_hidden_dim=16,
        decoder_rnn_dim=32,
        prenet_dim=16,
        postnet_embedding_dim=16,
    ),
    "speechbrain.ECAPA_TDNN": made(
        "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
        values(2, 20, 16),
        16,
        channels=[32, 32, 32, 32, 96],
        lin_neurons=16,
        attention_channels=16,
        se_channels=16,
        res2net_scale=4,
    ),
    "speechbrain.CRDNN": made(
        "speechbrain.lobes.models.CRDNN.CRDNN",
        values(2, 20, 16),
        input_shape=[2, 20, 16],
        cnn_blocks=1,
        cnn_channels=[8],
        rnn_layers=1,
        rnn_neurons=16,
        dnn_blocks=1,
        dnn_neurons=16,
    ),
    "demucs.Demucs": made(
        "demucs.demucs.Demucs", values(2, 2, 2000), ["a"], channels=8, depth=3, lstm_layers=1
    ),
    "openunmix.OpenUnmix": made(
        "openunmix.model.OpenUnmix",
        lambda: (torch.rand(2, 2, 65, 10),),
        nb_bins=65,
        nb_channels=2,
        hidden_size=32,
        nb_layers=1,
    ),
}


@other("encodec.EncodecModel")
def _() -> Built:
    from encodec.model import EncodecModel
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    sides: dict[str, Any] = {"channels": 1, "dimension": 16, "n_filters": 4, "ratios": [4, 2]}
    quantizer = ResidualVectorQuantizer(dimension=16, n_q=2, bins=16)
    model = EncodecModel(SEANetEncoder(**sides), SEANetDecoder(**sides), quantizer, [1.5], 8000, 1)
    return model, (torch.randn(2, 1, 800),)


# Detectors, faces, restoration, descriptors


def yolo(name: str, kind: str) -> Callable[[], Built]:
    return made(f"ultralytics.nn.tasks.{kind}", images(64), f"{name}.yaml", nc=3, verbose=False)


OTHERS |= {
    "ultralytics.yolov5n": yolo("yolov5n", "DetectionModel"),
    "ultralytics.yolov8n": yolo("yolov8n", "DetectionModel"),
    "ultralytics.yolov10n": yolo("yolov10n", "DetectionModel"),
    "ultralytics.yolo11n": yolo("yolo11n", "DetectionModel"),
    "ultralytics.yolov8n-seg": yolo("yolov8n-seg", "SegmentationModel"),
    "ultralytics.yolov8n-pose": yolo("yolov8n-pose", "PoseModel"),
    "facenet_pytorch.InceptionResnetV1": made(
        "facenet_pytorch.InceptionResnetV1", images(96), classify=True, num_classes=5
    ),
    "kornia.HardNet": made("kornia.feature.HardNet", images(32, 1), False),
    "kornia.TFeat": made("kornia.feature.TFeat", images(32, 1), False),
}


class Quantised(nn.Module):
    """An autoencoder with a codebook, whose entries training moves by hand."""

    def __init__(self) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.encode = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 8, 1))
        self.quantise = VectorQuantize(dim=8, codebook_size=16)
        self.decode = nn.Sequential(nn.Conv1d(8, 16, 1), nn.ReLU(), nn.Conv1d(16, 4, 3, padding=1))

    def forward(self, x: torch.Tensor) -> Any:
        codes, _, loss = self.quantise(self.encode(x).transpose(1, 2))
        return self.decode(codes.transpose(1, 2)), loss


@other("vector_quantize_pytorch.autoencoder")
def _() -> Built:
    return Quantised(), (torch.randn(2, 4, 20),)
