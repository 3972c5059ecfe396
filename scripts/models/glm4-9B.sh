# GLM-4-9B-0414, GLM-Z1-9B-0414
MODEL_ARGS=(
   --swiglu
   --num-layers 40
   --hidden-size 4096
   --ffn-hidden-size 13696
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 2
   --kv-channels 128
   --vocab-size 151552
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
