"""What Meta and Hugging Face call the same modules of a network."""

TO_HUGGING_FACE = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
TO_META = {theirs: ours for ours, theirs in TO_HUGGING_FACE.items()}
