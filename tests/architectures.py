"""Every architecture of the sweep, built tiny, offline and without dropout from its own config class.

`ARCHITECTURES` is the table. A row says only what neither `TINY` nor the signature of the model's forward tells.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES


Inputs = dict[str, torch.Tensor]

BATCH, LENGTH, DECODER_LENGTH, PADDING = 3, 10, 8, 3
IMAGE, PATCH, CHANNELS = 16, 4, 3
SAMPLES = 3600
IMAGE_TOKEN = 99


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Values for the fields of any config class; where a default is a list, the value is repeated to its length. Four heads
# over two key/value heads make for GQA wherever a family has it, and every window is shorter than the sequence.
TINY: dict[str, Any] = {
    **_each("hidden_size d_model n_embd embed_dim dim emb_dim hidden_dim encoder_hidden_size decoder_hidden_size", 32),
    **_each("hidden_sizes embedding_size entity_emb_size word_embed_proj_dim projection_dim out_hidden_size", 32),
    **_each("entity_vocab_size text_hidden_size output_dim vision_output_dim image_text_hidden_size", 32),
    **_each("intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff feed_forward_size dff mlp_dim", 64),
    **_each("moe_intermediate_size shared_expert_intermediate_size codevector_dim proj_codevector_dim conv_dim", 16),
    **_each("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth", 2),
    **_each("encoder_num_hidden_layers decoder_num_hidden_layers", 2),
    **_each("depths", 1),
    **_each("num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads", 4),
    **_each("attention_heads encoder_num_attention_heads decoder_num_attention_heads resampler_n_heads", 4),
    **_each("num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads", 2),
    **_each("head_dim d_kv attention_head_size resampler_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim", 8),
    **_each("linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads rotary_dim", 4),
    **_each("max_position_embeddings n_positions max_source_positions max_target_positions max_length", 64),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("n_group topk_group n_shared_experts block_sizes", 1),
    **_each("num_experts_per_tok moe_k moe_topk", 2),
    **_each("kv_lora_rank q_lora_rank", 16),
    **_each("num_mel_bins feature_projection_input_dim input_feat_per_channel", 8),
    **_each("pad_token_id", 0),
    **_each("bos_token_id decoder_start_token_id", 1),
    **_each("eos_token_id", 2),
    **_each("image_token_id image_token_index", IMAGE_TOKEN),
    **_each("video_token_id", IMAGE_TOKEN - 1),
    **_each("image_size input_size", IMAGE),
    **_each("num_queries num_query_tokens resampler_n_latents", 6),
    **_each("sliding_window window_size attention_window", 4),
    **_each("num_frames temporal_patch_size resampler_depth", 2),
    **_each("drop_path_rate apply_spec_augment mask_time_prob router_jitter_noise input_jitter_noise", 0),
    "patch_size": PATCH,
    "tubelet_size": 1,
    **_each("vocab_size src_vocab_size tgt_vocab_size", 100),
}


class Architecture(NamedTuple):
    """How to build and run a model, and its properties.

    Attributes:
        model_type: the key of its config class.
        config: config values beyond `TINY`; a dict for a sub-config.
        model_class: name of the model class; by default the one of `AutoModel`.
        inputs: given the config, the inputs that differ from those of [`tiny_inputs`].
        supported: whether AttentionDrop works; otherwise building the model must raise an error.
        since: the first version of Transformers with which it works.
        causal: whether (decoder) tokens must not depend on later tokens.
        padded: whether it takes text with padding, on which no token may depend.
    """

    model_type: str
    config: dict[str, Any] = {}
    model_class: str = ""
    inputs: Callable[[PreTrainedConfig], Inputs] = lambda config: {}
    supported: bool = True
    causal: bool = False
    padded: bool = False
    since: str = "5"

    @property
    def works(self) -> bool:
        return self.supported and Version(transformers.__version__) >= Version(self.since)


# Before Transformers 5.20 a config class does not say which sub-configs it has by default, and an instance of these
# needs arguments or other packages.
_BERT_AS_DECODER = ("bert", {"is_decoder": True, "add_cross_attention": True})
_RESNET = {"backbone_config": ("resnet", {"out_features": ["stage4"]})}
_OLD_SUB_CONFIGS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    **_each("detr conditional_detr deformable_detr", _RESNET),
    "encoder-decoder": {"encoder": ("bert", {}), "decoder": _BERT_AS_DECODER},
    "vision-encoder-decoder": {"encoder": ("vit", {}), "decoder": _BERT_AS_DECODER},
    "vision-text-dual-encoder": {"text_config": ("bert", {}), "vision_config": ("vit", {})},
}


def tiny_config(
    config_class: type[PreTrainedConfig], given: dict[str, Any], defaults: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """Builds a config: what was given, else `TINY` and no dropout, else the defaults."""
    values = {key: value for key, value in (defaults or {}).items() if key not in TINY}
    for field in dataclasses.fields(config_class):
        if field.name in TINY:
            values[field.name] = _like(field.default, TINY[field.name])
        elif "drop" in field.name and type(field.default) is float:
            values[field.name] = 0.0
    values |= given
    for name, sub_class, model_type, sub_defaults in _sub_configs(config_class, given):
        sub_given = dict(given.get(name, {}))
        if sub_class is AutoConfig:
            sub_class = CONFIG_MAPPING[sub_given.pop("model_type", model_type)]
        sub_config = tiny_config(sub_class, sub_given, sub_defaults)
        # Old classes of pairs take dicts only.
        values[name] = sub_config if hasattr(config_class, "sub_configs_defaults") else sub_config.to_dict()
    return config_class(**values)


def _sub_configs(
    config_class: type[PreTrainedConfig], given: dict[str, Any]
) -> Iterator[tuple[str, type[PreTrainedConfig], str, dict[str, Any]]]:
    """Name, class, model type and values of the sub-configs that a config has by default or by what was given."""
    if hasattr(config_class, "sub_configs_defaults"):
        for name, spec in config_class.sub_configs_defaults.items():
            if not spec.optional or name in given:
                yield name, spec.config_class, spec.model_type, spec.init_kwargs
        return
    if config_class.model_type in _OLD_SUB_CONFIGS:
        for name, (model_type, values) in _OLD_SUB_CONFIGS[config_class.model_type].items():
            yield name, AutoConfig, model_type, values
        return
    default = config_class()
    for name, sub_class in config_class.sub_configs.items():
        sub_config = getattr(default, name)
        if sub_config is not None or name in given:
            values = {} if sub_config is None else _changed_values(sub_config)
            yield name, sub_class, getattr(sub_config, "model_type", ""), values


def _changed_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What differs from the defaults of the config's class."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}


def _like(default: Any, value: Any) -> Any:
    """The value in the type of a default: repeated where that is a list."""
    if isinstance(default, list | tuple):
        return [_like(item, value) for item in default]
    return type(default)(value) if isinstance(default, int | float) else value


def build(name: str, attn_implementation: str | None = None, **entries: Any) -> PreTrainedModel:
    """Builds an architecture, with the same weights every time, but for those of a learned method.

    Args:
        name: key of `ARCHITECTURES`.
        attn_implementation: by default what stock Transformers takes.
        entries: go into the config, `attention_drop` or `attention_reweighting`.
    """
    architecture = ARCHITECTURES[name]
    config = tiny_config(CONFIG_MAPPING[architecture.model_type], architecture.config)
    for key, value in entries.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return model_class(name)._from_config(config, attn_implementation=attn_implementation)


def model_class(name: str) -> type[PreTrainedModel]:
    """Returns the model class of an architecture."""
    architecture = ARCHITECTURES[name]
    class_name = architecture.model_class or MODEL_MAPPING_NAMES[architecture.model_type]
    return getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])


def tiny_inputs(name: str, model: PreTrainedModel) -> Inputs:
    """Returns the inputs of a model's forward: padded text, text to decode, pixels, waveforms."""
    torch.manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    inputs = {}
    if "input_ids" in accepted:
        inputs.update(text())
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = text(DECODER_LENGTH)["input_ids"]
    if "pixel_values" in accepted:
        inputs["pixel_values"] = torch.randn(BATCH, CHANNELS, IMAGE, IMAGE)
    if "input_values" in accepted:
        inputs["input_values"] = torch.randn(BATCH, SAMPLES)
    inputs.update(ARCHITECTURES[name].inputs(model.config))
    if "input_values" in inputs and inputs["input_values"].shape[1:] == (SAMPLES,):
        inputs["attention_mask"] = torch.ones(BATCH, SAMPLES, dtype=torch.long)
        inputs["attention_mask"][-1, -SAMPLES // 3 :] = 0
    return {key: value for key, value in inputs.items() if key in accepted}


def text(length: int = LENGTH, image_tokens: int = 0) -> Inputs:
    """Returns tokens; the second row is padded on the left and the third on the right."""
    input_ids = torch.randint(10, 90, (BATCH, length + image_tokens))
    input_ids[:, PADDING : PADDING + image_tokens] = IMAGE_TOKEN
    input_ids[:, -PADDING - 1] = TINY["eos_token_id"]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :PADDING] = 0
    attention_mask[2, -PADDING:] = 0
    # CLIP pools at the highest token id, so padding ids are lower than all text.
    return {"input_ids": torch.where(attention_mask == 1, input_ids, 3), "attention_mask": attention_mask}


def _patches(config: PreTrainedConfig) -> Inputs:
    """Images as patches, and text with their tokens, as the Qwen-VL family expects them."""
    vision = config.vision_config
    side = IMAGE // PATCH
    inputs = text(image_tokens=(side // vision.spatial_merge_size) ** 2)
    return {
        **inputs,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(BATCH * side**2, CHANNELS * vision.temporal_patch_size * PATCH**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * BATCH),
    }


def _image_tokens(count: int, **shapes: tuple[int, ...]) -> Callable[[PreTrainedConfig], Inputs]:
    """Text with image tokens, and random tensors."""
    return lambda config: {**text(image_tokens=count), **_tensors(**shapes)(config)}


def _tensors(**shapes: tuple[int, ...]) -> Callable[[PreTrainedConfig], Inputs]:
    """Random tensors of these shapes for every sample."""
    return lambda config: {key: torch.randn(BATCH, *shape) for key, shape in shapes.items()}


def _encoder_states(config: PreTrainedConfig) -> Inputs:
    """Encoder states for a decoder with cross-attention; the end of the last row is padding."""
    mask = torch.ones(BATCH, DECODER_LENGTH)
    mask[-1, -PADDING:] = 0
    return {"encoder_hidden_states": torch.randn(BATCH, DECODER_LENGTH, 32), "encoder_attention_mask": mask}


def _sized_images(config: PreTrainedConfig) -> Inputs:
    """Text with image tokens, and image sizes."""
    return {**text(image_tokens=4), "image_sizes": torch.full((BATCH, 2), IMAGE)}


def _flamingo(config: PreTrainedConfig) -> Inputs:
    """Text in which each sample attends to one image."""
    visible = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
    return {"pixel_values": torch.randn(BATCH, 1, CHANNELS, IMAGE, IMAGE), "image_attention_mask": visible}


def _tiles(config: PreTrainedConfig) -> Inputs:
    """Text that attends to an image of four tiles, of which its last token sees only three."""
    visible = torch.ones(BATCH, LENGTH, 1, 4)
    visible[:, -1, :, -1] = 0
    return {
        "pixel_values": torch.randn(BATCH, 1, 4, CHANNELS, IMAGE, IMAGE),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 4),
        "cross_attention_mask": visible,
    }


def _ragged_patches(config: PreTrainedConfig) -> Inputs:
    """Images of several shapes, cut into patches beforehand, the rest padded."""
    return {
        "pixel_values": torch.randn(BATCH, 16, CHANNELS * PATCH**2),
        "pixel_attention_mask": torch.tensor([16, 16, 12])[:, None] > torch.arange(16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4], [3, 4]]),
    }


def _instructions(config: PreTrainedConfig) -> Inputs:
    """Text that holds the tokens of an image, and a second text that tells what to look for in it."""
    instruction = text(DECODER_LENGTH)
    return {
        **text(image_tokens=6),
        "qformer_input_ids": instruction["input_ids"],
        "qformer_attention_mask": instruction["attention_mask"],
    }


_CROSS = {"is_decoder": True, "add_cross_attention": True}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_WINDOWS = {"depths": [2, 1], "num_heads": [4, 4], "window_size": 2}
_MROPE_AND_WINDOWS = {"text_config": _MROPE, "vision_config": {"window_size": 16}}
_CROSS_LAYERS = {
    "text_config": {"cross_attention_layers": [1]},
    "vision_config": {"vision_output_dim": 64, "num_global_layers": 1, "intermediate_layers_indices": [0]},
}
# Otherwise most of it is frozen, and cross-attention is multiplied by zero until it is trained.
_UNFROZEN = {"freeze_text_layers": False, "freeze_vision_layers": False, "alpha_initializer": "ones"}
_IMAGE = (CHANNELS, IMAGE, IMAGE)
_VIDEO = (2, *_IMAGE)

# Model types that need no more than their name.
_DECODERS = """
    afmoe apertus arcee aria_text biogpt bitnet cohere cohere2 ctrl cwm diffllama doge dots1 ernie4_5 ernie4_5_moe
    exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe jetmoe llama llama4_text mimo_v2_flash minimax
    ministral mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma
"""
_ENCODERS = """
    albert bert bert-generation camembert data2vec-text distilbert electra ernie esm eurobert gte layoutlm markuplm
    modernbert nomic_bert roberta roberta-prelayernorm splinter xlm-roberta xlm-roberta-xl
"""
_ENCODER_DECODERS = """
    bart blenderbot blenderbot-small longt5 m2m_100 marian mbart mt5 pegasus plbart switch_transformers t5 t5gemma
"""
_IMAGES_AUDIO_AND_PAIRS = """
    beit clip_vision_model conditional_detr deformable_detr deit detr dinov2 dinov2_with_registers dpt ijepa maskformer
    mlcd vit vit_msn yolos
    data2vec-audio hubert sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer
    aimv2 altclip chinese_clip clip clipseg dpr metaclip_2 owlv2 owlvit siglip vision-text-dual-encoder
"""
# Models that ignore the interface, or use it in one part and misinterpret its masks in another.
_UNSUPPORTED = """
    big_bird bigbird_pegasus blip bloom canine convbert data2vec-vision deberta deberta-v2 deepseek_v4 falcon
    falcon_mamba flaubert flava fnet focalnet fsmt funnel git gpt_neox_japanese groupvit ibert imagegpt led longformer
    luke mamba megatron-bert mpnet mpt mra mvp nllb-moe nystromformer openai-gpt pegasus_x prophetnet rembert
    resnet roformer sam_vision_model sew-d squeezebert table-transformer tapas vilt visual_bert vitdet wavlm xglm xlm
    xlnet yoso
"""

_ROWS = [
    *(Architecture(name, causal=True, padded=True) for name in f"{_DECODERS} {_ENCODER_DECODERS}".split()),
    *(Architecture(name, padded=True) for name in _ENCODERS.split()),
    *(Architecture(name) for name in _IMAGES_AUDIO_AND_PAIRS.split()),
    *(Architecture(name, supported=False) for name in _UNSUPPORTED.split()),
    # Text
    Architecture("clip_text_model", causal=True, padded=True),
    Architecture("deepseek_v2", {"num_key_value_heads": 4}, causal=True, padded=True),
    Architecture("deepseek_v3", {"num_key_value_heads": 4}, causal=True, padded=True),
    Architecture("encoder-decoder", model_class="EncoderDecoderModel", causal=True, padded=True),
    Architecture("gemma4_text", {"vocab_size_per_layer_input": 100}, causal=True, padded=True),
    Architecture("lfm2", {"layer_types": ["conv", "full_attention"]}, causal=True, padded=True),
    Architecture("mobilebert", {"trigram_input": False}, padded=True),
    Architecture("qwen3_5_text", _HYBRID, causal=True, padded=True),
    Architecture("qwen3_next", _HYBRID, causal=True, padded=True),
    Architecture("codegen", causal=True, padded=True, since="5.24"),
    Architecture("gptj", causal=True, padded=True, since="5.24"),
    Architecture("layoutlmv3", {"coordinate_size": 4, "shape_size": 8}, since="5.24"),
    # Before, its decoder is not marked causal, and stock SDPA lets it see later tokens.
    Architecture("umt5", causal=True, padded=True, since="5.18"),
    Architecture("roc_bert", {"pronunciation_vocab_size": 100, "shape_vocab_size": 100}, padded=True),
    # Images and video
    Architecture("dinov3_vit", {"pos_embed_rescale": None}),
    Architecture("segformer", {"sr_ratios": [2, 1, 1, 1]}, inputs=_tensors(pixel_values=(CHANNELS, 64, 64))),
    Architecture("siglip2", inputs=_ragged_patches),
    Architecture("swin", _WINDOWS),
    Architecture("videomae", inputs=_tensors(pixel_values=_VIDEO)),
    Architecture("vision-encoder-decoder", model_class="VisionEncoderDecoderModel", causal=True),
    Architecture("vit_mae", inputs=_tensors(noise=(16,))),
    Architecture("vivit", inputs=_tensors(pixel_values=_VIDEO)),
    # Audio and time series
    Architecture("audio-spectrogram-transformer", inputs=_tensors(input_values=(64, 8))),
    Architecture("moonshine", {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}, causal=True),
    Architecture("patchtst", inputs=_tensors(past_values=(32, 1))),
    Architecture("speech_to_text", inputs=_tensors(input_features=(64, 8)), causal=True),
    Architecture("wav2vec2-bert", inputs=_tensors(input_features=(LENGTH, 8))),
    Architecture("whisper", inputs=_tensors(input_features=(8, 128)), causal=True),
    # Text about images
    Architecture("blip-2", inputs=_image_tokens(6)),
    Architecture("gemma3", {"mm_tokens_per_image": 4}, inputs=_image_tokens(4), causal=True, padded=True),
    Architecture("idefics", _UNFROZEN, inputs=_flamingo, causal=True, padded=True),
    Architecture("idefics2", inputs=_image_tokens(6, pixel_values=(1, *_IMAGE)), causal=True, padded=True),
    Architecture("idefics3", inputs=_image_tokens(4, pixel_values=(1, *_IMAGE)), causal=True, padded=True),
    Architecture("instructblip", inputs=_instructions),
    Architecture("internvl", inputs=_image_tokens(4), causal=True, padded=True),
    Architecture("llava", inputs=_image_tokens(16), causal=True, padded=True),
    Architecture("mistral3", inputs=_sized_images, causal=True, padded=True),
    Architecture("mllama", _CROSS_LAYERS, inputs=_tiles, causal=True, padded=True),
    Architecture("paligemma", inputs=_image_tokens(16), causal=True, padded=True),
    Architecture("qwen2_vl", {"text_config": _MROPE}, inputs=_patches, causal=True, padded=True),
    Architecture("qwen2_5_vl", _MROPE_AND_WINDOWS, inputs=_patches, causal=True, padded=True),
    Architecture("qwen3_vl", inputs=_patches, causal=True, padded=True),
    Architecture("vipllava", {"vision_feature_layers": [-1, -2]}, inputs=_image_tokens(16), causal=True, padded=True),
    # Unsupported
    Architecture("bros", {"hidden_size": 64}, supported=False),
    Architecture("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, supported=False),
    Architecture("lilt", {"hidden_size": 48}, supported=False),
    Architecture("reformer", {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]}, supported=False),
    Architecture("speecht5", model_class="SpeechT5ForSpeechToText", supported=False),
    Architecture("swinv2", _WINDOWS, supported=False),
]

ARCHITECTURES: dict[str, Architecture] = {
    **{row.model_type: row for row in _ROWS},
    "bert (decoder)": Architecture("bert", _CROSS, "BertLMHeadModel", _encoder_states, causal=True, padded=True),
    "gpt2 (with cross-attention)": Architecture("gpt2", _CROSS, inputs=_encoder_states, causal=True, padded=True),
}
SUPPORTED = [name for name, architecture in ARCHITECTURES.items() if architecture.works]
UNSUPPORTED = [name for name, architecture in ARCHITECTURES.items() if not architecture.works]
# Model types that the installed Transformers does not have yet.
ABSENT = [name for name, architecture in ARCHITECTURES.items() if architecture.model_type not in CONFIG_MAPPING]
