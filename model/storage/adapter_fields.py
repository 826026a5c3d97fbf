"""`adapter_config.json`, field by field of PEFT's `LoraConfig`: what becomes of each, and which values it may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HONOURED: Mapping[str, tuple[type, ...]] = {
    "alpha_pattern": (dict,),
    "base_model_name_or_path": (str,),
    "ensure_weight_tying": (bool,),
    "lora_alpha": (int, float),
    "peft_type": (str,),
    "trainable_token_indices": (list, dict),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}
"""Fields that decide what is computed, with the types they may have beside null."""

NO_EFFECT: Mapping[str, str] = {
    "auto_mapping": "the base's own config.json says what it is",
    "corda_config": "how training began: what it did to the base is refused with init_lora_weights",
    "eva_config": "how training began",
    "exclude_modules": "the tensors' names say what was adapted",
    "fan_in_fan_out": "how the base stores its matrices is known by its family",
    "inference_mode": "nothing is trained here",
    "layers_pattern": "the tensors' names say what was adapted",
    "layers_to_transform": "the tensors' names say what was adapted",
    "loftq_config": "how training began: what it did to the base is refused with init_lora_weights",
    "lora_dropout": "acts in training only",
    "lora_ga_config": "how training began: what it did to the base is refused with init_lora_weights",
    "megatron_core": "names the library of a kind that is refused with megatron_config",
    "modules_to_save": "the tensors' names say what is stored whole",
    "peft_version": "says what wrote the file",
    "qalora_group_size": "acts with use_qalora, which is refused",
    "r": "the tensors have the rank",
    "rank_pattern": "the tensors have the rank",
    "revision": "the base is a directory, whichever revision lies there; topkapi.json has its digest",
    "runtime_config": "how PEFT computes; it is never stored",
    "target_modules": "the tensors' names say what was adapted",
    "task_type": "the tensors' names say what was adapted",
}
"""Fields that may have any value, and why."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "kasa_config": (),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "megatron_config": ({},),
    "monteclora_config": (),
    "target_parameters": ([],),
    "use_bdlora": (False, {}),
    "use_qalora": (False,),
    "velora_config": (),
}
"""Fields that change what is computed in ways not known here, with the values beside null that change nothing."""


def refused(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first field that cannot be honoured, and what is wrong with it; None where there is none.

    A field that is in no table is of a later PEFT, and may mean anything unless it is empty.
    """
    for name, value in settings.items():
        if value is None or name in NO_EFFECT:
            continue
        shown = repr(value)[:100]
        if name in HONOURED:
            if not isinstance(value, HONOURED[name]) or (isinstance(value, bool) and bool not in HONOURED[name]):
                return name, f"has {name} = {shown}, which is of another type than PEFT's"
        elif name not in REFUSED:
            if value not in (False, "", [], {}):
                return name, f"was made with {name} = {shown}, which is not known"
        elif not any(value is plain or (value == plain and type(value) is type(plain)) for plain in REFUSED[name]):
            return name, f"was made with {name} = {shown}, which is not supported"
    return None
