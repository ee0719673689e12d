"""The section of the card on loading the model."""

import transformers

from .content import CardContent


PROCESSORS = {
    "AutoTokenizer": "tokenizer",
    "AutoImageProcessor": "image_processor",
    "AutoFeatureExtractor": "feature_extractor",
    "AutoProcessor": "processor",
}


def loading_text(content: CardContent) -> str:
    """The requirements for loading the model."""
    sentences = []
    if content.adapter:
        sentences.append("This is an adapter: it needs PEFT and the base model that it was trained on.")
    if content.needs_plugin:
        sentences.append(
            "The attention of the model has learned parameters, which need the package `hf-attentiondrop` (from a "
            "clone of its repository: `pip install .`) and the line `import hf_attentiondrop` before the model is "
            "loaded. Without them, loading fails with an error."
        )
    if not sentences:
        where = "in stock Transformers " if hasattr(transformers, content.model_class) else ""
        return f"It loads {where}without this package: in evaluation mode its attention is stock attention."
    return " ".join(sentences)


def loading_code(content: CardContent) -> str:
    """Python code that loads the model and its tokenizer or processor."""
    place = f'"{content.repo_id}"' if content.repo_id else '"."  # the folder of this card'
    is_known = hasattr(transformers, content.model_class)
    names = (content.model_class if is_known else None, content.processor)
    imported = sorted(filter(None, names), key=str.lower)
    lines = (
        ["import hf_attentiondrop  # registers the attention that config.json names"] if content.needs_plugin else []
    )
    lines += ["from peft import PeftModel"] if content.adapter else []
    lines += [f"from transformers import {', '.join(imported)}"] if imported else []
    lines += [] if is_known else [f"# Import {content.model_class} from the code that defines it."]
    lines += ["", f"checkpoint = {place}"]
    if content.adapter:
        classes = f", num_labels={content.num_labels}, ignore_mismatched_sizes=True" if content.num_labels else ""
        base = f'"{content.base_model}"' if content.base_model else '"path/to/the/base/model"'
        lines += [
            f"model = {content.model_class}.from_pretrained({base}{classes})",
            "model = PeftModel.from_pretrained(model, checkpoint)",
        ]
    else:
        lines.append(f"model = {content.model_class}.from_pretrained(checkpoint)")
    if content.processor:
        lines.append(f"{PROCESSORS[content.processor]} = {content.processor}.from_pretrained(checkpoint)")
    return "\n".join(lines)
