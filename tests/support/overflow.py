"""Weights, all finite, with which the rows of one token come to NaN."""


def head_of_token_95(tensors):
    """Only token 95 has channel 0, whose part of the head's input overflows."""
    tensors["backbone.embeddings.weight"][:95, 0] = 0
    tensors["backbone.embeddings.weight"][95, 0] = 50
    last = ("mixer.out_proj", "o_proj", "mixer.down_proj", "shared_experts.down_proj", "fc2_latent_proj")
    for name, weight in tensors.items():
        if name.removesuffix(".weight").endswith(last):
            weight[0] = 0  # of all that a layer adds to this channel
    tensors["backbone.norm_f.weight"][0] = 3e38
