"""Names, shapes and transforms of Qwen3.5-MoE's tensors, stored and in GGUF."""

from __future__ import annotations

from collections.abc import Mapping

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.models.deltanet import DeltaNet
from reap2gguf.models.description import ModelFacts, Transform
from reap2gguf.models.limits import MAX_WIDTH
from reap2gguf.models.tensors import add_one

# HF name -> GGUF name, outside the layers, below the text prefix
OUTER = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
# HF name -> GGUF name, within a layer of either kind
COMMON = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
ATTENTION = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
DELTANET = {
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
# HF name -> GGUF name, of the MTP block besides its layer
MTP = {
    "fc.weight": "nextn.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
ROUTER = "mlp.gate.weight"
ALWAYS_F32 = (ROUTER, "mlp.shared_expert_gate.weight", "linear_attn.conv1d.weight")
# Modules of a layer that multiply the same input.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a",
     "linear_attn.in_proj_b"),
    ("linear_attn.out_proj",),
    ("mlp.gate",),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
    ("mlp.shared_expert_gate",),
)  # fmt: skip


def transform_of(name: str, deltanet: DeltaNet) -> Transform | None:
    """What llama.cpp's converter does to a tensor besides renaming it."""
    transforms: dict[str, Transform] = {
        "linear_attn.in_proj_qkv.weight": deltanet.mixed,
        "linear_attn.in_proj_z.weight": deltanet.gates,
        "linear_attn.in_proj_a.weight": deltanet.heads,
        "linear_attn.in_proj_b.weight": deltanet.heads,
        "linear_attn.conv1d.weight": deltanet.convolution,
        "linear_attn.A_log": deltanet.decay,
        "linear_attn.dt_bias": deltanet.heads,
        "linear_attn.out_proj.weight": deltanet.outputs,
    }
    if name.endswith(("norm.weight", "_norm_embedding.weight", "_norm_hidden.weight")):
        return None if name == "linear_attn.norm.weight" else add_one
    return transforms.get(name)


def layer_shapes(
    facts: ModelFacts, net: DeltaNet, read: ConfigReader
) -> Mapping[str, tuple[int, ...]]:
    """Stored shapes of everything but experts in a layer, of either kind."""
    hidden, head = facts.hidden_size, facts.head_dim
    query, key = facts.n_heads * head, facts.n_kv_heads * head
    shared = read.integer("shared_expert_intermediate_size", low=1, high=MAX_WIDTH)
    kernel = read.integer("linear_conv_kernel_dim", low=1, high=MAX_WIDTH)
    mixed = 2 * net.key_width + net.value_width
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        ROUTER: (facts.n_experts, hidden),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "mlp.shared_expert.up_proj.weight": (shared, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
        # each query head brings a gate of its own
        "self_attn.q_proj.weight": (2 * query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "linear_attn.in_proj_qkv.weight": (mixed, hidden),
        "linear_attn.in_proj_z.weight": (net.value_width, hidden),
        "linear_attn.in_proj_a.weight": (net.n_value_heads, hidden),
        "linear_attn.in_proj_b.weight": (net.n_value_heads, hidden),
        "linear_attn.conv1d.weight": (mixed, 1, kernel),
        "linear_attn.A_log": (net.n_value_heads,),
        "linear_attn.dt_bias": (net.n_value_heads,),
        "linear_attn.norm.weight": (net.value_dim,),
        "linear_attn.out_proj.weight": (hidden, net.value_width),
    }
