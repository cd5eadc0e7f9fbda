# pip install transformers open_clip_torch && PYTHONPATH=.:tests python tests/golden/record_clips.py
"""Features of small CLIPs in transformers and OpenCLIP, written to tests/golden/clip_*.pt."""

from copy import deepcopy

import torch
from conftest import TEXTS, weights

from util.clip_files import tokenize

WIDE = dict(hidden_size=64, num_attention_heads=1, intermediate_size=96, num_hidden_layers=2,
            image_size=64, patch_size=16)
NARROW = WIDE | dict(hidden_size=48, num_attention_heads=3, hidden_act="gelu")
OPEN_CLIP = {"vision_cfg": dict(width=48, head_width=16, mlp_ratio=3, layers=2, image_size=64),
             "text_cfg": dict(width=32, heads=4, layers=3)}
CONFIGS = {
    "hugging_face_gelu": {"vision_config": NARROW, "text_config": NARROW | {"hidden_size": 24}},
    "hugging_face_quick_gelu": {"vision_config": WIDE, "text_config": NARROW,
                                "text_config_dict": WIDE | {"eos_token_id": 2}},
    "open_clip_gelu": OPEN_CLIP,
    "open_clip_quick_gelu": OPEN_CLIP | {"quick_gelu": True, "custom_text": True}}


@torch.no_grad()
def main() -> None:
    """Record G (2, D), I (2, N, D) and T (3, D); the weights follow from their names."""
    import open_clip
    import transformers
    images, tokens = weights({"images": (2, 3, 64, 64)})["images"], tokenize(TEXTS, 77)
    for name, config in CONFIGS.items():
        if name.startswith("hugging_face"):
            config = {"model_type": "clip", "projection_dim": 16} | config
            model = transformers.CLIPModel(transformers.CLIPConfig(**deepcopy(config)))
        else:
            kind = open_clip.CustomTextCLIP if "custom_text" in config else open_clip.CLIP
            model = kind(16, config["vision_cfg"], config["text_cfg"], "quick_gelu" in config)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        model.eval().load_state_dict(weights(shapes))
        if "vision_config" in config:
            X = model.vision_model(images).last_hidden_state  # (2, 1 + N, D_v)
            X = model.visual_projection(model.vision_model.post_layernorm(X))  # (2, 1 + N, D)
            G, I = X[:, 0], X[:, 1:]
            T = model.text_projection(model.text_model(tokens).pooler_output)
        else:
            model.visual.output_tokens = True
            G, I = model.visual(images)
            I, T = I @ model.visual.proj, model.encode_text(tokens)
        record = dict(config=config, shapes=shapes, G=G, I=I, T=T)
        torch.save(record, f"tests/golden/clip_{name}.pt")


if __name__ == "__main__":
    main()
