"""A layer spec with the paper's settings, for Megatron-LM: ``--spec nsa_cp.megatron.spec nsa_layer_spec``.

For other settings copy these lines into a module of your own.
"""

from nsa_cp.config import NSAConfig, RotaryConfig
from nsa_cp.megatron.config import AttentionSettings
from nsa_cp.megatron.layer_specs import get_nsa_transformer_layer_spec

nsa_layer_spec = get_nsa_transformer_layer_spec(AttentionSettings(nsa=NSAConfig(), rotary=RotaryConfig()))
