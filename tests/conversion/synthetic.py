"""Small checkpoints in the layout of the original repositories, with the names written out independently."""

import torch

STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def detr_checkpoint(
    backbone="resnet50",
    num_labels=91,
    num_queries=100,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn=48,
    decoder_ffn=64,
    learned=False,
    device="cpu",
):
    """State dict of an original DETR; on the device "meta" it has names and shapes only."""
    shapes = {f"backbone.0.body.{name}": shape for name, shape in backbone_shapes(backbone).items()}
    if learned:
        shapes |= {f"backbone.1.{name}_embed.weight": (50, d_model // 2) for name in ("row", "col")}
    channels = 512 if backbone in ("resnet18", "resnet34") else 2048
    shapes |= linear("input_proj", (d_model, channels, 1, 1))
    for i in range(encoder_layers):
        shapes |= transformer_layer(f"transformer.encoder.layers.{i}", d_model, encoder_ffn, ("self_attn",))
    for i in range(decoder_layers):
        attentions = ("self_attn", "multihead_attn")
        shapes |= transformer_layer(f"transformer.decoder.layers.{i}", d_model, decoder_ffn, attentions)
    shapes |= linear("transformer.decoder.norm", (d_model,))
    shapes |= linear("class_embed", (num_labels + 1, d_model))
    for i, size in enumerate((d_model, d_model, 4)):
        shapes |= linear(f"bbox_embed.layers.{i}", (size, d_model))
    shapes["query_embed.weight"] = (num_queries, d_model)
    return fill(shapes, device)


def conditional_detr_checkpoint(num_labels=91, num_queries=300, d_model=32, decoder_layers=2, device="cpu"):
    """State dict of an original Conditional DETR; on the device "meta" it has names and shapes only."""
    tensors = detr_checkpoint(
        num_labels=num_labels - 1, num_queries=num_queries, d_model=d_model, decoder_layers=decoder_layers,
        device="meta",
    )  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if "decoder.layers" not in name}
    square = (d_model, d_model)
    parts = [f"sa_{part}_proj" for part in ("qcontent", "qpos", "kcontent", "kpos", "v")]
    parts += [f"ca_{part}_proj" for part in ("qcontent", "kcontent", "kpos", "v", "qpos_sine")]
    parts += ["self_attn.out_proj", "cross_attn.out_proj"]
    for i in range(decoder_layers):
        prefix = f"transformer.decoder.layers.{i}"
        shapes |= transformer_layer(prefix, d_model, 64, ())
        for part in [*parts, "ca_qpos_proj"] if i == 0 else parts:
            shapes |= linear(f"{prefix}.{part}", square)
        for norm in ("norm2", "norm3"):
            shapes |= linear(f"{prefix}.{norm}", (d_model,))
    for i, (scale, point) in enumerate(((d_model, d_model), (d_model, 2))):
        shapes |= linear(f"transformer.decoder.query_scale.layers.{i}", (scale, d_model))
        shapes |= linear(f"transformer.decoder.ref_point_head.layers.{i}", (point, d_model))
    return fill(shapes, device)


def deformable_detr_checkpoint(
    num_labels=91, num_queries=300, d_model=32, levels=4, refine=False, two_stage=False, device="cpu"
):
    """State dict of an original Deformable DETR with an encoder and two decoder layers and eight heads.

    The original saves a head that several layers share once for each, and those that the decoder uses once
    more under its name. On the device "meta" it has names and shapes only.
    """
    shapes = {f"backbone.0.body.{name}": shape for name, shape in backbone_shapes("resnet50").items()}
    channels = [512, 1024, 2048] if levels > 1 else [2048]
    for level in range(levels):
        kernel, source = (1, channels[level]) if level < len(channels) else (3, channels[-1])
        shapes |= linear(f"input_proj.{level}.0", (d_model, source, kernel, kernel))
        shapes |= linear(f"input_proj.{level}.1", (d_model,))
    shapes["transformer.level_embed"] = (levels, d_model)
    encoder, decoder = "transformer.encoder.layers.0", "transformer.decoder.layers"
    shapes |= transformer_layer(encoder, d_model, 48, ())
    shapes |= linear(f"{encoder}.norm2", (d_model,)) | sampling(f"{encoder}.self_attn", d_model, levels)
    for i in range(2):
        shapes |= transformer_layer(f"{decoder}.{i}", d_model, 64, ("self_attn",))
        shapes |= linear(f"{decoder}.{i}.norm3", (d_model,))
        shapes |= sampling(f"{decoder}.{i}.cross_attn", d_model, levels)
    if two_stage:
        shapes |= linear("transformer.enc_output", (d_model, d_model))
        shapes |= linear("transformer.enc_output_norm", (d_model,))
        shapes |= linear("transformer.pos_trans", (2 * d_model, 2 * d_model))
        shapes |= linear("transformer.pos_trans_norm", (2 * d_model,))
    else:
        shapes |= linear("transformer.reference_points", (2, d_model))
        shapes["query_embed.weight"] = (num_queries, 2 * d_model)
    heads = 2 + two_stage
    for i in range(heads):
        shapes |= linear(f"class_embed.{i}", (num_labels, d_model))
        for k, size in enumerate((d_model, d_model, 4)):
            shapes |= linear(f"bbox_embed.{i}.layers.{k}", (size, d_model))
    tensors = fill(shapes, device)
    if not refine:
        for name in [n for n in tensors if n.startswith(("class_embed.1.", "bbox_embed.1."))]:
            tensors[name] = tensors[name.replace("_embed.1.", "_embed.0.")]
    doubled = ("bbox_embed.", "class_embed.")[: refine + two_stage]
    own = [n for n in tensors if doubled and n.startswith(doubled)]
    return tensors | {f"transformer.decoder.{n}": tensors[n] for n in own}


def sampling(prefix, d_model, levels):
    samples = 8 * levels * 4
    shapes = linear(f"{prefix}.sampling_offsets", (2 * samples, d_model))
    shapes |= linear(f"{prefix}.attention_weights", (samples, d_model))
    return (
        shapes
        | linear(f"{prefix}.value_proj", (d_model, d_model))
        | linear(f"{prefix}.output_proj", (d_model, d_model))
    )


def transformer_layer(prefix, d_model, ffn, attentions):
    shapes = {}
    for attention in attentions:
        shapes[f"{prefix}.{attention}.in_proj_weight"] = (3 * d_model, d_model)
        shapes[f"{prefix}.{attention}.in_proj_bias"] = (3 * d_model,)
        shapes |= linear(f"{prefix}.{attention}.out_proj", (d_model, d_model))
    shapes |= linear(f"{prefix}.linear1", (ffn, d_model)) | linear(f"{prefix}.linear2", (d_model, ffn))
    for i in range(len(attentions) + 1):
        shapes |= linear(f"{prefix}.norm{i + 1}", (d_model,))
    return shapes


def backbone_shapes(backbone):
    bottleneck = backbone not in ("resnet18", "resnet34")
    shapes = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64)
    channels = 64
    for stage, blocks in enumerate(STAGES[backbone], start=1):
        width = 32 * 2**stage
        out = 4 * width if bottleneck else width
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            sizes = [(width, channels, 1), (width, width, 3), (out, width, 1)]
            for i, (c_out, c_in, k) in enumerate(
                sizes if bottleneck else [(out, channels, 3), (out, out, 3)], 1
            ):
                shapes[f"{prefix}.conv{i}.weight"] = (c_out, c_in, k, k)
                shapes |= batch_norm(f"{prefix}.bn{i}", c_out)
            if block == 0 and (stage > 1 or bottleneck):
                shapes[f"{prefix}.downsample.0.weight"] = (out, channels, 1, 1)
                shapes |= batch_norm(f"{prefix}.downsample.1", out)
            channels = out
    return shapes


def batch_norm(prefix, channels):
    return {f"{prefix}.{leaf}": (channels,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def linear(prefix, weight):
    return {f"{prefix}.weight": weight, f"{prefix}.bias": weight[:1]}


def fill(shapes, device):
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, device=device)
        if device != "meta":
            fan_in = max(tensor[0].numel(), 1)
            tensor.normal_(std=fan_in**-0.5 if tensor.ndim > 1 else 0.1, generator=generator)
            if tensor.ndim == 1 and (name.endswith("running_var") or name.endswith("weight")):
                tensor.abs_().add_(0.5)
        tensors[name] = tensor
    return tensors
