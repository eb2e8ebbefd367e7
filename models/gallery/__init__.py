"""Models on one page each: no line of them names an axis, and every layout runs them."""
from shardlib.models.gallery.bert import BERT
from shardlib.models.gallery.deepseek_v3 import DEEPSEEK_V3
from shardlib.models.gallery.gemma2 import GEMMA2
from shardlib.models.gallery.gpt2 import GPT2
from shardlib.models.gallery.layouts import EXPERTS, LAYOUTS
from shardlib.models.gallery.mamba2 import MAMBA2
from shardlib.models.gallery.mistral import MISTRAL
from shardlib.models.gallery.olmo2 import OLMO2
from shardlib.models.gallery.olmoe import OLMOE
from shardlib.models.gallery.page import Config, Page, config_of, load
from shardlib.models.gallery.phi3 import PHI3
from shardlib.models.gallery.qwen import QWEN2, QWEN3
from shardlib.models.gallery.qwen3_moe import QWEN3_MOE
from shardlib.models.gallery.t5 import T5_PAGE
from shardlib.models.gallery.vit import VIT

PAGES = {page.name: page for page in (
    GPT2, BERT, MISTRAL, QWEN2, QWEN3, OLMO2, PHI3, GEMMA2, MAMBA2, VIT, T5_PAGE,
    QWEN3_MOE, OLMOE, DEEPSEEK_V3)}

__all__ = ["EXPERTS", "LAYOUTS", "PAGES", "Config", "Page", "config_of", "load"]
