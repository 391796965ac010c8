"""Folders with a tiny model and data, as each trainer wants them. Nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from integrations.tiny import folder_of_lora, leaves

ROWS = 16
# Some trainers ask for the memory limit of a Mac's GPU, which a CPU does not have.
LIKE_A_MAC = """
import mlx.core as mx

info = mx.device_info
mx.device_info = mx.metal.device_info = lambda *args: {"max_recommended_working_set_size": 1 << 30, **info(*args)}
mx.set_wired_limit = lambda limit: 0
"""
TINY_QWEN: dict[str, Any] = {"model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
TINY_QWEN |= {"num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
TINY_QWEN |= {"vocab_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}
TEXT = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 65}
TEXT |= {"num_attention_heads": 2, "rms_norm_eps": 1e-5}
VISION = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}
TINY_LLAVA: dict[str, Any] = {"model_type": "llava", "image_token_index": 64, "vocab_size": 65, "eos_token_id": 63}
TINY_LLAVA |= {"vision_feature_layer": -2, "text_config": TEXT, "vision_config": VISION}


def language(folder: Path) -> Path:
    """Of mlx-lm; ``preferences`` has pairs of answers."""
    folder_of_lora(folder)
    rows = [{"prompt": "A" * (i % 4 + 1), "chosen": "BCD EF", "rejected": "HGF"} for i in range(ROWS)]
    return _with_data(folder, "preferences", rows)


def embeddings(folder: Path) -> Path:
    """Of mlx-embeddings."""
    qwen = import_module("mlx_embeddings.models.qwen3")
    _with_model(folder, qwen.Model(qwen.ModelArgs(**TINY_QWEN)), TINY_QWEN)
    rows = [{"anchor": chr(65 + i) * 4, "positive": chr(65 + i) * 3 + "Z"} for i in range(ROWS)]
    return _with_data(folder, "data", rows)


def vision(folder: Path) -> Path:
    """Of mlx-vlm, with a processor."""
    transformers: Any = import_module("transformers")
    llava = import_module("mlx_vlm.models.llava")
    config = llava.ModelConfig.from_dict(json.loads(json.dumps(TINY_LLAVA)))
    config.text_config = llava.TextConfig.from_dict(TEXT)
    config.vision_config = llava.VisionConfig.from_dict(VISION)
    _with_model(folder, llava.Model(config), TINY_LLAVA)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder / "model")
    (folder / "model/config.json").write_text(json.dumps(TINY_LLAVA))
    answer = {"role": "assistant", "content": "CDEF"}
    rows = [{"messages": [{"role": "user", "content": f"AB{chr(65 + i)}"}, answer]} for i in range(ROWS)]
    return _with_data(folder, "data", rows)


def _with_model(folder: Path, model: Any, config: dict[str, Any]) -> None:
    """Write a model with random weights beside the tokenizer of single characters."""
    folder_of_lora(folder / "lora")
    shutil.move(folder / "lora/model", folder / "model")
    mx.random.seed(0)
    model.apply(lambda x: mx.random.normal(x.shape) * 0.1)
    mx.save_safetensors(str(folder / "model/model.safetensors"), dict(leaves(model.parameters())), {"format": "mlx"})
    (folder / "model/config.json").write_text(json.dumps(config))


def _with_data(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / name).mkdir(exist_ok=True)
    for split in ("train", "valid", "validation", "test"):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
