# The demo's small GLM-4: the family's every trait, at a size for two CPU cores
MODEL_ARGS=(
   --swiglu
   --num-layers 4
   --hidden-size 128
   --ffn-hidden-size 512
   --num-attention-heads 4
   --group-query-attention
   --num-query-groups 2
   --kv-channels 32
   --vocab-size 128
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --disable-bias-linear
   --add-qkv-bias
   --post-self-attn-layernorm
   --post-mlp-layernorm
   --untie-embeddings-and-output-weights
   --position-embedding-type rope
   --rotary-base 10000
   --rotary-percent 0.5
   --rotary-interleaved
   --no-rope-fusion
)
