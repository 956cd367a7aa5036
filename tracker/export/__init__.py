"""Ways out: a changed model as other tools take it, each run and compared with the model in memory."""

from tracker.export.gguf import to_gguf
from tracker.export.hugging_face import to_hugging_face
from tracker.export.onnx import to_onnx
from tracker.export.plain import to_plain
from tracker.export.record import Exported
from tracker.export.registry import register_exporter

__all__ = ["Exported", "register_exporter", "to_gguf", "to_hugging_face", "to_onnx", "to_plain"]
