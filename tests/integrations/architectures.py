"""A tiny model of each architecture of mlx-lm that has ``shard()``, with parameters that are the same on every rank."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten

VOCABULARY = 64

BASE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
ROPE: dict[str, Any] = {"rope_theta": 1e4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
DEEPSEEK: dict[str, Any] = BASE | ROUTED | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 1}
MISTRAL: dict[str, Any] = ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128}
LONGCAT: dict[str, Any] = (
    LATENT
    | ROPE
    | {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "zero_expert_type": "identity",
        "moe_topk": 2,
        "max_position_embeddings": 128,
        "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "attention_method": "MLA",
        "attention_bias": False,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    }
)
LAYERS = ["sliding_attention", "full_attention"]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK | {"rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 64}},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK | {"index_head_dim": 16, "index_n_heads": 4, "index_topk": 8},
    "exaone_moe": BASE
    | EXPERTS
    | ROPE
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_shared_experts": 1,
        "sliding_window": 8,
        "layer_types": LAYERS,
        "is_moe_layer": [False, True],
    },
    "glm4_moe": BASE
    | ROUTED
    | ROPE
    | {
        "head_dim": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "rope_scaling": None,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe_lite": DEEPSEEK,
    "gpt_oss": BASE
    | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 8},
    "iquestloopcoder": BASE | {"head_dim": 8, "loop_window_size": 8},
    "kimi_k25": {"text_config": DEEPSEEK},
    "kimi_k3": {
        "text_config": BASE
        | LATENT
        | {
            "num_key_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "linear_attn_config": {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4, "kda_layers": [1]},
        }
    },
    "llama": BASE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT | {"ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
    "minimax": BASE
    | ROPE
    | {
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
    },
    "minimax_m3_vl": {
        "text_config": BASE
        | {
            "head_dim": 8,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [0, 1],
        }
    },
    "ministral3": BASE | {"rope_parameters": MISTRAL, "layer_types": LAYERS, "sliding_window": 8},
    "mistral4": DEEPSEEK | {"rope_parameters": MISTRAL, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    "qwen2": BASE,
    "qwen3": BASE | ROPE | {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_5": {
        "text_config": BASE
        | EXPERTS
        | {
            "head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
    },
    "qwen3_moe": BASE
    | EXPERTS
    | ROPE
    | {
        "head_dim": 8,
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
    },
    "step3p5": BASE
    | {
        "num_attention_groups": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": LAYERS,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
    },
}
# Their gradient under tensor parallelism is not that of the whole model: mlx-lm's forward pass has no operation whose
# backward pass sums over the ranks what their shards send back into values that every rank computes.
LATENTS = "the latents of keys and values"
WRONG = {
    "deepseek_v2": LATENTS,
    "deepseek_v3": LATENTS,
    "deepseek_v32": LATENTS,
    "glm4_moe_lite": LATENTS,
    "kimi_k25": LATENTS,
    "kimi_k3": LATENTS,
    "longcat_flash": LATENTS,
    "longcat_flash_ngram": LATENTS,
    "minimax": "the sum of squares in the norms of queries and keys",
    "mistral4": LATENTS,
}

# What has no gradient on a CPU, sharded or not: a configuration, and the error.
CANNOT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "deepseek_v41": (
        BASE
        | EXPERTS
        | {"head_dim": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "o_groups": 2, "o_lora_rank": 8}
        # Heads of 8 are not rounded to 8 bits, which would have no gradient either.
        | {"n_routed_experts": 4, "sliding_window": 8, "rms_norm_eps": 1e-6, "hc_mult": 2},
        ValueError,
        "Cannot calculate VJP with respect to indices",  # the router's choice
    ),
    "muse_spark": (
        {
            "text_config": BASE
            | {"head_dim": 8, "post_norm_eps": 1e-5, "rope_parameters": ROPE}
            | {"layer_rope_theta": [1e4, 0.0], "layer_types": LAYERS, "sliding_window": 8, "num_local_experts": 4}
            | {"final_logit_softcapping": 30.0, "output_multiplier": 1.0, "num_experts_per_tok": 2}
            | {"moe_hidden_size": 32, "moe_intermediate_size": 32}
        },
        RuntimeError,
        "No Metal back-end",  # its layers are kernels for Metal alone
    ),
}


@cache
def with_shard() -> list[str]:
    """The names of mlx-lm's architectures whose model can be sharded."""
    folder = Path(mlx_lm.__file__).parent / "models"
    return sorted(path.stem for path in folder.glob("*.py") if "def shard(" in path.read_text())


def make(name: str, configuration: dict[str, Any] | None = None, *, seed: int = 0) -> Any:
    """A model in float32, with random parameters that depend on the configuration and the seed alone."""
    module = import_module(f"mlx_lm.models.{name}")
    configuration = configuration or CONFIGURATIONS[name]
    model = module.Model(module.ModelArgs.from_dict({**configuration, "model_type": name}))
    parameters: Any = tree_flatten(model.parameters())
    filled = []
    for number, (path, leaf) in enumerate(parameters):
        noise = mx.random.normal(leaf.shape, key=mx.random.key(number + 7 + 1000 * seed))
        filled.append((path, 1 + 0.3 * noise if "norm" in path and leaf.ndim == 1 else 0.25 * noise))
    model.load_weights(filled)
    mx.eval(model.parameters())
    return model


def tokens(rows: int = 3, *, seed: int = 1) -> mx.array:
    """Rows of random tokens, the same on every rank: int32, shape (rows, 14)."""
    return mx.random.randint(0, VOCABULARY, (rows, 14), key=mx.random.key(seed))
