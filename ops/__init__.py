"""Operators of models, one file each: typing rule, what it does on local tensors, derivative."""
from shardlib.ops import attention as _attention
from shardlib.ops import attention_vjp, kv_cache, sampling
from shardlib.ops import cross_entropy as _cross_entropy
from shardlib.ops import expert_capacity as _expert_capacity
from shardlib.ops import expert_slots as _expert_slots
from shardlib.ops import experts as _experts
from shardlib.ops import group_norm as _group_norm
from shardlib.ops import layer_norm as _layer_norm
from shardlib.ops import rms_norm as _rms_norm
from shardlib.ops import rope as _rope
from shardlib.ops import route as _route
from shardlib.ops import take as _take
from shardlib.ops.attention import attention
from shardlib.ops.cross_entropy import cross_entropy
from shardlib.ops.expert_capacity import within_capacity
from shardlib.ops.expert_slots import slots_of
from shardlib.ops.experts import combine, dispatch, grouped_einsum
from shardlib.ops.group_norm import group_norm
from shardlib.ops.kv_cache import causal_mask, update_cache
from shardlib.ops.layer_norm import layer_norm
from shardlib.ops.rms_norm import rms_norm
from shardlib.ops.rope import rope, rope_table
from shardlib.ops.route import route
from shardlib.ops.router_losses import load_balancing_loss, router_z_loss
from shardlib.ops.sampling import sample
from shardlib.ops.take import embedding, one_hot, scatter_add, take

TABLE = {**_attention.TABLE, **attention_vjp.TABLE, **_cross_entropy.TABLE, **_expert_capacity.TABLE,
         **_expert_slots.TABLE, **_experts.TABLE, **_group_norm.TABLE, **kv_cache.TABLE, **_layer_norm.TABLE,
         **_rms_norm.TABLE, **_rope.TABLE, **_route.TABLE, **sampling.TABLE, **_take.TABLE}

__all__ = ["attention", "causal_mask", "combine", "cross_entropy", "dispatch", "embedding", "group_norm",
           "grouped_einsum", "layer_norm", "load_balancing_loss", "one_hot", "rms_norm", "rope", "rope_table",
           "route", "router_z_loss", "sample", "scatter_add", "slots_of", "take", "update_cache",
           "within_capacity"]
